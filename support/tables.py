"""
Numbers of many videos: a table is {measure: (n,) tensor}, one entry a video, "reward" among the measures.

Means with their errors, what `--watch` measures, and the guard. Differences are paired: same prompt and noise, before and after.
"""
import itertools
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F_


def json_numbers(value):
    """The same value with None for numbers that are not finite: JSON has no word for them."""
    if isinstance(value, dict):
        return {k: json_numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_numbers(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def or_nan(value):
    """A number as JSON has it, None being nan."""
    return math.nan if value is None else value


def summary(table):
    """What metrics.jsonl keeps of a table: reward_mean, reward_std, n, and every other measure's mean where it is known."""
    reward = table["reward"]
    std = reward.std().item() if len(reward) > 1 else math.nan
    kept = {"reward_mean": reward.mean().item(), "reward_std": std, "n": len(reward)}
    return kept | {k: v.nanmean().item() for k, v in table.items() if k != "reward"}


def add_means(totals, logged, batch_size):
    """Add to {name: mean over a batch} what a part of it adds, logged {"reward": (B,), more: (B,)}."""
    for name, values in logged.items():
        totals[name] = totals.get(name, 0.) + values.sum().item() / batch_size


def paired(before, after, measure="reward", clusters=None):
    """
    Mean of the difference and its standard error over the same prompts and noise.

    clusters: n labels, as a rule the prompts. Videos of one prompt gain alike, so only different prompts count as independent
    evidence; None takes every video for that. Of a single cluster the error is nan.
    """
    d = after[measure] - before[measure]                                                  # (n,)
    mean = d.mean()
    sums = {}
    for label, deviation in zip(clusters or range(len(d)), (d - mean).tolist()):
        sums[label] = sums.get(label, 0.) + deviation
    m = len(sums)
    error = (m / (m - 1) * sum(s * s for s in sums.values())) ** .5 / len(d) if m > 1 else math.nan
    return mean.item(), error


def best_middle_worst(gains):
    """{name: key} of the best, the middle and the worst of gains {key: number}, fewer of fewer; equal ones in their order."""
    order = sorted(gains, key=lambda key: gains[key] if math.isfinite(gains[key]) else -math.inf, reverse=True)
    if len(order) < 3:
        return dict(zip(("best", "worst"), order))
    return {"best": order[0], "middle": order[len(order) // 2], "worst": order[-1]}


def over_seeds(label, rows):
    """
    Rows {measures, differences, ...} of several training seeds as one: means of measures, of gains and of the gains' errors.

    "spread" is the standard deviation over the seeds of each measure's gain. The error over prompts of a mean over seeds is at
    most the mean of the seeds' errors.
    """
    measures = {}
    for key in rows[0]["measures"]:
        measures[key] = column([row["measures"][key] for row in rows]).mean().item()
    differences = {}
    spread = {}
    for key in rows[0].get("differences", {}):
        gains = column([row["differences"][key][0] for row in rows])
        errors = column([row["differences"][key][1] for row in rows])
        differences[key] = gains.mean().item(), errors.mean().item()
        spread[key] = gains.std().item() if len(rows) > 1 else None
    return rows[0] | {"label": label, "measures": measures, "differences": differences, "spread": spread, "seeds": len(rows)}


def column(values):
    """Numbers as JSON has them -> (n,) float64."""
    return torch.tensor([or_nan(value) for value in values], dtype=torch.float64)


def with_error(value, error, sign=""):
    """Both as text; the error of a single video is not 0, there is none."""
    return f"{value:{sign}.4f} ± " + (f"{error:.4f}" if math.isfinite(error) else "undefined")


# ---------------------------------------------------------------------------------------------------------------------
# What `--watch` can name beside rewards: measures of a video's own pixels, for any base, and the tiny world's judge.
#
# They are measured at evaluations and never optimised, so that a reward that rises can be held against them.
# Clips are (B, F, 3, H, W) in [0, 1]: B clips of F frames of H x W pixels.

PIXELS = ("motion", "flicker", "consistency", "sharpness", "saturation", "diversity")
JUDGE = "judge"
SMALL = (4, 16, 16)  # frames, rows and columns that diversity compares: noise averages out, and many videos fit into memory


def pixel_names(watched):
    """The measures of pixels that `watch` names, each once, in the order of PIXELS; "pixels" is all that one video has."""
    return tuple(name for name in PIXELS if name in watched or ("pixels" in watched and name != "diversity"))


def watched_names(watched, rewards=()):
    """The names under which logs have what is watched: rewards, measures of pixels, the judge's score."""
    names = [reward.name for reward in rewards] + [f"pixel_{name}" for name in pixel_names(watched)]
    return names + [JUDGE] * (JUDGE in watched)


def check_watched(watched, prompts, judge):
    """ValueError if these prompts {set: captions} lack something that `watch` needs; judge: the base's own, or None."""
    if JUDGE in watched and prompts and judge is None:
        raise ValueError("watch judge: only the tiny world has one, for its own prompts and 16 frames of 32 x 32 pixels")
    if "diversity" in pixel_names(watched) and prompts and all(len(set(p)) == len(p) for p in prompts.values()):
        raise ValueError("watch diversity: needs several videos of a prompt, and no set has any; an eval_count (in evaluate.py "
                         "count) above the number of a set's prompts repeats them")


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
    variance = frames.square().mean(dim=2)
    c2 = .03 ** 2
    covariance = (frames[:, 1:] * frames[:, :-1]).mean(dim=2)
    return ((2 * covariance + c2) / (variance[:, 1:] + variance[:, :-1] + c2)).mean(dim=1)


def pixel_measures(clips, names):
    """{"pixel_" and the name: (B,)} of these PIXELS; of "diversity", which needs other videos, small copies (B, 3, *SMALL).
    nan where a clip has too few frames."""
    if not names:
        return {}
    clips = clips.float()
    found = {
        "motion": clips.diff(dim=1).abs().mean(dim=(1, 2, 3, 4)),         # from frame to frame, 0 to 1
        "flicker": clips.diff(n=2, dim=1).abs().mean(dim=(1, 2, 3, 4)),   # over three, 0 to 2: what changes there and back
        "consistency": consistency(clips), "sharpness": sharpness(clips), "saturation": saturation(clips),
        "diversity": F_.adaptive_avg_pool3d(clips.transpose(1, 2), SMALL)}
    return {f"pixel_{name}": found[name].cpu() for name in names}


def diversity(copies, captions):
    """(n,): mean absolute difference of each small copy (n, ...) from the others of its caption, 0 to 1; nan without others."""
    found = torch.full((len(captions),), torch.nan, dtype=torch.float64)
    for caption in set(captions):
        same = [i for i, other in enumerate(captions) if other == caption]
        if len(same) > 1:
            group = copies[same].flatten(1).double()                                      # (m, pixels)
            found[same] = torch.cdist(group, group, p=1).sum(dim=1) / (len(same) - 1) / group.shape[1]
    return found


def as_table(rows, captions):
    """{measure: (n,) float64} of a row {measure: a number or (1,)} for each video; captions [n]. Under "pixel_diversity", which
    is known only once all videos are there, a row has a small copy of its own."""
    table = {}
    for name in rows[0]:
        if name == "pixel_diversity":
            table[name] = diversity(torch.cat([row[name] for row in rows]), captions)
        else:
            table[name] = torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)
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


# ---------------------------------------------------------------------------------------------------------------------
# The guard against over-optimisation: when what is watched got worse while the reward was up, and which adapter to keep.
#
# It reads the tables of a run's evaluations, {step: {set: {measure: (n,)}}}, and stores nothing, so a continued run decides the
# same. Each difference is paired, video by video, over all sets together, and its standard error is clustered by caption. There
# is no verdict from a difference of less than ERRORS of them, nor where there is no error (a single caption).
#
# The rule, for each watched measure at each evaluation:
# - a score (a watched reward, the judge) has turned when it is lower than at its best evaluation so far;
# - a measure of pixels, of which nobody knows the best value, when it is further from its first value, in the direction
#   that LIMITS names, than the share of that value that stands there;
# - and only where the reward is higher than at the first evaluation: the guard is about a reward that hides something. Of one
#   that falls the highest is kept anyway.

ERRORS = 3.  # of which a difference must have more: several measures at many evaluations pass 2 by chance now and then
LIMITS = {  # of pixels: the direction that is worse (0 is both), and the share of the first value that it may change by
    "pixel_motion": (-1, .5), "pixel_flicker": (1, .5), "pixel_consistency": (-1, .1), "pixel_sharpness": (0, .5),
    "pixel_saturation": (0, .5), "pixel_diversity": (-1, .5)}


@dataclass(frozen=True)
class Turn:
    """Where watched measures turned, and by how much: [(measure, the step that it is compared with, (difference, error))]."""
    step: int
    measures: list
    reward: tuple[float, float]
    """paired difference of the reward from the first evaluation, and its error"""

    def words(self, reward_name):
        """One line for a person."""
        found = [f"{name} {with_error(*change, sign='+')} since step {since}" for name, since, change in self.measures]
        return f"turned at step {self.step}: {', '.join(found)}, while {reward_name} was {with_error(*self.reward, sign='+')}"


def pool(table, prompts):
    """The videos of all sets as one table {measure: (n,)}, and their captions."""
    pooled = {}
    for name in next(iter(table.values())):
        pooled[name] = torch.cat([measures[name] for measures in table.values()])
    return pooled, list(itertools.chain(*(prompts[set_name] for set_name in table)))


def change(before, after, measure, captions):
    """Paired difference of a measure and its error, over the videos of which both are known: diversity needs another one."""
    known = (before[measure].isfinite() & after[measure].isfinite()).nonzero().flatten().tolist()
    return paired({measure: before[measure][known]}, {measure: after[measure][known]}, measure, [captions[i] for i in known])


def counts(difference, error):
    """Whether a difference is beyond its noise; never where its error is not known."""
    return math.isfinite(error) and abs(difference) > ERRORS * error


def find_turn(tables, prompts, watched):
    """The Turn of the first evaluation at which one of `watched` has turned, or None. prompts: {set: the videos' captions}."""
    pooled = {}
    for step in sorted(tables) if watched else ():
        pooled[step], captions = pool(tables[step], prompts)
        first = min(pooled)
        reward = change(pooled[first], pooled[step], "reward", captions)
        if reward[0] > 0 and counts(*reward):
            found = []
            for name in watched:
                means = {earlier: mean(pooled[earlier][name]) for earlier in list(pooled)[:-1]}  # not of this evaluation
                since = first if name in LIMITS else highest(means)
                if since is not None:
                    difference = change(pooled[since], pooled[step], name, captions)
                    if is_worse(name, *difference, means[since]):
                        found.append((name, since, difference))
            if found:
                return Turn(step, found, reward)
    return None


def mean(values):
    """Of those that are known (n,); nan if none is."""
    return values[values.isfinite()].mean().item()


def highest(means):
    """The step of the highest of {step: mean}, the first of equal ones; None if none is finite."""
    return max((step for step in means if math.isfinite(means[step])), key=means.get, default=None)


def is_worse(name, difference, error, first):
    """Whether a difference counts, is in the direction that is worse, and beyond what LIMITS allows of the `first` value."""
    direction, share = LIMITS.get(name, (-1, 0.))
    return counts(difference, error) and difference * (direction or difference) > 0 and abs(difference) > share * abs(first)


def best_step(rewards, turn):
    """The step whose adapter is best.safetensors: the highest of rewards {step: mean reward} before the turn; None for none."""
    return highest({step: reward for step, reward in rewards.items() if turn is None or step < turn.step})
