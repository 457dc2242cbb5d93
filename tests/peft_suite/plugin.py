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

from mmadapt.peft import AuroraConfig, PillConfig

TASK = {"task_type": "CAUSAL_LM"}
METHODS = (PillConfig, AuroraConfig)
CONFIGS = [
    (PillConfig, {**TASK, "rank": 4}),
    (PillConfig, {**TASK, "rank": 4, "gate": "static", "adapter": "linear"}),
    (PillConfig, {**TASK, "rank": 4, "gate_heads": "q", "experts": "shared"}),
    (AuroraConfig, {**TASK, "rank": 4, "branch_dropout": 0.0}),
    (AuroraConfig, {**TASK, "rank": 4, "branch_dropout": 0.0, "core": "diagonal"}),
]
# Name, model, config class and arguments, as in PEFT's own list for small models of plain torch.
CUSTOM = [
    ("Aurora MLP", "MLP", AuroraConfig, {"target_modules": "lin0"}),
    ("Aurora MLP list", "MLP", AuroraConfig, {"target_modules": ["lin0", "lin1"], "scale": 0.1}),
    (
        "Aurora MLP diagonal",
        "MLP",
        AuroraConfig,
        {"target_modules": ["lin1"], "core": "diagonal", "modules_to_save": ["lin0"]},
    ),
]
SEVERAL = [
    (
        "Aurora Same",
        "aurora",
        AuroraConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin0"], "init_weights": False, "rank": 4},
    ),
    (
        "Aurora Different",
        "aurora",
        AuroraConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin1"], "init_weights": False},
    ),
]
for _, _, _, *_options in (*CUSTOM, *SEVERAL):
    for _option in _options:
        _option["branch_dropout"] = 0.0  # they compare outputs in training mode
DECODERS = ("Llama", "Mistral", "Qwen2")
MODULES = ("tests.test_decoder_models", "tests.test_config", "tests.test_custom_models")


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
    # These lists are the parametrisations themselves.
    custom = sys.modules["tests.test_custom_models"]
    custom.TEST_CASES[:] = CUSTOM
    custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = SEVERAL


def pytest_collection_modifyitems(config, items) -> None:
    """Keep the tests that run over our methods and that are not listed as not applicable."""
    ours = [item for item in items if _method(item) is not None]
    unused = {(m, pattern) for m, patterns in NOT_APPLICABLE.items() for pattern in patterns}
    kept = []
    for item in ours:
        method = _method(item).__name__
        name = f"{item.path.name}::{item.originalname}"
        patterns = NOT_APPLICABLE[method]
        matches = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
        unused -= {(method, pattern) for pattern in matches}
        if not matches:
            kept.append(item)
    if unused and not config.option.keyword:
        raise pytest.UsageError(f"not_applicable.py lists tests that do not exist: {unused}")
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _method(item) -> type | None:
    """The configuration class of ours that a test is run with."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return next((value for value in parameters.values() if value in METHODS), None)


def pytest_terminal_summary(terminalreporter, config) -> None:
    terminalreporter.write_line("left out: tests of other methods, and those that cannot apply to")
    for method, patterns in NOT_APPLICABLE.items():
        terminalreporter.write_line(f"{method}:")
        for name, reason in patterns.items():
            terminalreporter.write_line(f"  {name}: {reason}")
