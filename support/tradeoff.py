"""
What an adapter's strength trades, the reward that it gains against what videos lose: `evaluate.py --lora-scale 0 .5 1`.

Between the base (strength 0) and the adapter as trained (1) lie models that nobody trained, and beyond 1 others; often one of
them keeps most of the gain at a small part of the loss.
"""
from support.files import write_whole
from support.tables import number

SHOWN = ("watermark", "motion", "colour", "shape", "direction", "fidelity")  # of the tiny world's judge, if nothing is watched


def named_scales(scales):
    """{name of a model in tables: strength of the adapter}. Strength 0 among several is the base, which is always there."""
    if len(scales) == 1:
        return {"fine-tuned": scales[0]}
    return {f"scale {scale:g}": scale for scale in scales if scale != 0}


def draw_tradeoff(results, reward_name, watched, path):
    """
    tradeoff.png: the reward by strength, then against every watched measure, or the judge's where nothing is watched.

    results: evaluate.py's rows, of which those with the first D and guidance are drawn, a line for each set. Bars are standard
    errors of the paired difference from the base.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system is wanted
    first = results[0]
    rows = [row for row in results if (row["num_steps"], row["guidance"]) == (first["num_steps"], first["guidance"])]
    measures = [k for k in watched or SHOWN if k in first["measures"]]

    panels = 1 + len(measures)
    columns, lines = min(panels, 4), -(-panels // 4)
    figure = Figure(figsize=(4.2 * columns, 3.6 * lines))
    for place, measure in enumerate([None, *measures], 1):
        axis = figure.add_subplot(lines, columns, place)
        for name in dict.fromkeys(row["set"] for row in rows):
            points = [point(row, measure) for row in rows if row["set"] == name]
            points.sort()  # by strength
            scales, x, y, x_errors, y_errors = zip(*points)
            axis.errorbar(x, y, y_errors, x_errors if measure else None, marker="o", ms=4, lw=1, elinewidth=.6, label=name)
            for scale, a, b in zip(scales, x, y) if measure else ():
                axis.annotate(f"{scale:g}", (a, b), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set(xlabel=measure or "strength of the adapter", ylabel=reward_name)
        axis.locator_params(axis="x", nbins=5)
        axis.legend(fontsize=8)
    figure.tight_layout()
    with write_whole(path) as hidden:
        figure.savefig(hidden, dpi=110, format="png")


def point(row, measure):
    """(strength, x, y, error of x, error of y) of a row: the reward against a measure, or against the strength for None."""
    errors = {k: number(error) for k, (_, error) in row.get("differences", {}).items()}
    x = number(row["measures"][measure]) if measure else row["lora_scale"]
    return row["lora_scale"], x, number(row["measures"]["reward_mean"]), errors.get(measure, 0.), errors.get("reward", 0.)
