"""Metrics, scorers, generation, forgetting and the report."""

from mmadapt.eval.comparison import (
    Comparison,
    MethodRow,
    comparison_table,
    write_comparison,
)
from mmadapt.eval.evaluate import (
    ScienceQAResult,
    evaluate_scienceqa,
    problems_of,
    sample_answers,
)
from mmadapt.eval.forgetting import TextOnly, probe_text, text_perplexity
from mmadapt.eval.generation import blank_pixels, generate_answers
from mmadapt.eval.intervals import mean_interval, wilson_interval
from mmadapt.eval.report import ReportFiles, Table, format_tables, write_report
from mmadapt.eval.results import (
    Ablation,
    AblationRow,
    Accuracy,
    ComponentRow,
    Drift,
    EvalRow,
    Forgetting,
    GateProfile,
    RunInfo,
    RunResults,
    SampleAnswer,
    ScienceQATable,
    StageCurve,
    TextProbe,
    Transfer,
)
from mmadapt.eval.scienceqa import (
    COLUMNS,
    SCIENCEQA_TEST_SIZE,
    chance_row,
    extract_answer,
    has_image,
    scienceqa_table,
)
from mmadapt.eval.transfer import answer_drift

__all__ = [
    "COLUMNS",
    "SCIENCEQA_TEST_SIZE",
    "Ablation",
    "AblationRow",
    "Accuracy",
    "Comparison",
    "ComponentRow",
    "Drift",
    "EvalRow",
    "Forgetting",
    "GateProfile",
    "MethodRow",
    "ReportFiles",
    "RunInfo",
    "RunResults",
    "SampleAnswer",
    "ScienceQAResult",
    "ScienceQATable",
    "StageCurve",
    "Table",
    "TextOnly",
    "TextProbe",
    "Transfer",
    "answer_drift",
    "blank_pixels",
    "chance_row",
    "comparison_table",
    "evaluate_scienceqa",
    "extract_answer",
    "format_tables",
    "generate_answers",
    "has_image",
    "mean_interval",
    "probe_text",
    "problems_of",
    "sample_answers",
    "scienceqa_table",
    "text_perplexity",
    "wilson_interval",
    "write_comparison",
    "write_report",
]
