"""Every README can be followed: links and pictures resolve, commands and their flags exist, paths are portable.

Each check is a function from one README to its list of problems; below they are tried on made-up READMEs too.
"""

import functools
import itertools
import re
import shlex

import pytest

from conftest import REPOSITORY, run_script

READMES = sorted(
    path
    for pattern in ("README.md", "*Model/**/README.md", "tests/**/README.md")
    for path in REPOSITORY.glob(pattern)
    if "output" not in path.parts
)
README_IDS = [path.relative_to(REPOSITORY).as_posix() for path in READMES]
IGNORED_BY_GIT = {"data", "output"}

# All the set-up there is: one line installs and runs the main job, one installs and passes the tests.
SET_UP = [
    "pip install -r requirements.txt && python LatentDiffusionModel/v3/script_model_train_test.py",
    "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest tests",
]


def read(path):
    return path.read_text(encoding="utf-8")


def split_fences(text):
    """Return the text outside the fenced blocks, and the blocks as lists of lines with continued lines joined."""
    prose, blocks, fence = [], [], None
    for line in text.splitlines():
        marker = re.match(r" *(`{3,}|~{3,})", line)
        if fence is None and marker:
            fence = marker.group(1)
            blocks.append([])
        elif fence is not None and marker and marker.group(1).startswith(fence):
            fence = None
        elif fence is not None:
            blocks[-1].append(line)
        else:
            prose.append(line)
    return "\n".join(prose), [re.sub(r"\\\n\s*", "", "\n".join(block)).split("\n") for block in blocks]


def anchors(path):
    """Anchors that GitHub gives the headings of a Markdown file."""
    headings = re.findall(r"^#+ +(.+?) *#*$", split_fences(read(path))[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_problems(readme, repository=REPOSITORY):
    prose = re.sub(r"`[^`\n]*`", "", split_fences(read(readme))[0])
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", prose)
    targets += re.findall(r"^ *\[[^\]]+\]: *(\S+)", prose, re.MULTILINE)
    targets += re.findall(r"""\b(?:src|href)=["']([^"']+)""", prose)
    problems = []
    for target in targets:
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (readme.parent / name).resolve() if name else readme
        if not path.is_relative_to(repository) or not path.exists():
            problems.append(f"{target}: no such file in the repository")
        elif IGNORED_BY_GIT & set(path.relative_to(repository).parts):
            problems.append(f"{target}: git ignores this file, so readers don't have it")
        elif anchor and path.suffix == ".md" and anchor not in anchors(path):
            problems.append(f"{target}: no such heading")
    return problems


def commands(readme):
    """Yield (folder below the README or None, arguments) for every command in the fenced blocks; `cd` is followed."""
    for block in split_fences(read(readme))[1]:
        folder = None
        for line in block:
            for part in re.split(r"&&|;|\|", line.removeprefix("$ ")):
                try:
                    arguments = shlex.split(part, comments=True)
                except ValueError:
                    continue  # a drawing or other text, not a command
                while arguments and re.fullmatch(r"[A-Z_]+=.*", arguments[0]):
                    arguments.pop(0)
                if len(arguments) == 2 and arguments[0] == "cd":
                    folder = arguments[1] if folder is None else f"{folder}/{arguments[1]}"
                elif arguments:
                    yield folder, arguments


@functools.cache
def known_flags(path):
    """Flags that the --help of a script names."""
    completed = run_script(path, "--help")
    assert completed.returncode == 0, completed.stderr
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", completed.stdout))


def command_problems(readme, repository=REPOSITORY):
    problems = []
    for folder, arguments in commands(readme):
        # A README speaks from its own folder or from the repository's root.
        bases = [base / (folder or "") for base in (readme.parent, repository)]
        line = " ".join(arguments)

        def find(name, bases=bases):
            return next((base / name for base in bases if (base / name).exists()), None)

        if arguments[0] in ("python", "python3"):
            files = [argument for argument in arguments[1:2] if argument.endswith(".py")]
            if arguments[1:3] == ["-m", "pytest"]:
                files = [argument.split("::")[0] for argument in arguments[3:] if argument.startswith("tests")]
        elif arguments[:2] == ["pip", "install"]:
            files = [value for flag, value in itertools.pairwise(arguments) if flag == "-r"]
        else:
            continue
        missing = [name for name in files if find(name) is None]
        problems += [f"{line}: there is no {name}" for name in missing]
        if arguments[0] != "pip" and arguments[1:2] == files and not missing:
            flags = {argument.split("=")[0] for argument in arguments[2:] if re.match(r"--?[A-Za-z]", argument)}
            unknown = flags - known_flags(find(files[0]).resolve()) if flags else set()
            problems += [f"{line}: {files[0]} --help knows no {flag}" for flag in sorted(unknown)]
    return problems


def absolute_path_problems(readme):
    text = re.sub(r"[a-z]+://\S+", "", read(readme))
    found = re.findall(r"""(?:^|[\s"'`(=])(/[A-Za-z][\w.-]*/[^\s"'`)]*|/(?:root|tmp|opt|mnt)\b)""", text, re.MULTILINE)
    found += re.findall(r"""\b[A-Za-z]:\\[^\s"'`)]*""", text)
    return [f"{path}: an absolute path of one machine" for path in found if path != "/dev/null"]


def wrong_test_commands(readme, ci_script):
    """Test commands of a README that are not the one that CI runs, but for --faults, which takes minutes."""
    [command] = re.findall(r"^python -m pytest[^|\n]*", ci_script, re.MULTILINE)
    expected = command.strip().removesuffix(" --faults")
    found = [" ".join(arguments) for _, arguments in commands(readme) if "pytest" in arguments]
    if not found:
        return ["there is no test command"]
    return [f"{line}: CI runs `{expected}`" for line in found if line != expected]


@pytest.mark.parametrize("readme", READMES, ids=README_IDS)
def test_links_resolve(readme):
    assert link_problems(readme) == []


@pytest.mark.parametrize("readme", READMES, ids=README_IDS)
def test_commands_exist(readme):
    assert command_problems(readme) == []


@pytest.mark.parametrize("readme", READMES, ids=README_IDS)
def test_no_absolute_paths(readme):
    assert absolute_path_problems(readme) == []


def test_root_readme_and_ci_run_the_same():
    readme, ci_script = REPOSITORY / "README.md", read(REPOSITORY / ".ci" / "run")
    lines = [line for block in split_fences(read(readme))[1] for line in block]
    assert set(SET_UP) <= set(lines)
    assert wrong_test_commands(readme, ci_script) == []
    assert re.findall(r"^pip install .*", ci_script, re.MULTILINE) == [SET_UP[1].split(" && ")[0]]


# ------------------------------------------------------------------------------------------- the checks themselves


@pytest.fixture
def write_readme(tmp_path):
    """Write a README into a made-up repository with one script in `Model/`."""
    (tmp_path / "Model").mkdir()
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "grid.png").touch()
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "Model" / "README.md").write_text("# The `model`, in short\n")
    (tmp_path / "Model" / "script.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--epochs')\nparser.parse_args()\n"
    )

    def write(text, folder="."):
        path = tmp_path / folder / "README.md"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("[a](Model) [b](Model/README.md#the-model-in-short) [c](https://x.org/none) [d](#top)\n# Top", None),
        ("`[a](none.md)`\n```\n[a](none.md)\n```", None),
        ("[a](none.md)", "none.md"),
        ("![a](none.png)", "none.png"),
        ("[![a](none.png)](Model)", "none.png"),
        ('<img width="3" src="none.gif">', "none.gif"),
        ("[a][b]\n\n[b]: none.md", "none.md"),
        ("[a](../..)", "../.."),
        ("![a](output/grid.png)", "output/grid.png"),
        ("[a](#none)", "#none"),
        ("[a](Model/README.md#none)", "Model/README.md#none"),
    ],
)
def test_link_check(write_readme, text, bad):
    readme = write_readme(text)
    problems = link_problems(readme, readme.parent)
    assert [problem.split(": ")[0] for problem in problems] == ([bad] if bad else [])


@pytest.mark.parametrize(
    ("folder", "line", "bad"),
    [
        (".", "python Model/script.py --epochs 3", None),
        (
            ".",
            "pip install -r requirements.txt && PYTHONHASHSEED=0 python Model/script.py --epochs=3  # --like so",
            None,
        ),
        (".", "cd Model\npython script.py \\\n    --epochs 3", None),
        ("Model", "python script.py", None),
        ("Model", "python Model/script.py -h", None),
        (".", "python script.py", "there is no script.py"),
        (".", "cd Model\npython Model/script.py", "there is no Model/script.py"),
        (".", "python Model/script.py --epoch 3", "knows no --epoch"),
        (".", "$ python Model/script.py --epochs 3 --fast", "knows no --fast"),
        (".", "pip install -r tests/requirements.txt", "there is no tests/requirements.txt"),
        (".", "python -m pytest tests/test_none.py::test_it", "there is no tests/test_none.py"),
    ],
)
def test_command_check(write_readme, folder, line, bad):
    readme = write_readme(f"```bash\n{line}\n```\n", folder)
    root = readme.parent if folder == "." else readme.parent.parent
    problems = command_problems(readme, root)
    assert len(problems) == bool(bad)
    assert not bad or problems[0].endswith(bad)


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("either/or, `output/samples`, https://x.org/home/me, u + w (c - u) / 2, 28 x 28 /10, > /dev/null", None),
        ("see /home/me/data", "/home/me/data"),
        ("`/srv/data`", "/srv/data"),
        ("cd /tmp", "/tmp"),
        ("--data-dir=/Users/me/data", "/Users/me/data"),
        (r"C:\\Users\\me", r"C:\\Users\\me"),
    ],
)
def test_absolute_path_check(write_readme, text, bad):
    problems = absolute_path_problems(write_readme(text))
    assert [problem.split(": an")[0] for problem in problems] == ([bad] if bad else [])


@pytest.mark.parametrize(
    ("text", "problem_count"),
    [
        ("```\npip install -r requirements.txt && python -m pytest tests\n```", 0),
        ("```\npython -m pytest tests -x\n```", 1),
        ("```\npytest\n```", 1),
        ("`python -m pytest tests`", 1),
    ],
)
def test_test_command_check(write_readme, text, problem_count):
    ci_script = 'cd here\npython -m pytest tests | tee "$work/pytest.log"\n'
    assert len(wrong_test_commands(write_readme(text), ci_script)) == problem_count
