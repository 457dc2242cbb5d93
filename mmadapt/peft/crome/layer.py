"""What CROME's wrappers have in common: adapters by name, one of them active."""

from typing import Any

import torch
from torch import Tensor, nn

from mmadapt.nn import CrossModalAdapter
from mmadapt.peft.crome.config import CromeConfig
from mmadapt.peft.wrapping import Wrapper

PREFIX = "mmadapt_crome_"
ADAPTER = PREFIX + "adapter"


class CromeLayer(Wrapper):
    """Wraps one module of the frozen model, under `base_layer`, and owns the adapters.

    Attributes that are not found here are the base layer's.

    Args:
        base_layer: the wrapped module.
        dim: width of the language model.
        stream: `"visual"` or `"text"`: the branch that the wrapped module's output takes while the
            instruction does not take the text branch.
    """

    method = "CROME"
    cannot_merge = (
        "CROME's adapter is not linear and cannot be merged into the base weights; keep it beside "
        "the model with save_pretrained, or remove it with unload()"
    )
    adapter_layer_names = (ADAPTER,)
    other_param_names = ("mmadapt_crome_config",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, dim: int, stream: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.dim, self.stream = dim, stream
        self.mmadapt_crome_config: dict[str, CromeConfig] = {}

    def update_layer(self, adapter_name: str, config: CromeConfig) -> None:
        """Add the adapter `adapter_name`, on the device and in the dtype of the base layer."""
        self.mmadapt_crome_config[adapter_name] = config
        adapter = CrossModalAdapter(
            self.dim,
            config.rank or CrossModalAdapter.default_rank(self.dim),
            scale=config.residual_scale,
            norm_eps=1e-6 if config.pre_norm else None,
            bias=config.adapter_bias,
            gated=config.gated,
            share_up=config.share_up or not self.has_two_streams(config),
            share_input=config.share_input or not self.has_two_streams(config),
        )
        if not config.init_weights:
            nn.init.normal_(adapter.up, std=0.02)
        getattr(self, ADAPTER)[adapter_name] = adapter
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def has_two_streams(self, config: CromeConfig) -> bool:
        return config.instruction != "none"

    @property
    def current(self) -> str | None:
        """Name of the active adapter if it is enabled and present."""
        if self._disable_adapters or not self._active_adapter:
            return None
        name = self.active_adapters[0]
        return name if name in self.mmadapt_crome_config else None

    @property
    def config(self) -> CromeConfig | None:
        """Configuration of the active adapter, or None."""
        return None if self.current is None else self.mmadapt_crome_config[self.current]

    def adapt(self, x: Tensor, stream: str) -> Tensor:
        """`x` [..., dim] through the active adapter's branch for `stream`."""
        adapter = getattr(self, ADAPTER)[self.current]
        dtype = adapter.up.dtype
        # The operator takes fp32 weights beside half precision; else both are of one dtype.
        half = dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
        given = x if half else x.to(dtype)
        visual, text = (given, None) if stream == "visual" else (None, given)
        visual, text = adapter(visual, text)
        return (text if visual is None else visual).to(x.dtype)

    def anchor(self) -> Tensor | None:
        """A scalar zero that depends on what trains; None if nothing does."""
        if self.current is None:
            return None
        parameters = list(getattr(self, ADAPTER)[self.current].parameters())
        if not any(parameter.requires_grad for parameter in parameters):
            return None
        x = parameters[0].new_zeros(1, self.dim)
        streams = ("visual", "text") if self.has_two_streams(self.config) else (self.stream,)
        return sum(self.adapt(x, stream).sum() * 0 for stream in streams)


class CromeProjector(CromeLayer):
    """Wraps the projector: its output takes the adapter's branch."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        features = self.base_layer(*args, **kwargs)
        config = self.config
        if config is None:
            return features
        return self.adapt(features, "visual" if self.has_two_streams(config) else self.stream)


class CromeEmbeddings(CromeLayer):
    """Wraps the embedding table of a bare language model, which has no projector.

    Its hook (`plumbing.adapt_embeddings`) does the work, so that models which embed by themselves
    and models that are handed embeddings are treated alike.
    """

    def has_two_streams(self, config: CromeConfig) -> bool:
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(*args, **kwargs)
