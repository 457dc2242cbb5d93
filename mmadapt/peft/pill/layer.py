"""What the three PILL wrappers have in common: adapters by name, one of them active, a stage."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmadapt.nn import LinearAdapter, SwiGLUAdapter
from mmadapt.peft.pill.config import PillConfig
from mmadapt.peft.wrapping import Wrapper

if TYPE_CHECKING:
    from mmadapt.peft.pill.deferred_norm import DeferredNorm, Norm

PREFIX = "mmadapt_pill_"
VISION = PREFIX + "vision"
TEXT = PREFIX + "text"
SHARED = PREFIX + "shared"
ATTENTION = PREFIX + "attn"
GATE = PREFIX + "gate"
PROJECTOR = PREFIX + "proj"

ALIGN_TRAINABLE = frozenset({VISION, PROJECTOR})


class PillLayer(Wrapper):
    """Wraps one module of the frozen model, under `base_layer`.

    Adapters sit in `nn.ModuleDict`s keyed by adapter name, one per part, whose attribute names
    start with `mmadapt_pill_`. Attributes that are not found here are the base layer's.

    Attributes:
        deferred_norm: the norm in front of this wrapper if it can leave its work to it.
        norm_reason: else why it cannot; None where there is no norm to speak of.
    """

    method = "PILL"
    cannot_merge = (
        "PILL depends on its input (which tokens are visual) and cannot be merged into the base "
        "weights; keep the adapter beside the model with save_pretrained, or remove it with "
        "unload()"
    )
    other_param_names = ("mmadapt_pill_config",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.mmadapt_pill_config: dict[str, PillConfig] = {}
        self.deferred_norm: DeferredNorm | None = None
        self.norm_reason: str | None = None

    def update_layer(self, adapter_name: str, config: PillConfig) -> None:
        """Add the adapter `adapter_name`, on the device and in the dtype of the base layer."""
        self.mmadapt_pill_config[adapter_name] = config
        for name, part in self.new_parts(config).items():
            getattr(self, name)[adapter_name] = part
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def new_parts(self, config: PillConfig) -> dict[str, nn.Module]:
        """Fresh modules of one adapter, by the name of the part."""
        raise NotImplementedError

    @property
    def current(self) -> str | None:
        """Name of the active adapter if it is enabled and present on this layer."""
        if self._disable_adapters or not self._active_adapter:
            return None
        name = self.active_adapters[0]
        return name if name in self.mmadapt_pill_config else None

    def part(self, name: str) -> nn.Module | None:
        """The active adapter's module for one part, or None."""
        current = self.current
        parts = getattr(self, name)
        return parts[current] if current is not None and current in parts else None

    def first_adapters(self) -> list[SwiGLUAdapter | LinearAdapter]:
        """The active adapter's modules that run on the input of this wrapper, by expert."""
        return []

    def norm_refusal(self) -> str | None:
        """Why the active adapter cannot compute the norm in front of it; None if it can."""
        adapters = self.first_adapters()
        if not adapters:
            return "no adapter is active here"
        if not self.mmadapt_pill_config[self.current].fuse_norms:
            return "PillConfig.fuse_norms is False"
        if not isinstance(adapters[0], SwiGLUAdapter):
            return "the fused op has no linear adapter"
        return None

    def take_norm(self, x: Tensor) -> "Norm | None":
        """Weight and epsilon of a norm that has left its work on `x` to this wrapper."""
        return None if self.deferred_norm is None else self.deferred_norm.take(x)

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        super().set_adapter(adapter_names, *args, **kwargs)
        self._freeze_outside_stage(self.active_adapters)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_outside_stage(
            [adapter_names] if isinstance(adapter_names, str) else adapter_names
        )

    def _freeze_outside_stage(self, adapter_names: Sequence[str]) -> None:
        for adapter in adapter_names:
            config = self.mmadapt_pill_config.get(adapter)
            if config is None or config.stage != "align":
                continue
            for name in set(self.adapter_layer_names) - ALIGN_TRAINABLE:
                if adapter in getattr(self, name):
                    getattr(self, name)[adapter].requires_grad_(False)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        base_layer = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        if self.deferred_norm is not None:
            self.deferred_norm.remove()
        return base_layer
