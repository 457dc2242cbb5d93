"""The FFN with PILL's modality experts in front (MoMAE; docs/pill.md)."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmadapt.nn import LinearAdapter, SwiGLUAdapter
from mmadapt.peft.modality import LayerSlot
from mmadapt.peft.pill.adapters import apply_adapters, new_adapter
from mmadapt.peft.pill.config import PillConfig
from mmadapt.peft.pill.layer import SHARED, TEXT, VISION, PillLayer

if TYPE_CHECKING:
    from mmadapt.peft.pill.deferred_norm import Norm


class PillMlp(PillLayer):
    """Wraps `mlp`: `mlp(n + A(n))`, A the vision expert at image tokens and else the text expert.

    While training the align stage the last layer is routed the other way round: nothing reads
    its image tokens, so its vision expert would get no gradient. Evaluation never does that.

    Args:
        base_layer: the FFN.
        slot: shared with the attention wrapper of the same layer, which writes it.
        dim: width of the residual stream.
        is_last: whether this is the last decoder layer.
    """

    adapter_layer_names = (VISION, TEXT, SHARED)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, slot: LayerSlot, dim: int, is_last: bool
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.slot, self.dim, self.is_last = slot, dim, is_last

    def new_parts(self, config: PillConfig) -> dict[str, nn.Module]:
        names = (SHARED,) if config.experts == "shared" else (VISION, TEXT)
        return {
            name: new_adapter(config.adapter, self.dim, config.rank, identity=config.init_weights)
            for name in names
        }

    def first_adapters(self) -> list[SwiGLUAdapter | LinearAdapter]:
        parts = (self.part(name) for name in (SHARED, TEXT, VISION))
        return [part for part in parts if part is not None]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any):
        norm = self.take_norm(hidden_states)
        ids, current = self.slot.take(), self.current
        if current is not None:
            config = self.mmadapt_pill_config[current]
            hidden_states = self._adapt(hidden_states, ids, config, norm)
        return self.base_layer(hidden_states, *args, **kwargs)

    def _adapt(
        self, x: Tensor, ids: Tensor | None, config: PillConfig, norm: "Norm | None"
    ) -> Tensor:
        adapters = self.first_adapters()
        if config.experts == "shared":
            return apply_adapters(adapters, x, None, norm)
        if self.is_last and self.training and config.stage == "align":
            everywhere = x.new_zeros(x.shape[:-1], dtype=torch.int32)
            ids = 1 - (everywhere if ids is None else ids)
        if ids is None and not torch.is_grad_enabled():
            return apply_adapters(adapters[:1], x, None, norm)
        return apply_adapters(adapters, x, ids, norm)
