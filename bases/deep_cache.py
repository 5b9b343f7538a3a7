"""
DeepCache (arXiv:2312.00858): what the UNet makes below its outermost level changes little from one chain step to the next, so
steps without gradient may take it from a step before, and compute the outermost level alone.
"""
import copy
from dataclasses import replace

import torch
from torch import nn


class DeepCache:
    """
    A base's `predict` for the calls of one chain, in order. Calls with gradient are exact, and of the others the first and every
    `interval`-th after it; the rest take what the last exact one of these had made below the outermost level.
    """

    def __init__(self, base, interval):
        self.base = base
        self.interval = interval
        self.calls = 0  # those without gradient
        self.middle = CachedMiddle()
        self.shallow = replace(base, network=outermost(base.network, self.middle))

    def __call__(self, z_t, level, text):
        if torch.is_grad_enabled():
            return self.base.predict(z_t, level, text)
        self.calls += 1
        if (self.calls - 1) % self.interval:
            return self.shallow.predict(z_t, level, text)
        hook = self.base.network.up_blocks[-2].upsamplers[0].register_forward_hook(self.middle.store)
        try:
            return self.base.predict(z_t, level, text)
        finally:
            hook.remove()


class CachedMiddle(nn.Module):
    """Stands where a UNet has its inner levels, and gives what these made in the last exact call."""

    def store(self, module, inputs, output):
        self.output = output                                                                  # (B*F, C, H, W)

    def block(self, j, x, emb, text, num_frames):
        return self.output


def outermost(unet, middle):
    """The same UNet with `middle` for all that is below its outermost level. Their weights are the same."""
    down = copy.copy(unet.down_blocks[0])
    down._modules = {name: module for name, module in down._modules.items() if name != "downsamplers"}
    shallow = copy.copy(unet)
    shallow._modules = unet._modules | {"down_blocks": nn.ModuleList([down]), "mid_block": middle,
                                        "up_blocks": nn.ModuleList([unet.up_blocks[-1]])}
    return shallow
