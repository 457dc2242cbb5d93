"""A frozen linear layer with Aurora's update (docs/aurora.md)."""

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from mmadapt.peft.aurora.branch import add_update, delta_weight, fused
from mmadapt.peft.aurora.config import AuroraConfig
from mmadapt.peft.aurora.image_states import projection_of
from mmadapt.peft.aurora.layer import MODE, AuroraLayer, Shared
from mmadapt.peft.aurora.layouts import chunk_modes
from mmadapt.peft.aurora.siblings import Siblings
from mmadapt.peft.aurora.sites import Site


class AuroraLinear(AuroraLayer):
    """Wraps a linear layer: ``base(x) + scale * (x factor_in^T) M factor_out^T``.

    Several active adapters add up.

    Args:
        base_layer: the frozen linear layer.
        shared: what the wrappers of the tuner share.
        site: what kind of weight it is.
        path: where the layer is, for messages.

    Parameter: `mode` ``[chunks, R]`` per adapter, U(±sqrt(6 / (R + fan))), Xavier as released.
    """

    adapter_layer_names = (MODE,)

    def __init__(self, base_layer: nn.Linear, shared: Shared, site: Site, path: str) -> None:
        super().__init__(base_layer, shared)
        self.site, self.path = site, path
        self.siblings: Siblings | None = None
        self._before_merge: Tensor | None = None
        shared.layers.append(self)

    @property
    def device(self) -> torch.device:
        return self.get_base_layer().weight.device

    @property
    def in_features(self) -> int:
        return self.get_base_layer().in_features

    @property
    def out_features(self) -> int:
        return self.get_base_layer().out_features

    @property
    def factor_widths(self) -> tuple[int, int]:
        """Input width of the first and output width of the second factor."""
        kind, chunks = self.site.kind, self.site.chunks
        width_in = self.in_features // (chunks if kind == "down" else 1)
        width_out = self.out_features // (chunks if kind in ("fused", "up") else 1)
        return width_in, width_out

    def new_parameters(self, config: AuroraConfig) -> dict[str, nn.Parameter]:
        bound = math.sqrt(6.0 / (config.rank + self.site.fan))
        mode = torch.empty(self.site.chunks, config.rank).uniform_(-bound, bound)
        return {MODE: nn.Parameter(mode)}

    def mode_vectors(self, adapter: str) -> nn.Parameter:
        """The adapter's mode vectors, ``[chunks, R]``."""
        return getattr(self, MODE)[adapter]

    def modes(self, adapter: str) -> list[Tensor]:
        """One mode per chunk as the operator takes it, ``[R, R]`` or ``[R]``."""
        core = self.shared.factors[adapter].core
        contracted = self.shared.contraction.get(adapter, core, self, self.shared.layers)
        return chunk_modes(contracted, self.site.kind, self.mmadapt_aurora_config[adapter].layout)

    def scale(self, adapter: str) -> float:
        return self.mmadapt_aurora_config[adapter].scale

    def active_dropout(self, adapter: str) -> float:
        """Probability of dropping an entry of the branch now."""
        return self.mmadapt_aurora_config[adapter].branch_dropout if self.training else 0.0

    @property
    def branch_dropout(self) -> float:
        """The largest such probability over the active adapters."""
        return max([self.active_dropout(name) for name in self.current], default=0.0)

    def refusal(self, adapter: str) -> str | None:
        """Why base and update cannot be one operator; None if they can."""
        base = self.base_layer
        if type(base) is not nn.Linear:
            return f"the base layer is a {type(base).__name__}"
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
            return "the base layer has hooks"
        if "forward" in base.__dict__:
            return "the base layer's forward is replaced"
        if base.weight.requires_grad:
            return "the base layer's weight is trained"
        for tensor in (base.weight, self.mode_vectors(adapter)):
            if type(tensor) not in (nn.Parameter, Tensor):
                return f"a parameter is a {type(tensor).__name__}"
        return None

    def can_fuse(self, x: Tensor, adapter: str) -> bool:
        return x.is_floating_point() and self.refusal(adapter) is None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters and self.merged:
            self.unmerge()
        names = self.current
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        first, *others = names
        z = self._projection(x, first)
        if z is not None or not self.can_fuse(x, first):
            y = add_update(self, self.base_layer(x, *args, **kwargs), x, first, z)
        elif others or self.siblings is None:
            y = fused(self, x, first)
        else:
            y = self.siblings.run(self, x, first)
        for name in others:
            y = add_update(self, y, x, name, self._projection(x, name))
        return y

    def _projection(self, x: Tensor, adapter: str) -> Tensor | None:
        return projection_of(x, adapter, self.shared.factors, training=self.training)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update as a matrix ``[out, in]``, in fp32, or fp64 where the base layer is."""
        dtype = torch.promote_types(self.get_base_layer().weight.dtype, torch.float32)
        return delta_weight(self, adapter).to(dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight: a sum in fp32, rounded once.

        The weight without them is kept until `unmerge`.

        Raises:
            ValueError: `safe_merge`, and the sum is not finite.
            TypeError: the base layer is no plain linear layer.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if self.has(n)]
        if not names:
            return
        base = self.get_base_layer()
        if not isinstance(base, nn.Linear) or not base.weight.is_floating_point():
            raise TypeError(f"{self.path} is a {type(base).__name__}, which Aurora cannot merge")
        exact = base.weight.to(torch.promote_types(base.weight.dtype, torch.float32))
        if self.merged:  # not on top of what has been rounded
            exact = self._before_merge.to(exact)
            names = self.merged_adapters + names
        for name in names:
            exact = exact + self.get_delta_weight(name)
            if safe_merge and not torch.isfinite(exact).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
        if not self.merged:
            self._before_merge = base.weight.detach().clone()
        base.weight.data = exact.to(base.weight.dtype)
        self.merged_adapters = names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the weight from before `merge` back, bit by bit."""
        if not self.merged:
            return
        weight = self.get_base_layer().weight
        weight.data = self._before_merge.to(weight.device, weight.dtype)
        self._before_merge, self.merged_adapters = None, []

    @torch.no_grad()
    def rounding_loss(self) -> float:
        """Norm of what rounding took from a merged update, relative to the update."""
        if not self.merged:
            return 0.0
        weight = self.get_base_layer().weight
        updates = sum(self.get_delta_weight(name) for name in self.merged_adapters)
        exact = self._before_merge.to(updates) + updates
        return ((weight.to(exact) - exact).norm() / updates.norm().clamp_min(1e-30)).item()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        weight = self.get_base_layer().weight
        if adapter_name in self.shared.factors and weight.is_floating_point():
            factors, first = self.shared.factors[adapter_name], self._first(adapter_name)
            if first is self:  # on a model spread over devices, with its first adapted layer
                factors.place(weight.device if device is None else device, weight.dtype)

    def _first(self, adapter: str) -> "AuroraLinear":
        return next(layer for layer in self.shared.layers if layer.has(adapter))


def check_layout(path: str, base: nn.Linear, site: Site, config: AuroraConfig) -> None:
    """Raise ValueError unless the weight can be cut into square ones as `config` asks."""
    if site.chunks == 0:
        raise ValueError(
            f"{path} maps {base.in_features} to {base.out_features} features: Aurora cuts an FFN "
            "into square weights, so one must be a multiple of the other; leave 'vit_mlp' out of "
            "AuroraConfig.components"
        )
    is_ffn = site.kind in ("up", "down") and site.chunks > 1
    if is_ffn and config.layout == "released" and config.rank % site.chunks:
        raise ValueError(
            f"AuroraConfig.rank={config.rank} is not divisible by {site.chunks}, which the "
            f"released layout of {path} needs; use mlp_layout='clean'"
        )
