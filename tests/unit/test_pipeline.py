"""VLMDiffPipeline: what it saves it loads, and a reconstruction is what the formulas say."""

import json
import math

import pytest
import torch

from tests.tiny import SIZE, tiny_pipeline
from vlmdiff.core.errors import InputError
from vlmdiff.model.pipeline import VLMDiffPipeline
from vlmdiff.model.tiny_autoencoder import TinyAutoencoder


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_pipeline()
    # A control of zero would hide whether the hint matters.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in (*pipeline.sgn.control.controlnet_down_blocks, pipeline.sgn.control.controlnet_mid_block):
            block.weight.normal_(0, 0.1, generator=generator)
        pipeline.sgn.control.controlnet_cond_embedding.conv_out.weight.normal_(0, 0.1, generator=generator)
    return pipeline


def images(count=3):
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def test_a_saved_pipeline_loads_and_computes_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = VLMDiffPipeline.from_pretrained(tmp_path)
    before = pipeline(images(), ["a red thing"] * 3)
    after = loaded(images(), ["a red thing"] * 3)
    torch.testing.assert_close(after.images, before.images, rtol=0, atol=0)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "VLMDiffPipeline"
    weights = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert weights == {".json", ".safetensors"}


def test_a_pipeline_with_a_tiny_autoencoder_is_saved_and_loaded(pipeline, tmp_path):
    shape = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    vae = TinyAutoencoder(**shape, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)).eval()
    ours = VLMDiffPipeline(**{**pipeline.components, "vae": vae}, image_size=SIZE)
    ours.save_pretrained(tmp_path)
    x = torch.rand(2, 3, SIZE, SIZE)
    found = VLMDiffPipeline.from_pretrained(tmp_path)(x, steps=1).images
    assert torch.equal(found, ours(x, steps=1).images) and not torch.equal(found, pipeline(x, steps=1).images)


def test_an_image_is_reconstructed_alike_in_any_batch(pipeline):
    x = images(4)
    together = pipeline(x, seed=3).images
    alone = torch.cat([pipeline(x[i : i + 1], seed=3).images for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_seed_decides_the_reconstruction(pipeline):
    first, again, other = (pipeline(images(), seed=seed).images for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().max() > 1e-3


def test_hint_and_caption_reach_the_prediction(pipeline):
    latents = torch.randn(1, 4, SIZE // 4, SIZE // 4)
    timestep = torch.tensor(400)
    text = pipeline.encode_captions(["a red round thing", "green stripes"])
    hint = pipeline.normalize(images(2))

    def predict(caption, image):
        with torch.no_grad():
            return pipeline.predict_noise(latents, timestep, text[caption : caption + 1], hint[image : image + 1])

    assert not torch.allclose(predict(0, 0), predict(1, 0))
    assert not torch.allclose(predict(0, 0), predict(0, 1))


def test_ddim_with_a_perfect_prediction_returns_the_clean_latents(pipeline, monkeypatch):
    """Where the network knows the noise, any number of steps from any level leads back to the latents."""
    x = images(2)
    with torch.no_grad():
        clean = pipeline.encode_images(x)
    alphas = pipeline.scheduler.alphas_cumprod

    def oracle(latents, timestep, *_):
        alpha = alphas[timestep]
        noise = (latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean, None

    monkeypatch.setattr(pipeline, "denoise", oracle)
    for level, steps in ((300, 1), (700, 4), (999, 10)):
        torch.testing.assert_close(pipeline(x, noise_level=level, steps=steps).latents, clean, rtol=1e-3, atol=1e-3)


def test_predict_noise_agrees_with_the_schedulers_own_conversion(pipeline):
    latents, timestep = torch.randn(1, 4, SIZE // 4, SIZE // 4), torch.tensor(400)
    text, hint = pipeline.encode_captions(["a red thing"]), pipeline.normalize(images(1))
    with torch.no_grad():
        velocity, _ = pipeline.denoise(latents, timestep, text, hint)
        noise = pipeline.predict_noise(latents, timestep, text, hint)
    pipeline.scheduler.set_timesteps(1000)
    clean = pipeline.scheduler.step(velocity, timestep, latents).pred_original_sample
    torch.testing.assert_close(
        pipeline.scheduler.add_noise(clean, noise, timestep[None]), latents, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("shape", [(3, SIZE, SIZE), (1, 3, SIZE, SIZE + 1), (1, 1, SIZE, SIZE)])
def test_images_of_another_shape_are_refused(pipeline, shape):
    with pytest.raises(InputError, match="images must be"):
        pipeline(torch.zeros(shape))


def test_a_caption_too_few_is_refused(pipeline):
    with pytest.raises(InputError, match="1 captions for 3 images"):
        pipeline(images(), ["one"])


def test_the_global_random_state_plays_no_part(pipeline):
    torch.manual_seed(1)
    first = pipeline(images(), seed=0).images
    torch.manual_seed(2)
    torch.testing.assert_close(pipeline(images(), seed=0).images, first, rtol=0, atol=0)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_the_expected_deviation_is_that_of_the_predicted_latents(prediction):
    """Of an output that is off by e, in every channel, the clean latents are off by e times a factor of the level."""
    pipeline = tiny_pipeline(prediction=prediction)
    x, level, error = images(2), 600, 0.25
    with torch.no_grad():
        clean = pipeline.encode_images(x)
    alpha = pipeline.scheduler.alphas_cumprod[level]

    def off_by_error(latents, timestep, *_):
        noise = (latents - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        right = noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        return right + error, torch.full_like(latents[:, 0], 2 * math.log(error))

    pipeline.denoise = off_by_error
    found = pipeline(x, noise_level=level, steps=1)
    torch.testing.assert_close((found.latents - clean).square().mean(1).sqrt(), found.deviation, rtol=1e-3, atol=1e-4)


def test_a_network_that_has_not_learned_its_variance_expects_nothing():
    assert tiny_pipeline(learn_variance=False)(images(1)).deviation is None


def test_the_noise_level_decides_what_is_forgotten(pipeline):
    """Unlike an autoencoder's, a reconstruction goes further from the photograph the more noise it starts from."""
    x = images()
    with torch.no_grad():
        clean = pipeline.encode_images(x)
    far = [(pipeline(x, noise_level=level, steps=1).latents - clean).norm() for level in (0, 10, 100, 999)]
    assert far == sorted(far) and far[0] < 0.2 * far[-1]


def test_guidance_goes_from_the_empty_prompt_through_the_captions(pipeline):
    captions = ["a red round thing", "green stripes", "a blue square thing"]
    arguments = dict(noise_level=600, steps=1)
    empty, captioned = (pipeline(images(), texts, **arguments).latents for texts in (None, captions))
    assert (empty - captioned).abs().max() > 1e-3
    for guidance in (0.0, 1.0, 3.5):
        # The prediction of one step is linear in the network's output.
        found = pipeline(images(), captions, guidance=guidance, **arguments).latents
        torch.testing.assert_close(found, empty + guidance * (captioned - empty), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("captions", "guidance", "asked"),
    [
        (None, 9.0, [3]),
        (["", "", ""], 9.0, [3]),
        (["a red thing", "", "green stripes"], 9.0, [3, 2]),
        (["a red thing", "", "green stripes"], 1.0, [3]),
    ],
)
def test_guidance_costs_only_where_it_changes_something(pipeline, captions, guidance, asked):
    seen = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    pipeline(images(), captions, steps=1, guidance=guidance)
    handle.remove()
    assert seen == asked


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_with_guidance_too_an_image_is_reconstructed_alike_in_any_batch(pipeline, solver, spacing):
    x, captions = images(4), ["a red round thing", "", "green stripes", "a blue square thing"]
    arguments = dict(noise_level=700, steps=4, guidance=2.5, spacing=spacing, solver=solver)
    together = pipeline(x, captions, **arguments).images
    alone = torch.cat([pipeline(x[i : i + 1], captions[i : i + 1], **arguments).images for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_a_pipeline_without_text_encoder_takes_embeddings_alone(pipeline, tmp_path):
    without = VLMDiffPipeline(**{**pipeline.components, "text_encoder": None, "tokenizer": None}, image_size=SIZE)
    without.save_pretrained(tmp_path)
    loaded = VLMDiffPipeline.from_pretrained(tmp_path)
    assert loaded.text_encoder is None and loaded.tokenizer is None
    arguments = (
        torch.ones(1, 4, SIZE // 4, SIZE // 4),
        torch.tensor(400),
        pipeline.encode_captions(["a red thing"]),
        pipeline.normalize(images(1)),
    )
    with torch.no_grad():
        expected, found = (p.predict_noise(*arguments) for p in (pipeline, loaded))
    torch.testing.assert_close(found, expected)
    with pytest.raises(InputError, match="text encoder"):
        loaded(images(1))


def test_a_pipeline_without_sgn_does_not_see_the_photograph_beside_the_latents(tmp_path):
    without = tiny_pipeline(sgn=False)
    without.save_pretrained(tmp_path)
    loaded = VLMDiffPipeline.from_pretrained(tmp_path)
    assert loaded.sgn is None
    x = images(2)
    with torch.no_grad():
        latents = loaded.encode_images(x)
        one, other = (loaded.reconstruct(latents, hint)[0] for hint in (x, 1 - x))
    assert torch.equal(one, other)
    torch.testing.assert_close(one, without(x).latents)
