"""
How many steps the process's optimizers have taken: what was computed from trained weights may be out of date after one.

A tensor's version does not tell. Fused optimizers (AdamW(fused=True), torch 2.15) change weights and leave it as it was.
"""
from torch.optim.optimizer import register_optimizer_step_post_hook

TAKEN = [0]


def count_step(*_):
    """Called by torch after every step of any optimizer."""
    TAKEN[0] += 1


def steps_taken():
    """A number that is another one after every optimizer step."""
    return TAKEN[0]


register_optimizer_step_post_hook(count_step)
