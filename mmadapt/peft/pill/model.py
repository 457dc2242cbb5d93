"""The PILL tuner: wraps the language model's decoder layers and the projector of a frozen model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from mmadapt.peft.loading import require_complete_load
from mmadapt.peft.modality import LayerSlot, install_plumbing, remove_plumbing
from mmadapt.peft.pill.attention import PillAttention
from mmadapt.peft.pill.config import PillConfig
from mmadapt.peft.pill.deferred_norm import defer_norms
from mmadapt.peft.pill.explain import WrapperReport, explain
from mmadapt.peft.pill.layer import PREFIX, PillLayer
from mmadapt.peft.pill.mlp import PillMlp
from mmadapt.peft.pill.projector import PillProjector
from mmadapt.peft.structure import (
    PROJECTOR_NAMES,
    find_decoder_stack,
    find_projector,
)
from mmadapt.peft.wrapping import WrappingTuner


@dataclass(frozen=True)
class _Site:
    """A module that can be wrapped."""

    kind: Literal["attention", "mlp", "projector"]
    dim: int
    layer: int = -1
    is_last: bool = False


def _find_sites(model: nn.Module, config: PillConfig) -> dict[str, _Site]:
    """Everything that PILL may wrap, by path, before the user's narrowing."""
    stack = find_decoder_stack(model)
    sites = {}
    for i in range(stack.num_layers):
        last = i == stack.num_layers - 1
        for name, kind in (("self_attn", "attention"), ("mlp", "mlp")):
            sites[f"{stack.path}.{i}.{name}"] = _Site(kind, stack.hidden_size, i, last)
    projector = find_projector(model)
    if projector is None and config.projector in ("linear", "full"):
        raise ValueError(
            f"PillConfig.projector={config.projector!r}, but {type(model).__name__} has none: "
            f"looked for a module called {' or '.join(PROJECTOR_NAMES)}"
        )
    if projector is not None and config.projector != "frozen":
        sites[projector] = _Site("projector", stack.hidden_size)
    if config.stage == "align":
        _check_align_trains(config, has_projector=projector in sites)
    return sites


def _check_align_trains(config: PillConfig, *, has_projector: bool) -> None:
    if config.experts == "shared" and not has_projector:
        raise ValueError(
            "stage='align' trains the vision experts and the projector, but experts='shared' has "
            "no vision experts and there is no trainable projector"
        )


class PillModel(WrappingTuner):
    """Injects PILL into a model; made by `peft.get_peft_model(model, PillConfig(...))`.

    One adapter runs at a time. Merging is refused, and so are batches of mixed adapters.
    """

    prefix = PREFIX
    tuner_layer_cls = PillLayer

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        self._sites = _find_sites(model, self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        projectors = [m for m in model.modules() if isinstance(m, PillProjector)]
        self._plumbing = install_plumbing(model, projectors[0].anchor if projectors else None)
        require_complete_load(model, self.prefix)
        defer_norms(model)

    def explain(self, tokens: int = 1024) -> list[WrapperReport]:
        """`mmadapt.peft.explain` of this model."""
        return explain(self.model, tokens)

    def _check_target_module_exists(self, peft_config: PillConfig, key: str) -> Any:
        site = self._sites.get(key)
        if site is None:
            return False
        layers = peft_config.layers_to_transform
        if layers is not None and site.kind != "projector" and site.layer not in layers:
            return False
        if peft_config.target_modules is None or site.kind == "projector":
            peft_config = replace(peft_config, target_modules=re.escape(key))
        return check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: PillConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        if not isinstance(target, PillLayer):
            layer = self._new_layer(target, adapter_name, parent, current_key)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.update_layer(adapter_name, peft_config)
        if isinstance(target, PillMlp):
            # The attention wrapper passes the ids on, even where this adapter has no part in it.
            parent.self_attn.mmadapt_pill_config.setdefault(adapter_name, peft_config)

    def _new_layer(
        self, target: nn.Module, adapter_name: str, parent: nn.Module, key: str
    ) -> PillLayer:
        site = self._sites[key]
        if site.kind == "projector":
            return PillProjector(target, adapter_name, key, site.dim)
        if site.kind == "attention":
            return PillAttention(target, adapter_name, LayerSlot(), key, site.dim)
        attention = parent.self_attn
        if not isinstance(attention, PillAttention):
            # Even without an adapter there, attention has to be wrapped: it receives the ids.
            path = key.rpartition(".")[0] + ".self_attn"
            attention = PillAttention(attention, adapter_name, LayerSlot(), path, site.dim)
            self._replace_module(parent, "self_attn", attention, attention.base_layer)
        return PillMlp(target, adapter_name, attention.slot, site.dim, site.is_last)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_plumbing(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around `PeftModel.forward` and `.generate`: remember the prompt."""
        self._refuse_mixed_batch(kwargs)
        ids: Tensor | None = kwargs.get("input_ids")
        with self._plumbing.prompt(ids, kwargs.get("modality_ids")):
            yield
