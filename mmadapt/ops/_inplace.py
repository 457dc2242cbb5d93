"""When a gate may overwrite `value`, shared by the two gate contracts."""

import torch
from torch import Tensor

from mmadapt.ops._autocast import cast_activation

LEAF_ERROR = "a leaf Variable that requires grad is being used in an in-place operation."


def overwrites(value: Tensor, *others: Tensor) -> bool:
    """Whether a call with ``inplace=True`` overwrites `value`; False: it returns a new tensor.

    A new tensor under torch.compile (which plans buffers itself), where autocast changes the dtype
    of `value`, and where autograd tracks `value` as a view of another tensor: there torch would
    clone the gradient of the whole base three times in the backward of an in-place operation, which
    costs more than the copy it saves.

    Raises:
        ValueError: `value` is not contiguous, or shares memory with one of `others`.
        RuntimeError: `value` is a leaf that requires grad, or a view of one.
    """
    if torch.compiler.is_compiling() or cast_activation(value).dtype != value.dtype:
        return False
    if not value.is_contiguous():
        raise ValueError(
            f"value has strides {list(value.stride())}, expected a contiguous tensor for "
            "inplace=True"
        )
    for other in others:
        if _share_memory(value, other):
            raise ValueError("value shares memory with another argument, so inplace=True would "
                             "change that too")  # fmt: skip
    if torch.is_grad_enabled():
        base = value._base if value._is_view() else value
        if base.requires_grad and base.is_leaf:
            raise RuntimeError(LEAF_ERROR if base is value else f"a view of {LEAF_ERROR}")
        return not (value._is_view() and any(t.requires_grad for t in (value, *others)))
    return True


def modified(value: Tensor) -> None:
    """Count a change of `value` for autograd: the dispatcher leaves that to the operator."""
    if not value.is_inference():
        torch.autograd.graph.increment_version(value)


def run_inplace(operator, value: Tensor, folded: Tensor, *args):
    """Call an in-place operator on `folded`, a view of `value`, and see to it that it ran.

    A selective checkpointing policy that saves the operator's outputs skips it when recomputing,
    which would leave `value` ungated without a word. The operator marks `value` by `modified`.
    """
    before = None if value.is_inference() else value._version
    outputs = operator(folded, *args)
    if before is not None and value._version == before:
        raise RuntimeError(
            f"{operator.name()} did not run: selective checkpointing must recompute an in-place "
            "operator, not save its outputs; change the policy or pass inplace=False"
        )
    return outputs


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the spans of two tensors overlap (a strided one may have holes there)."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    spans = []
    for t in (a, b):
        last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    (first_a, end_a), (first_b, end_b) = spans
    return first_a < end_b and first_b < end_a
