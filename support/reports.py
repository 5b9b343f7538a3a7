"""What evaluate.py writes: table.json, table.md and a contact sheet."""
import json
import platform
import shlex
import sys

import torch

from support.files import write_text
from support.pictures import contact_sheet, markdown, write_png
from support.progress import progress
from support.ranks import rank_and_size
from support.tables import json_numbers, with_error
from support.tradeoff import draw_tradeoff


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


def save_evaluation(cfg, results, sheets, sets, models, reward_name, apart, watched=()):
    """
    Write the report into cfg.out and print its table.

    results: rows of set, num_steps, guidance, model, measures and differences. sheets: {set: [videos (k, F, 3, H, W) of each
    model]}. sets: {set: prompts}. models: their names. apart: distances from the hpsv2 package's own scores, if it was asked.
    watched: names of measures; with several strengths of the adapter the reward is drawn against them.
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
        captions = [prompt for name in sheets for prompt in sets[name][:cfg.sheet]]
        write_png(cfg.out / "sheet.png", contact_sheet(columns, captions, models))
    if len(models) > 2:
        draw_tradeoff(json_numbers(results), reward_name, watched, cfg.out / "tradeoff.png")
    print(table)
    pictures = (", sheet.png" if cfg.sheet else "") + (", tradeoff.png" if len(models) > 2 else "")
    print(f"written: {cfg.out}/table.md, table.json{pictures}")
