"""One report for every wrapper of this package in a model."""

from torch import nn

from mmadapt.peft.aurora.explain import AuroraReport, explain_aurora
from mmadapt.peft.pill.explain import WrapperReport
from mmadapt.peft.pill.explain import explain as explain_pill


def explain(model: nn.Module, tokens: int = 1024) -> list[WrapperReport | AuroraReport]:
    """How the adapters of a model run: fusion and backends; print the reports to read them.

    What depends on the input is answered for activations in the dtype of the layer, in the present
    autocast state; every call decides anew.

    Args:
        model: a `PeftModel`, or a model with an injected adapter of this package.
        tokens: how many tokens the call would have, which the choice of a backend may depend on.
    """
    return [*explain_pill(model, tokens), *explain_aurora(model, tokens)]
