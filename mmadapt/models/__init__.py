"""Backbones: Hugging Face vision-language models with what is needed to feed them; CROME.

>>> from mmadapt.models import load_pretrained
>>> backbone = load_pretrained("path/to/a/blip2-or-llava")
>>> backbone.model, backbone.tokenizer, backbone.image_processor

CROME's classes are loaded on first use, because they import transformers' modelling code.
"""

import importlib
from typing import TYPE_CHECKING

from mmadapt.models.loading import IMAGE_STATISTICS, Pretrained, load_pretrained, num_image_tokens

if TYPE_CHECKING:
    from mmadapt.models.crome import (
        CromeForConditionalGeneration,
        CromeModelConfig,
        crome_adapter_state,
        crome_components,
        crome_from_blip,
        load_crome_adapter,
        load_crome_adapter_state,
        save_crome_adapter,
        set_crome_stage,
    )

__all__ = [
    "IMAGE_STATISTICS",
    "CromeForConditionalGeneration",
    "CromeModelConfig",
    "Pretrained",
    "crome_adapter_state",
    "crome_components",
    "crome_from_blip",
    "load_crome_adapter",
    "load_crome_adapter_state",
    "load_pretrained",
    "num_image_tokens",
    "save_crome_adapter",
    "set_crome_stage",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("mmadapt.models.crome"), name)
