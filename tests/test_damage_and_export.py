"""The table of known damage, the choice of features, and the export of single pictures."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import damage
import export_png
import feature_extractor as fe
import quality
from conftest import REPOSITORY, draw_shapes


@pytest.fixture(scope="module")
def shapes():
    """Drawn images, uint8 (100, 28, 28), ten of each class in turn."""
    return torch.from_numpy(draw_shapes(np.arange(100) % 10, np.random.default_rng(0)))


# --- damage.py ------------------------------------------------------------------------------------


def test_noise_has_the_strength_that_is_asked_for():
    grey = torch.full((50, 28, 28), 128, dtype=torch.uint8)
    noisy = damage.add_noise(grey, 10)
    assert noisy.dtype == torch.uint8 and noisy.double().std().item() == pytest.approx(10, rel=0.02)
    assert noisy.double().mean().item() == pytest.approx(128, abs=0.2)
    assert torch.equal(noisy, damage.add_noise(grey, 10))


def test_a_slight_blur_spreads_a_point():
    point = torch.zeros(1, 28, 28, dtype=torch.uint8)
    point[0, 10, 20] = 64
    expected = torch.zeros_like(point)
    weights = torch.tensor([1, 6, 1])
    expected[0, 9:12, 19:22] = torch.outer(weights, weights).byte()
    assert torch.equal(damage.blur_slightly(point), expected)


def test_softening_halves_the_finest_level_alone(shapes):
    smooth = (shapes // 2 + 60).byte()  # nothing is cut off at black or white
    softened = damage.soften(smooth)
    fine, after = (damage.class_free.laplacian_pyramid(x)[28][:, 0] for x in (smooth, softened))
    # Not exactly half: the low-pass filter lets some of the finest level pass.
    assert 0.4 < (after.std() / fine.std()).item() < 0.7
    difference = smooth.float() - softened.float() - fine / 2
    assert difference.abs().max() <= 0.5 + 1e-3  # the rounding


def test_images_are_moved_and_mirrored(shapes):
    moved = damage.shift(shapes, 2)
    assert torch.equal(moved[:, :, 2:], shapes[:, :, :-2]) and (moved[:, :, :2] == 0).all()
    rows = torch.arange(100) % 3 == 0
    mirrored = damage.mirror(shapes, rows)
    assert torch.equal(mirrored[rows], shapes[rows].flip(2))
    assert torch.equal(mirrored[~rows], shapes[~rows])


@pytest.mark.parametrize("count", [1, 5, 10])
def test_lost_images_are_made_up_for_by_the_other_classes(shapes, count):
    labels, other_labels = torch.arange(100) % 10, torch.arange(100) // 10
    images, left = damage.lose(shapes, labels, shapes.flip(1), other_labels, count)
    counts = left.bincount(minlength=10).tolist()
    assert counts[damage.MISSING] == 10 - count and sum(counts) == 100
    assert max(counts[:9]) - min(counts[:9]) <= 1 + (count == 10)
    same = (images == shapes).all(dim=(1, 2))
    assert (~same).sum() == count and (labels[~same] == damage.MISSING).all()


@pytest.fixture
def small_reference(scored_data_dir, monkeypatch):
    """The reference of the tiny data set, and ten images a class to damage."""
    reference = quality.load_reference(scored_data_dir)  # measured in all directions: others use it
    monkeypatch.setattr(damage.class_free, "DIRECTIONS", 16)
    monkeypatch.setattr(damage, "PER_CLASS", 10)
    return reference


def test_each_kind_of_damage_has_its_row_in_both_tables(small_reference, scored_data_dir, capsys):
    quality.load_reference.cache_clear()
    damage.main(["--data-dir", str(scored_data_dir)])
    tables = [text.splitlines() for text in capsys.readouterr().out.strip().split("\n\n")]
    kinds = list(damage.damages(small_reference["train_images"], small_reference["train_labels"]))
    assert len({words for words, *_ in kinds}) == len(kinds)
    readme = (REPOSITORY / "tests" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for lines, columns in zip(tables, (damage.DISTANCES, damage.NEIGHBOURS), strict=True):
        assert all(line.count("|") == len(columns) + 2 for line in lines)
        names = [line.strip("| ").split(" | ")[0] for line in lines[2:]]
        assert names == [words for words, *_ in kinds]
        published = readme.partition(lines[0])[2].strip().partition("\n\n")[0].splitlines()[1:]
        assert [line.strip("| ").split(" | ")[0] for line in published] == names
    cells = [line.strip("| ").split(" | ") for line in tables[0][2:]]
    worst = 1 + list(damage.DISTANCES).index("worst")
    values = {row[0]: float(row[worst].rstrip("%")) for row in cells}
    assert max(values, key=values.get) == "nothing but noise"
    for words, images, labels in kinds:
        assert images.dtype == torch.uint8 and len(images) == len(labels)
        count = int(re.sub(r"\D", "", words)) // 100 if words.startswith("only") else 100
        assert len(images) == (20 if words == "only 2,000, drawn at random" else count)


def test_the_features_are_compared(small_reference, scored_data_dir, capsys, monkeypatch):
    tried = damage.candidates(small_reference["images"])
    assert len(tried) > 2
    # 784 components of so few images take long and say nothing.
    fewer = {name: tried[name] for name in list(tried)[:2]}
    monkeypatch.setattr(damage, "candidates", lambda images: fewer)
    damage.main(["--features", "--data-dir", str(scored_data_dir)])
    head, _, undamaged, *rows = capsys.readouterr().out.splitlines()
    names = list(damage.candidates(small_reference["images"]))
    assert head.strip("| ").split(" | ") == ["damage", *names]
    assert undamaged.count("±") == len(names)
    own = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in rows}
    measured = [float(cell.strip("|% ")) for cell in own["nothing but noise"]]
    assert len(measured) == len(names) and min(measured) > 100

    # The first candidate is the one that quality.py has.
    train, labels = (small_reference[name] for name in ("train_images", "train_labels"))
    kinds = damage.damages(train, labels)
    noise = next(images for words, images, _ in kinds if words.startswith("nothing"))
    blurred = quality.blur(train[quality.draw_like(100, torch.arange(100) % 10, labels)])
    distances = []
    for images in (noise, blurred):
        gaussian = quality.mean_and_covariance(damage.class_free.random_features(images))
        distances.append(quality.frechet_distance(*gaussian, *small_reference["random_gaussian"]))
    assert measured[0] == pytest.approx(100 * distances[0] / distances[1], rel=1e-3)


# --- export_png.py --------------------------------------------------------------------------------


def read_pictures(folder):
    paths = sorted(folder.iterdir())
    assert [path.name for path in paths] == [f"{n:05d}.png" for n in range(len(paths))]
    pictures = [Image.open(path) for path in paths]
    assert all(picture.mode == "L" for picture in pictures)
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


def test_samples_become_pictures(shapes, tmp_path, capsys):
    np.savez(tmp_path / "samples.npz", shapes.numpy()[..., None], np.arange(100) % 10)
    folder = tmp_path / "new" / "pictures"
    export_png.main([str(folder), "--samples", str(tmp_path / "samples.npz")])
    assert torch.equal(read_pictures(folder), shapes)
    assert capsys.readouterr().out == f"{folder}: 100 pictures\n"


def test_the_test_split_becomes_pictures(scored_data_dir, tmp_path):
    export_png.main([str(tmp_path / "test"), "--data-dir", str(scored_data_dir)])
    expected = fe.load_split(scored_data_dir, train=False)[0]
    assert torch.equal(read_pictures(tmp_path / "test"), expected)


@pytest.mark.parametrize(("full", "reason"), [(True, "is not empty"), (False, "No such file")])
def test_what_cannot_be_exported_gets_one_line(full, reason, tmp_path, refused):
    folder, samples = tmp_path / "pictures", tmp_path / "samples.npz"
    if full:
        folder.mkdir()
        (folder / "old.png").touch()
        np.savez(samples, np.zeros((100, 28, 28, 1), np.uint8))
    assert reason in refused(export_png.main, folder, "--samples", samples)
    assert [path.name for path in tmp_path.glob("pictures/*")] == ["old.png"] * full
