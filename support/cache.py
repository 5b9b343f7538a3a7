"""
Tensors kept on disk: one safetensors file for each, named by the hash of a text that says what it was made from.

Whatever a tensor depends on belongs into that text. Then a stale entry cannot be found, and nothing needs to be deleted.
"""
import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm


class Stored:
    """A tensor in a cache file, read only when indexed, and only that part: stored[k], stored[:]."""

    def __init__(self, path):
        self.path = path
        with safe_open(path, "pt") as file:  # SafetensorError unless the file is as long as its header says
            self.length = file.get_slice("tensor").get_shape()[0]

    def __len__(self):
        return self.length

    def __getitem__(self, where):
        with safe_open(self.path, "pt") as file:
            return file.get_slice("tensor")[where].clone()  # off the memory map, which dies with the file


def fill(found, made_from, compute, folder, rank, world_size, barrier):
    """
    Compute what is None in found {item: entry} and keep it; with a folder, every rank does its share and finds the others'.

    made_from: {item: text}; compute(items) yields (item, tensor).
    """
    # A rank's share is one of all items: which are missing changes while other ranks are at work.
    mine = list(made_from)[rank::world_size] if folder else list(made_from)
    for item, tensor in compute([item for item in mine if found[item] is None]):
        found[item] = keep(folder, made_from[item], tensor.detach().cpu().contiguous())
    barrier()
    for item in made_from:
        if found[item] is None:
            found[item] = find(folder, made_from[item])


def file_of(folder, made_from):
    """Where a tensor made from this lies."""
    return Path(folder) / f"{hashlib.sha256(made_from.encode()).hexdigest()}.safetensors"


def find(folder, made_from):
    """The Stored tensor made from this, or None: nothing there, no folder, or a damaged file, which is reported."""
    if not folder or not file_of(folder, made_from).exists():
        return None
    try:
        return Stored(file_of(folder, made_from))
    except SafetensorError as error:
        tqdm.write(f"{file_of(folder, made_from)}: damaged ({error}); computing it anew")
        return None


def keep(folder, made_from, tensor):
    """Write a tensor, whole or not at all, and return it as Stored; without a folder the tensor itself is kept in memory."""
    if not folder:
        return tensor
    path = file_of(folder, made_from)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.stem}.{os.urandom(4).hex()}")  # two runs may be at the same file
    try:
        with open(hidden, "wb") as file:
            file.write(save({"tensor": tensor}, metadata={"made_from": made_from}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)
    return Stored(path)
