"""Latent rectified flow on Fashion-MNIST: autoencoder with channel attention, conditional UNet.

Stage 1 trains an autoencoder that turns a 28x28 image into a small latent. Stage 2 trains a
class-conditional UNet to carry Gaussian noise to such latents along straight lines, and a guide,
the same UNet trained for less, to show what to avoid. Stage 3 trains the decoder on, now on samples
too, against a discriminator, which gives the images their texture. Sampling integrates the guided
velocity with Euler's or Heun's method, and decodes. An optional student learns to take few steps.

    python script_model_train_test.py            train (or resume), then write figures to output/
    python script_model_train_test.py --quick    the whole pipeline, tiny, into output/quick/
    python script_model_train_test.py --sample-only --class Sandal --num-samples 16
    python script_model_train_test.py --sample-only --class Sandal --pretrained
    python script_model_train_test.py --sample-only --export-samples 10000
    python script_model_train_test.py --student-epochs 1      train the student too, to sample with:
    python script_model_train_test.py --sample-only --student-steps 2

Papers: rectified flow (Liu et al. 2022, arXiv 2209.03003) with logit-normal times (Esser et al.
2024, 2403.03206); latent diffusion (Rombach et al. 2022, 2112.10752) with a patch discriminator
(Isola et al. 2017, 1611.07004); guidance (Ho & Salimans 2022, 2207.12598; Karras et al. 2024,
2406.02507) in an interval (Kynkäänniemi et al. 2024, 2404.07724).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch import Tensor, nn

VERSION = "LatentDiffusionModel/v3"
CONDITIONAL = True
TEACHER = {"sampler": "heun", "sampling_steps": 8, "student_steps": 0}  # whom the student copies
STUDENT_STEPS = 1, 2, 4  # those that it learns to make do with


def option(cpu, help, low=None, high=None, *, gpu=None, quick=None, multiple=None, choices=(),
           resume="match"):  # fmt: skip
    """A setting: its value on a CPU, on a GPU and with --quick (None: as on a CPU), its limits, and
    what a resumed run does: `match` the checkpoint, `keep` its value by default, or ask anew
    (`local`; or `sample`, which goes with --sample-only)."""
    return dataclasses.field(default=cpu, metadata=dict(locals()))


@dataclasses.dataclass
class Config:
    """The settings of this experiment; the harness adds those that all versions have."""

    # stage 1: the autoencoder
    autoencoder_epochs: int = option(1, "epochs", 1, 10_000, gpu=6, quick=1, resume="keep")
    autoencoder_batch_size: int = option(32, "images a step, stages 1 and 3", 1, 4096, gpu=256)
    autoencoder_learning_rate: float = option(2e-3, "peak of AdamW, stages 1 and 3", 1e-8, 1.0)
    autoencoder_muon_learning_rate: float = option(0.01, "peak of Muon; 0: AdamW alone", 0.0, 1.0)
    autoencoder_width: int = option(32, "channels at 14x14", 8, 512, multiple=8, quick=8)
    latent_channels: int = option(8, "channels of the 7x7 latent", 1, 64)
    latent_noise: float = option(0.2, "noise on the latents, whose own std is 1", 0.0, 1.0)
    # stage 2: the diffusion
    guide_epochs: int = option(1, "epochs of the guide", 1, 10_000, gpu=7, quick=1, resume="keep")
    epochs: int = option(6, "epochs of stage 2", 1, 100_000, gpu=80, quick=2, resume="keep")
    batch_size: int = option(64, "latents a step", 1, 4096, gpu=512)
    learning_rate: float = option(2e-3, "peak learning rate", 1e-8, 1.0)
    width: int = option(64, "channels at 7x7; twice that at 4x4", 8, 512, multiple=8, quick=16)
    class_dropout: float = option(0.1, "share of labels replaced by the null class", 0.0, 1.0)
    # stage 3: the decoder, against the discriminator
    decoder_epochs: int = option(2, "epochs", 1, 10_000, gpu=6, quick=1, resume="keep")
    discriminator_width: int = option(64, "channels", 8, 512, multiple=8, quick=8)
    adversarial_weight: float = option(0.05, "weight of realism beside error", 0.0, 100.0)
    # stage 4, an extra: the student
    student_epochs: int = option(0, "epochs of the student; 0: none", 0, 10_000, resume="keep")
    student_batch_size: int = option(64, "latents a step, stage 4", 1, 4096)
    # samples
    sampler: str = option("heun", "method", choices=("euler", "heun"), resume="keep")
    sampling_steps: int = option(6, "steps", 1, 1000, resume="keep")
    guidance_scale: float = option(2.75, "flow's w of u + w (c - u)", 0.0, 20.0, resume="keep")
    guidance_low: int = option(200, "t where guidance ends", 0, 1000, resume="keep")
    guidance_high: int = option(750, "t where guidance begins", 0, 1000, resume="keep")
    student_steps: int = option(0, "with --sample-only: the student's steps; 0: the flow draws",
                                choices=(0, *STUDENT_STEPS), resume="sample")  # fmt: skip


# ==================================================================================================
# The process: rectified flow. t is 0 at the data and 1 at the noise (Liu et al. count from noise).
# Names that are not defined here, such as Rng, Models or Fresh, are the harness's, below.
# ==================================================================================================


def interpolate(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """The forward process: x_t = (1 - t) x_0 + t noise (Liu et al. 2022, Eq. 1), t (B, 1, 1, 1)."""
    return (1 - t) * x0 + t * noise


def rectified_flow_loss(
    denoiser: nn.Module, x0: Tensor, labels: Tensor, rng: Rng, *, class_dropout: float
) -> Tensor:
    """Mean squared error of the velocity noise - x_0 (Liu et al. 2022, Eq. 1) for x0 (B, C, H, W),
    at logit-normal times: t = sigmoid(u), u ~ N(0, 1) (Esser et al. 2024, Eq. 19, m=0, s=1)."""
    t = torch.sigmoid(rng.randn(len(x0)))  # (B,)
    noise = rng.randn(*x0.shape)
    dropped = rng.rand(len(x0)) < class_dropout
    classes = class_weights(torch.where(dropped, NULL_CLASS, labels))  # (B, 11)
    velocity = denoiser(interpolate(x0, noise, t.view(-1, 1, 1, 1)), t, classes)
    return F.mse_loss(velocity, noise - x0)


def guided(
    denoiser: nn.Module, guide: nn.Module, classes: Tensor, guidance_scale: float, low: float,
    high: float,
) -> Callable[[Tensor, float], Tensor]:  # fmt: skip
    """Returns f(x, t) = u + w (c - u): c is the denoiser's output for class weights `classes`
    (B, 11), u the guide's for none. That is classifier-free guidance (Ho & Salimans 2022, Eq. 6,
    whose w is one less). The guide is the same network trained for less, so that its faults are
    avoided too (after Karras et al. 2024, 2406.02507). For t outside low ... high, where guidance
    costs most variety and is of least use, w is 1 at most (Kynkäänniemi et al. 2024)."""
    null = class_weights(torch.full((len(classes),), NULL_CLASS, device=classes.device))

    def guided_output(x: Tensor, t: float) -> Tensor:
        w = guidance_scale if low <= t <= high else min(guidance_scale, 1.0)
        times = torch.full((len(x),), t, device=x.device)
        if w == 1:
            return denoiser(x, times, classes)
        unconditional = guide(x, times, null)
        return unconditional if w == 0 else unconditional.lerp(denoiser(x, times, classes), w)

    return guided_output


def integrate(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int, sampler: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Solves dx/dt = v(x, t) from noise (B, C, H, W) at t=1 to data at t=0 in `steps` equal steps.

    "euler" is of first order; "heun" (the explicit trapezoidal rule) of second, two evaluations per
    step. Yields the steps + 1 states x, and with each the model's guess E[x_0 | x_t] = x - t v,
    since x_t = x_0 + t (noise - x_0).
    """
    x = noise
    for step in range(steps):
        t, t_next = 1 - step / steps, 1 - (step + 1) / steps
        v = velocity(x, t)
        yield x, x - t * v
        if sampler == "heun":
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    yield x, x


def trained(models: Models, stage: str) -> bool:
    """Whether that stage, one after the flow's, has been trained for an epoch."""
    return stage in models.networks and any(row["stage"] == stage for row in models.history)


def sample(
    models: Models, noise: Tensor, classes: Tensor, steps: int = 0, fresh: Fresh | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """States and guesses, noise (B, C, 7, 7) to latents, for class weights `classes` (B, 11); by
    the student, if the settings say so and no `steps` are given."""
    config = models.config
    interval = config.guidance_low / 1000, config.guidance_high / 1000
    if config.student_steps and not steps:
        if not trained(models, "student"):
            raise ExperimentError("--student-steps needs a student: --student-epochs 1 trains it")
        velocity = guided(models.student["flow"], models.guide, classes, 1.0, *interval)
        return integrate(velocity, noise, config.student_steps, "euler")
    velocity = guided(models.diffusion, models.guide, classes, config.guidance_scale, *interval)
    return integrate(velocity, noise, steps or config.sampling_steps, config.sampler)


# --- The networks ---------------------------------------------------------------------------------


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018, 1709.01507, Eq. 2-4, SiLU): a gate per channel."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean(dim=(2, 3))))))  # (B, C)
        return x * gate[:, :, None, None]


class ChannelAttentionBlock(nn.Module):
    """Residual block: two convolutions, then channel attention. Starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.attention = ChannelAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return x + self.attention(h)


def zero_init(layer: nn.Module) -> nn.Module:
    """The same layer with its weight and bias at zero: a residual branch that starts as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Autoencoder(nn.Module):
    """28x28 images to latents of `latent_channels` x 7 x 7 and back.

    `encode` speaks of standardised latents: each channel has mean 0 and variance 1 over the
    training set once `set_statistics` has been called.
    """

    def __init__(self, latent_channels: int, width: int):
        super().__init__()
        self.encoder = nn.Sequential(  # (B, 1, 28, 28)
            nn.PixelUnshuffle(2),  # (B, 4, 14, 14)
            nn.Conv2d(4, width, 3, padding=1),
            ChannelAttentionBlock(width),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),  # (B, 2W, 7, 7)
            ChannelAttentionBlock(2 * width),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, latent_channels, 3, padding=1),  # (B, C, 7, 7)
        )
        self.decoder = nn.Sequential(  # (B, C, 7, 7)
            nn.Conv2d(latent_channels, 2 * width, 3, padding=1),
            ChannelAttentionBlock(2 * width),
            ChannelAttentionBlock(2 * width),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.PixelShuffle(2),  # (B, W, 14, 14)
            ChannelAttentionBlock(width),
            ChannelAttentionBlock(width),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, 4, 3, padding=1),
            nn.PixelShuffle(2),  # (B, 1, 28, 28)
        )
        self.register_buffer("latent_mean", torch.zeros(1, latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(1, latent_channels, 1, 1))

    def raw_encode(self, images: Tensor) -> Tensor:
        """Images (B, 1, 28, 28) in [-1, 1] to latents (B, C, 7, 7), each of mean 0, variance 1."""
        latents = self.encoder(images).float()
        return F.layer_norm(latents, latents.shape[1:])

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 1, 28, 28) in [-1, 1] to standardised latents (B, C, 7, 7)."""
        return (self.raw_encode(images) - self.latent_mean) / self.latent_std

    def destandardise(self, latents: Tensor) -> Tensor:
        """Standardised latents (B, C, 7, 7) to raw ones."""
        return latents * self.latent_std + self.latent_mean

    def set_statistics(self, latents: Tensor) -> None:
        """Takes mean and standard deviation of each channel from raw latents (N, C, 7, 7)."""
        self.latent_mean.copy_(latents.mean(dim=(0, 2, 3), keepdim=True))
        self.latent_std.copy_(latents.std(dim=(0, 2, 3), keepdim=True))


def reconstruction_loss(
    autoencoder: Autoencoder, images: Tensor, rng: Rng, *, latent_noise: float
) -> Tensor:
    """Mean absolute error of images (B, 1, 28, 28) in [-1, 1] decoded from noisy latents."""
    z = autoencoder.raw_encode(images)
    return (images - autoencoder.decoder(z + latent_noise * rng.randn(*z.shape))).abs().mean()


def patch_discriminator(width: int) -> nn.Sequential:
    """Images (B, 1, 28, 28) to logits of being real (B, 1, 7, 7), each of a place and its
    surroundings (Isola et al. 2017, arXiv 1611.07004, Sec. 3.2.2)."""
    return nn.Sequential(
        nn.PixelUnshuffle(2),  # (B, 4, 14, 14)
        nn.Conv2d(4, width, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, width, 4, stride=2, padding=1),  # (B, W, 7, 7)
        nn.GroupNorm(8, width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.GroupNorm(8, 2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 3, padding=1),
    )


def adversarial_loss(
    discriminator: nn.Module, made: Tensor, real: Tensor, *, weight: float
) -> dict[str, Tensor]:
    """For images (B, 1, 28, 28) in [-1, 1]. Whatever `made` them learns from `weight` times the
    discriminator's opinion of them; the discriminator from its own hinge loss alone (Lim & Ye 2017,
    arXiv 1705.02894)."""
    frozen = {name: weights.detach() for name, weights in discriminator.named_parameters()}
    realism = torch.func.functional_call(discriminator, frozen, (made,)).float()
    logits = discriminator(torch.cat([real, made.detach()])).float()
    true, fake = logits.split([len(real), len(made)])
    return {
        "unrealism": -weight * realism.mean(),
        "hinge loss of the discriminator": F.relu(1 - true).mean() + F.relu(1 + fake).mean(),
    }


class SelfAttention(nn.Module):
    """Multi-head self-attention over the positions of a feature map. Starts as the identity."""

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, c // self.heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, HW, C / heads)
        with torch.autocast("cpu", enabled=False):  # CPUs attend faster in float32
            mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        mixed = self.out(mixed.transpose(1, 2).reshape(b, h * w, c))
        return x + mixed.transpose(1, 2).reshape(b, c, h, w)


class ConditionedBlock(nn.Module):
    """Residual block with scale-shift conditioning (Dhariwal & Nichol 2021, AdaGN). Its branch
    starts as nothing."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(8, out_channels, affine=False)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of t (B,), of the size of 0..1000, at `dim` / 2 frequencies from 1 to
    nearly 1/10000."""
    steps = torch.arange(dim // 2, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * steps / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class LatentUNet(nn.Module):
    """Velocity of 7x7 latents given time and class: a UNet of two levels, 7x7 and 4x4, with
    self-attention at 4x4."""

    def __init__(self, latent_channels: int, width: int):
        super().__init__()
        embedding_dim = 4 * width
        self.time_dim = 2 * width
        first, second = nn.Linear(2 * width, embedding_dim), nn.Linear(embedding_dim, embedding_dim)
        self.time = nn.Sequential(first, nn.SiLU(), second)
        self.classes = nn.Linear(NULL_CLASS + 1, embedding_dim, bias=False)
        self.stem = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.down_block = ConditionedBlock(width, width, embedding_dim)
        self.downsample = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle_block1 = ConditionedBlock(2 * width, 2 * width, embedding_dim)
        self.attention = SelfAttention(2 * width)
        self.middle_block2 = ConditionedBlock(2 * width, 2 * width, embedding_dim)
        self.middle_block3 = ConditionedBlock(4 * width, 2 * width, embedding_dim)
        self.upsample = nn.Conv2d(2 * width, width, 3, padding=1)
        self.up_block = ConditionedBlock(2 * width, width, embedding_dim)
        last = zero_init(nn.Conv2d(width, latent_channels, 3, padding=1))
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), last)

    def forward(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """Noisy latents (B, C, 7, 7), t (B,) in 0..1 and class weights (B, 11) to (B, C, 7, 7)."""
        time = self.time(timestep_embedding(1000 * t, self.time_dim))
        embedding = F.silu(time + self.classes(classes))
        skip7 = self.down_block(self.stem(x), embedding)  # (B, W, 7, 7)
        h = self.middle_block1(self.downsample(skip7), embedding)  # (B, 2W, 4, 4)
        skip4 = self.attention(h)
        h = self.middle_block2(skip4, embedding)
        h = self.middle_block3(torch.cat([h, skip4], dim=1), embedding)
        h = self.upsample(F.interpolate(h, size=x.shape[2:], mode="nearest"))  # (B, W, 7, 7)
        h = self.up_block(torch.cat([h, skip7], dim=1), embedding)
        return self.head(h).float()


# --- The stages -----------------------------------------------------------------------------------


def state_shape(config: Config) -> tuple[int, int, int]:
    """The shape of a latent."""
    return config.latent_channels, 7, 7


def build_networks(config: Config) -> dict[str, nn.Module]:
    """What each stage trains: the guide is the denoiser, trained for less."""
    autoencoder = Autoencoder(config.latent_channels, config.autoencoder_width)
    discriminator = patch_discriminator(config.discriminator_width)
    players = copy.deepcopy({"decoder": autoencoder.decoder, "discriminator": discriminator})
    denoiser = partial(LatentUNet, config.latent_channels, config.width)
    stages = {"autoencoder": autoencoder, "decoder": nn.ModuleDict(players)}
    stages |= {"guide": denoiser(), "diffusion": denoiser()}
    if config.student_epochs:
        stages["student"] = nn.ModuleDict({"flow": denoiser(), "discriminator": discriminator})
    return stages


def train_stages(run: Run, models: Models, data: Data) -> None:
    """Trains the autoencoder; then, on its averaged weights, the guide and the flow; the decoder,
    on what the flow makes; and a student, if asked to."""
    config, autoencoder = run.config, models.autoencoder
    loss = partial(reconstruction_loss, latent_noise=config.latent_noise)
    images, held_out = (data.train_images,), (data.validation_images,)
    run.train("autoencoder", loss, images, held_out, **plan(config, "autoencoder"))
    if not run.begun("guide"):  # the flow's noise has variance 1, so must its data
        autoencoder.set_statistics(once(autoencoder.raw_encode, data.train_images))
    pairs = once(autoencoder.encode, data.train_images), data.train_labels
    held_out = once(autoencoder.encode, data.validation_images), data.validation_labels
    loss = partial(rectified_flow_loss, class_dropout=config.class_dropout)
    run.train("guide", loss, pairs, held_out, **plan(config) | plan(config, "guide"))
    run.train("diffusion", loss, pairs, held_out, **plan(config))
    if not run.begun("decoder"):
        run.networks["decoder"]["decoder"].load_state_dict(autoencoder.decoder.state_dict())
    pool = cache(partial(samples_of_flow, models, min(20_000, len(data.train_images))))
    loss = partial(decoder_loss, pool=torch.compiler.disable(pool), models=models)
    held_out = held_out[0], data.validation_images
    how = plan(config, "autoencoder") | plan(config, "decoder") | {"muon_learning_rate": 0.0}
    how["after_epoch"] = partial(save_reconstructions, models, data, run.output)
    run.train("decoder", loss, (pairs[0], data.train_images), held_out, **how)
    if config.student_epochs:
        train_student(run, models, data)


def samples_of_flow(models: Models, count: int) -> Tensor:
    """Standardised latents (count, C, 7, 7) from noise that no figure and no export starts from."""
    print(f"drawing {count:,} samples for the decoder to learn from")
    rng = Rng(derived_seed(models.config.seed, "pool"), models.device)
    return once(
        lambda x: last_state(models, x, class_weights(labels_in_turn(len(x), x.device))),
        rng.randn(count, *state_shape(models.config)),
    )


def decoder_loss(
    networks: nn.ModuleDict, latents: Tensor, images: Tensor, rng: Rng, *, models: Models,
    pool: Callable[[], Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """The decoder learns to tell the images (B, 1, 28, 28) from their latents (B, C, 7, 7), with
    noise on them; and to make these, and as many of a pool of samples (M, C, 7, 7), look real."""
    config, raw = models.config, models.autoencoder.destandardise
    noisy = raw(latents) + config.latent_noise * rng.randn(*latents.shape)
    sampled = pool()[rng.randint(0, len(pool()), len(latents))]
    made = networks["decoder"](torch.cat([noisy, raw(sampled)])).float()
    parts = {"absolute error": (images - made[: len(images)]).abs().mean()}
    judge, weight = networks["discriminator"], config.adversarial_weight
    return parts | adversarial_loss(judge, made, images, weight=weight)


def train_student(run: Run, models: Models, data: Data) -> None:
    """Trains a copy of the flow to make do with few steps; an epoch is 20,000 images and labels."""
    player, config = run.networks["student"], run.config
    player["flow"].load_state_dict(models.diffusion.state_dict())
    player["discriminator"].load_state_dict(models.decoder["discriminator"].state_dict())
    models.decoder.requires_grad_(False)
    teacher = models.with_settings(**TEACHER)
    teacher.history = [*models.history]  # which does not grow: compiled code would notice
    loss = partial(distillation_loss, teacher=teacher)
    arrays = data.train_labels[:20_000], data.train_images[:20_000]
    held_out = data.validation_labels[:1000], data.validation_images[:1000]
    how = plan(config, "student") | {"learning_rate": 1e-3, "muon_learning_rate": 0.005}
    how["after_epoch"] = lambda epoch: save_few_steps(models, run.output)
    run.train("student", loss, arrays, held_out, **how)


def distillation_loss(
    networks: nn.ModuleDict, labels: Tensor, images: Tensor, rng: Rng, *, teacher: Models
) -> dict[str, Tensor]:
    """The student goes from one noise in 1, in 2 and in 4 steps of Euler's method. Each guess on
    the way should be what the teacher makes of that noise and the classes `labels` (B,): half the
    mean squared error, as in reflow (Liu et al. 2022, Sec. 2.2), but at the states that the student
    itself reaches. Its last guesses, decoded, should also match the teacher's images and convince a
    discriminator that knows real `images` (B, 1, 28, 28) (Sauer et al. 2023, arXiv 2311.17042)."""
    config, noise = teacher.config, rng.randn(len(labels), *state_shape(teacher.config))
    dropped = rng.rand(len(labels)) < config.class_dropout
    classes = class_weights(torch.where(dropped, NULL_CLASS, labels))
    ask = torch.compiler.disable(last_state)  # its many steps would take minutes to compile
    goal = ask(teacher, noise, classes).clone()  # no inference tensor, for autograd
    velocity = guided(networks["flow"], networks["flow"], classes, 1.0, 0.0, 1.0)
    ways = [[*integrate(velocity, noise, steps, "euler")][:-1] for steps in STUDENT_STEPS]
    errors = [torch.stack([F.mse_loss(guess, goal) for _, guess in way]).mean() for way in ways]
    made = decode(teacher, torch.cat([way[-1][1] for way in ways]))
    wanted = decode(teacher, goal).repeat(len(ways), 1, 1, 1)
    weight, judge = config.adversarial_weight, networks["discriminator"]
    parts = {"error of the guesses": torch.stack(errors).mean() / 2}
    parts["absolute error"] = (wanted - made).abs().mean()
    return parts | adversarial_loss(judge, made, images, weight=weight)


def embed(models: Models, images: Tensor) -> Tensor:
    """Images (B, 1, 28, 28) in [-1, 1] to standardised latents (B, C, 7, 7)."""
    return models.autoencoder.encode(images)


def decode(models: Models, states: Tensor) -> Tensor:
    """Standardised latents (B, C, 7, 7) to images (B, 1, 28, 28), about [-1, 1]; until the decoder
    has been trained on, by the autoencoder's own."""
    last = trained(models, "decoder")
    decoder = models.decoder["decoder"] if last else models.autoencoder.decoder
    return decoder(models.autoencoder.destandardise(states)).float()


# --- Its figures ----------------------------------------------------------------------------------


def draw_trajectories(models: Models, noise: Tensor, classes: Tensor, steps: int) -> Trajectories:
    """Trajectories of latents in `steps` steps, one for each noise, and the way out beside them."""
    states, guesses = trajectory(models, noise, classes, steps)
    times = [1 - step / steps for step in range(steps + 1)]
    noised = torch.stack([interpolate(states[-1], noise, t) for t in times])
    return Trajectories(states, guesses, noised, [f"t = {1000 * t:.0f}" for t in times])


def save_own_figures(models: Models, data: Data, output: Path) -> None:
    """Reconstructions, latent space, interpolations, guidance, few steps, nearest neighbours."""
    save_reconstructions(models, data, output)
    save_latent_space(models, data, output)
    save_noise_interpolation(models, output)
    save_class_interpolation(models, output)
    save_guidance(models.with_settings(student_steps=0), output)  # a student's guidance is fixed
    if trained(models, "student"):
        save_few_steps(models, output)
    save_nearest_neighbours(models, data, output)


def save_reconstructions(models: Models, data: Data, output: Path, epoch: int = 0) -> None:
    """Two validation images of each class, what the autoencoder makes of them, and the error."""
    labels = data.validation_labels
    chosen = [torch.nonzero(labels == label)[:2, 0] for label in range(len(CLASS_NAMES))]
    real = data.validation_images[torch.stack(chosen, dim=1).flatten()]
    made = decode_images(models, embed_images(models, real))
    error = (real.int() - made.int()).abs()
    shown = real, made, (2 * error).clamp(max=255).to(torch.uint8)
    grid = torch.stack([part.unflatten(0, (2, -1)) for part in shown], dim=1).flatten(0, 1)
    title = f"Reconstructions: mean absolute error {error.float().mean() / 255:.3f} of 1"
    names = [name.replace(" ", "\n").replace("/", "/\n") for name in CLASS_NAMES]
    rows = ["image", "reconstruction", "error x 2"] * 2
    file = f"reconstruction_epoch_{epoch}.png" if epoch else "reconstruction.png"
    save_grid(output / "reconstruction" / file, grid, rows, names, title)


def save_latent_space(models: Models, data: Data, output: Path) -> None:
    """t-SNE of the latents of 1,000 validation images, from their first 30 principal components."""
    points = embed_images(models, data.validation_images[:1000]).flatten(1).cpu().numpy()
    points = PCA(n_components=min(30, *points.shape), random_state=0).fit_transform(points)
    perplexity = min(30, len(points) // 4)
    plane = TSNE(perplexity=perplexity, max_iter=500, random_state=0).fit_transform(points)
    figure = Figure(figsize=(7, 5.5))
    axes = figure.add_axes((0, 0, 0.8, 1))
    scatter_classes(axes, plane, data.validation_labels[:1000].cpu().numpy())
    title = f"t-SNE of the latents of {len(points)} validation images"
    axes.set(title=title, xticks=[], yticks=[])
    save_figure(figure, output / "latent_space" / f"latent_space_epoch_{models.epoch}.png")


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Spherical interpolation from a to b, both (C, H, W), at weight (K,) in 0..1: (K, C, H, W)
    (Shoemake 1985)."""
    angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    weight = weight.view(-1, 1, 1, 1)
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)


def save_noise_interpolation(models: Models, output: Path) -> None:
    """From the noise of ten samples to that of the next ten, which are of the same classes."""
    weight = torch.linspace(0, 1, 9, device=models.device)
    noise = noise_of_samples(models, range(20))()
    arcs = torch.cat([slerp(a, b, weight) for a, b in zip(noise[:10], noise[10:])])
    classes = class_weights(labels_in_turn(10, models.device)).repeat_interleave(9, dim=0)
    images = decode_images(models, last_state(models, arcs, classes)).unflatten(0, (-1, 9))
    rows, columns = list(CLASS_NAMES) if CONDITIONAL else [], [f"{w:g}" for w in weight.tolist()]
    path = output / "interpolation" / f"noises_epoch_{models.epoch}.png"
    save_grid(path, images, rows, columns, "From one noise to another (spherical)")


def save_class_interpolation(models: Models, output: Path) -> None:
    """From one class to another for the same noise."""
    weight = torch.linspace(0, 1, 9, device=models.device)
    pairs = [(0, 3), (3, 1), (2, 4), (4, 6), (6, 0), (5, 7), (7, 9), (9, 8)]
    eye = class_weights(labels_in_turn(10, models.device))
    classes = torch.cat([torch.lerp(eye[a], eye[b], weight[:, None]) for a, b in pairs])
    noise = noise_of_samples(models, range(len(pairs)))().repeat_interleave(9, dim=0)
    images = decode_images(models, last_state(models, noise, classes)).unflatten(0, (-1, 9))
    rows = [f"{CLASS_NAMES[a]} to {CLASS_NAMES[b]}" for a, b in pairs]
    path = output / "interpolation" / f"classes_epoch_{models.epoch}.png"
    columns = [f"{w:g}" for w in weight.tolist()]
    save_grid(path, images, rows, columns, "From one class to another (same noise)")


def save_guidance(models: Models, output: Path) -> None:
    """The same noise of each class at rising guidance."""
    labels, config = labels_in_turn(10, models.device), models.config
    scales = sorted({0, 1, 5, 8, config.guidance_scale})
    columns = [generate_samples(models.with_settings(guidance_scale=w), labels) for w in scales]
    path, names = output / "guidance" / f"guidance_epoch_{models.epoch}.png", list(CLASS_NAMES)
    title = f"Rising w, above 1 only from {config.guidance_high:g} to {config.guidance_low:g}"
    save_grid(path, torch.stack(columns, dim=1), names, [f"w={w:g}" for w in scales], title)


def save_few_steps(models: Models, output: Path) -> None:
    """The same noise of each class by the teacher, and by the student in 1, 2 and 4 steps."""
    labels, who = labels_in_turn(10, models.device), {"the flow": TEACHER}
    who |= {f"{n} step{'s' * (n > 1)}": {"student_steps": n} for n in STUDENT_STEPS}
    columns = [generate_samples(models.with_settings(**each), labels) for each in who.values()]
    path = output / "few_steps" / f"few_steps_epoch_{models.epoch}.png"
    title = "The flow, and its student in few steps"
    save_grid(path, torch.stack(columns, dim=1), list(CLASS_NAMES), [*who], title)


def save_nearest_neighbours(models: Models, data: Data, output: Path) -> None:
    """A sample of each class beside the training images nearest to it in pixels: is it copying?"""
    samples = generate_samples(models, labels_in_turn(10, models.device))
    # TF32 would round away who is nearest
    distance = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    points, parts = samples.flatten(1).float(), data.train_images.split(5000)
    distances = torch.cat([distance(points, part.flatten(1).float()) for part in parts], dim=1)
    nearest = data.train_images[distances.topk(5, largest=False).indices]  # (10, 5, 1, 28, 28)
    columns = ["sample", *(f"nearest {rank}" if rank == 1 else str(rank) for rank in range(1, 6))]
    title = "Samples and the training images nearest to them"
    path = output / "nearest_neighbours" / f"nearest_neighbours_epoch_{models.epoch}.png"
    shown = torch.cat([samples[:, None], nearest], dim=1)
    save_grid(path, shown, list(CLASS_NAMES), columns, title)


# ============ THE HARNESS: from this line to the end, the six scripts are the same ================
#
# A library that each script carries along. It takes these from the experiment above:
#
#   VERSION, CONDITIONAL   "family/version", and whether its samples have classes
#   option(...), Config    a setting; and the experiment's own, `epochs` among them
#   state_shape(config)    the shape of one state of the process: of an image or of a latent
#   build_networks(config) {stage: network}; "diffusion" is the one that samples come from
#   train_stages(run, models, data)                  calls `run.train(stage, ...)` for each stage
#   sample(models, noise, classes, steps, fresh)     yields (state, guess of x_0), noise to data;
#                          steps=0 is as many as set; without `fresh` noise it is deterministic
#   draw_trajectories(models, noise, classes, steps) `Trajectories`, as the figures show them
#   embed(models, images)  images in [-1, 1] to the space of the states
#   decode(models, states) back to images
#   save_own_figures(models, data, output)           the figures that only this experiment has
#
# It offers most of all `Run.train`, `plan`, `Rng`, `Models`, `Data`, `Trajectories`; in chunks
# `once`, `embed_images`, `decode_images`; for samples `labels_in_turn`, `class_weights`,
# `noise_of_samples`, `last_state`, `trajectory`, `generate_samples`; for figures `save_grid`,
# `save_figure`, `scatter_classes`. In shapes, B is a batch, N all there are, S steps, C channels;
# `classes` are class weights (B, 11).
# ==================================================================================================

import argparse
import atexit
import base64
import collections
import contextlib
import dataclasses
import errno
import gzip
import hashlib
import html
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import string
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

backend = os.environ.pop("MPLBACKEND", None)  # a notebook's, which may be unknown here
import matplotlib

if backend is not None:
    os.environ["MPLBACKEND"] = backend
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import center_crop
from torchvision.utils import make_grid
from tqdm import tqdm

# --- Settings and command line --------------------------------------------------------------------

CLASS_NAMES = tuple(FashionMNIST.classes)
TITLES = (*CLASS_NAMES, "no class")  # by label
NULL_CLASS = len(CLASS_NAMES)

once_only = partial(option, resume="local")  # is of one run of the script, and in no checkpoint
to_sample = partial(option, resume="sample")  # the same, and goes with --sample-only


@dataclasses.dataclass
class Settings(Config):
    """Every setting of a run, each of them also a flag: the experiment's, and these."""

    compile: bool = once_only(False, "torch.compile the networks in training")
    seed: int = option(0, "seed of training", 0, 2**31 - 1)
    ema_decay: float = option(0.998, "decay of the averages a step", 0.0, 0.999999, gpu=0.9995)
    train_images: int = option(55_000, "training images, from the first on", 10, 55_000, quick=1280)
    checkpoint_minutes: float = option(3.0, "minutes between saves", 0.0, 1e4, resume="keep")
    figures_every: int = option(50, "epochs between full figures", 1, 100_000, resume="keep")
    output_dir: str = once_only("", "folder for all that a run writes (empty: output/ here)")
    data_dir: str = once_only("", "torchvision's root (empty: data/ of the repository, or here)")
    device: str = once_only("auto", "cpu, cuda, cuda:N, mps; auto: the best")
    fresh: bool = once_only(False, "start over; the old run moves to OUTPUT_DIR/old_runs")
    quick: bool = once_only(False, "the whole pipeline, tiny, into output/quick")
    sample_only: bool = once_only(False, "no training: all figures, or the samples asked for")
    run_dir: str = to_sample("", "with --sample-only: the run's output folder, if another")
    pretrained: bool = to_sample(False, "with --sample-only: the weights that come along")
    class_: str = to_sample("all", "with --sample-only: a PNG of it", choices=("all", *TITLES))
    num_samples: int = to_sample(16, "with --sample-only: a PNG of this many samples", 1, 10_000)
    export_samples: int = once_only(0, "write this many samples to samples.npz", 0, 10**6)
    sampling_seed: int = once_only(0, "seed of the samples' noise", 0, 2**31 - 1)

    def __post_init__(self):
        """Raises ExperimentError if a value is out of its limits."""
        for field in dataclasses.fields(self):
            rules, value = field.metadata, getattr(self, field.name)
            wrong = rules["low"] is not None and not rules["low"] <= value <= rules["high"]
            wrong = wrong or (rules["multiple"] and value % rules["multiple"] > 0)
            if wrong or (rules["choices"] and value not in rules["choices"]):
                raise ExperimentError(f"{flag(field.name)}: {value!r} is not {limits(rules)}")


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.strip('_').replace('_', '-')}"


def limits(rules: Mapping) -> str:
    """Those of a setting in words, from the metadata that `option` gave it."""
    if rules["choices"]:
        return f"one of {', '.join(map(str, rules['choices']))}"
    words = "" if rules["low"] is None else f"{rules['low']:,.10g} to {rules['high']:,.10g}"
    return words + (f", a multiple of {rules['multiple']}" if rules["multiple"] else "")


class ExperimentError(Exception):
    """What ends a run with one line and an exit status: 2 for bad input, 128 + n for signal n."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def parse_command_line(argv: list[str] | None) -> dict:
    """Returns the settings that are given. Raises ExperimentError if they cannot be."""

    def refuse(message: str):
        raise ExperimentError(f"{message} (--help describes every flag)")

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.error = refuse
    for field in dataclasses.fields(Settings):
        rules, kind = field.metadata, type(field.default)
        text = "; ".join(filter(None, [limits(rules), f"default: {field.default!r}"]))
        text += "" if rules["gpu"] is None else f", on a GPU {rules['gpu']!r}"
        text += "" if rules["quick"] is None else f", with --quick {rules['quick']!r}"
        how = {"help": f"{rules['help']} ({text})".replace("%", "%%"), "default": argparse.SUPPRESS}
        how |= {"action": "store_true"} if kind is bool else {"type": kind, "metavar": "VALUE"}
        parser.add_argument(flag(field.name), dest=field.name, **how)
    given = vars(parser.parse_args(argv))
    Settings(**given)  # checks each
    for name in sorted(settings_with("sample") & given.keys()):
        if "sample_only" not in given:
            refuse(f"{flag(name)} goes with --sample-only")
    for pair in (("fresh", "sample_only"), ("pretrained", "quick"), ("pretrained", "run_dir")):
        if given.keys() >= {*pair}:
            refuse(f"{' and '.join(map(flag, pair))} do not go together")
    if "run_dir" in given and "output_dir" not in given:
        refuse("--run-dir goes with an --output-dir for the figures")
    if given.get("class_", "all") != "all" and not CONDITIONAL:
        refuse(f"--class: {VERSION} has no classes")
    return given


def default_settings(device: torch.device, quick: bool = False) -> dict:
    """The value of each setting on this device, or with --quick."""
    settings = {}
    for field in dataclasses.fields(Settings):
        large, tiny = field.metadata["gpu"], field.metadata["quick"]
        value = large if device.type == "cuda" and large is not None else field.default
        settings[field.name] = tiny if quick and tiny is not None else value
    return settings


def settings_with(*resume: str) -> set[str]:
    """Names of the settings whose `resume` is one of those given."""
    fields = dataclasses.fields(Settings)
    return {field.name for field in fields if field.metadata["resume"] in resume}


def settle(defaults: dict, given: dict, checkpoint: dict | None) -> Settings:
    """The settings of this run: the flags `given`, else the checkpoint's values, else the defaults.
    Raises ExperimentError that names the settings in which the flags contradict the checkpoint."""
    stored = checkpoint["config"] if checkpoint else {}
    names = settings_with("match") & stored.keys()
    names = [name for name in given if name in names and given[name] != stored[name]]
    clashes = [f"{name} is {stored[name]!r} there and {given[name]!r} here" for name in names]
    if clashes:
        clashes.append(f"so leave these flags out, {START_OVER}")
        raise ExperimentError(f"the checkpoint was trained differently: {', '.join(clashes)}")
    return Settings(**defaults | stored | given)


# --- Devices and random numbers -------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, else MPS, else the CPU, also where the first of
    them cannot be used. Raises ExperimentError if the one asked for cannot be used."""
    wanted = name
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() and world() == 1 else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ExperimentError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N, mps")
    if world() > 1 and name != "cpu":
        if name != "cuda" or int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise ExperimentError("several processes need a CUDA GPU each, or --device cpu")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.ones(8, 8, device=name).mm(torch.ones(8, 8, device=name)).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = f"cannot use device {name!r}: {str(error).splitlines()[0][:150]}"
        if wanted != "auto" or world() > 1:
            raise ExperimentError(reason) from None
        print(f"warning: {reason}; going on with the CPU")
        name = "cpu"
    device = torch.device(name)
    torch.set_float32_matmul_precision("high")  # TF32 where there is
    torch.backends.cudnn.deterministic = True  # a resumed run ends with the same bits
    if device.index is not None:  # what asks for "the" GPU must mean this one
        torch.cuda.set_device(device)
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether hardware multiplies bfloat16: CUDA since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)()  # old releases cannot tell: float32
    return device.type == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@contextlib.contextmanager
def arithmetic(device: torch.device) -> Iterator[None]:
    """How networks compute: in bfloat16 where hardware multiplies it, else in float32, whatever the
    caller's default is."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device)):
            yield
    finally:
        torch.set_default_dtype(default)


def is_fast(device: torch.device) -> bool:
    """Whether epochs take seconds there, so that saving and drawing at each would take longer."""
    return device.type != "cpu"


def derived_seed(*parts) -> int:
    """A 63-bit seed: the same for the same parts, independent for others."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Rng:
    """The random numbers of a batch: a loss draws from here alone, never from global generators.

    They depend on the seed and on `source`, the device that draws them (None: the one that wants
    them); the CPU's are the same everywhere. Of `world` processes that share a batch, each draws
    the numbers of the whole and keeps its own rows.
    """

    def __init__(self, seed: int, device: torch.device, source=None, rank: int = 0, world: int = 1):
        generator = torch.Generator(source or device).manual_seed(seed)
        self.how = {"generator": generator, "device": generator.device}
        self.device, self.rank, self.world = device, rank, world

    def own(self, draw: Callable[..., Tensor], rows: int, *shape: int, **dtype) -> Tensor:
        """This process's rows of what `draw` makes for the whole batch."""
        whole = draw((self.world * rows, *shape), **self.how, **dtype)
        return whole[self.rank * rows : (self.rank + 1) * rows].to(self.device)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers; the first axis is always the batch's."""
        return self.own(torch.randn, *shape, dtype=torch.float32)

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return self.own(torch.rand, *shape, dtype=torch.float32)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from low to high - 1."""
        return self.own(partial(torch.randint, low, high), *shape)


# --- Processes ------------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process among those that torchrun has started. Process 0 alone locks,
    reads, writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(device: str) -> None:
    """Joins the processes that torchrun has started, if it has. They wait for each other without a
    time-out, since process 0 draws figures and downloads."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        gpu = device != "cpu" and torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(weeks=1))
        atexit.register(dist.destroy_process_group)


def from_first(function: Callable[[], Any]) -> Any:
    """What process 0 gets from the function, in every process; the others wait for it."""
    result = [function() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(result)
    return result[0]


def average_over_processes(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its mean over all processes."""
    if world() > 1:
        flat = nn.utils.parameters_to_vector(tensors)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / world(), tensors)


def agreed_signal(signals: list[int]) -> int:
    """The number of a signal that one of the processes has noted, or 0; the same in all of them."""
    number = torch.tensor(max(signals, default=0))
    if world() > 1:
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Creates the folder and holds its lock, which the system frees when a run is killed. If
    another run has it, waits for that, or raises ExperimentError."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            if os.name == "posix":  # Windows has no flock: two runs are not told apart there
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ExperimentError(f"another run is using the folder {folder}") from None
        except OSError as error:
            print(f"warning: cannot lock {folder} ({error.strerror}): no other run may use it")
        yield


# --- Data -----------------------------------------------------------------------------------------

TRAINING_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


class Data(NamedTuple):
    """Images (N, 1, 28, 28) uint8 and labels (N,) int64, on the device; no test images."""

    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor


def read_idx(raw: Path, name: str) -> np.ndarray | None:
    """The array in an unpacked idx file, else in its archive; None if there is no good one. A file
    is good if its size is what its header says, an archive if its MD5 is torchvision's."""
    magic, offset = (b"\0\0\x08\x03", 16) if "images" in name else (b"\0\0\x08\x01", 8)
    for path in (raw / name, raw / f"{name}.gz"):
        md5 = dict(FashionMNIST.resources).get(path.name)  # only archives have one
        if check_integrity(path, md5):
            content = gzip.decompress(path.read_bytes()) if md5 else path.read_bytes()
            shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, offset, 4)]
            if content.startswith(magic) and len(content) == offset + math.prod(shape):
                return np.frombuffer(content, np.uint8, offset=offset).reshape(shape)
            print(f"warning: {path} is damaged")
    return None


def read_training_files(folder: Path) -> list[np.ndarray]:
    """The images and labels of the training split, downloaded if they are not there; of several
    runs that start at once, one downloads, the others wait."""
    raw, before = folder / "FashionMNIST" / "raw", socket.getdefaulttimeout()
    terminal = sys.stderr.isatty()  # where it is none, torchvision's bars are no plain lines
    bars = contextlib.redirect_stderr(sys.stderr if terminal else io.StringIO())
    try:
        arrays = [read_idx(raw, name) for name in TRAINING_FILES]
        if all(array is not None for array in arrays):
            return arrays
        print(f"getting Fashion-MNIST into {raw}, after any other run that is at it")
        with locked(raw, wait=True), bars:
            if any(read_idx(raw, name) is None for name in TRAINING_FILES):
                for name in TRAINING_FILES:  # torchvision looks at the name only
                    (raw / name).unlink(missing_ok=True)
                socket.setdefaulttimeout(60)  # torchvision sets none
                FashionMNIST(folder, train=True, download=True)
        return [read_idx(raw, name) for name in TRAINING_FILES]
    except (RuntimeError, OSError, HTTPException) as error:
        names = ", ".join(name for name, _ in FashionMNIST.resources)
        raise ExperimentError(
            f"cannot get Fashion-MNIST ({' '.join(str(error).split())[:300]}). Without a network, "
            f"put whole copies of {names} from github.com/zalandoresearch/fashion-mnist into {raw}"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def load_fashion_mnist(config: Settings, device: torch.device) -> Data:
    """Reads Fashion-MNIST, downloads it at first. The last twelfth of the training images is for
    validation. Raises ExperimentError that names the archives, their folder, their source."""
    here = Path(__file__).resolve().parent
    roots = [folder for folder in here.parents if (folder / "LatentDiffusionModel").is_dir()]
    folder = Path(config.data_dir or [*roots, here][0] / "data").expanduser()
    arrays = from_first(lambda: read_training_files(folder))
    images, labels = (torch.from_numpy(array.copy()).to(device) for array in arrays)
    images, labels, split = images[:, None], labels.long(), len(images) - len(images) // 12
    kept = min(config.train_images, split)
    return Data(images[:kept], labels[:kept], images[split:], labels[split:])


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1], any shape; other types stay as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_float`, clamped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def class_weights(labels: Tensor) -> Tensor:
    """Labels (B,), NULL_CLASS included, to one-hot rows (B, 11). (`F.one_hot` asks the device.)"""
    return (labels[:, None] == torch.arange(NULL_CLASS + 1, device=labels.device)).float()


def labels_in_turn(count: int, device: torch.device) -> Tensor:
    """The labels (count,) of samples 0, 1, ...: i mod 10; without classes, NULL_CLASS."""
    labels = torch.arange(count, device=device) % len(CLASS_NAMES)
    return labels if CONDITIONAL else torch.full_like(labels, NULL_CLASS)


# --- Checkpoints ----------------------------------------------------------------------------------

CHECKPOINT = {"format": 1, "version": VERSION, "torch": str(torch.__version__)}
START_OVER = "choose another --output-dir, or start over with --fresh"
NO_MEMORY = "of memory|CPUAllocator|MemoryError"  # what such errors say


def replace(source: Path, target: Path) -> None:
    """os.replace, tried again for some seconds where another program has the target open."""
    for seconds in (0.1, 0.5, 1, 3):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(seconds)
    os.replace(source, target)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a file that is never seen half written. An OSError leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_figure(path: Path, content: bytes) -> None:
    """`write_atomically` for what can be made again: an OSError is a warning."""
    try:
        write_atomically(path, content)
    except OSError as error:
        tqdm.write(f"warning: cannot write {path} ({error.strerror})")


def save_checkpoint(content: dict, folder: Path) -> None:
    """Makes `content` last.pt, and the one before previous.pt. One is whole at any moment."""
    buffer, last = io.BytesIO(), folder / "last.pt"
    torch.save(content, buffer)
    write_atomically(folder / "new.pt", buffer.getbuffer())
    if last.exists():
        replace(last, folder / "previous.pt")
    replace(folder / "new.pt", last)
    if os.name == "posix":  # the renames must reach the disk too
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # CIFS, some FUSE
                raise
        finally:
            os.close(descriptor)


def read_checkpoint(path: Path) -> dict:
    """Reads a file to the CPU, executing nothing. Raises ValueError if it is damaged in any way,
    and what fits NO_MEMORY if there is too little of it."""
    file = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load skips the CRCs
            # an entry that is marked as a folder would read as nothing
            marked = any(entry.external_attr for entry in archive.infolist())
            if marked or archive.testzip() is not None:
                raise ValueError("a checksum or an attribute is wrong")
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not {"format", "version"} <= content.keys():
            raise ValueError("it is not a checkpoint")
        return content
    except Exception as error:  # arbitrary bytes provoke arbitrary errors
        if re.search(NO_MEMORY, repr(error)):
            raise
        raise ValueError(repr(error)[:150]) from None


def find_checkpoint(folder: Path) -> dict | None:
    """The newest readable checkpoint, or None where there has been none. Raises ExperimentError if
    none can be read, or if it is of another version or release."""
    last = folder / "last.pt"
    paths = [path for path in (last, folder / "previous.pt") if path.exists()]
    for path in paths:
        try:
            content = read_checkpoint(path)
            break
        except ValueError as error:
            print(f"warning: cannot read {path} ({error})")
    else:
        if paths:
            raise ExperimentError(f"no checkpoint in {folder} can be read: {START_OVER}")
        return None
    if path != last:
        print(f"warning: {last} is missing or damaged, continuing from {path}")
        if last in paths:  # the next save must not put what is damaged in the good one's place
            with contextlib.suppress(OSError):
                os.replace(last, folder / f"damaged_{time.time_ns()}.pt")
    if content["version"] != VERSION:
        raise ExperimentError(f"{path} belongs to {content['version']}: {START_OVER}")
    fits = content["format"] == CHECKPOINT["format"]
    fits = fits and content.keys() == {*CHECKPOINT, "config", "stages", "history"}
    if not fits or {*content["config"]} != settings_with("match", "keep"):
        raise ExperimentError(f"{path} was written by another release: {START_OVER}")
    return content


def load_state(part, state: dict | None) -> None:
    """Calls `part.load_state_dict`. Raises ExperimentError if the state does not fit."""
    try:
        part.load_state_dict(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if re.search(NO_MEMORY, repr(error)):
            raise
        raise ExperimentError(f"the checkpoint does not fit, {error!r:.99}: {START_OVER}") from None


def move_aside(folder: Path) -> None:
    """Moves an old run to old_runs/<time>/, its checkpoints first. What else is there stays."""
    own = ("checkpoints", "samples", "samples*.npz", "metrics.csv", "loss_curves.png", "index.html")
    found = [path for pattern in own for path in sorted(folder.glob(pattern))]
    found += sorted(path.parent for path in folder.glob("*/*_epoch_*.[pg][ni][gf]"))
    attic = folder / "old_runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}"
    for path in dict.fromkeys(found):
        attic.mkdir(parents=True, exist_ok=True)
        shutil.move(path, attic)
    if attic.exists():
        print(f"the old run is in {attic}")


# --- Training -------------------------------------------------------------------------------------

METRICS = (
    "stage", "epoch", "step", "train_loss", "validation_loss", "learning_rate", "seconds",
    "images_per_second",
)  # fmt: skip


class Models:
    """The averaged networks in evaluation mode, each an attribute by its name in `build_networks`;
    the settings that say how to sample from them; and the history, a row an epoch."""

    def __init__(self, networks: dict[str, nn.Module], config: Settings, history: list[dict]):
        self.networks, self.config, self.history = networks, config, history
        self.device = next(networks["diffusion"].parameters()).device
        vars(self).update(networks)

    @property
    def epoch(self) -> int:
        """Complete epochs of the diffusion."""
        return sum(row["stage"] == "diffusion" for row in self.history)

    def with_settings(self, **changes) -> Models:
        """The same networks under other settings, such as guidance_scale or sampling_seed."""
        return Models(self.networks, dataclasses.replace(self.config, **changes), self.history)


def initial_networks(config: Settings, device: torch.device) -> dict[str, nn.Module]:
    """The networks as they start, by the seed alone; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]), arithmetic(torch.device("cpu")):
        torch.default_generator.manual_seed(derived_seed(config.seed, "initial weights"))
        return {name: network.to(device) for name, network in build_networks(config).items()}


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (N, A, B), each with its singular vectors kept and its singular values brought near
    1, by five Newton-Schulz steps (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(torch.bfloat16 if has_bfloat16(matrices.device) else torch.float32)
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        quintic = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, quintic, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): steps along the Nesterov momentum of each matrix, orthogonalised,
    without weight decay. A convolution is the matrix of its output channels by all the rest. (The
    one in torch takes no convolutions, and always computes in bfloat16, slow where not native.)"""

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients of the weights."""
        [group], alike = self.param_groups, {}
        for weight in group["params"]:
            gradient, state = weight.grad.flatten(1), self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 0.05)
            update = gradient.lerp(momentum, 0.95)
            alike.setdefault(update.shape, []).append((weight, update))
        for (rows, columns), members in alike.items():  # a GPU waits for each launch
            weights, updates = zip(*members)
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            for weight, update in zip(weights, orthogonalised(torch.stack(updates))):
                weight.sub_(update.reshape(weight.shape), alpha=rate)


def build_optimizers(network: nn.Module, rates: dict[str, float]) -> dict[str, Any]:
    """AdamW; and, if its rate is not 0, Muon for the hidden matrices: those with no side under 17,
    unlike weights that read classes or write pixels. `rates` are peak learning rates, by name."""
    hidden, others = [], []
    for weight in network.parameters():
        wide = weight.ndim > 1 and min(weight.flatten(1).shape) > 16
        (hidden if wide and rates["muon"] else others).append(weight)
    adamw = torch.optim.AdamW(others, rates["adamw"], (0.9, 0.99), fused=True)
    return {"adamw": adamw} | ({"muon": Muon(hidden, {"lr": rates["muon"]})} if hidden else {})


class Stage:
    """One stage of training: a network, its moving average and optimizers, and where it stands.

    Args:
        loss: as of `Run.train`.
        rates: as of `build_optimizers`.
        images: size of the training set; an incomplete last batch of an epoch is left out.
        batch_size: of all processes together.
    """

    def __init__(
        self, name: str, network: nn.Module, average: AveragedModel, loss: Callable, images: int,
        *, epochs: int, batch_size: int, rates: dict[str, float], ema_decay: float,
    ):  # fmt: skip
        self.name, self.network, self.average, self.loss = name, network, average, loss
        self.batch_size, self.rates = min(batch_size, images), rates
        if self.batch_size % world():
            message = f"{world()} processes cannot share batches of {self.batch_size} images"
            raise ExperimentError(message)
        self.steps_per_epoch = images // self.batch_size
        self.total_steps = epochs * self.steps_per_epoch
        self.optimizers = build_optimizers(network, rates)
        self.parts = {"model": network, "ema": average} | self.optimizers
        self.weights, self.ema_decay = [*network.parameters()], ema_decay
        self.averaged_weights = [*average.module.parameters()]
        self.step, self.seconds = 0, 0.0
        self.loss_sums: dict[str, float] = {}  # by part; these and the seconds are of this epoch

    @property
    def epoch(self) -> int:
        """Number of complete epochs."""
        return self.step // self.steps_per_epoch

    def learning_rate(self, step: int, optimizer: str = "adamw") -> float:
        """Warm-up over 100 steps, constant, linear to zero over the last 40% of the steps. A
        finished run that is given more epochs follows the longer plan, at a higher rate again."""
        left = (self.total_steps - step) / (0.4 * self.total_steps + 1)
        return self.rates[optimizer] * max(0.0, min(1.0, (step + 1) / 100, left))

    @torch.no_grad()
    def update_average(self) -> None:
        """The exponential moving average of the weights, over a tenth of the steps so far while
        that is shorter (as the code of Karras et al. 2022 does), to forget its beginnings."""
        share = max(1 - self.ema_decay, 10 / (10 + self.step))
        torch._foreach_lerp_(self.averaged_weights, self.weights, share)

    def state(self) -> dict:
        """All that the stage needs to go on with the same bits."""
        counts = {name: getattr(self, name) for name in ("step", "loss_sums", "seconds")}
        return {name: part.state_dict() for name, part in self.parts.items()} | counts

    def restore(self, state: dict) -> None:
        """The inverse of `state`. Raises ExperimentError if the state does not fit."""
        if state.keys() != self.state().keys():
            raise ExperimentError(f"the checkpoint was written by another release: {START_OVER}")
        for name, part in self.parts.items():
            load_state(part, state[name])
        self.step, self.loss_sums = state["step"], state["loss_sums"]
        self.seconds = state["seconds"]
        if self.step > self.total_steps:
            raise ExperimentError(f"{self.name} has been trained for more epochs: {self.epoch}")

    def close_epoch(self, validation: dict[str, float]) -> dict:
        """Starts the sums of the next epoch. Returns the row of the history for this one."""
        training = {name: value / self.steps_per_epoch for name, value in self.loss_sums.items()}
        rate = self.steps_per_epoch * self.batch_size / self.seconds
        row = {"stage": self.name, "epoch": self.epoch, "step": self.step}
        row |= {"train_loss": sum(training.values()), "validation_loss": sum(validation.values())}
        row |= {"learning_rate": self.learning_rate(self.step - 1), "seconds": self.seconds}
        self.loss_sums, self.seconds = {}, 0.0
        parts = {"train_parts": training, "validation_parts": validation}
        return row | {"images_per_second": rate} | parts


def plan(config: Settings, stage: str = "") -> dict:
    """What `Run.train` takes from the settings: `epochs`, `batch_size`, `learning_rate` and
    `muon_learning_rate`, or those that begin with the stage's name, where they exist."""
    prefix, settings = f"{stage}_" if stage else "", vars(config)
    names = ("epochs", "batch_size", "learning_rate", "muon_learning_rate")
    return {name: settings[prefix + name] for name in names if prefix + name in settings}


class Run:
    """A run: its settings, its networks, its history, and the folder that they are saved in."""

    def __init__(self, config: Settings, data: Data, output: Path, checkpoint: dict | None):
        self.config, self.data, self.output = config, data, output
        self.networks = initial_networks(config, data.train_images.device)
        self.averages = {k: AveragedModel(v).eval() for k, v in self.networks.items()}
        self.history = checkpoint["history"] if checkpoint else []
        self.restored = checkpoint["stages"] if checkpoint else {}
        averaged = {name: average.module for name, average in self.averages.items()}
        self.models = Models(averaged, config, self.history)
        self.stages: dict[str, Stage] = {}  # those that have begun
        drawn = [p.stem.rpartition("_")[2] for p in output.glob("samples/samples_epoch_*.png")]
        self.drawn = max((int(epoch) for epoch in drawn if epoch.isdecimal()), default=0)

    def train(
        self, name: str, loss: Callable, arrays: tuple[Tensor, ...],
        held_out: tuple[Tensor, ...], *, epochs: int, batch_size: int, learning_rate: float,
        muon_learning_rate: float = 0.0, after_epoch: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        """Trains the network of that name, from the step it is at to its last.

        Args:
            loss: `loss(network, *batch, rng)` returns the mean loss of a batch, rows of `arrays`,
                or a dict of the parts that are its sum; uint8 images come as floats in [-1, 1].
            arrays, held_out: the training set, (N, ...) each; and the validation set.
            learning_rate, muon_learning_rate: AdamW's peak; and Muon's, 0 to do without.
            after_epoch: called with the number of a complete epoch; if None, `Run.draw` is.

        Raises ExperimentError after a signal, if the loss is not finite, or if the checkpoint or
        the number of processes does not fit.
        """
        network, trained = self.networks[name], loss
        if self.config.compile:
            torch._inductor.config.deterministic = True
            trained = torch.compile(loss)
        rates = {"adamw": learning_rate, "muon": muon_learning_rate}
        how = {"epochs": epochs, "batch_size": batch_size, "rates": rates}
        how["ema_decay"] = self.config.ema_decay
        stage = Stage(name, network, self.averages[name], trained, len(arrays[0]), **how)
        self.stages[name] = stage
        if name in self.restored:
            stage.restore(self.restored[name])
        if stage.step < stage.total_steps:
            self.drop_later_stages(name)
        size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        print(f"{name}: {size:.2f} M parameters, step {stage.step} of {stage.total_steps}")
        validate = partial(validation_losses, loss, stage.average.module, held_out)
        train_steps(self, stage, arrays, validate, after_epoch or self.draw)

    def drop_later_stages(self, name: str) -> None:
        """Where a stage trains on, those that have learnt from it begin anew. Raises
        ExperimentError where that would cost the diffusion."""
        later = [other for other in self.restored if other not in self.stages]
        if "diffusion" in later:
            raise ExperimentError(f"the epochs of {name} are over: more need --fresh")
        for other in later:
            print(f"{other}: will be trained anew, after more of {name}")
            del self.restored[other]
        self.history[:] = [row for row in self.history if row["stage"] not in later]

    def begun(self, name: str) -> bool:
        """Whether the stage of that name had begun when the run was resumed."""
        return name in self.restored

    def draw(self, epoch: int) -> None:
        """Draws samples after an epoch of the diffusion, now and then all figures. Those of the
        last epoch are drawn when training is over."""
        if "diffusion" not in self.stages or epoch == self.config.epochs:
            return
        every = self.config.figures_every
        if epoch // every > self.drawn // every:  # on a GPU some epochs are passed over
            save_all_figures(self.models, self.data, self.output)
        else:
            save_samples(self.models, self.output)
        self.drawn = epoch

    def save(self) -> None:
        """Writes a checkpoint, and metrics.csv; process 0 does."""
        if rank() > 0:
            return
        config = {name: getattr(self.config, name) for name in settings_with("match", "keep")}
        stages = {name: stage.state() for name, stage in self.stages.items()}
        content = CHECKPOINT | {"config": config, "stages": stages, "history": self.history}
        save_checkpoint(content, self.output / "checkpoints")
        self.write_metrics()

    def write_metrics(self) -> None:
        """Writes the history as metrics.csv, a row an epoch."""
        rows = [METRICS, *([str(row[name]) for name in METRICS] for row in self.history)]
        text = "".join(f"{','.join(row)}\n" for row in rows)
        write_figure(self.output / "metrics.csv", text.encode())


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Here a signal that ends a run only joins the list, as far as the process heeds it; a second
    one of its kind acts as it did before (but not with torchrun, which sends its own signal on to
    those that may have it already). Outside the main thread nothing changes."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    main = threading.current_thread() is threading.main_thread()
    old = {n: signal.getsignal(n) for n in signal.Signals if main and n.name in names}
    old = {n: handler for n, handler in old.items() if handler not in (signal.SIG_IGN, None)}
    noted = []

    def note(number, _):
        noted.append(number)
        if not dist.is_initialized():
            signal.signal(number, old[number])

    with contextlib.ExitStack() as restored:
        for number, handler in old.items():
            restored.callback(signal.signal, number, handler)
            signal.signal(number, note)
        yield noted
    if noted:  # too late for the loop to heed it
        signal.raise_signal(noted[0])


def train_step(stage: Stage, batch: list[Tensor], rng: Rng) -> Tensor:
    """One step. Returns, on the device, the norm of the gradient and the parts of the loss."""
    for name, optimizer in stage.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate(stage.step, name)
    with arithmetic(batch[0].device):
        parts = loss_parts(stage.loss(stage.network, *map(to_float, batch), rng))
        loss = sum(parts.values())
    stage.network.zero_grad()
    loss.backward()
    losses = torch.stack([part.detach() for part in parts.values()])
    average_over_processes([losses, *(w.grad for w in stage.weights if w.grad is not None)])
    norm = nn.utils.clip_grad_norm_(stage.weights, 1.0)
    for optimizer in stage.optimizers.values():
        optimizer.step()
    stage.update_average()
    stage.loss_sums = dict.fromkeys(parts, 0.0) | stage.loss_sums
    return torch.cat([norm.view(1), losses])


def loss_parts(loss: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """A loss by parts, which may be one."""
    return loss if isinstance(loss, dict) else {"loss": loss}


@torch.inference_mode()
def validation_losses(loss: Callable, network: nn.Module, arrays: tuple[Tensor, ...]) -> dict:
    """The parts of the network's mean loss over `arrays`, with the same noise and times always."""
    device, rows = arrays[0].device, []
    rng = Rng(0, device, source=torch.device("cpu"))
    with arithmetic(device):
        for batch in zip(*(array.split(500) for array in arrays)):
            parts = loss_parts(loss(network, *map(to_float, batch), rng))
            rows.append(torch.stack([len(batch[0]) * part for part in parts.values()]))
    sums = map(sum, zip(*torch.stack(rows).tolist()))
    return {name: value / len(arrays[0]) for name, value in zip(parts, sums)}


def train_steps(run: Run, stage: Stage, arrays: tuple, validate: Callable, draw: Callable) -> None:
    """The steps that `Run.train` has still to do. What is random depends on seed, stage and step
    alone, so that a resumed run goes on with the same bits. Saves and draws after each epoch (on a
    GPU, where they are short, by the clock); saves every few minutes too, and on a signal."""
    device, size, order, pending = arrays[0].device, stage.batch_size, None, []
    share, me, first, slow = size // world(), rank(), rank() == 0, not is_fast(device)
    saved_at = time.monotonic()
    seed = partial(derived_seed, run.config.seed, stage.name)
    images = {"initial": stage.step * size, "total": stage.total_steps * size, "unit": " images"}
    bar = tqdm(desc=stage.name, unit_scale=True, disable=None if first else True, **images)
    with noted_signals() as signals, bar:
        while stage.step < stage.total_steps:
            started = time.perf_counter()
            epoch, position = divmod(stage.step, stage.steps_per_epoch)
            if position == 0 or order is None:
                generator = torch.Generator().manual_seed(seed("order", epoch))
                order = torch.randperm(len(arrays[0]), generator=generator).to(device)
            rows = order[position * size + me * share : position * size + (me + 1) * share]
            rng = Rng(seed("step", stage.step), device, rank=me, world=world())
            pending.append(train_step(stage, [array[rows] for array in arrays], rng))
            stage.step += 1
            epoch_ends = stage.step % stage.steps_per_epoch == 0
            last = stage.step == stage.total_steps
            asked = world() == 1 or epoch_ends or stage.step % 10 == 0  # for asking costs time
            stop, now = agreed_signal(signals) if asked else 0, time.monotonic()
            late = first and now - saved_at > 60 * run.config.checkpoint_minutes
            saving = stop or late or last or (epoch_ends and (slow or now - saved_at > 60))
            if saving or epoch_ends or stage.step % 100 == 0:  # seldom: it waits for the device
                add_losses(run, stage, pending, bar)
            stage.seconds += time.perf_counter() - started
            bar.update(size)
            if epoch_ends:
                row = stage.close_epoch(validate() if first else {})
                run.history.append(row)
                if not sys.stdout.isatty():
                    print_epoch(stage, row)
            if saving:
                run.save()
                if epoch_ends and first and not stop:
                    draw(stage.epoch)
                    save_loss_curves(run.history, run.output / "loss_curves.png")
                    save_page(run.models, run.output)
                saved_at = time.monotonic()
            if stop:
                where = f"{stage.name}, step {stage.step} of {stage.total_steps}"
                message = f"{signal.Signals(stop).name} at {where}: saved; run again to resume"
                raise ExperimentError(message, 128 + stop)


def add_losses(run: Run, stage: Stage, pending: list[Tensor], bar: tqdm) -> None:
    """Adds the last steps' losses to the epoch's sums. Raises ExperimentError if not finite."""
    first = stage.step - len(pending)
    for step, (norm, *losses) in enumerate(torch.stack(pending).tolist(), first):
        if not math.isfinite(sum(losses) + norm):
            last = run.output / "checkpoints" / "last.pt"
            kept = f"the last good checkpoint is {last}" if last.exists() else "none is saved yet"
            message = f"loss or gradient of {stage.name} is not finite at step {step}; {kept}"
            raise ExperimentError(message, 1)
        for name, value in zip(stage.loss_sums, losses):
            stage.loss_sums[name] += value
    bar.set_postfix(loss=f"{sum(losses):.4f}", lr=f"{stage.learning_rate(step):.1e}", refresh=False)
    pending.clear()


def print_epoch(stage: Stage, row: dict) -> None:
    """A line an epoch, for where there is no bar."""
    rate, epochs = row["images_per_second"], stage.total_steps // stage.steps_per_epoch
    minutes = (stage.total_steps - stage.step) * stage.batch_size / rate / 60
    losses = f"loss {row['train_loss']:.4f}, validation {row['validation_loss']:.4f}"
    text = f"{stage.name}: epoch {stage.epoch} of {epochs}, {losses}, {rate:.0f} images/s"
    print(f"{text}, {minutes:.1f} min left")


# --- Sampling -------------------------------------------------------------------------------------

Fresh = Callable[[], Tensor]  # draws standard normal noise for a batch of states, anew at each call


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], tensor: Tensor, chunk: int = 500) -> Tensor:
    """`function` of a tensor (N, ...), some rows at a time; of uint8 images as floats."""
    with arithmetic(tensor.device):
        return torch.cat([function(to_float(part)) for part in tensor.split(chunk)])


def once(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`in_chunks`, computed by process 0 for all of them."""
    return from_first(lambda: in_chunks(function, tensor).cpu()).to(tensor.device)


def embed_images(models: Models, images: Tensor) -> Tensor:
    """uint8 images (N, 1, 28, 28) to the space of the states, (N, *state_shape)."""
    return in_chunks(partial(embed, models), images)


def decode_images(models: Models, states: Tensor) -> Tensor:
    """States (..., C, H, W) to uint8 images (..., 1, 28, 28)."""
    images = in_chunks(lambda part: to_uint8(decode(models, part)), states.flatten(0, -4))
    return images.unflatten(0, states.shape[:-3])


def noise_of_samples(models: Models, numbers: range) -> Fresh:
    """Draws the noise of samples by their numbers: first what they start from, then fresh noise.
    Each has a generator of its own, on the CPU: sample i of a sampling seed is the same on every
    device, however many are drawn at a time."""
    seed, shape = models.config.sampling_seed, state_shape(models.config)
    seeds = [derived_seed("sample", seed, number) for number in numbers]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def stream() -> Iterator[Tensor]:
        size, how = 1, {"dtype": torch.float32}
        while True:
            blocks = [torch.randn(size, *shape, generator=each, **how) for each in generators]
            yield from torch.stack(blocks, dim=1).to(models.device)
            size = 20  # in blocks, for a draw of one is slow

    return stream().__next__


@torch.inference_mode()
def trajectory(models: Models, noise: Tensor, classes: Tensor, steps: int = 0) -> list[Tensor]:
    """The deterministic sampler's states, noise first, and its guesses: (S + 1, B, ...) each."""
    with arithmetic(noise.device):
        pairs = zip(*sample(models, noise, classes, steps))
        return [torch.stack(part) for part in pairs]


@torch.inference_mode()
def last_state(
    models: Models, noise: Tensor, classes: Tensor, steps: int = 0, fresh: Fresh | None = None
) -> Tensor:
    """What the sampler makes of the noise (B, ...), for class weights (B, 11)."""
    with arithmetic(noise.device):
        [(state, _)] = collections.deque(sample(models, noise, classes, steps, fresh), maxlen=1)
    return state


def generate_samples(models: Models, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Samples 0, 1, ... of the sampling seed, uint8 (N, 1, 28, 28), one a label (N,): int64 on the
    models' device, 0 to 9, or NULL_CLASS for "no class". They do not depend on how many are drawn
    at a time, `chunk` (None: 100 on a CPU, 2000 else), but for rounding."""
    images, done = [], 0
    for part in labels.split(chunk or (2000 if is_fast(models.device) else 100)):
        fresh = noise_of_samples(models, range(done, done + len(part)))
        states = last_state(models, fresh(), class_weights(part), fresh=fresh)
        images.append(decode_images(models, states))
        done += len(part)
    return torch.cat(images)


def load_trained(folder: Path, device: str = "auto", **changes) -> Models:
    """The averaged networks of the run in that output folder, in evaluation mode, under the run's
    settings but for `changes`, such as guidance_scale or sampling_seed. Raises ExperimentError if
    there are no trained networks, or if a change contradicts them."""
    checkpoint = from_first(lambda: find_checkpoint(Path(folder) / "checkpoints"))
    if checkpoint is None or "diffusion" not in checkpoint["stages"]:
        raise ExperimentError(f"no trained model in {folder}: run without --sample-only to train")
    where, networks = pick_device(device), {}
    config = settle(default_settings(where), changes | {"device": device}, checkpoint)
    for name, network in initial_networks(config, where).items():
        if name in checkpoint["stages"]:  # one after the diffusion may not have begun
            average = AveragedModel(network).eval()
            load_state(average, checkpoint["stages"][name].get("ema"))
            networks[name] = average.module
    models = Models(networks, config, checkpoint["history"])
    print(f"{VERSION} on {where}, torch {torch.__version__}, {models.epoch} epochs; from {folder}")
    return models


def export_samples(models: Models, count: int, output: Path) -> None:
    """Writes `count` samples as npz in the layout of guided-diffusion: arr_0 uint8 (N, 28, 28, 1)
    and arr_1 int64 (N,), the labels i mod 10, or -1 where there are no classes."""
    started, content, seed = time.perf_counter(), io.BytesIO(), models.config.sampling_seed
    labels = labels_in_turn(count, models.device)
    images = generate_samples(models, labels).permute(0, 2, 3, 1)
    labels = torch.where(labels == NULL_CLASS, -1, labels)
    np.savez_compressed(content, images.cpu().numpy(), labels.cpu().numpy())
    path = output / (f"samples_seed_{seed}.npz" if seed else "samples.npz")
    write_atomically(path, content.getvalue())
    print(f"{path}: {count} samples in {time.perf_counter() - started:.1f} s")


# --- Figures --------------------------------------------------------------------------------------

CLASS_COLOURS = [*matplotlib.colors.TABLEAU_COLORS.values()]  # in hexadecimal
PATH_STEPS = 20  # sampler steps of the trajectories that are drawn


class Trajectories(NamedTuple):
    """Trajectories of the deterministic sampler as figures show them, and the forward process
    beside them; all from noise to data, (S + 1, N, *state_shape)."""

    states: Tensor  # the model's
    guesses: Tensor  # what it takes each of them for, E[x_0 | x_t]
    noised: Tensor  # the forward process from the last state, with the noise that is the first
    captions: list[str]  # S + 1


def save_figure(figure: Figure, path: Path, write: Callable = write_figure) -> None:
    """Saves a figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, bbox_inches="tight", pad_inches=0.1)
    write(path, content.getvalue())


def draw_grid(axes, images: Tensor, rows: list[str], columns: list[str]) -> None:
    """Draws images (R, C, 1, 28, 28) uint8 as a grid, with names of rows and columns."""
    grid = make_grid(images.flatten(0, 1), nrow=images.shape[1], padding=2, pad_value=96)[0]
    axes.imshow(grid.cpu().numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_yticks([16 + 30 * row for row in range(len(rows))], rows)
    axes.set_xticks([16 + 30 * column for column in range(len(columns))], columns)
    axes.tick_params(length=0, labelsize=9, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


def save_grid(
    path: Path, images: Tensor, rows: list[str], columns: list[str], title: str,
    write: Callable = write_figure,
) -> None:  # fmt: skip
    """Saves a grid as `draw_grid` draws it, with a title."""
    figure = Figure(figsize=(0.62 * images.shape[1], 0.62 * images.shape[0]))
    axes = figure.add_axes((0, 0, 1, 1))
    draw_grid(axes, images, rows, columns)
    axes.set_title(title, fontsize=10)
    save_figure(figure, path, write)


def save_loss_curves(history: list[dict], path: Path) -> None:
    """Training and validation loss by epoch, each part of a stage's loss by itself. A loss of one
    epoch is written below the curves, once there are curves."""
    panels = collections.defaultdict(list)  # by stage and part: epoch, training, validation
    for row in history:
        for part, value in row["train_parts"].items():
            panels[row["stage"], part].append((row["epoch"], value, row["validation_parts"][part]))
    if not panels:
        return
    drawn = {key: points for key, points in panels.items() if len(points) > 1} or panels
    text = "{}, one epoch: {} {:.4f}, validation {:.4f}"
    single = [text.format(*key, *panels[key][0][1:]) for key in panels if key not in drawn]
    columns = min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(8.4, 0.4 + 2.8 * rows + 0.2 * len(single)), layout="constrained")
    for number, ((stage, part), points) in enumerate(drawn.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        epochs, *curves = zip(*points)
        for curve, name in zip(curves, ("training", "validation, averaged weights")):
            axes.plot(epochs, curve, "o-", markersize=3, label=name)
        width = epochs[0] - 0.5, epochs[-1] + 0.5  # so that one epoch has a whole number too
        axes.set(title=stage, xlabel="epoch", ylabel=part, xlim=width)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.supxlabel("\n".join(single), fontsize="medium")
    save_figure(figure, path)


def state_pictures(states: Tensor) -> Tensor:
    """States (..., C, H, W) themselves as uint8 pictures (..., 1, 28, 28): an image as it is; of a
    latent the first 16 channels side by side, -3 black and 3 white."""
    if states.shape[-3:] == (1, 28, 28):
        return to_uint8(states)
    channels = states.flatten(0, -4).transpose(0, 1)[:16] / 3  # (C, N, H, W)
    columns = math.ceil(len(channels) ** 0.5)
    tiles = make_grid(channels, nrow=columns, padding=0, pad_value=-1)[: channels.shape[1]]
    scale = 28 // max(tiles.shape[1:])
    tiles = to_uint8(F.interpolate(tiles[:, None], scale_factor=scale))  # nearest
    return center_crop(tiles, [28, 28]).unflatten(0, states.shape[:-3])  # the rest is black


def save_animation(out: list, back: list, captions: list[str], title: str, path: Path) -> None:
    """A looping GIF from the clean image out to noise by the forward process, and back as the model
    went. Large the image, below it small the state itself and, on the way back, the guess.

    Args, all from noise to data:
        out: image and state as uint8 (S + 1, 1, 28, 28).
        back: image, state and guess of the model's trajectory, likewise; and captions: S + 1.
    """
    # Pillow's own font knows no Greek
    dejavu = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    steps, (large, small) = len(captions) - 1, [ImageFont.truetype(dejavu, n) for n in (16, 11)]
    # a palette without room for "as before" is written wrongly by some releases of Pillow
    greys = [grey if grey == 255 else grey - grey % 2 for grey in range(256)]
    places = ((0, 30, 224), (14, 274, 84), (126, 274, 84))  # left, top, size
    frames, times = [], []
    for index in range(2 * steps):
        leaving = index < steps
        pictures, position = (out, steps - index) if leaving else (back, index - steps)
        frame = Image.new("L", (224, 368), 255)
        draw = ImageDraw.Draw(frame)
        draw.rectangle((125, 273, 210, 358), outline=200)  # the guess's place, empty on the way out
        for (left, top, size), picture in zip(places, pictures):
            image = Image.fromarray(picture[position, 0].cpu().numpy())
            frame.paste(image.resize((size, size), Image.Resampling.NEAREST), (left, top))
        draw.text((6, 4), title, font=large, fill=0)
        draw.text((218, 4), captions[position], font=large, fill=0, anchor="ra")
        draw.text((56, 258), "state", font=small, fill=0, anchor="ma")
        text = "noise is added" if leaving else "guess of the image"
        draw.text((168, 258), text, font=small, fill=0, anchor="ma")
        frames.append(frame.point(greys))
        times.append({0: 1200, steps: 500}.get(index, 80))
    content, rest = io.BytesIO(), {"append_images": frames[1:], "duration": times, "loop": 0}
    frames[0].save(content, "GIF", save_all=True, **rest)
    write_figure(path, content.getvalue())


def scatter_classes(axes, points: np.ndarray, labels: np.ndarray, strong: int = NULL_CLASS) -> None:
    """Draws points (N, 2) coloured by class with a legend; the class `strong` (NULL_CLASS: each) in
    full colour, the others pale."""
    for label, name in enumerate(CLASS_NAMES):
        alpha, size = (0.8, 9) if strong in (NULL_CLASS, label) else (0.35, 6)
        style = {"s": size, "alpha": alpha, "color": CLASS_COLOURS[label], "linewidths": 0}
        axes.scatter(*points[labels == label].T, label=name, **style)
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    legend = axes.legend(fontsize=9, markerscale=2.5, frameon=False, **place)
    matplotlib.artist.setp(legend.legend_handles, alpha=1)


def label_path(axes, path: np.ndarray, captions: list[str]) -> None:
    """Labels about six points of a path (S + 1, 2) in a column beside it, or in a row above it
    where it is wider than high, in the order of the points: so no two labels or lines cross."""
    inside = axes.transData + axes.transAxes.inverted()  # to fractions of the axes
    shown = range(0, len(path), max(1, len(path) // 5))
    points = inside.transform(path)[shown]
    along = int(np.ptp(points[:, 1]) >= np.ptp(points[:, 0]))  # 1: up, 0: to the right
    rank, gap = points[:, along].argsort().argsort(), (0.09, 0.06)[along]
    middle, half = points[:, along].mean(), gap * (len(points) - 1) / 2
    places = np.empty_like(points)
    places[:, along] = np.clip(middle, half + 0.07, 0.93 - half) - half + gap * rank
    far = points[:, 1 - along].max() + 0.12
    places[:, 1 - along] = far if far < 0.93 else points[:, 1 - along].min() - 0.12
    how = {"textcoords": "axes fraction", "fontsize": 9, "ha": "center", "va": "center"}
    how["arrowprops"] = {"arrowstyle": "-", "lw": 0.6, "color": "0.3"}
    how["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
    for step, place in zip(shown, places):
        axes.annotate(captions[step], path[step], place, zorder=6, **how)


def path_figure(
    images: Tensor, rows: list[str], path: np.ndarray, captions: list[str], scatter: np.ndarray,
    labels: np.ndarray, titles: tuple[str, str], strong: int,
) -> Figure:  # fmt: skip
    """Trajectories from noise to image, and the first of them as a path among validation images.

    Args:
        images, rows: uint8 (R, S + 1, 1, 28, 28), every other column is shown; and the rows' names.
        path, captions: (S + 1, 2) and S + 1, the first trajectory's, in the plane of the scatter.
        scatter, labels: (N, 2) and (N,), the validation images there, and their classes.
        titles, strong: of the halves; and the class that stands out (NULL_CLASS: none does).
    """
    heights = 0.8 * len(rows), 4.8  # inches
    figure = Figure(figsize=(9.4, sum(heights) + 1), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=heights)
    captions = [caption.replace(" ", "") for caption in captions]
    draw_grid(top, images[:, ::2], rows, captions[::2])
    top.set_title(titles[0], fontsize=12)
    scatter_classes(bottom, scatter, labels, strong)
    bottom.plot(*path.T, color="black", lw=1.5, zorder=4)
    arrow = {"arrowstyle": "-|>", "color": "black", "lw": 1}
    for start, end in zip(path[::2], path[1::2]):
        bottom.annotate("", end, start, arrowprops=arrow, zorder=4)
    bottom.plot(*path[0], "s", color="white", markeredgecolor="black", markersize=9, zorder=5)
    bottom.plot(*path[-1], "*", color="gold", markeredgecolor="black", markersize=17, zorder=5)
    bottom.set(xlabel="first principal component", ylabel="second principal component")
    bottom.set_title(titles[1], fontsize=10)
    label_path(bottom, path, captions)
    return figure


def save_samples(models: Models, output: Path) -> None:
    """A hundred samples: ten a class, a row each, and ten without class; or ten rows."""
    images = generate_samples(models, labels_in_turn(100, models.device)).unflatten(0, (10, 10))
    rows, title = [], f"Samples after epoch {models.epoch}"
    if CONDITIONAL:
        null = torch.full((10,), NULL_CLASS, device=models.device)
        images = torch.cat([images.transpose(0, 1), generate_samples(models, null)[None]])
        rows = [*TITLES]
    save_grid(output / "samples" / f"samples_epoch_{models.epoch}.png", images, rows, [], title)


def save_trajectories(models: Models, data: Data, output: Path) -> None:
    """Animation and denoising path of each class; or, where there are none, of ten samples. They
    are the first samples of the sampling seed, by the deterministic sampler."""
    titles = CLASS_NAMES if CONDITIONAL else [f"sample {number}" for number in range(10)]
    labels, epoch = labels_in_turn(20, models.device), models.epoch  # two paths a title
    noise = noise_of_samples(models, range(20))()
    drawn = draw_trajectories(models, noise, class_weights(labels), PATH_STEPS)
    out = [decode_images(models, drawn.noised), state_pictures(drawn.noised)]
    back = [decode_images(models, drawn.states), state_pictures(drawn.states)]
    back.append(decode_images(models, drawn.guesses))
    rows = {"state": back[1], "image": back[0], "guess": back[2]}
    if drawn.states.shape[2:] == (1, 28, 28):
        del rows["image"]  # which is the state
    pca, space = PCA(n_components=2, random_state=0), embed_images(models, data.validation_images)
    scatter = pca.fit_transform(space.flatten(1).cpu().numpy())[:2000]
    classes = data.validation_labels[:2000].cpu().numpy()
    page = {"captions": drawn.captions, "rows": [*rows], "classes": {}, "epoch": epoch}
    page |= {"scatter": np.round(scatter[:600], 2).tolist(), "labels": classes[:600].tolist()}
    names = [f"path {number}: {name}" for number in (1, 2) for name in rows]
    for index, title in enumerate(titles):
        file, label = f"{re.sub('[/ ]', '-', title)}_epoch_{epoch}", int(labels[index])
        gif = f"diffusion_animation/diffusion_animation_class_{file}.gif"
        png = f"denoise_with_diffusion_path/denoising_path_{file}.png"
        ways = [[part[:, index] for part in way] for way in (out, back)]
        save_animation(*ways, drawn.captions, title, output / gif)
        images = torch.stack([part[:, n] for n in (index, index + 10) for part in rows.values()])
        states = drawn.states[:, index].flatten(1).cpu()
        path = pca.transform(states.numpy())
        bend = states.diff(dim=0).norm(dim=1).sum() / (states[-1] - states[0]).norm()
        share = f"{pca.explained_variance_ratio_.sum():.0%} of the variance"
        lower = f"Path 1, from noise (square) to image (star). The plane holds {share};\n"
        lower += f"in all dimensions the path is {bend:.2f} times as long as its chord"
        heads = f"{title}: 2 paths from noise to image", lower
        figure = path_figure(images, names, path, drawn.captions, scatter, classes, heads, label)
        save_figure(figure, output / png)
        strip = make_grid(images[: len(rows)].flatten(0, 1), nrow=len(path), padding=0)[0]
        Image.fromarray(strip.cpu().numpy()).save(content := io.BytesIO(), "PNG")
        strip = base64.b64encode(content.getvalue()).decode()
        shown = {"gif": gif, "png": png, "label": label, "strip": strip}
        page["classes"][title] = shown | {"path": np.round(path, 2).tolist()}
    file = output / "denoise_with_diffusion_path" / f"paths_epoch_{epoch}.json"
    write_figure(file, json.dumps(page).encode())


def save_all_figures(models: Models, data: Data, output: Path) -> None:
    """Every figure that a trained model has; process 0 draws them."""
    if rank() > 0:
        return
    started = time.perf_counter()
    save_loss_curves(models.history, output / "loss_curves.png")
    save_samples(models, output)
    save_trajectories(models, data, output)
    save_own_figures(models, data, output)
    save_page(models, output)
    seconds = time.perf_counter() - started
    tqdm.write(f"figures of epoch {models.epoch} written in {seconds:.0f} s")


def save_requested_samples(models: Models, output: Path) -> None:
    """A PNG of the samples that --class and --num-samples ask for: of one class, or all in turn."""
    config, name = models.config, "samples"
    labels = labels_in_turn(config.num_samples, models.device)
    if config.class_ != "all":
        labels.fill_(TITLES.index(config.class_))
        name = f"samples_{re.sub('[/ ]', '-', config.class_)}"
    images = generate_samples(models, labels)
    columns = min(max(8, math.isqrt(len(labels))), len(labels))
    images = F.pad(images, (*[0] * 7, -len(images) % columns), value=96).unflatten(0, (-1, columns))
    path, title = output / "samples" / f"{name}.png", f"{name}, seed {config.sampling_seed}"
    save_grid(path, images, [], [], title, write=write_atomically)  # asked for: a failure is one
    print(f"samples: {path}")


# --- The run's page -------------------------------------------------------------------------------

PAGE = string.Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: auto; padding: 1rem }
h1, p { overflow-wrap: anywhere } figure { margin: 0 } input { width: 100% }
img, svg { max-width: 100%; height: auto } img:not([src]) { display: none }
table { display: block; overflow: auto; max-height: 25rem; font-size: .85rem }
td, th { padding: .1rem .6rem; text-align: right; white-space: nowrap }
pre { overflow-x: auto; padding: .6rem; border: 1px solid #8888 }
button { font: inherit; margin: .1rem; border: solid #8888; border-width: 1px 1px 4px }
button[aria-selected=true] { background: #06c; color: #fff }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center }
.tile { width: min(14rem, 28vw); aspect-ratio: 1; image-rendering: pixelated }
</style>
<h1>$title</h1><p>$state</p><h2>Samples</h2>
<label for="samples">epoch <output id="epoch">: none yet</output></label>
<input type="range" id="samples" max="$last" value="$last" aria-label="epoch" autocomplete="off">
<p><img id="sheet" alt="samples of the epoch that the slider shows"></p>
<section id="paths" hidden><h2>From noise to image, epoch </h2>
<div role="tablist" id="tabs" aria-label="class"></div>
<label for="step"><output id="time"></output></label>
<input type="range" id="step" min="0" value="0" aria-label="step from noise to image">
<div class="tiles" id="tiles"></div>
<div class="tiles"><img id="animation" alt="animation of this class">
<svg id="plane" width="600" viewBox="0 0 600 400" role="img" aria-label="path among images"></svg>
</div><p>□ noise, ★ image, large dot: here; small: validation images, in their first two principal
components, coloured as the tabs</p><p><img id="figure" alt="denoising paths"></p></section>
$figures
<h2>Metrics</h2>$metrics<h2>Settings</h2>$settings
<h2>Resume, sample, extend</h2><pre>$commands</pre>
<script>
const sheets = $sheets, paths = $paths, colours = $colours, get = id => document.getElementById(id);
const tell = (slider, output, text) =>
  get(slider).setAttribute("aria-valuetext", get(output).textContent = text);
function showSheet() {
  const [epoch, file] = sheets[get("samples").value];
  tell("samples", "epoch", epoch);
  get("sheet").src = file;
}
get("samples").oninput = showSheet;
if (sheets.length) showSheet();
if (paths) {
  const points = Object.values(paths.classes).flatMap(c => c.path).concat(paths.scatter);
  const [xs, ys] = [0, 1].map(k => points.map(p => p[k])), last = paths.captions.length - 1;
  const [left, top] = [Math.min(...xs), Math.max(...ys)];
  const scale = Math.min(560 / (Math.max(...xs) - left), 360 / (top - Math.min(...ys)));
  const place = p => [20 + (p[0] - left) * scale, 20 + (top - p[1]) * scale];
  const dot = (p, r, fill, more) => `<circle cx="$${place(p)[0]}" cy="$${place(p)[1]}" r="$${r}"
    fill="$${fill}" $${more}/>`;
  const mark = (p, sign) => `<text x="$${place(p)[0]}" y="$${place(p)[1]}" font-size="26"
    fill="currentColor" text-anchor="middle" dominant-baseline="central">$${sign}</text>`;
  let current;
  function showStep() {
    const step = get("step").value, rows = paths.rows.length - 1;
    tell("step", "time", paths.captions[step]);
    for (const [row, tile] of get("tiles").querySelectorAll(".tile").entries())
      tile.style.backgroundPosition = `$${100 * step / last}% $${100 * row / rows}%`;
    get("plane").lastElementChild.outerHTML =
      dot(current.path[step], 7, "gold", 'stroke="black" stroke-width="2"');
  }
  function showClass(name) {
    current = paths.classes[name];
    for (const tab of get("tabs").children) tab.ariaSelected = tab.textContent == name;
    get("tiles").innerHTML = paths.rows.map(row => `<figure><div class="tile" style="background:
      0 0 / $${100 * (last + 1)}% auto url(data:image/png;base64,$${current.strip})"></div>
      <figcaption>$${row}</figcaption></figure>`).join("");
    get("plane").innerHTML = paths.scatter.map((p, i) => dot(p, 2.5, colours[paths.labels[i]],
      `opacity="$${paths.labels[i] == current.label ? .9 : .35}"`)).join("") +
      `<polyline fill="none" stroke="currentColor" stroke-width="2"
      points="$${current.path.map(place).join(" ")}"/>` +
      mark(current.path[0], "□") + mark(current.path[last], "★") + "<g/>";
    get("animation").src = current.gif;
    get("figure").src = current.png;
    showStep();
  }
  get("tabs").innerHTML = Object.entries(paths.classes).map(([name, {label}]) => `<button role="tab"
    style="border-bottom-color: $${colours[label]}">$${name}</button>`).join("");
  get("tabs").onclick = ({target}) => target.matches("button") && showClass(target.textContent);
  Object.assign(get("step"), {max: last, oninput: showStep});
  Object.assign(get("paths"), {hidden: false}).querySelector("h2").append(paths.epoch);
  showClass(Object.keys(paths.classes)[0]);
}
</script>
""")


def html_table(rows: list) -> str:
    """A table in HTML, its first row the heading."""
    texts = [[f"{x:.5g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in texts]
    lines[0] = lines[0].replace("td>", "th>")
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def save_page(models: Models, output: Path) -> None:
    """The run's page, index.html: its pictures stand beside it, by relative links, so the folder
    can be moved; it needs no network and no library. Reload it while the run goes on."""
    config, device, history, folders = models.config, models.device, models.history, {}
    # the loss curves of a folder in this one are another run's, such as --quick's
    pictures = [path for path in sorted(output.glob("*/*.png")) if path.name != "loss_curves.png"]
    for path in [*output.glob("loss_curves.png"), *pictures]:
        epoch = re.search(r"_epoch_(\d+)\.png", path.name)  # none: of the end of a stage
        file = path.relative_to(output).as_posix()
        files = folders.setdefault(file.rpartition("/")[0] or "losses", [])
        files.append((int(epoch[1]) if epoch else math.inf, file))
    sheets = sorted(pair for pair in folders.pop("samples", []) if pair[0] < math.inf)
    folders.pop("denoise_with_diffusion_path", None)
    figures = ""
    for folder, files in folders.items():
        figures += f"<h2>{html.escape(folder.replace('_', ' ').capitalize())}</h2>\n"
        for file in [html.escape(file) for epoch, file in files if epoch == max(files)[0]]:
            figures += f'<p><img src="{file}" alt="{file}"></p>\n'
    written = output.glob("denoise_with_diffusion_path/paths_epoch_*.json")
    newest = max(written, key=lambda path: path.stat().st_mtime, default=None)
    paths = newest.read_text() if newest else "null"
    settings = [["setting", "value", "unless the default"]]
    for name, usual in default_settings(device).items():
        value = getattr(config, name)
        settings.append([name, value, "" if value == usual else f"default: {usual!r}"])
    size = sum(p.numel() for n in models.networks.values() for p in n.parameters()) / 1e6
    cuda, minutes = device.type == "cuda", sum(row["seconds"] for row in history) / 60
    machine = torch.cuda.get_device_name(device) if cuda else platform.machine()
    state = f"{size:.2f} M parameters on {device} ({machine}, {torch.get_num_threads()} threads), "
    state += f"torch {torch.__version__}. {minutes:.1f} minutes of training"
    for row in history[-1:]:
        state += f", up to epoch {row['epoch']} of {row['stage']}"
    state += f"; this page is of {time.strftime('%Y-%m-%d %H:%M')}. Command: "
    places = {"--output-dir": str(output), "--data-dir": config.data_dir, "--device": config.device}
    given = [part for pair in places.items() if pair[1] not in ("", "auto") for part in pair]
    run = shlex.join(["python", Path(__file__).name, *given])
    commands = f"{run}\n{run} --sample-only --num-samples 16\n"
    commands += f"{run} --epochs {2 * max(config.epochs, models.epoch)}"
    if not (output / "checkpoints").is_dir():  # of a run or of weights elsewhere
        commands = f"{shlex.join(['python', *sys.argv])} --num-samples 16"
    data = {"sheets": json.dumps(sheets), "colours": json.dumps(CLASS_COLOURS), "paths": paths}
    page = PAGE.substitute(
        {name: text.replace("<", "\\u003c") for name, text in data.items()},
        title=html.escape(f"{VERSION}: {output.name}"), figures=figures,
        state=html.escape(state + shlex.join(sys.argv)), commands=html.escape(commands),
        metrics=html_table([METRICS, *([row[name] for name in METRICS] for row in history)]),
        settings=html_table(settings), last=max(0, len(sheets) - 1),
    )  # fmt: skip
    write_figure(output / "index.html", page.encode(errors="backslashreplace"))


# --- main -----------------------------------------------------------------------------------------

FAULTS = {  # by what the kind of an error and its message say
    NO_MEMORY: "out of memory: end other programs; a new run may have smaller batches or widths",
    r"^torch\._(dynamo|inductor)": "--compile needs a C++ compiler on a CPU, Triton on a GPU",
    "gloo|Dist[A-Za-z]*Error": "another process has ended; see its message",
}


def main(argv: list[str] | None = None) -> None:
    """Trains or resumes, or samples, as the command line says."""
    given, here = parse_command_line(argv), Path(__file__).resolve().parent
    folder = "quick" if "quick" in given else "pretrained" if "pretrained" in given else ""
    output = Path(given.get("output_dir") or here / "output" / folder).expanduser().absolute()
    source = here / folder if "pretrained" in given else given.get("run_dir") or output
    join_processes(given.get("device", "auto"))
    with locked(output) if rank() == 0 else contextlib.nullcontext():
        if "sample_only" not in given:
            models = run_training(given, output)
        else:
            models = load_trained(Path(source).expanduser(), **given)
            if not (given.keys() & {"class_", "num_samples"} or given.get("export_samples")):
                data = load_fashion_mnist(models.config, models.device)
                save_all_figures(models, data, output)
        if rank() == 0 and given.keys() & {"class_", "num_samples"}:
            save_requested_samples(models, output)
        if rank() == 0 and given.get("export_samples"):
            export_samples(models, given["export_samples"], output)


def run_training(given: dict, output: Path) -> Models:
    """Trains every stage to its last epoch and draws the figures. Returns the averaged networks."""
    fresh, folder = "fresh" in given, output / "checkpoints"
    checkpoint = None if fresh else from_first(lambda: find_checkpoint(folder))
    device = pick_device(given.get("device", "auto"))
    usual, stored = default_settings(device, "quick" in given), (checkpoint or {}).get("config", {})
    config = settle(usual, given, checkpoint)
    kept = {name: stored[name] for name in stored.keys() - given if stored[name] != usual[name]}
    state, count = "resumed" if checkpoint else "fresh", f", {world()} processes"
    where = f"{device}{count if world() > 1 else ''}, torch {torch.__version__}"
    print(f"{VERSION} on {where}, {state}; output: {output}")
    print("training what is left, then drawing the figures")
    if kept:
        kept = ", ".join(f"{flag(name)} {value}" for name, value in sorted(kept.items()))
        print(f"as in the checkpoint, unlike the default here: {kept}")
    if config.quick:
        print("--quick: its pictures are noise and only show that the installation works")
    data = load_fashion_mnist(config, device)
    if fresh and rank() == 0:
        move_aside(output)
    run = Run(config, data, output, checkpoint)
    if rank() == 0:
        run.write_metrics()  # a kill may have come between a checkpoint and its row
    train_stages(run, run.models, data)
    save_all_figures(run.models, data, output)
    return run.models


def exit_status(main_function: Callable[[], None]) -> int:
    """Calls `main_function`; what a user can mend, or has asked for, becomes one line and an exit
    status. Of several processes the first one prints."""
    first = not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"
    silent = open(os.devnull, "w")  # noqa: SIM115
    out, err = sys.stdout if first and sys.stdout else silent, sys.stderr or silent
    if hasattr(out, "reconfigure"):  # a notebook's has no such method
        out.reconfigure(line_buffering=True, errors="backslashreplace")
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    try:
        with streams[0], streams[1], matplotlib.rc_context():
            matplotlib.rcdefaults()
            main_function()
        return 0
    except ExperimentError as error:
        status, line = error.status, f"{'' if error.status > 128 else 'error: '}{error}"
        err = err if first else silent
    except KeyboardInterrupt:
        status, line = 130, "SIGINT: run again to resume"
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(silent.fileno(), out.fileno())
        return 1
    except OSError as error:
        status, advice = 2, "another --output-dir may do (of a run there, give it as --run-dir)"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            status, advice = 1, "any earlier checkpoint stands"
        line = f"error: {error}; {advice}"
    except (RuntimeError, MemoryError) as error:
        text = f"{type(error).__module__}.{type(error).__name__}: {error}"
        reasons = [reason for pattern, reason in FAULTS.items() if re.search(pattern, text)]
        if not reasons:
            raise
        status, line = 1, f"error: {reasons[0]}"
    print(" ".join(line.splitlines()), file=err)  # even a file's name may have several
    return status


if __name__ == "__main__":
    sys.exit(exit_status(main))
