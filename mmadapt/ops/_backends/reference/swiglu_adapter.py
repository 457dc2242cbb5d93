"""`swiglu_adapter` in plain torch: the formula of `mmadapt.kernels`, with an explicit backward.

Everything is computed in the accumulation dtype (fp32, or fp64 for fp64) and rounded once.
"""

import torch
from torch import Tensor

from mmadapt.ops._allocate import swiglu_adapter_gradients, swiglu_adapter_outputs
from mmadapt.ops._backends.reference._rows import Rows
from mmadapt.ops._checks import accumulation_dtype


def unsupported(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
) -> str | None:
    return None


def forward(
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(x.dtype)
    y, zg, zd, rstd = swiglu_adapter_outputs(x, gate, norm_weight)
    if norm_weight is not None:
        torch.rsqrt(x.to(acc).square().mean(-1) + eps, out=rstd)
    n = _normalised(x, norm_weight, rstd, acc)
    zg.zero_()
    zd.zero_()
    delta = n.new_zeros(n.shape)
    for e, rows in _routes(expert, gate.shape[0]):
        picked = rows.take(n)
        gate_e, down_e, up_e = (w.to(acc) for w in (gate[e], down[e], up[e % up.shape[0]]))
        pre_gate, pre_down = picked @ gate_e.t(), picked @ down_e.t()
        rows.put(zg, pre_gate)
        rows.put(zd, pre_down)
        rows.put(delta, (torch.nn.functional.silu(pre_gate) * pre_down) @ up_e.t())
    if residual == "none":
        torch.mul(delta, scale, out=y)
    else:
        torch.add(x.to(acc) if residual == "input" else n, delta, alpha=scale, out=y)
    return y, zg, zd, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    down: Tensor,
    up: Tensor,
    expert: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    zg: Tensor,
    zd: Tensor,
    rstd: Tensor,
    residual: str,
    scale: float,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(x.dtype)
    dx, dgate, ddown, dup, dnorm = swiglu_adapter_gradients(x, gate, down, up, norm_weight, needs)
    n = _normalised(x, norm_weight, rstd, acc)
    dy = dy.to(acc)
    dn = dy.clone() if residual == "norm" else torch.zeros_like(n)
    up_sums = torch.zeros(up.shape, dtype=acc, device=up.device)
    wants_dn = needs[0] or needs[4]
    for e, rows in _routes(expert, gate.shape[0]):
        z_gate, z_down, grad = (rows.take(t).to(acc) for t in (zg, zd, dy))
        sigma = torch.sigmoid(z_gate)
        silu = z_gate * sigma
        shared = e % up.shape[0]
        if needs[3]:
            up_sums[shared].addmm_(grad.t(), silu * z_down, alpha=scale)
        dp = scale * (grad @ up[shared].to(acc))
        dz_down = dp * silu
        dz_gate = dp * z_down * sigma * (1 + z_gate * (1 - sigma))
        if needs[1]:
            dgate[e] = dz_gate.t() @ rows.take(n)
        if needs[2]:
            ddown[e] = dz_down.t() @ rows.take(n)
        if wants_dn:
            through = dz_gate @ gate[e].to(acc) + dz_down @ down[e].to(acc)
            rows.put(dn, through + grad if residual == "norm" else through)
    if needs[3]:
        dup.copy_(up_sums)
    _through_norm(dn, dy, x, norm_weight, rstd, residual, needs, dx, dnorm)
    return dx, dgate, ddown, dup, dnorm


def _routes(expert: Tensor | None, num_experts: int):
    if expert is None:
        return [(0, Rows(None))]
    return [(e, Rows(expert == e)) for e in range(num_experts)]


def _normalised(x: Tensor, norm_weight: Tensor | None, rstd: Tensor, acc: torch.dtype) -> Tensor:
    if norm_weight is None:
        return x.to(acc)
    # LLaMA rounds to the activation dtype before the weight is applied.
    return (x.to(acc) * rstd.unsqueeze(-1)).to(x.dtype).to(acc) * norm_weight.to(acc)


def _through_norm(
    dn: Tensor,
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    rstd: Tensor,
    residual: str,
    needs: tuple[bool, bool, bool, bool, bool],
    dx: Tensor,
    dnorm: Tensor,
) -> None:
    """Finish dx and dnorm from dn, the gradient of the normalised stream."""
    if norm_weight is not None and (needs[0] or needs[4]):
        rstd = rstd.unsqueeze(-1)
        unit = x.to(dn.dtype) * rstd
        if needs[4]:
            dnorm.copy_((dn * unit).sum(0))
        weighted = dn * norm_weight.to(dn.dtype)
        dn = rstd * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))
    if needs[0]:
        dx.copy_(dn + dy if residual == "input" else dn)
