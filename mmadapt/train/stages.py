"""One training stage: fresh or resumed, ending with an adapter folder."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mmadapt.train import checkpoints
from mmadapt.train.adapters import load_adapter, save_adapter
from mmadapt.train.arguments import build_arguments
from mmadapt.train.build import collator, stage_dataset
from mmadapt.train.components import count, trainable
from mmadapt.train.config import Recipe
from mmadapt.train.errors import RecipeError
from mmadapt.train.manifest import Manifest
from mmadapt.train.methods import components_of, enter_stage
from mmadapt.train.trainer import StageTrainer
from mmadapt.train.ui import Console
from mmadapt.train.versions import git_commit, versions

ADAPTER = "adapter"


def run_stage(
    recipe: Recipe, name: str, model: Any, pretrained: Any, manifest: Manifest, console: Console
) -> None:
    """Train stage `name` on from its newest complete checkpoint, or from the model as it is.

    Leaves `<out>/<name>/adapter` behind, and the stage marked done in the manifest. The model
    holds the stage's last weights.
    """
    state = PartialState()
    stage, folder = recipe.stages[name], Path(recipe.out) / name
    enter_stage(recipe, model, name)
    parts = components_of(recipe, model)
    if not trainable(parts):
        raise RecipeError(f"stages.{name}: method {recipe.method.type} leaves nothing to train")
    if state.is_main_process:
        if manifest.stage(name) is None:  # leftovers of a stage that was dropped
            shutil.rmtree(folder, ignore_errors=True)
        checkpoints.remove_incomplete(folder)
        parameters = {row.component: row.parameters for row in count(parts)}
        trained = {row.component: row.trainable for row in count(parts) if row.trainable}
        manifest.start_stage(
            recipe,
            name,
            {
                "versions": versions(),
                "git_commit": git_commit(),
                "processes": state.num_processes,
                "parameters": parameters,
                "trainable": trained,
            },
        )
    state.wait_for_everyone()
    console.parameters(name, count(parts))

    arguments = build_arguments(
        stage.train,
        output_dir=str(folder),
        learning_rate=stage.lr.default,
        seed=recipe.seed,
        use_cpu=state.device.type == "cpu",
        quiet=console.quiet,
    )
    trainer = StageTrainer(
        model,
        arguments,
        name=name,
        stage=stage,
        components=parts,
        dataset=stage_dataset(recipe, name),
        collator=collator(pretrained, max_length=stage.max_length, with_labels=True),
        image_token_id=pretrained.image_token_id,
    )
    found = checkpoints.latest(folder, world_size=state.num_processes)
    started = time.monotonic()
    if found is not None and found[1].last:
        load_adapter(model, found[0])  # killed after the last step, before the stage was closed
        trainer.restore_state(found[0])
    else:
        if found is not None:
            console.say(f"stage {name}: resuming after step {found[1].step}")
        trainer.train(resume_from_checkpoint=str(found[0]) if found else None)
    seconds = time.monotonic() - started
    if state.is_main_process:
        trainer.save_state()
        save_adapter(model, folder / ADAPTER)
        manifest.finish_stage(name, _metrics(trainer, seconds, resumed=found is not None))
    state.wait_for_everyone()
    trainer.release()


def _metrics(trainer: StageTrainer, seconds: float, *, resumed: bool) -> dict[str, Any]:
    losses = [
        (entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
    ]
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "loss": losses,
        # of the process that finished the stage; a resumed stage took longer in all
        "seconds": round(seconds, 3),
        "resumed": resumed,
    }
