"""Train versions and peers for the same minutes on the same machine, and print how good their samples are.

    python tests/benchmarks/time_to_quality.py                     LatentDiffusionModel/v3, for 10 minutes
    python tests/benchmarks/time_to_quality.py --peers             and what is installed of the peers
    python tests/benchmarks/time_to_quality.py --minutes 1 --samples 200 --readme README.md    a trial, see below

Only training counts against the minutes, from the start of the process on, so imports and reading the data do too;
planning, sampling and scoring don't. The table and the plot go between markers of README.md beside this file, or of the
file that --readme names, which must hold the markers. README.md says how the budgets are spent and what is fair in it.
"""

import argparse
import csv
import dataclasses
import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent))
import feature_extractor as fe
import leaderboard
import quality
import speed

PEERS = {"smalldiffusion": "DiT example", "denoising-diffusion-pytorch": "DDPM"}
START_UP = 20  # seconds of a version's budget that are not steps: imports, data, encoding
SLACK = 0.08  # share of the rest that is not planned for: validation, saving, and a machine that slows down
MARGIN = 1.0  # seconds before the end of the budget at which training is told to stop
MOST_SNAPSHOTS = 8  # of a version, the last one among them
PILOT_STEPS = 40


@dataclasses.dataclass
class Point:
    """Samples of one contestant after some training."""

    model: str
    parameters: int
    minutes: float  # of training, from the start of its process
    trained: str  # how much, in words
    sampler: str
    evaluations: float  # of the denoiser, an image
    samples: Path
    fmd: float = 0.0
    percent_of_blur: float = 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Versions
# ---------------------------------------------------------------------------------------------------------------------


def plan_training(stages, fields, budget):
    """Split a budget over the stages in the proportion of the published recipe.

    Epochs are whole numbers: rather one too many, and fewer training images, than minutes that are not used.

    Args:
        stages: of ``speed.measure_training``.
        fields: names of the configuration's fields of epochs, a stage's in the stage's place.
        budget: seconds.

    Returns: {field: epochs} and the share of the training images, above 0 and at most 1.
    """
    costs = [stage.median() * stage.steps_per_epoch for stage in stages]  # seconds an epoch
    available = (1 - SLACK) * max(budget - START_UP, budget / 4)
    published = sum(cost * stage.epochs for cost, stage in zip(costs, stages))
    epochs = [max(1, round(available / published * stage.epochs)) for stage in stages]
    left = available - sum(cost * count for cost, count in zip(costs, epochs))
    epochs[-1] += max(0, math.ceil(left / costs[-1]))
    planned = sum(cost * count for cost, count in zip(costs, epochs))
    return dict(zip(fields, epochs, strict=True)), min(1.0, available / planned)


def finished_epochs(output, stage):
    """The number of epochs of a stage in an output folder's metrics.csv."""
    path = output / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open(newline="", encoding="utf-8") as file:
        return sum(row["stage"] == stage for row in csv.DictReader(file))


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


def train_version(path, flags, stage, epochs, budget, folder):
    """Run a script until it has finished training or the budget is spent; keep the models of each epoch.

    Args:
        path, flags: the command.
        stage, epochs: name and number of epochs of the last stage, whose models can be sampled from.
        budget: seconds from the start of the process.
        folder: receives output/ and the snapshots, folders of their own.

    Returns: a list of (folder of a snapshot, seconds, epochs). Raises RuntimeError if the script fails.
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
                done = finished_epochs(output, stage)
                if done > (snapshots[-1][2] if snapshots else 0):
                    keep(elapsed, done)
                if ended or done == epochs or elapsed >= budget - MARGIN:
                    break
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                stop(process)
    if done < epochs and process.returncode not in (143, -15):
        raise RuntimeError(f"{path} ended with status {process.returncode}: {log.read_text()[-500:].strip()}")
    if done < epochs and process.returncode == 143 and f"{stage}, step" in log.read_text().splitlines()[-1]:
        keep(min(elapsed + MARGIN, budget), done)  # cut off within an epoch
    return snapshots


def thin(items, most):
    """At most ``most`` of the items, evenly spaced, the last one among them."""
    chosen = sorted({round((k + 1) * len(items) / min(most, len(items))) - 1 for k in range(min(most, len(items)))})
    return [items[index] for index in chosen]


def run_version(version, path, args, folder):
    """Plan, train and sample a version: a list of ``Point``, the samples not yet scored."""
    flags = speed.script_flags(args)
    script = speed.load_script(path)
    images = script.Settings().train_images
    stages = speed.measure_training(path, flags, PILOT_STEPS)
    epochs, share = plan_training(stages, speed.epoch_fields(script.Settings), 60 * args.minutes)
    plan = [*speed.epoch_flags(epochs), "--train-images", str(round(share * images))]
    print(f"{version}: planned {' '.join(plan)}", flush=True)
    *earlier, last = epochs.values()
    snapshots = train_version(path, [*flags, *plan], stages[-1].name, last, 60 * args.minutes, folder)
    if not snapshots:
        print(f"{version}: no samples within {args.minutes:g} minutes", file=sys.stderr)
    points = []
    for snapshot, seconds, done in thin(snapshots, MOST_SNAPSHOTS):
        command = [sys.executable, path, *flags, "--output-dir", snapshot]
        command += ["--sample-only", "--export-samples", args.samples]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        sampler = speed.Sampler(path, snapshot, args.device)
        sampler.seconds(10)  # counts the evaluations
        counts = " + ".join(map(str, [*earlier, done]))
        points.append(
            Point(
                model=version,
                parameters=sampler.parameters,
                minutes=seconds / 60,
                trained=f"{counts} epochs of {round(share * images):,} images",
                sampler=sampler.description(),
                evaluations=sampler.evaluations(),
                samples=snapshot / "samples.npz",
            )
        )
    return points


# ---------------------------------------------------------------------------------------------------------------------
# Peers
# ---------------------------------------------------------------------------------------------------------------------


def training_batches(data_dir, batch_size, device):
    """Yield endless batches (B, 1, 28, 28) in [-1, 1] of the images that the versions train on, each once an epoch."""
    images = fe.load_split(data_dir, train=True)[0][: -fe.VALIDATION_SIZE, None].to(device)
    while True:
        for rows in torch.randperm(len(images), device=device).split(batch_size):
            yield images[rows].float() / 127.5 - 1


def train_peer(peer, batches, started, budget, marks):
    """Train a peer until the budget is spent, counted from the time ``started``; keep its weights at equal parts.

    A step that might not end in time is not begun. Returns a list of ``marks`` (weights, seconds, steps).
    """
    snapshots, steps, slowest = [], 0, MARGIN
    while len(snapshots) < marks:
        begun = time.time()
        if begun - started + slowest >= budget * (len(snapshots) + 1) / marks:
            snapshots.append((peer.weights(), begun - started, steps))
            continue
        peer.step(next(batches))
        steps += 1
        if steps > 1:  # the first one warms up
            slowest = max(slowest, time.time() - begun)
    return snapshots


def run_peer_process(name, parameters, args, started, folder):
    """Train and sample a peer in a process of its own; leaves points.json in ``folder``, and the samples."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    peer = speed.PEERS[name](parameters, device)
    batches = training_batches(args.data_dir, args.peer_batch_size, device)
    points = []
    for weights, seconds, steps in train_peer(peer, batches, started, 60 * args.minutes, args.marks):
        peer.load(weights)
        path = folder / f"samples_{len(points)}.npz"
        samples = speed.sample_in_chunks(peer, args.samples)
        np.savez(path, samples.numpy()[..., None], np.full(len(samples), -1))
        points.append(
            {
                "model": f"{name} {speed.installed(name)}, {PEERS[name]}",
                "parameters": speed.parameter_count(peer.model),
                "minutes": seconds / 60,
                "trained": f"{steps:,} steps of {args.peer_batch_size} images",
                "sampler": peer.sampler,
                "evaluations": peer.evaluations,
                "samples": path.name,
            }
        )
    (folder / "points.json").write_text(json.dumps(points), encoding="utf-8")


def run_peer(name, parameters, args, folder):
    """Train and sample a peer: a list of ``Point``, the samples not yet scored. Raises RuntimeError if it fails."""
    arguments = (name, parameters, args, time.time(), folder)
    process = multiprocessing.get_context("spawn").Process(target=run_peer_process, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{name} ended with status {process.exitcode}")
    points = json.loads((folder / "points.json").read_text(encoding="utf-8"))
    return [Point(**point | {"samples": folder / point["samples"]}) for point in points]


# ---------------------------------------------------------------------------------------------------------------------
# Scores, table and plot
# ---------------------------------------------------------------------------------------------------------------------


def score(images, reference):
    """FMD of uint8 images (N, 28, 28), and the same in percent of the blurred reference's."""
    fmd = quality.fmd_of_features(fe.extract(images)[0], reference)
    return fmd, 100 * fmd / reference["blur_fmd"]


def score_floor(count, data_dir, reference):
    """What ``score`` gives ``count`` real training images."""
    images = fe.load_split(data_dir, train=True)[0][: -fe.VALIDATION_SIZE]
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return score(images[chosen], reference)


def format_points(points, floor, args, device):
    """The Markdown of the points, the real images' scores, and what was the same for all."""
    lines = ["| model | parameters | minutes | trained | sampler: evaluations | FMD | of blur |", "|" + "---|" * 7]
    for point in points:
        lines.append(
            f"| {point.model} | {point.parameters / 1e6:.2f} M | {point.minutes:.1f} | {point.trained} | "
            f"{point.sampler}: {point.evaluations:g} | {point.fmd:.3f} | {point.percent_of_blur:.2f}% |"
        )
    lines.append(f"| real training images | | | | | {floor[0]:.3f} | {floor[1]:.2f}% |")
    return (
        "\n".join(lines) + f"\n\n{args.minutes:g} minutes each, {args.samples:,} samples a row, one run, on "
        f"{speed.hardware(device)}, torch {torch.__version__.partition('+')[0]}.\n\n"
        "![FMD against minutes of training](time_to_quality.png)"
    )


def save_plot(points, floor, path):
    """A plot of percent of blur against minutes, both axes of one line a model; ``floor`` is the real images' score."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for model in dict.fromkeys(point.model for point in points):
        places = [(point.minutes, point.percent_of_blur) for point in points if point.model == model]
        axes.plot(*zip(*places), "o-", label=model)
    axes.axhline(floor[1], color="0.5", linestyle="--", label="real training images")
    axes.set(xlabel="minutes of training", ylabel="FMD, of the blurred reference's", yscale="log", xlim=(0, None))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def parse_command_line(argv):
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="default: LatentDiffusionModel/v3")
    parser.add_argument("--peers", action="store_true", help=f"also train what is installed of {', '.join(PEERS)}")
    parser.add_argument("--minutes", type=float, default=10, help="of training, for each (default: 10)")
    parser.add_argument("--samples", type=int, default=2000, help="to score, of each (default: 2000)")
    parser.add_argument("--marks", type=int, default=2, help="times at which a peer is scored (default: 2)")
    parser.add_argument("--peer-batch-size", type=int, default=32, help="images a step of the peers (default: 32)")
    parser.add_argument("--device", default="auto", help="as the scripts' flag (default: auto)")
    parser.add_argument("--data-dir", type=Path, default=fe.DEFAULT_DATA_DIR, help="torchvision's root")
    parser.add_argument("--readme", type=Path, default=fe.HERE / "README.md", help="file that the table goes to")
    args = parser.parse_args(argv)
    args.versions = args.versions or ["LatentDiffusionModel/v3"]
    if args.minutes <= 0 or args.marks < 1 or args.samples < quality.FEWEST_SAMPLES:
        parser.error(f"needs minutes above 0, 1 mark or more, and {quality.FEWEST_SAMPLES} samples or more")
    return args


def run_all(args, versions, folder):
    """Yield the points of one contestant after the other, their samples not yet scored."""
    for number, (version, path) in enumerate(versions.items()):
        (folder / str(number)).mkdir()
        yield run_version(version, path, args, folder / str(number))
    if not args.peers:
        return
    first = next(iter(versions.values()))
    speed.make_untrained(first, speed.script_flags(args), folder / "first")
    parameters = speed.Sampler(first, folder / "first", args.device).parameters
    for name in PEERS:
        if speed.installed(name) is None:
            print(f"{name} is not installed (requirements.txt beside this file)", file=sys.stderr)
            continue
        (folder / name).mkdir()
        yield run_peer(name, None if name == "smalldiffusion" else parameters, args, folder / name)


def main(argv=None, repository=speed.REPOSITORY):
    """Command line. Exits 2 with one line on bad input."""
    args, points = parse_command_line(argv), []
    try:
        versions = speed.find_versions(args.versions, repository)
        device = speed.pick_device(versions, args.device)
        args.device = str(device)
        reference = quality.load_reference(args.data_dir)
        floor = score_floor(args.samples, args.data_dir, reference)
        with tempfile.TemporaryDirectory() as folder:
            for more in run_all(args, versions, Path(folder)):
                for point in more:
                    point.fmd, point.percent_of_blur = score(quality.read_samples(point.samples)[0], reference)
                    print(f"{point.model}, {point.minutes:.1f} min: {point.percent_of_blur:.2f}% of blur", flush=True)
                points += more
                text = format_points(points, floor, args, device)
                save_plot(points, floor, args.readme.parent / "time_to_quality.png")
                leaderboard.replace_block(args.readme, "time-to-quality", text)
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(text)


if __name__ == "__main__":
    main()
