"""Where weights lie: the tiny world's folder, any folder or file, or a repository of the Hugging Face hub."""
import hashlib
import re
from contextlib import suppress
from itertools import product
from pathlib import Path

from formats.tensors import read_tensors, weight_files
from support.files import first_line, read_json

TINY = Path(__file__).resolve().parents[1] / "tiny" / "weights"
SHIPPED = {"tiny": TINY, "tiny-wan": TINY.with_name("weights_wan")}
HUB_BASES = {"modelscope": "ali-vilab/text-to-video-ms-1.7b", "wan": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
             "videocrafter": "VideoCrafter/VideoCrafter2", "svd": "stabilityai/stable-video-diffusion-img2vid",
             "cogvideox": "THUDM/CogVideoX-2b", "opensora": "hpcai-tech/OpenSora-STDiT-v3"}
PARTS = {  # what a folder may call each part: diffusers' components, then the files of the two ModelScope hub folders
    "unet": ("unet", "text2video_pytorch_model.pth", "model_scope_v1-4_0600000.pth"),
    "vae": ("vae", "VQGAN_autoencoder.pth", "v2-1_512-ema-pruned.ckpt"),
    "text_encoder": ("text_encoder", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.safetensors",
                     "stable-diffusion-v/open_clip_pytorch_model.bin")}
TRANSFORMER_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")  # of Wan's and CogVideoX's repositories
SVD_PARTS = ("unet", "vae", "image_encoder")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Class of a folder's network: the file of bases/ that knows it.
NETWORKS = {"WanTransformer3DModel": "wan", "CogVideoXTransformer3DModel": "cogvideox", "STDiT3": "opensora",
            "UNet3DVideoCrafterConditionModel": "videocrafter", "UNetSpatioTemporalConditionModel": "svd"}
WHOLE = "model.ckpt"  # VideoCrafter2's only file


def find_base(base):
    """Folder or file of a base: one that ships, a path, or a hub id, which is downloaded."""
    path = SHIPPED.get(str(base)) or Path(base)
    path = path if path.exists() else from_hub(str(base))
    manifest = path / "manifest.json"  # of SHA-256 digests: every file must be there and as it was built
    for name, digest in read_json(manifest).items() if manifest.is_file() else ():
        if not (path / name).is_file() or hashlib.sha256((path / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path / name}: missing, or not the file that manifest.json lists (its SHA-256 differs)")
    return path


def find_base_file(base, given):
    """Name of the file of bases/ that knows a base, by its own configuration, and its file or folder here, None for untrained
    weights. given: paths that are taken for some of its parts."""
    missing = [path for path in given if path and not Path(path).exists()]
    for path in missing:  # before the base, which may be a download of gigabytes; Open-Sora's parts may be, too
        if base.startswith("random") or not HUB_ID.fullmatch(path):
            raise ValueError(f"{path}: no such file or folder")
    if base.partition(":")[0] == "random":
        return "modelscope", None
    if base.startswith("random-"):
        name = base.removeprefix("random-").removesuffix(":full")
        if name not in NETWORKS.values():
            raise ValueError(f"base {base!r}: must be one of random, random:WIDTH, random-{', random-'.join(NETWORKS.values())}, "
                             "the last ones also with :full")
        return name, None
    path = find_base(base)
    if (path / WHOLE).is_file() or path.is_file() and any(".fps_embedding." in name for name in read_tensors(path)):
        return "videocrafter", path
    for config in (path / "net/config.json", path / "config.json"):  # Open-Sora's are of no class of diffusers
        if config.is_file() and "input_sq_size" in read_json(config):
            return "opensora", path
    if missing:
        raise ValueError(f"{missing[0]}: no such file or folder")
    for part in ("transformer", "unet", ""):
        config = path / part / "config.json"
        network = read_json(config).get("_class_name") if config.is_file() else None
        if network in NETWORKS:
            return NETWORKS[network], path
        if part == "transformer" and config.is_file():
            raise ValueError(f"{config}: network {network!r}: must be one of {', '.join(NETWORKS)}")
    return "modelscope", path


def preset_of(base):
    """The preset that is for a base: its file in bases/, or a base that ships; None where only a download could tell."""
    known = {repo: name for name, repo in HUB_BASES.items()} | {name: name for name in SHIPPED}
    if base in known:
        return known[base]
    if not base.startswith("random") and not Path(base).exists():
        return None
    name, path = find_base_file(base, ())
    if path and (path / "reward/words.txt").is_file():
        return {"modelscope": "tiny", "wan": "tiny-wan"}[name]
    return name


def find_part(folder, names):
    """The first of some files or folders that is in the folder, or beside it if the folder is itself a part; else None."""
    paths = [parent / name for parent, name in product((folder, folder.absolute().parent), names)]
    return next(filter(Path.exists, paths), None)


def hub_files(files):
    """Of a hub repository's files, those of a base's parts: {part: names}. The weights of each once, whole or in shards."""
    if "transformer/config.json" in files:  # diffusers reads these folders itself
        chosen = {part: [] for part in TRANSFORMER_PARTS}
        for name in files:
            chosen.get(name.partition("/")[0], []).append(name)
        return chosen
    if WHOLE in files:
        return {"all": [WHOLE]}
    if "config.json" in files:  # a repository of one part, as Open-Sora's are; a text encoder's has a tokenizer in it
        files = [name for name in files if "/" not in name]
        weights = weight_files(files)
        return {"part": weights and [name for name in files if name in weights or name.endswith((".json", ".model"))]}
    chosen = {}
    for part, names in dict.fromkeys(SVD_PARTS, ()).items() if "image_encoder/config.json" in files else PARTS.items():
        inside = [name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")]
        weights = weight_files(inside)
        if weights and not weights[0].endswith(".json"):
            weights = weights[:1]  # without the index of other shards that may be there
        needed = [f"{part}/{name}" for name in inside if name in weights or weights and name == "config.json"]
        chosen[part] = needed or [name for name in names if name in files][:1]
    return chosen


def from_hub(repo):
    """Folder of a hub repository's files, those of hub_files: downloaded once, without a network from huggingface_hub's cache."""
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"base {repo!r}: no such file or folder; must be tiny, random, a path, or a hub id like "
                         f"{HUB_BASES['modelscope']}")
    import huggingface_hub
    try:
        files = huggingface_hub.HfApi().list_repo_files(repo)
        wanted = sum(hub_files(files).values(), []) + [name for name in files if name == "scheduler/scheduler_config.json"]
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
    except Exception as error:  # no such repository; no network, by version httpx, OSError or a hub error; no space for the files
        reason = first_line(error)
    with suppress(Exception):  # not cached
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns="*/config.json", local_files_only=True))
        cached = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        if all(hub_files(cached).values()):  # else a download was cut
            return folder
    raise ValueError(f"base {repo!r}: no file or folder of that name here, and the hub's cannot be downloaded ({reason}); put "
                     "the folders of that repository, with config.json and a .safetensors or .bin in each, into one folder and "
                     "give that as --base")
