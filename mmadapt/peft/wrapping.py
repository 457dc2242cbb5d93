"""What tuners share that wrap whole modules and depend on their input: one at a time, unmerged."""

import re
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from mmadapt.peft.structure import find_encoders


class Wrapper(nn.Module, BaseTunerLayer):
    """A module of the frozen model, under `base_layer`, with adapters by name, one of them active.

    Attributes that are not found here are the base layer's.

    Attributes:
        method: the method's name in messages.
        cannot_merge: why it cannot be merged, and what to do instead.
    """

    method: ClassVar[str]
    cannot_merge: ClassVar[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training  # adapters may be added after model.eval()
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self._disable_adapters = False
        self._active_adapter = [adapter_name]
        self.merged_adapters: list[str] = []

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(f"{self.method} runs one adapter at a time, got {names}")
        super().set_adapter(names, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(self.cannot_merge)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The bare base layer. PEFT calls this from `unload`."""
        if merge:
            self.merge(safe_merge, adapter_names)
        return self.base_layer

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # The wrapped modules have no `weight` of their own, where PEFT would look.
        for parameter in base_layer.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        return next((p.device for p in base_layer.parameters()), None), None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet, while unpickling
                raise
            return getattr(super().__getattr__("base_layer"), name)


class WrappingTuner(BaseTuner):
    """A tuner whose layers are `Wrapper`s."""

    tuner_layer_cls: ClassVar[type[Wrapper]]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def train(self, mode: bool = True) -> "WrappingTuner":
        """As `nn.Module.train`, but frozen encoders stay in eval mode: their dropout is off."""
        super().train(mode)
        for encoder in find_encoders(self.model):
            if not any(parameter.requires_grad for parameter in encoder.parameters()):
                encoder.eval()
        return self

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config  # without target_modules the structure of the model decides

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own version expects a `weight`, which the wrapped modules need not have.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(self.tuner_layer_cls.cannot_merge)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        pattern = rf"({cls.prefix}[^.]+)\.{re.escape(adapter_name)}(?=\.|$)"
        return re.sub(pattern, r"\1", key)

    def _refuse_mixed_batch(self, arguments: dict[str, Any]) -> None:
        if arguments.get("adapter_names") is not None:
            method = self.tuner_layer_cls.method
            raise ValueError(f"{method} does not support batches of mixed adapters (adapter_names)")


def remove_pre_hooks(model: nn.Module, kinds: tuple[type, ...]) -> None:
    """Take every forward pre-hook that is an instance of `kinds` off the model's modules."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
