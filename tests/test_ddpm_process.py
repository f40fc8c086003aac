"""The denoisers, the process and the samplers of ImageDiffusionModel/CNN and
LatentDiffusionModel/v1 against diffusers, numpy and the Gaussian of networks.py."""

import itertools

import diffusers
import numpy as np
import pytest
import torch

from networks import (
    AXES,
    COVARIANCE,
    EIGENVALUES,
    MEAN,
    Denoiser,
    affine_map,
    gaussian_flow,
    gaussian_guesses,
    models_of,
    perturb,
    rng_of,
    tiny_models,
    without_gradient,
)
from script_runs import load_version


@pytest.fixture(scope="module")
def cnn():
    return load_version("CNN")


@pytest.fixture(scope="module")
def v1():
    return load_version("v1")


@pytest.fixture(scope="module")
def alpha_bars(cnn):
    """At t = 0 ... T, in float64."""
    return cnn.linear_alpha_bars()


def gaussian_predict(levels):
    """What the samplers ask for: x_0 and the noise in x at the alpha_bar levels[i]."""
    return lambda x, i: gaussian_guesses(x, levels[i] ** 0.5, (1 - levels[i]) ** 0.5)


def drawing(shape, seed=0):
    """Fresh noise in float64, and the generator that it comes from."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64), generator


# --- the models -----------------------------------------------------------------------------------


def denoisers(cnn, v1):
    """Both denoisers at their default size, and an input of each."""
    for script in (cnn, v1):
        config = script.Settings()
        network = script.build_networks(config)["diffusion"]
        yield network, torch.randn(3, *script.state_shape(config))


def test_denoisers_start_at_the_guess_for_white_data_and_see_everything(cnn, v1, alpha_bars):
    t = torch.tensor([1, 400, 1000])
    for denoiser, x in denoisers(cnn, v1):
        assert torch.equal(denoiser.alpha_bars, alpha_bars.float())
        # E[noise | x_t] for x_0 ~ N(0, I)
        white = (1 - alpha_bars[t]).sqrt().float()[:, None, None, None] * x
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


# --- process and its loss -------------------------------------------------------------------------


def test_alpha_bars_are_those_of_the_paper_and_of_diffusers(alpha_bars):
    assert alpha_bars.dtype == torch.float64 and alpha_bars[0] == 1
    truth = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(alpha_bars[1:], truth, rtol=1e-12)
    theirs = diffusers.DDPMScheduler(beta_schedule="linear").alphas_cumprod  # of single precision
    np.testing.assert_allclose(alpha_bars[1:], theirs, rtol=1e-5)


def test_data_can_be_had_from_the_state_and_its_noise(cnn, alpha_bars):
    x0, noise = torch.randn(2, 1001, 1, 4, 4, dtype=torch.float64)
    a = alpha_bars[:, None, None, None]
    x = cnn.diffuse(x0, noise, a)
    torch.testing.assert_close(x, a.sqrt() * x0 + (1 - a).sqrt() * noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cnn.x0_of_noise(x, noise, a), x0, rtol=0, atol=1e-11)
    v = a.sqrt() * noise - (1 - a).sqrt() * x0
    torch.testing.assert_close(cnn.noise_of_output(x, v, a), noise, rtol=0, atol=1e-12)
    for found, row in (
        (cnn.diffuse(x0[300], noise[300], a[300].item()), x),
        (cnn.x0_of_noise(x[300], noise[300], a[300].item()), x0),
    ):
        torch.testing.assert_close(found, row[300], rtol=0, atol=1e-12)


def test_loss_is_the_squared_error_of_the_noise_at_all_times(cnn, alpha_bars):
    x0, calls = torch.linspace(-1, 1, 100_000)[:, None, None, None], []

    def perfect(x, t):
        a = alpha_bars[t][:, None, None, None]
        noise = ((x - a.sqrt() * x0) / (1 - a).sqrt()).float()
        calls.append((t, noise.flatten()))
        return noise

    losses = [
        cnn.noise_prediction_loss(Denoiser(function, alpha_bars.float()), x0, rng_of(cnn)).item()
        for function in (perfect, lambda x, t: perfect(x, t) + 0.5, lambda x, t: 0 * x)
    ]
    t, noise = calls[0]
    np.testing.assert_allclose(losses, [0, 0.25, noise.square().mean()], rtol=1e-3, atol=1e-6)
    counts = torch.bincount(t, minlength=1001)
    assert len(counts) == 1001  # none above T
    assert counts[0] == 0
    assert counts[1:].min() > 50  # of 100 on average
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.01


# --- the samplers ---------------------------------------------------------------------------------


def warped_noise(x, t, alpha_bars):
    """A denoiser that is neither affine nor right, but keeps the states bounded."""
    _, noise = gaussian_guesses(x, alpha_bars[t].sqrt(), (1 - alpha_bars[t]).sqrt())
    return noise + 0.3 * torch.sin(3 * x + t / 100)


def scheduler_like(kind, alpha_bars, **options):
    """A scheduler of diffusers with these alpha_bars; its t counts from 0."""
    options |= {"clip_sample": False, "timestep_spacing": "trailing"}
    scheduler = kind(num_train_timesteps=1000, **options)
    scheduler.alphas_cumprod = alpha_bars[1:]
    return scheduler


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (diffusers.DDPMScheduler, {"sampler": "ancestral", "variance": "small"}),
        (diffusers.DDPMScheduler, {"sampler": "ancestral", "variance": "large"}),
        (diffusers.DDIMScheduler, {"sampling_steps": 20, "eta": 0.0}),
        (diffusers.DDIMScheduler, {"sampling_steps": 20, "eta": 0.6}),
        (diffusers.DDIMScheduler, {"sampling_steps": 20, "eta": 1.0}),
    ],
    ids=["ancestral small", "ancestral large", "DDIM", "DDIM eta 0.6", "DDIM eta 1"],
)
def test_samples_and_guesses_are_those_of_diffusers(cnn, v1, alpha_bars, kind, settings):
    """The same denoiser, noise and alphas, through all that the settings decide."""
    options, arguments, steps = {}, {}, 1000
    if kind is diffusers.DDPMScheduler:
        options["variance_type"] = f"fixed_{settings['variance']}"
    else:
        steps, arguments = settings["sampling_steps"], {"eta": settings["eta"]}
    scheduler = scheduler_like(kind, alpha_bars, **options)
    scheduler.set_timesteps(steps)
    noise = torch.randn(5, 4, 1, 1, dtype=torch.float64)
    expected, guesses, (_, generator) = [noise], [], drawing(noise.shape)
    for t in scheduler.timesteps:
        predicted = warped_noise(expected[-1], t + 1, alpha_bars)
        step = scheduler.step(predicted, t, expected[-1], generator=generator, **arguments)
        expected.append(step.prev_sample)
        guesses.append(step.pred_original_sample)
    guesses.append(expected[-1])  # of data

    def denoiser(x, t):
        assert t.shape == (5,)
        assert (t == t[0]).all()
        return warped_noise(x, t[0], alpha_bars)

    for script in (cnn, v1) if kind is diffusers.DDIMScheduler else (cnn,):
        models, (fresh, _) = models_of(script, denoiser, **settings), drawing(noise.shape)
        pairs = list(script.sample(models, noise, None, fresh=fresh))
        assert torch.equal(pairs[0][0], noise)
        for pair, others in zip(pairs, zip(expected, guesses), strict=True):
            for found, other in zip(pair, others):
                assert (found - other).norm() <= 1e-5 * other.norm()


def test_guidance_follows_the_denoisers_density_over_the_guides(cnn, v1, alpha_bars):
    """The noise is -sqrt(1 - alpha_bar) times the gradient of ln p_d^w / p_g^(w - 1)."""
    x = torch.randn(5, 4, 1, 1, dtype=torch.float64)
    everywhere = {"guidance_low": 0, "guidance_high": 1000}
    kinds = {"d": (MEAN, EIGENVALUES), "g": (MEAN / 2, 3 * EIGENVALUES)}

    def log_density(kind, x, a):
        mean, variances = kinds[kind]
        state = torch.distributions.Normal(a**0.5 * mean, (a * variances + 1 - a).sqrt())
        return state.log_prob(x.flatten(1)).sum()

    def noise(kind):
        def predict(x, t):
            a = alpha_bars[t].view(-1, 1)
            mean, variances = kinds[kind]
            rest = (x.flatten(1) - a**0.5 * mean) / (a * variances + 1 - a)
            return ((1 - a).sqrt() * rest)[:, :, None, None]

        return predict

    for script, w, t in itertools.product((cnn, v1), (0, 0.5, 1, 2, 3.5), (1, 300, 1000)):
        models = models_of(script, noise("d"), noise("g"), guidance_scale=w, **everywhere)
        a, point = alpha_bars[t], x.clone().requires_grad_()
        (w * log_density("d", point, a) - (w - 1) * log_density("g", point, a)).backward()
        found = script.guided_noise(models, x, t)
        torch.testing.assert_close(found, -((1 - a) ** 0.5) * point.grad)


def test_guidance_is_confined_to_its_interval_and_the_guide_asked_there_alone(cnn, v1):
    asked, x = [], torch.ones(3, 1, 2, 2)

    def guide(x, t):
        asked.append(t.tolist())
        return 0 * x

    interval = {"guidance_low": 200, "guidance_high": 700}
    for script in (cnn, v1):
        models = models_of(script, lambda x, t: x, guide, guidance_scale=3.0, **interval)
        found = [script.guided_noise(models, x, t)[0, 0, 0, 0] for t in (199, 200, 700, 701)]
        assert found == [1, 3, 3, 1] and asked == [[200] * 3, [700] * 3]
        script.guided_noise(models.with_settings(guidance_scale=1.0), x, 500)
        assert len(asked) == 2
        weak = models.with_settings(guidance_scale=0.5)
        assert [script.guided_noise(weak, x, t)[0, 0, 0, 0] for t in (199, 200, 701)] == [0.5] * 3
        asked.clear()
        list(script.sample(models, x, None, 10))
        assert [times[0] for times in asked] == [700, 600, 500, 400, 300, 200]
        asked.clear()


def test_ddim_is_of_first_order(cnn):
    """From alpha_bar = 1e-4 to 0.999, evenly in the angle whose squared cosine alpha_bar is."""
    ends, errors = (1e-4, 0.999), []
    exact = gaussian_flow(*((a**0.5, (1 - a) ** 0.5) for a in ends))
    for steps in (32, 64, 128, 256, 512):
        angles = np.linspace(*np.arccos(np.sqrt(ends)), steps + 1)
        levels = (np.cos(angles) ** 2).tolist()
        found = affine_map(lambda x, levels=levels: cnn.ddim(gaussian_predict(levels), x, levels))
        errors.append([(part - truth).norm().item() for part, truth in zip(found, exact)])
    ratios = np.array(errors[:-1]) / errors[1:]
    np.testing.assert_allclose(ratios, 2, rtol=0.1)
    np.testing.assert_allclose(ratios[-1], 2, rtol=0.01)


def discrete_chain(variance):
    """Mean (4,) and covariance (4, 4) that the chain ends in, by the posterior q(x_t-1 | x_t, x_0),
    Eq. 7, in numpy."""
    betas = np.linspace(1e-4, 0.02, 1000)
    a = np.concatenate([[1], np.cumprod(1 - betas)])
    values, mu = EIGENVALUES.numpy(), (MEAN @ AXES).numpy()
    mean, spread = np.zeros(4), np.ones(4)
    for t in range(1000, 0, -1):
        beta = betas[t - 1]
        of_x0 = np.sqrt(a[t - 1]) * beta / (1 - a[t])
        of_x = np.sqrt(1 - beta) * (1 - a[t - 1]) / (1 - a[t])
        # x_0 = mu + gain (x - sqrt(a) mu)
        gain = np.sqrt(a[t]) * values / (a[t] * values + 1 - a[t])
        mean = of_x0 * (mu + gain * (mean - np.sqrt(a[t]) * mu)) + of_x * mean
        spread = (of_x0 * gain + of_x) ** 2 * spread
        if t > 1:
            spread += beta if variance == "large" else (1 - a[t - 1]) / (1 - a[t]) * beta
    axes = AXES.numpy()
    return axes @ mean, axes * spread @ axes.T


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_ancestral_chain_has_the_mean_and_covariance_of_its_process(cnn, alpha_bars, variance):
    levels = alpha_bars.flip(0).tolist()

    def run(levels, value):  # with fresh noise that is `value` everywhere
        fresh, predict = lambda: value, gaussian_predict(levels)
        return affine_map(lambda x: cnn.ancestral(predict, x, levels, variance, fresh))

    mean, covariance = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    for pair in zip(levels, levels[1:]):
        matrix, offset = run(pair, 0.0)
        sigma = run(pair, 1.0)[1] - offset
        mean = matrix @ mean + offset
        covariance = matrix @ covariance @ matrix.T + torch.diag(sigma.square())
    expected_mean, expected_covariance = discrete_chain(variance)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(covariance, expected_covariance, rtol=1e-8, atol=1e-10)
    whole = run(levels, 0.0)[1]  # the chain at once
    np.testing.assert_allclose(whole, expected_mean, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(mean, MEAN, atol=0.02)
    np.testing.assert_allclose(covariance, COVARIANCE, atol=0.05)


# --- the figures ----------------------------------------------------------------------------------


def test_gaussian_of_the_prior_figure_has_the_moments_of_the_latents(v1):
    means, stds = torch.randn(2, 500, 2, 2, 2)
    means[:, 1] = 0.5 * means[:, 0] + 0.1 * means[:, 1] + 3
    posteriors = torch.cat([means, stds.abs()], dim=1)
    mean, factor = v1.gaussian_of_posteriors(posteriors)
    # These 2 D points have exactly the mean and covariance of independent coordinates.
    arms = torch.cat([torch.eye(8), -torch.eye(8)]).double() * 8**0.5
    centres, stds = (part.flatten(1).double()[:, None] for part in (means, stds))
    points = (centres + arms * stds).flatten(0, 1).numpy()  # (N 2 D, D)
    assert mean.dtype == factor.dtype == torch.float64
    np.testing.assert_allclose(mean, points.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(factor @ factor.T, np.cov(points.T, bias=True), atol=1e-12)


def test_gaussian_of_the_prior_figure_needs_no_more_latents_than_there_are(v1):
    means = torch.randn(5, 4, 7, 7)
    _, factor = v1.gaussian_of_posteriors(torch.cat([means, 0 * means], dim=1))
    covariance = np.cov(means.flatten(1).double().numpy().T, bias=True)
    np.testing.assert_allclose(factor @ factor.T, covariance, atol=1e-12)


def test_prior_figure_decodes_what_it_says(v1, tmp_path, monkeypatch):
    models, shown, decode = tiny_models(v1), [], v1.decode_images
    models.autoencoder.latent_mean.fill_(2.0)
    models.autoencoder.latent_std.fill_(3.0)
    images = torch.randint(256, (500, 1, 28, 28), dtype=torch.uint8)
    data = v1.Data(images, None, None, None)
    monkeypatch.setattr(v1, "decode_images", lambda *what: shown.append(what[1]) or decode(*what))
    v1.save_prior(models, data, tmp_path)
    prior, fitted, diffusion = (states.flatten(0, 1) for states in shown)
    noise = v1.noise_of_samples(models, range(36))()
    torch.testing.assert_close(3 * prior + 2, noise)  # as the autoencoder's own latents N(0, I)
    posteriors = v1.in_chunks(models.autoencoder.posterior, images)
    means, stds = posteriors.chunk(2, dim=1)
    posteriors = torch.cat([means - 2, stds], dim=1) / 3
    mean, factor = v1.gaussian_of_posteriors(posteriors)
    truth = mean + noise.flatten(1).double() @ factor.T
    torch.testing.assert_close(fitted.flatten(1).double(), truth, rtol=1e-5, atol=1e-5)
    assert torch.equal(diffusion, v1.last_state(models, noise, None))
    assert (tmp_path / "prior" / "prior_epoch_0.png").stat().st_size > 1000
