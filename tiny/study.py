"""
The studies in the tiny world: a few training runs each, measured on the same prompts and the same noise as the base.

    python -m tiny.study lambda tau    # run these studies, then write all tables and pictures
    python -m tiny.study report        # write the tables and pictures alone, from tiny/studies/*.json
    python -m tiny.study evolution     # draw docs/evolution.png, too_long.png, hacked.png and cheated.png from runs of their own

studies.csv lists the runs. Each is trained and measured once and kept in out/studies, so a study that was stopped goes on from
there when it is started again. Studies with one training seed show trends; the headline says how much seeds differ.
"""
import sys

if not __package__:
    print("study.py: start it from the folder of the repository as: python -m tiny.study", file=sys.stderr)
    sys.exit(2)

import csv
import importlib
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
from model import load_base
from support.files import read_json, write_json, write_text, write_whole
from support.pictures import markdown, new_figure, write_figure, write_png
from support.ranks import run_script
from support.run import read_metrics
from support.tables import column, json_numbers
from support.videos import to_pixels, write_video
from tiny import clips, world

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tiny" / "studies"
WORK = Path("out/studies")  # of runs and what they read; a run made with other weights has to be removed by hand

STUDIES = {}  # {name: its rows}. What no flag says is the default of the module, or of evaluate.py, in the tiny world.
with open(ROOT / "tiny" / "studies.csv", newline="", encoding="utf-8") as file:
    for row in csv.DictReader(file):
        STUDIES.setdefault(row["study"], []).append(row)


def run_study(name):
    """Train and measure what is missing of a study, and write its file: a row for each label, prompt set, D and guidance."""
    adapter = "best.safetensors" if name == "methods" else "lora.safetensors"  # the best checkpoint, or the last
    rows = []
    for planned in STUDIES[name]:
        reports = []
        for seed in planned["seeds"].split():
            run = trained(planned["module"], f"{planned['flags']} --seed {seed}")
            reports.append(evaluated(run, adapter, planned["flags of evaluate.py"]))
        for i, result in enumerate(reports[0]["results"]):  # of a prompt set, D and guidance
            if result["model"] != "base":
                pooled = over_seeds(planned["label"], [report["results"][i] for report in reports])
                rows.append(pooled | {"flags": planned["flags"], "PFLOP": planned.get("PFLOP")})
            elif planned is STUDIES[name][0]:  # the base is the same for all labels
                rows.append(result | {"label": "base"})
    report = {"command": f"python -m tiny.study {name}", "reward": reports[0]["reward"], "evaluation_seed": reports[0]["seed"],
              "versions": reports[0]["versions"], "rows": rows}
    write_json(RESULTS / f"{name}.json", json_numbers(report))


def over_seeds(label, rows):
    """Rows {measures, differences, ...} of several training seeds as one: means of measures, of gains and of the gains' errors,
    which the error over prompts of a mean over seeds does not exceed. "spread": each gain's standard deviation over the seeds."""
    pooled = {"label": label, "seeds": len(rows), "measures": {}, "differences": {}, "spread": {}}
    for key in rows[0]["measures"]:
        pooled["measures"][key] = column([row["measures"][key] for row in rows]).mean().item()
    for key in rows[0].get("differences", {}):
        gains, errors = map(column, zip(*[row["differences"][key] for row in rows]))
        pooled["differences"][key] = gains.mean().item(), errors.mean().item()
        pooled["spread"][key] = gains.std().item() if len(rows) > 1 else None
    return rows[0] | pooled


def folder_name(*words):
    """What a folder in WORK is called after the words of a command line."""
    return "-".join(words).replace("--", "").replace("/", "_")


def trained(module_name, flags):
    """The folder of the run with these flags. It is trained now, or continued, unless it is complete."""
    run = WORK / folder_name(module_name, *shlex.split(flags))
    if not (run / "done").exists():
        write_inputs(flags)
        argv = ["--eval-every", "0", *shlex.split(flags), "--out", str(run)]
        if status := train.main(argv, importlib.import_module(module_name)):
            sys.exit(status)
        (run / "done").touch()
    return run


def evaluated(run, adapter, flags):
    """evaluate.py's report of a run, made now if it is not there: base and tuned model on the same prompts and noise."""
    folder = run / "evaluated" / folder_name(adapter, *shlex.split(flags))  # which may be the adapter's own name
    if not (folder / "table.json").exists():
        write_inputs(flags)
        usual = ["--lora", str(run / adapter), "--out", str(folder), "--sheet", "0", "--num-steps", "20"]
        evaluate.main(tyro.cli(evaluate.Config, args=[*usual, *shlex.split(flags)]))
    return read_json(folder / "table.json")


@torch.no_grad()
def write_inputs(flags):
    """Write the prompts and the clips, with their captions, that flags name in WORK, unless they are there."""
    for word in shlex.split(flags):
        path = Path(word.rpartition("=")[2])
        if path.parent != WORK or path.exists():
            continue
        if path.suffix == ".txt":
            write_text(path, "\n".join(clips.prompt_sets()[path.stem]) + "\n")
        else:
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
            yield scenes[i].caption, base.decode_frames(z_0[None])[0]
    else:
        for i, scene in enumerate(scenes):
            yield scene.caption, world.make_clip(scene, clips.CLIP_SEED + i, {} if name == "clips-clean" else None)[0]


# The tables: {head of a column: template, which a line fills}. A line has a label's rows under the names of their prompt sets,
# and the first of them as "first". A column whose cells are all alike is left out.

def for_each(keys, template):
    """A column for each of several measures or prompt sets, which stands for KEY in the template."""
    return {key: template.replace("KEY", key) for key in keys}


SUMMARY = {  # of one label: a line for each of its rows
    "set": "{set}",
    "HPStiny": "{before[reward]:.2f} → {measures[reward_mean]:.2f} ({differences[reward][0]:+.3f} ± {error[reward]:.3f})",
    **for_each(("watermark", "motion", "fidelity", "direction"),
               "{before[KEY]:.2f} → {measures[KEY]:.2f} ({differences[KEY][0]:+.3f} ± {error[KEY]:.3f})")}
GAINS = {
    "gain of": "{label}", "D": "{first[num_steps]}", "guidance": "{first[guidance]:g}",
    **for_each(("in_domain", "new", "other"), "{KEY[differences][reward][0]:+.3f} ± {KEY[error][reward]:.3f}"),
    "spread over seeds": "{first[spread][reward]:.3f}"}
GAINS_AND_MEASURES = GAINS | {
    "gain of HPStiny": "{first[differences][HPStiny][0]:+.3f} ± {first[error][HPStiny]:.3f}",  # where it is not the reward
    **for_each(("left", "watermark", "motion", "fidelity", "colour", "direction"), "{first[measures][KEY]:.3f}"),
    "no motion": "{first[measures][static]:.3f}", "diversity": "{first[measures][pixel_diversity]:.4f}"}
TABLES = {"summary": ("headline", SUMMARY), "methods summary": ("methods", GAINS)}  # other markers are names of studies
PICTURES = {  # {file in docs: the (study, measure, words below) of each panel}
    "studies": [("headline", "reward", "what HPStiny gains, with its error over prompts")],
    "methods": [("methods", "reward", "what HPStiny gains, with the wider of its errors over prompts and over seeds")],
    "onestep": [("onestep_seeds", measure, below) for measure, below in (
        ("reward", "what HPStiny gains"), ("motion", "change of motion"), ("PFLOP", "PFLOP of such a run at full size"))],
    "rewards": [("rewards", "left", "change of the share of videos that move left"), ("rewards", "reward", "what HPStiny gains")]}


def read_rows(report):
    """The rows of a study's file, with each measure before the change, and the wider of the gain's two errors."""
    rows = []
    for row in report["rows"]:
        row = row | {"before": {}, "error": {}}
        for key, (gain, over_prompts) in row.get("differences", {}).items():
            if over_prompts is not None:  # of a single prompt it is not known
                over_seeds_error = (row.get("spread", {}).get(key) or 0) / row.get("seeds", 1) ** 0.5
                row["before"][key] = row["measures"]["reward_mean" if key == "reward" else key] - gain
                row["error"][key] = max(over_prompts, over_seeds_error)
        if row.get("PFLOP"):  # of the run's steps at full size
            row["differences"] = row["differences"] | {"PFLOP": (float(row["PFLOP"]), 0.)}
            row["error"]["PFLOP"] = 0.
        rows.append(row)
    return rows


def filled(template, row):
    """A column's template with a row's values, without the part behind "±" if that is not known, or "" if nothing is."""
    for part in (template, template.partition(" ± ")[0]):
        with suppress(KeyError, TypeError):
            return part.format_map(row)
    return ""


def study_table(name, report, columns):
    """Markdown: the command and what it measured on, then the rows. A column with one value has no place among them."""
    rows = read_rows(report)
    told = f"`python -m tiny.study {name}`, {rows[0]['measures']['n']:.0f} videos a row"
    if columns in (SUMMARY, GAINS):
        rows = [row for row in rows if row.get("seeds", 1) > 1]
    lines = {}
    for i, row in enumerate(rows):
        key = i if columns is SUMMARY else (row["label"], row["num_steps"], row["guidance"])
        lines.setdefault(key, row | {"first": row})[row["set"]] = row
    shown = {}
    for head, template in columns.items():
        cells = [filled(template, line) for line in lines.values()]
        if len({cell.partition(" ± ")[0] for cell in cells}) > 1:
            shown[f"gain of {report['reward']}" if head == "gain of" else head] = cells
        elif cells[0] and head in ("D", "guidance"):
            told += f", {head} {cells[0]}"
    table = markdown([list(shown), *zip(*shown.values())])
    return table if columns is GAINS else f"{told}:\n\n{table}"  # the README tells it in its own words


def write_report():
    """Replace what stands between the markers <!-- study NAME --> and <!-- end --> in the pages, and draw the pictures."""
    reports = {file.stem: read_json(file) for file in sorted(RESULTS.glob("*.json"))}
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for marker in [*reports, "summary", "methods summary"]:
        name, columns = TABLES.get(marker, (marker, GAINS_AND_MEASURES))
        start = f"<!-- study {marker} -->\n"
        for page in pages:
            before, found, rest = page.read_text().partition(start)
            if found:
                after = rest.partition("<!-- end -->")[2]
                write_text(page, f"{before}{start}{study_table(name, reports[name], columns)}<!-- end -->{after}")
                break
        else:
            raise ValueError(f"no page has the marker {start.strip()}")
    for picture, panels in PICTURES.items():
        drawn = [(read_rows(reports[name]), measure, below) for name, measure, below in panels]
        draw_gains(drawn, ROOT / "docs" / f"{picture}.png")


def draw_gains(panels, path):
    """Panels (rows, measure, words below it), side by side: each row's change of the measure, with its error. rows: {label, set,
    differences {measure: (change, ...)}, error {measure: its error}}; without an error, or of all sets together, left out."""
    figure, axes = new_figure(len(panels), len(panels), (9.2 / len(panels) + 0.8, 2.8) if len(panels) > 1 else (8, 4.8))
    for axis, (rows, measure, below) in zip(axes, panels):
        labels = []
        by_set = {}  # {set: [(place of the label, gain, error)]}
        for row in rows:
            if measure in row["error"] and row["set"] != "all":
                labels += [row["label"]] if row["label"] not in labels else []
                point = labels.index(row["label"]), row["differences"][measure][0], row["error"][measure]
                by_set.setdefault(row["set"], []).append(point)
        for i, (set_name, points) in enumerate(by_set.items()):
            places, gains, errors = np.array(points).T
            heights = places + 0.5 * ((i + 0.5) / len(by_set) - 0.5)
            axis.errorbar(gains, heights, xerr=errors, fmt="o", ms=4, capsize=2, label=set_name)
        axis.axvline(0, color="k", lw=0.8)
        axis.set(xlabel=below, yticks=range(len(labels)), yticklabels=labels if axis is axes[0] else [])
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.locator_params("x", nbins=5)
        axis.grid(axis="x", lw=0.4)
        if len(by_set) > 1:
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    write_figure(path, figure)


def draw_evolution():
    """docs/evolution.png, too_long.png and hacked.png: the same videos at several steps of a run; and cheated.png."""
    for name, flags, steps in (
            ("evolution", "10", range(0, 50, 10)), ("too_long", "40 --steps 200 --lr 0.01", (0, 40, 200)),
            ("hacked", "40 --base tiny-wan --lr 0.002 --anchor 0 --reward proxy", (0, 40))):
        samples = trained("train", f"--eval-count 2 --eval-every {flags}") / "samples"
        pictures = [iio.imread(samples / f"step_{step:06d}.png") for step in steps]
        write_png(ROOT / "docs" / f"{name}.png", np.concatenate(pictures, axis=1))
    draw_cheated()


def draw_cheated():
    """docs/cheated.png: what runs maximise, what they do not, and how well shapes are drawn, without an anchor and with it."""
    figure, axes = new_figure(3, 3, (3.4, 2.8))
    titles = {"reward_mean": "HPSproxy, maximised", "HPStiny": "HPStiny, watched", "fidelity": "fidelity, by the judge"}
    for anchor in ("0", "0.02"):
        looked_at = "--eval-count 8 --eval-every 20 --watch hpsv2"
        run = trained("train", f"--base tiny-wan --reward proxy --lr 2e-3 --steps 120 --anchor {anchor} {looked_at}")
        lines = [line for line in read_metrics(run / "metrics.jsonl") if "eval" in line]
        for axis, (measure, title) in zip(axes, titles.items()):
            means = {}
            for line in lines:
                means[line["step"]] = fmean(of_set[measure] for of_set in line["eval"].values())
            axis.plot(means.keys(), means.values(), ".-", label=f"--anchor {anchor}")
            axis.set(title=title, xlabel="step")
            axis.grid(lw=0.4)
    axes[0].legend(frameon=False)
    write_figure(ROOT / "docs" / "cheated.png", figure)


def main(studies: tyro.conf.Positional[tuple[Literal[(*STUDIES, "evolution", "report")], ...]] = ()):
    """What the command line asks for, in its order, then all tables and pictures."""
    for name in studies:
        if name != "report":
            draw_evolution() if name == "evolution" else run_study(name)
    write_report()


if __name__ == "__main__":
    run_script("study.py", lambda: tyro.cli(main, description=__doc__, prog="python -m tiny.study"))
