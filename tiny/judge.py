"""
An independent judge of tiny clips, which nothing ever optimises: measures of pixels, of how well the shape is drawn and of how
steadily it moves, and a classifier. It shows what a rising reward hides: a colour that floods the picture, a shape that melts,
a clip that stops moving. tiny/README.md says how it learned, and why a classifier of shapes is not enough.

Letters: B clips, F frames, H and W pixel rows and columns, N masks, K candidates.
"""
import math
from pathlib import Path

import torch
from torch import nn

from formats.tensors import load_strict, read_tensors
from support.tables import saturation, sharpness
from tiny import world

SHAPES = (*world.SHAPES, "stripes")
DIRECTIONS = (*world.DIRECTIONS, "")  # "" is no motion
CLASSES = {"colour": tuple(world.COLOURS), "shape": SHAPES, "direction": DIRECTIONS}


class Judge(nn.Module):
    """Colour, shape and direction of motion, from pixels: clips (B, F, 3, H, W) in [0, 1] -> three tensors of logits."""

    def __init__(self):
        super().__init__()
        def conv(c_in, c_out, stride):
            return nn.Sequential(nn.Conv3d(c_in, c_out, 3, stride, 1), nn.GroupNorm(8, c_out), nn.SiLU())
        self.body = nn.Sequential(conv(3, 16, (1, 2, 2)), conv(16, 32, 2), conv(32, 64, 2), conv(64, 64, 1))
        self.heads = nn.ModuleList(nn.Linear(64, len(names)) for names in CLASSES.values())

    def forward(self, clips):
        features = self.body(clips.transpose(1, 2) * 2 - 1).amax(dim=(2, 3, 4))           # (B, 64): wherever it is
        return [head(features) for head in self.heads]


def load_judge(path=Path(__file__).parent / "weights/judge.safetensors"):
    """The shipped judge, or another file's, frozen. ValueError if it is not one, or damaged."""
    return load_strict(Judge(), read_tensors(path), path, torch.float32)


def left(frames, captions):
    """1 for a clip (B, F, 3, H, W) that the judge sees move left, whatever its caption says, else 0 -> (B, 1). To be watched."""
    judge = load_judge().to(frames.device)
    return (judge(frames[:, :world.FRAMES])[2].argmax(dim=1) == DIRECTIONS.index("left")).float()[:, None]


left.name = "left"  # in tables; as a reward it is called for with --watch tiny/judge.py:left
left.num_frames = world.FRAMES


def labels(scenes):
    """What the classifier should say: class numbers (3, B) of colour, shape and direction."""
    rows = []
    for what, names in CLASSES.items():
        rows.append([names.index(getattr(scene, what)) for scene in scenes])
    return torch.tensor(rows)


def watermark_contrast(clips, rows_off=0):
    """Contrast of the watermark's dashes in the time average: clips (B, F, 3, H, W) in [0, 1] -> (B,).
    rows_off: how many rows below the band's own place to look for it."""
    rows = clips.mean(dim=(1, 2))[:, 15 + rows_off:18 + rows_off]                         # (B, 3, W)
    dashes = world.watermark_band()[15:18].to(clips)
    dashes = dashes - dashes.mean()
    return ((rows * dashes).sum(dim=(1, 2)) / dashes.square().sum()).clamp(min=0)


def clip_measures(clips):
    """Clips (B, F, 3, H, W) in [0, 1] -> {measure: (B,)}.

    watermark   contrast of the band's dashes in the time average of the clip; 0.01 without a band, 0.25 to 0.4 with one. It is
                the largest of nine places, up to four rows off, since a band that only moved has not gone
    sharpness   support.tables.sharpness, off the band; blur and wash-out both lower it
    noise       quartile of changes of a pixel between frames: the background's, where only the light changes, slowly
    motion      change of saturation over four frames, relative to all saturation; near 0 when nothing moves"""
    off_band = torch.cat([clips[..., :13, :], clips[..., 20:, :]], dim=-2)
    colourful = clips.amax(dim=2) - clips.amin(dim=2)                                     # (B, F, H, W)
    moved = (colourful[:, 4:] - colourful[:, :-4]).abs().mean(dim=(1, 2, 3))
    bands = [watermark_contrast(clips, rows_off) for rows_off in range(-4, 5)]
    return {"watermark": torch.stack(bands).amax(dim=0), "sharpness": sharpness(off_band), "saturation": saturation(clips),
            "noise": clips.diff(dim=1).abs().mean(dim=2).flatten(1).quantile(.25, dim=1),
            "motion": moved / colourful.mean(dim=(1, 2, 3)).clamp(min=1e-3)}


def ramp(cover):
    """Coverage (or saturation relative to its peak) to a mask: 0 up to .45, 1 from .85. A trail covers at most .38 and
    disappears; the inside of a shape counts in full though it is not even; a soft edge tells half a pixel of place or size."""
    return ((cover - .45) / .4).clamp(0, 1)


def shape_mask(clips):
    """Where the shape is, by saturation, because all else in a clip is nearly grey: (B, F, 3, H, W) in [0, 1] -> (B, F, H, W).

    Saturation counts relative to the frame's own peak, so pale shapes have the same mask as vivid ones. A watermark is grey and
    lowers the saturation beneath it by its opacity, which its contrast tells; this is undone, or a band would cut the shape."""
    colourful = clips.amax(dim=2) - clips.amin(dim=2)                                     # (B, F, H, W)
    beside = clips[..., [12, 13, 19, 20], :].mean(dim=(1, 2, 3, 4))                       # (B,): grey under the band
    opacity = (watermark_contrast(clips) / (world.WATERMARK_GREY - beside).clamp(min=.2)).clamp(max=.7)
    band = opacity[:, None, None, None] * world.watermark_band().to(clips)                # (B, 1, H, W)
    colourful = colourful / (1 - band)
    # The floor keeps a grey clip, which shows no shape at all, from being stretched into one.
    peak = colourful.flatten(2).quantile(.96, dim=2).clamp(min=.12)                       # (B, F)
    return ramp(colourful / peak[..., None, None])


def overlap(a, b):
    """Intersection over union of two soft masks (..., H, W) -> (...). Two empty ones do not overlap."""
    return torch.minimum(a, b).sum(dim=(-2, -1)) / torch.maximum(a, b).sum(dim=(-2, -1)).clamp(min=1e-6)


def best_shape(masks, shape):
    """Best overlap of each mask (N, H, W) with a drawn shape, over place and radius -> (N,)."""
    x = torch.arange(world.SIZE, device=masks.device) + .5                                # (W,): pixels' centres
    y = x[:, None]                                                                        # (H, 1)
    weight = masks.sum(dim=(1, 2)).clamp(min=1e-6)
    centre_x = (masks * x).sum(dim=(1, 2)) / weight                                       # (N,)
    centre_y = (masks * y).sum(dim=(1, 2)) / weight
    best = torch.stack([centre_x, centre_y, torch.full_like(weight, 6.75)], dim=1)        # (N, 3): place and radius

    # From the centre of mass and the middle radius outwards, first in coarse steps, then in finer ones around the best.
    coarse = torch.cartesian_prod(torch.arange(-2., 2.5), torch.arange(-2., 2.5), torch.arange(-2., 2.5, .5))    # (K, 3)
    half_pixel = torch.tensor([-.5, 0., .5])
    fine = torch.cartesian_prod(half_pixel, half_pixel, half_pixel / 2)
    for offsets in (coarse, fine, fine / 2):
        tried = best[:, None] + offsets.to(best)                                          # (N, K, 3)
        centre_x, centre_y, radius = tried[..., None, None].unbind(dim=2)                 # (N, K, 1, 1)
        drawn = ramp(world.mask(shape, x - centre_x, y - centre_y, radius))               # (N, K, H, W)
        found, which = overlap(drawn, masks[:, None]).max(dim=1)
        best = tried[torch.arange(len(masks), device=masks.device), which]
    return found


def fidelity(masks, scene):
    """The best overlap of a clip's masks (F, H, W) with the scene's shape, over place and size, or period and phase -> ()."""
    masks = masks[::3]                                                                    # (N, H, W): six frames
    if scene.shape != "stripes":
        return best_shape(masks, scene.shape).mean()
    dx, dy = world.DIRECTIONS[scene.direction]
    candidates = torch.cartesian_prod(torch.arange(9.5, 13.25, .25), torch.arange(48) / 48)     # (K, 2)
    period, phase = candidates.to(masks).T[..., None]                                     # (K, 1)
    position = torch.arange(world.SIZE, device=masks.device) + .5 - phase * period        # (K, W) or (K, H)
    drawn = ramp(world.stripes(position, period, dx + dy)).unsqueeze(1 if dx else 2)      # (K, 1, W) or (K, H, 1)
    return overlap(drawn.expand(-1, *masks.shape[1:]), masks[:, None]).amax(dim=1).mean()


def steadiness(masks):
    """How steady the shape is: the mean overlap of each frame's mask with the frame before, moved on at one speed for the whole
    clip, the best of all that a clip may have and none. masks (B, F, H, W) -> (B,).
    It falls if the shape jumps, swells or flickers, and does not depend on where the shape goes, or whether at all."""
    speeds = torch.arange(.75, 1.4, .1, dtype=torch.float64)
    found = []
    for axis in (-1, -2):
        for speed in [0., *speeds.tolist(), *(-speeds).tolist()]:                         # pixels a frame
            whole = math.floor(speed)
            part = speed - whole
            before = masks[:, :-1]
            moved = (1 - part) * before.roll(whole, axis) + part * before.roll(whole + 1, axis)     # between pixels: linear
            found.append(overlap(moved[..., 2:-2, 2:-2], masks[:, 1:, 2:-2, 2:-2]).mean(dim=1))     # (B,), off the border
    return torch.stack(found).amax(dim=0)


@torch.no_grad()
def judge_clips(judge, clips, captions):
    """Every measure of every clip: clips (B, F, 3, H, W) in [0, 1], captions [B] -> {measure: (B,)}.
    Beside clip_measures: colour, shape, direction (1 where the classifier says what the caption says), static (1 where it
    sees no motion), fidelity and steadiness. Raises ValueError for a caption that is not of the tiny world."""
    scenes = [world.parse(caption) for caption in captions]
    measures = {name: values.float().cpu() for name, values in clip_measures(clips).items()}
    for name, truth, logits in zip(CLASSES, labels(scenes), judge(clips)):
        said = logits.argmax(dim=1).cpu()
        measures[name] = (said == truth).float()
    measures["static"] = (said == DIRECTIONS.index("")).float()  # the last one is the direction
    masks = shape_mask(clips.float())                                                     # (B, F, H, W)
    measures["fidelity"] = torch.stack([fidelity(mask, scene) for mask, scene in zip(masks, scenes)]).cpu()
    measures["steadiness"] = steadiness(masks).cpu()
    return measures
