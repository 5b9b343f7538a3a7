"""
The methods of both papers side by side: same base, sampler, LoRA, reward, prompts and judge, the same denoising work.

Work is counted in passes of one video through the denoiser, a pass with gradient as three; each run has as many steps as fit
into twice the default run's. Seconds stand beside it. Every method's learning rate is the best of the same small grid on
one seed that is not used again, after the first half of such a run, by the reward of in_domain with noise of its own; then
three seeds run with it.
"""
import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

import train
from evaluate import prompt_sets
from generate import generate
from model import decode_frames
from support.files import read_json, write_whole
from support.pictures import versions
from support.ranks import progress
from support.run import read_metrics
from support.videos import to_pixels, write_video
from tiny import world
from tiny.lab import SETS, pooled_row
from tiny.study_tables import SHOWN, as_lines, conditions, widest_error

TIMES, GRID, GRID_SEED, SEEDS = 2, (5e-4, 2e-3, 8e-3), 100, (0, 1, 2)
PARTS = 2  # a run of the grid is the first of so many equal parts of a whole one
LOOKS, LOOKED_AT = 4, 16  # evaluations of a run after its start, and videos of in_domain in one
# Tried again where a method does not rise: {method: (rate, settings)}, twice the batch for four times the steps, one seed. DDPO
# at the grid's middle rate, since its best falls over a whole run; DPO with four times the pairs to learn from.
MORE = {"DDPO": (2e-3, {"batch_size": 16}), "DPO": (5e-4, {"batch_size": 32, "pairs": 256})}
OWN_VIDEOS = 192  # of the base, as many as the world has clips
OWN_SEED = 6_000_000


def contenders():
    """{label: (module, {setting: value})}: all else is the method's default in the tiny world."""
    draft, refl, vader, ddpo, rwr, dpo = (importlib.import_module(f"methods.{name}")
                                          for name in ("draft", "refl", "vader", "ddpo", "rwr", "dpo"))
    return {
        "InstructVideo": (train, {}),
        "InstructVideo, own videos": (train, {"data": Path("own-videos")}),  # in the lab's folder
        "DRaFT-1": (draft, {}),
        "ReFL": (refl, {}),
        "VADER": (vader, {}),
        "VADER, four frames, TAR": (vader, {"frames_scored": 4, "lambda_tar": 1.0}),
        "DDPO": (ddpo, {"timestep_fraction": 0.25}),
        "RWR": (rwr, {"rounds": 2}),
        "DPO": (dpo, {}),
    }


def passes(module, cfg):
    """(once, for each step): passes through the denoiser of a run with these settings; guidance takes two, a gradient three."""
    B, D, K = cfg.batch_size, cfg.num_steps, cfg.grad_steps
    name = module.__name__.split(".")[-1]
    if name == "ddpo":  # the chain, and each learned step again
        return 0, B * (2 * D + 6 * max(1, round(cfg.timestep_fraction * D)))
    if name == "rwr":
        return cfg.rounds * cfg.videos * 2 * D, B * 3
    if name == "dpo":  # a pair is two videos; the reference has no gradient
        return cfg.rounds * cfg.pairs * 2 * 2 * D, B * 2 * (3 + 1)
    length = D if name in ("draft", "vader") else round(cfg.tau * D)
    if name == "refl":  # on average; the last of them predicts
        length, K = D - max(1, round(cfg.late * D)) / 2 + .5, 1
    return 0, B * (2 * (length - K) + 6 * K)


def videos_scored(module, cfg, step, steps):
    """How many videos the reward has scored by this step of a run of `steps`; a round's all at once, at its start."""
    name = module.__name__.split(".")[-1]
    if name in ("rwr", "dpo"):
        return math.ceil(step * cfg.rounds / steps) * (cfg.videos if name == "rwr" else 2 * cfg.pairs)
    return step * cfg.batch_size


def equal_steps(module, cfg):
    """Steps of a method that cost TIMES the default run's work, a multiple of 4, so that rounds and evaluations divide them."""
    tiny = train.PRESETS["tiny"]
    budget = TIMES * tiny.steps * passes(train, tiny)[1]
    once, each = passes(module, cfg)
    return max(4, round((budget - once) / each / 4) * 4)


def methods(lab):
    """
    Rates on one seed, then three seeds of each method: its best checkpoint on all three sets, and curves.

    Each run's result is a file of its own, tiny/studies/methods/*.json, so the study may be done in several sittings.
    """
    runs = sum(len(GRID) + len(SEEDS) for _ in contenders())
    print(f"{runs} runs of {TIMES} times the default run's work, {len(MORE)} of up to {8 * TIMES} times, and "
          f"{len(SETS) * lab.cfg.count} videos of each of {len(contenders()) * len(SEEDS) + len(MORE)} of them. What has a "
          "file is not made again", flush=True)
    base = {name: lab.table(None, name) for name in SETS}
    rows = [lab.row("base", None, name) for name in SETS]
    for label, (module, changes) in contenders().items():
        cfg = replace(module.PRESETS["tiny"], **changes)
        steps = equal_steps(module, cfg)

        # 1. The rate, by the last evaluation of the grid's seed. 2. Three seeds. 3. What four times the steps change.
        grid = {rate: result(lab, label, module, changes, steps, rate, GRID_SEED) for rate in GRID}
        grid = {rate: found["curve"][-1]["measures"]["reward_mean"] for rate, found in grid.items()}
        best = max(grid, key=grid.get)
        seeds = [result(lab, label, module, changes, steps, best, seed) for seed in SEEDS]

        rows += rows_of_runs(lab, base, label, module, cfg, steps, seeds, {"rate": best, "grid": grid})
        if label in MORE:
            rate, larger = MORE[label]
            found = result(lab, f"{label}, more", module, changes | larger, 4 * steps, rate, SEEDS[0])
            cfg = replace(cfg, **larger)
            rows += rows_of_runs(lab, base, f"{label}, more", module, cfg, 4 * steps, [found], {"rate": rate})
    return rows


def rows_of_runs(lab, base, label, module, cfg, steps, seeds, more):
    """One row for each set, seeds (what result gave) together, and one with their curves. base: {set: its table}."""
    once, each = passes(module, cfg)
    more = more | {"steps": steps, "passes": once + steps * each, "seconds": [found["seconds"] for found in seeds]}
    rows = []
    for name in SETS:
        tables = [{k: torch.tensor(v, dtype=torch.float64) for k, v in found["tables"][name].items()} for found in seeds]
        row = pooled_row(label, name, base[name], tables, lab.prompts[name])
        rows.append(row | {"num_steps": 20, "guidance": lab.guidance} | more)
    scored = [videos_scored(module, cfg, point["step"], steps) for point in seeds[0]["curve"]]
    return [*rows, {"label": label, "set": "curve", "videos_scored": scored, "curves": [found["curve"] for found in seeds]}]


def result(lab, label, module, changes, steps, rate, seed):
    """
    What a run gave, from its file, or made now: seconds of its steps, its curve, tables of its best checkpoint on all sets.

    The curve has the measures of in_domain at every evaluation while training, with noise that nothing else is measured by.
    A run of the grid is the first of PARTS equal parts of a whole one, and has no tables.
    """
    words = f"{label} rate {rate:g} seed {seed}".lower().replace(",", "").replace("'", "").split()
    file = lab.cfg.out / "methods" / f"{'-'.join(words)}.json"
    if not file.exists():
        whole = seed != GRID_SEED
        settings = changes | {"steps": steps if whole else steps // PARTS, "lr": f"{rate:g}", "seed": seed}
        if "rounds" in changes and not whole:
            settings["rounds"] = changes["rounds"] // PARTS
        if "data" in changes:
            settings["data"] = own_videos(lab, lab.cfg.work / changes["data"])
        flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        watch = ("--prompts", f"in_domain={looked_at(lab)}", "--eval-count", str(LOOKED_AT), "--eval-every", str(steps // LOOKS),
                 "--watch", "diversity")
        run = lab.tune(*flags, watch=watch, module=module)

        lines = read_metrics(run / "metrics.jsonl")
        curve = [{"step": line["step"], "measures": line["eval"]["in_domain"]} for line in lines if "eval" in line]
        tables = {name: {k: [round(x, 5) for x in v.tolist()] for k, v in lab.table(run, name, adapter="best").items()}
                  for name in (SETS if whole else ())}
        found = {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}, "versions": versions(),
                 "seconds": sum(line.get("seconds", 0) for line in lines), "curve": curve, "tables": tables}
        with write_whole(file) as hidden:
            hidden.write_text(json.dumps(found) + "\n")
        print(f"{file.name}: {curve[0]['measures']['reward_mean']:.4f} -> {curve[-1]['measures']['reward_mean']:.4f}", flush=True)
    return read_json(file)


def looked_at(lab):
    """The file with the prompts of the evaluations while training, two videos of each, or diversity could not be seen."""
    file = lab.cfg.work / f"in_domain-{LOOKED_AT // 2}.txt"
    with write_whole(file) as hidden:
        hidden.write_text("\n".join(prompt_sets(lab.base, (), LOOKED_AT // 2)["in_domain"]) + "\n")
    return file


@torch.no_grad()
def own_videos(lab, folder):
    """The folder, with the base's own videos for the captions of in_domain, made once; not counted as work."""
    every = [scene.caption for scene in world.scenes("in_domain")]
    captions = [every[i % len(every)] for i in range(OWN_VIDEOS)]
    if not (folder / f"{OWN_VIDEOS - 1:04d}.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = generate(lab.base, captions, [OWN_SEED + i for i in range(OWN_VIDEOS)], guidance=lab.guidance)
        for i, z_0 in progress(made, "the base's own videos", OWN_VIDEOS, unit="video"):
            write_video(folder / f"{i:04d}.mp4", to_pixels(decode_frames(lab.base.vae, z_0[None])[0]), world.FPS)
            (folder / f"{i:04d}.txt").write_text(captions[i])
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The report, from the JSON file alone

def as_table(report):
    """Markdown: the gains of each method on each set, ± the wider of the errors over prompts and over training seeds."""
    heads = ["gain of reward", *SETS, "spread over seeds", "s", "rate", "steps", "videos scored",
             *(f"{k}, in_domain" for k in SHOWN), "diversity"]
    base, lines = rows_of(report, "base"), []
    for label, rows in tuned(report).items():
        first, curves = rows["in_domain"], rows["curve"]["curves"]
        different = sum(best_point(curve)["measures"]["pixel_diversity"] for curve in curves) / len(curves)
        lines.append([label, *gains(rows), f"{first['rate']:g}", first["steps"], rows["curve"]["videos_scored"][-1],
                      *(f"{first['measures'][k]:.3f}" for k in SHOWN), f"{different:.3f}"])
    shown = [base["in_domain"]["measures"][k] for k in SHOWN] + [curves[0][0]["measures"]["pixel_diversity"]]  # of any run
    lines.insert(0, ["base", *[""] * (len(SETS) + 5), *(f"{value:.3f}" for value in shown)])
    return "\n".join([conditions(report), "", *as_lines(heads, lines)])


def as_summary(report):
    """The README's table: the gains alone, of what has several seeds."""
    lines = [[label, *gains(rows)] for label, rows in tuned(report).items() if len(rows["curve"]["curves"]) > 1]
    return "\n".join(as_lines(["gain of HPStiny", *SETS, "spread over seeds", "s"], lines))


def gains(rows):
    """Cells of one method: its gain on each set, how much that of in_domain varies with the seed, and seconds of a run."""
    first = rows["in_domain"]
    pairs = [(rows[name]["differences"]["reward"][0], widest_error(rows[name], "reward")) for name in SETS]
    cells = ["{:+.3f} ± {:.3f}".format(*pair) for pair in pairs]
    spread = first["spread"]["reward"]
    return [*cells, "" if spread is None else f"{spread:.3f}", f"{sum(first['seconds']) / len(first['seconds']):.0f}"]


def tuned(report):
    """{method: its rows_of} without the base."""
    labels = dict.fromkeys(row["label"] for row in report["rows"] if "spread" in row)
    return {label: rows_of(report, label) for label in labels}


def best_point(curve):
    """The evaluation whose checkpoint was kept as the best."""
    return max(curve, key=lambda point: point["measures"]["reward_mean"])


def rows_of(report, label):
    """{set: row} of a method."""
    return {row["set"]: row for row in report["rows"] if row["label"] == label}


def draw(report, path):
    """docs/methods.png: reward while training by the share of the work and by videos scored; reward against fidelity."""
    figure = Figure(figsize=(17, 5))
    work, queries, judge = figure.subplots(1, 3)
    for row in report["rows"]:
        if row["set"] == "curve" and len(row["curves"]) > 1:
            shares = [point["step"] / row["curves"][0][-1]["step"] for point in row["curves"][0]]
            reward, fidelity = ([sum(curve[i]["measures"][key] for curve in row["curves"]) / len(row["curves"])
                                 for i in range(len(shares))] for key in ("reward_mean", "fidelity"))
            work.plot(shares, reward, marker="o", label=row["label"])
            queries.plot(row["videos_scored"], reward, marker="o")
            judge.plot(reward, fidelity, marker="o", label=row["label"])
    work.set(title="in_domain while training, mean of the seeds", xlabel="share of the work", ylabel="reward")
    queries.set(title="the same by what the reward was asked", xlabel="videos scored", ylabel="reward")
    judge.set(title="does the judge agree? each line starts at the base", xlabel="reward", ylabel="judge: fidelity")
    judge.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, .5))
    figure.tight_layout()
    with write_whole(path) as hidden:
        figure.savefig(hidden, dpi=90, format="png")
