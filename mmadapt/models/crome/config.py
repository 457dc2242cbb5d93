"""Configuration of a CROME model: ViT, Q-Former, two projections, one adapter, a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, Blip2VisionConfig, InstructBlipQFormerConfig, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig

from mmadapt.nn import CrossModalAdapter

READINGS = ("R1", "R2")
STREAMS = ("text", "visual", "instruction")
BRANCHES = ("visual", "text")
_DEFAULT_ORDER = {"R1": ("text", "visual", "instruction"), "R2": ("visual", "text", "instruction")}


class CromeModelConfig(PreTrainedConfig):
    """Sizes and switches of `CromeForConditionalGeneration` (docs/crome.md).

    Args:
        vision_config: `Blip2VisionConfig` (or its dict); its defaults are 39 blocks of ViT-g/14.
        qformer_config: `InstructBlipQFormerConfig`; its defaults with BERT's vocabulary and one
            `[DEC]` token (30,523) are InstructBLIP's.
        text_config: configuration of any causal or encoder-decoder language model.
        num_query_tokens: query embeddings of the Q-Former.
        image_token_id: id whose positions in `input_ids` are filled with image vectors. It needs no
            row in the language model's embedding table.
        reading: what the adapter's branches receive. `"R1"`: the visual branch projected patches,
            the text branch projected query outputs. `"R2"`: the visual branch both, the text branch
            the language model's embeddings of the instruction, which also follow untouched.
        order: the streams of the language model's input from left to right: `"text"` and `"visual"`
            (the branches' outputs) and `"instruction"`; the answer follows. A stream that is left
            out is not computed. Default: text, visual, instruction (R1), visual, text, instruction
            (R2).
        qformer_tap: block of the ViT, counted from 1, that the Q-Former reads (after the ViT's last
            LayerNorm); None is the last block.
        patch_tap: block whose output is projected; None is the last, `"bliva"` the last but one.
        keep_cls: whether the patch stream keeps the CLS token.
        instruction_aware: whether the Q-Former gets the instruction.
        adapter_rank: bottleneck width; the default gives about 5 M weights.
        adapter_residual_scale, adapter_pre_norm, adapter_bias: factor on the adapter's branch, an
            RMSNorm in front of it, biases on its linear maps. The paper describes none of them.
        adapter_gated, adapter_share_up, adapter_share_input: as `gated`, `share_up` and
            `share_input` of `mmadapt.nn.CrossModalAdapter`, for ablations.
        adapter_branches: which streams pass through the adapter; empty for no adapter at all.

    Raises:
        ValueError: a value outside of what is listed here.
    """

    model_type = "mmadapt_crome"
    sub_configs = {  # noqa: RUF012
        "vision_config": Blip2VisionConfig,
        "qformer_config": InstructBlipQFormerConfig,
        "text_config": AutoConfig,
    }

    def __init__(
        self,
        vision_config: Any = None,
        qformer_config: Any = None,
        text_config: Any = None,
        *,
        num_query_tokens: int = 32,
        image_token_id: int | None = None,
        reading: str = "R1",
        order: Sequence[str] | None = None,
        qformer_tap: int | None = None,
        patch_tap: int | str | None = None,
        keep_cls: bool = False,
        instruction_aware: bool = True,
        adapter_rank: int | None = None,
        adapter_residual_scale: float = 1.0,
        adapter_pre_norm: bool = False,
        adapter_bias: bool = False,
        adapter_gated: bool = True,
        adapter_share_up: bool = True,
        adapter_share_input: bool = False,
        adapter_branches: Sequence[str] = BRANCHES,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config(vision_config, Blip2VisionConfig)
        self.qformer_config = _sub_config(
            qformer_config, InstructBlipQFormerConfig, vocab_size=30523
        )
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        self.text_config = _text_config(text_config)
        self.num_query_tokens = num_query_tokens
        self.image_token_id = image_token_id
        self.reading = reading
        self.order = list(_DEFAULT_ORDER.get(reading, STREAMS) if order is None else order)
        self.qformer_tap = qformer_tap
        self.patch_tap = patch_tap
        self.keep_cls = keep_cls
        self.instruction_aware = instruction_aware
        if adapter_rank is None:
            adapter_rank = CrossModalAdapter.default_rank(self.text_config.hidden_size)
        self.adapter_rank = adapter_rank
        self.adapter_residual_scale = adapter_residual_scale
        self.adapter_pre_norm = adapter_pre_norm
        self.adapter_bias = adapter_bias
        self.adapter_gated = adapter_gated
        self.adapter_share_up = adapter_share_up
        self.adapter_share_input = adapter_share_input
        self.adapter_branches = list(adapter_branches)
        self.initializer_range = initializer_range
        self._check()
        kwargs["is_encoder_decoder"] = self.text_config.is_encoder_decoder
        kwargs["tie_word_embeddings"] = getattr(self.text_config, "tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def num_patch_tokens(self) -> int:
        """Length of the patch stream of one image."""
        vision = self.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + self.keep_cls

    @property
    def uses_patches(self) -> bool:
        return "visual" in self.order

    @property
    def uses_queries(self) -> bool:
        return ("visual" if self.reading == "R2" else "text") in self.order

    @property
    def image_tokens(self) -> tuple[int, int]:
        """Placeholders of one image before and behind the instruction."""
        sides = [0, 0]
        for name in self.order:
            if name != "instruction":
                sides[self._behind_instruction(name)] += self._stream_length(name)
        return sides[0], sides[1]

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one image: 288 with 32 queries and 256 patches."""
        return sum(self.image_tokens)

    def tap(self, name: str) -> int:
        """Number of the block (from 1) that "qformer" or "patch" reads."""
        blocks = self.vision_config.num_hidden_layers
        value = self.qformer_tap if name == "qformer" else self.patch_tap
        if value == "bliva":
            return blocks - 1
        return blocks if value is None else value

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        return self.text_config.get_text_config(*args, **kwargs)

    def _stream_length(self, name: str) -> int:
        queries, patches = self.num_query_tokens, self.num_patch_tokens
        if self.reading == "R1":
            return queries if name == "text" else patches
        return queries + patches if name == "visual" else 0

    def _behind_instruction(self, name: str) -> bool:
        return self.order.index(name) > self.order.index("instruction")

    def _check(self) -> None:
        if self.reading not in READINGS:
            raise ValueError(f"reading is one of {READINGS}, got {self.reading!r}")
        known = set(self.order) <= set(STREAMS) and len(set(self.order)) == len(self.order)
        if not known or "instruction" not in self.order:
            raise ValueError(
                f"order holds 'instruction' and any of 'text' and 'visual' once, got {self.order}"
            )
        if not set(self.adapter_branches) <= set(BRANCHES):
            raise ValueError(
                f"adapter_branches holds any of {BRANCHES}, got {self.adapter_branches}"
            )
        if self.num_query_tokens < 1 or self.adapter_rank < 1:
            raise ValueError(
                "num_query_tokens and adapter_rank are positive, got "
                f"{self.num_query_tokens} and {self.adapter_rank}"
            )
        blocks = self.vision_config.num_hidden_layers
        for name in ("qformer", "patch"):
            tap = self.tap(name)
            if isinstance(tap, bool) or not isinstance(tap, int) or not 1 <= tap <= blocks:
                raise ValueError(
                    f"{name}_tap is a block of the vision tower, 1..{blocks}"
                    f"{', or bliva' if name == 'patch' else ''}, got {tap!r}"
                )


def _sub_config(value: Any, cls: type[PreTrainedConfig], **defaults: Any) -> PreTrainedConfig:
    if value is None:
        return cls(**defaults)
    if isinstance(value, PreTrainedConfig):
        value = value.to_dict()
    known = {name: item for name, item in value.items() if name != "model_type"}
    return cls(**known)


def _text_config(value: Any) -> PreTrainedConfig:
    if value is None:
        return LlamaConfig()
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(value)
    if "model_type" not in value:
        raise ValueError("text_config: a dictionary needs its model_type")
    return AutoConfig.for_model(value.pop("model_type"), **value)
