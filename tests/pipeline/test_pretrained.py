"""From pretrained parts to a pipeline by parameters alone: the stages as at the paper's scale, on tiny checkpoints."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file

from tests.tiny import SIZE, tiny_backbone, tiny_checkpoint
from vlmdiff import stages
from vlmdiff.core import workspace as w
from vlmdiff.core.params import Encode, Evaluate, FirstStage, Params, Prepare, Train
from vlmdiff.detection.detector import Detector
from vlmdiff.model.pipeline import VLMDiffPipeline

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def here(workspace, monkeypatch):
    monkeypatch.chdir(workspace.path)
    return workspace.path


def test_stages_start_from_a_checkpoint_and_end_in_a_pipeline_that_keeps_what_is_frozen(here):
    model = str(tiny_checkpoint(here / "checkpoint"))
    first_stage = FirstStage(
        pretrained={"model": model, "subfolder": "vae"}, image_size=SIZE, image_mean=MEAN, image_std=STD, steps=0
    )
    encode = Encode(text_encoder={"kind": "pretrained", "model": model})
    train = Train(
        pretrained={"model": model},
        sgn=True,
        trainable="paper",
        prediction="epsilon",
        hint_channels=(8, 16, 16),
        steps=2,
        batch_size=8,
        accumulate=2,
        gradient_checkpointing=True,
    )
    data, state = Prepare(), here / ".cache/train"
    stages.first_stage(first_stage, data, w.MANIFEST, state, w.FIRST_STAGE, w.FIRST_STAGE_REPORT)
    stages.encode(encode, data, w.MANIFEST, w.CAPTIONS, w.FIRST_STAGE, w.ENCODED)
    stages.train(train, w.ENCODED, w.FIRST_STAGE, state, w.PIPELINE, w.TRAIN_REPORT)

    for part, file in (
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("unet", "diffusion_pytorch_model"),
    ):
        before, after = (load_file(f"{root}/{part}/{file}.safetensors") for root in (model, w.PIPELINE))
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == ({"up_blocks", "conv_norm_out", "conv_out"} if part == "unet" else set())
    assert json.loads((w.PIPELINE / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "epsilon"

    pipeline = VLMDiffPipeline.from_pretrained(w.PIPELINE)
    assert pipeline.config.image_size == SIZE and tuple(pipeline.config.image_mean) == MEAN
    images = torch.rand(2, 3, SIZE, SIZE)
    reconstruction = pipeline(images, noise_level=500, steps=2).images
    assert reconstruction.shape == images.shape and reconstruction.isfinite().all()
    assert not any(state.iterdir())


def test_stages_work_in_the_features_of_a_backbone_and_end_in_a_detector_that_has_it(here):
    folder = tiny_backbone(here / "backbone")
    backbone = {"model": str(folder), "image_size": SIZE, "layers": (1, 2), "grid": 8, "decoder_channels": 8}
    first_stage = FirstStage(kind="backbone", backbone=backbone, image_size=SIZE, latent_channels=6, steps=2)
    train = Train(block_channels=(32, 32), hint_channels=(8, 8, 8), head_size=16, steps=2, batch_size=4)
    data, state = Prepare(), here / ".cache/train"
    stages.first_stage(first_stage, data, w.MANIFEST, state, w.FIRST_STAGE, w.FIRST_STAGE_REPORT)
    stages.encode(Encode(), data, w.MANIFEST, w.CAPTIONS, w.FIRST_STAGE, w.ENCODED)
    # Codes are certain: their deviations would be as large on disk as they are.
    assert not (w.ENCODED / "std.npy").exists()
    stages.train(train, w.ENCODED, w.FIRST_STAGE, state, w.PIPELINE, w.TRAIN_REPORT)
    evaluate = Evaluate(detection={"features": [{"kind": "latents"}], "samples": 2})
    made_by = Params(prepare=data, evaluate=evaluate)
    stages.evaluate(made_by, w.MANIFEST, w.CAPTIONS, w.PIPELINE, w.DETECTOR, w.EVALUATION)
    assert (w.EVALUATION / "report.html").is_file()

    shutil.rmtree(folder)
    detector = Detector.from_pretrained(w.DETECTOR)
    photograph = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    (found,) = detector.detect([photograph])
    assert found.anomaly_map.shape == (SIZE, SIZE) and found.reconstruction.shape == (SIZE, SIZE, 3)
    assert not any(state.iterdir())


def test_stages_start_from_a_tiny_autoencoder_and_end_in_a_threshold_that_costs_have_chosen(here):
    shape = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    AutoencoderTiny(**shape, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)).save_pretrained(here / "tiny")
    first_stage = FirstStage(pretrained={"model": str(here / "tiny")}, image_size=SIZE, steps=0)
    train = Train(block_channels=(32, 32), hint_channels=(8, 8, 8), head_size=16, steps=2, batch_size=4)
    data, state = Prepare(), here / ".cache/train"
    stages.first_stage(first_stage, data, w.MANIFEST, state, w.FIRST_STAGE, w.FIRST_STAGE_REPORT)
    stages.encode(Encode(), data, w.MANIFEST, w.CAPTIONS, w.FIRST_STAGE, w.ENCODED)
    stages.train(train, w.ENCODED, w.FIRST_STAGE, state, w.PIPELINE, w.TRAIN_REPORT)
    evaluate = Evaluate(
        detection={"features": [{"kind": "latents"}, {"kind": "pixels"}]},
        decision={"costs": {"miss": 1e6, "false_alarm": 1}},
    )
    stages.evaluate(
        Params(prepare=data, evaluate=evaluate), w.MANIFEST, w.CAPTIONS, w.PIPELINE, w.DETECTOR, w.EVALUATION
    )
    # A miss costs so much that nearly every image has to raise an alarm.
    assert Detector.from_pretrained(w.DETECTOR).calibrated().false_alarm_rate > 0.2
    assert "chosen by the costs" in (w.EVALUATION / "report.html").read_text()
