"""
What rewards of the transformers library share. No download: tensors are read as data. Published
code resizes 8-bit pictures; here tensors are resized, so that there is a gradient to the pixels.
"""
from collections import OrderedDict
from functools import partial

import torch.nn.functional as F_
from torch import nn

from formats.reward_model import clip_normalize, no_autocast
from formats.tensors import read_config

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}  # by width
SMALL_SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def read_model_config(config_class, path):
    """The config.json of a hub folder as config_class; ValueError for anything that is none."""
    return read_config(path / "config.json", config_class.from_dict)


def size_name(config):
    """What a published model is called by its width: tiny, small, base, large; else the width."""
    return SIZES.get(config.hidden_size, str(config.hidden_size))


def find_class(labels, wanted, what):
    """The index of the class called `wanted` in {index: name}."""
    wanted = wanted.strip().lower()
    for index, label in labels.items():
        if label.lower() == wanted:
            return int(index)
    known = sorted({*labels.values()} - {"N/A"})
    similar = [label for label in known if wanted[:3] in label.lower()] or known
    raise ValueError(f"{what}: no class {wanted!r:.60}; must be one of its {len(known)}, such as "
                     f"{', '.join(similar[:8])}")


def fit_within(x, shortest, longest, multiple):
    """YOLOS's resize: shortest side to `shortest`, longest at most `longest`, to a `multiple`."""
    H, W = x.shape[-2:]
    exact = min(shortest, longest * min(H, W) / max(H, W))
    h, w = (round(exact), int(exact * W / H)) if H <= W else (int(exact * H / W), round(exact))
    h, w = max(h // multiple, 1) * multiple, max(w // multiple, 1) * multiple
    return F_.interpolate(x, (h, w), mode="bilinear", align_corners=False, antialias=True)


imagenet_normalize = partial(clip_normalize, mean=IMAGENET_MEAN, std=IMAGENET_STD)


class LinearHead(nn.Module):
    """Five linear layers, the aesthetic predictor's and ImageReward's: (N, width) -> (N,)."""

    def __init__(self, width):
        super().__init__()
        widths = (width, 1024, 128, 64, 16, 1)
        layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
        # The dropout layers between the first ones count in the published names.
        self.layers = nn.Sequential(OrderedDict(zip("02467", layers)))

    def forward(self, x):
        with no_autocast(x):  # float32 costs nothing, and the score is what is compared
            return self.layers(x.float())[:, 0]
