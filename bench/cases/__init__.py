"""The suites: one module each with `SHAPES`, `VARIANTS`, `DEFAULT_VARIANTS` and `build`.

`build(shape, variant, dtype, device)` returns a `bench.case.Case`. Image tokens come as they do in
training batches: 32 at the start of every 512.
"""

import torch
from torch import Tensor

IMAGE_TOKENS, TEXT_LENGTH = 32, 512
EPS = 1e-6


def is_image(tokens: int, device: torch.device) -> Tensor:
    """Bool [T]: 32 of every 512 tokens, in one run."""
    return torch.arange(tokens, device=device) % TEXT_LENGTH < IMAGE_TOKENS


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
