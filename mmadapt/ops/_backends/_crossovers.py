"""Measured crossovers: below this many tokens the next backend in the registry is faster."""

MIN_TOKENS: dict[tuple[str, str], int] = {("swiglu_adapter", "cpu"): 1}
