"""Wrong arguments: an error that names the argument, what came and what was expected."""

import pytest
import torch

from mmadapt.ops import (
    cp_linear,
    cp_linear_group,
    modality_gate,
    projected_modality_gate,
    swiglu_adapter,
)


def zeros(*shape, **settings):
    return torch.zeros(shape, **settings)


SWIGLU = {
    "x": zeros(4, 8),
    "gate": zeros(2, 3, 8),
    "down": zeros(2, 3, 8),
    "up": zeros(2, 8, 3),
    "expert": zeros(4, dtype=torch.int64),
}
CP = {
    "x": zeros(4, 8),
    "weight": zeros(5, 8),
    "bias": None,
    "factor_in": zeros(3, 8),
    "factor_out": zeros(5, 3),
    "mode": zeros(3),
}
GATE = {"value": zeros(4, 2, 3), "logits": zeros(2), "mask": zeros(4, dtype=torch.bool)}
PROJECTED = {
    "value": zeros(4, 2, 3),
    "hidden": zeros(4, 8),
    "weight": zeros(2, 8),
    "mask": zeros(4, dtype=torch.bool),
}


@pytest.mark.parametrize(
    ("op", "call", "change", "error", "message"),
    [
        (swiglu_adapter, SWIGLU, {"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
        (swiglu_adapter, SWIGLU, {"x": zeros(4, 8).int()}, TypeError, "x must be float32.*int32"),
        (
            swiglu_adapter,
            SWIGLU,
            {"gate": zeros(2, 3, 7)},
            ValueError,
            r"gate has shape \[2, 3, 7\], expected \[E, m, d\] = \[2, 3, 8\]",
        ),
        (swiglu_adapter, SWIGLU, {"gate": zeros(8)}, ValueError, r"gate has shape \[8\], expected"),
        (swiglu_adapter, SWIGLU, {"down": zeros(3, 8)}, ValueError, r"down has shape \[3, 8\]"),
        (
            swiglu_adapter,
            SWIGLU,
            {"up": zeros(3, 8, 3)},
            ValueError,
            r"up has shape \[3, 8, 3\], expected \[E, d, m\] = \[2, 8, 3\]",
        ),
        (
            swiglu_adapter,
            SWIGLU,
            {"up": zeros(1, 8, 4)},
            ValueError,
            r"up has shape \[1, 8, 4\], expected \[1, d, m\] = \[1, 8, 3\]",
        ),
        (
            swiglu_adapter,
            SWIGLU,
            {"down": zeros(2, 3, 8, dtype=torch.bfloat16)},
            TypeError,
            "down has dtype torch.bfloat16, expected torch.float32 for x in torch.float32",
        ),
        (
            swiglu_adapter,
            SWIGLU,
            {"up": zeros(2, 8, 3, device="meta")},
            ValueError,
            "up is on meta, expected cpu like x",
        ),
        (
            swiglu_adapter,
            SWIGLU,
            {"expert": None},
            ValueError,
            r"expert is None but gate holds 2 experts.*x.shape\[:-1\] = \[4\]",
        ),
        (
            swiglu_adapter,
            SWIGLU,
            {"expert": zeros(3, dtype=torch.int64)},
            ValueError,
            r"expert has shape \[3\], expected x.shape\[:-1\] = \[4\]",
        ),
        (swiglu_adapter, SWIGLU, {"expert": zeros(4)}, TypeError, "expert must be an integer"),
        (
            swiglu_adapter,
            SWIGLU,
            {"expert": torch.tensor([0, 1, 2, -1])},
            ValueError,
            r"expert holds values -1..2, expected -1..1 for 2 expert\(s\)",
        ),
        (
            swiglu_adapter,
            SWIGLU,
            {"expert": torch.tensor([0, 1, -2, -1])},
            ValueError,
            "expert holds values -2..1",
        ),
        (swiglu_adapter, SWIGLU, {"residual": "both"}, ValueError, "residual must be one of 'inp"),
        (swiglu_adapter, SWIGLU, {"residual": "norm"}, ValueError, "needs norm=.*got norm=None"),
        (
            swiglu_adapter,
            SWIGLU,
            {"norm": zeros(8)},
            TypeError,
            r"norm must be a pair \(weight, ep",
        ),
        (
            swiglu_adapter,
            SWIGLU,
            {"norm": (zeros(7), 1e-5)},
            ValueError,
            r"norm\[0\] has shape \[7\], expected \[d\] = \[8\]",
        ),
        (cp_linear, CP, {"factor_in": zeros(3, 7)}, ValueError, r"factor_in has shape \[3, 7\]"),
        (cp_linear, CP, {"factor_out": zeros(5, 4)}, ValueError, r"factor_out has shape \[5, 4\]"),
        (
            cp_linear,
            CP,
            {"weight": zeros(5, 9)},
            ValueError,
            r"weights\[0\] has shape \[5, 9\], expected \[d_out, d_in\] = \[5, 8\]",
        ),
        (cp_linear, CP, {"bias": zeros(4)}, ValueError, r"biases\[0\] has shape \[4\]"),
        (cp_linear, CP, {"mode": zeros(4)}, ValueError, r"modes\[0\] has shape \[4\]"),
        (cp_linear, CP, {"mode": zeros(3, 4)}, ValueError, r"modes\[0\] has shape \[3, 4\]"),
        (
            cp_linear,
            CP,
            {"mode": zeros(3, dtype=torch.float16)},
            TypeError,
            r"modes\[0\] has dtype torch.float16, expected torch.float32",
        ),
        (cp_linear, CP, {"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        (cp_linear, CP, {"dropout_at": "end"}, ValueError, "dropout_at must be one of 'after'"),
        (
            modality_gate,
            GATE,
            {"mask": zeros(4)},
            TypeError,
            "mask must be a bool tensor, got torch.float32",
        ),
        (
            modality_gate,
            GATE,
            {"mask": zeros(5, dtype=torch.bool)},
            ValueError,
            r"value has shape \[4, 2, 3\], expected \[..., H, h\] = \[5, 2, 3\]",
        ),
        (
            modality_gate,
            GATE,
            {"value": zeros(4, 7)},
            ValueError,
            "value has width 7, expected a multiple of H = 2",
        ),
        (modality_gate, GATE, {"logits": zeros(3)}, ValueError, r"value has shape \[4, 2, 3\]"),
        (
            modality_gate,
            GATE,
            {"logits": zeros(5, 2)},
            ValueError,
            r"logits has shape \[5, 2\], expected \[..., H\] = \[4, 2\]",
        ),
        (
            modality_gate,
            GATE,
            {"logits": zeros(1, 4, 2)},
            ValueError,
            r"logits has shape \[1, 4, 2\], expected \[H\] or",
        ),
        (
            projected_modality_gate,
            PROJECTED,
            {"hidden": zeros(4, 7)},
            ValueError,
            r"hidden has shape \[4, 7\], expected \[..., D\] = \[4, 8\]",
        ),
        (
            projected_modality_gate,
            PROJECTED,
            {"hidden": zeros(4, 8).double()},
            TypeError,
            "hidden has dtype torch.float64, expected torch.float32 like value",
        ),
        (
            projected_modality_gate,
            PROJECTED,
            {"weight": zeros(8)},
            ValueError,
            r"weight has shape \[8\], expected \[H, D\]",
        ),
    ],
)
def test_error_names_the_argument(op, call, change, error, message):
    op(**call)
    with pytest.raises(error, match=message):
        op(**{**call, **change})


def test_group_lengths():
    x, weight, _, factor_in, factor_out, mode = CP.values()
    with pytest.raises(ValueError, match="same positive length, got 2, 2 and 1"):
        cp_linear_group(x, [weight] * 2, None, factor_in, factor_out, [mode])
    with pytest.raises(ValueError, match="same positive length, got 0, 0 and 0"):
        cp_linear_group(x, [], None, factor_in, factor_out, [])


def test_expert_beyond_int32_does_not_wrap_into_range():
    x, gate, up = torch.randn(4, 8), torch.randn(2, 3, 8), torch.randn(2, 8, 3)
    expert = torch.tensor([0, 1, 2**32, 0])
    with pytest.raises(ValueError, match="expert holds values"):
        swiglu_adapter(x, gate, gate, up, expert=expert)
