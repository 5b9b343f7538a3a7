"""
Rank-4 adapters (LoRA, arXiv:2106.09685) on the query, key, value and output projections of every attention.

Paper: InstructVideo (arXiv:2312.12490), Sec. 3.3: all that is trained. 264 projections, 1,661,440 parameters.

    parameters = inject(unet, rank=4)                 # freezes the UNet, returns what an optimizer takes
    save(unet, "lora.safetensors"); load(unet, "lora.safetensors")
    python lora.py export out/run/lora.safetensors --to peft --out peft_folder
    python lora.py export out/run/lora.safetensors --to diffusers --base unet_folder --out merged_unet

Ours differs from the official code (tools/modules/unet/unet_lora.py): (1) adapters are put into a finished UNet, not written into
a second class of it; (2) alpha works (there, setting it crashes): the scale is alpha / r, and alpha = r gives their scale of 1;
(3) adapters stay float32 on a 16-bit base.

Letters: r rank, C_in and C_out widths of a projection.
"""
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F_
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import model

# ---------------------------------------------------------------------------------------------------------------------
# The layer


class LoRALinear(nn.Module):
    """
    W x + (alpha / r) B A x (arXiv:2106.09685, Eq. 3). W is frozen; B starts at zero, so step 0 is the base model.

    Takes over W and the bias of `linear` under their names: a UNet's own tensors are called the same with and without adapters.
    forward: x (..., C_in) -> (..., C_out), in the dtype that `linear` alone would give.
    """

    def __init__(self, linear, rank, alpha, generator):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias                               # W (C_out, C_in)
        c_out, c_in = self.weight.shape
        # Standard deviation 1 / r, as in unet_lora.py:129. Drawn on the CPU: the same on every device.
        A = torch.randn(rank, c_in, generator=generator, device="cpu", dtype=torch.float32) / rank
        # float32 whatever W is: in bfloat16 a step of 1e-5 would be rounded away.
        self.lora_A = nn.Parameter(A.to(self.weight.device))                              # (r, C_in)
        self.lora_B = nn.Parameter(torch.zeros(c_out, rank, device=self.weight.device, dtype=torch.float32))
        self.alpha, self.scale = alpha, 1.0
        self.register_buffer("base_weight", None, persistent=False)                       # W, while weight is the merged one
        self.folded_weight = self.folded_of = None

    @property
    def factor(self):
        return self.scale * self.alpha / len(self.lora_A)

    def forward(self, x):
        if self.base_weight is not None:
            return F_.linear(x, self.weight, self.bias)                                   # (..., C_out)
        if not torch.is_grad_enabled() and self.weight.dtype == torch.float32 and not torch.compiler.is_compiling():
            return F_.linear(x, self.folded(), self.bias)  # in 16 bits, what is smaller than W's last bit would be lost
        x, shape = x.flatten(0, -2), x.shape                                              # (n, C_in)
        y = F_.linear(x, self.weight, self.bias)
        # The product is in the dtype of W x, under autocast too. Casting A and B down costs nothing; casting x up instead would
        # keep a float32 copy of every x for the backward pass. Their gradients come back in float32.
        A, B = self.lora_A.to(y.dtype), self.lora_B.to(y.dtype)
        y = y.addmm_(F_.linear(x, A), B.t(), alpha=self.factor)                           # one pass over y instead of three
        return y.unflatten(0, shape[:-1])

    def folded(self):
        """W + (alpha / r) B A, made anew when one of them has changed: without a gradient, one product instead of three."""
        now = (self.factor, *((t.data_ptr(), t._version) for t in (self.weight, self.lora_A, self.lora_B)))
        if now != self.folded_of:
            self.folded_weight, self.folded_of = torch.addmm(self.weight, self.lora_B, self.lora_A, alpha=self.factor), now
        return self.folded_weight

    @torch.no_grad()
    def merge(self):
        """Fold the adapters into W. In bfloat16 what is smaller than W's last bit is lost: merge float32 weights for export."""
        if self.base_weight is None:
            W = self.weight
            dtype = torch.promote_types(W.dtype, torch.float32)
            merged = (W + self.factor * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))).to(W.dtype)
            # W is kept, since subtracting again would not give it back exactly: while merged, one more copy of these weights.
            # A new Parameter, not new data in the old one: a graph that still waits for its backward pass goes on with W.
            self.base_weight, self.weight = W.data, nn.Parameter(merged, requires_grad=False)

    def unmerge(self):
        if self.base_weight is not None:
            self.weight, self.base_weight = nn.Parameter(self.base_weight, requires_grad=False), None


# ---------------------------------------------------------------------------------------------------------------------
# All layers of a module

PROJECTION = re.compile(r"(^|\.)(to_[qkv]|to_out\.0)$")


def projections(module):
    """{path: nn.Linear or LoRALinear} of every attention, found by name: in our UNet and in diffusers' alike."""
    found = {path: m for path, m in module.named_modules() if PROJECTION.search(path) and isinstance(m, (nn.Linear, LoRALinear))}
    if not found:
        raise ValueError(f"no attention in {type(module).__name__}: expected linear layers called to_q, to_k, to_v, to_out.0")
    return found


def layers(module):
    """{path: LoRALinear}. ValueError if there is none: weights that change nothing should not pass silently."""
    found = {path: m for path, m in module.named_modules() if isinstance(m, LoRALinear)}
    if not found:
        raise ValueError(f"no adapters in {type(module).__name__}: inject or load them first")
    return found


def inject(module, rank=4, alpha=None, generator=None):
    """
    Put adapters on every attention of `module`, freeze all else. Returns the new parameters, A and B in turn, in tree order.

    alpha: default rank, so that the scale is 1 (official). generator: draws A; a CPU generator, seeded with 0 if none is given.
    Convert the module (dtype) before, not after: .to(dtype) would take the adapters along.
    Raises ValueError for a rank below 1, an alpha not above 0, a module without attention or with adapters already.
    """
    alpha = float(rank if alpha is None else alpha)
    if rank < 1:
        raise ValueError(f"rank {rank}: allowed is 1 or more")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha {alpha}: allowed is above 0")
    found = projections(module)
    if any(isinstance(layer, LoRALinear) for layer in found.values()):
        raise ValueError(f"{type(module).__name__} has adapters already")
    generator = generator or torch.Generator().manual_seed(0)
    module.requires_grad_(False)
    for path, linear in found.items():
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, LoRALinear(linear, rank, alpha, generator))
    return parameters(module)


def parameters(module):
    """What is trained: [A, B, A, B, ...] in the order of the module tree."""
    return [p for layer in layers(module).values() for p in (layer.lora_A, layer.lora_B)]


def merge(module):
    """Fold every adapter into its W: from here on each layer is a plain linear one. Merging twice is merging once."""
    for layer in layers(module).values():
        layer.merge()


def unmerge(module):
    """Undo `merge`, bit for bit."""
    for layer in layers(module).values():
        layer.unmerge()


def set_scale(module, scale):
    """Multiply the adapters' contribution: 0 is the base model, 1 the trained one. Merged layers are merged anew."""
    for layer in layers(module).values():
        merged = layer.base_weight is not None
        layer.unmerge()
        layer.scale = scale
        if merged:
            layer.merge()


# ---------------------------------------------------------------------------------------------------------------------
# Files. Ours is a safetensors file under PEFT's tensor names, with rank, alpha, base and its fingerprint as metadata.

PREFIX = "base_model.model."  # what PEFT's wrapper puts before the path of a layer
NAME = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
VERSION = "1"


def adapter_state(module):
    """{name in our files: tensor}, sharing memory with the parameters."""
    return {f"{PREFIX}{path}.lora_{side}.weight": getattr(layer, f"lora_{side}").detach()
            for path, layer in layers(module).items() for side in "AB"}


def official_names(config):
    """{our name: the official one} for the adapters of UNet3D(config). A is called down_linear there, B up_linear."""
    return {f"{PREFIX}{path}.lora_{side}.weight": f"{theirs.removesuffix('.weight').removesuffix('.0')}_lora.{name}.weight"
            for ours, theirs in model.official_unet_names(config).items()
            if ours.endswith(".weight") and PROJECTION.search(path := ours.removesuffix(".weight"))
            for side, name in (("A", "down_linear"), ("B", "up_linear"))}


def save(module, path, base=None):
    """
    Write the adapters to a safetensors file, whole or not at all; an older one of that name is replaced.

    base: what to call the weights they were trained on; what `load` compares is their fingerprint. `set_scale` is not recorded.
    """
    layer = next(iter(layers(module).values()))
    recorded = {"format": "pt", "version": VERSION, "rank": str(len(layer.lora_A)), "alpha": str(layer.alpha),
                "base": base and str(base), "base_fingerprint": fingerprint(module)}
    with model.write_whole(path) as hidden:
        save_file(adapter_state(module), hidden, {k: v for k, v in recorded.items() if v})


def fingerprint(module):
    """model.fingerprint of the base weights, merged or not; None on the meta device, where there are none."""
    if next(module.parameters()).is_meta:
        return None
    merged = [m for m in module.modules() if isinstance(m, LoRALinear) and m.base_weight is not None]
    for layer in merged:
        layer.unmerge()
    found = model.fingerprint(module)
    for layer in merged:
        layer.merge()
    return found


@dataclass
class Adapter:
    """What an adapter file holds: tensors under our names and, if it says, which base it was trained on."""
    tensors: dict
    rank: int
    alpha: float
    base: str | None
    fingerprint: str | None
    with_base: bool
    """a fine-tuned official file, with the base's tensors beside"""


def read_adapter(path, config=None):
    """
    Adapters of any form: our file, PEFT's folder, the official tensors alone or in a fine-tuned .pth (rank as found, scale 1).

    config: the UNetConfig by which official names are translated, default full size. Raises ValueError naming the file if it
    cannot be read; has tensors that are no adapters, lack the other half, are not finite or not of the recorded rank; or if it
    records no rank and alpha, or more than plain LoRA.
    """
    path, recorded, with_base = Path(path), {}, False
    if path.is_dir():
        settings = model.read_json(path / "adapter_config.json")
        for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
            if settings.get(key):
                raise ValueError(f"{path}: adapter_config.json sets {key}; allowed is plain LoRA, one rank and alpha for all")
        recorded = {"rank": settings.get("r"), "alpha": settings.get("lora_alpha")}
        found = [path / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
        tensors = model.read_tensors(next((f for f in found if f.is_file()), found[0]))
    else:
        tensors = model.read_tensors(path)
        rest, official = model.split_lora(tensors)
        if official:
            ours_of = {theirs: ours for ours, theirs in official_names(config or model.UNetConfig()).items()}
            tensors, with_base = {ours_of.get(k, k): v for k, v in official.items()}, bool(rest)
            rank = next((len(t) for k, t in tensors.items() if ".lora_A." in k and t.dim()), 0)
            recorded = {"rank": rank, "alpha": rank}
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                recorded = file.metadata() or {}

    halves = {k: NAME.fullmatch(k) for k in tensors}
    paths = Counter(m[1] for m in halves.values() if m)
    bad = [k for k, m in halves.items() if not m or paths[m[1]] != 2]
    if bad:
        raise ValueError(f"{path}: {len(bad)} of {len(tensors)} tensors are not half of an adapter ({model.some(bad)}); expected "
                         f"{PREFIX}(...).lora_A.weight and lora_B.weight, or (...)_lora.down_linear.weight and up_linear.weight")
    if recorded.get("version", VERSION) != VERSION:
        raise ValueError(f"{path}: has format version {recorded['version']!r}, this code reads {VERSION}")
    try:
        rank, alpha = int(recorded.get("rank")), float(recorded.get("alpha"))
    except (TypeError, ValueError):
        rank, alpha = 0, 0
    if not (rank > 0 and 0 < alpha < math.inf):
        raise ValueError(f"{path}: records rank {recorded.get('rank')!r} and alpha {recorded.get('alpha')!r}; expected two above "
                         "0, without which the scale of its adapters is not known")
    for k, t in tensors.items():                                                          # A (r, C_in), B (C_out, r)
        numbers = t.is_floating_point() and t.layout == torch.strided and not t.is_meta
        if not numbers or t.dim() != 2 or t.shape[".lora_B." in k] != rank or not t.float().isfinite().all():
            raise ValueError(f"{path}: tensor {k}: expected a matrix of rank {rank}, finite; found {t.dtype} {list(t.shape)}")
    return Adapter(tensors, rank, alpha, recorded.get("base"), recorded.get("base_fingerprint"), with_base)


@torch.no_grad()
def put(module, adapter, what):
    """Copy an Adapter into a module, injected first if need be. `what`: its source, for messages. Errors and result as `load`."""
    found, expected = projections(module), {}
    for path, layer in found.items():
        c_out, c_in = layer.weight.shape
        expected[f"{PREFIX}{path}.lora_A.weight"] = torch.empty(adapter.rank, c_in, device="meta")
        expected[f"{PREFIX}{path}.lora_B.weight"] = torch.empty(c_out, adapter.rank, device="meta")
    model.check_tensors(expected, adapter.tensors, what)
    known = fingerprint(module)
    if known and adapter.fingerprint and known != adapter.fingerprint:
        raise ValueError(f"{what}: was trained on {adapter.base or 'weights'!r} of fingerprint {adapter.fingerprint!r}, "
                         f"the model's is {known!r}")
    if not isinstance(layer, LoRALinear):
        inject(module, adapter.rank, adapter.alpha)
    elif (len(layer.lora_A), layer.alpha) != (adapter.rank, adapter.alpha):
        raise ValueError(f"{what}: has rank {adapter.rank} and alpha {adapter.alpha:g}, the model's adapters have rank "
                         f"{len(layer.lora_A)} and alpha {layer.alpha:g}")
    unmerge(module)
    for name, own in adapter_state(module).items():
        own.copy_(adapter.tensors[name].to(own.dtype))
    return parameters(module)


def load(module, path):
    """
    Put the adapters of a file or PEFT folder (see read_adapter) into `module`, injected if need be; returns their parameters.

    Raises ValueError as read_adapter does; if tensors are not exactly those of the module's attentions; or if the rank and alpha
    of adapters it has already, or its base weights (by model.fingerprint), are not those recorded. It is then unchanged.
    """
    config = getattr(module, "config", None)  # diffusers' is of another kind: official names are then those of the full size
    return put(module, read_adapter(path, config if isinstance(config, model.UNetConfig) else None), path)


def load_beside(module, path):
    """Load the adapters that a fine-tuned official file holds beside the base; returns their parameters, [] if it has none."""
    if path is None or path.is_dir() or not model.split_lora(model.read_tensors(path))[1]:
        return []
    return load(module, path)


# ---------------------------------------------------------------------------------------------------------------------
# Export

@dataclass
class Export:
    """Write trained adapters in a form that another program reads."""
    adapter: tyro.conf.Positional[Path]
    """lora.safetensors of a run, a PEFT folder, or a fine-tuned official .pth"""
    to: Literal["peft", "official", "diffusers"]
    """peft: an adapter folder. official: a .pth, with --base the whole state dict that the official inference loads, else the
    adapters alone. diffusers: a UNet folder, the adapters merged into its weights"""
    out: Path
    """file (official) or folder to write; nothing may be there yet"""
    base: str | None = None
    """where the UNet is, as train.py's --base: a folder, a file, a hub id. A fine-tuned .pth has its own; peft needs none"""


def export(adapter, to, out, base=None, config=None):
    """
    See Export. config: the UNetConfig of bare files, default full size; a diffusers folder brings its own.

    Raises ValueError if something cannot be read or does not fit, or if `out` exists; nothing is written then.
    """
    out, config = Path(out), config or model.UNetConfig()
    if out.exists():
        raise ValueError(f"{out}: is there already; choose another --out")
    if to == "official" and out.suffix == ".safetensors":
        raise ValueError(f"{out}: the official code reads torch files; allowed is a name like lora.pth")
    unet = None
    if base:  # the UNet itself, or the whole model with the UNet in it
        path = model.find_base(base)
        alone = path.is_file() or (path / "config.json").is_file()
        unet = model.load_unet(path if alone else model.find_part(path, "unet") or path, config)
    config = unet.config if unet else config
    found = read_adapter(adapter, config)
    if unet is None and found.with_base:
        unet = model.load_unet(adapter, config)
    weights = unet.state_dict() if unet else {}
    if unet is None and to == "official":  # the structure alone, to compare names and shapes
        with torch.device("meta"):
            unet = model.UNet3D(config)
    if unet:
        put(unet, found, adapter)

    if to == "peft":
        settings = {"peft_type": "LORA", "r": found.rank, "lora_alpha": found.alpha, "lora_dropout": 0.0, "bias": "none",
                    "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "inference_mode": True,
                    "base_model_name_or_path": str(base) if base else found.base}
        write_folder(out, "adapter_config.json", settings, "adapter_model.safetensors", found.tensors)
    elif to == "official":
        # Official inference adds B A as they are (inference_instructvideo_entrance.py), so our scale goes into B.
        names, scale = official_names(config), found.alpha / found.rank
        tensors = {names[k]: t.float() * (scale if ".lora_B." in k else 1) for k, t in found.tensors.items()}
        with model.write_whole(out) as file:
            torch.save({"state_dict": tensors | (model.unet_to_official(weights, config) if weights else {})}, file)
    elif not weights:
        raise ValueError("--to diffusers writes the whole UNet: allowed is with --base, its weights")
    elif config.stem_heads != 8:
        raise ValueError(f"{base or adapter}: the first temporal transformer has {config.stem_heads} heads; "
                         "diffusers' UNet3DConditionModel allows only 8 there")
    else:
        merge(unet)
        settings = model.unet_to_diffusers(config)
        del settings["stem_heads"]  # diffusers has no such field
        write_folder(out, "config.json", settings, "diffusion_pytorch_model.safetensors",
                     {k: v for k, v in unet.state_dict().items() if ".lora_" not in k})


def write_folder(folder, settings_name, settings, weights_name, tensors):
    """A folder of weights with their settings beside them, whole or not at all."""
    with model.write_whole(folder) as hidden:
        hidden.mkdir()
        (hidden / settings_name).write_text(json.dumps(settings, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in tensors.items()}, hidden / weights_name, {"format": "pt"})


def main():
    """python lora.py export: one line and status 2 where the adapter or the folder is no good."""
    options = tyro.extras.subcommand_cli_from_dict({"export": Export}, description=__doc__)
    try:
        export(options.adapter, options.to, options.out, options.base)
    except (ValueError, OSError) as error:
        print(f"lora.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
