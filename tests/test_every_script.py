"""Every script, whichever its model, does for its user what all of them promise: alone in a folder it runs from the
data to the figures, and however often it is interrupted, it ends with the same bits.

What the scripts share is tested in detail once, on LatentDiffusionModel/v3.
"""

import csv
import dataclasses
import fnmatch
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest

from conftest import load_script, run_script
from networks import perturb
from script_runs import (
    CLASSES,
    differences,
    every_script,
    files_below,
    flags,
    interrupt_at_step,
    read,
    refusal,
    run,
    steps,
)

COLUMNS = ["stage", "epoch", "step", "train_loss", "validation_loss", "learning_rate", "seconds", "images_per_second"]
EXPORTED = 24

pytestmark = every_script


# Alone in a folder


@pytest.fixture(scope="module")
def alone(experiment, tiny_data_dir, tmp_path_factory):
    """The script alone in a folder with an unusual name, run once with --quick as its users do."""
    root = tmp_path_factory.mktemp("alone")
    script = root / "größer als – 小さい" / "my experiment.py"
    for folder in (script.parent, root / "cwd", root / "tmp"):
        folder.mkdir()
    shutil.copy(experiment.path, script)
    environment = {"MPLBACKEND": "TkAgg", "DISPLAY": "nowhere:7", "TMPDIR": str(root / "tmp")}
    arguments = ["--quick", "--data-dir", tiny_data_dir, "--device", "cpu", "--export-samples", EXPORTED]
    data_before = files_below(tiny_data_dir)
    done = run_script(script, *arguments, cwd=root / "cwd", env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert files_below(tiny_data_dir) == data_before
    output = script.parent / "output" / "quick"
    return SimpleNamespace(root=root, script=script, done=done, output=output, files=files_below(output))


@pytest.fixture(scope="module")
def history(alone):
    """The rows of metrics.csv."""
    with open(alone.output / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_script_alone_writes_into_its_output_folder_only(alone):
    assert files_below(alone.root) == {
        path.relative_to(alone.root).as_posix()
        for path in [alone.script, *(alone.output / name for name in alone.files)]
    }


def test_script_alone_writes_what_is_promised(experiment, alone, history):
    expected, folders = experiment.figures(sum(row["stage"] == "diffusion" for row in history))
    expected |= {"metrics.csv", "checkpoints/last.pt", "checkpoints/previous.pt", "samples.npz", ".lock"}
    assert expected - alone.files == set()
    others = alone.files - expected
    assert {Path(name).parent.as_posix() for name in others} == folders
    assert {Path(name).suffix for name in others} <= {".png"}


def test_fresh_moves_everything_aside_that_a_run_writes(alone):
    module = load_script(alone.script)
    module.move_aside(shutil.copytree(alone.output, alone.root / "moved"), module.OUTPUTS)
    left = {path for path in files_below(alone.root / "moved") if not path.startswith("old_runs/")}
    assert left == {".lock"}


def test_output_without_a_terminal_is_plain_lines(experiment, alone, history):
    assert alone.done.stderr == ""
    assert "\r" not in alone.done.stdout and "\x1b" not in alone.done.stdout
    first = alone.done.stdout.splitlines()[0]
    for part in (experiment.name, "cpu", torch.__version__, "fresh", str(alone.output)):
        assert part in first
    for stage in experiment.stages:
        epochs = sum(row["stage"] == stage for row in history)
        assert f"{stage}: epoch {epochs} of {epochs}, loss" in alone.done.stdout
        assert re.search(rf"^{stage}: [\d.]+ M parameters, step 0 of \d+$", alone.done.stdout, re.MULTILINE)
    for part in ("images/s", "to do: training, about", "figures of epoch"):
        assert part in alone.done.stdout


def test_metrics_have_a_row_an_epoch(experiment, history):
    assert list(history[0]) == COLUMNS
    assert list(dict.fromkeys(row["stage"] for row in history)) == experiment.stages
    for stage in experiment.stages:
        rows = [row for row in history if row["stage"] == stage]
        assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
        assert len({int(row["step"]) / int(row["epoch"]) for row in rows}) == 1
    assert np.isfinite([float(row[name]) for row in history for name in COLUMNS[3:]]).all()


def test_pictures_are_not_trivial(alone):
    paths = [alone.output / name for name in sorted(alone.files) if name.endswith(".png")]
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 200, path
        assert pixels.std() > 10, path
        assert len(np.unique(pixels)) > 50, path
    different = [path for path in paths if path.parent.name != "reconstruction"]  # an epoch may be both first and last
    assert len({path.read_bytes() for path in different}) == len(different)


def test_animations_loop_for_ever(module, alone):
    for path in (alone.output / "diffusion_animation").iterdir():
        with Image.open(path) as gif:
            assert gif.info["loop"] == 0
            assert gif.n_frames == 2 * module.PATH_STEPS
            first = np.asarray(gif.convert("L"))
            gif.seek(module.PATH_STEPS)
            last = np.asarray(gif.convert("L"))
        picture = slice(len(first) - first.shape[1], None)  # below the caption
        assert (first[: picture.start] != last[: picture.start]).any(), path
        assert (first[picture] != last[picture]).any(), path


def exported(path):
    with np.load(path) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def test_exported_samples(experiment, alone):
    images, labels = exported(alone.output / "samples.npz")
    assert (images.dtype, images.shape) == (np.uint8, (EXPORTED, 28, 28, 1))
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % 10 if experiment.conditional else -1 for i in range(EXPORTED)]
    assert len(np.unique(images.reshape(EXPORTED, -1), axis=0)) == EXPORTED


# The same run, seen again


@pytest.fixture
def again(alone, tiny_data_dir, tmp_path, monkeypatch):
    """A copy of the finished run, and a function that runs its script in this process, where it must not train."""
    module = load_script(alone.script)
    monkeypatch.setattr(module, "train_step", lambda *args: pytest.fail("a step was trained"))
    output = shutil.copytree(alone.output, tmp_path / "output")

    def start(*arguments):
        return run(module, [f"--output-dir={output}", f"--data-dir={tiny_data_dir}", "--device=cpu", *arguments])

    return SimpleNamespace(module=module, output=output, start=start)


@pytest.mark.parametrize("asked", [["--quick"], ["--sample-only", "--epochs=9"]], ids=" ".join)
def test_finished_run_trains_nothing_and_draws_again(again, monkeypatch, history, asked):
    drawn, checkpoint = [], (again.output / "checkpoints" / "last.pt").read_bytes()
    monkeypatch.setattr(again.module, "save_all_figures", lambda *args: drawn.append(args))
    assert again.start(*asked) == 0
    [(models, data, output)] = drawn
    assert models.epoch == sum(row["stage"] == "diffusion" for row in history)
    assert len(data.validation_images) == 53  # a twelfth
    assert output == again.output
    assert (again.output / "checkpoints" / "last.pt").read_bytes() == checkpoint


def test_samples_of_a_loaded_model_are_those_of_the_run_that_trained_it(again):
    first = exported(again.output / "samples.npz")
    (again.output / "samples.npz").unlink()
    assert again.start("--sample-only", f"--export-samples={EXPORTED}") == 0
    for before, after in zip(first, exported(again.output / "samples.npz")):
        np.testing.assert_array_equal(before, after)
    assert again.start("--sample-only", f"--export-samples={EXPORTED}", "--sampling-seed=3") == 0
    images, labels = exported(again.output / "samples_seed_3.npz")
    assert (images != first[0]).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(labels, first[1])


def test_samples_asked_for_are_one_picture(experiment, again, capsys):
    asked = ["--num-samples=5", *(["--class=ankle-boot"] if experiment.conditional else [])]
    before = files_below(again.output)
    assert again.start("--sample-only", *asked) == 0
    [name] = files_below(again.output) - before
    assert fnmatch.fnmatch(name, "samples/samples_Ankle-boot.png" if experiment.conditional else "samples/samples*.png")
    assert str(again.output / name) in capsys.readouterr().out
    picture = Image.open(again.output / name)
    assert picture.width > 200 and picture.height > 60
    assert len(picture.convert("L").getcolors()) > 10  # not blank


# What the animations and the paths are drawn from


@pytest.fixture(scope="module")
def trajectories(experiment, undisturbed, tiny_data_dir, tmp_path_factory):
    """The arguments of `save_trajectories` in two sets of figures of a model that has learnt nothing but does much."""
    module, drawn, calls = load_script(experiment.path), [], []
    models = module.load_trained(undisturbed, device="cpu")
    perturb(models.denoiser)
    data = module.load_fashion_mnist(tiny_data_dir, 55_000, models.device)
    for name in [name for name in vars(module) if name.startswith("save_") and name != "save_all_figures"]:
        setattr(module, name, lambda *args: None)
    draw = module.draw_trajectories
    module.draw_trajectories = lambda models, what, steps: drawn.append(what) or draw(models, what, steps)
    module.save_trajectories = lambda *args: calls.append((*args, drawn.pop()))
    for _ in range(2):
        module.save_all_figures(models, data, tmp_path_factory.mktemp("figures"))
    names = ["models", "trajectories", "subjects", "space", "labels", "output", "drawn"]
    return [SimpleNamespace(**dict(zip(names, call))) for call in calls]


def test_trajectories_go_from_noise_to_the_sample_and_back(module, trajectories):
    states, noised, captions = trajectories[0].trajectories
    assert states.shape == noised.shape
    assert len(states) == len(captions) == len(set(captions)) == module.PATH_STEPS + 1
    noise, sample = states[0], states[-1]
    torch.testing.assert_close(noised[0], sample, rtol=1e-3, atol=1e-3)  # the way out begins at the sample
    difference = noised[-1] - noise  # and ends in its noise, but for the share of the sample that is never destroyed
    assert difference.norm() < 0.02 * noise.norm() + 0.01 * sample.norm()
    assert kstest((noise / noise.std()).flatten()[:10_000].numpy(), "norm").pvalue > 0.001
    assert len(noise.flatten(1).unique(dim=0)) == states.shape[1]  # no two the same
    for way in (states, noised.flip(0)):  # no jump: each step is small beside the whole way
        steps = (way[1:] - way[:-1]).flatten(1).norm(dim=1)
        assert steps.max() < 0.7 * (way[-1] - way[0]).norm()


def test_trajectories_are_deterministic(trajectories):
    for a, b in zip(trajectories[0].trajectories[:2], trajectories[1].trajectories[:2]):
        assert torch.equal(a, b)


def test_trajectories_are_of_the_subjects_and_lie_in_the_space_of_their_paths(experiment, trajectories):
    call, states = trajectories[0], trajectories[0].trajectories.states
    expected = {name: label for label, name in enumerate(CLASSES)}
    if not experiment.conditional:
        expected = {f"sample {number}": None for number in range(10)}
    assert call.subjects == expected
    assert list(call.subjects) == list(expected)
    rows, rest = divmod(states.shape[1], len(expected))
    assert rows > 1 and rest == 0
    if experiment.conditional:
        assert call.drawn.tolist() == [label for label in range(10) for _ in range(rows)]
    assert call.space.shape[0] == len(call.labels) == 53
    assert call.space.shape[1:] == states.shape[2:]
    images = call.models.decode(states[:, ::rows])
    assert (images.dtype, images.shape) == (torch.uint8, (len(states), 10, 1, 28, 28))
    if not experiment.latent:  # the states are the pictures
        shown = ((states[:, ::rows] + 1) * 127.5).clamp(0, 255)
        assert (images - shown).abs().max() <= 0.51


# The command line


def test_class_that_there_is_not_is_answered(experiment, module, tmp_path):
    error = refusal(module, ["--sample-only", "--class=Banana", f"--output-dir={tmp_path / 'new'}"])
    expected = ["Banana", *CLASSES] if experiment.conditional else ["unrecognized", "--class"]
    assert [part for part in expected if part not in error] == []
    assert not (tmp_path / "new").exists()


@pytest.fixture
def described(module, monkeypatch, capsys):
    """The help of each flag, white space collapsed."""
    monkeypatch.setenv("COLUMNS", "200")
    assert run(module, ["--help"]) == 0
    parts = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    return {re.match(r"(?:-h, )?--([a-z0-9-]+)", part)[1]: " ".join(part.split()) for part in parts}


def test_help_tells_type_default_and_limits_of_every_field(module, described):
    for field in dataclasses.fields(module.Config):
        text, default = described[field.name.replace("_", "-")], field.default
        assert field.metadata["help"] in text
        assert f"default: {default!r}" in text
        if field.metadata["choices"]:
            assert all(choice in text for choice in field.metadata["choices"])
        else:
            assert field.type.__name__ in text
        if field.type in (int, float):
            low, high = field.metadata["low"], field.metadata["high"]
            assert low <= default <= high
            assert f"{low:.10g} to {high:.10g}" in text


def test_help_describes_the_other_flags(experiment, described):
    names = {"fresh", "sample-only", "export-samples", "quick", "num-samples"}
    names |= {"class"} if experiment.conditional else set()
    assert names <= described.keys()
    assert "class" in names or "class" not in described
    for name in names:
        assert len(described[name].split()) > 4, described[name]
        assert re.search(r"\((switch|(int|str), .*default: .*)\)$", described[name]), described[name]


def test_help_tells_the_epochs_of_each_device(module, described):
    fields = [field.name for field in dataclasses.fields(module.Config) if field.name.endswith("epochs")]
    for device in ("cpu", "cuda"):
        recipe = module.with_recipe(module.Config(), torch.device(device))
        for name in fields:
            assert getattr(recipe, name) > 0
            assert re.search(rf"\b{getattr(recipe, name)}\b", described[name.replace("_", "-")])


# Interruptions


# Steps of the diffusion are counted from 1, those of an autoencoder backwards from 0. Epochs have three.
@pytest.mark.parametrize("at", [[-5, 0, 2], [-4, -1, 5], [-3, 1, 6], [3, 9]], ids=str)
def test_interrupted_run_ends_with_the_same_bits(experiment, module, undisturbed, tiny_data_dir, tmp_path, at):
    done, arguments = 0, flags(module, tmp_path, tiny_data_dir)
    for step in [number + 6 for number in at] if experiment.latent else [number for number in at if number > 0]:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at_step(patch, module, step - done)
            assert run(module, arguments) == 130
        assert sum(steps(tmp_path).values()) == step  # nothing is lost
        done = step
    assert run(module, arguments) == 0
    assert differences(read(undisturbed), read(tmp_path)) == []
