"""The demo's frozen BLIPs: built, pretrained and saved, the same every time."""

import pytest
import torch
from transformers import AutoTokenizer, BlipForImageTextRetrieval, BlipForQuestionAnswering

from mmadapt.data.digit_scenes import vocabulary
from mmadapt.train.digits import make_digits_blip
from mmadapt.train.digits.blip import SourceScenes, make_tokenizer

SMALL = {"vision_steps": 2, "word_steps": 2, "task_steps": 2, "hidden_size": 16, "num_layers": 1}
KINDS = {"retrieval": BlipForImageTextRetrieval, "vqa": BlipForQuestionAnswering}


@pytest.mark.parametrize("task", ["retrieval", "vqa"])
def test_made_twice_it_is_the_same(task, tmp_path):
    seen = []
    for name in ("a", "b"):
        make_digits_blip(
            tmp_path / name,
            task=task,
            progress=lambda done, total: seen.append((done, total)),
            **SMALL,
        )
    one, other = (KINDS[task].from_pretrained(tmp_path / name) for name in ("a", "b"))
    for (key, tensor), found in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, found), key
    assert seen == [(i, 6) for i in range(1, 7)] * 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    ids = tokenizer("a seven, then a two?")["input_ids"]
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert tokenizer.unk_token_id not in ids


def test_every_word_has_a_token_and_no_special_one():
    vocab = make_tokenizer().get_vocab()
    assert [vocab[word] for word in vocabulary()] == list(range(6, 6 + len(vocabulary())))
    assert [vocab[name] for name in ("[PAD]", "[CLS]", "[SEP]", "[DEC]", "[ENC]")] == [
        0,
        2,
        3,
        4,
        5,
    ]


def test_source_scenes_are_small_and_seeded():
    scenes = SourceScenes(0).scenes(50)
    assert {len(scene.cells) for scene in scenes} == {1, 2}
    assert SourceScenes(0).scenes(50) == scenes != SourceScenes(1).scenes(50)


def test_unknown_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="task: expected retrieval or vqa, got 'captions'"):
        make_digits_blip(tmp_path, task="captions")
