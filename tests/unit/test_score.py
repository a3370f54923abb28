"""`vlmdiff score`: sources, rows, bad images, what is not judged twice, several processes."""

import os
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from tests.tiny import SIZE, tiny_detector
from vlmdiff.cli import app
from vlmdiff.core.errors import InputError
from vlmdiff.data.statistics import image_statistics
from vlmdiff.detection.detector import Detector

STATISTICS = ["brightness", "contrast", "sharpness", "red", "green", "blue"]
# Of one thread each: more would wait for each other on two cores.
TWO = "env OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_machines=1 --mixed_precision=no --dynamo_backend=no"
TWO = [*TWO.split(), "--main_process_port=0", "--num_processes=2", "-m", "vlmdiff.cli", "score"]


def normal(generator: np.random.Generator, height: int = SIZE, width: int = SIZE) -> Image.Image:
    pixels = np.array([60, 120, 180]) + generator.integers(-20, 20, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def defective(generator: np.random.Generator, height: int = SIZE, width: int = SIZE) -> Image.Image:
    image = normal(generator, height, width)
    image.paste("white", (width // 2, height // 4, width - 2, height - 2))
    return image


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    generator = np.random.default_rng(0)
    detector = tiny_detector(samples=1, steps=1)
    detector.calibrate([np.array(normal(generator)) for _ in range(40)])
    detector.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A workspace with five normal photographs and five defective ones, in a folder and one in it."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("{}")
    generator = np.random.default_rng(1)
    Path("new/deep").mkdir(parents=True)
    for i in range(5):
        normal(generator, 48, 80).save(f"new/good{i}.png")
        defective(generator, 80, 48).save(f"new/deep/bad{i}.JPG", quality=95)
    return tmp_path


def score(*arguments: str | Path, out: str = "out") -> str:
    """What the command prints. Raises what it raised."""
    result = CliRunner().invoke(app, ["score", *map(str, arguments), "--out", out], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def rows(out: str = "out") -> pd.DataFrame:
    frame = pd.read_parquet(out).set_index("path", verify_integrity=True)
    return frame.rename(index=lambda path: os.path.relpath(path)).sort_index()


def test_a_row_says_what_the_detector_and_the_photograph_say(place, model):
    output = score("new", "--model", model, "--heatmaps")
    found = rows()
    files = sorted(map(str, [*Path("new").glob("*.png"), *Path("new/deep").glob("*.JPG")]))
    assert list(found.index) == files
    images = [np.array(Image.open(file)) for file in files]
    expected = Detector.from_pretrained(model).detect(images)
    assert 0 < sum(detection.is_anomalous for detection in expected) < len(files)
    for file, image, detection in zip(files, images, expected, strict=True):
        row = found.loc[file]
        assert row["image_id"] == sha256(Path(file).read_bytes()).hexdigest()
        assert row["score"] == pytest.approx(detection.score, abs=1e-5)
        assert row["is_anomalous"] == detection.is_anomalous and pd.isna(row["error"])
        regions = detection.scaled_regions(image.shape[1], image.shape[0])
        assert [tuple(map(round, region.values())) for region in row["regions"]] == [
            tuple(map(round, vars(region).values())) for region in regions
        ]
        assert (row["width"], row["height"]) == (image.shape[1], image.shape[0])
        assert row[STATISTICS].to_dict() == pytest.approx({k: image_statistics(image)[k] for k in STATISTICS})
        if detection.is_anomalous:
            assert Image.open(Path("out", row["heatmap"])).size == (image.shape[1], image.shape[0])
        else:
            assert pd.isna(row["heatmap"])
    assert len(list(Path("out/_heatmaps").iterdir())) == found["is_anomalous"].sum()
    assert found["model"].unique().tolist() == [
        f"sha256:{sha256((model / 'detector.json').read_bytes()).hexdigest()[:16]}"
    ]
    assert "10 images" in output and f"{found['is_anomalous'].sum()} alarms" in output and "images a second" in output


def test_columns_have_their_types_where_none_has_a_value(place, model):
    Path("text.png").write_text("no image")
    runner = CliRunner().invoke(app, ["score", "text.png", "--model", str(model), "--out", "errors"])
    assert runner.exit_code == 1
    score("new", "--model", model)
    assert pq.read_schema(next(Path("errors").glob("part-*"))) == pq.read_schema(next(Path("out").glob("part-*")))


def test_sources_are_photographs_folders_patterns_and_tables_each_photograph_once(place, model):
    Path("new/.hidden.png").write_bytes(Path("new/good0.png").read_bytes())
    Path("new/notes.txt").write_text("no photograph")
    Path("new/table.csv").write_text("path,comment\ngood0.png,first\n\ndeep/bad0.JPG,\n")
    pd.DataFrame({"path": ["new/good1.png"]}).to_parquet("table.parquet")
    score("new/good2.png", "new/table.csv", "table.parquet", "new/**/bad[01].*", "--model", model)
    assert list(rows().index) == [
        "new/deep/bad0.JPG",
        "new/deep/bad1.JPG",
        "new/good0.png",
        "new/good1.png",
        "new/good2.png",
    ]
    # The dataset lies among the photographs: its heatmaps are none.
    score("new", "--model", model, "--heatmaps", out="new/scores")
    score("new", "--model", model, "--heatmaps", out="new/scores")
    assert len(rows("new/scores")) == 10


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("new/gone.png", r"new/gone\.png does not exist"),
        ("new/*.bmp", r"new/\*\.bmp has no photographs"),
        ("empty", "empty has no photographs"),
        ("outside.csv", r"outside\.csv, line 2: \.\./x\.png leaves"),
        ("nameless.csv", r"nameless\.csv has no column `path`, only file"),
        ("twice.csv", r"good0\.png is listed twice"),
        ("odd", r"\\udcff\.png' is not a name in UTF-8"),
        ("short.csv", r"short\.csv, line 2: 1 cells for 2 columns"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused_and_nothing_is_written(place, model, source, words):
    Path("empty").mkdir()
    Path("odd").mkdir()
    Path("odd", os.fsdecode(b"\xff.png")).touch()
    Path("outside.csv").write_text("path\n../x.png\n")
    Path("nameless.csv").write_text("file\nnew/good0.png\n")
    Path("twice.csv").write_text("path,class_name\nnew/good0.png,nut\nnew/good0.png,bolt\n")
    Path("short.csv").write_text("path,class_name\nnew/good0.png\n")
    with pytest.raises(InputError, match=words):
        score("new", source, "--model", model)
    assert not Path("out").exists()


def test_images_that_cannot_be_read_have_a_row_that_says_why_and_the_others_are_judged(place, model):
    Path("new/empty.png").touch()
    Path("new/text.jpg").write_text("no image")
    whole = Path("new/good0.png").read_bytes()
    Path("new/truncated.png").write_bytes(whole[: len(whole) // 2])
    Path("new/table.csv").write_text("path\ngone.png\n")
    output = score("new", "new/table.csv", "--model", model)
    found = rows()
    bad = found[found["error"].notna()]
    assert len(found) == 14 and list(bad.index) == [
        f"new/{n}" for n in ("empty.png", "gone.png", "text.jpg", "truncated.png")
    ]
    assert bad["score"].isna().all() and bad["regions"].isna().all() and bad["brightness"].isna().all()
    assert found[found["error"].isna()]["score"].notna().all()
    for name, words in {
        "empty": "not an image",
        "text": "not an image",
        "truncated": "truncated",
        "gone": "No such file",
    }.items():
        (error,) = bad.loc[bad.index.str.contains(name), "error"]
        assert words in error and error in output.replace("\n", " ")
    assert "4 could not be read" in output
    # The others are judged once; these are tried again.
    assert "10 of them scored before; 4 new" in score("new", "new/table.csv", "--model", model)
    assert len(rows()) == 14
    Path("new/gone.png").write_bytes(whole)
    Path("new/truncated.png").write_bytes(whole)
    assert "10 of them scored before; 4 new" in score("new", "new/table.csv", "--model", model)
    assert len(rows()) == 14 and rows()["error"].notna().sum() == 2


def test_the_command_fails_where_nothing_can_be_judged(place, model):
    Path("text.png").write_text("no image")
    for _ in range(2):
        result = CliRunner().invoke(app, ["score", "text.png", "--model", str(model), "--out", "out"])
        assert result.exit_code == 1 and "1 image by" in result.output
    assert list(rows().index) == ["text.png"]


def test_only_new_and_changed_photographs_are_judged_again(place, model):
    score("new", "--model", model, "--heatmaps")
    before = rows()
    times = {part: part.stat().st_mtime_ns for part in Path("out").glob("part-*")}
    assert "10 of them scored before" in score("new", "--model", model)
    assert {part: part.stat().st_mtime_ns for part in Path("out").glob("part-*")} == times
    generator = np.random.default_rng(2)
    normal(generator, 48, 48).save("new/more.png")
    # An alarm becomes a normal photograph.
    normal(generator, 48, 48).save("new/deep/bad0.JPG", quality=95)
    assert "9 of them scored before" in score("new", "--model", model, "--heatmaps")
    found = rows()
    assert len(found) == 11
    same = before.index.drop("new/deep/bad0.JPG")
    pd.testing.assert_frame_equal(found.loc[same], before.loc[same])
    changed = found.loc["new/deep/bad0.JPG"]
    assert changed["width"] == 48 and changed["scored_at"] > before["scored_at"].max()
    assert not Path("out", before.loc["new/deep/bad0.JPG", "heatmap"]).exists() or changed["is_anomalous"]


def test_two_models_do_not_share_a_folder(place, model, tmp_path):
    other = tmp_path / "other"
    detector = Detector.from_pretrained(model)
    detector.calibrate([np.array(normal(np.random.default_rng(7))) for _ in range(5)])
    detector.save_pretrained(other)
    score("new", "--model", model)
    before = rows()
    with pytest.raises(InputError, match=r"out has scores by sha256:\w+, and this is sha256:\w+"):
        score("new", "--model", other)
    pd.testing.assert_frame_equal(rows(), before)


def test_a_folder_of_other_things_or_of_another_run_is_refused(place, model):
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("mine")
    with pytest.raises(InputError, match=r"mine holds other files \(letter\.txt\)"):
        score("new", "--model", model, out="mine")
    score("new", "--model", model)
    with FileLock("out/.lock"), pytest.raises(InputError, match="another process holds the folder out"):
        score("new", "--model", model)


@pytest.fixture
def many(place) -> Path:
    """As many photographs as fill several parts."""
    generator = np.random.default_rng(3)
    Path("many").mkdir()
    for i in range(700):
        normal(generator, 8, 8).save(f"many/{i:04}.bmp")
    return place / "many"


def test_after_a_kill_nothing_in_the_dataset_is_judged_twice(many, model):
    command = [sys.executable, "-m", "vlmdiff.cli", "score", "many", "--model", str(model), "--out", "out"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (written := list(Path("out").glob("part-*"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    before = rows()
    assert written and 0 < len(before) < 700
    output = score("many", "--model", model)
    assert f"700 images by {before['model'].iloc[0]}, {len(before)} of them scored before" in output
    found = rows()
    assert len(found) == 700
    # Those that were there are as they were, to the time at which they were judged.
    pd.testing.assert_frame_equal(found.loc[before.index], before)
    assert not list(Path("out").glob(".part-*"))


@pytest.mark.services
def test_two_processes_judge_each_photograph_once_and_as_one_does(many, model):
    done = subprocess.run([*TWO, "many", "new", "--model", model, "--out", "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("score: 710 images") == 1
    writers = {part.stem.rpartition("-")[2] for part in Path("two").glob("part-*")}
    assert writers == {"0", "1"}
    score("many", "new", "--model", model, out="one")
    two, one = rows("two"), rows("one")
    assert list(two.index) == list(one.index) and len(two) == 710
    assert two["score"].to_numpy() == pytest.approx(one["score"].to_numpy(), abs=1e-5)
    # Together they go on where either left off.
    again = subprocess.run([*TWO, "many", "new", "--model", model, "--out", "one"], capture_output=True, text=True)
    assert again.returncode == 0 and "710 of them scored before" in again.stdout
    pd.testing.assert_frame_equal(rows("one"), one)


def test_a_score_does_not_depend_on_order_companions_working_directory_or_locale(place, model):
    Path("params.yaml").write_text("# für alle Prüflinge\n{}\n", encoding="utf-8")
    score("new", "--model", model)
    score("new/deep/bad4.JPG", "new/good0.png", "--model", model, out="few")
    (place / "elsewhere").mkdir()
    files = sorted(map(str, (place / "new").rglob("*.*")), reverse=True)
    # ASCII, as in a bare container; Python takes UTF-8 there unless it is told not to.
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "vlmdiff.cli", "score", *files, "--model", model, "--out", "../other"]
    done = subprocess.run(
        [*command, "--params", "../params.yaml"],
        cwd=place / "elsewhere",
        env=os.environ | locale,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    all_of_them, few, other = (rows(out)["score"] for out in ("out", "few", "other"))
    assert other.to_dict() == pytest.approx(all_of_them.to_dict(), abs=1e-5) and len(other) == 10
    assert few.to_dict() == pytest.approx(all_of_them[few.index].to_dict(), abs=1e-5) and len(few) == 2


def test_statistics_of_a_photograph_are_those_of_its_light_contrast_and_focus():
    flat = np.full((6, 4, 3), (10, 20, 30), np.uint8)
    found = image_statistics(flat)
    assert (found["red"], found["green"], found["blue"]) == (10, 20, 30)
    assert (found["contrast"], found["sharpness"], found["width"], found["height"]) == (0, 0, 4, 6)
    board = (np.indices((16, 16)).sum(axis=0) % 2 * 100).astype(np.uint8)
    found = image_statistics(np.stack([board] * 3, axis=-1))
    # Each of the four neighbours differs by 100, up or down.
    assert (found["brightness"], found["contrast"], found["sharpness"]) == pytest.approx((50, 50, 400**2))
    photograph = defective(np.random.default_rng(0), 64, 64)
    blurred = photograph.filter(ImageFilter.GaussianBlur(2))
    assert image_statistics(np.array(blurred))["sharpness"] < image_statistics(np.array(photograph))["sharpness"] / 10
    assert image_statistics(np.zeros((1, 2, 3), np.uint8))["sharpness"] == 0
