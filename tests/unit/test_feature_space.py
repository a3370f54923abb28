"""A vision backbone's features as the latent space: projected as by scikit-learn, saved whole, shown by a decoder."""

import shutil

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from tests.backbones import GIVEN, MEAN, STD
from tests.tiny import CAPTIONS, tiny_pipeline
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import AutoencoderFeatures, Detection, FirstStage, Latents, Train, VisionBackbone
from vlmdiff.detection.detector import Detector
from vlmdiff.model.backbone import Backbone, concatenate
from vlmdiff.model.normalization import Normalization, from_uint8
from vlmdiff.model.pipeline import VLMDiffPipeline
from vlmdiff.training.diffusion import build
from vlmdiff.training.first_stage import train_first_stage

CPU = torch.device("cpu")
GRID, KEPT = 8, 6


def photographs(count=12):
    """Noise of several scales, so that features differ between images and within."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    fine = torch.rand(count, 3, GIVEN, GIVEN, generator=generator)
    x = 0.7 * torch.nn.functional.interpolate(coarse, GIVEN, mode="bicubic").clamp(0, 1) + 0.3 * fine
    return (x * 255).byte().permute(0, 2, 3, 1).numpy()


def settings(folder, whitening=0.5, **changes):
    backbone = {"model": str(folder), "image_size": GIVEN, "layers": (1, 2), "grid": GRID, "whitening": whitening}
    return FirstStage(
        **{
            "kind": "backbone",
            "backbone": {**backbone, "decoder_channels": 16},
            "image_size": GIVEN,
            "latent_channels": KEPT,
            "steps": 1,
            "batch_size": 4,
            **changes,
        }
    )


def fitted(folder, state, **changes):
    images = photographs()
    space, history = train_first_stage(images, images[:4], settings(folder, **changes), state, CPU)
    return space, history


def codes(space, images, normalization=Normalization()):
    with torch.no_grad():
        return space.encode(normalization(from_uint8(images, CPU))).latent_dist.mode()


@pytest.mark.parametrize("family", ["vit", "resnet", "mobilenet_v2"])
@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_codes_are_the_principal_components_of_the_layers_on_one_grid(family, whitening, saved, tmp_path):
    space, _ = fitted(saved(family), tmp_path, whitening=whitening)
    params = VisionBackbone(model=str(saved(family)), image_size=GIVEN, layers=(1, 2))
    exact = [concatenate([x], GRID) for x in Backbone.load(params)(from_uint8(photographs(), CPU))]
    layers = space.features(Normalization()(from_uint8(photographs(), CPU))).split([x.shape[1] for x in exact], dim=1)
    # A space may compute in bfloat16.
    for x, y in zip(layers, exact, strict=True):
        assert (x - y).norm() < 0.01 * y.norm()
    rows = [x.permute(0, 2, 3, 1).flatten(0, 2).numpy().astype(np.float64) for x in layers]
    # Each layer's distances from its mean have a mean square of one, so that none outweighs the other.
    rows = [(x - x.mean(0)) / np.sqrt(np.square(x - x.mean(0)).sum(1).mean()) for x in rows]
    oracle = PCA(KEPT, svd_solver="full").fit(np.concatenate(rows, axis=1))
    expected = oracle.transform(np.concatenate(rows, axis=1))
    expected *= np.sqrt(oracle.explained_variance_) ** -whitening
    expected /= np.sqrt(np.square(expected).mean())
    found = codes(space, photographs()).permute(0, 2, 3, 1).flatten(0, 2).numpy()
    # A component's sign is nobody's.
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=2e-3 * np.abs(expected).max())
    assert np.square(found).mean() == pytest.approx(1, abs=1e-3)
    assert np.abs(np.corrcoef(found.T) - np.eye(KEPT)).max() < 1e-2


@pytest.mark.parametrize(("family", "differs"), [("vit", True), ("resnet", False)])
def test_a_transformer_computes_in_bfloat16_where_that_is_fast(family, differs, saved, tmp_path, monkeypatch):
    space, _ = fitted(saved(family), tmp_path)
    x, found = Normalization()(from_uint8(photographs(), CPU)), []
    for fast in (True, False):
        monkeypatch.setattr("vlmdiff.model.feature_space.fast_bf16", lambda device, fast=fast: fast)
        found.append(space.features(x))
    assert torch.equal(*found) != differs and found[0].dtype == torch.float32
    # Alone or in a batch, an image has the same features.
    monkeypatch.setattr("vlmdiff.model.feature_space.fast_bf16", lambda device: True)
    torch.testing.assert_close(space.features(x[:1]), found[0][:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_features_at_another_size_are_those_of_the_backbone_there(family, saved, tmp_path):
    space, _ = fitted(saved(family), tmp_path)
    x, size = from_uint8(photographs(), CPU), GIVEN // 2
    backbone = Backbone.load(VisionBackbone(model=str(saved(family)), image_size=size, layers=(1, 2)))
    exact = backbone(x)
    found = space.features(Normalization()(x), size)
    assert found.shape[2:] == exact[0].shape[2:]
    exact = concatenate(exact, tuple(found.shape[2:]))
    # A space may compute in bfloat16.
    assert (found - exact).norm() < 0.01 * exact.norm()
    assert space.features(Normalization()(x)).shape[2:] == (GRID, GRID)


def test_a_size_that_the_backbone_rejects_is_named(saved, tmp_path):
    space, _ = fitted(saved("vit"), tmp_path)
    with pytest.raises(InputError, match="image_size = 30 is not a multiple"):
        space.features(torch.zeros(1, 3, GIVEN, GIVEN), 30)


def test_what_normalizes_the_images_does_not_change_the_codes(saved, tmp_path):
    plain, _ = fitted(saved("vit"), tmp_path / "a")
    imagenet, _ = fitted(saved("vit"), tmp_path / "b", image_mean=MEAN, image_std=STD)
    one, other = codes(plain, photographs()), codes(imagenet, photographs(), Normalization(MEAN, STD))
    torch.testing.assert_close(one.abs(), other.abs(), rtol=1e-3, atol=1e-3)


def test_the_backbone_stays_as_it_came_and_the_decoder_learns(saved, tmp_path):
    before = Backbone.load(VisionBackbone(model=str(saved("resnet")), image_size=GIVEN, layers=(2,))).network
    space, history = fitted(saved("resnet"), tmp_path, steps=60, learning_rate=3e-3, validate_every=30, warmup_steps=0)
    # Better than grey, by far, in units of the networks' images, which go from -1 to 1.
    seen = photographs()[:4] / 127.5
    assert history[-1]["validation_loss"] < 0.6 * np.abs(seen - seen.mean()).mean()
    after = space.network.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.state_dict().items())
    assert space.decode(codes(space, photographs(2))).sample.shape == (2, 3, GIVEN, GIVEN)


def test_of_many_images_some_are_projected_and_decoded_spread_evenly(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmdiff.training.first_stage.SEEN", 4)
    images, params = photographs(11), settings(saved("vit"))
    space, _ = train_first_stage(images, images[:2], params, tmp_path / "a", CPU)
    few, _ = train_first_stage(images[[0, 3, 7, 10]], images[:2], params, tmp_path / "b", CPU)
    for name, tensor in few.state_dict().items():
        assert torch.equal(space.state_dict()[name], tensor), name


def test_more_components_than_the_features_have_directions_are_refused(saved, tmp_path):
    with pytest.raises(InputError, match=r"features have rank [0-9]+"):
        fitted(saved("vit"), tmp_path, latent_channels=500)


def around(space):
    """A pipeline in this space; its text encoder is that of the tiny one."""
    other = tiny_pipeline()
    params = Train(block_channels=(32, 32), hint_channels=(4, 4, 8, 8), head_size=16)
    pipeline = build(space, other.text_encoder, other.tokenizer, params)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "family", ["vit", "dinov2", "dinov3_vit", "clip", "swin", "resnet", "convnext", "mobilenet_v2"]
)
def test_a_pipeline_is_saved_whole_with_its_backbone(family, saved, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(saved(family), source)
    space, _ = fitted(source, tmp_path / "state")
    pipeline = around(space)
    pipeline.save_pretrained(tmp_path / "pipeline")
    shutil.rmtree(source)

    loaded = VLMDiffPipeline.from_pretrained(tmp_path / "pipeline")
    assert str(source) not in (tmp_path / "pipeline/vae/config.json").read_text()
    images = from_uint8(photographs(2), CPU)
    expected, found = (p(images, CAPTIONS[:2], noise_level=500, steps=1) for p in (pipeline, loaded))
    torch.testing.assert_close(found.latents, expected.latents)
    torch.testing.assert_close(found.images, expected.images)
    torch.testing.assert_close(found.deviation, expected.deviation)
    assert found.latents.shape == (2, KEPT, GRID, GRID) and found.images.shape == (2, 3, GIVEN, GIVEN)


def test_a_detector_compares_predicted_features_with_those_of_the_photograph(saved, tmp_path):
    space, _ = fitted(saved("mobilenet_v2"), tmp_path)
    features = (Latents(kind="latents"),)
    detector = Detector(around(space), Detection(features=features, samples=2, smoothing=0, deviation_floor=None))
    images = list(photographs(5))
    detector.calibrate(images)
    (found,) = detector.detect(images[:1])

    with torch.no_grad():
        x = from_uint8(photographs(5)[:1], CPU)
        z = detector.pipeline.encode_images(x)
        options = {"noise_level": detector.params.noise_level, "steps": 1, "seed": 0}
        mean = sum(detector.pipeline.reconstruct(z, x, **options, opposite=sign)[0] for sign in (False, True)) / 2
    difference = torch.nn.functional.interpolate(
        (z - mean).square().mean(1, keepdim=True).sqrt(), GIVEN, mode="bilinear"
    )
    odds = found.anomaly_map / (1 - found.anomaly_map)
    np.testing.assert_allclose(odds / odds.mean(), (difference / difference.mean())[0, 0], rtol=1e-3)


def test_features_of_an_autoencoder_that_is_none_are_refused(saved, tmp_path):
    space, _ = fitted(saved("vit"), tmp_path)
    with pytest.raises(InputError, match="need an AutoencoderKL as first stage"):
        Detector(around(space), Detection(features=(AutoencoderFeatures(kind="autoencoder"),)))
