"""The process, the sampler and the autoencoder of LatentDiffusionModel/v2 against diffusers, torch
and the Gaussian of networks.py.

Turning (noise, x_0) into (x_t, v) is a rotation, so along an eigenvector of Sigma of eigenvalue e
what no denoiser can know of v is Var(v | x_t) = e / c, with c = alpha_bar e + 1 - alpha_bar.
"""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from scipy.special import expit, logit
from scipy.stats import norm
from torch.distributions import Laplace, Normal, kl_divergence

from conftest import draw_shapes
from networks import (
    AXES,
    EIGENVALUES,
    MEAN,
    Denoiser,
    gaussian_flow,
    gaussian_guesses,
    last,
    models_of,
    perturb,
    rng_of,
    stages_of,
    states_of,
    without_gradient,
)
from script_runs import load_version

# of diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def script():
    return load_version("v2")


@pytest.fixture(scope="module")
def v1():
    return load_version("v1")


@pytest.fixture(scope="module")
def alpha_bars(script):
    """At t = 0 ... T, in float64."""
    return script.cosine_alpha_bars()


# --- the schedule, and v --------------------------------------------------------------------------


def test_cosine_schedule_is_that_of_diffusers(alpha_bars):
    betas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas
    assert alpha_bars.dtype == torch.float64 and alpha_bars[0] == 1 and alpha_bars[-1] > 0
    ours = (1 - alpha_bars[1:] / alpha_bars[:-1]).float()
    torch.testing.assert_close(ours, betas, rtol=1e-6, atol=1e-8)


def test_forward_process_and_v_are_those_of_diffusers(script, alpha_bars):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    x0, noise = torch.randn(2, 6, 3, 7, 7)
    t = torch.tensor([1, 2, 300, 500, 900, 1000])
    here = x0, noise, alpha_bars[t].float().view(-1, 1, 1, 1)
    for found, expected in (
        (script.diffuse(*here), scheduler.add_noise(x0, noise, t - 1)),  # which counts from 0
        (script.v_target(*here), scheduler.get_velocity(x0, noise, t - 1)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 7, 12, 64, 999, 1000])
def test_sampling_times_are_even_and_those_of_diffusers(script, steps):
    times = script.sampling_times(steps)
    scheduler = DPMSolverMultistepScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert times == [*(scheduler.timesteps + 1).tolist(), 0]
    assert times[0] == 1000
    np.testing.assert_allclose(times, np.linspace(1000, 0, steps + 1), atol=0.5)


# --- the sampler ----------------------------------------------------------------------------------


def smooth_v(x, i):
    """A denoiser's v without meaning, which depends on all that it is given."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return torch.sin(2 * x + 0.3 * i) - 0.4 * x.roll(1, -1) + 0.1 * mean


@pytest.mark.parametrize("steps", [2, 3, 12, 30])
def test_samples_agree_with_diffusers(script, steps):
    """The whole of `sample`, with its own times and alphas, those of diffusers being of float32."""
    noise, classes = torch.randn(4, 3, 7, 7), script.class_weights(torch.arange(4))
    denoiser = lambda x, t, classes: smooth_v(x, t[:, None, None, None] / 100)  # noqa: E731
    models = models_of(script, denoiser, guidance_scale=1.0, sampling_steps=steps)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", solver_order=2,
        algorithm_type="dpmsolver++", solver_type="midpoint", timestep_spacing="trailing",
        lower_order_final=False,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    expected, times = [noise], script.sampling_times(steps)
    for time, t in zip(times, scheduler.timesteps):
        v = smooth_v(expected[-1], time / 100)
        expected.append(scheduler.step(v, t, expected[-1]).prev_sample)
    states = states_of(script.sample(models, noise, classes))
    for found, state in zip(states, expected, strict=True):
        assert (found - state).norm() < 2e-4 * state.norm()


def order_of_convergence(solver, widths):
    """The orders that the error shows each time that the steps of log-SNR, of the relative
    `widths`, are halved."""
    noise, errors = torch.randn(20, 4, 1, 1, dtype=torch.float64), []
    for count in (32, 64, 128, 256, 512):
        steps = np.resize(widths, count)
        log_snr = -6 + 12 * np.concatenate([[0], np.cumsum(steps)]) / steps.sum()
        a = (1 / (1 + np.exp(-log_snr))).tolist()  # ends above zero noise
        levels = [(value**0.5, (1 - value) ** 0.5) for value in a]
        predict_x0 = lambda x, i, levels=levels: gaussian_guesses(x, *levels[i])[0]  # noqa: E731
        matrix, offset = gaussian_flow(levels[0], levels[-1])
        truth = noise.flatten(1) @ matrix.T + offset
        errors.append((last(solver(predict_x0, noise, a)).flatten(1) - truth).norm().item())
    return np.log2(np.array(errors[:-1]) / errors[1:])


@pytest.mark.parametrize("widths", [[1], [1, 2], [3, 1, 1]])
def test_solver_is_of_second_order(script, widths):
    orders = order_of_convergence(script.dpm_solver_2m, widths)
    assert abs(orders[-1] - 2) < 0.1
    assert abs(orders[-2] - 2) < 0.2


# --- the loss: all classes share one Gaussian, so that dropping a class changes nothing -----------


def test_loss_of_the_optimal_denoiser_is_the_unavoidable_one(script, alpha_bars):
    losses, errors, labels = [], [], torch.zeros(5000, dtype=torch.int64)

    def loss(x0, seed, offset):
        def denoiser(x, t, classes):
            a = alpha_bars[t].view(-1, 1, 1, 1)
            best, noise = gaussian_guesses(x, a.sqrt(), (1 - a).sqrt())
            return a.sqrt() * noise - (1 - a).sqrt() * best + offset

        network, rng = Denoiser(denoiser, alpha_bars.float()), rng_of(script, seed)
        return script.v_prediction_loss(network, x0, labels, rng, class_dropout=0.1).item()

    for seed in range(20):
        z = rng_of(script, 100 + seed).randn(5000, 4).double()
        x0 = (MEAN + EIGENVALUES.sqrt() * z @ AXES.T)[:, :, None, None]
        losses.append(loss(x0, seed, 0.0))
        errors.append(loss(x0, seed, 0.5) - losses[-1])
    a = alpha_bars[1:, None]
    unavoidable = (EIGENVALUES / (a * EIGENVALUES + 1 - a)).mean(dim=1)
    chances = np.diff(norm.cdf(logit(np.arange(1001) / 1000)))  # of t = 1 ... 1000
    truth = (unavoidable * torch.from_numpy(chances)).sum().item()
    standard_error = np.std(losses, ddof=1) / np.sqrt(len(losses))
    assert standard_error < 0.01 * truth
    assert abs(np.mean(losses) - truth) < 4 * standard_error
    assert abs(np.mean(errors) - 0.5**2) < 0.01  # a constant error costs its square


def test_training_sees_the_forward_process_at_logit_normal_times_and_drops_labels(
    script, alpha_bars
):
    calls, count = [], 20_000
    x0, labels = torch.full((count, 1, 1, 1), 5.0), torch.arange(count) % 10

    def denoiser(x, t, classes):
        calls.append((x.flatten(), t, classes.argmax(1)))
        return torch.zeros_like(x)

    network = Denoiser(denoiser, alpha_bars.float())
    script.v_prediction_loss(network, x0, labels, rng_of(script), class_dropout=0.2)
    [(x, t, seen)] = calls
    assert t.dtype == torch.int64 and 1 <= t.min() < 40 and 960 < t.max() <= 1000
    shares = np.array([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    times = 1000 * expit(norm.ppf(shares))
    np.testing.assert_allclose(np.quantile(t, shares), times, atol=10)
    a = alpha_bars[t].float()
    noise = (x - 5 * a.sqrt()) / (1 - a).sqrt()
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    dropped = seen == script.NULL_CLASS
    assert abs(dropped.float().mean() - 0.2) < 0.015
    assert torch.equal(seen[~dropped], labels[~dropped])


# --- the autoencoder ------------------------------------------------------------------------------


@pytest.fixture
def autoencoder(script):
    """Small, its weights moved off their initial values. Fresh for each test."""
    return perturb(script.VariationalAutoencoder(latent_channels=3, width=16))


@pytest.fixture(scope="module")
def images(script):
    """(20, 1, 28, 28) in [-1, 1]."""
    drawn = draw_shapes(np.arange(20) % 10, np.random.default_rng(0))
    return script.to_float(torch.from_numpy(drawn)[:, None])


def parts_of_elbo(script, autoencoder, images):
    """Reconstructions, and mean and log-variance of the posteriors, by the loss's own draw."""
    mean, log_variance = autoencoder.gaussian(images)
    noise = rng_of(script).randn(*mean.shape)
    return autoencoder.decoder(mean + log_variance.exp().sqrt() * noise), mean, log_variance


def elbo_of(script, autoencoder, images, kl_weight=1.0):
    """The negative ELBO, whose parts are those of likelihood and divergence."""
    parts = script.negative_elbo(autoencoder, images, rng_of(script), kl_weight=kl_weight)
    assert list(parts) == ["-log p(x | z)", "KL divergence"]
    return sum(parts.values())


@pytest.mark.parametrize("kl_weight", [0.0, 1.0, 0.3])
def test_elbo_is_made_of_the_densities_of_torch(script, autoencoder, images, kl_weight):
    with torch.no_grad():
        y, mean, log_variance = parts_of_elbo(script, autoencoder, images)
        likelihood = Laplace(y, autoencoder.log_scale.exp()).log_prob(images).sum(dim=(1, 2, 3))
        posterior, prior = Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)
        kl = kl_divergence(posterior, prior).sum(dim=(1, 2, 3))
        assert (kl > 1).all()
        expected = (kl_weight * kl - likelihood).mean()
        loss = elbo_of(script, autoencoder, images, kl_weight)
    torch.testing.assert_close(784 * loss, expected, rtol=1e-5, atol=0)


def test_gradient_reaches_every_parameter(script, autoencoder, images):
    elbo_of(script, autoencoder, images).backward()
    assert without_gradient(autoencoder) == []
    denoiser = perturb(script.ConditionalLatentUNet(latent_channels=3, width=16))
    latents, classes = torch.randn(11, 3, 7, 7), script.class_weights(torch.arange(11))
    denoiser(latents, torch.linspace(1, 1000, 11), classes).square().mean().backward()
    assert without_gradient(denoiser) == []
    by_class = denoiser.classes.weight.grad.abs().amax(dim=0)  # the null class too
    assert (by_class > 1e-8).all()


def test_networks_start_at_nothing(script):
    denoiser = script.ConditionalLatentUNet(latent_channels=3, width=16)
    latents = torch.randn(11, 3, 7, 7)
    v = denoiser(latents, torch.linspace(1, 1000, 11), script.class_weights(torch.arange(11)))
    assert v.shape == latents.shape
    assert not v.any()
    assert torch.equal(denoiser.alpha_bars, script.cosine_alpha_bars().float())
    assert "alpha_bars" not in denoiser.state_dict()  # the same for ever
    block, x = script.ResidualBlock(16), torch.randn(2, 16, 7, 7)
    assert torch.equal(block(x), x)
    assert not torch.allclose(perturb(block)(x), x, atol=0.01)


def test_active_units_are_those_that_vary(v1):
    base = torch.randn(500, 4, 7, 7, dtype=torch.float64)
    base = (base - base.mean(dim=0)) / base.std(dim=0)
    variance = torch.tensor([0.0, 0.0099, 0.0101, 2.0], dtype=torch.float64).view(1, 4, 1, 1)
    assert v1.active_units(base * variance.sqrt() + 7) == 0.5
    constant = torch.full_like(base[:, :1], 3.0)
    assert v1.active_units(torch.cat([base[:, :3], constant], dim=1)) == 0.75


def moments_of_draws(posteriors):
    """Mean and variance a channel of many latents drawn from posteriors (N, 2C, 7, 7)."""
    mean, std = posteriors.double().chunk(2, dim=1)
    draws = mean + std * torch.randn(400, *mean.shape, dtype=torch.float64)
    return draws.mean(dim=(0, 1, 3, 4)), draws.var(dim=(0, 1, 3, 4))


@torch.no_grad()
def test_latents_drawn_from_standardised_posteriors_have_mean_0_and_variance_1(autoencoder, images):
    raw = autoencoder.posterior(images)
    mean, variance = moments_of_draws(raw)
    assert (mean.abs() > 0.05).any()
    assert ((variance - 1).abs() > 0.1).all()
    torch.testing.assert_close(autoencoder.standardise(raw), raw)  # before there are statistics
    autoencoder.set_statistics(raw)
    torch.testing.assert_close(autoencoder.posterior(images), raw)  # as it is trained
    mean, variance = moments_of_draws(autoencoder.standardise(raw))
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=0.01, rtol=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=0.01, rtol=0)
    assert {"latent_mean", "latent_std"} <= set(autoencoder.state_dict())  # a checkpoint keeps them


@torch.no_grad()
def test_statistics_change_the_latents_and_not_the_images(autoencoder, images):
    mean, log_variance = autoencoder.gaussian(images)
    before = autoencoder.decode(autoencoder.encode(images))
    torch.testing.assert_close(before, autoencoder.decoder(mean))
    posteriors = autoencoder.posterior(images)
    torch.testing.assert_close(posteriors, torch.cat([mean, (log_variance / 2).exp()], dim=1))
    autoencoder.set_statistics(posteriors)
    scaled = autoencoder.standardise(posteriors)
    torch.testing.assert_close(autoencoder.encode(images), scaled[:, :3])
    assert not torch.allclose(scaled[:, :3], mean, atol=0.1)
    torch.testing.assert_close(autoencoder.decode(scaled[:, :3]), before, atol=1e-4, rtol=1e-4)
    ratio = posteriors[:, 3:] / scaled[:, 3:]
    torch.testing.assert_close(ratio, autoencoder.latent_std.expand_as(ratio))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_latents_are_drawn_from_the_posteriors_anew_at_each_step(version, script, v1):
    module, seen = {"v1": v1, "v2": script}[version], []
    mean, std = torch.randn(1000, 3, 7, 7), torch.rand(1000, 3, 7, 7) + 0.5
    posteriors = torch.cat([mean, std], dim=1)
    draws = [module.draw_latents(posteriors, rng_of(module, seed)) for seed in (0, 0, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    noise = torch.stack([(draw - mean) / std for draw in draws[1:]]).flatten(1)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 0.03

    def denoiser(x, t, *classes):
        seen.append((x, t))
        return 0 * x

    # The loss of stage 2 sees such draws: of variance a std^2 + 1 - a, but for their mean.
    loss = stages_of(module)["diffusion"].loss
    posteriors = torch.tensor([0.0, 3.0]).repeat_interleave(3).view(1, 6, 1, 1)
    labels = [torch.zeros(5000).long()] * module.CONDITIONAL
    schedule = module.linear_alpha_bars if module is v1 else module.cosine_alpha_bars
    alpha_bars = schedule().float()
    network = Denoiser(denoiser, alpha_bars)
    loss(network, posteriors.expand(5000, -1, 7, 7), *labels, rng_of(module))
    [(x, t)] = seen
    a = alpha_bars[t].view(-1, 1, 1, 1)
    assert abs((x / (9 * a + 1 - a).sqrt()).std() - 1) < 0.01
