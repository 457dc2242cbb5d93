"""PILL's gate on the attention values of one modality's tokens."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mmadapt.ops import modality_gate, projected_modality_gate


class ModalityGate(nn.Module):
    """Multiply the values of masked tokens, head by head, by ``tanh`` of a learned logit.

    Args:
        dim: width of the hidden states that ``v_proj`` reads.
        num_heads: heads of `value` (key-value heads in grouped-query attention).
        kind: ``"token"`` (released code): logits = ``hidden @ gate.T``; ``"static"`` (the paper's
            text): one learned logit per head.

    Parameter: `gate` ``[num_heads, dim]`` or ``[num_heads]``, zeros: a fresh gate erases the values
    of masked tokens and leaves the others as they are.

    Source: PILL (arXiv 2311.02126), modality attention gating.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kind: str = "token",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 1 or num_heads < 1:
            raise ValueError(
                f"dim and num_heads must be positive, got dim={dim}, num_heads={num_heads}"
            )
        if kind not in ("token", "static"):
            raise ValueError(f"kind must be 'token' or 'static', got {kind!r}")
        self.dim = dim
        self.num_heads = num_heads
        self.kind = kind
        shape = (num_heads, dim) if kind == "token" else (num_heads,)
        self.gate = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros."""
        nn.init.zeros_(self.gate)

    def forward(
        self, value: Tensor, mask: Tensor, hidden: Tensor | None = None, *, inplace: bool = False
    ) -> Tensor:
        """Gate `value` ``[..., H, h]`` or ``[..., H * h]`` where `mask` ``[...]`` (bool) is true.

        `hidden` ``[..., dim]`` is needed by ``kind="token"`` and ignored by ``kind="static"``.
        `inplace` lets it overwrite `value`, see `mmadapt.ops.modality_gate`: use the result.
        """
        if self.kind == "static":
            return modality_gate(value, self.gate, mask, inplace=inplace)
        hidden = self._required(hidden)
        return projected_modality_gate(value, hidden, self.gate, mask, inplace=inplace)

    def activation(self, hidden: Tensor | None = None) -> Tensor:
        """The gate ``tanh(logits)``: ``[..., H]`` for ``"token"``, ``[H]`` for ``"static"``."""
        if self.kind == "static":
            return torch.tanh(self.gate)
        hidden = self._required(hidden)
        return torch.tanh(linear(hidden, self.gate.to(hidden.dtype)))

    def _required(self, hidden: Tensor | None) -> Tensor:
        if hidden is None:
            raise ValueError("hidden is None, expected [..., dim] for a gate of kind 'token'")
        return hidden

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, kind={self.kind!r}"
