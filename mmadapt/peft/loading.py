"""Refuse to load an adapter checkpoint that does not fit the model."""

import re
from typing import Any

from torch import nn


class _CompleteLoad:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.pattern = re.compile(rf"{re.escape(prefix)}[^.]+\.([^.]+)")

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *ignored: Any
    ) -> None:
        ours = (key for key in state_dict if self.prefix in key and key.startswith(prefix))
        given = {key[len(prefix) :] for key in ours}
        if not given:
            return
        expected = {key for key in module.state_dict() if self.prefix in key}
        unexpected = sorted(given - expected)
        adapters = {self._adapter(key) for key in given & expected}
        if not adapters:
            adapters = {self._adapter(key) for key in expected}
        missing = sorted(k for k in expected - given if self._adapter(k) in adapters)
        if unexpected or missing:
            raise ValueError(
                "the adapter checkpoint does not fit the model, nothing was loaded: "
                f"{len(missing)} keys are missing ({_first(missing)}), {len(unexpected)} have no "
                f"place ({_first(unexpected)})"
            )

    def _adapter(self, key: str) -> str:
        match = self.pattern.search(key)
        return match.group(1) if match else ""


def _first(keys: list[str], limit: int = 3) -> str:
    return ", ".join(keys[:limit]) + (", ..." if len(keys) > limit else "") if keys else "-"


def require_complete_load(model: nn.Module, prefix: str) -> None:
    """From now on `model.load_state_dict` raises where adapter keys are missing or left over.

    PEFT loads with `strict=False` and only warns, so that a renamed module runs untrained. The
    check holds for every adapter that the loaded dictionary has at least one key of; dictionaries
    without adapter keys pass.

    Args:
        model: the model that holds the adapters.
        prefix: what the names of adapter attributes start with.
    """
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(isinstance(getattr(h, "hook", None), _CompleteLoad) for h in hooks):
        model.register_load_state_dict_pre_hook(_CompleteLoad(prefix))
