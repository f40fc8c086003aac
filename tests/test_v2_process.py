"""The process, the sampler and the autoencoder of LatentDiffusionModel/v2 against diffusers, torch and analytic truth.

For data x_0 ~ N(mu, Sigma) the state x_t = sqrt(a) x_0 + sqrt(1 - a) noise, a = alpha_bar, is Gaussian with covariance
C = a Sigma + (1 - a) I, and the best guess of x_0 is mu + sqrt(a) Sigma C^-1 (x - sqrt(a) mu). The probability-flow ODE
carries x - sqrt(a) mu in proportion to C^(1/2). Turning (noise, x_0) into (x_t, v) is a rotation, so along an
eigenvector of Sigma of eigenvalue e what no denoiser can know of v is Var(v | x_t) = e / c, with c = a e + 1 - a.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch.distributions import Laplace, Normal, kl_divergence

from conftest import REPOSITORY, draw_shapes, load_script
from networks import MEAN, perturb, without_gradient

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

EIGENVALUES = torch.tensor([0.05, 0.4, 1.5, 4.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def script():
    return load_script(REPOSITORY / "LatentDiffusionModel" / "v2" / "script_model_train_test.py")


@pytest.fixture(scope="module")
def alpha_bars(script):
    """At t = 0 ... T, in float64."""
    return script.cosine_alpha_bars()


# The schedule, and v


def test_cosine_schedule_is_that_of_diffusers(alpha_bars):
    betas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas
    assert alpha_bars.dtype == torch.float64
    assert alpha_bars[0] == 1
    assert alpha_bars[-1] > 0
    torch.testing.assert_close((1 - alpha_bars[1:] / alpha_bars[:-1]).float(), betas, rtol=1e-6, atol=1e-8)


def test_forward_process_and_v_are_those_of_diffusers(script, alpha_bars):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    x0, noise = torch.randn(2, 6, 3, 7, 7)
    t = torch.tensor([1, 2, 300, 500, 900, 1000])
    here = x0, noise, alpha_bars[t].float()
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


# The sampler


def smooth_v(x, i):
    """A denoiser's v without meaning, which depends on all that it is given."""
    return torch.sin(2 * x + 0.3 * i) - 0.4 * x.roll(1, -1) + 0.1 * x.mean(dim=(1, 2, 3), keepdim=True)


def trajectory_of_diffusers(noise, steps, v, **settings):
    """The states of DPM-Solver++(2M), and the alpha_bars that they are at, float64."""
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", algorithm_type="dpmsolver++", solver_order=2,
        solver_type="midpoint", timestep_spacing="trailing", lower_order_final=False, **settings,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    states = [noise]
    for i, t in enumerate(scheduler.timesteps):
        states.append(scheduler.step(v(states[-1], i), t, states[-1]).prev_sample)
    return states, 1 / (1 + scheduler.sigmas.double().square())


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [2, 3, 12, 30])
def test_solver_agrees_with_diffusers(script, steps, final_sigmas_type):
    noise = torch.randn(4, 3, 7, 7)
    expected, alpha_bars = trajectory_of_diffusers(noise, steps, smooth_v, final_sigmas_type=final_sigmas_type)

    def predict_x0(x, i):
        return script.x0_of_v(x, smooth_v(x, i), alpha_bars[i].to(x.dtype))

    states = script.dpm_solver_2m(predict_x0, noise, alpha_bars.tolist())
    assert len(states) == len(expected) == steps + 1
    assert torch.equal(states[0], noise)
    for found, state in zip(states, expected):
        assert (found - state).norm() < 1e-5 * state.norm()


@pytest.mark.parametrize("steps", [2, 12])
def test_samples_agree_with_diffusers(script, steps):
    """The whole of `sample`, with its own times and alphas, those of diffusers being of float32."""
    noise, config = torch.randn(4, 3, 7, 7), script.Config(guidance_scale=1.0, sampling_steps=steps)
    classes = script.class_weights(torch.arange(4))
    denoiser = lambda x, t, classes: smooth_v(x, t[:, None, None, None] / 100)  # noqa: E731
    times = script.sampling_times(steps)
    expected, _ = trajectory_of_diffusers(noise, steps, lambda x, i: smooth_v(x, times[i] / 100))
    states = script.sample(denoiser, classes, noise, config)
    assert len(states) == steps + 1
    for found, state in zip(states, expected):
        assert (found - state).norm() < 2e-4 * state.norm()


def gaussian_x0(x, a):
    """The best guess of x_0 derived above, for x (B, 4), the axes being the eigenvectors."""
    a = torch.as_tensor(a, dtype=torch.float64)
    return MEAN + a.sqrt() * EIGENVALUES / (a * EIGENVALUES + 1 - a) * (x - a.sqrt() * MEAN)


def gaussian_solution(x, a, a_next):
    """Where the ODE carries x (B, 4) from alpha_bar a to a_next."""
    before, after = [value * EIGENVALUES + 1 - value for value in (a, a_next)]
    return math.sqrt(a_next) * MEAN + (after / before).sqrt() * (x - math.sqrt(a) * MEAN)


def in_single_steps(script, predict_x0, noise, alpha_bars):
    """The solver started anew at each step, so that it has no past and is of first order."""
    x = noise
    for i, pair in enumerate(zip(alpha_bars, alpha_bars[1:])):
        x = script.dpm_solver_2m(lambda x, _, i=i: predict_x0(x, i), x, list(pair))[-1]
    return [x]


def order_of_convergence(solver, widths):
    """The orders that the error shows each time that the steps of log-SNR, of the relative `widths`, are halved."""
    noise, errors = torch.randn(20, 4, dtype=torch.float64), []
    for count in (32, 64, 128, 256, 512):
        steps = np.resize(widths, count)
        log_snr = -6 + 12 * np.concatenate([[0], np.cumsum(steps)]) / steps.sum()  # ends above zero noise
        a = (1 / (1 + np.exp(-log_snr))).tolist()
        end = solver(lambda x, i, a=a: gaussian_x0(x, a[i]), noise, a)[-1]
        assert end.dtype == torch.float64
        errors.append((end - gaussian_solution(noise, a[0], a[-1])).norm().item())
    return np.log2(np.array(errors[:-1]) / errors[1:])


@pytest.mark.parametrize("widths", [[1], [1, 2], [3, 1, 1]], ids=["uniform", "alternating", "uneven"])
def test_solver_is_of_second_order(script, widths):
    orders = order_of_convergence(script.dpm_solver_2m, widths)
    assert abs(orders[-1] - 2) < 0.1
    assert abs(orders[-2] - 2) < 0.2
    first = order_of_convergence(lambda *arguments: in_single_steps(script, *arguments), widths)
    assert abs(first[-1] - 1) < 0.1  # so that the test could fail


class GaussianDenoiser:
    """The optimal denoiser where class k is N(k MEAN, diag(EIGENVALUES)), the null class too."""

    def __init__(self, alpha_bars):
        self.alpha_bars = alpha_bars

    def __call__(self, x, t, classes):
        a = self.alpha_bars[t.long()][:, None]
        mean = classes.double().argmax(1)[:, None] * MEAN
        centred = x.flatten(1) - a.sqrt() * mean
        x0 = mean + a.sqrt() * EIGENVALUES / (a * EIGENVALUES + 1 - a) * centred
        return ((a.sqrt() * x.flatten(1) - x0) / (1 - a).sqrt())[:, :, None, None]


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5])
def test_samples_have_mean_and_variance_of_their_class(script, alpha_bars, guidance_scale):
    label, config = 3, script.Config(guidance_scale=guidance_scale)
    noise = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double()[:, :, None, None]
    classes = script.class_weights(torch.full((5,), label))
    end = script.sample(GaussianDenoiser(alpha_bars), classes, noise, config, 500)[-1].flatten(1)
    # The classes share a covariance, so guidance moves the mean along the line through both means and no more.
    mean = (script.NULL_CLASS + guidance_scale * (label - script.NULL_CLASS)) * MEAN
    torch.testing.assert_close(end[0], mean, atol=0.02, rtol=0)
    torch.testing.assert_close(end[1:] - end[0], EIGENVALUES.sqrt().diag(), atol=0.02, rtol=0)


def test_configuration_sets_the_number_of_steps(script, alpha_bars):
    config, noise = script.Config(sampling_steps=3), torch.zeros(1, 4, 1, 1).double()
    classes, denoiser = script.class_weights(torch.tensor([0])), GaussianDenoiser(alpha_bars)
    assert len(script.sample(denoiser, classes, noise, config)) == 4
    assert len(script.sample(denoiser, classes, noise, config, 5)) == 6


# The loss. All classes share one Gaussian, so that dropping a class changes nothing.


def test_loss_of_the_optimal_denoiser_is_the_unavoidable_one(script, alpha_bars):
    losses, errors = [], []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x0 = MEAN + EIGENVALUES.sqrt() * torch.randn(5000, 4, dtype=torch.float64, generator=generator)
        labels = torch.zeros(5000, dtype=torch.int64)

        def loss(offset, x0=x0, labels=labels, seed=seed):
            ideal = GaussianDenoiser(alpha_bars)
            one = script.class_weights(torch.ones_like(labels))
            denoiser = lambda x, t, classes: ideal(x, t, one) + offset  # noqa: E731
            generator = torch.Generator().manual_seed(seed)
            return script.v_prediction_loss(denoiser, x0[:, :, None, None], labels, generator, class_dropout=0.1).item()

        losses.append(loss(0.0))
        errors.append(loss(0.5) - losses[-1])
    a = alpha_bars[1:, None]
    truth = (EIGENVALUES / (a * EIGENVALUES + 1 - a)).mean().item()
    standard_error = np.std(losses, ddof=1) / np.sqrt(len(losses))
    assert standard_error < 0.01 * truth
    assert abs(np.mean(losses) - truth) < 4 * standard_error
    assert abs(np.mean(errors) - 0.5**2) < 0.01  # a constant error costs its square


def test_training_sees_the_forward_process_at_uniform_times_and_drops_labels(script, alpha_bars):
    calls, count = [], 20_000
    x0, labels = torch.full((count, 1, 1, 1), 5.0), torch.arange(count) % 10

    def denoiser(x, t, classes):
        calls.append((x.flatten(), t, classes.argmax(1)))
        return torch.zeros_like(x)

    script.v_prediction_loss(denoiser, x0, labels, torch.Generator().manual_seed(0), class_dropout=0.2)
    [(x, t, seen)] = calls
    assert (t.min(), t.max()) == (1, 1000)
    np.testing.assert_allclose(np.quantile(t, [0.1, 0.5, 0.9]), [100, 500, 900], atol=15)
    a = alpha_bars[t].float()
    noise = (x - 5 * a.sqrt()) / (1 - a).sqrt()
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    dropped = seen == script.NULL_CLASS
    assert abs(dropped.float().mean() - 0.2) < 0.015
    assert torch.equal(seen[~dropped], labels[~dropped])


# The autoencoder


@pytest.fixture
def autoencoder(script):
    """Small, its weights moved off their initial values. Fresh for each test."""
    return perturb(script.VariationalAutoencoder(latent_channels=3, width=16))


@pytest.fixture(scope="module")
def images():
    """uint8 (20, 1, 28, 28)."""
    return torch.from_numpy(draw_shapes(np.arange(20) % 10, np.random.default_rng(0)))[:, None]


def generator():
    return torch.Generator().manual_seed(0)


def test_reconstruction_is_of_a_draw_from_the_posterior(script, autoencoder, images):
    x = script.to_float(images)
    y, mean, log_variance = autoencoder(x, generator())
    noise = torch.randn(mean.shape, generator=generator())
    torch.testing.assert_close((mean, log_variance), autoencoder.posterior(x))
    torch.testing.assert_close(y, autoencoder.decoder(mean + log_variance.exp().sqrt() * noise))


@pytest.mark.parametrize("kl_weight", [0.0, 1.0, 0.3])
def test_elbo_is_made_of_the_densities_of_torch(script, autoencoder, images, kl_weight):
    with torch.no_grad():
        x = script.to_float(images)
        y, mean, log_variance = autoencoder(x, generator())
        likelihood = Laplace(y, autoencoder.log_scale.exp()).log_prob(x).sum(dim=(1, 2, 3))
        posterior, prior = Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)
        kl = kl_divergence(posterior, prior).sum(dim=(1, 2, 3))
        assert (kl > 1).all()
        expected = (kl_weight * kl - likelihood).mean()
        found = 784 * script.negative_elbo(autoencoder, images, generator(), kl_weight=kl_weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_elbo_is_least_at_the_scale_of_the_error(script, autoencoder, images):
    """The best scale of a Laplace distribution is the mean absolute error."""
    with torch.no_grad():
        x = script.to_float(images)
        error = (x - autoencoder(x, generator())[0]).abs().mean()
        autoencoder.log_scale.copy_(error.log())
    script.negative_elbo(autoencoder, images, generator(), kl_weight=1.0).backward()
    assert autoencoder.log_scale.grad.abs() < 1e-5
    autoencoder.zero_grad()
    with torch.no_grad():
        autoencoder.log_scale += 0.1
    script.negative_elbo(autoencoder, images, generator(), kl_weight=1.0).backward()
    assert autoencoder.log_scale.grad > 0.05


def test_gradient_reaches_every_parameter(script, autoencoder, images):
    script.negative_elbo(autoencoder, images, kl_weight=1.0).backward()
    assert without_gradient(autoencoder) == []
    denoiser = perturb(script.ConditionalLatentUNet(latent_channels=3, width=16))
    latents, classes = torch.randn(11, 3, 7, 7), script.class_weights(torch.arange(11))
    denoiser(latents, torch.linspace(1, 1000, 11), classes).square().mean().backward()
    assert without_gradient(denoiser) == []
    assert (denoiser.classes.weight.grad.abs().amax(dim=0) > 1e-8).all()  # each class, the null class too


def test_networks_start_at_nothing(script):
    denoiser = script.ConditionalLatentUNet(latent_channels=3, width=16)
    latents = torch.randn(11, 3, 7, 7)
    v = denoiser(latents, torch.linspace(1, 1000, 11), script.class_weights(torch.arange(11)))
    assert v.shape == latents.shape
    assert not v.any()
    block, x = script.ResidualBlock(16), torch.randn(2, 16, 7, 7)
    assert torch.equal(block(x), x)
    assert not torch.allclose(perturb(block)(x), x, atol=0.01)


def test_active_units_are_those_that_vary(script):
    base = torch.randn(500, 4, 7, 7, dtype=torch.float64)
    base = (base - base.mean(dim=0)) / base.std(dim=0)
    variance = torch.tensor([0.0, 0.0099, 0.0101, 2.0], dtype=torch.float64).view(1, 4, 1, 1)
    assert script.active_units(base * variance.sqrt() + 7) == 0.5
    assert script.active_units(torch.cat([base[:, :3], torch.full_like(base[:, :1], 3.0)], dim=1)) == 0.75


def moments_of_draws(posteriors):
    """Mean and variance a channel of many latents drawn from posteriors (N, 2C, 7, 7)."""
    mean, std = posteriors.double().chunk(2, dim=1)
    draws = mean + std * torch.randn(400, *mean.shape, dtype=torch.float64)
    return draws.mean(dim=(0, 1, 3, 4)), draws.var(dim=(0, 1, 3, 4))


def test_latents_drawn_from_standardised_posteriors_have_mean_0_and_variance_1(script, autoencoder, images):
    raw = script.encode_posteriors(autoencoder, images)
    mean, variance = moments_of_draws(raw)
    assert (mean.abs() > 0.05).any()
    assert ((variance - 1).abs() > 0.1).all()
    autoencoder.set_statistics(raw)
    mean, variance = moments_of_draws(script.encode_posteriors(autoencoder, images))
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=0.01, rtol=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=0.01, rtol=0)
    assert {"latent_mean", "latent_std"} <= set(autoencoder.state_dict())  # a checkpoint keeps them


def test_statistics_change_the_latents_and_not_the_images(script, autoencoder, images):
    x = script.to_float(images)
    with torch.no_grad():
        mean, log_variance = autoencoder.posterior(x)
        before = autoencoder.decode(autoencoder.encode(x))
        torch.testing.assert_close(before, autoencoder.decoder(mean))
        autoencoder.set_statistics(script.encode_posteriors(autoencoder, images))
        scaled = autoencoder.encode_posterior(x)
        torch.testing.assert_close(autoencoder.encode(x), scaled[:, :3])
        assert not torch.allclose(scaled[:, :3], mean, atol=0.1)
        torch.testing.assert_close(autoencoder.decode(scaled[:, :3]), before, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(autoencoder.posterior(x), (mean, log_variance))
        ratio = (log_variance / 2).exp() / scaled[:, 3:]
        torch.testing.assert_close(ratio, autoencoder.latent_std.expand_as(ratio))


def test_latents_are_drawn_anew_at_each_step(script):
    seen = []

    def loss_fn(denoiser, x0, *labels, generator=None):
        seen.append((denoiser, x0, labels))
        return torch.rand((), generator=generator)

    loss, labels = script.on_posteriors(loss_fn), torch.arange(1000)
    mean, std = torch.randn(1000, 3, 7, 7), torch.rand(1000, 3, 7, 7) + 0.5
    posteriors = torch.cat([mean, std], dim=1)
    values = [loss("denoiser", posteriors, labels, generator=generator()) for _ in range(2)]
    for _ in range(2):
        loss("denoiser", posteriors, labels)
    draws = [x0 for _, x0, _ in seen]
    assert all(denoiser == "denoiser" and torch.equal(given, labels) for denoiser, _, (given,) in seen)
    assert torch.equal(draws[0], draws[1])  # deterministic under a generator,
    assert values[0] == values[1]  # which the loss is given too
    noise = torch.stack([(x0 - mean) / std for x0 in draws[1:]]).flatten(1)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 0.03


# Trajectories


def test_trajectories_meet_at_both_ends(script, alpha_bars):
    config = script.Config(**{**script.QUICK, "latent_channels": 3})
    stages = script.build_stages(config, 100, torch.device("cpu"))
    models = script.TrainedModels.of_stages(stages, config, [])
    perturb(models.denoiser, 0.2)
    trajectories = script.draw_trajectories(models, torch.arange(10), 20)
    states, noised, noise = trajectories.states, trajectories.noised, models.noise(10)
    assert states.shape == noised.shape == (21, 10, 3, 7, 7)
    assert torch.equal(states[0], noise)
    expected = script.sample(models.denoiser, torch.eye(11)[:10], noise, config, 20)
    assert torch.equal(states, torch.stack(expected))
    assert torch.equal(noised[0], states[-1])  # the way out begins at the sample
    torch.testing.assert_close(noised[-1], noise, atol=1e-3, rtol=0)  # and ends in its noise
    times = [1000 - 50 * step for step in range(21)]
    assert trajectories.captions == [f"t = {t}" for t in times]
    for step, t in enumerate(reversed(times)):
        a = alpha_bars[t]
        expected = a.sqrt() * states[-1] + (1 - a).sqrt() * noise
        torch.testing.assert_close(noised[step], expected.float(), atol=1e-5, rtol=1e-5)
