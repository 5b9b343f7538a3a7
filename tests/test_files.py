"""Readers of files as other programs write them, and of damaged or hostile ones, which end in one line that names the file."""
import json
import os
import re
import sys
import types
import zipfile
from collections import OrderedDict
from functools import partial
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import reward
from formats import reward_model, tensor_names as names, word_tokenizer as words
from model import Autoencoder, UNet3D, UNetConfig, VAEConfig, load_text_encoder, load_unet, load_vae
from support import files, run as run_folder
from tests.conftest import contents, letters, refused as refused_in_a_line, vae_to_official, write_file

UNET = UNetConfig(channels=(8, 16), blocks_per_level=1, attention_levels=(True, False), context_dim=128, head_dim=4,
                  norm_groups=4)
VAE = VAEConfig(channels=(8, 16), blocks_per_level=1, norm_groups=4)
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle", "ignore:`torch.jit.script`")  # torch's own, on the bad files


def drawn(module, seed=0):
    """A module with every weight drawn anew, exact in fp16."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g).half().float()
    return module


with torch.random.fork_rng():  # good tensors, drawn once: a UNet's and an autoencoder's under our names, a CLIP with heads of 64
    unet = drawn(UNet3D(UNET)).state_dict()
    official = names.unet_to_official(unet, UNET)             # under ModelScope's names
    vae = drawn(Autoencoder(VAE)).state_dict()
    clip = drawn(open_clip.CLIP(8, dict(image_size=8, patch_size=4, width=16, layers=1, head_width=8),
                                dict(context_length=9, vocab_size=40, width=128, heads=2, layers=3)))
    text_model = drawn(CLIPTextModel(CLIPTextConfig(
        vocab_size=40, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=9, hidden_act="gelu", bos_token_id=1, eos_token_id=33))).eval()
    text = {k.removeprefix("text_model."): v for k, v in text_model.state_dict().items()}


def assert_holds(module, tensors, dtype=torch.float32):
    """The module is made of these tensors, and of nothing else; it is frozen, and has memory of its own."""
    held = module.state_dict()
    assert held.keys() == tensors.keys()
    for name, t in held.items():
        assert t.dtype == dtype and torch.equal(t, tensors[name].to(dtype)), name
    assert not module.training and not any(p.requires_grad for p in module.parameters())


# -------------------------------------------------------- UNet --------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {}, {"safe_serialization": False}, {"variant": "fp16"}, {"max_shard_size": "40KB"},
    {"max_shard_size": "40KB", "safe_serialization": False}, {"max_shard_size": "40KB", "variant": "bf16"},
    {"max_shard_size": "40KB", "variant": "non_ema", "safe_serialization": False}])
def test_unet_folder_as_diffusers_saves_it(tmp_path, settings):
    theirs = UNet3DConditionModel.from_config(names.unet_to_diffusers(UNET))
    theirs.load_state_dict(unet)
    theirs.save_pretrained(tmp_path / "unet", **settings)
    written = sorted(p.name for p in (tmp_path / "unet").iterdir())
    assert (len(written) > 4) == ("max_shard_size" in settings) and "config.json" in written
    ours = load_unet(tmp_path / "unet", config=UNetConfig())
    assert_holds(ours, unet)
    assert ours.config == UNET  # from its config.json, which a config given besides does not override

    if settings in ({}, {"variant": "fp16"}):  # of a whole file and shards, nothing tells which is out of date
        index = f"diffusion_pytorch_model.safetensors.index{'.fp16' if settings else ''}.json"
        (tmp_path / "unet" / index).write_text("{}")
        message = rf"holds .*\.safetensors and, for other files of these weights, {index}; remove the older"
        refused_in_a_line(message, load_unet, tmp_path / "unet")


def test_unet_as_other_versions_of_diffusers_describe_it(tmp_path):
    config = names.unet_to_diffusers(UNET) | {"_diffusers_version": "0.15.0.dev0"}
    write_file(tmp_path / "config.json", {k: v for k, v in config.items() if k != "stem_heads"})
    write_file(tmp_path / "diffusion_pytorch_model.bin", {k: v.half() for k, v in unet.items()})
    assert_holds(load_unet(tmp_path), unet)
    for tensors in (unet, official, with_lora(official)):  # and as one file, in either naming
        assert_holds(load_unet(write_file(tmp_path / "unet.safetensors", tensors), UNET), unet)


def training_state(tensors):
    """What the official trainer saves beside the model."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).state_dict()
    return {"state_dict": tensors, "optimizer": optimizer, "scaler": {"scale": 65536.0, "_growth_tracker": 0}, "step": 620000}


def with_lora(tensors):
    """The official fine-tuned files: base and adapters together."""
    lora = {}
    for name in [k for k in tensors if k.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))]:
        stem = name.replace("to_out.0.weight", "to_out_lora").replace(".weight", "_lora")
        lora |= {f"{stem}.down_linear.weight": torch.ones(4, 8), f"{stem}.up_linear.weight": torch.ones(8, 4)}
    return tensors | lora


def under_module(tensors):
    return {f"module.{k}": v for k, v in tensors.items()}


@pytest.mark.parametrize(("wrap", "zipped"), [
    (dict, True), (dict, False), (OrderedDict, True), (lambda x: {"state_dict": x}, True), (under_module, True),
    (lambda x: training_state(under_module(with_lora(x))), True), (lambda x: training_state(under_module(with_lora(x))), False)])
def test_official_unet_files(tmp_path, wrap, zipped):
    path = write_file(tmp_path / "model.pth", wrap(official), _use_new_zipfile_serialization=zipped)
    assert_holds(load_unet(path, UNET), unet)
    if zipped:  # and zipped again, which torch.save never does: such bytes must not be taken for weights where they lie
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "again.pth", "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.infolist():
                new.writestr(entry.filename, old.read(entry))
        assert_holds(load_unet(tmp_path / "again.pth", UNET), unet)


# ---------------------------------------------------- Autoencoder -----------------------------------------------------

def old_diffusers(tensors):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {re.sub(r"(attentions\.0\.)(to_[qkv]|to_out\.0)", lambda m: m[1] + old[m[2]], name): t for name, t in tensors.items()}


def lightning(path, content, **settings):
    """What a pytorch_lightning would pickle, which is gone again when the file is read."""
    modules = {name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.callbacks", LIGHTNING)}
    modules[LIGHTNING].ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": LIGHTNING})
    with mock.patch.dict(sys.modules, modules):
        torch.save(content(modules[LIGHTNING].ModelCheckpoint), path, **settings)
    return path


def stable_diffusion(callback):
    """A Stable Diffusion .ckpt: the whole model under state_dict, and what Lightning saves beside it."""
    parts = {f"first_stage_model.{k}": v for k, v in vae_to_official(vae, VAE).items()}
    others = {"model.diffusion_model.out.2.weight": torch.ones(3), "betas": torch.ones(4), "model_ema.decay": torch.tensor(4)}
    state = callback()
    state.best = 0.1
    return {"state_dict": parts | others, "global_step": 470000, "pytorch-lightning_version": "1.4.2", "lr_schedulers": [],
            "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}}],
            "callbacks": {callback: {"best_model_score": np.float32(0.25), "best": np.float64(1.5)}, "a": state}}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_autoencoder_of_a_stable_diffusion_ckpt(tmp_path, zipped):
    path = lightning(tmp_path / "v2-1_512-ema-pruned.ckpt", stable_diffusion, _use_new_zipfile_serialization=zipped)
    assert b"ModelCheckpoint" in path.read_bytes() and b"multiarray" in path.read_bytes()         # the file does mention them
    assert_holds(load_vae(path, VAE), vae)
    assert "pytorch_lightning" not in sys.modules                                                 # and nothing looked for them


def test_autoencoder_under_ldm_names(tmp_path):
    tensors = vae_to_official(vae, VAE)
    loss = {"loss.logvar": torch.ones(()), "loss.main.0.bias": torch.ones(2)}
    for name, content in (("vae.pth", tensors), ("VQGAN_autoencoder.pth", {"state_dict": tensors | loss}),
                          ("vae.ckpt", {"state_dict": {f"first_stage_model.{k}": v for k, v in tensors.items()}}),
                          ("vae.safetensors", tensors)):
        assert_holds(load_vae(write_file(tmp_path / name, content), VAE), vae)


def test_autoencoder_folder_as_diffusers_saves_it(tmp_path):
    theirs = AutoencoderKL.from_config(names.vae_to_diffusers(VAEConfig((8, 16), 1, scale=0.25, norm_groups=4)))
    theirs.load_state_dict(vae)
    theirs.save_pretrained(tmp_path / "vae", max_shard_size="40KB")
    ours = load_vae(tmp_path / "vae")
    assert_holds(ours, vae)
    assert ours.config == VAEConfig((8, 16), 1, scale=0.25, norm_groups=4)

    # As old versions wrote it.
    write_file(tmp_path / "old/config.json", {k: v for k, v in names.vae_to_diffusers(VAE).items() if k != "scaling_factor"})
    write_file(tmp_path / "old/diffusion_pytorch_model.bin", old_diffusers(vae))
    ours = load_vae(tmp_path / "old")
    assert_holds(ours, vae)
    assert ours.config.scale == 0.18215


# ----------------------------------------------------- Text tower -----------------------------------------------------

CAPTIONS = ["a bear", "two"]


@pytest.mark.parametrize("place", ["open_clip_pytorch_model.bin", "model.safetensors"])
def test_text_tower_of_open_clip(tmp_path, place):
    path = write_file(tmp_path / place, clip.state_dict())
    ours = load_text_encoder(path.parent if path.suffix == ".bin" else path, tokenizer=letters)
    parts = ("token_embedding", "positional_embedding", "transformer", "ln_final")
    assert_holds(ours, {k: v for k, v in clip.state_dict().items() if k.startswith(parts) and "resblocks.2." not in k})
    assert (ours.config.layers, ours.config.heads, ours.config.context_length) == (2, 2, 9)


@pytest.mark.parametrize("form", ["saved", "bare", "prefix", "position_ids", "fp16"])
def test_text_tower_of_transformers(tmp_path, form):
    text_model.save_pretrained(tmp_path)
    prefixed = {f"text_model.{k}": v for k, v in text.items()}
    old = {"bare": text, "prefix": prefixed, "fp16": {k: v.half() for k, v in text.items()},
           "position_ids": prefixed | {"text_model.embeddings.position_ids": torch.arange(9)[None]}}
    if form != "saved":
        os.remove(tmp_path / "model.safetensors")
        torch.save(old[form], tmp_path / "pytorch_model.bin")
    ours = load_text_encoder(tmp_path, tokenizer=letters)
    assert ours.config.layers == 2
    with torch.no_grad():
        expected = text_model(letters(CAPTIONS)).last_hidden_state
        torch.testing.assert_close(ours(CAPTIONS), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_load_as_float32_or_as_asked(tmp_path, dtype):
    path = write_file(tmp_path / "unet.pth", {k: v.half() for k, v in official.items()})
    assert_holds(load_unet(path, UNET), unet)
    assert_holds(load_unet(path, UNET, dtype=dtype), unet, dtype)
    path = write_file(tmp_path / "vae.pth", {k: v.to(torch.bfloat16) for k, v in vae_to_official(vae, VAE).items()})
    assert_holds(load_vae(path, VAE, dtype=dtype), {k: v.to(torch.bfloat16) for k, v in vae.items()}, dtype)
    ours = load_text_encoder(write_file(tmp_path / "clip.bin", clip.state_dict()), letters, dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype} == {ours(CAPTIONS).dtype}


def test_a_loaded_model_does_not_follow_its_file(tmp_path):
    for name in ("unet.safetensors", "unet.pth"):
        path = write_file(tmp_path / name, unet)
        ours = load_unet(path, UNET)
        with open(path, "r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
        assert_holds(ours, unet)


# ----------------------- Bad files: our names, bounds and messages, not what safetensors and torch check -----------------------

def unet_file(path):
    return load_unet(path, UNET)


def vae_file(path):
    return load_vae(path, VAE)


def less(tensors, *absent):
    return {k: v for k, v in tensors.items() if k not in absent}


ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
Q = "encoder.layers.1.self_attn.q_proj.weight"
STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
TOWER = "expected the text tower of open_clip or"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n"
CLIP = reward_model.SMALL_CLIP
BAD_FILES = [  # who reads it, its name, what it holds, words of the message
    (unet_file, "unet.pth", b"", "expected a torch file of tensors"),
    (unet_file, "u.safetensors", b"\x90\0\0\0\0\0\0\0{", "expected a .safetensors file that can be read"),
    (unet_file, "u.pth", LFS, "is a Git LFS pointer, not the file itself; `git lfs pull`"),
    (unet_file, "u.pth", {"state_dict": {}, "step": 3}, "holds no tensors; expected a state dict"),
    (unet_file, "u.pth", {"model": unet, "ema": unet, "step": torch.tensor(3)},
     "holds state dicts under ema, model; expected one"),
    (vae_file, "v.pth", {"x": torch.ones(1)} | less(vae, "quant_conv.bias"),
     "1 tensors missing (quant_conv.bias); 1 tensors not known (x)"),
    (unet_file, "u.pth", less(unet, ATTN) | {f"module.{ATTN}": unet[ATTN]}, f"(module.{ATTN})"),
    (unet_file, "u.pth", unet | {"a\nb\x1b[31m": torch.ones(1)}, r"a\nb\x1b[31m"),
    (unet_file, "u.safetensors", unet | {ATTN: torch.ones(8, 13)}, f"{ATTN} has shape [8, 13], expected [8, 128]"),
    (unet_file, "u.safetensors", unet | {ATTN: torch.ones(8, 128).to(torch.int8)}, f"{ATTN} is torch.int8"),
    (load_text_encoder, "t.pth", less(text, "embeddings.token_embedding.weight"), TOWER),
    (load_text_encoder, "t.pth", less(text, Q), "1 tensors missing (transformer.resblocks.1.attn.in_proj_weight)"),
    (load_text_encoder, "t.pth", less(text, Q.replace("q_proj", "k_proj")), "not the tensors of transformers' CLIPTextModel"),
    (load_text_encoder, "c.bin", {k: v for k, v in clip.state_dict().items() if "resblocks.1." not in k}, "not known (tran"),
]
BAD_FOLDERS = [  # changes of a UNet's folder {name: content, None: not there}, words; {} of "config.json" are changes, too
    ({f"{STEM}.safetensors": None}, "no weights here; expected a file like", "found config.json"),
    ({f"{STEM}.safetensors": None, "config.json": None, "models--a--b/snapshots/c/x": b""}, "no weights", "found models--a--b"),
    ({"config.json": "{}"}, "config.json", "KeyError: 'in_channels'"),
    ({"config.json": {"_class_name": "AutoencoderKL"}}, "expected _class_name 'UNet3DConditionModel', found 'AutoencoderKL'"),
    ({"config.json": {"block_out_channels": []}}, "not a model that can be built"),
    ({"config.json": {"attention_head_dim": 7}}, "expected [56, 8]"),
    ({"config.json": {"act_fn": "gelu"}}, "expected act_fn 'silu', found 'gelu'"),
    ({f"{STEM}.safetensors": None, INDEX: {"weight_map": {"a": "sub/x.safetensors"}}, "sub/x.safetensors": LFS}, INDEX, "'sub/x"),
    ({f"{STEM}.safetensors": None, INDEX: {"weight_map": {}}}, INDEX, "expected a weight_map"),
]


def refused(folder, read, path, *parts):
    """One line that begins with the path and has these words; nothing is written."""
    before = contents(folder)
    message = refused_in_a_line("", read, path)
    assert len(message) < 1000 and message.startswith(str(path)) and all(part in message for part in parts), message
    assert contents(folder) == before


@pytest.mark.parametrize(("read", "name", "content", "parts"), [(*case[:3], case[3:]) for case in BAD_FILES])
def test_bad_files_are_named_in_one_line(tmp_path, read, name, content, parts):
    refused(tmp_path, read, write_file(tmp_path / name, content), *parts)


@pytest.mark.parametrize(("changes", "parts"), [(case[0], case[1:]) for case in BAD_FOLDERS])
def test_bad_folders_are_named_in_one_line(tmp_path, changes, parts):
    config = names.unet_to_diffusers(UNET)
    if isinstance(changes.get("config.json"), dict):
        changes = changes | {"config.json": config | changes["config.json"]}
    for name, content in ({"config.json": config, f"{STEM}.safetensors": unet} | changes).items():
        if content is not None:
            write_file(tmp_path / name, content)
    refused(tmp_path, unet_file, tmp_path, *parts)


def test_bad_folders_of_the_other_parts(tmp_path):
    write_file(tmp_path / f"vae/{STEM}.safetensors", vae)
    text_model.save_pretrained(tmp_path / "text")
    configs = {"vae": names.vae_to_diffusers(VAE), "text": json.loads((tmp_path / "text/config.json").read_text())}
    for part, change, message in (("vae", {"in_channels": 1}, "expected in_channels 3"),
                                  ("text", {"hidden_act": "quick_gelu"}, "expected hidden_act 'gelu', found 'quick_gelu'"),
                                  ("text", {"num_attention_heads": 8}, "expected num_attention_heads 2, found 8")):
        write_file(tmp_path / part / "config.json", configs[part] | change)
        refused(tmp_path, load_vae if part == "vae" else load_text_encoder, tmp_path / part, message)
    read_words = partial(words.read_words, sizes=dict(vocab_size=9, context_length=7))
    for content, message in ((b"5\na\nb", "makes 5 tokens from 0 to 5, the weights beside it read 7 from 0 to 8"),
                             (b"", "expected a context length, then words"), (b"a bear", "expected a context length")):
        refused(tmp_path, read_words, write_file(tmp_path / "words.txt", content), message)
    refused(tmp_path, unet_file, tmp_path / "absent.pth", "absent.pth: no such file or folder")


@pytest.mark.parametrize(("change", "of", "message"), [
    ({"hf_model_name": "someone/code"}, "text_cfg", "expected the fields context_length"), ({"embed_dim": 16}, None, "has shape"),
    ({"heads": 5}, "text_cfg", "not a model that can be built")])
def test_malformed_reward_folders(tmp_path, monkeypatch, change, of, message):
    monkeypatch.setattr(open_clip.model, "HFTextEncoder", lambda *args, **kwargs: pytest.fail("a file named a model to fetch"))
    write_file(tmp_path / "config.json", CLIP | ({of: CLIP[of] | change} if of else change))
    write_file(tmp_path / "model.safetensors", {k: v.contiguous() for k, v in open_clip.CLIP(**CLIP).state_dict().items()})
    (tmp_path / "words.txt").write_text("77\na\ncat")
    refused(tmp_path, lambda path: reward.load_reward("hpsv2", str(path)), tmp_path, message)


class Calls:
    """Pickles as a call: what a hostile file does to run code on loading. It would leave a file behind."""
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_code_in_a_file_is_not_run(tmp_path):
    path = write_file(tmp_path / f"{STEM}.bin", {"conv_in.weight": torch.ones(2), "x": Calls(tmp_path / "created")})
    refused(tmp_path, unet_file, path, "expected tensors alone, found ", "was run")
    refused(tmp_path, lambda path: run_folder.read_checkpoint(path, {}), path, "cannot be read", "--resume starts again")


def test_names_that_are_allowed_are_never_called(tmp_path):
    # The stand-ins take the place of a class by its name, whatever it is called with.
    mark = tmp_path / "created"

    def content(callback):
        callback.__reduce__ = lambda self: (callback, (f"open({str(mark)!r}, 'w')",), {"state": 1})
        return {"state_dict": vae, "callbacks": [callback()]}
    assert_holds(load_vae(lightning(tmp_path / "vae.ckpt", content), VAE), vae)
    assert not mark.exists()


ADAPTER = torch.zeros(4, 8)
MOMENTS = {"step": torch.tensor(1.), "exp_avg": ADAPTER, "exp_avg_sq": ADAPTER}
STATE = {"version": run_folder.VERSION, "step": 1, "adapters": {"a": ADAPTER, "b": ADAPTER}, "optimizer": {"state": {0: MOMENTS}}}


@pytest.mark.parametrize("change", [
    [1], {"version": 2}, {"adapters": STATE["adapters"] | {7: 7}}, {"adapters": {"a": ADAPTER.T, "b": ADAPTER}},
    {"adapters": {"a": ADAPTER}}, {"optimizer": {}}], ids=str)
def test_a_checkpoint_is_data(tmp_path, change):
    def read(path):
        return run_folder.read_checkpoint(path, STATE["adapters"])
    assert read(write_file(tmp_path / "good.pt", STATE))["step"] == 1
    read(write_file(tmp_path / "skipped.pt", STATE | {"optimizer": {"state": {}}}))  # every step so far was skipped
    content = STATE | change if isinstance(change, dict) else change
    refused(tmp_path, read, write_file(tmp_path / "state.pt", content), "state.pt: ")


# ------------------------------------------------------ Writing -------------------------------------------------------

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/config.json"
    with files.write_whole(path) as hidden:
        hidden.write_text("first")
        assert not path.exists() and hidden.parent == path.parent and hidden.name.startswith(".") and hidden.suffix == ".json"
    with pytest.raises(KeyboardInterrupt), files.write_whole(path) as hidden:
        hidden.write_text("half of the sec")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {path: b"first"}             # nothing hidden is left
    files.write_text(path, "second")
    assert contents(tmp_path) == {path: b"second"}

    # A folder that holds something is never replaced.
    with pytest.raises(OSError):
        files.write_folder(path.parent, "config.json", {}, "model.safetensors", {"a": torch.zeros(1)})
    assert contents(tmp_path) == {path: b"second"}


def test_files_may_be_read_by_whom_the_umask_allows(tmp_path, monkeypatch):
    """safetensors makes files that are private to the user, as temporary ones are."""
    monkeypatch.setattr(files, "UMASK", 0o027)
    files.write_text(tmp_path / "a.json", "{}")
    files.write_folder(tmp_path / "unet", "config.json", {}, "model.safetensors", {"a": torch.zeros(1)})
    for name in ("a.json", "unet/config.json", "unet/model.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640, name
