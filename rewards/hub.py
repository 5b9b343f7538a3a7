"""
Models of the transformers library as frozen parts of a reward: no download, tensors read as data like all others.

Published names differ from the ones that a version of transformers gives its modules; from_pretrained translates them on the
way. Here a reward says which piece of a name may stand for which, and either is taken.
"""
import sys

import torch
import torch.nn.functional as F_
from torch import nn
from tqdm import tqdm

from formats.reward_model import no_autocast
from formats.tensors import build_empty, load_strict, read_tensors
from support.files import first_line, read_json
from support.ranks import is_main_process

SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}  # widths of the published models


def read_model_config(config_class, path):
    """The config.json of a hub folder as config_class; ValueError for anything that is none."""
    file = path / "config.json"
    content = read_json(file)
    for key, value in [*content.items(), *(item for part in content.values() if isinstance(part, dict) for item in part.items())]:
        if str(key).endswith("layers") and not (type(value) is int and 0 < value <= 256):
            raise ValueError(f"{file}: {key} is {value!r:.40}; must be a whole number from 1 to 256")
    try:
        return config_class.from_dict(content)
    except Exception as error:  # by version KeyError, TypeError or a validator's own
        raise ValueError(f"{file}: not the config of a model we have ({first_line(error)})") from None


def build(make, source=None, dtype=torch.float32, device="cpu", tensors=None, spellings=()):
    """
    The module that make() builds, frozen and in eval mode, with published weights, or seeded random ones if source is None.

    source: a file or folder of tensors, also named in errors; tensors: those of it to take, if not all.
    spellings: pairs of pieces of a tensor's name that stand for each other. ValueError if the tensors do not fit.
    """
    if source is None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the CPU's alone
            return make().eval().requires_grad_(False).to(device=device, dtype=dtype)

    module = build_empty(make, source)
    tensors = read_tensors(source) if tensors is None else tensors
    load_strict(module, spell(tensors, module.state_dict(), spellings), source, dtype)

    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:  # in no file: the numbers of positions
            parent, _, own_name = name.rpartition(".")
            assert own_name == "position_ids", name
            positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            module.get_submodule(parent).register_buffer(own_name, positions, persistent=False)
    return module.to(device)


def spell(tensors, expected, spellings):
    """Tensors under the names that a module expects; older files also hold position numbers, which are left out."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids") and name not in expected:
            continue
        for one, other in [*spellings, *((b, a) for a, b in spellings)]:
            if name not in expected and name.replace(one, other) in expected:
                name = name.replace(one, other)
        found[name] = tensor
    return found


def size_name(config):
    """What the published models call themselves by their width: tiny, small, base, large; else the width."""
    return SIZES.get(config.hidden_size, str(config.hidden_size))


def wanted_label(labels, wanted, what):
    """The number of the class called `wanted` in {number: name}; ValueError names some that there are."""
    for number, label in labels.items():
        if label.lower() == wanted.strip().lower():
            return int(number)
    known = sorted({label for label in labels.values() if label != "N/A"})
    close = [label for label in known if wanted.strip().lower()[:3] in label.lower()]
    raise ValueError(f"{what}: no class {wanted!r:.60}; must be one of its {len(known)}, such as "
                     + ", ".join((close or known)[:8]))


# ---------------------------------------------------------------------------------------------------------------------
# What several rewards need

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def fit_within(x, shortest, longest, multiple):
    """
    YOLOS's resize: shortest side to `shortest`, longest at most `longest`, both cut to a `multiple`; nothing is cropped.

    x (N, 3, H, W) -> (N, 3, h, w), bilinear and antialiased. For videos that are wider than high, 512 is VADER's height.
    """
    H, W = x.shape[-2:]
    if max(H, W) / min(H, W) * shortest > longest:
        exact = longest * min(H, W) / max(H, W)
        h, w = (round(exact), int(exact * W / H)) if H <= W else (int(exact * H / W), round(exact))
    else:
        h, w = (shortest, int(shortest * W / H)) if H <= W else (int(shortest * H / W), shortest)
    h, w = max(h // multiple, 1) * multiple, max(w // multiple, 1) * multiple
    return F_.interpolate(x, (h, w), mode="bilinear", align_corners=False, antialias=True)  # (N, 3, h, w)


def imagenet_normalize(x):
    """The same with ImageNet's means and deviations, which detectors and video models were trained with."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).to(x)[..., None, None]
    return (x - mean) / std


class LinearHead(nn.Module):
    """
    Five linear layers from features to a score, those of the aesthetic predictor and of ImageReward: (N, width) -> (N,).

    Always in float32, under autocast too: it costs nothing, and the score is what is compared.
    """

    def __init__(self, width):
        super().__init__()
        widths = (width, 1024, 128, 64, 16, 1)
        layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
        # Dropout, which eval mode switches off, stood between the first ones and counts in the published names.
        self.layers = nn.ModuleDict(dict(zip("02467", layers)))

    def forward(self, x):
        with no_autocast(x):
            x = x.float()
            for layer in self.layers.values():
                x = layer(x)
        return x[:, 0]


def say_non_commercial(name, licence):
    """One line on standard error for weights that may not be used commercially, and so neither may what is tuned on them."""
    if is_main_process():
        tqdm.write(f"{name}: its weights are {licence}, for no commercial use", file=sys.stderr)
