"""The transformer of ImageDiffusionModel/Transformer, its loss and its samplers, against
formulas and diffusers.

A class whose images are all the same image m has the exact denoiser
v = (sqrt(alpha_bar) x - m) / sqrt(1 - alpha_bar): it sees x_0 = m in every state, and the noise
that the state was made with. Both samplers then stay on x_t = sqrt(alpha_bar) m +
sqrt(1 - alpha_bar) noise, in any number of steps.
"""

import diffusers
import numpy as np
import pytest
import torch

from networks import Denoiser, models_of, perturb, rng_of, states_of, without_gradient
from script_runs import load_version

GENERATOR = torch.Generator().manual_seed(1)
MEANS = torch.randn(11, 1, 28, 28, dtype=torch.float64, generator=GENERATOR)  # a class each


@pytest.fixture(scope="module")
def script():
    return load_version("Transformer")


@pytest.fixture(scope="module")
def alpha_bars(script):
    """At t = 0 ... T, in float64."""
    return script.cosine_alpha_bars()


def build_denoiser(script, patch_size=4, perturbation=0.1):
    """A small denoiser with all its weights moved off their initial values."""
    return perturb(script.TransformerDenoiser(patch_size, width=128, depth=2), perturbation)


def inputs(script):
    """Images, times and class weights of a call."""
    classes = script.class_weights(2 * torch.arange(5))
    return torch.randn(5, 1, 28, 28), torch.linspace(1, 1000, 5).long(), classes


def exact_models(script, **settings):
    """Models with the exact denoiser of classes of one image each, the null class too."""
    alpha_bars = script.cosine_alpha_bars()

    def denoiser(x, t, classes):
        a = alpha_bars[t][:, None, None, None]
        return (a.sqrt() * x - MEANS[classes.argmax(1)]) / (1 - a).sqrt()

    return models_of(script, denoiser, **settings)


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [2, 4])
def test_denoiser_starts_at_zero_and_its_blocks_as_the_identity(script, patch_size):
    denoiser = build_denoiser(script, patch_size, perturbation=0)
    x, t, classes = inputs(script)
    assert torch.equal(denoiser(x, t, classes), torch.zeros_like(x))
    assert torch.equal(denoiser.alpha_bars, script.cosine_alpha_bars().float())
    assert not {"alpha_bars", "positions"} & set(denoiser.state_dict())  # the same for ever
    tokens, condition = torch.randn(5, 49, 128), torch.randn(5, 128)
    for block in denoiser.blocks:
        assert torch.equal(block(tokens, condition), tokens)
        assert block.mlp[0].weight.std() > 0.05  # only the gates are closed


@pytest.mark.parametrize("patch_size", [2, 4])
def test_every_weight_learns_and_every_input_counts(script, patch_size):
    denoiser = build_denoiser(script, patch_size)
    x, t, classes = inputs(script)
    out = denoiser(x, t, classes)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert without_gradient(denoiser) == []
    for changed in ((x.flip(0), t, classes), (x, t.flip(0), classes), (x, t, classes.flip(0))):
        moved = (denoiser(*changed) - out).abs().amax(dim=(1, 2, 3))
        assert moved[torch.arange(5) != 2].min() > 1e-3  # the middle one is its own mirror


@pytest.mark.parametrize(("side", "width"), [(7, 192), (14, 96), (7, 32)])
def test_positions_are_those_of_the_masked_autoencoder(script, side, width):
    """MAE's formula: half the channels for the column and half for the row, sines before cosines in
    each half."""
    expected = np.empty((side * side, width))
    for row in range(side):
        for column in range(side):
            for half, place in enumerate((column, row)):
                for k in range(width // 4):
                    angle = place / 10_000 ** (k / (width / 4))
                    channel = half * (width // 2) + k
                    expected[row * side + column, channel] = np.sin(angle)
                    expected[row * side + column, channel + width // 4] = np.cos(angle)
    positions = script.sincos_positions(side, width)
    np.testing.assert_allclose(positions.numpy(), expected, atol=1e-6)
    distances = torch.cdist(positions.double(), positions.double())
    assert distances[~torch.eye(side * side, dtype=torch.bool)].min() > 0.5


@pytest.mark.parametrize("size", [2, 4])
def test_patches_are_the_image_in_reading_order(script, size):
    images = torch.randn(3, 2, 28, 28)
    patches = script.patchify(images, size)
    side = 28 // size
    assert patches.shape == (3, side**2, 2 * size**2)
    assert torch.equal(script.unpatchify(patches, size), images)
    for index in (0, 1, side - 1, side, side**2 - 1):
        row, column = divmod(index, side)
        cut = images[:, :, size * row : size * (row + 1), size * column : size * (column + 1)]
        assert torch.equal(patches[:, index], cut.flatten(1))


def test_attention_is_the_mean_of_values_weighted_by_softmax(script):
    attention = build_denoiser(script).blocks[0].attention
    tokens = torch.randn(2, 9, 128)
    parts = attention.qkv(tokens).view(2, 9, 3, 2, 64)  # two heads
    heads = []
    for head in range(2):
        q, k, v = (parts[:, :, part, head] for part in range(3))
        heads.append(torch.softmax(q @ k.transpose(1, 2) / 8, dim=2) @ v)
    expected = attention.out(torch.cat(heads, dim=2))
    torch.testing.assert_close(attention(tokens), expected, rtol=1e-4, atol=1e-5)


def test_positions_tell_the_denoiser_where_a_patch_is(script):
    denoiser = build_denoiser(script)
    x, t, classes = inputs(script)
    swapped = torch.cat([x[..., 4:8], x[..., :4], x[..., 8:]], dim=3)
    out, moved = denoiser(x, t, classes), denoiser(swapped, t, classes)
    back = torch.cat([moved[..., 4:8], moved[..., :4], moved[..., 8:]], dim=3)
    assert (back - out).abs().max() > 0.01


# --- process and its loss -------------------------------------------------------------------------


def test_v_noise_and_data_can_be_had_from_each_other(script, alpha_bars):
    x0, noise = torch.randn(2, 1001, 1, 4, 4, dtype=torch.float64)
    a = alpha_bars[:, None, None, None]
    x, v = script.diffuse(x0, noise, a), script.v_target(x0, noise, a)
    torch.testing.assert_close(script.x0_of_v(x, v, a), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(script.noise_of_v(x, v, a), noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(x, a.sqrt() * x0 + (1 - a).sqrt() * noise)
    torch.testing.assert_close(v, a.sqrt() * noise - (1 - a).sqrt() * x0)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_weights_are_those_of_the_paper(script, alpha_bars, gamma):
    """min(SNR, gamma) times the error of x_0, which is min(SNR, gamma) / SNR times the noise's."""
    a = alpha_bars[1:]
    snr, column = a / (1 - a), a[:, None, None, None]
    x0, noise, error = torch.randn(3, 1000, 1, 4, 4, dtype=torch.float64)
    x, v = script.diffuse(x0, noise, column), script.v_target(x0, noise, column)

    def losses(got, wanted):
        return (got - wanted).square().mean(dim=(1, 2, 3))

    of_v = script.min_snr_weight(a, gamma) * losses(v + error, v)
    of_x0 = losses(script.x0_of_v(x, v + error, column), x0)
    of_noise = losses(script.noise_of_v(x, v + error, column), noise)
    least, weight = snr.clamp(max=gamma), script.min_snr_weight(a, gamma)
    torch.testing.assert_close(weight, least / (snr + 1), rtol=1e-9, atol=0)
    torch.testing.assert_close(of_v, least * of_x0, rtol=1e-8, atol=0)
    torch.testing.assert_close(of_v, least / snr * of_noise, rtol=1e-8, atol=0)


def test_loss_is_the_weighted_mean_over_all_times(script, alpha_bars):
    calls = []

    def denoiser(x, t, classes):
        calls.append((x, t, classes))
        return torch.full_like(x, 0.3)

    x0 = torch.full((20_000, 1, 1, 1), 0.5)
    labels = torch.arange(20_000) % 10
    network, options = Denoiser(denoiser, alpha_bars.float()), {"class_dropout": 0.2, "gamma": 5.0}
    loss = script.min_snr_v_loss(network, x0, labels, rng_of(script), **options)
    [(x, t, classes)] = calls
    assert {1, 1000} < set(t.tolist()) <= set(range(1, 1001))
    assert abs(t.float().mean() - 500.5) < 10
    a = alpha_bars[t]
    noise = (x.flatten() - a.sqrt() * 0.5) / (1 - a).sqrt()
    assert abs(noise[t > 10].std() - 1) < 0.03
    error = 0.3 - (a.sqrt() * noise - (1 - a).sqrt() * 0.5)
    snr = a / (1 - a)
    expected = (snr.clamp(max=5) / (snr + 1) * error.square()).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)

    seen = classes.argmax(1)
    assert torch.equal(classes, script.class_weights(seen))
    assert torch.equal(seen[seen != script.NULL_CLASS], labels[seen != script.NULL_CLASS])
    assert abs((seen == script.NULL_CLASS).float().mean() - 0.2) < 0.015


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("steps", [1, 7, 25])
@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_samples_of_an_exact_denoiser_stay_on_the_forward_process(
    script, alpha_bars, sampler, steps, guidance_scale
):
    everywhere = {"guidance_low": 0, "guidance_high": 1000}
    models = exact_models(script, sampler=sampler, guidance_scale=guidance_scale, **everywhere)
    noise, labels = torch.randn(10, 1, 28, 28, dtype=torch.float64), torch.arange(10)
    pairs = list(script.sample(models, noise, script.class_weights(labels), steps))
    assert torch.equal(pairs[0][0], noise)
    means = MEANS[10] + guidance_scale * (MEANS[:10] - MEANS[10])
    first = alpha_bars[1000]
    noise = (noise - first.sqrt() * means) / (1 - first).sqrt()
    for (state, guess), t in zip(pairs, script.sampling_times(steps), strict=True):
        a = alpha_bars[t]
        truth = a.sqrt() * means + (1 - a).sqrt() * noise
        torch.testing.assert_close(state, truth, rtol=0, atol=1e-9)
        torch.testing.assert_close(guess, means, rtol=0, atol=1e-9)


def test_trajectories_are_those_of_diffusers(script, alpha_bars):
    """The same network, noise and alphas: 25 steps of DDIMScheduler, whose t counts from 0."""
    steps, denoiser = 25, build_denoiser(script)
    noise = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    labels = torch.tensor([0, 3, 9, script.NULL_CLASS])
    classes, null = script.class_weights(labels), script.class_weights(torch.full((4,), 10))

    def predict_v(x, t, classes):
        with torch.autocast("cpu", enabled=False):
            return denoiser(x.float(), t, classes).double()

    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000, prediction_type="v_prediction", timestep_spacing="trailing",
        clip_sample=False, rescale_betas_zero_snr=False, set_alpha_to_one=True,
    )  # fmt: skip
    scheduler.alphas_cumprod = alpha_bars[1:]
    scheduler.set_timesteps(steps)
    everywhere = {"guidance_scale": 2.0, "guidance_low": 0, "guidance_high": 1000}
    models = models_of(script, predict_v, sampler="ddim", **everywhere)
    with torch.inference_mode():
        expected = [noise]
        for t in scheduler.timesteps:
            times = torch.full((4,), int(t) + 1)
            c, u = (predict_v(expected[-1], times, y) for y in (classes, null))
            expected.append(scheduler.step(u + 2.0 * (c - u), t, expected[-1]).prev_sample)
        states = states_of(script.sample(models, noise, classes, steps))
    for state, other in zip(states, expected, strict=True):
        assert (state - other).norm() <= 1e-5 * other.norm()
    assert (states[-1] - noise).norm() > 0.1 * noise.norm()


def test_as_much_fresh_noise_is_added_as_the_settings_say(script, alpha_bars):
    """In the first of two steps, from t = 1000 to 500."""
    classes = script.class_weights(torch.zeros(4, dtype=torch.int64))
    noise, drawn = torch.randn(2, 4, 1, 28, 28, dtype=torch.float64)
    a = alpha_bars[[1000, 500]]
    old = (noise - a[0].sqrt() * MEANS[0]) / (1 - a[0]).sqrt()
    for eta in (0.0, 0.4, 1.0):
        models = exact_models(script, sampler="ddim", eta=eta, guidance_scale=1.0)
        state = states_of(script.sample(models, noise, classes, 2, lambda: drawn))[1]
        sigma = eta * ((1 - a[1]) / (1 - a[0]) * (1 - a[0] / a[1])).sqrt()
        truth = a[1].sqrt() * MEANS[0] + (1 - a[1] - sigma**2).clamp(min=0).sqrt() * old
        torch.testing.assert_close(state, truth + sigma * drawn, rtol=0, atol=1e-9)
