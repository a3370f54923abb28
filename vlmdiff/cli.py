"""The `vlmdiff` command: arguments to parameters to one function; a heavy import waits for its command."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmdiff import workspace as w
from vlmdiff.errors import InputError

if TYPE_CHECKING:
    from vlmdiff.params import Params

app = typer.Typer(
    help="Visual anomaly detection from photographs to a promoted model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ParamsFile = Annotated[Path, typer.Option("--params", help="The experiment's parameters.", show_default=True)]
BEFORE, STAGES, HANDOVER, USE = "Before a run", "Stages, in order (dvc.yaml runs them)", "Hand-over", "Use"


@app.command(rich_help_panel=BEFORE)
def init(
    data: Annotated[Path, typer.Option(help="The folder with the photographs.", show_default=False)],
    layout: Annotated[str | None, typer.Option(help="How they lie in it, where that is not to be guessed.")] = None,
    preset: Annotated[Path | None, typer.Option(help="Parameters to start from, instead of those here.")] = None,
) -> None:
    """Look at a folder of photographs, write params.yaml for it, put it under DVC. Again, for photographs that came."""
    from rich.console import Console

    from vlmdiff.init import look, table, track, write_params
    from vlmdiff.params import load

    here, there = Path.cwd().resolve(), data.resolve()
    root = there.relative_to(here) if there != here and there.is_relative_to(here) else there
    template = preset or (w.PARAMS if w.PARAMS.is_file() else None)
    if template is None:
        raise InputError(f"{w.PARAMS} does not exist: name a file to start from by --preset")
    found = look(root, load(template).prepare, layout)
    console = Console()
    console.print(table(found))
    for words in (write_params(found, preset), track(root)):
        console.print(words, markup=False, highlight=False)
    console.print("Next: vlmdiff doctor, then make demo", markup=False, highlight=False)


@app.command(rich_help_panel=BEFORE)
def doctor(params: Annotated[Path, typer.Argument(help="The experiment, such as a preset.")] = w.PARAMS) -> None:
    """What the experiment needs and whether it is there: dataset, models, memory, disk, time. Exit status 1 if not."""
    from rich.console import Console

    from vlmdiff.doctor import examine, report
    from vlmdiff.params import load

    checks = examine(load(params))
    Console().print(report(checks))
    if any(check.ok is False for check in checks):
        raise typer.Exit(1)


def stage(name: str):
    """A stage's command: run in the workspace, ended with whoever started it."""

    def register(function):
        @app.command(name, help=function.__doc__, rich_help_panel=STAGES)
        def command(params: ParamsFile = w.PARAMS) -> None:
            from vlmdiff import lifeline
            from vlmdiff.params import load

            lifeline.watch()
            function(load(params))

        return function

    return register


@stage("prepare")
def _prepare(params: "Params") -> None:
    """Images, classes, splits and masks into one manifest."""
    from vlmdiff import stages

    stages.prepare(params.prepare, w.MADE, w.MANIFEST)


@stage("validate")
def _validate(params: "Params") -> None:
    """The data contract: fails with the rule and the files where it is broken."""
    from vlmdiff import stages

    stages.validate(params.validate_, params.prepare, w.MANIFEST, w.DATA_REPORT)


@stage("caption")
def _caption(params: "Params") -> None:
    """A caption for every image, from the store where it holds one."""
    from vlmdiff import stages

    stages.caption(params.caption, params.prepare, w.MANIFEST, w.CAPTION_STORE, w.CAPTIONS, w.CAPTION_REPORT)


@stage("first_stage")
def _first_stage(params: "Params") -> None:
    """The latent space: train the image autoencoder."""
    from vlmdiff import stages

    stages.first_stage(
        params.first_stage, params.prepare, w.MANIFEST, w.TRAINING_STATE, w.FIRST_STAGE, w.FIRST_STAGE_REPORT
    )


@stage("encode")
def _encode(params: "Params") -> None:
    """Latents, text embeddings and hints, computed once."""
    from vlmdiff import stages

    stages.encode(params.encode, params.prepare, w.MANIFEST, w.CAPTIONS, w.FIRST_STAGE, w.ENCODED)


@stage("train")
def _train(params: "Params") -> None:
    """The denoiser; a training that was killed goes on where it was."""
    from vlmdiff import stages

    stages.train(params.train, w.ENCODED, w.FIRST_STAGE, w.TRAINING_STATE, w.PIPELINE, w.TRAIN_REPORT)


@stage("evaluate")
def _evaluate(params: "Params") -> None:
    """Calibrate, reconstruct the test images, judge, report."""
    from vlmdiff import stages

    stages.evaluate(params, w.MANIFEST, w.CAPTIONS, w.PIPELINE, w.DETECTOR, w.EVALUATION)


@app.command(rich_help_panel=HANDOVER)
def register(params: ParamsFile = w.PARAMS) -> None:
    """Log the evaluated model to MLflow and register it; once, however often it is asked."""
    from vlmdiff.params import load
    from vlmdiff.registry.packaging import register

    version = register(load(params))
    print(f"version {version}")


@app.command(rich_help_panel=HANDOVER)
def gate(
    version: Annotated[
        int | None, typer.Argument(help="A registered version, instead of this workspace's model.", show_default=False)
    ] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """What the gate says, with nothing registered or promoted. Exit status 1 where it does not let the model pass."""
    from rich.console import Console

    from vlmdiff.evaluation.gate import verdict_table
    from vlmdiff.params import load
    from vlmdiff.registry.promotion import gate

    verdict = gate(load(params), version)
    Console().print(verdict_table(verdict))
    if not verdict.passed:
        raise typer.Exit(1)


@app.command(rich_help_panel=HANDOVER)
def promote(
    version: Annotated[int, typer.Argument(help="The version to judge; `vlmdiff register` prints it.")],
    override: Annotated[
        str | None, typer.Option(help="Your name, to promote what the gate does not; give --reason too.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why. Name and reason are recorded with the version.")] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Judge a registered version by the gate; where it passes, it becomes champion."""
    from rich.console import Console

    from vlmdiff.evaluation.gate import Override, verdict_table
    from vlmdiff.params import load
    from vlmdiff.registry.promotion import promote

    given = [bool(text and text.strip()) for text in (override, reason)]
    if (override is not None or reason is not None) and not all(given):
        raise InputError("an override takes both a person's name and a reason: --override NAME --reason WHY")
    person = Override(override.strip(), reason.strip()) if all(given) else None
    Console().print(verdict_table(promote(load(params), version, person)))


@app.command(rich_help_panel=USE)
def predict(
    images: Annotated[list[Path], typer.Argument(help="Photographs.")],
    out: Annotated[Path, typer.Option(help="A new folder for predictions.jsonl and heatmaps.")],
    model: Annotated[Path | None, typer.Option(help="A detector's folder, instead of the champion.")] = None,
    class_name: Annotated[
        str | None, typer.Option(help="The photographs' class, for a model that judges by its classes' captions.")
    ] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Judge photographs by the champion: score, verdict and heatmap of each."""
    from rich.console import Console
    from rich.table import Table

    from vlmdiff.detection.detector import Detector
    from vlmdiff.params import load
    from vlmdiff.predict import predict

    loaded = load(params)
    if model is None:
        from vlmdiff.registry.promotion import champion_folder

        model = champion_folder(loaded)
    rows = predict(images, Detector.from_pretrained(model), out, loaded.prepare.max_pixels, class_name)
    table = Table(
        "photograph", "score", "verdict", "regions", caption=f"0.5 is the threshold. Heatmaps: {out}/heatmaps"
    )
    for row in rows:
        verdict = "[bold red]anomalous" if row["is_anomalous"] else "[green]normal"
        table.add_row(row["path"], f"{row['score']:.3f}", verdict, str(len(row["regions"])))
    Console().print(table)


@app.command(rich_help_panel=USE)
def results() -> None:
    """The last evaluation's table and the gate's last verdict."""
    from rich.console import Console

    from vlmdiff.evaluation.gate import Verdict, verdict_table
    from vlmdiff.evaluation.metrics import Results
    from vlmdiff.evaluation.results import results_table

    console = Console()
    console.print(results_table(Results.read(w.METRICS)))
    if w.GATE.exists():
        console.print(verdict_table(Verdict.read(w.GATE)))


def main() -> None:
    """Run the command line; what a user can mend is a sentence on standard error and exit status 1."""
    # The libraries' bars for what takes a second, and their news of the day, would bury what we say.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # GNU's OpenMP threads spin long while they wait, which slows a training many times where the cores do something
    # else as well; so few turns cost nothing where they do not. It has to be said before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":  # accelerate launch -m vlmdiff.cli train
    main()
