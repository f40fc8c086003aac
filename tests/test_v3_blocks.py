"""The networks of v3: shapes, gradients, conditioning, attention, and the loss of stage 1."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from conftest import draw_shapes
from networks import perturb, rng_of, without_gradient

LABELS = torch.arange(20) % 10
CPU = torch.device("cpu")


class Networks:
    """What each stage trains, small and untrained; and models of the same."""

    def __init__(self, script):
        # Of 16 channels in 8 groups; a group of one channel would cancel the bias before it,
        # gradient and all.
        widths = {"autoencoder_width": 16, "width": 16}
        config = script.Settings(**script.default_settings(CPU, quick=True) | widths)
        built = script.initial_networks(config, CPU)
        self.models = script.Models(built, config, [])
        self.autoencoder, self.denoiser = built["autoencoder"], built["diffusion"]
        self.decoder = built["decoder"]["decoder"]
        self.decode = partial(script.decode, self.models)
        count = script.NULL_CLASS + 1
        self.latents = script.noise_of_samples(self.models, range(count))()
        self.times = torch.linspace(0, 1, count)
        self.classes = script.class_weights(torch.arange(count))  # the null class last


@pytest.fixture
def networks(script_v3):
    """Fresh for each test."""
    return Networks(script_v3)


@pytest.fixture(scope="module")
def images():
    """uint8 (20, 1, 28, 28), drawings of LABELS."""
    return torch.from_numpy(draw_shapes(LABELS.numpy(), np.random.default_rng(0)))[:, None]


def submodules(module, kind):
    """All parts of a module that are of a class; there must be some."""
    found = [part for part in module.modules() if isinstance(part, kind)]
    assert found
    return found


# --- the denoiser ---------------------------------------------------------------------------------


def test_velocity_starts_at_zero_and_every_parameter_of_the_denoiser_learns(script_v3, networks):
    inputs = networks.latents, networks.times, networks.classes
    velocity = networks.denoiser(*inputs)
    assert (velocity.shape, velocity.dtype) == (networks.latents.shape, torch.float32)
    assert not velocity.any()
    denoiser = perturb(networks.denoiser)
    denoiser(*inputs).square().mean().backward()
    assert without_gradient(denoiser) == []
    for block in submodules(denoiser, script_v3.ConditionedBlock):  # scale and shift alike
        assert (block.modulation.weight.grad.abs().amax(dim=1) > 1e-8).all()
    by_class = denoiser.classes.weight.grad.abs().amax(dim=0)  # the null class too
    assert (by_class > 1e-8).all()


def test_class_and_time_matter_to_the_denoiser(networks):
    denoiser, count = perturb(networks.denoiser), len(networks.classes)
    latents, time = networks.latents[:1].expand(count, -1, -1, -1), torch.tensor([0.5])
    with torch.no_grad():
        by_class = denoiser(latents, time.expand(count), networks.classes).flatten(1)
        one = networks.classes[:1].expand(count, -1)
        by_time = denoiser(latents, networks.times, one).flatten(1)
    for velocities in (by_class, by_time):
        distances = torch.cdist(velocities, velocities) / velocities.norm(dim=1).mean()
        assert distances[~torch.eye(count, dtype=torch.bool)].min() > 0.01


def test_rows_of_a_batch_do_not_mix(networks):
    denoiser, autoencoder = perturb(networks.denoiser), perturb(networks.autoencoder)
    perturb(networks.decoder)
    latents, times, classes = networks.latents, networks.times, networks.classes
    with torch.no_grad():
        images = networks.decode(latents)
        batches = {denoiser: (latents, times, classes), networks.decode: (latents,)}
        for model, batch in (batches | {autoencoder.encode: (images,)}).items():
            rows = zip(*(part.split(1) for part in batch))
            alone = torch.cat([model(*row) for row in rows])
            torch.testing.assert_close(model(*batch), alone, atol=1e-4, rtol=1e-4)


# --- the blocks -----------------------------------------------------------------------------------


def test_residual_blocks_start_as_their_skip(script_v3, networks):
    for block in submodules(networks.autoencoder, script_v3.ChannelAttentionBlock):
        x = torch.randn(2, block.conv1.in_channels, 7, 7)
        assert torch.equal(block(x), x)
        assert not torch.allclose(perturb(block)(x), x, atol=0.01)
    skips = set()
    for block in submodules(networks.denoiser, script_v3.ConditionedBlock):
        x = torch.randn(2, block.conv1.in_channels, 4, 4)
        embedding = torch.randn(2, block.modulation.in_features)
        assert torch.equal(block(x, embedding), block.skip(x))
        skips.add(isinstance(block.skip, nn.Identity))
        perturb(block)
        assert not torch.allclose(block(x, embedding), block.skip(x), atol=0.01)
        assert not torch.allclose(block(x, embedding), block(x, -embedding), atol=0.01)
    assert True in skips  # a block that keeps the number of channels is the identity


def test_self_attention_starts_as_the_identity_and_is_that_of_torch(script_v3, networks):
    for attention in submodules(networks.denoiser, script_v3.SelfAttention):
        channels = attention.norm.num_channels
        x = torch.randn(2, channels, 4, 4)
        assert torch.equal(attention(x), x)
        perturb(attention)
        reference = nn.MultiheadAttention(channels, attention.heads, batch_first=True)
        assert attention.heads > 1
        weights = {"in_proj_weight": attention.qkv.weight, "in_proj_bias": attention.qkv.bias}
        weights |= {f"out_proj.{name}": part for name, part in attention.out.named_parameters()}
        reference.load_state_dict(weights)
        tokens = attention.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        mixed = reference(tokens, tokens, tokens)[0].transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(attention(x), x + mixed)


def test_channel_attention_gates_channels_by_the_means_of_all(script_v3, networks):
    for attention in submodules(networks.autoencoder, script_v3.ChannelAttention):
        perturb(attention)
        x = torch.randn(2, attention.squeeze.in_features, 5, 5)
        gate = attention(x) / x  # (B, C, 5, 5)
        assert (gate > 0).all()
        assert (gate < 1).all()
        everywhere = gate[:, :, :1, :1].expand_as(gate)
        torch.testing.assert_close(gate, everywhere)
        x[:, 0] += 3.0
        changed = attention(x)[:, 1:] / x[:, 1:]
        assert (changed - gate[:, 1:]).abs().amax(dim=(0, 2, 3)).min() > 1e-4  # the others notice
        shuffled = x.flatten(2)[:, :, torch.randperm(25)].unflatten(2, (5, 5))
        # only the means count
        torch.testing.assert_close(attention(shuffled) / shuffled, attention(x) / x)


# --- the autoencoder ------------------------------------------------------------------------------


def standardised(latents):
    """Whether each channel has mean 0 and variance 1."""
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    return torch.allclose(mean, 0 * mean, atol=1e-4) and torch.allclose(std, 0 * std + 1)


def test_encode_and_decode_shapes_types_and_ranges(script_v3, networks, images):
    autoencoder, models = perturb(networks.autoencoder), networks.models
    perturb(networks.decoder)
    latents = script_v3.embed_images(models, images)
    shape = len(images), *networks.latents.shape[1:]
    assert (latents.shape, latents.dtype) == (shape, torch.float32)
    decoded = script_v3.decode_images(models, 30 * latents)
    assert (decoded.shape, decoded.dtype) == (images.shape, torch.uint8)
    raw = networks.decode(30 * latents)  # in float32, which the images need not be computed in
    assert raw.min() < -1.5 and raw.max() > 1.5
    assert (decoded[raw < -1.5] == 0).all()  # clamped, not wrapped around
    assert (decoded[raw > 1.5] == 255).all()
    rows = script_v3.decode_images(models, 30 * latents.unflatten(0, (4, 5)))
    assert torch.equal(rows.flatten(0, 1), decoded)
    whole = script_v3.in_chunks(autoencoder.encode, images)
    for chunk in (1, 7, 500):
        again = script_v3.in_chunks(autoencoder.encode, images, chunk)
        torch.testing.assert_close(again, whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_latents_are_standardised_by_set_statistics(script_v3, networks, images):
    autoencoder, floats = perturb(networks.autoencoder), script_v3.to_float(images)
    first, others = floats[:10], -floats[10:] / 2
    for batch in (first, others):
        raw = autoencoder.raw_encode(batch)
        positions = raw.flatten(1)
        torch.testing.assert_close(positions.mean(dim=1), torch.zeros(10), atol=1e-4, rtol=0)
        assert (positions.std(dim=1) - 1).abs().max() < 0.01
        reconstruction = autoencoder.decoder(raw)
        autoencoder.set_statistics(raw)
        assert standardised(autoencoder.encode(batch))
        decoded = autoencoder.decoder(autoencoder.destandardise(autoencoder.encode(batch)))
        torch.testing.assert_close(decoded, reconstruction, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(autoencoder.raw_encode(batch), raw)  # as it was trained
    assert not standardised(autoencoder.encode(first))
    assert {"latent_mean", "latent_std"} <= set(autoencoder.state_dict())  # a checkpoint keeps them


def test_loss_is_the_absolute_error_of_images_decoded_from_noisy_latents(
    script_v3, networks, images
):
    autoencoder, floats = perturb(networks.autoencoder), script_v3.to_float(images)
    z = autoencoder.raw_encode(floats)
    made = autoencoder.decoder(z + 0.3 * rng_of(script_v3).randn(*z.shape))
    loss = script_v3.reconstruction_loss(autoencoder, floats, rng_of(script_v3), latent_noise=0.3)
    torch.testing.assert_close(loss, (floats - made).abs().mean())
    loss.backward()
    assert without_gradient(autoencoder) == []


def test_images_survive_the_round_trip_to_floats(script_v3):
    images = torch.arange(256, dtype=torch.uint8).view(16, 16)
    floats = script_v3.to_float(images)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    assert script_v3.to_float(floats) is floats
    assert torch.equal(script_v3.to_uint8(floats), images)
    assert torch.equal(script_v3.to_uint8(floats + 0.003), images)  # rounded, not cut off
    assert torch.equal(script_v3.to_uint8(floats - 0.003), images)
    outside = script_v3.to_uint8(torch.tensor([-9.0, -1.01, 1.01, 9.0]))
    assert outside.tolist() == [0, 0, 255, 255]
