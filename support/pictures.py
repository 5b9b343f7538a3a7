"""What people look at: strips of frames, contact sheets, a moving before/after, curves, tables. Letters: n videos, F frames."""
import json
import platform
import shlex
import subprocess
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from support.files import write_text, write_whole
from support.ranks import is_main_process, progress
from support.tables import best_middle_worst, json_numbers, or_nan, with_error
from support.videos import read_video, to_pixels

INK, RISES, FALLS = "#222222", "#0a7d33", "#c0262d"  # colours of words, and of rewards that rise or fall


def strip(pixels):
    """The middle frame of each quarter of a video side by side, enlarged if small: (F, H, W, 3) -> (H', W', 3) uint8."""
    F = len(pixels)
    frames = pixels[[F // 8, 3 * F // 8, 5 * F // 8, 7 * F // 8]]
    zoom = max(1, 96 // frames.shape[1])
    frames = frames.repeat(zoom, 1).repeat(zoom, 2)
    frames = np.pad(frames, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255)  # a white line between frames
    return np.hstack(frames)


def text_line(text, width, height=22, font_size=15):
    """Text on white, as a picture (height, width, 3) uint8."""
    from PIL import Image, ImageDraw, ImageFont
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).text((2, height // 2 - 2), text, INK, ImageFont.load_default(font_size), anchor="lm")
    return np.asarray(picture)


def contact_sheet(columns, captions, titles):
    """Strips in a grid with words on it: columns [k] of videos (n, F, 3, H, W), captions [n], titles [k] -> uint8 (H', W', 3)."""
    lines = []
    for videos, caption in zip(zip(*columns), captions):
        strips = []
        for video in videos:
            strips.append(np.pad(strip(to_pixels(video)), ((0, 0), (0, 14), (0, 0)), constant_values=255))
        lines += [np.hstack(strips), text_line(caption, sum(picture.shape[1] for picture in strips))]
    head = [text_line(title, strips[0].shape[1]) for title in titles]
    return np.vstack([np.hstack(head), *lines])


def write_png(path, pixels):
    """Save (H, W, 3) uint8, whole or not at all."""
    from PIL import Image  # not imageio, which on a full disk prints a second error when it is collected
    with write_whole(path) as hidden:
        Image.fromarray(pixels).save(hidden, format="PNG")


@dataclass(frozen=True)
class Comparison:
    """A prompt's videos before and after training, (F, H, W, 3) uint8 each, with their rewards."""
    label: str
    prompt: str
    rewards: tuple
    videos: list


def choose_comparisons(prompts, rewards, files):
    """The best, the middle and the worst gain among the videos on disk: prompts [n], rewards and files [n] of (before, after)."""
    gains = {}
    for i, (before, after) in enumerate(files):
        if before.is_file() and after.is_file():
            gains[i] = rewards[i][1] - rewards[i][0]
    chosen = []
    for label, i in best_middle_worst(gains).items():
        chosen.append(Comparison(f"{label} gain of {len(gains)}", prompts[i], rewards[i], list(map(read_video, files[i]))))
    return chosen


def draw_comparison(pair, look):
    """
    Before and after with gain, prompt and rewards, and a coloured frame round the one with the higher reward: (H, W, 3) uint8.

    look(pixels of a video) -> the picture that is shown of it.
    """
    from PIL import Image, ImageDraw, ImageFont
    height, width, _ = look(pair.videos[0]).shape
    width = round(width * 96 / height)
    height = 96
    gain = round(pair.rewards[1] - pair.rewards[0], 4) + 0.  # never -0
    colour = RISES if gain > 0 else FALLS if gain < 0 else INK
    picture = Image.new("RGB", (2 * width + 32, height + 76), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((2, 0), f"{pair.label}: {gain:+.4f}", colour, ImageFont.load_default(15))
    draw.text((2, 19), textwrap.shorten(pair.prompt, width // 3, placeholder="..."), INK, ImageFont.load_default(14))
    for i, pixels in enumerate(pair.videos):
        left = i * (width + 12)
        is_higher = gain > 0 if i else gain < 0
        draw.rectangle((left, 39, left + width + 5, 44 + height), colour if is_higher else "white")
        picture.paste(Image.fromarray(look(pixels)).resize((width, height), Image.Resampling.BOX), (left + 3, 42))
        draw.text((left + 2, 46 + height), f"{('before', 'after')[i]} {pair.rewards[i]:.4f}", INK, ImageFont.load_default(14))
    return np.asarray(picture)


def draw_comparisons(chosen, title, per_line, look):
    """{name of a set: [Comparison]} in lines of `per_line`, as (H, W, 3) uint8; look as draw_comparison has it."""
    lines = []
    for name, pairs in chosen.items():
        cells = [draw_comparison(pair, look) for pair in pairs]
        width = per_line * cells[0].shape[1]
        lines.append(text_line(name, width, 30, 17))
        for i in range(0, len(cells), per_line):
            line = np.hstack(cells[i:i + per_line])
            lines.append(np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255))
    return np.vstack([text_line(title, width, 30, 14), *lines])


def write_comparisons(path, chosen, title, fps):
    """A .png with a few frames of each pair, and beside it a .gif in which they move. chosen: {name of a set: [Comparison]}."""
    from PIL import Image
    write_png(path, draw_comparisons(chosen, title, 1, strip))
    frames = []
    for f in range(len(next(iter(chosen.values()))[0].videos[0])):
        frames.append(draw_comparisons(chosen, title, 3, lambda pixels, f=f: pixels[f]))
    # With one palette for all frames what does not change costs nothing, and the file is a third smaller.
    palette = Image.fromarray(np.vstack(frames)).quantize(96, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    frames = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with write_whole(path.with_suffix(".gif")) as hidden:
        frames[0].save(hidden, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


def markdown(rows):
    """A table whose first row is its head, with columns aligned, as it is read on a terminal too."""
    columns = []
    for column in zip(*rows):
        cells = list(map(str, column))
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
    curves.png from the lines of metrics.jsonl: whether the reward rises in training and on held-out prompts, and what the judge
    and what is watched say to that. Series that never change are left out. turn: the step at which what is watched turned.
    """
    trained, rewards = [], []  # steps and their rewards
    evaluated, curves = [], {}  # steps with an evaluation, and {measure: {set: its mean at each}}
    for line in lines:
        if line.get("reward") is not None:
            trained.append(line["step"])
            rewards.append(line["reward"])
        if "eval" in line:
            evaluated.append(line["step"])
            for set_name, means in line["eval"].items():
                for measure, mean in means.items():
                    curves.setdefault(measure, {}).setdefault(set_name, []).append(or_nan(mean))

    window = max(1, min(50, len(rewards) // 4))  # single steps differ by their clips; their running mean shows the trend
    sums = np.cumsum([0, *rewards])
    running_mean = (sums[window:] - sums[:-window]) / window
    judged = {}
    for measure in ("watermark", "colour", "shape", "direction", "fidelity"):
        if measure in curves:
            judged[measure] = np.mean(list(curves[measure].values()), axis=0)
    panels = {f"{reward_name} in training": {"each step": rewards, f"mean of {window} steps": running_mean},
              f"{reward_name} of held-out prompts": curves["reward_mean"],
              "the judge on held-out prompts, mean of all sets": judged}
    for name in watched:
        panels[f"{name} of held-out prompts (watched)"] = curves[name]
    for title, series in list(panels.items()):
        for label, values in list(series.items()):
            if len(values) != 1 and np.unique(values).size < 2:
                del series[label]
        if not series:
            del panels[title]

    figure, axes = new_figure(len(panels), 2, (5, 3.6))
    for axis, (title, series) in zip(axes, panels.items()):
        steps = trained if "each step" in series else evaluated
        for label, values in series.items():
            axis.plot(steps[-len(values):], values, "." if label == "each step" else ".-", label=label)
        if turn is not None and steps is evaluated:
            axis.axvline(turn, color=FALLS, lw=1, ls=":", label="turned")
        axis.set(title=title, xlabel="step")
        axis.locator_params("x", integer=True)
        axis.grid(lw=.3)
        axis.legend(loc="upper center", bbox_to_anchor=(.5, -.16), ncols=3, frameon=False)  # below, where it hides nothing
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


def evaluation_text(results, reward_name):
    """
    The rows of table.json as Markdown tables that fit a terminal of 100 columns, as many as that takes.

    A line is a set, D, guidance and model; a gain is over the base of the same set, D and guidance.
    """
    columns = {}
    for row in results:
        measures = dict(row["measures"])
        reward = with_error(measures.pop("reward_mean"), measures.pop("reward_std"))
        gain = with_error(*row["differences"]["reward"], "+") if "differences" in row else ""
        cells = {"set": row["set"], "D": row["num_steps"], "guidance": f"{row['guidance']:g}", "model": row["model"],
                 "n": measures.pop("n"), f"{reward_name} ± std": reward, "gain ± error": gain} | measures
        for name, cell in cells.items():
            columns.setdefault(name, [name]).append(f"{cell:.3f}" if name in measures else cell)

    text = ""
    keys, others = list(columns.values())[:4], list(columns.values())[4:]
    shown = list(keys)
    for column in others:
        if len(shown) > len(keys) and markdown(zip(*shown, column)).index("\n") > 100:
            text += markdown(zip(*shown)) + "\n"
            shown = list(keys)
        shown.append(column)
    return text + markdown(zip(*shown))


def save_evaluation(cfg, results, sheets, sets, models, reward_name, official_gaps):
    """
    Write the report into cfg.out and print its tables. results: rows of set, num_steps, guidance, model, measures, differences.

    sheets: {set: [videos (k, F, 3, H, W) of each model]}. official_gaps: distances from the hpsv2 package's own scores, if asked.
    """
    report = {"command": shlex.join(["python", "evaluate.py", *sys.argv[1:]]), "reward": reward_name, "seed": cfg.seed,
              "versions": versions(), "results": results}
    text = evaluation_text(results, reward_name)
    if official_gaps:
        report["official_hps_distance"] = max(official_gaps)
        text += f"\nThe hpsv2 package's own scores differ by at most {max(official_gaps):.1e} on {len(official_gaps)} videos.\n"
    write_text(cfg.out / "table.json", json.dumps(json_numbers(report), indent=1) + "\n")
    write_text(cfg.out / "table.md", text)
    if cfg.sheet:
        columns = [torch.cat(of_sets) for of_sets in zip(*sheets.values())]
        captions = []
        for name in sheets:
            captions += sets[name][:cfg.sheet]
        write_png(cfg.out / "sheet.png", contact_sheet(columns, captions, models))
    print(text)
    print(f"written: {cfg.out}/table.md, table.json{', sheet.png' if cfg.sheet else ''}")
