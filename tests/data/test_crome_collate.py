"""CromeCollator: layout by order, labels, truncation, several turns, text alone."""

from types import SimpleNamespace

import pytest
import torch

from mmadapt.data import CromeCollator, CromeImageProcessor, PillTemplate, Sample
from mmadapt.data.sample import image_part, text_part
from mmadapt.models import CromeForConditionalGeneration, CromeModelConfig

QUERIES, PATCHES = 2, 4


def config(image_token_id, **options):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 110, "intermediate_size": 8, **small}
    if options.pop("t5", False):
        text = {"model_type": "t5", "vocab_size": 110, "d_model": 8, "d_kv": 4, "d_ff": 8}
        text |= {"num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return CromeModelConfig(
        {**small, "intermediate_size": 8, "image_size": 4, "patch_size": 2},
        {**small, "intermediate_size": 8, "vocab_size": 110},
        text,
        num_query_tokens=QUERIES,
        image_token_id=image_token_id,
        adapter_rank=2,
        **options,
    )


@pytest.fixture
def make(tokenizer, image_token_id, processor):
    def build(*, image_processor=processor, t5=False, settings=None, **options):
        options.setdefault("qformer_tokenizer", tokenizer)
        sizes = config(image_token_id, t5=t5, **(settings or {}))
        return CromeCollator(tokenizer, image_processor, sizes, **options)

    return build


@pytest.fixture
def sample(tmp_path, write_png):
    def build(*turns, images=1, name="s"):
        paths = [str(write_png(tmp_path / f"{name}{i}.png", 10 + i)) for i in range(images)]
        messages = []
        for number, (question, answer) in enumerate(turns):
            content = [image_part(path) for path in paths] if number == 0 else []
            content.append(text_part(("\n" if content else "") + question))
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": [text_part(answer)]})
        return Sample(id=name, messages=messages, record={})

    return build


def decoded(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def test_prefix_instruction_answer(make, sample, tokenizer, image_token_id):
    batch = make()([sample(("ab", "cde"))])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    n = QUERIES + PATCHES
    assert (ids[:n] == image_token_id).all() and (ids[n:] != image_token_id).all()
    assert decoded(tokenizer, ids[n:]) == ["<s>", "▁a", "b", "▁", "c", "d", "e", "</s>"]
    assert labels.tolist() == [-100] * (n + 3) + ids[n + 3 :].tolist()
    assert decoded(tokenizer, batch["qformer_input_ids"][0]) == ["▁a", "b"]
    assert batch["pixel_values"].shape == (1, 3, 2, 2)
    assert batch["attention_mask"].all() and "text_branch_mask" not in batch


def test_five_labels_among_303_positions(tokenizer, image_token_id, processor, sample):
    sizes = config(image_token_id)
    sizes.num_query_tokens, sizes.vision_config.image_size = 32, 32
    collate = CromeCollator(tokenizer, processor, sizes, qformer_tokenizer=tokenizer)
    batch = collate([sample(("abcdefghi"[:8], "xyz"))])
    assert batch["input_ids"].shape == (1, 288 + 9 + 5)
    labels = batch["labels"][0]
    assert int((labels != -100).sum()) == 5 and labels[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("order", "layout"),
    [
        (["text", "visual", "instruction"], "vvvvvvT"),
        (["text", "instruction", "visual"], "vvTvvvv"),
        (["instruction", "visual"], "Tvvvv"),
    ],
)
def test_orders(make, sample, image_token_id, order, layout):
    """`v` a placeholder, `T` the instruction of three tokens; two images double each run."""
    collate = make(settings={"order": order})
    for images in (0, 1, 2):
        row = collate([sample(("ab", "c"), images=images)])["input_ids"][0]
        shown = "".join("v" if i == image_token_id else "t" for i in row.tolist())
        expected = layout.replace("v", "v" * images).replace("T", "ttt") + "ttt"
        assert shown == expected


def test_reading_two_repeats_the_instruction(make, sample, image_token_id):
    batch = make(settings={"reading": "R2"})([sample(("ab", "c"))])
    ids, mask = batch["input_ids"][0], batch["text_branch_mask"][0]
    n = QUERIES + PATCHES
    assert mask.tolist() == [0] * n + [1] * 3 + [0] * (len(ids) - n - 3)
    assert torch.equal(ids[n : n + 3], ids[n + 3 : n + 6])
    prompt = make(settings={"reading": "R2"}, with_labels=False)([sample(("ab", "c"))])
    assert prompt["text_branch_mask"][0].sum() == 3


def test_text_alone_beside_an_image(make, sample, image_token_id, tokenizer):
    batch = make()([sample(("ab", "c"), images=0, name="t"), sample(("ab", "c"))])
    assert not (batch["input_ids"][0] == image_token_id).any()
    assert batch["attention_mask"][0].sum() == 6
    assert batch["pixel_values"].shape[0] == len(batch["qformer_input_ids"]) == 1
    alone = make()([sample(("ab", "c"), images=0, name="t")])
    assert not alone["pixel_values"].any() and alone["qformer_input_ids"].shape == (1, 1)


def test_several_turns(make, sample, tokenizer):
    turns = (("ab", "cd"), ("ef", "g"))
    batch = make()([sample(*turns)])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    words = decoded(tokenizer, ids[QUERIES + PATCHES :])
    first = ["<s>", "▁a", "b", "▁", "c", "d", "</s>"]
    assert words == [*first, "<s>", "▁", "e", "f", "▁", "g", "</s>"]
    answers = decoded(tokenizer, ids[labels != -100])
    assert answers == ["▁", "c", "d", "</s>", "▁", "g", "</s>"]
    assert decoded(tokenizer, batch["qformer_input_ids"][0]) == ["▁a", "b"]
    short = make(max_length=QUERIES + PATCHES + 7)([sample(*turns)])
    assert decoded(tokenizer, short["input_ids"][0][QUERIES + PATCHES :]) == first


def test_prompts_are_padded_on_the_left(make, sample, tokenizer):
    collate = make(with_labels=False)
    batch = collate([sample(("abcd", "x")), sample(("a", None), images=0, name="t")])
    assert "labels" not in batch
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"][1, :5].any()
    assert decoded(tokenizer, batch["input_ids"][1][-2:]) == ["<s>", "▁a"]
    later = collate([sample(("a", "b"), ("c", "d"), images=0, name="t")])
    assert decoded(tokenizer, later["input_ids"][0])[-3:] == ["<s>", "▁", "c"]


def test_encoder_decoder(make, sample, tokenizer):
    collate = make(t5=True)
    batch = collate([sample(("ab", "cd")), sample(("a", "c"), images=0, name="t")])
    assert batch["input_ids"].shape == (2, QUERIES + PATCHES + 3)
    assert decoded(tokenizer, batch["labels"][0]) == ["▁", "c", "d", "</s>"]
    assert batch["labels"][1].tolist()[-1] == -100
    two = collate([sample(("ab", "cd"), ("e", "f"), images=0, name="t")])
    assert decoded(tokenizer, two["labels"][0]) == ["▁", "f", "</s>"]
    assert decoded(tokenizer, two["input_ids"][0])[3:7] == ["▁", "c", "d", "</s>"]


def test_truncation(make, sample, tokenizer):
    collate = make(max_instruction=4, max_answer=3, max_question=2)
    batch = collate([sample(("abcdefgh", "vwxyz"))])
    words = decoded(tokenizer, batch["input_ids"][0][QUERIES + PATCHES :])
    assert words == ["<s>", "f", "g", "h", "▁", "v", "</s>"]
    assert decoded(tokenizer, batch["qformer_input_ids"][0]) == ["g", "h"]
    assert tokenizer.truncation_side == "right"


def test_template(make, sample, tokenizer):
    collate = make(template=PillTemplate(image_text=""))
    batch = collate([sample(("ab", "c"))])
    text = tokenizer.decode(batch["input_ids"][0][QUERIES + PATCHES + 1 :])
    assert text.replace(" ", "").startswith("▁[INST]\nab[/INST]")
    assert decoded(tokenizer, batch["qformer_input_ids"][0]) == ["▁a", "b"]


def test_the_image_token_as_text(make, sample, image_token_id):
    batch = make()([sample(("a<image_placeholder>b", "c"), images=0, name="t")])
    assert not (batch["input_ids"] == image_token_id).any()


def test_random_images_follow_the_epoch(make, sample):
    processor = CromeImageProcessor(4, train=True, flip=False, scale=(0.3, 0.4))
    collate = make(image_processor=processor)
    one = sample(("a", "b"))
    from PIL import Image

    path = next(one.image_paths())
    Image.linear_gradient("L").convert("RGB").save(path)
    first = collate([one])["pixel_values"]
    assert torch.equal(collate([one])["pixel_values"], first)
    collate.set_epoch(1)
    assert not torch.equal(collate([one])["pixel_values"], first)


def test_batches_fit_the_model(make, sample, tokenizer, image_token_id):
    for options in ({}, {"reading": "R2"}, {"order": ["text", "instruction", "visual"]}):
        for t5 in (False, True):
            processor = CromeImageProcessor(4)
            collate = make(image_processor=processor, t5=t5, settings=options)
            model = CromeForConditionalGeneration(config(image_token_id, t5=t5, **options))
            rows = [
                sample(("ab", "cd"), images=2),
                sample(("a", "b"), images=0, name="t"),
                sample(("a", "b"), ("c", "d"), name="u"),
            ]
            assert model(**collate(rows)).loss.isfinite()
            assert model(**collate(rows[1:2])).loss.isfinite()


def test_wrong_settings(make, tokenizer, processor, image_token_id, sample):
    with pytest.raises(ValueError, match="qformer_tokenizer: is None, but config"):
        make(qformer_tokenizer=None)
    with pytest.raises(ValueError, match="max_answer: expected at least 2, got 1"):
        make(max_answer=1)
    with pytest.raises(ValueError, match=r"config\.image_token_id: is None"):
        CromeCollator(tokenizer, processor, SimpleNamespace(image_token_id=None))
    with pytest.raises(ValueError, match="sample 's': the last question has no answer"):
        make()([sample(("a", None))])
    with pytest.raises(ValueError, match="samples: expected at least one"):
        make()([])
