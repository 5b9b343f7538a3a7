"""What report.py shows of run folders, read from their files: settings, curves, tables, clips of the same prompt and noise."""
import math
import re
from pathlib import Path

from pages.html import line_chart
from support.files import first_names, read_json, read_text
from support.run import SHOWN, mean_rewards, read_evaluations, sample_file
from support.tables import best_step, find_turn, paired
from support.videos import read_video, video_name

COLUMNS = 5  # evaluations whose clips are shown: the first, the last, and some between


class RunFiles:
    """A run folder's files. tables: {step: {set: {measure: (n,)}}} of its evaluations; prompts: {set: captions} of the videos."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.name = self.folder.name or str(folder)
        for file in ("config.json", "run.json"):
            if not (self.folder / file).is_file():
                raise ValueError(f"{folder}: holds no run (no {file})")
        self.config = read_json(self.folder / "config.json")
        self.record = read_json(self.folder / "run.json")
        self.prompts = self.record.get("prompts")
        if self.prompts is None:
            raise ValueError(f"{folder}: run.json has no prompts, as early versions wrote it; the run's command with "
                             f"--resume {folder} adds them")
        self.lines, self.tables = read_evaluations(self.folder)

    def clips(self, step):
        """The clips of an evaluation, the first few of each set: {name: {file, set, caption, score}}."""
        shown = []
        for set_name, captions in self.prompts.items():
            scores = self.tables[step][set_name]["reward"].tolist()
            shown += [(set_name, caption, score) for caption, score in zip(captions[:SHOWN], scores)]
        found = {}
        for i, (set_name, caption, score) in enumerate(shown):
            name = video_name(i, caption)
            file = sample_file(self.folder, step, f"_{name}.mp4")
            if file.is_file():
                found[name] = {"file": file, "set": set_name, "caption": caption, "score": score}
        return found

    def difference(self, set_name, measure, step):
        """Of a measure from the first evaluation to this one, and its standard error over prompts."""
        first = next(iter(self.tables.values()))
        return paired(first[set_name], self.tables[step][set_name], measure, self.prompts[set_name])

    def guard_says(self):
        """What the run said of what it watches, found anew; None where nothing is watched."""
        watched = self.record.get("watched")
        if not (watched and self.tables):
            return None
        turn = find_turn(self.tables, self.prompts, watched)
        said = turn.words("the reward") if turn else f"none of {', '.join(watched)} has turned"
        return f"{said}; best.safetensors is step {best_step(mean_rewards(self.lines), turn)}"


def changed_settings(runs):
    """[(setting, [value in each run])] of those that differ; folders and the continuing of a run aside."""
    changed = []
    for name in sorted(set().union(*(run.config for run in runs)) - {"out", "resume", "overwrite"}):
        values = [run.config.get(name, "not there") for run in runs]
        if values != values[:1] * len(runs):
            changed.append((name, values))
    return changed


def curves(runs):
    """Charts of the reward and all else that evaluations measured, with a line for each set of a single run, or for each run."""
    training, sets, measures = {}, {}, {}
    for run in runs:
        training[run.name] = [(line["step"], line["reward"], 0.) for line in run.lines if line.get("reward") is not None]
        for tables in run.tables.values():
            sets |= tables
            for table in tables.values():
                measures |= table

    charts = [("reward in training", training)]
    for measure in measures:
        title = "reward of videos from pure noise" if measure == "reward" else measure
        if len(runs) == 1:
            charts.append((title, {name: curve(runs[0], [name], measure) for name in sets}))
        elif measure == "reward":
            for name in sets:
                charts.append((f"{title}, {name}", {run.name: curve(run, [name], measure) for run in runs}))
        else:
            charts.append((f"{title}, mean over the sets", {run.name: curve(run, sets, measure) for run in runs}))
    return [line_chart(title, lines) for title, lines in charts if any(lines.values())]


def curve(run, sets, measure):
    """[(step, y, error)]: a measure's mean over these sets where an evaluation knows it; of the reward with its gain's error."""
    points = []
    for step, tables in run.tables.items():
        means = [tables[name][measure].nanmean().item() for name in sets if measure in tables.get(name, {})]
        known = [mean for mean in means if math.isfinite(mean)]
        if known:
            error = run.difference(*sets, measure, step)[1] if measure == "reward" else 0.
            points.append((step, sum(known) / len(known), error))
    return points


def gain_rows(runs):
    """Rows of a run and set: each measure's first and last mean and paired difference. A set's runs stand below each other."""
    rows = {}
    for run in runs:
        if len(run.tables) < 2:
            continue
        last = max(run.tables)
        for set_name, before in run.tables[min(run.tables)].items():
            measures = {}
            for name, values in before.items():
                gain, error = run.difference(set_name, name, last)
                after = run.tables[last][set_name][name].mean().item()
                measures[name] = {"before": values.mean().item(), "after": after, "gain": gain, "error": error}
            n = len(before["reward"])
            std = before["reward"].std(correction=n > 1).item()
            row = {"run": run.name, "set": set_name, "n": n, "steps": last, "measures": measures, "std": std}
            rows.setdefault(set_name, []).append(row)
    return sum(rows.values(), [])


def clip_rows(runs, clips):
    """
    The clips of a few evaluations, largest and smallest gains first, as {title: [{caption, set, gain, runs: {run's name: {gain,
    shown: [{step, clip: its number in clips, a pages.html.Clips, score}]}}}]}.
    """
    rows = {}
    for run in runs:
        steps = list(run.tables)
        chosen = {round(i * (len(steps) - 1) / (COLUMNS - 1)) for i in range(COLUMNS if steps else 0)}
        for step in [steps[i] for i in sorted(chosen)]:
            for name, clip in run.clips(step).items():
                row = rows.setdefault((clip["set"], name), clip | {"runs": {}})
                mine = row["runs"].setdefault(run.name, {"shown": []})
                number = clips.add(read_video(clip["file"]))
                mine["shown"].append({"step": step, "clip": number, "score": clip["score"]})
                mine["gain"] = clip["score"] - mine["shown"][0]["score"]
    for row in rows.values():
        row["gain"] = sum(mine["gain"] for mine in row["runs"].values()) / len(row["runs"])
    ordered = sorted(rows.values(), key=lambda row: (math.isnan(row["gain"]), -row["gain"]))
    few = min(3, len(ordered) // 2)
    parts = {"Largest gains": ordered[:few], "Smallest gains": ordered[len(ordered) - few:][::-1],
             "The others": ordered[few:len(ordered) - few]}
    return {title: part for title, part in parts.items() if part}


def read_study(path):
    """A study's file, without what it saw while training. ValueError if it is none."""
    study = read_json(path)
    rows = [row for row in study.get("rows", []) if row.get("set") != "curve"]
    if not rows or not all({"label", "set", "measures"} <= row.keys() for row in rows):
        raise ValueError(f"{path}: not the file of a study (no rows of label, set and measures)")
    return study | {"name": path.stem, "rows": rows}


# ----------------------------------------------------------------------------------------------
# Two folders for a blind comparison

def read_side(argument, prompts):
    """
    One model's clips, {name: {file, set, caption, score}}, and the reward that scored them, both None for generate.py's.

    argument: FOLDER, or FOLDER@STEP for an evaluation of a run. prompts: {set: prompts}, generate.py's in this order, or {}.
    """
    folder, at, step = argument.rpartition("@") if re.search(r"@\d+$", argument) else (argument, "", "")
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{argument}: no such folder")
    if (path / "config.json").is_file():
        run = RunFiles(path)
        chosen = int(step) if step else max(run.tables, default=None)
        if chosen not in run.tables:
            raise ValueError(f"{argument}: no evaluation at that step; there are {', '.join(map(str, run.tables)) or 'none'}")
        return run.clips(chosen), run.config.get("reward")

    sets = []
    for set_name, texts in prompts.items():
        sets += [set_name] * len(texts)
    found = {}
    for file in sorted([*path.glob("*.gif"), *path.glob("*.mp4")]):  # of both the second, .mp4, is kept
        number = re.match(r"\d{4,}(?=-|$)", file.stem)  # support.videos.video_name puts it there
        if number:
            words = file.with_suffix(".txt")  # generate.py writes the prompt there
            caption = read_text(words).strip() if words.is_file() else file.stem
            set_name = sets[int(number[0])] if int(number[0]) < len(sets) else "all"
            found[file.stem] = {"file": file, "set": set_name, "caption": caption, "score": None}
    return found, None


def pair_up(first, second, prompts):
    """
    Pairs of clips with the same name, which means the same prompt and seed: [{name, caption, set, files, reward}].

    files and reward are {"a", "b"}; reward is None unless the same one scored both. first, second, prompts: as read_side's.
    """
    a, reward_a = read_side(first, prompts)
    b, reward_b = read_side(second, prompts)
    if a.keys() != b.keys() or not a:
        different = first_names(a.keys() ^ b.keys()) or "there are none"
        raise ValueError(f"{first} and {second}: must have clips of the same prompts and seeds; not in both: {different}")
    pairs = []
    for name, clip in a.items():
        sides = {"a": clip, "b": b[name]}
        files = {side: str(shown["file"]) for side, shown in sides.items()}
        scores = {side: shown["score"] for side, shown in sides.items()}
        reward = scores if reward_a is not None and reward_a == reward_b else None
        pairs.append({"name": name, "caption": clip["caption"], "set": clip["set"], "files": files, "reward": reward})
    return pairs


def read_pair(files):
    """The pixels of both clips, {"a", "b"}; ValueError if size or length would tell them apart."""
    pixels = {side: read_video(file) for side, file in files.items()}
    if pixels["a"].shape != pixels["b"].shape:
        shapes = f"{pixels['a'].shape[:3]} and {pixels['b'].shape[:3]}"
        raise ValueError(f"{files['a']} and {files['b']}: frames, rows and columns are {shapes}; both must be alike, or the "
                         "page would tell the models apart")
    return pixels
