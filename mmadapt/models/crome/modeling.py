"""CROME (arXiv 2408.06610) built from Hugging Face parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2VisionModel,
    GenerationConfig,
    GenerationMixin,
    InstructBlipQFormerModel,
    PreTrainedModel,
    initialization,
)

from mmadapt.models.crome.config import CromeModelConfig
from mmadapt.models.crome.placement import check_count, place
from mmadapt.models.crome.vision import block_outputs
from mmadapt.nn import CrossModalAdapter

# What LAVIS generates with; `generate` arguments override it.
GENERATION = {
    "num_beams": 5,
    "max_new_tokens": 256,
    "min_new_tokens": 1,
    "repetition_penalty": 1.5,
    "length_penalty": 1.0,
}
_TRAINED = ["image_projection", "text_projection", "adapter", "qformer", "query_tokens"]


class CromeForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Frozen ViT and language model with CROME's adapter in front of the latter.

    Every image stands in `input_ids` as `config.num_image_tokens` placeholders of
    `config.image_token_id`; `mmadapt.data.CromeCollator` makes such batches. Rows without
    placeholders are text alone and reach the language model untouched, also beside rows with
    images. What trains is chosen by `mmadapt.models.set_crome_stage`.

    The modules that train stay in float32 when the rest is loaded in half precision; train under
    autocast then. The vision tower is always in eval mode, and so is the Q-Former while frozen.

    Args:
        config: sizes and switches.
        language_model: used instead of a fresh one of `config.text_config`.
    """

    config_class = CromeModelConfig
    base_model_prefix = "crome"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Blip2EncoderLayer", "InstructBlipQFormerLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = _TRAINED
    _skip_keys_device_placement = "past_key_values"

    def __init__(self, config: CromeModelConfig, language_model: nn.Module | None = None) -> None:
        super().__init__(config)
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)
        qformer = config.qformer_config
        self.query_tokens = nn.Parameter(
            torch.zeros(1, config.num_query_tokens, qformer.hidden_size)
        )
        self.qformer = InstructBlipQFormerModel._from_config(qformer)
        dim = config.text_config.hidden_size
        width = config.vision_config.hidden_size
        self.image_projection = nn.Linear(width, dim) if config.uses_patches else None
        self.text_projection = nn.Linear(qformer.hidden_size, dim) if config.uses_queries else None
        self.adapter = _new_adapter(config)
        if language_model is None:
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            language_model = auto.from_config(config.text_config)
        self.language_model = language_model
        self.post_init()
        tokens = {
            name: getattr(config.text_config, name, None)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        }
        self.generation_config = GenerationConfig(**GENERATION, **tokens)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if module is self:
            initialization.normal_(self.query_tokens, std=std)
        elif isinstance(module, CrossModalAdapter):
            # Not module.reset_parameters(): these respect what a checkpoint has filled.
            for name, parameter in module.named_parameters():
                if name in ("gate", "down"):
                    initialization.normal_(parameter, std=std)
                elif name == "norm_weight":
                    initialization.ones_(parameter)
                else:
                    initialization.zeros_(parameter)

    def train(self, mode: bool = True) -> CromeForConditionalGeneration:
        """As `nn.Module.train`, but what is frozen in front of the language model stays in eval."""
        super().train(mode)
        self.vision_model.eval()
        if not any(parameter.requires_grad for parameter in self.qformer.parameters()):
            self.qformer.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.vision_model if modality == "image" else self.language_model.get_encoder()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def get_image_features(
        self,
        pixel_values: Tensor,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The vectors ``[images, num_image_tokens, d]`` of the images, in the order of the streams.

        Args:
            pixel_values: ``[images, 3, H, W]``.
            qformer_input_ids: ``[images, L]``, the instruction of each image in the Q-Former's
                vocabulary; needed unless `config.instruction_aware` is False.
            qformer_attention_mask: ``[images, L]``; ones by default.
        """
        config = self.config
        patches, queries = self._features(pixel_values, qformer_input_ids, qformer_attention_mask)
        visual = None if patches is None else _linear(self.image_projection, patches)
        text = None if queries is None else _linear(self.text_projection, queries)
        if config.reading == "R2":
            visual, text = torch.cat([text, visual], dim=1), None
        visual, text = self._adapt(visual, text)
        streams = {"visual": visual, "text": text}
        return torch.cat([streams[n] for n in config.order if streams.get(n) is not None], dim=1)

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        text_branch_mask: Tensor | None = None,
    ) -> Tensor:
        """The language model's input embeddings ``[B, S, d]``.

        Raises:
            ValueError: placeholders and images do not fit each other, or an input is missing.
        """
        config = self.config
        if config.image_token_id is None:
            raise ValueError("config.image_token_id is None; set the id that stands for an image")
        image = input_ids == config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(image, 0))
        if text_branch_mask is not None:
            if config.reading != "R2":
                raise ValueError("text_branch_mask belongs to config.reading='R2', this is 'R1'")
            _, adapted = self._adapt(None, _as_trained(self.adapter, embeds))
            mask = text_branch_mask.bool().unsqueeze(-1)
            embeds = torch.where(mask, adapted.to(embeds.dtype), embeds)
        images = 0 if pixel_values is None else len(pixel_values)
        if not torch.compiler.is_compiling():
            check_count(image, images, config.num_image_tokens)
        if pixel_values is None or config.num_image_tokens == 0:
            return embeds
        vectors = self.get_image_features(pixel_values, qformer_input_ids, qformer_attention_mask)
        return place(embeds, vectors, image, *config.image_tokens)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        text_branch_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's output; its `logits` cover all positions of `input_ids`.

        Args:
            input_ids: ``[B, S]``, an image as `config.num_image_tokens` placeholders. For an
                encoder-decoder this is the encoder's input.
            attention_mask: ``[B, S]``; ones by default.
            pixel_values: ``[images, 3, H, W]``, the images of all rows in order; None for text.
            qformer_input_ids, qformer_attention_mask: see `get_image_features`.
            text_branch_mask: ``[B, S]``, the instruction tokens that pass through the text branch
                (reading R2).
            inputs_embeds: in place of the first arguments, e.g. from `embed`.
            labels: ``[B, S]`` (decoder-only) or ``[B, A]`` (encoder-decoder), -100 where nothing is
                predicted: image, instruction and padding.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward takes either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(
                input_ids, pixel_values, qformer_input_ids, qformer_attention_mask, text_branch_mask
            )
        labels = None if labels is None else labels.contiguous()  # T5 takes a view of them
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        text_branch_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """New tokens only, from left-padded prompts. The image parts run once.

        `kwargs` are those of `GenerationMixin.generate`, over `generation_config`, whose defaults
        are LAVIS's: five beams, at most 256 new tokens, repetition penalty 1.5. As there, the
        penalty counts generated tokens only.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("generate takes either input_ids or inputs_embeds")
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            inputs_embeds = self.embed(
                input_ids, pixel_values, qformer_input_ids, qformer_attention_mask, text_branch_mask
            )
        if kwargs.get("generation_config") is None:
            kwargs = _generation_defaults(self.generation_config, kwargs) | kwargs
        return self.language_model.generate(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )

    def _features(
        self, pixel_values: Tensor, qformer_ids: Tensor | None, qformer_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Patch tokens ``[n, Np, width]`` and query outputs ``[n, Nq, hidden]`` of the images."""
        config = self.config
        taps = {}
        if config.uses_patches:
            taps["patch"] = config.tap("patch")
        if config.uses_queries:
            taps["qformer"] = config.tap("qformer")
        outputs = block_outputs(self.vision_model, pixel_values, set(taps.values()))
        patches = queries = None
        if "patch" in taps:
            patches = outputs[taps["patch"]][:, 0 if config.keep_cls else 1 :]
        if "qformer" in taps:
            seen = self.vision_model.post_layernorm(outputs[taps["qformer"]])
            queries = self._query(seen, qformer_ids, qformer_mask)
        return patches, queries

    def _query(self, seen: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        queries = self.query_tokens.expand(len(seen), -1, -1)
        if not self.config.instruction_aware:
            ids = mask = None
        elif ids is None or len(ids) != len(seen):
            got = "None" if ids is None else f"{len(ids)} rows"
            raise ValueError(
                f"qformer_input_ids: got {got} for {len(seen)} images, expected the instruction of "
                "each image (or set config.instruction_aware=False)"
            )
        if ids is not None:
            mask = torch.ones_like(ids) if mask is None else mask
            mask = torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1)
        output = self.qformer(
            input_ids=ids,
            attention_mask=mask,
            query_embeds=queries,
            encoder_hidden_states=_as_trained(self.qformer, seen),
        )
        return output.last_hidden_state[:, : queries.shape[1]]

    def _adapt(self, visual: Tensor | None, text: Tensor | None) -> tuple[Tensor | None, ...]:
        if self.adapter is None:
            return visual, text
        through = self.config.adapter_branches
        adapted = self.adapter(
            visual if "visual" in through else None, text if "text" in through else None
        )
        return tuple(
            new if new is not None else x for new, x in zip(adapted, (visual, text), strict=True)
        )


def _new_adapter(config: CromeModelConfig) -> CrossModalAdapter | None:
    if not config.adapter_branches:
        return None
    return CrossModalAdapter(
        config.text_config.hidden_size,
        config.adapter_rank,
        scale=config.adapter_residual_scale,
        norm_eps=1e-6 if config.adapter_pre_norm else None,
        bias=config.adapter_bias,
        gated=config.adapter_gated,
        share_up=config.adapter_share_up,
        share_input=config.adapter_share_input,
    )


def _generation_defaults(config: GenerationConfig, given: dict[str, Any]) -> dict[str, Any]:
    """What `config` sets, as arguments: a None among the given ones has to win over it."""
    defaults = config.to_diff_dict()
    for name in ("transformers_version", "_from_model_config"):
        defaults.pop(name, None)
    if given.get("max_length") is not None:
        defaults.pop("max_new_tokens", None)
    return defaults


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(x.to(layer.weight.dtype))


def _as_trained(module: nn.Module | None, x: Tensor) -> Tensor:
    """`x` in the dtype of a module's parameters, which may be wider than that of frozen parts."""
    return x if module is None else x.to(next(module.parameters()).dtype)
