"""v3's command line: it answers mistakes with one line, and works wherever it is run."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import pytest

from script_runs import flags, on_v3, refusal, run, steps

pytestmark = on_v3


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--epoch=3"], ["--epoch"]),  # no guessing at abbreviations
        (["--epochs"], ["--epochs"]),
        (["--epochs=two"], ["--epochs", "two", "int"]),
        (["--learning-rate=nan"], ["--learning-rate", "nan"]),
        (["--sampler=rk4"], ["euler", "heun"]),
        (["--class=Sandal"], ["--class", "--sample-only"]),
        (["--fresh", "--sample-only"], ["--fresh and --sample-only do not go together"]),
        (["--pretrained"], ["--pretrained goes with --sample-only"]),
        (["--pretrained", "--sample-only", "--quick"], ["--pretrained and --quick do not"]),
        (["--pretrained", "--sample-only", "--run-dir=x"], ["--pretrained and --run-dir do not"]),
        (["--guidance-scale=21"], ["--guidance-scale", "0 to 20"]),
        (["--width=12"], ["--width", "multiple of 8"]),
        (["--num-samples=16"], ["--sample-only"]),
        (["--sample-only", "--num-samples=0"], ["--num-samples", "1 to 10,000"]),
        (["--export-samples=-1"], ["--export-samples", "0 to 1,000,000"]),
        (["--quick", "stray"], ["stray"]),
    ],
)
def test_wrong_flag_is_answered_with_what_is_right(module, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    line = refusal(module, [*arguments, f"--output-dir={tmp_path / 'new'}"])
    assert [part for part in parts if part not in line] == []
    assert not (tmp_path / "new").exists()


def test_figures_of_another_run_need_a_folder_of_their_own(module):
    assert "--run-dir goes with an --output-dir" in refusal(
        module, ["--sample-only", "--run-dir=x"]
    )


def test_sample_only_without_a_checkpoint_says_how_to_train_one(module, tmp_path):
    line = refusal(module, ["--sample-only", f"--output-dir={tmp_path}"])
    assert "without --sample-only to train" in line


@pytest.mark.parametrize("mistake", ["--device=warp", "--data-dir=/dev/null", "--no-such-flag"])
def test_mistake_beside_fresh_leaves_the_old_run_in_its_place(
    module, no_network, tiny_data_dir, output, mistake
):
    refusal(module, [*flags(module, output, tiny_data_dir), "--fresh", mistake])
    assert (output / "checkpoints" / "last.pt").exists()


def test_checkpoint_of_another_configuration_lists_the_fields_and_fresh_starts_over(
    module, tiny_data_dir, output
):
    before = (output / "checkpoints" / "last.pt").read_bytes()
    given = flags(module, output, tiny_data_dir, seed=3, width=16, sampling_steps=4, epochs=1)
    line = refusal(module, given)
    for part in ("seed is 0 there and 3 here", "width is 8 there", "--fresh", "--output-dir"):
        assert part in line
    assert "sampling_steps" not in line  # which may change
    assert (output / "checkpoints" / "last.pt").read_bytes() == before
    assert run(module, [*given, "--fresh"]) == 0
    assert steps(output)["diffusion"] == 3
    assert before in [path.read_bytes() for path in output.rglob("last.pt")]


# Help and defaults


def test_help_tells_values_and_limits_of_every_setting(module, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(module, ["--help"]) == 0
    text = capsys.readouterr().out
    assert " ".join(module.__doc__.split()) in " ".join(text.split())
    parts = {}
    for part in re.split(r"\n  (?=-)", text)[1:]:
        parts[re.match(r"(?:-h, )?--([a-z0-9-]+)", part)[1]] = " ".join(part.split())
    for field in dataclasses.fields(module.Settings):
        told, rules = parts.pop(module.flag(field.name)[2:]), field.metadata
        expected = [rules["help"], f"default: {field.default!r}", *map(str, rules["choices"])]
        expected += [f"on a GPU {rules['gpu']!r}"] if rules["gpu"] is not None else []
        expected += [f"with --quick {rules['quick']!r}"] if rules["quick"] is not None else []
        if rules["low"] is not None:
            expected.append(f"{rules['low']:,.10g} to {rules['high']:,.10g}")
        assert [part for part in expected if part not in told] == []
    assert parts.keys() == {"help"}


# Samples


def test_number_of_samples_is_the_number_drawn(module, output, monkeypatch):
    asked, real = [], module.generate_samples
    note = lambda models, labels: asked.append(labels) or real(models, labels)  # noqa: E731
    monkeypatch.setattr(module, "generate_samples", note)
    arguments = [f"--output-dir={output}", "--device=cpu", "--sample-only"]
    assert run(module, [*arguments, "--class=Ankle boot", "--num-samples=5"]) == 0
    assert run(module, [*arguments, "--num-samples=12"]) == 0
    assert run(module, [*arguments, "--class=Sandal"]) == 0
    assert [labels.tolist() for labels in asked] == [[9] * 5, [*range(10), 0, 1], [5] * 16]


def test_many_samples_make_a_square(module, output, monkeypatch):
    shapes = []
    monkeypatch.setattr(module, "save_grid", lambda path, images, *a, **k: shapes.append(images))
    arguments = [f"--output-dir={output}", "--device=cpu", "--sample-only"]
    for count in (3, 20, 130):
        assert run(module, [*arguments, f"--num-samples={count}"]) == 0
    assert [tuple(images.shape[:2]) for images in shapes] == [(1, 3), (3, 8), (12, 11)]


def test_no_samples_asked_for_are_all_figures(module, output, tiny_data_dir, monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "save_all_figures", lambda *args: drawn.append(args))
    arguments = [f"--output-dir={output}", f"--data-dir={tiny_data_dir}", "--device=cpu"]
    assert run(module, [*arguments, "--sample-only", "--export-samples=0"]) == 0
    assert len(drawn) == 1


def test_sampling_flags_reach_the_sampler(module, output, monkeypatch):
    used, real = [], module.sample
    monkeypatch.setattr(module, "sample", lambda *args: used.append(args[0].config) or real(*args))
    asked = ["--export-samples=10", "--sampler=euler", "--sampling-steps=2", "--guidance-scale=20"]
    assert run(module, [f"--output-dir={output}", "--device=cpu", "--sample-only", *asked]) == 0
    [config] = used
    assert (config.sampler, config.sampling_steps, config.guidance_scale) == ("euler", 2, 20)


# The script as its users run it


def test_import_does_nothing(experiment, tmp_path):
    path = shutil.copy(experiment.path, tmp_path / "experiment.py")
    code = "import sys; sys.dont_write_bytecode = True; import experiment as e; print(e.VERSION)"
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert (done.returncode, done.stdout, done.stderr) == (0, "LatentDiffusionModel/v3\n", "")
    assert os.listdir(tmp_path) == [os.path.basename(path)]
