"""The modes of all adapted weights, contracted with the core once per optimiser step.

``M_k[a, b] = sum_r core[a, b, r] p_k[r]`` for all weights k is one product, and its gradient two:
the forward values are kept while core and mode vectors keep theirs, and all uses of them in one
graph meet in one autograd node. The node saves nothing through autograd, because it may be used by
several forward and backward passes, and inside and outside of activation checkpointing alike.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from mmadapt.peft.aurora.linear import AuroraLinear

_steps = 0


def _count_step(*ignored: Any) -> None:
    global _steps
    _steps += 1


# Fused optimisers change parameters without moving their version counters, and so does FSDP when it
# gathers what an optimiser has changed.
register_optimizer_step_post_hook(_count_step)


def contract(core: Tensor, modes: Tensor) -> Tensor:
    """``[K, R]`` mode vectors -> ``[K, R, R]`` (dense core) or ``[K, R]`` (diagonal core)."""
    if core.ndim == 1:
        return modes * core
    rank = core.shape[0]
    return (modes @ core.reshape(rank * rank, rank).t()).view(-1, rank, rank)


class _Contract(torch.autograd.Function):
    """Contracted modes, whose values are already known, as a function of core and mode vectors."""

    @staticmethod
    def forward(ctx, owner, values, core, *modes):
        ctx.owner = weakref.ref(owner)  # which holds the outputs: no cycle through autograd
        ctx.core, ctx.modes = core, modes
        ctx.stamps = [_version(t) for t in (core, *modes)]
        ctx.set_materialize_grads(False)
        return tuple(value.detach() for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        owner = ctx.owner()
        if owner is not None:
            owner.spent = True
        if ctx.stamps != [_version(t) for t in (ctx.core, *ctx.modes)]:
            raise RuntimeError(
                "Aurora's core or mode vectors were modified in place between the forward and the "
                "backward pass that needs their values"
            )
        used = [k for k, grad in enumerate(grads) if grad is not None]
        needs_core, needs_modes = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        dmodes: list[Tensor | None] = [None] * len(ctx.modes)
        if not used:
            return None, None, None, *dmodes
        with torch.autocast(ctx.core.device.type, enabled=False):
            modes = torch.cat([ctx.modes[k] for k in used])
            outer = torch.cat([grads[k] for k in used]).to(ctx.core.dtype)
            if ctx.core.ndim == 1:
                dcore = (outer * modes).sum(0) if needs_core else None
                dmode = outer * ctx.core
            else:
                outer, core = outer.flatten(1), ctx.core.reshape(-1, ctx.core.shape[-1])
                dcore = (outer.t() @ modes).view(ctx.core.shape) if needs_core else None
                dmode = outer @ core
        sizes = [len(ctx.modes[k]) for k in used]
        for k, part in zip(used, dmode.split(sizes), strict=True):
            dmodes[k] = part.to(ctx.modes[k].dtype) if needs_modes[k] else None
        return None, None, dcore, *dmodes


@dataclass
class _Batch:
    """Contracted modes of several layers."""

    core: Tensor
    core_stamp: tuple
    modes: dict[int, Tensor]
    mode_stamps: dict[int, tuple]
    values: dict[int, Tensor]
    step: int
    outputs: dict[int, Tensor] | None = None
    spent: bool = False

    def fits(self, key: int, core: Tensor, mode: Tensor) -> bool:
        if core is not self.core or self.modes.get(key) is not mode or self.step != _steps:
            return False
        if self.core_stamp != _stamp(core) or self.mode_stamps[key] != _stamp(mode):
            return False
        # After a backward pass something may have changed the parameters in a way that nobody
        # notices (`.data`). Within it, recomputed layers come back for what they used before.
        return not self.spent or torch._C._current_graph_task_id() != -1

    def get(self, key: int) -> Tensor:
        trains = self.core.requires_grad or self.modes[key].requires_grad
        if not (trains and torch.is_grad_enabled()):
            return self.values[key]
        if self.outputs is None:
            values, modes = tuple(self.values.values()), self.modes.values()
            outputs = _Contract.apply(self, values, self.core, *modes)
            self.outputs = dict(zip(self.modes, outputs, strict=True))
        return self.outputs[key]


class Contraction:
    """Contracted modes by adapter and layer. Holds values that can be made again at any time."""

    def __init__(self) -> None:
        self._batches: dict[str, _Batch] = {}
        self.count = 0  # of products with a core, for tests and reports

    def clear(self) -> None:
        """Forget all values; needed only after changes through `.data` outside of training."""
        self._batches.clear()

    def get(
        self, adapter: str, core: Tensor, layer: "AuroraLinear", layers: Iterable["AuroraLinear"]
    ) -> Tensor:
        """Contracted modes of one layer, ``[chunks, R, R]`` or ``[chunks, R]``.

        Args:
            adapter: name of the adapter.
            core: its core.
            layer: whose modes are asked for.
            layers: all layers, which are contracted together where that is possible.
        """
        mode = layer.mode_vectors(adapter)
        if torch.compiler.is_compiling() or mode.device != core.device:
            return contract(core.to(mode.device), mode)
        key = id(layer)
        batch = self._batches.get(adapter)
        if batch is None or not batch.fits(key, core, mode):
            batch = self._batch(core, layer, [m for m in layers if m.has(adapter)], adapter)
        return batch.get(key)

    def _batch(
        self, core: Tensor, layer: "AuroraLinear", layers: list["AuroraLinear"], adapter: str
    ) -> _Batch:
        modes = {id(m): m.mode_vectors(adapter) for m in layers}
        # Under FSDP a layer's own parameters are whole while the layer runs, and only then.
        together = all(_is_plain(m) and m.device == core.device for m in modes.values())
        if not together or any(_is_inference(m) for m in (core, *modes.values())):
            modes = {id(layer): layer.mode_vectors(adapter)}
        # In this order: leaving inference mode turns gradients on.
        autocast = torch.autocast(core.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), autocast:
            values = contract(core, torch.cat(list(modes.values())).to(core.dtype))
            parts = values.split([len(mode) for mode in modes.values()])
        self.count += 1
        batch = _Batch(
            core,
            _stamp(core),
            modes,
            {key: _stamp(mode) for key, mode in modes.items()},
            dict(zip(modes, parts, strict=True)),
            _steps,
        )
        if len(modes) == len(layers):
            self._batches[adapter] = batch
        return batch

    def __getstate__(self) -> dict[str, Any]:
        return {"_batches": {}, "count": 0}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _stamp(tensor: Tensor) -> tuple:
    return _version(tensor), tensor.data_ptr(), tensor.requires_grad


def _is_inference(tensor: Tensor) -> bool:
    return tensor.is_inference()


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)
