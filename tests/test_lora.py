"""lora.py: the paper's counts, the algebra of W + (alpha / r) B A, and files that peft, diffusers and the official code read."""
import dataclasses
import hashlib
import json
import os
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora
import model
from formats import adapters, tensor_names as names
from formats.tensors import fingerprint
from lora import LoRALinear, adapter_state, inject, layers, load, merge, save, set_scale, unmerge
from tests.conftest import apart, contents, docs_example, refused, seeded, write_file

# ModelScopeT2V's structure, small. Eight heads in the first temporal transformer, as diffusers has them.
CONFIG = model.UNetConfig(channels=(32, 64), blocks_per_level=1, attention_levels=(True, False), context_dim=32, head_dim=8,
                          stem_heads=8, norm_groups=8)


def tiny_unet(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.UNet3D(CONFIG).to(dtype).eval()


def train(module, seed=1):
    """Stands in for training: adapters that change the output well beyond rounding."""
    with torch.no_grad():
        for layer in layers(module).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=seeded(seed)) / 4)
    return module


def trained_unet(rank=4, alpha=None, dtype=torch.float32):
    unet = tiny_unet(dtype)
    inject(unet, rank, alpha, seeded())
    return train(unet)


def run(module, dtype=torch.float32):
    """eps for a fixed input, from our UNet or diffusers'."""
    z_t = torch.randn(2, 4, 3, 6, 8, generator=seeded(2), dtype=torch.float64).to(dtype)
    text = torch.randn(2, 5, CONFIG.context_dim, generator=seeded(3), dtype=torch.float64).to(dtype)
    eps = module(z_t, torch.tensor([1, 951]), text)
    return eps if torch.is_tensor(eps) else eps.sample


def test_the_papers_counts_and_the_official_names():
    """The SHA-256 is of json.dumps(sorted([name, shape] of every LoRA tensor)) in the published InstructVideo weights."""
    with torch.device("meta"):
        unet = model.UNet3D()
    base = sum(p.numel() for p in unet.parameters())
    added = sum(p.numel() for p in inject(unet, rank=4))
    assert base == 1_411_233_860 and added == 1_661_440 and len(layers(unet)) == 264
    # The paper's Table of parameters counts in units of 2^20.
    assert round((base + added) / 2**20, 2) == 1347.44
    assert round(added / 2**20, 2) == 1.58

    official = adapters.official_names(unet.config)
    listed = sorted([official[k], list(t.shape)] for k, t in adapter_state(unet).items())
    assert len(listed) == len(set(official.values())) == 528
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    assert digest == "1f9f567444ed9feed6acb5a823c3cb92a009821bbe77f98b89be419be348e001"


# ----------------------------------------------------- The layer ------------------------------------------------------

@pytest.mark.parametrize("bias", [False, True])
def test_the_formula(bias):
    linear = nn.Linear(7, 5, bias=bias, dtype=torch.float64)
    layer = LoRALinear(linear, lora_rank=2, alpha=6.0, generator=seeded())
    with torch.no_grad():
        layer.lora_B.normal_(generator=seeded(1))
    x = torch.randn(3, 4, 7, generator=seeded(2), dtype=torch.float64)
    change = 3 * layer.lora_B.double() @ layer.lora_A.double()                            # alpha / r = 3
    torch.testing.assert_close(layer(x), linear(x) + x @ change.T)


def test_what_is_trained():
    unet = tiny_unet()
    before, eps = list(unet.state_dict()), run(unet)
    parameters = inject(unet)
    assert torch.equal(run(unet), eps), "fresh adapters change nothing"
    assert [id(p) for p in unet.parameters() if p.requires_grad] == [id(p) for p in parameters]
    adapted = {name.rsplit(".", 1)[0] for name, p in unet.named_parameters() if p.requires_grad}
    attentions = [name for name, m in unet.named_modules() if type(m) is model.Attention]
    assert adapted == {f"{name}.{part}" for name in attentions for part in ("to_q", "to_k", "to_v", "to_out.0")}
    assert [name for name in unet.state_dict() if ".lora_" not in name] == before

    # The first step moves B alone: A's gradient passes through B, which is zero.
    run(unet).square().sum().backward()
    assert all(p.grad is None for p in unet.parameters() if not p.requires_grad)
    assert all((p.grad.abs().max() > 0) == (i % 2 == 1) for i, p in enumerate(parameters))
    train(unet)
    run(unet).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in parameters)


def test_start_of_A():
    """Standard deviation 1 / r (unet_lora.py:129), from the generator alone."""
    before = torch.get_rng_state()
    layer = LoRALinear(nn.Linear(4000, 3), 4, 4.0, seeded())
    assert abs(layer.lora_A.std().item() - 1 / 4) < 0.01 and abs(layer.lora_A.mean().item()) < 0.01
    assert not layer.lora_B.any()
    states = []
    for generator in (seeded(0), None, seeded(1)):
        unet = tiny_unet()
        inject(unet, generator=generator)
        states.append(torch.cat([t.flatten() for t in adapter_state(unet).values()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2]), "no generator means seed 0"
    with torch.random.fork_rng():
        torch.set_rng_state(before)
        inject(tiny_unet())
        assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


def test_inject_refuses():
    refused("no attention in Sequential", inject, nn.Sequential(nn.Linear(2, 2)))
    unet = tiny_unet()
    for change in (merge, unmerge, adapter_state):
        refused("no adapters in UNet3D", change, unet)
    for settings, message in ((dict(rank=0), "rank 0"), (dict(alpha=0), "alpha 0"), (dict(alpha=float("nan")), "alpha nan")):
        refused(message, inject, unet, **settings)
    assert all(p.requires_grad for p in unet.parameters()), "nothing was frozen"
    inject(unet)
    refused("has adapters already", inject, unet)


# ------------------------------------------------ Merging and scaling -------------------------------------------------

@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_merge_and_back(dtype, tolerance):
    unet = trained_unet(alpha=2, dtype=dtype)
    state = {k: v.clone() for k, v in unet.state_dict().items()}
    unmerged = run(unet, dtype).detach()  # with gradient: without, float32 layers fold A and B into W anyway
    with torch.no_grad():
        merge(unet)
        merge(unet)
        assert list(unet.state_dict()) == list(state)
        merged = run(unet, dtype)
        assert not torch.equal(merged, unmerged) and apart(merged, unmerged) < tolerance
        for layer in layers(unet).values():
            layer.lora_A.zero_()
        assert torch.equal(run(unet, dtype), merged), "merged layers do not look at A and B"
    unmerge(unet)
    unmerge(unet)
    assert all(torch.equal(v, state[k]) for k, v in unet.state_dict().items() if not k.endswith("lora_A"))
    assert not any(p.requires_grad for name, p in unet.named_parameters() if ".lora_" not in name)


def test_merging_leaves_a_waiting_graph_alone():
    """Merged for the steps without gradient, unmerged for the last K: a forward pass keeps the weights it has seen."""
    gradients = []
    for change in (lambda unet: None, merge):
        unet = trained_unet()
        loss = run(unet).square().sum()
        change(unet)
        loss.backward()
        gradients.append([p.grad for p in lora.parameters(unet)])
    assert all(map(torch.equal, *gradients))


def test_scale():
    unet = trained_unet()
    with torch.no_grad():
        one = run(unet)
        set_scale(unet, 0)
        assert torch.equal(run(unet), run(tiny_unet()))
        set_scale(unet, 0.5)
        half = run(unet)
        assert not torch.allclose(half, one)
        merge(unet)
        assert apart(run(unet), half) < 1e-5
        set_scale(unet, 1)
        merged = run(unet)
        assert apart(merged, one) < 1e-5 and all(m.base_weight is not None for m in layers(unet).values()), "stays merged"


# ----------------------------------------------------- Precision ------------------------------------------------------

def gradient(unet, dtype):
    lora_parameters = lora.parameters(unet)
    out = run(unet, dtype)
    out.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in lora_parameters)
    return torch.cat([p.grad.flatten() for p in lora_parameters]), out.dtype


def test_float32_adapters_on_a_16_bit_base():
    exact, _ = gradient(trained_unet(), torch.float32)
    rounded, out_dtype = gradient(trained_unet(dtype=torch.bfloat16), torch.bfloat16)
    assert out_dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.98
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = gradient(trained_unet(), torch.float32)
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.98


def test_gradient_after_steps_without_gradient_in_one_autocast_region():
    """The chain of an edit: casts that autocast caches in the first steps must not serve the last K, cut off from A and B."""
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = gradient(trained_unet(), torch.float32)
        unet = trained_unet()
        with torch.no_grad():
            run(unet)
        found, _ = gradient(unet, torch.float32)
    assert torch.equal(found, expected)


# ----------------------------------------- Files: ours and the official ones ------------------------------------------

def test_ours_and_back(tmp_path):
    unet = trained_unet(rank=2, alpha=3)
    path = tmp_path / "run" / "lora.safetensors"
    save(unet, path, base="tiny")
    assert os.listdir(path.parent) == ["lora.safetensors"], "nothing hidden is left"
    fresh = tiny_unet()
    parameters = load(fresh, path)
    assert [id(p) for p in parameters] == [id(p) for p in fresh.parameters() if p.requires_grad]
    assert torch.equal(run(fresh), run(unet))

    # Into adapters that are there already, the same ones, merged or not.
    with torch.no_grad():
        parameters[0].zero_()
    merge(fresh)
    assert all(p is q for p, q in zip(load(fresh, path), parameters, strict=True))
    assert torch.equal(run(fresh), run(unet))
    for rank, alpha in ((4, 3), (2, 4)):
        refused(f"has rank 2 and alpha 3, the model's adapters have {rank} and {alpha}", load, trained_unet(rank, alpha), path)


def test_the_base_is_compared(tmp_path):
    merge(unet := trained_unet())
    save(unet, tmp_path / "lora.safetensors", base="tiny")
    assert lora.base_fingerprint(unet) == lora.base_fingerprint(tiny_unet()) == fingerprint(tiny_unet().state_dict())
    assert all(layer.base_weight is not None for layer in layers(unet).values()), "still merged"
    load(tiny_unet(torch.bfloat16), tmp_path / "lora.safetensors")  # the same weights in another precision
    other = tiny_unet()
    nn.init.normal_(other.conv_in.weight, generator=seeded(7))
    refused("was trained on 'tiny' of fingerprint .*, the model's is", load, other, tmp_path / "lora.safetensors")
    assert not any(isinstance(m, LoRALinear) for m in other.modules())


def official_state(unet, prefix=""):
    """As the official trainer saves it: every tensor of the model, B A with a scale of 1."""
    own = {k: v for k, v in unet.state_dict().items() if ".lora_" not in k}
    added = {adapters.official_names(CONFIG)[k]: v for k, v in adapter_state(unet).items()}
    state = names.unet_to_official(own, CONFIG) | added
    return {prefix + k: v for k, v in state.items()}


@pytest.mark.parametrize("form", ["alone.safetensors", "alone.pth", "fine-tuned.pth"])
def test_official_files(tmp_path, form):
    unet, path = trained_unet(), tmp_path / form
    if form == "fine-tuned.pth":
        rest = {"optimizer": {"step": 3}, "scaler": None, "step": 620000}
        torch.save({"state_dict": official_state(unet, "module.")} | rest, path)
    else:
        alone = names.split_lora(official_state(unet))[1]
        save_file(alone, path) if form.endswith("safetensors") else torch.save(alone, path)
    base = model.load_unet(path, CONFIG) if form == "fine-tuned.pth" else tiny_unet()
    assert torch.equal(run(base), run(tiny_unet()))
    assert len(lora.load_beside(base, path)) == len(adapter_state(unet))
    assert torch.equal(run(base), run(unet))
    write_file(tmp_path / "base.safetensors", tiny_unet().state_dict())
    assert lora.load_beside(tiny_unet(), tmp_path / "base.safetensors") == []


FIRST, SECOND = (f"base_model.model.transformer_in.transformer_blocks.0.attn1.to_q.lora_{side}.weight" for side in "AB")
A, B = torch.zeros(4, 64), torch.zeros(64, 4)
MALFORMED = {  # what is wrong: tensors to replace (None: remove), metadata to replace, message
    "missing layer": ({FIRST: None, SECOND: None}, {}, "2 tensors missing .*attn1.to_q"),
    "unknown layer": ({k.replace("_in", "_on"): t for k, t in ((FIRST, A), (SECOND, B))}, {}, "2 tensors not known .*_on"),
    "not an adapter": ({"conv": B}, {}, "tensor conv is not half of an adapter"),
    "wrong width": ({FIRST: A[:, :9].clone()}, {}, r"to_q.lora_A.weight has shape \[4, 9\], expected \[4, 64\]"),
    "another rank": ({FIRST: torch.zeros(5, 64)}, {}, r"ranks \[4, 5\]; expected one rank for all"),
    "a vector": ({FIRST: torch.zeros(4)}, {}, "expected a matrix"),
    "whole numbers": ({FIRST: A.int()}, {}, "torch.int32.*expected floating-point numbers"),
    "not finite": ({FIRST: A / 0}, {}, "finite"),
    "rank lies": ({}, {"rank": "1000000000"}, "records rank '1000000000' .*; expected rank 4"),
    "no alpha": ({}, {"alpha": None}, "records rank '4' and alpha None"),
    "of the future": ({}, {"version": "2"}, "version '2', this code reads 1"),
}


@pytest.mark.parametrize("wrong", MALFORMED)
def test_malformed_files(tmp_path, wrong):
    tensors, recorded, message = MALFORMED[wrong]
    path = tmp_path / "lora.safetensors"
    save(trained_unet(), path)
    with safe_open(path, "pt") as file:
        recorded = file.metadata() | recorded
    tensors = {k: v.clone() for k, v in load_file(path).items()} | tensors
    save_file({k: v for k, v in tensors.items() if v is not None}, path, {k: v for k, v in recorded.items() if v is not None})
    refused_file(path, message)


def refused_file(path, message):
    """One line that names the file; the model is as it was."""
    unet = tiny_unet()
    assert str(path) in refused(message, load, unet, path)
    assert all(p.requires_grad for p in unet.parameters()) and not any(isinstance(m, LoRALinear) for m in unet.modules())


# -------------- The other programs: diffusers' UNet, peft, and the arithmetic of the official inference ---------------

def diffusers_unet(unet):
    """diffusers' own class with the base weights of ours."""
    from diffusers import UNet3DConditionModel
    config = {k: v for k, v in names.unet_to_diffusers(CONFIG).items() if k not in ("_class_name", "stem_heads")}
    theirs = UNet3DConditionModel(**config)
    theirs.load_state_dict({k: v for k, v in unet.state_dict().items() if ".lora_" not in k})
    return theirs.to(next(unet.parameters()).dtype).eval()


def base_folder(folder, unet=None):
    """A diffusers component folder, which brings its structure."""
    unet = unet or tiny_unet()
    write_file(folder / "diffusion_pytorch_model.safetensors", unet.state_dict())
    write_file(folder / "config.json", names.unet_to_diffusers(unet.config))
    return folder


@torch.no_grad()
def test_the_lines_of_the_docs_put_an_adapter_onto_diffusers_unet(tmp_path, aside, capsys):
    """docs/formats.md, as it stands; only the base and the folder are those of this test."""
    unet = trained_unet(alpha=6)
    save(unet, tmp_path / "lora.safetensors")
    adapters.export(tmp_path / "lora.safetensors", "peft", tmp_path / "out" / "peft")
    assert "note" not in capsys.readouterr().out
    diffusers_unet(unet).save_pretrained(tmp_path / "model" / "unet")
    lines = docs_example("formats.md", "ali-vilab/text-to-video-ms-1.7b")
    assert len(lines.splitlines()) <= 11
    here = {}
    exec(lines.replace("ali-vilab/text-to-video-ms-1.7b", "model"), here)
    assert type(here["unet"]).__name__ == "UNet3DConditionModel"
    assert apart(run(here["unet"]), run(tiny_unet())) > 0.1 and apart(run(here["unet"]), run(unet)) < 1e-5

    save(unet, tmp_path / "tiny.safetensors", base="tiny")
    adapters.export(tmp_path / "tiny.safetensors", "peft", tmp_path / "tiny")
    assert "note: the tiny base is no UNet that diffusers can build" in capsys.readouterr().out
    load(fresh := tiny_unet(), tmp_path / "tiny")
    assert torch.equal(run(fresh), run(unet))


@torch.no_grad()
def test_adapters_that_peft_trained(tmp_path):
    from peft import LoraConfig, get_peft_model
    theirs = get_peft_model(diffusers_unet(tiny_unet()), LoraConfig(r=3, lora_alpha=5, init_lora_weights=False,
                                                                    target_modules=["to_q", "to_k", "to_v", "to_out.0"])).eval()
    theirs.save_pretrained(tmp_path / "peft")
    load(unet := tiny_unet(), tmp_path / "peft")
    assert apart(run(unet), run(tiny_unet())) > 0.01
    assert apart(run(unet), run(theirs)) < 1e-5

    # Every field that PEFT has: plain LoRA is read, and what means another base or another layer is refused by name.
    file = tmp_path / "peft/adapter_config.json"
    settings = json.loads(file.read_text())
    plain = {"init_lora_weights": "orthogonal", "task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": "a",
             "lora_dropout": .1, "exclude_modules": "conv", "revision": "main", "auto_mapping": {"base_model_class": "UNet"},
             "layers_to_transform": [0], "of_the_future": {}}
    for field, value in plain.items():
        file.write_text(json.dumps(settings | {field: value}))
        assert adapters.read_adapter(tmp_path / "peft"), field
    changes = [{"init_lora_weights": init} for init in ("pissa", "pissa_niter_4", "loftq", "of_the_future")]
    changes += [{"bias": "all"}, {"peft_type": "ADALORA"}, {"of_the_future": 1}]
    known = plain.keys() | {"bias", "peft_type", "target_modules", "lora_alpha", "r", "inference_mode", "peft_version",
                            "megatron_core", "qalora_group_size", "layers_pattern", "runtime_config"}
    changes += [{field.name: {"to_q": 8}} for field in dataclasses.fields(LoraConfig) if field.name not in known]
    assert {"use_dora", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "eva_config"} <= {*map("".join, changes)}
    for change in changes:
        file.write_text(json.dumps(settings | change))
        message = f"peft: adapter_config.json sets {next(iter(change))} to .*; must be plain LoRA"
        refused(message, adapters.read_adapter, tmp_path / "peft")
    file.write_text(json.dumps(settings | {"r": 4}))
    refused_file(tmp_path / "peft", "records rank 4 .*expected rank 3")
    file.write_text("[")
    refused_file(tmp_path / "peft", "adapter_config.json: expected JSON")


@torch.no_grad()
def test_export_to_diffusers(tmp_path):
    from diffusers import UNet3DConditionModel
    unet = trained_unet(alpha=6)
    save(unet, tmp_path / "lora.safetensors")
    base_folder(tmp_path / "unet")  # a part of tmp_path, as the whole model's folder
    adapters.export(tmp_path / "lora.safetensors", "diffusers", tmp_path / "merged", base=tmp_path)
    theirs, info = UNet3DConditionModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert apart(run(theirs.eval()), run(unet)) < 1e-5
    assert apart(run(model.load_unet(tmp_path / "merged")), run(unet)) < 1e-5


@torch.no_grad()
def test_export_to_the_official_code(tmp_path):
    unet = trained_unet(alpha=6)
    save(unet, tmp_path / "lora.safetensors")
    adapters.export(tmp_path / "lora.safetensors", "official", path := tmp_path / "full.pth", base=base_folder(tmp_path / "base"))
    state = torch.load(path, weights_only=True)["state_dict"]
    # strict=True there: exactly the tensors of a model with use_lora.
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in official_state(unet).items()}
    # get_lora_merged_model (inference_instructvideo_entrance.py): W += up @ down, alpha 1.
    merge(unet)
    expected = official_state(unet)
    for name in [k for k in state if k.endswith("down_linear.weight")]:
        weight = name.replace("_lora.down_linear", ".0" if "to_out" in name else "")
        state[weight] += state[name.replace("down", "up")] @ state[name]
        assert torch.allclose(state[weight], expected[weight], atol=1e-6), weight
    unmerge(unet)

    # The file splits into base and adapters, here and in `export`.
    load(both := model.load_unet(path, CONFIG), path)
    assert apart(run(both), run(unet)) < 1e-5
    adapters.export(path, "diffusers", tmp_path / "merged", config=CONFIG)
    assert apart(run(model.load_unet(tmp_path / "merged")), run(unet)) < 1e-5

    # Without a base: the adapters alone.
    adapters.export(tmp_path / "lora.safetensors", "official", tmp_path / "alone.pth", config=CONFIG)
    alone = torch.load(tmp_path / "alone.pth", weights_only=True)["state_dict"]
    assert all(names.LORA_TENSOR.search(k) for k in alone) and len(alone) == len(adapter_state(unet))
    load(fresh := tiny_unet(), tmp_path / "alone.pth")
    assert apart(run(fresh), run(unet)) < 1e-5


# -------------------------------------------------- The command line --------------------------------------------------

EXPORT_ERRORS = [  # arguments, part of the message
    ("lora.safetensors --to peft --out base", "base: is there already"),
    ("lora.safetensors --to diffusers --out out", "does not say what it was trained on.* --base must name its weights"),
    ("tiny.safetensors --to diffusers --out out", "was trained on 'tiny'.* --base must name its weights"),
    ("lora.safetensors --to diffusers --out out --base lora.safetensors", "was trained on 'weights' of fingerprint"),
    ("tiny.safetensors --to official --out out.pth", "was trained on 'tiny', an official file is for ModelScope's UNet"),
    ("lora.safetensors --to official --out out.safetensors --base base", "a name like lora.pth"),
    ("two.safetensors --to diffusers --out out --base two", "has 2 heads; diffusers' UNet3DConditionModel has 8 there"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    for name, base in (("lora", None), ("tiny", "tiny")):
        save(trained_unet(), folder / f"{name}.safetensors", base)
    base_folder(folder / "base")
    two_heads = model.UNet3D(dataclasses.replace(CONFIG, stem_heads=2))
    base_folder(folder / "two", two_heads)
    inject(two_heads)
    save(two_heads, folder / "two.safetensors")
    return folder


@pytest.mark.parametrize(("arguments", "message"), EXPORT_ERRORS)
def test_export_errors(workplace, monkeypatch, arguments, message):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["lora.py", "export", *arguments.split()])
    before = contents(workplace)
    refused(message, lora.main)
    assert contents(workplace) == before


def test_the_command(workplace, monkeypatch, capsys, tmp_path):
    arguments = ["lora.py", "export", str(workplace / "lora.safetensors"), "--to", "peft", "--out", str(tmp_path / "peft")]
    monkeypatch.setattr(sys, "argv", arguments)
    lora.main()
    assert capsys.readouterr().out == f"wrote {tmp_path / 'peft'}\n"
    assert sorted(os.listdir(tmp_path / "peft")) == ["adapter_config.json", "adapter_model.safetensors"]
