"""Keep what the scripts share identical.

Every script runs when it alone is copied to an empty folder, so the scripts repeat their plumbing.
From the banner line to the end of the file stands the harness, the same to the byte in all of them.
Above it stands the experiment, where one name has one meaning: a top-level function, class or
UPPERCASE constant that stands in two or more experiments is the same to the byte, its decorators
and the comment lines directly above it included.

    python tests/sync_shared.py --check               tell what has drifted; exit status 1 if so
    python tests/sync_shared.py --from SCRIPT         copy SCRIPT's harness and its shared
                                                      definitions to the other scripts
    python tests/sync_shared.py --from SCRIPT NAME... copy only these definitions
"""

import argparse
import ast
import difflib
import importlib.util
import itertools
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FAMILIES = ("ImageDiffusionModel", "LatentDiffusionModel")
BANNER = "THE HARNESS"  # stands in the comment line that divides a script

# What the harness takes from each experiment. One that differs nowhere any more is an error.
EXCEPTIONS = {
    "VERSION",
    "CONDITIONAL",
    "Config",
    "state_shape",
    "build_networks",
    "train_stages",
    "sample",
    "draw_trajectories",
    "embed",
    "decode",
    "save_own_figures",
}

_module_numbers = itertools.count()


def find_scripts(repository=REPOSITORY):
    patterns = [f"{family}/*/script_model_train_test.py" for family in FAMILIES]
    return sorted(path for pattern in patterns for path in repository.glob(pattern))


def version_of(path):
    """A version's name, such as LatentDiffusionModel/v3, from the path of its script."""
    return "/".join(path.parts[-3:-1])


def load_script(path):
    """Import a Python file under a name that is new each time: no two imports share their state."""
    path = Path(path)
    name = f"loaded_{path.parent.name}_{path.stem}_{next(_module_numbers)}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def label(path):
    return "/".join(path.parts[-3:])


def halves(path):
    """The lines of the experiment and those of the harness, which begin with the banner."""
    lines = path.read_bytes().decode("utf-8").split("\n")  # read_text would translate line ends
    at = [n for n, line in enumerate(lines) if line.startswith("#") and BANNER in line]
    if len(at) != 1:
        raise ValueError(f"{label(path)} has {len(at)} banner lines with {BANNER!r}, not one")
    return lines[: at[0]], lines[at[0] :]


def names_defined_by(node):
    """Names of functions, classes and UPPERCASE constants that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", []) if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    leaves = [leaf for target in targets for leaf in ast.walk(target)]
    return [leaf.id for leaf in leaves if isinstance(leaf, ast.Name) and leaf.id.isupper()]


def definitions(lines, place):
    """For each name that the lines define its range in them as (start, end), the end exclusive."""
    ranges, previous_end = {}, 0
    for node in ast.parse("\n".join(lines), filename=place).body:
        names = names_defined_by(node)
        if len(names) > 1 or any(name in ranges for name in names):
            wanted = f"define {', '.join(names)} once, one name a statement"
            raise ValueError(f"{place}:{node.lineno}: {wanted}")
        decorators = [each.lineno for each in getattr(node, "decorator_list", [])]
        start, end = min([node.lineno, *decorators]) - 1, node.end_lineno
        while start > previous_end and lines[start - 1].startswith("#"):
            start -= 1
        for i in range(end, len(lines)):
            if lines[i].strip() and not lines[i][0].isspace():
                break
            if lines[i].strip():  # an indented comment below the last statement belongs to it
                end = i + 1
        previous_end = end
        ranges.update({name: (start, end) for name in names})
    return ranges


def shared_definitions(scripts):
    """Map each name that stands in two or more experiments to {script: source}."""
    found = {}
    for path in scripts:
        lines, _ = halves(path)
        for name, (start, end) in definitions(lines, label(path)).items():
            found.setdefault(name, {})[path] = "\n".join(lines[start:end])
    return {name: by_script for name, by_script in found.items() if len(by_script) > 1}


def drift(name, by_script, argument=""):
    """A list of one message if the sources differ: how, and the commands that mend it; or none."""
    (first, expected), *others = by_script.items()
    text = [f"{name} has more than one meaning:"]
    for path, source in others:
        pair = [expected.split("\n"), source.split("\n")]
        text += difflib.unified_diff(*pair, label(first), label(path), n=1, lineterm="")
    if len(text) == 1:
        return []
    text += ["Copy the right one to the others, with one of:"]
    text += [f"  python tests/sync_shared.py --from {label(path)}{argument}" for path in by_script]
    return ["\n".join(text)]


def check(scripts, exceptions=EXCEPTIONS):
    """Return a message for the harness and for each name if it has drifted, or is no exception."""
    shared = shared_definitions(scripts)
    problems = drift("the harness", {path: "\n".join(halves(path)[1]) for path in scripts})
    for name, by_script in shared.items():
        problems += [] if name in exceptions else drift(name, by_script, f" {name}")
    for name in sorted(exceptions):
        if len(set(shared.get(name, {}).values())) < 2:
            problems.append(f"{name} differs in no two scripts: take it out of EXCEPTIONS")
    return problems


def copy(source_script, names, scripts, exceptions=EXCEPTIONS):
    """Copy the definitions of those names to the scripts that have them; without names, all that
    are shared, and the harness whole. Return the scripts that this has changed."""
    shared, harness = shared_definitions(scripts), halves(source_script)[1]
    right = {name: found[source_script] for name, found in shared.items() if source_script in found}
    right = {name: source for name, source in right.items() if name not in exceptions}
    for name in names:
        if name not in right:
            raise ValueError(f"{label(source_script)} shares no {name} above the line")
    changed = []
    for path in scripts:
        above, below = halves(path)
        before, ranges = path.read_bytes(), definitions(above, label(path))
        wanted = (set(names) or right.keys()) & ranges.keys()
        for name in sorted(wanted, key=ranges.get, reverse=True):  # the ranges above stay valid
            above[slice(*ranges[name])] = right[name].split("\n")
        after = "\n".join(above + (below if names else harness)).encode("utf-8")
        if after != before:
            path.write_bytes(after)
            changed.append(path)
    return changed


def main(arguments=None, repository=REPOSITORY, exceptions=EXCEPTIONS):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="only tell what has drifted")
    text = "the script that is right"
    action.add_argument("--from", dest="script", type=Path, metavar="SCRIPT", help=text)
    text = "what to copy (default: everything shared)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=text)
    options = parser.parse_args(arguments)
    if options.check and options.names:
        parser.error("--check compares everything and takes no names")
    scripts, problems = find_scripts(repository), []
    try:
        if options.check:
            problems = check(scripts, exceptions)
        elif options.script.resolve() not in scripts:
            raise ValueError(f"{options.script} is none of {', '.join(map(label, scripts))}")
        else:
            for path in copy(options.script.resolve(), options.names, scripts, exceptions):
                print(f"changed {label(path)}")
    except SyntaxError as error:
        parser.error(f"{error.filename}:{error.lineno}: {error.msg}")
    except ValueError as error:
        parser.error(str(error))
    if problems:
        print("\n\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
