"""`explain`: which backend a call would use, and why not the others."""

from collections.abc import Callable

from mmadapt.ops._backends import Choice, choose

_PLANS: dict[str, Callable] = {}


def plan(op: str, normalise: Callable) -> None:
    """Register how the arguments of a public function become those of its backends."""
    _PLANS[op] = normalise


def explain(
    op: str | Callable, *args: object, backend: str | None = None, **kwargs: object
) -> Choice:
    """The backend that ``op(*args, **kwargs)`` would run on, and each refused one's constraint.

    `op` is a function of `mmadapt.ops` or its name. Arguments are checked as in the call itself;
    nothing is computed. Raises BackendError where the call would.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _PLANS:
        raise ValueError(f"op must be one of {', '.join(sorted(_PLANS))}, got {name!r}")
    contract, tokens, operands = _PLANS[name](*args, **kwargs)
    return choose(contract, backend, tokens, *operands)
