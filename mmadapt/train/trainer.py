"""`transformers.Trainer` for one stage: rates by component, exact resume, guard rails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
)

from mmadapt.data import BalancedSampler
from mmadapt.train.adapters import load_adapter
from mmadapt.train.callbacks import EpochCallback, StageProgress
from mmadapt.train.components import Components, judged_for_gradients, parameter_groups
from mmadapt.train.config import StageConfig
from mmadapt.train.crome.schedule import crome_schedule
from mmadapt.train.crome.weights import is_crome, write_trained
from mmadapt.train.errors import RunError
from mmadapt.train.guards import Guards, image_fraction
from mmadapt.train.resumable import ResumableTrainer
from mmadapt.train.sampler import EpochSampler
from mmadapt.train.schedule import pill_schedule


class StageTrainer(ResumableTrainer):
    """Trains the parameters that require gradients now, as the stage's recipe says.

    Args:
        model: a PeftModel after `mmadapt.peft.set_stage`.
        args: from `arguments.build_arguments`.
        name, stage: the stage's name and recipe.
        components: `mmadapt.peft.components(model)`.
        dataset: map-style, items are `mmadapt.data.Sample`; `set_epoch` is called if there.
        collator: list of samples to model inputs.
        image_token_id: id that marks image positions in `input_ids`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        name: str,
        stage: StageConfig,
        components: Components,
        dataset: Dataset,
        collator: Callable[[list[Any]], dict[str, torch.Tensor]],
        image_token_id: int,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collator)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RunError(
                "started under FSDP or DeepSpeed; stages, resuming and evaluation are made for "
                "DDP: use `accelerate launch --multi_gpu`, or launch.nproc in the recipe"
            )
        self.stage_name, self.stage, self.components = name, stage, components
        self.image_token_id = image_token_id
        samples = args.per_device_train_batch_size * args.world_size
        multiple = 1 if stage.flush_tail else samples * args.gradient_accumulation_steps
        self._sampler = EpochSampler(len(dataset), seed=args.seed, multiple=multiple)
        if stage.sampling == "sqrt":
            sizes = [len(member) for member in dataset.datasets]
            self._sampler = BalancedSampler(sizes, num_samples=len(self._sampler), seed=args.seed)
        self._micro_batches = max(1, len(dataset) // samples)
        self._takes_pixels = _base(model).main_input_name == "pixel_values" or is_crome(model)
        self._guards = Guards(
            judged_for_gradients(components, stage=name),
            stage=name,
            image_token_id=image_token_id,
            image_fraction=image_fraction(dataset),
        )
        self.add_callback(self._guards)
        candidates = (self._sampler, dataset, collator)
        receivers = [r for r in candidates if hasattr(r, "set_epoch")]
        self.add_callback(EpochCallback(*receivers))
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(StageProgress(name))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(
                self.components,
                self.stage.lr,
                weight_decay=self.args.weight_decay,
                stage=self.stage_name,
            )
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        if self.stage.lr.schedule == "hf":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.stage.lr.schedule != "pill":
            self.lr_scheduler = crome_schedule(
                optimizer or self.optimizer,
                self.stage.lr.schedule,
                start_lr=self.stage.lr.start_lr,
                warmup_steps=self.stage.lr.warmup_steps,
                total_steps=num_training_steps,
                steps_per_epoch=self._steps_per_epoch(),
            )
            self._created_lr_scheduler = True
            return self.lr_scheduler
        accumulation = self.args.gradient_accumulation_steps
        self.lr_scheduler = pill_schedule(
            optimizer or self.optimizer,
            epochs=self.args.num_train_epochs,
            warmup=self.stage.lr.warmup_epochs,
            steps_per_epoch=self._steps_per_epoch(),
            accumulation=accumulation,
            micro_batches_per_epoch=self._micro_batches,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _steps_per_epoch(self) -> int:
        return -(-len(self._sampler) // self._samples_per_step())

    def _samples_per_step(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self._sampler

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Any:
        self._guards.see(inputs)
        if not self._takes_pixels and not bool((inputs["input_ids"] == self.image_token_id).any()):
            # LLaVA refuses an image that no token stands for; BLIP-2 cannot run without one, and
            # CROME reaches what trains through it
            inputs.pop("pixel_values", None)
        return super().compute_loss(model, inputs, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As Trainer does, but of a CROME model only what trains."""
        if not is_crome(self.model):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_trained(self.model, folder)

    def release(self) -> None:
        """Drop optimizer and wrappers, so that the next stage starts with a bare model."""
        # accelerate's autocast stays in `forward` otherwise, and Trainer never switches
        # checkpointing off; a stage must not depend on which process ran the one before it.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.args.gradient_checkpointing:
            base = _base(self.model)
            # renamed after transformers 5.17
            newer = getattr(base, "activation_checkpointing_disable", None)
            (newer or base.gradient_checkpointing_disable)()
        self.accelerator.free_memory()
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.model, resume_from_checkpoint)


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
