"""
The run folder: what a run leaves behind, and how it goes on after an interruption.

config.json, run.json, metrics.jsonl, curves.png, samples/, lora.safetensors, best.safetensors, and state.pt, from which
training continues exactly. The loop that trains knows only Run.steps and Run.finish_step; how to save an adapter and how to
evaluate are two functions that the Run is given, so any method that trains adapters can use it.
"""
import json
import math
import os
import shutil
import socket
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from formats.tensors import check_tensors
from support import tables as guard
from support.files import check_folder, first_line, read_json, write_text, write_whole
from support.pictures import contact_sheet, draw_curves, write_comparison_gif, write_png
from support.ranks import check_alike, is_main_process, on_rank_0, progress, rank_and_size
from support.settings import to_record, translate
from support.tables import add_judge, json_numbers, number, paired, summary, with_error
from support.videos import read_video, to_pixels, video_name, write_video

VERSION = 1  # of the run folder's files
SHOWN, MOVING = 4, 2  # videos of each prompt set on the strips, and in before_after.gif


class Stopped(Exception):
    """An evaluation was cut short by a signal; the checkpoint of its step is already on disk."""


class Run:
    """
    One training run and its folder. Only rank 0 writes and prints; every file appears whole or not at all.

    cfg: the settings (steps, save_every, eval_every, keep, fps, max_bad_steps, tensorboard are used here, all are recorded).
    adapters: {name: tensor}, sharing memory with what is trained. save_adapter(path): writes them as a file.
    prompts: {set: its prompts}. evaluate(prompts, first, keep, move_on) -> ({measure: (n,)}, videos (keep, F, 3, H, W)) of one
    set, calling move_on(number of videos) as it goes; they are number first, first + 1, ... of all, with noise of their own.
    reward_name: stands beside every score. stop(): whether a signal has come.
    watched: measures of those tables that the guard compares.
    resumed: read the newest checkpoint and drop the lines of metrics.jsonl past its step.
    data: what the clips are, as LatentDataset.describe has it, or None; it must be the same on all ranks and when continued.
    """

    def __init__(self, cfg, folder, *, adapters, save_adapter, prompts, evaluate, reward_name, stop=lambda: False, watched=(),
                 resumed=False, data=None):
        self.cfg, self.folder, self.adapters, self.save_adapter = cfg, folder, adapters, save_adapter
        self.prompts, self.evaluate, self.reward_name, self.stop = prompts, evaluate, reward_name, stop
        self.step, self.bad_steps, self.watched, self.tables = 0, 0, list(watched), {}
        self.lines, self.optimizer, self.optimizer_state, self.bar, self.board = [], None, None, None, None
        self.writes = is_main_process()
        check_alike("clips", data)
        self.record = {"launch": launch(), "data": data, "watched": self.watched, "prompts": prompts,
                       "changes": []}
        if resumed:
            self.take_up(on_rank_0(self.read_folder))
        if self.writes:
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            for half_written in [*folder.glob(".????????.*"), *folder.glob("samples/.????????.*")]:
                half_written.unlink()  # by a killed run
            if cfg.tensorboard:
                self.board = tensorboard_writer()(folder / "tensorboard")
            write_text(folder / "run.json", json.dumps(self.record, indent=1) + "\n")
            write_text(folder / "config.json", json.dumps(to_record(cfg), indent=1) + "\n")
            write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))

    # -- what the loop calls

    def steps(self, optimizer):
        """The steps still to do, with a progress bar; before the first, an evaluation if one is due."""
        self.optimizer = optimizer
        if self.optimizer_state:  # its moments; what else an optimizer saves follows from the settings
            optimizer.load_state_dict(optimizer.state_dict() | {"state": self.optimizer_state})
        self.evaluate_if_due(self.step)
        if self.ended_early():
            return
        self.bar = progress(range(self.step, self.cfg.steps), "fine-tuning", self.cfg.steps, unit="step", initial=self.step,
                            disable=not self.writes)
        for step in self.bar:
            self.started = time.perf_counter()
            yield step

    def finish_step(self, step, numbers, finite, stopping):
        """
        All that follows a step: log, save, evaluate. Returns whether to go on: not when `stopping`, nor when ended_early().

        step: counted from 1. numbers: reward, loss, grad_norm. RuntimeError after cfg.max_bad_steps steps in a row that were
        not finite.
        """
        self.log_step(step, numbers, time.perf_counter() - self.started, finite)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if self.bad_steps == self.cfg.max_bad_steps:
            raise RuntimeError(f"{self.bad_steps} steps in a row without a finite reward or gradient; "
                               "the last checkpoint is good")
        if stopping or self.save_due(step):
            self.save(step)
        if not stopping:
            self.evaluate_if_due(step)
        return not stopping and not self.ended_early()

    # -- metrics

    def log(self, line):
        """Add a line to metrics.jsonl, on disk at once."""
        self.lines.append(line)
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        if self.board:
            scalars = {f"eval/{name}/{k}": v for name, m in line.get("eval", {}).items() for k, v in m.items()}
            for k, v in (scalars or line).items():
                self.board.add_scalar(k, number(v), line["step"])

    def log_step(self, step, numbers, seconds, finite):
        """A training line; numbers that are not finite become null, since JSON cannot hold them."""
        line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in numbers.items()} | {"seconds": seconds}
        if not finite:
            line["skipped"] = sum("skipped" in other for other in self.lines) + 1
            if self.writes:
                tqdm.write(f"step {step}: reward or gradient is not finite, skipped ({line['skipped']} so far)")
        self.log(line)
        self.bar.set_postfix_str(f"{self.reward_name} {numbers['reward']:.4f}, {seconds:.2f} s/step", refresh=False)

    # -- checkpoints

    def save_due(self, step):
        return step % self.cfg.save_every == 0 or step == self.cfg.steps or self.eval_due(step)

    def save(self, step):
        """state.pt, from which training continues exactly, and the adapter alone. An earlier state stays until this is whole."""
        self.step = step
        if not self.writes:
            return
        state = {"version": VERSION, "step": step, "config": to_record(self.cfg),
                 "adapters": self.adapters, "optimizer": self.optimizer.state_dict()}
        newest = self.folder / "state.pt"
        try:
            if self.cfg.keep > 1 and newest.exists():  # the one before stays under its step's number: a link until it is replaced
                before = self.folder / f"state_{self.saved_step:06d}.pt"
                before.unlink(missing_ok=True)
                os.link(newest, before)
            with write_whole(newest) as hidden:
                torch.save(state, hidden)
            self.save_adapter(self.folder / "lora.safetensors")
        except (OSError, RuntimeError, SafetensorError) as error:  # each writer raises its own error for a full disk
            raise RuntimeError(f"{self.folder}: step {step} cannot be saved ({error}); the one before it is whole") from None
        self.saved_step = step
        for old in sorted(self.folder.glob("state_*.pt"))[:-(self.cfg.keep - 1) or None]:
            old.unlink()

    def read_folder(self):
        """The newest checkpoint, {} if there is none; metrics and tables up to it; run.json with later changes. For rank 0."""
        files = [*sorted(self.folder.glob("state_*.pt")), *self.folder.glob("state.pt")]
        state = read_checkpoint(files[-1], self.adapters) if files else {}
        step = state.get("step", 0)
        if step > self.cfg.steps:
            raise ValueError(f"steps = {self.cfg.steps}: must be at least {step}, where this run stands")

        lines = []
        if (self.folder / "metrics.jsonl").is_file():
            lines = [line for line in read_metrics(self.folder / "metrics.jsonl") if line["step"] <= step]
        record = self.record | {"changes": read_changes(self.folder, step, to_record(self.cfg))}
        check_data(self.folder, record["data"])
        tables = {line["step"]: self.sample_file(line["step"], ".json") for line in lines if "eval" in line}
        return state, lines, record, {step: read_tables(file) for step, file in tables.items() if file.is_file()}

    def take_up(self, found):
        """Go on from what rank 0 has found: on other nodes, with disks of their own, there is no such folder."""
        state, self.lines, self.record, self.tables = found
        if state:
            self.step, self.optimizer_state = state["step"], state["optimizer"]["state"]
        for name in self.adapters if state else ():
            self.adapters[name].copy_(state["adapters"][name])
        self.saved_step = self.step

    def close(self):
        """Let TensorBoard write what it still holds back."""
        if self.board:
            self.board.close()

    # -- evaluation

    def eval_due(self, step):
        every = self.cfg.eval_every
        return bool(every) and (step % every == 0 or step == self.cfg.steps)

    def evaluate_if_due(self, step):
        """Videos from pure noise for the held-out prompts, the same noise every time: metrics, strips and clips."""
        if not self.eval_due(step) or any(line["step"] == step and "eval" in line for line in self.lines):
            return
        rank, size = rank_and_size()
        mine = sum(len(prompts[rank::size]) for prompts in self.prompts.values())
        tables, videos = {}, {}
        with progress(None, f"evaluating at step {step}", mine, unit="video", leave=False, disable=not self.writes) as bar:
            def move_on(number):
                bar.update(number)
                if self.stop() and size == 1:  # with more ranks, leaving alone would keep the others waiting
                    raise Stopped
            first = 0
            for name, prompts in self.prompts.items():
                tables[name], videos[name] = self.evaluate(prompts, first, SHOWN, move_on)
                add_judge(self.watched, tables[name], next(iter(self.tables.values()), tables)[name])
                first += len(prompts)
                bar.set_postfix_str(f"{self.reward_name} of {name} {tables[name]['reward'].mean():.4f}", refresh=False)

        knew, self.tables[step] = self.turn(), tables
        measures = json_numbers({name: summary(table) for name, table in tables.items()})
        turn, line = self.turn(), {"step": step, "eval": measures}
        if self.writes:
            self.show(step, tables, videos)
            if guard.best_step(mean_rewards([*self.lines, line]), turn) == step:
                self.save_adapter(self.folder / "best.safetensors")
            if turn and not knew:
                tqdm.write(f"guard: {turn.words(self.reward_name)}")
        self.log(line)
        if self.writes:
            draw_curves(self.lines, self.reward_name, self.folder / "curves.png", self.watched, turn and turn.step)

    def turn(self):
        """The guard's verdict on the evaluations so far, the same on all ranks and however often the run is continued."""
        return guard.find_turn(self.tables, self.prompts, self.watched)

    def ended_early(self):
        """Whether --early-stop ends the run where it stands."""
        return self.cfg.early_stop and self.turn() is not None

    def sample_file(self, step, ending):
        return self.folder / "samples" / f"step_{step:06d}{ending}"

    def show(self, step, tables, videos):
        """samples/step_000100.png with its clips as mp4, and .json with every video's numbers, for paired comparisons."""
        captions = [p for name in videos for p in self.prompts[name][:SHOWN]]
        shown = torch.cat(list(videos.values()))
        write_png(self.sample_file(step, ".png"), contact_sheet([shown], captions, [f"step {step}"]))
        for i, (video, caption) in enumerate(zip(shown, captions)):
            write_video(self.sample_file(step, f"_{video_name(i, caption)}.mp4"), to_pixels(video), self.cfg.fps)
        numbers = {name: {k: v.tolist() for k, v in t.items()} for name, t in tables.items()}
        write_text(self.sample_file(step, ".json"), json.dumps(json_numbers(numbers)) + "\n")

    def compare(self):
        """Before and after, paired over the same prompts and noise: text, before_after.png and before_after.gif."""
        steps = [line["step"] for line in self.lines if "eval" in line]
        if not self.writes or len(steps) < 2:
            return
        first, last = steps[0], steps[-1]
        self.draw_comparison(first, last)
        before, after = read_tables(self.sample_file(first, ".json")), read_tables(self.sample_file(last, ".json"))
        print(f"\n{self.reward_name} of videos from pure noise, before and after {last} steps "
              "(mean, paired difference and its standard error over prompts):")
        for name in before:
            b, a = before[name], after[name]
            gain = with_error(*paired(b, a, clusters=self.prompts[name]), sign="+")
            line = f"  {name:10s} {b['reward'].mean():.4f} -> {a['reward'].mean():.4f}   {gain}"
            line += f"   n {len(a['reward'])}"
            if "watermark" in b:
                line += f"   watermark {b['watermark'].mean():.3f} -> {a['watermark'].mean():.3f}"
            print(line)
        print(f"picture: {self.folder / 'before_after.png'}")
        if self.watched:
            turn = self.turn()
            print(f"guard: {turn.words(self.reward_name) if turn else 'nothing that is watched has turned'}; "
                  f"best.safetensors is step {guard.best_step(mean_rewards(self.lines), turn)}")

    def draw_comparison(self, first, last):
        """The strips of two evaluations side by side, and a few of their videos as one moving picture."""
        import imageio.v3 as iio
        strips = [torch.from_numpy(iio.imread(self.sample_file(step, ".png"))) for step in (first, last)]
        write_png(self.folder / "before_after.png", torch.cat(strips, dim=1).numpy())

        chosen, number = {}, 0  # {number of the video: caption}
        for prompts in self.prompts.values():
            for i, caption in enumerate(prompts[:SHOWN]):
                if i < MOVING:
                    chosen[number] = caption
                number += 1
        rows = [[read_video(self.sample_file(step, f"_{video_name(i, caption)}.mp4")) for i, caption in chosen.items()]
                for step in (first, last)]
        write_comparison_gif(self.folder / "before_after.gif", rows, list(chosen.values()), ["before", "after"], self.cfg.fps)


def train_and_report(run, train, caught, script="train.py"):
    """
    Train to the end, or until a signal: what is then printed, and the exit status.

    train() -> whether it came to the end. caught: the signals that have come (support.ranks.catch_signals).
    """
    if run.writes:
        print(f"run folder: {run.folder}" + (f", from step {run.step}" if run.step else ""))
    try:
        finished = train()
    except Stopped:
        finished = False
    finally:
        run.close()
    if finished or run.ended_early():
        run.compare()
        if run.writes and run.step < run.cfg.steps:
            print(f"ended early; to go on: {command(script)} --resume {run.folder} --no-early-stop")
        return 0
    if run.writes:
        print(f"stopped; continue with: {command(script)} --resume {run.folder}")
    return 128 + caught[0] if caught else 1


def command(script):
    """How this script was started, for a hint: torchrun's number of processes is what a plain `python` would lose."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    if "RANK" not in os.environ or not processes:
        return f"python {script}"
    nodes = int(os.environ["WORLD_SIZE"]) // int(processes)
    more = f" --nnodes={nodes} (and the rendezvous as before)" if nodes > 1 else ""
    return f"torchrun --nproc_per_node={processes}{more} {script}"


# ---------------------------------------------------------------------------------------------------------------------
# Reading what a run has written

def read_record(folder):
    """What run.json says: the launch, the data and the changes; {} of a run from before there was such a file."""
    return read_json(folder / "run.json") if (folder / "run.json").is_file() else {}


def read_changes(folder, step, settings):
    """The changes that run.json lists, and one more if `settings` (as JSON) differ from those that config.json has."""
    changes = list(read_record(folder).get("changes", []))
    before = translate(read_json(folder / "config.json"))
    changed = {name: [before[name], value] for name, value in settings.items() if before.get(name, value) != value}
    return [*changes, {"step": step} | changed] if changed else changes


def check_data(folder, data):
    """ValueError if the clips are not those that the run began with: which of them a step takes follows from their order."""
    recorded = read_record(folder).get("data")
    if recorded and data and recorded != data:
        raise ValueError(f"clips: must be those that {folder} began with, {recorded}, found {data}; which clips a step takes "
                         "follows from the list, so another list is another run")


def read_checkpoint(path, adapters):
    """What Run.save wrote, for these adapters {name: tensor}; ValueError for anything else, as files are data."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle or the reader itself
        raise ValueError(f"{path}: cannot be read ({first_line(error)}); without it, --resume takes the one before, "
                         "or starts again") from None
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path}: version {version if type(version) is int else type(version).__name__}, expected {VERSION}")
    try:
        moments = {f"{k} of parameter {i}": v for i, kept in state["optimizer"]["state"].items() for k, v in kept.items()}
        expected = {f"{k} of parameter {i}": torch.zeros(()) if k == "step" else p
                    for i, p in enumerate(adapters.values()) for k in ("step", "exp_avg", "exp_avg_sq") if moments}
        check_tensors(adapters | expected, state["adapters"] | moments, path)
        if type(state["step"]) is not int or state["step"] < 1:
            raise TypeError(f"step {state['step']!r}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a checkpoint of a run ({first_line(error)})") from None
    return state


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


def read_tables(path):
    """{set: {measure: (n,)}} of a samples/step_000100.json."""
    return {name: {k: torch.tensor([*map(number, v)], dtype=torch.float64) for k, v in table.items()}
            for name, table in read_json(path).items()}


def mean_rewards(lines):
    """{step: mean_reward of its evaluation} of the lines of metrics.jsonl."""
    return {line["step"]: mean_reward(line["eval"]) for line in lines if "eval" in line}


def mean_reward(measures):
    """Mean reward over the prompt sets of an evaluation, by which the best is chosen: never one that is not finite."""
    mean = sum(number(m["reward_mean"]) for m in measures.values()) / len(measures)
    return mean if math.isfinite(mean) else -math.inf


def tensorboard_writer():
    """TensorBoard's class of writers; ValueError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard is not installed: `pip install tensorboard`, or leave --tensorboard out") from None
    return SummaryWriter


# ---------------------------------------------------------------------------------------------------------------------
# Which folder

def choose_folder(cfg):
    """
    (run folder, whether to continue what it holds). A fresh one unless asked; what it holds of another run is never lost unasked.

    When torchrun restarts its workers after a crash, they continue the run that the same start of torchrun has begun, if it had
    come that far. An older run of the same settings is another one.
    """
    if cfg.resume:
        check_steps(cfg.resume, cfg.steps)
        return cfg.resume, True
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if cfg.out is None:
        runs = [Path("out") / f"{cfg.preset}{f'-{n}' if n > 1 else ''}" for n in range(1, 10_000)]
        for run in runs if restarted else ():
            if holds_same_run(run, cfg):
                return run, True
        return next(r for r in runs if not r.exists()), False
    check_folder(cfg.out)
    same = restarted and holds_same_run(cfg.out, cfg)
    if holds_run(cfg.out) and not (same or cfg.overwrite):
        raise ValueError(f"out {cfg.out}: holds a run already; choose another folder, --resume {cfg.out}, or --overwrite")
    return cfg.out, same


def check_steps(folder, steps):
    """ValueError if the run has done more steps than these; known before anything is loaded."""
    try:
        done = torch.load(folder / "state.pt", map_location="meta", weights_only=True)["step"]
    except Exception:  # none yet, or a damaged one, which is named when it is read
        return
    if isinstance(done, int) and done > steps:
        raise ValueError(f"steps = {steps}: must be at least {done}, where this run stands")


def holds_same_run(folder, cfg):
    """Whether the folder has a run of this launch and of exactly these settings."""
    if not (folder / "config.json").is_file() or read_record(folder).get("launch") != launch():
        return False
    recorded, asked = read_json(folder / "config.json"), to_record(cfg)
    if cfg.guidance is None:  # recorded is the base's own
        asked["guidance"] = recorded.get("guidance")
    return recorded == asked


def launch():
    """
    What tells one start of torchrun from another, the same for all its restarts; None without torchrun.

    Its run id is "none" unless one is given, and may be given twice; so the process that runs torchrun counts, too, where there
    is but one node. With more, rank 0 may move from one to another.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"{name} {socket.gethostname()} {os.getppid()}" if one_node or name == "none" else name


def holds_run(folder):
    """Whether the folder holds a run, which a new one would overwrite."""
    return any((folder / name).exists() for name in ("config.json", "state.pt"))


def make_room(folder, resumed):
    """Remove the run that --overwrite replaces, if there is one."""
    if is_main_process() and holds_run(folder) and not resumed:
        clear(folder)


def clear(folder):
    """Remove an earlier run's files, and nothing else; config.json goes last, so an interrupted clear still counts as a run."""
    for name in ("samples", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("state.pt", "state_*.pt", "lora.safetensors", "best.safetensors", "metrics.jsonl", "rewards.jsonl",
                    "round_*.safetensors", "curves.png", "before_after.png", "before_after.gif", "run.json", "config.json"):
        for file in folder.glob(pattern):
            file.unlink()
