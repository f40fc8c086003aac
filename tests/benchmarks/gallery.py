"""Copy the pictures of a finished run into a version's gallery/, small enough to be committed.

    python tests/benchmarks/gallery.py LatentDiffusionModel/v3                      from its output/
    python tests/benchmarks/gallery.py LatentDiffusionModel/v3 --output-dir DIR     from another folder

Of each figure the newest one is taken, and its name loses the epoch; strip.png is the first ten samples of samples.npz,
one of each class where there are classes. Animations are scaled down, everything is stored in as few bits as show no
difference, and what an older run left in the gallery goes. Warns above 4 MB.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

sys.path.insert(0, str(Path(__file__).resolve().parent))
import quality
import speed

FIGURES = ("loss_curves.png", "samples/samples_epoch_*.png", "*/*_epoch_*.png", "*/*_epoch_*.gif", "*/latent_space.png")
ANIMATION_WIDTH = 140  # pixels: five a pixel of the image
LIMIT = 4 * 2**20  # bytes of a gallery


def newest_figures(output):
    """{name in a gallery: path} of the figures in an output folder, of each the one of the latest epoch."""
    newest = {}
    for path in sorted({path for pattern in FIGURES for path in output.glob(pattern)}):
        stem, _, epoch = path.stem.partition("_epoch_")
        name = f"interpolation_{stem}" if path.parent.name == "interpolation" else stem
        newest.setdefault(name + path.suffix, []).append((int(epoch or 0), path))
    return {name: max(paths)[1] for name, paths in newest.items()}


def save_still(source, target):
    """Write a PNG again: grey where it is grey, without the alpha that no figure uses."""
    image = Image.open(source).convert("RGB")
    red, green, blue = image.split()
    image = red if red.tobytes() == green.tobytes() == blue.tobytes() else image
    image.save(target, optimize=True)


def save_animation(source, target, width=ANIMATION_WIDTH):
    """Write a GIF of greys again, scaled to ``width``; timing and loop stay."""
    with Image.open(source) as animation:
        size = width, round(animation.height * width / animation.width)
        frames, durations = [], []
        for frame in ImageSequence.Iterator(animation):
            durations.append(frame.info["duration"])
            frames.append(frame.convert("L").resize(size, Image.Resampling.BOX).quantize(32))
        loop = animation.info["loop"]
    frames[0].save(target, save_all=True, append_images=frames[1:], duration=durations, loop=loop, optimize=True)


def save_strip(source, target, count=10, enlargement=2):
    """Write the first samples of an export side by side."""
    images = quality.read_samples(source)[0][:count]
    padded = np.pad(np.asarray(images), ((0, 0), (1, 1), (1, 1)))
    strip = np.concatenate(list(padded), axis=1).repeat(enlargement, axis=0).repeat(enlargement, axis=1)
    Image.fromarray(strip).save(target, optimize=True)


def build_gallery(output, gallery):
    """Fill a gallery from an output folder. Returns its bytes; raises ValueError where figures or samples lack."""
    figures, samples = newest_figures(output), output / "samples.npz"
    if not figures or not samples.is_file():
        raise ValueError(f"{output} holds no {'samples.npz' if figures else 'figures'}")
    gallery.mkdir(exist_ok=True)
    for path in gallery.iterdir():
        path.unlink()
    for name, path in figures.items():
        save = save_animation if path.suffix == ".gif" else save_still
        save(path, gallery / name)
    save_strip(samples, gallery / "strip.png")
    return sum(path.stat().st_size for path in gallery.iterdir())


def main(argv=None, repository=speed.sync_shared.REPOSITORY):
    """Command line. Exits 2 with one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", metavar="VERSION", help="for example LatentDiffusionModel/v3")
    parser.add_argument("--output-dir", type=Path, help="of the run (default: output/ of the version)")
    args = parser.parse_args(argv)
    try:
        [script] = speed.find_versions([args.version], repository).values()
        size = build_gallery(args.output_dir or script.parent / "output", script.parent / "gallery")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{script.parent / 'gallery'}: {size / 2**20:.1f} MB")
    if size > LIMIT:
        print(f"warning: above the limit of {LIMIT / 2**20:g} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
