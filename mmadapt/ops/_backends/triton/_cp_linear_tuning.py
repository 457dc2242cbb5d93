"""What the tuner walks for `cp_linear`: every kernel alone, on the path that launches it."""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from mmadapt.ops._backends.triton._configs import override

_PATH_OF = {"project": 0, "fused": 1, "owner": 2, "fused_backward": 1}
_SKINNY = ("project", "core_gradient", "factor_gradient")


def tuning_targets(
    backend: ModuleType, size: tuple[int, int, int], dtype: torch.dtype, device: str
) -> Iterator[tuple]:
    """(kernel, dims, candidates, run) for one d x d weight of (tokens, d, rank), diagonal mode.

    Warp specialisation is left out: the compilers served here are known to get it wrong.
    """
    tokens, dim, rank = size

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype)

    x, dy = (torch.randn(tokens, dim, device=device).to(dtype) for _ in range(2))
    shared = ([draw(dim, dim)], [None], draw(rank, dim), draw(dim, rank), [draw(rank)])
    z = x @ shared[2].t()
    settings = (None, 1.0, 0.0, "after")

    def forward() -> list[Tensor]:
        ys, saved = backend.forward(x, *shared, *settings)
        return [*ys, saved]

    def backward() -> list[Tensor]:
        *grads, dmodes, _ = backend.backward(
            [dy], x, *shared, z, *settings, (True,) * 3, (True,), (False,)
        )
        return [*grads, *dmodes]

    for name, space in backend.SPACES.items():
        kernel = name.removeprefix("cp_linear.")
        run = backward if "backward" in kernel or "gradient" in kernel else forward
        dims = {"T": tokens, "d": dim, "R": rank}
        if kernel not in _SKINNY:
            dims = {"T": tokens, "d_in": dim, "d_out": dim, "R": rank}
        if "path" in kernel:
            yield name, dims | {"K": 1}, space, run
            continue
        forced = {"path": _PATH_OF.get(kernel, 0), "gemm_first": 0, "overlap": 0}
        paths = {"cp_linear.path": forced, "cp_linear.path_backward": forced}

        def on_its_path(run=run, paths=paths) -> list[Tensor]:
            with override(paths):
                return run()

        candidates = [config for config in space if not config.get("specialize")]
        yield name, dims, candidates, on_its_path
