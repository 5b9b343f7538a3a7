"""
What a training step costs: counted, timed part by part, and held against the same step built from diffusers.

    python benchmark.py                                     # the tiny world's sizes, on the CPU: a minute or two
    python benchmark.py --base random                       # full size with random weights, on a GPU
    python benchmark.py --base random --device meta         # full size, counted alone, work and memory: no weights, no times
    python benchmark.py --base random --device meta --methods    # the same for every method of methods/ (benchmark_methods.py)
    python benchmark.py --base random:64 --size 128 --batch-size 1 --host-memory    # the memory count against a measured step

Work is counted by torch.utils.flop_counter on the very functions that train.py runs, with tensors that have no memory. Time is
measured interleaved: every repeat runs each contender once, so that whatever else the machine does, it does to all of them, and
what counts is the ratio within a repeat. The contenders take the same clips, noise, frames, weights, adapters and reward:

| contender      | UNet and autoencoder | 16 bits                        | decodes      | recomputes in the backward pass |
|----------------|----------------------|--------------------------------|--------------|---------------------------------|
| ours           | model.py             | frozen weights                 | the S scored | nothing (but see --low-memory)  |
| diffusers      | the library's        | autocast, float32 UNet weights | all F        | every part of the UNet          |
| diffusers lean | the library's        | frozen weights                 | the S scored | nothing                         |

`diffusers` is written in the manner of VADER (arXiv:2407.08737, train_t2v_lora.py and its configuration; frames as the official
InstructVideo code decodes them, reward.py:138-162), `lean` as far as the library goes when told what we know of the method: what
remains between it and ours is model.py. Where the library gave a choice, theirs is the cheaper one: text, reward captions and
latents come from the same caches as ours, guidance is one call on a doubled batch, there is no dropout.

Letters: B clips, F frames, S segments, C channels, h and w latent rows and columns, N text tokens, E their width.
"""
import copy
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lora
import train
from formats.names import unet_to_diffusers, vae_to_diffusers
from model import Base, UNet3D, load_base
from reward import aggregate, load_reward, segment_frames, tar_weights
from sampler import check_edit, edit_steps, sample
from support.files import check_folder, write_text
from support.memory import GIB, measure_host_peak, measure_peak
from support.ranks import DTYPES, pick_device, pick_dtype, progress, run_script, sample_generator
from support.settings import check_at_least

PARTS = ("chain", "last step", "decode", "reward", "backward", "optimizer")
CAPTION = "a red circle moving left"
AT_ONCE = (1, 2, 4, 8)  # clips, for which memory is counted
MEMORY_SETTINGS = {"no flag": {}, "--decode-chunk 1": {"decode_chunk": 1},
                   "--checkpoint-activations": {"checkpoint_activations": True}, "--low-memory": {"low_memory": True}}
EVALUATION = "an evaluation"


@dataclass
class Config:
    """Count and time a training step, alone or against the same step on diffusers."""
    base: str = "tiny"
    """tiny, random (full size), random:64 (small), or any other base that train.py takes: only its sizes matter"""
    reward_weights: str | None = None
    """as train.py's; default the base's own, else random ones: a ViT-H/14 for a full-size base, a small CLIP for random:W"""
    batch_size: int = 2
    """clips a step (paper, Sec. 3.3: 8 on 4 GPUs)"""
    tau: float = 0.6
    """how far clips are noised, as a share of the chain (paper, Sec. 4.2)"""
    num_steps: int = 20
    """D, DDIM steps of the whole chain (paper, Sec. 3.3)"""
    frames: int = 16
    """F (paper, Sec. 3.3)"""
    size: int | None = None
    """pixel rows and columns; default what the base was trained on"""
    steps: int = 5
    """repeats: each is one step of every contender"""
    device: str | None = None
    """cuda, mps, cpu, or meta to count alone; default the first of cuda, mps, cpu that is there"""
    dtype: str | None = None
    """float32, bfloat16 or float16 of the frozen weights; default bfloat16 on cuda and meta, else float32"""
    compile: bool = False
    """torch.compile our UNet"""
    checkpoint_activations: bool = False
    """ours recomputes the UNet's blocks in the backward pass, as train.py's flag of that name"""
    low_memory: bool = False
    """ours recomputes, and decodes one frame at a time, as train.py's flag of that name"""
    host_memory: bool = False
    """instead: hold the expected memory of our step, with each memory setting, against what the process grows by on the CPU
    (Linux)"""
    methods: bool = False
    """instead: count a step of each method of methods/ at its preset modelscope's settings, one video at once (needs --device
    meta)"""
    diffusers: bool = True
    """compare with the two steps built from diffusers (pip install -r requirements-dev.txt)"""
    out: Path = Path("out/benchmark.json")
    """the report"""


def check(cfg):
    """All that can be known before anything is loaded."""
    check_at_least(cfg, batch_size=1, steps=1, frames=train.Config.segments)
    check_edit(cfg.tau, cfg.num_steps, train.Config.grad_steps)
    if cfg.host_memory and cfg.device not in (None, "cpu"):
        raise ValueError(f"device {cfg.device!r}: must be cpu with host_memory")
    if cfg.methods and cfg.device != "meta":
        raise ValueError(f"device {cfg.device!r}: must be meta with methods")
    check_folder(cfg.out.parent)
    if cfg.out.is_dir():
        raise ValueError(f"out {cfg.out}: is a folder; it must be a file, there or not")


# ---------------------------------------------------------------------------------------------------------------------
# Splitting a step into its parts

class Meter:
    """
    Splits what a step costs among its parts: `read` gives something that grows (seconds, operations), taken whenever the next
    part begins. The denoiser, the decoder and the reward announce themselves when they are called.
    """

    def __init__(self):
        self.start(lambda: 0)

    def start(self, read):
        self.alike, self.extra = None, 0
        self.read, self.marks, self.calls = read, [("chain", read())], dict.fromkeys(PARTS[:4], 0)

    def enter(self, part):
        self.marks.append((part, self.read()))

    def announce(self, part, items):
        """A network of this part is called on so many items. In the backward pass, which recomputes, it remains backward."""
        if self.marks[-1][0] not in ("backward", "optimizer"):
            self.calls[part] += items
            if self.marks[-1][0] != part:
                self.enter(part)

    def watch(self, denoise):
        """A denoiser that announces its calls. On the meta device those of the chain are alike: one is made, the rest added."""
        def call(z_t, t, text):
            part = "last step" if torch.is_grad_enabled() else "chain"
            self.announce(part, len(z_t))
            if part == "last step" or not z_t.is_meta:
                return denoise(z_t, t, text)
            if self.alike is None:
                before = self.read()
                denoise(z_t, t, text)
                self.alike = self.read() - before
            else:
                self.extra += self.alike
            return torch.empty_like(z_t)
        return call

    def split(self, minus=lambda end, start: end - start):
        """{part: its share}, in the order of PARTS."""
        shares = dict.fromkeys(PARTS, 0)
        for (part, start), (_, end) in zip(self.marks, self.marks[1:]):
            shares[part] += minus(end, start)
        return shares


@dataclass
class Contender:
    """One way to do the step."""
    rewards: Callable
    """clips, noise, text, frames, captions (as train.draw_batch gives them) -> R (B,), Eq. (8), with gradient"""
    parameters: list
    """the adapters, A and B in turn"""
    modules: list = field(default_factory=list)
    """whose weights it must have in memory"""

    def __post_init__(self):
        self.optimizer = torch.optim.AdamW(self.parameters, lr=train.Config.lr, weight_decay=0)

    def step(self, batch, meter):
        """One optimizer step, as in train.train."""
        self.optimizer.zero_grad(set_to_none=False)
        R = self.rewards(batch)
        meter.enter("backward")
        (-R.sum() / len(R)).backward()                                                    # Eq. (9)
        meter.enter("optimizer")
        nn.utils.clip_grad_norm_(self.parameters, train.Config.clip_grad)
        self.optimizer.step()
        meter.enter("end")


# ---------------------------------------------------------------------------------------------------------------------
# The contenders

def announce_calls(base, reward, meter):
    """Let decoder and reward say when they are called, and on how much."""
    base.vae.post_quant_conv.register_forward_pre_hook(lambda _, x: meter.announce("decode", len(x[0])))
    reward.register_forward_pre_hook(lambda _, x: meter.announce("reward", x[0].shape[:2].numel()))


def ours(base, reward, settings, meter):
    """train.edit_rewards on model.py, set up as train.main does."""
    uncond = base.encode_text([""])
    parameters = lora.inject(base.unet, settings.rank)
    base.unet.checkpoint_activations(settings.checkpoint_activations or settings.low_memory)
    if settings.compile:
        base.unet.compile()
    base.denoiser = meter.watch(base.denoiser)
    def rewards(batch):
        return train.edit_rewards(base, reward, uncond, batch, settings)[0]
    return Contender(rewards, parameters, [base.unet, base.vae.decoder, reward])


def recomputed(module):
    """Let a module keep its inputs alone, and run a second time in the backward pass."""
    forward = module.forward
    def run(*args, **kwargs):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)
    module.forward = run


def diffusers_networks(base, dtype):
    """UNet3DConditionModel and AutoencoderKL with our weights, in this dtype: the tensor names are the same."""
    from diffusers import AutoencoderKL, UNet3DConditionModel  # here: only the comparison needs them
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of every change of precision
    structure = unet_to_diffusers(base.unet.config)
    del structure["stem_heads"]  # diffusers has no such field, it is always 8 there
    with torch.device(base.device):
        unet = UNet3DConditionModel.from_config(structure)
        vae = AutoencoderKL.from_config(vae_to_diffusers(base.vae.config))
    unet.load_state_dict({k: v for k, v in base.unet.state_dict().items() if "lora_" not in k})
    vae.load_state_dict(base.vae.state_dict())
    for network in (unet, vae):
        network.requires_grad_(False).eval().to(dtype)
    vae.encoder = None  # ours needs no memory for it either
    return unet, vae


def peft_adapters(unet, base, rank):
    """The UNet with PEFT's adapters, which have the numbers of ours, and their parameters."""
    from peft import LoraConfig, inject_adapter_in_model
    unet = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False,
                                              target_modules=["to_q", "to_k", "to_v", "to_out.0"]), unet)
    parameters = []
    for path, layer in lora.layers(base.unet).items():
        for side in ("lora_A", "lora_B"):
            parameters.append(getattr(unet.get_submodule(path), side)["default"].weight)
            parameters[-1].data = getattr(layer, side).detach().clone()  # float32, whatever the weights are
    return unet, parameters


def checkpoint_blocks(unet):
    """diffusers' 3D UNet has no checkpointing; VADER's copy of it (models/unet_3d_blocks.py) recomputes these."""
    from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
    for module in [*unet.modules()]:
        if isinstance(module, (ResnetBlock2D, TemporalConvLayer, Transformer2DModel, TransformerTemporalModel)):
            recomputed(module)


def on_diffusers(base, reward, settings, meter, lean):
    """The same step on UNet3DConditionModel, AutoencoderKL, DDIMScheduler and PEFT; `lean`: see the table above. After `ours`."""
    from diffusers import DDIMScheduler
    dtype, uncond = base.unet.conv_in.weight.dtype, base.encode_text([""])
    unet, vae = diffusers_networks(base, dtype)
    if not lean:
        unet.float()
    vae.post_quant_conv.register_forward_pre_hook(lambda _, x: meter.announce("decode", len(x[0])))
    unet, parameters = peft_adapters(unet, base, settings.rank)
    if not lean:
        checkpoint_blocks(unet)

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    half = dtype != torch.float32
    first = edit_steps(settings.tau, settings.num_steps)
    denoise = meter.watch(lambda z_t, t, text: unet(z_t.to(unet.dtype), t, encoder_hidden_states=text.to(unet.dtype)).sample)

    def autocast():  # anew for each use: kept open, it would hand the step with gradient the casts made without
        return torch.autocast(base.device.type, dtype) if half and not lean else nullcontext()

    def decode_latents(z):                                          # as in diffusers' TextToVideoSDPipeline
        x = vae.decode((z / vae.config.scaling_factor).transpose(1, 2).flatten(0, 1).to(dtype)).sample
        return x.unflatten(0, (len(z), -1)).float()                                       # (B, F, 3, H, W)

    def rewards(batch):
        z, eps, text, g, captions = batch
        scheduler.set_timesteps(settings.num_steps)
        timesteps = scheduler.timesteps[-first:]
        embeds = torch.cat([uncond.expand(len(z), -1, -1), text])
        z_t = scheduler.add_noise(z, eps, timesteps[:1])
        for i, t in zip(range(first, 0, -1), timesteps):
            with torch.set_grad_enabled(i <= settings.grad_steps), autocast():
                eps_u, eps_c = denoise(scheduler.scale_model_input(torch.cat([z_t, z_t]), t), t, embeds).float().chunk(2)
                z_t = scheduler.step(eps_u + settings.guidance * (eps_c - eps_u), t, z_t).prev_sample
        clips = torch.arange(len(z), device=z.device)[:, None]
        with autocast():
            if lean:
                frames = decode_latents(z_t.transpose(1, 2)[clips, g].transpose(1, 2))    # (B, S, 3, H, W)
            else:
                frames = decode_latents(z_t)[clips, g]
        return aggregate(reward(frames / 2 + .5, captions), tar_weights(g, z.shape[2], settings.lambda_tar))

    return Contender(rewards, parameters, [unet, vae, reward])


# ---------------------------------------------------------------------------------------------------------------------
# What they are run on

def comparable(base):
    """
    A base that diffusers can build too: its 3D UNet always has 8 heads in its first temporal transformer, the tiny world's has
    one. Heads of 8 channels give that layer about the tiny world's width. The weights are random, which costs the same.
    """
    if base.unet.config.stem_heads == 8:
        return base
    w = base.unet.conv_in.weight
    with torch.device(w.device):
        unet = UNet3D(replace(base.unet.config, stem_heads=8, head_dim=8))
    return Base(unet.to(w.dtype).eval().requires_grad_(False), base.vae, base.text_encoder, f"{base.name}, heads of 8 channels")


def load(cfg, device):
    """(base, reward) of a Config, on `device`."""
    dtype = precision(cfg, device)
    with torch.device("meta") if device.type == "meta" and cfg.base.startswith("random") else nullcontext():
        base = load_base(cfg.base, dtype=dtype, device=device)
        own = base.folder and (base.folder / "reward").is_dir()
        random = "random:32" if cfg.base.startswith("random:") else "random"
        reward = load_reward("hpsv2", cfg.reward_weights or (None if own else random), base.folder, dtype, device)
    return comparable(base) if cfg.diffusers else base, reward


def precision(cfg, device):
    """Of the frozen weights; what is counted on meta is counted for a GPU."""
    return pick_dtype(cfg.dtype or ("bfloat16" if device.type == "meta" else None), device)


def on_meta(module, dtype=torch.float32):
    """A copy without numbers or memory, in `dtype`: counting needs shapes alone."""
    memo = {id(t): nn.Parameter(torch.empty_like(t, device="meta", dtype=dtype), requires_grad=False)
            for t in module.parameters()}
    return copy.deepcopy(module, memo).to("meta")


def without_numbers(base, reward, dtype):
    """Copies on meta in `dtype`, the base with adapters and with the features of its captions."""
    base = Base(on_meta(base.unet, dtype), on_meta(base.vae, dtype), on_meta(base.text_encoder), base.name)
    base.texts = {caption: torch.empty(base.text_encoder.config.context_length, base.text_encoder.config.width, device="meta")
                  for caption in ("", CAPTION)}
    lora.inject(base.unet, train.Config.rank)
    return base, on_meta(reward, dtype)


def synthetic(base, cfg):
    """A batch as train.draw_batch gives it, of noise: what the numbers are costs nothing."""
    size = cfg.size or base.default_size
    shape = (cfg.batch_size, base.vae.config.latent_channels, cfg.frames, *base.latent_size(size, size))
    generator = sample_generator(0, "benchmark")
    z, eps = (torch.randn(shape, generator=generator).to(base.device) for _ in range(2))  # (B, C, F, h, w)
    captions = [CAPTION] * cfg.batch_size
    g = segment_frames(cfg.frames, train.Config.segments, cfg.batch_size, generator).to(base.device)
    return z, eps, base.encode_text(captions), g, captions


def contenders(base, reward, cfg, meter):
    """{name: Contender}, all on the same weights. The base is theirs from here on: it gets adapters."""
    settings = replace(train.PRESETS["modelscope"], tau=cfg.tau, num_steps=cfg.num_steps, compile=cfg.compile,
                       checkpoint_activations=cfg.checkpoint_activations, low_memory=cfg.low_memory)
    announce_calls(base, reward, meter)
    found = {"ours": ours(base, reward, settings, meter)}
    if cfg.diffusers:
        found["diffusers"] = on_diffusers(base, reward, settings, meter, lean=False)
        found["diffusers lean"] = on_diffusers(base, reward, settings, meter, lean=True)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Counting

def count_step(contender, batch, meter):
    """TFLOP of one step on the meta device, {part: TFLOP}, and what the networks were called on, {part: items}."""
    with FlopCounterMode(display=False) as counter:
        meter.start(lambda: counter.get_total_flops() + meter.extra)
        contender.step(batch, meter)
    return {part: flop / 1e12 for part, flop in meter.split().items()}, meter.calls


def count(base, reward, cfg):
    """{contender: (TFLOP of its parts, items of its parts)} of a step, from the shapes of base and reward alone."""
    texts = {caption: base.encode_text([caption])[0].to("meta", torch.float32) for caption in ("", CAPTION)}
    base = Base(on_meta(base.unet), on_meta(base.vae), base.text_encoder, base.name)
    base.texts = texts  # once a caption, not once a step
    reward, meter, cfg, batch = on_meta(reward), Meter(), replace(cfg, compile=False), synthetic(base, cfg)
    reward.text_features(batch[-1])  # the same
    return {name: count_step(c, batch, meter) for name, c in contenders(base, reward, cfg, meter).items()}


def count_memory(base, reward, cfg, dtype, at_once=AT_ONCE):
    """
    {memory setting: {clips at once: GiB of a step at its peak, as Peak.in_gib}} of ours, for weights in this dtype. Also
    EVALUATION, of videos at once; its chain needs the most of it.
    """
    base, reward = without_numbers(base, reward, dtype)
    uncond, modules, found = base.encode_text([""]), [base.unet, base.vae.decoder, reward], {}
    for name, flags in (MEMORY_SETTINGS | {EVALUATION: {}}).items():
        # One step of the chain has gradient; those without leave nothing behind, so one step is as good as all.
        settings = replace(train.PRESETS["modelscope"], num_steps=1, tau=1., **flags)
        base.unet.checkpoint_activations(settings.checkpoint_activations or settings.low_memory)

        def peak(number, settings=settings, samples=name == EVALUATION):
            batch = synthetic(base, replace(cfg, batch_size=number))
            reward.text_features(batch[-1])  # made once a caption, not once a step
            def run():
                if samples:
                    return sample(base.denoiser, batch[1], batch[2], uncond, num_steps=1)
                return train.edit_rewards(base, reward, uncond, batch, settings)[0]
            with torch.set_grad_enabled(not samples):
                return measure_peak(run, modules).in_gib()

        # Every clip adds as much as the one before: all tensors but the weights have a row for each.
        one, two = peak(1), peak(2)
        found[name] = {n: {k: one[k] + (n - 1) * (two[k] - one[k]) for k in one} for n in at_once}
    return found


def count_methods(base, reward, cfg, dtype):
    """benchmark_methods.count_methods, from the shapes of base and reward, with this benchmark's sizes and memory settings."""
    import benchmark_methods  # here: only --methods needs all methods
    base, reward, meter = *without_numbers(base, reward, dtype), Meter()
    announce_calls(base, reward, meter)
    base.unet.checkpoint_activations(cfg.checkpoint_activations or cfg.low_memory)
    return benchmark_methods.count_methods(base, reward, meter, cfg.tau, dict(
        num_steps=cfg.num_steps, frames=cfg.frames, size=cfg.size, low_memory=cfg.low_memory,
        checkpoint_activations=cfg.checkpoint_activations))


def hold_memory(base, reward, cfg, dtype):
    """{memory setting: GiB that are expected of our step on top of the weights, those measured, and their ratio}, on the CPU."""
    counted = count_memory(base, reward, cfg, dtype, (cfg.batch_size,))
    batch, uncond, parameters = synthetic(base, cfg), base.encode_text([""]), lora.inject(base.unet, train.Config.rank)
    base.release_encoders()
    reward.text_features(batch[-1])

    def step(settings):
        for p in parameters:
            p.grad = None
        train.edit_rewards(base, reward, uncond, batch, settings)[0].sum().backward()

    found = {}
    for name, flags in progress(MEMORY_SETTINGS.items(), "measuring", leave=False):
        settings = replace(train.PRESETS["modelscope"], num_steps=1, tau=1., **flags)  # as in count_memory
        base.unet.checkpoint_activations(settings.checkpoint_activations or settings.low_memory)
        expected = counted[name][cfg.batch_size]
        expected = expected["total"] - expected["weights"]
        measured = measure_host_peak(lambda: step(settings)) / GIB  # noqa: B023
        found[name] = {"expected": expected, "measured": measured, "ratio": measured / expected}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Timing

def clock(device):
    """(a function that reads the device's time, one that gives the seconds between two readings)."""
    if device.type == "cuda":  # events stand in the GPU's own queue: nothing waits for a reading
        def read():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return read, lambda end, start: start.elapsed_time(end) / 1000
    def read():
        synchronize(device)
        return time.perf_counter()
    return read, lambda end, start: end - start


def synchronize(device):
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def time_step(contender, batch, meter, device):
    """{part: seconds} of one step."""
    read, minus = clock(device)
    synchronize(device)
    meter.start(read)
    contender.step(batch, meter)
    synchronize(device)
    return meter.split(minus)


def matrix_rate(device, dtype):
    """TFLOP/s of a large matrix product, which is what there is to be had."""
    n = 8192 if device.type == "cuda" else 1024
    a, read, times = torch.randn(n, n, device=device).to(dtype), *clock(device)[:1], 4
    a @ a
    start = read()
    for _ in range(times):
        a @ a
    end = read()
    synchronize(device)
    return times * 2 * n**3 / clock(device)[1](end, start) / 1e12


def spread(values):
    """Least, median and greatest of some numbers."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def peak_memory(device, contender, run):
    """GiB that a contender needs on cuda: its weights, and what a step adds to them. None elsewhere."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.reset_peak_memory_stats(device)
    before, result = torch.cuda.memory_allocated(device), run()
    weights = {t.data_ptr(): t.nbytes for m in contender.modules for t in (*m.parameters(), *m.buffers())}
    return result, (torch.cuda.max_memory_allocated(device) - before + sum(weights.values())) / 2**30


def time_all(base, reward, cfg, device, bar):
    """{contender: {"seconds", "peak_gib"}}, and the matrix rate; what a repeat gave stands at the same place everywhere."""
    meter, batch = Meter(), synthetic(base, cfg)
    field_ = contenders(base, reward, cfg, meter)
    seconds, peaks, rates = {name: [] for name in field_}, {}, []
    for repeat in range(-1, cfg.steps):  # the first one warms up, and is where memory would run out
        for name in [*field_][::1 if repeat % 2 else -1]:
            try:
                parts, peak = peak_memory(device, field_[name], lambda c=field_[name]: time_step(c, batch, meter, device))
            except torch.OutOfMemoryError:
                field_.pop(name)
                torch.cuda.empty_cache()
                continue
            if repeat >= 0:
                seconds[name].append(parts)
                peaks[name] = max(peak, peaks.get(name) or 0) if peak else None
            bar.update()
        rates += [matrix_rate(device, precision(cfg, device))] if repeat >= 0 else []
    return {name: {"seconds": seconds[name], "peak_gib": peaks.get(name)} for name in seconds}, statistics.median(rates)


# ---------------------------------------------------------------------------------------------------------------------
# The report

def machine(device):
    """What it ran on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        cpu = next((line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    found = {"system": platform.platform(), "cpu": cpu, "threads": torch.get_num_threads(), "device": str(device)}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {"gpu": p.name, "gpu_gib": round(p.total_memory / 2**30, 1)}
    return found


def process_peak():
    """GiB of this process at its largest, all contenders together; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def measure(cfg, command=None):
    """The whole report, as plain values."""
    check(cfg)
    if cfg.methods:
        cfg = replace(cfg, batch_size=1, diffusers=False)
    device = torch.device("meta") if cfg.device == "meta" else pick_device("cpu" if cfg.host_memory else cfg.device)
    base, reward = load(cfg, device)
    counted = {} if cfg.host_memory or cfg.methods else count(base, reward, cfg)
    report = {"command": command, "machine": machine(device), "settings": asdict(cfg) | {"out": str(cfg.out)},
              "versions": {"python": platform.python_version()} | {
                  name: metadata.version(name) for name in ("torch", "open_clip_torch", "diffusers", "peft", "transformers")
                  if cfg.diffusers or name in ("torch", "open_clip_torch")},
              "base": base.name, "dtype": next(k for k, v in DTYPES.items() if v == precision(cfg, device)),
              "matrix_tflops": None, "contenders": {}, "slower": {}, "process_peak_gib": None}
    timed = {}
    if cfg.host_memory:
        report["host_memory"] = hold_memory(base, reward, cfg, precision(cfg, device))
    elif cfg.methods:
        report["methods"] = count_methods(base, reward, cfg, precision(cfg, device))
    elif device.type == "meta":
        report["memory"] = count_memory(base, reward, cfg, precision(cfg, device))
    else:
        base.release_encoders()
        with progress(None, "timing", len(counted) * (cfg.steps + 1), unit="step", leave=False) as bar:
            timed, report["matrix_tflops"] = time_all(base, reward, cfg, device, bar)
    for name, (tflop, calls) in counted.items():
        row = {"tflop": tflop | {"step": sum(tflop.values())}, "calls": calls, "seconds": None, "peak_gib": None,
               "tflops": None, "share_of_matrix_rate": None}
        if repeats := timed.get(name, {}).get("seconds"):
            totals = [sum(parts.values()) for parts in repeats]
            row["seconds"] = {p: spread([parts[p] for parts in repeats]) for p in PARTS} | {"step": spread(totals)}
            row["peak_gib"] = timed[name]["peak_gib"]
            row["tflops"] = row["tflop"]["step"] / row["seconds"]["step"]["median"]
            row["share_of_matrix_rate"] = row["tflops"] / report["matrix_tflops"]
            if name != "ours" and timed["ours"]["seconds"]:
                mine = [sum(parts.values()) for parts in timed["ours"]["seconds"]]
                report["slower"][name] = spread([t / m for t, m in zip(totals, mine)])
        report["contenders"][name] = row
    report["process_peak_gib"] = None if cfg.host_memory else process_peak()
    return report


def table(report):
    """The report as text for the terminal."""
    cfg, rows = report["settings"], report["contenders"]
    where = report["machine"].get("gpu") or report["machine"]["cpu"]
    lines = [f"base {report['base']}, {cfg['batch_size']} clips of {cfg['frames']} frames, {report['dtype']}, on {where} "
             f"({report['machine']['device']}, {report['machine']['threads']} threads)"]
    if rows:
        lines.append(f"{'':16s}" + "".join(f"{p:>11s}" for p in (*PARTS, "step")))
    for name, row in rows.items():
        lines.append(f"{name:16s}" + "".join(f"{row['tflop'][p]:11.4g}" for p in (*PARTS, "step")) + "  TFLOP")
        if row["seconds"]:
            lines.append(f"{'':16s}" + "".join(f"{row['seconds'][p]['median']:11.4g}" for p in (*PARTS, "step")) + "  s")
            lines.append(f"{'':16s}{row['tflops']:.4g} TFLOP/s, {row['share_of_matrix_rate']:.0%} of the matrix product's rate"
                         + (f", {row['peak_gib']:.1f} GiB" if row["peak_gib"] else ""))
        elif report["matrix_tflops"]:
            lines.append(f"{'':16s}out of memory")
    for name, s in report["slower"].items():
        lines.append(f"{name} takes {s['median']:.2f}x our time ({s['min']:.2f} to {s['max']:.2f} over {cfg['steps']} repeats), "
                     f"{rows[name]['tflop']['step'] / rows['ours']['tflop']['step']:.2f}x our work")
    if report.get("methods"):
        from benchmark_methods import table as methods_table
        lines += methods_table(report["methods"])
    if report.get("memory"):
        lines += memory_table(report["memory"])
    for name, gib in report.get("host_memory", {}).items():
        lines.append(f"{name:26s}expected {gib['expected']:.2f} GiB on top of the weights, measured {gib['measured']:.2f}: "
                     f"{gib['ratio']:.2f} times as much")
    if report["process_peak_gib"]:
        lines.append(f"the whole process: {report['process_peak_gib']:.2f} GiB at its peak")
    if not torch.cuda.is_available():
        lines.append("cuda: not yet run, no such device here")
    return "\n".join(lines)


def memory_table(memory):
    """Expected peak memory as lines of text: what a step needs, of it weights, saved activations and what comes and goes."""
    lines = ["", "expected peak memory of our step, GiB: total (saved activations + transients, on top of the weights)"]
    counts = next(iter(memory.values()))
    lines.append(f"{'clips at once':26s}" + "".join(f"{n:>22}" for n in counts))
    for name, peaks in memory.items():
        lines.append(f"{name:26s}" + "".join(
            f"{p['total']:8.1f} ({p['saved']:5.1f} + {p['transient']:.1f})".rjust(22) for p in peaks.values()))
    weights = next(iter(counts.values()))["weights"]
    return [*lines, f"weights: {weights:.1f} GiB; workspaces of kernels and gaps between tensors come on top"]


def main(cfg, argv):
    """Measure, write the JSON, print the table."""
    report = measure(cfg, shlex.join(["python", "benchmark.py", *argv]))
    write_text(cfg.out, json.dumps(report, indent=1) + "\n")
    print(table(report))
    print(f"report: {cfg.out}")


if __name__ == "__main__":
    run_script("benchmark.py", lambda: main(tyro.cli(Config, description=__doc__), sys.argv[1:]))
