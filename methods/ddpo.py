"""
DDPO, for rewards without gradient: the chain is a policy; raise the probability of steps that led
to good videos.

    python -m methods.ddpo                                    # the tiny world
    python -m methods.ddpo --group 4 --timestep-fraction 0.5  # GRPO's advantage, half of the steps

Paper: DDPO (arXiv:2305.13301), Sec. 4.3, the importance sampling form (DDPO_IS).

Against train.py: (1) it starts from pure noise and needs prompts only; (2) the chain is stochastic,
so each step has a probability; (3) the reward needs no gradient; (4) a round samples the videos of
--updates optimizer steps; from the second on PPO accounts for the model that has moved; (5) all
videos are scored on the same frames, or R would say more of the frames than of the video; (6) what
train.train calls a clip is one chain step of one video. A run stops between rounds only, so that,
continued, it samples each round from the same adapters.

Ours differs from kvablack/ddpo-pytorch: all videos of an update learn from the same chain steps.

Letters: B videos, n pairs of a chain step and a video, D chain steps; others as in sampler.py.
"""
import math
import sys
from dataclasses import dataclass

if not __package__:
    print("start it as: python -m methods.ddpo", file=sys.stderr)
    sys.exit(2)

import torch

import train
from methods import common
from reward import first_frames
from support.clips import say_once
from support.ranks import take
from support.settings import chain_levels

BUFFER = 16  # rewards of a prompt that its statistics need (kvablack: config/base.py)


def log_prob(z_prev, mean, std):
    """log p(z_prev | z_t) (B,) under N(mean, std^2), float32: the mean over a video's elements
    (kvablack), since a clip range of 1e-4 needs it."""
    z_prev, mean = z_prev.detach().float(), mean.float()
    std = torch.as_tensor(std, dtype=torch.float32, device=mean.device)
    log_p = -((z_prev - mean) / std) ** 2 / 2 - std.log() - math.log(2 * math.pi) / 2
    return log_p.flatten(1).mean(dim=1)                                       # (B,)


def ppo_loss(log_prob, old_log_prob, advantage, clip_range=1e-4):
    """PPO's clipped objective (arXiv:1707.06347, Eq. (7)), negated: each (B,) -> a scalar."""
    ratio = torch.exp(log_prob - old_log_prob)                                # (B,)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)                     # (B,)
    return torch.maximum(-advantage * ratio, -advantage * clipped).mean()


def advantages(rewards, prompts, earlier=None, group=1):
    """A (B,) = (r - mean) / std, limited to +-5: how much better than usual is a video? With group
    > 1 mean and std are of its prompt's videos here (GRPO, arXiv:2402.03300, Sec. 4.1); else of its
    prompt's last 16 rewards, with those of `earlier` {prompt: rewards}, or, of fewer, all here."""
    A = torch.zeros_like(rewards)
    for prompt in set(prompts):
        same_prompt = torch.tensor([other == prompt for other in prompts])    # (B,)
        compared = rewards[same_prompt]
        if group == 1:
            before = rewards.new_tensor((earlier or {}).get(prompt, []))
            known = torch.cat([before, compared])
            compared = known[-BUFFER:] if len(known) >= BUFFER else rewards
        centred = rewards[same_prompt] - compared.mean()
        A[same_prompt] = centred / (compared.std(correction=0) + 1e-6)
    return A.clamp(-5, 5)                                                     # (B,)


@torch.no_grad()
def sample_path(base, noise, text, uncond, keys, cfg):
    """The chains of a batch, z_T to z_0 (B, D + 1, C, F, h, w), and log p of their steps (B, D)."""
    path, steps = common.sample_path(base, noise, text, uncond, keys, cfg)
    log_probs = []
    for z_prev, (mean, std) in zip(path[1:], steps):
        if std:  # the last step of a chain that ends without noise has no density
            log_probs.append(log_prob(z_prev, mean, std))                     # (B,)
    return torch.stack(path, dim=1), torch.stack(log_probs, dim=1)


def pairs(batch, step, cfg):
    """The n pairs that an update learns from: chosen chain steps, each with all videos."""
    _, path, log_probs, mean_scores, captions, _, A = batch
    steps = torch.tensor(common.chain_steps(cfg, step, log_probs.shape[1]))   # of D..1
    at, count = cfg.num_steps - steps, len(steps)                             # 0 is the first step
    z_t, z_prev = path[:, at].transpose(0, 1), path[:, at + 1].transpose(0, 1)
    # A video's pairs share its advantage and its reward, so that it counts once.
    return (z_t.flatten(0, 1), z_prev.flatten(0, 1), log_probs[:, at].T.flatten(),
            A.repeat(count) / count, mean_scores.repeat(count) / count, captions * count,
            steps.repeat_interleave(len(A)).tolist())


@dataclass(frozen=True)
class Config(common.RoundConfig):
    """Fine-tune a text-to-video model by DDPO, from prompts."""
    group: int = 1
    """videos of each prompt in a batch; above 1, those of a round are compared (GRPO)"""
    clip_range: float = 1e-4
    """how far PPO lets the ratio move (kvablack: config/base.py)"""
    timestep_fraction: float = 1.0
    """share of the chain's steps that an update learns from, random ones (kvablack: all)"""
    batch_size: int = 8
    """videos behind an optimizer step, over all ranks"""


PRESETS = common.presets(Config, updates=4, batch_size=64, lr=3e-4)


def check(cfg):
    common.check_updates(cfg, "clip_range")


def method(cfg, base, rewards, folder):
    videos = common.read_videos(cfg, base, lambda _: first_frames(cfg.frames, cfg.segments))
    if chain_levels(base, cfg).fresh[1] == 0:
        say_once("the last chain step adds no noise, so the others alone are learned from")
    batches, known = [], {}  # of the round; {prompt: its rewards so far}

    def sample(noise, text, keys):
        path, log_p = sample_path(base, noise, text, base.unconditional(text), keys, cfg)
        return path[:, -1], path, log_p

    def draw(step):
        def compare(R, prompts):  # over the whole round
            earlier = common.earlier_rewards(folder, step, prompts, R.tolist(), known)
            return advantages(R, prompts, earlier, cfg.group)

        if step % cfg.updates == 0:
            batches[:] = common.sample_round(sample, compare, base, rewards, videos, step, cfg)
        return pairs(batches[step % cfg.updates], step, cfg)

    def score(batch):
        z_t, z_prev, old_log_prob, A, mean_scores, captions, steps = batch
        text = base.encode_text(captions)
        R = torch.zeros_like(A)
        for i in set(steps):
            of_step = [k for k, other in enumerate(steps) if other == i]
            part = take(text, of_step)
            mean, std = common.policy(base, z_t[of_step], i, part, base.unconditional(part), cfg)
            new_log_prob = log_prob(z_prev[of_step], mean, std)
            R[of_step] = -ppo_loss(new_log_prob, old_log_prob[of_step], A[of_step], cfg.clip_range)
        return R, {"reward": mean_scores}

    return train.Method(draw, score, videos.description, stop_every=cfg.updates)


if __name__ == "__main__":
    train.start(sys.modules[__name__])
