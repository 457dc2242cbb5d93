"""Token ids and label masks, against frozen ids and a second, string-based implementation."""

import copy
import json
import re
from pathlib import Path

import pytest

from mmadapt.data import LlavaJson, PillTemplate, Sample, ScienceQA
from mmadapt.data.encode import IGNORE, EncodedSample, SampleEncoder
from mmadapt.data.sample import image_part, text_part

NUM_IMAGE_TOKENS = 32
FROZEN = Path(__file__).parent / "fixtures" / "tokenisation.json"
SYSTEM = "Answer."


def char_encode(text, vocab, merges):
    """What LLaMA's tokenizer does to one text: a leading-space piece, then merges by rank."""
    pieces = list("▁" + text.replace(" ", "▁"))
    for first, second in merges:
        at = 0
        while at + 1 < len(pieces):
            if (pieces[at], pieces[at + 1]) == (first, second):
                pieces[at : at + 2] = [first + second]
            at += 1
    return [vocab.get(piece, 0) for piece in pieces]


def released_tokenisation(pairs, vocab, merges, image_id):
    """PILL's procedure on strings that hold one \\uffff per image: (ids, labels)."""

    def encode(text):
        ids = [1]
        for number, segment in enumerate(re.split(r"\s*\uffff\s*", text)):
            if number > 0:
                ids += [image_id] * NUM_IMAGE_TOKENS
            if segment:
                ids += char_encode(segment, vocab, merges)
        return ids

    ids, labels = [], []
    for prompt, answer in pairs:
        full = [*encode(prompt + answer), 2]
        cut = len(encode(prompt))
        ids += full
        labels += [IGNORE] * min(cut, len(full)) + [i if i else IGNORE for i in full[cut:]]
    return ids, labels


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


@pytest.fixture
def encoder(tokenizer, image_token_id):
    return SampleEncoder(
        tokenizer, image_token_id=image_token_id, num_image_tokens=NUM_IMAGE_TOKENS
    )


@pytest.fixture
def samples(tmp_path, write_scienceqa, write_png):
    """The records of the frozen file, read by the readers: 20 problems and 15 conversations."""
    frozen = json.loads(FROZEN.read_text())
    root = write_scienceqa(frozen["problems"])
    for pid, problem in frozen["problems"].items():
        for name in problem.get("images", [problem["image"]]):
            if name:
                write_png(root / "train" / pid / name)
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(frozen["chat"]))
    write_png(tmp_path / "images" / "a.png")
    return [*ScienceQA(root, system=SYSTEM), *LlavaJson(file)]


def test_frozen_ids_and_label_masks(encoder, samples, vocabulary, image_token_id):
    expected = json.loads(FROZEN.read_text())["expected"]
    assert [sample.id for sample in samples] == list(expected)
    assert len(expected) == 20 + 10 + 5
    for sample in samples:
        encoded = encoder.encode(sample)
        frozen = expected[sample.id]
        assert encoded.ids == frozen["ids"], sample.id
        mask = [label != IGNORE for label in encoded.labels]
        assert mask == [c == "1" for c in frozen["labelled"]], sample.id
        assert all(
            label in (IGNORE, token)
            for label, token in zip(encoded.labels, encoded.ids, strict=True)
        )
        images = len(list(sample.image_paths()))
        assert encoded.ids.count(image_token_id) == NUM_IMAGE_TOKENS * images == 32 * images
        assert len(encoded.spans) == images


def test_same_as_the_released_procedure_on_strings(encoder, samples, vocabulary, image_token_id):
    for sample in samples:
        pairs = []
        for user in range(0, len(sample.messages), 2):
            turn = sample.messages[user : user + 2]
            if turn[0]["role"] == "system":
                turn = sample.messages[:3]
            text = PillTemplate().render(turn, "\uffff")
            answer = turn[-1]["content"][0]["text"]
            pairs.append((text.removesuffix(answer), answer))
            if len(turn) == 3:
                break
        ids, labels = released_tokenisation(pairs, *vocabulary, image_token_id)
        encoded = encoder.encode(sample)
        assert encoded.ids == ids
        assert encoded.labels == labels


def sample_of(*turns):
    """One Sample from (user parts, answer) pairs; a str part is text, \\uffff an image."""
    messages = []
    for parts, answer in turns:
        content = [image_part("a.png") if p == "\uffff" else text_part(p) for p in parts]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": [text_part(answer)]})
    return Sample("s", messages, {})


def test_short_answer_ids_by_hand(encoder, vocabulary):
    vocab, _ = vocabulary
    encoded = encoder.encode(sample_of((["a"], "(A")))
    # "]" and "(" merge over the border of prompt and answer: the label border shifts by one,
    # because only the length of the separately encoded prompt is used.
    pieces = ["▁", *"[INST]a[/INST", "](", "A"]
    assert encoded.ids == [1, *(vocab[piece] for piece in pieces), 2]
    assert encoded.labels == [IGNORE] * (len(encoded.ids) - 2) + encoded.ids[-2:]


def test_unknown_tokens_of_an_answer_carry_no_label(encoder):
    encoded = encoder.encode(sample_of((["q"], "xéy")))
    assert encoded.ids[-3] == 0
    assert encoded.labels[-4:] == [encoded.ids[-4], IGNORE, encoded.ids[-2], 2]


def test_unknown_tokens_are_labelled_when_padding_has_its_own_id(tokenizer, image_token_id):
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = "~"
    encoder = SampleEncoder(padded, image_token_id=image_token_id, num_image_tokens=4)
    assert encoder.pad_id == tokenizer.convert_tokens_to_ids("~")
    assert encoder.encode(sample_of((["q"], "xéy"))).labels[-4:-1].count(0) == 1


def test_each_pair_of_a_conversation_has_its_own_bos_and_eos(encoder):
    one = encoder.encode(sample_of((["q"], "a")))
    two = encoder.encode(sample_of((["q"], "a"), (["q"], "a")))
    assert two.ids == one.ids * 2
    assert two.labels == one.labels * 2
    prompt = encoder.encode_prompt(sample_of((["q"], "a"), (["q"], "a")))
    border = one.labels.index(one.ids[-2])
    assert prompt.ids == one.ids + one.ids[:border]
    assert set(prompt.labels) == {IGNORE}
    assert encoder.encode_prompt(sample_of((["q"], None))).ids == one.ids[:border]


def test_training_on_an_open_question_is_refused(encoder):
    with pytest.raises(ValueError, match="'s': the last question has no answer"):
        encoder.encode(sample_of((["q"], None)))


@pytest.mark.parametrize("strip", [True, False])
def test_whitespace_around_images(tokenizer, image_token_id, vocabulary, strip):
    vocab, merges = vocabulary
    encoder = SampleEncoder(
        tokenizer,
        image_token_id=image_token_id,
        num_image_tokens=2,
        template=PillTemplate(image_text=""),
        strip_around_image=strip,
    )
    encoded = encoder.encode(sample_of((["x \n", "\uffff", "\n", "\uffff", " y"], "z")))
    run = [image_token_id] * 2
    between = [] if strip else char_encode("\n", vocab, merges)
    before = "[INST]x" if strip else "[INST]x \n"
    after = "y[/INST]z" if strip else " y[/INST]z"
    expected = [1, *char_encode(before, vocab, merges), *run, *between, *run]
    assert encoded.ids == [*expected, *char_encode(after, vocab, merges), 2]


def test_the_image_tokens_own_string_in_a_text_is_text(encoder, tokenizer, image_token_id):
    encoded = encoder.encode(sample_of((["what is <image_placeholder>?"], "<image_placeholder>")))
    assert image_token_id not in encoded.ids
    assert image_token_id not in encoded.labels
    assert encoded.spans == []


def test_literal_image_text_is_left_out_when_it_is_the_image_token(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<image>"], special_tokens=True)
    token = other.convert_tokens_to_ids("<image>")
    encoder = SampleEncoder(other, image_token_id=token, num_image_tokens=3)
    assert encoder.template.image_text == ""
    encoded = encoder.encode(sample_of((["\uffff", "a <image> tag"], "b")))
    assert encoded.ids.count(token) == 3


@pytest.mark.parametrize("num_image_tokens", [0, -1])
def test_no_image_tokens_is_refused(tokenizer, image_token_id, num_image_tokens):
    with pytest.raises(ValueError, match="num_image_tokens: expected at least 1"):
        SampleEncoder(tokenizer, image_token_id=image_token_id, num_image_tokens=num_image_tokens)


def test_truncation_never_cuts_through_an_image():
    def row():  # t t i i i i i i t t: two adjacent images of three tokens
        return EncodedSample(list(range(10)), list(range(10)), [(2, "a"), (5, "b")])

    expected = {
        12: (10, 2), 10: (10, 2), 9: (9, 2), 8: (8, 2), 7: (5, 1), 6: (5, 1), 5: (5, 1),
        4: (2, 0), 3: (2, 0), 2: (2, 0), 1: (1, 0),
    }  # fmt: skip
    for length, (tokens, images) in expected.items():
        encoded = row()
        assert encoded.truncate(length, 3) == 2 - images
        assert encoded.ids == encoded.labels == list(range(tokens))
        assert len(encoded.spans) == images
