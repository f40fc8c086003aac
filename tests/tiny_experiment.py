# ruff: noqa: F821 (what is not defined here is the harness's, below which a fixture puts it)
"""The smallest experiment that the harness serves: one linear layer guesses the clean image.

The tests put the harness of the real scripts below this text, and run what comes out: it shows that
an experiment needs no more than the harness's opening comment asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VERSION = "TinyExperiment/linear"
CONDITIONAL = True


def option(cpu, help, low=None, high=None, *, gpu=None, quick=None, multiple=None, choices=(),
           resume="match"):  # fmt: skip
    """As in the scripts."""
    return dataclasses.field(default=cpu, metadata=dict(locals()))


@dataclasses.dataclass
class Config:
    """The settings of this experiment."""

    epochs: int = option(4, "epochs", 1, 100, gpu=9, quick=3, resume="keep")
    batch_size: int = option(32, "images a step", 1, 4096)
    learning_rate: float = option(1e-2, "peak learning rate", 1e-8, 1.0)
    rank: int = option(784, "columns of the matrix", 8, 784, multiple=8, quick=16)
    noise: str = option("fresh", "of a step", choices=("fresh", "first"), resume="keep")


def interpolate(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """The forward process, from data at t=0 to noise at t=1."""
    return (1 - t) * x0 + t * noise


def loss(denoiser: nn.Module, x0: Tensor, labels: Tensor, rng: Rng) -> Tensor:
    """Mean squared error of the clean image."""
    t, noise = rng.rand(len(x0)), rng.randn(*x0.shape)
    return F.mse_loss(
        denoiser(interpolate(x0, noise, t.view(-1, 1, 1, 1)), class_weights(labels)), x0
    )


def sample(
    models: Models, noise: Tensor, classes: Tensor, steps: int = 0, fresh: Fresh | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Guesses, and noises the guess again, a little less."""
    x, steps = noise, steps or 4
    for step in range(steps):
        guess = models.diffusion(x, classes)
        yield x, guess
        new = fresh() if fresh and models.config.noise == "fresh" else noise
        x = interpolate(guess, new, 1 - (step + 1) / steps)
    yield x, x


class Linear(nn.Module):
    """Images and class weights to images."""

    def __init__(self, rank: int):
        super().__init__()
        self.encode, self.decode = nn.Linear(784 + NULL_CLASS + 1, rank), nn.Linear(rank, 784)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        flat = self.decode(self.encode(torch.cat([x.flatten(1), classes], dim=1)))
        return flat.view(x.shape).float()


def state_shape(config: Config) -> tuple[int, int, int]:
    return 1, 28, 28


def build_networks(config: Config) -> dict[str, nn.Module]:
    return {"diffusion": Linear(config.rank)}


def train_stages(run: Run, models: Models, data: Data) -> None:
    train_set = data.train_images, data.train_labels
    held_out = data.validation_images, data.validation_labels
    run.train("diffusion", loss, train_set, held_out, **plan(run.config))


def embed(models: Models, images: Tensor) -> Tensor:
    return images


def decode(models: Models, states: Tensor) -> Tensor:
    return states


def draw_trajectories(models: Models, noise: Tensor, classes: Tensor, steps: int) -> Trajectories:
    states, guesses = trajectory(models, noise, classes, steps)
    times = [1 - step / steps for step in range(steps + 1)]
    noised = torch.stack([interpolate(states[-1], noise, t) for t in times])
    return Trajectories(states, guesses, noised, [f"t = {t:.2f}" for t in times])


def save_own_figures(models: Models, data: Data, output: Path) -> None:
    """None."""
