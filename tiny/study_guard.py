"""
The study of the guard: on runs that cheat rather than collapse, is what it keeps as good as the best of the run?

The judge is the referee: one score of each video, fixed before these runs (support.tables.add_judge). Each run is looked at by
three rules, all from the tables of its evaluations: the highest reward, which a run keeps that watches nothing; the guard that
watches the judge; and the guard that watches measures of pixels alone, as it can for any base. The guard's own settings
(support/tables.py) were fixed before these runs, too. What a rule keeps should be within 2% of the run's best score. The best is
the highest of several noisy means, so it is a little too high: that makes the test harder, not easier.
"""
from matplotlib.figure import Figure

from evaluate import prompt_sets
from support.files import write_whole
from support.run import mean_rewards, read_metrics, read_tables
from support.tables import JUDGE, best_step, find_turn, mean, measured_names, pool, summary
from tiny.lab import differences
from tiny.study_tables import as_lines, conditions

SEEDS = (0, 1, 2)
CHEATING = ("--lr", "0.004", "--steps", "200")  # twice the default's rate, five times its steps
COUNT = 16
WATCH = ("--eval-every", "20", "--eval-count", str(COUNT), "--watch", "judge", "--watch", "pixels")
SEEN = ("watermark", "fidelity", "motion")  # of the judge, in the table
RULES = {"highest reward": [], "guard, judge watched": [JUDGE], "guard, pixels watched": measured_names(("pixels",))}


def guard(lab):
    """Rows of each seed's run: the step with the best judge score, and what each rule keeps, with its share of that score."""
    prompts, rows = prompt_sets(lab.base, (), COUNT), []
    for seed in SEEDS:
        run = lab.tune(*CHEATING, "--seed", str(seed), watch=WATCH)
        rewards = mean_rewards(read_metrics(run / "metrics.jsonl"))
        tables = {step: read_tables(run / "samples" / f"step_{step:06d}.json") for step in rewards}
        for row in choices(tables, rewards, prompts):
            label = f"seed {seed}, {row['rule']}"
            rows.append({"label": label, "seed": seed, "set": "all", "num_steps": 20, "guidance": lab.guidance} | row)
            print(f"{label}: step {row['step']}, judge {row['measures'][JUDGE]:.4f}, "
                  f"{row['of_best_judge']:.3f} of the best", flush=True)
    return rows


def choices(tables, rewards, prompts):
    """
    [{rule, step, turned, of_best_judge, measures, differences from the first evaluation}] of a run, its best judge score first,
    which also has the run's "curve", [(step, mean reward, mean judge score)].

    tables: {step: {set: {measure: (n,)}}}. rewards: {step: mean reward}. turned: the step at which the rule says so, or None.
    """
    pooled = {step: pool(tables[step], prompts)[0] for step in tables}
    captions = [caption for texts in prompts.values() for caption in texts]
    scores = {step: mean(pooled[step][JUDGE]) for step in tables}
    kept = {"best judge score": (max(scores, key=scores.get), None)}
    for rule, watched in RULES.items():
        turn = find_turn(tables, prompts, watched)
        kept[rule] = best_step(rewards, turn), turn and turn.step

    rows, first = [], pooled[min(pooled)]
    for rule, (step, turned) in kept.items():
        table = pooled[step]
        rows.append({"rule": rule, "step": step, "turned": turned, "of_best_judge": scores[step] / max(scores.values()),
                     "measures": summary(table), "differences": differences(first, table, captions)})
    rows[0]["curve"] = [(step, mean(table["reward"]), scores[step]) for step, table in pooled.items()]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The report, from the JSON file alone

def as_table(report):
    """Markdown: what each rule keeps of each run."""
    head = ["", "keeps step", "turned at", "judge score", "of the best", report["reward"], *SEEN]
    lines = []
    for row in report["rows"]:
        m = row["measures"]
        cells = [row["label"], row["step"], "" if row["turned"] is None else row["turned"], f"{m[JUDGE]:.4f}",
                 f"{row['of_best_judge']:.1%}", f"{m['reward_mean']:.4f}"]
        lines.append([*cells, *(f"{m[k]:.3f}" for k in SEEN)])
    return "\n".join([conditions(report, "of the three sets together"), "", *as_lines(head, lines)])


def draw(report, path):
    """docs/guard.png: reward and judge of each run, step by step, and what each rule keeps."""
    figure = Figure(figsize=(5 * len(SEEDS), 4))
    marks = {"highest reward": "v", "guard, judge watched": "o", "guard, pixels watched": "s"}
    axes = figure.subplots(1, len(SEEDS), sharey=True, squeeze=False)[0]
    for axis, seed in zip(axes, SEEDS):
        rows = [row for row in report["rows"] if row["seed"] == seed]
        steps, rewards, scores = zip(*rows[0]["curve"])
        axis.plot(steps, rewards, "k", label="reward")
        axis.plot(steps, scores, "C0", label="judge score")
        for row in rows[1:]:
            axis.plot(row["step"], row["measures"][JUDGE], marks[row["rule"]], ms=9, mfc="none", label=row["rule"])
        axis.set(title=f"training seed {seed}", xlabel="step")
    axis.legend(fontsize=8)
    figure.tight_layout()
    with write_whole(path) as hidden:
        figure.savefig(hidden, dpi=90, format="png")
