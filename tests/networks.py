"""What the tests of models, processes and samplers share: helpers for networks, and a Gaussian to sample from."""

import torch

EIGENVALUES = torch.tensor([0.25, 0.6, 1.4, 2.5], dtype=torch.float64)
AXES = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
COVARIANCE = AXES * EIGENVALUES @ AXES.T
MEAN = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


def perturb(module, size=0.1):
    """Moves every weight off its initial value, so that what starts at zero takes part. Returns the module."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return module


def without_gradient(module):
    """Names of the parameters that no gradient has reached."""
    return [name for name, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]


def affine_map(sampler):
    """Matrix (4, 4) and offset (4,) of a sampler that is an affine map, from the images of the origin and the axes."""
    points = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double()
    ends = sampler(points[:, :, None, None]).flatten(1)
    assert ends.dtype == torch.float64
    return (ends[1:] - ends[0]).T, ends[0]
