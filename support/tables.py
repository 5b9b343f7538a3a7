"""
Numbers of many videos: a table is {measure: (n,) tensor}, one entry a video, "reward" among the measures.

Means with their errors. Differences are paired: the same prompt and the same noise before and after.
"""
import math


def json_numbers(value):
    """The same value with None for numbers that are not finite: JSON has no word for them."""
    if isinstance(value, dict):
        return {k: json_numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_numbers(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value):
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
    mean, sums = d.mean(), {}
    for label, deviation in zip(clusters or range(len(d)), (d - mean).tolist()):
        sums[label] = sums.get(label, 0.) + deviation
    groups = len(sums)
    if groups < 2:
        return mean.item(), math.nan
    return mean.item(), (groups / (groups - 1) * sum(s * s for s in sums.values())) ** .5 / len(d)


def with_error(value, error, sign=""):
    """Both as text; the error of a single video is not 0, there is none."""
    return f"{value:{sign}.4f} ± {error:.4f}" if math.isfinite(error) else f"{value:{sign}.4f} ± undefined"
