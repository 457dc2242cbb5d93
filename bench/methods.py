"""A frozen language model tuned in five ways, for `bench.step`, all on the same frozen weights.

`frozen` trains the visual projection alone: the bare model's forward and backward. `lora` is LoRA
by PEFT on all linears, `lora-manual` the same with hand-written autograd in the manner of Unsloth
(without its kernels for norms, RoPE and the loss). `pill-eager` composes the released equations of
PILL, `pill` is mmadapt's tuner. Every method trains the projection from 768 too, as PILL does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench import llama
from bench.cases import IMAGE_TOKENS
from bench.cases.block import released, temper, weights_of
from bench.llama import Geometry
from bench.peers import manual

FEATURES = 768
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION, MLP = LINEARS[:4], LINEARS[4:]


@dataclass
class Batch:
    """Visual features [B, 32, 768], text ids [B, S - 32], labels and modality [B, S]."""

    features: Tensor
    ids: Tensor
    labels: Tensor
    modality: Tensor

    @classmethod
    def draw(
        cls, size: int, length: int, vocabulary: int, dtype: torch.dtype, device: torch.device
    ) -> Batch:
        if length <= IMAGE_TOKENS:
            raise ValueError(f"length must exceed the {IMAGE_TOKENS} image tokens, got {length}")
        draw = torch.Generator(device).manual_seed(0)
        images = torch.randn(size, IMAGE_TOKENS, FEATURES, generator=draw, device=device)
        shape = (size, length - IMAGE_TOKENS)
        ids = torch.randint(vocabulary, shape, generator=draw, device=device)
        unlabelled = ids.new_full((size, IMAGE_TOKENS), -100)
        modality = torch.arange(length, device=device).lt(IMAGE_TOKENS).int().expand(size, length)
        return cls(images.to(dtype), ids, torch.cat((unlabelled, ids), 1), modality.contiguous())

    def rows(self, start: int, stop: int) -> Batch:
        return Batch(*(t[start:stop] for t in vars(self).values()))

    @property
    def tokens(self) -> int:
        return self.labels.numel()


@dataclass
class Method:
    """`loss(batch)`, the parameters that train, and the Hugging Face model inside."""

    name: str
    model: nn.Module
    projection: nn.Linear
    takes_modality: bool
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = (*self.projection.named_parameters(prefix="projection"), *trained(self.model))
        self.parameters = dict(named)

    def loss(self, batch: Batch) -> Tensor:
        inner = self.model.get_base_model() if self.name in ("lora", "pill") else self.model
        text = inner.model.embed_tokens(batch.ids)
        embeds = torch.cat((self.projection(batch.features), text), 1)
        ids = {"modality_ids": batch.modality} if self.takes_modality else {}
        return self.model(inputs_embeds=embeds, labels=batch.labels, use_cache=False, **ids).loss

    def checkpointing(self, on: bool) -> None:
        """Activation checkpointing of every decoder layer."""
        if on:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    @property
    def trained(self) -> int:
        return sum(p.numel() for p in self.parameters.values())


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def pill_size(geometry: Geometry, rank: int) -> int:
    """Trained parameters of PILL without its projection: N (9 d m + d H)."""
    return geometry.layers * geometry.dim * (9 * rank + geometry.heads)


def lora_rank(geometry: Geometry, parameters: int) -> int:
    """The rank at which LoRA on all linears comes nearest to `parameters`."""
    one = geometry.layers * (8 * geometry.dim + 3 * (geometry.dim + geometry.ffn))
    return max(1, round(parameters / one))


def build(name: str, base: nn.Module, geometry: Geometry, rank: int, dtype: torch.dtype) -> Method:
    """One method on modules of its own that share the frozen weights of `base`.

    Args:
        name: one of `METHODS`.
        base: a `LlamaForCausalLM`.
        rank: of PILL; LoRA's follows from the number of parameters.
        dtype: of what is trained.
    """
    torch.manual_seed(0)
    device = base.lm_head.weight.device
    projection = nn.Linear(FEATURES, geometry.dim, bias=False, device=device, dtype=dtype)
    nn.init.normal_(projection.weight, std=0.02)
    model = METHODS[name](llama.sharing(base), geometry, rank, dtype)
    return Method(name, model.train(), projection, takes_modality=name == "pill")


def _frozen(model: nn.Module, geometry: Geometry, rank: int, dtype: torch.dtype) -> nn.Module:
    return model


def _lora(model: nn.Module, geometry: Geometry, rank: int, dtype: torch.dtype) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    r = lora_rank(geometry, pill_size(geometry, rank))
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules=list(LINEARS))
    found = get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    for _, parameter in trained(found):
        parameter.data = parameter.data.to(dtype)
    return found


def _lora_manual(model: nn.Module, geometry: Geometry, rank: int, dtype: torch.dtype) -> nn.Module:
    """With the weights that `_lora` draws, so that both start from the same gradients."""
    twin = _lora(llama.sharing(model), geometry, rank, dtype).base_model.model
    for layer, tuned in zip(model.model.layers, twin.model.layers, strict=True):
        for name in ATTENTION:
            setattr(layer.self_attn, name, ManualLoRA(getattr(tuned.self_attn, name)))
        layer.mlp = ManualMLP(tuned.mlp)
    return model


class ManualLoRA(nn.Module):
    """The weights of one of PEFT's LoRA layers, with hand-written autograd."""

    def __init__(self, tuned: nn.Module):
        super().__init__()
        self.weight = tuned.base_layer.weight
        self.lora_A = tuned.lora_A["default"].weight
        self.lora_B = tuned.lora_B["default"].weight
        self.scale = tuned.scaling["default"]

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.weight.dtype
        return self.weight, self.lora_A.to(dtype), self.lora_B.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return manual.LoRA.apply(x, *self.factors(), self.scale)


class ManualMLP(nn.Module):
    """LLaMA's FFN with LoRA on its three linears as one autograd node."""

    def __init__(self, tuned: nn.Module):
        super().__init__()
        for name in MLP:
            setattr(self, name, ManualLoRA(getattr(tuned, name)))

    def forward(self, x: Tensor) -> Tensor:
        factors = [t for name in MLP for t in getattr(self, name).factors()]
        return manual.LoRAMLP.apply(x, self.gate_proj.scale, *factors)


def _pill(model: nn.Module, geometry: Geometry, rank: int, dtype: torch.dtype) -> nn.Module:
    from peft import get_peft_model

    from mmadapt.peft import PillConfig

    config = PillConfig(rank=rank, stage="instruct", init_weights=False)
    found = get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    for layer in found.base_model.model.model.layers:
        temper(layer)
    for _, parameter in trained(found):
        parameter.data = parameter.data.to(dtype)
    return found


PILL_PARTS = {"attn": "self_attn", "text": "mlp", "vision": "mlp"}


def pill_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A tuned layer's adapters by the names of `bench.cases.block`."""
    found = {
        f"{part}_{weight}": getattr(
            getattr(getattr(layer, sublayer), f"mmadapt_pill_{part}")["default"], weight
        )
        for part, sublayer in PILL_PARTS.items()
        for weight in ("gate", "down", "up")
    }
    return found | {"value_gate": layer.self_attn.mmadapt_pill_gate["default"].gate}


def _pill_eager(model: nn.Module, geometry: Geometry, rank: int, dtype: torch.dtype) -> nn.Module:
    """With the weights that `_pill` draws, so that both start from the same loss."""
    twin = _pill(llama.sharing(model), geometry, rank, dtype).base_model.model
    kind = _released_layer()
    for i, layer in enumerate(twin.model.layers):
        model.model.layers[i] = kind(model.model.layers[i], pill_parameters(layer), geometry.heads)
    return model


def _released_layer() -> type[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    class ReleasedLayer(GradientCheckpointingLayer):
        """A decoder layer by the released equations; the first 32 tokens are the image."""

        def __init__(self, layer: nn.Module, adapters: dict[str, nn.Parameter], heads: int):
            super().__init__()
            self.layer, self.heads = layer, heads
            self.adapters = nn.ParameterDict(adapters)

        def forward(self, hidden_states: Tensor, *args, position_embeddings=None, **kwargs):
            run: Callable[..., Tensor] = released(position_embeddings, self.heads, explicit=False)
            image = torch.arange(hidden_states.shape[1], device=hidden_states.device).lt(
                IMAGE_TOKENS
            )
            tensors = {**weights_of(self.layer), **self.adapters}
            return run(hidden_states, image.expand(hidden_states.shape[:2]), **tensors)

    return ReleasedLayer


METHODS: dict[str, Callable[..., nn.Module]] = {
    "frozen": _frozen,
    "lora": _lora,
    "lora-manual": _lora_manual,
    "pill-eager": _pill_eager,
    "pill": _pill,
}
