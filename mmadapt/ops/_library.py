"""The `mmadapt` operator namespace: schema, implementation and fake, registered in one call."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mmadapt.ops._autocast import AUTOCAST_DEVICES

_LIBRARY = torch.library.Library("mmadapt", "DEF")


def define(schema: str, implementation: Callable, fake: Callable):
    """Register one functional operator for every device and return its callable overload.

    No gradient is registered: each contract has its own `torch.autograd.Function` outside the
    operator, so calling `torch.ops.mmadapt.*` directly is not differentiable.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _isolated(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmadapt::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mmadapt, name).default


def _isolated(implementation: Callable) -> Callable:
    """Run an operator's body without autograd and without autocast.

    The dispatcher lets both fall through to the body, where they would record a graph nobody uses
    and cast the operands that the body has chosen on purpose.
    """

    @functools.wraps(implementation)
    def run(*args):
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        device_type = first.device.type
        casts = device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)
        # Entering the contexts costs microseconds; usually both are off already.
        if not (casts or torch.is_grad_enabled()):
            return implementation(*args)
        off = torch.autocast(device_type, enabled=False) if casts else contextlib.nullcontext()
        with torch.no_grad(), off:
            return implementation(*args)

    return run
