"""Bottleneck adapters: SwiGLU, its two-matrix ablation, and the mixture of modality experts."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mmadapt.ops import swiglu_adapter


class _SwiGLUBase(nn.Module):
    """Parameters and initialisation common to routed and plain SwiGLU adapters.

    The parameters are bare, not child Linears: FSDP2 shards a child on its own, and a parent that
    reads ``child.weight`` then finds a shard of it.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        experts: tuple[int, ...],
        up_experts: tuple[int, ...],
        residual: str,
        norm_eps: float | None,
        scale: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        if dim < 1 or rank < 1:
            raise ValueError(f"dim and rank must be positive, got dim={dim}, rank={rank}")
        if residual not in ("input", "norm", "none"):
            raise ValueError(f"residual must be 'input', 'norm' or 'none', got {residual!r}")
        if residual == "norm" and norm_eps is None:
            raise ValueError("residual='norm' needs norm_eps, got norm_eps=None")
        self.dim = dim
        self.rank = rank
        self.residual = residual
        self.norm_eps = norm_eps
        self.scale = scale
        new = {"device": device, "dtype": dtype}
        self.gate = nn.Parameter(torch.empty(*experts, rank, dim, **new))
        self.down = nn.Parameter(torch.empty(*experts, rank, dim, **new))
        self.up = nn.Parameter(torch.empty(*up_experts, dim, rank, **new))
        self.norm_weight = None if norm_eps is None else nn.Parameter(torch.empty(dim, **new))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PILL's initialisation: the fresh adapter adds nothing because `up` is zero."""
        bound = 1.0 / math.sqrt(self.dim)
        nn.init.uniform_(self.gate, -bound, bound)
        nn.init.normal_(self.down, std=0.02)
        nn.init.zeros_(self.up)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def _run(self, x: Tensor, expert: Tensor | None) -> Tensor:
        norm = None if self.norm_weight is None else (self.norm_weight, self.norm_eps)
        return swiglu_adapter(
            x,
            self.gate,
            self.down,
            self.up,
            expert=expert,
            norm=norm,
            residual=self.residual,
            scale=self.scale,
        )

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, rank={self.rank}, residual={self.residual!r}"
        if self.norm_eps is not None:
            text += f", norm_eps={self.norm_eps}"
        return text if self.scale == 1.0 else f"{text}, scale={self.scale}"


class SwiGLUAdapter(_SwiGLUBase):
    """``base + scale * up (silu(gate n) * (down n))`` on ``[..., dim]``.

    Args:
        dim: width of the stream.
        rank: bottleneck width.
        residual: base of the sum: ``"input"`` adds the input, ``"norm"`` the normalised input,
            ``"none"`` nothing, for callers that add it themselves.
        norm_eps: epsilon of an RMSNorm in front, with its own weight `norm_weight`; None for none.
        scale: factor on the adapter's branch.

    Parameters: `gate` ``[rank, dim]`` U(±1/sqrt(dim)), `down` ``[rank, dim]`` N(0, 0.02²), `up`
    ``[dim, rank]`` zeros, so that a fresh adapter is the identity (for ``"input"``).

    Source: PILL (arXiv 2311.02126), the adapter of its released code.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        *,
        residual: str = "input",
        norm_eps: float | None = None,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(dim, rank, (), (), residual, norm_eps, scale, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., dim]`` -> ``[..., dim]``."""
        return self._run(x, None)


class ModalityExperts(_SwiGLUBase):
    """One SwiGLU adapter per modality; every token passes through its modality's expert alone.

    Args:
        dim, rank, residual, norm_eps, scale: as in `SwiGLUAdapter`.
        num_experts: number of modalities E. PILL has 0 for text and 1 for images.
        share_up: one `up` ``[1, dim, rank]`` for all experts instead of ``[E, dim, rank]``.

    An expert that no token of a batch chose gets zero gradients, never None.

    Source: PILL (arXiv 2311.02126), mixture of modality adapter experts.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        num_experts: int = 2,
        share_up: bool = False,
        *,
        residual: str = "input",
        norm_eps: float | None = None,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if num_experts < 1:
            raise ValueError(f"num_experts must be positive, got {num_experts}")
        up_experts = 1 if share_up else num_experts
        super().__init__(
            dim, rank, (num_experts,), (up_experts,), residual, norm_eps, scale, device, dtype
        )
        self.num_experts = num_experts
        self.share_up = share_up

    def forward(self, x: Tensor, modality: Tensor) -> Tensor:
        """``x [..., dim]``, ``modality [...]`` integers in -1..E-1 (-1: no adapter), or bool."""
        return self._run(x, modality.to(torch.int32) if modality.dtype == torch.bool else modality)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_experts={self.num_experts}, share_up={self.share_up}"


class LinearAdapter(nn.Module):
    """``base + up (down x)``: the two-matrix adapter of PILL's ablation without gated units.

    Args:
        dim: width of the stream.
        rank: bottleneck width.
        residual: ``"input"`` adds the input, ``"none"`` nothing.

    Parameters: `down` ``[rank, dim]`` N(0, 0.02²), `up` ``[dim, rank]`` zeros. Computed in the
    dtype of the input, or in the autocast dtype.

    Source: PILL (arXiv 2311.02126), table 3.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        *,
        residual: str = "input",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 1 or rank < 1:
            raise ValueError(f"dim and rank must be positive, got dim={dim}, rank={rank}")
        if residual not in ("input", "none"):
            raise ValueError(f"residual must be 'input' or 'none', got {residual!r}")
        self.dim = dim
        self.rank = rank
        self.residual = residual
        self.down = nn.Parameter(torch.empty(rank, dim, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(dim, rank, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02²) for `down`, zeros for `up`: the fresh adapter adds nothing."""
        nn.init.normal_(self.down, std=0.02)
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., dim]`` -> ``[..., dim]``."""
        delta = linear(linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return x + delta if self.residual == "input" else delta

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rank={self.rank}, residual={self.residual!r}"
