"""
What a training step costs: work and memory counted from shapes alone, time measured against the same step built from diffusers.

    python benchmark.py                                     # the tiny world's sizes, on the CPU: a minute or two
    python benchmark.py --base random                       # full size with random weights, on a GPU
    python benchmark.py --base random --device meta         # full size, counted alone: no weights, no times
    python benchmark.py --base random --device meta --methods    # the same for every method of methods/

Counting runs train.py's own functions on the meta device, whose tensors have shapes and no memory. In timing a repeat runs every
contender once, and what counts is the ratio within a repeat, so that a busy machine slows all of them alike. They take the same
clips, noise, frames, weights, adapters and reward:

| contender      | UNet and autoencoder | 16 bits                        | decodes      | recomputes in the backward pass |
|----------------|----------------------|--------------------------------|--------------|---------------------------------|
| ours           | model.py             | frozen weights                 | the S scored | nothing (but see --low-memory)  |
| diffusers      | the library's        | autocast, float32 UNet weights | all F        | every part of the UNet          |
| diffusers lean | the library's        | frozen weights                 | the S scored | nothing                         |

`diffusers` is in the manner of VADER (arXiv:2407.08737, train_t2v_lora.py; decoding as in InstructVideo's reward.py:138-162), and
`lean` knows of the method what we know. Where the library gave a choice, theirs is the cheaper one: text, reward captions and
latents are cached, guidance is one call on a doubled batch, no dropout.

Letters: B clips, F frames, S segments, C channels, h and w latent rows and columns, N text tokens, E their width.
"""
import copy
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
import weakref
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch
import tyro
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing as recompute
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lora
import train
from formats.names import unet_to_diffusers, vae_to_diffusers
from methods import ddpo, dpo, draft, refl, rwr, vader
from model import Base, UNet3D, load_base
from reward import aggregate, load_reward, segment_frames, tar_weights
from sampler import check_edit, edit_steps, sample
from support.files import check_folder, write_text
from support.ranks import pick_device, pick_dtype, progress, run_script, sample_generator
from support.settings import check_at_least

GIB = 2**30
CAPTION = "a red circle moving left"
PARTS = ("chain", "last step", "decode", "reward", "backward", "optimizer")
MEMORY_SETTINGS = {"no flag": {}, "--decode-chunk 1": {"decode_chunk": 1},
                   "--checkpoint-activations": {"checkpoint_activations": True}, "--low-memory": {"low_memory": True},
                   "an evaluation": {}}

# ---------------------------------------------------------------------------------------------------------------------
# A step and its parts

class Meter:
    """
    Divides what a step costs among its PARTS. `read` returns something that only grows, seconds or operations, and is read when
    another part begins. The step itself does not say which part it is in, so the networks call `announce` when they run.
    """

    def start(self, read):
        """Forget the last step and begin with another."""
        self.read = read
        self.readings = [("chain", read())]
        self.calls = dict.fromkeys(PARTS[:4], 0)  # items that each network was called on
        self.chain_calls = 0                      # on meta, where they all cost the same: only the first is made

    def enter(self, part):
        self.readings.append((part, self.read()))

    def announce(self, part, items):
        """A network of this part runs on so many items. Where the backward pass recomputes, the part remains backward."""
        current = self.readings[-1][0]
        if current not in ("backward", "optimizer"):
            self.calls[part] += items
            if part != current:
                self.enter(part)

    def watch(self, denoise):
        """A denoiser that announces its calls."""
        def call(z_t, t, text):
            part = "last step" if torch.is_grad_enabled() else "chain"
            self.announce(part, len(z_t))
            if part == "chain" and z_t.is_meta:
                self.chain_calls += 1
                if self.chain_calls > 1:
                    return torch.empty_like(z_t)
            return denoise(z_t, t, text)
        return call

    def watch_pictures(self, module, part):
        """Let a module that takes pictures (..., C, H, W) announce its calls."""
        module.register_forward_pre_hook(lambda _, inputs: self.announce(part, inputs[0].shape[:-3].numel()))

    def split(self):
        """{part: its share}, in the order of PARTS."""
        shares = dict.fromkeys(PARTS, 0)
        for (part, start), (_, end) in zip(self.readings, self.readings[1:]):
            shares[part] += end - start
        shares["chain"] *= max(1, self.chain_calls)
        return shares


class Contender:
    """One way to compute the step: rewards(a batch as train.draw_batch gives it) -> R (B,) of Eq. (8), with gradient."""

    def __init__(self, rewards, parameters, modules):
        self.rewards = rewards
        self.parameters = parameters  # the adapters, A and B in turn
        self.modules = modules        # whose weights must be in memory
        self.optimizer = torch.optim.AdamW(parameters, lr=train.Config.lr, weight_decay=0)

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


def contenders(base, reward, cfg, meter):
    """{name: Contender}, all on the same weights. The base is changed: adapters, and a denoiser that announces its calls."""
    settings = replace(train.PRESETS["modelscope"], tau=cfg.tau, num_steps=cfg.num_steps, low_memory=cfg.low_memory)
    uncond = base.encode_text([""])
    meter.watch_pictures(reward, "reward")
    meter.watch_pictures(base.vae.post_quant_conv, "decode")
    base.denoiser = meter.watch(base.denoiser)

    # Ours is set up as in train.main.
    parameters = lora.inject(base.unet, settings.rank)
    base.unet.checkpoint_activations(cfg.checkpoint_activations or cfg.low_memory)
    if cfg.compile:
        base.unet.compile()

    def rewards(batch):
        return train.edit_rewards(base, reward, uncond, batch, settings)[0]
    found = {"ours": Contender(rewards, parameters, [base.unet, base.vae.decoder, reward])}
    if cfg.diffusers:
        found["diffusers"] = on_diffusers(base, reward, settings, meter, lean=False)
        found["diffusers lean"] = on_diffusers(base, reward, settings, meter, lean=True)
    return found


def diffusers_networks(base, dtype, rank):
    """UNet3DConditionModel with PEFT's adapters, AutoencoderKL, all with our numbers and names, and the adapters' parameters."""
    from diffusers import AutoencoderKL, UNet3DConditionModel
    from diffusers.utils import logging
    from peft import LoraConfig, inject_adapter_in_model

    logging.set_verbosity_error()  # it warns of every change of precision
    structure = unet_to_diffusers(base.unet.config)
    del structure["stem_heads"]  # diffusers has no such field, it is always 8 there
    with torch.device(base.device):
        unet = UNet3DConditionModel.from_config(structure)
        vae = AutoencoderKL.from_config(vae_to_diffusers(base.vae.config))
    unet.load_state_dict({k: v for k, v in base.unet.state_dict().items() if "lora_" not in k})
    vae.load_state_dict(base.vae.state_dict())
    unet.requires_grad_(False).eval().to(dtype)
    vae.requires_grad_(False).eval().to(base.dtype)
    vae.encoder = None  # ours needs no memory for it either

    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    unet = inject_adapter_in_model(config, unet)
    parameters = []
    for path, layer in lora.layers(base.unet).items():
        for side in ("lora_A", "lora_B"):
            weight = getattr(unet.get_submodule(path), side)["default"].weight
            weight.data = getattr(layer, side).detach().clone()  # float32, whatever the weights are
            parameters.append(weight)
    return unet, vae, parameters


def on_diffusers(base, reward, settings, meter, lean):
    """The step on diffusers' networks and DDIMScheduler; `lean`: see the table above. After `ours`, whose adapters it copies."""
    from diffusers import DDIMScheduler
    from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    uncond = base.encode_text([""])
    unet, vae, parameters = diffusers_networks(base, base.dtype if lean else torch.float32, settings.rank)
    meter.watch_pictures(vae.post_quant_conv, "decode")
    if not lean:  # diffusers' 3D UNet cannot recompute anything; VADER's copy (models/unet_3d_blocks.py) recomputes these blocks
        blocks = (ResnetBlock2D, TemporalConvLayer, Transformer2DModel, TransformerTemporalModel)
        recompute(unet, check_fn=lambda module: isinstance(module, blocks))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    steps = edit_steps(settings.tau, settings.num_steps)
    denoise = meter.watch(lambda z_t, t, text: unet(z_t.to(unet.dtype), t, encoder_hidden_states=text.to(unet.dtype)).sample)

    def autocast():  # a new one for each use: kept open, it would hand the step with gradient the casts made without
        return nullcontext() if lean or base.dtype == torch.float32 else torch.autocast(base.device.type, base.dtype)

    def decode_latents(z):                                          # as in diffusers' TextToVideoSDPipeline
        x = vae.decode((z / vae.config.scaling_factor).transpose(1, 2).flatten(0, 1).to(base.dtype)).sample
        return x.unflatten(0, (len(z), -1)).float()                                       # (B, F, 3, H, W)

    def rewards(batch):
        z, eps, text, g, captions = batch
        scheduler.set_timesteps(settings.num_steps)
        timesteps = scheduler.timesteps[-steps:]
        embeds = torch.cat([uncond.expand(len(z), -1, -1), text])
        z_t = scheduler.add_noise(z, eps, timesteps[:1])
        for i, t in zip(range(steps, 0, -1), timesteps):
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


def load(cfg, device):
    """(base, reward) of a Config, on `device`. What is counted on meta is counted for a GPU, so in bfloat16."""
    is_meta = device.type == "meta"
    dtype = pick_dtype(cfg.dtype or ("bfloat16" if is_meta else None), device)
    with torch.device("meta") if is_meta and cfg.base.startswith("random") else nullcontext():
        base = load_base(cfg.base, dtype=dtype, device=device)
        reward_weights = cfg.reward_weights
        if not reward_weights and not (base.folder and (base.folder / "reward").is_dir()):
            reward_weights = "random:32" if cfg.base.startswith("random:") else "random"
        reward = load_reward("hpsv2", reward_weights, base.folder, dtype, device)
    if not cfg.diffusers or base.unet.config.stem_heads == 8:
        return base, reward

    # diffusers' 3D UNet always has 8 heads in its first temporal transformer, the tiny world's has one. Heads of 8 channels give
    # that layer about the tiny world's width. The weights are random, which costs the same.
    with torch.device(device):
        unet = UNet3D(replace(base.unet.config, stem_heads=8, head_dim=8))
    unet.to(dtype).eval().requires_grad_(False)
    return Base(unet, base.vae, base.text_encoder, f"{base.name}, heads of 8 channels"), reward


def without_numbers(base, reward, dtype=torch.float32):
    """Copies on meta in `dtype`. Text is encoded once a caption and not once a step, so its features are there already."""
    unet, vae, reward = [copy.deepcopy(module).to("meta", dtype) for module in (base.unet, base.vae, reward)]
    base = Base(unet, vae, copy.deepcopy(base.text_encoder).to("meta"), base.name)
    base.encode_text(["", CAPTION])
    reward.text_features([CAPTION])
    return base, reward


def synthetic(base, cfg, batch_size):
    """A batch as train.draw_batch gives it, of noise: the numbers do not change the cost."""
    size = cfg.size or base.default_size
    shape = (batch_size, base.vae.config.latent_channels, cfg.frames, *base.latent_size(size, size))
    generator = sample_generator(0, "benchmark")
    z = torch.randn(shape, generator=generator).to(base.device)                           # (B, C, F, h, w)
    eps = torch.randn(shape, generator=generator).to(base.device)                         # (B, C, F, h, w)
    g = segment_frames(cfg.frames, train.Config.segments, batch_size, generator).to(base.device)
    return z, eps, base.encode_text([CAPTION] * batch_size), g, [CAPTION] * batch_size


# ---------------------------------------------------------------------------------------------------------------------
# Counting work and memory

def count_work(run, meter):
    """{"tflop": {part: ...}, "calls": {part: items that its network was called on}} of run() and its result's backward pass."""
    with FlopCounterMode(display=False) as counter:
        meter.start(counter.get_total_flops)
        result = run()
        if isinstance(result, torch.Tensor) and result.requires_grad:
            meter.enter("backward")
            result.sum().backward()
        meter.enter("end")
    tflop = {part: operations / 1e12 for part, operations in meter.split().items()}
    return {"tflop": tflop | {"step": sum(tflop.values())}, "calls": meter.calls}


def count(base, reward, cfg):
    """{contender: its work in a step, as count_work}, from shapes alone."""
    base, reward = without_numbers(base, reward)
    batch = synthetic(base, cfg, cfg.batch_size)
    meter = Meter()
    found = contenders(base, reward, replace(cfg, compile=False), meter)
    return {name: count_work(partial(contender.rewards, batch), meter) for name, contender in found.items()}


class Alive(TorchDispatchMode):
    """
    Counts the bytes of storages that operations make on meta: those there now, and the most there were. Each counts until nothing
    refers to it any more, as for an allocator, so the order in which a backward pass frees what was saved for it matters too.
    """

    def __init__(self, known):
        super().__init__()
        self.known = set(known)  # ids of storages that are not to be counted, or not again
        self.now = 0
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def forget(self, name, size):
        """The storage is gone, and a new one may get its id."""
        self.known.discard(name)
        self.now -= size


def storages(modules):
    """{id: bytes} of the storages of all parameters and buffers."""
    found = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return found


def measure_peak(forward, modules):
    """
    GiB that forward() and the backward pass of its result, if that has a gradient, need at the worst moment, all on meta.

    {"weights": those of `modules`; "saved": kept for the backward pass, beyond the weights; "transient": what else is there at
    the worst moment; "total"}. Workspaces of kernels, and what an allocator loses between tensors, come on top.
    """
    weights = storages(modules)
    saved = {}
    attention = nn.functional.scaled_dot_product_attention

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    def in_one_kernel(q, k, v, attn_mask=None, dropout_p=0., is_causal=False, **more):
        if attn_mask is None and q.is_meta and q.dim() == 4:  # else torch would make the matrix of all pairs, on meta alone
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
        return attention(q, k, v, attn_mask, dropout_p, is_causal, **more)

    with mock.patch.object(nn.functional, "scaled_dot_product_attention", in_one_kernel), Alive(weights) as alive:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = forward()
        if isinstance(result, torch.Tensor) and result.requires_grad:
            result.sum().backward()
    found = {"weights": sum(weights.values()), "saved": sum(saved.values())}
    found["transient"] = max(0, alive.most - found["saved"])
    found["total"] = found["weights"] + alive.most
    return {name: size / GIB for name, size in found.items()}


def count_memory(base, reward, cfg, at_once=(1, 2, 4, 8)):
    """{memory setting: {clips at once: as measure_peak}} of our step, and of an evaluation, of which the chain needs the most."""
    base, reward = without_numbers(base, reward, base.dtype)
    lora.inject(base.unet, train.Config.rank)
    uncond = base.encode_text([""])

    def peak(name, settings, clips):
        batch = synthetic(base, cfg, clips)
        def run():
            if name != "an evaluation":
                return train.edit_rewards(base, reward, uncond, batch, settings)[0]
            with torch.no_grad():
                return sample(base.denoiser, batch[1], batch[2], uncond, num_steps=1)
        return measure_peak(run, [base.unet, base.vae.decoder, reward])

    found = {}
    for name, flags in MEMORY_SETTINGS.items():
        # One step of the chain has gradient; those without leave nothing behind, so one step is as good as all.
        settings = replace(train.PRESETS["modelscope"], num_steps=1, tau=1., **flags)
        base.unet.checkpoint_activations(settings.checkpoint_activations or settings.low_memory)

        # Every clip adds as much as the one before: all tensors but the weights have a row for each.
        one = peak(name, settings, 1)
        two = peak(name, settings, 2)
        found[name] = {}
        for clips in at_once:
            found[name][clips] = {part: one[part] + (clips - 1) * (two[part] - one[part]) for part in one}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The methods of methods/: what one video of an optimizer step takes, at the settings of their presets "modelscope"

METHODS = {"InstructVideo": train, "draft": draft, "refl": refl, "vader": vader, "ddpo": ddpo, "rwr": rwr, "dpo": dpo}
ROUND_OF_ONE = {"ddpo": {"updates": 1}, "rwr": {"videos": 1}, "dpo": {"pairs": 1}}


class Zeros(TorchDispatchMode):
    """What a program reads off a tensor without memory, such as a loss to log or rewards to compare, is 0."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        if function is torch.ops.aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **kwargs)


def draw_and_score(name, cfg, base, reward, folder):
    """The two functions of a method: draw(step) -> a batch, score(batch) -> R with gradient, and what is logged."""
    if name == "InstructVideo":  # on noise, as its own draw reads clips
        uncond = base.encode_text([""])
        return lambda step: synthetic(base, cfg, 1), lambda batch: train.edit_rewards(base, reward, uncond, batch, cfg)
    method = METHODS[name].method(cfg, base, reward, folder)
    return method.draw, method.score


def parts_of_a_step(name, cfg, base, reward, measure):
    """[(how often for each video of an optimizer step, measure(it))]: draw a batch, score an entry of it; DPO's are pairs."""
    draws = 1
    if name in ("rwr", "dpo"):  # a round serves many steps
        draws = cfg.rounds * (cfg.videos if name == "rwr" else cfg.pairs) / (cfg.steps * cfg.batch_size)
    with tempfile.TemporaryDirectory() as folder, Zeros():
        draw, score = draw_and_score(name, replace(cfg, batch_size=1, **ROUND_OF_ONE.get(name, {})), base, reward, Path(folder))
        steps = [0]
        if name == "refl":  # its chain stops at a random step; the mean is that of the first and the last
            stops = {draw(step)[-1][0]: step for step in range(100)}
            steps = [stops[min(stops)], stops[max(stops)]]
        divisor = len(steps) * (2 if name == "dpo" else 1)
        parts = []
        for step in steps:
            batches = []
            parts.append((draws / divisor, measure(lambda: batches.append(draw(step)))))  # noqa: B023
            entry = train.split_batch(batches[0], 1)[0]
            parts.append((len(batches[0][0]) / divisor, measure(lambda: score(entry)[0])))  # noqa: B023
    return parts


def count_methods(base, reward, cfg):
    """{method: passes of a video through the denoiser (guidance takes two), frames decoded, TFLOP, and peak as measure_peak}."""
    base, reward = without_numbers(base, reward, base.dtype)
    lora.inject(base.unet, train.Config.rank)
    base.unet.checkpoint_activations(cfg.checkpoint_activations or cfg.low_memory)
    modules = [base.unet, base.vae.decoder, reward]
    meter = Meter()
    base.denoiser = meter.watch(base.denoiser)
    meter.watch_pictures(base.vae.post_quant_conv, "decode")

    def peak_of(run):
        meter.start(lambda: 0)
        return measure_peak(run, modules)

    found = {}
    for name, module in METHODS.items():
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompts:
            print(CAPTION, file=prompts, flush=True)
            own = {"tau": cfg.tau} if name == "InstructVideo" else {"prompts_train": Path(prompts.name)}
            settings = replace(module.PRESETS["modelscope"], num_steps=cfg.num_steps, frames=cfg.frames, size=cfg.size,
                               low_memory=cfg.low_memory, checkpoint_activations=cfg.checkpoint_activations, **own)
            works = parts_of_a_step(name, settings, base, reward, partial(count_work, meter=meter))
            # Chain steps leave nothing behind but their last, so one step is as good as all.
            peaks = parts_of_a_step(name, replace(settings, num_steps=1, tau=1.), base, reward, peak_of)
        found[name] = {
            "without_gradient": sum(times * work["calls"]["chain"] for times, work in works),
            "with_gradient": sum(times * work["calls"]["last step"] for times, work in works),
            "frames": sum(times * work["calls"]["decode"] for times, work in works),
            "tflop": sum(times * work["tflop"]["step"] for times, work in works),
            "peak_gib": max((peak for _, peak in peaks), key=lambda peak: peak["total"])}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Timing

def now(device):
    """Seconds, read once the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def matrix_rate(device, dtype):
    """TFLOP/s of a large matrix product, the most that can be had."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device).to(dtype)
    matrix @ matrix  # warms up
    start = now(device)
    for _ in range(4):
        matrix @ matrix
    return 4 * 2 * side**3 / (now(device) - start) / 1e12


def spread(values):
    """Least, median and greatest of some numbers."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def time_step(contender, batch, meter, device):
    """({part: seconds} of a step, GiB of GPU memory that it needs: the contender's weights, and what the step adds)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        weights = sum(storages(contender.modules).values()) - torch.cuda.memory_allocated()  # less those of the others
    meter.start(partial(now, device))
    contender.step(batch, meter)
    parts = meter.split()
    peak = (weights + torch.cuda.max_memory_allocated()) / GIB if device.type == "cuda" else None
    return parts | {"step": sum(parts.values())}, peak


def time_all(base, reward, cfg, device):
    """({contender: {part: [seconds of each repeat]}}, {contender: GiB on cuda}, TFLOP/s of a matrix product)."""
    meter = Meter()
    meter.start(partial(now, device))
    batch = synthetic(base, cfg, cfg.batch_size)
    running = contenders(base, reward, cfg, meter)
    seconds = {name: {} for name in running}
    peaks = {}
    rates = []
    for repeat in progress(range(-1, cfg.steps), "timing", unit="repeat", leave=False):
        for name in sorted(running, reverse=repeat % 2 == 0):
            try:
                parts, peaks[name] = time_step(running[name], batch, meter, device)
            except torch.OutOfMemoryError:
                del running[name]
                torch.cuda.empty_cache()
                continue
            for part, value in parts.items() if repeat >= 0 else ():  # the one before warms up
                seconds[name].setdefault(part, []).append(value)
        rates.append(matrix_rate(device, base.dtype))
    return seconds, peaks, statistics.median(rates)


# ---------------------------------------------------------------------------------------------------------------------
# The report

@dataclass
class Config:
    """Count and time a training step, alone or against the same step on diffusers."""
    base: str = "tiny"  # tiny, random (full size), random:64 (small), or any base that train.py takes: only its sizes matter
    reward_weights: str | None = None  # as train.py's; default the base's own, else random ones of a size that suits the base
    batch_size: int = 2  # clips a step (paper, Sec. 3.3: 8 on 4 GPUs)
    tau: float = 0.6  # how far clips are noised, as a share of the chain (paper, Sec. 4.2)
    num_steps: int = 20  # D, DDIM steps of the whole chain (paper, Sec. 3.3)
    frames: int = 16  # F (paper, Sec. 3.3)
    size: int | None = None  # pixel rows and columns; default what the base was trained on
    steps: int = 5  # repeats: each is one step of every contender
    device: str | None = None  # cuda, mps, cpu, or meta to count alone; default the first of cuda, mps, cpu that is there
    dtype: str | None = None  # float32, bfloat16 or float16 of frozen weights; default bfloat16 on cuda and meta, else float32
    compile: bool = False  # torch.compile our UNet
    checkpoint_activations: bool = False  # ours recomputes the UNet's blocks in the backward pass, as train.py's flag
    low_memory: bool = False  # ours recomputes, and decodes one frame at a time, as train.py's flag
    methods: bool = False  # instead: count a step of each method of methods/ at its preset modelscope (needs --device meta)
    diffusers: bool = True  # compare with the two steps built from diffusers (pip install -r requirements-dev.txt)
    out: Path = Path("out/benchmark.json")  # the report


def check(cfg):
    """All that can be known before anything is loaded."""
    check_at_least(cfg, batch_size=1, steps=1, frames=train.Config.segments)
    check_edit(cfg.tau, cfg.num_steps, train.Config.grad_steps)
    if cfg.methods and cfg.device != "meta":
        raise ValueError(f"device {cfg.device!r}: must be meta with methods")
    check_folder(cfg.out.parent)
    if cfg.out.is_dir():
        raise ValueError(f"out {cfg.out}: is a folder; it must be a file, there or not")


def measure(cfg, command=None):
    """The whole report, as plain values."""
    check(cfg)
    if cfg.methods:
        cfg = replace(cfg, batch_size=1, diffusers=False)
    device = torch.device("meta") if cfg.device == "meta" else pick_device(cfg.device)
    base, reward = load(cfg, device)
    packages = ["torch", "open_clip_torch"] + (["diffusers", "peft", "transformers"] if cfg.diffusers else [])
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    report = {"command": command, "base": base.name, "settings": asdict(cfg) | {"out": str(cfg.out)},
              "dtype": str(base.dtype)[6:],
              "machine": {"system": platform.platform(), "threads": torch.get_num_threads(), "device": f"{device}, {processor}"},
              "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()}}
    if cfg.methods:
        return report | {"methods": count_methods(base, reward, cfg)}
    report["contenders"] = count(base, reward, cfg)
    if device.type == "meta":
        return report | {"memory": count_memory(base, reward, cfg)}

    base.release_encoders()
    seconds, peaks, report["matrix_tflops"] = time_all(base, reward, cfg, device)
    report["slower"] = {}
    for name, row in report["contenders"].items():
        if not seconds[name]:  # out of memory
            continue
        row["seconds"] = {part: spread(values) for part, values in seconds[name].items()}
        row["peak_gib"] = peaks[name]
        row["tflops"] = row["tflop"]["step"] / row["seconds"]["step"]["median"]
        row["share_of_matrix_rate"] = row["tflops"] / report["matrix_tflops"]
        if name != "ours" and seconds["ours"]:
            ratios = [theirs / mine for theirs, mine in zip(seconds[name]["step"], seconds["ours"]["step"])]
            report["slower"][name] = spread(ratios)
    return report


def table(report):
    """The report as lines of text for the terminal."""
    rows = report.get("contenders", {})
    methods = report.get("methods", {})
    memory = report.get("memory", {})
    lines = [f"base {report['base']}, {report['settings']['batch_size']} clips of {report['settings']['frames']} frames, "
             f"{report['dtype']}, on {report['machine']['device']}, {report['machine']['threads']} threads"]
    if rows:
        lines.append(" " * 16 + "".join(f"{part:>11s}" for part in (*PARTS, "step")))
    for name, row in rows.items():
        lines.append(f"{name:16s}" + "".join(f"{value:11.4g}" for value in row["tflop"].values()) + "  TFLOP")
        if "seconds" in row:
            lines.append(" " * 16 + "".join(f"{seconds['median']:11.4g}" for seconds in row["seconds"].values()) + "  s")
            lines.append(f"{'':16s}{row['tflops']:.4g} TFLOP/s, {row['share_of_matrix_rate']:.0%} of the matrix product's rate"
                         + (f", {row['peak_gib']:.1f} GiB" if row["peak_gib"] else ""))
        elif not memory:
            lines.append(" " * 16 + "out of memory")
    for name, ratio in report.get("slower", {}).items():
        work = rows[name]["tflop"]["step"] / rows["ours"]["tflop"]["step"]
        lines.append(f"{name} takes {ratio['median']:.2f}x our time ({ratio['min']:.2f} to {ratio['max']:.2f} over "
                     f"{report['settings']['steps']} repeats), {work:.2f}x our work")

    if memory:
        counts = memory["no flag"]
        lines.append("expected peak memory of our step, GiB: total (saved activations + transients, on top of the weights)")
        lines.append(f"{'clips at once':26s}" + "".join(f"{clips:>22}" for clips in counts))
        lines.append(f"weights: {counts[1]['weights']:.1f} GiB; workspaces of kernels and gaps between tensors come on top")
    for name, peaks in memory.items():
        cells = [f"{peak['total']:.1f} ({peak['saved']:5.1f} + {peak['transient']:.1f})" for peak in peaks.values()]
        lines.append(f"{name:26s}" + "".join(f"{cell:>22}" for cell in cells))

    if methods:  # in Markdown, for docs/methods.md
        lines.append(
            "| per video of a step | passes without, with gradient | frames | TFLOP | against InstructVideo | peak GiB |\n"
            "|---|---|---|---|---|---|")
    for name, row in methods.items():
        ratio = row["tflop"] / methods["InstructVideo"]["tflop"]
        lines.append(f"| {name} | {row['without_gradient']:.3g}, {row['with_gradient']:.3g} | {row['frames']:.3g} | "
                     f"{row['tflop']:.1f} | {ratio:.2f} | {row['peak_gib']['total']:.1f} |")
    if not torch.cuda.is_available():
        lines.append("cuda: not yet run, no such device here")
    return lines


def main(cfg, argv):
    """Measure, write the JSON, print the table."""
    report = measure(cfg, shlex.join(["python", "benchmark.py", *argv]))
    write_text(cfg.out, json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report)))
    print(f"report: {cfg.out}")


if __name__ == "__main__":
    run_script("benchmark.py", lambda: main(tyro.cli(Config, description=__doc__), sys.argv[1:]))
