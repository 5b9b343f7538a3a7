"""
What a training step costs: work and memory, counted from shapes alone, and time.

    python benchmark.py                                     # the tiny world's sizes, on the CPU: a minute or two
    python benchmark.py --base random                       # full size with random weights, on a GPU
    python benchmark.py --base random --device meta         # full size, counted alone: no weights, no times
    python benchmark.py --base random --device meta --methods    # the same for every method of methods/
    python benchmark.py --base wan --device meta            # a published base at the size of its preset: its row of docs/bases.md

Counting runs train.py's own functions on PyTorch's meta device, whose tensors have shapes and no memory.
Letters: B clips, F frames, S segments, C channels, h and w latent rows and columns, N text tokens, E their width.
"""
import support.threads  # noqa: F401  before torch is loaded
import copy
import platform
import statistics
import tempfile
import time
import weakref
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import tyro
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import lora
import train
from methods import adjoint, ddpo, dpo, draft, nft, onestep, refl, rwr, vader
from model import load_base
from reward import load_reward, segment_edges, segment_frames
from sampler import check_edit
from support.files import check_folder, write_json, write_text
from support.pictures import markdown, versions, write_png
from support.ranks import pick_device, pick_dtype, progress, run_script, sample_generator
from support.settings import BASES, check_at_least, clip_shape, rows_columns

GIB = 2**30
CAPTION = "a red circle moving left"
PARTS = ("chain", "last step", "decode", "reward", "backward", "optimizer")
MEMORY_SETTINGS = {"no flag": {}, "--decode-chunk 1": {"decode_chunk": 1},
                   "--checkpoint-activations": {"checkpoint_activations": True}, "--low-memory": {"low_memory": True}}
METHODS = {"InstructVideo": train, "onestep": onestep, "draft": draft, "refl": refl, "vader": vader, "ddpo": ddpo, "rwr": rwr,
           "dpo": dpo, "nft": nft, "adjoint": adjoint}
ON_CLIPS = {"InstructVideo": train.edit_rewards, "onestep": onestep.onestep_rewards}
IN_ROW = ("InstructVideo", "vader", "refl")  # methods of a base's row
CARDS = (8, 12, 16, 24, 32, 48, 80, 141)  # GiB; a tenth is left for kernels' workspaces and gaps between tensors
ROUND_OF_ONE = {"ddpo": {"updates": 1}, "rwr": {"videos": 1}, "dpo": {"pairs": 1}, "nft": {"updates": 1, "group": 1}}


# -- The step --------------------------------------------------------------------------------------------------------

def make_step(base, reward, cfg):
    """train.py's step: (function of a batch, which gives R (B,) of Eq. (8) with gradient; the adapters that the base now has)."""
    settings = replace(preset(train, base), tau=cfg.tau, num_steps=cfg.num_steps, frames=cfg.frames, low_memory=cfg.low_memory)
    parameters = lora.inject(base.network, settings.rank)
    base.checkpoint_activations(cfg.checkpoint_activations or cfg.low_memory)
    return lambda batch: train.edit_rewards(base, reward, base.unconditional(batch[2]), batch, settings)[0], parameters


def load(cfg, device):
    """(base, reward) of a Config, on `device`. What is counted on meta is counted for a GPU, so in bfloat16."""
    is_meta = device.type == "meta"
    dtype = pick_dtype(cfg.dtype or ("bfloat16" if is_meta else None), device)
    full_size = {"modelscope": "random"}.get(cfg.base, f"random-{cfg.base}:full")
    name = full_size if cfg.base in BASES else cfg.base
    with torch.device("meta" if is_meta and name.startswith("random") else "cpu"):
        base = load_base(name, dtype=dtype, device=device)
        is_small = name.startswith(("random:", "random-")) and not name.endswith(":full")
        weights = "random:32" if is_small else "random"  # of a size that suits the base
        if base.folder and (base.folder / "reward").is_dir():
            weights = None  # the base's own
        return base, load_reward("hpsv2", weights, base.folder, dtype, device)


def preset(module, base):
    """The full-size settings of a method for a base."""
    return module.PRESETS.get(base.kind, module.PRESETS["modelscope"])


def copy_to_meta(base, reward, frames):
    """Copies without memory. Text is encoded once a caption and not once a step, so its features are computed here. Which frames
    are wanted cannot be read on meta: the middle ones of the segments of `frames`, as a causal decoder's work depends on it."""
    base = copy.deepcopy(base, {id(base.world): base.world})  # a module, which cannot be copied
    reward = copy.deepcopy(reward).to("meta")
    starts_from_pictures = hasattr(base, "condition")
    for network in (base.network, base.vae, base.image_encoder if starts_from_pictures else base.text_encoder):
        network.to("meta")
    if not starts_from_pictures:
        base.texts.clear()
        with ReadAsZero():  # they are kept on the CPU
            base.encode_text(["", CAPTION])
    reward.text_features([CAPTION])
    decode = base.decode_frames

    def decode_middle_frames(z, index):
        edges = segment_edges(frames, index.shape[1])
        middle = [(start + end) // 2 for start, end in zip(edges, edges[1:])]
        return decode(z, torch.tensor([middle] * len(z), device="cpu"))

    base.decode_frames = decode_middle_frames
    return base, reward


def synthetic_batch(base, cfg, batch_size):
    """A batch as train.draw_batch gives it, of noise: the numbers do not change the cost."""
    F, H, W = clip_shape(base, cfg)
    shape = (batch_size, *base.latent_shape(F, H, W))                                     # (B, C, f, h, w)
    generator = sample_generator(0, "benchmark")
    z, eps = torch.randn((2, *shape), generator=generator).to(base.device)                # (B, C, F, h, w) each
    g = segment_frames(F, train.Config.segments, batch_size, generator).to(base.device)
    captions = [CAPTION] * batch_size
    if hasattr(base, "condition"):  # it starts from pictures, here black ones
        return z, eps, base.condition(torch.zeros(batch_size, 3, H, W)), g, captions
    return z, eps, base.encode_text(captions), g, captions


# -- Counting work and memory on meta --------------------------------------------------------------------------------

def count_work(forward, base, reward):
    """{"tflop": {part: ...}, "calls": {part: items that its network ran on}} of forward() and its result's backward pass, if any.
    train.py does not mark where parts begin, so the networks are wrapped while it runs. The optimizer has no matrices: 0."""
    tflop = dict.fromkeys(PARTS, 0.)
    calls = dict.fromkeys(PARTS[:4], 0)
    latest = {}  # {part: (result, TFLOP) of its network's latest call}
    ran = []  # TFLOP of all calls that ran
    counter = FlopCounterMode(display=False)
    is_way_back = False

    def watch(network, function_name, network_part, count_items):
        function = getattr(network, function_name)

        def counted(*args, **kwargs):
            if is_way_back:  # what it recomputes is part of it
                return function(*args, **kwargs)
            part = network_part if torch.is_grad_enabled() or network is not base.network else "chain"
            if part != "chain" or part not in latest:  # all calls of a chain cost the same, so only the first is run
                before = counter.get_total_flops()
                result = function(*args, **kwargs)
                latest[part] = result, (counter.get_total_flops() - before) / 1e12
                ran.append(latest[part][1])
            tflop[part] += latest[part][1]
            calls[part] += count_items(*args)
            return latest[part][0]

        return mock.patch.object(network, function_name, counted)

    with counter:
        with (watch(base.network, "forward", "last step", lambda z_t, *more: len(z_t)),
              watch(base, "decode_frames", "decode", lambda z, g: g.numel()),
              watch(reward, "forward", "reward", lambda frames, *more: frames.shape[:2].numel())):
            result = forward()
        before = counter.get_total_flops()
        tflop["backward"] += before / 1e12 - sum(ran)  # of a gradient that is taken on the way, as Adjoint Matching does
        is_way_back = True
        if isinstance(result, torch.Tensor) and result.requires_grad:
            result.sum().backward()
        tflop["backward"] += (counter.get_total_flops() - before) / 1e12
    return {"tflop": tflop | {"step": sum(tflop.values())}, "calls": calls}


def count_step(base, reward, cfg):
    """The work of train.py's step, as count_work, from shapes alone."""
    base, reward = copy_to_meta(base, reward, cfg.frames)
    score, _ = make_step(base, reward, cfg)
    return count_work(partial(score, synthetic_batch(base, cfg, cfg.batch_size)), base, reward)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made on meta, now and at most. A storage counts until nothing refers to it any more."""

    def __init__(self, known):
        super().__init__()
        self.known = set(known)  # ids of storages that are not to be counted, or not again
        self.now = 0
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return result

    def forget(self, storage_id, num_bytes):
        """The storage is gone, and a new one may get its id."""
        self.known.discard(storage_id)
        self.now -= num_bytes


def storages(modules):
    """{id: bytes} of the storages of all parameters and buffers."""
    tensors = [*nn.ModuleList(modules).parameters(), *nn.ModuleList(modules).buffers()]
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def measure_peak(forward, modules):
    """GiB that forward() and the backward pass of its result, if that has a gradient, need at the worst moment, all on meta.
    {"weights": of `modules`, "saved": beyond them, for the backward pass, "transient": what else is there, "total"}."""
    weights = storages(modules)
    attention = nn.functional.scaled_dot_product_attention

    def in_one_kernel(query, key, value, attn_mask=None, dropout_p=0., is_causal=False, **more):
        if attn_mask is None and query.is_meta and query.dim() == 4:  # else torch would make the matrix of all pairs, here alone
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
        return attention(query, key, value, attn_mask, dropout_p, is_causal, **more)

    saved = 0
    with mock.patch.object(nn.functional, "scaled_dot_product_attention", in_one_kernel), LiveBytes(weights) as live:
        result = forward()
        if isinstance(result, torch.Tensor) and result.requires_grad:
            saved = live.now
            result.sum().backward()
    frozen = sum(weights.values())
    peak = {"weights": frozen, "saved": saved, "transient": live.most - saved, "total": frozen + live.most}
    return {kind: num_bytes / GIB for kind, num_bytes in peak.items()}


def in_memory(base, reward):
    """What is in memory in a step."""
    return [base.network, getattr(base.vae, "decoder", base.vae), reward]


def count_memory(base, reward, cfg, clips_at_once=(1, 2, 4, 8)):
    """{memory setting: {clips at once: as measure_peak}} of our step."""
    base, reward = copy_to_meta(base, reward, cfg.frames)
    lora.inject(base.network, train.Config.rank)
    peaks = {}
    for memory_setting, flags in MEMORY_SETTINGS.items():
        # Steps of the chain without gradient leave nothing behind, so those with gradient are as good as all.
        settings = preset(train, base)
        settings = replace(settings, frames=cfg.frames, num_steps=settings.grad_steps, tau=1., **flags)
        base.checkpoint_activations(settings.checkpoint_activations or settings.low_memory)
        peaks[memory_setting] = {}
        for clips in clips_at_once:
            batch = synthetic_batch(base, cfg, clips)
            score = partial(train.edit_rewards, base, reward, base.unconditional(batch[2]), batch, settings)
            peaks[memory_setting][clips] = measure_peak(lambda: score()[0], in_memory(base, reward))  # noqa: B023
    return peaks


class ReadAsZero(TorchDispatchMode):
    """Lets programs read values off tensors without memory, such as a loss to log or rewards to compare: all are 0."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        if function is torch.ops.aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **kwargs)


def open_method(name, settings, base, reward, folder):
    """A method as train.train takes it, with one video a step and a folder of its own inside `folder` for what it keeps."""
    settings = replace(settings, batch_size=1, **ROUND_OF_ONE.get(name, {}))
    if name not in ON_CLIPS:
        return METHODS[name].method(settings, base, reward, Path(tempfile.mkdtemp(dir=folder)))
    score = lambda batch: ON_CLIPS[name](base, reward, base.unconditional(batch[2]), batch, settings)
    more = [[1]] if name == "onestep" else []  # the chain step, which does not change the cost
    batch = *synthetic_batch(base, settings, 1), *more  # now: what encoders make is kept, and no part of a step
    return train.Method(lambda step: batch, score)  # its own draw reads clips


def count_method(name, settings, base, reward, folder):
    """The work of a method's step per video: a row of count_methods."""
    with ReadAsZero():
        method = open_method(name, settings, base, reward, folder)
        batches = []
        draw = count_work(lambda: batches.append(method.draw(0)), base, reward)
        entry = train.split_batch(batches[0], 1)[0]
        if name == "refl":  # its chain stops at step m, drawn from the last ones; the middle m costs about their mean
            entry[-1] = [(1 + round(settings.late * settings.num_steps)) // 2]
        score = count_work(lambda: method.score(entry)[0], base, reward)

    # How often a batch is drawn, sampling included, and an entry of one scored, for each video of an optimizer step.
    videos = 2 if name == "dpo" else 1  # of an entry, which for DPO is a pair
    draws = 1 / videos
    scores = len(batches[0][0]) / videos
    if name in ("rwr", "dpo"):  # what a round samples serves many steps
        draws *= settings.rounds * (settings.videos if name == "rwr" else settings.pairs) / (settings.steps * settings.batch_size)
    calls = {part: draws * draw["calls"][part] + scores * score["calls"][part] for part in draw["calls"]}
    return {"without_gradient": calls["chain"], "with_gradient": calls["last step"], "frames": calls["decode"],
            "tflop": draws * draw["tflop"]["step"] + scores * score["tflop"]["step"]}


def peak_of_method(name, settings, base, reward, folder):
    """Its memory, as measure_peak. Steps without gradient leave nothing behind, so those with gradient are as good as all."""
    fewest = 2 if name in ("ddpo", "adjoint") else settings.grad_steps  # the last step may add no noise; these two skip it then
    with ReadAsZero():
        method = open_method(name, replace(settings, num_steps=fewest, tau=1.), base, reward, folder)
        entry = train.split_batch(method.draw(0), 1)[0]
        peaks = [measure_peak(call, in_memory(base, reward)) for call in (lambda: method.draw(0), lambda: method.score(entry)[0])]
    return max(peaks, key=lambda peak: peak["total"])


def count_methods(base, reward, cfg, names=None):
    """{method: passes of a video through the denoiser (guidance takes two), frames decoded, TFLOP; without names, the peak}."""
    base, reward = copy_to_meta(base, reward, cfg.frames)
    lora.inject(base.network, train.Config.rank)
    base.checkpoint_activations(cfg.checkpoint_activations or cfg.low_memory)
    rows = {}
    for name in names or METHODS:
        with tempfile.TemporaryDirectory() as folder:
            write_png(Path(folder, "black.png"), np.zeros((8, 8, 3), np.uint8))
            write_text(Path(folder, "prompts.txt"), f"black.png|||{CAPTION}\n")  # only some bases read the picture
            more = {"tau": cfg.tau} if name in ON_CLIPS else {"prompts_train": Path(folder, "prompts.txt")}
            settings = replace(preset(METHODS[name], base), num_steps=cfg.num_steps, frames=cfg.frames, size=cfg.size,
                               low_memory=cfg.low_memory, checkpoint_activations=cfg.checkpoint_activations, **more)
            rows[name] = count_method(name, settings, base, reward, Path(folder))
            if names is None:
                rows[name]["peak_gib"] = peak_of_method(name, settings, base, reward, Path(folder))
    return rows


def count_row(base, reward, cfg):
    """What docs/bases.md says of a published base: TFLOP of a step by method, and GiB at the peak of ours by memory setting."""
    methods = count_methods(base, reward, cfg, IN_ROW)
    peaks = count_memory(base, reward, cfg, clips_at_once=(1,))
    _, height, width = clip_shape(base, cfg)
    return {"size": f"{height} x {width}", "tflop": {name: row["tflop"] for name, row in methods.items()},
            "gib": {memory_setting: peak[1]["total"] for memory_setting, peak in peaks.items()}}


# -- Timing, and the report ------------------------------------------------------------------------------------------

def time_steps(base, reward, cfg, device):
    """{"seconds": the median of several optimizer steps as in train.train, "peak_gib": their GPU memory at its peak or None}."""
    score, parameters = make_step(base, reward, cfg)
    batch = synthetic_batch(base, cfg, cfg.batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=train.Config.lr, weight_decay=0)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in progress(range(cfg.steps + 1), "timing", leave=False):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        (-score(batch).mean()).backward()                                                 # Eq. (9)
        nn.utils.clip_grad_norm_(parameters, train.Config.clip_grad)
        optimizer.step()
        parameters[0].sum().item()  # a value is there once the device has done all that it was given
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / GIB if on_cuda else None
    return {"seconds": statistics.median(seconds[1:]), "peak_gib": peak}  # the first one warms up


@dataclass
class Config:
    """Count and time a training step."""
    base: str = "tiny"  # any that train.py takes, as only its sizes matter; modelscope, wan, ...: full size, random weights
    batch_size: int = 2  # clips a step (paper, Sec. 3.3: 8 on 4 GPUs)
    tau: float = 0.6  # how far clips are noised, as a share of the chain (paper, Sec. 4.2)
    num_steps: int = 20  # D, DDIM steps of the whole chain (paper, Sec. 3.3)
    frames: int = 16  # F (paper, Sec. 3.3)
    size: int | str | None = None  # pixel rows and columns, 256 or 480x832; default what the base was trained on
    steps: int = 5  # timed steps
    device: str | None = None  # cuda, mps, cpu, or meta to count alone; default the first of cuda, mps, cpu that is there
    dtype: str | None = None  # float32, bfloat16 or float16 of frozen weights; default bfloat16 on cuda and meta, else float32
    checkpoint_activations: bool = False  # recompute the network's blocks in the backward pass, as train.py's flag
    low_memory: bool = False  # recompute, and decode one frame at a time, as train.py's flag
    methods: bool = False  # instead: count a step of each method of methods/ at its preset for the base (needs --device meta)
    out: Path = Path("out/benchmark.json")  # the report


def check(cfg):
    """All that can be known before anything is loaded."""
    check_at_least(cfg, batch_size=1, steps=1, frames=train.Config.segments)
    check_edit(cfg.tau, cfg.num_steps, train.Config.grad_steps)
    rows_columns(cfg.size)
    if cfg.methods and cfg.device != "meta":
        raise ValueError(f"device {cfg.device!r}: must be meta with methods")
    check_folder(cfg.out.parent)
    if cfg.out.is_dir():
        raise ValueError(f"out {cfg.out}: is a folder; it must be a file, there or not")


def measure(cfg):
    """The whole report, as plain values."""
    check(cfg)
    if cfg.methods or cfg.device == "meta" and cfg.base in BASES:
        cfg = replace(cfg, batch_size=1)
    device = torch.device("meta") if cfg.device == "meta" else pick_device(cfg.device)
    base, reward = load(cfg, device)
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    report = {"settings": asdict(cfg) | {"out": str(cfg.out)}, "dtype": str(base.dtype).removeprefix("torch."),
              "device": f"{device}, {processor}", "threads": torch.get_num_threads()} | versions()
    if cfg.methods:
        return report | {"methods": count_methods(base, reward, cfg)}
    if device.type == "meta" and cfg.base in BASES:
        return report | {"row": count_row(base, reward, cfg)}
    report["step"] = count_step(base, reward, cfg)
    if device.type == "meta":
        return report | {"memory": count_memory(base, reward, cfg)}
    base.release_encoders()
    return report | {"step": report["step"] | time_steps(base, reward, cfg, device)}


def table(report):
    """The report as lines of text for the terminal."""
    settings = report["settings"]
    lines = [f"base {settings['base']}, {settings['batch_size']} clips of {settings['frames']} frames, {report['dtype']}, "
             f"on {report['device']}, {report['threads']} threads"]
    if "step" in report:
        tflop = report["step"]["tflop"]
        lines += ["".join(f"{part:>11s}" for part in tflop), "".join(f"{number:11.4g}" for number in tflop.values()) + " TFLOP"]
    if "seconds" in report.get("step", {}):
        seconds, peak = report["step"]["seconds"], report["step"]["peak_gib"]
        lines.append(f"{seconds:.4g} s a step, {tflop['step'] / seconds:.4g} TFLOP/s" + (f", {peak:.1f} GiB" if peak else ""))
    if "memory" in report:
        no_flag = report["memory"]["no flag"]
        lines.append(f"expected peak memory of our step, GiB: total (saved activations + transients, on top of the weights'"
                     f" {no_flag[1]['weights']:.1f}); workspaces of kernels and gaps between tensors come on top")
        lines.append(f"{'clips at once':26s}" + "".join(f"{clips:>22}" for clips in no_flag))
    for memory_setting, peaks in report.get("memory", {}).items():
        cells = [f"{peak['total']:.1f} ({peak['saved']:5.1f} + {peak['transient']:.1f})" for peak in peaks.values()]
        lines.append(f"{memory_setting:26s}" + "".join(f"{cell:>22}" for cell in cells))
    if "row" in report:  # in Markdown, for docs/bases.md
        row = report["row"]
        card = next((card for card in CARDS if min(row["gib"].values()) < .9 * card), "more")
        cells = [settings["base"], row["size"], settings["frames"], *(f"{number:.0f}" for number in row["tflop"].values()),
                 *(f"{number:.1f}" for number in row["gib"].values()), card]
        heads = ["base", "size", "frames", *(f"TFLOP {name}" for name in row["tflop"]), *(f"GiB {name}" for name in row["gib"])]
        lines += markdown([[*heads, "card, GiB"], cells]).splitlines()
    if "methods" in report:  # in Markdown, for docs/methods.md
        rows = [["per video of a step", "passes without, with gradient", "frames", "TFLOP", "against InstructVideo", "peak GiB"]]
        for name, row in report["methods"].items():
            against = row["tflop"] / report["methods"]["InstructVideo"]["tflop"]
            rows.append([name, f"{row['without_gradient']:.3g}, {row['with_gradient']:.3g}", f"{row['frames']:.3g}",
                         f"{row['tflop']:.1f}", f"{against:.2f}", f"{row['peak_gib']['total']:.1f}"])
        lines += markdown(rows).splitlines()
    return lines


def main(cfg):
    """Measure, write the JSON, print the table."""
    report = measure(cfg)
    write_json(cfg.out, report)
    print("\n".join([*table(report), f"report: {cfg.out}"]))


def parse():
    """The command line. What a published base was made for is its own, unless given."""
    cfg = tyro.cli(Config, description=__doc__)
    made_for = {name: value for name, value in BASES.get(cfg.base, {}).items() if hasattr(cfg, name)}
    return tyro.cli(Config, description=__doc__, default=Config(**made_for))


if __name__ == "__main__":
    run_script("benchmark.py", lambda: main(parse()))
