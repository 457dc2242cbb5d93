"""CROME's cross-modal adapter."""

import torch
from torch import Tensor, nn

from mmadapt.ops import swiglu_adapter


class CrossModalAdapter(nn.Module):
    """One gated bottleneck for two streams: own input matrices per modality, one shared output.

    ``y_k = x_k + scale * up (silu(gate_k n_k) * (down_k n_k))`` for k = visual, text. Tokens do not
    mix; the modalities meet only in the shared `up`.

    Args:
        dim: width of both streams (that of the language model).
        rank: bottleneck width; CROME's 5 M weights are rank 256 at dim 4096, 192 at dim 5120.
        scale: factor on the branch; the paper has none.
        norm_eps: epsilon of an RMSNorm in front with a weight per modality; the paper has none.

    Parameters: `gate`, `down` ``[2, rank, dim]`` N(0, 0.02²), visual first; `up` ``[dim, rank]``
    zeros, so that a fresh adapter is the identity. There are no biases. In the paper's names `gate`
    is W_d (the factor with the SiLU) and `down` is W_g.

    Source: CROME (arXiv 2408.06610), section 3; its initialisation is not published.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        *,
        scale: float = 1.0,
        norm_eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim < 1 or rank < 1:
            raise ValueError(f"dim and rank must be positive, got dim={dim}, rank={rank}")
        self.dim = dim
        self.rank = rank
        self.scale = scale
        self.norm_eps = norm_eps
        new = {"device": device, "dtype": dtype}
        self.gate = nn.Parameter(torch.empty(2, rank, dim, **new))
        self.down = nn.Parameter(torch.empty(2, rank, dim, **new))
        self.up = nn.Parameter(torch.empty(dim, rank, **new))
        self.norm_weight = None if norm_eps is None else nn.Parameter(torch.empty(2, dim, **new))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02²) for the input matrices, zeros for `up`."""
        nn.init.normal_(self.gate, std=0.02)
        nn.init.normal_(self.down, std=0.02)
        nn.init.zeros_(self.up)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """``visual [..., dim]``, ``text [..., dim]``, lengths free, to tensors of their shapes."""
        return self._branch(visual, 0), self._branch(text, 1)

    def _branch(self, x: Tensor, k: int) -> Tensor:
        norm = None if self.norm_weight is None else (self.norm_weight[k], self.norm_eps)
        return swiglu_adapter(x, self.gate[k], self.down[k], self.up, norm=norm, scale=self.scale)

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, rank={self.rank}"
        if self.scale != 1.0:
            text += f", scale={self.scale}"
        return text if self.norm_eps is None else f"{text}, norm_eps={self.norm_eps}"
