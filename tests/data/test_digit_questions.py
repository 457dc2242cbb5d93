import random
import re
from collections import Counter, defaultdict

import pytest

from mmadapt.data.digits_vqa import (
    KINDS,
    TEXT_KINDS,
    VISUAL_KINDS,
    WORDS,
    describe,
    draw_digits,
    make_question,
    num_choices,
)


def right(problem):
    return problem["choices"][problem["answer"]]


def many(kind, count=400):
    rng = random.Random(kind)
    for _ in range(count):
        digits = draw_digits(kind, rng)
        yield digits, make_question(kind, digits, rng)


def solve(kind, digits, question):
    """The right choice, from the digits and the wording alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    match kind:
        case "which digit" | "number word":
            return str(digits[0])
        case "even or odd" | "even or odd in words":
            return "odd" if digits[0] % 2 else "even"
        case "larger than":
            return "yes" if digits[0] > numbers[0] else "no"
        case "two-scan comparison":
            return "the first scan" if digits[0] > digits[1] else "the second scan"
        case "two-scan sum":
            return str(sum(digits))
        case "addition":
            return str(sum(numbers))
        case "larger number":
            return str(max(numbers))


def test_the_kinds_of_the_set():
    assert set(VISUAL_KINDS) == {
        "which digit",
        "even or odd",
        "larger than",
        "two-scan comparison",
        "two-scan sum",
    }
    assert set(TEXT_KINDS) | set(VISUAL_KINDS) == set(KINDS)
    assert len(TEXT_KINDS) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_marked_choice_is_the_right_one(kind):
    for digits, problem in many(kind):
        choices = problem["choices"]
        assert right(problem) == solve(kind, digits, problem["question"])
        assert len(set(choices)) == len(choices) == num_choices(kind)
        assert 2 <= len(choices) <= 5
        assert problem["skill"] == kind
        assert (problem["image"], problem["split"]) == (None, "")


def test_solutions_name_the_digits_seen():
    rng = random.Random(0)

    def solution(kind, *digits):
        return make_question(kind, digits, rng)["solution"]

    assert solution("which digit", 7) == "The scan shows 7."
    assert solution("even or odd", 8) == "The scan shows 8. 8 is even."
    assert solution("larger than", 4) == "The scan shows 4. 4 is not larger than 4."
    assert solution("larger than", 5) == "The scan shows 5. 5 is larger than 4."
    shown = "The scans show 3 and 5. 5 is larger than 3. It is in the second scan."
    assert solution("two-scan comparison", 3, 5) == shown
    assert solution("two-scan sum", 7, 5) == "The scans show 7 and 5. 7 + 5 = 12."
    assert solution("addition", 0, 9) == "0 + 9 = 9."
    assert solution("larger number", 2, 6) == "6 is larger than 2."
    assert solution("even or odd in words", 3) == "three is 3. 3 is odd."
    assert solution("number word", 0) == "zero is 0."


def test_captions():
    assert describe([7]) == "a scan of the digit seven ."
    assert describe([0, 5]) == "two scans of the digits zero and five ."
    with pytest.raises(ValueError, match="one or two scans, got 3"):
        describe([1, 2, 3])


@pytest.mark.parametrize("kind", VISUAL_KINDS)
def test_the_text_alone_does_not_give_the_answer_away(kind):
    """The best guess from question and set of choices stays near 1 / choices."""
    seen = defaultdict(Counter)
    total = 0
    for _, problem in many(kind, 20_000):
        if kind in ("which digit", "two-scan sum"):
            # Sets of choices are too many to tabulate: does a value win more often than it is
            # offered, given how many choices there are?
            for choice in problem["choices"]:
                seen[choice][choice == right(problem)] += 1
        else:
            seen[problem["question"]][right(problem)] += 1
        total += 1
    if kind in ("which digit", "two-scan sum"):
        for counts in seen.values():
            if sum(counts.values()) > 2000:  # rarer sums scatter by more than the bound
                share = counts[True] / sum(counts.values())
                assert share == pytest.approx(1 / num_choices(kind), abs=0.04)
    else:
        best = sum(max(counts.values()) for counts in seen.values()) / total
        assert best == pytest.approx(1 / num_choices(kind), abs=0.02)


def test_larger_than_is_balanced_for_every_threshold_and_digit():
    table = defaultdict(Counter)
    for digits, problem in many("larger than", 20_000):
        table[problem["question"]][right(problem)] += 1
        table["digit"][digits[0]] += 1
    digits = table.pop("digit")
    assert len(digits) == 10 and min(digits.values()) > 1800
    assert len(table) == 9
    for counts in table.values():
        assert counts["yes"] / counts.total() == pytest.approx(0.5, abs=0.08)


def test_hints_stand_on_about_half_of_the_questions_of_some_kinds():
    shares = {k: sum(bool(p["hint"]) for _, p in many(k)) / 400 for k in KINDS}
    assert {share for share in shares.values() if not 0.4 < share < 0.6} == {0}
    assert any(shares[kind] for kind in VISUAL_KINDS) and any(shares[kind] for kind in TEXT_KINDS)
    assert not all(shares.values())


def test_labels_are_scienceqas_and_every_subject_has_both_modalities():
    grades = set()
    for kinds in (VISUAL_KINDS, TEXT_KINDS):
        subjects = set()
        for kind in kinds:
            for _, problem in many(kind, 50):
                subjects.add(problem["subject"])
                grades.add(problem["grade"])
        assert subjects == {"natural science", "social science", "language science"}
    assert grades == {f"grade{n}" for n in range(1, 13)}


def test_position_and_determinism():
    for kind in KINDS:
        for position in range(num_choices(kind)):
            digits = draw_digits(kind, random.Random(position))
            problems = [
                make_question(kind, digits, random.Random(1), position=position) for _ in range(2)
            ]
            assert problems[0] == problems[1]
            assert problems[0]["answer"] == position


@pytest.mark.parametrize(
    ("kind", "digits", "position", "message"),
    [
        ("colour", [1], None, "kind: expected one of"),
        ("which digit", [1, 2], None, "digits: 'which digit' takes 1 of 0..9"),
        ("which digit", [10], None, "digits"),
        ("two-scan comparison", [4, 4], None, "two different digits, got 4 and 4"),
        ("which digit", [1], 5, r"position: expected 0\.\.3, got 5"),
    ],
)
def test_bad_arguments(kind, digits, position, message):
    with pytest.raises(ValueError, match=message):
        make_question(kind, digits, random.Random(0), position=position)


def test_words():
    assert [WORDS.index(w) for w in ("zero", "five", "nine")] == [0, 5, 9]
