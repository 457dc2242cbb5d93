"""Mode approximation: linear layers whose low-rank updates share their factors."""

import math

import torch
from torch import Tensor, nn

from mmadapt.ops import cp_linear


class CPFactors(nn.Module):
    """The factors that all adapted weights share.

    The update of weight k is ``factor_out M_k^T factor_in`` with ``M_k = diag(core * p_k)``
    (diagonal, the paper's CP decomposition, `core` being lambda) or
    ``M_k[a, b] = sum_r core[a, b, r] p_k[r]`` (dense, the released code); ``p_k`` belongs to k.

    Args:
        in_features, out_features: shape of the adapted weights.
        rank: R.
        core: ``"diagonal"`` for a core ``[R]``, ``"dense"`` for ``[R, R, R]``.

    Parameters: `factor_in` ``[R, in]`` U(±1/sqrt(in)); `factor_out` ``[out, R]`` zeros, so that
    fresh updates are zero; `core` ones (diagonal) or U(±sqrt(3)/R) (dense, Xavier with fan R²).

    Source: Aurora (arXiv 2305.08381), mode approximation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        core: str = "diagonal",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if min(in_features, out_features, rank) < 1:
            raise ValueError(
                f"in_features, out_features and rank must be positive, got {in_features}, "
                f"{out_features} and {rank}"
            )
        if core not in ("diagonal", "dense"):
            raise ValueError(f"core must be 'diagonal' or 'dense', got {core!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        new = {"device": device, "dtype": dtype}
        shape = (rank,) if core == "diagonal" else (rank, rank, rank)
        self.factor_in = nn.Parameter(torch.empty(rank, in_features, **new))
        self.factor_out = nn.Parameter(torch.empty(out_features, rank, **new))
        self.core = nn.Parameter(torch.empty(shape, **new))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The released code's initialisation; ones for the diagonal core."""
        bound = 1.0 / math.sqrt(self.in_features)
        nn.init.uniform_(self.factor_in, -bound, bound)
        nn.init.zeros_(self.factor_out)
        if self.core.ndim == 1:
            nn.init.ones_(self.core)
        else:
            bound = math.sqrt(3.0) / self.rank
            nn.init.uniform_(self.core, -bound, bound)

    def contract(self, mode: Tensor) -> Tensor:
        """The operator's mode for a vector ``p [R]``: ``[R]`` (diagonal) or ``[R, R]`` (dense)."""
        return self.core * mode if self.core.ndim == 1 else self.core @ mode

    def extra_repr(self) -> str:
        core = "diagonal" if self.core.ndim == 1 else "dense"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"core={core!r}"
        )


class CPLinear(nn.Module):
    """A frozen `torch.nn.Linear` with an update from shared `CPFactors` and an own mode vector.

    ``y = base(x) + scale * ((x factor_in^T) M) factor_out^T``, M from `CPFactors.contract`.

    Args:
        base: the layer to adapt; its parameters are frozen here.
        factors: shared by many layers; registered in each of them, so that every layer's parameters
            are complete. `parameters()` of a model still lists them once.
        scale: factor on the update.
        dropout: probability of dropping an entry of the update's [..., R] activations in training.
        dropout_at: ``"after"`` or ``"before"`` the mode, see `mmadapt.ops.cp_linear`.

    Parameter: `mode` ``[R]`` U(±sqrt(6 / (R + 1))). The layer reads the parameters of its children,
    so under FSDP2 shard a common parent of all layers that share `factors`, not the layer.

    Source: Aurora (arXiv 2305.08381).
    """

    def __init__(
        self,
        base: nn.Linear,
        factors: CPFactors,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        dropout_at: str = "after",
    ):
        super().__init__()
        shape = (factors.out_features, factors.in_features)
        if tuple(base.weight.shape) != shape:
            raise ValueError(
                f"base.weight has shape {list(base.weight.shape)}, expected {list(shape)} "
                "like the factors"
            )
        self.base = base.requires_grad_(False)
        self.factors = factors
        self.scale = scale
        self.dropout = dropout
        self.dropout_at = dropout_at
        self.mode = nn.Parameter(torch.empty_like(factors.factor_in[:, 0]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the own mode vector; the shared factors keep their values."""
        bound = math.sqrt(6.0 / (self.factors.rank + 1))
        nn.init.uniform_(self.mode, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` -> ``[..., out]``."""
        return cp_linear(
            x,
            self.base.weight,
            self.base.bias,
            self.factors.factor_in,
            self.factors.factor_out,
            self.factors.contract(self.mode),
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            dropout_at=self.dropout_at,
        )

    def delta_weight(self) -> Tensor:
        """The update as a matrix, ``scale * factor_out M^T factor_in`` ``[out, in]``."""
        mode, factors = self.factors.contract(self.mode), self.factors
        matrix = torch.diag(mode) if mode.ndim == 1 else mode
        return self.scale * (factors.factor_out @ matrix.t() @ factors.factor_in)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, dropout={self.dropout}, dropout_at={self.dropout_at!r}"
