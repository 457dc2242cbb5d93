"""Metrics, scorers, generation, forgetting and the report."""

from mmadapt.eval.intervals import mean_interval, wilson_interval
from mmadapt.eval.results import (
    Ablation,
    AblationRow,
    Accuracy,
    ComponentRow,
    EvalRow,
    Forgetting,
    GateProfile,
    RunInfo,
    RunResults,
    SampleAnswer,
    ScienceQATable,
    StageCurve,
    TextProbe,
)

__all__ = [
    "Ablation",
    "AblationRow",
    "Accuracy",
    "ComponentRow",
    "EvalRow",
    "Forgetting",
    "GateProfile",
    "RunInfo",
    "RunResults",
    "SampleAnswer",
    "ScienceQATable",
    "StageCurve",
    "TextProbe",
    "mean_interval",
    "wilson_interval",
]
