"""The harness serves an experiment that is no more than its opening comment asks for, exactly.

The experiment is tests/tiny_experiment.py: one stage, one linear layer, a stochastic sampler.
"""

import itertools
import math
import shutil
import signal
import time
import types

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from conftest import load_script, run_script
from script_runs import (
    Experiment,
    differences,
    files_below,
    flags,
    interrupt_at_step,
    read,
    refusal,
    run,
    steps,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def experiment(tiny_script):
    return Experiment(tiny_script)


def test_another_experiment_is_what_stands_above_the_line(
    experiment, undisturbed, tiny_data_dir, tmp_path
):
    """From data to figures, as a user runs it; the network learns its linear task."""
    asked = ["--quick", f"--data-dir={tiny_data_dir}", "--device=cpu", "--export-samples=20"]
    done = run_script(experiment.path, *asked, f"--output-dir={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    figures = {name for name in experiment.figures(3) if not name.startswith("guidance/")}
    written = {"checkpoints/last.pt", "checkpoints/previous.pt", "metrics.csv", "samples.npz"}
    assert files_below(tmp_path) == figures | written | {".lock"}
    losses = [row["validation_loss"] for row in read(tmp_path)["history"]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]


# Training


@pytest.mark.parametrize("native", [True, False], ids=["bfloat16", "float32"])
def test_muon_steps_as_torchs_own(module, monkeypatch, native):
    """Which computes in bfloat16 always; also when resumed. A convolution is the matrix of its
    output channels by the rest, in any layout; what has a short side as a matrix is AdamW's."""
    monkeypatch.setattr(module, "has_bfloat16", lambda device: native)
    torch.manual_seed(0)
    layers = nn.Linear(20, 30), nn.Conv2d(20, 24, 3), nn.Conv2d(32, 40, 1), nn.Linear(40, 24)
    layers += (nn.Linear(20, 30),)  # of the same shape as another: the two go together
    layers[1].to(memory_format=torch.channels_last)
    network = nn.ModuleList([*layers, nn.Linear(11, 40), nn.Conv2d(24, 4, 3)])
    matrices = [nn.Parameter(layer.weight.detach().clone().flatten(1)) for layer in layers]
    expected = torch.optim.Muon(matrices, 0.02, weight_decay=0.0)
    optimizers = module.build_optimizers(network, {"adamw": 0.001, "muon": 0.02})
    [group] = optimizers["muon"].param_groups
    assert [*map(id, group["params"])] == [id(layer.weight) for layer in layers]
    left = {*map(id, network.parameters())} - {*map(id, group["params"])}
    assert {*map(id, optimizers["adamw"].param_groups[0]["params"])} == left
    for _ in range(3):
        for layer, matrix in zip(layers, matrices):
            layer.weight.grad = torch.randn_like(layer.weight)
            matrix.grad = layer.weight.grad.clone().flatten(1)
        resumed = module.build_optimizers(network, {"adamw": 0.001, "muon": 0.02})
        module.load_state(resumed["muon"], optimizers["muon"].state_dict())
        optimizers = resumed
        optimizers["muon"].step()
        expected.step()
    for layer, matrix in zip(layers, matrices):
        close = {"rtol": 0, "atol": 0 if native else 1e-3}  # of steps of 0.02 and more
        torch.testing.assert_close(layer.weight.flatten(1), matrix, **close)
    assert [*module.build_optimizers(network, {"adamw": 0.001, "muon": 0.0})] == ["adamw"]


@pytest.fixture
def watched(module, monkeypatch):
    """The losses of all training steps, the learning rates and the batches behind them."""
    real, seen = module.train_step, []

    def train_step(stage, batch, rng):
        result = real(stage, batch, rng)
        [group] = stage.optimizers["adamw"].param_groups
        seen.append((result[1].item(), group["lr"], batch))
        return result

    monkeypatch.setattr(module, "train_step", train_step)
    return seen


LONG = {"train_images": 587, "batch_size": 2, "epochs": 1}  # 293 steps


@pytest.mark.parametrize(("epochs", "bad", "seen"), [(1, 150, 200), (2, 300, 400)])
def test_loss_that_is_not_finite_stops_the_run(
    module, monkeypatch, tiny_data_dir, tmp_path, epochs, bad, seen
):
    """It is looked for every hundred steps, so that none waits for the device; nothing is saved
    after it. Steps count from 0."""
    real, calls = module.train_step, []

    def poisoned_step(*args):
        calls.append(args)
        return real(*args) * (math.nan if len(calls) > bad else 1)

    monkeypatch.setattr(module, "train_step", poisoned_step)
    arguments = flags(module, tmp_path, tiny_data_dir, **LONG | {"epochs": epochs})
    line = refusal(module, arguments, status=1)
    assert len(calls) == seen
    last = tmp_path / "checkpoints" / "last.pt"
    assert f"diffusion is not finite at step {bad};" in line
    assert ("none is saved yet" if epochs == 1 else str(last)) in line
    assert last.exists() == (epochs == 2)
    assert epochs == 1 or steps(tmp_path) == {"diffusion": 293}


def test_losses_are_all_counted_and_the_learning_rate_is_a_function_of_the_step(
    module, watched, tiny_data_dir, tmp_path
):
    assert run(module, flags(module, tmp_path, tiny_data_dir, **LONG, learning_rate=0.5)) == 0
    [row] = read(tmp_path)["history"]
    assert len(watched) == row["step"] == 293
    assert math.isclose(row["train_loss"], sum(loss for loss, _, _ in watched) / 293)
    rates = [rate for _, rate, _ in watched]
    assert rates[:100] == pytest.approx([0.5 * (step + 1) / 100 for step in range(100)])
    assert rates[100:175] == [0.5] * 75
    falls = [a - b for a, b in zip(rates[176:], rates[177:])]
    assert falls == pytest.approx([falls[0]] * len(falls)) and falls[0] > 0
    assert 0 < rates[-1] < 0.01 * 0.5


def test_an_epoch_takes_each_image_once_in_an_order_of_its_own(
    module, watched, tiny_data_dir, tmp_path
):
    batches = {"train_images": 48, "batch_size": 16, "epochs": 2}
    assert run(module, flags(module, tmp_path, tiny_data_dir, **batches)) == 0
    config = module.Settings(data_dir=str(tiny_data_dir), train_images=48)
    data = module.load_fashion_mnist(config, CPU)
    orders = []
    for epoch in (watched[:3], watched[3:]):
        images, labels = (torch.cat([batch[i] for _, _, batch in epoch]) for i in (0, 1))
        same = (images[:, None] == data.train_images[None]).flatten(2).all(dim=2)
        order = same.int().argmax(dim=1)
        assert order.sort().values.tolist() == list(range(48))
        assert torch.equal(labels, data.train_labels[order])
        orders.append(order.tolist())
    assert orders[0] != orders[1]


def test_average_follows_the_network_and_is_what_is_validated(
    module, monkeypatch, tiny_data_dir, tmp_path
):
    real, weights = module.train_step, []

    def train_step(stage, batch, rng):
        result = real(stage, batch, rng)
        weights.append(stage.network.decode.bias.detach().clone())
        return result

    monkeypatch.setattr(module, "train_step", train_step)
    assert run(module, [*flags(module, tmp_path, tiny_data_dir), "--ema-decay=0.1"]) == 0
    average = weights[0]
    for step, each in enumerate(weights[1:], 1):
        average = torch.lerp(average, each, max(0.9, 10 / (10 + step)))
    models = module.load_trained(tmp_path, device="cpu")
    torch.testing.assert_close(models.diffusion.decode.bias, average)
    data = module.load_fashion_mnist(module.Settings(data_dir=str(tiny_data_dir)), CPU)
    held_out = data.validation_images, data.validation_labels
    [loss] = module.validation_losses(module.loss, models.diffusion, held_out).values()
    assert models.history[-1]["validation_loss"] == pytest.approx(loss)


def test_average_forgets_its_beginnings_and_lags_as_far_as_the_decay_says(module):
    """Of weights that grow by 1 a step. Until the decay counts, the n-th of them has the weight
    (n + 9) over 9 of Pascal's triangle, whose sums are known: the mean is 10 n / 11."""
    network = nn.Linear(1, 1).requires_grad_(False)
    average = AveragedModel(network)
    plan = {"epochs": 1, "batch_size": 1, "rates": {"adamw": 0.1, "muon": 0.0}, "ema_decay": 0.9}
    stage = module.Stage("diffusion", network, average, None, 400, **plan)
    for step in range(400):
        network.weight.fill_(step)
        stage.step = step
        stage.update_average()
        if step <= 90:
            assert average.module.weight.item() == pytest.approx(10 * step / 11, rel=1e-5)
    assert average.module.weight.item() == pytest.approx(399 - 9, rel=1e-5)


def test_validation_loss_is_that_of_the_whole_set_with_the_same_noise(module):
    network = module.initial_networks(module.Settings(rank=16), CPU)["diffusion"]
    arrays = torch.randint(0, 256, (1100, 1, 28, 28), dtype=torch.uint8), torch.arange(1100) % 10
    losses = [module.validation_losses(module.loss, network, arrays) for _ in range(2)]
    assert losses[0] == losses[1]

    def brightness(network, images, labels, rng):
        return images.mean() + rng.rand(len(images)).mean() * 0

    expected = (arrays[0].double() / 127.5 - 1).mean().item()
    [mean] = module.validation_losses(brightness, network, arrays).values()
    assert mean == pytest.approx(expected, abs=1e-6)


def test_where_epochs_are_short_saves_and_samples_go_by_the_clock(
    module, undisturbed, monkeypatch, tiny_data_dir, tmp_path
):
    """As on a GPU: nothing at the ends of epochs, but all that a signal or the end asks for."""
    real, events = module.save_checkpoint, []
    monkeypatch.setattr(module, "is_fast", lambda device: True)
    monkeypatch.setattr(module, "save_checkpoint", lambda *args: events.append(real(*args)))
    monkeypatch.setattr(module, "save_samples", lambda *args: events.append("drawn"))
    arguments = flags(module, tmp_path, tiny_data_dir)
    assert run(module, arguments) == 0
    assert events == [None] and steps(tmp_path) == {"diffusion": 9}
    assert differences(read(undisturbed), read(tmp_path)) == []
    for at in (4, 6):  # in the midst of an epoch, and at the end of one
        output = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at_step(patch, module, at)
            assert run(module, flags(module, output, tiny_data_dir)) == 130
        assert steps(output) == {"diffusion": at}


def test_samples_that_a_fast_device_draws_now_and_then_do_not_hide_a_signal(
    module, monkeypatch, tiny_data_dir, tmp_path
):
    """It comes while they are drawn, and is heeded after one step more."""
    clock = itertools.count(0, 25)  # seconds: at each look so many more are gone
    monkeypatch.setattr(module, "is_fast", lambda device: True)
    slow_motion = types.SimpleNamespace(**vars(time))
    slow_motion.monotonic = lambda: next(clock)
    monkeypatch.setattr(module, "time", slow_motion)
    drawn = []

    def draw(run, epoch):
        drawn.append(epoch)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module.Run, "draw", draw)
    assert run(module, flags(module, tmp_path, tiny_data_dir)) == 128 + signal.SIGTERM
    assert steps(tmp_path) == {"diffusion": 3 * drawn[0] + 1}


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_losses_train_the_same_network(module, undisturbed, tiny_data_dir, tmp_path):
    """And a checkpoint tells nothing of it."""
    assert run(module, [*flags(module, tmp_path, tiny_data_dir), "--compile"]) == 0
    one, two = (read(folder)["stages"]["diffusion"] for folder in (undisturbed, tmp_path))
    assert list(one["model"]) == list(two["model"])
    for name, value in one["ema"].items():
        torch.testing.assert_close(two["ema"][name], value, rtol=0, atol=1e-4)
    assert steps(tmp_path) == {"diffusion": 9}


# Sampling


def test_fresh_noise_reaches_the_sampler_and_trajectories_do_without(module, undisturbed):
    models = module.load_trained(undisturbed, device="cpu")
    labels = module.labels_in_turn(4, CPU)
    fresh, first = (
        module.generate_samples(models.with_settings(noise=name), labels)
        for name in ("fresh", "first")
    )
    assert (fresh != first).flatten(1).any(dim=1).all()
    assert torch.equal(fresh, module.generate_samples(models, labels))
    noise, classes = module.noise_of_samples(models, range(4))(), module.class_weights(labels)
    states, _ = module.trajectory(models, noise, classes)
    assert torch.equal(module.decode_images(models, states[-1]), first)


def test_loading_trained_networks_makes_no_optimizer(experiment, undisturbed, monkeypatch):
    module = load_script(experiment.path)
    monkeypatch.setattr(module, "build_optimizers", lambda *args: pytest.fail("an optimizer"))
    models = module.load_trained(undisturbed, device="cpu", sampling_seed=3)
    assert models.config.sampling_seed == 3
    assert not models.diffusion.training
    with pytest.raises(module.ExperimentError, match="rank is 16 there"):
        module.load_trained(undisturbed, device="cpu", rank=8)


# Settings


def test_a_plan_is_made_of_the_settings_that_bear_the_stages_name(module):
    settings = {"epochs": 7, "batch_size": 2, "guide_epochs": 3, "guide_muon_learning_rate": 0.1}
    config = types.SimpleNamespace(**settings)
    assert module.plan(config) == {"epochs": 7, "batch_size": 2}
    assert module.plan(config, "guide") == {"epochs": 3, "muon_learning_rate": 0.1}


def test_a_setting_is_the_flag_or_the_checkpoints_or_the_default(module):
    defaults = module.default_settings(CPU)
    stored = {name: defaults[name] for name in module.settings_with("match", "keep")}
    checkpoint = {"config": stored | {"epochs": 7, "rank": 24, "noise": "first"}}
    settled = module.settle(defaults, {"noise": "fresh", "rank": 24}, checkpoint)
    assert (settled.epochs, settled.rank, settled.noise) == (7, 24, "fresh")
    assert module.settle(defaults, {}, None) == module.Settings(**defaults)
    local = {"output_dir", "data_dir", "device", "compile", "sampling_seed"}
    local |= {"fresh", "quick", "sample_only", "export_samples"}
    to_sample = {"run_dir", "pretrained", "class_", "num_samples"}
    assert (module.settings_with("local"), module.settings_with("sample")) == (local, to_sample)
    assert local | to_sample == defaults.keys() - stored.keys()
    with pytest.raises(module.ExperimentError) as raised:
        module.settle(defaults, {"rank": 8, "seed": 5, "epochs": 9}, checkpoint)
    assert "rank is 24 there and 8 here" in str(raised.value)
    assert "seed is 0 there and 5 here" in str(raised.value) and "epochs" not in str(raised.value)
