"""`transformers.Trainer` for an objective: what trains is saved, with queue and momentum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from mmadapt.train.aurora.config import AuroraRecipe
from mmadapt.train.aurora.schedule import epoch_cosine_schedule
from mmadapt.train.callbacks import EpochCallback, StageProgress
from mmadapt.train.errors import GuardError, RunError
from mmadapt.train.resumable import ResumableTrainer
from mmadapt.train.sampler import EpochSampler

STATE = "objective.safetensors"
_OWN_STATE = ("queue.", "momentum.", "temperature")


class ObjectiveTrainer(ResumableTrainer):
    """Minimises `objective(**batch).loss` over its parameters that require gradients.

    A checkpoint holds those parameters, the feature queue and the momentum copies, so that a
    resumed run ends with the weights of an uninterrupted one.
    """

    def __init__(
        self,
        objective: nn.Module,
        args: TrainingArguments,
        *,
        name: str,
        recipe: AuroraRecipe,
        dataset: Dataset,
        collator: Any,
    ) -> None:
        super().__init__(model=objective, args=args, train_dataset=dataset, data_collator=collator)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RunError("started under FSDP or DeepSpeed; these runs are made for DDP")
        self.recipe = recipe
        samples = args.per_device_train_batch_size * args.world_size
        self._sampler = EpochSampler(
            len(dataset), seed=args.seed, multiple=samples * args.gradient_accumulation_steps
        )
        self._batches = len(self._sampler) // samples
        self._parts: dict[str, list[Tensor]] = {}
        self.add_callback(EpochCallback(self._sampler))
        self.add_callback(_Watch(name))
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(StageProgress(name))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW; as released all weights decay, or with `decay_everything: false` matrices only."""
        if self.optimizer is None:
            decay = self.args.weight_decay
            trained = [p for p in self.model.parameters() if p.requires_grad]
            everything = self.recipe.decay_everything
            groups = [
                {"params": [p for p in trained if everything or p.ndim >= 2], "weight_decay": decay}
            ]
            if not everything:
                vectors = [p for p in trained if p.ndim < 2]
                groups.append({"params": vectors, "weight_decay": 0.0})
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer([g for g in groups if g["params"]], **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        if self.recipe.schedule == "hf":
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = epoch_cosine_schedule(
            optimizer or self.optimizer,
            epochs=self.args.num_train_epochs,
            steps_per_epoch=self._batches // self.args.gradient_accumulation_steps,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self._sampler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        objective = self.accelerator.unwrap_model(model)
        if hasattr(objective, "set_progress"):
            # of finished optimizer steps; with accumulation a step's batches share its value
            epoch, part = divmod(self.state.epoch or 0.0, 1)
            objective.set_progress(
                epoch=int(epoch), batch=round(part * self._batches), batches=self._batches
            )
        out = model(**inputs)
        for part, value in out._asdict().items():
            if part != "loss":
                self._parts.setdefault(part, []).append(value.detach())
        return (out.loss, {"loss": out.loss}) if return_outputs else out.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {name: float(torch.stack(v).mean()) for name, v in self._parts.items()}
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.accelerator.unwrap_model(self.model), folder / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.model, Path(resume_from_checkpoint) / STATE)


class _Watch(TrainerCallback):
    """Stops when nothing has a gradient or the loss is no number."""

    def __init__(self, name: str) -> None:
        self._name, self._judged = name, False

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self._judged:
            return
        self._judged = True
        silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if silent:
            raise GuardError(
                f"method {self._name}: {len(silent)} trained tensors got no gradient in the first "
                f"step, the first is {silent[0]}"
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not torch.isfinite(torch.tensor(loss)):
            raise GuardError(
                f"method {self._name}: loss is {loss} at step {state.global_step}; lower the "
                "learning rate or train in float32"
            )


def trained_state(objective: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds: trained parameters, and the objective's own state."""
    parameters = {n: p.detach() for n, p in objective.named_parameters() if p.requires_grad}
    state = objective.state_dict()  # flushes the queue
    own = {n: t for n, t in state.items() if n.startswith(_OWN_STATE)}
    return {name: tensor.contiguous() for name, tensor in (parameters | own).items()}


def save_trained(objective: nn.Module, file: Path) -> None:
    # buffers of a view would share storage with others, which safetensors refuses
    save_file({n: t.cpu().clone() for n, t in trained_state(objective).items()}, str(file))


def load_trained(objective: nn.Module, file: Path) -> None:
    """Raises RunError when the file does not hold exactly what trains."""
    saved = load_file(str(file))
    wanted = trained_state(objective)
    missing, unknown = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing or unknown:
        raise RunError(
            f"{file} does not fit the model: {len(missing)} tensors missing (first: "
            f"{missing[:1]}), {len(unknown)} unknown (first: {unknown[:1]})"
        )
    objective.load_state_dict(saved, strict=False)
