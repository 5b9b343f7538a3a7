"""
ReFL, from prompts alone: stop at a random late step, follow the reward of the video it predicts.

    python -m methods.refl                            # the tiny world, in minutes
    python -m methods.refl --late 0.5 --guidance 1    # from earlier steps on, without guidance

Paper: ImageReward (arXiv:2304.05977), Algorithm 1 (reward feedback learning).

Against train.py: (1) it starts from pure noise and needs prompts only; (2) the chain stops at a
random step m of its last quarter, without gradient; (3) one step with gradient predicts z_0, which
is scored in the place of the chain's end.

Ours differs from the authors' code (THUDM/ImageReward, ReFL.py:712-756): (1) the loss is -R, not
1e-3 relu(2 - r), made for ImageReward's scale; (2) guidance is on, as in sampling (there: off);
(3) frames are chosen and weighted as in train.py.
"""
import sys

if not __package__:
    print("start it as: python -m methods.refl", file=sys.stderr)
    sys.exit(2)
from dataclasses import dataclass

import torch
from tyro.conf import Fixed, Suppress

import train
from methods.common import PromptConfig, check as check_common, presets, read_videos
from sampler import chain, guided
from support.ranks import sample_generator
from support.settings import chain_levels


def guess_z_0(base, noise, text, uncond, m, cfg):
    """z_0 (B, C, F, h, w) as chain step m predicts it: all of its noise is taken out at once (DDIM,
    Eq. (12)). Steps D..m+1 build no graph, step m does."""
    levels = chain_levels(base, cfg)
    predict = base.chain_predict(cfg.cache_interval)
    with torch.no_grad():
        z = chain(predict, levels.start * noise, text, uncond, levels, cfg.num_steps, cfg.guidance,
                  0, last=m + 1)                                              # (B, C, F, h, w)
    z_0, _ = guided(predict, z, levels, m, text, uncond, cfg.guidance)        # with gradient
    return z_0                                                                # (B, C, F, h, w)


@dataclass(frozen=True)
class Config(PromptConfig):
    """Fine-tune a text-to-video model by reward feedback learning, from prompts."""
    late: float = 0.25
    """m is drawn from this share of the chain, at its end (authors' code: the last 10 of 40)"""
    grad_steps: Suppress[Fixed[int]] = 1


PRESETS = presets(Config)


def check(cfg):
    check_common(cfg)
    if not 0 < cfg.late <= 1:
        raise ValueError(f"late = {cfg.late}: must be above 0 and at most 1")


def method(cfg, base, rewards, folder):
    videos = read_videos(cfg, base)

    def draw(step):
        # One m for all videos of a step, on all ranks: they run through the chain together.
        noisiest = max(1, round(cfg.late * cfg.num_steps))
        generator = sample_generator(cfg.seed, step, "late")
        m = int(torch.randint(1, noisiest + 1, (), generator=generator))
        *batch, _ = videos.batch(step)
        return *batch, [m] * len(batch[0])

    def score(batch):
        noise, text, g, captions, steps = batch
        uncond = base.unconditional(text)                                     # (1 or B, N, E)
        z_0 = guess_z_0(base, noise, text, uncond, steps[0], cfg)             # (B, C, F, h, w)
        return train.video_rewards(base, rewards, z_0, g, captions, cfg)

    return train.Method(draw, score, videos.description)


if __name__ == "__main__":
    train.start(sys.modules[__name__])
