"""Times every path and setting of the Triton cp_linear beside the frozen GEMM, for the goal shapes.

    python -m bench.sweeps.cp_linear [--backward] [--shape 16384,768,64] [--top 8] [--specialize]

Per shape: the frozen GEMM and eager, then the whole forward with one kernel's settings varied at a
time, then every path with the best settings found. Each line is checked against fp64 on some rows
before it is timed (median of `triton.testing.do_bench`, which flushes L2). With --backward the same
for the gradients. Prints the overrides of the best choice as JSON. Kernels are compiled first, in
--jobs processes, since compiling takes longer than measuring.
"""

import argparse
import importlib
import json
import multiprocessing
import time
from collections.abc import Callable

import torch
import triton
from triton.testing import do_bench

from mmadapt.kernels.cp_linear.reference import cp_linear

# A sweep turns the screws that the public operator hides.
backend = importlib.import_module("mmadapt.ops._backends.triton.cp_linear")
override = importlib.import_module("mmadapt.ops._backends.triton._configs").override

GOALS = {(16384, 768, 64): 1.35, (8192, 4096, 64): 1.06}
BRIEF = {"warmup": 5, "rep": 20, "return_mode": "median"}
LONG = {"warmup": 25, "rep": 100, "return_mode": "median"}


class Problem:
    """bf16 operands of one weight, diagonal mode, no bias, and exact values of a few rows."""

    def __init__(self, tokens: int, dim: int, rank: int) -> None:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda").div(shape[-1] ** 0.5).bfloat16()

        torch.manual_seed(0)
        self.x = torch.randn(tokens, dim, device="cuda").bfloat16()
        self.dy = torch.randn(tokens, dim, device="cuda").bfloat16()
        self.weight, self.factor_in, self.factor_out = (
            draw(dim, dim),
            draw(rank, dim),
            draw(dim, rank),
        )
        self.mode = torch.randn(rank, device="cuda").bfloat16()
        self.shared = ([self.weight], [None], self.factor_in, self.factor_out, [self.mode])
        self.rows = torch.randint(tokens, (256,), device="cuda")
        self.exact = self.formula(self.x[self.rows].double(), torch.float64)
        self.eager_error = self.error(self.formula(self.x[self.rows], torch.bfloat16))
        self.z = (self.x @ self.factor_in.t()).contiguous()

    def formula(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        operands = (self.weight, self.factor_in, self.factor_out, self.mode)
        weight, factor_in, factor_out, mode = (t.to(dtype) for t in operands)
        return cp_linear(x, weight, None, factor_in, factor_out, mode)

    def error(self, rows: torch.Tensor) -> float:
        return ((rows.double() - self.exact).norm() / self.exact.norm()).item()

    def forward(self) -> torch.Tensor:
        ys, _ = backend.forward(self.x, *self.shared, None, 1.0, 0.0, "after")
        return ys[0]

    def backward(self) -> tuple:
        return backend.backward(
            [self.dy], self.x, *self.shared, self.z, None, 1.0, 0.0, "after", (True,) * 3,
            (True,), (False,),
        )  # fmt: skip

    def exact_gradients(self) -> list[torch.Tensor]:
        """dx of the checked rows, dfactor_in, dfactor_out, dmode, from the saved z, in fp64."""
        dy, z, mode = self.dy.double(), self.z.double(), self.mode.double()
        q = dy @ self.factor_out.double()
        dz = q * mode
        dx = dy[self.rows] @ self.weight.double() + dz[self.rows] @ self.factor_in.double()
        return [dx, dz.t() @ self.x.double(), dy.t() @ (z * mode), (z * q).sum(0)]


def timed(
    settings: dict,
    run: Callable[[], object],
    right: Callable[[], object],
    options: dict | None = None,
) -> float | str:
    """Milliseconds, or why there are none: settings that do not fit the chip are no error here."""
    try:
        with override(settings):
            if not right():
                return "WRONG"
            return do_bench(run, **options) if options else 0.0
    except (triton.runtime.OutOfResources, triton.CompilationError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"


def sweep(
    title: str,
    candidates: list[tuple[str, dict]],
    run: Callable[[], object],
    right: Callable[[], bool],
    unit: float,
    top: int,
    options: dict = BRIEF,
) -> dict:
    """Print the fastest and all failures; the settings of the fastest."""
    found = [(timed(s, run, right, options), name, s) for name, s in candidates]
    good = sorted((f for f in found if not isinstance(f[0], str)), key=lambda f: f[0])
    print(f"  {title}")
    for ms, name, _ in good[:top]:
        print(f"    {ms * 1e3:8.1f} us  {ms / unit:5.3f}x  {name}")
    for reason, name, _ in found:
        if isinstance(reason, str):
            print(f"    {'-':>8}            {name}  {reason}")
    return good[0][2] if good else {}


def named(kernel: str, space: list[dict], **paths: dict) -> list[tuple[str, dict]]:
    """Only what differs between the settings goes into the label."""
    keys = [k for k in {k: None for c in space for k in c} if len({c.get(k) for c in space}) > 1]
    fixed = {f"cp_linear.{name}": setting for name, setting in paths.items()}
    labels = [" ".join(f"{k}={c[k]}" for k in keys if k in c) for c in space]
    return [(label, {**fixed, kernel: c}) for label, c in zip(labels, space, strict=True)]


def spaces(specialize: bool) -> dict[str, list[dict]]:
    if specialize:
        return backend.SPACES
    return {n: [c for c in s if not c.get("specialize")] for n, s in backend.SPACES.items()}


def compile_part(shape: tuple, gradients: bool, specialize: bool, part: int, parts: int) -> None:
    """Run every parts-th setting once, which leaves its kernels in Triton's cache."""
    problem, space, todo = Problem(*shape), spaces(specialize), []
    run = problem.backward if gradients else problem.forward
    kernels = ("core_gradient", "factor_gradient", "fused_backward")
    for kernel in kernels if gradients else ("project", "fused", "owner"):
        number = {"fused": 1, "fused_backward": 1, "owner": 2}.get(kernel, 0)
        which = {"path": number, "gemm_first": 0, "overlap": 0}
        ways = [which] if gradients or number == 2 else [which, which | {"path": 1, "overlap": 1}]
        todo += [
            {"cp_linear.path": way, "cp_linear.path_backward": way, f"cp_linear.{kernel}": config}
            for way in ways
            for config in space[f"cp_linear.{kernel}"]
        ]
    for settings in todo[part::parts]:
        timed(settings, run, lambda: run() is not None)


def compile_all(shapes: list[tuple], gradients: bool, specialize: bool, jobs: int) -> None:
    start, context = time.time(), multiprocessing.get_context("spawn")
    each = max(1, jobs // len(shapes))
    workers = [
        context.Process(target=compile_part, args=(shape, gradients, specialize, part, each))
        for shape in shapes
        for part in range(each)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    print(f"compiled in {time.time() - start:.0f} s")


def forward(problem: Problem, unit: float, top: int, specialize: bool) -> dict:
    def right() -> bool:
        return problem.error(problem.forward()[problem.rows]) <= 1.5 * problem.eager_error

    def path(number: int) -> dict:
        return {"path": number, "gemm_first": 0, "overlap": 0}

    space, best, run = spaces(specialize), {}, problem.forward
    args = (run, right, unit, top)
    for kernel, number in (("project", 0), ("fused", 1), ("owner", 2)):
        name = f"cp_linear.{kernel}"
        candidates = [
            (label, {**best, **settings})
            for label, settings in named(name, space[name], path=path(number))
        ]
        best |= sweep(
            f"forward, {kernel} varied on path {backend.PATHS[number]}", candidates, *args
        )
    choices = [
        (" ".join(f"{k}={v}" for k, v in c.items()), {**best, "cp_linear.path": c})
        for c in space["cp_linear.path"]
    ]
    best |= sweep("forward, paths with the best parts", choices, *args, options=LONG)
    # What is best alone need not be best where projection and GEMM share the multiprocessors.
    chosen = best.get("cp_linear.path", path(0))
    if chosen["path"] == 1:
        for name in ("cp_linear.project", "cp_linear.fused"):
            again = [(label, {**best, name: s[name]}) for label, s in named(name, space[name])]
            best |= sweep(f"forward, {name} varied on the best path", again, *args)
    return best


def backward(problem: Problem, unit: float, top: int, specialize: bool) -> dict:
    exact = problem.exact_gradients()

    def right() -> bool:
        dx, dfactor_in, dfactor_out, (dmode,), _ = problem.backward()
        ours = [dx[problem.rows], dfactor_in, dfactor_out, dmode]
        return all(
            (a.double() - e).norm() <= 0.01 * e.norm() for a, e in zip(ours, exact, strict=True)
        )

    space, best, run = spaces(specialize), {}, problem.backward
    args = (run, right, unit, top)
    for kernel, number in (("core_gradient", 0), ("factor_gradient", 0), ("fused_backward", 1)):
        name = f"cp_linear.{kernel}"
        fixed = {"path": number, "gemm_first": 0}
        candidates = [
            (label, {**best, **settings})
            for label, settings in named(name, space[name], path_backward=fixed)
        ]
        best |= sweep(f"backward, {kernel} varied, path {backend.PATHS[number]}", candidates, *args)
    name = "cp_linear.path_backward"
    choices = [(label, {**best, **s}) for label, s in named(name, space[name])]
    return best | sweep("backward, paths with the best parts", choices, *args, options=LONG)


def baselines(problem: Problem, with_backward: bool) -> float:
    """Print what there is to beat; the frozen GEMM's milliseconds."""
    x, weight, factor_in, mode = problem.x, problem.weight, problem.factor_in, problem.mode
    frozen = do_bench(lambda: torch.mm(x, weight.t()), **LONG)
    lines = {
        "frozen GEMM": frozen,
        "eager": do_bench(lambda: problem.formula(x, torch.bfloat16), **LONG),
        "x factor_in^T by cuBLAS": do_bench(lambda: torch.mm(x, factor_in.t()), **LONG),
        "copy of x": do_bench(lambda: x.clone(), **LONG),
    }
    if with_backward:
        leaves = [t.clone().requires_grad_() for t in (x, factor_in, problem.factor_out, mode)]
        y = cp_linear(leaves[0], weight, None, *leaves[1:])
        lines["eager backward"] = do_bench(
            lambda: torch.autograd.grad(y, leaves, problem.dy, retain_graph=True), **LONG
        )
    for name, ms in lines.items():
        print(f"    {ms * 1e3:8.1f} us  {ms / frozen:5.3f}x  {name}")
    return frozen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backward", action="store_true", help="sweep the gradients instead")
    parser.add_argument("--shape", action="append", help="T,d,R; the goal shapes by default")
    parser.add_argument("--top", type=int, default=6, help="lines printed per table")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile; 0: none")
    parser.add_argument(
        "--specialize", action="store_true", help="also try specialised warps, which may hang"
    )
    given = parser.parse_args()
    shapes = [tuple(map(int, s.split(","))) for s in given.shape or ()] or list(GOALS)
    if given.jobs:
        compile_all(shapes, given.backward, given.specialize, given.jobs)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    for shape in shapes:
        problem = Problem(*shape)
        print(f"T, d, R = {shape}; goal {GOALS.get(shape, '-')}x the frozen GEMM, forward")
        unit = baselines(problem, given.backward)
        step = backward if given.backward else forward
        print("  best:", json.dumps(step(problem, unit, given.top, given.specialize)))


if __name__ == "__main__":
    main()
