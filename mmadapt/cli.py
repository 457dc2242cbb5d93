"""The command line. Heavy imports stand inside the commands: `mmadapt --help` stays fast."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmadapt.train import Console, Recipe, RunOutcome

app = typer.Typer(
    help="Adapt frozen multimodal models: train, evaluate and compare adapter methods.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipeArgument = Annotated[str, typer.Argument(help="A YAML file or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, e.g. stages.align.lr.default=1e-3"),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub id or folder of the frozen model to use instead.")
]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if debug:
        os.environ["MMADAPT_DEBUG"] = "1"


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    model: ModelOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and command, run nothing.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop finished stages whose settings differ.")
    ] = False,
) -> None:
    """Train a recipe's stages, evaluate, write the report. Resumes a killed run."""
    from mmadapt.train import dump_recipe
    from mmadapt.train.launch import is_launched, launch_command, shown

    loaded = _load(recipe, overrides, model)
    several = loaded.launch.nproc > 1 and not is_launched()
    arguments = _own_arguments()
    if dry_run:
        typer.echo(dump_recipe(loaded), nl=False)
        arguments = [argument for argument in arguments if argument != "--dry-run"]
        here = [sys.executable, "-m", "mmadapt", *arguments]
        typer.echo(f"# {shown(launch_command(loaded.launch, arguments) if several else here)}")
        return
    _run(loaded, restart=restart)


@app.command(name="eval")
def evaluate(
    run: Annotated[str, typer.Argument(help="A run directory, or the recipe it came from.")],
    overrides: Overrides = None,
) -> None:
    """Evaluate a finished run again and rewrite its report."""
    from mmadapt.train import evaluate as evaluate_run
    from mmadapt.train import find_recipe, load_recipe

    folder, changes = Path(run), overrides or []
    if not folder.is_dir():
        folder = Path(load_recipe(find_recipe(run), changes).out)
    _show(evaluate_run(folder, overrides=changes))


@app.command()
def validate(
    recipe: RecipeArgument, overrides: Overrides = None, model: ModelOption = None
) -> None:
    """Check a recipe, its model and its data without loading weights."""
    from mmadapt.train import Console
    from mmadapt.train import validate as check

    problems = check(_load(recipe, overrides, model), Console())
    for problem in problems:
        typer.echo(f"problem: {problem}", err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo("ok")


@app.command()
def ls() -> None:
    """List the methods and the recipes that come with the package."""
    from mmadapt.train.recipes import shipped

    typer.echo("methods\n  pill    modality experts and a value gate in a frozen language model")
    typer.echo(
        "  aurora  low-rank updates of all weights that share their factors; beside it: full, lora"
    )
    typer.echo("  crome   a gated cross-modal adapter in front of a frozen language model")
    typer.echo("recipes")
    for name, headline in shipped().items():
        typer.echo(f"  {name}    {headline}")


@app.command()
def cp(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a shipped recipe, to be edited."""
    from mmadapt.train.errors import RecipeError
    from mmadapt.train.recipes import find_recipe

    if out.exists() and not force:
        raise RecipeError(f"{out}: exists already; pass --force to overwrite it")
    source = find_recipe(recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, out)
    typer.echo(str(out))


@app.command()
def env() -> None:
    """Print versions and what the kernels found on this machine."""
    import mmadapt
    from mmadapt.train.versions import versions

    for name, version in versions().items():
        typer.echo(f"{name:16}{version}")
    mmadapt.show_config()


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run directory.")] = None,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Add the ablation rows, three seeds each.")
    ] = False,
) -> None:
    """PILL on real digit scans: backbone, two stages, evaluation, report. Runs offline on a CPU."""
    from mmadapt.train import Console, run_ablations

    changes = list(overrides or [])
    if out is not None:
        changes.append(f"out={json.dumps(str(out))}")  # `--out 2025` is a name
    loaded = _load("pill_digits", changes, None)
    outcome = _run(loaded)
    if ablations:
        _show(run_ablations(loaded, outcome, console=Console()))


@app.command()
def ablate(
    recipe: RecipeArgument = "crome_digits",
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds per row, counted from 0.")] = 1,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A row to run; may be repeated.")
    ] = None,
) -> None:
    """Train a CROME recipe and every variation of its ablation grid; one report with all rows."""
    from mmadapt.train import Console
    from mmadapt.train.crome.ablations import VARIATIONS, run_crome_ablations
    from mmadapt.train.errors import RecipeError

    loaded = _load(recipe, overrides, None)
    if loaded.method.type != "crome":
        raise RecipeError(f"method.type: is {loaded.method.type}; PILL's rows: demo --ablations")
    unknown = sorted(set(only or ()) - set(VARIATIONS))
    if unknown:
        raise RecipeError(f"--only {unknown[0]!r}: expected one of {', '.join(VARIATIONS)}")
    console = Console()
    outcome = _run(loaded)
    names = only or tuple(VARIATIONS)
    _show(
        run_crome_ablations(loaded, outcome, names=names, seeds=range(seeds), console=console),
        console,
    )


def _load(recipe: str, overrides: list[str] | None, model: str | None) -> Recipe:
    from mmadapt.train import find_recipe, load_recipe

    changes = list(overrides or [])
    if model is not None:
        changes += [f"model.name={model}", "model.make=null", "model.make_args={}"]
    return load_recipe(find_recipe(recipe), changes)


def _run(recipe: Recipe, *, restart: bool = False) -> RunOutcome:
    from mmadapt.train import train as train_recipe
    from mmadapt.train.launch import is_launched, relaunch

    if recipe.launch.nproc > 1 and not is_launched():
        relaunch(recipe.launch, _own_arguments())
    outcome = train_recipe(recipe, restart=restart)
    _show(outcome)
    return outcome


def _show(outcome: RunOutcome, console: Console | None = None) -> None:
    from accelerate import PartialState

    from mmadapt.train import Console

    if not PartialState().is_main_process:
        return
    console = console or Console()
    if hasattr(outcome.results, "columns"):
        console.comparison(outcome.results)
    elif outcome.results is not None:
        console.results(outcome.results.rows)
        _show_forgetting(outcome, console)
    typer.echo(f"run directory: {outcome.run_dir}")
    if outcome.report is not None:
        typer.echo(f"report: {outcome.report}")


def _show_forgetting(outcome: RunOutcome, console: Console) -> None:
    forgetting = outcome.results.forgetting
    if forgetting is not None:
        before, after = forgetting.before.accuracy.percent, forgetting.after.accuracy.percent
        console.say(f"text-only accuracy: {before:.2f} % before tuning, {after:.2f} % after")


def _own_arguments() -> list[str]:
    """This command line without the program, as the launched processes get it."""
    return sys.argv[1:]


def main() -> None:
    """Entry point: errors a user can act on are one message on stderr, exit code 2."""
    # PEFT reads a name that transformers has renamed; nothing a user could change
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        app()
    except Exception as error:
        if os.environ.get("MMADAPT_DEBUG") or not _expected(error):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def _expected(error: Exception) -> bool:
    """Whether an error is about the user's input and not about this program."""
    from mmadapt.train.errors import MMAdaptError

    return isinstance(error, MMAdaptError) or type(error).__name__ == "DataError"
