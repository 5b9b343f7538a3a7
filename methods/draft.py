"""
DRaFT-K, from prompts alone: follow the reward's gradient through the last K steps from noise.

    python -m methods.draft                                     # the tiny world, in minutes
    python -m methods.draft --grad-steps 20 --truncate random  # AlignProp
    python -m methods.draft --grad-steps 4 --grad-at uniform --detach-input    # DRTune

Paper: DRaFT (arXiv:2309.17400), Algorithm 1; AlignProp (arXiv:2310.03739), randomised truncation;
DRTune (arXiv:2405.00760), gradient from early steps.

Against train.py: (1) it starts from pure noise and needs prompts only; (2) it runs the whole chain;
(3) --truncate random draws K anew in each step, so that no step of the chain is always left out;
(4) with --detach-input gradient passes a step by DDIM's own mixing alone, not through the network,
so that K steps anywhere in the chain (--grad-at) cost K graphs, without a product of Jacobians.
InstructVideo is DRaFT-K but for where the chain starts. Frames are chosen and weighted as there.
"""
import sys

if not __package__:
    print("start it as: python -m methods.draft", file=sys.stderr)
    sys.exit(2)
from dataclasses import dataclass

import torch

import lora
import train
from methods.common import PromptConfig, check as check_common, presets, read_videos
from sampler import chain, guided, step as chain_step
from support.ranks import sample_generator
from support.settings import chain_levels


def draft_rewards(base, rewards, uncond, batch, cfg):
    """Algorithm 1: noise (B, C, F, h, w), text (B, N, E), g (B, S), captions [B], the steps with
    gradient [B], the same for all; uncond (1, N, E). Returns as train.edit_rewards."""
    noise, text, g, captions, grad_steps = batch
    levels = chain_levels(base, cfg)
    z = levels.start * noise                                                  # (B, C, F, h, w)
    if cfg.detach_input:
        z_0 = detached_chain(base, z, text, uncond, levels, grad_steps[0], cfg)
    else:  # the whole chain; only its last K steps build a graph
        z_0 = chain(base.chain_predict(cfg.cache_interval), z, text, uncond, levels, cfg.num_steps,
                    cfg.guidance, len(grad_steps[0]))                         # (B, C, F, h, w)
    return train.video_rewards(base, rewards, z_0, g, captions, cfg)


def detached_chain(base, z, text, uncond, levels, grad_steps, cfg):
    """DRTune: the whole chain from z. Its gradient reaches the adapters in `grad_steps` alone, and
    passes the other steps by what z_t itself adds to z_prev."""
    trained = lora.parameters(base.network)
    hook = base.network.register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
    for i in range(cfg.num_steps, 0, -1):
        for parameter in trained:  # without one the network builds no graph
            parameter.requires_grad_(i in grad_steps)
        z_0, eps = guided(base.predict, z, levels, i, text, uncond, cfg.guidance)
        z, _ = chain_step(z_0, eps, levels, i)                                # (B, C, F, h, w)
    for parameter in trained:
        parameter.requires_grad_(True)
    hook.remove()
    return z


def chosen_steps(step, cfg):
    """The K chain steps that carry gradient, the same on all ranks."""
    D, K = cfg.num_steps, cfg.grad_steps
    generator = sample_generator(cfg.seed, step, "truncate")
    if cfg.truncate == "random":
        K = int(torch.randint(1, K + 1, (), generator=generator))
    order = torch.randperm(D, generator=generator)[:K]
    evenly = [D - round(k * D / K) for k in range(K)]
    steps = {"last": [*range(1, K + 1)], "uniform": evenly, "random": (1 + order).tolist()}
    return steps[cfg.grad_at]


@dataclass(frozen=True)
class Config(PromptConfig):
    """Fine-tune a text-to-video model by DRaFT-K, from prompts."""
    truncate: str = "fixed"
    """fixed: K is always --grad-steps (DRaFT-K); random: it is drawn from 1 to that (AlignProp)"""
    detach_input: bool = False
    """let gradient pass a step by DDIM's own mixing alone, not through the network (DRTune)"""
    grad_at: str = "last"
    """the K steps with gradient; with detach_input also uniform (evenly spaced) or random"""


PRESETS = presets(Config)


def check(cfg):
    check_common(cfg)
    if cfg.truncate not in ("fixed", "random"):
        raise ValueError(f"truncate {cfg.truncate!r}: must be fixed or random")
    if cfg.grad_at not in (("last", "uniform", "random") if cfg.detach_input else ("last",)):
        raise ValueError(f"grad_at {cfg.grad_at!r}: must be last, or with detach_input uniform or "
                         "random")
    if cfg.detach_input and cfg.cache_interval > 1:
        raise ValueError("detach_input: cannot be had with a cache_interval above 1")


def method(cfg, base, rewards, folder):
    videos = read_videos(cfg, base)

    def draw(step):
        *batch, _ = videos.batch(step)
        return *batch, [chosen_steps(step, cfg)] * len(batch[0])

    def score(batch):
        return draft_rewards(base, rewards, base.unconditional(batch[1]), batch, cfg)

    return train.Method(draw, score, videos.description)


if __name__ == "__main__":
    train.start(sys.modules[__name__])
