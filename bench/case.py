"""A case: one problem, its tensors, and one factory that makes every provider's call.

`Case.make(provider, kind)` is what the correctness gate, the timers and the memory probes all run,
so that they cannot measure different things.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmadapt.ops import backends

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
KINDS = (FORWARD, BOTH)
"""What is timed unless something else is asked for."""
ALL_KINDS = (FORWARD, BACKWARD, BOTH)
ELEMENT = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class Provider:
    """One way to compute a case: called with the case's tensors by name, returns y or a tuple."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    gated: bool = True
    """False for a yardstick that computes something else (a copy, the frozen product alone)."""
    kinds: tuple[str, ...] = ALL_KINDS
    skip: str | None = None
    """Why it cannot run here."""
    compiled: bool = False
    optional: bool = False
    """Only run when it is named, because it takes long to start."""
    overwrites: tuple[str, ...] = ()
    """Activations that a call destroys; it gets clones of its own, made before it is timed."""


NOT_ON_CPU = {
    "cuda": "needs a GPU",
    "triton": "on CPU tensors it runs in Triton's interpreter, for tests only",
}
NOT_ON_GPU = {"cpu": "takes CPU tensors alone"}


def of_backend(
    op: str, backend: str, function: Callable[..., Tensor], device: torch.device | None = None
) -> Provider:
    """mmadapt's own operator with one backend named, or why that backend is missing."""
    reason = backends(op)[backend]
    if reason is None and device is not None:
        reason = (NOT_ON_CPU if device.type == "cpu" else NOT_ON_GPU).get(backend)
    return Provider(function, skip=reason)


def registered(
    op: str, operator: Callable[[str], Callable[..., Tensor]], device: torch.device
) -> dict[str, Provider]:
    """mmadapt's operator with each backend of the registry; `operator` takes the name."""
    return {name: of_backend(op, name, operator(name), device) for name in backends(op)}


def compiled(function: Callable[..., Tensor], **options: str | bool) -> Provider:
    """`torch.compile` in its default mode, for exactly these shapes."""
    return Provider(torch.compile(function, dynamic=False, **options), compiled=True)


def compiled_both(function: Callable[..., Tensor]) -> dict[str, Provider]:
    """`torch.compile` in its default mode and, only if named, with GEMMs tuned."""
    tuned = compiled(function, mode="max-autotune-no-cudagraphs")
    return {
        "compile": compiled(function),
        "compile-max": dataclasses.replace(tuned, optional=True),
    }


def copy_of(name: str) -> Provider:
    """``y.copy_(x)`` of the activation `name`: what an op that reads x and writes y must cost."""

    def copy(**tensors: Tensor) -> Tensor:
        x = tensors[name].detach()
        return torch.empty_like(x).copy_(x)

    return Provider(copy, gated=False)


@dataclass
class Case:
    """Tensors in groups, because each is treated differently.

    Attributes:
        activations: ``[T, ...]``, differentiated, rotated: every call of a timed sequence reads
            another clone, so that none finds its input in L2.
        parameters: trained weights, differentiated, the same in every call.
        per_token: ``[T]`` integers and masks; frozen: weights without gradient. Same in every call.
        exact: the formula of `mmadapt.kernels`, called with fp64 tensors a chunk of rows at a time.
        eager: the provider whose error against fp64 sets the bound of the others'.
        moved, flops: algorithmic bytes and floating-point operations of each kind.
    """

    suite: str
    label: str
    shape: Mapping[str, int | str]
    dtype: torch.dtype
    activations: dict[str, Tensor]
    parameters: dict[str, Tensor]
    providers: dict[str, Provider]
    exact: Callable[..., Tensor | tuple[Tensor, ...]]
    moved: Mapping[str, float]
    flops: Mapping[str, float]
    eager: str = "eager"
    per_token: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    slots: list[dict[str, Tensor]] = field(default_factory=list)
    dys: list[tuple[Tensor, ...]] = field(default_factory=list)

    def __post_init__(self):
        for tensor in (*self.activations.values(), *self.parameters.values()):
            tensor.requires_grad_()
        self.slots = [self.activations]
        with torch.no_grad():
            ys = as_tuple(self.providers[self.eager].function(**self.tensors(0)))
        generator = torch.Generator(ys[0].device).manual_seed(1)
        self.dys = [
            tuple(
                torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in ys
            )
        ]

    @property
    def tokens(self) -> int:
        return next(iter(self.activations.values())).shape[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.activations.values())).device

    def tensors(self, slot: int) -> dict[str, Tensor]:
        return {**self.slots[slot], **self.parameters, **self.per_token, **self.frozen}

    def inputs(self, provider: str) -> list[dict[str, Tensor]]:
        """The tensors of every slot, with fresh clones of what the provider overwrites."""
        overwritten = self.providers[provider].overwrites
        return [
            {
                n: t.detach().clone().requires_grad_() if n in overwritten else t
                for n, t in self.tensors(slot).items()
            }
            for slot in range(len(self.slots))
        ]

    def result_names(self, kind: str) -> list[str]:
        count = len(self.dys[0])
        outputs = ["y"] if count == 1 else [f"y{i}" for i in range(count)]
        gradients = [f"d{n}" for n in (*self.activations, *self.parameters)]
        return {FORWARD: outputs, BACKWARD: gradients, BOTH: outputs + gradients}[kind]

    def cost(self, kind: str) -> tuple[float, float]:
        """Algorithmic bytes and floating-point operations."""
        if kind == BACKWARD:
            return tuple(c[BOTH] - c[FORWARD] for c in (self.moved, self.flops))
        return self.moved[kind], self.flops[kind]

    def rotate(self, kind: str, least_bytes: int) -> None:
        """Clone what is rotated until the clones of `kind` hold `least_bytes`, at least twice."""
        tensors = [*self.slots[0].values(), *(self.dys[0] if kind != FORWARD else ())]
        wanted = max(2, math.ceil(least_bytes / sum(t.nbytes for t in tensors)))
        while len(self.slots) < wanted:
            self.slots.append(
                {n: t.detach().clone().requires_grad_() for n, t in self.slots[0].items()}
            )
            self.dys.append(tuple(dy.clone() for dy in self.dys[0]))

    def make(self, provider: str, kind: str) -> Callable[[int], list[Tensor | None]]:
        """A call on the tensors of a slot; returns outputs, then (with backward) gradients.

        Forward runs without autograd. Forward and backward differentiates a fresh forward with
        respect to every activation and parameter; None for what a yardstick does not use. Backward
        alone runs a slot's forward in its first call and differentiates that again in every call.
        """
        function, inputs = self.providers[provider].function, self.inputs(provider)
        if kind == FORWARD:

            def forward(slot: int) -> list[Tensor | None]:
                with torch.no_grad():
                    return list(as_tuple(function(**inputs[slot])))

            return forward

        def gradients(slot: int, ys: tuple[Tensor, ...], keep: bool) -> tuple[Tensor | None, ...]:
            wanted = [inputs[slot][n] for n in (*self.activations, *self.parameters)]
            return torch.autograd.grad(
                ys, wanted, self.dys[slot], retain_graph=keep, allow_unused=True
            )

        def forward_backward(slot: int) -> list[Tensor | None]:
            ys = as_tuple(function(**inputs[slot]))
            if not ys[0].requires_grad:  # the copy
                return list(ys)
            grads = gradients(slot, ys, keep=False)
            return [*(y.detach() for y in ys), *grads]

        results: dict[int, tuple[Tensor, ...]] = {}

        def backward(slot: int) -> list[Tensor | None]:
            if slot not in results:
                results[slot] = as_tuple(function(**inputs[slot]))
            ys = results[slot]
            if not ys[0].requires_grad:  # the copy has none: another copy, as a yardstick
                return list(as_tuple(function(**inputs[slot])))
            return list(gradients(slot, ys, keep=True))

        return backward if kind == BACKWARD else forward_backward


def as_tuple(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)
