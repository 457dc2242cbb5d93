"""CROME's cross-modal adapter."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.ops import swiglu_adapter

VISUAL, TEXT = 0, 1
_PUBLISHED_WEIGHTS = 5_000_000


class CrossModalAdapter(nn.Module):
    """One gated bottleneck for two streams: own input matrices per modality, one shared output.

    ``y_k = x_k + scale * up (silu(gate_k n_k) * (down_k n_k))`` for k = visual, text. Tokens do not
    mix; the modalities meet only in the shared `up`.

    Args:
        dim: width of both streams (that of the language model).
        rank: bottleneck width; CROME's 5 M weights are rank 256 at dim 4096, 192 at dim 5120.
        scale: factor on the branch; the paper has none.
        norm_eps: epsilon of an RMSNorm in front with a weight per modality; the paper has none.
        bias: biases on all five linear maps.
        gated: False leaves the product out: ``y_k = x_k + scale * up silu(gate_k n_k)``.
        share_up: False gives each modality its own `up`.
        share_input: True gives both modalities the same `gate` and `down`.

    Parameters: `gate`, `down` ``[2, rank, dim]`` N(0, 0.02²), visual first (``[1, rank, dim]`` if
    shared, `down` None without the gate); `up` ``[dim, rank]`` zeros (``[2, dim, rank]`` if not
    shared), so that a fresh adapter is the identity; biases zero. In the paper's names `gate` is
    W_d (the factor with the SiLU) and `down` is W_g.

    `swiglu_adapter` has no biases and no ungated form: those two variants, which are for ablations,
    are computed with torch's own functions.

    Source: CROME (arXiv 2408.06610), section 3; its initialisation is not published.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        *,
        scale: float = 1.0,
        norm_eps: float | None = None,
        bias: bool = False,
        gated: bool = True,
        share_up: bool = True,
        share_input: bool = False,
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
        self.gated = gated
        self.share_up = share_up
        self.share_input = share_input
        inputs = 1 if share_input else 2
        ups = () if share_up else (2,)

        def parameter(present: bool, *shape: int) -> nn.Parameter | None:
            return (
                nn.Parameter(torch.empty(*shape, device=device, dtype=dtype)) if present else None
            )

        self.gate = parameter(True, inputs, rank, dim)
        self.down = parameter(gated, inputs, rank, dim)
        self.up = parameter(True, *ups, dim, rank)
        self.gate_bias = parameter(bias, inputs, rank)
        self.down_bias = parameter(bias and gated, inputs, rank)
        self.up_bias = parameter(bias, *ups, dim)
        self.norm_weight = parameter(norm_eps is not None, 2, dim)
        self.reset_parameters()

    @staticmethod
    def default_rank(dim: int) -> int:
        """The multiple of 64 that gives about 5 M weights: 256 at width 4096, 192 at 5120."""
        return max(64, 64 * round(_PUBLISHED_WEIGHTS / (5 * dim) / 64))

    def reset_parameters(self) -> None:
        """N(0, 0.02²) for the input matrices, zeros for `up` and the biases."""
        nn.init.normal_(self.gate, std=0.02)
        if self.down is not None:
            nn.init.normal_(self.down, std=0.02)
        for parameter in (self.up, self.gate_bias, self.down_bias, self.up_bias):
            if parameter is not None:
                nn.init.zeros_(parameter)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def forward(
        self, visual: Tensor | None, text: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """``visual [..., dim]``, ``text [..., dim]``, lengths free, to tensors of their shapes.

        A stream that is None stays None.
        """
        return self._branch(visual, VISUAL), self._branch(text, TEXT)

    def _branch(self, x: Tensor | None, k: int) -> Tensor | None:
        if x is None:
            return None
        gate, down, up = (
            self._input(self.gate, k),
            self._input(self.down, k),
            self._output(self.up, k),
        )
        if self.gated and self.gate_bias is None:
            norm = None if self.norm_weight is None else (self.norm_weight[k], self.norm_eps)
            return swiglu_adapter(x, gate, down, up, norm=norm, scale=self.scale)
        n = x
        if self.norm_weight is not None:
            n = F.rms_norm(x, (self.dim,), self.norm_weight[k].to(x.dtype), self.norm_eps)
        z = F.silu(_linear(n, gate, self._input(self.gate_bias, k)))
        if self.gated:
            z = z * _linear(n, down, self._input(self.down_bias, k))
        delta = _linear(z, up, self._output(self.up_bias, k))
        return x + self.scale * delta.to(x.dtype)

    def _input(self, parameter: Tensor | None, k: int) -> Tensor | None:
        return None if parameter is None else parameter[0 if self.share_input else k]

    def _output(self, parameter: Tensor | None, k: int) -> Tensor | None:
        return parameter if parameter is None or self.share_up else parameter[k]

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, rank={self.rank}"
        if self.scale != 1.0:
            text += f", scale={self.scale}"
        if self.norm_eps is not None:
            text += f", norm_eps={self.norm_eps}"
        defaults = {"bias": False, "gated": True, "share_up": True, "share_input": False}
        given = {name: getattr(self, name, self.gate_bias is not None) for name in defaults}
        changed = (f", {name}={given[name]}" for name in defaults if given[name] != defaults[name])
        return text + "".join(changed)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
