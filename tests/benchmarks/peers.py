"""The libraries that ``time_to_quality.py`` trains beside the versions, some with classes.

A peer has ``step(images, labels)``, which takes a step of training on float images (B, 1, 28, 28)
in [-1, 1] and integer labels (B,); ``weights()`` and ``load(weights)``, which get and set the
averaged weights; and ``sample(count)``, which draws uint8 images (count, 28, 28) from them. A
conditional one draws the classes in turn: i mod 10.
"""

import copy
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent))
import speed

CLASSES = 10
GUIDANCE = 1.75  # of u + w (c - u), at all times


def classes_in_turn(count, device):
    """Labels (count,): i mod 10."""
    return torch.arange(count, device=device) % CLASSES


class SmallDiffusion(speed.SmallDiffusion):
    """smalldiffusion's examples/fashion_mnist_dit.py."""

    def step(self, images, labels):
        super().step(images)


class SmallDiffusionConditional(speed.SmallDiffusion):
    """smalldiffusion's examples/fashion_mnist_dit_cond.py, with the library's guidance."""

    sampler = f"its own, 20 steps, gam 1.6, guidance {GUIDANCE:g}"
    evaluations = 40

    def __init__(self, parameters, device):
        import smalldiffusion
        from accelerate import Accelerator

        def build(size):
            label = smalldiffusion.CondEmbedderLabel(32 * size, CLASSES, 0.1)
            sizes = {"patch_size": 2, "depth": size, "head_dim": 32, "num_heads": size}
            return smalldiffusion.DiT(28, 1, **sizes, mlp_ratio=4.0, cond_embed=label)

        self.library, self.feed = smalldiffusion, speed.Feed()
        self.accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision=speed.precision(device)
        )
        self.model = (
            build(6) if parameters is None else speed.nearest_model(build, range(2, 9), parameters)
        )
        self.schedule = smalldiffusion.ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000)
        self.loop = smalldiffusion.training_loop(
            self.feed,
            self.model,
            self.schedule,
            epochs=1,
            lr=1e-3,
            conditional=True,
            accelerator=self.accelerator,
        )
        self.ema = AveragedModel(self.model.to(device), multi_avg_fn=get_ema_multi_avg_fn(0.99))

    def step(self, images, labels):
        super().step((images, labels))

    def sample(self, count):
        sigmas, device = self.schedule.sample_sigmas(20), self.accelerator.device
        with torch.inference_mode(), self.accelerator.autocast():
            noise = self.ema.module.rand_input(count).to(device) * sigmas[0]
            states = self.library.samples(
                self.ema.module,
                sigmas,
                gam=1.6,
                cfg_scale=GUIDANCE - 1,  # theirs is c + s (c - u)
                xt=noise,
                batchsize=count,
                cond=classes_in_turn(count, device),
                accelerator=self.accelerator,
            )
            *_, images = states
        return speed.to_uint8((images + 1) / 2)


class DenoisingDiffusion(speed.DenoisingDiffusion):
    """denoising-diffusion-pytorch's Unet, GaussianDiffusion and Trainer."""

    def step(self, images, labels):
        super().step(images)


class DenoisingDiffusionGuided:
    """denoising-diffusion-pytorch's classifier_free_guidance, trained as its Trainer trains.

    The Trainer takes no labels, so its step is repeated here: Adam at 1e-3, clipped gradients, the
    average of weights. Process, objective and the dropping of labels are the library's defaults
    (cosine schedule, noise, one in two), and so is all of guidance but its scale, 6 there.
    """

    sampler = f"DDIM, 20 steps, eta 1, guidance {GUIDANCE:g}"
    evaluations = 40

    def __init__(self, parameters, device):
        from accelerate import Accelerator
        from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        def build(width):
            return Unet(width, num_classes=CLASSES, dim_mults=(1, 2, 4), channels=1)

        self.accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision=speed.precision(device)
        )
        self.model = speed.nearest_model(build, range(8, 97, 8), parameters)
        diffusion = GaussianDiffusion(self.model, image_size=28, sampling_timesteps=20)
        optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-3, betas=(0.9, 0.99))
        self.ema = EMA(diffusion, beta=0.995, update_every=10).to(self.accelerator.device)
        self.diffusion, self.optimizer = self.accelerator.prepare(diffusion, optimizer)

    def step(self, images, labels):
        with self.accelerator.autocast():
            loss = self.diffusion((images + 1) / 2, classes=labels)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

    def weights(self):
        return copy.deepcopy(self.ema.ema_model.state_dict())

    def load(self, weights):
        self.ema.ema_model.load_state_dict(weights)

    def sample(self, count):
        model, labels = self.ema.ema_model.eval(), classes_in_turn(count, self.accelerator.device)
        with speed.quiet(), torch.inference_mode(), self.accelerator.autocast():
            return speed.to_uint8(model.sample(labels, cond_scale=GUIDANCE))


class RectifiedFlow:
    """rectified-flow-pytorch's Unet, RectifiedFlow and Trainer, on pixels, without classes.

    All is the library's default but what the Trainer is fed and its learning rate, 3e-4 there.
    """

    sampler = "midpoint, 15 steps"
    evaluations = 30

    def __init__(self, parameters, device):
        from rectified_flow_pytorch import RectifiedFlow, Trainer, Unet

        def build(width):
            return Unet(width, dim_mults=(1, 2, 4), channels=1)

        self.model = speed.nearest_model(build, range(8, 97, 8), parameters)
        self.folder = tempfile.TemporaryDirectory()  # the Trainer makes its folders in it
        self.trainer = Trainer(
            RectifiedFlow(self.model, data_shape=(1, 28, 28)),
            dataset=TensorDataset(torch.zeros(32, 1, 28, 28)),
            num_train_steps=1,
            learning_rate=1e-3,
            save_results_every=10**9,
            checkpoint_every=10**9,
            checkpoints_folder=str(Path(self.folder.name) / "checkpoints"),
            results_folder=str(Path(self.folder.name) / "results"),
            accelerate_kwargs={
                "cpu": device.type == "cpu",
                "mixed_precision": speed.precision(device),
            },
        )
        self.trainer.dl = speed.Feed()

    def step(self, images, labels):
        self.trainer.dl.batch = (images + 1) / 2  # it takes [0, 1] to [-1, 1] by itself
        with speed.quiet():
            self.trainer()

    def weights(self):
        return copy.deepcopy(self.trainer.ema_model.ema_model.state_dict())

    def load(self, weights):
        self.trainer.ema_model.ema_model.load_state_dict(weights)

    def sample(self, count):
        flow = self.trainer.ema_model.ema_model
        with torch.inference_mode(), self.trainer.accelerator.autocast():
            return speed.to_uint8(flow.sample(batch_size=count, steps=16))


class Peer(NamedTuple):
    """A contestant: the package it comes from, what of it, its class, and whether it has labels.

    ``own_size`` says that the example has a size of its own; the others get the first version's.
    """

    package: str
    words: str
    build: type
    conditional: bool = False
    own_size: bool = False


PEERS = {
    "smalldiffusion": Peer("smalldiffusion", "DiT example", SmallDiffusion, own_size=True),
    "smalldiffusion_conditional": Peer(
        "smalldiffusion",
        "conditional DiT example",
        SmallDiffusionConditional,
        conditional=True,
        own_size=True,
    ),
    "denoising_diffusion": Peer("denoising-diffusion-pytorch", "DDPM", DenoisingDiffusion),
    "denoising_diffusion_guided": Peer(
        "denoising-diffusion-pytorch",
        "classifier-free guidance",
        DenoisingDiffusionGuided,
        conditional=True,
    ),
    "rectified_flow": Peer("rectified-flow-pytorch", "rectified flow", RectifiedFlow),
}
