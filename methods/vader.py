"""
VADER: reward gradients for video models from prompts alone, a few random frames at a time.

    python methods/vader.py                                  # the tiny world, in minutes
    python methods/vader.py --eta 0 --frames-scored 4        # a deterministic chain, four frames
    torchrun --nproc_per_node=4 methods/vader.py modelscope --prompts-train prompts.txt \
        --prompts animals=animals.txt

Paper: VADER (arXiv:2407.08737), Algorithm 1.

Against train.py: (1) it starts from pure noise and needs prompts only; (2) it runs the whole chain,
of stochastic steps unless --eta 0; (3) it scores n random frames, one by default, and takes their
plain mean (--lambda-tar 0); --frames-scored 0 is all of them. A video reward sees its own frames,
in order (docs/rewards.md).

Ours differs from the authors' code: number of steps, guidance and rank are those of the other
methods here, not 25, 12 and 16, which are VideoCrafter's.

Letters: B videos, C channels, F frames, n scored ones, h and w latent rows and columns, N text
tokens, D steps of the chain.
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
from sampler import GUIDANCE, alpha_bars, ddim_mean_std, ddpm_step, guided_eps  # noqa: E402
from support.ranks import (  # noqa: E402
    rank_and_size,
    run_script,
    sample_generator,  # noqa: E402
)


def vader_rewards(base, reward, uncond, batch, cfg):
    """
    Algorithm 1, from noise to the reward of a video.

    batch: noise (B, C, F, h, w), text (B, N, E), g (B, n), captions [B], seeds [B]; uncond
    (1, N, E). Returns as train.edit_rewards.
    """
    z, text, g, captions, seeds = batch
    generators = [sample_generator(*seed) for seed in seeds]
    alpha_bar, eps_model = alpha_bars(), denoiser(base, cfg.cache_interval)
    stride = len(alpha_bar) // cfg.num_steps

    # 1. The whole chain; fresh noise comes in at every step, and the last K build a graph.
    for i in range(cfg.num_steps, 0, -1):
        t = ddpm_step(i, cfg.num_steps)
        with torch.set_grad_enabled(i <= cfg.grad_steps):
            eps = guided_eps(eps_model, z, t, text, uncond, cfg.guidance)
            mean, std = ddim_mean_std(z, eps, t, t - stride, alpha_bar, cfg.eta)
            fresh = [torch.randn(z.shape[1:], generator=own) for own in generators]
            z = mean + std * torch.stack(fresh).to(z)                         # (B, C, F, h, w)

    # 2. Score the random frames; lambda 0 gives their plain mean. A video reward has its own.
    return train.video_rewards(base, reward, z, g, captions, cfg)


def random_frames(num_frames, n, generator):
    """n different frames in order of time, (n,) int64; all of them for n = 0."""
    chosen = torch.randperm(num_frames, generator=generator)[:n or num_frames]
    return chosen.sort().values                                               # (n,)


# ----------------------------------------------------------------------------------------------
# Settings, and the parts for train.main

@dataclass(frozen=True)
class Config(prompting.PromptSettings, train.Config):
    """Fine-tune a text-to-video model by VADER, from prompts."""
    frames_scored: int = 1
    """n, random frames of a video that are scored (authors' scripts: 1); 0: all, in order"""
    eta: float = 1.0
    """share of fresh noise in a chain step, 0 (deterministic) to 1 (authors' scripts)"""
    lambda_tar: float = 0.0
    """how fast weights fall off from the centre; 0: the plain mean over frames, as in the paper"""


PRESETS = {
    "tiny": Config(),
    "modelscope": Config(
        **prompting.MODELSCOPE, guidance=GUIDANCE, steps=20_000, batch_size=8, lr=2e-4)}


def check(cfg):
    """All that can be known before anything is loaded; ValueError in one line."""
    train.check(cfg, needs_clips=False)
    prompting.check_prompts(cfg)
    if not 0 <= cfg.eta <= 1:
        raise ValueError(f"eta = {cfg.eta}: must be from 0 to 1")
    if not 0 <= cfg.frames_scored <= cfg.frames:
        raise ValueError(f"frames_scored = {cfg.frames_scored}: must be from 0 to {cfg.frames}")


def method(cfg, base, reward):
    """VADER as the two functions that train.train takes."""
    prompts = prompting.training_prompts(
        cfg, base, lambda: prompt_sets(base, (), 0)["in_domain"])
    uncond = base.encode_text([""])                                           # (1, N, E)

    pick_frames = lambda own: random_frames(cfg.frames, cfg.frames_scored, own)           # (n,)

    def draw(step):
        share = batch_indices(step, cfg.batch_size, len(prompts), cfg.seed, *rank_and_size())
        batch = prompting.draw_videos(share, prompts, base, cfg, (cfg.seed, step), pick_frames)
        return *batch, [(cfg.seed, step, position, "chain") for position, _ in share]

    def score(batch):
        return vader_rewards(base, reward, uncond, batch, cfg)

    draw.data = prompting.describe(prompts)
    return draw, score


def main(argv):
    """As train.main; returns the exit status."""
    return train.main(argv, PRESETS, __doc__, check, method, script="methods/vader.py")


if __name__ == "__main__":
    run_script("methods/vader.py", lambda: main(sys.argv[1:]),
               refused=(RuntimeError, OSError, SafetensorError))
