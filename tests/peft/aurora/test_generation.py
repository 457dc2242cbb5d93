"""Decoding with a cache keeps the updates of keys and values."""

import pytest
import torch


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_cached_decoding_equals_recomputation(tiny, kind):
    model = tiny.aurora(kind)
    batch = tiny.batch(kind)
    del batch["labels"]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**batch, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(**batch, **options))


def test_answers_with_and_without_a_cache(tiny):
    """On 256 questions; every token of the answer decoder's self-attention has its update."""
    base = tiny.base("vqa")
    with torch.no_grad():  # answers that depend on the question
        base.text_decoder.cls.predictions.bias.normal_(std=0.5)
    model = tiny.aurora("vqa", base)
    batch = tiny.batch("vqa", rows=256)
    del batch["labels"]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(**batch, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    assert len({tuple(row) for row in cached.tolist()}) > 4


def test_a_cached_step_has_the_update_of_key_and_value(tiny):
    """The released code leaves them without when it decodes step by step."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    decoder = tiny.aurora("vqa").get_base_model().text_decoder
    ids = torch.randint(4, 50, (2, 6))
    states = torch.randn(2, 5, 32)
    with torch.no_grad():
        whole = decoder(ids, encoder_hidden_states=states).logits
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        steps = [
            decoder(
                ids[:, i : i + 1],
                encoder_hidden_states=states,
                past_key_values=cache,
                use_cache=True,
            ).logits
            for i in range(6)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)
