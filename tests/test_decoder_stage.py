"""Stage 3 of v3: the decoder trains on, with samples too, against a discriminator of patches."""

import copy
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import draw_shapes
from networks import gradients, perturb, rng_of, stages_of, without_gradient
from script_runs import STEPS, differences, flags, on_v3, read, refusal, run, steps

CPU = torch.device("cpu")
WEIGHTS = [0.0, 0.05, 50.0]
EXACT = "donot_use_mm_for_euclid_dist"

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
    """Two images of one pixel each, and D(x) = 2 x."""
    discriminator = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(discriminator.weight, 2.0)
    images = torch.tensor([0.75, 0.25]).view(2, 1, 1, 1)  # logits 1.5 and 0.5
    made = torch.tensor([-0.75, 0.5]).view(2, 1, 1, 1)  # logits -1.5 and 1
    parts = script_v3.adversarial_loss(discriminator, made, images, weight=8.0)
    assert {name: part.item() for name, part in parts.items()} == {
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
    how = discriminator, players["decoder"](latents), images
    loss = sum(script_v3.adversarial_loss(*how, weight=weight).values())
    found = gradients(discriminator, loss)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    loss.backward()
    assert without_gradient(discriminator) == []


@pytest.mark.parametrize("weight", WEIGHTS)
def test_decoder_learns_from_what_the_discriminator_thinks(script_v3, players, batch, weight):
    """But nothing from what the discriminator learns from; with weight 0 nothing at all."""
    latents, images = batch
    decoder, discriminator = players["decoder"], players["discriminator"]
    made = decoder(latents)
    opinion = gradients(decoder, -discriminator(made).mean())
    assert opinion.norm() > 0.1
    parts = script_v3.adversarial_loss(discriminator, made, images, weight=weight)
    found = gradients(decoder, sum(parts.values()))
    torch.testing.assert_close(found, weight * opinion, atol=1e-5, rtol=1e-3)
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
    assert steps(found.output) == STEPS | {"decoder": 1}
    assert "decoder" not in steps(found.output, "previous.pt")
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
def test_it_leaves_what_was_trained_before_as_it_is(begun, undisturbed):
    before = read(begun.output, "previous.pt")["stages"]
    begins, ends = (read(output)["stages"] for output in (begun.output, undisturbed))
    for stage in ("autoencoder", "guide", "diffusion"):
        assert differences(before[stage], begins[stage]) == []
        assert differences(begins[stage], ends[stage]) == []
    changed = differences(begins["decoder"]["model"], ends["decoder"]["model"])  # both players
    assert {line.split(".")[1] for line in changed} == {"decoder", "discriminator"}


@on_v3
@torch.no_grad()
def test_its_latents_are_those_that_the_flow_learns(module, begun, undisturbed):
    """Those of the averaged autoencoder, standardised."""
    latents, images = begun.batch
    autoencoder = module.load_trained(undisturbed, device="cpu").autoencoder
    expected = module.in_chunks(autoencoder.encode, images)
    torch.testing.assert_close(latents, expected, rtol=0, atol=0.05)  # rounding: of another batch
    assert (expected - module.in_chunks(autoencoder.raw_encode, images)).abs().max() > 0.1


@on_v3
def test_it_sees_noisy_latents_and_samples_of_the_flow(module, monkeypatch):
    """The error is that of the former, the discriminator judges both; each step has other noise,
    as strong as in stage 1, and other samples."""
    stage, seen, config = stages_of(module)["decoder"], [], module.Settings()
    latents, images = map(module.to_float, stage.arrays)
    answers = torch.cat([images + 0.25, torch.zeros_like(images)])

    def decoder(raw):
        seen.append(raw)
        return answers

    def adversarial_loss(discriminator, made, real, *, weight):
        assert discriminator == "discriminator" and made is answers and real is images
        return {"unrealism": weight}

    monkeypatch.setattr(module, "adversarial_loss", adversarial_loss)
    for seed in (0, 1):
        networks = {"decoder": decoder, "discriminator": "discriminator"}
        parts = stage.loss(networks, latents, images, rng_of(module, seed))
        assert parts["absolute error"].item() == pytest.approx(0.25)
        assert parts["unrealism"] == config.adversarial_weight
    raw = stage.loss.keywords["models"].autoencoder.destandardise
    noisy, sampled = torch.stack(seen).split(len(images), dim=1)
    noise = (noisy - raw(latents)).div(config.latent_noise).flatten(1)
    assert noise.mean(dim=1).abs().max() < 0.04
    assert (noise.std(dim=1) - 1).abs().max() < 0.03
    assert torch.corrcoef(noise)[0, 1].abs() < 0.04
    pool = raw(stage.loss.keywords["pool"]())
    which = torch.cdist(sampled.flatten(2), pool.flatten(1), compute_mode=EXACT).min(dim=2)
    assert which.values.max() == 0
    assert len(which.indices.unique()) > 30 and (which.indices[0] != which.indices[1]).any()


@on_v3
def test_pool_is_drawn_once_from_noise_of_its_own(module):
    """Balanced by class, under the settings that samples are drawn with; so no image that is
    shown or scored has been trained on."""
    keywords = stages_of(module)["decoder"].loss.keywords
    pool, models = keywords["pool"](), keywords["models"]
    assert pool is keywords["pool"]() and len(pool) == 60
    rng = module.Rng(module.derived_seed(models.config.seed, "pool"), CPU)
    noise = rng.randn(60, *module.state_shape(models.config))
    classes = module.class_weights(torch.arange(60) % 10)
    assert torch.equal(pool, module.last_state(models, noise, classes))
    for seed in range(3):
        other = models.with_settings(sampling_seed=seed)
        shown = module.noise_of_samples(other, range(60))().flatten(1)
        assert torch.cdist(noise.flatten(1), shown).min() > 1


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


@on_v3
@torch.no_grad()
def test_until_then_images_come_from_the_decoder_of_the_autoencoder(module, begun):
    """As in the figures that are drawn while the flow is trained."""
    models = module.load_trained(begun.output, device="cpu")
    states = torch.randn(4, *module.state_shape(models.config))
    autoencoder = models.autoencoder
    expected = autoencoder.decoder(autoencoder.destandardise(states))
    perturb(models.decoder["decoder"])
    torch.testing.assert_close(module.decode(models, states), expected)
    del models.networks["decoder"], models.decoder  # of a checkpoint before the stage
    torch.testing.assert_close(module.decode(models, states), expected)


@on_v3
def test_more_epochs_of_the_flow_train_the_decoder_anew(
    module, undisturbed, tiny_data_dir, tmp_path, capsys
):
    """On what the flow makes by then. More of the autoencoder would cost the flow: refused."""
    output = shutil.copytree(undisturbed, tmp_path / "output")
    refused = flags(module, output, tiny_data_dir, autoencoder_epochs=3)
    assert "the epochs of autoencoder are over: more need --fresh" in refusal(module, refused)
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        real = module.decoder_loss
        patch.setattr(module, "decoder_loss", lambda *a, **k: losses.append(k) or real(*a, **k))
        assert run(module, flags(module, output, tiny_data_dir, epochs=4)) == 0
    assert "decoder: will be trained anew" in capsys.readouterr().out
    assert steps(output) == STEPS | {"diffusion": 12} and len(losses) > 6
    stages = [row["stage"] for row in read(output)["history"]]
    assert stages == 2 * ["autoencoder"] + 2 * ["guide"] + 4 * ["diffusion"] + 2 * ["decoder"]
    before, after = (read(each)["stages"]["decoder"]["ema"] for each in (undisturbed, output))
    assert differences(before, after)
