"""
model.py's readers: files as other programs write them, and files that are damaged, mismatched or hostile.

Every good file here is written by the program it is from where that is a Python package (diffusers, transformers, open_clip,
torch); the official files are torch.save of the names that test_model.py checks. Every bad one ends in a ValueError of one
line that names the file.
"""
import builtins
import hashlib
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import model
from formats import names, tensors as published
from model import Autoencoder, UNet3D, UNetConfig, VAEConfig, load_text_encoder, load_unet, load_vae
from support import files
from tests.ldm import vae_to_official

UNET = UNetConfig(channels=(8, 16), blocks_per_level=1, attention_levels=(True, False), context_dim=128, head_dim=4,
                  norm_groups=4)
VAE = VAEConfig(channels=(8, 16), blocks_per_level=1, norm_groups=4)
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"
pytestmark = pytest.mark.filterwarnings(  # torch's own remarks on the bad files
    "ignore:Detected pickle", "ignore:'torch.load' received a zip", "ignore:`torch.jit.script`", "ignore:Validating sparse")


def drawn(module, seed=0):
    """A module with every weight drawn anew, exact in fp16."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g).half().float()
    return module


@pytest.fixture(scope="module")
def unet():
    return drawn(UNet3D(UNET)).state_dict()


@pytest.fixture(scope="module")
def official(unet):
    """The same tensors under ModelScope's names."""
    return names.unet_to_official(unet, UNET)


@pytest.fixture(scope="module")
def vae():
    return drawn(Autoencoder(VAE)).state_dict()


@pytest.fixture(scope="module")
def clip():
    """An open_clip CLIP with heads of 64, as ViT-H-14's."""
    return drawn(open_clip.CLIP(8, dict(image_size=8, patch_size=4, width=16, layers=1, head_width=8),
                                dict(context_length=9, vocab_size=40, width=128, heads=2, layers=3)))


@pytest.fixture(scope="module")
def text_model():
    config = CLIPTextConfig(vocab_size=40, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
                            max_position_embeddings=9, hidden_act="gelu", bos_token_id=1, eos_token_id=33)
    return drawn(CLIPTextModel(config)).eval()


def assert_holds(module, tensors, dtype=torch.float32):
    """The module is made of these tensors, and of nothing else; it is frozen, and has memory of its own."""
    own = module.state_dict()
    assert own.keys() == tensors.keys()
    for name, t in own.items():
        assert t.dtype == dtype and torch.equal(t, tensors[name].to(dtype)), name
    assert not module.training and not any(p.requires_grad for p in module.parameters())


def saved(path, content, **settings):
    torch.save(content, path, **settings)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# UNet

@pytest.mark.parametrize("settings", [
    {}, {"safe_serialization": False}, {"variant": "fp16"},
    {"max_shard_size": "40KB"}, {"max_shard_size": "40KB", "safe_serialization": False}])
def test_unet_folder_as_diffusers_saves_it(tmp_path, unet, settings):
    theirs = UNet3DConditionModel.from_config(names.unet_to_diffusers(UNET))
    theirs.load_state_dict(unet)
    theirs.save_pretrained(tmp_path / "unet", **settings)
    files = sorted(p.name for p in (tmp_path / "unet").iterdir())
    assert (len(files) > 4) == ("max_shard_size" in settings) and "config.json" in files
    ours = load_unet(tmp_path / "unet")
    assert_holds(ours, unet)
    assert ours.config == UNET                                # from its config.json
    assert_holds(load_unet(tmp_path / "unet", config=UNetConfig()), unet)  # which a config given besides does not override


def test_unet_as_other_versions_of_diffusers_describe_it(tmp_path, unet):
    config = {"_class_name": "UNet3DConditionModel", "_diffusers_version": "0.15.0.dev0", "act_fn": "silu",
              "attention_head_dim": 4, "block_out_channels": [8, 16], "cross_attention_dim": 128,
              "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"], "downsample_padding": 1,
              "in_channels": 4, "layers_per_block": 1, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
              "norm_num_groups": 4, "out_channels": 4, "sample_size": 32, "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({k: v.half() for k, v in unet.items()}, tmp_path / "diffusion_pytorch_model.bin")
    assert_holds(load_unet(tmp_path), unet)


def training_state(tensors):
    """What the official trainer saves beside the model."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    return {"state_dict": tensors, "optimizer": optimizer.state_dict(), "scaler": {"scale": 65536.0, "_growth_tracker": 0},
            "step": 620000}


def with_lora(tensors):
    """The official fine-tuned files: base and adapters together."""
    lora = {}
    for name in [k for k in tensors if k.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))]:
        stem = name.replace("to_out.0.weight", "to_out_lora").replace(".weight", "_lora")
        lora |= {f"{stem}.down_linear.weight": torch.ones(4, 8), f"{stem}.up_linear.weight": torch.ones(8, 4)}
    assert len(lora) == 2 * sum("attn" in k and k.endswith("to_q.weight") for k in tensors) * 4
    return tensors | lora


def under_module(tensors):
    return {f"module.{k}": v for k, v in tensors.items()}


@pytest.mark.parametrize("wrap", [
    lambda x: x, OrderedDict, lambda x: {"state_dict": x}, training_state, under_module, with_lora,
    lambda x: training_state(under_module(with_lora(x)))],
    ids=["bare", "ordered", "state_dict", "training", "module", "lora", "all"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_official_unet_files(tmp_path, unet, official, wrap, zipped):
    path = saved(tmp_path / "model.pth", wrap(official), _use_new_zipfile_serialization=zipped)
    assert_holds(load_unet(path, UNET), unet)


def test_unet_as_one_safetensors_file_in_either_naming(tmp_path, unet, official):
    for name, tensors in (("ours", unet), ("official", official), ("tuned", with_lora(official))):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
        assert_holds(load_unet(tmp_path / f"{name}.safetensors", UNET), unet)


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_diffusers(vae):
    out = {}
    for name, t in vae.items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        out[name] = t
    assert sum("query" in k or "proj_attn" in k for k in out) == 8                                # encoder and decoder
    return out


@pytest.fixture
def lightning(monkeypatch):
    """A pytorch_lightning to pickle from, gone again when the file is read."""
    modules = {name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.callbacks", LIGHTNING)}
    callback = type("ModelCheckpoint", (), {"__module__": LIGHTNING})
    modules[LIGHTNING].ModelCheckpoint = callback

    def write(path, content, **settings):
        with monkeypatch.context() as m:
            for name, module in modules.items():
                m.setitem(sys.modules, name, module)
            torch.save(content(callback), path, **settings)
        assert "pytorch_lightning" not in sys.modules
        return path
    return write


def stable_diffusion(vae, callback):
    """A Stable Diffusion .ckpt: the whole model under state_dict, and what Lightning saves beside it."""
    parts = {f"first_stage_model.{k}": v for k, v in vae_to_official(vae, VAE).items()}
    parts |= {"model.diffusion_model.out.2.weight": torch.ones(3), "cond_stage_model.model.ln_final.weight": torch.ones(3),
              "betas": torch.ones(4), "model_ema.num_updates": torch.tensor(4)}
    state = callback()
    state.best = 0.1
    return {"state_dict": parts, "epoch": 3, "global_step": 470000, "pytorch-lightning_version": "1.4.2", "lr_schedulers": [],
            "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}}],
            "callbacks": {callback: {"monitor": "val/loss", "best_model_score": np.float32(0.25), "best": np.float64(1.5)},
                          "a": state}}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_autoencoder_of_a_stable_diffusion_ckpt(tmp_path, vae, lightning, zipped):
    path = lightning(tmp_path / "v2-1_512-ema-pruned.ckpt", lambda callback: stable_diffusion(vae, callback),
                     _use_new_zipfile_serialization=zipped)
    with zipfile.ZipFile(path) if zipped else open(path, "rb") as f:
        content = f.read(next(n for n in f.namelist() if n.endswith("data.pkl"))) if zipped else f.read()
    assert b"ModelCheckpoint" in content and b"multiarray" in content                             # the file does mention them
    assert_holds(load_vae(path, VAE), vae)
    assert "pytorch_lightning" not in sys.modules                                                 # and nothing looked for them


@pytest.mark.parametrize(("name", "wrap"), [
    ("vae.pth", lambda x: x),
    ("VQGAN_autoencoder.pth", lambda x: {"state_dict": x | {"loss.logvar": torch.ones(()), "loss.main.0.bias": torch.ones(2)}}),
    ("vae.ckpt", lambda x: {"state_dict": {f"first_stage_model.{k}": v for k, v in x.items()}}),
    ("vae.safetensors", None)])
def test_autoencoder_under_ldm_names(tmp_path, vae, name, wrap):
    tensors = vae_to_official(vae, VAE)
    if wrap:
        torch.save(wrap(tensors), tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    assert_holds(load_vae(tmp_path / name, VAE), vae)


@pytest.mark.parametrize("settings", [{}, {"safe_serialization": False}, {"max_shard_size": "40KB"}])
def test_autoencoder_folder_as_diffusers_saves_it(tmp_path, vae, settings):
    theirs = AutoencoderKL.from_config(names.vae_to_diffusers(VAEConfig((8, 16), 1, scale=0.25, norm_groups=4)))
    theirs.load_state_dict(vae)
    theirs.save_pretrained(tmp_path / "vae", **settings)
    ours = load_vae(tmp_path / "vae")
    assert_holds(ours, vae)
    assert ours.config == VAEConfig((8, 16), 1, scale=0.25, norm_groups=4)


def test_autoencoder_with_old_attention_names(tmp_path, vae):
    config = names.vae_to_diffusers(VAE)
    del config["scaling_factor"]                              # as old as those names
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(old_diffusers(vae), tmp_path / "diffusion_pytorch_model.bin")
    ours = load_vae(tmp_path)
    assert_holds(ours, vae)
    assert ours.config.scale == 0.18215


# ---------------------------------------------------------------------------------------------------------------------
# Text tower

def letters(captions):
    return torch.tensor([[1, *(2 + ord(c) % 30 for c in caption[:7]), 33, *[0] * 7][:9] for caption in captions])


CAPTIONS = ["a bear", "two"]


@pytest.mark.parametrize("place", ["open_clip_pytorch_model.bin", "model.safetensors", "folder"])
def test_text_tower_of_open_clip(tmp_path, clip, place):
    path = tmp_path / ("open_clip_pytorch_model.bin" if place == "folder" else place)
    if path.suffix == ".bin":
        torch.save(clip.state_dict(), path)
    else:
        save_file(clip.state_dict(), path)
    text = load_text_encoder(tmp_path if place == "folder" else path, tokenizer=letters)
    parts = ("token_embedding", "positional_embedding", "transformer", "ln_final")
    assert_holds(text, {k: v for k, v in clip.state_dict().items() if k.startswith(parts) and "resblocks.2." not in k})
    assert (text.config.layers, text.config.heads, text.config.context_length) == (2, 2, 9)
    x = clip.token_embedding(letters(CAPTIONS)) + clip.positional_embedding
    for block in clip.transformer.resblocks[:-1]:
        x = block(x, attn_mask=clip.attn_mask)
    torch.testing.assert_close(text(CAPTIONS), clip.ln_final(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["saved", "bin", "prefix", "position_ids", "fp16"])
def test_text_tower_of_transformers(tmp_path, text_model, form):
    text_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {k.removeprefix("text_model."): v for k, v in tensors.items()}
    if form != "saved":
        os.remove(tmp_path / "model.safetensors")
        tensors = {"bin": bare, "prefix": {f"text_model.{k}": v for k, v in bare.items()},
                   "position_ids": {"text_model.embeddings.position_ids": torch.arange(9)[None]} | {
                       f"text_model.{k}": v for k, v in bare.items()},
                   "fp16": {k: v.half() for k, v in bare.items()}}[form]
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    text = load_text_encoder(tmp_path, tokenizer=letters)
    assert text.config.layers == 2
    with torch.no_grad():
        expected = text_model(letters(CAPTIONS)).last_hidden_state
        torch.testing.assert_close(text(CAPTIONS), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# ---------------------------------------------------------------------------------------------------------------------
# Precision, memory

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_files_load_as_float32_or_as_asked(tmp_path, unet, official, vae, clip, dtype):
    path = saved(tmp_path / "unet.pth", {k: v.half() for k, v in official.items()})
    assert_holds(load_unet(path, UNET), unet)
    assert_holds(load_unet(path, UNET, dtype=dtype), unet, dtype)
    path = saved(tmp_path / "vae.pth", {k: v.to(torch.bfloat16) for k, v in vae_to_official(vae, VAE).items()})
    assert_holds(load_vae(path, VAE, dtype=dtype), {k: v.to(torch.bfloat16) for k, v in vae.items()}, dtype)
    text = load_text_encoder(saved(tmp_path / "clip.bin", clip.state_dict()), letters, dtype)
    assert {p.dtype for p in text.parameters()} == {dtype}
    if dtype == torch.bfloat16:
        assert text(CAPTIONS).dtype == dtype


@pytest.mark.parametrize("name", ["unet.safetensors", "unet.pth"])
def test_a_loaded_model_does_not_follow_its_file(tmp_path, unet, name):
    path = tmp_path / name
    save_file(unet, path) if path.suffix == ".safetensors" else torch.save(unet, path)
    ours = load_unet(path, UNET)
    with open(path, "r+b") as f:
        f.write(b"\xff" * path.stat().st_size)
    assert_holds(ours, unet)


MEASURE = """
import os, sys, threading, time
import torch
torch.set_num_threads(1)
import model

def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))

def load(path):
    peak, done, before = [0], threading.Event(), anonymous()
    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    unet = model.load_unet(path, model.UNetConfig(channels=(128, 384), blocks_per_level=1, attention_levels=(True, True)),
                           dtype=torch.bfloat16)
    size = sum(p.numel() * p.element_size() for p in unet.parameters())
    peak[0] = max(peak[0], anonymous())
    done.set()
    thread.join()
    print(path, size, (peak[0] - before) / size, flush=True)

for path in sys.argv[1:]:
    if os.fork() == 0:  # each in a process that has loaded nothing yet
        load(path)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_loading_needs_no_second_copy(tmp_path):
    config = UNetConfig(channels=(128, 384), blocks_per_level=1, attention_levels=(True, True))
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in UNet3D(config).state_dict().items()}
    tensors = {k: torch.full(shape, 0.5, dtype=torch.float16) for k, shape in shapes.items()}
    save_file(tensors, tmp_path / "unet.safetensors")
    torch.save(training_state(names.unet_to_official(tensors, config)), tmp_path / "unet.pth")
    del tensors
    root = Path(model.__file__).parent
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "unet.safetensors"), str(tmp_path / "unet.pth")],
                          capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"})
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2, done.stderr
    for _, size, ratio in lines:
        assert int(size) > 80e6 and 0.9 < float(ratio) < 1.3, lines


# ---------------------------------------------------------------------------------------------------------------------
# A whole base: its parts found by the names that the published folders give them

@pytest.fixture
def pipeline(tmp_path, unet, vae, text_model):
    """A diffusers pipeline's folder, less the scheduler and tokenizer that are not needed."""
    for cls, tensors, config in ((UNet3DConditionModel, unet, names.unet_to_diffusers(UNET)),
                                 (AutoencoderKL, vae, names.vae_to_diffusers(VAE))):
        theirs = cls.from_config(config)
        theirs.load_state_dict(tensors)
        theirs.save_pretrained(tmp_path / "base" / ("unet" if cls is UNet3DConditionModel else "vae"))
    text_model.save_pretrained(tmp_path / "base/text_encoder")
    (tmp_path / "base/model_index.json").write_text("{}")
    return tmp_path / "base"


@pytest.mark.parametrize("given", [".", "unet"])
def test_base_of_diffusers(pipeline, unet, vae, text_model, given):
    base = model.load_base(str(pipeline / given))
    assert_holds(base.unet, unet)
    assert_holds(base.vae, vae)
    assert base.text_encoder.ln_final.weight.tolist() == next(
        p for name, p in text_model.named_parameters() if name.endswith("final_layer_norm.weight")).tolist()


@pytest.mark.parametrize("called", [  # the two ModelScope hub folders
    ("text2video_pytorch_model.pth", "VQGAN_autoencoder.pth", "open_clip_pytorch_model.bin"),
    ("model_scope_v1-4_0600000.pth", "v2-1_512-ema-pruned.ckpt", "open_clip_pytorch_model.bin")])
@pytest.mark.parametrize("given", ["folder", "file", "other file"])
def test_base_of_modelscope(tmp_path, monkeypatch, official, unet, vae, clip, called, given):
    monkeypatch.setattr(model, "UNetConfig", lambda: UNET)  # such files bring no config: they are full size
    monkeypatch.setattr(model, "VAEConfig", lambda: VAE)
    torch.save(official, tmp_path / called[0])
    in_ckpt = {f"first_stage_model.{k}": v for k, v in vae_to_official(vae, VAE).items()}
    torch.save({"state_dict": in_ckpt}, tmp_path / called[1])
    torch.save(clip.state_dict(), tmp_path / called[2])
    path = {"folder": tmp_path, "file": tmp_path / called[0], "other file": tmp_path / "tuned/my_non_ema_0620000.pth"}[given]
    if given == "other file":  # a fine-tuned UNet in a folder of its own, as in instructvideo-finetuned/
        path.parent.mkdir()
        torch.save(training_state(with_lora(official)), path)
    base = model.load_base(str(path), dtype=torch.bfloat16)
    assert_holds(base.unet, unet, torch.bfloat16)
    assert base.vae.encoder.conv_in.weight.dtype == base.vae.quant_conv.weight.dtype == torch.float32  # runs once, is kept
    assert base.vae.decoder.conv_in.weight.dtype == base.vae.post_quant_conv.weight.dtype == torch.bfloat16
    assert_holds(base.vae.to(torch.bfloat16), vae, torch.bfloat16)
    assert base.text_encoder.config.layers == 2 and base.unet_file == (tmp_path / called[0] if given == "folder" else path)


def test_parts_may_come_from_elsewhere(pipeline, tmp_path, vae, clip):
    other = {k: v + 1 for k, v in vae.items()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text((pipeline / "vae/config.json").read_text())
    save_file(other, tmp_path / "other/diffusion_pytorch_model.safetensors")
    torch.save(clip.state_dict(), tmp_path / "clip.bin")
    base = model.load_base(str(pipeline), vae=tmp_path / "other", text_encoder=tmp_path / "clip.bin")
    assert_holds(base.vae, other)
    assert base.text_encoder.token_embedding.weight.equal(clip.token_embedding.weight)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_that_is_missing_is_named(pipeline, part):
    (pipeline / part).rename(pipeline / "elsewhere")
    with pytest.raises(ValueError, match=f"no {part} found in .*; expected one of {part}, ") as error:
        model.load_base(str(pipeline))
    assert error.value.args[0].isprintable() and ("--" + part.replace("_", "-") in error.value.args[0]) == (part != "unet")


def test_a_word_list_beside_the_text_tower_is_its_tokenizer(pipeline):
    (pipeline / "text_encoder/words.txt").write_text("9\na\nbear\n")
    assert model.load_base(str(pipeline)).text_encoder.tokenizer(["a bear"]).tolist() == [[1, 3, 4, 5, 0, 0, 0, 0, 0]]
    for bad in ("", "a bear", "9"):
        (pipeline / "text_encoder/words.txt").write_text(bad)
        with pytest.raises(ValueError, match="words.txt: expected a context length, then words"):
            model.load_base(str(pipeline))


def test_a_manifest_is_checked(pipeline):
    def write(**digests):
        (pipeline / "manifest.json").write_text(json.dumps(digests))
    file = "unet/diffusion_pytorch_model.safetensors"
    good = hashlib.sha256((pipeline / file).read_bytes()).hexdigest()
    write(**{file: good})
    model.load_base(str(pipeline))
    for digests, what in (({file: "0" * 64}, "its SHA-256 differs"), ({"absent.pt": good}, "absent.pt: missing, or not"),
                          ({file: None}, "its SHA-256 differs")):
        write(**digests)
        with pytest.raises(ValueError, match=what):
            model.load_base(str(pipeline))


def test_random_base_is_seeded():
    state = torch.random.get_rng_state()
    one, same, other = (model.load_base("random:32", seed=seed) for seed in (1, 1, 2))
    assert one.unet.config.channels == (32, 64, 128, 128) and one.unet.config.context_dim == one.text_encoder.config.width
    first, again, another = (published.fingerprint(base.unet.state_dict()) for base in (one, same, other))
    assert first == again != another
    assert torch.equal(torch.random.get_rng_state(), state)
    for width in (64, 96):
        unet, autoencoder, text = names.random_sizes(f"random:{width}")
        assert UNet3D(UNetConfig(**unet)).config.channels == (width, 2 * width, 4 * width, 4 * width)
        assert Autoencoder(VAEConfig(**autoencoder)) and unet["context_dim"] == text["width"]


@pytest.mark.parametrize("spec", ["random:0", "random:33", "random:-32", "random:big", "random:99999999968"])
def test_random_bases_that_cannot_be_built(spec):
    with pytest.raises(ValueError, match="must be random, or random:W|expected whole numbers"):
        model.load_base(spec)


def test_a_base_that_predicts_something_else_than_noise_is_refused(pipeline):
    file = pipeline / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    file.write_text('{"prediction_type": "epsilon", "num_train_timesteps": 1000}')
    model.load_base(str(pipeline))
    file.write_text('{"prediction_type": "v_prediction"}')
    for base in (pipeline, pipeline / "unet"):
        with pytest.raises(ValueError, match="scheduler_config.json: prediction_type is 'v_prediction': must be 'epsilon'"):
            model.load_base(str(base))


def test_random_weights_leave_the_generators_of_other_devices_alone(monkeypatch):
    """torch.manual_seed seeds them all, and fork_rng keeps the CPU's alone or, with many GPUs, warns."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every device was seeded"))
    before = torch.get_rng_state()
    one, two = (model.load_base("random:32", seed=7).unet.conv_in.weight for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)


def test_what_runs_once_stays_in_float32():
    """Moments and text features are made once and kept, so their precision may cost time; what runs in each step has --dtype."""
    for spec in ("tiny", "random:32"):
        base, exact = (model.load_base(spec, dtype=dtype) for dtype in (torch.bfloat16, None))
        for module in (base.unet, base.vae.decoder, base.vae.post_quant_conv):
            assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        for module in (base.vae.encoder, base.vae.quant_conv, base.text_encoder):
            assert {p.dtype for p in module.parameters()} == {torch.float32}
        frames = torch.rand(2, 3, 32, 32) * 2 - 1
        assert torch.equal(base.vae.encode(frames), exact.vae.encode(frames))
    assert torch.equal(base.encode_text(["a red circle"]), exact.encode_text(["a red circle"]))


# ---------------------------------------------------------------------------------------------------------------------
# Bad files. Each case writes one and says what to load; the message names the file and the words listed.

class Calls:
    """Pickles as a call: what a hostile file does to run code on loading."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Write:
    """Writes bad files into a folder; one method per kind of damage."""

    def __init__(self, folder, unet, official, vae, clip, text_model):
        self.folder, self.unet, self.official = folder, unet, official
        self.vae, self.clip, self.text_model = vae, clip, text_model

    def bytes(self, name, content):
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def torch(self, name, content, **settings):
        return saved(self.folder / name, content, **settings)

    def safetensors(self, name, tensors):
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.folder / name)
        return self.folder / name

    def cut(self, name, keep, **settings):
        """The beginning of a good file."""
        whole = self.safetensors(name, self.unet) if name.endswith("safetensors") else self.torch(name, self.unet, **settings)
        return self.bytes(name, whole.read_bytes()[:int(keep * whole.stat().st_size)])

    def renamed(self, name):
        """A good file of the other kind under this name."""
        as_torch = name.endswith("safetensors")
        other = self.torch("good.pth", self.unet) if as_torch else self.safetensors("good.safetensors", self.unet)
        return other.rename(self.folder / name)

    def compressed(self, name):
        """A torch file unzipped and zipped again."""
        whole = self.torch("good.pth", self.unet)
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(self.folder / name, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
        return self.folder / name

    def component(self, config=None, **changes):
        """A component folder: diffusers' config with changes."""
        config = names.unet_to_diffusers(UNET) if config is None else config
        content = config if isinstance(config, str) else json.dumps(config | changes)
        (self.folder / "config.json").write_text(content)
        self.safetensors("diffusion_pytorch_model.safetensors", self.unet)
        return self.folder

    def index(self, weight_map):
        """A sharded folder, its index as given."""
        self.safetensors("shard.safetensors", self.unet)
        path = self.folder / "diffusion_pytorch_model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
        return self.folder

    def text_folder(self, **changes):
        """transformers' text_encoder with another config."""
        self.text_model.save_pretrained(self.folder)
        config = json.loads((self.folder / "config.json").read_text())
        (self.folder / "config.json").write_text(json.dumps(config | changes))
        return self.folder

    def text(self, without=(), **extra):
        """transformers' tensors, less some, plus some."""
        tensors = {k.removeprefix("text_model."): v for k, v in self.text_model.state_dict().items()}
        return self.torch("text.bin", {k: v for k, v in tensors.items() if k not in without} | extra)


def less(tensors, *names):
    return {k: v for k, v in tensors.items() if k not in names}


def unet_file(path):
    return load_unet(path, UNET)


def vae_file(path):
    return load_vae(path, VAE)


ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
ST, PT, TOWER = "expected a .safetensors file", "expected a torch file of tensors", "expected the text tower of open_clip or"
BAD = {
    # nothing there
    "missing": (unet_file, lambda w: w.folder / "absent.pth", "absent.pth: no such file"),
    "empty folder": (unet_file, lambda w: w.folder, "no weights here; expected one of diffusion_pytorch_model.safetensors"),
    # damaged
    "empty": (unet_file, lambda w: w.bytes("unet.pth", b""), PT),
    "half a safetensors": (unet_file, lambda w: w.cut("unet.safetensors", 0.5), ST),
    "half a torch zip": (unet_file, lambda w: w.cut("unet.pth", 0.5), PT),
    "git-lfs pointer": (unet_file, lambda w: w.bytes("u.safetensors", b"version https://git-lfs.github.com/spec/v1\nsize 3\n"),
                        ST),
    "torch named safetensors": (unet_file, lambda w: w.renamed("unet.safetensors"), ST),
    "safetensors named torch": (unet_file, lambda w: w.renamed("unet.pth"), PT),
    "compressed zip": (unet_file, lambda w: w.compressed("unet.pth"), PT),
    # not a state dict
    "no tensors": (unet_file, lambda w: w.torch("unet.pth", {"state_dict": {}, "step": 3}),
                   "holds no tensors; expected a state dict"),
    "a list": (unet_file, lambda w: w.torch("unet.pth", list(w.unet.values())), "expected a state dict, found list"),
    "a whole module": (unet_file, lambda w: w.torch("unet.pth", torch.nn.Linear(2, 2)), "found torch.nn.modules.linear.Linear"),
    # another structure
    "missing tensor": (unet_file, lambda w: w.safetensors("u.safetensors", less(w.unet, ATTN)), f"1 tensors missing ({ATTN})"),
    "unused tensor": (unet_file, lambda w: w.safetensors("u.safetensors", w.unet | {"extra.weight": torch.ones(2)}),
                      "1 tensors not known (extra.weight)"),
    "missing and unused": (vae_file, lambda w: w.torch("v.pth", {"x": torch.ones(1)} | less(w.vae, "quant_conv.bias")),
                           "1 tensors missing (quant_conv.bias); 1 tensors not known (x)"),
    "both namings at once": (unet_file, lambda w: w.torch("u.pth", w.official | {"conv_in.bias": w.unet["conv_in.bias"]}),
                             "1 tensors not known (conv_in.bias (a second one))"),
    "both attention namings": (vae_file,
        lambda w: w.torch("v.pth", old_diffusers(w.vae) | {k: v for k, v in w.vae.items() if "to_q.bias" in k}),
        "2 tensors not known (", "to_q.bias (a second one)"),
    "some under module.": (unet_file, lambda w: w.torch("u.pth", less(w.unet, ATTN) | {f"module.{ATTN}": w.unet[ATTN]}),
                           f"1 tensors not known (module.{ATTN})"),
    "a name of two lines": (unet_file, lambda w: w.torch("u.pth", w.unet | {"a\nb\x1b[31m": torch.ones(1)}), r"a\nb\x1b[31m"),
    "wrong shape": (unet_file, lambda w: w.safetensors("u.safetensors", w.unet | {ATTN: torch.ones(8, 13)}),
                    f"tensor {ATTN} has shape [8, 13], expected [8, 128]"),
    "whole numbers": (unet_file, lambda w: w.safetensors("u.safetensors", w.unet | {ATTN: torch.ones(8, 128, dtype=torch.int8)}),
                      f"tensor {ATTN} is torch.int8", "expected floating-point numbers"),
    "tensors without data": (unet_file, lambda w: w.torch("u.pth", w.unet | {ATTN: torch.ones(8, 128).to("meta")}), "on meta"),
    "sparse": (unet_file, lambda w: w.torch("u.pth", w.unet | {ATTN: torch.ones(8, 128).to_sparse()}), "torch.sparse_coo"),
    "UNet as autoencoder": (vae_file, lambda w: w.torch("unet.pth", w.official), "missing (decoder.", "not known (input_blocks."),
    "UNet as text": (load_text_encoder, lambda w: w.torch("unet.pth", w.official), TOWER),
    # text towers
    "text without a table": (load_text_encoder, lambda w: w.text(without=["embeddings.token_embedding.weight"]), TOWER),
    "text less a layer": (load_text_encoder,
        lambda w: w.torch("clip.bin", {k: v for k, v in w.clip.state_dict().items() if "resblocks.1." not in k}),
        "not known (transformer.resblocks.2."),
    "text less q": (load_text_encoder, lambda w: w.text(without=["encoder.layers.1.self_attn.q_proj.weight"]),
                    "1 tensors missing (transformer.resblocks.1.attn.in_proj_weight)"),
    "text less k": (load_text_encoder, lambda w: w.text(without=["encoder.layers.1.self_attn.k_proj.weight"]),
                    "not the tensors of transformers' CLIPTextModel (KeyError: 'encoder.layers.1.self_attn.k_proj.weight'"),
    "q a number": (load_text_encoder,
        lambda w: w.text(**{f"encoder.layers.1.self_attn.{p}_proj.bias": torch.ones(()) for p in "qkv"}),
        "not the tensors of transformers' CLIPTextModel (RuntimeError: "),
    "with a projection": (load_text_encoder, lambda w: w.text(**{"text_projection.weight": torch.ones(8, 1288)}),
                          "text_projection.weight"),
    "unused in a CLIP": (load_text_encoder, lambda w: w.torch("clip.bin", w.clip.state_dict() | {"extra": torch.ones(2)}),
                         "1 tensors not known (extra)"),
    "another activation": (load_text_encoder, lambda w: w.text_folder(hidden_act="quick_gelu"),
                           "expected hidden_act 'gelu', found 'quick_gelu'"),
    "other heads": (load_text_encoder, lambda w: w.text_folder(num_attention_heads=8), "expected num_attention_heads 2, found 8"),
    # configs
    "config is no JSON": (load_unet, lambda w: w.component("{'in_channels': 4}"), "config.json: expected JSON"),
    "config is a list": (load_unet, lambda w: w.component("[1]"), "config.json: expected a JSON object, found list"),
    "config of nothing": (load_unet, lambda w: w.component("{}"), "config.json", "KeyError: 'in_channels'"),
    "config of another class": (load_unet, lambda w: w.component(_class_name="UNet2DConditionModel"), "UNet3DConditionModel"),
    "config of an autoencoder": (load_unet, lambda w: w.component(names.vae_to_diffusers(VAE)), "found 'AutoencoderKL'"),
    "config of a UNet": (load_vae, lambda w: w.component(), "expected _class_name 'AutoencoderKL', found 'UNet3DConditionModel'"),
    "channels are text": (load_unet, lambda w: w.component(block_out_channels="abc"), "expected block_out_channels"),
    "channels are negative": (load_unet, lambda w: w.component(block_out_channels=[8, -16]), "expected whole numbers"),
    "channels are fractions": (load_unet, lambda w: w.component(block_out_channels=[8.0, 16.0]), "expected whole numbers"),
    "channels are a number": (load_unet, lambda w: w.component(block_out_channels=8), "config.json", "TypeError"),
    "no channels": (load_unet, lambda w: w.component(block_out_channels=[]), "not a model that can be built"),
    "a billion blocks": (load_unet, lambda w: w.component(layers_per_block=10**9), "expected whole numbers from 1 to 64"),
    "heads do not divide": (load_unet, lambda w: w.component(attention_head_dim=7), "expected [56, 8]"),
    "block types are numbers": (load_unet, lambda w: w.component(down_block_types=[1, 2]), "AttributeError"),
    "other activation": (load_unet, lambda w: w.component(act_fn="gelu"), "expected act_fn 'silu', found 'gelu'"),
    "scale is infinite": (load_vae, lambda w: w.component(names.vae_to_diffusers(VAE), scaling_factor=float("inf")),
                          "a scaling_factor above 0"),
    "autoencoder of other channels": (load_vae, lambda w: w.component(names.vae_to_diffusers(VAE), in_channels=1),
                                      "expected in_channels 3"),
    # shards
    "shard elsewhere": (unet_file, lambda w: [(w.folder / "sub").mkdir(), w.safetensors("sub/x.safetensors", w.unet),
                                              w.index({"a": "sub/x.safetensors"})][2], INDEX, "found 'sub/x.safetensors'"),
    "shard is missing": (unet_file, lambda w: w.index({"a": "shard.safetensors", "b": "shard-2.safetensors"}),
                         INDEX, "found 'shard-2.safetensors'"),
    "shard of another kind": (unet_file, lambda w: [w.torch("evil.bin", w.unet), w.index({"a": "evil.bin"})][1],
                              INDEX, "evil.bin"),
    "index is empty": (unet_file, lambda w: w.index({}), INDEX, "expected a weight_map"),
}


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_in_one_line(tmp_path, unet, official, vae, clip, text_model, case):
    load, write, *words = BAD[case]
    path = write(Write(tmp_path, unet, official, vae, clip, text_model))
    before = contents(tmp_path)
    with pytest.raises(ValueError) as error:
        load(path)
    message = str(error.value)
    assert message.isprintable() and len(message) < 1000, message
    assert message.startswith(str(path)) and all(word in message for word in words), message
    assert contents(tmp_path) == before


def hostile(folder):
    """Ways to run code from a pickle; each would leave a file behind, but `getattr`, which only fetches a function."""
    mark = str(folder / "created")
    return {"system": Calls(os.system, f"touch {mark}"), "open": Calls(builtins.open, mark, "w"),
            "eval": Calls(eval, f"open({mark!r}, 'w')"), "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
            "path": Calls(Path.touch, Path(mark))}


@pytest.mark.parametrize("kind", hostile(Path()))
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "key", "shard"])
def test_hostile_pickles_are_not_run(tmp_path, kind, form):
    calls, tensors = hostile(tmp_path)[kind], {"conv_in.weight": torch.ones(2)}
    path = tmp_path / "unet.pth"
    content = {"state_dict": tensors, "callbacks": {(calls,): 1}} if form == "key" else tensors | {"x": calls}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"x": calls}))
    elif form == "shard":
        path = tmp_path
        torch.save(content, tmp_path / "shard.bin")
        (tmp_path / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "shard.bin"}}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    for load in (unet_file, vae_file, load_text_encoder):
        with pytest.raises(ValueError, match="expected (tensors alone|a torch file)") as error:
            load(path)
        message = str(error.value)
        assert message.isprintable() and message.startswith(str(path)) and "weights_only" not in message
    assert not (tmp_path / "created").exists()
    if form == "pickle" and kind != "getattr":  # the test would notice: read without care, the file does leave its mark
        pickle.loads(path.read_bytes())
        assert (tmp_path / "created").exists()


def test_names_that_are_allowed_are_never_called(tmp_path, vae, lightning):
    # The stand-ins take the place of a class by its name, whatever it is called with.
    mark = tmp_path / "created"

    def content(callback):
        callback.__reduce__ = lambda self: (callback, (f"open({str(mark)!r}, 'w')",), {"state": 1})
        return {"state_dict": vae, "callbacks": [callback()]}
    assert_holds(load_vae(lightning(tmp_path / "vae.ckpt", content), VAE), vae)
    assert not mark.exists()


def test_a_few_names_stand_for_many():
    assert files.first_names({"b", "a"}) == "a, b"
    assert files.first_names("abcde") == "a, b, c and 2 more"
    assert len(files.first_names(["x" * 10**6])) == 100


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/config.json"
    with files.write_whole(path) as hidden:
        hidden.write_text("first")
        assert not path.exists() and hidden.parent == path.parent and hidden.name.startswith(".") and hidden.suffix == ".json"
    with pytest.raises(KeyboardInterrupt), files.write_whole(path) as hidden:
        hidden.write_text("half of the sec")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {path: b"first"}             # nothing hidden is left
    with files.write_whole(path) as hidden:
        hidden.write_text("second")
    assert contents(tmp_path) == {path: b"second"}


def test_a_folder_is_written_whole_and_replaces_none(tmp_path):
    def write():
        with files.write_whole(tmp_path / "unet") as hidden:
            hidden.mkdir()
            (hidden / "config.json").write_text("{}")
    write()
    with pytest.raises(OSError):
        write()
    assert contents(tmp_path) == {tmp_path / "unet/config.json": b"{}"} and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------- Who may read a file -------------------------------------------------

def test_files_may_be_read_by_whom_the_umask_allows(tmp_path, monkeypatch):
    """safetensors makes files that are private to the user, as temporary ones are."""
    monkeypatch.setattr(files, "UMASK", 0o027)
    with files.write_whole(tmp_path / "adapter.safetensors") as hidden:
        save_file({"a": torch.zeros(1)}, hidden)
    files.write_text(tmp_path / "a.json", "{}")
    files.write_folder(tmp_path / "unet", "config.json", {}, "model.safetensors", {"a": torch.zeros(1)})
    for name in ("adapter.safetensors", "a.json", "unet/config.json", "unet/model.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640, name


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(b"")

    def locked(path):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(published, "load_file", locked)
    with pytest.raises(ValueError, match=r"a\.safetensors: .* \(PermissionError: .*Permission denied"):
        published.read_tensors(tmp_path / "a.safetensors")
