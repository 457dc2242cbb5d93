"""Where a backend that could serve a call is not worth choosing: measured crossovers.

`crossovers.json` holds them for the Triton backend, by contract and dtype: the least number of
tokens from which it was never slower than the reference backend (`python -m bench.crossover`), null
where there was none. What has no entry is chosen whatever the size. GPUs without measurements of
their own use those of the H200.
"""

import functools
import json
from pathlib import Path

from torch import Tensor

MIN_TOKENS: dict[tuple[str, str], int] = {("swiglu_adapter", "cpu"): 1}
"""For backends that are not in the file; the C++ one's is a guess."""


@functools.cache
def measured() -> dict[tuple[str, str, str], int | None]:
    """Least tokens by contract, backend and dtype (as `str(torch.dtype)`)."""
    table = json.loads(Path(__file__).with_name("crossovers.json").read_text(encoding="utf-8"))
    return {
        (entry["op"], entry["backend"], f"torch.{entry['dtype']}"): entry["min_tokens"]
        for entry in table["entries"]
    }


def not_worth_it(op: str, backend: str, tokens: int, args: tuple[object, ...]) -> str | None:
    """Why an automatic choice passes over `backend` for this call, or None. `args[0]`: a tensor."""
    first = args[0]
    least: int | None = MIN_TOKENS.get((op, backend), 0)
    if isinstance(first, Tensor):
        if backend == "triton" and first.device.type == "cpu":
            return "on CPU tensors it runs in Triton's interpreter, for tests only"
        least = measured().get((op, backend, str(first.dtype)), least)
    if least is None:
        return f"in {first.dtype} the reference backend was faster at some measured size"
    if tokens < least:
        return f"{tokens} tokens are below its crossover of {least}"
    return None
