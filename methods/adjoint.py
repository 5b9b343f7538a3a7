"""
Adjoint Matching: follow the reward, but stay a tilted copy of the base, p(z_0) exp(lambda R).

    python -m methods.adjoint                        # the tiny world
    python -m methods.adjoint --reward-scale 100     # a smaller lambda stays nearer to the base

Paper: Adjoint Matching (arXiv:2409.08861), its "lean adjoint".

Every other method here ends at whatever video has the highest reward; only early stopping keeps it
from there. The optimum of this one has the base's diversity, tilted by the reward.

Against train.py: (1) it starts from pure noise, needs prompts only, and runs the whole chain with
as much fresh noise as DDPM has; (2) the reward's gradient at z_0 is carried back through the frozen
base, a step at a time, which gives the adjoint a of each step; memory does not grow with D; (3)
some steps of the chain learn to move their mean by -std^2 a from the base's.

Ours differs from microsoft/soc-fine-tuning-sd: (1) a is that after the step, so that the gradient
at the base is exactly the reward's through the whole chain (a test says so); (2) the noise levels
are the base's own (there, others); (3) no videos are dropped for a large loss.

Letters: B videos, n pairs of a chain step and a video, D chain steps; others as in sampler.py.
"""
import sys

if not __package__:
    print("start it as: python -m methods.adjoint", file=sys.stderr)
    sys.exit(2)
from dataclasses import dataclass

import torch

import lora
import train
from methods import common
from support.ranks import sample_generator, take
from support.settings import chain_levels, check_at_least

NOISY = .6  # the first part of a chain, from which half of the steps are drawn (am_trainer.py)


def adjoints(base, path, a, text, cfg):
    """The lean adjoint, backwards from a = -lambda dR/dz_0 (B, C, F, h, w):
    {i: the base's mean of chain step i, and a at its end}. The adapters are off: what they change
    is what is learned, and has no part in where it leads. Guidance would make a explode."""
    lora.set_scale(base.network, 0.)
    found = {}
    for i in range(1, cfg.num_steps + 1):
        z_t = path[cfg.num_steps - i].detach().requires_grad_()
        mean, _ = common.policy(base, z_t.clone(), i, text, None, cfg)  # counters refuse a leaf
        found[i] = mean.detach(), a
        a, = torch.autograd.grad((mean * a).sum(), z_t)                       # (B, C, F, h, w)
    lora.set_scale(base.network, 1.)
    return found


def adjoint_loss(mean, base_mean, std, a):
    """|(mean - base_mean) / std + std a|^2, summed over a video's elements: (B,)."""
    control = (mean - base_mean) / std                                        # (B, C, F, h, w)
    return (control + std * a).square().flatten(1).sum(dim=1)


def chosen_steps(step, fresh, cfg):
    """Chain steps that an update learns from, half of them noisy ones; those that add noise."""
    possible = [i for i in range(1, cfg.num_steps + 1) if fresh[i]]
    generator = sample_generator(cfg.seed, step, "timesteps")
    order = [possible[k] for k in torch.randperm(len(possible), generator=generator).tolist()]
    noisy = [i for i in order if i > (1 - NOISY) * cfg.num_steps]
    half = noisy[:(cfg.steps_learned + 1) // 2]
    others = [i for i in order if i not in half]
    clean = [i for i in others if i not in noisy]
    return half + (clean + noisy[len(half):])[:cfg.steps_learned - len(half)]


def pairs(base, rewards, part, step, cfg):
    """n pairs of some videos, in rows: z_t, the base's mean, a, chain step, caption, reward."""
    noise, text, g, captions, keys = part
    path, _ = common.sample_path(base, noise, text, base.unconditional(text), keys, cfg)
    z_0 = path[-1].requires_grad_()
    R, logged = train.video_rewards(base, rewards, z_0, g, captions, cfg)
    a, = torch.autograd.grad(-cfg.reward_scale * R.sum(), z_0)                # (B, C, F, h, w)
    found = adjoints(base, path, a, text, cfg)

    steps, rows = chosen_steps(step, chain_levels(base, cfg).fresh, cfg), []
    for i in steps:
        base_mean, a = found[i]
        for b, caption in enumerate(captions):
            rows.append((path[cfg.num_steps - i][b], base_mean[b], a[b], i, caption,
                         logged["reward"][b] / len(steps)))
    return rows


@dataclass(frozen=True)
class Config(common.NoChainGradient, common.PromptConfig):
    """Fine-tune a text-to-video model by Adjoint Matching, from prompts."""
    reward_scale: float = 1000.0
    """lambda: how far the reward outweighs staying at the base (authors: 1 to 100, for one that
    spreads by 1; HPStiny spreads by 0.1, HPSv2 by 0.015)"""
    steps_learned: int = 4
    """chain steps that an update learns from, half from the noisy 60% (authors: 4 of 50)"""


PRESETS = common.presets(Config, reward_scale=10_000.)


def check(cfg):
    common.check(cfg)
    check_at_least(cfg, reward_scale=0, steps_learned=1)
    if cfg.steps_learned >= cfg.num_steps:
        raise ValueError(f"steps_learned = {cfg.steps_learned}: must be below num_steps = "
                         f"{cfg.num_steps}")


def method(cfg, base, rewards, folder):
    videos = common.read_videos(cfg, base)

    def draw(step):
        rows = []
        for part in train.split_batch(videos.batch(step), cfg.clips_at_once):
            rows += pairs(base, rewards, part, step, cfg)
        z_t, base_mean, a, steps, captions, mean_scores = zip(*rows)
        return (torch.stack(z_t).detach(), torch.stack(base_mean), torch.stack(a), list(steps),
                list(captions), torch.stack(mean_scores))

    def score(batch):
        z_t, base_mean, a, steps, captions, mean_scores = batch
        text = base.encode_text(captions)                                     # (n, N, E)
        R = torch.zeros(len(z_t), device=z_t.device)
        for i in set(steps):
            of_step = [k for k, other in enumerate(steps) if other == i]
            mean, std = common.policy(base, z_t[of_step], i, take(text, of_step), None, cfg)
            R[of_step] = -adjoint_loss(mean, base_mean[of_step], std, a[of_step]).float()
        return R / cfg.steps_learned, {"reward": mean_scores}

    return train.Method(draw, score, videos.description)


if __name__ == "__main__":
    train.start(sys.modules[__name__])
