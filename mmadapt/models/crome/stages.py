"""What CROME's three stages train (docs/crome.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn
from torch.nn import Parameter

from mmadapt.models.crome.modeling import CromeForConditionalGeneration

Stage = Literal["align", "instruct", "task"]
STAGES: tuple[str, ...] = get_args(Stage)

_TRAINED: dict[str, tuple[str, ...]] = {
    "align": ("projector", "adapter"),
    "instruct": ("projector", "adapter", "qformer"),
    "task": ("adapter",),
}


def crome_components(
    model: CromeForConditionalGeneration,
) -> dict[str, list[tuple[str, Parameter]]]:
    """Parameters by component, with their names in `model.named_parameters()`; none is in two.

    Keys, in this order and only where not empty: `projector` (both projections), `adapter`,
    `qformer` (with its query embeddings), `vision_tower`, `language_model`, `lora` (what PEFT's
    LoRA has put into the language model).
    """
    groups: dict[str, list[tuple[str, Parameter]]] = {
        name: []
        for name in ("projector", "adapter", "qformer", "vision_tower", "language_model", "lora")
    }
    rooms = {
        "image_projection": "projector",
        "text_projection": "projector",
        "adapter": "adapter",
        "qformer": "qformer",
        "query_tokens": "qformer",
        "vision_model": "vision_tower",
        "language_model": "language_model",
    }
    for name, parameter in model.named_parameters():
        room = "lora" if ".lora_" in name else rooms[name.partition(".")[0]]
        groups[room].append((name, parameter))
    return {name: members for name, members in groups.items() if members}


def set_crome_stage(
    model: CromeForConditionalGeneration,
    stage: Stage,
    *,
    adapter_in_align: bool = True,
    task_trains: Sequence[str] = ("adapter",),
) -> None:
    """Let exactly the tensors of one stage train.

    `"align"` (a, pre-training): both projections and the adapter. `"instruct"` (b): these and the
    Q-Former with its queries. `"task"` (c): the adapter alone. ViT and language model never train.
    A part that no stream of the model uses stays frozen.

    Args:
        model: a CROME model.
        stage: one of the three.
        adapter_in_align: False trains the projections alone in `"align"`, as the paper's
            implementation paragraph reads; its description of the stages has the adapter too.
        task_trains: the components of `"task"`, to compare others with the adapter; `"lora"` needs
            a language model that has it.

    Raises:
        ValueError: another stage or component, or a stage that would train nothing.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is one of {STAGES}, got {stage!r}")
    chosen = set(task_trains if stage == "task" else _TRAINED[stage])
    choices = (*_TRAINED["instruct"], "lora")
    if not chosen <= set(choices):
        raise ValueError(f"task_trains holds any of {choices}, got {list(task_trains)}")
    if stage == "align" and not adapter_in_align:
        chosen.discard("adapter")
    idle = idle_parameters(model)
    groups = crome_components(model)
    live = {id(p) for name in chosen for _, p in groups.get(name, ()) if id(p) not in idle}
    if not live:
        raise ValueError(f"stage={stage!r} would train nothing: it trains {sorted(chosen)}")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in live)
    model.train(model.training)  # which parts rest in eval mode depends on what is frozen


def idle_parameters(model: CromeForConditionalGeneration) -> set[int]:
    """Ids of parameters that a stage would train but that no forward pass reads.

    They are the whole Q-Former when no stream needs queries, and its text parts when it gets no
    instruction.
    """
    config = model.config
    idle: list[nn.Module | Parameter] = []
    if not config.uses_queries:
        idle += [model.qformer, model.query_tokens]
    elif not config.instruction_aware:
        embeddings = model.qformer.embeddings
        idle += [embeddings.word_embeddings, embeddings.position_embeddings]
        for layer in model.qformer.encoder.layer:
            idle += [layer.intermediate, layer.output]
    found = set()
    for part in idle:
        parameters = [part] if isinstance(part, Parameter) else part.parameters()
        found |= {id(parameter) for parameter in parameters}
    return found
