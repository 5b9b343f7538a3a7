"""
How much memory a step takes at its peak, from shapes alone.

A step is run on the meta device, whose tensors have sizes and no memory. What is alive is counted operation by operation, as an
allocator would: a storage counts from the operation that makes it until nothing refers to it any more. So the order in which a
backward pass frees what was saved for it counts too. Not in it: workspaces of the kernels, and what an allocator loses between
tensors.

Held against what a step takes on the CPU (measure_host_peak), the count is right to a few per cent.
"""
import ctypes
import gc
import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30


@dataclass(frozen=True)
class Peak:
    """Bytes of a step."""
    weights: int
    """of the modules that it needs, adapters among them"""
    saved: int
    """that the forward pass keeps for the backward pass, beyond the weights"""
    total: int
    """at the worst moment"""

    @property
    def transient(self):
        """What is there at the worst moment beside weights and saved activations; with recomputation, mostly recomputed."""
        return max(0, self.total - self.weights - self.saved)

    def in_gib(self):
        """The same as plain numbers, in GiB."""
        return {k: getattr(self, k) / GIB for k in ("weights", "saved", "transient", "total")}


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is on, and the most that were there at once."""

    def __init__(self, known):
        super().__init__()
        self.known, self.now, self.most = dict(known), 0, 0  # {storage's id: it is counted already}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        """A storage that is new; when it goes, it is taken off again."""
        name, size = storage._cdata, storage.nbytes()
        if name in self.known:
            return
        self.known[name] = True
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, name, size)

    def forget(self, name, size):
        """The storage of this name is no longer there; another one may get its name."""
        if self.known.pop(name, None):
            self.now -= size


@contextmanager
def fused_attention():
    """Attention as GPUs and CPUs run it, in one kernel; on the meta device alone torch would make the matrix of all pairs."""
    functional = torch.nn.functional
    plain = functional.scaled_dot_product_attention

    def fused(q, k, v, attn_mask=None, dropout_p=0., is_causal=False, **more):
        if attn_mask is None and q.is_meta and q.dim() == 4:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
        return plain(q, k, v, attn_mask, dropout_p, is_causal, **more)
    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def measure_peak(forward, modules):
    """
    The Peak of forward(), and of its backward pass if its result, which is summed, has a gradient. All tensors on meta.

    modules: what must be in memory throughout; their tensors' gradients count like everything else that is made.
    """
    tensors = {t.untyped_storage()._cdata: t.untyped_storage() for m in modules for t in (*m.parameters(), *m.buffers())}
    weights = sum(s.nbytes() for s in tensors.values())
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in tensors:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with fused_attention(), Alive(tensors) as alive:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = forward()
        if result.requires_grad:
            result.sum().backward()
    return Peak(weights, sum(saved.values()), weights + alive.most)


# ---------------------------------------------------------------------------------------------------------------------
# The same on the CPU, with numbers

def measure_host_peak(step):
    """
    Bytes by which this process grows at most while step() runs, as the system sees them. ValueError where it is not Linux.

    By default glibc keeps freed memory of up to 32 MB for later and gives large blocks out of it in pieces, which hides the first
    use of some and adds gaps between others. From here on each large block is the system's own, and returned when freed.
    """
    if not sys.platform.startswith("linux"):
        raise ValueError("host_memory: can be measured on Linux alone, where the system tells a process's peak")
    ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD, bytes; where there is no such setting, it has no effect
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(field):
    """Bytes of physical memory that this process has (VmRSS), or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
