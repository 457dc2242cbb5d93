import json

import pytest

from mmadapt.data import DataError, ScienceQA

BODY = (
    "Question: Which is red?\nContext: Look at the picture.\n"
    "Options: (A) the sky (B) a rose (C) grass"
)
ANSWER = "The answer is B. BECAUSE: Things have colours. Roses are red."


def text(value):
    return {"type": "text", "text": value}


def test_messages_of_a_text_problem(problem, write_scienceqa):
    data = ScienceQA(write_scienceqa({"7": problem()}), system="Be brief.")
    assert len(data) == 1
    sample = data[0]
    assert sample.id == "7"
    assert sample.record == problem()
    assert sample.messages == [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [text("Image:N/A"), text(f".\n{BODY}")]},
        {"role": "assistant", "content": [text(ANSWER)]},
    ]
    assert list(sample.image_paths()) == []


@pytest.mark.parametrize("prefix", ["", "images/"])
def test_messages_of_a_problem_with_two_images(problem, write_scienceqa, write_png, prefix):
    names = ["image.png", "image_2.png"]
    root = write_scienceqa({"7": problem(image="image.png", images=names, split="val")})
    paths = [str(write_png(root / f"{prefix}val/7/{name}")) for name in names]
    sample = ScienceQA(root, "val", "QCM-A", system="")[0]
    images = [{"type": "image", "path": path} for path in paths]
    assert sample.messages == [
        {"role": "user", "content": [text("Image:"), *images, text(f".\n{BODY}")]},
        {"role": "assistant", "content": [text("The answer is B.")]},
    ]
    assert list(sample.image_paths()) == paths


def test_splits_and_limit(problem, write_scienceqa):
    root = write_scienceqa(
        {"1": problem(), "2": problem(), "3": problem(split="val"), "4": problem(split="test")}
    )
    ids = {
        split: ScienceQA(root, split).ids
        for split in ("train", "val", "test", "trainval", "minitrain")
    }
    assert ids == {
        "train": ["1", "2"],
        "val": ["3"],
        "test": ["4"],
        "trainval": ["1", "2", "3"],
        "minitrain": ["1"],
    }
    assert ScienceQA(root, "trainval", limit=2).ids == ["1", "2"]
    with pytest.raises(DataError, match=r"pid_splits\.json: no split 'dev'; it has \['minitrain'"):
        ScienceQA(root, "dev")
    with pytest.raises(IndexError):
        ScienceQA(root)[2]
    assert ScienceQA(root)[-1].id == "2"


def test_captions_enter_the_context_only_on_request(problem, write_scienceqa):
    root = write_scienceqa({"1": problem(), "2": problem()})
    with pytest.raises(DataError, match=r"captions\.json: cannot be read"):
        ScienceQA(root, use_caption=True)
    (root / "captions.json").write_text(json.dumps({"captions": {"1": "a red rose"}}))

    def context(data, index):
        return data[index].messages[1]["content"][-1]["text"].split("\n")[2]

    with_captions = ScienceQA(root, use_caption=True)
    assert context(with_captions, 0) == "Context: Look at the picture. a red rose"
    assert context(with_captions, 1) == "Context: Look at the picture."
    assert context(ScienceQA(root), 0) == "Context: Look at the picture."
    (root / "captions.json").write_text("{}")
    with pytest.raises(DataError, match="'captions'"):
        ScienceQA(root, use_caption=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": 3}, r"answer: expected a choice index 0\.\.2, got 3"),
        ({"answer": -1}, "answer"),
        ({"answer": True}, "answer"),
        ({"answer": "1"}, "answer"),
        ({"choices": ["one"]}, "choices: expected 2 to 5 strings"),
        ({"choices": list("abcdef")}, "choices"),
        ({"choices": [1, 2]}, "choices"),
        ({"choices": "ab"}, "choices"),
        ({"question": None}, "question: expected a string, got None"),
        ({"hint": 3}, "hint: expected a string"),
        ({"image": "image.png", "images": ["image_2.png"]}, "images: expected a list that starts"),
        ({"images": ["image.png"]}, "images"),
    ],
)
def test_bad_fields_name_file_and_record(problem, write_scienceqa, fields, message):
    root = write_scienceqa({"1": problem(), "23": problem(**fields)})
    with pytest.raises(DataError, match=rf"problems\.json, record '23': {message}"):
        ScienceQA(root)


def test_a_missing_record_is_named(problem, write_scienceqa):
    root = write_scienceqa({"1": problem()})
    (root / "pid_splits.json").write_text('{"train": ["1", "99"]}')
    with pytest.raises(DataError, match=r"record '99': named in pid_splits\.json, no such problem"):
        ScienceQA(root)


@pytest.mark.parametrize("ids", ["12", [1, 2], None])
def test_a_split_must_be_a_list_of_ids(problem, write_scienceqa, ids):
    root = write_scienceqa({"1": problem()})
    (root / "pid_splits.json").write_text(json.dumps({"train": ids}))
    with pytest.raises(DataError, match=r"pid_splits\.json: split 'train' is not a list"):
        ScienceQA(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"1": ', r"problems\.json: broken JSON .*line 1"),
        (b"\xff\xfe", r"problems\.json: broken JSON"),
        ("[]", "expected a JSON dict at the top level, got list"),
        (None, r"problems\.json: cannot be read \(No such file"),
    ],
)
def test_broken_json(problem, write_scienceqa, content, message):
    root = write_scienceqa({"1": problem()})
    file = root / "problems.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        ScienceQA(root)


@pytest.mark.parametrize("image", ["../../secret.png", "/etc/secret.png", "a/../../../b.png"])
def test_image_paths_that_leave_the_folder(problem, write_scienceqa, write_png, image):
    root = write_scienceqa({"5": problem(image=image)})
    write_png(root / "train/5/image.png")
    write_png(root.parent / "secret.png")
    with pytest.raises(DataError, match=r"problems\.json, record '5': .*(leaves|missing)"):
        ScienceQA(root)[0]


def test_a_link_out_of_the_folder_is_refused_unless_allowed(problem, write_scienceqa, write_png):
    root = write_scienceqa({"5": problem(image="image.png")})
    outside = write_png(root.parent / "outside" / "5" / "image.png")
    (root / "train").symlink_to(outside.parent.parent)
    with pytest.raises(DataError, match=r"record '5': .*through a symbolic link"):
        ScienceQA(root)[0]
    assert len(list(ScienceQA(root, allow_links=True)[0].image_paths())) == 1


def test_validate_lists_every_bad_image(problem, write_scienceqa, write_png):
    root = write_scienceqa({str(i): problem(image="image.png") for i in range(4)})
    write_png(root / "train/0/image.png")
    truncated = write_png(root / "train/2/image.png")
    truncated.write_bytes(truncated.read_bytes()[:40])
    (root / "train/3").mkdir()
    (root / "train/3/image.png").write_text("no image at all")
    problems = ScienceQA(root).validate()
    assert len(problems) == 3
    assert "record '1'" in problems[0] and "missing" in problems[0]
    assert "train/2/image.png, record '2': image is corrupt" in problems[1]
    assert "train/3/image.png, record '3': image is corrupt" in problems[2]


@pytest.mark.parametrize("image", [3, "", "a\0b", ["image.png"]])
def test_image_names_that_are_no_names(problem, write_scienceqa, image):
    root = write_scienceqa({"5": problem(image=image)})
    with pytest.raises(DataError, match="record '5'"):
        ScienceQA(root)[0]
