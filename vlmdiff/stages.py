"""The recipe: one function per stage, in order, from files to files.

A stage knows only its arguments. It writes into a temporary folder beside its output and renames that at the end, so
an output that exists is complete.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmdiff.core import params as p
from vlmdiff.core import workspace as w
from vlmdiff.core.console import say, track
from vlmdiff.core.errors import explained
from vlmdiff.core.files import atomic_folder, folder_mb
from vlmdiff.core.text import counted

if TYPE_CHECKING:
    import pandas as pd


def prepare(params: p.Prepare, made: Path, out: Path) -> None:
    """List images, classes, splits and masks in the manifest `out`; write generated images into `made`."""
    from vlmdiff.data import cifar, demo, layouts, listing, manifest

    with atomic_folder(made) as folder:
        if params.layout == "demo":
            demo.make_demo(folder, **params.demo.model_dump())
        elif params.layout == "cifar":
            cifar.unpack(params.root, folder, params.cifar.normal)
        if params.image_root == made and (given := params.root / layouts.GIVEN).is_dir():
            shutil.copytree(given, folder / layouts.GIVEN)
    with listing.unchanged(params.image_root):
        frame = listing.build(params, params.image_root)
    manifest.write(frame, out)
    many = counted(frame["class_name"].nunique(), "class")
    say(f"prepare: {counted(len(frame), 'image')} of {many} in {out}")


def validate(params: p.Validate, data: p.Prepare, model_size: int, manifest_file: Path, out: Path) -> None:
    """Check the data contract, and write its result and Data Docs into `out`. Raises InputError if it is broken.

    model_size: the model's resolution in pixels.
    """
    from vlmdiff.data import contract, manifest

    frame = manifest.read(manifest_file)
    contract.check_dataset(frame, data, params, model_size, out).raise_if_failed()


def caption(params: p.Caption, data: p.Prepare, manifest_file: Path, store: Path, out: Path, report: Path) -> None:
    """Write a caption for every image into the JSONL file `out`; captions in the store are reused.

    Raises InputError if captions break their contract.
    """
    from vlmdiff.captions import contract
    from vlmdiff.captions.captioners import caption_images
    from vlmdiff.captions.files import write_captions
    from vlmdiff.data import manifest

    frame = caption_images(manifest.read(manifest_file), data.image_root, data.root, params, data.max_pixels, store)
    contract.check_captions(frame, params, report).raise_if_failed()
    write_captions(frame, out)


def first_stage(
    params: p.FirstStage, data: p.Prepare, manifest_file: Path, state: Path, out: Path, report: Path
) -> None:
    """Fit the latent space to the normal training images; write the model into `out`, loss curves into `report`."""
    from vlmdiff.core.device import process_group
    from vlmdiff.data import manifest
    from vlmdiff.model.normalization import Normalization
    from vlmdiff.training.checkpoint import state_folder
    from vlmdiff.training.encoded import image_array
    from vlmdiff.training.first_stage import train_first_stage
    from vlmdiff.training.loop import write_history

    here = process_group()
    folder = state_folder(state, params, manifest_file)
    files = {split: folder / f"{split}.npy" for split in ("train", "validation")}
    if here.is_main_process:
        frame = manifest.read(manifest_file)
        for split, file in files.items():
            image_array(frame[frame["split"] == split], data, params.image_size, file)
    here.wait_for_everyone()
    images = {split: np.load(file, mmap_mode="c") for split, file in files.items()}
    vae, history = train_first_stage(images["train"], images["validation"], params, folder, here.device)
    if here.is_main_process:
        with atomic_folder(out) as temporary:
            vae.save_pretrained(temporary)
            Normalization(params.image_mean, params.image_std).save(temporary)
        write_history(history, report)
        shutil.rmtree(folder)
    here.destroy_process_group()


def encode(
    params: p.Encode, data: p.Prepare, manifest_file: Path, captions: Path, latent_space: Path, out: Path
) -> None:
    """Compute once what stays fixed while the denoiser trains: latents, text embeddings and hint images."""
    from vlmdiff.captions.files import read_captions
    from vlmdiff.core.device import pick_device
    from vlmdiff.data import manifest
    from vlmdiff.model.first_stage import load_first_stage
    from vlmdiff.model.normalization import Normalization
    from vlmdiff.training import encoded

    device = pick_device()
    frame = manifest.read(manifest_file)
    frame = encoded.mirrored(frame[frame["split"] != "test"], params.mirror)
    vae = load_first_stage(latent_space).to(device)
    texts, normalization = read_captions(captions), Normalization.load(latent_space)
    with atomic_folder(out) as temporary:
        hints = encoded.image_array(frame, data, vae.config.sample_size, temporary / "hints.npy")
        encoded.encode(frame, hints, texts, vae, normalization, params, temporary, device)


def train(params: p.Train, data: Path, latent_space: Path, state: Path, out: Path, report: Path) -> None:
    """Train the denoiser on the output of `encode`; write the whole pipeline into `out`."""
    from transformers import CLIPTextModel, CLIPTokenizer

    from vlmdiff.core.device import process_group
    from vlmdiff.model.first_stage import load_first_stage
    from vlmdiff.model.normalization import Normalization
    from vlmdiff.training.checkpoint import state_folder
    from vlmdiff.training.diffusion import build, train_denoiser
    from vlmdiff.training.encoded import Encoded
    from vlmdiff.training.loop import write_history

    here = process_group()
    folder = state_folder(state, params, data, latent_space)
    with explained(data, "Run the encode stage again, or restore the folder by `dvc checkout`"):
        text_encoder = CLIPTextModel.from_pretrained(data / "text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(data / "tokenizer")
    vae, normalization = load_first_stage(latent_space), Normalization.load(latent_space)
    pipeline = build(vae, text_encoder, tokenizer, params, normalization)
    # Autoencoder and text encoder are no longer needed: the device's memory is for the networks that train.
    for network in filter(None, (pipeline.unet, pipeline.sgn)):
        network.to(here.device)
    history = train_denoiser(pipeline, Encoded.open(data), params, folder)
    if here.is_main_process:
        with atomic_folder(out) as temporary:
            pipeline.save_pretrained(temporary)
        write_history(history, report)
        shutil.rmtree(folder)
    here.destroy_process_group()


def evaluate(
    params: p.Params, manifest_file: Path, captions: Path, pipeline_folder: Path, detector_out: Path, out: Path
) -> None:
    """Calibrate a detector on held-out normal images, judge the test images, write detector, metrics and report.

    params: the parameters of all stages, which the report lists.
    """
    import pandas as pd

    from vlmdiff.captions.files import read_captions
    from vlmdiff.core.device import pick_device
    from vlmdiff.data import manifest
    from vlmdiff.data.images import load_rgb, resolve
    from vlmdiff.data.synthesised import HeldOut
    from vlmdiff.detection.class_captions import class_captions
    from vlmdiff.detection.detector import Detector
    from vlmdiff.detection.normals import Normal
    from vlmdiff.evaluation.detectable import COST, content, measure
    from vlmdiff.evaluation.judging import captions_of, detector_captions, judge_images, write_reference
    from vlmdiff.evaluation.report import provenance
    from vlmdiff.evaluation.weighing import Costing, Weighing
    from vlmdiff.model.pipeline import load_pipeline

    ours, data = params.evaluate, params.prepare
    frame = manifest.read(manifest_file)
    training, held_out = (frame[frame["split"] == split] for split in ("train", "validation"))
    texts = read_captions(captions)
    pipeline = load_pipeline(pipeline_folder, pick_device())
    of_classes = None
    if ours.detection.captions == "class":
        of_classes = class_captions(captions_of(training, texts), training["class_name"].tolist())
    detector = Detector(pipeline, ours.detection, class_captions=of_classes)
    size = pipeline.config.image_size

    def read(rows: "pd.DataFrame") -> Iterator[np.ndarray]:
        return (load_rgb(resolve(data.image_root, path), size, data.max_pixels) for path in rows["path"])

    # Held-out images first: each is judged without its own patches, and new images by all normal ones.
    columns = zip(*(pd.concat([held_out, training])[name] for name in ("image_id", "path", "class_name")), strict=True)
    known = [Normal(image_id, path, name, texts.get(image_id)) for image_id, path, name in columns]
    images = track(chain(read(held_out), read(training)), "learn what is normal", len(known))
    detector.learn(images, known, ours.batch_size, described=params.caption.captioner.kind == "describe")
    normal, prompts = list(read(held_out)), detector_captions(detector, held_out, texts)
    ground = HeldOut(normal, held_out["class_name"].tolist(), prompts)
    weighing = Weighing(detector, ground, ours.batch_size, ours.max_fpr)
    costs, share = ours.decision.costs, ours.decision.defect_rate
    scores = detector.calibrate(
        normal,
        ours.batch_size,
        prompts,
        weighing,
        in_bank=True,
        names=held_out["path"],
        products=ground.classes,
        rate=Costing(detector, ground, ours.batch_size, costs, share) if costs else None,
    )
    budget, began = round(COST * (len(normal) + int((frame["split"] == "test").sum()))), time.perf_counter()
    found = measure(detector, ground, budget, ours.batch_size)
    detectable = content(found, size, time.perf_counter() - began)
    if left_out := detector.calibrated().left_out:
        many = counted(left_out, "normal image", "are")
        say(f"warning: {many} too unusual to set the threshold, which would hide defects; see `vlmdiff suspects`")
    if shortfall := detector.calibrated().shortfall:
        say(f"warning: {shortfall}")
    judged = judge_images(detector, frame, data, texts, ours)
    judged.detectable = detectable
    judged.tried = weighing.rows()
    detector.calibration = replace(detector.calibrated(), f1_optimal=judged.f1_optimal())
    with atomic_folder(detector_out) as temporary:
        write_reference(temporary, held_out, scores, data)
        # Last, with the hashes of all files.
        detector.save_pretrained(temporary)
    with atomic_folder(out) as temporary:
        judged.write(temporary, folder_mb(detector_out), provenance(params, frame, manifest_file, captions))


# Each stage, and what it takes from the parameters and the workspace.
STAGES: dict[str, tuple[Callable[..., None], Callable[[p.Params], tuple]]] = {
    "prepare": (prepare, lambda p: (p.prepare, w.MADE, w.MANIFEST)),
    "validate": (validate, lambda p: (p.validate_, p.prepare, p.first_stage.image_size, w.MANIFEST, w.DATA_REPORT)),
    "caption": (caption, lambda p: (p.caption, p.prepare, w.MANIFEST, w.CAPTION_STORE, w.CAPTIONS, w.CAPTION_REPORT)),
    "first_stage": (
        first_stage,
        lambda p: (p.first_stage, p.prepare, w.MANIFEST, w.TRAINING_STATE, w.FIRST_STAGE, w.FIRST_STAGE_REPORT),
    ),
    "encode": (encode, lambda p: (p.encode, p.prepare, w.MANIFEST, w.CAPTIONS, w.FIRST_STAGE, w.ENCODED)),
    "train": (train, lambda p: (p.train, w.ENCODED, w.FIRST_STAGE, w.TRAINING_STATE, w.PIPELINE, w.TRAIN_REPORT)),
    "evaluate": (evaluate, lambda p: (p, w.MANIFEST, w.CAPTIONS, w.PIPELINE, w.DETECTOR, w.EVALUATION)),
}


def run(name: str, params: p.Params) -> None:
    """Run a stage in the workspace, which is the current folder."""
    stage, arguments = STAGES[name]
    stage(*arguments(params))
