"""The CROME tuner: an adapter between the projector and the language model of a frozen model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from mmadapt.peft.crome.config import CromeConfig
from mmadapt.peft.crome.explain import CromeReport, explain_crome
from mmadapt.peft.crome.layer import (
    PREFIX,
    CromeEmbeddings,
    CromeLayer,
    CromeProjector,
)
from mmadapt.peft.crome.plumbing import install, remove
from mmadapt.peft.loading import require_complete_load
from mmadapt.peft.structure import PROJECTOR_NAMES, find_projector, is_multimodal
from mmadapt.peft.wrapping import WrappingTuner


def _find_site(model: nn.Module) -> tuple[str, type[CromeLayer], str]:
    """Path of the module to wrap, its wrapper, and the branch of its output."""
    projector = find_projector(model)
    if projector is not None:
        has_queries = any(name.endswith("qformer") for name, _ in model.named_modules())
        return projector, CromeProjector, "text" if has_queries else "visual"
    if is_multimodal(model):
        raise ValueError(
            f"{type(model).__name__} has no projector for CROME to stand behind: looked for a "
            f"module called {' or '.join(PROJECTOR_NAMES)}"
        )
    embeddings = model.get_input_embeddings()
    for name, module in model.named_modules():
        if module is embeddings:
            return name, CromeEmbeddings, "visual"
    raise ValueError(f"{type(model).__name__} has no input embeddings among its modules")


class CromeModel(WrappingTuner):
    """Injects CROME's adapter; made by `peft.get_peft_model(model, CromeConfig(...))`.

    One adapter runs at a time. Merging is refused, and so are batches of mixed adapters.
    """

    prefix = PREFIX
    tuner_layer_cls = CromeLayer

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        wrapped = [(n, m) for n, m in model.named_modules() if isinstance(m, CromeLayer)]
        if wrapped:
            self._site = (wrapped[0][0], type(wrapped[0][1]), wrapped[0][1].stream)
        else:
            self._site = _find_site(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layer = next(m for m in model.modules() if isinstance(m, CromeLayer))
        self._plumbing = install(model, layer)
        require_complete_load(model, self.prefix)

    def explain(self, tokens: int = 1024) -> list[CromeReport]:
        """`mmadapt.peft.explain` of this model."""
        return explain_crome(self.model, tokens)

    def _check_target_module_exists(self, peft_config: CromeConfig, key: str) -> Any:
        if key != self._site[0]:
            return False
        if peft_config.target_modules is None:
            peft_config = replace(peft_config, target_modules=re.escape(key))
        return check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: CromeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        if not isinstance(target, CromeLayer):
            _, wrapper, stream = self._site
            layer = wrapper(target, adapter_name, self._width(), stream)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.update_layer(adapter_name, peft_config)

    def _width(self) -> int:
        return self.model.config.get_text_config(decoder=True).hidden_size

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around `PeftModel.forward` and `.generate`: remember the prompt."""
        self._refuse_mixed_batch(kwargs)
        with self._plumbing.prompt(kwargs):
            yield
