"""
RWR, for rewards without gradient: denoise sampled videos again, the good ones with more weight.

    python -m methods.rwr                                     # the tiny world, in minutes
    python -m methods.rwr --data clips.txt                    # weights real clips (official code)

Paper: reward-weighted regression for text-to-image models (arXiv:2302.12192), and Sec. 4.2 of DDPO
(arXiv:2305.13301), where its videos come from the model itself.

Against train.py: (1) no gradient passes through the reward or the chain; (2) a round samples
--videos from prompts, scores them, and weights them by a softmax of their rewards; (3) steps learn
from the videos of their round by the base's own loss, weighted; (4) all videos are scored on the
same frames, the first of each segment, as R would else say more of the frames than of the video.
With --data real clips take the videos' place, each weighted by its own reward, without softmax
(VGen, utils/reward/reward.py:406).

Ours differs from jannerm/ddpo: rewards are standardised before the softmax. HPSv2 spreads by 0.015
only, and a softmax of such numbers gives every video the same weight.
"""
import sys

if not __package__:
    print("start it as: python -m methods.rwr", file=sys.stderr)
    sys.exit(2)
from dataclasses import dataclass
from functools import partial

import torch

import train
from data import batch_indices
from methods import common
from reward import first_frames
from support.ranks import rank_and_size, sample_generator
from support.settings import check_at_least


def reward_weights(rewards, temperature):
    """w (B,) = B softmax(r' / temperature), r' the standardised rewards (DDPO, Sec. 4.2, w_RWR).
    They sum to B. Equal rewards give weights of 1, the plain denoising loss."""
    spread = rewards.std(correction=0)
    standardised = (rewards - rewards.mean()) / spread.clamp(min=1e-8)        # (B,)
    return len(rewards) * torch.softmax(standardised / temperature, dim=0)    # (B,)


@dataclass(frozen=True)
class Config(common.NoChainGradient, common.NoiseConfig):
    """Fine-tune a text-to-video model by reward-weighted regression."""
    rounds: int = 4
    """times that new videos are sampled, each for an equal share of the steps"""
    videos: int = 64
    """videos of a round, over all ranks (jannerm/ddpo: 10,240)"""
    temperature: float = 1.0
    """of the softmax, in standard deviations of the reward; the smaller, the fewer videos count"""
    batch_size: int = 16
    """videos behind an optimizer step, over all ranks"""


PRESETS = common.presets(Config, rounds=10, videos=2048, batch_size=16)


def check(cfg):
    common.check(cfg)
    check_at_least(cfg, "temperature")
    if cfg.data is None:
        common.check_rounds(cfg, "videos")


def method(cfg, base, rewards, folder):
    """RWR as train.train takes it: on sampled videos, or on the clips of --data."""
    if cfg.data:
        source = train.read_clips(cfg, base)
        draw_weighted = partial(weighted_clips, cfg, base, rewards, source)
    else:
        source = common.read_videos(cfg, base, lambda _: first_frames(cfg.frames, cfg.segments))
        draw_weighted = weighted_videos(cfg, base, rewards, source, folder)

    def draw(step):
        share = batch_indices(step, cfg.batch_size, cfg.batch_size, cfg.seed, *rank_and_size())
        generators = [sample_generator(cfg.seed, step, position, "t") for position, _ in share]
        u = torch.stack([torch.rand((), generator=each) for each in generators])    # (B,)
        return *draw_weighted(step), u

    def score(batch):
        z, eps, text, w, mean_scores, u = batch
        error = common.denoising_errors(base, z, eps, u, text)                # (B,)
        return -w.to(error) * error, {"reward": mean_scores}

    return train.Method(draw, score, source.description)


def weighted_videos(cfg, base, rewards, videos, folder):
    """step -> z, eps (B, C, F, h, w), text (B, N, E), w (B,), reward (B,) of its round's videos."""
    def make(part, round_number):
        key = cfg.seed, "round", round_number
        return common.sample_scored(base, rewards, videos, part, cfg, *key)

    rounds = common.Rounds(cfg, folder, videos, make, cfg.videos, at_once=8)

    def draw(step):
        share, sampled, text = rounds.rows(step)
        w = reward_weights(rounds.of(step)["R"], cfg.temperature)  # over the round
        z, eps = sampled["z"], []                                             # (B, C, F, h, w)
        for position, _ in share:
            generator = sample_generator(cfg.seed, step, position)
            white = torch.randn(z.shape[1:], generator=generator)             # (C, F, h, w)
            offset = torch.randn(*z.shape[1:3], 1, 1, generator=generator)    # as train.draw_batch
            eps.append(white + cfg.offset_noise * offset)
        eps = torch.stack(eps).to(base.device)                                # (B, C, F, h, w)
        return z.to(base.device), eps, text, w[[row for _, row in share]], sampled["reward"]
    return draw


@torch.no_grad()
def weighted_clips(cfg, base, rewards, dataset, step):
    """The same for clips, each weighted by its own reward (VGen, utils/reward/reward.py:406)."""
    z, eps, text, g, captions = train.draw_batch(dataset, step, cfg, base)
    g = first_frames(cfg.frames, cfg.segments).to(g).expand_as(g)             # (B, S)
    R, logged = train.video_rewards(base, rewards, z, g, captions, cfg)
    return z, eps, text, R, logged["reward"]


if __name__ == "__main__":
    train.start(sys.modules[__name__])
