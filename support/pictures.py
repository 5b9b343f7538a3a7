"""
What a person looks at: strips of frames, contact sheets, a moving before/after, curves, tables.

Letters: n videos, F frames, H and W pixel rows and columns.
"""
import json
import platform
import shlex
import sys

import torch
import torch.nn.functional as F_

from support.files import write_text, write_whole
from support.ranks import progress, rank_and_size
from support.tables import json_numbers, number, with_error


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
    from PIL import Image  # not imageio, which on a full disk prints a second error when it is collected
    with write_whole(path) as hidden:
        Image.fromarray(pixels).save(hidden, format="PNG")


def write_comparison_gif(path, rows, captions, titles, fps, tile=112):
    """
    Videos that play side by side: rows [k] of videos [n], each (F, H, W, 3) uint8, captions [n] below, titles [k] beside.

    tile: side of each video in pixels. Colours are reduced to 128, without dithering, which keeps the file small.
    """
    from PIL import Image, ImageDraw, ImageFont
    font, margin, line, gap = ImageFont.load_default(13), 54, 36, 4
    frames = []
    for f in range(min(len(video) for row in rows for video in row)):
        picture = Image.new("RGB", (margin + len(captions) * (tile + gap), len(rows) * (tile + gap) + line), "white")
        draw = ImageDraw.Draw(picture)
        for y, row in enumerate(rows):
            draw.text((2, y * (tile + gap) + tile // 2 - 8), titles[y], fill="black", font=font)
            for x, video in enumerate(row):
                shown = Image.fromarray(video[f]).resize((tile, tile), Image.Resampling.NEAREST)
                picture.paste(shown, (margin + x * (tile + gap), y * (tile + gap)))
        for x, caption in enumerate(captions):
            words = two_lines(caption, font, tile)
            draw.text((margin + x * (tile + gap), len(rows) * (tile + gap)), words, fill="#444444", font=font, spacing=1)
        frames.append(picture.quantize(128, dither=Image.Dither.NONE))
    with write_whole(path) as hidden:
        frames[0].save(hidden, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


def two_lines(text, font, width):
    """As many words as fit on a line of `width` pixels, the rest below, cut off where that is full too."""
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines[:2])


def markdown(rows):
    """A table whose first row is its head, with columns aligned, as it is read on a terminal too."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * w for w in widths])
    return "".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |\n" for row in rows)


def draw_curves(lines, reward_name, path, watched=(), turn=None):
    """
    curves.png from the lines of metrics.jsonl: the reward of the training videos, step by step, and of videos from pure noise,
    with the judge's measures if there are any, and what is watched. turn: the step at which that turned, or None.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system is wanted
    steps = [line for line in lines if line.get("reward") is not None]
    evals = [line for line in lines if "eval" in line]
    first = next(iter(evals[0]["eval"].values()))
    judged = [k for k in ("watermark", "colour", "shape", "direction", "fidelity") if k in first]

    panels = (3 if judged else 2) + len(watched)
    columns, rows = min(panels, 4), -(-panels // 4)
    figure = Figure(figsize=(5 * columns, 3.6 * rows))
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    axes[0].plot([s["step"] for s in steps], [s["reward"] for s in steps], lw=1)
    axes[0].set(title="videos of the training steps", ylabel=reward_name)
    x = [e["step"] for e in evals]
    for name in evals[0]["eval"]:
        axes[1].plot(x, [number(e["eval"][name]["reward_mean"]) for e in evals], marker="o", label=name)
    axes[1].set(title="videos from pure noise", ylabel=reward_name)
    if judged:
        draw_judge(axes[2], x, [e["eval"] for e in evals], judged)
    for axis, k in zip(axes[panels - len(watched):], watched):
        for name in evals[0]["eval"]:
            axis.plot(x, [number(e["eval"][name].get(k)) for e in evals], marker="o", label=name)
        axis.set(title="watched, videos from pure noise", ylabel=k)
    for axis in axes[1:] if turn is not None else ():
        axis.axvline(turn, color="#c00000", lw=1, ls=":", label="turned")
    for a in axes:
        a.set_xlabel("step")
        a.xaxis.get_major_locator().set_params(integer=True)
        if a.get_legend_handles_labels()[1]:
            a.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, .5))  # beside, where it hides nothing
    figure.tight_layout()
    with write_whole(path) as hidden:
        figure.savefig(hidden, dpi=110, format="png")


def draw_judge(axis, x, evals, judged):
    """The judge's first measure for each prompt set, the others (from 0 to 1, more is better) over all sets."""
    for name in evals[0]:
        axis.plot(x, [number(sets[name][judged[0]]) for sets in evals], marker="o", label=f"{judged[0]}, {name}")
    for k in judged[1:]:
        mean = [sum(number(m[k]) for m in sets.values()) / len(sets) for sets in evals]
        axis.plot(x, mean, ls="--", label=f"{k}, all sets")
    axis.set(title="the same videos, by the judge", ylim=(-.02, 1.02), ylabel="judge")


def draw_gains(panels, path):
    """
    Panels (title, rows, measure), three side by side: how much each row changed the measure, with the error of that.

    rows: {label, set, num_steps, differences {measure: (change, its error over prompts)}, error {measure: the one to draw}}.
    Colours tell prompt sets and D apart. Rows without an error of the measure are left out.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system is wanted
    columns = min(3, len(panels))
    figure = Figure(figsize=(5.3 * columns, 4 * -(-len(panels) // 3)), layout="constrained")
    for place, (title, rows, measure) in enumerate(panels, 1):
        axis = figure.add_subplot(-(-len(panels) // 3), columns, place)
        rows = [row for row in rows if measure in row["error"]]
        labels = list(dict.fromkeys(row["label"] for row in rows))
        kinds = list(dict.fromkeys(f"{row['set']}, D = {row['num_steps']}" for row in rows))
        for i, kind in enumerate(kinds):
            alike = [row for row in rows if f"{row['set']}, D = {row['num_steps']}" == kind]
            places = [labels.index(row["label"]) + 0.6 * ((i + 0.5) / len(kinds) - 0.5) for row in alike]
            gains = [row["differences"][measure][0] for row in alike]
            errors = [row["error"][measure] for row in alike]
            axis.errorbar(gains, places, xerr=errors, fmt="o", ms=4, capsize=2, label=kind)
        axis.axvline(0, color="k", lw=0.8)
        axis.set(title=title, xlabel=f"change of {measure}", yticks=range(len(labels)), yticklabels=labels)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.margins(x=0.08)
        axis.grid(axis="x", lw=0.4)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    with write_whole(path) as hidden:
        figure.savefig(hidden, dpi=90, format="png")


# ---------------------------------------------------------------------------------------------------------------------
# What evaluate.py writes: table.json, table.md and a contact sheet.

def versions():
    """What numbers depend on beside the command."""
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}


def evaluation_bar(sets, settings, models):
    """
    A progress bar of this rank's share; before it, rank 0 says how much there is to do.

    sets: {set: prompts}. settings: each (D, guidance). It counts denoising steps, as a video with D = 50 takes longer than one
    with 20, so that the time that it promises is right from the start.
    """
    rank, world_size = rank_and_size()
    steps = len(models) * sum(num_steps for num_steps, _ in settings)
    videos = sum(len(prompts) for prompts in sets.values())
    if rank == 0:
        guidance = sorted({w for _, w in settings})
        print(f"{videos} prompts in {len(sets)} sets, by {' and '.join(models)}, with D = "
              f"{', '.join(map(str, sorted({d for d, _ in settings})))} and guidance {', '.join(f'{w:g}' for w in guidance)}: "
              f"{videos * len(models) * len(settings)} videos, {videos * steps} denoising steps", flush=True)
    mine = sum(len(prompts[rank::world_size]) for prompts in sets.values())
    return progress(None, "evaluating", mine * steps, unit="step", disable=rank > 0)


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
    Write the report into cfg.out and print its table.

    results: rows of set, num_steps, guidance, model, measures and differences. sheets: {set: [videos (k, F, 3, H, W) of each
    model]}. sets: {set: prompts}. models: their names. apart: distances from the hpsv2 package's own scores, if it was asked.
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
        columns = [torch.cat([videos[k] for videos in sheets.values()]) for k in range(len(models))]
        captions = []
        for name in sheets:
            captions += sets[name][:cfg.sheet]
        write_png(cfg.out / "sheet.png", contact_sheet(columns, captions, models))
    print(table)
    print(f"written: {cfg.out}/table.md, table.json{', sheet.png' if cfg.sheet else ''}")
