"""Informative Context Enhancement: text context added to fused features before the ITM head.

One image may fit many texts, so Aurora (arXiv 2305.08381) adds the context of the available
texts to what cross-attention made of a pair. In the released code that is the mean of the local
batch's unimodal text states, times 0.1, and it is added to positive pairs only and in training
only. A constant that positives carry and negatives lack is a hint at the label which vanishes
at test time; the other modes do without it.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

ICEMode = Literal["off", "released", "symmetric", "symmetric+inference"]
ICE_MODES: tuple[str, ...] = get_args(ICEMode)


class InformativeContext(nn.Module):
    """Adds `factor * context` to fused states; without parameters.

    mode:
        "off": nothing is added.
        "released": positives of training batches.
        "symmetric": positives and negatives of training batches.
        "symmetric+inference": the same, and every pair that is scored at test time; the context
            there is the mean over all texts of the gallery.

    Raises:
        ValueError: unknown mode.
    """

    def __init__(self, mode: ICEMode = "released", *, factor: float = 0.1) -> None:
        super().__init__()
        if mode not in ICE_MODES:
            raise ValueError(f"mode: expected one of {', '.join(ICE_MODES)}; got {mode!r}")
        self.mode, self.factor = mode, factor

    @staticmethod
    def context(text_states: Tensor) -> Tensor:
        """`[d]`: mean of unimodal text states `[N, d]` (CLS); it carries their gradient."""
        return text_states.mean(0)

    def train_pairs(
        self, positive: Tensor, negative: Tensor, text_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fused states of positive `[B, d]` and negative `[M, d]` pairs on the way to the head."""
        if self.mode == "off":
            return positive, negative
        added = self.factor * self.context(text_states)
        if self.mode == "released":
            return positive + added, negative
        return positive + added, negative + added

    def scored_pairs(self, fused: Tensor, context: Tensor | None) -> Tensor:
        """Fused states `[N, d]` at test time; `context` [d] is that of the gallery.

        Raises:
            ValueError: the mode needs the context and there is none.
        """
        if self.mode != "symmetric+inference":
            return fused
        if context is None:
            raise ValueError("context: mode 'symmetric+inference' needs the gallery's context")
        return fused + self.factor * context

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, factor={self.factor}"
