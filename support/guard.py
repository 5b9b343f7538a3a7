"""
The guard against over-optimisation: when what is watched got worse while the reward was up, and which adapter to keep.

It reads the tables of a run's evaluations, {step: {set: {measure: (n,)}}} (samples/step_*.json), and stores nothing, so a run
that is continued decides the same. Every evaluation has the same videos (prompts and noise), so each difference is paired,
video by video, over all sets together; its standard error is clustered by caption. There is no verdict from a difference of
less than ERRORS of them, nor where there is no error (a single caption).

The rule, for each watched measure at each evaluation:
- a score (a watched reward, the judge) has turned when it is lower than at its best evaluation so far;
- a measure of pixels, of which nobody knows the best value, when it is further from its first value, in the direction
  that LIMITS names, than the share of that value that stands there;
- and only where the reward is higher than at the first evaluation: the guard is about a reward that hides something. Of one
  that falls the highest is kept anyway.
"""
import math
from dataclasses import dataclass

import torch

from support.tables import paired, with_error

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
    sets = list(table)
    pooled = {name: torch.cat([table[s][name] for s in sets]) for name in table[sets[0]]}
    return pooled, [caption for s in sets for caption in prompts[s]]


def change(before, after, measure, captions):
    """Paired difference of a measure and its error, over the videos of which both are known: diversity needs another one."""
    known = (before[measure].isfinite() & after[measure].isfinite()).tolist()
    if not any(known):
        return math.nan, math.nan
    rows = [i for i, is_known in enumerate(known) if is_known]
    return paired({measure: before[measure][rows]}, {measure: after[measure][rows]}, measure, [captions[i] for i in rows])


def counts(difference, error):
    """Whether a difference is beyond its noise; never where its error is not known."""
    return math.isfinite(error) and abs(difference) > ERRORS * error


def find_turn(tables, prompts, watched):
    """
    The first evaluation at which a watched measure has turned, by the rule above, as a Turn; None if there is none.

    tables: as above; prompts: {set: captions}, those of the videos; watched: names of measures.
    """
    steps, pooled = sorted(tables) if watched else [], {}
    for step in steps:
        pooled[step], captions = pool(tables[step], prompts)
    for i, step in enumerate(steps[1:], 1):
        reward = change(pooled[steps[0]], pooled[step], "reward", captions)
        if reward[0] > 0 and counts(*reward):
            found = []
            for name in watched:
                since = steps[0] if name in LIMITS else highest(pooled, steps[:i], name)
                difference = change(pooled[since], pooled[step], name, captions)
                if is_worse(name, *difference, mean(pooled[since][name])):
                    found.append((name, since, difference))
            if found:
                return Turn(step, found, reward)
    return None


def mean(values):
    """Of those that are known (n,); nan if none is."""
    return values[values.isfinite()].mean().item()


def highest(pooled, steps, name):
    """The step of the highest mean of a score; the first of them if none is known."""
    means = {step: mean(pooled[step][name]) for step in steps}
    return max((step for step in steps if math.isfinite(means[step])), key=means.get, default=steps[0])


def is_worse(name, difference, error, first):
    """Whether a difference counts, is in the direction that is worse, and beyond what LIMITS allows of the `first` value."""
    direction, share = LIMITS.get(name, (-1, 0.))
    return counts(difference, error) and difference * (direction or difference) > 0 and abs(difference) > share * abs(first)


def best_step(rewards, turn):
    """
    The step whose adapter is best.safetensors: the one with the highest mean reward, of the evaluations before the turn.

    rewards: {step: mean reward of an evaluation, -inf if it is not finite} in order. The first of equal ones; None for none.
    """
    before = [step for step in rewards if rewards[step] > -math.inf and (turn is None or step < turn.step)]
    return max(before, key=rewards.get, default=None)
