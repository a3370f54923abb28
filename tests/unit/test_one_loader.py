"""Every entrance shows the model the same pixels, however a photograph is encoded."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import ExifTags, Image

from tests.endpoint import Endpoint, completion, image_of
from tests.tiny import SIZE, save_tiny_detector
from vlmdiff.captions.captioners import Describe, caption_images
from vlmdiff.core.params import Caption, Evaluate, Params, Prepare, Validate
from vlmdiff.data import listing
from vlmdiff.data.feedback import Statement, give_feedback
from vlmdiff.detection.detector import Detector
from vlmdiff.evaluation.judging import judge_images
from vlmdiff.production.inspector import Model
from vlmdiff.production.score import score
from vlmdiff.registry.served import Inspector
from vlmdiff.training.encoded import image_array

LIMIT = 10**6


def encodings(folder: Path) -> list[Path]:
    """A grey photograph, 60 x 45 pixels, in files that all hold the same pixels; the first is an 8-bit RGB PNG."""
    folder.mkdir(parents=True)
    grey = np.random.default_rng(0).integers(0, 250, (45, 60), dtype=np.uint8)
    grey[5:20, 30:50] = 255
    image = Image.fromarray(grey)
    opaque, cut_out = Image.new("L", image.size, 255), Image.fromarray(np.where(grey == 255, 0, 255).astype(np.uint8))
    palette = image.copy()
    palette.putpalette([level for level in range(256) for _ in range(3)])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    # Ink is what light is not.
    cyan = Image.fromarray(255 - grey)
    for name, encoded, options in (
        ("rgb.png", image.convert("RGB"), {}),
        ("grey.png", image, {}),
        ("deep.png", Image.fromarray(grey.astype(np.uint16) * 257), {}),
        ("palette.png", palette, {}),
        ("clear_colour.png", palette, {"transparency": 255}),
        ("opaque.png", Image.merge("LA", (image, opaque)), {}),
        # White shines through where nothing is.
        ("cut_out.png", Image.merge("RGBA", (*[Image.fromarray(np.where(grey == 255, 0, grey))] * 3, cut_out)), {}),
        ("turned.png", image.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
        ("turned.tif", image.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
        ("ink.tif", Image.merge("CMYK", (cyan, cyan, cyan, Image.new("L", image.size, 0))), {}),
        ("deep.tif", Image.fromarray(grey.astype(np.uint16) * 257), {"compression": "tiff_lzw"}),
        ("float.tif", Image.fromarray(grey.astype(np.float32) / 255), {}),
        ("photo.webp", image.convert("RGB"), {"lossless": True}),
        ("photo.bmp", image.convert("RGB"), {}),
    ):
        encoded.save(folder / name, **options)
    return [folder / "rgb.png", *sorted(set(folder.iterdir()) - {folder / "rgb.png"})]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_detector(tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path, monkeypatch) -> list[Path]:
    """The encodings, in a workspace that is the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("{}")
    return encodings(Path("raw/thing/hole"))


Seen = list[np.ndarray]


def training(files: list[Path], model: Path) -> Seen:
    frame = pd.DataFrame({"path": [str(file) for file in files]})
    return list(image_array(frame, Prepare(layout="folder", root=Path()), SIZE, Path("images.npy")))


def evaluation(files: list[Path], model: Path) -> Seen:
    Path("raw/thing/good").mkdir()
    for i in range(4):
        Image.new("RGB", (60, 45), (i, 0, 0)).save(f"raw/thing/good/{i}.png")
    data = Prepare(layout="folder", root=Path("raw"), test_fraction=0.5)
    frame = listing.build(data, data.root)
    examples = Evaluate(examples=len(files))
    judged = judge_images(Detector.from_pretrained(model), frame, data, {}, examples)
    scores = dict(zip(judged.scores["path"], judged.scores["score"], strict=True))
    pictures = {example.path: example.image for example in judged.examples}
    names = [str(file.relative_to("raw")) for file in files]
    return [np.append(pictures[name].ravel(), 255 * scores[name]) for name in names]


def scoring(files: list[Path], model: Path) -> Seen:
    scored = score([str(file) for file in files], Path("out"), Params(), model)
    rows = pd.read_parquet("out").set_index("path").loc[[row["path"] for row in scored.rows]]
    columns = ["score", "brightness", "contrast", "sharpness", "red", "green", "blue", "width", "height"]
    return list(rows[columns].to_numpy(float))


def serving(files: list[Path], model: Path) -> Seen:
    inspector = Inspector()
    inspector.load_context(SimpleNamespace(artifacts={"detector": str(model)}, model_config={"max_pixels": LIMIT}))
    images = [base64.b64encode(file.read_bytes()).decode() for file in files]
    rows = inspector.predict(None, pd.DataFrame({"image": images}), {"threshold": 0.0, "heatmap": True})
    maps = [np.frombuffer(base64.b64decode(picture), np.uint8) for picture in rows["heatmap"]]
    return [np.append(picture, row_score) for picture, row_score in zip(maps, rows["score"], strict=True)]


def inspecting(files: list[Path], model: Path) -> Seen:
    judge = Model(model, "tiny").judge
    found = [judge(file.read_bytes(), file.name, LIMIT) for file in files]
    return [np.append(photograph.judged.ravel(), detection.anomaly_map) for photograph, detection in found]


def feedback(files: list[Path], model: Path) -> Seen:
    Path("data/thing/good").mkdir(parents=True)
    validate = Validate(masks="optional", modes=("RGB", "L", "RGBA", "LA", "P", "I;16", "I;16B", "CMYK", "1", "F", "I"))
    params = Params(prepare=Prepare(layout="folder", root=Path("data")), validate=validate)
    return training(give_feedback(files, Statement("thing", None, "Ada"), params, Path("log.jsonl")), model)


def pillow_images(files: list[Path], model: Path) -> Seen:
    # Pillow itself scrambles an uncompressed TIFF that is to be turned, where it opens it by its path.
    images = [Image.open(io.BytesIO(file.read_bytes())) for file in files]
    detections = Detector.from_pretrained(model).detect(images)
    return [detection.anomaly_map for detection in detections]


def endpoint_captions(files: list[Path], model: Path) -> Seen:
    frame = pd.DataFrame({"image_id": [file.name for file in files], "path": [str(file) for file in files]})
    with Endpoint(lambda *_: completion("A grey thing.")) as endpoint:
        captioner = {"kind": "openai", "base_url": endpoint.url, "model": "tiny", "concurrency": 1}
        caption_images(frame, Path(), Path(), Caption(captioner=captioner), LIMIT, Path("captions.sqlite"))
    return [np.asarray(image_of(request)) for request in endpoint.requests]


def described_captions(files: list[Path], model: Path) -> Seen:
    (captions,) = Describe(LIMIT).caption([(file.name, file) for file in files])
    return [np.frombuffer(captions[file.name].encode(), np.uint8) for file in files]


ENTRANCES = [
    training,
    evaluation,
    scoring,
    serving,
    inspecting,
    feedback,
    pillow_images,
    endpoint_captions,
    described_captions,
]


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda entrance: entrance.__name__)
def test_an_entrance_sees_the_same_pixels_whatever_the_encoding(
    entrance: Callable[[list[Path], Path], Seen], files, model
):
    first, *others = entrance(files, model)
    different = {
        file.name: seen.shape
        for file, seen in zip(files[1:], others, strict=True)
        if seen.shape != first.shape or abs(seen.astype(float) - first).max() > 1e-6
    }
    assert len(files) > 8 and not different


def test_training_scoring_serving_and_the_detector_agree_on_a_photograph(files, model):
    (file, *_) = files
    (expected,) = Detector.from_pretrained(model).detect([np.array(Image.open(file))])
    assert scoring([file], model)[0][0] == pytest.approx(expected.score, abs=1e-6)
    assert serving([file], model)[0][-1] == pytest.approx(expected.score, abs=1e-6)
    assert inspecting([file], model)[0][-SIZE * SIZE :] == pytest.approx(expected.anomaly_map.ravel(), abs=1e-6)
    (trained,) = training([file], model)
    assert Detector.from_pretrained(model).detect([trained])[0].score == pytest.approx(expected.score, abs=1e-6)
