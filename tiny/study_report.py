"""
The studies' tables and pictures, from the JSON files alone: what stands between markers in the READMEs and docs,
and docs/*.png.
"""
from pathlib import Path

from matplotlib.figure import Figure

from support.files import read_json, write_whole
from tiny import study_guard, study_methods, study_rewards
from tiny.lab import ROOT
from tiny.study_tables import as_summary, as_table

# Studies with a table and a picture of their own kind.
OWN = {"methods": study_methods, "guard": study_guard, "rewards": study_rewards}


def write_report(folder):
    """
    Replace what stands between markers <!-- study NAME --> and <!-- end --> in the pages, and draw the curves.

    folder: of the JSON files. ValueError if a study has no place in any.
    """
    reports = {file.stem: read_json(file) for file in sorted(folder.glob("*.json"))}
    tables = {name: (OWN[name].as_table if name in OWN else as_table)(report) for name, report in reports.items()}
    if "headline" in reports:
        tables["summary"] = as_summary(reports["headline"])
    if "methods" in reports:
        tables["methods summary"] = study_methods.as_summary(reports["methods"])
    pages = [ROOT / "README.md", ROOT / "tiny" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages = {page: page.read_text() for page in pages}
    for name, table in tables.items():
        start = f"<!-- study {name} -->"
        if not any(start in text for text in pages.values()):
            raise ValueError(f"{', '.join(map(str, pages))}: no marker {start}")
        for page, text in pages.items():
            if start in text:
                before, _, rest = text.partition(start)
                pages[page] = f"{before}{start}\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    draw_curves(reports, ROOT / "docs" / "studies.png")
    for name in set(reports) & set(OWN):
        OWN[name].draw(reports[name], ROOT / "docs" / f"{name}.png")
    for page, text in pages.items():
        with write_whole(page) as hidden:
            hidden.write_text(text)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def draw_curves(reports, path):
    """docs/studies.png: every seed of the headline, tau, lambda, and the run taken too far, by reward and judge."""
    figure = Figure(figsize=(15, 7))
    panels = figure.subplots(2, 2)
    drawings = {"headline": draw_seeds, "tau": draw_tau, "lambda": draw_lambda, "too_long": draw_too_long}
    for axis, (name, draw) in zip(panels.flat, drawings.items()):
        if name in reports:
            draw(axis, reports[name])
        else:
            axis.set_axis_off()
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as hidden:
        figure.savefig(hidden, dpi=90, format="png")


def gains(rows):
    """Paired differences of the reward, and their standard errors over prompts."""
    return [row["differences"]["reward"][0] for row in rows], [row["differences"]["reward"][1] for row in rows]


def draw_seeds(axis, report):
    """What each training seed gains on each prompt set."""
    sets = list(dict.fromkeys(row["set"] for row in report["rows"] if "spread" not in row))
    for i, name in enumerate(sets):
        rows = [row for row in report["rows"] if row["set"] == name and "differences" in row and "spread" not in row]
        axis.errorbar([j + .2 * (i - 1) for j in range(len(rows))], *gains(rows), marker="o", ls="", capsize=2, label=name)
    axis.axhline(0, color="k", lw=.8)
    axis.set(title="eight training seeds, the defaults (bars: error over prompts)", xlabel="training seed",
             ylabel="gain of reward")
    axis.legend()


def draw_tau(axis, report):
    """Edit ratios at equal steps and at equal time."""
    rows = [row for row in report["rows"] if "differences" in row]
    default = f"tau = {report['training']['tau']}"
    ratio = lambda row: float(row["label"].split(",")[0].split()[-1])
    steps = [row for row in rows if "time" not in row["label"]]
    time = sorted((row for row in rows if "time" in row["label"] or row["label"] == default), key=ratio)
    axis.errorbar([ratio(r) for r in steps], *gains(steps), marker="o", capsize=3, label="equal steps")
    axis.errorbar([ratio(r) + .01 for r in time], *gains(time), marker="s", ls="--", capsize=3, label="equal time")
    axis.set(title="edit ratio, one training seed (bars: error over prompts)", xlabel="tau", ylabel="gain of reward")
    axis.legend()


def draw_lambda(axis, report):
    """How fast weights fall off from the centre."""
    rows = [row for row in report["rows"] if "differences" in row]
    axis.errorbar([float(row["label"].split()[-1]) for row in rows], *gains(rows), marker="o", capsize=3)
    axis.set(title="weight towards the centre (TAR), one training seed (bars: error over prompts)", xlabel="lambda",
             ylabel="gain of reward")


def draw_too_long(axis, report):
    """Reward and judge of a run taken too far."""
    rows = report["rows"]
    x = [row["step"] for row in rows]
    axis.errorbar(x, [row["measures"]["reward_mean"] for row in rows], gains(rows)[1], color="k", lw=2, capsize=3, label="reward")
    styles = {"colour": "-.", "shape": "--", "direction": ":", "fidelity": "--", "motion": "-", "watermark": "-"}
    for k, style in styles.items():
        axis.errorbar(x, [row["measures"][k] for row in rows], [row["differences"][k][1] for row in rows], ls=style, capsize=2,
                      label=f"judge: {k}")
    axis.set(title="a run taken too far (bars: error of the change since step 0)", xlabel="step", ylim=(-.02, 1.02))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, .5))
