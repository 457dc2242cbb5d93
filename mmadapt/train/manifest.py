"""The run's memory: which stages are done, with which settings, and what came out."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmadapt.train.checkpoints import write_json_atomic
from mmadapt.train.config import Recipe
from mmadapt.train.errors import RunError

FORMAT = 1
NAME = "manifest.json"

# TrainingArguments that change what is written or how fast, never the weights.
_COSMETIC_PREFIXES = ("logging_", "save_", "log_", "report_to", "disable_tqdm", "run_name")
_COSMETIC_PREFIXES += ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch")


def stage_identity(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Every setting the weights after `stage` depend on: earlier stages are among them.

    A recipe of another schema knows its own (`stage_identity`, `evaluation_identity`).
    """
    if hasattr(recipe, "stage_identity"):
        return recipe.stage_identity(stage)
    whole = recipe.model_dump(mode="json", include={"model", "method", "seed", "data", "stages"})
    names = list(recipe.stages)
    whole["stages"] = {name: whole["stages"][name] for name in names[: names.index(stage) + 1]}
    for block in whole["stages"].values():
        block["train"] = {
            key: value
            for key, value in block["train"].items()
            if not key.startswith(_COSMETIC_PREFIXES)
        }
    return whole


def evaluation_identity(recipe: Recipe) -> dict[str, Any]:
    if hasattr(recipe, "evaluation_identity"):
        return recipe.evaluation_identity()
    last = list(recipe.stages)[-1]
    settings = recipe.eval.model_dump(mode="json") if recipe.eval else None
    return {**stage_identity(recipe, last), "eval": settings}


def config_hash(identity: dict[str, Any]) -> str:
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`path: old -> new` for every leaf that differs."""
    before, after = _leaves(old), _leaves(new)
    return [
        f"{path}: {before.get(path, 'absent')} -> {after.get(path, 'absent')}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path, _ABSENT) != after.get(path, _ABSENT)
    ]


_ABSENT = object()


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = ((f"{path}.{key}" if path else key, item) for key, item in value.items())
    elif isinstance(value, list) and value:
        items = ((f"{path}[{i}]", item) for i, item in enumerate(value))
    else:
        return {path: value}
    return {leaf: found for key, item in items for leaf, found in _leaves(item, key).items()}


class Manifest:
    """`manifest.json` of a run directory. Every change is written atomically at once."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self._content = content

    @classmethod
    def open(cls, run_dir: Path) -> Manifest:
        """Read the manifest, or start an empty one (written with its first entry)."""
        path = run_dir / NAME
        if not path.exists():
            return cls(path, {"format": FORMAT, "stages": {}, "evaluation": None})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RunError(f"{path}: not valid JSON: {error}") from error
        if content.get("format") != FORMAT:
            raise RunError(f"{path}: format {content.get('format')!r}, expected {FORMAT}")
        return cls(path, content)

    def stage(self, name: str) -> dict[str, Any] | None:
        return self._content["stages"].get(name)

    def stages(self) -> dict[str, dict[str, Any]]:
        return dict(self._content["stages"])

    def is_done(self, name: str) -> bool:
        entry = self.stage(name)
        return entry is not None and entry["status"] == "done"

    def check_stage(self, recipe: Recipe, name: str) -> None:
        """Raise RunError when the directory holds this stage under other settings."""
        entry, identity = self.stage(name), stage_identity(recipe, name)
        if entry is None or entry["config_hash"] == config_hash(identity):
            return
        changed = differences(entry["config"], identity)
        raise RunError(
            f"{self.path.parent} holds stage {name!r} ({entry['status']}) with other settings:\n  "
            + "\n  ".join(changed)
            + "\nChoose another `out`, restore the settings, or start over with --restart"
        )

    def start_stage(self, recipe: Recipe, name: str, details: dict[str, Any]) -> None:
        """Enter a stage as running; a stage that is resumed keeps its entry."""
        if self.stage(name) is not None:
            return
        identity = stage_identity(recipe, name)
        self._content["stages"][name] = {
            "status": "running",
            "started": _now(),
            "config_hash": config_hash(identity),
            "config": identity,
            **details,
        }
        self._write()

    def finish_stage(self, name: str, metrics: dict[str, Any]) -> None:
        entry = self._content["stages"][name]
        entry.update(status="done", finished=_now(), metrics=metrics)
        self._write()

    def evaluation(self, recipe: Recipe) -> dict[str, Any] | None:
        """The finished evaluation of exactly these settings, or None."""
        entry = self._content["evaluation"]
        fits = entry and entry["config_hash"] == config_hash(evaluation_identity(recipe))
        return entry if fits else None

    def finish_evaluation(self, recipe: Recipe, entry: dict[str, Any]) -> None:
        digest = config_hash(evaluation_identity(recipe))
        self._content["evaluation"] = {"config_hash": digest, "finished": _now(), **entry}
        self._write()

    def forget_stage(self, name: str) -> None:
        self._content["stages"].pop(name, None)
        self._content["evaluation"] = None
        self._write()

    def _write(self) -> None:
        write_json_atomic(self.path, self._content)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
