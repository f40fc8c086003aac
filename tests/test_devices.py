"""What goes wrong on a GPU and can be seen without one; and the losses, wherever they are computed.

The device "meta" computes shapes only, and like a GPU it refuses to be mixed with tensors of the
CPU.
"""

import contextlib
import copy
from functools import partial

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import SCRIPT_V3, load_script
from networks import perturb, rng_of, stages_of, tiny_models
from script_runs import every_script, on_v3

META, CPU = torch.device("meta"), torch.device("cpu")


@pytest.fixture(scope="module")
def module(experiment):
    module = load_script(experiment.path)
    module.arithmetic = lambda device: contextlib.nullcontext()  # torch's knows no "meta"
    return module


@pytest.fixture(scope="module")
def stages(module):
    """Those that are extras too."""
    extras = {"student_epochs": 1} if hasattr(module.Settings, "student_epochs") else {}
    return stages_of(module, **extras)


@every_script
def test_samples_and_trajectories_keep_to_the_models_device(module, monkeypatch):
    monkeypatch.setattr(module, "TIMESTEPS", 8, raising=False)  # as many as ancestral steps
    models = tiny_models(module, sampling_steps=4)
    networks = {name: network.to(META) for name, network in models.networks.items()}
    models = module.Models(networks, models.config, [])
    assert models.device == META
    labels = module.labels_in_turn(10, META)
    for name in ("heun", "stochastic", "ddim", "ancestral"):
        choices = module.Settings.__dataclass_fields__.get("sampler")
        if choices and name in choices.metadata["choices"]:
            models = models.with_settings(sampler=name)
        assert module.generate_samples(models, labels).device == META
    noise, classes = module.noise_of_samples(models, range(10))(), module.class_weights(labels)
    drawn = module.draw_trajectories(models, noise, classes, 4)
    assert {part.device for part in drawn[:3]} == {META}
    images = module.decode_images(models, drawn.noised)
    assert images.device == module.embed_images(models, images[0]).device == META


@every_script
def test_losses_keep_to_the_models_device(module, stages):
    for name, stage in stages.items():
        network, loss = copy.deepcopy(stage.network).to(META), stage.loss
        for key in {"teacher", "models"} & getattr(loss, "keywords", {}).keys():
            models = loss.keywords[key]
            networks = {k: copy.deepcopy(v).to(META) for k, v in models.networks.items()}
            loss = partial(loss, **{key: module.Models(networks, models.config, models.history)})
        if name == "decoder":
            pool = loss.keywords["pool"]().to(META)
            loss = partial(loss, pool=lambda pool=pool: pool)
        batch = [module.to_float(array[:16]).to(META) for array in stage.arrays]
        losses = module.loss_parts(loss(network, *batch, module.Rng(0, META, source=CPU)))
        assert {loss.device for loss in losses.values()} == {META}
        sum(losses.values()).backward()


@every_script
def test_losses_draw_from_the_random_numbers_that_they_are_given(module, stages):
    state = torch.get_rng_state()
    for stage in stages.values():
        batch = [module.to_float(array[:16]) for array in stage.arrays]
        perturb(stage.network)
        losses = [stage.loss(stage.network, *batch, rng_of(module, seed)) for seed in (0, 0, 1)]
        losses = [sum(module.loss_parts(loss).values()) for loss in losses]
        assert losses[0] == losses[1] != losses[2]
        again = [module.validation_losses(stage.loss, stage.network, stage.held_out) for _ in "ab"]
        assert again[0] == again[1]
    assert torch.equal(torch.get_rng_state(), state)


@every_script
def test_what_is_diffused_has_mean_0_and_variance_1(experiment, module, stages):
    """In latent space, after the first stage; what is not for validation comes in its own rows."""
    assert [name for name in stages if name != "student"] == experiment.stages
    for stage in stages.values():
        assert {len(array) for array in stage.arrays} == {60}
        assert {len(array) for array in stage.held_out} == {20}
        for training, validation in zip(stage.arrays, stage.held_out):  # the same images
            torch.testing.assert_close(training[:20], validation, rtol=0.05, atol=0.05)
    if not experiment.latent:
        return
    channels = module.state_shape(module.Settings())[0]
    mean, *std = stages["diffusion"].arrays[0].split(channels, dim=1)
    variance = mean.var(dim=(0, 2, 3)) + sum(part.square().mean(dim=(0, 2, 3)) for part in std)
    torch.testing.assert_close(mean.mean(dim=(0, 2, 3)), torch.zeros(channels), rtol=0, atol=0.01)
    torch.testing.assert_close(variance, torch.ones(channels), rtol=0.02, atol=0)


@on_v3
def test_validation_draws_on_the_cpu_so_that_it_is_the_same_everywhere(module):
    drawn = {CPU: [], META: []}

    def loss(network, images, rng):
        assert rng.how["device"] == rng.how["generator"].device == CPU
        assert rng.randn(2, 3).device == images.device
        assert rng.rand(2).device == rng.randint(0, 9, 2).device == images.device
        drawn[images.device].append(rng.how["generator"].get_state())
        return torch.tensor(float(len(images)))

    images = torch.zeros(700, 1, 28, 28, dtype=torch.uint8)  # in batches of 500 and 200
    for device in drawn:
        parts = module.validation_losses(loss, None, (images.to(device),))
        assert parts["loss"] == pytest.approx((500 * 500 + 200 * 200) / 700)
    assert len(drawn[CPU]) == 2
    assert all(map(torch.equal, drawn[CPU], drawn[META]))
    assert not torch.equal(*drawn[CPU])


@pytest.mark.parametrize(("name", "chosen"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_gpu_with_a_number_is_the_one_that_is_meant(name, chosen, monkeypatch):
    script, current = load_script(SCRIPT_V3), []
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    assert str(script.pick_device(name)) == name
    assert current == chosen


@pytest.fixture
def one_of_two_processes(monkeypatch):
    """A function: v3's script in one of two processes on a machine with so many GPUs."""

    def one_of_two_processes(number, gpus):
        script = load_script(SCRIPT_V3)
        monkeypatch.setattr(script, "world", lambda: 2)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", str(number))
        return script

    return one_of_two_processes


@pytest.mark.parametrize(("name", "gpus"), [("cuda", 1), ("cuda:0", 2), ("mps", 0), ("auto", 1)])
def test_processes_that_lack_a_gpu_each_are_all_told_so(one_of_two_processes, name, gpus):
    for number in range(2):
        script = one_of_two_processes(number, gpus)
        with pytest.raises(script.ExperimentError, match="several processes need a CUDA GPU each"):
            script.pick_device(name)


def test_each_process_has_a_gpu_of_its_own_or_all_have_the_cpu(one_of_two_processes, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert one_of_two_processes(1, gpus=0).pick_device("auto").type == "cpu"  # gloo has no MPS
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("auto", "cuda"):
        assert str(one_of_two_processes(1, gpus=2).pick_device(name)) == "cuda:1"


class Recorder(TorchDispatchMode):
    """Notes the operations that are carried out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.names.append(operation.overloadpacket._qualified_op_name)
        return operation(*arguments, **(options or {}))


# What makes the host wait for a device, and what sends it numbers made on the host.
WAITING = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
SENDING = {"aten::lift_fresh", "aten::lift"}


@every_script
def test_a_training_step_neither_waits_for_the_device_nor_sends_it_anything(module, stages):
    for name, planned in stages.items():
        average = AveragedModel(planned.network).eval()
        rates = {"adamw": 1e-3, "muon": 1e-3}
        plan = {"epochs": 1, "batch_size": 4, "rates": rates, "ema_decay": 0.9}
        stage = module.Stage(name, planned.network, average, planned.loss, 40, **plan)
        batch = [array[:4] for array in planned.arrays]
        module.train_step(stage, batch, module.Rng(0, CPU))  # makes the optimizer's state
        stage.step += 1
        rng = module.Rng(1, CPU)
        with Recorder() as recorder:
            module.train_step(stage, batch, rng)
        assert not {*recorder.names} & (WAITING | SENDING), name
        before = [weight.clone() for weight in stage.averaged_weights]
        stage.update_average()
        assert any(not torch.equal(a, b) for a, b in zip(before, stage.averaged_weights))


@every_script
def test_the_steps_of_a_sampler_send_the_device_nothing(module):
    models = tiny_models(module, sampling_steps=4)
    labels = module.labels_in_turn(4, CPU)
    noise, classes = module.noise_of_samples(models, range(4))(), module.class_weights(labels)
    counts = []
    for steps in (4, 8):
        with Recorder() as recorder:
            module.last_state(models, noise, classes, steps)
        counts.append(sum(name in WAITING | SENDING for name in recorder.names))
    assert counts[0] == counts[1]  # once a call, if at all
