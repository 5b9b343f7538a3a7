"""
Prompts to train on, and the noise that their videos start from: what methods have that need no clips.

A video's noise comes from its own generator, seeded by what the video is, so that it is the same on any number of ranks and
after a run was continued.
"""
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from tyro.conf import Fixed, Suppress

from formats.weights import HUB_BASE
from support.clips import read_prompts
from support.files import read_json
from support.seeds import sample_generator

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
