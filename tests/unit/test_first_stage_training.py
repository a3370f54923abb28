"""Training the autoencoder: pretrained starts, the perceptual distance, the discriminator."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, CLIPTextModel, CLIPTokenizer, ResNetConfig, ResNetModel

from tests.tiny import CAPTIONS, SIZE
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Discriminator, Encode, FirstStage, Perceptual
from vlmdiff.data.images import load_rgb
from vlmdiff.model.backbone import Backbone
from vlmdiff.model.first_stage import downsampling, load_first_stage
from vlmdiff.model.normalization import Normalization, from_uint8
from vlmdiff.training.adversarial import PatchDiscriminator, adversarial_loss, gradient_ratio, perceptual_distance
from vlmdiff.training.encoded import Encoded, encode
from vlmdiff.training.first_stage import start, train_first_stage

CPU = torch.device("cpu")
SHARED = Path(__file__).parents[2].parent / "shared"


def images(count):
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def trained(checkpoint, folder, **changes):
    params = FirstStage(
        **{
            "pretrained": {"model": str(checkpoint), "subfolder": "vae"},
            "image_size": SIZE,
            "steps": 3,
            "precision": "fp32",
            "batch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "validate_every": 1,
            "ema_decay": 0.0,
            **changes,
        }
    )
    data = images(14)
    return train_first_stage(data[:10], data[10:], params, folder, CPU)


def adversary(start):
    return {"start": start, "channels": 8, "layers": 2, "weight": 0.5}


def same(a, b):
    return all(torch.equal(weight, b[name]) for name, weight in a.items())


def test_a_pretrained_autoencoder_is_fine_tuned_and_keeps_its_scale(checkpoint, tmp_path):
    before = load_file(checkpoint / "vae/diffusion_pytorch_model.safetensors")
    vae, _ = trained(checkpoint, tmp_path)
    assert not any(torch.equal(weight, before[name]) for name, weight in vae.state_dict().items())
    assert vae.config.scaling_factor == 0.5 and vae.config.sample_size == SIZE


def test_no_steps_leave_a_pretrained_autoencoder_as_it_is_and_measure_it(checkpoint, tmp_path):
    vae, history = trained(checkpoint, tmp_path, steps=0, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
    assert same(vae.state_dict(), load_file(checkpoint / "vae/diffusion_pytorch_model.safetensors"))
    x = torch.from_numpy(images(14)[10:]).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    assert [row["step"] for row in history] == [0]
    assert history[0]["validation_loss"] == pytest.approx((x - y).abs().mean().item(), rel=1e-5)


def test_the_discriminator_is_idle_before_its_start(checkpoint, tmp_path):
    def run(name, **changes):
        _, history = trained(checkpoint, tmp_path / name, checkpoint_every=1, **changes)
        *_, newest = sorted((tmp_path / name / "checkpoint").glob("*/state.safetensors"))
        state = load_file(newest)
        return [row["loss"] for row in history], {k: v for k, v in state.items() if k.startswith("adversary.")}, state

    alone, nobody, _ = run("alone")
    late, untouched, state = run("late", discriminator=adversary(2))
    early, changed, _ = run("early", discriminator=adversary(1))
    assert late[:2] == alone[:2] and late[2] != alone[2]
    assert early[0] == alone[0] and early[1] != alone[1]
    # The checkpoints are those of step 2: there the late discriminator has not joined, the early one has once.
    assert not nobody and untouched and untouched.keys() == changed.keys()
    _, initial, _ = run("initial", steps=2, discriminator=adversary(1))  # its checkpoint is of step 1
    assert same(untouched, initial)
    assert not any(torch.equal(changed[name], initial[name]) for name in initial if name.endswith("weight"))
    moments = {name for name in state if name.startswith("optimizer.") and name.endswith(".exp_avg")}
    assert len(moments) == sum(name.startswith("weights.") for name in state)


def test_weights_that_have_not_met_the_discriminator_are_not_kept(checkpoint, tmp_path):
    def best_loss(name, start):
        """After two of three steps."""
        trained(checkpoint, tmp_path / name, checkpoint_every=2, discriminator=adversary(start))
        *_, newest = sorted((tmp_path / name / "checkpoint").glob("*/facts.json"))
        return json.loads(newest.read_text())["best_loss"]

    assert best_loss("late", 2) == float("inf")
    assert best_loss("early", 1) < float("inf")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_losses_together_are_finite_and_fall(checkpoint, backbone, tmp_path, precision):
    vae, history = trained(
        checkpoint,
        tmp_path,
        steps=8,
        perceptual={"model": str(backbone), "image_size": 32, "layers": [1, -1]},
        discriminator=adversary(4),
        precision=precision,
        accumulate=2,
        gradient_checkpointing=True,
    )
    values = [value for row in history for value in row.values()]
    assert np.isfinite(values).all()
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]
    assert {weight.dtype for weight in vae.state_dict().values()} == {torch.float32}


def test_a_decoder_of_a_backbones_features_trains_in_bfloat16(tmp_path):
    # A network of convolutions: its maps would be bfloat16, which a CPU cannot resize.
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**shape)).save_pretrained(tmp_path / "backbone")
    space = {"model": str(tmp_path / "backbone"), "image_size": SIZE, "layers": [1, 2], "grid": 16}
    settings = {"kind": "backbone", "backbone": space, "pretrained": None, "steps": 8}
    vae, history = trained(None, tmp_path / "state", **settings, precision="bf16")
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]
    assert {weight.dtype for weight in vae.decoder.state_dict().values()} == {torch.float32}


def test_the_perceptual_distance_is_between_normalised_features(backbone):
    params = Perceptual(model=str(backbone), image_size=32, layers=(1, 2))
    a, b = torch.rand(2, 2, 3, 32, 32)
    model = AutoModel.from_pretrained(backbone).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        of_a, of_b = (model((x - mean) / std, output_hidden_states=True).hidden_states for x in (a, b))
        # |a - b|^2 = 2 - 2 cos of vectors of unit length, of each patch; the class token is no patch.
        cosines = [torch.cosine_similarity(of_a[i], of_b[i], dim=2)[:, 1:] for i in (1, 2)]
        expected = sum((2 - 2 * cosine).mean() for cosine in cosines)
        distance = perceptual_distance(Backbone.load(params), a, b)
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-6)


def test_a_patchs_verdict_depends_on_the_patch_alone():
    discriminator = PatchDiscriminator(8, 3)
    # Normalisation over an image aside, three strides of 2 and the rest see 70 pixels (Isola et al., 2017).
    for module in discriminator.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x
    x = torch.rand(1, 3, 256, 256, requires_grad=True)
    verdicts = discriminator(x)
    assert verdicts.shape == (1, 1, 30, 30)
    (gradient,) = torch.autograd.grad(verdicts[0, 0, 15, 15], x)
    rows = gradient[0].sum(0).abs().sum(1).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_an_images_verdict_does_not_depend_on_its_batch():
    discriminator, x = PatchDiscriminator(8, 2), torch.rand(3, 3, 32, 32)
    alone = torch.cat([discriminator(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(discriminator(x), alone)


def test_the_ratio_of_gradients_is_that_of_their_norms():
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    a, b = (weight * torch.tensor([0.0, 3.0, 4.0])).sum(), (weight * torch.tensor([2.0, 0.0, 0.0])).sum()
    ratio = gradient_ratio(a, b, weight, lambda gradient: gradient)
    assert ratio.item() == pytest.approx(5 / (2 + 1e-4), rel=1e-6) and not ratio.requires_grad
    assert gradient_ratio(a, 0 * b, weight, lambda gradient: gradient).item() == 1e4


def test_one_backward_pass_gives_each_network_the_gradient_of_its_own_loss():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 2)
    decoder = nn.Conv2d(3, 3, 3, padding=1)
    x, z = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    params = Discriminator(start=0, weight=0.5, channels=8, layers=2)

    y = decoder(z)
    reconstruction = (y - x).abs().mean()
    together = adversarial_loss(discriminator, params, x, y, reconstruction, decoder.weight, lambda gradient: gradient)
    networks = [*discriminator.parameters(), *decoder.parameters()]
    found = torch.autograd.grad(together, networks)

    hinge = (
        (1 - discriminator(x)).clamp(min=0).mean() + (1 + discriminator(decoder(z).detach())).clamp(min=0).mean()
    ) / 2
    of_discriminator = torch.autograd.grad(hinge, list(discriminator.parameters()))
    fooled = -discriminator(decoder(z)).mean()
    wanted = torch.autograd.grad((decoder(z) - x).abs().mean(), decoder.weight)[0].norm()
    of_decoder = torch.autograd.grad(fooled, list(decoder.parameters()))
    scale = 0.5 * wanted / (of_decoder[0].norm() + 1e-4)
    for mine, expected in zip(found, [*of_discriminator, *(scale * g for g in of_decoder)], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"pretrained": None, "steps": 0}, "steps: 0"), ({"discriminator": {"start": 3}}, "discriminator.start")],
)
def test_settings_that_do_nothing_are_refused(checkpoint, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        trained(checkpoint, tmp_path, **change)


def test_an_image_size_that_the_pretrained_autoencoder_cannot_halve_is_refused(checkpoint, tmp_path):
    with pytest.raises(InputError, match="multiple of 4"):
        trained(checkpoint, tmp_path, image_size=30)


@pytest.fixture
def tiny_autoencoder(tmp_path):
    """An AutoencoderTiny of two resolutions, random weights."""
    torch.manual_seed(0)
    shape = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    vae = AutoencoderTiny(**shape, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))
    vae.save_pretrained(tmp_path / "tiny")
    return {"model": str(tmp_path / "tiny")}


def test_a_tiny_autoencoder_is_fine_tuned_and_kept_as_it_is(tiny_autoencoder, tmp_path):
    before = load_file(tmp_path / "tiny/diffusion_pytorch_model.safetensors")
    vae, history = trained(None, tmp_path / "tuned", pretrained=tiny_autoencoder, steps=20)
    assert not same(vae.state_dict(), before)
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]
    vae, _ = trained(None, tmp_path / "as_it_is", pretrained=tiny_autoencoder, steps=0)
    assert same(vae.state_dict(), before)
    x = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        latents = AutoencoderTiny.from_pretrained(tmp_path / "tiny").encode(x).latents
        assert torch.equal(vae.encode(x).latent_dist.mode(), latents) and latents.shape[2] == SIZE // downsampling(vae)
    vae.save_pretrained(tmp_path / "saved")
    again = load_first_stage(tmp_path / "saved")
    assert same(again.state_dict(), before) and again.config.sample_size == SIZE


@pytest.mark.parametrize(
    "change", [{"upsampling_scaling_factor": 4}, {"num_encoder_blocks": (1, 1), "encoder_block_out_channels": (8, 8)}]
)
def test_an_autoencoder_that_does_not_give_back_the_image_is_refused(change, tmp_path):
    shape = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    shape |= {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)} | change
    AutoencoderTiny(**shape).save_pretrained(tmp_path / "tiny")
    with pytest.raises(InputError, match="does not turn colour images into latents of 8 x 8 and back"):
        trained(None, tmp_path, pretrained={"model": str(tmp_path / "tiny")})


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null", "{"])
def test_a_configuration_that_is_none_is_a_sentence(content, tiny_autoencoder, tmp_path):
    (tmp_path / "tiny/config.json").write_text(content)
    with pytest.raises(InputError, match=r"cannot read the configuration of .*tiny"):
        trained(None, tmp_path, pretrained=tiny_autoencoder)


def test_a_tiny_autoencoder_has_no_discriminator_and_a_unet_is_no_autoencoder(tiny_autoencoder, checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"trained with first_stage"):
        trained(None, tmp_path, pretrained=tiny_autoencoder, discriminator=adversary(1))
    with pytest.raises(InputError, match="has a UNet2DConditionModel, not an AutoencoderKL or an AutoencoderTiny"):
        trained(None, tmp_path, pretrained={"model": str(checkpoint), "subfolder": "unet"})


@pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} has the weights and photographs")
def test_taesd_reconstructs_photographs_as_its_source_says(tmp_path):
    source = {"model": str(SHARED / "weights/taesd")}
    params = FirstStage(pretrained=source, image_size=256, steps=0)
    vae = start(params)
    # Decibels, from the file that comes with the weights.
    for name, expected in (("bottle/test/broken_large/000.jpg", 31.22), ("pcb/test/defect/00041045.png", 18.23)):
        pixels = load_rgb(SHARED / "real" / name, None, 10**7)
        pixels = pixels[: len(pixels) // 8 * 8, : pixels.shape[1] // 8 * 8]
        x = Normalization()(from_uint8(pixels[None], CPU))
        with torch.no_grad():
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        found = Normalization().inverse(y).clamp(0, 1)[0].permute(1, 2, 0).numpy()
        error = np.square(found - pixels / 255).mean()
        assert -10 * np.log10(error) == pytest.approx(expected, abs=0.3)


def test_images_reach_the_networks_by_one_normalisation_that_its_folder_keeps(tmp_path):
    imagenet = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    imagenet.save(tmp_path)
    assert Normalization.load(tmp_path) == imagenet
    pixels = images(2)
    x = imagenet(from_uint8(pixels, CPU))
    assert x[1, 2, 3, 4].item() == pytest.approx((pixels[1, 3, 4, 2] / 255 - 0.406) / 0.225, rel=1e-5)
    torch.testing.assert_close(imagenet.inverse(x), from_uint8(pixels, CPU))


def test_a_pretrained_text_encoder_and_autoencoder_encode_as_they_are(checkpoint, tmp_path):
    pixels = images(3)
    frame = pd.DataFrame({"image_id": ["a", "b", "c"], "split": ["train", "train", "validation"]})
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae")
    normalization = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    params = Encode(text_encoder={"kind": "pretrained", "model": str(checkpoint)})
    np.save(tmp_path / "hints.npy", pixels)
    captions = dict(zip("abc", CAPTIONS, strict=True))
    encode(frame, pixels, captions, vae, normalization, params, tmp_path, CPU)
    found = Encoded.open(tmp_path)

    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    model = CLIPTextModel.from_pretrained(checkpoint / "text_encoder").eval()
    for row, caption in [(0, ""), *zip(found.index["caption"], CAPTIONS, strict=True)]:
        tokens = tokenizer(caption, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
        expected = model(tokens.input_ids).last_hidden_state[0]
        torch.testing.assert_close(torch.from_numpy(found.text[row].copy()), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        x = (
            torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        ) / (torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        expected = vae.encode(x).latent_dist.mean * 0.5
    torch.testing.assert_close(torch.from_numpy(found.mean.copy()), expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "text_encoder/model.safetensors").is_file() and (tmp_path / "tokenizer").is_dir()
