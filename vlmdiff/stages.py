"""One function a stage: from files to files, by parameters alone, knowing nothing of who called it.

A stage writes into a temporary folder beside its output and renames at the end: what exists is whole.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import vlmdiff
from vlmdiff.core import params as p
from vlmdiff.core.console import say, track
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_folder, folder_mb, write_json
from vlmdiff.core.git import code_revision


def prepare(params: p.Prepare, made: Path, out: Path) -> None:
    """Images, classes, splits and masks into one manifest; images that are no files yet into `made`, else empty."""
    from vlmdiff.data import cifar, demo, manifest

    with atomic_folder(made) as folder:
        if params.layout == "demo":
            demo.make_demo(folder, **params.demo.model_dump())
        elif params.layout == "cifar":
            cifar.unpack(params.root, folder, params.cifar.normal)
    frame = manifest.build(params, params.image_root)
    manifest.write(frame, out)
    say(f"prepare: {len(frame)} images of {frame['class_name'].nunique()} classes in {out}")


def validate(params: p.Validate, data: p.Prepare, manifest_file: Path, out: Path) -> None:
    """The data contract; its verdict and Data Docs into `out`, InputError where it is broken."""
    from vlmdiff.data import contract, manifest

    frame = manifest.read(manifest_file)
    contract.check_dataset(frame, data, params, out).raise_if_failed()


def caption(params: p.Caption, data: p.Prepare, manifest_file: Path, store: Path, out: Path, report: Path) -> None:
    """A caption for every image into the JSONL `out`, from the store where it holds one; InputError on a bad one."""
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
    """Fit the latent space to the normal training images: a model folder `out`, loss curves in `report`."""
    from vlmdiff.core.device import processes
    from vlmdiff.data import manifest
    from vlmdiff.model.normalization import Normalization
    from vlmdiff.training.first_stage import train_first_stage

    here = processes()
    folder = training_state(state, params, manifest_file)
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
        write_history(report, history)
        shutil.rmtree(folder)
    here.destroy_process_group()


def encode(
    params: p.Encode, data: p.Prepare, manifest_file: Path, captions: Path, latent_space: Path, out: Path
) -> None:
    """What is frozen while the denoiser trains, computed once: latents, text embeddings, hints."""
    from vlmdiff.captions.files import read_captions
    from vlmdiff.core.device import pick_device
    from vlmdiff.data import manifest
    from vlmdiff.model.first_stage import load_first_stage
    from vlmdiff.model.normalization import Normalization
    from vlmdiff.training import encoded

    device = pick_device()
    frame = manifest.read(manifest_file)
    frame = mirrored(frame[frame["split"] != "test"], params.mirror)
    vae = load_first_stage(latent_space).to(device)
    with atomic_folder(out) as temporary:
        hints = image_array(frame, data, vae.config.sample_size, temporary / "hints.npy")
        encoded.encode(
            frame, hints, read_captions(captions), vae, Normalization.load(latent_space), params, temporary, device
        )


def train(params: p.Train, data: Path, latent_space: Path, state: Path, out: Path, report: Path) -> None:
    """Train the denoiser on what `encode` wrote; the whole pipeline into `out`."""
    from transformers import CLIPTextModel, CLIPTokenizer

    from vlmdiff.core.device import processes
    from vlmdiff.model.first_stage import load_first_stage
    from vlmdiff.model.normalization import Normalization
    from vlmdiff.training.diffusion import build, train_denoiser
    from vlmdiff.training.encoded import Encoded

    here = processes()
    folder = training_state(state, params, data, latent_space)
    pipeline = build(
        load_first_stage(latent_space),
        CLIPTextModel.from_pretrained(data / "text_encoder"),
        CLIPTokenizer.from_pretrained(data / "tokenizer"),
        params,
        Normalization.load(latent_space),
    )
    # Autoencoder and text encoder have done their work, and their memory is better used.
    for network in filter(None, (pipeline.unet, pipeline.sgn)):
        network.to(here.device)
    history = train_denoiser(pipeline, Encoded.open(data), params, folder)
    if here.is_main_process:
        with atomic_folder(out) as temporary:
            pipeline.save_pretrained(temporary)
        write_history(report, history)
        shutil.rmtree(folder)
    here.destroy_process_group()


def evaluate(
    made_by: p.Params,
    manifest_file: Path,
    captions: Path,
    pipeline_folder: Path,
    detector_out: Path,
    out: Path,
) -> None:
    """Calibrate on held-out normal images, judge the test images: the detector, metrics, curves and a report.

    made_by: the parameters of all stages, which the report names.
    """
    from vlmdiff.captions.files import read_captions
    from vlmdiff.core.device import pick_device
    from vlmdiff.data import manifest
    from vlmdiff.data.images import load_rgb, resolve
    from vlmdiff.detection.class_captions import class_captions
    from vlmdiff.detection.detector import Detector
    from vlmdiff.evaluation.judging import captions_of, detector_captions, judge_images, write_reference
    from vlmdiff.model.pipeline import load_pipeline

    params, data = made_by.evaluate, made_by.prepare
    frame = manifest.read(manifest_file)
    training, held_out = (frame[frame["split"] == split] for split in ("train", "validation"))
    texts = read_captions(captions)
    pipeline = load_pipeline(pipeline_folder, pick_device())
    of_classes = None
    if params.detection.captions == "class":
        of_classes = class_captions(captions_of(training, texts), training["class_name"].tolist())
    detector = Detector(pipeline, params.detection, class_captions=of_classes)
    size = pipeline.config.image_size
    normal = [load_rgb(resolve(data.image_root, path), size, data.max_pixels) for path in held_out["path"]]
    scores = detector.calibrate(normal, params.batch_size, detector_captions(detector, held_out, texts))
    judged = judge_images(detector, frame, data, texts, params)
    detector.calibration = replace(detector.calibrated(), f1_optimal=judged.f1_optimal())
    with atomic_folder(detector_out) as temporary:
        detector.save_pretrained(temporary)
        write_reference(temporary, held_out, scores, data)
    with atomic_folder(out) as temporary:
        judged.write(temporary, folder_mb(detector_out), provenance(made_by, frame, manifest_file, captions))


def provenance(made_by: p.Params, frame: pd.DataFrame, manifest_file: Path, captions: Path) -> dict[str, object]:
    """What the report says it rests on: data, captions, code, and the parameters of every stage."""
    counts = frame["split"].value_counts()
    stages = made_by.model_dump(mode="json", by_alias=True, exclude={"gate", "monitor", "registry"})
    return {
        "data": ", ".join(f"{counts.get(split, 0)} {split}" for split in ("train", "validation", "test")),
        "manifest": sha256(manifest_file),
        "captions": f"{made_by.caption.captioner.kind}, {sha256(captions)}",
        "vlmdiff": vlmdiff.__version__,
        **code_revision(),
        **stages,
    }


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def mirrored(frame: pd.DataFrame, directions: Sequence[str]) -> pd.DataFrame:
    """With the training images' mirror images, in each direction and in both; `axes` are those that are reversed."""
    frame = frame.assign(axes=[()] * len(frame))  # pyrefly: ignore[bad-argument-type]
    for axis, direction in enumerate(("vertical", "horizontal")):
        if direction in directions:
            training = frame[frame["split"] == "train"]
            axes: Any = [(*axes, axis) for axes in training["axes"]]
            frame = pd.concat([frame, training.assign(axes=axes)])
    return frame.reset_index(drop=True)


def image_array(frame: pd.DataFrame, data: p.Prepare, size: int, file: Path) -> np.ndarray:
    """The images of a manifest's rows, decoded and resized once into the memory-mapped `file`: uint8 (N, S, S, 3).

    Rows may have `axes`, along which they are mirrored.
    """
    from vlmdiff.data.images import load_rgb, resolve

    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(len(frame), size, size, 3))
    every = [()] * len(frame) if "axes" not in frame else frame["axes"]
    for i, (path, axes) in enumerate(zip(track(frame["path"], "read images", total=len(frame)), every, strict=True)):
        array[i] = np.flip(load_rgb(resolve(data.image_root, path), size, data.max_pixels), axes)
    array.flush()
    return array


def write_history(report: Path, history: list[dict[str, float]]) -> None:
    """Loss curves as rows that `dvc plots` reads."""
    with atomic_folder(report) as temporary:
        write_json(temporary / "loss.json", history)


def training_state(root: Path, params: p.Section, *inputs: Path) -> Path:
    """The folder for the state of the training that these parameters, inputs and this code define."""
    from accelerate.utils import broadcast_object_list

    from vlmdiff.core.device import processes

    # What the main process has found serves the others: the inputs are a whole dataset.
    found = [_digest(params, *inputs) if processes().is_main_process else None]
    folder = root / f"{type(params).__name__.lower()}-{broadcast_object_list(found)[0][:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(params: p.Section, *inputs: Path) -> str:
    digest = hashlib.sha256(f"{vlmdiff.__version__} {params.model_dump_json()}".encode())
    package = Path(vlmdiff.__file__).parent
    code = [*(package / "model").glob("*.py"), *(package / "training").glob("*.py")]
    for file in [*sorted(code), *(file for path in inputs for file in files_under(path))]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def files_under(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise InputError(f"{path} does not exist: run the stages before this one first (`dvc repro` knows the order)")
    yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
