"""Find the parts of a multimodal model by structure, not by name suffix."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

PROJECTOR_NAMES = ("language_projection", "multi_modal_projector")


@dataclass(frozen=True)
class DecoderStack:
    """The decoder layers of a model's language model.

    Attributes:
        path: dotted path of the `nn.ModuleList` that holds the layers.
        num_layers: how many there are.
        hidden_size: width of the residual stream.
    """

    path: str
    num_layers: int
    hidden_size: int


def is_multimodal(model: nn.Module) -> bool:
    """Whether the model's configuration holds a text configuration inside a larger one."""
    return _text_config(model) is not getattr(model, "config", None)


def find_language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Dotted path and module of the language model; the model itself (`""`) if it is unimodal.

    Raises:
        ValueError: the model has a text configuration but no submodule built from it.
    """
    if not is_multimodal(model):
        return "", model
    text_config = _text_config(model)
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if name and type(config) is type(text_config):
            return name, module
    raise ValueError(
        f"no language model found in {type(model).__name__}: looked for a submodule whose config "
        f"is a {type(text_config).__name__}"
    )


def find_decoder_stack(model: nn.Module) -> DecoderStack:
    """The one list of decoder layers, each with a `self_attn` and an `mlp`, of the language model.

    Raises:
        ValueError: there is none, or more than one; the message says what was found.
    """
    prefix, language_model = find_language_model(model)
    lists = {
        name: module
        for name, module in language_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    stacks = {n: m for n, m in lists.items() if all(map(_is_decoder_layer, m))}
    if len(stacks) != 1:
        found = {name: sorted(dict(m[0].named_children())) for name, m in lists.items()}
        raise ValueError(
            f"{type(language_model).__name__} is not supported: looked for exactly one "
            "nn.ModuleList of decoder layers with the children `self_attn` and `mlp`, found "
            f"{len(stacks)} ({sorted(stacks)}); the lists it has hold {found}"
        )
    name, layers = next(iter(stacks.items()))
    hidden_size = getattr(getattr(language_model, "config", None), "hidden_size", None)
    if not isinstance(hidden_size, int):
        raise ValueError(f"{type(language_model).__name__} has no integer `config.hidden_size`")
    return DecoderStack(_join(prefix, name), len(layers), hidden_size)


def find_projector(model: nn.Module) -> str | None:
    """Dotted path of the module that maps visual features to the language model, if there is one.

    Raises:
        ValueError: there are several.
    """
    paths = [n for n, _ in _outermost(model) if n.rpartition(".")[2] in PROJECTOR_NAMES]
    if len(paths) > 1:
        raise ValueError(f"{type(model).__name__} has several projectors: {paths}")
    return paths[0] if paths else None


def find_encoders(model: nn.Module) -> list[nn.Module]:
    """Vision towers, Q-Formers and the like: what is neither language model nor projector."""
    projector = find_projector(model)
    kept = [find_language_model(model)[1]]
    kept += [model.get_submodule(projector)] if projector else []
    return [] if kept[0] is model else _branches_without(model, {id(module) for module in kept})


def _branches_without(module: nn.Module, kept: set[int]) -> list[nn.Module]:
    branches = []
    for child in module.children():
        if id(child) in kept:
            continue
        if any(id(inner) in kept for inner in child.modules()):
            branches += _branches_without(child, kept)
        else:
            branches.append(child)
    return branches


def visual_token_ids(model: nn.Module) -> tuple[int, ...]:
    """Ids of the tokens that stand for images or videos, from the model's configuration."""
    config = getattr(model, "config", None)
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = (getattr(config, name, None) for name in names)
    return tuple(sorted({token for token in ids if isinstance(token, int)}))


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules without those below a projector, whose children may repeat its name."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if name.rpartition(".")[2] in PROJECTOR_NAMES:
            inside += (name + ".",)
        yield name, module


def _is_decoder_layer(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return "self_attn" in children and "mlp" in children


def _text_config(model: nn.Module):
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return config if get_text_config is None else get_text_config(decoder=True)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
