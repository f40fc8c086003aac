"""across.py: its figures show what the scripts compute, fit 840 pixels, and can be read."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

import across
import leaderboard
import quality
import script_runs
from script_runs import SCRIPT_V3
from sync_shared import REPOSITORY, load_script

PATHS = {each.name: each.path for each in script_runs.EXPERIMENTS}
V3 = "LatentDiffusionModel/v3"
WIDEST = {"percent_of_blur": 9.44, "swd_percent_of_blur": 9.44}  # of the scores, as text


def pasted(figure):
    """The images in a figure with the rows and columns of the file that they cover: (RGB, top,
    left), in reading order, those first that are higher by more than a few pixels."""
    places, height = [], 2 * across.pixels(figure)
    for image in figure.images:
        array = image.get_array()
        places.append((array, height - int(image.oy) - len(array), int(image.ox)))
    return sorted(places, key=lambda place: (round(place[1] / 8), place[2]))


def check(figure, tmp_path):
    """What is true of each figure: no text is small, cut off, or on another one or on an image; the
    file has two pixels for each of the page's 840, and the images' very pixels."""
    width, height, boxes = 1680, 2 * across.pixels(figure), {}
    texts = [*figure.texts]
    for axes in figure.axes:
        texts += [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label]
    across.save(figure, tmp_path / "folder" / "figure.png")
    for number, text in enumerate(texts):
        assert text.get_fontsize() * across.DPI / 72 >= 16, text
        box = text.get_window_extent()
        boxes[number, text.get_text()] = box.x0, height - box.y1, box.x1, height - box.y0
    with Image.open(tmp_path / "folder" / "figure.png") as picture:
        assert picture.size == (width, height)
        picture = np.asarray(picture.convert("RGB"))
    for number, (array, top, left) in enumerate(pasted(figure)):
        bottom, right = top + array.shape[0], left + array.shape[1]
        assert np.array_equal(picture[top:bottom, left:right], array)
        boxes[number, "image"] = left, top, right, bottom
    for name, (left, top, right, bottom) in boxes.items():
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, name
    for (name, one), (other, two) in itertools.combinations(boxes.items(), 2):
        apart = one[0] >= two[2] or two[0] >= one[2] or one[1] >= two[3] or two[1] >= one[3]
        assert apart, (name, other)


def enlarged(image, factor):
    """A uint8 image (28, 28) as it is pasted."""
    return np.kron(np.asarray(image), np.ones((factor, factor), np.uint8))[..., None].repeat(3, 2)


def texts_of(figure):
    return [text.get_text() for text in figure.texts]


# --- The ladder -----------------------------------------------------------------------------------


@script_runs.every_script
def test_trajectory_ends_at_the_versions_own_sample(experiment, undisturbed):
    images = across.read_trajectory(experiment.path, undisturbed, "cpu")
    assert images.shape == (2, 11, 28, 28) and images.dtype == torch.uint8
    assert torch.equal(images[0, -1], images[1, -1])
    script = load_script(experiment.path)
    models = script.load_trained(undisturbed, "cpu")
    changes = {"eta": 0.0} if hasattr(models.config, "eta") else {}
    models = models.with_settings(sampling_steps=10, **changes)
    label = torch.tensor([9 if experiment.conditional else script.NULL_CLASS])
    noise, classes = script.noise_of_samples(models, range(9, 10))(), script.class_weights(label)
    sample = script.decode_images(models, script.last_state(models, noise, classes))
    assert torch.equal(sample[0, 0], images[0, -1])
    drawn = script.draw_trajectories(models, noise, classes, 10)
    for shown, states in zip(images, (drawn.states, drawn.guesses)):
        assert torch.equal(shown, script.decode_images(models, states)[:, 0, 0])


def test_ladder_shows_each_state_and_guess(tmp_path):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (6, 2, 11, 28, 28), np.uint8))
    trajectories = dict(zip(across.IDEAS, images))
    figure = across.draw_ladder(trajectories, dict.fromkeys(across.IDEAS, WIDEST))
    check(figure, tmp_path)
    places = pasted(figure)
    for number, trajectory in enumerate(images):
        states, guesses = trajectory
        expected = [(state, 3) for state in states] + [(states[-1], 6)]
        expected += [(guess, 3) for guess in guesses]
        found = [array for array, _, _ in places[23 * number : 23 * (number + 1)]]
        for array, (image, factor) in zip(found, expected, strict=True):
            assert np.array_equal(array, enlarged(image, factor))


def test_ladder_names_the_versions_in_order_with_their_scores():
    images = torch.zeros(2, 11, 28, 28, dtype=torch.uint8)
    rows = {"LatentDiffusionModel/v1": {"percent_of_blur": 24.6, "swd_percent_of_blur": 3.04}}
    rows["LatentDiffusionModel/v2"] = {"percent_of_blur": 9.97}
    texts = texts_of(across.draw_ladder(dict.fromkeys(across.IDEAS, images), rows))
    names = ["CNN", "v1", "v2", "Transformer", "UNet", "v3"]
    assert [text for text in texts if text in names] == names
    scores = [texts[texts.index(name) + 2] for name in names[:3]]
    assert scores == ["not measured", "FMD 25%, SWD 3.0%", "FMD 10%"]
    assert set(across.IDEAS) == set(PATHS)


def test_ladder_warns_where_the_scores_are_of_another_run(tmp_path, monkeypatch, capsys):
    images = torch.zeros(2, 11, 28, 28, dtype=torch.uint8)
    asked, note = [], lambda path, output, device: asked.append(output) or images
    monkeypatch.setattr(across, "read_trajectory", note)
    for name in ("metrics.csv", "checkpoints/last.pt", *leaderboard.SAMPLE_FILES):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(name)
    digest = leaderboard.fingerprint(leaderboard.find_results(tmp_path / "run"))
    rows = [{"version": V3, "fingerprint": digest, **WIDEST}]
    monkeypatch.setattr(across, "BOARD", tmp_path / "board.json")
    across.BOARD.write_text(json.dumps({"versions": rows}))
    folders = [f"--output-dir={V3}={tmp_path / 'run'}", f"--figures={tmp_path}"]
    across.main(["ladder", *folders])
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 5 and not any(V3 in line for line in warned)
    assert asked[-1] == tmp_path / "run"
    assert asked[0] == REPOSITORY / "ImageDiffusionModel" / "CNN" / "output"
    assert (tmp_path / "ladder.png").is_file()


# --- The schedules --------------------------------------------------------------------------------


def log_snr_in_closed_form(version):
    """At the steps 1 ... 999, by the papers' formulas."""
    t = np.arange(1, 1000) / 1000
    if version.endswith("CNN"):
        alpha_bar = np.cumprod([1 - 1e-4 - (0.02 - 1e-4) * step / 999 for step in range(999)])
        return np.log(alpha_bar) - np.log1p(-alpha_bar)
    if version.endswith("Transformer"):
        angles = [(each + 0.008) / 1.008 * np.pi / 2 for each in (t, 0)]
        alpha_bar = np.cos(angles[0]) ** 2 / np.cos(angles[1]) ** 2
        return np.log(alpha_bar / (1 - alpha_bar))
    if version.endswith("UNet"):  # the last of 1000 levels, sigma_min, stands at step 1
        share = np.arange(999) / 999
        return -14 * np.log(0.002 ** (1 / 7) + share * (80 ** (1 / 7) - 0.002 ** (1 / 7)))
    return 2 * np.log((1 - t) / t)


@pytest.mark.parametrize("version", across.SCHEDULES)
def test_forward_process_is_that_of_the_paper(version):
    script, rng = load_script(PATHS[version]), np.random.default_rng(0)
    ratios = across.log_snr(script).numpy()
    assert ratios.shape == (1001,) and ratios[0] == np.inf
    assert np.all(ratios[1:] < ratios[:-1])
    np.testing.assert_allclose(ratios[1:-1], log_snr_in_closed_form(version), atol=2e-4)
    image = torch.from_numpy(rng.uniform(-1, 1, (28, 28)))
    noise = torch.from_numpy(rng.normal(size=(28, 28)))
    images, captions = across.noised(script, image, noise)
    assert images.shape == (1001, 28, 28) and len(captions) == 1001
    torch.testing.assert_close(images[0], image)
    scale = 0.7059 if version.endswith("UNet") else 1  # to the contrast of the data
    assert (images[-1] - scale * noise).abs().max() < 0.05
    ends = ("σ = 0", "σ = 80") if version.endswith("UNet") else ("t = 0", "t = 1000")
    assert (captions[0], captions[-1]) == ends


def test_schedules_show_pictures_and_curves_on_one_axis_of_time(tmp_path):
    scripts = {version: load_script(PATHS[version]) for version in across.SCHEDULES}
    boot = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8))
    figure = across.draw_schedules(scripts, boot)
    check(figure, tmp_path)
    [axes], places = figure.axes, pasted(figure)
    legend = axes.get_legend()
    assert len(places) == 36 and len(legend.get_texts()) == len(axes.get_lines()) == 4
    box = legend.get_window_extent()
    curves = zip(axes.get_lines(), across.SCHEDULES.items())
    for row, (line, (version, (name, _, _))) in enumerate(curves):
        assert line.get_label() == legend.get_texts()[row].get_text() == name
        assert any(text.startswith(name) for text in texts_of(figure))
        np.testing.assert_array_equal(line.get_ydata(), across.log_snr(scripts[version]))
        curve = axes.transData.transform(line.get_xydata()[1:-1])
        assert not any(box.contains(*point) for point in curve), name
        assert np.array_equal(places[9 * row][0], enlarged(boot, 6))
    middles = [left + 84 for _, _, left in places[:9]]
    times = axes.transData.inverted().transform([(x, 0) for x in middles])[:, 0]
    np.testing.assert_allclose(times, np.linspace(0, 1000, 9), atol=1.5)


def test_schedules_are_drawn_of_a_validation_boot(scored_data_dir, tmp_path, monkeypatch):
    drawn, blank = [], across.blank(100)
    monkeypatch.setattr(across, "draw_schedules", lambda *args: drawn.append(args) or blank)
    across.main(["schedules", f"--data-dir={scored_data_dir}", f"--figures={tmp_path}"])
    images, labels = (part[-5000:] for part in quality.fe.load_split(scored_data_dir))
    [(scripts, boot)] = drawn
    assert torch.equal(boot, images[labels.tolist().index(9)])
    assert [*scripts] == [*across.SCHEDULES] and (tmp_path / "schedules.png").is_file()


# --- Learning -------------------------------------------------------------------------------------


@pytest.fixture
def tiny_flags(monkeypatch, tiny_data_dir, tmp_path):
    """The flags of a tiny run of v3 but for the output folder; it draws no figures."""
    monkeypatch.setattr(across.speed, "load_script", script_runs.load_without_figures)
    flags = script_runs.flags(load_script(SCRIPT_V3), tmp_path, tiny_data_dir)
    return [flag for flag in flags if "output-dir" not in flag]


def test_training_exports_samples_of_each_epoch_and_is_not_changed_by_it(
    tiny_flags, tmp_path, undisturbed_run
):
    status, files = across.train(SCRIPT_V3, tiny_flags, tmp_path, 100)
    assert status == 0 and [*files] == [1, 2, 3, "decoder"]
    undisturbed = undisturbed_run(SCRIPT_V3)
    run = script_runs.read(tmp_path)
    assert script_runs.differences(script_runs.read(undisturbed), run) == []
    samples = across.read_epochs(files)
    script = load_script(SCRIPT_V3)
    labels = torch.arange(100) % 10
    last = script.generate_samples(script.load_trained(undisturbed, "cpu"), labels)
    end = samples["decoder"]
    assert torch.equal(end[0], last[:, 0]) and torch.equal(end[1], labels)
    assert not any(torch.equal(samples[n][0], end[0]) for n in (2, 3))

    written = files[2].stat().st_mtime_ns
    assert across.train(SCRIPT_V3, tiny_flags, tmp_path, 100) == (0, files)  # nothing to train
    assert files[2].stat().st_mtime_ns == written
    files[2].unlink()
    with pytest.raises(ValueError, match=r"no samples of epoch 2 in .*: start over with --fresh"):
        across.read_epochs(files)


def test_a_training_that_was_cut_off_goes_on_without_samples_of_older_runs(
    tiny_flags, tmp_path, monkeypatch, capsys
):
    stale = tmp_path / "learning" / "epoch_3" / "samples.npz"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an older run")
    module = script_runs.load_without_figures(SCRIPT_V3)
    script_runs.interrupt_at_step(monkeypatch, module, 12 + 4)  # in the diffusion's second epoch
    with monkeypatch.context() as patch:
        patch.setattr(across.speed, "load_script", lambda path: module)
        status, files = across.train(SCRIPT_V3, tiny_flags, tmp_path, 100)
    assert status == 130 and "run again to resume" in capsys.readouterr().err
    assert files[1].is_file() and not stale.exists()
    status, files = across.train(SCRIPT_V3, tiny_flags, tmp_path, 100)
    assert status == 0 and [*across.read_epochs(files)] == [1, 2, 3, "decoder"]


def test_long_trainings_show_some_epochs(tiny_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(across, "MOST_EPOCHS", 2)
    status, files = across.train(SCRIPT_V3, [*tiny_flags, "--epochs=5"], tmp_path, 100)
    assert status == 0 and [*files] == [2, 5, "decoder"]
    assert len(across.read_epochs(files)) == 3
    np.savez(files[2], np.zeros((200, 28, 28, 1), np.uint8))
    with pytest.raises(ValueError, match="unequal numbers"):
        across.read_epochs(files)


def test_epochs_are_scored_against_the_validation_images(monkeypatch, scored_data_dir):
    images, labels = quality.fe.load_split(scored_data_dir)
    reference = quality.measure_reference(images[-300:], images[:600], labels[:600])
    asked = []

    def load_reference(data_dir, validation):
        asked.append((data_dir, validation))
        return reference

    monkeypatch.setattr(quality, "load_reference", load_reference)
    samples = {epoch: (images[epoch : epoch + 100], labels[:100]) for epoch in (1, 4)}
    rows, floor = across.score_epochs(samples, scored_data_dir)
    assert asked == [(scored_data_dir, True)]
    assert rows == {n: quality.score_against(*samples[n], reference) for n in samples}
    assert floor == quality.load_floor(100, labels[:100], reference)


@pytest.mark.parametrize("epochs", [1, 2, 8, 10])
@pytest.mark.parametrize("classes", [True, False])
def test_learning_shows_a_column_an_epoch(epochs, classes, tmp_path):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (epochs, 10, 28, 28), np.uint8))
    samples = {100 + epoch: (some, None) for epoch, some in enumerate(images)}
    real = {sample: np.full((28, 28), sample, np.uint8) for sample in across.PICTURED}
    keys = ("percent_of_blur", "swd_percent_of_blur")
    rows = {epoch: dict(zip(keys, (9300.0 - epoch, epoch + 5000.0))) for epoch in samples}
    figure = across.draw_learning(V3, samples, rows, WIDEST, real if classes else {})
    check(figure, tmp_path)
    texts, places = texts_of(figure), pasted(figure)
    factor, columns = len(places[0][0]) // 28, epochs + classes
    assert len(places) == 3 * columns
    for row, sample in enumerate(across.PICTURED):
        expected = [images[sample] for images, _ in samples.values()]
        expected += [real[sample]] if classes else []
        for column, image in enumerate(expected):
            array, _, left = places[row * columns + column]
            assert np.array_equal(array, enlarged(image, factor))
            heading = figure.texts[texts.index([*map(str, rows), "real"][column])]
            assert abs(left + 14 * factor - 1680 * heading.get_position()[0]) <= 2
    for epoch, row in rows.items():
        place = texts.index(str(epoch))
        scores = [f"{row[key]:.0f}%" for key in keys]
        assert texts[place + 1 : place + 3] == scores
    assert texts[texts.index("real") + 1] == "9.4%"


@pytest.mark.parametrize("version", [V3, "ImageDiffusionModel/CNN"])
def test_command_trains_scores_and_draws(
    version, tiny_flags, scored_data_dir, tmp_path, monkeypatch
):
    drawn, blank = [], across.blank(100)

    def score_epochs(samples, data_dir):
        assert data_dir == scored_data_dir
        return {epoch: len(images) for epoch, (images, _) in samples.items()}, "floor"

    monkeypatch.setattr(across, "draw_learning", lambda *args: drawn.append(args) or blank)
    monkeypatch.setattr(across, "score_epochs", score_epochs)
    module = load_script(PATHS[version])
    flags = script_runs.flags(module, tmp_path, scored_data_dir)
    flags = [flag for flag in flags if "output-dir" not in flag]
    folder = tmp_path / "run"
    own = ["--samples=100", f"--figures={tmp_path}", f"--output-dir={version}={folder}"]
    across.main(["learning", version, *own, *flags])
    [(name, samples, rows, floor, real)] = drawn
    names = [1, 2, 3, *["decoder"] * (version == V3)]
    assert name == version and floor == "floor" and rows == dict.fromkeys(names, 100)
    assert [*samples] == names and (folder / "checkpoints" / "last.pt").is_file()
    assert [*real] == ([*across.PICTURED] if version == V3 else [])
    for sample in real:
        assert torch.equal(real[sample], across.read_real(scored_data_dir, sample))
    assert (tmp_path / "learning.png").is_file()


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("ladder --output-dir somewhere", "VERSION=DIR"),
        ("ladder --output-dir LatentDiffusionModel/v9=somewhere", "LatentDiffusionModel/v9"),
        ("ladder --output-dir LatentDiffusionModel/v3=", "VERSION=DIR"),
        ("ladder --output-dir ImageDiffusionModel/CNN=empty", "no trained model in empty"),
        ("ladder --epochs 3", "ladder knows no --epochs 3"),
        ("schedules LatentDiffusionModel/v3", "schedules knows no LatentDiffusionModel/v3"),
        ("schedules --data-dir empty", "downloading failed"),
        ("learning LatentDiffusionModel/v9", "no version 'LatentDiffusionModel/v9'"),
        ("learning --samples 99", "100 are the least"),
        ("learning --output-dir ImageDiffusionModel/CNN=there", "VERSION=DIR"),
        ("learning LatentDiffusionModel/v3 --no-such-flag", "--no-such-flag"),
        ("learning LatentDiffusionModel/v3 --epochs 0", "--epochs: 0"),
    ],
)
def test_bad_input_gets_one_line(arguments, words, refused, tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    assert words in refused(across.main, *arguments.split(), "--figures=figures")
    assert not (tmp_path / "figures").exists()
