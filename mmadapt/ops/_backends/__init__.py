"""Registry of backends: which modules can run a contract, and which of them runs a given call.

A backend of a contract is a module with three functions, taken from it on first use:
``forward(...)``, ``backward(...)`` and ``unsupported(...) -> str | None`` (the constraint that
failed). A module that cannot be imported is skipped with the import error as its reason.
"""

import importlib
import os
from dataclasses import dataclass, field
from types import ModuleType

from mmadapt.ops._backends._crossovers import not_worth_it

ENVIRONMENT_VARIABLE = "MMADAPT_BACKEND"

_REFERENCE = "mmadapt.ops._backends.reference"
_TRITON = "mmadapt.ops._backends.triton"
_CUDA = "mmadapt.ops._backends.cuda"
_REGISTRY: dict[str, dict[str, str]] = {
    "swiglu_adapter": {
        "cpu": "mmadapt.ops._backends.cpu",
        "cuda": f"{_CUDA}.swiglu_adapter",
        "triton": f"{_TRITON}.swiglu_adapter",
        "reference": f"{_REFERENCE}.swiglu_adapter",
    },
    "cp_linear": {
        "cuda": f"{_CUDA}.cp_linear",
        "triton": f"{_TRITON}.cp_linear",
        "reference": f"{_REFERENCE}.cp_linear",
    },
    "modality_gate": {
        "cuda": f"{_CUDA}.modality_gate",
        "triton": f"{_TRITON}.modality_gate",
        "reference": f"{_REFERENCE}.modality_gate",
    },
    "projected_modality_gate": {
        "cuda": f"{_CUDA}.projected_modality_gate",
        "triton": f"{_TRITON}.projected_modality_gate",
        "reference": f"{_REFERENCE}.projected_modality_gate",
    },
}
_LOADED: dict[str, ModuleType | str] = {}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message says why."""


@dataclass(frozen=True)
class Choice:
    """The backend that serves a call, and for every refused one the constraint that failed."""

    op: str
    backend: str
    requested: str | None = None
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        how = "automatic" if self.requested is None else "requested"
        lines = [f"{self.op}: {self.backend} ({how})"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def load(module: str) -> ModuleType | str:
    """The imported backend module, or the reason why it cannot be imported."""
    if module not in _LOADED:
        try:
            _LOADED[module] = importlib.import_module(module)
        except (ImportError, AttributeError) as error:  # AttributeError: a stale extension
            _LOADED[module] = f"not available: {error}"
    return _LOADED[module]


def backends(op: str) -> dict[str, str | None]:
    """Every backend of `op` in order of preference, with None or the reason why it is missing."""
    loaded = {name: load(module) for name, module in _REGISTRY[op].items()}
    return {name: state if isinstance(state, str) else None for name, state in loaded.items()}


def choose(op: str, requested: str | None, tokens: int, *args: object) -> Choice:
    """Pick the backend of one call. `args` are those of the contract's ``unsupported``.

    Order: `requested`, then MMADAPT_BACKEND (a name for every contract, or ``contract:name`` pairs
    with commas between them), then the first backend that can serve the
    call and whose measured crossover `tokens` reaches. Raises BackendError if a named one cannot.
    """
    requested = requested or _from_environment(op)
    if requested is not None and requested not in _REGISTRY[op]:
        raise BackendError(
            f"backend {requested!r} does not exist for {op}; it has {', '.join(_REGISTRY[op])}"
        )
    refused: dict[str, str] = {}
    chosen: str | None = None
    for name, module in _REGISTRY[op].items():
        reason = _refusal(op, name, load(module), tokens, requested, args)
        if reason is not None:
            refused[name] = reason
        elif chosen is None:
            chosen = name
        else:
            refused[name] = f"{chosen} is preferred"
    if requested is not None and chosen != requested:
        raise BackendError(f"backend {requested!r} cannot run this {op}: {refused[requested]}")
    if chosen is None:
        raise BackendError(f"no backend can run this {op}: {refused}")
    return Choice(op, chosen, requested, refused)


def select(op: str, requested: str | None, tokens: int, *args: object) -> ModuleType:
    """The module of `choose`, without composing the reasons: this runs on every call."""
    if requested is None and not os.environ.get(ENVIRONMENT_VARIABLE):
        for name, path in _REGISTRY[op].items():
            module = load(path)
            if (
                isinstance(module, ModuleType)
                and module.unsupported(*args) is None
                and not_worth_it(op, name, tokens, args) is None
            ):
                return module
    return load(_REGISTRY[op][choose(op, requested, tokens, *args).backend])


def _from_environment(op: str) -> str | None:
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    if not value:
        return None
    if ":" not in value:
        return value
    pairs = [pair.strip().partition(":") for pair in value.split(",")]
    unknown = [contract for contract, _, _ in pairs if contract not in _REGISTRY]
    if unknown:
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE}={value!r} names {unknown[0]!r}, expected one of "
            f"{', '.join(_REGISTRY)}"
        )
    return {contract: name for contract, _, name in pairs}.get(op)


def _refusal(
    op: str,
    name: str,
    state: ModuleType | str,
    tokens: int,
    requested: str | None,
    args: tuple[object, ...],
) -> str | None:
    if isinstance(state, str):
        return state
    if requested is not None and name != requested:
        return f"{requested} was requested"
    reason = state.unsupported(*args)
    if reason is None and requested is None:
        return not_worth_it(op, name, tokens, args)
    return reason
