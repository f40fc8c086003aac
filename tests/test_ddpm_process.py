"""The denoisers, the process and the samplers of ImageDiffusionModel/CNN and LatentDiffusionModel/v1 against the truth.

For data x_0 ~ N(mu, Sigma) the state x_t = sqrt(a) x_0 + sqrt(1 - a) noise, a = alpha_bar, is Gaussian too, so the best
guess of the noise is affine, sqrt(1 - a) C^-1 (x - sqrt(a) mu) with C = a Sigma + (1 - a) I, and so is every sampler.
With s = sqrt((1 - a) / a), DDIM's equation reads d(x / sqrt(a)) = noise ds; its solution moves x / sqrt(a) - mu in
proportion to (Sigma + s^2)^(1/2).
"""

import dataclasses

import diffusers
import numpy as np
import pytest
import torch

from conftest import REPOSITORY, load_script
from networks import AXES, COVARIANCE, EIGENVALUES, MEAN, affine_map, perturb, without_gradient


@pytest.fixture(scope="module")
def cnn():
    return load_script(REPOSITORY / "ImageDiffusionModel" / "CNN" / "script_model_train_test.py")


@pytest.fixture(scope="module")
def v1():
    return load_script(REPOSITORY / "LatentDiffusionModel" / "v1" / "script_model_train_test.py")


@pytest.fixture(scope="module")
def alpha_bars(cnn):
    """At t = 0 ... T, in float64."""
    return cnn.linear_alpha_bars()


def gaussian_noise(x, a):
    """The best guess of the noise in x (B, 4, 1, 1) for the Gaussian data above, in float64."""
    along_axes = (x.flatten(1) - a**0.5 * MEAN) @ AXES
    return ((1 - a) ** 0.5 / (a * EIGENVALUES + 1 - a) * along_axes @ AXES.T)[:, :, None, None]


def gaussian_predict(alpha_bars):
    """What the samplers ask for: x_0 and the noise in x at alpha_bars[i]."""

    def predict(x, i):
        a, noise = alpha_bars[i], gaussian_noise(x, alpha_bars[i])
        return (x - (1 - a) ** 0.5 * noise) / a**0.5, noise

    return predict


# ---------------------------------------------------------------------------------------------------------- the models


def denoisers(cnn, v1):
    """Both denoisers at their default size, and an input of each."""
    config = cnn.Config()
    yield cnn.ConvolutionalDenoiser(config.width, config.blocks), torch.randn(3, 1, 28, 28)
    config = v1.Config()
    yield v1.UnconditionalLatentUNet(config.latent_channels, config.width), torch.randn(3, config.latent_channels, 7, 7)


def test_denoisers_start_at_the_guess_for_white_data_and_see_everything(cnn, v1, alpha_bars):
    t = torch.tensor([1, 400, 1000])
    for denoiser, x in denoisers(cnn, v1):
        white = (1 - alpha_bars[t]).sqrt().float()[:, None, None, None] * x  # E[noise | x_t] for x_0 ~ N(0, I)
        torch.testing.assert_close(denoiser(x, t), white, rtol=1e-4, atol=1e-6)
        perturb(denoiser)
        x.requires_grad_()
        out = denoiser(x, t)
        (corner,) = torch.autograd.grad(out[0, 0, 0, 0], x, retain_graph=True)
        assert corner[0].abs().min() > 0  # every pixel counts for the one in the corner
        assert corner[1:].abs().max() == 0  # examples do not see each other
        out.square().sum().backward()
        assert without_gradient(denoiser) == []
        moved = (denoiser(x, t.flip(0)) - out).abs().amax(dim=(1, 2, 3))
        assert moved[[0, 2]].min() > 1e-3


# ----------------------------------------------------------------------------------------------- process and its loss


def test_alpha_bars_are_those_of_the_paper_and_of_diffusers(alpha_bars):
    assert alpha_bars.dtype == torch.float64
    assert alpha_bars[0] == 1
    truth = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(alpha_bars[1:], truth, rtol=1e-12)
    theirs = diffusers.DDPMScheduler(beta_schedule="linear").alphas_cumprod  # of single precision
    np.testing.assert_allclose(alpha_bars[1:], theirs, rtol=1e-5)


def test_data_can_be_had_from_the_state_and_its_noise(cnn, alpha_bars):
    x0, noise = torch.randn(2, 1001, 1, 4, 4, dtype=torch.float64)
    x, a = cnn.diffuse(x0, noise, alpha_bars), alpha_bars[:, None, None, None]
    torch.testing.assert_close(x, a.sqrt() * x0 + (1 - a).sqrt() * noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cnn.x0_of_noise(x, noise, alpha_bars), x0, rtol=0, atol=1e-11)
    v = a.sqrt() * noise - (1 - a).sqrt() * x0
    told = cnn.noise_of_output(x[1:].float(), v[1:].float(), torch.arange(1, 1001))
    torch.testing.assert_close(told, noise[1:].float(), rtol=0, atol=1e-5)


def test_loss_is_the_squared_error_of_the_noise_at_all_times(cnn, alpha_bars):
    x0, calls = torch.linspace(-1, 1, 100_000)[:, None, None, None], []

    def perfect(x, t):
        a = alpha_bars[t][:, None, None, None]
        noise = ((x - a.sqrt() * x0) / (1 - a).sqrt()).float()
        calls.append((t, noise.flatten()))
        return noise

    state = torch.get_rng_state()
    losses = [
        cnn.noise_prediction_loss(denoiser, x0, torch.Generator().manual_seed(0)).item()
        for denoiser in (perfect, lambda x, t: perfect(x, t) + 0.5, lambda x, t: torch.zeros_like(x))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(losses, [0, 0.25, calls[0][1].square().mean()], rtol=1e-3, atol=1e-6)
    t, noise = calls[0]
    counts = torch.bincount(t, minlength=1001)
    assert len(counts) == 1001  # none above T
    assert counts[0] == 0
    assert counts[1:].min() > 50  # of 100 on average
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.01


def test_loss_of_images_is_that_of_their_pixels_from_minus_one_to_one(cnn):
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    pixels = torch.linspace(-1, 1, 256).view(4, 1, 8, 8)
    wrapped = cnn.on_images(lambda denoiser, x, *labels, generator: (denoiser, x, labels, generator))
    denoiser, x, labels, generator = wrapped("denoiser", images, "labels", generator="generator")
    torch.testing.assert_close(x, pixels)
    assert (denoiser, labels, generator) == ("denoiser", ("labels",), "generator")


# -------------------------------------------------------------------------------------------------------- the samplers


def warped_noise(x, t, alpha_bars):
    """A denoiser that is neither affine nor right, but keeps the states bounded."""
    return gaussian_noise(x, alpha_bars[t].item()) + 0.3 * torch.sin(3 * x + t / 100)


def scheduler_like(kind, alpha_bars, **options):
    """A scheduler of diffusers with these alpha_bars; its t counts from 0."""
    scheduler = kind(num_train_timesteps=1000, clip_sample=False, timestep_spacing="trailing", **options)
    scheduler.alphas_cumprod = alpha_bars[1:]
    return scheduler


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("t", [1, 2, 10, 300, 999, 1000])
def test_an_ancestral_step_is_that_of_diffusers(cnn, alpha_bars, t, variance):
    scheduler = scheduler_like(diffusers.DDPMScheduler, alpha_bars, variance_type=f"fixed_{variance}")
    x = torch.randn(5, 4, 1, 1, dtype=torch.float64)
    noise, two = warped_noise(x, t, alpha_bars), alpha_bars[[t, t - 1]].tolist()
    [_, state] = cnn.ancestral(lambda x, i: (None, noise), x, two, variance, torch.Generator().manual_seed(3))
    expected = scheduler.step(noise, t - 1, x, generator=torch.Generator().manual_seed(3)).prev_sample
    assert (state - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (diffusers.DDPMScheduler, {"sampler": "ancestral", "variance": "small"}),
        (diffusers.DDPMScheduler, {"sampler": "ancestral", "variance": "large"}),
        (diffusers.DDIMScheduler, {"sampling_steps": 20, "eta": 0.0}),
        (diffusers.DDIMScheduler, {"sampling_steps": 20, "eta": 0.6}),
        (diffusers.DDIMScheduler, {"sampling_steps": 20, "eta": 1.0}),
    ],
    ids=["ancestral small", "ancestral large", "DDIM", "DDIM eta 0.6", "DDIM eta 1"],
)
def test_samples_are_those_of_diffusers(cnn, v1, alpha_bars, kind, changes):
    """The same denoiser, noise and alphas, through all that a configuration decides."""
    config, options = dataclasses.replace(cnn.Config(), **changes), {}
    steps, arguments = 1000, {}
    if kind is diffusers.DDPMScheduler:
        options["variance_type"] = f"fixed_{config.variance}"
    else:
        steps, arguments = config.sampling_steps, {"eta": config.eta}
    scheduler = scheduler_like(kind, alpha_bars, **options)
    scheduler.set_timesteps(steps)
    noise = torch.randn(5, 4, 1, 1, dtype=torch.float64)
    expected, generator = [noise], cnn.fresh_noise(noise)
    for t in scheduler.timesteps:
        predicted = warped_noise(expected[-1], t + 1, alpha_bars)
        expected.append(scheduler.step(predicted, t, expected[-1], generator=generator, **arguments).prev_sample)

    def denoiser(x, t):
        assert t.shape == (5,)
        assert (t == t[0]).all()
        return warped_noise(x, t[0], alpha_bars)

    runs = [cnn.sample(denoiser, noise, config)]
    if kind is diffusers.DDIMScheduler:
        runs.append(v1.sample(denoiser, noise, dataclasses.replace(v1.Config(), **changes)))
        assert len(runs[0]) == len(runs[1]) == len(expected)
    for states in runs:
        assert torch.equal(states[0], noise)
        for state, other in zip(states, expected if len(states) == len(expected) else [expected[0], expected[-1]]):
            assert (state - other).norm() <= 1e-5 * other.norm()


def test_ddim_is_of_first_order(cnn):
    """From alpha_bar = 1e-4 to 0.999, evenly in the angle whose squared cosine alpha_bar is."""
    first, last, errors = 1e-4, 0.999, []
    spread = [EIGENVALUES + (1 - a) / a for a in (first, last)]
    exact = (last / first) ** 0.5 * (AXES * (spread[1] / spread[0]) ** 0.5 @ AXES.T)
    for steps in (32, 64, 128, 256, 512):
        angles = torch.linspace(np.arccos(first**0.5), np.arccos(last**0.5), steps + 1, dtype=torch.float64)
        levels = angles.cos().square().tolist()
        matrix, offset = affine_map(lambda noise, levels=levels: cnn.ddim(gaussian_predict(levels), noise, levels)[-1])
        exact_offset = last**0.5 * MEAN - exact @ (first**0.5 * MEAN)
        errors.append([(matrix - exact).norm().item(), (offset - exact_offset).norm().item()])
    ratios = np.array(errors[:-1]) / errors[1:]
    np.testing.assert_allclose(ratios, 2, rtol=0.1)
    np.testing.assert_allclose(ratios[-1], 2, rtol=0.01)


def discrete_chain(variance):
    """Mean (4,) and covariance (4, 4) that the chain ends in, by the posterior q(x_t-1 | x_t, x_0), Eq. 7, in numpy."""
    betas = np.linspace(1e-4, 0.02, 1000)
    a = np.concatenate([[1], np.cumprod(1 - betas)])
    values, mu = EIGENVALUES.numpy(), (MEAN @ AXES).numpy()
    mean, spread = np.zeros(4), np.ones(4)
    for t in range(1000, 0, -1):
        beta = betas[t - 1]
        of_x0 = np.sqrt(a[t - 1]) * beta / (1 - a[t])
        of_x = np.sqrt(1 - beta) * (1 - a[t - 1]) / (1 - a[t])
        gain = np.sqrt(a[t]) * values / (a[t] * values + 1 - a[t])  # x_0 = mu + gain (x - sqrt(a) mu)
        mean = of_x0 * (mu + gain * (mean - np.sqrt(a[t]) * mu)) + of_x * mean
        spread = (of_x0 * gain + of_x) ** 2 * spread
        if t > 1:
            spread += beta if variance == "large" else (1 - a[t - 1]) / (1 - a[t]) * beta
    axes = AXES.numpy()
    return axes @ mean, axes * spread @ axes.T


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_ancestral_chain_has_the_mean_and_covariance_of_its_process(cnn, alpha_bars, variance, monkeypatch):
    levels = alpha_bars.flip(0).tolist()

    def run(levels, fresh):  # with fresh noise that is `fresh` everywhere
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", lambda shape, generator, dtype: torch.full(shape, fresh, dtype=dtype))
            return affine_map(lambda x: cnn.ancestral(gaussian_predict(levels), x, levels, variance, None)[-1])

    mean, covariance = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    for pair in zip(levels, levels[1:]):
        matrix, offset = run(pair, 0.0)
        sigma = run(pair, 1.0)[1] - offset
        mean, covariance = matrix @ mean + offset, matrix @ covariance @ matrix.T + torch.diag(sigma.square())
    expected_mean, expected_covariance = discrete_chain(variance)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(covariance, expected_covariance, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(run(levels, 0.0)[1], expected_mean, rtol=1e-8, atol=1e-10)  # the whole chain at once
    np.testing.assert_allclose(mean, MEAN, atol=0.02)
    np.testing.assert_allclose(covariance, COVARIANCE, atol=0.05)


def test_fresh_noise_repeats_for_the_same_start_only(cnn, v1):
    """Else all chunks of many samples would get the same."""
    noise = torch.randn(2, 50, 1, 28, 28)
    config = dataclasses.replace(cnn.Config(), sampler="ancestral")
    configs = [(cnn, config), (cnn, dataclasses.replace(config, sampler="ddim", eta=1.0)), (v1, v1.Config(eta=1.0))]
    state = torch.get_rng_state()
    for script, config in configs:
        first, again, second = (script.sample(lambda x, t: 0 * x, start, config)[-1] for start in noise[[0, 0, 1]])
        assert torch.equal(first, again)
        assert abs(torch.corrcoef(torch.stack([first, second]).flatten(1))[0, 1]) < 0.05
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------------- the figures


def untrained(script, **changes):
    """Models of a script in which nothing is zero."""
    config = script.Config(**script.QUICK | changes)
    stages = script.build_stages(dataclasses.replace(config, epochs=1), 1, torch.device("cpu"))
    for stage in stages:
        perturb(stage.ema, 0.05)
    return script.TrainedModels.of_stages(stages, config, [])


def test_figures_show_the_deterministic_sampler(cnn, v1):
    for script, changes in ((cnn, {"sampler": "ancestral"}), (cnn, {"eta": 1.0}), (v1, {"eta": 1.0})):
        models = untrained(script, **changes)
        states, noised, captions = script.draw_trajectories(models, 3, 4)
        noise = models.noise(3)
        expected = script.sample(models.denoiser, noise, script.Config(eta=0.0), 4)
        assert torch.equal(states, torch.stack(expected))
        assert captions == ["t = 1000", "t = 750", "t = 500", "t = 250", "t = 0"]
        assert torch.equal(noised[0], states[-1])
        torch.testing.assert_close(noised[-1], noise, rtol=0, atol=0.01 * states[-1].abs().max().item())
        a = script.linear_alpha_bars()[[500]].float()
        torch.testing.assert_close(noised[2], script.diffuse(states[-1], noise, a))


def test_gaussian_of_the_prior_figure_has_the_moments_of_the_latents(v1):
    means, stds = torch.randn(2, 500, 2, 2, 2)
    means[:, 1] = 0.5 * means[:, 0] + 0.1 * means[:, 1] + 3
    posteriors = torch.cat([means, stds.abs()], dim=1)
    mean, factor = v1.gaussian_of_posteriors(posteriors)
    # These 2 D points have the mean and the covariance of a Gaussian of independent coordinates, exactly.
    arms = torch.cat([torch.eye(8), -torch.eye(8)]).double() * 8**0.5
    points = means.flatten(1).double()[:, None] + arms * stds.flatten(1).double()[:, None]  # (N, 2 D, D)
    points = points.flatten(0, 1).numpy()
    assert mean.dtype == factor.dtype == torch.float64
    np.testing.assert_allclose(mean, points.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(factor @ factor.T, np.cov(points.T, bias=True), atol=1e-12)


def test_gaussian_of_the_prior_figure_needs_no_more_latents_than_there_are(v1):
    means = torch.randn(5, 4, 7, 7)
    _, factor = v1.gaussian_of_posteriors(torch.cat([means, 0 * means], dim=1))
    covariance = np.cov(means.flatten(1).double().numpy().T, bias=True)
    np.testing.assert_allclose(factor @ factor.T, covariance, atol=1e-12)


def test_prior_figure_decodes_what_it_says(v1, tmp_path, monkeypatch):
    models, shown = untrained(v1), []
    models.autoencoder.latent_mean.fill_(2.0)
    models.autoencoder.latent_std.fill_(3.0)
    posteriors = torch.cat([torch.randn(500, 4, 7, 7) + 5, torch.ones(500, 4, 7, 7)], dim=1)

    def decode(autoencoder, latents):
        shown.append(latents)
        return torch.zeros(len(latents), 1, 28, 28, dtype=torch.uint8)

    monkeypatch.setattr(v1, "decode_images", decode)
    v1.save_prior(models, posteriors, tmp_path)
    prior, fitted, diffusion = shown
    noise = models.noise(36)
    torch.testing.assert_close(3 * prior + 2, noise)  # as the autoencoder's own latents it is N(0, I)
    mean, factor = v1.gaussian_of_posteriors(posteriors)
    torch.testing.assert_close(fitted.flatten(1).double(), mean + noise.flatten(1).double() @ factor.T)
    assert torch.equal(diffusion, v1.sample(models.denoiser, noise, models.config)[-1])
    assert (tmp_path / "prior" / "prior_epoch_0.png").stat().st_size > 1000
