"""
InstructVideo in one step: noise a real clip part of the way, and score what one network call sees.

    python -m methods.onestep                                  # the tiny world
    python -m methods.onestep --guidance 1 --tau-low 0.1       # one branch alone, and cleaner clips

Paper: InstructVideo (arXiv:2312.12490), Sec. 3.2.1, taken to its limit. The edit makes tau D calls
to come back from t_noi; the network's guess of z_0 at t_noi is where the first of them points.

Against train.py: (1) one call with gradient, and none without: a fifth of the work; (2) the noise
level is drawn anew for each clip, from round(tau_low D) to round(tau_high D); (3) what is scored is
the guessed z_0, which is smoother than an edit. It was there before: the reward half of T2V-Turbo
(arXiv:2405.18750), ReFL on noised clips, Direct-Align of SRPO (arXiv:2509.06942) with its second
level at no noise. Direct-Align's small steps are not offered: tried in the tiny world, they gained
less, lost more motion, and broke after 120 steps.
"""
import sys

if not __package__:
    print("start it as: python -m methods.onestep", file=sys.stderr)
    sys.exit(2)
from dataclasses import dataclass

import torch
from tyro.conf import Fixed, Suppress

import train
from data import batch_indices
from methods.common import presets
from sampler import Levels, add_noise, edit_steps, guided
from support.ranks import rank_and_size, sample_generator
from support.settings import chain_levels


def onestep_rewards(base, rewards, uncond, batch, cfg):
    """Noise z (B, C, f, h, w) to the level of chain step i [B], guess z_0 with gradient, score it:
    text (B, N, E), g (B, S), captions [B]; uncond (1, N, E). Returns as train.edit_rewards."""
    z, eps, text, g, captions, steps = batch
    levels = chain_levels(base, cfg)
    t, alpha, sigma = torch.tensor([levels.t, levels.alpha, levels.sigma])[:, steps].to(z.device)
    alpha, sigma = alpha.view(-1, 1, 1, 1, 1), sigma.view(-1, 1, 1, 1, 1)          # a row per clip
    # A chain of one step, each clip's own.
    levels = Levels([0., t], [1., alpha], [0., sigma], first_guidance=levels.first_guidance)

    z_t = add_noise(z, eps, levels, 1)                                             # Eq. (5)
    z_0, _ = guided(base.predict, z_t, levels, 1, text, uncond, cfg.guidance)
    return train.video_rewards(base, rewards, z_0, g, captions, cfg)


@dataclass(frozen=True)
class Config(train.Config):
    """Fine-tune a text-to-video model by one-step edits of clips."""
    tau_low: float = 0.3
    """least noise, as a share of the chain (ours: tried in the tiny world)"""
    tau_high: float = 0.7
    """most noise, as a share of the chain (ours: tried in the tiny world)"""
    tau: Suppress[Fixed[float]] = 0.6
    grad_steps: Suppress[Fixed[int]] = 1
    cache_interval: Suppress[Fixed[int]] = 1


PRESETS = presets(Config)


def check(cfg):
    train.check(cfg)
    if edit_steps(cfg.tau_low, cfg.num_steps) > edit_steps(cfg.tau_high, cfg.num_steps):
        raise ValueError(f"tau_low = {cfg.tau_low}: must be at most tau_high = {cfg.tau_high}")


def method(cfg, base, rewards, folder):
    dataset = train.read_clips(cfg, base)
    least = edit_steps(cfg.tau_low, cfg.num_steps)
    most = edit_steps(cfg.tau_high, cfg.num_steps)

    def draw(step):
        share = batch_indices(step, cfg.batch_size, len(dataset), cfg.seed, *rank_and_size())
        generators = [sample_generator(cfg.seed, step, position, "level") for position, _ in share]
        steps = [int(torch.randint(least, most + 1, (), generator=each)) for each in generators]
        return *train.draw_batch(dataset, step, cfg, base), steps

    def score(batch):
        return onestep_rewards(base, rewards, base.unconditional(batch[2]), batch, cfg)

    return train.Method(draw, score, dataset.description)


if __name__ == "__main__":
    train.start(sys.modules[__name__])
