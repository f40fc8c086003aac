"""Train versions and peers for the same minutes on the same machine; print how good they are.

    python tests/benchmarks/time_to_quality.py             LatentDiffusionModel/v3, for 10 minutes
    python tests/benchmarks/time_to_quality.py --peers     and what is installed of the peers
    python tests/benchmarks/time_to_quality.py --minutes 1 --samples 200 --readme README.md
                                                           a trial, see below
    python tests/benchmarks/time_to_quality.py --peers --folder race
                                                           can be stopped and run again: race/ keeps
                                                           what each has learned, and the scores

Only training counts against the minutes, from the start of the process on, so imports and reading
the data do too. Planning doesn't, nor do sampling and scoring, which follow when all contestants
have trained, and need no idle machine. The table goes between markers of README.md beside this
file, or of the file that --readme names, which must hold the markers; plot and JSON go beside it.
README.md says how the budgets are spent and what is fair in it.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import math
import multiprocessing
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent))
import feature_extractor as fe
import leaderboard
import peers
import quality
import speed

START_UP = 20  # seconds of a version's budget that are not steps: imports, data, encoding
SLACK = 0.08  # share of the rest that is not planned for: validation, saving, a slower machine
MARGIN = 1.0  # seconds before the end of the budget at which training is told to stop
LEAST_EPOCHS = 4  # of a version's diffusion, whose ends are sampled: enough for a curve
MOST_SNAPSHOTS = 8  # of a version, the last one among them
PILOT_STEPS = 40


@dataclasses.dataclass
class Point:
    """A contestant after some training; what its samples are worth, once there are any."""

    model: str
    minutes: float  # of training, from the start of its process
    trained: str  # how much, in words
    snapshot: str  # the file or folder, in the contestant's own, that holds what it had learned
    # known once there are samples:
    parameters: int = 0
    sampler: str = ""
    evaluations: float = 0.0  # of the denoiser, an image
    scores: dict = dataclasses.field(default_factory=dict)  # of ``quality.score_against``


class Contestant(NamedTuple):
    """Who takes part.

    ``train`` takes a folder and returns points, whose snapshots lie in the folder. ``sample`` takes
    the folder, a point and the path of a file; it writes the samples there, in the form that
    ``quality.py`` reads, and the sampler's description into the point.
    """

    name: str
    what: str  # a release, or a script's hash: another one cannot go on in its place
    train: Callable
    sample: Callable


# --------------------------------------------------------------------------------------------------
# Versions
# --------------------------------------------------------------------------------------------------


def plan_training(stages, fields, budget):
    """Split a budget over the stages in the proportion of the published recipe.

    Epochs are whole numbers: rather one too many, and fewer training images, than minutes unused.
    The diffusion has ``LEAST_EPOCHS`` or more.

    Args:
        stages: of ``speed.measure_training``.
        fields: names of the configuration's fields of epochs, a stage's in the stage's place.
        budget: seconds.

    Returns: {field: epochs} and the share of the training images, above 0 and at most 1.
    """
    costs = [stage.median() * stage.steps_per_epoch for stage in stages]  # seconds an epoch
    prepared = START_UP + sum(max(0.0, stage.first - stage.median()) for stage in stages)
    available = (1 - SLACK) * max(budget - prepared, budget / 4)
    published = sum(cost * stage.epochs for cost, stage in zip(costs, stages))
    epochs = [max(1, round(available / published * stage.epochs)) for stage in stages]
    left = available - sum(cost * count for cost, count in zip(costs, epochs))
    diffusion = fields.index("epochs")
    more = max(0, math.ceil(left / costs[diffusion]))
    epochs[diffusion] = max(LEAST_EPOCHS, epochs[diffusion] + more)
    planned = sum(cost * count for cost, count in zip(costs, epochs))
    return dict(zip(fields, epochs, strict=True)), min(1.0, available / planned)


def finished_epochs(output, stages):
    """The number of epochs of some stages in an output folder's metrics.csv."""
    path = output / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open(newline="", encoding="utf-8") as file:
        return sum(row["stage"] in stages for row in csv.DictReader(file))


def take_snapshot(output, folder):
    """Copy the checkpoint of an output folder, so that ``folder`` can be sampled from."""
    (folder / "checkpoints").mkdir(parents=True)
    for attempt in range(50):
        try:
            shutil.copy(output / "checkpoints" / "last.pt", folder / "checkpoints" / "last.pt")
            return
        except FileNotFoundError:  # for a moment, while a new one takes the old one's place
            if attempt == 49:
                raise
            time.sleep(0.1)


def stop(process, seconds=120):
    """End a training as SIGTERM does, which saves first; kill it if it does not end."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def train_version(path, flags, stages, epochs, budget, folder):
    """Run a script until it has trained or the budget is spent; keep the models of each epoch.

    Args:
        path, flags: the command.
        stages, epochs: names of those whose models can be sampled from, the diffusion and what
            follows it, and the number of their epochs together.
        budget: seconds from the start of the process.
        folder: receives output/ and the snapshots, folders of their own.

    Returns: a list of (folder of a snapshot, seconds, epochs). Raises RuntimeError if it fails.
    """
    output, log, snapshots = folder / "output", folder / "log.txt", []
    started = time.monotonic()

    def keep(seconds, done):
        snapshots.append((folder / f"snapshot_{len(snapshots)}", seconds, done))
        take_snapshot(output, snapshots[-1][0])

    with log.open("w") as file:
        command = [sys.executable, str(path), *flags, "--output-dir", str(output)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            while True:
                ended, elapsed = process.poll() is not None, time.monotonic() - started
                done = finished_epochs(output, stages)
                if done > (snapshots[-1][2] if snapshots else 0):
                    keep(elapsed, done)
                if ended or done == epochs or elapsed >= budget - MARGIN:
                    break
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                stop(process)
    if done < epochs and process.returncode not in (143, -15):
        raise RuntimeError(
            f"{path} ended with status {process.returncode}: {log.read_text()[-500:].strip()}"
        )
    if (
        done < epochs
        and process.returncode == 143
        and any(f"{stage}, step" in log.read_text().splitlines()[-1] for stage in stages)
    ):
        keep(min(elapsed + MARGIN, budget), done)  # cut off within an epoch
    return snapshots


def thin(items, most):
    """At most ``most`` of the items, evenly spaced, the last one among them."""
    chosen = sorted(
        {
            round((k + 1) * len(items) / min(most, len(items))) - 1
            for k in range(min(most, len(items)))
        }
    )
    return [items[index] for index in chosen]


def plan_and_train_version(version, path, args, folder):
    """Plan and train a version: a list of ``Point``."""
    flags = speed.script_flags(args)
    script = speed.load_script(path)
    images = script.Settings().train_images
    stages = speed.measure_training(path, flags, PILOT_STEPS)
    epochs, share = plan_training(stages, speed.epoch_fields(script.Settings), 60 * args.minutes)
    plan = [*speed.epoch_flags(epochs), "--train-images", str(round(share * images))]
    print(f"{version}: planned {' '.join(plan)}", flush=True)
    names, counts = [stage.name for stage in stages], [*epochs.values()]
    first = names.index("diffusion")
    how = names[first:], sum(counts[first:]), 60 * args.minutes
    snapshots = train_version(path, [*flags, *plan], *how, folder)
    chosen = thin(snapshots, MOST_SNAPSHOTS)
    kept = [snapshot for snapshot, *_ in chosen]
    for spare in (folder / "output", *(each for each, *_ in snapshots if each not in kept)):
        shutil.rmtree(spare)
    points = []
    for snapshot, seconds, done in chosen:
        done += sum(counts[:first])
        so_far = [min(count, done - sum(counts[:i])) for i, count in enumerate(counts)]
        said = " + ".join(str(count) for count in so_far if count > 0)
        trained = f"{said} epochs of {round(share * images):,} images"
        points.append(Point(version, seconds / 60, trained, snapshot.name))
    return points


def sample_version(path, args, folder, point, file):
    """Sample a version, see ``Contestant``."""
    sampler = speed.Sampler(path, folder / point.snapshot, args.device)
    sampler.export(args.samples, folder)
    (folder / "samples.npz").replace(file)
    point.parameters, point.sampler = sampler.parameters, sampler.description()
    point.evaluations = sampler.evaluations()


# --------------------------------------------------------------------------------------------------
# Peers
# --------------------------------------------------------------------------------------------------


def training_batches(data_dir, batch_size, device):
    """Yield endless batches of what the versions train on, each image once an epoch.

    A batch is images (B, 1, 28, 28) in [-1, 1] and labels (B,).
    """
    images, labels = (part[: -fe.VALIDATION_SIZE] for part in fe.load_split(data_dir, train=True))
    images, labels = images[:, None].to(device), labels.to(device)
    while True:
        for rows in torch.randperm(len(images), device=device).split(batch_size):
            yield images[rows].float() / 127.5 - 1, labels[rows]


def train_peer(peer, batches, started, budget, marks):
    """Train a peer until the budget, counted from the time ``started``, is spent; keep its weights.

    A step that might not end in time is not begun. Returns a list of ``marks``, at equal parts of
    the budget: (weights, seconds, steps).
    """
    snapshots, steps, slowest = [], 0, MARGIN
    while len(snapshots) < marks:
        begun = time.time()
        if begun - started + slowest >= budget * (len(snapshots) + 1) / marks:
            snapshots.append((peer.weights(), begun - started, steps))
            continue
        peer.step(*next(batches))
        steps += 1
        if steps > 1:  # the first one warms up
            slowest = max(slowest, time.time() - begun)
    return snapshots


def build_peer(name, parameters, args):
    """A peer of ``peers.PEERS``; the global generator starts over."""
    torch.manual_seed(0)
    return peers.PEERS[name].build(parameters, torch.device(args.device))


def train_peer_process(name, parameters, args, started, folder):
    """Train a peer, in a process of its own; leaves its weights and points.json."""
    entry, peer = peers.PEERS[name], build_peer(name, parameters, args)
    batches = training_batches(args.data_dir, args.peer_batch_size, torch.device(args.device))
    points = []
    for weights, seconds, steps in train_peer(
        peer, batches, started, 60 * args.minutes, args.marks
    ):
        snapshot = f"snapshot_{len(points)}.pt"
        torch.save(weights, folder / snapshot)
        model = f"{entry.package} {speed.installed(entry.package)}, {entry.words}"
        trained = f"{steps:,} steps of {args.peer_batch_size} images"
        points.append(dataclasses.asdict(Point(model, seconds / 60, trained, snapshot)))
    (folder / "points.json").write_text(json.dumps(points), encoding="utf-8")


def train_peer_apart(name, parameters, args, folder):
    """Train a peer: a list of ``Point``. Raises RuntimeError."""
    arguments = (name, parameters, args, time.time(), folder)
    process = multiprocessing.get_context("spawn").Process(
        target=train_peer_process, args=arguments
    )
    process.start()
    try:
        process.join()
    finally:
        process.kill()  # where this one is stopped; one that has ended does not mind
    if process.exitcode != 0:
        raise RuntimeError(f"{name} ended with status {process.exitcode}")
    return [Point(**point) for point in json.loads((folder / "points.json").read_text("utf-8"))]


def sample_peer(name, parameters, args, folder, point, file):
    """Sample a peer, see ``Contestant``."""
    entry, peer = peers.PEERS[name], build_peer(name, parameters, args)
    peer.load(torch.load(folder / point.snapshot, args.device, weights_only=True))
    samples = speed.sample_in_chunks(peer, args.samples)
    labels = np.full(len(samples), -1)
    if entry.conditional:
        labels = peers.classes_in_turn(len(samples), "cpu").numpy()
    np.savez(file, samples.numpy()[..., None], labels)
    point.parameters = speed.parameter_count(peer.model)
    point.sampler, point.evaluations = peer.sampler, peer.evaluations


# --------------------------------------------------------------------------------------------------
# Scores, table and plot
# --------------------------------------------------------------------------------------------------


def measure_floors(count, reference):
    """The scored rows of ``count`` real training images, balanced and drawn at random."""
    balanced = torch.arange(count) % fe.NUM_CLASSES
    return [quality.load_floor(count, labels, reference) for labels in (balanced, None)]


def format_points(points, floors, args, device):
    """The Markdown of the points, the real images' scores, and what was the same for all."""
    columns = {
        "percent_of_blur": "FMD, of blur",
        "swd_percent_of_blur": "SWD, of blur",
        "fd_random_percent_of_blur": "random features, of blur",
        "worst_percent_of_blur": "worst of blur",
        "detail": "detail",
        "accuracy": "accuracy",
    }

    def scores(row):
        return " | ".join(leaderboard.format_score(row, column) for column in columns)

    heads = ["model", "parameters", "minutes", "trained", "sampler: evaluations", *columns.values()]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for point in points:
        lines.append(
            f"| {point.model} | {point.parameters / 1e6:.2f} M | {point.minutes:.1f} | "
            f"{point.trained} | {point.sampler}: {point.evaluations:g} | {scores(point.scores)} |"
        )
    for floor in floors:
        name = floor["file"].removeprefix("reference: ")
        lines.append(f"| {name} | | | | | {scores(floor)} |")
    return (
        "\n".join(lines)
        + f"\n\n{args.minutes:g} minutes each, {args.samples:,} samples a row, one "
        f"run, on {speed.hardware(device)}, torch {torch.__version__.partition('+')[0]}.\n\n"
        "![Distances to the test images against minutes of training](time_to_quality.png)"
    )


def save_plot(points, floors, path):
    """A plot of what each eye sees against minutes: a line a model, dotted where it knows no
    classes; dashed, the balanced floor."""
    eyes = {
        "percent_of_blur": "a classifier: FMD",
        "swd_percent_of_blur": "patches: SWD",
        "fd_random_percent_of_blur": "untrained network",
    }
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(eyes)), eyes.items()):
        for model in dict.fromkeys(point.model for point in points):
            own = [point for point in points if point.model == model]
            places = [(point.minutes, point.scores[key]) for point in own]
            style = "o:" if own[0].scores["accuracy"] is None else "o-"
            axes.plot(*zip(*places), style, markersize=4, label=model)
        axes.axhline(floors[0][key], color="black", linestyle="--", label="real training images")
        axes.set(title=title, xlabel="minutes of training", yscale="log", xlim=(0, None))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("of the blurred reference's")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    how = {"title": "solid: with classes, dotted: without", "ncols": 2, "fontsize": 8}
    figure.legend(handles, labels, loc="outside lower center", **how)
    figure.savefig(path, dpi=100)


def save_json(points, floors, path):
    """All scores of all points and floors: a list of flat objects, without files' names."""
    rows = []
    for point in points:
        row = dataclasses.asdict(point)
        del row["snapshot"]
        rows.append(row | row.pop("scores"))
    floors = [{"model": floor["file"], **floor} for floor in floors]
    for floor in floors:
        del floor["file"]
    path.write_text(json.dumps(rows + floors, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def parse_command_line(argv):
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "versions", nargs="*", metavar="VERSION", help="default: LatentDiffusionModel/v3"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help=f"also train what is installed of {', '.join(peers.PEERS)}",
    )
    parser.add_argument(
        "--minutes", type=float, default=10, help="of training, for each (default: 10)"
    )
    parser.add_argument(
        "--samples", type=int, default=2000, help="to score, of each (default: 2000)"
    )
    parser.add_argument(
        "--marks", type=int, default=4, help="times at which a peer is scored (default: 4)"
    )
    parser.add_argument(
        "--peer-batch-size", type=int, default=32, help="images a step of the peers (default: 32)"
    )
    parser.add_argument("--device", default="auto", help="as the scripts' flag (default: auto)")
    parser.add_argument(
        "--data-dir", type=Path, default=fe.DEFAULT_DATA_DIR, help="torchvision's root"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="keeps what each has learned, and the scores, so that the race can go on",
    )
    parser.add_argument(
        "--readme", type=Path, default=fe.HERE / "README.md", help="file that the table goes to"
    )
    args = parser.parse_args(argv)
    args.versions = args.versions or ["LatentDiffusionModel/v3"]
    if args.minutes <= 0 or args.marks < 1 or args.samples < quality.FEWEST_SAMPLES:
        parser.error(
            f"needs minutes above 0, 1 mark or more, and {quality.FEWEST_SAMPLES} samples or more"
        )
    return args


def read_points(settings, folder):
    """The points that a contestant's folder holds of an earlier race; None where it has to train.

    Raises ValueError where the folder is of a race with other settings, or of none.
    """
    if not folder.exists():
        return None
    path = folder / "race.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no race.json: remove it, or name another --folder")
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["settings"] != settings:
        raise ValueError(f"{path} is of a race with {kept['settings']}, not {settings}")
    return kept["points"] and [Point(**point) for point in kept["points"]]


def save_points(points, settings, folder):
    """Write a contestant's race.json, whole or not at all; points are None until it has trained."""
    points = points and [dataclasses.asdict(point) for point in points]
    content = json.dumps({"settings": settings, "points": points}, allow_nan=False)
    unfinished = folder / "race.tmp"
    unfinished.write_text(content, encoding="utf-8")
    unfinished.replace(folder / "race.json")


def train(contestant, settings, folder):
    """Train a contestant: its points. What a training that was cut off left in the folder goes."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    save_points(None, settings, folder)
    print(f"{contestant.name}: training", flush=True)
    points = contestant.train(folder)
    save_points(points, settings, folder)
    return points


def contestants(args, versions, scratch):
    """All ``Contestant``s; ``scratch`` is a folder to measure the first version's size in."""
    found = []
    for version, path in versions.items():
        script = hashlib.sha256(path.read_bytes()).hexdigest()
        functions = (
            partial(plan_and_train_version, version, path, args),
            partial(sample_version, path, args),
        )
        found.append(Contestant(version.replace("/", "_"), script, *functions))
    if not args.peers:
        return found
    first = next(iter(versions.values()))
    speed.make_untrained(first, speed.script_flags(args), scratch / "first")
    parameters = speed.Sampler(first, scratch / "first", args.device).parameters
    for name, peer in peers.PEERS.items():
        if speed.installed(peer.package) is None:
            print(
                f"{peer.package} is not installed (requirements.txt beside this file)",
                file=sys.stderr,
            )
            continue
        size = None if peer.own_size else parameters
        release = f"{speed.installed(peer.package)}, {size} parameters"
        functions = (partial(each, name, size, args) for each in (train_peer_apart, sample_peer))
        found.append(Contestant(name, release, *functions))
    return found


def run_race(race, settings, reference, folder):
    """Train all contestants, then sample and score them; yield the points scored so far after each.

    What ``folder`` holds is not done again. Who fails to train is left out; RuntimeError names them
    at the end.
    """
    settings = {each.name: settings | {"contestant": each.what} for each in race}
    trained = {each.name: read_points(settings[each.name], folder / each.name) for each in race}
    for each in race:
        if trained[each.name] is None:
            try:
                trained[each.name] = train(each, settings[each.name], folder / each.name)
            except (RuntimeError, ValueError) as error:
                print(f"{each.name}: {error}", file=sys.stderr)
    scored = []
    for each in race:
        own, points = folder / each.name, trained[each.name]
        if points is None:
            continue
        if not points:
            print(f"{each.name}: nothing to sample after these minutes", file=sys.stderr)
        for point in points:
            if not point.scores:
                file = own / f"samples_of_{Path(point.snapshot).stem}.npz"
                each.sample(own, point, file)
                point.scores = quality.score_against(*quality.read_samples(file), reference)
                save_points(points, settings[each.name], own)
                worst = leaderboard.format_score(point.scores, "worst_percent_of_blur")
                print(f"{point.model}, {point.minutes:.1f} min: {worst} of blur", flush=True)
        scored += points
        yield scored
    failed = [name for name, points in trained.items() if points is None]
    if failed:
        raise RuntimeError(f"no training of {', '.join(failed)}")


def main(argv=None, repository=speed.REPOSITORY):
    """Command line. Exits 2 with one line on bad input."""
    args = parse_command_line(argv)
    try:
        versions = speed.find_versions(args.versions, repository)
        device = speed.pick_device(versions, args.device)
        args.device = str(device)
        reference = quality.load_reference(args.data_dir)
        floors = measure_floors(args.samples, reference)
        settings = {key: getattr(args, key) for key in ("minutes", "samples", "marks")}
        settings |= {"batch": args.peer_batch_size, "device": args.device}
        settings |= {"machine": speed.hardware(device), "torch": torch.__version__}
        with tempfile.TemporaryDirectory() as scratch:
            folder = (args.folder or Path(scratch)).expanduser()
            race = contestants(args, versions, Path(scratch))
            for points in run_race(race, settings, reference, folder):
                text = format_points(points, floors, args, device)
                save_plot(points, floors, args.readme.with_name("time_to_quality.png"))
                save_json(points, floors, args.readme.with_name("time_to_quality.json"))
                leaderboard.replace_block(args.readme, "time-to-quality", text)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends what it has started, too
    main()
