"""Numbers of many videos: means with their errors, what `--watch` measures, and which adapter to keep.
A table is {measure: (n,) tensor}, one entry a video, "reward" among them. Differences are paired: the same prompt and noise."""
import json
import math

import numpy as np
import torch
from torch.nn import functional as F_


def json_numbers(value):
    """The same value with None for numbers that are not finite: JSON has no word for them."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def summary(table):
    """What metrics.jsonl keeps of a table: reward_mean, reward_std, n, and every other measure's mean where it is known."""
    reward = table["reward"]
    std = reward.std().item() if len(reward) > 1 else math.nan
    means = {name: values.nanmean().item() for name, values in table.items() if name != "reward"}
    return {"reward_mean": reward.mean().item(), "reward_std": std, "n": len(reward)} | means


def add_means(totals, logged, batch_size):
    """Add to {name: mean over a batch} what a part of it adds, logged {"reward": (B,), more: (B,)}."""
    for name, values in logged.items():
        totals[name] = totals.get(name, 0.) + values.sum().item() / batch_size


def paired(before, after, measure="reward", clusters=None):
    """Mean of the difference and its standard error over the same prompts and noise. clusters: n labels, as a rule the prompts:
    videos of one gain alike, so only different ones are independent evidence. None: all are. Of a single one the error is nan."""
    d = after[measure] - before[measure]                                                  # (n,)
    mean = d.mean().item()
    _, cluster = np.unique(clusters or range(len(d)), return_inverse=True)                # (n,)
    sums = np.bincount(cluster, weights=d - mean)                                         # (m,)
    m = len(sums)
    return mean, (m / (m - 1) * np.square(sums).sum().item()) ** .5 / len(d) if m > 1 else math.nan


def best_middle_worst(gains):
    """{name: key} of the best, the middle and the worst of gains {key: number}, fewer of fewer; equal ones in their order."""
    order = sorted(gains, key=lambda key: (math.isfinite(gains[key]), gains[key]), reverse=True)
    if len(order) < 3:
        return dict(zip(("best", "worst"), order))
    return {"best": order[0], "middle": order[len(order) // 2], "worst": order[-1]}


def column(values):
    """Numbers as JSON has them, where None is nan -> (n,) float64."""
    return torch.from_numpy(np.array(list(values), dtype=float))


def with_error(value, error, sign=""):
    """Both as text; the error of a single video is not 0, there is none."""
    return f"{value:{sign}.4f} ± " + (f"{error:.4f}" if math.isfinite(error) else "undefined")


# ---------------------------------------------------------------------------------------------------------------------
# What `--watch` can name beside rewards: measures of a video's own pixels, for any base, and the tiny world's judge. They are
# never optimised, so that a reward that rises can be held against them. Clips are (B, F, 3, H, W) in [0, 1].

PIXELS = ("motion", "flicker", "consistency", "sharpness", "saturation", "diversity")
JUDGE = "judge"
SMALL = (4, 16, 16)  # frames, rows and columns that diversity compares: noise averages out, and many videos fit into memory


def pixel_names(watched):
    """The measures of pixels that `watch` names, each once, in the order of PIXELS; "pixels" is all that one video has."""
    return tuple(name for name in PIXELS if name in watched or ("pixels" in watched and name != "diversity"))


def watched_names(watched, rewards=()):
    """The names under which logs have what is watched: rewards, measures of pixels, the judge's score."""
    names = [*(reward.name for reward in rewards), *(f"pixel_{name}" for name in pixel_names(watched))]
    return [*names, JUDGE] if JUDGE in watched else names


def check_watched(watched, prompts, judge):
    """ValueError if these prompts {set: captions} lack something that `watch` needs; judge: the base's own, or None."""
    if JUDGE in watched and prompts and judge is None:
        raise ValueError("watch judge: only the tiny world has one, for its own prompts and 16 or 17 frames of 32 x 32 pixels")
    if "diversity" in watched and prompts and all(len(set(p)) == len(p) for p in prompts.values()):
        raise ValueError("watch diversity: needs several videos of a prompt: a larger eval_count, or in evaluate.py count")


def quantile(values, q):
    """torch.quantile of each row (B, n) -> (B,), by numpy, as torch's own refuses more than 16 million values."""
    return torch.from_numpy(np.quantile(values.float().numpy(force=True), q, axis=1)).to(values)


def sharpness(clips):
    """(B,): the steepest hundredth of the differences between horizontal neighbours, the largest of the channels, 0 to 1."""
    return quantile(clips.diff(dim=-1).abs().amax(dim=2).flatten(1), .99)


def saturation(clips):
    """(B,): of the most saturated tenth of the pixels, largest minus smallest channel, 0 to 1."""
    return quantile((clips.amax(dim=2) - clips.amin(dim=2)).flatten(1), .9)


def consistency(clips):
    """(B,): how much adjacent frames are alike, the mean over pairs, -1 to 1; 1 for a still clip. SSIM (Wang et al. 2004, Eq. 13)
    without its luminance term, over whole frames; its constant gives flat frames a value too."""
    frames = clips.flatten(2)                                                             # (B, F, 3 H W)
    frames = frames - frames.mean(dim=2, keepdim=True)
    variance = frames.square().mean(dim=2)
    c2 = .03 ** 2
    covariance = (frames[:, 1:] * frames[:, :-1]).mean(dim=2)
    return ((2 * covariance + c2) / (variance[:, 1:] + variance[:, :-1] + c2)).mean(dim=1)


def pixel_measures(clips, names):
    """{"pixel_" and the name: (B,)} of these PIXELS, nan where frames are too few; of "diversity" small copies (B, 3, *SMALL)."""
    if not names:
        return {}
    clips = clips.float()
    values = {
        "motion": clips.diff(dim=1).abs().mean(dim=(1, 2, 3, 4)),         # from frame to frame, 0 to 1
        "flicker": clips.diff(n=2, dim=1).abs().mean(dim=(1, 2, 3, 4)),   # over three, 0 to 2: what changes there and back
        "consistency": consistency(clips), "sharpness": sharpness(clips), "saturation": saturation(clips),
        "diversity": F_.adaptive_avg_pool3d(clips.transpose(1, 2), SMALL)}
    return {f"pixel_{name}": values[name].cpu() for name in names}


def diversity(copies, captions):
    """(n,): mean absolute difference of each small copy (n, ...) from the others of its caption, 0 to 1; nan without others."""
    copies = copies.flatten(1).double()                                                   # (n, pixels)
    distances = torch.cdist(copies, copies, p=1) / copies.shape[1]                        # (n, n)
    numbers = torch.tensor(list(map(captions.index, captions)))                           # (n,), equal for equal captions
    same = numbers[:, None] == numbers                                                    # (n, n), each with itself too
    others = same.sum(dim=1) - 1
    return distances.where(same, 0.).sum(dim=1) / others.where(others > 0, torch.nan)


def table_of(rows, captions):
    """{measure: (n,) float64} of a row {measure: number or (1,)} for each video; for diversity its small copy. captions [n]."""
    table = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        table[name] = diversity(torch.cat(values), captions) if name == "pixel_diversity" else column(map(float, values))
    return table


def add_judge(watched, table, first_table):
    """Add the judge's score of each video, 0 to 1, if it is watched: the mean of colour, shape, direction, fidelity,
    1 - watermark, and motion kept, min(1, motion / its mean in first_table), that of the same videos before training."""
    if JUDGE in watched:
        kept = (table["motion"] / first_table["motion"].mean().clamp(min=1e-6)).clamp(max=1)
        parts = [table["colour"], table["shape"], table["direction"], table["fidelity"], 1 - table["watermark"], kept]
        table[JUDGE] = torch.stack(parts).mean(dim=0)


# ---------------------------------------------------------------------------------------------------------------------
# Which adapter to keep

def deciding(watched):
    """The measure that chooses best.safetensors: the first score that is watched, a reward or the judge, else the reward. What is
    not optimised shows when optimising has gone too far; of a measure of pixels nobody knows the best value."""
    scores = [name for name in watched if not name.startswith("pixel_")]
    return scores[0] if scores else "reward"


def best_step(tables, measure):
    """The evaluation of {step: {set: {measure: (n,)}}} whose mean over its prompt sets is highest, the first of equal ones; None
    if none is finite."""
    means = {}
    for step, by_set in tables.items():
        mean = sum(table[measure].mean().item() for table in by_set.values()) / len(by_set)
        if math.isfinite(mean):
            means[step] = mean
    return max(means, key=means.get, default=None)
