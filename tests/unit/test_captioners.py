"""Captions from measurements of images with known answers, and captions that the user brings."""

import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from vlmdiff.captions.captioners import caption_images
from vlmdiff.captions.describe import describe
from vlmdiff.captions.files import read_captions, write_captions
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Caption

SIDE = 128


def drawing(background="white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE, SIDE), background)
    return image, ImageDraw.Draw(image)


def disc(colour, background="white") -> Image.Image:
    image, draw = drawing(background)
    draw.ellipse([32, 32, 96, 96], fill=colour)
    return image


def shape(name: str) -> Image.Image:
    image, draw = drawing()
    match name:
        case "round":
            draw.ellipse([24, 24, 104, 104], fill="blue")
        case "oval":
            draw.ellipse([20, 38, 108, 90], fill="blue")
        case "square":
            draw.polygon([(64, 20), (108, 64), (64, 108), (20, 64)], fill="blue")  # stands on a corner
        case "rectangular":
            draw.rectangle([20, 40, 108, 88], fill="blue")
        case "long narrow":
            draw.rectangle([14, 56, 114, 72], fill="blue")
        case "triangular":
            draw.polygon([(64, 20), (110, 100), (18, 100)], fill="blue")
        case "many-cornered":
            draw.regular_polygon((64, 64, 45), 6, fill="blue")
        case "branching":
            draw.rectangle([54, 14, 74, 114], fill="blue")
            draw.rectangle([14, 54, 114, 74], fill="blue")
    return image


def dots(rows: int, columns: int) -> Image.Image:
    image, draw = drawing()
    for y in (np.arange(rows) + 0.5) * SIDE / rows:
        for x in (np.arange(columns) + 0.5) * SIDE / columns:
            draw.ellipse([x - 9, y - 9, x + 9, y + 9], fill="green")
    return image


def waves(direction: float, period: float) -> np.ndarray:
    """Ridges that run along `direction` (degrees, counterclockwise from the right), in [-1, 1]."""
    y, x = np.mgrid[:SIDE, :SIDE]
    turn = np.radians(direction)
    return np.sin(2 * np.pi * (x * np.sin(turn) + y * np.cos(turn)) / period)


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")


def as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    return Image.open(buffer).convert("RGB")


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 4, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def dimmer(image: Image.Image) -> Image.Image:
    """Ninety-six hundredths of the light on the left, and a tenth less of that on the right."""
    light = np.linspace(0.96, 0.87, image.width)[None, :, None]
    return Image.fromarray((np.asarray(image) * light).astype(np.uint8))


COLOURS = {
    "black": "black",
    "grey": "gray",
    "white": "white",
    "red": "red",
    "dark red": (110, 10, 10),
    "pink": "hotpink",
    "orange": "darkorange",
    "brown": "saddlebrown",
    "yellow": "yellow",
    "olive": "olive",
    "green": "green",
    "light green": "lightgreen",
    "turquoise": (0, 160, 160),
    "blue": "royalblue",
    "dark blue": "navy",
    "purple": "purple",
}
SHAPES = ["round", "oval", "square", "rectangular", "long narrow", "triangular", "many-cornered", "branching"]


@pytest.mark.parametrize("name", COLOURS)
def test_the_colour_is_named(name):
    background = "dimgray" if name in ("white", "black") else "white"
    caption = describe(disc(COLOURS[name], background))
    assert caption.startswith(f"One round {name} object in the middle of a")
    assert f"{'grey' if background == 'dimgray' else 'white'} background." in caption


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_is_named(name):
    caption = describe(shape(name))
    assert re.fullmatch(rf"One (small |large )?{name} blue object in the middle of a white background\..*", caption)


def test_holes_and_parts_on_an_object_are_seen():
    image = shape("rectangular")
    draw = ImageDraw.Draw(image)
    draw.ellipse([26, 54, 46, 74], fill="white")
    for x in (60, 75, 90):
        draw.ellipse([x, 60, x + 9, 69], fill="yellow")
    caption = describe(image)
    assert "One rectangular blue object with one hole" in caption
    assert "On it three round yellow parts in a row." in caption


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (1, 2, "Two round green parts on a white background."),
        (1, 4, "Four round green parts in a row on a white background."),
        (4, 1, "Four round green parts in a column on a white background."),
        (2, 3, "Six round green parts in two rows of three on a white background."),
    ],
)
def test_parts_are_counted_and_their_order_seen(rows, columns, words):
    assert describe(dots(rows, columns)) == words


@pytest.mark.parametrize(
    ("direction", "words"),
    [
        (0, "horizontal stripes"),
        (10, "horizontal stripes"),
        (45, "diagonal stripes rising to the right"),
        (90, "vertical stripes"),
        (135, "diagonal stripes falling to the right"),
        (170, "horizontal stripes"),
    ],
)
def test_the_direction_of_stripes_is_seen(direction, words):
    assert words in describe(grey(128 + 60 * waves(direction, 12)))


@pytest.mark.parametrize(("stripes", "words"), [(5, "about five"), (9, "about nine"), (20, "about 20")])
def test_stripes_are_counted(stripes, words):
    assert f"{words} across" in describe(grey(128 + 60 * waves(90, SIDE / stripes)))


def test_textures_are_told_apart():
    rng = np.random.default_rng(0)
    lattice = grey(128 + 30 * (waves(0, 16) + waves(90, 16)))
    assert describe(Image.new("RGB", (SIDE, SIDE), "gray")) == "A smooth grey surface fills the picture."
    assert "regular pattern repeating about eight times across" in describe(lattice)
    assert "fine grain" in describe(grey(128 + rng.normal(0, 30, (SIDE, SIDE))))
    blobs = np.kron(rng.normal(0, 30, (SIDE // 8, SIDE // 8)), np.ones((8, 8)))
    assert "coarse grain" in describe(grey(128 + blobs))


@pytest.mark.parametrize("disturb", [as_jpeg, noisy, dimmer])
def test_compression_noise_and_light_do_not_change_a_caption(disturb):
    images = [shape(name) for name in SHAPES] + [disc("red", "dimgray"), dots(2, 3), dots(1, 4)]
    images += [grey(128 + 60 * waves(direction, 12)) for direction in (0, 45, 90, 135)]
    assert [describe(disturb(image)) for image in images] == [describe(image) for image in images]


@pytest.mark.parametrize("size", [(1, 1), (2, 700), (3000, 5), (33, 31), (640, 480)])
def test_any_size_has_a_caption(size):
    assert describe(Image.new("RGB", size, "navy")) == "A smooth dark blue surface fills the picture."
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    assert describe(Image.fromarray(noise)).endswith(".")


def test_another_process_says_the_same(tmp_path):
    images = [shape("oval"), dots(2, 3), grey(128 + 60 * waves(45, 12)), disc("orange", "navy")]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    code = (
        "import sys; from PIL import Image; from vlmdiff.captions.describe import describe\n"
        "for file in sys.argv[1:]: print(describe(Image.open(file).convert('RGB')))"
    )
    files = sorted(map(str, tmp_path.iterdir()))
    run = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [describe(image) for image in images]


# --- the stage's function, over a dataset on disk


@pytest.fixture
def dataset(tmp_path) -> pd.DataFrame:
    """Manifest rows of four photographs under tmp_path: two to train, one to validate, one broken to test."""
    rows = []
    for path, split, colour in [
        ("thing/train/good/0.png", "train", "red"),
        ("thing/train/good/1.png", "train", "green"),
        ("thing/train/good/2.png", "validation", "blue"),
        ("thing/test/hole/0.png", "test", "black"),
    ]:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        disc(colour).save(file)
        image_id = hashlib.sha256(file.read_bytes()).hexdigest()
        rows.append({"image_id": image_id, "path": path, "class_name": "thing", "split": split})
    frame = pd.DataFrame(rows)
    return frame.assign(is_anomalous=frame["split"] == "test")


def captioned(frame: pd.DataFrame, root: Path, **params) -> pd.DataFrame:
    return caption_images(frame, root, root, Caption(**params), 10**8, root / ".cache" / "captions.sqlite")


def bring(root: Path, *lines: object, encoding="utf-8") -> None:
    """Write captions.jsonl into the dataset: objects as JSON, text as it is."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (root / "captions.jsonl").write_bytes(text.encode(encoding))


def test_every_image_of_every_split_is_described(dataset, tmp_path):
    result = captioned(dataset, tmp_path)
    colours = ["red", "green", "blue", "black"]
    assert [c in text for c, text in zip(colours, result["caption"], strict=True)] == [True] * 4
    assert list(result["path"]) == list(dataset["path"])


def test_a_touched_photograph_changes_only_its_caption(dataset, tmp_path, capsys):
    before = captioned(dataset, tmp_path)
    assert "4 requested" in capsys.readouterr().out
    disc("yellow").save(tmp_path / dataset.at[0, "path"])
    dataset.at[0, "image_id"] = hashlib.sha256((tmp_path / dataset.at[0, "path"]).read_bytes()).hexdigest()
    after = captioned(dataset, tmp_path)
    assert "1 requested" in capsys.readouterr().out
    assert "yellow" in after["caption"][0] and list(after["caption"][1:]) == list(before["caption"][1:])


def test_the_written_captions_are_sorted_and_the_same_bytes_again(dataset, tmp_path):
    result = captioned(dataset, tmp_path).assign(class_name='a "class"\nwith 漢字 and 🙂')
    one, two = tmp_path / "one" / "captions.jsonl", tmp_path / "two.jsonl"
    write_captions(result, one)
    write_captions(result.sample(frac=1, random_state=0), two)
    assert one.read_bytes() == two.read_bytes()
    rows = [json.loads(line) for line in one.read_text().splitlines()]
    assert [row["image_id"] for row in rows] == sorted(dataset["image_id"])
    assert list(rows[0]) == ["image_id", "path", "class_name", "split", "caption"]
    assert read_captions(one) == dict(zip(result["image_id"], result["caption"], strict=True))


def test_captions_that_were_not_made_are_missed_by_name(tmp_path):
    with pytest.raises(InputError, match=r"captions\.jsonl does not exist. Run vlmdiff caption"):
        read_captions(tmp_path / "captions.jsonl")


def test_captions_of_a_file_go_to_their_images(dataset, tmp_path):
    texts = ["a red\ndisc", "ein grünes Rad 🙂", " the blue one "]
    bring(
        tmp_path,
        {"path": "./thing/train/good/0.png", "caption": texts[0]},
        "",
        {"image_id": dataset.at[1, "image_id"], "caption": texts[1]},
        {"path": dataset.at[2, "path"], "caption": texts[2]},
        encoding="utf-8-sig",
    )
    result = captioned(dataset, tmp_path, captioner={"kind": "file", "file": "captions.jsonl"})
    assert list(result["caption"][:3]) == texts
    assert result["caption"].isna().tolist() == [False, False, False, True]  # a test image may lack one
    write_captions(result, tmp_path / "out.jsonl")
    assert sorted(read_captions(tmp_path / "out.jsonl").values()) == sorted(texts)


def test_an_edited_file_is_read_again(dataset, tmp_path):
    for text in ("first", "second"):
        bring(tmp_path, *({"path": path, "caption": f"{text} {path}"} for path in dataset["path"]))
        result = captioned(dataset, tmp_path, captioner={"kind": "file", "file": "captions.jsonl"})
        assert list(result["caption"]) == [f"{text} {path}" for path in dataset["path"]]


GOOD = {"path": "thing/train/good/0.png", "caption": "a red disc"}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{caption: nothing}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a red disc"]', "not an object"),
        ({"path": "thing/train/good/1.png", "text": "a disc", "caption": "a disc"}, "unknown key text"),
        ({"caption": "a disc"}, "either `image_id` or `path`"),
        ({"path": "thing/train/good/1.png", "image_id": "0" * 64, "caption": "a disc"}, "either"),
        ({"path": "thing/train/good/1.png"}, "`caption` is missing, empty"),
        ({"path": "thing/train/good/1.png", "caption": " \n"}, "`caption` is missing, empty"),
        ({"path": "thing/train/good/1.png", "caption": ["a disc"]}, "not text"),
        ({"path": "thing/train/good/1.png", "caption": "half a pair \ud83d"}, "surrogates not allowed"),
        ({"path": "thing/train/good/7.png", "caption": "a disc"}, "the manifest has no image 'thing/train/good/7.png'"),
        ({"path": ["thing/train/good/1.png"], "caption": "a disc"}, "is missing, empty or not text"),
        ({"image_id": "0" * 64, "caption": "a disc"}, "the manifest has no image"),
        ({"path": "thing/train/good/0.png", "caption": "again"}, "already has a caption, in line 1"),
    ],
)
def test_a_bad_line_is_named(dataset, tmp_path, line, what):
    bring(tmp_path, GOOD, line)
    with pytest.raises(InputError, match=rf"captions\.jsonl, line 2: .*{re.escape(what)}"):
        captioned(dataset, tmp_path, captioner={"kind": "file", "file": "captions.jsonl"})
    assert not (tmp_path / ".cache").exists()


def test_a_line_that_is_not_utf8_is_named(dataset, tmp_path):
    bring(tmp_path, '{"path": "thing/train/good/0.png", "caption": "grün"}', encoding="latin-1")
    with pytest.raises(InputError, match="line 1: 'utf-8' codec"):
        captioned(dataset, tmp_path, captioner={"kind": "file", "file": "captions.jsonl"})


def test_images_without_a_caption_are_counted_and_the_first_ten_named(dataset, tmp_path):
    more = [dataset.iloc[[0]].assign(image_id=str(i), path=f"thing/train/good/x{i:02}.png") for i in range(15)]
    bring(tmp_path, GOOD)
    with pytest.raises(InputError, match="no caption for 17 of 18 normal train and validation images") as error:
        captioned(pd.concat([dataset, *more]), tmp_path, captioner={"kind": "file", "file": "captions.jsonl"})
    assert len(re.findall(r"thing/train/good/\w+\.png", str(error.value))) == 10


@pytest.mark.parametrize("path", ["../captions.jsonl", "thing/../../captions.jsonl", "/captions.jsonl"])
def test_a_file_outside_the_dataset_is_refused(dataset, tmp_path, path):
    with pytest.raises(InputError, match=r"caption\.captioner\.file: .* DVC tracks only that folder"):
        captioned(dataset, tmp_path, captioner={"kind": "file", "file": path})


def test_a_file_that_is_not_there_is_named(dataset, tmp_path):
    with pytest.raises(InputError, match=r"captions\.jsonl does not exist"):
        captioned(dataset, tmp_path, captioner={"kind": "file", "file": "captions.jsonl"})
