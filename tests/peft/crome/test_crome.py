"""CROME as a PEFT method: what it computes, switching, saving, generation, text alone."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from torch.nn import functional as F

from mmadapt.nn import CrossModalAdapter
from mmadapt.peft import CromeConfig, components, explain


def logits(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def adapter_of(model, name="default"):
    layers = [m for m in model.modules() if hasattr(m, "mmadapt_crome_config")]
    return layers[0].mmadapt_crome_adapter[name]


def embeddings_seen(model, batch):
    """What the stack of decoder layers gets."""
    seen = []
    stack = next(m for m in model.modules() if type(m).__name__ == "LlamaModel")
    handle = stack.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", ["llava", "blip2", "instructblip"])
def test_projected_features_pass_the_adapter(crome, tiny, kind):
    """At image positions x + up(silu(gate x) * down x), elsewhere the embeddings as they are."""
    base = crome.base(kind)
    batch = crome.batch(kind, images=(True, False))
    before = embeddings_seen(base, batch)
    model = crome.model(kind, base)
    after = embeddings_seen(model, batch)
    image = batch["input_ids"] == tiny.image
    adapter = adapter_of(model)
    x = before[image]
    z = F.silu(x @ adapter.gate[0].t()) * (x @ adapter.down[0].t())
    torch.testing.assert_close(after[image], x + z @ adapter.up.t())
    assert torch.equal(after[~image], before[~image])


def test_one_stream_has_three_matrices_and_two_have_five(crome):
    def count(**config):
        adapter = adapter_of(crome.model("llava", **config))
        return sum(p.numel() for p in adapter.parameters())

    d, m = 32, 4
    assert count() == 3 * d * m
    assert count(instruction="beside_images") == 5 * d * m
    assert count(instruction="beside_images", share_up=False) == 6 * d * m
    assert count(instruction="beside_images", share_input=True) == 3 * d * m
    assert count(adapter_bias=True) == 3 * d * m + 2 * m + d
    assert count(gated=False) == 2 * d * m
    assert CrossModalAdapter.default_rank(4096) == 256


@pytest.mark.parametrize("kind", ["llava", "blip2", "instructblip"])
def test_the_instruction_as_text_stream(crome, tiny, kind):
    """Prompt embeddings of rows with an image pass the text branch; no answers, no other rows."""
    base = crome.base(kind)
    batch = crome.batch(kind, images=(True, False))
    batch["labels"][:, :-3] = -100
    before = embeddings_seen(base, batch)
    model = crome.model(kind, base, instruction="beside_images")
    after = embeddings_seen(model, batch)
    image = batch["input_ids"] == tiny.image
    adapter = adapter_of(model)
    instruction = ~image & (batch["labels"] == -100)
    instruction[1] = False
    visual, text = adapter(before[image], before[instruction])
    torch.testing.assert_close(after[image], visual)
    torch.testing.assert_close(after[instruction], text)
    rest = ~image & ~instruction
    assert torch.equal(after[rest], before[rest])


def test_a_bare_language_model_with_modality_ids(crome):
    base = crome.base("llama")
    batch = crome.batch("llama", images=(True, True))
    before = embeddings_seen(base, {"input_ids": batch["input_ids"]})
    model = crome.model("llama", base, instruction="none")
    after = embeddings_seen(model, {k: batch[k] for k in ("input_ids", "modality_ids")})
    image = batch["modality_ids"].bool()
    torch.testing.assert_close(after[image], adapter_of(model)(before[image], None)[0])
    assert torch.equal(after[~image], before[~image])


def test_embeddings_in_place_of_ids(crome):
    base = crome.base("llama")
    batch = {"input_ids": crome.batch("llama")["input_ids"]}
    model = crome.model("llama", base)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    torch.testing.assert_close(logits(model, {"inputs_embeds": embeds}), logits(model, batch))


def test_text_alone_is_untouched(crome):
    """Bit for bit, also where the text branch adapts instructions beside images."""
    for kind in crome.multimodal:
        batch = crome.batch(kind, images=(False, False))
        base = crome.base(kind)
        expected = logits(base, batch)
        for instruction in ("none", "beside_images"):
            model = crome.model(kind, crome.base(kind), instruction=instruction)
            assert torch.equal(logits(model, batch), expected)


def test_fresh_disabled_deleted_unloaded(crome, crome_kind):
    batch = crome.batch(crome_kind)
    expected = logits(crome.base(crome_kind), batch)
    fresh = crome.model(crome_kind, init_weights=True)
    assert torch.equal(logits(fresh, batch), expected)
    model = crome.model(crome_kind)
    tuned = logits(model, batch)
    assert not torch.allclose(tuned, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(model, batch), tuned)
    base = model.unload()
    assert torch.equal(logits(base, batch), expected)
    assert not any("mmadapt" in name for name, _ in base.named_modules())
    assert not base._forward_pre_hooks


def test_several_adapters(crome, crome_kind):
    batch = crome.batch(crome_kind)
    model = crome.model(crome_kind)
    first = logits(model, batch)
    options = {"rank": 6, "init_weights": False}
    if crome_kind == "llama":
        options["instruction"] = "always"
    model.add_adapter("other", CromeConfig(**options))
    assert torch.equal(logits(model, batch), first)
    model.set_adapter("other")
    second = logits(model, batch)
    assert not torch.allclose(second, first)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".other." in name for name in trained)
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(logits(model, batch), second)
    with pytest.raises(ValueError, match="one adapter at a time"):
        model.base_model.set_adapter(["other", "default"])


def test_only_the_adapter_trains(crome, crome_kind):
    model = crome.model(crome_kind, init_weights=True)
    batch = crome.batch(crome_kind)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("mmadapt_crome_adapter" in name for name in trained)
    parts = components(model)
    assert {n for n, _ in parts["adapter"]} == set(trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in trained}
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01
    for name, value in model.named_parameters():
        assert name in trained or torch.equal(value, frozen[name])


@pytest.mark.parametrize("instruction", ["none", "beside_images"])
def test_a_batch_without_images_gives_zero_gradients(crome, instruction):
    for kind in crome.multimodal:
        model = crome.model(kind, instruction=instruction)
        model(**crome.batch(kind, images=(False, False))).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and not g.any() for g in gradients), kind


def test_saving(crome, crome_kind, tmp_path):
    batch = crome.batch(crome_kind)
    model = crome.model(
        crome_kind, instruction="beside_images" if crome_kind != "llama" else "always"
    )
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(crome.base(crome_kind), tmp_path)
    assert torch.equal(logits(loaded, batch), expected)
    assert loaded.peft_config["default"].instruction == model.peft_config["default"].instruction
    quick = PeftModel.from_pretrained(crome.base(crome_kind), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(quick, batch), expected)


def test_a_checkpoint_with_a_missing_weight_is_refused(crome):
    from peft import get_peft_model_state_dict

    model = crome.model("llava")
    state = get_peft_model_state_dict(model)
    assert len(state) == 3
    state.pop(next(key for key in state if key.endswith("up")))
    with pytest.raises(ValueError, match="1 keys are missing"):
        set_peft_model_state_dict(model, state)


def test_copies_and_pickles(crome, crome_kind):
    batch = crome.batch(crome_kind)
    model = crome.model(crome_kind)
    pickled = pickle.dumps(model)
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(adapter_of(model).up)
    assert torch.equal(logits(twin, batch), expected)
    assert torch.equal(logits(pickle.loads(pickled), batch), expected)


@pytest.mark.parametrize("instruction", ["none", "beside_images"])
def test_cached_generation_equals_uncached(crome, tiny, crome_kind, instruction):
    if crome_kind == "llama":
        instruction = "always"
    model = crome.model(crome_kind, instruction=instruction)
    prompt = tiny.prompt(tiny.left_pad(crome.batch(crome_kind, images=(True, True)), 3))
    prompt.pop("modality_ids", None)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(**prompt, **options)
        beams = model.generate(**prompt, **options, num_beams=2)
        with model.disable_adapter():
            plain = model.generate(**prompt, **options)
    assert len(beams) == 2 and not torch.equal(cached, plain)
    if instruction == "none":
        assert torch.equal(cached, model.generate(**prompt, **options, use_cache=False))
        return
    # By hand: the prompt's positions pass the text branch, those that follow do not.
    length = prompt["input_ids"].shape[1]
    ids, labels = prompt["input_ids"], torch.full_like(prompt["input_ids"], -100)
    new = cached[:, length:] if cached.shape[1] > length else cached
    for step in range(5):
        mask = F.pad(prompt["attention_mask"], (0, step), value=1)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        rest = {k: v for k, v in prompt.items() if k not in ("input_ids", "attention_mask")}
        with torch.no_grad():
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=position, labels=labels, **rest
            )
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(token[:, 0], new[:, step])
        ids, labels = torch.cat([ids, token], 1), torch.cat([labels, token], 1)


def test_checkpointing_recomputes_the_same(crome, crome_kind):
    gradients = []
    for checkpointed in (False, True):
        model = crome.model(crome_kind).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**crome.batch(crome_kind)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_half_precision_beside_float32_adapters(crome):
    base = crome.base("llava").bfloat16()
    model = crome.model("llava", base)
    assert adapter_of(model).up.dtype == torch.float32
    batch = crome.batch("llava")
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    model(**batch).loss.backward()
    assert adapter_of(model).up.grad.dtype == torch.float32


def test_explain(crome):
    (report,) = explain(crome.model("llava"))
    assert report.path.endswith("multi_modal_projector") and report.streams == ("visual",)
    assert report.backend and "streams visual" in str(report)
    (report,) = crome.model("blip2").explain()
    assert report.streams == ("text",)
    (report,) = explain(crome.model("llava", instruction="always", adapter_bias=True))
    assert report.streams == ("visual", "text") and report.backend is None


def test_merging_and_mixed_batches_are_refused(crome):
    model = crome.model("llava")
    with pytest.raises(NotImplementedError, match="is not linear and cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="batches of mixed adapters"):
        model(**crome.batch("llava"), adapter_names=["default", "default"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "CromeConfig.rank is a positive integer or None, got 0"),
        ({"instruction": "sometimes"}, "CromeConfig.instruction is one of"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        CromeConfig(**options)
