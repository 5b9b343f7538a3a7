"""Lists of clips with their captions, and lists of prompts: text files that other people made, so every line is checked."""
import csv
import functools
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from support.files import first_names, read_text, write_whole
from support.ranks import all_gather, is_main_process, map_tensors, progress, rank_and_size, take
from support.videos import FLAWS, read_all_windows, read_picture

SUFFIXES = (".mp4 .webm .avi .mov .mkv .gif .m4v .mpg .mpeg .ts .mts .m2ts .flv .f4v .ogv .wmv .asf .3gp .3g2 .vob .m2v .mxf "
            ".y4m .divx .dv .rm .rmvb .nut").split()
FORMS = {
    ".csv": "a first line naming the columns, path and caption among them; one clip per line; captions with commas in quotes",
    ".jsonl": 'one {"path": "...", "caption": "..."} per line',
    "": "one relative/path.mp4|||caption per line, or relative/path.mp4|||caption|||frame count",
}


@functools.cache
def say_once(message):
    """Print a line on the main process. Lists are read twice, first to be checked: the second time nothing is said."""
    if is_main_process():
        tqdm.write(message)


@dataclass(frozen=True)
class Clip:
    """One line of a list: a file of footage and what it shows; "" where the list has no caption."""
    path: Path
    caption: str


def read_list(path, root=None) -> list[Clip]:
    """The clips of a list, in its order; videos are not looked at. path: a .csv, a .jsonl, a list in the official form (see
    FORMS), or a folder of videos. root: the folder that paths in a list start from (default: its own)."""
    path = Path(path)
    if path.is_dir():
        return read_clip_folder(path)
    form = path.suffix.lower() if path.suffix.lower() in FORMS else ""
    lines = [line.strip() for line in read_text(path).split("\n")]
    rows = csv.reader([line + "\n" for line in lines], skipinitialspace=True, strict=True) if form == ".csv" else lines
    columns, clips = ["path", "caption", "num_frames"], []
    number = 1  # of the line at which a row begins: in a .csv, captions may have several
    try:
        for row in rows:
            if form == ".csv" and number == 1:
                columns = list(map(str.strip, row))
                if not {"path", "caption"} <= set(columns):
                    raise ValueError(f"columns {', '.join(columns) or 'none'}")
            elif row:
                clips.append(parse_row(row, form, columns, Path(root or path.parent)))
            number = rows.line_num + 1 if form == ".csv" else number + 1
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {number}: {getattr(error, 'msg', error)}. Allowed: {FORMS[form]}") from None
    if not clips:
        raise ValueError(f"{path}: an empty list. Allowed: {FORMS[form]}")
    return clips


def parse_row(row, form, columns, root):
    """The Clip of one row: a line, or the fields of a .csv's, whose names are `columns`. ValueError if it is not of this form.
    num_frames is not used: official lists have there the length of the video to generate, beside the name of a longer clip."""
    if form == ".jsonl":
        values = json.loads(row)
        if not isinstance(values, dict):
            raise ValueError(f"no path and caption in {row[:80]!r}")
    else:
        fields = row if form == ".csv" else row.split("|||")
        if len(fields) != len(columns) and (form or len(fields) != 2):  # only the official form may leave its last column out
            raise ValueError(f"{len(fields)} field(s) in {str(row)[:80]!r}")
        values = dict(zip(columns, fields))

    path, caption = values.get("path"), values.get("caption")
    if not isinstance(path, str) or not path.strip() or not isinstance(caption, str | None):
        raise ValueError(f"clip {path!r} has caption {caption!r}: must be a path and a text")
    return Clip(root / path.strip(), (caption or "").strip())


def read_clip_folder(folder):
    """A Clip for every video below a folder, in order of their names, each with the caption in the .txt file beside it."""
    paths, seen = [], set()
    for directory, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(directory) in seen:  # each folder once, so that a loop of links ends
            folders.clear()
        else:
            paths += [Path(directory, name) for name in names if not name.startswith(".")]  # macOS: ._clip.mp4
        seen.add(os.path.realpath(directory))
    clips, skipped = [], []
    for path in sorted(paths):
        text = path.with_suffix(".txt")
        if path.suffix.lower() not in SUFFIXES:
            skipped += [str(path)] if path.suffix != ".txt" else []
        elif path.suffix != ".gif" or not path.with_suffix(".mp4").is_file():  # generate.py --gif writes both of each video
            clips.append(Clip(path, read_text(text).strip() if text.is_file() else ""))
    if not clips:
        raise ValueError(f"{folder}: no clips in this folder. Allowed: {' '.join(SUFFIXES)}, each with a .txt caption")
    if skipped:
        say_once(f"{folder}: {len(skipped)} file(s) without the name of a video left out: {first_names(skipped)}")
    return clips


class Prompt(str):
    """A caption that came with a picture, from which an image-to-video base starts; `line` is both, as a list has them."""
    def __new__(cls, caption, picture=None, line=None):
        made = super().__new__(cls, caption)
        made.picture, made.line = picture, line
        return made


def told_by(prompt):
    """All that a prompt says of a video, as text: its caption, or its line."""
    return getattr(prompt, "line", None) or str(prompt)


def fit_prompts(prompts, base):
    """Prompts as a base takes them: captions, or with pictures for image-to-video. ValueError for a picture that is not there."""
    if not hasattr(base, "condition"):
        prompts = [str(prompt) for prompt in prompts]
    for prompt in prompts if hasattr(base, "condition") else ():
        picture = getattr(prompt, "picture", None)
        if picture is None:
            raise ValueError(f"prompt {str(prompt)!r}: {base.name} starts from a picture; expected a line picture.png|||caption "
                             "in a file of prompts, or generate.py --image FILE")
        read_picture(picture, 8, 8)
    report_long(prompts, base)
    return prompts


def read_prompts(path):
    """Prompts of a text file, one a line, or as the official `video|||caption|||frames`, or `picture|||caption`, whose path
    starts from the file's folder. Lines that begin with # are comments; a prompt that begins with # has a backslash before it."""
    prompts = []
    for line in map(str.strip, read_text(path, newline="\n").split("\n")):  # nothing else ends a line, not even \u2028
        if line and not line.startswith("#"):
            picture, *fields = line.split("|||")
            caption = re.sub(r"^\\#", "#", (fields or [line])[0].strip())
            prompts.append(Prompt(caption, Path(path).parent / picture.strip(), line) if fields else caption)
    if not prompts or not all(prompts):
        raise ValueError(f"prompts {path}: expected one prompt a line, found {'an empty one' if prompts else 'none'}")
    return prompts


def read_prompt_sets(named_files, has_own):
    """{name: prompts} of NAME=FILE arguments. ValueError for a malformed one, and for none unless the base has its own."""
    sets = {}
    for argument in named_files:
        name, equals, path = argument.partition("=")
        if not (name and equals and path) or name in sets:
            raise ValueError(f"prompts {argument!r}: must be NAME=FILE, each name once")
        sets[name] = read_prompts(path)
    if not sets and not has_own:
        raise ValueError("no prompts: --prompts NAME=FILE must name some, once for each set (the tiny world has its own)")
    return sets


def report_long(captions, base):
    """Say how many captions are longer than the text encoder reads."""
    long = [caption for caption in dict.fromkeys(captions) if base.is_cut(caption)]
    if long:
        say_once(f"{len(long)} caption(s) longer than the text encoder reads, their ends are not seen; the first: {long[0]!r}")


# Tensors kept on disk: one safetensors file for each, named by a hash of all that it depends on (its file's size and time, the
# settings, the encoder). So an old entry is never found for new input, and nothing needs to be deleted.

CACHE_VERSION = 2  # of how clips are read


class Stored:
    """A tensor in a cache file, or a dict of such, read only when indexed, and only that part: stored[k], stored[:]."""
    def __init__(self, path):
        self.path = path
        with safe_open(path, "pt") as file:  # SafetensorError unless the file is as long as its header says
            self.names = list(file.keys())
            self.length = file.get_slice(self.names[0]).get_shape()[0]

    def __len__(self):
        return self.length

    def __getitem__(self, where):
        with safe_open(self.path, "pt") as file:
            read = {name: file.get_slice(name)[where].clone() for name in self.names}  # off the memory map: it dies with the file
        return read["tensor"] if self.names == ["tensor"] else read


class Held(Stored):
    """A dict of tensors in memory, indexed as Stored, where there is no cache folder."""
    def __init__(self, tensors):
        self.tensors, self.length = tensors, len(next(iter(tensors.values())))

    def __getitem__(self, where):
        return take(self.tensors, where)


def cached_file(folder, *made_from):
    """Where a tensor made from this lies; None without a folder."""
    return folder and Path(folder) / f"{hashlib.sha256(json.dumps(made_from).encode()).hexdigest()}.safetensors"


def find_cached(files):
    """{item: its Stored tensor} of {item: its file}; None: no file, or a damaged one, which is named."""
    entries = dict.fromkeys(files)
    for item, file in files.items():
        try:
            entries[item] = Stored(file) if file and file.exists() else None
        except SafetensorError as error:
            tqdm.write(f"{file}: damaged ({error}); computing it anew")
    return entries


def fill_cached(entries, files, compute, unit):
    """Compute what is None in entries {item: tensor}: compute(items) yields (item, tensor or dict of tensors), or None for one
    that it cannot. files: {item: where to keep it}; with files every rank has its share of the work and finds the others'."""
    # A rank's share is one of all items: which are missing changes while other ranks are at work.
    has_cache = any(files.values())
    rank, world_size = rank_and_size() if has_cache else (0, 1)
    missing = [item for item in list(files)[rank::world_size] if entries[item] is None]
    total = sum(entries[item] is None for item in files)
    with progress(None, f"encoding {unit}", total, unit=unit, disable=not missing, shared=has_cache) as bar:
        for item, tensor in compute(missing):
            bar.update()
            if tensor is None:
                continue
            tensor = map_tensors(lambda t: t.detach().cpu().contiguous(), tensor)
            if has_cache:
                with write_whole(files[item]) as hidden:
                    save_file(tensor if isinstance(tensor, dict) else {"tensor": tensor}, hidden)
            else:
                entries[item] = Held(tensor) if isinstance(tensor, dict) else tensor
    all_gather(None)  # all have written, and what is on disk is read from there
    entries.update(find_cached({item: file for item, file in files.items() if entries[item] is None}))


def reason_against(clip, problems):
    """Why a clip cannot be used, "" if it can; problems: {path: why}."""
    return problems.get(clip.path, "" if clip.caption else f"{clip.path}: no caption")


def leave_out(clips, problems, max_skip):
    """The clips that can be used. ValueError if too many cannot."""
    reasons = [reason_against(clip, problems) for clip in clips]
    bad = list(filter(None, reasons))
    if len(bad) == len(clips) or len(bad) > max_skip * len(clips):
        raise ValueError(f"{len(bad)} of {len(clips)} clips cannot be used; at most {max_skip:.0%} may, and not all "
                         f"(--max-skip). The first: {bad[0]}")
    return [clip for clip, reason in zip(clips, reasons) if not reason]


@torch.no_grad()
def encode_clips(clips, config, base, cache_dir, num_workers, max_skip):
    """Moments, text, captions and names of all usable clips, in the list's order, as data.encode_clips describes them."""
    vae_name, text_name = base.fingerprints()
    files, problems = {}, {}
    for path in dict.fromkeys(clip.path for clip in clips):
        if not path.is_file():
            problems[path] = f"{path}: cannot be read: no such file"
            continue
        state = str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns  # others for a file that was replaced
        files[path] = cached_file(cache_dir, CACHE_VERSION, "moments", vae_name, asdict(config), state)
    entries = find_cached(files)

    # 1. What is known before the long work: files that are not there, or that one node does not see, and captions.
    for theirs in all_gather(problems):
        problems |= theirs
    for clip in dict.fromkeys(clips) if is_main_process() else ():
        if reason_against(clip, problems):
            tqdm.write(f"left out: {reason_against(clip, problems)}")
    files = {clip.path: files[clip.path] for clip in leave_out(clips, problems, max_skip)}

    # 2. Decode and encode what is missing, window by window, which bounds the memory.
    flawed = []

    def encode_paths(paths):
        for path, windows, flaws, problem in read_all_windows(paths, config, num_workers):
            flawed.extend((flaw, path) for flaw in flaws)
            if problem:
                problems[path] = problem
                tqdm.write(f"left out: {problem}")  # on any rank: only this one knows
                leave_out(clips, problems, max_skip)  # ends here if too many are bad, not when all have been encoded
            encoded = [encode_window(base, window, config.fps) for window in windows]
            yield path, map_tensors(lambda *parts: torch.cat(parts), *encoded) if encoded else None  # (n, 2C, F, h, w)

    fill_cached(entries, files, encode_paths, "clips")
    flawed = sum(all_gather(flawed), [])
    for flaw in FLAWS:
        having = [path for its_flaw, path in flawed if its_flaw == flaw]
        if having:
            say_once(f"{len(having)} clip(s) {flaw}; the first: {having[0]}")

    # 3. A clip that another rank could not read has no entry: leave it out here too.
    for path in files:
        if entries[path] is None:
            problems.setdefault(path, f"{path}: cannot be read, as another rank reports")
    good = leave_out(clips, problems, max_skip)
    if is_main_process():
        tqdm.write(f"{len(good)} of {len(clips)} clips can be used")
    captions = [clip.caption for clip in good]
    report_long(captions, base)
    moments = [entries[clip.path] for clip in good]
    text = moments  # of image-to-video: each window brings what its video is told
    if not hasattr(base, "condition"):
        text = encode_captions(captions, base.encode_captions, text_name, cache_dir)
    return moments, text, captions, [clip.path.name for clip in good]


def encode_window(base, window, fps):
    """Moments (1, 2C, f, h, w) of a window (F, 3, H, W) uint8; for image-to-video with what is told of its first frame."""
    frames = window.float() / 127.5 - 1
    if not hasattr(base, "condition"):
        return base.encode(frames)
    return {"moments": base.encode(frames), **base.condition(frames[:1], fps)}


@torch.no_grad()
def encode_captions(captions, encode_text, text_name, cache_dir=None):
    """One entry per caption, whose [:] is its features (N, E), as encode_text([B captions]) -> (B, N, E) has them."""
    def encode_missing(missing):
        for i in range(0, len(missing), 64):
            features = encode_text(missing[i:i + 64])                                              # (B, N, E)
            for j, caption in enumerate(missing[i:i + 64]):
                yield caption, take(features, j)

    files = {caption: cached_file(cache_dir, 1, "text", text_name, caption) for caption in captions}  # equal ones once
    entries = find_cached(files)
    fill_cached(entries, files, encode_missing, "captions")
    return [entries[caption] for caption in captions]
