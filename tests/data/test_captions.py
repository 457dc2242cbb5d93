"""Readers of captions and of open-ended questions, in their field layouts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmadapt.data import DataError, load
from mmadapt.data.answers import read_answer_list
from mmadapt.data.blip_collate import AnswerCollator, RetrievalCollator, VisualLoader
from mmadapt.data.image_transforms import EvalTransform
from mmadapt.data.video import VideoFrames


def save_image(path, value=0, size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)


def write(path, value, lines=False):
    text = "\n".join(map(json.dumps, value)) if lines else json.dumps(value)
    path.write_text(text)
    return path


@pytest.fixture
def coco(tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / "val2014" / f"{name}.png")
        save_image(tmp_path / "flickr" / f"{name}.png")
    train = [
        {"image": "val2014/a.png", "caption": "A Dog.", "image_id": "coco_7"},
        {"image": "val2014/b.png", "caption": "a cat", "image_id": "coco_3"},
        {"image": "val2014/a.png", "caption": "The same dog!", "image_id": "coco_7"},
    ]
    test = [
        {"image": "val2014/b.png", "caption": ["One.", "Two."]},
        {"image": "val2014/a.png", "caption": ["Three"]},
    ]
    write(tmp_path / "coco_karpathy_train.json", train)
    write(tmp_path / "coco_karpathy_test.json", test)
    return tmp_path


def test_training_captions_and_dense_ids(coco):
    spec = {"reader": "coco_karpathy", "path": coco / "coco_karpathy_train.json"}
    data = load(spec)
    assert [sample.number for sample in data] == [0, 1, 0]
    assert [sample.captions for sample in data] == [["a dog"], ["a cat"], ["the same dog"]]
    first = data[0]
    assert first.messages[0]["content"][0]["path"] == str(coco / "val2014" / "a.png")
    assert first.record["caption"] == "A Dog."
    assert len(load(spec | {"limit": 1})) == 1
    assert data.validate() == []


def test_test_files_are_galleries(coco):
    data = load({"reader": "coco_karpathy", "path": coco / "coco_karpathy_test.json"})
    assert len(data) == 2
    assert data.texts == ["one", "two", "three"]
    assert data.text_image == [0, 0, 1]


def test_flickr_uses_the_last_part_of_a_path(coco):
    file = write(coco / "flickr30k_train.json", [{"image": "x/y/a.png", "caption": "A"}])
    data = load({"reader": "flickr30k", "path": file, "image_root": coco / "flickr"})
    assert data[0].messages[0]["content"][0]["path"] == str(coco / "flickr" / "a.png")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"caption": "a"}, "record 0: expected an object with image"),
        ({"image": "a.png", "caption": []}, "caption: expected a string or a list"),
        ({"image": "a.png", "caption": [1]}, "caption: expected a string or a list"),
        ([], "record 0: expected an object with image"),
    ],
)
def test_bad_caption_records(record, message, tmp_path):
    file = write(tmp_path / "bad.json", [record])
    with pytest.raises(DataError, match=message):
        load({"reader": "coco_karpathy", "path": file})


def test_missing_and_escaping_images(coco):
    records = [{"image": "../x.png", "caption": "a"}, {"image": "no.png", "caption": "a"}]
    data = load({"reader": "coco_karpathy", "path": write(coco / "bad.json", records)})
    with pytest.raises(DataError, match="leaves the data folder"):
        data[0]
    problems = data.validate()
    assert len(problems) == 2 and "is missing" in problems[1]


@pytest.fixture
def videos(tmp_path):
    for clip in ("video7", "video9"):
        for frame in range(5):
            save_image(tmp_path / clip / f"{frame:03d}.png", value=10 * frame)
    lines = [
        {"caption": "A man runs.", "clip_name": "video9"},
        {"caption": "he runs", "clip_name": "video9"},
        {"caption": "a dog", "clip_name": "video7"},
    ]
    write(tmp_path / "train.jsonl", lines, lines=True)
    return tmp_path


@pytest.mark.parametrize("reader", ["msrvtt", "didemo"])
def test_video_captions(reader, videos):
    data = load({"reader": reader, "path": videos / "train.jsonl"})
    assert [sample.number for sample in data] == [0, 0, 1]
    part = data[0].messages[0]["content"][0]
    assert part == {"type": "video", "path": str(videos / "video9")}
    assert data[0].captions == ["a man runs"]
    pixels = VideoFrames(4, size=8)(part["path"])
    assert pixels.shape == (4, 3, 8, 8)


def test_broken_lines_are_named(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"caption": "a", "clip_name": "b"}\n{"caption"\n')
    with pytest.raises(DataError, match="line 2 is broken JSON"):
        load({"reader": "msrvtt", "path": file})
    file.write_text('{"caption": "a", "clip_name": 3}\n')
    with pytest.raises(DataError, match="expected caption and clip_name"):
        load({"reader": "msrvtt", "path": file})
    file.write_text('{"caption": "a", "clip_name": "b"}\n')
    with pytest.raises(DataError, match="is missing"):
        load({"reader": "msrvtt", "path": file})[0]


def test_vqav2_weights_are_the_annotators_shares(tmp_path):
    save_image(tmp_path / "a.png")
    records = [
        {
            "question": 'Is it "red"?',
            "answer": ["yes"] * 7 + ["no"] * 3,
            "image": "a.png",
            "dataset": "vqa",
            "question_id": 5,
        },
        {"question": "What?", "answer": "a dog", "image": "a.png", "dataset": "vg"},
    ]
    data = load({"reader": "vqav2", "path": write(tmp_path / "vqa_train.json", records)})
    assert data[0].question == "is it red?" and data[0].question_id == 5
    assert data[0].answers == ["yes", "no"] and data[0].weights == [0.7, 0.3]
    assert data[1].answers == ["a dog"] and data[1].weights == [0.2]
    test = [{"question": "What?", "image": "a.png", "question_id": 6}]
    data = load({"reader": "vqav2", "path": write(tmp_path / "vqa_test.json", test)})
    assert data[0].answers == [] and len(data[0].messages) == 1
    with pytest.raises(DataError, match="answer: expected strings"):
        load({"reader": "vqav2", "path": write(tmp_path / "x.json", [test[0] | {"answer": [1]}])})


def test_msrvtt_qa(videos):
    records = [{"video_id": 7, "question": "What is it?", "answer": "dog", "id": 3}]
    data = load({"reader": "msrvtt_qa", "path": write(videos / "train_qa.json", records)})
    assert data[0].question == "What is it?"  # not cleaned
    assert (data[0].answers, data[0].weights, data[0].question_id) == (["dog"], [0.05], 3)
    records[0]["video_id"] = "7"
    with pytest.raises(DataError, match="video_id: expected int, got '7'"):
        load({"reader": "msrvtt_qa", "path": write(videos / "bad.json", records)})


def test_answer_lists(tmp_path):
    assert read_answer_list(write(tmp_path / "a.json", ["yes", "no"])) == ["yes", "no"]
    with pytest.raises(DataError, match="a list of strings"):
        read_answer_list(write(tmp_path / "b.json", []))


def test_retrieval_batches(coco, word_tokenizer):
    data = load({"reader": "coco_karpathy", "path": coco / "coco_karpathy_train.json"})
    collate = RetrievalCollator(word_tokenizer, VisualLoader(EvalTransform(8)), max_length=9)
    batch = collate([data[0], data[2]])
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 9)
    assert batch["image_ids"].tolist() == [0, 0]


def test_answer_batches(tmp_path, word_tokenizer):
    save_image(tmp_path / "a.png")
    record = {"question": "is it a dog?", "image": "a.png", "question_id": 1}
    records = [record | {"answer": ["yes", "no"]}, record | {"answer": "a dog"}]
    data = load({"reader": "vqav2", "path": write(tmp_path / "vqa.json", records)})
    enc, dec = word_tokenizer.convert_tokens_to_ids(["[ENC]", "[DEC]"])
    visual = VisualLoader(EvalTransform(8))
    collate = AnswerCollator(word_tokenizer, visual, enc_token_id=enc, dec_token_id=dec)
    batch = collate([data[0], data[1]])
    assert batch["counts"].tolist() == [2, 1]
    torch.testing.assert_close(batch["weights"], torch.tensor([0.5, 0.5, 0.2]))
    assert batch["input_ids"][:, 0].tolist() == [enc, enc]
    assert batch["answer_ids"][:, 0].tolist() == [dec] * 3
    assert batch["answer_ids"].shape == (3, 4)  # [DEC] a dog [SEP]


def test_broken_videos_are_replaced_and_counted(videos, word_tokenizer):
    (videos / "video7" / "002.png").write_bytes(b"no image")
    data = load({"reader": "msrvtt", "path": videos / "train.jsonl"})
    strict = VisualLoader(EvalTransform(8), VideoFrames(5, size=8))
    with pytest.raises(DataError, match=r"002\.png.*corrupt"):
        RetrievalCollator(word_tokenizer, strict)([data[0], data[2]])
    lenient = VisualLoader(EvalTransform(8), VideoFrames(5, size=8), skip_broken=True)
    with pytest.warns(UserWarning, match="left out"):
        batch = RetrievalCollator(word_tokenizer, lenient)([data[0], data[2], data[1]])
    assert lenient.broken == 1
    assert batch["image_ids"].tolist() == [0, 0, 0] and len(batch["pixel_values"]) == 3
    with pytest.warns(UserWarning, match="left out"):
        batch = RetrievalCollator(word_tokenizer, lenient)([data[2], data[2], data[2], data[0]])
    assert batch["image_ids"].tolist() == [0] * 4 and lenient.broken == 4
    with pytest.raises(DataError, match="no sample of a batch of 1"), pytest.warns(UserWarning):
        RetrievalCollator(word_tokenizer, lenient)([data[2]])
