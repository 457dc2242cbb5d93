"""Tell the adapter which positions of a prompt are whose stream.

A forward pre-hook on the whole model reads the call and leaves, for the language model's own
pre-hook, which positions are the instruction's (and, in a bare language model, the image's). The
latter hook changes `inputs_embeds`. Both run outside of the checkpointed layers. `generate` of
BLIP-2 and InstructBLIP enters the language model without the whole model: the prompt is remembered
around it (`prompt`), as for PILL.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmadapt.peft.crome.layer import CromeEmbeddings, CromeLayer
from mmadapt.peft.structure import find_language_model, visual_token_ids
from mmadapt.peft.wrapping import remove_pre_hooks

KEYWORD = "modality_ids"


class Plumbing:
    """What the hooks share. `layer` owns the adapters."""

    def __init__(self, model: nn.Module, layer: CromeLayer) -> None:
        self.layer = layer
        self.token_ids = visual_token_ids(model)
        self.text: Tensor | None = None
        self.visual: Tensor | None = None
        self.anchor: Tensor | None = None

    def read(self, inputs: dict[str, Any]) -> None:
        """Find both streams' positions [B, S] in the arguments of a call; None for no position."""
        self.text = self.visual = None
        config, ids = self.layer.config, inputs.get("input_ids")
        source = ids if ids is not None else inputs.get("inputs_embeds")
        if config is None or source is None:
            return
        shape = source.shape[:2]
        if shape[1] == 1 and inputs.get("past_key_values") is not None:
            return  # a token that is being generated
        image = self._image(ids, inputs.get(KEYWORD), shape)
        if isinstance(self.layer, CromeEmbeddings):
            self.visual = image
        if config.instruction != "none":
            everywhere = torch.ones(shape, dtype=torch.bool, device=source.device)
            self.text = self._instruction(inputs, image, everywhere, config.instruction)

    def _image(self, ids: Tensor | None, given: Tensor | None, shape: torch.Size) -> Tensor | None:
        if given is not None:
            image = given.bool()
            missing = shape[1] - image.shape[1]
            return nn.functional.pad(image, (0, missing)) if missing > 0 else image
        if ids is None or not self.token_ids:
            return None
        return torch.isin(ids, ids.new_tensor(self.token_ids))

    def _instruction(
        self, inputs: dict[str, Any], image: Tensor | None, chosen: Tensor, when: str
    ) -> Tensor | None:
        labels, mask = inputs.get("labels"), inputs.get("attention_mask")
        if image is None and when == "beside_images":
            return None
        if image is not None:
            chosen = chosen & ~image
            if when == "beside_images":
                chosen = chosen & image.any(1, keepdim=True)
        if labels is not None and labels.shape == chosen.shape:
            chosen = chosen & (labels == -100)
        if mask is not None and mask.shape == chosen.shape:
            chosen = chosen & mask.bool()
        return chosen

    @contextmanager
    def prompt(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Around `generate`: remember the prompt for a language model entered directly."""
        self.read(inputs)
        try:
            yield
        finally:
            self.text = self.visual = None

    def take(self, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
        """The positions of both streams if they fit `shape` [B, S], once; B may have beams."""
        found = []
        for mask in (self.text, self.visual):
            fits = mask is not None and mask.shape[1] == shape[1] and not shape[0] % len(mask)
            found.append(mask.repeat_interleave(shape[0] // len(mask), 0) if fits else None)
        self.text = self.visual = None
        return found[0], found[1]


class _WholeModelHook:
    def __init__(self, shared: Plumbing, module: nn.Module) -> None:
        self.shared = shared
        self.names = tuple(inspect.signature(module.forward).parameters)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        self.shared.read(inputs)
        self.shared.anchor = None
        without_image = inputs.get("pixel_values") is None
        if torch.is_grad_enabled() and without_image:
            # A batch without images: what trains gets zero gradients, which DDP needs.
            self.shared.anchor = self.shared.layer.anchor()
        return args, {name: value for name, value in kwargs.items() if name != KEYWORD}


class _LanguageModelHook:
    """Adapts `inputs_embeds`; ids are embedded first."""

    def __init__(self, shared: Plumbing, module: nn.Module) -> None:
        self.shared = shared
        self.names = tuple(inspect.signature(module.forward).parameters)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        shared = self.shared
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
        source = embeds if embeds is not None else ids
        if source is None:
            return (), kwargs
        text, visual = shared.take(source.shape[:2])
        anchor, shared.anchor = shared.anchor, None
        if text is None and visual is None and anchor is None:
            return (), kwargs
        if embeds is None:
            embeds = module.get_input_embeddings()(ids)
            kwargs["input_ids"] = None
        kwargs["inputs_embeds"] = self._adapt(embeds, text, visual, anchor)
        return (), kwargs

    def _adapt(
        self, x: Tensor, text: Tensor | None, visual: Tensor | None, anchor: Tensor | None
    ) -> Tensor:
        y = x
        for stream, mask in (("text", text), ("visual", visual)):
            if mask is not None and self.shared.layer.current is not None:
                adapted = self.shared.layer.adapt(x, stream)
                y = torch.where(mask.to(x.device).unsqueeze(-1), adapted, y)
        return y if anchor is None else y + anchor.to(y)


def install(model: nn.Module, layer: CromeLayer) -> Plumbing:
    """Put the hooks on `model` and on the module that embeds for it, once."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _WholeModelHook):
            hook.shared.layer = layer
            return hook.shared
    shared = Plumbing(model, layer)
    model.register_forward_pre_hook(_WholeModelHook(shared, model), with_kwargs=True)
    inner = _stack_of(model)
    inner.register_forward_pre_hook(_LanguageModelHook(shared, inner), with_kwargs=True)
    return shared


def _stack_of(model: nn.Module) -> nn.Module:
    """The module that takes `inputs_embeds` in the end: the bare stack inside a language model."""
    _, language_model = find_language_model(model)
    getter = getattr(language_model, "get_encoder" if _is_seq2seq(language_model) else "", None)
    if getter is not None:
        return getter()
    base = getattr(language_model, getattr(language_model, "base_model_prefix", ""), None)
    return language_model if base is None else base


def _is_seq2seq(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def remove(model: nn.Module) -> None:
    """Take the hooks of `install` away again."""
    remove_pre_hooks(model, (_WholeModelHook, _LanguageModelHook))
