"""
How the tiny world's networks are trained: drawn clips, the loop, the files that are written. build.py has the stages.

Letters: B clips or pictures, F frames, C channels, H and W pixel rows and columns.
"""
import copy
import hashlib
import math

import open_clip
import torch
from safetensors.torch import save_file
from torch import nn

from support.files import write_json
from support.ranks import progress
from tiny import world


def fit(name, module, loss_of, steps, lr, ema_decay=0., muon=None):
    """Train a module on loss_of(step): AdamW, clipped gradients. Returns it, or with ema_decay its average over the steps.
    muon: which weights (name, parameter) Muon takes instead, at 1.5 times the rate, each as a matrix with a row an output."""
    hidden = [p for key, p in module.named_parameters() if muon and muon(key, p)]
    flat = [nn.Parameter(p.data.flatten(1)) for p in hidden]  # the same memory, since torch's Muon takes matrices alone
    rest = [p for key, p in module.named_parameters() if not (muon and muon(key, p))]
    optimizers = [torch.optim.AdamW(rest, lr=lr, weight_decay=0)]
    if muon:
        optimizers.append(torch.optim.Muon(flat, lr=1.5 * lr, weight_decay=0, adjust_lr_fn="match_rms_adamw"))
    rate = lambda step: min(1, (step + 1) / 100) * .5 * (1 + math.cos(math.pi * step / steps))  # a share of lr; at last 0
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    average = copy.deepcopy(module) if ema_decay else module
    bar = progress(range(steps), name)
    for step in bar:
        loss = loss_of(step)
        module.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for matrix, parameter in zip(flat, hidden):
            matrix.grad = parameter.grad.flatten(1)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        if ema_decay:  # the average is short at first, so that it forgets the untrained weights
            decay = min(ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for averaged, parameter in zip(average.parameters(), module.parameters()):
                    averaged.lerp_(parameter, 1 - decay)
        if step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return average.eval()


def save(path, module, config=None):
    """Weights in fp16, with their config beside them unless the module's own file says its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.half().cpu().contiguous() for name, t in module.state_dict().items()}, path)
    if config:
        write_json(path.parent / "config.json", config)
    if isinstance(module, open_clip.CLIP):  # what its tokenizer reads: the context length, then the vocabulary
        (path.parent / "words.txt").write_text("\n".join([str(world.CONTEXT_LENGTH), *world.WORDS]) + "\n")


def write_manifest(folder):
    """manifest.json: the SHA-256 of every file, which loading checks."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            digests[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(folder / "manifest.json", digests)


def all_scenes():
    """What the base learns: the scenes of every prompt set."""
    return world.scenes("in_domain") + world.scenes("new") + world.scenes("other")


def captions_of(scenes):
    return [scene.caption for scene in scenes]


def render(scenes, seed, rates=world.FLAWS, trails=None, frames=None):
    """Draw a clip of each scene -> clips (n, F, 3, H, W) in [0, 1], float16, on the CPU, and their flaws. Clip i has seed + i.
    rates: how often each flaw is drawn. trails: a trail for each clip, as in world.draw."""
    made = []
    for i, scene in enumerate(progress(scenes, desc="drawing clips", unit="clips")):
        trail = trails[i] if trails else None
        made.append(world.make_clip(scene, seed + i, trail=trail, rates=rates, frames=frames))
    clips, flaws = zip(*made)
    return torch.stack(clips).half(), flaws
