"""Report where a model's CROME adapter sits, which streams it has and which backend serves them."""

from dataclasses import dataclass

import torch
from torch import nn

from mmadapt import ops
from mmadapt.peft.crome.layer import ADAPTER, CromeLayer


@dataclass(frozen=True)
class CromeReport:
    """How the active CROME adapter runs.

    Attributes:
        path: of the wrapped module.
        streams: that pass through the adapter.
        backend: that serves its operator; None where it runs on torch's own functions.
        reason: why the latter.
    """

    path: str
    streams: tuple[str, ...]
    backend: str | None
    reason: str | None

    def __str__(self) -> str:
        how = self.backend or f"no operator: {self.reason}"
        return f"{self.path}: {how}, streams {' and '.join(self.streams) or 'none'}"


@torch.no_grad()
def explain_crome(model: nn.Module, tokens: int = 1024) -> list[CromeReport]:
    """One report for each wrapped module: the projector, or a bare language model's embeddings."""
    return [
        _report(name, module, tokens)
        for name, module in model.named_modules()
        if isinstance(module, CromeLayer)
    ]


def _report(path: str, layer: CromeLayer, tokens: int) -> CromeReport:
    config = layer.config
    if config is None:
        return CromeReport(path, (), None, "no adapter is active here")
    streams = ("visual", "text") if layer.has_two_streams(config) else (layer.stream,)
    if not config.gated or config.adapter_bias:
        return CromeReport(path, streams, None, "the operator has no biases and always a gate")
    adapter = getattr(layer, ADAPTER)[layer.current]
    norm = None if adapter.norm_weight is None else (adapter.norm_weight[0], adapter.norm_eps)
    up = adapter.up if adapter.share_up else adapter.up[0]
    parameter = next(p for p in layer.base_layer.parameters() if p.is_floating_point())
    half = parameter.dtype in (torch.bfloat16, torch.float16) and up.dtype == torch.float32
    x = parameter.new_empty(tokens, layer.dim, dtype=parameter.dtype if half else up.dtype)
    choice = ops.explain("swiglu_adapter", x, adapter.gate[0], adapter.down[0], up, norm=norm)
    return CromeReport(path, streams, choice.backend, None)
