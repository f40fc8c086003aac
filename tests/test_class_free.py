"""The class-free eyes: checked by independent code, closed forms and images of known damage."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
import torch.nn.functional as F

import class_free
import damage
import feature_extractor as fe
import quality
from conftest import draw_shapes


@pytest.fixture(scope="module")
def shapes():
    """Two sets of drawn images, uint8 (120, 28, 28) and (90, 28, 28)."""
    rng = np.random.default_rng(0)
    return [torch.from_numpy(draw_shapes(np.arange(n) % 10, rng)) for n in (120, 90)]


def shuffled(images, seed=0):
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]


# --- Laplacian pyramid ----------------------------------------------------------------------------


def scipy_filter(image):
    """The pyramid's filter, by scipy: "mirror" does not repeat the border's pixels."""
    weights = np.array([1, 4, 6, 4, 1]) / 16
    for axis in (0, 1):
        image = scipy.ndimage.correlate1d(image, weights, axis=axis, mode="mirror")
    return image


def test_the_pyramid_agrees_with_scipy(shapes):
    levels = class_free.laplacian_pyramid(shapes[0][:3])
    for number in range(3):
        fine = shapes[0][number].double().numpy()
        for size in (28, 14):
            coarse = scipy_filter(fine)[::2, ::2]
            spread = np.zeros_like(fine)
            spread[::2, ::2] = coarse
            expected = fine - 4 * scipy_filter(spread)
            np.testing.assert_allclose(levels[size][number, 0], expected, atol=1e-3)
            fine = coarse
        np.testing.assert_allclose(levels[7][number, 0], fine, atol=1e-3)


# --- Sliced Wasserstein distance ------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 20), (7, 30), (1, 9), (31, 17)])
def test_the_wasserstein_distance_agrees_with_scipy(n, m):
    rng = np.random.default_rng(n + m)
    a, b = np.sort(rng.normal(size=(4, n))), np.sort(rng.normal(0.5, 2, size=(4, m)))
    expected = [scipy.stats.wasserstein_distance(*rows) for rows in zip(a, b)]
    np.testing.assert_allclose(class_free.wasserstein_1d(a, b), expected, rtol=1e-12)


def test_the_grid_of_patches_is_the_published_one():
    """Other patches would be other figures: 64, 64 and 1 of them; each pixel is in some patch."""
    for size, count in ((28, 64), (14, 64), (7, 1)):
        level = torch.arange(size**2, dtype=torch.float32).reshape(1, 1, size, size)
        patches = class_free.normalised_patches(level, class_free.STRIDES[size])
        assert patches.shape == (count, 49) and len(patches.unique()) == size**2
    assert class_free.DIRECTIONS == 128


def slow_swd(images, others, size, directions):
    """The distance of one level, patch by patch and direction by direction, with scipy."""
    sets = []
    for some in (images, others):
        stride, patches = class_free.STRIDES[size], []
        for image in class_free.laplacian_pyramid(some)[size][:, 0].numpy():
            for i in range(0, size - 6, stride):
                for j in range(0, size - 6, stride):
                    patches.append(image[i : i + 7, j : j + 7].ravel())
        patches = np.array(patches, dtype=np.float64)
        sets.append((patches - patches.mean()) / patches.std())
    pairs = [[part @ way for part in sets] for way in directions]
    return 1000 * np.mean([scipy.stats.wasserstein_distance(*pair) for pair in pairs])


def test_the_distance_agrees_with_a_slow_one(shapes, monkeypatch):
    monkeypatch.setattr(class_free, "DIRECTIONS", 20)
    images, others = shapes[0][:30], shapes[1][:20]
    generator = torch.Generator().manual_seed(3)
    measured = class_free.sliced_wasserstein(images, others, seed=3)
    for size in (28, 14, 7):
        ways = torch.randn(20, 49, generator=generator).double().numpy()
        ways /= np.linalg.norm(ways, axis=1, keepdims=True)
        expected = slow_swd(images, others, size, ways)
        assert measured[f"swd_{size}"] == pytest.approx(expected, rel=1e-3)
    levels = [measured[f"swd_{size}"] for size in (28, 14, 7)]
    assert measured["swd"] == pytest.approx(np.mean(levels))


def test_the_distance_is_one_number_for_one_seed_in_any_order(shapes):
    images, others = shapes
    first = class_free.sliced_wasserstein(images, others)
    assert class_free.sliced_wasserstein(images, others) == first
    again = class_free.sliced_wasserstein(shuffled(images), shuffled(others))
    assert again == pytest.approx(first, rel=1e-5)
    assert class_free.sliced_wasserstein(images, others, seed=1) != pytest.approx(first, rel=1e-5)
    assert max(class_free.sliced_wasserstein(images, shuffled(images)).values()) < 0.01


def test_contrast_is_normalised_away(shapes):
    """As in the paper; ``detail`` is there to see it."""
    images = shapes[0] // 2 * 2
    distances = class_free.sliced_wasserstein(images, images // 2)
    assert max(distances.values()) < 0.01
    spectra = map(class_free.power_spectrum, (images // 2, images))
    assert class_free.detail(*spectra) == pytest.approx(0.25)


# --- Power spectrum -------------------------------------------------------------------------------


def test_the_spectrum_holds_all_power(shapes):
    spectrum = class_free.power_spectrum(shapes[0])
    expected = (shapes[0].double() / 255).square().sum(dim=(1, 2)).mean()  # Parseval
    assert spectrum.shape == (21,) and spectrum.dtype == torch.float64
    assert spectrum.sum().item() == pytest.approx(expected.item(), rel=1e-12)
    assert class_free.power_spectrum(shuffled(shapes[0])) == pytest.approx(spectrum, rel=1e-12)


@pytest.mark.parametrize(
    ("u", "v", "radius"), [(0, 0, 0), (3, 0, 3), (0, 14, 14), (5, 5, 7), (14, 14, 20), (-6, 8, 10)]
)
def test_a_wave_stands_at_its_frequency(u, v, radius):
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    wave = torch.cos(2 * torch.pi * (u * rows + v * columns) / 28)
    spectrum = class_free.power_spectrum((127 + 100 * wave).round().byte()[None])
    spectrum[0] -= 0 if radius == 0 else spectrum[0]  # the mean, 127
    assert spectrum.argmax() == radius
    assert spectrum[radius] > 0.99 * spectrum.sum()


def test_detail_is_the_share_of_the_upper_half():
    reference = torch.ones(21, dtype=torch.float64)
    spectrum = reference.clone()
    spectrum[:8] = 99  # up to 7 periods an image: not asked for
    assert class_free.detail(spectrum, reference) == 1
    spectrum[8:] = torch.linspace(0, 1, 13, dtype=torch.float64)
    assert class_free.detail(spectrum, reference) == pytest.approx(0.5)


# --- Random features ------------------------------------------------------------------------------


def test_the_random_filters_are_always_the_same():
    state = torch.get_rng_state()
    again, other = class_free.random_filters.__wrapped__(0), class_free.random_filters(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(class_free.random_filters(), again))
    assert not torch.equal(other[0], again[0])
    for weight, shape in zip(again, [(32, 1, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3)]):
        assert weight.shape == shape
        assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.1)
    # Other weights would be other figures: these are the ones that were published with.
    first = torch.tensor([-0.5307, -0.5432, -0.1181])
    torch.testing.assert_close(again[0].flatten()[:3], first, rtol=0, atol=1e-4)


def test_the_random_features_are_the_means_of_each_level(shapes):
    features = class_free.random_features(shapes[0], chunk_size=50)
    x, means = fe.to_input(shapes[0]), []
    for weight in class_free.random_filters():
        patches = F.unfold(x, 3, padding=1)  # (N, 9 C, S S)
        x = (weight.flatten(1) @ patches).clamp(min=0)
        means.append(x.mean(2))
        side = int(x.shape[2] ** 0.5)
        x = F.adaptive_avg_pool2d(x.unflatten(2, (side, side)), side // 2)
    torch.testing.assert_close(features, torch.cat(means, 1), rtol=1e-4, atol=1e-4)
    assert features.shape == (120, 224)


# --- Known damage, on real images -----------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(real_data_dir):
    """Damaged training images, by name, and the test images to compare with: 500 of each."""
    split = fe.load_split(real_data_dir, train=True)
    images, labels = (each[:500] for each in split)
    others = [each[500:1_000] for each in split]
    missing = int((labels == damage.MISSING).sum())
    noise = torch.randint(256, images.shape, generator=torch.Generator().manual_seed(0)).byte()
    return fe.load_split(real_data_dir, train=False)[0][:500], {
        "nothing": images,
        "shift": damage.shift(images, 1),
        "slight blur": damage.blur_slightly(images),
        "blur": quality.blur(images),
        "faint noise": damage.add_noise(images, 10),
        "mirrored shoes": damage.mirror(images, torch.isin(labels, damage.SHOES)),
        "half a class missing": damage.lose(images, labels, *others, missing // 2)[0],
        "a class missing": damage.lose(images, labels, *others, missing)[0],
        "noise": noise,
    }


def test_the_sliced_distance_orders_known_damage(damaged, monkeypatch):
    monkeypatch.setattr(class_free, "DIRECTIONS", 32)  # as many as these orders need
    test, images = damaged
    swd = {name: class_free.sliced_wasserstein(some, test) for name, some in images.items()}
    for key in ("swd_28", "swd_14", "swd"):
        assert swd["nothing"][key] < swd["slight blur"][key] < swd["blur"][key] < swd["noise"][key]
    assert swd["nothing"]["swd_28"] < swd["faint noise"]["swd_28"] < swd["noise"]["swd_28"]
    coarse = {name: distances["swd_7"] for name, distances in swd.items()}
    assert 2 * coarse["nothing"] < min(coarse["shift"], coarse["mirrored shoes"])
    assert 1.4 * coarse["nothing"] < coarse["a class missing"]  # of half one, 500 are too few


def test_the_random_features_order_known_damage(damaged):
    test, images = damaged
    reference = quality.mean_and_covariance(class_free.random_features(test))
    distances = {}
    for name, some in images.items():
        gaussian = quality.mean_and_covariance(class_free.random_features(some))
        distances[name] = quality.frechet_distance(*gaussian, *reference)
    order = ["nothing", "shift", "slight blur", "blur", "noise"]
    assert sorted(order, key=distances.get) == order
    assert distances["blur"] > 3 * distances["slight blur"]
    assert distances["nothing"] < min(distances["faint noise"], distances["mirrored shoes"])
    assert distances["nothing"] < distances["half a class missing"] < distances["a class missing"]


def test_detail_orders_known_damage(damaged):
    test, images = damaged
    reference = class_free.power_spectrum(test)
    spectra = {name: class_free.power_spectrum(some) for name, some in images.items()}
    details = {name: class_free.detail(each, reference) for name, each in spectra.items()}
    assert details["blur"] < 0.1 < details["slight blur"] < 0.5
    assert 0.95 < details["nothing"] < 1.05 < 4 < details["noise"]
    assert details["mirrored shoes"] == pytest.approx(details["nothing"])  # flips keep the power
