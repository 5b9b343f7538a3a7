"""What evaluate.py writes: table.json, table.md and a contact sheet."""
import json
import platform
import shlex
import sys

import torch

from support.files import write_text
from support.pictures import contact_sheet, markdown, write_png


def versions():
    """What numbers depend on beside the command."""
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}


def as_markdown(results, reward_name):
    """The rows of table.json as a table: one line a set, D, guidance and model, differences against the base of that line."""
    measures = [k for k in results[0]["measures"] if k not in ("reward_mean", "reward_std", "n")]
    rows = [["set", "D", "guidance", "model", "n", f"{reward_name} mean ± std", "paired difference", *measures]]
    for row in results:
        m = row["measures"]
        difference = "{:+.4f} ± {:.4f}".format(*row["difference"]) if "difference" in row else ""
        rows.append([row["set"], row["num_steps"], f"{row['guidance']:g}", row["model"], m["n"],
                     f"{m['reward_mean']:.4f} ± {m['reward_std']:.4f}", difference, *(f"{m[k]:.3f}" for k in measures)])
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
    write_text(cfg.out / "table.json", json.dumps(report, indent=1) + "\n")
    write_text(cfg.out / "table.md", table)
    if cfg.sheet:
        columns = [torch.cat([videos[k] for videos in sheets.values()]) for k in range(len(models))]
        captions = [prompt for name in sheets for prompt in sets[name][:cfg.sheet]]
        write_png(cfg.out / "sheet.png", contact_sheet(columns, captions, models))
    print(table)
    print(f"written: {cfg.out}/table.md, table.json" + (", sheet.png" if cfg.sheet else ""))
