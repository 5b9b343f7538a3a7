"""
What rewards have in common: they stay frozen, they check what they are given, and they encode a caption once.

A reward maps frames (B, S, 3, H, W) in [0, 1] and B captions to scores. `num_frames` says which frames it wants: None for an
image reward, which scores any S frames each by itself -> (B, S); a number for a video reward, which is given so many frames of
a clip, evenly spread and in order -> (B, 1). `name` tells the version, since scores of two versions do not compare.
"""
import sys

import torch
from torch import nn
from tqdm import tqdm

from formats.frames import limit
from support.ranks import is_main_process


class RewardModel(nn.Module):
    """A reward that stays frozen and in eval mode. name: with its version; num_frames: see above."""

    def __init__(self, name, num_frames=None):
        super().__init__()
        self.name, self.num_frames = name, num_frames
        self._texts, self._texts_of = {}, None
        self.eval()

    def train(self, mode=True):
        """Stays in eval mode: a trainer's model.train() must not switch on the reward's dropout."""
        return super().train(False)

    def pixels(self, frames, captions):
        """Frames (B, S, 3, H, W) as single pictures (B*S, 3, H, W) in float32, limited to [0, 1]; ValueError for other shapes."""
        if frames.dim() != 5 or frames.shape[2] != 3 or not frames.is_floating_point():
            raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}: must be floating (B, S, 3, H, W)")
        if isinstance(captions, str) or len(captions) != len(frames):
            raise ValueError(f"captions are {captions!r:.80}: must be a list of {len(frames)}, one per video")
        if self.num_frames and frames.shape[1] != self.num_frames:
            raise ValueError(f"frames = {frames.shape[1]}: {self.name} sees {self.num_frames} frames of a clip, in order")
        return limit(frames.flatten(0, 1).float())

    def encode_once(self, captions, model, encode):
        """
        encode(caption) of each caption, computed once for the weights that `model` has now: a list of tensors, no gradient.

        Captions are encoded one at a time and outside autocast, so not even the last bit depends on the batch. After a resume,
        the same captions may come in other batches.
        """
        # What is kept belongs to exactly these weights: moving, casting or loading them changes an address or a version.
        weights = [(p.data_ptr(), p._version) for p in model.parameters()]
        if weights != self._texts_of:
            self._texts, self._texts_of = {}, weights

        with torch.no_grad(), no_autocast(next(model.parameters())):
            for caption in captions:
                if caption not in self._texts:
                    self._texts[caption] = encode(caption)
        return [self._texts[caption] for caption in captions]


class LinearHead(nn.Module):
    """
    Five linear layers from features to a score, those of the aesthetic predictor and of ImageReward: (N, width) -> (N,).

    Always in float32, under autocast too: it costs nothing, and the score is what is compared.
    """

    def __init__(self, width):
        super().__init__()
        widths = (width, 1024, 128, 64, 16, 1)
        layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
        # Dropout, which eval mode switches off, stood between the first ones and counts in the published names.
        self.layers = nn.ModuleDict(dict(zip("02467", layers)))

    def forward(self, x):
        with no_autocast(x):
            x = x.float()
            for layer in self.layers.values():
                x = layer(x)
        return x[:, 0]


def no_autocast(tensor):
    """A context without autocast on the tensor's device; meta has none."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


def say_non_commercial(name, licence):
    """One line on standard error for weights that may not be used commercially, and so neither may what is tuned on them."""
    if is_main_process():
        tqdm.write(f"{name}: its weights are {licence}, for no commercial use", file=sys.stderr)
