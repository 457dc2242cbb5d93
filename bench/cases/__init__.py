"""The suites: one module each with `GRIDS`, `DEFAULT_VARIANTS`, `parse` and `build`.

`build(shape, variant, dtype, device)` returns a `bench.case.Case`; `parse(variant)` raises
ValueError for a variant the suite does not have. Image tokens come as they do in training batches:
32 at the start of every 512, unless the variant says otherwise.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_TOKENS, TEXT_LENGTH = 32, 512
EPS = 1e-6


@dataclass(frozen=True)
class Variant:
    """A variant's name taken apart: `norm-fp32-E4` is kind norm, flag fp32, E=4."""

    kind: str
    flags: frozenset[str]
    numbers: dict[str, int]

    def __contains__(self, flag: str) -> bool:
        return flag in self.flags

    def get(self, name: str, default: int) -> int:
        return self.numbers.get(name, default)


def parse_variant(
    text: str, kinds: Collection[str], flags: Collection[str] = (), numbers: Collection[str] = ()
) -> Variant:
    """`kind[-flag...][-name<number>...]`, as far as a suite knows them."""
    kind, *rest = text.split("-")
    found: dict[str, int] = {}
    for item in rest:
        match = re.fullmatch(r"([A-Za-z]+)(\d+)", item)
        if item in flags:
            continue
        if match is None or match[1] not in numbers:
            raise ValueError(
                f"variant {text!r}: {item!r} is none of {', '.join((*flags, *numbers)) or 'none'}"
            )
        found[match[1]] = int(match[2])
    if kind not in kinds:
        raise ValueError(f"variant {text!r}: {kind!r} is none of {', '.join(kinds)}")
    return Variant(kind, frozenset(rest) & frozenset(flags), found)


def is_image(
    tokens: int, device: torch.device, run: int = IMAGE_TOKENS, percent: float | None = None
) -> Tensor:
    """Bool [T]: runs of `run` image tokens, `percent` of all (default: one run every 512)."""
    if percent is None:
        period = TEXT_LENGTH
    elif percent == 0:
        return torch.zeros(tokens, dtype=torch.bool, device=device)
    else:
        period = max(run, round(run * 100 / percent))
    return torch.arange(tokens, device=device) % period < run


def image_of(variant: Variant, tokens: int, device: torch.device) -> Tensor:
    """`is_image` with the variant's `run<length>` and `image<percent>`."""
    percent = variant.numbers.get("image")
    return is_image(tokens, device, variant.get("run", IMAGE_TOKENS), percent)


class Draw:
    """Random normal tensors from one seed, so that a case has the same numbers in every run."""

    def __init__(self, device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype):
        self.generator = torch.Generator(device).manual_seed(0)
        self.device, self.dtype, self.weight_dtype = device, dtype, weight_dtype

    def activation(self, *shape: int) -> Tensor:
        return self._normal(shape).to(self.dtype)

    def weight(self, *shape: int, mean: float = 0.0, std: float | None = None) -> Tensor:
        """Standard deviation 1 / sqrt(last dimension) unless given."""
        std = shape[-1] ** -0.5 if std is None else std
        return (mean + std * self._normal(shape)).to(self.weight_dtype)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)
