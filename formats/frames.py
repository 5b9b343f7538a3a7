"""
Frames in [0, 1] into the pictures that image reward models were trained on, on tensors and differentiable.

Letters: N pictures, H and W pixel rows and columns.
"""
import torch
import torch.nn.functional as F_

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, as in open_clip and transformers
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


def crop_centre(x, size, shortest=None, mode="bicubic"):
    """
    CLIP's own resize: shortest side to `shortest` (default `size`), then the middle square. (N, 3, H, W) -> (N, 3, size, size).

    The published code of PickScore, ImageReward and others resizes 8-bit pictures, which cannot overshoot; so neither does this.
    The longer side and the square's corner are rounded as torchvision's Resize and CenterCrop do.
    """
    H, W = x.shape[-2:]
    shortest = shortest or size
    h, w = (shortest, shortest * W // H) if H <= W else (shortest * H // W, shortest)
    x = limit(F_.interpolate(x, (h, w), mode=mode, align_corners=False, antialias=True))    # (N, 3, h, w)
    top, left = round((h - size) / 2), round((w - size) / 2)
    return x[..., top:top + size, left:left + size]


def fit_within(x, shortest, longest, multiple):
    """
    YOLOS's resize: shortest side to `shortest`, longest at most `longest`, both cut to a `multiple`; nothing is cropped.

    x (N, 3, H, W) -> (N, 3, h, w), bilinear and antialiased. For videos that are wider than high, 512 is VADER's height.
    """
    H, W = x.shape[-2:]
    if max(H, W) / min(H, W) * shortest > longest:
        exact = longest * min(H, W) / max(H, W)
        h, w = (round(exact), int(exact * W / H)) if H <= W else (int(exact * H / W), round(exact))
    else:
        h, w = (shortest, int(shortest * W / H)) if H <= W else (int(shortest * H / W), shortest)
    h, w = max(h // multiple, 1) * multiple, max(w // multiple, 1) * multiple
    return F_.interpolate(x, (h, w), mode="bilinear", align_corners=False, antialias=True)  # (N, 3, h, w)


def clip_normalize(x):
    """Subtract CLIP's channel means, divide by its deviations. x (N, 3, H, W) in [0, 1] -> (N, 3, H, W)."""
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD]).to(x)[..., None, None]
    return (x - mean) / std


def imagenet_normalize(x):
    """The same with ImageNet's means and deviations, which detectors and video models were trained with."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).to(x)[..., None, None]
    return (x - mean) / std


def spread_frames(num_frames, wanted):
    """Which frames a video reward sees: `wanted` of 0..num_frames-1, evenly spread and in order -> (wanted,)."""
    if num_frames < wanted:
        raise ValueError(f"frames = {num_frames}: this reward sees {wanted} frames of a clip, in order; it must have as many")
    return torch.tensor([i * num_frames // wanted for i in range(wanted)])
