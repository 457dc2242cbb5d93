"""Generation and perplexity with the real readers and collator on a small digits-vqa."""

from __future__ import annotations

import pytest
import torch

from mmadapt.data import PillCollator, load, write_digits_vqa
from mmadapt.eval import (
    chance_row,
    evaluate_scienceqa,
    generate_answers,
    probe_text,
    problems_of,
    sample_answers,
)

IMAGE, EOS = "<image>", "</s>"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    pytest.importorskip("sklearn")
    root = write_digits_vqa(tmp_path_factory.mktemp("digits") / "set", test=40, train=1, val=1)
    return load({"reader": "scienceqa", "path": root, "split": "test", "prompt": "QCM-A"})


@pytest.fixture(scope="module")
def parts(digits, toy):
    """Byte-level tokenizer, processor, and the tiny Blip2 resized to its vocabulary."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", EOS, IMAGE]
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE({t: i for i, t in enumerate(specials + alphabet)}, [])
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(specials)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token=EOS
    )
    processor = transformers.BlipImageProcessor(size={"height": 8, "width": 8})
    model = toy.blip2()
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    return model, tokenizer, processor


def collator(parts, toy, **kwargs):
    _, tokenizer, processor = parts
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    return PillCollator(
        tokenizer, processor, image_token_id=image, num_image_tokens=toy.IMAGE_TOKENS, **kwargs
    )


def test_batches_of_the_collator_generate_as_single_prompts(digits, parts, toy):
    model, tokenizer, _ = parts
    prompts = collator(parts, toy, with_labels=False)
    samples = [digits[i] for i in range(0, 40, 3)]
    assert {len(list(s.image_paths())) for s in samples} == {0, 1, 2}
    batched, single = (
        generate_answers(model, tokenizer, prompts, samples, batch_size=n, max_new_tokens=5)
        for n in (4, 1)
    )
    assert batched == single
    assert all(batched)


def test_evaluation_end_to_end(digits, parts, toy):
    model, tokenizer, _ = parts
    prompts = collator(parts, toy, with_labels=False)
    kwargs = {"batch_size": 8, "max_new_tokens": 2}
    result = evaluate_scienceqa(model, tokenizer, prompts, digits, **kwargs)
    blank = evaluate_scienceqa(model, tokenizer, prompts, digits, blank_images=True, **kwargs)
    assert result.failures == len(digits) == 40  # a random model cannot say the sentence
    assert result.visual.total + result.text_only.total == 40
    assert set(result.by_skill) == {p["skill"] for p in digits.problems.values()}
    text_only = {i for i, p in problems_of(digits).items() if p["image"] is None}
    assert {i for i in result.texts if result.texts[i] == blank.texts[i]} >= text_only
    assert result.texts != blank.texts
    assert 20 < chance_row(problems_of(digits)).table["AVG"] < 60
    assert len(sample_answers(digits, result, count=5)) == 5


def test_text_probe(digits, parts, toy):
    model, tokenizer, _ = parts
    prompts, labelled = (collator(parts, toy, with_labels=flag) for flag in (False, True))
    probe = probe_text(model, tokenizer, prompts, labelled, digits, max_new_tokens=2)
    assert probe.accuracy.total == sum(p["image"] is None for p in digits.problems.values())
    assert probe.perplexity > 2
