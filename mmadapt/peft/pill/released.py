"""Parameter names of the authors' released PILL checkpoints, both ways."""

import re

from torch import Tensor, nn

from mmadapt.peft.pill.layer import ATTENTION, GATE, PROJECTOR, TEXT, VISION
from mmadapt.peft.structure import find_decoder_stack, find_projector

_WEIGHTS = {"down": "down_sampler", "gate": "down_sampler_gate", "up": "up_sampler"}
_ADAPTERS = {
    ATTENTION: ("self_attn", "adapter_attn"),
    VISION: ("mlp", "vis_adapter_ffn"),
    TEXT: ("mlp", "txt_adapter_ffn"),
}
_LAYER_NAMES = {
    f"{wrapper}.{part}.{ours}": f"{theirs}.{weight}.weight"
    for part, (wrapper, theirs) in _ADAPTERS.items()
    for ours, weight in _WEIGHTS.items()
} | {f"self_attn.{GATE}.gate": "attention.vis_adapter_gate.weight"}
_PROJECTOR_NAME = "vis_adapter_proj.weight"
_PEFT = "base_model.model."


def to_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released names for an adapter state dict from `peft.get_peft_model_state_dict`.

    Raises:
        ValueError: a parameter that the released model does not have, such as a projector bias.
    """
    return {_released_name(name): tensor for name, tensor in state_dict.items()}


def from_released(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapter state dict for `peft.set_peft_model_state_dict(model, ...)` from a released one.

    The adapter must be `PillConfig(rank=..., gate="token", projector="linear")`. Names without
    `adapter` (the frozen model) are left out; a leading `module.` is dropped. Adapter weights do
    not depend on the layout of the rotary embedding, so nothing is permuted.

    Args:
        state_dict: the checkpoint's `model` entry.
        model: the `PeftModel`, or the model below it.

    Raises:
        ValueError: a name with `adapter` that is none of PILL's, or a projector for a model that
            has none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers, projector = find_decoder_stack(base).path, find_projector(base)
    ours = {theirs: name for name, theirs in _LAYER_NAMES.items()}
    converted = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("module.")
        if "adapter" not in name:
            continue
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if match and match[2] in ours:
            converted[f"{_PEFT}{layers}.{match[1]}.{ours[match[2]]}"] = tensor
        elif name == _PROJECTOR_NAME and projector is not None:
            converted[f"{_PEFT}{projector}.{PROJECTOR}.weight"] = tensor
        else:
            raise ValueError(
                f"{name!r} is no parameter of a released PILL checkpoint, or has no place in the "
                f"given {type(base).__name__}"
            )
    return converted


def _released_name(name: str) -> str:
    if name.endswith(f".{PROJECTOR}.weight"):
        return _PROJECTOR_NAME
    match = re.search(r"\.(\d+)\.((?:self_attn|mlp)\..+)$", name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise ValueError(f"{name!r} has no counterpart in a released PILL checkpoint")
    return f"layers.{match[1]}.{_LAYER_NAMES[match[2]]}"
