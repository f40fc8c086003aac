"""The run's page: what it says is so, and what it offers works in a real browser.

One small run of v3 is drawn into a folder with an unfriendly name, which is then moved. The browser
opens a copy of its page to which a script is added: that moves the sliders, clicks the tabs, and
writes what there is to see into the document, which the browser prints at the end.
"""

import base64
import contextlib
import csv
import dataclasses
import html
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.manifold import TSNE

from conftest import load_script
from script_runs import CLASSES, EXPERIMENTS, SCRIPT_V3, STEPS, flags, run

[CNN] = [each for each in EXPERIMENTS if each.name.endswith("CNN")]
FOLDER = "a <script>document.title=1<", "script> & <b>"  # its path holds </script>
COMMAND = ["script_model_train_test.py", "--note=</script><b>&amp;"]

DRIVER = """
const $ = id => document.getElementById(id), all = query => [...document.querySelectorAll(query)];
const seen = {error: null, steps: [], classes: {}, epochs: []};
function turn(id, value) {
  $(id).value = value;
  $(id).dispatchEvent(new Event("input", {bubbles: true}));
}
async function loaded(img) {
  if (!img.complete) await new Promise(done => { img.onload = img.onerror = done; });
  if (!img.naturalWidth) throw new Error("there is no picture " + img.src);
  return img.getAttribute("src");
}
function plane() {
  const circles = [...$("plane").querySelectorAll("circle")];
  const numbers = circle => ["cx", "cy", "opacity"].map(name => Number(circle.getAttribute(name)));
  return {point: numbers(circles.pop()), cloud: circles.map(numbers),
    line: $("plane").querySelector("polyline").getAttribute("points").trim().split(/[ ,]+/)};
}
function look() {
  const styles = all("#tiles .tile").map(tile => getComputedStyle(tile));
  return {time: $("time").textContent, spoken: $("step").getAttribute("aria-valuetext"),
    positions: styles.map(style => style.backgroundPosition), point: plane().point,
    size: styles.map(style => style.backgroundSize + " " + style.width)};
}
async function drive() {
  seen.newest = [$("epoch").textContent, $("sheet").getAttribute("src")];
  for (let value = 0; $("sheet").src && value <= Number($("samples").max); value++) {
    turn("samples", value);
    seen.epochs.push([$("epoch").textContent, await loaded($("sheet"))]);
  }
  if (!$("paths").hidden) {
    seen.begin = look();
    for (let value = 0; value <= Number($("step").max); value++) {
      turn("step", value);
      seen.steps.push(look());
    }
    turn("step", 1);
    for (const tab of all("#tabs [role=tab]")) {
      tab.focus();
      tab.click();
      const selected = all("#tabs [aria-selected=true]").map(each => each.textContent);
      seen.classes[tab.textContent] = {...look(), ...plane(), selected,
        focused: document.activeElement === tab, kind: tab.tagName,
        strip: getComputedStyle(all("#tiles .tile")[0]).backgroundImage,
        pixels: all("#tiles .tile").map(tile => getComputedStyle(tile).imageRendering),
        rows: all("#tiles figcaption").map(caption => caption.textContent),
        animation: await loaded($("animation")), figure: await loaded($("figure"))};
    }
  }
  for (const img of all("img[src]")) await loaded(img);
  seen.pictures = all("img").map(img => [img.getAttribute("src"), img.alt]);
  seen.tables = all("table").map(table => [...table.rows].map(row =>
    [...row.cells].map(cell => cell.textContent)));
  seen.text = Object.fromEntries(["h1", "p", "pre"].map(name =>
    [name, document.querySelector(name).textContent]));
  seen.headings = all("h2").filter(h => h.offsetParent).map(h => h.textContent);
  seen.title = document.title;
  seen.ranges = all("input").map(input => [input.type, input.labels.length,
    input.getAttribute("aria-label")]);
  seen.roles = all("[role]").map(each => each.getAttribute("role"));
  seen.requests = performance.getEntriesByType("resource").map(entry => entry.name);
  seen.width = [document.documentElement.scrollWidth, innerWidth];
  seen.scripts = document.scripts.length;
  seen.bold = all("b").length;
}
drive().catch(error => { seen.error = String(error) }).finally(() => {
  console.error("driven");
  parent.postMessage(JSON.stringify(seen), "*");
});
onmessage = event => {  // where the page is its own parent
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = event.data;
  document.body.append(result);
};
"""


@pytest.fixture(scope="session")
def browse(tmp_path_factory):
    """A function: what the driver has seen of a page, and what the console said beside."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"there is none of {', '.join(names)} on the PATH")
    profile = tmp_path_factory.mktemp("profile")

    def driven(page, width=None):
        """`width` is that of a frame that the page is shown in, for windows are never so narrow."""
        copy, frame = page.with_name("driven.html"), page.with_name("frame.html")
        text = page.read_text(encoding="utf-8") + f"<script>{DRIVER}</script>"
        copy.write_text(text, encoding="utf-8")
        framed = f'<iframe src="driven.html" width="{width}" height="900" style="border:0">'
        listener = DRIVER[DRIVER.index("onmessage") :]
        frame.write_text(f"<body>{framed}</iframe><script>{listener}</script>")
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                "--enable-logging=stderr", "--virtual-time-budget=10000",
                "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
                (frame if width else copy).as_uri(),
            ],
            capture_output=True, encoding="utf-8", timeout=120,
        )  # fmt: skip
        copy.unlink(), frame.unlink()
        [result] = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
        seen = SimpleNamespace(**json.loads(html.unescape(result)))
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        # the driver's own line shows that the console would be heard
        assert len([line for line in said if '"driven"' in line]) == 1, done.stderr
        seen.console = [line for line in said if '"driven"' not in line]
        return seen

    return driven


def draw_quickly(module):
    """Lets a script draw what the page does not depend on in less detail."""
    module.PATH_STEPS = 4
    module.path_figure = lambda *args: Figure(figsize=(1, 1))
    module.TSNE = partial(TSNE, method="exact")  # of few points the faster
    return module


@pytest.fixture(scope="module")
def finished(tiny_data_dir, tmp_path_factory):
    """A run of v3: its module, the folder it was drawn into, where that has been moved, and its
    page after each epoch."""
    module, root = draw_quickly(load_script(SCRIPT_V3)), tmp_path_factory.mktemp("page")
    output, pages, save_page = root.joinpath("old", *FOLDER), [], module.save_page
    (output / "quick").mkdir(parents=True)
    Figure(figsize=(1, 1)).savefig(output / "quick" / "loss_curves.png")  # another run's

    def noted_page(models, output):
        save_page(models, output)
        there = {path.relative_to(output).as_posix() for path in output.rglob("*.*")}
        pages.append(((output / "index.html").read_text(encoding="utf-8"), there))

    module.save_page = noted_page
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", COMMAND)
        patch.setattr(module, "zero_init", lambda layer: layer)  # or the paths would be points
        assert run(module, flags(module, output, tiny_data_dir, figures_every=9)) == 0
    module.save_page = save_page
    (root / "old").rename(root / "new")
    moved = root.joinpath("new", *FOLDER)
    return SimpleNamespace(module=module, output=output, moved=moved, pages=pages)


@pytest.fixture(scope="module")
def page(finished):
    return (finished.moved / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def seen(browse, finished):
    return browse(finished.moved / "index.html")


@pytest.fixture(scope="module")
def paths(finished):
    [file] = finished.moved.glob("denoise_with_diffusion_path/paths_epoch_3.json")
    return json.loads(file.read_text(encoding="utf-8"))


def assert_links_are_beside(text, there):
    """Every link leads to one of the files that are there; nothing else is fetched."""
    links = re.findall(r'(?:src|href|srcset)="([^"]+)"', text)
    assert {unquote(link) for link in links} <= there
    assert not re.search("<(link|iframe|object|embed|base)", text)
    assert not re.search(r"https?:|@import|url\((?!data:)|fetch\(|XMLHttp|import\(", text)


# What it is


def test_page_opens_without_an_error_and_without_the_network(finished, page, seen):
    assert (seen.console, seen.error) == ([], None)
    assert len(page) < 1_000_000
    for request in seen.requests:
        path = Path(unquote(urlsplit(request).path))
        assert request.startswith("data:") or path.is_relative_to(finished.moved), request


def test_page_shows_every_kind_of_figure_that_the_run_has(finished, seen):
    shown = {link for link, _ in seen.pictures if link}
    shown |= {link for of_class in seen.classes.values() for link in of_class["figure"]}
    folders = {path.parent.name for path in finished.moved.rglob("*.png")} - {""}
    own = folders - {"denoise_with_diffusion_path", "quick", finished.moved.name}
    assert {link.split("/")[0] for link in shown if "/" in link} >= own
    assert "loss_curves.png" in shown and "quick/loss_curves.png" not in shown
    assert all(alt for _, alt in seen.pictures)


def test_page_says_what_was_run(finished, seen):
    module, text = finished.module, seen.text["p"]
    denoiser = module.load_trained(finished.moved, "cpu").diffusion
    weights = sum(parameter.numel() for parameter in denoiser.parameters())
    assert seen.text["h1"] == f"{module.VERSION}: {FOLDER[-1]}" == seen.title
    for part in ("parameters", "cpu", torch.__version__, "minutes", "epoch 2 of decoder"):
        assert part in text, part
    assert weights / 1e6 < float(re.search(r"([\d.]+) M parameters", text)[1]) < 1
    assert text.endswith(f"Command: {shlex.join(COMMAND)}")


def test_text_is_escaped(finished, page, seen):
    """The folder's name and the command are text wherever they stand."""
    assert seen.scripts == 2  # the page's and the driver's
    assert seen.bold == 0
    assert str(finished.output) in seen.text["pre"].replace("'", "")
    assert page.count("</script>") == 1
    assert "<b>" not in page


def test_commands_resume_sample_and_extend_this_run(finished, seen, tiny_data_dir, monkeypatch):
    given = []
    monkeypatch.setattr(finished.module, "run_training", lambda *args: given.append(args))
    monkeypatch.setattr(finished.module, "load_trained", lambda *args, **k: given.append(args))
    monkeypatch.setattr(finished.module, "save_requested_samples", lambda *args: None)
    lines = [shlex.split(line) for line in seen.text["pre"].strip().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert line[:2] == ["python", "script_model_train_test.py"]
        finished.module.main(line[2:])
    (resumed, output), (source, *_), (extended, _) = given
    assert output == source == finished.output
    assert Path(resumed["data_dir"]) == Path(extended["data_dir"]) == tiny_data_dir
    assert extended["epochs"] > 3 and "epochs" not in resumed
    shutil.rmtree(finished.output.parents[1])


def test_metrics_are_those_of_the_file(finished, seen):
    with open(finished.moved / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    [table] = [table for table in seen.tables if table[0] == rows[0]]
    assert len(table) == len(rows) == 10
    for shown, row in zip(table[1:], rows[1:]):
        assert shown[0] == row[0]
        np.testing.assert_allclose([*map(float, shown[1:])], [*map(float, row[1:])], rtol=1e-4)
        assert shown[1:3] == row[1:3]  # whole numbers


def test_settings_that_differ_from_the_defaults_are_marked(finished, seen):
    module = finished.module
    config = module.load_trained(finished.moved, "cpu").config
    values = dataclasses.asdict(config) | {"output_dir": str(finished.output), "quick": True}
    usual = module.default_settings(torch.device("cpu"))
    [table] = [table for table in seen.tables if table[0][0] == "setting"]
    rows = {name: (value, mark) for name, value, mark in table[1:]}
    assert rows.keys() == usual.keys()
    for name in usual.keys() - {"data_dir", "device", "figures_every"}:
        value, mark = rows[name]
        expected = f"{values[name]:.5g}" if isinstance(values[name], float) else str(values[name])
        assert value == expected
        assert (repr(usual[name]) in mark) if values[name] != usual[name] else mark == ""
    marked = {name for name, (_, mark) in rows.items() if mark}
    assert {"epochs", "width", "output_dir", "figures_every"} <= marked
    assert not {"sampler", "class_dropout", "seed"} & marked


# What it does


def test_slider_shows_the_samples_of_the_epoch(finished, seen):
    expected = [[str(n), f"samples/samples_epoch_{n}.png"] for n in (1, 2, 3)]
    assert seen.epochs == expected
    assert seen.newest == expected[-1]
    assert all((finished.moved / file).is_file() for _, file in expected)


def tile_shown(position, size, steps, rows):
    """Which tile of the strip stands in a square of the page: its step and its row."""
    assert float(size.split("%")[0]) == pytest.approx(100 * steps, abs=1)
    shares = [float(part.removesuffix("%")) / 100 for part in position.split()]
    return tuple(round(share * (count - 1), 2) for share, count in zip(shares, (steps, rows)))


def test_slider_over_t_moves_state_picture_guess_and_point_together(finished, seen, paths):
    steps, first = len(paths["captions"]), paths["classes"]["T-shirt/top"]
    assert len(seen.steps) == steps == finished.module.PATH_STEPS + 1
    assert seen.begin == seen.steps[0]  # noise
    for step, look in enumerate(seen.steps):
        assert look["time"] == paths["captions"][step] == look["spoken"]
        shown = [tile_shown(*each, steps, 3) for each in zip(look["positions"], look["size"])]
        assert shown == [(step, row) for row in range(3)]
    assert_same_plane([look["point"][:2] for look in seen.steps], first["path"])


def assert_same_plane(shown, points):
    """Both are the same, but for a shift, one scale, and the axis that points down."""
    shown, points = np.asarray(shown, float), np.asarray(points) * [1, -1]
    shown, points = shown - shown.mean(axis=0), points - points.mean(axis=0)
    scale = (shown * points).sum() / np.square(points).sum()
    assert scale > 0
    np.testing.assert_allclose(shown, scale * points, atol=0.02 * scale + 0.01)


def test_tabs_change_class_path_animation_and_figure(finished, seen, paths):
    assert list(seen.classes) == CLASSES
    for name, look in seen.classes.items():
        own = paths["classes"][name]
        assert look["selected"] == [name]
        assert look["time"] == paths["captions"][1]  # the slider stays where it is
        assert look["rows"] == paths["rows"] == ["state", "image", "guess"]
        assert own["strip"] in look["strip"]
        assert set(look["pixels"]) == {"pixelated"}
        label = re.sub("[/ ]", "-", name)
        assert look["animation"].endswith(f"diffusion_animation_class_{label}_epoch_3.gif")
        assert look["figure"].endswith(f"denoising_path_{label}_epoch_3.png")
        line = np.asarray(look["line"], float).reshape(-1, 2)
        cloud = np.asarray(look["cloud"])
        assert_same_plane([*line, *cloud[:, :2]], own["path"] + paths["scatter"])
        assert look["point"][:2] == pytest.approx(line[1], abs=0.01)
        assert (cloud[:, :2] >= 0).all() and (cloud[:, :2] <= [600, 400]).all()
        strong = np.asarray(paths["labels"]) == own["label"]
        assert cloud[strong, 2].min() > 2 * cloud[~strong, 2].max()
    strips = [base64.b64decode(own["strip"]) for own in paths["classes"].values()]
    sizes = {Image.open(io.BytesIO(strip)).size for strip in strips}
    assert sizes == {(28 * len(paths["captions"]), 28 * 3)}
    assert len(set(strips)) == len(CLASSES)


def test_page_is_usable_by_keyboard_and_screen_reader(seen):
    for look in seen.classes.values():
        assert look["kind"] == "BUTTON" and look["focused"]
    assert seen.roles.count("tab") == len(CLASSES) and "tablist" in seen.roles
    assert all(kind == "range" and labels == 1 for kind, labels, _ in seen.ranges)
    assert [name for _, _, name in seen.ranges] == ["epoch", "step from noise to image"]


def test_page_fits_a_phone(browse, finished):
    seen = browse(finished.moved / "index.html", width=390)
    assert (seen.console, seen.error) == ([], None)
    width, window = seen.width
    assert window == 390 and width <= window  # nothing sticks out


# While it trains, and in other versions


def test_page_is_whole_and_up_to_date_after_every_epoch(finished):
    states = [html.unescape(re.search("<p>(.*?)</p>", text)[1]) for text, _ in finished.pages]
    last = list(dict.fromkeys(re.search(r"epoch \d+ of \w+", text)[0] for text in states))
    epochs = {stage: steps // 3 for stage, steps in STEPS.items()}
    assert last == [
        f"epoch {n + 1} of {name}" for name, count in epochs.items() for n in range(count)
    ]
    for text, there in finished.pages:
        assert text.rstrip().endswith("</script>")
        assert_links_are_beside(text, there)


def test_page_before_there_are_trajectories_works(browse, finished, tmp_path):
    """As it stands after the first epoch of the diffusion."""
    early = next(text for text, _ in finished.pages if "samples/samples_epoch_1.png" in text)
    assert "const sheets" in early and "samples_epoch_2" not in early
    shutil.copytree(finished.moved, tmp_path / "run")
    (tmp_path / "run" / "index.html").write_text(early, encoding="utf-8")
    seen = browse(tmp_path / "run" / "index.html")
    assert (seen.console, seen.error) == ([], None)
    assert seen.epochs == [["1", "samples/samples_epoch_1.png"]]
    assert seen.steps == [] and "From noise to image" not in seen.headings
    assert "Metrics" in seen.headings
    # And before there is any figure.
    module = finished.module
    module.save_page(module.load_trained(finished.moved, "cpu"), tmp_path / "empty")
    seen = browse(tmp_path / "empty" / "index.html")
    assert (seen.console, seen.error) == ([], None)
    assert seen.epochs == [] and not [link for link, _ in seen.pictures if link]


def test_page_of_a_folder_whose_name_is_no_utf_8_is_written(finished, tmp_path):
    output = tmp_path / os.fsdecode(b"run\xff")
    finished.module.save_page(finished.module.load_trained(finished.moved, "cpu"), output)
    assert r"run\udcff</h1>" in (output / "index.html").read_text(encoding="utf-8")


def test_page_of_a_version_without_classes_and_latents(
    browse, undisturbed_run, tiny_data_dir, tmp_path, monkeypatch
):
    module = draw_quickly(load_script(CNN.path))
    models = module.load_trained(undisturbed_run(CNN.path), device="cpu")
    config = module.Settings(data_dir=str(tiny_data_dir))
    monkeypatch.setattr(module, "save_own_figures", lambda *args: None)
    module.save_all_figures(models, module.load_fashion_mnist(config, models.device), tmp_path)
    sheets = {number: f"samples/samples_epoch_{number}.png" for number in range(3, 153)}
    for file in sheets.values():  # more than a slider has places when nothing is said
        (tmp_path / file).write_bytes((tmp_path / sheets[3]).read_bytes())
    (tmp_path / "samples" / "samples_epoch_2.png.tmp").write_bytes(b"of a run that was killed")
    (tmp_path / "samples" / "samples.png").write_bytes(b"asked for by --num-samples")
    module.save_page(models, tmp_path)
    seen = browse(tmp_path / "index.html")
    assert (seen.console, seen.error) == ([], None)
    assert list(seen.classes) == [f"sample {number}" for number in range(10)]
    assert seen.epochs == [[str(number), file] for number, file in sheets.items()]
    assert seen.newest == seen.epochs[-1]
    for name, look in seen.classes.items():
        assert look["rows"] == ["state", "guess"]
        assert look["animation"].endswith(f"class_{name.replace(' ', '-')}_epoch_3.gif")
    for step, look in enumerate(seen.steps):
        shown = [tile_shown(*each, 5, 2) for each in zip(look["positions"], look["size"])]
        assert shown == [(step, 0), (step, 1)]
