"""
What a training step costs. The full-size step is counted on the meta device, which has shapes and no memory, and held to the
method's floor: guided steps tau D times, the last with gradient; S frames decoded and scored; nothing run twice.
"""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import lora
import model
import train
from bases.deep_cache import denoiser
from benchmark import PARTS, Config, Meter, comparable, contenders, count, measure, on_meta, synthetic
from model import Autoencoder, Base, TextConfig, TextEncoder, UNet3D, UNetConfig, VAEConfig
from reward import load_reward
from support.memory import measure_host_peak, measure_peak

# TFLOP of the networks at full size, 16 x 32 x 32 latents (multiply-adds x 2), and of a step's least work for one video with
# cached latents: 24 denoiser calls, the last 2 with gradient to their inputs, 4 frames and pictures with gradient to theirs.
UNET, DECODE, ENCODE, IMAGE, TEXT = 4.89, 0.62, 0.27, 0.33, 0.05
FLOOR = 134.7


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# Full size

FULL = Config(base="random", batch_size=1, device="meta", diffusers=False)


@pytest.fixture(scope="module")
def full():
    return benchmark.load(FULL, torch.device("meta"))


def tflop(run, *shapes, dtype=torch.float32):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(*(torch.empty(s, device="meta", dtype=dtype) for s in shapes))
    return counter.get_total_flops() / 1e12


def test_networks_at_full_size(full):
    base, reward = full
    within = dict(rel=0.02)
    assert tflop(base.denoiser, (1, 4, 16, 32, 32), (1,), (1, 77, 1024)) == pytest.approx(UNET, **within)
    assert tflop(base.vae.decode, (1, 4, 32, 32), dtype=base.vae.post_quant_conv.weight.dtype) == pytest.approx(DECODE, **within)
    assert tflop(base.vae.encode, (1, 3, 256, 256)) == pytest.approx(ENCODE, **within)
    weights = reward.clip.visual.conv1.weight.dtype
    assert tflop(reward.clip.encode_image, (1, 3, 224, 224), dtype=weights) == pytest.approx(IMAGE, rel=0.02)
    assert tflop(lambda: reward.text_features(["a bear"])) == pytest.approx(TEXT, rel=0.1)  # 0.047, of which two digits are known


def test_the_step_at_full_size_does_the_least_work(full):
    work, calls = count(*full, FULL)["ours"]
    assert calls == {"chain": 22, "last step": 2, "decode": 4, "reward": 4}
    assert 0.95 * FLOOR < sum(work.values()) < 1.05 * FLOOR
    forward = {"chain": 22 * UNET, "last step": 2 * UNET, "decode": 4 * DECODE, "reward": 4 * IMAGE}
    for part, expected in forward.items():
        assert work[part] == pytest.approx(expected, rel=0.02), part
    # No gradient of frozen weights and nothing recomputed: the way back costs what the way there did.
    assert work["backward"] == pytest.approx(sum(forward.values()) - forward["chain"], rel=0.02)
    assert work["optimizer"] == 0


def test_a_chain_step_from_the_cache_does_two_fifths_of_the_work(full):
    """DeepCache: the outermost level, whose latents have the most pixels."""
    base, _ = full
    cached, shapes = denoiser(base, 2), ((1, 4, 16, 32, 32), (1,), (1, 77, 1024))
    assert tflop(cached, *shapes) == pytest.approx(UNET, rel=.02) and tflop(cached, *shapes) == pytest.approx(1.66, rel=.01)


# ---------------------------------------------------------------------------------------------------------------------
# A small structure that diffusers can build too, with weights everywhere: zeros left from the start would hide a mistake

SMALL = UNetConfig(channels=(16, 32), blocks_per_level=1, attention_levels=(False, True), context_dim=16, head_dim=8,
                   stem_heads=8, norm_groups=8, sample_size=8)
SHORT = Config(base="small", batch_size=2, frames=4, size=16, num_steps=5, steps=1)


ONE_LEVEL = replace(SMALL, channels=(16,), attention_levels=(True,), stem_heads=1)  # on meta what takes time is operations


def small(config=ONE_LEVEL, seed=0):
    """(base, reward) on which a step takes a fraction of a second."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = Base(UNet3D(config), Autoencoder(VAEConfig(channels=(8, 16), blocks_per_level=1, norm_groups=4)),
                    TextEncoder(TextConfig(width=16, heads=1, layers=1)), "small")
        for module in (base.unet, base.vae, base.text_encoder):
            module.eval().requires_grad_(False)
        for p in base.unet.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return base, load_reward(weights="random:32")


def trained(base):
    """Adapters that differ from their start, where A would have no gradient."""
    for i, layer in enumerate(lora.layers(base.unet).values()):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=seeded(i))


def gradient(contender, batch):
    for p in contender.parameters:
        p.grad = None
    R = contender.rewards(batch)
    (-R.sum()).backward()
    return R.detach(), torch.cat([p.grad.flatten() for p in contender.parameters])


def test_the_steps_on_diffusers_are_the_same_method():
    (base, reward), meter = small(SMALL), Meter()
    cfg = replace(SHORT, diffusers=False)
    field = contenders(base, reward, cfg, meter)
    trained(base)
    settings = replace(train.PRESETS["modelscope"], tau=cfg.tau, num_steps=cfg.num_steps)
    batch = synthetic(base, cfg)
    R, grad = gradient(field["ours"], batch)
    assert grad.abs().max() > 0
    for lean in (False, True):
        meter.start(lambda: 0)
        R_theirs, theirs = gradient(benchmark.on_diffusers(base, reward, settings, meter, lean), batch)
        torch.testing.assert_close(R_theirs, R, rtol=1e-4, atol=1e-6)
        assert torch.cosine_similarity(grad, theirs, dim=0) > 0.9999 and (grad - theirs).norm() < 1e-3 * grad.norm()
        assert meter.calls == {"chain": 8, "last step": 4, "decode": 8, "reward": 8}  # F = S here


def test_counting_the_chain_by_one_of_its_calls():
    """On the meta device one call of the chain stands for all: the sum is that of a count without such haste."""
    base, reward = small()
    work, _ = count(base, reward, replace(SHORT, diffusers=False))["ours"]
    base, reward = Base(*map(on_meta, (base.unet, base.vae, base.text_encoder)), "small"), on_meta(reward)
    batch, uncond = synthetic(base, SHORT), base.encode_text([""])
    lora.inject(base.unet)
    settings = replace(train.Config(), tau=SHORT.tau, num_steps=SHORT.num_steps, guidance=3.)
    reward.text_features(batch[-1])
    with FlopCounterMode(display=False) as counter:
        train.edit_rewards(base, reward, uncond, batch, settings)[0].sum().backward()
    assert counter.get_total_flops() / 1e12 == pytest.approx(sum(work.values()), rel=1e-2)


@pytest.mark.slow
def test_saving_memory_recomputes():
    """Activations: the UNet's blocks. Low memory: those, the decoder and the reward, each once more."""
    (base, reward), cfg = small(SMALL), replace(SHORT, batch_size=1, num_steps=2, tau=1., diffusers=False)
    flags = ({}, {"checkpoint_activations": True}, {"low_memory": True})
    (plain, calls), (blocks, _), (low, low_calls) = (count(base, reward, replace(cfg, **f))["ours"] for f in flags)
    assert calls == low_calls == {"chain": 2, "last step": 2, "decode": 4, "reward": 4}
    for part in PARTS:
        if part != "backward":
            assert plain[part] == blocks[part] == pytest.approx(low[part], rel=1e-3)
    assert 0.4 * plain["last step"] < blocks["backward"] - plain["backward"] < plain["last step"]  # its stem is no block
    again = plain["decode"] + plain["reward"]
    assert low["backward"] - blocks["backward"] == pytest.approx(again, rel=0.02)


def test_memory_does_not_grow_with_the_chain():
    """What a step keeps for its backward pass is the same for any D and tau; it grows with K alone."""
    base, reward = small()
    lora.inject(base.unet)
    batch, uncond = synthetic(base, SHORT), base.encode_text([""])

    def kept(**settings):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            train.edit_rewards(base, reward, uncond, batch, replace(train.Config(guidance=3.), **settings))
        return sum(sizes)

    first, *others = (kept(tau=tau, num_steps=D) for tau, D in ((0.6, 5), (0.6, 10), (1., 10), (0.2, 5)))
    assert all(other == first for other in others)
    assert kept(tau=0.6, num_steps=5, grad_steps=2) > 1.5 * first
    base.unet.checkpoint_activations()
    assert kept(tau=0.6, num_steps=5, low_memory=True) < first / 3


# ---------------------------------------------------------------------------------------------------------------------
# Expected memory

def test_what_is_alive_is_counted_as_an_allocator_would():
    """Of a chain of products, those that the backward pass needs stay; the others go as soon as the next is made."""
    module = torch.nn.Linear(1, 1, device="meta")
    x = torch.empty(1000, device="meta", requires_grad=True)

    def kept():
        return (x.exp() * 2).sin()  # exp keeps its result, sin its input: 4000 bytes each, and the result itself
    peak = measure_peak(kept, [module])
    assert (peak.weights, peak.saved) == (8, 8000)
    assert 8 + 5 * 4000 <= peak.total <= 8 + 5 * 4000 + 100  # those, the result, sin's derivative, and its gradient

    def passing():
        with torch.no_grad():
            for _ in range(5):
                y = x + 1
                y = y + 1
        return y * x
    peak = measure_peak(passing, [module])
    assert peak.saved == 4000 and peak.total <= 8 + 4 * 4000


@pytest.mark.slow
def test_saved_activations_are_those_that_torch_saves():
    """The same step on the CPU, with numbers: distinct storages that its graph keeps, weights left out."""
    base, reward = small(SMALL)
    for name, flags in benchmark.MEMORY_SETTINGS.items():
        expected = benchmark.count_memory(base, reward, SHORT, torch.float32, (1, 2))[name]
        (other, other_reward), saved = small(SMALL), {}
        lora.inject(other.unet)
        other.unet.checkpoint_activations("checkpoint" in name or "low" in name)
        batch, uncond = synthetic(other, SHORT), other.encode_text([""])
        other_reward.text_features(batch[-1])
        modules = (other.unet, other.vae.decoder, other_reward)
        weights = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}

        def pack(t):
            if t.untyped_storage().data_ptr() not in weights:  # noqa: B023
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()  # noqa: B023
            return t
        settings = replace(train.PRESETS["modelscope"], num_steps=1, tau=1., **flags)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            graph = train.edit_rewards(other, other_reward, uncond, batch, settings)[0]
        assert expected[2]["saved"] == pytest.approx(sum(saved.values()) / 2**30, rel=0.03), name
        assert graph.requires_grad
        assert expected[2]["total"] >= expected[2]["saved"] + expected[2]["weights"] - 1e-9


@pytest.fixture(scope="module")
def least():
    """count_memory of a step with --low-memory, which has all other settings in it, and of an evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "MEMORY_SETTINGS", {"--low-memory": {"low_memory": True}})
        return benchmark.count_memory(*small(), SHORT, torch.float32, (1, 2, 4))


def test_every_clip_adds_as_much_as_the_one_before(least):
    """So that two counts tell all of them."""
    settings = replace(train.PRESETS["modelscope"], num_steps=1, tau=1., low_memory=True)
    base, reward = small()
    base, reward = Base(*(on_meta(part) for part in (base.unet, base.vae, base.text_encoder)), "small"), on_meta(reward)
    lora.inject(base.unet)
    base.unet.checkpoint_activations()
    batch, uncond = synthetic(base, replace(SHORT, batch_size=4)), base.encode_text([""])
    reward.text_features(batch[-1])
    peak = measure_peak(lambda: train.edit_rewards(base, reward, uncond, batch, settings)[0],
                        [base.unet, base.vae.decoder, reward]).in_gib()
    for part in ("total", "saved"):
        assert least["--low-memory"][4][part] == pytest.approx(peak[part], rel=0.02), part


@pytest.mark.slow
def test_the_expected_memory_is_what_a_step_takes_on_the_cpu(tmp_path):
    """Within 15% in each memory setting; measured 0.99 to 1.01 at --base random:64 --size 128. In a process of its own."""
    command = [sys.executable, "benchmark.py", "--base", "random:32", "--size", "96", "--batch-size", "1", "--host-memory",
               "--out", str(tmp_path / "report.json")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(benchmark.__file__).parent).stdout
    found = json.loads((tmp_path / "report.json").read_text())["host_memory"]
    assert list(found) == [*benchmark.MEMORY_SETTINGS]
    for name, gib in found.items():
        assert gib["expected"] > .1 and gib["measured"] == pytest.approx(gib["expected"], rel=.15), name
        assert f"{gib['ratio']:.2f} times as much" in said


def test_host_memory_is_the_cpus_and_linuxs(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="device 'cuda': must be cpu with host_memory"):
        measure(Config(host_memory=True, device="cuda", out=tmp_path / "report.json"))
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="host_memory: can be measured on Linux alone"):
        measure_host_peak(lambda: None)


def test_an_evaluation_needs_less_memory_than_a_step(least):
    """Of as many videos as clips; else what fits while training would not when it is evaluated."""
    for clips, peak in least[benchmark.EVALUATION].items():
        assert peak["saved"] == 0 < peak["transient"] and peak["total"] < least["--low-memory"][clips]["total"]


@pytest.mark.slow
def test_one_clip_at_full_size(full, monkeypatch):
    """On cards of 24 GiB one clip fits without further flags, if only just."""
    monkeypatch.setattr(benchmark, "MEMORY_SETTINGS", {"no flag": {}})
    peak = benchmark.count_memory(*full, FULL, torch.bfloat16, (1,))["no flag"][1]
    assert peak["weights"] == pytest.approx(4.56, abs=.02) and peak["saved"] == pytest.approx(16.74, abs=.1)
    assert peak["total"] == pytest.approx(21.3, abs=.2)


# ---------------------------------------------------------------------------------------------------------------------
# The command

def test_the_report(tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    cfg = Config(batch_size=1, frames=4, size=16, num_steps=5, steps=2, device="cpu", out=out)
    benchmark.main(cfg, ["--steps", "2"])
    report, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert report["command"] == "python benchmark.py --steps 2" and report["base"] == "tiny, heads of 8 channels"
    assert {"python", "torch", "open_clip_torch", "diffusers", "peft", "transformers"} == report["versions"].keys()
    assert report["machine"]["cpu"] and report["settings"]["num_steps"] == 5 and report["matrix_tflops"] > 0
    assert report["process_peak_gib"] > 0.1
    assert list(report["contenders"]) == ["ours", "diffusers", "diffusers lean"]
    for name, row in report["contenders"].items():
        assert list(row["tflop"]) == list(row["seconds"]) == [*PARTS, "step"]
        assert row["tflop"]["step"] == pytest.approx(sum(row["tflop"][p] for p in PARTS))
        for s in row["seconds"].values():
            assert 0 < s["min"] <= s["median"] <= s["max"]
        assert row["calls"] == {"chain": 4, "last step": 2, "decode": 4, "reward": 4} and row["peak_gib"] is None
        assert row["tflops"] == pytest.approx(row["tflop"]["step"] / row["seconds"]["step"]["median"])
        assert row["share_of_matrix_rate"] == pytest.approx(row["tflops"] / report["matrix_tflops"])
        assert name in shown
    assert report["slower"].keys() == {"diffusers", "diffusers lean"}
    for s in report["slower"].values():
        assert 0 < s["min"] <= s["median"] <= s["max"]
    assert f"report: {out}" in shown and ("cuda: not yet run" in shown) == (not torch.cuda.is_available())


def test_the_meta_device_counts_and_times_nothing(monkeypatch):
    monkeypatch.setattr(benchmark, "MEMORY_SETTINGS", {"no flag": {}})
    monkeypatch.setattr(benchmark, "load", lambda cfg, device: small())
    report = measure(Config(batch_size=1, frames=4, num_steps=5, device="meta", diffusers=False))
    row = report["contenders"]["ours"]
    assert row["tflop"]["step"] > 0 and row["seconds"] is None and report["matrix_tflops"] is None
    shown = benchmark.table(report)
    assert "TFLOP" in shown and "expected peak memory" in shown and report["dtype"] == "bfloat16"
    rows = [line.split("  ")[0] for line in shown.splitlines() if line.startswith(("no flag", "--"))]
    assert rows == [*benchmark.MEMORY_SETTINGS]
    assert list(report["memory"]["no flag"]) == [1, 2, 4, 8]


@pytest.mark.parametrize(("settings", "message"), [
    (dict(batch_size=0), "batch_size = 0: must be at least 1"), (dict(steps=0), "steps = 0"), (dict(frames=3), "frames = 3"),
    (dict(tau=0.), "tau = 0.0"), (dict(num_steps=1000), "num_steps = 1000"), (dict(size=30), "multiples of 4"),
    (dict(device="abacus"), "device 'abacus'"), (dict(dtype="float8"), "dtype 'float8'"), (dict(out="."), "is a folder"),
    (dict(base="random:5"), "multiple of 32"), (dict(out=f"{__file__}/report.json"), "is a file"),
])
def test_settings_that_are_refused(settings, message, tmp_path):
    settings = {"out": tmp_path / "report.json"} | settings
    with pytest.raises(ValueError, match=message) as error:
        measure(replace(Config(), **settings | {"out": tmp_path / settings["out"]}))
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]


def test_a_base_that_diffusers_can_build():
    (base, _) = small(SMALL)
    assert comparable(base) is base
    tiny = model.load_base("tiny")
    other = comparable(tiny)
    assert tiny.unet.config.stem_heads == 1 and other.unet.config == replace(tiny.unet.config, stem_heads=8, head_dim=8)
    assert not any(p.requires_grad for p in other.unet.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda():
    report = measure(Config(base="random:32", batch_size=1, frames=4, num_steps=5, steps=1, device="cuda"))
    for row in report["contenders"].values():
        assert 0 < row["peak_gib"] < 8 and all(row["seconds"][p]["median"] > 0 for p in PARTS)
    assert report["dtype"] == "bfloat16"
