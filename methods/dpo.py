"""
Diffusion-DPO: of two videos of a prompt, learn to denoise the better one better than the base does.

    python methods/dpo.py                                    # the tiny world, in minutes
    python methods/dpo.py --rounds 4                         # new pairs from the model, three times
    torchrun --nproc_per_node=4 methods/dpo.py modelscope --prompts-train prompts.txt \
        --prompts animals=animals.txt

Paper: Diffusion-DPO (arXiv:2311.12908), Sec. 4, its final loss. The reward decides which video is
the better one, as VADER (arXiv:2407.08737) makes its preference data.

Against train.py: (1) no gradient passes through the reward or the chain; (2) --pairs of videos of
the base are sampled from prompts and scored before the first step; (3) steps learn from batches of
these pairs; (4) the reference that keeps the model near the base is the base: adapters off; (5) all
videos are scored on the same frames, the first of each segment. With frames of their own, R would
vary by 73% through TAR's weights, and by 11% through the videos that it has to compare.

Ours differs from VADER's DPO baseline: both videos of a pair have one prompt, and one noise in the
loss. That baseline pairs clips of different prompts and draws two noises.

Letters: B pairs, C channels, F frames, S segments, h and w latent rows and columns.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F_
from safetensors import SafetensorError
from tyro.conf import Fixed, Suppress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lora  # noqa: E402
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


def dpo_loss(error_w, error_l, ref_error_w, ref_error_l, beta=5000.):
    """
    -log sigmoid(-beta / 2 [(e_w - e_ref,w) - (e_l - e_ref,l)]), the mean over pairs, a scalar.

    Each error (B,) is a mean square over elements (train.py:1121-1145 of the authors' code), of the
    winner or the loser. What counts is how much better than the base each is denoised.
    """
    inside = (error_w - ref_error_w) - (error_l - ref_error_l)                # (B,)
    return -F_.logsigmoid(-beta / 2 * inside).mean()


def pair_errors(denoiser, z_w, z_l, eps, t, text):
    """Mean square errors (B,) of winners and losers, which share prompt, t and noise."""
    z = torch.cat([z_w, z_l])                                                 # (2B, C, F, h, w)
    eps, t, text = torch.cat([eps, eps]), torch.cat([t, t]), torch.cat([text, text])
    z_t = add_noise(z, eps, t, alpha_bars())                                  # (2B, C, F, h, w)
    errors = (denoiser(z_t, t, text) - eps).square().flatten(1).mean(dim=1)   # (2B,)
    return errors.chunk(2)


@torch.no_grad()
def sample_pairs(base, reward, prompts, number, cfg):
    """This rank's pairs of a round, 4 at a time: {winner, loser, reward, prompt}."""
    pick_frames = lambda _: first_frames(cfg.frames, cfg.segments)  # alike, to compare
    uncond = base.encode_text([""])                                           # (1, N, E)
    share = batch_indices(number, cfg.pairs, len(prompts), cfg.seed, *rank_and_size())
    for start in range(0, len(share), 4):
        part = share[start:start + 4]
        z, R, plain = [], [], []
        for which in (0, 1):
            # 1. Two videos of the same prompts. The base makes the first round's.
            noise, text, g, captions = prompting.draw_videos(
                part, prompts, base, cfg, (cfg.seed, "round", number, which), pick_frames)
            lora.set_scale(base.unet, 1. if number else 0.)
            z.append(sample(base.denoiser, noise, text, uncond, cfg.num_steps, cfg.guidance))
            lora.set_scale(base.unet, 1.)

            # 2. Their rewards, with SegVR and TAR as in train.py.
            R_videos, logged = train.video_rewards(base, reward, z[-1], g, captions, cfg)
            R.append(R_videos)                                                # (B,)
            plain.append(logged["reward"])                                    # (B,)

        # 3. The better one wins.
        first_wins = (R[0] >= R[1])[:, None, None, None, None]                # (B, 1, 1, 1, 1)
        yield {"winner": torch.where(first_wins, z[0], z[1]),
               "loser": torch.where(first_wins, z[1], z[0]),
               "reward": (plain[0] + plain[1]) / 2,
               "prompt": torch.tensor([index for _, index in part])}


# ----------------------------------------------------------------------------------------------
# Settings, and the parts for train.main

@dataclass(frozen=True)
class Config(prompting.PromptSettings, train.Config):
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
    grad_steps: Suppress[Fixed[int]] = 1
    cache_interval: Suppress[Fixed[int]] = 1


PRESETS = {
    "tiny": Config(),
    "modelscope": Config(
        **prompting.MODELSCOPE, guidance=GUIDANCE, steps=20_000, pairs=2048, lr=5e-4)}


def check(cfg):
    """All that can be known before anything is loaded; ValueError in one line."""
    train.check(cfg, needs_clips=False)
    prompting.check_prompts(cfg)
    check_rounds(cfg, "pairs")
    check_positive(cfg, "beta")


def method(cfg, base, reward):
    """DPO as two functions: train.train's, but that draw has the run as its first argument."""
    prompts = prompting.training_prompts(
        cfg, base, lambda: prompt_sets(base, (), 0)["in_domain"])
    rounds = Rounds(cfg.pairs)

    def draw(run, step):
        number = round_of(step, cfg)
        pairs = rounds.get(run, number,
                           lambda: sample_pairs(base, reward, prompts, number, cfg))

        share = batch_indices(step, cfg.batch_size, cfg.pairs, cfg.seed, *rank_and_size())
        chosen = torch.tensor([index for _, index in share])                  # (B,)
        z_w, z_l = pairs["winner"][chosen], pairs["loser"][chosen]            # (B, C, F, h, w)
        text = base.encode_text([prompts[i] for i in pairs["prompt"][chosen].tolist()])
        eps, t = [], []
        for position, _ in share:
            generator = sample_generator(cfg.seed, step, position)
            eps.append(torch.randn(z_w.shape[1:], generator=generator))       # (C, F, h, w)
            t.append(torch.randint(len(alpha_bars()), (), generator=generator))
        tensors = [v.to(base.device) for v in (z_w, z_l, torch.stack(eps), torch.stack(t))]
        return *tensors, text, pairs["reward"][chosen]

    def score(batch):
        *inputs, mean_scores = batch
        lora.set_scale(base.unet, 0.)  # the reference
        with torch.no_grad():
            reference = pair_errors(base.denoiser, *inputs)                   # (B,), (B,)
        lora.set_scale(base.unet, 1.)
        loss = dpo_loss(*pair_errors(base.denoiser, *inputs), *reference, cfg.beta)
        return -loss.expand(len(mean_scores)), {"reward": mean_scores}

    draw.data = prompting.describe(prompts)
    return draw, score


def learn(cfg, parameters, draw, score, run):
    """train.train on the pairs of `run`'s rounds, which its folder keeps."""
    return train.train(cfg, parameters, partial(draw, run), score, run)


def main(argv):
    """As train.main; returns the exit status."""
    return train.main(argv, PRESETS, __doc__, check, method, learn, "methods/dpo.py")


if __name__ == "__main__":
    run_script("methods/dpo.py", lambda: main(sys.argv[1:]),
               refused=(RuntimeError, OSError, SafetensorError))
