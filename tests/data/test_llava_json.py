import json

import pytest

from mmadapt.data import DataError, LlavaJson, PillTemplate


def turns(*values):
    return [
        {"from": "gpt" if number % 2 else "human", "value": value}
        for number, value in enumerate(values)
    ]


@pytest.fixture
def write(tmp_path, write_png):
    write_png(tmp_path / "images" / "a.png")
    write_png(tmp_path / "images" / "sub" / "b.png")

    def write(*records):
        file = tmp_path / "chat.json"
        file.write_text(json.dumps(records))
        return file

    return write


@pytest.mark.parametrize(
    ("question", "rendered"),
    [
        ("<image>\nDescribe.", "[INST]<image>P\nDescribe.[/INST]a rose ."),
        ("Describe.\n<image>", "[INST]Describe.\n<image>P[/INST]a rose ."),
    ],
)
def test_caption_records(write, tmp_path, question, rendered):
    file = write(
        {"id": "GCC_train_1", "image": "a.png", "conversations": turns(question, "a rose .")}
    )
    sample = LlavaJson(file)[0]
    assert sample.id == "GCC_train_1"
    assert list(sample.image_paths()) == [str(tmp_path / "images" / "a.png")]
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]
    assert PillTemplate().render(sample.messages, "P") == rendered


def test_several_turns_expand_images_in_the_first_question_only(write):
    file = write(
        {
            "id": 5,
            "image": "sub/b.png",
            "model": "ignored",
            "conversations": turns("What is <image>?", "A rose.", "Is <image> a tag?", "Yes."),
        }
    )
    sample = LlavaJson(file)[0]
    assert sample.id == "5"
    assert (
        PillTemplate().render(sample.messages, "P")
        == "[INST]What is <image>P?[/INST]A rose.[INST]Is <image> a tag?[/INST]Yes."
    )


def test_two_images(write):
    file = write(
        {
            "id": "x",
            "image": ["a.png", "sub/b.png"],
            "conversations": turns("<image>\n<image>\nCompare.", "Equal."),
        }
    )
    sample = LlavaJson(file)[0]
    assert len(list(sample.image_paths())) == 2
    assert PillTemplate().render(sample.messages, "P").startswith("[INST]<image>P\n<image>P\nComp")


def test_text_only_records_keep_the_marker_as_text(write):
    file = write({"id": "x", "conversations": turns("What is <image> in HTML?", "A tag.")})
    sample = LlavaJson(file)[0]
    assert list(sample.image_paths()) == []
    assert sample.messages[0]["content"] == [{"type": "text", "text": "What is <image> in HTML?"}]


def test_leading_and_trailing_turns_without_a_partner_are_dropped(write):
    extra = {"from": "human", "value": "Thanks", "markdown": {"answer": 1}, "text": "?"}
    file = write(
        {"id": "x", "conversations": [{"from": "gpt", "value": "Hi"}, *turns("Q", "A"), extra]},
    )
    messages = LlavaJson(file)[0].messages
    assert [m["content"][0]["text"] for m in messages] == ["Q", "A"]


def test_records_without_a_pair_are_skipped_with_a_warning(write):
    file = write(
        {"id": "a", "conversations": []},
        {"id": "b", "conversations": turns("Q")},
        {"id": "c", "conversations": turns("Q", "A")},
    )
    with pytest.warns(UserWarning, match="left out 2 records .* the first is 'a'"):
        data = LlavaJson(file)
    assert data.skipped == ["a", "b"]
    assert len(data) == 1 and data[0].id == "c"
    with pytest.warns(UserWarning):
        assert len(LlavaJson(file, limit=2)) == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", "record 0: expected an object with an id"),
        ({"conversations": []}, "record 0: expected an object with an id"),
        ({"id": "x"}, "record 'x': conversations: expected a list"),
        ({"id": "x", "conversations": ["hi"]}, "turn 0: expected from and value"),
        ({"id": "x", "conversations": [{"from": "human", "value": 3}]}, "turn 0"),
        (
            {"id": "x", "conversations": [*turns("Q", "A"), *turns("Q", "A")[::-1]]},
            "expected a turn from 'human', got 'gpt'",
        ),
        (
            {"id": "x", "image": "a.png", "conversations": turns("No marker", "A")},
            "1 images, but 0 <image> markers",
        ),
        (
            {"id": "x", "image": "a.png", "conversations": turns("<image><image>", "A")},
            "1 images, but 2 <image> markers",
        ),
    ],
)
def test_bad_records_name_file_and_record(write, record, message):
    with pytest.raises(DataError, match=rf"chat\.json, .*{message}"):
        LlavaJson(write(record))


@pytest.mark.parametrize("image", ["../chat.json", "/elsewhere/a.png", "none.png", 7])
def test_bad_images_name_file_and_record(write, image):
    file = write({"id": "x", "image": image, "conversations": turns("<image>", "A")})
    data = LlavaJson(file)
    with pytest.raises(DataError, match=r"chat\.json, record 'x'"):
        data[0]
    assert len(data.validate()) == 1


def test_images_root_defaults_to_the_files_folder_without_an_images_folder(tmp_path, write_png):
    write_png(tmp_path / "coco" / "a.png")
    file = tmp_path / "mix.json"
    record = {"id": "x", "image": "coco/a.png", "conversations": turns("<image>", "A")}
    file.write_text(json.dumps([record]))
    assert LlavaJson(file).validate() == []
    assert LlavaJson(file, image_root=tmp_path).validate() == []
    assert LlavaJson(file, image_root=tmp_path / "coco").validate() != []


def test_broken_json(tmp_path):
    file = tmp_path / "chat.json"
    file.write_text("[{]")
    with pytest.raises(DataError, match=r"chat\.json: broken JSON"):
        LlavaJson(file)
    file.write_text("{}")
    with pytest.raises(DataError, match="expected a JSON list"):
        LlavaJson(file)
