"""Captions that others made: lists of the VLMDiff authors' code, COCO's format, tables; matched by path alone."""

import json
import random
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmdiff.captions.captioners import caption_images
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Caption

PATHS = [
    "bottle/train/good/000.png",
    "bottle/train/good/001.png",
    "cable/train/good/000.png",
    "cable/train/good/007.png",
]
TEXTS = ["A brown bottle.", "Seen from above,\ta bottle.", "Drei Kabel, grün. 🙂", "B"]


def manifest(paths=PATHS) -> pd.DataFrame:
    ids = [f"{i:064}" for i in range(len(paths))]
    return pd.DataFrame({"image_id": ids, "path": paths, "split": "train", "is_anomalous": False})


def brought(root: Path, file: object, name="captions.json", images=None, paths=PATHS) -> list[str]:
    """The captions of `paths` from a file of this content (text as it is, anything else as JSON)."""
    settings = {"kind": "file", "file": name}
    write(root / name, file)
    if images is not None:
        settings["images"] = "images.txt" if isinstance(images, str) else "images.json"
        write(root / settings["images"], images)
    params = Caption(captioner=settings)
    return caption_images(manifest(paths), root, root, params, 10**8, root / "captions.sqlite")["caption"].tolist()


def write(file: Path, content: object) -> None:
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def coco(pairs, **extra) -> dict:
    images = [{"id": 100 + i, "file_name": path, **extra} for i, (path, _) in enumerate(pairs)]
    notes = [{"id": i, "image_id": 100 + i, "caption": text} for i, (_, text) in enumerate(pairs)]
    return {"info": {}, "images": images, "annotations": notes}


def forms(pairs: list[tuple[str, str]]) -> dict[str, dict]:
    paths, texts = map(list, zip(*pairs, strict=True))
    return {
        "object": {"file": dict(pairs)},
        "coco": {"file": coco(pairs, height=3)},
        "table": {"file": "".join(f"{path}\t{text}\n" for path, text in pairs), "name": "captions.tsv"},
        "text table": {"file": "\n".join(f"{path}\t{text}" for path, text in pairs), "name": "captions.txt"},
        "lists": {"file": texts, "images": paths},
        "lists of lists": {"file": [[text] for text in texts], "images": [[path] for path in paths]},
        "text lists": {"file": "\n".join(texts), "name": "captions.txt", "images": "\n".join(paths)},
        "mixed lists": {"file": texts, "images": "\n".join(paths) + "\n"},
    }


@pytest.mark.parametrize("form", forms([("", "")]))
def test_captions_go_to_the_images_of_their_paths_in_any_order(tmp_path, form):
    """Reference defect 10: captions are matched by position; one converter keeps their first character."""
    pairs = list(zip(PATHS, TEXTS, strict=True))
    for seed in range(3):
        shuffled = random.Random(seed).sample(pairs, len(pairs))
        assert brought(tmp_path, **forms(shuffled)[form]) == TEXTS


@settings(deadline=None, max_examples=8)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), min_size=2, max_size=5))
def test_any_text_arrives_as_it_is(texts, tmp_path_factory):
    paths = [f"{i}.png" for i in range(len(texts))]
    for form, arguments in forms(list(zip(paths, texts, strict=True))).items():
        assert brought(tmp_path_factory.mktemp("root"), **arguments, paths=paths) == texts, form


def test_more_than_ten_thousand_captions_are_read(tmp_path):
    paths = [f"{i}.png" for i in range(10_050)]
    pairs = [(path, f"Caption of {path}") for path in paths]
    assert brought(tmp_path, dict(pairs), paths=paths) == [text for _, text in pairs]


def test_a_path_may_have_another_root_or_be_a_name_that_only_one_image_has(tmp_path):
    names = ["/data/mvtec/" + PATHS[0], "good/001.png", "./" + PATHS[2], "007.png"]
    assert brought(tmp_path, dict(zip(names, TEXTS, strict=True))) == TEXTS


def test_a_name_that_several_images_have_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"captions\.json, key '000\.png': .*matches 2 images: bottle/.*cable/"):
        brought(tmp_path, {"000.png": "A bottle or a cable."})


def test_the_end_of_a_name_is_no_name(tmp_path):
    with pytest.raises(InputError, match=r"no caption for 1 of 1 .*: x10\.png"):
        brought(tmp_path, {"10.png": "A thing."}, paths=["x10.png"])


def test_cocos_ids_name_its_images(tmp_path):
    paths = ["train2017/000000000009.jpg", "train2017/000000131074.jpg"]
    assert brought(tmp_path, TEXTS[:2], images=[["131074"], ["9"]], paths=paths) == TEXTS[1::-1]
    annotations = [{"id": 0, "image_id": "131074", "caption": "Many"}, {"id": 1, "image_id": 9, "caption": "Nine"}]
    assert brought(tmp_path, {"annotations": annotations}, paths=paths) == ["Nine", "Many"]


def test_of_several_captions_in_cocos_format_the_first_counts_and_the_rest_are_counted(tmp_path, capsys):
    content = coco(list(zip(PATHS, TEXTS, strict=True)))
    content["annotations"] += [{"id": 9, "image_id": 100, "caption": "Another."}] * 2
    assert brought(tmp_path, content) == TEXTS
    assert "2 more caption(s)" in capsys.readouterr().out


def test_captions_of_images_that_the_manifest_lacks_are_counted(tmp_path, capsys):
    assert brought(tmp_path, dict(zip([*PATHS, "screw/1.png"], [*TEXTS, "A screw."], strict=True))) == TEXTS
    assert "1 caption(s) of images not in the manifest: screw/1.png" in capsys.readouterr().out


def test_a_changed_list_of_images_is_read_again(tmp_path):
    assert brought(tmp_path, TEXTS, images=PATHS) == TEXTS
    assert brought(tmp_path, TEXTS, images=PATHS[::-1]) == TEXTS[::-1]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"file": "{"}, r"captions\.json, in captions\.json: not JSON: .*line 1"),
        ({"file": "[" * 100_000}, "not JSON"),
        ({"file": '{"a.png": "A", "a.png": "B"}'}, "the key 'a.png' occurs twice"),
        ({"file": "3"}, "whole file: captions without paths. Set caption.captioner.images"),
        ({"file": TEXTS}, "whole file: captions without paths. Set caption.captioner.images"),
        ({"file": "\n".join(TEXTS), "name": "captions.txt"}, "line 1: no tab"),
        ({"file": "a", "name": "captions.csv"}, r"captions\.csv has an unknown suffix\. Use \.jsonl"),
        ({"file": TEXTS, "images": PATHS[:3]}, "whole file: 4 captions, but images.json lists 3 images"),
        ({"file": "A\n\nB", "name": "captions.txt", "images": PATHS[:3]}, "line 2: `caption` is missing, empty"),
        ({"file": {"a": 1}, "images": PATHS}, "captions.json must be a list"),
        ({"file": ["A", "B"], "images": [PATHS[0], PATHS[0]]}, "entry 2: .*already has a caption, in entry 1"),
        ({"file": ["A", ["B", "C"]], "images": PATHS[:2]}, "entry 2: `caption` is missing, empty or not text"),
        ({"file": ["A", "B"], "images": [PATHS[0], 7]}, "entry 2: `path` or `image_id` is missing"),
        ({"file": {PATHS[0]: ""}}, "key 'bottle/train/good/000.png': `caption` is missing"),
        ({"file": {"annotations": [{"image_id": "9"}]}}, r"annotations\[0\]: not in COCO's format: KeyError 'caption'"),
        ({"file": {"images": [], "annotations": [{"image_id": 9}]}}, r"annotations\[0\]: not in COCO's format"),
        ({"file": {"images": [{"id": 9}], "annotations": []}}, "images: not in COCO's format: KeyError 'file_name'"),
        ({"file": {"annotations": 3}}, "not in COCO's format"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, arguments, what):
    with pytest.raises(InputError, match=what):
        brought(tmp_path, **arguments)
    assert not (tmp_path / "captions.sqlite").exists()
