"""
Adapter files: ours, PEFT's, the official code's, VADER's, diffusers' and ComfyUI's, read into one form, checked, and exported.
Ours is a safetensors file under PEFT's tensor names, with rank, alpha, base and the base's fingerprint as metadata.
Letters: r rank, C_in and C_out widths of a projection; A (r, C_in) and B (C_out, r) are the two halves of an adapter.
"""
import math
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import save_file

from formats import tensor_names as names
from formats.tensor_names import official_unet_blocks, split_lora, unet_from_official
from formats.tensors import check_numbers, check_tensors, fingerprint, read_config, read_tensors
from formats.weights import PARTS, find_base, find_part
from support.files import first_names, read_json, write_folder, write_whole

TENSOR = "base_model.model.{}.lora_{}.weight"  # what PEFT calls half "A" or "B" of the adapter of the layer at a path
NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
VADER = "base_model.model." + names.IN_WHOLE["unet"]  # it adapts the whole model
# Which layers are adapted, in every attention: {name: its letters}. The second half is Open-Sora's.
LETTERS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
           "attn.qkv": "qkv", "attn.proj": "o", "cross_attn.q_linear": "q", "cross_attn.kv_linear": "kv", "cross_attn.proj": "o"}
PROJECTION = re.compile(rf"(?:^|\.)({'|'.join(map(re.escape, LETTERS))})$")
ATTENTION = re.compile(r"(attentions\.\d+|transformer_in)$")  # the blocks that have them
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
VERSION = "1"
# Of a transformer: in files of diffusers, and under the names of Wan's own code, which ComfyUI reads, and diffusers, too.
PUBLISHED = re.compile(r"(transformer|diffusion_model)\.(.+)\.lora_([AB])\.weight")
COMFYUI = {f"{ours}.{layer}": f"{theirs}.{layer.removeprefix('to_')[0]}" for (ours, theirs), layer in product(
    [("attn1", "self_attn"), ("attn2", "cross_attn")], LAYERS)}
# Fields of PEFT's adapter_config.json that may say anything: the tensors show their effect, or they are read here, or have none.
# All others, those of versions to come too, must be off or as PEFT_PLAIN has them: else it is another base or another layer.
PEFT_FREE = """auto_mapping base_model_name_or_path exclude_modules inference_mode layers_pattern layers_to_transform lora_alpha
lora_dropout megatron_core peft_version qalora_group_size r revision target_modules task_type""".split()
PEFT_PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal")}


def is_adapted(path, letters):
    """Whether adapters of these letters have one for the layer at a path."""
    match = PROJECTION.search(path)  # else it is no projection of an attention
    return bool(match) and {*LETTERS[match[1]]} <= {*letters}


def official_names(config):
    """{our name: the official one} of both halves of every adapter. A is called down_linear there, B up_linear."""
    table = {}
    blocks = [block for block in official_unet_blocks(config).items() if ATTENTION.search(block[0])]
    halves = ("A", "down"), ("B", "up")
    for (ours, theirs), attention, layer, (half, way) in product(blocks, ("attn1", "attn2"), LAYERS, halves):
        path = f"transformer_blocks.0.{attention}.{layer}"
        table[TENSOR.format(f"{ours}.{path}", half)] = f"{theirs}.{path.removesuffix('.0')}_lora.{way}_linear.weight"
    return table


@dataclass
class Adapter:
    """What an adapter file holds: tensors under our names and, if it says, which base it was trained on."""
    tensors: dict
    rank: int
    alpha: float
    base: str | None
    fingerprint: str | None
    letters: str  # "qkvo", or fewer: the projections that it has
    weights: dict  # the base's tensors, under official names, if the file is a fine-tuned official one that has them beside


def read_adapter(path, config=None):
    """An Adapter from our file, PEFT's folder or official tensors, alone or in a .pth; config: as in export."""
    of_run = Path(path, "lora.safetensors")
    path = of_run if of_run.is_file() else Path(path)
    tensors, recorded, weights = read_peft(path) if path.is_dir() else read_file(path, config)
    rank = common_rank(tensors, path)
    if recorded.get("version", VERSION) != VERSION:
        raise ValueError(f"{path}: has format version {recorded['version']!r}, this code reads {VERSION}")
    alpha = float(recorded.get("alpha") or 0)
    if str(recorded.get("rank")) != str(rank) or not 0 < alpha < math.inf:
        raise ValueError(f"{path}: records rank {recorded.get('rank')!r} and alpha {recorded.get('alpha')!r}; expected rank "
                         f"{rank}, as its tensors have, and an alpha above 0, which tells their scale")
    paths = {NAME.fullmatch(name)[1] for name in tensors}
    found = "".join(LETTERS[match[1]] for match in map(PROJECTION.search, paths) if match)
    letters = "".join(letter for letter in "qkvo" if letter in found) or "qkvo"  # all, if its names say nothing
    return Adapter(tensors, rank, alpha, recorded.get("base"), recorded.get("base_fingerprint"), letters, weights)


def read_file(path, config):
    """A file's tensors under our names, what it records, and an official model's other weights. Where other programs record
    nothing, alpha is the rank: B A as they are."""
    tensors = read_tensors(path)
    weights, official = split_lora(tensors)
    ours = from_published(tensors)
    of_vader = names.of_part(tensors, VADER)
    if of_vader:
        paths = names.unet_from_videocrafter(of_vader, config or names.MODELSCOPE)
        tensors = {f"base_model.model.{name}": t for name, t in paths.items()}
        return tensors, {"rank": common_rank(tensors, path), "alpha": 8}, {}  # PEFT's default alpha, as VADER sets none
    if ours.keys() != tensors.keys():  # names of diffusers or ComfyUI
        weights = {}
    elif official:
        paths = {theirs: name for name, theirs in official_names(config or names.MODELSCOPE).items()}
        ours = {paths.get(name, name): t for name, t in official.items()}
    elif path.suffix != ".safetensors":
        return tensors, {}, {}
    else:
        with safe_open(path, "pt") as file:
            return tensors, file.metadata() or {}, {}
    rank = common_rank(ours, path)
    return ours, {"rank": rank, "alpha": rank}, weights


def read_peft(folder):
    """As read_file, of a PEFT folder; ValueError unless it is plain LoRA on the base's own weights."""
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: no adapter here; expected lora.safetensors, or adapter_config.json of a PEFT folder")
    settings = read_json(folder / "adapter_config.json")
    for key, value in settings.items():
        if value and key not in PEFT_FREE and value not in PEFT_PLAIN.get(key, ()):
            raise ValueError(f"{folder}: adapter_config.json sets {key} to {value!r:.60}; must be plain LoRA on the base's own "
                             "weights, with one rank and alpha for all (PEFT converts PiSSA, OLoRA and the like when it saves)")
    recorded = {"rank": settings.get("r"), "alpha": settings.get("lora_alpha"), "base": settings.get("base_model_name_or_path")}
    file = folder / "adapter_model.safetensors"
    return read_tensors(file if file.is_file() else file.with_suffix(".bin")), recorded, {}


def common_rank(tensors, path):
    """The rank of adapters A (r, C_in) and B (C_out, r); ValueError unless they are finite pairs, all of one rank."""
    ranks = set()
    for name, t in tensors.items():
        match = NAME.fullmatch(name)
        other = match and TENSOR.format(match[1], "B" if match[2] == "A" else "A")
        if other not in tensors:
            raise ValueError(f"{path}: tensor {first_names([name])} is not half of an adapter; expected "
                             f"{TENSOR.format('(...)', 'A')} and lora_B.weight, or (...)_lora.down_linear.weight and up_linear.")
        check_numbers(t, f"{path}: tensor {name}")
        if t.dim() != 2 or not t.float().isfinite().all():
            raise ValueError(f"{path}: tensor {name} has shape {list(t.shape)}; expected a matrix of finite numbers")
        ranks.add(len(t) if match[2] == "A" else t.shape[1])
    if len(ranks) > 1:
        raise ValueError(f"{path}: has adapters of ranks {sorted(ranks)}; expected one rank for all")
    return ranks.pop()


def check_adapter(adapter, shapes, base_fingerprint, what):
    """ValueError naming `what` unless it fits projections {path: (C_out, C_in)} and, where known, the base's fingerprint."""
    if base_fingerprint and adapter.fingerprint and base_fingerprint != adapter.fingerprint:
        raise ValueError(f"{what}: was trained on {adapter.base or 'weights'!r} of fingerprint {adapter.fingerprint!r}, "
                         f"the model's is {base_fingerprint!r}")
    expected = {}
    for path, (c_out, c_in) in shapes.items():
        expected[TENSOR.format(path, "A")] = torch.empty(adapter.rank, c_in, device="meta")
        expected[TENSOR.format(path, "B")] = torch.empty(c_out, adapter.rank, device="meta")
    check_tensors(expected, adapter.tensors, f"{what} (trained on {adapter.base!r})" if adapter.base else what)


# -- Export -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Export:
    """Write trained adapters in a form that another program reads."""
    adapter: tyro.conf.Positional[Path]
    """lora.safetensors of a run, a PEFT folder, or a fine-tuned official .pth"""
    to: Literal["peft", "official", "diffusers", "diffusers-lora", "comfyui"]
    """peft: an adapter folder. official: a .pth, with --base the whole state dict that the official inference loads, else the
    adapters alone. diffusers: a UNet folder, the adapters merged into its weights. For transformers, diffusers-lora: a file
    that a pipeline's load_lora_weights reads; comfyui, of Wan's alone: one for ComfyUI"""
    out: Path
    """file (official, diffusers-lora, comfyui) or folder to write; nothing may be there yet"""
    base: str | None = None
    """where the UNet is: a folder, a file, a hub id; not random. A fine-tuned .pth has its own; peft needs none"""


def export(adapter, to, out, base=None, config=None):
    """Write trained adapters as Export's fields say, or nothing. config: the structure of bare files, default ModelScope's."""
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: is there already; choose another --out")
    if to == "official" and out.suffix == ".safetensors":
        raise ValueError(f"{out}: the official code reads torch files; expected a name like lora.pth")

    if to in ("diffusers-lora", "comfyui"):
        tensors = to_published(read_adapter(adapter), to)
        with write_whole(out) as file:
            save_file(tensors, file, {"format": "pt"})
        return

    weights, config = read_unet(base, config) if base else ({}, config or names.MODELSCOPE)
    trained = read_adapter(adapter, config)
    weights = weights or unet_from_official(trained.weights, config)
    trained_on = f"was trained on {trained.base!r}" if trained.base else "does not say what it was trained on"
    if weights:
        projections = {name.removesuffix(".weight"): t.shape for name, t in weights.items()}
        shapes = {path: shape for path, shape in projections.items() if is_adapted(path, trained.letters)}
        check_adapter(trained, shapes, fingerprint(weights), adapter)
    elif to == "diffusers":
        raise ValueError(f"{adapter}: {trained_on}; --to diffusers writes the whole UNet: --base must name its weights")
    table = official_names(config)
    if to == "official" and trained.tensors.keys() != table.keys():
        raise ValueError(f"{adapter}: {trained_on}, an official file is for ModelScope's UNet: --base must name one")

    if to == "peft":
        if trained.base == "tiny":
            print("note: the tiny base is no UNet that diffusers can build, so this adapter fits none of theirs")
        adapted = {PROJECTION.search(NAME.fullmatch(name)[1])[1] for name in trained.tensors}
        layers = [layer for layer in LETTERS if layer in adapted]
        settings = {"peft_type": "LORA", "r": trained.rank, "lora_alpha": trained.alpha, "bias": "none", "inference_mode": True,
                    "target_modules": layers, "base_model_name_or_path": str(base) if base else trained.base}
        write_folder(out, "adapter_config.json", settings, "adapter_model.safetensors", trained.tensors)
    elif to == "diffusers":
        export_diffusers(trained, weights, out, config, base or adapter)
    else:
        tensors = {name: t.float() for name, t in names.unet_to_official(weights, config).items()}
        tensors |= {table[name]: t for name, t in scaled(trained).items()}  # as inference_instructvideo_entrance.py adds them
        with write_whole(out) as file:
            torch.save({"state_dict": tensors}, file)


def scaled(trained):
    """An adapter's tensors with our scale in B, for programs that add B A as they are."""
    scale = trained.alpha / trained.rank
    return {name: t.float() * (scale if ".lora_B." in name else 1) for name, t in trained.tensors.items()}


def to_published(trained, program):
    """The tensors of a file for diffusers or comfyui. ValueError if they are no transformer's."""
    made = {}
    for name, t in scaled(trained).items():
        path, half = NAME.fullmatch(name).groups()
        if not re.match(r"(transformer_)?blocks\.\d+\.", path):
            raise ValueError(f"{name}: is no transformer's; --to {program} is for Wan and CogVideoX, --to peft for others")
        stem = f"transformer.{path}"
        if program == "comfyui":
            block, _, layer = path.partition(".attn")
            if f"attn{layer}" not in COMFYUI or not block.startswith("blocks."):
                raise ValueError(f"{name}: is no layer of Wan's, whose names alone ComfyUI's are known for")
            stem = f"diffusion_model.{block}.{COMFYUI[f'attn{layer}']}"
        made[f"{stem}.lora_{half}.weight"] = t
    return made


def from_published(tensors):
    """Such a file's tensors under our names; those that are not of one stay as they are."""
    layers, made = {theirs: ours for ours, theirs in COMFYUI.items()}, {}
    for name, t in tensors.items():
        match = PUBLISHED.fullmatch(name)
        if match:
            path = re.sub(r"(self|cross)_attn\.[qkvo]$", lambda layer: layers[layer[0]], match[2])
            name = TENSOR.format(path, match[3])
        made[name] = t
    return made


def read_unet(base, config):
    """A UNet's tensors under our names, and its structure: its own config.json's, or `config`, default ModelScope's."""
    path = find_base(base)
    if path.is_dir() and not (path / "config.json").is_file():  # the whole model, with the UNet in it
        path = find_part(path, PARTS["unet"]) or path
    described = read_config(path, lambda content: names.unet_from_diffusers(content, SimpleNamespace))
    config = described or config or names.MODELSCOPE
    return unet_from_official(split_lora(read_tensors(path))[0], config), config


def export_diffusers(trained, weights, out, config, source):
    """A UNet folder for diffusers: W + (alpha / r) B A in place of every adapted W."""
    if config.stem_heads != 8:
        raise ValueError(f"{source}: transformer_in has {config.stem_heads} heads; diffusers' UNet3DConditionModel has 8 there")
    merged = {name: t.float() for name, t in weights.items()}
    for path in {NAME.fullmatch(name)[1] for name in trained.tensors}:
        A, B = [trained.tensors[TENSOR.format(path, half)].float() for half in "AB"]       # (r, C_in), (C_out, r)
        merged[f"{path}.weight"] = merged[f"{path}.weight"] + trained.alpha / trained.rank * (B @ A)
    settings = names.unet_to_diffusers(config)
    del settings["stem_heads"]  # diffusers has no such field
    write_folder(out, "config.json", settings, "diffusion_pytorch_model.safetensors", merged)
