"""The Aurora tuner: wraps linear layers of a frozen model and owns the factors they share."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import nn

from mmadapt.peft.aurora.blip_embeddings import CopyLeaf, text_embeddings
from mmadapt.peft.aurora.config import AuroraConfig
from mmadapt.peft.aurora.contraction import Contraction
from mmadapt.peft.aurora.explain import AuroraReport, explain_aurora
from mmadapt.peft.aurora.image_states import ProjectStates
from mmadapt.peft.aurora.layer import FACTORS, PREFIX, AuroraLayer, Shared
from mmadapt.peft.aurora.linear import AuroraLinear, check_layout
from mmadapt.peft.aurora.query_transform import CANNOT_MERGE, AuroraQueryTransform
from mmadapt.peft.aurora.siblings import Siblings
from mmadapt.peft.aurora.sites import (
    Site,
    default_components,
    find_sites,
    layer_index,
    linear_of,
    text_stacks,
)
from mmadapt.peft.loading import require_complete_load


class AuroraModel(BaseTuner):
    """Injects Aurora into a model; made by `peft.get_peft_model(model, AuroraConfig(...))`.

    Factors and core of every adapter are parameters of the tuner, in the module `dict`
    `mmadapt_aurora_factors`: listed, saved and copied once. Several active adapters add up.
    """

    prefix = PREFIX
    tuner_layer_cls = AuroraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    uses_shared_state = True

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        if not hasattr(self, FACTORS):
            self.add_module(FACTORS, nn.ModuleDict())
            self._shared = Shared(self.factors)
            self._siblings: dict[tuple, Siblings] = {}
            self._hooks: list[Any] = []
            require_complete_load(self, self.prefix)
            # Into sharded parameters, whose version counters do not tell when they are gathered.
            self.register_load_state_dict_post_hook(_forget_contraction)
        config = self.peft_config[adapter_name]
        self._sites = find_sites(model)
        self._check_components(model, config)
        self._check_shapes(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._shared.contraction.clear()
        if not self._hooks:
            self._hooks = [
                stack.register_forward_pre_hook(ProjectStates(self._shared), with_kwargs=True)
                for _, stack in text_stacks(model)
            ] + [
                embeddings.register_forward_pre_hook(CopyLeaf(), with_kwargs=True)
                for embeddings in text_embeddings(model)
            ]

    @property
    def factors(self) -> nn.ModuleDict:
        """`AuroraFactors` by adapter."""
        return getattr(self, FACTORS)

    @property
    def contraction(self) -> Contraction:
        """The contracted modes. `clear()` it after changing parameters through `.data`."""
        return self._shared.contraction

    def explain(self, tokens: int = 1024) -> list[AuroraReport]:
        """`mmadapt.peft.explain` of this model."""
        return explain_aurora(self.model, tokens)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        self._set_factors_trainable(not inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in set(names) & set(self.factors):
            self.factors[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        trains = self._trains()
        super().delete_adapter(adapter_name)
        if adapter_name in self.factors:
            del self.factors[adapter_name]
        self._set_factors_trainable(trains)

    @torch.no_grad()
    def merge_error(self, *args: Any, **kwargs: Any) -> float:
        """Relative L2 distance between the model's outputs with merged weights and without.

        Calls the model twice in evaluation mode, merges in between and unmerges; arguments are the
        model's. The largest distance over the tensors of the output (logits, scores, states, loss)
        is returned. In fp32 it is that of rounding, 1e-5 or less; more than the rounding of
        activations means that the merged weights lost part of the updates.

        Raises:
            ValueError: adapters are merged already.
        """
        if any(layer.merged for layer in self._shared.layers):
            raise ValueError("merge_error compares with unmerged weights; call unmerge_adapter()")
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            expected = _tensors(self.model(*args, **kwargs))
            self.merge_adapter()
            found = _tensors(self.model(*args, **kwargs))
        finally:
            self.unmerge_adapter()
            for module in training:
                module.training = True
        pairs = zip(found, expected, strict=True)
        return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        super().merge_adapter(adapter_names, safe_merge)
        self._warn_of_rounding(self._shared.layers)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            names = adapter_names or self.active_adapters
            layers = [m for m in self.model.modules() if isinstance(m, AuroraQueryTransform)]
            if any(layer.has(name) for layer in layers for name in names):
                raise NotImplementedError(CANNOT_MERGE)
        wrapped = list(self._shared.layers)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge:
            self._warn_of_rounding(wrapped)
        for hook in self._hooks:
            hook.remove()
        return model

    def _warn_of_rounding(self, layers: list[AuroraLinear], limit: float = 0.01) -> None:
        lost = {layer.path: layer.rounding_loss() for layer in layers if _is_half(layer)}
        worst = max(lost, key=lost.get, default=None)
        if worst is not None and lost[worst] > limit:
            dtype = linear_of(self.model.get_submodule(worst)).weight.dtype
            warnings.warn(
                f"merging into {dtype} weights rounds away part of the updates: "
                f"{100 * lost[worst]:.0f} % in {worst}, "
                f"{100 * sum(lost.values()) / len(lost):.0f} % on average over {len(lost)} layers. "
                "Convert the model with .float() before merging, or leave the adapter unmerged",
                stacklevel=3,
            )

    def _set_factors_trainable(self, trains: bool) -> None:
        for name, factors in self.factors.items():
            factors.requires_grad_(trains and name in self.active_adapters)

    def _trains(self) -> bool:
        return any(p.requires_grad for p in self.factors.parameters())

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._set_factors_trainable(enabled)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        factors = self.factors[adapter_name]
        if autocast_adapter_dtype and factors.core.dtype in (torch.float16, torch.bfloat16):
            factors.place(factors.core.device, torch.float32)

    def _prepare_adapter_config(self, peft_config: AuroraConfig, model_config: Any) -> AuroraConfig:
        return peft_config  # without target_modules the structure of the model decides

    def _components(self, config: AuroraConfig) -> list[str] | None:
        """The components to adapt; None for all, if `target_modules` says what is adapted."""
        if config.components is not None or config.target_modules is not None:
            return config.components
        return default_components(self._sites)

    def _check_components(self, model: nn.Module, config: AuroraConfig) -> None:
        if config.target_modules is not None:
            return
        found = list(dict.fromkeys(site.component for site in self._sites.values()))
        missing = [name for name in config.components or () if name not in found]
        if missing or not found:
            raise ValueError(
                f"AuroraConfig.components: {type(model).__name__} has no {missing or 'component'}; "
                f"found {found}. target_modules adapts linear layers of any model"
            )

    def _check_shapes(self, model: nn.Module, config: AuroraConfig) -> None:
        """Before anything is wrapped: does every weight of the adapter's fit its factors?"""
        self._targets: set[str] = set()
        for path, module in model.named_modules():
            if path.endswith(".base_layer") or linear_of(module) is None:
                continue
            if bool(self._check_target_module_exists(config, path)):
                self._targets.add(path)
                site = self._sites.get(path)
                if site is not None:
                    check_layout(path, linear_of(module), site, config)

    def _check_target_module_exists(self, peft_config: AuroraConfig, key: str) -> Any:
        site, layers = self._sites.get(key), peft_config.layers_to_transform
        layers = [layers] if isinstance(layers, int) else layers
        components = self._components(peft_config)
        if site is not None and components is not None and site.component not in components:
            return False
        if site is not None and site.kind == "query_transform":
            # With target_modules, in layers of which these name a part.
            where = key.rpartition("output")[0]
            if not peft_config.gqt or not any(path.startswith(where) for path in self._targets):
                return False
        elif peft_config.target_modules is not None:
            return check_target_module_exists(peft_config, key)
        if site is None or (layers is not None and layer_index(key) not in layers):
            return False
        # Every check but that of the name.
        just_this = {"target_modules": re.escape(key), "layers_to_transform": None}
        peft_config = replace(peft_config, **just_this, layers_pattern=None)
        return check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: AuroraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        site = self._sites.get(current_key, Site("other"))
        if not isinstance(target, AuroraLayer):
            layer = self._new_layer(target, site, parent, current_key)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        if isinstance(target, AuroraLinear):
            width_in, width_out = target.factor_widths
            factors = self._shared.add(adapter_name, peft_config, torch.Size((width_out, width_in)))
            factors.requires_grad_(adapter_name in self.active_adapters)
        target.update_layer(
            adapter_name, peft_config, self.active_adapters, peft_config.inference_mode
        )

    def _new_layer(
        self, target: nn.Module, site: Site, parent: nn.Module, path: str
    ) -> AuroraLayer:
        if site.kind == "query_transform":
            return AuroraQueryTransform(target, self._shared, parent)
        if linear_of(target) is None:
            raise ValueError(
                f"target module {path} is a {type(target).__name__}; Aurora adapts torch.nn.Linear"
            )
        layer = AuroraLinear(target, self._shared, site, path)
        if site.group is not None:
            key = (site.group, tuple(linear_of(target).weight.shape))
            layer.siblings = self._siblings.setdefault(key, Siblings())
            layer.siblings.members.append(layer)
        return layer

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own version expects a `weight`, which the end of a text layer does not have.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around `PeftModel.forward` and `.generate`."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("Aurora does not support batches of mixed adapters (adapter_names)")
        yield


def _forget_contraction(model: AuroraModel, incompatible_keys: Any) -> None:
    model.contraction.clear()


def _is_half(layer: BaseTunerLayer) -> bool:
    weight = layer.get_base_layer().weight
    return weight.is_floating_point() and weight.element_size() < 4


def _tensors(output: Any) -> list[torch.Tensor]:
    """Floating tensors of a model's output, in fp64."""
    if isinstance(output, torch.Tensor):
        return [output.double()] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if not isinstance(output, list | tuple):
        return []
    return [tensor for part in output for tensor in _tensors(part)]
