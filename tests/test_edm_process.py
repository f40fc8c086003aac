"""ImageDiffusionModel/UNet's process and samplers against the paper, another implementation and analytic truth.

References are written here, in numpy and float64, from Karras et al. 2022 ("the paper", arXiv 2206.00364). For data
x_0 ~ N(mu, Sigma) the ideal denoiser is D(x; sigma) = mu + Sigma (Sigma + sigma^2 I)^-1 (x - mu). The slope of its ODE,
(x - D) / sigma, is linear, and the solution from x at sigma is, along an eigenvector of Sigma of eigenvalue a,
mu + ((a + sigma_end^2) / (a + sigma^2))^(1/2) (x - mu).
"""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

from conftest import REPOSITORY, load_script
from networks import AXES, MEAN, affine_map

EIGENVALUES = torch.tensor([0.1, 0.5, 1.5, 3.0], dtype=torch.float64)
CHURN = {"s_churn": 6.0, "s_tmin": 0.05, "s_tmax": 20.0, "s_noise": 1.007}


@pytest.fixture(scope="module")
def script():
    return load_script(REPOSITORY / "ImageDiffusionModel" / "UNet" / "script_model_train_test.py")


def gaussian_denoiser(x, sigma, mean=MEAN):
    """D(x; sigma) as derived above, for x (B, 4, 1, 1), sigma a number or (B,), and mean (4,) or (B, 4)."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64).view(-1, 1)
    along_axes = (x.flatten(1).double() - mean) @ AXES
    return (mean + along_axes * EIGENVALUES / (EIGENVALUES + sigma**2) @ AXES.T)[:, :, None, None]


def wavy_denoiser(x, sigma):
    """No one's optimal denoiser, for torch and numpy alike: not linear, so that every detail of a sampler shows."""
    sine = torch.sin if isinstance(x, torch.Tensor) else np.sin
    return (0.3 + sine(3 * x) + x / 2) / (1 + sigma)


# ------------------------------------------------------------------------------------------ the paper's algorithms


def paper_levels(steps, sigma_min=0.002, sigma_max=80.0, rho=7):
    """Eq. 5."""
    i = np.arange(steps)
    ramp = sigma_max ** (1 / rho) + i / (steps - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
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
    """Algorithm 2; `draw` returns standard normal noise and is called where some is added. Returns x_0 ... x_N."""
    x, n = [t[0] * noise], len(t) - 1
    for i in range(n):
        gamma = min(s_churn / n, np.sqrt(2) - 1) if s_tmin <= t[i] <= s_tmax else 0
        t_hat, x_hat = t[i] + gamma * t[i], x[i]
        if gamma > 0:
            x_hat = x[i] + np.sqrt(t_hat**2 - t[i] ** 2) * s_noise * draw()
        d = (x_hat - denoiser(x_hat, t_hat)) / t_hat
        following = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (following - denoiser(following, t[i + 1])) / t[i + 1]
            following = x_hat + (t[i + 1] - t_hat) * (0.5 * d + 0.5 * d_prime)
        x.append(following)
    return x


@pytest.mark.parametrize("steps", [2, 7, 18, 100])
def test_noise_levels_are_those_of_the_paper(script, steps):
    np.testing.assert_allclose(script.noise_levels(steps), paper_levels(steps), rtol=1e-12)


def test_noise_levels_of_one_step(script):
    assert script.noise_levels(1) == [pytest.approx(80), 0]


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_deterministic_sampler_is_algorithm_1(script, steps):
    noise, sigmas = torch.randn(5, 1, 4, 4, dtype=torch.float64), script.noise_levels(steps)
    states = script.heun(wavy_denoiser, noise, sigmas)
    expected = paper_algorithm_1(wavy_denoiser, noise.numpy(), np.array(sigmas))
    assert len(states) == steps + 1
    for state, truth in zip(states, expected, strict=True):
        np.testing.assert_allclose(state.numpy(), truth, rtol=1e-10, atol=1e-12)


# With 18 steps and s_churn 6 the noise is not at its limit of sqrt(2) - 1, with 100 it is.
@pytest.mark.parametrize("changes", [{}, {"s_churn": 100.0}, {"s_tmin": 0.0, "s_tmax": 1e3}, {"s_noise": 0.9}])
def test_stochastic_sampler_is_algorithm_2(script, changes):
    noise, sigmas, churn = torch.randn(5, 1, 4, 4, dtype=torch.float64), script.noise_levels(18), CHURN | changes
    states = script.stochastic_heun(wavy_denoiser, noise, sigmas, torch.Generator().manual_seed(7), **churn)
    generator = torch.Generator().manual_seed(7)
    draw = lambda: torch.randn(noise.shape, generator=generator, dtype=torch.float64).numpy()  # noqa: E731
    expected = paper_algorithm_2(wavy_denoiser, noise.numpy(), np.array(sigmas), draw, **churn)
    for state, truth in zip(states, expected, strict=True):
        np.testing.assert_allclose(state.numpy(), truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changes", [{"s_churn": 0.0}, {"s_tmin": 100.0, "s_tmax": 1e3}])
def test_stochastic_sampler_without_noise_is_the_deterministic_one(script, changes):
    noise, sigmas, generator = torch.randn(5, 1, 4, 4), script.noise_levels(9), torch.Generator().manual_seed(7)
    before = generator.get_state()
    states = script.stochastic_heun(wavy_denoiser, noise, sigmas, generator, **(CHURN | changes))
    assert all(map(torch.equal, states, script.heun(wavy_denoiser, noise, sigmas)))
    assert torch.equal(generator.get_state(), before)


def exact_solution(sigma, sigma_end, mean=MEAN):
    """Matrix and offset of the ODE's solution from sigma times noise at sigma to sigma_end."""
    matrix = AXES * ((EIGENVALUES + sigma_end**2) / (EIGENVALUES + sigma**2)).sqrt() @ AXES.T
    return sigma * matrix, mean - matrix @ mean


@pytest.mark.parametrize(("sampler", "factor"), [("euler", 2), ("heun", 4)])
def test_global_error_falls_with_the_order_of_the_sampler(script, sampler, factor):
    def solve(noise, sigmas):
        state = sigmas[0] * noise
        for sigma, sigma_next in zip(sigmas, sigmas[1:]):
            state, _ = script.euler_step(gaussian_denoiser, state, sigma, sigma_next)
        return state

    if sampler == "heun":
        solve = lambda noise, sigmas: script.heun(gaussian_denoiser, noise, sigmas)[-1]  # noqa: E731
    errors = []
    for steps in (64, 128, 256, 512):
        sigmas = script.noise_levels(steps + 1)[:-1]  # ends above zero, where the slope is smooth
        matrix, offset = affine_map(lambda noise, sigmas=sigmas: solve(noise, sigmas))
        true_matrix, true_offset = exact_solution(sigmas[0], sigmas[-1])
        errors.append(((matrix - true_matrix).norm() + (offset - true_offset).norm()).item())
    ratios = np.array(errors[:-1]) / errors[1:]
    np.testing.assert_allclose(ratios, factor, rtol=0.1)
    np.testing.assert_allclose(ratios[-1], factor, rtol=0.02)


# ------------------------------------------------------------------------------------------------ preconditioning


@pytest.fixture
def small_denoiser(script):
    """A denoiser whose network does something at each of its inputs: trained ones don't start from zero."""
    denoiser = script.UNetDenoiser(8)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    return denoiser.eval()


def test_euler_steps_agree_with_diffusers(script, small_denoiser):
    from diffusers import EDMEulerScheduler

    classes = script.class_weights(torch.tensor([0, 3, script.NULL_CLASS]))
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=script.SIGMA_DATA, rho=7.0)
    scheduler.set_timesteps(12)
    sigmas, denoise = scheduler.sigmas.tolist(), script.guided(small_denoiser, classes, 1.0)
    np.testing.assert_allclose(sigmas, script.noise_levels(12), rtol=1e-5)
    state = sigmas[0] * torch.randn(3, 1, 28, 28)
    with torch.inference_mode():
        for t, sigma, sigma_next in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True):
            output = small_denoiser.network(scheduler.scale_model_input(state, t), t.repeat(3), classes)
            theirs = scheduler.step(output, t, state).prev_sample
            ours, _ = script.euler_step(denoise, state, sigma, sigma_next)
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()
            assert (ours - theirs).norm() < 1e-3 * (theirs - state).norm()  # the late steps are short
            state = theirs


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.7, 3.0, 80.0])
def test_input_and_target_have_unit_variance(script, sigma):
    """Eq. 117 and 123, for data of standard deviation sigma_data; c_skip makes c_out smallest, Eq. 124 to 131."""
    c_skip, c_out, c_in, c_noise = script.preconditioning(torch.full((100_000,), sigma, dtype=torch.float64))
    assert c_skip.shape == c_out.shape == c_in.shape == c_noise.shape == (100_000, 1, 1, 1)
    y = script.SIGMA_DATA * torch.randn(c_in.shape, dtype=torch.float64)
    x = y + sigma * torch.randn_like(y)
    target = (y - c_skip * x) / c_out  # Eq. 8
    assert (c_in * x).var().item() == pytest.approx(1, abs=0.02)
    assert target.var().item() == pytest.approx(1, abs=0.02)
    assert (target * c_in * x).mean().item() == pytest.approx(0, abs=0.02)  # c_out is smallest: no part of x is left
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
    x, sigma, classes = torch.randn(1, 1, 28, 28), torch.tensor([1.0]), script.class_weights(torch.tensor([3]))
    with torch.inference_mode():
        network = small_denoiser.network
        outputs = [
            network(*inputs)
            for inputs in (
                (x, sigma, classes),
                (x, 1.1 * sigma, classes),
                (x, sigma, script.class_weights(torch.tensor([4]))),
                (x.roll(2, dims=3), sigma, classes),
            )
        ]
    for other in outputs[1:]:
        assert (outputs[0] - other).norm() > 1e-3 * outputs[0].norm()
    assert (outputs[0].roll(2, dims=3) - outputs[3]).norm() > 1e-3 * outputs[3].norm()  # borders count


def test_sigma_data_is_that_of_the_training_images(script, real_data_dir):
    data = script.load_fashion_mnist(real_data_dir, 55_000, torch.device("cpu"))
    assert script.to_float(data.train_images).std().item() == pytest.approx(script.SIGMA_DATA, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------- loss

P_MEAN, P_STD = -0.7, 1.1


def loss_of(script, denoiser, x0, seed=0, labels=None, class_dropout=0.1):
    labels = torch.zeros(len(x0), dtype=torch.int64) if labels is None else labels
    noise = {"p_mean": P_MEAN, "p_std": P_STD}
    generator = torch.Generator().manual_seed(seed)
    return script.edm_loss(denoiser, x0, labels, generator, class_dropout=class_dropout, **noise).item()


def test_weight_of_the_loss_makes_every_noise_level_count_alike(script):
    """lambda(sigma) c_out(sigma)^2 = 1: where the network errs by e, at whatever sigma, the loss is e^2."""
    x0 = torch.full((2000, 1, 2, 2), 0.3)
    assert loss_of(script, lambda x, sigma, classes: x0, x0) == 0
    for some in (lambda sigma: sigma < 0.2, lambda sigma: sigma > 1, lambda sigma: sigma > 0):
        seen = []

        def denoiser(x, sigma, classes, some=some, seen=seen):
            _, c_out, _, _ = script.preconditioning(sigma)
            seen.append(some(sigma).float())
            return x0 + c_out * 0.5 * seen[0].view(-1, 1, 1, 1)

        loss = loss_of(script, denoiser, x0)
        assert 0.1 < seen[0].mean() <= 1
        assert loss == pytest.approx(0.25 * seen[0].mean().item(), rel=1e-5)


def gaussian_loss(script, denoiser):
    """Mean and standard error of the loss for x_0 ~ N(MEAN, Sigma)."""
    losses = []
    for seed in range(20):
        z = torch.randn(5000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + seed))
        x0 = (MEAN + z * EIGENVALUES.sqrt() @ AXES.T)[:, :, None, None]
        losses.append(loss_of(script, denoiser, x0, seed))
    return np.mean(losses), np.std(losses, ddof=1) / np.sqrt(len(losses))


@pytest.fixture(scope="module")
def least_loss(script):
    return gaussian_loss(script, lambda x, sigma, classes: gaussian_denoiser(x, sigma))


def test_loss_of_the_perfect_denoiser_is_the_unavoidable_one(script, least_loss):
    """What no denoiser can know is Cov(x_0 | x), which is a sigma^2 / (a + sigma^2) along an axis."""

    def unavoidable(z):
        sigma = np.exp(P_MEAN + P_STD * z)
        weight = (sigma**2 + script.SIGMA_DATA**2) / (sigma * script.SIGMA_DATA) ** 2
        return norm.pdf(z) * weight * np.mean([a * sigma**2 / (a + sigma**2) for a in EIGENVALUES.tolist()])

    truth, _ = quad(unavoidable, -8, 8)
    loss, standard_error = least_loss
    assert standard_error < 0.01 * truth
    assert abs(loss - truth) < 4 * standard_error


@pytest.mark.parametrize(
    "denoiser",
    [
        lambda x, sigma, classes: 0.9 * gaussian_denoiser(x, sigma),
        lambda x, sigma, classes: gaussian_denoiser(x, sigma) + 0.1,
        lambda x, sigma, classes: gaussian_denoiser(x, 1.3 * sigma),
        lambda x, sigma, classes: gaussian_denoiser(x, sigma / 1.3),
    ],
    ids=["shrunk", "shifted", "noise taken for more", "noise taken for less"],
)
def test_loss_of_any_other_denoiser_is_larger(script, least_loss, denoiser):
    # The same seeds give the same data and noise, so most of the Monte-Carlo error is common to both.
    assert gaussian_loss(script, denoiser)[0] > least_loss[0] + 0.005


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
    np.testing.assert_allclose(np.quantile(z, [0.05, 0.5, 0.95]), norm.ppf([0.05, 0.5, 0.95]), atol=0.05)
    noise = (x.flatten() - 5) / sigma
    np.testing.assert_allclose(np.quantile(noise, [0.05, 0.5, 0.95]), norm.ppf([0.05, 0.5, 0.95]), atol=0.05)
    assert abs(torch.corrcoef(torch.stack([noise, z]))[0, 1]) < 0.03
    seen = classes.argmax(1)
    assert torch.equal(classes, script.class_weights(seen))
    dropped = seen == script.NULL_CLASS
    assert torch.equal(seen[~dropped], labels[~dropped])
    assert abs(dropped.float().mean() - share) <= 4 * (share * (1 - share) / count) ** 0.5


def test_loss_depends_on_the_generator_alone(script):
    x0, state = torch.randn(8, 1, 2, 2), torch.get_rng_state()
    losses = [loss_of(script, lambda x, sigma, classes: x, x0, seed) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------------------------------------------- samples


class GaussianDenoiser:
    """The optimal denoiser where class k is N(k MEAN, Sigma), the null class too."""

    def __call__(self, x, sigma, classes):
        numbers = torch.arange(classes.shape[1], dtype=torch.float64)
        return gaussian_denoiser(x, sigma, (classes.double() @ numbers)[:, None] * MEAN)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("sampler", ["heun", "stochastic"])
def test_samples_are_of_their_class(script, sampler, guidance_scale):
    label, null = 3, script.NULL_CLASS
    config = script.Config(sampler=sampler, guidance_scale=guidance_scale, s_churn=0.0)

    def sample(noise):
        classes = script.class_weights(torch.full((len(noise),), label))
        return script.sample(GaussianDenoiser(), classes, noise, config, 400)[-1]

    matrix, offset = affine_map(sample)
    # The classes share a covariance, so guidance moves the mean along the line through both means and no more.
    mean = (null + guidance_scale * (label - null)) * MEAN
    true_matrix, true_offset = exact_solution(script.SIGMA_MAX, 0.0, mean)
    torch.testing.assert_close(matrix, true_matrix, atol=2e-3, rtol=0)
    torch.testing.assert_close(offset, true_offset, atol=2e-3 * null, rtol=0)


def test_fresh_noise_keeps_the_distribution_of_samples(script):
    """Algorithm 2 adds noise and removes it: with s_noise = 1 its samples are distributed as the data."""
    noise = torch.randn(20_000, 4, 1, 1, dtype=torch.float64)
    classes = script.class_weights(torch.ones(len(noise), dtype=torch.int64))
    churn = {"s_churn": 20.0, "s_tmin": 0.0, "s_tmax": 1e3, "s_noise": 1.0}
    ends = []
    for sampler in ("heun", "stochastic"):
        config = script.Config(sampler=sampler, guidance_scale=1.0, **churn)
        ends.append(script.sample(GaussianDenoiser(), classes, noise, config, 60)[-1].flatten(1))
    for end in ends:
        torch.testing.assert_close(end.mean(0), MEAN, atol=0.05, rtol=0)
        torch.testing.assert_close(torch.cov(end.T), AXES * EIGENVALUES @ AXES.T, atol=0.12, rtol=0)
    along = ((ends[1] - MEAN) * (ends[0] - MEAN)).mean() / EIGENVALUES.mean()
    assert along < 0.7  # much of what came out is not in the noise that went in


def test_fresh_noise_differs_from_batch_to_batch(script):
    classes = script.class_weights(torch.zeros(1, dtype=torch.int64))
    config = script.Config(sampler="stochastic", guidance_scale=1.0, s_tmin=0.0, s_tmax=1e3)
    a, b = torch.randn(2, 1, 4, 1, 1, dtype=torch.float64)
    linear = [script.sample(GaussianDenoiser(), classes, noise, config, 6)[-1] for noise in (a, b, (a + b) / 2, a)]
    assert torch.equal(linear[0], linear[3])
    # Were the fresh noise the same, the sampler would be one affine map.
    assert (linear[2] - (linear[0] + linear[1]) / 2).norm() > 0.05


def test_configuration_sets_the_number_of_steps(script):
    noise, classes = torch.zeros(1, 4, 1, 1).double(), script.class_weights(torch.tensor([0]))
    for sampler in ("heun", "stochastic"):
        config = script.Config(sampler=sampler, sampling_steps=3)
        assert len(script.sample(GaussianDenoiser(), classes, noise, config)) == 4
        assert len(script.sample(GaussianDenoiser(), classes, noise, config, 5)) == 6


@pytest.mark.parametrize("sampler", ["heun", "stochastic"])
def test_guidance_weighs_the_denoised_images(script, sampler):
    """The denoiser that the sampler sees is u + w (c - u)."""
    classes, w = script.class_weights(torch.tensor([1, 2])), 1.7
    null = script.class_weights(torch.full((2,), script.NULL_CLASS))
    config = script.Config(sampler=sampler, guidance_scale=w)
    readout = torch.randn(classes.shape[1])

    def denoiser(x, sigma, classes):
        return torch.sin(2 * x + (classes @ readout)[:, None, None, None]) / (1 + sigma[:, None, None, None])

    def combined(x, sigma, _):
        conditional, unconditional = denoiser(x, sigma, classes), denoiser(x, sigma, null)
        return unconditional + w * (conditional - unconditional)

    noise = torch.randn(2, 1, 4, 4)
    states = script.sample(denoiser, classes, noise, config, 5)
    plain = script.sample(combined, classes, noise, dataclasses.replace(config, guidance_scale=1.0), 5)
    torch.testing.assert_close(torch.stack(states), torch.stack(plain))
    assert (states[-1] - script.sample(denoiser, classes, noise, script.Config(), 5)[-1]).norm() > 0.01


def test_trajectories_are_scaled_to_the_contrast_of_the_data(script):
    """An untrained denoiser is D = c_skip x, which is ideal for N(0, sigma_data^2): its ODE only scales the noise."""
    config = script.Config(sampler="stochastic", guidance_scale=1.0)
    models = script.TrainedModels(script.UNetDenoiser(8).eval(), config, [])
    labels, steps, sigma_data = torch.tensor([0, 1]), 40, script.SIGMA_DATA
    states, noised, captions = script.draw_trajectories(models, labels, steps)
    noise, levels = models.noise(2), np.array(script.noise_levels(steps))
    assert states.shape == noised.shape == (steps + 1, 2, 1, 28, 28)
    assert torch.equal(noised[0], states[-1])  # no jump where the animation turns round
    # Deterministic whatever the configuration says, and of the data's contrast at each sigma.
    torch.testing.assert_close(states, (sigma_data * noise).expand_as(states), atol=0.03, rtol=0)
    for sigma, state in zip(levels, noised.flip(0), strict=True):
        expected = sigma_data / np.sqrt(sigma**2 + sigma_data**2) * (states[-1].double() + sigma * noise.double())
        torch.testing.assert_close(state, expected.float())
    assert torch.equal(models.decode(states[-1]), script.to_uint8(states[-1]))
    assert captions[0].endswith("= 80")
    assert captions[-1].endswith("= 0")
    values = np.array([float(caption.split("=")[1]) for caption in captions])
    np.testing.assert_allclose(values, levels, rtol=0.05)
