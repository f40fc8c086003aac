"""Whatever is typed, a script takes it or says in one line what is wrong with it."""

import dataclasses
import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import load_script
from script_runs import answer, every_script, on_v3, refusal

OTHER_FLAGS = ["help", "no-such-flag"]
DEVICES = ["auto", "cpu", "cpu:1", "cuda", "cuda:0", "cuda:99", "cuda:x", "mps", "meta", "xla"]

# What a shell can pass: any text, and any bytes, but for zeros.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
texts |= st.binary().map(lambda content: os.fsdecode(content.replace(b"\0", b"")))
values = texts | st.integers().map(str) | st.floats().map(repr)
values |= st.sampled_from(["1_0", "0x10", "1e3", "-1", "nan"])
names_of_files = texts.map(lambda text: text.replace("/", ""))
names_of_files = names_of_files.filter(lambda text: text not in ("", ".", ".."))
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
        assert (status, len(error.splitlines()), error[:7]) == (2, 1, "error: ")
        return None, error

    return parse


def numbers_of(module):
    """Name, type, limits and divisor of each number that has limits."""
    for field in dataclasses.fields(module.Settings):
        rules = field.metadata
        if rules["low"] is not None:
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
        limits = re.search(r" is not (\S+) to (\S+)", error).groups()
        assert [float(limit.replace(",", "")) for limit in limits] == [low, high]
    elif multiple and number % multiple:
        assert f", a multiple of {multiple}" in error
    else:
        assert repr(understood[name]) == repr(kind(number))
    assert not error or f"--{name.replace('_', '-')}" in error


@on_v3
@examples
@given(texts | st.sampled_from(DEVICES))
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
@given(name=names_of_files)
def test_any_folder_that_cannot_be_is_answered_in_one_line(module, file, flag, name):
    """A path may be too long, or hold line breaks and bytes that are no text."""
    output = f"--output-dir={file.parent / 'output'}"
    refusal(module, ["--quick", "--device=cpu", output, f"{flag}={file}/{name}"])


@every_script
def test_lowest_numbers_work(module, tiny_data_dir, tmp_path):
    lowest = {name: low for name, _, low, _, _ in numbers_of(module) if name != "num_samples"}
    where = [f"--output-dir={tmp_path}", f"--data-dir={tiny_data_dir}", "--device=cpu"]
    numbers = [f"{module.flag(name)}={low}" for name, low in lowest.items()]
    assert answer(module, [*where, *numbers]) == (0, "")
    assert answer(module, [*where, "--sample-only", "--num-samples=1"]) == (0, "")


@every_script
def test_settings_have_values_for_each_device_and_for_quick(module):
    fields = {field.name: field for field in dataclasses.fields(module.Settings)}
    slow, fast = (module.default_settings(torch.device(name)) for name in ("cpu", "cuda"))
    assert slow.keys() == fields.keys()
    assert slow["epochs"] < fast["epochs"]
    assert module.default_settings(torch.device("mps")) == slow
    for device, values in (("cpu", slow), ("cuda", fast)):
        quick = module.default_settings(torch.device(device), quick=True)
        module.Settings(**values), module.Settings(**quick)  # which are within their limits
        assert quick["epochs"] <= 3 and quick["train_images"] < 2000
        tiny = {name: field.metadata["quick"] for name, field in fields.items()}
        assert quick == values | {name: value for name, value in tiny.items() if value is not None}
