"""
Diffusion-DPO, where only "better" is known: denoise the better of two videos better than the base.

    python -m methods.dpo                                     # the tiny world, in minutes
    python -m methods.dpo --rounds 4                         # new pairs from the model, three times

Paper: Diffusion-DPO (arXiv:2311.12908), Sec. 4, its final loss. The reward decides which video is
the better one, as VADER (arXiv:2407.08737) makes its preference data.

Against train.py: (1) no gradient passes through the reward or the chain; (2) --pairs of videos of
the base are sampled from prompts and scored before the first step; (3) steps learn from batches of
these pairs; (4) the reference that keeps the model near the base is the base: adapters off; (5) all
videos are scored on the same frames, as R says more of random ones than of the video.

Ours differs from VADER's DPO baseline: both videos of a pair have one prompt, and one noise in the
loss. That baseline pairs clips of different prompts and draws two noises.
"""
import sys

if not __package__:
    print("start it as: python -m methods.dpo", file=sys.stderr)
    sys.exit(2)
from dataclasses import dataclass

import torch
import torch.nn.functional as F_

import lora
import train
from methods import common
from reward import first_frames
from support.ranks import map_tensors, sample_generator
from support.settings import check_at_least


def dpo_loss(error_w, error_l, ref_error_w, ref_error_l, beta=5000.):
    """-log sigmoid(-beta / 2 [(e_w - e_ref,w) - (e_l - e_ref,l)]), the mean over pairs: how much
    better than the base is the winner (w) denoised, and how much the loser (l)? Each error (B,) is
    a mean square over elements (train.py:1121-1145 of the authors' code)."""
    inside = (error_w - ref_error_w) - (error_l - ref_error_l)                # (B,)
    return -F_.logsigmoid(-beta / 2 * inside).mean()


def pair_errors(base, z_w, z_l, eps, u, text):
    """The base's own loss (B,) of winners and losers, which share prompt, noise level and noise."""
    z, eps, u = torch.cat([z_w, z_l]), torch.cat([eps, eps]), torch.cat([u, u])
    text = map_tensors(lambda t: torch.cat([t, t]), text)                     # (2B, N, E)
    return common.denoising_errors(base, z, eps, u, text).chunk(2)


def sample_pairs(base, rewards, videos, part, round_number, cfg):
    """Pairs of a part of a share: {winner, loser, reward}."""
    # 1. Two videos of the same prompts, scored as in train.py. The base makes the first round's.
    lora.set_scale(base.network, 1. if round_number else 0.)
    key = cfg.seed, "round", round_number
    first, second = [common.sample_scored(base, rewards, videos, part, cfg, *key, which)
                     for which in (0, 1)]
    lora.set_scale(base.network, 1.)

    # 2. The better one wins.
    first_wins = (first["R"] >= second["R"])[:, None, None, None, None]       # (B, 1, 1, 1, 1)
    return {"winner": torch.where(first_wins, first["z"], second["z"]),
            "loser": torch.where(first_wins, second["z"], first["z"]),
            "reward": (first["reward"] + second["reward"]) / 2}


@dataclass(frozen=True)
class Config(common.NoChainGradient, common.PromptConfig):
    """Fine-tune a text-to-video model by Diffusion-DPO, from prompts."""
    rounds: int = 1
    """times that pairs are sampled, each for an equal share of the steps: first from the base, then
    from the model as it stands"""
    pairs: int = 64
    """pairs of a round, over all ranks"""
    beta: float = 5000.0
    """how fast the loss saturates as the model leaves the base (paper, Sec. 5)"""
    batch_size: int = 16
    """pairs behind an optimizer step, over all ranks"""


PRESETS = common.presets(Config, pairs=2048, batch_size=16, lr=5e-4)


def check(cfg):
    common.check(cfg)
    common.check_rounds(cfg, "pairs")
    check_at_least(cfg, "beta")


def method(cfg, base, rewards, folder):
    """DPO as train.train takes it, on the pairs of rounds that the folder keeps."""
    def make(part, round_number):
        return sample_pairs(base, rewards, videos, part, round_number, cfg)

    videos = common.read_videos(cfg, base, lambda _: first_frames(cfg.frames, cfg.segments))
    rounds = common.Rounds(cfg, folder, videos, make, cfg.pairs, at_once=4)

    def draw(step):
        share, pairs, text = rounds.rows(step)
        generators = [sample_generator(cfg.seed, step, position) for position, _ in share]
        z_w, z_l = pairs["winner"], pairs["loser"]                            # (B, C, F, h, w)
        eps = torch.stack([torch.randn(z_w.shape[1:], generator=each) for each in generators])
        u = torch.stack([torch.rand((), generator=each) for each in generators])
        tensors = [v.to(base.device) for v in (z_w, z_l, eps, u)]
        return *tensors, text, pairs["reward"]

    def score(batch):
        *inputs, mean_scores = batch
        lora.set_scale(base.network, 0.)  # the reference
        with torch.no_grad():
            reference = pair_errors(base, *inputs)                            # (B,), (B,)
        lora.set_scale(base.network, 1.)
        loss = dpo_loss(*pair_errors(base, *inputs), *reference, cfg.beta)
        return -loss.expand(len(mean_scores)), {"reward": mean_scores}

    return train.Method(draw, score, videos.description)


if __name__ == "__main__":
    train.start(sys.modules[__name__])
