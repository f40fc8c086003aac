"""Diffusion on the pixels of Fashion-MNIST, in its first form: DDPM with a convolutional residual net.

A net of convolutions and shortcuts learns to tell the noise in a noisy image. Samples come from the ancestral
sampler of DDPM, a thousand steps of fresh noise, or from DDIM, which takes fewer and can do without fresh noise: a
figure shows the same noise through both.

    python script_model_train_test.py                    train (or resume), then write every figure to output/
    python script_model_train_test.py --quick            the whole pipeline, tiny, into output/quick/
    python script_model_train_test.py --sample-only --num-samples 16 --sampler ancestral
    python script_model_train_test.py --sample-only --export-samples 10000

Papers: DDPM (Ho et al. 2020, arXiv 2006.11239); DDIM (Song et al. 2021, 2010.02502); residual nets (He et
al. 2016, 1512.03385).
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import hashlib
import io
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import FashionMNIST
from torchvision.utils import make_grid
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two runs on one output folder are not told apart
    fcntl = None

# =====================================================================================================================
# Config
# =====================================================================================================================

VERSION = "ImageDiffusionModel/CNN"
OUTPUTS = (
    "checkpoints", "metrics.csv", "loss_curves.png", "samples*", "samplers", "diffusion_animation",
    "denoise_with_diffusion_path",
)  # fmt: skip
QUICK = {"train_images": 1280, "epochs": 2, "width": 16, "blocks": 2, "sampling_steps": 10}  # --quick
RECIPES = {"cpu": {"epochs": 14}, "gpu": {"epochs": 200}}


def option(default, help: str, low=None, high=None, *, multiple=None, choices: tuple = (), resume: str = "match"):
    """A field of `Config`. `resume` says what a run that resumes does with it: "match", the value must be that of the
    checkpoint; "keep", it is the checkpoint's unless the flag is given; "local", checkpoints do not hold it."""
    metadata = {"help": help, "low": low, "high": high, "multiple": multiple, "choices": choices, "resume": resume}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """Every setting of the experiment; each field is also a flag. The defaults reproduce the published result."""

    # where and how to run
    output_dir: str = option("", "folder for all that a run writes (empty: output/ beside the script)", resume="local")
    data_dir: str = option("", "torchvision's root (empty: data/ of the repository, or beside)", resume="local")
    device: str = option("auto", "cpu, cuda, cuda:N or mps (auto: the best there is)", resume="local")
    compile: bool = option(False, "torch.compile the models in training", resume="local")
    seed: int = option(0, "seed of training", 0, 2**31 - 1)
    train_images: int = option(55_000, "training images used, from the first on", 10, 55_000)
    checkpoint_minutes: float = option(3.0, "minutes between checkpoints within an epoch", 0.0, 1e4, resume="keep")
    # the diffusion
    epochs: int = option(0, "epochs (0: 14 on a CPU, else 200)", 0, 100_000, resume="keep")
    batch_size: int = option(16, "images a step", 1, 4096)
    learning_rate: float = option(2e-3, "peak learning rate", 1e-8, 1.0)
    width: int = option(48, "channels at 14x14; twice as many at 7x7", 8, 512, multiple=8)
    blocks: int = option(4, "residual blocks at 7x7", 1, 100)
    ema_decay: float = option(0.998, "decay of the averaged weights a step", 0.0, 0.999999)
    # samples and figures
    sampler: str = option("ddim", "DDIM, or DDPM's own in 1000 steps", choices=("ddim", "ancestral"), resume="keep")
    sampling_steps: int = option(60, "steps of DDIM", 1, 1000, resume="keep")
    eta: float = option(0.5, "fresh noise of DDIM's steps: 0 none, 1 as much as DDPM's", 0.0, 1.0, resume="keep")
    variance: str = option("small", "of the ancestral steps", choices=("small", "large"), resume="keep")
    sampling_seed: int = option(0, "seed of the noise that samples start from", 0, 2**31 - 1, resume="local")
    figures_every: int = option(50, "epochs between full sets of figures", 1, 100_000, resume="keep")


def with_recipe(config: Config, device: torch.device) -> Config:
    """Fills in the fields that were left to the device: those that are 0 and in its recipe."""
    recipe = RECIPES["cpu" if device.type == "cpu" else "gpu"]
    return dataclasses.replace(config, **{name: getattr(config, name) or value for name, value in recipe.items()})


class ExperimentError(Exception):
    """What ends a run with one line and the exit status `status`: 2 for bad input, 128 + n for signal n."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


class CommandLine(argparse.ArgumentParser):
    """A parser with a flag for each field of a configuration, and with errors of one line."""

    def error(self, message: str):
        self.exit(2, f"error: {' '.join(message.split())} (--help describes every flag)\n")

    def add_config(self, config_class: type) -> None:
        """A flag that is not given leaves no attribute behind."""
        for field in dataclasses.fields(config_class):
            rules, name = field.metadata, field.name.replace("_", "-")
            limits = "" if rules["low"] is None else f", {rules['low']:.10g} to {rules['high']:.10g}"
            limits += "" if rules["multiple"] is None else f", a multiple of {rules['multiple']}"
            text = f"{rules['help']} ({field.type.__name__}{limits}; default: {field.default!r})".replace("%", "%%")
            parse = bounded(field.type, rules["low"], rules["high"], rules["multiple"])
            kind = {"type": parse, "metavar": field.type.__name__.upper()}
            if rules["choices"]:
                kind = {"choices": rules["choices"]}
            if field.type is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            self.add_argument(f"--{name}", dest=field.name, default=argparse.SUPPRESS, help=text, **kind)


def bounded(kind: type, low, high, multiple=None) -> Callable[[str], object]:
    """Returns the function that turns a flag's text into a `kind` from low to high (None: any)."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if low is not None and not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in the range {low:.10g} to {high:.10g}")
        if multiple is not None and value % multiple:
            raise argparse.ArgumentTypeError(f"{text} is not a multiple of {multiple}")
        return value

    return parse


def stored_fields(config_class: type, *resume: str) -> list[str]:
    """Names of the fields whose `resume` is one of those given."""
    return [field.name for field in dataclasses.fields(config_class) if field.metadata["resume"] in resume]


def settle_config(config_class: type, defaults: dict, given: dict, checkpoint: dict | None):
    """The `config_class` of this run: the flags `given`, else the checkpoint's values, else the defaults.

    Raises ExperimentError that names the fields in which the flags contradict the checkpoint.
    """
    stored = checkpoint["config"] if checkpoint else {}
    names = [n for n in stored_fields(config_class, "match") if n in given and given[n] != stored.get(n, given[n])]
    if names:
        clashes = ", ".join(f"{name} is {stored[name]!r} there and {given[name]!r} here" for name in names)
        raise ExperimentError(
            f"the checkpoint was trained with another configuration: {clashes}. Leave these flags out to go on with "
            "it, choose another --output-dir, or start over with --fresh"
        )
    return config_class(**defaults | stored | given)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, else MPS, else the CPU. Raises ExperimentError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ExperimentError(f"device {name!r} is none of auto, cpu, cuda, cuda:N, mps")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ExperimentError(f"cannot use device {name!r}: {str(error).splitlines()[0][:150]}") from None
    torch.set_float32_matmul_precision("high")  # TF32 where there is
    device = torch.device(name)
    if device.index is not None:  # what asks or seeds "the" GPU must mean this one
        torch.cuda.set_device(device)
    return device


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the hardware multiplies it natively: CUDA since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = getattr(torch.cpu, "get_capabilities", dict)()  # old releases cannot tell: float32
        native = device.type == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=native)


def derived_seed(*parts) -> int:
    """A 63-bit seed: the same for the same parts, independent for others."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the global generators of the CPU and of `device`: torch.manual_seed, which takes milliseconds, in less."""
    torch.default_generator.manual_seed(seed)
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).manual_seed(seed)


# =====================================================================================================================
# Data
# =====================================================================================================================

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
RAW_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class Data(NamedTuple):
    """Images (N, 1, 28, 28) uint8 and labels (N,) int64, resident on the device. The test split is not read."""

    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor


def find_data_dir(config: Config) -> Path:
    """config.data_dir, or else data/ at the root of the repository, or beside the script where it stands alone."""
    folder = Path(__file__).resolve().parent
    root = next((parent for parent in folder.parents if (parent / "LatentDiffusionModel").is_dir()), folder)
    return Path(config.data_dir or root / "data")


def is_whole(path: Path) -> bool:
    """Whether an unpacked idx file has the size that its header says."""
    with open(path, "rb") as file:
        start = file.read(16)
    header = np.frombuffer(start.ljust(16, b"\0"), ">i4")
    shape = {0x803: header[1:4], 0x801: header[1:2]}.get(int(header[0]))
    return shape is not None and path.stat().st_size == 4 + 4 * len(shape) + int(np.prod(shape, dtype=np.int64))


def load_fashion_mnist(data_dir: Path, train_images: int, device: torch.device) -> Data:
    """Reads Fashion-MNIST, at the first use downloads it. The last twelfth of the training images is for validation.

    Raises ExperimentError that names the archives, the folder they belong in and where they come from.
    """
    raw = data_dir / "FashionMNIST" / "raw"
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    socket.setdefaulttimeout(60)  # torchvision sets none, and an unplugged network would hang the run
    try:
        for path in [raw / name for name in RAW_FILES]:
            if path.exists() and not is_whole(path):  # a kill while unpacking; torchvision looks at the name only
                print(f"warning: {path} is damaged, unpacking it again")
                path.unlink()
        with bars:  # torchvision's, which are no plain lines
            dataset = FashionMNIST(data_dir, train=True, download=True)
    except (RuntimeError, OSError, HTTPException) as error:
        raise ExperimentError(
            f"cannot read Fashion-MNIST ({' '.join(str(error).split())[:300]}). Without a network, put "
            f"{', '.join(name + '.gz' for name in RAW_FILES)} from github.com/zalandoresearch/fashion-mnist into {raw}"
        ) from None
    images, labels = dataset.data[:, None].to(device), dataset.targets.to(device)
    split = len(images) - len(images) // 12
    kept = min(train_images, split)
    return Data(images[:kept], labels[:kept], images[split:], labels[split:])


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1], any shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_float`, clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# =====================================================================================================================
# Model
# =====================================================================================================================


def zero_init(layer: nn.Module) -> nn.Module:
    """The same layer with its weight and bias at zero: a residual branch that starts as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ConditionedBlock(nn.Module):
    """Residual block with scale-shift conditioning (Dhariwal & Nichol 2021, AdaGN). Its branch starts as nothing."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(8, out_channels, affine=False)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of t (B,) at `dim` / 2 frequencies from 1 down towards 1/10000: (B, dim)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def channels_last_on_cuda(x: Tensor) -> Tensor:
    """The same images (B, C, H, W), on CUDA in the memory order in which its convolutions are fastest."""
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x


class ConvolutionalDenoiser(nn.Module):
    """Noise of images given time: a residual net over 2x2-unshuffled pixels.

    Most of its blocks work at half of that resolution, where they cost a quarter and see twice as far; what they find
    is added to the finer features, as a residual.
    """

    def __init__(self, width: int, blocks: int):
        super().__init__()
        embedding_dim = 4 * width
        self.time_dim = 2 * width
        self.time = nn.Sequential(
            nn.Linear(self.time_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.stem = nn.Conv2d(4, width, 3, padding=1)
        self.first_block = ConditionedBlock(width, width, embedding_dim)
        self.downsample = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(ConditionedBlock(2 * width, 2 * width, embedding_dim) for _ in range(blocks))
        self.upsample = nn.Conv2d(2 * width, 4 * width, 1)  # of 2x2 shuffled channels: sub-pixel convolution
        self.last_block = ConditionedBlock(width, width, embedding_dim)
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), zero_init(nn.Conv2d(width, 4, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noisy images (B, 1, 28, 28) and t (B,) in 1..1000 to their noise (B, 1, 28, 28)."""
        embedding = F.silu(self.time(timestep_embedding(t, self.time_dim)))
        fine = self.stem(channels_last_on_cuda(F.pixel_unshuffle(x, 2)))
        fine = self.first_block(fine, embedding)  # (B, W, 14, 14)
        coarse = self.downsample(fine)  # (B, 2W, 7, 7)
        for block in self.blocks:
            coarse = block(coarse, embedding)
        fine = fine + F.pixel_shuffle(self.upsample(coarse), 2)
        fine = self.last_block(fine, embedding)
        return noise_of_output(x, F.pixel_shuffle(self.head(fine), 2).float(), t)


# =====================================================================================================================
# Diffusion
# =====================================================================================================================


TIMESTEPS = 1000  # T; t = 0 is data


def linear_alpha_bars() -> Tensor:
    """alpha_bar at t = 0 ... T, (T + 1,) float64: the cumulated product of 1 - beta_t, with beta_t from 1e-4 to 0.02
    in equal steps (Ho et al. 2020, Sec. 4)."""
    betas = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)])


def diffuse(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The forward process: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, Eq. 4), alpha_bar
    (B,)."""
    alpha_bar = alpha_bar.view(-1, *[1] * (x0.dim() - 1))
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def noise_of_output(x: Tensor, output: Tensor, t: Tensor) -> Tensor:
    """The noise in x_t, sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) output, t (B,) in 1 ... T.

    Near T the state is its noise: with this shortcut a network need not copy it. The output's target is the v of
    Salimans & Ho 2022, App. D, but the loss stays that of the noise.
    """
    alpha_bar = linear_alpha_bars().float().to(x.device)[t]
    return diffuse(output, x, alpha_bar)


def x0_of_noise(x: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - alpha_bar) noise) / sqrt(alpha_bar), Ho et al. 2020, Eq. 4 for x_0, alpha_bar (B,)."""
    alpha_bar = alpha_bar.view(-1, *[1] * (x.dim() - 1))
    return (x - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()


def noise_prediction_loss(denoiser: nn.Module, x0: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mean squared error of the noise for x0 (B, C, H, W), t uniform on 1 ... T (Ho et al. 2020, Eq. 14)."""
    t = torch.randint(1, TIMESTEPS + 1, (len(x0),), generator=generator, device=x0.device)
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    alpha_bar = linear_alpha_bars().float().to(x0.device)[t]
    return F.mse_loss(denoiser(diffuse(x0, noise, alpha_bar), t), noise)


def on_images(loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a loss of images in [-1, 1] one of uint8 images."""

    def loss(denoiser: nn.Module, images: Tensor, *labels: Tensor, generator: torch.Generator | None = None):
        return loss_fn(denoiser, to_float(images), *labels, generator=generator)

    return loss


def ancestral(
    predict: Callable[[Tensor, int], tuple[Tensor, Tensor]], noise: Tensor, alpha_bars: list[float], variance: str,
    generator: torch.Generator,
) -> list[Tensor]:  # fmt: skip
    """Ancestral sampling of DDPM (Ho et al. 2020, Algorithm 2).

    Args:
        predict: x_0 and the noise as the model sees them in the state x at alpha_bars[i], as a function of (x, i).
        noise: the state at alpha_bars[0].
        alpha_bars: T + 1 of them, rising to 1.
        variance: of a step, "large" is beta_t and "small" the posterior's, beta~_t (Sec. 3.2, Eq. 7).
        generator: of the fresh noise, on the CPU.

    Returns the first state and the last: all of a thousand steps would fill the memory.
    """
    state = noise
    for i, (a, a_next) in enumerate(zip(alpha_bars, alpha_bars[1:])):
        beta = 1 - a / a_next
        _, predicted = predict(state, i)
        state = (state - beta / math.sqrt(1 - a) * predicted) / math.sqrt(1 - beta)  # Eq. 11
        if a_next < 1:  # no noise after the last step
            sigma = math.sqrt(beta if variance == "large" else (1 - a_next) / (1 - a) * beta)
            fresh = torch.randn(state.shape, generator=generator, dtype=state.dtype)
            state = state + sigma * fresh.to(state.device)
    return [noise, state]


def ddim(
    predict: Callable[[Tensor, int], tuple[Tensor, Tensor]], noise: Tensor, alpha_bars: list[float], eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Tensor]:  # fmt: skip
    """DDIM (Song et al. 2021, Eq. 12 and 16).

    Args:
        predict: x_0 and the noise as the model sees them in the state x at alpha_bars[i], as a function of (x, i).
        noise: the state at alpha_bars[0].
        alpha_bars: S + 1 of them, rising; the last one may be 1, which is data.
        eta: 0 is deterministic; 1 adds as much fresh noise a step as ancestral sampling does.
        generator: of the fresh noise, on the CPU.

    Returns the S + 1 states, the noise first.
    """
    states = [noise]
    for i, (a, a_next) in enumerate(zip(alpha_bars, alpha_bars[1:])):
        x0, predicted = predict(states[-1], i)
        sigma = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        state = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - sigma**2) * predicted
        if sigma > 0:
            state = state + sigma * torch.randn(state.shape, generator=generator, dtype=state.dtype).to(state.device)
        states.append(state)
    return states


def fresh_noise(noise: Tensor) -> torch.Generator:
    """The generator of a stochastic sampler that starts from `noise`: the same for the same, another for another."""
    return torch.Generator().manual_seed(derived_seed("fresh noise", noise.flatten()[:8].tolist()))


def sampling_times(steps: int) -> list[int]:
    """steps + 1 times from T to 0, as evenly spaced as whole numbers can be."""
    return torch.linspace(TIMESTEPS, 0, steps + 1, dtype=torch.float64).round().int().tolist()


@torch.inference_mode()
def sample(denoiser: nn.Module, noise: Tensor, config: Config, steps: int = 0) -> list[Tensor]:
    """States from `noise` (B, 1, 28, 28) at t=1000 to images in [-1, 1] at t=0; `steps` is DDIM's."""
    times = sampling_times(TIMESTEPS if config.sampler == "ancestral" else steps or config.sampling_steps)
    alpha_bars = linear_alpha_bars()[times]

    def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        predicted = denoiser(x, torch.full((len(x),), times[i], device=x.device))
        return x0_of_noise(x, predicted, alpha_bars[i].to(x)), predicted

    with autocast(noise.device):
        if config.sampler == "ancestral":
            return ancestral(predict, noise, alpha_bars.tolist(), config.variance, fresh_noise(noise))
        return ddim(predict, noise, alpha_bars.tolist(), config.eta, fresh_noise(noise))


def deterministic(config: Config) -> Config:
    """The same configuration with DDIM that adds no fresh noise."""
    return dataclasses.replace(config, sampler="ddim", eta=0.0)


class TrainedModels(NamedTuple):
    """The averaged model in evaluation mode, ready to sample from, and the configuration that says how."""

    denoiser: ConvolutionalDenoiser
    config: Config
    history: list[dict]  # a row an epoch, as in metrics.csv

    @classmethod
    def of_stages(cls, stages: list["Stage"], config: Config, history: list[dict]) -> "TrainedModels":
        """The model that `build_stages` made."""
        [diffusion] = stages
        return cls(diffusion.ema.module, config, history)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def epoch(self) -> int:
        """Complete epochs."""
        return len(self.history)

    def noise(self, count: int) -> Tensor:
        """The noise (count, 1, 28, 28) that samples start from."""
        return seeded_noise((count, 1, 28, 28), self.config.sampling_seed, self.device)

    def decode(self, states: Tensor) -> Tensor:
        """States of the process, any shape, to uint8 images."""
        return to_uint8(states)


def seeded_noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Standard normal noise from the sampling seed: the same on every device."""
    generator = torch.Generator().manual_seed(derived_seed("sampling", seed))
    return torch.randn(shape, generator=generator).to(device)


def generate_samples(models: TrainedModels, count: int, chunk: int = 100) -> Tensor:
    """Generates images.

    Args:
        models: from `load_trained`; their configuration's steps, sampler and sampling seed say how.
        count: N, the number of images.
        chunk: images at a time; with a deterministic sampler the result does not depend on it but for rounding.

    Returns: uint8 (N, 1, 28, 28).
    """
    images = []
    for noise in models.noise(count).split(chunk):
        images.append(models.decode(sample(models.denoiser, noise, models.config)[-1]))
    return torch.cat(images)


class Trajectories(NamedTuple):
    """Trajectories of the deterministic sampler as figures show them, and the forward process beside them."""

    states: Tensor  # (S + 1, N, ...), the model's, from noise to data
    noised: Tensor  # (S + 1, N, ...), the forward process from the same data to the same noise
    captions: list[str]  # S + 1 of them, from noise to data


def draw_trajectories(models: TrainedModels, count: int, steps: int) -> Trajectories:
    """`count` trajectories of images, in `steps` steps."""
    noise, times = models.noise(count), sampling_times(steps)
    states = torch.stack(sample(models.denoiser, noise, deterministic(models.config), steps))
    alpha_bars = linear_alpha_bars()[times[::-1]].float().to(models.device)
    noised = torch.stack([diffuse(states[-1], noise, alpha_bar) for alpha_bar in alpha_bars])
    return Trajectories(states, noised, [f"t = {t}" for t in times])


# =====================================================================================================================
# Checkpoints
# =====================================================================================================================

CHECKPOINT_FORMAT = 1


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a file that is never seen half written. A failure (OSError) leaves what was there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def save_checkpoint(content: dict, folder: Path) -> None:
    """Makes `content` last.pt, and what was last.pt previous.pt. At every moment one of the two is whole."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "new.pt", buffer.getbuffer())
    if (folder / "last.pt").exists():
        os.replace(folder / "last.pt", folder / "previous.pt")
    os.replace(folder / "new.pt", folder / "last.pt")
    if os.name == "posix":  # the renames must reach the disk too
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_checkpoint(path: Path) -> dict:
    """Reads one file to the CPU, executing nothing. Raises ValueError if its content is damaged in any way."""
    file = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load skips the CRCs
            if archive.testzip() is not None or any(entry.external_attr for entry in archive.infolist()):
                raise ValueError("a checksum or an attribute is wrong")  # as a folder an entry would read as nothing
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not {"format", "version"} <= content.keys():
            raise ValueError("it is no checkpoint")
        return content
    except Exception as error:  # arbitrary bytes provoke arbitrary errors
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())[:100]}") from None


def find_checkpoint(folder: Path, config_class: type) -> dict | None:
    """The newest readable checkpoint, or None where there has been none. Warns of a file that cannot be read.

    Raises ExperimentError if none can be read, or if it is of another version or format.
    """
    content, paths = None, [path for path in (folder / "last.pt", folder / "previous.pt") if path.exists()]
    for path in paths:
        try:
            content = read_checkpoint(path)
            break
        except ValueError as error:
            print(f"warning: cannot read {path} ({error})")
    if content is None:
        if paths:
            raise ExperimentError(f"no checkpoint in {folder} can be read: start over with --fresh")
        return None
    if content["version"] != VERSION:
        raise ExperimentError(f"{path} belongs to {content['version']}, not to {VERSION}: choose another --output-dir")
    keys = {"format", "version", "torch", "config", "stages", "history"}
    if content["format"] != CHECKPOINT_FORMAT or content.keys() != keys:
        raise ExperimentError(f"{path} is of another release: choose another --output-dir, or start over with --fresh")
    settings = {*stored_fields(config_class, "match", "keep")}
    if not isinstance(content["config"], dict) or content["config"].keys() != settings:
        raise ExperimentError(f"{path} holds other settings: choose another --output-dir, or start over with --fresh")
    if path.name == "previous.pt":
        print(f"warning: {folder / 'last.pt'} is missing or damaged, going on from {path}")
    return content


def load_state(module, state: dict) -> None:
    """Calls `module.load_state_dict`. Raises ExperimentError if the state does not fit."""
    try:
        module.load_state_dict(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ExperimentError(f"the checkpoint does not fit its configuration ({reason}): see --fresh") from None


def set_damaged_aside(folder: Path) -> None:
    """Renames a last.pt that cannot be read, so that the next save does not put it in place of a good previous.pt."""
    try:
        if (folder / "last.pt").exists():
            read_checkpoint(folder / "last.pt")
    except ValueError:
        os.replace(folder / "last.pt", folder / f"damaged_{time.time_ns()}.pt")


@contextlib.contextmanager
def locked_output(folder: Path) -> Iterator[None]:
    """Creates the output folder and keeps other runs out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ExperimentError(f"cannot write to the output folder {folder}: {error.strerror}") from None
    with lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExperimentError(f"another run is using {folder}: choose another --output-dir") from None
        except OSError as error:
            print(f"warning: cannot lock {folder} ({error.strerror}): see to it that no other run uses it")
        yield


def move_aside(folder: Path, names: tuple[str, ...]) -> None:
    """Moves what an old run wrote under these names to old_runs/<time>/, the checkpoints first."""
    attic = folder / "old_runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}"
    for entry in [path for name in names for path in sorted(folder.glob(name))]:
        attic.mkdir(parents=True, exist_ok=True)
        shutil.move(entry, attic)
    if attic.exists():
        print(f"the old run is in {attic}")


# =====================================================================================================================
# Training
# =====================================================================================================================


def learning_rate_factor(step: int, total_steps: int) -> float:
    """Warm-up over 100 steps, constant, linear to zero over the last 40% of the steps.

    A finished run that is given more epochs follows the longer plan, so learns faster again at first.
    """
    return max(0.0, min(1.0, (step + 1) / 100, (total_steps - step) / (0.4 * total_steps + 1)))


class Stage:
    """One stage of training: the model, its moving average, its optimizer, and where it stands.

    Args:
        loss_fn: `loss_fn(model, *batch, generator=None)` returns the loss of a batch.
        images: size of the training set; what does not fill a batch waits for another epoch's order.
    """

    def __init__(
        self, name: str, model: nn.Module, loss_fn: Callable[..., Tensor], images: int, batch_size: int, epochs: int,
        learning_rate: float, config: Config,
    ):  # fmt: skip
        self.name, self.model, self.loss_fn = name, model, loss_fn
        self.batch_size = min(batch_size, images)
        self.steps_per_epoch = images // self.batch_size
        self.total_steps = epochs * self.steps_per_epoch
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)).eval()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)
        self.scheduler = LambdaLR(self.optimizer, lambda step: learning_rate_factor(step, self.total_steps))
        self.step, self.loss_sum, self.seconds = 0, 0.0, 0.0  # the last two are of the epoch under way
        if config.compile:
            self.model.compile()

    @property
    def epoch(self) -> int:
        """Number of complete epochs."""
        return self.step // self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """The learning rate of `step`."""
        return self.optimizer.param_groups[0]["initial_lr"] * learning_rate_factor(step, self.total_steps)

    def state(self) -> dict:
        """All that the stage needs to go on with the same bits."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer", "scheduler")}
        return parts | {"step": self.step, "loss_sum": self.loss_sum, "seconds": self.seconds}

    def restore(self, state: dict) -> None:
        """The inverse of `state`. Raises ExperimentError if the state is another model's."""
        for name in ("model", "ema", "optimizer", "scheduler"):
            load_state(getattr(self, name), state.get(name))
        self.step, self.loss_sum, self.seconds = state["step"], state["loss_sum"], state["seconds"]
        for group in self.optimizer.param_groups:  # more epochs than planned before have changed the plan
            group["lr"] = self.learning_rate(self.step)


class Run:
    """A run's stages and history, and the folder that they are saved in."""

    def __init__(self, config: Config, output: Path, stages: list[Stage], checkpoint: dict | None):
        self.config, self.output, self.stages = config, output, stages
        self.history = checkpoint["history"] if checkpoint else []
        for stage in stages if checkpoint else []:
            stage.restore(checkpoint["stages"][stage.name])
            if stage.step > stage.total_steps:
                raise ExperimentError(f"{stage.name} has been trained for more epochs already: {stage.epoch}")

    def save(self) -> None:
        """Writes a checkpoint, and metrics.csv."""
        config = {name: getattr(self.config, name) for name in stored_fields(type(self.config), "match", "keep")}
        content = {"format": CHECKPOINT_FORMAT, "version": VERSION, "torch": str(torch.__version__), "config": config}
        content |= {"stages": {stage.name: stage.state() for stage in self.stages}, "history": self.history}
        save_checkpoint(content, self.output / "checkpoints")
        self.write_metrics()

    def write_metrics(self) -> None:
        """Writes the history as metrics.csv, a row an epoch."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.history[0] if self.history else ["stage"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_atomically(self.output / "metrics.csv", text.getvalue().encode())


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Here the first SIGINT or SIGTERM only joins the list; a second one acts at once."""
    noted = []

    def note(signum, frame):
        noted.append(signum)
        for number in handlers:
            signal.signal(number, signal.SIG_DFL)

    heeded = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, note) for number in heeded}
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_step(stage: Stage, batch: list[Tensor]) -> Tensor:
    """One step of the optimizer and of the averaged weights. Returns the loss, detached."""
    with autocast(batch[0].device):
        loss = stage.loss_fn(stage.model, *batch)
    stage.optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
    stage.optimizer.step()
    stage.scheduler.step()
    stage.ema.update_parameters(stage.model)
    return loss.detach() + 0 * norm  # not finite if the gradient is not


@torch.inference_mode()
def validation_loss(stage: Stage, arrays: list[Tensor]) -> float:
    """The averaged weights' mean loss over `arrays`, with the same noise and times at every call."""
    device, total = arrays[0].device, 0.0
    generator = torch.Generator(device).manual_seed(0)
    with autocast(device):
        for batch in zip(*(array.split(500) for array in arrays)):
            total += stage.loss_fn(stage.ema.module, *batch, generator=generator).item() * len(batch[0])
    return total / len(arrays[0])


def train(
    run: Run, stage: Stage, arrays: list[Tensor], held_out: list[Tensor], after_epoch: Callable[[], None]
) -> None:
    """Trains `stage` from the step it is at to its last, on rows of `arrays`, validated on `held_out`.

    What is random depends on the seed, the stage and the step alone, so that a resumed run goes on with the same bits.
    Saves after each epoch, every few minutes, and on a signal. `after_epoch` is called when an epoch is saved.
    Raises ExperimentError after a signal, or if the loss is not finite.
    """
    device, seed, size = arrays[0].device, run.config.seed, stage.batch_size
    saved_at, losses, order = time.monotonic(), [], None
    images, done = stage.total_steps * size, stage.step * size
    bar = tqdm(desc=stage.name, total=images, initial=done, unit=" images", unit_scale=True, disable=None)
    with noted_signals() as signals, bar:
        while stage.step < stage.total_steps:
            started = time.perf_counter()
            epoch, position = divmod(stage.step, stage.steps_per_epoch)
            if position == 0 or order is None:
                shuffle = torch.Generator().manual_seed(derived_seed(seed, stage.name, "order", epoch))
                order = torch.randperm(len(arrays[0]), generator=shuffle).to(device)
            rows = order[position * size : (position + 1) * size]
            seed_generators(derived_seed(seed, stage.name, "step", stage.step), device)
            losses.append((stage.step, train_step(stage, [array[rows] for array in arrays])))
            stage.step += 1
            epoch_ends, stopping = stage.step % stage.steps_per_epoch == 0, bool(signals)
            saving = epoch_ends or stopping or time.monotonic() - saved_at > 60 * run.config.checkpoint_minutes
            while len(losses) > (0 if saving else 1):  # read a step late, so that no device waits
                add_loss(run, stage, *losses.pop(0), bar)
            stage.seconds += time.perf_counter() - started
            bar.update(size)
            if epoch_ends:
                close_epoch(run, stage, validation_loss(stage, held_out), verbose=bar.disable)
            if saving:
                run.save()
                saved_at = time.monotonic()
            if epoch_ends and not stopping:
                after_epoch()
            if stopping or (epoch_ends and signals):  # either way this step is saved
                where = f"{stage.name}, step {stage.step} of {stage.total_steps}"
                name = signal.Signals(signals[0]).name
                raise ExperimentError(f"{name} at {where}: saved; run again to resume", 128 + signals[0])


def add_loss(run: Run, stage: Stage, step: int, loss: Tensor, bar: tqdm) -> None:
    """Adds the loss of `step` to the sum of the epoch. Raises ExperimentError if it is not finite."""
    value = loss.item()
    if not math.isfinite(value):
        last = run.output / "checkpoints" / "last.pt"
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        raise ExperimentError(f"loss or gradient of {stage.name} is not finite at step {step}; {kept}", 1)
    stage.loss_sum += value
    bar.set_postfix(loss=f"{value:.4f}", lr=f"{stage.learning_rate(step):.1e}", refresh=False)


def close_epoch(run: Run, stage: Stage, validation: float, verbose: bool) -> None:
    """Adds a row to the history, and starts the sums of the next epoch."""
    rate = stage.steps_per_epoch * stage.batch_size / stage.seconds
    row = {"stage": stage.name, "epoch": stage.epoch, "step": stage.step}
    row |= {"train_loss": stage.loss_sum / stage.steps_per_epoch, "validation_loss": validation}
    row |= {"learning_rate": stage.learning_rate(stage.step - 1), "seconds": stage.seconds, "images_per_second": rate}
    run.history.append(row)
    stage.loss_sum = stage.seconds = 0.0
    if verbose:
        minutes = (stage.total_steps - stage.step) * stage.batch_size / rate / 60
        print(
            f"{stage.name}: epoch {stage.epoch} of {stage.total_steps // stage.steps_per_epoch}, "
            f"loss {row['train_loss']:.4f}, validation {validation:.4f}, {rate:.0f} images/s, {minutes:.1f} min left"
        )


def announce_plan(run: Run, examples: list[list[Tensor]]) -> None:
    """Prints where each stage stands and about how long the rest takes, by trial steps on copies of the models."""
    minutes = 0.0
    for stage, arrays in zip(run.stages, examples):
        size = sum(parameter.numel() for parameter in stage.model.parameters())
        print(f"{stage.name}: {size / 1e6:.2f} M parameters, step {stage.step} of {stage.total_steps}")
        model, left, seconds = copy.deepcopy(stage.model), stage.total_steps - stage.step, 0.0
        for _ in range(2 if left else 0):  # the first one warms up
            started = time.perf_counter()
            with autocast(arrays[0].device):
                stage.loss_fn(model, *(array[: stage.batch_size] for array in arrays)).backward()
            next(model.parameters()).grad.sum().item()  # wait for the device
            seconds = time.perf_counter() - started
        minutes += left * seconds / 60
    print(f"to do: {f'training, about {minutes:.1f} minutes, then ' if minutes else ''}the figures")


# =====================================================================================================================
# Figures
# =====================================================================================================================

CLASS_COLOURS = matplotlib.colormaps["tab10"].colors
PATH_STEPS = 20  # sampler steps of the trajectories that are drawn


def file_name(title: str) -> str:
    """A class's or sample's name as part of a file name."""
    return title.replace("/", "-").replace(" ", "-")


def save_figure(figure: Figure, path: Path) -> None:
    """Saves a figure as PNG, in a folder that need not exist yet."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, bbox_inches="tight", pad_inches=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def draw_grid(axes, images: Tensor, rows: list[str], columns: list[str]) -> None:
    """Draws images (R, C, 1, 28, 28) uint8 as a grid, with names of rows (left) and columns (above)."""
    grid = make_grid(images.flatten(0, 1), nrow=images.shape[1], padding=2, pad_value=96)[0]
    axes.imshow(grid.cpu().numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_yticks([16 + 30 * row for row in range(len(rows))], rows)
    axes.set_xticks([16 + 30 * column for column in range(len(columns))], columns)
    axes.tick_params(length=0, labelsize=9, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


def save_grid(path: Path, images: Tensor, rows: list[str], columns: list[str], title: str) -> None:
    """Saves a grid as `draw_grid` draws it, with a title."""
    figure = Figure(figsize=(0.62 * images.shape[1], 0.62 * images.shape[0]))
    axes = figure.add_axes((0, 0, 1, 1))
    draw_grid(axes, images, rows, columns)
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


def save_sheet(path: Path, images: Tensor, title: str) -> None:
    """Saves images (N, 1, 28, 28) eight a row, and says where."""
    columns = min(8, len(images))
    blanks = torch.full((-len(images) % columns, 1, 28, 28), 96, dtype=torch.uint8, device=images.device)
    save_grid(path, torch.cat([images, blanks]).unflatten(0, (-1, columns)), [], [], title)
    print(f"samples: {path}")


def save_loss_curves(history: list[dict], path: Path) -> None:
    """Training and validation loss of each stage by epoch; nothing before the first has ended."""
    stages = list(dict.fromkeys(row["stage"] for row in history))
    if not stages:
        return
    figure = Figure(figsize=(5 * len(stages), 3.2), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
        rows = [row for row in history if row["stage"] == stage]
        for key, name in (("train_loss", "training"), ("validation_loss", "validation, averaged weights")):
            axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], "o-", markersize=3, label=name)
        axes.set(title=stage, xlabel="epoch", ylabel="loss")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def save_animation(noised: Tensor, trajectory: Tensor, captions: list[str], title: str, path: Path) -> None:
    """A looping GIF from the clean image out to noise by the forward process, and back as the model went.

    Args:
        noised: uint8 (S + 1, 1, 28, 28), the forward process from data to noise.
        trajectory: uint8 (S + 1, 1, 28, 28), the model's states from the same noise to the same image.
        captions: of the trajectory's states, from noise to data.
    """
    dejavu = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # Pillow's own font knows no Greek
    steps, font = len(noised) - 1, ImageFont.truetype(dejavu, size=16)
    frames = []
    for index, picture in enumerate(torch.cat([noised, trajectory[1:-1]]).cpu().numpy()):
        frame = Image.new("L", (224, 254), 255)
        frame.paste(Image.fromarray(picture[0]).resize((224, 224), Image.Resampling.NEAREST), (0, 30))
        draw = ImageDraw.Draw(frame)
        draw.text((6, 4), title, font=font, fill=0)
        draw.text((218, 4), captions[abs(steps - index)], font=font, fill=0, anchor="ra")
        frames.append(frame)
    milliseconds = [1200 if index == 0 else 500 if index == steps else 80 for index in range(len(frames))]
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def scatter_classes(axes, points: np.ndarray, labels: np.ndarray, strong: int | None = None) -> None:
    """Draws points (N, 2) coloured by class with a legend; `strong` (None: all) in full colour, the others pale."""
    for label, name in enumerate(CLASS_NAMES):
        alpha, size = (0.7, 9) if strong in (None, label) else (0.2, 5)
        colour = CLASS_COLOURS[label]
        axes.scatter(*points[labels == label].T, s=size, alpha=alpha, color=colour, linewidths=0, label=name)
    legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9, markerscale=2.5, frameon=False)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def place_labels(axes, points: np.ndarray, texts: dict[int, str]) -> None:
    """Writes texts near the points (N, 2) of their index, each where it is farthest from points and earlier texts."""
    pixels, inside = axes.transData.transform(points), axes.bbox.padded(-24, -10)
    taken, to_data = list(pixels), axes.transData.inverted().transform
    for index, text in texts.items():
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        around = np.concatenate(
            [pixels[index] + r * np.stack([1.5 * np.cos(angles), np.sin(angles)], 1) for r in (24, 44)]
        )
        around = [place for place in around if inside.contains(*place)] or around
        spot = max(around, key=lambda place: min(np.hypot(*((place - other) / (1.8, 1))) for other in taken))
        taken.append(spot)
        axes.annotate(
            text, to_data(pixels[index]), to_data(spot), fontsize=9, ha="center", va="center", zorder=6,
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85},
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "0.3"},
        )  # fmt: skip


def path_figure(
    images: Tensor, path: np.ndarray, captions: list[str], scatter: np.ndarray, labels: np.ndarray, title: str,
    strong: int | None,
) -> Figure:  # fmt: skip
    """Trajectories from noise to image, and the first of them as a path among the validation images.

    Args:
        images: uint8 (R, S + 1, 1, 28, 28), a trajectory a row, from noise to data; every other state is shown.
        path: (S + 1, 2), the first trajectory's states in the plane of the scatter.
        captions: S + 1 of them.
        scatter, labels: (N, 2) and (N,), the validation images in that plane, and their classes.
        strong: the class that stands out (None: all).
    """
    figure = Figure(figsize=(9, 9.2))
    top, bottom = figure.add_axes((0.02, 0.65, 0.96, 0.3)), figure.add_axes((0.06, 0.05, 0.74, 0.54))
    captions = [caption.replace(" ", "") for caption in captions]
    draw_grid(top, images[:, ::2], [f"path {row + 1}" for row in range(len(images))], captions[::2])
    top.set_title(title, fontsize=12)
    scatter_classes(bottom, scatter, labels, strong)
    bottom.plot(*path.T, color="black", lw=1.5, zorder=4)
    for start, end in zip(path[::2], path[1::2]):
        bottom.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1}, zorder=4)
    bottom.plot(*path[0], "s", color="white", markeredgecolor="black", markersize=9, zorder=5)
    bottom.plot(*path[-1], "*", color="gold", markeredgecolor="black", markersize=17, zorder=5)
    bottom.set(xlabel="first principal component", ylabel="second principal component")
    bottom.set_title("path 1 from noise (square) to image (star) among validation images", fontsize=10)
    bottom.autoscale_view()  # the labels' places depend on the limits
    place_labels(bottom, path, {step: captions[step] for step in range(0, len(path), max(1, len(path) // 5))})
    return figure


def save_unconditional_samples(models: TrainedModels, output: Path) -> None:
    """A hundred samples."""
    path, title = output / "samples" / f"samples_epoch_{models.epoch}.png", f"Samples after epoch {models.epoch}"
    save_grid(path, generate_samples(models, 100).unflatten(0, (-1, 10)), [], [], title)


def save_trajectories(
    models: TrainedModels, trajectories: Trajectories, subjects: dict[str, int | None], space: Tensor, labels: Tensor,
    output: Path,
) -> None:  # fmt: skip
    """Each subject's animation and denoising path.

    Args:
        trajectories: the same number for each subject, in the subjects' order.
        subjects: title and class (None: no single one) of each.
        space, labels: (N, ...) and (N,), the validation images where the states are, and their classes.
    """
    images, rows = models.decode(trajectories.states), trajectories.states.shape[1] // len(subjects)
    noised = models.decode(trajectories.noised[:, ::rows])
    pca = PCA(n_components=2, random_state=0)
    scatter, classes = pca.fit_transform(space.flatten(1).cpu().numpy())[:2000], labels[:2000].cpu().numpy()
    for index, (title, label) in enumerate(subjects.items()):
        first, name = rows * index, f"{file_name(title)}_epoch_{models.epoch}"
        gif = output / "diffusion_animation" / f"diffusion_animation_class_{name}.gif"
        save_animation(noised[:, index], images[:, first], trajectories.captions, title, gif)
        path = pca.transform(trajectories.states[:, first].flatten(1).cpu().numpy())
        shown, heading = images[:, first : first + rows].transpose(0, 1), f"{rows} paths from noise to image"
        heading += f"; path 1 is {title}" if label is None else f": {title}"
        figure = path_figure(shown, path, trajectories.captions, scatter, classes, heading, label)
        save_figure(figure, output / "denoise_with_diffusion_path" / f"denoising_path_{name}.png")


def save_samplers(models: TrainedModels, output: Path) -> None:
    """The same noises through DDIM in few steps and many, and through the ancestral sampler with both variances."""
    noise, rows, grid = models.noise(10), [], []
    for steps in (5, 10, 20, 50, 100):
        rows.append(f"DDIM, eta 0, {steps} steps")
        grid.append(sample(models.denoiser, noise, deterministic(models.config), steps)[-1])
    for variance in ("small", "large"):
        rows.append(f"ancestral, {variance} variance")
        config = dataclasses.replace(models.config, sampler="ancestral", variance=variance)
        grid.append(sample(models.denoiser, noise, config)[-1])
    path = output / "samplers" / f"samplers_epoch_{models.epoch}.png"
    save_grid(path, models.decode(torch.stack(grid)), rows, [], "The same noise through each sampler")


def save_all_figures(models: TrainedModels, data: Data, output: Path) -> None:
    """Every figure that a trained model has."""
    started = time.perf_counter()
    save_loss_curves(models.history, output / "loss_curves.png")
    save_unconditional_samples(models, output)
    subjects = {f"sample {index}": None for index in range(10)}
    trajectories = draw_trajectories(models, 4 * len(subjects), PATH_STEPS)
    pixels, labels = to_float(data.validation_images), data.validation_labels
    save_trajectories(models, trajectories, subjects, pixels, labels, output)
    save_samplers(models, output)
    tqdm.write(f"figures of epoch {models.epoch} written in {time.perf_counter() - started:.0f} s")


# =====================================================================================================================
# main
# =====================================================================================================================


def build_parser() -> CommandLine:
    """A parser with the flags of every script of this repository."""
    raw, switch = argparse.RawDescriptionHelpFormatter, {"action": "store_true"}
    parser = CommandLine(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--fresh", help="start over; the old run moves to OUTPUT_DIR/old_runs (switch)", **switch)
    parser.add_argument("--sample-only", help="no training: all figures, or the samples asked for (switch)", **switch)
    parser.add_argument("--quick", help="the whole pipeline, tiny, into output/quick (switch)", **switch)
    text = "write N samples to OUTPUT_DIR/samples.npz (int, 1 to 1000000; default: none)"
    parser.add_argument("--export-samples", type=bounded(int, 1, 10**6), metavar="N", help=text)
    text = "with --sample-only: a PNG of N samples (int, 1 to 10000; default: 16)"
    parser.add_argument("--num-samples", type=bounded(int, 1, 10_000), metavar="N", help=text)
    parser.add_config(Config)
    return parser


def parse_command_line(parser: CommandLine, argv: list[str] | None) -> tuple[dict, argparse.Namespace]:
    """Returns the fields of `Config` that were given, and what is asked for once."""
    request = parser.parse_args(argv)
    if not request.sample_only and (request.num_samples or getattr(request, "label", None) is not None):
        parser.error("--class and --num-samples go with --sample-only")
    if request.sample_only and request.fresh:
        parser.error("--fresh starts a training, --sample-only has none")
    fields = [field.name for field in dataclasses.fields(Config)]
    return {name: getattr(request, name) for name in fields if hasattr(request, name)}, request


def build_stages(config: Config, images: int, device: torch.device) -> list[Stage]:
    """The only stage at step 0; the initial weights depend on the seed alone."""
    torch.manual_seed(derived_seed(config.seed, "initial weights"))
    denoiser, loss_fn = ConvolutionalDenoiser(config.width, config.blocks).to(device), on_images(noise_prediction_loss)
    recipe = config.batch_size, config.epochs, config.learning_rate, config
    return [Stage("diffusion", denoiser, loss_fn, images, *recipe)]


def run_training(
    config: Config, data: Data, output: Path, checkpoint: dict | None, device: torch.device
) -> TrainedModels:
    """Trains to the last epoch and draws the figures. Returns the averaged model."""
    stages = build_stages(config, len(data.train_images), device)
    run = Run(config, output, stages, checkpoint)
    models = TrainedModels.of_stages(stages, config, run.history)
    [diffusion] = stages
    run.write_metrics()
    announce_plan(run, [[data.train_images]])

    def after_epoch() -> None:
        if diffusion.epoch % config.figures_every == 0 and diffusion.step < diffusion.total_steps:
            save_all_figures(models, data, output)
        else:
            save_unconditional_samples(models, output)

    train(run, diffusion, [data.train_images], [data.validation_images], after_epoch)
    save_all_figures(models, data, output)
    return models


def load_trained(output: Path, device: str = "auto", **changes) -> TrainedModels:
    """The averaged models of a run, in evaluation mode.

    Args:
        output: the run's output folder.
        device: as the flag --device.
        changes: fields of `Config` that differ from the run's, such as guidance_scale or sampling_seed.

    Raises ExperimentError if there are no trained models, or if a change contradicts them.
    """
    checkpoint = find_checkpoint(output / "checkpoints", Config)
    if checkpoint is None or checkpoint["stages"]["diffusion"]["step"] == 0:
        raise ExperimentError(f"there is no trained model in {output}: run without --sample-only to train one")
    config = settle_config(Config, {}, changes, checkpoint)
    stages = build_stages(config, 1, pick_device(device))
    for stage in stages:
        load_state(stage.ema, checkpoint["stages"][stage.name]["ema"])
    models = TrainedModels.of_stages(stages, config, checkpoint["history"])
    print(f"{VERSION}: models of {output}, {models.epoch} epochs, torch {torch.__version__}")
    return models


def save_requested_samples(models: TrainedModels, request: argparse.Namespace, output: Path) -> None:
    """A PNG of the samples that --num-samples asks for."""
    seed = models.config.sampling_seed
    images = generate_samples(models, request.num_samples)
    save_sheet(output / "samples" / "samples.png", images, f"{VERSION}, seed {seed}")


def export_samples(models: TrainedModels, count: int, output: Path) -> None:
    """Writes `count` samples as npz: arr_0 uint8 (N, 28, 28, 1), arr_1 int64 (N,), all -1: there are no classes."""
    started = time.perf_counter()
    path = save_npz(generate_samples(models, count), torch.full((count,), -1), models.config.sampling_seed, output)
    print(f"{path}: {count} samples in {time.perf_counter() - started:.1f} s")


def save_npz(images: Tensor, labels: Tensor, seed: int, output: Path) -> Path:
    """Writes images (N, 1, 28, 28) uint8 and labels (N,) in the layout of guided-diffusion. Returns the path."""
    content = io.BytesIO()
    np.savez_compressed(content, images.permute(0, 2, 3, 1).cpu().numpy(), labels.cpu().numpy())
    path = output / (f"samples_seed_{seed}.npz" if seed else "samples.npz")
    write_atomically(path, content.getvalue())
    return path


def run_sampling(models: TrainedModels, output: Path, request: argparse.Namespace) -> None:
    """Serves --sample-only: a PNG of the samples asked for or, where nothing is, every figure."""
    if request.num_samples or getattr(request, "label", None) is not None:
        save_requested_samples(models, request, output)
    elif not request.export_samples:
        data = load_fashion_mnist(find_data_dir(models.config), models.config.train_images, models.device)
        save_all_figures(models, data, output)


def main(argv: list[str] | None = None) -> None:
    given, request = parse_command_line(build_parser(), argv)
    folder = Path(__file__).resolve().parent / "output"
    output = Path(os.path.abspath(given.get("output_dir") or (folder / "quick" if request.quick else folder)))
    with locked_output(output):
        if request.sample_only:
            models = load_trained(output, **given)
            run_sampling(models, output, request)
        else:
            checkpoint = None if request.fresh else find_checkpoint(output / "checkpoints", Config)
            config = settle_config(Config, QUICK if request.quick else {}, given, checkpoint)
            device = pick_device(config.device)
            state = "resumed" if checkpoint else "fresh"
            print(f"{VERSION} on {device}, torch {torch.__version__}, {state}; output: {output}")
            data = load_fashion_mnist(find_data_dir(config), config.train_images, device)
            if request.fresh:
                move_aside(output, OUTPUTS)
            set_damaged_aside(output / "checkpoints")
            models = run_training(with_recipe(config, device), data, output, checkpoint, device)
        if request.export_samples:
            export_samples(models, request.export_samples, output)


def exit_status(main_function: Callable[[], None]) -> int:
    """Calls `main_function`; what a user can mend, or has asked for, becomes one line and an exit status."""
    matplotlib.rcdefaults()
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main_function()
        return 0
    except ExperimentError as error:
        status, line = error.status, f"{'' if error.status > 128 else 'error: '}{error}"
    except KeyboardInterrupt:
        status, line = 130, "SIGINT: run again to resume"
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except torch.OutOfMemoryError:
        status, line = 1, "error: the device is out of memory: smaller batches or widths need less"
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        status, line = 1, f"error: {error.strerror or error}{where}; any earlier checkpoint stands"
    print(" ".join(line.splitlines()), file=sys.stderr)  # even the name of a file may have several
    return status


if __name__ == "__main__":
    sys.exit(exit_status(main))
