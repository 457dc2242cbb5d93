"""pytest plug-in that points PEFT's tests at this package's tuners and at tiny local models."""

import fnmatch
import importlib
import inspect
import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from not_applicable import NOT_APPLICABLE

from mmadapt.peft import CromeConfig, PillConfig

TASK = {"task_type": "CAUSAL_LM"}
CONFIGS = [
    (PillConfig, {**TASK, "rank": 4}),
    (PillConfig, {**TASK, "rank": 4, "gate": "static", "adapter": "linear"}),
    (PillConfig, {**TASK, "rank": 4, "gate_heads": "q", "experts": "shared"}),
    # A bare language model has no projector: its prompt takes the text branch.
    (CromeConfig, {**TASK, "rank": 4, "instruction": "always"}),
    (CromeConfig, {**TASK, "rank": 4, "instruction": "always", "adapter_bias": True}),
]
METHODS = tuple(dict.fromkeys(method for method, _ in CONFIGS))
DECODERS = ("Llama", "Mistral", "Qwen2")
MODULES = ("tests.test_decoder_models", "tests.test_config")


def _stub(name: str) -> None:
    """An empty stand-in for an optional package that the tests import but that is not needed."""
    try:
        importlib.import_module(name)
    except ImportError:
        module = ModuleType(name)
        # A class of its own: PEFT asks isinstance(model, StableDiffusionPipeline).
        module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        module.load_dataset = MagicMock()
        sys.modules[name] = module


def _models(*, save: bool) -> list[str]:
    """Folders of tiny decoders; relative, because every worker has to name the same cases."""
    paths = []
    for name in DECODERS:
        path = f"tiny-{name}ForCausalLM"
        paths.append(path)
        if not save:
            continue
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(path)
    return paths


def _reparametrise(function, values: dict[str, list]) -> None:
    """Give the parametrisations of a test over methods and models these values instead."""
    marks = getattr(function, "pytestmark", [])
    for i, mark in enumerate(marks):
        names = mark.args[0].replace(" ", "") if mark.name == "parametrize" else None
        if names in values:
            marks[i] = pytest.mark.parametrize(names, values[names]).mark


def pytest_configure(config) -> None:
    assert transformers.Trainer  # asks whether datasets is there, before there is a stand-in
    for name in ("diffusers", "datasets"):
        _stub(name)
    values = {
        "model_id": _models(save=not hasattr(config, "workerinput")),
        "config_cls,config_kwargs": CONFIGS,
        "config_class,mandatory_kwargs": [(method, {}) for method in METHODS],
    }
    for name in MODULES:
        module = importlib.import_module(name)
        for _, owner in inspect.getmembers(module, inspect.isclass):
            if owner.__module__ == name:
                for _, function in inspect.getmembers(owner, inspect.isfunction):
                    _reparametrise(function, values)
    module = sys.modules["tests.test_decoder_models"]
    module.PEFT_DECODER_MODELS_TO_TEST[:] = values["model_id"]


def pytest_collection_modifyitems(config, items) -> None:
    """Keep the tests that run over our methods and that are not listed as not applicable."""
    ours = [item for item in items if _is_over_methods(item)]
    unused = dict(NOT_APPLICABLE)
    kept = []
    for item in ours:
        name = f"{item.path.name}::{item.originalname}"
        matches = [pattern for pattern in NOT_APPLICABLE if fnmatch.fnmatchcase(name, pattern)]
        for pattern in matches:
            unused.pop(pattern, None)
        if not matches:
            kept.append(item)
    if unused and not config.option.keyword:
        raise pytest.UsageError(f"not_applicable.py lists tests that do not exist: {list(unused)}")
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _is_over_methods(item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return any(method in parameters.values() for method in METHODS)


def pytest_terminal_summary(terminalreporter, config) -> None:
    terminalreporter.write_line(
        f"left out: tests of other methods, and {len(NOT_APPLICABLE)} that cannot apply to ours"
    )
    for name, reason in NOT_APPLICABLE.items():
        terminalreporter.write_line(f"  {name}: {reason}")
