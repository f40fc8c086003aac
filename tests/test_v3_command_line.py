"""v3's command line: it explains itself, answers mistakes with one line, and works wherever and however it is run."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from script_runs import flags, on_v3, read, refusal, run, tiny_settings

pytestmark = on_v3


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
        (["--class=Sandal"], ["--sample-only"]),
        (["--num-samples=16"], ["--sample-only"]),
        (["--sample-only", "--num-samples=0"], ["--num-samples", "1 to 10000"]),
        (["--export-samples=0"], ["--export-samples", "1 to 1000000"]),
        (["--quick", "stray"], ["stray"]),
    ],
)
def test_wrong_flag_is_answered_with_what_is_right(module, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    line = refusal(module, [*arguments, f"--output-dir={tmp_path / 'new'}"])
    assert [part for part in parts if part not in line] == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["width", "autoencoder-width"])
def test_width_that_the_model_cannot_have_is_answered(module, tiny_data_dir, tmp_path, name):
    assert "multiple of 8" in refusal(module, flags(module, tmp_path, tiny_data_dir, **{name: 12}))


@pytest.mark.parametrize("name", ["warp", "cuda:99"])
def test_unknown_device_is_named(module, tiny_data_dir, tmp_path, name):
    assert repr(name) in refusal(module, flags(module, tmp_path, tiny_data_dir, device=name))


def test_sample_only_without_a_checkpoint_says_how_to_train_one(module, tmp_path):
    assert "without --sample-only to train" in refusal(module, ["--sample-only", f"--output-dir={tmp_path}"])


@pytest.mark.parametrize("mistake", ["--device=warp", "--data-dir=/dev/null", "--no-such-flag"])
def test_mistake_beside_fresh_leaves_the_old_run_in_its_place(module, no_network, tiny_data_dir, output, mistake):
    refusal(module, [*flags(module, output, tiny_data_dir), "--fresh", mistake])
    assert (output / "checkpoints" / "last.pt").exists()


# Samples


def test_number_of_samples_is_the_number_drawn(module, output, monkeypatch):
    asked = []
    real = module.generate_samples
    monkeypatch.setattr(module, "generate_samples", lambda models, labels: asked.append(labels) or real(models, labels))
    arguments = [f"--output-dir={output}", "--device=cpu", "--sample-only"]
    assert run(module, [*arguments, "--class=ankle-boot", "--num-samples=5"]) == 0
    assert run(module, [*arguments, "--num-samples=12"]) == 0
    assert run(module, [*arguments, "--class=Sandal"]) == 0
    assert [labels.tolist() for labels in asked] == [[9] * 5, [*range(10), 0, 1], [5] * 16]


def test_sampling_flags_reach_the_sampler(module, output, monkeypatch):
    used, real = [], module.sample
    monkeypatch.setattr(module, "sample", lambda *args: used.append(args[3]) or real(*args))
    asked = ["--export-samples=10", "--sampler=euler", "--sampling-steps=2", "--guidance-scale=20"]
    assert run(module, [f"--output-dir={output}", "--device=cpu", "--sample-only", *asked]) == 0
    assert [(config.sampler, config.sampling_steps, config.guidance_scale) for config in used] == [("euler", 2, 20)]


# The script as its users run it


def test_import_does_nothing(experiment, tmp_path):
    path = shutil.copy(experiment.path, tmp_path / "experiment.py")
    code = "import sys; sys.dont_write_bytecode = True; import experiment; print(experiment.VERSION)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "LatentDiffusionModel/v3\n", "")
    assert os.listdir(tmp_path) == [os.path.basename(path)]


def test_flags_of_the_tiny_runs_are_those_of_the_script(module, undisturbed):
    """The ruler of these tests: tiny settings would be worth nothing if the script ignored them."""
    config, tiny = read(undisturbed)["config"], tiny_settings(module.Config)
    assert tiny.keys() > {"train_images", "batch_size", "autoencoder_batch_size", "width", "epochs"}
    assert {name: config[name] for name in tiny} == tiny


def test_data_on_disk_needs_no_network(module, tiny_data_dir, monkeypatch):
    def connect(*args):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    module.load_fashion_mnist(tiny_data_dir, 100, torch.device("cpu"))
