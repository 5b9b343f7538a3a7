"""What report.py shows of run folders, read from their files: settings, curves, gains, clips of the same prompt and noise."""
import math
import re
from dataclasses import dataclass
from pathlib import Path

from pages.html import clip_uri, line_chart
from support.files import first_names, read_json, read_text
from support.run import SHOWN, clip_names, read_evaluations, sample_file
from support.tables import best_step, deciding, paired
from support.videos import read_video

COLUMNS = 5  # evaluations whose clips are shown: the first, the last, and some between
NOT_COMPARED = {"out", "resume", "overwrite"}  # settings that say nothing about what a run did


def read_run(folder):
    """The RunFiles of a run folder; ValueError if it is none."""
    if not Path(folder, "config.json").is_file():
        raise ValueError(f"{folder}: holds no run (no config.json)")
    config, record = read_json(Path(folder, "config.json")), read_json(Path(folder, "run.json"))
    if not {"prompts", "reward"} <= record.keys():
        raise ValueError(f"{folder}: run.json lacks prompts or reward, as early versions wrote it; continue the run to add them")
    config["reward"] = record["reward"]
    return RunFiles(str(folder), record["reward"], config, record, *read_evaluations(Path(folder)))


@dataclass
class RunFiles:
    """A run folder's files, for the page. config: its settings; record: run.json; lines: of metrics.jsonl."""
    name: str
    reward: str  # what was maximised, by name, so that different rewards are never taken together
    config: dict
    record: dict
    lines: list
    tables: dict  # of its evaluations, {step: {set: {measure: (n,)}}}

    def clips(self, step):
        """The clips of an evaluation, the first few of each set: {name: {file, set, caption, score}}."""
        clips = {}
        prompts = self.record["prompts"]  # {set: captions}
        for set_name, names in clip_names(prompts).items():
            scores = self.tables[step][set_name]["reward"].tolist()
            for name, caption, score in zip(names[:SHOWN], prompts[set_name], scores):
                file = sample_file(Path(self.name), step, f"_{name}.mp4")
                if file.is_file():
                    clips[name] = {"file": file, "set": set_name, "caption": caption, "score": score}
        return clips

    def changes(self):
        """Each measure of each evaluation, against the first: [{step, set, measure, before, after, gain, error}], paired."""
        changes = []
        clusters = self.record.get("told_by", self.record["prompts"])  # earlier versions had captions alone
        first = self.tables.get(min(self.tables, default=None))
        for step, tables in self.tables.items():
            for set_name, table in tables.items():
                for measure, after in table.items():
                    before = first[set_name][measure].nanmean().item()
                    gain, error = paired(first[set_name], table, measure, clusters[set_name])
                    name = self.reward if measure == "reward" else measure
                    changes.append({"step": step, "set": set_name, "measure": name, "before": before,
                                    "after": after.nanmean().item(), "gain": gain, "error": error})
        return changes

    def best(self):
        """Which evaluation best.safetensors is of, and why; None before the first."""
        measure = deciding(self.record.get("watched", ()))
        step = best_step(self.tables, measure)
        return None if step is None else f"best.safetensors is step {step}, the highest {measure}"


def changed_settings(runs):
    """[(setting, [value in each run])] of those that differ."""
    changed = []
    for name in sorted(set().union(*(run.config for run in runs)) - NOT_COMPARED):
        values = [run.config.get(name, "not there") for run in runs]
        if values != values[:1] * len(runs):
            changed.append((name, values))
    return changed


def curves(runs):
    """Charts: of one run all that changed, a line for each set; of several the rewards, a chart for each set, a line a run."""
    charts = {}  # {title: {line: [(step, y, error)]}}
    for run in runs:
        points = [(line["step"], line["reward"], 0.) for line in run.lines if line.get("reward") is not None]
        if points:
            charts.setdefault(f"{run.reward}, videos of the training steps", {})[run.name] = points
    shown = {run.reward for run in runs}
    for run in runs:
        changes = run.changes()
        if len(runs) == 1:
            shown = {change["measure"] for change in changes if change["gain"]}
        for change in changes:
            title, line = f"{change['measure']}, videos from pure noise", change["set"]
            if len(runs) > 1:
                title, line = f"{title}, {change['set']}", run.name
            if change["measure"] in shown and math.isfinite(change["after"]):
                point = (change["step"], change["after"], change["error"])
                charts.setdefault(title, {}).setdefault(line, []).append(point)
    return [line_chart(title, lines) for title, lines in charts.items()]


def gains(runs):
    """The last evaluation against the first, rewards before other measures: {measure: {run's name: {set: its change}}}."""
    by_measure = {run.reward: {} for run in runs}
    for run in runs:
        last = max(run.tables, default=0)
        for change in run.changes():
            if change["step"] == last > min(run.tables):
                by_measure.setdefault(change["measure"], {}).setdefault(run.name, {})[change["set"]] = change
    return {measure: by_run for measure, by_run in by_measure.items() if by_run}


def clip_rows(runs):
    """The clips of a few evaluations, largest and smallest gains of the first run first: {title: [{caption, set, gain, runs:
    {run's name: [{step, src, score}]}}]}. Gains of several runs are not averaged: their rewards may differ."""
    rows = {}
    for run in runs:
        steps = list(run.tables)
        chosen = {round(i * (len(steps) - 1) / (COLUMNS - 1)) for i in range(COLUMNS if steps else 0)}
        for i in sorted(chosen):
            for name, clip in run.clips(steps[i]).items():
                new_row = {"caption": clip["caption"], "set": clip["set"], "gain": math.nan, "runs": {}}
                row = rows.setdefault((clip["set"], name), new_row)
                shown = row["runs"].setdefault(run.name, [])
                shown.append({"step": steps[i], "src": clip_uri(clip["file"]), "score": clip["score"]})
                if run is runs[0]:
                    row["gain"] = clip["score"] - shown[0]["score"]
    ordered = sorted(rows.values(), key=lambda row: (math.isnan(row["gain"]), -row["gain"]))
    known = sum(not math.isnan(row["gain"]) for row in ordered)  # then come clips that only other runs have
    few = min(3, known // 2)
    parts = {"Largest gains": ordered[:few], "Smallest gains": ordered[known - few:known][::-1],
             "The others": ordered[few:known - few] + ordered[known:]}
    return {title: part for title, part in parts.items() if part}


def read_study(path):
    """A study's file. ValueError if it is none."""
    study = read_json(path)
    if not study.get("rows") or not all({"label", "set", "measures"} <= row.keys() for row in study["rows"]):
        raise ValueError(f"{path}: not the file of a study (no rows of label, set and measures)")
    return study | {"name": path.stem}


# ----------------------------------------------------------------------------------------------
# Two folders for a blind comparison

def read_side(argument, prompts):
    """One model's clips, {name: {file, set, caption, score}}, and the reward that scored them, both None for generate.py's.
    argument: FOLDER, or FOLDER@STEP for an evaluation of a run. prompts: {set: prompts}, generate.py's in this order, or {}."""
    folder, at, step = argument.rpartition("@") if re.search(r"@\d+$", argument) else (argument, "", "")
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{argument}: no such folder")
    if (path / "config.json").is_file():
        run = read_run(path)
        chosen = int(step) if step else max(run.tables, default=None)
        if chosen not in run.tables:
            raise ValueError(f"{argument}: no evaluation at that step; there are {', '.join(map(str, run.tables)) or 'none'}")
        return run.clips(chosen), run.reward

    set_of_video = dict(enumerate(set_name for set_name, texts in prompts.items() for _ in texts))
    clips = {}
    for file in sorted(path.glob("*.mp4")):
        number = re.match(r"\d{4,}(?=-|$)", file.stem)  # support.videos.video_name puts it there
        if number:
            beside = file.with_suffix(".txt")  # generate.py writes the prompt there
            caption = read_text(beside).strip() if beside.is_file() else file.stem
            set_name = set_of_video.get(int(number[0]), "all")
            clips[file.stem] = {"file": file, "set": set_name, "caption": caption, "score": None}
    return clips, None


def pair_up(first, second, prompts):
    """Pairs of clips with the same name, so of one prompt; of one seed if both models were given the same: [{name, caption, set,
    files {"a", "b"}, reward {"a", "b"}, None unless the same one scored both}]. first, second, prompts: as read_side's."""
    a, reward_a = read_side(first, prompts)
    b, reward_b = read_side(second, prompts)
    if a.keys() != b.keys() or not a:
        different = first_names(a.keys() ^ b.keys()) or "there are none"
        raise ValueError(f"{first} and {second}: must have clips of the same prompts and seeds; not in both: {different}")
    pairs = []
    for name, clip in a.items():
        files = {"a": str(clip["file"]), "b": str(b[name]["file"])}
        shape_a, shape_b = read_video(files["a"]).shape, read_video(files["b"]).shape
        if shape_a != shape_b:  # which would tell them apart
            raise ValueError(f"{files['a']} and {files['b']}: frames, rows, columns are {shape_a} and {shape_b}; must be alike")
        scores = {"a": clip["score"], "b": b[name]["score"]}
        reward = scores if reward_a is not None and reward_a == reward_b else None
        pairs.append({"name": name, "caption": clip["caption"], "set": clip["set"], "files": files, "reward": reward})
    return pairs
