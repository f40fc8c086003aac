"""Draw the figures that compare versions: for a README 840 pixels wide, at double density.

    python tests/benchmarks/across.py ladder       noise to image in each version's finished run
    python tests/benchmarks/across.py schedules    a real boot on its way to noise; needs no run
    python tests/benchmarks/across.py learning LatentDiffusionModel/v3
                                                   trains it, and shows what it draws epoch by epoch

They are written to ``figures/`` beside this file, or to --figures. A version's run is in its
``output/``, or where --output-dir VERSION=DIR says (once a version). For *learning* it is a run of
its own, by default in ``output/learning/``; flags that this command does not know go to the script,
as --epochs 4 does, and a run that was cut off goes on when the command is given again. README.md,
beside this file, says what the figures show.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
import feature_extractor as fe
import leaderboard
import quality
import speed
from time_to_quality import thin

WIDTH = 840  # pixels of the page, in which all sizes below are given
DENSITY = 2  # pixels of the file for one of the page: a phone shows the small pictures sharp
DPI = 100  # pixels of the page an inch
BOARD = Path(__file__).with_name("leaderboard.json")

IDEAS = {  # in the order in which the scripts are to be read
    "ImageDiffusionModel/CNN": "DDPM on pixels:\npredicts the noise",
    "LatentDiffusionModel/v1": "the same on latents\nof an autoencoder",
    "LatentDiffusionModel/v2": "classes, cosine\nschedule, predicts v",
    "ImageDiffusionModel/Transformer": "on pixels again:\nno convolutions",
    "ImageDiffusionModel/UNet": "EDM: noise levels σ,\nHeun's steps",
    "LatentDiffusionModel/v3": "rectified flow:\nstraighter paths",
}
BOOT = 9  # label of Ankle boot; so sample 9 is the first one where there are classes
LADDER_STEPS = 10
SCORES = {"FMD": "percent_of_blur", "SWD": "swd_percent_of_blur"}

SCHEDULES = {  # {version: name of its forward process, colour, line}
    "ImageDiffusionModel/CNN": ("linear, DDPM (CNN, v1)", "tab:blue", "-"),
    "ImageDiffusionModel/Transformer": ("cosine (Transformer, v2)", "tab:orange", "--"),
    "ImageDiffusionModel/UNet": ("EDM (UNet)", "tab:green", "-."),
    "LatentDiffusionModel/v3": ("rectified flow (v3)", "tab:red", ":"),
}
SCHEDULE_STEPS = 1000
SCHEDULE_COLUMNS = 9

MOST_EPOCHS = 10  # columns of the learning figure
PICTURED = (BOOT, 3, 8)  # samples: where there are classes, a boot, a dress and a bag
DEFAULT_VERSION = "LatentDiffusionModel/v3"


# --------------------------------------------------------------------------------------------------
# Drawing in pixels
# --------------------------------------------------------------------------------------------------


def blank(height):
    """A figure of ``WIDTH`` by ``height`` pixels."""
    return Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI * DENSITY)


def pixels(figure):
    """Height of a figure."""
    return round(figure.get_figheight() * DPI)


def write(figure, text, left, top, size=20, **style):
    """Write text of ``size`` pixels; ``left`` and ``top``, in pixels, are its upper left corner
    unless the style aligns it otherwise."""
    height = pixels(figure)
    style = {"ha": "left", "va": "top", "fontsize": size * 72 / DPI} | style
    figure.text(left / WIDTH, 1 - top / height, text, **style)


def paste(figure, image, left, top, factor):
    """Put a uint8 image (28, 28), each pixel a square of ``factor`` pixels, at this corner."""
    large = np.asarray(image)
    for axis in (0, 1):
        large = large.repeat(round(factor * DENSITY), axis)
    place = left * DENSITY, (pixels(figure) - top) * DENSITY - len(large)
    figure.figimage(large[:, :, None].repeat(3, axis=2), *place, origin="upper")


def save(figure, path):
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI * DENSITY, pil_kwargs={"optimize": True})
    print(path)


# --------------------------------------------------------------------------------------------------
# The ladder
# --------------------------------------------------------------------------------------------------


def read_trajectory(path, output, device="auto"):
    """Images of a finished run's sample 9 on its way, by the deterministic sampler in equal steps.

    Returns: uint8 (2, S + 1, 28, 28): the states, noise first, and the guesses of the clean image;
    latents are decoded. Raises ValueError where there is no checkpoint that can be read.
    """
    script = speed.load_script(path)
    with speed.calls_of(script):
        models = script.load_trained(output, device)
        noise = script.noise_of_samples(models, range(BOOT, BOOT + 1))()
        classes = script.class_weights(script.labels_in_turn(BOOT + 1, models.device)[BOOT:])
        drawn = script.draw_trajectories(models, noise, classes, LADDER_STEPS)
        images = script.decode_images(models, torch.stack([drawn.states, drawn.guesses]))
    return images[:, :, 0, 0].cpu()


def scores_in_words(row):
    """What the leaderboard's row of a version says, in percent of blur."""
    scores = [f"{name} {percent(row[key])}" for name, key in SCORES.items() if key in row]
    return ", ".join(scores) or "not measured"


def percent(score):
    """A score in percent as text, of two digits."""
    return f"{score:.1f}%" if score < 9.95 else f"{score:.0f}%"


def is_scored(output, row):
    """Whether a row of the leaderboard is of the run in this folder."""
    try:
        return leaderboard.fingerprint(leaderboard.find_results(output)) == row["fingerprint"]
    except (leaderboard.NotMeasured, KeyError):
        return False


def draw_ladder(trajectories, rows):
    """The figure of {version: images as of ``read_trajectory``} and {version: row of the
    leaderboard}, from top to bottom in the order of the former."""
    factor, gap, labels, left, above, group = 1.5, 2, 208, 266, 78, 116
    tile = round(28 * factor) + gap
    figure = blank(above + group * len(trajectories) + 56)
    write(figure, "From noise to image", 4, 6, 24, weight="bold")
    write(figure, "ten steps without fresh noise; where there are classes, to a boot", 4, 40)
    for top, (version, images) in zip(range(above, above + 10**6, group), trajectories.items()):
        write(figure, version.split("/")[1], 4, top, 22, weight="bold")
        write(figure, IDEAS[version], 4, top + 28, 18)
        write(figure, scores_in_words(rows.get(version, {})), 4, top + 78, 18)
        for line, name in enumerate(("state", "guess")):
            row = top + 4 + line * tile
            write(figure, name, labels, row + tile // 2, 18, va="center")
            for column, image in enumerate(images[line]):
                paste(figure, image, left + column * tile, row, factor)
        paste(figure, images[0, -1], WIDTH - 4 - 84, top + 5, 3)
    bottom = pixels(figure)
    text = "guess: the image that the model expects.  States of v1, v2, v3: decoded latents."
    write(figure, text, 4, bottom - 56)
    text = "FMD, SWD: distances to real images; blurred real images stand at 100%."
    write(figure, text, 4, bottom - 30)
    return figure


def ladder(args, repository):
    """Read the runs and draw them. Warns of a run that is not the one whose scores stand there."""
    scripts, outputs = speed.find_versions(IDEAS, repository), read_folders(args.output_dir, IDEAS)
    rows = {row["version"]: row for row in json.loads(BOARD.read_text("utf-8"))["versions"]}
    trajectories = {}
    for version, path in scripts.items():
        output = outputs.get(version, path.parent / "output")
        trajectories[version] = read_trajectory(path, output, args.device)
        if not is_scored(output, rows.get(version, {})):
            print(f"warning: the scores of {version} are not of {output}", file=sys.stderr)
    save(draw_ladder(trajectories, rows), args.figures / "ladder.png")


# --------------------------------------------------------------------------------------------------
# The schedules
# --------------------------------------------------------------------------------------------------


def noised(script, image, noise):
    """The forward process of a script as its figures show it, with their captions.

    It is asked for the way out beside a trajectory, which here ends at ``image``.

    Args:
        image, noise: (28, 28), float64.

    Returns: (S + 1, 28, 28) in ``SCHEDULE_STEPS`` equal steps of the script's own time, from image
    to noise, and S + 1 texts.
    """
    states = image.expand(SCHEDULE_STEPS + 1, 1, 1, 28, 28)
    script.trajectory = lambda *args: (states, states)
    drawn = script.draw_trajectories(None, noise.expand(1, 1, 28, 28), None, SCHEDULE_STEPS)
    return drawn.noised[:, 0, 0].flip(0), drawn.captions[::-1]


def log_snr(script):
    """ln(a^2 / b^2) of x_t = a x_0 + b noise, (S + 1,) from image to noise; infinite where a or b
    is 0."""
    zeros, ones = torch.zeros(28, 28).double(), torch.ones(28, 28).double()
    signal, noise = (noised(script, *pair)[0][:, 0, 0] for pair in ((ones, zeros), (zeros, ones)))
    return 2 * (signal / noise).log()


def read_real(data_dir, label):
    """The first validation image of a class, uint8 (28, 28)."""
    images, labels = (part[-fe.VALIDATION_SIZE :] for part in fe.load_split(data_dir, train=True))
    return images[labels == label][0]


def draw_schedules(scripts, boot):
    """The figure of {version: script as a module} and a uint8 image (28, 28): pictures above, the
    signal-to-noise ratios below, on the same axis of time."""
    factor, row, plot = 3, 122, 400
    tile = 28 * factor
    lefts = np.linspace(4, WIDTH - 4 - tile, SCHEDULE_COLUMNS).round().astype(int)
    places = np.linspace(0, SCHEDULE_STEPS, SCHEDULE_COLUMNS).round().astype(int)
    noise = torch.randn(28, 28, generator=torch.Generator().manual_seed(0)).double()
    height = 50 + row * len(scripts) + 20 + plot
    figure, top = blank(height), 50
    write(figure, "From image to noise", 4, 6, 24, weight="bold")
    write(figure, "here of pixels, in v1, v2 and v3 of latents", WIDTH - 4, 10, ha="right")
    first, last = (left + tile / 2 for left in lefts[[0, -1]])
    box = first / WIDTH, 60 / height, (last - first) / WIDTH, (plot - 105) / height
    axes = figure.add_axes(box)
    for version, script in scripts.items():
        name, colour, line = SCHEDULES[version]
        images, captions = noised(script, script.to_float(boot).double(), noise)
        levels = captions[0].startswith("σ")
        note = ", shown times σ_data / √(σ² + σ_data²)" if levels else ""
        write(figure, name + note, 4, top + 3, color=colour, weight="bold")
        for left, place in zip(lefts, places):
            paste(figure, script.to_uint8(images[place]), left, top + 30, factor)
            if levels:
                text = captions[place].replace(" ", "")
                write(figure, text, left + tile / 2, top + 31 + tile, 18, ha="center")
        top += row + 20 * levels
        axes.plot(log_snr(script), line, color=colour, lw=3, label=name)
    write(figure, "log signal-to-noise ratio", 4, height - plot + 12, weight="bold")
    size = 20 * 72 / DPI
    axes.set(xlim=(0, SCHEDULE_STEPS), ylim=(-14, 14), xticks=places[::2])
    axes.set_yticks((-10, 0, 10), ("-10", "0", "10"))
    axes.set_xlabel("time t; for EDM, steps of σ", fontsize=size)
    axes.tick_params(labelsize=size)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=size, loc="upper right", handlelength=2.5, frameon=False)
    return figure


def schedules(args, repository):
    """Draw the forward processes as the scripts define them."""
    paths = speed.find_versions(SCHEDULES, repository)
    scripts = {version: speed.load_script(path) for version, path in paths.items()}
    save(draw_schedules(scripts, read_real(args.data_dir, BOOT)), args.figures / "schedules.png")


# --------------------------------------------------------------------------------------------------
# Learning
# --------------------------------------------------------------------------------------------------


def train(path, flags, output, count):
    """Run a script, and let it export ``count`` samples of its averaged networks after each of at
    most ``MOST_EPOCHS`` epochs of the diffusion, evenly spaced, and at the end of a decoder that is
    trained after it.

    It is the script's own run: the plan of learning rates is that of all its epochs, and sampling
    touches none of training's random numbers.

    Returns: the run's exit status, and {epoch, or "decoder": file of its samples}.
    """
    script, files = speed.load_script(path), {}
    train_steps = script.train_steps
    script.is_fast = lambda device: False  # else short epochs would pass unseen

    def train_and_export(run, stage, arrays, validate, after_epoch):
        columns, epochs = {}, stage.total_steps // stage.steps_per_epoch  # {epoch: its name}
        if stage.name == "diffusion":
            columns = {epoch: epoch for epoch in thin(range(1, epochs + 1), MOST_EPOCHS)}
        elif stage.name == "decoder":
            columns = {epochs: "decoder"}

        def export(epoch):
            after_epoch(epoch)
            if epoch in columns:
                script.export_samples(run.models, count, files[columns[epoch]].parent)

        for name in columns.values():
            folder = f"epoch_{name}" if stage.name == "diffusion" else name
            files[name] = output / "learning" / folder / "samples.npz"
            if stage.step == 0:  # of an older run
                files[name].unlink(missing_ok=True)
        train_steps(run, stage, arrays, validate, export)

    script.train_steps = train_and_export
    status = script.exit_status(partial(script.main, [*flags, "--output-dir", str(output)]))
    return status, files


def read_epochs(files):
    """{epoch: uint8 images (N, 28, 28) and labels} of {epoch: file}; ValueError where some are
    missing or N is not always the same."""
    missing = [str(epoch) for epoch, file in files.items() if not file.is_file()]
    samples = {} if missing else {epoch: quality.read_samples(files[epoch]) for epoch in files}
    if missing or len({len(images) for images, _ in samples.values()}) > 1:
        reason = f"no samples of epoch {', '.join(missing)}" if missing else "unequal numbers"
        folder = next(iter(files.values())).parents[1]
        raise ValueError(f"{reason} in {folder}: start over with --fresh")
    return samples


def score_epochs(samples, data_dir):
    """Score {epoch: images and labels} against the validation images. Returns {epoch: row}, and the
    row of as many real training images."""
    reference = quality.load_reference(data_dir, validation=True)
    rows = {epoch: quality.score_against(*each, reference) for epoch, each in samples.items()}
    images, labels = next(iter(samples.values()))
    return rows, quality.load_floor(len(images), labels, reference)


def draw_learning(version, samples, rows, floor, real):
    """The figure of {epoch: images and labels}, {epoch: scores}, the scores of real images, and
    {sample: real image of its class}, empty where there are no classes."""
    left, above = 76, 106
    column = (WIDTH - left) // (len(samples) + 1)
    factor = min(4, (column - 4) // 28)
    tile = 28 * factor + 4
    below = above + tile * len(PICTURED)
    figure = blank(below + 104)
    [count] = {len(images) for images, _ in samples.values()}
    write(figure, f"{version.split('/')[1]} learns", 4, 6, 24, weight="bold")
    title = "one noise a row, through the averaged weights after each epoch"
    write(figure, title + ", and after the decoder's" * ("decoder" in samples), 4, 40)
    words = {"epoch": above - 30, **{name: below + 4 + 26 * n for n, name in enumerate(SCORES)}}
    for word, top in words.items():
        write(figure, word, 4, top, weight="bold")
    for index, (epoch, row) in enumerate([*rows.items(), ("real", floor)]):
        middle = left + column * (index + 0.5)
        write(figure, str(epoch), middle, words["epoch"], ha="center")
        for name, key in SCORES.items():
            write(figure, percent(row[key]), middle, words[name] + 1, 18, ha="center")
        shown = samples[epoch][0] if epoch in samples else real
        for line, sample in enumerate(PICTURED if len(shown) else ()):
            place = round(middle) - 14 * factor, above + tile * line
            paste(figure, shown[sample], *place, factor)
    text = f"FMD, SWD: {count:,} samples against validation images; blurred ones: 100%"
    write(figure, text, 4, below + 66)
    return figure


def learning(args, flags, repository):
    """Train a version, or go on with it, score its epochs and draw them."""
    [(version, path)] = speed.find_versions([args.version or DEFAULT_VERSION], repository).items()
    if args.samples < quality.FEWEST_SAMPLES:
        raise ValueError(f"--samples {args.samples}: {quality.FEWEST_SAMPLES} are the least")
    folders = read_folders(args.output_dir, [version])
    output = folders.get(version, path.parent / "output" / "learning")
    status, files = train(path, [*flags, *speed.script_flags(args)], output, args.samples)
    if status:  # the script has said why
        sys.exit(status)
    samples = read_epochs(files)
    rows, floor = score_epochs(samples, args.data_dir)
    labels = next(iter(samples.values()))[1][[*PICTURED]].tolist()
    pairs = [pair for pair in zip(PICTURED, labels) if pair[1] >= 0]
    real = {sample: read_real(args.data_dir, label) for sample, label in pairs}
    figure = draw_learning(version, samples, rows, floor, real)
    save(figure, args.figures / "learning.png")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def read_folders(texts, versions):
    """{version: folder} of texts VERSION=DIR; ValueError where one is something else."""
    folders = {}
    for text in texts:
        version, _, folder = text.partition("=")
        if version not in versions or not folder:
            raise ValueError(f"--output-dir {text!r} is not VERSION=DIR of {', '.join(versions)}")
        folders[version] = Path(folder).expanduser()
    return folders


def main(argv=None, repository=speed.REPOSITORY):
    """Command line. Exits 2 with one line on bad input; as the script where it trains one."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("figure", choices=("ladder", "schedules", "learning"))
    parser.add_argument(
        "version", nargs="?", metavar="VERSION", help=f"of learning (default: {DEFAULT_VERSION})"
    )
    parser.add_argument(
        "--output-dir", action="append", default=[], metavar="VERSION=DIR", help="of a run"
    )
    parser.add_argument(
        "--figures",
        type=Path,
        default=Path(__file__).with_name("figures"),
        metavar="DIR",
        help="to write to (default: figures/ beside this file)",
    )
    parser.add_argument(
        "--samples", type=int, default=2000, help="of learning, an epoch (default: 2000)"
    )
    parser.add_argument("--device", default="auto", help="as the scripts' flag (default: auto)")
    parser.add_argument(
        "--data-dir", type=Path, default=fe.DEFAULT_DATA_DIR, help="torchvision's root"
    )
    args, flags = parser.parse_known_args(argv)
    try:
        if args.figure == "learning":
            return learning(args, flags, repository)
        if flags or args.version:
            raise ValueError(
                f"{args.figure} knows no {' '.join([args.version or '', *flags]).strip()}"
            )
        {"ladder": ladder, "schedules": schedules}[args.figure](args, repository)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
