"""What people look at: strips of frames, contact sheets, a moving before/after, curves, tables. Letters: n videos, F frames."""
import platform
import shlex
import subprocess
import sys
import textwrap
from collections import namedtuple
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from support.files import write_json, write_text, write_whole
from support.ranks import is_main_process, progress
from support.tables import best_middle_worst, json_numbers, with_error
from support.videos import read_video, to_pixels

INK, RISES, FALLS = "#222222", "#0a7d33", "#c0262d"  # colours of words, and of rewards that rise or fall


def strip(pixels):
    """The middle frame of each quarter of a video side by side, enlarged if small: (F, H, W, 3) -> (H', W', 3) uint8."""
    F = len(pixels)
    frames = pixels[[F // 8, 3 * F // 8, 5 * F // 8, 7 * F // 8]]
    zoom = max(1, 96 // frames.shape[1])
    frames = frames.repeat(zoom, 1).repeat(zoom, 2)
    return np.hstack([widen(frame, frame.shape[1] + 2) for frame in frames])


def widen(picture, width):
    """A picture with white on its right."""
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)


def stacked(pictures):
    """Pictures below each other, all as wide as the widest."""
    width = max(picture.shape[1] for picture in pictures)
    return np.vstack([widen(picture, width) for picture in pictures])


def text_line(text, height=22, font_size=15, colour=INK):
    """Text on white, as a picture (height, W, 3) uint8."""
    font = ImageFont.load_default(font_size)
    picture = Image.new("RGB", (int(font.getlength(text)) + 4, height), "white")
    ImageDraw.Draw(picture).text((2, height // 2 - 2), text, colour, font, anchor="lm")
    return np.asarray(picture)


def contact_sheet(columns, captions, titles):
    """Strips in a grid with words on it: columns [k] of videos (n, F, 3, H, W), captions [n], titles [k] -> uint8 (H', W', 3)."""
    lines = []
    for videos, caption in zip(zip(*columns), captions):
        strips = [strip(to_pixels(video)) for video in videos]
        width = strips[0].shape[1] + 14
        lines += [np.hstack([widen(picture, width) for picture in strips]), text_line(caption)]
    return stacked([np.hstack([widen(text_line(title), width) for title in titles]), *lines])


def write_png(path, pixels):
    """Save (H, W, 3) uint8, whole or not at all."""
    with write_whole(path) as hidden:  # not by imageio, which on a full disk prints a second error when it is collected
        Image.fromarray(pixels).save(hidden, format="PNG")


# A prompt's videos before and after training, (F, H, W, 3) uint8 each, with their rewards.
Comparison = namedtuple("Comparison", "label prompt rewards videos")


def choose_comparisons(prompts, rewards, files):
    """The best, the middle and the worst gain among the videos on disk: prompts [n], rewards and files [n] of (before, after)."""
    gains = {}
    for i, (before, after) in enumerate(files):
        if before.is_file() and after.is_file():
            gains[i] = rewards[i][1] - rewards[i][0]
    return [Comparison(f"{label} gain of {len(gains)}", prompts[i], rewards[i], list(map(read_video, files[i])))
            for label, i in best_middle_worst(gains).items()]


def draw_comparison(pair, look):
    """Before and after with gain, prompt and rewards, as (H, W, 3) uint8. look(pixels of a video) -> the picture shown of it."""
    gain = round(pair.rewards[1] - pair.rewards[0], 4) + 0.  # never -0
    colour = RISES if gain > 0 else FALLS if gain < 0 else INK
    sides = []
    for name, pixels, reward, is_higher in zip(("before", "after"), pair.videos, pair.rewards, (gain < 0, gain > 0)):
        picture = Image.fromarray(look(pixels))
        picture = ImageOps.scale(picture, 96 / picture.height, Image.Resampling.BOX)
        framed = np.asarray(ImageOps.expand(picture, 3, colour if is_higher else "white"))
        sides.append(stacked([widen(framed, framed.shape[1] + 6), text_line(f"{name} {reward:.4f}", 30, 14)]))
    prompt = text_line(textwrap.shorten(pair.prompt, sum(side.shape[1] for side in sides) // 7, placeholder="..."), 20, 14)
    picture = stacked([text_line(f"{pair.label}: {gain:+.4f}", 19, 15, colour), prompt, np.hstack(sides)])
    return widen(picture, picture.shape[1] + 14)


def draw_comparisons(chosen, title, arrange, look):
    """{name of a set: [Comparison]} as (H, W, 3) uint8. arrange(pictures of a set) -> one; look: as draw_comparison has it."""
    lines = [text_line(title, 30, 14)]
    for name, pairs in chosen.items():
        lines += [text_line(name, 30, 17), arrange([draw_comparison(pair, look) for pair in pairs])]
    return stacked(lines)


def write_comparisons(path, chosen, title, fps):
    """A .png with a few frames of each pair, and beside it a .gif in which they move. chosen: {name of a set: [Comparison]}."""
    write_png(path, draw_comparisons(chosen, title, stacked, strip))
    frames = []
    for f in range(len(next(iter(chosen.values()))[0].videos[0])):
        frames.append(draw_comparisons(chosen, title, np.hstack, lambda pixels, f=f: pixels[f]))
    # With one palette for all frames what does not change costs nothing, and the file is a third smaller.
    palette = Image.fromarray(np.vstack(frames)).quantize(96, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    frames = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with write_whole(path.with_suffix(".gif")) as hidden:
        frames[0].save(hidden, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


def markdown(rows):
    """A table whose first row is its head, with columns aligned, as it is read on a terminal too."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "".join(f"| {' | '.join(map(str.ljust, row, widths))} |\n" for row in rows)


def new_figure(panels, columns, panel_size):
    """A matplotlib figure of `panels` panels in `columns` columns, each of panel_size inches; and the axes of each."""
    from matplotlib.figure import Figure  # not pyplot: no window system is wanted
    rows = -(-panels // columns)
    figure = Figure(figsize=(panel_size[0] * min(panels, columns), panel_size[1] * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, min(panels, columns), i + 1) for i in range(panels)]


def write_figure(path, figure):
    """Save a matplotlib figure as a PNG, whole or not at all."""
    with write_whole(path) as hidden:
        figure.savefig(hidden, dpi=110, format="png")


def draw_curves(lines, reward_name, path, watched=()):
    """curves.png from the lines of metrics.jsonl: whether the reward rises in training and on held-out prompts, and what the
    judge and what is watched say to that, without series that never change."""
    trained = [line for line in lines if line.get("reward") is not None]
    evaluated = [line for line in lines if "eval" in line]
    rewards = [line["reward"] for line in trained]
    curves = {}  # {measure: {set: its mean at each evaluation}}
    for line in evaluated:
        for set_name, means in line["eval"].items():
            for measure, mean in means.items():
                curves.setdefault(measure, {}).setdefault(set_name, []).append(np.float64(mean))  # None is nan

    window = max(1, min(50, len(rewards) // 4))  # single steps differ by their clips; their running mean shows the trend
    running_mean = rewards and np.convolve(rewards, np.full(window, 1 / window), "valid")
    names = [name for name in ("watermark", "colour", "shape", "direction", "fidelity") if name in curves]  # in the tiny world
    judged = {name: np.mean(list(curves[name].values()), axis=0) for name in names}
    panels = {f"{reward_name} in training": {"each step": rewards, f"mean of {window} steps": running_mean},
              f"{reward_name} of held-out prompts": curves["reward_mean"],
              "the judge on held-out prompts, mean of all sets": judged}
    panels |= {f"{name} of held-out prompts (watched)": curves[name] for name in watched}
    shown = {}
    for title, series in panels.items():
        changing = {name: values for name, values in series.items() if len(values) == 1 or np.unique(values).size > 1}
        if changing:
            shown[title] = changing
    if not shown:  # nothing has changed yet, or nothing is finite
        return

    figure, axes = new_figure(len(shown), 2, (5, 3.6))
    for axis, (title, series) in zip(axes, shown.items()):
        steps = [line["step"] for line in (trained if "each step" in series else evaluated)]
        for name, values in series.items():
            axis.plot(steps[-len(values):], values, "." if name == "each step" else ".-", label=name)
        axis.set(title=title, xlabel="step")
        axis.locator_params("x", integer=True)
        axis.grid(lw=.3)
        axis.legend(loc="upper center", bbox_to_anchor=(.5, -.16), ncols=3, frameon=False)  # below, where it hides nothing
    write_figure(path, figure)


# ---------------------------------------------------------------------------------------------------------------------
# What evaluate.py writes: table.json, table.md and a contact sheet.

def versions():
    """What numbers depend on beside the command; "commit" is of the repository that this file lies in, if it lies in one."""
    known = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
             "diffusers": version("diffusers")}
    root = Path(__file__).resolve().parent.parent
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):  # no git here; no repository
        known["commit"] = subprocess.check_output(["git", f"--git-dir={root}/.git", f"--work-tree={root}", *describe],
                                                  stderr=subprocess.DEVNULL, text=True).strip()
    return known


def evaluation_bar(sets, settings, models):
    """A progress bar of denoising steps; before it, rank 0 says how much there is to do. settings: each (D, guidance)."""
    videos = sum(map(len, sets.values())) * len(models)  # at each setting
    steps = videos * sum(num_steps for num_steps, _ in settings)
    if is_main_process():
        print(f"{videos * len(settings)} videos, {steps} denoising steps", flush=True)
    return progress(None, "evaluating", steps, shared=True)


def evaluation_text(results, reward_name):
    """The rows of table.json as Markdown tables, with three measures each, which fit a terminal of 100 columns."""
    columns = {}
    for row in results:
        measures = dict(row["measures"])
        cells = {"set": row["set"], "D": row["num_steps"], "guidance": f"{row['guidance']:g}", "model": row["model"],
                 "n": measures.pop("n"),
                 f"{reward_name} ± std": with_error(measures.pop("reward_mean"), measures.pop("reward_std")),
                 "gain ± error": with_error(*row["differences"]["reward"], "+") if "differences" in row else ""}
        for name, value in measures.items():
            cells[name] = f"{value:.3f}"
        for name, cell in cells.items():
            columns.setdefault(name, [name]).append(cell)

    keys, measures = list(columns.values())[:4], list(columns.values())[4:]
    return "\n".join(markdown(zip(*keys, *measures[i:i + 3])) for i in range(0, len(measures), 3))


def save_evaluation(cfg, results, sheets, sets, models, reward_name, official_gaps):
    """Write the report into cfg.out and print its tables. results: rows of set, num_steps, guidance, model, measures and
    differences. sheets: {set: [videos (k, F, 3, H, W) of each model]}. official_gaps: from the hpsv2 package's own scores."""
    report = {"command": shlex.join(["python", "evaluate.py", *sys.argv[1:]]), "reward": reward_name, "seed": cfg.seed,
              "versions": versions(), "results": results}
    text = evaluation_text(results, reward_name)
    if official_gaps:
        report["official_hps_distance"] = max(official_gaps)
        text += f"\nThe hpsv2 package's own scores differ by at most {max(official_gaps):.1e} on {len(official_gaps)} videos.\n"
    write_json(cfg.out / "table.json", json_numbers(report))
    write_text(cfg.out / "table.md", text)
    if cfg.sheet:
        columns = list(map(torch.cat, zip(*sheets.values())))
        captions = sum((sets[name][:cfg.sheet] for name in sheets), [])
        write_png(cfg.out / "sheet.png", contact_sheet(columns, captions, models))
    print(f"{text}\nwritten: {cfg.out}/table.md, table.json{', sheet.png' if cfg.sheet else ''}")
