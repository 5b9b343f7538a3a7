"""
Action: how sure a classifier is that the wanted action happens. `--reward "videomae:playing
piano"`, or `--reward videomae` for the action that each caption names.
VADER (arXiv:2407.08737) with VideoMAE (arXiv:2203.12602), tuned on Kinetics-400: the score is the
probability of the class, 0 to 1. A video reward of 16 frames.
Weights: CC-BY-NC-4.0, neither they nor what is tuned on them may be used commercially.
Letters: B videos, F frames, C classes.
"""
import re
import sys

import torch
from tqdm import tqdm

from formats.reward_model import RewardModel, build, crop_centre
from rewards import shared
from support.ranks import is_main_process

SPELLINGS = [  # transformers 5 has the second of each
    ("attention.q_bias", "attention.query.bias"), ("attention.v_bias", "attention.value.bias")]
ACTIONS = ("playing piano", "moving left", "moving right", "moving up", "moving down")
SMALL = shared.SMALL_SIZES | dict(image_size=32, patch_size=16, num_frames=16,
                                  id2label=dict(enumerate(ACTIONS)))


class VideoMAE(RewardModel):
    """frames (B, F, 3, H, W) -> (B, 1) in [0, 1]. class_index None: what each caption names."""

    def __init__(self, classifier, class_index, name):
        super().__init__(name, classifier.config.num_frames)
        self.classifier = classifier
        self.class_index = class_index

    def forward(self, frames, captions):
        size = self.classifier.config.image_size
        x = crop_centre(self.pixels(frames, captions), size, mode="bilinear")
        x = shared.imagenet_normalize(x).to(self.classifier.classifier.weight.dtype)
        x = x.unflatten(0, frames.shape[:2])                                  # (B, F, 3, h, w)
        logits = self.classifier(pixel_values=x).logits                       # (B, C)
        wanted = torch.tensor([[self.class_of(c)] for c in captions]).to(logits.device)   # (B, 1)
        return logits.float().softmax(dim=-1).gather(1, wanted)               # (B, 1)

    def class_of(self, caption):
        """The index of the wanted class: the given one, else the longest that a caption names."""
        if self.class_index is not None:
            return self.class_index
        labels = self.classifier.config.id2label.items()
        for index, label in sorted(labels, key=lambda item: -len(item[1])):
            if re.search(rf"\b{re.escape(label.lower())}\b", caption.lower()):
                return int(index)
        raise ValueError(f"reward videomae: the caption {caption!r:.80} names none of its actions; "
                         "name one yourself, as in videomae:ACTION")


def load(path, argument, dtype, device):
    """The reward from a hub folder, for the class `argument` if any; path None: small, random."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification
    config = shared.read_model_config(VideoMAEConfig, path) if path else VideoMAEConfig(**SMALL)
    wanted = shared.find_class(config.id2label, argument, "reward videomae") if argument else None
    classifier = build(lambda: VideoMAEForVideoClassification(config), path, dtype, device,
                       spellings=SPELLINGS)
    name = f"VideoMAE-{shared.size_name(config) if path else 'random'}"
    if path and is_main_process():
        tqdm.write(f"{name}: its weights are CC-BY-NC-4.0, for no commercial use", file=sys.stderr)
    return VideoMAE(classifier, wanted, f"{name}:{argument}" if argument else name)
