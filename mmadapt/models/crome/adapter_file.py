"""CROME's adapter as a file of its own: what stage (c) trains, and what is swapped per task."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmadapt.models.crome.modeling import CromeForConditionalGeneration

WEIGHTS = "crome_adapter.safetensors"
SETTINGS = "crome_adapter.json"
_MODALITIES = ("visual", "text")
_STACKED = ("gate", "down", "gate_bias", "down_bias", "norm_weight")


def crome_adapter_state(model: CromeForConditionalGeneration) -> dict[str, Tensor]:
    """The adapter's matrices by name: five with the paper's settings.

    `visual.gate`, `visual.down`, `text.gate`, `text.down` ``[rank, dim]`` (W_d and W_g of each
    modality) and `up` ``[dim, rank]`` (W_u); biases and norms where there are any. The module holds
    those of the two modalities stacked.
    """
    state = {}
    for name, value in _adapter(model).state_dict().items():
        if not _is_stacked(model, name):
            state[name] = value
            continue
        owners = _MODALITIES if len(value) == 2 else ("shared",)
        state |= {f"{owner}.{name}": value[k].clone() for k, owner in enumerate(owners)}
    return state


def load_crome_adapter_state(
    model: CromeForConditionalGeneration, state: dict[str, Tensor]
) -> None:
    """Fill the adapter from `crome_adapter_state` of a model with the same settings.

    Raises:
        ValueError: names or shapes do not fit; nothing is loaded then.
    """
    adapter = _adapter(model)
    expected = {name: tuple(value.shape) for name, value in crome_adapter_state(model).items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if given != expected:
        wrong = sorted(set(given.items()) ^ set(expected.items()))
        raise ValueError(
            f"the adapter does not fit the model, nothing was loaded: {wrong[:4]} differ between "
            f"{len(given)} given and {len(expected)} expected tensors"
        )
    stacked = {}
    for name in adapter.state_dict():
        if _is_stacked(model, name):
            owners = ("shared",) if f"shared.{name}" in state else _MODALITIES
            stacked[name] = torch.stack([state[f"{owner}.{name}"] for owner in owners])
        else:
            stacked[name] = state[name]
    adapter.load_state_dict(stacked)


def save_crome_adapter(
    model: CromeForConditionalGeneration, folder: str | os.PathLike[str]
) -> Path:
    """Write the adapter alone to `folder` (made if needed); returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous().cpu() for name, value in crome_adapter_state(model).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    settings = {
        name: value
        for name, value in model.config.to_dict().items()
        if name.startswith("adapter_") or name in ("reading", "order")
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder


def load_crome_adapter(
    model: CromeForConditionalGeneration, folder: str | os.PathLike[str]
) -> None:
    """Fill the adapter from `save_crome_adapter`'s folder.

    Raises:
        ValueError: it was saved with other settings, or does not fit.
        OSError: nothing is there.
    """
    folder = Path(folder)
    saved = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    own = model.config.to_dict()
    wrong = [f"{name}: {own.get(name)} -> {v}" for name, v in saved.items() if own.get(name) != v]
    if wrong:
        raise ValueError(f"{folder} holds an adapter of other settings: {'; '.join(wrong)}")
    load_crome_adapter_state(model, load_file(folder / WEIGHTS))


def _adapter(model: CromeForConditionalGeneration):
    if model.adapter is None:
        raise ValueError("the model has no adapter: config.adapter_branches is empty")
    return model.adapter


def _is_stacked(model: CromeForConditionalGeneration, name: str) -> bool:
    return name in _STACKED or (name in ("up", "up_bias") and not model.config.adapter_share_up)
