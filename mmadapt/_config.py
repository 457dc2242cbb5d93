"""`show_config()`: what this installation can run, for bug reports and for the curious."""

import hashlib
import importlib.util
import platform
import sys
from typing import TextIO

import torch

from mmadapt import __version__
from mmadapt._checkout import ROOT
from mmadapt._extension import load_extension


def show_config(file: TextIO | None = None) -> dict[str, str]:
    """Print one line per part of the installation to `file` (default stdout); return them too.

    Keys: mmadapt, python, torch, cuda, triton, extension, cuda_kernels (of the extension: the
    architectures and the nvcc they were compiled with, or why there are none), and with the
    extension also compiler, openmp, isa (level chosen at run time out of those compiled in).
    """
    config = {
        "mmadapt": f"{__version__} ({'checkout' if ROOT else 'installed'})",
        "python": f"{platform.python_version()} on {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "cuda": _cuda(),
        "triton": _triton(),
        **_extension(),
    }
    width = max(map(len, config))
    for key, value in config.items():
        print(f"{key:<{width}}  {value}", file=file or sys.stdout)
    return config


def _cuda() -> str:
    if torch.version.cuda is None:
        return "absent: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no device"
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "absent: `pip install triton` for the GPU kernels"
    import triton

    return triton.__version__


def _extension() -> dict[str, str]:
    module, reason = load_extension()
    if module is None:
        return {
            "extension": f"absent: {reason}; pure Python, the cpu and cuda backends are off",
            "cuda_kernels": "absent: no extension",
        }
    info = module.build_info()
    stale = ROOT is not None and info["source_hash"] not in ("", _source_hash())
    return {
        "extension": "stale: csrc/ changed since it was built, run `make build`"
        if stale
        else "built",
        "cuda_kernels": _cuda_kernels(info),
        "compiler": info["compiler"],
        "openmp": info["openmp"],
        "isa": f"{info['isa']} (compiled: {info['isa_compiled']})",
    }


def _cuda_kernels(info: dict[str, str]) -> str:
    if "cuda_archs" not in info:
        return f"absent: {info.get('cuda_absent', 'no CUDA part')} when the extension was built"
    return f"{', '.join(info['cuda_archs'].split())}, compiled by nvcc {info['nvcc']}"


def _source_hash() -> str:
    """Digest of csrc/ as setup.py takes it at build time."""
    digest = hashlib.sha256()
    sources = (p for p in (ROOT / "csrc").rglob("*") if p.is_file() and p.suffix != ".pyc")
    for path in sorted(sources):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
