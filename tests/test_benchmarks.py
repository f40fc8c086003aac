"""The benchmarks measure what they say: checked by closed forms, other code and known samples."""

import dataclasses
import json
import zipfile

import numpy as np
import prdc
import pytest
import scipy.linalg
import torch

import feature_extractor as fe
import quality
from conftest import draw_shapes, write_tiny_data

KEYS = {"file", "n", *quality.METRICS}


def draw(*shape, seed):
    """Standard normal numbers in float64."""
    how = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    return torch.randn(*shape, **how)


def random_covariance(dim, seed):
    factor = draw(dim, dim, seed=seed)
    return factor @ factor.T / dim


# --- Metrics --------------------------------------------------------------------------------------


def test_frechet_distance_has_its_closed_form_for_commuting_covariances():
    a, b = draw(2, 12, seed=0).square()  # variances along shared axes
    mean_a, mean_b = draw(2, 12, seed=1)
    axes = torch.linalg.qr(random_covariance(12, seed=1)).Q
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    measured = quality.frechet_distance(mean_a, axes * a @ axes.T, mean_b, axes * b @ axes.T)
    assert measured == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("dim", [3, 40, 128])
def test_frechet_distance_agrees_with_scipy(dim):
    mean_a, mean_b = draw(2, dim, seed=2).numpy()
    a, b = random_covariance(dim, seed=3).numpy(), random_covariance(dim, seed=4).numpy()
    cross = scipy.linalg.sqrtm(a @ b).real
    expected = np.square(mean_a - mean_b).sum() + np.trace(a + b - 2 * cross)
    measured = quality.frechet_distance(*map(torch.from_numpy, (mean_a, a, mean_b, b)))
    assert measured == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_survives_singular_covariances():
    mean, covariance = quality.mean_and_covariance(draw(20, 128, seed=5))
    for scale, expected in ((1, 0), (4, covariance.trace().item())):
        found = quality.frechet_distance(mean, covariance, mean, scale * covariance)
        assert found == pytest.approx(expected, abs=1e-9)


def test_statistics_are_unbiased_and_in_float64():
    features = (draw(50, 6, seed=6) + 1000).float()
    mean, covariance = quality.mean_and_covariance(features)
    assert mean.dtype == covariance.dtype == torch.float64
    features = features.double().numpy()
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.6, 0.3), (1.5, 0.5), (1.0, 20.0)])
def test_neighbour_scores_agree_with_prdc(k, scale, shift):
    generator = torch.Generator().manual_seed(7)
    real = torch.randn(1100, 8, generator=generator)  # three chunks, the last one not full
    fake = scale * torch.randn(700, 8, generator=generator) + shift
    measured = quality.neighbour_scores(real, fake, k)
    expected = prdc.compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=k)
    assert measured == pytest.approx(expected, abs=1e-12)


def test_nearest_image_distances_agree_with_a_plain_loop():
    rng = np.random.default_rng(8)
    images, others = (torch.from_numpy(draw_shapes(np.arange(n) % 10, rng)) for n in (30, 40))
    pairs = (images.double()[:, None] - others.double()).flatten(2) / 255  # (30, 40, 784)
    expected = pairs.norm(dim=2).amin(dim=1)
    found = quality.nearest_image_distances(images, others)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_blur_averages_two_by_two_and_interpolates():
    rows, columns = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    checkerboard = (200 * ((rows + columns) % 2)).byte()
    ramp = (9 * columns).byte()
    blurred = quality.blur(torch.stack([checkerboard, ramp]))
    assert (blurred[0] == 100).all()
    assert blurred.shape == (2, 28, 28) and blurred.dtype == torch.uint8
    change = blurred[1].int() - ramp.int()
    assert change[:, 1:-1].abs().max() <= 1  # linear, so only rounding changes it


# --- Feature extractor ----------------------------------------------------------------------------


def test_the_classifier_is_small_and_accurate(real_data_dir):
    assert fe.WEIGHTS_PATH.stat().st_size <= 4 * 2**20
    images, labels = fe.load_split(real_data_dir, train=False)
    assert fe.accuracy(fe.load_feature_extractor(), images, labels) >= 0.935


def test_other_weights_are_refused(tmp_path):
    damaged = bytearray(fe.WEIGHTS_PATH.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path = tmp_path / "feature_extractor.pt"
    path.write_bytes(damaged)
    with pytest.raises(RuntimeError, match=f"SHA-256.*expected {fe.WEIGHTS_SHA256}"):
        fe.load_feature_extractor(path)
    with pytest.raises(RuntimeError, match="no feature extractor weights"):
        fe.load_feature_extractor(tmp_path / "missing.pt")


def test_extraction_depends_on_neither_layout_nor_chunks():
    images = draw_shapes(np.arange(60) % 10, np.random.default_rng(9))
    features, logits = fe.extract(images)
    assert features.shape == (60, fe.FEATURE_DIM) and logits.shape == (60, 10)
    for same in (images[..., None], images[:, None], torch.from_numpy(images)):
        again = fe.extract(same, chunk_size=7)
        torch.testing.assert_close(again, (features, logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 28, 28), float), ((3, 32, 32), np.uint8), ((3, 784), np.uint8)]
)
def test_extraction_refuses_other_arrays(shape, dtype):
    with pytest.raises(ValueError, match="images must be"):
        fe.extract(np.zeros(shape, dtype))


def test_an_unreadable_data_file_is_named(tmp_path):
    write_tiny_data(tmp_path, train=10, test=10)
    archive = tmp_path / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is not a readable IDX file"):
        fe.load_split(tmp_path, train=False)


# --- Scores of whole sample files, on a tiny data set ---------------------------------------------


@dataclasses.dataclass
class Tiny:
    """A tiny data set's folder and images: those that models train on, and the test split."""

    data_dir: object
    train: tuple
    test: tuple

    def score(self, capsys, tmp_path, *files):
        """Run the command line; return the rows of the JSON, standard output and standard error."""
        capsys.readouterr()
        path = tmp_path / "rows.json"
        quality.main([*map(str, files), f"--data-dir={self.data_dir}", f"--json={path}"])
        return json.loads(path.read_text()), *capsys.readouterr()


@pytest.fixture(scope="module")
def tiny(scored_data_dir):
    train, test = (fe.load_split(scored_data_dir, train=train) for train in (True, False))
    return Tiny(scored_data_dir, tuple(part[:600] for part in train), test)


def save(path, images, labels=None):
    arrays = {"arr_0": np.asarray(images)[..., None]}
    np.savez(path, **arrays, **({} if labels is None else {"arr_1": np.asarray(labels)}))
    return path


def test_rows_and_json(tiny, capsys, tmp_path):
    test = save(tmp_path / "test.npz", *tiny.test)
    unlabelled = save(tmp_path / "unlabelled.npz", tiny.train[0], np.full(600, -1))
    rows, out, err = tiny.score(capsys, tmp_path, test, unlabelled)
    assert all(set(row) == KEYS for row in rows)
    balanced = "reference: 300 real training images, balanced (floor)"
    random = "reference: 600 real training images, at random (floor)"
    names = [balanced, random, quality.BLUR, quality.NOISE, str(test), str(unlabelled)]
    assert [row["file"] for row in rows] == names
    assert len(out.splitlines()) == 2 * (2 + 6) + 1
    assert err.count("warning") == 2 and "300 samples" in err

    floor, _, blurred, noise, itself, copies = rows
    for key, percent in quality.DISTANCES.items():
        assert blurred[percent] == pytest.approx(100)
        assert noise[percent] == pytest.approx(100 * noise[key] / blurred[key])
        assert itself[percent] < floor[percent] < noise[percent]
    assert floor["percent_of_blur"] < 100 and floor["fd_random_percent_of_blur"] < 100
    assert noise["coverage"] == 0 and noise["accuracy"] is None
    assert blurred["detail"] < 0.5 < floor["detail"] < 1.5 < noise["detail"]
    for row in rows:
        frechet = [row[key] / blurred[key] for key in ("fmd", "fd_random")]
        roots = np.sqrt(np.maximum(frechet, 0))
        worst = max(*roots, row["swd"] / blurred["swd"])
        assert row["worst_percent_of_blur"] == pytest.approx(100 * worst)

    # The test images against themselves: no distance, all within their own balls.
    assert itself["n"] == 300
    assert all(itself[key] == pytest.approx(0, abs=1e-5) for key in quality.DISTANCES)
    assert itself["detail"] == pytest.approx(1)
    assert itself["precision"] == itself["recall"] == itself["coverage"] == 1
    assert itself["copying"] == pytest.approx(quality.COPY_QUANTILE, abs=0.01)
    assert itself["nn_distance_ratio"] == pytest.approx(1, abs=1e-4)
    right = fe.extract(tiny.test[0])[1].argmax(1) == tiny.test[1]
    assert itself["accuracy"] == pytest.approx(right.double().mean().item())

    assert copies["copying"] == 1 and copies["nn_distance_ratio"] == pytest.approx(0, abs=1e-2)
    assert copies["accuracy"] is None


@pytest.mark.parametrize(
    ("fmd", "swd", "fd_random", "worst"),
    [(4, 10, 0, 20), (4, 30, 9, 30), (0, 0, 25, 50), (-1e-9, 5, -1e-9, 5), (100, 100, 100, 100)],
)
def test_the_summary_is_what_the_worst_eye_sees(fmd, swd, fd_random, worst):
    row = {"percent_of_blur": fmd, "swd_percent_of_blur": swd}
    row["fd_random_percent_of_blur"] = fd_random
    assert quality.worst_percent_of_blur(row) == pytest.approx(worst)


def test_no_score_depends_on_the_order_of_the_file(tiny):
    images, labels = (part[:200] for part in tiny.train)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    first = quality.score_arrays(images, labels, tiny.data_dir)
    again = quality.score_arrays(images[order], labels[order], tiny.data_dir)
    assert again == pytest.approx(first, rel=1e-4, abs=1e-6)
    assert quality.score_arrays(images, labels, tiny.data_dir) == pytest.approx(first, rel=1e-9)


# --- Floors ---------------------------------------------------------------------------------------


def test_a_floor_has_the_samples_number_and_classes_and_says_so():
    train_labels = torch.arange(600) % 10
    labels = torch.tensor([3] * 20 + [7] * 90)  # more sevens than there are
    rows = quality.draw_like(110, labels, train_labels)
    assert train_labels[rows].bincount(minlength=10).tolist() == [0, 0, 0, 20, 0, 0, 0, 90, 0, 0]
    assert len(rows[:20].unique()) == 20 and len(rows[20:].unique()) == 60
    for unknown in (None, torch.full((110,), -1), torch.tensor([0] * 109 + [-1])):
        rows = quality.draw_like(110, unknown, train_labels)
        assert len(rows.unique()) == 110 and rows.tolist() != sorted(rows.tolist())
    assert len(quality.draw_like(700, None, train_labels).unique()) == 600
    balanced, other = torch.arange(25) % 10, torch.arange(25) % 9
    for labels, balance in (
        (balanced, "balanced"),
        (other, "in the samples' balance"),
        (other - 1, "at random"),
        (None, "at random"),
    ):
        name = f"reference: 1,025 real training images, {balance} (floor)"
        assert quality.floor_name(1025, labels) == name


def test_a_floor_is_scored_once_and_kept(tiny, monkeypatch):
    labels = torch.arange(120) % 10
    reference = quality.load_reference(tiny.data_dir)
    floor = quality.load_floor(120, labels, reference)
    rows = quality.draw_like(120, labels, tiny.train[1])
    expected = quality.score_arrays(tiny.train[0][rows], tiny.train[1][rows], tiny.data_dir)
    assert floor == pytest.approx({"file": quality.floor_name(120, labels), **expected})

    monkeypatch.setattr(quality, "score_against", lambda *_: pytest.fail("scored again"))
    assert quality.load_floor(120, labels.flip(0), reference) == floor
    quality.load_reference.cache_clear()
    assert quality.load_floor(120, labels, quality.load_reference(tiny.data_dir)) == floor


def test_validation_scores_against_the_validation_images(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(fe, "VALIDATION_SIZE", 250)
    monkeypatch.setattr(quality, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(quality.class_free, "DIRECTIONS", 16)  # only which images matters here
    write_tiny_data(tmp_path, train=650, test=200)
    images, labels = fe.load_split(tmp_path, train=True)
    held_out, held_out_labels = images[-250:], labels[-250:]
    some = Tiny(tmp_path, (images[:400], labels[:400]), fe.load_split(tmp_path, train=False))
    itself = save(tmp_path / "samples.npz", held_out, held_out_labels)
    floor, *_, row = some.score(capsys, tmp_path, itself, "--validation")[0]
    assert row["fmd"] == pytest.approx(0, abs=1e-6) and row["coverage"] == 1
    assert all(row[key] == pytest.approx(0, abs=1e-5) for key in quality.DISTANCES)
    assert row["copying"] == pytest.approx(quality.COPY_QUANTILE, abs=0.01)
    scores = quality.score_arrays(held_out, held_out_labels, tmp_path, True)
    assert row == {"file": str(itself), **scores}
    assert quality.fmd_percent_of_blur(held_out, tmp_path, True) == row["percent_of_blur"]

    # The floor and the copies are of the images that models train on.
    assert floor["file"].startswith("reference: 250 real training images") and floor["copying"] == 1
    assert floor["fmd"] > 0
    assert torch.equal(quality.load_reference(tmp_path, True)["train_images"], images[:400])
    assert quality.score_arrays(held_out, held_out_labels, tmp_path)["fmd"] > 1e-3


def test_the_spectra_are_drawn(tiny, capsys, tmp_path):
    path = save(tmp_path / "samples.npz", tiny.train[0][:100])
    tiny.score(capsys, tmp_path, path, f"--plot={tmp_path / 'spectrum.png'}")
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_get_a_row_of_mean_and_spread(tiny, capsys, tmp_path):
    names = ("samples.npz", "samples_seed_1.npz", "samples_seed_22.npz")
    parts = zip(*(part.split(200) for part in tiny.train))
    files = [save(tmp_path / name, *arrays) for name, arrays in zip(names, parts)]
    other = save(tmp_path / "others_seed_1.npz", tiny.test[0])
    rows, out, _ = tiny.score(capsys, tmp_path, *files, other)
    summary = rows[-1]
    # Each file has a floor: no two have the same classes.
    assert len(rows) == 4 + 2 + 4 + 1 and set(summary).issuperset(KEYS)
    assert summary["file"] == str(tmp_path / "samples_seed_*.npz")
    assert (summary["n"], summary["files"]) == (200, 3)
    for metric in quality.METRICS:
        values = [row[metric] for row in rows if row["file"] in map(str, files)]
        assert len(values) == 3
        assert summary[metric] == pytest.approx(np.mean(values))
        assert summary[f"{metric}_spread"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    assert "±" in out.splitlines()[-1]


def test_scores_from_python_are_those_of_the_command_line(tiny, capsys, tmp_path):
    images, labels = tiny.train[0][:200], tiny.train[1][:200]
    rows, *_ = tiny.score(capsys, tmp_path, save(tmp_path / "samples.npz", images, labels))
    scores = quality.score_arrays(images.numpy()[..., None], labels.numpy(), data_dir=tiny.data_dir)
    assert {"file": rows[-1]["file"], **scores} == pytest.approx(rows[-1])
    assert quality.score_arrays(images, data_dir=tiny.data_dir)["accuracy"] is None
    quick = quality.fmd_percent_of_blur(images, data_dir=tiny.data_dir)
    assert quick == pytest.approx(scores["percent_of_blur"])


def test_the_reference_is_cached_under_the_weights(tiny, monkeypatch):
    first = quality.load_reference(tiny.data_dir)
    quality.load_reference.cache_clear()
    monkeypatch.setattr(quality, "measure_reference", lambda *_: pytest.fail("measured again"))
    again = quality.load_reference(tiny.data_dir)
    assert again["rows"] == first["rows"]
    assert torch.equal(again["train_images"], first["train_images"])

    path = quality.reference_path(tiny.test[0], tiny.train[0])
    assert path.is_file() and fe.WEIGHTS_SHA256[:12] in path.name
    monkeypatch.setattr(fe, "WEIGHTS_SHA256", "f" * 64)
    assert quality.reference_path(tiny.test[0], tiny.train[0]) != path
    assert quality.reference_path(tiny.test[0][:-1], tiny.train[0]) != path


# --- Bad files ------------------------------------------------------------------------------------


IMAGES = np.zeros((200, 28, 28), np.uint8)


def write_bad(path, damage):
    """A good file, cut short or with a bit flipped; or a file of another kind."""
    save(path, IMAGES)
    content = bytearray(path.read_bytes())
    content[50_000] ^= damage == "flipped"
    path.write_bytes(content[:-100] if damage == "truncated" else content)
    if damage == "npy":
        np.save(path.with_suffix(".npy"), IMAGES[..., None])
        path.with_suffix(".npy").rename(path)
    if damage == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("notes.txt", "no array")


UNSOUND, LABELS = "not a sound .npz file", "labels must be"
BAD_FILES = {
    "missing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "no bytes": (lambda path: path.touch(), UNSOUND),
    "text": (lambda path: path.write_text("a picture of a shoe"), UNSOUND),
    "npy": (lambda path: write_bad(path, "npy"), UNSOUND),
    "truncated": (lambda path: write_bad(path, "truncated"), UNSOUND),
    "damaged": (lambda path: write_bad(path, "flipped"), UNSOUND),
    "no array": (lambda path: write_bad(path, "zip"), "no arr_0"),
    "another name": (lambda path: np.savez(path, images=IMAGES), "no arr_0 in it (it holds images"),
    "objects": (lambda path: np.savez(path, np.array([None] * 200)), "allow_pickle"),
    "strings": (lambda path: np.savez(path, np.array(["shoe"] * 200)), "str"),
    "float": (lambda path: save(path, IMAGES.astype(float)), "got float64"),
    "shape": (
        lambda path: save(path, np.pad(IMAGES, ((0, 0), (2, 2), (2, 2)))),
        "(200, 32, 32, 1)",
    ),
    "channels": (lambda path: np.savez(path, np.stack([IMAGES] * 3, 3)), "(200, 28, 28, 3)"),
    "no images": (lambda path: save(path, IMAGES[:0]), "0 images"),
    "few images": (lambda path: save(path, IMAGES[:9]), "9 images"),
    "few labels": (lambda path: save(path, IMAGES, np.zeros(199, int)), LABELS),
    "float labels": (lambda path: save(path, IMAGES, np.zeros(200)), LABELS),
    "label 10": (lambda path: save(path, IMAGES, np.full(200, 10)), "labels must lie"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_gets_one_line_and_status_2(case, tmp_path, refused):
    write, message = BAD_FILES[case]
    path = tmp_path / "samples.npz"
    write(path)
    error = refused(quality.main, path)
    assert error.startswith(f"error: {path}: ") and message in error
