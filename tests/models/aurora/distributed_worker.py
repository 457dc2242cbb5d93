"""Run by test_distributed.py on every rank: a training step and an evaluation in several ranks."""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from mmadapt.eval.reranking import rerank
from mmadapt.models.aurora import (
    Negatives,
    RetrievalObjective,
    contrastive_loss,
    encode_pairs,
    encode_text,
    encode_visual,
    with_first_token,
)

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

BATCH, QUEUE, TEMPERATURE = 3, 12, 0.07


def hardest(logits, ids, candidate_ids):
    """Deterministic: the most similar candidate of another id."""
    same = ids[:, None] == candidate_ids
    return Negatives(logits.masked_fill(same, -torch.inf).argmax(1), ~same.all(1))


def batches(ranks):
    """One image (id 1) has captions on two ranks: it must not be its own negative."""
    ids = [[0, 1, 2], [3, 1, 4], [5, 6, 7]]
    return [tiny.make_batch(BATCH, seed=r, image_ids=ids[r]) for r in range(ranks)]


def make_objective(model, share):
    torch.manual_seed(5)
    objective = RetrievalObjective(
        model,
        enc_token_id=tiny.ENC,
        queue_size=QUEUE,
        negative_all_rank=True,
        share_image_states=share,
    )
    objective.sampler = hardest
    return objective.train()


def emulated(ranks):
    """Losses and gradients of the mean loss, all ranks' batches in this process."""
    model = tiny.make_retrieval()
    queue = make_objective(model, False).queue
    all_batches = batches(ranks)
    visual = [encode_visual(model, b["pixel_values"]) for b in all_batches]
    text = [encode_text(model, b["input_ids"], b["attention_mask"]) for b in all_batches]
    hidden = torch.cat([v.hidden for v in visual])
    pair_ids = torch.cat([with_first_token(b["input_ids"], tiny.ENC) for b in all_batches])
    masks = torch.cat([b["attention_mask"] for b in all_batches])
    image_features = torch.cat([v.feature for v in visual]).detach()
    text_features = torch.cat([t.feature for t in text]).detach()
    ids = torch.cat([b["image_ids"] for b in all_batches])
    losses = []
    for r in range(ranks):
        own = slice(r * BATCH, (r + 1) * BATCH)
        itc = contrastive_loss(
            visual[r].feature,
            text[r].feature,
            visual[r].feature.detach(),
            text[r].feature.detach(),
            ids[own],
            image_queue=queue.image,
            text_queue=queue.text,
            queue_ids=queue.ids,
            temperature=TEMPERATURE,
            alpha=0.4,
        )
        negative_text = hardest(image_features[own] @ text_features.T, ids[own], ids).index
        negative_image = hardest(text_features[own] @ image_features.T, ids[own], ids).index
        rows = torch.arange(own.start, own.stop)
        texts = torch.cat([rows, rows, negative_text])
        images = torch.cat([rows, negative_image, rows])
        fused = encode_pairs(model, pair_ids[texts], masks[texts], hidden=hidden[images])
        context = 0.1 * text[r].state.mean(0)
        fused = torch.cat([fused[:BATCH] + context, fused[BATCH:]])
        labels = torch.tensor([1] * BATCH + [0] * 2 * BATCH)
        losses.append(itc + cross_entropy(model.itm_head(fused), labels))
    (sum(losses) / ranks).backward()
    return [loss.detach() for loss in losses], {n: p.grad for n, p in model.named_parameters()}


def check_step(rank, ranks, share):
    losses, expected = emulated(ranks)
    model = tiny.make_retrieval()
    objective = make_objective(model, share)
    parallel = DistributedDataParallel(objective, broadcast_buffers=False)
    out = parallel(**batches(ranks)[rank])
    out.loss.backward()
    assert abs(out.loss - losses[rank]) <= 1e-5, (out.loss, losses[rank])
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).norm()
        assert error <= 1e-4 * expected[name].norm() + 1e-7, (name, error)
    objective.queue.flush()
    ids = torch.cat([b["image_ids"] for b in batches(ranks)])
    assert torch.equal(objective.queue.ids[: len(ids)], ids)
    states = [torch.empty_like(objective.queue.image) for _ in range(ranks)]
    dist.all_gather(states, objective.queue.image)
    assert all(torch.equal(states[0], other) for other in states)


def score():
    gallery = tiny.make_batch(5)["pixel_values"], *tiny.make_texts(11)
    options = {"enc_token_id": tiny.ENC, "k_test": 3, "batch_size": 2}
    return rerank(tiny.make_retrieval(), *gallery, **options)


def main(rank, ranks, folder):
    alone = score()
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    together = score()
    assert torch.equal(alone.i2t == -100, together.i2t == -100)
    for name in ("i2t", "t2i"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name))
    assert together.pairs == alone.pairs
    if ranks == 2:
        for share in (False, True):
            check_step(rank, ranks, share)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
