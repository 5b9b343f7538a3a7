"""
Which rewards there are: how a command line names them, and where their weights lie.
A reward is a file rewards/NAME.py and a line in REWARDS. HPSv2, the paper's, is in reward.py.
"""
import math
import re
import symtable
from pathlib import Path

from formats.weights import SHIPPED, TINY, find_part
from support.files import first_line, read_text
from support.tables import JUDGE, PIXELS

FOLDER = ("config.json", "model.safetensors")
# NAME: what follows it after a colon, as CLASS (any), left|right (one of these), in [] what may be left out; the frames of a clip
# that it sees in order, None for any; its hub repository, None for the tiny world's own; which files of it are needed.
REWARDS = {
    "pickscore": ("", None, "yuvalkirstain/PickScore_v1", FOLDER),
    "aesthetic": ("", None, "openai/clip-vit-large-patch14", FOLDER),
    "imagereward": ("", None, "THUDM/ImageReward", ("ImageReward.pt",)),
    "yolos": ("CLASS", None, "hustvl/yolos-tiny", FOLDER),
    "videomae": ("[ACTION]", 16, "MCG-NJU/videomae-base-finetuned-kinetics", FOLDER),
    "vjepa": ("", 16, "facebook/vjepa2-vitl-fpc64-256", FOLDER),
    "videoreward": ("[VQ|MQ|TA]", 4, "KlingTeam/VideoReward", ("model_config.json",)),
    "viclip": ("[vbench|imagenet]", 8, "OpenGVLab/ViCLIP-L-14-hf", ("model.safetensors",)),
    "proxy": ("", None, None, ()),
    "action": ("left|right|up|down", 16, None, ()),
    "removal": ("watermark", None, None, ())}
HPS_REPO = "xswu/HPSv2"  # of each version's files here the first is downloaded, any may lie in the base's folder
HPS_FILES = {"hpsv2": ("HPS_v2_compressed.pt", "HPS_v2.pt"), "hpsv2.1": ("HPS_v2.1_compressed.pt",)}
RANDOM = re.compile(r"random(:\d+)?")  # in a path's place: untrained weights, random:W small ones


def split_reward(reward):
    """(name, what follows it) of a reward as a command line names it: "yolos:book" -> ("yolos", "book"); "hpsv2" ->
    ("hpsv2", "pad"), which is how it takes its pictures; "my_file.py:function" -> ("my_file.py", "function")."""
    name, _, argument = reward.partition(":")
    if name.endswith(".py"):
        check_function(name, argument)
        return name, argument
    if name in REWARDS:
        follows = REWARDS[name][0]
        choices = follows.strip("[]").split("|")
        is_any = len(choices) == 1 and follows.isupper()
        if argument in choices or (is_any if argument else follows.startswith("[")):
            return name, argument
    name, _, preprocess = reward.partition("/")
    if name in HPS_FILES and preprocess in ("", "pad", "crop", "stretch"):
        return name, preprocess or "pad"
    known = [f"{name}:{line[0]}".rstrip(":") for name, line in REWARDS.items()]
    raise ValueError(f"reward {reward!r}: must be one of {', '.join((*HPS_FILES, *known))}, or my_file.py:function; hpsv2 and "
                     "hpsv2.1 may end in /crop or /stretch")


def check_function(file, function):
    """ValueError unless a Python file has a function of this name. It is not run: that may take long, as weights are loaded."""
    if not Path(file).is_file():
        raise ValueError(f"reward {file}:{function}: no such file")
    text = read_text(Path(file))
    try:
        known = symtable.symtable(text, file, "exec").get_identifiers()
    except SyntaxError as error:
        raise ValueError(f"reward {file}:{function}: the file cannot be imported ({first_line(error)})") from None
    if function not in known and "import *" not in text:
        raise ValueError(f"reward {file}:{function}: must name a function of the file, as in {file}:NAME")


def requested_rewards(cfg):
    """What the settings ask for, checked before anything is loaded: what is maximised, [(weight, reward)]; the rewards that are
    watched; and {reward: path of its weights} where one is given."""
    parts = []
    for given in cfg.reward or ("hpsv2=1",):
        reward, equals, number = given.rpartition("=")
        try:
            weight = float(number) if equals else 1.
        except ValueError:
            weight = 0.
        if weight == 0 or not math.isfinite(weight):
            raise ValueError(f"reward {given!r}: the weight after = must be a finite number other than 0")
        parts.append((weight, reward or given))

    watched = [reward for reward in cfg.watch if reward not in (*PIXELS, "pixels", JUDGE)]
    asked = [reward for _, reward in parts] + watched
    if len(set(asked)) < len(asked):
        raise ValueError(f"rewards {', '.join(asked)}: each must be named once")
    names = {}
    for reward in asked:
        try:
            names[reward], _ = split_reward(reward)
        except ValueError as error:
            allowed = f"watch {reward!r}: must be one of {', '.join(PIXELS)}, pixels (all but the last), judge; or a "
            raise ValueError(f"{allowed if reward in watched else ''}{error}") from None

    paths = given_weights(cfg, names) if cfg.reward_weights else {}
    for reward, name in names.items():
        wanted = REWARDS[name][1] if name in REWARDS else None
        has_config = reward in paths and (Path(paths[reward]) / "config.json").is_file()  # there, its config.json says how many
        if wanted and (cfg.frames or wanted) < wanted and not has_config:
            raise ValueError(f"frames = {cfg.frames}: {name} sees {wanted} frames of a clip, in order; it must have as many")
    return parts, watched, paths


def given_weights(cfg, names):
    """{reward: path} of --reward-weights NAME=PATH; names: {reward: its name}."""
    paths = {}
    for given in cfg.reward_weights:
        name, equals, path = given.partition("=")
        meant = [reward for reward in names if equals and name in (reward, names[reward])]
        if not meant and len(names) == 1:
            meant, path = list(names), given  # a bare path, which may have a = of its own
        if not meant:
            rewards = ", ".join(names.values())
            raise ValueError(f"reward_weights {given!r}: must be NAME=PATH, with one of the rewards {rewards} as NAME")
        find_reward(names[meant[0]], path)  # which says now, and not after the base was loaded, that it is not there
        paths |= dict.fromkeys(meant, path)
    return paths


def find_reward(name, weights=None, base_folder=None):
    """File or folder of a reward's weights: the path given, or what lies in the base's folder or beside it, or the hub's,
    downloaded once; None for "random" and "random:W". name: as split_reward has it."""
    if weights is not None:
        if RANDOM.fullmatch(str(weights)):
            return None
        if not Path(weights).exists():
            raise ValueError(f"reward {name}: {weights}: no such file or folder")
        return Path(weights)
    is_tiny = base_folder and (base_folder / "reward" / "words.txt").is_file()
    if name in HPS_FILES:
        files = HPS_FILES[name]
        if is_tiny:
            return base_folder / "reward"
        beside = find_part(base_folder, files) if base_folder else None
        return beside or hub_file(name, HPS_REPO, files[0], "give its path as --reward-weights")
    repo, files = REWARDS[name][2:]
    if repo is None:
        if not is_tiny:
            raise ValueError(f"reward {name}: is for the tiny world alone: must be --base tiny or tiny-wan, or a folder as "
                             "--reward-weights")
        if name == "proxy":  # the other base's preference model, which has never seen this base's pictures
            return SHIPPED["tiny-wan" if (base_folder / "unet").is_dir() else "tiny"] / "reward"
        return base_folder / name if (base_folder / name).is_dir() else TINY / name  # the second base reads the first one's
    paths = [hub_file(name, repo, file, f"give its folder as --reward-weights {name}=PATH") for file in files]
    return paths[0].parent if len(files) > 1 else paths[0]


def hub_file(name, repo, file, advice, folder=None):
    """A file of a hub repository that a reward needs, as it lies in the folder, or downloaded once; ValueError with `advice`."""
    import huggingface_hub
    if folder and (folder / file).is_file():
        return folder / file
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file))
    except Exception as error:  # no network: httpx, OSError or a hub error, by version
        raise ValueError(f"reward {name}: cannot be downloaded ({first_line(error)}); get {file} from the hub repository "
                         f"{repo} and {advice}") from None
