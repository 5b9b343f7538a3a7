"""
Several rewards as one, rewards that see whole videos, and what only watches: rewards, and measures of pixels.

    --reward hpsv2 --reward aesthetic=0.05 --reward videomae=2 --watch pickscore

R = sum_k w_k R_k. R_k of an image reward is Eq. (8)'s, after the weights of Eq. (7), which average 0.135 at lambda 1; of a video
reward it is its score. A watched reward is measured at evaluations and never optimised, so that a reward that rises can be held
against one that is not; so are the measures of pixels and the judge of support/tables.py.

Letters: B videos, F frames, S segments, n videos of a set.
"""
import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from formats.reward_checks import check_kind
from formats.reward_model import spread_frames
from formats.weights import reward_kind
from support.tables import PIXELS, measured_names, pixel_measures, pixel_names, reward_kinds


class Mixture(nn.Module):
    """
    parts: [(weight, reward)], at least one; watched: rewards; pixels: names of support.tables.PIXELS. ValueError if two rewards
    have the same name.
    """
    num_frames = None

    def __init__(self, parts, watched=(), pixels=()):
        super().__init__()
        self.pixels = pixels
        self.weights = [weight for weight, _ in parts]
        self.rewards, self.watched = nn.ModuleList(reward for _, reward in parts), nn.ModuleList(watched)
        names = [reward.name for reward in (*self.rewards, *self.watched)]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards {', '.join(names)}: each must be named once")
        self.name = " + ".join(r.name if w == 1 else f"{w:g} {r.name}" for w, r in zip(self.weights, self.rewards))
        self.is_plain = self.weights == [1]  # the mixture is its only part

    def of_edits(self, decode_frames, vae, z_0, captions, g, f, aggregate, chunk=0):
        """
        What a step maximises, R (B,) with gradient, and what the log shows: {"reward": (B,), each part's name: (B,)}.

        decode_frames(vae, z_0 (B, C, F, h, w), index (B, n)) -> frames (B, n, 3, H, W) of the edits; g and f (B, S): the frames
        that image rewards score, and their weights; aggregate(scores, f) -> (B,): Eq. (8). chunk: so many frames at a time,
        recomputed in the backward pass.
        """
        def decode(index):
            return decode_frames(vae, z_0, index)

        scores = {}
        for wanted in dict.fromkeys(reward.num_frames for reward in self.rewards):
            group = [reward for reward in self.rewards if reward.num_frames == wanted]
            scores |= score_group(group, wanted, decode, captions, g, z_0.shape[2], chunk)

        R, logged = 0., {}
        for weight, reward in zip(self.weights, self.rewards):
            r = scores[reward.name]                                                                 # (B, S) or (B, 1)
            R = R + weight * (r[:, 0] if reward.num_frames else aggregate(r, f))
            logged[reward.name] = r.detach().mean(dim=1)
        total = sum(weight * values for weight, values in zip(self.weights, logged.values()))
        return R, {"reward": total} | ({} if self.is_plain else logged)

    def measure(self, frames, video, captions):
        """One video's {"reward": the sum, each part's and each watched reward's name: its score}, and its pixels' measures."""
        found = {}
        for reward in (*self.rewards, *self.watched):
            seen = frames
            if reward.num_frames:
                seen = video[:, spread_frames(video.shape[1], reward.num_frames).to(video.device)]
            found[reward.name] = reward(seen, captions).mean().item()
        total = sum(weight * found[reward.name] for weight, reward in zip(self.weights, self.rewards))
        if self.is_plain:
            found.pop(self.rewards[0].name)
        pixels = pixel_measures(video.clamp(0, 1), self.pixels) if self.pixels else {}
        for name, values in pixels.items():
            found[name] = values[0].cpu() if values[0].dim() else values.item()
        return {"reward": total} | found


def score_group(group, wanted, decode, captions, g, num_frames, chunk):
    """
    Scores of rewards that want the same frames, which are decoded once: {name: (B, S)}, or (B, 1) of video rewards.

    wanted: their num_frames. Recomputing in chunks, image rewards see a chunk at a time, video rewards all of them together.
    """
    def score(frames):
        return torch.stack([reward(frames, captions) for reward in group])                          # (K, B, S or 1)

    def score_decoded(index):
        return score(decode(index))

    def in_chunks(function, index, dim):
        if not chunk:
            return function(index)
        return torch.cat([checkpoint(function, part, use_reentrant=False) for part in index.split(chunk, dim=1)], dim)

    if wanted:
        index = spread_frames(num_frames, wanted).to(g.device).expand(len(g), -1)                   # (B, wanted)
        scores = score(in_chunks(decode, index, 1))
    else:
        scores = in_chunks(score_decoded, g, 2)
    return {reward.name: r for reward, r in zip(group, scores)}


def sees_whole_clips(reward):
    """Whether a reward, or what watches beside it, is given frames of its own in order."""
    if getattr(reward, "pixels", ()):
        return True
    rewards = (*reward.rewards, *reward.watched) if isinstance(reward, Mixture) else [reward]
    return any(getattr(r, "num_frames", None) for r in rewards)  # a plain function scores frames


def measure(reward, frames, video, captions):
    """
    One video's measures {"reward": mean over frames (1, S, 3, H, W)}; of a mixture also those of its parts and what watches:
    numbers, but for "pixel_diversity" (support.tables.as_table).

    video (1, F, 3, H, W): all of its frames, if sees_whole_clips(reward).
    """
    if isinstance(reward, Mixture):
        return reward.measure(frames, video, captions)
    return {"reward": reward(frames, captions).mean().item()}


# ---------------------------------------------------------------------------------------------------------------------
# From settings

def read_mixture(cfg):
    """
    (parts [(weight, kind)], watched kinds of rewards, {kind: weights}) of the settings reward, watch and reward_weights.

    ValueError for an unknown kind, a weight that is no number, weights for a reward that is not there.
    """
    parts = []
    for given in cfg.reward or ("hpsv2",):
        kind, equals, number = given.rpartition("=")
        try:
            weight = float(number) if equals else 1.
        except ValueError:
            weight = 0.
        if weight == 0 or not math.isfinite(weight):
            raise ValueError(f"reward {given!r}: the weight after = must be a finite number other than 0")
        parts.append((weight, kind if equals else given))
    watched = reward_kinds(cfg.watch)
    kinds = [kind for _, kind in parts] + watched

    paths = {}
    for given in cfg.reward_weights:
        name, equals, path = given.partition("=")
        named = [kind for kind in kinds if equals and name in (kind, reward_kind(kind)[0])]
        if not named and len(kinds) == 1:
            named, path = kinds, given  # a bare path, which may have a = of its own
        if not named:
            raise ValueError(f"reward_weights {given!r}: must be NAME=PATH, with one of the rewards "
                             f"{', '.join(reward_kind(kind)[0] for kind in kinds)} as NAME")
        paths |= dict.fromkeys(named, path)
    for kind in (kind for _, kind in parts):
        reward_kind(kind)
    for kind in watched:
        try:
            reward_kind(kind)
        except ValueError as error:
            allowed = f"{', '.join(PIXELS)}, pixels (all but the last), judge"
            raise ValueError(f"watch {kind!r}: must be one of {allowed}; or a {error}") from None
    return parts, watched, paths


def check_rewards(cfg):
    """ValueError for what is wrong with the settings of rewards, before anything is loaded."""
    parts, watched, paths = read_mixture(cfg)
    kinds = [kind for _, kind in parts] + watched
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"rewards {', '.join(kinds)}: each must be named once")
    for kind in kinds:
        check_kind(kind, paths.get(kind), cfg.frames)
    if getattr(cfg, "official_hps", False) and ([kind for _, kind in parts] not in (["hpsv2"], ["hpsv2.1"]) or cfg.watch):
        raise ValueError("official_hps: checks hpsv2 or hpsv2.1 alone, without other rewards or watch")


def load_mixture(cfg, load):
    """
    The rewards that the settings name: an image reward by itself where it is the only one, else a Mixture.

    load(kind, weights) -> a reward. ValueError too if the videos, of cfg.frames frames, are shorter than one of them wants.
    """
    parts, watched, paths = read_mixture(cfg)
    rewards = [(weight, load(kind, paths.get(kind))) for weight, kind in parts]
    mixture = Mixture(rewards, [load(kind, paths.get(kind)) for kind in watched], pixel_names(cfg.watch))
    for reward in (*mixture.rewards, *mixture.watched):
        if reward.num_frames:
            spread_frames(cfg.frames, reward.num_frames)
    alone = mixture.is_plain and not watched and not mixture.pixels and not mixture.rewards[0].num_frames
    return mixture.rewards[0] if alone else mixture


def watched_names(cfg, reward):
    """The names under which logs have what the settings watch."""
    rewards = reward.watched if isinstance(reward, Mixture) else ()
    return [r.name for r in rewards] + measured_names(cfg.watch)
