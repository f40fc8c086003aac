"""Copy the pictures of a finished run into a version's gallery/, small enough to be committed.

    python tests/benchmarks/gallery.py LatentDiffusionModel/v3                   from its output/
    python tests/benchmarks/gallery.py LatentDiffusionModel/v3 --output-dir DIR  from another

Of each figure the newest one is taken, and its name loses the epoch; strip.png is the first ten
samples of samples.npz, one of each class where there are classes, and real_and_generated.png the
first sixty beside as many test images. Animations are halved in size and given as many greys as a
gallery of 3 MB has room for, coloured figures 256 colours, and what an older run left in the
gallery goes. The run's page, index.html, stays where it is. Warns above 3 MB.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageSequence

sys.path.insert(0, str(Path(__file__).resolve().parent))
import feature_extractor as fe
import quality
import speed

FIGURES = (
    "loss_curves.png",
    "reconstruction/reconstruction.png",
    "*/*_epoch_*.png",
    "*/*_epoch_*.gif",
)
ANIMATION_WIDTH = 112  # pixels: four a pixel of the image, half of what the scripts draw
ANIMATION_GREYS = (32, 24, 16, 12, 8)  # the first that LIMIT has room for
FIGURE_GREYS = 64  # of the 256 colours of a figure; the others are for what is not grey
LIMIT = 3 * 10**6  # bytes of a gallery


def newest_figures(output):
    """{name in a gallery: path} of the figures in an output folder, of each the one of the latest
    epoch.

    A figure without an epoch in its name belongs to the finished run, so is the latest.
    """
    newest = {}
    for path in sorted({path for pattern in FIGURES for path in output.glob(pattern)}):
        stem, _, epoch = path.stem.partition("_epoch_")
        name = f"interpolation_{stem}" if path.parent.name == "interpolation" else stem
        newest.setdefault(name + path.suffix, []).append((float(epoch or "inf"), path))
    return {name: max(paths)[1] for name, paths in newest.items()}


def reduce_colours(image):
    """An RGB image in 256 colours: greys in equal steps, the others chosen by what the image's own
    colours need, so that no amount of grey crowds out a legend's dot."""
    colours, places = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) > 256:
        pixels = colours[places.ravel()]
        coloured = pixels[pixels.min(axis=1) < pixels.max(axis=1)]
        chosen = Image.fromarray(coloured[None]).quantize(256 - FIGURE_GREYS, kmeans=1)
        greys = np.linspace(0, 255, FIGURE_GREYS).round().repeat(3).reshape(-1, 3)
        palette = np.concatenate([greys, np.reshape(chosen.getpalette(), (-1, 3))])
        distances = np.square(colours[:, None].astype(int) - palette).sum(axis=2)
        places = distances.argmin(axis=1)[places.ravel()]
    else:
        palette = colours
    reduced = Image.fromarray(places.reshape(image.height, image.width).astype(np.uint8))
    reduced.putpalette(palette.astype(np.uint8).tobytes())
    return reduced


def save_still(source, target):
    """Write a PNG again: grey where it is grey, else in 256 colours, without the alpha that no
    figure uses."""
    image = Image.open(source).convert("RGB")
    red, green, blue = image.split()
    grey = red.tobytes() == green.tobytes() == blue.tobytes()
    (red if grey else reduce_colours(image)).save(target, optimize=True)


def save_animation(source, target, greys):
    """Write a GIF again in so many greys, scaled to ``ANIMATION_WIDTH``; timing and loop stay."""
    with Image.open(source) as animation:
        size = ANIMATION_WIDTH, round(animation.height * ANIMATION_WIDTH / animation.width)
        frames, durations = [], []
        for frame in ImageSequence.Iterator(animation):
            durations.append(frame.info["duration"])
            small = frame.convert("L").resize(size, Image.Resampling.BOX)
            frames.append(small.quantize(greys))
        loop = animation.info["loop"]
    frames[0].save(
        target,
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=loop,
        optimize=True,
    )


def tile(images, columns, enlargement=2):
    """A picture of images (N, 28, 28), row by row, each enlarged with a black border."""
    padded = np.pad(np.asarray(images), ((0, 0), (1, 1), (1, 1)))
    rows = padded.reshape(-1, columns, *padded.shape[1:]).swapaxes(1, 2)  # (R, 30, C, 30)
    picture = rows.reshape(rows.shape[0] * rows.shape[1], -1)
    return Image.fromarray(picture.repeat(enlargement, axis=0).repeat(enlargement, axis=1))


def first_of_each_class(images, labels, count):
    """The first ``count`` images of each of the ten classes, in turn: (10 ``count``, 28, 28)."""
    places = np.stack([np.flatnonzero(labels == label)[:count] for label in range(10)], axis=1)
    return images[places.ravel()]


def save_comparison(samples, real, title, target):
    """Write a picture of real images on the left and the same number of samples on the right, ten a
    row each."""
    left, right, gap, top = tile(real, 10), tile(samples, 10), 24, 30
    picture = Image.new("L", (left.width + gap + right.width, top + left.height), 255)
    dejavu = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    draw, font = ImageDraw.Draw(picture), ImageFont.truetype(dejavu, size=18)
    for place, part, text in ((0, left, "real test images"), (left.width + gap, right, title)):
        picture.paste(part, (place, top))
        draw.text((place + part.width / 2, top / 2), text, font=font, fill=0, anchor="mm")
    picture.save(target, optimize=True)


def save_samples(path, version, data_dir, gallery):
    """Write the pictures that need no figure: of an export's first samples, alone and beside real
    images."""
    samples, labels = quality.read_samples(path)
    real, real_labels = (np.asarray(part) for part in fe.load_split(data_dir, train=False))
    tile(samples[:10], 10).save(gallery / "strip.png", optimize=True)
    if labels is not None and labels.min() >= 0:  # as in the exports, a class a column
        real = first_of_each_class(real, real_labels, 6)
    save_comparison(
        samples[:60], real[:60], f"samples of {version}", gallery / "real_and_generated.png"
    )


def build_gallery(output, gallery, version, data_dir):
    """Fill a gallery from an output folder. Returns its bytes, above ``LIMIT`` only where even the
    fewest greys are too many; raises ValueError where figures or samples lack."""
    figures, samples = newest_figures(output), output / "samples.npz"
    if not figures or not samples.is_file():
        raise ValueError(f"{output} holds no {'samples.npz' if figures else 'figures'}")
    gallery.mkdir(exist_ok=True)
    for path in gallery.iterdir():
        path.unlink()
    animations = {name: path for name, path in figures.items() if path.suffix == ".gif"}
    for name in figures.keys() - animations.keys():
        save_still(figures[name], gallery / name)
    save_samples(samples, version, data_dir, gallery)
    for greys in ANIMATION_GREYS if animations else (None,):
        for name, path in animations.items():
            save_animation(path, gallery / name, greys)
        size = sum(path.stat().st_size for path in gallery.iterdir())
        if size <= LIMIT:
            break
    return size


def main(argv=None, repository=speed.REPOSITORY):
    """Command line. Exits 2 with one line on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", metavar="VERSION", help="for example LatentDiffusionModel/v3")
    parser.add_argument(
        "--output-dir", type=Path, help="of the run (default: output/ of the version)"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=fe.DEFAULT_DATA_DIR, help="torchvision's root"
    )
    args = parser.parse_args(argv)
    try:
        [script] = speed.find_versions([args.version], repository).values()
        output, gallery = args.output_dir or script.parent / "output", script.parent / "gallery"
        size = build_gallery(output, gallery, args.version, args.data_dir)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{gallery}: {size / 1e6:.2f} MB")
    if size > LIMIT:
        print(f"warning: above the limit of {LIMIT / 1e6:g} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
