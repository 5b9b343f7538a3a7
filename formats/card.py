"""
Whether a training step fits into a GPU's memory: asked before anything is loaded, since the answer comes otherwise after
gigabytes of downloads, hours of encoding and an evaluation.

The numbers below were counted on the meta device, at full size in 16 bits (support/memory.py; a test holds them to that count).
Workspaces of kernels and gaps between tensors come on top, so what does not fit by this count fits nowhere.
"""
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from formats.mixture import read_mixture
from support.files import read_json
from support.ranks import is_main_process, pick_device, pick_dtype

GIB = 2**30
FULL_SIZE = [320, 640, 1280, 1280]  # channels of ModelScopeT2V's UNet, to which alone these numbers belong
WEIGHTS, HPS_WEIGHTS = 2.73, 1.84   # GiB of UNet and decoder, and of HPSv2
UNET, UNET_INPUTS = 13.17, 1.21     # kept by a UNet call for its backward pass: everything, or the inputs of its blocks
BLOCK = 1.59                        # that the largest block needs when it is computed again
DECODED, SCORED = .692, .201        # kept for each scored frame by the decoder, and by HPSv2
SNUG = .9                           # share of a GPU above which workspaces may not find room


def full_size(base):
    """Whether these numbers are a base's: one of ModelScopeT2V's structure, as all published ones."""
    if base == "tiny" or base.startswith("random:"):
        return False
    for file in (Path(base) / "unet" / "config.json", Path(base) / "config.json"):
        if file.is_file():
            return read_json(file).get("block_out_channels") == FULL_SIZE
    return True


def expected_peak(cfg, clips, element_size=2, decode_chunk=None, recompute=None):
    """
    GiB of a step at its worst moment, for so many clips at once.

    element_size: bytes of a number of the frozen parts. decode_chunk, recompute: instead of the settings' own.
    """
    decode_chunk = (1 if cfg.low_memory else cfg.decode_chunk) if decode_chunk is None else decode_chunk
    recompute = (cfg.low_memory or cfg.checkpoint_activations) if recompute is None else recompute
    pixels = ((cfg.size or 256) / 256) ** 2
    length = cfg.frames / 16
    has_hps = any(kind.startswith("hpsv2") for _, kind in read_mixture(cfg)[0])

    # Kept by the last K UNet calls; then the worse of what scoring keeps and what a block needs that is computed again.
    calls = cfg.grad_steps * length * pixels * (UNET_INPUTS if recompute else UNET)
    at_once = min(decode_chunk or cfg.segments, cfg.segments)
    scoring = at_once * (DECODED * pixels + has_hps * SCORED)
    again = recompute * BLOCK * length * pixels
    return (WEIGHTS + has_hps * HPS_WEIGHTS + clips * (calls + max(scoring, again))) * element_size / 2


def card_memory(device):
    """Bytes of a GPU, or None for a device whose memory is the machine's."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def check_card(cfg, world_size=1):
    """
    ValueError, naming flags that would fit, if a step of train.py cannot fit into this rank's GPU; a line if it just may.

    Says nothing where it cannot know: on other devices, for structures other than the full size, and for a compiled UNet,
    which chooses itself what to keep.
    """
    device = pick_device(cfg.device)
    memory = card_memory(device)
    if memory is None or cfg.compile or not full_size(cfg.base):
        return
    room, element_size = memory / GIB, pick_dtype(cfg.dtype, device).itemsize
    share = cfg.batch_size // world_size
    clips = min(cfg.clips_at_once or share, share)
    needed = expected_peak(cfg, clips, element_size)
    if needed <= SNUG * room:
        return

    fitting = fitting_flags(cfg, clips, room, element_size)
    what = f"a step of {clips} clip{'s' * (clips > 1)} at once needs {needed:.1f} GiB before workspaces, this GPU has {room:.1f}"
    advice = f"these would fit: {'; '.join(fitting)}" if fitting else "no setting of memory would fit"
    if needed > room:
        raise ValueError(f"{what}; {advice} (docs/gpu.md)")
    if is_main_process():
        tqdm.write(f"{what}. If that fails, {advice} (docs/gpu.md)", file=sys.stderr)


def fitting_flags(cfg, clips, room, element_size):
    """Up to three settings that fit with room to spare, as flags and GiB, those that cost the least time first."""
    ways = {"": (None, None), "--decode-chunk 1": (1, False), "--checkpoint-activations": (0, True), "--low-memory": (1, True)}
    fitting = []
    for flag, (decode_chunk, recompute) in ways.items():
        for at_once in sorted({clips, 1}, reverse=True):
            peak = expected_peak(cfg, at_once, element_size, decode_chunk, recompute)
            fewer = f"--clips-at-once {at_once}" if at_once < clips else ""
            if peak <= SNUG * room and not (fewer and fitting):  # one way with fewer clips is enough
                fitting.append(f"{fewer} {flag}".strip() + f" ({peak:.1f} GiB)")
                break
    return fitting[:3]
