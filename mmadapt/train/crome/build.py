"""From a CROME recipe to a model, what feeds it, and its stages."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmadapt.data import CromeCollator, CromeImageProcessor, PillTemplate, PlainTemplate
from mmadapt.models import (
    CromeForConditionalGeneration,
    CromeModelConfig,
    Pretrained,
    crome_from_blip,
    set_crome_stage,
)
from mmadapt.train.build import load_backbone
from mmadapt.train.config import CromeMethod, Recipe
from mmadapt.train.crome.lora import add_lora
from mmadapt.train.errors import RecipeError

QFORMER_TOKENIZER = "qformer_tokenizer"

# name in the recipe -> name in CromeModelConfig
_MODEL_SETTINGS = {
    "rank": "adapter_rank",
    "residual_scale": "adapter_residual_scale",
    "pre_norm": "adapter_pre_norm",
    "bias": "adapter_bias",
    "gated": "adapter_gated",
    "share_up": "adapter_share_up",
    "share_input": "adapter_share_input",
    "branches": "adapter_branches",
    "reading": "reading",
    "order": "order",
    "qformer_tap": "qformer_tap",
    "patch_tap": "patch_tap",
    "keep_cls": "keep_cls",
    "instruction_aware": "instruction_aware",
}


@dataclass(frozen=True)
class CromeBackbone(Pretrained):
    """`Pretrained` of a CROME model, which makes its own collators."""

    qformer_tokenizer: Any = None
    method: CromeMethod = field(default_factory=lambda: CromeMethod(type="crome"))
    seed: int = 0

    def collator(self, *, max_length: int, with_labels: bool) -> CromeCollator:
        """Labelled batches for training, with random crops if the recipe wants them, or prompts.

        `max_length` limits conversations of several turns, images not counted.
        """
        method, config = self.method, self.model.config
        template = PillTemplate(image_text="") if method.template == "pill" else PlainTemplate()
        return CromeCollator(
            self.tokenizer,
            self._images(train=with_labels),
            config,
            qformer_tokenizer=self.qformer_tokenizer,
            max_instruction=method.max_instruction,
            max_answer=method.max_answer,
            max_question=method.max_question,
            max_length=max_length + config.num_image_tokens,
            with_labels=with_labels,
            template=template,
        )

    def _images(self, *, train: bool) -> Any:
        method, processor = self.method, self.image_processor
        if not train or not (method.crop or method.flip):
            return processor
        return CromeImageProcessor(
            self.model.config.vision_config.image_size,
            train=True,
            crop=method.crop,
            flip=method.flip,
            mean=processor.image_mean,
            std=processor.image_std,
            seed=self.seed,
        )


def model_settings(method: CromeMethod) -> dict[str, Any]:
    """The recipe's choices as arguments of `CromeModelConfig`; what is null keeps its default."""
    values = method.model_dump()
    return {name: values[key] for key, name in _MODEL_SETTINGS.items() if values[key] is not None}


def prepare_crome(recipe: Recipe) -> tuple[CromeBackbone, CromeForConditionalGeneration]:
    """A CROME model from the recipe's BLIP-2, InstructBLIP or CROME checkpoint.

    Fresh parts depend on the seed alone.

    Raises:
        RecipeError: the checkpoint is of another kind, or a CROME of other settings.
    """
    from transformers import set_seed

    method = recipe.method
    pretrained = load_backbone(recipe.model)
    own_tokenizer = _qformer_tokenizer(recipe.model.name)
    set_seed(recipe.seed)
    vocabulary = len(own_tokenizer or pretrained.tokenizer)
    try:
        model = crome_from(pretrained.model, method, qformer_vocab_size=vocabulary)
    except ValueError as error:
        raise RecipeError(f"method: {error}") from error
    if "lora" in method.task_trains:
        add_lora(model)
    backbone = CromeBackbone(
        model=model,
        tokenizer=pretrained.tokenizer,
        image_processor=pretrained.image_processor,
        image_token_id=model.config.image_token_id,
        num_image_tokens=model.config.num_image_tokens,
        qformer_tokenizer=own_tokenizer or pretrained.tokenizer,
        method=method,
        seed=recipe.seed,
    )
    return backbone, model


def crome_from(
    base: Any, method: CromeMethod, *, qformer_vocab_size: int | None
) -> CromeForConditionalGeneration:
    """`base` if it is CROME of these settings, else a CROME model from its parts.

    `qformer_vocab_size` is for a BLIP-2, whose Q-Former has read no text; None for BERT's.

    Raises:
        ValueError: another kind of model, or a CROME of other settings.
    """
    settings = model_settings(method)
    if isinstance(base, CromeForConditionalGeneration):
        _check_settings(base.config, settings)
        return base
    if base.config.model_type == "blip-2":
        settings["qformer_vocab_size"] = qformer_vocab_size
    return crome_from_blip(base, **settings)


def enter_crome_stage(recipe: Recipe, model: CromeForConditionalGeneration, stage: str) -> None:
    """Let the tensors of `stage` train."""
    try:
        set_crome_stage(
            model,
            stage,
            adapter_in_align=recipe.method.adapter_in_align,
            task_trains=recipe.method.task_trains,
        )
    except ValueError as error:
        raise RecipeError(f"stages.{stage}: {error}") from error


def _qformer_tokenizer(name: str) -> Any:
    """The Q-Former's own tokenizer, which InstructBLIP saves in a subfolder; None without one."""
    from transformers import AutoTokenizer

    if Path(name).is_dir() and not (Path(name) / QFORMER_TOKENIZER).is_dir():
        return None
    try:
        return AutoTokenizer.from_pretrained(name, subfolder=QFORMER_TOKENIZER)
    except (OSError, ValueError):
        return None


def _check_settings(config: CromeModelConfig, settings: dict[str, Any]) -> None:
    known = inspect.signature(CromeModelConfig).parameters
    wrong = [
        f"{name}: {getattr(config, name)} -> {value}"
        for name, value in settings.items()
        if name in known and getattr(config, name) != value
    ]
    if wrong:
        raise ValueError(f"the checkpoint is a CROME model of other settings: {'; '.join(wrong)}")
