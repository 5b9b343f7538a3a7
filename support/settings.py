"""
Settings: the fields that several scripts share, checks that read as one line, and runs that are continued.

Every script has one frozen dataclass, from which tyro makes its command line; a field's docstring is its help.
"""
import math
import os
import types
import typing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tyro

from formats.mixture import check_rewards
from support.clips import read_list, read_prompt_sets
from support.files import read_json


@dataclass(frozen=True)
class ModelSettings:
    """Which text-to-video model, where and how precise."""
    base: str = "tiny"
    """the text-to-video model: tiny, a folder, a file, a hub id, or random (random:64 is a small one)"""
    vae: str | None = None
    """another autoencoder than the base's"""
    text_encoder: str | None = None
    """another text encoder than the base's"""
    device: str | None = None
    """cuda, mps or cpu; default the first of these that is there"""
    dtype: str | None = None
    """float32, bfloat16 or float16 of the frozen weights; default bfloat16 on cuda, else float32. Adapters are float32"""


@dataclass(frozen=True)
class RewardSettings(ModelSettings):
    """The same, and what scores its videos."""
    reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """hpsv2 (default: v2.0, the paper's and the official code's), hpsv2.1, pickscore, aesthetic, imagereward, yolos:CLASS,
    videomae:ACTION, vjepa or my_file.py:function; in the tiny world action:DIRECTION and removal:watermark; hpsv2 may end in
    /crop or /stretch; repeatable, with a weight as in aesthetic=0.05 (docs/rewards.md)"""
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
    """tiny or modelscope: named first on the command line, not by a flag; it sets the defaults of the others"""
    data: Path | None = None
    """clips and captions: a list of `path|||caption` lines, a .csv or .jsonl, or a folder of clips with .txt files; the tiny
    world draws its own"""
    data_root: Path | None = None
    """folder that the list's paths start from; default the list's own"""
    max_skip: float = 0.1
    """share of the clips that may be left out, each with its reason, before the run stops"""
    workers: int = 2
    """processes that decode clips while they are encoded; changes the time, not the result"""
    cache: bool = True
    """keep latents and text embeddings of --data on disk"""
    cache_dir: Path = Path("cache")
    """folder of the cached latents and text embeddings"""

    prompts: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=FILE, evaluation prompts, one a line or in the official list form; default the tiny world's three sets"""
    eval_every: int = 20
    """steps between evaluations, with one before the first and after the last step; 0 is none at all"""
    eval_count: int = 24
    """videos of each prompt set in an evaluation; 0 is one for each line of its file"""
    save_every: int = 20
    """steps between checkpoints; the last step is always saved"""
    keep: int = 1
    """latest checkpoints to keep; beside them, best.safetensors has the adapter of the best evaluation"""
    max_bad_steps: int = 10
    """steps in a row without a finite reward or gradient, each skipped, that stop the run"""
    out: Path | None = None
    """the run folder; default a fresh one, out/<preset>"""
    overwrite: bool = False
    """replace the run that --out holds"""
    resume: Path | None = None
    """continue the run of this folder, with its own settings; --steps may be given anew, and what changes numbers by rounding
    at most: device, memory, workers, what is saved and shown how often, and early_stop"""
    early_stop: bool = False
    """end at the evaluation at which what is watched has got worse while the reward was up (docs/runs.md)"""
    tensorboard: bool = False
    """also write the metrics for TensorBoard, if it is installed"""

    clips_at_once: int = 0
    """clips of a rank's share of the batch that are computed at once, which sets the memory; the gradient is the same for any
    number; 0 is all of them. Evaluations compute as many videos at once, at most 8"""
    checkpoint_activations: bool = False
    """recompute the UNet's blocks in the backward pass: less memory, more time, the same gradient"""
    decode_chunk: int = 0
    """frames that pass the decoder and the reward at a time, recomputed in the backward pass; 0 is all at once"""
    low_memory: bool = False
    """checkpoint_activations and decode_chunk 1"""
    compile: bool = False
    """torch.compile the UNet"""


def first_given(*values):
    """The first of these that is not None: what was asked for, else what the base recommends, else a default."""
    return next(value for value in values if value is not None)


# ---------------------------------------------------------------------------------------------------------------------
# Checks: ValueError says what was wrong and what is allowed. None means: decided once the model is loaded.

def check_at_least(cfg, **least):
    """Every named setting is a number of at least this, or None."""
    for name, number in least.items():
        value = getattr(cfg, name)
        if value is not None and value < number:
            raise ValueError(f"{name} = {value}: must be at least {number}")


def check_finite(cfg, *names):
    """Every named setting is a finite number, or several, or None."""
    for name in names:
        value = getattr(cfg, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{name} = {number}: must be a finite number")


def check_given(cfg, *names):
    """Every named setting, of which there may be several, has a value."""
    for name in names:
        if not getattr(cfg, name):
            raise ValueError(f"{name}: must have at least one value")


def check_positive(cfg, *names):
    """Every named setting is a finite number above 0."""
    for name in names:
        if not 0 < getattr(cfg, name) < math.inf:
            raise ValueError(f"{name} = {getattr(cfg, name)}: must be a finite number above 0")


def check_training(cfg, world_size):
    """What TrainingSettings and the steps and batches of every method must be."""
    check_at_least(cfg, steps=1, batch_size=1, clips_at_once=0, max_bad_steps=1, eval_every=0, eval_count=0, save_every=1, keep=1,
                   workers=0, decode_chunk=0, max_skip=0, cache_interval=1)
    if cfg.compile and cfg.cache_interval > 1:
        raise ValueError(f"compile: cannot be had with cache_interval = {cfg.cache_interval}, as it takes the UNet as a whole")
    check_finite(cfg, "max_skip")
    check_rewards(cfg)
    if cfg.early_stop and not (cfg.watch and cfg.eval_every):
        raise ValueError("early_stop: needs --watch, and evaluations (eval_every above 0), or there is nothing to stop for")
    if cfg.batch_size % world_size:
        raise ValueError(f"batch_size = {cfg.batch_size}: must be a multiple of {world_size}, the number of ranks")
    if cfg.data is not None and not cfg.data.exists():
        raise ValueError(f"data {cfg.data}: no such file or folder")
    if cfg.data is not None:
        read_list(cfg.data, cfg.data_root)
    if cfg.eval_every:
        read_prompt_sets(cfg.prompts, cfg.base)


TINY_CLIPS = 16, 32  # frames, and pixel rows and columns: tiny/world.py's FRAMES and SIZE


def check_clips(cfg):
    """Only the tiny world comes with clips, and only with those of its size."""
    if cfg.data is None and cfg.base != "tiny":
        raise ValueError("no clips: --data LIST must name some (only the tiny world draws its own)")
    frames, size = TINY_CLIPS
    if cfg.data is None and (cfg.frames, cfg.size or size) != TINY_CLIPS:
        raise ValueError(f"frames = {cfg.frames}, size = {cfg.size}: the tiny world draws {frames} frames of {size} x {size} "
                         "pixels; --data is needed for others")


# ---------------------------------------------------------------------------------------------------------------------
# As JSON, and back

def to_json(cfg):
    """A run's settings as plain values, the same however often the run was continued."""
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
            for k, v in asdict(replace(cfg, resume=None)).items()}


def from_json(content, config_class, source):
    """
    The settings that a run's config.json holds (`content`, of file `source`); ValueError if they are not of this class.

    A run of an earlier version may lack settings that came later; they take the class's default, which does what was done then.
    """
    content, known = translate(content), typing.get_type_hints(config_class)
    unknown = set(content) - set(known)
    if unknown or "steps" not in content:
        wrong = f"not known: {', '.join(sorted(unknown))}" if unknown else "steps is missing"
        raise ValueError(f"{source}: not the settings of this version; {wrong}")
    found = {name: kind for name, kind in known.items() if name in content}
    return config_class(**{name: from_plain(name, content[name], kind, source) for name, kind in found.items()})


def translate(content):
    """Settings of an earlier version, in the present one's terms."""
    content = dict(content)
    parts, batch_size = content.pop("grad_accum", 1), content.get("batch_size")
    if type(parts) is int and type(batch_size) is int and parts > 1:  # into how many parts a rank's share was divided
        share = batch_size // int(os.environ.get("WORLD_SIZE", 1))
        content["clips_at_once"] = max(1, share // parts)
    for name in ("reward", "reward_weights"):  # there was one reward
        value = content.get(name, [])
        content[name] = [value] if isinstance(value, str) else value or []
    return content


def from_plain(name, value, kind, source):
    """A setting of type `kind` from the simpler form that JSON has it in."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (typing.get_origin(kind) or kind,)
    if isinstance(value, list) and tuple in kinds and all(isinstance(item, str) for item in value):
        return tuple(value)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        raise ValueError(f"{source}: {name} is {str(value)[:80]!r}; must be {' or '.join(k.__name__ for k in kinds)}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# The command line of a script that trains

# What a continued run may have otherwise than it began with: these change its numbers by rounding at most.
MAY_CHANGE = {"steps", "device", "clips_at_once", "low_memory", "checkpoint_activations", "decode_chunk", "compile", "workers",
              "cache", "cache_dir", "keep", "save_every", "eval_every", "early_stop", "tensorboard"}


def parse(argv, presets, description):
    """
    Command line -> settings. The first word may name one of the presets {name: settings}, else it is the first of them.

    With --resume the run's own settings are the defaults, and a flag that would make it another run is refused (ValueError).
    """
    argv = list(argv)
    named = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if named is not None and named not in presets:
        raise ValueError(f"preset {named!r}: must be one of {', '.join(presets)}")
    defaults = presets[named or next(iter(presets))]
    config_class = type(defaults)

    folder = resume_folder(argv)
    if not folder:
        return tyro.cli(config_class, args=argv, default=defaults, description=description)
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"resume {folder}: holds no run (no config.json)")
    saved = from_json(read_json(Path(folder) / "config.json"), config_class, f"{folder}/config.json")
    given = tyro.cli(config_class, args=argv, default=saved, description=description)
    changed = changes(saved, given)
    if named not in (None, saved.preset):
        changed["preset"] = [saved.preset, named]
    if set(changed) - MAY_CHANGE:
        wrong = ", ".join(k for k in changed if k not in MAY_CHANGE)
        raise ValueError(f"resume {folder}: {wrong} would make it another run; only {', '.join(sorted(MAY_CHANGE))} may change")
    return replace(given, resume=Path(folder))


def to_record(cfg):
    """The settings as a run's config.json has them: with absolute paths to what is there, so it can be continued anywhere."""
    def whole(value):
        if value is None or str(value).partition(":")[0] in ("tiny", "random") or not Path(value).exists():
            return value
        return type(value)(Path(value).absolute())

    names = ("data", "data_root", "vae", "text_encoder", "base", "prompts_train")  # the last is not every method's
    paths = {name: whole(getattr(cfg, name)) for name in names if hasattr(cfg, name)}
    for name in ("prompts", "reward_weights"):  # NAME=PATH, or a bare path
        paths[name] = ()
        for argument in getattr(cfg, name):
            known_as, equals, path = argument.partition("=")
            paths[name] += (f"{known_as}{equals}{whole(path)}" if path else whole(argument),)
    for name in ("reward", "watch"):  # my_file.py:function
        cut = [argument.partition(".py:") for argument in getattr(cfg, name)]
        paths[name] = tuple(whole(file + ".py") + ":" + rest if py else file for file, py, rest in cut)
    return to_json(replace(cfg, **paths))


def changes(before, after):
    """{name: [value before, value after]}, as JSON has them, of the settings in which two runs differ."""
    before, after = to_record(before), to_record(after)
    return {name: [before[name], after[name]] for name in before if before[name] != after[name]}


def resume_folder(argv):
    """What --resume names on a command line, in either spelling, or None; needed before the rest can be parsed."""
    for word, following in zip(argv, [*argv[1:], ""]):
        if word == "--resume":
            return following
        if word.startswith("--resume="):
            return word.partition("=")[2]
    return None
