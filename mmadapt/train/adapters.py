"""Adapter weights between disk and a live model, all of them or an error."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from mmadapt.train.crome.weights import is_crome, load_trained, save_trained
from mmadapt.train.errors import RunError


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Put the weights of an adapter folder into the active adapter, keeping its dtypes.

    Raises:
        RunError: a weight is missing in the folder or in the model. PEFT would go on with the
            untrained weight and a warning.
    """
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    if is_crome(model):
        load_trained(model, folder)
        return
    saved = load_peft_weights(str(folder), device="cpu")
    live = get_peft_model_state_dict(model)
    missing, unknown = sorted(live.keys() - saved.keys()), sorted(saved.keys() - live.keys())
    if missing or unknown:
        raise RunError(
            f"adapter {folder} does not fit the model: {len(missing)} weights missing "
            f"(first: {missing[:1]}), {len(unknown)} unknown (first: {unknown[:1]})"
        )
    set_peft_model_state_dict(model, saved)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter folder so that it is there completely or not at all."""
    if is_crome(model):
        save_trained(model, folder)
        return
    scratch = folder.with_name(folder.name + ".partial")
    if scratch.exists():
        shutil.rmtree(scratch)
    model.save_pretrained(str(scratch))
    if folder.exists():
        shutil.rmtree(folder)
    scratch.replace(folder)
