"""What a stage costs: its own first steps, run in a child process on random data, with their seconds and memory."""

import contextlib
import io
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from vlmdiff.core import lifeline
from vlmdiff.core.device import pick_device
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Params, PretrainedTextEncoder, TextEncoder, Training
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.normals import Normal
from vlmdiff.model import pretrained
from vlmdiff.model.feature_space import FeatureSpace
from vlmdiff.training import diffusion, first_stage
from vlmdiff.training.encoded import Encoded
from vlmdiff.training.loop import Loop, Problem
from vlmdiff.training.text_encoder import THUMBNAIL, train_text_encoder, train_tokenizer

GIB = 2**30
# A GPU's context and workspaces, which its allocator does not count.
CONTEXT = GIB
# Bytes of a trained weight's gradient, two moments and average.
BESIDE = 16
# Steps run until there are so many and so many seconds have passed, or so many seconds in any case.
STEPS, SECONDS, AT_MOST = 10, 5.0, 20.0
# Images of a measured validation, at most.
HELD_OUT = 16
# Images that a measured detector learns, and judges at once: a GPU, which has more at once, is faster.
JUDGED = 6


@dataclass
class Cost:
    """What a stage's first steps show. 0, None or empty: the measurement did not get so far, or the stage has none.

    Seconds: start, from the start of the process to the first step, and what a detector's learning takes besides the
    images; steps, of each step (the first ones warm up); validation, encode, learn (of a detector) and judge, per
    image; checkpoint; text, of the text encoder's training; unfinished, of what ran when the limit was reached. memory:
    peak, in bytes. Numbers: latents, of an image; tokens, of a window of text; weights, by network; trained. failure:
    why the measurement ended early; too_large: because of the memory.
    """

    start: float = 0.0
    steps: list[float] = field(default_factory=list)
    validation: float | None = None
    checkpoint: float | None = None
    encode: float = 0.0
    learn: float = 0.0
    judge: float = 0.0
    text: float = 0.0
    memory: int = 0
    latents: int = 0
    tokens: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    trained: int = 0
    unfinished: float = 0.0
    failure: str = ""
    too_large: bool = False

    @property
    def step(self) -> float | None:
        """Seconds of a step: the median of the later half of those that ran."""
        return statistics.median(self.steps[len(self.steps) // 2 :]) if len(self.steps) > 1 else None

    def seconds(self, params: Training, held_out: int) -> float | None:
        """Return the seconds of the whole training, which validates on `held_out` images; None if a part is missing."""
        step = self.step
        if step is None or self.validation is None or self.checkpoint is None:
            return None
        warming_up = sum(max(0.0, seconds - step) for seconds in self.steps[: len(self.steps) // 2])
        validations = math.ceil(params.steps / params.validate_every) * held_out * self.validation
        checkpoints = (params.steps - 1) // params.checkpoint_every * self.checkpoint
        return self.start + warming_up + params.steps * step + validations + checkpoints


def measure(stage: str, params: Params, limit: float, seconds: float = SECONDS) -> Cost:
    """Run the first steps of `stage` in a child process, for at most `limit` seconds.

    stage: "first_stage", "train" or "evaluate", which judges a few images. seconds: how long to run steps of a
    training. A step that takes long runs longer, up to AT_MOST seconds.

    The child ends with this process. A failure of the child is the `failure` of the result.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    cost, began = Cost(), time.monotonic()
    last = began
    with tempfile.TemporaryDirectory() as folder:
        arguments = theirs, os.getpid(), began, stage, params, seconds, Path(folder)
        child = context.Process(target=_child, args=arguments, daemon=True)
        child.start()
        theirs.close()
        try:
            while (now := time.monotonic()) < began + limit:
                # A machine out of memory stands still for minutes before the kernel ends something.
                if psutil.virtual_memory().available < GIB / 4:
                    return replace(cost, failure="the machine's memory was used up", too_large=True)
                if ours.poll(min(0.2, began + limit - now)):
                    cost, last = ours.recv(), time.monotonic()
            return replace(cost, unfinished=time.monotonic() - last)
        except EOFError:
            child.join()
            if child.exitcode == 0:
                return cost
            failure = f"the process that measures it ended with status {child.exitcode}"
            # -9 is the kernel's answer to too little memory.
            return replace(cost, failure=failure, too_large=child.exitcode == -9)
        finally:
            child.kill()
            child.join()
            ours.close()


def _child(
    connection: Connection, owner: int, began: float, stage: str, params: Params, seconds: float, folder: Path
) -> None:
    lifeline.end_with(owner)
    cost = Cost()
    # The output of a training would look as if it were the real one.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            judged = stage == "evaluate"
            for _ in _evaluate(cost, began, params) if judged else _train(cost, began, stage, params, seconds, folder):
                connection.send(cost)
        except (InputError, ValueError, OSError, RuntimeError, MemoryError) as error:
            cost.failure = str(error) or type(error).__name__
            cost.too_large = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in str(error)
            connection.send(cost)


def _train(cost: Cost, began: float, stage: str, params: Params, seconds: float, folder: Path) -> Iterator[None]:
    """Set the training up, run steps, a validation and a checkpoint. Yield whenever `cost` has news."""
    torch.manual_seed(0)
    device = pick_device()
    section: Training = getattr(params, stage)
    problem = (_first_stage if stage == "first_stage" else _denoiser)(cost, params, device)
    networks = filter(None, (problem.model, problem.adversary))
    cost.trained = sum(weight.numel() for part in networks for weight in part.parameters() if weight.requires_grad)
    if (needed := BESIDE * cost.trained) > free_memory(device):
        raise MemoryError(f"gradients, moments and averages alone need {needed / GIB:.1f} GiB")
    loop = Loop(problem, section)
    cost.start = time.monotonic() - began
    yield

    def step() -> None:
        # Always the last one: by then every part of the loss has joined.
        loop.done = section.steps - 1
        loop.step()

    began = time.monotonic()
    while time.monotonic() < began + (seconds if len(cost.steps) >= STEPS else AT_MOST) or len(cost.steps) < 2:
        cost.steps.append(_seconds(step, device))
        cost.memory = _peak(device)
        yield
    loop.validate()
    step()
    cost.validation = _seconds(loop.validate, device) / min(section.batch_size, HELD_OUT)
    cost.checkpoint = _seconds(lambda: loop.save(folder / "checkpoint"), device)
    cost.memory = _peak(device)
    yield


def _evaluate(cost: Cost, began: float, params: Params) -> Iterator[None]:
    """Set a detector up, untrained, and let it learn and judge a few images. Yield whenever `cost` has news."""
    torch.manual_seed(0)
    device, ours = pick_device(), params.evaluate
    vae = first_stage.start(params.first_stage)
    text_encoder, tokenizer = _text_encoder(params, device)
    pipeline = diffusion.build(vae, text_encoder, tokenizer, params.train).to(device)
    pipeline.set_progress_bar_config(disable=True)
    detector = Detector(pipeline, ours.detection)
    images = list(_images(JUDGED, params.first_stage.image_size))
    known = [Normal(str(i), f"{i}.png", "", "a caption") for i in range(JUDGED)]
    captions = None if ours.detection.captions == "none" else ["a caption"] * JUDGED
    cost.start = time.monotonic() - began
    yield

    def learn(count: int) -> None:
        detector.learn(images[:count], known[:count], count)

    # The first time warms up. What half of the images take tells how much does not grow with them.
    half = JUDGED // 2
    learn(half)
    fewer, more = (_seconds(lambda n=count: learn(n), device) for count in (half, JUDGED))
    cost.learn = max(0.0, more - fewer) / (JUDGED - half)
    cost.start += max(0.0, fewer - half * cost.learn)
    yield
    detector.calibrate(images, JUDGED, captions)
    cost.judge = min(_seconds(lambda: detector.detect(images, JUDGED, captions), device) for _ in range(2)) / JUDGED
    yield


def _seconds(work, device: torch.device) -> float:
    began = time.monotonic()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - began


def _peak(device: torch.device) -> int:
    """Return the most bytes that this process has had: on the GPU, if it computes there, else in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + CONTEXT
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def free_memory(device: torch.device) -> int:
    """Return the free bytes where `device` computes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _images(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def _first_stage(cost: Cost, params: Params, device: torch.device) -> Problem:
    ours = params.first_stage
    images = _images(ours.batch_size, ours.image_size)
    vae, seen, codes = first_stage.prepare(images, ours, device)
    reconstruction = first_stage.Reconstruction(vae, seen, images[:HELD_OUT], ours, device, codes)
    reconstruction.latents(images)
    cost.encode = _seconds(lambda: reconstruction.latents(images), device) / len(images)
    return reconstruction.problem()


def _denoiser(cost: Cost, params: Params, device: torch.device) -> Problem:
    ours = params.train
    vae = first_stage.start(params.first_stage)
    text_encoder, tokenizer = _text_encoder(params, device)
    if isinstance(chosen := params.encode.text_encoder, TextEncoder):
        cost.text = _text_seconds(tokenizer, chosen, device)
    pipeline = diffusion.build(vae, text_encoder, tokenizer, ours)
    for network in filter(None, (pipeline.unet, pipeline.sgn)):
        network.to(device)
    side = params.first_stage.image_size // first_stage.downsampling(vae)
    latents = (vae.config.latent_channels, side, side)
    tokens = (text_encoder.config.max_position_embeddings, text_encoder.config.hidden_size)
    networks = {"vae": vae, "text_encoder": text_encoder, "unet": pipeline.unet, "sgn": pipeline.sgn}
    cost.weights = {name: network.num_parameters() for name, network in networks.items() if network is not None}
    cost.latents, cost.tokens = math.prod(latents), math.prod(tokens)
    # A batch to train on, then the images that are held out.
    count, random = ours.batch_size + min(ours.batch_size, HELD_OUT), np.random.default_rng(0)
    splits = np.where(np.arange(count) < ours.batch_size, "train", "validation")
    mean = random.standard_normal((count, *latents), dtype=np.float32)
    data = Encoded(
        index=pd.DataFrame({"split": splits, "caption": 0}),
        mean=mean,
        std=None if isinstance(vae, FeatureSpace) else np.ones_like(mean),
        # Captions of one window, as most are.
        text=random.standard_normal((1, *tokens), dtype=np.float32),
        windows=np.zeros((1, 1), int),
        hints=_images(count, params.first_stage.image_size),
    )
    return diffusion.problem(pipeline, data, ours)


def _text_encoder(params: Params, device: torch.device) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Return the text encoder, trained for one step or pretrained, and its tokenizer."""
    chosen = params.encode.text_encoder
    if isinstance(chosen, PretrainedTextEncoder):
        text_encoder = pretrained.load_network(CLIPTextModel, chosen, chosen.subfolder)
        return text_encoder, pretrained.load(CLIPTokenizer, chosen, chosen.tokenizer_subfolder)
    tokenizer = train_tokenizer(["a caption"], chosen)
    return _trained(tokenizer, chosen, 1, device).to("cpu"), tokenizer


def _text_seconds(tokenizer: CLIPTokenizer, params: TextEncoder, device: torch.device) -> float:
    """Return the seconds that the text encoder's training takes, after a first step."""
    # One call tells how much of the other is not steps.
    fixed, longer = (_seconds(lambda n=steps: _trained(tokenizer, params, n, device), device) for steps in (1, 11))
    return max(0.0, longer - fixed) / 10 * params.steps + fixed


def _trained(tokenizer: CLIPTokenizer, params: TextEncoder, steps: int, device: torch.device) -> CLIPTextModel:
    tokens = torch.randint(len(tokenizer), (params.batch_size, 1, params.max_tokens))
    thumbnails = torch.rand(params.batch_size, 3, THUMBNAIL, THUMBNAIL)
    fewer = params.model_copy(update={"steps": steps})
    return train_text_encoder(tokenizer, tokens, thumbnails, fewer, 0, device)
