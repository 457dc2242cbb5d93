"""Where a backend that could serve a call is not worth choosing: measured crossovers."""

from torch import Tensor

MIN_TOKENS: dict[tuple[str, str], int] = {("swiglu_adapter", "cpu"): 1}


def not_worth_it(op: str, backend: str, tokens: int, args: tuple[object, ...]) -> str | None:
    """Why an automatic choice passes over `backend` for this call, or None. `args[0]`: a tensor."""
    first = args[0]
    if backend == "triton" and isinstance(first, Tensor) and first.device.type == "cpu":
        return "on CPU tensors it runs in Triton's interpreter, for tests only"
    least = MIN_TOKENS.get((op, backend), 0)
    if tokens < least:
        return f"{tokens} tokens are below its crossover of {least}"
    return None
