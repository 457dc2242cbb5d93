"""Parameter names of the authors' released Aurora checkpoints, both ways."""

import re

import torch
from torch import Tensor, nn

from mmadapt.peft.aurora.layer import FACTORS, MODE, AuroraLayer
from mmadapt.peft.aurora.query_transform import (
    SCALE_CROSS,
    SCALE_SELF,
    SHIFT_CROSS,
    SHIFT_SELF,
)

_PEFT = "base_model.model."
_STACKS = {
    "visual_encoder.blocks": "vision_model.encoder.layers",
    "text_encoder.encoder.layer": "text_encoder.encoder.layer",
    "text_decoder.bert.encoder.layer": "text_decoder.bert.encoder.layer",
}
_SHARED = {"CP_U.weight": "factor_in_", "CP_V.weight": "factor_out_", "CP_C": "core"}
# The released model keeps the modes of several weights in one matrix, a column each.
_COLUMNS = {
    "attn.CP_attention": {"self_attn.qkv": (0, 3), "self_attn.projection": (3, 4)},
    "mlp.mlp_CP": {"mlp.fc1": (0, 4), "mlp.fc2": (4, 8)},
} | {
    f"{attention}.self.{head[0]}_CP": {f"{attention}.self.{head}": (0, 1)}
    for attention in ("attention", "crossattention")
    for head in ("query", "key", "value")
}
_VECTORS = {
    "CP_scaleself": f"output.{SCALE_SELF}",
    "CP_shiftself": f"output.{SHIFT_SELF}",
    "CP_scalecross": f"output.{SCALE_CROSS}",
    "CP_shiftcross": f"output.{SHIFT_CROSS}",
}
_HEADS = ("vision_proj", "text_proj", "itm_head")


def aurora_from_released(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapter state dict for `peft.set_peft_model_state_dict(model, ...)` from a released one.

    Names of frozen weights and of momentum copies (`_m`) are left out, and so are heads that the
    adapter does not train (`modules_to_save`).

    Args:
        state_dict: the checkpoint's `model` entry. A leading `module.` is dropped.
        model: the `PeftModel`: BLIP with an Aurora adapter with the dense core.

    Raises:
        ValueError: a parameter of the released adapter that the model has no place for.
    """
    base = model.get_base_model()
    places = {name for name, module in base.named_modules() if isinstance(module, AuroraLayer)}
    trained = set(getattr(model.active_peft_config, "modules_to_save", None) or ())
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("module.")
        head = name.partition(".")[0]
        if name in _SHARED:
            width = {"CP_U.weight": tensor.shape[-1], "CP_V.weight": tensor.shape[0]}.get(name, "")
            converted[f"base_model.{FACTORS}.{_SHARED[name]}{width}"] = tensor
        elif head in _HEADS and head in trained:
            converted[_PEFT + name] = tensor
        elif "CP" in name and not name.split(".")[0].endswith("_m"):
            for path, value in _of_layer(name, tensor).items():
                if path.rpartition(".")[0] not in places:
                    raise ValueError(f"{name!r} has no place in the given {type(base).__name__}")
                converted[_PEFT + path] = value
    return converted


def aurora_to_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released names for an adapter state dict from `peft.get_peft_model_state_dict`.

    Raises:
        ValueError: a parameter that the released model does not have.
    """
    released: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state_dict.items():
        name = key.removeprefix(_PEFT)
        if key.startswith(f"base_model.{FACTORS}."):
            shared = re.sub(r"\d+$", "", key.rpartition(".")[2])
            found = [theirs for theirs, ours in _SHARED.items() if ours == shared]
            if len(found) != 1 or found[0] in released or (shared == "core" and tensor.ndim != 3):
                raise ValueError(f"{key!r} has no counterpart in a released Aurora checkpoint")
            released[found[0]] = tensor
        elif name.partition(".")[0] in _HEADS:
            released[name] = tensor
        else:
            theirs, column = _released_place(key, name)
            if column is None:
                released[theirs] = tensor
            else:
                parts.setdefault(theirs, {})[column] = tensor
    for name, columns in parts.items():
        released[name] = torch.cat([columns[c] for c in sorted(columns)]).t().contiguous()
    return released


def _of_layer(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Our parameters for one released parameter of a layer, by path."""
    stack = next((s for s in _STACKS if name.startswith(s + ".")), None)
    index, _, rest = name.removeprefix(f"{stack}.").partition(".")
    where = f"{_STACKS.get(stack)}.{index}"
    if rest in _VECTORS:
        return {f"{where}.{_VECTORS[rest]}": tensor}
    if stack is None or rest not in _COLUMNS:
        raise ValueError(f"{name!r} is no parameter of a released Aurora checkpoint")
    return {
        f"{where}.{path}.{MODE}": tensor[:, first:last].t().contiguous()
        for path, (first, last) in _COLUMNS[rest].items()
    }


def _released_place(key: str, name: str) -> tuple[str, int | None]:
    """Released name of one of our parameters, and its first column if it is a part of it."""
    for theirs, ours in _STACKS.items():
        match = re.fullmatch(rf"{re.escape(ours)}\.(\d+)\.(.+)", name)
        if match is None:
            continue
        where, rest = f"{theirs}.{match[1]}", match[2]
        for vector, path in _VECTORS.items():
            if rest == path:
                return f"{where}.{vector}", None
        for matrix, paths in _COLUMNS.items():
            path = rest.removesuffix(f".{MODE}")
            if path in paths:
                return f"{where}.{matrix}", paths[path][0]
    raise ValueError(f"{key!r} has no counterpart in a released Aurora checkpoint")
