"""
A reward of the user's own: `--reward my_file.py:function`, or any object that can be called.

function(frames, captions): frames (B, S, 3, H, W) in [0, 1], with gradient, and B captions ->
scores (B, S). With an attribute `num_frames` it is a video reward: it is given so many frames in
order -> (B, 1). A torch module is frozen. An attribute `name` replaces its name.
"""
import runpy
from pathlib import Path

import torch
from torch import nn

from formats.reward_model import RewardModel
from support.files import first_line


class OwnReward(RewardModel):
    """A user's function; scores of another shape or without gradient would train nothing."""

    def __init__(self, function, name):
        super().__init__(getattr(function, "name", name), getattr(function, "num_frames", None))
        self.function = function
        if isinstance(function, nn.Module):
            function.requires_grad_(False).eval()

    def forward(self, frames, captions):
        pictures = self.pixels(frames, captions).unflatten(0, frames.shape[:2])   # (B, S, 3, H, W)
        scores = self.function(pictures, captions)
        expected = (len(frames), 1 if self.num_frames else frames.shape[1])
        if not isinstance(scores, torch.Tensor):
            raise ValueError(f"reward {self.name}: returned {type(scores).__name__}, not a tensor")
        if scores.shape != expected or not scores.is_floating_point():
            raise ValueError(f"reward {self.name}: returned {scores.dtype} {tuple(scores.shape)}; "
                             f"must be floating {expected}")
        if pictures.requires_grad and not scores.requires_grad:
            raise ValueError(f"reward {self.name}: its scores have no gradient to the frames")
        return scores.float()


def load(file, function, dtype, device):
    """The reward `function` of a Python file, which is run."""
    what = f"reward {file}:{function}"
    try:
        reward = runpy.run_path(file, run_name=Path(file).stem).get(function)
    except Exception as error:  # whatever the user's own code raises
        raise ValueError(f"{what}: the file cannot be imported ({first_line(error)})") from None
    if not callable(reward):
        raise ValueError(f"{what}: must name a function of the file, as in {file}:NAME")
    return OwnReward(reward, f"{Path(file).stem}:{function}").to(device)
