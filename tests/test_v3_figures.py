"""The figures of v3 show what the models did: the same noise, the same states, the right class and
time.

Everything is drawn once, from untrained but perturbed models, while the functions in between are
watched.
"""

import base64
import inspect
import io
import json
import re
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image, ImageSequence
from sklearn.decomposition import PCA

from conftest import draw_shapes
from networks import perturb
from script_runs import CLASSES

CPU = torch.device("cpu")
EPOCH = 3
SOME_LABELS = (0, 5, 9)
PARTS = {
    "autoencoder": ("loss",),
    "decoder": ("absolute error", "unrealism", "hinge loss of the discriminator"),
    "diffusion": ("loss",),
}
HISTORY = [
    {
        "stage": stage, "epoch": epoch, "step": 10 * epoch, "train_loss": len(parts) / epoch,
        "validation_loss": 1.1 * len(parts) / epoch, "learning_rate": 1e-3, "seconds": 2.0,
        "images_per_second": 300.0, "train_parts": dict.fromkeys(parts, 1 / epoch),
        "validation_parts": dict.fromkeys(parts, 1.1 / epoch),
    }
    for stage, parts in PARTS.items()
    for epoch in (1, 2, 3)
]  # fmt: skip


def watch(monkeypatch, script, name):
    """Lets a function note its calls in the list returned: the arguments by name, and the result as
    `result`, all at once where it is an iterator."""
    original, calls = getattr(script, name), []
    signature = inspect.signature(original)

    def watched(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        result = original(*args, **kwargs)
        result = list(result) if inspect.isgenerator(result) else result
        calls.append(SimpleNamespace(**bound.arguments, result=result))
        return result

    monkeypatch.setattr(script, name, watched)
    return calls


@pytest.fixture(scope="module")
def models(script_v3):
    """Small models in evaluation mode, whose zero-initialised layers have been moved off zero."""
    changes = {"width": 8, "sampling_steps": 2, "guidance_scale": 1.5}
    config = script_v3.Settings(**script_v3.default_settings(CPU, quick=True) | changes)
    networks = script_v3.initial_networks(config, CPU)
    for name, network in networks.items():
        perturb(network.eval(), 0.2 if name == "diffusion" else 0.1)
    return script_v3.Models(networks, config, HISTORY)


@pytest.fixture(scope="module")
def data(script_v3):
    """Drawings; for validation as many as there are in earnest, since figures show some of them."""
    labels = np.arange(5500) % 10
    images = torch.from_numpy(draw_shapes(labels, np.random.default_rng(0)))[:, None]
    labels = torch.from_numpy(labels)
    return script_v3.Data(images[:500], labels[:500], images[500:], labels[500:])


def surroundings(models):
    """What drawing must leave alone: the global generators' states and the models' modes."""
    modes = [module.training for model in models.networks.values() for module in model.modules()]
    return str(np.random.get_state()), torch.get_rng_state().tolist(), modes


@pytest.fixture(scope="module")
def drawn(script_v3, models, data, tmp_path_factory):
    """The folder of a full set of figures, the calls behind it, and what was around it."""
    names = ["sample", "draw_trajectories", "save_animation", "path_figure", "draw_grid"]
    names += ["save_grid"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = {name: watch(monkeypatch, script_v3, name) for name in names}
        folder, before = tmp_path_factory.mktemp("figures"), surroundings(models)
        script_v3.save_all_figures(models, data, folder)
    return SimpleNamespace(folder=folder, before=before, after=surroundings(models), **calls)


def assert_same_pictures(a, b):
    """uint8 pictures are equal but for rounding, which depends on the batch and is coarse in
    bfloat16."""
    assert a.shape == b.shape
    difference = (a.int() - b.int()).abs().float()
    assert difference.mean() < 1
    assert difference.max() <= 12


def gif_path(drawn, label):
    name = re.sub("[/ ]", "-", CLASSES[label])
    file = f"diffusion_animation_class_{name}_epoch_{EPOCH}.gif"
    return drawn.folder / "diffusion_animation" / file


def test_drawing_leaves_generators_and_training_modes_alone(drawn):
    assert drawn.after == drawn.before


# The animations


# In a frame: left, top, size
PLACES = ((0, 30, 224), (14, 274, 84), (126, 274, 84))


def pictures_at(place, frames):
    """What the frames show there, (frames, 1, 28, 28) uint8."""
    left, top, size = place
    squares = [frame.crop((left, top, left + size, top + size)) for frame in frames]
    return torch.from_numpy(np.stack([s.resize((28, 28), Image.NEAREST) for s in squares]))[:, None]


@pytest.mark.parametrize("label", SOME_LABELS)
def test_animation_is_a_sound_gif_of_its_pictures(script_v3, drawn, label):
    call, steps = drawn.save_animation[label], script_v3.PATH_STEPS
    assert call.title == CLASSES[label]
    assert call.captions == [f"t = {t:.0f}" for t in np.linspace(1000, 0, steps + 1)]
    with Image.open(gif_path(drawn, label)) as gif:
        assert (gif.info["loop"], gif.n_frames) == (0, 2 * steps)  # for ever
        frames, milliseconds = [], []
        for frame in ImageSequence.Iterator(gif):
            frames.append(frame.convert("L"))
            milliseconds.append(frame.info["duration"])
    assert {frame.size for frame in frames} == {(224, 368)}
    image, state, guess = (pictures_at(place, frames) for place in PLACES)
    # what is seen there and back; the noise and the clean image are shown once
    there, back = [part.flip(0)[:steps] for part in call.out], [part[:-1] for part in call.back]
    # odd greys become even ones, see `save_animation`
    for seen, drawn_there in ((image, 0), (state, 1)):
        expected = torch.cat([there[drawn_there], back[drawn_there]])
        assert (seen.int() - expected.int()).abs().max() <= 2
    assert (guess[:steps] == 255).all()  # on the way out there is none
    assert (guess[steps:].int() - back[2].int()).abs().max() <= 2
    words = []  # all that is no picture
    for frame in frames:
        for left, top, size in PLACES:
            frame.paste(255, (left, top, left + size, top + size))
        words.append(np.asarray(frame))
    heads, feet = [text[:30] for text in words], [text[30:] for text in words]
    for head in heads:
        assert (head == 255).mean() > 0.5 and (head < 100).sum() > 50
    for index in range(1, steps):  # the same t, there and back
        assert np.array_equal(heads[index], heads[-index])
    assert len({head.tobytes() for head in heads}) == steps + 1
    # below, what the small pictures are: one text on the way out, another on the way back
    assert len({foot.tobytes() for foot in feet[:steps]}) == 1
    assert len({foot.tobytes() for foot in feet[steps:]}) == 1
    left, right = [(foot[:, :112], foot[:, 112:]) for foot in (feet[0], feet[-1])]
    assert np.array_equal(left[0], right[0]) and not np.array_equal(left[1], right[1])
    assert all((side < 100).sum() > 20 for side in (*left, *right))
    assert milliseconds[0] == max(milliseconds)
    assert 2000 < sum(milliseconds) < 10_000


# The pictures of states


# By the number of channels: columns, pixels of a value, and where the tiles begin: top, left
TILES = {1: (1, 4, 0, 0), 2: (2, 2, 7, 0), 4: (2, 2, 0, 0), 6: (3, 1, 7, 3), 8: (3, 1, 3, 3)}
TILES[64] = (4, 1, 0, 0)  # the first 16


@pytest.mark.parametrize("channels", TILES)
def test_state_picture_of_a_latent_has_each_channel_in_its_place(script_v3, channels):
    columns, scale, top, left = TILES[channels]
    states = torch.randn(2, 3, channels, 7, 7) * 1.5
    expected = torch.zeros(2, 3, 1, 28, 28, dtype=torch.uint8)  # the frame is black
    for channel in range(min(channels, 16)):
        row, column = (7 * scale * place for place in divmod(channel, columns))
        tile = script_v3.to_uint8(states[:, :, channel] / 3)
        tile = tile.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
        rows = slice(top + row, top + row + 7 * scale)
        expected[:, :, 0, rows, left + column : left + column + 7 * scale] = tile
    assert torch.equal(script_v3.state_pictures(states), expected)


# The paths


@pytest.mark.parametrize("label", SOME_LABELS)
def test_path_is_the_trajectory_drawn_above_it(script_v3, drawn, models, data, label):
    """test_every_script.py holds its pictures to the trajectories."""
    call, [trajectories] = drawn.path_figure[label], drawn.draw_trajectories
    states = trajectories.result.states[:, label].flatten(1).numpy()
    [top] = [grid for grid in drawn.draw_grid if grid.axes is call.result.axes[0]]
    assert torch.equal(top.images, call.images[:, ::2])
    assert top.rows == call.rows
    assert top.columns == [f"t={t:.0f}" for t in np.linspace(1000, 0, top.images.shape[1])]
    latents = script_v3.embed_images(models, data.validation_images).flatten(1).numpy()
    pca, shown = PCA(2, random_state=0).fit(latents), len(call.scatter)
    np.testing.assert_array_equal(call.labels, data.validation_labels[:shown])
    np.testing.assert_allclose(call.scatter, pca.transform(latents[:shown]), atol=1e-3)
    np.testing.assert_allclose(call.path, pca.transform(states), atol=1e-3)
    lengths = np.linalg.norm(np.diff(states, axis=0), axis=1)
    bend = lengths.sum() / np.linalg.norm(states[-1] - states[0])
    assert f"{pca.explained_variance_ratio_.sum():.0%} of the variance" in call.titles[1]
    assert f"{bend:.2f} times as long as its chord" in call.titles[1]
    assert [axes.get_title() for axes in call.result.axes] == list(call.titles)
    opacity = [cloud.get_alpha() for cloud in call.result.axes[1].collections]
    assert opacity.pop(label) >= 0.8 and set(opacity) == {0.35}  # the others are visible too


@pytest.mark.parametrize("label", SOME_LABELS)
def test_path_is_drawn_with_its_ends_marked_and_its_times_told(drawn, label):
    call = drawn.path_figure[label]
    axes = call.result.axes[1]
    lines = {line.get_marker(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(lines["None"], call.path)
    np.testing.assert_allclose(lines["s"], call.path[:1])  # noise
    np.testing.assert_allclose(lines["*"], call.path[-1:])  # image
    times = {text.get_text(): text.xy for text in axes.texts if text.get_text()}
    np.testing.assert_allclose(times["t=1000"], call.path[0])
    np.testing.assert_allclose(times["t=0"], call.path[-1])
    for text, place in times.items():
        step = (1 - int(text[2:]) / 1000) * (len(call.path) - 1)
        np.testing.assert_allclose(place, call.path[round(step)])


def time_labels_collide(figure):
    """Whether any two of the time labels along the path overlap."""
    figure.axes[1].get_ylim()  # settles the limits, as drawing does
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = []
    for text in figure.axes[1].texts:
        if text.get_text():
            text.update_positions(renderer)
            # an annotation's own extent holds its arrow too
            boxes.append(Text.get_window_extent(text, renderer))
    assert len(boxes) > 3
    return any(a.overlaps(b) for a, b in combinations(boxes, 2))


@pytest.mark.parametrize("label", range(10))
def test_labels_of_times_do_not_collide(drawn, label):
    assert not time_labels_collide(drawn.path_figure[label].result)


@pytest.mark.parametrize("rows", [4, 6])
@pytest.mark.parametrize("distance", [1, 10, 100])
def test_labels_of_times_do_not_collide_on_a_path_from_afar(script_v3, distance, rows):
    rng = np.random.default_rng(0)
    # slow at the end, where labels crowd
    path = distance * np.linspace(1, 0, 21)[:, None] ** 3 * [1, 0.5]
    images, names = torch.zeros(rows, 21, 1, 28, 28, dtype=torch.uint8), ["row"] * rows
    captions = [f"t = {t}" for t in range(1000, -1, -50)]
    points = rng.normal(size=(200, 2)), rng.integers(0, 10, 200)
    figure = script_v3.path_figure(images, names, path, captions, *points, ("upper", "lower"), 3)
    assert not time_labels_collide(figure)


@pytest.mark.parametrize("label", SOME_LABELS)
def test_halves_and_titles_of_a_path_figure_do_not_overlap(drawn, label):
    figure = drawn.path_figure[label].result
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    top, bottom = (axes.get_window_extent(renderer) for axes in figure.axes)
    titles = [axes.title.get_window_extent(renderer) for axes in figure.axes]
    ticks = [*figure.axes[0].get_xticklabels(), *figure.axes[0].get_yticklabels()]
    boxes = [top, bottom, *titles, *(text.get_window_extent(renderer) for text in ticks)]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_paths_for_the_page_are_those_of_the_figures(script_v3, drawn):
    folder = drawn.folder / "denoise_with_diffusion_path"
    page = json.loads((folder / f"paths_epoch_{EPOCH}.json").read_text())
    assert list(page["classes"]) == list(script_v3.CLASS_NAMES)
    assert page["rows"] == ["state", "image", "guess"]
    for (name, of_class), call in zip(page["classes"].items(), drawn.path_figure):
        assert of_class["label"] == script_v3.CLASS_NAMES.index(name) == call.strong
        assert (drawn.folder / of_class["png"]).parent == folder
        assert (drawn.folder / of_class["png"]).is_file()
        assert drawn.folder / of_class["gif"] == gif_path(drawn, call.strong)
        assert page["captions"] == call.captions
        np.testing.assert_allclose(of_class["path"], call.path, atol=0.0051)
        strip = Image.open(io.BytesIO(base64.b64decode(of_class["strip"]))).convert("L")
        strip = torch.from_numpy(np.asarray(strip).copy())
        tiles = strip.unflatten(1, (-1, 28)).unflatten(0, (-1, 28)).transpose(1, 2)
        assert torch.equal(tiles, call.images[:3, :, 0])  # of the first path
        shown = len(page["scatter"])
        assert shown == len(page["labels"]) >= 500
        np.testing.assert_array_equal(page["labels"], call.labels[:shown])
        np.testing.assert_allclose(page["scatter"], call.scatter[:shown], atol=0.0051)


# The loss curves


def test_loss_curves_draw_each_part_of_a_loss_apart(script_v3, monkeypatch, tmp_path):
    figures = watch(monkeypatch, script_v3, "save_figure")
    history = [dict(row) for row in HISTORY]
    for row in history:  # each part and each curve has numbers of its own
        for name, factor in (("train_parts", 1), ("validation_parts", 2)):
            row[name] = {k: factor * (v + n) for n, (k, v) in enumerate(row[name].items())}
    script_v3.save_loss_curves(history, tmp_path / "loss_curves.png")
    [axes] = [call.figure.axes for call in figures]
    panels = [(stage, part) for stage, parts in PARTS.items() for part in parts]
    assert [(each.get_title(), each.get_ylabel()) for each in axes] == panels
    for each, (stage, part) in zip(axes, panels):
        rows = [row for row in history if row["stage"] == stage]
        assert [line.get_label().split(",")[0] for line in each.lines] == ["training", "validation"]
        for line, kind in zip(each.lines, ("train", "validation")):
            values = [row[f"{kind}_parts"][part] for row in rows]
            assert line.get_xdata().tolist() == [1, 2, 3]
            assert line.get_ydata().tolist() == values
    assert axes[0].get_subplotspec().get_gridspec().ncols == min(3, len(panels))
    assert 800 < Image.open(tmp_path / "loss_curves.png").width < 900


def test_loss_curves_count_epochs_in_whole_numbers_even_where_there_is_one(
    script_v3, monkeypatch, tmp_path
):
    figures = watch(monkeypatch, script_v3, "save_figure")
    history = [dict(row) for row in HISTORY if row["epoch"] == 1]
    script_v3.save_loss_curves(history, tmp_path / "loss_curves.png")
    for axes in figures[0].figure.axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_beside_curves_a_single_epoch_is_written_not_drawn(script_v3, monkeypatch, tmp_path):
    figures = watch(monkeypatch, script_v3, "save_figure")
    history = [dict(row) for row in HISTORY if row["stage"] == "diffusion" or row["epoch"] == 1]
    script_v3.save_loss_curves(history, tmp_path / "loss_curves.png")
    figure = figures[0].figure
    assert {axes.get_title() for axes in figure.axes} == {"diffusion"}
    lines = figure.get_supxlabel().splitlines()
    single = [row for row in history if row["stage"] != "diffusion"]
    wanted = [(row["stage"], part) for row in single for part in row["train_parts"]]
    for line, (stage, part) in zip(lines, wanted, strict=True):
        [row] = [row for row in single if row["stage"] == stage]
        numbers = row["train_parts"][part], row["validation_parts"][part]
        form = "{}, one epoch: {} {:.4f}, validation {:.4f}"
        assert line == form.format(stage, part, *numbers)


# The grids


def grid_of(drawn, name):
    """The call that drew the grid whose path begins with `name`."""
    calls = {call.path.relative_to(drawn.folder).as_posix(): call for call in drawn.save_grid}
    [path] = [path for path in calls if path.startswith(name)]
    return calls[path]


def test_sample_grid_has_a_row_for_each_class_and_one_for_none(script_v3, drawn, models):
    call = grid_of(drawn, "samples/")
    null_class = script_v3.NULL_CLASS
    assert call.rows == [*script_v3.CLASS_NAMES, "no class"]
    assert call.images.shape[0] == null_class + 1
    in_turn = script_v3.generate_samples(models, torch.arange(100) % 10).unflatten(0, (10, 10))
    assert_same_pictures(call.images[:null_class], in_turn.transpose(0, 1))
    expected = script_v3.generate_samples(models, torch.full((10,), null_class))
    assert_same_pictures(call.images[null_class], expected)


def test_guidance_grid_shows_the_same_noises_at_the_scales_it_names(script_v3, drawn, models):
    call = grid_of(drawn, "guidance/")
    assert call.rows == list(script_v3.CLASS_NAMES)
    scales = [float(name.removeprefix("w=")) for name in call.columns]
    assert scales == sorted(scales)
    assert {0.0, 1.0, models.config.guidance_scale} < set(scales)
    assert call.title == "Rising w, above 1 only from 750 to 200"
    for column, scale in enumerate(scales):
        guided = models.with_settings(guidance_scale=scale)
        expected = script_v3.generate_samples(guided, torch.arange(10))
        assert_same_pictures(call.images[:, column], expected)


def test_interpolations_go_from_noise_to_noise_and_from_class_to_class(script_v3, drawn):
    noises, classes = [grid_of(drawn, f"interpolation/{name}") for name in ("noises", "classes")]
    columns = len(noises.columns)
    sizes = [len(grid.images) * columns for grid in (noises, classes)]
    calls = {len(call.noise): call for call in drawn.sample}
    by_noise, by_class = [calls[size] for size in sizes]
    arcs = by_noise.noise.unflatten(0, (-1, columns))
    # noise all along; a straight line would shrink it
    assert (abs(arcs.flatten(2).std(dim=2) - 1) < 0.2).all()
    assert (arcs.diff(dim=1).flatten(2).norm(dim=2) > 1).all()
    assert torch.equal(by_noise.classes.argmax(1), torch.arange(10).repeat_interleave(columns))
    assert noises.rows == list(script_v3.CLASS_NAMES)
    mixed, kept = [part.unflatten(0, (-1, columns)) for part in (by_class.classes, by_class.noise)]
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    torch.testing.assert_close(mixed.sum(dim=2), torch.ones(mixed.shape[:2]))
    for row, name in enumerate(classes.rows):
        ends = [CLASSES[weights.argmax()] for weights in mixed[row, [0, -1]]]
        assert mixed[row, [0, -1]].amax(dim=1).tolist() == [1, 1]
        assert name == " to ".join(ends)


def test_nearest_neighbours_are_the_nearest(script_v3, models, data, monkeypatch, tmp_path):
    calls = watch(monkeypatch, script_v3, "save_grid")
    samples = script_v3.generate_samples(models, torch.arange(10))
    images = torch.cat([data.train_images, samples, data.train_images[:7]])
    data = data._replace(train_images=images)
    script_v3.save_nearest_neighbours(models, data, tmp_path)
    [call] = calls
    distances = (call.images[:, :1].float() - call.images.float()).square().sum(dim=(2, 3, 4))
    assert not distances[:, 1].any()  # the sample itself, which is among the images here
    assert (distances.diff(dim=1) >= 0).all()
    for row, sample in enumerate(samples):
        everyone = (images - sample.float()).square().sum(dim=(1, 2, 3))
        nearest = everyone.sort().values[: distances.shape[1] - 1]
        torch.testing.assert_close(distances[row, 1:], nearest)


# Samples


def test_a_run_without_a_complete_epoch_has_no_loss_curves_and_all_other_figures(
    script_v3, models, data, monkeypatch, tmp_path
):
    drawn = []
    for name in ("save_trajectories", "save_own_figures"):
        monkeypatch.setattr(script_v3, name, lambda *args: drawn.append(args[0].epoch))
    empty = script_v3.Models(models.networks, models.config, [])
    script_v3.save_all_figures(empty, data, tmp_path)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["samples_epoch_0.png"]
    assert drawn == [0, 0]
