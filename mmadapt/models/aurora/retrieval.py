"""Aurora's retrieval objective on Hugging Face's BLIP: contrast with a queue, and matching."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmadapt.models.aurora.encoders import (
    Text,
    Visual,
    blip_of,
    branch_dropout,
    clamp_temperature,
    encode_text,
    encode_visual,
    with_first_token,
)
from mmadapt.models.aurora.ice import ICEMode, InformativeContext
from mmadapt.models.aurora.itc import contrastive_loss, ramped_alpha
from mmadapt.models.aurora.itm import Pairs, matching_loss
from mmadapt.models.aurora.momentum import MomentumWeights
from mmadapt.models.aurora.negatives import sample_negatives
from mmadapt.models.aurora.queue import FeatureQueue

_MOMENTUM_PARTS = ("vision_model.", "vision_proj.", "text_encoder.", "text_proj.", "tuner.")


class RetrievalLoss(NamedTuple):
    """`loss = itc + itm`, scalars."""

    loss: Tensor
    itc: Tensor
    itm: Tensor


class RetrievalObjective(nn.Module):
    """Loss of a batch of images or videos with their captions (BLIP, Aurora; arXiv 2305.08381).

    Args:
        model: `BlipForImageTextRetrieval`, bare or in a PEFT wrapper. What requires a gradient
            when the objective is made gets a momentum copy; nothing else does.
        enc_token_id: the [ENC] token, first token of texts that are read beside an image.
        queue_size: pairs of past features; a multiple of the batch of all ranks.
        temperature: of the similarities; clamped to [0.001, 0.5] before every step.
        train_temperature: BLIP trains it, the released Aurora does not.
        alpha: weight of soft targets, ramped over epoch 0 by `set_progress`.
        momentum: of the momentum encoders.
        momentum_initial: name -> start of a momentum weight that differs from the model's
            (a checkpoint's `*_m` tensors); names as in the BLIP model.
        momentum_factors: "live": the momentum encoders use the present values of parameters that
            a tuner keeps outside the layers (Aurora's shared factors), as the released code does;
            "ema": their averages.
        momentum_dropout: dropout stays active in the momentum encoders, as in the released code.
        negative_all_rank: hard negatives from all ranks, with gradient, or this one's.
        ice, ice_factor: see `InformativeContext`.
        frame_aware: see `frame_attention`; for videos.
        share_image_states: image keys and values of the positive pass serve the negative pass.
            None: where that changes nothing, that is without dropout inside their adapters and
            without activation checkpointing.

    Raises:
        ValueError: a model of another class; sharing asked for where it cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        enc_token_id: int,
        queue_size: int = 57_600,
        temperature: float = 0.07,
        train_temperature: bool = False,
        alpha: float = 0.4,
        momentum: float = 0.995,
        momentum_initial: Mapping[str, Tensor] | None = None,
        momentum_factors: Literal["live", "ema"] = "live",
        momentum_dropout: bool = True,
        negative_all_rank: bool = False,
        ice: ICEMode = "released",
        ice_factor: float = 0.1,
        frame_aware: bool = False,
        share_image_states: bool | None = None,
    ) -> None:
        super().__init__()
        blip = blip_of(model)
        for part in ("vision_model", "text_encoder", "vision_proj", "text_proj", "itm_head"):
            if not hasattr(blip, part):
                raise ValueError(
                    f"model: expected a BlipForImageTextRetrieval, got {type(blip).__name__} "
                    f"without {part}"
                )
        self.model = model
        self.enc_token_id = enc_token_id
        self.alpha, self._alpha_now = alpha, alpha
        self.momentum_dropout = momentum_dropout
        self.negative_all_rank = negative_all_rank
        self.frame_aware = frame_aware
        self.share_image_states = share_image_states
        self.sampler = sample_negatives
        self.temperature = nn.Parameter(
            torch.tensor(float(temperature)), requires_grad=train_temperature
        )
        self.ice = InformativeContext(ice, factor=ice_factor)
        self.queue = FeatureQueue(queue_size, blip.vision_proj.out_features)
        if momentum_factors not in ("live", "ema"):
            raise ValueError(f"momentum_factors: expected live or ema, got {momentum_factors!r}")
        averaged = dict(blip.named_parameters())
        if momentum_factors == "ema":
            own = {id(parameter) for parameter in averaged.values()}
            outside = {n: p for n, p in model.named_parameters() if id(p) not in own}
            averaged |= {f"tuner.{name}": parameter for name, parameter in outside.items()}
        averaged = {n: p for n, p in averaged.items() if n.startswith(_MOMENTUM_PARTS)}
        self.momentum = MomentumWeights(averaged, momentum=momentum, initial=momentum_initial)

    @property
    def blip(self) -> Any:
        return blip_of(self.model)

    def set_progress(self, *, epoch: int, batch: int, batches: int) -> None:
        """Where training stands: ramps the weight of the soft targets over epoch 0."""
        self._alpha_now = ramped_alpha(self.alpha, epoch=epoch, batch=batch, batches=batches)

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, image_ids: Tensor
    ) -> RetrievalLoss:
        """One training step's loss; moves the momentum weights and the queue on.

        `pixel_values` [B, 3, H, W] or [B, T, 3, H, W]; `input_ids`, `attention_mask` [B, L] start
        with [CLS]; `image_ids` [B] int64 >= 0, equal for captions of one image.
        """
        clamp_temperature(self.temperature.data)
        self.queue.flush()
        with torch.no_grad():
            self.momentum.update()
            visual_m, text_m = self._momentum_features(pixel_values, input_ids, attention_mask)
        visual = encode_visual(self.blip, pixel_values)
        text = encode_text(self.blip, input_ids, attention_mask)
        # similarities / temperature need fp32 whatever the encoders run in
        with torch.autocast(pixel_values.device.type, enabled=False):
            itc = contrastive_loss(
                visual.feature.float(),
                text.feature.float(),
                visual_m,
                text_m,
                image_ids,
                image_queue=self.queue.image,
                text_queue=self.queue.text,
                queue_ids=self.queue.ids,
                temperature=self.temperature,
                alpha=self._alpha_now,
            )
        self.queue.enqueue(visual_m, text_m, image_ids)
        itm = self._matching(visual, text, input_ids, attention_mask, image_ids)
        return RetrievalLoss(itc + itm, itc, itm)

    def _matching(
        self, visual: Visual, text: Text, ids: Tensor, mask: Tensor, image_ids: Tensor
    ) -> Tensor:
        pairs = Pairs(with_first_token(ids, self.enc_token_id), mask, visual, text, image_ids)
        return matching_loss(
            self.blip,
            pairs,
            temperature=self.temperature.detach(),
            ice=self.ice,
            negative_all_rank=self.negative_all_rank,
            frame_aware=self.frame_aware,
            share=self._shares(),
            sampler=self.sampler,
        )

    def _shares(self) -> bool:
        text_model = self.blip.text_encoder
        checkpointing = text_model.training and any(
            getattr(module, "gradient_checkpointing", False) for module in text_model.modules()
        )
        possible = not checkpointing and not branch_dropout(text_model)
        if self.share_image_states and not possible:
            raise ValueError(
                "share_image_states: adapters drop out inside the image keys and values, or "
                "activations are checkpointed; pass None or False"
            )
        return possible if self.share_image_states is None else self.share_image_states

    def _momentum_features(
        self, pixels: Tensor, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        with self.momentum.in_place(), self._dropout_of_momentum():
            visual = encode_visual(self.blip, pixels)
            text = encode_text(self.blip, ids, mask)
        return visual.feature.float(), text.feature.float()

    @contextmanager
    def _dropout_of_momentum(self):
        if self.momentum_dropout or not self.training:
            yield
            return
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
