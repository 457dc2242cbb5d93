"""A `Trainer` whose checkpoints are complete or not there, so that a killed run can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from mmadapt.train import checkpoints


class ResumableTrainer(Trainer):
    """Marks each checkpoint when its last byte is written, and only then removes older ones."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer does, then the marker that makes it resumable, then the old ones go."""
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = keep
        self.accelerator.wait_for_everyone()  # every rank writes its own random state
        if self.args.should_save:
            state = self.state
            stage_dir = Path(self.args.output_dir)
            checkpoints.mark_complete(
                stage_dir / f"checkpoint-{state.global_step}",
                checkpoints.Marker(
                    step=state.global_step,
                    world_size=self.args.world_size,
                    last=state.global_step >= state.max_steps,
                ),
            )
            checkpoints.prune(stage_dir, keep)

    def restore_state(self, checkpoint: Path) -> None:
        """Step count and loss history of a checkpoint, for a stage with nothing left to train."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
