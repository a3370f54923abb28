"""What a detector can find: defects of known size and contrast, and the curve that is fitted to them."""

import numpy as np
import pytest

from tests.tiny import SIZE, tiny_detector
from vlmdiff.data.synthesised import LENGTH, HeldOut, mark
from vlmdiff.detection.normals import Normal
from vlmdiff.evaluation.detectable import GRID, WIDTHS, content, measure, said


@pytest.mark.parametrize(("kind", "area"), [("spot", np.pi / 4), ("scratch", LENGTH)])
@pytest.mark.parametrize("across", [2, 4, 7.5])
def test_a_mark_has_its_size_and_contrast(kind, area, across):
    image = np.full((64, 64, 3), 200, np.uint8)
    mask = mark(image, kind, across, 50, (30, 34), 0.7)
    assert mask.sum() == pytest.approx(area * across**2, rel=0.3)
    rows, columns = np.nonzero(mask)
    assert (columns.mean(), rows.mean()) == pytest.approx((29.5, 33.5), abs=0.6)
    assert int(image.min()) == pytest.approx(150, abs=2 if across > 2 else 20) and (image[0] == 200).all()
    dark = np.full((64, 64, 3), 20, np.uint8)
    mark(dark, kind, across, 50, (30, 34), 0.7)
    assert int(dark.max()) == pytest.approx(70, abs=2 if across > 2 else 20)


def test_what_is_found_grows_with_size_and_contrast_and_differs_by_class():
    """Grain hides faint marks: the class with more of it is the harder one."""
    rng = np.random.default_rng(0)
    images = [np.clip(rng.normal(128, 4 if i % 2 else 40, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8) for i in range(24)]
    classes = ["smooth" if i % 2 else "rough" for i in range(24)]
    detector = tiny_detector(samples=1, steps=1)
    detector.learn(images, [Normal(str(i), f"{i}.png", name) for i, name in enumerate(classes)])
    detector.calibrate(images, products=classes)
    ground = HeldOut(images, classes)
    found = measure(detector, ground, 20, 16)
    assert [one.class_name for one in found] == ["rough", "smooth"]
    assert all(one.drawn == 10 * GRID * GRID for one in found)
    for one in found:
        for kind, widths in WIDTHS.items():
            faint, clear = (np.array(one.curve[kind][contrast]) for contrast in ("faint", "clear"))
            assert len(faint) == len(widths) and (np.diff(clear) >= 0).all()
            smallest = one.smallest[kind]["clear"]
            assert smallest is None or widths[0] * SIZE - 0.1 <= smallest <= widths[-1] * SIZE + 0.1
    again = measure(detector, ground, 20, 16)
    assert again == found
    # A budget of less than an image a class is one each.
    assert [one.drawn for one in measure(detector, ground, 0, 16)] == [GRID * GRID] * 2


def test_what_is_found_is_said_in_words():
    widths = {"spot": [1.0, 12.0], "scratch": [0.5, 3.5]}
    one = {"smallest": {"spot": {"clear": 6.2, "faint": None}, "scratch": {"clear": 2.0, "faint": None}}}
    assert said(one, "clear", widths) == "spots from 6 px, scratches from 2×12 px"
    assert said(one, "faint", widths) == "spots not even at 12 px, scratches not even at 4×21 px"
    assert content([], 64, 1.23)["widths"]["spot"][0] == pytest.approx(64 * WIDTHS["spot"][0], abs=0.01)
