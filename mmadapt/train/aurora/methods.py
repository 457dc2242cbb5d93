"""From a recipe's method to a model that trains what the method trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmadapt.train.aurora.config import AuroraMethod, AuroraRecipe, FullMethod, LoraMethod
from mmadapt.train.errors import RecipeError

_HEADS = ("vision_proj", "itm_head")


def add_method(blip: Any, recipe: AuroraRecipe, name: str) -> nn.Module:
    """The model with method `name`; fresh parameters depend on the recipe's seed alone.

    Raises:
        RecipeError: the method does not fit the model.
    """
    from transformers import set_seed

    set_seed(recipe.seed)
    method = recipe.methods[name]
    try:
        if isinstance(method, FullMethod):
            return blip.requires_grad_(True)
        if isinstance(method, AuroraMethod):
            return _with_aurora(blip, recipe, method)
        return _with_lora(blip, recipe, name, method)
    except ValueError as error:
        raise RecipeError(f"methods.{name}: {error}") from error


def trainable_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _heads(recipe: AuroraRecipe, method: Any) -> list[str] | None:
    if recipe.task == "vqa":
        return None
    heads = list(_HEADS) if method.heads else []
    return [*heads, *(["text_proj"] if method.text_proj else [])] or None


def _with_aurora(blip: Any, recipe: AuroraRecipe, method: AuroraMethod) -> nn.Module:
    from peft import get_peft_model

    from mmadapt.peft import AuroraConfig

    settings = method.model_dump(exclude={"type", "lr", "heads", "text_proj"})
    config = AuroraConfig(modules_to_save=_heads(recipe, method), **settings)
    return get_peft_model(blip, config)


def _with_lora(blip: Any, recipe: AuroraRecipe, name: str, method: LoraMethod) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    ranks = lora_ranks(blip, recipe, name)
    if not ranks:
        raise ValueError("match: even rank 1 on one weight is more than the other method trains")
    rank = min(ranks.values())
    alpha = method.alpha if method.alpha is not None else rank
    higher = {path: r for path, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=method.dropout,
        target_modules=list(ranks),
        rank_pattern=higher,
        # the same scale everywhere, whatever the rank
        alpha_pattern={path: alpha * r / rank for path, r in higher.items()},
        modules_to_save=_heads(recipe, method),
    )
    return get_peft_model(blip, config)


def lora_ranks(blip: Any, recipe: AuroraRecipe, name: str) -> dict[str, int]:
    """Path of each adapted linear layer -> its LoRA rank.

    With `match`, layers are raised by one rank after another, in the order of the model and all
    of one rank before any of the next, while the total stays within what the Aurora method
    trains besides the heads.
    """
    method = recipe.methods[name]
    layers = _adapted_linears(blip)
    if method.rank is not None:
        return dict.fromkeys(layers, method.rank)
    budget = aurora_parameters(blip, recipe, method.match)
    ranks: dict[str, int] = {}
    while True:
        for path, (fan_in, fan_out) in layers.items():
            if fan_in + fan_out > budget:
                return ranks
            budget -= fan_in + fan_out
            ranks[path] = ranks.get(path, 0) + 1


def aurora_parameters(blip: Any, recipe: AuroraRecipe, name: str) -> int:
    """Trainable parameters of an Aurora method without the heads, counted on the meta device."""
    import torch

    method = recipe.methods[name].model_copy(update={"heads": False, "text_proj": False})
    with torch.device("meta"):
        fresh = type(blip)(blip.config)
    return trainable_parameters(_with_aurora(fresh, recipe, method))


def _adapted_linears(blip: Any) -> dict[str, tuple[int, int]]:
    """Path -> (in, out) of the weights that Aurora adapts by default."""
    found = {}
    for path, module in blip.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parts = path.split(".")
        vision = "vision_model" in parts and "layers" in parts
        text = "self" in parts and parts[-1] in ("query", "key", "value")
        if vision or text:
            found[path] = (module.in_features, module.out_features)
    return found
