"""PEFT's own LoRA layers at equal rank. A yardstick: LoRA has no mode, so it computes a product of
width R less, and is not gated. Optional dependency."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.case import Provider


def lora(weights: list[Tensor], rank: int, scale: float) -> Provider:
    """x through one LoRA layer a weight; A and B are the case's `factor_in` and `factor_out`."""
    if importlib.util.find_spec("peft") is None:
        return Provider(_absent, gated=False, skip="not installed")
    return Provider(_layers(weights, rank, scale), gated=False)


def _absent(**tensors: Tensor) -> Tensor:
    raise ModuleNotFoundError("peft")


def _layers(weights: list[Tensor], rank: int, scale: float) -> Callable[..., tuple[Tensor, ...]]:
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Module()
    for k, weight in enumerate(weights):
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        base.weight = nn.Parameter(weight, requires_grad=False)
        model.add_module(f"w{k}", base)
    names = [f"w{k}" for k in range(len(weights))]
    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=names)
    inject_adapter_in_model(config, model)
    layers = [getattr(model, name) for name in names]

    def run(x: Tensor, factor_in: Tensor, factor_out: Tensor, **tensors: Tensor):
        factors = {"lora_A.default.weight": factor_in, "lora_B.default.weight": factor_out}
        return tuple(torch.func.functional_call(layer, factors, (x,)) for layer in layers)

    return run
