"""v3's student does in 1, 2 or 4 steps what its teacher does in many."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from networks import models_of, perturb, rng_of, stages_of, tiny_models, without_gradient
from script_runs import STEPS, differences, flags, on_v3, read, refusal, run, steps

NEEDS = "--student-steps needs a student: --student-epochs 1 trains it"


def straight(scale):
    """The flow along straight lines from noise z at t=1 to `scale` z at t=0."""

    def velocity(x, t, classes):
        t = t.view(-1, 1, 1, 1)
        return (1 - scale) * x / ((1 - t) * scale + t)

    return velocity


def late(x, t, classes):
    """The flow to half of the noise, once it has slept through the first step."""
    return (t < 1).view(-1, 1, 1, 1) * straight(0.5)(x, t, classes)


class LargestPixel(nn.Module):
    def forward(self, images):
        return images.flatten(1).amax(1)


@pytest.fixture
def parts_of(script_v3, monkeypatch):
    """The parts of the loss of a student's velocity. States stand for images as they are, and
    the discriminator thinks of each image its largest pixel, which in a real one is 0."""
    monkeypatch.setattr(script_v3, "decode", lambda models, states: states)

    def parts_of(student, teacher, labels):
        networks, real = {"flow": student, "discriminator": LargestPixel()}, torch.zeros(2, 8, 7, 7)
        how = labels, real, rng_of(script_v3)
        return script_v3.distillation_loss(networks, *how, teacher=teacher)

    return parts_of


@pytest.mark.parametrize(
    ("student", "guesses"),
    [
        (straight(0.5), [[0.5], [0.5] * 2, [0.5] * 4]),
        (straight(0.8), [[0.8], [0.8] * 2, [0.8] * 4]),
        (late, [[1], [1, 2 / 3], [1, 4 / 7, 4 / 7, 4 / 7]]),
    ],
    ids=["the teacher's", "another scale", "late"],
)
def test_loss_is_the_error_of_the_guesses_on_the_students_own_way(
    script_v3, parts_of, student, guesses
):
    """Its guesses in 1, 2 and 4 steps, in units of the noise. They should be 1/2."""
    teacher = models_of(script_v3, straight(0.5), adversarial_weight=0.25, **script_v3.TEACHER)
    parts = parts_of(student, teacher, torch.arange(4000) % 10)
    squares = np.mean([np.mean((np.array(way) - 0.5) ** 2) for way in guesses])
    close = {"rel": 0.01, "abs": 1e-6}
    assert parts["error of the guesses"].item() == pytest.approx(squares / 2, **close)
    last = np.array([way[-1] for way in guesses])
    off = np.abs(last - 0.5).mean() * math.sqrt(2 / math.pi)  # the mean of |z| is the root's
    assert parts["absolute error"].item() == pytest.approx(off, **close)
    opinion = 4 * -parts["unrealism"].item()
    assert opinion == pytest.approx(last.mean() * 2.93, rel=0.02)  # largest of 392 normal numbers
    hinge = parts["hinge loss of the discriminator"].item()
    assert hinge == pytest.approx(2 + opinion, rel=1e-3)  # of real images 1


def test_student_and_teacher_see_the_same_classes_or_none(script_v3, parts_of):
    seen = {"teacher": [], "student": []}

    def watched(who):
        def velocity(x, t, classes):
            seen[who].append(classes)
            return x * classes.argmax(1).view(-1, 1, 1, 1) / 20

        return velocity

    teacher = models_of(script_v3, watched("teacher"), guidance_scale=1.0, **script_v3.TEACHER)
    labels = torch.arange(20_000) % 10
    parts_of(watched("student"), teacher, labels)
    [classes, *others] = seen["teacher"] + seen["student"]
    assert len(seen["student"]) == 1 + 2 + 4 and len(seen["teacher"]) == 16
    assert all(torch.equal(classes, other) for other in others)
    found = classes.argmax(1)
    dropped = found == script_v3.NULL_CLASS
    assert torch.equal(found[~dropped], labels[~dropped])
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_it_starts_as_the_flow_and_learns_alone(script_v3):
    stages = stages_of(script_v3, student_epochs=1)
    stage, teacher = stages["student"], stages["student"].loss.keywords["teacher"]
    assert (teacher.config.sampler, teacher.config.sampling_steps) == ("heun", 8)
    beginnings = [(stage.network["flow"], teacher.diffusion)]
    beginnings += [(stage.network["discriminator"], teacher.decoder["discriminator"])]
    for player, beginning in beginnings:
        assert differences(player.state_dict(), beginning.state_dict()) == []
    labels, images = (script_v3.to_float(array[:8]) for array in stage.arrays)
    perturb(stage.network)
    sum(stage.loss(stage.network, labels, images, rng_of(script_v3)).values()).backward()
    assert without_gradient(stage.network["flow"]) == []
    idle = [
        p
        for name in ("autoencoder", "diffusion", "guide", "decoder")
        for p in vars(teacher)[name].parameters()
    ]
    assert all(weights.grad is None for weights in idle)
    assert torch.equal(stage.arrays[1], stages["decoder"].arrays[1])  # the training images
    assert torch.equal(stage.arrays[0], stages["diffusion"].arrays[1])


@on_v3
def test_student_is_trained_after_the_flow_resumes_and_samples_in_few_steps(
    module, undisturbed, monkeypatch, tiny_data_dir, tmp_path
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        assert run(module, flags(module, folder, tiny_data_dir)) == 0
    arguments = {"student_steps": 2, "export_samples": 4}
    few = [*flags(module, whole, tiny_data_dir, **arguments), "--sample-only"]
    assert NEEDS in refusal(module, few)
    assert NEEDS in refusal(module, [*few, "--student-epochs=2"])
    more = {"student_epochs": 2}
    early = flags(module, whole, tiny_data_dir, student_steps=2, **more)
    assert "--student-steps goes with --sample-only" in refusal(module, early)
    assert run(module, flags(module, whole, tiny_data_dir, **more)) == 0
    assert steps(whole) == STEPS | {"student": 6}
    before, after = read(undisturbed)["stages"], read(whole)["stages"]
    assert all(differences(before[stage], after[stage]) == [] for stage in before)

    real, count = module.train_step, iter(range(100))

    def train_step(stage, batch, rng):
        if next(count) == 4:
            raise KeyboardInterrupt
        return real(stage, batch, rng)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_step", train_step)
        saving = {"checkpoint_minutes": 0}
        assert run(module, flags(module, stopped, tiny_data_dir, **more, **saving)) == 130
    assert steps(stopped) == STEPS | {"student": 4}
    assert run(module, flags(module, stopped, tiny_data_dir)) == 0
    assert differences(read(whole)["stages"], read(stopped)["stages"]) == []

    assert run(module, few) == 0
    assert "3 is not one of 0, 1, 2, 4" in refusal(module, [*few, "--student-steps=3"])
    assert NEEDS in refusal(module, [*few, "--student-epochs=0"])
    models, asked = module.load_trained(whole, "cpu", student_steps=2), []
    asking = {"student": models.student["flow"], "flow": models.diffusion, "guide": models.guide}
    for name, network in asking.items():
        network.register_forward_hook(lambda *_, name=name: asked.append(name))
    images = module.generate_samples(models, torch.arange(4))
    assert asked == ["student"] * 2
    stored = np.load(whole / "samples.npz")["arr_0"]
    assert np.array_equal(stored, images.permute(0, 2, 3, 1).numpy())
    flow = models.with_settings(student_steps=0)
    assert not torch.equal(module.generate_samples(flow, torch.arange(4)), images)


@on_v3
def test_a_run_that_has_not_come_to_its_student_can_be_sampled(
    module, monkeypatch, tiny_data_dir, tmp_path
):
    def train_student(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_student", train_student)
        assert run(module, flags(module, tmp_path, tiny_data_dir, student_epochs=1)) == 130
    assert run(module, [*flags(module, tmp_path, tiny_data_dir, class_=None), "--sample-only"]) == 0


def test_figures_show_the_student_beside_its_teacher(script_v3, monkeypatch, tmp_path):
    models, drawn, shown = tiny_models(script_v3, student_epochs=1), [], []
    real = script_v3.generate_samples
    monkeypatch.setattr(
        script_v3, "generate_samples", lambda m, *how: drawn.append(m.config) or real(m, *how)
    )
    monkeypatch.setattr(script_v3, "save_grid", lambda *args: shown.append(args))
    others = ["reconstructions", "latent_space", "noise_interpolation", "class_interpolation"]
    for name in [*others, "nearest_neighbours"]:
        monkeypatch.setattr(script_v3, f"save_{name}", lambda *args: None)
    script_v3.save_own_figures(models, None, tmp_path)
    assert [args[0].parent.name for args in shown] == ["guidance"]  # not trained yet
    models.history.append({"stage": "student", "epoch": 1})
    drawn.clear()
    script_v3.save_own_figures(models.with_settings(student_steps=2), None, tmp_path)
    guidance, found = len(shown[1][3]), [(c.sampling_steps, c.student_steps) for c in drawn]
    assert found == [(6, 0)] * guidance + [(8, 0), (6, 1), (6, 2), (6, 4)]
    *_, (path, images, rows, columns, _) = shown
    assert path == tmp_path / "few_steps" / "few_steps_epoch_0.png"
    assert images.shape[:2] == (10, 4) and len(rows) == 10
    assert columns == ["the flow", "1 step", "2 steps", "4 steps"]


def test_trajectories_beside_a_student_are_those_of_the_flow(script_v3):
    models = tiny_models(script_v3, student_epochs=1)
    noise, classes = torch.randn(3, 8, 7, 7), script_v3.class_weights(torch.arange(3))
    states, guesses = script_v3.trajectory(models, noise, classes, 5)
    models.history.append({"stage": "student", "epoch": 1})
    models = models.with_settings(student_steps=2)
    again = script_v3.trajectory(models, noise, classes, 5)
    assert torch.equal(states, again[0]) and torch.equal(guesses, again[1])
    assert len(script_v3.trajectory(models, noise, classes)[0]) == 3
