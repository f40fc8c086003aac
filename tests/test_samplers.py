"""What holds for the samplers and the random numbers of every script.

For Gaussian data the best denoiser, the guesses E[x_0 | x] and the whole trajectory are known (see
networks.py), and so they are under guidance: the classes here share a covariance, so that guidance
moves the mean along the line through both means and no more.
"""

import contextlib
from functools import partial

import numpy as np
import pytest
import torch

from conftest import load_script
from networks import (
    MEAN,
    gaussian_flow,
    gaussian_guesses,
    last,
    models_of,
    rng_of,
    states_of,
    tiny_models,
)
from script_runs import each_of, every_script, on_v3

CPU = torch.device("cpu")
LINEAR = np.cumprod(np.append(1, 1 - np.linspace(1e-4, 0.02, 1000)))  # alpha_bar of t = 0 ... 1000
ANGLES = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
COSINE = np.cumprod(np.append(1, 1 - np.minimum(1 - ANGLES[1:] / ANGLES[:-1], 0.999)))


def of_schedule(alpha_bars):
    """A process of 1000 times: alpha and sigma at t, and the times of a sampler of so many steps"""
    a = torch.from_numpy(alpha_bars)
    times = lambda steps: np.rint(np.linspace(1000, 0, steps + 1)).astype(int)  # noqa: E731
    return lambda t: (a[t].sqrt(), (1 - a[t]).sqrt()), times


def of_noise_levels(steps):
    """Karras et al. 2022, Eq. 5."""
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return np.append(np.linspace(*ends, steps) ** 7, 0)


# alpha and sigma at a time, the sampler's times, and what the network says of E[x_0] and E[noise].
NOISE = (*of_schedule(LINEAR), lambda x0, noise, alpha, sigma: noise)
V = (*of_schedule(COSINE), lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0)
EDM = (lambda t: (1.0 + 0 * t, t), of_noise_levels, lambda x0, noise, alpha, sigma: x0)
FLOW = (
    lambda t: (1 - t, t),
    lambda steps: np.linspace(1, 0, steps + 1),
    lambda x0, noise, alpha, sigma: noise - x0,
)
PROCESSES = {
    "ImageDiffusionModel/CNN": NOISE,
    "ImageDiffusionModel/Transformer": V,
    "ImageDiffusionModel/UNet": EDM,
    "LatentDiffusionModel/v1": NOISE,
    "LatentDiffusionModel/v2": V,
    "LatentDiffusionModel/v3": FLOW,
}
STOCHASTIC = {
    "ImageDiffusionModel/CNN": {"eta": 0.5},
    "ImageDiffusionModel/Transformer": {"sampler": "ddim", "eta": 1.0},
    "ImageDiffusionModel/UNet": {"sampler": "stochastic"},
    "LatentDiffusionModel/v1": {"eta": 1.0},
}


@pytest.fixture(scope="module")
def module(experiment):
    """The script; in float32 on every machine, so that what differs by rounding differs little."""
    module = load_script(experiment.path)
    module.arithmetic = lambda device: contextlib.nullcontext()
    return module


@pytest.fixture
def torchs_own_generator():
    """Must be as it was."""
    state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state)


INTERVALS = {  # of guidance
    "ImageDiffusionModel/Transformer": (200, 700),
    "ImageDiffusionModel/UNet": (0.5, 5.0),
    "LatentDiffusionModel/v2": (200, 700),
    "LatentDiffusionModel/v3": (200, 700),
}


GUIDE_IS_OFF_BY = 5


def gaussian_models(experiment, module, **settings):
    """Models whose class k is N(k MEAN, COVARIANCE), the null class too; without classes, k = 1.
    For a guide that knows classes it is that of k + GUIDE_IS_OFF_BY."""
    at, _, output = PROCESSES[experiment.name]

    def denoiser(x, t, classes=None, off_by=0):
        number = 1.0 if classes is None else classes.double().argmax(1)[:, None] + off_by
        alpha, sigma = (part.double() for part in at(t))
        guesses = gaussian_guesses(x, alpha, sigma, number * MEAN)
        return output(*guesses, *(part.view(-1, 1, 1, 1) for part in (alpha, sigma)))

    return models_of(module, denoiser, partial(denoiser, off_by=GUIDE_IS_OFF_BY), **settings)


def null_number(module):
    """The k of what guidance leads away from."""
    guide = "guide_epochs" in module.Config.__dataclass_fields__
    return module.NULL_CLASS + (GUIDE_IS_OFF_BY if guide else 0)


@every_script
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5])
def test_trajectories_and_guesses_of_gaussian_data_are_the_true_ones(experiment, module, scale):
    at, times_of, _ = PROCESSES[experiment.name]
    steps, label, null = 400, 3, null_number(module)
    guidance = {"guidance_scale": scale} if experiment.conditional else {}
    if experiment.name in INTERVALS:
        guidance |= {"guidance_low": 0, "guidance_high": 1000}
    models = gaussian_models(experiment, module, **guidance)
    mean = (null + scale * (label - null) if experiment.conditional else 1) * MEAN
    times = times_of(steps)
    levels = [tuple(float(part) for part in at(t)) for t in torch.from_numpy(times)]
    noise = torch.randn(5, 4, 1, 1, dtype=torch.float64)
    classes = module.class_weights(torch.full((5,), label))
    pairs = list(module.sample(models, noise, classes, steps))
    assert len(pairs) == steps + 1
    first = 80 * noise if experiment.name == "ImageDiffusionModel/UNet" else noise
    assert torch.equal(pairs[0][0], first)
    assert torch.equal(*pairs[-1])  # the guess of data is the data
    for (state, guess), level in zip(pairs, levels):
        truth, _ = gaussian_guesses(state, *level, mean)
        torch.testing.assert_close(guess, truth, rtol=1e-4, atol=1e-4)
        if level in levels[::50]:
            matrix, offset = gaussian_flow(levels[0], level, mean)
            truth = first.flatten(1) @ matrix.T + offset
            torch.testing.assert_close(state.flatten(1), truth, rtol=0.01, atol=0.01 * null)


@each_of("Transformer")
def test_in_the_same_steps_the_solver_of_second_order_comes_closer(experiment, module):
    """To where the exact flow of Gaussian data ends."""
    at, times_of, _ = PROCESSES[experiment.name]
    noise = torch.randn(5, 4, 1, 1, dtype=torch.float64)
    classes, errors = module.class_weights(torch.full((5,), 3)), {}
    ends = [tuple(float(part) for part in at(torch.tensor(t))) for t in times_of(1)]
    matrix, offset = gaussian_flow(*ends, 3 * MEAN)
    truth = noise.flatten(1) @ matrix.T + offset
    for sampler in ("dpm", "ddim"):
        models = gaussian_models(experiment, module, sampler=sampler, guidance_scale=1.0)
        for steps in (100, 200):
            *_, (state, _) = module.sample(models, noise, classes, steps)
            errors[sampler, steps] = (state.flatten(1) - truth).norm().item()
    assert errors["dpm", 100] < 0.1 * errors["ddim", 100]
    assert 2.8 < errors["dpm", 100] / errors["dpm", 200] < 4.4
    assert 1.8 < errors["ddim", 100] / errors["ddim", 200] < 2.2


@each_of("Transformer", "UNet", "v2", "v3")
@pytest.mark.parametrize(("scale", "outside"), [(0.0, 0.0), (0.5, 0.5), (3.0, 1.0)])
def test_guidance_goes_beyond_the_class_in_its_interval_alone(experiment, module, scale, outside):
    """There the guesses are those of data around a mean beyond that of the class."""
    at, times_of, _ = PROCESSES[experiment.name]
    label, null, (low, high) = 3, null_number(module), INTERVALS[experiment.name]
    settings = {"guidance_scale": scale, "guidance_low": low, "guidance_high": high}
    models = gaussian_models(experiment, module, **settings)
    classes = module.class_weights(torch.full((5,), label))
    noise = torch.randn(5, 4, 1, 1, dtype=torch.float64)
    pairs, weights = list(module.sample(models, noise, classes, 20)), []
    for (state, guess), t in zip(pairs[:-1], torch.from_numpy(times_of(20))):
        flow = experiment.name.endswith("v3")  # its t is in 0 ... 1
        weights.append(scale if low <= (1000 * t if flow else t) <= high else outside)
        mean = (null + weights[-1] * (label - null)) * MEAN
        truth, _ = gaussian_guesses(state, *(float(part) for part in at(t)), mean)
        torch.testing.assert_close(guess, truth, rtol=1e-4, atol=1e-4)
    assert {*weights} == {scale, outside} and weights[0] == weights[-1] == outside


@every_script
def test_trajectories_are_drawn_without_fresh_noise_and_go_out_with_their_own(experiment, module):
    """Whatever the sampler is set to. EDM's states are scaled to the contrast of the data."""
    at, times_of, _ = PROCESSES[experiment.name]
    edm, fresh = experiment.name.endswith("UNet"), STOCHASTIC.get(experiment.name, {})
    quiet = {"sampler": "heun"} if edm else dict.fromkeys(fresh.keys() & {"eta"}, 0.0)
    still = tiny_models(module, **(fresh | quiet))
    changes = fresh | ({"sampler": "ancestral"} if experiment.name.endswith("CNN") else {})
    noise = module.noise_of_samples(still, range(3))()
    classes = module.class_weights(module.labels_in_turn(3, CPU))
    drawn = module.draw_trajectories(still.with_settings(**changes), noise, classes, 20)
    states, guesses = module.trajectory(still, noise, classes, 20)
    assert torch.equal(drawn.guesses, guesses)
    assert torch.equal(drawn.noised[-1], states[-1])  # no jump where the animation turns round
    for number, time in enumerate(times_of(20)):
        alpha, sigma = (float(part) for part in at(torch.tensor(time)))
        contrast = module.SIGMA_DATA / np.hypot(sigma, module.SIGMA_DATA) if edm else 1
        noised = contrast * (alpha * states[-1] + sigma * noise)
        torch.testing.assert_close(drawn.states[number], contrast * states[number])
        torch.testing.assert_close(drawn.noised[number], noised, rtol=1e-4, atol=1e-4)
    values = [float(caption.split("=")[1]) for caption in drawn.captions]
    np.testing.assert_allclose(values, times_of(20) if edm else range(1000, -1, -50), rtol=0.05)
    assert {caption[:4] for caption in drawn.captions} == {"σ = " if edm else "t = "}


@every_script
def test_a_sample_is_the_same_however_many_are_drawn_at_a_time(
    experiment, module, torchs_own_generator
):
    """Fresh noise included; and however many are drawn."""
    models = tiny_models(module, sampling_steps=6, **STOCHASTIC.get(experiment.name, {}))
    labels = module.labels_in_turn(12, CPU)
    images = module.generate_samples(models, labels)
    assert images.shape == (12, 1, 28, 28)
    others = [module.generate_samples(models, labels, chunk) for chunk in (1, 7)]
    others.append(module.generate_samples(models, labels[:5]))
    for again in others:
        assert (again.int() - images[: len(again)].int()).abs().max() <= 1
    elsewhere = module.generate_samples(models.with_settings(sampling_seed=1), labels)
    for pair in [(images, elsewhere), (images[:-1], images[1:])]:
        difference = (pair[0].float() - pair[1].float()).abs().mean(dim=(1, 2, 3))
        assert difference.min() > 3
    if experiment.name in STOCHASTIC:
        noise, classes = module.noise_of_samples(models, range(12))(), module.class_weights(labels)
        still = module.decode_images(models, module.last_state(models, noise, classes))
        assert (still.float() - images.float()).abs().mean() > 3  # fresh noise has a part in it


@each_of("CNN")
def test_so_are_ancestral_samples(module, torchs_own_generator):
    models = models_of(module, lambda x, t: 0.9 * x, sampler="ancestral")
    images = module.generate_samples(models, module.labels_in_turn(8, CPU))
    for chunk in (1, 7):
        again = module.generate_samples(models, module.labels_in_turn(8, CPU), chunk)
        assert (again.int() - images.int()).abs().max() <= 1
    assert (images[1:].float() - images[:-1].float()).abs().mean() > 3


@on_v3
def test_each_sample_has_noise_of_its_own(module, torchs_own_generator):
    """A stream each, of standard normal numbers, whoever else is drawn, by the sampling seed."""
    models = tiny_models(module)

    def draws(numbers, models=models):
        fresh = module.noise_of_samples(models, numbers)
        return torch.stack([fresh() for _ in range(45)])  # (45, N, C, 7, 7)

    noise = draws(range(4))
    assert noise.shape == (45, 4, *module.state_shape(models.config))
    assert torch.equal(draws(range(2, 3)), noise[:, 2:3])
    other = draws(range(1), models.with_settings(sampling_seed=1))
    every = torch.cat([noise, other], dim=1).flatten(0, 1).flatten(1)  # (225, D)
    assert abs(every.mean()) < 0.02
    assert abs(every.std() - 1) < 0.02
    correlation = torch.corrcoef(every) - torch.eye(len(every))
    assert correlation.abs().max() < 6 / every.shape[1] ** 0.5
    assert abs(correlation.mean()) < 0.002


@every_script
def test_networks_start_by_their_seed_alone_and_none_drops_out(module, torchs_own_generator):
    """Dropout would draw from torch's own generator."""
    config = module.Settings(**module.default_settings(CPU, quick=True))
    first, again = (module.initial_networks(config, CPU) for _ in range(2))
    other = module.initial_networks(module.Settings(**vars(config) | {"seed": 1}), CPU)
    for name, network in first.items():
        states = [networks[name].state_dict() for networks in (first, again, other)]
        assert all(map(torch.equal, states[0].values(), states[1].values()))
        assert not all(map(torch.equal, states[0].values(), states[2].values()))
        kinds = [type(part).__name__ for part in network.modules()]
        assert not [kind for kind in kinds if "Dropout" in kind or kind == "RReLU"]
        extra = states[0].keys() - dict(network.named_parameters()).keys()  # tables are made anew
        assert {name.split(".")[-1] for name in extra} <= {"latent_mean", "latent_std"}


@on_v3
def test_random_numbers_are_what_they_are_called(module, torchs_own_generator):
    draws = {
        "randn": lambda rng: rng.randn(5000, 2),
        "rand": lambda rng: rng.rand(5000, 2),
        "randint": lambda rng: rng.randint(1, 7, 5000, 2),
    }
    for draw in draws.values():
        first, again, other = (draw(rng_of(module, seed)) for seed in (0, 0, 1))
        assert first.shape == (5000, 2)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    normal, uniform, whole = (draw(rng_of(module)) for draw in draws.values())
    assert abs(normal.mean()) < 0.04 and abs(normal.std() - 1) < 0.03
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert set(whole.unique().tolist()) == {1, 2, 3, 4, 5, 6}
    assert abs(whole.float().mean() - 3.5) < 0.1


@every_script
def test_last_of_a_sampler_is_what_is_decoded(experiment, module):
    """`trajectory` and `last_state` are of one sampler, without fresh noise the deterministic."""
    models = tiny_models(module, sampling_steps=5, **STOCHASTIC.get(experiment.name, {}))
    noise = module.noise_of_samples(models, range(3))()
    classes = module.class_weights(module.labels_in_turn(3, CPU))
    states, guesses = module.trajectory(models, noise, classes)
    assert states.shape == guesses.shape == (6, *noise.shape)
    assert torch.equal(states[-1], module.last_state(models, noise, classes))
    with torch.no_grad():
        assert torch.equal(torch.stack(states_of(module.sample(models, noise, classes))), states)
        assert torch.equal(last(module.sample(models, noise, classes, 5)), states[-1])
        assert len(states_of(module.sample(models, noise, classes, 3))) == 4
