"""The `vlmdiff` command. Each command loads the parameters and calls one function; heavy imports are inside it."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vlmdiff import __version__
from vlmdiff.core import workspace as w
from vlmdiff.core.console import say
from vlmdiff.core.errors import InputError, machine_fault
from vlmdiff.core.network import ask_loopback_directly
from vlmdiff.core.text import counted, plain

app = typer.Typer(
    help=(
        "Visual anomaly detection, from images to a promoted model. "
        "Exit status: 1 if the answer is no, 2 if an input or the workspace is wrong."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlmdiff {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options of all commands; `app` has the help text."""


ParamsFile = Annotated[Path, typer.Option("--params", help="Parameters of the experiment.", show_default=True)]
BEFORE, STAGES, HANDOVER, USE = "Before a run", "Stages, in order (dvc.yaml runs them)", "Hand-over", "Use"


class Copies(StrEnum):
    """Which copy of an image in two splits stays."""

    KEEP_TRAIN = "keep_train"
    KEEP_TEST = "keep_test"


@app.command(rich_help_panel=BEFORE)
def init(
    data: Annotated[Path, typer.Option(help="Folder with the images.", show_default=False)],
    layout: Annotated[str | None, typer.Option(help="Layout of the folder; detected if omitted.")] = None,
    preset: Annotated[Path | None, typer.Option(help="Parameters to start from; params.yaml if omitted.")] = None,
    copies: Annotated[
        Copies | None, typer.Option(help="Of an image that is in two splits, the copy to keep.", show_default=False)
    ] = None,
) -> None:
    """Write params.yaml for a folder of images and put it under DVC. Run it again after adding images."""
    from rich.console import Console

    from vlmdiff.core.params import load
    from vlmdiff.setup.init import look, table, track, write_params

    here, there = Path.cwd().resolve(), data.resolve()
    root = there.relative_to(here) if there != here and there.is_relative_to(here) else there
    template = preset or (w.PARAMS if w.PARAMS.is_file() else None)
    if template is None:
        raise InputError(f"{w.PARAMS} does not exist: pass a file to start from by --preset")
    chosen = load(template).prepare
    if copies is not None:
        chosen = chosen.model_copy(update={"copies": copies.value})
    found = look(root, chosen, layout)
    console = Console()
    console.print(table(found))
    for words in (write_params(found, preset), track(root)):
        console.print(plain(words), markup=False, highlight=False)
    console.print("next: vlmdiff doctor, then make demo", markup=False, highlight=False)


@app.command(rich_help_panel=BEFORE)
def doctor(
    params: Annotated[Path, typer.Argument(help="Parameters, such as a preset.")] = w.PARAMS,
    measure: Annotated[bool, typer.Option(help="Run a few steps of each training, and judge a few images.")] = True,
) -> None:
    """Check dataset, models, memory, disk and time for a run. Exits with status 1 if something is missing."""
    from rich.console import Console

    from vlmdiff.core.params import load
    from vlmdiff.setup.doctor import examine, report

    rows = examine(load(params), measure)
    Console().print(report(rows))
    if any(row.ok is False for row in rows):
        raise typer.Exit(1)


HELP = {
    "prepare": "List images, classes, splits and masks in the manifest.",
    "validate": "Check the data contract; fail with the broken rule and its files.",
    "caption": "Caption every image; captions in the store are reused.",
    "first_stage": "Train the latent space.",
    "encode": "Compute latents, text embeddings and hints once.",
    "train": "Train the denoiser; an interrupted training continues.",
    "evaluate": "Calibrate, judge the test images, write metrics and report.",
}


def _add_stage(name: str) -> None:
    """Register the command of a stage. It runs in the workspace and ends with the process that started it."""

    @app.command(name, help=HELP[name], rich_help_panel=STAGES)
    def command(params: ParamsFile = w.PARAMS) -> None:
        from vlmdiff import stages
        from vlmdiff.core import lifeline
        from vlmdiff.core.params import load

        lifeline.watch()
        stages.run(name, load(params))


for name in HELP:
    _add_stage(name)


@app.command(rich_help_panel=HANDOVER)
def register(params: ParamsFile = w.PARAMS) -> None:
    """Log the evaluated model to MLflow and register it. Running it again changes nothing."""
    from vlmdiff.core.params import load
    from vlmdiff.registry.packaging import register

    version = register(load(params))
    print(f"version {version}")


@app.command(rich_help_panel=HANDOVER)
def gate(
    version: Annotated[
        int | None, typer.Argument(help="Registered version; this workspace's model if omitted.", show_default=False)
    ] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Show the gate's verdict; change nothing in the registry. Exits with status 1 if the model does not pass."""
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
    version: Annotated[int, typer.Argument(help="Version to judge, as `vlmdiff register` prints it.")],
    override: Annotated[
        str | None, typer.Option(help="Your name: promote even if the gate fails. Needs --reason.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Reason for the override. It is recorded.")] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Judge a registered version by the gate and make it champion if it passes. Exits with status 1 if it does not."""
    by, why = ((text or "").strip() for text in (override, reason))
    if (override is not None or reason is not None) and not (by and why):
        raise InputError("an override takes both a person's name and a reason: --override NAME --reason WHY")
    from rich.console import Console

    from vlmdiff.core.params import load
    from vlmdiff.evaluation.verdict import Override, verdict_table
    from vlmdiff.registry.promotion import promote

    person = Override(by, why) if by and why else None
    verdict = promote(load(params), version, person)
    Console().print(verdict_table(verdict))
    if not verdict.is_champion:
        raise typer.Exit(1)


@app.command(rich_help_panel=HANDOVER)
def rollback(
    reason: Annotated[str, typer.Option(help="Reason. It is recorded with both versions.", show_default=False)],
    by: Annotated[str | None, typer.Option(help="Your name; your login name if omitted.")] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Make the previous champion the champion again. The other version then needs an override to pass the gate."""
    from vlmdiff.core.params import load
    from vlmdiff.registry.promotion import rollback

    if not reason.strip() or (by is not None and not by.strip()):
        raise InputError("a rollback takes a reason, and a name where --by is given: --reason WHY --by NAME")
    person = _person(by)
    was, now = rollback(load(params), person, reason.strip())
    say(f"version {now} is champion again, version {was} was rolled back by {person}: {reason.strip()}")


def _person(by: str | None) -> str:
    """Return the name of the person who runs the command. Raises InputError if it has none."""
    from vlmdiff.core.processes import login_name

    person = (login_name() if by is None else by).strip()
    if not person:
        raise InputError("your login has no name here: say who you are by --by NAME")
    return person


@app.command(rich_help_panel=USE)
def score(
    sources: Annotated[list[str], typer.Argument(help="Images, folders, patterns, or tables with a column `path`.")],
    out: Annotated[
        Path, typer.Option(help="Folder of the Parquet dataset, one row per image. Existing rows are kept.")
    ],
    heatmaps: Annotated[bool, typer.Option("--heatmaps", help="Write a PNG per new alarm to OUT/_heatmaps.")] = False,
    model: Annotated[Path | None, typer.Option(help="Folder of a detector; the champion if omitted.")] = None,
    class_name: Annotated[str | None, typer.Option(help="Product of the images; recognised if omitted.")] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Judge new and changed images with the champion. Exits with status 1 if no image can be judged."""
    from rich.console import Console

    from vlmdiff.core import lifeline
    from vlmdiff.core.params import load
    from vlmdiff.production.score import score, scores_table

    lifeline.watch()
    scored = score(sources, out, load(params), model, class_name, heatmaps)
    if scored is None:  # only the main process prints
        return
    if scored.rows:
        Console().print(scores_table(scored))
    for error in scored.errors:
        say(f"skipped: {error}")
    if scored.unreadable > len(scored.errors):
        print(f"skipped: {scored.unreadable - len(scored.errors)} more; the column `error` says why")
    print(scored)
    if not scored.judged:
        raise typer.Exit(1)


@app.command(rich_help_panel=USE)
def monitor(
    scores: Annotated[Path, typer.Argument(help="Folder that `vlmdiff score` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for monitor.json and monitor.html.")] = w.MONITOR,
    model: Annotated[Path | None, typer.Option(help="Folder of a detector; the champion if omitted.")] = None,
    last: Annotated[
        int | None, typer.Option(min=1, help="Number of newest images to check; `monitor.last` if omitted.")
    ] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Check whether new images have drifted from the calibration images."""
    from rich.console import Console

    from vlmdiff.core.params import load
    from vlmdiff.production.monitor import check_table, class_table, monitor

    found = monitor(scores, out, load(params), model, last)
    console = Console()
    console.print(check_table(found))
    if found.classes:
        console.print(class_table(found))
    print(f"{out / 'monitor.html'} shows it")


class Truth(StrEnum):
    """A person's verdict on an image."""

    NORMAL = "normal"
    ANOMALOUS = "anomalous"


@app.command(rich_help_panel=USE)
def feedback(
    truth: Annotated[Truth, typer.Argument(help="Your verdict on the images.")],
    photographs: Annotated[list[Path], typer.Argument(help="Image files.")],
    class_name: Annotated[str, typer.Option(help="Class of the images, as in the dataset.")],
    defect: Annotated[
        str | None, typer.Option(help="Kind of defect, for anomalous images; `anomaly` if omitted.", show_default=False)
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Mask of the defect (nonzero pixels), for one anomalous image.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Your name; your login name if omitted.", show_default=False)] = None,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Add images to the dataset: normal images for training, anomalous images for the test."""
    from vlmdiff.core.params import load
    from vlmdiff.data.feedback import Statement, give_feedback

    if truth is Truth.NORMAL and defect is not None:
        raise InputError("a normal photograph has no defect: leave --defect out")
    loaded = load(params)
    kind = None if truth is Truth.NORMAL else defect or "anomaly"
    added = give_feedback(photographs, Statement(class_name, kind, _person(by)), loaded, w.FEEDBACK, mask)
    for file in added:
        say(str(file))
    print(f"feedback: {len(added)} added, {len(photographs) - len(added)} in the dataset already; log: {w.FEEDBACK}")
    root = loaded.prepare.root
    tracked = root.with_name(f"{root.name}.dvc")
    first = f"`dvc add {root}`, then " if tracked.exists() else ""
    print(f"next: {first}`make demo` (the flow `retrain`), or `dvc repro`")


@app.command(rich_help_panel=USE)
def suspects(
    model: Annotated[Path, typer.Option(help="Folder of a detector of this dataset.")] = w.DETECTOR,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Rank the normal training images by how unlike the others they are: defects that slipped in."""
    from rich.console import Console

    from vlmdiff.core.params import load
    from vlmdiff.production.suspects import suspects, suspects_table

    loaded = load(params)
    rows = suspects(loaded, model, w.SUSPECTS)
    Console().print(suspects_table(rows, loaded.prepare.image_root))
    print("next: `vlmdiff inspect` shows them, in the list `suspects`; `vlmdiff exclude` leaves one out")


@app.command(rich_help_panel=USE)
def exclude(
    images: Annotated[list[str], typer.Argument(help="Images of the dataset: paths relative to its folder.")],
    reason: Annotated[str, typer.Option(help="Why. It is recorded.", show_default=False)],
    by: Annotated[str | None, typer.Option(help="Your name; your login name if omitted.", show_default=False)] = None,
    back: Annotated[bool, typer.Option("--back", help="Take the images in again.")] = False,
    params: ParamsFile = w.PARAMS,
) -> None:
    """Leave images out of the dataset, from the next `prepare` on. Their files stay where they are."""
    from vlmdiff.core.files import sha256
    from vlmdiff.core.params import load
    from vlmdiff.data.excluded import FILE, decide
    from vlmdiff.data.images import resolve

    data = load(params).prepare
    files = [(resolve(data.image_root, image), image) for image in images]
    for file, image in files:
        if not file.is_file():
            raise InputError(f"{image} is not an image in {data.image_root}. Give its path relative to that folder")
    decide([(sha256(file), image) for file, image in files], not back, reason, _person(by), data.root)
    done = "taken in again" if back else "left out"
    print(f"exclude: {counted(len(files), 'image')} {done}; log: {data.root / FILE}")


@app.command("inspect", rich_help_panel=USE)
def inspect_(
    scores: Annotated[Path, typer.Argument(help="Folder that `vlmdiff score` wrote.")] = w.SCORES,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a detector to judge images that you bring; the champion if omitted.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8501,
    address: Annotated[
        str, typer.Option(help="Address to listen on. The default is reachable from this machine only.")
    ] = "127.0.0.1",
    params: ParamsFile = w.PARAMS,
) -> None:
    """Open a page to work through what `score` found, judge single images, and record your feedback."""
    from vlmdiff.core.params import load
    from vlmdiff.production.inspector import serve

    serve(load(params), scores, model, address, port)


@app.command(rich_help_panel=USE)
def results() -> None:
    """Show the metrics of the last evaluation and the gate's last verdict."""
    from rich.console import Console

    from vlmdiff.evaluation.evidence import Evidence
    from vlmdiff.evaluation.results import decision_table, results_table
    from vlmdiff.evaluation.verdict import Verdict, verdict_table

    console = Console()
    evidence = Evidence.read(w.EVALUATION)
    console.print(results_table(evidence.results))
    console.print(decision_table(evidence.decisions))
    if w.GATE.exists():
        console.print(verdict_table(Verdict.read(w.GATE)))


def main() -> None:
    """Run the command line. A user error prints one sentence to stderr and exits with status 2."""
    # Progress bars and news of the libraries would hide the messages of this package.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # GNU's OpenMP threads spin while they wait. Beside another process that slows a training many times. Set before
    # torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    ask_loopback_directly()
    try:
        app()
    except InputError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if (lack := machine_fault(error)) is None:
            raise
        print(f"error: {plain(lack)}. Nothing half-written is left; run again once it is fixed.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":  # accelerate launch -m vlmdiff.cli train
    main()
