"""What several scripts share is identical in all of them, what a script defines it uses, and it stands alone.

`sync_shared.py` says what counts as shared and mends what has drifted; its own tests are below, on made-up scripts.
"""

import ast
import re
import subprocess
import sys

import pytest

import sync_shared

SCRIPTS = sync_shared.find_scripts()
IMPORT_NAMES = {"scikit-learn": "sklearn"}  # packages whose import name is not their own name

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=sync_shared.version_of)


def unused_definitions(path):
    """Names that the script defines at top level and mentions nowhere else in its code."""
    defined, used = set(), set()
    for node in ast.parse(path.read_bytes(), filename=str(path)).body:
        names = set(sync_shared.names_defined_by(node))
        loaded = {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Load)}
        defined |= names
        used |= loaded - names  # a function that only calls itself is not used
    return defined - used


def foreign_imports(path):
    """Imports of a script that neither the standard library nor a package of requirements.txt provides."""
    lines = (sync_shared.REPOSITORY / "requirements.txt").read_text().splitlines()
    packages = {re.match(r"[\w.-]+", line).group() for line in lines if line and not line.startswith("#")}
    allowed = sys.stdlib_module_names | {IMPORT_NAMES.get(name, name) for name in packages}
    allowed |= {"PIL"}  # comes with matplotlib and torchvision
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
        if isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] not in allowed}


def test_shared_definitions_are_identical():
    problems = sync_shared.check(SCRIPTS, sync_shared.EXCEPTIONS)
    assert not problems, "\n\n".join(["", *problems])


@each_script
def test_every_definition_is_used_in_its_own_file(script):
    assert unused_definitions(script) == set()


@each_script
def test_scripts_import_nothing_of_this_repository(script):
    assert foreign_imports(script) == set()


# ------------------------------------------------------------------------------------------------ the tool itself

SHARED = """import functools

# Larger is
# slower.
SIZE = 3


@functools.cache
def area(width):
    return width * SIZE
    # the end


class Box:
    pass


def main():
    print(area(2), Box)
"""


@pytest.fixture
def repository(tmp_path):
    """Three scripts; `first` and `second` are the same, `third` shares nothing but its `main`."""
    for folder, text in [
        ("ImageDiffusionModel/first", SHARED),
        ("LatentDiffusionModel/second", SHARED),
        ("LatentDiffusionModel/third", "def main():\n    print(area(2), Box)\n"),
    ]:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "script_model_train_test.py").write_text(text)
    return tmp_path


def path_of(repository, name):
    return next(path for path in sync_shared.find_scripts(repository) if path.parent.name == name)


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def run_check(repository, capsys, exceptions=None):
    status = sync_shared.main(["--check"], repository, exceptions or {})
    return status, capsys.readouterr().out


DRIFTS = [
    ("area", "width * SIZE", "SIZE * width"),
    ("area", "@functools.cache\n", ""),
    ("area", "    # the end\n", ""),
    ("SIZE", "SIZE = 3", "SIZE = 4"),
    ("SIZE", "SIZE = 3", "SIZE: int = 3"),
    ("SIZE", "# Larger is\n", "# Larger, said the author, is\n"),
    ("SIZE", "SIZE = 3", "SIZE = 3  # cm"),
    ("Box", "class Box:\n    pass", "class Box:\n    # empty\n    pass"),
]


def test_check_accepts_identical_definitions(repository, capsys):
    assert run_check(repository, capsys) == (0, "")


@pytest.mark.parametrize(("name", "old", "new"), DRIFTS)
def test_check_reports_drift_and_the_command_it_prints_mends_it(repository, capsys, name, old, new):
    first, second = path_of(repository, "first"), path_of(repository, "second")
    edit(second, old, new)
    status, message = run_check(repository, capsys)
    assert status == 1
    assert message.count("has more than one meaning") == 1
    assert f"{name} has more than one meaning" in message
    changed = tuple(part for part in map(str.strip, f"{old}\n{new}".split("\n")) if part)
    assert any(line[0] in "+-" and line.strip().endswith(changed) for line in message.split("\n") if line)
    command = f"python tests/sync_shared.py --from ImageDiffusionModel/first/script_model_train_test.py {name}"
    assert command in message

    before = first.read_bytes()
    assert sync_shared.main(["--from", str(first), name], repository, {}) == 0
    assert second.read_bytes() == first.read_bytes() == before
    assert run_check(repository, capsys)[0] == 0


def test_copy_without_names_mends_everything_and_adds_nothing(repository, capsys):
    first, second, third = (path_of(repository, name) for name in ("first", "second", "third"))
    edit(first, "SIZE = 3", "SIZE = (\n    4\n)")
    edit(first, "    pass", '    """A box."""')
    edit(third, "print(", "print(2, ")
    before = third.read_text()
    sync_shared.main(["--from", str(first)], repository, {"main": "differs"})
    assert second.read_bytes() == first.read_bytes()
    assert third.read_text() == before
    assert capsys.readouterr().out == "changed LatentDiffusionModel/second/script_model_train_test.py\n"


def test_copy_of_one_name_leaves_the_others_alone(repository):
    first, second = path_of(repository, "first"), path_of(repository, "second")
    edit(first, "SIZE = 3", "SIZE = 4")
    edit(first, "    pass", '    """A box."""')
    sync_shared.main(["--from", str(first), "SIZE"], repository, {})
    assert "SIZE = 4" in second.read_text()
    assert "A box." not in second.read_text()


def test_exceptions_may_differ_but_must_not_be_stale(repository, capsys):
    edit(path_of(repository, "third"), "print(", "print(2, ")
    assert run_check(repository, capsys)[0] == 1
    assert run_check(repository, capsys, {"main": "each has its own"}) == (0, "")
    for stale in ("area", "no_such_name"):  # identical everywhere; defined nowhere
        status, message = run_check(repository, capsys, {"main": "each has its own", stale: "no reason"})
        assert status == 1
        assert f"{stale} is a stale exception" in message


def test_line_ends_count(repository, capsys):
    path = path_of(repository, "second")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert run_check(repository, capsys)[0] == 1


@pytest.mark.parametrize("text", ["A = 1\nA = 2\n", "A = B = 1\n", "A, B = 1, 2\n", "def broken(:\n"])
def test_a_script_that_cannot_be_compared_is_named(repository, capsys, text):
    path = path_of(repository, "second")
    path.write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        run_check(repository, capsys)
    assert exit_info.value.code == 2
    assert sync_shared.label(path) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["main", "no_such_name"])
def test_copy_refuses_names_that_are_not_shared(repository, capsys, name):
    edit(path_of(repository, "third"), "print(", "print(2, ")
    with pytest.raises(SystemExit) as exit_info:
        sync_shared.main(["--from", str(path_of(repository, "first")), name], repository, {"main": "its own"})
    assert exit_info.value.code == 2
    assert name in capsys.readouterr().err


def test_check_takes_no_names(repository, capsys):
    with pytest.raises(SystemExit) as exit_info:
        sync_shared.main(["--check", "area"], repository, {})
    assert exit_info.value.code == 2
    assert "--check" in capsys.readouterr().err


def test_the_tool_runs_from_the_command_line():
    command = [sys.executable, sync_shared.__file__, "--check"]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert completed.returncode in (0, 1) and completed.stderr == ""  # what it finds is the first test's affair


def test_unused_definitions_are_found(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        "USED = 1\nIDLE = 2\n\ndef recursive():\n    return recursive()\n\ndef main():\n    print(USED)\n\nmain()\n"
    )
    assert unused_definitions(path) == {"IDLE", "recursive"}


def test_foreign_imports_are_found(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import os, torch.nn\nfrom PIL import Image\nfrom sklearn import manifold\nimport helpers\n")
    assert foreign_imports(path) == {"helpers"}
    path.write_text("def f():\n    from . import helpers\n    from tests.conftest import run_script\n")
    assert foreign_imports(path) == {".", "tests.conftest"}
