"""Load a vision-language backbone with its tokenizer and image processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

IMAGE_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Mean and standard deviation of the three channels, for pixels in 0..1."""


@dataclass(frozen=True)
class Pretrained:
    """A backbone and how to feed it.

    `image_token_id` is the placeholder id that the model replaces by image features, and
    `num_image_tokens` the number of placeholders of one image.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    image_token_id: int
    num_image_tokens: int


def load_pretrained(
    name: str,
    *,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    image_statistics: str | None = None,
) -> Pretrained:
    """The backbone saved in folder `name` or published under that hub id.

    Any model of transformers' image-text-to-text family whose config tells the number of
    placeholders of an image: (Instruct)BLIP-2, LLaVA and CROME. It is returned in eval mode.
    `image_statistics` ("imagenet" or "clip") replaces the mean and deviation that pixels are
    normalised with; released PILL feeds ImageNet's to a BLIP-2 that learnt with CLIP's.

    Raises:
        ValueError: unknown dtype or statistics; a family without placeholders; no image token.
        OSError: nothing to load under `name`.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
    from transformers import AutoModelForImageTextToText as AutoModel

    import mmadapt.models.crome  # noqa: F401  (registers CROME with the Auto classes)

    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {sorted(_DTYPES)}, got {dtype!r}")
    if image_statistics not in (None, *IMAGE_STATISTICS):
        raise ValueError(
            f"image_statistics: expected one of {sorted(IMAGE_STATISTICS)} or None, got "
            f"{image_statistics!r}"
        )
    config = AutoConfig.from_pretrained(name)
    image_tokens = num_image_tokens(config)
    image_token_id = getattr(config, "image_token_id", None)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if image_token_id is None or image_token_id >= len(tokenizer):
        raise ValueError(
            f"name: {name!r} has image token id {image_token_id}, and a tokenizer of "
            f"{len(tokenizer)} entries; save both with an image placeholder token"
        )
    model = AutoModel.from_pretrained(
        name, dtype=_DTYPES[dtype], attn_implementation=attn_implementation
    )
    image_processor = AutoImageProcessor.from_pretrained(name)
    if image_statistics is not None:
        mean, std = IMAGE_STATISTICS[image_statistics]
        image_processor.image_mean, image_processor.image_std = list(mean), list(std)
    return Pretrained(
        model=model.eval(),
        tokenizer=tokenizer,
        image_processor=image_processor,
        image_token_id=image_token_id,
        num_image_tokens=image_tokens,
    )


def num_image_tokens(config: Any) -> int:
    """Placeholders of one image: BLIP-2's queries, LLaVA's patches (and CLS if kept), CROME's both.

    Raises:
        ValueError: another model family.
    """
    if config.model_type in ("blip-2", "instructblip"):
        return config.num_query_tokens
    if config.model_type == "llava":
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches + (config.vision_feature_select_strategy == "full")
    if config.model_type == "mmadapt_crome":
        return config.num_image_tokens
    raise ValueError(
        "config: expected model_type 'blip-2', 'instructblip', 'llava' or 'mmadapt_crome', got "
        f"{config.model_type!r}"
    )
