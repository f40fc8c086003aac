"""Measure the speed of the versions, as ratios within one run on one machine.

    python tests/benchmarks/speed.py                                  every version that there is
    python tests/benchmarks/speed.py LatentDiffusionModel/v3 --peers  one, and the peers beside it

Needs no trained models: speed does not depend on what the weights are. For each version it prints
the training step against the bare step (forward, loss, backward, optimizer) of the same model on
the same resident batch; the input pipeline against a DataLoader with ToTensor; the seconds for
1,000 images at the published sampler; and the seconds for the GIFs and path figures. README.md,
beside this file, says what each number means.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib.metadata
import io
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import FashionMNIST

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import feature_extractor as fe
from sync_shared import REPOSITORY, find_scripts, load_script, version_of

WARM_UP = 3  # steps or blocks that are run before the measured ones
BLOCK = 20  # batches that are timed together in the input pipeline


class Enough(Exception):
    """Ends a run of a script in which all that was wanted has been measured."""


# --------------------------------------------------------------------------------------------------
# Scripts
# --------------------------------------------------------------------------------------------------


def find_versions(wanted=(), repository=REPOSITORY):
    """Map the versions in ``wanted``, or all that there are, to their scripts; ValueError names one
    that is not."""
    found = {version_of(path): path for path in find_scripts(repository)}
    for version in wanted:
        if version not in found:
            raise ValueError(f"there is no version {version!r}; there are {', '.join(found)}")
    return {version: found[version] for version in wanted or found}


def epoch_fields(config_class):
    """Names of the fields that say how many epochs a stage is trained for, but for extras that
    have none by default."""
    names = [field.name for field in dataclasses.fields(config_class) if field.default]
    return [name for name in names if name == "epochs" or name.endswith("_epochs")]


def epoch_flags(epochs):
    """The command line for {field: epochs}."""
    return [
        text
        for name, count in epochs.items()
        for text in (f"--{name.replace('_', '-')}", str(count))
    ]


def script_flags(args):
    """The command line that a script is run with, from this command's own arguments."""
    return ["--data-dir", str(args.data_dir), "--device", args.device]


@contextlib.contextmanager
def quiet():
    """Nothing that is printed within is seen. Yields the stream that receives it."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        yield printed


@contextlib.contextmanager
def calls_of(script):
    """Calls of a script's functions print their warnings and no more; what would end its run
    becomes a ValueError."""
    try:
        with quiet() as printed:
            yield
    except script.ExperimentError as error:
        raise ValueError(" ".join(str(error).splitlines())) from None
    for line in printed.getvalue().splitlines():
        if line.startswith("warning"):
            print(line, file=sys.stderr)


def pick_device(scripts, name):
    """The device that the scripts of {version: script} know as ``name``; ValueError where it cannot
    be used."""
    script = load_script(next(iter(scripts.values())))
    with calls_of(script):
        return script.pick_device(name)


# --------------------------------------------------------------------------------------------------
# Timing
# --------------------------------------------------------------------------------------------------


def hardware(device):
    """The accelerator's name, or the processor's and its number of cores."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # only Linux has this file, and tells the model there
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            (line.partition(": ")[2].strip() for line in lines if line.startswith("model name")),
            name,
        )
    return f"{name}, {os.cpu_count()} cores"


def synchronize(device):
    """Wait until the device has done all that it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def seconds_of(work, device):
    """Seconds that ``work()`` takes, until the device has done it."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def interleave(contestants, repeats, warm_up):
    """Call each of {name: callable} in turn, for ``warm_up`` rounds that do not count and
    ``repeats`` that do.

    A callable returns its own seconds. Returns {name: list of ``repeats`` seconds}.
    """
    rounds = [{name: run() for name, run in contestants.items()} for _ in range(warm_up + repeats)]
    return {name: [each[name] for each in rounds[warm_up:]] for name in contestants}


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class StageTimes:
    """What was measured of one stage of a version; ``seconds`` holds a list for "step", "bare" and
    each rival."""

    name: str
    epochs: int  # of the published recipe
    steps_per_epoch: int
    batch_size: int
    parameters: int
    arrays: tuple  # what batches are taken from: the images or latents, and labels, if any
    seconds: dict
    first: float = 0.0  # seconds of the first step, in which a stage may prepare

    def median(self, name="step"):
        """Median of the seconds of ``name``."""
        return statistics.median(self.seconds[name])


def bare_step(script, stage):
    """Returns a function of a batch and its random numbers: one step of a copy of the stage's
    network, and nothing that is not needed for it."""
    network = copy.deepcopy(stage.network)
    optimizers = script.build_optimizers(network, stage.rates).values()

    def step(batch, rng):
        with script.arithmetic(batch[0].device):
            loss = sum(script.loss_parts(stage.loss(network, *batch, rng)).values())
        network.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def measure_training(path, flags, repeats, rivals=None):
    """Time the real training loop of a script, and after each of its steps the bare step on the
    same batch.

    A step counts from the end of the one before, so the loop's own work is in it: taking the rows,
    seeding, reading the loss. Each stage is stopped after ``WARM_UP`` + ``repeats`` steps, and then
    the next one begins; extras without epochs by default are left out.

    Args:
        flags: of the command line, without --output-dir.
        rivals: None, or a function of the stage and the uint8 training images (N, 1, 28, 28) that
            returns {name: function without arguments}; they take their turns in the diffusion.

    Returns: a list of ``StageTimes``. Raises ValueError if a stage has fewer steps than are to be
    timed.
    """
    script, measured = load_script(path), []
    real_steps, real_step = script.train_steps, script.train_step

    def train_steps(run, stage, arrays, validate, after_epoch):
        device = arrays[0].device
        bare = bare_step(script, stage)
        others = (
            rivals(stage, run.data.train_images) if rivals and stage.name == "diffusion" else {}
        )
        seconds = {name: [] for name in ("step", "bare", *others)}
        ended = time.perf_counter()

        def timed_step(stage, batch, rng):
            nonlocal ended
            losses = real_step(stage, batch, rng)
            synchronize(device)
            seconds["step"].append(time.perf_counter() - ended)
            floats = [script.to_float(array) for array in batch]
            seconds["bare"].append(seconds_of(lambda: bare(floats, rng), device))
            for name, work in others.items():
                seconds[name].append(seconds_of(work, device))
            if len(seconds["step"]) == WARM_UP + repeats:
                raise Enough
            ended = time.perf_counter()
            return losses

        script.train_step = timed_step
        with contextlib.suppress(Enough):
            real_steps(run, stage, arrays, validate, after_epoch)
        if len(seconds["step"]) < WARM_UP + repeats:
            raise ValueError(f"{script.VERSION}: {stage.name} has too few steps to time {repeats}")
        measured.append(
            StageTimes(
                name=stage.name,
                epochs=stage.total_steps // stage.steps_per_epoch,
                steps_per_epoch=stage.steps_per_epoch,
                batch_size=stage.batch_size,
                parameters=sum(parameter.numel() for parameter in stage.network.parameters()),
                arrays=arrays,
                seconds={name: each[WARM_UP:] for name, each in seconds.items()},
                first=seconds["step"][0],
            )
        )
        if len(measured) == len(epoch_fields(script.Settings)):
            raise Enough

    script.train_steps = train_steps
    with tempfile.TemporaryDirectory() as folder, calls_of(script), contextlib.suppress(Enough):
        script.main([*flags, "--output-dir", folder])
    return measured


# --------------------------------------------------------------------------------------------------
# Input pipeline
# --------------------------------------------------------------------------------------------------


def resident_batches(arrays, batch_size, to_float):
    """Yield batches as a script takes them from its resident arrays, the images brought to [-1,
    1]."""
    while True:
        for rows in torch.randperm(len(arrays[0]), device=arrays[0].device).split(batch_size):
            images, *others = (array[rows] for array in arrays)
            yield [to_float(images), *others]


def loader_batches(data_dir, batch_size, workers, device):
    """Yield batches from a DataLoader with ToTensor, the usual way, the images brought to [-1,
    1]."""
    dataset = FashionMNIST(data_dir, train=True, transform=transforms.ToTensor())
    loader = DataLoader(
        dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    while True:
        for images, labels in loader:
            yield [2 * images.to(device) - 1, labels.to(device)]


def measure_input(stage, to_float, data_dir, repeats):
    """Seconds a batch of the first stage's input: {"resident": [...], "0 workers": [...], "<cores>
    workers": [...]}."""
    device, size = stage.arrays[0].device, stage.batch_size
    sources = {"resident": resident_batches(stage.arrays, size, to_float)}
    for workers in (0, os.cpu_count() or 1):
        sources[f"{workers} workers"] = loader_batches(data_dir, size, workers, device)

    def block(source):
        return lambda: seconds_of(lambda: [next(source) for _ in range(BLOCK)], device) / BLOCK

    return interleave({name: block(source) for name, source in sources.items()}, repeats, 1)


# --------------------------------------------------------------------------------------------------
# Sampling and figures
# --------------------------------------------------------------------------------------------------


def stopwatch(script, name, device):
    """Make a script's function of that name add the seconds of each call to the list returned."""
    function, seconds = getattr(script, name), []

    def call(*args, **kwargs):
        results = []
        seconds.append(seconds_of(lambda: results.append(function(*args, **kwargs)), device))
        return results[0]

    setattr(script, name, call)
    return seconds


def make_untrained(path, flags, folder):
    """Leave a checkpoint of the published size in ``folder``, after a step or two of training."""
    script = load_script(path)
    real_steps, fields = script.train_steps, epoch_fields(script.Settings)

    def train_steps(run, stage, arrays, validate, after_epoch):
        real_steps(run, stage, arrays, validate, lambda epoch: None)  # no figures of the epoch
        if len(run.stages) == len(fields):
            raise Enough

    script.train_steps = train_steps
    once = epoch_flags(dict.fromkeys(fields, 1))
    with calls_of(script), contextlib.suppress(Enough):
        script.main([*flags, "--output-dir", str(folder), "--train-images", "64", *once])


def sampled_parameters(networks):
    """Number of parameters of a version's networks, without those that only training needs: where a
    stage trains the decoder on, its discriminator, and the decoder of the stage before; and the
    student, whom `Sampler` does not measure."""
    unused = ("autoencoder.decoder.", "decoder.discriminator.") if "decoder" in networks else ()
    unused += ("student.",)
    named = torch.nn.ModuleDict(networks).named_parameters()
    return sum(each.numel() for name, each in named if not name.startswith(unused))


SAMPLERS = {"ddim": "DDIM", "dpm": "DPM-Solver++(2M)", "euler": "Euler", "heun": "Heun"}


def sampler_name(config):
    """The sampler that the settings choose; where there is no choice, the one that the help of
    ``sampling_steps`` names, such as "steps of DDIM"; or "?"."""
    [steps] = [each for each in dataclasses.fields(config) if each.name == "sampling_steps"]
    found = re.fullmatch(r"steps of (\S+)", steps.metadata["help"])
    name = getattr(config, "sampler", found[1] if found else "?")
    return SAMPLERS.get(name, name)


class Sampler:
    """The models of a version's output folder, which sample as published.

    Attributes:
        models: what the script's ``load_trained`` returned.
        parameters: number of their parameters, without those that only training needs.
    """

    def __init__(self, path, output, device):
        self.script, self.rows, self.count = load_script(path), 0, 0
        with calls_of(self.script):
            self.models = self.script.load_trained(Path(output), device)
        self.parameters = sampled_parameters(self.models.networks)
        for name in ("diffusion", "guide"):
            if name in self.models.networks:
                self.models.networks[name].register_forward_hook(self._count_rows)
        self.times = stopwatch(self.script, "generate_samples", self.models.device)

    def _count_rows(self, module, args, output):
        self.rows += len(output)

    def export(self, count, folder):
        """Write samples.npz of ``count`` images into a folder."""
        self.count += count
        with calls_of(self.script):
            self.script.export_samples(self.models, count, Path(folder))

    def seconds(self, count):
        """Seconds that ``count`` images take, decoded, without writing them to a file."""
        with tempfile.TemporaryDirectory() as folder:
            self.export(count, folder)
        return self.times[-1]

    def evaluations(self):
        """Evaluations of the denoiser an image, counted in the samples drawn so far; guidance's two
        count as two, also where the second is a guide's."""
        return self.rows / self.count

    def description(self):
        """Sampler, steps, fresh noise and guidance in words."""
        config = self.models.config
        name = sampler_name(config)
        steps = (
            "" if name == "ancestral" else f", {config.sampling_steps} steps"
        )  # it takes all there are
        eta = f", eta {config.eta:g}" if name == "DDIM" and hasattr(config, "eta") else ""
        guidance = ""
        if hasattr(config, "guidance_scale"):
            [high] = [x for x in dataclasses.fields(config) if x.name == "guidance_high"]
            time = high.metadata["help"].partition(" ")[0]  # t, or sigma
            guidance = f", guidance {config.guidance_scale:g} "
            guidance += f"from {time} = {config.guidance_high:g} to {config.guidance_low:g}"
        return name + steps + eta + guidance


def measure_figures(path, flags, folder, repeats, device):
    """Seconds for the ten GIFs and ten path figures of a version, with the sampling of their
    trajectories, the encoding of the validation images that they lie among, and the page's file of
    paths: a list.

    ``folder`` is an output folder with a checkpoint.
    """
    script = load_script(path)
    times = stopwatch(script, "save_trajectories", device)
    for _ in range(1 + repeats):
        with calls_of(script):
            script.main([*flags, "--output-dir", str(folder), "--sample-only"])
    return times[1:]


# --------------------------------------------------------------------------------------------------
# Peers
# --------------------------------------------------------------------------------------------------


class Feed:
    """Endless batches of a library's training loop: whatever ``batch`` is at the time."""

    batch = None

    def __iter__(self):
        return self

    def __next__(self):
        return self.batch


def installed(name):
    """The version of a package, or None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def precision(device):
    """The mixed precision that accelerate is asked for: bf16 where the hardware multiplies it, as
    in the scripts."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "no"


def parameter_count(model):
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def nearest_model(build, sizes, parameters):
    """The one of ``build(size)`` whose number of parameters is nearest to ``parameters``."""
    return min(map(build, sizes), key=lambda model: abs(parameter_count(model) - parameters))


def to_uint8(images):
    """Images (N, 1, 28, 28) in [0, 1] to uint8 (N, 28, 28) on the CPU."""
    return (255 * images[:, 0].float()).round().clamp(0, 255).to(torch.uint8).cpu()


class SmallDiffusion:
    """smalldiffusion's DiT, training loop and sampler, as in its examples/fashion_mnist_dit.py.

    Args:
        parameters: wanted number of parameters; None is the example's own model.
        device: where to train and sample.

    ``step(images)`` takes a step of training on float images (B, 1, 28, 28) in [-1, 1];
    ``sample(count)`` draws from the averaged weights. The other peers have the same methods, those
    that time_to_quality.py trains also ``weights`` and ``load``, which get and set the averaged
    weights.
    """

    sampler = "its own, 20 steps, gam 1.6"
    evaluations = 20
    example = 4_112_068

    def __init__(self, parameters, device):
        import smalldiffusion
        from accelerate import Accelerator

        def build(size):
            return smalldiffusion.DiT(
                28, 1, patch_size=2, depth=size, head_dim=32, num_heads=size, mlp_ratio=4.0
            )

        self.library, self.feed = smalldiffusion, Feed()
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision(device))
        self.model = nearest_model(build, range(2, 9), parameters or self.example)
        self.schedule = smalldiffusion.ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000)
        self.loop = smalldiffusion.training_loop(
            self.feed, self.model, self.schedule, epochs=1, lr=1e-3, accelerator=self.accelerator
        )
        self.ema = AveragedModel(self.model.to(device), multi_avg_fn=get_ema_multi_avg_fn(0.99))

    def step(self, images):
        self.feed.batch = images
        with quiet():
            next(self.loop)  # the optimizer's step of the batch before, then the loss of this one
        self.ema.update_parameters(self.model)

    def weights(self):
        return copy.deepcopy(self.ema.module.state_dict())

    def load(self, weights):
        self.ema.module.load_state_dict(weights)

    def sample(self, count):
        sigmas, device = self.schedule.sample_sigmas(20), self.accelerator.device
        with torch.inference_mode(), self.accelerator.autocast():
            noise = self.ema.module.rand_input(count).to(device) * sigmas[0]
            states = self.library.samples(
                self.ema.module,
                sigmas,
                gam=1.6,
                xt=noise,
                batchsize=count,
                accelerator=self.accelerator,
            )
            *_, images = states
        return to_uint8((images + 1) / 2)


class DenoisingDiffusion:
    """denoising-diffusion-pytorch's Unet, GaussianDiffusion and Trainer, with DDIM; see
    ``SmallDiffusion``.

    The process and objective are the library's defaults (sigmoid schedule, v), and so is all of the
    Trainer but what is fed to it and the learning rate: its 1e-4 is for hundreds of thousands of
    steps, 1e-3 for thousands.
    """

    sampler = "DDIM, 20 steps"
    evaluations = 20

    def __init__(self, parameters, device):
        from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

        if device.type == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"  # the Trainer has no argument for it

        def build(width):
            return Unet(width, dim_mults=(1, 2, 4), channels=1)

        self.model = nearest_model(build, range(8, 97, 8), parameters)
        diffusion = GaussianDiffusion(self.model, image_size=28, sampling_timesteps=20)
        self.folder = tempfile.TemporaryDirectory()  # the Trainer insists on a folder of pictures
        for number in range(100):
            Image.new("L", (28, 28)).save(Path(self.folder.name) / f"{number}.png")
        self.trainer = Trainer(
            diffusion,
            self.folder.name,
            train_lr=1e-3,
            train_num_steps=0,
            save_and_sample_every=10**9,
            results_folder=str(Path(self.folder.name) / "results"),
            amp=precision(device) == "bf16",
            mixed_precision_type="bf16",
            calculate_fid=False,
        )
        self.trainer.dl = Feed()

    def step(self, images):
        self.trainer.dl.batch = (images + 1) / 2  # it takes [0, 1] to [-1, 1] by itself
        self.trainer.train_num_steps += 1
        with quiet():
            self.trainer.train()

    def weights(self):
        return copy.deepcopy(self.trainer.ema.ema_model.state_dict())

    def load(self, weights):
        self.trainer.ema.ema_model.load_state_dict(weights)

    def sample(self, count):
        model = self.trainer.ema.ema_model.eval()
        with quiet(), torch.inference_mode(), self.trainer.accelerator.autocast():
            return to_uint8(model.sample(batch_size=count))


class Diffusers:
    """diffusers' UNet2DModel, trained as in its examples/unconditional_image_generation; see
    ``SmallDiffusion``."""

    sampler = "DDIM, 20 steps"
    evaluations = 20

    def __init__(self, parameters, device):
        from accelerate import Accelerator
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        def build(width):
            return UNet2DModel(
                sample_size=28,
                in_channels=1,
                out_channels=1,
                layers_per_block=1,
                norm_num_groups=8,
                block_out_channels=(width, 2 * width, 4 * width),
                down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            )

        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision(device))
        self.model = nearest_model(build, range(8, 97, 8), parameters)
        self.noise = DDPMScheduler(num_train_timesteps=1000)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6
        )
        schedule = get_scheduler(
            "cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000
        )
        self.prepared, self.optimizer, self.schedule = self.accelerator.prepare(
            self.model, optimizer, schedule
        )
        self.ema = EMAModel(self.model.parameters(), decay=0.9999, use_ema_warmup=True)
        self.pipeline = DDIMPipeline(self.model, DDIMScheduler.from_config(self.noise.config))
        self.pipeline.set_progress_bar_config(disable=True)

    def step(self, images):
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, 1000, (len(images),), device=images.device)
        noisy = self.noise.add_noise(images, noise, timesteps)
        with self.accelerator.accumulate(self.prepared):
            loss = F.mse_loss(self.prepared(noisy, timesteps).sample.float(), noise)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.prepared.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())

    def sample(self, count):
        with quiet(), torch.inference_mode(), self.accelerator.autocast():
            images = self.pipeline(
                batch_size=count, num_inference_steps=20, output_type="np"
            ).images
        return to_uint8(torch.from_numpy(images).movedim(-1, 1))


PEERS = {
    "smalldiffusion": SmallDiffusion,
    "denoising-diffusion-pytorch": DenoisingDiffusion,
    "diffusers": Diffusers,
}


def build_peers(parameters, device):
    """The peers that are installed, at the number of parameters nearest to ``parameters``: {name:
    peer}."""
    return {name: peer(parameters, device) for name, peer in PEERS.items() if installed(name)}


def sample_in_chunks(peer, count, chunk=250):
    """``count`` samples of a peer, uint8 (count, 28, 28), a chunk at a time."""
    sizes = [chunk] * (count // chunk) + [count % chunk] * (count % chunk > 0)
    return torch.cat([peer.sample(size) for size in sizes])


# --------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------


def milliseconds(seconds):
    """The median of a list of seconds, as text."""
    return f"{1000 * statistics.median(seconds):.3g} ms"


def ratio(seconds, reference):
    """The median of the ratios of two lists of seconds that were measured in turns, as text."""
    return f"{statistics.median(a / b for a, b in zip(seconds, reference)):.3g}x"


def measure_sampling(contestants, images, repeats):
    """Seconds for 1,000 images of each of {name: function of a count that returns its seconds}:
    {name: list}."""
    for contestant in contestants.values():
        contestant(min(50, images))  # the warm-up
    times = interleave(
        {name: partial(each, images) for name, each in contestants.items()}, repeats, 0
    )
    return {name: [1000 / images * seconds for seconds in each] for name, each in times.items()}


def report_training(stages):
    """Print the step of each stage against its bare step."""
    for stage in stages:
        step, bare = stage.seconds["step"], stage.seconds["bare"]
        print(
            f"  training step, {stage.name}, batch {stage.batch_size}: {milliseconds(step)}, "
            f"{ratio(step, bare)} the bare step ({milliseconds(bare)})"
        )


def report_input(batch_size, times):
    """Print what ``measure_input`` returned."""
    resident = times["resident"]
    against = [
        f"{ratio(resident, other)} with {name} ({milliseconds(other)})"
        for name, other in times.items()
    ][1:]
    print(
        f"  input pipeline, batch {batch_size}: {milliseconds(resident)}; "
        f"against a DataLoader with ToTensor {', '.join(against)}"
    )


def report_peer(name, peer, stage, times, version):
    """Print a peer's step and sampling against those of the version."""
    step, own = stage.seconds[name], stage.seconds["step"]
    print(
        f"  {name} {installed(name)}, {parameter_count(peer.model) / 1e6:.2f} M parameters, "
        f"{precision(stage.arrays[0].device)}: step of {stage.batch_size} images "
        f"{milliseconds(step)}, {ratio(step, own)} the {stage.name} step; "
        f"1,000 images {statistics.median(times[name]):.3g} s, "
        f"{ratio(times[name], times[version])} the version's "
        f"({peer.sampler}: {peer.evaluations} evaluations an image)"
    )


def report_version(version, path, args):
    """Measure a version, and the peers beside it where they are asked for, and print the
    figures."""
    flags = script_flags(args)
    with tempfile.TemporaryDirectory() as folder:
        make_untrained(path, flags, folder)
        sampler = Sampler(path, folder, args.device)
        device = sampler.models.device
        print(f"\n{version}: {sampler.parameters / 1e6:.2f} M parameters, on {hardware(device)}")
        peers = build_peers(sampler.parameters, device) if args.peers else {}

        def peers_steps(stage, images):
            batch = sampler.script.to_float(images[: stage.batch_size])
            return {name: partial(peer.step, batch) for name, peer in peers.items()}

        stages = measure_training(path, flags, args.repeats, peers_steps)
        report_training(stages)
        to_float = sampler.script.to_float
        report_input(
            stages[0].batch_size, measure_input(stages[0], to_float, args.data_dir, args.repeats)
        )
        contestants = {version: sampler.seconds}
        for name, peer in peers.items():
            contestants[name] = lambda count, peer=peer: seconds_of(
                lambda: sample_in_chunks(peer, count), device
            )
        times = measure_sampling(contestants, args.images, args.sampling_repeats)
        print(
            f"  1,000 images: {statistics.median(times[version]):.3g} s ({sampler.description()}: "
            f"{sampler.evaluations():g} evaluations an image)"
        )
        figures = measure_figures(path, flags, folder, args.sampling_repeats, device)
        print(f"  GIFs and path figures: {statistics.median(figures):.3g} s")
        [diffusion] = [stage for stage in stages if stage.name == "diffusion"]
        for name, peer in peers.items():
            report_peer(name, peer, diffusion, times, version)


def main(argv=None):
    """Command line. Exits 2 with one line on bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "versions",
        nargs="*",
        metavar="VERSION",
        help="such as LatentDiffusionModel/v3 (default: all)",
    )
    parser.add_argument(
        "--peers", action="store_true", help=f"also measure what is installed of {', '.join(PEERS)}"
    )
    parser.add_argument(
        "--repeats", type=int, default=20, help="measured steps and blocks (default: 20)"
    )
    parser.add_argument(
        "--sampling-repeats",
        type=int,
        default=3,
        help="measured rounds of sampling and figures (default: 3)",
    )
    parser.add_argument(
        "--images", type=int, default=1000, help="images a round of sampling (default: 1000)"
    )
    parser.add_argument("--device", default="auto", help="as the scripts' flag (default: auto)")
    parser.add_argument(
        "--data-dir", type=Path, default=fe.DEFAULT_DATA_DIR, help="torchvision's root"
    )
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    try:
        versions = find_versions(args.versions)
        pick_device(versions, args.device)
        missing = [name for name in PEERS if not installed(name)] if args.peers else []
        if missing:
            print(
                f"not installed: {', '.join(missing)} (requirements.txt beside this file)",
                file=sys.stderr,
            )
        print(
            f"torch {torch.__version__}, medians of {args.repeats} steps, "
            f"{args.sampling_repeats} rounds of sampling"
        )
        for version, path in versions.items():
            report_version(version, path, args)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
