"""Output buffers of the operators, shared by fakes and implementations so that they cannot drift.

All are fresh and contiguous whatever the strides of the inputs; gradients nobody needs have size 0.
"""

from torch import Tensor

from mmadapt.ops._checks import accumulation_dtype


def gradient(of: Tensor, needed: bool) -> Tensor:
    """A contiguous buffer in the shape and dtype of `of`, or of size 0."""
    return of.new_empty(of.shape if needed else (0,))


def swiglu_adapter_outputs(
    x: Tensor, gate: Tensor, norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, d], zg [T, m], zd [T, m] in `x.dtype`; rstd [T] or [0] in fp32 (fp64 for fp64)."""
    tokens, rank = x.shape[0], gate.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(tokens, rank),
        x.new_empty(tokens, rank),
        x.new_empty(0 if norm_weight is None else tokens, dtype=accumulation_dtype(x.dtype)),
    )


def swiglu_adapter_gradients(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    norm_weight: Tensor | None,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dgate, ddown, dup, dnorm, each like its tensor."""
    return (
        gradient(x, needs[0]),
        gradient(gate, needs[1]),
        gradient(down, needs[2]),
        gradient(up, needs[3]),
        gate.new_empty(0) if norm_weight is None else gradient(norm_weight, needs[4]),
    )


def cp_linear_outputs(
    x: Tensor, weights: list[Tensor], factor_in: Tensor
) -> tuple[list[Tensor], Tensor]:
    """One y [T, o_k] per weight and z [T, R], all in `x.dtype`."""
    tokens = x.shape[0]
    return [x.new_empty(tokens, w.shape[0]) for w in weights], x.new_empty(
        tokens, factor_in.shape[0]
    )


def projected_modality_gate_outputs(value: Tensor) -> tuple[Tensor, Tensor]:
    """y [T, H, h] and the gate tanh(logits) [T, H] in fp32 (fp64 for fp64), 0 outside the mask."""
    gate = value.new_empty(value.shape[:2], dtype=accumulation_dtype(value.dtype))
    return value.new_empty(value.shape), gate


def projected_modality_gate_inplace_outputs(value: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """Masked rows of `value` before gating ([T, H, h], other rows unwritten, or [0]); the gate."""
    gate = value.new_empty(value.shape[:2], dtype=accumulation_dtype(value.dtype))
    return gradient(value, save), gate


def cp_linear_gradients(
    x: Tensor,
    factor_in: Tensor,
    factor_out: Tensor,
    modes: list[Tensor],
    biases: list[Tensor | None],
    needs: tuple[bool, bool, bool],
    needs_modes: tuple[bool, ...],
    needs_biases: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """dx, dfactor_in, dfactor_out, one dmode and one dbias per weight, each like its tensor."""
    return (
        gradient(x, needs[0]),
        gradient(factor_in, needs[1]),
        gradient(factor_out, needs[2]),
        [gradient(m, n) for m, n in zip(modes, needs_modes, strict=True)],
        [
            x.new_empty(0) if b is None else gradient(b, n)
            for b, n in zip(biases, needs_biases, strict=True)
        ],
    )
