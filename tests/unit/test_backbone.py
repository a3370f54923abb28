"""Vision backbones of many families, against the library called by hand; and as features of a detector."""

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.backbones import FAMILIES, GIVEN, MEAN, PATCH, STD, TRAINED, photograph, tensor, transformer
from tests.tiny import SIZE, tiny_detector, tiny_pipeline
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import BackboneFeatures, VisionBackbone
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.features import spaces
from vlmdiff.model import attention
from vlmdiff.model.attention import attend
from vlmdiff.model.backbone import Backbone, concatenate

SHARED = Path(__file__).parents[2].parent / "shared"
# Tokens before the patches, by the papers: class, distillation and register tokens. YOLOS has more behind them.
TOKENS_BEFORE = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 5, "dinov3_vit": 4}
TOKENS_BEFORE |= {"clip": 1, "siglip": 0, "yolos": 1}


def backbone(folder: Path, **params) -> Backbone:
    return Backbone.load(VisionBackbone(**{"model": str(folder), "image_size": GIVEN, **params}))


def by_hand(folder: Path, image: Image.Image):
    """The library's own way: its processor (Pillow's backend), its model, the vision tower of one of two."""
    pixels = tf.AutoImageProcessor.from_pretrained(folder, backend="pil")(image, return_tensors="pt").pixel_values
    model = tf.AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model)
    options = {} if folder.name not in ("vit", "deit", "clip", "siglip") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        return model(pixel_values=pixels, output_hidden_states=True, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_features_are_those_of_the_library_called_by_hand(family, saved):
    folder, image = saved(family), photograph()
    maps = backbone(folder, layers=(1, -1, "last"))(tensor(image))
    output = by_hand(folder, image)
    states = getattr(output, "reshaped_hidden_states", None) or output.hidden_states
    expected = [states[1], states[-1], output.last_hidden_state]
    for found, state in zip(maps, expected, strict=True):
        if family in TOKENS_BEFORE:
            side = GIVEN // PATCH
            patches = [state[0, TOKENS_BEFORE[family] + i] for i in range(side * side)]
            state = torch.stack(patches, dim=1).view(1, -1, side, side)
        elif state.ndim == 3:  # the last state of Swin, and of DINOv3's ConvNeXt after the mean token
            state = state[:, -found.shape[2] * found.shape[3] :].transpose(1, 2).reshape(found.shape)
        torch.testing.assert_close(found, state, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_are_those_of_the_maps(family, saved):
    extract = backbone(saved(family), layers=(0, 1, -1, "last"))
    maps = extract(torch.rand(2, 3, 40, 56))
    assert [(2, c) for c in extract.channels] == [m.shape[:2] for m in maps]
    assert all(m.dtype == torch.float32 and not m.requires_grad for m in maps)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_does_not_change_the_features_of_an_image(family, saved):
    extract, images = backbone(saved(family), layers=(1, "last")), torch.rand(3, 3, GIVEN, GIVEN)
    together = extract(images)
    for i in range(3):
        for one, many in zip(extract(images[i : i + 1]), together, strict=True):
            torch.testing.assert_close(one[0], many[i], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [*TOKENS_BEFORE, "swin"])
def test_a_patch_of_the_image_changes_its_own_cell_of_the_embedding(family, saved):
    extract = backbone(saved(family), layers=(0,))
    images = torch.rand(1, 3, GIVEN, GIVEN).repeat(2, 1, 1, 1)
    patch = GIVEN // extract(images)[0].shape[2]
    images[1, :, 2 * patch : 3 * patch, 5 * patch : 6 * patch] = 0
    one, other = extract(images)[0]
    assert torch.nonzero((one - other).abs().sum(0) > 1e-5).tolist() == [[2, 5]]


def test_a_grid_need_not_be_square(tmp_path):
    config = tf.Dinov2Config(**transformer(image_size=(48, 96), patch_size=(8, 16)))
    tf.Dinov2Model(config).save_pretrained(tmp_path)
    extract = backbone(tmp_path, layers=(0, -1), image_size=96)
    images = torch.rand(1, 3, 96, 96).repeat(2, 1, 1, 1)
    images[1, :, 24:32, 64:80] = 0
    one, other = extract(images)[0]
    assert one.shape[1:] == (12, 6)
    assert torch.nonzero((one - other).abs().sum(0) > 1e-5).tolist() == [[3, 4]]


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize("size", [(224, 224), (150, 90), (32, 32)])
def test_an_image_of_another_size_is_resized_not_sheared(family, size, saved):
    """As Pillow would resize it, up to its rounding to 8 bits. To resize the storage instead, as the reference does,
    shears the image."""
    folder, image = saved(family), photograph(*size)
    extract = backbone(folder, layers=(1,))
    (expected,) = extract(tensor(image.resize((GIVEN, GIVEN), Image.Resampling.BILINEAR)))
    (found,) = extract(tensor(image))
    assert (found - expected).norm() < 0.01 * expected.norm()

    whole = torch.cat([tensor(image).flatten(), torch.zeros(3 * GIVEN * GIVEN)])
    (sheared,) = extract(whole[: 3 * GIVEN * GIVEN].view(1, 3, GIVEN, GIVEN))
    assert (sheared - expected).norm() > 0.1 * expected.norm()


def test_the_last_state_is_the_last_layer_after_the_final_norm(saved):
    folder = saved("vit")
    before, after = backbone(folder, layers=(-1, "last"))(torch.rand(1, 3, GIVEN, GIVEN))
    weights = load_file(folder / "model.safetensors")
    norm = weights["layernorm.weight"], weights["layernorm.bias"], 1e-12
    expected = torch.nn.functional.layer_norm(before.permute(0, 2, 3, 1), (32,), *norm).permute(0, 3, 1, 2)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", TOKENS_BEFORE)
def test_blocks_after_the_deepest_layer_are_not_computed(family, saved):
    images, features, work = torch.rand(1, 3, GIVEN, GIVEN), {}, {}
    for layers in ((0,), (1,), (2,), (0, 1, 2, "last")):
        extract = backbone(saved(family), layers=layers)
        with FlopCounterMode(display=False) as counter:
            features[layers] = extract(images)
        work[layers] = counter.get_total_flops()
    *single, whole = features
    assert all(torch.equal(features[layers][0], features[whole][layers[0]]) for layers in single)
    one_block = work[whole] - work[2,]
    assert one_block > 0
    assert work[whole] - work[1,] == work[whole] - work[0,] == 2 * one_block


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(TOKENS_BEFORE)))
def test_a_layer_alone_is_what_it_is_among_others(family, saved):
    images = torch.rand(1, 3, GIVEN, GIVEN)
    alone, *_ = backbone(saved(family), layers=(1,))(images)
    assert torch.equal(alone, backbone(saved(family), layers=("last", -1, 1))(images)[2])


@pytest.mark.parametrize(("family", "count"), [("vit", 4), ("resnet", 5), ("mobilenet_v2", 16)])
def test_a_layer_counts_from_either_end_and_must_exist(family, count, saved):
    images = torch.rand(1, 3, GIVEN, GIVEN)
    first, last = backbone(saved(family), layers=(-count, -1))(images)
    torch.testing.assert_close([first, last], backbone(saved(family), layers=(0, count - 1))(images))
    for layer in (count, -count - 1):
        with pytest.raises(InputError, match=rf"layers 0 to {count - 1}.*not \[{layer}\]"):
            backbone(saved(family), layers=(0, layer))


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov3_vit", "clip"])
def test_a_size_that_patches_do_not_fill_is_an_error_that_names_the_nearest(family, saved):
    with pytest.raises(InputError, match=r"image_size = 100 .* 96 and 104"):
        backbone(saved(family), image_size=100)


@pytest.mark.parametrize("family", ["resnet", "convnext", "mobilenet_v2", "swin"])
def test_others_take_any_size(family, saved):
    extract = backbone(saved(family), image_size=101, layers=(-1,))
    (small,), (large,) = extract(torch.rand(1, 3, 50, 50)), extract(torch.rand(1, 3, 101, 101))
    assert small.shape == large.shape == (1, extract.channels[0], *large.shape[2:])


def test_a_model_that_cannot_interpolate_its_positions_says_so(tmp_path):
    config = tf.HieraConfig(image_size=[64, 64], embed_dim=8, depths=[1, 1], num_heads=[1, 1], num_query_pool=1)
    tf.HieraModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="rejects images of 67 pixels"):
        backbone(tmp_path, image_size=67)


def test_a_model_that_hides_patches_is_refused(tmp_path):
    tf.ViTMAEModel(tf.ViTMAEConfig(**transformer())).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not maps of the image"):
        backbone(tmp_path)


def pixels_seen(folder: Path, **params) -> torch.Tensor:
    """Layer 0 of DINOv3's ConvNeXt is what goes into it."""
    return backbone(folder, layers=(0,), **params)(torch.full((1, 3, GIVEN, GIVEN), 0.25))[0][0, :, 0, 0]


def test_the_normalization_is_the_parameter_s_then_the_checkpoint_s_then_minus_one_to_one(tmp_path):
    FAMILIES["dinov3_convnext"]().save_pretrained(tmp_path)
    torch.testing.assert_close(pixels_seen(tmp_path), torch.tensor([-0.5, -0.5, -0.5]))

    # No class of this name could be built: the file is read for its numbers.
    facts = {"image_processor_type": "NeedsTorchvisionFast", "image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    torch.testing.assert_close(pixels_seen(tmp_path), (0.25 - torch.tensor(MEAN)) / torch.tensor(STD))

    nested = {"image_processor": {"image_mean": (0, 0, 0), "image_std": (0.5, 0.5, 0.5)}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    torch.testing.assert_close(pixels_seen(tmp_path), torch.tensor([0.5, 0.5, 0.5]))

    given = pixels_seen(tmp_path, image_mean=(0.25, 0, 0), image_std=(1, 0.25, 1))
    torch.testing.assert_close(given, torch.tensor([0, 1, 0.25]))


def test_a_checkpoint_that_is_not_normalized_is_left_so(tmp_path):
    FAMILIES["dinov3_convnext"]().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "image_mean": MEAN}))
    torch.testing.assert_close(pixels_seen(tmp_path), torch.tensor([0.25, 0.25, 0.25]))


def test_a_preparation_of_another_kind_is_refused(tmp_path):
    FAMILIES["dinov3_convnext"]().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_flip_channel_order": True}))
    with pytest.raises(InputError, match="do_flip_channel_order"):
        backbone(tmp_path)


@pytest.mark.parametrize(("tokens", "shared"), [(5, 0.0), (300, 0.0), (300, 20.0)])
def test_attention_in_bfloat16_is_that_of_single_precision_whatever_the_keys_share(tokens, shared):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, tokens, 16, generator=generator).bfloat16()
    key = (key + shared * torch.randn(16, generator=generator)).bfloat16()
    exact = ((query.double() @ key.double().mT) / 4).softmax(dim=-1) @ value.double()
    found, _ = attend(encoder(), query, key, value, None, scaling=0.25)
    assert found.shape == (2, tokens, 4, 16) and found.dtype == torch.bfloat16
    assert (found.transpose(1, 2) - exact).norm() < 0.01 * exact.norm()


def test_attention_that_is_asked_for_something_else_is_the_library_s():
    query, key, value = torch.randn(3, 2, 4, 200, 16, generator=torch.Generator().manual_seed(0))
    half = [x.bfloat16() for x in (query, key, value)]
    mask = torch.rand(2, 1, 200, 200, generator=torch.Generator().manual_seed(1)) < 0.5
    causal = encoder(is_causal=True)
    asked = [(encoder(), (query, key, value), None, {}), (encoder(), half, mask, {}), (causal, half, None, {})]
    asked += [(encoder(), half, None, {"is_causal": True}), (causal, half, None, {"is_causal": None})]
    asked += [(encoder(), half, None, {"position_bias": torch.randn(1, 4, 200, 200).bfloat16()})]
    asked += [(encoder(), [half[0], half[1][:, :, :20], half[2][:, :, :20]], None, {})]
    asked += [(encoder(), half, None, {"what a later release reads": 1})]
    for module, given, masked, options in asked:
        expected, _ = sdpa_attention_forward(module, *given, masked, scaling=0.25, **options)
        assert torch.equal(attend(module, *given, masked, scaling=0.25, **options)[0], expected)
    gradients = []
    for function in (attend, sdpa_attention_forward):
        learned = [x.clone().requires_grad_() for x in half]
        function(encoder(), *learned, None)[0].square().sum().backward()
        gradients.append(torch.stack([x.grad for x in learned]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov3_vit", "clip", "siglip"])
def test_a_transformer_in_bfloat16_runs_our_attention_and_finds_what_the_library_finds(family, saved, monkeypatch):
    ours, image = backbone(saved(family), layers=(-1,), image_size=128), torch.rand(1, 3, 128, 128)
    found = []

    def both(module, *given, **options):
        expected, _ = sdpa_attention_forward(module, *given, **options)
        with monkeypatch.context() as patch:
            # What must not be called.
            patch.setattr(attention, "sdpa_attention_forward", None)
            result, nothing = attend(module, *given, **options)
        found.append((result, expected))
        return result, nothing

    AttentionInterface.register(attention.NAME, both)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours(image)
    finally:
        AttentionInterface.register(attention.NAME, attend)
    assert found
    for result, expected in found:
        assert result.shape == expected.shape and (result - expected).norm() < 0.01 * expected.norm()
    # It is this program's choice, and no part of the model.
    assert attention.NAME not in ours.network.config.to_json_string()


def encoder(is_causal: bool = False) -> torch.nn.Module:
    module = torch.nn.Module()
    module.is_causal = is_causal
    return module


def test_half_precision_weights_are_computed_in_single(tmp_path):
    torch.manual_seed(0)
    FAMILIES["resnet"]().half().save_pretrained(tmp_path)
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} >= {torch.float16}
    (half,) = backbone(tmp_path)(torch.rand(1, 3, GIVEN, GIVEN))
    assert half.dtype == torch.float32


def test_a_checkpoint_that_lacks_weights_is_refused(saved, tmp_path):
    weights = load_file(saved("dinov2") / "model.safetensors")
    lost = "encoder.layer.1.mlp.fc1.weight"
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved("dinov2") / "config.json").read_bytes())
    with pytest.raises(InputError, match=lost):
        backbone(tmp_path)


def test_a_damaged_checkpoint_is_refused(saved, tmp_path):
    whole = (saved("resnet") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "config.json").write_bytes((saved("resnet") / "config.json").read_bytes())
    with pytest.raises(InputError, match="cannot load the vision model"):
        backbone(tmp_path)


def test_a_model_of_text_is_refused(tmp_path):
    tf.BertModel(tf.BertConfig(**transformer(vocab_size=100))).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="BertModel, not a vision model"):
        backbone(tmp_path)


def test_a_model_that_is_not_a_local_folder_needs_a_revision():
    with pytest.raises(InputError, match=r"some/model.*revision"):
        Backbone.load(VisionBackbone(model="some/model"))


def test_mean_and_deviation_go_together():
    with pytest.raises(ValueError, match="both `image_mean` and `image_std`"):
        VisionBackbone(model="some/model", image_mean=MEAN)


def test_a_part_behind_the_features_can_be_trained(saved):
    projection = torch.nn.Conv2d(32, 4, 1)
    (features,) = backbone(saved("vit"))(torch.rand(2, 3, GIVEN, GIVEN))
    projection(features).square().sum().backward()
    assert projection.weight.grad.abs().sum() > 0


def test_maps_of_several_layers_are_laid_on_one_grid():
    fine, coarse = torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([[0.0, 1.0], [0.0, 1.0]]).view(1, 1, 2, 2)
    both = concatenate([fine, coarse.expand(1, 2, 2, 2)], 4)
    assert tuple(both.shape) == (1, 3, 4, 4)
    assert torch.equal(both[:, :1], fine)
    # Halfway between cell centres and beyond the outermost: bilinear, corners not aligned.
    torch.testing.assert_close(both[0, 1:], torch.tensor([0, 0.25, 0.75, 1]).expand(2, 4, 4))
    # Made smaller, every cell has its share: no point of the map falls between the samples.
    points = torch.eye(64).view(64, 1, 8, 8)
    assert concatenate([points], (2, 4)).sum(dim=(1, 2, 3)).min() > 0.05


def entry(folder: Path, **params) -> BackboneFeatures:
    return BackboneFeatures(kind="transformers", **{"model": str(folder), "image_size": TRAINED, **params})


@pytest.mark.parametrize("family", ["vit", "dinov2_with_registers", "resnet", "convnext", "mobilenet_v2"])
def test_a_detector_compares_in_the_features_of_a_backbone(family, saved, tmp_path):
    rng = np.random.default_rng(0)
    normal, images = (list(rng.integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)) for n in (12, 4))
    detector = tiny_detector(features=(entry(saved(family), layers=(1, -1)),), steps=1, samples=2)
    detector.calibrate(normal)
    found = detector.detect(images)
    alone = detector.detect(images, batch_size=1)
    detector.save_pretrained(tmp_path / "saved")
    # Elsewhere, as a registered model is, and saved once more from there.
    (tmp_path / "saved").rename(tmp_path / "moved")
    moved = Detector.from_pretrained(tmp_path / "moved")
    moved.save_pretrained(tmp_path / "again")
    shutil.rmtree(tmp_path / "moved")
    assert str(saved(family)) not in (tmp_path / "again/detector.json").read_text()
    loaded = Detector.from_pretrained(tmp_path / "again").detect(images)
    for one, single, again in zip(found, alone, loaded, strict=True):
        assert np.isfinite(one.anomaly_map).all() and one.anomaly_map.std() > 0
        np.testing.assert_allclose(one.anomaly_map, single.anomaly_map, atol=1e-4)
        np.testing.assert_allclose(one.anomaly_map, again.anomaly_map, atol=1e-6)


def test_a_backbone_named_twice_is_loaded_once(saved):
    folder, images = saved("vit"), torch.rand(2, 3, SIZE, SIZE)
    pipeline, entries = tiny_pipeline(), [entry(folder, layers=(2, 1)), entry(folder, layers=(-1, 2), weight=0.5)]
    apart = [spaces([e], pipeline)[0][0](images, None) for e in entries]

    gc.collect()
    before = sum(type(x) is tf.ViTModel for x in gc.get_objects())
    together = spaces(entries, pipeline)
    assert sum(type(x) is tf.ViTModel for x in gc.get_objects()) == before + 1
    for (extract, _), expected in zip(together, apart, strict=True):
        torch.testing.assert_close(extract(images, None), expected)


def test_alike_features_are_no_distance_apart_and_others_are(saved):
    ((extract, distance),) = spaces([entry(saved("resnet"), layers=(2,))], tiny_pipeline())
    (maps,) = extract(torch.rand(2, 3, SIZE, SIZE), None)
    assert distance(maps, maps).abs().max() < 1e-6 < distance(maps, maps.flip(0)).min()


@pytest.fixture(scope="module")
def trained():
    weights = SHARED / "weights" / "mobilenet_v2"
    if not weights.is_dir() or not (SHARED / "real").is_dir():
        pytest.skip(f"{SHARED} has no pretrained weights and real photographs")
    return backbone(weights, image_size=256, layers=(4, 11, 14))


def photographs(*parts: str, count: int) -> torch.Tensor:
    files = sorted(SHARED.joinpath("real", *parts).iterdir())[:count]
    return torch.cat([tensor(Image.open(file).convert("RGB").resize((256, 256))) for file in files])


@pytest.mark.parametrize("product", ["asphalt", "bottle", "magnetic_tile", "metal_plate", "pcb"])
def test_a_photograph_made_smaller_is_more_like_itself_than_like_another(product, trained):
    one, other = photographs(product, "test", "good", count=2).split(1)
    smaller = torch.nn.functional.interpolate(one, size=(200, 200), mode="bilinear", antialias=True)
    for a, b, c in zip(trained(one), trained(smaller), trained(other), strict=True):
        assert torch.cosine_similarity(a, b).mean() > torch.cosine_similarity(a, c).mean()


def test_defects_lie_where_features_are_unlike_those_of_normal_photographs(trained):
    """The distance to the nearest normal patch, as in PatchCore, is larger inside the mask than outside."""
    normal = concatenate(trained(photographs("bottle", "train", "good", count=8)), 32).movedim(1, -1).flatten(0, 2)
    broken = concatenate(trained(photographs("bottle", "test", "broken_large", count=4)), 32)
    masks = photographs("bottle", "ground_truth", "broken_large", count=4)[:, :1]
    masks = torch.nn.functional.interpolate(masks, size=32, mode="area")[:, 0] > 0.5
    for features, mask in zip(broken, masks, strict=True):
        nearest = torch.cdist(features.flatten(1).T, normal).amin(dim=1).view(32, 32)
        assert nearest[mask].mean() > nearest[~mask].mean()
