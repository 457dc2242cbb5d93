"""`train:` blocks: `transformers.TrainingArguments`, checked early and built late."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import typing
from typing import Any

from pydantic import TypeAdapter, ValidationError

# PILL's released trainer: AdamW betas and decay, no clipping, cosine. The rest makes runs
# repeatable.
DEFAULTS: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.02,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": 1,
    "report_to": ["tensorboard"],
    "ddp_find_unused_parameters": False,
}

RESERVED = {
    "output_dir": "the run directory is the recipe's `out`",
    "learning_rate": "rates are per component: use the stage's `lr.default`",
    "seed": "use the recipe's `seed`",
    "data_seed": "use the recipe's `seed`",
    "remove_unused_columns": "the collator builds every model input",
    "resume_from_checkpoint": "the run resumes by itself",
    "ignore_data_skip": "resuming must replay the data order",
    "full_determinism": "set the environment variable CUBLAS_WORKSPACE_CONFIG instead",
    "save_only_model": "without optimizer state a run cannot resume",
    "load_best_model_at_end": "stages end with their last weights",
    "use_cpu": "use the recipe's `launch.cpu`",
    "dataloader_persistent_workers": "kept workers would not learn of a new epoch",
    "dataloader_drop_last": "use the stage's `flush_tail`",
    "auto_find_batch_size": "a batch size found at run time cannot be resumed exactly",
    "group_by_length": "the order of the data is a function of seed and epoch",
    "train_sampling_strategy": "the order of the data is a function of seed and epoch",
    "deepspeed": "the trainer runs under DDP",
    "fsdp": "the trainer runs under DDP",
    "fsdp_config": "the trainer runs under DDP",
    "eval_strategy": "stages are evaluated at the end: see the recipe's `eval`",
    "do_eval": "stages are evaluated at the end: see the recipe's `eval`",
    "eval_on_start": "stages are evaluated at the end: see the recipe's `eval`",
    "push_to_hub": "publish the adapter folder with `huggingface-cli upload`",
}

# transformers 5.18 or later renames gradient_* to activation_*; recipes may use either.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


@functools.cache
def _fields() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}


def _canonical(name: str) -> str:
    """The name this transformers version knows for a checkpointing argument."""
    known = _fields()
    for old, new in _RENAMED.items():
        if name in (old, new):
            return new if new in known else old
    return name


def check_arguments(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Check a `train:` block against the fields of TrainingArguments.

    Returns the block with values coerced to the field's type (`"1e-3"` becomes a float), and the
    problems found: field -> message for unknown, reserved and ill-typed fields.
    """
    known = _fields()
    checked: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for given, value in values.items():
        name = _canonical(given)
        if name in RESERVED:
            problems[given] = f"cannot be set here: {RESERVED[name]}"
        elif name not in known:
            close = difflib.get_close_matches(given, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            problems[given] = f"not a field of transformers.TrainingArguments{hint}"
        elif name.endswith("checkpointing_kwargs") and (value or {}).get("use_reentrant"):
            problems[given] = "use_reentrant must stay false: frozen inputs carry no gradient"
        else:
            try:
                checked[name] = _plain(TypeAdapter(_strict(known[name])).validate_python(value))
            except ValidationError as error:
                messages = dict.fromkeys(e["msg"] for e in error.errors())
                problems[given] = f"{'; '.join(messages)} (got {value!r})"
    return checked, problems


def _strict(annotation: Any) -> Any:
    """`SaveStrategy | str` as `SaveStrategy`: TrainingArguments takes no other strings there."""
    enums = [
        a for a in typing.get_args(annotation) if isinstance(a, type) and issubclass(a, enum.Enum)
    ]
    return enums[0] if enums and not _is_list(annotation) else annotation


def _is_list(annotation: Any) -> bool:
    return any(typing.get_origin(a) is list for a in typing.get_args(annotation))


def _plain(value: Any) -> Any:
    """Enum members as their value, so that the block stays YAML."""
    return getattr(value, "value", value)


def build_arguments(
    block: dict[str, Any],
    *,
    output_dir: str,
    learning_rate: float,
    seed: int,
    use_cpu: bool = False,
    quiet: bool = False,
) -> Any:
    """`transformers.TrainingArguments` of a stage: the block over DEFAULTS.

    Errors that TrainingArguments itself raises (incompatible settings) pass through.
    """
    from transformers import TrainingArguments

    known = _fields()
    merged = {name: value for name, value in DEFAULTS.items() if name in known} | block
    checkpointing = _canonical("gradient_checkpointing")
    if merged.get(checkpointing):
        keyword = _canonical("gradient_checkpointing_kwargs")
        merged[keyword] = {**(merged.get(keyword) or {}), "use_reentrant": False}
    if quiet:
        merged["disable_tqdm"] = True
    arguments = TrainingArguments(
        output_dir=output_dir,
        learning_rate=learning_rate,
        seed=seed,
        data_seed=seed,
        use_cpu=use_cpu,
        remove_unused_columns=False,
        dataloader_drop_last=False,  # the sampler cuts epochs to whole steps
        **merged,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: DataParallel breaks VLMs
    return arguments
