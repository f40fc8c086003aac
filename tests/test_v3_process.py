"""The process and the samplers of v3 against analytic truth.

Rectified flow carries data x_0 to noise z ~ N(0, I) along x_s = (1 - s) x_0 + s z, where s = t / 1000, and its velocity
is v(x, s) = E[z - x_0 | x_s = x]. For data x_0 ~ N(mu, Sigma) everything is jointly Gaussian, and

    E[x_s] = (1 - s) mu,    Cov(x_s) = C_s = (1 - s)^2 Sigma + s^2 I,    Cov(z - x_0, x_s) = s I - (1 - s) Sigma,

so that the velocity is v(x, s) = -mu + (s I - (1 - s) Sigma) C_s^-1 (x - (1 - s) mu). Its ODE is linear. The middle
factor is half the derivative of C_s, so the solution from x at s = 1, where C_1 = I, is (1 - s) mu + C_s^(1/2) x; it
ends in mu + Sigma^(1/2) x. What no denoiser can know is Cov(z - x_0 | x_s); along an eigenvector of Sigma of eigenvalue
a it is (1 + a) - (s - (1 - s) a)^2 / c_s = a / c_s, with c_s = (1 - s)^2 a + s^2.
"""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from networks import AXES, COVARIANCE, EIGENVALUES, MEAN, affine_map


def power_of_covariance(exponent, s=0.0):
    """C_s raised to `exponent`, in float64."""
    return AXES * ((1 - s) ** 2 * EIGENVALUES + s**2) ** exponent @ AXES.T


def gaussian_velocity(x, s, mean=MEAN):
    """The velocity derived above for x (B, 4, 1, 1), s (B,) and mean (4,) or (B, 4)."""
    s = s.double()[:, None]  # (B, 1)
    gain = (s - (1 - s) * EIGENVALUES) / ((1 - s) ** 2 * EIGENVALUES + s**2)
    along_axes = (x.flatten(1) - (1 - s) * mean) @ AXES
    return (gain * along_axes @ AXES.T - mean)[:, :, None, None]


def gaussian_sampler(script, steps, sampler):
    """Noise (B, 4, 1, 1) to the last state of `integrate` under the velocity of the Gaussian."""
    velocity = lambda x, t: gaussian_velocity(x, torch.full((len(x),), t / 1000, dtype=torch.float64))  # noqa: E731
    return lambda noise: script.integrate(velocity, noise, steps, sampler)[-1]


@pytest.mark.parametrize(("sampler", "factor"), [("euler", 2), ("heun", 4)])
def test_global_error_falls_with_the_order_of_the_sampler(script_v3, sampler, factor):
    errors = []
    for steps in (32, 64, 128, 256, 512):
        matrix, offset = affine_map(gaussian_sampler(script_v3, steps, sampler))
        torch.testing.assert_close(offset, MEAN)  # the mean moves on a straight line, which every step keeps to
        errors.append((matrix - power_of_covariance(0.5)).norm().item())
    ratios = np.array(errors[:-1]) / errors[1:]
    np.testing.assert_allclose(ratios, factor, rtol=0.1)
    np.testing.assert_allclose(ratios[-1], factor, rtol=0.01)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_states_go_from_the_noise_along_the_solution(script_v3, sampler):
    noise, steps, times = torch.randn(3, 4, 1, 1, dtype=torch.float64), 400, []

    def velocity(x, t):
        times.append(t)
        return gaussian_velocity(x, torch.full((len(x),), t / 1000))

    states = script_v3.integrate(velocity, noise, steps, sampler)
    assert len(states) == steps + 1
    assert torch.equal(states[0], noise)
    for step in range(0, steps + 1, 50):
        s = 1 - step / steps
        exact = (1 - s) * MEAN + noise.flatten(1) @ power_of_covariance(0.5, s)
        torch.testing.assert_close(states[step].flatten(1), exact, atol=0.02 if sampler == "euler" else 1e-4, rtol=0)
    evaluations = np.linspace(1000, 0, steps + 1)
    expected = evaluations[:-1] if sampler == "euler" else np.stack([evaluations[:-1], evaluations[1:]], 1).ravel()
    np.testing.assert_allclose(times, expected, atol=1e-9)


class GaussianDenoiser:
    """The optimal denoiser where class k is N(k MEAN, COVARIANCE), the null class too."""

    def __call__(self, x, t, classes):
        numbers = torch.arange(classes.shape[1], dtype=torch.float64)
        return gaussian_velocity(x, t / 1000, (classes.double() @ numbers)[:, None] * MEAN)


@pytest.mark.parametrize(("sampler", "tolerance"), [("euler", 0.02), ("heun", 1e-4)])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5])
def test_samples_have_mean_and_covariance_of_their_class(script_v3, sampler, tolerance, guidance_scale):
    label, null, steps = 3, script_v3.NULL_CLASS, 400
    config = script_v3.Config(sampler=sampler, guidance_scale=guidance_scale)

    def sample(noise):
        classes = script_v3.class_weights(torch.full((len(noise),), label))
        return script_v3.sample(GaussianDenoiser(), classes, noise, config, steps)[-1]

    matrix, offset = affine_map(sample)
    # The classes share a covariance, so guidance moves the mean along the line through both means and no more.
    mean = (null + guidance_scale * (label - null)) * MEAN
    torch.testing.assert_close(offset, mean, atol=tolerance * null, rtol=0)
    torch.testing.assert_close(matrix @ matrix.T, COVARIANCE, atol=tolerance, rtol=0)


def test_configuration_sets_the_number_of_steps(script_v3):
    config = script_v3.Config(sampling_steps=3)
    noise, classes = torch.zeros(1, 4, 1, 1).double(), script_v3.class_weights(torch.tensor([0]))
    assert len(script_v3.sample(GaussianDenoiser(), classes, noise, config)) == 4
    assert len(script_v3.sample(GaussianDenoiser(), classes, noise, config, 5)) == 6


def test_interpolation_is_a_straight_line_from_data_to_noise(script_v3):
    x0, noise = torch.randn(2, 5, 2, 3, 3)
    t = torch.tensor([0.0, 250.0, 500.0, 900.0, 1000.0])
    x = script_v3.interpolate(x0, noise, t)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[-1], noise[-1])
    for row, s in enumerate(t / 1000):
        torch.testing.assert_close(x[row], x0[row] + s * (noise[row] - x0[row]))


# The loss is over classes that share one Gaussian, so that dropping a class changes nothing.
def loss_of(script, error=lambda v, t: v, times=lambda t: t):
    """Mean and standard error of the loss of a denoiser that errs: `error` of the optimal velocity at `times`."""
    losses = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(5000, 4, dtype=torch.float64, generator=generator)
        x0 = (MEAN + z @ power_of_covariance(0.5))[:, :, None, None]
        labels = torch.randint(script.NULL_CLASS, (len(x0),), generator=generator)
        denoiser = lambda x, t, classes: error(gaussian_velocity(x, times(t) / 1000), t)  # noqa: E731
        losses.append(script.rectified_flow_loss(denoiser, x0, labels, generator, class_dropout=0.1).item())
    return np.mean(losses), np.std(losses, ddof=1) / np.sqrt(len(losses))


@pytest.fixture(scope="module")
def least_loss(script_v3):
    """Mean and standard error of the loss of the optimal denoiser."""
    return loss_of(script_v3)


def test_loss_of_the_optimal_denoiser_is_the_unavoidable_one(least_loss):
    def unavoidable(u):  # at the time whose logit is u
        s = expit(u)
        return norm.pdf(u) * np.mean([a / ((1 - s) ** 2 * a + s**2) for a in EIGENVALUES.tolist()])

    truth, _ = quad(unavoidable, -10, 10)
    loss, standard_error = least_loss
    assert standard_error < 0.01 * truth
    assert abs(loss - truth) < 4 * standard_error


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (lambda v, t: 0.9 * v, lambda t: t),
        (lambda v, t: 1.1 * v, lambda t: t),
        (lambda v, t: -v, lambda t: t),
        (lambda v, t: v + 0.2 * torch.sin(t / 100)[:, None, None, None], lambda t: t),
        (lambda v, t: v, lambda t: 0.9 * t),
        (lambda v, t: v, lambda t: 1000 - t),
    ],
    ids=["shrunk", "stretched", "reversed", "shifted", "early", "time reversed"],
)
def test_loss_of_any_other_denoiser_is_larger(script_v3, least_loss, error, times):
    # The same seeds give the same data, noise and times, so most of the Monte-Carlo error is common to both.
    assert loss_of(script_v3, error, times)[0] > least_loss[0] + 0.005


def test_a_constant_error_costs_its_square(script_v3, least_loss):
    loss, standard_error = loss_of(script_v3, lambda v, t: v + 0.5)
    assert abs(loss - least_loss[0] - 0.5**2) < 4 * standard_error


def test_times_are_logit_normal(script_v3):
    times = script_v3.logit_normal_times(200_000, torch.device("cpu"), torch.Generator().manual_seed(0)).numpy()
    assert times.shape == (200_000,)
    assert 0 <= times.min() < 20
    assert 980 < times.max() <= 1000
    shares = np.array([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    np.testing.assert_allclose(np.quantile(times, shares), 1000 * expit(norm.ppf(shares)), atol=4)


@pytest.fixture
def recorded_calls(script_v3):
    """A denoiser that answers zero, and the list of the calls it has seen: (x, t, labels)."""
    calls = []

    def denoiser(x, t, classes):
        assert torch.equal(classes, script_v3.class_weights(classes.argmax(1)))  # one-hot
        calls.append((x, t, classes.argmax(1)))
        return torch.zeros_like(x)

    return denoiser, calls


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_labels_are_dropped_as_often_as_configured(script_v3, recorded_calls, share):
    denoiser, calls = recorded_calls
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(script_v3.NULL_CLASS, (20_000,), generator=generator)
    script_v3.rectified_flow_loss(denoiser, torch.zeros(20_000, 1, 1, 1), labels, generator, class_dropout=share)
    [(_, _, seen)] = calls
    dropped = seen == script_v3.NULL_CLASS
    assert torch.equal(seen[~dropped], labels[~dropped])
    assert abs(dropped.float().mean() - share) <= 4 * (share * (1 - share) / len(labels)) ** 0.5
    for label in range(script_v3.NULL_CLASS):  # no class is spared
        assert abs(dropped[labels == label].float().mean() - share) < 0.06


def test_training_sees_the_forward_process_at_logit_normal_times(script_v3, recorded_calls):
    denoiser, calls = recorded_calls
    x0 = torch.full((20_000, 1, 1, 1), 5.0)
    labels = torch.zeros(len(x0), dtype=torch.int64)
    script_v3.rectified_flow_loss(denoiser, x0, labels, torch.Generator().manual_seed(0), class_dropout=0.1)
    [(x, t, _)] = calls
    np.testing.assert_allclose(np.quantile(t, [0.1, 0.5, 0.9]), 1000 * expit(norm.ppf([0.1, 0.5, 0.9])), atol=10)
    s = t / 1000
    noise = (x.flatten() - (1 - s) * 5) / s
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack([noise, t]))[0, 1]) < 0.03


def test_loss_depends_on_the_generator_alone(script_v3):
    x0, labels = torch.randn(8, 2, 2, 2), torch.arange(8)

    def loss(seed):
        generator = torch.Generator().manual_seed(seed)
        return script_v3.rectified_flow_loss(lambda x, t, classes: x, x0, labels, generator, class_dropout=0.1)

    state = torch.get_rng_state()
    assert loss(0) == loss(0) != loss(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_guidance_weighs_the_class_against_no_class(script_v3):
    x, t = torch.randn(4, 2, 3, 3), 300.0
    classes = script_v3.class_weights(torch.tensor([0, 1, 9, script_v3.NULL_CLASS]))
    null = script_v3.class_weights(torch.full((4,), script_v3.NULL_CLASS))
    readout = torch.randn(classes.shape[1])

    def denoiser(x, t, classes):
        return torch.sin(x * (classes @ readout + t / 500)[:, None, None, None])

    times = torch.full((4,), t)
    conditional, unconditional = denoiser(x, times, classes), denoiser(x, times, null)

    def guided(scale):
        return script_v3.guided(denoiser, classes, scale)(x, t)

    assert torch.equal(guided(1.0), conditional)
    assert torch.equal(guided(0.0), unconditional)
    for scale in (0.3, 1.5, 4.0):
        torch.testing.assert_close(guided(scale), unconditional + scale * (conditional - unconditional))
        torch.testing.assert_close(guided(scale)[-1], unconditional[-1])  # nothing to guide towards


def test_class_weights_are_one_hot_with_a_place_for_no_class(script_v3):
    assert script_v3.NULL_CLASS == len(script_v3.CLASS_NAMES) == 10
    weights = script_v3.class_weights(torch.arange(11))
    assert torch.equal(weights, torch.eye(11))
    assert torch.equal(script_v3.class_weights(torch.tensor([script_v3.NULL_CLASS]))[0].nonzero(), torch.tensor([[10]]))


@pytest.mark.parametrize("dim", [8, 64])
def test_timestep_embedding_tells_times_apart(script_v3, dim):
    times = torch.linspace(0, 1000, 2001)
    embedding = script_v3.timestep_embedding(times, dim)
    assert embedding.shape == (2001, dim)
    torch.testing.assert_close(embedding.norm(dim=1), torch.full((2001,), (dim / 2) ** 0.5))
    distances = torch.cdist(embedding.double(), embedding.double())
    assert distances[~torch.eye(2001, dtype=torch.bool)].min() > 0.05  # times half a unit apart and more
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
