"""v3 learns on real Fashion-MNIST images, within seconds: small models, few images, few steps."""

import pytest
import torch
import torch.nn.functional as F

CPU = torch.device("cpu")
EPOCHS = 4  # of the autoencoder


@pytest.fixture(scope="module")
def trained(script_v3, real_data_dir, tmp_path_factory):
    """All stages trained: the history, held-out images, what encoder and decoder make of them, and
    the diffusion's losses of always predicting zero and of always predicting the mean velocity."""
    config = script_v3.Settings(
        data_dir=str(real_data_dir), train_images=2000, autoencoder_epochs=EPOCHS,
        autoencoder_batch_size=32, autoencoder_width=16, decoder_epochs=1, discriminator_width=16,
        epochs=2, batch_size=32, width=16, ema_decay=0.95,
    )  # fmt: skip
    data = script_v3.load_fashion_mnist(config, CPU)
    held_out = {name: getattr(data, name)[:500] for name in data._fields if "validation" in name}
    data = data._replace(**held_out)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_samples", "save_reconstructions"):
            patch.setattr(script_v3, name, lambda *args: None)
        run = script_v3.Run(config, data, tmp_path_factory.mktemp("real"), None)
        script_v3.train_stages(run, run.models, data)
    latents = script_v3.embed_images(run.models, data.train_images)
    held_out_latents = script_v3.embed_images(run.models, data.validation_images)
    made = script_v3.decode_images(run.models, held_out_latents)
    # Of the velocity noise - x_0, noise alone costs 1, whatever is guessed blindly for x_0.
    guesses = (0, latents.mean(dim=0))
    costs = [1 + (held_out_latents - guess).square().mean().item() for guess in guesses]
    return run.history, data.validation_images, made, *costs


def column(history, stage, key):
    return [row[key] for row in history if row["stage"] == stage]


def test_loss_of_the_autoencoder_falls(trained):
    history = trained[0]
    for key in ("train_loss", "validation_loss"):
        losses = column(history, "autoencoder", key)
        assert len(losses) == EPOCHS
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.6 * losses[0]


def test_reconstructions_of_held_out_images_beat_blurred_images(script_v3, trained):
    _, images, made, *_ = trained
    images, made = script_v3.to_float(images), script_v3.to_float(made)
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    # Measured over seeds: half of the blurred images' squared error, 0.7 of their absolute error.
    assert (made - images).square().mean() < 0.8 * (blurred - images).square().mean()
    assert (made - images).abs().mean() < 0.9 * (blurred - images).abs().mean()


def test_loss_of_the_diffusion_falls_below_that_of_any_constant(trained):
    history, _, _, zero, mean = trained
    assert 1.8 < zero < 2.2  # the variance of noise and that of standardised latents
    losses = column(history, "diffusion", "validation_loss")
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.93 * min(zero, mean)
