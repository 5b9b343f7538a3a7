"""What a script loads first: the base from a folder, a file or the hub (a server in this process), the reward, a run to go on."""
import hashlib
import http.server
import json
import re
import shutil
import threading
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch

import evaluate
import generate
import lora
import reward
import train
from bases import modelscope
from bases.modelscope import Base, random_sizes
from formats import adapters, reward_model, tensor_names as names, tensors as published, weights
from methods import vader
from model import Autoencoder, TextConfig, TextEncoder, UNet3D, UNetConfig, VAEConfig, load_base
from support import run as run_folder, settings as run_settings
from support.clips import say_once
from support.videos import write_video
from tests.conftest import built, contents, refused, same_tensors, vae_to_official, write_file
from tiny import clips

UNET = UNetConfig(channels=(8, 16), blocks_per_level=1, attention_levels=(True, False), context_dim=64, head_dim=4, norm_groups=4,
                  sample_size=4)
VAE = VAEConfig(channels=(8, 16), blocks_per_level=1, norm_groups=4)
TEXT = TextConfig(width=64, heads=1, layers=2)
TUNED = "instructvideo-finetuned/ddim20_1102-18-52_non_ema_0620000.pth"
CLIP = reward_model.SMALL_CLIP
STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
TOKENIZER = cache(open_clip.SimpleTokenizer)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A folder of its own; the words of CLIP are read once; bare files, which bring no structure, are of the small one here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(open_clip, "SimpleTokenizer", TOKENIZER)
    monkeypatch.setattr(modelscope, "load_unet", partial(modelscope.load_unet, config=UNET))
    monkeypatch.setattr(modelscope, "load_vae", partial(modelscope.load_vae, config=VAE))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: CLIP)


@pytest.fixture(scope="module")
def parts():
    """UNet with adapters that do something, autoencoder, text tower with the block that is left out, and a CLIP."""
    unet = built(lambda: UNet3D(UNET))
    lora.inject(unet, rank=3)
    for layer in lora.layers(unet).values():
        layer.lora_B.data.normal_(std=.1, generator=torch.Generator().manual_seed(1))
    return unet, built(lambda: Autoencoder(VAE)), built(lambda: TextEncoder(replace(TEXT, layers=3))), \
        built(lambda: open_clip.CLIP(**CLIP))


def without_lora(unet):
    return {k: v for k, v in unet.state_dict().items() if ".lora_" not in k}


def write_base(folder, parts):
    """unet, vae and text_encoder, the last in shards under open_clip's names; beside them what a download should leave alone."""
    unet, vae, text, _ = parts
    write_file(folder / "unet/config.json", names.unet_to_diffusers(UNET))
    write_file(folder / "vae/config.json", names.vae_to_diffusers(VAE))
    write_file(folder / "text_encoder/config.json", {"quick_gelu": False})
    for name, tensors in (("unet", without_lora(unet)), ("vae", vae.state_dict())):
        write_file(folder / name / WEIGHTS, tensors)
        for other in ("bin", "fp16.bin", "fp16.safetensors"):
            (folder / name / f"diffusion_pytorch_model.{other}").write_text("not to be downloaded")
    (folder / "unet/openvino_model.bin").write_text("not to be downloaded")
    tower = sorted(text.state_dict())
    shards = {name: f"pytorch_model-0000{1 + (name > tower[9])}-of-00002.bin" for name in tower}
    for shard in set(shards.values()):
        write_file(folder / "text_encoder" / shard, {k: v for k, v in text.state_dict().items() if shards[k] == shard})
    write_file(folder / "text_encoder/pytorch_model.bin.index.json", {"weight_map": shards})
    write_file(folder / "scheduler/scheduler_config.json", {"prediction_type": "epsilon"})
    write_file(folder / "model_index.json", {"_class_name": "TextToVideoSDPipeline"})
    return folder


@pytest.fixture(scope="module")
def diffusers_folder(parts, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), parts)


@pytest.fixture(scope="module")
def instructvideo(parts, tmp_path_factory):
    """A folder with the files of InstructVideo's own, as its README has them laid out."""
    folder, (unet, vae, text, clip) = tmp_path_factory.mktemp("InstructVideo"), parts
    base = names.unet_to_official(without_lora(unet), UNET)
    official = adapters.official_names(UNET)
    tuned = {official[k]: v for k, v in lora.adapter_state(unet).items()}
    write_file(folder / "model_scope_v1-4_0600000.pth", base)
    state = {f"module.{k}": v for k, v in (base | tuned).items()}
    write_file(folder / TUNED, {"state_dict": state, "optimizer": {"lr": 1e-5}, "scaler": {}, "step": 620000})
    ldm = {f"first_stage_model.{k}": v for k, v in vae_to_official(vae.state_dict(), VAE).items()}
    write_file(folder / "v2-1_512-ema-pruned.ckpt", {"state_dict": ldm | {"model_ema.decay": torch.tensor(.9)}})
    write_file(folder / "stable-diffusion-v/open_clip_pytorch_model.bin", text.state_dict() | {"visual.proj": torch.zeros(2, 2)})
    write_file(folder / "HPS_v2.pt", {"iterations": np.float64(4000), "state_dict": clip.state_dict(), "optimizer": {"lr": 1.}})
    write_file(folder / "alone/adapters.pth", tuned)
    return folder


def holds(module, tensors):
    held = {k: v for k, v in module.state_dict().items() if ".lora_" not in k}
    return held.keys() == tensors.keys() and all(torch.equal(v, tensors[k]) for k, v in held.items())


# ------------------------------------------------- InstructVideo's own files -------------------------------------------------

def test_the_commands_take_both_from_the_one_file(instructvideo, monkeypatch):
    def videos(out, **settings):
        generate.main(generate.Config(prompt=["a cat", "a dog"], num_steps=2, frames=2, size=8, device="cpu",
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
                                  frames=2, segments=1, size=8, device="cpu", sheet=0, out=Path("report")))
    rows = json.loads(Path("report/table.json").read_text())
    assert rows["reward"] == "HPSv2.0"  # HPS_v2.pt lies beside the base: nothing is downloaded
    assert [r["model"] for r in rows["results"]] == ["base", "fine-tuned"] and rows["results"][1]["differences"]["reward"][0] != 0


def test_training_goes_on_from_the_adapters_of_the_file(instructvideo):
    write_video(Path("0.mp4"), np.full((4, 16, 16, 3), 60, np.uint8), 8)
    Path("clips.txt").write_text("0.mp4|||a cat\n")
    flags = ["tiny", "--base", str(instructvideo / TUNED), *"--data clips.txt --frames 2 --segments 1 --size 8 --steps 1 "
             "--batch-size 1 --num-steps 2 --tau 1 --eval-every 0 --device cpu --workers 0 --lr 1e-9 --out run".split()]
    refused("rank = 4: must be 3, that of the adapters in .*0620000.pth", train.main, flags)
    refused("lora_alpha = 8.0: must be 3.0, that of the adapters in ", train.main, [*flags, "--rank", "3", "--lora-alpha", "8"])
    assert not Path("run").exists()
    assert train.main([*flags, "--rank", "3"]) == 0
    ours = adapters.read_adapter("run/lora.safetensors", UNET).tensors
    theirs = adapters.read_adapter(instructvideo / TUNED, UNET).tensors
    for name, t in ours.items():
        torch.testing.assert_close(t, theirs[name], rtol=0, atol=1e-8)


# ------------------------------------------------------ A folder's parts ------------------------------------------------------

def test_parts_may_come_from_elsewhere_if_they_fit(diffusers_folder, parts):
    folder = str(diffusers_folder)
    other = {k: v + 1 for k, v in parts[1].state_dict().items()}
    write_file(Path("other/config.json"), names.vae_to_diffusers(VAE))
    write_file(Path("other", WEIGHTS), other)
    write_file(Path("clip.bin"), parts[3].state_dict())
    refused("text of width 64; .*other has 4, clip.bin 32", load_base, folder, vae="other", text_encoder="clip.bin")
    assert holds(load_base(folder, vae="other").vae, other)
    config = replace(VAE, latent_channels=8)
    write_file(Path("vae/config.json"), names.vae_to_diffusers(config))
    write_file(Path("vae", WEIGHTS), built(lambda: Autoencoder(config)).state_dict())
    refused("the UNet takes 4 and gives 4 latent channels, .*vae has 8", load_base, folder, vae="vae")


def test_a_folder_without_one_of_its_parts_or_with_other_ones(parts, tmp_path):
    folder = write_base(tmp_path / "base", parts)
    for part in weights.PARTS:
        (folder / part).rename(folder / "elsewhere")
        message = refused(f"no {part} found in .*; expected one of {part}, ", load_base, str(folder))
        assert ("--" + part.replace("_", "-") in message) == (part != "unet")
        (folder / "elsewhere").rename(folder / part)
    (tmp_path / "hub/models--a--b/snapshots").mkdir(parents=True)
    folder.rename(tmp_path / "hub/models--a--b/snapshots/0123")
    folder = tmp_path / "hub/models--a--b/snapshots/0123"
    assert load_base(str(folder / "unet")).vae  # the other parts are beside it

    (folder / "text_encoder/words.txt").write_text("77\na\nbear\n")
    assert load_base(str(folder)).text_encoder.tokenizer(["a bear"])[0, :5].tolist() == [1, 3, 4, 5, 0]
    file = f"unet/{WEIGHTS}"
    digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    for name, listed, message in ((file, digest, None), (file, "0" * 64, "SHA-256 differs"), (file, None, "SHA-256 differs"),
                                  ("absent.pt", digest, "absent.pt: missing, or not")):
        write_file(folder / "manifest.json", {name: listed})
        assert refused(message, load_base, str(folder)) if message else load_base(str(folder))
    (folder / "manifest.json").unlink()
    write_file(folder / "scheduler/scheduler_config.json", {"prediction_type": "v_prediction"})
    for base in (folder, folder / "unet"):
        refused("scheduler_config.json: prediction_type is 'v_prediction': must be 'epsilon'", load_base, str(base))


def test_a_random_base_is_seeded(monkeypatch):
    """From the CPU's generator alone: torch.manual_seed seeds those of all devices."""
    monkeypatch.undo()
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every device was seeded"))
    state = torch.random.get_rng_state()
    bases = [load_base("random:32", seed=seed) for seed in (1, 1, 2)]
    first, same, other = (published.fingerprint(base.network.state_dict()) for base in bases)
    assert first == same != other and torch.equal(torch.random.get_rng_state(), state)
    unet, autoencoder, text = random_sizes("random:96")
    assert UNet3D(UNetConfig(**unet)).config.channels == (96, 192, 384, 384)
    assert Autoencoder(VAEConfig(**autoencoder)) and unet["context_dim"] == text["width"]
    for spec in ("random:0", "random:33", "random:big", "random:99999999968"):
        refused("must be random, or random:W|expected whole numbers", load_base, spec)


def test_what_runs_once_stays_in_float32(monkeypatch):
    """Moments and text features are made once and kept, so their precision may cost time; what runs in each step has --dtype."""
    monkeypatch.undo()
    for spec in ("tiny", "random:32"):
        base, exact = (load_base(spec, dtype=dtype) for dtype in (torch.bfloat16, None))
        for module in (base.network, base.vae.decoder, base.vae.post_quant_conv):
            assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        for module in (base.vae.encoder, base.vae.quant_conv, base.text_encoder):
            assert {p.dtype for p in module.parameters()} == {torch.float32}
        frames = torch.rand(2, 3, 32, 32) * 2 - 1
        assert torch.equal(base.vae.encode(frames), exact.vae.encode(frames))
    assert torch.equal(base.encode_text(["a red circle"]), exact.encode_text(["a red circle"]))


# --------------------------------------------------------- The hub ---------------------------------------------------------

class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's protocol for one repository, whose files are in `folder`; notes what is downloaded."""
    sha = "a" * 40

    def __init__(self, repo, folder, downloads, *args):
        self.repo, self.folder, self.downloads = repo, folder, downloads
        super().__init__(*args)

    def do_GET(self):
        files = [path.relative_to(self.folder).as_posix() for path in contents(self.folder)]
        asked, status, body, headers = self.path.partition("?")[0], 200, b"", {}
        file = re.fullmatch(f"/{self.repo}/resolve/(main|{self.sha})/(.*)", asked)
        if re.fullmatch(f"/api/models/{self.repo}(/revision/main)?", asked):
            body = json.dumps({"id": self.repo, "sha": self.sha, "siblings": [{"rfilename": f} for f in files]}).encode()
        elif re.fullmatch(f"/api/models/{self.repo}/tree/(main|{self.sha})", asked):
            body = json.dumps([{"type": "file", "path": f, "size": 1, "oid": f"{i:040x}"} for i, f in enumerate(files)]).encode()
        elif file and file[2] in files:
            body = (self.folder / file[2]).read_bytes()
            headers = {"ETag": f'"{files.index(file[2]):040x}"', "X-Repo-Commit": self.sha, "Accept-Ranges": "bytes"}
            self.downloads += [file[2]] * (self.command == "GET")
        else:
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for header in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Starts the hub for a folder: (what is downloaded from it, the server). Afterwards nothing answers."""
    servers = []

    def start(folder, repo="org/small"):
        downloads = []
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, repo, folder, downloads))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name, value in (("ENDPOINT", url), ("HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"),
                            ("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        return downloads, server
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # it tries again, with pauses, when there is no network
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


FULL_PRECISION = ["scheduler/scheduler_config.json",
                  "text_encoder/config.json", "text_encoder/pytorch_model-00001-of-00002.bin",
                  "text_encoder/pytorch_model-00002-of-00002.bin", "text_encoder/pytorch_model.bin.index.json",
                  "unet/config.json", f"unet/{WEIGHTS}", "vae/config.json", f"vae/{WEIGHTS}"]


def test_the_hub_is_asked_for_one_file_of_weights_a_part_and_only_once(hub, diffusers_folder, parts, monkeypatch):
    downloads, server = hub(diffusers_folder)
    base = load_base("org/small")
    assert sorted(downloads) == FULL_PRECISION
    assert holds(base.network, without_lora(parts[0])) and holds(base.vae, parts[1].state_dict())
    assert base.text_encoder.config == TEXT and base.text_encoder.ln_final.weight.equal(parts[2].ln_final.weight)
    load_base("org/small")
    assert sorted(downloads) == FULL_PRECISION
    refused("base 'org/large': no file or folder .* cannot be downloaded .RepositoryNotFound", load_base, "org/large")
    server.shutdown()
    server.server_close()
    assert holds(load_base("org/small").network, without_lora(parts[0]))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("base 'org/large': no file or folder of that name here, and the hub's cannot be downloaded .*OfflineMode.* as --base",
            load_base, "org/large")

    # What an interrupted download left is no base.
    next(Path("cache").glob(f"models--org--small/snapshots/*/vae/{WEIGHTS}")).unlink()
    refused("base 'org/small': .* cannot be downloaded .*put the folders of that repository", load_base, "org/small")


def test_repositories_of_other_bases():
    assert weights.hub_files(["README.md", "model.ckpt"]) == {"all": ["model.ckpt"]}  # VideoCrafter2's, then its port's
    files = ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert weights.hub_files(files) == {"part": files[1:]}


@pytest.mark.parametrize(("files", "unet"), [
    ([f"unet/{STEM}.fp16.safetensors", f"unet/{STEM}.bin", "unet/config.json"], [1, 2]),
    ([f"unet/{STEM}.fp16-00001-of-00002.safetensors", f"unet/{STEM}.fp16-00002-of-00002.safetensors",
      f"unet/{STEM}.safetensors.index.fp16.json", f"unet/{STEM}.fp16.bin"], [0, 1, 2]),
    ([f"unet/{STEM}-00001-of-00002.fp16.safetensors", f"unet/{STEM}.safetensors.fp16.index.json",  # as diffusers 0.28 has them
      f"unet/{STEM}-00001-of-00002.safetensors", f"unet/{STEM}.ema.safetensors"], [0, 1]),
    (["text2video_pytorch_model.pth", "unet/config.json", "model_scope_v1-4_0600000.pth"], [0]),
    (["unet/config.json", "unet/optimizer.bin", f"unet/{STEM}.safetensors.tmp", f"x/unet/{STEM}.bin"], [])])
def test_which_files_of_a_repository_are_needed(files, unet):
    assert weights.hub_files(files) == {"unet": [files[i] for i in unet], "vae": [], "text_encoder": []}


# ------------------------------------------------------ A base in use ------------------------------------------------------

@pytest.fixture
def base(parts):
    unet = UNet3D(UNET)
    unet.load_state_dict(without_lora(parts[0]))
    return Base(unet.requires_grad_(False), parts[1], built(lambda: TextEncoder(TEXT)), "small")


def test_weights_have_one_fingerprint_in_every_precision(base):
    tiny = base.network.conv_in.weight.data
    tiny[0] = torch.tensor([1e-30, -1e-30, 0.]).repeat(12).view_as(tiny[0])  # what fp16 rounds to zero; 1.4 B weights have such
    name = published.fingerprint(base.network.state_dict())
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        assert published.fingerprint(base.network.to(dtype).state_dict()) == name
    lora.inject(base.network)
    assert published.fingerprint(base.network.state_dict()) == lora.base_fingerprint(base.network) == name
    base.network.conv_out.weight.data[0, 0, 0, 0] *= -1
    assert published.fingerprint(base.network.state_dict()) != name


def test_cached_latents_and_text_belong_to_weights_and_precision(base):
    """train.py's cache is named by these fingerprints."""
    other = Base(base.network, built(lambda: Autoencoder(VAE), 1), built(lambda: TextEncoder(TEXT), 1), "other")
    named = []
    for of_base, dtype in ((base, torch.float32), (base, torch.bfloat16), (other, torch.float32), (base, torch.float32)):
        of_base.vae.to(dtype)
        named.append(of_base.fingerprints())
    assert len({vae for vae, _ in named[:3]}) == len({text for _, text in named[:3]}) == 3 and named[3] == named[0]

    frames = torch.rand(2, 3, 16, 16)
    assert torch.equal(base.encode(frames)[0].transpose(0, 1), base.vae.encode(frames))
    features = base.encode_captions(["a cat"]), base.encode_captions(["a dog"])
    assert not {"a cat", "a dog"} & base.texts.keys()  # those of thousands of clips are not kept on the accelerator
    assert torch.equal(torch.cat(features), base.encode_text(["a cat", "a dog"]))


# --------------------------------------------------------- The reward ---------------------------------------------------------

def test_rewards_by_path(parts):
    half = {k: v.half().contiguous() for k, v in parts[3].state_dict().items()}
    for kind, name in (("hpsv2", "HPS_v2_compressed.pt"), ("hpsv2.1", "HPS_v2.1_compressed.pt"), ("hpsv2.1", "copy.safetensors")):
        write_file(Path(name), half if name.endswith("safetensors") else {"state_dict": half, "epoch": np.float64(3)})
        hps = reward.load_reward(kind, name, dtype=torch.float16)
        assert hps.name == ("HPSv2.0" if kind == "hpsv2" else "HPSv2.1") and holds(hps.clip, half)
    wrong_name = "does not hold HPS v2.*: the scores would carry the wrong name"
    refused(f"HPS_v2.1_compressed.pt {wrong_name}", reward.load_reward, "hpsv2", "HPS_v2.1_compressed.pt")
    refused(f"HPS_v2_compressed.pt {wrong_name}", reward.load_reward, "hpsv2.1", "HPS_v2_compressed.pt")
    assert holds(reward.load_reward("hpsv2", "random").clip, reward.load_reward("hpsv2", "random:32").clip.state_dict())
    for path in ("random_weights.pt", "random:x"):  # are paths
        refused(f"{path}: no such file", reward.load_reward, "hpsv2", path)

    write_file(Path("reward/config.json"), CLIP)  # a small one brings words of its own
    write_file(Path("reward/model.safetensors"), half)
    Path("reward/words.txt").write_text("77\na\ncat")
    hps = reward.load_reward("hpsv2", "reward")
    assert hps.name == "HPStiny" and hps.tokenizer(["a cat"])[0, :5].tolist() == [1, 3, 4, 5, 0]


def test_rewards_from_the_hub_or_the_base(hub, parts, tmp_path):
    for name in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        write_file(tmp_path / "repo" / name, {"state_dict": parts[3].state_dict()})
    downloads, server = hub(tmp_path / "repo", "xswu/HPSv2")
    inside = tmp_path / "base/unet"
    inside.mkdir(parents=True)
    for kind, name in (("hpsv2", "HPSv2.0"), ("hpsv2.1", "HPSv2.1"), ("hpsv2", "HPSv2.0")):
        assert reward.load_reward(kind, None, inside).name == name
    assert downloads == ["HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"]

    server.shutdown()
    server.server_close()
    for path in Path("cache").glob("models--*/snapshots/*/*"):
        path.unlink()
    write_file(tmp_path / "base/HPS_v2.pt", {"state_dict": parts[3].state_dict()})  # as in InstructVideo's folder
    for folder in (inside, inside.parent):
        assert reward.load_reward("hpsv2", None, folder).name == "HPSv2.0"
    for kind, folder in (("hpsv2.1", inside), ("hpsv2", tmp_path)):  # v2.0 never stands in for v2.1
        refused(rf"reward {kind}: cannot be downloaded \(.*\); get HPS_v2", reward.load_reward, kind, None, folder)


# ------------------------------------------------------- A run to resume -------------------------------------------------------

def test_damaged_metrics_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for line in (b'{"step": "1"}', b'{"step": 1, "eval": {"a": {"reward_mean": "high"}}}', b"\xff", b"[" * 9999):
        path.write_bytes(line + b'\n{"step": 1}\n')
        refused("metrics.jsonl, line 1: not what a run logs", run_folder.read_metrics, path)


def test_the_same_command_with_resume_continues():
    """What a repeatable flag says takes the place of what the run has, and is not added to it."""
    parse = partial(run_settings.parse, presets=train.PRESETS, description="")
    flags = ["--reward", "hpsv2", "--reward", "action:left=0.5", "--watch", "motion", "--lr", "0.1", "--no-cache"]
    resume = ["--resume", "run"]
    cfg = parse(flags)
    record = run_settings.to_record(cfg)
    config = write_file(Path("run/config.json"), record)
    assert parse([*flags, *resume]) == replace(cfg, resume=Path("run"))
    assert parse([*resume, "--steps", "50"]) == replace(cfg, resume=Path("run"), steps=50)
    refused("watch would make it another run", parse, [*resume, "--watch", "flicker"])
    for name, value in (("steps", "many"), ("lr", None), ("seed", 1.5)):  # not of the setting's type
        write_file(config, record | {name: value})
        refused(f"config.json: {name} = {value!r} is not of this setting's type", parse, resume)
    write_file(config, json.dumps(record)[:-9])
    refused("config.json: expected JSON", parse, resume)


def test_a_preset_is_found_by_its_base(capsys):
    write_file(Path("folder/unet/config.json"), {"_class_name": "UNetSpatioTemporalConditionModel"})
    for base, preset in (("folder", "svd"), ("random:32", "modelscope"), (weights.HUB_BASES["wan"], "wan"),
                         ("random-opensora", "opensora"), (str(weights.TINY), "tiny")):
        for presets in (train.PRESETS, vader.PRESETS):
            say_once.cache_clear()
            cfg = run_settings.parse([f"--base={base}", "--fps", "5"], presets, "", weights.preset_of)
            assert cfg == replace(presets[preset], base=base, fps=5)
            assert capsys.readouterr().out.startswith(f"preset {preset}, that of base {base}, as none")
    refused("an/other: not there, or without training settings; name a preset: ", run_settings.parse, ["--base", "an/other"],
            train.PRESETS, "", weights.preset_of)
    assert run_settings.parse(["wan", "--base", "folder"], train.PRESETS, "", weights.preset_of).preset == "wan"


def test_a_run_may_be_moved(monkeypatch):
    monkeypatch.setattr(clips, "COUNT", 2)
    flags = "--steps 1 --batch-size 1 --num-steps 1 --tau 1 --eval-every 0 --device cpu --out run"
    assert train.main(flags.split()) == 0
    shutil.copytree("run", "far/away")
    before, metrics = contents(Path("run")), Path("far/away/metrics.jsonl")
    assert train.main(["--resume", "far/away", "--steps", "2"]) == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2]
    assert contents(Path("run")) == before and not same_tensors("run/lora.safetensors", "far/away/lora.safetensors")
