"""The training loop of the first stage and of the denoiser. Killed anywhere, it resumes to the same weights.

The batch of a step and its noise are a function of (seed, step). Processes and accumulated parts share the batch.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs
from torch import nn

from vlmdiff.core.console import say, track
from vlmdiff.core.device import process_group, resolve_precision
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import atomic_folder, write_json
from vlmdiff.core.locks import hold
from vlmdiff.core.params import Training
from vlmdiff.core.text import counted
from vlmdiff.training import checkpoint

History = list[dict[str, float]]


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Return which of `count` items make the batch of `step`. Each epoch has a permutation of its own."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = positions // count, positions % count
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the CPU generator of one step: a function of (seed, step), so that no generator needs saving."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1)


def warmup_cosine(step: int, warmup: int, steps: int) -> float:
    """Return the share of the learning rate at `step`: a linear rise, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class Problem:
    """What to train, and by which loss.

    `loss(step, part)` is the mean loss of the rows `part` of the step's batch. It must be a function of the weights and
    these alone. `validation_loss(share)` is this process's share (every n-th row) of the validation loss: the sum over
    processes is the loss. Only parameters of `model` that require a gradient are trained, averaged and saved.

    The same loss trains `adversary`, with moments and clipping of its own; its weights are not averaged. A step that
    gives it no gradient leaves it as it is. Validations before step `keep_from` do not choose the weights.
    """

    name: str
    model: nn.Module
    loss: Callable[[int, slice], torch.Tensor]
    validation_loss: Callable[[slice], float]
    adversary: nn.Module | None = None
    keep_from: int = 0


class _Objective(nn.Module):
    """The loss as a module, so that what wraps a module (mixed precision, data parallel) wraps all that it computes."""

    def __init__(self, networks: list[nn.Module], loss: Callable[[int, slice], torch.Tensor]):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.loss = loss

    def forward(self, step: int, part: slice) -> torch.Tensor:
        return self.loss(step, part)


class Loop:
    """A training between two steps: `done` steps are behind it."""

    def __init__(self, problem: Problem, params: Training):
        """Raise InputError if the batch cannot be shared evenly or the precision needs other hardware."""
        self.problem, self.params, self.here = problem, params, process_group()
        self.weights = {key: weight for key, weight in problem.model.named_parameters() if weight.requires_grad}
        self.device = next(iter(self.weights.values())).device
        self.precision = resolve_precision(params, self.device)
        self._check()
        self.accelerator = Accelerator(
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            device_placement=False,
            kwargs_handlers=[
                # A weight is used once in a pass: keeping its cast would only cost memory.
                AutocastKwargs(cache_enabled=False),
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True,
                    find_unused_parameters=problem.adversary is not None,
                    broadcast_buffers=False,
                ),
            ],
        )
        others = dict(problem.adversary.named_parameters()) if problem.adversary else {}
        self.average = {key: weight.detach().clone() for key, weight in self.weights.items()}
        self.best = {}
        if self.here.is_main_process:
            self.best = {key: weight.detach().to("cpu", copy=True) for key, weight in self.weights.items()}
        # What a checkpoint has beside the optimizer's moments.
        self.named = {"weights": self.weights, "average": self.average, "best": self.best, "adversary": others}
        self.groups = [list(group.values()) for group in (self.weights, others) if group]
        self.adamw = torch.optim.AdamW(
            [{"params": group} for group in self.groups],
            lr=params.learning_rate,
            weight_decay=params.weight_decay,
            fused=True,
        )
        networks = [problem.model, *([problem.adversary] if problem.adversary else [])]
        self.objective = self.accelerator.prepare(_Objective(networks, problem.loss))
        self.optimizer = self.accelerator.prepare(self.adamw)
        self.parts = self._parts()
        self.done, self.losses, self.best_loss = 0, [], math.inf
        self.history: History = []

    def _check(self) -> None:
        name, params, count = self.problem.name, self.params, self.here.num_processes
        if params.batch_size % (params.accumulate * count):
            raise InputError(
                f"{name}.batch_size = {params.batch_size} cannot be shared by {count} processes in {params.accumulate} "
                f"parts each. Set it to a multiple of {params.accumulate * count}."
            )
        if self.precision == "fp16" and self.device.type == "cpu":
            raise InputError(f"{name}.precision: fp16 needs a GPU. Set it to auto, fp32 or bf16.")

    def _parts(self) -> list[slice]:
        """Return the rows of a batch that this process computes at once, part by part."""
        count = self.params.accumulate
        size = self.params.batch_size // (count * self.here.num_processes)
        first = self.here.process_index * count * size
        return [slice(first + i * size, first + (i + 1) * size) for i in range(count)]

    def step(self) -> None:
        """Run one optimizer step. Raise InputError if the loss is not finite."""
        step, params = self.done, self.params
        for group in self.adamw.param_groups:
            group["lr"] = self._rate(step)
        self.objective.train()
        self.optimizer.zero_grad()
        loss = self._backward(step)
        if not math.isfinite(loss):
            name = self.problem.name
            raise InputError(f"{name}: the loss is {loss} at step {step}. Lower {name}.learning_rate.")
        self.accelerator.unscale_gradients()
        for group in self.groups:
            nn.utils.clip_grad_norm_(group, params.max_grad_norm)
        self.optimizer.step()
        # The average forgets the start early on: at step n it spans at most about n / 10 steps.
        decay = min(params.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            weights = [weight.detach() for weight in self.weights.values()]
            torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)
        self.losses.append(loss)
        self.done += 1

    def _rate(self, step: int) -> float:
        return self.params.learning_rate * warmup_cosine(step, self.params.warmup_steps, self.params.steps)

    def _backward(self, step: int) -> float:
        """Leave the gradients of the step's batch in the weights. Return the mean loss over all processes."""
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(self.parts):
            # Gradients travel between processes once a step.
            last = i + 1 == len(self.parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.objective):
                value = self.objective(step, part) / len(self.parts)
                self.accelerator.backward(value)
            total += value.detach()
        return self.accelerator.reduce(total, "mean").item()

    def validate(self) -> None:
        """Add a row to the history, and keep the averaged weights if their validation loss is the lowest so far."""
        share = slice(self.here.process_index, None, self.here.num_processes)
        self.objective.eval()
        with torch.no_grad(), _lend(self.weights, self.average), self.accelerator.autocast():
            mine = torch.tensor(self.problem.validation_loss(share), dtype=torch.float64, device=self.device)
        judged = self.accelerator.reduce(mine, "sum").item()
        if judged < self.best_loss and self.done >= self.problem.keep_from:
            self.best_loss = judged
            for key, tensor in self.best.items():
                tensor.copy_(self.average[key])
        row = {"step": self.done, "loss": float(np.mean(self.losses)), "validation_loss": judged}
        self.history.append(row | {"learning_rate": self._rate(self.done - 1)})
        self.losses = []

    def save(self, folder: Path) -> None:
        """Write a checkpoint into `folder`, beside the one before."""
        tensors = {f"{kind}.{key}": tensor for kind, group in self.named.items() for key, tensor in group.items()}
        tensors |= {f"optimizer.{key}": tensor for key, tensor in checkpoint.optimizer_tensors(self.adamw).items()}
        facts: dict = {"step": self.done, "losses": self.losses, "best_loss": self.best_loss, "history": self.history}
        if self.accelerator.scaler:
            facts["scaler"] = self.accelerator.scaler.state_dict()
        checkpoint.save(folder, self.done, tensors, facts)

    def restore(self, folder: Path) -> None:
        """Continue from the newest checkpoint in `folder`, if there is one."""
        if (found := checkpoint.load(folder)) is None:
            return
        tensors, facts = found
        self.done, self.losses = facts["step"], facts["losses"]
        self.best_loss, self.history = facts["best_loss"], facts["history"]
        with torch.no_grad():
            for kind, targets in self.named.items():
                for key, target in targets.items():
                    target.copy_(tensors[f"{kind}.{key}"])
        moments = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        checkpoint.load_optimizer(self.adamw, moments)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(facts["scaler"])

    def finish(self) -> None:
        """Leave in the model the averaged weights of the lowest validation loss."""
        with torch.no_grad():
            for key, tensor in self.best.items():
                self.weights[key].copy_(tensor)
        self.problem.model.eval()


def fit(problem: Problem, params: Training, state: Path) -> History:
    """Train the model in place by AdamW; leave in it the averaged (EMA) weights of the lowest validation loss.

    Training resumes from the checkpoint in `state`, a folder that belongs to these exact inputs. The caller removes it
    once the result is safe. The main process has the result and alone writes. Returns a row {step, loss,
    validation_loss, learning_rate} for each validation, `loss` the mean since the one before.

    Raises InputError if the batch cannot be shared evenly, the precision needs other hardware, the loss is not finite,
    or another training has the folder.
    """
    loop, main = Loop(problem, params), process_group().is_main_process
    # `state` belongs to these inputs: another process that holds it runs the same training.
    with hold(state / "lock", f"{problem.name}'s training state {state}") if main else contextlib.nullcontext():
        loop.restore(state / "checkpoint")
        _run(loop, state / "checkpoint")
    return loop.history


def write_history(history: History, report: Path) -> None:
    """Write loss curves into the folder `report`, as rows that `dvc plots` reads."""
    with atomic_folder(report) as temporary:
        write_json(temporary / "loss.json", history)


def _run(loop: Loop, saved: Path) -> None:
    """Run the remaining steps, with validations and checkpoints in between."""
    name, params, main, start = loop.problem.name, loop.params, loop.here.is_main_process, loop.done
    if main:
        resumed = f"resumed at step {start} of {params.steps}" if start else counted(params.steps, "step")
        say(f"{name}: {resumed}, in {loop.precision}")
    steps = range(start, params.steps)
    began = time.monotonic()
    for _ in track(steps, name, total=params.steps, completed=start) if main else steps:
        loop.step()
        if loop.done % params.validate_every == 0 or loop.done == params.steps:
            loop.validate()
            row, pace = loop.history[-1], (time.monotonic() - began) / (loop.done - start)
            if main:
                say(
                    f"{name}: step {loop.done}/{params.steps}, loss {row['loss']:.4f}, "
                    f"validation {row['validation_loss']:.4f}, {pace:.2f} s a step"
                )
        if main and loop.done % params.checkpoint_every == 0 and loop.done < params.steps:
            loop.save(saved)
    loop.finish()


@contextlib.contextmanager
def _lend(weights: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]):
    """Swap the model's weights with `others` for a while, without a third copy."""
    _swap(weights, others)
    try:
        yield
    finally:
        _swap(weights, others)


def _swap(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    for key in a:
        kept = a[key].detach().clone()
        a[key].copy_(b[key])
        b[key].copy_(kept)
