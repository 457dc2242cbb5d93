import pickle

import pytest
import torch

from mmadapt.data import DataError, PillCollator, Sample
from mmadapt.data.sample import image_part, text_part

TOKENS = 4


def make(name, question, *images, answer="yes"):
    user = [*map(image_part, images), text_part(question)]
    return Sample(
        name,
        [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [text_part(answer)]},
        ],
        {},
    )


@pytest.fixture
def images(tmp_path, write_png):
    return [str(write_png(tmp_path / f"{colour}.png", colour)) for colour in (10, 20, 30)]


@pytest.fixture
def collator(tokenizer, processor, image_token_id):
    def build(**options):
        return PillCollator(
            tokenizer,
            processor,
            image_token_id=image_token_id,
            num_image_tokens=TOKENS,
            **options,
        )

    return build


def colours(batch):
    return batch["pixel_values"][:, 0, 0, 0].tolist()


def test_rows_with_0_1_and_3_images(collator, images, image_token_id):
    samples = [make("t", "q"), make("one", "q", images[2]), make("three", "longer q", *images)]
    batch = collator()(samples)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    is_image = batch["input_ids"] == image_token_id
    assert is_image.sum(1).tolist() == [0, TOKENS, 3 * TOKENS]
    assert colours(batch) == [30, 10, 20, 30]
    assert batch["pixel_values"].shape == (4, 3, 2, 2)
    for name in ("input_ids", "attention_mask", "labels"):
        assert batch[name].dtype == torch.int64
        assert batch[name].shape == batch["input_ids"].shape
    assert (batch["labels"][is_image] == -100).all()


def test_right_padding_for_training(collator, tokenizer):
    batch = collator()([make("a", "q"), make("b", "a much longer question")])
    single = collator()([make("a", "q")])
    length = single["input_ids"].shape[1]
    assert batch["input_ids"][0, :length].equal(single["input_ids"][0])
    assert batch["labels"][0, :length].equal(single["labels"][0])
    assert (batch["input_ids"][0, length:] == tokenizer.unk_token_id).all()
    assert (batch["labels"][0, length:] == -100).all()
    assert batch["attention_mask"][0].tolist() == [1] * length + [0] * (
        batch["input_ids"].shape[1] - length
    )
    assert batch["labels"][0, length - 1] == tokenizer.eos_token_id


def test_left_padded_prompts_for_generation(collator, tokenizer, images):
    samples = [make("a", "q", images[0]), make("b", "a much longer question")]
    batch = collator(with_labels=False)(samples)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    training = collator()(samples)
    for row in range(2):
        kept = batch["attention_mask"][row].bool()
        prompt = batch["input_ids"][row][kept]
        labelled = training["labels"][row] != -100
        first = int(labelled.nonzero()[0])
        assert prompt.equal(training["input_ids"][row, :first])
        assert batch["attention_mask"][row].diff().ge(0).all()
    assert batch["attention_mask"][:, -1].eq(1).all()
    assert collator(with_labels=False, pad_side="right")(samples)["attention_mask"][:, 0].all()


def test_a_text_only_batch_carries_one_zero_image(collator, image_token_id):
    batch = collator()([make("a", "q"), make("b", "q")])
    assert batch["pixel_values"].shape == (1, 3, 2, 2)
    assert not batch["pixel_values"].any()
    assert not (batch["input_ids"] == image_token_id).any()


def test_adjacent_images_and_a_cut_through_the_second(collator, images, image_token_id):
    build = collator(max_length=4096)
    row = build([make("x", "q", *images[:2])])["input_ids"][0]
    positions = (row == image_token_id).nonzero().flatten().tolist()
    second = positions[TOKENS]
    for limit, kept in ((second + TOKENS, 2), (second + TOKENS - 1, 1), (second, 1)):
        cut = collator(max_length=limit)
        batch = cut([make("x", "q", *images[:2])])
        is_image = batch["input_ids"][0] == image_token_id
        assert int(is_image.sum()) == kept * TOKENS
        assert len(colours(batch)) == kept
        assert cut.dropped_images == 2 - kept
        assert cut.unlabelled_samples == 1
        assert (batch["labels"] == -100).all()
        assert batch["input_ids"][0].equal(row[: second if kept == 1 else limit])


def test_truncation_loses_the_end(collator):
    long = make("x", "q", answer="a" * 50)
    whole = collator()([long])
    cut = collator(max_length=30)
    batch = cut([long])
    assert batch["input_ids"].equal(whole["input_ids"][:, :30])
    assert batch["labels"].equal(whole["labels"][:, :30])
    assert (cut.dropped_images, cut.unlabelled_samples) == (0, 0)


def test_generation_prompts_are_never_cut(collator, images):
    prompt = make("x", "a long question " * 10, images[0])
    batch = collator(with_labels=False, max_length=8)([prompt])
    assert batch["input_ids"].shape[1] > 100
    assert colours(batch) == [10]


def test_missing_and_corrupt_images_name_file_and_record(collator, tmp_path):
    with pytest.raises(DataError, match=r"none\.png, record 'r7': image is missing"):
        collator()([make("r7", "q", str(tmp_path / "none.png"))])
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(DataError, match=r"bad\.png, record 'r8': image is corrupt"):
        collator()([make("r8", "q", str(tmp_path / "bad.png"))])


def test_images_are_cached_up_to_a_bound(collator, processor, images):
    build = collator()
    for _ in range(3):
        assert colours(build([make("a", "q", *images)])) == [10, 20, 30]
    assert processor.calls == 3
    one_image = 3 * 2 * 2 * 4
    bounded = collator(cache_bytes=2 * one_image)
    processor.calls = 0
    for image in (0, 1, 0, 2, 0, 1):  # 0 is used most lately, so 1 makes room for 2
        assert colours(bounded([make("a", "q", images[image])])) == [10 * (image + 1)]
    assert processor.calls == 4
    uncached = collator(cache_bytes=0)
    processor.calls = 0
    for _ in range(2):
        uncached([make("a", "q", images[0])])
    assert processor.calls == 2


def test_a_batch_does_not_alias_the_cache(collator, images):
    build = collator()
    build([make("a", "q", images[0])])["pixel_values"].zero_()
    assert colours(build([make("a", "q", images[0])])) == [10]


def test_survives_pickling_for_loader_workers(tokenizer, image_token_id, images):
    build = PillCollator(tokenizer, _black, image_token_id=image_token_id, num_image_tokens=TOKENS)
    sample = make("a", "q", images[0])
    expected = build([sample])
    actual = pickle.loads(pickle.dumps(build))([sample])
    assert all(expected[name].equal(actual[name]) for name in expected)


def _black(images, return_tensors):
    return {"pixel_values": torch.ones(len(images), 3, 2, 2)}


def test_bad_arguments(collator, tokenizer, image_token_id):
    with pytest.raises(ValueError, match="samples: expected at least one"):
        collator()([])
    with pytest.raises(ValueError, match="max_length: expected at least 1, got 0"):
        collator(max_length=0)
    with pytest.raises(ValueError, match="pad_side: expected 'left', 'right' or None"):
        collator(pad_side="both")
    crops = PillCollator(
        tokenizer,
        lambda images, return_tensors: {"pixel_values": torch.zeros(1, 5, 3, 2, 2)},
        image_token_id=image_token_id,
        num_image_tokens=TOKENS,
    )
    with pytest.raises(ValueError, match=r"pixel_values \[1, 3, H, W\].*got \[1, 5, 3, 2, 2\]"):
        crops([make("a", "q")])
