"""
Settings: the fields that several scripts share, checks that read as one line, and runs that are continued.

Every script has one frozen dataclass, from which tyro makes its command line; a field's docstring is its help.
"""
import math
import types
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import tyro

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
    reward: str = "hpsv2"
    """hpsv2 (v2.0, the paper's and the official code's) or hpsv2.1; their scores do not compare. A tiny base has its own"""
    reward_weights: str | None = None
    """the reward's weights; default the base's own, else the hub's; random and random:W as for base"""


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
    """continue the run of this folder, with its own settings; only --steps may be given anew"""
    tensorboard: bool = False
    """also write the metrics for TensorBoard, if it is installed"""

    grad_accum: int = 1
    """parts that a rank's share of the batch is computed in, one after the other"""
    checkpoint_activations: bool = False
    """recompute the UNet's blocks in the backward pass: less memory, more time, the same gradient"""
    decode_chunk: int = 0
    """frames that pass the decoder and the reward at a time, recomputed in the backward pass; 0 is all at once"""
    low_memory: bool = False
    """checkpoint_activations and decode_chunk 1"""
    compile: bool = False
    """torch.compile the UNet"""


# ---------------------------------------------------------------------------------------------------------------------
# Checks: ValueError says what was wrong and what is allowed. None means: decided once the model is loaded.

def check_at_least(cfg, **least):
    """Every named setting is a number of at least this, or None."""
    for name, number in least.items():
        value = getattr(cfg, name)
        if value is not None and value < number:
            raise ValueError(f"{name} = {value}: must be at least {number}")


def check_finite(cfg, *names):
    """Every named setting is a finite number."""
    for name in names:
        if not math.isfinite(getattr(cfg, name)):
            raise ValueError(f"{name} = {getattr(cfg, name)}: must be a finite number")


def check_positive(cfg, *names):
    """Every named setting is a finite number above 0."""
    for name in names:
        if not 0 < getattr(cfg, name) < math.inf:
            raise ValueError(f"{name} = {getattr(cfg, name)}: must be a finite number above 0")


def check_training(cfg, world_size):
    """What TrainingSettings and the steps and batches of every method must be."""
    check_at_least(cfg, steps=1, batch_size=1, grad_accum=1, max_bad_steps=1, eval_every=0, eval_count=0, save_every=1, keep=1,
                   workers=0, decode_chunk=0, max_skip=0)
    check_finite(cfg, "max_skip")
    parts = world_size * cfg.grad_accum
    if cfg.batch_size % parts:
        raise ValueError(f"batch_size = {cfg.batch_size}: must be a multiple of {parts}, the ranks times grad_accum")
    if cfg.data is not None and not cfg.data.exists():
        raise ValueError(f"data {cfg.data}: no such file or folder")


# ---------------------------------------------------------------------------------------------------------------------
# As JSON, and back

def to_json(cfg):
    """A run's settings as plain values, the same however often the run was continued."""
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
            for k, v in asdict(replace(cfg, resume=None)).items()}


def from_json(content, config_class, source):
    """The settings that a run's config.json holds (`content`, of file `source`); ValueError if they are not of this class."""
    known = typing.get_type_hints(config_class)
    if set(content) != set(known):
        raise ValueError(f"{source}: not the settings of this version; differing: {', '.join(sorted(set(content) ^ set(known)))}")
    return config_class(**{name: from_plain(name, content[name], kind, source) for name, kind in known.items()})


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
    changed = [f.name for f in fields(config_class)
               if getattr(given, f.name) != getattr(saved, f.name) and f.name not in ("steps", "resume")]
    if named not in (None, saved.preset):
        changed.append("preset")
    if changed:
        raise ValueError(f"resume {folder}: {', '.join(changed)} would make it another run; only steps may change")
    return replace(saved, steps=given.steps, resume=Path(folder))


def resume_folder(argv):
    """What --resume names on a command line, in either spelling, or None; needed before the rest can be parsed."""
    for word, following in zip(argv, [*argv[1:], ""]):
        if word == "--resume":
            return following
        if word.startswith("--resume="):
            return word.partition("=")[2]
    return None
