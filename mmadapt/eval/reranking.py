"""Two-stage retrieval: cosine similarity proposes, the multimodal encoder decides.

Every image takes its `k_test` most similar texts and every text its `k_test` most similar images;
these pairs are scored by the ITM head. The work goes image by image: an image's keys and values
are computed once for all texts it meets, and a pair that both lists hold is scored once. Ranks
of a distributed run take images in turn and put their scores together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmadapt.eval._batches import Progress, eval_mode
from mmadapt.eval.retrieval import UNSCORED, RetrievalMetrics, retrieval_metrics
from mmadapt.models.aurora import (
    CrossStates,
    InformativeContext,
    blip_of,
    encode_pairs,
    encode_text,
    encode_visual,
    frame_weights,
    rank,
    token_scale,
    with_first_token,
    world_size,
)


@dataclass(frozen=True)
class RerankResult:
    """`i2t` [I, T], `t2i` [T, I]: scores, `UNSCORED` elsewhere. `similarity` [I, T]: cosines.

    `pairs`: scored pairs of all ranks.
    """

    i2t: Tensor
    t2i: Tensor
    similarity: Tensor
    pairs: int

    def metrics(self, text_image: Tensor) -> RetrievalMetrics:
        return retrieval_metrics(self.i2t, self.t2i, text_image.to(self.i2t.device))


@dataclass(frozen=True)
class _Gallery:
    ids: Tensor  # [T, L], first token [ENC]
    mask: Tensor
    text: Tensor  # [T, D]
    context: Tensor | None
    own: range  # images of this rank
    hidden: list[Tensor]  # of this rank's images, [S, d] each
    frames: Tensor  # [own, F, D]
    similarity: Tensor  # [I, T]


@torch.no_grad()
def rerank(
    model: nn.Module,
    images: Sequence[Tensor] | Any,
    ids: Tensor,
    mask: Tensor,
    *,
    enc_token_id: int,
    k_test: int,
    similarity_weight: float = 0.0,
    ice: InformativeContext | None = None,
    frame_aware: bool = False,
    batch_size: int = 32,
    offload: bool = False,
    progress: Progress | None = None,
) -> RerankResult:
    """Score a gallery.

    Args:
        model: `BlipForImageTextRetrieval`, bare or in a PEFT wrapper; put in eval mode meanwhile.
        images: a sequence of pixel values `[3, H, W]`, or `[F, 3, H, W]` for videos, fetched
            one at a time.
        ids, mask: all texts `[T, L]`, first token [CLS].
        k_test: candidates of every image and every text. At most the gallery's size.
        similarity_weight: w in score = ITM logit + w * similarity. Aurora: 0 for images, 1 for
            videos; BLIP 1.
        ice: the objective's; matters in mode "symmetric+inference" only.
        frame_aware: scale frames by their similarity as in training (released: training only).
        batch_size: images or texts in one pass.
        offload: keep the images' tokens in host memory (COCO's test set: 8.9 GB in fp32).

    Raises:
        ValueError: k_test outside 1..min(images, texts).
    """
    smaller = min(len(images), len(ids))
    if not 1 <= k_test <= smaller:
        raise ValueError(f"k_test: expected 1..{smaller} (the gallery), got {k_test}")
    ice = ice or InformativeContext("off")
    blip = blip_of(model)
    with eval_mode(model):
        gallery = _encode(blip, images, ids, mask, enc_token_id, ice, batch_size, offload)
        similarity = gallery.similarity
        by_image = _top(similarity, k_test)
        by_text = _top(similarity.T, k_test).T
        scores = torch.full_like(similarity, -torch.inf)
        for number, image in enumerate(gallery.own):
            chosen = (by_image[image] | by_text[image]).nonzero().squeeze(1)
            if len(chosen):
                scores[image, chosen] = _score_image(
                    blip, gallery, number, chosen, ice, frame_aware, batch_size
                )
            if progress is not None:
                progress(number + 1, len(gallery.own))
    _maximum(scores)  # each entry was scored by one rank, the others hold -inf
    scores = scores + similarity_weight * similarity
    i2t = scores.masked_fill(~by_image, UNSCORED)
    t2i = scores.masked_fill(~by_text, UNSCORED).T
    return RerankResult(i2t, t2i, similarity, int((by_image | by_text).sum()))


def _top(similarity: Tensor, k: int) -> Tensor:
    """Mask of each row's k largest; equal ones in order of their index."""
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, order, True)


def _encode(
    blip: Any,
    images: Any,
    ids: Tensor,
    mask: Tensor,
    enc_token_id: int,
    ice: InformativeContext,
    batch_size: int,
    offload: bool,
) -> _Gallery:
    device = next(blip.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    texts = [
        encode_text(blip, ids[rows], mask[rows]) for rows in _chunks(_shard(len(ids)), batch_size)
    ]
    width = blip.config.text_config.hidden_size
    text = _together([t.feature for t in texts], len(ids), blip.text_proj.out_features, device)
    context = None
    if ice.mode == "symmetric+inference":
        context = ice.context(_together([t.state for t in texts], len(ids), width, device))

    own = _shard(len(images))
    hidden, features, frames = [], [], []
    for rows in _chunks(own, batch_size):
        pixels = torch.stack([images[i] for i in range(rows.start, rows.stop)]).to(device)
        seen = encode_visual(blip, pixels)
        hidden += list(seen.hidden.cpu() if offload else seen.hidden)
        features.append(seen.feature)
        frames.append(seen.frames)
    feature = _together(features, len(images), text.shape[1], device)
    return _Gallery(
        ids=with_first_token(ids, enc_token_id),
        mask=mask,
        text=text,
        context=context,
        own=own,
        hidden=hidden,
        frames=torch.cat(frames) if frames else text.new_zeros(0, 1, text.shape[1]),
        similarity=feature @ text.T,
    )


def _score_image(
    blip: Any,
    gallery: _Gallery,
    number: int,
    texts: Tensor,
    ice: InformativeContext,
    frame_aware: bool,
    batch_size: int,
) -> Tensor:
    """ITM logits `[len(texts)]` of one image with these texts."""
    hidden = gallery.hidden[number][None].to(texts.device)
    states = CrossStates.of(blip.text_encoder, hidden)
    logits = []
    for chosen in texts.split(batch_size):
        mask = gallery.mask[chosen]
        length = int(mask.sum(1).max())  # texts are padded to the longest of the whole gallery
        scale = None
        if frame_aware:
            frames = gallery.frames[number].expand(len(chosen), -1, -1)
            weights = frame_weights(gallery.text[chosen], frames)
            scale = token_scale(weights, hidden.shape[1] // frames.shape[1])
        fused = encode_pairs(
            blip,
            gallery.ids[chosen, :length],
            mask[:, :length],
            states=states.expand(len(chosen)),
            scale=scale,
        )
        fused = ice.scored_pairs(fused, gallery.context)
        logits.append(blip.itm_head(fused)[:, 1].float())
    return torch.cat(logits)


# --- ranks -----------------------------------------------------------------------------------


def _world() -> tuple[int, int]:
    return rank(), world_size()


def _shard(count: int) -> range:
    """This rank's share of `count` items: neighbouring ones, of almost equal number."""
    place, world = _world()
    return range(count * place // world, count * (place + 1) // world)


def _chunks(items: range, size: int) -> Iterator[slice]:
    for start in range(items.start, items.stop, size):
        yield slice(start, min(start + size, items.stop))


def _together(parts: list[Tensor], count: int, width: int, device: Any) -> Tensor:
    """Rows of all ranks `[count, width]` in order; every rank brings its shard. fp32."""
    whole = torch.zeros(count, width, device=device)
    own = _shard(count)
    if parts:
        whole[own.start : own.stop] = torch.cat(parts).float()
    if _world()[1] > 1:
        dist.all_reduce(whole)
    return whole


def _maximum(scores: Tensor) -> None:
    if _world()[1] > 1:
        dist.all_reduce(scores, op=dist.ReduceOp.MAX)
