"""The semantic-guided network: what reaches the UNet, and that everything in it learns."""

import pytest
import torch

from tests.tiny import SIZE, tiny_pipeline
from vlmdiff.model.sgn import SemanticGuidedNetwork, SpatialFeatureFusion


def inputs(pipeline, batch=2):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, SIZE // 4, SIZE // 4, generator=generator)
    image = torch.rand(batch, 3, SIZE, SIZE, generator=generator) * 2 - 1
    text = pipeline.encode_captions(["a red round thing"] * batch)
    return latents, torch.full((batch,), 500), text, image


def test_at_first_the_sgn_changes_nothing():
    pipeline = tiny_pipeline()
    latents, timestep, text, image = inputs(pipeline)
    alone = pipeline.unet(latents, timestep, encoder_hidden_states=text).sample[:, : latents.shape[1]]
    torch.testing.assert_close(pipeline.denoise(latents, timestep, text, image)[0], alone, rtol=0, atol=0)


@pytest.mark.parametrize("only_mid_control", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("levels", [2, 3])
def test_every_tensor_that_can_reach_the_output_receives_a_gradient(levels, fuse, only_mid_control):
    pipeline = tiny_pipeline(block_channels=(32,) * levels, only_mid_control=only_mid_control, fuse=fuse)
    denoiser = torch.nn.ModuleDict({"unet": pipeline.unet, "sgn": pipeline.sgn}).train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
    latents, timestep, text, image = inputs(pipeline)
    seen = set()
    for _ in range(4):
        loss = (pipeline.denoise(latents, timestep, text, image)[0] - torch.ones_like(latents)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        seen |= {name for name, p in denoiser.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
    missing = {name for name, _ in denoiser.named_parameters()} - seen
    # Control of all but the two coarsest levels feeds neither the fusion nor, with `only_mid_control`, the UNet;
    # without the fusion, that of all but the coarsest.
    cut = range(2 * (levels - (2 if fuse else 1))) if only_mid_control else ()
    assert missing == {f"sgn.control.controlnet_down_blocks.{i}.{kind}" for i in cut for kind in ("weight", "bias")}
    assert any(name.startswith("sgn.fusion.") for name in seen) == fuse


def test_only_mid_control_leaves_the_fine_skips_alone():
    arguments = dict(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=16,
        hint_channels=(8, 16, 16),
    )
    x, image = torch.randn(1, 4, 16, 16), torch.randn(1, 3, 64, 64)
    text = torch.randn(1, 5, 16)
    coarse, _ = SemanticGuidedNetwork(**arguments, only_mid_control=True)(x, torch.tensor(10), text, image)
    assert [tuple(tensor.shape) for tensor in coarse] == [(), (), (), (), (1, 32, 4, 4), (1, 64, 4, 4)]
    full, _ = SemanticGuidedNetwork(**arguments, only_mid_control=False)(x, torch.tensor(10), text, image)
    assert [tuple(t.shape[1:]) for t in full] == [
        (32, 16, 16),
        (32, 16, 16),
        (32, 8, 8),
        (32, 8, 8),
        (32, 4, 4),
        (64, 4, 4),
    ]


def test_fusion_is_the_published_formula():
    fusion = SpatialFeatureFusion([3], [5])
    source, target = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    weight = fusion.downsamplers[0][0][0].weight
    down = torch.nn.functional.conv2d(source, weight, stride=2, padding=1)
    normal = (down - down.mean((2, 3), keepdim=True)) / (down.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    total = target + normal * torch.sigmoid(normal)
    torch.testing.assert_close(fusion([source], [target])[0], total * torch.sigmoid(total))


def test_the_fusions_gradient_of_a_batch_is_the_sum_of_its_images():
    """PyTorch 2.13's InstanceNorm2d fails this: on a CPU, for a batch of one in channels-last."""
    fusion = SpatialFeatureFusion([3], [5]).to(memory_format=torch.channels_last)
    weight = fusion.downsamplers[0][0][0].weight
    source = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    target = torch.randn(4, 5, 4, 4).to(memory_format=torch.channels_last)

    def gradient(rows):
        return torch.autograd.grad(fusion([source[rows]], [target[rows]])[0].square().sum(), weight)[0]

    alone = sum(gradient(slice(i, i + 1)) for i in range(4))
    torch.testing.assert_close(alone, gradient(slice(None)), rtol=1e-4, atol=1e-3)


def test_at_the_papers_size_the_fusion_has_the_published_channels():
    with torch.device("meta"):
        sgn = SemanticGuidedNetwork()
    channels = [[(down[0].in_channels, down[0].out_channels) for down in row] for row in sgn.fusion.downsamplers]
    assert channels == [[(640, 1280), (1280, 1280), (1280, 1280)]] * 3
