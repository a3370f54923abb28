"""The training loop that both the first stage and the denoiser run: killed anywhere, it ends with the same weights."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import torch
from torch import nn

from vlmdiff.console import say, track
from vlmdiff.errors import InputError
from vlmdiff.params import Training
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


def fit(
    name: str,
    model: nn.Module,
    loss: Callable[[int], torch.Tensor],
    validation_loss: Callable[[], float],
    params: Training,
    state: Path,
) -> History:
    """Train `model` in place by AdamW and leave in it the averaged (EMA) weights of the lowest validation loss.

    `loss(step)` must be a function of the weights and the step alone. Training resumes from the checkpoint in `state`,
    a folder that belongs to these exact inputs and that the caller removes once the result is safe. Returns a row
    {step, loss, validation_loss, learning_rate} for each validation, `loss` the mean since the one before.
    """
    state.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(state / "lock", timeout=0):
            return _fit(name, model, loss, validation_loss, params, state / "checkpoint")
    except filelock.Timeout:
        raise InputError(
            f"another process is training {name} with the same inputs ({state}): wait for it or end it"
        ) from None


def _fit(name, model, loss, validation_loss, params: Training, saved: Path) -> History:
    weights = dict(model.named_parameters())
    device = next(iter(weights.values())).device
    average = {key: weight.detach().clone() for key, weight in weights.items()}
    best = {key: weight.detach().clone() for key, weight in weights.items()}
    optimizer = torch.optim.AdamW(
        weights.values(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )
    history: History = []
    start, losses, best_loss = 0, [], math.inf
    if (found := checkpoint.load(saved, device)) is not None:
        tensors, facts = found
        start, losses, best_loss, history = (
            facts["step"],
            facts["losses"],
            facts["best_loss"],
            facts["history"],
        )
        for prefix, target in (("weights.", weights), ("average.", average), ("best.", best)):
            with torch.no_grad():
                for key, tensor in target.items():
                    tensor.copy_(tensors[prefix + key])
        checkpoint.load_optimizer(
            optimizer,
            {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")},
        )
        say(f"{name}: resumed at step {start} of {params.steps}")

    began = time.monotonic()
    for step in track(range(start, params.steps), f"{name}", total=params.steps, completed=start):
        rate = params.learning_rate * warmup_cosine(step, params.warmup_steps, params.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        value = loss(step)
        if not torch.isfinite(value):
            raise InputError(f"{name}: the loss is {value.item()} at step {step}: lower {name}.learning_rate")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(weights.values(), params.max_grad_norm)
        optimizer.step()
        losses.append(value.item())
        # The average forgets the start early on: at step n it spans about n / 10 steps at the most.
        decay = min(params.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [w.detach() for w in weights.values()], 1 - decay)

        done = step + 1
        if done % params.validate_every == 0 or done == params.steps:
            model.eval()
            with torch.no_grad(), _weights(weights, average):
                judged = validation_loss()
            if judged < best_loss:
                best_loss = judged
                for key, tensor in average.items():
                    best[key].copy_(tensor)
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
            say(
                f"{name}: step {done}/{params.steps}, loss {history[-1]['loss']:.4f}, "
                f"validation {judged:.4f}, {pace:.2f} s a step"
            )
        if done % params.checkpoint_every == 0 and done < params.steps:
            tensors = {
                **{f"weights.{k}": v for k, v in weights.items()},
                **{f"average.{k}": v for k, v in average.items()},
                **{f"best.{k}": v for k, v in best.items()},
                **{f"optimizer.{k}": v for k, v in checkpoint.optimizer_tensors(optimizer).items()},
            }
            facts = {"step": done, "losses": losses, "best_loss": best_loss, "history": history}
            checkpoint.save(saved, tensors, facts)

    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(best[key])
    model.eval()
    return history


@contextlib.contextmanager
def _weights(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]):
    """Lend the model other weights."""
    own = {key: weight.detach().clone() for key, weight in weights.items()}
    for key, weight in weights.items():
        weight.copy_(others[key])
    try:
        yield
    finally:
        for key, weight in weights.items():
            weight.copy_(own[key])
