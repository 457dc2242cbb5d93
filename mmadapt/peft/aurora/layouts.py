"""From contracted modes to the operands of `mmadapt.ops.cp_linear`, by kind of weight.

A weight that is m times as high or wide as the factors stands for m square ones, its chunks, with a
mode vector each. ``N[j]`` below is the contracted mode of vector j, ``[R, R]`` or, for a diagonal
core, its diagonal ``[R]``.
"""

import torch
from torch import Tensor


def chunk_modes(contracted: Tensor, kind: str, layout: str) -> list[Tensor]:
    """One operator mode per chunk; ``M`` of ``x -> (x factor_in^T) M factor_out^T``.

    In an FFN (`"up"`, `"down"`) with the released layout the last two axes of ``N[a, b, j]`` are
    flattened and read again as m groups of R: ``F_g[a, b'] = N[j][a, b]`` with
    ``m b + j = R g + b'``. The second weight applies the transpose, from the second core axis to
    the first.

    Args:
        contracted: ``[m, R, R]``, or ``[m, R]`` of a diagonal core.
    """
    if kind in ("linear", "fused") or layout == "clean":
        return list(contracted.unbind(0))
    if contracted.ndim == 2:
        contracted = torch.diag_embed(contracted)
    chunks, rank, _ = contracted.shape
    groups = contracted.permute(1, 2, 0).reshape(rank, chunks, rank).unbind(1)
    return [group.t() for group in groups] if kind == "down" else list(groups)


def tall_factor(factor_out: Tensor, modes: list[Tensor]) -> Tensor:
    """The modes of stacked weights folded into the second factor: ``[m d, R]``."""
    # Chunk g adds (x factor_in^T) M_g factor_out^T = (x factor_in^T) (factor_out M_g^T)^T.
    with torch.autocast(factor_out.device.type, enabled=False):
        return torch.cat([factor_out * m if m.ndim == 1 else factor_out @ m.t() for m in modes])


def wide_factor(factor_in: Tensor, modes: list[Tensor]) -> Tensor:
    """The modes of weights side by side folded into the first factor: ``[R, m d]``."""
    # Chunk g adds (x_g factor_in^T) M_g factor_out^T = x_g (M_g^T factor_in)^T factor_out^T.
    with torch.autocast(factor_in.device.type, enabled=False):
        parts = [factor_in * m[:, None] if m.ndim == 1 else m.t() @ factor_in for m in modes]
        return torch.cat(parts, dim=1)
