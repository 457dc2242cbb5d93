"""LoRA on the language model in place of CROME's adapter, as large as that: a row of the ablations.

It is there from the start with its second factors zero, so that stages before the task and the
model before the task are CROME's own.
"""

from __future__ import annotations

import torch
from torch import nn

from mmadapt.models import CromeForConditionalGeneration, crome_components

ZERO_AT_START = ".lora_B."
"""In the names of the factors that make LoRA nothing while they are zero."""


def add_lora(model: CromeForConditionalGeneration) -> int:
    """Wrap every linear layer of the language model but its head; returns the rank.

    The rank is the one whose number of parameters comes nearest to the adapter's, at least 1.
    """
    from peft import LoraConfig, inject_adapter_in_model

    language_model = model.language_model
    head = language_model.get_output_embeddings()
    layers = {
        name: module
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    size = sum(p.numel() for _, p in crome_components(model)["adapter"])
    per_rank = sum(layer.in_features + layer.out_features for layer in layers.values())
    rank = max(1, round(size / per_rank))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(layers))
    inject_adapter_in_model(config, language_model)
    return rank


@torch.no_grad()
def clear_lora(model: nn.Module) -> None:
    """Make LoRA nothing again; does nothing where there is none."""
    for name, parameter in model.named_parameters():
        if ZERO_AT_START in name:
            parameter.zero_()
