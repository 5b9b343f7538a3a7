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

Letters: B videos, C channels, F frames, S segments, h and w latent rows and columns.
"""
import sys

if not __package__:
    print("start it as: python -m methods.rwr", file=sys.stderr)
    sys.exit(2)
from dataclasses import dataclass

import torch
from tyro.conf import Fixed, Suppress

import train
from data import batch_indices
from methods import common
from reward import first_frames
from sampler import sample
from support.ranks import rank_and_size, sample_generator
from support.settings import chain_levels, check_at_least


def reward_weights(rewards, temperature):
    """w (B,) = B softmax(r' / temperature), r' the standardised rewards (DDPO, Sec. 4.2, w_RWR).
    They sum to B. Equal rewards give weights of 1, the plain denoising loss."""
    spread = rewards.std(correction=0)
    standardised = (rewards - rewards.mean()) / spread.clamp(min=1e-8)        # (B,)
    return len(rewards) * torch.softmax(standardised / temperature, dim=0)    # (B,)


def denoising_errors(base, z, eps, u, text):
    """The base's own loss for each video (Eq. (1) of InstructVideo): z (B, C, F, h, w) -> (B,)."""
    t, alpha, sigma = [v.to(z.device) for v in base.level(u)]                 # (B,), ...
    z_t = alpha * z + sigma * eps                                             # Eq. (5)
    z_0, guess = base.predict(z_t, (t, alpha, sigma), text)                   # (B, C, F, h, w)
    return base.error(z_0, guess, z, eps, (t, alpha, sigma))                  # (B,)


@torch.no_grad()
def sample_videos(base, rewards, videos, round_number, cfg):
    """This rank's videos of a round, scored, 8 at a time: {z, R, reward, prompt}."""
    share, levels = videos.share(round_number, cfg.videos), chain_levels(base, cfg)
    for start in range(0, len(share), 8):
        part = share[start:start + 8]
        noise, text, g, captions, _ = videos.start(part, cfg.seed, "round", round_number)
        uncond = base.unconditional(text)                                     # (1 or B, N, E)
        z = sample(base.predict, noise, text, uncond, levels, cfg.guidance)
        R, logged = train.video_rewards(base, rewards, z, g, captions, cfg)
        indices = torch.tensor([index for _, index in part])                  # (B,)
        yield {"z": z, "R": R, "reward": logged["reward"], "prompt": indices}


@dataclass(frozen=True)
class Config(common.NoiseConfig):
    """Fine-tune a text-to-video model by reward-weighted regression."""
    rounds: int = 4
    """times that new videos are sampled, each for an equal share of the steps"""
    videos: int = 64
    """videos of a round, over all ranks (jannerm/ddpo: 10,240)"""
    temperature: float = 1.0
    """of the softmax, in standard deviations of the reward; the smaller, the fewer videos count"""
    batch_size: int = 16
    """videos behind an optimizer step, over all ranks"""
    grad_steps: Suppress[Fixed[int]] = 1
    cache_interval: Suppress[Fixed[int]] = 1


PRESETS = common.presets(Config, rounds=10, videos=2048, batch_size=16)


def check(cfg):
    """All that can be known before anything is loaded; ValueError in one line."""
    common.check(cfg)
    check_at_least(cfg, "temperature")
    if cfg.data is None:
        common.check_rounds(cfg, "videos")


def method(cfg, base, rewards, folder):
    """RWR as train.train takes it: on sampled videos, or on the clips of --data."""
    if cfg.data:
        source = train.read_clips(cfg, base)
        draw_weighted = weighted_clips(cfg, base, rewards, source)
    else:
        source = common.read_videos(cfg, base, lambda _: first_frames(cfg.frames, cfg.segments))
        draw_weighted = weighted_videos(cfg, base, rewards, source, folder)

    def draw(step):
        share = batch_indices(step, cfg.batch_size, cfg.batch_size, cfg.seed, *rank_and_size())
        u = []
        for position, _ in share:
            generator = sample_generator(cfg.seed, step, position, "t")
            u.append(torch.rand((), generator=generator))
        return *draw_weighted(step), torch.stack(u)

    def score(batch):
        z, eps, text, w, mean_scores, u = batch
        error = denoising_errors(base, z, eps, u, text)                       # (B,)
        return -w.to(error) * error, {"reward": mean_scores}

    return train.Method(draw, score, source.description)


def weighted_videos(cfg, base, rewards, videos, folder):
    """step -> z, eps (B, C, F, h, w), text (B, N, E), w (B,), reward (B,) of its round's videos."""
    def make(round_number):
        return sample_videos(base, rewards, videos, round_number, cfg)

    rounds = common.Rounds(cfg, folder, make, cfg.videos)

    def draw(step):
        sampled = rounds.of(step)
        w = reward_weights(sampled["R"], cfg.temperature)  # over the round
        share = batch_indices(step, cfg.batch_size, cfg.videos, cfg.seed, *rank_and_size())
        chosen = torch.tensor([index for _, index in share])                  # (B,)
        z = sampled["z"][chosen]                                              # (B, C, F, h, w)
        eps = []
        for position, _ in share:
            generator = sample_generator(cfg.seed, step, position)
            white = torch.randn(z.shape[1:], generator=generator)             # (C, F, h, w)
            offset = torch.randn(*z.shape[1:3], 1, 1, generator=generator)    # as train.draw_batch
            eps.append(white + cfg.offset_noise * offset)
        text = base.encode_text([videos.prompts[i] for i in sampled["prompt"][chosen].tolist()])
        eps = torch.stack(eps).to(base.device)                                # (B, C, F, h, w)
        return z.to(base.device), eps, text, w[chosen], sampled["reward"][chosen]
    return draw


def weighted_clips(cfg, base, rewards, dataset):
    """The same for clips, each weighted by its own reward (VGen, utils/reward/reward.py:406)."""
    @torch.no_grad()
    def draw(step):
        batch = train.draw_batch(dataset, step, cfg, base)
        z, eps, text, g, captions = batch
        g = first_frames(cfg.frames, cfg.segments).to(g).expand_as(g)         # (B, S)
        R, logged = train.video_rewards(base, rewards, z, g, captions, cfg)
        return z, eps, text, R, logged["reward"]
    return draw


if __name__ == "__main__":
    train.start(sys.modules[__name__])
