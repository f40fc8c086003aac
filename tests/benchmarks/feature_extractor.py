"""A small fixed classifier of Fashion-MNIST: the eyes of the benchmarks.

Its weights (``feature_extractor.pt``, beside this file) are frozen: every quality figure of this
repository is measured in the space of its penultimate features, so other weights would mean other
numbers. Each load checks their SHA-256.

    python tests/benchmarks/feature_extractor.py            accuracy of the committed weights
    python tests/benchmarks/feature_extractor.py --train    how they were trained, into output/

Trained with random shifts and mirrored garments. Shoes all face one way and are not mirrored, so
that a generator which mirrors them is seen to. The last 5,000 training images are the validation
split; the test split is only touched to print the final accuracy.
"""

import argparse
import gzip
import hashlib
import socket
import struct
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
DEFAULT_DATA_DIR = HERE.parents[1] / "data"
WEIGHTS_PATH = HERE / "feature_extractor.pt"
WEIGHTS_SHA256 = "fd287b42bacb833e6d6dc82d78417d3a40e761512a0d252349fc6855a6713a2d"

FEATURE_DIM = 128
NUM_CLASSES = 10
VALIDATION_SIZE = 5_000
GARMENTS = torch.tensor([0, 1, 2, 3, 4, 6])  # T-shirt, trouser, pullover, dress, coat, shirt
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530  # of the training images scaled to [0, 1]


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def read_idx(path):
    """Read one IDX file (``.gz`` or unpacked) into a uint8 array; ValueError where header and size
    disagree."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        ndim = raw[3]
        shape = struct.unpack(f">{ndim}I", raw[4 : 4 + 4 * ndim])
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, struct.error) as error:
        raise ValueError(
            f"{path} is not a readable IDX file ({error}); delete it and run again"
        ) from error


def download(data_dir):
    """Let torchvision download Fashion-MNIST. Raises OSError or RuntimeError where it cannot."""
    from torchvision.datasets import FashionMNIST

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none, and a blocked network would hang
    try:
        FashionMNIST(data_dir, download=True)
    finally:
        socket.setdefaulttimeout(timeout)


def load_split(data_dir=DEFAULT_DATA_DIR, train=True):
    """Load a split of Fashion-MNIST: uint8 images (N, 28, 28) and int64 labels (N,), as tensors.

    ``data_dir`` is torchvision's root (files in ``data_dir/FashionMNIST/raw``); torchvision
    downloads what is missing. Raises RuntimeError where it cannot, ValueError for a damaged file.
    """
    folder, prefix = Path(data_dir) / "FashionMNIST" / "raw", "train" if train else "t10k"
    arrays = []
    for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        # The archive comes first: gzip verifies its CRC, whereas an unpacked file may be what a
        # killed run left.
        paths = [folder / f"{name}.gz", folder / name]
        if not any(path.exists() for path in paths):
            try:
                download(data_dir)
            except (OSError, RuntimeError) as error:
                raise RuntimeError(
                    f"{folder} lacks {name}.gz, and downloading failed ({error}). Put the archives "
                    "of Fashion-MNIST there: images and labels, train and t10k, from "
                    "github.com/zalandoresearch/fashion-mnist"
                ) from error
        arrays.append(read_idx(next(path for path in paths if path.exists())))
    return torch.from_numpy(arrays[0].copy()), torch.from_numpy(arrays[1].astype(np.int64))


def to_input(images):
    """Normalise uint8 images (N, 28, 28), (N, 28, 28, 1) or (N, 1, 28, 28), array or tensor, to
    float (N, 1, 28, 28).

    Raises ValueError for another shape or dtype.
    """
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {str(images.dtype).removeprefix('torch.')}")
    if tuple(images.shape[1:]) not in {(28, 28), (28, 28, 1), (1, 28, 28)}:
        raise ValueError(f"images must be (N, 28, 28) or (N, 28, 28, 1), got {tuple(images.shape)}")
    images = images.reshape(-1, 1, 28, 28).float() / 255
    return ((images - PIXEL_MEAN) / PIXEL_STD).contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


class ConvNormReLU(nn.Sequential):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding):
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a skip connection (He et al. 2016, Fig. 2)."""

    def __init__(self, channels):
        super().__init__()
        self.first = ConvNormReLU(channels, channels, 3, 1, 1)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x):
        return F.relu(x + self.second(self.first(x)))


class FeatureExtractor(nn.Module):
    """Normalised images (N, 1, 28, 28) to features (N, 128) and logits (N, 10); 16 M multiply-adds
    an image."""

    def __init__(self, width=40, deep_width=96):
        super().__init__()
        self.body = nn.Sequential(
            ConvNormReLU(1, width, 4, 2, 1),  # (N, 40, 14, 14)
            ResidualBlock(width),
            ConvNormReLU(width, deep_width, 3, 2, 1),  # (N, 96, 7, 7)
            ResidualBlock(deep_width),
            ConvNormReLU(deep_width, FEATURE_DIM, 1, 1, 0),  # (N, 128, 7, 7)
        )
        self.classifier = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def forward(self, x):
        features = self.body(x).mean(dim=(2, 3))  # (N, 128)
        return features, self.classifier(features)


# --------------------------------------------------------------------------------------------------
# Use
# --------------------------------------------------------------------------------------------------


@cache
def load_feature_extractor(path=WEIGHTS_PATH):
    """Load the frozen network, in evaluation mode, on the CPU.

    Raises RuntimeError where the weights are missing or their SHA-256 differs.
    """
    path = Path(path)
    if not path.is_file():
        raise RuntimeError(f"no feature extractor weights at {path}: check the file out again")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        raise RuntimeError(
            f"{path} has SHA-256 {found}, expected {WEIGHTS_SHA256}: these are not the weights "
            "that the published figures were measured with; check the file out again"
        )
    model = FeatureExtractor()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def extract(images_uint8, chunk_size=500, model=None):
    """Run uint8 images (see ``to_input`` for the shapes) through the network, ``chunk_size`` at a
    time.

    Returns float32 features (N, 128) and logits (N, 10), on the CPU. Raises ValueError for another
    shape or dtype.
    """
    model = model or load_feature_extractor()
    images = torch.as_tensor(images_uint8).cpu()
    pairs = [
        model(to_input(images[i : i + chunk_size]))
        for i in range(0, max(len(images), 1), chunk_size)
    ]
    return torch.cat([features for features, _ in pairs]), torch.cat(
        [logits for _, logits in pairs]
    )


def accuracy(model, images, labels):
    """Share of uint8 images (N, 28, 28) whose label (N,) the network's largest logit names."""
    return (extract(images, model=model)[1].argmax(1) == labels).double().mean().item()


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def augment(x, labels, generator, max_shift=2):
    """Shift images x (N, 1, 28, 28) by up to ``max_shift`` pixels; mirror half of the garments
    among them."""
    n, _, size, _ = x.shape
    x = F.pad(x, (max_shift,) * 4, value=-PIXEL_MEAN / PIXEL_STD)  # black
    top, left = torch.randint(0, 2 * max_shift + 1, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(size), left + torch.arange(size)  # (N, 28)
    mirrored = (torch.rand(n, generator=generator) < 0.5) & torch.isin(labels, GARMENTS)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    x = x[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]]  # (N, 28, 28)
    return x[:, None].contiguous(memory_format=torch.channels_last)


def train(data_dir, output, epochs, batch_size=128, learning_rate=0.1, weight_decay=5e-4, seed=0):
    """Train with SGD under a one-cycle schedule, keep the last epoch's weights, save them to
    ``output``.

    Prints a line an epoch with the validation accuracy, and at the end the test accuracy and the
    SHA-256.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_split(data_dir, train=True)
    validation = images[-VALIDATION_SIZE:], labels[-VALIDATION_SIZE:]
    images, labels = images[:-VALIDATION_SIZE], labels[:-VALIDATION_SIZE]

    model = FeatureExtractor().to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * steps, pct_start=0.2
    )

    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for batch in torch.randperm(len(images), generator=generator)[: steps * batch_size].split(
            batch_size
        ):
            with torch.autocast("cpu", torch.bfloat16):
                _, logits = model(augment(to_input(images[batch]), labels[batch], generator))
            loss = F.cross_entropy(logits.float(), labels[batch])
            if not loss.isfinite():
                raise RuntimeError(f"the loss is {loss.item()} in epoch {epoch}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        validated = accuracy(model.eval(), *validation)
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch:2d}  loss {total / steps:.4f}  validation {validated:.2%}  "
            f"{seconds:.0f} s",
            flush=True,
        )

    output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), output)
    print(f"test accuracy {accuracy(model, *load_split(data_dir, train=False)):.2%}")
    print(f"wrote {output}, SHA-256 {hashlib.sha256(output.read_bytes()).hexdigest()}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="train new weights (the committed ones stay as they are)",
    )
    parser.add_argument(
        "--epochs", type=int, default=20, help="epochs of training (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of training (default: %(default)s)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=DEFAULT_DATA_DIR,
        help="torchvision's root (default: data/)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "output" / WEIGHTS_PATH.name,
        help="where --train saves",
    )
    args = parser.parse_args()
    try:
        if args.train:
            train(args.data_dir, args.output, args.epochs, seed=args.seed)
            return
        model = load_feature_extractor()
        images, labels = load_split(args.data_dir, train=True)
        validation = images[-VALIDATION_SIZE:], labels[-VALIDATION_SIZE:]
        print(f"validation accuracy {accuracy(model, *validation):.2%}")
        print(f"test accuracy {accuracy(model, *load_split(args.data_dir, train=False)):.2%}")
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
