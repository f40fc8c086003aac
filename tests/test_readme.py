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
import json
import re
import shlex
import sys
import textwrap

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
    found = blocks(experiment.path.with_name("README.md"), "python")
    [example] = [text for text in found if "load_trained" in text]
    names = {}
    exec(re.sub(r"^  ", "", example, flags=re.MULTILINE), names)
    images, said = names["images"], re.search(r"# uint8 \((.*)\)$", example, re.MULTILINE)[1]
    assert images.dtype == torch.uint8 and ", ".join(map(str, images.shape)) == said


QUOTE = re.compile(
    r"script_model_train_test\.py\W+lines (\d+)-(\d+)[^\n]*\n+```python\n(.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def quote_problems(readme):
    """Code that is not what stands in the lines of the script that are named above it, and code
    without such lines that is no example of a library either."""
    text = read(readme)
    lines = read(readme.with_name("script_model_train_test.py")).splitlines()
    quotes, problems = QUOTE.findall(text), []
    for first, last, quote in quotes:
        length = quote.count("\n")
        found = [
            f"{start + 1}-{start + length}"
            for start in range(len(lines))
            if textwrap.dedent("\n".join(lines[start : start + length])) + "\n" == quote
        ]
        if f"{first}-{last}" not in found:
            where = f"it stands in lines {found[0]}" if found else "it stands nowhere"
            problems.append(f"lines {first}-{last} are not the code below them: {where}")
    known = [quote for _, _, quote in quotes]
    for block in blocks(readme, "python"):
        if block not in known and "load_trained" not in block:
            problems.append(f"no lines named above {block.splitlines()[0]!r}")
    return problems


@every_script
def test_its_quoted_code_is_that_of_the_script(experiment):
    assert quote_problems(experiment.path.with_name("README.md")) == []


# --- Figures that stand in two places -------------------------------------------------------------

# A column of a table whose first column is "version": its key in leaderboard.json, and its unit.
FIGURES = {
    "parameters": ("parameters", 1e-6),
    "evaluations": ("evaluations", 1),
    "s per 1,000 images": ("seconds_per_1000_images", 1),
    "FMD": ("fmd", 1),
    "FMD, of blur": ("percent_of_blur", 1),
    "SWD, of blur": ("swd_percent_of_blur", 1),
    "worst of blur": ("worst_percent_of_blur", 1),
    "detail": ("detail", 1),
    "coverage": ("coverage", 1),
    "accuracy": ("accuracy", 100),
    "near-copies": ("copying", 100),
}


def leaderboard_rows():
    """The rows of leaderboard.json by the names that READMEs have for them."""
    board = json.loads(read(REPOSITORY / "tests" / "benchmarks" / "leaderboard.json"))
    rows = {row["version"].split("/")[1]: row for row in board["versions"]}
    return rows | {"real training images": board["floors"][0]}


def figure_problems(readme, rows=None):
    rows, header, problems = rows or leaderboard_rows(), [], []
    for line in read(readme).splitlines():
        cells = [cell.strip(" *") for cell in line.strip().strip("|").split("|")]
        if not line.lstrip().startswith("|"):
            header = []
        elif not header:
            header = cells
        elif header[0] == "version":
            name = re.sub(r"\[`?([\w/]*/)?([\w ]+)`?\]\(.*", r"\2", cells[0]).strip("`")
            for column, text in zip(header[1:], cells[1:]):
                key, unit = FIGURES.get(column, (None, 1))
                stated = re.match(r"([\d.]+)\D*?(?:± ([\d.]+).*)?$", text.split("(")[0].strip())
                if name not in rows or key is None or not stated:
                    continue
                for figure, value in zip(stated.groups(), (key, f"{key}_spread")):
                    decimals = len((figure or "").partition(".")[2])
                    measured = rows[name].get(value)
                    wanted = measured and f"{unit * measured:.{decimals}f}"
                    if figure and figure != wanted:
                        problems.append(f"{name}, {column}: {figure}, measured {wanted}")
    return problems


@every_readme
def test_its_figures_are_those_of_the_leaderboard(readme):
    assert figure_problems(readme) == []


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


BAD_VERSION = """
`script_model_train_test.py`, lines 2-3:

```python
def loss(x):
    return x
```

`script_model_train_test.py`, lines 1-2:

```python
x = 1
```

```python
y = 2
```

| version | FMD, of blur | coverage | accuracy | remark |
|---|---|---|---|---|
| CNN | **24.54% ± 0.76%** | 0.75 ± 0.01 | - | 7 |
| [`a/UNet`](a/UNet) | 3% | 0.887 | 94.9% | 8 |
| another | 3% | 1 | 2 | 3 |

| sampler | FMD, of blur |
|---|---|
| CNN | 1% |
"""


def test_the_checks_of_versions_find_what_is_wrong(tmp_path):
    (tmp_path / "README.md").write_text(BAD_VERSION)
    script = "import x\n\n    def loss(x):\n        return x\n"
    (tmp_path / "script_model_train_test.py").write_text(script)
    assert quote_problems(tmp_path / "README.md") == [
        "lines 2-3 are not the code below them: it stands in lines 3-4",
        "lines 1-2 are not the code below them: it stands nowhere",
        "no lines named above 'y = 2'",
    ]
    rows = {
        "CNN": {"percent_of_blur": 24.551, "percent_of_blur_spread": 0.764, "coverage": 0.753},
        "UNet": {"percent_of_blur": 3.01, "coverage": 0.8871, "accuracy": 0.9483},
    }
    rows["CNN"] |= {"coverage_spread": 0.0048, "accuracy": None}
    assert figure_problems(tmp_path / "README.md", rows) == [
        "CNN, FMD, of blur: 24.54, measured 24.55",
        "CNN, coverage: 0.01, measured 0.00",
        "UNet, accuracy: 94.9, measured 94.8",
    ]
