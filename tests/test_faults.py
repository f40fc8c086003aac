"""Hard to break: a script that is killed, interrupted, or left without disk, permission, data or
network loses nothing that was saved, says in one line what is wrong, and goes on when that is
mended.

Faults of the checkpoints themselves are in test_fault_checkpoints.py, those of the command line in
test_fault_flags.py. All are the harness's, which the scripts share, so one script stands for them.
"""

import http.server
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import calculate_md5

from conftest import ARCHIVES
from script_runs import (
    RealRun,
    answer,
    as_nobody,
    assert_ends_as,
    files_below,
    flags,
    on_v3,
    refusal,
    steps,
    wait_in_step,
)

FULL = Path("/dev/full")  # a file on a disk that is always full

pytestmark = on_v3


@pytest.fixture
def data(tiny_data_dir, tmp_path):
    """A copy of the tiny data set's raw folder, to be damaged; --data-dir is `data.parents[1]`."""
    return shutil.copytree(tiny_data_dir, tmp_path / "data") / "FashionMNIST" / "raw"


# Signals


# Epochs have three steps; steps 1 to 6 are the autoencoder's, 7 to 12 the guide's. Ctrl-C comes
# at every kind of step in test_every_script.py.
@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 8), (signal.SIGHUP, 5), (signal.SIGUSR1, 14)]
)
def test_signal_ends_the_process_with_its_status_and_a_hint(
    experiment, module, undisturbed, tiny_data_dir, tmp_path, number, step
):
    arguments = flags(module, tmp_path / "output", tiny_data_dir)
    wait = partial(wait_in_step, step=step, signals=1)
    real_run = RealRun(experiment.path, tmp_path, arguments, wait)
    real_run.wait_for("busy")
    real_run.signal(number)
    code, error = real_run.end()
    assert code == 128 + number
    assert len(error.splitlines()) == 1
    assert "run again to resume" in error
    done = steps(tmp_path / "output")
    assert sum(done.values()) == step  # nothing is lost
    stage = [name for name in done if done[name]][-1]
    assert f"{stage}, step {done[stage]} of" in error
    assert_ends_as(undisturbed, tmp_path / "output", module, arguments)


def test_second_ctrl_c_stops_at_once(experiment, module, tiny_data_dir, tmp_path):
    arguments = flags(module, tmp_path / "output", tiny_data_dir)
    wait = partial(wait_in_step, step=5, signals=3)
    real_run = RealRun(experiment.path, tmp_path, arguments, wait)
    real_run.wait_for("busy")
    real_run.signal(signal.SIGINT)
    time.sleep(0.3)
    assert real_run.process.is_alive()  # the first one waits for the end of the step
    real_run.signal(signal.SIGINT)
    code, error = real_run.end()
    assert code in (130, -signal.SIGINT)
    assert "Traceback" not in error
    assert sum(steps(tmp_path / "output").values()) == 3  # the last checkpoint stands


def test_ctrl_c_while_figures_are_drawn_says_how_to_go_on(
    module, output, tiny_data_dir, monkeypatch
):
    interrupt = lambda *args: signal.raise_signal(signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(module, "save_all_figures", interrupt)
    status, error = answer(module, flags(module, output, tiny_data_dir))
    assert status == 130
    assert len(error.splitlines()) == 1
    assert "run again to resume" in error


def test_reader_that_goes_away_gets_no_traceback(experiment, output):
    """As in `python script.py | head -1`: the pipe is closed after the first line."""
    asked = ["--sample-only", "--num-samples=300", "--sampling-steps=4", "--device=cpu"]
    command = [sys.executable, experiment.path, f"--output-dir={output}", *asked]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert experiment.name.encode() in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) in (0, 1)


# Kills, and two runs at once


def test_output_folder_belongs_to_one_run_until_it_is_killed(
    experiment, module, undisturbed, tiny_data_dir, tmp_path
):
    """A second run is turned away; the lock that a killed run leaves behind stops nobody."""
    arguments, output = flags(module, tmp_path / "output", tiny_data_dir), tmp_path / "output"
    wait = partial(wait_in_step, step=5, signals=1)
    real_run = RealRun(experiment.path, tmp_path, arguments, wait)
    real_run.wait_for("busy")
    before = files_below(output), (output / "checkpoints" / "last.pt").read_bytes()
    for more in ([], ["--fresh"], ["--sample-only"]):
        assert str(output) in refusal(module, [*arguments, *more])
    assert (files_below(output), (output / "checkpoints" / "last.pt").read_bytes()) == before
    real_run.signal(signal.SIGKILL)
    assert real_run.end()[0] == -signal.SIGKILL
    assert_ends_as(undisturbed, output, module, arguments)


# Disks


@pytest.mark.skipif(not FULL.exists(), reason=f"there is no {FULL} here")
@pytest.mark.parametrize("asked", ["--num-samples=2", "--export-samples=2"])
def test_full_disk_while_samples_are_written_is_one_line_and_leaves_the_old_ones(
    module, output, asked
):
    arguments = [f"--output-dir={output}", "--device=cpu", "--sample-only", asked]
    before = files_below(output)
    assert answer(module, arguments) == (0, "")
    [name] = files_below(output) - before
    content = (output / name).read_bytes()
    (output / name).write_text("old")
    (output / f"{name}.tmp").symlink_to(FULL)
    line = refusal(module, arguments, status=1)
    assert "No space left on device" in line
    assert str(output / name) in line
    assert (output / name).read_text() == "old"
    assert answer(module, arguments) == (0, "")
    assert (output / name).read_bytes() == content


@pytest.mark.parametrize("kind", ["output", "new output", "finished output", "data"])
def test_folder_without_permission_is_named(module, tiny_data_dir, undisturbed, kind):
    with tempfile.TemporaryDirectory() as root:  # nobody else may enter the folders of the tests
        root = Path(root)
        root.chmod(0o755)
        output = root / "output"
        if kind == "finished output":
            shutil.copytree(undisturbed, output)
            (output / ".lock").chmod(0o444)
        else:
            output.mkdir()
        output.chmod(0o777 if kind == "data" else 0o555)
        raw = shutil.copytree(tiny_data_dir, root / "data") / "FashionMNIST" / "raw"
        (root / "data").chmod(0o755)
        raw.chmod(0o000 if kind == "data" else 0o555)  # a data folder need not be writable
        with as_nobody():
            target = output / "new" if kind == "new output" else output
            line = refusal(module, flags(module, target, root / "data"))
            if kind != "data":
                assert load(module, raw) == 640
        assert "Permission denied" in line
        assert str(raw if kind == "data" else output) in line
        raw.chmod(0o755)
        output.chmod(0o755)


def test_output_path_that_is_a_file_is_named(module, tiny_data_dir, tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert str(tmp_path / "file") in refusal(module, flags(module, path, tiny_data_dir))
    assert (tmp_path / "file").read_text() == "precious"


# Data


def load(module, data):
    """The number of images that the script finds."""
    config = module.Settings(data_dir=str(data.parents[1]))
    loaded = module.load_fashion_mnist(config, torch.device("cpu"))
    return len(loaded.train_images) + len(loaded.validation_images)


@pytest.fixture
def tiny_archives(monkeypatch, tiny_data_dir):
    """Let torchvision take the archives of the tiny data set for those of Fashion-MNIST; returns
    their folder."""
    raw = tiny_data_dir / "FashionMNIST" / "raw"
    resources = [(name, calculate_md5(raw / name)) for name in ARCHIVES]
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    return raw


def test_no_data_and_no_network_names_the_files_and_the_folder(module, no_network, tmp_path):
    line = refusal(module, flags(module, tmp_path / "output", tmp_path / "data"))
    raw = str(tmp_path / "data" / "FashionMNIST" / "raw")
    for part in [*ARCHIVES, raw, "zalandoresearch/fashion-mnist"]:
        assert part in line


@pytest.mark.parametrize("name", ARCHIVES[:2])  # the test split is never read
@pytest.mark.parametrize("kind", ["missing", "truncated", "wrong MD5"])
def test_damaged_archive_is_named_and_a_good_one_works(
    module, no_network, tiny_archives, data, tmp_path, kind, name
):
    for archive in ARCHIVES:
        (data / archive.removesuffix(".gz")).unlink()
    good = (data / name).read_bytes()
    bad = {"truncated": good[:-100], "wrong MD5": good[:-1] + b"?"}.get(kind, b"")
    (data / name).write_bytes(bad)
    if kind == "missing":
        (data / name).unlink()
    arguments = flags(module, tmp_path / "output", data.parents[1])
    line = refusal(module, arguments)
    assert f"Error downloading {name}" in line
    assert "from github.com/zalandoresearch/fashion-mnist" in line and str(data) in line
    (data / name).write_bytes(good)
    before = files_below(data)
    assert load(module, data) == 640
    assert files_below(data) == before  # archives are enough, and the folder may be read-only


@pytest.mark.parametrize("kind", ["folder in its place", "data folder is a file"])
def test_unreadable_data_is_named(module, no_network, data, tmp_path, kind):
    if kind == "folder in its place":
        path, root = data / "train-images-idx3-ubyte", data.parents[1]
        path.unlink()
        path.mkdir()
    else:
        path = root = tmp_path / "file"
        path.write_text("no folder")
    assert str(path) in refusal(module, flags(module, tmp_path / "output", root))


@pytest.mark.parametrize("kind", ["cut short", "empty", "wrong kind", "the other file"])
@pytest.mark.parametrize("number", [0, 1])
def test_damaged_unpacked_file_is_read_from_its_archive(
    module, no_network, tiny_archives, data, capsys, kind, number
):
    path = data / ARCHIVES[number].removesuffix(".gz")
    good = path.read_bytes()
    bad = {"cut short": good[:-1], "empty": b"", "wrong kind": b"\0\0\x0d" + good[3:]}
    bad["the other file"] = (data / ARCHIVES[1 - number].removesuffix(".gz")).read_bytes()
    path.write_bytes(bad[kind])
    assert load(module, data) == 640
    assert f"{path} is damaged" in capsys.readouterr().out


def test_damaged_unpacked_file_without_its_archive_is_named(
    module, no_network, tiny_archives, data, tmp_path
):
    path, archive = data / ARCHIVES[1].removesuffix(".gz"), data / ARCHIVES[1]
    path.write_bytes(path.read_bytes()[:-1])
    good = archive.read_bytes()
    archive.unlink()
    line = refusal(module, flags(module, tmp_path / "output", data.parents[1]))
    assert f"Error downloading {ARCHIVES[1]}" in line and str(data) in line
    archive.write_bytes(good)
    assert load(module, data) == 640


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `share` of each file, then the connection breaks."""

    share = 1.0

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: int(self.share * len(content))])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(tiny_archives, monkeypatch):
    """A function that lets torchvision download the tiny archives from a server on this machine."""
    servers = []

    def serve(share):
        handler = type("Handler", (Server,), {"share": share})
        handler = partial(handler, directory=tiny_archives)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["silent", "broken"])
def test_download_that_fails_is_answered_and_the_next_one_works(
    module, serve, monkeypatch, tmp_path, kind
):
    """A network may also go away while it is used. Without a terminal the bars of a download are
    not seen."""
    set_timeout = socket.setdefaulttimeout
    set_timeout(30)  # a script that sets none shall not hang this test
    wait = 0.3 if kind == "silent" else 30
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(wait))
    arguments = flags(module, tmp_path / "output", tmp_path / "data")
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, and that is all
        serve(0.5)
        if kind == "silent":
            nowhere = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
            monkeypatch.setattr(FashionMNIST, "mirrors", [nowhere])
        started = time.monotonic()
        line = refusal(module, arguments)
        assert time.monotonic() - started < 25
    words = {"silent": ["timed out"], "broken": [f"Error downloading {ARCHIVES[0]}", "corrupted"]}
    assert any(part in line for part in words[kind])  # as torchvision's release says it
    assert ARCHIVES[0] in line and "from github.com/zalandoresearch/fashion-mnist" in line
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(30))
    serve(1.0)
    assert answer(module, arguments) == (0, "")
