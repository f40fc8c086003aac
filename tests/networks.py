"""What the tests of models, processes and samplers share: helpers for networks, and a Gaussian.

For data x_0 ~ N(mu, Sigma) the state x = alpha x_0 + sigma noise is Gaussian, of covariance
C = alpha^2 Sigma + sigma^2 I, and jointly so with x_0 and with the noise. Hence

    E[x_0 | x] = mu + alpha Sigma C^-1 (x - alpha mu),    E[noise | x] = sigma C^-1 (x - alpha mu),

from which every denoiser's best output follows. The ODE of the process carries x - alpha mu in
proportion to C^(1/2).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from conftest import draw_shapes

EIGENVALUES = torch.tensor([0.25, 0.6, 1.4, 2.5], dtype=torch.float64)
AXES = torch.linalg.qr(
    torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
).Q
COVARIANCE = AXES * EIGENVALUES @ AXES.T
MEAN = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


def gaussian_guesses(x, alpha, sigma, mean=MEAN):
    """E[x_0 | x] and E[noise | x] for x (B, 4, 1, 1), in float64.

    alpha and sigma are numbers or (B,); mean is (4,) or (B, 4).
    """
    alpha, sigma = (torch.as_tensor(value).double().view(-1, 1) for value in (alpha, sigma))
    rest = (x.flatten(1).double() - alpha * mean) @ AXES / (alpha**2 * EIGENVALUES + sigma**2)
    x0, noise = mean + alpha * EIGENVALUES * rest @ AXES.T, sigma * rest @ AXES.T
    return x0[:, :, None, None], noise[:, :, None, None]


def gaussian_flow(start, end, mean=MEAN):
    """Matrix (4, 4) and offset (4,) of the ODE's solution between two pairs (alpha, sigma)."""
    before, after = (alpha**2 * EIGENVALUES + sigma**2 for alpha, sigma in (start, end))
    matrix = AXES * (after / before).sqrt() @ AXES.T
    return matrix, end[0] * mean - matrix @ (start[0] * mean)


def affine_map(sampler):
    """Matrix (4, 4) and offset (4,) of a sampler that is an affine map, by the images of the origin
    and the axes. The sampler yields (state, guess)."""
    points = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double()
    ends = last(sampler(points[:, :, None, None])).flatten(1)
    assert ends.dtype == torch.float64
    return (ends[1:] - ends[0]).T, ends[0]


def states_of(sampler):
    """The states, in a list, of a sampler that yields (state, guess)."""
    return [state for state, _ in sampler]


def last(sampler):
    """The last state of a sampler."""
    return states_of(sampler)[-1]


class Denoiser(nn.Module):
    """A function of (x, t, ...) as a network: with a device, and the schedule of its process."""

    def __init__(self, function, alpha_bars=None):
        super().__init__()
        self.function, self.alpha_bars = function, alpha_bars
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *inputs):
        return self.function(*inputs)


def models_of(script, function, guide=None, **settings):
    """Models of a script whose denoiser is a function, and whose guide is another, by default the
    same, with which guidance changes nothing."""
    networks = {"diffusion": Denoiser(function), "guide": Denoiser(guide or function)}
    return script.Models(networks, script.Settings(**settings), [])


def tiny_models(script, size=0.05, **settings):
    """Models of a script as --quick builds them, in which nothing is zero."""
    cpu = torch.device("cpu")
    config = script.Settings(**script.default_settings(cpu, quick=True) | settings)
    networks = script.initial_networks(config, cpu)
    return script.Models({k: perturb(v, size).eval() for k, v in networks.items()}, config, [])


class Planned(NamedTuple):
    """What `Run.train` of a stage was asked for."""

    loss: object
    network: object
    arrays: tuple
    held_out: tuple


def stages_of(script, images=60, **settings):
    """The stages of a tiny run of a script on drawn shapes, by name, in which no step is done."""
    found, cpu, rng = {}, torch.device("cpu"), np.random.default_rng(0)
    labels = torch.arange(images) % 10
    pictures = torch.from_numpy(draw_shapes(labels.numpy(), rng))[:, None]
    data = script.Data(pictures, labels, pictures[:20], labels[:20])
    config = script.Settings(**script.default_settings(cpu, quick=True) | settings)
    run = script.Run(config, data, Path("unused"), None)
    for averaged in run.models.networks.values():
        perturb(averaged, 0.05)

    def train(name, loss, arrays, held_out, **options):
        found[name] = Planned(loss, run.networks[name], arrays, held_out)
        run.history.append({"stage": name})

    run.train = train
    script.train_stages(run, run.models, data)
    return found


def rng_of(script, seed=0):
    """The random numbers of a loss."""
    return script.Rng(seed, torch.device("cpu"))


def perturb(module, size=0.1):
    """Moves every weight off its initial value, so that what starts at zero takes part. Returns the
    module."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return module


def without_gradient(module):
    """Names of the parameters that no gradient has reached."""
    return [n for n, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]


def gradients(module, loss):
    """The gradient of a loss for all parameters of a module, in one vector; zero where none is."""
    parameters = list(module.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
    return torch.cat([gradient.flatten() for gradient in found])
