"""The smallest real models: random weights, the libraries' own classes, built in a second."""

import torch
from diffusers import AutoencoderKL

from vlmdiff.detection.detector import Detector
from vlmdiff.model.pipeline import VLMDiffPipeline
from vlmdiff.params import AutoencoderFeatures, Detection, Pixels, TextEncoder, Train
from vlmdiff.training.diffusion import build
from vlmdiff.training.text_encoder import train_text_encoder, train_tokenizer

CAPTIONS = ["a red round thing on white", "a blue square thing on grey", "green stripes from left to right"]
SIZE = 32


def tiny_pipeline(**train) -> VLMDiffPipeline:
    """Images of 32 pixels, latents of 8, a fraction of a million parameters."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        scaling_factor=1.0,
    ).eval()
    params = TextEncoder(vocabulary=300, max_tokens=16, hidden_size=16, layers=1, heads=2, steps=1)
    tokenizer = train_tokenizer(CAPTIONS, params)
    thumbnails = torch.rand(len(CAPTIONS), 3, 8, 8)
    text_encoder = train_text_encoder(tokenizer, CAPTIONS, thumbnails, params, 0, torch.device("cpu"))
    settings = {
        "block_channels": (32, 32),
        "hint_channels": (8, 16, 16),
        "head_size": 16,
        "steps": 1,
        **train,
    }
    pipeline = build(vae, text_encoder, tokenizer, Train(**settings))
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.sgn):
        module.eval()
    return pipeline


def tiny_detector(**detection) -> Detector:
    """A detector on `tiny_pipeline`, not yet calibrated."""
    settings = {
        "steps": 2,
        "features": (Pixels(kind="pixels"), AutoencoderFeatures(kind="autoencoder", layers=(0, 1))),
        "smoothing": 1.0,
        **detection,
    }
    return Detector(tiny_pipeline(), Detection(**settings))
