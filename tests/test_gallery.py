"""gallery.py: which pictures it takes, and that they stay the same pictures."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

import gallery
from conftest import REPOSITORY


def draw_still(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", (20, 10), shade).save(path)


def draw_animation(path, shades):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = [Image.new("L", (280, 300), shade) for shade in shades]
    first.save(path, save_all=True, append_images=others, duration=[500, 40, 300], loop=0)


@pytest.fixture
def output(tmp_path):
    """An output folder after 2, 9 and 10 epochs."""
    output = tmp_path / "output"
    for epoch in (2, 9, 10):
        end, red = f"_epoch_{epoch}.png", (epoch, 0, 0, 255)
        draw_still(output / "samples" / f"samples{end}", (epoch, epoch, epoch, 255))
        draw_still(output / "interpolation" / f"noises{end}", red)
        draw_still(output / "latent_space" / f"latent_space{end}", red)
        draw_still(output / "reconstruction" / f"reconstruction{end}", red)
        name = f"diffusion_animation_class_Bag_epoch_{epoch}.gif"
        draw_animation(output / "diffusion_animation" / name, (0, 20 * epoch, 255))
    draw_still(output / "loss_curves.png", (1, 2, 3, 255))
    finished = output / "reconstruction" / "reconstruction.png"
    draw_still(finished, (0, 99, 0, 255))  # of the finished run
    draw_still(output / "samples" / "samples_Sandal.png", (0, 0, 0, 255))  # asked for, not a figure
    samples = np.arange(120, dtype=np.uint8).repeat(784).reshape(120, 28, 28, 1)
    np.savez(output / "samples.npz", samples, np.arange(120) % 10)
    (output / "index.html").write_text("the run's page")
    paths = output / "denoise_with_diffusion_path" / "paths_epoch_10.json"
    paths.parent.mkdir()
    paths.write_text("{}")
    draw_still(output / "old_runs" / "1" / "samples" / "samples_epoch_50.png", (0, 0, 0, 255))
    return output


def test_gallery_is_the_newest_of_each_figure_and_nothing_else(output, tmp_path, tiny_data_dir):
    folder = tmp_path / "gallery"
    folder.mkdir()
    (folder / "of_an_older_run.png").write_bytes(b"")
    size = gallery.build_gallery(output, folder, "v9", tiny_data_dir)
    pictures = ["interpolation_noises", "latent_space", "loss_curves", "real_and_generated"]
    pictures = [f"{name}.png" for name in (*pictures, "reconstruction", "samples", "strip")]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["diffusion_animation_class_Bag.gif", *pictures]
    assert size == sum(path.stat().st_size for path in folder.iterdir())
    samples = Image.open(folder / "samples.png")
    noises = Image.open(folder / "interpolation_noises.png")
    assert (samples.mode, samples.getpixel((0, 0))) == ("L", 10)
    assert (noises.mode, noises.convert("RGB").getpixel((0, 0))) == ("P", (10, 0, 0))
    finished = Image.open(folder / "reconstruction.png").convert("RGB")
    assert finished.getpixel((0, 0)) == (0, 99, 0)
    strip = np.asarray(Image.open(folder / "strip.png")).reshape(60, 10, 60)
    assert strip[30, :, 30].tolist() == list(range(10))  # with a black border
    assert strip.sum() == strip[2:-2, :, 2:-2].sum()


@pytest.mark.parametrize("labelled", [True, False])
def test_comparison_shows_a_class_a_column_where_there_are_classes(
    labelled, output, tmp_path, tiny_data_dir
):
    with np.load(output / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    np.savez(output / "samples.npz", images, labels if labelled else np.full(len(labels), -1))
    gallery.build_gallery(output, tmp_path / "gallery", "v9", tiny_data_dir)
    picture = np.asarray(Image.open(tmp_path / "gallery" / "real_and_generated.png"))[30:]
    halves = picture[:, :600], picture[:, 624:]
    left, right = (part.reshape(6, 60, 10, 60).swapaxes(1, 2) for part in halves)
    assert right[:, :, 30, 30].ravel().tolist() == list(range(60))
    real, real_labels = map(np.asarray, gallery.fe.load_split(tiny_data_dir, train=False))
    shown = left[:, :, 2:-2:2, 2:-2:2]  # (6, 10, 28, 28)
    for label in range(10):
        chosen = real[real_labels == label][:6] if labelled else real[label:60:10]
        np.testing.assert_array_equal(shown[:, label], chosen)


def test_animation_keeps_frames_timing_and_loop(output, tmp_path, tiny_data_dir):
    gallery.build_gallery(output, tmp_path / "gallery", "v9", tiny_data_dir)
    animation = Image.open(tmp_path / "gallery" / "diffusion_animation_class_Bag.gif")
    assert (animation.size, animation.n_frames, animation.info["loop"]) == ((112, 120), 3, 0)
    for frame, (duration, shade) in enumerate([(500, 0), (40, 200), (300, 255)]):
        animation.seek(frame)
        assert animation.info["duration"] == duration
        np.testing.assert_allclose(np.asarray(animation.convert("L")).astype(float), shade, atol=2)


def test_a_legend_keeps_its_colours_beside_many_greys_and_faint_ones():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (300, 300, 1), np.uint8).repeat(3, axis=2)
    legend = (np.array(matplotlib.colormaps["tab10"].colors) * 255).round().astype(np.uint8)
    strength = 0.35 * rng.integers(0, 20, (100, 300, 1)) / 19  # of pale points and their edges
    pale = strength * legend[rng.integers(0, 10, (100, 300))] + (1 - strength) * 255
    picture[:100] = pale.round()
    for place, colour in enumerate(legend):
        picture[290:298, 20 * place : 20 * place + 8] = colour
    reduced = gallery.reduce_colours(Image.fromarray(picture))
    assert reduced.mode == "P" and len(reduced.getcolors()) <= 256
    difference = np.abs(np.asarray(reduced.convert("RGB")).astype(int) - picture)
    assert difference[100:290].max() <= 2 and difference[:100].max() <= 8
    assert difference[290:298].reshape(8, -1, 20, 3)[:, :10, :8].max() <= 4


def test_animations_get_as_many_greys_as_there_is_room_for(
    output, tmp_path, tiny_data_dir, monkeypatch
):
    """A gallery of noise, which no GIF can pack."""
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (368, 224), np.uint8)) for _ in range(3)]
    path = output / "diffusion_animation" / "diffusion_animation_class_Bag_epoch_11.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, loop=0)

    def greys_and_size(limit):
        monkeypatch.setattr(gallery, "LIMIT", limit)
        size = gallery.build_gallery(output, tmp_path / "gallery", "v9", tiny_data_dir)
        with Image.open(tmp_path / "gallery" / "diffusion_animation_class_Bag.gif") as animation:
            return len(animation.convert("L").getcolors()), size

    assert gallery.LIMIT == 3_000_000
    most, size = greys_and_size(gallery.LIMIT)
    assert most == gallery.ANIMATION_GREYS[0] and size <= 3_000_000
    fewer, smaller = greys_and_size(size - 1)
    assert fewer == gallery.ANIMATION_GREYS[1] and smaller < size
    fewest, smallest = greys_and_size(0)
    assert fewest == gallery.ANIMATION_GREYS[-1] and smallest < smaller


def test_command_line_fills_the_gallery_of_the_version_and_warns_of_its_size(
    output, tmp_path, tiny_data_dir, monkeypatch, capsys
):
    script = tmp_path / "LatentDiffusionModel" / "v9" / "script_model_train_test.py"
    script.parent.mkdir(parents=True)
    script.write_text("")
    output.rename(script.parent / "output")
    monkeypatch.setattr(gallery, "LIMIT", 100)
    gallery.main(["LatentDiffusionModel/v9", "--data-dir", str(tiny_data_dir)], repository=tmp_path)
    assert (script.parent / "gallery" / "samples.png").is_file()
    assert "above the limit" in capsys.readouterr().err


def test_command_line_says_what_is_missing(tmp_path, refused):
    script = tmp_path / "LatentDiffusionModel" / "v9" / "script_model_train_test.py"
    script.parent.mkdir(parents=True)
    script.write_text("")
    for name, words in (("v8", "no version"), ("v9", "no figures")):
        version = f"LatentDiffusionModel/{name}"
        assert words in refused(gallery.main, version, repository=tmp_path)
    assert not (script.parent / "gallery").exists()


def test_committed_galleries_are_within_the_limit():
    for folder in REPOSITORY.glob("*/*/gallery"):
        assert sum(path.stat().st_size for path in Path(folder).iterdir()) <= gallery.LIMIT, folder
