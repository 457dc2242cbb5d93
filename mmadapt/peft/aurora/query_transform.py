"""Gated Query Transformation: text layers add what they attended with (docs/aurora.md)."""

from typing import Any

import torch
from torch import Tensor, nn

from mmadapt.peft.aurora.config import AuroraConfig
from mmadapt.peft.aurora.layer import PREFIX, AuroraLayer, Shared

SCALE_SELF = PREFIX + "scale_self"
SHIFT_SELF = PREFIX + "shift_self"
SCALE_CROSS = PREFIX + "scale_cross"
SHIFT_CROSS = PREFIX + "shift_cross"
QUERY_TRANSFORM = (SCALE_SELF, SHIFT_SELF, SCALE_CROSS, SHIFT_CROSS)

CANNOT_MERGE = (
    "the query transformation acts on states, not through a weight, and cannot be merged: keep the "
    "adapter beside the model with save_pretrained, merge in place with merge_adapter (which "
    "leaves it running), or train with AuroraConfig(gqt=False)"
)


class AuroraQueryTransform(AuroraLayer):
    """Wraps the end of a text layer, its FFN's output with LayerNorm and skip.

    ``base(h, c) + factor * (a * scale_self + shift_self + c * scale_cross + shift_cross)`` with a
    and c the outputs of self- and cross-attention behind their LayerNorms; added behind the FFN's
    LayerNorm, without another. Only where cross-attention has run: text alone passes unchanged.

    Args:
        base_layer: the text layer's `output`.
        shared: what the wrappers of the tuner share.
        layer: the text layer, with `attention` and `crossattention`.

    Parameters per adapter: four vectors ``[d]``, N(0, 0.0002²).
    """

    adapter_layer_names = QUERY_TRANSFORM

    def __init__(self, base_layer: nn.Module, shared: Shared, layer: nn.Module) -> None:
        super().__init__(base_layer, shared)
        self.dim = base_layer.LayerNorm.normalized_shape[0]
        self._self_states: Tensor | None = None
        self._is_multimodal = False
        self._hooks = [
            layer.attention.register_forward_hook(self._keep_self),
            layer.crossattention.register_forward_hook(self._note_cross),
        ]

    def new_parameters(self, config: AuroraConfig) -> dict[str, nn.Parameter]:
        std = 2e-4 if config.init_weights else 0.3
        return {
            name: nn.Parameter(torch.empty(self.dim).normal_(std=std)) for name in QUERY_TRANSFORM
        }

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        y = self.base_layer(hidden_states, input_tensor)
        states, multimodal = self._self_states, self._is_multimodal
        self._self_states, self._is_multimodal = None, False
        if not multimodal:
            return y
        for name in self.current:
            scale_self, shift_self, scale_cross, shift_cross = (
                getattr(self, part)[name].to(y.dtype) for part in QUERY_TRANSFORM
            )
            added = states * scale_self + shift_self + input_tensor * scale_cross + shift_cross
            y = y + self.mmadapt_aurora_config[name].gqt_factor * added
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: it goes on beside merged weights."""

    def unmerge(self) -> None:
        """Nothing: it was not merged."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The bare end of the layer. PEFT calls this from `unload`."""
        for hook in self._hooks:
            hook.remove()
        return self.base_layer

    def _keep_self(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._self_states = output[0] if self.current else None
        self._is_multimodal = False

    def _note_cross(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._is_multimodal = True

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # The wrapped module has no `weight` of its own, where PEFT would look.
        weight = base_layer.LayerNorm.weight
        return weight.device, weight.dtype

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_self_states": None}
