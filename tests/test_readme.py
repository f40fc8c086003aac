"""Every README can be followed: links and pictures resolve, commands and their flags exist, paths
are portable, and what a version's README says of its script is so.

Each check is a function from one README to its list of problems; at the end they are tried on a
made-up README that has all of them.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import re
import shlex
import sys

import pytest
import torch

from conftest import REPOSITORY
from script_runs import every_script
from sync_shared import halves, load_script

READMES = sorted(
    path
    for pattern in ("README.md", "*Model/**/README.md", "tests/**/README.md")
    for path in REPOSITORY.glob(pattern)
    if "output" not in path.parts
)
IGNORED_BY_GIT = {"data", "output"}

# All the set-up there is: one line installs and runs the main job, one installs and passes the
# tests.
SET_UP = [
    "pip install -r requirements.txt && python LatentDiffusionModel/v3/script_model_train_test.py",
    "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest tests",
]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)

every_readme = pytest.mark.parametrize(
    "readme", READMES, ids=lambda path: path.relative_to(REPOSITORY).as_posix()
)


def read(path):
    return path.read_text(encoding="utf-8")


def prose(path):
    """A README without its fenced blocks."""
    return FENCE.sub("", read(path))


def blocks(path, language=None):
    """The fenced blocks of a README, or those in a language."""
    found = FENCE.findall(read(path))
    return [text for name, text in found if language is None or name == language]


def anchors(path):
    """Anchors that GitHub gives the headings of a Markdown file."""
    headings = re.findall(r"^#+ +(.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_problems(readme, repository=REPOSITORY):
    text = re.sub(r"`[^`\n]*`", "", prose(readme))
    targets = re.findall(r"\]\(([^)\s]+)", text)
    targets += re.findall(r"^ *\[[^\]]+\]: *(\S+)", text, re.MULTILINE)
    targets += re.findall(r"""\b(?:src|href)=["']([^"']+)""", text)
    problems = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (readme.parent / name).resolve() if name else readme
        if not path.is_relative_to(repository) or not path.exists():
            problems.append(f"{target}: no such file in the repository")
        elif IGNORED_BY_GIT & set(path.relative_to(repository).parts):
            problems.append(f"{target}: git ignores this file, so readers don't have it")
        elif anchor and anchor not in anchors(path):
            problems.append(f"{target}: no such heading")
    return problems


def commands(readme):
    """Yield (folder below the README, arguments) for every command in the fenced blocks; `cd` is
    followed."""
    for block in blocks(readme):
        folder = "."
        for line in block.replace("\\\n", "").splitlines():
            for part in re.split(r"&&|;|\|", line):
                try:
                    arguments = shlex.split(part, comments=True)
                except ValueError:
                    continue  # other text, not a command
                if arguments[:1] == ["cd"]:
                    folder = f"{folder}/{arguments[1]}"
                elif arguments:
                    yield folder, arguments


@functools.cache
def known_flags(path):
    """Flags that the --help of a script or tool names."""
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), "--help"])
        with pytest.raises(SystemExit):
            load_script(path).main()
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text.getvalue()))


def command_problems(readme, repository=REPOSITORY):
    problems = []
    for folder, arguments in commands(readme):
        # A README speaks from its own folder or from the repository's root.
        bases = [base / folder for base in (readme.parent, repository)]
        files, flags = [], set()
        if arguments[:3] == ["python", "-m", "pytest"]:
            files = [each.split("::")[0] for each in arguments[3:] if each.startswith("tests")]
        elif arguments[0] == "python":
            files = arguments[1:2]
            flags = {each.split("=")[0] for each in arguments[2:] if each.startswith("--")}
        elif arguments[:2] == ["pip", "install"]:
            files = [value for flag, value in itertools.pairwise(arguments) if flag == "-r"]
        for name in files:
            found = [base / name for base in bases if (base / name).exists()]
            line = " ".join(arguments)
            if not found:
                problems.append(f"{line}: there is no {name}")
            elif flags:
                unknown = sorted(flags - known_flags(found[0].resolve()))
                problems += [f"{line}: {name} --help knows no {flag}" for flag in unknown]
    return problems


def absolute_path_problems(readme):
    text = re.sub(r"[a-z]+://\S+", "", read(readme))
    found = re.findall(
        r"""(?:^|[\s"'`(=])(/[A-Za-z][\w.-]*/[^\s"'`)]*|/(?:root|tmp|opt|mnt)\b)""", text
    )
    found += re.findall(r"""\b[A-Za-z]:\\[^\s"'`)]*""", text)
    return [f"{path}: an absolute path of one machine" for path in found if path != "/dev/null"]


@every_readme
@pytest.mark.parametrize("check", [link_problems, command_problems, absolute_path_problems])
def test_it_can_be_followed(check, readme):
    assert check(readme) == []


def test_root_readme_and_ci_run_the_same():
    lines = "\n".join(blocks(REPOSITORY / "README.md")).splitlines()
    assert set(SET_UP) <= set(lines)
    ci_script = read(REPOSITORY / ".ci" / "run")
    install, test = SET_UP[1].split(" && ")
    assert re.findall(r"^pip install .*", ci_script, re.MULTILINE) == [install]
    assert re.findall(r"^(python -m pytest.*?) --faults ", ci_script, re.MULTILINE) == [test]


# --- A version's README and its script ------------------------------------------------------------


@every_script
def test_it_says_where_the_experiment_ends(experiment):
    readme = experiment.path.with_name("README.md")
    count = len("\n".join(halves(experiment.path)[0]).rstrip().split("\n"))
    wanted = f"Lines 1 to {count} of the script are the experiment; below the line stands the "
    assert f"{wanted}harness, the same in all six." in " ".join(read(readme).split())


def default_text(field):
    """A setting's default as the tables of flags have it."""
    text = "off" if field.default is False else str(field.default)
    gpu = field.metadata["gpu"]
    return text if gpu is None else f"{text}, on a GPU {gpu}"


@every_script
def test_its_table_of_flags_is_complete_and_right(experiment):
    readme = read(experiment.path.with_name("README.md"))
    rows = re.findall(r"^\| `(--[\w-]+).*?` \| (.*?) ?\| ", readme, re.MULTILINE)
    script = load_script(experiment.path)
    settings = {script.flag(field.name): field for field in dataclasses.fields(script.Settings)}
    assert dict(rows) == {flag: default_text(field) for flag, field in settings.items()}
    assert len(rows) == len(settings)


@every_script
def test_its_example_of_a_library_runs(experiment, module, output, monkeypatch):
    monkeypatch.chdir(output.parent)  # where `output` is a trained run's
    monkeypatch.setitem(sys.modules, "script_model_train_test", module)
    [example] = blocks(experiment.path.with_name("README.md"), "python")
    names = {}
    exec(re.sub(r"^  ", "", example, flags=re.MULTILINE), names)
    images, said = names["images"], re.search(r"# uint8 \((.*)\)$", example, re.MULTILINE)[1]
    assert images.dtype == torch.uint8 and ", ".join(map(str, images.shape)) == said


# --- The checks themselves ------------------------------------------------------------------------

BAD_README = """
# A `model`, in short
[a](Model) [b](Model/script.py) [c](https://x.org/none) [d](#a-model-in-short) `[e](none.md)`
[![1](none.png)](none.md) ![2](output/grid.png) [3](../..) [4](#none) <img src="none.gif">

[5]: none.txt

```bash
pip install -r requirements.txt -r none.txt && python -m pytest tests/none.py::test
cd Model
python script.py --epochs 3
python script.py --epochs=3 \\
    --fast
python Model/script.py  # a comment
```
See `/home/me/data`, either/or, `output/samples`, https://x.org/home/me, u / 2; > /dev/null
"""


SCRIPT = """
import argparse


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs")
    parser.parse_args()
"""


def test_the_checks_find_what_is_wrong(tmp_path):
    for folder in ("Model", "output"):
        (tmp_path / folder).mkdir()
    (tmp_path / "output" / "grid.png").touch()
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "Model" / "script.py").write_text(SCRIPT)
    readme = tmp_path / "README.md"
    readme.write_text(BAD_README)
    found = {problem.split(":")[0] for problem in link_problems(readme, tmp_path)}
    assert found == {
        "none.png", "none.md", "output/grid.png", "../..", "#none", "none.gif", "none.txt"
    }  # fmt: skip
    found = [problem.split(": ")[1] for problem in command_problems(readme, tmp_path)]
    missing = [f"there is no {name}" for name in ("none.txt", "tests/none.py", "Model/script.py")]
    assert found == [*missing[:2], "script.py --help knows no --fast", missing[2]]
    assert absolute_path_problems(readme) == ["/home/me/data: an absolute path of one machine"]
