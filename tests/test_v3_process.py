"""The process and the samplers of v3 against analytic truth.

Rectified flow carries data x_0 to noise z along x_t = (1 - t) x_0 + t z, and its velocity is
v(x, t) = E[z - x_0 | x_t = x]; for Gaussian data networks.py knows both parts, with alpha = 1 - t
and sigma = t. C_1 = I, so the ODE's solution from x at t = 1 ends in mu + Sigma^(1/2) x. What no
denoiser can know is Cov(z - x_0 | x_t); along an eigenvector of Sigma of eigenvalue a it is
(1 + a) - (t - (1 - t) a)^2 / c = a / c, with c = (1 - t)^2 a + t^2.
"""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from networks import (
    AXES,
    EIGENVALUES,
    MEAN,
    affine_map,
    gaussian_flow,
    gaussian_guesses,
    rng_of,
)


def gaussian_velocity(x, t):
    """The velocity for x (B, 4, 1, 1) and t a number or (B,)."""
    x0, noise = gaussian_guesses(x, 1 - t, t)
    return noise - x0


@pytest.mark.parametrize(("sampler", "factor"), [("euler", 2), ("heun", 4)])
def test_global_error_falls_with_the_order_of_the_sampler(script_v3, sampler, factor):
    errors, (truth, _) = [], gaussian_flow((0, 1), (1, 0))
    for steps in (32, 64, 128, 256, 512):
        matrix, offset = affine_map(
            lambda noise, n=steps: script_v3.integrate(gaussian_velocity, noise, n, sampler)
        )
        # The mean moves on a straight line, which every step keeps to.
        torch.testing.assert_close(offset, MEAN)
        errors.append((matrix - truth).norm().item())
    ratios = np.array(errors[:-1]) / errors[1:]
    np.testing.assert_allclose(ratios, factor, rtol=0.1)
    np.testing.assert_allclose(ratios[-1], factor, rtol=0.01)


def test_interpolation_is_a_straight_line_from_data_to_noise(script_v3):
    x0, noise = torch.randn(2, 5, 2, 3, 3)
    t = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
    x = script_v3.interpolate(x0, noise, t.view(-1, 1, 1, 1))
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[-1], noise[-1])
    for row, s in enumerate(t.tolist()):
        torch.testing.assert_close(x[row], x0[row] + s * (noise[row] - x0[row]))
        torch.testing.assert_close(script_v3.interpolate(x0[row], noise[row], s), x[row])


# The loss is over classes that share one Gaussian, so that dropping a class changes nothing.
def loss_of(script, error):
    """Mean and standard error of the loss of a denoiser that errs by a constant."""
    losses, options = [], {"class_dropout": 0.1}
    denoiser = lambda x, t, classes: gaussian_velocity(x, t) + error  # noqa: E731
    for seed in range(20):
        rng = rng_of(script, seed)
        x0 = MEAN + EIGENVALUES.sqrt() * rng.randn(5000, 4).double() @ AXES.T
        labels, x0 = rng.randint(0, script.NULL_CLASS, 5000), x0[:, :, None, None]
        losses.append(script.rectified_flow_loss(denoiser, x0, labels, rng, **options).item())
    return np.mean(losses), np.std(losses, ddof=1) / np.sqrt(len(losses))


def test_loss_of_the_optimal_denoiser_is_the_unavoidable_one(script_v3):
    def unavoidable(u):  # at the time whose logit is u
        s = expit(u)
        unknown = [a / ((1 - s) ** 2 * a + s**2) for a in EIGENVALUES.tolist()]
        return norm.pdf(u) * np.mean(unknown)

    truth, _ = quad(unavoidable, -10, 10)
    loss, standard_error = loss_of(script_v3, 0)
    assert standard_error < 0.01 * truth
    assert abs(loss - truth) < 4 * standard_error
    erring, standard_error = loss_of(script_v3, 0.5)  # which costs its square
    assert abs(erring - loss - 0.5**2) < 4 * standard_error


def test_training_sees_noised_data_at_logit_normal_times_and_dropped_labels(script_v3):
    calls, null = [], script_v3.NULL_CLASS

    def denoiser(x, t, classes):
        calls.append((x, t, classes))
        return torch.zeros_like(x)

    x0 = torch.full((200_000, 1, 1, 1), 5.0)
    labels = torch.arange(len(x0)) % null
    script_v3.rectified_flow_loss(denoiser, x0, labels, rng_of(script_v3), class_dropout=0.1)
    [(x, t, classes)] = calls
    seen = classes.argmax(1)
    assert torch.equal(classes, torch.eye(null + 1)[seen])
    assert torch.equal(seen[seen != null], labels[seen != null])
    for label in range(null):  # no class is spared
        assert abs((seen[labels == label] == null).float().mean() - 0.1) < 0.01
    assert t.shape == (200_000,)
    assert 0 <= t.min() < 0.02
    assert 0.98 < t.max() <= 1
    shares = np.array([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    np.testing.assert_allclose(np.quantile(t, shares), expit(norm.ppf(shares)), atol=0.004)
    noise = (x.flatten() - (1 - t) * 5) / t
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(torch.corrcoef(torch.stack([noise, t]))[0, 1]) < 0.01


def test_guidance_weighs_the_denoisers_class_against_the_guides_none(script_v3):
    x = torch.randn(4, 2, 3, 3)
    classes = script_v3.class_weights(torch.tensor([0, 1, 9, script_v3.NULL_CLASS]))
    null = script_v3.class_weights(torch.full((4,), script_v3.NULL_CLASS))
    readout = torch.randn(classes.shape[1])

    def denoiser(x, t, classes):
        return torch.sin(x * (classes @ readout + 2 * t)[:, None, None, None])

    def guide(x, t, classes):
        return denoiser(x, t, classes) + 0.1

    def guided(scale, t=0.3):
        return script_v3.guided(denoiser, guide, classes, scale, 0.2, 0.7)(x, t)

    times = torch.full((4,), 0.3)
    conditional, unconditional = denoiser(x, times, classes), guide(x, times, null)
    assert torch.equal(guided(1.0), conditional)
    assert torch.equal(guided(0.0), unconditional)
    for scale in (0.3, 1.5, 4.0):
        expected = unconditional + scale * (conditional - unconditional)
        torch.testing.assert_close(guided(scale), expected)
    for t in (0.19, 0.71):  # outside the interval, where w is 1 at most
        times = torch.full((4,), t)
        assert torch.equal(guided(4.0, t), denoiser(x, times, classes))
        assert torch.equal(guided(0.0, t), guide(x, times, null))


@pytest.mark.parametrize("dim", [8, 64])
def test_timestep_embedding_tells_times_apart(script_v3, dim):
    times = torch.linspace(0, 1000, 2001)
    embedding = script_v3.timestep_embedding(times, dim)
    assert embedding.shape == (2001, dim)
    torch.testing.assert_close(embedding.norm(dim=1), torch.full((2001,), (dim / 2) ** 0.5))
    distances = torch.cdist(embedding.double(), embedding.double())
    apart = ~torch.eye(2001, dtype=torch.bool)  # half a unit and more
    assert distances[apart].min() > 0.05
    assert distances.diagonal(1).max() < 1  # and yet it is smooth
    assert distances[0, -1] > 10 * distances.diagonal(1).max() / dim


def test_slerp_keeps_the_norm_and_the_pace(script_v3):
    a, b = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    b *= a.norm() / b.norm()
    weight = torch.linspace(0, 1, 9, dtype=torch.float64)
    arc = script_v3.slerp(a, b, weight)
    assert arc.shape == (9, 3, 4, 4)
    torch.testing.assert_close(arc[0], a)
    torch.testing.assert_close(arc[-1], b)
    torch.testing.assert_close(arc.flatten(1).norm(dim=1), a.norm().expand(9))
    steps = torch.nn.functional.cosine_similarity(arc[:-1].flatten(1), arc[1:].flatten(1)).acos()
    torch.testing.assert_close(steps, steps[:1].expand(8))
