"""`vlmdiff doctor`: what it finds, misses and predicts; it leaves the workspace unchanged."""

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from PIL import Image
from transformers import AutoConfig
from typer.testing import CliRunner

from tests.conftest import TINY
from tests.processes import is_gone, wait_for
from tests.tiny import SIZE
from vlmdiff.cli import app
from vlmdiff.core.params import Params, Prepare, Train
from vlmdiff.data import listing
from vlmdiff.data.synthesised import synthesise
from vlmdiff.evaluation.weighing import DEFECTS
from vlmdiff.setup import doctor
from vlmdiff.setup.cost import GIB, Cost, measure
from vlmdiff.setup.doctor import Requirement, examine, predicted_seconds

REVISION = "0123456789abcdef0123456789abcdef01234567"


def made(**sections) -> dict:
    """TINY with other keys in its sections."""
    return {**TINY, **{name: {**TINY.get(name, {}), **values} for name, values in sections.items()}}


def named(values: dict, measuring: bool = False) -> dict[str, Requirement]:
    return {row.name: row for row in examine(Params.model_validate(values), measuring)}


def checks(measuring: bool = False, **sections) -> dict[str, Requirement]:
    return named(made(**sections), measuring)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Doctor measures for a moment, not for seconds."""
    monkeypatch.setattr(doctor, "measure", partial(measure, seconds=0.2))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    # Tests run beside each other: a measurement may take longer than it does alone, and need not be exact.
    monkeypatch.setattr(doctor, "LIMIT", 600.0)
    monkeypatch.setattr(doctor, "measure", partial(measure, seconds=0.2))
    return folder


@pytest.fixture(scope="module")
def measured() -> dict[str, Cost]:
    """What the stages of TINY cost, measured once."""
    return {stage: measure(stage, Params.model_validate(TINY), 600.0, seconds=0.2) for stage in doctor.MEASURED}


@pytest.fixture
def recalled(measured, monkeypatch):
    """Doctor recalls what the stages of TINY cost."""
    monkeypatch.setattr(doctor, "measure", lambda stage, params, limit: measured[stage])


def photographs(root: Path, **counts: int) -> Path:
    """Photographs in CLASS/KIND, as `class__kind=count` says, for layout folder."""
    for name, count in counts.items():
        folder = root.joinpath(*name.split("__"))
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def run(here: Path, values: dict, *options: str):
    """The command on a params file beside `here`, without the measurements unless it is given other options."""
    file = here.parent / "params.yaml"
    file.write_text(yaml.safe_dump(values))
    return CliRunner().invoke(app, ["doctor", str(file), *(options or ["--no-measure"])])


# The command


def test_an_experiment_that_has_everything_ends_with_status_zero_and_writes_nothing(here, recalled):
    result = run(here, TINY, "--measure")

    assert result.exit_code == 0, result.output
    assert "6 classes: " in result.output and "everything needed is here" in result.output
    assert "no such folder" not in result.output
    assert len(re.findall("s a step", result.output)) == 2 and "not measured" not in result.output
    assert not list(here.iterdir())


def test_one_that_lacks_something_ends_with_status_one_and_says_how_to_get_it(here):
    result = run(here, made(prepare={"layout": "folder", "root": "photographs"}))

    assert result.exit_code == 1
    assert "Set prepare.root" in result.output and "1 check(s) failed" in result.output
    assert not list(here.iterdir())


def test_a_params_file_that_is_wrong_is_said_as_everywhere(here):
    result = run(here, {"prepare": {"rot": "."}})
    assert result.exit_code == 1 and "prepare.rot: unknown key" in str(result.exception)


def test_a_workspace_outside_of_git_or_of_another_user_lacks_something(here, monkeypatch):
    assert "git" not in named(TINY)
    Path("dvc.yaml").write_text("stages: {}")
    found = named(TINY)["git"]
    assert found.ok is False and "run `git init`" in found.advice
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert named(TINY)["git"].ok
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    found = named(TINY)["git"]
    assert found.ok is False and "safe.directory" in found.advice


# The dataset


def test_a_dataset_is_counted_without_opening_an_image(here):
    root = photographs(here / "raw", nut__good=20, bolt__good=20, bolt__rust=3, bolt__masks__rust=2)
    for file in root.rglob("*.png"):
        file.write_bytes(b"no image")
    found = checks(prepare={"layout": "folder", "root": str(root)}, validate={"masks": "optional"})

    assert found["dataset"].ok
    assert found["dataset"].found == "2 classes: 22 train, 10 validation, 11 test images (3 anomalous)"
    assert "2 of 3 anomalous" in found["masks"].found and found["masks"].ok

    shutil.rmtree(root / "nut")
    assert checks(prepare={"layout": "folder", "root": str(root)})["dataset"].found.startswith("1 class: ")


def test_the_outline_counts_as_the_manifest_does(here):
    params = Prepare(layout="folder", root=photographs(here / "raw", nut__good=11, nut__rust=2, bolt__good=3))
    columns = ["class_name", "split", "is_anomalous"]
    assert (
        listing.outline(params)[columns].value_counts().to_dict()
        == listing.build(params, params.root)[columns].value_counts().to_dict()
    )


def test_masks_that_are_required_and_images_that_are_too_few_are_missing(here):
    root = photographs(here / "raw", bolt__good=20, bolt__rust=3, nut__good=4)
    found = checks(
        prepare={"layout": "folder", "root": str(root)},
        validate={"masks": "required", "min_images": {"train": 8, "validation": 1, "test": 1}},
    )
    assert found["masks"].ok is False and "validate.masks: optional" in found["masks"].advice
    assert found["images a class"].ok is False
    assert "nut" in found["images a class"].advice and "bolt" not in found["images a class"].advice


def test_a_broken_dataset_is_told_by_its_message(here):
    (here / "raw/bolt/test").mkdir(parents=True)
    result = run(here, made(prepare={"layout": "mvtec_ad", "root": "raw"}))
    assert result.exit_code == 1
    assert "broken" in result.output and "raw/bolt has no train/good" in result.output


# Models


def pretrained(checkpoint: Path, perceptual: Path, **train) -> dict:
    model = str(checkpoint)
    return made(
        first_stage={
            "pretrained": {"model": model, "subfolder": "vae"},
            "perceptual": {"model": str(perceptual), "image_size": 32, "layers": [1, 2]},
            "discriminator": {"start": 1, "channels": 8, "layers": 2},
        },
        encode={"text_encoder": {"kind": "pretrained", "model": model}},
        train={
            "pretrained": {"model": model},
            "trainable": "paper",
            "prediction": "epsilon",
            "hint_channels": [8, 16, 16],
            **train,
        },
        evaluate={
            "detection": {
                "steps": 1,
                "features": [{"kind": "transformers", "model": str(perceptual), "image_size": 32}],
            }
        },
    )


def test_models_that_are_here_are_counted_and_their_memory_and_disk_are_known(here, checkpoint, backbone):
    found = named(pretrained(checkpoint, backbone), measuring=True)

    models = ("first_stage.pretrained", "first_stage.perceptual", "encode.text_encoder", "train.pretrained")
    assert all(found[name].ok and "million parameters" in found[name].found for name in models)
    assert found["detection.features.0"].ok and found["tokenizer"].ok and found["noise schedule"].ok
    assert all(found[f"memory, {stage}"].ok for stage in ("first_stage", "train", "evaluate")) and found["disk"].ok
    assert all(found[f"time, {stage}"].ok for stage in ("first_stage", "train", "encode", "evaluate", "total"))


@pytest.mark.services
def test_a_backbone_whose_features_are_the_latents_is_found_and_what_it_takes_is_known(here, backbone):
    space = {"model": str(backbone), "image_size": SIZE, "layers": [1, 2], "grid": 16}
    sections = dict(first_stage={"kind": "backbone", "backbone": space}, evaluate={"detection": {"steps": 1}})
    found = checks(measuring=True, **sections)
    assert found["first_stage.backbone"].ok and "million parameters" in found["first_stage.backbone"].found
    assert all(found[f"memory, {stage}"].ok for stage in ("first_stage", "train")) and found["disk"].ok
    assert found["time, train"].ok and found["time, first_stage"].ok

    sections["evaluate"]["detection"]["retrieval"] = {"patches": 10**6}
    more = checks(measuring=True, **sections)
    normal = int((listing.outline(Params.model_validate(TINY).prepare)["split"] != "test").sum())
    # Every patch is kept, 16 x 16 of each image, in 256 numbers of two bytes.
    sizes = [float(re.search(r"([\d.]+) MiB per model", one["disk"].needed)[1]) for one in (found, more)]
    assert sizes[1] - sizes[0] == pytest.approx(normal * 256 * 512 / 2**20, abs=0.11)
    assert f"{normal * 256} normal patches" in more["memory, evaluate"].needed
    assert more["time, evaluate"].ok and "drawn defects" in more["time, evaluate"].needed

    space["model"] = "nowhere"
    found = checks(measuring=True, **sections)
    assert found["first_stage.backbone"].ok is False and found["memory, train"].ok is None
    assert "not measured" in found["memory, train"].needed and "not measured" in found["time, train"].found


def test_sizes_for_retrieval_are_multiples_of_a_patch_of_the_backbone(here, saved):
    side = AutoConfig.from_pretrained(saved("vit")).patch_size
    space = {"model": str(saved("vit")), "image_size": 4 * side, "grid": 16}
    first_stage = {"kind": "backbone", "backbone": space}
    normal = int((listing.outline(Params.model_validate(TINY).prepare)["split"] != "test").sum())
    for size, fits in ((8 * side, True), (8 * side + 1, False)):
        detection = {"steps": 1, "retrieval": {"patches": 10**6, "more_sizes": [size]}}
        found = checks(first_stage=first_stage, evaluate={"detection": detection})
        assert found["retrieval.more_sizes"].ok is fits
        if fits:
            assert f"{normal * (256 + 1024)} normal patches" in found["memory, evaluate"].needed
        else:
            assert f"multiples of {side}, the patch size" in found["retrieval.more_sizes"].advice


def test_a_model_that_is_missing_is_named_once_with_the_keys_that_want_it(here, backbone):
    result = run(here, pretrained(Path("models/sd"), backbone))

    assert result.exit_code == 1
    text = " ".join(result.output.split())
    wanted = "first_stage.pretrained, encode.text_encoder, train.pretrained, tokenizer, noise schedule: models/sd is no"
    assert wanted in text
    assert not list(here.iterdir())


def test_a_download_that_was_cut_off_is_missing(here, checkpoint, backbone, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    found = named(pretrained(broken, backbone))
    assert found["train.pretrained"].ok is False and "is incomplete" in found["train.pretrained"].advice


def test_networks_that_do_not_fit_are_said_before_anything_is_trained(here, checkpoint, backbone):
    found = named(pretrained(checkpoint, backbone, prediction="v_prediction"), measuring=True)
    assert found["train, a step"].ok is False and "Set train.prediction to epsilon" in found["train, a step"].advice
    assert found["memory, train"].ok is None and found["memory, first_stage"].ok


def hub(**source) -> dict:
    return {"detection": {"steps": 1, "features": [{"kind": "transformers", "image_size": 32, **source}]}}


def test_a_name_on_the_hub_needs_a_revision_and_a_place_in_the_cache(here, tmp_path, backbone, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    loose = checks(evaluate=hub(model="someone/eyes"))["detection.features.0"]
    assert loose.ok is False and "revision" in loose.advice

    away = checks(evaluate=hub(model="someone/eyes", revision=REVISION))["detection.features.0"]
    assert away.ok is False and f"hf download someone/eyes --revision {REVISION}" in away.advice
    assert not (tmp_path / "cache").exists()

    shutil.copytree(backbone, tmp_path / "cache/models--someone--eyes/snapshots" / REVISION)
    cached = checks(evaluate=hub(model="someone/eyes", revision=REVISION))["detection.features.0"]
    assert cached.ok and "hub's cache" in cached.found


def test_a_key_is_looked_for_and_never_shown(here, monkeypatch):
    endpoint = {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_variable": "THE_KEY"}
    monkeypatch.delenv("THE_KEY", raising=False)
    result = run(here, made(caption={"captioner": endpoint}))
    assert result.exit_code == 1 and "THE_KEY" in result.output and "not set" in " ".join(result.output.split())

    monkeypatch.setenv("THE_KEY", "secret-of-mine")
    result = run(here, made(caption={"captioner": endpoint}))
    assert result.exit_code == 0 and "a key is set" in result.output and "secret-of-mine" not in result.output


def test_captions_in_a_file_are_looked_for_in_the_dataset(here):
    root = photographs(here / "raw", nut__good=20)
    values = dict(
        prepare={"layout": "folder", "root": str(root)}, caption={"captioner": {"kind": "file", "file": "captions.tsv"}}
    )
    assert checks(**values)["caption.captioner"].ok is False
    (root / "captions.tsv").touch()
    assert checks(**values)["caption.captioner"].ok


# The machine


def test_a_disk_that_is_too_small_is_missing(here, recalled, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**20, 2**20 - 1000, 1000))
    result = run(here, TINY, "--measure")
    assert result.exit_code == 1 and "disk: free some space" in result.output


def test_half_precision_needs_a_gpu(here, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert checks(train={"precision": "fp16"})["device"].ok is False
    assert checks(train={"precision": "bf16"})["device"].ok


# What the trainings cost


def cost(limit: float = 600.0, stage: str = "train", **sections) -> Cost:
    return measure(stage, Params.model_validate(made(**sections)), limit, seconds=0.2)


@pytest.mark.services
def test_a_larger_batch_takes_more_memory(here, measured):
    small, large = measured["train"], cost(train={"batch_size": 128})
    assert not small.failure and not large.failure
    assert large.memory > small.memory + GIB / 40
    assert small.trained == large.trained and small.weights == large.weights


def test_the_seconds_of_a_training_are_those_of_its_steps_validations_and_checkpoints():
    # The first two steps warm up.
    found = Cost(start=4.0, steps=[10.0, 2.0, 1.0, 1.0], validation=0.5, checkpoint=3.0)
    params = Train(steps=100, validate_every=50, checkpoint_every=40)
    assert found.seconds(params, held_out=6) == 4 + 9 + 1 + 100 * 1 + 2 * 6 * 0.5 + 2 * 3
    assert Cost(start=4.0, steps=[10.0]).seconds(params, held_out=6) is None


def test_the_steps_of_a_training_that_epochs_limit_are_predicted():
    params = Params.model_validate(
        made(train={"steps": 100, "batch_size": 4, "max_epochs": 8}, encode={"mirror": ["horizontal"]})
    )
    costs = {"train": Cost(start=4.0, steps=[1.0] * 4, validation=0.0, checkpoint=0.0)}
    # 10 images and 10 mirrored ones, 8 times, in batches of 4.
    frame = pd.DataFrame({"path": "nowhere.png", "split": ["train"] * 10})
    assert predicted_seconds(params, costs, frame) == {"train": 4 + 40}
    assert predicted_seconds(params, costs, None) == {"train": 4 + 100}


@pytest.mark.parametrize("held_out", [4, 16, 40])
@pytest.mark.parametrize(
    ("retrieval", "costs", "choices"), [(None, False, 0), ({}, False, 1), ({}, True, 2), ({"weight": 0.5}, False, 0)]
)
def test_the_seconds_of_an_evaluation_are_those_of_its_normal_images_drawn_defects_and_test_images(
    here, retrieval, costs, choices, held_out
):
    evaluate: dict = {"detection": {"retrieval": retrieval}}
    if costs:
        evaluate["decision"] = {"costs": {"false_alarm": 1.0, "miss": 10.0}}
    first_stage = {"kind": "backbone", "backbone": {"model": "nowhere", "image_size": SIZE, "grid": 16}}
    params = Params.model_validate(made(first_stage=first_stage, evaluate=evaluate))
    splits = ["train"] * 10 + ["validation"] * held_out + ["test"] * 60
    frame = pd.DataFrame({"path": "nowhere.png", "split": splits})
    found = predicted_seconds(params, {"evaluate": Cost(start=4.0, learn=2.0, judge=1.0)}, frame)
    drawn = len(list(synthesise([np.zeros((32, 32, 3), np.uint8)] * held_out, [""] * held_out, DEFECTS)))
    # What it can find is measured on a tenth as many images as it judges, and its latency on the first eleven.
    judged = held_out + choices * drawn + min(held_out, round(0.1 * (held_out + 60))) + 60 + 11
    assert found == {"evaluate": 4 + (10 + held_out) * 2 + judged}
    assert predicted_seconds(params, {"evaluate": Cost(start=4.0, learn=2.0)}, frame) == {}


def test_an_evaluation_takes_longer_with_more_samples(measured):
    few, many = measured["evaluate"], cost(stage="evaluate", evaluate={"detection": {"steps": 1, "samples": 32}})
    assert not few.failure and not many.failure
    assert many.judge > 2 * few.judge > 0


def test_an_evaluation_that_is_not_measured_to_its_end_takes_at_least_what_is_known(here, monkeypatch):
    known = Cost(start=10.0, learn=5.0)
    monkeypatch.setattr(doctor, "measure", lambda stage, params, limit: known if stage == "evaluate" else Cost())
    found = named(TINY, measuring=True)["time, evaluate"]
    normal = int((listing.outline(Params.model_validate(TINY).prepare)["split"] != "test").sum())
    assert found.ok is None and found.found == f"at least {round((10 + 5 * normal) / 60)} min"


def test_a_measurement_that_takes_too_long_is_ended_and_says_what_it_knows(here):
    found = cost(limit=1.0)
    assert found.unfinished > 0 and found.step is None and not found.failure


def test_networks_that_the_memory_cannot_hold_are_refused_without_a_step(here, checkpoint, backbone, monkeypatch):
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(1000))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = named(pretrained(checkpoint, backbone), measuring=True)
    assert found["time, evaluate"].ok is None and found["memory, evaluate"].ok is False
    for stage in ("first_stage", "train"):
        assert found[f"memory, {stage}"].ok is False and "weights alone" in found[f"memory, {stage}"].advice
        assert found[f"time, {stage}"].ok is None


def test_a_measurement_ends_with_doctor_even_if_that_is_killed(here):
    code = "from tests.unit.test_doctor import cost; cost()"
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    watched = psutil.Process(owner.pid)
    # The measurement, and what Python starts beside it.
    wait_for(lambda: len(watched.children()) == 2, 120)
    children = watched.children()
    owner.kill()
    owner.wait()
    wait_for(lambda: all(map(is_gone, children)), 20)
