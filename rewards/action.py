"""
Action in the tiny world: how sure a classifier is that the shape moves as wanted. `--reward
action:left`, whatever the caption says. VADER (arXiv:2407.08737) takes VideoMAE's classes for this.
Unlike the judge, which convolves over time, this one attends over it (tiny/build.py). The score is
the log-probability of the direction: its gradient is large for a clip that certainly moves another
way, where the probability itself has next to none. A video reward of 16 frames.
Letters: B videos, F frames, C classes, E width.
"""
import torch
from torch import nn

from formats.reward_model import RewardModel, build, crop_centre

FRAMES, SIZE = 16, 32  # the tiny world's
DIRECTIONS = ("left", "right", "up", "down")  # and a last class, no motion
WIDTH = 64


def convolution(c_in, c_out, stride=2, groups=8):
    """A layer of 3 x 3; half the rows and columns at stride 2."""
    conv = nn.Conv2d(c_in, c_out, 3, stride, 1)
    return nn.Sequential(conv, nn.GroupNorm(groups, c_out), nn.SiLU())


class Classifier(nn.Module):
    """Clips (B, F, 3, SIZE, SIZE) in [0, 1] -> logits (B, C) of DIRECTIONS and of no motion."""

    def __init__(self):
        super().__init__()
        layout = [convolution(3, 16), convolution(16, 32), convolution(32, 32), nn.Flatten()]
        self.frame = nn.Sequential(*layout, nn.Linear(32 * (SIZE // 8) ** 2, WIDTH))
        self.time = nn.Parameter(.1 * torch.randn(FRAMES, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0, batch_first=True,
                                           norm_first=True)
        self.attention = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, len(DIRECTIONS) + 1)

    def forward(self, clips):
        x = self.frame(clips.flatten(0, 1) * 2 - 1).unflatten(0, clips.shape[:2])     # (B, F, E)
        return self.head(self.attention(x + self.time).mean(dim=1))           # (B, C)


class Action(RewardModel):
    """frames (B, F, 3, H, W) -> log-probabilities (B, 1) of DIRECTIONS[direction]."""

    def __init__(self, classifier, direction, name):
        super().__init__(name, FRAMES)
        self.classifier = classifier
        self.direction = direction

    def forward(self, frames, captions):
        x = crop_centre(self.pixels(frames, captions), SIZE, mode="bilinear")
        x = x.unflatten(0, frames.shape[:2]).to(self.classifier.time.dtype)   # (B, F, 3, h, w)
        logits = self.classifier(x).float()                                   # (B, C)
        return logits.log_softmax(dim=-1)[:, self.direction, None]            # (B, 1)


def load(path, argument, dtype, device):
    """The reward from its folder, for the direction `argument`; path None: random."""
    name = f"action{'' if path else '-random'}:{argument}"
    return Action(build(Classifier, path, dtype, device), DIRECTIONS.index(argument), name)
