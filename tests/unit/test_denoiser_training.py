"""Training the denoiser: pretrained starts, frozen parts, randomness, precision, parts of a batch."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from tests.tiny import tiny_checkpoint, tiny_encoded
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Train
from vlmdiff.model.normalization import Normalization
from vlmdiff.training.diffusion import build, choose_trainable, train_denoiser

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def settings(checkpoint, **changes) -> Train:
    return Train(
        **{
            "pretrained": {"model": str(checkpoint)},
            "sgn": True,
            "trainable": "paper",
            "prediction": "epsilon",
            "hint_channels": (8, 16, 16),
            "steps": 4,
            "precision": "fp32",
            "batch_size": 8,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "validate_every": 1,
            "ema_decay": 0.0,
            **changes,
        }
    )


def start(checkpoint, params):
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae")
    vae.register_to_config(sample_size=32)
    text_encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder")
    return build(vae, text_encoder, CLIPTokenizer.from_pretrained(checkpoint / "tokenizer"), params, IMAGENET)


def trained(checkpoint, folder, data=None, **changes):
    params = settings(checkpoint, **changes)
    pipeline = start(checkpoint, params)
    history = train_denoiser(pipeline, data or tiny_encoded(), params, folder)
    return torch.nn.ModuleDict({"unet": pipeline.unet, "sgn": pipeline.sgn}).state_dict(), history


def assert_same(a, b, **tolerance):
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_training_and_validation_draw_their_noise_levels_from_the_range_that_is_set(checkpoint, tmp_path, monkeypatch):
    params = settings(checkpoint, noise_levels=(300, 302), steps=8)
    pipeline = start(checkpoint, params)
    add_noise, drawn = pipeline.scheduler.add_noise, []

    def recorded(clean, noise, levels):
        drawn.append(levels)
        return add_noise(clean, noise, levels)

    monkeypatch.setattr(pipeline.scheduler, "add_noise", recorded)
    train_denoiser(pipeline, tiny_encoded(), params, tmp_path)
    assert set(torch.cat(drawn).tolist()) == {300, 301, 302}


@pytest.mark.parametrize(("most", "steps"), [(None, 8), (0.1, 1), (1.5, 4), (1000, 8)])
def test_few_images_are_trained_on_for_so_many_epochs_at_most(checkpoint, tmp_path, most, steps):
    # 20 images to train on: 1.5 epochs are 30 images, 3.75 batches.
    changes = {"steps": 8, "warmup_steps": 4, "batch_size": 8, "max_epochs": most, "validate_every": 1}
    _, history = trained(checkpoint, tmp_path, **changes)
    assert history[-1]["step"] == steps
    # The learning rate rises for half of the steps, and then falls.
    rates = [row["learning_rate"] for row in history]
    assert rates == sorted(rates[: steps // 2]) + sorted(rates[steps // 2 :], reverse=True)


def test_levels_that_the_checkpoints_schedule_has_not_are_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "short")
    file = tmp_path / "short/scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_train_timesteps": 500}))
    with pytest.raises(InputError, match=r"0 to 499\. Set train\.noise_levels"):
        start(tmp_path / "short", settings(tmp_path / "short", noise_levels=(450, 550)))


def test_a_pretrained_start_has_the_weights_and_the_schedule_of_the_checkpoint(checkpoint):
    pipeline = start(checkpoint, settings(checkpoint))
    unet = load_file(checkpoint / "unet/diffusion_pytorch_model.safetensors")
    ours = pipeline.unet.state_dict()
    # One output more, which says how far off the others may be; it starts at zero.
    for name in ("conv_out.weight", "conv_out.bias"):
        assert ours[name][-1].abs().max() == 0
        ours[name] = ours[name][:-1]
    assert_same(unet, ours, rtol=0, atol=0)
    control = pipeline.sgn.control.state_dict()
    copied = {
        name: weight
        for name, weight in unet.items()
        if name.startswith(("conv_in.", "time_embedding.", "down_blocks.", "mid_block."))
    }
    assert copied
    assert_same(copied, control, rtol=0, atol=0)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    # Betas that are linear in their square roots (Rombach et al., 2022).
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, torch.cumprod(1 - betas, 0))
    assert tuple(pipeline.config.image_mean) == IMAGENET.image_mean
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(pipeline.normalize(x)[0, 2], (x[0, 2] - 0.406) / 0.225)


def test_at_first_a_pretrained_denoiser_predicts_what_its_unet_does(checkpoint):
    pipeline = start(checkpoint, settings(checkpoint))
    x, text, image = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16), torch.randn(2, 3, 32, 32)
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    with torch.no_grad():
        alone = unet(x, torch.tensor(500), encoder_hidden_states=text).sample
        torch.testing.assert_close(pipeline.denoise(x, torch.tensor(500), text, image)[0], alone, rtol=1e-5, atol=1e-6)


def test_every_trainable_tensor_receives_a_gradient_and_no_frozen_one_changes(tmp_path):
    """Defect 1 of the reference: its fusion block never trains."""
    # 64 channels: in a normalisation's group of one, a bias would have no gradient but rounding's.
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", width=64)
    params = settings(checkpoint, steps=6, weight_decay=0.0)
    pipeline = start(checkpoint, params)
    denoiser = choose_trainable(pipeline, params)
    before = {name: weight.detach().clone() for name, weight in denoiser.named_parameters()}
    trainable = {name for name, weight in denoiser.named_parameters() if weight.requires_grad}
    seen = set()
    for name in trainable:
        denoiser.get_parameter(name).register_post_accumulate_grad_hook(
            lambda weight, name=name: seen.add(name) if weight.grad.count_nonzero() else None
        )
    train_denoiser(pipeline, tiny_encoded(), params, tmp_path / "state")
    assert seen == trainable

    frozen = before.keys() - trainable
    changed = {name for name, weight in denoiser.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == trainable
    tops = {".".join(name.split(".")[:2]) for name in trainable}
    assert tops == {"unet.up_blocks", "unet.conv_norm_out", "unet.conv_out", "sgn.control", "sgn.fusion"}
    tops = {".".join(name.split(".")[:2]) for name in frozen}
    assert tops == {"unet.conv_in", "unet.time_embedding", "unet.down_blocks", "unet.mid_block", "sgn.control"}
    # With control at the coarsest resolution alone, the finest outputs of the SGN reach nothing.
    names = {name for name in frozen if name.startswith("sgn.")}
    assert names == {f"sgn.control.controlnet_down_blocks.{i}.{what}" for i in (0, 1) for what in ("weight", "bias")}


def test_all_of_the_unet_can_be_trained(checkpoint):
    params = settings(checkpoint, trainable="all", only_mid_control=False)
    assert all(weight.requires_grad for weight in choose_trainable(start(checkpoint, params), params).parameters())


def test_only_what_is_trained_is_in_the_checkpoint(checkpoint, tmp_path):
    trained(checkpoint, tmp_path, steps=2, checkpoint_every=1)
    (file,) = (tmp_path / "checkpoint").glob("*/state.safetensors")
    names = load_file(file).keys()
    kinds = {name.split(".")[0] for name in names}
    assert kinds == {"weights", "average", "best", "optimizer"}
    assert not any("unet.down_blocks" in name or "unet.mid_block" in name for name in names)


def test_noise_and_posterior_are_drawn_from_the_seed(checkpoint, tmp_path):
    """Defect 7 of the reference: neither is seeded there."""
    torch.manual_seed(10)
    first, _ = trained(checkpoint, tmp_path / "a", steps=2)
    torch.manual_seed(11)
    again, _ = trained(checkpoint, tmp_path / "b", steps=2)
    assert_same(first, again, rtol=0, atol=0)

    # One image repeated has no order: what another seed changes is noise.
    data = tiny_encoded()
    data.mean[:], data.hints[:], data.index["caption"] = data.mean[0], data.hints[0], 1
    _, one = trained(checkpoint, tmp_path / "c", data, steps=1)
    _, other = trained(checkpoint, tmp_path / "d", data, steps=1, seed=1)
    assert one[0]["loss"] != other[0]["loss"]
    data.std[:] = 0
    _, certain = trained(checkpoint, tmp_path / "e", data, steps=1)
    assert one[0]["loss"] != certain[0]["loss"]


@pytest.mark.parametrize(
    ("dropout", "reads_empty", "reads_captions"), [(0.0, False, True), (0.5, True, True), (1.0, True, False)]
)
def test_captions_are_replaced_by_the_empty_one_at_the_rate(checkpoint, tmp_path, dropout, reads_empty, reads_captions):
    """Defect 8 of the reference: no dropout in training, though the empty prompt is what is used at test."""

    def losses(name, change=None):
        data = tiny_encoded()
        if change is not None:
            data.text[change] += 1.0
        _, history = trained(checkpoint, tmp_path / name, data, steps=2, caption_dropout=dropout)
        return [row["loss"] for row in history]

    plain = losses("plain")
    assert (losses("empty", slice(0, 1)) != plain) == reads_empty
    assert (losses("captions", slice(1, None)) != plain) == reads_captions


@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_batch_add_up_to_the_batch(checkpoint, tmp_path, parts):
    _, history = trained(checkpoint, tmp_path / "whole")
    _, other = trained(checkpoint, tmp_path / "split", accumulate=parts)
    for key in ("loss", "validation_loss"):
        assert [row[key] for row in other] == pytest.approx([row[key] for row in history], rel=1e-5)


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"train\.batch_size = 8 cannot be shared .* multiple of 3"):
        trained(checkpoint, tmp_path, accumulate=3)


def test_gradient_checkpointing_changes_nothing_but_memory(checkpoint, tmp_path):
    plain, history = trained(checkpoint, tmp_path / "plain", steps=2)
    saved, other = trained(checkpoint, tmp_path / "saved", steps=2, gradient_checkpointing=True)
    assert other == history
    assert_same(plain, saved, rtol=0, atol=0)


def test_bfloat16_learns_with_weights_in_float32(checkpoint, tmp_path):
    settings = {"steps": 6, "learning_rate": 2e-3}
    _, history = trained(checkpoint, tmp_path / "fp32", **settings)
    AcceleratorState._reset_state()
    weights, rounded = trained(checkpoint, tmp_path / "bf16", precision="bf16", **settings)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert rounded[-1]["validation_loss"] < 0.9 * rounded[0]["validation_loss"]
    # bfloat16 rounds to 8 bits, 2^-9 at most. Roundings of the layers along a path partly cancel; a prediction wrong by
    # eight of them, 2^-6, moves its squared error by twice that. A loss that is the same was not computed in bfloat16.
    for row, exact in zip(rounded, history, strict=True):
        assert row["validation_loss"] == pytest.approx(exact["validation_loss"], rel=2**-5)
        assert row["validation_loss"] != exact["validation_loss"]


def test_float16_without_a_gpu_is_refused(checkpoint, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=r"train\.precision: fp16 needs a GPU"):
        trained(checkpoint, tmp_path, precision="fp16")


def test_another_prediction_than_the_checkpoints_is_refused(checkpoint):
    with pytest.raises(InputError, match=r"predict epsilon\. Set train\.prediction to epsilon"):
        start(checkpoint, settings(checkpoint, prediction="v_prediction"))


def test_a_first_stage_of_another_shape_is_refused(checkpoint):
    vae = AutoencoderKL(latent_channels=3, block_out_channels=(8, 8, 8), norm_num_groups=8)
    text_encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    with pytest.raises(InputError, match="latents of 4 channels, but gets 3"):
        build(vae, text_encoder, tokenizer, settings(checkpoint))
    with pytest.raises(InputError, match=r"train\.hint_channels has 2 entries.* 4 times smaller"):
        build(vae, text_encoder, tokenizer, settings(checkpoint, hint_channels=(8, 16)))


def test_a_name_on_the_hub_needs_a_revision(checkpoint):
    with pytest.raises(InputError, match="revision"):
        start(checkpoint, settings(checkpoint, pretrained={"model": "somebody/some-model"}))


def test_a_checkpoint_that_lacks_weights_is_refused(checkpoint, tmp_path):
    """Defect 12 of the reference: what is missing stays random there, without a word."""
    for part in ("unet", "scheduler"):
        (tmp_path / part).mkdir()
        for file in (checkpoint / part).iterdir():
            (tmp_path / part / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file)
    with pytest.raises(InputError, match=r"conv_in\.weight"):
        start(checkpoint, settings(tmp_path))


def test_a_unet_of_another_design_is_refused(checkpoint, tmp_path):
    (tmp_path / "scheduler").mkdir()
    file = checkpoint / "scheduler/scheduler_config.json"
    (tmp_path / "scheduler" / file.name).write_bytes(file.read_bytes())
    config = json.loads((checkpoint / "unet/config.json").read_text()) | {"use_linear_projection": True}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="differs in use_linear_projection"):
        start(checkpoint, settings(tmp_path))
