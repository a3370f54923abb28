"""The served model in MLflow's own server, without a process of its own: every wrong request gets a sentence."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from mlflow.models import ModelSignature
from PIL import Image

from tests.tiny import SIZE, tiny_detector
from vlmdiff.core.params import Params
from vlmdiff.detection.normals import Normal
from vlmdiff.registry import packaging, served


def png(seed: int = 0, side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


PHOTOGRAPH = png()
TEXT = base64.b64encode(PHOTOGRAPH).decode()
ROW = {"image": TEXT}


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> TestClient:
    from mlflow.pyfunc import scoring_server

    folder: Path = tmp_path_factory.mktemp("served")
    detector = tiny_detector(samples=1, steps=1)
    noise = np.random.default_rng(1).integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)
    normal, products = [*noise, *noise // 4], ["thing"] * 20 + ["dark thing"] * 20
    known = [Normal(f"{i:064x}", f"{name}/good/{i}.png", name, None) for i, name in enumerate(products)]
    detector.learn(normal, known)
    detector.calibrate(normal, products=products)
    detector.save_pretrained(folder / "model")
    mlflow.pyfunc.save_model(
        str(folder / "version"),
        python_model=served.__file__,
        artifacts={"detector": str(folder / "model")},
        model_config={"max_pixels": 10**6},
        signature=ModelSignature(packaging._inputs(Params()), packaging.OUTPUTS, packaging.PARAMETERS),
        pip_requirements=[],
    )
    # As the server's own module does.
    found = TestClient(scoring_server.init(mlflow.pyfunc.load_model(str(folder / "version"))))
    found.version = str(folder / "version")
    return found


def post(client: TestClient, body: Any, kind: str = "application/json"):
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return client.post("/invocations", content=content, headers={"Content-Type": kind})


WRONG = {
    "data URI": ({"instances": [{"image": f"data:image/png;base64,{TEXT}"}]}, "row 0: `image` is not base64"),
    "another alphabet": ({"instances": [{"image": f"-_{TEXT}"}]}, "row 0: `image` is not base64"),
    "an object": ({"instances": [{"image": {"b64": TEXT}}]}, "row 0: `image` is not base64"),
    "bare strings": ({"instances": [TEXT]}, "no row has a photograph"),
    "one string": ({"inputs": TEXT}, "no row has a photograph"),
    "half a file": ({"instances": [{"image": TEXT[: len(TEXT) // 8 * 4]}]}, "row 0: `image` cannot be decoded"),
    "pixels": ({"instances": [{"image": np.zeros((4, 4, 3), int).tolist()}]}, "must be base64 of a file, not list"),
    "a threshold of text": ({"instances": [ROW], "params": {"threshold": "0.3"}}, "'threshold'"),
    "a threshold of NaN": ({"instances": [ROW], "params": {"threshold": float("nan")}}, "`threshold` is nan"),
    "a heatmap of text": ({"instances": [ROW], "params": {"heatmap": "true"}}, "'heatmap'"),
    "a misspelt parameter": ({"instances": [ROW], "params": {"treshold": 0.3}}, "`params` has 'treshold'"),
    "a misspelt key": ({"instances": [ROW], "parameters": {"threshold": 1}}, "the request has 'parameters', which is"),
    "parameters as a list": ({"instances": [ROW], "params": [1]}, "must be a dictionary"),
    "one row of two": ({"dataframe_records": [ROW, {"image": "AAAA"}]}, "row 1: `image` is not an image of PNG, JPEG"),
    "a product that is not known": (
        {"dataframe_records": [ROW, ROW | {"class_name": "cup"}]},
        "row 1: this model does not know the `class_name` 'cup', only dark thing, thing",
    ),
    "a product that is a number": ({"instances": [ROW | {"class_name": 3}]}, "class_name"),
    "a product that is a list": ({"instances": [ROW | {"class_name": ["thing"]}]}, "class_name"),
    "no rows": ({"dataframe_records": []}, "no row has a photograph"),
    "nothing": ({}, "exactly one of the input fields"),
    "two formats": ({"instances": [ROW], "inputs": [ROW]}, "exactly one of the input fields"),
    "no JSON": (f'{{"instances": [{{"image": "{TEXT}', "valid JSON"),
    "a list": ([TEXT], "must be a JSON dictionary"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_answered_by_a_sentence_that_repeats_no_photograph(client, name):
    body, sentence = WRONG[name]
    answer = post(client, body)
    assert answer.status_code == 400 and sentence in answer.json()["message"]
    assert TEXT[100:200] not in answer.text and len(answer.text) < 1500 and "stack_trace" not in answer.json()


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [(TEXT, "text/csv", 400), (PHOTOGRAPH, "application/vnd.apache.parquet", 400), (PHOTOGRAPH, "image/png", 415)],
)
def test_another_kind_of_content_is_answered_by_a_sentence_too(client, content, kind, status):
    answer = post(client, content, kind)
    assert answer.status_code == status and TEXT[100:200] not in answer.text and "Traceback" not in answer.text


def test_every_form_of_a_right_request_gets_the_same_answer(client):
    forms = [
        {"instances": [ROW]},
        {"inputs": [ROW]},
        {"inputs": {"image": [TEXT]}},
        {"dataframe_records": [ROW]},
        {"dataframe_split": {"columns": ["image"], "data": [[TEXT]]}},
        {"instances": [ROW | {"id": 7}], "signature_name": "serving_default"},
        {"instances": [ROW], "params": {"threshold": 0.5, "heatmap": False}},
    ]
    answers = [post(client, form) for form in forms] + [post(client, f"image\n{TEXT}\n", "text/csv")]
    assert all(answer.status_code == 200 for answer in answers)
    assert len({answer.text for answer in answers}) == 1


def test_the_product_is_recognised_unless_the_row_tells_it(client):
    rows = [ROW, ROW | {"class_name": "thing"}, ROW | {"class_name": "dark thing"}]
    found = post(client, {"dataframe_records": rows}).json()["predictions"]
    assert [row["product"] for row in found] == ["thing", "thing", "dark thing"]
    assert found[0]["score"] == found[1]["score"] != found[2]["score"]
    alone = [post(client, {"instances": [row]}).json()["predictions"][0] for row in rows]
    assert [row["score"] for row in alone] == pytest.approx([row["score"] for row in found], abs=1e-5)


def test_products_are_those_of_their_rows_in_a_request_of_many(client):
    rows = [ROW | {"class_name": "dark thing" if number % 3 == 0 else "thing"} for number in range(40)]
    found = post(client, {"dataframe_records": rows}).json()["predictions"]
    assert [row["product"] for row in found] == [row["class_name"] for row in rows]
    # The most similar image is one of the product that is told.
    assert all(row["nearest"].startswith(f"{row['product']}/") for row in found)


def test_a_product_that_cannot_be_hashed_is_a_sentence_in_python_too(client, tmp_path):
    model = mlflow.pyfunc.load_model(client.version)
    with pytest.raises(mlflow.exceptions.MlflowException, match="row 0: this model does not know the `class_name`"):
        model.unwrap_python_model().predict(None, pd.DataFrame({"image": [TEXT], "class_name": [["thing"]]}))
