"""The recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

import mmadapt
from mmadapt.train.errors import RecipeError


def recipe_folder() -> Path:
    """`mmadapt/recipes` of an installed wheel, `recipes/` of a source checkout."""
    package = Path(mmadapt.__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if any(folder.glob("*.yaml")):
            return folder
    raise RecipeError(f"the package at {package} comes without recipes; reinstall it")


def shipped() -> dict[str, str]:
    """name -> what it does, from the first comment line of each shipped recipe."""
    return {path.stem: _headline(path) for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A file if there is one of that name, else a shipped recipe (with or without `.yaml`).

    Raises:
        RecipeError: neither; the message lists the shipped ones.
    """
    if Path(name).is_file():
        return Path(name)
    path = recipe_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if Path(name).name == name and path.is_file():
        return path
    raise RecipeError(
        f"recipe {name!r}: no such file, and the package ships only {', '.join(shipped())}"
    )


def _headline(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[:1]
    return first[0].lstrip("# ").strip() if first and first[0].startswith("#") else ""
