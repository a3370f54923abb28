"""Training: the data order, resuming, what is kept."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st

from vlmdiff.core.device import resolve_precision
from vlmdiff.core.errors import InputError
from vlmdiff.core.params import FirstStage, Part, Train, Training
from vlmdiff.training.checkpoint import state_folder
from vlmdiff.training.loop import Problem, batch_indices, fit, step_generator, warmup_cosine

SETTINGS = {
    "steps": 40,
    "batch_size": 4,
    "precision": "fp32",
    "learning_rate": 0.05,
    "warmup_steps": 2,
    "validate_every": 10,
}


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

    problem = Problem("train", model, loss, lambda _: (model(x) - 2 * x - 1).square().mean().item())
    return model, fit(problem, params, state)


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

    problem = Problem("train", model, lambda step, part: -model.weight.sum(), judge, keep_from=keep_from)
    fit(problem, params, tmp_path)
    assert model.weight.item() == seen[kept]


def test_the_average_not_the_last_weights_is_judged_and_kept(tmp_path):
    params = Training(**{**SETTINGS, "steps": 2, "validate_every": 2, "warmup_steps": 0, "weight_decay": 0.0})
    model = torch.nn.Linear(1, 1, bias=False)
    path = [model.weight.item()]

    def loss(step, part):
        path.append(model.weight.item())
        return model.weight.sum()

    fit(Problem("train", model, loss, lambda _: 0.0), params, tmp_path)
    first, second = path[2], None
    # After step n the average moves towards the weights by 1 - min(decay, (1 + n) / (10 + n)).
    average = path[0] + 0.9 * (first - path[0])
    second = (model.weight.item() - average) / (9 / 11) + average
    assert second < first < path[0]


def test_a_loss_that_is_not_finite_stops_with_the_parameter_to_change(tmp_path):
    model = torch.nn.Linear(1, 1)
    problem = Problem("train", model, lambda step, part: model.weight.sum() * float("nan"), lambda _: 0.0)
    with pytest.raises(InputError, match=r"train\.learning_rate"):
        fit(problem, Training(**SETTINGS), tmp_path)


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


CPU = torch.device("cpu")


@pytest.fixture
def cpu_has(monkeypatch):
    """Let the CPU have exactly these instructions."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def has(*names: str) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True), raising=False)

    return has


@pytest.mark.parametrize(
    ("instructions", "precision"),
    [((), "fp32"), (("avx512_f",), "fp32"), (("avx512_bf16",), "bf16"), (("amx_bf16",), "bf16")],
)
def test_auto_is_bf16_on_a_cpu_with_instructions_for_it(cpu_has, instructions, precision):
    cpu_has(*instructions)
    assert resolve_precision(Train(precision="auto", block_channels=(64, 128)), CPU) == precision
    assert resolve_precision(Train(precision="fp16"), CPU) == "fp16"


@pytest.mark.parametrize("params", [Train(block_channels=(32, 64)), FirstStage(block_channels=(32, 64))])
def test_auto_is_fp32_for_narrow_networks_on_a_cpu(cpu_has, params):
    cpu_has("avx512_bf16")
    assert resolve_precision(params, CPU) == "fp32"
    pretrained = params.model_copy(update={"pretrained": Part(model="a")})
    assert resolve_precision(pretrained, CPU) == "bf16"


@pytest.mark.parametrize(("instructions", "precision"), [((), "fp32"), (("avx512_bf16",), "bf16")])
def test_training_in_auto_has_the_bits_of_training_in_the_precision_it_stands_for(
    cpu_has, tmp_path, capsys, instructions, precision
):
    cpu_has(*instructions)
    weights = {}
    for name in ("auto", "fp32", "bf16"):
        AcceleratorState._reset_state()
        model, _ = regression(tmp_path / name, Training(**{**SETTINGS, "precision": name}))
        weights[name] = torch.cat([model.weight.flatten(), model.bias])
    assert f"train: 40 steps, in {precision}\n" in capsys.readouterr().out
    assert torch.equal(weights["auto"], weights[precision]) and not torch.equal(weights["fp32"], weights["bf16"])


def test_a_training_in_auto_does_not_resume_in_another_precision(cpu_has, tmp_path):
    def state(precision, *instructions):
        cpu_has(*instructions)
        return state_folder(tmp_path, FirstStage(precision=precision, block_channels=(64, 128)))

    assert state("auto") == state("fp32") == state("fp32", "avx512_bf16")
    assert state("auto", "avx512_bf16") == state("bf16") != state("auto")
