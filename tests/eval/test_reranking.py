"""The image-major scorer with cached keys and values against one pair after another."""

import importlib.util
from pathlib import Path

import pytest
import torch

from mmadapt.eval.reranking import rerank
from mmadapt.eval.retrieval import UNSCORED
from mmadapt.models.aurora import InformativeContext, RetrievalObjective, encode_text

PATH = Path(__file__).resolve().parents[1] / "models" / "aurora" / "tiny.py"
_spec = importlib.util.spec_from_file_location("tiny_blip", PATH)
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

IMAGES, TEXTS, K = 6, 12, 4
TEXT_IMAGE = torch.arange(TEXTS) // 2


@pytest.fixture(scope="module")
def gallery():
    pixels = torch.randn(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return pixels, *tiny.make_texts(TEXTS)


@torch.no_grad()
def naive(model, pixels, ids, mask, k, weight=0.0, added=0.0):
    """As the released evaluation: row by row, one pair at a time, image recomputed."""
    cosines = model(ids, pixels, attention_mask=mask, use_itm_head=False).itm_score
    pair_ids = ids.clone()
    pair_ids[:, 0] = tiny.ENC

    def score(image, text):
        seen = model(
            pair_ids[text, None], pixels[image, None], attention_mask=mask[text, None]
        ).question_embeds[:, 0]
        return model.itm_head(seen + added)[0, 1] + weight * cosines[image, text]

    i2t = torch.full((IMAGES, TEXTS), UNSCORED)
    t2i = torch.full((TEXTS, IMAGES), UNSCORED)
    for image in range(IMAGES):
        for text in cosines[image].topk(k).indices:
            i2t[image, text] = score(image, text)
    for text in range(TEXTS):
        for image in cosines[:, text].topk(k).indices:
            t2i[text, image] = score(image, text)
    return i2t, t2i


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("k", [1, K, IMAGES])
def test_equals_the_row_by_row_scorer(k, weight, gallery):
    model = tiny.make_retrieval(dropout=0.3).train()  # the scorer puts it to rest and back
    found = rerank(
        model,
        *gallery,
        enc_token_id=tiny.ENC,
        k_test=k,
        similarity_weight=weight,
        batch_size=5,
    )
    assert model.training and model.text_encoder.training
    model.eval()
    i2t, t2i = naive(model, *gallery, k, weight)
    for ours, theirs in ((found.i2t, i2t), (found.t2i, t2i)):
        assert torch.equal(ours == UNSCORED, theirs == UNSCORED)
        assert (ours - theirs).abs().max() <= 1e-3
        assert (ours - theirs).abs().max() <= 1e-5  # measured, tiny widths
    expected = found.__class__(i2t, t2i, found.similarity, 0).metrics(TEXT_IMAGE)
    assert found.metrics(TEXT_IMAGE) == expected


def test_keys_and_values_are_computed_once_an_image(gallery):
    model = tiny.make_retrieval()
    rows = []
    key = model.text_encoder.encoder.layer[0].crossattention.self.key
    key.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    found = rerank(model, *gallery, enc_token_id=tiny.ENC, k_test=K, batch_size=3)
    assert rows == [1] * IMAGES
    # a pair in both lists is scored once
    both = int(((found.i2t != UNSCORED) & (found.t2i.T != UNSCORED)).sum())
    assert found.pairs == IMAGES * K + TEXTS * K - both


def test_context_at_inference(gallery):
    model = tiny.make_retrieval().eval()
    _, ids, mask = gallery
    with torch.no_grad():
        added = 0.1 * encode_text(model, ids, mask).state.mean(0)
    options = {"enc_token_id": tiny.ENC, "k_test": K}
    ice = InformativeContext("symmetric+inference")
    found = rerank(model, *gallery, ice=ice, **options)
    torch.testing.assert_close(found.i2t, naive(model, *gallery, K, added=added)[0])
    released = rerank(model, *gallery, ice=InformativeContext("released"), **options)
    assert torch.equal(released.i2t, rerank(model, *gallery, **options).i2t)


def test_videos_with_and_without_frame_weights(gallery):
    model = tiny.make_retrieval()
    videos = torch.randn(IMAGES, 3, 3, 8, 8)
    options = {"enc_token_id": tiny.ENC, "k_test": K}
    plain = rerank(model, videos, *gallery[1:], **options)
    aware = rerank(model, videos, *gallery[1:], frame_aware=True, **options)
    assert torch.equal(plain.similarity, aware.similarity)
    assert not torch.equal(plain.i2t, aware.i2t)
    stored = rerank(model, videos, *gallery[1:], offload=True, **options)
    assert torch.equal(stored.i2t, plain.i2t)


def test_bf16_recall_stays(gallery):
    model = tiny.make_retrieval()
    options = {"enc_token_id": tiny.ENC, "k_test": IMAGES}
    full = rerank(model, *gallery, **options)
    pixels, ids, mask = gallery
    half = rerank(model.bfloat16(), pixels.bfloat16(), ids, mask, **options)
    # every text meets every image, so both have all pairs; scores are what can be compared: those
    # of a tiny random model lie too close together for its ranks
    assert (full.t2i - half.t2i).abs().max() < 0.1 * full.t2i.std()


def test_a_trained_model_finds_its_pairs(gallery):
    """The objective's training raises what the scorer measures."""
    model = tiny.make_retrieval()
    objective = RetrievalObjective(model, enc_token_id=tiny.ENC, queue_size=6, ice="off").train()
    objective.set_progress(epoch=0, batch=0, batches=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pixels, ids, mask = gallery
    own = torch.arange(IMAGES)
    for _ in range(60):
        loss = objective(pixels, ids[::2], mask[::2], own).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = rerank(model, pixels, ids[::2], mask[::2], enc_token_id=tiny.ENC, k_test=IMAGES)
    metrics = found.metrics(own)
    assert metrics.image_to_text["R@1"] > 60 and metrics.text_to_image["R@1"] > 60


def test_k_test_must_fit_the_gallery(gallery):
    with pytest.raises(ValueError, match=r"k_test: expected 1\.\.6 \(the gallery\), got 7"):
        rerank(tiny.make_retrieval(), *gallery, enc_token_id=tiny.ENC, k_test=7)
