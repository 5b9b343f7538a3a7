"""
What methods share that learn from prompts: settings, what a video starts from, the stochastic chain, and rounds.

A video's noise comes from a generator of its own, seeded by what the video is, so that it is the same on any number of ranks and
after a run was continued.

Letters: B videos, C channels, F frames, S scored frames, h and w latent rows and columns, N text tokens, E their width.
"""
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

import torch
from safetensors.torch import load_file, save_file
from tyro.conf import Fixed, Suppress

import train
from data import batch_indices
from reward import segment_frames
from sampler import guided, sample, step as chain_step
from support import ranks
from support.clips import fit_prompts, read_prompts, told_by
from support.files import read_json, write_text, write_whole
from support.ranks import is_main_process, on_rank_0, rank_and_size, sample_generator
from support.run import read_metrics
from support.settings import TINY, chain_levels, check_at_least, clip_shape

# ----------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class NoiseConfig(train.Config):
    """train.py's settings for a method whose videos start from noise: there is no edit ratio."""
    prompts_train: Path | None = None
    """prompts to train on, a file as generate.py --prompts reads it; default the tiny world's in_domain captions"""
    tau: Suppress[Fixed[float]] = 1.0


@dataclass(frozen=True)
class PromptConfig(NoiseConfig):
    """The same for a method that has prompts only: none of the settings of clips can be set."""
    offset_noise: Suppress[Fixed[float]] = 0.0
    data: Suppress[Fixed[Path | None]] = None
    data_root: Suppress[Fixed[Path | None]] = None
    max_skip: Suppress[Fixed[float]] = 0.1
    workers: Suppress[Fixed[int]] = 2
    cache: Suppress[Fixed[bool]] = True
    cache_dir: Suppress[Fixed[Path]] = Path("cache")


@dataclass(frozen=True)
class NoChainGradient:
    """Mixed in by a method without gradient through a chain, or through the reward."""
    grad_steps: Suppress[Fixed[int]] = 1
    anchor: Suppress[Fixed[float]] = 0.0
    cache_interval: Suppress[Fixed[int]] = 1


@dataclass(frozen=True)
class RoundConfig(NoChainGradient, PromptConfig):
    """The same for a method whose rounds are sampled for a few optimizer steps, which learn at several levels of the chain."""
    updates: int = 2
    """optimizer steps that learn from one round of videos (kvablack/ddpo-pytorch: 2 to 4)"""
    clips_at_once: int = 8
    """videos that are sampled, or pairs of a video and a chain step learned from, at once"""


def presets(config_class, **full_size):
    """The tiny world's settings, and train.py's at full size with a method's own in their place."""
    hints, made = get_type_hints(config_class, include_extras=True), {}
    for preset, cfg in train.PRESETS.items():
        changed = {name: value for name, value in vars(cfg).items()  # what a method fixes stays
                   if value != getattr(train.Config(), name) and "Fixed" not in str(hints[name])}
        made[preset] = config_class(**changed | ({} if preset in TINY else full_size))
    return made


def check(cfg):
    """ValueError for what can be known to be wrong with such settings before anything is loaded."""
    train.check(cfg, needs_clips=False)
    if cfg.prompts_train is not None:
        read_prompts(cfg.prompts_train)
    elif cfg.base not in TINY and cfg.data is None:
        raise ValueError("no prompts to train on: --prompts-train FILE must name some (only the tiny world has its own)")


def check_multiple(cfg, divisor, what, *names):
    """ValueError unless every named setting is a multiple of `divisor`, which is called `what`."""
    for name in names:
        value = getattr(cfg, name)
        if value % divisor:
            raise ValueError(f"{name} = {value}: must be a multiple of {divisor}, {what}")


# ----------------------------------------------------------------------------------------------
# What videos start from

@dataclass
class Videos:
    """The prompts of a run, and what the videos of a batch start from."""
    cfg: train.Config
    base: object                                                    # of bases/
    pick_frames: Callable                                           # generator -> (S,), scored
    prompts: list

    @property
    def description(self):
        """What the prompts are, in a few words: a run that is continued must have the same."""
        digest = hashlib.sha256("\n".join(map(told_by, self.prompts)).encode()).hexdigest()[:16]
        return f"{len(self.prompts)} prompts, sha256 {digest}"

    def share(self, step, count, group=1):
        """This rank's part of `count` videos: [(position in the whole, index of its prompt)], the same for `group` in a row."""
        chosen = batch_indices(step, count // group, len(self.prompts), self.cfg.seed)
        rank, world_size = rank_and_size()
        size = count // world_size
        return [(p, chosen[p // group][1]) for p in range(rank * size, (rank + 1) * size)]

    def start(self, share, *key):
        """noise (B, C, F, h, w), text (B, N, E), g (B, S), captions [B] and keys [B] of a share. key: with a video's position it
        seeds the generator of its noise and frames; keys are for generators of what else a video draws."""
        cfg, base = self.cfg, self.base
        shape = base.latent_shape(*clip_shape(base, cfg))                     # (C, f, h, w)
        parts = getattr(base, "parts", 1)
        generators = [sample_generator(*key, position) for position, _ in share]
        noise = torch.stack([ranks.start_noise(shape, generator, parts) for generator in generators])
        g = torch.stack([self.pick_frames(generator) for generator in generators])
        captions = [self.prompts[index] for _, index in share]
        keys = [(*key, position, "chain") for position, _ in share]
        return noise.to(base.device), base.encode_text(captions), g.to(base.device), captions, keys

    def batch(self, step):
        """The same for this rank's share of a step's batch."""
        return self.start(self.share(step, self.cfg.batch_size), self.cfg.seed, step)


def read_videos(cfg, base, pick_frames=None):
    """The Videos of --prompts-train, or of the tiny world's in_domain captions. pick_frames(generator) -> (S,), the frames to
    score; default one of each segment (SegVR)."""
    pick_frames = pick_frames or (lambda generator: segment_frames(cfg.frames, cfg.segments, 1, generator)[0])
    prompts = read_prompts(cfg.prompts_train) if cfg.prompts_train else base.world.prompt_sets()["in_domain"]
    base.latent_shape(*clip_shape(base, cfg))  # refuses a size that has no latents
    prompts = fit_prompts(prompts, base)
    for start in range(0, len(prompts), 64):  # now, as the text encoder may leave the accelerator
        base.encode_text(prompts[start:start + 64])
    return Videos(cfg, base, pick_frames, prompts)


# ----------------------------------------------------------------------------------------------
# The stochastic chain, and the denoiser's loss

def fresh_noise(z, generators, num_steps):
    """New noise (num_steps, B, ...) for z (B, ...), from a generator for each video. It is copied at once, as each copy waits."""
    noise = [torch.randn(z.shape[1:], generator=generator) for _ in range(num_steps) for generator in generators]
    return torch.stack(noise).view(num_steps, *z.shape).to(z)


def policy(base, z_t, i, text, uncond, cfg):
    """Mean and std of chain step i, p(z_prev | z_t), with eta = 1; without guidance where uncond is None."""
    levels, guidance = chain_levels(base, cfg), 1. if uncond is None else cfg.guidance
    z_0, eps = guided(base.predict, z_t, levels, i, text, uncond, guidance)
    return chain_step(z_0, eps, levels, i, eta=1.)


@torch.no_grad()
def sample_path(base, noise, text, uncond, keys, cfg):
    """The chain of each video from noise (B, C, F, h, w): [z_T, ..., z_0], D + 1 of them, and D (mean, std)."""
    fresh = fresh_noise(noise, [sample_generator(*key) for key in keys], cfg.num_steps)   # (D, B, C, F, h, w)
    path, steps = [chain_levels(base, cfg).start * noise], []
    for i in range(cfg.num_steps, 0, -1):
        mean, std = policy(base, path[-1], i, text, uncond, cfg)
        path.append(mean + std * fresh[cfg.num_steps - i])                    # (B, C, F, h, w)
        steps.append((mean, std))
    return path, steps


def denoising_errors(base, z, eps, u, text):
    """The base's own loss for each video (Eq. (1) of InstructVideo): z (B, C, F, h, w) -> (B,)."""
    t, alpha, sigma = [v.to(z.device) for v in base.level(u)]                 # (B,), ...
    z_t = alpha * z + sigma * eps                                             # Eq. (5)
    z_0, guess = base.predict(z_t, (t, alpha, sigma), text)                   # (B, C, F, h, w)
    return base.error(z_0, guess, z, eps, (t, alpha, sigma))                  # (B,)


# ----------------------------------------------------------------------------------------------
# Rounds: many videos are sampled at once, and learned from for several steps. RWR's and DPO's serve
# many steps, so checkpoints lie within them, and their videos in the run folder. DDPO's and NFT's
# end before the next checkpoint: they stay in memory, chains and all.

def check_rounds(cfg, name):
    """ValueError unless the rounds divide the steps, and the ranks cfg.<name>, a round's videos."""
    check_at_least(cfg, rounds=1, **{name: 1})
    check_multiple(cfg, cfg.rounds, "the rounds", "steps")
    check_multiple(cfg, rank_and_size()[1], "the ranks", name)
    if cfg.resume and cfg.rounds > 1 and read_json(cfg.resume / "config.json")["steps"] != cfg.steps:
        raise ValueError(f"steps = {cfg.steps}: a run of several rounds keeps its steps, since they end its rounds")


@torch.no_grad()
def sample_scored(base, rewards, videos, part, cfg, *key):
    """Videos of a part of a share, from what videos.start gives: {z: (B, C, F, h, w), R: (B,), reward: (B,)}."""
    noise, text, g, captions, _ = videos.start(part, *key)
    z = sample(base.predict, noise, text, base.unconditional(text), chain_levels(base, cfg), cfg.guidance)
    R, logged = train.video_rewards(base, rewards, z, g, captions, cfg)
    return {"z": z, "R": R, "reward": logged["reward"]}


@dataclass
class Rounds:
    """The videos of one round after another, in memory and in the run folder, since a run that is continued within a round must
    learn from the same videos though its adapters have moved on. A round is `size` videos or pairs over all ranks, whose shares
    follow each other. make(part, round) -> {name: (b, ...)} of a part of a share of videos.share, `at_once` videos or fewer."""
    cfg: train.Config
    folder: Path
    videos: Videos
    make: Callable
    size: int
    at_once: int
    loaded: int | None = None  # the round that is in memory
    tensors: dict = field(default_factory=dict)

    def of(self, step):
        """{name: (n, ...)} on the CPU, of the round that a step belongs to; "prompt" has the indices of their prompts."""
        wanted = step * self.cfg.rounds // self.cfg.steps
        if wanted != self.loaded:
            path = self.folder / f"round_{wanted:03d}.safetensors"
            if not on_rank_0(path.is_file):
                self.write(path, wanted)
            self.tensors = on_rank_0(lambda: load_file(path))
            self.loaded = wanted
        return self.tensors

    def rows(self, step):
        """This rank's share of a step's batch as [(position, row)], those rows {name: (B, ...)}, and their text (B, N, E)."""
        share = batch_indices(step, self.cfg.batch_size, self.size, self.cfg.seed, *rank_and_size())
        chosen = [row for _, row in share]
        rows = {name: tensor[chosen] for name, tensor in self.of(step).items()}
        prompts = [self.videos.prompts[index] for index in rows["prompt"].tolist()]
        return share, rows, self.videos.base.encode_text(prompts)

    def write(self, path, round_number):
        """Make a round, every rank its share. A signal ends the work on it (KeyboardInterrupt)."""
        parts, share = [], self.videos.share(round_number, self.size)
        with ranks.progress(None, f"sampling round {round_number}", self.size, unit="videos", shared=True) as bar:
            for start in range(0, len(share), self.at_once):
                part = share[start:start + self.at_once]
                made = self.make(part, round_number) | {"prompt": torch.tensor([index for _, index in part])}
                parts.append({name: tensor.cpu() for name, tensor in made.items()})
                bar.update(len(part))
                ranks.stop_alone()
        parts, whole = sum(ranks.all_gather(parts), []), {}
        if is_main_process():
            for name in parts[0]:
                whole[name] = torch.cat([part[name] for part in parts])       # (n, ...)
            with write_whole(path) as hidden:
                save_file(whole, hidden)


def earlier_rewards(folder, step, prompts, rewards, known):
    """{prompt: its rewards before this step}, and after that add those of the round that begins with it: rewards [n] of prompts
    [n]. They are in `known`, {prompt: rewards}, empty at first, and in the run folder's rewards.jsonl, for a continued run."""
    path = folder / "rewards.jsonl"
    if not known:
        lines = on_rank_0(lambda: [line for line in read_metrics(path) if line["step"] < step])
        if is_main_process():  # a killed run's later ones go
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        for line in lines:
            for prompt, reward in zip(line["prompts"], line["rewards"]):
                known.setdefault(prompt, []).append(reward)
    earlier = {prompt: list(known.get(prompt, ())) for prompt in set(prompts)}
    for prompt, reward in zip(prompts, rewards):
        known.setdefault(prompt, []).append(reward)
    if is_main_process():
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "prompts": prompts, "rewards": rewards}) + "\n")
    return earlier


def check_updates(cfg, *above_zero, group=1, **least):
    """ValueError for what can be known to be wrong with the settings of such a method; its own as check_at_least takes them."""
    check(cfg)
    check_at_least(cfg, "timestep_fraction", *above_zero, updates=1, group=group, **least)
    if cfg.timestep_fraction > 1:
        raise ValueError(f"timestep_fraction = {cfg.timestep_fraction}: must be at most 1")
    check_multiple(cfg, cfg.group, "group", "batch_size")
    check_multiple(cfg, cfg.updates, "the updates of a round", "steps", "save_every", "eval_every")


@torch.no_grad()
def sample_round(sample_videos, compare, base, rewards, videos, step, cfg):
    """The batches of a round, which begins with this step: for each update (z_0 and more, reward, captions, keys, A).
    sample_videos(noise, text, keys) -> z_0 (B, C, F, h, w) and more (B, ...) of this rank's; reward (B,), captions and keys [B].
    compare(R, prompts) -> A (n,): how good each of all n videos of the round is, over all ranks; of these, (B,) are a batch's."""
    sampled, scored = [], []
    for k in ranks.progress(range(step, step + cfg.updates), "sampling"):
        whole = videos.start(videos.share(k, cfg.batch_size, cfg.group), cfg.seed, k)
        parts = []  # as learning takes them: they fit into memory, and 16 bits round them alike
        for noise, text, g, captions, keys in train.split_batch(whole, cfg.clips_at_once):
            z_0, *more = sample_videos(noise, text, keys)
            R, logged = train.video_rewards(base, rewards, z_0, g, captions, cfg)
            parts.append((z_0, *more, logged["reward"], R))
        *tensors, R = [torch.cat(of_parts) for of_parts in zip(*parts)]
        sampled.append((*tensors, *whole[3:]))
        scored.append((list(map(told_by, whole[3])), R.tolist()))

    in_order = [both for of_step in zip(*ranks.all_gather(scored)) for both in of_step]  # the same on any number of ranks
    prompts, R = [sum(lists, []) for lists in zip(*in_order)]
    rank, world_size = rank_and_size()
    A = compare(torch.tensor(R), prompts).view(cfg.updates, world_size, -1)[:, rank].to(base.device)
    return [(*batch, A[k]) for k, batch in enumerate(sampled)]


def chain_steps(cfg, step, last):
    """Chain steps that an update learns from, of D..D - last + 1: random ones, the same for all of its videos."""
    count = max(1, round(cfg.timestep_fraction * last))
    generator = sample_generator(cfg.seed, step, "timesteps")
    at = last - 1 - torch.randperm(last, generator=generator)[:count]         # 0 is the first step
    return (cfg.num_steps - at).tolist()
