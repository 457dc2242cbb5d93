"""VQAv2's accuracy, exact match and the server's file."""

import json

import pytest

from mmadapt.eval.vqa import exact_match, normalise_answer, soft_accuracy, write_vqa_results


@pytest.mark.parametrize(
    "given, expected",
    [
        ("The  Cat", "cat"),
        ("two dogs.", "2 dogs"),
        ("an umbrella, maybe", "umbrella maybe"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("none", "0"),
        ("what?", "what"),
        ("yes\n", "yes"),
    ],
)
def test_normalisation(given, expected):
    assert normalise_answer(given) == expected


@pytest.mark.parametrize("agree, expected", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)])
def test_accuracy_leaves_one_annotator_out(agree, expected):
    references = ["yes"] * agree + ["no"] * (10 - agree)
    assert soft_accuracy("Yes", references) == pytest.approx(expected)


def test_exact_match_counts_by_question():
    found = exact_match({1: "a dog", 2: "cat", 3: "unused"}, {1: "a dog", 2: "Cat"})
    assert (found.correct, found.total) == (1, 2)
    with pytest.raises(ValueError, match="1 questions have none, the first is 2"):
        exact_match({1: "a"}, {1: "a", 2: "b"})
    with pytest.raises(ValueError, match="references: expected at least one"):
        soft_accuracy("yes", [])


def test_results_hold_each_question_once(tmp_path):
    path = tmp_path / "vqa.json"
    write_vqa_results(path, [(3, "yes"), (5, "no"), (3, "padded")])
    assert json.loads(path.read_text()) == [
        {"question_id": 3, "answer": "yes"},
        {"question_id": 5, "answer": "no"},
    ]
