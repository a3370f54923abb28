"""The `vlmdiff` command: arguments to parameters to one function; a heavy import waits for its command."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmdiff.core import workspace as w
from vlmdiff.core.errors import InputError

if TYPE_CHECKING:
    from vlmdiff.core.params import Params

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

    from vlmdiff.core.params import load
    from vlmdiff.setup.init import look, table, track, write_params

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
def doctor(
    params: Annotated[Path, typer.Argument(help="The experiment, such as a preset.")] = w.PARAMS,
    measure: Annotated[bool, typer.Option(help="Run a few steps of each training, for about a minute.")] = True,
) -> None:
    """Check dataset, models, memory and disk, and measure the time. Exit status 1 if something is missing."""
    from rich.console import Console

    from vlmdiff.core.params import load
    from vlmdiff.setup.doctor import examine, report

    rows = examine(load(params), measure)
    Console().print(report(rows))
    if any(row.ok is False for row in rows):
        raise typer.Exit(1)


def stage(name: str):
    """A stage's command: run in the workspace, ended with whoever started it."""

    def register(function):
        @app.command(name, help=function.__doc__, rich_help_panel=STAGES)
        def command(params: ParamsFile = w.PARAMS) -> None:
            from vlmdiff.core import lifeline
            from vlmdiff.core.params import load

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
    from vlmdiff.core.params import load
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

    from vlmdiff.core.params import load
    from vlmdiff.evaluation.verdict import verdict_table
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

    from vlmdiff.core.params import load
    from vlmdiff.evaluation.verdict import Override, verdict_table
    from vlmdiff.registry.promotion import promote

    given = [bool(text and text.strip()) for text in (override, reason)]
    if (override is not None or reason is not None) and not all(given):
        raise InputError("an override takes both a person's name and a reason: --override NAME --reason WHY")
    person = Override(override.strip(), reason.strip()) if all(given) else None
    Console().print(verdict_table(promote(load(params), version, person)))


@app.command(rich_help_panel=HANDOVER)
def rollback(
    reason: Annotated[str, typer.Option(help="Why. It is recorded with both versions.", show_default=False)],
    by: Annotated[str | None, typer.Option(help="Your name, instead of that of your login.")] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Put the previous champion back; the gate does not let the other one pass again, but for an override."""
    import getpass

    from vlmdiff.core.params import load
    from vlmdiff.registry.promotion import rollback

    if not reason.strip() or (by is not None and not by.strip()):
        raise InputError("a rollback takes a reason, and a name where --by is given: --reason WHY --by NAME")
    try:
        person = by or getpass.getuser()
    except (KeyError, OSError):
        raise InputError("your login has no name here: say who you are by --by NAME") from None
    was, now = rollback(load(params), person.strip(), reason.strip())
    print(f"version {now} is champion again, version {was} was rolled back by {person.strip()}: {reason.strip()}")


@app.command(rich_help_panel=USE)
def score(
    sources: Annotated[
        list[str], typer.Argument(help="Photographs, folders, patterns, or tables with a column `path`.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of a Parquet dataset, a row an image; what is in it is kept.")],
    heatmaps: Annotated[bool, typer.Option("--heatmaps", help="A PNG of each new alarm, in OUT/_heatmaps.")] = False,
    model: Annotated[Path | None, typer.Option(help="A detector's folder, instead of the champion.")] = None,
    class_name: Annotated[
        str | None, typer.Option(help="The photographs' class, for a model that judges by its classes' captions.")
    ] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Judge photographs by the champion; run again, only new and changed ones. Exit status 1 if none can be judged."""
    from rich.console import Console

    from vlmdiff.core import lifeline
    from vlmdiff.core.params import load
    from vlmdiff.production.score import score, scores_table

    lifeline.watch()
    scored = score(sources, out, load(params), model, class_name, heatmaps)
    if scored is None:  # of several processes the main one speaks
        return
    if scored.rows:
        Console().print(scores_table(scored))
    for error in scored.errors:
        print(f"skipped: {error}")
    if scored.unreadable > len(scored.errors):
        print(f"skipped: {scored.unreadable - len(scored.errors)} more, their rows say why")
    print(scored)
    if not scored.judged:
        raise typer.Exit(1)


@app.command(rich_help_panel=USE)
def monitor(
    scores: Annotated[Path, typer.Argument(help="What `vlmdiff score` wrote.")],
    out: Annotated[Path, typer.Option(help="The folder for monitor.json and monitor.html.")] = w.MONITOR,
    model: Annotated[Path | None, typer.Option(help="A detector's folder, instead of the champion.")] = None,
    last: Annotated[
        int | None, typer.Option(min=1, help="How many of the newest photographs; monitor.last of them where not said.")
    ] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Have new photographs drifted from those that the model was calibrated on?"""
    from rich.console import Console

    from vlmdiff.core.params import load
    from vlmdiff.production.monitor import check_table, monitor

    found = monitor(scores, out, load(params), model, last)
    Console().print(check_table(found))
    print(f"{out / 'monitor.html'} shows it")


class Truth(StrEnum):
    """What a person says of a photograph."""

    NORMAL = "normal"
    ANOMALOUS = "anomalous"


@app.command(rich_help_panel=USE)
def feedback(
    truth: Annotated[Truth, typer.Argument(help="What a person has found them to be.")],
    photographs: Annotated[list[Path], typer.Argument(help="Photographs.")],
    class_name: Annotated[str, typer.Option(help="What they show: a class of the dataset.")],
    defect: Annotated[
        str | None, typer.Option(help="Kind of defect of anomalous ones.  [default: anomaly]", show_default=False)
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Where the defect is, above zero, in one anomalous photograph.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Your name.  [default: the user's]", show_default=False)] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Add photographs to the dataset: normal ones to train on, anomalous ones to test on."""
    import getpass

    from vlmdiff.core.params import load
    from vlmdiff.data.feedback import Statement, give_feedback

    if truth is Truth.NORMAL and defect is not None:
        raise InputError("a normal photograph has no defect: leave --defect out")
    loaded = load(params)
    kind = None if truth is Truth.NORMAL else defect or "anomaly"
    added = give_feedback(photographs, Statement(class_name, kind, by or getpass.getuser()), loaded, w.FEEDBACK, mask)
    for file in added:
        print(file)
    print(f"feedback: {len(added)} added, {len(photographs) - len(added)} in the dataset already; {w.FEEDBACK} has who")
    root = loaded.prepare.root
    tracked = root.with_name(f"{root.name}.dvc")
    first = f"`dvc add {root}`, then " if tracked.exists() else ""
    print(f"next: {first}`make demo` (the flow `retrain`), or `dvc repro`")


@app.command("inspect", rich_help_panel=USE)
def inspect_(
    model: Annotated[Path | None, typer.Option(help="A detector's folder, instead of the champion.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8501,
    address: Annotated[
        str, typer.Option(help="Where it listens; other machines reach it by another one.")
    ] = "127.0.0.1",
    params: ParamsFile = w.PARAMS,
) -> None:
    """A page for the inspector: drop in a photograph, see what the champion says, and say what you think."""
    from vlmdiff.core.params import load

    loaded, called = load(params), str(model)
    if model is None:
        from vlmdiff.registry.promotion import champion

        version, model = champion(loaded)
        called = f"version {version} of {loaded.registry.model_name}, the champion"
    settings = {
        "server.address": address,
        "server.port": port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
    }
    print(f"the inspector's page: http://{address}:{port}", flush=True)
    page = str(Path(__file__).with_name("production") / "inspector.py")
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "streamlit", "run", page, *options, "--", str(model), called]
    # Its process takes this one's place: who ends this command ends the page.
    os.execv(sys.executable, command)


@app.command(rich_help_panel=USE)
def results() -> None:
    """The last evaluation's table and the gate's last verdict."""
    from rich.console import Console

    from vlmdiff.evaluation.metrics import Results
    from vlmdiff.evaluation.results import results_table
    from vlmdiff.evaluation.verdict import Verdict, verdict_table

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
