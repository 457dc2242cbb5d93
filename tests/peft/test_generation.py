"""Modality during generation: caches, padding, embedded prompts, attention backends."""

import pytest
import torch

from mmadapt.peft import PillConfig


def greedy_without_cache(model, batch, steps):
    """One full forward pass per token; Blip2 and Llava included."""
    batch = dict(batch)
    start = batch["input_ids"].shape[1]
    for _ in range(steps):
        with torch.no_grad():
            token = model(**batch, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        for name, new in (
            ("input_ids", token),
            ("attention_mask", torch.ones_like(token)),
            ("modality_ids", torch.zeros_like(token)),
        ):
            if name in batch:
                batch[name] = torch.cat([batch[name], new.to(batch[name].dtype)], dim=1)
    return batch["input_ids"][:, start:]


def generate(model, batch, steps):
    # generate refuses keywords that forward does not name; the configuration tells the image token
    batch = {k: v for k, v in batch.items() if k != "modality_ids"}
    out = model.generate(
        **batch, max_new_tokens=steps, do_sample=False, eos_token_id=[], pad_token_id=0
    )
    return out[:, -steps:]


@pytest.mark.parametrize("options", [{}, {"gate_heads": "q"}, {"gate": "static"}])
def test_cached_is_uncached_with_left_padding(tiny, kind, options):
    base = tiny.base(kind)
    base.config.image_token_id = tiny.image
    model = tiny.pill(kind, base, **options)
    batch = tiny.prompt(tiny.batch(kind))
    padded = tiny.left_pad(batch, 3)
    with torch.no_grad():
        first = model(**padded).logits[:, -1]
    expected = greedy_without_cache(model, padded, 6)
    assert torch.equal(generate(model, padded, 6), expected)
    assert torch.equal(generate(model, batch, 6), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[:, -1], first, rtol=1e-4, atol=1e-5)


def test_kv_cache_decode_equals_full_forward(tiny, kind):
    model = tiny.pill(kind)
    batch = tiny.prompt(tiny.batch(kind, length=16))
    split = 7
    with torch.no_grad():
        full = model(**batch).logits
        head = {k: v[:, :split] if v.dim() == 2 else v for k, v in batch.items()}
        if kind == "blip2":  # its forward always encodes pixels: decode through the language model
            output = model(**head, use_cache=True).language_model_outputs
            step = model.get_base_model().language_model
        else:
            output = model(**head, use_cache=True)
            step = model
        pieces, cache = [output.logits], output.past_key_values
        for t in range(split, 16):
            output = step(
                input_ids=batch["input_ids"][:, t : t + 1],
                attention_mask=batch["attention_mask"][:, : t + 1],
                past_key_values=cache,
                use_cache=True,
            )
            pieces.append(output.logits)
    assert (torch.cat(pieces, dim=1) - full).abs().max() <= 1e-4


def test_beams_follow_the_embedded_prompt(tiny):
    model = tiny.pill("blip2")
    batch = tiny.prompt(tiny.batch("blip2"))
    seen = []
    attention = model.get_base_model().language_model.model.layers[0].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("modality_ids")), with_kwargs=True
    )
    model.generate(**batch, max_new_tokens=3, num_beams=3, do_sample=False)
    expected = (batch["input_ids"] == tiny.image).int().repeat_interleave(3, dim=0)
    assert torch.equal(seen[0], expected) and all(ids is None for ids in seen[1:])


def test_embedded_prompts_need_their_modality(tiny):
    base = tiny.base("blip2")
    model = tiny.pill("blip2", base)
    batch = tiny.prompt(tiny.batch("blip2"))
    with pytest.raises(ValueError, match="cannot tell which positions are visual"):
        base.generate(**batch, max_new_tokens=2)
    with model.disable_adapter():
        base.generate(**batch, max_new_tokens=2)
    embeds = base.get_input_embeddings()(batch["input_ids"])
    ids = (batch["input_ids"] == tiny.image).int()
    base.language_model(inputs_embeds=embeds, modality_ids=ids)
    base.language_model(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="cannot tell"):
        model(**batch | {"input_ids": None}, inputs_embeds=embeds)


def test_explicit_ids_win_and_are_checked(tiny):
    model = tiny.pill("llava")
    batch = tiny.prompt(tiny.batch("llava"))
    found = model(**batch).logits
    ids = (batch["input_ids"] == tiny.image).int()
    assert torch.equal(model(**batch, modality_ids=ids).logits, found)
    assert torch.equal(model(**batch, mm_token_type_ids=ids.long()).logits, found)
    assert not torch.allclose(model(**batch, modality_ids=ids * 0).logits, found)
    with pytest.raises(ValueError, match=r"modality_ids has 12 positions.* has 10"):
        model(**batch, modality_ids=torch.ones(2, 12))


def test_decode_modality_covers_generated_image_tokens(tiny):
    batch = tiny.prompt(tiny.batch("llama"))
    outputs = {}
    for decoded in (None, "text", "image"):
        model = tiny.pill("llama", decode_modality=decoded)
        with torch.no_grad():
            cache = model(**batch, use_cache=True).past_key_values
            outputs[decoded] = model(
                input_ids=batch["input_ids"][:, -1:], past_key_values=cache
            ).logits
    assert torch.equal(outputs[None], outputs["text"])
    assert not torch.allclose(outputs[None], outputs["image"])


@pytest.mark.parametrize("options", [{}, {"gate_heads": "q"}])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_eager_is_sdpa(tiny, kind, kv_heads, options):
    batch = tiny.left_pad(tiny.prompt(tiny.batch(kind)), 2)
    outputs = []
    for implementation in ("eager", "sdpa"):
        base = tiny.base(kind, kv_heads=kv_heads)
        base.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs.append(tiny.pill(kind, base, **options)(**batch).logits[:, 2:])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_query_head_gates_extend_value_head_gates(tiny):
    """With equal rows per group, a gate per query head is a gate per value head."""
    batch = tiny.batch("llama")
    shared, expanded = tiny.pill("llama"), tiny.pill("llama", gate_heads="q")
    weights = dict(shared.named_parameters())
    with torch.no_grad():
        for name, parameter in expanded.named_parameters():
            source = weights[name]
            if parameter.shape != source.shape:
                source = source.repeat_interleave(2, dim=0)
            parameter.copy_(source)
    torch.testing.assert_close(expanded(**batch).logits, shared(**batch).logits)


def test_row_alone_is_row_in_padded_batch(tiny, kind):
    model = tiny.pill(kind)
    batch = tiny.prompt(tiny.batch(kind))
    padded = tiny.left_pad(batch, 4)
    with torch.no_grad():
        rows = model(**padded).logits[:, 4:]
        for row in range(2):
            alone = {k: v[row : row + 1] for k, v in batch.items()}
            torch.testing.assert_close(model(**alone).logits[0], rows[row], rtol=1e-4, atol=1e-5)


def test_right_padding_leaves_the_loss_alone(tiny, kind):
    model = tiny.pill(kind)
    batch = tiny.batch(kind)
    expected = model(**batch).loss
    right = dict(batch)
    for name, value in (
        ("input_ids", 0),
        ("attention_mask", 0),
        ("labels", -100),
        ("modality_ids", 0),
    ):
        if name in batch:
            right[name] = torch.nn.functional.pad(batch[name], (0, 5), value=value)
    assert (model(**right).loss - expected).abs() <= 1e-6


def test_config_is_reread_from_the_model(tiny):
    """A bare model whose configuration names an image token needs no explicit ids."""
    batch = tiny.batch("llama")
    base = tiny.base("llama")
    base.config.image_token_id = tiny.image
    by_config = tiny.pill("llama", base)
    ids = batch.pop("modality_ids")
    expected = tiny.pill("llama")(**batch, modality_ids=ids).logits
    assert torch.equal(by_config(**batch).logits, expected)
    assert isinstance(by_config.peft_config["default"], PillConfig)
