"""A stage that is run before its time says which is to run first."""

import pytest
import yaml
from typer.testing import CliRunner

from vlmdiff.cli import app

SECTIONS = ("validate", "caption", "first_stage", "encode", "train", "evaluate", "gate")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, run):
    """A workspace in which the first stages ran."""
    folder = tmp_path_factory.mktemp("workspace")
    demo = {"train": 2, "test_good": 1, "test_per_defect": 1, "size": 64}
    params = {"prepare": {"layout": "demo", "demo": demo}, **{section: {} for section in SECTIONS}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in ("prepare", "caption"):
        assert run(stage, folder).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def run():
    def run(stage, folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return CliRunner().invoke(app, [stage])

    return run


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("encode", "models/first_stage holds no first stage: run the first_stage stage first"),
        ("train", "data/encoded does not exist: run the stages before this one first"),
        ("evaluate", "models/vlmdiff holds no pipeline: run the train stage first"),
    ],
)
def test_a_stage_before_its_time_says_what_to_run_first(captioned, run, stage, said) -> None:
    done = run(stage, captioned)
    assert done.exit_code != 0
    assert said in str(done.exception)


def test_nothing_is_captioned_before_there_is_a_manifest(tmp_path, captioned, run) -> None:
    (tmp_path / "params.yaml").write_text((captioned / "params.yaml").read_text())
    assert "run the prepare stage first" in str(run("caption", tmp_path).exception)
