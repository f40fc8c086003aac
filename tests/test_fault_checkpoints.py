"""Whatever happens to the files of checkpoints, or while they are written, no run is lost that need
not be."""

import contextlib
import csv
import errno
import io
import os
import pickle
import random
import re
import zipfile

import numpy as np
import pytest
import torch

from script_runs import (
    STEPS,
    act_at_operation,
    act_at_step,
    differences,
    files_below,
    flags,
    on_v3,
    read,
    refusal,
    run,
    steps,
)

pytestmark = on_v3

# One step a stage, so four saves a run.
SHORT = {"train_images": 16, "epochs": 1}
SHORT |= dict.fromkeys(("autoencoder_epochs", "decoder_epochs", "guide_epochs"), 1)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the script catches it, so nothing is tidied up."""


@pytest.fixture(scope="module")
def whole(undisturbed):
    """The bytes of a good checkpoint, and its content."""
    return (undisturbed / "checkpoints" / "last.pt").read_bytes(), read(undisturbed)


def fail_at(monkeypatch, module, number, error):
    """Let the file operation number `number` of the script fail, as `act_at_operation` counts."""

    def fail():
        raise error

    return act_at_operation(monkeypatch, module, number, fail)


def readable(module, output):
    """The names of the checkpoints of `output` that the script's loader finds whole."""
    names = []
    for name in ("last.pt", "previous.pt"):
        with contextlib.suppress(ValueError, FileNotFoundError):
            module.read_checkpoint(output / "checkpoints" / name)
            names.append(name)
    return names


def metrics_are_whole(output):
    """Whether metrics.csv, once there is one, ends with a line break and its lines have as many
    fields."""
    path = output / "metrics.csv"
    lines = path.read_text().split("\n") if path.exists() else [""]
    return lines.pop() == "" and len({line.count(",") for line in lines}) <= 1


def rows(output):
    """Of metrics.csv: stages and epochs."""
    with open(output / "metrics.csv", newline="") as file:
        return [(row["stage"], int(row["epoch"])) for row in csv.DictReader(file)]


def saves(operations):
    """The numbers of the operations that end a save."""
    return [n for n, name in enumerate(operations) if re.match("after .*last.pt", name)]


@pytest.fixture(scope="module")
def short(module, tiny_data_dir, tmp_path_factory):
    """The end of an undisturbed short run, and the file operations that it made."""
    output = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        operations = fail_at(patch, module, -1, None)
        assert run(module, flags(module, output, tiny_data_dir, **SHORT)) == 0
    return read(output), operations


def test_kill_at_any_file_operation_of_a_save(module, short, tiny_data_dir, tmp_path, capsys):
    """At every moment from the end of the first save on one checkpoint is whole, and a rerun goes
    on from it."""
    expected, names = short
    first_save, second_save, _, _ = saves(names)
    assert second_save - first_save >= 10
    for number in range(first_save - 1, len(names)):
        output = tmp_path / str(number)
        arguments = flags(module, output, tiny_data_dir, **SHORT)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            fail_at(patch, module, number, Killed())
            run(module, arguments)
        whole = readable(module, output)
        assert bool(whole) == (number >= first_save), names[number]
        assert metrics_are_whole(output), names[number]
        capsys.readouterr()
        assert run(module, arguments) == 0, names[number]
        assert ("resumed" in capsys.readouterr().out) == bool(whole), names[number]
        assert differences(expected, read(output)) == [], names[number]
        assert rows(output) == [(stage, 1) for stage in STEPS], names[number]


@pytest.mark.parametrize("operation", ["write", "fsync"])
def test_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    module, short, tiny_data_dir, tmp_path, capsys, operation
):
    """At each moment after the first save; metrics.csv, which can be made again, ends no run."""
    expected, names = short
    after = range(saves(names)[0], len(names))
    numbers = [number for number in after if names[number].startswith(operation)]
    assert len(numbers) >= 3
    for number in numbers:
        output, full = tmp_path / str(number), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, module, number, full)
            status = run(module, flags(module, output, tiny_data_dir, **SHORT))
        printed, error = capsys.readouterr()
        if f"warning: cannot write {output / 'metrics.csv'}" in printed:  # can be made again
            assert (status, error) == (0, "")
            continue
        assert status == 1 and len(error.splitlines()) == 1, error
        assert "No space left on device" in error
        assert str(output) in error or operation == "fsync"  # which may be the folder's
        assert "last.pt" in readable(module, output)
        assert metrics_are_whole(output)
        assert list(output.rglob("*.tmp")) == []  # half a file would only fill the disk further
        assert run(module, flags(module, output, tiny_data_dir, **SHORT)) == 0
        assert differences(expected, read(output)) == []


def flip(content, place, bit):
    """`content` with one bit changed."""
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_loader_notices_a_cut_and_a_flipped_bit_or_it_changes_nothing(module, whole, tmp_path):
    """The directory of the archive is protected by no checksum, so it is tried for itself."""
    content, path, chance = whole[0], tmp_path / "last.pt", random.Random(1)
    for begin in (0, zipfile.ZipFile(io.BytesIO(content)).start_dir):
        refused = 0
        for _ in range(50):
            place = chance.randrange(begin, len(content))
            path.write_bytes(flip(content, place, chance.randrange(8)))
            try:
                assert differences(whole[1], module.read_checkpoint(path)) == []
            except ValueError:
                refused += 1
            path.write_bytes(content[:place])
            with pytest.raises(ValueError):
                module.read_checkpoint(path)
        assert refused > 10


def test_loader_notices_a_tensor_turned_into_a_folder(module, whole, tmp_path):
    """The one bit in a zip directory that makes torch.load return memory it never filled, and no
    CRC notices."""
    content, path = whole[0], tmp_path / "last.pt"
    place = zipfile.ZipFile(io.BytesIO(content)).start_dir
    while content[place : place + 4] == b"PK\1\2":  # an entry of the directory
        lengths = np.frombuffer(content[place + 28 : place + 34], "<u2").tolist()
        name = content[place + 46 : place + 46 + lengths[0]]
        if name.endswith(b"/data/0"):
            break
        place += 46 + sum(lengths)
    else:
        pytest.fail("no entry data/0")
    path.write_bytes(flip(content, place + 38, 4))  # of the external attributes: "is a folder"
    with pytest.raises(ValueError):
        module.read_checkpoint(path)


class Bomb:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved(content, **options):
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def strange_files(marker, content):
    """Things that may lie where a checkpoint should, by name."""
    bomb, old = {**content, "history": Bomb(marker)}, {"_use_new_zipfile_serialization": False}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    return {
        "garbage": random.Random(0).randbytes(5000),
        "empty": b"",
        "text": b"not a checkpoint\n",
        "bomb": saved(bomb),
        "old bomb": saved(bomb, **old),
        "bare bomb": pickle.dumps(Bomb(marker)),
        "other dictionary": saved({"model": torch.zeros(3)}),
        "list": saved([1, 2, 3]),
        "tensor": saved(torch.zeros(3)),
        "parts missing": saved({name: content[name] for name in ("format", "version", "config")}),
        "zip": zipped.getvalue(),
    }


STRANGE = list(strange_files("", {"format": 1, "version": "", "config": {}}))


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_file_in_the_place_of_all_checkpoints(
    module, whole, tiny_data_dir, tmp_path, capsys, kind
):
    marker, folder = tmp_path / "executed", tmp_path / "output" / "checkpoints"
    folder.mkdir(parents=True)
    content = strange_files(marker, whole[1])[kind]
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(content)
    assert run(module, flags(module, tmp_path / "output", tiny_data_dir)) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "--fresh" in error
    assert not marker.exists()
    assert (folder / "last.pt").read_bytes() == content  # it may be of use to somebody yet


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "bomb"])
def test_damaged_last_checkpoint_falls_back_to_the_previous(
    module, whole, undisturbed, tiny_data_dir, output, monkeypatch, capsys, kind
):
    folder, marker, done = output / "checkpoints", output / "executed", steps(output)
    weights = next(iter(whole[1]["stages"]["diffusion"]["model"].values())).numpy().tobytes()
    damaged = {
        "truncated": whole[0][: len(whole[0]) // 2],
        "flipped": flip(whole[0], whole[0].index(weights), 3),
        "bomb": saved({**whole[1], "history": Bomb(marker)}),
        "missing": None,
    }[kind]
    if damaged is None:
        (folder / "last.pt").unlink()
    else:
        (folder / "last.pt").write_bytes(damaged)
    assert sum(steps(output, "previous.pt").values()) == sum(done.values()) - 3
    real, trained = module.train_step, []
    monkeypatch.setattr(module, "train_step", lambda *args: trained.append(1) or real(*args))
    assert run(module, flags(module, output, tiny_data_dir)) == 0
    assert len(trained) == 3  # those since the previous checkpoint
    said = capsys.readouterr().out.splitlines()
    warnings = [line for line in said if line.startswith("warning")]
    assert any(str(folder / "last.pt") in line for line in warnings)
    assert any("previous.pt" in line for line in warnings)
    assert not marker.exists()
    if damaged is not None:  # set aside, not deleted
        [aside] = folder.glob("damaged_*.pt")
        assert aside.read_bytes() == damaged
        aside.unlink()
    assert differences(whole[1], read(output)) == []
    assert files_below(output) == files_below(undisturbed)


def test_checkpoint_that_is_saved_meanwhile_is_left_alone(module, whole, output, monkeypatch):
    """Who loads from a run in progress may look between the two renames of a save."""
    last, real = output / "checkpoints" / "last.pt", module.read_checkpoint
    done = steps(output, "previous.pt")
    last.unlink()
    meanwhile = lambda path: last.write_bytes(whole[0]) and real(path)  # noqa: E731
    monkeypatch.setattr(module, "read_checkpoint", meanwhile)
    found = module.find_checkpoint(last.parent)["stages"]
    assert {name: stage["step"] for name, stage in found.items()} == done != steps(output)
    assert last.read_bytes() == whole[0]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_too_little_memory_for_a_checkpoint_is_no_damage(
    module, undisturbed, tiny_data_dir, output, monkeypatch, error
):
    def load(*args, **options):
        raise error

    monkeypatch.setattr(module.torch, "load", load)
    assert "out of memory" in refusal(module, flags(module, output, tiny_data_dir), status=1)
    assert files_below(output) == files_below(undisturbed)


def test_too_little_memory_for_an_optimizer_is_no_misfit(
    module, tiny_data_dir, output, monkeypatch
):
    def load_state_dict(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", load_state_dict)
    assert "out of memory" in refusal(module, flags(module, output, tiny_data_dir), status=1)


def test_damaged_previous_checkpoint_is_no_matter(module, whole, tiny_data_dir, output):
    (output / "checkpoints" / "previous.pt").write_bytes(b"garbage")
    more = {"decoder_epochs": 3} if "decoder" in whole[1]["stages"] else {"epochs": 4}
    assert run(module, flags(module, output, tiny_data_dir, **more)) == 0
    assert readable(module, output) == ["last.pt", "previous.pt"]
    assert differences(whole[1], read(output, "previous.pt")) == []


def test_kill_after_falling_back_leaves_the_previous_checkpoint(
    module, whole, tiny_data_dir, output, monkeypatch
):
    """The damaged file must never be rotated into the place of the good one."""

    def killed():
        raise Killed

    (output / "checkpoints" / "last.pt").write_bytes(whole[0][:-100])
    for name in ("first", "second"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            act_at_step(patch, module, 2, killed)
            run(module, flags(module, output, tiny_data_dir))
        assert readable(module, output) == ["previous.pt"], name
    assert run(module, flags(module, output, tiny_data_dir)) == 0
    assert differences(whole[1], read(output)) == []


OTHERS = ["script", "format", "parts", "fields", "scheduler", "counts", "weights"]


@pytest.mark.parametrize("kind", OTHERS)
def test_checkpoint_of_something_else_is_refused(module, whole, tiny_data_dir, output, kind):
    """Falling back to previous.pt would be wrong: both are whole, and this is the wrong program for
    them. The release before had a scheduler beside each optimizer."""
    content, settings = whole[1], whole[1]["config"]
    stages = {name: {**state} for name, state in content["stages"].items()}
    if kind == "scheduler":
        stages["diffusion"]["scheduler"] = {"last_epoch": 9}
    elif kind == "counts":
        del stages["diffusion"]["loss_sums"]
    elif kind == "weights":
        settings = settings | {"width": 2 * settings["width"]}
    elif kind == "fields":
        settings = {"seed": 0}
    content = content | {"stages": stages, "config": settings}
    other = {"script": {"version": "ImageDiffusionModel/CNN"}, "format": {"format": 999}}
    content |= other.get(kind, {"scaler": {}} if kind == "parts" else {})
    (output / "checkpoints" / "last.pt").write_bytes(saved(content))
    before = (output / "checkpoints" / "last.pt").read_bytes()
    training = flags(module, output, tiny_data_dir, width=None, epochs=4)
    sampled = kind in ("scheduler", "counts")  # what samples need is there
    for arguments in [training] if sampled else [training, [*training, "--sample-only"]]:
        line = refusal(module, arguments)
        wanted = dict.fromkeys(OTHERS[1:-1], "another release")
        wanted |= {"script": "ImageDiffusionModel/CNN"}
        assert wanted.get(kind, "does not fit") in line
        assert "--output-dir" in line or "--fresh" in line
    assert (output / "checkpoints" / "last.pt").read_bytes() == before
