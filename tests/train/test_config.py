"""Recipes: defaults, overrides, interpolation, and errors that name the dotted path."""

import pytest
import yaml

from mmadapt.train import RecipeError, check_recipe, dump_recipe, find_recipe, load_recipe, shipped

MINIMAL = """
model: {name: some/model}
method: {type: pill}
out: runs/${method.type}
stages:
  instruct:
    data: [{reader: scienceqa, path: data, split: train}]
    lr: {default: 1.0e-3}
    train: {max_steps: 3}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def problems(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_defaults_and_interpolation(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.out == "runs/pill"
    assert recipe.seed == 0
    assert recipe.method.rank == 32
    assert recipe.stages["instruct"].lr.of("gate") == 1e-3


def test_overrides_reach_mappings_and_list_items(recipe_file):
    recipe = load_recipe(
        recipe_file,
        [
            "method.rank=8",
            "stages.instruct.lr.gate=0.5",
            "stages.instruct.data[0].limit=7",
            "stages.instruct.data[0].wrong_answers={mode: strictly_wrong, rate: 0.1}",
            "stages.instruct.train.bf16=true",
            "eval=null",
            "out=elsewhere/${method.rank}",
        ],
    )
    assert recipe.method.rank == 8
    assert recipe.stages["instruct"].lr.of("gate") == 0.5
    assert recipe.stages["instruct"].lr.of("projector") == 1e-3
    assert recipe.stages["instruct"].data[0].limit == 7
    assert recipe.stages["instruct"].data[0].wrong_answers.mode == "strictly_wrong"
    assert recipe.stages["instruct"].train == {"max_steps": 3, "bf16": True}
    assert recipe.eval is None
    assert recipe.out == "elsewhere/8"


def test_null_leaves_a_stage_out():
    recipe = load_recipe(find_recipe("pill_digits"), ["stages.align=null"])
    assert list(recipe.stages) == ["instruct"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rnk=8", "method.rnk: unknown key; did you mean 'rank'?"),
        ("stages.instruct.lr.defualt=1", "stages.instruct.lr.defualt: unknown key; did you mean"),
        ("stages.instruct.data[0].pth=x", "stages.instruct.data.0.pth: unknown key; did you mean"),
        ("stages.instrct.lr=1", "stages.instrct: unknown stage; did you mean 'instruct'?"),
        ("zzz=1", "zzz: unknown key; known keys: model, method"),
        ("method.rank=0", "method.rank: Input should be greater than or equal to 1 (got 0)"),
        ("method.gate=soft", "method.gate: Input should be 'token', 'static' or 'none'"),
        ("stages.instruct.lr.default=-1", "stages.instruct.lr.default"),
        ("stages.instruct.data=[]", "stages.instruct.data"),
        ("stages.instruct=null", "stages"),
        ("stages.instruct.train.max_step=3", "stages.instruct.train.max_step: not a field of"),
        ("stages.instruct.train.max_step=3", "did you mean 'max_steps'?"),
        ("stages.instruct.train.bf16=often", "stages.instruct.train.bf16:"),
        (
            "stages.instruct.train.save_strategy=rarely",
            "train.save_strategy: Input should",
        ),
        ("stages.instruct.train.learning_rate=1", "stages.instruct.train.learning_rate: cannot be"),
        ("stages.instruct.train.output_dir=x", "stages.instruct.train.output_dir: cannot be set"),
        ("stages.instruct.lr.warmup_epochs=1", "warmup_epochs needs schedule: pill"),
        ("stages.instruct.lr.schedule=pill", "train.num_train_epochs, not max_steps"),
        ("model.make_args={x: 1}", "make_args is set but make is null"),
        ("data.make=digits", "data: make: digits needs root"),
        ("out=${nowhere}", "nowhere"),
        ("seed", "override 'seed': expected key=value"),
        ("stages.instruct.data[3].limit=1", "override 'stages.instruct.data[3].limit=1'"),
    ],
)
def test_errors_name_the_path(recipe_file, override, message):
    assert message in problems(recipe_file, override)


def test_all_problems_come_at_once(recipe_file):
    text = problems(recipe_file, "method.rnk=8", "stages.instruct.train.max_step=3")
    assert "method.rnk" in text
    assert "stages.instruct.train.max_step" in text


def test_reentrant_checkpointing_is_refused(recipe_file):
    text = problems(
        recipe_file,
        "stages.instruct.train.gradient_checkpointing=true",
        "stages.instruct.train.gradient_checkpointing_kwargs={use_reentrant: true}",
    )
    assert "gradient_checkpointing_kwargs: use_reentrant must stay false" in text


def test_missing_and_broken_files(tmp_path):
    assert "no such file" in problems(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    assert "not valid YAML" in problems(broken)
    broken.write_text("- 1")
    assert "expected a mapping" in problems(broken)


def test_stages_run_align_first():
    values = yaml.safe_load(dump_recipe(load_recipe(find_recipe("pill_digits"))))
    values["stages"] = {name: values["stages"][name] for name in ("instruct", "align")}
    with pytest.raises(RecipeError, match="align must stand before instruct"):
        check_recipe(values)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipes_survive_a_round_trip(name, tmp_path):
    recipe = load_recipe(find_recipe(name))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_recipe(recipe))
    assert load_recipe(resolved) == recipe
    assert "${" not in resolved.read_text()


def test_scienceqa_recipe_has_the_papers_settings():
    recipe = load_recipe(find_recipe("pill_scienceqa"))
    align, instruct = recipe.stages["align"], recipe.stages["instruct"]
    assert (align.lr.default, instruct.lr.default) == (1e-3, 2.5e-4)
    assert (align.max_length, instruct.max_length) == (128, 512)
    batch = [
        s.train["per_device_train_batch_size"] * s.train["gradient_accumulation_steps"]
        for s in (align, instruct)
    ]
    assert batch == [256, 32]


def test_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(RecipeError, match="pill_digits"):
        find_recipe("nothing_like_it")
