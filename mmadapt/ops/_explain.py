"""`explain`: which backend a call would use, and why not the others."""

from collections.abc import Callable

from mmadapt.ops import _cp_linear, _modality_gate, _projected_modality_gate, _swiglu_adapter
from mmadapt.ops._backends import Choice, choose
from mmadapt.ops._cp_linear_arguments import arguments as cp_linear_arguments


def _cp_linear_single(x, weight, bias, factor_in, factor_out, mode, **settings):
    return cp_linear_arguments(x, [weight], [bias], factor_in, factor_out, [mode], **settings)


# Public name -> contract, and the function from its arguments to those of the operators.
_PLANS: dict[str, tuple[str, Callable]] = {
    "swiglu_adapter": (_swiglu_adapter.OP, _swiglu_adapter.arguments),
    "cp_linear": (_cp_linear.OP, _cp_linear_single),
    "cp_linear_group": (_cp_linear.OP, cp_linear_arguments),
    "modality_gate": (_modality_gate.OP, _modality_gate.arguments),
    "projected_modality_gate": (_projected_modality_gate.OP, _projected_modality_gate.arguments),
}


def explain(
    op: str | Callable, *args: object, backend: str | None = None, **kwargs: object
) -> Choice:
    """The backend that ``op(*args, **kwargs)`` would run on, and each refused one's constraint.

    `op` is a function of `mmadapt.ops` or its name. Arguments are checked as in the call itself;
    nothing is computed. Raises BackendError where the call would.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _PLANS:
        raise ValueError(f"op must be one of {', '.join(_PLANS)}, got {name!r}")
    contract, normalise = _PLANS[name]
    normalised = normalise(*args, **kwargs)
    operands = tuple(normalised)[: 6 if contract == _swiglu_adapter.OP else None]
    return choose(contract, backend, normalised[0].shape[0], *operands)
