"""
Videos as VBench (arXiv:2311.17982) reads them, so that others can check what a run gained by measures that are not ours.
VBench needs an environment of its own, with older libraries than these: so files are written here, and its command is printed.

    OUT/videos/        PROMPT-0.mp4, PROMPT-1.mp4, ... and nothing else: VBench takes the ending of any one file for that of all
    OUT/prompts.json   {file: prompt}, which VBench wants for prompts that are not its own
    OUT/seeds.json     {file: seed}, a different one for each video
"""
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from support.files import first_names, write_json
from support.ranks import all_gather
from support.videos import to_pixels, write_video

# What VBench measures of any prompt; the others need its own prompts, about which it knows more than the words.
DIMENSIONS = ("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
              "imaging_quality")
LONGEST = 249  # bytes of a prompt: with -0.mp4 those of the longest file name, 255


def plan_files(prompts, seed, per_prompt, out):
    """{seed of a video: (its file in `out` without the ending, its prompt)}: each prompt `per_prompt` times in a row, video i
    with seed + i. ValueError for a prompt that cannot be part of a file's name, and for other files among those of before."""
    files, seen = {}, Counter()
    for prompt in prompts:
        size = len(prompt.encode(errors="surrogateescape"))
        if "/" in prompt or size > LONGEST:
            found = "has a /" if "/" in prompt else f"has {size} bytes"
            raise ValueError(f"vbench: prompt {prompt[:60]!r} {found}: VBench knows a prompt by the file's name, so it must have "
                             f"no / and at most {LONGEST} bytes")
        for _ in range(per_prompt):
            files[seed + len(files)] = f"videos/{prompt}-{seen[prompt]}", prompt
            seen[prompt] += 1

    planned = {f"{file}.mp4" for file, _ in files.values()}
    others = [path.name for path in (out / "videos").glob("*") if f"videos/{path.name}" not in planned]
    if others:
        raise ValueError(f"vbench: {out / 'videos'} holds {len(others)} other files ({first_names(others)}), and VBench would "
                         "score them, too: choose another --out, or remove them")
    return files


@dataclass
class Folder:
    """A model's videos for VBench in `out`; called as write(seed, video (F, 3, H, W) in about [0, 1]). files: plan_files'."""
    out: Path
    files: dict
    fps: int = 8

    def __call__(self, seed, video):
        write_video(self.out / f"{self.files[seed][0]}.mp4", to_pixels(video), self.fps)


def open_folders(cfg, sets, models):
    """(sets {name: prompts} with each prompt `per_prompt` times in a row, {model: its Folder}) by evaluate.py's settings; seeds
    run through all sets. Without --vbench the sets as they are, and no folder."""
    if not cfg.vbench:
        return sets, {}
    repeated, folders = {}, {}
    for name, prompts in sets.items():
        repeated[name] = [prompt for prompt in prompts for _ in range(cfg.per_prompt)]
    for name in models:
        out = cfg.out / name
        folders[name] = Folder(out, plan_files(sum(repeated.values(), []), cfg.seed, 1, out), cfg.fps)
    all_gather(None)  # or a slower rank would see what a faster one is writing
    return repeated, folders


def finish(*folders):
    """Write the lists beside the videos, once all of these are there, and print the commands that score them."""
    for folder in folders:
        prompts = {f"{file.removeprefix('videos/')}.mp4": prompt for file, prompt in folder.files.values()}
        write_json(folder.out / "prompts.json", prompts)
        write_json(folder.out / "seeds.json", dict(zip(prompts, folder.files)))
    if folders:
        print("in VBench's own environment (its own prompts: without --mode and --prompt_file, and with any dimension):")
    for out in (folder.out.resolve() for folder in folders):
        print(shlex.join(["vbench", "evaluate", "--videos_path", f"{out}/videos", "--dimension", *DIMENSIONS,
                          "--mode=custom_input", "--prompt_file", f"{out}/prompts.json"]), flush=True)
