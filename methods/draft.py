"""
DRaFT-K: follow the reward's gradient through the last K steps of a chain that starts from noise.

    python methods/draft.py                                    # the tiny world, in minutes
    python methods/draft.py --grad-steps 20 --truncate random  # AlignProp
    torchrun --nproc_per_node=4 methods/draft.py modelscope --prompts-train prompts.txt \
        --prompts animals=animals.txt

Paper: DRaFT (arXiv:2309.17400), Algorithm 1; AlignProp (arXiv:2310.03739), randomised truncation.

Against train.py: (1) it starts from pure noise and needs prompts only; (2) it runs the whole chain;
(3) --truncate random draws K anew in each step, so that no step of the chain is always left out.
InstructVideo is DRaFT-K but for where the chain starts. Frames are chosen and weighted as there.

Letters: B videos, C channels, F frames, S segments, h and w latent rows and columns, N text tokens,
E their width.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from bases.deep_cache import denoiser  # noqa: E402
from data import batch_indices  # noqa: E402
from evaluate import prompt_sets  # noqa: E402
from methods import common as prompting  # noqa: E402
from reward import segment_frames  # noqa: E402
from sampler import GUIDANCE, alpha_bars, chain  # noqa: E402
from support.ranks import (  # noqa: E402
    rank_and_size,
    run_script,
    sample_generator,  # noqa: E402
)


def draft_rewards(base, reward, uncond, batch, cfg):
    """
    Algorithm 1, from noise to the reward of a video.

    batch: noise (B, C, F, h, w), text (B, N, E), g (B, S), captions [B], K [B]; uncond (1, N, E).
    Returns as train.edit_rewards.
    """
    noise, text, g, captions, grad_steps = batch

    # 1. The whole chain; only its last K steps build a graph. K is the same for a whole step.
    D, K = cfg.num_steps, grad_steps[0]
    z_0 = chain(denoiser(base, cfg.cache_interval), noise, text, uncond, D, D, cfg.guidance,
                alpha_bars(), K)                                              # (B, C, F, h, w)

    # 2. Score one frame of each segment (SegVR), weighted by the distance from the centre (TAR).
    return train.video_rewards(base, reward, z_0, g, captions, cfg)


def last_steps(step, cfg):
    """K of a step: --grad-steps, or a random number up to it, the same on all ranks."""
    if cfg.truncate == "fixed":
        return cfg.grad_steps
    generator = sample_generator(cfg.seed, step, "truncate")
    return int(torch.randint(1, cfg.grad_steps + 1, (), generator=generator))


# ----------------------------------------------------------------------------------------------
# Settings, and the parts for train.main

@dataclass(frozen=True)
class Config(prompting.PromptSettings, train.Config):
    """Fine-tune a text-to-video model by DRaFT-K, from prompts."""
    truncate: str = "fixed"
    """fixed: K is always --grad-steps (DRaFT-K); random: K is drawn from 1 to --grad-steps in each
    step (AlignProp, with --grad-steps D)"""


PRESETS = {
    "tiny": Config(),
    "modelscope": Config(
        **prompting.MODELSCOPE, guidance=GUIDANCE, steps=20_000, batch_size=8, lr=1e-5)}


def check(cfg):
    """All that can be known before anything is loaded; ValueError in one line."""
    train.check(cfg, needs_clips=False)
    prompting.check_prompts(cfg)
    if cfg.truncate not in ("fixed", "random"):
        raise ValueError(f"truncate {cfg.truncate!r}: must be fixed or random")


def method(cfg, base, reward):
    """DRaFT-K as the two functions that train.train takes."""
    prompts = prompting.training_prompts(
        cfg, base, lambda: prompt_sets(base, (), 0)["in_domain"])
    uncond = base.encode_text([""])                                           # (1, N, E)

    pick_frames = lambda own: segment_frames(cfg.frames, cfg.segments, 1, own)[0]         # (S,)

    def draw(step):
        share = batch_indices(step, cfg.batch_size, len(prompts), cfg.seed, *rank_and_size())
        batch = prompting.draw_videos(share, prompts, base, cfg, (cfg.seed, step), pick_frames)
        return *batch, [last_steps(step, cfg)] * len(share)

    def score(batch):
        return draft_rewards(base, reward, uncond, batch, cfg)

    draw.data = prompting.describe(prompts)
    return draw, score


def main(argv):
    """As train.main; returns the exit status."""
    return train.main(argv, PRESETS, __doc__, check, method, script="methods/draft.py")


if __name__ == "__main__":
    run_script("methods/draft.py", lambda: main(sys.argv[1:]),
               refused=(RuntimeError, OSError, SafetensorError))
