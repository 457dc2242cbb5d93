"""The ablation grid: every variation is a valid recipe that differs where it says."""

import pytest

from mmadapt.train import Console, RecipeError, RunError, find_recipe, load_recipe, train
from mmadapt.train.crome.ablations import COLUMNS, VARIATIONS, run_crome_ablations, vary
from mmadapt.train.pipeline import RunOutcome


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(find_recipe("crome_digits"))


@pytest.mark.parametrize("name", VARIATIONS)
def test_variations(recipe, name):
    varied = vary(recipe, name, seed=3)
    assert varied.seed == 3 and varied.out.startswith(f"{recipe.out}/ablations/")
    assert varied.model == recipe.model and varied.data == recipe.data
    assert varied.eval.data.path.endswith("_turned") and varied.eval.data.split == "test"
    changed = {
        key
        for key, value in varied.method.model_dump().items()
        if value != recipe.method.model_dump()[key]
    }
    expected = {path.split(".")[1] for path in VARIATIONS[name] if path.startswith("method.")}
    assert changed == expected
    assert ("task" in varied.stages) == (name != "no adapter")


def test_the_grid_is_complete(recipe):
    ranks = {vary(recipe, name, seed=0).method.rank for name in ("rank halved", "rank doubled")}
    assert ranks == {8, 32}
    folders = {vary(recipe, name, seed=0).out for name in VARIATIONS}
    assert len(folders) == len(VARIATIONS)


def test_refusals(recipe):
    quiet = Console(quiet=True)
    with pytest.raises(RunError, match="base run that was evaluated"):
        run_crome_ablations(recipe, RunOutcome("x"), console=quiet)
    several = recipe.model_copy(deep=True)
    several.launch.nproc = 2
    with pytest.raises(RecipeError, match=r"launch\.nproc"):
        run_crome_ablations(several, RunOutcome("x"), console=quiet)
    free = recipe.model_copy(deep=True)
    free.method.rank = None
    with pytest.raises(RecipeError, match=r"method\.rank: the ablation 'rank halved'"):
        vary(free, "rank halved", seed=0)


@pytest.mark.slow
def test_rows_are_merged_into_the_report(crome_recipe):
    quiet = Console(quiet=True)
    recipe = crome_recipe()
    outcome = run_crome_ablations(
        recipe,
        train(recipe, console=quiet),
        names=["CROME", "no adapter", "projections in place of the adapter"],
        seeds=[1],
        console=quiet,
    )
    ablation = outcome.results.ablation
    assert [row.name for row in ablation.rows][1] == "no adapter"
    assert ablation.columns == list(COLUMNS) and outcome.report.exists()
