"""
Rank-4 adapters (LoRA, arXiv:2106.09685) on the query, key, value and output projections of every
attention: all that InstructVideo trains.

Paper: InstructVideo (arXiv:2312.12490), Appendix C. For ModelScopeT2V these are 264
projections and 1,661,440 parameters beside 1.4 billion frozen ones. So the optimizer's state is
small, a result is a file of 6.6 MB, and with the adapters switched off the base is there unchanged.

    parameters = inject(unet, rank=4)                 # freezes the UNet, returns what is trained
    save(unet, "lora.safetensors")
    load(unet, "lora.safetensors")

    python lora.py export out/run/lora.safetensors --to peft --out peft_folder
    python lora.py export out/run/lora.safetensors --to diffusers --base unet_folder --out merged

Ours differs from the official code (tools/modules/unet/unet_lora.py): (1) adapters are put into a
finished UNet, not written into a second class of it; (2) alpha works (there, setting it crashes):
the scale is alpha / r, and alpha = r gives their scale of 1; (3) adapters stay float32 on a 16-bit
base, where a step of 1e-5 would be rounded away.

Letters: r rank of an adapter, C_in and C_out widths of a projection, n rows of an input.
"""
import support.threads  # noqa: F401  before torch is loaded
import math
import re

import torch
import torch.nn.functional as F_
import tyro
from safetensors.torch import save_file
from torch import nn

from formats import adapters
from formats.tensor_names import split_lora
from formats.tensors import fingerprint, read_tensors
from support.clips import say_once
from support.files import write_whole
from support.ranks import run_script

# ----------------------------------------------------------------------------------------------
# The layer


class LoRALinear(nn.Module):
    """
    W x + (alpha / r) B A x (arXiv:2106.09685, Eq. (3) and Sec. 4.1). A and B are trained, not W.

    B starts at zero, so step 0 is the base model. alpha / r keeps the update of a given alpha the
    same size at every rank; the default alpha = r gives scale 1, as the official code has it. W and
    the bias keep their names, so a UNet's own tensors are called the same with and without.

    forward: x (..., C_in) -> (..., C_out), in the dtype that `linear` alone would give.
    """

    def __init__(self, linear, lora_rank, alpha, generator):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias                   # W (C_out, C_in)
        c_out, c_in = self.weight.shape
        device = self.weight.device

        # Standard deviation 1 / r, as in unet_lora.py:129. Drawn on the CPU: the same everywhere.
        A = torch.randn(lora_rank, c_in, generator=generator, device="cpu", dtype=torch.float32)
        self.lora_A = nn.Parameter((A / lora_rank).to(device))                # (r, C_in)
        B = torch.zeros(c_out, lora_rank, device=device, dtype=torch.float32)
        self.lora_B = nn.Parameter(B)                                         # (C_out, r)
        self.alpha, self.strength = alpha, 1.0

        self.register_buffer("base_weight", None, persistent=False)           # W, while merged

    @property
    def scale(self):
        """alpha / r, times a strength that is 1 unless set_scale changes it."""
        return self.strength * self.alpha / len(self.lora_A)

    def forward(self, x):
        if self.base_weight is not None:  # merged: W holds it all
            return F_.linear(x, self.weight, self.bias)                       # (..., C_out)

        rows = x.flatten(0, -2)                                               # (n, C_in)
        y = F_.linear(rows, self.weight, self.bias)                           # (n, C_out)

        # In the dtype of W x. To cast x up to A's float32 instead would keep another copy of every
        # x for the backward pass. The gradients of A and B come back in float32.
        A, B = self.lora_A.to(y.dtype), self.lora_B.to(y.dtype)  # (r, C_in), (C_out, r)
        y = y.addmm_(F_.linear(rows, A), B.t(), alpha=self.scale)             # one pass over y
        return y.unflatten(0, x.shape[:-1])                                   # (..., C_out)

    @torch.no_grad()
    def merge(self):
        """Fold the adapter into W. In bfloat16 W's last bit is lost: merge float32 for export."""
        if self.base_weight is not None:
            return
        W = self.weight
        dtype = torch.promote_types(W.dtype, torch.float32)
        update = self.scale * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))  # (C_out, C_in)

        # W is kept, since subtracting the update again would not give it back exactly. The merged
        # weight is a new Parameter: a graph that waits for its backward pass goes on with W.
        self.base_weight = W.data
        self.weight = nn.Parameter((W + update).to(W.dtype), requires_grad=False)

    def unmerge(self):
        """Undo merge, bit for bit."""
        if self.base_weight is not None:
            self.weight = nn.Parameter(self.base_weight, requires_grad=False)
            self.base_weight = None


# ----------------------------------------------------------------------------------------------
# All layers of a module

NONE = ("(?!)", "")  # a pattern that nothing matches


def projections(module, adapted="qkvo"):
    """
    {path: nn.Linear or LoRALinear} of every attention, by name: in our UNet and diffusers'. A
    module's `no_adapters`, (pattern, reason), tells which of them would learn nothing.
    adapted: which of query, key, value and output.
    """
    without, _ = getattr(module, "no_adapters", NONE)

    found = {}
    for path, layer in module.named_modules():
        wanted = adapters.is_adapted(path, adapted) and not re.search(without, path)
        if wanted and isinstance(layer, (nn.Linear, LoRALinear)):
            found[path] = layer
    if not found:
        raise ValueError(f"no attention in {type(module).__name__}: expected linear layers called "
                         "to_q, to_k, to_v, to_out.0")
    return found


def layers(module):
    """{path: LoRALinear}. ValueError if there is none: a call would silently do nothing."""
    found = {path: m for path, m in module.named_modules() if isinstance(m, LoRALinear)}
    if not found:
        raise ValueError(f"no adapters in {type(module).__name__}: inject or load them first")
    return found


def inject(module, rank=4, alpha=None, generator=None, adapted="qkvo"):
    """
    Put adapters on every attention of `module` and freeze all else (Appendix C).

    alpha: default rank, so that the scale is 1 (official). generator: draws A, on the CPU; default
    one seeded with 0. adapted: which of query, key, value and output. Returns the new parameters, A
    and B in turn, in tree order.
    Convert the module (dtype) before, not after: .to(dtype) would take the adapters along.
    ValueError: rank below 1, alpha not above 0, no attention, or adapters already there.
    """
    alpha = float(rank if alpha is None else alpha)

    # All that can be refused, before anything is changed.
    if rank < 1:
        raise ValueError(f"rank {rank}: must be at least 1")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha {alpha}: must be above 0")
    found = projections(module, adapted)
    if any(isinstance(layer, LoRALinear) for layer in found.values()):
        raise ValueError(f"{type(module).__name__} has adapters already")

    _, reason = getattr(module, "no_adapters", NONE)
    if reason:
        say_once(reason)

    generator = generator or torch.Generator().manual_seed(0)
    module.requires_grad_(False)
    trained = []
    for path, linear in found.items():
        parent, _, leaf = path.rpartition(".")
        layer = LoRALinear(linear, rank, alpha, generator)
        setattr(module.get_submodule(parent), leaf, layer)
        trained += [layer.lora_A, layer.lora_B]
    return trained


def parameters(module):
    """What is trained: [A, B, A, B, ...] in the order of the module tree."""
    trained = []
    for layer in layers(module).values():
        trained += [layer.lora_A, layer.lora_B]  # (r, C_in), (C_out, r)
    return trained


def merge(module):
    """Fold every adapter into its W: each layer becomes a plain linear one. May be repeated."""
    for layer in layers(module).values():
        layer.merge()


def unmerge(module):
    """Undo `merge`, bit for bit."""
    for layer in layers(module).values():
        layer.unmerge()


def set_scale(module, strength):
    """Multiply what the adapters add: 0 is the base model, 1 the trained one. Merged or not."""
    for layer in layers(module).values():
        merged = layer.base_weight is not None
        layer.unmerge()  # a merged W holds the old strength
        layer.strength = strength
        if merged:
            layer.merge()


def anchored(base, score, strength):
    """
    Stay near the base: score(batch) -> R (B,), {name: (B,)}, less `strength` times the mean square
    distance between the eps that the network predicts with its adapters and what it predicts
    without, a constant, over the calls that carry gradient. It is logged as "distance".
    (DiffusionNFT, arXiv:2509.16117, has such a term.) base.predict is replaced: a call without
    gradient follows each of these.
    """
    predict, distances = base.predict, []

    def predict_twice(z_t, level, text):
        z_0, eps = predict(z_t, level, text)                                  # (B, C, F, h, w)
        if eps.requires_grad:
            set_scale(base.network, 0.)
            with torch.no_grad():
                base_eps = predict(z_t, level, text)[1]
            set_scale(base.network, 1.)
            distances.append((eps - base_eps).square().flatten(1).mean(dim=1))
        return z_0, eps

    def anchored_score(batch):
        distances.clear()
        R, logged = score(batch)
        distance = torch.cat(distances).view(-1, len(R)).mean(dim=0)  # guidance has two for each
        return R - strength * distance, logged | {"distance": distance.detach()}         # (B,)

    base.predict = predict_twice
    return anchored_score


# ----------------------------------------------------------------------------------------------
# Files. formats/adapters.py has their forms.

def adapter_state(module):
    """{name in our files: tensor}, sharing memory with the parameters."""
    state = {}
    for path, layer in layers(module).items():
        state[adapters.TENSOR.format(path, "A")] = layer.lora_A.detach()
        state[adapters.TENSOR.format(path, "B")] = layer.lora_B.detach()
    return state


def base_fingerprint(module):
    """The fingerprint of the base weights, merged or not; None on the meta device."""
    if next(module.parameters()).is_meta:
        return None

    weights = module.state_dict()
    for path, layer in module.named_modules():
        if isinstance(layer, LoRALinear) and layer.base_weight is not None:  # merged
            weights[f"{path}.weight"] = layer.base_weight
    return fingerprint(weights)


def save(module, path, base=None):
    """
    Write the adapters to a safetensors file, whole or not at all; an older file is replaced.

    Rank, alpha and the base's fingerprint are recorded, and `load` compares them: adapters on other
    weights would do nothing useful, silently. base: what to call the base in messages.
    """
    layer = next(iter(layers(module).values()))  # all have the same rank and alpha
    recorded = {"format": "pt", "version": adapters.VERSION, "rank": str(len(layer.lora_A)),
                "alpha": str(layer.alpha), "base": base and str(base),
                "base_fingerprint": base_fingerprint(module)}
    with write_whole(path) as hidden:
        save_file(adapter_state(module), hidden, {k: v for k, v in recorded.items() if v})


@torch.no_grad()
def load(module, path):
    """
    Put the adapters of a file or PEFT folder into `module`, injected if need be; returns them.

    path: ours, official or PEFT's (formats/adapters.py). ValueError, and an unchanged module, if
    tensors, rank, alpha or base are not those that the module has.
    """
    # Official names are translated by the module's structure, if it is one of ours.
    structure = getattr(module, "config", None)
    structure = structure if hasattr(structure, "attention_levels") else None
    adapter = adapters.read_adapter(path, structure)

    # Compare everything that can be compared, before anything is changed.
    found = projections(module, adapter.letters)
    without, _ = getattr(module, "no_adapters", NONE)
    for name in list(adapter.tensors):  # another program's, which change nothing
        if re.search(without, adapters.NAME.fullmatch(name)[1]):
            del adapter.tensors[name]
    shapes = {name: layer.weight.shape for name, layer in found.items()}
    adapters.check_adapter(adapter, shapes, base_fingerprint(module), path)
    layer = next(iter(found.values()))
    before = [at for at, other in module.named_modules() if isinstance(other, LoRALinear)]
    if not before:
        inject(module, adapter.rank, adapter.alpha, adapted=adapter.letters)
    elif before != [*found]:
        raise ValueError(f"{path}: adapts {len(found)} projections ({adapter.letters}), the "
                         f"model's adapters {len(before)}")
    elif (len(layer.lora_A), layer.alpha) != (adapter.rank, adapter.alpha):
        raise ValueError(f"{path}: has rank {adapter.rank} and alpha {adapter.alpha:g}, the "
                         f"model's adapters have {len(layer.lora_A)} and {layer.alpha:g}")

    unmerge(module)
    for name, tensor in adapter_state(module).items():
        tensor.copy_(adapter.tensors[name].to(tensor.dtype))
    return parameters(module)


def load_beside(module, path, cfg=None):
    """Load the adapters that a fine-tuned official file has beside the base: their parameters, or
    []. ValueError if cfg, a run's settings, asks for another rank or lora_alpha."""
    if path is None or path.is_dir() or not split_lora(read_tensors(path))[1]:
        return []

    found = load(module, path)
    layer = next(iter(layers(module).values()))
    for name, value in (("rank", len(layer.lora_A)), ("lora_alpha", layer.alpha)):
        asked = getattr(cfg, name, None)
        if asked not in (None, value):
            raise ValueError(f"{name} = {asked}: must be {value}, that of the adapters in {path}")
    return found


def main():
    """python lora.py export"""
    options = tyro.extras.subcommand_cli_from_dict({"export": adapters.Export}, description=__doc__)
    adapters.export(options.adapter, options.to, options.out, options.base)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_script("lora.py", main)
