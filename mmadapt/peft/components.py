"""Group a model's parameters by what they belong to."""

from torch import nn
from torch.nn import Parameter

from mmadapt.peft.aurora.layer import FACTORS, MODE
from mmadapt.peft.aurora.query_transform import QUERY_TRANSFORM
from mmadapt.peft.pill.layer import ATTENTION, GATE, PROJECTOR, SHARED, TEXT, VISION
from mmadapt.peft.structure import PROJECTOR_NAMES, find_language_model

_ADAPTER_PARTS = {
    PROJECTOR: "projector",
    VISION: "vision_expert",
    TEXT: "text_expert",
    SHARED: "shared_expert",
    ATTENTION: "attention_adapter",
    GATE: "gate",
    FACTORS: "shared_factors",
    MODE: "modes",
    **dict.fromkeys(QUERY_TRANSFORM, "query_transformation"),
}
_ORDER = (
    *dict.fromkeys(_ADAPTER_PARTS.values()),
    "matching_heads",
    "vision_tower",
    "qformer",
    "language_model",
    "lm_head",
)
_QFORMER = ("qformer", "query_tokens")
_MATCHING_HEADS = ("vision_proj", "text_proj", "itm_head")


def components(model: nn.Module) -> dict[str, list[tuple[str, Parameter]]]:
    """Parameters of a model by component, with their names in `model.named_parameters()`.

    Keys, in this order and only where not empty: `projector` (the model's own and the adapters'),
    `vision_expert`, `text_expert`, `shared_expert`, `attention_adapter`, `gate` of PILL,
    `shared_factors`, `modes`, `query_transformation` of Aurora, then what adapters leave alone
    unless told otherwise: `matching_heads` (BLIP's), `vision_tower`, `qformer`, `language_model`,
    `lm_head`. Every parameter is in exactly one of them; `requires_grad` tells what trains. Tied
    weights are listed once.

    Args:
        model: a Hugging Face model, with or without adapters, or a `PeftModel`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _, language_model = find_language_model(base)
    text = {id(parameter) for parameter in language_model.parameters()}
    groups: dict[str, list[tuple[str, Parameter]]] = {name: [] for name in _ORDER}
    for name, parameter in model.named_parameters():
        groups[_component(name, id(parameter) in text)].append((name, parameter))
    return {name: members for name, members in groups.items() if members}


def _component(name: str, in_language_model: bool) -> str:
    parts = name.split(".")
    for part in parts:
        if part in _ADAPTER_PARTS:
            return _ADAPTER_PARTS[part]
    if any(part in PROJECTOR_NAMES for part in parts):
        return "projector"
    if any(part in _MATCHING_HEADS for part in parts):
        return "matching_heads"
    if "lm_head" in parts:
        return "lm_head"
    if in_language_model:
        return "language_model"
    return "qformer" if any(part in _QFORMER for part in parts) else "vision_tower"
