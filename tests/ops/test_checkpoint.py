"""Activation checkpointing: reentrant, non-reentrant and selective."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mmadapt.ops import cp_linear, modality_gate, projected_modality_gate, swiglu_adapter

DIM, RANK, HEADS, TOKENS = 8, 3, 2, 6
KIND = torch.tensor([0, 1, 1, 0, 1, 0])


def leaves(*shapes):
    return [torch.randn(s).requires_grad_() for s in ((TOKENS, DIM), *shapes)]


CASES = {
    "swiglu_adapter": (
        lambda x, gate, down, up: swiglu_adapter(x, gate, down, up, expert=KIND),
        ((2, RANK, DIM), (2, RANK, DIM), (2, DIM, RANK)),
    ),
    "cp_linear": (
        lambda x, u, v, p: cp_linear(x, torch.eye(DIM), None, u, v, p),
        ((RANK, DIM), (DIM, RANK), (RANK,)),
    ),
    "modality_gate": (lambda x, logits: modality_gate(x, logits, KIND > 0), ((HEADS,),)),
    "projected_modality_gate": (
        lambda x, weight: projected_modality_gate(x, x, weight, KIND > 0),
        ((HEADS, DIM),),
    ),
}


def gradients(run, inputs):
    for tensor in inputs:
        tensor.grad = None
    run().square().sum().backward()
    return [t.grad for t in inputs]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_checkpoint_gives_the_same_gradients(case, use_reentrant):
    function, shapes = CASES[case]
    inputs = leaves(*shapes)
    plain = gradients(lambda: function(*inputs), inputs)
    again = gradients(lambda: checkpoint(function, *inputs, use_reentrant=use_reentrant), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


class CountForwards(TorchDispatchMode):
    """Counts how often an operator of the namespace runs forward."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name().startswith("mmadapt::") and func.name().endswith("_fwd")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "runs"), [("save", 1), ("recompute", 2)])
@pytest.mark.parametrize("case", CASES)
def test_selective_checkpointing_sees_the_operator(case, policy, runs):
    function, shapes = CASES[case]
    inputs = leaves(*shapes)
    plain = gradients(lambda: function(*inputs), inputs)

    def decide(context, operator, *args, **kwargs):
        saves = policy == "save" and operator.name().startswith("mmadapt::")
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, decide)
    with CountForwards() as counter:
        again = gradients(
            lambda: checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts), inputs
        )
    assert counter.count == runs
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
