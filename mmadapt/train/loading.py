"""Recipe files to checked `Recipe` objects: YAML, `key=value` overrides, readable errors."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from mmadapt.train.arguments import check_arguments
from mmadapt.train.config import STAGES, Recipe
from mmadapt.train.errors import RecipeError


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply `key=value` overrides, resolve `${...}`, check everything.

    Overrides use dotted paths, with `[i]` for list items: `stages.align.lr.default=1e-3`,
    `stages.instruct.data[0].limit=100`, `stages.align=null`.

    Raises:
        RecipeError: a missing or broken file, an override without `=`, an unknown or ill-typed
            key. The message names every key with its dotted path.
    """
    path = Path(path)
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise RecipeError(f"recipe {path}: no such file") from None
    except Exception as error:  # yaml's and omegaconf's parser errors share no base class
        raise RecipeError(f"recipe {path}: not valid YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise RecipeError(f"recipe {path}: expected a mapping at the top, got a list")
    for override in overrides:
        _apply(config, override)
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"recipe {path}: {str(error).splitlines()[0]}") from error
    return check_recipe(values, source=str(path))


def check_recipe(values: Any, *, source: str = "recipe") -> Recipe:
    """Validate plain data against the schema; `source` names it in the error.

    Data with a `task` is a comparison of methods, an `AuroraRecipe`.
    """
    if isinstance(values, dict) and "task" in values:
        return _check_comparison(values, source)
    problems: list[str] = []
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = _explain_all(error, Recipe) + _argument_problems(values)
        raise RecipeError(_format(source, problems)) from None
    for name, stage in recipe.stages.items():
        stage.train, found = check_arguments(stage.train)
        problems += [f"stages.{name}.train.{field}: {text}" for field, text in found.items()]
    if problems:
        raise RecipeError(_format(source, problems))
    return recipe


def _check_comparison(values: Any, source: str) -> Any:
    from mmadapt.train.aurora.config import AuroraRecipe

    try:
        recipe = AuroraRecipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_format(source, _explain_all(error, AuroraRecipe))) from None
    recipe.train, found = check_arguments(recipe.train)
    if found:
        raise RecipeError(
            _format(source, [f"train.{name}: {text}" for name, text in found.items()])
        )
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; `load_recipe` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))


def _apply(config: DictConfig, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r}: expected key=value")
    try:
        parsed = OmegaConf.from_dotlist([f"value={text}"])
        value = OmegaConf.to_container(parsed, resolve=False)["value"]
        OmegaConf.update(config, key, value, merge=False)
    except (OmegaConfBaseException, AssertionError, TypeError, ValueError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"override {override!r}: {reason}") from error


def _argument_problems(values: Any) -> list[str]:
    """Problems of the `train:` blocks of data that failed the schema, so that all come at once."""
    stages = values.get("stages") if isinstance(values, dict) else None
    problems = []
    for name, stage in (stages if isinstance(stages, dict) else {}).items():
        block = stage.get("train") if isinstance(stage, dict) else None
        if isinstance(block, dict):
            _, found = check_arguments(block)
            problems += [f"stages.{name}.train.{field}: {text}" for field, text in found.items()]
    return problems


def _format(source: str, problems: list[str]) -> str:
    return f"{source}: " + ("\n  " if len(problems) > 1 else "") + "\n  ".join(problems)


def _explain_all(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """One line per problem; what stands below a misspelt stage is not reported as well."""
    errors = error.errors()
    misspelt = [e["loc"][:-1] for e in errors if e["loc"][-1:] == ("[key]",)]
    return [_unknown_stage(loc) for loc in misspelt] + [
        _explain(e, schema)
        for e in errors
        if not any(e["loc"][: len(loc)] == loc for loc in misspelt)
    ]


def _unknown_stage(loc: Sequence[Any]) -> str:
    close = difflib.get_close_matches(str(loc[-1]), STAGES, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known stages: {', '.join(STAGES)}"
    return f"{'.'.join(map(str, loc))}: unknown stage; {hint}"


def _explain(error: Any, schema: type[BaseModel]) -> str:
    loc = list(error["loc"])
    if loc[:1] == ["method"]:
        del loc[1:2]  # which of the methods it is: known from method.type
    path = ".".join(str(part) for part in loc) or "recipe"
    if error["type"] == "extra_forbidden":
        known = _keys_at(schema, error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("missing", "value_error"):
        return f"{path}: {message}"
    return f"{path}: {message} (got {error['input']!r})"


def _keys_at(annotation: Any, loc: Sequence[Any]) -> list[str]:
    """Field names of the model that a pydantic error location points into."""
    models = _models(annotation)
    for part in loc:
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        # a mapping key or list index: stay, `_models` has already looked through the container
        models = [found for field in fields for found in _models(field)] if fields else models
    return [name for model in models for name in model.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in typing.get_args(annotation) for model in _models(arg)]
