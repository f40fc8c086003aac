r"""Measure the versions that have results, and write the leaderboard.

    python tests/benchmarks/leaderboard.py                              every version
    python tests/benchmarks/leaderboard.py LatentDiffusionModel/v3      one; others keep their rows

A version has a result once its ``output/`` holds a finished run and 10,000 samples of each of three
sampling seeds:

    python LatentDiffusionModel/v3/script_model_train_test.py --export-samples 10000
    python LatentDiffusionModel/v3/script_model_train_test.py --sample-only --export-samples 10000 \
        --sampling-seed 1
    python LatentDiffusionModel/v3/script_model_train_test.py --sample-only --export-samples 10000 \
        --sampling-seed 2

The figures go to ``leaderboard.json`` beside this file, and tables of them to two READMEs: a short
one to that of the repository, all columns to the one beside this file. A row keeps its committed
figures until its version's output is another one; ``--again`` measures it all the same.
What a whole run on a GPU took, ``gpu_run``, is of another run, and is written there by hand.
"""

import argparse
import csv
import hashlib
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import feature_extractor as fe
import quality
import speed

COURSE = (  # in the order in which the scripts are to be read
    "ImageDiffusionModel/CNN",
    "LatentDiffusionModel/v1",
    "LatentDiffusionModel/v2",
    "ImageDiffusionModel/Transformer",
    "ImageDiffusionModel/UNet",
    "LatentDiffusionModel/v3",
)
LADDER = (*COURSE, *(version for version in speed.find_versions() if version not in COURSE))
SAMPLES = quality.REFERENCE_SIZE  # in each file: figures of other counts do not compare
SAMPLE_FILES = ("samples.npz", "samples_seed_1.npz", "samples_seed_2.npz")
SCORES = (
    "fmd",
    "percent_of_blur",
    "coverage",
    "accuracy",
    "copying",
    *quality.CLASS_FREE_METRICS,
)
TIMED_IMAGES, TIMED_ROUNDS = 1000, 3

FORMS = {
    "fmd": "{:.3f}",
    "percent_of_blur": "{:.2f}%",
    "swd_28_percent_of_blur": "{:.1f}%",
    "swd_percent_of_blur": "{:.1f}%",
    "fd_random_percent_of_blur": "{:.1f}%",
    "worst_percent_of_blur": "{:.1f}%",
    "detail": "{:.3f}",
    "coverage": "{:.3f}",
    "accuracy": "{:.1%}",
    "copying": "{:.1%}",
}
SHORT = {
    "run": "whole run",
    "seconds": "s per 1,000 images",
    "percent_of_blur": "FMD, of blur",
    "swd_percent_of_blur": "SWD, of blur",
    "coverage": "coverage",
}
SIZES = {
    "version": "version",
    "parameters": "parameters",
    "epochs": "epochs",
    "training": "training",
    "gpu_run": "whole run on a GPU",
    "sampler": "sampler",
    "evaluations": "evaluations",
    "seconds": "s per 1,000 images",
}
QUALITY = {
    "version": "version",
    "fmd": "FMD",
    "percent_of_blur": "FMD, of blur",
    "swd_28_percent_of_blur": "SWD at 28 pixels, of blur",
    "swd_percent_of_blur": "SWD, of blur",
    "fd_random_percent_of_blur": "random features, of blur",
    "worst_percent_of_blur": "worst of blur",
    "detail": "detail",
    "coverage": "coverage",
    "accuracy": "accuracy",
    "copying": "near-copies",
}


class NotMeasured(Exception):
    """Says why a version has no result."""


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def find_results(output):
    """The files that a row is made of: metrics.csv, then the samples. Raises NotMeasured."""
    files = [output / name for name in ("metrics.csv", *SAMPLE_FILES)]
    missing = [
        path.name for path in (output / "checkpoints" / "last.pt", *files) if not path.is_file()
    ]
    if missing:
        raise NotMeasured(f"{output} lacks {', '.join(missing)}")
    return files


def fingerprint(files):
    """SHA-256 of files and of the classifier that scores them."""
    content = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)
    return hashlib.sha256(content + fe.WEIGHTS_SHA256.encode()).hexdigest()


def read_training(path):
    """Epochs of each stage, {name: number}, and the seconds of all, from a metrics.csv.

    Raises NotMeasured.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise NotMeasured(f"{path} holds no epoch")
    epochs = {row["stage"]: int(row["epoch"]) for row in rows}  # the last one of a stage stays
    return epochs, sum(float(row["seconds"]) for row in rows)


def score_files(paths, data_dir):
    """Mean of each of ``SCORES`` over sample files, and its spread under ``<score>_spread``.

    A score without labels is None. Raises NotMeasured where a file is unfit or does not hold
    ``SAMPLES`` images.
    """
    rows = []
    for path in paths:
        try:
            images, labels = quality.read_samples(path)
        except ValueError as error:
            raise NotMeasured(str(error)) from error
        if len(images) != SAMPLES:
            raise NotMeasured(f"{path} holds {len(images)} samples, not {SAMPLES}")
        rows.append({"file": path.name, **quality.score_arrays(images, labels, data_dir)})
    [summary] = quality.seed_rows(rows)
    return {key: summary[key] for score in SCORES for key in (score, f"{score}_spread")}


def measure_sampler(path, output, device):
    """Parameters, sampler, evaluations and seconds per 1,000 images of an output's models."""
    sampler = speed.Sampler(path, output, device)
    sampler.seconds(min(50, TIMED_IMAGES))  # the warm-up
    seconds = statistics.median(sampler.seconds(TIMED_IMAGES) for _ in range(TIMED_ROUNDS))
    return {
        "parameters": sampler.parameters,
        "sampler": sampler.description(),
        "evaluations": sampler.evaluations(),
        "seconds_per_1000_images": 1000 / TIMED_IMAGES * seconds,
        "sampling_hardware": speed.hardware(sampler.models.device),
    }


def measure(version, path, committed, args):
    """The row of a version: ``committed`` where nothing has changed. Raises NotMeasured."""
    output = path.parent / "output"
    metrics, *samples = find_results(output)
    digest = fingerprint([metrics, *samples])
    known = committed.get("fingerprint") == digest and all(score in committed for score in SCORES)
    if known and not args.again:
        print(f"{version}: unchanged")
        return committed
    print(f"{version}: measuring", flush=True)
    epochs, seconds = read_training(metrics)
    try:
        measured = measure_sampler(path, output, args.device)
    except ValueError as error:  # there is no checkpoint that can be read and sampled from
        raise NotMeasured(str(error)) from error
    return {
        "version": version,
        "epochs": epochs,
        "training_seconds": seconds,
        "training_hardware": args.training_hardware or measured["sampling_hardware"],
        "run_seconds": args.run_seconds,
        "gpu_run": committed.get("gpu_run"),
        **measured,
        "samples": SAMPLES,
        **score_files(samples, args.data_dir),
        "fingerprint": digest,
    }


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def format_score(row, score):
    """A score as text, mean ± spread where there is one; empty where it was not measured."""
    if score not in row:
        return ""
    if row[score] is None:
        return "-"
    spread = f" ± {FORMS[score].format(row[f'{score}_spread'])}" if f"{score}_spread" in row else ""
    return FORMS[score].format(row[score]) + spread


def format_row(row, columns, folder="."):
    """The cells of a measured row, as text; ``folder`` is the root as seen from the README."""
    trained, sampled = row["training_hardware"], row["sampling_hardware"]
    cells = {
        "version": f"[`{row['version']}`]({folder}/{row['version']})".replace("(./", "("),
        "parameters": f"{row['parameters'] / 1e6:.2f} M",
        "epochs": " + ".join(map(str, row["epochs"].values())),
        "training": f"{row['training_seconds'] / 60:.1f} min, {trained}",
        "gpu_run": row.get("gpu_run") or "not measured",
        "sampler": row["sampler"],
        "evaluations": f"{row['evaluations']:g}",
        "seconds": f"{row['seconds_per_1000_images']:.2g}"
        + (f" ({sampled})" if sampled != trained else ""),
    }
    return [cells.get(column) or format_score(row, column) for column in columns]


def format_floor(floor, columns):
    """The cells of a row of real training images."""
    cells = {"version": floor["file"].removeprefix("reference: "), "copying": ""}
    scored = (format_score(floor, column) if column in FORMS else "" for column in columns)
    return [cells.get(column, text) for column, text in zip(columns, scored)]


def format_table(board, columns, folder=".", floors=True):
    """The Markdown of a table: a row a version in the ladder's order, and the floors."""
    lines = [list(columns.values()), ["---"] * len(columns)]
    for row in board["versions"]:
        unmeasured = [f"`{row['version']}`", "not measured yet", *[""] * (len(columns) - 2)]
        lines.append(format_row(row, columns, folder) if "fmd" in row else unmeasured)
    lines += [format_floor(floor, columns) for floor in board["floors"] if floors]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_notes(board):
    """What is to be said of rows that are not wholly of one run."""
    notes = {row["note"] for row in board["versions"] if row.get("note")}
    return "".join(f"\n\n{note}" for note in sorted(notes))


def format_short(row):
    """The cells of the table of six columns: means alone; what is not known says so."""
    run, seconds = row.get("run_seconds"), row.get("seconds_per_1000_images")
    known = {"run": run and f"{run / 60:.1f} min", "seconds": seconds and f"{seconds:.2g}"}
    for score in ("percent_of_blur", "swd_percent_of_blur", "coverage"):
        known[score] = FORMS[score].format(row[score]) if score in row else None
    return [known[column] or "not measured yet" for column in SHORT]


def format_leaderboard(board):
    """The Markdown of the leaderboard in the repository's README."""
    lines = [["version", *SHORT.values()], ["---"] * (len(SHORT) + 1)]
    for row in board["versions"]:
        name = row["version"]
        lines.append([f"[{name.split('/')[1]}]({name})", *format_short(row)])
    for floor in board["floors"][:1]:  # the balanced one
        lines.append(["real images (floor)", "", "", *format_short(floor)[2:]])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return table + format_notes(board)


def format_all(board):
    """The Markdown of all columns, for the README of the benchmarks."""
    return (
        f"{format_table(board, SIZES, '../..', floors=False)}\n\n"
        f"{format_table(board, QUALITY, '../..')}{format_notes(board)}"
    )


def replace_block(path, name, text):
    """Put ``text`` between the lines ``<!-- name:begin -->`` and ``<!-- name:end -->`` of a file.

    Raises ValueError where the file does not hold them.
    """
    content = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    if (
        content.count(begin) != 1
        or content.count(end) != 1
        or content.index(end) < content.index(begin)
    ):
        raise ValueError(
            f"{path} must hold the lines {begin.strip()} and {end} once, in this order"
        )
    before, rest = content.split(begin)
    path.write_text(f"{before}{begin}{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def read_board(path):
    """The leaderboard in a JSON file, a row for each version of the ladder; without it, empty."""
    board = {"floors": [], "versions": []}
    if path.is_file():
        board = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["version"]: row for row in board["versions"]}
    return board | {"versions": [rows.get(version, {"version": version}) for version in LADDER]}


def update_board(board, scripts, args):
    """Measure the versions of {version: script}; those that have no result keep their rows."""
    rows = {row["version"]: row for row in board["versions"]}
    for version, path in scripts.items():
        try:
            rows[version] = measure(version, path, rows[version], args)
        except NotMeasured as reason:
            kept = "keeps its row" if "fmd" in rows[version] else "has no result"
            print(f"{version} {kept}: {reason}", file=sys.stderr)
    floors = board["floors"]
    if rows != {row["version"]: row for row in board["versions"]}:
        reference = quality.load_reference(Path(args.data_dir))
        balanced = torch.arange(SAMPLES) % fe.NUM_CLASSES
        floors = [quality.load_floor(SAMPLES, labels, reference) for labels in (balanced, None)]
        floors = [{key: floor[key] for key in ("file", *SCORES)} for floor in floors]
    return {"floors": floors, "versions": list(rows.values())}


def main(argv=None, repository=speed.REPOSITORY):
    """Command line. Exits 2 with one line on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "versions",
        nargs="*",
        metavar="VERSION",
        help="such as LatentDiffusionModel/v3 (default: all)",
    )
    parser.add_argument("--again", action="store_true", help="measure also what has not changed")
    parser.add_argument(
        "--training-hardware",
        metavar="TEXT",
        help="where the versions were trained (default: this machine)",
    )
    parser.add_argument(
        "--run-seconds", type=float, help="of the whole command that trained the one version named"
    )
    parser.add_argument(
        "--device", default="auto", help="to time sampling on, as the scripts' flag (default: auto)"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=fe.DEFAULT_DATA_DIR, help="torchvision's root"
    )
    args = parser.parse_args(argv)
    board_path = repository / "tests" / "benchmarks" / "leaderboard.json"
    try:
        scripts = speed.find_versions(args.versions, repository)
        speed.pick_device(scripts, args.device)
        board = update_board(read_board(board_path), scripts, args)
        replace_block(repository / "README.md", "leaderboard", format_leaderboard(board))
        replace_block(board_path.with_name("README.md"), "leaderboard", format_all(board))
        board_path.write_text(json.dumps(board, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(format_leaderboard(board))


if __name__ == "__main__":
    main()
