"""
ReFL: stop the chain at a random late step, and follow the reward of the video that it predicts.

    python methods/refl.py                            # the tiny world, in minutes
    python methods/refl.py --late 0.5 --guidance 1    # from earlier steps on, without guidance
    torchrun --nproc_per_node=4 methods/refl.py modelscope --prompts-train prompts.txt \
        --prompts animals=animals.txt

Paper: ImageReward (arXiv:2304.05977), Algorithm 1 (reward feedback learning).

Against train.py: (1) it starts from pure noise and needs prompts only; (2) the chain stops at a
random step m of its last quarter, without gradient; (3) one step with gradient predicts z_0, which
is scored in the place of the chain's end.

Ours differs from the authors' code (THUDM/ImageReward, ReFL.py:712-756): (1) the loss is -R, not
1e-3 relu(2 - r), made for ImageReward's scale; (2) guidance is on, as in sampling (there: off);
(3) frames are chosen and weighted as in train.py.

Letters: B videos, C channels, F frames, S segments, h and w latent rows and columns, N text tokens.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tyro.conf import Fixed, Suppress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from bases.deep_cache import denoiser  # noqa: E402
from data import batch_indices  # noqa: E402
from evaluate import prompt_sets  # noqa: E402
from methods import common as prompting  # noqa: E402
from reward import segment_frames  # noqa: E402
from sampler import GUIDANCE, alpha_bars, ddim_step, ddpm_step, guided_eps  # noqa: E402
from support.ranks import (  # noqa: E402
    rank_and_size,
    run_script,
    sample_generator,  # noqa: E402
)


def predict(base, noise, text, uncond, m, cfg):
    """
    z_0 (B, C, F, h, w) as chain step m sees it. Steps D..m+1 build no graph, step m does.

    Its noise is taken out at one go, z_0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t): the
    predicted z_0 in DDIM's Eq. (12).
    """
    alpha_bar = alpha_bars()
    stride = len(alpha_bar) // cfg.num_steps
    z, eps_model = noise, denoiser(base, cfg.cache_interval)
    with torch.no_grad():
        for i in range(cfg.num_steps, m, -1):
            t = ddpm_step(i, cfg.num_steps)
            eps = guided_eps(eps_model, z, t, text, uncond, cfg.guidance)
            z = ddim_step(z, eps, t, t - stride, alpha_bar)                   # (B, C, F, h, w)

    t = ddpm_step(m, cfg.num_steps)
    eps = guided_eps(eps_model, z, t, text, uncond, cfg.guidance)             # with gradient
    a = float(alpha_bar[t])
    return (z - (1 - a) ** 0.5 * eps) / a**0.5                                # (B, C, F, h, w)


def refl_rewards(base, reward, uncond, batch, cfg):
    """R (B,) of the predicted videos, and what to log, as train.edit_rewards."""
    noise, text, g, captions, m = batch
    z_0 = predict(base, noise, text, uncond, m[0], cfg)                       # (B, C, F, h, w)
    return train.video_rewards(base, reward, z_0, g, captions, cfg)


# ----------------------------------------------------------------------------------------------
# Settings, and the parts for train.main

@dataclass(frozen=True)
class Config(prompting.PromptSettings, train.Config):
    """Fine-tune a text-to-video model by reward feedback learning, from prompts."""
    late: float = 0.25
    """m is drawn from this share of the chain, at its end (authors' code: the last 10 of 40)"""
    grad_steps: Suppress[Fixed[int]] = 1


PRESETS = {
    "tiny": Config(),
    "modelscope": Config(
        **prompting.MODELSCOPE, guidance=GUIDANCE, steps=20_000, batch_size=8, lr=1e-5)}


def check(cfg):
    """All that can be known before anything is loaded; ValueError in one line."""
    train.check(cfg, needs_clips=False)
    prompting.check_prompts(cfg)
    if not 0 < cfg.late <= 1:
        raise ValueError(f"late = {cfg.late}: must be above 0 and at most 1")


def method(cfg, base, reward):
    """ReFL as the two functions that train.train takes."""
    prompts = prompting.training_prompts(
        cfg, base, lambda: prompt_sets(base, (), 0)["in_domain"])
    uncond = base.encode_text([""])                                           # (1, N, E)

    pick_frames = lambda own: segment_frames(cfg.frames, cfg.segments, 1, own)[0]         # (S,)

    def draw(step):
        share = batch_indices(step, cfg.batch_size, len(prompts), cfg.seed, *rank_and_size())
        batch = prompting.draw_videos(share, prompts, base, cfg, (cfg.seed, step), pick_frames)

        # One m for all videos of a step, on all ranks: they run through the chain together.
        latest = max(1, round(cfg.late * cfg.num_steps))
        generator = sample_generator(cfg.seed, step, "late")
        m = int(torch.randint(1, latest + 1, (), generator=generator))
        return *batch, [m] * len(share)

    def score(batch):
        return refl_rewards(base, reward, uncond, batch, cfg)

    draw.data = prompting.describe(prompts)
    return draw, score


def main(argv):
    """As train.main; returns the exit status."""
    return train.main(argv, PRESETS, __doc__, check, method, script="methods/refl.py")


if __name__ == "__main__":
    run_script("methods/refl.py", lambda: main(sys.argv[1:]),
               refused=(RuntimeError, OSError, SafetensorError))
