"""
Removal in the tiny world: how sure a detector is that a frame has no watermark. `--reward
removal:watermark`; captions are ignored. VADER (arXiv:2407.08737) takes YOLOS's classes for this.
The score is the log-probability that there is none (tiny/build.py): its gradient is large where the
detector is sure that there is one, too. An image reward.
Letters: B videos, S frames, N = B S pictures, E channels.
"""
import torch.nn.functional as F_
from torch import nn

from formats.reward_model import RewardModel, build, crop_centre
from rewards.action import SIZE, convolution


class Detector(nn.Module):
    """Pictures (N, 3, SIZE, SIZE) in [0, 1] -> logits (N,) of a watermark somewhere."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(convolution(3, 24, 1, 4), convolution(24, 32, 2, 4),
                                  convolution(32, 32, 2, 4))
        self.head = nn.Linear(32, 1)

    def forward(self, pictures):
        x = self.body(pictures * 2 - 1)                                       # (N, E, h, w)
        return self.head(x.mean(dim=(2, 3)))[:, 0]                            # (N,)


class Removal(RewardModel):
    """frames (B, S, 3, H, W) -> (B, S), log-probabilities that the thing is not there."""

    def __init__(self, detector, name):
        super().__init__(name)
        self.detector = detector

    def forward(self, frames, captions):
        x = crop_centre(self.pixels(frames, captions), SIZE, mode="bilinear")
        logits = self.detector(x.to(self.detector.head.weight.dtype)).float()             # (N,)
        return F_.logsigmoid(-logits).view(frames.shape[:2])                  # (B, S)


def load(path, argument, dtype, device):
    """The reward from its folder; path None: random."""
    name = f"removal{'' if path else '-random'}:{argument}"
    return Removal(build(Detector, path, dtype, device), name)
