"""
The paper's studies in the tiny world: a few training runs each, compared from pure noise on held-out prompts.

    python tiny/study.py headline            # three training seeds with the defaults, all three prompt sets
    python tiny/study.py tau                 # likewise: chain, guidance, lambda, segments, grad_steps, rank, quality, too_long
    python tiny/study.py evolution           # the same videos at several steps of the default run (paper, Fig. 8)
    python tiny/study.py report              # the README's tables and docs/studies.png, from tiny/studies/*.json

Every result is a file tiny/studies/NAME.json with command, seeds and versions inside. Sweeps have one training seed: they show
trends, not that one value is better than its neighbour. Differences are paired with the base, over the same prompts and noise.
Training runs and tables are kept under out/studies, where studies find each other's and an interrupted one its own.
"""
import contextlib
import io
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imageio.v3 as iio
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import lora  # noqa: E402
import train  # noqa: E402
from evaluate import EVAL_SEED, evaluate, prompt_sets  # noqa: E402
from model import load_base  # noqa: E402
from reward import load_reward  # noqa: E402
from sampler import GUIDANCE  # noqa: E402
from support.files import read_json, write_whole  # noqa: E402
from support.pictures import write_png  # noqa: E402
from support.reports import versions  # noqa: E402
from support.run_folder import SHOWN, read_metrics  # noqa: E402
from support.settings import first_given, to_json  # noqa: E402
from support.tables import paired, summary  # noqa: E402
from support.videos import to_pixels, write_video  # noqa: E402
from tiny import world  # noqa: E402
from tiny.judge import find_judge  # noqa: E402

SETS = ("in_domain", "new", "other")
TAUS, SEEDS, GUIDANCES = (0.1, 0.3, 0.6, 0.9, 1.0), (0, 1, 2), (1., 1.5, 2., 3.)
TOO_LONG = ("--steps", "200", "--lr", "0.01")
WATCH = {"too_long": ("--eval-every", "40", "--eval-count", "16"), "evolution": ("--eval-every", "10", "--eval-count", "4")}
SWEEPS = {  # name: {label: training flags}, all else as by default
    "lambda": {f"lambda = {v}": ["--lambda-tar", str(v)] for v in (0., 0.5, 1., 2.)},
    "segments": {"SegVR, S = 4": ["--segments", "4"], "dense, S = 16": ["--segments", "16"]},
    "grad_steps": {f"K = {k}": ["--grad-steps", str(k)] for k in (1, 2)},
    "rank": {f"rank {r}": ["--rank", str(r)] for r in (1, 4, 16)},
}


@dataclass
class Config:
    """Run a study, or write the README's tables of those that have been run."""
    study: tyro.conf.Positional[Literal["headline", "chain", "guidance", "tau", "lambda", "segments", "grad_steps", "rank",
                                        "quality", "too_long", "evolution", "report"]]
    count: int = 192
    """videos of each prompt set"""
    out: Path = ROOT / "tiny" / "studies"
    """folder of the JSON files"""
    work: Path = Path("out/studies")
    """folder of training runs and tables; one made with other weights or settings has to be removed by hand"""


class Lab:
    """Training runs and the tables of their videos, each made once."""

    def __init__(self, cfg):
        self.cfg, self.models = cfg, {}
        self.base = load_base("tiny")
        self.guidance = first_given(self.base.guidance, GUIDANCE)
        self.reward = load_reward(base_folder=self.base.folder)
        self.judge = find_judge(self.base, world.FRAMES, world.SIZE, world.SIZE)
        self.prompts = prompt_sets(self.base, (), cfg.count)

    def tune(self, *flags, watch=()):
        """The folder of the training run with these flags (and default ones left out), continued if it was cut short."""
        flags = tidy(flags)
        folder = self.cfg.work / ("-".join(f.strip("-").replace("/", "_") for f in (*flags, *watch)) or "default")
        if not (folder / "done").exists():
            old = ["--resume", str(folder)] if (folder / "config.json").exists() else [*flags, *(watch or ("--eval-every", "0")),
                                                                                     "--out", str(folder)]
            with contextlib.redirect_stdout(io.StringIO()):
                if status := train.main(old):
                    sys.exit(status)
            (folder / "done").touch()
        return folder

    def table(self, run, name, num_steps=20, guidance=None):
        """{measure: (n,)} of the videos of a prompt set, by the base (run None) or with a run's adapter."""
        guidance = first_given(guidance, self.guidance)
        file = (run or self.cfg.work / "base") / f"{name}-D{num_steps}-guidance{guidance:g}-n{self.cfg.count}.json"
        if not file.exists():
            if run not in self.models:
                self.models[run] = load_base("tiny") if run else self.base
                if run:
                    lora.load(self.models[run].unet, run / "lora.safetensors")
            with tqdm(total=self.cfg.count, desc=f"{file.parent.name}, {file.stem}", leave=False, mininterval=5) as bar:
                table, _ = evaluate(self.models[run], self.reward, self.prompts[name], seed=EVAL_SEED,
                                    num_steps=num_steps, guidance=guidance, judge=self.judge, move_on=bar.update)
            with write_whole(file) as hidden:
                hidden.write_text(json.dumps({k: v.tolist() for k, v in table.items()}) + "\n")
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in read_json(file).items()}

    def row(self, label, run, name="in_domain", num_steps=20, guidance=None, against=None, **more):
        """One line of a study: what was measured, and the paired differences from the base (or `against`, a table)."""
        guidance = first_given(guidance, self.guidance)
        table = self.table(run, name, num_steps, guidance)
        row = {"label": label, "set": name, "num_steps": num_steps, "guidance": guidance, "measures": summary(table)} | more
        if run or against:
            before = against or self.table(None, name, num_steps, guidance)
            row["differences"] = {k: paired(before, table, k) for k in table}
        print(f"{label}, {name}: {row['measures']['reward_mean']:.4f}", row.get("differences", {}).get("reward", ""), flush=True)
        return row


def tidy(flags):
    """Flags without those that say what holds by default: runs that are the same get the same name."""
    pairs = [(f, v) for f, v in zip(flags[::2], flags[1::2])]
    default = to_json(train.PRESETS["tiny"])
    return tuple(x for f, v in pairs if str(default[f.strip("-").replace("-", "_")]) != v for x in (f, v))


def seconds_per_step(run):
    """The median, as the first steps are slower."""
    seconds = [line["seconds"] for line in read_metrics(run / "metrics.jsonl") if "seconds" in line]
    return sorted(seconds)[len(seconds) // 2]


# ---------------------------------------------------------------------------------------------------------------------
# The studies: Lab -> rows

def headline(lab):
    """Three training seeds on three sets; pooled rows average the seeds video by video before they are compared."""
    runs = [lab.tune("--seed", str(s)) for s in SEEDS]
    rows = []
    for name in SETS:
        rows.append(lab.row("base", None, name))
        rows += [lab.row(f"seed {s}", run, name) for s, run in zip(SEEDS, runs)]
    before = {name: lab.table(None, name) for name in SETS}
    after = {name: pool([lab.table(run, name) for run in runs]) for name in SETS}
    pooled = [(name, before[name], after[name]) for name in SETS]
    pooled.append(("all", *(join([tables[name] for name in SETS]) for tables in (before, after))))
    for name, b, a in pooled:
        rows.append({"label": "seeds pooled", "set": name, "num_steps": 20, "guidance": lab.guidance, "measures": summary(a),
                     "base_std": summary(b)["reward_std"], "differences": {k: paired(b, a, k) for k in a}})
    return rows


def chain(lab):
    """D = 50 after tuning with D = 20 (paper, Table A.1)."""
    return [lab.row("base", None, num_steps=50), lab.row("tuned with D = 20", lab.tune(), num_steps=50)]


def pool(tables):
    """The mean of several tables, video by video."""
    return {k: torch.stack([t[k] for t in tables]).mean(dim=0) for k in tables[0]}


def join(tables):
    """Several sets' tables as one."""
    return {k: torch.cat([t[k] for t in tables]) for k in tables[0]}


def tau(lab):
    """Edit ratios at equal steps, and with as many steps as the default's time allows."""
    default = lab.tune()
    rows = [lab.row("base", None)]
    for t in TAUS:
        run = lab.tune("--tau", str(t))
        seconds = seconds_per_step(run)
        rows.append(lab.row(f"tau = {t}", run, seconds_per_step=seconds))
        steps = round(train.PRESETS["tiny"].steps * seconds_per_step(default) / seconds)
        if run != default:
            rows.append(lab.row(f"tau = {t}, equal time: {steps} steps", lab.tune("--tau", str(t), "--steps", str(steps))))
    return rows


def sweep(name):
    """A study of one setting; none of these settings changes a step's time by much, but for dense frames and K = 2."""
    def study(lab):
        rows = [lab.row("base", None)]
        for label, flags in SWEEPS[name].items():
            run = lab.tune(*flags)
            rows.append(lab.row(label, run, seconds_per_step=seconds_per_step(run)))
        return rows
    return study


def guidance(lab):
    """What guidance alone gives the base, and tuning against the base at its own best one."""
    rows = [lab.row("base", None, guidance=g, against=lab.table(None, "in_domain")) for g in GUIDANCES]
    best = max(rows, key=lambda row: row["measures"]["reward_mean"])["guidance"]
    rival = lab.table(None, "in_domain", guidance=best)
    return rows + [lab.row(f"seed {s}, against the base at {best:g}", lab.tune("--seed", str(s)), against=rival) for s in SEEDS]


def quality(lab):
    """Fine-tuning clips as they are found, or without any flaw (paper, Fig. 9), both read from video files."""
    rows = [lab.row("base", None)]
    for kind in ("flawed", "clean"):
        rows.append(lab.row(f"{kind} clips", lab.tune("--data", write_clips(lab.cfg.work / f"clips-{kind}", kind))))
    return rows


def write_clips(folder, kind, count=192):
    """Fine-tuning clips of one quality as files, once: "flawed" like web video, or "clean". The folder, as a flag's value."""
    every = world.scenes("in_domain")
    if not (folder / f"{count - 1:04d}.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            scene = every[i % len(every)]
            clip, _ = world.make_clip(scene, 2_000_000 + i, flaws={} if kind == "clean" else None)
            write_video(folder / f"{i:04d}.mp4", to_pixels(clip), world.FPS)
            (folder / f"{i:04d}.txt").write_text(scene.caption)
    return str(folder)


def too_long(lab):
    """Five times the steps at five times the rate, looked at now and then."""
    run = lab.tune(*TOO_LONG, watch=WATCH["too_long"])
    steps, rows, tables = evaluated_steps(run), [], []
    for step in steps:
        table = read_json(run / "samples" / f"step_{step:06d}.json")["in_domain"]
        tables.append({k: torch.tensor(v, dtype=torch.float64) for k, v in table.items()})
        rows.append({"label": f"step {step}", "step": step, "set": "in_domain", "num_steps": 20, "guidance": lab.guidance,
                     "measures": summary(tables[-1]), "differences": {k: paired(tables[0], tables[-1], k) for k in table}})
    write_png(ROOT / "docs" / "too_long.png", strips(run, [steps[0], steps[1], steps[-1]]))
    return rows


def evaluated_steps(run):
    return sorted(int(p.stem[-6:]) for p in (run / "samples").glob("step_??????.json"))


def evolution(lab):
    """The picture of the same videos at several steps of a default run; no rows."""
    run = lab.tune(watch=WATCH["evolution"])
    write_png(ROOT / "docs" / "evolution.png", strips(run, evaluated_steps(run)))
    return []


def strips(run, steps):
    """The upper half of a run's strips at several steps side by side: (H, W, 3)."""
    pictures = [torch.from_numpy(iio.imread(run / "samples" / f"step_{s:06d}.png")) for s in steps]
    title, rows = 22, len(SETS) * SHOWN
    return torch.cat(pictures, dim=1)[:title + (len(pictures[0]) - title) // rows * (rows // 2)].numpy()


STUDIES = {"headline": headline, "chain": chain, "tau": tau, "guidance": guidance, "quality": quality, "too_long": too_long,
           "evolution": evolution} | {name: sweep(name) for name in SWEEPS}


def run(cfg):
    """A study from its training runs to its JSON file."""
    lab = Lab(cfg)
    rows = STUDIES[cfg.study](lab)
    report = {"command": shlex.join(["python", "tiny/study.py", *sys.argv[1:]]), "reward": lab.reward.name, "count": cfg.count,
              "evaluation_seed": EVAL_SEED, "training": to_json(train.PRESETS["tiny"]), "versions": versions(),
              "rows": rows}
    if rows:
        with write_whole(cfg.out / f"{cfg.study}.json") as hidden:
            hidden.write_text(json.dumps(report, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The report: tables and curves, from the JSON files alone

MEASURES = ("watermark", "sharpness", "saturation", "noise", "motion", "fidelity", "steadiness", "colour", "shape", "direction",
            "static")


def as_table(report):
    """A study as Markdown: reward, paired difference, judge."""
    lines = [f"| | set | D | guidance | {report['reward']} mean ± std | paired difference | {' | '.join(MEASURES)} |",
             "|" + "---|" * (6 + len(MEASURES))]
    for row in report["rows"]:
        m, d = row["measures"], row.get("differences", {}).get("reward")
        lines.append(f"| {row['label']} | {row['set']} | {row['num_steps']} | {row['guidance']:g} | "
                     f"{m['reward_mean']:.4f} ± {m['reward_std']:.4f} | " + ("{:+.4f} ± {:.4f}".format(*d) if d else "") + " | "
                     + " | ".join(f"{m[k]:.3f}" for k in MEASURES) + " |")
    return "\n".join([conditions(report), "", *lines])


def conditions(report):
    """What a table was made with, for the line above it."""
    return f"`{report['command']}`, {report['rows'][0]['measures']['n']} videos of each set, torch {report['versions']['torch']}:"


def as_summary(report):
    """The headline's pooled rows: before, after and paired difference of the reward and of the judge's measures."""
    def change(row, measure, key):
        after, (d, error) = row["measures"][key], row["differences"][measure]
        return f"{after - d:.2f} → {after:.2f} ({d:+.3f} ± {error:.3f})"
    shown = ("watermark", "motion", "fidelity", "steadiness", "colour", "shape", "direction", "static")
    lines = [f"| set | {report['reward']} | gain in base std | {' | '.join(shown)} |", "|" + "---|" * (3 + len(shown))]
    for row in report["rows"]:
        if row["label"] == "seeds pooled":
            cells = [row["set"], change(row, "reward", "reward_mean"), f"{row['differences']['reward'][0] / row['base_std']:.2f}"]
            lines.append("| " + " | ".join([*cells, *(change(row, k, k) for k in shown)]) + " |")
    return "\n".join([conditions(report), "", *lines])


def gains(report, wanted):
    """Of the rows whose label passes: paired differences of the reward, and their standard errors."""
    chosen = [row["differences"]["reward"] for row in report["rows"] if "differences" in row and wanted(row["label"])]
    return [d for d, _ in chosen], [e for _, e in chosen]


def draw_curves(reports, path):
    """docs/studies.png: tau, lambda, and the run taken too far with reward and judge on one picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4))
    if "tau" in reports:
        default = f"tau = {train.PRESETS['tiny'].tau}"
        equal_steps, equal_time = (lambda label: "time" not in label), (lambda label: "time" in label or label == default)
        left.errorbar(TAUS, *gains(reports["tau"], equal_steps), marker="o", capsize=3, label="equal steps")
        left.errorbar(TAUS, *gains(reports["tau"], equal_time), marker="s", ls="--", capsize=3, label="equal time")
        left.set(title="edit ratio", xlabel="tau", ylabel="gain of reward from pure noise")
        left.legend()
    if "lambda" in reports:
        x = [float(label.split()[-1]) for label in SWEEPS["lambda"]]
        middle.errorbar(x, *gains(reports["lambda"], bool), marker="o", capsize=3)
        middle.set(title="weight towards the centre (TAR)", xlabel="lambda", ylabel="gain of reward from pure noise")
    if "too_long" in reports:
        rows = reports["too_long"]["rows"]
        x = [row["step"] for row in rows]
        right.plot(x, [row["measures"]["reward_mean"] for row in rows], "k", lw=2, label="reward")
        for k, style in (("colour", "-."), ("shape", "--"), ("direction", ":"), ("motion", "-"), ("watermark", "-")):
            right.plot(x, [row["measures"][k] for row in rows], style, label=f"judge: {k}")
        right.set(title="a run taken too far", xlabel="step", ylim=(-.02, 1.02))
        right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, .5))
    figure.tight_layout()
    with write_whole(path) as hidden:
        figure.savefig(hidden, dpi=90, format="png")
    plt.close(figure)


def write_report(cfg):
    """Replace what stands between markers <!-- study NAME --> and <!-- end --> in the two READMEs, and draw the curves."""
    reports = {file.stem: read_json(file) for file in sorted(cfg.out.glob("*.json"))}
    tables = {name: as_table(report) for name, report in reports.items()}
    if "headline" in reports:
        tables["summary"] = as_summary(reports["headline"])
    pages = {page: page.read_text() for page in (ROOT / "README.md", ROOT / "tiny" / "README.md")}
    for name, table in tables.items():
        start = f"<!-- study {name} -->"
        if not any(start in text for text in pages.values()):
            raise ValueError(f"{' and '.join(map(str, pages))}: no marker {start}")
        for page, text in pages.items():
            if start in text:
                before, _, rest = text.partition(start)
                pages[page] = f"{before}{start}\n{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    draw_curves(reports, ROOT / "docs" / "studies.png")
    for page, text in pages.items():
        with write_whole(page) as hidden:
            hidden.write_text(text)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    try:
        write_report(config) if config.study == "report" else run(config)
    except ValueError as error:
        print(f"study.py: {error}", file=sys.stderr)
        sys.exit(2)
