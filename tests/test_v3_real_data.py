"""v3 learns on real Fashion-MNIST images, within seconds: small models, few images, few steps."""

import pytest
import torch
import torch.nn.functional as F

CPU = torch.device("cpu")
HELD_OUT = 500  # images
EPOCHS = 4


@pytest.fixture(scope="module")
def trained(script_v3, real_data_dir, tmp_path_factory):
    """Both stages trained: the history, held-out images, what the autoencoder makes of them, and the diffusion's losses
    of always predicting zero and of always predicting the mean velocity."""
    config = script_v3.Config(
        train_images=2000, autoencoder_epochs=EPOCHS, autoencoder_batch_size=32, autoencoder_width=16,
        epochs=2, batch_size=32, width=16, ema_decay=0.95,
    )  # fmt: skip
    data = script_v3.load_fashion_mnist(real_data_dir, config.train_images, CPU)
    held_out = [data.validation_images[:HELD_OUT], data.validation_labels[:HELD_OUT]]
    autoencoder_stage, diffusion_stage = script_v3.build_stages(config, len(data.train_images), CPU)
    run = script_v3.Run(config, tmp_path_factory.mktemp("real"), [autoencoder_stage, diffusion_stage], None)
    script_v3.train(run, autoencoder_stage, [data.train_images, data.train_labels], held_out, lambda: None)

    autoencoder = autoencoder_stage.ema.module.autoencoder
    images = held_out[0]
    made = script_v3.decode_images(autoencoder, script_v3.encode_images(autoencoder, images))
    autoencoder.set_statistics(script_v3.encode_images(autoencoder, data.train_images))
    latents, held_out_latents = [script_v3.encode_images(autoencoder, part) for part in (data.train_images, images)]
    held_out = [held_out_latents, held_out[1]]
    script_v3.train(run, diffusion_stage, [latents, data.train_labels], held_out, lambda: None)
    # Of the velocity noise - x_0, noise alone costs 1, whatever is predicted for x_0 without looking.
    costs = [1 + (held_out_latents - guess).square().mean().item() for guess in (0, latents.mean(dim=0))]
    return run.history, images, made, *costs


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
    # Measured over seeds: about half of the blurred images' squared error and 0.7 of their absolute error.
    assert (made - images).square().mean() < 0.8 * (blurred - images).square().mean()
    assert (made - images).abs().mean() < 0.9 * (blurred - images).abs().mean()


def test_loss_of_the_diffusion_falls_below_that_of_any_constant(trained):
    history, _, _, zero, mean = trained
    assert 1.8 < zero < 2.2  # the variance of noise and that of standardised latents
    losses = column(history, "diffusion", "validation_loss")
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.93 * min(zero, mean)
