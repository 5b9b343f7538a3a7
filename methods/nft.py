"""
DiffusionNFT (arXiv:2509.16117), for rewards without gradient: towards good videos, away from bad.

    python -m methods.nft --timestep-fraction 0.5             # the tiny world, half of all levels

Against train.py: (1) it starts from pure noise and needs prompts only; (2) no gradient passes
through the reward or the chain; (3) a round samples the videos of --updates optimizer steps, and
compares those of a prompt; (4) a step noises its videos to levels of the chain, and moves the guess
of z_0 towards a good video and away from a bad one; (5) all are scored on the same frames. At the
start of a round its gradient is that of the denoising loss, weighted by the advantage.

Ours differs from NVlabs/DiffusionNFT: the old policy is the model at the start of its round (there
a moving average, whose decay begins at 0), and a run stops between rounds only.

Letters: B videos, n pairs of a video and a noise level; others as in sampler.py.
"""
import sys

if not __package__:
    print("start it as: python -m methods.nft", file=sys.stderr)
    sys.exit(2)
from dataclasses import dataclass

import torch

import lora
import train
from methods import common
from reward import first_frames
from sampler import sample
from support.ranks import sample_generator
from support.settings import chain_levels

LARGEST = 5.  # advantage, and the weight of the loss (authors: config/nft.py, adv_clip_max)


def optimality(rewards, group):
    """r (B,) from 0 (bad) to 1 (good), 1/2 where a prompt's videos, `group` neighbours, are equal.
    The standard deviation is that of all rewards (authors: stat_tracking.py:26-31)."""
    by_prompt = rewards.view(-1, group)
    centred = by_prompt - by_prompt.mean(dim=1, keepdim=True)
    A = centred.flatten() / (rewards.std(correction=0) + 1e-4)                # (B,)
    return (A / LARGEST).clamp(-1, 1) / 2 + .5


def scaled_error(guess, z):
    """|guess - z|^2 / |guess - z|, means over a video's elements, (B,). The divisor, which has no
    gradient, keeps noisy levels, where guesses are far off, from outweighing the others."""
    off = guess - z                                                           # (B, C, F, h, w)
    distance = off.detach().abs().flatten(1).mean(dim=1).clamp(min=1e-5)
    return off.square().flatten(1).mean(dim=1) / distance                     # (B,)


def nft_loss(z_0, old_z_0, z, r, beta):
    """The paper's loss, (B,): the guesses z_0 and old_z_0 (without gradient) of the new and the old
    model for a video z, and its r. One mixture steps from old to new, the other against it."""
    positive = beta * z_0 + (1 - beta) * old_z_0                              # (B, C, F, h, w)
    negative = (1 + beta) * old_z_0 - beta * z_0                              # (B, C, F, h, w)
    return (r * scaled_error(positive, z) + (1 - r) * scaled_error(negative, z)) / beta


def swap_adapters(network, values):
    """Give the adapters other values; returns copies of what they were, {name: tensor}."""
    before = {}
    for name, tensor in lora.adapter_state(network).items():
        before[name] = tensor.clone()
        tensor.copy_(values.get(name, tensor))
    return before


def nft_rewards(base, old, batch, cfg):
    """Minus the loss (n,) of pairs: z, eps (n, C, F, h, w), r (n,), steps [n] and text (n, N, E);
    old: the old model's adapters."""
    z, eps, r, steps, text = batch
    levels = chain_levels(base, cfg)
    t, alpha, sigma = torch.tensor([levels.t, levels.alpha, levels.sigma])[:, steps].to(z.device)
    alpha, sigma = alpha.view(-1, 1, 1, 1, 1), sigma.view(-1, 1, 1, 1, 1)     # a row per pair
    z_t, level = alpha * z + sigma * eps, (t, alpha, sigma)                   # Eq. (5)

    # 1. What the old model says, and the base, before the graph is built.
    with torch.no_grad():
        current = swap_adapters(base.network, old)
        old_z_0, _ = base.predict(z_t, level, text)                           # (n, C, F, h, w)
        swap_adapters(base.network, current)
        if cfg.kl:
            lora.set_scale(base.network, 0.)
            base_guess = base.predict(z_t, level, text)                       # z_0 and eps
            lora.set_scale(base.network, 1.)

    # 2. What the model says now.
    z_0, guess = base.predict(z_t, level, text)                               # (n, C, F, h, w)
    distance = base.error(z_0, guess, *base_guess, level) if cfg.kl else 0.   # (n,)
    return -LARGEST * nft_loss(z_0, old_z_0, z, r, cfg.beta) - cfg.kl * distance


def pairs(batch, step, cfg):
    """The n pairs of an update: some levels of the chain, each with all videos and new noise."""
    z, mean_scores, captions, keys, r = batch
    eps, chosen = [], common.chain_steps(cfg, step, cfg.num_steps)            # of D..1
    for i in chosen:
        generators = [sample_generator(*key, "learn", i) for key in keys]
        eps.append(common.fresh_noise(z, generators, 1)[0])                   # (B, C, F, h, w)
    steps, count = torch.tensor(chosen).repeat_interleave(len(z)).tolist(), len(chosen)
    return (z.repeat(count, 1, 1, 1, 1), torch.cat(eps), r.repeat(count), steps,
            captions * count, mean_scores.repeat(count) / count, [count] * len(steps))


@dataclass(frozen=True)
class Config(common.RoundConfig):
    """Fine-tune a text-to-video model by DiffusionNFT, from prompts."""
    group: int = 4
    """videos of each prompt, which are compared (authors: 24)"""
    beta: float = 1.0
    """how far the mixtures are from the old model, in steps to the new one (authors: 1 or 0.1)"""
    kl: float = 1e-4
    """weight of the distance to the base's predictions (authors); 0 spares a call"""
    timestep_fraction: float = 0.25
    """share of the chain's levels that an update learns from, random ones (authors: 0.99)"""
    sampling_guidance: float = 1.0
    """of the videos learned from (authors: 1, so no guidance); learning runs one branch"""
    batch_size: int = 16
    """videos behind an optimizer step, over all ranks"""


PRESETS = common.presets(Config, updates=2, group=8, batch_size=64, timestep_fraction=1., lr=3e-4)


def check(cfg):
    common.check_updates(cfg, "beta", group=2, kl=0)


def method(cfg, base, rewards, folder):
    videos = common.read_videos(cfg, base, lambda _: first_frames(cfg.frames, cfg.segments))
    batches, old = [], {}  # of the round: its videos, and the adapters that it began with

    def sample_z(noise, text, keys):
        uncond, levels = base.unconditional(text), chain_levels(base, cfg)
        return [sample(base.predict, noise, text, uncond, levels, cfg.sampling_guidance)]

    def draw(step):
        if step % cfg.updates == 0:
            old.update(swap_adapters(base.network, {}))
            batches[:] = common.sample_round(
                sample_z, lambda R, _: optimality(R, cfg.group), base, rewards, videos, step, cfg)
        return pairs(batches[step % cfg.updates], step, cfg)

    def score(batch):
        z, eps, r, steps, captions, mean_scores, count = batch
        R = nft_rewards(base, old, (z, eps, r, steps, base.encode_text(captions)), cfg)
        return R / count[0], {"reward": mean_scores}

    return train.Method(draw, score, videos.description, stop_every=cfg.updates)


if __name__ == "__main__":
    train.start(sys.modules[__name__])
