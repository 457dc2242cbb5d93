"""The schema of recipes that compare methods on BLIP: `task`, data, objective, methods."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mmadapt.train.config import Count, LaunchConfig, LearningRate, Rate
from mmadapt.train.config import _Strict as Strict

Task = Literal["retrieval", "vqa"]


class BlipModel(Strict):
    """A BLIP of the task's class: a hub id or folder, or one the recipe pretrains itself."""

    name: str
    make: Literal["digits_blip"] | None = None
    make_args: dict[str, Any] = Field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _arguments_need_a_maker(self) -> BlipModel:
        if self.make_args and self.make is None:
            raise ValueError("make_args is set but make is null: nothing would read it")
        return self


class BlipSource(Strict):
    """One data set of `mmadapt.data.load`. What is null keeps the reader's default."""

    reader: Literal["coco_karpathy", "flickr30k", "msrvtt", "didemo", "vqav2", "msrvtt_qa"]
    path: str
    image_root: str | None = None
    video_root: str | None = None
    max_words: Count | None = None
    limit: Count | None = None
    allow_links: bool | None = None


class BlipData(Strict):
    """What is trained on and what is evaluated; `make: digit_scenes` writes both to `root`."""

    root: str | None = None
    make: Literal["digit_scenes"] | None = None
    make_args: dict[str, Any] = Field(default_factory=dict)
    train: BlipSource
    test: BlipSource
    answers: str | None = None  # vqa, inference rank: the list of candidates

    @model_validator(mode="after")
    def _making_needs_a_root(self) -> BlipData:
        if self.make is not None and self.root is None:
            raise ValueError(f"make: {self.make} needs root, the folder to write the data to")
        if self.make_args and self.make is None:
            raise ValueError("make_args is set but make is null: nothing would read it")
        return self


class Inputs(Strict):
    """How images, videos and texts become tensors. Defaults: the released code's."""

    image_size: Count | None = None  # null: the model's
    crop: tuple[float, float] | None = (0.5, 1.0)  # null: no random crop, a plain resize
    flip: bool = True
    augment: bool = True
    frames: Count = 8
    frames_at_test: Count | None = None  # null: as in training
    train_frames: Literal["random", "uniform", "window"] = "random"
    test_frames: Literal["random", "uniform", "window"] = "uniform"  # released: random
    skip_broken: bool = False
    max_length: Count = 35


class Objective(Strict):
    """The task's loss; see `mmadapt.models.aurora`."""

    # retrieval
    queue_size: Count = 57_600
    temperature: Annotated[float, Field(gt=0)] = 0.07
    train_temperature: bool = False
    alpha: Rate = 0.4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.995
    momentum_factors: Literal["live", "ema"] = "live"
    momentum_dropout: bool = True
    negative_all_rank: bool = False
    ice: Literal["off", "released", "symmetric", "symmetric+inference"] = "released"
    frame_aware: bool = False
    share_image_states: bool | None = None
    # vqa
    label_smoothing: Rate = 0.0

    def of_task(self, task: Task) -> dict[str, Any]:
        """The settings the task's objective takes."""
        vqa = {"label_smoothing"}
        if task == "vqa":
            return self.model_dump(include=vqa)
        return self.model_dump(exclude=vqa)


class _Method(Strict):
    lr: LearningRate
    heads: bool = True  # retrieval: vision_proj and itm_head train in full, as released
    text_proj: bool = False  # retrieval: text_proj too; the released code means to and does not


class FullMethod(_Method):
    """Every weight trains."""

    type: Literal["full"]


class LoraMethod(_Method):
    """PEFT's LoRA on the weights that Aurora adapts.

    `rank: null` gives the ranks that come closest, from below, to the trainable parameters of
    the method named by `match`.
    """

    type: Literal["lora"]
    rank: Count | None = None
    match: str | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None  # null: the rank, which makes the scale 1
    dropout: Rate = 0.0

    @model_validator(mode="after")
    def _one_of_rank_and_match(self) -> LoraMethod:
        if (self.rank is None) == (self.match is None):
            raise ValueError("give either rank or match, a method of equal size")
        return self


class AuroraMethod(_Method):
    """Aurora (arXiv 2305.08381). The fields are those of `mmadapt.peft.AuroraConfig`."""

    type: Literal["aurora"]
    rank: Count = 32
    core: Literal["dense", "diagonal"] = "dense"
    components: list[str] | None = None
    mlp_layout: Literal["released", "clean"] | None = None
    scale: float = 1.0
    branch_dropout: Rate = 0.1
    gqt: bool = True
    gqt_factor: float = 0.1


Method = Annotated[FullMethod | LoraMethod | AuroraMethod, Field(discriminator="type")]


class BlipEval(Strict):
    """Evaluation after each method."""

    k_test: Count = 128
    similarity_weight: float = 0.0  # released: 0 for images, 1 for videos
    frame_aware: bool = False
    inference: Literal["rank", "generate"] = "rank"
    batch_size: Count = 32
    baseline: bool = True  # also evaluate the model as it comes, and what chance gives


class AuroraRecipe(Strict):
    """A whole comparison."""

    task: Task
    model: BlipModel
    data: BlipData
    out: str
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    inputs: Inputs = Field(default_factory=Inputs)
    objective: Objective = Field(default_factory=Objective)
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    schedule: Literal["epoch_cosine", "hf"] = "epoch_cosine"
    decay_everything: bool = True  # released: biases, modes and vectors decay too
    train: dict[str, Any] = Field(default_factory=dict)
    eval: BlipEval = Field(default_factory=BlipEval)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)

    @field_validator("methods", mode="before")
    @classmethod
    def _null_drops_a_method(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: method for name, method in value.items() if method is not None}
        return value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> AuroraRecipe:
        answers = {"vqav2", "msrvtt_qa"}
        for name in ("train", "test"):
            reader = getattr(self.data, name).reader
            if (reader in answers) != (self.task == "vqa"):
                raise ValueError(f"data.{name}.reader: {reader} is not for task {self.task}")
        if self.task == "vqa" and self.eval.inference == "rank" and self.data.answers is None:
            raise ValueError("data.answers: eval.inference rank needs the list of candidates")
        other_task = set(self.objective.of_task("retrieval" if self.task == "vqa" else "vqa"))
        stray = sorted(other_task & self.objective.model_fields_set)
        changed = [n for n in stray if getattr(self.objective, n) != getattr(Objective(), n)]
        if changed:
            raise ValueError(f"objective.{changed[0]}: is not for task {self.task}")
        for name, method in self.methods.items():
            other = getattr(method, "match", None)
            if other is not None and not isinstance(self.methods.get(other), AuroraMethod):
                raise ValueError(f"methods.{name}.match: {other!r} names no aurora method")
        idle = {"lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"}
        idle &= self.train.keys()
        if self.schedule == "epoch_cosine" and (idle or self.train.get("max_steps", -1) > 0):
            name = sorted(idle)[0] if idle else "max_steps"
            raise ValueError(f"schedule: epoch_cosine does not go with train.{name}; set hf")
        return self

    def stage_identity(self, method: str) -> dict[str, Any]:
        """Every setting the weights of a method depend on, for the manifest."""
        parts = {"task", "model", "data", "seed", "inputs", "objective", "schedule", "train"}
        whole = self.model_dump(mode="json", include=parts | {"decay_everything"})
        wanted = [method, getattr(self.methods[method], "match", None)]
        settings = {n: self.methods[n].model_dump(mode="json") for n in wanted if n}
        return {**whole, "methods": settings}

    def evaluation_identity(self) -> dict[str, Any]:
        methods = {name: method.model_dump(mode="json") for name, method in self.methods.items()}
        first = self.stage_identity(next(iter(self.methods)))
        return {**first, "methods": methods, "eval": self.eval.model_dump(mode="json")}
