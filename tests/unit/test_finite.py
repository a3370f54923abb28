"""A value that is not finite is an error that names the image and the model, and never a verdict."""

import base64
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image

from tests.conftest import Workspace
from tests.monitoring import CLASSES, photographs, write_model, write_scores
from tests.tiny import SIZE, save_tiny_detector, tiny_detector, tiny_pipeline
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import HASHES
from vlmdiff.core.params import Evaluate, Latents, Prepare
from vlmdiff.data import listing
from vlmdiff.detection.calibration import conformal_threshold
from vlmdiff.detection.detector import Detector
from vlmdiff.evaluation.evidence import read_scores
from vlmdiff.evaluation.judging import judge_images
from vlmdiff.production.inspector import Model
from vlmdiff.production.monitor import read_reference
from vlmdiff.registry.served import Inspector

# Of each network a weight of a normalisation, which is 1.
WEIGHTS = {
    "unet/diffusion_pytorch_model.safetensors": "conv_norm_out.weight",
    "sgn/diffusion_pytorch_model.safetensors": "control.down_blocks.0.resnets.0.norm1.weight",
    "vae/diffusion_pytorch_model.safetensors": "encoder.conv_norm_out.weight",
}
ONE, BIT = np.float32(1).tobytes(), 0x40


def flip(file: Path, tensor: str) -> None:
    """Flip one bit of a weight that is 1: it becomes infinite."""
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    place = 8 + size + json.loads(data[8 : 8 + size])[tensor]["data_offsets"][0]
    assert data[place : place + 4] == ONE
    data[place + 3] ^= BIT
    file.write_bytes(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save_tiny_detector(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def model(whole, tmp_path, monkeypatch) -> Path:
    """A model with one flipped bit, registered before versions had hashes; the current folder has two photographs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "model", ignore=shutil.ignore_patterns(HASHES))
    flip(Path("model/unet/diffusion_pytorch_model.safetensors"), "conv_norm_out.weight")
    Path("params.yaml").write_text("{}")
    Path("data/nut/good").mkdir(parents=True)
    for name in ("a", "b", "c", "d"):
        noise = np.random.default_rng(ord(name)).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"data/nut/good/{name}.png")
    return Path("model")


@pytest.mark.parametrize("file", WEIGHTS)
def test_a_flipped_bit_in_any_network_is_an_error_of_the_detector_and_no_verdict(model, whole, file):
    shutil.copytree(whole, model, dirs_exist_ok=True, ignore=shutil.ignore_patterns(HASHES))
    flip(model / file, WEIGHTS[file])
    image = Image.open("data/nut/good/a.png")
    with pytest.raises(InputError, match=r"^image 1: the \w+ by the model model is not a finite number"):
        detector = Detector.from_pretrained(model)
        sound = Detector.from_pretrained(whole).detect([image])
        assert 0 < sound[0].score < 1
        list(detector.stream([image, image], names=["image 1", "image 2"]))


@pytest.mark.parametrize("features", [(), (Latents(kind="latents"),)], ids=["pixels", "latents"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_decoder_that_is_not_finite_is_no_white_picture(features, value):
    detector = tiny_detector(samples=1, steps=1, **({"features": features} if features else {}))
    normal = list(np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8))
    detector.calibrate(normal)
    detector.pipeline.vae.decoder.conv_out.bias.data[0] = value
    for judge_again in (detector.detect, detector.calibrate):
        with pytest.raises(InputError, match=r"image 0: the reconstruction by the model .* is not a finite number"):
            judge_again(normal)


def test_the_variance_that_the_network_expects_is_bounded():
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.bias[-1] = 1e4
        latents, images = torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, SIZE, SIZE)
        for sign in (1, -1):
            pipeline.unet.conv_out.bias[-1] = sign * 1e4
            _, deviation = pipeline.reconstruct(latents, images, noise_level=500, steps=1)
            assert deviation.isfinite().all() and (deviation > 0).all()
            _, log_variance = pipeline.denoise(
                latents, torch.tensor(500), pipeline.encode_captions([""]), pipeline.normalize(images)
            )
            # The loss of training has both.
            assert log_variance.exp().isfinite().all() and (-log_variance).exp().isfinite().all()


def test_score_stops_with_the_photograph_and_the_model(model):
    said = Workspace(Path.cwd()).vlmdiff("score", "data", "--out", "out", "--model", "model", check=False)
    assert said.returncode == 2 and "alarms" not in said.stdout
    assert "data/nut/good/a.png: the " in said.stdout and "by the model model is not a finite number" in said.stdout
    assert not list(Path("out").glob("part-*"))


def served(model: Path) -> Inspector:
    inspector = Inspector()
    inspector.load_context(SimpleNamespace(artifacts={"detector": str(model)}, model_config={"max_pixels": 10**6}))
    return inspector


def test_the_served_model_answers_with_an_error_of_the_server(model):
    image = base64.b64encode(Path("data/nut/good/a.png").read_bytes()).decode()
    with pytest.raises(MlflowException, match=r"row 0: the \w+ by the model model is not a finite") as caught:
        served(model).predict(None, pd.DataFrame({"image": [image]}))
    assert caught.value.get_http_status_code() == 500


def test_an_error_of_one_request_is_no_answer_to_another_that_waits(whole):
    inspector = served(whole)
    photograph = np.zeros((SIZE, SIZE, 3), np.uint8)
    sound, broken = (inspector._request([image], None, [None], ["row 0"]) for image in (photograph, photograph[..., 0]))
    inspector._detect_waiting()
    assert 0 < sound.result(0)[0].score < 1
    with pytest.raises(InputError):
        broken.result(0)


def test_the_inspectors_page_says_it(model):
    data = Path("data/nut/good/a.png").read_bytes()
    with pytest.raises(InputError, match="by the model model is not a finite number"):
        Model(Path("model"), "tiny").judge(data, "a.png", 10**6)


def test_evaluation_stops_with_the_photograph(model):
    data = Prepare(layout="folder", root=Path("data"), test_fraction=0.5)
    frame = listing.build(data, data.root)
    with pytest.raises(InputError, match=r"nut/good/\w\.png: the \w+ by the model model is not a finite number"):
        judge_images(Detector.from_pretrained(model), frame, data, {}, Evaluate())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_threshold_is_set_or_asked_for_that_is_not_finite(whole, value):
    with pytest.raises(InputError, match="not a finite number"):
        conformal_threshold(np.array([0.1, value, 0.3]), 0.05)
    (found,) = Detector.from_pretrained(whole).detect([np.zeros((SIZE, SIZE, 3), np.uint8)])
    with pytest.raises(InputError, match="give a number from 0 to 1"):
        found.at(value)


def test_scores_that_an_earlier_release_wrote_as_nan_are_judged_again(whole, model):
    place = Workspace(Path.cwd())
    place.vlmdiff("score", "data", "--out", "out", "--model", str(whole))
    (part,) = Path("out").glob("part-*")
    frame = pd.read_parquet(part)
    frame.loc[1, "score"] = np.nan
    from vlmdiff.production.score import SCHEMA, pa, pq

    pq.write_table(pa.Table.from_pandas(frame, SCHEMA, preserve_index=False), part)
    again = place.vlmdiff("score", "data", "--out", "out", "--model", str(whole)).stdout
    assert "3 of them scored before; 1 new" in again and pd.read_parquet("out")["score"].notna().all()


def test_the_monitor_compares_no_score_that_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("{}")
    known = write_model(tmp_path / "model")
    scores = write_scores(Path("scores.parquet"), photographs(1, dict.fromkeys(CLASSES, 40)), known)
    frame = pd.read_parquet(scores)
    frame.loc[7, "score"] = np.nan
    frame.to_parquet(scores)
    place = Workspace(tmp_path)
    done = place.vlmdiff("monitor", "scores.parquet", "--model", "model", "--out", "out", check=False)
    assert done.returncode == 2 and f"the row of {frame['path'][7]} has no score that is a finite number" in done.stdout
    reference = pd.read_parquet(known / "reference.parquet")
    reference.loc[3, "score"] = np.inf
    reference.to_parquet(known / "reference.parquet")
    with pytest.raises(InputError, match=rf"reference\.parquet is damaged: the row of {reference['image_id'][3]} has"):
        read_reference(known)


def test_the_gate_reads_no_score_that_is_not_finite(tmp_path):
    frame = pd.DataFrame({"image_id": ["a", "b"], "class_name": "nut", "defect": "good", "is_anomalous": False})
    frame.assign(score=[0.1, np.nan], verdict=False).to_parquet(tmp_path / "scores.parquet")
    with pytest.raises(InputError, match=r"scores\.parquet is not valid \(the score of image b is not a finite number"):
        read_scores(tmp_path / "scores.parquet")
