"""v3's command line: it explains itself, answers mistakes with one line, and works wherever and however it is run."""

import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SCRIPT_V3
from script_runs import flags, load_without_figures, read, run, tiny_settings

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@pytest.fixture(scope="module")
def module():
    return load_without_figures()


@pytest.fixture(scope="module")
def trained(module, tiny_data_dir, tmp_path_factory):
    """Output folder of a finished run. Copy it before you change it."""
    output = tmp_path_factory.mktemp("trained")
    assert run(module, flags(module, output, tiny_data_dir, autoencoder_epochs=1, epochs=1)) == 0
    return output


@pytest.fixture
def output(trained, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(trained, tmp_path / "output")


@pytest.fixture
def fails(module, capsys):
    """A function that runs the script, expects one line of error and status 2, and returns the line."""

    def fails(*arguments):
        capsys.readouterr()
        assert run(module, arguments) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1, error
        assert error.startswith("error: ")
        return error

    return fails


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--epoch=3"], ["--epoch"]),  # no guessing at abbreviations
        (["--epochs"], ["--epochs"]),
        (["--epochs=two"], ["--epochs", "two", "int"]),
        (["--learning-rate=nan"], ["--learning-rate", "nan"]),
        (["--sampler=rk4"], ["euler", "heun"]),
        (["--sample-only", "--class=Banana"], ["Banana", *CLASSES]),
        (["--class=Sandal"], ["--sample-only"]),
        (["--num-samples=16"], ["--sample-only"]),
        (["--sample-only", "--num-samples=0"], ["--num-samples", "1 to 10000"]),
        (["--export-samples=0"], ["--export-samples", "1 to 1000000"]),
        (["--quick", "stray"], ["stray"]),
    ],
)
def test_wrong_flag_is_answered_with_what_is_right(fails, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    line = fails(*arguments, f"--output-dir={tmp_path / 'new'}")
    assert [part for part in parts if part not in line] == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["width", "autoencoder-width"])
def test_width_that_the_model_cannot_have_is_answered(module, fails, tiny_data_dir, tmp_path, name):
    assert "multiple of 8" in fails(*flags(module, tmp_path, tiny_data_dir, **{name: 12}))


@pytest.mark.parametrize("name", ["warp", "cuda:99"])
def test_unknown_device_is_named(module, fails, tiny_data_dir, tmp_path, name):
    assert repr(name) in fails(*flags(module, tmp_path, tiny_data_dir, device=name))


def test_configuration_clash_lists_the_fields(module, fails, tiny_data_dir, output):
    line = fails(*flags(module, output, tiny_data_dir, width=24, seed=9))
    assert "width" in line and "seed" in line
    assert "--fresh" in line and "--output-dir" in line


def test_sample_only_without_a_checkpoint_says_how_to_train_one(fails, tmp_path):
    assert "without --sample-only to train" in fails("--sample-only", f"--output-dir={tmp_path}")


@pytest.mark.parametrize("mistake", ["--device=warp", "--data-dir=/dev/null", "--no-such-flag"])
def test_mistake_beside_fresh_leaves_the_old_run_in_its_place(
    module, fails, no_network, tiny_data_dir, output, mistake
):
    fails(*flags(module, output, tiny_data_dir), "--fresh", mistake)
    assert (output / "checkpoints" / "last.pt").exists()


# Samples


def test_samples_of_a_class_are_one_picture(module, output, capsys):
    start, before = time.perf_counter(), set(output.rglob("*"))
    assert run(module, [f"--output-dir={output}", "--device=cpu", "--sample-only", "--class=Sandal"]) == 0
    assert run(module, [f"--output-dir={output}", "--device=cpu", "--sample-only", "--class=sandal"]) == 0
    assert time.perf_counter() - start < 30
    (path,) = {path for path in output.rglob("*") if path.is_file()} - before
    assert path.suffix == ".png" and "Sandal" in path.name
    assert str(path) in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.width > 200 and picture.height > 60
        assert len(picture.convert("L").getcolors()) > 10  # not blank


def test_number_of_samples_is_the_number_drawn(module, output, monkeypatch):
    asked = []
    real = module.generate_samples
    monkeypatch.setattr(module, "generate_samples", lambda models, labels: asked.append(labels) or real(models, labels))
    arguments = [f"--output-dir={output}", "--device=cpu", "--sample-only"]
    assert run(module, [*arguments, "--class=ankle-boot", "--num-samples=5"]) == 0
    assert run(module, [*arguments, "--num-samples=12"]) == 0
    assert [labels.tolist() for labels in asked] == [[9] * 5, [*range(10), 0, 1]]


def test_sample_only_without_a_class_draws_all_figures_and_trains_nothing(module, tiny_data_dir, output, monkeypatch):
    drawn, before = [], (output / "checkpoints" / "last.pt").read_bytes()
    monkeypatch.setattr(module, "save_all_figures", lambda *args: drawn.append(args[0].epoch))
    arguments = [f"--output-dir={output}", f"--data-dir={tiny_data_dir}", "--device=cpu", "--sample-only"]
    assert run(module, [*arguments, "--epochs=9"]) == 0
    assert drawn == [1]
    assert (output / "checkpoints" / "last.pt").read_bytes() == before


def export(module, output, count, *arguments):
    """Run --export-samples; returns the new file's name and arrays."""
    before = set(output.glob("*.npz"))
    arguments = [f"--output-dir={output}", "--device=cpu", "--sample-only", f"--export-samples={count}", *arguments]
    assert run(module, arguments) == 0
    (path,) = set(output.glob("*.npz")) - before
    with np.load(path) as arrays:
        return path.name, arrays["arr_0"], arrays["arr_1"]


def test_exported_samples(module, output):
    name, images, labels = export(module, output, 24)
    assert name == "samples.npz"
    assert (images.dtype, images.shape) == (np.uint8, (24, 28, 28, 1))
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % 10 for i in range(24)]
    (output / name).unlink()
    again = export(module, output, 24)[1]
    assert (again == images).all()  # the seed decides
    other_name, other, other_labels = export(module, output, 24, "--sampling-seed=3")
    assert other_name == "samples_seed_3.npz"
    assert (other_labels == labels).all()
    assert (other != images).any(axis=(1, 2, 3)).all()


def test_sampling_flags_reach_the_sampler(module, output, monkeypatch):
    used, real = [], module.sample
    monkeypatch.setattr(module, "sample", lambda *args: used.append(args[3]) or real(*args))
    export(module, output, 10, "--sampler=euler", "--sampling-steps=2", "--guidance-scale=20")
    assert [(config.sampler, config.sampling_steps, config.guidance_scale) for config in used] == [("euler", 2, 20)]


# The script as its users run it


def test_import_does_nothing(tmp_path):
    path = shutil.copy(SCRIPT_V3, tmp_path / "experiment.py")
    code = "import sys; sys.dont_write_bytecode = True; import experiment; print(experiment.VERSION)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "LatentDiffusionModel/v3\n", "")
    assert os.listdir(tmp_path) == [os.path.basename(path)]


def test_flags_of_the_tiny_runs_are_those_of_the_script(module, trained):
    """The ruler of these tests: tiny settings would be worth nothing if the script ignored them."""
    config, tiny = read(trained)["config"], tiny_settings(module.Config)
    assert tiny.keys() > {"train_images", "batch_size", "autoencoder_batch_size", "width", "epochs"}
    assert {name: config[name] for name in tiny} == tiny | {"autoencoder_epochs": 1, "epochs": 1}


def test_data_on_disk_needs_no_network(module, tiny_data_dir, monkeypatch):
    def connect(*args):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    module.load_fashion_mnist(tiny_data_dir, 100, torch.device("cpu"))
