"""The demo factory: the same bytes from the same seed, laws kept, masks exact."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from vlmdiff.data.demo import PRODUCTS, VISIBLE, make_demo, render

SMALL = {"train": 2, "test_good": 1, "test_per_defect": 1, "size": 64}
DEFECTS = [(name, defect) for name, (_, defects) in PRODUCTS.items() for defect in defects]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder, seed=3, **SMALL)
    return folder


def test_a_seed_gives_the_same_bytes_and_another_seed_others(demo, tmp_path):
    make_demo(tmp_path / "again", seed=3, **SMALL)
    make_demo(tmp_path / "other", seed=4, **SMALL)
    first, again, other = digests(demo), digests(tmp_path / "again"), digests(tmp_path / "other")
    assert first == again
    assert first.keys() == other.keys()
    photographs = [name for name in first if "ground_truth" not in name]
    assert all(first[name] != other[name] for name in photographs)


def test_an_image_does_not_depend_on_how_many_are_made(demo, tmp_path):
    make_demo(tmp_path, seed=3, **{**SMALL, "train": 3, "test_per_defect": 2})
    more = digests(tmp_path)
    assert all(more[name] == digest for name, digest in digests(demo).items())


def test_the_folder_is_mvtec_ads_layout_with_a_mask_for_every_defect(demo):
    assert {path.name for path in demo.iterdir()} == set(PRODUCTS)
    for name, defect in DEFECTS:
        photograph = Image.open(demo / name / "test" / defect / "000.png")
        mask = np.asarray(Image.open(demo / name / "ground_truth" / defect / "000_mask.png"))
        assert photograph.size == (64, 64) and mask.shape == (64, 64)
        assert set(np.unique(mask)) == {0, 255}


def test_there_are_five_products_and_five_kinds_of_defect_at_least():
    assert len(PRODUCTS) >= 5
    assert len({defect for _, defect in DEFECTS}) >= 5


@pytest.mark.parametrize(("name", "defect"), DEFECTS)
def test_a_mask_covers_what_differs_and_nothing_else(name, defect):
    for index in range(4):
        broken, mask = render(name, defect, (index,), 128)
        whole, nothing = render(name, None, (index,), 128)
        assert not nothing.any()
        assert 0.003 < mask.mean() < 0.2
        difference = np.abs(broken.astype(float) - whole).max(axis=2) / 255
        # Both have the same noise; rounding to 8 bits adds two halves of a level.
        # What an outline encloses belongs to it: a tile that is turned shows at its edges only.
        enclosed = ndimage.binary_fill_holes(ndimage.binary_dilation(difference > VISIBLE / 2, iterations=2))
        assert enclosed[mask].mean() > 0.9
        stray = (difference > VISIBLE + 1 / 255) & ~mask
        assert stray.sum() < 0.1 * mask.sum()


def test_normal_photographs_of_a_class_differ_visibly():
    for name in PRODUCTS:
        images = np.stack([render(name, None, (index,), 64)[0] for index in range(6)]).astype(float)
        pairs = [np.abs(images[i] - images[j]).mean() for i in range(6) for j in range(i)]
        assert min(pairs) > 4
