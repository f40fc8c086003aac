"""The fixtures themselves: the synthetic data set is one that torchvision loads, and missing real
data is noticed."""

import gzip

import numpy as np
import pytest
from torchvision.datasets import FashionMNIST

import conftest
from conftest import provide_real_data, write_tiny_data


@pytest.mark.parametrize(("train", "count"), [(True, 640), (False, 160)])
def test_torchvision_loads_the_tiny_data_set(tiny_data_dir, train, count):
    dataset = FashionMNIST(tiny_data_dir, train=train, download=False)
    assert dataset.data.shape == (count, 28, 28)
    assert dataset.targets.bincount().tolist() == [count // 10] * 10
    means = [dataset.data[dataset.targets == label].float().mean(0) for label in range(10)]
    distances = ((np.stack(means)[:, None] - np.stack(means)[None]) ** 2).mean((2, 3))
    assert distances[~np.eye(10, dtype=bool)].min() > 1000  # the classes look different


def test_tiny_data_set_and_its_archives_are_the_same_every_time(
    monkeypatch, tiny_data_dir, tmp_path
):
    monkeypatch.setattr("time.time", lambda: 0.0)  # gzip archives may hold the time
    write_tiny_data(tmp_path)
    for path in sorted((tmp_path / "FashionMNIST" / "raw").iterdir()):
        content = path.read_bytes()
        assert content == (tiny_data_dir / "FashionMNIST" / "raw" / path.name).read_bytes()
        if path.suffix == ".gz":
            assert gzip.decompress(content) == path.with_suffix("").read_bytes()


@pytest.mark.parametrize(
    ("ci", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)]
)
def test_missing_real_data_skips_or_fails_under_ci(monkeypatch, tmp_path, ci, outcome):
    def download_without_network(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(conftest.fe, "download", download_without_network)
    # Both are caught, because a skip where a failure is expected would only skip this test.
    both = (pytest.skip.Exception, pytest.fail.Exception)
    with pytest.raises(both, match="no network") as exception_info:
        provide_real_data(tmp_path)
    assert exception_info.type is outcome


def test_real_data_is_fashion_mnist(real_data_dir):
    dataset = FashionMNIST(real_data_dir, train=True, download=True)  # unpacks on first use
    assert dataset.data.shape == (60000, 28, 28)
    assert dataset.targets.bincount().tolist() == [6000] * 10
