"""Losses that make an autoencoder's images sharp: a distance in a backbone's features, and a patch discriminator."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from vlmdiff.core.params import Discriminator

# Images (B, 3, S, S) in [0, 1] to one map (B, C, h, w) per layer.
Features = Callable[[torch.Tensor], list[torch.Tensor]]


def perceptual_distance(features: Features, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of features of unit length, summed over layers.

    This is LPIPS (Zhang et al., 2018) without weights.

    a, b: (B, 3, S, S) in [0, 1]; a gradient flows into `a` only.
    """
    with torch.no_grad():
        targets = features(b)
    distances = (
        (F.normalize(x.float(), dim=1) - F.normalize(y.float(), dim=1)).square().sum(1).mean()
        for x, y in zip(features(a), targets, strict=True)
    )
    return sum(distances, start=torch.zeros((), device=a.device))


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) to a map of logits, one per patch, positive for photographs (PatchGAN, Isola et al., 2017).

    It normalises groups instead of batches: an image's verdict does not depend on the others of its batch.
    """

    def __init__(self, channels: int, layers: int):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        body = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths)):
            stride = 2 if i + 1 < layers else 1
            body += [nn.Conv2d(before, after, 4, stride, padding=1, bias=False), nn.GroupNorm(8, after)]
            body += [nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)


def adversarial_loss(
    discriminator: PatchDiscriminator,
    params: Discriminator,
    photographs: torch.Tensor,
    reconstructions: torch.Tensor,
    reconstruction_loss: torch.Tensor,
    last_weight: torch.Tensor,
    mean_over_processes: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return the decoder's loss against a fixed discriminator plus the discriminator's hinge loss on fixed images.

    The two share no weights: one backward pass gives each network the gradient of its own loss. The decoder's is scaled
    to `params.weight` times the gradient of `reconstruction_loss` at its last layer, `last_weight` (Esser et al., 2021,
    eq. 7).
    """
    fixed = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    fooled = -torch.func.functional_call(discriminator, fixed, (reconstructions,)).float().mean()
    weight = gradient_ratio(reconstruction_loss, fooled, last_weight, mean_over_processes)
    real, false = discriminator(photographs).float(), discriminator(reconstructions.detach()).float()
    hinge = (F.relu(1 - real).mean() + F.relu(1 + false).mean()) / 2
    return params.weight * weight * fooled + hinge


def gradient_ratio(
    a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, mean_over_processes: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the norm of the gradient of loss `a` over that of `b` at `weight`, at most 10,000, without a gradient."""
    # Scaled up, gradients of a mean over many pixels survive float16; the ratio is the same.
    scale = 2.0**10
    norms = [
        mean_over_processes(torch.autograd.grad(scale * loss, weight, retain_graph=True)[0]).norm() for loss in (a, b)
    ]
    return (norms[0] / (norms[1] + scale * 1e-4)).clamp(max=1e4).detach()
