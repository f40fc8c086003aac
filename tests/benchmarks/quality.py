"""Score files of generated Fashion-MNIST images, by a classifier's eyes and by class-free ones.

    python tests/benchmarks/quality.py FILE.npz ... [--validation] [--json OUT] [--plot OUT]

A file holds ``arr_0``, uint8 images (N, 28, 28, 1), and optionally ``arr_1``, integer labels (N,),
-1 for none: what ``--export-samples`` writes. Two tables are printed, a row a file, below reference
rows: real training images (the floor) of the files' own number and balance of classes, the same
blurred, and pixel noise. Files that differ only in ``_seed_<S>`` also get a row of mean and spread.
README.md, beside this file, says what each number means.

From Python, where ``images`` is a uint8 array or tensor (N, 28, 28) or (N, 28, 28, 1):

    sys.path.insert(0, ".../tests/benchmarks")
    import quality

    quality.fmd_percent_of_blur(images)   # one float in seconds, for use during development
    quality.score_arrays(images, labels)  # the dictionary of a whole row; labels may be None

Both take ``validation=True``: settings are chosen on the validation images, never on the test
split. The first call on a machine measures the reference (a few minutes on two cores) and caches it
in ``.cache/`` beside this file (ignored by git), keyed by the weights' SHA-256, the data and this
code. The thread count is the caller's.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent))
import class_free
import feature_extractor as fe

CACHE_DIR = fe.HERE / ".cache"
NEIGHBOURS = 5
REFERENCE_SIZE = 10_000  # images in the test split, and in each reference row
FEWEST_SAMPLES = 100  # below this not even a rough figure makes sense
WARN_BELOW = 5_000
COPY_QUANTILE = 0.05
BLUR, NOISE = "reference: blurred", "reference: pixel noise"

# Each distance also stands as percent of the blurred reference's, under the second name.
DISTANCES = {
    "fmd": "percent_of_blur",
    "swd_28": "swd_28_percent_of_blur",
    "swd_14": "swd_14_percent_of_blur",
    "swd_7": "swd_7_percent_of_blur",
    "swd": "swd_percent_of_blur",
    "fd_random": "fd_random_percent_of_blur",
}
CLASSIFIER_METRICS = (
    "fmd",
    "percent_of_blur",
    "density",
    "coverage",
    "precision",
    "recall",
    "accuracy",
    "copying",
    "nn_distance_ratio",
)
CLASS_FREE_METRICS = (
    *(key for pair in list(DISTANCES.items())[1:] for key in pair),
    "detail",
    "worst_percent_of_blur",
)
METRICS = CLASSIFIER_METRICS + CLASS_FREE_METRICS


# --------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------


def mean_and_covariance(features):
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """Squared Fréchet (2-Wasserstein) distance of Gaussians: means (D,), covariances (D, D).

    |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982). The trace of (A B)^(1/2) is
    the nuclear norm of A^(1/2) B^(1/2), which is real and stable even where a covariance is
    singular, unlike the root of the product.
    """

    def square_root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return (
            vectors * values.clamp(min=0).sqrt()
        ) @ vectors.T  # rounding leaves tiny negative eigenvalues

    cross = torch.linalg.svdvals(square_root(covariance_a) @ square_root(covariance_b)).sum()
    distance = (
        (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    )
    return distance.item()


def distance_chunks(queries, points, chunk_size=500):
    """Yield (slice, Euclidean distances (chunk, M)) of queries (N, D) to all points (M, D)."""
    for start in range(0, len(queries), chunk_size):
        rows = slice(start, start + chunk_size)
        yield rows, torch.cdist(queries[rows], points, compute_mode="use_mm_for_euclid_dist")


def kth_nearest_distances(queries, points, k):
    """Distance (N,) of each query (N, D) to its k-th nearest point of (M, D)."""
    return torch.cat(
        [
            distances.topk(k, largest=False).values[:, -1]
            for _, distances in distance_chunks(queries, points)
        ]
    )


def nearest_image_distances(images, others):
    """Distance (N,) of uint8 images (N, 28, 28) to the nearest of (M, 28, 28), pixels in [0, 1]."""
    images, others = (some.flatten(1).float() / 255 for some in (images, others))
    return torch.cat([distances.amin(1) for _, distances in distance_chunks(images, others)])


def neighbour_scores(real, fake, k=NEIGHBOURS, real_radii=None):
    """Score fake features (M, D) against real ones (N, D) by balls around each sample.

    A ball reaches to the k-th nearest neighbour. Returns precision and recall (Kynkäänniemi et al.
    2019), density and coverage (Naeem et al. 2020), in a dictionary. ``real_radii`` (N,) are the
    real samples' distances to their k-th real neighbours, measured here where not given.
    """
    real, fake = real.double(), fake.double()
    # A sample is its own nearest neighbour, hence k + 1.
    real_radii = kth_nearest_distances(real, real, k + 1) if real_radii is None else real_radii
    fake_radii = kth_nearest_distances(fake, fake, k + 1)
    balls = torch.zeros(
        len(fake), dtype=torch.long
    )  # how many real samples' balls hold each fake sample
    recalled = covered = 0
    for rows, distances in distance_chunks(real, fake):
        radii = real_radii[rows, None]
        balls += (distances < radii).sum(0)
        covered += (distances.amin(1, keepdim=True) < radii).sum().item()
        recalled += (distances < fake_radii).any(1).sum().item()
    return {
        "density": balls.double().mean().item() / k,
        "coverage": covered / len(real),
        "precision": (balls > 0).double().mean().item(),
        "recall": recalled / len(real),
    }


def blur(images):
    """Blur uint8 images (N, 28, 28): average 2x2 pixels, enlarge again bilinearly."""
    halved = F.avg_pool2d(images[:, None].float(), 2)
    return (
        F.interpolate(halved, scale_factor=2, mode="bilinear", align_corners=False)[:, 0]
        .round()
        .byte()
    )


# --------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------


def reference_path(images, train_images):
    """Where the reference of these images is cached, a name for weights, data and code."""
    data = hashlib.sha256(images.numpy().tobytes() + train_images.numpy().tobytes()).hexdigest()
    sources = (
        Path(module.__file__).read_bytes() for module in (sys.modules[__name__], class_free, fe)
    )
    code = hashlib.sha256(b"".join(sources)).hexdigest()
    return CACHE_DIR / f"reference_{data[:12]}_{fe.WEIGHTS_SHA256[:12]}_{code[:12]}.pt"


def draw_like(count, labels, train_labels):
    """Rows of training images with the number and the classes of some samples.

    The first images of each class, as many as the ``labels`` (N,) hold of it; ``count`` at random,
    from seed 0, where they are None or some are -1. Images are repeated where there are too few.
    """
    if labels is None or (labels < 0).any():
        order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(0))
        return order[torch.arange(count) % len(order)]
    rows = []
    for number, wanted in enumerate(labels.bincount(minlength=fe.NUM_CLASSES).tolist()):
        own = (train_labels == number).nonzero()[:, 0]
        if wanted:
            rows.append(own[torch.arange(wanted) % len(own)])
    return torch.cat(rows)


def floor_name(count, labels):
    """What a table calls the floor of ``count`` samples with labels (N,) or None."""
    if labels is None or (labels < 0).any():
        balance = "at random"
    else:
        counts = labels.bincount(minlength=fe.NUM_CLASSES)
        balance = "balanced" if counts.max() - counts.min() <= 1 else "in the samples' balance"
    return f"reference: {count:,} real training images, {balance} (floor)"


def measure_reference(images, train_images, train_labels):
    """Measure what does not depend on the samples, from uint8 images (N, 28, 28), labels (N,).

    Returns a dictionary: the images that samples are compared with, the training images and their
    labels; the former's features, with mean, covariance and radii; their random features' mean and
    covariance; their spectrum; their distances to their nearest training images; the blurred
    reference's distances; the scored rows of blur and noise; and the floors that have been scored.
    """
    features = fe.extract(images)[0].double()
    reference = {
        "images": images,
        "train_images": train_images,
        "train_labels": train_labels,
        "features": features,
        "gaussian": mean_and_covariance(features),
        "radii": kth_nearest_distances(features, features, NEIGHBOURS + 1),
        "random_gaussian": mean_and_covariance(class_free.random_features(images)),
        "spectrum": class_free.power_spectrum(images),
        "held_out_distances": nearest_image_distances(images, train_images),
        "floors": {},
    }
    # As many of each class as balanced samples have.
    labels = torch.arange(min(REFERENCE_SIZE, len(train_images))) % fe.NUM_CLASSES
    rows = draw_like(len(labels), labels, train_labels)
    blurred, labels = blur(train_images[rows]), train_labels[rows]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, blurred.shape, dtype=torch.uint8, generator=generator)
    reference["blur"] = measure_distances(blurred, fe.extract(blurred)[0], reference)
    reference["rows"] = [
        {"file": BLUR, **score_against(blurred, labels, reference)},
        {"file": NOISE, **score_against(noise, None, reference)},
    ]
    return reference


def save_reference(reference):
    """Keep a reference in the cache, but for the data it was measured from."""
    path = reference_path(reference["images"], reference["train_images"])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    data = {"images", "train_images", "train_labels"}
    torch.save({key: value for key, value in reference.items() if key not in data}, temporary)
    os.replace(temporary, path)
    for stale in set(path.parent.glob(path.name[:23] + "*.pt")) - {
        path
    }:  # of other weights or code
        stale.unlink(missing_ok=True)


@cache
def load_reference(data_dir=fe.DEFAULT_DATA_DIR, validation=False):
    """Read the reference (see ``measure_reference``) from ``CACHE_DIR``, or measure it.

    Samples are compared with the test images, or with the validation images: the last 5,000 of the
    training split, which models do not train on. "Training images" are the others throughout.
    """
    images, labels = fe.load_split(data_dir, train=True)
    train_images, train_labels = images[: -fe.VALIDATION_SIZE], labels[: -fe.VALIDATION_SIZE]
    images = (
        images[-fe.VALIDATION_SIZE :] if validation else fe.load_split(data_dir, train=False)[0]
    )
    fe.load_feature_extractor()  # checks the weights even where the cache has all that is needed
    path = reference_path(images, train_images)
    if path.is_file():
        data = {"images": images, "train_images": train_images, "train_labels": train_labels}
        return data | torch.load(path, weights_only=True)
    print("measuring the reference, once (a few minutes) ...", file=sys.stderr, flush=True)
    reference = measure_reference(images, train_images, train_labels)
    save_reference(reference)
    return reference


def load_floor(count, labels, reference):
    """The scored row of real training images of some samples' number and balance, cached.

    No honest model is expected to score better than this.
    """
    drawn = draw_like(count, labels, reference["train_labels"])
    key = hashlib.sha256(drawn.numpy().tobytes()).hexdigest()
    if key not in reference["floors"]:
        images, real_labels = reference["train_images"][drawn], reference["train_labels"][drawn]
        reference["floors"][key] = score_against(images, real_labels, reference)
        save_reference(reference)
    return {"file": floor_name(count, labels), **reference["floors"][key]}


# --------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------


def measure_distances(images, features, reference):
    """The ``DISTANCES`` of uint8 images (N, 28, 28) with features (N, 128) to the reference."""
    random = mean_and_covariance(class_free.random_features(images))
    return {
        "fmd": frechet_distance(*mean_and_covariance(features), *reference["gaussian"]),
        **class_free.sliced_wasserstein(images, reference["images"]),
        "fd_random": frechet_distance(*random, *reference["random_gaussian"]),
    }


def worst_percent_of_blur(row):
    """The summary of a row: its largest distance of three, as percent of the blurred reference's.

    No eye alone can buy it: it falls only when the eye that sees most is content. A Fréchet
    distance is a squared one (it grows as the square of a shift, a Wasserstein-1 distance as the
    shift), so what compares is its root: 100 sqrt(d / blur).
    """
    squares = (row["percent_of_blur"], row["fd_random_percent_of_blur"])
    return max(row["swd_percent_of_blur"], *(10 * max(0.0, square) ** 0.5 for square in squares))


def score_against(images, labels, reference):
    """Score uint8 images with labels (N,), or None, against a reference; see ``score_arrays``."""
    features, logits = fe.extract(images)
    distances = measure_distances(images, features, reference)
    percents = {
        name: 100 * distances[key] / reference["blur"][key] for key, name in DISTANCES.items()
    }
    accuracy = None
    if labels is not None and (labelled := labels >= 0).any():
        accuracy = (logits.argmax(1) == labels)[labelled].double().mean().item()
    nearest = nearest_image_distances(images, reference["train_images"])
    held_out = reference["held_out_distances"]
    spectrum = class_free.power_spectrum(images)
    return {
        "n": len(features),
        **distances,
        **percents,
        **neighbour_scores(reference["features"], features, real_radii=reference["radii"]),
        "accuracy": accuracy,
        "copying": (nearest < held_out.quantile(COPY_QUANTILE)).double().mean().item(),
        "nn_distance_ratio": (nearest.mean() / held_out.mean()).item(),
        "detail": class_free.detail(spectrum, reference["spectrum"]),
        "worst_percent_of_blur": worst_percent_of_blur(percents),
    }


def score_arrays(images, labels=None, data_dir=fe.DEFAULT_DATA_DIR, validation=False):
    """Score generated images: uint8 (N, 28, 28) or (N, 28, 28, 1), integer labels (N,) or None.

    A label of -1 is none. Returns a dictionary of ``n`` and ``METRICS``; ``accuracy`` is None
    without labels. Raises ValueError for unusable arrays, RuntimeError for missing data or wrong
    weights.
    """
    images, labels = check_arrays(images, labels)
    return score_against(images, labels, load_reference(Path(data_dir), validation))


def fmd_percent_of_blur(images, data_dir=fe.DEFAULT_DATA_DIR, validation=False):
    """FMD of uint8 images, (N, 28, 28) or (N, 28, 28, 1), in percent of blur: the quick score.

    10,000 images take seconds; fewer read higher (the bias grows as 1/N), so compare equal counts.
    Raises like ``score_arrays``.
    """
    images, _ = check_arrays(images, None)
    reference = load_reference(Path(data_dir), validation)
    gaussian = mean_and_covariance(fe.extract(images)[0])
    return 100 * frechet_distance(*gaussian, *reference["gaussian"]) / reference["blur"]["fmd"]


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def check_arrays(images, labels):
    """Images as uint8 (N, 28, 28), labels as int64 (N,) or None; ValueError where unfit."""
    images = torch.as_tensor(images).cpu()
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) not in {(28, 28), (28, 28, 1)}:
        dtype, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape)
        raise ValueError(
            f"images must be uint8 of shape (N, 28, 28, 1), got {dtype} of shape {shape}"
        )
    if len(images) < FEWEST_SAMPLES:
        raise ValueError(
            f"{len(images)} images are too few to score, {FEWEST_SAMPLES} are the least"
        )
    images = images.reshape(-1, 28, 28)
    if labels is None:
        return images, None
    labels = torch.as_tensor(labels).cpu()
    if labels.is_floating_point() or labels.is_complex() or labels.shape != images.shape[:1]:
        dtype, shape = str(labels.dtype).removeprefix("torch."), tuple(labels.shape)
        raise ValueError(
            f"labels must be integers of shape ({len(images)},), got {dtype} of shape {shape}"
        )
    labels = labels.long()
    if labels.min() < -1 or labels.max() >= fe.NUM_CLASSES:
        raise ValueError(
            f"labels must lie in -1 ... 9, got {labels.min().item()} ... {labels.max().item()}"
        )
    return images, labels


def read_samples(path):
    """Read a file into what ``check_arrays`` returns; ValueError, naming it, where it is unfit."""
    try:
        with zipfile.ZipFile(path):  # np.load would take .npy files and pickles for what they are
            pass
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file:
                raise ValueError(
                    f"there is no arr_0 in it (it holds {', '.join(file) or 'nothing'})"
                )
            return check_arrays(file["arr_0"], file.get("arr_1"))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a sound .npz file ({error})") from error
    except (OSError, EOFError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def seed_rows(rows):
    """Rows of mean and spread of those ``rows`` whose ``file`` differs only in ``_seed_<S>``.

    A mean stands under a metric's own key and the standard deviation (N - 1) under
    ``<metric>_spread``; ``n`` is the number of samples in each file, ``files`` the number of files.
    A metric that one file lacks is None.
    """
    groups = {}
    for row in rows:
        groups.setdefault(re.sub(r"_seed_-?\d+(?=\.npz$)", "", row["file"]), []).append(row)
    summaries = []
    for name, group in groups.items():
        if len(group) < 2:
            continue
        summary = {
            "file": f"{name.removesuffix('.npz')}_seed_*.npz",
            "files": len(group),
            "n": min(r["n"] for r in group),
        }
        for metric in METRICS:
            values = [row[metric] for row in group]
            known = None not in values
            summary[metric] = float(np.mean(values)) if known else None
            summary[f"{metric}_spread"] = float(np.std(values, ddof=1)) if known else None
        summaries.append(summary)
    return summaries


def format_cell(row, metric):
    """A metric of a row as text, with its spread where it has one, a distance with its percent."""
    if row[metric] is None:
        return "-"
    if metric in CLASS_FREE_METRICS and metric in DISTANCES:
        form = "{:.4f}" if metric == "fd_random" else "{:.1f}"
        return (
            f"{format_value(row, metric, form)} ({format_value(row, DISTANCES[metric], '{:.1f}%')})"
        )
    if metric.endswith("percent_of_blur"):
        return format_value(row, metric, "{:.2f}%")
    return format_value(row, metric, "{:.1%}" if metric in ("accuracy", "copying") else "{:.3f}")


def format_value(row, metric, form):
    """A metric of a row in the given form, with mean ± spread where the row has both."""
    spread = row.get(f"{metric}_spread")
    return form.format(row[metric]) + (f" ± {form.format(spread)}" if spread is not None else "")


def format_columns(rows, metrics):
    """Lay some metrics of rows out as aligned text, a line a row."""
    heads = {
        "percent_of_blur": "of blur",
        "copying": "near-copies",
        "nn_distance_ratio": "nn ratio",
        "worst_percent_of_blur": "worst of blur",
    }
    table = [["file", "n", *(heads.get(metric, metric) for metric in metrics)]]
    for row in rows:
        files = f" (mean ± spread of {row['files']})" if "files" in row else ""
        cells = (format_cell(row, metric) for metric in metrics)
        table.append([row["file"] + files, str(row["n"]), *cells])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in table)
    return "\n".join("  ".join(line) for line in lines)


def format_table(rows):
    """Two tables of the same rows: what a classifier's eyes see, and what class-free ones do."""
    shown = [metric for metric in CLASS_FREE_METRICS if metric not in DISTANCES.values()]
    return (
        f"A classifier's eyes\n{format_columns(rows, CLASSIFIER_METRICS)}\n\n"
        f"Class-free eyes; in brackets, percent of blur\n{format_columns(rows, shown)}"
    )


def save_spectra(spectra, path):
    """Plot power spectra, {name: (21,)}, the first as it is and all over the first."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    power, ratio = figure.subplots(1, 2)
    reference = next(iter(spectra.values()))
    for index, (name, spectrum) in enumerate(spectra.items()):
        style = {"color": "black", "linewidth": 2} if index == 0 else {"color": f"C{index - 1}"}
        power.plot(spectrum, label=name, **style)
        ratio.plot(spectrum / reference, **style)
    power.set(ylabel="power an image", yscale="log")
    ratio.set(ylabel="over that of the real images", yscale="log")
    for axes in (power, ratio):
        axes.set(xlabel="periods an image", xlim=(0, len(reference) - 1), xticks=range(0, 21, 4))
        axes.axvspan(class_free.UPPER_HALF, len(reference) - 1, color="0.93", zorder=0)
        axes.grid(alpha=0.3)
    power.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def parse_command_line(argv):
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE.npz",
        help="with none, only the reference rows are printed",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=fe.DEFAULT_DATA_DIR,
        help="torchvision's root (default: data/)",
    )
    parser.add_argument(
        "--validation",
        action="store_true",
        help="compare with the 5,000 validation images, to choose settings by",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="OUT",
        help="also write the rows to this file, a list of flat objects",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="OUT", help="also draw the power spectra into this picture"
    )
    return parser.parse_args(argv)


def score_files(samples, reference):
    """The rows of {path: (images, labels)}: floors, blur, noise, files, means and spreads."""
    floors, rows = {}, []
    balanced = torch.arange(REFERENCE_SIZE) % fe.NUM_CLASSES
    for path, (images, labels) in samples.items() or [(None, (balanced, balanced))]:
        floor = load_floor(len(images), labels, reference)
        floors[json.dumps(floor)] = floor
        if path is not None:
            rows.append({"file": path, **score_against(images, labels, reference)})
    return [*floors.values(), *reference["rows"], *rows, *seed_rows(rows)]


def main(argv=None):
    """Command line: score files, print the tables, write JSON and plot. Exits 2 on bad input."""
    args = parse_command_line(argv)
    try:
        # All are read first: a bad one must not cost minutes.
        samples = {path: read_samples(path) for path in args.files}
        reference = load_reference(args.data_dir, args.validation)
        for path, (images, _) in samples.items():
            if len(images) < WARN_BELOW:
                print(
                    f"warning: {path}: {len(images)} samples read too high, compare equal counts",
                    file=sys.stderr,
                )
        rows = score_files(samples, reference)
        print(format_table(rows))
        if args.json:
            args.json.write_text(
                json.dumps(rows, indent=2, allow_nan=False) + "\n", encoding="utf-8"
            )
        if args.plot:
            images = {name: images for name, (images, _) in samples.items()}
            real = "validation images" if args.validation else "test images"
            images = {real: reference["images"], "blurred": blur(reference["images"]), **images}
            spectra = {name: class_free.power_spectrum(some) for name, some in images.items()}
            save_spectra(spectra, args.plot)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
