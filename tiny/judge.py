"""
An independent judge of tiny clips, which nothing ever optimises: four measures of pixels, one of motion, and a classifier.

Its numbers say what a rising reward hides: a colour that floods the picture, a shape that melts, a clip that stops moving.
The classifier learns motion from clips whose trail may point elsewhere or be missing, so it must watch the shape move.

Letters: B clips, F frames, H and W pixel rows and columns.
"""

import torch
from torch import nn

from support.published import load_strict, read_tensors
from tiny import world

SHAPES = (*world.SHAPES, "stripes")
DIRECTIONS = (*world.DIRECTIONS, "")  # "" is no motion


class Judge(nn.Module):
    """Colour, shape and direction of motion, from pixels: clips (B, F, 3, H, W) in [0, 1] -> three tensors of logits."""

    def __init__(self):
        super().__init__()
        def conv(c_in, c_out, stride):
            return nn.Sequential(nn.Conv3d(c_in, c_out, 3, stride, 1), nn.GroupNorm(8, c_out), nn.SiLU())
        self.body = nn.Sequential(conv(3, 16, (1, 2, 2)), conv(16, 32, 2), conv(32, 64, 2), conv(64, 64, 1))
        self.heads = nn.ModuleList([nn.Linear(64, len(names)) for names in (world.COLOURS, SHAPES, DIRECTIONS)])

    def forward(self, clips):
        h = self.body(clips.transpose(1, 2) * 2 - 1).amax(dim=(2, 3, 4))                  # (B, 64): wherever it is
        return [head(h) for head in self.heads]


def load_judge(path):
    """The shipped judge from a safetensors file, frozen. ValueError if it is another file, or damaged."""
    return load_strict(Judge(), read_tensors(path), path, torch.float32)


def find_judge(base, frames, height, width):
    """judge(clips, captions) if this base has one beside it and makes clips of this world's size, else None."""
    file = base.folder and base.folder / "judge.safetensors"
    if not file or not file.is_file() or (frames, height, width) != (world.FRAMES, world.SIZE, world.SIZE):
        return None
    judge = load_judge(file).to(base.device)
    return lambda clips, captions: judge_clips(judge, clips, captions)


def labels(scenes):
    """What each classifier should say: three (B,) tensors of class numbers."""
    names = (tuple(world.COLOURS), SHAPES, DIRECTIONS)
    return [torch.tensor([n.index(getattr(s, what)) for s in scenes])
            for n, what in zip(names, ("colour", "shape", "direction"))]


def pixel_measures(clips):
    """
    Clips (B, F, 3, H, W) in [0, 1] -> {measure: (B,)}.

    watermark   contrast of the band's dashes in the time average of the clip; 0.00 without a band, 0.25 to 0.4 with one
    sharpness   steepest hundredth of differences between neighbours, off the band; blur and wash-out both lower it
    saturation  of the most saturated tenth of the pixels, largest minus smallest colour channel
    noise       quartile of changes of a pixel between frames: the background's, where only the light changes, slowly
    motion      change of saturation over four frames, relative to all saturation; near 0 when nothing moves
    """
    grey = clips.mean(dim=2)                                                              # (B, F, H, W)
    dashes = world.watermark_band()[15:18].to(clips)
    dashes = dashes - dashes.mean()
    watermark = ((grey.mean(dim=1)[:, 15:18] * dashes).sum(dim=(1, 2)) / dashes.square().sum()).clamp(min=0)
    off_band = torch.cat([clips[..., :13, :], clips[..., 20:, :]], dim=-2)
    steps = off_band.diff(dim=-1).abs().amax(dim=2).flatten(1)
    saturation = clips.amax(dim=2) - clips.amin(dim=2)                                    # (B, F, H, W)
    moved = (saturation[:, 4:] - saturation[:, :-4]).abs().mean(dim=(1, 2, 3))
    return {"watermark": watermark,
            "sharpness": steps.quantile(.99, dim=1),
            "saturation": saturation.flatten(1).quantile(.9, dim=1),
            "noise": clips.diff(dim=1).abs().mean(dim=2).flatten(1).quantile(.25, dim=1),
            "motion": moved / saturation.mean(dim=(1, 2, 3)).clamp(min=1e-3)}


@torch.no_grad()
def judge_clips(judge, clips, captions):
    """
    Every measure of every clip: clips (B, F, 3, H, W) in [0, 1], captions [B] -> {measure: (B,)}.

    Beside pixel_measures: colour, shape, direction (1 where the classifier says what the caption says) and static (1 where
    it sees no motion). Raises ValueError for a caption that is not of the tiny world.
    """
    truth = labels([world.parse(c) for c in captions])
    said = [logits.argmax(dim=1).cpu() for logits in judge(clips)]
    out = {k: v.float().cpu() for k, v in pixel_measures(clips).items()}
    for name, a, b in zip(("colour", "shape", "direction"), said, truth):
        out[name] = (a == b).float()
    out["static"] = (said[2] == DIRECTIONS.index("")).float()
    return out
