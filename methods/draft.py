"""
DRaFT-K, from prompts alone: follow the reward's gradient through the last K steps from noise.

    python -m methods.draft                                     # the tiny world, in minutes
    python -m methods.draft --grad-steps 20 --truncate random  # AlignProp

Paper: DRaFT (arXiv:2309.17400), Algorithm 1; AlignProp (arXiv:2310.03739), randomised truncation.

Against train.py: (1) it starts from pure noise and needs prompts only; (2) it runs the whole chain;
(3) --truncate random draws K anew in each step, so that no step of the chain is always left out.
InstructVideo is DRaFT-K but for where the chain starts. Frames are chosen and weighted as there.

Letters: B videos, C channels, F frames, S segments, h and w latent rows and columns, N text tokens,
E their width.
"""
import sys

if not __package__:
    print("start it as: python -m methods.draft", file=sys.stderr)
    sys.exit(2)
from dataclasses import dataclass

import torch

import train
from methods.common import PromptConfig, check as check_common, presets, read_videos
from sampler import chain
from support.ranks import sample_generator


def draft_rewards(base, rewards, uncond, batch, cfg):
    """Algorithm 1: noise (B, C, F, h, w), text (B, N, E), g (B, S), captions [B], K [B], which is
    the same for all; uncond (1, N, E). Returns as train.edit_rewards."""
    noise, text, g, captions, grad_steps = batch
    levels = base.levels(cfg.num_steps)
    # The whole chain; only its last K steps build a graph.
    z_0 = chain(base.chain_predict(cfg.cache_interval), levels.start * noise, text, uncond, levels,
                cfg.num_steps, cfg.guidance, grad_steps[0])                   # (B, C, F, h, w)
    return train.video_rewards(base, rewards, z_0, g, captions, cfg)


def last_steps(step, cfg):
    """K of a step: --grad-steps, or a random number up to it, the same on all ranks."""
    if cfg.truncate == "fixed":
        return cfg.grad_steps
    generator = sample_generator(cfg.seed, step, "truncate")
    return int(torch.randint(1, cfg.grad_steps + 1, (), generator=generator))


@dataclass(frozen=True)
class Config(PromptConfig):
    """Fine-tune a text-to-video model by DRaFT-K, from prompts."""
    truncate: str = "fixed"
    """fixed: K is always --grad-steps (DRaFT-K); random: K is drawn from 1 to --grad-steps in each
    step (AlignProp, with --grad-steps D)"""


PRESETS = presets(Config)


def check(cfg):
    """All that can be known before anything is loaded; ValueError in one line."""
    check_common(cfg)
    if cfg.truncate not in ("fixed", "random"):
        raise ValueError(f"truncate {cfg.truncate!r}: must be fixed or random")


def method(cfg, base, rewards, folder):
    """DRaFT-K as train.train takes it."""
    videos = read_videos(cfg, base)

    def draw(step):
        *batch, _ = videos.batch(step)
        return *batch, [last_steps(step, cfg)] * len(batch[0])

    def score(batch):
        return draft_rewards(base, rewards, base.unconditional(batch[1]), batch, cfg)

    return train.Method(draw, score, videos.description)


if __name__ == "__main__":
    train.start(sys.modules[__name__])
