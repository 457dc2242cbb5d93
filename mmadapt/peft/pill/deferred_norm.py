"""A decoder layer's norm leaves its work to the wrapper behind it: norm + adapter + skip is one op.

The norm's `forward` is replaced on the instance, by an object, so that modules, their names and the
state dict stay as they are. While the wrapper's active adapter can take the norm in, it returns its
input unchanged and hands over its weight; else it does what it always did. It decides anew in every
call, and only what runs inside the layer's own forward takes part, so that recomputation under
activation checkpointing decides the same.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mmadapt.peft.pill.layer import PillLayer
from mmadapt.peft.pill.norm_sites import UnfusableError, feeding_norm, norm_eps
from mmadapt.peft.structure import find_decoder_stack

Norm = tuple[Tensor, float]

# Asked once: Dynamo of torch 2.11 cannot trace `is_autocast_available`.
_AUTOCAST_DEVICES = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu"))
)


class DeferredNorm:
    """The `forward` of `layer`'s norm, and what the wrapper behind it takes the norm from.

    A deep copy of the layer holds a deep copy of this; a norm or a wrapper that is copied alone
    (PEFT's `modules_to_save` does that) gets one without a layer, which never defers.
    """

    def __init__(self, layer: nn.Module | None, name: str, norm: nn.Module, sublayer: str) -> None:
        self.layer, self.name, self.norm, self.sublayer = layer, name, norm, sublayer
        self.eps = norm_eps(norm)
        self.given: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self.given = None
        if self.refusal() is not None or self.refusal_of(x) is not None:
            return type(self.norm).forward(self.norm, x)
        self.given = x, self.norm.weight
        return x

    def take(self, x: Tensor) -> Norm | None:
        """What the wrapper that got `x` has to normalise it with; None if `x` is as it should be.

        Raises:
            RuntimeError: the norm has handed over another tensor.
        """
        given, self.given = self.given, None
        if given is None:
            return None
        if given[0] is not x:
            raise RuntimeError(
                f"{self.name} left its work to {self.sublayer}, which was then called with another "
                "tensor; call the decoder layer as a whole, or set PillConfig.fuse_norms=False"
            )
        return given[1], self.eps

    def refusal(self) -> str | None:
        """Why the norm computes its own output, whatever its input; None if it defers."""
        if self.layer is None or self.norm.forward is not self:
            return "the forward of the norm was replaced or the norm copied without its layer"
        if getattr(self.layer, self.name) is not self.norm:
            return f"the layer's {self.name} was replaced"
        wrapper = getattr(self.layer, self.sublayer)
        if not isinstance(wrapper, PillLayer) or wrapper.deferred_norm is not self:
            return f"the layer's {self.sublayer} was replaced"
        if _is_observed(self.norm, wrapper):
            return "hooks see the output of the norm"
        return wrapper.norm_refusal()

    def refusal_of(self, x: Tensor) -> str | None:
        """Why the norm computes its own output for an input like `x`; None if it defers."""
        weight = self.norm.weight
        if weight.dtype != x.dtype:
            return "the norm's weight has another dtype than its input"
        if weight.device != x.device:
            return "the norm's weight is on another device than its input"
        kind = x.device.type
        casts = kind in _AUTOCAST_DEVICES and torch.is_autocast_enabled(kind)
        if casts and torch.get_autocast_dtype(kind) != x.dtype:
            return "autocast would round the norm's input"
        return None

    def remove(self) -> None:
        """Give the norm its own forward back."""
        if self.norm.__dict__.get("forward") is self:
            del self.norm.forward
        self.layer = None

    def __deepcopy__(self, memo: dict) -> "DeferredNorm":
        # The layer comes before its children, so it is known here if it is copied at all.
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.layer = memo.get(id(self.layer)) if self.layer is not None else None
        new.name, new.sublayer, new.eps, new.given = self.name, self.sublayer, self.eps, None
        new.norm = copy.deepcopy(self.norm, memo)
        return new

    def __getstate__(self) -> dict:
        return self.__dict__ | {"given": None}


def _is_observed(norm: nn.Module, wrapper: nn.Module) -> bool:
    """Whether hooks stand between a norm and its wrapper: they see, or move, what passes.

    FSDP2 and tensor parallelism work by such hooks where a norm or a wrapper is sharded by itself.
    """
    return bool(
        norm._forward_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
        or wrapper._forward_pre_hooks
        or wrapper._backward_hooks
        or wrapper._backward_pre_hooks
        or _has_any_global_hook()
    )


def defer_norms(model: nn.Module) -> None:
    """Prepare the norms in front of a model's wrappers, or note on a wrapper why that cannot be."""
    stack = find_decoder_stack(model)
    for layer in model.get_submodule(stack.path):
        for sublayer in ("self_attn", "mlp"):
            wrapper = getattr(layer, sublayer)
            if not isinstance(wrapper, PillLayer) or wrapper.deferred_norm is not None:
                continue
            try:
                name, norm = feeding_norm(layer, sublayer)
            except UnfusableError as error:
                wrapper.norm_reason = str(error)
                continue
            wrapper.deferred_norm = DeferredNorm(layer, name, norm, sublayer)
            norm.forward = wrapper.deferred_norm
