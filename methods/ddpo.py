"""
DDPO: treat the chain as a policy, and raise the probability of the steps that led to good videos.

    python methods/ddpo.py                                    # the tiny world
    python methods/ddpo.py --group 4 --timestep-fraction 0.5  # GRPO's advantage, half of the steps
    torchrun --nproc_per_node=4 methods/ddpo.py modelscope --prompts-train prompts.txt \
        --prompts animals=animals.txt

Paper: DDPO (arXiv:2305.13301), Sec. 4.3, the importance sampling form (DDPO_IS).

Against train.py: (1) it starts from pure noise and needs prompts only; (2) the chain is stochastic,
so each step has a probability; (3) the reward needs no gradient; (4) a round samples the videos of
--updates optimizer steps. From the second of them on the model is not the one that sampled, which
PPO's ratio and clipping account for; (5) all videos are scored on the same frames, the first of
each segment, as R would else say more of the frames than of the video. Checkpoints lie between
rounds and a signal ends the run at the end of its round, so that a continued run samples each round
from the same adapters.

Ours differs from kvablack/ddpo-pytorch: all videos of an update learn from the same chain steps.

Letters: B videos, C channels, F frames, S segments, D chain steps, h and w latent rows and columns.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tyro.conf import Fixed, Suppress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from data import batch_indices  # noqa: E402
from evaluate import prompt_sets  # noqa: E402
from methods import common as prompting  # noqa: E402
from methods.common import RewardHistory  # noqa: E402
from reward import first_frames  # noqa: E402
from sampler import GUIDANCE, alpha_bars, ddim_mean_std, ddpm_step, guided_eps  # noqa: E402
from support.ranks import (  # noqa: E402
    add_over_ranks,
    all_gather,
    rank_and_size,
    run_script,
    sample_generator,  # noqa: E402
)
from support.settings import check_at_least, check_positive  # noqa: E402

BUFFER = 16  # rewards of a prompt that its statistics need (kvablack: config/base.py)

# ----------------------------------------------------------------------------------------------
# The method


def log_prob(z_prev, mean, std):
    """
    log p(z_prev | z_t) (B,) under N(mean, std^2), float32: the mean over elements (kvablack).

    As it is a mean and no sum, a clip range as small as 1e-4 fits. It is never one over the batch.
    """
    z_prev, mean = z_prev.detach().float(), mean.float()
    std = torch.as_tensor(std, dtype=torch.float32, device=mean.device)
    log_p = -((z_prev - mean) / std) ** 2 / 2 - std.log() - math.log(2 * math.pi) / 2
    return log_p.flatten(1).mean(dim=1)                                       # (B,)


def ppo_loss(log_prob, old_log_prob, advantage, clip_range=1e-4):
    """PPO's clipped objective (arXiv:1707.06347, Eq. (7)), negated: each (B,) -> a scalar."""
    ratio = torch.exp(log_prob - old_log_prob)                                # (B,)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)                     # (B,)
    return torch.maximum(-advantage * ratio, -advantage * clipped).mean()


def advantages(rewards, prompts, last=None, group=1):
    """
    A (B,) = (r - mean) / std, limited to +-5: how much better than usual is a video?

    rewards (B,), prompts [B]. group > 1: statistics of these videos of the same prompt (GRPO,
    arXiv:2402.03300, Sec. 4.1). Otherwise those of the prompt's last 16 rewards, of `last` {prompt:
    rewards before these} and these; of all B videos where a prompt has fewer than 16.
    """
    A = torch.zeros_like(rewards)
    for prompt in set(prompts):
        own = torch.tensor([other == prompt for other in prompts])            # (B,)
        known = torch.cat([rewards.new_tensor((last or {}).get(prompt, [])), rewards[own]])
        compared = rewards[own] if group > 1 else known[-BUFFER:]
        if group == 1 and len(known) < BUFFER:
            compared = rewards
        A[own] = (rewards[own] - compared.mean()) / (compared.std(correction=0) + 1e-6)
    return A.clamp(-5, 5)                                                     # (B,)


def policy(base, z_t, i, text, uncond, cfg):
    """Mean and std of chain step i, p(z_prev | z_t), with eta = 1 and guidance."""
    alpha_bar = alpha_bars()
    t = ddpm_step(i, cfg.num_steps)
    eps = guided_eps(base.denoiser, z_t, t, text, uncond, cfg.guidance)
    return ddim_mean_std(z_t, eps, t, t - len(alpha_bar) // cfg.num_steps, alpha_bar, eta=1.)


@torch.no_grad()
def sample_path(base, noise, text, uncond, seeds, cfg):
    """The chain of a batch, [z_T, ..., z_0] of (B, C, F, h, w), and log p of its steps (B, D)."""
    generators = [sample_generator(*seed) for seed in seeds]
    path, log_probs = [noise], []
    for i in range(cfg.num_steps, 0, -1):
        mean, std = policy(base, path[-1], i, text, uncond, cfg)
        fresh = [torch.randn(noise.shape[1:], generator=own) for own in generators]
        path.append(mean + std * torch.stack(fresh).to(noise))                # (B, C, F, h, w)
        log_probs.append(log_prob(path[-1], mean, std))                       # (B,)
    return path, torch.stack(log_probs, dim=1)


def sample_round(base, reward, uncond, draw, first, history, cfg):
    """This rank's batches of steps first, first + 1, ...: path, log p, text, A (B,), rewards."""
    batches, scored = [], []
    for step in range(first, first + cfg.updates):
        # In the parts that learning takes: they fit into memory, and 16 bits round them alike.
        whole, parts = draw(step), []
        for noise, text, g, captions, seeds in train.split_batch(whole, cfg.clips_at_once):
            path, log_probs = sample_path(base, noise, text, uncond, seeds, cfg)
            with torch.no_grad():
                R, logged = train.video_rewards(base, reward, path[-1], g, captions, cfg)
            parts.append((torch.stack(path), log_probs, R, logged["reward"]))
        paths, *columns = zip(*parts)
        log_probs, R, plain = [torch.cat(column) for column in columns]       # (B, D), (B,), (B,)
        batches.append([torch.cat(paths, dim=1), log_probs, whole[1], plain])
        scored.append((whole[3], R.tolist()))

    # Statistics are over the whole round, in order of step and rank: the same on any number.
    prompts, rewards = [], []
    for ranks in zip(*all_gather(scored)):
        for captions, R in ranks:
            prompts += captions
            rewards += R
    A = advantages(torch.tensor(rewards), prompts, history.last, cfg.group)
    history.add(first, prompts, rewards)
    rank, world_size = rank_and_size()
    own = A.view(cfg.updates, world_size, -1)[:, rank].to(base.device)        # (updates, B)
    return [[*batch, own[k]] for k, batch in enumerate(batches)]


def loss_scale(cfg):
    """As in train.train: without it, half of a float16 gradient would be 0."""
    return 4096. if cfg.dtype == "float16" else 1.


def backward(base, uncond, batch, step, cfg):
    """Add the gradient of a batch to the adapters', one chain step at a time; returns the loss."""
    path, old_log_probs, text, _, A = batch
    D = cfg.num_steps
    generator = sample_generator(cfg.seed, step, "timesteps")
    number = max(1, round(cfg.timestep_fraction * D))
    total = 0.
    for i in (torch.randperm(D, generator=generator)[:number] + 1).tolist():  # of 1..D
        for start in range(0, len(A), cfg.clips_at_once or len(A)):
            part = slice(start, start + (cfg.clips_at_once or len(A)))
            mean, std = policy(base, path[D - i][part], i, text[part], uncond, cfg)
            new = log_prob(path[D - i + 1][part], mean, std)                  # (b,)
            loss = ppo_loss(new, old_log_probs[part, D - i], A[part], cfg.clip_range)
            loss = loss * len(new) / (cfg.batch_size * number)
            (loss_scale(cfg) * loss).backward()
            total += loss.item()
    return total


def learn(cfg, parameters, sample, backward, run):
    """Sample, score, learn, from wherever `run` stands to cfg.steps; otherwise as train.train."""
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0)
    history = RewardHistory(run, BUFFER)

    for step in run.steps(optimizer):
        # 1. A round of videos, if it is time; the gradient of one batch of it.
        at = step % cfg.updates
        if at == 0:
            batches = sample(step, history)
        optimizer.zero_grad(set_to_none=False)
        total_loss = backward(batches[at], step)
        total_reward = batches[at][3].sum().item() / cfg.batch_size

        # 2. Sum over the ranks; take the step unless the loss or the gradient is not finite.
        sums = [total_loss, total_reward, float(run.stop())]
        total_loss, total_reward, stopping = add_over_ranks(parameters, sums, loss_scale(cfg))
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip_grad).item()
        finite = math.isfinite(total_loss) and math.isfinite(grad_norm)
        if finite:
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1., (step + 1) / max(cfg.warmup, 1))
            optimizer.step()

        # 3. Log, save and evaluate. Only the end of a round is a place to stop.
        numbers = {"reward": total_reward, "loss": total_loss, "grad_norm": grad_norm}
        if not run.finish_step(step + 1, numbers, finite, stopping and at == cfg.updates - 1):
            return False
    return True


# ----------------------------------------------------------------------------------------------
# Settings, and the parts for train.main

@dataclass(frozen=True)
class Config(prompting.PromptSettings, train.Config):
    """Fine-tune a text-to-video model by DDPO, from prompts."""
    updates: int = 2
    """optimizer steps that learn from one round of videos (kvablack: 2 to 4); divides --steps,
    --save-every and --eval-every"""
    group: int = 1
    """videos of each prompt in a batch; above 1, those of a round are compared (GRPO)"""
    clip_range: float = 1e-4
    """how far PPO lets the ratio move (kvablack: config/base.py)"""
    timestep_fraction: float = 1.0
    """share of the chain's steps that an update learns from, random ones (kvablack: all)"""
    batch_size: int = 8
    """videos behind an optimizer step, over all ranks"""
    grad_steps: Suppress[Fixed[int]] = 1
    cache_interval: Suppress[Fixed[int]] = 1


PRESETS = {
    "tiny": Config(),
    "modelscope": Config(
        **prompting.MODELSCOPE, guidance=GUIDANCE, steps=20_000, updates=4,
        batch_size=64, lr=3e-4)}


def check(cfg):
    """All that can be known before anything is loaded; ValueError in one line."""
    train.check(cfg, needs_clips=False)
    prompting.check_prompts(cfg)
    check_at_least(cfg, updates=1, group=1)
    check_positive(cfg, "clip_range", "timestep_fraction")
    if cfg.timestep_fraction > 1:
        raise ValueError(f"timestep_fraction = {cfg.timestep_fraction}: must be at most 1")
    if cfg.batch_size % cfg.group:
        raise ValueError(f"batch_size = {cfg.batch_size}: must be a multiple of group {cfg.group}")
    for name in ("steps", "save_every", "eval_every"):
        if getattr(cfg, name) % cfg.updates:
            raise ValueError(f"{name} = {getattr(cfg, name)}: must be a multiple of {cfg.updates}, "
                             "the updates of a round")


def method(cfg, base, reward):
    """sample(step, history) and backward(batch, step), for learn."""
    prompts = prompting.training_prompts(
        cfg, base, lambda: prompt_sets(base, (), 0)["in_domain"])
    uncond = base.encode_text([""])                                           # (1, N, E)

    pick_frames = lambda _: first_frames(cfg.frames, cfg.segments)  # alike, to compare

    def draw(step):
        # Each prompt of the batch has `group` neighbouring positions.
        chosen = batch_indices(step, cfg.batch_size // cfg.group, len(prompts), cfg.seed)
        whole = [(p, chosen[p // cfg.group][1]) for p in range(cfg.batch_size)]
        rank, world_size = rank_and_size()
        size = cfg.batch_size // world_size
        share = whole[rank * size:(rank + 1) * size]
        batch = prompting.draw_videos(share, prompts, base, cfg, (cfg.seed, step), pick_frames)
        return *batch, [(cfg.seed, step, position, "chain") for position, _ in share]

    def sample(step, history):
        return sample_round(base, reward, uncond, draw, step, history, cfg)

    sample.data = prompting.describe(prompts)
    return sample, lambda batch, step: backward(base, uncond, batch, step, cfg)


def main(argv):
    """As train.main; returns the exit status."""
    return train.main(argv, PRESETS, __doc__, check, method, learn, "methods/ddpo.py")


if __name__ == "__main__":
    run_script("methods/ddpo.py", lambda: main(sys.argv[1:]),
               refused=(RuntimeError, OSError, SafetensorError))
