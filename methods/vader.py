"""
VADER, to learn from prompts at little cost: reward gradients from one random frame of a video.

    python -m methods.vader                                  # the tiny world, in minutes
    python -m methods.vader --eta 0 --frames-scored 4        # a deterministic chain, four frames
    python -m methods.vader videocrafter --prompts-train prompts.txt     # as its authors ran it

Paper: VADER (arXiv:2407.08737), Algorithm 1.

Against train.py: (1) it starts from pure noise and needs prompts only; (2) it runs the whole chain,
of stochastic steps unless --eta 0; (3) it scores n random frames, one by default, and takes their
plain mean (--lambda-tar 0); --frames-scored 0 is all of them. A video reward sees its own frames.

A long video (Fig. 9): a base that starts from a picture goes on from a video's last frame, --parts
times in all, and the whole is scored. Gradient stays within the last part, unless --grad-parts.
docs/bases.md says what of this is ours.

Ours differs from the authors' code: number of steps, guidance and rank are those of the other
methods here, but for the preset `videocrafter`, which is theirs (scripts/run_text2video_train.sh)
less what is named there.

Letters: B videos, n frames that are scored, N text tokens; others as in sampler.py.
"""
import sys

if not __package__:
    print("start it as: python -m methods.vader", file=sys.stderr)
    sys.exit(2)
from dataclasses import dataclass, replace
from functools import partial

import torch

import train
from methods.common import PromptConfig, check as check_common, fresh_noise, presets, read_videos
from sampler import chain
from support.ranks import sample_generator
from support.settings import chain_levels, check_at_least


def vader_rewards(base, rewards, uncond, batch, cfg):
    """Algorithm 1: noise (B, C, F, h, w), text (B, N, E), g (B, n), captions and keys [B];
    uncond (1, N, E). Returns as train.edit_rewards."""
    noise, text, g, captions, keys = batch
    levels = chain_levels(base, cfg)
    generators = [sample_generator(*key) for key in keys]
    fresh = fresh_noise(noise, generators, cfg.num_steps)                     # (D, B, C, F, h, w)

    # 1. The whole chain; fresh noise comes in at every step, and the last K build a graph. Each
    #    next part of a long video does the same, from the last frame of the part before.
    made, predict = [], base.chain_predict(cfg.cache_interval)
    noise_parts, fresh_parts = noise.chunk(cfg.parts, dim=2), fresh.chunk(cfg.parts, dim=3)
    for k in range(cfg.parts):
        if k:
            text = base.next_text(made[-1])
            uncond = base.unconditional(text)
        grad_steps = cfg.grad_steps if k >= cfg.parts - cfg.grad_parts else 0
        made.append(chain(predict, levels.start * noise_parts[k], text, uncond, levels,
                          cfg.num_steps, cfg.guidance, grad_steps, cfg.eta, fresh_parts[k]))
    z_0 = torch.cat(made, dim=2)                                              # (B, C, F, h, w)

    # 2. Score the random frames; lambda 0 gives their plain mean. A video reward has its own.
    return train.video_rewards(base, rewards, z_0, g, captions, cfg)


def random_frames(num_frames, n, generator):
    """n different frames in order of time, (n,) int64; all of them for n = 0."""
    chosen = torch.randperm(num_frames, generator=generator)[:n or num_frames]
    return chosen.sort().values                                               # (n,)


@dataclass(frozen=True)
class Config(PromptConfig):
    """Fine-tune a text-to-video model by VADER, from prompts."""
    frames_scored: int = 1
    """n, random frames of a video that are scored (authors' scripts: 1); 0: all, in order"""
    eta: float = 1.0
    """share of fresh noise in a chain step, 0 (deterministic) to 1 (authors' scripts)"""
    lambda_tar: float = 0.0
    """how fast weights fall off from the centre; 0: the plain mean over frames, as in the paper"""
    parts: int = 1
    """of a video, --frames each: the next one starts from the last frame of the one before, and the
    whole is scored (paper, Fig. 9); image-to-video alone"""
    grad_parts: int = 1
    """last parts that carry gradient; above 1 it also passes the frame that a part starts from"""


PRESETS = presets(Config, lr=2e-4, lambda_tar=0.)

# The authors' run of VideoCrafter2. Their loss (1.5 * .1 |10 - a| + |1 - h|) / 2, of the aesthetic
# score a < 10 and HPSv2.1's h < 1, has the gradient of -(.075 a + .5 h). Their alpha is PEFT's
# default, 8: a scale of a half. Ours: no weight decay, no dropout, adapters drawn as lora.py says,
# evaluations, checkpoints, and aesthetic sees a frame's middle square, where theirs is squeezed.
PRESETS["videocrafter"] = replace(
    PRESETS["videocrafter"], frames=12, fps=24, num_steps=25, guidance=12., rank=16, lora_alpha=8.,
    lora_layers="qkv", reward=("hpsv2.1/stretch=0.5", "aesthetic=0.075"), batch_size=32, steps=450,
    warmup=0, eval_every=50, save_every=50)


def check(cfg):
    check_at_least(cfg, parts=1, grad_parts=1, frames=min(cfg.parts, 2))
    if cfg.grad_parts > cfg.parts:
        raise ValueError(f"grad_parts = {cfg.grad_parts}: must be from 1 to {cfg.parts}, the parts")
    cfg = replace(cfg, frames=cfg.parts * (cfg.frames - 1) + 1)  # parts share their ends
    check_common(cfg)
    if not 0 <= cfg.eta <= 1:
        raise ValueError(f"eta = {cfg.eta}: must be from 0 to 1")
    if not 0 <= cfg.frames_scored <= cfg.frames:
        raise ValueError(f"frames_scored = {cfg.frames_scored}: must be from 0 to {cfg.frames}")


def method(cfg, base, rewards, folder):
    videos = read_videos(cfg, base, partial(random_frames, cfg.frames, cfg.frames_scored))

    def score(batch):
        return vader_rewards(base, rewards, base.unconditional(batch[1]), batch, cfg)

    return train.Method(videos.batch, score, videos.description)


if __name__ == "__main__":
    train.start(sys.modules[__name__])
