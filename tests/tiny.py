"""The smallest real models: random weights, the libraries' own classes, built in a second."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from tests.backbones import GIVEN
from vlmdiff.core.params import (
    AutoencoderFeatures,
    Detection,
    FirstStage,
    Latents,
    Pixels,
    Retrieval,
    TextEncoder,
    Train,
)
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.normals import Normal
from vlmdiff.model.pipeline import VLMDiffPipeline
from vlmdiff.model.text import token_windows
from vlmdiff.training.diffusion import build
from vlmdiff.training.encoded import Encoded
from vlmdiff.training.first_stage import train_first_stage
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
    tokens, windows = token_windows(tokenizer, CAPTIONS, params.max_tokens, 4)
    thumbnails = torch.rand(len(CAPTIONS), 3, 8, 8)
    text_encoder = train_text_encoder(tokenizer, tokens[windows], thumbnails, params, 0, torch.device("cpu"))
    settings = {
        "block_channels": (32, 32),
        "hint_channels": (8, 16, 16),
        "head_size": 16,
        "steps": 1,
        "sgn": True,
        **train,
    }
    pipeline = build(vae, text_encoder, tokenizer, Train(**settings))
    pipeline.set_progress_bar_config(disable=True)
    for module in filter(None, (pipeline.unet, pipeline.sgn)):
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


def named(count: int, caption: str | None = None) -> list[Normal]:
    """What is known of `count` normal images of one class."""
    return [Normal(f"{i:064x}", f"thing/good/{i}.png", "thing", caption) for i in range(count)]


def save_tiny_detector(folder: Path) -> Path:
    """Save `tiny_detector`, calibrated on noise, into `folder`, and return it."""
    detector = tiny_detector(samples=1, steps=1)
    noise = np.random.default_rng(1).integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)
    detector.learn(list(noise), named(len(noise), "A grey thing."), described=True)
    detector.calibrate(list(noise))
    detector.save_pretrained(folder)
    return folder


def striped(count: int, seed: int) -> list[np.ndarray]:
    """Photographs with the same stripes, and noise."""
    noise = np.random.default_rng(seed).integers(0, 40, (count, GIVEN, GIVEN, 3))
    return list((noise + 100 * (np.arange(GIVEN) // 8 % 2)[None, :, None, None]).astype(np.uint8))


def tiny_retrieving_detector(model: Path, state: Path) -> Detector:
    """A calibrated detector with a bank of patches, in the features of a tiny transformer saved in `model`.

    state: an empty folder, for the training.
    """
    backbone = {"model": str(model), "image_size": GIVEN, "layers": (1, 2), "grid": 8, "decoder_channels": 16}
    shape = {"kind": "backbone", "image_size": GIVEN, "latent_channels": 6, "steps": 1, "batch_size": 4}
    images = np.stack(striped(8, seed=0))
    params = FirstStage(**shape, backbone=backbone)
    space, _ = train_first_stage(images, images[:4], params, state, torch.device("cpu"))
    text = tiny_pipeline()
    pipeline = build(space, text.text_encoder, text.tokenizer, Train(block_channels=(32, 32), head_size=16, steps=1))
    pipeline.set_progress_bar_config(disable=True)
    detection = Detection(
        steps=1, samples=1, features=(Latents(kind="latents"),), retrieval=Retrieval(patches=200), smoothing=1.0
    )
    detector = Detector(pipeline, detection)
    detector.learn(striped(8, seed=0), named(8))
    detector.calibrate(striped(20, seed=1), weigh=lambda evidence: 0.7)
    return detector


def tiny_checkpoint(folder: Path, width: int = 32) -> Path:
    """A folder as Stable Diffusion 1.5's: the same classes and files, three resolutions, random weights."""
    torch.manual_seed(1)
    UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(width, width, width),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        sample_size=64,  # not the size that it will be used at, as with Stable Diffusion's
        block_out_channels=(32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        scaling_factor=0.5,
    ).save_pretrained(folder / "vae")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    params = TextEncoder(vocabulary=300, max_tokens=16, hidden_size=16, layers=1, heads=2, steps=1)
    tokenizer = train_tokenizer(CAPTIONS, params)
    tokens, windows = token_windows(tokenizer, CAPTIONS, params.max_tokens, 4)
    thumbnails = torch.rand(len(CAPTIONS), 3, 8, 8)
    text_encoder = train_text_encoder(tokenizer, tokens[windows], thumbnails, params, 0, torch.device("cpu"))
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder.save_pretrained(folder / "text_encoder")
    return folder


def tiny_backbone(folder: Path) -> Path:
    """A vision transformer of two layers on images of 32 pixels, with its processor."""
    torch.manual_seed(2)
    ViTModel(
        ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=8,
        ),
        add_pooling_layer=False,
    ).save_pretrained(folder)
    ViTImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]).save_pretrained(folder)
    return folder


def tiny_encoded(latent: int = SIZE // 4, size: int = SIZE, tokens: int = 16, width: int = 16) -> Encoded:
    """20 images to train on and 6 held out, of three captions and the empty one."""
    generator = np.random.default_rng(3)
    count = 26
    return Encoded(
        index=pd.DataFrame({"split": ["train"] * 20 + ["validation"] * 6, "caption": generator.integers(1, 4, count)}),
        mean=generator.standard_normal((count, 4, latent, latent), dtype=np.float32),
        std=np.full((count, 4, latent, latent), 0.1, np.float32),
        text=generator.standard_normal((4, tokens, width), dtype=np.float32),
        windows=np.arange(4)[:, None],
        hints=generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
    )
