"""
Reward fine-tuning by editing: InstructVideo's training loop, on a laptop, on one GPU, or under torchrun.

    python train.py                                            # the tiny world, on two CPU cores, in minutes
    python train.py modelscope --data clips.txt --prompts animals=animals.txt
    torchrun --nproc_per_node=4 train.py modelscope --data clips.txt --prompts animals=animals.txt

Paper: InstructVideo (arXiv:2312.12490), Sec. 3; Algorithm in Fig. 2. A step takes real clips, noises them to t_noi = d(tau D),
denoises them back with gradient through the last K steps, scores one frame of each segment, and follows the gradient into a LoRA.

Ours differs from the official trainer (tools/train/train_t2v_entrance.py of InstructVideo): (1) frames are picked before they
are decoded; (2) clips are shuffled, ranks see different ones; (3) the model is in eval mode, the reward frozen; (4) gradients
are clipped, steps that are not finite are skipped; (5) no EMA; (6) a run can be interrupted and continued at any step.

Letters: B clips, F frames, S segments, C channels, h and w latent rows and columns, N text tokens, E their width.
"""
import json
import math
import os
import shutil
import signal
import sys
import time
import types
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import imageio.v3 as iio
import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import lora
from data import ClipConfig, LatentDataset, batch_indices, encode_clips, read_list, sample_generator, sample_posterior
from evaluate import contact_sheet, evaluate, find_judge, paired, prompt_sets, summary, write_png
from generate import check_folder, latent_size, to_pixels, video_name, write_video
from model import (
    HUB_BASE,
    check_tensors,
    decode_frames,
    fingerprint,
    first_line,
    join_ranks,
    load_base,
    pick_dtype,
    rank_and_size,
    read_json,
    run_script,
    write_whole,
)
from reward import aggregate, load_reward, segment_edges, segment_frames, tar_weights
from sampler import GUIDANCE, check_edit, edit

VERSION = 1  # of the run folder's files


@dataclass(frozen=True)
class Config:
    """Fine-tune a text-to-video model on an image reward. `train.py modelscope` has the paper's defaults, these are tiny's."""
    preset: tyro.conf.Suppress[str] = "tiny"
    """tiny or modelscope: named first on the command line, not by a flag; it sets the defaults below"""
    base: str = "tiny"
    """the text-to-video model: tiny, a folder, a file, a hub id, or random (random:64 is a small one)"""
    vae: str | None = None
    """another autoencoder than the base's"""
    text_encoder: str | None = None
    """another text encoder than the base's"""
    reward: str = "hpsv2"
    """hpsv2 (v2.0, as the official code's) or hpsv2.1; their scores do not compare. A tiny base has its own"""
    reward_weights: str | None = None
    """the reward's weights; default the base's own, else the hub's; random and random:W as for base"""

    data: Path | None = None
    """clips and captions: a list of `path|||caption` lines, a .csv or .jsonl, or a folder of clips with .txt files; the tiny
    world draws its own"""
    data_root: Path | None = None
    """folder that the list's paths start from; default the list's own"""
    max_skip: float = 0.1
    """share of the clips that may be left out, each with its reason, before the run stops"""
    workers: int = 2
    """processes that decode clips while they are encoded; changes the time, not the result"""
    cache: bool = True
    """keep latents and text embeddings of --data on disk"""
    cache_dir: Path = Path("cache")
    """where"""
    frames: int = 16
    """F (paper, Sec. 4.1)"""
    size: int | None = None
    """pixel rows and columns of a clip; default what the base was trained on, 256 for ModelScopeT2V (paper, Sec. 4.1)"""
    fps: int = 8
    """frames a second that clips are read at (official configuration)"""

    tau: float = 0.6
    """how far clips are noised, as a share of the chain (paper, Sec. 3.2.1)"""
    num_steps: int = 20
    """D, DDIM steps of the whole chain (paper, Sec. 4.1)"""
    grad_steps: int = 1
    """K, last steps that carry gradient (paper, Sec. 3.3)"""
    segments: int = 4
    """S, frames scored, one of each segment (paper, Sec. 3.2.2); as many as frames is dense scoring"""
    lambda_tar: float = 1.0
    """weight decay away from the centre, Eq. (7) (paper, Sec. 4.1); 0 is the plain mean"""
    guidance: float = GUIDANCE
    """classifier-free guidance scale, in training and evaluation alike (official code: modules/config.py:74)"""
    offset_noise: float = 0.0
    """strength of noise shared by a frame's channel (official configuration 0.1; not in the paper's Eq. (5))"""

    rank: int = 4
    """of the LoRA (paper, Sec. 3.3)"""
    steps: int = 40
    """optimizer steps (paper: 20,000)"""
    batch_size: int = 4
    """clips a step, over all ranks (paper: 8)"""
    grad_accum: int = 1
    """parts that a rank's share of the batch is computed in, one after the other"""
    lr: float = 2e-3
    """step size of AdamW without weight decay (paper: 1e-5, for 20,000 steps)"""
    warmup: int = 10
    """first steps, over which lr rises (official configuration)"""
    clip_grad: float = 1.0
    """largest norm of a step's gradient"""
    max_bad_steps: int = 10
    """steps in a row without a finite reward or gradient, each skipped, that stop the run"""
    seed: int = 0
    """all randomness follows from it, the step and the clip"""

    prompts: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=FILE, evaluation prompts, one a line or in the official list form; default the tiny world's three sets"""
    eval_every: int = 20
    """steps between evaluations, with one before the first and after the last step; 0 is none at all"""
    eval_count: int = 24
    """videos of each prompt set in an evaluation; 0 is one for each line of its file"""
    save_every: int = 20
    """steps between checkpoints; the last step is always saved"""
    keep: int = 1
    """latest checkpoints to keep; beside them, best.safetensors has the adapter of the best evaluation"""
    out: Path | None = None
    """the run folder; default a fresh one, out/<preset>"""
    overwrite: bool = False
    """replace the run that --out holds"""
    resume: Path | None = None
    """continue the run of this folder, with its own settings; only --steps may be given anew"""
    tensorboard: bool = False
    """also write the metrics for TensorBoard, if it is installed"""

    device: str | None = None
    """cuda, mps or cpu; default the first of these that is there"""
    dtype: str | None = None
    """float32, bfloat16 or float16 of the frozen weights; default bfloat16 on cuda, else float32. Adapters are float32"""
    checkpoint_activations: bool = False
    """recompute the UNet's blocks in the backward pass: less memory, more time, the same gradient"""
    decode_chunk: int = 0
    """frames that pass the decoder and the reward at a time, recomputed in the backward pass; 0 is all at once"""
    low_memory: bool = False
    """checkpoint_activations and decode_chunk 1"""
    compile: bool = False
    """torch.compile the UNet"""


PRESETS = {"tiny": Config(),
           "modelscope": Config("modelscope", base=HUB_BASE, offset_noise=0.1, steps=20_000, batch_size=8, lr=1e-5,
                                eval_every=1000, eval_count=0, save_every=500)}


def check(cfg):
    """All that can be known before anything is loaded or written; ValueError says what is wrong and what is allowed."""
    limits = {"frames": 1, "size": 1, "fps": 1, "rank": 1, "steps": 1, "batch_size": 1, "grad_accum": 1, "warmup": 0,
              "max_bad_steps": 1, "eval_every": 0, "eval_count": 0, "save_every": 1, "keep": 1, "workers": 0, "decode_chunk": 0}
    for name, least in limits.items():
        if getattr(cfg, name) is not None and getattr(cfg, name) < least:
            raise ValueError(f"{name} = {getattr(cfg, name)}: allowed is {least} and above")
    for name in ("lr", "clip_grad"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise ValueError(f"{name} = {getattr(cfg, name)}: allowed is any finite number above 0")
    for name in ("offset_noise", "max_skip"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise ValueError(f"{name} = {getattr(cfg, name)}: allowed is 0 and any finite number above")
    if not math.isfinite(cfg.guidance):
        raise ValueError(f"guidance = {cfg.guidance}: allowed is any finite number")
    check_edit(cfg.tau, cfg.num_steps, cfg.grad_steps)
    check_edit(1., cfg.num_steps, 1)  # the whole chain, which evaluation runs
    segment_edges(cfg.frames, cfg.segments)
    tar_weights(torch.zeros(1, 1), cfg.frames, cfg.lambda_tar)
    size = rank_and_size()[1]
    if cfg.batch_size % (size * cfg.grad_accum):
        raise ValueError(f"batch_size = {cfg.batch_size}: allowed are multiples of {size * cfg.grad_accum}, "
                         "the ranks times grad_accum")
    if cfg.data is None and cfg.base != "tiny":
        raise ValueError("no clips: allowed is --data LIST (only the tiny world draws its own)")
    if cfg.data is None and (cfg.frames, cfg.size or 32) != (16, 32):
        raise ValueError(f"frames = {cfg.frames}, size = {cfg.size}: the tiny world draws 16 frames of 32 x 32 pixels; "
                         "others are allowed with --data")
    if cfg.data is not None and not cfg.data.exists():
        raise ValueError(f"data {cfg.data}: no such file or folder")
    if cfg.tensorboard:
        tensorboard_writer()


# ---------------------------------------------------------------------------------------------------------------------
# One step

def draw_batch(dataset, step, cfg, scale, device):
    """
    This rank's share of a step's batch: z, eps (B, C, F, h, w), text (B, N, E), g (B, S), captions [B].

    A sample's window, noises and frames come from its own generator: the batch is the same on any number of ranks.
    """
    rank, size = rank_and_size()
    z, eps, text, g, captions = [], [], [], [], []
    for position, clip in batch_indices(step, cfg.batch_size, len(dataset), cfg.seed, rank, size):
        generator = sample_generator(cfg.seed, step, position)
        moments, words, caption = dataset.get(clip, generator)                            # (2C, F, h, w), (N, E)
        C, F, h, w = len(moments) // 2, *moments.shape[1:]
        noise, white, shared = (torch.randn(s, generator=generator) for s in ((C, F, h, w), (C, F, h, w), (C, F, 1, 1)))
        z.append(sample_posterior(moments, noise, scale))
        eps.append(white + cfg.offset_noise * shared)
        text.append(words)
        g.append(segment_frames(F, cfg.segments, 1, generator)[0])
        captions.append(caption)
    z, eps, text, g = (torch.stack(v).to(device, non_blocking=True) for v in (z, eps, text, g))
    return z, eps, text, g, captions


def frame_rewards(vae, reward, z_0, g, captions, chunk=0):
    """
    r(x^g(i), c): decode the chosen frames of z_0 (B, C, F, h, w), g (B, S), and score them -> (B, S).

    chunk: so many frames of each clip at a time, their activations recomputed in the backward pass; 0 is all at once.
    """
    def score(z_0, g):
        return reward(decode_frames(vae, z_0, g), captions)                               # (B, S)
    if not chunk:
        return score(z_0, g)
    return torch.cat([checkpoint(score, z_0, part, use_reentrant=False) for part in g.split(chunk, dim=1)], dim=1)


def edit_rewards(base, reward, uncond, batch, cfg):
    """The method, from clips to rewards: R (B,) of Eq. (8), with gradient, and the plain mean of r (B,), without."""
    z, eps, text, g, captions = batch
    z_0 = edit(base.denoiser, z, eps, text, uncond, cfg.tau, cfg.num_steps, cfg.guidance, cfg.grad_steps)   # Eqs. (3)-(5)
    r = frame_rewards(base.vae, reward, z_0, g, captions, 1 if cfg.low_memory else cfg.decode_chunk)        # (B, S)
    R = aggregate(r, tar_weights(g, z.shape[2], cfg.lambda_tar))                                            # Eqs. (6)-(8)
    return R, r.detach().mean(dim=1)


def parts_of(batch, parts):
    """A batch in equal parts, for gradient accumulation."""
    size = len(batch[0]) // parts
    return [[v[i * size:(i + 1) * size] for v in batch] for i in range(parts)]


def add_over_ranks(parameters, numbers):
    """
    Sum gradients and a few numbers over the ranks, in one message. DDP would do the same for the gradients, but expects one
    forward pass for each backward one, and a chain has many; the adapters are small enough to send at once.
    """
    flat = torch.cat([*(p.grad.flatten() for p in parameters), torch.tensor(numbers, device=parameters[0].device)])
    if rank_and_size()[1] > 1:
        dist.all_reduce(flat)
    *grads, numbers = flat.split([*(p.numel() for p in parameters), len(numbers)])
    for p, g in zip(parameters, grads):
        p.grad.copy_(g.view_as(p))
    return numbers.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def train(cfg, run, base, reward, dataset, stop=lambda: False):
    """
    Steps from wherever `run` stands to cfg.steps. `stop` is asked after every step; True ends the run early, saved.

    Returns False if it was stopped. RuntimeError after cfg.max_bad_steps steps in a row that were not finite.
    """
    parameters = run.parameters
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0)
    run.load_optimizer(optimizer)
    uncond = base.encode_text([""])                                                       # (1, N, E)
    bad = 0
    run.evaluate_if_due(run.step)
    for step in run.progress_from(run.step, cfg.steps):
        start = time.perf_counter()
        batch = draw_batch(dataset, step, cfg, base.vae.config.scale, base.device)
        total, plain = 0., 0.
        optimizer.zero_grad(set_to_none=False)
        for part in parts_of(batch, cfg.grad_accum):
            R, r = edit_rewards(base, reward, uncond, part, cfg)
            loss = -R.sum() / cfg.batch_size                                              # Eq. (9), this part's share
            loss.backward()
            total, plain = total + loss.item(), plain + r.sum().item() / cfg.batch_size
        total, plain, stopping = add_over_ranks(parameters, [total, plain, float(stop())])
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip_grad).item()
        finite = math.isfinite(total) and math.isfinite(norm)
        if finite:
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1., (step + 1) / max(cfg.warmup, 1))
            optimizer.step()
        bad = 0 if finite else bad + 1
        run.log_step(step + 1, plain, total, norm, time.perf_counter() - start, finite)
        if bad == cfg.max_bad_steps:
            raise RuntimeError(f"{bad} steps in a row without a finite reward or gradient; the last checkpoint is good")
        if stopping or run.save_due(step + 1):
            run.save(optimizer, step + 1)
        if stopping:
            return False
        run.evaluate_if_due(step + 1)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind

class Stopped(Exception):
    """An evaluation was cut short by a signal; the checkpoint of its step is already on disk."""


class Run:
    """
    The run folder: config.json, metrics.jsonl, state.pt, lora.safetensors, best.safetensors, curves.png, samples/.

    Only rank 0 writes and prints; every file appears whole or not at all. With `resumed`, the newest checkpoint is read, and
    lines of metrics.jsonl past its step are dropped.
    """

    def __init__(self, cfg, folder, base, reward, sets, parameters, resumed, stop=lambda: False):
        self.cfg, self.folder, self.base, self.reward, self.sets, self.parameters = cfg, folder, base, reward, sets, parameters
        size = cfg.size or base.default_size
        self.judge = None if cfg.prompts else find_judge(base, cfg.frames, size, size)  # it knows that world's captions only
        self.step, self.best, self.optimizer_state, self.lines, self.stop = 0, -math.inf, None, [], stop
        self.bar, self.chief = None, rank_and_size()[0] == 0
        if resumed:
            self.read_state()
        if self.chief:
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            for half in [*folder.glob(".????????.*"), *folder.glob("samples/.????????.*")]:
                half.unlink()  # what a killed run was writing
            self.board = tensorboard_writer()(folder / "tensorboard") if cfg.tensorboard else None
            self.write_text("config.json", json.dumps(to_json(cfg), indent=1) + "\n")
            self.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))

    # -- metrics

    def progress_from(self, start, end):
        """The steps still to do, with a progress bar on rank 0."""
        self.bar = tqdm(range(start, end), initial=start, total=end, desc="fine-tuning", disable=not self.chief)
        return self.bar

    def log(self, line):
        """Add a line to metrics.jsonl, on disk at once."""
        self.lines.append(line)
        if self.chief:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if self.board:
                scalars = {f"eval/{name}/{k}": v for name, m in line.get("eval", {}).items() for k, v in m.items()}
                for k, v in (scalars or line).items():
                    self.board.add_scalar(k, float("nan") if v is None else v, line["step"])

    def log_step(self, step, reward, loss, norm, seconds, finite):
        """A training line; numbers that are not finite become null, which JSON has a word for."""
        numbers = {"reward": reward, "loss": loss, "grad_norm": norm}
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in numbers.items()} | {"seconds": seconds}
        if not finite:
            line["skipped"] = sum("skipped" in other for other in self.lines) + 1
            if self.chief:
                tqdm.write(f"step {step}: reward or gradient is not finite, skipped ({line['skipped']} so far)")
        self.log(line)
        self.bar.set_postfix_str(f"{self.reward.name} of edits {reward:.4f}, {seconds:.2f} s/step")

    # -- checkpoints

    def save_due(self, step):
        return step % self.cfg.save_every == 0 or step == self.cfg.steps or self.eval_due(step)

    def save(self, optimizer, step):
        """state.pt, from which training continues exactly, and the adapter alone. An earlier state stays until this is whole."""
        self.step = step
        if not self.chief:
            return
        state = {"version": VERSION, "step": step, "config": to_json(self.cfg),
                 "adapters": lora.adapter_state(self.base.unet), "optimizer": optimizer.state_dict()}
        newest = self.folder / "state.pt"
        try:
            if self.cfg.keep > 1 and newest.exists():  # the one before stays under its step's number: a link until it is replaced
                before = self.folder / f"state_{self.saved_step:06d}.pt"
                before.unlink(missing_ok=True)
                os.link(newest, before)
            with write_whole(newest) as hidden:
                torch.save(state, hidden)
            self.save_adapter("lora.safetensors")
        except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own word for a full disk
            raise RuntimeError(f"{self.folder}: step {step} cannot be saved ({error}); the one before it is whole") from None
        self.saved_step = step
        for old in sorted(self.folder.glob("state_*.pt"))[:-(self.cfg.keep - 1) or None]:
            old.unlink()

    def save_adapter(self, name):
        lora.save(self.base.unet, self.folder / name, base=self.cfg.base)

    def read_state(self):
        """Take up the newest checkpoint, if there is one, and the metrics up to it."""
        own = lora.adapter_state(self.base.unet)
        files = [*sorted(self.folder.glob("state_*.pt")), *self.folder.glob("state.pt")]
        if files:
            state = read_checkpoint(files[-1], own, self.parameters)
            if state["step"] > self.cfg.steps:
                raise ValueError(f"steps = {self.cfg.steps}: allowed is {state['step']}, where this run stands, and above")
            self.step, self.optimizer_state = state["step"], state["optimizer"]["state"]
        self.saved_step = self.step
        if (self.folder / "metrics.jsonl").is_file():
            self.lines = [line for line in read_metrics(self.folder / "metrics.jsonl") if line["step"] <= self.step]
        self.best = max((mean_reward(line["eval"]) for line in self.lines if "eval" in line), default=-math.inf)
        for name in own if files else ():
            own[name].copy_(state["adapters"][name])

    def load_optimizer(self, optimizer):
        """Its moments. What else an optimizer saves follows from the settings."""
        if self.optimizer_state:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": self.optimizer_state})

    def close(self):
        """Let TensorBoard write what it still holds back."""
        if self.chief and self.board:
            self.board.close()

    # -- evaluation

    def eval_due(self, step):
        every = self.cfg.eval_every
        return bool(every) and (step % every == 0 or step == self.cfg.steps)

    def evaluate_if_due(self, step):
        """Videos from pure noise for the held-out prompts, the same noise every time: metrics, strips and clips."""
        if not self.eval_due(step) or any(line["step"] == step and "eval" in line for line in self.lines):
            return
        cfg, tables, videos = self.cfg, {}, {}
        rank, size = rank_and_size()
        mine = sum(len(prompts[rank::size]) for prompts in self.sets.values())
        with tqdm(total=mine, desc=f"evaluating at step {step}", unit="video", leave=False, disable=not self.chief) as bar:
            def move_on(n):
                bar.update(n)
                if self.stop() and rank_and_size()[1] == 1:  # with more ranks, leaving alone would keep the others waiting
                    raise Stopped
            for name, prompts in self.sets.items():
                tables[name], videos[name] = evaluate(
                    self.base, self.reward, prompts, seed=EVAL_SEED, num_steps=cfg.num_steps, guidance=cfg.guidance,
                    segments=cfg.segments, frames=cfg.frames, height=cfg.size, width=cfg.size, judge=self.judge,
                    batch_size=min(cfg.batch_size, 8), keep=SHOWN, bar=move_on)
        measures = {name: summary(t) for name, t in tables.items()}
        if self.chief:
            self.show(step, tables, videos)
            if mean_reward(measures) > self.best:
                self.save_adapter("best.safetensors")
        self.best = max(mean_reward(measures), self.best)
        self.log({"step": step, "eval": measures})
        if self.chief:
            draw_curves(self.lines, self.reward.name, self.folder / "curves.png")

    def show(self, step, tables, videos):
        """samples/step_000100.png with its clips as mp4, and .json with every video's numbers, for paired comparisons."""
        stem = self.folder / "samples" / f"step_{step:06d}"
        captions = [p for name in videos for p in self.sets[name][:SHOWN]]
        shown = torch.cat(list(videos.values()))
        write_png(stem.with_suffix(".png"), contact_sheet([shown], captions, [f"step {step}"]))
        for i, (video, caption) in enumerate(zip(shown, captions)):
            write_video(self.folder / "samples" / f"step_{step:06d}_{video_name(i, caption)}.mp4",
                        to_pixels(video), self.cfg.fps)
        self.write_text(f"samples/step_{step:06d}.json",
                        json.dumps({name: {k: v.tolist() for k, v in t.items()} for name, t in tables.items()}) + "\n")

    def write_text(self, name, text):
        with write_whole(self.folder / name) as hidden:
            hidden.write_text(text)

    def compare(self):
        """Before and after, paired over the same prompts and noise, as text; and before_after.png."""
        steps = [line["step"] for line in self.lines if "eval" in line]
        if not self.chief or len(steps) < 2:
            return
        stems = [self.folder / "samples" / f"step_{s:06d}" for s in (steps[0], steps[-1])]
        pictures = [torch.from_numpy(iio.imread(stem.with_suffix(".png"))) for stem in stems]
        write_png(self.folder / "before_after.png", torch.cat(pictures, dim=1).numpy())
        before, after = ({name: {k: torch.tensor(v, dtype=torch.float64) for k, v in t.items()} for name, t in
                          read_json(stem.with_suffix(".json")).items()} for stem in stems)
        print(f"\n{self.reward.name} of videos from pure noise, before and after {steps[-1]} steps "
              "(mean, paired difference and its standard error):")
        for name in before:
            b, a = before[name], after[name]
            gain, error = paired(b, a)
            line = f"  {name:10s} {b['reward'].mean():.4f} -> {a['reward'].mean():.4f}   {gain:+.4f} ± {error:.4f}"
            if "watermark" in b:
                line += f"   watermark {b['watermark'].mean():.3f} -> {a['watermark'].mean():.3f}"
            print(line)
        print(f"picture: {self.folder / 'before_after.png'}")


EVAL_SEED, SHOWN = 1_000_000, 4  # evaluate.py's default seed; videos of each set on the strips


def read_checkpoint(path, adapters, parameters):
    """What Run.save wrote, for these adapters {name: tensor} and parameters; ValueError for anything else, as files are data."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle or the reader itself
        raise ValueError(f"{path}: cannot be read ({first_line(error)}); without it, --resume takes the one before, "
                         "or starts again") from None
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path}: version {version if type(version) is int else type(version).__name__}, expected {VERSION}")
    try:
        moments = {f"{k} of parameter {i}": v for i, kept in state["optimizer"]["state"].items() for k, v in kept.items()}
        expected = {f"{k} of parameter {i}": torch.zeros(()) if k == "step" else p
                    for i, p in enumerate(parameters) for k in ("step", "exp_avg", "exp_avg_sq") if moments}
        check_tensors(adapters | expected, state["adapters"] | moments, path)
        if type(state["step"]) is not int or state["step"] < 1:
            raise TypeError(f"step {state['step']!r}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a checkpoint of a run ({first_line(error)})") from None
    return state


def read_metrics(path):
    """The lines of a metrics.jsonl. ValueError names one that is none, but for the last, which a killed run may leave half."""
    lines, texts = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if type(line["step"]) is not int:
                raise TypeError(f"step {line['step']!r}")
            if "eval" in line:
                float(mean_reward(line["eval"]))
            lines.append(line)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            if number < len(texts):
                raise ValueError(f"{path}, line {number}: not what a run logs ({first_line(error)})") from None
    return lines


def mean_reward(measures):
    """What the best evaluation has most of: the mean over the prompt sets, as metrics.jsonl has them."""
    return sum(m["reward_mean"] for m in measures.values()) / len(measures)


def tensorboard_writer():
    """TensorBoard's class of writers; ValueError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard is not installed: `pip install tensorboard`, or leave --tensorboard out") from None
    return SummaryWriter


def draw_curves(lines, reward_name, path):
    """curves.png: the reward of the edits, step by step, and of videos from pure noise, with the judge's measures if any."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    steps = [line for line in lines if line.get("reward") is not None]
    evals = [line for line in lines if "eval" in line]
    judged = [k for k in ("watermark", "colour", "shape", "direction") if k in next(iter(evals[0]["eval"].values()))]
    figure, axes = plt.subplots(1, 2 + bool(judged), figsize=(5 * (2 + bool(judged)), 3.6), squeeze=False)
    axes[0, 0].plot([s["step"] for s in steps], [s["reward"] for s in steps], lw=1)
    axes[0, 0].set_title("edits of real clips")
    for name in evals[0]["eval"]:
        x = [e["step"] for e in evals]
        axes[0, 1].plot(x, [e["eval"][name]["reward_mean"] for e in evals], marker="o", label=name)
        for k in judged[:1]:
            axes[0, 2].plot(x, [e["eval"][name][k] for e in evals], marker="o", label=f"{k}, {name}")
    for k in judged[1:]:
        mean = [sum(m[k] for m in e["eval"].values()) / len(e["eval"]) for e in evals]
        axes[0, 2].plot(x, mean, ls="--", label=f"{k} right, all sets")
    axes[0, 1].set_title("videos from pure noise")
    if judged:
        axes[0, 2].set_title("the same videos, by the judge")
        axes[0, 2].set_ylim(-.02, 1.02)
    for a, label in zip(axes[0], (reward_name, reward_name, "judge")):
        a.set_xlabel("step")
        a.xaxis.get_major_locator().set_params(integer=True)
        a.set_ylabel(label)
        if a.get_legend_handles_labels()[1]:
            a.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, .5))  # beside, where it hides nothing
    figure.tight_layout()
    with write_whole(path) as hidden:
        figure.savefig(hidden, dpi=110, format="png")
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Setting up

def to_json(cfg):
    """Config as plain values, the same however often the run was continued."""
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
            for k, v in asdict(replace(cfg, resume=None)).items()}


def from_json(content, source):
    """The Config of a run's config.json; ValueError if it is not one of ours."""
    known = typing.get_type_hints(Config)
    if set(content) != set(known):
        raise ValueError(f"{source}: not the settings of this version; differing: {', '.join(sorted(set(content) ^ set(known)))}")

    def value(name):
        """A setting from the simpler form that JSON has it in."""
        v, kind = content[name], known[name]
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (typing.get_origin(kind) or kind,)
        if isinstance(v, list) and tuple in kinds and all(isinstance(item, str) for item in v):
            return tuple(v)
        if isinstance(v, str) and Path in kinds:
            return Path(v)
        if type(v) not in kinds and not (type(v) is int and float in kinds):
            raise ValueError(f"{source}: {name} is {str(v)[:80]!r}; allowed is {' or '.join(k.__name__ for k in kinds)}")
        return v
    return Config(**{name: value(name) for name in content})


def parse(argv):
    """
    Command line -> Config. The first word may name a preset. With --resume the run's own settings are the defaults, and a flag
    that would make it another run is refused (ValueError).
    """
    argv = list(argv)
    named = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if named is not None and named not in PRESETS:
        raise ValueError(f"preset {named!r}: allowed are {', '.join(PRESETS)}")
    defaults = PRESETS[named or "tiny"]
    folder = next((b if a == "--resume" else a.partition("=")[2] for a, b in zip(argv, [*argv[1:], ""])
                   if a == "--resume" or a.startswith("--resume=")), None)
    if not folder:
        return tyro.cli(Config, args=argv, default=defaults, description=__doc__)
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"resume {folder}: holds no run (no config.json)")
    saved = from_json(read_json(Path(folder) / "config.json"), f"{folder}/config.json")
    given = tyro.cli(Config, args=argv, default=saved, description=__doc__)
    changed = [f.name for f in fields(Config)
               if getattr(given, f.name) != getattr(saved, f.name) and f.name not in ("steps", "resume")]
    if named not in (None, saved.preset):
        changed.append("preset")
    if changed:
        raise ValueError(f"resume {folder}: {', '.join(changed)} would make it another run; allowed to change is steps")
    return replace(saved, steps=given.steps, resume=Path(folder))


def choose_folder(cfg):
    """
    (run folder, whether to continue what it holds). A fresh one unless asked; what it holds of another run is never lost unasked.

    When torchrun restarts its workers after a crash, they continue: --out's run, or the newest with the same settings.
    """
    if cfg.resume:
        return cfg.resume, True
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if cfg.out is None:
        runs = [Path("out") / f"{cfg.preset}{f'-{n}' if n > 1 else ''}" for n in range(1, 10_000)]
        if restarted:
            same = [r for r in runs if (r / "config.json").is_file() and read_json(r / "config.json") == to_json(cfg)]
            if same:
                return max(same, key=lambda r: (r / "config.json").stat().st_mtime), True
        return next(r for r in runs if not r.exists()), False
    check_folder(cfg.out)
    same = restarted and (cfg.out / "config.json").is_file() and read_json(cfg.out / "config.json") == to_json(cfg)
    if holds_run(cfg.out) and not (same or cfg.overwrite):
        raise ValueError(f"out {cfg.out}: holds a run already; allowed are another folder, --resume {cfg.out}, or --overwrite")
    return cfg.out, same


def holds_run(folder):
    """Whether there is something in it that a new run would destroy, or a later --resume mistake for the new run's."""
    return any((folder / name).exists() for name in ("config.json", "state.pt"))


def clear(folder):
    """Remove an earlier run's files, and nothing else; last its config.json, so that a half cleared run is still one."""
    for name in ("samples", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("state.pt", "state_*.pt", "lora.safetensors", "best.safetensors", "metrics.jsonl", "curves.png",
                    "before_after.png", "config.json"):
        for file in folder.glob(pattern):
            file.unlink()


def tiny_clips(base, dtype, count=192):
    """The tiny world's own fine-tuning clips: captions of the in_domain set, of web video's quality, in memory."""
    from tiny.world import make_clip, scenes
    every = scenes("in_domain")
    clips = [make_clip(every[i % len(every)], 2_000_000 + i)[0] for i in range(count)]    # each (F, 3, H, W) in [0, 1]
    with torch.no_grad():
        moments = [base.vae.encode(c.to(base.device, dtype) * 2 - 1).float().transpose(0, 1).cpu()[None]  # (1, 2C, F, h, w)
                   for c in tqdm(clips, "encoding clips", disable=rank_and_size()[0] != 0)]
    captions = [every[i % len(every)].caption for i in range(count)]
    return LatentDataset(moments, list(base.encode_text(captions).cpu()), captions)


def read_clips(cfg, base, dtype):
    """The dataset of --data: latents and text of its clips, from the cache or computed now."""
    rank, size = rank_and_size()
    pixels = cfg.size or base.default_size
    latent_size(base, pixels, pixels)
    clips = ClipConfig(num_frames=cfg.frames, fps=cfg.fps, height=pixels, width=pixels)
    def encode(frames):
        return base.vae.encode(frames.to(base.device, dtype))                             # kept in the precision it has
    def encode_text(captions):
        base.texts.clear()  # the dataset keeps these, thousands maybe, off the accelerator
        return base.encode_text(captions)
    return encode_clips(read_list(cfg.data, cfg.data_root), clips, encode, encode_text,
                        f"{fingerprint(base.vae)} {dtype}", f"{fingerprint(base.text_encoder)} {dtype}",
                        cfg.cache_dir if cfg.cache else None, cfg.workers, cfg.max_skip, rank, size,
                        dist.barrier if size > 1 else lambda: None)


def main(argv):
    """Everything from the command line to the last line printed; returns the exit status."""
    cfg = parse(argv)
    device = join_ranks(cfg.device)
    check(cfg)
    chief = rank_and_size()[0] == 0
    chosen = [choose_folder(cfg) if chief else None]
    if rank_and_size()[1] > 1:
        dist.broadcast_object_list(chosen)
    folder, resumed = chosen[0]
    dtype = pick_dtype(cfg.dtype, device)
    base = load_base(cfg.base, cfg.vae, cfg.text_encoder, dtype, device, cfg.seed)
    sets = prompt_sets(base, cfg.prompts, cfg.eval_count) if cfg.eval_every else {}
    parameters = lora.load_beside(base.unet, base.unet_file) or \
        lora.inject(base.unet, cfg.rank, generator=sample_generator(cfg.seed, "lora"))
    if len(parameters[0]) != cfg.rank:
        raise ValueError(f"rank = {cfg.rank}: allowed is {len(parameters[0])}, that of the adapters in {base.unet_file}")
    reward = load_reward(cfg.reward, cfg.reward_weights, base.folder, dtype, device)
    dataset = read_clips(cfg, base, dtype) if cfg.data else tiny_clips(base, dtype)
    for prompts in sets.values():
        base.encode_text(prompts)
    base.encode_text([""])
    base.release_encoders()  # everything they would say is kept

    base.unet.checkpoint_activations(cfg.checkpoint_activations or cfg.low_memory)
    if cfg.compile:
        base.unet.compile()
    if chief and holds_run(folder) and not resumed:  # only with --overwrite
        clear(folder)
    caught = []
    run = Run(cfg, folder, base, reward, sets, parameters, resumed, lambda: bool(caught))
    for number in (signal.SIGINT, signal.SIGTERM):  # from here on there is something to save
        signal.signal(number, lambda number, frame: caught.append(number))
    if chief:
        print(f"run folder: {folder}" + (f", from step {run.step}" if run.step else ""))
    try:
        finished = train(cfg, run, base, reward, dataset, lambda: bool(caught))
    except Stopped:
        finished = False
    finally:
        run.close()
    if finished:
        run.compare()
        return 0
    if chief:
        print(f"stopped; continue with: python train.py --resume {folder}")
    return 128 + caught[0] if caught else 1


if __name__ == "__main__":
    run_script("train.py", lambda: main(sys.argv[1:]), refused=(RuntimeError, OSError, SafetensorError))
