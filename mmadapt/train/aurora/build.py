"""From a recipe to live objects: data on disk, model, tokenizer, data sets, collators, losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmadapt.train.aurora.config import AuroraRecipe, BlipSource
from mmadapt.train.errors import RecipeError
from mmadapt.train.made import already_made, making
from mmadapt.train.ui import Console

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Backbone:
    """A BLIP with its tokenizer and the ids that BLIP's objectives need."""

    model: Any
    tokenizer: Any
    enc_token_id: int
    dec_token_id: int

    @property
    def sep_token_id(self) -> int:
        return self.tokenizer.sep_token_id


def make_data(recipe: AuroraRecipe) -> None:
    """Write the data set the recipe makes itself; a set that is there already is kept."""
    if recipe.data.make is None:
        return
    from mmadapt.data import write_digit_scenes

    try:
        write_digit_scenes(recipe.data.root, **recipe.data.make_args)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"data.make_args: {error}") from error


def make_backbone(recipe: AuroraRecipe, console: Console) -> None:
    """Pretrain and save the model the recipe makes itself; a finished one is reused.

    Raises:
        RunError: the folder holds a model of other settings, or something else.
    """
    model = recipe.model
    if model.make is None:
        return
    folder = Path(model.name)
    wanted = {"make": model.make, "task": recipe.task, "make_args": model.make_args}
    if already_made(folder, wanted):
        return
    from mmadapt.train.digits import make_digits_blip

    with making(folder, wanted) as scratch, console.progress("frozen parts") as progress:
        try:
            make_digits_blip(scratch, task=recipe.task, progress=progress, **model.make_args)
        except TypeError as error:
            raise RecipeError(f"model.make_args: {error}") from error


def load_backbone(recipe: AuroraRecipe) -> Backbone:
    """A fresh copy of the model, in eval mode.

    Raises:
        RecipeError: nothing usable under that name.
    """
    import transformers
    from transformers import AutoTokenizer

    kinds = {"retrieval": "BlipForImageTextRetrieval", "vqa": "BlipForQuestionAnswering"}
    name = recipe.model.name
    try:
        model = getattr(transformers, kinds[recipe.task]).from_pretrained(
            name, dtype=_DTYPES[recipe.model.dtype]
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model.name: cannot load {name!r}: {error}") from error
    config = model.config.text_config
    return Backbone(
        model.eval(),
        tokenizer,
        enc_token_id=_token(tokenizer, "[ENC]", config.vocab_size - 1),
        dec_token_id=_token(tokenizer, "[DEC]", config.bos_token_id),
    )


def _token(tokenizer: Any, name: str, otherwise: int) -> int:
    """Id of a special token. Hugging Face's BLIP tokenizers lack them: BLIP added [DEC], then
    [ENC], behind BERT's vocabulary."""
    found = tokenizer.get_vocab().get(name)
    return otherwise if found is None else found


def load_source(source: BlipSource, where: str) -> Any:
    """The data set of one source; `where` is its path in the recipe, for errors."""
    from mmadapt.data import load

    try:
        return load(source.model_dump(exclude_none=True))
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def visual_loader(recipe: AuroraRecipe, backbone: Backbone, *, train: bool) -> Any:
    from mmadapt.data.blip_collate import VisualLoader
    from mmadapt.data.image_transforms import EvalTransform, TrainTransform
    from mmadapt.data.rand_augment import RandAugment
    from mmadapt.data.video import VideoFrames

    inputs = recipe.inputs
    size = inputs.image_size or backbone.model.config.vision_config.image_size
    transform: Any = EvalTransform(size)
    if train and (inputs.crop or inputs.flip or inputs.augment):
        transform = TrainTransform(
            size,
            scale=inputs.crop,
            flip=inputs.flip,
            augment=RandAugment() if inputs.augment else None,
        )
    sampling = inputs.train_frames if train else inputs.test_frames
    count = inputs.frames if train else inputs.frames_at_test or inputs.frames
    frames = VideoFrames(count, size=size, sampling=sampling)
    return VisualLoader(transform, frames, skip_broken=inputs.skip_broken)


def collator(recipe: AuroraRecipe, backbone: Backbone, *, train: bool) -> Any:
    from mmadapt.data.blip_collate import AnswerCollator, RetrievalCollator

    visual = visual_loader(recipe, backbone, train=train)
    if recipe.task == "retrieval":
        return RetrievalCollator(backbone.tokenizer, visual, max_length=recipe.inputs.max_length)
    return AnswerCollator(
        backbone.tokenizer,
        visual,
        enc_token_id=backbone.enc_token_id,
        dec_token_id=backbone.dec_token_id,
        max_length=recipe.inputs.max_length,
    )


def objective(recipe: AuroraRecipe, backbone: Backbone, model: nn.Module) -> nn.Module:
    """The task's loss around `model`, whose fresh parts depend on the seed alone."""
    from transformers import set_seed

    from mmadapt.models.aurora import RetrievalObjective, VQAObjective

    set_seed(recipe.seed)
    settings = recipe.objective.of_task(recipe.task)
    if recipe.task == "retrieval":
        return RetrievalObjective(model, enc_token_id=backbone.enc_token_id, **settings)
    return VQAObjective(model, **settings)
