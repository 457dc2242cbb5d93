"""The demo's own backbone: what it reads, and that it is saved whole."""

import json
import random
from itertools import islice

import pytest
import torch

from mmadapt.data import write_digits_vqa
from mmadapt.data.digit_questions import WORDS
from mmadapt.models import load_pretrained
from mmadapt.train.digits import PROMPT, SYSTEM, make_digits_backbone
from mmadapt.train.digits.corpus import caption_text, question_text, texts
from mmadapt.train.digits.tokenizer import train_tokenizer
from mmadapt.train.digits.vision import query_features


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    sizes = {"train": 15, "val": 15, "test": 15, "captions": 60}
    return write_digits_vqa(tmp_path_factory.mktemp("digits") / "set", **sizes)


def test_texts_never_refer_to_an_image_placeholder():
    for prompt, answer in islice(texts(random.Random(0)), 300):
        assert "<image>" not in prompt + answer
        assert prompt.startswith("[INST]") and prompt.endswith("[/INST]")


def test_a_visual_question_describes_its_scans_in_words():
    prompt, answer = question_text("which digit", random.Random(3))
    digit = answer.split("shows ")[1][0]
    assert f"Image:a scan of the digit {WORDS[int(digit)]} ." in prompt
    assert SYSTEM in prompt


def test_prompts_equal_what_the_collator_asks(data_root):
    """Apart from the image, a pretraining question reads like the reader's of the same kind."""
    from mmadapt.data import PillTemplate, ScienceQA

    asked = ScienceQA(data_root, "train", prompt=PROMPT, system=SYSTEM)
    sample = next(s for s in asked if s.record["skill"] == "addition")
    rendered = PillTemplate(image_text="").render(sample.messages)
    prompt, _ = question_text("addition", random.Random(0))
    assert rendered.split("Question:")[0] == prompt.split("Question:")[0]


def test_captions_answer_with_the_description():
    prompt, answer = caption_text([7, 5])
    assert prompt.startswith(f"[INST]{answer}")
    assert answer == "two scans of the digits seven and five ."


def test_tokenizer_round_trips_and_keeps_llamas_ids():
    corpus = ["".join(pair) for pair in islice(texts(random.Random(1)), 200)]
    tokenizer = train_tokenizer(corpus)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids("<image>") == len(tokenizer) - 1
    for text in [*corpus[:20], "Unseen: Ω ~ {}"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_backbone_is_saved_whole_and_depends_on_the_seed_alone(data_root, tmp_path):
    steps = []
    for name in ("a", "b"):
        torch.manual_seed(len(steps))  # the caller's random state must not matter
        make_digits_backbone(
            tmp_path / name,
            data_root,
            language_steps=2,
            vision_epochs=1,
            progress=lambda done, total: steps.append((done, total)),
        )
    assert steps[:3] == [(1, 3), (2, 3), (3, 3)]
    first, second = (load_pretrained(str(tmp_path / name)) for name in ("a", "b"))
    others = second.model.state_dict()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, others[name]), name
    ids = torch.tensor([[1, *[first.image_token_id] * first.num_image_tokens, 5]])
    logits = first.model(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32)).logits
    assert logits.shape == (1, ids.shape[1], len(first.tokenizer))


def test_only_captions_are_looked_at(data_root, tmp_path):
    """The encoder is pretrained without a question: the set's questions can be missing."""
    import shutil

    copy = shutil.copytree(data_root, tmp_path / "copy")
    for split in ("train", "val", "test"):
        shutil.rmtree(copy / split)
    (copy / "problems.json").unlink()
    make_digits_backbone(tmp_path / "out", copy, language_steps=1, vision_epochs=1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "blip-2"


@pytest.mark.slow
def test_pretraining_teaches_text_and_sight(tmp_path):
    """Shortened: the questions of two choices are learnt, and most training scans are told."""
    root = write_digits_vqa(tmp_path / "set", train=100, val=50, test=100)
    make_digits_backbone(tmp_path / "out", root, language_steps=300, vision_epochs=8)
    backbone = load_pretrained(str(tmp_path / "out"))
    rng = random.Random(5)
    right = 0
    for _ in range(20):
        prompt, answer = question_text("even or odd in words", rng)
        ids = backbone.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([torch.tensor([[1]]), ids], dim=1)
        out = backbone.model.language_model.generate(ids, max_new_tokens=24, do_sample=False)
        solution = answer.split(" The answer")[0]
        right += solution in backbone.tokenizer.decode(out[0, ids.shape[1] :])
    assert right >= 15
    from mmadapt.data import LlavaJson

    scans = [s for s in LlavaJson(root / "captions" / "chat.json") if len([*s.image_paths()]) == 1]
    from PIL import Image

    pixels = backbone.image_processor(
        images=[Image.open(next(s.image_paths())).convert("RGB") for s in scans[:400]],
        return_tensors="pt",
    )["pixel_values"]
    with torch.no_grad():
        features = query_features(backbone.model, pixels).flatten(1)
    captions = [s.messages[-1]["content"][0]["text"] for s in scans[:400]]
    distance = torch.cdist(features, features).fill_diagonal_(torch.inf)
    same = [captions[i] == captions[j] for i, j in enumerate(distance.argmin(1).tolist())]
    assert sum(same) / len(same) > 0.7
