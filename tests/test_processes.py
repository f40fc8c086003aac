"""Several processes: `torchrun` on one machine, with gloo."""

import functools
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import load_script
from script_runs import each_of, flags, on_v3, read, steps

on_cnn = each_of("CNN")
# In float32: in bfloat16 a batch cut in two is rounded otherwise. Figures are left out.
LAUNCHER = """
import sys, time, torch
torch.cpu.get_capabilities = dict
torch.set_num_threads(1)
sys.path.insert(0, TESTS)
from script_runs import load_without_figures
script = load_without_figures(sys.argv[1])
PREPARE
sys.exit(script.exit_status(lambda: script.main(sys.argv[2:])))
"""
# So that a signal comes in the midst of training.
SLOWLY = """
real_step = script.train_step
def slow_step(*args):
    time.sleep(0.1)
    return real_step(*args)
script.train_step = slow_step
real_save = script.save_checkpoint
def slow_save(content, folder):
    time.sleep("diffusion" in content["stages"])
    return real_save(content, folder)
script.save_checkpoint = slow_save
"""
POISON = """
real_step = script.train_step
def poisoned_step(stage, batch, rng):
    if script.rank() == 1 and stage.step == 5:
        batch[0] = script.to_float(batch[0]) * float("nan")
    return real_step(stage, batch, rng)
script.train_step = poisoned_step
"""


class Launched:
    """A run of a script by torchrun, in so many processes."""

    def __init__(self, folder, experiment, arguments, count, prepare=""):
        launcher = folder / f"launcher_{time.time_ns()}.py"
        tests = repr(os.path.dirname(__file__))
        launcher.write_text(LAUNCHER.replace("PREPARE", prepare).replace("TESTS", tests))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = [sys.executable, *(torchrun if count else []), launcher, experiment.path]
        self.out = open(folder / "stdout.txt", "w+")  # noqa: SIM115
        self.err = open(folder / "stderr.txt", "w+")  # noqa: SIM115
        streams = {"stdin": subprocess.DEVNULL, "stdout": self.out, "stderr": self.err}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command += arguments
        self.process = subprocess.Popen([*map(str, command)], **streams, env=environment)

    def wait_for(self, text, seconds=120):
        deadline = time.monotonic() + seconds
        while text not in self.text(self.out):
            assert self.process.poll() is None, self.text(self.err)
            assert time.monotonic() < deadline, self.text(self.out)
            time.sleep(0.02)

    def workers(self):
        """The processes' numbers."""
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        with open(children) as file:
            return [int(number) for number in file.read().split()]

    def end(self, seconds=120):
        status = self.process.wait(seconds)
        return status, self.text(self.out), self.text(self.err)

    @staticmethod
    def text(file):
        file.flush()
        with open(file.name) as copy:
            return copy.read()


def launch(folder, experiment, arguments, count, prepare=""):
    """Runs to the end, which must be a good one; returns what was printed."""
    status, out, err = Launched(folder, experiment, arguments, count, prepare).end()
    assert status == 0, out + err
    return out


def weights(output):
    """All averaged weights of a run, as one vector."""
    stages = read(output)["stages"].values()
    parts = [value.flatten().double() for stage in stages for value in stage["ema"].values()]
    return torch.cat(parts)


def test_a_process_draws_the_numbers_of_the_whole_batch_and_keeps_its_rows(script_v3):
    cpu = torch.device("cpu")
    whole = script_v3.Rng(7, cpu)
    parts = [script_v3.Rng(7, cpu, rank=rank, world=3) for rank in range(3)]
    for draw in ("randn", "rand"):
        expected = getattr(whole, draw)(6, 2)
        assert torch.equal(expected, torch.cat([getattr(part, draw)(2, 2) for part in parts]))
    expected = whole.randint(1, 100, 6)
    assert torch.equal(expected, torch.cat([part.randint(1, 100, 2) for part in parts]))


@each_of("CNN", "v3")
def test_two_processes_train_the_model_that_one_would(experiment, tiny_data_dir, tmp_path):
    script, outputs = load_script(experiment.path), [tmp_path / "one", tmp_path / "two"]
    for count, output in enumerate(outputs):
        extras = {"student_epochs": 1} if experiment.name.endswith("v3") else {}
        arguments = [*flags(script, output, tiny_data_dir, **extras), "--export-samples=5"]
        out = launch(tmp_path, experiment, arguments, 2 * count)
        assert out.count("diffusion: epoch 3 of 3") == 1  # process 0 alone prints
        assert (", 2 processes" in out) == bool(count)
    one, two = map(weights, outputs)
    config = script.Settings(**read(outputs[0])["config"])
    begun = script.Run(config, script.Data(*[torch.zeros(1)] * 4), tmp_path, None)
    states = [average.state_dict() for average in begun.averages.values()]
    start = torch.cat([v.flatten().double() for state in states for v in state.values()])
    assert (one - start).norm() > 0.1  # it has learnt something
    assert (one - two).norm() < 0.01 * (one - start).norm()
    for a, b in zip(*(read(output)["history"] for output in outputs), strict=True):
        for name in ("train_loss", "validation_loss"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)
    files = [np.load(output / "samples.npz") for output in outputs]
    assert np.array_equal(files[0]["arr_1"], files[1]["arr_1"])
    difference = files[0]["arr_0"].astype(int) - files[1]["arr_0"]
    assert np.abs(difference).mean() < 1


@pytest.fixture(scope="module")
def undisturbed_by(tiny_data_dir, tmp_path_factory):
    """A function: the averaged weights that so many processes end with, uninterrupted."""

    @functools.cache
    def train(experiment, count):
        folder = tmp_path_factory.mktemp("undisturbed")
        script = load_script(experiment.path)
        launch(folder, experiment, flags(script, folder / "output", tiny_data_dir, epochs=6), count)
        return weights(folder / "output")

    return train


@on_v3
@pytest.mark.parametrize(
    ("counts", "all_get_it"), [((2, 0), False), ((0, 2), False), ((2, 2), True)]
)
def test_a_stopped_run_goes_on_with_another_number_of_processes(
    experiment, undisturbed_by, tiny_data_dir, tmp_path, counts, all_get_it
):
    output = tmp_path / "output"
    arguments = flags(load_script(experiment.path), output, tiny_data_dir, epochs=6)
    run = Launched(tmp_path, experiment, arguments, counts[0], SLOWLY)
    run.wait_for("diffusion: epoch 1 of 6")
    # a signal to one process ends all; and torchrun passes on what its processes have got already
    everyone = [run.process.pid, *(run.workers() if counts[0] else [])]
    for number in everyone[::-1] if all_get_it else everyone[-1:]:
        os.kill(number, signal.SIGTERM)
    status, out, err = run.end()
    assert status != 0, out + err
    assert re.search(r"SIGTERM at diffusion, step \d+ of 18: saved", err)
    assert 3 <= steps(output)["diffusion"] < 18
    launch(tmp_path, experiment, arguments, counts[1])
    one, two = undisturbed_by(experiment, counts[1]), weights(output)
    if counts == (2, 2):
        assert torch.equal(one, two)
    assert (one - two).norm() < 0.01 * one.norm()


@on_cnn
def test_a_process_that_is_killed_ends_the_others_and_its_work_is_saved(
    experiment, tiny_data_dir, tmp_path
):
    script = load_script(experiment.path)
    arguments = flags(script, tmp_path / "output", tiny_data_dir, epochs=100)
    run = Launched(tmp_path, experiment, arguments, 2, SLOWLY)
    run.wait_for("diffusion: epoch 2 of 100")
    started = time.monotonic()
    os.kill(run.workers()[-1], signal.SIGKILL)
    status, _, err = run.end()
    assert status != 0 and time.monotonic() - started < 30
    # torchrun ends the other one, too, and may be the first to
    assert "another process has ended" in err or "Signal 15 (SIGTERM) received" in err
    assert steps(tmp_path / "output")["diffusion"] >= 6


@on_cnn
def test_a_loss_that_is_not_finite_in_one_process_stops_all(experiment, tiny_data_dir, tmp_path):
    script = load_script(experiment.path)
    arguments = flags(script, tmp_path / "output", tiny_data_dir)
    status, _, err = Launched(tmp_path, experiment, arguments, 2, POISON).end()
    assert status != 0
    assert err.count("error: loss or gradient of guide is not finite at step 5") == 1
    assert "another process has ended" not in err
    assert steps(tmp_path / "output") == {"guide": 3}


@on_cnn
def test_a_batch_that_cannot_be_shared_is_one_clear_line(experiment, tiny_data_dir, tmp_path):
    script = load_script(experiment.path)
    arguments = flags(script, tmp_path / "output", tiny_data_dir, batch_size=15)
    status, _, err = Launched(tmp_path, experiment, arguments, 2).end()
    assert status != 0
    assert err.count("error: 2 processes cannot share batches of 15 images") == 1
