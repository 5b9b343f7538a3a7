"""
Numbers of many videos: a table is {measure: (n,) tensor}, one entry a video, "reward" among the measures.

Means with their errors. Differences are paired: the same prompt and the same noise before and after.
"""


def summary(table):
    """What metrics.jsonl keeps of a table: reward_mean, reward_std, n, and the mean of every other measure."""
    reward = table["reward"]
    kept = {"reward_mean": reward.mean().item(), "reward_std": reward.std(correction=len(reward) > 1).item(), "n": len(reward)}
    return kept | {k: v.mean().item() for k, v in table.items() if k != "reward"}


def paired(before, after, measure="reward"):
    """Mean of the difference and its standard error over the same prompts and noise; the error is 0 for a single one."""
    d = after[measure] - before[measure]
    return d.mean().item(), (d.std().item() / len(d) ** .5 if len(d) > 1 else 0.)
