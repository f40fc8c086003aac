"""v3 resumes: a run that was interrupted, however, ends with the same bits as one that was not.

Interruptions at steps of all kinds are tried with every script, in test_every_script.py.
"""

import csv
import shutil
import signal

import numpy as np
import pytest
import torch

from conftest import SCRIPT_V3, load_script
from script_runs import STEPS, differences, flags, interrupt_at_step, on_v3, read, run, steps

pytestmark = on_v3


def interrupted_run(module, arguments, step):
    """Run, with Ctrl-C at a training step counted from 1; returns the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at_step(patch, module, step)
        return run(module, arguments)


def test_checkpoints_within_an_epoch_do_not_change_the_bits(
    module, undisturbed, tiny_data_dir, tmp_path
):
    assert run(module, flags(module, tmp_path, tiny_data_dir, checkpoint_minutes=0)) == 0
    assert differences(read(undisturbed), read(tmp_path)) == []
    assert steps(tmp_path, "previous.pt") == STEPS | {"decoder": 5}  # of 6


SEEDED = [(stage, use) for stage in STEPS for use in ("order", "step")] + [("pool",)]


@pytest.mark.parametrize("parts", [("initial weights",), *SEEDED], ids=" ".join)
def test_another_seed_changes_the_bits(
    module, undisturbed, monkeypatch, tiny_data_dir, tmp_path, parts
):
    """Each use of the seed for itself. All depends on the autoencoder, and the decoder on guide and
    diffusion too."""
    real = module.derived_seed

    def derived_seed(seed, *rest):
        return real(seed if rest[: len(parts)] == parts else 0, *rest)

    monkeypatch.setattr(module, "derived_seed", derived_seed)
    assert run(module, flags(module, tmp_path, tiny_data_dir, seed=1)) == 0
    a, b = read(undisturbed)["stages"], read(tmp_path)["stages"]
    changed = [stage for stage in a if differences(a[stage]["model"], b[stage]["model"])]
    alone = {"guide": ["guide", "decoder"], "diffusion": ["diffusion", "decoder"]}
    alone |= {"decoder": ["decoder"], "pool": ["decoder"]}
    assert changed == alone.get(parts[0], list(STEPS))


@pytest.mark.parametrize("step", [2, 9, 15])
def test_signal_late_in_a_step_loses_nothing(
    module, undisturbed, monkeypatch, capsys, tiny_data_dir, tmp_path, step
):
    """The signal comes when the loop has already decided whether this step is saved."""
    calls = iter(range(1000))

    class InterruptedBar(module.tqdm):
        def update(self, *args):
            if next(calls) == step:
                signal.raise_signal(signal.SIGTERM)
            return super().update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "tqdm", InterruptedBar)
        assert run(module, flags(module, tmp_path, tiny_data_dir)) == 143
    stage, done = [(name, done) for name, done in steps(tmp_path).items() if done][-1]
    assert f"{stage}, step {done} of" in capsys.readouterr().err
    assert run(module, flags(module, tmp_path, tiny_data_dir)) == 0
    assert differences(read(undisturbed), read(tmp_path)) == []


@pytest.mark.parametrize(
    ("saver", "count", "done"),
    [("draw", 2, [6]), ("draw", 7, [6, 6, 9]), ("save_reconstructions", 2, [6, 6, 9, 6])],
)
def test_signal_in_the_last_picture_of_a_stage_is_heeded(
    module, monkeypatch, tiny_data_dir, tmp_path, saver, count, done
):
    """The decoder's epochs have a picture of their own; `draw` is called after those of the
    other stages."""
    where, calls = module.Run if saver == "draw" else module, []

    def interrupted_saver(*args):
        calls.append(args)
        if len(calls) == count:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(where, saver, interrupted_saver)
    assert run(module, flags(module, tmp_path, tiny_data_dir)) == 130
    assert list(steps(tmp_path).values()) == done


def test_figures_and_samples_do_not_touch_the_training(
    module, undisturbed, monkeypatch, tiny_data_dir, tmp_path
):
    """The real figures in the midst of training, all but the drawing itself, and a greedy user of
    random numbers."""
    fresh = load_script(SCRIPT_V3)
    for name in ("save_figure", "save_animation", "save_latent_space", "draw_grid", "path_figure"):
        monkeypatch.setattr(fresh, name, lambda *args: None)
    drawn, real = [], fresh.save_all_figures

    def greedy_figures(*args):
        drawn.append(args[0].epoch)
        torch.manual_seed(5)
        np.random.seed(5)
        torch.rand(1000)
        real(*args)

    monkeypatch.setattr(fresh, "save_all_figures", greedy_figures)
    assert run(fresh, flags(module, tmp_path, tiny_data_dir, figures_every=2)) == 0
    assert drawn == [2, 3]
    assert differences(read(undisturbed), read(tmp_path)) == []


def test_figures_are_not_forgotten_where_epochs_are_passed_over(module, monkeypatch, tmp_path):
    drawn, nothing = [], module.Data(*[torch.zeros(1)] * 4)
    config = module.Settings(epochs=400, figures_every=50)
    monkeypatch.setattr(module, "save_all_figures", lambda *args: drawn.append("all"))
    monkeypatch.setattr(module, "save_samples", lambda *args: drawn.append("samples"))
    for epochs in ((30, 70, 90, 149), (150, 400)):  # a run, and the same resumed
        run_of_400 = module.Run(config, nothing, tmp_path, None)
        run_of_400.stages["diffusion"] = None
        for epoch in epochs:
            run_of_400.draw(epoch)
        (tmp_path / "samples").mkdir(exist_ok=True)
        for name in (epoch, f"{epoch + 50} copy"):
            (tmp_path / "samples" / f"samples_epoch_{name}.png").touch()
    assert drawn == ["samples", "all", "samples", "all", "all"]


def test_finished_run_trains_on_with_more_epochs(module, output, tiny_data_dir, tmp_path):
    """The decoder, which learns from samples, begins anew; so does a student."""
    once = shutil.copytree(output, tmp_path / "interrupted")
    before = read(output)
    arguments = [flags(module, folder, tiny_data_dir, epochs=5) for folder in (output, once)]
    assert run(module, arguments[0]) == 0
    after = read(output)
    assert steps(output) == STEPS | {"diffusion": 15}
    for stage in ("autoencoder", "guide"):
        assert differences(before["stages"][stage], after["stages"][stage]) == []
    assert differences(before["history"][:7], after["history"][:7]) == []
    assert [row["epoch"] for row in after["history"]] == [1, 2, 1, 2, 1, 2, 3, 4, 5, 1, 2]
    assert after["history"][7]["learning_rate"] > 0  # planned anew: it had fallen to zero
    for stage in ("diffusion", "decoder"):
        first, last = (each["stages"][stage]["model"] for each in (before, after))
        assert differences(first, last)
    assert interrupted_run(module, arguments[1], 2) == 130  # in the diffusion
    assert "decoder" not in steps(once)
    assert interrupted_run(module, arguments[1], 4 + 3) == 130  # in the decoder
    assert run(module, arguments[1]) == 0
    assert differences(after, read(once)) == []
    student = [flags(module, once, tiny_data_dir, student_epochs=1, epochs=n) for n in (5, 6)]
    for done, command in zip((15, 18), student):
        assert run(module, command) == 0
        assert steps(once) == STEPS | {"diffusion": done, "student": 3}
    rows = [row["stage"] for row in read(once)["history"]]
    assert (rows.count("decoder"), rows.count("student")) == (2, 1)


def test_a_run_of_the_former_order_goes_on(module, output, tiny_data_dir, tmp_path):
    """There the decoder was trained before the flow: it is trained anew where the flow goes on, and
    is good for samples where it does not."""
    path = output / "checkpoints" / "last.pt"
    content = read(output)
    content["stages"] = {name: content["stages"][name] for name in sorted(content["stages"])}
    assert [*content["stages"]] == ["autoencoder", "decoder", "diffusion", "guide"]
    torch.save(content, path)
    whole = module.load_trained(output, "cpu")
    assert run(module, flags(module, output, tiny_data_dir)) == 0
    assert differences(content["stages"], read(output)["stages"]) == []
    both = whole, module.load_trained(output, "cpu")
    assert torch.equal(*(module.generate_samples(each, torch.arange(3)) for each in both))
    del content["stages"]["diffusion"]  # as if cut off before
    content["history"] = [row for row in content["history"] if row["stage"] != "diffusion"]
    torch.save(content, path)
    assert run(module, flags(module, output, tiny_data_dir)) == 0
    assert steps(output) == STEPS


@pytest.mark.parametrize(("stage", "step"), [("autoencoder", 4), ("guide", 10)])
def test_epochs_of_a_stage_change_before_the_next_one_only(
    module, output, capsys, tiny_data_dir, tmp_path, stage, step
):
    before, more = (output / "checkpoints" / "last.pt").read_bytes(), {f"{stage}_epochs": 3}
    assert run(module, flags(module, output, tiny_data_dir, **more)) == 2
    assert f"epochs of {stage}" in capsys.readouterr().err
    assert (output / "checkpoints" / "last.pt").read_bytes() == before
    assert interrupted_run(module, flags(module, tmp_path / "new", tiny_data_dir), step) == 130
    assert run(module, flags(module, tmp_path / "new", tiny_data_dir, **more)) == 0
    assert steps(tmp_path / "new") == STEPS | {stage: 9}


def test_flags_not_given_come_from_the_checkpoint(module, tiny_data_dir, tmp_path, capsys):
    given = {"seed": 7, "guidance_scale": 2.5, "epochs": 2, "width": 24}
    given |= {"autoencoder_epochs": 1, "decoder_epochs": 1, "guide_epochs": 1}
    arguments = flags(module, tmp_path, tiny_data_dir, **given)
    assert interrupted_run(module, arguments, 5) == 130
    config = read(tmp_path)["config"]
    assert (config["seed"], config["guidance_scale"]) == (7, 2.5)
    # Nor do the values of --quick override what the run began with.
    arguments = [f"--output-dir={tmp_path}", f"--data-dir={tiny_data_dir}", "--device=cpu"]
    capsys.readouterr()
    assert run(module, ["--quick", *arguments, "--sampler=euler"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "unlike the default" in line]
    assert "--seed 7" in line and "--width 24" in line and "--sampler" not in line
    assert read(tmp_path)["config"] == config | {"sampler": "euler"}  # which may change
    assert steps(tmp_path) == {"autoencoder": 3, "guide": 3, "diffusion": 6, "decoder": 3}


def test_metrics_are_the_history(undisturbed):
    with open(undisturbed / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    history = read(undisturbed)["history"]
    stages = [*["autoencoder"] * 2, *["guide"] * 2, *["diffusion"] * 3, *["decoder"] * 2]
    assert [row["stage"] for row in rows] == stages
    parts = ("train_parts", "validation_parts")
    assert all(rows[0].keys() | {*parts} == row.keys() for row in history)
    assert rows == [{name: str(row[name]) for name in rows[0]} for row in history]
    for row in history:
        for name, of in zip(("train_loss", "validation_loss"), parts):
            assert sum(row[of].values()) == row[name]
    assert [len(row["train_parts"]) for row in history] == [*[1] * 7, 3, 3]
    assert all(row["train_parts"].keys() == row["validation_parts"].keys() for row in history)
