import pytest

from mmadapt.data import PROMPT_FORMATS
from mmadapt.data.prompts import answer_text, question_body

Q = "Question: Which is red?"
C = "Context: Look at the picture."
M = "Options: (A) the sky (B) a rose (C) grass"
L, E = "Things have colours.", "Roses are red."
A = "The answer is B."

INPUTS = {
    "CQM": f"{C}\n{Q}\n{M}",
    "QCM": f"{Q}\n{C}\n{M}",
    "QCML": f"{Q}\n{C}\n{M}\nBECAUSE: {L}",
    "QCME": f"{Q}\n{C}\n{M}\nBECAUSE: {E}",
    "QCMLE": f"{Q}\n{C}\n{M}\nBECAUSE: {L} {E}",
    "QCLM": f"{Q}\n{C}\nBECAUSE: {L}\n{M}",
    "QCEM": f"{Q}\n{C}\nBECAUSE: {E}\n{M}",
    "QCLEM": f"{Q}\n{C}\nBECAUSE: {L} {E}\n{M}",
}
OUTPUTS = {
    "A": A,
    "LA": f"{L} {A}",
    "EA": f"{E} {A}",
    "LEA": f"{L} {E} {A}",
    "ELA": f"{E} {L} {A}",
    "AL": f"{A} BECAUSE: {E}",
    "AE": f"{A} BECAUSE: {L}",
    "ALE": f"{A} BECAUSE: {L} {E}",
}


def test_the_accepted_formats_are_the_released_ones():
    eight = ("A", "LA", "EA", "LEA", "ELA", "AL", "AE", "ALE")
    expected = {f"{i}-{o}" for i in ("CQM", "QCM") for o in eight} | {
        "QCML-A",
        "QCME-A",
        "QCMLE-A",
        "QCLM-A",
        "QCEM-A",
        "QCLEM-A",
        "QCML-AE",
    }
    assert set(PROMPT_FORMATS) == expected
    assert len(PROMPT_FORMATS) == 23


@pytest.mark.parametrize("prompt", PROMPT_FORMATS)
def test_every_format_against_its_written_out_text(problem, prompt):
    layout, output = prompt.split("-")
    assert question_body(problem(), prompt) == INPUTS[layout]
    assert answer_text(problem(), prompt) == OUTPUTS[output]


def test_another_letter_changes_nothing_else(problem):
    assert answer_text(problem(), "QCM-ALE", 2) == f"The answer is C. BECAUSE: {L} {E}"


@pytest.mark.parametrize(
    ("hint", "caption", "context"),
    [
        ("", "", "N/A"),
        ("A hint.", "", "A hint."),
        ("", "a dog", "a dog"),
        ("A hint.", "a dog", "A hint. a dog"),
        ("line one\nline two", "", "line one\nline two"),
    ],
)
def test_context(problem, hint, caption, context):
    body = question_body(problem(hint=hint), "QCM-A", caption)
    assert body.split("Context: ")[1].split("\nOptions:")[0] == context


def test_empty_lecture_and_solution_leave_a_bare_because(problem):
    empty = problem(lecture="", solution="")
    assert answer_text(empty, "QCM-ALE") == "The answer is B. BECAUSE:"
    assert answer_text(empty, "QCM-LEA") == "The answer is B."
    assert question_body(empty, "QCML-A").endswith("\nBECAUSE:")


def test_double_spaces_collapse_once(problem):
    spaced = problem(question="a  b    c", lecture="", solution="x")
    assert question_body(spaced, "QCM-A").startswith("Question: a b  c\n")
    assert answer_text(spaced, "QCM-ALE") == "The answer is B. BECAUSE: x"


def test_newlines_in_lecture_and_solution_stay(problem):
    text = answer_text(problem(lecture="one\ntwo", solution="three\nfour"), "QCM-ALE")
    assert text == "The answer is B. BECAUSE: one\ntwo three\nfour"


@pytest.mark.parametrize("prompt", ["QCM", "QCM-AEL", "qcm-a", "QCML-LA", ""])
def test_an_unknown_format_is_refused_with_the_accepted_ones(problem, prompt):
    with pytest.raises(ValueError, match="prompt: expected one of CQM-A"):
        question_body(problem(), prompt)
