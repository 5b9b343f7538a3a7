"""
DeepCache (arXiv:2312.00858): what the UNet's inner levels make changes little from one chain step to the next, so steps without
gradient may take it from the step before, and compute the outermost level alone.
"""
from functools import partial

import torch


def denoiser(base, interval):
    """base.denoiser for one chain. interval: N, chain steps between two that compute the inner levels; 1 computes them always."""
    return base.denoiser if interval == 1 else DeepCache(base, interval)


class DeepCache:
    """
    eps(z_t, t, text) of the calls of one chain, in order: the first, every N-th after it, and all with gradient are exact.

    Of a level that is not computed, each block gives again what it gave last.
    """

    def __init__(self, base, interval):
        self.base, self.interval, self.calls, self.kept = base, interval, 0, {}
        unet = base.unet
        self.inner = [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]

    def __call__(self, z_t, t, text):
        if torch.is_grad_enabled():
            return self.base.denoiser(z_t, t, text)
        fresh = self.calls % self.interval == 0
        self.calls += 1
        for level in self.inner:
            level.block = partial(self.block, level, fresh)
        try:
            return self.base.denoiser(z_t, t, text)
        finally:
            for level in self.inner:
                del level.block  # the class's own again

    def block(self, level, fresh, j, *inputs):
        if fresh:
            self.kept[level, j] = type(level).block(level, j, *inputs)
        return self.kept[level, j]
