"""
The paper's studies in the tiny world: a few training runs each, compared from pure noise on held-out prompts.

    python tiny/study.py headline            # three training seeds with the defaults, all three prompt sets, D = 20 and 50
    python tiny/study.py tau                 # likewise: guidance, lambda, segments, grad_steps, rank, quality, too_long
    python tiny/study.py report              # the README's tables, from tiny/studies/*.json

Every result is a file tiny/studies/NAME.json with command, seeds and versions inside. Sweeps have one training seed: they show
trends, not that one value is better than its neighbour. Differences are paired with the base, over the same prompts and noise.
"""
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import lora  # noqa: E402
import train  # noqa: E402
from evaluate import evaluate, find_judge, paired, prompt_sets, summary, versions  # noqa: E402
from generate import write_video  # noqa: E402
from model import load_base, read_json, write_whole  # noqa: E402
from reward import load_reward  # noqa: E402
from tiny import world  # noqa: E402

STUDIES = ROOT / "tiny" / "studies"
SWEEPS = {  # name: {label: training flags}, all else as by default
    "headline": {f"seed {s}": ["--seed", str(s)] for s in range(3)},
    "tau": {f"tau = {t}": ["--tau", str(t)] for t in (0.1, 0.3, 0.6, 0.9, 1.0)},
    "guidance": {},
    "lambda": {f"lambda = {v}": ["--lambda-tar", str(v)] for v in (0, 0.5, 1, 2)},
    "segments": {"SegVR, S = 4": ["--segments", "4"], "dense, S = 16": ["--segments", "16"]},
    "grad_steps": {f"K = {k}": ["--grad-steps", str(k)] for k in (1, 2)},
    "rank": {f"rank {r}": ["--rank", str(r)] for r in (1, 4, 16)},
    "quality": {"clips as found": ["flawed"], "clean clips": ["clean"]},
    "too_long": {"640 steps": ["--steps", "640", "--eval-every", "80", "--eval-count", "64"]},
}


@dataclass
class Config:
    """Run a study, or write the README's tables of those that have been run."""
    study: tyro.conf.Positional[Literal["headline", "tau", "guidance", "lambda", "segments", "grad_steps", "rank", "quality",
                                        "too_long", "report"]]
    count: int = 192
    """videos of each prompt set"""
    out: Path = STUDIES
    """folder of the JSON files"""


def tune(flags, folder, eval_every="0"):
    """A training run in a folder; returns its metrics lines."""
    status = train.main(["--eval-every", eval_every, *flags, "--out", str(folder)])
    if status:
        sys.exit(status)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seconds_per_step(lines):
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    return sum(seconds) / len(seconds)


def write_clips(folder, kind, count=192):
    """Fine-tuning clips of one quality as files: "flawed" like web video, or "clean" (paper, Fig. 9)."""
    folder.mkdir()
    every = world.scenes("in_domain")
    for i in range(count):
        scene = every[i % len(every)]
        clip, _ = world.make_clip(scene, 2_000_000 + i, flaws={} if kind == "clean" else None)
        write_video(folder / f"{i:04d}.mp4", clip, world.FPS)
        (folder / f"{i:04d}.txt").write_text(scene.caption)
    return ["--data", str(folder), "--no-cache"]


def variants(name, scratch):
    """(label, flags) of a study; tau runs twice, with equal steps and with the steps that the default's time allows."""
    for label, flags in SWEEPS[name].items():
        yield label, write_clips(scratch / flags[0], flags[0]) if name == "quality" else flags


def run(cfg):
    """Measure the base, then every variant of the study against it."""
    base = load_base("tiny")
    reward, judge = load_reward(base_folder=base.folder), find_judge(base, world.FRAMES, world.SIZE, world.SIZE)
    sets = prompt_sets(base, (), cfg.count)
    if cfg.study not in ("headline", "guidance"):
        sets = {"in_domain": sets["in_domain"]}
    rows, tables = [], {}

    def measure(model, label, num_steps=20, guidance=3., **more):
        for name, prompts in sets.items():
            with tqdm(total=len(prompts), desc=f"{label}, {name}", leave=False) as bar:
                table, _ = evaluate(model, reward, prompts, seed=train.EVAL_SEED, num_steps=num_steps, guidance=guidance,
                                    judge=judge, bar=bar.update)
            row = {"label": label, "set": name, "num_steps": num_steps, "guidance": guidance, "measures": summary(table)} | more
            if label == "base":
                tables[name, num_steps, guidance] = table
            elif (name, num_steps, guidance) in tables:
                row["differences"] = {k: paired(tables[name, num_steps, guidance], table, k) for k in table}
            rows.append(row)
            print(f"{label}, {name}, D = {num_steps}, guidance {guidance}: {row['measures']}", flush=True)

    chains = (20, 50) if cfg.study == "headline" else (20,)
    for num_steps in chains:
        measure(base, "base", num_steps)
    if cfg.study == "guidance":  # the base at its own best guidance is what tuning has to beat
        for guidance in (1., 2., 4.5, 6., 9.):
            measure(base, "base", guidance=guidance)
    with tempfile.TemporaryDirectory() as scratch:
        scratch, default_time = Path(scratch), None
        for label, flags in variants(cfg.study, scratch):
            lines = tune(flags, folder := scratch / label.replace(" ", ""))
            time = seconds_per_step(lines)
            if cfg.study == "too_long":
                rows += [{"label": f"step {line['step']}", "set": name, "measures": m}
                         for line in lines if "eval" in line for name, m in line["eval"].items()]
                continue
            for num_steps in chains:
                measure(with_adapter(folder), label, num_steps, flags=flags, seconds_per_step=time)
            if cfg.study == "tau" and flags != ["--tau", "0.6"]:
                default_time = default_time or seconds_per_step(tune([], scratch / "default"))
                steps = max(1, round(train.Config.steps * default_time / time))
                tune([*flags, "--steps", str(steps)], again := scratch / f"{folder.name}-time")
                measure(with_adapter(again), f"{label}, equal time: {steps} steps", flags=flags, seconds_per_step=time)
    report = {"command": shlex.join(["python", "tiny/study.py", *sys.argv[1:]]), "reward": reward.name, "count": cfg.count,
              "evaluation_seed": train.EVAL_SEED, "training": train.to_json(train.Config()), "versions": versions(), "rows": rows}
    with write_whole(cfg.out / f"{cfg.study}.json") as hidden:
        hidden.write_text(json.dumps(report, indent=1) + "\n")


def with_adapter(folder):
    """The base with a run's adapter."""
    model = load_base("tiny")
    lora.load(model.unet, folder / "lora.safetensors")
    return model


MEASURES = ("watermark", "sharpness", "saturation", "noise", "colour", "shape", "direction", "static")


def as_table(report):
    """A study as Markdown: reward, paired difference, judge."""
    lines = [f"| | set | D | guidance | {report['reward']} mean ± std | paired difference | {' | '.join(MEASURES)} |",
             "|" + "---|" * (6 + len(MEASURES))]
    for row in report["rows"]:
        m, d = row["measures"], row.get("differences", {}).get("reward")
        lines.append(f"| {row['label']} | {row['set']} | {row.get('num_steps', 20)} | {row.get('guidance', 3.):g} | "
                     f"{m['reward_mean']:.4f} ± {m['reward_std']:.4f} | " + ("{:+.4f} ± {:.4f}".format(*d) if d else "") + " | "
                     + " | ".join(f"{m[k]:.3f}" for k in MEASURES) + " |")
    first = report["rows"][0]["measures"]["n"]
    return "\n".join([f"`{report['command']}`, {first} videos of each set, torch {report['versions']['torch']}:", "", *lines])


def write_report(cfg):
    """Replace what stands between the markers <!-- study NAME --> and <!-- end --> in the README."""
    text = (ROOT / "README.md").read_text()
    for file in sorted(cfg.out.glob("*.json")):
        start = f"<!-- study {file.stem} -->"
        if start not in text:
            raise ValueError(f"README.md: no marker {start} for {file.name}")
        before, _, rest = text.partition(start)
        after = rest.partition("<!-- end -->")[2]
        text = f"{before}{start}\n{as_table(read_json(file))}\n<!-- end -->{after}"
    with write_whole(ROOT / "README.md") as hidden:
        hidden.write_text(text)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    try:
        write_report(config) if config.study == "report" else run(config)
    except ValueError as error:
        print(f"study.py: {error}", file=sys.stderr)
        sys.exit(2)
