"""What goes wrong on a GPU and can be seen without one.

The device "meta" computes shapes only, and like a GPU it refuses to be mixed with tensors of the CPU.
"""

import contextlib
import copy

import pytest
import torch

from conftest import SCRIPT_V3, load_script
from script_runs import every_script, flags, load_without_figures, read, run, tiny_settings

META = torch.device("meta")


@pytest.fixture(scope="module")
def module(experiment):
    module = load_without_figures(experiment.path)
    module.autocast = lambda device: contextlib.nullcontext()  # torch's knows no "meta"
    module.fresh_noise = lambda noise: torch.Generator()  # the real one looks at the numbers
    return module


def test_meta_device_refuses_what_a_gpu_refuses():
    """The ruler of these tests."""
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, 1, 1, 1) * torch.ones(2, 1, 7, 7, device=META)


@every_script
def test_samples_and_trajectories_keep_to_the_models_device(experiment, module):
    config, cpu = module.Config(**tiny_settings(module.Config)), torch.device("cpu")
    stages = module.build_stages(module.with_recipe(config, cpu), 100, cpu)
    for stage in stages:
        stage.ema.to(META)
    models = module.TrainedModels.of_stages(stages, config, [])
    asked = torch.arange(10, device=META) if experiment.conditional else 10
    assert models.device == META
    assert module.generate_samples(models, asked).device == META
    trajectories = module.draw_trajectories(models, asked, 4)
    assert trajectories.states.device == trajectories.noised.device == META
    assert models.decode(trajectories.noised).device == META


@every_script
def test_losses_keep_to_the_models_device(module, monkeypatch, tiny_data_dir, tmp_path):
    """The batches of a real run, each taken to the other device with a copy of the model."""
    devices, real = {}, module.train_step

    def train_step(stage, batch):
        loss = stage.loss_fn(copy.deepcopy(stage.model).to(META), *(part.to(META) for part in batch))
        devices.setdefault(stage.name, set()).add(loss.device)
        return real(stage, batch)

    monkeypatch.setattr(module, "train_step", train_step)
    assert run(module, flags(module, tmp_path, tiny_data_dir)) == 0
    assert devices == {row["stage"]: {META} for row in read(tmp_path)["history"]}


@pytest.mark.parametrize(("name", "chosen"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_gpu_with_a_number_is_the_one_that_is_seeded(name, chosen, monkeypatch):
    script, current = load_script(SCRIPT_V3), []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    assert str(script.pick_device(name)) == name
    assert current == chosen
