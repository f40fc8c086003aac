"""The figures of v3 show what the models did: the same noise, the same states, the right class and
time.

Everything is drawn once, from untrained but perturbed models, while the functions in between are
watched.
"""

import inspect
import re
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image, ImageSequence
from scipy.stats import kstest
from sklearn.decomposition import PCA

from conftest import draw_shapes
from networks import perturb
from script_runs import CLASSES

CPU = torch.device("cpu")
EPOCH = 3
FILE_NAMES = [re.sub("[/ ]", "-", name) for name in CLASSES]
LABELS = range(10)
HISTORY = [
    {"stage": stage, "epoch": epoch, "train_loss": 1 / epoch, "validation_loss": 1.1 / epoch}
    for stage in ("autoencoder", "diffusion")
    for epoch in (1, 2, 3)
]


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
        perturb(network.eval(), 0.1 if name == "autoencoder" else 0.2)
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
    names = ["sample", "save_animation", "path_figure", "draw_grid", "save_grid"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = {name: watch(monkeypatch, script_v3, name) for name in names}
        folder, before = tmp_path_factory.mktemp("figures"), surroundings(models)
        script_v3.save_all_figures(models, data, folder)
    return SimpleNamespace(folder=folder, before=before, after=surroundings(models), **calls)


@pytest.fixture(scope="module")
def trajectories(script_v3, drawn):
    """By class: the states (S + 1, rows, C, 7, 7) of the trajectories that its figures show."""
    [call] = [call for call in drawn.sample if len(call.result) == script_v3.PATH_STEPS + 1]
    states, labels = torch.stack([state for state, _ in call.result]), call.classes.argmax(1)
    assert torch.equal(call.classes, script_v3.class_weights(labels))
    return [states[:, labels == label] for label in LABELS]


def assert_same_pictures(a, b):
    """uint8 pictures are equal but for rounding, which depends on the batch and is coarse in
    bfloat16."""
    assert a.shape == b.shape
    difference = (a.int() - b.int()).abs().float()
    assert difference.mean() < 1
    assert difference.max() <= 12


def gif_path(drawn, label):
    name = f"diffusion_animation_class_{FILE_NAMES[label]}_epoch_{EPOCH}.gif"
    return drawn.folder / "diffusion_animation" / name


def test_drawing_leaves_generators_and_training_modes_alone(drawn):
    assert drawn.after == drawn.before


# The animations


@pytest.mark.parametrize("label", LABELS)
def test_animation_is_a_sound_gif_of_its_pictures(drawn, label):
    call = drawn.save_animation[label]
    expected = torch.cat([call.noised.flip(0), call.states[1:-1]])
    steps = len(call.noised) - 1
    with Image.open(gif_path(drawn, label)) as gif:
        assert gif.info["loop"] == 0  # for ever
        assert gif.n_frames == len(expected) == 2 * steps
        frames, milliseconds = [], []
        for frame in ImageSequence.Iterator(gif):
            frames.append(frame.convert("L"))
            milliseconds.append(frame.info["duration"])
    [(width, height)] = {frame.size for frame in frames}
    assert width % 28 == 0
    assert width < height  # a caption above a square picture
    pictures = [frame.crop((0, height - width, width, height)) for frame in frames]
    pictures = [picture.resize((28, 28), Image.NEAREST) for picture in pictures]
    shown = torch.from_numpy(np.stack(pictures))[:, None]
    assert torch.equal(shown, expected)  # whatever the caption
    captions = [np.asarray(frame.crop((0, 0, width, height - width))) for frame in frames]
    assert all((caption == 255).mean() > 0.5 and (caption < 100).sum() > 50 for caption in captions)
    for index in range(1, steps):  # the same t, there and back
        assert np.array_equal(captions[index], captions[-index])
    assert len({caption.tobytes() for caption in captions}) == steps + 1
    assert milliseconds[0] == max(milliseconds)
    assert 2000 < sum(milliseconds) < 10_000


def test_captions_name_the_class_and_the_time(script_v3, drawn):
    assert [call.title for call in drawn.save_animation] == list(script_v3.CLASS_NAMES)
    for call in drawn.save_animation:
        times = np.linspace(1000, 0, len(call.states))
        assert call.captions == [f"t = {t:.0f}" for t in times]


@pytest.mark.parametrize("label", LABELS)
def test_animation_loops_without_a_jump(drawn, label):
    call = drawn.save_animation[label]
    assert_same_pictures(call.noised[-1], call.states[-1])
    assert_same_pictures(call.noised[0], call.states[0])
    difference = call.noised[0].int() - call.noised[-1].int()
    assert difference.abs().float().mean() > 20  # of noise and image


@pytest.mark.parametrize("label", LABELS)
def test_animation_goes_out_with_the_noise_of_its_sample(
    script_v3, drawn, models, trajectories, label
):
    call, states = drawn.save_animation[label], trajectories[label][:, 0]
    assert_same_pictures(script_v3.decode_images(models, states), call.states)
    s = torch.linspace(0, 1, len(call.noised))[:, None, None, None]
    forward = s * states[-1] + (1 - s) * states[0]
    assert_same_pictures(script_v3.decode_images(models, forward), call.noised)


def test_latents_at_t_1000_are_standard_normal_noise(trajectories):
    noise = torch.stack([states[0] for states in trajectories])  # (10, rows, C, 7, 7)
    assert kstest(noise.flatten(), "norm").pvalue > 0.01
    for of_class in noise:
        shown = of_class[0]  # in the animation
        assert abs(shown.mean()) < 4 / shown.numel() ** 0.5
        assert abs(shown.std() - 1) < 4 / (2 * shown.numel()) ** 0.5
    noise = noise.flatten(0, 1).flatten(1)
    assert len(noise.unique(dim=0)) == len(noise)  # no two the same


# The paths


@pytest.mark.parametrize("label", LABELS)
def test_path_is_the_trajectory_drawn_above_it(script_v3, drawn, models, data, trajectories, label):
    call, states = drawn.path_figure[label], trajectories[label]
    assert call.strong == label
    assert script_v3.CLASS_NAMES[label] in call.title
    rows, columns = call.images.shape[:2]
    assert rows == states.shape[1] > 1
    assert columns == len(states)
    for row in range(rows):
        assert_same_pictures(script_v3.decode_images(models, states[:, row]), call.images[row])
    [top] = [grid for grid in drawn.draw_grid if grid.axes is call.result.axes[0]]
    every, rest = divmod(columns - 1, top.images.shape[1] - 1)
    assert rest == 0  # the columns' times are evenly spaced from 1000 to 0
    assert torch.equal(top.images, call.images[:, ::every])
    assert top.columns == [f"t={t:.0f}" for t in np.linspace(1000, 0, top.images.shape[1])]
    latents = script_v3.embed_images(models, data.validation_images).flatten(1).numpy()
    pca = PCA(2, random_state=0).fit(latents)
    shown = len(call.scatter)
    np.testing.assert_array_equal(call.labels, data.validation_labels[:shown])
    np.testing.assert_allclose(call.scatter, pca.transform(latents[:shown]), atol=1e-3)
    np.testing.assert_allclose(call.path, pca.transform(states[:, 0].flatten(1).numpy()), atol=1e-3)


@pytest.mark.parametrize("label", LABELS)
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


@pytest.mark.parametrize("label", LABELS)
def test_labels_of_times_do_not_collide(drawn, label):
    assert not time_labels_collide(drawn.path_figure[label].result)


@pytest.mark.parametrize("distance", [1, 10, 100])
def test_labels_of_times_do_not_collide_on_a_path_from_afar(script_v3, distance):
    rng = np.random.default_rng(0)
    # slow at the end, where labels crowd
    path = distance * np.linspace(1, 0, 21)[:, None] ** 3 * [1, 0.5]
    images = torch.zeros(2, 21, 1, 28, 28, dtype=torch.uint8)
    captions = [f"t = {t}" for t in range(1000, -1, -50)]
    points = rng.normal(size=(200, 2)), rng.integers(0, 10, 200)
    figure = script_v3.path_figure(images, path, captions, *points, "title", 3)
    assert not time_labels_collide(figure)


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
    unguided = models.with_settings(guidance_scale=0.0)
    expected = script_v3.generate_samples(unguided, torch.arange(10))
    assert_same_pictures(call.images[null_class], expected)


def test_guidance_grid_shows_the_same_noises_at_the_scales_it_names(script_v3, drawn, models):
    call = grid_of(drawn, "guidance/")
    assert call.rows == list(script_v3.CLASS_NAMES)
    scales = [float(name.removeprefix("w=")) for name in call.columns]
    assert scales == sorted(scales)
    assert {0.0, 1.0} < set(scales)
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


def test_samples_depend_on_seed_and_label_and_not_on_the_chunk(script_v3, models):
    labels = torch.tensor([0, 0, 3, 9, script_v3.NULL_CLASS])
    samples = script_v3.generate_samples(models, labels)
    assert samples.shape == (5, 1, 28, 28)
    assert samples.dtype == torch.uint8
    assert torch.equal(script_v3.generate_samples(models, labels), samples)
    assert_same_pictures(script_v3.generate_samples(models, labels, chunk=2), samples)
    reseeded = models.with_settings(sampling_seed=1)
    relabelled = script_v3.generate_samples(models, (labels + 1) % 10)
    for others in (script_v3.generate_samples(reseeded, labels), samples.roll(1, 0), relabelled):
        assert ((samples.int() - others.int()).abs().float().mean(dim=(1, 2, 3)) > 1).all()


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
