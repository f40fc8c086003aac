"""What each number of ``quality.py`` says of known damage to real images.

    python tests/benchmarks/damage.py              the tables of README.md, beside this file
    python tests/benchmarks/damage.py --features   how the class-free features were chosen

Every row is 10,000 training images, 1,000 a class and none of them in the reference rows, that were
damaged in one known way; they are scored as samples are. A row takes a minute or so on two cores.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import class_free
import feature_extractor as fe
import quality

PER_CLASS = 1_000
SHOES = torch.tensor([5, 7, 9])  # sandal, sneaker, ankle boot
MISSING = 9  # the class of which images go missing
DISTANCES = {
    "FMD": ("percent_of_blur", "{:.2f}%"),
    "SWD": ("swd_percent_of_blur", "{:.1f}%"),
    "28": ("swd_28_percent_of_blur", "{:.1f}%"),
    "14": ("swd_14_percent_of_blur", "{:.1f}%"),
    "7": ("swd_7_percent_of_blur", "{:.1f}%"),
    "random features": ("fd_random_percent_of_blur", "{:.2f}%"),
    "worst": ("worst_percent_of_blur", "{:.1f}%"),
    "detail": ("detail", "{:.3f}"),
}
NEIGHBOURS = {
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "near-copies": ("copying", "{:.1%}"),
    "nn ratio": ("nn_distance_ratio", "{:.3f}"),
}


# --------------------------------------------------------------------------------------------------
# Damage: uint8 images (N, 28, 28) to uint8 images
# --------------------------------------------------------------------------------------------------


def add_noise(images, grey_levels, seed=0):
    """Add Gaussian noise with this standard deviation, in grey levels."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.float() + grey_levels * noise).round().clamp(0, 255).byte()


def blur_slightly(images):
    """Filter with (1, 6, 1) / 8 along both axes."""
    weights = torch.tensor([1.0, 6.0, 1.0]) / 8
    kernel = torch.outer(weights, weights)[None, None]
    return F.conv2d(images[:, None].float(), kernel, padding=1)[:, 0].round().byte()


def soften(images):
    """Halve the finest level of the Laplacian pyramid: as sharp, at half the strength."""
    levels = class_free.laplacian_pyramid(images)
    softened = images.float() - levels[28][:, 0] / 2
    return softened.round().clamp(0, 255).byte()


def shift(images, pixels):
    """Move to the right; black comes in from the left."""
    return F.pad(images, (pixels, 0))[..., : images.shape[2]]


def mirror(images, rows):
    """Mirror the images in ``rows``, a mask (N,), left to right."""
    return torch.where(rows[:, None, None], images.flip(2), images)


def lose(images, labels, others, other_labels, count):
    """Replace ``count`` images of the class ``MISSING`` by others, of the other classes alike.

    Returns the images and their labels.
    """
    gone = (labels == MISSING).nonzero()[:count, 0]
    spare = (other_labels != MISSING).nonzero()[:, 0]
    spare = spare[
        torch.arange(count) * len(spare) // count
    ]  # the classes stand one after the other
    images, labels = images.clone(), labels.clone()
    images[gone], labels[gone] = others[spare], other_labels[spare]
    return images, labels


def draw(images, labels, place):
    """The images and labels of the ``place``-th thousand of each class, the classes in order."""
    rows = slice(place * PER_CLASS, (place + 1) * PER_CLASS)
    chosen = torch.cat([(labels == c).nonzero()[rows, 0] for c in range(fe.NUM_CLASSES)])
    return images[chosen], labels[chosen]


def damages(train_images, train_labels):
    """Yield (what was done, images, labels) for each kind of damage."""
    images, labels = draw(train_images, train_labels, 1)
    others = draw(train_images, train_labels, 2)
    shoes, odd = torch.isin(labels, SHOES), torch.arange(len(labels)) % 2 == 1
    yield "none", images, labels
    yield "shift by 1 pixel", shift(images, 1), labels
    yield "shift by 2 pixels", shift(images, 2), labels
    yield "finest level halved", soften(images), labels
    yield "slight blur: (1, 6, 1) / 8 along both axes", blur_slightly(images), labels
    yield "blur, as the blurred reference's", quality.blur(images), labels
    yield "noise of 5 grey levels", add_noise(images, 5), labels
    yield "noise of 10 grey levels", add_noise(images, 10), labels
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, images.shape, dtype=torch.uint8, generator=generator)
    yield "nothing but noise", noise, labels
    yield "half of the shoes mirrored", mirror(images, shoes & odd), labels
    yield "all shoes mirrored", mirror(images, shoes), labels
    yield "all garments mirrored", mirror(images, torch.isin(labels, fe.GARMENTS)), labels
    for share, words in ((0.05, "5%"), (0.5, "half"), (1.0, "all")):
        yield (
            f"{words} of one class missing",
            *lose(images, labels, *others, round(share * PER_CLASS)),
        )
    yield (
        "copies: 1,000 of them, ten times each",
        *(x[::10].repeat(10, *[1] * (x.ndim - 1)) for x in (images, labels)),
    )
    yield "only 5,000 of them", images[::2], labels[::2]
    yield "only 2,000 of them", images[::5], labels[::5]
    drawn = quality.draw_like(2 * PER_CLASS, None, train_labels)
    yield "only 2,000, drawn at random", train_images[drawn], train_labels[drawn]


def print_table(head, rows):
    """Print a Markdown table, each row as soon as it is there."""
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def print_scores(reference):
    """Print the tables of README.md: the distances, then what neighbours and the classifier say."""
    scores = {}
    for words, images, labels in damages(reference["train_images"], reference["train_labels"]):
        scores[words] = quality.score_against(images, labels, reference)
        print(f"scored: {words}", file=sys.stderr)
    for columns in (DISTANCES, NEIGHBOURS):
        rows = (
            [words, *(form.format(row[key]) for key, form in columns.values())]
            for words, row in scores.items()
        )
        print_table(["damage", *columns], rows)
        print()


# --------------------------------------------------------------------------------------------------
# The choice of class-free features
# --------------------------------------------------------------------------------------------------


def principal_components(images, count):
    """A function of images (N, 28, 28): their leading principal components (N, count)."""
    pixels = images.flatten(1).double() / 255
    _, axes = torch.linalg.eigh(torch.cov(pixels.T))  # in rising order
    return lambda some: (some.flatten(1).double() / 255) @ axes[:, -count:]


def candidates(images):
    """The features that were tried, {name: function of images}; some are fitted to ``images``."""
    return {
        "random network": class_free.random_features,
        "64 principal components": principal_components(images, 64),
        "all 784": principal_components(images, 784),
    }


def compare_features(reference, draws=4):
    """Yield a row a kind of damage: percent of blur of the Fréchet distance in each one's features.

    The first row is the mean and spread of ``draws`` undamaged sets: 1,000 a class, drawn at
    random.
    """
    images, labels = reference["train_images"], reference["train_labels"]
    blurred = quality.blur(
        images[quality.draw_like(10 * PER_CLASS, torch.arange(10 * PER_CLASS) % 10, labels)]
    )
    measures = []
    for features in candidates(reference["images"]).values():
        real = quality.mean_and_covariance(features(reference["images"]))

        def distance(some, features=features, real=real):
            return quality.frechet_distance(*quality.mean_and_covariance(features(some)), *real)

        scale = distance(blurred)
        measures.append(lambda some, distance=distance, scale=scale: 100 * distance(some) / scale)

    floors = []
    for seed in range(draws):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        undamaged, _ = draw(images[order], labels[order], 0)
        floors.append([measure(undamaged) for measure in measures])
    yield [
        "undamaged",
        *(f"{statistics.mean(x):.3f}% ± {statistics.stdev(x):.3f}%" for x in zip(*floors)),
    ]
    for words, some, _ in damages(images, labels):
        yield [words, *(f"{measure(some):.3f}%" for measure in measures)]


def main(argv=None):
    """Command line. Exits 2 with one line on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--features", action="store_true", help="compare candidates for the class-free features"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=fe.DEFAULT_DATA_DIR, help="torchvision's root"
    )
    args = parser.parse_args(argv)
    try:
        reference = quality.load_reference(args.data_dir)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if args.features:
        print_table(["damage", *candidates(reference["images"])], compare_features(reference))
    else:
        print_scores(reference)


if __name__ == "__main__":
    main()
