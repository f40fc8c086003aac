"""Every script, whichever its model, does for its user what all of them promise: alone in a folder
it runs from the data to the figures, and however often it is interrupted, it ends with the same
bits.

The harness, which the scripts share, is tested in detail once, on LatentDiffusionModel/v3. With
--faults every script is also killed at random moments, again and again.
"""

import collections
import html
import inspect
import itertools
import random
import re
import shutil
import signal
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import load_script, run_script
from networks import perturb
from script_runs import (
    CLASSES,
    STEPS,
    RealRun,
    assert_ends_as,
    differences,
    every_script,
    files_below,
    flags,
    interrupt_at_step,
    kill_at_operation,
    read,
    refusal,
    run,
    steps,
)

EXPORTED = 24
CPU = torch.device("cpu")

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
    arguments = ["--quick", "--data-dir", tiny_data_dir, "--device", "cpu"]
    arguments += ["--export-samples", EXPORTED]
    data_before = files_below(tiny_data_dir)
    done = run_script(script, *arguments, cwd=root / "cwd", env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert files_below(tiny_data_dir) == data_before
    output = script.parent / "output" / "quick"
    files = files_below(output)
    return SimpleNamespace(root=root, script=script, done=done, output=output, files=files)


@pytest.fixture(scope="module")
def epochs(experiment, alone):
    """The number of each stage's epochs, by metrics.csv."""
    lines = (alone.output / "metrics.csv").read_text().splitlines()[1:]
    counts = collections.Counter(line.split(",")[0] for line in lines)
    assert list(counts) == experiment.stages
    return counts


def test_script_alone_writes_what_is_promised_and_into_its_output_folder(
    experiment, alone, epochs, tmp_path
):
    images = epochs["decoder"] or epochs["autoencoder"]
    expected = experiment.figures(epochs["diffusion"], images)
    expected |= {"checkpoints/last.pt", "checkpoints/previous.pt"}
    expected |= {"metrics.csv", "samples.npz", ".lock"}
    assert alone.files == expected
    written = {path.relative_to(alone.root).as_posix() for path in alone.output.rglob("*.*")}
    assert files_below(alone.root) - written == {alone.script.relative_to(alone.root).as_posix()}
    # --fresh moves all of it aside.
    folder = shutil.copytree(alone.output, tmp_path / "moved")
    (folder / "notes.txt").write_text("the user's own")
    load_script(alone.script).move_aside(folder)
    [attic] = (folder / "old_runs").iterdir()
    assert files_below(attic) == alone.files - {".lock"}
    left = {path for path in files_below(folder) if not path.startswith("old_runs/")}
    assert left == {".lock", "notes.txt"}


def test_output_without_a_terminal_is_plain_lines(experiment, alone, epochs):
    out = alone.done.stdout
    assert alone.done.stderr == ""
    assert "\r" not in out and "\x1b" not in out
    first = out.splitlines()[0]
    for part in (experiment.name, "cpu", torch.__version__, "fresh", str(alone.output)):
        assert part in first
    for stage, number in epochs.items():
        assert f"{stage}: epoch {number} of {number}, loss" in out
        line = rf"^{stage}: [\d.]+ M parameters, step 0 of \d+$"
        assert re.search(line, out, re.MULTILINE)
    for part in ("images/s", "noise and only show", "training what is left", "figures of epoch"):
        assert part in out


def test_pictures_are_not_trivial(alone):
    paths = [alone.output / name for name in sorted(alone.files) if name.endswith(".png")]
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 200, path
        assert pixels.std() > 10, path
        assert len(np.unique(pixels)) > 50, path
    # the last epoch of a decoder has two pictures
    different = [path for path in paths if path.parent.name != "reconstruction"]
    assert len({path.read_bytes() for path in different}) == len(different)


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
    """A copy of the finished run, and a function that runs its script in this process, where it
    must not train."""
    module = load_script(alone.script)
    monkeypatch.setattr(module, "train_step", lambda *args: pytest.fail("a step was trained"))
    output = shutil.copytree(alone.output, tmp_path / "output")
    where = [f"--output-dir={output}", f"--data-dir={tiny_data_dir}", "--device=cpu"]

    def start(*arguments):
        return run(module, [*where, *arguments])

    return SimpleNamespace(module=module, output=output, start=start)


@pytest.mark.parametrize("asked", [["--quick"], ["--sample-only", "--epochs=9"]], ids=" ".join)
def test_finished_run_trains_nothing_and_draws_again(again, monkeypatch, epochs, asked):
    drawn, checkpoint = [], (again.output / "checkpoints" / "last.pt").read_bytes()
    monkeypatch.setattr(again.module, "save_all_figures", lambda *args: drawn.append(args))
    assert again.start(*asked) == 0
    [(models, data, output)] = drawn
    assert models.epoch == epochs["diffusion"]
    assert len(data.validation_images) == 53  # a twelfth
    assert output == again.output
    assert (again.output / "checkpoints" / "last.pt").read_bytes() == checkpoint


def test_the_last_command_of_its_page_trains_it_on(again, monkeypatch):
    def train_step(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(again.module, "train_step", train_step)
    page = (again.output / "index.html").read_text(encoding="utf-8")
    commands = html.unescape(re.search("<pre>(.*?)</pre>", page, re.DOTALL)[1])
    assert again.start(*commands.split()[-2:]) == 130


def test_samples_of_a_loaded_model_are_those_of_the_run_that_trained_it(again):
    first = exported(again.output / "samples.npz")
    (again.output / "samples.npz").unlink()
    assert again.start("--sample-only", f"--export-samples={EXPORTED}") == 0
    for before, after in zip(first, exported(again.output / "samples.npz")):
        np.testing.assert_array_equal(before, after)
    asked = ["--sample-only", f"--export-samples={EXPORTED}", "--sampling-seed=3"]
    assert again.start(*asked) == 0
    images, labels = exported(again.output / "samples_seed_3.npz")
    assert (images != first[0]).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(labels, first[1])


def test_samples_asked_for_are_one_picture(experiment, again, capsys):
    asked = ["--num-samples=5", *(["--class=Ankle boot"] if experiment.conditional else [])]
    before = files_below(again.output)
    assert again.start("--sample-only", *asked) == 0
    [name] = files_below(again.output) - before
    assert name == f"samples/samples{'_Ankle-boot' if experiment.conditional else ''}.png"
    assert str(again.output / name) in capsys.readouterr().out
    picture = Image.open(again.output / name)
    assert picture.width > 200 and picture.height > 60
    assert len(picture.convert("L").getcolors()) > 10  # not blank


# What it leaves alone


def generators():
    """The states of the global generators."""
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_global_generators_neither_move_nor_matter(
    experiment, module, undisturbed, tiny_data_dir, tmp_path
):
    """A program that imports a script keeps its own random numbers, through training, figures and
    sampling; and the script's do not depend on them."""
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = generators()
    assert run(module, [*flags(module, tmp_path, tiny_data_dir), "--export-samples=2"]) == 0
    assert differences(read(undisturbed), read(tmp_path)) == []
    drawing = load_script(experiment.path)
    models = drawing.load_trained(tmp_path, device="cpu")
    config = drawing.Settings(data_dir=str(tiny_data_dir))
    drawing.save_own_figures(models, drawing.load_fashion_mnist(config, models.device), tmp_path)
    assert generators() == before


# What the animations and the paths are drawn from


def note(function, calls, *args):
    """Notes a call's arguments by their names instead of calling the function."""
    calls.append(SimpleNamespace(**inspect.signature(function).bind(*args).arguments))


@pytest.fixture(scope="module")
def drawn(experiment, undisturbed, tiny_data_dir, tmp_path_factory):
    """The calls behind the trajectories of a model that has learnt nothing but does much: of
    `draw_trajectories`, with its result, of `save_animation` and of `path_figure`."""
    module = load_script(experiment.path)
    models = module.load_trained(undisturbed, device="cpu")
    perturb(models.diffusion)
    config = module.Settings(data_dir=str(tiny_data_dir))
    data = module.load_fashion_mnist(config, models.device)
    calls = SimpleNamespace(models=models, trajectories=[], animations=[], paths=[])
    draw = module.draw_trajectories

    def watched(models, noise, classes, steps):
        result = draw(models, noise, classes, steps)
        calls.trajectories.append(SimpleNamespace(noise=noise, classes=classes, result=result))
        return result

    module.draw_trajectories = watched
    module.save_animation = partial(note, module.save_animation, calls.animations)
    module.path_figure = partial(note, module.path_figure, calls.paths)
    module.save_figure = lambda *args: None
    module.save_trajectories(models, data, tmp_path_factory.mktemp("figures"))
    return calls


def test_pictures_are_of_the_subjects_and_of_the_trajectories(experiment, module, drawn):
    call, (states, guesses, noised, captions) = drawn.trajectories[0], drawn.trajectories[0].result
    subjects = CLASSES if experiment.conditional else [f"sample {number}" for number in range(10)]
    assert [animation.title for animation in drawn.animations] == subjects
    assert states.shape[1] == 20  # two paths of each
    labels = [i % 10 if experiment.conditional else 10 for i in range(20)]
    assert call.classes.argmax(dim=1).tolist() == labels
    assert torch.equal(call.noise, module.noise_of_samples(drawn.models, range(20))())
    decoded, guessed, forward = (
        module.decode_images(drawn.models, each) for each in (states, guesses, noised)
    )
    pictured, noise_pictured = module.state_pictures(states), module.state_pictures(noised)
    parts = {"state": pictured, "image": decoded, "guess": guessed}
    if not experiment.latent:  # the states are the pictures
        assert torch.equal(parts.pop("image"), pictured)
        shown = ((states + 1) * 127.5).clamp(0, 255)
        assert (pictured - shown).abs().max() <= 0.51
    for number, path in enumerate(drawn.paths):
        animation, both = drawn.animations[number], (number, number + 10)
        assert path.captions == animation.captions == captions
        for shown, pictures in zip(animation.out, (forward, noise_pictured), strict=True):
            assert torch.equal(shown, pictures[:, number])
        for shown, pictures in zip(animation.back, (decoded, pictured, guessed), strict=True):
            assert torch.equal(shown, pictures[:, number]) and shown.dtype == torch.uint8
        assert path.rows == [f"path {number}: {name}" for number in (1, 2) for name in parts]
        rows = torch.stack([pictures[:, place] for place in both for pictures in parts.values()])
        assert torch.equal(path.images, rows)
        last = path.images[:, -1].int()  # the guess at the last step is the sample
        assert (last[len(parts) - 1] - decoded[-1, number].int()).abs().max() <= 1
        assert len(path.path) == len(captions)
        assert len(path.scatter) == len(path.labels) == 53
        assert subjects[number] in path.titles[0] and path.strong == labels[number]


# The command line


def test_class_that_there_is_not_is_answered(experiment, module, tmp_path):
    name = "Banana" if experiment.conditional else "Coat"
    asked = ["--sample-only", f"--class={name}", f"--output-dir={tmp_path / 'new'}"]
    expected = ["Banana", *CLASSES] if experiment.conditional else ["has no classes", "--class"]
    error = refusal(module, asked)
    assert [part for part in expected if part not in error] == []
    assert not (tmp_path / "new").exists()


# Interruptions


# Steps of the diffusion count from 1 to 9, and on where a stage follows. Those of the stages before
# it count backwards from 0, as far as a version has such. Epochs have three.
@pytest.mark.parametrize(
    "at", [[-11, -5, 0, 2, 11], [-10, -4, -1, 3, 5, 13], [-9, -6, -3, 1, 6, 9, 15]], ids=str
)
def test_interrupted_run_ends_with_the_same_bits(
    experiment, module, undisturbed, tiny_data_dir, tmp_path, at
):
    done, arguments = 0, flags(module, tmp_path, tiny_data_dir)
    stages, first = experiment.stages, experiment.stages.index("diffusion")
    total, before = (sum(map(STEPS.get, some)) for some in (stages, stages[:first]))
    for step in [number + before for number in at if 0 < number + before <= total]:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at_step(patch, module, step - done)
            assert run(module, arguments) == 130
        assert sum(steps(tmp_path).values()) == step  # nothing is lost
        done = step
    assert run(module, arguments) == 0
    assert differences(read(undisturbed), read(tmp_path)) == []


@pytest.mark.faults
def test_kills_at_random_moments_lose_nothing(
    experiment, module, undisturbed, tiny_data_dir, tmp_path
):
    """In rounds of three: the first kill falls within a save or beside it, the others anywhere.
    Every step is saved. Each stage has rounds that begin with it."""
    chance, killed_in = random.Random(experiment.name), []
    whole_run = RealRun(experiment.path, tmp_path, flags(module, tmp_path / "whole", tiny_data_dir))
    whole_run.wait_for("training what is left")
    started = time.monotonic()
    assert whole_run.end() == (0, "")
    duration = time.monotonic() - started
    for number in itertools.count():
        if len(killed_in) >= (24 if len(experiment.stages) > 2 else 9):
            break
        output = tmp_path / str(number)
        arguments = flags(module, output, tiny_data_dir, checkpoint_minutes=0)
        done = [STEPS[stage] for stage in experiment.stages[: number % len(experiment.stages)]]
        if done:
            with pytest.MonkeyPatch.context() as patch:
                interrupt_at_step(patch, module, sum(done))
                assert run(module, arguments) == 130
        for attempt in range(3):
            kill = partial(kill_at_operation, number=chance.randrange(60))
            prepare = kill if attempt == 0 else None
            real_run = RealRun(experiment.path, tmp_path, arguments, prepare)
            if prepare is None:
                real_run.wait_for("training what is left")
                time.sleep(chance.uniform(0, 0.6 * duration))
                real_run.signal(signal.SIGKILL)
            if real_run.end()[0] == -signal.SIGKILL:
                checkpoint = module.find_checkpoint(output / "checkpoints")
                begun = list(checkpoint["stages"]) if checkpoint else experiment.stages[:1]
                killed_in.append(begun[-1])
        assert_ends_as(undisturbed, output, module, arguments)
    assert set(killed_in) == set(experiment.stages)
