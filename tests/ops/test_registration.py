"""torch.library.opcheck of every operator, with contiguous and permuted operands."""

import pytest
import torch

from mmadapt.ops import _cp_linear, _modality_gate, _projected_modality_gate, _swiglu_adapter


def swiglu(norm):
    x = torch.randn(6, 8)
    weights = [torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 8, 3)]
    expert = torch.tensor([0, 1, -1, 1, 0, 0], dtype=torch.int32)
    return [x, *weights, expert, torch.randn(8) if norm else None, 1e-5 if norm else 0.0]


def swiglu_forward(norm=True):
    return _swiglu_adapter.forward_op, [*swiglu(norm), "input", 0.5, None]


def swiglu_backward(norm=True, needs=(True,) * 5):
    saved = [torch.randn(6, 3), torch.randn(6, 3), torch.rand(6 if norm else 0)]
    dy = torch.randn(6, 8)
    arguments = [dy, *swiglu(norm), *saved, "input", 0.5, list(needs), None]
    return _swiglu_adapter.backward_op, arguments


def cp():
    weights = [torch.randn(5, 8), torch.randn(5, 8)]
    modes = [torch.randn(3), torch.randn(3, 3)]
    biases = [None, torch.randn(5)]
    return [torch.randn(6, 8), weights, biases, torch.randn(3, 8), torch.randn(5, 3), modes]


def cp_forward(dropout=0.0):
    seeds = torch.randint(2**62, (2,)) if dropout else None
    return _cp_linear.forward_op, [*cp(), seeds, 0.5, dropout, "after", None]


def cp_backward(needs=(True,) * 3):
    dys, z = [torch.randn(6, 5), torch.randn(6, 5)], torch.randn(6, 3)
    settings = [None, 0.5, 0.0, "after"]
    needs = [list(needs), [True, False], [False, True]]
    return _cp_linear.backward_op, [dys, *cp(), z, *settings, *needs, None]


def gate_operands():
    return [torch.randn(6, 2, 4), torch.randn(6, 2), torch.rand(6) < 0.5]


def gate_forward():
    return _modality_gate.forward_op, [*gate_operands(), None]


def gate_backward(needs=(True, True)):
    return _modality_gate.backward_op, [torch.randn(6, 2, 4), *gate_operands(), list(needs), None]


def projected_operands():
    return [torch.randn(6, 2, 4), torch.randn(6, 8), torch.randn(2, 8), torch.rand(6) < 0.5]


def projected_forward():
    return _projected_modality_gate.forward_op, [*projected_operands(), None]


def projected_backward(needs=(True,) * 3):
    arguments = [torch.randn(6, 2, 4), *projected_operands(), torch.rand(6, 2), list(needs), None]
    return _projected_modality_gate.backward_op, arguments


CASES = {
    "swiglu_forward": swiglu_forward,
    "swiglu_forward_no_norm": lambda: swiglu_forward(norm=False),
    "swiglu_backward": swiglu_backward,
    "swiglu_backward_no_norm": lambda: swiglu_backward(norm=False),
    "swiglu_backward_x_only": lambda: swiglu_backward(needs=(True, *[False] * 4)),
    "cp_forward": cp_forward,
    "cp_forward_dropout": lambda: cp_forward(0.3),
    "cp_backward": cp_backward,
    "cp_backward_x_only": lambda: cp_backward((True, False, False)),
    "gate_forward": gate_forward,
    "gate_backward": gate_backward,
    "gate_backward_logits_only": lambda: gate_backward((False, True)),
    "projected_forward": projected_forward,
    "projected_backward": projected_backward,
    "projected_backward_weight_only": lambda: projected_backward((False, False, True)),
}


def permuted(argument):
    """The same values with reversed strides."""
    if isinstance(argument, list):
        return [permuted(a) for a in argument]
    if not isinstance(argument, torch.Tensor) or argument.ndim < 2:
        return argument
    order = tuple(reversed(range(argument.ndim)))
    return argument.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, layout):
    operator, arguments = CASES[case]()
    if layout == "permuted":
        arguments = permuted(arguments)
    torch.library.opcheck(operator, tuple(arguments))


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_contiguous_and_fresh(case):
    operator, arguments = CASES[case]()
    arguments = permuted(arguments)
    flat = torch.utils._pytree.tree_leaves(arguments)
    inputs = {t.untyped_storage().data_ptr() for t in flat if isinstance(t, torch.Tensor)}
    for output in torch.utils._pytree.tree_leaves(operator(*arguments)):
        assert output.is_contiguous()
        assert output.numel() == 0 or output.untyped_storage().data_ptr() not in inputs


def test_meta_tensors_beyond_int32():
    x = torch.empty(2**19, 4097, device="meta")
    weights = [torch.empty(4, 4097, device="meta")] * 2 + [torch.empty(4097, 4, device="meta")]
    from mmadapt.ops import swiglu_adapter

    assert x.numel() > 2**31
    assert swiglu_adapter(x, *weights).shape == x.shape
