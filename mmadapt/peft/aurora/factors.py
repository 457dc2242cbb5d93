"""What all adapted weights of a model share: the factors and the core."""

import math

import torch
from torch import Tensor, nn

from mmadapt.peft.aurora.config import AuroraConfig


class AuroraFactors(nn.Module):
    """Factors and core of one adapter.

    Weights of different shapes share what fits: one `factor_in` for every input width, one
    `factor_out` for every output width, one core. BLIP-base, whose towers are equally wide, has one
    of each, as released.

    Parameters: `core` ``[R, R, R]`` U(±sqrt(3)/R) (dense) or ``[R]`` ones (diagonal);
    `factor_in_<d>` ``[R, d]`` U(±1/sqrt(d)); `factor_out_<d>` ``[d, R]`` zeros, so that fresh
    updates are zero.
    """

    def __init__(self, config: AuroraConfig) -> None:
        super().__init__()
        self.rank = config.rank
        self.init_weights = config.init_weights
        if config.core == "dense":
            self.core = nn.Parameter(torch.empty(self.rank, self.rank, self.rank))
            bound = math.sqrt(3.0) / self.rank
            nn.init.uniform_(self.core, -bound, bound)
        else:
            self.core = nn.Parameter(torch.ones(self.rank))

    def add(self, in_features: int, out_features: int) -> None:
        """Make the factors for weights `[out_features, in_features]` unless they are there."""
        if not hasattr(self, f"factor_in_{in_features}"):
            bound = 1.0 / math.sqrt(in_features)
            factor = torch.empty(self.rank, in_features).uniform_(-bound, bound)
            self.register_parameter(f"factor_in_{in_features}", self._like_core(factor))
        if not hasattr(self, f"factor_out_{out_features}"):
            factor = torch.zeros(out_features, self.rank)
            if not self.init_weights:
                nn.init.normal_(factor, std=0.1)
            self.register_parameter(f"factor_out_{out_features}", self._like_core(factor))

    def factor_in(self, in_features: int) -> nn.Parameter:
        """``[R, in_features]``"""
        return getattr(self, f"factor_in_{in_features}")

    def factor_out(self, out_features: int) -> nn.Parameter:
        """``[out_features, R]``"""
        return getattr(self, f"factor_out_{out_features}")

    @property
    def is_dense(self) -> bool:
        return self.core.ndim == 3

    @torch.no_grad()
    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move and cast the parameters that have values."""
        for name, parameter in list(self.named_parameters()):
            if parameter.device.type == "meta" or (parameter.device, parameter.dtype) == (
                device,
                dtype,
            ):
                continue
            moved = nn.Parameter(parameter.to(device, dtype), parameter.requires_grad)
            setattr(self, name, moved)

    def _like_core(self, factor: Tensor) -> nn.Parameter:
        if self.core.device.type != "meta":  # then it is the context that decides
            factor = factor.to(self.core.device, self.core.dtype)
        return nn.Parameter(factor, self.core.requires_grad)

    def extra_repr(self) -> str:
        names = [name for name, _ in self.named_parameters() if name != "core"]
        return f"rank={self.rank}, core={'dense' if self.is_dense else 'diagonal'}, {names}"
