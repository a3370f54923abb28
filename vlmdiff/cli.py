"""The `vlmdiff` command: arguments to parameters to one function. Heavy imports wait for the command that needs them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmdiff import workspace as w
from vlmdiff.errors import InputError
from vlmdiff.params import Params, load

app = typer.Typer(
    help="Visual anomaly detection from photographs to a promoted model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ParamsFile = Annotated[Path, typer.Option("--params", help="The experiment's parameters.", show_default=True)]
STAGES, HANDOVER, USE = "Stages, in order (dvc.yaml runs them)", "Hand-over", "Use"


def stage(name: str):
    """A stage's command: run in the workspace, ended with whoever started it."""

    def register(function):
        @app.command(name, help=function.__doc__, rich_help_panel=STAGES)
        def command(params: ParamsFile = w.PARAMS) -> None:
            from vlmdiff import lifeline

            lifeline.watch()
            function(load(params))

        return function

    return register


@stage("prepare")
def _prepare(params: Params) -> None:
    """Images, classes, splits and masks into one manifest."""
    from vlmdiff import stages

    stages.prepare(params.prepare, w.DEMO, w.MANIFEST)


@stage("validate")
def _validate(params: Params) -> None:
    """The data contract: fails with the rule and the files where it is broken."""
    from vlmdiff import stages

    stages.validate(params.validate_, params.prepare, w.MANIFEST, w.DATA_REPORT)


@stage("caption")
def _caption(params: Params) -> None:
    """A caption for every image, from the store where it holds one."""
    from vlmdiff import stages

    stages.caption(params.caption, params.prepare, w.MANIFEST, w.CAPTION_STORE, w.CAPTIONS, w.CAPTION_REPORT)


@stage("first_stage")
def _first_stage(params: Params) -> None:
    """The latent space: train the image autoencoder."""
    from vlmdiff import stages

    stages.first_stage(
        params.first_stage, params.prepare, w.MANIFEST, w.TRAINING_STATE, w.FIRST_STAGE, w.FIRST_STAGE_REPORT
    )


@stage("encode")
def _encode(params: Params) -> None:
    """Latents, text embeddings and hints, computed once."""
    from vlmdiff import stages

    stages.encode(params.encode, params.prepare, w.MANIFEST, w.CAPTIONS, w.FIRST_STAGE, w.ENCODED)


@stage("train")
def _train(params: Params) -> None:
    """The denoiser; a training that was killed goes on where it was."""
    from vlmdiff import stages

    stages.train(params.train, w.ENCODED, w.FIRST_STAGE, w.TRAINING_STATE, w.PIPELINE, w.TRAIN_REPORT)


@stage("evaluate")
def _evaluate(params: Params) -> None:
    """Calibrate, reconstruct the test images, judge, report."""
    from vlmdiff import stages

    stages.evaluate(
        params.evaluate, params.prepare, w.MANIFEST, w.CAPTIONS, w.PIPELINE, w.DETECTOR, w.EVALUATION
    )


def main() -> None:
    """Run the command line; what a user can mend is a sentence on standard error and exit status 1."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
