"""Copy the averaged weights of a finished run into a version's pretrained/, in half precision, to
be committed.

    python tests/benchmarks/pretrained.py LatentDiffusionModel/v3                   from its output/
    python tests/benchmarks/pretrained.py LatentDiffusionModel/v3 --output-dir DIR  from another

What is written is a checkpoint without the parts that only training needs, so ``load_trained`` of
the script reads the folder as it reads that of a run. Warns above 9 MB.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import speed

LIMIT = 9 * 2**20  # bytes of the weights


def slim_stage(state):
    """What sampling needs of a stage's state, floating-point weights in half precision."""
    weights = {
        name: value.half() if value.is_floating_point() else value
        for name, value in state["ema"].items()
    }
    return {"step": state["step"], "ema": weights}


def build_pretrained(script, output, folder):
    """Fill ``folder`` from a run's output folder. Returns its bytes; raises ValueError where there
    is no such run.

    Args:
        script: the version's script, imported.
    """
    with speed.calls_of(script):
        checkpoint = script.find_checkpoint(output / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{output} holds no checkpoint")
    stages = {name: slim_stage(state) for name, state in checkpoint["stages"].items()}
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    script.save_checkpoint(checkpoint | {"stages": stages}, folder / "checkpoints")
    return sum(path.stat().st_size for path in folder.rglob("*.pt"))


def main(argv=None, repository=speed.REPOSITORY):
    """Command line. Exits 2 with one line on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", metavar="VERSION", help="for example LatentDiffusionModel/v3")
    parser.add_argument(
        "--output-dir", type=Path, help="of the run (default: output/ of the version)"
    )
    args = parser.parse_args(argv)
    try:
        [path] = speed.find_versions([args.version], repository).values()
        output, folder = args.output_dir or path.parent / "output", path.parent / "pretrained"
        size = build_pretrained(speed.load_script(path), output, folder)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{folder}: {size / 2**20:.1f} MB")
    if size > LIMIT:
        print(f"warning: above the limit of {LIMIT / 2**20:g} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
