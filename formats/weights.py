"""Where weights lie: the tiny world's folder, any folder or file, or a repository of the Hugging Face hub."""
import hashlib
import math
import re
from itertools import product
from pathlib import Path

from formats.tensors import check_hub_cache, weight_files
from support.files import first_line, read_json
from support.tables import JUDGE, PIXELS

TINY = Path(__file__).resolve().parents[1] / "tiny" / "weights"
HUB_BASE = "ali-vilab/text-to-video-ms-1.7b"
PARTS = {  # what a folder may call each part: diffusers' components, then the files of the two ModelScope hub folders
    "unet": ("unet", "text2video_pytorch_model.pth", "model_scope_v1-4_0600000.pth"),
    "vae": ("vae", "VQGAN_autoencoder.pth", "v2-1_512-ema-pruned.ckpt"),
    "text_encoder": ("text_encoder", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.safetensors",
                     "stable-diffusion-v/open_clip_pytorch_model.bin")}
REWARD_REPO = "xswu/HPSv2"  # of each kind's files here the first is downloaded, any may lie in the base's folder
REWARD_FILES = {"hpsv2": ("HPS_v2_compressed.pt", "HPS_v2.pt"), "hpsv2.1": ("HPS_v2.1_compressed.pt",)}
HUB_REWARDS = {  # those of rewards/: a hub repository and the files of it that are needed
    "pickscore": ("yuvalkirstain/PickScore_v1", "config.json", "model.safetensors"),
    "aesthetic": ("openai/clip-vit-large-patch14", "config.json", "model.safetensors"),
    "imagereward": ("THUDM/ImageReward", "ImageReward.pt"),
    "yolos": ("hustvl/yolos-tiny", "config.json", "model.safetensors"),
    "videomae": ("MCG-NJU/videomae-base-finetuned-kinetics", "config.json", "model.safetensors"),
    "vjepa": ("facebook/vjepa2-vitl-fpc64-256", "config.json", "model.safetensors")}
WHOLE_CLIPS = {"videomae": 16, "vjepa": 16}  # those that see so many frames of a clip, in order
RANDOM = re.compile(r"random(:\d+)?")  # in a path's place: untrained weights, random:W small ones
TINY_REWARDS = ("action", "removal")  # those of rewards/ for the tiny world alone: folders of its base


def find_base(base):
    """Folder or file of a base: "tiny", a path, or a hub id, which is downloaded."""
    path = TINY if str(base) == "tiny" else Path(base)
    path = path if path.exists() else from_hub(str(base))
    manifest = path / "manifest.json"  # of SHA-256 digests: every file must be there and as it was built
    for name, digest in read_json(manifest).items() if manifest.is_file() else ():
        if not (path / name).is_file() or hashlib.sha256((path / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path / name}: missing, or not the file that manifest.json lists (its SHA-256 differs)")
    return path


def find_parts(base, given):
    """
    (folder, {part: its file or folder}) of a base; a file is a UNet with its other parts beside it. given: {part: a path to take
    instead, or None}. A base that does not predict noise is refused, since it would be trained as if it did.
    """
    for path in given.values():  # before the base, which may be a download of gigabytes
        if path and not Path(path).exists():
            raise ValueError(f"{path}: no such file or folder")
    folder = find_base(base)
    scheduler = find_part(folder, ["scheduler/scheduler_config.json"])
    predicted = read_json(scheduler).get("prediction_type", "epsilon") if scheduler else "epsilon"
    if predicted != "epsilon":
        raise ValueError(f"{scheduler}: prediction_type is {predicted!r}: must be 'epsilon', for which this code samples")

    paths = {part: Path(path) for part, path in given.items() if path}
    if folder.is_file():
        paths["unet"] = folder
        folder = folder.parent
    for part, names in PARTS.items():
        paths[part] = paths.get(part) or find_part(folder, names)
        if paths[part] is None:
            check_hub_cache(folder)
            flag = "" if part == "unet" else f", or --{part.replace('_', '-')}"
            raise ValueError(f"{base}: no {part} found in {folder}; expected one of {', '.join(names)}{flag}")
    return folder, paths


def find_part(folder, names):
    """The first of some files or folders that is in the folder, or beside it if the folder is itself a part; else None."""
    for parent, name in product((folder, folder.absolute().parent), names):
        if (parent / name).exists():
            return parent / name


def reward_kind(kind):
    """(name, what follows it, for hpsv2 "pad" if nothing) of a reward: hpsv2/crop, pickscore, yolos:book, my_file.py:function."""
    name, _, argument = kind.partition(":")
    if name == "yolos" and not argument:
        raise ValueError("reward yolos: must name what is to go, as in yolos:book")
    takes_argument = name.endswith(".py") or name in ("yolos", "videomae", *TINY_REWARDS)
    if takes_argument or kind in HUB_REWARDS:
        return name, argument
    name, _, preprocess = kind.partition("/")
    if name in REWARD_FILES and preprocess in ("", "pad", "crop", "stretch"):
        return name, preprocess or "pad"
    raise ValueError(f"reward {kind!r}: must be one of {', '.join((*REWARD_FILES, *HUB_REWARDS, *TINY_REWARDS))}, or "
                     "my_file.py:function; hpsv2 and hpsv2.1 may end in /crop or /stretch, yolos in :CLASS, videomae in :ACTION, "
                     "action in :DIRECTION, removal in :watermark")


def named_rewards(cfg):
    """(parts [(weight, kind)], watched kinds, {kind: path of its weights}) of the settings, checked before anything is loaded."""
    parts = []
    for setting in cfg.reward or ("hpsv2=1",):
        kind, equals, number = setting.rpartition("=")
        try:
            weight = float(number) if equals else 1.
        except ValueError:
            weight = 0.
        if weight == 0 or not math.isfinite(weight):
            raise ValueError(f"reward {setting!r}: the weight after = must be a finite number other than 0")
        parts.append((weight, kind or setting))

    watched = [kind for kind in cfg.watch if kind not in (*PIXELS, "pixels", JUDGE)]
    kinds = [kind for _, kind in parts] + watched
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"rewards {', '.join(kinds)}: each must be named once")
    names = {}
    for kind in kinds:
        try:
            names[kind], _ = reward_kind(kind)
        except ValueError as error:
            allowed = f"watch {kind!r}: must be one of {', '.join(PIXELS)}, pixels (all but the last), judge; or a "
            raise ValueError(f"{allowed if kind in watched else ''}{error}") from None

    paths = {}
    for setting in cfg.reward_weights:
        name, equals, path = setting.partition("=")
        meant = [kind for kind in kinds if equals and name in (kind, names[kind])]
        if not meant and len(kinds) == 1:  # a bare path, which may have a = of its own
            meant = kinds
            path = setting
        if not meant:
            named = ", ".join(names.values())
            raise ValueError(f"reward_weights {setting!r}: must be NAME=PATH, with one of the rewards {named} as NAME")
        if not RANDOM.fullmatch(path) and not Path(path).exists():
            raise ValueError(f"reward {names[meant[0]]}: {path}: no such file or folder")
        paths |= dict.fromkeys(meant, path)

    for kind, name in names.items():
        num_frames = WHOLE_CLIPS.get(name, 0)
        if cfg.frames < num_frames and not Path(paths.get(kind, "random")).is_dir():  # there, its config.json says how many
            raise ValueError(f"frames = {cfg.frames}: {name} sees {num_frames} frames of a clip, in order; it must have as many")
        if name.endswith(".py") and not Path(name).is_file():
            raise ValueError(f"reward {kind}: no such file")
    return parts, watched, paths


def find_reward(kind, weights=None, base_folder=None):
    """
    File or folder of a reward, a name as reward_kind gives it: the path given, or what lies in the base's folder or beside it, or
    the hub's, downloaded once; None for "random" and "random:W".
    """
    if weights and RANDOM.fullmatch(str(weights)):
        return None
    if weights:
        if not Path(weights).exists():
            raise ValueError(f"reward {kind}: {weights}: no such file or folder")
        return Path(weights)
    if kind in TINY_REWARDS:
        if base_folder and (base_folder / kind).is_dir():
            return base_folder / kind
        raise ValueError(f"reward {kind}: is for the tiny world alone: must be --base tiny, or a folder as --reward-weights")
    if kind in REWARD_FILES:
        if base_folder and (base_folder / "reward" / "words.txt").is_file():
            return base_folder / "reward"
        beside = base_folder and find_part(base_folder, REWARD_FILES[kind])
        return beside or hub_file(kind, REWARD_REPO, REWARD_FILES[kind][0], "give its path as --reward-weights")
    repo, *names = HUB_REWARDS[kind]
    of_folder = len(names) > 1
    advice = f"give {'its folder' if of_folder else 'its path'} as --reward-weights {kind}=PATH"
    files = [hub_file(kind, repo, name, advice) for name in names]
    return files[0].parent if of_folder else files[0]


def hub_file(kind, repo, name, advice):
    """A file of a hub repository that a reward needs, downloaded once; ValueError with `advice` if that fails."""
    import huggingface_hub
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name))
    except Exception as error:  # no network: httpx, OSError or a hub error, by version
        raise ValueError(f"reward {kind}: cannot be downloaded ({first_line(error)}); get {name} from the hub repository "
                         f"{repo} and {advice}") from None


def hub_files(files):
    """Of a hub repository's files, those of a base's parts: {part: names}. The weights of each once, whole or in shards."""
    chosen = {}
    for part, names in PARTS.items():
        inside = [name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")]
        weights = weight_files(inside)
        if weights and not weights[0].endswith(".json"):
            weights = weights[:1]  # without the index of other shards that may be there
        needed = [f"{part}/{name}" for name in inside if name in weights or weights and name == "config.json"]
        chosen[part] = needed or [name for name in names if name in files][:1]
    return chosen


def from_hub(repo):
    """Folder of a hub repository's three parts, downloaded once by huggingface_hub, or from its cache without a network."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"base {repo!r}: no such file or folder; must be tiny, random, a path, or a hub id like {HUB_BASE}")
    import huggingface_hub
    try:
        files = huggingface_hub.HfApi().list_repo_files(repo)
        wanted = sum(hub_files(files).values(), []) + [name for name in files if name == "scheduler/scheduler_config.json"]
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.GatedRepoError):
        raise ValueError(f"base {repo!r}: no such hub repository, nor a file or folder of that name") from None
    except Exception as error:  # no network, by version httpx, OSError or a hub error; or no space for the files
        reason = first_line(error)
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns="*/config.json", local_files_only=True))
        cached = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        if all(hub_files(cached).values()):  # else a download was cut
            return folder
    except Exception:  # not cached
        pass
    raise ValueError(f"base {repo!r}: no file or folder of that name here, and the hub's cannot be downloaded ({reason}); put "
                     "the folders unet, vae and text_encoder of that repository, with config.json and a .safetensors or .bin in "
                     "each, into one folder and give that as --base")
