"""Start a CROME model from the parts of a BLIP-2 or InstructBLIP checkpoint."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from mmadapt.models.crome.config import CromeModelConfig
from mmadapt.models.crome.modeling import CromeForConditionalGeneration

# What BLIP-2's Q-Former has no weights for, because it reads no text.
_TEXT_PARTS = re.compile(
    r"embeddings\.(word|position)_embeddings|layer\.\d+\.(intermediate|output)\."
)


def crome_from_blip(
    source: nn.Module, language_model: nn.Module | None = None, **settings: Any
) -> CromeForConditionalGeneration:
    """A CROME model with the ViT, Q-Former and queries of `source`, projections and adapter fresh.

    InstructBLIP's Q-Former is taken whole, as the paper does. BLIP-2's has seen no instructions:
    its text parts start fresh, or set ``instruction_aware=False``.

    Args:
        source: `InstructBlipForConditionalGeneration` or `Blip2ForConditionalGeneration`; it keeps
            its weights.
        language_model: a causal or encoder-decoder language model to put behind; by default that of
            `source`, shared with it.
        settings: further arguments of `CromeModelConfig`, and `qformer_vocab_size` for the text of
            a BLIP-2 Q-Former (default 30,523).

    Raises:
        ValueError: another kind of model, or weights that do not fit.
    """
    kind = getattr(getattr(source, "config", None), "model_type", None)
    if kind not in ("instructblip", "blip-2"):
        raise ValueError(
            f"source is an InstructBLIP or BLIP-2 model, got {type(source).__name__} ({kind})"
        )
    language_model = source.language_model if language_model is None else language_model
    qformer = source.config.qformer_config.to_dict()
    vocabulary = settings.pop("qformer_vocab_size", None)
    if kind == "blip-2":
        qformer["vocab_size"] = 30523 if vocabulary is None else vocabulary
    elif vocabulary is not None:
        raise ValueError("qformer_vocab_size is given by InstructBLIP's own Q-Former")
    options = {
        "num_query_tokens": source.config.num_query_tokens,
        "image_token_id": source.config.image_token_id,
    }
    # A copy: making a configuration resets the attention implementation of those inside it.
    text_config = copy.deepcopy(language_model.config)
    config = CromeModelConfig(
        source.config.vision_config, qformer, text_config, **(options | settings)
    )
    model = CromeForConditionalGeneration(config, language_model)
    model.config.text_config = language_model.config
    weights = source.qformer.state_dict()
    if kind == "blip-2":
        weights = {
            name.replace("layernorm.", "embeddings.layernorm.")
            if name.startswith("layernorm.")
            else name: value
            for name, value in weights.items()
        }
    missing, unknown = model.qformer.load_state_dict(weights, strict=False)
    missing = [n for n in missing if kind == "instructblip" or not _TEXT_PARTS.search(n)]
    if missing or unknown:
        raise ValueError(
            f"Q-Former of {type(source).__name__}: missing {missing}, unknown {unknown}"
        )
    model.vision_model.load_state_dict(source.vision_model.state_dict())
    with torch.no_grad():
        model.query_tokens.copy_(source.query_tokens)
    model.train(source.training)
    return model
