"""A version where it is handed over: in an environment of nothing but what it says that it needs."""

import subprocess
import sys

import mlflow
import numpy as np
import pytest

from tests.pipeline.test_handover import champion, photograph  # noqa: F401
from vlmdiff.registry.packaging import requirements

PREDICT = """\
import sys
import mlflow, pandas as pd

model = mlflow.pyfunc.load_model(sys.argv[1])
data = [open(file, "rb").read() for file in sys.argv[2:]]
print(*model.predict(pd.DataFrame({"image": data}))["score"])
"""


def test_the_requirements_are_what_the_served_code_imports_at_the_installed_versions():
    names = {line.partition("==")[0].lower() for line in requirements()}
    assert {"mlflow", "torch", "diffusers", "transformers", "accelerate", "psutil", "pydantic"} <= names
    assert not names & {"prefect", "dvc", "great-expectations", "typer", "vlmdiff"}
    assert all("==" in line and "+" not in line for line in requirements())


@pytest.mark.services
def test_a_version_judges_in_an_environment_of_nothing_but_its_requirements(champion, tmp_path):  # noqa: F811
    mlflow.set_tracking_uri(champion.store["MLFLOW_TRACKING_URI"])
    model = mlflow.artifacts.download_artifacts("models:/vlmdiff@champion", dst_path=str(tmp_path / "model"))
    python = tmp_path / "env/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--requirement", f"{model}/requirements.txt"]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [str(file) for file in champion.files[:4]]
    command = [str(python), "-I", "-c", PREDICT, model, *files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    local = champion.detector.detect([photograph(file) for file in champion.files[:4]])
    served = np.array(done.stdout.split()[-4:], float)
    assert served == pytest.approx([each.score for each in local], abs=1e-5)
