"""Training: the data order, resuming, what is kept."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmdiff.core.errors import InputError
from vlmdiff.core.params import Training
from vlmdiff.training.loop import batch_indices, fit, step_generator, warmup_cosine

SETTINGS = {"steps": 40, "batch_size": 4, "learning_rate": 0.05, "warmup_steps": 2, "validate_every": 10}


@given(count=st.integers(1, 50), batch_size=st.integers(1, 20), epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_each_epoch_sees_each_item_once(count, batch_size, epochs, seed):
    steps = -(-count * epochs // batch_size)
    seen = np.concatenate([batch_indices(count, batch_size, step, seed) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_each_epoch_has_an_order_of_its_own():
    first, second = (batch_indices(100, 100, step, 0) for step in (0, 1))
    assert (first != second).any()


@given(seed=st.integers(0, 2**31), step=st.integers(0, 2**31))
def test_randomness_is_a_function_of_seed_and_step(seed, step):
    draw = lambda *key: torch.randn(4, generator=step_generator(*key))  # noqa: E731
    assert torch.equal(draw(seed, step), draw(seed, step))
    assert not torch.equal(draw(seed, step), draw(seed, step + 1))


def test_the_rate_rises_to_one_and_falls_to_zero():
    rates = [warmup_cosine(step, 10, 100) for step in range(101)]
    assert max(rates) == rates[10] == 1 and rates[0] == pytest.approx(0.1) and rates[100] == pytest.approx(0)


def regression(state, params, stop_at=None):
    """Fit y = 2x + 1; die at `stop_at`."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    x = torch.linspace(-1, 1, 32)[:, None]

    def loss(step, part):
        if step == stop_at:
            raise KeyboardInterrupt
        rows = batch_indices(32, params.batch_size, step, params.seed)[part]
        noise = 0.1 * torch.randn(params.batch_size, 1, generator=step_generator(params.seed, step))[part]
        return (model(x[rows]) - 2 * x[rows] - 1 - noise).square().mean()

    history = fit("train", model, loss, lambda _: (model(x) - 2 * x - 1).square().mean().item(), params, state)
    return model, history


@pytest.mark.parametrize("stop_at", [7, 10, 39])
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, stop_at):
    params = Training(**SETTINGS, checkpoint_every=5)
    undisturbed, history = regression(tmp_path / "a", params)
    with pytest.raises(KeyboardInterrupt):
        regression(tmp_path / "b", params, stop_at)
    resumed, resumed_history = regression(tmp_path / "b", params)
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
    assert resumed_history == history


@pytest.mark.parametrize(("keep_from", "kept"), [(0, 17), (25, 25)])
def test_the_weights_of_the_lowest_validation_loss_are_kept(tmp_path, keep_from, kept):
    params = Training(**{**SETTINGS, "ema_decay": 0.0, "learning_rate": 0.5, "validate_every": 1})
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1, bias=False)
    seen = {}

    def judge(_):
        # Lowest in the middle of training, whatever the weights are.
        step = len(seen) + 1
        seen[step] = model.weight.item()
        return abs(step - 17)

    fit("train", model, lambda step, part: -model.weight.sum(), judge, params, tmp_path, keep_from=keep_from)
    assert model.weight.item() == seen[kept]


def test_the_average_not_the_last_weights_is_judged_and_kept(tmp_path):
    params = Training(**{**SETTINGS, "steps": 2, "validate_every": 2, "warmup_steps": 0, "weight_decay": 0.0})
    model = torch.nn.Linear(1, 1, bias=False)
    path = [model.weight.item()]

    def loss(step, part):
        path.append(model.weight.item())
        return model.weight.sum()

    fit("train", model, loss, lambda _: 0.0, params, tmp_path)
    first, second = path[2], None
    # After step n the average moves towards the weights by 1 - min(decay, (1 + n) / (10 + n)).
    average = path[0] + 0.9 * (first - path[0])
    second = (model.weight.item() - average) / (9 / 11) + average
    assert second < first < path[0]


def test_a_loss_that_is_not_finite_stops_with_the_parameter_to_change(tmp_path):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"train\.learning_rate"):
        fit(
            "train",
            model,
            lambda step, part: model.weight.sum() * float("nan"),
            lambda _: 0.0,
            Training(**SETTINGS),
            tmp_path,
        )


def test_two_trainings_on_one_state_are_refused(tmp_path):
    holder = textwrap.dedent(f"""
        import filelock, sys
        with filelock.FileLock({str(tmp_path / "lock")!r}):
            print("held", flush=True)
            sys.stdin.read()
    """)
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(InputError, match=r"another process holds .*training state"):
            regression(tmp_path, Training(**SETTINGS))
        process.stdin.close()
