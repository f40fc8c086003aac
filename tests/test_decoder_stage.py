"""Stage 2 of v3: the decoder trains on against a discriminator of patches."""

import copy
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import draw_shapes
from networks import gradients, perturb, rng_of, stages_of, without_gradient
from script_runs import differences, flags, on_v3, read, run, steps

CPU = torch.device("cpu")
WEIGHTS = [0.0, 0.05, 50.0]

# --- the losses -----------------------------------------------------------------------------------


@pytest.fixture
def players(script_v3):
    """Decoder and discriminator, small, their weights moved off their initial values."""
    widths = {"autoencoder_width": 16, "discriminator_width": 16}
    config = script_v3.Settings(**script_v3.default_settings(CPU, quick=True) | widths)
    return perturb(script_v3.initial_networks(config, CPU)["decoder"])


@pytest.fixture
def batch(script_v3, players):
    """Raw latents (20, 8, 7, 7), and images (20, 1, 28, 28) in [-1, 1] that are not theirs."""
    images = draw_shapes(np.arange(20) % 10, np.random.default_rng(0))
    return torch.randn(20, 8, 7, 7), script_v3.to_float(torch.from_numpy(images)[:, None])


def test_losses_are_those_of_a_calculation_by_hand(script_v3):
    """Two images of one pixel each, and D(x) = 2 x. What is wanted need not be a real image."""
    discriminator = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(discriminator.weight, 2.0)
    images = torch.tensor([0.75, 0.25]).view(2, 1, 1, 1)  # logits 1.5 and 0.5
    made = torch.tensor([-0.75, 0.5]).view(2, 1, 1, 1)  # logits -1.5 and 1
    wanted = torch.tensor([0.75, 0.0]).view(2, 1, 1, 1)
    parts = script_v3.adversarial_loss(discriminator, made, wanted, images, weight=8.0)
    assert {name: part.item() for name, part in parts.items()} == {
        "absolute error": (1.5 + 0.5) / 2,
        "unrealism": -8 * (-1.5 + 1) / 2,
        "hinge loss of the discriminator": (0 + 0.5) / 2 + (0 + 2) / 2,
    }


@pytest.mark.parametrize("weight", WEIGHTS)
def test_discriminator_learns_from_its_own_hinge_loss_alone(script_v3, players, batch, weight):
    """Whatever the weight of its opinion for the decoder."""
    latents, images = batch
    discriminator = players["discriminator"]
    with torch.no_grad():
        made = players["decoder"](latents)
    hinge = F.relu(1 - discriminator(images)).mean() + F.relu(1 + discriminator(made)).mean()
    expected = gradients(discriminator, hinge)
    assert expected.norm() > 0.1
    how = discriminator, players["decoder"](latents), images, images
    loss = sum(script_v3.adversarial_loss(*how, weight=weight).values())
    found = gradients(discriminator, loss)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    loss.backward()
    assert without_gradient(players) == []


@pytest.mark.parametrize("weight", WEIGHTS)
def test_decoder_learns_from_its_error_and_from_what_the_discriminator_thinks(
    script_v3, players, batch, weight
):
    """But nothing from what the discriminator learns from; with weight 0 from its error alone."""
    latents, images = batch
    decoder, discriminator = players["decoder"], players["discriminator"]
    made = decoder(latents)
    error = gradients(decoder, (images - made).abs().mean())
    opinion = gradients(decoder, -discriminator(made).mean())
    assert error.norm() > 0.1 and opinion.norm() > 0.1
    parts = script_v3.adversarial_loss(discriminator, made, images, images, weight=weight)
    found = gradients(decoder, sum(parts.values()))
    torch.testing.assert_close(found, error + weight * opinion, atol=1e-5, rtol=1e-3)
    assert not gradients(decoder, parts["hinge loss of the discriminator"]).any()


def test_logits_are_of_patches_around_their_places(script_v3):
    """Convolutions alone: the group norms between them see the whole image, but only through its
    mean and variance. A logit's patch is as wide as the image, so in a corner it sees 16 x 16."""
    layers = perturb(script_v3.patch_discriminator(8))
    assert layers(torch.randn(2, 1, 28, 28)).shape == (2, 1, 7, 7)
    layers = nn.Sequential(*(each for each in layers if not isinstance(each, nn.GroupNorm)))
    image = torch.randn(1, 1, 28, 28, requires_grad=True)
    logits = layers(image)
    for row, column in ((0, 0), (0, 6), (3, 3), (5, 1), (6, 6)):
        [influence] = torch.autograd.grad(logits[0, 0, row, column], image, retain_graph=True)
        seen = torch.zeros(28, 28, dtype=torch.bool)
        top, left = max(0, 4 * row - 12), max(0, 4 * column - 12)
        seen[top : 4 * row + 16, left : 4 * column + 16] = True
        assert torch.equal(influence[0, 0] != 0, seen)


# --- the stage ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(module, tiny_data_dir, tmp_path_factory):
    """A tiny run after the first step of its decoder: its folder; the decoder as that step found
    it, and the step's batch."""
    found, real_step = SimpleNamespace(output=tmp_path_factory.mktemp("begun")), module.train_step

    def train_step(stage, batch, rng):
        if stage.name == "decoder":
            found.decoder = copy.deepcopy(stage.network["decoder"].state_dict())
            found.batch = batch
            signal.raise_signal(signal.SIGINT)
        return real_step(stage, batch, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train_step", train_step)
        assert run(module, flags(module, found.output, tiny_data_dir)) == 130
    assert steps(found.output) == {"autoencoder": 6, "decoder": 1}
    assert steps(found.output, "previous.pt") == {"autoencoder": 6}
    return found


def decoder_of(state, prefix):
    """The weights of a decoder in a network's state."""
    return {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}


@on_v3
def test_it_starts_from_the_averaged_decoder_of_the_autoencoder(begun):
    stage = read(begun.output, "previous.pt")["stages"]["autoencoder"]
    assert differences(decoder_of(stage["ema"], "module.decoder."), dict(begun.decoder)) == []
    assert differences(decoder_of(stage["model"], "decoder."), dict(begun.decoder))


@on_v3
def test_it_leaves_the_autoencoder_and_its_statistics_as_they_are(begun, undisturbed):
    """The statistics are taken as it begins, and stay; so do all weights of the autoencoder."""
    before = read(begun.output, "previous.pt")["stages"]
    begins, ends = (read(output)["stages"] for output in (begun.output, undisturbed))
    names = [f"checkpoint.ema.module.{name}: tensors" for name in ("latent_mean", "latent_std")]
    assert differences(before["autoencoder"], begins["autoencoder"]) == names
    assert differences(begins["autoencoder"], ends["autoencoder"]) == []
    changed = differences(begins["decoder"]["model"], ends["decoder"]["model"])  # both players
    assert {line.split(".")[1] for line in changed} == {"decoder", "discriminator"}


@on_v3
@torch.no_grad()
def test_it_decodes_raw_latents_of_the_averaged_autoencoder(module, begun, undisturbed):
    latents, images = begun.batch
    autoencoder = module.load_trained(undisturbed, device="cpu").autoencoder
    raw = module.in_chunks(autoencoder.raw_encode, images)
    torch.testing.assert_close(latents, raw, rtol=0, atol=0.05)  # rounding depends on the batch
    scaled = module.in_chunks(autoencoder.encode, images)
    assert (scaled - raw).abs().max() > 0.1


@on_v3
def test_its_latents_are_as_noisy_as_those_of_the_stage_before(module, monkeypatch):
    """And drawn anew at each step."""
    stage, seen = stages_of(module)["decoder"], []

    def adversarial_loss(discriminator, made, wanted, real, *, weight):
        assert discriminator == "discriminator" and wanted is real is stage.arrays[1]
        seen.append(made)
        return weight

    monkeypatch.setattr(module, "adversarial_loss", adversarial_loss)
    for seed in (0, 1):
        networks = {"decoder": lambda latents: latents, "discriminator": "discriminator"}
        weight = stage.loss(networks, *stage.arrays, rng_of(module, seed))
        assert weight == module.Settings().adversarial_weight
    noise = torch.stack(seen).sub(stage.arrays[0]).div(module.Settings().latent_noise).flatten(1)
    assert noise.mean(dim=1).abs().max() < 0.04
    assert (noise.std(dim=1) - 1).abs().max() < 0.03
    assert torch.corrcoef(noise)[0, 1].abs() < 0.04


@on_v3
@torch.no_grad()
def test_images_come_from_its_decoder(module, undisturbed):
    models = module.load_trained(undisturbed, device="cpu")
    states = torch.randn(4, *module.state_shape(models.config))
    mean, std = models.autoencoder.latent_mean, models.autoencoder.latent_std
    images = module.decode(models, states)
    torch.testing.assert_close(images, models.decoder["decoder"](states * std + mean))
    for idle in (models.autoencoder.decoder, models.decoder["discriminator"]):
        perturb(idle)
        assert torch.equal(module.decode(models, states), images)
    perturb(models.decoder["decoder"])
    assert (module.decode(models, states) - images).abs().max() > 0.01
