"""
The studies in the tiny world: a few training runs each, measured on the same prompts and the same noise as the base.

    python -m tiny.study lambda tau    # run these studies, then write all tables and pictures
    python -m tiny.study report        # write the tables and pictures alone, from tiny/studies/*.json
    python -m tiny.study evolution     # draw docs/evolution.png and docs/too_long.png, which need runs of their own

Each run of STUDIES is trained and measured once and kept in out/studies, so a study that was stopped goes on from there when it
is started again. Studies with one training seed show trends; the headline says how much seeds differ.
"""
import sys

if not __package__:
    print("study.py: start it from the folder of the repository as: python -m tiny.study", file=sys.stderr)
    sys.exit(2)

import importlib
import json
import shlex
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Literal

import imageio.v3 as iio
import numpy as np
import torch
import tyro

import evaluate
import train
from generate import generate
from model import decode_frames, load_base
from support.files import read_json, write_text, write_whole
from support.pictures import draw_gains, write_png
from support.ranks import run_script
from support.run import read_metrics
from support.tables import json_numbers, over_seeds
from support.videos import to_pixels, write_video
from tiny import clips, world

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tiny" / "studies"
WORK = Path("out/studies")  # of runs and what they read; a run made with other weights has to be removed by hand
ONE = (0,)  # training seeds
THREE = (0, 1, 2)
IN_DOMAIN = f"--prompts in_domain={WORK}/in_domain.txt"
SEEN = f"{IN_DOMAIN} --eval-count 16 --eval-every"  # by which a run's best checkpoint is chosen
CHEATING = "--steps 200 --lr 0.004 --eval-every 20 --eval-count 16"  # five times the default's steps, twice its rate
FROM_NOISE = "--num-steps 10 --grad-steps 10 --lambda-tar 0 --lr 0.003 --steps 180"  # a shape's way is settled in the first steps

# {study: {label: (module, flags, training seeds)}}. What no flag says is the module's default in the tiny world.
STUDIES = {
    "headline": {f"seed {seed}": ("train", "", (seed,)) for seed in range(8)} | {"all seeds": ("train", "", range(8))},
    "chain": {"tuned with D = 20": ("train", "", ONE)},
    # Beside the default's 40 steps stands the number that takes as long, by the fastest of four timed steps on two CPU cores.
    "short_chain": {f"tuned with D = {D}: {steps} steps": ("train", f"--num-steps {D} --steps {steps}", THREE)
                    for D, steps in ((5, 40), (5, 112), (10, 40), (10, 69), (20, 40), (50, 40), (50, 18))},
    "tau": {f"tau = {tau}: {steps} steps": ("train", f"--tau {tau} --steps {steps}", ONE)
            for tau, steps in ((.1, 40), (.1, 113), (.3, 40), (.3, 68), (.6, 40), (.9, 40), (.9, 26), (1., 40), (1., 24))},
    "deep_cache": {f"N = {N}": ("train", f"--cache-interval {N}", THREE) for N in (1, 2, 3)},
    "guidance": {"tuned": ("train", "", THREE)},
    "lambda": {f"lambda = {value}": ("train", f"--lambda-tar {value}", ONE) for value in (0., .5, 1., 2.)},
    "segments": {"SegVR, S = 4": ("train", "", ONE), "dense, S = 16": ("train", "--segments 16", ONE)},
    "grad_steps": {"K = 1": ("train", "", ONE), "K = 2": ("train", "--grad-steps 2", ONE)},
    "rank": {f"rank {rank}": ("train", f"--rank {rank}", ONE) for rank in (1, 4, 16)},
    "quality": {f"{kind} clips": ("train", f"--data {WORK}/clips-{kind}", ONE) for kind in ("flawed", "clean")},
    "too_long": {f"step {steps}": ("train", f"--steps {steps} --lr 0.01", ONE) for steps in (40, 80, 120, 160, 200)},
    # Steps: what fits into twice the denoising work of a default run, in passes of a video through the UNet, one with gradient as
    # three. Rates: the best of 5e-4, 2e-3 and 8e-3 after half of the steps, on a seed that is not used again (docs/methods.md).
    "methods": {
        "InstructVideo": ("train", f"--lr 8e-3 --steps 80 {SEEN} 20", THREE),
        "InstructVideo, own videos": ("train", f"--data {WORK}/own-videos --lr 2e-3 --steps 80 {SEEN} 20", THREE),
        "DRaFT-1": ("methods.draft", f"--lr 8e-3 --steps 52 {SEEN} 13", THREE),
        "ReFL": ("methods.refl", f"--lr 8e-3 --steps 56 {SEEN} 14", THREE),
        "VADER": ("methods.vader", f"--lr 8e-3 --steps 52 {SEEN} 13", THREE),
        "VADER, four frames, TAR": ("methods.vader", f"--frames-scored 4 --lambda-tar 1 --lr 8e-3 --steps 52 {SEEN} 13", THREE),
        "DDPO": ("methods.ddpo", f"--timestep-fraction 0.25 --lr 8e-3 --steps 16 {SEEN} 4", THREE),
        "DDPO, more": ("methods.ddpo", f"--timestep-fraction 0.25 --batch-size 16 --lr 2e-3 --steps 64 {SEEN} 16", ONE),
        "RWR": ("methods.rwr", f"--rounds 2 --lr 8e-3 --steps 80 {SEEN} 20", THREE),
        "DPO": ("methods.dpo", f"--lr 5e-4 --steps 32 {SEEN} 8", THREE),
        "DPO, more": ("methods.dpo", f"--batch-size 32 --pairs 256 --lr 5e-4 --steps 128 {SEEN} 32", ONE)},
    "rewards": {
        "HPS + 0.05 action:left": ("methods.draft", f"--reward hpsv2 --reward action:left=0.05 {FROM_NOISE}", ONE),
        "HPS + 0.2 action:left": ("methods.draft", f"--reward hpsv2 --reward action:left=0.2 {FROM_NOISE}", THREE),
        "removal:watermark": ("train", "--reward removal:watermark", THREE), "HPS": ("train", "", THREE)},
    "guard": {
        "highest reward": ("train", CHEATING, THREE),
        **{f"guard, {what} watched": ("train", f"{CHEATING} --watch {what}", THREE) for what in ("judge", "pixels")}}}
MEASURED = {  # what evaluate.py is told; for other studies 64 videos of in_domain, D = 20, the base's own guidance
    "headline": "", "methods": "--count 32", "guard": "--watch judge", "chain": f"{IN_DOMAIN} --num-steps 50",
    "short_chain": f"{IN_DOMAIN} --num-steps 20 50 --count 16", "guidance": f"{IN_DOMAIN} --guidance 1 1.5 2 3",
    "rewards": f"{IN_DOMAIN} --count 32 --watch action:left --watch removal:watermark --watch tiny/judge.py:left"}


def run_study(name):
    """Train and measure what is missing of a study, and write its file: a row for each label, prompt set, D and guidance."""
    adapter = "best.safetensors" if name in ("methods", "guard") else "lora.safetensors"  # the best checkpoint, or the last
    rows = []
    for label, (module_name, flags, seeds) in STUDIES[name].items():
        runs = [trained(module_name, f"{flags} --seed {seed}") for seed in seeds]
        reports = [measured(run, adapter, MEASURED.get(name, IN_DOMAIN)) for run in runs]
        seconds = sum(line.get("seconds", 0) for line in read_metrics(runs[0] / "metrics.jsonl"))
        needs_base = not rows  # it is the same for all labels
        for alike in zip(*[report["results"] for report in reports]):  # the seeds' rows of one prompt set, D and guidance
            if alike[0]["model"] == "base":  # its row comes before the tuned model's
                base = alike[0] | {"label": "base"}
                if needs_base:
                    rows.append(base)
            else:
                base_std = base["measures"]["reward_std"]
                rows.append(over_seeds(label, alike) | {"base_std": base_std, "flags": flags, "seconds": [seconds]})
    report = {"command": f"python -m tiny.study {name}", "reward": reports[0]["reward"], "evaluation_seed": reports[0]["seed"],
              "versions": reports[0]["versions"], "rows": rows}
    write_text(RESULTS / f"{name}.json", json.dumps(json_numbers(report), indent=1) + "\n")


def trained(module_name, flags):
    """The folder of the run with these flags. It is trained now, or continued, unless it is complete."""
    run = WORK / "-".join([module_name, *shlex.split(flags)]).replace("--", "").replace("/", "_")
    if not (run / "done").exists():
        write_inputs(flags)
        argv = ["--eval-every", "0", *shlex.split(flags), "--out", str(run)]
        if status := train.main(argv, importlib.import_module(module_name)):
            sys.exit(status)
        (run / "done").touch()
    return run


def measured(run, adapter, flags):
    """evaluate.py's report of a run, made now if it is not there: base and tuned model on the same prompts and noise."""
    folder = run / "-".join([adapter, *shlex.split(flags)]).replace("--", "").replace("/", "_")
    if not (folder / "table.json").exists():
        write_inputs(flags)
        usual = ["--lora", str(run / adapter), "--out", str(folder), "--sheet", "0", "--num-steps", "20"]
        evaluate.main(tyro.cli(evaluate.Config, args=[*usual, *shlex.split(flags)]))
    return read_json(folder / "table.json")


@torch.no_grad()
def write_inputs(flags):
    """Write the prompts and the clips, with their captions, that flags name in WORK, unless they are there."""
    for path in [Path(word.rpartition("=")[2]) for word in shlex.split(flags)]:
        if path.parent == WORK and not path.exists() and path.suffix == ".txt":
            write_text(path, "\n".join(clips.prompt_sets()["in_domain"]) + "\n")
        elif path.parent == WORK and not path.exists():
            with write_whole(path) as hidden:
                hidden.mkdir()
                for i, (caption, video) in enumerate(videos(path.name)):
                    write_video(hidden / f"{i:04d}.mp4", to_pixels(video), world.FPS)
                    write_text(hidden / f"{i:04d}.txt", caption)


def videos(name):
    """(caption, video (F, 3, H, W)): of "own-videos" by the base, else the world's own, in "clips-clean" without any flaw."""
    scenes = 2 * world.scenes("in_domain")
    if name == "own-videos":
        base = load_base("tiny")
        for i, z_0 in generate(base, [scene.caption for scene in scenes], range(6_000_000, 6_000_000 + len(scenes))):
            yield scenes[i].caption, decode_frames(base.vae, z_0[None])[0]
    else:
        for i, scene in enumerate(scenes):
            yield scene.caption, world.make_clip(scene, clips.CLIP_SEED + i, {} if name == "clips-clean" else None)[0]


def for_each(keys, template):
    """The columns of a table for several measures or prompt sets."""
    return {key: template.replace("KEY", key) for key in keys}


# What a table shows of a row: {head of a column: template}.
MEASURES = ("watermark", "sharpness", "saturation", "noise", "motion", "fidelity", "steadiness", "colour", "shape", "direction",
            "static")  # the judge's
EVERY_ROW = {
    "": "{label}", "set": "{set}", "D": "{num_steps}", "guidance": "{guidance:g}",
    "HPStiny mean ± std over videos": "{measures[reward_mean]:.4f} ± {measures[reward_std]:.4f}",
    "paired difference ± error over prompts": "{differences[reward][0]:+.4f} ± {differences[reward][1]:.4f}",
    "spread over seeds": "{spread[reward]:.4f}", "judge score": "{measures[judge]:.4f}",
    "of the run's best": "{of_best_judge:.1%}, step {step}", "turned at": "{turned:d}",
    **for_each(("action:left", "removal:watermark", "left", *MEASURES), "{measures[KEY]:.3f} ± {spread[KEY]:.3f}")}
SUMMARY = {
    "set": "{set}",
    "HPStiny": "{before[reward]:.2f} → {measures[reward_mean]:.2f} ({differences[reward][0]:+.3f} ± {error[reward]:.3f})",
    "spread over seeds": "{spread[reward]:.3f}", "gain in base std": "{gain_in_base_std:.2f}",
    **for_each(("watermark", "motion", "fidelity", "direction"),
               "{before[KEY]:.2f} → {measures[KEY]:.2f} ({differences[KEY][0]:+.3f} ± {error[KEY]:.3f})")}
METHODS_SUMMARY = {  # of a line that has the row of each prompt set
    "gain of HPStiny": "{label}",
    **for_each(("in_domain", "new", "other"), "{KEY[differences][reward][0]:+.3f} ± {KEY[error][reward]:.3f}"),
    "spread over seeds": "{in_domain[spread][reward]:.3f}", "s": "{in_domain[mean_seconds]:.0f}"}
METHODS = METHODS_SUMMARY | {
    "rate": "{in_domain[rate]:g}", "steps": "{in_domain[steps]}", "videos scored": "{curve[scored]}",
    **for_each(MEASURES, "{in_domain[measures][KEY]:.3f}"), "diversity": "{curve[diversity]}"}
TABLES = {"summary": ("headline", SUMMARY), "methods": ("methods", METHODS), "methods summary": ("methods", METHODS_SUMMARY)}
PICTURES = {  # {file in docs: (study, measure) of each panel}
    "studies": [(name, "reward") for name in ("headline", "tau", "short_chain", "lambda", "quality", "too_long")],
    "methods": [("methods", "reward"), ("methods", "watermark"), ("methods", "fidelity")],
    "rewards": [("rewards", "reward"), ("rewards", "left"), ("rewards", "watermark")],
    "guard": [("guard", "reward"), ("guard", "judge")]}


def read_rows(report):
    """The rows of a study's file with what else is shown. Rows of one "group", which older files have by seed, become one."""
    groups = {}
    for number, row in enumerate(report["rows"]):
        groups.setdefault(row.get("group", number), []).append(row)
    rows = []
    for group, alike in groups.items():
        row = (over_seeds(group, alike) if "group" in alike[0] else alike[0]) | {"before": {}, "error": {}}
        for key, (gain, over_prompts) in row.get("differences", {}).items():
            if over_prompts is not None:  # of a single prompt it is not known
                row["before"][key] = row["measures"]["reward_mean" if key == "reward" else key] - gain
                row["error"][key] = max(over_prompts, (row.get("spread", {}).get(key) or 0) / row.get("seeds", 1) ** 0.5)
        if "base_std" in row:
            row["gain_in_base_std"] = row["differences"]["reward"][0] / row["base_std"]
        if "seconds" in row:
            row["mean_seconds"] = fmean(row["seconds"])
        if "curves" in row:  # evaluations while training
            best = [max(curve, key=lambda point: point["measures"]["reward_mean"]) for curve in row["curves"]]
            before = row["curves"][0][0]["measures"]["pixel_diversity"]
            diversity = fmean(point["measures"]["pixel_diversity"] for point in best)
            row |= {"diversity": f"{before:.3f} → {diversity:.3f}", "scored": row["videos_scored"][-1]}
        rows.append(row)
    return rows


def filled(template, row):
    """A column's template with a row's values, up to the "±" behind which one is missing."""
    parts = []
    with suppress(KeyError, TypeError):
        for part in template.split(" ± "):
            parts.append(part.format_map(row))
    return " ± ".join(parts)


def as_table(name, report, columns):
    """Markdown: what a study was measured on, and its rows. Columns without a value are left out."""
    rows = read_rows(report)
    videos = f"{rows[0]['measures']['n']:.0f} videos of {'all sets together' if rows[0]['set'] == 'all' else 'each set'}"
    if columns in (SUMMARY, METHODS_SUMMARY):
        rows = [row for row in rows if row.get("seeds", 1) > 1]
    if name == "methods":  # a line for each label, which has its rows under the names of their sets
        lines = {}
        for row in rows:
            lines.setdefault(row["label"], {"label": row["label"]})[row["set"]] = row
        rows = lines.values()
    shown = {}
    for head, template in columns.items():
        cells = [filled(template, row) for row in rows]
        if any(cells):
            shown[head] = cells
    table = [f"`python -m tiny.study {name}`, {videos}, torch {report['versions']['torch']}:", ""]
    table += ["| " + " | ".join(cells) + " |" for cells in (shown, ["---"] * len(shown), *zip(*shown.values()))]
    return "\n".join(table[2:] if columns is METHODS_SUMMARY else table)  # of which the README's text says the rest


def write_report():
    """Replace what stands between the markers <!-- study NAME --> and <!-- end --> in the pages, and draw the pictures."""
    reports = {file.stem: read_json(file) for file in sorted(RESULTS.glob("*.json"))}
    pages = [ROOT / "README.md", ROOT / "tiny" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for marker, (name, columns) in ({name: (name, EVERY_ROW) for name in reports} | TABLES).items():
        if name in reports:
            start = f"<!-- study {marker} -->\n"
            found = [page for page in pages if start in page.read_text()]
            if not found:
                raise ValueError(f"no page has the marker {start.strip()}")
            before, _, rest = found[0].read_text().partition(start)
            after = rest.partition("<!-- end -->")[2]
            write_text(found[0], f"{before}{start}{as_table(name, reports[name], columns)}\n<!-- end -->{after}")
    for picture, panels in PICTURES.items():
        shown = [(name, read_rows(reports[name]), measure) for name, measure in panels if name in reports]
        if shown:
            draw_gains(shown, ROOT / "docs" / f"{picture}.png")


def draw_evolution():
    """docs/evolution.png and too_long.png: the same videos at several steps of a run."""
    for name, flags, steps in (("evolution", "10", range(0, 50, 10)), ("too_long", "40 --steps 200 --lr 0.01", (0, 40, 200))):
        samples = trained("train", f"--eval-count 2 --eval-every {flags}") / "samples"
        pictures = [iio.imread(samples / f"step_{step:06d}.png") for step in steps]
        write_png(ROOT / "docs" / f"{name}.png", np.concatenate(pictures, axis=1))


def main(studies: tyro.conf.Positional[tuple[Literal[(*STUDIES, "evolution", "report")], ...]] = ()):
    """What the command line asks for, in its order, then all tables and pictures."""
    for name in studies:
        if name != "report":
            draw_evolution() if name == "evolution" else run_study(name)
    write_report()


if __name__ == "__main__":
    run_script("study.py", lambda: tyro.cli(main, description=__doc__, prog="python -m tiny.study"))
