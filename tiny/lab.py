"""
What a study works with: training runs and the tables of their videos, each made once, and one line of a result.

Every study compares with the base over the same prompts and the same noise, from pure noise, on held-out prompts. Runs and
tables lie under out/studies, where studies find each other's and an interrupted one its own.
"""
import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import lora
import train
from evaluate import REPORT_SEED, evaluate, prompt_sets
from generate import generate
from model import decode_frames, load_base
from reward import load_reward
from sampler import GUIDANCE
from support.files import read_json, write_whole
from support.ranks import progress
from support.settings import first_given, to_json
from support.tables import paired, summary
from support.videos import to_pixels
from tiny import world
from tiny.judge import find_judge

ROOT = Path(__file__).resolve().parents[1]
SETS = ("in_domain", "new", "other")


@dataclass
class Settings:
    """How much is measured, and where it is kept."""
    count: int = 64
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

    def tune(self, *flags, watch=(), module=train):
        """
        The folder of the training run with these flags (and default ones left out), continued if it was cut short.

        watch: flags that change what is looked at, not the run. module: train, or a method of methods/.
        """
        flags = tidy(flags, module.PRESETS["tiny"])
        name = () if module is train else (module.__name__.split(".")[-1],)
        words = [word.strip("-").replace("/", "_") for word in (*name, *flags, *watch)]
        folder = self.cfg.work / ("-".join(words) or "default")
        if not (folder / "done").exists():
            new = [*flags, *(watch or ("--eval-every", "0")), "--out", str(folder)]
            old = ["--resume", str(folder)]
            with contextlib.redirect_stdout(io.StringIO()):
                if status := module.main(old if (folder / "config.json").exists() else new):
                    sys.exit(status)
            (folder / "done").touch()
        return folder

    def table(self, run, name, num_steps=20, guidance=None, adapter="lora"):
        """
        {measure: (n,)} of the videos of a prompt set, by the base (run None) or with a run's adapter, the last or the "best".

        They are evaluate.py's: the sets have noise of their own, so that all of them together are independent videos.
        """
        guidance = first_given(guidance, self.guidance)
        count = self.cfg.count
        which = "best-" if adapter == "best" else ""
        file = (run or self.cfg.work / "base") / f"{which}{name}-D{num_steps}-guidance{guidance:g}-n{count}.json"
        if not file.exists():
            with progress(None, f"{file.parent.name}, {file.stem}", count, unit="video", leave=False) as bar:
                table, _ = evaluate(self.model(run, adapter), self.reward, self.prompts[name], seed=self.seed(name, 0),
                                    num_steps=num_steps, guidance=guidance, judge=self.judge, move_on=bar.update)
            with write_whole(file) as hidden:
                hidden.write_text(json.dumps({k: v.tolist() for k, v in table.items()}) + "\n")
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in read_json(file).items()}

    def model(self, run, adapter="lora"):
        """The base (run None), or with a run's adapter; one tuned model is kept."""
        if run and (run, adapter) not in self.models:
            tuned = load_base("tiny")
            lora.load(tuned.unet, run / f"{adapter}.safetensors")
            self.models = {(run, adapter): tuned}
        return self.models[run, adapter] if run else self.base

    def seed(self, name, i):
        """Of video i of a set; the sets have noise of their own."""
        return REPORT_SEED + SETS.index(name) * self.cfg.count + i

    def video(self, run, name, i):
        """Video i of a set as it was measured: (F, H, W, 3) uint8."""
        model = self.model(run)
        (_, z_0), = generate(model, [self.prompts[name][i]], [self.seed(name, i)], guidance=self.guidance)
        return to_pixels(decode_frames(model.vae, z_0[None])[0])

    def row(self, label, run, name="in_domain", num_steps=20, guidance=None, against=None, **more):
        """One line of a study: what was measured, and the paired differences from the base (or `against`, a table)."""
        guidance = first_given(guidance, self.guidance)
        table = self.table(run, name, num_steps, guidance)
        row = {"label": label, "set": name, "num_steps": num_steps, "guidance": guidance, "measures": summary(table)} | more
        if run or against:
            before = against or self.table(None, name, num_steps, guidance)
            row["differences"] = differences(before, table, self.prompts[name])
        print(f"{label}, {name}: {row['measures']['reward_mean']:.4f}", row.get("differences", {}).get("reward", ""), flush=True)
        return row

    def seeds_row(self, label, runs, names=("in_domain",), num_steps=20):
        """One line for several training seeds, and several sets together, as pooled_row has it."""
        before = join([self.table(None, name, num_steps) for name in names])
        after = [join([self.table(run, name, num_steps) for name in names]) for run in runs]
        prompts = [prompt for name in names for prompt in self.prompts[name]]
        row = pooled_row(label, names[0] if len(names) == 1 else "all", before, after, prompts)
        return row | {"num_steps": num_steps, "guidance": self.guidance}


def pooled_row(label, name, before, after, prompts):
    """
    One line for several training seeds: before and after [k] are tables, each video's mean over the k seeds is compared.

    "differences": mean and its standard error over prompts; "spread": the standard deviation over the training seeds of
    each seed's own mean difference. The mean over k seeds has the k-th root of that as its error over seeds.
    """
    pooled = {k: torch.stack([table[k] for table in after]).mean(dim=0) for k in before}
    spread = {k: torch.stack([(table[k] - before[k]).mean() for table in after]).std().item() if len(after) > 1 else None
              for k in before}
    return {"label": label, "set": name, "measures": summary(pooled), "base_std": summary(before)["reward_std"],
            "differences": differences(before, pooled, prompts), "spread": spread, "seeds": len(after)}


def differences(before, after, prompts):
    """{measure: (paired difference, its standard error over prompts)}."""
    return {k: paired(before, after, k, prompts) for k in before}


def join(tables):
    """Several sets' tables as one."""
    return {k: torch.cat([t[k] for t in tables]) for k in tables[0]}


def tidy(flags, default):
    """Flags without those that say what holds by `default` anyway: runs that are the same get the same name."""
    pairs = [(f, v) for f, v in zip(flags[::2], flags[1::2])]
    default = to_json(default)
    return tuple(x for f, v in pairs if str(default.get(f.strip("-").replace("-", "_"))) != v for x in (f, v))
