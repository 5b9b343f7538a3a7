"""
The paper's metric, for the base and the fine-tuned model on the same prompts and the same noise.

    python evaluate.py --lora out/tiny/lora.safetensors
    python evaluate.py --base BASE --lora LORA --prompts animals=animals.txt --prompts others=b.txt

Paper: InstructVideo (arXiv:2312.12490), Sec. 3.3, Table 1 (D = 20) and Table A.1 (D = 50): the mean
reward of the first frame of every segment (frames 0, 4, 8, 12), without the weights of Eq. (7).
Videos come from pure noise, which train.py never starts from. Differences are paired, video by
video, which takes out most of the noise between videos.

A reward that rises can hide a video that got worse. In the tiny world an independent judge, which
nothing optimises, reports beside it.

Letters: n videos of a prompt set, F frames, S segments, H and W pixels.
"""
import support.threads  # noqa: F401  before torch is loaded
import itertools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro

import lora
from formats import vbench
from formats.known_rewards import requested_rewards
from formats.reward_model import frames_of
from generate import generate, load_model
from reward import as_rewards, first_frames, load_rewards
from sampler import ddpm_step
from support.clips import fit_prompts, read_prompt_sets, told_by
from support.files import check_exists, check_folder
from support.pictures import evaluation_bar, save_evaluation
from support.ranks import all_gather, join_ranks, rank_and_size, run_script
from support.run import EVAL_SEED
from support.settings import TINY, RewardSettings, check_at_least, clip_shape, rows_columns
from support.tables import add_judge, check_watched, paired, pixel_measures, summary, table_of

REPORT_SEED = 2_000_000  # not EVAL_SEED: what was chosen by some noise is measured on other


def prompt_sets(base, named_files, count):
    """
    {set: `count` prompts}: the files of NAME=FILE arguments, or the tiny base's own three sets.

    A set with fewer prompts than count repeats them, each time with other noise. Files are taken
    whole when count is 0. ValueError for a malformed argument.
    """
    sets = read_prompt_sets(named_files, base.world) or base.world.prompt_sets()
    chosen = {}
    for name, prompts in sets.items():
        prompts = fit_prompts(prompts, base)
        chosen[name] = [prompts[i % len(prompts)] for i in range(count or len(prompts))]
    return chosen


@torch.no_grad()
def evaluate(base, rewards, prompts, *, seed=EVAL_SEED, num_steps=20, guidance=None, segments=4,
             shape=(16, 32, 32), batch_size=8, judge=None, keep=0, move_on=None, write=None):
    """
    Measures of one video for each prompt: {measure: (n,)}, and the first `keep` videos.

    Video i has seed + i. "reward" is the mean over the first frame of each segment (Sec. 3.3);
    judge(clips (1, F, 3, H, W), [caption]) -> {measure: (1,)} adds its own. The ranks share the
    work and all return the whole. Videos: (keep, F, 3, H, W) in about [0, 1], or None for none.
    write(seed, video (F, 3, H, W)): called with every video. shape: (F, H, W).
    """
    rewards = as_rewards(rewards)
    in_order = rewards.pixels or any(getattr(r, "num_frames", None) for r in rewards.every)
    rank, world_size = rank_and_size()
    mine = list(range(rank, len(prompts), world_size))
    index = first_frames(shape[0], segments)[None]                            # (1, S)
    made = generate(base, [prompts[i] for i in mine], [seed + i for i in mine], num_steps,
                    guidance, *shape, batch_size, move_on)

    rows, videos = {}, {}
    for j, z_0 in made:
        i = mine[j]

        # Decode all frames only where somebody looks at them.
        decode_all = judge is not None or i < keep or in_order or write is not None
        video = base.decode_frames(z_0[None], None if decode_all else index)  # (1, F or S, 3, H, W)
        scored = video[:, index[0].to(video.device)] if decode_all else video  # (1, S, 3, H, W)

        rows[i] = measure(rewards, scored, video, [prompts[i]])
        if judge:
            rows[i] |= judge(video.clamp(0, 1), [prompts[i]])
        if i < keep:
            videos[i] = video[0].cpu()
        if write:
            write(seed + i, video[0])                                         # (F, 3, H, W)

    # Put together what the ranks have measured.
    for other_rows, other_videos in all_gather((rows, videos)):
        rows |= other_rows
        videos |= other_videos
    table = table_of([rows[i] for i in range(len(prompts))], list(map(told_by, prompts)))
    kept = [videos[i] for i in range(min(keep, len(prompts)))]
    return table, torch.stack(kept) if kept else None  # (n,) each; (keep, F, 3, H, W)


def measure(rewards, frames, video, captions):
    """
    One video's measures: {"reward": the weighted sum of the mean scores of frames (1, S, 3, H, W)};
    of several rewards also each one's, what watched ones say, and measures of pixels.

    video (1, F, 3, H, W): all of its frames, for video rewards and pixels.
    """
    scores = []
    for reward in rewards.every:
        wanted = frames_of(reward, video.shape[1])
        seen = video[:, list(wanted)] if wanted else frames  # a video reward sees its own
        scores.append(reward(seen, captions).mean().item())

    measures = {"reward": sum(weight * score for (weight, _), score in zip(rewards.summed, scores))}
    for k, (reward, score) in enumerate(zip(rewards.every, scores)):
        if len(rewards.summed) > 1 or k > 0:  # a single reward has its score already
            measures[reward.name] = score
    return measures | pixel_measures(video.clamp(0, 1), rewards.pixels)


@dataclass(frozen=True)
class Config(RewardSettings):
    """Compare a LoRA with its base."""
    lora: Path | None = None
    """the adapter; without one the base alone is evaluated"""
    prompts: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """NAME=FILE, repeatable: a file of prompts as generate.py --prompts reads it; default the tiny
    world's three sets"""
    count: int | None = None
    """videos of each set, default 64; 0 is one for each line of its file"""
    quick: bool = False
    """a first look: 8 videos of each set, with the first D and guidance alone"""
    num_steps: tuple[int, ...] = (20, 50)
    """D, DDIM steps (paper: 20 in Table 1, 50 in Table A.1)"""
    guidance: tuple[float, ...] = ()
    """classifier-free guidance scales; default the base's own. Several show what tuning gains over
    the base at its own best one"""
    lora_scale: tuple[float, ...] = (1.0,)
    """strength of the adapter; several show what the reward gains and what videos lose"""
    segments: int = 4
    """S: the first frame of each of S segments is scored (paper, Sec. 3.3)"""
    frames: int | None = None
    """frames of a video; default what the base was trained on, 16 (paper, Sec. 3.3)"""
    size: int | str | None = None
    """pixel rows and columns, 256 or 480x832; default what the base was trained on"""
    fps: int | None = None
    """frames a second, told to some networks and of --vbench's files; default the base's, else 8"""
    seed: int = REPORT_SEED
    """video i has seed + i, counted through all sets; training, which selects, has others"""
    batch_size: int = 8
    """videos at a time; changes time and memory, not the result"""
    official_hps: bool = False
    """score with the hpsv2 package itself as well, and report how far the two are apart"""
    sheet: int = 8
    """videos of each set on the contact sheet"""
    vbench: bool = False
    """also write each model's videos as VBench reads them (of the first D and guidance)"""
    per_prompt: int = 5
    """with --vbench: videos of each prompt, as VBench's suite wants (generate.py)"""
    out: Path = Path("out/evaluation")
    """folder of table.md, table.json and sheet.png"""
    overwrite: bool = False
    """replace the results that --out holds"""


def check(cfg):
    """ValueError for what can be known to be wrong before anything is loaded or written."""
    check_at_least(cfg, frames=1, batch_size=1, count=0, sheet=0, per_prompt=1, fps=1,
                   lora_scale=-math.inf, guidance=-math.inf)
    rows_columns(cfg.size)
    if not cfg.num_steps or not cfg.lora_scale:
        raise ValueError("num_steps, lora_scale: must have at least one value each")
    for steps in cfg.num_steps:
        ddpm_step(steps, steps)

    if cfg.frames:
        first_frames(cfg.frames, cfg.segments)  # refuses more segments than frames
    requested_rewards(cfg)
    if cfg.official_hps and (cfg.reward not in ((), ("hpsv2",), ("hpsv2.1",)) or cfg.watch):
        raise ValueError("official_hps: checks hpsv2 or hpsv2.1 alone, without others or watch")

    if cfg.quick and cfg.count is not None:
        raise ValueError("quick: takes 8 videos of each set; leave count or quick out")
    check_folder(cfg.out)
    if (cfg.out / "table.json").exists() and not cfg.overwrite:
        raise ValueError(f"out {cfg.out}: holds results; choose another folder, or --overwrite")
    sets = read_prompt_sets(cfg.prompts, cfg.base in TINY)
    if cfg.vbench:  # refuses prompts that name no file
        vbench.plan_files(sum(sets.values(), []), cfg.seed, cfg.per_prompt, cfg.out / "base")
    check_exists(cfg.lora)


def main(cfg):
    """Every set at every D and guidance, base first, then the same with the adapter."""
    check(cfg)
    device = join_ranks(cfg.device)
    if cfg.quick:
        cfg = replace(cfg, count=8, num_steps=cfg.num_steps[:1], guidance=cfg.guidance[:1])

    # 1. The base, the prompts and the reward. Scores are in float32 whatever the base's precision.
    base, adapted = load_model(cfg, device)
    base.fps = cfg.fps or getattr(base, "fps", 8)  # some networks are told it
    cfg = replace(cfg, fps=base.fps, frames=cfg.frames or base.default_frames)
    first_frames(cfg.frames, cfg.segments)  # refuses more segments than frames
    sets = prompt_sets(base, cfg.prompts, 64 if cfg.count is None else cfg.count)
    shape = clip_shape(base, cfg)                                             # (F, H, W)
    base.latent_shape(*shape)  # refuses a size that has no latents
    rewards = load_rewards(cfg, base.folder, device=device)

    # 2. The base is the tuned model with its adapters at strength 0.
    strengths = {"base": 0.}
    if adapted:
        lora.set_scale(base.network, 0.)
    for scale in cfg.lora_scale if adapted else ():
        name = "fine-tuned" if len(cfg.lora_scale) == 1 else f"scale {scale:g}"
        if scale or len(cfg.lora_scale) == 1:  # strength 0 among several is the base
            strengths[name] = scale

    # 3. Measure both.
    sets, writers = vbench.open_folders(cfg, sets, strengths)  # as they are without --vbench
    results, sheets = compare(cfg, base, rewards, sets, strengths, shape, writers)
    if rank_and_size()[0] == 0:
        official_gaps = []
        if cfg.official_hps:
            from formats.hps_package import official_distances
            index = first_frames(cfg.frames, cfg.segments)                    # (S,)
            official_gaps = official_distances(rewards.every[0], sheets, sets, index)
        save_evaluation(cfg, results, sheets, sets, list(strengths), rewards.name, official_gaps)
        vbench.finish(*writers.values())


def compare(cfg, base, rewards, sets, strengths, shape, writers):
    """The rows of the report, and {set: [videos of each model]} at the first setting."""
    judge = base.world and base.world.judge(base, *shape, sets)
    check_watched(cfg.watch, sets, judge)
    scales = cfg.guidance or (base.guidance,)
    settings = list(itertools.product(cfg.num_steps, scales))                 # (D, guidance)
    starts = itertools.accumulate(map(len, sets.values()), initial=cfg.seed)
    start = dict(zip(sets, starts))  # sets have noise of their own
    results, sheets = [], {}
    with evaluation_bar(sets, settings, strengths) as bar:
        for name, (steps, guidance), model_name in itertools.product(sets, settings, strengths):
            # Videos are shown and written at the first setting only.
            if len(strengths) > 1:
                lora.set_scale(base.network, strengths[model_name])
            shown, write = 0, None
            if (steps, guidance) == settings[0]:
                write = writers.get(model_name)
                shown = max(cfg.sheet, 1) if cfg.official_hps else cfg.sheet
            table, videos = evaluate(
                base, rewards, sets[name], seed=start[name], num_steps=steps, guidance=guidance,
                segments=cfg.segments, shape=shape, batch_size=cfg.batch_size,
                judge=judge, keep=shown, write=write,
                move_on=lambda done, steps=steps: bar.update(done * steps))
            if videos is not None:
                sheets.setdefault(name, []).append(videos)

            if model_name == "base":
                before = table
            add_judge(cfg.watch, table, before)
            row = {"set": name, "num_steps": steps, "guidance": guidance, "model": model_name,
                   "lora_scale": strengths[model_name], "measures": summary(table)}
            if model_name != "base":
                # Paired: the same prompt and noise. A prompt that repeats counts once.
                lines = [told_by(prompt) for prompt in sets[name]]
                row["differences"] = {k: paired(before, table, k, lines) for k in table}
            results.append(row)
            bar.set_postfix_str(f"{name} {table['reward'].mean():.4f}, {model_name}", refresh=False)
    return results, sheets


if __name__ == "__main__":
    run_script("evaluate.py", lambda: main(tyro.cli(Config, description=__doc__)))
