"""
RWR: sample videos, and learn to denoise them again, the good ones with more weight.

    python methods/rwr.py                                     # the tiny world, in minutes
    python methods/rwr.py --data clips.txt                    # weights real clips (official code)
    torchrun --nproc_per_node=4 methods/rwr.py modelscope --prompts-train prompts.txt \
        --prompts animals=animals.txt

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from tyro.conf import Fixed, Suppress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from data import batch_indices  # noqa: E402
from evaluate import prompt_sets  # noqa: E402
from methods import common as prompting  # noqa: E402
from methods.common import Rounds, check_rounds, round_of  # noqa: E402
from reward import first_frames  # noqa: E402
from sampler import GUIDANCE, add_noise, alpha_bars, sample  # noqa: E402
from support.ranks import (  # noqa: E402
    rank_and_size,
    run_script,
    sample_generator,  # noqa: E402
)
from support.settings import check_positive  # noqa: E402


def reward_weights(rewards, temperature):
    """
    w (B,) = B softmax(r' / temperature), r' the standardised rewards (DDPO, Sec. 4.2, w_RWR).

    They sum to B. Equal rewards give weights of 1, the plain denoising loss.
    """
    spread = rewards.std(correction=0)
    standardised = (rewards - rewards.mean()) / spread.clamp(min=1e-8)        # (B,)
    return len(rewards) * torch.softmax(standardised / temperature, dim=0)    # (B,)


def denoising_errors(denoiser, z, eps, t, text):
    """The base's own loss for each video (Eq. (1) of InstructVideo): z (B, C, F, h, w) -> (B,)."""
    z_t = add_noise(z, eps, t, alpha_bars())                                  # (B, C, F, h, w)
    return (denoiser(z_t, t, text) - eps).square().flatten(1).mean(dim=1)     # (B,)


def sample_videos(base, reward, prompts, number, cfg):
    """This rank's videos of a round, scored, 8 at a time: {z, R, reward, prompt}."""
    pick_frames = lambda _: first_frames(cfg.frames, cfg.segments)  # alike, to compare
    uncond = base.encode_text([""])                                           # (1, N, E)
    share = batch_indices(number, cfg.videos, len(prompts), cfg.seed, *rank_and_size())
    for start in range(0, len(share), 8):
        part = share[start:start + 8]
        noise, text, g, captions = prompting.draw_videos(
            part, prompts, base, cfg, (cfg.seed, "round", number), pick_frames)
        z = sample(base.denoiser, noise, text, uncond, cfg.num_steps, cfg.guidance)
        R, logged = train.video_rewards(base, reward, z, g, captions, cfg)
        indices = torch.tensor([index for _, index in part])                  # (B,)
        yield {"z": z, "R": R, "reward": logged["reward"], "prompt": indices}


# ----------------------------------------------------------------------------------------------
# Settings, and the parts for train.main

@dataclass(frozen=True)
class Config(prompting.NoiseSettings, train.Config):
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


PRESETS = {
    "tiny": Config(),
    "modelscope": Config(
        **prompting.MODELSCOPE, guidance=GUIDANCE, steps=20_000, rounds=10, videos=2048, lr=1e-5,
        offset_noise=0.1)}


def check(cfg):
    """All that can be known before anything is loaded; ValueError in one line."""
    train.check(cfg, needs_clips=False)
    check_positive(cfg, "temperature")
    if cfg.data is None:
        prompting.check_prompts(cfg)
        check_rounds(cfg, "videos")


def method(cfg, base, reward):
    """RWR as two functions: train.train's, but that draw has the run as its first argument."""
    prompts = [] if cfg.data else prompting.training_prompts(
        cfg, base, lambda: prompt_sets(base, (), 0)["in_domain"])
    dataset = train.read_clips(cfg, base) if cfg.data else None
    rounds = Rounds(cfg.videos)

    def draw_videos(run, step, share):
        number = round_of(step, cfg)
        videos = rounds.get(
            run, number, lambda: sample_videos(base, reward, prompts, number, cfg))
        w = reward_weights(videos["R"], cfg.temperature)                      # over the round
        chosen = torch.tensor([index for _, index in share])                  # (B,)
        z = videos["z"][chosen]                                               # (B, C, F, h, w)
        generators = [sample_generator(cfg.seed, step, position) for position, _ in share]
        white = torch.stack([torch.randn(z.shape[1:], generator=own) for own in generators])
        offset = [torch.randn(*z.shape[1:3], 1, 1, generator=own) for own in generators]
        eps = white + cfg.offset_noise * torch.stack(offset)                  # as train.draw_batch
        text = base.encode_text([prompts[i] for i in videos["prompt"][chosen].tolist()])
        return z.to(base.device), eps.to(base.device), text, w[chosen], videos["reward"][chosen]

    @torch.no_grad()
    def draw_clips(step):
        z, eps, text, g, captions = train.draw_batch(dataset, step, cfg, base.vae.config.scale,
                                                     base.device)
        g = first_frames(cfg.frames, cfg.segments).to(g).expand_as(g)         # (B, S)
        R, logged = train.video_rewards(base, reward, z, g, captions, cfg)
        return z, eps, text, R, logged["reward"]

    def draw(run, step):
        share = batch_indices(step, cfg.batch_size, cfg.videos, cfg.seed, *rank_and_size())
        batch = draw_clips(step) if cfg.data else draw_videos(run, step, share)
        generators = [sample_generator(cfg.seed, step, position, "t") for position, _ in share]
        t = [torch.randint(len(alpha_bars()), (), generator=own) for own in generators]
        return *batch, torch.stack(t).to(base.device)

    def score(batch):
        z, eps, text, w, plain, t = batch
        error = denoising_errors(base.denoiser, z, eps, t, text)              # (B,)
        return -w.to(error) * error, {"reward": plain}

    draw.data = dataset.description if cfg.data else prompting.describe(prompts)
    return draw, score


def learn(cfg, parameters, draw, score, run):
    """train.train on the videos of `run`'s rounds, which its folder keeps."""
    return train.train(cfg, parameters, partial(draw, run), score, run)


def main(argv):
    """As train.main; returns the exit status."""
    return train.main(argv, PRESETS, __doc__, check, method, learn, "methods/rwr.py")


if __name__ == "__main__":
    run_script("methods/rwr.py", lambda: main(sys.argv[1:]),
               refused=(RuntimeError, OSError, SafetensorError))
