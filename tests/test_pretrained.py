"""v3's committed weights, the switch that samples from them, and pretrained.py, which made them.

`PYTHONPATH=tests/benchmarks python tests/test_pretrained.py` draws anew the images that the weights
are held to.
"""

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import feature_extractor as fe
import pretrained
from conftest import SCRIPT_V3, load_script, run_script
from script_runs import STEPS, files_below, flags, refusal, run

FOLDER = SCRIPT_V3.parent / "pretrained"
IMAGES = Path(__file__).parent / "data" / "v3_pretrained_samples.npz"


@pytest.fixture
def alone(tmp_path):
    """The script and the weights in a folder of their own: no data, no runs."""
    shutil.copytree(FOLDER, tmp_path / "pretrained")
    return shutil.copy(SCRIPT_V3, tmp_path)


def test_committed_weights_are_small_and_in_half_precision():
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert 0 < size <= pretrained.LIMIT
    content = torch.load(FOLDER / "checkpoints" / "last.pt", weights_only=True)
    assert list(content["stages"]) == list(STEPS)
    kinds = {value.dtype for stage in content["stages"].values() for value in stage["ema"].values()}
    assert kinds == {torch.float16, torch.int64}


def test_committed_weights_make_what_they_are_asked_for(script_v3):
    models = script_v3.load_trained(FOLDER, device="cpu")
    labels = torch.arange(200) % 10
    images = script_v3.generate_samples(models, labels)
    assert (fe.extract(images[:, 0])[1].argmax(dim=1) == labels).float().mean() >= 0.9


def images_of_given_noise():
    """One of each class under the checkpoint's settings, uint8 (10, 28, 28); in float32, the same
    on every machine but for rounding."""
    script = load_script(SCRIPT_V3)
    script.arithmetic = lambda device: contextlib.nullcontext()
    models = script.load_trained(FOLDER, device="cpu")
    size = 10, *script.state_shape(models.config)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
    state = script.last_state(models, noise, script.class_weights(torch.arange(10)))
    return script.decode_images(models, state)[:, 0]


def test_committed_weights_make_the_images_that_they_always_made():
    """An embedding of t that is off by a thousandth moves pixels by 11 grey levels."""
    with np.load(IMAGES) as file:
        wanted = torch.from_numpy(file["images"])
    difference = (images_of_given_noise().int() - wanted).abs().float()
    assert difference.max() <= 1
    assert difference.mean() < 0.02


def test_sandals_come_without_training_and_data(alone, tmp_path):
    asked = ["--class=Sandal", "--num-samples=8", "--device=cpu"]
    done = run_script(alone, "--sample-only", "--pretrained", *asked, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path / "output" / "pretrained" / "samples" / "samples_Sandal.png"
    assert str(path) in done.stdout and Image.open(path).width > 8 * 28
    folders = tmp_path, tmp_path / "output"
    written = {entry.name for folder in folders for entry in folder.iterdir()}
    assert written == {"pretrained", "output", SCRIPT_V3.name}


def test_pretrained_weights_leave_the_own_run_alone(alone, tmp_path, undisturbed_run):
    module = load_script(alone)
    output = shutil.copytree(undisturbed_run(SCRIPT_V3), tmp_path / "output")
    own = {name: (output / name).read_bytes() for name in files_below(output)}
    asked = ["--sample-only", "--pretrained", "--export-samples=10", "--device=cpu"]
    assert run(module, asked) == 0
    assert {name: (output / name).read_bytes() for name in own} == own
    assert {name.split("/")[0] for name in files_below(output) - own.keys()} == {"pretrained"}
    with np.load(output / "pretrained" / "samples.npz") as file:
        assert file["arr_0"].shape == (10, 28, 28, 1)


def test_a_script_alone_says_that_there_are_no_weights(tmp_path):
    module = load_script(shutil.copy(SCRIPT_V3, tmp_path))
    assert str(tmp_path / "pretrained") in refusal(module, ["--sample-only", "--pretrained"])


# pretrained.py


@pytest.fixture
def repository(tmp_path, undisturbed_run):
    """A repository of the script alone, with a finished run, and the run's weights."""
    folder = tmp_path / "LatentDiffusionModel" / "v3"
    folder.mkdir(parents=True)
    shutil.copy(SCRIPT_V3, folder)
    shutil.copytree(undisturbed_run(SCRIPT_V3), folder / "output")
    return tmp_path


def test_what_is_copied_is_the_average_of_the_weights(repository, script_v3):
    folder = repository / "LatentDiffusionModel" / "v3"
    for _ in range(2):  # the second takes the place of the first
        pretrained.main(["LatentDiffusionModel/v3"], repository=repository)
    assert [path.name for path in (folder / "pretrained").rglob("*.pt")] == ["last.pt"]
    folders = folder / "output", folder / "pretrained"
    whole, half = (script_v3.load_trained(each, device="cpu") for each in folders)
    assert half.config == whole.config and half.history == whole.history
    for part, network in whole.networks.items():
        wanted, got = network.state_dict(), half.networks[part].state_dict()
        assert wanted.keys() == got.keys()
        for name, value in wanted.items():
            assert got[name].dtype == value.dtype
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-7)


def test_a_run_does_not_go_on_from_slim_weights(repository, tiny_data_dir):
    pretrained.main(["LatentDiffusionModel/v3"], repository=repository)
    module = load_script(SCRIPT_V3)
    folder = repository / "LatentDiffusionModel" / "v3" / "pretrained"
    weights = (folder / "checkpoints" / "last.pt").read_bytes()
    reason = refusal(module, flags(module, folder, tiny_data_dir))
    assert "the checkpoint was written by another release" in reason
    assert (folder / "checkpoints" / "last.pt").read_bytes() == weights


@pytest.mark.parametrize("damaged", [True, False])
def test_command_line_says_what_is_missing(damaged, repository, refused):
    checkpoints = repository / "LatentDiffusionModel" / "v3" / "output" / "checkpoints"
    for path in checkpoints.glob("*.pt"):
        path.write_bytes(b"") if damaged else path.unlink()
    refused(pretrained.main, "LatentDiffusionModel/v3", repository=repository)
    assert not (checkpoints.parents[1] / "pretrained").exists()


if __name__ == "__main__":
    np.savez_compressed(IMAGES, images=images_of_given_noise().numpy())
