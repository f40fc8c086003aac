"""Where people work: notebooks, clusters, shared folders, other people's file systems.

What the harness does there is tested on v3.
"""

import contextlib
import errno
import io
import multiprocessing
import os
import pty
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torchvision.datasets.utils import calculate_md5

from conftest import ARCHIVES, load_script, run_script, write_tiny_data
from script_runs import STEPS, answer, as_nobody, flags, on_v3, refusal, run, steps

pytestmark = on_v3


# Streams and notebooks


def test_an_inherited_matplotlib_backend_does_not_matter_and_the_caller_keeps_its_own(experiment):
    """Nor are the caller's settings changed."""
    code = f"""
import os, sys
sys.path.insert(0, {str(experiment.path.parents[2] / "tests")!r})
os.environ["MPLBACKEND"] = "no_such_backend"
from sync_shared import load_script
script = load_script({str(experiment.path)!r})
import matplotlib
matplotlib.rcParams["lines.linewidth"] = 7
script.exit_status(lambda: None)
assert matplotlib.rcParams["lines.linewidth"] == 7
assert os.environ["MPLBACKEND"] == "no_such_backend"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_stream_without_reconfigure_will_do(module, tiny_data_dir, tmp_path):
    class Stream(io.StringIO):
        reconfigure = property()  # AttributeError, as of a notebook's streams

    out, err = Stream(), Stream()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run(module, flags(module, tmp_path / "output", tiny_data_dir)) == 0
        assert sys.stdout is out  # given back
    assert "diffusion: epoch 3 of 3" in out.getvalue()


def test_a_log_has_the_lines_of_epochs_though_errors_go_to_a_terminal(
    experiment, tiny_data_dir, tmp_path, module
):
    master, terminal = pty.openpty()  # whose buffer holds all that comes
    arguments = flags(module, tmp_path / "output", tiny_data_dir)
    command = [sys.executable, experiment.path, *arguments]
    with open(tmp_path / "log", "w") as log:
        subprocess.run(command, stdout=log, stderr=terminal, timeout=240, check=True)
    os.close(terminal), os.close(master)
    assert (tmp_path / "log").read_text().count("diffusion: epoch") == 3


def test_main_trains_in_a_thread_of_a_program(module, tiny_data_dir, tmp_path):
    failures = []

    def work():
        try:
            module.main([str(part) for part in flags(module, tmp_path / "output", tiny_data_dir)])
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(240)
    assert failures == []
    assert steps(tmp_path / "output") == STEPS


@pytest.fixture(scope="module")
def kernel():
    """A function that runs code in a real notebook's kernel, and returns what it prints."""
    manager = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    pytest.importorskip("ipykernel")
    manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=120)

    def execute(code, interrupt_after=None, interrupts=0):
        printed = []

        def note(message):
            content = message["content"]
            printed.append(content.get("text") or "\n".join(content.get("traceback", [])))
            if interrupt_after and interrupt_after in "".join(printed[-2:]):
                for _ in range(interrupts - len(sent)):
                    sent.append(manager.interrupt_kernel())

        sent = []
        client.execute_interactive(code, output_hook=note, timeout=240)
        return "".join(printed)

    yield execute
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_notebook_runs_a_script_and_keeps_its_variables_when_it_is_interrupted(
    kernel, experiment, module, tiny_data_dir, tmp_path
):
    arguments = " ".join(map(str, flags(module, tmp_path / "output", tiny_data_dir)))
    kernel("kept = 41")
    printed = kernel(f"%run {experiment.path} {arguments}")
    assert "diffusion: epoch 3 of 3" in printed and "figures of epoch 3 written" in printed
    assert "Traceback" not in printed and "Error" not in printed
    longer = f"%run {experiment.path} {arguments.replace('--epochs=3', '--epochs=2000')}"
    printed = kernel(longer, interrupt_after="diffusion: epoch 5 of", interrupts=2)
    assert "42" in kernel("print(kept + 1)")
    printed = kernel(longer, interrupt_after="diffusion: epoch 9 of", interrupts=1)
    assert "saved; run again to resume" in printed
    assert "42" in kernel("print(kept + 1)")


# Libraries, devices, memory


def fail(error):
    raise error


def test_the_callers_default_dtype_does_not_matter(module, undisturbed):
    torch.set_default_dtype(torch.float64)
    try:
        models = module.load_trained(undisturbed, "cpu")
        images = module.generate_samples(models, torch.tensor([1, 2]))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    models = module.load_trained(undisturbed, "cpu")
    assert torch.equal(images, module.generate_samples(models, torch.tensor([1, 2])))


def test_an_unusable_gpu_is_a_warning_under_auto_and_an_error_if_asked_for(
    module, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = torch.ones

    def ones(*size, device=None, **options):
        if str(device).startswith("cuda"):
            raise RuntimeError("CUDA error: no kernel image is available for execution")
        return real(*size, device=device, **options)

    monkeypatch.setattr(torch, "ones", ones)
    assert module.pick_device("auto").type == "cpu"
    assert "warning: cannot use device 'cuda': CUDA error: no kernel" in capsys.readouterr().out
    with pytest.raises(module.ExperimentError, match="cannot use device 'cuda'"):
        module.pick_device("cuda")


def test_too_little_memory_is_one_line_and_other_errors_are_not_hidden(module):
    for error in (
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("a fault of the script's own"),
    ):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            if "own" in str(error):
                with pytest.raises(RuntimeError, match="own"):
                    module.exit_status(partial(fail, error))
            else:
                assert module.exit_status(partial(fail, error)) == 1
                assert err.getvalue().startswith("error: out of memory: end other programs; ")
                assert err.getvalue().count("\n") == 1


def test_compile_without_a_compiler_is_one_line(experiment, module, tiny_data_dir, tmp_path):
    arguments = [*flags(module, tmp_path / "output", tiny_data_dir), "--compile"]
    environment = {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = run_script(experiment.path, *arguments, env=environment, timeout=300)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: --compile needs a C++ compiler")
    assert "Traceback" not in done.stderr


# Folders and files


def test_the_home_folder_is_meant_in_every_path(module, undisturbed, monkeypatch, tmp_path):
    home = tmp_path / "home"
    write_tiny_data(home / "data")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert answer(module, flags(module, "~/runs", "~/data"))[0] == 0
    asked = ["--sample-only", "--device=cpu", "--run-dir=~/runs", "--output-dir=~/pictures"]
    assert answer(module, [*asked, "--num-samples=2"])[0] == 0
    assert (home / "runs" / "checkpoints" / "last.pt").exists()
    assert (home / "pictures" / "samples" / "samples.png").exists()
    assert not (tmp_path / "~").exists()


def test_what_can_be_made_again_ends_no_run(experiment, tiny_data_dir, tmp_path):
    script, output = load_script(experiment.path), tmp_path / "output"
    for name in ("save_trajectories", "save_own_figures", "save_reconstructions"):  # slow
        setattr(script, name, lambda *args: None)
    names = "metrics.csv", "index.html", "loss_curves.png"
    for name in names:  # nothing can take their place
        (output / name / "folder").mkdir(parents=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert run(script, flags(script, output, tiny_data_dir)) == 0
    for name in names:
        assert f"warning: cannot write {output / name}" in out.getvalue()
    assert steps(output)["diffusion"] == 9
    assert (output / "samples" / "samples_epoch_3.png").exists()


def test_a_rename_is_tried_again_while_another_program_has_the_file(module, tmp_path, monkeypatch):
    real, attempts = os.replace, []

    def replace(source, target):
        attempts.append(target)
        if len(attempts) != 3:
            raise PermissionError(errno.EACCES, "in use", str(target))
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    module.write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content" and len(attempts) == 3
    with pytest.raises(PermissionError):  # in use for good
        module.write_atomically(tmp_path / "file", b"other")
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_no_error_but_a_broken_disk_is(
    module, tmp_path, monkeypatch, code
):
    real = os.fsync

    def fsync(file):
        if stat.S_ISDIR(os.fstat(file if isinstance(file, int) else file.fileno()).st_mode):
            raise OSError(code, os.strerror(code))
        return real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    content = {**module.CHECKPOINT, "config": {}, "stages": {}, "history": []}
    with pytest.raises(OSError) if code == errno.EIO else contextlib.nullcontext():
        module.save_checkpoint(content, tmp_path)
    assert module.read_checkpoint(tmp_path / "last.pt") == content


def test_a_colleague_samples_from_a_run_that_only_its_owner_may_change(module, undisturbed):
    with tempfile.TemporaryDirectory() as root:  # nobody else may enter the folders of the tests
        root = Path(root)
        root.chmod(0o755)
        run_folder, own = shutil.copytree(undisturbed, root / "run"), root / "own"
        for path in [*run_folder.rglob("*"), run_folder]:
            path.chmod(0o755 if path.is_dir() else 0o644)  # as the umask 022 leaves them
        own.mkdir()
        own.chmod(0o777)
        before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
        asked = ["--sample-only", "--device=cpu", "--num-samples=2"]
        with as_nobody():
            line = refusal(module, [*asked, f"--output-dir={run_folder}"])
            assert "Permission denied" in line and "give it as --run-dir" in line
            folders = [f"--run-dir={run_folder}", f"--output-dir={own}"]
            assert answer(module, [*asked, *folders]) == (0, "")
        assert (own / "samples" / "samples.png").exists()
        assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before


# Data


def fetch(script_path, folder, archives, starts, results):
    """In a process of its own: get the data, from `archives` instead of the network."""
    module = load_script(script_path)
    module.FashionMNIST = StandIn(archives)
    starts.wait(60)
    data = module.load_fashion_mnist(module.Settings(data_dir=str(folder)), torch.device("cpu"))
    results.put((len(data.train_images) + len(data.validation_images), module.FashionMNIST.calls))


class StandIn:
    """torchvision's class as far as the harness uses it; a download takes a while."""

    def __init__(self, archives):
        self.archives, self.calls = archives, 0
        self.resources = [(name, calculate_md5(archives / name)) for name in ARCHIVES]

    def __call__(self, root, train, download):
        self.calls += 1
        raw = root / "FashionMNIST" / "raw"
        for name in ARCHIVES:
            content = (self.archives / name).read_bytes()
            with open(raw / name, "wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                time.sleep(0.1)
                file.write(content[len(content) // 2 :])


def test_of_several_runs_at_once_on_fresh_data_one_gets_it_even_after_a_kill(experiment, tmp_path):
    """A first run is killed while it has half of an archive, and the lock."""
    write_tiny_data(tmp_path / "source")
    archives, raw = (tmp_path / name / "FashionMNIST" / "raw" for name in ("source", "fresh"))
    context = multiprocessing.get_context("forkserver")

    def started(count):
        starts, results = context.Event(), context.Queue()
        arguments = experiment.path, tmp_path / "fresh", archives, starts, results
        how = {"target": fetch, "args": arguments, "daemon": True}
        processes = [context.Process(**how) for _ in range(count)]
        for process in processes:
            process.start()
        starts.set()
        return processes, results, starts  # which must live as long as the processes

    [killed], _results, _starts = started(1)
    while not (raw / ARCHIVES[0]).exists():
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join(60)
    processes, results, _starts = started(3)
    answers = [results.get(timeout=120) for _ in processes]
    assert [images for images, _ in answers] == [640] * 3
    assert sum(calls for _, calls in answers) == 1


def test_the_scripts_checkpoint_is_a_file_like_any_other(undisturbed):
    """A colleague may read it: the umask decides, not the script."""
    mode = (undisturbed / "checkpoints" / "last.pt").stat().st_mode
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(mode) == 0o666 & ~umask
