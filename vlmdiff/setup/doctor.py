"""What an experiment needs and whether it is there, before anything long starts. It reads; it writes and loads nothing.

Networks are shaped by their configurations alone, on tensors without values. No download is made, no endpoint asked.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import AutoConfig, AutoModel, CLIPTextConfig, CLIPTextModel
from transformers.initialization import no_init_weights

from vlmdiff.captions.endpoint import read_key
from vlmdiff.core import params as p
from vlmdiff.core.device import pick_device
from vlmdiff.core.errors import InputError
from vlmdiff.data import manifest
from vlmdiff.data.images import resolve
from vlmdiff.model.feature_space import FeatureSpace
from vlmdiff.model.first_stage import FirstStageModel, downsampling
from vlmdiff.model.pretrained import check_pinned
from vlmdiff.training import cost, diffusion, first_stage
from vlmdiff.training.adversarial import PatchDiscriminator
from vlmdiff.training.cost import GIB

# The libraries in memory or, on a GPU, its context: what a count of tensors does not see.
AROUND = GIB
# What `save_pretrained` of transformers and of diffusers calls the weights.
WEIGHTS = "model.safetensors", "diffusion_pytorch_model.safetensors"
UNKNOWN = "not known by what is here"


@dataclass(frozen=True)
class Check:
    """A row: what was found, what is needed, and whether that does (None: not known). `advice` says how to mend it."""

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


@dataclass(frozen=True)
class Shapes:
    """What the networks' configurations say; None where a model that it takes is not here.

    latents: (C, h, w) of an image; text: (L, D), the most that is read of a caption; autoencoder and pipeline: numbers
    of weights; first_stage and train: memory of a training step.
    """

    latents: tuple[int, int, int] | None = None
    text: tuple[int, int] | None = None
    autoencoder: int | None = None
    pipeline: int | None = None
    first_stage: cost.Count | None = None
    train: cost.Count | None = None


def examine(params: p.Params) -> list[Check]:
    """Everything that the experiment needs, in the order in which it needs it."""
    checks, frame = _dataset(params)
    more, models = _models(params)
    checks += more
    device = pick_device()
    checks.append(_device(params, device))
    shapes = Shapes()
    try:
        shapes = _shape(params, models)
    except (InputError, ValueError, OSError, RuntimeError) as error:
        checks.append(Check("networks", "do not fit", "a pipeline", False, str(error)))
    checks += _memory(params, device, models, shapes, frame)
    checks.append(_disk(params, models, shapes, frame))
    decisive = {"device", "memory, first_stage", "memory, train"}
    runs = all(check.ok for check in checks if check.name in decisive)
    checks += _time(params, device, models, shapes, frame, runs)
    return checks


def report(checks: list[Check]) -> Group:
    """The table for the terminal and, below it, a sentence for each thing that is missing."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    for title in ("found", "needed"):
        table.add_column(title, overflow="fold")
    table.add_column("ok", no_wrap=True)
    marks = {True: Text("yes", "green"), False: Text("no", "bold red"), None: Text("?", "yellow")}
    for check in checks:
        table.add_row(Text(check.name), Text(check.found), Text(check.needed), marks[check.ok])
    missing = [check for check in checks if check.ok is False]
    # One thing may be missing in several places.
    named: dict[str, list[str]] = {}
    for check in missing:
        named.setdefault(check.advice, []).append(check.name)
    lines = [Text(f"{', '.join(names)}: {advice}") for advice, names in named.items()]
    last = f"{len(missing)} check(s) failed" if missing else "nothing that is needed is missing"
    return Group(table, *lines, Text(last, "bold red" if missing else "green"))


# The dataset


def _dataset(params: p.Params) -> tuple[list[Check], pd.DataFrame | None]:
    data, least = params.prepare, params.validate_.min_images
    where = "made by the prepare stage" if data.layout == "demo" else f"{data.root}, layout {data.layout}"
    try:
        frame = manifest.outline(data)
    except (InputError, OSError) as error:
        found = "broken" if data.root.is_dir() else "no such folder"
        advice = str(error) if data.root.is_dir() else f"{error}, or put the dataset there"
        return [Check("dataset", found, where, False, advice)], None
    counts = frame.groupby(["class_name", "split"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=["train", "validation", "test"], fill_value=0)
    total, anomalous = counts.sum(), frame[frame["is_anomalous"]]
    found = (
        f"{len(counts)} classes: {total['train']} train, {total['validation']} validation, {total['test']} test images "
        f"({(anomalous['split'] == 'test').sum()} anomalous)"
    )
    checks = [Check("dataset", found, where, True)]

    asked = pd.Series(least.model_dump())
    few = counts.index[(counts < asked[counts.columns]).any(axis=1)].tolist()
    checks.append(
        Check(
            "images a class",
            ", ".join(f"{split} {count}" for split, count in counts.min().items()) + " at least",
            ", ".join(f"{split} {count}" for split, count in asked.items()),
            not few,
            f"add images of {', '.join(few)}, or lower validate.min_images",
        )
    )
    with_mask, required = int(anomalous["mask_path"].notna().sum()), params.validate_.masks == "required"
    checks.append(
        Check(
            "masks",
            f"of {with_mask} of {len(anomalous)} anomalous images",
            "all" if required else "none",
            with_mask == len(anomalous) or not required,
            "draw the others, or set validate.masks: optional and a gate.metric of whole images",
        )
    )
    return checks, frame


# Models


def _models(params: p.Params) -> tuple[list[Check], dict[str, Model]]:
    """A check for each model that the parameters name, and those that are here by the key that names them."""
    checks, found = [_captioner(params)], {}
    for key, source, subfolder, pickled in _sources(params):
        check, model = _model(key, source, subfolder, pickled)
        checks.append(check)
        if model is not None:
            found[key] = model
    for key, source, subfolder, files in _companions(params):
        try:
            folder = _folder(source, subfolder, files)
            checks.append(Check(key, str(folder), _named(source, subfolder), True))
        except InputError as error:
            checks.append(Check(key, "missing", _named(source, subfolder), False, str(error)))
    return [check for check in checks if check is not None], found


def _sources(params: p.Params) -> Iterator[tuple[str, p.Pretrained, str, bool]]:
    """Networks: the key, where they come from, the subfolder, and whether the stage would read pickled weights."""
    captioner, text = params.caption.captioner, params.encode.text_encoder
    if isinstance(captioner, p.VisionLanguageModel):
        yield "caption.captioner", captioner, "", False
    if params.first_stage.kind == "backbone":
        yield "first_stage.backbone", params.first_stage.backbone, "", True
    if params.first_stage.pretrained:
        yield "first_stage.pretrained", params.first_stage.pretrained, params.first_stage.pretrained.subfolder, False
    if params.first_stage.perceptual:
        yield "first_stage.perceptual", params.first_stage.perceptual, "", True
    if isinstance(text, p.PretrainedTextEncoder):
        yield "encode.text_encoder", text, text.subfolder, False
    if params.train.pretrained:
        yield "train.pretrained", params.train.pretrained, "unet", False
    for i, features in enumerate(params.evaluate.detection.features):
        if isinstance(features, p.BackboneFeatures):
            yield f"detection.features.{i}", features, "", True


def _companions(params: p.Params) -> Iterator[tuple[str, p.Pretrained, str, tuple[str, ...]]]:
    """What networks need beside them, by any of its files."""
    text = params.encode.text_encoder
    if isinstance(text, p.PretrainedTextEncoder):
        yield "tokenizer", text, text.tokenizer_subfolder, ("tokenizer.json", "vocab.json")
    if params.train.pretrained:
        yield "noise schedule", params.train.pretrained, "scheduler", ("scheduler_config.json",)


def _captioner(params: p.Params) -> Check | None:
    """The check of a captioner that is no model here."""
    captioner = params.caption.captioner
    match captioner:
        case p.Describe():
            return Check("caption.captioner", "describe", "no model", True)
        case p.CaptionFile():
            names = [file for file in (captioner.file, captioner.images) if file is not None]
            needed = f"{', '.join(map(str, names))} in {params.prepare.root}"
            for name in names:
                try:
                    if not resolve(params.prepare.root, name.as_posix()).is_file():
                        raise InputError(f"{params.prepare.root / name} does not exist: write it, or name another")
                except InputError as error:
                    return Check("caption.captioner", "no such file", needed, False, str(error))
            return Check("caption.captioner", "the file" if len(names) == 1 else "the files", needed, True)
        case p.Endpoint():
            variable = captioner.api_key_variable
            needed = f"{captioner.base_url}, not asked" + (f"; a key in {variable}" if variable else ", without a key")
            try:
                key = read_key(variable)
            except InputError as error:
                return Check("caption.captioner", "no key", needed, False, str(error))
            return Check("caption.captioner", "a key is set" if key else "needs no key", needed, True)
        case p.VisionLanguageModel() if Path(captioner.model).is_dir() and captioner.revision is not None:
            advice = f"{captioner.model} is a folder here: take caption.captioner.revision out"
            return Check("captioner's revision", captioner.revision, "none", False, advice)
    return None


def _model(key: str, source: p.Pretrained, subfolder: str, pickled: bool) -> tuple[Check, Model | None]:
    needed = _named(source, subfolder)
    try:
        folder = _folder(source, subfolder, ("config.json",))
        size, parameters = _weights(folder, pickled)
    except InputError as error:
        return Check(key, "missing", needed, False, str(error)), None
    place = "folder" if Path(source.model).is_dir() else "hub's cache"
    found = f"{place}, {_bytes(size)}, {parameters / 1e6:.1f} million parameters"
    return Check(key, found, needed, True), Model(folder, size, parameters)


def _named(source: p.Pretrained, subfolder: str) -> str:
    name = f"{subfolder} of {source.model}" if subfolder else source.model
    return f"{name} at {source.revision[:12]}" if source.revision else name


def _folder(source: p.Pretrained, subfolder: str, files: tuple[str, ...]) -> Path:
    """The folder that has one of `files`, here or in the hub's cache. Raises InputError where there is none."""
    try:
        check_pinned(source)
    except InputError as error:
        raise InputError(f"{error}, or put the model's folder there") from error
    if Path(source.model).is_dir():
        folder = Path(source.model, subfolder)
        if not any((folder / name).is_file() for name in files):
            raise InputError(f"{folder} has no {' or '.join(files)}: copy the whole of the model there")
        return folder
    for name in files:
        try:
            cached = try_to_load_from_cache(
                source.model, f"{subfolder}/{name}" if subfolder else name, revision=source.revision
            )
        except ValueError as error:
            raise InputError(f"{source.model} is no folder here and no name on the hub: {error}") from error
        if isinstance(cached, str):
            return Path(cached).parent
    raise InputError(
        f"{source.model} is not in the hub's local cache at this revision: `hf download {source.model} --revision "
        f"{source.revision}` brings it (so does the stage, where there is a network)"
    )


def _weights(folder: Path, pickled: bool) -> tuple[int, int]:
    """Bytes and number of the weights in `folder`, by the files' headers. InputError where they are not whole."""
    files: list[Path] = []
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [folder / name]
        elif index.is_file():
            files = [folder / part for part in sorted(set(_json(index).get("weight_map", {}).values()))]
        if files:
            break
    if not files and pickled and (file := folder / "pytorch_model.bin").is_file():
        # Its header is code: by the size of float32.
        return file.stat().st_size, file.stat().st_size // 4
    if not files:
        raise InputError(f"{folder} has no {' or '.join(WEIGHTS)}: copy the whole of the model there")
    parameters = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                parameters += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is not whole ({error}): download it again") from error
    return sum(file.stat().st_size for file in files), parameters


# Shapes


def _shape(params: p.Params, models: dict[str, Model]) -> Shapes:
    """Build the networks by their configurations, without values. InputError where they do not fit each other."""
    ours, theirs = params.first_stage, params.encode.text_encoder
    with FakeTensorMode():
        named = {"first_stage.pretrained": ours.pretrained, "first_stage.backbone": ours.kind == "backbone"}
        if any(needed and key not in models for key, needed in named.items()):
            return Shapes()
        vae = _first_stage(ours, models)
        side = ours.image_size // downsampling(vae)
        known = {"latents": (vae.config.latent_channels, side, side), "autoencoder": _numbers(vae)}
        if not ours.perceptual or "first_stage.perceptual" in models:
            known["first_stage"] = _first_stage_count(vae, ours, models)
        if isinstance(theirs, p.PretrainedTextEncoder) and "encode.text_encoder" not in models:
            return Shapes(**known)
        text_encoder = _text_encoder(theirs, models)
        length, width = text_encoder.config.max_position_embeddings, text_encoder.config.hidden_size
        known["text"] = (params.encode.max_windows * length, width)
        if params.train.pretrained and "train.pretrained" not in models:
            return Shapes(**known)
        pipeline = diffusion.build(vae, text_encoder, None, params.train, read=lambda _: _denoiser(models))
        denoiser = diffusion.choose_trainable(pipeline, params.train).train()
        known["pipeline"] = sum(map(_numbers, (vae, text_encoder, denoiser)))
        if params.train.gradient_checkpointing:
            for network in denoiser.values():
                network.enable_gradient_checkpointing()
        rows = _rows(params.train)
        step = cost.denoiser_step(denoiser, params.train, rows, known["latents"], known["text"], ours.image_size)
        return Shapes(**known, train=cost.count(denoiser, step, params.train.accumulate))


def _first_stage(params: p.FirstStage, models: dict[str, Model]) -> FirstStageModel:
    """As its training starts; where it is a pretrained one's or a backbone's, by its configuration alone."""
    if params.kind == "autoencoder_kl":
        return first_stage.start(params, lambda _: _configured(AutoencoderKL, models["first_stage.pretrained"].folder))
    config = AutoConfig.from_pretrained(models["first_stage.backbone"].folder)
    with no_init_weights():  # which looks at values
        return FeatureSpace(
            backbone=getattr(config, "vision_config", config).to_dict(),
            backbone_size=params.backbone.image_size,
            layers=params.backbone.layers,
            # How wide the layers are is seen when they are computed; as buffers they are next to nothing.
            feature_channels=(params.latent_channels,),
            image_mean=params.image_mean,
            image_std=params.image_std,
            sample_size=params.image_size,
            grid=params.backbone.grid,
            latent_channels=params.latent_channels,
            decoder_channels=params.backbone.decoder_channels,
        )


def _first_stage_count(vae: FirstStageModel, params: p.FirstStage, models: dict[str, Model]) -> cost.Count | None:
    """None where what the perceptual backbone does depends on values, and so on what there are none of here."""
    networks, features = nn.ModuleDict({"vae": vae.train()}), None
    if params.gradient_checkpointing and params.kind == "autoencoder_kl":
        vae.enable_gradient_checkpointing()
    if params.discriminator:
        networks["discriminator"] = PatchDiscriminator(params.discriminator.channels, params.discriminator.layers)
    if params.perceptual:
        config = AutoConfig.from_pretrained(models["first_stage.perceptual"].folder)
        with no_init_weights():  # which looks at values
            backbone = AutoModel.from_config(getattr(config, "vision_config", config)).requires_grad_(False)
        networks["perceptual"], size = backbone, params.perceptual.image_size

        def features(images: torch.Tensor) -> list[torch.Tensor]:
            images = nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
            states = backbone(pixel_values=images, output_hidden_states=True).hidden_states
            return [states[-1 if layer == "last" else layer] for layer in params.perceptual.layers]

    step = cost.first_stage_step(networks, params, _rows(params), features)
    try:
        return cost.count(networks, step, params.accumulate)
    except DataDependentOutputException:
        return None


def _text_encoder(params: p.TextEncoder | p.PretrainedTextEncoder, models: dict[str, Model]) -> CLIPTextModel:
    if isinstance(params, p.PretrainedTextEncoder):
        return CLIPTextModel(CLIPTextConfig.from_pretrained(models["encode.text_encoder"].folder))
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=params.vocabulary,
            hidden_size=params.hidden_size,
            intermediate_size=4 * params.hidden_size,
            num_hidden_layers=params.layers,
            num_attention_heads=params.heads,
            max_position_embeddings=params.max_tokens,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _denoiser(models: dict[str, Model]) -> tuple[UNet2DConditionModel, DDIMScheduler]:
    folder = models["train.pretrained"].folder
    scheduler = folder.parent / "scheduler" / "scheduler_config.json"
    return _configured(UNet2DConditionModel, folder), DDIMScheduler.from_config(_json(scheduler))


def _configured(cls: type, folder: Path):
    return cls.from_config(_json(folder / "config.json"))


def _rows(params: p.Training) -> int:
    """Images that are computed at once, in one process."""
    return max(1, params.batch_size // params.accumulate)


def _numbers(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


# The machine


def _device(params: p.Params, device: torch.device) -> Check:
    found = torch.cuda.get_device_name() if device.type == "cuda" else f"no GPU, {os.cpu_count()} CPU cores"
    halves = [name for name in ("first_stage", "train") if getattr(params, name).precision == "fp16"]
    return Check(
        "device",
        found,
        f"a GPU, for fp16 of {' and '.join(halves)}" if halves else "any",
        device.type == "cuda" or not halves,
        "set precision to bf16 or fp32, or go to a machine with a GPU",
    )


def _memory(
    params: p.Params, device: torch.device, models: dict[str, Model], shapes: Shapes, frame: pd.DataFrame | None
) -> list[Check]:
    """Stages one by one: each is a process of its own."""
    here = psutil.virtual_memory().available
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else here
    at_once = "lower batch_size or image_size, raise accumulate (it has to divide batch_size), or see precision: bf16"
    checks = []
    if isinstance(params.caption.captioner, p.VisionLanguageModel):
        model = models.get("caption.captioner")
        # Layers that do not fit a GPU go into the machine's memory, by device_map.
        size, place = None if model is None else model.size + AROUND, here if device.type == "cpu" else here + free
        checks.append(_room("caption", size, place, "the weights", "take a smaller model, or kind: openai"))
    if params.first_stage.steps:
        size = shapes.first_stage and shapes.first_stage.total + AROUND
        checks.append(_room("first_stage", size, free, f"{_rows(params.first_stage)} images at once", at_once))
    size = shapes.train and shapes.train.total + AROUND
    checks.append(_room("train", size, free, f"{_rows(params.train)} images at once", at_once))
    # One class at a time; of a test image its map, reconstruction and mask, and about as much again for the metrics.
    tested = None if frame is None else int(frame.loc[frame["split"] == "test", "class_name"].value_counts().max())
    size = None if tested is None else tested * 15 * params.first_stage.image_size**2 + AROUND
    advice = "lower first_stage.image_size, test on fewer images of a class, or go to a machine with more memory"
    what = "maps of a class" if tested is None else f"maps of a class's {tested} images"
    checks.append(_room("evaluate", size, here, what, advice))
    return checks


def _room(stage: str, size: int | None, free: int, what: str, advice: str) -> Check:
    name, found = f"memory, {stage}", f"{_bytes(free)} free"
    if size is None:
        return Check(name, found, f"{what}: {UNKNOWN}", None)
    return Check(name, found, f"{_bytes(size)}: {what}", size < free, advice)


def _disk(params: p.Params, models: dict[str, Model], shapes: Shapes, frame: pd.DataFrame | None) -> Check:
    """Space for what the stages leave, at most; images that are made and reports are small beside it."""
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{_bytes(free)} free"
    if frame is None or shapes.latents is None or shapes.text is None or shapes.pipeline is None:
        return Check("disk", found, UNKNOWN, None)
    copies, pixels = 2 ** len(set(params.encode.mirror)), 3 * params.first_stage.image_size**2
    count = int((frame["split"] == "validation").sum()) + copies * int((frame["split"] == "train").sum())
    # Mean and, where there is one, deviation of the latents, every window of the caption, the image.
    each = 4 if params.first_stage.kind == "backbone" else 8
    encoded = count * (each * math.prod(shapes.latents) + 4 * math.prod(shapes.text) + pixels)
    backbones = {models[key].folder: models[key].size for key in models if key.startswith("detection.features")}
    detector = 4 * shapes.pipeline + sum(backbones.values())
    # DVC keeps what a stage leaves once more, in its cache; the registry has the detector.
    kept = 2 * (encoded + 4 * shapes.autoencoder + 4 * shapes.pipeline + detector) + detector
    # Weights, their average, the best and two moments, of the last checkpoint and the one being written.
    trained = max(found.trained for found in (shapes.first_stage, shapes.train) if found is not None)
    passing = max(count * pixels, 2 * 5 * 4 * trained)
    needed = f"{_bytes(kept + passing)} at most: {_bytes(encoded)} encoded, {_bytes(detector)} a model, checkpoints"
    advice = "make room here, or go to another disk; fewer encode.max_windows make the encoded text smaller"
    return Check("disk", found, needed, kept + passing < free, advice)


def _time(
    params: p.Params,
    device: torch.device,
    models: dict[str, Model],
    shapes: Shapes,
    frame: pd.DataFrame | None,
    runs: bool,
) -> list[Check]:
    """How far and how long the trainings go; the time only of networks that are made from nothing."""
    untrained = not any((params.first_stage.pretrained, params.first_stage.perceptual, params.train.pretrained))
    seconds = _seconds(params, device, models, shapes) if untrained and runs and shapes.train else {}
    checks = []
    for name in ("first_stage", "train"):
        stage: p.Training = getattr(params, name)
        if not stage.steps:
            continue
        needed = f"{stage.steps} steps of {stage.batch_size} images"
        if frame is not None:
            epochs = stage.steps * stage.batch_size / max(1, (frame["split"] == "train").sum())
            needed += f", {epochs:.3g} epochs"
        found = "unknown until measured: the stage says its pace"
        if name in seconds:
            found = f"{_duration(seconds[name] * stage.steps)} or more, by a step measured here"
        checks.append(Check(f"time, {name}", found, needed, True if name in seconds else None))
    return checks


def _seconds(params: p.Params, device: torch.device, models: dict[str, Model], shapes: Shapes) -> dict[str, float]:
    """Seconds of a training step of each of the two trainings, measured on random weights and images."""
    vae = _first_stage(params.first_stage, models).to(device, memory_format=torch.channels_last).train()
    networks = nn.ModuleDict({"vae": vae})
    if discriminator := params.first_stage.discriminator:
        networks["discriminator"] = PatchDiscriminator(discriminator.channels, discriminator.layers).to(device)
    with torch.random.fork_rng():
        pipeline = diffusion.build(vae, _text_encoder(params.encode.text_encoder, {}), None, params.train)
    denoiser = diffusion.choose_trainable(pipeline, params.train).to(device, memory_format=torch.channels_last).train()
    size = params.first_stage.image_size

    def first(rows: int) -> cost.Step:
        return cost.first_stage_step(networks, params.first_stage, rows)

    def second(rows: int) -> cost.Step:
        return cost.denoiser_step(denoiser, params.train, rows, shapes.latents, shapes.text, size)

    return {
        name: cost.measure(step_of, _rows(stage), stage.accumulate)
        for name, step_of, stage in (("first_stage", first, params.first_stage), ("train", second, params.train))
    }


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error


def _bytes(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"
