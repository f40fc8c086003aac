"""Keep the definitions that several scripts share identical: one name has one meaning.

Every script runs when it alone is copied to an empty folder, so the scripts repeat their plumbing. A top-level
function, class or UPPERCASE constant that stands in two or more of them must be the same to the byte, its decorators
and the comment lines directly above it included.

    python tests/sync_shared.py --check                     tell what has drifted; exit status 1 if anything has
    python tests/sync_shared.py --from SCRIPT               copy all shared definitions of SCRIPT to the other scripts
    python tests/sync_shared.py --from SCRIPT NAME [NAME]   copy only these
"""

import argparse
import ast
import difflib
import importlib.util
import itertools
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PATTERNS = [f"{family}/*/script_model_train_test.py" for family in ("ImageDiffusionModel", "LatentDiffusionModel")]

# Names that mean something else in each script, and why that is right. An entry that is no longer needed is an error.
EXCEPTIONS = {
    "VERSION": "the script's own name",
    "OUTPUTS": "each has its own figures",
    "QUICK": "each has its own widths and stages",
    "RECIPES": "each has its own epochs",
    "Config": "each has its own settings",
    "TrainedModels": "each has its own models",
    "sample": "each has its own sampler",
    "draw_trajectories": "each has its own process",
    "save_all_figures": "each has its own figures",
    "build_stages": "each has its own models and losses",
    "run_training": "each has its own stages",
    "generate_samples": "a conditional script's takes labels, an unconditional one's a count",
    "save_requested_samples": "a conditional script's may be of one class",
    "export_samples": "a conditional script's have labels",
    "main": "a conditional script's has --class",
}

_module_numbers = itertools.count()


def find_scripts(repository=REPOSITORY):
    return sorted(path for pattern in PATTERNS for path in repository.glob(pattern))


def version_of(path):
    """A version's name, such as LatentDiffusionModel/v3, from the path of its script."""
    return "/".join(path.parts[-3:-1])


def load_script(path):
    """Import a Python file under a module name that is new each time, so that no two imports share its state."""
    path = Path(path)
    name = f"loaded_{path.parent.name}_{path.stem}_{next(_module_numbers)}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def label(path):
    return "/".join(path.parts[-3:])


def names_defined_by(node):
    """Names of functions, classes and UPPERCASE constants that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    leaves = [leaf for target in targets for leaf in ast.walk(target)]
    return [leaf.id for leaf in leaves if isinstance(leaf, ast.Name) and leaf.id.isupper()]


def read_definitions(path):
    """Return the lines of a script, and for each defined name its range in them as (start, end), the end exclusive."""
    text = path.read_bytes().decode("utf-8")  # read_text would translate line ends
    lines, ranges, previous_end = text.split("\n"), {}, 0
    for node in ast.parse(text, filename=label(path)).body:
        names = names_defined_by(node)
        if len(names) > 1 or any(name in ranges for name in names):
            raise ValueError(f"{label(path)}:{node.lineno}: define {', '.join(names)} once, one name a statement")
        start = min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])]) - 1
        while start > previous_end and lines[start - 1].startswith("#"):
            start -= 1
        end = node.end_lineno
        for i in range(end, len(lines)):
            if lines[i].strip() and not lines[i][0].isspace():
                break
            if lines[i].strip():  # an indented comment below the last statement still belongs to it
                end = i + 1
        previous_end = end
        ranges.update({name: (start, end) for name in names})
    return lines, ranges


def shared_definitions(scripts):
    """Map each name that stands in two or more scripts to {script: source}."""
    found = {}
    for path in scripts:
        lines, ranges = read_definitions(path)
        for name, (start, end) in ranges.items():
            found.setdefault(name, {})[path] = "\n".join(lines[start:end])
    return {name: by_script for name, by_script in found.items() if len(by_script) > 1}


def check(scripts, exceptions):
    """Return a message for each name that has drifted and for each exception that is stale."""
    shared, problems = shared_definitions(scripts), []
    for name, by_script in shared.items():
        (first, expected), *others = by_script.items()
        drifted = [(path, source) for path, source in others if source != expected]
        if name in exceptions or not drifted:
            continue
        problem = [f"{name} has more than one meaning:"]
        for path, source in drifted:
            pair = [expected.split("\n"), source.split("\n")]
            problem += difflib.unified_diff(*pair, label(first), label(path), lineterm="")
        problem += ["Copy the right one to the others, with one of:"]
        problem += [f"  python tests/sync_shared.py --from {label(path)} {name}" for path in by_script]
        problems.append("\n".join(problem))
    for name in exceptions:
        if len(set(shared.get(name, {}).values())) < 2:
            problems.append(f"{name} is a stale exception: no two scripts differ in it; take it out of EXCEPTIONS.")
    return problems


def copy(source_script, names, scripts, exceptions):
    """Copy the named definitions (default: all shared ones) to the scripts that have the name; return those changed."""
    found = shared_definitions(scripts)
    shared = {name: by_script[source_script] for name, by_script in found.items() if source_script in by_script}
    for name in names:
        if name in exceptions or name not in shared:
            reason = "an exception" if name in exceptions else "not shared with another script"
            raise ValueError(f"{name} of {label(source_script)} is {reason}")
    wanted = set(names) or shared.keys() - exceptions.keys()
    changed = []
    for path in scripts:
        lines, ranges = read_definitions(path)
        before = list(lines)
        # From below, so that the ranges above stay valid.
        for name in sorted(wanted & ranges.keys(), key=ranges.get, reverse=True):
            lines[slice(*ranges[name])] = shared[name].split("\n")
        if lines != before:
            path.write_bytes("\n".join(lines).encode("utf-8"))
            changed.append(path)
    return changed


def main(arguments=None, repository=REPOSITORY, exceptions=EXCEPTIONS):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="only tell what has drifted")
    action.add_argument("--from", dest="script", type=Path, metavar="SCRIPT", help="the script that is right")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to copy (default: everything shared)")
    options = parser.parse_args(arguments)
    if options.check and options.names:
        parser.error("--check compares everything and takes no names")
    scripts = find_scripts(repository)
    try:
        if options.script:
            source_script = options.script.resolve()
            if source_script not in scripts:
                raise ValueError(f"{options.script} is not one of the scripts: {', '.join(map(label, scripts))}")
            for path in copy(source_script, options.names, scripts, exceptions):
                print(f"changed {label(path)}")
        problems = check(scripts, exceptions) if options.check else []
    except SyntaxError as error:
        parser.error(f"{error.filename}:{error.lineno}: {error.msg}")
    except ValueError as error:
        parser.error(str(error))
    if problems:
        print("\n\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
