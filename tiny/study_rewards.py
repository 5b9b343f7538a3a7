"""
Other rewards than the paper's in the tiny world, held against a judge that nothing optimises. Three training seeds of each; the
weights that are only there to be compared have one.

    python tiny/study.py rewards

1. An action beside the tiny world's HPS: "left" is wanted for every caption. The judge's share of videos that move left should
   rise from a quarter.
2. A removal: the watermark should go.
3. HPS alone, while the action, the removal and the judge watch.

Where a shape goes is settled in the first denoising steps, which the last one's gradient, the default, does not reach. So runs
with an action start from noise (methods/draft.py) and carry the gradient through the whole chain, which has 10 steps in
training, or a step would cost several times as much. Evaluations have the usual 20. docs/rewards.md says what else was tried.
"""
import copy
from dataclasses import replace

from matplotlib.figure import Figure

import train
from methods import draft
from reward import Mixture, load_reward
from support.files import write_whole
from tiny.judge import DIRECTIONS, load_judge
from tiny.study_tables import as_lines

SEEDS = (0, 1, 2)
WANTED = "left"
ACTION, REMOVAL = f"action:{WANTED}", "removal:watermark"
WEIGHTS = {"0.05": SEEDS[:1], "0.2": SEEDS}  # of the action beside HPS, and the seeds of each
CHAIN = ("--num-steps", "10", "--grad-steps", "10", "--lambda-tar", "0", "--lr", "0.003", "--steps", "180")


def groups():
    """{name: (module, flags of its training runs, their seeds)}."""
    return {
        **{f"HPS + {w} {ACTION}": (draft, ["--reward", "hpsv2", "--reward", f"{ACTION}={w}", *CHAIN], seeds)
           for w, seeds in WEIGHTS.items()},
        REMOVAL: (train, ["--reward", REMOVAL], SEEDS),
        "HPS": (train, [], SEEDS)}


def rewards(lab):
    """Lab -> rows: the base, then every run of every group; each row says its group and seed."""
    lab = watched(lab)
    rows = [lab.row("base", None, "in_domain") | {"group": "base"}]
    for group, (module, flags, seeds) in groups().items():
        for seed in seeds:
            run = lab.tune(*flags, "--seed", str(seed), module=module)
            rows.append(lab.row(f"{group}, seed {seed}", run, "in_domain") | {"group": group, "seed": seed})
    return rows


def watched(lab):
    """
    The same lab whose tables also have the action's and the removal's score and the judge's share of the wanted direction.

    It has a folder of its own, since tables that other studies made lack these.
    """
    mine = copy.copy(lab)
    mine.cfg, mine.models = replace(lab.cfg, work=lab.cfg.work / "rewards"), {}
    watching = [load_reward(kind, base_folder=lab.base.folder, device=lab.base.device) for kind in (ACTION, REMOVAL)]
    mine.reward = Mixture([(1., lab.reward)], watching)
    classifier = load_judge(lab.base.folder / "judge.safetensors").to(lab.base.device)

    def judge(clips, captions):
        said = classifier(clips)[2].argmax(dim=1).cpu()                                   # (B,)
        return lab.judge(clips, captions) | {WANTED: (said == DIRECTIONS.index(WANTED)).float()}

    mine.judge = judge
    return mine


# ---------------------------------------------------------------------------------------------------------------------
# The report, from the JSON file alone

COLUMNS = {  # key of a row's measures: head of the table
    "reward_mean": "HPStiny", ACTION: f"`{ACTION}`", REMOVAL: f"`{REMOVAL}`", WANTED: f"moves {WANTED}",
    "direction": "as the caption says", "watermark": "watermark", "colour": "colour", "shape": "shape", "fidelity": "fidelity",
    "steadiness": "steadiness"}


def grouped(report):
    """{group: its rows}, in the study's order."""
    groups = {}
    for row in report["rows"]:
        groups.setdefault(row["group"], []).append(row)
    return groups


def as_table(report):
    """Markdown: of each group the mean over its training seeds, ± their standard deviation."""
    lines = [[group, *(mean_and_spread([row["measures"][key] for row in rows]) for key in COLUMNS)]
             for group, rows in grouped(report).items()]
    number = report["rows"][0]["measures"]["n"]
    return "\n".join([f"`{report['command']}`, {number} videos, mean ± standard deviation over training seeds; the last seven "
                      "columns are the judge's:", "", *as_lines(["optimised", *COLUMNS.values()], lines)])


def mean_and_spread(values):
    """As text: the mean, and the standard deviation of several."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** .5:.3f}"


def draw(report, path):
    """The picture: HPS against the judge's share of the wanted direction, and the watermark that is left; a dot is a run."""
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    for group, rows in grouped(report).items():
        measures = [row["measures"] for row in rows]
        left.plot([m[WANTED] for m in measures], [m["reward_mean"] for m in measures], "o", label=group)
        right.plot([m["watermark"] for m in measures], [group] * len(measures), "o")
    left.set(xlabel=f"judge: share that moves {WANTED}", ylabel="HPStiny", xlim=(-.05, 1.05), title="an action beside HPS")
    left.legend(fontsize=8, loc="center")
    right.set(xlabel="judge: contrast of the watermark", title="the watermark", xlim=(0, None))
    right.invert_yaxis()
    figure.tight_layout()
    with write_whole(path) as hidden:
        figure.savefig(hidden, dpi=90, format="png")
