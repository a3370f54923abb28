"""The reference implementation's own numbers, reproduced at its full size: 1.4 billion parameters in float32.

The weights are drawn name by name, so that a tensor in another's place, or one left out, changes every number.
"""

import json
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny_pipeline
from vlmdiff.core.params import Detection, Pixels
from vlmdiff.detection.anomaly_map import compare, image_scores, smooth
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.features import cosine_distance
from vlmdiff.model.pipeline import VLMDiffPipeline
from vlmdiff.model.sampling import reconstruct

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"the reference's numbers are not in {REFERENCE}"),
]


def draw(name: str, *shape: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    return generator.standard_normal(shape, dtype=np.float32)


def weight(name: str, shape: list[int]) -> torch.Tensor:
    values = draw(name, *shape)
    if len(shape) > 1:
        values /= math.sqrt(math.prod(shape[1:]))
    elif name.endswith(".weight"):
        values = 1 + np.float32(0.1) * values
    else:
        values *= np.float32(0.02)
    return torch.from_numpy(values)


def given(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(draw(name, *shape))


@pytest.fixture(scope="module")
def golden():
    with np.load(REFERENCE / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def pipeline():
    keys = json.loads((REFERENCE / "keys.json").read_text())
    with ThreadPoolExecutor(2) as pool:
        state = dict(zip(keys, pool.map(weight, keys, keys.values()), strict=True))
    return VLMDiffPipeline.from_reference(state)


@pytest.fixture
def agree(record_property):
    """Assert that numbers are the reference's up to a relative error of 1e-4, which the run's summary shows."""

    def check(name: str, ours: torch.Tensor | np.ndarray, golden: np.ndarray) -> None:
        ours = np.asarray(ours, np.float64)
        assert ours.shape == golden.shape
        error = np.linalg.norm(ours - golden) / np.linalg.norm(golden)
        record_property(f"relative error, {name}", f"{error:.1e}")
        assert error <= 1e-4, name

    return check


@pytest.mark.parametrize(("case", "timestep"), [("a", 501), ("b", 901)])
@torch.no_grad()
def test_noise_and_control_are_the_references(pipeline, golden, case, timestep, agree):
    latents, timestep = given(f"case_{case}/x", 1, 4, 32, 32), torch.tensor([timestep])
    context, hint = given(f"case_{case}/context", 1, 77, 768), given(f"case_{case}/hint", 1, 3, 256, 256)
    agree("noise", pipeline.predict_noise(latents, timestep, context, hint), golden[f"case_{case}_eps"])

    # The norms are of all control outputs: also of those that `only_mid_control` keeps from the UNet.
    pipeline.sgn.register_to_config(only_mid_control=False)
    outputs, middle = pipeline.sgn(latents, timestep, context, hint)
    pipeline.sgn.register_to_config(only_mid_control=True)
    norms = np.array([tensor.norm() for tensor in (*outputs, middle)])
    for i, norm in enumerate(norms):
        agree(f"norm of control {i}", norm[None], golden[f"case_{case}_control_norms"][i : i + 1])


@torch.no_grad()
def test_the_autoencoder_is_the_references(pipeline, golden, agree):
    moments = pipeline.vae.encode(given("vae/x", 1, 3, 128, 128)).latent_dist.parameters
    agree("moments", moments, golden["vae_moments"])
    agree("decoded", pipeline.vae.decode(given("vae/z", 1, 4, 16, 16)).sample, golden["vae_decoded"])


def test_ten_steps_with_leading_spacing_are_the_references(pipeline, golden, agree):
    seen = []

    def denoise(latents, timestep):
        seen.append((int(timestep), latents))
        return 0.3 * latents * torch.cos(timestep / 300) + 0.1

    clean, noise = given("ddim/z0", 1, 4, 32, 32), given("ddim/noise", 1, 4, 32, 32)
    out = reconstruct(denoise, clean, noise, pipeline.scheduler, noise_level=999, steps=10, spacing="leading")
    assert [timestep for timestep, _ in seen] == golden["ddim_timesteps"].tolist()
    agree("noised", seen[0][1], golden["ddim_xT"])
    agree("after ten steps", out, golden["ddim_out"])


def feature_pairs():
    before = given("amap/in0", 1, 16, 32, 32), given("amap/in1", 1, 32, 16, 16)
    return before, [f + 0.5 * given(f"amap/noise{i}", *f.shape) for i, f in enumerate(before)]


def test_the_anomaly_map_and_its_score_are_the_references(golden, agree):
    before, after = feature_pairs()
    total = 2 * compare(before, after, cosine_distance, 256, align_corners=True).double().numpy()
    agree("sum over layers", total[0], golden["amap_sum"])
    smoothed = smooth(total, 5.0)
    agree("smoothed", smoothed[0], golden["amap_smoothed"])
    agree("image score", image_scores(smoothed, "pooled_max")[0], golden["amap_image_score"])


def test_a_detector_with_the_references_parameters_gives_the_references_map(golden, agree):
    """Up to what calibration makes of it: score = raw / (raw + threshold), and raw in units of a normal difference."""
    pipeline = tiny_pipeline()
    pipeline.register_to_config(image_size=256)
    params = Detection(
        noise_level=999,
        steps=10,
        spacing="leading",
        samples=1,
        deviation_floor=None,
        guidance=9.0,
        align_corners=True,
        smoothing=5.0,
        image_score="pooled_max",
        features=(Pixels(kind="pixels"),),
    )
    detector = Detector(pipeline, params)
    # In place of a backbone's: the given features, of the photograph and of its reconstruction in turn.
    features = cycle(feature_pairs())
    detector.spaces = [(lambda images, latents: next(features), cosine_distance)]
    photograph = np.zeros((256, 256, 3), np.uint8)
    detector.calibrate([photograph])
    (found,) = detector.detect([photograph])
    layers, (scale,), threshold = 2, detector.calibration.scales, detector.calibration.map_threshold("")
    odds = lambda score: np.float64(score) / (1 - np.float64(score))  # noqa: E731
    agree("map", layers * scale * threshold * odds(found.anomaly_map), golden["amap_smoothed"])
    agree("score", layers * scale * threshold * odds(found.score), golden["amap_image_score"])
