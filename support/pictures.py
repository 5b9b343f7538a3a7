"""What people look at: strips of frames, contact sheets, a moving before/after, curves, tables. Letters: n videos, F frames."""
import json
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch

from support.files import write_text, write_whole
from support.ranks import is_main_process, progress
from support.tables import json_numbers, number, with_error
from support.videos import to_pixels


def strip(video):
    """The middle frame of each quarter of a video side by side, enlarged if small: (F, 3, H, W) -> (H', W', 3) uint8."""
    F = len(video)
    frames = to_pixels(video[[F // 8, 3 * F // 8, 5 * F // 8, 7 * F // 8]])
    zoom = max(1, 96 // frames.shape[2])
    frames = frames.repeat(zoom, 1).repeat(zoom, 2)
    frames = np.pad(frames, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255)  # a white line between frames
    return np.pad(np.hstack(frames), ((0, 0), (0, 14), (0, 0)), constant_values=255)


def words(text, width, height=22, font_size=15):
    """Text on white, as a picture (height, width, 3) uint8."""
    from PIL import Image, ImageDraw, ImageFont
    picture = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(font_size)
    ImageDraw.Draw(picture).text((2, height // 2 - 2), text, fill="#222222", font=font, anchor="lm", spacing=1)
    return np.asarray(picture)


def contact_sheet(columns, captions, titles):
    """Strips in a grid with words on it: columns [k] of videos (n, F, 3, H, W), captions [n], titles [k] -> uint8 (H', W', 3)."""
    rows = []
    for videos, caption in zip(zip(*columns), captions):
        strips = [strip(video) for video in videos]
        rows.append(np.hstack(strips))
        rows.append(words(caption, rows[0].shape[1]))
    return np.vstack([np.hstack([words(title, strips[0].shape[1]) for title in titles]), *rows])


def write_png(path, pixels):
    """Save (H, W, 3) uint8, whole or not at all."""
    from PIL import Image  # not imageio, which on a full disk prints a second error when it is collected
    with write_whole(path) as hidden:
        Image.fromarray(pixels).save(hidden, format="PNG")


def write_comparison_gif(path, rows, captions, titles, fps, tile=112):
    """Videos that play side by side: rows [k] of videos [n], each (F, H, W, 3) uint8, captions [n] below, titles [k] beside."""
    from PIL import Image
    below = [words("", 54, 36), *(words("\n".join(wrap(caption, 17)[:2]), tile + 4, 36, 13) for caption in captions)]
    frames = []
    for f in range(len(rows[0][0])):
        lines = []
        for title, row in zip(titles, rows):
            line = [words(title, 54, tile + 4, 13)]
            for video in row:
                small = Image.fromarray(video[f]).resize((tile, tile), Image.Resampling.NEAREST)
                line.append(np.pad(small, ((0, 4), (0, 4), (0, 0)), constant_values=255))
            lines.append(np.hstack(line))
        picture = Image.fromarray(np.vstack([*lines, np.hstack(below)]))
        frames.append(picture.quantize(128, dither=Image.Dither.NONE))  # which keeps the file small
    with write_whole(path) as hidden:
        frames[0].save(hidden, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


def markdown(rows):
    """A table whose first row is its head, with columns aligned, as it is read on a terminal too."""
    columns = []
    for column in zip(*rows):
        cells = [str(cell) for cell in column]
        width = max(map(len, cells))
        cells.insert(1, "-" * width)
        columns.append([cell.ljust(width) for cell in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*columns))


def new_figure(panels, columns, panel_size):
    """A matplotlib figure of so many panels in so many columns, each of a size in inches; and the axes of each."""
    from matplotlib.figure import Figure  # not pyplot: no window system is wanted
    columns = min(panels, columns)
    rows = -(-panels // columns)
    figure = Figure(figsize=(panel_size[0] * columns, panel_size[1] * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def write_figure(path, figure):
    """Save a matplotlib figure as a PNG, whole or not at all."""
    with write_whole(path) as hidden:
        figure.savefig(hidden, dpi=110, format="png")


def draw_curves(lines, reward_name, path, watched=(), turn=None):
    """
    curves.png from the lines of metrics.jsonl: the reward of the training videos, step by step, and of videos from pure noise,
    with the judge's measures if there are any, and what is watched. turn: the step at which that turned, or None.
    """
    training = [line for line in lines if line.get("reward") is not None]
    evals = [line for line in lines if "eval" in line]
    curves = {}  # {measure: {set: its mean at each evaluation}}
    for set_name, measures in evals[0]["eval"].items():
        for measure in measures:
            curves.setdefault(measure, {})[set_name] = [number(line["eval"][set_name].get(measure)) for line in evals]

    panels = [("videos of the training steps", reward_name, {"each step": [line["reward"] for line in training]}),
              ("videos from pure noise", reward_name, curves["reward_mean"])]
    judged = [k for k in ("watermark", "colour", "shape", "direction", "fidelity") if k in curves]
    if judged:
        means = {k: np.mean(list(curves[k].values()), axis=0) for k in judged}
        panels.append(("the same videos, by the judge", "mean over the sets", means))
    panels += [("watched, videos from pure noise", k, curves[k]) for k in watched]

    figure, axes = new_figure(len(panels), 4, (5, 3.6))
    for axis, (title, ylabel, shown) in zip(axes, panels):
        steps = [line["step"] for line in (training if axis is axes[0] else evals)]
        for label, values in shown.items():
            axis.plot(steps, values, marker=".", label=label)
        if turn is not None and axis is not axes[0]:
            axis.axvline(turn, color="#c00000", lw=1, ls=":", label="turned")
        axis.set(title=title, xlabel="step", ylabel=ylabel)
        axis.locator_params("x", integer=True)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, .5))  # beside, where it hides nothing
    write_figure(path, figure)


def draw_gains(panels, path):
    """
    Panels (rows, measure, words below it), side by side: how much each row changed the measure, with the error of that.
    rows: {label, set, differences {measure: (change, its error over prompts)}, error {measure: the one to draw}}. Colours tell
    prompt sets apart. Rows without an error, and those of all sets together, are left out. All panels have the same labels.
    """
    figure, axes = new_figure(len(panels), 2, (4.6, 2.6) if len(panels) > 1 else (8, 4.8))
    for axis, (rows, measure, below) in zip(axes, panels):
        by_set = {}
        labels = []
        for row in rows:
            if measure in row["error"] and row["set"] != "all":
                by_set.setdefault(row["set"], []).append(row)
                if row["label"] not in labels:
                    labels.append(row["label"])
        for i, (set_name, drawn) in enumerate(by_set.items()):
            heights = [labels.index(row["label"]) + 0.5 * ((i + 0.5) / len(by_set) - 0.5) for row in drawn]
            gains = [row["differences"][measure][0] for row in drawn]
            errors = [row["error"][measure] for row in drawn]
            axis.errorbar(gains, heights, xerr=errors, fmt="o", ms=4, capsize=2, label=set_name)
        axis.axvline(0, color="k", lw=0.8)
        axis.set(xlabel=below, yticks=range(len(labels)), yticklabels=labels if axis is axes[0] else [])
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.locator_params("x", nbins=6)
        axis.grid(axis="x", lw=0.4)
        if len(by_set) > 1:
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    write_figure(path, figure)


# ---------------------------------------------------------------------------------------------------------------------
# What evaluate.py writes: table.json, table.md and a contact sheet.

def versions():
    """What numbers depend on beside the command; "commit" is of the repository that this file lies in, if it lies in one."""
    known = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    with suppress(PackageNotFoundError):
        known["diffusers"] = version("diffusers")
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        with suppress(OSError):  # no git here
            command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            known["commit"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return known


def evaluation_bar(sets, settings, models):
    """
    A progress bar; before it, rank 0 says how much there is to do. settings: each (D, guidance).

    It counts denoising steps, as a video with D = 50 takes longer than one with 20, so that the time it promises is right.
    """
    videos = sum(map(len, sets.values()))
    chains, scales = (sorted(set(values)) for values in zip(*settings))
    steps = len(models) * sum(num_steps for num_steps, _ in settings)
    if is_main_process():
        print(f"{videos} prompts in {len(sets)} sets, by {' and '.join(models)}, with D = {', '.join(map(str, chains))} and "
              f"guidance {', '.join(f'{scale:g}' for scale in scales)}: {videos * len(models) * len(settings)} videos, "
              f"{videos * steps} denoising steps", flush=True)
    return progress(None, "evaluating", videos * steps, shared=True)


def as_markdown(results, reward_name):
    """The rows of table.json as a table: one line a set, D, guidance and model, differences against the base of that line."""
    measures = [k for k in results[0]["measures"] if k not in ("reward_mean", "reward_std", "n")]
    rows = [["set", "D", "guidance", "model", "n", f"{reward_name} mean ± std over videos", "difference ± error over prompts",
             *measures]]
    for row in results:
        m = row["measures"]
        difference = with_error(*row["differences"]["reward"], sign="+") if "differences" in row else ""
        rows.append([row["set"], row["num_steps"], f"{row['guidance']:g}", row["model"], m["n"],
                     with_error(m["reward_mean"], m["reward_std"]), difference, *(f"{m[k]:.3f}" for k in measures)])
    return markdown(rows)


def save_evaluation(cfg, results, sheets, sets, models, reward_name, apart):
    """
    Write the report into cfg.out and print its table. results: rows of set, num_steps, guidance, model, measures, differences.

    sheets: {set: [videos (k, F, 3, H, W) of each model]}. apart: distances from the hpsv2 package's own scores, if it was asked.
    """
    report = {"command": shlex.join(["python", "evaluate.py", *sys.argv[1:]]), "reward": reward_name, "seed": cfg.seed,
              "versions": versions(), "results": results}
    table = as_markdown(results, reward_name)
    if apart:
        report["official_hps_distance"] = max(apart)
        table += f"\nThe hpsv2 package's own scores differ by at most {max(apart):.1e} on {len(apart)} videos.\n"
    write_text(cfg.out / "table.json", json.dumps(json_numbers(report), indent=1) + "\n")
    write_text(cfg.out / "table.md", table)
    if cfg.sheet:
        columns = [torch.cat(of_sets) for of_sets in zip(*sheets.values())]
        captions = [caption for name in sheets for caption in sets[name][:cfg.sheet]]
        write_png(cfg.out / "sheet.png", contact_sheet(columns, captions, models))
    print(table)
    print(f"written: {cfg.out}/table.md, table.json{', sheet.png' if cfg.sheet else ''}")
