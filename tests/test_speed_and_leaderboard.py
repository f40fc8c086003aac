"""The tools beside quality.py: what they time, count, plan and write, with fakes for peers and for
minutes."""

import argparse
import copy
import csv
import dataclasses
import json
import os
import re
import shutil
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import feature_extractor as fe
import leaderboard
import peers
import quality
import speed
import time_to_quality
from conftest import REPOSITORY, SCRIPT_V3, run_script
from script_runs import every_script

CPU = torch.device("cpu")
V3 = "LatentDiffusionModel/v3"


@pytest.fixture(scope="module")
def quick_flags(tiny_data_dir):
    """The command line of a tiny version."""
    return ["--quick", "--data-dir", str(tiny_data_dir), "--device", "cpu"]


@pytest.fixture(scope="module")
def untrained_v3(quick_flags, tmp_path_factory):
    """v3's output folder after a step or two; copy it before you change it."""
    folder = tmp_path_factory.mktemp("v3")
    speed.make_untrained(SCRIPT_V3, quick_flags, folder)
    return folder


# --- speed.py -------------------------------------------------------------------------------------


@every_script
def test_every_version_can_be_measured(experiment, quick_flags, tmp_path):
    path, turns = experiment.path, []
    peer = lambda stage, images: {"peer": lambda: turns.append((stage.name, images))}  # noqa: E731
    stages = speed.measure_training(path, quick_flags, 2, peer)
    assert len(stages) == len(speed.epoch_fields(speed.load_script(path).Settings))
    for stage in stages:
        assert len(stage.seconds["step"]) == len(stage.seconds["bare"]) == 2
        assert stage.epochs and stage.steps_per_epoch == len(stage.arrays[0]) // stage.batch_size
        assert ("peer" in stage.seconds) == (stage.name == "diffusion")
    assert len(turns) == speed.WARM_UP + 2 and {name for name, _ in turns} == {"diffusion"}
    assert turns[0][1].shape[1:] == (1, 28, 28) and turns[0][1].dtype == torch.uint8

    speed.make_untrained(path, quick_flags, tmp_path)
    sampler = speed.Sampler(path, tmp_path, "cpu")
    assert sampler.seconds(10) > 0
    # the second number is of the guide
    asked = {"CNN": 10 + 6, "Transformer": 10 + 7, "UNet": 35 + 8}
    asked |= {"v1": 36 + 21, "v2": 12 + 8, "v3": 12 + 6}
    assert sampler.evaluations() == asked.get(path.parent.name, sampler.evaluations())
    assert sampler.evaluations() >= 1 and "?" not in sampler.description()


def test_the_step_holds_the_work_of_the_loop_and_the_bare_step_does_not(quick_flags, monkeypatch):
    short = [*quick_flags, "--train-images", "64", "--autoencoder-epochs", "1"]
    with pytest.raises(ValueError, match="too few steps to time 10000"):
        speed.measure_training(SCRIPT_V3, short, 10_000)
    script = speed.load_script(SCRIPT_V3)

    class SlowRng(script.Rng):
        def __init__(self, *args, **kwargs):
            time.sleep(0.2)
            super().__init__(*args, **kwargs)

    script.Rng, slow_peer = SlowRng, {"peer": lambda: time.sleep(0.3)}
    monkeypatch.setattr(speed, "load_script", lambda path: script)
    stages = speed.measure_training(SCRIPT_V3, quick_flags, 2, lambda *_: slow_peer)
    assert all(min(stage.seconds["step"]) >= 0.2 > min(stage.seconds["bare"]) for stage in stages)
    [seconds] = [stage.seconds for stage in stages if stage.name == "diffusion"]
    assert min(seconds["step"]) < 0.2 + 0.3 <= 0.2 + min(seconds["peer"])  # nor that of the peers


@pytest.mark.parametrize("parts", [1, 2])
def test_the_bare_step_trains_a_copy(parts, script_v3):
    model = nn.Linear(3, 1)
    before, losses = model.weight.detach().clone(), []

    def loss(model, x, rng):
        losses.append(rng * model(x).square().mean())
        return losses[-1] if parts == 1 else {"a": losses[-1] / 4, "b": 3 * losses[-1] / 4}

    rates = {"adamw": 0.1, "muon": 0.0}
    stage = SimpleNamespace(network=model, rates=rates, loss=loss)
    step = speed.bare_step(script_v3, stage)
    for _ in range(3):
        step([torch.ones(4, 3)], 1.0)
    expected = copy.deepcopy(model)
    optimizer = script_v3.build_optimizers(expected, rates)["adamw"]
    for each in losses:  # by both parts of the loss
        value = expected(torch.ones(4, 3)).square().mean()
        torch.testing.assert_close(each.float(), value, rtol=0.02, atol=0.02)  # or in bfloat16
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    assert torch.equal(model.weight, before) and model.weight.grad is None


def test_contestants_take_turns_and_the_median_of_ratios_counts():
    turns = []

    def contestant(name):
        return lambda: turns.append(name) or len(turns)

    times = speed.interleave({name: contestant(name) for name in "ab"}, repeats=2, warm_up=1)
    assert turns == ["a", "b"] * 3
    assert times == {"a": [3, 5], "b": [4, 6]}  # the warm-up does not count
    assert speed.ratio([1, 10, 3], [1, 2, 3]) == "1x"
    assert speed.ratio([2, 4, 9], [1, 2, 3]) == "2x"
    assert speed.milliseconds([0.1, 0.012, 0.001]) == "12 ms"


def test_the_input_pipelines_give_the_same_batches_and_both_are_measured(
    tiny_data_dir, script_v3, monkeypatch
):
    images, labels = fe.load_split(tiny_data_dir, train=True)
    stage = SimpleNamespace(arrays=[images[:, None], labels], batch_size=64)
    resident = speed.resident_batches(stage.arrays, 64, script_v3.to_float)
    wanted = sorted(zip(labels.tolist(), images.sum(dim=(1, 2)).tolist()))
    for source in (resident, speed.loader_batches(tiny_data_dir, 64, 0, CPU)):
        batches = [next(source) for _ in range(10)]  # an epoch of 640
        assert {(each.shape, each.dtype) for each, _ in batches} == {((64, 1, 28, 28), torch.float)}
        pixels, found = map(torch.cat, zip(*batches))
        sums = ((pixels + 1) * 127.5).sum(dim=(1, 2, 3)).round().int()
        assert sorted(zip(found.tolist(), sums.tolist())) == wanted
    monkeypatch.setattr(speed.os, "cpu_count", lambda: 1)
    times = speed.measure_input(stage, lambda batch: batch.float(), tiny_data_dir, 2)
    assert list(times) == ["resident", "0 workers", "1 workers"]
    assert all(len(each) == 2 and min(each) > 0 for each in times.values())
    assert min(times["resident"]) < min(times["0 workers"])


def test_a_sampler_counts_evaluations_and_parameters(untrained_v3):
    sampler = speed.Sampler(SCRIPT_V3, untrained_v3, "cpu")
    stored = sampler.models
    parts = stored.autoencoder.encoder, stored.decoder["decoder"], stored.guide, stored.diffusion
    assert sampler.parameters == sum(map(speed.parameter_count, parts))
    for changes, expected, words in (
        ({}, 18, "Heun, 6 steps, guidance 2.75"),  # guidance's two evaluations count as two
        ({"guidance_scale": 1.0, "sampler": "euler"}, 6, "Euler, 6 steps, guidance 1"),
        ({"guidance_scale": 0.0, "sampling_steps": 5}, 10, "Heun, 5 steps, guidance 0"),
    ):
        sampler.rows = sampler.count = 0
        sampler.models = stored.with_settings(**changes)
        sampler.seconds(7), sampler.seconds(3)
        assert sampler.evaluations() == expected
        assert sampler.description() == f"{words} from t = 750 to 200"


def test_a_sampler_that_is_not_known_is_not_guessed(untrained_v3):
    sampler = speed.Sampler(SCRIPT_V3, untrained_v3, "cpu")
    option = sampler.script.option

    def described(help, **settings):
        fields = [("sampling_steps", int, option(9, help))]
        fields += [(name, type(value), option(value, "")) for name, value in settings.items()]
        sampler.models.config = dataclasses.make_dataclass("Config", fields)()
        return sampler.description()

    assert described("steps, of two evaluations each") == "?, 9 steps"
    assert described("steps of DDIM") == "DDIM, 9 steps"
    assert described("steps of DDIM", eta=0.5) == "DDIM, 9 steps, eta 0.5"
    assert described("steps of DDIM", sampler="ancestral", eta=0.5) == "ancestral"


def test_figures_are_those_of_the_trajectories(monkeypatch):
    script = SimpleNamespace(save_trajectories=lambda: time.sleep(0.05))

    def main(argv):
        assert argv[-1] == "--sample-only"
        time.sleep(0.3)  # the other figures
        script.save_trajectories()

    script.main = main
    monkeypatch.setattr(speed, "load_script", lambda path: script)
    times = speed.measure_figures("script.py", [], "folder", 2, CPU)
    assert len(times) == 2 and 0.05 <= min(times) < 0.3


@dataclasses.dataclass
class FakePeer:
    """A peer that counts its steps, and whose samples are all of the grey level that it has counted
    to."""

    parameters: int = 5
    device: torch.device = CPU
    sampler = "none, 3 steps"
    evaluations = 3

    def __post_init__(self):
        self.model, self.steps = nn.Linear(self.parameters - 1, 1), 0

    def step(self, images, labels=None):
        self.steps += 1

    def weights(self):
        return {"steps": self.steps}

    def load(self, weights):
        self.steps = weights["steps"]

    def sample(self, count):
        return torch.full((count, 28, 28), self.steps, dtype=torch.uint8)


def test_peers_are_built_in_the_size_that_is_asked_for_and_sample_in_chunks(monkeypatch):
    monkeypatch.setattr(speed, "PEERS", {"torch": FakePeer, "no such library": FakePeer})
    built = speed.build_peers(100, CPU)
    assert list(built) == ["torch"] and speed.parameter_count(built["torch"].model) == 100
    for wanted, size in ((1, 2), (6, 4), (9, 8), (99, 16)):
        nearest = speed.nearest_model(lambda n: nn.Linear(n, 1), [2, 4, 8, 16], wanted)
        assert nearest.in_features == size
    samples = speed.sample_in_chunks(built["torch"], 25, chunk=10)
    assert samples.shape == (25, 28, 28) and samples.dtype == torch.uint8
    levels = speed.to_uint8(torch.tensor([-1, 0, 0.5, 1, 9]).view(5, 1, 1, 1))
    assert levels.dtype == torch.uint8 and levels.flatten().tolist() == [0, 0, 128, 255, 255]


RIVALS = {name: (name, build) for name, build in speed.PEERS.items()}
RIVALS |= {f"race {name}": (peer.package, peer.build) for name, peer in peers.PEERS.items()}


@pytest.mark.parametrize("name", RIVALS)
def test_a_peer_trains_and_samples(name, tmp_path, monkeypatch):
    """Those of the race with labels, and by their averaged weights."""
    (package, build), race = RIVALS[name], name.startswith("race")
    if not speed.installed(package):
        pytest.skip(f"{package} is not installed (tests/benchmarks/requirements.txt)")
    peer, labels, rows = build(60_000, CPU), [torch.arange(16) % 10] * race, []
    before = [parameter.detach().clone() for parameter in peer.model.parameters()]
    for _ in range(3):
        peer.step(torch.rand(16, 1, 28, 28) * 2 - 1, *labels)
    assert any(not torch.equal(old, new) for old, new in zip(before, peer.model.parameters()))
    network = type(peer.model)
    forward = network.forward

    def counted(self, x, *args, **kwargs):
        rows.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(network, "forward", counted)  # of the averaged copy too
    if race:  # by another process's weights
        weights = peer.weights()
        torch.save(weights, tmp_path / "weights.pt")
        peer = build(60_000, CPU)
        peer.load(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert all(torch.equal(weights[key], value) for key, value in peer.weights().items())
    samples = peer.sample(4)
    assert samples.shape == (4, 28, 28) and samples.dtype == torch.uint8
    assert samples.float().std() > 0
    if race:
        named = name.removeprefix("race ")
        assert sum(rows) == 4 * peer.evaluations
        assert peers.PEERS[named].conditional == ("guidance" in peer.sampler)


def test_the_report_of_a_version(quick_flags, tiny_data_dir, monkeypatch, capsys):
    monkeypatch.setattr(speed, "script_flags", lambda args: quick_flags)
    monkeypatch.setattr(speed, "PEERS", {"torch": FakePeer})
    monkeypatch.setattr(speed, "measure_figures", lambda *args: [3.0, 1.0, 2.0])
    arguments = ["--peers", "--repeats=2", "--sampling-repeats=1", "--images=20", "--device=cpu"]
    speed.main([V3, *arguments, "--data-dir", str(tiny_data_dir)])
    out = capsys.readouterr().out
    step = r"training step, \w+, batch \d+: [\d.]+ ms, [\d.]+x the bare step \([\d.]+ ms\)"
    assert len(re.findall(step, out)) == 4
    against = r"[\d.]+x with 0 workers \([\d.]+ ms\), [\d.]+x with \d+ workers"
    assert re.search(f"input pipeline, .* {against}", out)
    sampler = r"\(Heun, 6 steps, guidance 2.75 from t = 750 to 200: 18 evaluations an image\)"
    assert re.search(rf"1,000 images: [\d.]+ s {sampler}", out)
    assert "GIFs and path figures: 2 s" in out
    against = "the diffusion step; 1,000 images .* the version's"
    assert re.search(rf"torch {re.escape(speed.installed('torch'))}, .* {against}", out)


@pytest.mark.parametrize("tool", [speed, leaderboard, time_to_quality])
def test_bad_input_gets_one_line_and_status_2(tool, refused, no_network, tmp_path):
    unknown = refused(tool.main, "LatentDiffusionModel/v0")
    assert unknown.startswith("error: there is no version 'LatentDiffusionModel/v0'")
    device = refused(tool.main, V3, "--device", "banana")
    assert device.startswith("error: device 'banana' is not one of")
    if tool is speed:
        error = refused(speed.main, V3, "--data-dir", tmp_path, "--device", "cpu")
        assert error.startswith("error: cannot get Fashion-MNIST")


def test_a_script_s_warning_is_seen(untrained_v3, tmp_path, capsys):
    checkpoints = shutil.copytree(untrained_v3 / "checkpoints", tmp_path / "checkpoints")
    os.replace(checkpoints / "last.pt", checkpoints / "previous.pt")
    speed.Sampler(SCRIPT_V3, tmp_path, "cpu")
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("warning: ")
    assert err.endswith(f"continuing from {checkpoints / 'previous.pt'}\n")


# --- leaderboard.py -------------------------------------------------------------------------------


@dataclasses.dataclass
class Board:
    """A made-up repository in which v3 has been trained and sampled."""

    root: object
    data_dir: object

    def __post_init__(self):
        self.output = self.root / "LatentDiffusionModel" / "v3" / "output"
        self.json = self.root / "tests" / "benchmarks" / "leaderboard.json"

    def write_samples(self, count=100):
        rng, images = np.random.default_rng(0), fe.load_split(self.data_dir, train=False)[0].numpy()
        for name in leaderboard.SAMPLE_FILES:
            chosen = images[rng.permutation(300)[:count], ..., None]
            np.savez(self.output / name, chosen, np.arange(count) % 10)

    def rows(self):
        """The rows of the JSON by version."""
        return {row["version"]: row for row in json.loads(self.json.read_text())["versions"]}

    def run(self, *arguments):
        """Run the command line; returns the rows by version, and the two READMEs."""
        arguments = [*arguments, "--data-dir", str(self.data_dir), "--device", "cpu"]
        leaderboard.main(arguments, self.root)
        assert list(self.rows()) == list(leaderboard.LADDER)
        readmes = [path.read_text() for path in (self.root / "README.md", self.readme)]
        for text in readmes:
            assert text.startswith("before\n<!-- leaderboard:begin -->\n| version |")
            assert text.endswith("\n<!-- leaderboard:end -->\nafter\n")
        return self.rows(), *readmes

    @property
    def readme(self):
        return self.json.with_name("README.md")


@pytest.fixture
def board(tmp_path, untrained_v3, scored_data_dir, monkeypatch):
    monkeypatch.setattr(leaderboard, "SAMPLES", 100)
    monkeypatch.setattr(leaderboard, "TIMED_IMAGES", 20)
    board = Board(tmp_path, scored_data_dir)
    board.json.parent.mkdir(parents=True)
    for path in (tmp_path / "README.md", board.readme):
        path.write_text("before\n<!-- leaderboard:begin -->\n<!-- leaderboard:end -->\nafter\n")
    shutil.copytree(untrained_v3, board.output)
    shutil.copy(SCRIPT_V3, board.output.parent)
    board.write_samples()
    return board


def test_a_result_gets_a_row_and_keeps_it(board, capsys, monkeypatch):
    rows, readme, all_columns = board.run()
    row = rows[V3]
    with (board.output / "metrics.csv").open() as file:
        seconds = [float(each["seconds"]) for each in csv.DictReader(file)]
    assert row["epochs"] == {"autoencoder": 1, "guide": 1, "diffusion": 1, "decoder": 1}
    assert row["training_seconds"] == pytest.approx(sum(seconds))
    assert row["sampler"] == "Heun, 6 steps, guidance 2.75 from t = 750 to 200"
    assert row["evaluations"] == 18
    assert row["seconds_per_1000_images"] > 0 and row["parameters"] > 0

    files = [quality.read_samples(board.output / name) for name in leaderboard.SAMPLE_FILES]
    scores = [quality.score_arrays(*arrays, board.data_dir) for arrays in files]
    for score in leaderboard.SCORES:
        values = [each[score] for each in scores]
        assert row[score] == pytest.approx(np.mean(values))
        assert row[f"{score}_spread"] == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    line = next(line for line in readme.splitlines() if V3 in line)
    eyes = f"{row['percent_of_blur']:.2f}% | {row['swd_percent_of_blur']:.1f}%"
    assert f"| {eyes} | {row['coverage']:.3f} |" in line
    assert line.startswith("| [v3](Lat") and line.count("|") == 6 + 1
    sizes, scored = (line for line in all_columns.splitlines() if V3 in line)
    assert "| 1 + 1 + 1 + 1 |" in sizes and f"(../../{V3})" in sizes
    assert f"{row['fmd']:.3f} ± {row['fmd_spread']:.3f}" in scored
    assert f"{row['swd_percent_of_blur']:.1f}%" in scored and f"{row['detail']:.3f}" in scored
    others = len(leaderboard.LADDER) - 1
    assert readme.count("not measured yet") == 5 * others + 1  # v3's whole run too
    assert readme.count("| real images (floor) |") == 1
    assert all_columns.count("not measured yet") == 2 * others
    for floor in ("balanced", "at random"):
        assert all_columns.count(f"| 100 real training images, {floor} (floor) |") == 1

    # What has not changed is not measured again, unless that is asked for.
    with monkeypatch.context() as patch:
        patch.setattr(leaderboard, "measure_sampler", lambda *_: pytest.fail("measured again"))
        assert board.run() == (rows, readme, all_columns)
    again, *_ = board.run(V3, "--again", "--training-hardware", "an abacus")
    assert again[V3]["training_hardware"] == "an abacus"

    # A row from before the class-free eyes is measured again.
    content = json.loads(board.json.read_text())
    for each in content["versions"]:
        each.pop("swd", None)
    board.json.write_text(json.dumps(content))
    assert "swd" in board.run()[0][V3]

    # Without a result the row stays.
    (board.output / "samples_seed_2.npz").unlink()
    capsys.readouterr()
    before = board.rows()
    assert board.run()[0] == before
    err = capsys.readouterr().err
    assert f"{V3} keeps its row" in err and "samples_seed_2.npz" in err


def spoil(board, name, content):
    if name == "samples":
        board.write_samples(content)
    for path in board.output.glob(name):
        path.unlink() if content is None else path.write_text(content)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("samples", 120, "holds 120 samples, not 100"),
        ("samples.npz", "a shoe", "not a sound .npz file"),
        ("metrics.csv", "stage\n", "holds no epoch"),
        ("checkpoints/last.pt", None, "lacks last.pt"),
        ("checkpoints/*", "", "can be read"),
    ],
)
def test_what_is_no_result_gets_a_row_that_says_so(board, name, content, reason, capsys):
    spoil(board, name, content)
    rows, readme, all_columns = board.run()
    assert all(row.keys() == {"version"} for row in rows.values())
    assert readme.count("not measured yet") == 5 * len(leaderboard.LADDER)
    assert all_columns.count("not measured yet") == 2 * len(leaderboard.LADDER)
    err = capsys.readouterr().err
    assert f"{V3} has no result" in err and reason in err


def test_what_is_not_known_is_not_made_up():
    row = {"version": "A/b", "parameters": 1, "epochs": {"diffusion": 3}, "training_seconds": 90}
    row |= {"sampler": "ddim", "evaluations": 20.0, "seconds_per_1000_images": 4.0}
    row |= {"training_hardware": "x", "sampling_hardware": "y", "fmd": 1, "percent_of_blur": 2}
    row |= {"coverage": 0.3, "copying": 0.04, "accuracy": None}
    columns = leaderboard.SIZES | leaderboard.QUALITY
    cells = dict(zip(columns, leaderboard.format_row(row, columns), strict=True))
    assert cells["accuracy"] == "-" and cells["copying"] == "4.0%"  # unconditional
    assert cells["training"] == "1.5 min, x"
    assert cells["seconds"] == "4 (y)" and cells["evaluations"] == "20"
    assert cells["version"] == "[`A/b`](A/b)" and cells["detail"] == ""  # which was not measured
    unknown = "not measured yet"
    assert leaderboard.format_short(row) == [unknown, "4", "2.00%", unknown, "0.300"]
    whole = row | {"run_seconds": 690.0, "swd_percent_of_blur": 30}
    assert leaderboard.format_short(whole) == ["11.5 min", "4", "2.00%", "30.0%", "0.300"]
    noted = row | {"note": "By two runs."}  # which is said once, below the tables
    board = {"floors": [], "versions": [noted, dict(noted), row]}
    for text in (leaderboard.format_leaderboard(board), leaderboard.format_all(board)):
        assert text.count("By two runs.") == 1


BEGIN, END = "<!-- a:begin -->\n", "<!-- a:end -->\n"


@pytest.mark.parametrize("content", ["", END + BEGIN, 2 * BEGIN + END])
def test_a_file_without_the_markers_is_left_alone(content, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(content)
    with pytest.raises(ValueError, match="must hold the lines"):
        leaderboard.replace_block(path, "a", "text")
    assert path.read_text() == content


def test_the_committed_table_is_that_of_the_committed_figures():
    folder = REPOSITORY / "tests" / "benchmarks"
    board = leaderboard.read_board(folder / "leaderboard.json")
    for place, form in (
        (REPOSITORY, leaderboard.format_leaderboard),
        (folder, leaderboard.format_all),
    ):
        readme = (place / "README.md").read_text(encoding="utf-8")
        begin, end = (f"<!-- leaderboard:{word} -->" for word in ("begin", "end"))
        assert readme.partition(begin)[2].partition(end)[0] == f"\n{form(board)}\n"


# --- time_to_quality.py ---------------------------------------------------------------------------


def stage(name, epochs, step, steps=100):
    return speed.StageTimes(name, epochs, steps, 64, 1, [], {"step": [step] * 3})


# Of a latent version; and the names of its settings of epochs.
FIELDS = ["autoencoder_epochs", "guide_epochs", "epochs", "decoder_epochs"]
STAGES = [stage("autoencoder", 2, 0.9), stage("guide", 1, 0.6), stage("diffusion", 8, 0.6)]
STAGES += [stage("decoder", 1, 1.2)]


@pytest.mark.parametrize("budget", [5, 60, 300, 600, 3600, 20_000])
def test_a_plan_fits_its_budget(budget, script_v3):
    epochs, share = time_to_quality.plan_training(STAGES, FIELDS, budget)
    assert list(epochs) == FIELDS and min(epochs.values()) >= 1 and 0 < share <= 1
    assert epochs["epochs"] >= 4  # marks of a curve
    available = (1 - time_to_quality.SLACK) * max(budget - time_to_quality.START_UP, budget / 4)
    pairs = zip(STAGES, epochs.values())
    planned = sum(each.median() * each.steps_per_epoch * count for each, count in pairs)
    assert share * planned == pytest.approx(available)  # no more, and no less
    assert share > 0.85 or min(epochs.values()) == 1
    if budget == 20_000:  # the published proportion is kept
        assert epochs["epochs"] / epochs["autoencoder_epochs"] == pytest.approx(4, rel=0.05)
        assert epochs["epochs"] / epochs["decoder_epochs"] == pytest.approx(8, rel=0.05)
    # Each stage's place is that of its setting.
    assert speed.epoch_fields(script_v3.Settings) == FIELDS
    assert [f"{each.name}_epochs".removeprefix("diffusion_") for each in STAGES] == FIELDS


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(3, 8, [0, 1, 2]), (8, 4, [1, 3, 5, 7]), (200, 2, [99, 199])]
)
def test_thinning_keeps_the_last(count, most, expected):
    assert time_to_quality.thin(list(range(count)), most) == expected


# Behaves as the scripts do: a row and a checkpoint an epoch, SIGTERM saves and exits with 143,
# figures at the end.
FAKE_SCRIPT = """
import os, pathlib, signal, sys, time
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if args["--epochs"] == "0":
    sys.exit("error: no epochs")
output = pathlib.Path(args["--output-dir"])
(output / "checkpoints").mkdir(parents=True)
noted = []
signal.signal(signal.SIGTERM, lambda *_: noted.append(1))
def save(text):
    (output / "checkpoints" / "new.pt").write_text(text)
    os.replace(output / "checkpoints" / "new.pt", output / "checkpoints" / "last.pt")
rows = "stage,epoch\\n"
for epoch in range(int(args["--epochs"])):
    ends = time.monotonic() + float(args["--seconds"])
    while time.monotonic() < ends:
        time.sleep(0.01)
        if noted:
            save(f"cut off in {epoch}")
            print("SIGTERM at diffusion, step 7 of 9: saved", file=sys.stderr)
            sys.exit(143)
    save(str(epoch + 1))
    rows += f"diffusion,{epoch + 1}\\n"
    (output / "metrics.new").write_text(rows)
    os.replace(output / "metrics.new", output / "metrics.csv")
signal.signal(signal.SIGTERM, signal.SIG_DFL)
time.sleep(60)
"""


@pytest.fixture
def fake_script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(FAKE_SCRIPT)
    return path


def contents(snapshots):
    return [(folder / "checkpoints" / "last.pt").read_text() for folder, _, _ in snapshots]


def test_a_finished_training_is_kept_an_epoch_at_a_time_and_not_drawn(fake_script, tmp_path):
    flags, started = ["--epochs", "3", "--seconds", "2"], time.monotonic()
    snapshots = time_to_quality.train_version(fake_script, flags, ["diffusion"], 3, 50, tmp_path)
    assert time.monotonic() - started < 30
    assert contents(snapshots) == ["1", "2", "3"] and [done for *_, done in snapshots] == [1, 2, 3]
    seconds = [each for _, each, _ in snapshots]
    assert seconds == sorted(seconds) and seconds[0] >= 2 and seconds[2] >= 6


def test_a_training_is_cut_off_at_the_end_of_the_budget(fake_script, tmp_path):
    flags, budget, started = ["--epochs", "2", "--seconds", "3"], 6, time.monotonic()
    snapshots = time_to_quality.train_version(
        fake_script, flags, ["diffusion"], 2, budget, tmp_path
    )
    assert time.monotonic() - started < budget + 2
    assert contents(snapshots) == ["1", "cut off in 1"]
    assert snapshots[0][1] <= snapshots[1][1] <= budget


def test_a_script_that_fails_is_not_passed_over(fake_script, tmp_path):
    with pytest.raises(RuntimeError, match="status 1: error: no epochs"):
        time_to_quality.train_version(
            fake_script, ["--epochs", "0"], ["diffusion"], 3, 20, tmp_path
        )


def test_a_peer_spends_its_budget_and_no_more(monkeypatch):
    clock = SimpleNamespace(now=100.0, time=lambda: clock.now)
    monkeypatch.setattr(time_to_quality, "time", clock)
    peer = FakePeer()
    durations = iter([7.0] + [1.5] * 1000)  # the first step warms up

    def step(images, labels):
        peer.steps += 1
        clock.now += next(durations)

    peer.step = step
    snapshots = time_to_quality.train_peer(peer, iter([(0, 0)] * 1000), 90.0, 60, 2)
    (first, half, count), (second, whole, total) = snapshots
    assert 30 - 2 * 1.5 <= half <= 30 and 60 - 2 * 1.5 <= whole <= 60
    assert (first, second) == ({"steps": count}, {"steps": total})
    assert total > count == 1 + (half - 17) / 1.5


def test_peers_see_each_training_image_once_an_epoch(scored_data_dir):
    batches = time_to_quality.training_batches(scored_data_dir, 64, CPU)
    epoch, classes = map(torch.cat, zip(*(next(batches) for _ in range(10))))  # 600 images
    images, labels = (part[:600] for part in fe.load_split(scored_data_dir, train=True))
    assert epoch.shape == (600, 1, 28, 28) and epoch.min() >= -1 and epoch.max() <= 1
    found = ((epoch[:, 0] + 1) * 127.5).round().byte().flatten(1).tolist()
    wanted = zip(images.flatten(1).tolist(), labels.tolist())
    assert sorted(zip(found, classes.tolist())) == sorted(wanted)


@pytest.mark.parametrize("conditional", [False, True])
def test_a_peer_is_trained_and_then_sampled(conditional, scored_data_dir, tmp_path, monkeypatch):
    fake = peers.Peer("torch", "fake", FakePeer, conditional)
    monkeypatch.setattr(peers, "PEERS", {"torch_fake": fake})
    snapshots = [({"steps": 3}, 30.0, 3), ({"steps": 7}, 60.0, 7)]
    monkeypatch.setattr(time_to_quality, "train_peer", lambda *args: snapshots)
    args = argparse.Namespace(
        device="cpu", data_dir=scored_data_dir, peer_batch_size=32, minutes=1, marks=2, samples=110
    )
    time_to_quality.train_peer_process("torch_fake", 9, args, time.time(), tmp_path)
    points = json.loads((tmp_path / "points.json").read_text())
    points = [time_to_quality.Point(**point) for point in points]
    trained = [(point.minutes, point.trained) for point in points]
    assert trained == [(0.5, "3 steps of 32 images"), (1.0, "7 steps of 32 images")]
    assert points[0].model == f"torch {speed.installed('torch')}, fake"
    for point, level in zip(points, (3, 7)):
        file = tmp_path / "samples.npz"
        time_to_quality.sample_peer("torch_fake", 9, args, tmp_path, point, file)
        assert (point.parameters, point.sampler, point.evaluations) == (9, FakePeer.sampler, 3)
        with np.load(file) as arrays:
            assert arrays["arr_0"].shape == (110, 28, 28, 1) and (arrays["arr_0"] == level).all()
            labels = np.arange(110) % 10 if conditional else np.full(110, -1)
            assert (arrays["arr_1"] == labels).all()


def test_a_version_is_planned_and_sampled(quick_flags, tmp_path, monkeypatch):
    calls = []

    def train_version(path, flags, stage, epochs, budget, folder):
        calls.append((flags[len(quick_flags) :], stage, epochs, budget))
        snapshots = [(folder / f"snapshot_{k}", 4.2 * k, min(k, 6)) for k in range(11)]
        for snapshot, *_ in snapshots:
            snapshot.mkdir()
        (folder / "output").mkdir()
        speed.make_untrained(path, quick_flags, folder / "snapshot_10")
        return snapshots

    monkeypatch.setattr(speed, "script_flags", lambda args: quick_flags)
    monkeypatch.setattr(speed, "measure_training", lambda *args: STAGES)
    monkeypatch.setattr(time_to_quality, "train_version", train_version)
    args = argparse.Namespace(minutes=10, device="cpu", samples=100)
    *points, point = time_to_quality.plan_and_train_version(V3, SCRIPT_V3, args, tmp_path)
    assert len(points) == 7
    left = {path.name for path in tmp_path.iterdir()}  # for they are large
    assert left == {each.snapshot for each in (*points, point)}

    epochs, share = time_to_quality.plan_training(STAGES, FIELDS, 600)
    images = round(55_000 * share)
    [(plan, names, last, budget)] = calls
    assert plan == [*speed.epoch_flags(epochs), "--train-images", str(images)]
    given = ["--autoencoder-epochs", "--guide-epochs", "--epochs", "--decoder-epochs"]
    assert plan[::2] == [*given, "--train-images"]
    assert (names, budget) == (["diffusion", "decoder"], 600)
    assert last == epochs["epochs"] + epochs["decoder_epochs"]
    assert point.minutes == 0.7
    assert point.trained == f"1 + 1 + 5 + 1 epochs of {images:,} images"
    file = tmp_path / "samples_of_it.npz"
    time_to_quality.sample_version(SCRIPT_V3, args, tmp_path, point, file)
    assert point.evaluations == 18 and point.parameters > 1000
    assert len(quality.read_samples(file)[0]) == 100


def test_a_race_is_scored_drawn_and_kept(scored_data_dir, tmp_path, monkeypatch, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (100, 28, 28, 1), np.uint8)
    images = {"good": fe.load_split(scored_data_dir, train=False)[0][..., None], "bad": noise}
    stops = ["train good", "train bad", "sample good 1", "sample bad 0"]  # once each
    calls, marks = [], {"good": "01", "bad": "0"}

    def call(text):
        calls.append(text)
        if text in stops:
            stops.remove(text)
            raise KeyboardInterrupt

    def train(name, folder):
        assert [path.name for path in folder.iterdir()] == ["race.json"]  # of none that was cut off
        for mark in marks[name]:
            (folder / mark).touch()
        call(f"train {name}")
        return [time_to_quality.Point(name, 1.5, "much", mark) for mark in marks[name]]

    def sample(name, folder, point, file):
        assert (folder / point.snapshot).is_file()
        call(f"sample {name} {point.snapshot}")
        np.savez(file, images[name])
        point.parameters, point.sampler, point.evaluations = 2_000_000, "euler", 12

    def contestant(name, what="as it is"):
        functions = (partial(each, name) for each in (train, sample))
        return time_to_quality.Contestant(name, what, *functions)

    both = [contestant("good"), contestant("bad")]
    monkeypatch.setattr(time_to_quality, "contestants", lambda *args: both)
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- time-to-quality:begin -->\nold\n<!-- time-to-quality:end -->\nb\n")
    where = [f"--data-dir={scored_data_dir}", f"--readme={readme}", "--device=cpu"]
    where += [f"--folder={tmp_path / 'race'}"]
    for _ in range(4):
        assert "old" in readme.read_text()
        with pytest.raises(KeyboardInterrupt):
            time_to_quality.main(["--samples=100", *where])
    assert "| good |" in readme.read_text() and "| bad |" not in readme.read_text()
    time_to_quality.main(["--samples=100", *where])
    assert calls[:4] == [*["train good"] * 2, *["train bad"] * 2]
    assert calls[4:] == ["sample good 0", *["sample good 1"] * 2, *["sample bad 0"] * 2]
    text = readme.read_text()
    assert "old" not in text and text.startswith("a\n") and text.endswith("\nb\n")
    rows = re.findall(r"^\| ([^|]+) \|.*?((?: -?[\d.]+% \|){4}) ([\d.]+) \|", text, re.MULTILINE)
    scores = {name: [float(x) for x in re.findall(r"-?[\d.]+", cells)] for name, cells, _ in rows}
    floors = [f"100 real training images, {how} (floor)" for how in ("balanced", "at random")]
    assert list(scores) == ["good", "bad", *floors]
    assert scores["good"] == pytest.approx([0] * 4, abs=0.1)
    for floor in floors:
        assert all(a < b < c for a, b, c in zip(*(scores[x] for x in ("good", floor, "bad"))))
    assert "| good | 2.00 M | 1.5 | much | euler: 12 |" in text and "![" in text
    rows = json.loads((tmp_path / "time_to_quality.json").read_text())
    floors = [f"reference: {floor}" for floor in floors]
    assert [row["model"] for row in rows] == ["good", "good", "bad", *floors]
    assert all(set(quality.METRICS) <= set(row) for row in rows)
    assert rows[0]["minutes"] == 1.5
    assert rows[2]["worst_percent_of_blur"] == pytest.approx(scores["bad"][3], abs=0.05)
    assert (tmp_path / "time_to_quality.png").read_bytes().startswith(b"\x89PNG")

    time_to_quality.main(["--samples=100", *where])  # nothing is done twice
    assert len(calls) == 9 and readme.read_text() == text
    for samples, what in (("101", "as it is"), ("100", "another release")):
        both[:] = [contestant("new"), contestant("good", what)]
        with pytest.raises(SystemExit) as stop:
            time_to_quality.main([f"--samples={samples}", *where])
        assert stop.value.code == 2 and "is of a race with" in capsys.readouterr().err
        assert len(calls) == 9  # before anyone trains


def test_who_fails_to_train_is_left_out_and_named(tmp_path, monkeypatch):
    def train(name, folder):
        if name == "broken":
            raise RuntimeError("it broke")
        return [time_to_quality.Point(name, 1.5, "much", "mark", scores={"n": 1})]

    race = [time_to_quality.Contestant(x, "", partial(train, x), None) for x in ("broken", "whole")]
    scored = time_to_quality.run_race(race, {}, None, tmp_path)
    assert [point.model for point in next(scored)] == ["whole"]
    with pytest.raises(RuntimeError, match="no training of broken"):
        next(scored)
    (tmp_path / "other").mkdir()  # somebody's own folder is not deleted
    with pytest.raises(ValueError, match="holds no race"):
        time_to_quality.read_points({}, tmp_path / "other")


def test_who_takes_part(quick_flags, tmp_path, monkeypatch):
    fakes = {name: peers.Peer("torch", "fake", FakePeer) for name in ("fake", "absent", "own")}
    fakes["absent"] = fakes["absent"]._replace(package="no such library")
    fakes["own"] = fakes["own"]._replace(own_size=True)
    monkeypatch.setattr(peers, "PEERS", fakes)
    monkeypatch.setattr(speed, "script_flags", lambda args: quick_flags)
    args = argparse.Namespace(peers=True, device="cpu")
    version, fake, own = time_to_quality.contestants(args, {V3: SCRIPT_V3}, tmp_path)
    assert [each.name for each in (version, fake, own)] == [V3.replace("/", "_"), "fake", "own"]
    assert version.train.func is time_to_quality.plan_and_train_version
    assert version.sample.func is time_to_quality.sample_version
    assert fake.train.func is time_to_quality.train_peer_apart
    assert fake.sample.func is time_to_quality.sample_peer
    size = speed.Sampler(SCRIPT_V3, tmp_path / "first", "cpu").parameters
    assert fake.train.args[:2] == fake.sample.args[:2] == ("fake", size)
    assert own.train.args[1] is None and f"{size} parameters" in fake.what


def test_a_peer_that_fails_is_not_passed_over(tmp_path):
    with pytest.raises(RuntimeError, match="nobody ended with status 1"):
        time_to_quality.train_peer_apart("nobody", 9, argparse.Namespace(device="cpu"), tmp_path)


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--samples", "99"], ["--marks", "0"]])
def test_senseless_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        time_to_quality.main(arguments)
    assert stop.value.code == 2 and "needs minutes above 0" in capsys.readouterr().err


def test_the_command_line_from_outside(tmp_path):
    result = run_script(speed.__file__, "nothing", cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
