"""Tiny runs of a script for the tests of resuming, of checkpoints and of the command line."""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import time

import torch

from conftest import SCRIPT_V3, load_script

WALL_CLOCK = ("seconds", "images_per_second")
SAVERS = ("save_all_figures", "save_samples", "save_unconditional_samples", "save_reconstructions")  # of a training


def load_without_figures(path=SCRIPT_V3):
    """A script as a module of its own whose training draws nothing."""
    module = load_script(path)
    for name in SAVERS:
        if hasattr(module, name):
            setattr(module, name, lambda *args: None)
    return module


def tiny_settings(config_class):
    """Beside a script's own --quick: 2 epochs of 3 steps for an autoencoder, 3 of 3 for the diffusion."""
    values = {"train_images": 48}
    for field in dataclasses.fields(config_class):
        if field.name.endswith("batch_size"):
            values[field.name] = 16
        if field.name.endswith("epochs"):
            values[field.name] = 3 if field.name == "epochs" else 2
        if field.name.endswith("width"):
            values[field.name] = field.metadata["low"]
    return values


def flags(module, output, data, **changed):
    """The command line of a tiny run; `changed` holds the flags that differ, None for one that is not given."""
    values = {"output_dir": output, "data_dir": data, "device": "cpu"} | tiny_settings(module.Config) | changed
    given = {name.replace("_", "-"): value for name, value in values.items() if value is not None}
    return ["--quick"] + [f"--{name}={value}" for name, value in given.items()]


def run(module, arguments):
    """Run the script in this process as its command line does; returns the exit status."""
    try:
        return module.exit_status(lambda: module.main([str(argument) for argument in arguments]))
    except SystemExit as error:  # the parser's
        return error.code


class RealRun:
    """A run of v3 without figures in a process of its own, which can be killed.

    It is forked from a server that has imported the packages, which saves seconds a process. `prepare(module)`, a
    function at the top level of a test file, may change the script first.
    """

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "matplotlib.figure", "sklearn.decomposition", "sklearn.manifold", "torchvision"]
    )

    def __init__(self, folder, arguments, prepare=None):
        self.out, self.err = folder / "stdout.txt", folder / "stderr.txt"
        self.out.write_text("")
        target = (self.out, self.err, arguments, prepare, torch.get_num_threads())
        self.process = self.context.Process(target=self.main, args=target, daemon=True)
        self.process.start()

    @staticmethod
    def main(out, err, arguments, prepare, threads):
        for path, stream in ((out, sys.stdout), (err, sys.stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
        torch.set_num_threads(threads)  # the same bits as in the tests' own process
        module = load_without_figures()
        if prepare:
            prepare(module)
        sys.exit(run(module, arguments))

    def wait_for(self, text):
        """Wait until the run has printed `text`."""
        deadline = time.monotonic() + 120
        while text not in self.out.read_text():
            assert self.process.is_alive(), f"ended without {text!r}: {self.err.read_text()}"
            assert time.monotonic() < deadline, f"no {text!r} in {self.out.read_text()}"
            time.sleep(0.005)

    def signal(self, number):
        os.kill(self.process.pid, number)

    def end(self):
        """Wait for the end; returns the exit status (of a killed process -n) and the text on stderr."""
        self.process.join(60)
        return self.process.exitcode, self.err.read_text()


def act_at_step(monkeypatch, module, step, action):
    """Call `action` just before the training step number `step`, counted from 1 and from now on."""
    train_step, numbers = module.train_step, itertools.count(1)

    def counted_step(*args):
        if next(numbers) == step:
            action()
        return train_step(*args)

    monkeypatch.setattr(module, "train_step", counted_step)


def interrupt_at_step(monkeypatch, module, step):
    """Ctrl-C in the midst of the training step number `step`, counted from 1 and from now on."""
    act_at_step(monkeypatch, module, step, lambda: signal.raise_signal(signal.SIGINT))


def read(output, name="last.pt"):
    """The content of a checkpoint."""
    return torch.load(output / "checkpoints" / name, weights_only=True)


def steps(output, name="last.pt"):
    """The steps that each stage has done, by a checkpoint."""
    return {stage: state["step"] for stage, state in read(output, name)["stages"].items()}


def differences(a, b, place="checkpoint"):
    """Where two checkpoints differ, to the bit, wall-clock figures and configuration aside."""
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return [f"{place}: keys {list(a)} and {list(b)}"]
        keys = [key for key in a if key not in (*WALL_CLOCK, "config")]
        return [line for key in keys for line in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{place}: {len(a)} and {len(b)} entries"]
        pairs = enumerate(zip(a, b))
        return [line for index, (x, y) in pairs for line in differences(x, y, f"{place}.{index}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [f"{place}: tensors"]
    return [] if type(a) is type(b) and repr(a) == repr(b) else [f"{place}: {a!r} and {b!r}"]
