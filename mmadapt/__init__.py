"""mmadapt: fused, modality-routed adapters for frozen multimodal models.

Importing this package needs torch alone and is cheap; every room is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING

from mmadapt._checkout import hide_kernels_folder

if TYPE_CHECKING:
    from mmadapt import data, eval, models, nn, ops, peft, train
    from mmadapt._config import show_config
    from mmadapt.ops import explain

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "data",
    "eval",
    "explain",
    "models",
    "nn",
    "ops",
    "peft",
    "show_config",
    "train",
]

hide_kernels_folder()

_ATTRIBUTES = {"show_config": "mmadapt._config", "explain": "mmadapt.ops"}


def __getattr__(name: str):
    if name in _ATTRIBUTES:
        return getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    if name in __all__:
        return importlib.import_module(f"mmadapt.{name}")
    raise AttributeError(f"module 'mmadapt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
