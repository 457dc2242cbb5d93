"""Generation: cached equals uncached, left padding, rows of unequal lengths, beams."""

import pytest
import torch


def prompts(tiny, model, images):
    """Left-padded prompts, row i with `images[i]` images and i + 2 tokens of text."""
    batch = tiny.batch(model, images=images, text=2 + len(images), answer=1)
    rows, kept = [], []
    for i, ids in enumerate(batch["input_ids"]):
        length = int(batch["attention_mask"][i].sum()) - len(images) + i
        rows.append(ids[:length])
        kept.append(length)
    width = max(kept)
    ids = torch.stack([torch.nn.functional.pad(r, (width - len(r), 0)) for r in rows])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(r), (width - len(r), 0)) for r in rows]
    )
    rest = {k: batch[k] for k in ("pixel_values", "qformer_input_ids") if k in batch}
    return {"input_ids": ids, "attention_mask": mask, **rest}, rows


GREEDY = {"num_beams": 1, "do_sample": False, "repetition_penalty": 1.0}


@pytest.mark.parametrize("images", [(1, 1, 1), (1, 0, 2)])
def test_cached_equals_uncached(tiny, kind, images):
    model = tiny.model(kind)
    batch, _ = prompts(tiny, model, images)
    options = {**GREEDY, "max_new_tokens": 6, "eos_token_id": None, "min_new_tokens": None}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    assert cached.shape[1] >= 6


def test_the_whole_prefix(tiny):
    """32 queries and 256 patches in front, step by step against forward passes over everything."""
    model = tiny.model(image_size=64, num_query_tokens=32)
    batch, _ = prompts(tiny, model, (1, 1))
    assert batch["input_ids"].shape[1] > 288
    found = model.generate(**batch, **GREEDY, max_new_tokens=4, eos_token_id=None)
    mask, x = (
        batch["attention_mask"],
        model.embed(batch["input_ids"], batch["pixel_values"], batch["qformer_input_ids"]),
    )
    for step in range(4):
        position = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(inputs_embeds=x, attention_mask=mask, position_ids=position).logits[:, -1]
        token = logits.argmax(-1)
        assert torch.equal(token, found[:, step])
        x = torch.cat([x, model.get_input_embeddings()(token)[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)


def test_padding_does_not_matter(tiny, kind):
    """Every row answers as it does alone."""
    model = tiny.model(kind)
    images = (1, 0, 2)
    batch, rows = prompts(tiny, model, images)
    options = {**GREEDY, "max_new_tokens": 5, "eos_token_id": None}
    together = model.generate(**batch, **options)
    start = 0
    for i, row in enumerate(rows):
        alone = {"input_ids": row[None]}
        if images[i]:
            alone["pixel_values"] = batch["pixel_values"][start : start + images[i]]
            alone["qformer_input_ids"] = batch["qformer_input_ids"][start : start + images[i]]
        start += images[i]
        assert torch.equal(model.generate(**alone, **options)[0], together[i])


def test_defaults_are_those_of_lavis(tiny):
    config = tiny.model().generation_config
    found = [getattr(config, n) for n in ("num_beams", "max_new_tokens", "min_new_tokens")]
    assert found == [5, 256, 1]
    assert (config.repetition_penalty, config.length_penalty) == (1.5, 1.0)


def test_beams(tiny, kind):
    model = tiny.model(kind)
    batch, _ = prompts(tiny, model, (1, 0))
    assert model.generate(**batch, max_new_tokens=4).shape[0] == 2
