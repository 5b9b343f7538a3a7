"""
Published weights: reading a file or a folder of tensors, and putting them into a module.
Files are data: torch files are read with weights_only=True and nothing else is tried, so no code in them runs. Tensors are
memory-mapped and converted one by one, so loading takes no more memory than the module itself.
"""
import hashlib
import re
import zipfile
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.files import first_line, first_names, read_json


class Ignored:
    """Stands in for what Stable Diffusion .ckpt files mention beside their tensors, so that the named code never runs."""
    __init__ = __setstate__ = lambda self, *content: None


MENTIONED = [(Ignored, name) for name in (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.base.Callback", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")]
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
VARIANTS = ("", ".fp16", ".bf16", ".ema", ".non_ema")  # as diffusers calls them; the first that is there is taken


def read_tensors(path):
    """Every tensor of a published file or component folder, {name: tensor}, memory-mapped: nothing is copied yet.
    path: .safetensors; a torch file (.pth, .pt, .bin, .ckpt), bare or with the tensors in "state_dict" or "model", names with or
    without "module."; or a folder of one component, whole or in shards. ValueError names a file that is none or holds code."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    with open(path, "rb") as file:
        if file.read(42) == b"version https://git-lfs.github.com/spec/v1":
            raise ValueError(f"{path}: is a Git LFS pointer, not the file itself; `git lfs pull` in its repository fetches it")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:  # torch maps zip files that are not compressed, as torch.save writes them
            mapped = zipfile.is_zipfile(path) and not any(part.compress_type for part in zipfile.ZipFile(path).infolist())
            with torch.serialization.safe_globals(MENTIONED):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file can fail in any way: zip, pickle, json, or the reader itself
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{path}: expected tensors alone, found {code[1]}; nothing in it was run") from None
        kind = "a .safetensors file" if path.suffix == ".safetensors" else "a torch file of tensors"
        raise ValueError(f"{path}: expected {kind} that can be read, found another or none ({first_line(error)})") from None

    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = {}
    wrapped = []
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, torch.Tensor):
            tensors[str(name)] = value
        elif isinstance(value, dict) and any(isinstance(t, torch.Tensor) for t in value.values()):
            wrapped.append(str(name))
    if wrapped == ["model"] and not tensors:  # as InternVideo saves them
        tensors = {name: t for name, t in content["model"].items() if isinstance(t, torch.Tensor)}
    elif wrapped:
        raise ValueError(f"{path}: holds state dicts under {first_names(wrapped)}; expected one: save it in a file of its own")
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; expected a state dict, found {type(content).__name__}")
    if all(name.startswith("module.") for name in tensors):  # saved from inside DistributedDataParallel
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    return tensors


def weight_files(names):
    """Of a component folder's names, those of its weights: a whole file, and any index beside it; or an index and its shards."""
    for variant, suffix, stem in product(VARIANTS, (".safetensors", ".bin"), STEMS):
        whole = stem + variant + suffix
        indexes = (f"{stem}{suffix}.index{variant}.json", f"{stem}{suffix}{variant}.index.json")  # diffusers' names, new and old
        chosen = [name for name in (whole, *indexes) if name in names]
        if chosen and chosen[0] != whole:
            shard = re.compile(re.escape(stem) + rf"({variant}-\d+-of-\d+|-\d+-of-\d+{variant}){suffix}")
            chosen += filter(shard.fullmatch, names)
        if chosen:
            return chosen
    return []


def read_folder(folder):
    """The tensors of a component folder: of one file, or of the shards that an index lists."""
    names = sorted(file.name for file in folder.iterdir())
    first, *others = weight_files(names) or [""]
    if not first:
        raise ValueError(f"{folder}: no weights here; expected a file like {STEMS[0]}.safetensors, found {first_names(names)}")
    if not first.endswith(".json"):
        if others:
            raise ValueError(f"{folder}: holds {first} and, for other files of these weights, {others[0]}; remove the older")
        return read_tensors(folder / first)

    weight_map = read_json(folder / first).get("weight_map")
    shards = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else {}
    tensors = {}
    for shard in sorted(shards) or [""]:
        file = folder / shard
        if file.name != shard or file.suffix[1:] not in first.split(".") or not file.is_file():
            raise ValueError(f"{folder / first}: expected a weight_map of files of its kind beside it, found {shard[:100]!r}")
        tensors |= read_tensors(file)
    return tensors


def check_tensors(expected, tensors, what):
    """ValueError naming `what` if a tensor is missing, left over, or of another shape than in `expected` {name: tensor}."""
    kinds = {"missing": expected.keys() - tensors.keys(), "not known": tensors.keys() - expected.keys()}
    differences = [f"{len(names)} tensors {kind} ({first_names(names)})" for kind, names in kinds.items() if names]
    if differences:
        raise ValueError(f"{what}: {'; '.join(differences)}")
    for name, t in expected.items():
        if t.shape != tensors[name].shape:
            raise ValueError(f"{what}: tensor {name} has shape {list(tensors[name].shape)}, expected {list(t.shape)}")
        check_numbers(tensors[name], f"{what}: tensor {name}")


def check_numbers(t, what):
    """ValueError unless a tensor holds plain floating-point numbers: not whole ones, not sparse, not without data."""
    if not t.is_floating_point() or t.layout != torch.strided or t.is_meta:
        raise ValueError(f"{what} is {t.dtype}, {t.layout} on {t.device}, expected floating-point numbers")


def build_empty(make, what):
    """The module that make() builds, without memory or random numbers for the weights, which a file `what` brings."""
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # each layer has its own check, if any
        raise ValueError(f"{what}: not a model that can be built ({first_line(error)})") from None


def load_strict(module, tensors, what, dtype=None):
    """The module, built on the meta device, with these tensors, frozen and in eval mode. dtype: default each tensor's own."""
    check_tensors(module.state_dict(), tensors, what)
    # Copies, because a memory-mapped tensor would change or crash when its file does.
    module.load_state_dict({name: t.to(dtype or t.dtype, copy=True) for name, t in tensors.items()}, assign=True)
    return module.eval().requires_grad_(False)


def read_config(path, from_json):
    """What from_json makes of a JSON file or a component folder's config.json, None without one; ValueError naming the file."""
    file = Path(path)
    if file.suffix != ".json":
        file = file / "config.json"
        if not file.is_file():
            return None
    content = read_json(file)
    try:
        return from_json(content)
    except Exception as error:  # transformers' own too, which differ by version
        raise ValueError(f"{file}: not the config of a model we have ({first_line(error)})") from None


def fingerprint(tensors):
    """Names frozen weights {name: tensor} whatever file they came from and in whatever precision, adapters left out."""
    digest = hashlib.sha256()
    for name, p in sorted(tensors.items()):
        if "lora_" not in name:
            # The sign bit, not p > 0: in fp16 the smallest of 1.4 billion weights become +0 or -0.
            digest.update(p.signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
