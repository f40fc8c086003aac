"""ImageDiffusionModel/UNet's process and samplers against the paper, diffusers and analytic truth.

References are written here, in numpy and float64, from Karras et al. 2022 ("the paper", arXiv
2206.00364); the ideal denoiser of Gaussian data is E[x_0 | x] of networks.py, with alpha = 1.
"""

import diffusers
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from networks import (
    AXES,
    COVARIANCE,
    EIGENVALUES,
    MEAN,
    affine_map,
    gaussian_flow,
    gaussian_guesses,
    last,
    models_of,
    perturb,
    rng_of,
    states_of,
)
from script_runs import load_version

CPU = torch.device("cpu")
CHURN = {"s_churn": 6.0, "s_tmin": 0.05, "s_tmax": 20.0, "s_noise": 1.007}


@pytest.fixture(scope="module")
def script():
    return load_version("UNet")


def gaussian_denoiser(x, sigma, mean=MEAN):
    """D(x; sigma) for x (B, 4, 1, 1), sigma a number or (B,), and mean (4,) or (B, 4)."""
    return gaussian_guesses(x, 1.0, sigma, mean)[0]


def wavy_denoiser(x, sigma):
    """No one's optimal denoiser, for torch and numpy alike: not linear, so that every detail of a
    sampler shows."""
    sine = torch.sin if isinstance(x, torch.Tensor) else np.sin
    return (0.3 + sine(3 * x) + x / 2) / (1 + sigma)


# --- the paper's algorithms -----------------------------------------------------------------------


def paper_levels(steps, sigma_min=0.002, sigma_max=80.0, rho=7):
    """Eq. 5."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    ramp = first + np.arange(steps) / (steps - 1) * (last - first)
    return np.append(ramp**rho, 0.0)


def paper_algorithm_1(denoiser, noise, t):
    """Algorithm 1 with sigma(t) = t and s(t) = 1. Returns x_0 ... x_N."""
    x = [t[0] * noise]
    for i in range(len(t) - 1):
        d = x[i] / t[i] - denoiser(x[i], t[i]) / t[i]
        following = x[i] + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_prime = following / t[i + 1] - denoiser(following, t[i + 1]) / t[i + 1]
            following = x[i] + (t[i + 1] - t[i]) * (0.5 * d + 0.5 * d_prime)
        x.append(following)
    return x


def paper_algorithm_2(denoiser, noise, t, draw, s_churn, s_tmin, s_tmax, s_noise):
    """Algorithm 2; `draw` returns standard normal noise and is called where some is added. Returns
    x^_0 ... x^_N-1 and x_N."""
    x, n, raised = [t[0] * noise], len(t) - 1, []
    for i in range(n):
        gamma = min(s_churn / n, np.sqrt(2) - 1) if s_tmin <= t[i] <= s_tmax else 0
        t_hat, x_hat = t[i] + gamma * t[i], x[i]
        if gamma > 0:
            x_hat = x[i] + np.sqrt(t_hat**2 - t[i] ** 2) * s_noise * draw()
        raised.append(x_hat)
        d = (x_hat - denoiser(x_hat, t_hat)) / t_hat
        following = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (following - denoiser(following, t[i + 1])) / t[i + 1]
            following = x_hat + (t[i + 1] - t_hat) * (0.5 * d + 0.5 * d_prime)
        x.append(following)
    return [*raised, x[-1]]


@pytest.mark.parametrize("steps", [2, 7, 18, 100])
def test_noise_levels_are_those_of_the_paper(script, steps):
    np.testing.assert_allclose(script.noise_levels(steps), paper_levels(steps), rtol=1e-12)
    assert script.noise_levels(1) == [pytest.approx(80), 0]


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_deterministic_sampler_is_algorithm_1(script, steps):
    noise, sigmas = torch.randn(5, 1, 4, 4, dtype=torch.float64), script.noise_levels(steps)
    pairs = list(script.heun(wavy_denoiser, noise, sigmas))
    expected = paper_algorithm_1(wavy_denoiser, noise.numpy(), np.array(sigmas))
    for (state, guess), truth, sigma in zip(pairs, expected, sigmas, strict=True):
        np.testing.assert_allclose(state.numpy(), truth, rtol=1e-10, atol=1e-12)
        assert torch.equal(guess, wavy_denoiser(state, sigma) if sigma else state)


# With 18 steps and s_churn 6 the noise is not at its limit of sqrt(2) - 1, with 100 it is.
@pytest.mark.parametrize(
    "changes",
    [{}, {"s_churn": 100.0}, {"s_churn": 0.0}, {"s_tmin": 0.0, "s_tmax": 1e3}, {"s_noise": 0.9}],
)
def test_stochastic_sampler_is_algorithm_2(script, changes):
    noise, churn, generators = torch.randn(5, 1, 4, 4, dtype=torch.float64), CHURN | changes, []

    def drawing():
        generator = torch.Generator().manual_seed(7)
        generators.append(generator)
        return lambda: torch.randn(noise.shape, generator=generator, dtype=torch.float64)

    fresh, same, sigmas = drawing(), drawing(), script.noise_levels(18)
    pairs = list(script.heun(wavy_denoiser, noise, sigmas, fresh, **churn))
    draw = lambda: same().numpy()  # noqa: E731
    expected = paper_algorithm_2(wavy_denoiser, noise.numpy(), np.array(sigmas), draw, **churn)
    for (state, _), truth in zip(pairs, expected, strict=True):
        np.testing.assert_allclose(state.numpy(), truth, rtol=1e-10, atol=1e-12)
    for (state, guess), sigma in zip(pairs[:-1], sigmas):  # the guess is that of the state shown
        gamma = min(churn["s_churn"] / 18, np.sqrt(2) - 1)
        raised = 1 + gamma * (churn["s_tmin"] <= sigma <= churn["s_tmax"])
        torch.testing.assert_close(guess, wavy_denoiser(state, raised * sigma))
    assert torch.equal(*pairs[-1])
    assert torch.equal(*(generator.get_state() for generator in generators))


def test_global_error_is_of_second_order(script):
    errors = []
    for steps in (64, 128, 256, 512):
        sigmas = script.noise_levels(steps + 1)[:-1]  # ends above zero, where the slope is smooth
        found = affine_map(lambda x, levels=sigmas: script.heun(gaussian_denoiser, x, levels))
        matrix, offset = gaussian_flow((1, sigmas[0]), (1, sigmas[-1]))
        truth = sigmas[0] * matrix, offset  # the first state is sigma times the noise
        errors.append(sum((part - true).norm().item() for part, true in zip(found, truth)))
    ratios = np.array(errors[:-1]) / errors[1:]
    np.testing.assert_allclose(ratios, 4, rtol=0.1)
    np.testing.assert_allclose(ratios[-1], 4, rtol=0.02)


# --- preconditioning ------------------------------------------------------------------------------


@pytest.fixture
def small_denoiser(script):
    """A denoiser whose network makes something of each of its inputs, as a trained one does."""
    return perturb(script.UNetDenoiser(8), 0.2).eval()


def test_euler_steps_agree_with_diffusers(script, small_denoiser):
    """By the guess of each step: Heun's first half, without the correction."""
    classes = script.class_weights(torch.tensor([0, 3, script.NULL_CLASS]))
    levels = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": script.SIGMA_DATA, "rho": 7.0}
    scheduler = diffusers.EDMEulerScheduler(**levels)
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas.tolist()
    denoise = script.guided(small_denoiser, small_denoiser, classes, 1.0, 0.0, 80.0)
    np.testing.assert_allclose(sigmas, script.noise_levels(12), rtol=1e-5)
    state = sigmas[0] * torch.randn(3, 1, 28, 28)
    with torch.inference_mode():
        for t, sigma, sigma_next in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True):
            model_input = scheduler.scale_model_input(state, t)
            output = small_denoiser.network(model_input, t.repeat(3), classes)
            theirs = scheduler.step(output, t, state).prev_sample
            (_, guess), _ = script.heun(denoise, state / sigma, [sigma, 0.0])
            ours = guess + sigma_next / sigma * (state - guess)
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()
            short = (theirs - state).norm()  # the late steps are
            assert (ours - theirs).norm() < 1e-3 * short
            state = theirs


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.7, 3.0, 80.0])
def test_input_and_target_have_unit_variance(script, sigma):
    """Eq. 117 and 123, for data of standard deviation sigma_data; c_skip makes c_out smallest, Eq.
    124 to 131."""
    sigmas = torch.full((100_000, 1, 1, 1), sigma, dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = script.preconditioning(sigmas)
    y = script.SIGMA_DATA * torch.randn(c_in.shape, dtype=torch.float64)
    x = y + sigma * torch.randn_like(y)
    target = (y - c_skip * x) / c_out  # Eq. 8
    assert (c_in * x).var().item() == pytest.approx(1, abs=0.02)
    assert target.var().item() == pytest.approx(1, abs=0.02)
    left = (target * c_in * x).mean().item()  # of x: none, for c_out is smallest
    assert left == pytest.approx(0, abs=0.02)
    np.testing.assert_allclose(c_noise.flatten(), np.log(sigma) / 4)


def test_denoiser_is_the_preconditioned_network(script, small_denoiser):
    """Eq. 7."""
    sigma, sigma_data = np.array([0.01, 0.5, 30.0]), script.SIGMA_DATA
    x, classes = torch.randn(3, 1, 28, 28), script.class_weights(torch.tensor([0, 4, 10]))
    column = torch.tensor(sigma, dtype=torch.float32).view(3, 1, 1, 1)
    scale = (column**2 + sigma_data**2).sqrt()
    with torch.inference_mode():
        output = small_denoiser.network(x / scale, column.flatten().log() / 4, classes)
        denoised = small_denoiser(x, column.flatten(), classes)
    assert output.std() > 0.1
    expected = (sigma_data / scale) ** 2 * x + column * sigma_data / scale * output
    torch.testing.assert_close(denoised, expected)


def test_denoiser_uses_image_noise_level_and_class(script, small_denoiser):
    x, sigma = torch.randn(1, 1, 28, 28), torch.tensor([1.0])
    classes, others = script.class_weights(torch.tensor([3, 4])).split(1)
    changed = (x, 1.1 * sigma, classes), (x, sigma, others), (x.roll(2, dims=3), sigma, classes)
    with torch.inference_mode():
        output = small_denoiser.network(x, sigma, classes)
        outputs = [small_denoiser.network(*inputs) for inputs in changed]
    for other in (*outputs, outputs[-1].roll(-2, dims=3)):  # the last, since borders count
        assert (output - other).norm() > 1e-3 * output.norm()


def test_sigma_data_is_that_of_the_training_images(script, real_data_dir):
    data = script.load_fashion_mnist(script.Settings(data_dir=str(real_data_dir)), CPU)
    assert len(data.train_images) == 55_000
    measured = script.to_float(data.train_images).std().item()
    assert measured == pytest.approx(script.SIGMA_DATA, abs=1e-4)


# --- loss -----------------------------------------------------------------------------------------

P_MEAN, P_STD = -0.7, 1.1


def loss_of(script, denoiser, x0, seed=0, labels=None, class_dropout=0.1):
    labels = torch.zeros(len(x0), dtype=torch.int64) if labels is None else labels
    options = {"p_mean": P_MEAN, "p_std": P_STD, "class_dropout": class_dropout}
    return script.edm_loss(denoiser, x0, labels, rng_of(script, seed), **options).item()


def test_weight_of_the_loss_makes_every_noise_level_count_alike(script):
    """lambda(sigma) c_out(sigma)^2 = 1: where the network errs by e, at whatever sigma, the loss is
    e^2."""
    x0 = torch.full((2000, 1, 2, 2), 0.3)
    assert loss_of(script, lambda x, sigma, classes: x0, x0) == 0
    for some in (lambda sigma: sigma < 0.2, lambda sigma: sigma > 1, lambda sigma: sigma > 0):
        seen = []

        def denoiser(x, sigma, classes, some=some, seen=seen):
            _, c_out, _, _ = script.preconditioning(sigma.view(-1, 1, 1, 1))
            seen.append(some(sigma).float())
            return x0 + c_out * 0.5 * seen[0].view(-1, 1, 1, 1)

        loss = loss_of(script, denoiser, x0)
        assert 0.1 < seen[0].mean() <= 1
        assert loss == pytest.approx(0.25 * seen[0].mean().item(), rel=1e-5)


def test_loss_of_the_perfect_denoiser_is_the_unavoidable_one(script):
    """What no denoiser can know is Cov(x_0 | x): a sigma^2 / (a + sigma^2) along an axis."""

    def unavoidable(z):
        sigma = np.exp(P_MEAN + P_STD * z)
        weight = (sigma**2 + script.SIGMA_DATA**2) / (sigma * script.SIGMA_DATA) ** 2
        unknown = [a * sigma**2 / (a + sigma**2) for a in EIGENVALUES.tolist()]
        return norm.pdf(z) * weight * np.mean(unknown)

    losses, (truth, _) = [], quad(unavoidable, -8, 8)
    for seed in range(20):
        z = rng_of(script, 100 + seed).randn(5000, 4).double()
        x0 = (MEAN + z * EIGENVALUES.sqrt() @ AXES.T)[:, :, None, None]
        losses.append(loss_of(script, lambda x, sigma, _: gaussian_denoiser(x, sigma), x0, seed))
    standard_error = np.std(losses, ddof=1) / np.sqrt(len(losses))
    assert standard_error < 0.01 * truth
    assert abs(np.mean(losses) - truth) < 4 * standard_error


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_training_sees_noised_data_and_dropped_labels(script, share):
    calls, count = [], 20_000

    def denoiser(x, sigma, classes):
        calls.append((x, sigma, classes))
        return torch.zeros_like(x)

    labels = torch.randint(script.NULL_CLASS, (count,))
    loss_of(script, denoiser, torch.full((count, 1, 1, 1), 5.0), labels=labels, class_dropout=share)
    [(x, sigma, classes)] = calls
    z = (sigma.log() - P_MEAN) / P_STD
    noise, shares = (x.flatten() - 5) / sigma, [0.05, 0.5, 0.95]
    for normal in (z, noise):
        np.testing.assert_allclose(np.quantile(normal, shares), norm.ppf(shares), atol=0.05)
    assert abs(torch.corrcoef(torch.stack([noise, z]))[0, 1]) < 0.03
    seen = classes.argmax(1)
    assert torch.equal(classes, script.class_weights(seen))
    dropped = seen == script.NULL_CLASS
    assert torch.equal(seen[~dropped], labels[~dropped])
    assert abs(dropped.float().mean() - share) <= 4 * (share * (1 - share) / count) ** 0.5


# --- samples --------------------------------------------------------------------------------------


def class_denoiser(x, sigma, classes):
    """The optimal denoiser where class k is N(k MEAN, COVARIANCE), the null class too."""
    return gaussian_denoiser(x, sigma, classes.argmax(1)[:, None] * MEAN)


def drawing(script, shape, seed=0):
    """Fresh noise for states of that shape."""
    rng = rng_of(script, seed)
    return lambda: rng.randn(*shape).double()


def test_fresh_noise_keeps_the_distribution_of_samples(script):
    """Algorithm 2 adds noise and removes it: with s_noise = 1 its samples are distributed as the
    data."""
    noise = torch.randn(20_000, 4, 1, 1, dtype=torch.float64)
    classes = script.class_weights(torch.ones(len(noise), dtype=torch.int64))
    churn = {"s_churn": 20.0, "s_tmin": 0.0, "s_tmax": 1e3, "s_noise": 1.0}
    settings, ends = {"sampler": "stochastic", "guidance_scale": 1.0} | churn, []
    models = models_of(script, class_denoiser, **settings)
    for fresh in (None, drawing(script, noise.shape)):
        ends.append(last(script.sample(models, noise, classes, 60, fresh)).flatten(1))
    for end in ends:
        torch.testing.assert_close(end.mean(0), MEAN, atol=0.05, rtol=0)
        torch.testing.assert_close(torch.cov(end.T), COVARIANCE, atol=0.12, rtol=0)
    along = ((ends[1] - MEAN) * (ends[0] - MEAN)).mean() / EIGENVALUES.mean()
    assert along < 0.7  # much of what came out is not in the noise that went in


@pytest.mark.parametrize("s_churn", [0.0, 20.0])
def test_settings_say_how_much_noise_is_added(script, s_churn):
    churn = {"s_churn": s_churn, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 0.9}
    noise, classes = torch.randn(2, 1, 4, 4).double(), script.class_weights(torch.tensor([1, 2]))
    denoiser = lambda x, sigma, classes: wavy_denoiser(x, sigma.view(-1, 1, 1, 1))  # noqa: E731
    models = models_of(script, denoiser, sampler="stochastic", guidance_scale=1.0, **churn)
    denoise = script.guided(denoiser, denoiser, classes, 1.0, 0.0, 80.0)
    sigmas = script.noise_levels(8)
    fresh = drawing(script, noise.shape)
    expected = states_of(script.heun(denoise, noise, sigmas, fresh, **churn))
    states = states_of(script.sample(models, noise, classes, 8, drawing(script, noise.shape)))
    assert all(map(torch.equal, states, expected))
    plain = states_of(script.sample(models, noise, classes, 8))
    moved = (states[-1] - plain[-1]).norm()
    assert moved > 0.1 if s_churn else moved == 0
    models = models.with_settings(sampler="heun")
    heun = states_of(script.sample(models, noise, classes, 8, drawing(script, noise.shape)))
    assert all(map(torch.equal, heun, plain))
