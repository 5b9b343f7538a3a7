"""The run folder: what a run leaves behind, and how it goes on after an interruption. Run counts steps, logs and saves;
Evaluations looks at videos now and then. Both serve any method that trains adapters. Only rank 0 writes and prints."""
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from support.clips import told_by
from support.files import check_folder, first_line, read_json, write_json, write_text, write_whole
from support.pictures import choose_comparisons, contact_sheet, draw_curves, versions, write_comparisons, write_png
from support.ranks import all_gather, catch_signals, is_main_process, on_rank_0, progress, rank_and_size, signalled, stop_alone
from support.settings import TINY, to_record
from support.tables import add_judge, best_step, column, deciding, json_numbers, paired, summary, watched_names, with_error
from support.videos import to_pixels, video_name, write_video

VERSION = 1  # of the run folder's files
EVAL_SEED = 1_000_000  # of the noise of evaluations, by which the best one is chosen
SHOWN = 4  # videos of each prompt set on the strips


@dataclass
class Run:
    """One training run: its steps, its log and its checkpoints. The loop that trains knows steps and finish_step alone.
    adapters: {name: tensor}, sharing memory with what is trained. evaluations: an Evaluations. method: a train.Method."""
    cfg: Any
    folder: Path
    resumed: bool
    adapters: dict
    evaluations: Any
    method: Any
    step: int = 0
    bad_steps: int = 0
    lines: list = field(default_factory=list)  # of metrics.jsonl

    def steps(self, optimizer):
        """The steps still to do, with a progress bar; before the first, an evaluation if one is due."""
        self.optimizer = optimizer
        self.open()
        self.evaluate_if_due(self.step)
        with progress(None, "fine-tuning", self.cfg.steps, initial=self.step) as self.bar:
            for step in range(self.step, self.cfg.steps):
                self.started = time.perf_counter()
                yield step

    def open(self):
        """Take up what the folder holds, if the run is resumed, else remove an earlier run; then write what this one is."""
        data = self.method.data
        for rank, theirs in enumerate(all_gather(data)):
            if theirs != data:
                raise ValueError(f"clips: rank {rank_and_size()[0]} has {data}, {rank} {theirs}; must be the same on every node")
        if self.resumed:  # rank 0 alone reads: on other nodes, with disks of their own, there is no such folder
            state, self.lines, tables = on_rank_0(lambda: read_run(self.folder, self.adapters, data))
            self.evaluations.tables |= tables
            if state:
                self.step = state["step"]
                for name, tensor in state["adapters"].items():
                    self.adapters[name].copy_(tensor)
                # Its moments alone; what else an optimizer saves follows from the settings.
                self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        if not is_main_process():
            return
        if not self.resumed and any((self.folder / name).exists() for name in ("config.json", "state.pt")):
            clear(self.folder)  # without these, files of such names are somebody else's
        (self.folder / "samples").mkdir(exist_ok=True)
        for half_written in [*self.folder.glob(".????????.*"), *self.folder.glob("samples/.????????.*")]:
            half_written.unlink()  # by a killed run
        full = {name: [*map(told_by, prompts)] for name, prompts in self.evaluations.prompts.items()}  # with their pictures
        record = {"data": data, "watched": self.evaluations.watched, "prompts": self.evaluations.prompts, "told_by": full,
                  "reward": self.evaluations.rewards.name, "versions": versions()}
        if self.cfg.eval_every or not (self.folder / "run.json").is_file():  # without evaluations it keeps its prompts
            write_json(self.folder / "run.json", record)
        write_json(self.folder / "config.json", to_record(self.cfg))
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        print(f"run folder: {self.folder}" + (f", from step {self.step}" if self.step else ""))

    def finish_step(self, step, numbers, finite, stopping):
        """Log, save, evaluate; whether to go on. step: from 1. RuntimeError after cfg.max_bad_steps in a row not finite."""
        self.log_step(step, numbers, time.perf_counter() - self.started, finite)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps == self.cfg.max_bad_steps:
            raise RuntimeError(f"{self.bad_steps} steps in a row without a finite reward or gradient; the last save is good")
        stopping = stopping and step % self.method.stop_every == 0
        if stopping or step % self.cfg.save_every == 0 or step == self.cfg.steps or self.evaluations.due(step):
            self.save(step)
        if not stopping:
            self.evaluate_if_due(step)
        return not stopping

    def evaluate_if_due(self, step):
        """An evaluation, unless none is due or a run that was continued has it already."""
        evaluations = self.evaluations
        if evaluations.due(step) and not any(line["step"] == step and "eval" in line for line in self.lines):
            self.log(evaluations.look(step))
            if is_main_process():
                draw_curves(self.lines, evaluations.rewards.name, self.folder / "curves.png", evaluations.watched)

    def log(self, line):
        """Add a line to metrics.jsonl, on disk at once."""
        self.lines.append(line)
        if is_main_process():
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def log_step(self, step, numbers, seconds, finite):
        """A training line; numbers that are not finite become null, since JSON cannot hold them."""
        line = json_numbers({"step": step} | numbers | {"seconds": seconds})
        if not finite:
            line["skipped"] = sum("skipped" in other for other in self.lines) + 1
            if is_main_process():
                tqdm.write(f"step {step}: reward or gradient is not finite, skipped ({line['skipped']} so far)")
        self.log(line)
        self.bar.set_postfix_str(f"{self.evaluations.rewards.name} {numbers['reward']:.4f}, {seconds:.2f} s/step", refresh=False)
        self.bar.update()

    def save(self, step):
        """state.pt, from which training continues exactly, and the adapter alone. An earlier state stays until this is whole."""
        self.step = step
        if not is_main_process():
            return
        state = {"version": VERSION, "step": step, "config": to_record(self.cfg), "adapters": self.adapters,
                 "optimizer": self.optimizer.state_dict()}
        try:
            with write_whole(self.folder / "state.pt") as hidden:
                torch.save(state, hidden)
            self.evaluations.save_adapter(self.folder / "lora.safetensors")
        except Exception as error:  # each writer raises its own error for a full disk
            raise RuntimeError(f"{self.folder}: step {step} cannot be saved ({error}); the one before it is whole") from None


@dataclass
class Evaluations:
    """What is looked at while a run trains: videos from pure noise for held-out prompts, the same noise every time.
    prompts: {set: its prompts}. evaluate(prompts, seed, keep, move_on) -> ({measure: (n,)}, videos (keep, F, 3, H, W)) of one
    set; it calls move_on(how many videos) as it goes. rewards: those of reward.py, which score them."""
    cfg: Any
    folder: Path
    prompts: dict
    evaluate: Callable
    save_adapter: Callable
    rewards: Any
    tables: dict = field(default_factory=dict)  # {step: {set: {measure: (n,)}}}

    @property
    def watched(self):
        """The names of what --watch measures."""
        return watched_names(self.rewards.watch, self.rewards.watched)

    def due(self, step):
        """Whether the settings ask for an evaluation after `step` steps."""
        return self.cfg.eval_every > 0 and (step % self.cfg.eval_every == 0 or step == self.cfg.steps)

    def look(self, step):
        """An evaluation: its line for metrics.jsonl; on rank 0 also strips, clips, and the adapter if it is the best so far."""
        tables, videos = self.measure(step)
        self.tables[step] = tables
        if is_main_process():
            self.show(step, tables, videos)
            if best_step(self.tables, deciding(self.watched)) == step:
                self.save_adapter(self.folder / "best.safetensors")
        return {"step": step, "eval": json_numbers({name: summary(table) for name, table in tables.items()})}

    def measure(self, step):
        """Tables and a few videos of every set, {set: {measure: (n,)}} and {set: (k, F, 3, H, W)}."""
        tables, videos = {}, {}
        seed, total = EVAL_SEED, sum(map(len, self.prompts.values()))
        with progress(None, f"evaluating at step {step}", total, unit="videos", leave=False, shared=True) as bar:
            def move_on(done):
                bar.update(done)
                stop_alone()  # the checkpoint of this step is on disk
            for name, prompts in self.prompts.items():
                # The tiny world's videos are small, so all are kept; before_after.png then chooses among all.
                keep = len(prompts) if self.cfg.base in TINY else SHOWN
                tables[name], videos[name] = self.evaluate(prompts, seed=seed, keep=keep, move_on=move_on)
                first_tables = next(iter(self.tables.values()), tables)
                add_judge(self.watched, tables[name], first_tables[name])
                seed += len(prompts)
                bar.set_postfix_str(f"{self.rewards.name} of {name} {tables[name]['reward'].mean():.4f}", refresh=False)
        return tables, videos

    def show(self, step, tables, videos):
        """samples/step_000100.png with its clips as mp4, and .json with every video's numbers, for paired comparisons."""
        shown, captions, numbers = [], [], {}
        for set_name, names in clip_names(self.prompts).items():
            shown.append(videos[set_name][:SHOWN])
            captions += self.prompts[set_name][:SHOWN]
            numbers[set_name] = {measure: values.tolist() for measure, values in tables[set_name].items()}
            for name, video in zip(names, videos[set_name]):
                write_video(sample_file(self.folder, step, f"_{name}.mp4"), to_pixels(video), self.cfg.fps)
        sheet = contact_sheet([torch.cat(shown)], captions, [f"step {step}"])
        write_png(sample_file(self.folder, step, ".png"), sheet)
        write_text(sample_file(self.folder, step, ".json"), json.dumps(json_numbers(numbers)) + "\n")

    def compare(self):
        """Before and after, paired over the same prompts and noise: text, before_after.png and before_after.gif."""
        steps = sorted(self.tables)
        if not is_main_process() or len(steps) < 2 or not self.prompts:
            return
        before, after = self.tables[steps[0]], self.tables[steps[-1]]
        self.write_comparison(steps[0], steps[-1])
        print(f"\n{self.rewards.name} of videos from pure noise, before and after {steps[-1]} steps "
              "(mean, paired difference and its standard error over prompts):")
        for name in before:
            means = {measure: (before[name][measure].mean(), after[name][measure].mean()) for measure in before[name]}
            clusters = [*map(told_by, self.prompts[name])]
            gain = with_error(*paired(before[name], after[name], clusters=clusters), sign="+")
            line = "  {:10s} {:.4f} -> {:.4f}   {}   n {}".format(name, *means["reward"], gain, len(self.prompts[name]))
            if "watermark" in means:
                line += "   watermark {:.3f} -> {:.3f}".format(*means["watermark"])
            print(line)
            for _, reward in self.rewards.summed if len(self.rewards.summed) > 1 else ():
                gain = with_error(*paired(before[name], after[name], reward.name, clusters), sign="+")
                print("  {:10s} {:.4f} -> {:.4f}   {}   {}".format("", *means[reward.name], gain, reward.name))
        print(f"picture: {self.folder / 'before_after.png'}\nmoving picture: {self.folder / 'before_after.gif'}")
        if deciding(self.watched) != "reward":
            step = best_step(self.tables, deciding(self.watched))
            print(f"best.safetensors is step {step}, where {deciding(self.watched)} is highest, since it is watched")

    def write_comparison(self, first, last):
        """Of each prompt set the best, the middle and the worst gain, as a picture and moving."""
        chosen = {}
        for set_name, names in clip_names(self.prompts).items():
            rewards = zip(*(self.tables[step][set_name]["reward"].tolist() for step in (first, last)))
            files = []
            for name in names:
                files.append([sample_file(self.folder, step, f"_{name}.mp4") for step in (first, last)])
            chosen[set_name] = choose_comparisons(self.prompts[set_name], list(rewards), files)
        title = f"{self.rewards.name} of the same prompts and noise, before and after {last} steps; a frame marks the higher one"
        write_comparisons(self.folder / "before_after.png", chosen, title, self.cfg.fps)


def clip_names(prompts):
    """{set: the name of each video's clip}, which begins with a number, as prompts repeat. prompts: {set: captions}."""
    names, number = {set_name: [] for set_name in prompts}, 0
    for part in (slice(SHOWN), slice(SHOWN, None)):  # the first numbers do not depend on how many more are kept
        for set_name, captions in prompts.items():
            for caption in captions[part]:
                names[set_name].append(video_name(number, caption))
                number += 1
    return names


@catch_signals()
def train_and_report(run, train):
    """Train to the end, or until a signal: what is then printed, and the exit status. train() -> whether it came to the end."""
    try:
        finished = train()
    except KeyboardInterrupt:  # in an evaluation or a round
        finished = False
    except torch.OutOfMemoryError:
        raise RuntimeError("out of memory; these need less: --clips-at-once 1, --decode-chunk 1, --checkpoint-activations, "
                           "--low-memory (docs/gpu.md)") from None
    if finished:
        run.evaluations.compare()
        if is_main_process():
            print_end(run)
        return 0
    if is_main_process():
        print(f"stopped; to go on: the same command with --resume {run.folder}")
    return 128 + signalled() if signalled() else 1


def print_end(run):
    """Where the adapter is, two commands that go on from it."""
    adapter, flags, cfg = shlex.quote(str(run.folder / "lora.safetensors")), "", run.cfg
    for flag, value, default in (("base", cfg.base, "tiny"), ("vae", cfg.vae, None), ("text-encoder", cfg.text_encoder, None),
                                 ("frames", cfg.frames, 16), ("size", cfg.size, None), ("fps", cfg.fps, 8),
                                 ("continue", getattr(cfg, "parts", 1) - 1, 0)):
        if value != default:
            flags += f" --{flag} {shlex.quote(str(value))}"
    prompts = sum(run.evaluations.prompts.values(), []) or ["a red circle moving left" if cfg.base in TINY else "PROMPT"]
    if hasattr(prompts[0], "picture"):
        flags += f" --image {shlex.quote(str(prompts[0].picture))}"
    print(f"adapter: {adapter}\nnext: python generate.py{flags} --lora {adapter} --prompt {shlex.quote(prompts[0])}\n"
          f"      python report.py {shlex.quote(str(run.folder))}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading what a run has written

def read_run(folder, adapters, data):
    """The newest checkpoint ({} for none), and lines and tables of evaluations up to it. ValueError if it had other clips."""
    state = read_checkpoint(folder / "state.pt", adapters) if (folder / "state.pt").is_file() else {}
    recorded = read_json(folder / "run.json").get("data") if (folder / "run.json").is_file() else None
    if recorded and data and recorded != data:
        raise ValueError(f"clips: must be those that {folder} began with, {recorded}, found {data}; another list is another run")
    return state, *read_evaluations(folder, state.get("step", 0))


def read_evaluations(folder, last_step=math.inf):
    """What a run has logged up to a step: lines of metrics.jsonl, and {step: {set: {measure: (n,)}}} of its evaluations."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] <= last_step]
    tables = {}
    for line in lines:
        file = sample_file(folder, line["step"], ".json")
        if "eval" in line and file.is_file():
            tables[line["step"]] = {}
            for set_name, table in read_json(file).items():
                tables[line["step"]][set_name] = {name: column(values) for name, values in table.items()}
    return lines, tables


def read_checkpoint(path, adapters):
    """What Run.save wrote, for these adapters {name: tensor}; ValueError for anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version, step, _ = state["version"], state["step"], state["optimizer"]["state"]
        shapes = {name: t.shape for name, t in state["adapters"].items()}
    except Exception as error:  # zip, pickle or the reader itself
        raise ValueError(f"{path}: cannot be read ({first_line(error)}); without it, --resume starts again") from None
    if version != VERSION or shapes != {name: t.shape for name, t in adapters.items()}:
        raise ValueError(f"{path}: of version {version} at step {step}; expected version {VERSION}, for the model's adapters")
    return state


def read_metrics(path):
    """The lines of a metrics.jsonl, none if it is not there. ValueError names a bad one; a half-written last line is dropped."""
    lines = []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for i, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if type(line["step"]) is not int:
                raise TypeError(f"step {line['step']!r}")
            for measures in line.get("eval", {}).values():
                column([measures["reward_mean"]])
            lines.append(line)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            if i < len(texts):
                raise ValueError(f"{path}, line {i}: not what a run logs ({first_line(error)})") from None
    return lines


def sample_file(folder, step, ending):
    """A file of an evaluation, samples/step_000100 and its ending."""
    return folder / "samples" / f"step_{step:06d}{ending}"


# ---------------------------------------------------------------------------------------------------------------------
# Which folder

@contextmanager
def take_folder(cfg):
    """Yields (run folder, whether to continue what it holds), for rank 0, and keeps other processes out of the folder to the end.
    It is that of --resume, of --out, or the first new of out/PRESET, out/PRESET-2, ... An early error removes what was made."""
    named = cfg.resume or cfg.out
    check_folder(named or Path("out"))
    for number in count(1):
        folder = named or Path("out", f"{cfg.preset}-{number}" if number > 1 else cfg.preset)
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=bool(named))  # unlike a look, it cannot be overtaken by another process
            break
        except FileExistsError:
            if named:  # and a link to nothing
                raise
    lock = open(folder / ".lock", "w")
    try:
        import fcntl
        os.register_at_fork(after_in_child=lock.close)  # a worker would hold the lock after this process was killed
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = os.fstat(lock.fileno()).st_nlink > 0  # else removed by a run that has just ended
    except (OSError, ImportError) as error:  # a disk without locks, or Windows
        is_free = not isinstance(error, BlockingIOError)
    if not is_free:
        lock.close()
        raise ValueError(f"{folder}: another process is at work in it; wait for its end, or choose another folder with --out")
    try:
        yield folder, not made and is_continued(folder, cfg)
    except BaseException:
        if made and not has_trained(folder):
            clear(folder)
        raise
    finally:
        with suppress(OSError):  # of a folder that is not empty, which stays
            (folder / ".lock").unlink()
            for path in made:
                path.rmdir()
        lock.close()


def is_continued(folder, cfg):
    """Whether to continue what the folder holds. Another run is never lost unasked: ValueError.
    With --out it is an unfinished run of the same settings, so the same command goes on after a crash; torchrun repeats it when
    it restarts its workers, and then --overwrite, which was meant for an earlier run, does not count."""
    done = 0
    with suppress(Exception):  # no checkpoint, or a damaged one, which is named when it is read
        done = int(torch.load(folder / "state.pt", map_location="meta", weights_only=True)["step"])
    if cfg.resume and done > cfg.steps:
        raise ValueError(f"steps = {cfg.steps}: must be at least {done}, where this run stands")
    if cfg.resume or not has_trained(folder):
        return cfg.resume is not None
    recorded = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    other = {name for name, value in to_record(cfg).items() if recorded.get(name, "missing") != value} - {"out", "overwrite"}
    other -= {name for name in ("guidance", "dtype") if getattr(cfg, name) is None}  # recorded: the base's own, the device's
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if not other and (restarted or done < cfg.steps and not cfg.overwrite):
        return True
    if not cfg.overwrite:
        raise ValueError(f"out {folder}: holds {'another' if other else 'a finished'} run; choose another folder, "
                         f"--resume {folder}, or --overwrite")
    return False


def has_trained(folder):
    """Whether the folder holds a run that has done a step; without one, nothing is lost when it is replaced."""
    return (folder / "state.pt").exists() or any(line["step"] > 0 for line in read_metrics(folder / "metrics.jsonl"))


def clear(folder):
    """Remove an earlier run's files, and nothing else; config.json goes last, so an interrupted clear still counts as a run."""
    shutil.rmtree(folder / "samples", ignore_errors=True)
    for pattern in ("state.pt", "lora.safetensors", "best.safetensors", "metrics.jsonl", "rewards.jsonl",
                    "round_*.safetensors", "curves.png", "before_after.png", "before_after.gif", "run.json", "config.json"):
        for file in folder.glob(pattern):
            file.unlink()
