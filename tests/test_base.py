"""
What a script loads before its first step: the base model from a folder, a file or the hub, the reward, the run to resume.

Published files are full size; here their structures are small. The hub is a server in this process that speaks the hub's protocol
to the real huggingface_hub.
"""
import http.server
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import av
import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import generate
import lora
import model
import reward
import train
from formats import adapters, names, reward_model as clip_configs, tensors as published, weights, words
from model import Autoencoder, Base, TextConfig, TextEncoder, UNet3D, UNetConfig, VAEConfig, decode_frames, load_base
from support import ranks as processes, run as run_folder, settings as run_settings
from tests.ldm import vae_to_official
from tiny import clips

ROOT = Path(__file__).resolve().parents[1]
UNET = UNetConfig(channels=(8, 16), blocks_per_level=1, attention_levels=(True, False), context_dim=64, head_dim=4, norm_groups=4,
                  sample_size=4)
VAE = VAEConfig(channels=(8, 16), blocks_per_level=1, norm_groups=4)
TEXT = TextConfig(width=64, heads=1, layers=2)
TUNED = "instructvideo-finetuned/ddim20_1102-18-52_non_ema_0620000.pth"
CLIP = clip_configs.SMALL_CLIP
TOKENIZER = cache(open_clip.SimpleTokenizer)


@pytest.fixture(autouse=True)
def aside(tmp_path, monkeypatch):
    """Every test in a folder of its own; the words of CLIP are read once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(open_clip, "SimpleTokenizer", TOKENIZER)
    yield


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def parts():
    """UNet with adapters that do something, autoencoder, text tower with the block that is left out, and a CLIP."""
    unet = seeded(lambda: UNet3D(UNET))
    lora.inject(unet, rank=3)
    for layer in lora.layers(unet).values():
        layer.lora_B.data.normal_(std=.1, generator=torch.Generator().manual_seed(1))
    return unet, seeded(lambda: Autoencoder(VAE)), seeded(lambda: TextEncoder(replace(TEXT, layers=3))), \
        seeded(lambda: open_clip.CLIP(**CLIP))


def without_lora(unet):
    return {k: v for k, v in unet.state_dict().items() if ".lora_" not in k}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    {".json": lambda: path.write_text(json.dumps(content)), ".safetensors": lambda: save_file(content, path)}.get(
        path.suffix, lambda: torch.save(content, path))()


@pytest.fixture(scope="module")
def diffusers_folder(parts, tmp_path_factory):
    """unet, vae and text_encoder, the last under open_clip's names; beside them what a download should leave alone."""
    folder, (unet, vae, text, _) = tmp_path_factory.mktemp("base"), parts
    write(folder / "unet/config.json", names.unet_to_diffusers(UNET))
    write(folder / "vae/config.json", names.vae_to_diffusers(VAE))
    write(folder / "text_encoder/config.json", {"quick_gelu": False})
    for name, tensors in (("unet", without_lora(unet)), ("vae", vae.state_dict())):
        write(folder / name / "diffusion_pytorch_model.safetensors", tensors)
        for other in ("bin", "fp16.bin", "fp16.safetensors"):
            (folder / name / f"diffusion_pytorch_model.{other}").write_text("not to be downloaded")
    (folder / "unet/openvino_model.bin").write_text("not to be downloaded")
    tower = sorted(text.state_dict())
    shards = {name: f"pytorch_model-0000{1 + (name > tower[9])}-of-00002.bin" for name in tower}
    for shard in set(shards.values()):
        write(folder / "text_encoder" / shard, {k: v for k, v in text.state_dict().items() if shards[k] == shard})
    write(folder / "text_encoder/pytorch_model.bin.index.json", {"weight_map": shards})
    write(folder / "scheduler/scheduler_config.json", {"prediction_type": "epsilon"})
    write(folder / "model_index.json", {"_class_name": "TextToVideoSDPipeline"})
    return folder


@pytest.fixture
def small(monkeypatch):
    """Bare files bring no structure: the default is full size, and here it is small."""
    monkeypatch.setattr(model, "load_unet", partial(model.load_unet, config=UNET))
    monkeypatch.setattr(model, "load_vae", partial(model.load_vae, config=VAE))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: CLIP)


@pytest.fixture(scope="module")
def instructvideo(parts, tmp_path_factory):
    """A folder with the files of InstructVideo's own, as its README has them laid out."""
    folder, (unet, vae, text, clip) = tmp_path_factory.mktemp("InstructVideo"), parts
    base = names.unet_to_official(without_lora(unet), UNET)
    official = adapters.official_names(UNET)
    tuned = {official[k]: v for k, v in lora.adapter_state(unet).items()}
    write(folder / "model_scope_v1-4_0600000.pth", base)
    state = {f"module.{k}": v for k, v in (base | tuned).items()}
    write(folder / TUNED, {"state_dict": state, "optimizer": {"lr": 1e-5}, "scaler": {}, "step": 620000})
    ldm = {f"first_stage_model.{k}": v for k, v in vae_to_official(vae.state_dict(), VAE).items()}
    write(folder / "v2-1_512-ema-pruned.ckpt", {"state_dict": ldm | {"model_ema.decay": torch.tensor(.9)}})
    write(folder / "stable-diffusion-v/open_clip_pytorch_model.bin", text.state_dict() | {"visual.proj": torch.zeros(2, 2)})
    write(folder / "HPS_v2.pt", {"iterations": np.float64(4000), "state_dict": clip.state_dict(), "optimizer": {"lr": 1.}})
    write(folder / "alone/adapters.pth", tuned)
    return folder


def holds(module, tensors):
    own = {k: v for k, v in module.state_dict().items() if ".lora_" not in k}
    return own.keys() == tensors.keys() and all(torch.equal(v, tensors[k]) for k, v in own.items())


def one_line(error):
    assert str(error.value).isprintable()
    return str(error.value)


# ------------------------------------------------- InstructVideo's own files -------------------------------------------------

def test_a_fine_tuned_official_file_is_base_and_adapters(small, parts, instructvideo):
    unet, vae, text, _ = parts
    base = load_base(str(instructvideo / TUNED))  # the other parts are found one folder up
    assert holds(base.unet, without_lora(unet)) and holds(base.vae, vae.state_dict()) and base.text_encoder.config == TEXT
    assert len(lora.load_beside(base.unet, base.unet_file)) == 2 * len(lora.layers(unet))
    assert all(torch.equal(v, lora.adapter_state(unet)[k]) for k, v in lora.adapter_state(base.unet).items())

    plain = load_base(str(instructvideo))
    assert holds(plain.unet, without_lora(unet)) and lora.load_beside(plain.unet, plain.unet_file) == []
    assert lora.load_beside(plain.unet, None) == [] and not hasattr(plain.unet.transformer_in, "lora_A")


def test_the_commands_take_both_from_the_one_file(small, instructvideo, monkeypatch, capsys):
    def videos(out, **settings):
        generate.main(generate.Config(prompt=["a cat", "a dog"], num_steps=2, frames=2, height=8, width=8, device="cpu",
                                      out=Path(out), **settings))
        return [path.read_bytes() for path in sorted(Path(out).glob("*.mp4"))]
    tuned = videos("a", base=str(instructvideo / TUNED))
    assert len(tuned) == 2 and tuned == videos("b", base=str(instructvideo), lora=instructvideo / "alone/adapters.pth")
    base = videos("c", base=str(instructvideo))
    assert tuned != base and base == videos("d", base=str(instructvideo / TUNED), lora_scale=0.)
    monkeypatch.chdir((instructvideo / TUNED).parent)
    assert tuned == videos("../e", base=Path(TUNED).name)  # from inside its folder, too

    Path("prompts.txt").write_text("a cat\na dog\n")
    evaluate.main(evaluate.Config(base=str(instructvideo / TUNED), prompts=["animals=prompts.txt"], count=0, num_steps=(2,),
                                  frames=2, segments=1, height=8, width=8, device="cpu", sheet=0, out=Path("report")))
    rows = json.loads(Path("report/table.json").read_text())
    assert rows["reward"] == "HPSv2.0"  # HPS_v2.pt lies beside the base: nothing is downloaded
    assert [r["model"] for r in rows["results"]] == ["base", "fine-tuned"] and rows["results"][1]["differences"]["reward"][0] != 0


def test_training_goes_on_from_the_adapters_of_the_file(small, instructvideo):
    with av.open("0.mp4", "w") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        for i in range(4):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16, 3), 60 * i, np.uint8), format="rgb24")))
        file.mux(stream.encode())
    Path("clips.txt").write_text("0.mp4|||a cat\n")
    flags = ["tiny", "--base", instructvideo / TUNED, "--data", "clips.txt", "--frames", 2, "--segments", 1, "--size", 8,
             "--steps", 1, "--batch-size", 1, "--num-steps", 2, "--tau", 1, "--eval-every", 0, "--device", "cpu", "--workers", 0,
             "--lr", 1e-9, "--out", "run"]
    with pytest.raises(ValueError, match="rank = 4: must be 3, that of the adapters in .*0620000.pth") as error:
        train.main([*map(str, flags)])
    assert one_line(error) and not Path("run").exists()
    assert train.main([*map(str, flags), "--rank", "3"]) == 0
    ours, theirs = (adapters.read_adapter(path, UNET).tensors for path in ("run/lora.safetensors", instructvideo / TUNED))
    for name, t in ours.items():
        torch.testing.assert_close(t, theirs[name], rtol=0, atol=1e-8)


def test_parts_that_do_not_belong_together(diffusers_folder, parts, tmp_path):
    write(tmp_path / "wide.bin", seeded(lambda: TextEncoder(TextConfig(vocab_size=9, width=128, heads=2, layers=2))).state_dict())
    with pytest.raises(ValueError, match="text of width 64; .*/vae has 4, wide.bin 128") as error:
        load_base(str(diffusers_folder), text_encoder="wide.bin")
    assert one_line(error)
    config = replace(VAE, latent_channels=8)
    write(tmp_path / "vae/config.json", names.vae_to_diffusers(config))
    write(tmp_path / "vae/diffusion_pytorch_model.safetensors", seeded(lambda: Autoencoder(config)).state_dict())
    with pytest.raises(ValueError, match="the UNet takes 4 and gives 4 latent channels, .*vae has 8"):
        load_base(str(diffusers_folder), vae="vae")


def test_a_word_list_must_fit_its_text_tower():
    for text, what in (("5\na\nb", "makes 5 tokens from 0 to 5, the weights beside it read 7 from 0 to 8"),
                       ("7\n" + "\n".join("abcdef"), "makes 7 tokens from 0 to 9")):
        Path("words.txt").write_text(text)
        with pytest.raises(ValueError, match=what) as error:
            words.read_words("words.txt", dict(vocab_size=9, context_length=7))
        assert one_line(error).startswith("words.txt: makes")


# --------------------------------------------------------- The hub ---------------------------------------------------------

class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's protocol for one repository, org/small, whose files are in `folder`; notes what is downloaded."""
    sha = "a" * 40

    def __init__(self, folder, downloads, *args):
        self.folder, self.downloads = folder, downloads
        super().__init__(*args)

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.partition("?")[0]
        files = [f.relative_to(self.folder).as_posix() for f in sorted(self.folder.rglob("*")) if f.is_file()]
        resolve = next((f for f in files if path in (f"/org/small/resolve/{r}/{f}" for r in (self.sha, "main"))), None)
        status, body, headers = 200, b"", {}
        if path in ("/api/models/org/small", "/api/models/org/small/revision/main"):
            body = json.dumps({"id": "org/small", "sha": self.sha, "siblings": [{"rfilename": f} for f in files]}).encode()
        elif path == f"/api/models/org/small/tree/{self.sha}" or path == "/api/models/org/small/tree/main":
            body = json.dumps([{"type": "file", "path": f, "size": (self.folder / f).stat().st_size, "oid": f"{i:040x}"}
                               for i, f in enumerate(files)]).encode()
        elif resolve:
            body = (self.folder / resolve).read_bytes()
            headers = {"ETag": f'"{files.index(resolve):040x}"', "X-Repo-Commit": self.sha, "Accept-Ranges": "bytes"}
            if self.command == "GET":
                self.downloads.append(resolve)
        else:
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Starts the hub for a folder: (what is downloaded from it, how to pull the plug)."""
    servers = []

    def start(folder):
        downloads = []
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, downloads)))
        threading.Thread(target=servers[-1].serve_forever, args=(.01,), daemon=True).start()
        url = f"http://127.0.0.1:{servers[-1].server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            url + "/{repo_id}/resolve/{revision}/{filename}")
        return downloads, stop

    def stop():
        if servers:
            servers[-1].shutdown()
            servers.pop().server_close()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # it tries again, with pauses, when there is no network
    yield start
    stop()


FULL_PRECISION = ["scheduler/scheduler_config.json",
                  "text_encoder/config.json", "text_encoder/pytorch_model-00001-of-00002.bin",
                  "text_encoder/pytorch_model-00002-of-00002.bin", "text_encoder/pytorch_model.bin.index.json",
                  "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
                  "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


def test_the_hub_is_asked_for_one_file_of_weights_a_part_and_only_once(hub, diffusers_folder, parts):
    downloads, pull_the_plug = hub(diffusers_folder)
    base = load_base("org/small")
    assert sorted(downloads) == FULL_PRECISION
    assert holds(base.unet, without_lora(parts[0])) and holds(base.vae, parts[1].state_dict())
    assert base.text_encoder.config == TEXT and base.text_encoder.ln_final.weight.equal(parts[2].ln_final.weight)
    load_base("org/small")
    assert sorted(downloads) == FULL_PRECISION
    with pytest.raises(ValueError, match="base 'org/large': no such hub repository, nor a file or folder of that name") as error:
        load_base("org/large")
    assert one_line(error)
    pull_the_plug()
    assert holds(load_base("org/small").unet, without_lora(parts[0]))
    with pytest.raises(ValueError, match="base 'org/large': no file or folder of that name here, and the hub's cannot be downl"):
        load_base("org/large")

    # What an interrupted download left is no base.
    next(Path("cache").glob("models--org--small/snapshots/*/vae/diffusion_pytorch_model.safetensors")).unlink()
    with pytest.raises(ValueError, match="base 'org/small': .* cannot be downloaded .*put the folders unet, vae") as error:
        load_base("org/small")
    assert one_line(error)


def test_modelscopes_files_on_the_hub(hub, small, instructvideo, parts):
    downloads, _ = hub(instructvideo)
    assert holds(load_base("org/small").unet, without_lora(parts[0]))
    assert sorted(downloads) == ["model_scope_v1-4_0600000.pth", "stable-diffusion-v/open_clip_pytorch_model.bin",
                                 "v2-1_512-ema-pruned.ckpt"]


@pytest.mark.parametrize(("files", "unet"), [
    (["unet/diffusion_pytorch_model.fp16.bin", "unet/diffusion_pytorch_model.fp16.safetensors"], [1]),
    (["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "unet/config.json"], [1, 2]),
    (["text2video_pytorch_model.pth", "unet/config.json", "model_scope_v1-4_0600000.pth"], [0]),
    (["unet/config.json", "unet/README.md", "x/unet/diffusion_pytorch_model.bin"], [])])
def test_which_files_of_a_repository_are_needed(files, unet):
    assert weights.hub_files(files) == {"unet": [files[i] for i in unet], "vae": [], "text_encoder": []}


def test_hf_hub_offline(hub, diffusers_folder, tmp_path):
    """A real process without a network: what is in the cache serves, and for the rest one line says what to get."""
    hub(diffusers_folder)
    load_base("org/small")
    code = """if True:
        import sys, reward, generate
        base = generate.load_base("org/small")
        print(base.unet.config.channels, next(base.unet.parameters()).dtype)
        for load in (lambda: generate.load_base("org/large"), lambda: reward.load_reward("hpsv2.1")):
            try:
                load()
            except ValueError as error:
                print(error)
        sys.argv = ["generate.py", "--base", "org/large", "--prompt", "a cat"]
        import runpy
        runpy.run_path("generate.py", run_name="__main__")
        """
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    loaded, base, hps = done.stdout.splitlines()
    assert loaded == "(8, 16) torch.float32"
    assert base.startswith("base 'org/large'") and "OfflineModeIsEnabled" in base and base.endswith("give that as --base")
    assert hps.startswith("reward hpsv2.1: cannot be downloaded (") and hps.endswith(
        "get HPS_v2.1_compressed.pt from the hub repository xswu/HPSv2 and give its path as --reward-weights")
    assert (done.returncode, done.stderr) == (2, f"generate.py: {base}\n")


# ------------------------------------------------------ A base in use ------------------------------------------------------

@pytest.fixture(scope="module")
def text_encoder():
    return seeded(lambda: TextEncoder(TEXT))


@pytest.fixture
def base(parts, text_encoder):
    unet = UNet3D(UNET)
    unet.load_state_dict(without_lora(parts[0]))
    return Base(unet.requires_grad_(False), parts[1], text_encoder, "small")


def test_frames_are_picked_before_they_are_decoded(base, monkeypatch):
    decoded, decode = [], base.vae.decoder.forward
    monkeypatch.setattr(base.vae.decoder, "forward", lambda x: decoded.append(len(x)) or decode(x))
    z, index = torch.randn(2, 4, 5, 4, 4), torch.tensor([[0, 3], [4, 4]])
    some, every = decode_frames(base.vae, z, index), decode_frames(base.vae, z)
    assert decoded == [4, 10] and some.shape == (2, 2, 3, 8, 8) and every.shape == (2, 5, 3, 8, 8)
    for b in range(2):
        torch.testing.assert_close(some[b], every[b, index[b]])
    torch.testing.assert_close(every[1, 2], base.vae.decode(z[1, :, 2][None] / .18215)[0] / 2 + .5)


@pytest.mark.parametrize("name", ["tpu", "cuda:9999", "meta", "hpu", "privateuseone", "xla", "", "cpu "])
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match="it must be cuda, mps or cpu, where torch has them") as error:
        processes.pick_device(name)
    assert one_line(error).startswith(f"device {name!r}: not available here")


def test_device_and_precision(monkeypatch):
    assert processes.pick_device("cpu") == torch.device("cpu")
    for cuda, mps, kind in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert processes.pick_device().type == kind
    for name, kind, dtype in ((None, "cuda", torch.bfloat16), (None, "mps", torch.float32), (None, "cpu", torch.float32),
                              ("float16", "cpu", torch.float16), ("float32", "cuda", torch.float32)):
        assert processes.pick_dtype(name, torch.device(kind)) == dtype
    with pytest.raises(ValueError, match="dtype 'int8': must be one of float32, bfloat16, float16"):
        processes.pick_dtype("int8", torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_have_one_fingerprint_in_every_precision(base, dtype):
    tiny = base.unet.conv_in.weight.data
    tiny[0] = torch.tensor([1e-30, -1e-30, 0.]).repeat(12).view_as(tiny[0])  # what fp16 rounds to zero; 1.4 B weights have such
    name = published.fingerprint(base.unet.state_dict())
    assert published.fingerprint(base.unet.to(dtype).state_dict()) == name
    assert published.fingerprint(base.unet.float().state_dict()) == name
    lora.inject(base.unet)
    assert published.fingerprint(base.unet.state_dict()) == lora.base_fingerprint(base.unet) == name
    base.unet.conv_out.weight.data[0, 0, 0, 0] *= -1
    assert published.fingerprint(base.unet.state_dict()) != name


def test_cached_latents_and_text_belong_to_weights_and_precision(base, monkeypatch, tmp_path):
    asked, named = [], []
    other = Base(base.unet, seeded(lambda: Autoencoder(VAE), 1), seeded(lambda: TextEncoder(TEXT), 1), "other")
    monkeypatch.setattr(train, "encode_clips", lambda *args: asked.append(args))
    monkeypatch.setattr(train, "read_list", lambda *args: args)
    cfg = train.Config(data=Path("clips.txt"), frames=3, size=16, fps=4, cache_dir=tmp_path)
    for b, dtype, settings in ((base, torch.float32, {}), (base, torch.bfloat16, {}), (other, torch.float32, {}),
                               (base, torch.float32, {"cache": False, "size": None})):
        b.vae.to(dtype)
        train.read_clips(replace(cfg, **settings), b)
        named.append(b.fingerprints())
    assert len({a[0] for a in named[:3]}) == len({a[1] for a in named[:3]}) == 3 and named[3] == named[0]
    assert [a[3] for a in asked] == [tmp_path] * 3 + [None]
    sizes = [(a[1].num_frames, a[1].fps, a[1].height, a[1].width) for a in asked]
    assert sizes == [(3, 4, 16, 16)] * 3 + [(3, 4, 8, 8)]

    frames = torch.rand(2, 3, 16, 16)
    assert torch.equal(base.encode(frames), base.vae.encode(frames))
    one, two = base.encode_captions(["a cat"]), base.encode_captions(["a dog"])
    assert not {"a cat", "a dog"} & base.texts.keys()  # those of thousands of clips are not kept on the accelerator
    assert torch.equal(torch.cat([one, two]), base.encode_text(["a cat", "a dog"]))


# --------------------------------------------------------- The reward ---------------------------------------------------------

@pytest.mark.parametrize(("kind", "name", "called"), [
    ("hpsv2", "HPS_v2_compressed.pt", "HPSv2.0"), ("hpsv2", "copy.safetensors", "HPSv2.0"), ("hpsv2", "HPS_v2.pt", "HPSv2.0"),
    ("hpsv2.1", "HPS_v2.1_compressed.pt", "HPSv2.1"), ("hpsv2.1", "copy.safetensors", "HPSv2.1")])
def test_rewards_by_path(small, parts, kind, name, called):
    half = {k: v.half().contiguous() for k, v in parts[3].state_dict().items()}
    write(Path(name), half if name.endswith("safetensors") else {"state_dict": half, "epoch": np.float64(3)})
    hps = reward.load_reward(kind, name, dtype=torch.float16)
    assert hps.name == called and holds(hps.clip, half) and hps.clip.visual.conv1.weight.dtype == torch.float16


@pytest.mark.parametrize(("kind", "name"), [("hpsv2", "HPS_v2.1_compressed.pt"), ("hpsv2.1", "HPS_v2_compressed.pt"),
                                            ("hpsv2.1", "HPS_v2.pt"), ("hpsv2.1", "HPS_v2_copy.safetensors")])
def test_a_file_of_the_other_version_is_refused(kind, name):
    Path(name).touch()
    with pytest.raises(ValueError, match=f"{name} does not hold HPS v2.[01]: the scores would carry the wrong name"):
        reward.load_reward(kind, name)


def test_rewards_from_the_base_the_hub_or_nowhere(small, parts, monkeypatch, tmp_path):
    asked = []

    def download(repo, name):
        asked.append((repo, name))
        write(tmp_path / "cache" / name, {"state_dict": parts[3].state_dict()})
        return str(tmp_path / "cache" / name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    empty = tmp_path / "base/unet"
    empty.mkdir(parents=True)
    assert reward.load_reward("hpsv2", None, empty).name == "HPSv2.0"
    assert reward.load_reward("hpsv2.1").name == "HPSv2.1"
    assert asked == [("xswu/HPSv2", "HPS_v2_compressed.pt"), ("xswu/HPSv2", "HPS_v2.1_compressed.pt")]

    write(tmp_path / "base/HPS_v2.pt", {"state_dict": parts[3].state_dict()})  # as in InstructVideo's folder
    for folder in (empty, empty.parent):
        assert reward.load_reward("hpsv2", None, folder).name == "HPSv2.0" and len(asked) == 2
    reward.load_reward("hpsv2.1", None, empty)
    assert len(asked) == 3  # v2.0 never stands in for v2.1

    def no_network(*args):
        raise OSError("cannot resolve the host\nand more")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    with pytest.raises(ValueError, match=r"reward hpsv2: cannot be downloaded \(OSError: cannot resolve the host\); get HPS_v2"):
        reward.load_reward("hpsv2", None, tmp_path)
    with pytest.raises(ValueError, match="reward 'hps': must be one of hpsv2, hpsv2.1"):
        reward.load_reward("hps")


def test_random_rewards_say_so_and_are_seeded(small, monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every device was seeded"))
    state = torch.random.get_rng_state()
    one, two = reward.load_reward("hpsv2", "random:32"), reward.load_reward("hpsv2", "random")
    assert one.name == two.name == "HPSrandom" and holds(one.clip, two.clip.state_dict())
    assert torch.equal(torch.random.get_rng_state(), state)
    for path in ("random_weights.pt", "random:", "random:x"):  # paths, all of them
        with pytest.raises(ValueError, match=f"{path}: no such file"):
            reward.load_reward("hpsv2", path)


def reward_folder(clip, config=CLIP, words="77\na\ncat"):
    folder = Path("reward")
    write(folder / "config.json", config)
    write(folder / "model.safetensors", {k: v.contiguous() for k, v in clip.state_dict().items()})
    (folder / "words.txt").write_text(words)
    return folder


def test_a_small_reward_with_words_of_its_own(parts):
    hps = reward.load_reward("hpsv2", str(reward_folder(parts[3])))
    assert hps.name == "HPStiny" and holds(hps.clip, parts[3].state_dict())
    assert hps.tokenizer(["a cat"])[0, :5].tolist() == [1, 3, 4, 5, 0]


@pytest.mark.parametrize(("config", "words", "message"), [
    (CLIP | {"text_cfg": CLIP["text_cfg"] | {"hf_model_name": "someone/code"}}, None, "expected the fields context_length"),
    (CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"timm_model_name": "vit"}}, None, "expected the fields image_size"),
    (CLIP | {"vision_cfg": CLIP["vision_cfg"] | {"layers": 10**6}}, None, "whole numbers"),
    (CLIP | {"embed_dim": True}, None, "whole numbers"), (CLIP | {"embed_dim": 0}, None, "whole numbers"),
    (CLIP | {"vision_cfg": [1]}, None, "expected whole numbers"), ({"embed_dim": 8}, None, "expected the fields"),
    ([], None, "JSON object"),
    (CLIP | {"text_cfg": CLIP["text_cfg"] | {"heads": 5}}, None, "not a model that can be built"),
    (CLIP, "5\na\ncat", "words.txt: makes 5 tokens"), (CLIP, "a cat", "words.txt: expected a context length"),
    (CLIP | {"embed_dim": 16}, None, "has shape")])
def test_malformed_reward_folders(parts, monkeypatch, config, words, message):
    monkeypatch.setattr(open_clip.model, "HFTextEncoder", lambda *args, **kwargs: pytest.fail("a file named a model to fetch"))
    folder = reward_folder(parts[3], config, words or "77\na\ncat")
    with pytest.raises(ValueError, match=message) as error:
        reward.load_reward("hpsv2", str(folder))
    assert "reward" in one_line(error)


# ------------------------------------------------------- A run to resume -------------------------------------------------------

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder of one step in the tiny world."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "COUNT", 2)
        flags = "--steps 1 --batch-size 1 --num-steps 1 --tau 1 --eval-every 0 --device cpu --out"
        assert train.main([*flags.split(), str(folder)]) == 0
    return folder


def adapters_of(folder):
    state = torch.load(folder / "state.pt", weights_only=True)
    return state, state["adapters"]


def test_what_was_saved_is_read(finished):
    state, tensors = adapters_of(finished)
    assert state["optimizer"]["state"].keys() == set(range(len(tensors)))
    assert run_folder.read_checkpoint(finished / "state.pt", tensors)["step"] == 1
    torch.save(state | {"optimizer": {"state": {}}}, "state.pt")  # every step so far was skipped
    run_folder.read_checkpoint(Path("state.pt"), tensors)


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("created"),)


def put(**changes):
    """A change of some of a checkpoint's entries."""
    return lambda state: state | changes


def drop(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


def adapter(change):
    """A change of the first adapter tensor."""
    return lambda state: state | {"adapters": {k: v if i else change(v) for i, (k, v) in enumerate(state["adapters"].items())}}


def moments(change):
    """A change of what the optimizer keeps for the first parameter."""
    def changed(state):
        kept = state["optimizer"]["state"]
        return state | {"optimizer": {"state": kept | {0: change(kept[0])}}}
    return changed


HOSTILE_STATES = {
    "code": put(extra=Hostile()), "a list": lambda state: [state], "a tensor": lambda state: torch.zeros(3),
    "no version": drop("version"), "version 2": put(version=2), "version true": put(version=True),
    "version of tensors": put(version=torch.ones(3)),
    "no step": drop("step"), "step 0": put(step=0), "step of text": put(step="1"), "step of tensors": put(step=torch.ones(2)),
    "no adapters": drop("adapters"), "adapters none": put(adapters=None), "adapters listed": put(adapters=[torch.zeros(1)]),
    "adapters missing": put(adapters={}), "adapters numbered": lambda state: state | {"adapters": state["adapters"] | {7: 7}},
    "adapters more": lambda state: state | {"adapters": state["adapters"] | {"x": torch.zeros(1)}},
    "adapters broadcast": adapter(lambda t: t[:1]), "adapters int": adapter(lambda t: t.int()),
    "adapters of numbers": adapter(lambda t: 1.),
    "no optimizer": drop("optimizer"), "optimizer none": put(optimizer=None), "no moments": put(optimizer={}),
    "moments listed": put(optimizer={"state": [1]}), "moments half": put(optimizer={"state": {0: {"step": torch.tensor(1.)}}}),
    "moments flat": moments(lambda kept: kept["exp_avg"]), "moments of text": moments(lambda kept: kept | {"step": "1"}),
    "moments broadcast": moments(lambda kept: kept | {"exp_avg": torch.zeros(1)}),
    "moments more": moments(lambda kept: kept | {"max_exp_avg_sq": torch.zeros(1)}),
}


@pytest.mark.parametrize("what", HOSTILE_STATES)
def test_a_checkpoint_is_data(finished, what):
    state, tensors = adapters_of(finished)
    torch.save(HOSTILE_STATES[what](state), "state.pt")
    with pytest.raises(ValueError) as error:
        run_folder.read_checkpoint(Path("state.pt"), tensors)
    assert one_line(error).startswith("state.pt: ") and not Path("created").exists()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("name", "damage", "message"), [
    ("state.pt", lambda b: b[:len(b) // 2], "state.pt: cannot be read .*without it, --resume starts again"),
    ("state.pt", lambda b: b"", "state.pt: cannot be read"),
    ("state.pt", "moments broadcast", "state.pt: not a checkpoint of this run .*tensor exp_avg is missing"),
    ("state.pt", "adapters missing", "state.pt: not a checkpoint of this run"),
    ("metrics.jsonl", lambda b: b'{"step": "1"}\n' + b, "metrics.jsonl, line 1: not what a run logs"),
    ("metrics.jsonl", lambda b: b"[1]\n" + b, "metrics.jsonl, line 1"),
    ("metrics.jsonl", lambda b: b'{"step": 1, "eval": {}}\n' + b, "metrics.jsonl, line 1"),
    ("metrics.jsonl", lambda b: b'{"step": 1, "eval": {"a": {"reward_mean": "high"}}}\n' + b, "metrics.jsonl, line 1"),
    ("metrics.jsonl", lambda b: b"\xff\n" + b"[" * 9999 + b"\n" + b, "metrics.jsonl, line 1"),
    ("config.json", lambda b: b.replace(b'"prompts": []', b'"prompts": [1]'), "prompts would make it another run|NAME=FILE"),
    ("config.json", lambda b: b.replace(b'"data": null', b'"data": 5'), "5: no such list"),
    ("config.json", lambda b: b[:-9], "config.json: expected JSON"), ("config.json", lambda b: b"[]", "expected a JSON object")])
def test_resuming_from_damage_changes_nothing(finished, monkeypatch, name, damage, message):
    monkeypatch.setattr(clips, "COUNT", 2)
    folder = Path("run")
    for file, content in contents(finished).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    if isinstance(damage, str):
        torch.save(HOSTILE_STATES[damage](torch.load("run/state.pt", weights_only=True)), "run/state.pt")
    else:
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
    before = contents(folder)
    with pytest.raises(ValueError, match=message) as error:
        train.main(["--resume", "run", "--steps", "2", "--eval-every", "1"])
    assert one_line(error) and contents(folder) == before


@pytest.mark.parametrize(("name", "value"), [("steps", "many"), ("lr", None), ("seed", 1.5)])
def test_a_setting_of_another_type_is_tyros_to_refuse(finished, capsys, name, value):
    """As on the command line: exit status 2, and the flag is named."""
    Path("run").mkdir()
    config = json.loads((finished / "config.json").read_text())
    Path("run/config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(SystemExit) as stopped:
        train.main(["--resume", "run"])
    assert stopped.value.code == 2 and name in capsys.readouterr().err


def test_the_same_command_with_resume_continues(tmp_path):
    """What a repeatable flag says takes the place of what the run has, and is not added to it."""
    flags = ["--reward", "hpsv2", "--reward", "action:left=0.5", "--watch", "motion", "--lr", "0.1", "--no-cache"]
    cfg = run_settings.parse(flags, train.PRESETS, "")
    (tmp_path / "config.json").write_text(json.dumps(run_settings.to_record(cfg)))
    resume = ["--resume", str(tmp_path)]
    assert run_settings.parse([*flags, *resume], train.PRESETS, "") == replace(cfg, resume=tmp_path)
    assert run_settings.parse([*resume, "--steps", "50"], train.PRESETS, "") == replace(cfg, resume=tmp_path, steps=50)
    with pytest.raises(ValueError, match="watch would make it another run"):
        run_settings.parse([*resume, "--watch", "flicker"], train.PRESETS, "")


def test_a_run_may_be_moved(finished, monkeypatch):
    monkeypatch.setattr(clips, "COUNT", 2)
    Path("far/away").mkdir(parents=True)
    for file, content in contents(finished).items():
        Path("far/away", file).parent.mkdir(exist_ok=True)
        Path("far/away", file).write_bytes(content)
    with open("far/away/metrics.jsonl", "a") as file:
        file.write('{"step": 2, "rew')  # half a line, as a killed run leaves it
    before = contents(finished)
    assert train.main(["--resume", "far/away", "--steps", "2"]) == 0
    assert [json.loads(line)["step"] for line in Path("far/away/metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert contents(finished) == before
    one, two = load_file(finished / "lora.safetensors"), load_file("far/away/lora.safetensors")
    assert any(not torch.equal(v, two[k]) for k, v in one.items())
