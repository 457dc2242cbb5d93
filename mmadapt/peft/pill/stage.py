"""Switch a PILL adapter between its two training stages (docs/pill.md)."""

import copy

from torch import nn

from mmadapt.peft.pill.config import Stage, check_choice
from mmadapt.peft.pill.layer import ALIGN_TRAINABLE, PillLayer


def pill_layers(model: nn.Module) -> list[PillLayer]:
    """The PILL wrappers of a model, in order; ValueError if there are none."""
    layers = [module for module in model.modules() if isinstance(module, PillLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PILL adapter")
    return layers


def set_stage(model: nn.Module, stage: Stage, adapter_name: str | None = None) -> None:
    """Set what the forward pass does and which parameters train.

    `"align"`: no gate, the last layer's experts swapped while training; the vision experts and the
    projector train. `"instruct"`: gate and routing by modality; every part trains. The stage is
    saved with the adapter's configuration.

    Args:
        model: a `PeftModel`, or a model with an injected PILL adapter.
        stage: `"align"` or `"instruct"`.
        adapter_name: the adapter to switch; the active one by default. One that is not active is
            switched but stays frozen.

    Raises:
        ValueError: an unknown stage or adapter, or a stage that would train nothing.
    """
    check_choice("stage", stage)
    layers = pill_layers(model)
    name = adapter_name or layers[0].active_adapters[0]
    owners = [layer for layer in layers if name in layer.mmadapt_pill_config]
    if not owners:
        known = sorted({n for layer in layers for n in layer.mmadapt_pill_config})
        raise ValueError(f"adapter_name={name!r} is not one of the model's adapters {known}")
    if stage == "align" and not any(_trains_in_align(layer, name) for layer in owners):
        raise ValueError(
            f"stage='align' trains vision experts and projector; adapter {name!r} has neither"
        )
    # A copy, because the caller's object may configure other models too.
    config = copy.copy(owners[0].mmadapt_pill_config[name])
    config.stage = stage
    for module in model.modules():
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict) and name in configs:
            configs[name] = config
    for layer in owners:
        layer.mmadapt_pill_config[name] = config
        if name in layer.active_adapters:
            layer.set_requires_grad(name, True)


def _trains_in_align(layer: PillLayer, adapter_name: str) -> bool:
    parts = ALIGN_TRAINABLE & set(layer.adapter_layer_names)
    return any(adapter_name in getattr(layer, part) for part in parts)
