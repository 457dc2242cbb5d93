"""Tell every adapted layer which tokens are visual.

`modality_ids` [B, S] (int32, 0 text, 1 visual) are found by a forward pre-hook on the whole model,
travel as a keyword argument down to `self_attn`, and go the last metre, to the value gate and the
`mlp` of the same layer, through a small object that those share. As a keyword argument they are
captured by activation checkpointing, so a recomputed layer sees the ids of its own forward pass.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmadapt.peft.structure import find_language_model, visual_token_ids
from mmadapt.peft.wrapping import remove_pre_hooks

KEYWORD = "modality_ids"
_ANCHOR = "mmadapt_anchor"


class Unknown:
    """Stands for the ids of an embedded prompt whose tokens nobody told. See `check_known`."""


UNKNOWN = Unknown()


def check_known(ids: Any) -> Tensor | None:
    """Return `ids`; raise ValueError if the prompt came as embeddings without its modality."""
    if isinstance(ids, Unknown):
        raise ValueError(
            "the language model got inputs_embeds and cannot tell which positions are visual: "
            "generate through the PeftModel (which sees input_ids), or pass modality_ids [B, S] "
            "(0 text, 1 image) to the language model"
        )
    return ids


class LayerSlot:
    """The modality ids of the forward pass that a decoder layer is in; one object per layer."""

    def __init__(self) -> None:
        self.modality_ids: Tensor | None = None

    def take(self) -> Tensor | None:
        """Return the ids and forget them, so that a later call without them cannot see them."""
        ids, self.modality_ids = self.modality_ids, None
        return ids


class ModalityHook:
    """Forward pre-hook of the whole model and of its language model.

    Args:
        model: the whole model, read for its token ids and the order of its arguments.
        anchor: returns a scalar zero that depends on the trained projector, or None. Added to the
            embeddings of a batch without images, it gives the projector a zero gradient
            instead of none, which distributed training needs.
    """

    def __init__(self, model: nn.Module, anchor: Callable[[], Tensor | None] | None) -> None:
        self.token_ids = visual_token_ids(model)
        self.anchor = anchor
        self.pending: Tensor | None = None

    def from_input_ids(self, input_ids: Tensor) -> Tensor | None:
        """Modality of each token [B, S], or None for a model that has no visual tokens."""
        if not self.token_ids:
            return None
        visual = input_ids == self.token_ids[0]
        for token in self.token_ids[1:]:
            visual = visual | (input_ids == token)
        return visual.int()

    @contextmanager
    def prompt(self, input_ids: Tensor | None, modality_ids: Tensor | None) -> Iterator[None]:
        """Remember a prompt, for models whose `generate` hands only its embeddings on."""
        before = self.pending
        if modality_ids is not None:
            self.pending = _as_ids(modality_ids)
        elif input_ids is not None:
            self.pending = self.from_input_ids(input_ids)
        try:
            yield
        finally:
            self.pending = before

    def take_pending(self, shape: torch.Size) -> Tensor | None:
        """The remembered prompt if it fits `shape` [B, S]; B may be a multiple (beams)."""
        ids = self.pending
        if ids is None or ids.shape[1] != shape[1] or shape[0] % ids.shape[0]:
            return None
        self.pending = None
        return ids.repeat_interleave(shape[0] // ids.shape[0], dim=0)


class _WholeModelHook:
    def __init__(self, shared: ModalityHook, module: nn.Module) -> None:
        self.shared = shared
        self.names = tuple(inspect.signature(module.forward).parameters)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        kwargs = {k: v for k, v in kwargs.items() if k != KEYWORD}
        ids = _find(self.shared, inputs)
        if ids is not None:
            kwargs[KEYWORD] = ids
        if torch.is_grad_enabled() and inputs.get("pixel_values") is None:
            anchor = self.shared.anchor and self.shared.anchor()
            if anchor is not None:
                kwargs[_ANCHOR] = anchor
        return args, kwargs


class _LanguageModelHook:
    """The same on a nested language model, which `generate` may enter without the whole model."""

    def __init__(self, shared: ModalityHook) -> None:
        self.shared = shared

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        kwargs = dict(kwargs)
        anchor, embeds = kwargs.pop(_ANCHOR, None), kwargs.get("inputs_embeds")
        if anchor is not None and embeds is not None:
            kwargs["inputs_embeds"] = embeds + anchor.to(embeds.dtype)
        if kwargs.get(KEYWORD) is None:
            ids = _find(self.shared, kwargs)
            if ids is None and embeds is not None and embeds.shape[1] > 1:
                ids = self.shared.take_pending(embeds.shape[:2])
                ids = UNKNOWN if ids is None else ids
            if ids is not None:
                kwargs[KEYWORD] = ids
        return args, kwargs


def _find(shared: ModalityHook, inputs: dict[str, Any]) -> Tensor | None:
    """Modality ids from, in this order: themselves, `mm_token_type_ids`, `input_ids`."""
    input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    source = input_ids if input_ids is not None else embeds
    length = None if source is None else source.shape[1]
    for name in (KEYWORD, "mm_token_type_ids"):
        if inputs.get(name) is not None:
            return _fit(_as_ids(inputs[name]), length, decoding=_decoding(inputs, length))
    if input_ids is None or _decoding(inputs, length):
        return None
    return shared.from_input_ids(input_ids)


def _decoding(inputs: dict[str, Any], length: int | None) -> bool:
    return length == 1 and inputs.get("past_key_values") is not None


def _as_ids(modality: Tensor) -> Tensor:
    return modality.ne(0).int()


def _fit(ids: Tensor, length: int | None, *, decoding: bool) -> Tensor | None:
    """Ids of a prompt, for a forward pass over it and the text that has been generated since."""
    if length is None or ids.shape[1] == length:
        return ids
    if decoding:
        return None
    if ids.shape[1] > length:
        raise ValueError(
            f"modality_ids has {ids.shape[1]} positions, the sequence has {length}; one per "
            "position is expected"
        )
    return nn.functional.pad(ids, (0, length - ids.shape[1]))


def install_plumbing(
    model: nn.Module, anchor: Callable[[], Tensor | None] | None = None
) -> ModalityHook:
    """Put the hooks on `model` and its language model, once; return what they share."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _WholeModelHook):
            hook.shared.anchor = anchor
            return hook.shared
    shared = ModalityHook(model, anchor)
    model.register_forward_pre_hook(_WholeModelHook(shared, model), with_kwargs=True)
    _, language_model = find_language_model(model)
    if language_model is not model:
        language_model.register_forward_pre_hook(_LanguageModelHook(shared), with_kwargs=True)
    return shared


def remove_plumbing(model: nn.Module) -> None:
    """Take the hooks of `install_plumbing` away again."""
    remove_pre_hooks(model, (_WholeModelHook, _LanguageModelHook))
