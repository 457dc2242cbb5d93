"""The scorer: extraction rules, the table's columns, PILL's published row."""

from __future__ import annotations

import itertools

import pytest

from mmadapt.eval import (
    COLUMNS,
    SCIENCEQA_TEST_SIZE,
    chance_row,
    extract_answer,
    scienceqa_table,
)

NATURAL, SOCIAL, LANGUAGE = "natural science", "social science", "language science"


def problem(subject=NATURAL, grade="grade3", hint="", image=None, answer=0, choices=4, skill=None):
    record = {
        "question": "?",
        "choices": [str(i) for i in range(choices)],
        "answer": answer,
        "subject": subject,
        "grade": grade,
        "hint": hint,
        "image": image,
    }
    return record | ({"skill": skill} if skill else {})


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("The answer is B.", 4, 1),
        ("The answer is A.\nBECAUSE: the answer is not B.", 2, 0),
        ("BECAUSE: so. The answer is D.", 4, 3),
        ("The answer is E.", 4, None),
        ("The answer is E. The answer is A.", 4, None),  # only the first match counts
        ("The answer is A", 4, None),  # PILL's pattern wants one more character
        ("The answer is A\n", 4, None),
        ("The answer is Because", 4, 1),  # and takes any character for the dot
        ("the answer is A.", 4, None),
        ("The answer is a.", 4, None),
        ("The answer is (A).", 4, None),
        ("", 4, None),
    ],
)
def test_extract_answer(text, choices, expected):
    assert extract_answer(text, choices) == expected


@pytest.mark.parametrize("choices", [0, 27])
def test_extract_answer_refuses_impossible_choice_counts(choices):
    with pytest.raises(ValueError, match=f"num_choices: got {choices}"):
        extract_answer("The answer is A.", choices)


def pill_test_split():
    """Problems with the marginals of ScienceQA's test split and PILL's right and wrong answers.

    Per context class (hint and image, hint alone, image alone, neither) the right answers follow
    from PILL's TXT, IMG, NO and total; subjects and grades are dealt within right and wrong.
    """
    sizes = {(1, 1): 1257, (1, 0): 789, (0, 1): 760, (0, 0): 1435}
    right = {(1, 1): 1064, (1, 0): 765, (0, 1): 724, (0, 0): 1316}
    subjects = {True: (2035, 852, 982), False: (217, 37, 118)}
    grades = {True: (2509, 1360), False: (215, 157)}
    problems, predictions = {}, {}
    for ok in (True, False):
        names = (NATURAL, SOCIAL, LANGUAGE)
        subject = [n for n, k in zip(names, subjects[ok], strict=True) for _ in range(k)]
        years = [f"grade{1 + i % 6}" for i in range(grades[ok][0])]
        years += [f"grade{7 + i % 6}" for i in range(grades[ok][1])]
        contexts = [c for c in sizes for _ in range(right[c] if ok else sizes[c] - right[c])]
        for s, g, (hint, image) in zip(subject, years, contexts, strict=True):
            key = str(len(problems))
            answer = len(problems) % 3
            problems[key] = problem(s, g, "h" * hint, "image.png" if image else None, answer)
            predictions[key] = answer if ok else answer + 1
    return problems, predictions


def test_pill_row_from_its_integer_counts():
    table = scienceqa_table(*pill_test_split(), expected_count=SCIENCEQA_TEST_SIZE)
    assert table.percentages() == {
        "NAT": 90.36,
        "SOC": 95.84,
        "LAN": 89.27,
        "TXT": 89.39,
        "IMG": 88.65,
        "NO": 91.71,
        "G1-6": 92.11,
        "G7-12": 89.65,
        "AVG": 91.23,
    }
    totals = [table.columns[c].total for c in COLUMNS]
    assert totals == [2252, 889, 1100, 2046, 2017, 1435, 2724, 1517, 4241]
    assert table.columns["AVG"].correct == 3869
    assert table.failures == 0


def test_official_score_needs_every_prediction():
    problems, predictions = pill_test_split()
    del problems["17"], predictions["17"]
    with pytest.raises(ValueError, match="predictions: got 4240, expected 4241"):
        scienceqa_table(problems, predictions, expected_count=SCIENCEQA_TEST_SIZE)


def test_failures_are_wrong_by_default_and_counted():
    problems = {str(i): problem() for i in range(8)}
    predictions = {str(i): 0 if i < 6 else None for i in range(8)}
    table = scienceqa_table(problems, predictions)
    assert (table.columns["AVG"].correct, table.failures) == (6, 2)


def test_random_failures_are_seeded_and_independent_of_order():
    problems = {str(i): problem(choices=4) for i in range(4000)}
    predictions = dict.fromkeys(problems)
    table = scienceqa_table(problems, predictions, failures="random", seed=3)
    shuffled = dict(reversed(problems.items()))
    assert scienceqa_table(shuffled, predictions, failures="random", seed=3) == table
    others = [scienceqa_table(problems, predictions, failures="random", seed=s) for s in range(9)]
    assert len({other["AVG"] for other in others}) > 1
    assert table.failures == 4000
    assert 22 < table["AVG"] < 28


def test_columns_follow_hint_image_and_grade():
    kinds = itertools.product(("", "h"), (None, "i.png"), ("grade6", "grade7"))
    problems = {str(i): problem(hint=h, image=im, grade=g) for i, (h, im, g) in enumerate(kinds)}
    columns = scienceqa_table(problems, dict.fromkeys(problems, 0)).columns
    totals = {c: columns[c].total for c in COLUMNS}
    assert totals == {
        "NAT": 8, "SOC": 0, "LAN": 0, "TXT": 4, "IMG": 4, "NO": 2, "G1-6": 4, "G7-12": 4, "AVG": 8,
    }  # fmt: skip


def test_chance_is_the_mean_of_one_over_choices():
    problems = {
        "a": problem(choices=2, image="i.png", skill="parity"),
        "b": problem(choices=4, image="i.png", skill="digit"),
        "c": problem(choices=5),
    }
    row = chance_row(problems)
    assert row.expected
    assert row.table["AVG"] == round(100 * (0.5 + 0.25 + 0.2) / 3, 2)
    assert row.visual.percent == 37.5
    assert row.text_only.percent == pytest.approx(20)
    assert {s: a.percent for s, a in row.by_skill.items()} == {"parity": 50, "digit": 25}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": "physics"}, "problem 0: subject is 'physics'"),
        ({"grade": "grade13"}, "grade: got 'grade13'"),
        ({"grade": "3"}, "grade: got '3'"),
    ],
)
def test_bad_records_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        scienceqa_table({"0": problem() | change}, {"0": 0})


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({}, "1 missing"),
        ({"0": 0, "9": 0}, "1 of unknown problems"),
        ({"0": 4}, "prediction of problem 0: got 4, expected 0 to 3"),
        ({"0": -1}, "prediction of problem 0: got -1"),
    ],
)
def test_bad_predictions_are_named(predictions, message):
    with pytest.raises(ValueError, match=message):
        scienceqa_table({"0": problem()}, predictions)


def test_unknown_failure_policy():
    with pytest.raises(ValueError, match="failures: got 'guess'"):
        scienceqa_table({"0": problem()}, {"0": 0}, failures="guess")
