"""Whatever happens to the files of checkpoints, or while they are written, no run is lost that need not be."""

import contextlib
import errno
import io
import os
import pickle
import random
import re
import zipfile

import pytest
import torch

from script_runs import (
    EXPERIMENTS,
    act_at_operation,
    act_at_step,
    differences,
    every_script,
    files_below,
    flags,
    on_v3,
    read,
    refusal,
    run,
    steps,
)

SHORT = {"train_images": 16, "autoencoder_epochs": 1, "epochs": 1}  # one step a stage, so two saves a run


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
    """Whether metrics.csv ends with a line break, and all its lines have as many fields."""
    lines = (output / "metrics.csv").read_text().split("\n")
    return lines.pop() == "" and len({line.count(",") for line in lines}) == 1


@pytest.fixture(scope="module")
def short(module, tiny_data_dir, tmp_path_factory):
    """The end of an undisturbed short run, and the file operations that it made."""
    output = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        operations = fail_at(patch, module, -1, None)
        assert run(module, flags(module, output, tiny_data_dir, **SHORT)) == 0
    return read(output), operations


@on_v3
def test_kill_at_any_file_operation_of_a_save(module, short, tiny_data_dir, tmp_path, capsys, monkeypatch):
    """At every moment from the end of the first save on one checkpoint is whole, and a rerun goes on from it."""
    expected, names = short
    first_save, second_save = [number for number, name in enumerate(names) if re.match("after .*last.pt", name)]
    assert second_save - first_save >= 10
    monkeypatch.setattr(module, "announce_plan", lambda *args: None)  # its trial steps take time
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


@on_v3
@pytest.mark.parametrize("operation", ["write", "fsync"])
def test_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    module, short, tiny_data_dir, tmp_path, capsys, operation
):
    """At each moment after the first save: metrics.csv, then the second checkpoint and its metrics.csv."""
    expected, names = short
    first_save = next(number for number, name in enumerate(names) if re.match("after .*last.pt", name))
    numbers = [number for number in range(first_save, len(names)) if names[number].startswith(operation)]
    assert len(numbers) >= 3
    for number in numbers:
        output, full = tmp_path / str(number), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, module, number, full)
            assert run(module, flags(module, output, tiny_data_dir, **SHORT)) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1, error
        assert "No space left on device" in error
        assert "last.pt" in readable(module, output)
        assert metrics_are_whole(output)
        assert list(output.rglob("*.tmp")) == []  # half a file would only fill the disk further
        assert run(module, flags(module, output, tiny_data_dir, **SHORT)) == 0
        assert differences(expected, read(output)) == []


@on_v3
def test_loader_refuses_a_truncated_file(module, whole, tmp_path):
    content, path, chance = whole[0], tmp_path / "last.pt", random.Random(0)
    for length in [0, 1, len(content) - 1, *(chance.randrange(len(content)) for _ in range(50))]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError):
            module.read_checkpoint(path)


def flip(content, place, bit):
    """`content` with one bit changed."""
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


@on_v3
@pytest.mark.parametrize("part", ["anywhere", "in the directory"])
def test_loader_notices_a_flipped_bit_or_it_changes_nothing(module, whole, tmp_path, part):
    """The directory of the archive is protected by no checksum, so it is tried for itself."""
    content, path, chance, refused = whole[0], tmp_path / "last.pt", random.Random(1), 0
    begin = 0 if part == "anywhere" else zipfile.ZipFile(io.BytesIO(content)).start_dir
    for _ in range(50):
        path.write_bytes(flip(content, chance.randrange(begin, len(content)), chance.randrange(8)))
        try:
            assert differences(whole[1], module.read_checkpoint(path)) == []
        except ValueError:
            refused += 1
    assert refused > 10


@on_v3
def test_loader_notices_a_tensor_turned_into_a_folder(module, whole, tmp_path):
    """The one bit in a zip directory that makes torch.load return memory it never filled, and no CRC notices."""
    content, path, place = whole[0], tmp_path / "last.pt", zipfile.ZipFile(io.BytesIO(whole[0])).start_dir
    while content[place : place + 4] == b"PK\1\2":  # an entry of the directory
        lengths = [int.from_bytes(content[at : at + 2], "little") for at in range(place + 28, place + 34, 2)]
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
    return {
        "garbage": random.Random(0).randbytes(5000),
        "empty": b"",
        "text": b"not a checkpoint\n",
        "bomb": saved({**content, "history": Bomb(marker)}),
        "old bomb": saved({**content, "history": Bomb(marker)}, _use_new_zipfile_serialization=False),
        "bare bomb": pickle.dumps(Bomb(marker)),
        "other dictionary": saved({"model": torch.zeros(3)}),
        "list": saved([1, 2, 3]),
        "tensor": saved(torch.zeros(3)),
        "parts missing": saved({name: content[name] for name in ("format", "version", "config")}),
        "zip": empty_zip(),
    }


def empty_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    return buffer.getvalue()


STRANGE = list(strange_files("", {"format": 1, "version": "", "config": {}}))


@on_v3
@pytest.mark.parametrize("kind", STRANGE)
def test_strange_file_in_the_place_of_all_checkpoints(module, whole, tiny_data_dir, tmp_path, capsys, kind):
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


@on_v3
def test_bomb_would_go_off(tmp_path, whole):
    """The bombs above are live: an unguarded loader executes them."""
    for number, kind in enumerate(["bomb", "old bomb"]):
        marker, path = tmp_path / f"executed {number}", tmp_path / "bomb.pt"
        path.write_bytes(strange_files(marker, whole[1])[kind])
        torch.load(path, weights_only=False)
        assert marker.exists()


@every_script
@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "bomb"])
def test_damaged_last_checkpoint_falls_back_to_the_previous(
    module, whole, undisturbed, tiny_data_dir, output, monkeypatch, capsys, kind
):
    folder, marker = output / "checkpoints", output / "executed"
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
    assert steps(output, "previous.pt")["diffusion"] == 6
    real, trained = module.train_step, []
    monkeypatch.setattr(module, "train_step", lambda *args: trained.append(1) or real(*args))
    monkeypatch.setattr(module, "announce_plan", lambda *args: None)  # its trial steps take time
    assert run(module, flags(module, output, tiny_data_dir)) == 0
    assert len(trained) == 3  # those since the previous checkpoint
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert any(str(folder / "last.pt") in line for line in warnings)
    assert any("previous.pt" in line for line in warnings)
    assert not marker.exists()
    if damaged is not None:  # set aside, not deleted
        [aside] = folder.glob("damaged_*.pt")
        assert aside.read_bytes() == damaged
        aside.unlink()
    assert differences(whole[1], read(output)) == []
    assert files_below(output) == files_below(undisturbed)


@on_v3
def test_damaged_previous_checkpoint_is_no_matter(module, whole, tiny_data_dir, output):
    (output / "checkpoints" / "previous.pt").write_bytes(b"garbage")
    assert run(module, flags(module, output, tiny_data_dir, epochs=4)) == 0
    assert readable(module, output) == ["last.pt", "previous.pt"]
    assert differences(whole[1], read(output, "previous.pt")) == []


@on_v3
def test_kill_after_falling_back_leaves_the_previous_checkpoint(module, whole, tiny_data_dir, output, monkeypatch):
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


@every_script
@pytest.mark.parametrize("kind", ["script", "format", "fields", "weights"])
def test_checkpoint_of_something_else_is_refused(
    experiment, module, whole, undisturbed_run, tiny_data_dir, output, kind
):
    """Falling back to previous.pt would be wrong: both are whole, and this is the wrong program for them."""
    other = next(each for each in EXPERIMENTS if each != experiment)
    settings = whole[1]["config"]
    content, part = {
        "script": (read(undisturbed_run(other.path)), other.name),
        "format": ({**whole[1], "format": 999}, "last.pt"),
        "fields": ({**whole[1], "config": {"seed": 0}}, "last.pt"),
        "weights": ({**whole[1], "config": settings | {"width": 2 * settings["width"]}}, "does not fit"),
    }[kind]
    (output / "checkpoints" / "last.pt").write_bytes(saved(content))
    before = (output / "checkpoints" / "last.pt").read_bytes()
    for more in ([], ["--sample-only"]):
        line = refusal(module, [*flags(module, output, tiny_data_dir, width=None), *more])
        assert part in line
        assert "--output-dir" in line or "--fresh" in line
    assert (output / "checkpoints" / "last.pt").read_bytes() == before


@every_script
def test_checkpoint_of_another_configuration_lists_the_fields(module, whole, tiny_data_dir, output):
    width = whole[1]["config"]["width"]
    line = refusal(module, flags(module, output, tiny_data_dir, seed=3, width=2 * width, sampling_steps=4))
    for part in ("seed", "3", f"width is {width}", str(2 * width), "--fresh", "--output-dir"):
        assert part in line
    assert "sampling_steps" not in line  # which may change
    assert (output / "checkpoints" / "last.pt").read_bytes() == whole[0]


@on_v3
def test_fresh_moves_the_old_run_aside(module, whole, tiny_data_dir, output):
    assert run(module, [*flags(module, output, tiny_data_dir, **SHORT, seed=3), "--fresh"]) == 0
    assert steps(output) == {"autoencoder": 1, "diffusion": 1}
    assert whole[0] in [path.read_bytes() for path in output.rglob("last.pt")]
