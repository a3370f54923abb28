"""What a training costs: its own first steps, run in a child process on random data, with their seconds and memory."""

import contextlib
import io
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

from vlmdiff.core import lifeline
from vlmdiff.core.device import pick_device
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Params, PretrainedTextEncoder, Training
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


@dataclass
class Cost:
    """What a training's first steps show. None: the measurement did not get so far.

    Seconds: start, from the start of the process to the first step; steps, of each step (the first ones warm up);
    validation and encode, per image; checkpoint; text, of the text encoder's training; unfinished, of what ran when the
    limit was reached. memory: peak, in bytes. Shapes: latents (C, h, w); tokens (L, D), of a window of text. weights:
    number by network; trained: number that is trained. failure: why the measurement ended early; too_large: because of
    the memory.
    """

    start: float | None = None
    steps: list[float] = field(default_factory=list)
    validation: float | None = None
    checkpoint: float | None = None
    encode: float | None = None
    text: float = 0.0
    memory: int = 0
    latents: tuple[int, int, int] | None = None
    tokens: tuple[int, int] | None = None
    weights: dict[str, int] = field(default_factory=dict)
    trained: int = 0
    unfinished: float | None = None
    failure: str | None = None
    too_large: bool = False

    @property
    def step(self) -> float | None:
        """Seconds of a step: the median of the later half of those that ran."""
        return statistics.median(self.steps[len(self.steps) // 2 :]) if len(self.steps) > 1 else None

    def seconds(self, params: Training, held_out: int) -> float | None:
        """Return the seconds of the whole training, which validates on `held_out` images; None if a part is missing."""
        if self.step is None or self.validation is None or self.checkpoint is None:
            return None
        warming_up = sum(max(0.0, seconds - self.step) for seconds in self.steps[: len(self.steps) // 2])
        validations = math.ceil(params.steps / params.validate_every)
        return (
            self.start
            + warming_up
            + params.steps * self.step
            + validations * held_out * self.validation
            + (params.steps - 1) // params.checkpoint_every * self.checkpoint
        )


def measure(stage: str, params: Params, limit: float) -> Cost:
    """Run the first steps of `stage`, "first_stage" or "train", in a child process, for at most `limit` seconds.

    The child ends with this process. A failure of the child is the `failure` of the result.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        child = context.Process(target=_child, args=(theirs, os.getpid(), stage, params, Path(folder)), daemon=True)
        began = time.monotonic()
        child.start()
        theirs.close()
        try:
            return _listen(ours, child, began, limit)
        finally:
            child.kill()
            child.join()
            ours.close()


def _listen(connection: Connection, child, began: float, limit: float) -> Cost:
    cost, last = Cost(), began
    while (now := time.monotonic()) < began + limit:
        # A machine out of memory stands still for minutes before the kernel ends something.
        if psutil.virtual_memory().available < GIB / 4:
            cost.failure, cost.too_large = "the machine's memory was used up", True
            return cost
        if not connection.poll(min(0.2, began + limit - now)):
            continue
        try:
            name, value = connection.recv()
        except EOFError:
            child.join()
            cost.failure = f"the process that measures it ended with status {child.exitcode}"
            cost.too_large = child.exitcode == -9  # the kernel's answer to too little memory
            return cost
        last = time.monotonic()
        match name:
            case "end":
                return cost
            case "start":
                cost.start = last - began
            case "step":
                cost.steps.append(value)
            case _:
                setattr(cost, name, value)
        if cost.failure:
            return cost
    cost.unfinished = time.monotonic() - last
    return cost


def _child(connection: Connection, owner: int, stage: str, params: Params, folder: Path) -> None:
    lifeline.end_with(owner)
    # The output of a training would look as if it were the real one.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            _run(lambda name, value: connection.send((name, value)), stage, params, folder)
        except (InputError, ValueError, OSError, RuntimeError, MemoryError) as error:
            too_large = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in str(error)
            connection.send(("too_large", too_large))
            connection.send(("failure", str(error)))


def _run(send, stage: str, params: Params, folder: Path) -> None:
    """Set the training up, run steps, a validation and a checkpoint, and send what each has shown."""
    torch.manual_seed(0)
    device = pick_device()
    section: Training = getattr(params, stage)
    problem = (_first_stage if stage == "first_stage" else _denoiser)(send, params, device)
    _refuse_too_large(send, problem, device)
    loop = Loop(problem, section)
    send("start", None)

    def step() -> float:
        # Always the last one: by then every part of the loss has joined.
        loop.done = section.steps - 1
        return _seconds(loop.step, device)

    count, began = 0, time.monotonic()
    while time.monotonic() < began + (SECONDS if count >= STEPS else AT_MOST) or count < 2:
        send("step", step())
        send("memory", _peak(device))
        count += 1
    loop.validate()
    step()
    send("validation", _seconds(loop.validate, device) / min(section.batch_size, HELD_OUT))
    send("checkpoint", _seconds(lambda: loop.save(folder / "checkpoint"), device))
    send("memory", _peak(device))
    send("end", None)


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


def _refuse_too_large(send, problem: Problem, device: torch.device) -> None:
    networks = filter(None, (problem.model, problem.adversary))
    trained = sum(weight.numel() for network in networks for weight in network.parameters() if weight.requires_grad)
    send("trained", trained)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if (needed := BESIDE * trained) > free:
        raise MemoryError(f"gradients, moments and averages alone need {needed / GIB:.1f} GiB")


def _images(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def _first_stage(send, params: Params, device: torch.device) -> Problem:
    ours = params.first_stage
    images = _images(ours.batch_size, ours.image_size)
    vae = first_stage.prepare(images, ours, device)
    reconstruction = first_stage.Reconstruction(vae, images, images[:HELD_OUT], ours, device)
    reconstruction.latents(images)
    send("encode", _seconds(lambda: reconstruction.latents(images), device) / len(images))
    return reconstruction.problem()


def _denoiser(send, params: Params, device: torch.device) -> Problem:
    ours = params.train
    vae = first_stage.start(params.first_stage)
    text_encoder = _text_encoder(send, params, device)
    pipeline = diffusion.build(vae, text_encoder, None, ours)
    for network in filter(None, (pipeline.unet, pipeline.sgn)):
        network.to(device)
    side = params.first_stage.image_size // first_stage.downsampling(vae)
    latents = (vae.config.latent_channels, side, side)
    tokens = (text_encoder.config.max_position_embeddings, text_encoder.config.hidden_size)
    networks = {"vae": vae, "text_encoder": text_encoder, "unet": pipeline.unet, "sgn": pipeline.sgn}
    send("weights", {name: network.num_parameters() for name, network in networks.items() if network is not None})
    send("latents", latents)
    send("tokens", tokens)
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


def _text_encoder(send, params: Params, device: torch.device):
    chosen = params.encode.text_encoder
    if isinstance(chosen, PretrainedTextEncoder):
        return pretrained.load_network(diffusion.CLIPTextModel, chosen, chosen.subfolder)
    tokenizer = train_tokenizer(["a caption"], chosen)
    tokens = torch.randint(len(tokenizer), (chosen.batch_size, 1, chosen.max_tokens))
    thumbnails = torch.rand(chosen.batch_size, 3, THUMBNAIL, THUMBNAIL)

    def train(steps: int):
        return train_text_encoder(tokenizer, tokens, thumbnails, chosen.model_copy(update={"steps": steps}), 0, device)

    # The first call warms up. The second one tells how much of the third one is not steps.
    train(2)
    fixed = _seconds(lambda: train(1), device)
    send("text", max(0.0, _seconds(lambda: train(11), device) - fixed) / 10 * chosen.steps + fixed)
    return train(1).to("cpu")
