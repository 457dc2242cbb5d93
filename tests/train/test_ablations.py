"""The ablation rows: recipes that differ in one thing, merged into the base run's report."""

import pytest

from mmadapt.train import RecipeError, RunError, find_recipe, load_recipe, train
from mmadapt.train.ablations import COLUMNS, VARIATIONS, run_ablations, vary
from mmadapt.train.pipeline import RunOutcome
from mmadapt.train.ui import Console

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def base():
    return load_recipe(find_recipe("pill_digits"), ["stages.instruct.lr.gate=0.01"])


@pytest.mark.parametrize("name", VARIATIONS)
def test_data_and_backbone_stay_and_runs_have_their_own_folder(base, name):
    recipe = vary(base, name, seed=2)
    assert (recipe.model, recipe.data, recipe.eval) == (base.model, base.data, base.eval)
    assert recipe.seed == 2
    assert recipe.out.startswith(f"{base.out}/ablations/")
    assert recipe.out.endswith("-seed2")


def test_folders_differ():
    base = load_recipe(find_recipe("pill_digits"))
    folders = {vary(base, name, seed=seed).out for name in VARIATIONS for seed in (0, 1)}
    assert len(folders) == 2 * len(VARIATIONS)


def test_each_variation_changes_its_one_thing(base):
    def varied(name):
        return vary(base, name, seed=0)

    assert varied("PILL").method == base.method
    assert varied("linear adapter").method.adapter == "linear"
    assert varied("one adapter for both modalities").method.experts == "shared"
    assert list(varied("no alignment stage").stages) == ["instruct"]
    wrong = varied("wrong answers, p = 0.1").stages["instruct"].data[0].wrong_answers
    assert (wrong.mode, wrong.rate) == ("uniform_all", 0.1)
    no_gate = varied("no gate")
    assert no_gate.method.gate == "none"
    assert no_gate.stages["instruct"].lr.gate is None  # a rate without a gate would be refused


def test_they_need_an_evaluated_two_stage_run(base):
    with pytest.raises(RunError, match="was evaluated"):
        run_ablations(base, RunOutcome("runs/x"), console=QUIET)


@pytest.mark.slow
def test_rows_are_merged_into_the_report(write_recipe):
    recipe = load_recipe(
        write_recipe(eval={"max_new_tokens": 2}),
        ["stages.align.train.max_steps=1", "stages.instruct.train.max_steps=1"],
    )
    outcome = run_ablations(recipe, train(recipe, console=QUIET), seeds=(0, 1), console=QUIET)
    ablation = outcome.results.ablation
    assert [row.name for row in ablation.rows] == list(VARIATIONS)
    assert all(len(row.values[c]) == 2 for row in ablation.rows for c in COLUMNS)
    assert "linear adapter" in outcome.report.read_text()
    with pytest.raises(RecipeError, match="the stages align and instruct"):
        single = load_recipe(write_recipe("single"), ["stages.align=null"])
        run_ablations(single, outcome, console=QUIET)
