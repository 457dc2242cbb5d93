"""The value gate as a formula: plain torch, any float dtype, differentiated by autograd.

    y[t, h, :] = value[t, h, :] * tanh(logits[t, h])   where mask[t], else value[t, h, :]

Sources: PILL (arXiv 2311.02126), modality attention gating: logits from the token itself in the
released code (``projected_modality_gate``), one learned scalar per head in the paper's text.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def modality_gate(value: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """``value [T, H, h]``, ``logits [H]`` or ``[T, H]``, ``mask [T]`` bool."""
    gated = value * torch.tanh(logits).unsqueeze(-1)
    return torch.where(mask[:, None, None], gated, value).to(value.dtype)


def projected_modality_gate(value: Tensor, hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """``value [T, H, h]``, ``hidden [T, D]``, ``weight [H, D]``: logits = hidden weight^T.

    Rows outside the mask are blanked first, so that nothing in them can reach a gradient.
    """
    masked = torch.where(mask.unsqueeze(-1), hidden, 0.0)
    return modality_gate(value, linear(masked, weight), mask)
