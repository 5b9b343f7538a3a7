"""
Randomness that belongs to the sample.

A sample's noise comes from a generator of its own, seeded by what the sample is (seed, step, position in the batch), never
from global state. It is then the same in any batch, on any number of processes, before and after resuming.
"""
import hashlib
import json

import torch


def sample_generator(seed, *key):
    """A CPU generator that depends on nothing but (seed, *key), whole numbers and words."""
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()  # hashed: neighbouring seeds stay unrelated
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch's CPU generator uses 32 bits of a seed
