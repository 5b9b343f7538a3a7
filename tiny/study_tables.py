"""Rows of a study as Markdown, each ± with what it is over."""

MEASURES = ("watermark", "sharpness", "saturation", "noise", "motion", "fidelity", "steadiness", "colour", "shape", "direction",
            "static")
SUMMED_UP = ("watermark", "motion", "fidelity", "direction")
SHOWN = ("watermark", "motion", "fidelity", "steadiness", "colour", "shape", "direction", "static")


def conditions(report, of="of each set"):
    """What a table was made with, for the line above it."""
    return f"`{report['command']}`, {report['rows'][0]['measures']['n']} videos {of}, torch {report['versions']['torch']}:"


def as_table(report):
    """A study as Markdown: reward, paired difference, judge."""
    spread = any("spread" in row for row in report["rows"])
    head = ["", "set", "D", "guidance", f"{report['reward']} mean ± std over videos", "paired difference ± error over prompts",
            *(["spread over seeds"] if spread else []), *MEASURES]
    lines = []
    for row in report["rows"]:
        m, d = row["measures"], row.get("differences", {}).get("reward")
        cells = [row["label"], row["set"], row["num_steps"], f"{row['guidance']:g}",
                 f"{m['reward_mean']:.4f} ± {m['reward_std']:.4f}", "{:+.4f} ± {:.4f}".format(*d) if d else ""]
        if spread:
            cells.append(f"{row['spread']['reward']:.4f}" if row.get("spread") and row["spread"]["reward"] is not None else "")
        lines.append([*cells, *(f"{m[k]:.3f}" for k in MEASURES)])
    return "\n".join([conditions(report), "", *as_lines(head, lines)])


def as_summary(report):
    """
    The headline's pooled rows: before, after and paired difference of the reward and of the judge's measures.

    ± is the widest of the error over prompts and that over training seeds (their spread by the root of their number).
    """
    lines = []
    for row in report["rows"]:
        if "spread" in row:
            gain = row["differences"]["reward"][0] / row["base_std"]
            spread = row["spread"]["reward"]
            lines.append([row["set"], change(row, "reward", "reward_mean"), "" if spread is None else f"{spread:.3f}",
                          f"{gain:.2f}", *(change(row, k, k) for k in SUMMED_UP)])
    return "\n".join([conditions(report), "", *as_lines(
        ["set", report["reward"], "spread over seeds", "gain in base std", *SUMMED_UP], lines)])


def change(row, measure, key):
    """A measure before and after, the difference and its error."""
    after, d = row["measures"][key], row["differences"][measure][0]
    return f"{after - d:.2f} → {after:.2f} ({d:+.3f} ± {widest_error(row, measure):.3f})"


def widest_error(row, measure):
    """Of a difference, the standard error over prompts or that over training seeds, whichever is larger."""
    error, spread = row["differences"][measure][1], (row.get("spread") or {}).get(measure)
    return error if spread is None else max(error, spread / row["seeds"] ** .5)


def as_lines(head, rows):
    """Markdown table lines."""
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]
