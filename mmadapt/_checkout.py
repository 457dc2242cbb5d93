"""What differs when mmadapt is imported from a source checkout instead of an installed wheel.

The checkout holds a top-level folder `kernels/`. With the checkout on `sys.path`, as under
`python -m pytest`, `importlib.util.find_spec("kernels")` reports it as a namespace package.
Libraries that probe for Hugging Face's distribution `kernels` this way take it for the real one
(transformers 5.23 notices, after importing it, that it has neither version nor file).
"""

import os
import sys
from importlib import machinery
from pathlib import Path

_candidate = Path(__file__).resolve().parent.parent
ROOT: Path | None = (
    _candidate
    if (_candidate / "pyproject.toml").is_file() and (_candidate / "kernels").is_dir()
    else None
)
"""Root of the checkout, or None when mmadapt runs from an installed wheel."""


class _CheckoutFinder(machinery.FileFinder):
    """Finds everything in the checkout's root except a module called `kernels`."""

    def find_spec(self, fullname, target=None):
        return None if fullname == "kernels" else super().find_spec(fullname, target)


_LOADERS = (
    (machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES),
    (machinery.SourceFileLoader, machinery.SOURCE_SUFFIXES),
    (machinery.SourcelessFileLoader, machinery.BYTECODE_SUFFIXES),
)


def _path_hook(path: str) -> _CheckoutFinder:
    if os.path.realpath(path or os.getcwd()) != str(ROOT):
        raise ImportError("not the root of the mmadapt checkout")
    return _CheckoutFinder(path, *_LOADERS)


def hide_kernels_folder() -> None:
    """Make `find_spec("kernels")` ignore the checkout's folder; does nothing when installed."""
    if ROOT is None or _path_hook in sys.path_hooks:
        return
    sys.path_hooks.insert(0, _path_hook)
    for path in [p for p in sys.path_importer_cache if os.path.realpath(p) == str(ROOT)]:
        del sys.path_importer_cache[path]
