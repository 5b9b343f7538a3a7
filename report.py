"""
Look at runs: one page of them, a blind comparison of two models, and what the votes say.

    python report.py out/tiny                               # or several: clips, curves, tables, changes
    python report.py out/tiny tiny/studies/tau.json --open
    python report.py --blind out/tiny@0 out/tiny            # or two folders of generate.py
    python report.py --tally votes-anna.json votes-ben.json

The pages open from disk and fetch nothing. A blind comparison is two files: blind.html for the voters, who export their votes
from it, and key.json, which says whose clips are on which side, for whoever counts.
"""
import support.threads  # noqa: F401  before torch is loaded
import webbrowser
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from pages import run_files as run_pages
from pages.html import clip_uri, write_page
from pages.votes import QUESTIONS, draw_key, read_key, read_votes, tally, unblind
from support.clips import read_prompt_sets
from support.files import check_folder, write_json, write_text
from support.pictures import markdown
from support.ranks import run_script


@dataclass(frozen=True)
class Config:
    """Look at runs, compare two models blindly, or count the votes."""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # run folders, folders of run folders, and studies' .json files
    blind: tuple[str, str] | None = None
    """two run folders, or folders of generate.py for the same prompts and seeds; FOLDER@STEP: that evaluation, else the last"""
    prompts: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """NAME=FILE, repeatable, for --blind: the prompt sets that generate.py was given, in this order"""
    tally: tuple[Path, ...] = ()  # files of votes that the blind page exported
    key: Path | None = None  # for --tally: the comparison's key.json; default the one beside the votes, else out/blind/key.json
    out: Path | None = None  # folder of the page; default out/report or out/blind
    open: bool = False  # show the page in the browser


def finish(cfg, path, size, words=""):
    """Say what was written, and open it if asked."""
    print(f"written: {path} ({size:.1f} MB){words}")
    if cfg.open:
        webbrowser.open(path.resolve().as_uri())


def report(cfg):
    """One page of runs and studies."""
    folders = []
    studies = []
    for path in cfg.runs:
        inside = sorted(file.parent for file in path.glob("*/config.json"))
        if path.suffix == ".json":
            studies.append(run_pages.read_study(path))
        elif inside and not (path / "config.json").is_file():
            folders += inside  # a folder of run folders is all of them
        else:
            folders.append(path)
    runs = [run_pages.read_run(folder) for folder in folders]
    path = (cfg.out or Path("out/report")) / "report.html"
    size = write_page(path, "report.html", title="Report", runs=runs, studies=studies,
                      parts=run_pages.clip_rows(runs), changed=run_pages.changed_settings(runs),
                      charts=run_pages.curves(runs), gains=run_pages.gains(runs))
    finish(cfg, path, size)


def blind(cfg):
    """The voters' page and the key."""
    out = cfg.out or Path("out/blind")
    if (out / "key.json").exists():
        raise ValueError(f"out {out}: holds the key of an earlier comparison, which its votes need; choose another folder")
    prompts = read_prompt_sets(cfg.prompts, True)  # may be none, as for the tiny world
    key = draw_key(cfg.blind, run_pages.pair_up(*cfg.blind, prompts))
    shown = []
    for pair in key["pairs"]:
        sides = {side: clip_uri(pair["files"][unblind(pair, side)]) for side in ("left", "right")}
        shown.append({"caption": pair["caption"]} | sides)
    size = write_page(out / "blind.html", "blind.html", title="Which of the two?", comparison=key["comparison"],
                      pairs=shown, questions=QUESTIONS)
    write_json(out / "key.json", key)
    finish(cfg, out / "blind.html", size,
           f", {len(shown)} prompts; {out / 'key.json'} says whose clips are where: keep it from the voters")


def count_votes(cfg):
    """The table of the votes."""
    beside = cfg.tally[0].parent / "key.json"
    file = cfg.key or (beside if beside.is_file() else Path("out/blind/key.json"))
    key = read_key(file)
    votes = {}
    for path in cfg.tally:
        rater, ballot = read_votes(path, key)
        if rater in votes:
            raise ValueError(f"{path}: votes of {rater!r} were counted already; each rater counts once")
        votes[rater] = ballot
    result = tally(key, votes)
    rows = [["who", "question", "set", "prompts", "votes", "A better", "tie", "B better"]]
    for row in result["rows"]:
        rows.append([row["who"], row["question"], row["set"], row["prompts"], row["votes"]])
        for share, low, high in row["shares"].values():
            rows[-1].append(f"{share:.0%} ({low:.0%} to {high:.0%})")
    text = f"A is {key['a']}, B is {key['b']}. Raters: {len(votes)}. In parentheses 95% intervals over prompts.\n\n"
    text += markdown(rows)
    for row in result["agreement"]:
        kappa = "not defined (all the same)" if row["kappa"] is None else f"{row['kappa']:.2f}"
        text += f"\nAgreement on {row['question']}, {row['between']}: {row['measure']} {kappa} ({row['prompts']} prompts)."
    print(text)
    if cfg.out:
        write_text(cfg.out / "tally.md", text + "\n")
        write_json(cfg.out / "tally.json", result)
        print(f"written: {cfg.out}/tally.md, tally.json")


def main(cfg):
    """Whichever of the three was asked for."""
    actions = {"runs": report, "blind": blind, "tally": count_votes}
    chosen = [name for name in actions if getattr(cfg, name)]
    if len(chosen) != 1:
        raise ValueError("give either run folders, or --blind A B, or --tally FILE...; "
                         f"found {' and '.join(chosen) or 'none of them'}")
    if cfg.out:
        check_folder(cfg.out)
    actions[chosen[0]](cfg)


if __name__ == "__main__":
    run_script("report.py", lambda: main(tyro.cli(Config, description=__doc__)))
