"""Whatever is typed, a script takes it or says in one line what is wrong with it."""

import dataclasses
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import load_script
from script_runs import answer, every_script, on_v3, refusal

OTHER_FLAGS = ["help", "no-such-flag"]
# What numbers count, by the end of their names; the help of the other numbers explains itself.
UNITS = {
    "epochs": "epochs", "every": "epochs", "images": "images", "batch_size": "a step",
    "width": "channels", "channels": "channels", "blocks": "blocks", "depth": "blocks",
    "patch_size": "pixels", "steps": "steps", "decay": "a step", "dropout": "share",
    "seed": "seed", "weight": "weight",
}  # fmt: skip

# What a shell can pass: any text, and any bytes, but for zeros.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
texts |= st.binary().map(lambda content: os.fsdecode(content.replace(b"\0", b"")))
values = (
    texts
    | st.integers().map(str)
    | st.floats().map(repr)
    | st.sampled_from(["1_0", "0x10", "1e3", "-1", "nan"])
)
# The same examples every time, so that a change that turns a test red is to blame for it.
examples = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def parse(experiment):
    """A function that gives the script a command line; returns what it understood (None: it
    refused) and its error."""
    module = load_script(experiment.path)

    def parse(*arguments):
        parsed = []
        module.main = lambda argv: parsed.append(module.parse_command_line(argv))
        status, error = answer(module, arguments)
        if status == 0:
            return parsed[0] if parsed else {}, error  # nothing with --help
        assert status == 2
        assert len(error.splitlines()) == 1
        assert error.startswith("error: ")
        return None, error

    return parse


def numbers_of(module):
    """Name, type, limits and divisor of each number that a command line may hold."""
    for field in dataclasses.fields(module.Settings):
        if type(field.default) in (int, float):
            rules = field.metadata
            limits = rules["low"], rules["high"], rules["multiple"]
            yield field.name, type(field.default), *limits


@on_v3
@examples
@given(st.data())
def test_any_value_of_any_flag_is_accepted_or_gets_one_line(module, parse, data):
    fields = {module.flag(field.name)[2:]: field for field in dataclasses.fields(module.Settings)}
    flag, value = data.draw(st.sampled_from([*fields, *OTHER_FLAGS])), data.draw(values)
    together = data.draw(st.booleans())
    understood, error = parse(*([f"--{flag}={value}"] if together else [f"--{flag}", value]))
    if understood is None:
        assert f"--{flag}" in error or (not together and "unrecognized arguments" in error)
    elif flag in fields and isinstance(fields[flag].default, str):
        assert understood[fields[flag].name] == value
        assert value in (fields[flag].metadata["choices"] or [value])


@on_v3
@examples
@given(st.data())
def test_number_is_taken_exactly_or_answered_with_its_range(module, parse, data):
    name, kind, low, high, multiple = data.draw(st.sampled_from(list(numbers_of(module))))
    anything, within = st.integers(), st.integers(int(low), int(high))
    if kind is float:
        anything, within = st.floats(), st.floats(low, high)
    near = st.sampled_from([low - 1, low, high, high + 1, 2 * high + 1])
    divisible = within.map(lambda number: number // (multiple or 1) * (multiple or 1))
    number = data.draw(anything | within | divisible | near)
    understood, error = parse("--sample-only", f"--{name.replace('_', '-')}={number!r}")
    if not low <= number <= high:
        limits = re.search(r" is not (\S+) to ([^\s,]+)", error).groups()
        assert [float(limit) for limit in limits] == [low, high]
    elif multiple and number % multiple:
        assert f", a multiple of {multiple}" in error
    else:
        assert repr(understood[name]) == repr(kind(number))
    assert not error or f"--{name.replace('_', '-')}" in error


@on_v3
@examples
@given(st.data())
def test_any_command_line_is_accepted_or_gets_one_line(module, parse, data):
    names = [module.flag(field.name) for field in dataclasses.fields(module.Settings)]
    flags = st.sampled_from([*names, *(f"--{name}" for name in OTHER_FLAGS)])
    parse(*data.draw(st.lists(flags | texts | st.tuples(flags, values).map("=".join))))


@on_v3
@examples
@given(
    texts
    | st.sampled_from(
        ["auto", "cpu", "cpu:1", "cuda", "cuda:0", "cuda:99", "cuda:x", "mps", "meta", "xla"]
    )
)
def test_any_device_is_there_or_is_answered(module, name):
    try:
        assert module.pick_device(name).type in ("cpu", "cuda", "mps")
    except module.ExperimentError as error:
        assert repr(name) in str(error)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file, below which no folder can be."""
    path = tmp_path_factory.mktemp("file") / "file"
    path.write_text("no folder")
    return path


@on_v3
@pytest.mark.parametrize("flag", ["--output-dir", "--data-dir"])
@examples
@given(
    name=texts.map(lambda text: text.replace("/", "")).filter(
        lambda text: text not in ("", ".", "..")
    )
)
def test_any_folder_that_cannot_be_is_answered_in_one_line(module, file, flag, name):
    """A path may be too long, or hold line breaks and bytes that are no text."""
    refusal(
        module,
        [
            "--quick",
            "--device=cpu",
            f"--output-dir={file.parent / 'output'}",
            f"{flag}={file}/{name}",
        ],
    )


@every_script
def test_lowest_numbers_work(module, tiny_data_dir, tmp_path):
    lowest = {
        name: low or int(name.endswith("epochs")) for name, _, low, _, _ in numbers_of(module)
    }
    del lowest["num_samples"]
    where = [f"--output-dir={tmp_path}", f"--data-dir={tiny_data_dir}", "--device=cpu"]
    numbers = [f"--{name.replace('_', '-')}={low}" for name, low in lowest.items()]
    assert answer(module, [*where, *numbers]) == (0, "")
    assert answer(module, [*where, "--sample-only", "--num-samples=1"]) == (0, "")


@every_script
def test_help_of_a_count_names_its_unit(module):
    for field in dataclasses.fields(module.Settings):
        for end, unit in UNITS.items():
            if type(field.default) in (int, float) and f"_{field.name}".endswith(f"_{end}"):
                assert unit in field.metadata["help"], field.name
