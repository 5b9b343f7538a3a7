"""
Prompts to train on, and the noise that their videos start from: what methods have that need no clips.

A video's noise comes from its own generator, seeded by what the video is, so that it is the same on any number of ranks and
after a run was continued.
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tyro.conf import Fixed, Suppress

from formats.tensors import read_tensors
from formats.weights import HUB_BASE
from support.clips import read_prompts
from support.files import read_json, write_text, write_whole
from support.ranks import gather, is_main_process, on_rank_0, progress, rank_and_size, sample_generator
from support.run import Stopped, read_metrics
from support.settings import check_at_least

# What the preset "modelscope" of every method shares with train.py's.
MODELSCOPE = dict(preset="modelscope", base=HUB_BASE, eval_every=1000, eval_count=0, save_every=500,
                  clips_at_once=1)


@dataclass(frozen=True)
class NoiseSettings:
    """Stands before train.Config among a class's bases: videos start from noise, so no edit ratio can be set."""
    prompts_train: Path | None = None
    """prompts to train on, one a line or in the official list form; default the tiny world's in_domain captions"""
    tau: Suppress[Fixed[float]] = 1.0


@dataclass(frozen=True)
class PromptSettings(NoiseSettings):
    """The same for a method that has prompts only: none of the settings of clips can be set."""
    offset_noise: Suppress[Fixed[float]] = 0.0
    data: Suppress[Fixed[Path | None]] = None
    data_root: Suppress[Fixed[Path | None]] = None
    max_skip: Suppress[Fixed[float]] = 0.1
    workers: Suppress[Fixed[int]] = 2
    cache: Suppress[Fixed[bool]] = True
    cache_dir: Suppress[Fixed[Path]] = Path("cache")


def check_prompts(cfg):
    """ValueError if there is nothing to train on, or if --resume names a run of train.py itself."""
    if cfg.resume and "prompts_train" not in read_json(cfg.resume / "config.json"):
        raise ValueError(f"resume {cfg.resume}: not a run of this method")
    if cfg.prompts_train is not None:
        read_prompts(cfg.prompts_train)
    elif cfg.base != "tiny":
        raise ValueError("no prompts to train on: --prompts-train FILE must name some (only the tiny world has its own)")


def training_prompts(cfg, base, tiny_prompts):
    """
    The prompts of --prompts-train, or what tiny_prompts() returns.

    All are encoded now, as the text encoder may leave the accelerator afterwards.
    """
    prompts = read_prompts(cfg.prompts_train) if cfg.prompts_train else tiny_prompts()
    for start in range(0, len(prompts), 64):
        base.encode_text(prompts[start:start + 64])
    return prompts


def describe(prompts):
    """What the prompts are, in a few words: a run that is continued must have the same."""
    return f"{len(prompts)} prompts, sha256 {hashlib.sha256(chr(10).join(prompts).encode()).hexdigest()[:16]}"


def draw_videos(share, prompts, base, cfg, key, pick_frames):
    """
    What the videos of a share of a batch start from: noise (B, C, F, h, w), text (B, N, E), frames g (B, S), captions [B].

    share: [(position in the whole batch, index of the prompt)], as data.batch_indices gives it. Each video's generator is
    seeded by (*key, position); pick_frames(generator) -> (S,) asks it for the frames to score. ValueError for a size that the
    autoencoder cannot halve.
    """
    pixels = cfg.size or base.default_size
    shape = (base.vae.config.latent_channels, cfg.frames, *base.latent_size(pixels, pixels))
    captions, noise, g = [], [], []
    for position, index in share:
        generator = sample_generator(*key, position)
        captions.append(prompts[index])
        noise.append(torch.randn(shape, generator=generator))                             # (C, F, h, w)
        g.append(pick_frames(generator))                                                  # (S,)
    noise, g = torch.stack(noise).to(base.device), torch.stack(g).to(base.device)
    return noise, base.encode_text(captions), g, captions


# ---------------------------------------------------------------------------------------------------------------------
# Rounds: methods that sample many videos at once, and then learn from them for many steps.
#
# The videos of a round are kept in the run folder. A run that is continued in the middle of a round must learn from the same
# videos, though its adapters have moved on since they were sampled.

def check_rounds(cfg, name):
    """ValueError unless the rounds divide the steps, and the ranks cfg.<name>, the number of a round's videos or pairs."""
    check_at_least(cfg, rounds=1, **{name: 1})
    world_size = rank_and_size()[1]
    if cfg.steps % cfg.rounds:
        raise ValueError(f"steps = {cfg.steps}: must be a multiple of {cfg.rounds}, the rounds")
    if getattr(cfg, name) % world_size:
        raise ValueError(f"{name} = {getattr(cfg, name)}: must be a multiple of {world_size}, the ranks")
    if cfg.resume and cfg.rounds > 1 and read_json(cfg.resume / "config.json")["steps"] != cfg.steps:
        raise ValueError(f"steps = {cfg.steps}: a run of several rounds keeps its steps, since they end its rounds")


def round_of(step, cfg):
    """The round that a step (from 0) belongs to, from 0."""
    return step * cfg.rounds // cfg.steps


class Rounds:
    """The videos of one round after another, in memory and in the run folder. size: videos, or pairs, of one, over all ranks."""

    def __init__(self, size):
        self.size, self.number, self.tensors = size, None, {}

    def get(self, run, number, make):
        """
        {name: (n, ...)} of a round, on the CPU: read from the run folder, or else made, in parts, and written there.

        make() -> an iterable of this rank's parts, {name: (b, ...)}, in order of their places in the whole; the ranks' shares
        follow each other. A signal ends the work on it (Stopped): it will be made again. Only rank 0 reads and writes.
        """
        if number != self.number:
            path = run.folder / f"round_{number:03d}.safetensors"
            if not on_rank_0(path.is_file):
                write_round(path, run, number, make, self.size)
            self.tensors, self.number = on_rank_0(lambda: read_tensors(path)), number
        return self.tensors


def write_round(path, run, number, make, size):
    """Make a round's `size` videos, all ranks their share, and write them."""
    parts, ranks = [], rank_and_size()[1]
    with progress(None, f"sampling round {number}", size, leave=False, disable=not is_main_process()) as bar:
        for part in make():
            parts.append({name: tensor.cpu() for name, tensor in part.items()})
            bar.update(ranks * len(next(iter(part.values()))))
            if run.stop() and ranks == 1:  # with more ranks, leaving alone would keep the others waiting
                raise Stopped
    parts = [part for share in gather(parts) for part in share]
    if is_main_process():
        with write_whole(path) as hidden:
            save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, hidden)


class RewardHistory:
    """
    The last rewards of each prompt, {prompt: rewards} in `last`, kept in rewards.jsonl, a line for each round.

    run: where it stands; what a killed run wrote of later rounds is dropped. length: rewards kept of a prompt.
    """

    def __init__(self, run, length):
        self.path, self.writes, self.length, self.last = run.folder / "rewards.jsonl", run.writes, length, {}
        lines = on_rank_0(lambda: read_metrics(self.path) if self.path.is_file() else [])
        lines = [line for line in lines if line["step"] < run.step]
        if self.writes:
            write_text(self.path, "")
        for line in lines:
            self.add(**line)

    def add(self, step, prompts, rewards):
        """The rewards (n) of a round's videos, whose first step is `step`, and their prompts [n]."""
        for prompt, reward in zip(prompts, rewards):
            self.last[prompt] = [*self.last.get(prompt, []), reward][-self.length:]
        if self.writes:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "prompts": prompts, "rewards": rewards}) + "\n")
