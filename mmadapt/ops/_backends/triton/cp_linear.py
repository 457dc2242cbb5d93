"""`cp_linear` with Triton: one read of x for z and every core, then one of three ways to y.

- ``cublas``: ``y = c factor_out^T + b``, onto which cuBLAS accumulates the frozen product.
- ``fused``: one Triton GEMM whose accumulator takes the low-rank term after the frozen product.
- ``owner``: the same GEMM computes z too, from the tiles of x it holds anyway (one weight only).
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
import triton
from torch import Tensor

from mmadapt.kernels.common.device import on_device
from mmadapt.kernels.cp_linear import triton_backward as grad
from mmadapt.kernels.cp_linear.triton_gemm import gemm, gemm_with_projection
from mmadapt.kernels.cp_linear.triton_project import cores, project
from mmadapt.ops._allocate import cp_linear_gradients, cp_linear_outputs
from mmadapt.ops._backends.triton import _cp_linear_tuning
from mmadapt.ops._backends.triton._configs import tiles
from mmadapt.ops._backends.triton._device import INTERPRETED, dot_precision, unsupported_device

MAX_RANK = 128
PATHS = ("cublas", "fused", "owner")

_GEMM = {
    "bm": 128, "bn": 256, "bk": 64, "group": 8, "warps": 8, "stages": 3, "tma": 1, "halves": 0,
    "persistent": 0, "specialize": 0,
}  # fmt: skip
_OWNER = {
    "bm": 128, "bn": 256, "bk": 64, "cols": 1, "warps": 8, "stages": 3, "tma": 1, "halves": 0,
}  # fmt: skip


def _skinny(bm: int, bk: int, warps: int, stages: int) -> dict[str, int]:
    return {"bm": bm, "bk": bk, "warps": warps, "stages": stages}


_SKINNY = [
    _skinny(64, 64, 4, 4), _skinny(64, 64, 4, 6), _skinny(64, 128, 4, 3), _skinny(64, 128, 4, 4),
    _skinny(64, 128, 8, 4), _skinny(64, 256, 4, 3), _skinny(32, 128, 4, 4), _skinny(32, 256, 4, 3),
    _skinny(128, 64, 8, 4), _skinny(128, 128, 8, 3), _skinny(64, 128, 4, 4) | {"split": 2},
]  # fmt: skip
_GEMMS = [
    _GEMM,
    _GEMM | {"stages": 4},
    _GEMM | {"stages": 4, "halves": 1},
    _GEMM | {"bk": 32, "stages": 6},
    _GEMM | {"persistent": 1, "halves": 1},
    _GEMM | {"persistent": 1, "halves": 1, "group": 16},
    _GEMM | {"persistent": 1, "halves": 1, "specialize": 1},
    _GEMM | {"bn": 128, "stages": 4, "warps": 4},
    _GEMM | {"bn": 128, "stages": 4, "persistent": 1},
    _GEMM | {"bm": 256, "bn": 128},
    _GEMM | {"tma": 0},
    _GEMM | {"bn": 128, "bk": 128, "stages": 3},
]
SPACES: dict[str, list[dict[str, int]]] = {
    "cp_linear.path": [
        {"path": 0, "gemm_first": 0, "overlap": 0},
        {"path": 0, "gemm_first": 1, "overlap": 0},
        {"path": 1, "gemm_first": 0, "overlap": 0},
        {"path": 1, "gemm_first": 0, "overlap": 1},
        {"path": 2, "gemm_first": 0, "overlap": 0},
    ],
    "cp_linear.path_backward": [{"path": p, "gemm_first": g} for p, g in ((0, 0), (0, 1), (1, 0))],
    "cp_linear.project": _SKINNY,
    "cp_linear.fused": _GEMMS,
    "cp_linear.owner": [
        _OWNER | {"cols": cols, "stages": stages, "halves": halves}
        for cols in (1, 2, 3)
        for stages, halves in ((3, 0), (3, 1))
    ] + [
        _OWNER | {"bn": 128, "cols": cols, "stages": 4, "warps": warps}
        for cols in (1, 6)
        for warps in (4, 8)
    ],
    "cp_linear.core_gradient": _SKINNY,
    "cp_linear.fused_backward": _GEMMS,
    "cp_linear.factor_gradient": [
        {"bd": bd, "bt": bt, "warps": warps, "stages": stages}
        for bd, bt, warps, stages in (
            (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 4, 3), (128, 128, 8, 3),
            (64, 64, 4, 4), (64, 128, 4, 4), (64, 128, 4, 3), (256, 64, 8, 3), (256, 32, 8, 4),
        )
    ],
}  # fmt: skip
"""Settings worth trying, per kernel. Backward kernels and paths have their own entries."""


def unsupported(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factor_in: Tensor,
    factor_out: Tensor,
    modes: Sequence[Tensor],
) -> str | None:
    if factor_in.shape[0] > MAX_RANK:
        return f"R={factor_in.shape[0]} > {MAX_RANK}: the cores of a row tile do not fit"
    if x.dtype == torch.float32 and factor_in.shape[0] > 64 and any(m.ndim == 2 for m in modes):
        return f"fp32 products with a mode matrix of R={factor_in.shape[0]} > 64 do not fit"
    if 0 in factor_in.shape or 0 in factor_out.shape:
        return "d_in, d_out or R is 0"
    return unsupported_device("x", x)


def choose_path(
    tokens: int, dim_in: int, dim_out: int, rank: int, count: int, dtype: torch.dtype
) -> str:
    """Where no measured entry says otherwise.

    cuBLAS reaches more of the peak than a Triton GEMM at large d, where the second pass over y is a
    small share; at d <= 1024 that pass costs as much as a third of the frozen product. Few tokens
    leave most of the GPU idle without cuBLAS's splits of d_in, fp32 has no tensor cores here, and
    rows that are not multiples of 16 bytes cannot be described to the TMA unit.
    """
    small = max(dim_in, dim_out) <= 1024 and tokens >= 2048
    aligned = dim_in % 8 == 0 and dim_out % 8 == 0
    return "fused" if small and aligned and dtype != torch.float32 else "cublas"


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factor_in: Tensor,
    factor_out: Tensor,
    modes: Sequence[Tensor],
    seeds: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
) -> tuple[list[Tensor], Tensor]:
    ys, z = cp_linear_outputs(x, weights, factor_in)
    if x.shape[0] == 0:
        return ys, z
    drop = _dropout(seeds, dropout, dropout_at)
    weights = [w.to(x.dtype) for w in weights]
    path = _path("cp_linear.path", x, weights[0].shape[0], z.shape[1], len(weights))
    with on_device(x):
        if path["path"] == 2 and len(weights) == 1:
            gemm_with_projection(
                x, weights[0], factor_in.to(x.dtype), factor_out, modes[0], biases[0], seeds, z,
                ys[0], scale=scale, **drop, padded=_padded(z),
                tile=_tile("cp_linear.owner", x, _OWNER, x.shape[1], ys[0].shape[1], z.shape[1]),
                precision=dot_precision(x.dtype),
            )  # fmt: skip
            return ys, z
        overlap = path["path"] > 0 and bool(path["overlap"]) and _can_overlap(x)
        core = x.new_empty(len(weights), x.shape[0], _padded(z))
        project(
            x, factor_in, list(modes), seeds, z, core, scale=scale, **drop,
            tile=_skinny_tile("cp_linear.project", x, z.shape[1], any(m.ndim == 2 for m in modes)),
            precision=dot_precision(x.dtype), overlap=overlap and len(weights) == 1,
        )  # fmt: skip
        for weight, bias, c, y in zip(weights, biases, core, ys, strict=True):
            if path["path"] > 0:
                _fused(
                    "cp_linear.fused", x, weight, c, factor_out, bias, y, True,
                    overlap and len(weights) == 1,
                )  # fmt: skip
            else:
                accumulate([x], [weight.t()], c, factor_out.t(), bias, y, bool(path["gemm_first"]))
    return ys, z


def backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    factor_in: Tensor,
    factor_out: Tensor,
    modes: Sequence[Tensor],
    z: Tensor,
    seeds: Tensor | None,
    scale: float,
    dropout: float,
    dropout_at: str,
    needs: tuple[bool, bool, bool],
    needs_modes: tuple[bool, ...],
    needs_biases: tuple[bool, ...],
    *,
    input_gradient: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """See the reference backend. `input_gradient`: what another backend has for the one here."""
    grads = cp_linear_gradients(
        x, factor_in, factor_out, modes, biases, needs, needs_modes, needs_biases
    )
    dx, dfactor_in, dfactor_out, dmodes, dbiases = grads
    if x.shape[0] == 0:
        for tensor in (dx, dfactor_in, dfactor_out, *dmodes, *dbiases):
            tensor.zero_()
        return grads
    drop = _dropout(seeds, dropout, dropout_at)
    with on_device(x):
        dz, core = _core_gradients(
            dys, factor_out, modes, z, seeds, scale, drop, dmodes, needs, needs_modes
        )
        if needs[2]:
            _factor_gradient(list(dys), list(core), dfactor_out, False, dbiases, needs_biases)
        for dy, dbias, needed in zip(dys, dbiases, needs_biases, strict=True):
            if needed and not needs[2]:
                dbias.copy_(dy.sum(0, dtype=torch.float32))
        if needs[1]:
            _factor_gradient([x], [dz], dfactor_in, True, [], ())
        if needs[0]:
            weights = [w.to(x.dtype) for w in weights]
            (input_gradient or _input_gradient)(list(dys), weights, dz, factor_in, dx)
    return grads


def _input_gradient(
    dys: list[Tensor], weights: list[Tensor], dz: Tensor, factor_in: Tensor, dx: Tensor
) -> None:
    """``dx = sum_k dy_k W_k + dz factor_in``; dz ``[T, RP]`` with zeros in the padded ranks."""
    rank = factor_in.shape[0]
    path = _path("cp_linear.path_backward", dx, dys[0].shape[1], rank, len(dys))
    if path["path"] > 0:
        _fused(
            "cp_linear.fused_backward", dys[0], weights[0], dz, factor_in, None, dx, False, False
        )
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
    else:
        accumulate(dys, weights, dz, factor_in, None, dx, bool(path["gemm_first"]))


def _core_gradients(
    dys, factor_out, modes, z, seeds, scale, drop, dmodes, needs, needs_modes
) -> tuple[Tensor | None, Tensor | None]:
    """dz ``[T, RP]`` and the cores ``[K, T, RP]``, where somebody needs them; fills the dmodes."""
    count, tokens, padded = len(dys), z.shape[0], _padded(z)
    needs_dz = needs[0] or needs[1]
    core = z.new_empty(count, tokens, padded) if needs[2] else None
    dz = z.new_empty(tokens, padded) if needs_dz else None
    if not (needs_dz or any(needs_modes)):
        if needs[2]:
            cores(list(modes), seeds, z, core, scale=scale, **drop)
        return dz, core
    several = needs_dz and count > 1
    dz_sum = z.new_empty(tokens, padded, dtype=torch.float32) if several else None
    for k, dy in enumerate(dys):
        if not (needs_dz or needs[2] or needs_modes[k]):
            continue
        partial = grad.core_gradient(
            dy, factor_out, modes[k], None if seeds is None else seeds[k:], z, dz_sum=dz_sum,
            dz=dz, core=None if core is None else core[k], needs_mode=needs_modes[k],
            first=k == 0, last=k == count - 1, padded=padded, scale=scale, **drop,
            tile=_skinny_tile("cp_linear.core_gradient", dy, z.shape[1], modes[k].ndim == 2),
            precision=dot_precision(dy.dtype),
        )  # fmt: skip
        if partial is not None:
            grad.reduce(partial, dmodes[k])
    return dz, core


def _factor_gradient(wide, thin, out, transposed, dbiases, needs_biases) -> None:
    """``sum_k wide_k^T thin_k`` into `out` and the column sums of wide_k into the wanted biases."""
    (tokens, dim), padded = wide[0].shape, thin[0].shape[1]
    half = wide[0].dtype != torch.float32
    default = {"bd": 128 if half else 64, "bt": 64 if half else 32, "warps": 4, "stages": 3}
    tile = _tile("cp_linear.factor_gradient", wide[0], default, dim, out.shape[int(transposed) ^ 1])
    # About two programs per SM of a large GPU; the chunk is a power of two, since kernels are
    # compiled for it.
    wanted = triton.cdiv(256, triton.cdiv(dim, tile["bd"]))
    chunk = max(tile["bt"], triton.next_power_of_2(triton.cdiv(tokens, wanted)))
    chunks = triton.cdiv(tokens, chunk)
    partial = out.new_empty(len(wide) * chunks, dim, padded, dtype=torch.float32)
    for k, (a, b) in enumerate(zip(wide, thin, strict=True)):
        bias = None
        if any(needs_biases[k : k + 1]):
            bias = out.new_empty(chunks, dim, dtype=torch.float32)
        grad.factor_partials(
            a, b, partial[k * chunks :][:chunks], bias, tile=tile, chunk=chunk,
            precision=dot_precision(a.dtype),
        )  # fmt: skip
        if bias is not None:
            grad.reduce(bias[:, None], dbiases[k])
    grad.reduce(partial, out, transposed=transposed)


def accumulate(
    inputs: list[Tensor],
    weights: list[Tensor],
    core: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    y: Tensor,
    gemm_first: bool,
) -> None:
    """``y = sum inputs weights + core factor + bias`` by cuBLAS, `weights` and `factor` ``[*, n]``.

    The low-rank term goes first: the GEMM that accumulates onto it reads y while it multiplies
    (439 against 459 microseconds at 8192 x 4096, R = 64 on an H200).
    """
    core, factor = core[:, : factor.shape[0]], factor.to(y.dtype)
    terms = [(core, factor), *zip(inputs, weights, strict=True)]
    if gemm_first:
        terms = [*terms[1:], terms[0]]
    if bias is None:
        torch.mm(*terms[0], out=y)
    else:
        torch.addmm(bias.to(y.dtype), *terms[0], out=y)
    for term in terms[1:]:
        y.addmm_(*term)


def _fused(name, a, weight, core, factor, bias, y, forward, overlap) -> None:
    rank = factor.shape[1 if forward else 0]
    gemm(
        a, weight, core, factor, bias, y, forward=forward,
        tile=_tile(name, a, _GEMM, a.shape[1], y.shape[1], rank),
        precision=dot_precision(a.dtype), programs=_programs(a.device), overlap=overlap,
    )  # fmt: skip


def _path(name: str, x: Tensor, dim_out: int, rank: int, count: int) -> Mapping[str, int]:
    tokens, dim_in = x.shape
    chosen = PATHS.index(choose_path(tokens, dim_in, dim_out, rank, count, x.dtype))
    default = {"path": chosen, "gemm_first": 0, "overlap": 0}
    found = tiles(name, x, default, T=tokens, d_in=dim_in, d_out=dim_out, R=rank, K=count)
    return {**default, **found}


def _tile(name: str, x: Tensor, default: Mapping[str, int], *dims: int) -> Mapping[str, int]:
    """`dims`: d or d_in, then d_out, then R."""
    names = ("d", "R") if len(dims) == 2 else ("d_in", "d_out", "R")
    sizes = dict(zip(names, dims, strict=True))
    return {**default, **tiles(name, x, default, T=x.shape[0], **sizes)}


def _skinny_tile(name: str, x: Tensor, rank: int, dense: bool) -> Mapping[str, int]:
    """Tiles of a product ``[T, d] x [d, R]``; d is split until the programs fill a large GPU.

    A mode matrix costs registers: with 8 warps its products stay in them up to R = 64, beyond that
    with few rows.
    """
    tokens, dim = x.shape
    half = x.dtype != torch.float32
    bm, warps, stages = (64, 4, 4) if half else (32, 4, 2)
    if dense and rank > 64:
        bm, warps, stages = 16, 8, 3
    elif dense and rank > 32:
        bm, warps = 64 if half else 16, 8
    elif rank > 64:
        warps = 8
    bm = min(bm, max(16, triton.next_power_of_2(tokens)))
    bk = 128 if half and dim > 1024 and rank <= 64 else 64
    bk = min(bk, max(16, triton.next_power_of_2(dim)))
    tile = dict(_tile(name, x, _skinny(bm, bk, warps, stages), dim, rank))
    if "split" not in tile:
        blocks, split = triton.cdiv(tokens, tile["bm"]), 1
        while blocks * split < 96 and split * 4 * tile["bk"] <= dim:
            split *= 2
        tile["split"] = split
    return tile


def _dropout(seeds: Tensor | None, dropout: float, dropout_at: str) -> dict[str, object]:
    return {
        "threshold": round(dropout * (1 << 24)),
        "kept": 1.0 / (1.0 - dropout),
        "dropout": "none" if seeds is None else dropout_at,
    }


def _padded(z: Tensor) -> int:
    """Ranks of the scratch buffers: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(z.shape[1]))


def _can_overlap(x: Tensor) -> bool:
    """Overlapped launches came with Hopper; the interpreter has none."""
    return not INTERPRETED and torch.cuda.get_device_capability(x.device) >= (9, 0)


@functools.cache
def _programs(device: torch.device) -> int:
    """Of a persistent kernel; what they compute does not depend on it."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def tuning_targets(size: tuple[int, int, int], dtype: torch.dtype, device: str):
    """What `mmadapt.ops.tune` walks for a problem of (tokens, d, rank)."""
    return _cp_linear_tuning.tuning_targets(sys.modules[__name__], size, dtype, device)
