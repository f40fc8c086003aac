"""What the scripts share is identical in all of them, what a script defines it uses, the harness
asks an experiment for what its opening comment says, and a script stands alone.

`sync_shared.py` tells what has drifted and mends it; its own tests are below, on made-up scripts.
"""

import ast
import builtins
import re
import sys

import pytest

import sync_shared
from conftest import run_script

SCRIPTS = sync_shared.find_scripts()
IMPORT_NAMES = {"scikit-learn": "sklearn"}  # packages whose import name is not their own name
LIMITS = {"CNN": 400, "Transformer": 450, "UNet": 450, "v1": 530, "v2": 530}
LIMITS["v3"] = 560 + 82  # for its optional student, and a decoder that learns from samples

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=sync_shared.version_of)


def names(text, kind):
    """The names that a text uses in that way, which is a class of ast."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)]
    return {node.id for node in nodes if isinstance(node.ctx, kind)}


def bound(text):
    """Every name that a text binds anywhere: definitions, imports, arguments, variables."""
    found = names(text, ast.Store)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, (ast.arg, ast.ExceptHandler, ast.FunctionDef, ast.ClassDef)):
            found.add(node.arg if isinstance(node, ast.arg) else node.name)
    return found


def texts(script):
    return ["\n".join(half) for half in sync_shared.halves(script)]


def test_what_is_shared_is_identical():
    problems = sync_shared.check(SCRIPTS)
    assert not problems, "\n\n".join(["", *problems])


@each_script
def test_experiment_is_short(script):
    assert len(sync_shared.halves(script)[0]) <= LIMITS.get(script.parent.name, 560)


def test_harness_asks_for_what_its_opening_comment_says():
    """And the names of that comment are those in which the experiments differ, and `option`."""
    harness = texts(SCRIPTS[0])[1]
    comment = harness.split("import ")[0].split("It offers")[0]
    listed = re.findall(r"^#   (\w+)(?:\(.*?\))?(?:, (\w+))?", comment, re.MULTILINE)
    listed = {name for pair in listed for name in pair if name}
    used = names(harness, ast.Load) - bound(harness) - set(dir(builtins)) - {"__file__"}
    assert used == listed | {"option"}
    assert listed == sync_shared.EXCEPTIONS | {"option"}
    for script in SCRIPTS:
        for node in ast.parse(texts(script)[0]).body:
            if isinstance(node, ast.FunctionDef) and node.name in listed - {"option"}:
                arguments = ", ".join(each.arg for each in node.args.args)
                assert f"{node.name}({arguments})" in comment


@each_script
def test_experiment_and_harness_define_different_names(script):
    above, below = [
        {name for node in ast.parse(text).body for name in sync_shared.names_defined_by(node)}
        for text in texts(script)
    ]
    assert above & below == set()


def unused(path):
    """Names that a script defines and does not use but in their own definition."""
    defined, used = set(), set()
    for node in ast.parse(path.read_bytes()).body:
        own = set(sync_shared.names_defined_by(node))
        defined |= own
        used |= names(ast.unparse(node), ast.Load) - own
    return defined - used


@each_script
def test_every_definition_of_an_experiment_is_used_in_its_own_file(script):
    experiment = ast.parse(texts(script)[0]).body
    own = {name for node in experiment for name in sync_shared.names_defined_by(node)}
    assert unused(script) & own == set()


def test_every_definition_of_the_harness_is_used_in_some_script():
    assert set.intersection(*map(unused, SCRIPTS)) == set()


@each_script
def test_script_imports_nothing_of_this_repository(script):
    lines = (sync_shared.REPOSITORY / "requirements.txt").read_text().splitlines()
    packages = [re.match(r"[\w.-]+", line).group() for line in lines if line and line[0] != "#"]
    allowed = {IMPORT_NAMES.get(name, name) for name in packages} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(script.read_bytes())):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported = [node.module]
        assert {name.split(".")[0] for name in imported} <= allowed | {"PIL"}  # with matplotlib


# The tool itself

SHARED = '''import functools

# Larger is
# slower.
SIZE = 3


@functools.cache
def area(width):
    return width * SIZE
    # the end


class Box:
    pass


def sample():
    print(area(2), Box)


# ==== THE HARNESS ====
def main():
    """The end."""
    sample()
'''


@pytest.fixture
def repository(tmp_path):
    """Three scripts: `first` and `second` are the same, `third` shares with them a name alone."""
    third = "def sample():\n    pass\n\n\n" + SHARED[SHARED.index("# =") :]
    texts = {"ImageDiffusionModel/first": SHARED, "LatentDiffusionModel/second": SHARED}
    for folder, text in (texts | {"LatentDiffusionModel/third": third}).items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "script_model_train_test.py").write_text(text)
    return tmp_path


@pytest.fixture
def scripts(repository):
    return sync_shared.find_scripts(repository)


@pytest.fixture
def start(repository, capsys):
    """A function that starts the tool and returns its exit status and what it said."""

    def start(*arguments, exceptions=("sample",)):
        try:
            status = sync_shared.main([*map(str, arguments)], repository, {*exceptions})
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr()
        return status, said.out + said.err.split("error: ")[-1]

    return start


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("area", "@functools.cache\n", ""),
        ("area", "    # the end\n", ""),
        ("SIZE", "# Larger is\n", "# Larger, said the author, is\n"),
        ("SIZE", "SIZE = 3", "SIZE = 3  # cm"),
        ("Box", "    pass", "    pass\r"),
        ("", "    sample()\n", "    sample()\n\n\ndef helper():\n    pass\n"),
    ],
)
def test_drift_is_told_and_the_command_that_is_told_mends_it(scripts, start, name, old, new):
    first, second, third = scripts
    assert start("--check") == (0, "")
    assert SHARED.count(old) == 1
    second.write_bytes(SHARED.replace(old, new).encode())
    status, message = start("--check")
    assert status == 1
    assert message.count("has more than one meaning") == 1
    assert f"{name or 'the harness'} has more than one meaning" in message
    command = "python tests/sync_shared.py --from ImageDiffusionModel/first/"
    assert f"{command}script_model_train_test.py {name}".strip() + "\n" in message
    before = first.read_bytes(), third.read_bytes()
    changed = "changed LatentDiffusionModel/second/script_model_train_test.py\n"
    assert start("--from", first, *name.split()) == (0, changed)
    assert second.read_bytes() == first.read_bytes()
    assert (first.read_bytes(), third.read_bytes()) == before
    assert start("--check") == (0, "")
    own = third.read_text().split("#")[0]
    second.write_bytes(SHARED.replace(old, new).encode())
    start("--from", second)  # everything
    assert first.read_bytes() == second.read_bytes()
    assert third.read_text() == own + second.read_text()[second.read_text().index("# ==") :]


def test_exceptions_may_differ_but_must_not_be_stale(start):
    assert start("--check", exceptions=())[0] == 1
    for stale in ("area", "no_such_name"):  # identical everywhere; defined nowhere
        status, message = start("--check", exceptions=("sample", stale))
        assert status == 1
        assert f"{stale} differs in no two scripts" in message


@pytest.mark.parametrize(
    "text", ["", SHARED + "# THE HARNESS\n", "A = B = 1\n" + SHARED, "def broken(:\n" + SHARED]
)
def test_script_that_cannot_be_compared_is_named_in_one_line(scripts, start, text):
    scripts[1].write_text(text)
    for arguments in (["--check"], ["--from", scripts[0]], ["--from", scripts[1]]):
        status, message = start(*arguments)
        assert status == 2
        assert sync_shared.label(scripts[1]) in message and message.count("\n") == 1
    assert scripts[1].read_text() == text


@pytest.mark.parametrize("name", ["sample", "main", "no_such_name"])
def test_copy_refuses_names_that_are_not_shared(scripts, start, name):
    status, message = start("--from", scripts[0], name)
    assert (status, name in message) == (2, True)


def test_the_tool_runs_from_the_command_line():
    done = run_script(sync_shared.__file__, "--check")
    assert done.returncode in (0, 1) and done.stderr == ""  # what it finds is a test's above
    done = run_script(sync_shared.__file__, "--check", "area")
    assert done.returncode == 2 and "takes no names" in done.stderr
