"""Fixtures for all tests, and helpers that test files import."""

import functools
import gzip
import os
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

import script_runs
from script_runs import SCRIPT_V3
from sync_shared import REPOSITORY, halves, load_script

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
import feature_extractor as fe
import quality

ARCHIVES = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
ARCHIVES += ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


def pytest_addoption(parser):
    text = "also run the tests that kill every script again and again"
    parser.addoption("--faults", action="store_true", help=text)


def pytest_configure(config):
    config.addinivalue_line("markers", "faults: takes minutes, runs with --faults only")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("faults") and not config.getoption("--faults"):
            item.add_marker(pytest.mark.skip(reason="runs with --faults"))


def run_script(path, *args, env=(), **options):
    """Run a Python file with this interpreter, without a terminal; `env` is added to the
    environment. Returns the CompletedProcess, its output as text."""
    options = {"capture_output": True, "encoding": "utf-8", "timeout": 240} | options
    options["env"] = {**os.environ, "PYTHONIOENCODING": "utf-8", **dict(env)}
    command = [sys.executable, *map(str, (path, *args))]
    return subprocess.run(command, stdin=subprocess.DEVNULL, **options)


@pytest.fixture
def refused(capsys):
    """A function: the one line of error that a benchmark's command line ends with, status 2."""

    def refused(main, *arguments, **options):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments)], **options)
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1), error
        return error

    return refused


def draw_shapes(labels, rng):
    """Draw one uint8 image a label: a bright bar at its class's place, jittered, on faint noise."""
    images = rng.integers(0, 20, (len(labels), 28, 28), dtype=np.uint8)  # (N, 28, 28)
    jitter = rng.integers(0, 3, (len(labels), 2))
    brightness = rng.integers(150, 256, len(labels))
    for image, label, (dy, dx), value in zip(images, labels, jitter, brightness, strict=True):
        position = 2 + 4 * (label % 5)
        if label < 5:
            image[position + dy : position + dy + 5, 4 + dx : 22 + dx] = value
        else:
            image[4 + dy : 22 + dy, position + dx : position + dx + 5] = value
    return images


def write_idx(path, array):
    """Write a uint8 array in the idx format of MNIST, and the gzip archive beside it."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
    path.write_bytes(content)
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(content, mtime=0))


def write_tiny_data(root, train=640, test=160):
    """Write a small data set of shapes, one a class, in torchvision's raw layout; the same bytes
    every time."""
    raw = Path(root) / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = rng.permutation(np.arange(count) % 10).astype(np.uint8)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", draw_shapes(labels, rng))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)


@pytest.fixture(autouse=True)
def seeded():
    """Tests that draw from torch's global generator draw the same every time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory):
    """Folder for --data-dir: 640 training and 160 test images of simple shapes. Copy it before you
    damage it."""
    root = tmp_path_factory.mktemp("tiny_data")
    write_tiny_data(root)
    return root


@pytest.fixture(scope="session")
def scored_data_dir(tmp_path_factory):
    """A data set with 600 training images besides the validation split and 300 test images; its
    cache is kept apart."""
    root = tmp_path_factory.mktemp("scored_data")
    write_tiny_data(root, train=fe.VALIDATION_SIZE + 600, test=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "CACHE_DIR", tmp_path_factory.mktemp("cache"))
        yield root


@pytest.fixture(scope="session")
def real_data_dir():
    """Folder for --data-dir with the real Fashion-MNIST, downloaded if need be; without it the test
    is skipped, or fails under CI."""
    root = REPOSITORY / "data"
    try:
        if not all((root / "FashionMNIST" / "raw" / name).is_file() for name in ARCHIVES):
            fe.download(root)
    except (OSError, RuntimeError) as error:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(f"Fashion-MNIST is not in {root}, and downloading it failed: {error}")
    return root


@pytest.fixture
def no_network(monkeypatch):
    def urlopen(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", urlopen)


@pytest.fixture(scope="session")
def script_v3():
    """LatentDiffusionModel/v3's script as a module."""
    return load_script(SCRIPT_V3)


@pytest.fixture(scope="session")
def tiny_script(tmp_path_factory):
    """The script of the tests' own experiment: tiny_experiment.py above the scripts' harness."""
    path = tmp_path_factory.mktemp("tiny_experiment") / "script_model_train_test.py"
    above = Path(__file__).with_name("tiny_experiment.py").read_text(encoding="utf-8")
    path.write_text(above + "\n\n" + "\n".join(halves(SCRIPT_V3)[1]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def undisturbed_run(tiny_data_dir, tmp_path_factory):
    """A function: the output folder of a script's tiny run, which nothing interrupted. Copy it
    before you change it."""

    @functools.cache
    def undisturbed(path):
        module = script_runs.load_without_figures(path)
        output = tmp_path_factory.mktemp("undisturbed")
        assert script_runs.run(module, script_runs.flags(module, output, tiny_data_dir)) == 0
        done = script_runs.steps(output)
        assert done == {stage: script_runs.STEPS[stage] for stage in done}
        return output

    return undisturbed


# Of the script that a test's argument `experiment` names, which a mark of script_runs.py provides.


@pytest.fixture(scope="module")
def module(experiment):
    """The script, whose training draws nothing."""
    return script_runs.load_without_figures(experiment.path)


@pytest.fixture(scope="module")
def undisturbed(experiment, undisturbed_run):
    """Output folder of its tiny run that nothing has interrupted. Copy it before you change it."""
    return undisturbed_run(experiment.path)


@pytest.fixture
def output(undisturbed, tmp_path):
    """A copy of that output folder."""
    return shutil.copytree(undisturbed, tmp_path / "output")
