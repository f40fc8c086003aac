"""Class-free eyes: how images look to someone who has never heard of shirts and sandals.

A classifier keeps what tells classes apart and forgives the rest, lost texture above all. What is
measured here knows no class: the sliced Wasserstein distance of the patches of a Laplacian pyramid,
the power spectrum, and the features of a convolutional network with random weights. ``quality.py``
sets these numbers beside the classifier's. All of them take uint8 images (N, 28, 28), and none
depends on the order of the images.
"""

import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import feature_extractor as fe

SIZE = 28
UPPER_HALF = SIZE // 4 + 1  # periods an image from which on spatial frequencies are high
PATCH = 7
STRIDES = {28: 3, 14: 1, 7: 1}  # of the patches, for each size of the pyramid: 64, 64 and 1 of them
DIRECTIONS = 128  # that the patches of a size are projected on
BINOMIAL = (
    torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
)  # the pyramid's low-pass filter, along an axis


# --------------------------------------------------------------------------------------------------
# Sliced Wasserstein distance
# --------------------------------------------------------------------------------------------------


def filter_image(x, stride=1):
    """Low-pass images x (N, 1, S, S), mirrored at the borders; keep every ``stride``-th pixel."""
    kernel = torch.outer(BINOMIAL, BINOMIAL)[None, None]
    return F.conv2d(F.pad(x, (2,) * 4, mode="reflect"), kernel, stride=stride)


def enlarge(x):
    """Double the size of images x (N, 1, S, S): zeros in between, then the filter, times 4."""
    spread = x.new_zeros(len(x), 1, 2 * x.shape[2], 2 * x.shape[3])
    spread[:, :, ::2, ::2] = x
    return 4 * filter_image(spread)


def laplacian_pyramid(images):
    """Laplacian pyramid (Burt & Adelson 1983) of images (N, 28, 28).

    Returns {28: (N, 1, 28, 28), 14: (N, 1, 14, 14), 7: (N, 1, 7, 7)}: what each size has beyond the
    next smaller one, and at 7 pixels the low-passed image itself.
    """
    fine, levels = images[:, None].float(), {}
    for size in (28, 14):
        coarse = filter_image(fine, stride=2)
        levels[size] = fine - enlarge(coarse)
        fine = coarse
    return levels | {7: fine}


def wasserstein_1d(a, b):
    """Wasserstein-1 distance (D,) of sorted samples a (D, N) and b (D, M), row by row.

    The integral of |F_a^-1 - F_b^-1| over (0, 1), exact for any N and M.
    """
    n, m = a.shape[1], b.shape[1]
    if n == m:
        return np.abs(a - b).mean(axis=1)
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # of the steps, over n m
    widths = np.diff(ends, prepend=0) / (n * m)
    return np.abs(a[:, (ends - 1) // m] - b[:, (ends - 1) // n]) @ widths


def normalised_patches(level, stride):
    """Patches (P, 49) of a level (N, 1, S, S), brought to mean 0 and standard deviation 1."""
    patches = F.unfold(level, PATCH, stride=stride).transpose(1, 2).reshape(-1, PATCH**2)
    mean, std = patches.double().mean(), patches.double().std(correction=0)
    return (patches - mean.float()) / std.float()


def sliced_wasserstein(images, others, seed=0):
    """Sliced Wasserstein distances, times 1,000, of images (N, 28, 28) and others (M, 28, 28).

    Karras et al. 2018, *Progressive Growing of GANs*, Sec. 5: 7x7 patches of the levels of a
    Laplacian pyramid, each set normalised by its own mean and standard deviation, projected on
    random directions; the mean over the directions of the Wasserstein-1 distance. Unlike there, the
    patches stand on a grid rather than at random places, so no number depends on the images' order.

    Returns {"swd_28": ..., "swd_14": ..., "swd_7": ..., "swd": their mean}.
    """
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = laplacian_pyramid(images), laplacian_pyramid(others)
    distances = {}
    for size, stride in STRIDES.items():
        directions = F.normalize(torch.randn(DIRECTIONS, PATCH**2, generator=generator))  # (D, 49)
        pairs = [normalised_patches(levels[size], stride).T for levels in (ours, theirs)]
        total = 0.0
        for some in directions.split(16):  # 16 at a time, for the memory's sake
            total += wasserstein_1d(*(np.sort((some @ patches).numpy()) for patches in pairs)).sum()
        distances[f"swd_{size}"] = 1000 * float(total) / DIRECTIONS
    return distances | {"swd": sum(distances.values()) / len(distances)}


# --------------------------------------------------------------------------------------------------
# Power spectrum
# --------------------------------------------------------------------------------------------------


def power_spectrum(images):
    """Mean power of images (N, 28, 28) at each distance from the spectrum's centre, float64 (21,).

    The power of a wave is |DFT|^2 / 28^2 of the pixels in [0, 1], so by Parseval's theorem all
    powers together are the mean sum of squares of an image. A wave of (u, v) periods an image, u
    and v in -14 ... 13, belongs to the whole number nearest to sqrt(u^2 + v^2): 0, the mean, to 20,
    the corner.
    """
    power = 0
    for some in images.split(1000):
        power += torch.fft.fft2(some.double() / 255, norm="ortho").abs().square().sum(0)  # (28, 28)
    periods = SIZE * torch.fft.fftfreq(SIZE, dtype=torch.float64)
    radii = torch.hypot(periods[:, None], periods).round().long()
    return torch.bincount(radii.flatten(), (power / len(images)).flatten())


def detail(spectrum, reference):
    """Power of a ``power_spectrum`` in the upper half of spatial frequencies, over the reference's.

    The upper half begins above 7 periods an image, half of the 14 that 28 pixels can hold, and
    takes the corners in. 1 is right; less is lost, more is noise or false edges.
    """
    return (spectrum[UPPER_HALF:].sum() / reference[UPPER_HALF:].sum()).item()


# --------------------------------------------------------------------------------------------------
# Random features
# --------------------------------------------------------------------------------------------------


@cache
def random_filters(seed=0):
    """Filters of three untrained convolutions, (32, 1, 3, 3), (64, 32, 3, 3) and (128, 64, 3, 3).

    They are normal with variance 2 / fan-in (He et al. 2015), which keeps the signal's size.
    """
    generator = torch.Generator().manual_seed(seed)
    filters = []
    for i, o in ((1, 32), (32, 64), (64, 128)):
        filters.append(math.sqrt(2 / (9 * i)) * torch.randn(o, i, 3, 3, generator=generator))
    return filters


def random_features(images, chunk_size=500):
    """Features (N, 224) of uint8 images (N, 28, 28) in an untrained convolutional network.

    They are the mean over the image of each channel at 28, 14 and 7 pixels, after the ReLU.
    """
    features = []
    for some in images.split(chunk_size):
        x, means = fe.to_input(some), []
        for weight in random_filters():
            x = F.relu(F.conv2d(x, weight, padding=1))
            means.append(x.mean(dim=(2, 3)))  # (n, 32), (n, 64), (n, 128)
            x = F.avg_pool2d(x, 2)
        features.append(torch.cat(means, dim=1))
    return torch.cat(features)
