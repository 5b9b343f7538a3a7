"""What only a GPU can tell: `pytest -m gpu`, five to nine minutes, its weights random. A table at the end has times beside those
estimated for an H100; memory and results are asserted. Not yet run on a GPU, but tried on a CPU at small sizes. Without a GPU one
slow test: each method's step, forward, on fake "cuda" tensors, which have no numbers."""
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import GPU_TABLE, ROOT, pytest_configure
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark
import lora
import train
from benchmark import CAPTION, GIB, synthetic_batch
from methods.common import Rounds
from model import TemporalConv, load_base
from reward import load_reward
from sampler import alpha_bars, ddim_levels
from support import ranks
from tests.test_cost import small
from tests.test_train import CFG, batch_of, make_parts

CUDA, SPEC, FULL = torch.device("cuda"), "random", train.PRESETS["modelscope"]  # of all checks; others try them on a CPU
COSINE = {"float32": .9999, "bfloat16": .995, "float16": .999}  # of the tiny step's gradient with the CPU's in float32, at least
PEAK = {"no flag": 21.3, "--decode-chunk 1": 18.5, "--checkpoint-activations": 9.4, "--low-memory": 7.4}  # GiB, docs/gpu.md
check = pytest.mark.gpu


class NoNumbers(TorchDispatchMode):  # what is read off a fake tensor is 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0. if args[0].is_floating_point() else 0
        return function(*args, **kwargs or {})


def convert(module, *args, **kwargs):  # nn.Module.to cannot exchange what fake parameters hold
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    for part in module.modules():
        for known in (part._parameters, part._buffers):
            for name, old in known.items():
                if old is not None:
                    new = old.detach().to(device, dtype if old.is_floating_point() else None)
                    known[name] = torch.nn.Parameter(new, old.requires_grad)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by it a reward sees whether its weights changed
def test_every_method_runs_forward_on_fake_cuda_tensors(monkeypatch, tmp_path):
    """Batches are drawn and scored on one device, in one precision; the backward pass would need a driver."""
    (tmp_path / "prompts.txt").write_text("a bear\n")
    levels = ddim_levels(2, alpha_bars())
    monkeypatch.setattr(torch.nn.Module, "to", convert)
    monkeypatch.setattr(Rounds, "of", lambda rounds, step: {"prompt": torch.zeros(1, dtype=torch.int64)} | {
        k: v.cpu() for k, v in rounds.make(rounds.videos.share(0, rounds.size), 0).items()})
    with FakeTensorMode(allow_non_fake_inputs=True), NoNumbers():
        base, reward = small()
        for part in (base.text_encoder.to(CUDA), base.vae.to(CUDA).decoder, base.vae.post_quant_conv, base.network, reward):
            part.to(CUDA, torch.float32 if part is base.text_encoder else torch.bfloat16)
        base.levels = lambda num_steps, shape: levels  # numbers, which fake tensors have not
        lora.inject(base.network)
        assert base.encode_text(["a"]).device.type == base.device.type == "cuda" and base.texts["a"].device.type == "cpu"
        for name, module in benchmark.METHODS.items():
            if name == "adjoint":  # its batches are drawn by backward passes
                continue
            more = {} if name in benchmark.ON_CLIPS else {"prompts_train": tmp_path / "prompts.txt"}
            settings = replace(module.PRESETS["modelscope"], frames=4, size=16, num_steps=2, tau=1., **more)
            method = benchmark.open_method(name, settings, base, reward, tmp_path)
            R, _ = method.score(train.split_batch(method.draw(0), 1)[0])
            assert R.device.type == "cuda" and R.requires_grad, name


def test_gpus_are_hidden_from_other_tests(monkeypatch):
    for asked, seen in (("not slow and not gpu", ""), ("slow", ""), ("", ""), ("gpu", "0"), ("gpu and not slow", "0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        pytest_configure(SimpleNamespace(option=SimpleNamespace(markexpr=asked)))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen, asked


def note(what, measured, expected=""):
    GPU_TABLE.append((str(what), str(measured), str(expected)))
    print(*GPU_TABLE[-1], sep=" | ", flush=True)  # with -s, should the machine be gone before the end


def measure(what, call, expected, tflop=0., repeats=3):
    """Notes how long a call takes, the first and the median one, how soon the host is done with it, and the most memory that is
    in use, and taken from the device; returns milliseconds and GiB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(CUDA)
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        given = time.perf_counter()
        torch.cuda.synchronize()
        times.append((1e3 * (time.perf_counter() - start), 1e3 * (given - start)))
    ms, host_ms = [sorted(column)[repeats // 2] for column in zip(*times[1:])]
    gib, taken = torch.cuda.max_memory_allocated(CUDA) / GIB, torch.cuda.max_memory_reserved(CUDA) / GIB
    note(what, f"first {times[0][0]:.0f}, then {ms:.2f} ms, host {host_ms:.2f}; {1e3 * tflop / ms:.0f} TFLOP/s; {gib:.1f} of "
               f"{taken:.1f} GiB", expected)
    return ms, gib


@pytest.fixture(scope="module")
def full():
    """The full-size base and reward in bfloat16; adapters and temporal convolutions are not 0, as they start."""
    torch.manual_seed(0)
    with CUDA:
        base = load_base(SPEC, dtype=torch.bfloat16, device=CUDA)
        reward = load_reward("hpsv2", SPEC, None, torch.bfloat16, CUDA)
    temporal = [module.conv4[-1].weight for module in base.network.modules() if isinstance(module, TemporalConv)]
    for weight in (*lora.inject(base.network)[1::2], *temporal):
        torch.nn.init.normal_(weight, std=.02)
    base.encode_text([CAPTION])
    base.release_encoders()
    return base, reward


def guided_call(base, clips):
    """The network for so many clips, without gradient."""
    z, _, text, *_ = synthetic_batch(base, FULL, clips)
    inputs = torch.cat([z, z]), (51, .9, .4), torch.cat([text, text])
    return torch.no_grad()(lambda: base.predict(*inputs)[1])


@check
def test_machine():
    x = torch.randn(2, 64, 4, 8, device=CUDA).contiguous(memory_format=torch.channels_last)
    keeps = torch.nn.functional.group_norm(x, 32).is_contiguous(memory_format=torch.channels_last)
    note(torch.cuda.get_device_properties(CUDA), f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    note("TF32 in cuDNN; GroupNorm keeps channels-last", (torch.backends.cudnn.allow_tf32, keeps), "True; False up to torch 2.14")
    n = 8192 if CUDA.type == "cuda" else 64
    matrix, vector = torch.randn(n, n, device=CUDA, dtype=torch.bfloat16), torch.zeros(8, device=CUDA)
    measure(f"product of matrices of {n}", lambda: matrix @ matrix, "790 TFLOP/s", 2e-12 * n**3)
    measure("16 copies of 128 MiB", lambda: [matrix.clone() for _ in range(16)], "1.4 ms")
    measure("1000 launches", lambda: [vector.add_(1) for _ in range(1000)], "4 to 6 ms")


@check
def test_the_tiny_step_and_its_gradient_are_those_of_the_cpu(few_clips):
    def gradient(dtype, device):
        base, reward, _ = parts = make_parts(getattr(torch, dtype))
        *tensors, captions = batch_of(parts, CFG)
        for part in (base.network, base.vae, reward):
            ranks.move_to(part, device)
        batch, scale = [*(t.to(device) for t in tensors), captions], 4096. if dtype == "float16" else 1.
        R, _ = train.edit_rewards(base, reward, base.encode_text([""]), batch, CFG)
        (-scale * R.sum()).backward()
        return R.detach().cpu(), torch.cat([p.grad.flatten().cpu() / scale for p in lora.parameters(base.network)])

    R, exact = gradient("float32", "cpu")
    for dtype, least in COSINE.items():
        R_here, here = gradient(dtype, CUDA)
        cosine, error = torch.cosine_similarity(here, exact, dim=0).item(), (R_here - R).abs().max().item()
        note(f"tiny step in {dtype}: R's error, gradient's cosine", f"{error:.1e}, {cosine:.6f}", f"> {least}")
        assert cosine > least


@check
def test_calls_without_gradient(full):
    ms = {}
    for clips, expected in ((1, 52), (2, 95), (4, 171), (8, 328)):
        ms[clips], _ = measure(f"call with {clips} clips", guided_call(full[0], clips), f"{expected} ms, host 40", 9.66 * clips)
    note("8 clips, one by one against all at once", f"{8 * ms[1] / ms[8]:.2f}", 1.25)
    one, eight = guided_call(full[0], 1)(), guided_call(full[0], 8)()
    assert (eight[:1] - one).norm() < .02 * one.norm()  # the same first clip, in bfloat16
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with sdpa_kernel([backend, SDPBackend.MATH]):  # 3 clips are new: cuDNN plans each shape
            measure(f"3 clips by {backend.name}", guided_call(full[0], 3), "alike; cuDNN's first slower by seconds", 29)


@check
def test_a_step_needs_the_memory_that_was_counted(full):
    base, reward = full
    batch, uncond = synthetic_batch(base, FULL, 1), base.unconditional()
    for setting, flags in benchmark.MEMORY_SETTINGS.items():
        cfg = replace(FULL, **flags)
        base.checkpoint_activations(cfg.checkpoint_activations or cfg.low_memory)

        def step(cfg=cfg):
            base.network.zero_grad()
            (-train.edit_rewards(base, reward, uncond, batch, cfg)[0].sum()).backward()

        _, gib = measure(f"step of one clip, {setting}", step, f"{PEAK[setting]} GiB; with no flag 780 ms", 134, 1)
        base.checkpoint_activations(False)
        assert gib == pytest.approx(PEAK[setting], rel=.1)


@check
def test_kernels_of_a_call(full):
    with profile() as seen:
        guided_call(full[0], 1)()
        torch.cuda.synchronize()
    kernels = [e for e in seen.key_averages() if e.self_device_time_total > 0 and "CUDA" in str(e.device_type)]
    note("kernels of a call", sum(e.count for e in kernels), "3,100; the longest are these")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:25]:
        note(f"{e.key[:70]}: ms, number", f"{e.self_device_time_total / 1e3:.2f}, {e.count}")


@check
def test_a_wide_video(full):
    """Of 576 x 1024 pixels, heads times latent pixels are more rows than a grid has (model.MAX_ROWS)."""
    x = torch.randn(2, full[0].network.config.channels[0], 72, 128, device=CUDA, dtype=torch.bfloat16)
    with torch.no_grad():
        assert full[0].network.transformer_in(x.contiguous(memory_format=torch.channels_last), 2).isfinite().all()


@check
def test_an_evaluation_scores_in_float32(full):
    frames, scores, exact = torch.rand(1, 4, 3, 256, 256, device=CUDA), [], load_reward("hpsv2", SPEC)
    exact.load_state_dict(full[1].state_dict())
    measure("reward in float32 to the device and back", lambda: exact.to(CUDA) and exact.to("cpu"), "4 GiB more", repeats=1)
    for reward, tf32 in ((exact.to(CUDA), False), (exact, True), (full[1], True)):
        torch.backends.cudnn.allow_tf32 = tf32
        scores.append(reward(frames, [CAPTION]).detach())
    errors = [(score - scores[0]).abs().max().item() for score in scores[1:]]
    note("error of a score in TF32, in bfloat16", errors, ".002")
    assert errors[0] < .002 and errors[1] < .02


SHORT = ["--steps", "3", "--save-every", "1", "--eval-every", "0", "--batch-size", "2"]


@check
@pytest.mark.parametrize("words", [
    ["explain.py"], ["train.py", *SHORT], ["generate.py", "--prompt", "a red circle moving left"], ["evaluate.py", "--quick"],
    ["-m", "methods.vader", *SHORT], ["-m", "methods.ddpo", *SHORT, "--updates=1"], ["-m", "methods.dpo", *SHORT, "--pairs=4"],
    ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py", *SHORT, "--out", "run"],
    ["benchmark.py", "--steps", "1"]], ids=" ".join)
def test_scripts_with_the_defaults_of_cuda(words, aside):
    words, start = [str(ROOT / word) if word.endswith(".py") else word for word in words], time.time()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    note(" ".join(words), f"{time.time() - start:.0f} s")
    assert ended.returncode == 0, ended.stderr[-2000:]


@check
def test_compiled(full):
    call, plain = guided_call(full[0], 1), guided_call(full[0], 1)()
    full[0].network.compile()
    measure("call with 1 clip, compiled", call, "42 ms", 9.66)
    assert (call() - plain).norm() < .01 * plain.norm()
