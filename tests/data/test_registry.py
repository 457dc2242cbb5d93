import json

import pytest

from mmadapt.data import LlavaJson, Mixture, ScienceQA, load


@pytest.fixture
def specs(tmp_path, problem, write_scienceqa):
    root = write_scienceqa({"1": problem(), "2": problem(split="val")})
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(3)]))
    science = {"reader": "scienceqa", "path": str(root), "split": "trainval", "prompt": "QCM-A"}
    return science, {"reader": "llava_json", "path": file}


def test_readers_by_name(specs):
    science, llava = map(load, specs)
    assert isinstance(science, ScienceQA) and (science.prompt, len(science)) == ("QCM-A", 2)
    assert isinstance(llava, LlavaJson) and len(llava) == 3


def test_a_list_is_a_mixture(specs):
    mixture = load([specs[0] | {"wrong_answer_rate": 1.0}, specs[1]])
    assert isinstance(mixture, Mixture)
    assert [mixture[i].id for i in range(len(mixture))] == ["1", "2", "0", "1", "2"]
    mixture.set_epoch(4)
    assert mixture.datasets[0].epoch == 4
    assert mixture.validate() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reader": "coco"}, r"reader: expected one of \['coco_karpathy', .*'vqav2'\], got 'coco'"),
        ({"reader": None}, "reader"),
        ({"spilt": "train"}, "spilt: no option of reader 'scienceqa'; it takes"),
        ({"root": "x"}, "root: no option"),
    ],
)
def test_bad_specs(specs, change, message):
    with pytest.raises(ValueError, match=message):
        load(specs[0] | change)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="spec: expected at least one data set"):
        load([])


def test_a_spec_needs_a_path(specs):
    with pytest.raises(ValueError, match="path: missing"):
        load({"reader": "scienceqa"})
