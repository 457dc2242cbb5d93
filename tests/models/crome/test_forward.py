"""What reaches the language model: assembly, branches, text-only rows, readings, orders."""

import pytest
import torch
from torch.nn import functional as F

from mmadapt.models import CromeForConditionalGeneration


def embeds(model, batch):
    names = ("input_ids", "pixel_values", "qformer_input_ids", "text_branch_mask")
    return model.embed(**{name: batch.get(name) for name in names})


def test_the_sequence_is_queries_patches_instruction_answer(tiny):
    """10 instruction and 5 answer tokens behind 32 + 256 image vectors: 303 positions."""
    model = tiny.model(image_size=64, num_query_tokens=32)
    batch = tiny.batch(model, images=(1,), text=15, answer=5)
    x = embeds(model, batch)
    assert x.shape == (1, 303, 32)
    assert int((batch["labels"] != -100).sum()) == 5
    assert model(**batch).logits.shape == (1, 303, tiny.vocab)
    patches, queries = model._features(batch["pixel_values"], batch["qformer_input_ids"], None)
    visual, text = model.adapter(model.image_projection(patches), model.text_projection(queries))
    words = model.get_input_embeddings()(batch["input_ids"][:, 288:])
    torch.testing.assert_close(x, torch.cat([text, visual, words], dim=1))


def test_an_encoder_reads_prefix_and_instruction(tiny):
    model = tiny.model("t5", image_size=64, num_query_tokens=32)
    batch = tiny.batch(model, images=(1,), text=10, answer=5)
    batch["input_ids"] = batch["input_ids"][:, :298]
    output = model(**batch)
    assert output.encoder_last_hidden_state.shape[1] == 298
    assert output.logits.shape[1] == 5


def test_streams_match_the_formula(tiny):
    """By hand from pixels on: taps, LayerNorm on the Q-Former's side only, CLS dropped."""
    model = tiny.model(layers=3, patch_tap="bliva", qformer_tap=3)
    batch = tiny.batch(model, images=(1,))
    vision = model.vision_model
    hidden = vision.embeddings(batch["pixel_values"])
    outputs = []
    for layer in vision.encoder.layers:
        hidden = layer(hidden)
        outputs.append(hidden)
    seen = vision.post_layernorm(outputs[2])
    torch.testing.assert_close(seen, vision(batch["pixel_values"]).last_hidden_state)
    queries = model.qformer(
        input_ids=batch["qformer_input_ids"],
        query_embeds=model.query_tokens,
        encoder_hidden_states=seen,
    ).last_hidden_state[:, : tiny.queries]
    adapter = model.adapter
    expected = []
    for k, x in (
        (1, model.text_projection(queries)),
        (0, model.image_projection(outputs[1][:, 1:])),
    ):
        z = F.silu(x @ adapter.gate[k].t()) * (x @ adapter.down[k].t())
        expected.append(x + z @ adapter.up.t())
    found = model.get_image_features(batch["pixel_values"], batch["qformer_input_ids"])
    torch.testing.assert_close(found, torch.cat(expected, dim=1))


def test_a_fresh_adapter_changes_nothing(tiny, kind):
    model = tiny.model(kind, identity=True)
    bare = tiny.model(kind, adapter_branches=[])
    batch = tiny.batch(model)
    bare.load_state_dict(model.state_dict(), strict=False)
    assert bare.adapter is None
    with torch.no_grad():
        assert torch.equal(embeds(model, batch), embeds(bare, batch))
        assert torch.equal(model(**batch).loss, bare(**batch).loss)


def test_text_alone_is_the_language_model(tiny, kind):
    """Bit for bit: without images, with an image nothing refers to, and beside an image row."""
    model = tiny.model(kind)
    text = tiny.batch(model, images=(0, 0))
    blank = {
        "pixel_values": torch.zeros(1, 3, 8, 8),
        "qformer_input_ids": torch.ones(1, 1, dtype=torch.int64),
    }
    with torch.no_grad():
        expected = model.language_model(**text)
        assert torch.equal(model(**text).loss, expected.loss)
        assert torch.equal(model(**text, **blank).loss, expected.loss)
        mixed = tiny.batch(model, images=(1, 0))
        own = {name: mixed[name][1:] for name in ("input_ids", "attention_mask", "labels")}
        beside = embeds(model, mixed)[1:]
        assert torch.equal(beside, model.get_input_embeddings()(own["input_ids"]))
        logits = model(**mixed).logits[1:]
        torch.testing.assert_close(logits, model.language_model(**own).logits)


def test_an_unused_image_gives_zero_gradients(tiny):
    """Ranks with a text-only batch reduce the same parameters as the others."""
    model = tiny.model()
    from mmadapt.models import set_crome_stage

    set_crome_stage(model, "instruct")
    batch = tiny.batch(model, images=(0, 0))
    batch |= {
        "pixel_values": torch.zeros(1, 3, 8, 8),
        "qformer_input_ids": torch.ones(1, 4, dtype=torch.int64),
    }
    model(**batch).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = [n for n, p in trained.items() if p.grad is None]
    assert not missing
    assert all(not p.grad.any() for p in trained.values())


def test_padding_changes_nothing_and_the_prefix_does(tiny):
    model = tiny.model()
    batch = tiny.batch(model, images=(1, 0))
    loss = model(**batch).loss
    x = embeds(model, batch).detach()
    rest = {k: batch[k] for k in ("attention_mask", "labels")}
    padded = x.clone()
    padded[batch["attention_mask"] == 0] += 1.0
    torch.testing.assert_close(model(inputs_embeds=padded, **rest).loss, loss)
    prefix = x.clone()
    prefix[0, 2] += 1.0
    assert (model(inputs_embeds=prefix, **rest).loss - loss).abs() > 1e-4


def test_rows_with_several_images(tiny):
    model = tiny.model()
    batch = tiny.batch(model, images=(2, 0, 1))
    x = embeds(model, batch)
    vectors = model.get_image_features(batch["pixel_values"], batch["qformer_input_ids"])
    n = model.config.num_image_tokens
    torch.testing.assert_close(x[0, : 2 * n], vectors[:2].flatten(0, 1))
    torch.testing.assert_close(x[2, :n], vectors[2])


@pytest.mark.parametrize(
    "order",
    [
        ["text", "visual", "instruction"],
        ["visual", "text", "instruction"],
        ["text", "instruction", "visual"],
        ["instruction", "visual", "text"],
        ["text", "instruction"],
        ["instruction", "visual"],
    ],
    ids="-".join,
)
def test_orders(tiny, order):
    """Two images: all their vectors on one side of the instruction, image by image."""
    model = tiny.model(order=order)
    batch = tiny.batch(model, images=(2,), text=7, answer=2)
    x = embeds(model, batch)[0]
    base = tiny.model()
    base.load_state_dict(model.state_dict(), strict=False)
    lengths = {"text": tiny.queries, "visual": tiny.patches}
    full = base.get_image_features(batch["pixel_values"], batch["qformer_input_ids"])
    streams = dict(
        zip(("text", "visual"), full.split([tiny.queries, tiny.patches], 1), strict=True)
    )
    words = model.get_input_embeddings()(batch["input_ids"][0][batch["input_ids"][0] != tiny.image])
    at = order.index("instruction")
    expected = []
    for names in (order[:at], order[at + 1 :]):
        for image in range(2):
            expected += [streams[name][image] for name in names]
        if names is not order[at + 1 :] and len(expected) == 2 * at:
            expected.append(words[:5])
    expected.append(words[5:])
    assert sum(lengths[n] for n in order if n != "instruction") == model.config.num_image_tokens
    torch.testing.assert_close(x, torch.cat(expected))


def test_reading_two(tiny):
    """The instruction's embeddings pass the text branch and follow untouched."""
    model = tiny.model(reading="R2")
    config = model.config
    n = config.num_image_tokens
    assert config.order == ["visual", "text", "instruction"] and n == tiny.queries + tiny.patches
    batch = tiny.batch(model, images=(1,), text=10, answer=2)
    ids = batch["input_ids"]
    ids[0, n + 4 : n + 8] = ids[0, n : n + 4]  # the copy and the instruction itself
    mask = torch.zeros_like(ids)
    mask[0, n : n + 4] = 1
    x = embeds(model, batch | {"text_branch_mask": mask})[0]
    words = model.get_input_embeddings()(ids[0, n:])
    _, adapted = model.adapter(None, words[:4])
    torch.testing.assert_close(x[n : n + 4], adapted)
    assert torch.equal(x[n + 4 :], words[4:])
    patches, queries = model._features(batch["pixel_values"], batch["qformer_input_ids"], None)
    stream = torch.cat([model.text_projection(queries), model.image_projection(patches)], dim=1)
    torch.testing.assert_close(x[:n], model.adapter(stream, None)[0][0])
    with pytest.raises(ValueError, match="text_branch_mask belongs to"):
        embeds(tiny.model(), batch | {"text_branch_mask": mask})


@pytest.mark.parametrize("branch", ["visual", "text"])
def test_one_branch_only(tiny, branch):
    model = tiny.model(adapter_branches=[branch])
    bare = tiny.model(adapter_branches=[])
    bare.load_state_dict(model.state_dict(), strict=False)
    batch = tiny.batch(model, images=(1,))
    changed = (embeds(model, batch) != embeds(bare, batch)).any(-1)[0]
    q, n = tiny.queries, model.config.num_image_tokens
    assert bool(changed[:q].all()) == (branch == "text")
    assert bool(changed[q:n].all()) == (branch == "visual")
    assert not changed[n:].any() and changed.any()


def test_the_instruction_reaches_the_queries(tiny):
    model = tiny.model()
    batch = tiny.batch(model, images=(1,))
    other = batch | {"qformer_input_ids": batch["qformer_input_ids"] + 1}
    before, after = embeds(model, batch), embeds(model, other)
    q = tiny.queries
    assert (before[:, :q] != after[:, :q]).all() and torch.equal(before[:, q:], after[:, q:])
    blind = tiny.model(instruction_aware=False)
    assert torch.equal(embeds(blind, batch), embeds(blind, other))


def test_padding_of_the_qformer_text(tiny):
    model = tiny.model()
    batch = tiny.batch(model, images=(1,))
    ids = batch["qformer_input_ids"]
    padded = F.pad(ids, (0, 3))
    mask = F.pad(torch.ones_like(ids), (0, 3))
    torch.testing.assert_close(
        model.get_image_features(batch["pixel_values"], padded, mask),
        model.get_image_features(batch["pixel_values"], ids),
    )


def test_placeholder_ids_need_no_row_in_the_embedding_table(tiny):
    model = tiny.model()
    batch = tiny.batch(model)
    expected = embeds(model, batch)
    model.config.image_token_id = tiny.vocab + 7
    batch["input_ids"][batch["input_ids"] == tiny.image] = tiny.vocab + 7
    assert torch.equal(embeds(model, batch), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "14 image placeholders for 0 images"),
        ({"pixel_values": torch.zeros(3, 3, 8, 8)}, "14 image placeholders for 3 images"),
        ({"qformer_input_ids": None}, "qformer_input_ids: got None for 2 images"),
        ({"qformer_input_ids": torch.ones(1, 2, dtype=torch.int64)}, "got 1 rows for 2 images"),
    ],
)
def test_inputs_that_do_not_fit(tiny, change, message):
    model = tiny.model()
    with pytest.raises(ValueError, match=message):
        model(**(tiny.batch(model) | change))


def test_an_image_split_over_rows(tiny):
    model = tiny.model()
    batch = tiny.batch(model)
    ids = batch["input_ids"]
    ids[0, 6], ids[1, 7] = 5, tiny.image
    with pytest.raises(ValueError, match="all of an image in one row"):
        model(**batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reading": "R3"}, "reading is one of"),
        ({"order": ["visual"]}, "order holds 'instruction'"),
        ({"order": ["visual", "visual", "instruction"]}, "order holds 'instruction'"),
        ({"adapter_branches": ["audio"]}, "adapter_branches holds any of"),
        ({"patch_tap": 3}, "patch_tap is a block of the vision tower, 1..2, or bliva, got 3"),
        ({"qformer_tap": 0}, "qformer_tap is a block of the vision tower, 1..2, got 0"),
        ({"adapter_rank": 0}, "num_query_tokens and adapter_rank are positive"),
    ],
)
def test_settings_that_do_not_fit(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**options)


@pytest.mark.slow
def test_compiled_without_breaks(tiny):
    model = tiny.model()
    batch = tiny.batch(model, images=(1, 0))
    names = ("input_ids", "pixel_values", "qformer_input_ids")
    given = {name: batch[name] for name in names}
    compiled = torch.compile(model.embed, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**given), model.embed(**given))


def test_modes_of_frozen_parts(tiny):
    from mmadapt.models import set_crome_stage

    model = tiny.model().train()
    assert not model.vision_model.training
    set_crome_stage(model, "align")
    assert not model.qformer.training and model.language_model.training
    set_crome_stage(model, "instruct")
    assert model.qformer.training and not model.vision_model.training
    assert isinstance(model.eval(), CromeForConditionalGeneration)
    assert not model.qformer.training
