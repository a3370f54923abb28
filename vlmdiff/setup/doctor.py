"""Check what an experiment needs before anything long starts: dataset, models, memory, disk, time.

The first steps of each training run, and their memory and time are measured. So is the time in which a detector judges
a few images. Nothing is downloaded, no endpoint is asked, and the workspace stays as it is.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from vlmdiff.captions.brought import inside
from vlmdiff.captions.endpoint import read_key
from vlmdiff.core import git
from vlmdiff.core import params as p
from vlmdiff.core.device import pick_device, resolve_precision
from vlmdiff.core.dvc import GRAPH
from vlmdiff.core.errors import InputError
from vlmdiff.core.text import counted, plain
from vlmdiff.data import listing
from vlmdiff.data.images import load_rgb
from vlmdiff.data.synthesised import places
from vlmdiff.detection.retrieval import COMPONENTS
from vlmdiff.evaluation.detectable import COST as DETECTABLE
from vlmdiff.evaluation.judging import TIMED
from vlmdiff.evaluation.weighing import DEFECTS
from vlmdiff.model.pretrained import check_pinned
from vlmdiff.setup.cost import GIB, Cost, free_memory, measure
from vlmdiff.training.first_stage import SEEN

# Seconds for the measurement of a stage.
LIMIT = 60.0
# Numbers that describe a patch before it is projected: about those of two layers of ViT-S or one of ViT-B.
WIDTH = 768
# The libraries in memory.
AROUND = GIB
# Names that `save_pretrained` of transformers and of diffusers gives the weights.
WEIGHTS = "model.safetensors", "diffusion_pytorch_model.safetensors"
# The file that shows a network is there.
NETWORK = ("config.json",)
CAPTIONER = "caption.captioner"
UNKNOWN = "not measured"
TRAININGS = "first_stage", "train"
MEASURED = *TRAININGS, "evaluate"


@dataclass(frozen=True)
class Requirement:
    """A row: what was found, what is needed, whether that is enough (None: not known), and what to do if it is not."""

    name: str
    found: str
    needed: str
    ok: bool | None
    advice: str = ""


@dataclass(frozen=True)
class Model:
    """A network that is here: its folder, and the bytes and the number of its weights."""

    folder: Path
    size: int
    parameters: int


def examine(params: p.Params, measuring: bool = True) -> list[Requirement]:
    """Return what the experiment needs, in the order in which it needs it; measure the stages, if `measuring`."""
    rows, frame = _dataset(params)
    rows = _repository() + rows
    more, models = _models(params)
    missing = {row.name for row in more if not row.ok}
    device = pick_device()
    rows += [*more, _device(params, device)]
    costs = _costs(params, device, models, missing) if measuring and rows[-1].ok else {}
    for name, cost in costs.items():
        if cost.failure and not cost.too_large:
            what = "a step" if name in TRAININGS else "a few images"
            rows.append(Requirement(f"{name}, {what}", "fails", "to run", False, cost.failure))
    rows += _memory(params, device, models, costs, frame)
    rows.append(_disk(params, models, costs, frame))
    return rows + _time(params, costs, frame)


def report(rows: list[Requirement]) -> Group:
    """Return the table for the terminal and, below it, a sentence for each thing that is missing."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    for title in ("found", "needed"):
        table.add_column(title, overflow="fold")
    table.add_column("ok", no_wrap=True)
    marks = {True: Text("yes", "green"), False: Text("no", "bold red"), None: Text("?", "yellow")}
    for row in rows:
        table.add_row(*(Text(plain(words)) for words in (row.name, row.found, row.needed)), marks[row.ok])
    missing = [row for row in rows if row.ok is False]
    # One thing may be missing in several places.
    named: dict[str, list[str]] = {}
    for row in missing:
        named.setdefault(row.advice, []).append(row.name)
    lines = [Text(plain(f"{', '.join(names)}: {advice}")) for advice, names in named.items()]
    last = f"{len(missing)} check(s) failed" if missing else "everything needed is here"
    return Group(table, *lines, Text(last, "bold red" if missing else "green"))


# The workspace


def _repository() -> list[Requirement]:
    """Return a row on git for a folder with a graph of stages: DVC runs them in a repository only."""
    if not GRAPH.is_file():
        return []
    try:
        git.list_files(str(GRAPH))
    except InputError as error:
        return [Requirement("git", "no repository that git reads", "a repository", False, str(error))]
    return [Requirement("git", "a repository", "a repository", True)]


# The dataset


def _dataset(params: p.Params) -> tuple[list[Requirement], pd.DataFrame | None]:
    data, least = params.prepare, params.validate_.min_images
    where = "made by the prepare stage" if data.layout == "demo" else f"{data.root}, layout {data.layout}"
    try:
        frame = listing.outline(data)
    except (InputError, OSError) as error:
        found = "broken" if data.root.is_dir() else "no such folder"
        advice = str(error) if data.root.is_dir() else f"{error}, or put the dataset there"
        return [Requirement("dataset", found, where, False, advice)], None
    counts = frame.groupby(["class_name", "split"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=["train", "validation", "test"], fill_value=0)
    total, anomalous = counts.sum(), frame[frame["is_anomalous"]]
    found = (
        f"{counted(len(counts), 'class')}: {total['train']} train, {total['validation']} validation, "
        f"{total['test']} test images ({(anomalous['split'] == 'test').sum()} anomalous)"
    )
    if passed := listing.passed_over(data, pd.concat([frame["path"], frame["mask_path"].dropna()])):
        found = f"{found}; {passed}"
    rows = [Requirement("dataset", found, where, True)]

    asked = pd.Series(least.model_dump())
    few = counts.index[(counts < asked[counts.columns]).any(axis=1)].tolist()
    found, needed = (", ".join(f"{split} {n}" for split, n in images.items()) for images in (counts.min(), asked))
    advice = f"add images of {', '.join(few)}, or lower validate.min_images"
    rows.append(Requirement("images a class", f"{found} at least", needed, not few, advice))
    with_mask, required = int(anomalous["mask_path"].notna().sum()), params.validate_.masks == "required"
    found, needed = f"{with_mask} of {len(anomalous)} anomalous images", "all" if required else "none"
    advice = "draw the others, or set validate.masks: optional and a gate.metric of whole images"
    rows.append(Requirement("masks", found, needed, with_mask == len(anomalous) or not required, advice))
    return rows, frame


# Models


def _models(params: p.Params) -> tuple[list[Requirement], dict[str, Model]]:
    """Return a row for each model that the parameters name, and the networks that are here, by their key."""
    vlm = isinstance(params.caption.captioner, p.VisionLanguageModel)
    rows, models = [] if vlm else [_captioner(params)], {}
    for key, source, subfolder, files in _sources(params):
        needed = f"{subfolder} of {source.model}" if subfolder else source.model
        if source.revision:
            needed += f" at {source.revision[:12]}"
        try:
            folder = _folder(source, subfolder, files)
            found = str(folder)
            if files == NETWORK:
                # A backbone's stage reads pickled weights as well.
                models[key] = model = _weights(folder, pickled=isinstance(source, p.VisionBackbone))
                place = "folder" if Path(source.model).is_dir() else "hub's cache"
                found = f"{place}, {_bytes(model.size)}, {model.parameters / 1e6:.1f} million parameters"
            if key == CAPTIONER and Path(source.model).is_dir() and source.revision:
                raise InputError(f"{source.model} is a folder here. Remove caption.captioner.revision.")
            rows.append(Requirement(key, found, needed, True))
        except InputError as error:
            rows.append(Requirement(key, "missing", needed, False, str(error)))
    retrieval = params.evaluate.detection.retrieval
    if retrieval and retrieval.more_sizes and "first_stage.backbone" in models:
        rows.append(_sizes(retrieval.more_sizes, models["first_stage.backbone"].folder))
    return rows, models


def _sizes(sizes: Sequence[int], folder: Path) -> Requirement:
    """Return the row of the sizes at which retrieval sees images: `evaluate` would find out after all trainings."""
    side = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("patch_size") or 1
    key, found = "retrieval.more_sizes", ", ".join(map(str, sizes))
    fits = not isinstance(side, int) or all(size % side == 0 for size in sizes)
    needed = f"multiples of {side}" if isinstance(side, int) else "any"
    advice = f"set evaluate.detection.{key} to multiples of {side}, the patch size of the backbone"
    return Requirement(key, found, needed, fits, advice)


def _sources(params: p.Params) -> Iterator[tuple[str, p.Pretrained, str, tuple[str, ...]]]:
    """Yield the models and what they need as well: key, source, subfolder, and the files that may show it is there."""
    captioner, text, first_stage = params.caption.captioner, params.encode.text_encoder, params.first_stage
    if isinstance(captioner, p.VisionLanguageModel):
        yield CAPTIONER, p.Pretrained(model=captioner.model, revision=captioner.revision), "", NETWORK
    if first_stage.kind == "backbone":
        yield "first_stage.backbone", first_stage.backbone, "", NETWORK
    if first_stage.pretrained:
        yield "first_stage.pretrained", first_stage.pretrained, first_stage.pretrained.subfolder, NETWORK
    if first_stage.perceptual:
        yield "first_stage.perceptual", first_stage.perceptual, "", NETWORK
    if isinstance(text, p.PretrainedTextEncoder):
        yield "encode.text_encoder", text, text.subfolder, NETWORK
    if params.train.pretrained:
        yield "train.pretrained", params.train.pretrained, "unet", NETWORK
    for i, features in enumerate(params.evaluate.detection.features):
        if isinstance(features, p.BackboneFeatures):
            yield f"detection.features.{i}", features, "", NETWORK
    if isinstance(text, p.PretrainedTextEncoder):
        yield "tokenizer", text, text.tokenizer_subfolder, ("tokenizer.json", "vocab.json")
    if params.train.pretrained:
        yield "noise schedule", params.train.pretrained, "scheduler", ("scheduler_config.json",)


def _captioner(params: p.Params) -> Requirement:
    """Return the row of a captioner that is not a network."""
    captioner, root = params.caption.captioner, params.prepare.root
    found, needed = "describe", "no model"
    try:
        if isinstance(captioner, p.CaptionFile):
            names = {"file": captioner.file, "images": captioner.images}
            paths = {name: path for name, path in names.items() if path is not None}
            found, needed = "here", f"{', '.join(map(str, paths.values()))} in {root}"
            for name, path in paths.items():
                inside(root, path, name)
        elif isinstance(captioner, p.Endpoint):
            variable = captioner.api_key_variable
            needed = f"{captioner.base_url}, not asked" + (f"; a key in {variable}" if variable else ", without a key")
            found = "a key is set" if read_key(variable) else "needs no key"
    except InputError as error:
        return Requirement(CAPTIONER, "missing", needed, False, str(error))
    return Requirement(CAPTIONER, found, needed, True)


def _folder(source: p.Pretrained, subfolder: str, files: tuple[str, ...]) -> Path:
    """Return the folder that has one of `files`, here or in the hub's cache. Raise InputError if there is none."""
    try:
        check_pinned(source)
    except InputError as error:
        raise InputError(f"{error}, or put the model's folder there") from error
    if Path(source.model).is_dir():
        folder = Path(source.model, subfolder)
        if not any((folder / name).is_file() for name in files):
            raise InputError(f"{folder} has no {' or '.join(files)}. Copy the whole model there.")
        return folder
    for name in files:
        try:
            cached = try_to_load_from_cache(
                source.model, f"{subfolder}/{name}" if subfolder else name, revision=source.revision
            )
        except ValueError as error:
            raise InputError(f"{source.model} is neither a folder here nor a name on the hub: {error}") from error
        if isinstance(cached, str):
            return Path(cached).parent
    raise InputError(
        f"{source.model} is not in the hub's local cache at this revision. Run `hf download {source.model} --revision "
        f"{source.revision}`; with a network, the stage does so itself."
    )


def _weights(folder: Path, pickled: bool) -> Model:
    """Return the size of the weights in `folder`, by the files' headers. Raise InputError if one is cut off."""
    names = [file for name in WEIGHTS for file in (name, f"{name}.index.json")] + ["pytorch_model.bin"] * pickled
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{folder} has no {' or '.join(WEIGHTS)}. Copy the whole model there.")
    if file.suffix == ".bin":
        # Reading its header would run code: count by the size of float32.
        return Model(folder, file.stat().st_size, file.stat().st_size // 4)
    size = parameters = 0
    try:
        parts = {file.name}
        if file.suffix == ".json":
            parts = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        for file in (folder / part for part in sorted(parts)):
            with safe_open(file, framework="numpy") as tensors:
                parameters += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
            size += file.stat().st_size
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{file} is incomplete ({error}). Download it again.") from error
    return Model(folder, size, parameters)


# The machine


def _device(params: p.Params, device: torch.device) -> Requirement:
    found = torch.cuda.get_device_name() if device.type == "cuda" else f"no GPU, {os.cpu_count()} CPU cores"
    precisions = {name: resolve_precision(getattr(params, name), device) for name in TRAININGS}
    halves = [name for name, precision in precisions.items() if precision == "fp16"]
    return Requirement(
        "device",
        f"{found}; " + ", ".join(f"{name} in {precision}" for name, precision in precisions.items()),
        f"a GPU, for fp16 of {' and '.join(halves)}" if halves else "any",
        device.type == "cuda" or not halves,
        "set precision to auto, or use a machine with a GPU",
    )


def _costs(params: p.Params, device: torch.device, models: dict[str, Model], missing: set[str]) -> dict[str, Cost]:
    """Measure the trainings and `evaluate` where their models are here, and may fit the memory."""
    spaces = "first_stage.backbone", "first_stage.pretrained"
    denoiser = {*spaces, "encode.text_encoder", "tokenizer", "train.pretrained", "noise schedule"}
    used = {
        "first_stage": {*spaces, "first_stage.perceptual"},
        "train": denoiser,
        "evaluate": denoiser | {key for key in (*models, *missing) if key.startswith(("detection.", "retrieval."))},
    }
    free, costs = free_memory(device), {}
    for name in MEASURED:
        if (name in TRAININGS and not getattr(params, name).steps) or missing & used[name]:
            continue
        # It would fail for the same reason.
        if name == "evaluate" and costs.get("train", Cost()).failure:
            continue
        weights = 4 * sum(models[key].parameters for key in used[name] if key in models)
        if weights > free:
            costs[name] = Cost(failure=f"its weights alone need {_bytes(weights)}", too_large=True)
        else:
            costs[name] = measure(name, params, LIMIT)
    return costs


def _memory(
    params: p.Params, device: torch.device, models: dict[str, Model], costs: dict[str, Cost], frame: pd.DataFrame | None
) -> list[Requirement]:
    """Return a row for each stage: each is a process of its own."""
    here, free = psutil.virtual_memory().available, free_memory(device)
    rows = []
    if isinstance(params.caption.captioner, p.VisionLanguageModel):
        model = models.get(CAPTIONER)
        # Layers that do not fit a GPU go into the machine's memory, by device_map.
        size, place = None if model is None else model.size + AROUND, here if device.type == "cpu" else here + free
        rows.append(_room("caption", size, place, "the weights", "use a smaller model, or kind: openai"))
    advice = "lower batch_size or image_size, or raise accumulate (it must divide batch_size)"
    for name in TRAININGS:
        training: p.Training = getattr(params, name)
        cost = costs.get(name, Cost())
        what = f"{counted(max(1, training.batch_size // training.accumulate), 'image')} at once"
        if cost.too_large:
            rows.append(Requirement(f"memory, {name}", f"{_bytes(free)} free", f"more: {what}", False, cost.failure))
        elif training.steps:
            rows.append(_room(name, cost.memory or None, free, what, advice))
    # One class at a time; of a test image its map, reconstruction and mask, and about as much again for the metrics.
    tested = None if frame is None else int(frame.loc[frame["split"] == "test", "class_name"].value_counts().max())
    size = None if tested is None else tested * 15 * params.first_stage.image_size**2 + AROUND
    advice = "lower first_stage.image_size, test fewer images of a class, or use a machine with more memory"
    what = "maps of a class" if tested is None else f"maps of a class's {tested} images"
    if size is not None and (patches := _kept_patches(params, frame)):
        # The bank, twice more while it is sorted, the features that it is made of, and what is nearest to each patch.
        size, what = size + patches * (6 * COMPONENTS + 2 * WIDTH + 150), f"{what}, {patches} normal patches"
    if (cost := costs.get("evaluate", Cost())).too_large:
        rows.append(Requirement("memory, evaluate", f"{_bytes(free)} free", "more", False, cost.failure))
    else:
        rows.append(_room("evaluate", size, here, what, advice))
    return rows


def _kept_patches(params: p.Params, frame: pd.DataFrame | None) -> int:
    """Return how many normal patches a detector keeps."""
    wanted = params.evaluate.detection.retrieval
    if wanted is None or frame is None:
        return 0
    backbone, counts = params.first_stage.backbone, frame.loc[frame["split"] != "test", "class_name"].value_counts()
    # At another size, an image has as many more patches as pixels, about.
    ratios = [1.0, *(size / backbone.image_size for size in wanted.more_sizes)]
    whole = [round(backbone.grid * ratio) ** 2 for ratio in ratios]
    return sum(images * min(wanted.of_each(images), one) for images in counts.tolist() for one in whole)


def _encoded_images(params: p.Params, frame: pd.DataFrame) -> int:
    counts = frame["split"].value_counts()
    return int(counts.get("validation", 0) + 2 ** len(set(params.encode.mirror)) * counts.get("train", 0))


def _room(stage: str, size: int | None, free: int, what: str, advice: str) -> Requirement:
    name, found = f"memory, {stage}", f"{_bytes(free)} free"
    if size is None:
        return Requirement(name, found, f"{what}: {UNKNOWN}", None)
    return Requirement(name, found, f"{_bytes(size)}: {what}", size < free, advice)


def _disk(
    params: p.Params, models: dict[str, Model], costs: dict[str, Cost], frame: pd.DataFrame | None
) -> Requirement:
    """Return the row of the space for what the stages leave; made images and reports are small beside it."""
    free = shutil.disk_usage(Path.cwd()).free
    found, cost = f"{_bytes(free)} free", costs.get("train", Cost())
    if frame is None or not cost.latents:
        return Requirement("disk", found, UNKNOWN, None)
    count, pixels = _encoded_images(params, frame), 3 * params.first_stage.image_size**2
    # Mean and deviation of the latents, every window of the caption, the image.
    encoded = count * (8 * cost.latents + 4 * params.encode.max_windows * cost.tokens + pixels)
    backbones = {model.folder: model.size for key, model in models.items() if key.startswith("detection.features")}
    pipeline = 4 * sum(cost.weights.values())
    detector = pipeline + sum(backbones.values()) + 2 * COMPONENTS * _kept_patches(params, frame)
    # DVC keeps a copy of each stage's outputs in its cache; the registry has the detector.
    kept = 2 * (encoded + 4 * cost.weights["vae"] + pipeline + detector) + detector
    # Weights, their average, the best and two moments, of the last checkpoint and the one being written.
    trained = max(cost.trained for cost in costs.values())
    passing = max(count * pixels, 2 * 5 * 4 * trained)
    needed = f"at most {_bytes(kept + passing)}: {_bytes(encoded)} encoded, {_bytes(detector)} per model, checkpoints"
    advice = "free some space, or use another disk; fewer encode.max_windows make the encoded text smaller"
    return Requirement("disk", found, needed, kept + passing < free, advice)


def _time(params: p.Params, costs: dict[str, Cost], frame: pd.DataFrame | None) -> list[Requirement]:
    """Return the rows of how long the trainings, `encode` and `evaluate` take, and their sum."""
    rows, seconds = [], predicted_seconds(params, costs, frame)
    for name in TRAININGS:
        training = _training(params, name, frame)
        if not training.steps:
            continue
        needed = f"{counted(training.steps, 'step')} of {counted(training.batch_size, 'image')}"
        if frame is not None:
            count = _training_images(params, name, frame)
            needed += f", {training.steps * training.batch_size / max(1, count):.3g} epochs"
        cost = costs.get(name, Cost())
        if name in seconds:
            found = f"{_duration(seconds[name])}: {cost.step:.2g} s a step"
        elif least := cost.step or (cost.start and cost.unfinished):
            found = f"at least {_duration(least * training.steps)}: {least:.2g} s a step"
        else:
            found = UNKNOWN
        rows.append(Requirement(f"time, {name}", found, needed, True if name in seconds else None))
    if frame is not None and "encode" in seconds:
        count = _encoded_images(params, frame)
        rows.append(Requirement("time, encode", _duration(seconds["encode"]), counted(count, "image"), True))
    if frame is not None:
        counts, cost, found = frame["split"].value_counts(), costs.get("evaluate", Cost()), UNKNOWN
        if "evaluate" in seconds:
            found = f"{_duration(seconds['evaluate'])}, without the report"
        elif cost.learn:
            normal = counts.get("train", 0) + counts.get("validation", 0)
            found = f"at least {_duration(cost.start + normal * cost.learn)}"
        needed = f"{counted(counts.get('test', 0), 'test image')}, normal images, drawn defects"
        rows.append(Requirement("time, evaluate", found, needed, True if "evaluate" in seconds else None))
    if len(seconds) > 1:
        rows.append(Requirement("time, total", _duration(sum(seconds.values())), ", ".join(seconds), True))
    return rows


def predicted_seconds(params: p.Params, costs: dict[str, Cost], frame: pd.DataFrame | None) -> dict[str, float]:
    """Return the seconds of the stages `first_stage`, `train`, `encode` and `evaluate`, of those that are known."""
    counts = {} if frame is None else frame["split"].value_counts()
    held_out, reading = counts.get("validation", 0), _reading_seconds(params, frame)
    found = {
        name: seconds
        for name, cost in costs.items()
        if name in TRAININGS and (seconds := cost.seconds(_training(params, name, frame), held_out)) is not None
    }
    if "first_stage" in found:
        found["first_stage"] += reading * (counts.get("train", 0) + held_out)
        if params.first_stage.kind == "backbone":  # which is projected first
            found["first_stage"] += costs["first_stage"].encode * min(counts.get("train", 0), SEEN)
    if "first_stage" in found and "train" in found and frame is not None:
        each = reading + costs["first_stage"].encode
        found["encode"] = costs["first_stage"].start + costs["train"].text + _encoded_images(params, frame) * each
    cost = costs.get("evaluate", Cost())
    if frame is not None and cost.judge:
        tested, retrieval = counts.get("test", 0), params.evaluate.detection.retrieval
        # Defects are drawn to weigh the evidence, to choose a threshold, and to say what is found.
        choices = (retrieval is not None and retrieval.weight == "auto") + (params.evaluate.decision.costs is not None)
        drawn = choices * len(places(held_out, DEFECTS)) + min(held_out, round(DETECTABLE * (held_out + tested)))
        normal, again = counts.get("train", 0) + held_out, min(tested, TIMED + 1)
        found["evaluate"] = cost.start + normal * (reading + cost.learn) + reading * (2 * held_out + tested)
        found["evaluate"] += (held_out + drawn + tested + again) * cost.judge
    return found


def _training(params: p.Params, name: str, frame: pd.DataFrame | None) -> p.Training:
    """Return the settings of a training, with the steps that it takes."""
    training: p.Training = getattr(params, name)
    if frame is None or not isinstance(training, p.Train):
        return training
    return training.limited(_training_images(params, name, frame))


def _training_images(params: p.Params, name: str, frame: pd.DataFrame) -> int:
    """Return how many images a training sees, counting mirrored ones."""
    return int((frame["split"] == "train").sum()) * (2 ** len(set(params.encode.mirror)) if name == "train" else 1)


def _reading_seconds(params: p.Params, frame: pd.DataFrame | None) -> float:
    """Return the seconds for one image to be read and resized; 0 if they are still to be made."""
    root = params.prepare.image_root
    files = [] if frame is None else [root / path for path in frame["path"][:: max(1, len(frame) // 8)]]
    began, count = time.monotonic(), 0
    for file in files:
        if file.is_file():
            try:
                load_rgb(file, params.first_stage.image_size, params.prepare.max_pixels)
            except InputError:  # validate says so, of all images
                continue
            count += 1
    return (time.monotonic() - began) / count if count else 0.0


def _bytes(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"
