"""What a run measured: plain dataclasses that the trainer fills and the report prints.

`RunResults` is the whole of `metrics.json`: `RunResults.from_json(results.to_json())` gives an
equal object.

Units: accuracies are stored as counts and read as percent; losses are nats per token; times
are seconds; `GateProfile` holds mean |tanh(gate)| in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mmadapt.eval import _json
from mmadapt.eval.intervals import mean_interval, wilson_interval

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `total` items. `correct` is fractional for an expectation (chance)."""

    correct: float
    total: int

    def __post_init__(self) -> None:
        if self.total < 0 or not 0 <= self.correct <= self.total:
            raise ValueError(
                f"Accuracy: got correct={self.correct}, total={self.total}, "
                "expected 0 <= correct <= total"
            )

    @property
    def percent(self) -> float:
        """100 * correct / total; nan when there are no items."""
        return 100 * self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval in percent; (nan, nan) when there are no items."""
        if not self.total:
            return math.nan, math.nan
        low, high = wilson_interval(self.correct, self.total)
        return 100 * low, 100 * high


@dataclass(frozen=True)
class ScienceQATable:
    """ScienceQA's columns (NAT SOC LAN TXT IMG NO G1-6 G7-12 AVG) as counts.

    `table["AVG"]` is the percentage with two decimals, nan for a column without items.
    `failures` counts answers that named no valid choice.
    """

    columns: dict[str, Accuracy]
    failures: int

    def __getitem__(self, column: str) -> float:
        return round(self.columns[column].percent, 2)

    def percentages(self) -> dict[str, float]:
        return {column: self[column] for column in self.columns}


@dataclass(frozen=True)
class EvalRow:
    """One system on the held-out questions: the tuned model, the same with blanked images, ...

    `by_skill` is keyed by the records' "skill" and empty for sets that have none. `expected`
    marks a row that is computed and not measured (chance): it has no sampling error.
    """

    name: str
    table: ScienceQATable
    by_skill: dict[str, Accuracy] = field(default_factory=dict)
    visual: Accuracy | None = None
    text_only: Accuracy | None = None
    expected: bool = False


@dataclass(frozen=True)
class StageCurve:
    """Training loss of one stage: `points` are (optimizer step, loss) in order."""

    stage: str
    points: list[tuple[int, float]]
    wall_seconds: float | None = None


@dataclass(frozen=True)
class GateProfile:
    """Mean |tanh(gate)| over image tokens and heads, one number per decoder layer."""

    mean_abs: list[float]


@dataclass(frozen=True)
class TextProbe:
    """What the model can do on text alone. `perplexity` is exp(mean nats per answer token)."""

    accuracy: Accuracy
    perplexity: float


@dataclass(frozen=True)
class Forgetting:
    """The same text-only probe before and after tuning."""

    before: TextProbe
    after: TextProbe

    @property
    def accuracy_delta(self) -> float:
        """Percentage points gained (positive) or forgotten (negative)."""
        return self.after.accuracy.percent - self.before.accuracy.percent

    @property
    def perplexity_delta(self) -> float:
        """After minus before: positive means forgotten."""
        return self.after.perplexity - self.before.perplexity


@dataclass(frozen=True)
class Drift:
    """Mean nats per answer token before and after, and KL(p_before || p_after) per answer token."""

    before: float
    after: float
    divergence: float

    @property
    def loss_delta(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Transfer:
    """One more task after others: accuracies on the earlier ones (source) and on the new (target).

    A, E, F, O, H and R are those of surveys of tuning methods, as fractions of one. `source` maps
    each earlier task to its accuracy before and after; `restored` is the source again after the
    weights from before were put back.
    """

    target: tuple[Accuracy, Accuracy]
    source: dict[str, tuple[Accuracy, Accuracy]]
    drift: Drift | None = None
    restored: dict[str, Accuracy] = field(default_factory=dict)

    @property
    def target_score(self) -> float:
        """A_T: accuracy on the new task after it was learnt."""
        return self.target[1].percent / 100

    def source_score(self, *, after: bool = True) -> float:
        """A_S: mean accuracy over the earlier tasks."""
        return sum(pair[after].percent for pair in self.source.values()) / len(self.source) / 100

    @property
    def gain(self) -> float:
        """E = A_T after - before."""
        return (self.target[1].percent - self.target[0].percent) / 100

    @property
    def forgetting(self) -> float:
        """F = A_S after - before; negative means forgotten."""
        return self.source_score() - self.source_score(after=False)

    @property
    def worst_forgetting(self) -> float:
        """F of the earlier task that lost most."""
        return min((b.percent - a.percent) / 100 for a, b in self.source.values())

    @property
    def overall(self) -> float:
        """O = E + F."""
        return self.gain + self.forgetting

    @property
    def harmonic_mean(self) -> float:
        """H = 2 A_S A_T / (A_S + A_T)."""
        source, target = self.source_score(), self.target_score
        return 2 * source * target / (source + target) if source + target else 0.0

    @property
    def retention(self) -> float:
        """R = A_S after / before."""
        before = self.source_score(after=False)
        return self.source_score() / before if before else math.nan


@dataclass(frozen=True)
class ComponentRow:
    """Parameter count of one component and how many of them each stage trains."""

    component: str
    parameters: int
    trainable: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleAnswer:
    """One held-out question with what the model said. `prediction` None: no valid letter."""

    id: str
    question: str
    choices: list[str]
    answer: int
    prediction: int | None
    text: str
    images: list[str] = field(default_factory=list)
    hint: str = ""
    skill: str = ""
    blanked_prediction: int | None = None

    @property
    def correct(self) -> bool:
        return self.prediction == self.answer


@dataclass(frozen=True)
class AblationRow:
    """One configuration: column name -> one value (percent) per seed."""

    name: str
    values: dict[str, list[float]]

    def mean(self, column: str) -> float:
        return sum(self.values[column]) / len(self.values[column])

    def interval(self, column: str) -> tuple[float, float]:
        """95 % Student-t interval over the seeds; (nan, nan) for a single seed."""
        return mean_interval(self.values[column])


@dataclass(frozen=True)
class Ablation:
    """Rows x columns over `seeds`; every row holds every column once per seed."""

    columns: list[str]
    seeds: list[int]
    rows: list[AblationRow]

    def __post_init__(self) -> None:
        for row in self.rows:
            lengths = {column: len(row.values.get(column, [])) for column in self.columns}
            if any(length != len(self.seeds) for length in lengths.values()):
                raise ValueError(
                    f"Ablation: row {row.name!r} has {lengths} values per column, "
                    f"expected {len(self.seeds)} (one per seed)"
                )


@dataclass(frozen=True)
class RunInfo:
    """Where the numbers come from. `config` is the resolved recipe, free-form JSON data."""

    title: str
    seed: int
    model: str = ""
    data: str = ""
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    wall_seconds: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResults:
    """Everything a report shows. Empty lists and None leave their section out.

    `rows[0]` is the tuned model: the skill figure and the headline show it first.
    """

    info: RunInfo
    rows: list[EvalRow] = field(default_factory=list)
    stages: list[StageCurve] = field(default_factory=list)
    gate: GateProfile | None = None
    forgetting: Forgetting | None = None
    parameters: list[ComponentRow] = field(default_factory=list)
    samples: list[SampleAnswer] = field(default_factory=list)
    ablation: Ablation | None = None
    transfer: Transfer | None = None
    schema_version: int = SCHEMA_VERSION

    def to_json(self, *, indent: int | None = 2) -> str:
        """Strict JSON: non-finite numbers are written as the strings "nan", "inf", "-inf"."""
        return _json.dumps(self, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> RunResults:
        """Inverse of `to_json`. Unknown or missing keys raise ValueError with their path."""
        results = _json.loads(cls, text)
        if results.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version: got {results.schema_version}, expected {SCHEMA_VERSION}"
            )
        return results
