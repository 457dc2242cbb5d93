"""What a run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmadapt.eval import Comparison, RunResults

RESOLVED = "recipe.yaml"
METRICS = "metrics.json"


@dataclass(frozen=True)
class RunOutcome:
    """Where a run stands: its directory, and the results and report if it was evaluated."""

    run_dir: Path
    results: RunResults | Comparison | None = None
    report: Path | None = None
