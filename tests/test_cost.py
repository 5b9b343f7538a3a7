"""
What a training step costs, held to the method's floor (guided steps tau D times, the last with gradient; S frames decoded and
scored; nothing run twice), to whole runs of each method, and to what a process grows by.
"""
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, TransformerTemporalModel, UNet3DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import lora
import train
from bases.modelscope import Base
from benchmark import PARTS, Config, count_memory, count_step, measure, measure_peak, synthetic_batch
from formats import tensor_names as names
from methods import adjoint, ddpo, dpo, draft, nft, refl, rwr, vader
from model import Autoencoder, TextConfig, TextEncoder, UNet3D, UNetConfig, VAEConfig, load_base
from reward import aggregate, load_reward, tar_weights
from sampler import edit_steps
from tests.conftest import refused

# TFLOP of the networks at full size, 16 x 32 x 32 latents (multiply-adds x 2), and of a step's least work for one video with
# cached latents: 24 denoiser calls, the last 2 with gradient to their inputs, 4 frames and pictures with gradient to theirs.
UNET, DECODE, ENCODE, IMAGE, TEXT = 4.89, 0.62, 0.27, 0.33, 0.05
FLOOR = 134.7
FULL = Config(base="random", batch_size=1, device="meta")


def tflop(run, *shapes, dtype=torch.float32):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(*(torch.empty(shape, device="meta", dtype=dtype) for shape in shapes))
    return counter.get_total_flops() / 1e12


@pytest.mark.slow
def test_the_step_at_full_size_does_the_least_work():
    base, reward = benchmark.load(FULL, torch.device("meta"))
    row = count_step(base, reward, FULL)
    work = row["tflop"]
    assert row["calls"] == {"chain": 22, "last step": 2, "decode": 4, "reward": 4}
    assert work["step"] == pytest.approx(sum(work[part] for part in PARTS)) == pytest.approx(FLOOR, rel=.05)
    forward = {"chain": 22 * UNET, "last step": 2 * UNET, "decode": 4 * DECODE, "reward": 4 * IMAGE}
    for part, expected in forward.items():
        assert work[part] == pytest.approx(expected, rel=0.02), part
    # No gradient of frozen weights and nothing recomputed: the way back costs what the way there did.
    assert work["backward"] == pytest.approx(sum(forward.values()) - forward["chain"], rel=0.02)

    # What a step does not do: encode clips and captions. And DeepCache: every second step computes the outermost level alone.
    cached = base.chain_predict(2)
    calls = [tflop(lambda z, text: cached(z, (501, .5, .8), text), (1, 4, 16, 32, 32), (1, 77, 1024)) for _ in range(2)]
    assert calls == [pytest.approx(UNET, rel=.02), pytest.approx(1.66, rel=.01)]
    assert tflop(base.vae.encode, (1, 3, 256, 256)) == pytest.approx(ENCODE, rel=.02)
    assert tflop(lambda: reward.text_features(["a bear"])) == pytest.approx(TEXT, rel=.1)  # 0.047, of which two digits are known


@pytest.mark.slow
def test_the_table_in_the_docs_is_the_count_at_full_size(monkeypatch):
    """Of methods with few passes; the others are made of the same ones. One clip fits 24 GiB without flags, if only just."""
    few = {name: benchmark.METHODS[name] for name in ("InstructVideo", "onestep", "rwr")}
    monkeypatch.setattr(benchmark, "METHODS", few)
    report = measure(replace(FULL, methods=True))
    said = re.sub(" +", " ", (Path(benchmark.__file__).parent / "docs/methods.md").read_text())
    said = re.search(r"<!-- benchmark.py --methods -->\n(.*?)\n<!-- end -->", said, re.DOTALL)[1].splitlines()
    assert len(said) == 12 and {re.sub(" +", " ", line) for line in benchmark.table(report)[1:] if "--" not in line} <= {*said}
    peak = report["methods"]["InstructVideo"]["peak_gib"]
    assert peak["weights"] == pytest.approx(4.56, abs=.02) and peak["saved"] == pytest.approx(16.74, abs=.1)


SMALL = UNetConfig(channels=(16, 32), blocks_per_level=1, attention_levels=(False, True), context_dim=16, head_dim=8,
                   stem_heads=1, norm_groups=8, sample_size=8)
ONE_LEVEL = replace(SMALL, channels=(16,), attention_levels=(True,))  # on meta what takes time is operations
SHORT = Config(base="small", batch_size=2, frames=4, size=16, num_steps=5, steps=1)


def small(config=ONE_LEVEL):
    """(base, reward) on which a step takes a fraction of a second."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Base(UNet3D(config), Autoencoder(VAEConfig(channels=(8, 16), blocks_per_level=1, norm_groups=4)),
                    TextEncoder(TextConfig(width=16, heads=1, layers=1)), "small")
        for module in (base.network, base.vae, base.text_encoder):
            module.eval().requires_grad_(False)
        for p in base.network.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return base, load_reward(weights="random:32")


def gradient(R, network):
    """R, and its gradient in the order of the adapters' names: diffusers has its modules in another one."""
    adapters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    return R.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(-R.sum(), [adapters[k] for k in sorted(adapters)])])


def edit_by_diffusers(base, unet, batch, settings):
    """z_0 of the edit by diffusers' own classes, guidance as one call on a doubled batch."""
    z, eps, text, _, _ = batch
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(settings.num_steps)
    timesteps = scheduler.timesteps[-edit_steps(settings.tau, settings.num_steps):]
    embeds = torch.cat([base.encode_text([""]).expand(len(z), -1, -1), text])
    z_t = scheduler.add_noise(z, eps, timesteps[:1])
    for i, t in zip(range(len(timesteps), 0, -1), timesteps):
        with torch.set_grad_enabled(i <= settings.grad_steps):
            eps_u, eps_c = unet(torch.cat([z_t, z_t]), t, encoder_hidden_states=embeds).sample.chunk(2)
            z_t = scheduler.step(eps_u + settings.guidance * (eps_c - eps_u), t, z_t).prev_sample
    return z_t


def test_the_step_on_diffusers_is_the_same_method():
    base, reward = small(SMALL)
    score, _ = benchmark.make_step(base, reward, SHORT)
    for i, layer in enumerate(lora.layers(base.network).values()):  # not as they start, where A has no gradient
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(i))
    structure = names.unet_to_diffusers(SMALL)
    del structure["stem_heads"]  # diffusers has no such field: it is always 8 there, but 1 here
    unet = UNet3DConditionModel.from_config(structure)
    unet.transformer_in = TransformerTemporalModel(1, SMALL.head_dim, SMALL.channels[0], norm_num_groups=SMALL.norm_groups)
    vae = AutoencoderKL.from_config(names.vae_to_diffusers(base.vae.config))
    lora.inject(unet)
    for theirs, mine in ((unet, base.network), (vae, base.vae)):
        theirs.eval().load_state_dict(mine.state_dict())

    settings = replace(train.PRESETS["modelscope"], tau=SHORT.tau, num_steps=SHORT.num_steps, frames=SHORT.frames)
    batch = _, _, _, g, captions = synthetic_batch(base, SHORT, 2)
    R, grad = gradient(score(batch), base.network)
    latent = edit_by_diffusers(base, unet, batch, settings).transpose(1, 2)[torch.arange(2)[:, None], g]     # (B, S, C, h, w)
    frames = vae.decode(latent.flatten(0, 1) / vae.config.scaling_factor).sample.unflatten(0, g.shape) / 2 + .5
    R_theirs, theirs = gradient(aggregate(reward(frames, captions), tar_weights(g, SHORT.frames, settings.lambda_tar)), unet)
    assert grad.abs().max() > 0
    torch.testing.assert_close(R_theirs, R, rtol=1e-4, atol=1e-6)
    assert torch.cosine_similarity(grad, theirs, dim=0) > 0.9999 and (grad - theirs).norm() < 1e-3 * grad.norm()


@pytest.mark.slow
def test_wan_at_its_published_size():
    with torch.device("meta"):
        base = load_base("random-wan:full", device="meta")
    parameters = [sum(p.numel() for p in part.parameters()) for part in (base.network, base.vae)]
    assert parameters == [1_418_996_800, 126_892_531]

    # A call of its network by hand, of n tokens of width d: projections, attention to these and to 512 of text, two layers.
    n, d, m = 5 * 16 * 16, 1536, 512
    block = 2 * d * (d * (6 * n + 2 * m) + 2 * n * n + 2 * n * m + 2 * n * 8960)
    call = tflop(lambda z: base.predict(z, (500., .5, .5), torch.empty(1, m, 4096, device="meta")), (1, 16, 5, 32, 32))
    assert call == pytest.approx(30 * block / 1e12, rel=.02) == pytest.approx(3.8, rel=.02)


@pytest.mark.slow
def test_a_causal_decoder_is_counted_as_it_runs():
    """With the middle frames of the segments, on the CPU with numbers."""
    cfg = replace(SHORT, base="random-wan", batch_size=1, frames=9, size="16x32")
    base, reward = benchmark.load(cfg, torch.device("cpu"))
    row = count_step(base, reward, cfg)
    assert row["calls"] == {"chain": 4, "last step": 2, "decode": 4, "reward": 4}
    lora.inject(base.network)
    z, eps, text, _, captions = synthetic_batch(base, cfg, 1)
    reward.text_features(captions)
    settings = replace(train.PRESETS["wan"], tau=cfg.tau, num_steps=cfg.num_steps, frames=9)
    uncond = base.unconditional()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        batch = z, eps, text, torch.tensor([[1, 3, 5, 7]]), captions
        train.edit_rewards(base, reward, uncond, batch, settings)[0].sum().backward()
    assert row["tflop"]["step"] == pytest.approx(counter.get_total_flops() / 1e12, rel=.01)


BASES_DOC = Path(benchmark.__file__).parent / "docs/bases.md"
ROWS = re.search(r"<!-- python benchmark.py --base .*?\n(.*?)<!-- end -->", BASES_DOC.read_text(), re.DOTALL)[1].splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("said", [pytest.param(dict(zip(*[re.split(r" ?\| ?", line)[1:-1] for line in (ROWS[0], row)])),
                                               id=row.split()[1]) for row in ROWS[3:]])
def test_the_table_of_bases_is_the_count_at_full_size(said, monkeypatch):
    """Of each base but the first, counted for docs/methods.md: our step's work, and the memory that decides on the card."""
    monkeypatch.setattr(benchmark, "IN_ROW", ("InstructVideo",))
    monkeypatch.setattr(benchmark, "MEMORY_SETTINGS", {"--low-memory": {"low_memory": True}})
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--base", said["base"], "--device", "meta"])
    found = benchmark.table(measure(benchmark.parse()))
    heads, row = [re.split(r" *\| *", line)[1:-1] for line in (found[1], found[3])]
    assert {head: said[head] for head in heads} == dict(zip(heads, row))


def test_what_is_alive_is_counted_as_an_allocator_would():
    """Of a chain of products, the result and those that the backward pass needs stay; the others go when the next is made."""
    module = torch.nn.Linear(1, 1, device="meta")
    x = torch.empty(1000, device="meta", requires_grad=True)

    def kept():
        return (x.exp() * 2).sin()  # exp keeps its result, sin its input: 4000 bytes each, and the result itself
    peak = {part: gib * benchmark.GIB for part, gib in measure_peak(kept, [module]).items()}
    assert (peak["weights"], peak["saved"]) == (8, 12000)
    assert 8 + 5 * 4000 <= peak["total"] <= 8 + 5 * 4000 + 100  # those, the result, sin's derivative, and its gradient

    def passing():
        with torch.no_grad():
            for _ in range(5):
                y = x + 1
                y = y + 1
        return y * x
    peak = {part: gib * benchmark.GIB for part, gib in measure_peak(passing, [module]).items()}
    assert peak["saved"] == 8000 and peak["total"] <= 8 + 4 * 4000


@pytest.mark.slow
@pytest.mark.parametrize("memory_setting", ["no flag", "--low-memory"])  # the last is both of the others
def test_the_expected_memory_is_what_the_graph_keeps_on_the_cpu(memory_setting, monkeypatch):
    """The bytes counted on meta, held to those of the tensors that autograd saves when the step runs with numbers."""
    cfg = replace(SHORT, base="random:32", size=96, frames=16)
    base, reward = benchmark.load(cfg, torch.device("cpu"))
    monkeypatch.setattr(benchmark, "MEMORY_SETTINGS", {memory_setting: benchmark.MEMORY_SETTINGS[memory_setting]})
    expected = count_memory(base, reward, cfg, clips_at_once=(1,))[memory_setting][1]
    batch = synthetic_batch(base, cfg, 1)
    lora.inject(base.network)
    reward.text_features(batch[-1])
    weights, saved = benchmark.storages([base.network, base.vae.decoder, reward]), {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    settings = replace(train.PRESETS["modelscope"], num_steps=1, tau=1., **benchmark.MEMORY_SETTINGS[memory_setting])
    base.network.checkpoint_activations(settings.checkpoint_activations or settings.low_memory)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = train.edit_rewards(base, reward, base.encode_text([""]), batch, settings)
    assert kept[0].requires_grad and expected["saved"] == pytest.approx(sum(saved.values()) / benchmark.GIB, rel=.03)


METHOD = replace(SHORT, batch_size=1, tau=.5, num_steps=4)
SIZES = dict(frames=4, size=16, num_steps=4)
FEW = {draft: {}, refl: {}, vader: dict(eta=.5), ddpo: dict(updates=2, timestep_fraction=.5), rwr: dict(rounds=2, videos=3),
       dpo: dict(rounds=2, pairs=3), nft: dict(updates=2, group=2, timestep_fraction=.5), adjoint: dict(steps_learned=2)}


def count_method(monkeypatch, module, cfg=METHOD, **changes):
    """The row of one method, with other numbers in its preset."""
    name = module.__name__.removeprefix("methods.").replace("train", "InstructVideo")
    monkeypatch.setattr(benchmark, "METHODS", {name: module})
    monkeypatch.setitem(module.PRESETS, "modelscope", replace(module.PRESETS["modelscope"], **changes))
    return benchmark.count_methods(*small(), cfg)[name]


@pytest.mark.slow
@pytest.mark.parametrize("module", [draft, refl, vader, rwr, dpo, ddpo, nft, adjoint], ids=lambda module: module.__name__)
def test_the_parts_of_a_method_add_up_to_a_run_of_it(module, monkeypatch, tmp_path):
    """TFLOP and frames of every video of every step, on the CPU with numbers; DPO's steps are of pairs."""
    changes = dict(steps=2, batch_size=2, save_every=2, eval_every=0) | FEW[module]
    row = count_method(monkeypatch, module, **changes)
    base, reward = small()
    (tmp_path / "prompts.txt").write_text("a bear\na cat\n")
    cfg = replace(module.PRESETS["modelscope"], prompts_train=tmp_path / "prompts.txt", **SIZES, **changes)
    parameters = lora.inject(base.network)
    method = module.method(cfg, base, reward, tmp_path)
    reward.text_features(["a bear", "a cat"])
    frames = []
    base.vae.post_quant_conv.register_forward_pre_hook(lambda _, x: frames.append(len(x[0])))
    run = SimpleNamespace(steps=lambda optimizer: range(cfg.steps), stop=lambda: False, finish_step=lambda *args: True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        assert train.train(cfg, parameters, method, run)
    videos = cfg.steps * cfg.batch_size * (2 if module is dpo else 1)
    assert row["tflop"] == pytest.approx(counter.get_total_flops() / 1e12 / videos, rel=.01)
    assert row["frames"] == pytest.approx(sum(frames) / videos)


@pytest.mark.slow
def test_the_peak_of_a_method_is_that_of_a_step_that_it_learns_from(monkeypatch):
    """Where sampling adds no noise in the last step, Adjoint Matching skips it, so a chain of one step has none."""
    cfg = replace(METHOD, base="random-wan", frames=9, size="16x32", device="meta")
    monkeypatch.setattr(benchmark, "METHODS", {"adjoint": adjoint})
    row, = benchmark.count_methods(*benchmark.load(cfg, torch.device("meta")), cfg).values()
    assert row["peak_gib"]["total"] > row["peak_gib"]["weights"] > 0


@pytest.mark.slow
def test_refl_stops_at_the_middle_of_its_last_steps(monkeypatch):
    """Its chain ends at one of the last steps, here of three: with the middle one, one has no gradient and one has."""
    row = count_method(monkeypatch, refl, replace(METHOD, num_steps=3), late=1.)
    assert row["without_gradient"] == row["with_gradient"] == 2  # guidance takes two passes


def test_the_report(tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    benchmark.main(Config(batch_size=1, frames=4, size=16, num_steps=4, tau=.5, steps=1, device="cpu", out=out))
    report, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert report["settings"]["num_steps"] == 4 and report.keys() >= {"torch", "diffusers", "device", "threads", "dtype"}
    row = report["step"]
    assert list(row["tflop"]) == [*PARTS, "step"] and row["seconds"] > 0 and row["peak_gib"] is None
    assert row["calls"] == {"chain": 2, "last step": 2, "decode": 4, "reward": 4}
    assert f"\n{row['seconds']:.4g} s a step, {row['tflop']['step'] / row['seconds']:.4g} TFLOP/s\n" in shown
    assert f"report: {out}" in shown


@pytest.mark.slow
def test_the_meta_device_counts_and_times_nothing(monkeypatch):
    monkeypatch.setattr(benchmark, "MEMORY_SETTINGS", {"no flag": {}})
    monkeypatch.setattr(benchmark, "load", lambda cfg, device: small())
    monkeypatch.setattr(benchmark, "count_memory", partial(count_memory, clips_at_once=(1, 4)))
    report = measure(Config(batch_size=1, frames=4, num_steps=1, tau=1., size=16, device="meta"))
    assert "seconds" not in report["step"]
    shown = "\n".join(benchmark.table(report))
    assert "TFLOP" in shown and "no flag   " in shown and "TFLOP/s" not in shown
    saved = [peak["saved"] for peak in report["memory"]["no flag"].values()]
    assert saved == pytest.approx([saved[0], 4 * saved[0]], rel=.02)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(batch_size=0), "batch_size = 0: must be at least 1"), (dict(frames=3), "frames = 3"), (dict(tau=0.), "tau = 0.0"),
    (dict(num_steps=1000), "num_steps = 1000"), (dict(size=30), "multiples of 4"), (dict(device="abacus"), "device 'abacus'"),
    (dict(base="random:5"), "multiple of 32"), (dict(out="."), "is a folder"), (dict(out=f"{__file__}/report.json"), "is a file"),
    (dict(methods=True, device="cpu"), "device 'cpu': must be meta with methods"),
])
def test_settings_that_are_refused(settings, message, tmp_path):
    out = tmp_path / settings.get("out", "report.json")
    refused(message, measure, Config(**settings | {"out": out}))
    assert not [*tmp_path.iterdir()]
