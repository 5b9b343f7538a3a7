"""Settings: the fields that several scripts share, checks that read as one line, and runs that are continued.
Every script has one frozen dataclass, from which tyro makes its command line; a field's docstring is its help."""
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_type_hints

import tyro
from typeguard import TypeCheckError, check_type  # which tyro brings

from support.clips import read_list, read_prompt_sets, say_once
from support.files import check_folder, read_json

# What each base was trained for; its preset takes it from here, and its file in bases/ what its own configuration does not say.
# size: None is what that says, 256. tau: where as much of a clip is left as at ModelScopeT2V's 0.6, the paper's. lambda_tar:
# 16 / F for more than 16 frames, so that the first frame counts as it does there.
BASES = {
    "modelscope": dict(frames=16, size=None, fps=8, guidance=3., num_steps=20, tau=.6, lambda_tar=1.,
                       offset_noise=.1),  # official code
    "videocrafter": dict(frames=16, size="320x512", fps=28, guidance=12., num_steps=20, tau=.5, lambda_tar=1.),
    "svd": dict(frames=14, size="320x512", fps=7, guidance=3., num_steps=25, tau=.36, lambda_tar=1., grad_steps=3),
    "wan": dict(frames=17, size=256, fps=16, guidance=5., num_steps=20, tau=.4, lambda_tar=16 / 17),
    "cogvideox": dict(frames=17, size=256, fps=8, guidance=6., num_steps=20, tau=.35, lambda_tar=16 / 17),
    "opensora": dict(frames=51, size=256, fps=24, guidance=7., num_steps=20, tau=.5, lambda_tar=16 / 51)}
# Those that ship, with clips, prompts and a judge: against the defaults of train.py, which are those of "tiny". The second has
# fewer evaluations, so that a run takes less than three minutes.
TINY = {"tiny": {}, "tiny-wan": dict(frames=17, size=32, fps=8, guidance=1.5, tau=.4, lr=5e-4, anchor=.02, eval_every=40,
                                     eval_count=16)}


@dataclass(frozen=True)
class ModelSettings:
    """Which text-to-video model, where and how precise."""
    base: str = "tiny"  # the text-to-video model: tiny, a folder, file or hub id, or random (random:64, random-wan, ...: small)
    vae: str | None = None  # another autoencoder than the base's
    text_encoder: str | None = None  # another text encoder than the base's
    device: str | None = None  # cuda, mps or cpu; default the first of these that is there
    dtype: str | None = None
    """float32, bfloat16 or float16 of what is frozen; default on cuda bfloat16, or float16 on cards without, else float32"""


@dataclass(frozen=True)
class RewardSettings(ModelSettings):
    """The same, and what scores its videos."""
    reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """hpsv2 (default: v2.0, the paper's and the official code's; may end in /crop or /stretch), hpsv2.1, pickscore, aesthetic,
    imagereward, yolos:CLASS, videomae:ACTION, vjepa, videoreward (or :VQ, :MQ, :TA), viclip, my_file.py:function; in the tiny
    world action:DIRECTION, removal:watermark, proxy; repeatable, with a weight as in aesthetic=0.05 (docs/rewards.md)"""
    reward_weights: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=PATH, the weights of a reward, repeatable; a bare PATH where there is one reward. Default the base's own, else the
    hub's; random and random:W as for base"""
    watch: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """what is measured at evaluations and never optimised, repeatable: a reward; motion, flicker, consistency, sharpness,
    saturation (pixels is all of these), diversity; in the tiny world judge (docs/runs.md)"""


@dataclass(frozen=True)
class TrainingSettings(RewardSettings):
    """The same, which clips to train on, how much memory to use, and what to leave behind. Each method adds its own."""
    preset: tyro.conf.Suppress[str] = "tiny"
    """tiny, or a base's (docs/bases.md): named first on the command line, not by a flag; it sets the defaults of the others"""
    data: Path | None = None
    """clips and captions: a list of `path|||caption` lines, a .csv or .jsonl, or a folder of clips with .txt files; the tiny
    world draws its own"""
    data_root: Path | None = None  # folder that the list's paths start from; default the list's own
    max_skip: float = 0.1  # share of the clips that may be left out, each with its reason, before the run stops
    workers: int = 2  # processes that decode clips while they are encoded; changes the time, not the result
    cache: bool = True  # keep latents and text embeddings of --data on disk
    cache_dir: Path = Path("cache")  # folder of the cached latents and text embeddings

    prompts: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=FILE, evaluation prompts, a file as generate.py --prompts reads it; default the tiny world's three sets"""
    eval_every: int = 20  # steps between evaluations, with one before the first and after the last step; 0 is none at all
    eval_count: int = 24  # videos of each prompt set in an evaluation; 0 is one for each line of its file
    save_every: int = 20  # steps between checkpoints; the last step is always saved
    max_bad_steps: int = 10  # steps in a row without a finite reward or gradient, each skipped, that stop the run
    out: Path | None = None  # the run folder, whose unfinished run of the same settings is continued; default a new out/<preset>
    overwrite: bool = False  # replace the run that --out holds
    resume: Path | None = None
    """continue the run of this folder, with its own settings; those that change numbers by rounding at most and --steps may be
    given anew"""

    lora_alpha: float | None = None  # the adapters' scale is this over their rank; default the rank, which is a scale of 1
    lora_layers: Literal["qkvo", "qkv"] = "qkvo"
    """projections of each attention that are adapted: query, key, value and output (paper, Appendix C), or not the output"""
    anchor: float = 0.0
    """b: the reward loses b times the mean square distance of the network's predictions to the base's, against over-optimisation
    (ours; docs/studies.md)"""

    clips_at_once: int = 0
    """clips of a rank's share of the batch that are computed at once, which sets the memory, not the gradient; 0 is all of them.
    Evaluations compute up to 8 videos at once; where a flag below saves memory, as many as clips at once"""
    checkpoint_activations: bool = False  # recompute the network's blocks in the backward pass: less memory, more time
    decode_chunk: int = 0  # frames that pass decoder and reward at a time, recomputed in the backward pass; 0 is all at once
    low_memory: bool = False  # checkpoint_activations and decode_chunk 1
    latent_context: int | None = None
    """of a base whose decoder mixes frames; default its own, 2. Wan, CogVideoX: latents with gradient, of those a frame is made
    from; Stable Video Diffusion: frames on each side that a frame is decoded with, which changes its pixels"""
    save_on_cpu: bool = False  # what the backward pass needs waits in the host's memory: less on the accelerator, more time
    compile: bool = False  # torch.compile the network


# ---------------------------------------------------------------------------------------------------------------------
# What a size means, and what a base can do

def rows_columns(size, default=1):
    """(H, W) in pixels of a --size, 256 or 480x832, or of the base's own, `default`, where it is None. ValueError for others."""
    words = str(default if size is None else size).split("x")
    if len(words) > 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"size = {size}: must be pixel rows and columns, as in 256 or 480x832")
    return int(words[0]), int(words[-1])


def clip_shape(base, cfg):
    """(F, H, W) of the videos that a script's settings ask for; where they say no size, of the base's own."""
    return cfg.frames, *rows_columns(cfg.size, base.default_size)


def chain_levels(base, cfg):
    """The noise levels of a run's chain. Some bases' depend on how large its clips are."""
    return base.levels(cfg.num_steps, clip_shape(base, cfg))


def fit_to_base(cfg, base):
    """The settings with what is the base's own, and the base as they ask. ValueError for what is not for this base."""
    made_for = {"tiny": "modelscope", "tiny-wan": "wan"}.get(cfg.preset, cfg.preset)
    if made_for != base.kind and {made_for, base.kind} <= BASES.keys():
        raise ValueError(f"preset {cfg.preset}: is not for base {base.name}, whose own is {base.kind}")
    base.chain_predict(cfg.cache_interval)  # refuses what it cannot do
    base.fps, base.parts = cfg.fps, getattr(cfg, "parts", 1)  # some networks are told the first
    if base.parts > 1 and not hasattr(base, "next_text"):
        raise ValueError(f"parts = {base.parts}: must be 1, since {base.name} starts from no picture")
    if cfg.latent_context is not None:
        if not hasattr(base, "latent_context"):
            raise ValueError(f"latent_context: cannot be set, as base {base.name} decodes frames from their own latents alone")
        base.latent_context = cfg.latent_context
    guidance = base.guidance if cfg.guidance is None else cfg.guidance
    return replace(cfg, guidance=guidance, dtype=str(base.dtype).removeprefix("torch."))  # recorded with the run


# ---------------------------------------------------------------------------------------------------------------------
# Checks: ValueError says what was wrong and what is allowed. None means: decided once the model is loaded.

def check_at_least(cfg, *above_zero, **least):
    """Settings named by position are above 0, those by keyword at least its value (-inf: any finite number); None passes."""
    for name in (*above_zero, *least):
        value, smallest = getattr(cfg, name), least.get(name, 0)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not (math.isfinite(number) and number >= smallest and (number or name in least)):
                bound = f"at least {smallest}" if name in least else "a finite number above 0"
                raise ValueError(f"{name} = {number}: must be {bound if smallest > -math.inf else 'a finite number'}")


def check_training(cfg, world_size):
    """What TrainingSettings and the steps and batches of every method must be."""
    check_at_least(cfg, "lr", "clip_grad", "lora_alpha", steps=1, batch_size=1, max_bad_steps=1, save_every=1, frames=1,
                   fps=1, rank=1, clips_at_once=0, eval_every=0, eval_count=0, workers=0, decode_chunk=0, max_skip=0, warmup=0,
                   offset_noise=0, lambda_tar=0, cache_interval=1, guidance=-math.inf, latent_context=1, anchor=0)
    if cfg.size is not None:
        rows_columns(cfg.size)
    if cfg.compile and cfg.cache_interval > 1:
        raise ValueError(f"compile: cannot be had with cache_interval = {cfg.cache_interval}, as it takes the network as a whole")
    if cfg.batch_size % world_size:
        raise ValueError(f"batch_size = {cfg.batch_size}: must be a multiple of {world_size}, the number of ranks")
    if world_size > 1 and not (cfg.out or cfg.resume):
        raise ValueError("out: must be given with torchrun, whose restarted workers find their run in it")
    if cfg.data is not None:
        if cfg.cache:
            check_folder(cfg.cache_dir, "cache_dir")
        read_list(cfg.data, cfg.data_root)
    if cfg.eval_every:
        read_prompt_sets(cfg.prompts, cfg.base in TINY)


# ---------------------------------------------------------------------------------------------------------------------
# The command line of a script that trains

GONE = {"early_stop", "keep", "tensorboard"}  # settings of earlier versions, which changed no step
# What a continued run may have otherwise than it began with: these change its numbers by rounding at most.
MAY_CHANGE = {"steps", "device", "clips_at_once", "low_memory", "checkpoint_activations", "decode_chunk", "save_on_cpu",
              "compile", "workers", "cache", "cache_dir", "save_every", "eval_every"}


def parse(argv, presets, description, preset_of=lambda base: None):
    """Command line -> settings. The first word may name one of the presets {name: settings}, else it is what preset_of says of
    --base, else the first. With --resume the run's own come first; a flag that would make it another run is a ValueError."""
    argv = list(argv)
    named = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if named is not None and named not in presets:
        raise ValueError(f"preset {named!r}: must be one of {', '.join(presets)}")
    first = next(iter(presets.values()))
    given = tyro.cli(type(first), args=argv, default=presets.get(named, first), description=description)
    saved = read_settings(given.resume, presets) if given.resume else {}
    if not (named or saved or given.base == first.base) and preset_of(given.base) in presets:
        named = preset_of(given.base)
        say_once(f"preset {named}, that of base {given.base}, as none is named")
    defaults = presets.get(saved.get("preset", named), first)

    # The same again, now that it is known what it changes. Of a repeatable flag, only what the command line says remains.
    hints = get_type_hints(type(defaults), include_extras=True)
    flags = {word.partition("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}
    emptied = {name: () for name in flags & hints.keys() if "UseAppendAction" in str(hints[name])}
    start = from_record(saved, defaults) if saved else defaults
    cfg = tyro.cli(type(defaults), args=argv, default=replace(start, **emptied), description=description)
    if saved:
        record = to_record(cfg) | {"preset": named or saved["preset"]}
        changed = [name for name in record if record[name] != saved[name] and name not in MAY_CHANGE]
        if changed:
            raise ValueError(f"resume {given.resume}: {', '.join(changed)} would make it another run; only "
                             f"{', '.join(sorted(MAY_CHANGE))} may change")
        return cfg

    if named is None and cfg.base != defaults.base:
        raise ValueError(f"base {cfg.base}: not there, or without training settings; name a preset: {' or '.join(presets)}")

    # A run must not begin that cannot go on: settings of a method of one's own, too, are read back as config.json has them.
    if repr(from_record(json.loads(json.dumps(asdict(cfg), default=str)), defaults)) != repr(cfg):  # nan is not equal to itself
        raise ValueError("settings: cannot be read back from config.json, so the run could not be continued")
    return cfg


def from_record(record, defaults):
    """The settings that config.json keeps: of what it has as lists and text, tuples and paths are told by their types."""
    values = {}
    for name, hint in get_type_hints(type(defaults)).items():
        value = record[name]
        if "Path" in str(hint) and value is not None:
            value = list(map(Path, value)) if isinstance(value, list) else Path(value)
        values[name] = tuple(value) if isinstance(value, list) else value
        try:
            check_type(values[name], hint)
        except TypeCheckError:
            raise ValueError(f"config.json: {name} = {value!r} is not of this setting's type") from None
    return replace(defaults, **values)


def read_settings(folder, presets):
    """What a run folder's config.json says, and the defaults of settings that came later. ValueError for another method's."""
    file = folder / "config.json"
    saved = {"anchor": 0.} | read_json(file)  # runs of earlier versions had none
    gone = sorted(GONE & saved.keys())
    if gone:
        say_once(f"{file}: {', '.join(gone)}: no longer settings, left out")
    saved = {name: value for name, value in saved.items() if name not in gone}
    known = to_record(presets.get(str(saved.get("preset")), next(iter(presets.values()))))
    wrong = (saved.keys() - known.keys()) | ({"steps", "prompts_train"} & known.keys()) - saved.keys()
    if wrong:
        raise ValueError(f"{file}: not the settings of this method or version; not known or missing: {', '.join(sorted(wrong))}")
    return known | saved


def to_record(cfg):
    """The settings as config.json has them: plain values, the same however often a run was continued; existing paths absolute."""
    record = json.loads(json.dumps(asdict(replace(cfg, resume=None)), default=str))
    for name in ("data", "data_root", "vae", "text_encoder", "base", "prompts_train"):  # the last is not every method's
        if record.get(name):
            record[name] = absolute(record[name])
    for name in ("prompts", "reward_weights"):  # NAME=PATH, or a bare path
        for i, argument in enumerate(record[name]):
            known_as, equals, path = argument.partition("=")
            record[name][i] = f"{known_as}={absolute(path)}" if path else absolute(argument)
    for name in ("reward", "watch"):  # my_file.py:function
        for i, argument in enumerate(record[name]):
            file, is_own, rest = argument.partition(".py:")
            record[name][i] = f"{absolute(file + '.py')}:{rest}" if is_own else argument
    return record


def absolute(path):
    """A path as text that means the same in any folder; names such as tiny and random stay, and paths to nothing."""
    is_name = path.partition(":")[0] in (*TINY, "random")
    return path if is_name or not Path(path).exists() else str(Path(path).absolute())
