"""Score files of generated Fashion-MNIST images in the feature space of a fixed classifier.

    python tests/benchmarks/quality.py FILE.npz ... [--data-dir D] [--json OUT]

A file holds ``arr_0``, uint8 images (N, 28, 28, 1), and optionally ``arr_1``, integer labels (N,), -1 for none: what
``--export-samples`` writes. One row a file is printed, below three reference rows: real training images (the floor),
the same images blurred, and pixel noise. Files that differ only in ``_seed_<S>`` also get a row of mean and spread.
README.md, beside this file, says what each number means.

From Python, where ``images`` is a uint8 array or tensor (N, 28, 28) or (N, 28, 28, 1):

    sys.path.insert(0, ".../tests/benchmarks")
    import quality

    quality.fmd_percent_of_blur(images)   # one float in seconds, no neighbours: for use during development
    quality.score_arrays(images, labels)  # the dictionary of a whole row; labels may be None

The first call on a machine measures the reference (a minute or so on two cores) and caches it in ``.cache/`` beside
this file (ignored by git), keyed by the weights' SHA-256, the data and this code. The thread count is the caller's.
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

sys.path.insert(0, str(Path(__file__).resolve().parent))
import feature_extractor as fe

CACHE_DIR = fe.HERE / ".cache"
NEIGHBOURS = 5
REFERENCE_SIZE = 10_000  # images in the test split, and in each reference row
FEWEST_SAMPLES = 100  # below this not even a rough figure makes sense
WARN_BELOW = 5_000
COPY_QUANTILE = 0.05
FLOOR, BLUR, NOISE = "reference: real training images (floor)", "reference: blurred", "reference: pixel noise"
METRICS = (
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


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def mean_and_covariance(features):
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians, float64: means (D,), covariances (D, D).

    |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau 1982). The trace of (A B)^(1/2) is the nuclear norm of
    A^(1/2) B^(1/2), which is real and stable even where a covariance is singular, unlike the root of the product.
    """

    def square_root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # rounding leaves tiny negative eigenvalues

    cross = torch.linalg.svdvals(square_root(covariance_a) @ square_root(covariance_b)).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return distance.item()


def distance_chunks(queries, points, chunk_size=500):
    """Yield (slice, Euclidean distances (chunk, M)) of queries (N, D) to all points (M, D)."""
    for start in range(0, len(queries), chunk_size):
        rows = slice(start, start + chunk_size)
        yield rows, torch.cdist(queries[rows], points, compute_mode="use_mm_for_euclid_dist")


def kth_nearest_distances(queries, points, k):
    """Distance (N,) of each query (N, D) to its k-th nearest point of (M, D)."""
    return torch.cat(
        [distances.topk(k, largest=False).values[:, -1] for _, distances in distance_chunks(queries, points)]
    )


def nearest_image_distances(images, others):
    """Distance (N,) of each uint8 image (N, 28, 28) to its nearest of (M, 28, 28), over the pixels in [0, 1]."""
    images, others = (some.flatten(1).float() / 255 for some in (images, others))
    return torch.cat([distances.amin(1) for _, distances in distance_chunks(images, others)])


def neighbour_scores(real, fake, k=NEIGHBOURS, real_radii=None):
    """Score fake features (M, D) against real ones (N, D) by balls that reach to the k-th nearest neighbour.

    Returns precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020), in a dictionary.
    ``real_radii`` (N,) are the real samples' distances to their k-th real neighbours, measured here where not given.
    """
    real, fake = real.double(), fake.double()
    # A sample is its own nearest neighbour, hence k + 1.
    real_radii = kth_nearest_distances(real, real, k + 1) if real_radii is None else real_radii
    fake_radii = kth_nearest_distances(fake, fake, k + 1)
    balls = torch.zeros(len(fake), dtype=torch.long)  # how many real samples' balls hold each fake sample
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
    return F.interpolate(halved, scale_factor=2, mode="bilinear", align_corners=False)[:, 0].round().byte()


# ---------------------------------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------------------------------


def reference_path(test_images, train_images):
    """Where the reference of these images is cached: a name that changes with weights, data and code."""
    data = hashlib.sha256(test_images.numpy().tobytes() + train_images.numpy().tobytes()).hexdigest()
    code = hashlib.sha256(Path(__file__).read_bytes() + Path(fe.__file__).read_bytes()).hexdigest()
    return CACHE_DIR / f"reference_{data[:12]}_{fe.WEIGHTS_SHA256[:12]}_{code[:12]}.pt"


def measure_reference(test_images, train_images, train_labels):
    """Measure everything that does not depend on the samples, from uint8 images (N, 28, 28) and labels (N,).

    Returns a dictionary: the training images; the test split's features, their mean, covariance and radii; its images'
    distances to their nearest training images; and the scored reference rows.
    """
    reference = {"train_images": train_images, "features": fe.extract(test_images)[0].double()}
    reference["mean"], reference["covariance"] = mean_and_covariance(reference["features"])
    reference["radii"] = kth_nearest_distances(reference["features"], reference["features"], NEIGHBOURS + 1)
    reference["held_out_distances"] = nearest_image_distances(test_images, train_images)

    # As many of each class as the test split and balanced samples have.
    size = min(REFERENCE_SIZE, len(train_images)) // fe.NUM_CLASSES
    chosen = torch.cat([(train_labels == c).nonzero()[:size, 0] for c in range(fe.NUM_CLASSES)])
    images, labels = train_images[chosen], train_labels[chosen]
    noise = torch.randint(256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reference["blur_fmd"] = fmd_of_features(fe.extract(blur(images))[0], reference)
    reference["rows"] = [
        {"file": FLOOR, **score_against(images, labels, reference)},
        {"file": BLUR, **score_against(blur(images), labels, reference)},
        {"file": NOISE, **score_against(noise, None, reference)},
    ]
    return reference


@cache
def load_reference(data_dir=fe.DEFAULT_DATA_DIR):
    """Read the reference (see ``measure_reference``) from ``CACHE_DIR``, or measure and keep it there.

    Models train on all but the last 5,000 training images, so "training images" are those throughout.
    """
    test_images, _ = fe.load_split(data_dir, train=False)
    train_images, train_labels = (part[: -fe.VALIDATION_SIZE] for part in fe.load_split(data_dir, train=True))
    fe.load_feature_extractor()  # checks the weights even where the cache has all that is needed
    path = reference_path(test_images, train_images)
    if path.is_file():
        return {"train_images": train_images, **torch.load(path, weights_only=True)}

    print("measuring the reference rows, once (a minute or so) ...", file=sys.stderr, flush=True)
    reference = measure_reference(test_images, train_images, train_labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save({key: value for key, value in reference.items() if key != "train_images"}, temporary)
    os.replace(temporary, path)
    for stale in set(path.parent.glob(path.name[:23] + "*.pt")) - {path}:  # the same data under other weights or code
        stale.unlink(missing_ok=True)
    return reference


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def fmd_of_features(features, reference):
    """FMD: Fréchet distance of features (N, D) to the test split's."""
    return frechet_distance(*mean_and_covariance(features), reference["mean"], reference["covariance"])


def score_against(images, labels, reference):
    """Score uint8 images with labels (N,), or None, against a reference; see ``score_arrays``."""
    features, logits = fe.extract(images)
    fmd = fmd_of_features(features, reference)
    accuracy = None
    if labels is not None and (labelled := labels >= 0).any():
        accuracy = (logits.argmax(1) == labels)[labelled].double().mean().item()
    nearest, held_out = nearest_image_distances(images, reference["train_images"]), reference["held_out_distances"]
    return {
        "n": len(features),
        "fmd": fmd,
        "percent_of_blur": 100 * fmd / reference["blur_fmd"],
        **neighbour_scores(reference["features"], features, real_radii=reference["radii"]),
        "accuracy": accuracy,
        "copying": (nearest < held_out.quantile(COPY_QUANTILE)).double().mean().item(),
        "nn_distance_ratio": (nearest.mean() / held_out.mean()).item(),
    }


def score_arrays(images, labels=None, data_dir=fe.DEFAULT_DATA_DIR):
    """Score generated images: uint8 (N, 28, 28) or (N, 28, 28, 1), with integer labels (N,), -1 for none, or None.

    Returns a dictionary of ``n`` and ``METRICS``; ``accuracy`` is None without labels. Raises ValueError for unusable
    arrays, RuntimeError for missing data or wrong weights.
    """
    images, labels = check_arrays(images, labels)
    return score_against(images, labels, load_reference(Path(data_dir)))


def fmd_percent_of_blur(images, data_dir=fe.DEFAULT_DATA_DIR):
    """FMD of uint8 images, (N, 28, 28) or (N, 28, 28, 1), in percent of the blurred reference's: the quick score.

    10,000 images take seconds; fewer read higher (the bias grows as 1/N), so compare equal counts. Raises like
    ``score_arrays``.
    """
    images, _ = check_arrays(images, None)
    reference = load_reference(Path(data_dir))
    return 100 * fmd_of_features(fe.extract(images)[0], reference) / reference["blur_fmd"]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def check_arrays(images, labels):
    """Return images as uint8 (N, 28, 28) and labels as int64 (N,) or None, tensors; ValueError where they are unfit."""
    images = torch.as_tensor(images).cpu()
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) not in {(28, 28), (28, 28, 1)}:
        dtype, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape)
        raise ValueError(f"images must be uint8 of shape (N, 28, 28, 1), got {dtype} of shape {shape}")
    if len(images) < FEWEST_SAMPLES:
        raise ValueError(f"{len(images)} images are too few to score, {FEWEST_SAMPLES} are the least")
    images = images.reshape(-1, 28, 28)
    if labels is None:
        return images, None
    labels = torch.as_tensor(labels).cpu()
    if labels.is_floating_point() or labels.is_complex() or labels.shape != images.shape[:1]:
        dtype, shape = str(labels.dtype).removeprefix("torch."), tuple(labels.shape)
        raise ValueError(f"labels must be integers of shape ({len(images)},), got {dtype} of shape {shape}")
    labels = labels.long()
    if labels.min() < -1 or labels.max() >= fe.NUM_CLASSES:
        raise ValueError(f"labels must lie in -1 ... 9, got {labels.min().item()} ... {labels.max().item()}")
    return images, labels


def read_samples(path):
    """Read a file of samples into what ``check_arrays`` returns; ValueError, naming the file, where it is unfit."""
    try:
        with zipfile.ZipFile(path):  # np.load would take .npy files and pickles for what they are
            pass
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file:
                raise ValueError(f"there is no arr_0 in it (it holds {', '.join(file) or 'nothing'})")
            return check_arrays(file["arr_0"], file.get("arr_1"))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a sound .npz file ({error})") from error
    except (OSError, EOFError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def seed_rows(rows):
    """Rows of mean and spread of those ``rows`` whose ``file`` differs only in ``_seed_<S>``.

    A mean stands under a metric's own key and the standard deviation (N - 1) under ``<metric>_spread``; ``n`` is the
    number of samples in each file, ``files`` the number of files. A metric that one file lacks is None.
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


def format_table(rows):
    """Lay rows out as aligned text, a line a row, with mean ± spread where a row has both."""

    def cell(row, metric):
        if row[metric] is None:
            return "-"
        form = "{:.2f}%" if metric == "percent_of_blur" else "{:.1%}" if metric in ("accuracy", "copying") else "{:.3f}"
        spread = row.get(f"{metric}_spread")
        return form.format(row[metric]) + (f" ± {form.format(spread)}" if spread is not None else "")

    heads = [
        metric.replace("percent_of_blur", "of blur").replace("nn_distance_ratio", "nn ratio") for metric in METRICS
    ]
    table = [["file", "n", *heads]]
    for row in rows:
        name = f"{row['file']} (mean ± spread of {row['files']})" if "files" in row else row["file"]
        table.append([name, str(row["n"]), *(cell(row, metric) for metric in METRICS)])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in table)
    return "\n".join("  ".join(line) for line in lines)


def main(argv=None):
    """Command line: score the files named, print the table, write the JSON. Exits 2 with one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", nargs="*", metavar="FILE.npz", help="samples; with none, only the reference rows are printed"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=fe.DEFAULT_DATA_DIR, help="torchvision's root (default: data/)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="also write the rows to this file, a list of flat objects"
    )
    args = parser.parse_args(argv)
    try:
        samples = {
            path: read_samples(path) for path in args.files
        }  # all are read first: a bad one must not cost minutes
        reference = load_reference(args.data_dir)
        rows = []
        for path, (images, labels) in samples.items():
            if len(images) < WARN_BELOW:
                print(
                    f"warning: {path}: {len(images)} samples; FMD reads too high, compare equal counts", file=sys.stderr
                )
            rows.append({"file": path, **score_against(images, labels, reference)})
        rows = reference["rows"] + rows + seed_rows(rows)
        print(format_table(rows))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
