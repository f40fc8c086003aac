"""Every README can be followed: links and pictures resolve, commands and their flags exist, paths
are portable, and what a version's README says of its script is so."""

import contextlib
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
from flag_tables import flag_table
from script_runs import every_script
from sync_shared import halves, load_script

READMES = sorted(
    path
    for pattern in ("README.md", "*Model/**/README.md", "tests/**/README.md")
    for path in REPOSITORY.glob(pattern)
    if not {"output", ".pytest_cache"} & {*path.parts}
)
IGNORED_BY_GIT = {"data", "output"}

# All the set-up there is: one line runs the main job, the other passes the tests.
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


@every_readme
def test_its_links_and_pictures_are_there(readme):
    text = re.sub(r"`[^`\n]*`", "", prose(readme))
    targets = re.findall(r"\]\(([^)\s]+)", text)
    targets += re.findall(r"""\b(?:src|href)=["']([^"']+)""", text)
    own = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert own
    for target in own:
        name, _, anchor = target.partition("#")
        path = (readme.parent / name).resolve() if name else readme
        assert path.is_relative_to(REPOSITORY) and path.exists(), target
        assert not IGNORED_BY_GIT & {*path.relative_to(REPOSITORY).parts}, target
        assert not anchor or anchor in anchors(path), target


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


@every_readme
def test_its_commands_and_their_flags_exist(readme):
    """A README speaks from its own folder or from the repository's root."""
    for folder, arguments in commands(readme):
        bases = [base / folder for base in (readme.parent, REPOSITORY)]
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
            assert found, f"{arguments}: there is no {name}"
            assert not flags or flags <= known_flags(found[0].resolve()), arguments


@every_readme
def test_its_paths_are_of_any_machine(readme):
    text = re.sub(r"[a-z]+://\S+", "", read(readme))
    path = r"""(?:^|[\s"'`(=])(/[A-Za-z][\w.-]*/[^\s"'`)]*|/(?:root|tmp|opt|mnt)\b)"""
    found = re.findall(path, text) + re.findall(r"\b[A-Za-z]:\\\S*", text)
    assert set(found) <= {"/dev/null"}


@every_readme
def test_it_says_what_fmd_is_where_it_first_names_it(readme):
    text = " ".join(prose(readme).replace("*", "").split())
    first = re.search(r"\bFMD\b", text)
    assert first
    meaning = "FID's formula in the features of a Fashion-MNIST classifier"
    assert meaning in text[first.end() : first.end() + len(meaning) + 5]


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
    wanted = f"Lines 1 to {count} of the script are the experiment; the rest is the harness, the "
    assert f"{wanted}same in all six." in " ".join(read(readme).split())


@every_script
def test_it_is_short(experiment):
    """900 words at most, without what is folded away, code, formulas, tables and links' targets."""
    text = read(experiment.path.with_name("README.md"))
    for hidden in (r"<details>.*?</details>", r"^```.*?^```", r"\$\$.*?\$\$", r"^\|[^\n]*$"):
        text = re.sub(hidden, "", text, flags=re.MULTILINE | re.DOTALL)
    assert len(re.sub(r"\]\([^)]*\)", "]", text).split()) <= 900


@every_script
def test_its_table_of_flags_is_the_script_s(experiment):
    readme = read(experiment.path.with_name("README.md"))
    assert flag_table(experiment.path) in readme, "run: python tests/flag_tables.py"


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


@every_script
def test_its_quoted_code_stands_in_the_lines_named_above_it(experiment):
    """All code but the example of a library."""
    readme = experiment.path.with_name("README.md")
    lines, quotes = read(experiment.path).splitlines(), QUOTE.findall(read(readme))
    for first, last, quote in quotes:
        found = textwrap.dedent("\n".join(lines[int(first) - 1 : int(last)])) + "\n"
        assert found == quote, f"lines {first}-{last}"
    known = [quote for _, _, quote in quotes]
    others = [block for block in blocks(readme, "python") if "load_trained" not in block]
    assert [block for block in others if block not in known] == []


# --- Figures that stand in two places -------------------------------------------------------------

# What a table of versions says of each: its key in leaderboard.json, and its unit.
FIGURES = {
    "parameters": ("parameters", 1e-6),
    "evaluations": ("evaluations", 1),
    "whole run": ("run_seconds", 1 / 60),
    "s per 1,000 images": ("seconds_per_1000_images", 1),
    "FMD": ("fmd", 1),
    "FMD, of blur": ("percent_of_blur", 1),
    "SWD, of blur": ("swd_percent_of_blur", 1),
    "random features, of blur": ("fd_random_percent_of_blur", 1),
    "worst of blur": ("worst_percent_of_blur", 1),
    "detail": ("detail", 1),
    "coverage": ("coverage", 1),
    "accuracy": ("accuracy", 100),
    "near-copies": ("copying", 100),
}
# In a table that has a column for each version: the row's name there.
ROWS = {
    "FMD": "FMD, of blur",
    "SWD": "SWD, of blur",
    "classified as their class": "accuracy",
    "near-copies of training images": "near-copies",
    "1,000 images": "s per 1,000 images",
    "whole run, figures included": "whole run",
    "whole run, two CPU cores, figures included": "whole run",
}


def stated_figures(readme):
    """Of a README's tables: (version, name of the figure, text of the cell)."""
    header = []
    for line in read(readme).splitlines():
        cells = [cell.strip(" *") for cell in line.strip().strip("|").split("|")]
        if not line.lstrip().startswith("|"):
            header = []
        elif not header:
            header = cells
        elif header[0] == "version":
            name = re.sub(r"\[`?([\w/]*/)?([\w ]+)`?\]\(.*", r"\2", cells[0]).strip("`")
            yield from ((name, column, text) for column, text in zip(header[1:], cells[1:]))
        elif header[0] == "":
            row = ROWS.get(cells[0], cells[0])
            yield from ((name, row, text) for name, text in zip(header[1:], cells[1:]))


@every_readme
def test_its_figures_are_those_of_the_leaderboard(readme):
    board = json.loads(read(REPOSITORY / "tests" / "benchmarks" / "leaderboard.json"))
    rows = {row["version"].split("/")[1]: row for row in board["versions"]}
    unconditional = rows.get(readme.parent.name, {}).get("accuracy", 1) is None
    rows["real training images"] = board["floors"][unconditional]
    compared = 0
    for name, of, text in stated_figures(readme):
        key, unit = FIGURES.get(of, (None, 1))
        stated = re.match(r"([\d.]+)\D*?(?:± ([\d.]+).*)?$", text.split("(")[0].strip())
        if name not in rows or key is None or not stated or "unseen" in text:
            continue
        for figure, value in zip(stated.groups(), (key, f"{key}_spread")):
            measured, decimals = rows[name].get(value), len((figure or "").partition(".")[2])
            wanted = measured and f"{unit * measured:.{decimals}f}"
            assert not figure or figure == wanted, (name, of)
            compared += 1
    assert compared >= 9 or readme.parent.name not in rows
