"""
The run folder: what a run leaves behind, and how it goes on after an interruption.

config.json, run.json, metrics.jsonl, curves.png, samples/, lora.safetensors, best.safetensors, and state.pt, from which
training continues exactly. Run counts steps, logs and saves; Evaluations looks at videos now and then. How to save an adapter
and how to evaluate are two functions that they are given, so any method that trains adapters can use them. Only rank 0 writes
and prints; every file appears whole or not at all.
"""
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from tqdm import tqdm

from support.files import check_folder, first_line, read_json, write_text, write_whole
from support.pictures import choose_comparisons, contact_sheet, draw_curves, write_comparisons, write_png
from support.ranks import check_alike, on_rank_0, progress, rank_and_size, signalled
from support.settings import tensorboard_writer, to_record
from support.tables import add_judge, best_step, column, find_turn, json_numbers, or_nan, paired, summary, with_error
from support.videos import to_pixels, video_name, write_video

VERSION = 1  # of the run folder's files
EVAL_SEED = 1_000_000  # of the noise of evaluations, by which the best one is chosen
SHOWN = 4  # videos of each prompt set on the strips


class Stopped(Exception):
    """An evaluation was cut short by a signal; the checkpoint of its step is already on disk."""


class Run:
    """
    One training run: its steps, its log and its checkpoints. The loop that trains knows steps, stop and finish_step alone.

    cfg: the settings (steps, save_every, max_bad_steps, tensorboard are used here, all are recorded).
    adapters: {name: tensor}, sharing memory with what is trained. evaluations: an Evaluations.
    method: has data, which must be the same on all ranks and when continued, and stop_every.
    """

    def __init__(self, cfg, folder, adapters, evaluations, method):
        self.cfg, self.folder, self.adapters = cfg, folder, adapters
        self.evaluations, self.method = evaluations, method
        self.step, self.bad_steps, self.lines = 0, 0, []
        self.optimizer = self.optimizer_state = self.bar = self.board = None
        self.writes = rank_and_size()[0] == 0

    def open(self, resumed):
        """Take up what the folder holds, if the run is resumed, else remove an earlier run; then write what this one is."""
        record = {"data": self.method.data, "watched": self.evaluations.watched, "prompts": self.evaluations.prompts}
        if rank_and_size()[1] > 1:
            check_alike(self.method.data)
        if resumed:  # rank 0 alone reads: on other nodes, with disks of their own, there is no such folder
            state, self.lines, tables = on_rank_0(lambda: read_run(self.folder, self.cfg.steps, self.adapters, record["data"]))
            self.evaluations.take_up(self.lines, tables)
            if state:
                self.step, self.optimizer_state = state["step"], state["optimizer"]["state"]
                for name, tensor in state["adapters"].items():
                    self.adapters[name].copy_(tensor)
        if self.writes:
            if not resumed and self.folder.exists() and holds_run(self.folder):
                clear(self.folder)
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            for half_written in [*self.folder.glob(".????????.*"), *self.folder.glob("samples/.????????.*")]:
                half_written.unlink()  # by a killed run
            if self.cfg.tensorboard:
                self.board = tensorboard_writer()(self.folder / "tensorboard")
            write_text(self.folder / "run.json", json.dumps(record, indent=1) + "\n")
            write_text(self.folder / "config.json", json.dumps(to_record(self.cfg), indent=1) + "\n")
            write_text(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))

    def steps(self, optimizer):
        """The steps still to do, with a progress bar; before the first, an evaluation if one is due."""
        self.optimizer = optimizer
        if self.optimizer_state:  # its moments; what else an optimizer saves follows from the settings
            optimizer.load_state_dict(optimizer.state_dict() | {"state": self.optimizer_state})
        self.evaluate_if_due(self.step)
        if self.evaluations.ended_early():
            return
        self.bar = progress(range(self.step, self.cfg.steps), "fine-tuning", self.cfg.steps, unit="step", initial=self.step)
        for step in self.bar:
            self.started = time.perf_counter()
            yield step

    def stop(self):
        """Whether a signal asks this rank to stop."""
        return bool(signalled())

    def finish_step(self, step, numbers, finite, stopping):
        """
        All that follows a step: log, save, evaluate. Returns whether to go on: not when `stopping`, nor after an early end.

        step: counted from 1. numbers: reward, loss, grad_norm. RuntimeError after cfg.max_bad_steps steps in a row that were
        not finite.
        """
        self.log_step(step, numbers, time.perf_counter() - self.started, finite)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps == self.cfg.max_bad_steps:
            raise RuntimeError(f"{self.bad_steps} steps in a row without a finite reward or gradient; "
                               "the last checkpoint is good")
        stopping = stopping and step % self.method.stop_every == 0
        due = step % self.cfg.save_every == 0 or step == self.cfg.steps or self.evaluations.due(step)
        if stopping or due:
            self.save(step)
        if not stopping:
            self.evaluate_if_due(step)
        return not stopping and not self.evaluations.ended_early()

    def evaluate_if_due(self, step):
        """An evaluation, unless none is due or a run that was continued has it already."""
        known = any(line["step"] == step and "eval" in line for line in self.lines)
        if self.evaluations.due(step) and not known:
            self.log(self.evaluations.look(step))
            if self.writes:
                self.evaluations.draw(self.lines)

    def log(self, line):
        """Add a line to metrics.jsonl, on disk at once."""
        self.lines.append(line)
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        if self.board:
            scalars = {name: value for name, value in line.items() if name not in ("step", "eval")}
            for set_name, measures in line.get("eval", {}).items():
                scalars |= {f"eval/{set_name}/{name}": value for name, value in measures.items()}
            for name, value in scalars.items():
                self.board.add_scalar(name, or_nan(value), line["step"])

    def log_step(self, step, numbers, seconds, finite):
        """A training line; numbers that are not finite become null, since JSON cannot hold them."""
        line = json_numbers({"step": step} | numbers | {"seconds": seconds})
        if not finite:
            line["skipped"] = sum("skipped" in other for other in self.lines) + 1
            if self.writes:
                tqdm.write(f"step {step}: reward or gradient is not finite, skipped ({line['skipped']} so far)")
        self.log(line)
        said = f"{self.evaluations.reward_name} {numbers['reward']:.4f}, {seconds:.2f} s/step"
        self.bar.set_postfix_str(said, refresh=False)

    def save(self, step):
        """state.pt, from which training continues exactly, and the adapter alone. An earlier state stays until this is whole."""
        self.step = step
        if not self.writes:
            return
        state = {"version": VERSION, "step": step, "config": to_record(self.cfg),
                 "adapters": self.adapters, "optimizer": self.optimizer.state_dict()}
        try:
            with write_whole(self.folder / "state.pt") as hidden:
                torch.save(state, hidden)
            self.evaluations.save_adapter(self.folder / "lora.safetensors")
        except Exception as error:  # each writer raises its own error for a full disk
            raise RuntimeError(f"{self.folder}: step {step} cannot be saved ({error}); the one before it is whole") from None

    def close(self):
        """Let TensorBoard write what it still holds back."""
        if self.board:
            self.board.close()


class Evaluations:
    """
    What is looked at while a run trains: videos from pure noise for held-out prompts, the same noise every time.

    prompts: {set: its prompts}. evaluate(prompts, seed, keep, move_on) -> ({measure: (n,)}, videos (keep, F, 3, H, W)) of one
    set, calling move_on(number of videos) as it goes; the sets have noise of their own.
    save_adapter(path): writes the adapters. reward_name: stands beside every score. watched: measures that the guard compares.
    """

    def __init__(self, cfg, folder, prompts, evaluate, save_adapter, reward_name, watched):
        self.cfg, self.folder, self.prompts, self.evaluate = cfg, folder, prompts, evaluate
        self.save_adapter, self.reward_name, self.watched = save_adapter, reward_name, list(watched)
        self.tables, self.rewards = {}, {}  # of each evaluation, by its step
        self.writes = rank_and_size()[0] == 0

    def take_up(self, lines, tables):
        """Know the evaluations of a run that is continued: lines of metrics.jsonl, and {step: tables}."""
        self.rewards, self.tables = mean_rewards(lines), tables

    def due(self, step):
        """Whether the settings ask for an evaluation after so many steps."""
        every = self.cfg.eval_every
        return bool(every) and (step % every == 0 or step == self.cfg.steps)

    def look(self, step):
        """An evaluation: its line for metrics.jsonl; on rank 0 also strips, clips, and the adapter if it is the best so far."""
        tables, videos = self.measure(step)
        knew, self.tables[step] = self.turn(), tables
        measures = json_numbers({name: summary(table) for name, table in tables.items()})
        self.rewards[step] = mean_reward(measures)
        turn = self.turn()
        if self.writes:
            self.show(step, tables, videos)
            if best_step(self.rewards, turn) == step:
                self.save_adapter(self.folder / "best.safetensors")
            if turn and not knew:
                tqdm.write(f"guard: {turn.words(self.reward_name)}")
        return {"step": step, "eval": measures}

    def measure(self, step):
        """Tables and a few videos of every set, {set: {measure: (n,)}} and {set: (k, F, 3, H, W)}."""
        rank, world_size = rank_and_size()
        mine = sum(len(prompts[rank::world_size]) for prompts in self.prompts.values())
        tables, videos, first = {}, {}, 0
        with progress(None, f"evaluating at step {step}", mine, unit="video", leave=False) as bar:
            def move_on(number):
                bar.update(number)
                if signalled() and world_size == 1:  # with more ranks, leaving alone would keep the others waiting
                    raise Stopped
            for name, prompts in self.prompts.items():
                # The tiny world's videos are small, so all are kept; before_after.png then chooses among all.
                keep = len(prompts) if self.cfg.base == "tiny" else SHOWN
                found = self.evaluate(prompts, seed=EVAL_SEED + first, keep=keep, move_on=move_on)
                tables[name], videos[name] = found
                before = next(iter(self.tables.values()), tables)
                add_judge(self.watched, tables[name], before[name])
                first += len(prompts)
                bar.set_postfix_str(f"{self.reward_name} of {name} {tables[name]['reward'].mean():.4f}", refresh=False)
        return tables, videos

    def turn(self):
        """The guard's verdict on the evaluations so far, the same on all ranks and however often the run is continued."""
        return find_turn(self.tables, self.prompts, self.watched)

    def ended_early(self):
        """Whether --early-stop ends the run where it stands."""
        return self.cfg.early_stop and self.turn() is not None

    def draw(self, lines):
        """curves.png of all that was logged."""
        turn = self.turn()
        draw_curves(lines, self.reward_name, self.folder / "curves.png", self.watched, turn and turn.step)

    def show(self, step, tables, videos):
        """samples/step_000100.png with its clips as mp4, and .json with every video's numbers, for paired comparisons."""
        shown = torch.cat([of_set[:SHOWN] for of_set in videos.values()])
        captions = []
        for set_name in videos:
            captions += self.prompts[set_name][:SHOWN]
        write_png(sample_file(self.folder, step, ".png"), contact_sheet([shown], captions, [f"step {step}"]))
        for set_name, names in clip_names(self.prompts).items():
            for name, video in zip(names, videos[set_name]):
                write_video(sample_file(self.folder, step, f"_{name}.mp4"), to_pixels(video), self.cfg.fps)
        numbers = {}
        for name, table in tables.items():
            numbers[name] = {measure: values.tolist() for measure, values in table.items()}
        write_text(sample_file(self.folder, step, ".json"), json.dumps(json_numbers(numbers)) + "\n")

    def compare(self):
        """Before and after, paired over the same prompts and noise: text, before_after.png and before_after.gif."""
        steps = sorted(self.rewards)
        if not self.writes or len(steps) < 2:
            return
        first, last = steps[0], steps[-1]
        self.draw_comparison(first, last)
        before, after = self.tables[first], self.tables[last]
        print(f"\n{self.reward_name} of videos from pure noise, before and after {last} steps "
              "(mean, paired difference and its standard error over prompts):")
        for name in before:
            b, a = before[name], after[name]
            gain = with_error(*paired(b, a, clusters=self.prompts[name]), sign="+")
            line = f"  {name:10s} {b['reward'].mean():.4f} -> {a['reward'].mean():.4f}   {gain}   n {len(a['reward'])}"
            if "watermark" in b:
                line += f"   watermark {b['watermark'].mean():.3f} -> {a['watermark'].mean():.3f}"
            print(line)
        print(f"picture: {self.folder / 'before_after.png'}")
        if self.watched:
            turn = self.turn()
            print(f"guard: {turn.words(self.reward_name) if turn else 'nothing that is watched has turned'}; "
                  f"best.safetensors is step {best_step(self.rewards, turn)}")

    def draw_comparison(self, first, last):
        """Of each prompt set the best, the middle and the worst gain, as a picture and moving."""
        chosen = {}
        for set_name, names in clip_names(self.prompts).items():
            rewards = [self.tables[step][set_name]["reward"].tolist() for step in (first, last)]
            before = [sample_file(self.folder, first, f"_{name}.mp4") for name in names]
            after = [sample_file(self.folder, last, f"_{name}.mp4") for name in names]
            chosen[set_name] = choose_comparisons(self.prompts[set_name], list(zip(*rewards)), list(zip(before, after)))
        title = f"{self.reward_name} of the same prompts and noise, before and after {last} steps; a frame marks the higher one"
        write_comparisons(self.folder / "before_after.png", chosen, title, self.cfg.fps)


def clip_names(prompts):
    """
    {set: the name of each video's clip}, with a number that tells videos of the same prompt apart. prompts: {set: captions}.

    The first SHOWN of each set have the first numbers, so that these do not depend on how many more are kept.
    """
    names = {set_name: [] for set_name in prompts}
    number = 0
    for part in (slice(SHOWN), slice(SHOWN, None)):
        for set_name, captions in prompts.items():
            for caption in captions[part]:
                names[set_name].append(video_name(number, caption))
                number += 1
    return names


def train_and_report(run, train):
    """
    Train to the end, or until a signal: what is then printed, and the exit status. train() -> whether it came to the end.
    """
    if run.writes:
        print(f"run folder: {run.folder}" + (f", from step {run.step}" if run.step else ""))
    try:
        finished = train()
    except Stopped:
        finished = False
    except torch.OutOfMemoryError:
        raise RuntimeError("out of memory; these need less: --clips-at-once 1, --decode-chunk 1, --checkpoint-activations, "
                           "--low-memory (docs/gpu.md)") from None
    finally:
        run.close()
    if finished or run.evaluations.ended_early():
        run.evaluations.compare()
        if run.writes and run.step < run.cfg.steps:
            print(f"ended early; to go on: the same command with --resume {run.folder} --no-early-stop")
        return 0
    if run.writes:
        print(f"stopped; to go on: the same command with --resume {run.folder}")
    return 128 + signalled() if signalled() else 1


# ---------------------------------------------------------------------------------------------------------------------
# Reading what a run has written

def read_run(folder, steps, adapters, data):
    """
    The newest checkpoint ({} if there is none), and the lines and tables of its evaluations up to it.

    ValueError if the run has done more than `steps`, or had other clips: which of them a step takes follows from their order.
    """
    state = read_checkpoint(folder / "state.pt", adapters) if (folder / "state.pt").is_file() else {}
    step = state.get("step", 0)
    if step > steps:
        raise ValueError(f"steps = {steps}: must be at least {step}, where this run stands")
    recorded = read_json(folder / "run.json").get("data") if (folder / "run.json").is_file() else None
    if recorded and data and recorded != data:
        raise ValueError(f"clips: must be those that {folder} began with, {recorded}, found {data}; which clips a step takes "
                         "follows from the list, so another list is another run")

    return state, *read_evaluations(folder, step)


def read_evaluations(folder, last_step=math.inf):
    """What a run has logged up to a step: lines of metrics.jsonl, and {step: {set: {measure: (n,)}}} of its evaluations."""
    metrics, tables = folder / "metrics.jsonl", {}
    lines = [line for line in read_metrics(metrics) if line["step"] <= last_step] if metrics.is_file() else []
    for line in lines:
        file = sample_file(folder, line["step"], ".json")
        if "eval" in line and file.is_file():
            tables[line["step"]] = {}
            for set_name, table in read_json(file).items():
                tables[line["step"]][set_name] = {name: column(values) for name, values in table.items()}
    return lines, tables


def read_checkpoint(path, adapters):
    """What Run.save wrote, for these adapters {name: tensor}; ValueError for anything else, as files are data."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle or the reader itself
        raise ValueError(f"{path}: cannot be read ({first_line(error)}); without it, --resume starts again") from None
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path}: version {version!r:.20}, expected {VERSION}")
    try:
        if type(state["step"]) is not int or state["step"] < 1:
            raise TypeError(f"step {state['step']!r}")
        check_shapes(state["adapters"], adapters)
        for number, moments in state["optimizer"]["state"].items():
            name = list(adapters)[number]
            expected = {"step": torch.zeros(()), "exp_avg": adapters[name], "exp_avg_sq": adapters[name]}
            check_shapes(moments, expected)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a checkpoint of this run ({first_line(error)})") from None
    return state


def check_shapes(found, expected):
    """TypeError unless both {name: tensor} have the same names and shapes."""
    for name in found.keys() | expected.keys():
        if name not in found or name not in expected or found[name].shape != expected[name].shape:
            raise TypeError(f"tensor {name} is missing, unknown or of another shape")
        if not found[name].is_floating_point():
            raise TypeError(f"tensor {name} is {found[name].dtype}")


def read_metrics(path):
    """The lines of a metrics.jsonl. ValueError names a bad one; a half-written last line is dropped."""
    lines, texts = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for i, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if type(line["step"]) is not int:
                raise TypeError(f"step {line['step']!r}")
            if "eval" in line:
                float(mean_reward(line["eval"]))
            lines.append(line)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            if i < len(texts):
                raise ValueError(f"{path}, line {i}: not what a run logs ({first_line(error)})") from None
    return lines


def sample_file(folder, step, ending):
    """A file of an evaluation, samples/step_000100 and its ending."""
    return folder / "samples" / f"step_{step:06d}{ending}"


def mean_rewards(lines):
    """{step: mean_reward of its evaluation} of the lines of metrics.jsonl."""
    return {line["step"]: mean_reward(line["eval"]) for line in lines if "eval" in line}


def mean_reward(measures):
    """Mean reward over the prompt sets of an evaluation, by which the best is chosen: never one that is not finite."""
    mean = sum(or_nan(m["reward_mean"]) for m in measures.values()) / len(measures)
    return mean if math.isfinite(mean) else -math.inf


# ---------------------------------------------------------------------------------------------------------------------
# Which folder

def choose_folder(cfg):
    """
    (run folder, whether to continue what it holds). Another run is never lost unasked.

    With --out an unfinished run of the same settings is continued, so the same command goes on after a crash; torchrun repeats
    it when it restarts its workers, and then --overwrite, which was meant for an earlier run, does not count.
    """
    if cfg.resume is None and cfg.out is None:
        runs = [Path("out") / f"{cfg.preset}{f'-{n}' if n > 1 else ''}" for n in range(1, 10_000)]
        return next(run for run in runs if not run.exists()), False
    if cfg.resume:
        done = steps_done(cfg.resume)
        if done > cfg.steps:
            raise ValueError(f"steps = {cfg.steps}: must be at least {done}, where this run stands")
        return cfg.resume, True

    folder = cfg.out
    check_folder(folder)
    if not folder.exists() or not holds_run(folder):
        return folder, False
    done, same = steps_done(folder), holds_same_run(folder, cfg)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if same and (restarted or done < cfg.steps and not cfg.overwrite):
        return folder, True
    if not cfg.overwrite:
        raise ValueError(f"out {folder}: holds {'a finished' if same else 'another'} run; choose another folder, "
                         f"--resume {folder}, or --overwrite")
    return folder, False


def steps_done(folder):
    """Steps of the newest checkpoint, 0 if there is none; a damaged one is named when it is read."""
    try:
        done = torch.load(folder / "state.pt", map_location="meta", weights_only=True)["step"]
    except Exception:
        return 0
    return done if isinstance(done, int) else 0


def holds_run(folder):
    """Whether the folder holds a run, which a new one would overwrite."""
    return (folder / "config.json").exists() or (folder / "state.pt").exists()


def holds_same_run(folder, cfg):
    """Whether the folder has a run of exactly these settings."""
    if not (folder / "config.json").is_file():
        return False
    recorded, asked = read_json(folder / "config.json"), to_record(cfg)
    names = asked.keys() - {"out", "overwrite"}
    if cfg.guidance is None:  # recorded is the base's own
        names = names - {"guidance"}
    return all(name in recorded and recorded[name] == asked[name] for name in names)


def clear(folder):
    """Remove an earlier run's files, and nothing else; config.json goes last, so an interrupted clear still counts as a run."""
    for name in ("samples", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("state.pt", "state_*.pt", "lora.safetensors", "best.safetensors", "metrics.jsonl", "rewards.jsonl",
                    "round_*.safetensors", "curves.png", "before_after.png", "before_after.gif", "run.json", "config.json"):
        for file in folder.glob(pattern):
            file.unlink()
