"""Build, pretrain and save the digits backbone: a BLIP-2 of a few hundred thousand weights."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmadapt.data.digits_vqa import IMAGE_SIZE
from mmadapt.models import IMAGE_STATISTICS
from mmadapt.train.digits.corpus import PROMPT, SYSTEM, texts
from mmadapt.train.digits.language import LanguageSettings, pretrain_language
from mmadapt.train.digits.tokenizer import IMAGE_TOKEN, train_tokenizer
from mmadapt.train.digits.vision import VisionSettings, pretrain_vision

_TOKENIZER_TEXTS = 3000
# transformers' defaults (0.02; 1e-10 for the ViT) suit widths of 768 and more.
_INIT_STD = 0.05


def make_digits_backbone(
    out_dir: str | os.PathLike[str],
    data_root: str | os.PathLike[str],
    *,
    seed: int = 0,
    prompt: str = PROMPT,
    system: str = SYSTEM,
    language_steps: int = LanguageSettings.steps,
    vision_epochs: int = VisionSettings.epochs,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Pretrain the demo's frozen parts and save them so that `load_pretrained(out_dir)` works.

    `data_root` is a folder of `write_digits_vqa`; only its captioned training scans are looked
    at. The language model reads questions in `prompt` and `system`; ask it in the same ones.
    The same arguments give the same weights on the same machine and number of threads.
    `progress` receives steps done and steps to do.
    """
    language = replace(LanguageSettings(), steps=language_steps)
    vision = replace(VisionSettings(), epochs=vision_epochs)
    text_options = {"prompt": prompt, "system": system}
    total = language.steps + vision.epochs
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        corpus = islice(texts(random.Random(seed), **text_options), _TOKENIZER_TEXTS)
        tokenizer = train_tokenizer(q + a for q, a in corpus)
        image_processor = _image_processor()
        model = _model(tokenizer, language, vision)
        pretrain_vision(
            model, image_processor, Path(data_root), vision, seed=seed, progress=advance
        )
        pretrain_language(
            model.language_model,
            tokenizer,
            language,
            seed=seed,
            text_options=text_options,
            progress=advance,
        )
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(out_dir)


def _image_processor() -> Any:
    # The torchvision-free class; it loads as AutoImageProcessor with and without torchvision.
    from transformers import BlipImageProcessorPil

    mean, std = IMAGE_STATISTICS["imagenet"]  # as PILL preprocesses
    return BlipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(mean),
        image_std=list(std),
    )


def _model(tokenizer: Any, language: LanguageSettings, vision: VisionSettings) -> Any:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        LlamaConfig,
    )

    width = vision.hidden_size
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "initializer_range": _INIT_STD,
    }
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            image_size=IMAGE_SIZE, patch_size=vision.patch_size, **sizes
        ),
        qformer_config=Blip2QFormerConfig(
            encoder_hidden_size=width, cross_attention_frequency=1, **sizes
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=language.hidden_size,
            intermediate_size=language.intermediate_size,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_heads,
            max_position_embeddings=512,
            initializer_range=_INIT_STD,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        num_query_tokens=vision.num_queries,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        initializer_range=_INIT_STD,
    )
    model = Blip2ForConditionalGeneration(config)
    # BLIP-2 starts all queries at zero; different ones let them learn different things.
    torch.nn.init.normal_(model.query_tokens, std=_INIT_STD)
    return model
