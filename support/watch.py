"""
What `--watch` can name beside rewards: measures of a video's own pixels, for any base, and the tiny world's judge.

They are measured at evaluations and never optimised, so that a reward that rises can be held against them (support/guard.py).
Clips are (B, F, 3, H, W) in [0, 1]: B clips of F frames of H x W pixels.
"""
import torch
from torch.nn import functional as F_

PIXELS = ("motion", "flicker", "consistency", "sharpness", "saturation", "diversity")
JUDGE = "judge"
SMALL = (4, 16, 16)  # frames, rows and columns that diversity compares: noise averages out, and many videos fit into memory


def pixel_names(watched):
    """The measures of pixels that `watch` names, each once, in the order of PIXELS; "pixels" is all that one video has."""
    return tuple(name for name in PIXELS if name in watched or ("pixels" in watched and name != "diversity"))


def reward_kinds(watched):
    """What else it names: kinds of rewards."""
    return [name for name in watched if name not in (*PIXELS, "pixels", JUDGE)]


def measured_names(watched):
    """The names under which logs have the measures of pixels and the judge's score."""
    return [f"pixel_{name}" for name in pixel_names(watched)] + [JUDGE] * (JUDGE in watched)


def check_watched(watched, prompts, judge):
    """ValueError if these prompts {set: captions} lack something that `watch` needs; judge: the base's own, or None."""
    if JUDGE in watched and prompts and judge is None:
        raise ValueError("watch judge: only the tiny world has one, for its own prompts and 16 frames of 32 x 32 pixels")
    if "diversity" in pixel_names(watched) and prompts and all(len(set(p)) == len(p) for p in prompts.values()):
        raise ValueError("watch diversity: needs several videos of a prompt, and no set has any; an eval_count (in evaluate.py "
                         "count) above the number of a set's prompts repeats them")


# ---------------------------------------------------------------------------------------------------------------------
# Measures of pixels

def quantile(values, q):
    """torch.quantile of each row (B, n) -> (B,), of any n; torch's own refuses more than 16 million values."""
    values = values.sort(dim=1).values
    place = q * (values.shape[1] - 1)
    low = int(place)
    return torch.lerp(values[:, low], values[:, min(low + 1, values.shape[1] - 1)], place - low)


def sharpness(clips):
    """(B,): the steepest hundredth of the differences between horizontal neighbours, the largest of the channels, 0 to 1."""
    return quantile(clips.diff(dim=-1).abs().amax(dim=2).flatten(1), .99)


def saturation(clips):
    """(B,): of the most saturated tenth of the pixels, largest minus smallest channel, 0 to 1."""
    return quantile((clips.amax(dim=2) - clips.amin(dim=2)).flatten(1), .9)


def consistency(clips):
    """
    (B,): how much adjacent frames are alike, the mean over pairs, -1 to 1; 1 for a still clip.

    SSIM (Wang et al. 2004, Eq. 13) without its luminance term, over whole frames: twice their covariance by the sum of their
    variances, each with SSIM's constant, so that frames without any contrast have a value, too.
    """
    frames = clips.flatten(2)                                                             # (B, F, 3 H W)
    frames = frames - frames.mean(dim=2, keepdim=True)
    variance, c2 = frames.square().mean(dim=2), .03 ** 2
    covariance = (frames[:, 1:] * frames[:, :-1]).mean(dim=2)
    return ((2 * covariance + c2) / (variance[:, 1:] + variance[:, :-1] + c2)).mean(dim=1)


def pixel_measures(clips, names):
    """
    {"pixel_" and the name: (B,)} of these PIXELS; of "diversity", which needs other videos, small copies (B, 3, *SMALL).

    motion       mean absolute change of a pixel from frame to frame, 0 to 1
    flicker      mean absolute second difference over three frames, 0 to 2: what changes there and back
    Others have a function each. nan where a clip has too few frames.
    """
    clips = clips.float()
    found = {
        "motion": clips.diff(dim=1).abs().mean(dim=(1, 2, 3, 4)),
        "flicker": clips.diff(n=2, dim=1).abs().mean(dim=(1, 2, 3, 4)),
        "consistency": consistency(clips), "sharpness": sharpness(clips), "saturation": saturation(clips),
        "diversity": F_.adaptive_avg_pool3d(clips.transpose(1, 2), SMALL)}
    return {f"pixel_{name}": found[name] for name in names}


def diversity(copies, captions):
    """
    How much videos of one prompt differ: small copies (n, ...), captions [n] -> (n,), 0 to 1.

    A video's is the mean absolute difference from the others with its caption; nan where there is no other.
    """
    found = torch.full((len(captions),), torch.nan, dtype=torch.float64)
    for caption in set(captions):
        same = [i for i, other in enumerate(captions) if other == caption]
        if len(same) > 1:
            group = copies[same].flatten(1).double()                                      # (m, pixels)
            found[same] = torch.cdist(group, group, p=1).sum(dim=1) / (len(same) - 1) / group.shape[1]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def as_table(rows, captions):
    """{measure: (n,) float64} of a row {measure: number} for each video; captions [n]."""
    table = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        numbers = name != "pixel_diversity"
        table[name] = torch.tensor(values, dtype=torch.float64) if numbers else diversity(torch.stack(values), captions)
    return table


def add_judge(watched, table, base):
    """
    Add the judge's score of each video, 0 to 1, if it is watched: the tiny world's judge in one number, fixed before its use.

    The mean of colour, shape, direction, fidelity, 1 - watermark, and motion kept: min(1, motion / the base's motion), the mean
    of `base`, the table of the same videos before training.
    """
    if JUDGE in watched:
        kept = (table["motion"] / base["motion"].mean().clamp(min=1e-6)).clamp(max=1)
        parts = [table["colour"], table["shape"], table["direction"], table["fidelity"], 1 - table["watermark"], kept]
        table[JUDGE] = torch.stack(parts).mean(dim=0)
