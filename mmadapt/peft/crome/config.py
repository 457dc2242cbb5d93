"""Configuration of the CROME tuner."""

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig

from mmadapt.peft._register import peft_type

CROME = "MMADAPT_CROME"

_CHOICES: dict[str, tuple[Any, ...]] = {"instruction": ("none", "beside_images", "always")}


@dataclass
class CromeConfig(PeftConfig):
    """CROME (arXiv 2408.06610): one gated bottleneck in front of the language model.

    The projector of an existing LLaVA, BLIP-2 or InstructBLIP model is wrapped: what it hands to
    the language model passes through the adapter, ``y = x + up (silu(gate x) * (down x))``. Nothing
    inside the language model changes, and rows without an image reach it untouched (but see
    `instruction`). The whole of CROME, with projected patches beside the queries, is
    `mmadapt.models.CromeForConditionalGeneration`.

    Streams: LLaVA's projected patches are the visual stream; projected query outputs are the text
    stream, because the Q-Former has read the instruction, or the visual one if the instruction's
    embeddings are the text stream. An adapter with one stream has one pair of input matrices (3 dm
    weights), with two streams two pairs and the shared `up` (5 dm).

    Args:
        rank: bottleneck width m; None gives about 5 M weights with two streams.
        instruction: whether the language model's embeddings of the prompt pass through the text
            stream: `"none"`, `"beside_images"` only in rows with an image, `"always"`. Answers do
            not: in training they are told by their labels, in decoding by the cache. A bare
            language model has no projector, its visual stream is the positions with
            ``modality_ids`` 1.
        residual_scale, pre_norm, adapter_bias: factor on the branch, an RMSNorm in front of it,
            biases on its linear maps; the paper describes none of them.
        gated, share_up, share_input: as in `mmadapt.nn.CrossModalAdapter`, for ablations.
        target_modules: narrows what is wrapped, as a regular expression for the whole path or a
            list of path endings. It never widens it.
        exclude_modules: as `target_modules`, for what to leave out.
        modules_to_save: further modules that PEFT trains in full and saves.
        init_weights: False draws `up` at random, for tests.
    """

    rank: int | None = None
    instruction: Literal["none", "beside_images", "always"] = "none"
    residual_scale: float = 1.0
    pre_norm: bool = False
    adapter_bias: bool = False
    gated: bool = True
    share_up: bool = True
    share_input: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(CROME)
        if self.instruction not in _CHOICES["instruction"]:
            raise ValueError(
                f"CromeConfig.instruction is one of {_CHOICES['instruction']}, got "
                f"{self.instruction!r}"
            )
        positive = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank > 0
        if self.rank is not None and not positive:
            raise ValueError(f"CromeConfig.rank is a positive integer or None, got {self.rank!r}")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
