"""
The paper's metric, for the base and the fine-tuned model on the same prompts and the same noise.

    python evaluate.py --lora out/tiny/lora.safetensors
    python evaluate.py --base BASE --lora LORA --prompts animals=animals.txt --prompts others=others.txt

Paper: InstructVideo (arXiv:2312.12490), Sec. 4.2 and Table 1 (D = 20), Table A.1 (D = 50): the mean reward of the first frame
of every segment (frames 0, 4, 8, 12), without the weights of Eq. (7). Differences are paired, video by video.
In the tiny world an independent judge, which nothing optimises, reports next to the reward what the reward may hide.

Letters: n videos of a prompt set, F frames, S segments, H and W pixels.
"""
import itertools
import json
import platform
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import imageio.v3 as iio
import torch
import torch.distributed as dist
import torch.nn.functional as F_
import tyro
from tqdm import tqdm

import lora
from generate import check_folder, generate, latent_size, read_prompts
from model import decode_frames, join_ranks, load_base, pick_dtype, rank_and_size, run_script, write_whole
from reward import first_frames, load_reward, official_hps
from sampler import GUIDANCE, ddpm_step


def prompt_sets(base, named_files, count):
    """
    {set: prompts}: the files of NAME=FILE arguments, or the tiny world's three sets, `count` prompts of each.

    The tiny world's are drawn from all captions of a set in a fixed order; a set with fewer captions than count repeats
    them, and each repetition has other noise. Files are taken whole when count is 0. ValueError for a malformed argument.
    """
    sets = {}
    for argument in named_files:
        name, equals, path = argument.partition("=")
        if not (name and equals and path) or name in sets:
            raise ValueError(f"prompts {argument!r}: allowed is NAME=FILE, each name once")
        sets[name] = read_prompts(path)
    if not sets:
        if base.name != "tiny":
            raise ValueError("no prompts: allowed is --prompts NAME=FILE, once for each set (the tiny world has its own)")
        from tiny.world import scenes
        for name in ("in_domain", "new", "other"):
            captions = [s.caption for s in scenes(name)]
            order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
            sets[name] = [captions[i] for i in order]
    return {name: [p[i % len(p)] for i in range(count or len(p))] for name, p in sets.items()}


def find_judge(base, frames, height, width):
    """The tiny world's judge if this base has one beside it and makes clips of that world's size, else None."""
    if not base.folder or not (base.folder / "judge.safetensors").is_file() or (frames, height, width) != (16, 32, 32):
        return None
    from tiny.judge import judge_clips, load_judge
    judge = load_judge(base.folder / "judge.safetensors").to(base.device)
    return lambda clips, captions: judge_clips(judge, clips, captions)


@torch.no_grad()
def evaluate(base, reward, prompts, *, seed=0, num_steps=20, guidance=GUIDANCE, segments=4, frames=16, height=None, width=None,
             batch_size=8, judge=None, keep=0, bar=None):
    """
    Measures of one video for each prompt, from pure noise: {measure: (n,)}, and the first `keep` videos (keep, F, 3, H, W).

    Video i has seed + i. "reward" is the mean over the first frame of each segment; `judge` adds its own measures. The
    ranks share the work and all return the whole table; kept videos are complete on rank 0 alone.
    """
    rank, size = rank_and_size()
    mine = list(range(rank, len(prompts), size))
    kept = [i for i in mine if i < keep]
    index = first_frames(frames, segments)[None]                                          # (1, S)
    rows, videos = {}, {}
    made = generate(base, [prompts[i] for i in mine], [seed + i for i in mine], num_steps, guidance, frames,
                    height or base.default_size, width or base.default_size, batch_size, bar)
    for j, z_0 in made:
        i, z_0 = mine[j], z_0[None]                                                       # (1, C, F, h, w)
        whole = judge is not None or i in kept
        video = decode_frames(base.vae, z_0, None if whole else index)                    # (1, F or S, 3, H, W)
        shown = video[:, index[0].to(video.device)] if whole else video
        rows[i] = {"reward": reward(shown, [prompts[i]]).mean().item()}
        if judge:
            rows[i] |= {k: v.item() for k, v in judge(video.clamp(0, 1), [prompts[i]]).items()}
        if i in kept:
            videos[i] = video[0].cpu()
    if size > 1:
        parts = [None] * size
        dist.all_gather_object(parts, (rows, videos))
        rows = {i: row for part, _ in parts for i, row in part.items()}
        videos = {i: video for _, part in parts for i, video in part.items()}
    table = {k: torch.tensor([rows[i][k] for i in range(len(prompts))], dtype=torch.float64) for k in rows[0]}
    return table, torch.stack([videos[i] for i in range(min(keep, len(prompts)))]) if keep else None


def summary(table):
    """What metrics.jsonl keeps of a table: reward_mean, reward_std, n, and the mean of every other measure."""
    reward = table["reward"]
    out = {"reward_mean": reward.mean().item(), "reward_std": reward.std(correction=len(reward) > 1).item(), "n": len(reward)}
    return out | {k: v.mean().item() for k, v in table.items() if k != "reward"}


def paired(before, after, measure="reward"):
    """Mean of the difference and its standard error over the same prompts and noise; the error is 0 for a single one."""
    d = after[measure] - before[measure]
    return d.mean().item(), (d.std().item() / len(d) ** .5 if len(d) > 1 else 0.)


def strip(video, segments=4, zoom=None):
    """The middle frame of each segment of a video side by side, enlarged if small: (F, 3, H, W) -> (3, H', W')."""
    F = len(video)
    picked = video[[(2 * i + 1) * F // (2 * segments) for i in range(segments)]]
    zoom = zoom or max(1, 96 // picked.shape[-1])
    picked = picked.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    return torch.cat(list(F_.pad(picked, (0, 2, 0, 2), value=1.)), dim=-1)  # a white line between frames


def contact_sheet(columns, captions, titles):
    """
    Strips in a grid with words on it: columns [k] of videos (n, F, 3, H, W), captions [n], titles [k] -> uint8 (H', W', 3).
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    strips = [[strip(v.clamp(0, 1)) for v in column] for column in columns]
    h, w = strips[0][0].shape[1:]
    font, line = ImageFont.load_default(15), 22
    sheet = Image.new("RGB", (len(columns) * (w + 14), line + len(captions) * (h + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        draw.text((x * (w + 14) + 2, 2), title, fill="black", font=font)
        for y, picture in enumerate(strips[x]):
            top = line + y * (h + line)
            pixels = Image.fromarray(picture.mul(255).round().byte().permute(1, 2, 0).numpy())
            sheet.paste(pixels, (x * (w + 14), top))
            if x == 0:
                draw.text((2, top + h), captions[y], fill="#444444", font=font)
    return np.asarray(sheet)


def write_png(path, pixels):
    """Save (H, W, 3) uint8, whole or not at all."""
    with write_whole(path) as hidden:
        iio.imwrite(hidden, pixels, extension=".png")


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    """Compare a LoRA with its base."""
    lora: Path | None = None
    """the adapter; without one the base alone is evaluated"""
    base: str = "tiny"
    """the text-to-video model: tiny, a folder, a file, a hub id, or random"""
    vae: str | None = None
    """another autoencoder than the base's"""
    text_encoder: str | None = None
    """another text encoder than the base's"""
    reward: str = "hpsv2"
    """hpsv2 (v2.0, the paper's) or hpsv2.1; their scores do not compare. A tiny base has its own"""
    reward_weights: str | None = None
    """the reward's weights; default the base's own, else the hub's"""
    prompts: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """NAME=FILE, repeatable: a file of one prompt a line or in the official list form; default the tiny world's three sets"""
    count: int = 64
    """videos of each set; 0 is one for each line of its file"""
    num_steps: tuple[int, ...] = (20, 50)
    """D, DDIM steps (paper: 20 in Table 1, 50 in Table A.1)"""
    guidance: tuple[float, ...] = (GUIDANCE,)
    """classifier-free guidance scales; several show what tuning gains over the base at its own best one"""
    lora_scale: float = 1.0
    """strength of the adapter"""
    segments: int = 4
    """S: the first frame of each of S segments is scored (paper, Sec. 4.2)"""
    frames: int = 16
    """frames of a video (paper, Sec. 4.1)"""
    height: int | None = None
    """pixels; default what the base was trained on"""
    width: int | None = None
    """pixels; default what the base was trained on"""
    seed: int = 1_000_000
    """video i has seed + i; training evaluates with the same seeds, and no clip is drawn from them"""
    batch_size: int = 8
    """videos at a time; changes time and memory, not the result"""
    official_hps: bool = False
    """score with the hpsv2 package itself as well, and report how far the two are apart"""
    sheet: int = 8
    """videos of each set on the contact sheet"""
    out: Path = Path("out/evaluation")
    """folder of table.md, table.json and sheet.png; those are replaced"""
    device: str | None = None
    """cuda, mps or cpu; default the first of these that is there"""
    dtype: str | None = None
    """float32, bfloat16 or float16 of the frozen weights; default bfloat16 on cuda, else float32"""


def check(cfg):
    """All that can be known before anything is loaded or written."""
    for name in ("frames", "height", "width", "batch_size"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise ValueError(f"{name} = {getattr(cfg, name)}: allowed is 1 and above")
    for name in ("count", "sheet"):
        if getattr(cfg, name) < 0:
            raise ValueError(f"{name} = {getattr(cfg, name)}: allowed is 0 and above")
    if not cfg.num_steps or not cfg.guidance:
        raise ValueError("num_steps and guidance: allowed is one value or more")
    for steps in cfg.num_steps:
        ddpm_step(steps, steps)
    for scale in (*cfg.guidance, cfg.lora_scale):
        if not abs(scale) < float("inf"):
            raise ValueError(f"guidance and lora_scale: found {scale}, allowed is any finite number")
    first_frames(cfg.frames, cfg.segments)
    check_folder(cfg.out)


def versions():
    """What the numbers depend on beside the command: for table.json and the studies."""
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}


def as_markdown(results, reward_name):
    """The rows of table.json as a table: one line a set, D, guidance and model, differences against the base of that line."""
    measures = [k for k in results[0]["measures"] if k not in ("reward_mean", "reward_std", "n")]
    head = ["set", "D", "guidance", "model", "n", f"{reward_name} mean ± std", "paired difference", *measures]
    rows = [head]
    for row in results:
        m = row["measures"]
        difference = "{:+.4f} ± {:.4f}".format(*row["difference"]) if "difference" in row else ""
        cells = [row["set"], row["num_steps"], f"{row['guidance']:g}", row["model"], m["n"],
                 f"{m['reward_mean']:.4f} ± {m['reward_std']:.4f}", difference, *(f"{m[k]:.3f}" for k in measures)]
        rows.append([str(c) for c in cells])
    widths = [max(map(len, column)) for column in zip(*rows)]  # aligned, as it is read on the terminal too
    rows.insert(1, ["-" * w for w in widths])
    return "".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |\n" for row in rows)


def main(cfg):
    """Every set at every D and guidance, base first, then the same with the adapter."""
    device = join_ranks(cfg.device)
    check(cfg)
    rank, size = rank_and_size()
    base = load_base(cfg.base, cfg.vae, cfg.text_encoder, pick_dtype(cfg.dtype, device), device)
    sets = prompt_sets(base, cfg.prompts, cfg.count)
    height, width = cfg.height or base.default_size, cfg.width or base.default_size
    latent_size(base, height, width)
    reward = load_reward(cfg.reward, cfg.reward_weights, base.folder, device=device)
    second = None
    if cfg.official_hps:  # a CLIP of another kind has its own words
        second = official_hps(reward.clip, reward.clip_config, reward.tokenizer if reward.clip_config else None)
    judge = None if cfg.prompts else find_judge(base, cfg.frames, height, width)  # it knows that world's captions only
    scales = {"base": 0.}
    if lora.load_beside(base.unet, base.unet_file) or cfg.lora:
        if cfg.lora:
            lora.load(base.unet, cfg.lora)
        scales["fine-tuned"] = cfg.lora_scale

    results, sheets, apart = [], {}, []
    mine = sum(len(prompts[rank::size]) for prompts in sets.values())
    settings = [(steps, guidance) for steps in cfg.num_steps for guidance in cfg.guidance]
    with tqdm(total=mine * len(settings) * len(scales), unit="video", disable=rank > 0) as bar:
        for name, (steps, guidance), model in itertools.product(sets, settings, scales):
            first = (steps, guidance) == settings[0]  # whose videos are shown
            if len(scales) > 1:
                lora.set_scale(base.unet, scales[model])
            table, videos = evaluate(
                base, reward, sets[name], seed=cfg.seed, num_steps=steps, guidance=guidance, segments=cfg.segments,
                frames=cfg.frames, height=height, width=width, batch_size=cfg.batch_size, judge=judge,
                keep=max(cfg.sheet, cfg.official_hps) if first else 0, bar=bar.update)
            if videos is not None and rank == 0:
                sheets.setdefault(name, []).append(videos)
                if second:
                    apart += [official_distance(second, reward, v, p, cfg) for v, p in zip(videos, sets[name])]
            row = {"set": name, "num_steps": steps, "guidance": guidance, "model": model, "measures": summary(table)}
            if model == "base":
                before = table
            else:
                row["difference"] = paired(before, table)
                row["differences"] = {k: paired(before, table, k) for k in table}
            results.append(row)
    if rank == 0:
        save_report(cfg, results, sheets, sets, list(scales), reward.name, apart)


def official_distance(second, reward, video, prompt, cfg):
    """How far our score of a video's first frames, as 8-bit pictures, is from the hpsv2 package's own."""
    shown = video[first_frames(cfg.frames, cfg.segments)].clamp(0, 1).mul(255).round().byte()        # (S, 3, H, W)
    ours = reward(shown[None].to(reward.clip.logit_scale.device) / 255, [prompt])[0].cpu()
    return (ours - torch.tensor(second(shown, prompt))).abs().max().item()


def save_report(cfg, results, sheets, sets, models, reward_name, apart):
    """table.json, table.md and sheet.png, and the table on the terminal."""
    cfg.out.mkdir(parents=True, exist_ok=True)
    report = {"command": shlex.join(["python", "evaluate.py", *sys.argv[1:]]), "reward": reward_name, "seed": cfg.seed,
              "versions": versions(), "results": results}
    table = as_markdown(results, reward_name)
    if apart:
        report["official_hps_distance"] = max(apart)
        table += f"\nThe hpsv2 package's own scores differ by at most {max(apart):.1e} on {len(apart)} videos.\n"
    for name, text in (("table.json", json.dumps(report, indent=1) + "\n"), ("table.md", table)):
        with write_whole(cfg.out / name) as hidden:
            hidden.write_text(text)
    if cfg.sheet:
        columns = [torch.cat([sheets[name][k] for name in sheets]) for k in range(len(models))]
        captions = [p for name in sheets for p in sets[name][:cfg.sheet]]
        write_png(cfg.out / "sheet.png", contact_sheet(columns, captions, models))
    print(table)
    print(f"written: {cfg.out}/table.md, table.json" + (", sheet.png" if cfg.sheet else ""))


if __name__ == "__main__":
    run_script("evaluate.py", lambda: main(tyro.cli(Config, description=__doc__)))
