"""The one place that loads the C++ extension, and remembers why when it is not there."""

import functools
import os
from types import ModuleType

# torch first: its wheels bring libgomp.so.1, and a library loaded later then shares that one OpenMP
# runtime and its threads instead of starting a second pool on the same cores.
import torch  # noqa: F401


@functools.cache
def load_extension() -> tuple[ModuleType | None, str]:
    """`(mmadapt._C, "")`, or `(None, reason)` when it is switched off, not built, or fails to load.

    MMADAPT_DISABLE_EXT=1 in the environment switches it off.
    """
    if os.environ.get("MMADAPT_DISABLE_EXT") == "1":
        return None, "switched off by MMADAPT_DISABLE_EXT=1"
    try:
        from mmadapt import _C
    except ImportError as error:
        if getattr(error, "name", None) in ("mmadapt._C", "mmadapt"):
            return None, "not built (no C++ compiler, CMake or ninja when mmadapt was installed)"
        return None, f"built, but does not load: {error}"
    return _C, ""
