"""Products: recognised by their looks, judged by what is usual for each, and told from what is not known."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny import SIZE, tiny_detector
from vlmdiff.core.errors import InputError
from vlmdiff.detection.calibration import Calibration
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.normals import Normal
from vlmdiff.detection.products import Products, appearance

WIDTH = 24


def rows(count: int, product: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    """Rows of images of a product: around a point of its own, with a covariance that all products share."""
    shared = np.random.default_rng(99).normal(size=(WIDTH, WIDTH)) / WIDTH**0.5
    centre = 8 * np.random.default_rng(product).normal(size=WIDTH)
    return centre + spread * np.random.default_rng([product, seed]).normal(size=(count, WIDTH)) @ shared


@pytest.fixture(scope="module")
def products() -> Products:
    of = [f"product {i}" for i in range(4) for _ in range(40)]
    return Products.fit(np.concatenate([rows(40, i) for i in range(4)]), of)


def test_new_images_of_known_products_are_recognised(products):
    for i in range(4):
        names, known = products(rows(500, i, seed=1))
        assert set(names) == {f"product {i}"} and known.mean() >= 0.99


def test_a_product_that_is_not_known_is_told_from_all_that_are(products):
    for i in range(4, 12):
        assert products(rows(200, i))[1].mean() <= 0.05


def test_one_product_alone_is_told_from_others():
    alone = Products.fit(rows(40, 0), ["the only one"] * 40)
    assert alone(rows(200, 0, seed=1))[1].mean() >= 0.95 and not alone(rows(200, 1))[1].any()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images_and_numbers_that_never_vary_make_products_too(count):
    few = np.concatenate([rows(count, i) for i in range(2)])
    few[:, 0] = 5.0
    found = Products.fit(few, ["a"] * count + ["b"] * count)
    assert found(few)[0] == ["a"] * count + ["b"] * count


def test_the_appearance_of_many_channels_has_one_cell_and_that_of_few_many():
    assert appearance(torch.zeros(2, 128, 32, 32)).shape == (2, 2 * 128)
    assert appearance(torch.zeros(2, 4, 16, 16)).shape == (2, 4 * 8 * 8 + 4)


def values(count: int, level: float, spread: float, rng: np.random.Generator) -> np.ndarray:
    return level + spread * rng.standard_normal((count, 3)) * (1, 0.5, 0.8)


QUIET, NOISY = (0.0, 0.1), (3.0, 1.0)
UNTAUGHT = Calibration(1.0, [1.0, 1.0], 0.0, 1, 0.05)


def alarms(calibration: Calibration, product: str, statistics: np.ndarray) -> np.ndarray:
    scores = calibration.products[product].scores(statistics)
    return calibration.odds(scores, [product] * len(scores)) > 0.5


@pytest.mark.parametrize("images", [12, 40])
def test_each_product_has_false_alarms_as_promised_over_many_splits(images):
    """In the mean over calibrations, also for the noisiest product: the promise is one over calibrations."""
    rng, rates = np.random.default_rng(0), {"quiet": [], "noisy": []}
    for _ in range(200):
        known = np.concatenate([values(images, *QUIET, rng), values(images, *NOISY, rng)])
        calibration, _ = replace(UNTAUGHT, images=2 * images).learn(known, ["quiet"] * images + ["noisy"] * images)
        for name, kind in (("quiet", QUIET), ("noisy", NOISY)):
            rates[name].append(alarms(calibration, name, values(1000, *kind, rng)).mean())
    for found in rates.values():
        # Three standard errors of the mean of the 200 rates.
        assert np.mean(found) <= 0.05 + 3 * np.std(found) / len(found) ** 0.5


def test_a_defect_of_a_quiet_product_is_found_beside_a_noisy_one():
    rng = np.random.default_rng(0)
    known = np.concatenate([values(20, *QUIET, rng), values(20, *NOISY, rng)])
    calibration, scores = replace(UNTAUGHT, images=40).learn(known, ["quiet"] * 20 + ["noisy"] * 20)
    assert np.mean(scores > 0.5) <= 0.05
    # Five to ten standard deviations of the quiet one, and one to two of the noisy one.
    unusual = np.full((1, 3), 1.0)
    assert alarms(calibration, "quiet", unusual).all() and not alarms(calibration, "noisy", unusual).any()
    # What stands out in one statistic alone is as unusual as what stands out in all.
    assert alarms(calibration, "quiet", np.diag([1.0, 1.0, 1.0])).all()


def test_a_product_with_enough_images_has_a_threshold_of_its_own():
    rng = np.random.default_rng(0)
    known, of = np.concatenate([values(200, *QUIET, rng), values(199, *NOISY, rng)]), ["quiet"] * 200 + ["noisy"] * 199
    calibration, _ = replace(UNTAUGHT, images=399).learn(known, of)
    assert calibration.products["quiet"].threshold is not None and calibration.products["noisy"].threshold is None
    assert calibration.limit("noisy") == calibration.threshold


def test_an_odd_image_among_the_normal_ones_does_not_hide_defects():
    rng = np.random.default_rng(0)
    known = values(40, *QUIET, rng)
    clean, _ = replace(UNTAUGHT, images=40).learn(known, ["quiet"] * 40)
    spoiled, scores = replace(UNTAUGHT, images=41).learn(np.concatenate([known, np.full((1, 3), 2.0)]), ["quiet"] * 41)
    assert spoiled.map_threshold("quiet") < 1.2 * clean.map_threshold("quiet")
    assert scores[-1] > 0.5 and np.mean(scores > 0.5) <= 0.05


def test_the_p_value_is_a_rank_among_the_normal_images():
    calibration = replace(UNTAUGHT, normal=[0.0, 1.0, 2.0, 3.0])
    assert [calibration.p_value(score) for score in (-1.0, 2.0, 9.0)] == [1.0, 0.6, 0.2]
    assert UNTAUGHT.p_value(1.0) is None


def photographs(colour: int, count: int, seed: int = 0) -> list[np.ndarray]:
    """Images of a product: one colour, with noise."""
    noise = np.random.default_rng([colour, seed]).integers(-3, 4, (count, SIZE, SIZE, 3))
    return list((np.array([[60, 60, 200], [200, 60, 60], [60, 200, 60]])[colour] + noise).astype(np.uint8))


@pytest.fixture(scope="module")
def detector() -> Detector:
    detector = tiny_detector(false_alarm_rate=0.2, samples=1)
    images, of = [*photographs(0, 12), *photographs(1, 12)], ["blue"] * 12 + ["red"] * 12
    detector.learn(images, [Normal(str(i), f"{i}.png", name) for i, name in enumerate(of)])
    detector.calibrate(images, products=of)
    return detector


def test_photographs_are_judged_by_the_product_that_they_show(detector):
    blue, red = detector.detect([*photographs(0, 1, seed=1), *photographs(1, 1, seed=1)])
    assert (blue.product, red.product) == ("blue", "red")
    assert "Product: blue." in blue.explanation and "of 24 normal images" in blue.explanation
    # Told to be the other product, the same photograph is judged as such.
    (told,) = detector.detect(photographs(0, 1, seed=1), products=["red"])
    assert told.product == "red" and told.score != blue.score


def test_a_product_that_the_detector_does_not_know_is_refused_by_name(detector):
    with pytest.raises(InputError, match="does not know the product 'green', only blue, red"):
        detector.detect(photographs(2, 1), products=["green"])


def test_a_photograph_of_an_unknown_product_is_neither_normal_nor_an_alarm_by_chance(detector):
    for found in detector.detect(photographs(2, 4)):
        assert found.product is None and found.verdict == "unknown product"
        assert found.is_anomalous and found.at(1.0).is_anomalous


def test_an_alarm_marks_at_least_one_place_and_a_normal_image_none(detector):
    (found,) = detector.detect(photographs(0, 1, seed=2))
    for threshold in (0.0, 1.0):
        judged = found.at(threshold)
        assert judged.is_anomalous == bool(judged.regions) == bool(judged.marked.any()) == (threshold == 0.0)
    flat = replace(found, score=0.9, anomaly_map=np.full((SIZE, SIZE), 0.2, np.float32)).at(0.5)
    assert flat.is_anomalous and flat.regions and flat.marked.any()


def test_scores_near_the_threshold_are_for_review_where_that_is_asked_for(detector):
    (found,) = detector.detect(photographs(0, 1, seed=2))
    asked = replace(found, review=0.1)
    verdicts = [replace(asked, score=score).at(0.5).verdict for score in (0.39, 0.41, 0.5, 0.59, 0.61)]
    assert verdicts == ["normal", "review", "review", "review", "anomalous"]


def test_several_products_are_calibrated_only_after_they_are_learned():
    with pytest.raises(InputError, match="after `learn`"):
        tiny_detector(samples=1).calibrate(photographs(0, 4), products=["a", "a", "b", "b"])


def test_a_detector_of_an_earlier_release_judges_as_it_did(tmp_path):
    """It had one threshold, on the anomaly map."""
    detector = tiny_detector(samples=1)
    detector.calibrate(photographs(0, 6))
    detector.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "detector.json").read_text())
    for key in ("products", "slope", "normal"):
        del facts["calibration"][key]
    facts["calibration"]["threshold"] = 2.5
    (tmp_path / "detector.json").write_text(json.dumps(facts))
    (tmp_path / "sha256.json").unlink(missing_ok=True)
    earlier = Detector.from_pretrained(tmp_path)
    images = photographs(0, 3, seed=1)
    raw = earlier.evidence(images)[:, 0]
    for found, expected in zip(earlier.detect(images), raw, strict=True):
        np.testing.assert_allclose(found.anomaly_map, expected / (expected + 2.5), rtol=1e-5)
        assert found.score == pytest.approx(found.anomaly_map.max(), rel=1e-5)
        assert found.is_anomalous == (expected.max() > 2.5) and found.p_value is None
