"""Detector: calibration, verdicts, regions, saving."""

import json

import numpy as np
import pytest
import torch

from tests.tiny import SIZE, tiny_detector, tiny_pipeline
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import seal, write_json
from vlmdiff.core.params import AutoencoderFeatures, Detection, Latents
from vlmdiff.detection.calibration import conformal_threshold
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.explain import find_regions
from vlmdiff.detection.features import spaces


def photographs(count, seed=0, size=SIZE):
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def detector():
    detector = tiny_detector(false_alarm_rate=0.2)
    detector.calibrate(photographs(20, seed=1))
    return detector


def test_calibration_images_exceed_the_threshold_at_most_at_the_rate():
    scores = tiny_detector(false_alarm_rate=0.2).calibrate(photographs(20, seed=1))
    # Rank ceil(21 * 0.8) = 17 of 20 is the threshold: three are above it.
    assert sum(score > 0.5 for score in scores) == 3


def test_the_verdict_the_score_and_the_regions_agree(detector):
    for detection in detector.detect(photographs(10, seed=2)):
        assert detection.verdict == ("anomalous" if detection.is_anomalous else "normal")
        # The map is one of the things by which the image is judged.
        assert detection.is_anomalous or detection.anomaly_map.max() <= 0.5
        assert detection.is_anomalous == (detection.score > 0.5) == bool(detection.regions)
        assert detection.anomaly_map.shape == (SIZE, SIZE) and detection.anomaly_map.dtype == np.float32
        assert detection.anomaly_map.min() >= 0 and detection.anomaly_map.max() < 1
        assert detection.reconstruction.shape == (SIZE, SIZE, 3) and detection.reconstruction.dtype == np.uint8


def test_batches_do_not_change_a_result(detector):
    images = photographs(5, seed=3)
    together = detector.detect(images, batch_size=5)
    for batch_size in (1, 2):
        for one, other in zip(together, detector.detect(images, batch_size), strict=True):
            np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, atol=1e-5)


def test_a_photograph_of_any_size_is_taken(detector):
    assert detector.detect([photographs(1, size=50)[0][:, :37]])[0].anomaly_map.shape == (SIZE, SIZE)


def test_an_array_that_is_not_a_photograph_is_refused(detector):
    for image in (photographs(1)[0] / 255.0, photographs(1)[0][..., 0], photographs(1)[0].transpose(2, 0, 1)):
        with pytest.raises(InputError, match=r"must be a PIL image or an array of uint8 \(H, W, 3\), not "):
            detector.detect([image])


def test_a_saved_detector_judges_alike(detector, tmp_path):
    detector.save_pretrained(tmp_path)
    loaded = Detector.from_pretrained(tmp_path)
    for one, other in zip(detector.detect(photographs(3)), loaded.detect(photographs(3)), strict=True):
        np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
        assert one.regions == other.regions


class Unsure(Detector):
    """Reconstructs latents a fifth lower than they are, and is three times as unsure of the right half."""

    def reconstruct(self, latents, images, sample, captions=None):
        deviation = torch.full_like(latents[:, 0], 0.1)
        deviation[..., latents.shape[-1] // 2 :] = 0.3
        return latents - 0.2, deviation


@pytest.mark.parametrize("samples", [2, 4])
def test_the_errors_of_antithetic_samples_cancel_where_the_network_is_linear(monkeypatch, samples):
    """A network that always predicts zero is linear, so that its mean over opposite noise depends on no noise."""
    pipeline, images = tiny_pipeline(), photographs(3)
    monkeypatch.setattr(pipeline, "denoise", lambda noisy, *others: (torch.zeros_like(noisy), None))

    def maps(seed, **params):
        features = (Latents(kind="latents"),)
        detector = Detector(pipeline, Detection(features=features, samples=samples, seed=seed, **params))
        detector.calibrate(images)
        return detector.evidence(images)

    np.testing.assert_allclose(maps(0), maps(1), rtol=1e-4)
    alone = [maps(seed, antithetic=False) for seed in (0, 1)]
    assert np.abs(alone[0] / alone[1] - 1).max() > 0.01


def test_each_pair_of_antithetic_samples_has_noise_of_its_own(monkeypatch):
    pipeline, image, asked = tiny_pipeline(), photographs(1), []

    def denoise(noisy, *others):
        asked.append(noisy)
        return torch.zeros_like(noisy), None

    monkeypatch.setattr(pipeline, "denoise", denoise)
    Detector(pipeline, Detection(features=(Latents(kind="latents"),), samples=5)).calibrate(image)
    one, opposite, other, its_opposite, last = asked
    middle = (one + opposite) / 2
    torch.testing.assert_close((other + its_opposite) / 2, middle)
    noises = [one - middle, other - middle, last - middle]
    assert min((a - b).abs().max() for a, b in zip(noises, noises[1:] + noises[:1], strict=True)) > 0.1


def test_samples_of_an_earlier_release_are_drawn_as_they_were(detector, tmp_path):
    detector.save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "detector.json").read_text())
    assert facts["detection"].pop("antithetic") is True
    write_json(tmp_path / "detector.json", facts)
    seal(tmp_path)
    images = photographs(2)
    apart = Detector(detector.pipeline, detector.params.model_copy(update={"antithetic": False}), detector.calibration)
    found = [one.detect(images)[0].anomaly_map for one in (Detector.from_pretrained(tmp_path, "cpu"), apart, detector)]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0


@pytest.mark.parametrize("floor", [1.0, 0.5, None])
def test_a_difference_counts_less_where_the_model_expects_to_be_off(floor):
    features = (Latents(kind="latents"),)
    detector = Unsure(tiny_pipeline(), Detection(features=features, smoothing=0, deviation_floor=floor))
    images = photographs(1)
    detector.calibrate(images)
    (found,) = detector.detect(images)
    odds = found.anomaly_map / (1 - found.anomaly_map)
    usual = ((0.1**2 + 0.3**2) / 2) ** 0.5
    ratio = 1 if floor is None else (0.3 / usual + floor) / (0.1 / usual + floor)
    assert odds[:, 0].mean() / odds[:, -1].mean() == pytest.approx(ratio, rel=1e-2)


def test_pooling_the_score_judges_by_a_broad_difference_alone():
    """Of the same map, a pooled score is lower than the maximum; regions are those of anomalous images only."""
    pipeline = tiny_pipeline()
    pipeline.register_to_config(image_size=64)
    normal, images = photographs(12, seed=1, size=64), photographs(8, seed=2, size=64)
    settings = dict(image_score="pooled_max", false_alarm_rate=0.5, samples=1)
    detector = Detector(pipeline, Detection(**settings))
    scores = detector.calibrate(normal)
    found = detector.detect(images)
    assert {detection.is_anomalous for detection in found} == {True, False}
    for detection in found:
        assert detection.is_anomalous == (detection.score > 0.5) == bool(detection.regions)
    # Rank ceil(13 * 0.5) = 7 of 12 is the threshold: five are above it.
    assert sum(score > 0.5 for score in scores) == 5


def test_a_pooled_score_needs_a_model_large_enough():
    with pytest.raises(InputError, match="57 pixels"):
        tiny_detector(image_score="pooled_max")


CHOICES = [
    dict(solver="dpmsolver++", steps=3),
    dict(spacing="leading", noise_level=999, steps=3),
    dict(captions="image", guidance=4.0),
    dict(captions="image", solver="dpmsolver++", spacing="leading", steps=3, guidance=0.5),
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: " ".join(f"{k}={v}" for k, v in choice.items()))
def test_batches_do_not_change_a_result_whatever_the_parameters(choice):
    detector = tiny_detector(samples=1, **choice)
    images, captions = photographs(3, seed=3), None
    if detector.params.captions == "image":
        captions = ["a red round thing", "", "green stripes"]
    detector.calibrate(images, captions=captions)
    together = detector.detect(images, captions=captions)
    # In other batches, and in other places.
    backwards = detector.detect(images[::-1], 2, captions and captions[::-1])[::-1]
    for one, other in zip(together, backwards, strict=True):
        np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, atol=1e-4)


def test_captions_are_asked_for_where_they_guide_and_refused_where_they_do_not():
    images, captions = photographs(3), ["a red round thing"] * 3
    with pytest.raises(InputError, match="without captions"):
        tiny_detector().calibrate(images, captions=captions)
    guided = tiny_detector(captions="image", samples=1)
    with pytest.raises(InputError, match="needs a caption for each image"):
        guided.calibrate(images)
    guided.calibrate(images, captions=captions)
    with pytest.raises(InputError, match="2 captions for 3 images"):
        guided.detect(images, captions=captions[:2])


def test_a_saved_detector_knows_the_captions_of_its_classes(tmp_path):
    detector = tiny_detector(captions="class", samples=1)
    detector.class_captions = {"ball": "a red round thing", "fabric": "green stripes"}
    classes = ["fabric", "ball", "fabric"]
    captions = detector.captions_of(classes)
    assert captions == ["green stripes", "a red round thing", "green stripes"]
    detector.calibrate(photographs(3), captions=captions)
    detector.save_pretrained(tmp_path)
    loaded = Detector.from_pretrained(tmp_path)
    assert loaded.captions_of(classes) == captions
    with pytest.raises(InputError, match="does not know the class 'cable', only ball, fabric"):
        loaded.captions_of(["ball", "cable"])
    with pytest.raises(InputError, match="captions: none"):
        tiny_detector().captions_of(["ball"])


def test_a_detector_without_threshold_refuses(tmp_path):
    with pytest.raises(InputError, match="calibrate"):
        tiny_detector().detect(photographs(1))


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"detector\.json"):
        Detector.from_pretrained(tmp_path)


def test_regions_are_boxes_areas_and_peaks():
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[1, 1] = anomaly_map[2, 2] = 0.6  # touching at a corner: one region
    anomaly_map[5:8, 6:8] = 0.9
    first, second = find_regions(anomaly_map)
    assert (first.x0, first.y0, first.x1, first.y1, first.area) == (6, 5, 8, 8, 6)
    assert (second.x0, second.y0, second.x1, second.y1, second.area) == (1, 1, 3, 3, 2)
    assert first.peak == pytest.approx(0.9) and second.peak == pytest.approx(0.6)


@pytest.mark.parametrize(("count", "rate", "rank"), [(19, 0.05, 19), (99, 0.05, 95), (99, 0.01, 99), (5, 0.05, 5)])
def test_the_threshold_is_the_conformal_rank(count, rate, rank):
    scores = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    assert conformal_threshold(scores, rate) == rank


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(InputError, match="layers 0 to 2"):
        spaces([AutoencoderFeatures(kind="autoencoder", layers=(7,))], tiny_pipeline())
