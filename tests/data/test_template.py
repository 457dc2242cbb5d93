from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmadapt.data.sample import image_part, text_part
from mmadapt.data.template import ImageSlot, PillTemplate, Turn


def message(role, *parts):
    return {"role": role, "content": list(parts)}


def test_scienceqa_text_is_pills():
    messages = [
        message("system", text_part("Help.")),
        message("user", text_part("Image:"), image_part("a.png"), text_part(".\nQuestion: Why?")),
        message("assistant", text_part("The answer is A.")),
    ]
    assert PillTemplate().render(messages, "##") == (
        "[INST]<<SYS>>\nHelp.\n<</SYS>>\n\nImage:<image>##.\nQuestion: Why?[/INST]The answer is A."
    )
    assert PillTemplate(image_text="").turns(messages) == [
        Turn(
            (
                "[INST]<<SYS>>\nHelp.\n<</SYS>>\n\nImage:",
                ImageSlot("a.png"),
                ".\nQuestion: Why?[/INST]",
            ),
            "The answer is A.",
        )
    ]


def test_no_system_text_and_an_open_question():
    turns = PillTemplate().turns([message("user", text_part("Hi"))])
    assert turns == [Turn(("[INST]Hi[/INST]",), None)]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "at least one user message"),
        ([message("system", text_part("x"))], "at least one user message"),
        ([message("assistant", text_part("x"))], "expected role 'user' at position 0"),
        ([message("user", text_part("x"))] * 2, "expected role 'assistant' at position 1"),
        (
            [message("user", text_part("x")), message("assistant", image_part("a.png"))],
            "expected a text part, got type 'image'",
        ),
        ([message("user", {"type": "video"})], "expected a text part, got type 'video'"),
    ],
)
def test_conversations_that_do_not_fit(messages, error):
    with pytest.raises(ValueError, match=error):
        PillTemplate().turns(messages)


PARTS = st.lists(
    st.one_of(st.text("ab \n", max_size=4).map(text_part), st.sampled_from("xyz").map(image_part)),
    max_size=6,
)


@given(st.lists(st.tuples(PARTS, st.text("cd ", max_size=4)), min_size=1, max_size=4))
def test_nothing_is_lost_and_texts_never_touch(pairs):
    messages = []
    for parts, answer in pairs:
        messages += [message("user", *parts), message("assistant", text_part(answer))]
    turns = PillTemplate(image_text="@").turns(messages)
    for (parts, answer), turn in zip(pairs, turns, strict=True):
        inner = "".join(f"@{p['path']}" if p["type"] == "image" else p["text"] for p in parts)
        text = "".join(p.path if isinstance(p, ImageSlot) else p for p in turn.prompt)
        assert text == f"[INST]{inner}[/INST]"
        assert turn.answer == answer
        kinds = [isinstance(part, str) for part in turn.prompt]
        assert not any(a and b for a, b in pairwise(kinds))
