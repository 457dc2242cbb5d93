"""Attention with PILL's adapter in front and its gate on the values (docs/pill.md)."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mmadapt.nn import LinearAdapter, ModalityGate, SwiGLUAdapter
from mmadapt.peft.modality import LayerSlot, check_known
from mmadapt.peft.pill.adapters import apply_adapters, apply_gate, new_adapter
from mmadapt.peft.pill.config import PillConfig
from mmadapt.peft.pill.layer import ATTENTION, GATE, PillLayer


class PillAttention(PillLayer):
    """Wraps `self_attn`: `attn(n + A(n))`, where the values of image tokens are scaled per head.

    The gate is a forward hook on the inner `v_proj`, which this wrapper owns: values are gated
    before the cache and the attention kernel, so every attention backend works and the cache holds
    gated values. Its input is the adapted attention input.

    Args:
        base_layer: the attention module. A gate needs `v_proj` and `head_dim`.
        slot: shared with the `mlp` wrapper of the same layer.
        path: where the attention is, for messages.
        dim: width of the residual stream.
    """

    adapter_layer_names = (ATTENTION, GATE)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, slot: LayerSlot, path: str, dim: int
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.slot, self.path, self.dim = slot, path, dim
        self.probe: list[Tensor] | None = None  # per-call sums of |tanh gate|: see GateProfile
        self._hooks = []
        if hasattr(base_layer, "v_proj"):
            self._hooks.append(base_layer.v_proj.register_forward_hook(self._gate_values))
        if hasattr(base_layer, "k_proj"):
            self._hooks.append(base_layer.k_proj.register_forward_hook(self._repeat_keys))

    def new_parts(self, config: PillConfig) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {}
        if config.attention_adapter:
            parts[ATTENTION] = new_adapter(
                config.adapter, self.dim, config.rank, identity=config.init_weights
            )
        if config.gate != "none":
            self._check_gateable()
            heads = self.num_value_heads
            if config.gate_heads == "q" and self.groups > 1:
                heads *= self.groups
                warnings.warn(
                    f"PillConfig.gate_heads='q' repeats keys and values {self.groups} times, in "
                    "compute and in the cache",
                    stacklevel=2,
                )
            parts[GATE] = ModalityGate(self.dim, heads, kind=config.gate)
            if not config.init_weights:
                for parameter in parts[GATE].parameters():
                    nn.init.normal_(parameter, std=0.5)
        return parts

    @property
    def num_value_heads(self) -> int:
        """Number of key and value heads."""
        return self.base_layer.v_proj.out_features // self.base_layer.head_dim

    @property
    def groups(self) -> int:
        """Query heads per value head."""
        return getattr(self.base_layer, "num_key_value_groups", 1)

    @property
    def has_gate(self) -> bool:
        """Whether the active adapter gates this layer's values."""
        return self.part(GATE) is not None

    def first_adapters(self) -> list[SwiGLUAdapter | LinearAdapter]:
        adapter = self.part(ATTENTION)
        return [] if adapter is None else [adapter]

    def forward(self, hidden_states: Tensor, *args: Any, modality_ids: Any = None, **kwargs: Any):
        norm, current = self.take_norm(hidden_states), self.current
        if current is None:
            self.slot.modality_ids = None
            return self.base_layer(hidden_states, *args, **kwargs)
        self.slot.modality_ids = self._ids(current, modality_ids, hidden_states)
        adapters = self.first_adapters()
        if adapters:
            hidden_states = apply_adapters(adapters, hidden_states, None, norm)
        if not self._repeats_heads():
            return self.base_layer(hidden_states, *args, **kwargs)
        groups, self.base_layer.num_key_value_groups = self.groups, 1
        try:
            return self.base_layer(hidden_states, *args, **kwargs)
        finally:
            self.base_layer.num_key_value_groups = groups

    def unload_and_optionally_merge_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        base_layer = super().unload_and_optionally_merge_module(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        return base_layer

    def _ids(self, adapter: str, modality_ids: Any, hidden_states: Tensor) -> Tensor | None:
        ids = check_known(modality_ids)
        if ids is not None:
            return ids
        decoded = self.mmadapt_pill_config[adapter].decode_modality
        if decoded == "image" and hidden_states.shape[-2] == 1:
            return hidden_states.new_ones(hidden_states.shape[:-1], dtype=torch.int32)
        return None

    def _repeats_heads(self) -> bool:
        gate = self.part(GATE)
        # `num_key_value_groups` is 1 inside forward, so the width of the gate decides.
        return gate is not None and gate.num_heads != self.num_value_heads

    def _repeat(self, states: Tensor, gate: ModalityGate) -> Tensor:
        heads = self.num_value_heads
        states = states.unflatten(-1, (heads, -1))
        return states.repeat_interleave(gate.num_heads // heads, dim=-2).flatten(-2)

    def _repeat_keys(self, module: nn.Module, args: tuple, keys: Tensor) -> Tensor:
        return self._repeat(keys, self.part(GATE)) if self._repeats_heads() else keys

    def _gate_values(self, module: nn.Module, args: tuple, values: Tensor) -> Tensor:
        gate = self.part(GATE)
        if gate is None:
            return values
        inplace = self._may_overwrite(module, values)
        if self._repeats_heads():
            values, inplace = self._repeat(values, gate), False
        if self.mmadapt_pill_config[self.current].stage == "align":
            return values
        hidden, ids = args[0], self.slot.modality_ids
        if ids is None:
            if not (torch.is_grad_enabled() and gate.gate.requires_grad):
                return values
            # Keeps the gate in the graph, with a zero gradient, when no token is visual.
            ids = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int32)
        mask = ids.bool()
        if self.probe is not None:
            self.probe.append(_gate_sums(gate, hidden, mask))
        return apply_gate(gate, values, mask, hidden, inplace=inplace)

    def _may_overwrite(self, v_proj: nn.Module, values: Tensor) -> bool:
        """Whether nobody but attention has a use for the `values` that `v_proj` has just made."""
        if torch.compiler.is_compiling():
            return False
        # Another module may return what it keeps, or its input; a linear layer never does.
        fresh = isinstance(v_proj, nn.Linear) and values.is_contiguous()
        # A hook in front of the gate's may have kept the values, as may a dispatch mode: selective
        # activation checkpointing does, and raises in backward if they have changed since.
        hooks = v_proj._forward_hooks
        first = next(iter(hooks.values()), None) == self._gate_values
        seen = not first or _has_any_global_hook() or is_in_torch_dispatch_mode()
        return fresh and not values._is_view() and not seen

    def _check_gateable(self) -> None:
        base = self.base_layer
        children = sorted(dict(base.named_children()))
        if not hasattr(base, "v_proj") or not hasattr(base, "head_dim"):
            raise ValueError(
                f"{self.path} ({type(base).__name__}) is not supported by the value gate: looked "
                f"for a child `v_proj` and an attribute `head_dim`, found the children {children}; "
                "gate='none' works without"
            )


@torch.no_grad()
def _gate_sums(gate: ModalityGate, hidden: Tensor, mask: Tensor) -> Tensor:
    """Sum of |tanh gate| over image tokens and heads, and over how many of them: [2]."""
    activation = gate.activation(hidden).abs().double() * mask.unsqueeze(-1)
    return torch.stack([activation.sum(), mask.sum().double() * gate.num_heads])
