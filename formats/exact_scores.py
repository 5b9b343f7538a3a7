"""
Evaluations score in float32, though training scores in 16 bits.

best.safetensors is chosen by these scores, and HPSv2 is good to 0.002 in bfloat16, where differences that matter are 0.01. So the
reward's own float32 weights wait on the CPU (HPSv2's 3.7 GiB), and take the place of the 16-bit ones while an evaluation runs.
"""
import io
from contextlib import contextmanager, redirect_stderr

import torch

HALF = (torch.float16, torch.bfloat16)


def scoring_exactly(reward, load):
    """
    A decorator: while the decorated function runs, `reward` has float32 weights.

    load() -> the same reward in float32 on the CPU; called once, when first needed; never if it has no 16-bit weights.
    """
    exact = {}

    def decorate(evaluate):
        def scored_exactly(*args, **kwargs):
            if not exact:
                exact.update(exact_tensors(reward, load))
            with replaced(reward, exact):
                return evaluate(*args, **kwargs)
        return scored_exactly
    return decorate


def exact_tensors(reward, load):
    """{name: float32 tensor on the CPU} for what `reward` has in 16 bits."""
    rounded = [name for name, tensor in tensors_of(reward).items() if tensor.dtype in HALF]
    if not rounded:
        return {}
    with redirect_stderr(io.StringIO()):  # its licence was told when it was loaded first
        exact = tensors_of(load())
    return {name: exact[name].detach() for name in rounded if exact[name].dtype == torch.float32}


@contextmanager
def replaced(reward, exact):
    """While this is open, `reward` has the tensors `exact` {name: tensor}, on its own device; then its own again."""
    tensors = tensors_of(reward)
    before = {name: tensors[name].data for name in exact}
    try:
        for name, tensor in exact.items():
            tensors[name].data = tensor.to(before[name].device)
        yield
    finally:
        for name, tensor in before.items():
            tensors[name].data = tensor


def tensors_of(module):
    """{name: tensor} of all parameters and buffers, those that are in no file too."""
    return dict(module.named_parameters()) | dict(module.named_buffers())
