"""Configuration of the PILL tuner."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig

from mmadapt.peft._register import peft_type
from mmadapt.peft.options import check_pattern

PILL = "MMADAPT_PILL"

Stage = Literal["align", "instruct"]
_CHOICES: dict[str, tuple[Any, ...]] = {
    "gate": ("token", "static", "none"),
    "gate_heads": ("kv", "q"),
    "adapter": ("swiglu", "linear"),
    "experts": ("modality", "shared"),
    "projector": (None, "linear", "full", "frozen"),
    "stage": get_args(Stage),
    "decode_modality": (None, "text", "image"),
}


def check_choice(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is one of the values that the option `name` takes."""
    if value not in _CHOICES[name]:
        raise ValueError(f"PillConfig.{name} is one of {_CHOICES[name]}, got {value!r}")


@dataclass
class PillConfig(PeftConfig):
    """PILL (arXiv 2311.02126): adapters in front of attention and FFN, and gates on the values.

    Without `target_modules` every decoder layer of the language model is adapted; vision towers and
    Q-Formers never are. The frozen model stays as it is: each layer's `self_attn` and `mlp` and the
    projector are wrapped.

    Which tokens are visual is read from `input_ids` and the model's `config.image_token_id`. A bare
    language model without one is called with `modality_ids` [B, S] (0 text, 1 image); to `generate`
    with it, set `config.image_token_id` before the adapter is added.

    Args:
        rank: width of every adapter.
        gate: what scales the values of image tokens, per head: `"token"`, tanh of a projection of
            the attention input (released code); `"static"`, one tanh scalar per head; `"none"`.
        gate_heads: with grouped-query attention, one gate per `"kv"` head, or one per `"q"` head.
            The latter repeats keys and values (and so the cache) for every query head.
        adapter: `"swiglu"`, or `"linear"` for the two-matrix adapter of the paper's ablation.
        experts: `"modality"`, one expert for image and one for text tokens, or `"shared"`.
        attention_adapter: whether attention has its adapter.
        projector: `"linear"`, a fresh bias-free linear layer in place of the model's own (PILL);
            `"full"`, a trainable copy of the model's own; `"frozen"`, the model's own. The default
            is `"full"` for models with a projector. It is always in the adapter checkpoint.
        stage: `"align"`, stage 1: no gate, the last layer's experts are swapped while training,
            trains the vision experts and the projector; `"instruct"`, stage 2: trains everything.
        decode_modality: what tokens that are decoded with a cache are; None means `"text"`.
        fuse_norms: whether a norm in front of an adapter is computed by the adapter's operator, in
            layers where that is recognised to be the same; `mmadapt.peft.explain` tells where.
        target_modules: narrows the adapted wrappers (paths ending in `self_attn` or `mlp`), as a
            regular expression for the whole path or a list of path endings.
        exclude_modules: as `target_modules`, for what to leave out.
        layers_to_transform: indices of the decoder layers to adapt.
        modules_to_save: further modules that PEFT trains in full and saves.
        init_weights: False draws the up projections and gates at random, for tests.
    """

    rank: int = 32
    gate: Literal["token", "static", "none"] = "token"
    gate_heads: Literal["kv", "q"] = "kv"
    adapter: Literal["swiglu", "linear"] = "swiglu"
    experts: Literal["modality", "shared"] = "modality"
    attention_adapter: bool = True
    projector: Literal["linear", "full", "frozen"] | None = None
    stage: Stage = "instruct"
    decode_modality: Literal["text", "image"] | None = None
    fuse_norms: bool = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(PILL)
        for name in _CHOICES:
            check_choice(name, getattr(self, name))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"PillConfig.rank is a positive integer, got {self.rank!r}")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
            elif isinstance(value, str):
                check_pattern(f"PillConfig.{name}", value)
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = [self.layers_to_transform]
