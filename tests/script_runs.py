"""The scripts, and tiny runs of them, for the tests of all that a run does."""

import builtins
import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from sync_shared import REPOSITORY, find_scripts, load_script, version_of

SCRIPT_V3 = REPOSITORY / "LatentDiffusionModel" / "v3" / "script_model_train_test.py"
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker"]
CLASSES += ["Bag", "Ankle boot"]
STEPS = {"autoencoder": 6, "guide": 6, "diffusion": 9, "decoder": 6}  # of the stages of a tiny run
OWN_FIGURES = {  # that neither the family nor conditions imply
    "ImageDiffusionModel/CNN": ["samplers"],
    "ImageDiffusionModel/UNet": ["nearest_neighbours"],
    "LatentDiffusionModel/v1": ["prior"],
    "LatentDiffusionModel/v3": ["nearest_neighbours"],
}
WALL_CLOCK = ("seconds", "images_per_second")
SAVERS = ["save_all_figures", "save_samples", "save_reconstructions", "save_loss_curves"]
SAVERS += ["save_page", "save_few_steps"]  # called in training


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A script, and what its family and its name promise."""

    path: Path

    @property
    def name(self):
        return version_of(self.path)

    @property
    def conditional(self):
        return "\nCONDITIONAL = True\n" in self.path.read_text(encoding="utf-8")

    @property
    def latent(self):
        return self.name.startswith("Latent")

    @property
    def stages(self):
        found = re.findall(r'run\.train\(\s*"(\w+)"', self.path.read_text(encoding="utf-8"))
        return [stage for stage in found if stage != "student"]  # an extra, not trained by default

    def figures(self, epoch, images_epoch=0):
        """Paths of all figures of a run that has ended after so many epochs of its last stage, and
        of the last one that draws reconstructions."""
        subjects = CLASSES if self.conditional else [f"sample {number}" for number in range(10)]
        subjects = [re.sub("[/ ]", "-", subject) for subject in subjects]
        paths = [f"diffusion_animation/diffusion_animation_class_{name}" for name in subjects]
        paths = [f"{path}_epoch_{epoch}.gif" for path in paths]
        own = [f"denoise_with_diffusion_path/denoising_path_{name}" for name in subjects]
        own += [f"{name}/{name}" for name in OWN_FIGURES.get(self.name, [])]
        own += ["guidance/guidance"] if self.conditional else []
        if self.latent:
            own += ["latent_space/latent_space", "interpolation/noises"]
            own += ["interpolation/classes"] if self.conditional else []
            done = range(1, images_epoch + 1)
            paths += [f"reconstruction/reconstruction_epoch_{number}.png" for number in done]
            paths += ["reconstruction/reconstruction.png"]
        paths += [f"{path}_epoch_{epoch}.png" for path in own] + ["loss_curves.png"]
        paths += [f"samples/samples_epoch_{number}.png" for number in range(1, epoch + 1)]
        paths += [f"denoise_with_diffusion_path/paths_epoch_{epoch}.json", "index.html"]
        return set(paths)


EXPERIMENTS = [Experiment(path) for path in find_scripts()]


def each_of(*versions):
    """A mark that runs a test once for each of the versions, such as "v3", as its argument
    `experiment`."""
    how = {"ids": lambda each: each.name, "scope": "module"}
    chosen = [each for each in EXPERIMENTS if each.path.parent.name in versions]
    return pytest.mark.parametrize("experiment", chosen, **how)


every_script = each_of(*(each.path.parent.name for each in EXPERIMENTS))
on_v3 = each_of("v3")  # the harness, which all share to the byte, is tested once


def load_version(version):
    """The script of a version, such as "v3", as a module."""
    [path] = [each.path for each in EXPERIMENTS if each.path.parent.name == version]
    return load_script(path)


def load_without_figures(path=SCRIPT_V3):
    """A script as a module of its own whose training draws nothing."""
    module = load_script(path)
    for name in SAVERS:
        if hasattr(module, name):
            setattr(module, name, lambda *args: None)
    return module


def tiny_settings(config_class):
    """What a tiny run has beside a script's own --quick: 3 epochs of 3 steps for the diffusion, 2
    of 3 for each other stage."""
    values = {"train_images": 48}
    for field in dataclasses.fields(config_class):
        if field.name.endswith("batch_size"):
            values[field.name] = 16
        if field.name.endswith("epochs") and field.default:  # a stage that is not an extra
            values[field.name] = 3 if field.name == "epochs" else 2
        if field.name.endswith("width"):
            values[field.name] = field.metadata["low"]
    return values


def flags(module, output, data, **changed):
    """The command line of a tiny run; `changed` holds the flags that differ, None for one that is
    not given."""
    values = {"output_dir": output, "data_dir": data, "device": "cpu"}
    values |= tiny_settings(module.Settings) | changed
    given = {name.replace("_", "-"): value for name, value in values.items() if value is not None}
    return ["--quick"] + [f"--{name}={value}" for name, value in given.items()]


def run(module, arguments):
    """Run the script in this process as its command line does; returns the exit status."""
    try:
        return module.exit_status(lambda: module.main([str(argument) for argument in arguments]))
    except SystemExit as error:  # the parser's
        return error.code


def answer(module, arguments):
    """`run`, without output; returns the exit status and the text on stderr."""
    how = {"encoding": "utf-8", "errors": "backslashreplace", "write_through": True}
    streams = [io.TextIOWrapper(io.BytesIO(), **how) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        status = run(module, arguments)
    return status, streams[1].buffer.getvalue().decode()


def refusal(module, arguments, status=2):
    """Run the script, which must end with `status` and one line of error; returns the line."""
    code, error = answer(module, arguments)
    assert code == status, error
    assert len(error.splitlines()) == 1, error
    assert error.startswith("error: ")
    return error


class RealRun:
    """A run of a script without figures in a process of its own, which can be killed.

    It is forked from a server that has imported the packages, which saves seconds a process.
    `prepare(module)`, a function of this file or a partial of one, may change the script first.
    """

    context = multiprocessing.get_context("forkserver")
    packages = ("torch._dynamo", "matplotlib.figure", "sklearn.decomposition", "sklearn.manifold")
    context.set_forkserver_preload([*packages, "torchvision"])

    def __init__(self, path, folder, arguments, prepare=None):
        self.out, self.err = folder / "stdout.txt", folder / "stderr.txt"
        self.out.write_text("")
        target = (path, self.out, self.err, arguments, prepare, torch.get_num_threads())
        self.process = self.context.Process(target=self.main, args=target, daemon=True)
        self.process.start()

    @staticmethod
    def main(path, out, err, arguments, prepare, threads):
        for target, stream in ((out, sys.stdout), (err, sys.stderr)):
            os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
        torch.set_num_threads(threads)  # the same bits as in the tests' own process
        module = load_without_figures(path)
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
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.process.pid, number)

    def end(self):
        """Wait for the end; returns the exit status (of a killed process -n) and the errors."""
        self.process.join(60)
        return self.process.exitcode, self.err.read_text()


def wait_in_step(module, step, signals):
    """Let the training step number `step`, counted from 1, print "busy" and end when so many
    signals have come."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)

    def wait():
        print("busy")
        for _ in range(signals):
            os.read(read_end, 1)

    act_at_step(pytest.MonkeyPatch(), module, step, wait)


def kill_at_operation(module, number):
    """Let the process die, as by SIGKILL, at its file operation number `number`, as
    `act_at_operation` counts."""
    die = partial(os.kill, os.getpid(), signal.SIGKILL)
    act_at_operation(pytest.MonkeyPatch(), module, number, die)


def act_at_operation(monkeypatch, module, number, action):
    """Call `action` at the script's file operation number `number`, from 0; returns the list of
    those that were begun.

    What counts is every write (half of it done), fsync, and os.replace (before it and after it).
    """
    operations, real_fsync, real_replace = [], os.fsync, os.replace

    def count(name):
        operations.append(name)
        if len(operations) == number + 1:
            action()

    class File(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            count(f"write {self.name}")
            return super().write(content[len(content) // 2 :])

    def fsync(file):
        count("fsync")
        real_fsync(file)

    def replace(source, target):
        count(f"before replace {target}")
        real_replace(source, target)
        count(f"after replace {target}")

    def open_counted(path, mode="r", **options):
        return File(path, mode) if mode == "wb" else builtins.open(path, mode, **options)

    monkeypatch.setattr(module, "open", open_counted, raising=False)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return operations


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


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_ends_as(undisturbed, output, module, arguments):
    """Run the script on `output`: it must end with the bits and files of the undisturbed run."""
    status, error = answer(module, arguments)
    assert (status, error) == (0, ""), error
    assert differences(read(undisturbed), read(output)) == []
    assert files_below(output) == files_below(undisturbed)


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
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [f"{place}: tensors"]
    return [] if type(a) is type(b) and repr(a) == repr(b) else [f"{place}: {a!r} and {b!r}"]


@contextlib.contextmanager
def as_nobody():
    """Without the rights of root, whom no permission stops."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
