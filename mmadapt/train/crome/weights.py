"""What a stage of CROME trained, between disk and a live model, all of it or an error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from mmadapt.models import (
    CromeForConditionalGeneration,
    crome_components,
    load_crome_adapter,
    save_crome_adapter,
)
from mmadapt.train.errors import RunError

PARTS = "trained.safetensors"


def is_crome(model: nn.Module) -> bool:
    return isinstance(model, CromeForConditionalGeneration)


def save_trained(model: CromeForConditionalGeneration, folder: Path) -> None:
    """Write the tensors that require gradients now; the adapter goes into a file of its own.

    A task stage leaves five tensors behind. The folder is there completely or not at all.
    """
    scratch = folder.with_name(folder.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    write_trained(model, scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)


def write_trained(model: CromeForConditionalGeneration, folder: str | Path) -> None:
    """The files of `save_trained` into a folder that is there already."""
    parts = crome_components(model)
    if any(p.requires_grad for _, p in parts.get("adapter", ())):
        save_crome_adapter(model, folder)
    others = {
        name: parameter.detach().cpu().contiguous()
        for component, members in parts.items()
        for name, parameter in members
        if component != "adapter" and parameter.requires_grad
    }
    if others:
        save_file(others, Path(folder) / PARTS, metadata={"format": "pt"})


def load_trained(model: CromeForConditionalGeneration, folder: str | Path) -> None:
    """Fill the model from `save_trained`'s folder; tensors that are not in it keep their values.

    Raises:
        RunError: a tensor has no place in the model or another shape, or nothing is there.
    """
    folder = Path(folder)
    found = [name for name in (PARTS, "crome_adapter.safetensors") if (folder / name).exists()]
    if not found:
        raise RunError(f"{folder}: holds no weights of a CROME stage")
    if PARTS in found:
        _load_parts(model, folder / PARTS)
    if len(found) == 2 or PARTS not in found:
        try:
            load_crome_adapter(model, folder)
        except ValueError as error:
            raise RunError(str(error)) from error


def _load_parts(model: nn.Module, file: Path) -> None:
    saved: dict[str, Any] = load_file(file)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    wrong = sorted(name for name, value in saved.items() if shapes.get(name) != value.shape)
    if wrong:
        raise RunError(f"{file} does not fit the model: {len(wrong)} tensors, first {wrong[0]}")
    model.load_state_dict(saved, strict=False)
