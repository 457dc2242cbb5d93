"""The recipe schema: what a YAML recipe may say, with defaults.

Every model forbids unknown keys, so a misspelt key is an error with its dotted path and never a
setting that is silently ignored. `loading.py` turns files and overrides into a `Recipe`.
"""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

STAGES = ("align", "instruct", "task")

Rate = Annotated[float, Field(ge=0, le=1)]
LearningRate = Annotated[float, Field(gt=0, lt=math.inf)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class ModelConfig(_Strict):
    """Frozen backbone: a hub id or folder, or one the recipe builds itself (`make: digits`)."""

    name: str
    make: Literal["digits"] | None = None
    make_args: dict[str, Any] = Field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    image_statistics: Literal["imagenet", "clip"] | None = None  # null: the checkpoint's own
    attn: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] = "sdpa"

    @model_validator(mode="after")
    def _arguments_need_a_maker(self) -> ModelConfig:
        if self.make_args and self.make is None:
            raise ValueError("make_args is set but make is null: nothing would read it")
        return self


class PillMethod(_Strict):
    """PILL (arXiv 2311.02126). The fields are those of `mmadapt.peft.PillConfig`."""

    type: Literal["pill"]
    rank: Count = 32
    gate: Literal["token", "static", "none"] = "token"
    gate_heads: Literal["kv", "q"] = "kv"
    adapter: Literal["swiglu", "linear"] = "swiglu"
    experts: Literal["modality", "shared"] = "modality"
    attention_adapter: bool = True
    projector: Literal["linear", "full", "frozen"] | None = None
    decode_modality: Literal["text", "image"] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None


class CromeMethod(_Strict):
    """CROME (arXiv 2408.06610) from a BLIP-2, InstructBLIP or CROME checkpoint.

    The upper fields are those of `mmadapt.models.CromeModelConfig` (`rank` is its `adapter_rank`,
    and so on), null for its default; the lower ones say what the model is fed.
    """

    type: Literal["crome"]
    rank: Count | None = None
    residual_scale: float = 1.0
    pre_norm: bool = False
    bias: bool = False
    gated: bool = True
    share_up: bool = True
    share_input: bool = False
    branches: list[Literal["visual", "text"]] = Field(default_factory=lambda: ["visual", "text"])
    reading: Literal["R1", "R2"] = "R1"
    order: list[Literal["text", "visual", "instruction"]] | None = None
    qformer_tap: Count | None = None
    patch_tap: Count | Literal["bliva"] | None = None
    keep_cls: bool = False
    instruction_aware: bool = True
    adapter_in_align: bool = True  # false: stage (a) trains the projections alone
    # what stage (c) trains, to compare with the adapter; lora: in the language model, as large
    task_trains: list[Literal["adapter", "projector", "qformer", "lora"]] = Field(
        default_factory=lambda: ["adapter"], min_length=1
    )

    template: Literal["plain", "pill"] = "plain"  # marks around questions
    crop: bool = True  # random crops and flips of training images
    flip: bool = True
    max_instruction: Annotated[int, Field(ge=2)] = 128
    max_answer: Annotated[int, Field(ge=2)] = 256
    max_question: Annotated[int, Field(ge=2)] = 128  # the Q-Former's


class WrongAnswers(_Strict):
    """Wrong-answer augmentation of the training texts (docs/pill.md)."""

    mode: Literal["uniform_all", "strictly_wrong"] = "uniform_all"
    rate: Rate = 0.0


class DataSource(_Strict):
    """One data set, read by `mmadapt.data.load`. What is null keeps the reader's default."""

    reader: Literal["scienceqa", "llava_json"]
    path: str
    split: str | None = None
    prompt: str | None = None
    system: str | None = None
    image_root: str | None = None
    use_caption: bool | None = None
    wrong_answers: WrongAnswers = Field(default_factory=WrongAnswers)
    limit: Count | None = None


class DataConfig(_Strict):
    """Root of the data, or a data set the recipe writes itself (`make: digits`)."""

    root: str | None = None
    make: Literal["digits", "digits_turned"] | None = None  # the latter: upright and turned
    make_args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _making_needs_a_root(self) -> DataConfig:
        if self.make is not None and self.root is None:
            raise ValueError(f"make: {self.make} needs root, the folder to write the data to")
        if self.make_args and self.make is None:
            raise ValueError("make_args is set but make is null: nothing would read it")
        return self


class Rates(_Strict):
    """Learning rates by component; a component without its own rate uses `default`.

    schedule "hf" leaves the shape to `train.lr_scheduler_type` and `train.warmup_steps`;
    "pill" is the released PILL schedule: linear warm-up from 0 over `warmup_epochs` (may be a
    fraction), then half a cosine to 0 over `train.num_train_epochs`. "per_step" and "per_epoch" are
    CROME's: linear from `start_lr` over `warmup_steps`, then half a cosine to 0, by the step or by
    the epoch.
    """

    default: LearningRate
    projector: LearningRate | None = None
    vision_expert: LearningRate | None = None
    text_expert: LearningRate | None = None
    shared_expert: LearningRate | None = None
    attention_adapter: LearningRate | None = None
    gate: LearningRate | None = None
    adapter: LearningRate | None = None
    qformer: LearningRate | None = None
    schedule: Literal["hf", "pill", "per_step", "per_epoch"] = "hf"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    start_lr: LearningRate = 1e-8
    warmup_steps: Annotated[int, Field(ge=0)] = 1000

    @model_validator(mode="after")
    def _warmup_belongs_to_pill(self) -> Rates:
        if self.warmup_epochs and self.schedule != "pill":
            raise ValueError("warmup_epochs needs schedule: pill (use train.warmup_steps with hf)")
        return self

    def of(self, component: str) -> float:
        """Learning rate of a component (a key of `mmadapt.peft.components`)."""
        rate = getattr(self, component, None)
        return self.default if rate is None else rate


_HF_SCHEDULE = {"lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"}


class StageConfig(_Strict):
    """One training stage. `train` holds `transformers.TrainingArguments`, verbatim; the loader
    checks it with `arguments.check_arguments`."""

    data: Annotated[list[DataSource], Field(min_length=1)]
    lr: Rates
    max_length: Count = 512
    flush_tail: bool = False  # train on an epoch's incomplete last accumulation group too
    # sqrt: draw data sets in proportion to the root of their size, with repetition
    sampling: Literal["shuffle", "sqrt"] = "shuffle"
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _pill_schedule_counts_epochs(self) -> StageConfig:
        if self.lr.schedule == "pill" and self.train.get("max_steps", -1) > 0:
            raise ValueError(
                "lr.schedule: pill counts epochs; set train.num_train_epochs, not max_steps"
            )
        idle = _HF_SCHEDULE & self.train.keys()
        if self.lr.schedule != "hf" and idle:
            raise ValueError(
                f"lr.schedule: {self.lr.schedule} does not read train.{sorted(idle)[0]}"
            )
        return self


class EvalConfig(_Strict):
    """Evaluation after the last stage. Without `data` the last ScienceQA source is evaluated."""

    data: DataSource | None = None
    split: str = "test"
    limit: Count | None = None
    prompt: str | None = None
    max_length: Count = 512
    max_new_tokens: Count = 16
    batch_size: Count = 32
    failures: Literal["wrong", "random"] = "wrong"  # answers without a letter
    expected_count: Count | None = None  # 4241 for ScienceQA's test split
    baseline: bool = True
    blank_images: bool = True


class LaunchConfig(_Strict):
    """Processes started through `accelerate launch`; 1 runs in this process."""

    nproc: Count = 1
    cpu: bool = False


class Recipe(_Strict):
    """A whole run: backbone, method, stages in order, evaluation."""

    model: ModelConfig
    method: Annotated[PillMethod | CromeMethod, Field(discriminator="type")]
    out: str
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataConfig = Field(default_factory=DataConfig)
    stages: Annotated[dict[Literal["align", "instruct", "task"], StageConfig], Field(min_length=1)]
    eval: EvalConfig | None = Field(default_factory=EvalConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)

    @field_validator("stages", mode="before")
    @classmethod
    def _null_drops_a_stage(cls, value: Any) -> Any:
        # `stages.align=null` on the command line is how a stage is left out
        if isinstance(value, dict):
            return {name: stage for name, stage in value.items() if stage is not None}
        return value

    @field_validator("stages")
    @classmethod
    def _align_comes_first(cls, value: dict[str, StageConfig]) -> dict[str, StageConfig]:
        names = list(value)
        for early, late in itertools.combinations(STAGES, 2):
            if early in names and late in names and names.index(early) > names.index(late):
                raise ValueError(f"{early} must stand before {late}: stages run in file order")
        return value

    @model_validator(mode="after")
    def _pill_has_two_stages(self) -> Recipe:
        if self.method.type == "pill" and "task" in self.stages:
            raise ValueError("stages.task: is a stage of CROME, method.type is pill")
        return self
