"""Vision models of many families: the libraries' own classes, tiny and random; and photographs for them."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Trained at 48 pixels and given 64 here, so that positions are interpolated.
TRAINED, GIVEN, PATCH = 48, 64, 8
WIDTHS = [8, 16, 24, 32]


def transformer(**changes) -> dict:
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    return {**shape, "image_size": TRAINED, "patch_size": PATCH, **changes}


def text() -> dict:
    return transformer(vocab_size=100, projection_dim=32, bos_token_id=0, eos_token_id=1)


def stages() -> dict:
    return {"hidden_sizes": WIDTHS, "depths": [1, 1, 1, 1]}


def swin() -> dict:
    return {"image_size": TRAINED, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 4]}


FAMILIES = {
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**transformer()), add_pooling_layer=False),
    "deit": lambda: tf.DeiTModel(tf.DeiTConfig(**transformer())),
    "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**transformer())),
    "dinov2_with_registers": lambda: tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**transformer())),
    "dinov3_vit": lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**transformer(), num_register_tokens=3)),
    "clip": lambda: tf.CLIPModel(tf.CLIPConfig(text_config=text(), vision_config=transformer())),
    "siglip": lambda: tf.SiglipModel(tf.SiglipConfig(text_config=text(), vision_config=transformer())),
    "yolos": lambda: tf.YolosModel(tf.YolosConfig(**transformer(image_size=[TRAINED, TRAINED]))),
    "swin": lambda: tf.SwinModel(tf.SwinConfig(**swin(), window_size=3)),
    "resnet": lambda: tf.ResNetModel(tf.ResNetConfig(embedding_size=8, layer_type="basic", **stages())),
    "convnext": lambda: tf.ConvNextModel(tf.ConvNextConfig(**stages())),
    "dinov3_convnext": lambda: tf.DINOv3ConvNextModel(tf.DINOv3ConvNextConfig(**stages())),
    "mobilenet_v2": lambda: tf.MobileNetV2Model(tf.MobileNetV2Config(depth_multiplier=0.25)),
}


def save_backbone(root: Path, family: str) -> Path:
    """The folder of a family's checkpoint under `root`, with a processor's file; made once."""
    folder = root / family
    if not folder.exists():
        torch.manual_seed(0)
        FAMILIES[family]().save_pretrained(folder)
        facts = {"image_processor_type": "ViTImageProcessor", "image_mean": MEAN, "image_std": STD}
        facts |= {"size": {"height": GIVEN, "width": GIVEN}, "resample": int(Image.Resampling.BILINEAR)}
        (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


def photograph(height: int = GIVEN, width: int = GIVEN, seed: int = 0) -> Image.Image:
    """Not noise: a resized photograph should look like itself."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
