"""Callbacks of a stage: the epoch for data and sampler, a quiet progress bar."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerCallback


class EpochCallback(TrainerCallback):
    """Tells the sampler and the data set which epoch begins.

    accelerate's loaders pass the epoch on only through some of their wrappers (not to a sharded
    loader that skips batches on resume), and to the data set only if the sampler takes none.
    """

    def __init__(self, *receivers: Any) -> None:
        self._receivers = receivers

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = int(state.epoch or 0)
        for receiver in self._receivers:
            receiver.set_epoch(epoch)


class StageProgress(ProgressCallback):
    """A bar with stage, loss and rate instead of one printed line per log."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self._stage = stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self._stage)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            rate = logs.get("learning_rate", 0.0)
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", lr=f"{rate:.2e}")
