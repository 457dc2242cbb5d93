"""Problems of swiglu_adapter: their exact results, and what the emulated kernels make of them."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from mmadapt.kernels.swiglu_adapter import reference

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # mmadapt_dtype
RESIDUALS = {"none": 0, "input": 1, "norm": 2}  # mmadapt_residual
EPS, SCALE = 1e-6, 0.7
GUARD = 64
"""Numbers in front of and behind every output that must stay as they were."""


class Status(ctypes.Structure):
    """mmadapt_cuda_status."""

    _fields_ = (
        ("status", c_int32), ("error", c_int32), ("earlier", c_int32), ("kernel", c_char_p)
    )  # fmt: skip


def _fields(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


class Call(ctypes.Structure):
    """mmadapt_swiglu_adapter_gpu."""

    _fields_ = (
        ("tokens", c_int64),
        *_fields(c_int32, "dim rank experts up_experts dtype weight_dtype norm_dtype residual"),
        *_fields(c_float, "scale eps"),
        *_fields(c_int32, "cluster rows stages"),
        *_fields(c_void_p, "x gate down up expert norm_weight packed stream"),
    )


class Forward(ctypes.Structure):
    """mmadapt_swiglu_adapter_forward_gpu."""

    _fields_ = (("problem", Call), *_fields(c_void_p, "y zg zd rstd"))


class Dx(ctypes.Structure):
    """mmadapt_swiglu_adapter_dx_gpu."""

    _fields_ = (
        ("problem", Call),
        *_fields(c_void_p, "dy zg zd rstd dx dz h"),
        *_fields(c_int32, "dz_experts h_experts"),
    )


class EmulationError(RuntimeError):
    """A launch that was refused, or a rule that the kernel broke."""


@dataclass
class Case:
    """One call. experts 0: rows have none. They come in runs of `runs` rows."""

    tokens: int
    dim: int
    rank: int
    cluster: int
    rows: int
    experts: int = 0
    shared_up: bool = False
    norm: bool = False
    residual: str = "input"
    runs: int = 7
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in changed)


class Problem:
    """Operands of a case, and in fp64 what should come out."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        random = torch.Generator().manual_seed(seed)
        experts = max(case.experts, 1)
        ups = 1 if case.shared_up else experts

        def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=random) * scale).to(dtype)

        rows, wide, narrow = case.tokens, case.dim**-0.5, case.rank**-0.5
        self.x = draw(rows, case.dim, dtype=case.dtype)
        self.dy = draw(rows, case.dim, dtype=case.dtype)
        self.gate = draw(experts, case.rank, case.dim, dtype=case.weight_dtype, scale=wide)
        self.down = draw(experts, case.rank, case.dim, dtype=case.weight_dtype, scale=wide)
        self.up = draw(ups, case.dim, case.rank, dtype=case.weight_dtype, scale=narrow)
        self.weight = 0.5 + torch.rand(case.dim, generator=random) if case.norm else None
        self.expert = None
        if case.experts:
            ids = torch.randint(-1, experts, (rows // case.runs + 1,), generator=random)
            self.expert = ids.repeat_interleave(case.runs)[:rows].int()
        self._solve()

    def _solve(self) -> None:
        case = self.case
        x, dy = self.x.double(), self.dy.double()
        weight = None if self.weight is None else self.weight.double()
        # The kernels multiply by weights in 16 bits, the norm's multiplied into gate and down.
        by = 1.0 if self.weight is None else self.weight
        gate, down = ((t * by).to(case.dtype).double() / by for t in (self.gate, self.down))
        up = self.up.to(case.dtype).double()
        norm = None if weight is None else (weight, EPS)
        x.requires_grad_()
        settings = {"expert": self.expert, "norm": norm, "residual": case.residual, "scale": SCALE}
        y = reference.swiglu_adapter(x, gate, down, up, **settings)
        (dx,) = torch.autograd.grad(y, x, dy)
        rstd = torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + EPS)
        n = x.detach() if weight is None else x.detach() * rstd * weight
        # Of each row, its expert's z; h and the gradient of z follow from z as it is saved.
        ids = torch.zeros(case.tokens) if self.expert is None else self.expert
        own = torch.stack([ids == e for e in range(gate.shape[0])], 1).double()  # [T, E]
        z = [torch.einsum("te,emd,td->tm", own, factor, n) for factor in (gate, down)]
        self.zg, self.zd = (t.to(case.dtype) for t in z)
        zg, zd = (t.double().requires_grad_() for t in (self.zg, self.zd))
        hidden = torch.nn.functional.silu(zg) * zd
        each_up = up.expand(gate.shape[0], *up.shape[1:])
        dh = SCALE * torch.einsum("te,edm,td->tm", own, each_up, dy)
        dz = torch.stack(torch.autograd.grad(hidden, (zg, zd), dh))
        spread = own[:, :, None] * hidden.detach()[:, None] * SCALE  # [T, E, m]
        if weight is not None:
            dz = dz * rstd
        self.rstd = None if weight is None else rstd.float()
        self.exact = {
            "forward": {"y": y.detach(), "zg": z[0], "zd": z[1]},
            "dx": {
                "dx": dx,
                "dz": own[:, :, None] * dz[:, :, None],
                "h": spread if up.shape[0] > 1 else spread.sum(1, keepdim=True),
            },
        }
        if weight is not None:
            self.exact["forward"]["rstd"] = rstd

    def off(self, direction: str, results: dict[str, Tensor]) -> list[str]:
        """Which results differ from the exact ones by more than 16-bit operands explain."""
        unit = torch.finfo(self.case.dtype).eps
        wrong = []
        for name, exact in self.exact[direction].items():
            allowed = 4 * unit * (exact.abs() + exact.square().mean().sqrt()) + 1e-7
            error = (results[name].double() - exact).abs() / allowed
            if not bool((error <= 1).all()):  # NaN is off too
                place = int(error.nan_to_num(torch.inf).argmax())
                wrong.append(f"{name}, at {place} of {tuple(exact.shape)}")
        return wrong


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


class Outputs:
    """Results between guards, all NaN at first."""

    def __init__(self, exact: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.guarded, self.results = {}, {}
        for name, like in exact.items():
            kept = torch.float32 if name == "rstd" else dtype
            flat = torch.full((like.numel() + 2 * GUARD,), torch.nan, dtype=kept)
            self.guarded[name], self.results[name] = flat, flat[GUARD:-GUARD].view(like.shape)

    def address(self, name: str) -> int | None:
        return _address(self.results.get(name))

    def overrun(self) -> list[str]:
        return [
            f"{name}, guard"
            for name, flat in self.guarded.items()
            if not bool(torch.cat((flat[:GUARD], flat[-GUARD:])).isnan().all())
        ]


class Kernels:
    """A library made by build.py."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.machine_message.restype = c_char_p
        self.library.machine_seed.argtypes = [c_uint64]

    def plant(self, fault: int) -> None:
        c_int32.in_dll(self.library, "machine_planted").value = fault

    def run(self, direction: str, problem: Problem, seed: int) -> Outputs:
        """The outputs of a direction under the schedule of a seed."""
        p, case = problem, problem.case
        packed = torch.full((2 * p.gate.numel() + p.up.numel(),), torch.nan, dtype=case.dtype)
        call = Call(
            case.tokens, case.dim, case.rank, p.gate.shape[0], p.up.shape[0], DTYPES[case.dtype],
            DTYPES[case.weight_dtype], DTYPES[torch.float32], RESIDUALS[case.residual], SCALE, EPS,
            case.cluster, case.rows, 0, *map(_address, (p.x, p.gate, p.down, p.up, p.expert)),
            _address(p.weight), _address(packed), None,
        )  # fmt: skip
        out = Outputs(p.exact[direction], case.dtype)
        if direction == "forward":
            arguments = Forward(call, *map(out.address, ("y", "zg", "zd", "rstd")))
        else:
            saved = map(_address, (p.dy, p.zg, p.zd, p.rstd))
            spread = (p.exact["dx"][name].shape[-2] for name in ("dz", "h"))
            arguments = Dx(call, *saved, *map(out.address, ("dx", "dz", "h")), *spread)
        function = getattr(self.library, f"mmadapt_swiglu_adapter_{direction}_cuda")
        function.restype, function.argtypes = Status, [POINTER(type(arguments))]
        self.library.machine_seed(seed)
        status = function(byref(arguments))
        if status.status != 0:
            message = self.library.machine_message().decode() or status.kernel.decode()
            raise EmulationError(f"{direction}, seed {seed}, {case}: {message}")
        return out

    def check(self, direction: str, problem: Problem, seeds: range) -> None:
        """Every schedule gives the same bits, near the exact results, and nothing beside them."""
        first: dict[str, Tensor] | None = None
        for seed in seeds:
            out = self.run(direction, problem, seed)
            wrong = out.overrun() + problem.off(direction, out.results)
            first = first or out.results
            wrong += [
                f"{name}, bits" for name, t in first.items() if not t.equal(out.results[name])
            ]
            if wrong:
                raise EmulationError(
                    f"{direction}, seed {seed}, {problem.case}: off: {'; '.join(wrong)}"
                )
