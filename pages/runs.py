"""
What report.py shows of run folders, read back from their files: settings, curves, tables, and clips of the
same prompt and noise.
"""
import math
import re
from pathlib import Path

import numpy as np

from pages.html import line_chart, undo_enlarging
from support import tables as guard
from support.files import first_names, read_json, read_text
from support.run import SHOWN, mean_rewards, read_metrics, read_tables
from support.tables import paired
from support.videos import open_video, video_name

COLUMNS = 5  # evaluations whose clips are shown: the first, the last, and some between
CLIP = re.compile(r"(?:step_(\d{6})_)?((\d{4,})(?:-[a-z0-9-]*)?)")  # a clip's file, a run's or generate.py's


class RunFiles:
    """
    One run folder, as its files tell it. ValueError if it holds no run.

    find_prompts(config) -> {set: prompts}: what the run was evaluated on; file names stand in where it does
    not fit them.
    """

    def __init__(self, folder, find_prompts):
        self.folder, self.name = Path(folder), Path(folder).name or str(folder)
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{folder}: holds no run (no config.json)")
        self.config = read_json(self.folder / "config.json")
        record, metrics = self.folder / "run.json", self.folder / "metrics.jsonl"
        self.record = read_json(record) if record.is_file() else {}  # its clips, and changes since it began
        self.lines = read_metrics(metrics) if metrics.is_file() else []
        self.evals = [line for line in self.lines if "eval" in line]
        self.tables, self.files = {}, {}
        for line in self.evals:
            step, table = line["step"], self.folder / "samples" / f"step_{line['step']:06d}.json"
            if table.is_file():
                self.tables[step] = read_tables(table)
            self.files[step] = clip_files(self.folder / "samples", step)
        self.prompts = find_prompts(self.config)

    @property
    def steps(self):
        """The evaluations that have tables, from first to last."""
        return sorted(self.tables)

    def places(self):
        """{name of a clip: (set, index in it, caption)}, of the clips that every evaluation writes."""
        found, number = {}, 0
        if not self.tables:
            return found
        names = {int(CLIP.fullmatch(name)[3]): name for name in self.files[self.steps[-1]]}
        for set_name, table in self.tables[self.steps[0]].items():
            for index in range(min(SHOWN, len(table["reward"]))):
                name = names.get(number)
                if name is not None:
                    prompt = next(iter(self.prompts.get(set_name, [])[index:]), None)
                    found[name] = (set_name, index, caption_of(name, prompt))
                number += 1
        return found

    def captions(self, set_name, number):
        """The prompts of a set's videos, by which errors are clustered; None if they are not known."""
        known = self.prompts.get(set_name, ())
        return known if len(known) == number else None

    def guard_says(self):
        """What the run said of what it watches, found anew; None where nothing is watched, or its prompts are gone."""
        watched, first = self.record.get("watched", []), next(iter(self.tables.values()), {})
        fit = all(self.captions(name, len(table["reward"])) for name, table in first.items())
        if not watched or not first or not fit:
            return None
        turn = guard.find_turn(self.tables, self.prompts, watched)
        said = turn.words("the reward") if turn else f"none of {', '.join(watched)} has turned"
        return f"{said}; best.safetensors is step {guard.best_step(mean_rewards(self.lines), turn)}"

    def score(self, name, step):
        """The reward of a clip, or None."""
        set_name, index, _ = self.places().get(name, (None, 0, ""))
        table = self.tables.get(step, {}).get(set_name)
        return None if table is None or index >= len(table["reward"]) else table["reward"][index].item()


def caption_of(name, prompt):
    """The prompt that a file was named for, if this is it; else the words that its name kept of it."""
    number, _, words = name.partition("-")
    if prompt is not None and video_name(int(number), prompt) == name:
        return prompt
    return words.replace("-", " ") or name


def prompt_beside(path):
    """The prompt that generate.py wrote beside a video, or None."""
    beside = path.with_suffix(".txt")
    return read_text(beside).strip() if beside.is_file() else None


def clip_files(folder, step=None):
    """{name: file} of the clips of an evaluation, or of a folder that generate.py wrote; .gif where there is
    no .mp4."""
    found = {}
    for path in (*sorted(folder.glob("*.gif")), *sorted(folder.glob("*.mp4"))):
        match = CLIP.fullmatch(path.stem)
        if match and (match[1] is None) == (step is None) and (step is None or int(match[1]) == step):
            found[match[2]] = path
    return dict(sorted(found.items()))


def read_clip(path):
    """A clip's frames (F, H, W, 3) uint8. ValueError names a file that cannot be read."""
    with open_video(path) as (container, stream):  # imageio would collect garbage after each file, for 0.1 s
        frames = [frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(stream)]
    if not frames:
        raise ValueError(f"{path}: cannot be read: no frames")
    return np.stack(frames)


# ----------------------------------------------------------------------------------------------
# The parts of a report

def changed_settings(runs):
    """[(setting, [value in each run])] of those that differ; folders and the continuing of a run aside."""
    names = dict.fromkeys(k for run in runs for k in run.config if k not in ("out", "resume", "overwrite"))
    rows = [(k, [run.config.get(k, "not there") for run in runs]) for k in names]
    return [(k, values) for k, values in rows if any(v != values[0] for v in values)]


def curves(runs):
    """Charts of the reward and of everything else that the evaluations measured. One run: a line for each
    set; more: for each run."""
    evals = [line["eval"] for run in runs for line in run.evals]
    sets = list(dict.fromkeys(name for found in evals for name in found))
    measures = dict.fromkeys(k for found in evals for measured in found.values() for k in measured)

    def of_runs(chosen, measure):
        return [series(run, chosen, measure, i, run.name) for i, run in enumerate(runs)]

    def of_sets(measure):
        return [series(runs[0], [s], measure, i, s) for i, s in enumerate(sets)]

    training = []
    for i, run in enumerate(runs):
        points = [(line["step"], line.get("reward"), 0) for line in run.lines if "eval" not in line]
        training.append({"name": run.name, "color": i, "points": points})
    charts, title = [line_chart("reward in training", training)], "reward of videos from pure noise"
    if len(runs) == 1:
        charts.append(line_chart(title, of_sets("reward_mean")))
    else:
        charts += [line_chart(f"{title}, {s}", of_runs([s], "reward_mean")) for s in sets]
    for measure in measures:
        if measure not in ("reward_mean", "reward_std", "n"):
            charts.append(line_chart(measure, of_sets(measure)) if len(runs) == 1 else
                          line_chart(f"{measure}, mean over the sets", of_runs(sets, measure)))
    return [chart for chart in charts if chart]


def series(run, sets, measure, color, name):
    """A line of a chart: a measure's mean over these sets at each evaluation; of the reward with the error of
    its gain."""
    points = []
    for line in run.evals:
        found = [line["eval"][s] for s in sets if line["eval"].get(s, {}).get(measure) is not None]
        if found:
            mean = sum(m[measure] for m in found) / len(found)
            error = gain_error(run, sets[0], line["step"]) if measure == "reward_mean" else 0
            points.append((line["step"], mean, error))
    return {"name": name, "color": color, "points": points}


def gain_error(run, set_name, step):
    """Standard error over prompts of the reward's paired difference from the first evaluation; 0 where
    there are no numbers of each video."""
    first, now = (run.tables.get(s, {}).get(set_name) for s in (run.evals[0]["step"], step))
    if not first or not now or not 1 < len(first["reward"]) == len(now["reward"]):
        return 0
    return paired(first, now, clusters=run.captions(set_name, len(now["reward"])))[1]


def gain_rows(runs):
    """Rows of the table: for each run, set and measure the means of the first and the last evaluation,
    spread, and paired difference."""
    rows = []
    for run in runs:
        if len(run.steps) < 2:
            continue
        before, after = run.tables[run.steps[0]], run.tables[run.steps[-1]]
        for name in before:
            if name not in after or len(before[name]["reward"]) != len(after[name]["reward"]):
                continue
            measures = {}
            for k in before[name]:
                gain, error = paired(before[name], after[name], k, run.captions(name, len(before[name][k])))
                measures[k] = {"before": before[name][k].mean().item(), "after": after[name][k].mean().item(),
                               "std": before[name][k].std(correction=len(before[name][k]) > 1).item(), "gain": gain,
                               "error": error}
            rows.append({"run": run.name, "set": name, "n": len(before[name]["reward"]),
                         "steps": run.steps[-1], "measures": measures})
    order = list(dict.fromkeys(row["set"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["set"]))  # the runs of a set below each other


def clip_rows(runs, clips):
    """
    Prompts whose clips are shown, those with the largest and with the smallest gains first: [{caption, set,
    gain, runs: [...]}].

    clips: pages.html.Clips. A run's row has the reward before and after and a clip for each of a few
    evaluations.
    """
    rows = {}
    for run in runs:
        steps = run.steps
        last = len(steps) - 1
        chosen = sorted({round(i * last / (COLUMNS - 1)) for i in range(COLUMNS)}) if steps else []
        for name, (set_name, _, caption) in run.places().items():
            shown = []
            for step in (steps[i] for i in chosen):
                if name in run.files[step]:
                    number = clips.add(undo_enlarging(read_clip(run.files[step][name])))
                    shown.append({"step": step, "clip": number, "score": run.score(name, step)})
            gain = shown[-1]["score"] - shown[0]["score"] if shown else 0.
            row = rows.setdefault((set_name, name), {"caption": caption, "set": set_name, "runs": []})
            row["runs"].append({"name": run.name, "gain": gain, "shown": shown})
    for row in rows.values():
        row["gain"] = sum(run["gain"] for run in row["runs"]) / len(row["runs"])
    ordered = sorted(rows.values(), key=lambda row: (math.isnan(row["gain"]), -row["gain"]))
    few = min(3, len(ordered) // 2)
    parts = {"Largest gains": ordered[:few], "Smallest gains": ordered[len(ordered) - few:][::-1],
             "The others": ordered[few:len(ordered) - few]}
    return {title: part for title, part in parts.items() if part}


def study_rows(path):
    """A study's file as a table: its settings, and rows of label, set, reward with spread and gain.
    ValueError if it is none."""
    study = read_json(path)
    rows = []
    try:
        for row in study["rows"]:
            if row["set"] == "curve":  # of a study that looked while training
                continue
            m = row["measures"]
            label = row["label"] + (f", step {row['step']}" if "step" in row else "")
            others = {k: v for k, v in m.items() if k not in ("n", "reward_mean", "reward_std")}
            rows.append({"label": label, "set": row["set"], "D": row["num_steps"],
                         "guidance": row["guidance"], "n": m["n"], "mean": m["reward_mean"],
                         "std": m["reward_std"], "others": others,
                         "gain": row.get("differences", {}).get("reward")})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the file of a study ({type(error).__name__}: {error})") from None
    return {"name": Path(path).stem, "command": study.get("command", ""), "reward": study.get("reward", ""),
            "versions": study.get("versions", {}), "rows": rows}


# ----------------------------------------------------------------------------------------------
# Two folders for a blind comparison

def side(argument, find_prompts):
    """One model's clips, {name: file}, and its run if the folder is one. argument: FOLDER, or FOLDER@STEP for
    an evaluation of a run."""
    folder, _, step = argument.rpartition("@") if re.search(r"@\d+$", argument) else (argument, "", "")
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{argument}: no such folder")
    if not (path / "config.json").is_file():
        return clip_files(path), None, None
    run = RunFiles(path, find_prompts)
    chosen = int(step) if step else max(run.files, default=None)
    if chosen not in run.files:
        raise ValueError(f"{argument}: no evaluation at that step; there are "
                         f"{', '.join(map(str, run.files)) or 'none'}")
    return run.files[chosen], run, chosen


def pair_up(first, second, prompts, find_prompts):
    """
    Pairs of clips with the same name, which means the same prompt and seed: [{name, caption, set, reward}],
    and both {name: file}.

    prompts: {set: prompts} in the order that the clips were generated in, or empty. ValueError unless both
    have the same clips.
    """
    (a, run_a, step_a), (b, run_b, step_b) = side(first, find_prompts), side(second, find_prompts)
    if a.keys() != b.keys() or not a:
        different = first_names(a.keys() ^ b.keys()) or "there are none"
        raise ValueError(f"{first} and {second}: must have clips of the same prompts and seeds; not in both: "
                         f"{different}")
    given = [(set_name, prompt) for set_name, texts in prompts.items() for prompt in texts]
    places = run_a.places() if run_a else {}
    pairs = []
    for name in a:
        number = int(CLIP.fullmatch(name)[3])
        set_name, _, caption = places.get(name, ("all", 0, caption_of(name, prompt_beside(a[name]))))
        if not places and number < len(given):
            set_name, caption = given[number][0], caption_of(name, given[number][1])
        scores = {"a": run_a and run_a.score(name, step_a), "b": run_b and run_b.score(name, step_b)}
        known = None not in scores.values() and run_a.config.get("reward") == run_b.config.get("reward")
        pairs.append({"name": name, "caption": caption, "set": set_name, "reward": scores if known else None})
    return pairs, a, b


def read_pair(first, second):
    """Both clips' pixels; ValueError if size or length differ, which would tell them apart."""
    a, b = read_clip(first), read_clip(second)
    small_a, small_b = undo_enlarging(a), undo_enlarging(b)
    if small_a.shape == small_b.shape:  # if one alone were shown small, it would tell them apart
        return small_a, small_b
    if a.shape != b.shape:
        raise ValueError(f"{first} and {second}: {a.shape[0]} frames of {a.shape[2]} x {a.shape[1]} and "
                         f"{b.shape[0]} of {b.shape[2]} x {b.shape[1]}; both must be alike, or the page "
                         "would tell the models apart")
    return a, b
