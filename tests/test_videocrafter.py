"""bases/videocrafter.py: levels by hand, files under the published names, diffusers' class with a hook, PEFT, and short runs."""
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import adapted, assert_near, docs_example, randn32 as randn, random_base, refused, write_file

import evaluate
import generate
import lora
import sampler
import train
from bases import videocrafter
from formats import adapters, tensor_names as names, weights
from formats.known_rewards import requested_rewards
from methods import vader
from model import UNetConfig, load_base
from support import settings

FRAMES, HEIGHT, WIDTH = 3, 32, 48
TEXT = "cond_stage_model.model."
close = partial(assert_near, share=1e-5)


@pytest.fixture(scope="module")
def base():
    return fresh()


def fresh():
    return random_base("videocrafter", .05)


def noise_like(base, seed=0):
    return randn(1, *base.latent_shape(FRAMES, HEIGHT, WIDTH), seed=seed)


def call(network, base, fps=28, seed=0):
    """What a network says of fixed latents at step 501."""
    asked = noise_like(base, seed), torch.tensor([501]), base.encode_text(["a cat"])
    return network(*asked, torch.tensor([float(fps)]))


def test_the_signal_is_scaled_and_the_noise_is_not():
    scale, L = videocrafter.scales(), videocrafter.levels(4)
    assert len(scale) == 1000 and scale[0] == 1 and scale[133].item() == pytest.approx(.9)
    assert (scale[399:] - .7).abs().max() < 1e-15
    plain = sampler.ddim_levels(4, sampler.alpha_bars())
    assert L.t == plain.t == [0, 1, 251, 501, 751] and L.sigma == plain.sigma and L.start == 1
    by_hand = [1, 1 - .3 / 399, 1 - .3 * 251 / 399, .7, .7]
    assert [a / b for a, b in zip(L.alpha, plain.alpha)] == pytest.approx(by_hand)
    # A step's fresh noise is DDPM's, of abar alone: at step 4, by its definition.
    abar = sampler.alpha_bars()
    ddpm = ((1 - abar[501]) / (1 - abar[751]) * (1 - abar[751] / abar[501])) ** .5
    assert L.fresh == pytest.approx(plain.fresh) and L.fresh[4] == pytest.approx(ddpm.item())
    general = sampler.Levels(L.t, L.alpha, L.sigma).fresh
    assert abs(general[3] - L.fresh[3]) > .01  # what follows from alpha and sigma is another


def test_the_authors_levels_are_ours_where_they_divide():
    for D in (1, 5, 20, 25, 50):
        ours, theirs = videocrafter.levels(D), videocrafter.levels(D, published=True)
        assert (ours.t, ours.alpha, ours.fresh) == (theirs.t, theirs.alpha, theirs.fresh)
    assert videocrafter.levels(6, published=True).t == [0, 1, 167, 333, 499, 665, 831, 997]
    assert videocrafter.levels(6).t == [0, 1, 167, 333, 499, 665, 831]
    refused("num_steps = 3: the authors' levels end at 1000", videocrafter.levels, 3, published=True)
    for D in (0, 1000):
        refused(f"num_steps = {D}: must be from 1 to 999", videocrafter.levels, D)


def test_a_network_that_knows_the_noise_leads_the_chain_home(base, monkeypatch):
    z, eps, L = noise_like(base, 1), noise_like(base, 2), base.levels(5)
    monkeypatch.setattr(base.network, "forward", lambda z_t, *told: eps.expand(len(z_t), -1, -1, -1, -1))
    text = base.encode_text(["a cat"])
    home = sampler.edit(base.predict, z, eps, text, text, L, tau=.8)
    close(home, L.alpha[0] * z + L.sigma[0] * eps)
    # Of one step at eta = 1: what is left of the noise, and the fresh one.
    z_t, fresh = sampler.add_noise(z, eps, L, 3), noise_like(base, 3)
    one = sampler.chain(base.predict, z_t, text, text, L, 3, 12., 0, 1., [fresh], last=3)
    kept = (1 - sampler.alpha_bars()[201] - L.fresh[3] ** 2) ** .5
    close(one, L.alpha[2] * z + kept.item() * eps + L.fresh[3] * fresh)


def test_training_levels_are_those_of_the_chain_and_the_loss_is_the_noises(base):
    t, alpha, sigma = level = base.level(torch.tensor([.2015, .9]))
    L = base.levels(5)
    assert t.tolist() == [201, 900] and alpha.shape == (2, 1, 1, 1, 1)
    assert (alpha[0].item(), sigma[0].item()) == pytest.approx((L.alpha[2], L.sigma[2]), abs=1e-6)
    assert alpha[1].item() == pytest.approx(.7 * sampler.alpha_bars()[900].item() ** .5, abs=1e-6)
    z, noise = torch.cat([noise_like(base, 1)] * 2), torch.cat([noise_like(base, 2)] * 2)
    text = base.encode_text(["a cat", "a dog"])
    z_0, eps = base.predict(alpha * z + sigma * noise, level, text)
    said = base.network(alpha * z + sigma * noise, t, text, torch.tensor([28., 28.]))
    close(eps, said)
    close(alpha * z_0 + sigma * eps, alpha * z + sigma * noise)
    close(base.error(z_0, eps, z, noise, level), (said - noise).square().flatten(1).mean(1))


def test_the_network_is_told_the_frame_rate(base):
    assert (call(base.network, base) - call(base.network, base, fps=8)).abs().max() > .01
    level, text = (501, .5, .8), base.encode_text(["a cat"])
    for fps in (28, 8):
        told = replace(base, fps=fps).predict(noise_like(base), level, text)[1]
        assert torch.equal(told, call(base.network, base, fps))
    untold = base.network(noise_like(base), torch.tensor([501]), text)
    assert base.fps == 28 and torch.equal(untold, call(base.network, base))
    cfg = replace(train.PRESETS["videocrafter"], fps=12)
    assert settings.fit_to_base(cfg, mine := replace(base)).guidance == 12 and mine.fps == 12


CONFIG = {"unet": dict(in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[1], num_res_blocks=1,
                       channel_mult=[1, 2], num_head_channels=16, transformer_depth=1, context_dim=64, use_linear=True,
                       temporal_conv=True, temporal_attention=True, temporal_selfatt_only=True, use_relative_position=False,
                       use_causal_attention=False, temporal_length=4, addition_attention=True, fps_cond=True),
          "vae": dict(double_z=True, z_channels=4, resolution=512, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1, 1, 1],
                      num_res_blocks=1, attn_resolutions=[], dropout=0.),
          "scale_factor": .18215, "use_scale": True, "scale_b": .7, "linear_start": .00085, "linear_end": .012, "timesteps": 1000}
PORT = names.unet_to_diffusers(UNetConfig(**videocrafter.SMALL[0])) | {
    "_class_name": "UNet3DVideoCrafterConditionModel", "fps_cond": True, "sample_size": None}


def official(name):
    """A name of ModelScope's as VideoCrafter2 has it."""
    name = name.replace("input_blocks.0.1.", "init_attn.0.")
    name = re.sub(r"fps_embedding\.linear_([12])", lambda m: f"fps_embedding.{2 * int(m[1]) - 2}", name)
    return re.sub(r"(input_blocks\.\d+)\.op", r"\1.0.op", name)


def whole(base):
    """The tensors of a model.ckpt: three parts, the text tower with a last block that is not used, and buffers."""
    unet = names.unet_to_official(base.network.state_dict(), base.network.config)
    tensors = {f"model.diffusion_model.{official(name)}": t for name, t in unet.items()}
    vae = base.vae.state_dict()
    table = names.official_vae_names(base.vae.config, vae)
    tensors |= {f"first_stage_model.{table[name]}": t for name, t in vae.items()}
    text = base.text_encoder.state_dict()
    last = {name.replace("resblocks.1.", "resblocks.2."): t for name, t in text.items() if "resblocks.1." in name}
    tensors |= {TEXT + name: t for name, t in (text | last).items()}
    return tensors | {TEXT + "text_projection": torch.ones(2, 2), "scale_arr": torch.ones(1400), "betas": torch.ones(1000)}


@pytest.fixture(scope="module")
def published(base, tmp_path_factory):
    """A folder as the authors publish it, at small size."""
    folder = tmp_path_factory.mktemp("videocrafter")
    write_file(folder / "model.ckpt", {"state_dict": whole(base)})
    write_file(folder / "config.json", CONFIG)
    return folder


def test_the_names_that_are_not_modelscopes(base):
    for name in ("init_attn.0.proj_in.weight", "input_blocks.2.0.op.bias", "fps_embedding.0.weight", "fps_embedding.2.bias",
                 "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", "input_blocks.1.0.temopral_conv.conv4.3.weight",
                 "middle_block.2.norm.weight", "output_blocks.1.1.conv.weight", "out.2.weight"):
        assert f"model.diffusion_model.{name}" in whole(base), name
    with torch.device("meta"):
        assert sum(p.numel() for p in videocrafter.VideoCrafterUNet(UNetConfig()).parameters()) == 1_413_284_420


@pytest.mark.parametrize("given", ["folder", "file"])
def test_the_one_file_is_read(base, published, given):
    read = load_base(str(published if given == "folder" else published / "model.ckpt"))
    assert type(read) is videocrafter.Base and read.default_size == "320x512" and read.text_encoder.config.layers == 2
    assert torch.equal(call(read.network, base), call(base.network, base))
    frames, z = randn(2, 3, 32, 32).clamp(-1, 1), noise_like(base)
    for ours, theirs in ((read.encode(frames), base.encode(frames)), (read.encode_text(["a cat"]), base.encode_text(["a cat"])),
                         (read.decode_frames(z, torch.tensor([[2, 0]])), base.decode_frames(z)[:, [2, 0]])):
        close(ours, theirs)


def test_the_port_is_read_with_what_lies_beside_it(base, tmp_path):
    write_file(tmp_path / "port/diffusion_pytorch_model.safetensors", base.network.state_dict())
    write_file(tmp_path / "port/config.json", PORT)
    refused("has no autoencoder; expected .* or --vae", load_base, str(tmp_path / "port"))
    write_file(tmp_path / "vae.safetensors", base.vae.state_dict())
    write_file(tmp_path / "vae/config.json", names.vae_to_diffusers(base.vae.config))
    write_file(tmp_path / "vae/model.safetensors", base.vae.state_dict())
    read = load_base(str(tmp_path / "port"), vae=str(tmp_path / "vae"))
    assert type(read) is videocrafter.Base and torch.equal(call(read.network, base), call(base.network, base))

    # Without its text tower it does all but captions.
    refused("port has no text encoder", read.encode_text, ["a cat"])
    assert not read.is_cut("word " * 100) and read.fingerprints()[1] == "none"
    read.release_encoders()
    close(read.decode_frames(noise_like(base)), base.decode_frames(noise_like(base)))
    text = {k.removeprefix(TEXT): t for k, t in whole(base).items() if k.startswith(TEXT)}
    file = write_file(tmp_path / "open_clip_pytorch_model.bin", text)
    read = load_base(str(tmp_path / "port"), vae=str(tmp_path / "vae"), text_encoder=str(file))
    close(read.encode_text(["a cat"]), base.encode_text(["a cat"]))
    (tmp_path / "port").rename(tmp_path / "unet")
    assert weights.find_base_file(str(tmp_path), ()) == ("videocrafter", tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"use_scale": False}, "config.json: .*expected use_scale True, found False"), ({"scale_b": .5}, "expected scale_b 0.7"),
    ({"unet": CONFIG["unet"] | {"fps_cond": False}}, "expected fps_cond True"), ({"unet": {}}, "config.json: not the config")])
def test_another_structure_is_refused(published, tmp_path, change, message):
    (tmp_path / "model.ckpt").symlink_to(published / "model.ckpt")
    write_file(tmp_path / "config.json", CONFIG | change)
    refused(message, load_base, str(tmp_path))


@pytest.mark.parametrize("lost, message", [("first_stage_model", "has no autoencoder; expected first_stage_model"),
                                           ("model.diffusion_model.init_attn", "model.ckpt: .*tensors missing .*transformer_in")])
def test_a_file_that_lacks_a_part_is_refused(base, tmp_path, lost, message):
    write_file(tmp_path / "model.ckpt", {name: t for name, t in whole(base).items() if not name.startswith(lost)})
    write_file(tmp_path / "config.json", CONFIG)
    refused(message, load_base, str(tmp_path))


@torch.no_grad()
def test_vaders_released_adapters_load(base, tmp_path):
    tuned = adapted(fresh(), rank=2, letters="qkv")
    assert {layer.scale for layer in lora.layers(tuned.network).values()} == {4.}
    assert len(lora.layers(tuned.network)) * 4 == len(lora.projections(tuned.network)) * 3
    tensors = {}
    for name, t in lora.adapter_state(tuned.network).items():
        path, half = adapters.NAME.fullmatch(name).groups()
        theirs, = names.unet_to_official({f"{path}.weight": t}, base.network.config)
        tensors[f"base_model.model.model.diffusion_model.{official(theirs).removesuffix('weight')}lora_{half}.weight"] = t
    assert "base_model.model.model.diffusion_model.init_attn.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in tensors
    assert "base_model.model.model.diffusion_model.middle_block.2.transformer_blocks.0.attn2.to_v.lora_B.weight" in tensors
    file = write_file(tmp_path / "vader_videocrafter.pt", tensors)
    lora.load((read := fresh()).network, file)
    assert torch.equal(call(read.network, base), call(tuned.network, base))
    assert (call(read.network, base) - call(base.network, base)).abs().max() > .01
    refused("adapts .* projections .qkv., the model's adapters", lora.load, adapted(fresh(), 2).network, file)
    missing = write_file(tmp_path / "missing.pt", dict([*tensors.items()][2:]))
    refused("2 tensors missing", lora.load, fresh().network, missing)


@torch.no_grad()
def test_adapters_of_three_projections_go_out_and_come_back(base, tmp_path):
    tuned = adapted(fresh(), rank=2, alpha=1., letters="qkv")
    lora.save(tuned.network, tmp_path / "lora.safetensors")
    adapters.export(tmp_path / "lora.safetensors", "peft", tmp_path / "peft")
    assert adapters.read_json(tmp_path / "peft/adapter_config.json")["target_modules"] == ["to_q", "to_k", "to_v"]
    for file in ("lora.safetensors", "peft"):
        lora.load((read := fresh()).network, tmp_path / file)
        assert torch.equal(call(read.network, base), call(tuned.network, base))
    refused(r"adapts .* \(qkv\), the model's", lora.load, adapted(fresh(), 2, 1.).network, tmp_path / "lora.safetensors")


@torch.no_grad()
def test_the_lines_of_the_docs_put_an_adapter_onto_diffusers_unet(base, aside):
    """docs/bases.md, as it stands, but for the class that the port's config names."""
    tuned = adapted(fresh())
    lora.save(tuned.network, "lora.safetensors")
    adapters.export("lora.safetensors", "peft", "out/peft")
    write_file(Path("videocrafterv2_diffusers/diffusion_pytorch_model.safetensors"), base.network.state_dict())
    write_file(Path("videocrafterv2_diffusers/config.json"), {k: v for k, v in PORT.items() if k != "stem_heads"})
    exec(docs_example("bases.md", "PeftModel"), here := {})
    asked = noise_like(base), torch.tensor([501]), base.encode_text(["a cat"])
    theirs = here["unet"](*asked).sample
    assert type(here["unet"].base_model.model).__name__ == "UNet3DConditionModel"
    close(call(tuned.network, base), theirs, share=1e-4)
    assert (theirs - call(base.network, base)).abs().max() > .01


def test_generate_and_evaluate_tell_the_frame_rate(animals, monkeypatch):
    made, load_model = [], generate.load_model

    def watched(cfg, device):
        made.append(load_model(cfg, device)[0])
        return made[-1], False
    monkeypatch.setattr(generate, "load_model", watched)
    for fps in (12, None):
        generate.main(generate.Config(base="random-videocrafter", frames=1, size=32, device="cpu", prompt=["a cat"], num_steps=1,
                                      fps=fps, out=Path(f"video-{fps}")))
    monkeypatch.setattr(evaluate, "load_model", watched)
    monkeypatch.setattr(evaluate, "load_rewards", lambda *args, **more: 1 / 0)  # far enough
    with pytest.raises(ZeroDivisionError):
        evaluate.main(evaluate.Config(base="random-videocrafter", frames=1, size=32, device="cpu", prompts=("a=prompts.txt",),
                                      fps=9, segments=1))
    assert [base.fps for base in made] == [12, 28, 9]


def test_the_preset_is_vaders():
    cfg = vader.PRESETS["videocrafter"]
    assert (cfg.num_steps, cfg.eta, cfg.guidance, cfg.frames, cfg.size, cfg.fps) == (25, 1., 12., 12, "320x512", 24)
    assert (cfg.rank, cfg.lora_alpha / cfg.rank, cfg.lora_layers, cfg.frames_scored, cfg.lr) == (16, .5, "qkv", 1, 2e-4)
    assert requested_rewards(cfg)[0] == [(.5, "hpsv2.1/stretch"), (.075, "aesthetic")]
    with torch.device("meta"):
        unet = videocrafter.VideoCrafterUNet(UNetConfig())
    parameters = lora.inject(unet, cfg.rank, cfg.lora_alpha, None, cfg.lora_layers)
    assert (sum(p.numel() for p in parameters), len(lora.layers(unet))) == (5_015_552, 198)
    refused("lora_alpha = 0", train.check, replace(train.Config(), lora_alpha=0.))
    refused("preset modelscope: is not for base random-videocrafter", settings.fit_to_base, train.PRESETS["modelscope"],
            load_base("random-videocrafter"))
