"""The training loop that both the first stage and the denoiser run: killed anywhere, it ends with the same weights.

The batch of a step, and its noise, are a function of (seed, step); processes and accumulated parts share it out.
"""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs
from torch import nn

from vlmdiff.core.console import say, track
from vlmdiff.core.device import process_group
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Training
from vlmdiff.training import checkpoint

History = list[dict[str, float]]


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Which of `count` items make the batch of `step`: a new permutation an epoch, a function of its arguments only."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = positions // count, positions % count
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])


def step_generator(seed: int, step: int) -> torch.Generator:
    """Randomness of one step (on the CPU): a function of (seed, step), so that no generator needs saving."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1)


def warmup_cosine(step: int, warmup: int, steps: int) -> float:
    """Share of the learning rate at `step`: a linear rise, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class _Objective(nn.Module):
    """The loss as a module, so that what wraps a module (mixed precision, data parallel) wraps all that it computes."""

    def __init__(self, networks: list[nn.Module], loss: Callable[[int, slice], torch.Tensor]):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.loss = loss

    def forward(self, step: int, part: slice) -> torch.Tensor:
        return self.loss(step, part)


def fit(
    name: str,
    model: nn.Module,
    loss: Callable[[int, slice], torch.Tensor],
    validation_loss: Callable[[slice], float],
    params: Training,
    state: Path,
    adversary: nn.Module | None = None,
    keep_from: int = 0,
) -> History:
    """Train `model` in place by AdamW and leave in it the averaged (EMA) weights of the lowest validation loss.

    `loss(step, part)` is the mean loss of the rows `part` of the step's batch, and must be a function of the weights
    and these alone. `validation_loss(share)` is this process's share (every n-th row) of the validation loss: the sum
    over processes is the loss. Only parameters that require a gradient are trained, averaged and saved.

    `adversary` is trained by the same loss, with moments and clipping of its own; its weights are not averaged. Where
    a step gives it no gradient, it stays as it is. Validations before step `keep_from` do not choose the weights.

    Training resumes from the checkpoint in `state`, a folder that belongs to these exact inputs and that the caller
    removes once the result is safe. The result is in the main process, which alone writes. Returns a row {step, loss,
    validation_loss, learning_rate} for each validation, `loss` the mean since the one before.

    Raises InputError where a batch cannot be shared out evenly, the precision has no hardware here, the loss is not
    finite, or another training has the folder.
    """
    here = process_group()
    if params.batch_size % (params.accumulate * here.num_processes):
        raise InputError(
            f"{name}.batch_size = {params.batch_size} cannot be shared by {here.num_processes} processes in "
            f"{params.accumulate} parts each: make it a multiple of {params.accumulate * here.num_processes}"
        )
    if params.precision == "fp16" and here.device.type == "cpu":
        raise InputError(f"{name}.precision: fp16 needs a GPU; on a CPU choose fp32 or bf16")
    state.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(state / "lock", timeout=0) if here.is_main_process else contextlib.nullcontext()
    try:
        with lock:
            return _fit(name, model, loss, validation_loss, params, state / "checkpoint", adversary, keep_from)
    except filelock.Timeout:
        raise InputError(
            f"another process is training {name} with the same inputs ({state}): wait for it or end it"
        ) from None


def _fit(name, model, loss, validation_loss, params: Training, saved: Path, adversary, keep_from: int) -> History:
    here = process_group()
    main = here.is_main_process
    accelerator = Accelerator(
        mixed_precision="no" if params.precision == "fp32" else params.precision,
        device_placement=False,
        kwargs_handlers=[
            # A weight is used once in a pass: keeping its cast would only cost memory.
            AutocastKwargs(cache_enabled=False),
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True, find_unused_parameters=adversary is not None, broadcast_buffers=False
            ),
        ],
    )
    weights = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    device = next(iter(weights.values())).device
    others = dict(adversary.named_parameters()) if adversary else {}
    average = {key: weight.detach().clone() for key, weight in weights.items()}
    best = {key: weight.detach().to("cpu", copy=True) for key, weight in weights.items()} if main else {}
    groups = [list(group.values()) for group in (weights, others) if group]
    adamw = torch.optim.AdamW(
        [{"params": group} for group in groups],
        lr=params.learning_rate,
        weight_decay=params.weight_decay,
        fused=True,
    )
    named = {"weights": weights, "average": average, "best": best, "adversary": others}
    history: History = []
    start, losses, best_loss = 0, [], math.inf
    if (found := checkpoint.load(saved)) is not None:
        tensors, facts = found
        start, losses, best_loss, history = (
            facts["step"],
            facts["losses"],
            facts["best_loss"],
            facts["history"],
        )
        with torch.no_grad():
            for kind, targets in named.items():
                for key, target in targets.items():
                    target.copy_(tensors[f"{kind}.{key}"])
        checkpoint.load_optimizer(
            adamw,
            {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")},
        )
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(facts["scaler"])
        if main:
            say(f"{name}: resumed at step {start} of {params.steps}")

    objective = accelerator.prepare(_Objective([model, *([adversary] if adversary else [])], loss))
    optimizer = accelerator.prepare(adamw)
    share = slice(here.process_index, None, here.num_processes)
    size = params.batch_size // (params.accumulate * here.num_processes)
    first = here.process_index * params.accumulate * size
    parts = [slice(first + i * size, first + (i + 1) * size) for i in range(params.accumulate)]
    steps = range(start, params.steps)
    began = time.monotonic()
    for step in track(steps, name, total=params.steps, completed=start) if main else steps:
        rate = params.learning_rate * warmup_cosine(step, params.warmup_steps, params.steps)
        for group in adamw.param_groups:
            group["lr"] = rate
        objective.train()
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for i, part in enumerate(parts):
            # Gradients travel between processes once a step.
            last = i + 1 == len(parts)
            with contextlib.nullcontext() if last else accelerator.no_sync(objective):
                value = objective(step, part) / len(parts)
                accelerator.backward(value)
            total += value.detach()
        value = accelerator.reduce(total, "mean").item()
        if not math.isfinite(value):
            raise InputError(f"{name}: the loss is {value} at step {step}: lower {name}.learning_rate")
        accelerator.unscale_gradients()
        for group in groups:
            nn.utils.clip_grad_norm_(group, params.max_grad_norm)
        optimizer.step()
        losses.append(value)
        # The average forgets the start early on: at step n it spans about n / 10 steps at the most.
        decay = min(params.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [w.detach() for w in weights.values()], 1 - decay)

        done = step + 1
        if done % params.validate_every == 0 or done == params.steps:
            objective.eval()
            with torch.no_grad(), _lend(weights, average), accelerator.autocast():
                mine = torch.tensor(validation_loss(share), dtype=torch.float64, device=device)
            judged = accelerator.reduce(mine, "sum").item()
            if judged < best_loss and done >= keep_from:
                best_loss = judged
                for key, tensor in best.items():
                    tensor.copy_(average[key])
            history.append(
                {
                    "step": done,
                    "loss": float(np.mean(losses)),
                    "validation_loss": judged,
                    "learning_rate": rate,
                }
            )
            losses = []
            pace = (time.monotonic() - began) / (done - start)
            if main:
                say(
                    f"{name}: step {done}/{params.steps}, loss {history[-1]['loss']:.4f}, "
                    f"validation {judged:.4f}, {pace:.2f} s a step"
                )
        if main and done % params.checkpoint_every == 0 and done < params.steps:
            tensors = {f"{kind}.{key}": tensor for kind, group in named.items() for key, tensor in group.items()}
            tensors |= {f"optimizer.{key}": tensor for key, tensor in checkpoint.optimizer_tensors(adamw).items()}
            facts = {"step": done, "losses": losses, "best_loss": best_loss, "history": history}
            if accelerator.scaler:
                facts["scaler"] = accelerator.scaler.state_dict()
            checkpoint.save(saved, tensors, facts)

    with torch.no_grad():
        for key, tensor in best.items():
            weights[key].copy_(tensor)
    model.eval()
    return history


@contextlib.contextmanager
def _lend(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]):
    """Lend the model other weights, which hold its own meanwhile: no third copy."""
    _swap(weights, others)
    try:
        yield
    finally:
        _swap(weights, others)


def _swap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for key in a:
        kept = a[key].detach().clone()
        a[key].copy_(b[key])
        b[key].copy_(kept)
