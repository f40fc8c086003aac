"""Turn samples into a folder of single pictures, for tools that read those: FID above all.

    python tests/benchmarks/export_png.py FOLDER --samples FILE.npz    samples, as exported
    python tests/benchmarks/export_png.py FOLDER                       the test split

The pictures are grey, 28x28, lossless, numbered in the order of the file. README.md, beside this
file, says how an FID is computed from two such folders.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
import feature_extractor as fe
import quality


def write_pictures(images, folder):
    """Write uint8 images (N, 28, 28) to ``folder/00000.png`` and so on.

    Raises ValueError where the folder holds something: other pictures would be counted too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    for number, image in enumerate(images.numpy()):
        Image.fromarray(image).save(folder / f"{number:05d}.png")


def main(argv=None):
    """Command line. Exits 2 with one line on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="new or empty")
    parser.add_argument("--samples", metavar="FILE.npz", help="default: the test split")
    parser.add_argument(
        "--data-dir", type=Path, default=fe.DEFAULT_DATA_DIR, help="torchvision's root"
    )
    args = parser.parse_args(argv)
    try:
        if args.samples:
            images, _ = quality.read_samples(args.samples)
        else:
            images, _ = fe.load_split(args.data_dir, train=False)
        write_pictures(images, args.folder)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.folder}: {len(images):,} pictures")


if __name__ == "__main__":
    main()
