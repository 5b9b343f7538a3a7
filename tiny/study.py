"""
The paper's studies in the tiny world: a few training runs each, compared from pure noise on held-out prompts.

    python tiny/study.py headline            # eight training seeds with the defaults, all three prompt sets
    python tiny/study.py tau                 # likewise: chain, short_chain, deep_cache, guidance, lambda, segments, grad_steps,
                                             # rank, quality, too_long
    python tiny/study.py methods             # every method of both papers, in several sittings (docs/methods.md)
    python tiny/study.py rewards             # an action, a removal, and mixes with HPS (docs/rewards.md)
    python tiny/study.py guard               # does the guard keep what the judge likes best (docs/runs.md)
    python tiny/study.py evolution           # the same videos at several steps of the default run (paper, Fig. 8), and the GIF
    python tiny/study.py report              # the READMEs' tables and pictures, from tiny/studies/*.json

Every result is a file tiny/studies/NAME.json with command, seeds and versions inside. Sweeps have one training seed (short_chain
and deep_cache three): they show trends, not that one value is better than its neighbour; the headline has the spread over seeds.
"""
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import imageio.v3 as iio
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lora  # noqa: E402
import train  # noqa: E402
from evaluate import REPORT_SEED  # noqa: E402
from model import load_base  # noqa: E402
from reward import load_reward  # noqa: E402
from support.files import read_json, write_whole  # noqa: E402
from support.pictures import versions, write_comparison_gif, write_png  # noqa: E402
from support.ranks import sample_generator  # noqa: E402
from support.run import MOVING, SHOWN  # noqa: E402
from support.settings import to_json  # noqa: E402
from support.tables import number, summary  # noqa: E402
from support.videos import to_pixels, write_video  # noqa: E402
from tiny import world  # noqa: E402
from tiny.clips import tiny_clips  # noqa: E402
from tiny.lab import ROOT, SETS, Lab, Settings, differences  # noqa: E402
from tiny.study_guard import guard  # noqa: E402
from tiny.study_methods import methods  # noqa: E402
from tiny.study_report import write_report  # noqa: E402
from tiny.study_rewards import rewards  # noqa: E402

SEEDS, RIVAL_SEEDS = tuple(range(8)), (0, 1, 2)  # of the headline, and against the base at its own best guidance
TAUS, GUIDANCES = (0.1, 0.3, 0.6, 0.9, 1.0), (1., 1.5, 2., 3.)
CHAINS, MADE_WITH = (5, 10, 20, 50), (20, 50)  # D in training, and of the videos that are measured
INTERVALS = (1, 2, 3)  # N of DeepCache
TOO_LONG = ("--steps", "200", "--lr", "0.01")
WATCH = {"too_long": ("--eval-every", "40", "--eval-count", "16"), "evolution": ("--eval-every", "10", "--eval-count", "4")}
SWEEPS = {  # name: {label: training flags}, all else as by default
    "lambda": {f"lambda = {v}": ["--lambda-tar", str(v)] for v in (0., 0.5, 1., 2.)},
    "segments": {"SegVR, S = 4": ["--segments", "4"], "dense, S = 16": ["--segments", "16"]},
    "grad_steps": {f"K = {k}": ["--grad-steps", str(k)] for k in (1, 2)},
    "rank": {f"rank {r}": ["--rank", str(r)] for r in (1, 4, 16)},
}


# ---------------------------------------------------------------------------------------------------------------------
# The studies: Lab -> rows

def headline(lab):
    """Eight training seeds on three sets; pooled rows average the seeds video by video before they are compared."""
    runs = [lab.tune("--seed", str(s)) for s in SEEDS]
    rows = []
    for name in SETS:
        rows.append(lab.row("base", None, name))
        rows += [lab.row(f"seed {s}", run, name) for s, run in zip(SEEDS, runs)]
    return rows + [lab.seeds_row("all seeds", runs, names) for names in (*((name,) for name in SETS), SETS)]


def chain(lab):
    """D = 50 after tuning with D = 20 (paper, Table A.1)."""
    return [lab.row("base", None, num_steps=50), lab.row("tuned with D = 20", lab.tune(), num_steps=50)]


def short_chain(lab):
    """Tuned with other D than videos are made with, at equal steps and in equal time (paper, Appendix G), over three seeds."""
    tiny, rows = train.PRESETS["tiny"], [lab.row("base", None, num_steps=made_with) for made_with in MADE_WITH]
    for D, steps in zip(CHAINS, equal_time(lab, "short_chain", [replace(tiny, num_steps=D) for D in CHAINS])):
        totals = {f"tuned with D = {D}": tiny.steps}
        if D != tiny.num_steps:
            totals[f"tuned with D = {D}, equal time"] = steps
        for label, total in totals.items():
            runs = [lab.tune("--num-steps", str(D), "--steps", str(total), "--seed", str(s)) for s in RIVAL_SEEDS]
            rows += [lab.seeds_row(f"{label}: {total} steps", runs, num_steps=made_with) for made_with in MADE_WITH]
    return rows


def deep_cache(lab):
    """Chain steps without gradient that share what the UNet makes below its outermost level (DeepCache), over three seeds."""
    seconds = step_seconds([replace(train.PRESETS["tiny"], cache_interval=N) for N in INTERVALS], repeats=10)
    rows = [lab.row("base", None)]
    for N, needed in zip(INTERVALS, seconds):
        runs = [lab.tune("--cache-interval", str(N), "--seed", str(s)) for s in RIVAL_SEEDS]
        rows.append(lab.seeds_row(f"N = {N}, {needed / seconds[0]:.0%} of the time", runs))
    return rows


def tau(lab):
    """Edit ratios at equal steps, and with as many steps as the default's time allows."""
    tiny, rows = train.PRESETS["tiny"], [lab.row("base", None)]
    for t, steps in zip(TAUS, equal_time(lab, "tau", [replace(tiny, tau=t) for t in TAUS])):
        rows.append(lab.row(f"tau = {t}", lab.tune("--tau", str(t))))
        if t != tiny.tau:
            rows.append(lab.row(f"tau = {t}, equal time: {steps} steps", lab.tune("--tau", str(t), "--steps", str(steps))))
    return rows


def equal_time(lab, name, configs):
    """How many steps with each of these settings take as long as the default's, which is one of them; timed once, and kept."""
    file = lab.cfg.work / f"{name}-equal-time.json"
    if not file.exists():
        tiny, seconds = train.PRESETS["tiny"], step_seconds(configs)
        default = seconds[configs.index(tiny)]
        with write_whole(file) as hidden:
            hidden.write_text(json.dumps({"steps": [round(tiny.steps * default / needed) for needed in seconds]}) + "\n")
    return read_json(file)["steps"]


def step_seconds(configs, repeats=4):
    """What the gradient of a step takes with each of these settings: in turn, as machines are busy; the fastest of each."""
    base = load_base("tiny")
    reward, uncond = load_reward(base_folder=base.folder), base.encode_text([""])
    lora.inject(base.unet, configs[0].rank, generator=sample_generator(0, "lora"))
    dataset, found = tiny_clips(base, torch.float32, count=8), [math.inf] * len(configs)
    for step in range(repeats):
        for i, cfg in enumerate(configs):
            cfg = replace(cfg, guidance=base.guidance)
            batch = train.draw_batch(dataset, step, cfg, base.vae.config.scale, base.device)
            started = time.perf_counter()
            train.edit_rewards(base, reward, uncond, batch, cfg)[0].sum().backward()
            found[i] = min(found[i], time.perf_counter() - started)
    return found


def sweep(name):
    """A study of one setting at equal steps; dense frames and K = 2 take more time for each."""
    def study(lab):
        rows = [lab.row("base", None)]
        return rows + [lab.row(label, lab.tune(*flags)) for label, flags in SWEEPS[name].items()]
    return study


def guidance(lab):
    """What guidance alone gives the base, and tuning against the base at its own best one."""
    rows = [lab.row("base", None, guidance=g, against=lab.table(None, "in_domain")) for g in GUIDANCES]
    best = max(rows, key=lambda row: row["measures"]["reward_mean"])["guidance"]
    rival = lab.table(None, "in_domain", guidance=best)
    return rows + [lab.row(f"seed {s}, against the base at {best:g}", lab.tune("--seed", str(s)), against=rival)
                   for s in RIVAL_SEEDS]


def quality(lab):
    """Fine-tuning clips as they are found, or without any flaw (paper, Fig. 9), both read from video files."""
    rows = [lab.row("base", None)]
    for kind in ("flawed", "clean"):
        rows.append(lab.row(f"{kind} clips", lab.tune("--data", write_clips(lab.cfg.work / f"clips-{kind}", kind))))
    return rows


def write_clips(folder, kind, count=192):
    """Fine-tuning clips of one quality as files, once: "flawed" like web video, or "clean". The folder, as a flag's value."""
    every = world.scenes("in_domain")
    if not (folder / f"{count - 1:04d}.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            scene = every[i % len(every)]
            clip, _ = world.make_clip(scene, 2_000_000 + i, flaws={} if kind == "clean" else None)
            write_video(folder / f"{i:04d}.mp4", to_pixels(clip), world.FPS)
            (folder / f"{i:04d}.txt").write_text(scene.caption)
    return str(folder)


def too_long(lab):
    """Five times the steps at five times the rate, looked at now and then."""
    run = lab.tune(*TOO_LONG, watch=WATCH["too_long"])
    steps, rows, tables = evaluated_steps(run), [], []
    for step in steps:
        table = read_json(run / "samples" / f"step_{step:06d}.json")["in_domain"]
        tables.append({k: torch.tensor([*map(number, v)], dtype=torch.float64) for k, v in table.items()})
        rows.append({"label": f"step {step}", "step": step, "set": "in_domain", "num_steps": 20, "guidance": lab.guidance,
                     "measures": summary(tables[-1]),
                     "differences": differences(tables[0], tables[-1], None)})
    write_png(ROOT / "docs" / "too_long.png", strips(run, [steps[0], steps[1], steps[-1]]))
    return rows


def evaluated_steps(run):
    return sorted(int(p.stem[-6:]) for p in (run / "samples").glob("step_??????.json"))


def evolution(lab):
    """Pictures, no rows: the same videos at several steps of a default run; before and after, the prompts that gained most."""
    run = lab.tune(watch=WATCH["evolution"])
    write_png(ROOT / "docs" / "evolution.png", strips(run, evaluated_steps(run)))
    run, captions, before, after = lab.tune(), [], [], []  # the same run, whose tables other studies have made
    for name in SETS:
        gain = lab.table(run, name)["reward"] - lab.table(None, name)["reward"]
        chosen = gain.topk(min(MOVING, len(gain))).indices.tolist()
        captions += [lab.prompts[name][i] for i in chosen]
        before += [lab.video(None, name, i) for i in chosen]
        after += [lab.video(run, name, i) for i in chosen]
    write_comparison_gif(ROOT / "docs" / "before_after.gif", [before, after], captions, ["before", "after"], world.FPS)
    return []


def strips(run, steps):
    """The upper half of a run's strips at several steps side by side: (H, W, 3)."""
    pictures = [torch.from_numpy(iio.imread(run / "samples" / f"step_{s:06d}.png")) for s in steps]
    title, rows = 22, len(SETS) * SHOWN
    return torch.cat(pictures, dim=1)[:title + (len(pictures[0]) - title) // rows * (rows // 2)].numpy()


STUDIES = {"headline": headline, "chain": chain, "short_chain": short_chain, "deep_cache": deep_cache, "tau": tau,
           "guidance": guidance,
           "quality": quality, "too_long": too_long, "evolution": evolution, "methods": methods, "guard": guard,
           "rewards": rewards,
           **{name: sweep(name) for name in SWEEPS}}


@dataclass(kw_only=True)
class Config(Settings):
    """Run a study, or write the pages' tables of those that have been run."""
    study: tyro.conf.Positional[Literal[(*STUDIES, "report")]]


def run(cfg):
    """A study from its training runs to its JSON file."""
    lab = Lab(cfg)
    rows = STUDIES[cfg.study](lab)
    report = {"command": shlex.join(["python", "tiny/study.py", *sys.argv[1:]]), "reward": lab.reward.name, "count": cfg.count,
              "evaluation_seed": REPORT_SEED, "training": to_json(train.PRESETS["tiny"]), "versions": versions(),
              "rows": rows}
    if rows:
        with write_whole(cfg.out / f"{cfg.study}.json") as hidden:
            hidden.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    try:
        write_report(config.out) if config.study == "report" else run(config)
    except ValueError as error:
        print(f"study.py: {error}", file=sys.stderr)
        sys.exit(2)
