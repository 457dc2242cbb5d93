"""What a stage trains, component by component."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from mmadapt.train.config import Rates
from mmadapt.train.errors import RecipeError

Components = dict[str, list[tuple[str, nn.Parameter]]]
_NOT_RATES = {"default", "schedule", "warmup_epochs", "start_lr", "warmup_steps"}
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class ComponentCount:
    """Parameters of one component and how many of them are trainable now."""

    component: str
    parameters: int
    trainable: int


def count(components: Components) -> list[ComponentCount]:
    return [
        ComponentCount(
            name,
            sum(p.numel() for _, p in tensors),
            sum(p.numel() for _, p in tensors if p.requires_grad),
        )
        for name, tensors in components.items()
    ]


def trainable(components: Components) -> Components:
    """The components with at least one trainable tensor, those tensors only."""
    chosen = {
        name: [(key, p) for key, p in tensors if p.requires_grad]
        for name, tensors in components.items()
    }
    return {name: tensors for name, tensors in chosen.items() if tensors}


def parameter_groups(
    components: Components, rates: Rates, *, weight_decay: float, stage: str
) -> list[dict]:
    """Optimizer groups: one rate per component, decay on tensors of two or more dimensions.

    Raises:
        RecipeError: the recipe gives a rate to a component that this stage does not train.
    """
    chosen = trainable(components)
    for name in Rates.model_fields.keys() - _NOT_RATES:
        if getattr(rates, name) is not None and name not in chosen:
            raise RecipeError(
                f"stages.{stage}.lr.{name}: this stage trains no {name}; it trains "
                f"{', '.join(chosen) or 'nothing'}"
            )
    groups = []
    for name, tensors in chosen.items():
        for decay in (True, False):
            params = [p for key, p in tensors if decays(key, p) == decay]
            if params:
                groups.append(
                    {
                        "params": params,
                        "lr": rates.of(name),
                        "weight_decay": weight_decay if decay else 0.0,
                        "component": name,
                    }
                )
    return groups


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases and norms, stacked ones included."""
    return parameter.ndim >= 2 and not name.endswith(("bias", "norm_weight"))


def judged_for_gradients(components: Components, *, stage: str) -> Components:
    """The trainable tensors among which every component must show a gradient.

    In `instruct` nothing reads the image rows after the last layer, so the vision expert there
    has a gradient of exactly zero (docs/pill.md) and is left out.
    """
    chosen = trainable(components)
    vision = chosen.get("vision_expert", [])
    if stage == "instruct" and vision:
        layers = {key: int(m.group(1)) for key, _ in vision if (m := _LAYER.search(key))}
        last = max(layers.values(), default=None)
        kept = [(key, p) for key, p in vision if layers.get(key) != last or last is None]
        chosen["vision_expert"] = kept
    return {name: tensors for name, tensors in chosen.items() if tensors}
