"""A model folder is data: whatever stands in it, nothing of it runs, and nothing outside of it is read."""

import itertools
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import SIZE, tiny_backbone, tiny_detector
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import HASHES
from vlmdiff.core.params import BackboneFeatures
from vlmdiff.detection.detector import Detector
from vlmdiff.model.first_stage import load_first_stage
from vlmdiff.model.pipeline import VLMDiffPipeline, load_pipeline
from vlmdiff.production.monitor import read_reference

EXECUTED = "EXECUTED"
CODE = f"import pathlib\npathlib.Path({EXECUTED!r}).touch()\nclass Net: pass\nclass VLMDiffPipeline: pass\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A detector's folder with a backbone in it."""
    folder = tmp_path_factory.mktemp("made")
    features = BackboneFeatures(
        kind="transformers", model=str(tiny_backbone(folder / "vit")), image_size=SIZE, layers=(1,)
    )
    detector = tiny_detector(samples=1, steps=1, features=(features,))
    detector.calibrate(list(np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)))
    detector.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def model(made, tmp_path, monkeypatch) -> Path:
    """A copy in the current folder, from which Python imports, as `python -m` does, without hashes of its files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return Path(shutil.copytree(made, "model", ignore=shutil.ignore_patterns(HASHES)))


def change(file: Path, *keys: str | int, to: object) -> None:
    """Set one value of a JSON file."""
    facts = place = json.loads(file.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    file.write_text(json.dumps(facts))


def refused(model: Path, words: str) -> None:
    """Load the folder as everything does; it must say why it does not, and have run nothing."""
    before = set(sys.modules)
    with pytest.raises(InputError, match=words):
        Detector.from_pretrained(model)
    assert not Path(EXECUTED).exists()
    assert not {"evil", "this", "antigravity"} & (set(sys.modules) - before)


def test_the_folder_loads_as_it_was_saved(model):
    assert Detector.from_pretrained(model).calibrated().images == 5


@pytest.mark.parametrize("library", ["evil", "model.evil", "this", "os", "vlmdiff.cli", "transformers", "diffusers"])
@pytest.mark.parametrize("component", ["unet", "vae", "sgn", "other"])
def test_a_class_that_is_not_known_is_refused_before_anything_is_imported(model, library, component):
    for place in (Path("evil.py"), model / "evil.py", model / component / "evil.py"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(CODE)
    change(model / "model_index.json", component, to=[library, "Net"])
    words = "not permitted" if component == "other" else f"{library}.Net does not load"
    refused(model, rf"model_index\.json, {component}: .*{words}")
    with pytest.raises(InputError):
        VLMDiffPipeline.from_pretrained(model)
    with pytest.raises(InputError):
        load_pipeline(model, "cpu")
    assert not Path(EXECUTED).exists()


def test_the_model_of_the_fault_maker_runs_nothing(faults, tmp_path, monkeypatch):
    shutil.copytree(faults / "model_that_names_code", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"model_index\.json, "):
        load_pipeline(Path(), "cpu")
    assert not Path(EXECUTED).exists() and "evil" not in sys.modules


@pytest.mark.parametrize("name", [["evil", "VLMDiffPipeline"], "StableDiffusionPipeline", None])
def test_a_pipeline_of_another_class_is_refused(model, name):
    (model / "evil.py").write_text(CODE)
    change(model / "model_index.json", "_class_name", to=name)
    refused(model, r"model_index\.json, _class_name: .*VLMDiffPipeline")


def test_a_file_in_a_components_folder_that_is_named_as_its_library_does_not_run(model):
    for name in ("unet", "vae", "scheduler"):
        (model / name / "diffusers.py").write_text(f"{CODE}class UNet2DConditionModel: pass\n")
    # It is no part of a model, so it may lie there.
    assert Detector.from_pretrained(model).calibrated().images == 5
    assert not Path(EXECUTED).exists()


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(EXECUTED),)


@pytest.mark.parametrize("component", ["unet", "vae", "sgn", "text_encoder", "backbone_0"])
def test_weights_that_are_a_pickle_are_not_read(model, component):
    (weights,) = (model / component).glob("*.safetensors")
    weights.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        (model / component / name).write_bytes(pickle.dumps(Bomb()))
    refused(model, component)


@pytest.mark.parametrize("component", ["text_encoder", "backbone_0"])
@pytest.mark.parametrize("kind", ["AutoConfig", "AutoModel"])
def test_code_that_a_configuration_names_does_not_run(model, component, kind):
    (model / component / "evil.py").write_text(CODE)
    change(model / component / "config.json", "auto_map", to={kind: "evil.Net"})
    Detector.from_pretrained(model)
    assert not Path(EXECUTED).exists() and not any(name.endswith("evil") for name in sys.modules)
    # A kind of model that transformers does not know and whose code lies beside it.
    change(model / component / "config.json", "model_type", to="evil")
    if component == "backbone_0":
        refused(model, component)


def test_a_first_stage_of_an_unknown_class_is_refused(model):
    change(model / "vae/config.json", "_class_name", to="Net")
    with pytest.raises(InputError, match=r"vae.config\.json .*'Net'"):
        load_first_stage(model / "vae")


@pytest.mark.parametrize("path", ["../outside", "/etc", "backbone_0/../../outside", "link", "", ".", "evil/hub"])
def test_a_backbone_outside_of_the_folder_is_refused(model, path):
    shutil.copytree(model / "backbone_0", "outside")
    (model / "link").symlink_to(Path("outside").absolute())
    change(model / "detector.json", "detection", "features", 0, "model", to=path)
    change(model / "detector.json", "detection", "features", 0, "revision", to="main")
    refused(model, r"detector\.json, .*model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("threshold", value) for value in (float("nan"), float("inf"), "high", None, [1])],
        *[
            ("products", value)
            for value in ({}, {"": {}}, {"": {"images": 1, "levels": [0.0], "spreads": [0.0]}}, [], 1)
        ],
        *[("slope", value) for value in (0, -1, float("nan"))],
        *[("normal", value) for value in ([float("nan")], 1.0)],
        *[("deviation", value) for value in (-1, 0, float("nan"), float("inf"))],
        *[("scales", value) for value in ([-1.0], [float("nan")], [float("inf")], [], [1.0, 1.0], 1.0, None)],
        *[("images", value) for value in (0, -5, 2.5, "many")],
        *[("false_alarm_rate", value) for value in (0, 1, -0.1, 2, float("nan"))],
        *[("f1_optimal", value) for value in (-0.1, 1.0, float("nan"))],
        *[("weight", value) for value in (-0.1, 1.1, float("nan"), None)],
        *[("tails", value) for value in ([1.0, 1.0], [1.0, 0.0], [1.0, float("nan")], 1.0)],
        *[("retrieval", {"median": 0.1, "tail": value}) for value in (1.0, 0, -1, float("inf"), None)],
        ("retrieval", {"median": float("nan"), "tail": 1.0}),
        ("retrieval", {"median": 0.1, "tail": 1.0, "more": 1}),
        ("more", 1),
    ],
    ids=str,
)
def test_a_calibration_out_of_range_is_refused_by_name(model, key, value):
    change(model / "detector.json", "calibration", key, to=value)
    refused(model, rf"detector\.json.* calibration.*{key}")
    (model / "reference.parquet").touch()
    with pytest.raises(InputError, match=r"detector\.json.* calibration"):
        read_reference(model)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("detection", "steps"), 10**9, "steps"),
        (("detection", "samples"), 10**9, "samples"),
        (("detection", "smoothing"), 1e9, "smoothing"),
        (("detection", "features", 0, "image_size"), 10**9, "image_size"),
        (("detection", "features", 0, "layers"), [99], "layers"),
        (("detection", "features", 0), {"kind": "pixels", "window": 10**9 + 1}, "window"),
        (("detection", "features"), [], "features"),
        (("detection",), None, "detection"),
        (("class_captions",), {"cable": 7}, "class_captions"),
        (("class_captions",), ["cable"], "class_captions"),
        (("detection", "retrieval"), {}, "retrieval"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused_by_name(model, keys, value, words):
    change(model / "detector.json", *keys, to=value)
    refused(model, words)


OUT_OF_RANGE = [0, -1, 10**9, "big", [float("nan")] * 3, [1.0, 1.0], None]


# A mean of zero is valid, a deviation of zero is not.
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(["image_size", "image_mean", "image_std"], OUT_OF_RANGE),
        ("image_size", [0, 0, 0]),
        ("image_std", [0, 0, 0]),
    ],
)
def test_an_image_size_or_normalization_out_of_range_is_refused_by_name(model, key, value):
    change(model / "model_index.json", key, to=value)
    refused(model, rf"model_index\.json, {key}")


@pytest.mark.parametrize("name", ["detector.json", "model_index.json", "unet/config.json", "backbone_0/config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"x"', "{}", "[" * 100_000, "\udcff"])
def test_a_file_that_is_not_the_json_expected_is_named(model, name, text):
    (model / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(model, name.split("/")[0])


@pytest.mark.parametrize("name", ["detector.json", "model_index.json", "unet/config.json", "vae/extra.json"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["pipe", "endless"])
def test_a_folder_with_something_that_is_no_file_is_refused_without_opening_it(
    model, name, make: Callable[[Path], None]
):
    (model / name).unlink(missing_ok=True)
    make(model / name)
    refused(model, Path(name).name)


@pytest.mark.parametrize("component", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_component_that_is_missing_or_damaged_is_named(model, component):
    for file in (model / component).iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    refused(model, component)
    shutil.rmtree(model / component)
    refused(model, component)


def test_a_list_of_calibration_images_that_is_no_table_is_named(model):
    (model / "reference.parquet").write_text("no table")
    with pytest.raises(InputError, match=r"reference\.parquet is damaged"):
        read_reference(model)


@pytest.mark.parametrize("threshold", [-1, 0, float("nan"), float("inf"), "high"])
def test_a_threshold_of_an_earlier_release_that_is_not_above_zero_is_refused(model, threshold):
    facts = json.loads((model / "detector.json").read_text())
    for key in ("products", "slope", "normal"):
        del facts["calibration"][key]
    facts["calibration"]["threshold"] = threshold
    (model / "detector.json").write_text(json.dumps(facts))
    refused(model, r"detector\.json.* calibration.*(threshold|Infinity|NaN)")
