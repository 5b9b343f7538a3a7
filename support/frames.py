"""
Frames in [0, 1] into the pictures that image reward models were trained on, on tensors and differentiable.

Letters: N pictures, H and W pixel rows and columns.
"""
import torch
import torch.nn.functional as F_

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, as in open_clip and transformers
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def limit(x):
    """
    x limited to [0, 1]; a pixel outside gets no gradient (official code: reward.py:147), one at exactly 0 or 1 does.

    That is clamp() as it was when the official code was written; torch 2.15's gives no gradient at the limits either.
    """
    return torch.where((x >= 0) & (x <= 1), x, x.detach().clamp(0, 1))


def letterbox(x, size):
    """
    HPSv2's own resize: longest side to `size`, then black bars. x (N, 3, H, W) -> (N, 3, size, size).

    Follows ResizeMaxSize on float tensors (hpsv2 1.2.0, src/open_clip/transform.py:26): bicubic, antialiased, and its
    overshoot outside [0, 1] is kept. The bars are 0 before CLIP's mean is subtracted: black, not grey.
    """
    H, W = x.shape[-2:]
    scale = size / max(H, W)
    h, w = round(H * scale), round(W * scale)  # the package's order of operations, so that ties round alike
    x = F_.interpolate(x, (h, w), mode="bicubic", align_corners=False, antialias=True)      # (N, 3, h, w)
    top, left = (size - h) // 2, (size - w) // 2
    return F_.pad(x, (left, size - w - left, top, size - h - top))                          # (N, 3, size, size)


def stretch(x, size):
    """
    The official InstructVideo code's resize (utils/reward/reward.py:79). x (N, 3, H, W) -> (N, 3, size, size).

    Bilinear and not antialiased: what torchvision 0.13, which VGen installs, does to tensors. The official code resizes
    the shorter side and so takes square videos only; others are stretched here.
    """
    return F_.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def clip_normalize(x):
    """Subtract CLIP's channel means, divide by its deviations. x (N, 3, H, W) in [0, 1] -> (N, 3, H, W)."""
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD]).to(x)[..., None, None]
    return (x - mean) / std
