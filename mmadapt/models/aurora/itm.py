"""Image-text matching with hard negatives: one positive and one negative pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmadapt.models.aurora.cross_states import CrossStates
from mmadapt.models.aurora.encoders import Text, Visual, encode_pairs
from mmadapt.models.aurora.frame_attention import frame_weights, token_scale
from mmadapt.models.aurora.gather import gather, gather_with_gradient, world_size
from mmadapt.models.aurora.ice import InformativeContext
from mmadapt.models.aurora.negatives import Negatives, sample_negatives

MATCH, NO_MATCH = 1, 0


class Pairs(NamedTuple):
    """A batch on its way through matching: [ENC] token ids, mask, both encodings, image ids."""

    ids: Tensor
    mask: Tensor
    visual: Visual
    text: Text
    image_ids: Tensor


def matching_loss(
    blip: Any,
    pairs: Pairs,
    *,
    temperature: Tensor | float,
    ice: InformativeContext,
    negative_all_rank: bool,
    frame_aware: bool,
    share: bool,
    sampler: Any = sample_negatives,
) -> Tensor:
    """Mean cross-entropy of `itm_head` over B positive and 2B negative pairs, a scalar.

    Pairs stand in the order [positives; text with a negative image; negative text with the
    image]. Negatives come from all ranks (`negative_all_rank`) or this one. `share`: the
    positive pass's image keys and values serve the negative pass too; with remote negatives only
    the rows whose image is local. Pairs of rows without any negative do not count.
    """
    visual, text = pairs.visual, pairs.text
    everyone = negative_all_rank and world_size() > 1
    candidates = _gathered(pairs) if everyone else pairs
    with torch.no_grad():
        i2t = visual.feature @ candidates.text.feature.T / temperature
        t2i = text.feature @ candidates.visual.feature.T / temperature
    # one rule for both directions: a pair of the same image is a match, not a negative
    negative_text = sampler(i2t, pairs.image_ids, candidates.image_ids)
    negative_image = sampler(t2i, pairs.image_ids, candidates.image_ids)

    recorder = CrossStates.recorder() if share else None
    positive = encode_pairs(
        blip,
        pairs.ids,
        pairs.mask,
        hidden=visual.hidden,
        record=recorder,
        scale=_scale(text.feature, visual) if frame_aware else None,
    )
    states = CrossStates.recorded(recorder) if share else None
    negative = _negative_pass(
        blip, pairs, candidates, negative_image, negative_text, states, frame_aware
    )
    positive, negative = ice.train_pairs(positive, negative, text.state)
    logits = blip.itm_head(torch.cat([positive, negative])).float()
    count = len(positive)
    labels = logits.new_full((3 * count,), NO_MATCH, dtype=torch.int64)
    labels[:count] = MATCH
    everything = torch.ones_like(negative_image.valid)
    valid = torch.cat([everything, negative_image.valid, negative_text.valid])
    losses = cross_entropy(logits, labels, reduction="none")
    return (losses * valid).sum() / valid.sum()


def _negative_pass(
    blip: Any,
    pairs: Pairs,
    candidates: Pairs,
    image: Negatives,
    text: Negatives,
    states: CrossStates | None,
    frame_aware: bool,
) -> Tensor:
    count = len(pairs.ids)
    ids = torch.cat([pairs.ids, candidates.ids[text.index]])
    mask = torch.cat([pairs.mask, candidates.mask[text.index]])
    scale = None
    if frame_aware:
        features = torch.cat([pairs.text.feature, candidates.text.feature[text.index]])
        frames = torch.cat([candidates.visual.frames[image.index], pairs.visual.frames])
        weights = frame_weights(features, frames)
        scale = token_scale(weights, pairs.visual.hidden.shape[1] // frames.shape[1])
    if states is not None and candidates is pairs:
        own = torch.arange(count, device=ids.device)
        both = states.take(torch.cat([image.index, own]))
        return encode_pairs(blip, ids, mask, states=both, scale=scale)
    remote = candidates.visual.hidden[image.index]
    if states is None:
        hidden = torch.cat([remote, pairs.visual.hidden])
        return encode_pairs(blip, ids, mask, hidden=hidden, scale=scale)
    first = None if scale is None else scale[:count]
    second = None if scale is None else scale[count:]
    return torch.cat(
        [
            encode_pairs(blip, ids[:count], mask[:count], hidden=remote, scale=first),
            encode_pairs(blip, ids[count:], mask[count:], states=states, scale=second),
        ]
    )


def _gathered(pairs: Pairs) -> Pairs:
    """The pairs of all ranks; gradients flow through the vision tokens only.

    This rank's own tokens keep their graph through `gather_with_gradient`.
    """
    visual, text = pairs.visual, pairs.text
    return Pairs(
        ids=gather(pairs.ids),
        mask=gather(pairs.mask),
        visual=Visual(
            gather_with_gradient(visual.hidden), gather(visual.feature), gather(visual.frames)
        ),
        text=Text(text.state, gather(text.feature)),
        image_ids=gather(pairs.image_ids),
    )


def _scale(text_feature: Tensor, visual: Visual) -> Tensor:
    weights = frame_weights(text_feature, visual.frames)
    return token_scale(weights, visual.hidden.shape[1] // visual.frames.shape[1])
