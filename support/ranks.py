"""Devices, precisions, the processes ("ranks") that torchrun starts, signals, progress bars, seeds, and how a script ends."""
import hashlib
import json
import os
import signal
import sys
import threading
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map
from tqdm import tqdm

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
LONG_WAIT = timedelta(hours=24)  # for a rank that still encodes or evaluates, or for rank 0, which writes files
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name=None):
    """The named device, or the first there is of cuda, mps, cpu. ValueError for one that torch does not have here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    with suppress(RuntimeError, AssertionError, ImportError):  # each kind of device has its own way to be absent
        device = torch.empty(0, device=name).device
        if device.type in ("cuda", "mps", "cpu"):
            return device
    raise ValueError(f"device {name!r}: not available here; it must be cuda, mps or cpu, where torch has them")


def pick_dtype(name, device):
    """Precision of the frozen weights: the named one, or on cuda bfloat16, float16 where a card lacks that, else float32."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype {name!r}: must be one of {', '.join(DTYPES)}")
    if name is None and device.type == "cuda":
        name = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    return DTYPES[name or "float32"]


def move_to(module, device):
    """A module to its device; on cuda with convolutions in channels-last order, as activations are, or each call copies them."""
    module.to(device)
    if torch.device(device).type == "cuda":
        for m in module.modules():
            if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d):
                order = torch.channels_last if m.weight.dim() == 4 else torch.channels_last_3d
                m.weight.data = m.weight.data.contiguous(memory_format=order)
    return module


# map_tensors(function, *texts): function of tensors, or of those of a name in dicts: a base that starts from pictures has dicts.
map_tensors = partial(tree_map, is_leaf=lambda text: not isinstance(text, dict))


def take(text, which):
    """text[which] (map_tensors): a part of a batch, by a slice, a list of numbers or one."""
    return map_tensors(lambda t: t[which], text)


def stack(texts, device):
    """A batch (B, ...) on its device, of what belongs to each video (map_tensors)."""
    return map_tensors(lambda *items: torch.stack(items).to(device, non_blocking=True), *texts)


def rank_and_size():
    """(rank, world size) of this process, as torchrun tells it; (0, 1) without torchrun. Rank 0 writes and prints."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if "RANK" in os.environ else (0, 1)


def is_main_process():
    """Whether this process is the one that writes and prints."""
    return rank_and_size()[0] == 0


def join_ranks(name=None):
    """This process's device, as pick_device's; under torchrun it joins the group first (nccl on cuda, gloo elsewhere)."""
    if "RANK" not in os.environ:
        return pick_device(name)
    cuda = torch.cuda.is_available() and name != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torchrun keeps its store across restarts, so each attempt needs its own prefix.
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=30))
    GROUPS["patient"] = dist.new_group(backend="gloo", timeout=LONG_WAIT)
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else pick_device(name or "cpu")


GROUPS = {"patient": None}  # for all but the sum of gradients: waits longer than the half hour after which a step counts as hung


def on_rank_0(function):
    """Call function() on rank 0 alone and return what it does there. Its ValueError is raised everywhere, elsewhere empty."""
    rank, world_size = rank_and_size()
    if world_size == 1:
        return function()
    value = error = None
    try:
        value = function() if rank == 0 else None
    except ValueError as found:
        error = found
    value, error = all_gather((value, error))[0]
    if error:
        raise error if rank == 0 else ValueError()
    return value


def all_gather(value):
    """What every rank has, on every rank, in order of rank. Each waits here for all."""
    values = [value] * rank_and_size()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value, group=GROUPS["patient"])
    return values


def add_over_ranks(parameters, numbers, loss_scale=1.):
    """Sum the parameters' gradients, in place, and a list of numbers over the ranks, in one message; returns the numbers. DDP
    would expect one forward pass for each backward one. loss_scale: by which the loss was multiplied; taken out, in float32."""
    flat = torch.cat([*(p.grad.flatten() for p in parameters), torch.tensor(numbers, device=parameters[0].device)])
    if rank_and_size()[1] > 1:
        dist.all_reduce(flat)
    *grads, numbers = flat.split([*(p.numel() for p in parameters), len(numbers)])
    for p, g in zip(parameters, grads):
        p.grad.copy_(g.view_as(p) / loss_scale)
    return numbers.tolist()


CAUGHT = []  # numbers of the signals that have come


@contextmanager
def catch_signals():
    """While this is open, Ctrl-C, SIGTERM and SIGHUP do not end the process: `signalled` tells of them. Afterwards they do.
    In a thread, where Python catches no signals, they end the process. SIGHUP stays ignored where it is, as under nohup. After a
    step train.train tells all ranks and finish_step saves; `stop_alone` ends evaluations; train_and_report says what is next."""
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def catch(signal_number, frame):
        if signal_number == HANGUP:  # the terminal has been closed, and what is written to it would be an error
            for stream in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if not CAUGHT and is_main_process():
            tqdm.write("stopping: the step under way is finished and saved first", file=sys.stderr)
        CAUGHT.append(signal_number)

    CAUGHT.clear()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for signal_number in {signal.SIGINT, signal.SIGTERM, HANGUP}:
            if signal_number != HANGUP or signal.getsignal(HANGUP) != signal.SIG_IGN:
                before[signal_number] = signal.signal(signal_number, catch)
    try:
        yield
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)


def signalled():
    """The number of the first signal that has come, 0 if none has."""
    return CAUGHT[0] if CAUGHT else 0


def stop_alone():
    """KeyboardInterrupt after a signal. With several ranks it is left to the next step: those that stay would wait for ever."""
    if signalled() and rank_and_size()[1] == 1:
        raise KeyboardInterrupt


def run_script(script, main, refused=(OSError,)):
    """Call main() and end the process with its status; None is 0. Bad input (ValueError) becomes one line and status 2, what the
    machine refused one line and 1, an interruption 130. Before ranks have joined, a node's first prints what all find wrong. An
    error ends the process at once, then torchrun the others: to leave the group takes all ranks, which may wait for this one."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which matplotlib may not know here, is inherited; we draw into files alone
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that this terminal has not
    rank, failed, line = rank_and_size()[0], True, ""
    try:
        status, failed = main() or 0, False
    except ValueError as error:
        status, line = 2, str(error)
    except KeyboardInterrupt:
        status, line = 130, "interrupted" if rank == 0 else ""
    except refused as error:
        status, line = 1, str(error)
    except Exception:
        status, line = 1, traceback.format_exc()
    if line and (status == 1 or dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"):
        print(f"{script}: {f'rank {rank}: ' if rank else ''}{line}", file=sys.stderr)
    if dist.is_initialized():
        if failed:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()
    sys.exit(status)


# Progress bars. A log file or a notebook keeps all that is written, so there a bar is a line now and then.

LINE_EVERY = 30.  # seconds between the lines of a job where nobody watches a terminal


class Lines:
    """Where a bar that is no terminal's writes: each state as a line of its own, without control characters, and once."""
    def __init__(self, file):
        self.file, self.flush, self.last = file, file.flush, ""

    def write(self, text):
        line = text.replace("\x1b[A", "").strip()
        if line and line != self.last:
            self.file.write(line + "\n")
        self.last = line or self.last


class Bar(tqdm):
    """A bar of work that `workers` ranks share: each does about as much as rank 0, which draws it."""
    workers = 1

    def update(self, n=1):
        return super().update(min(n * self.workers, self.total - self.n))


def progress(iterable=None, desc=None, total=None, *, unit="steps", initial=0, leave=True, disable=False, shared=False):
    """tqdm's bar, on rank 0's standard error stream. `set_postfix_str(text, refresh=False)` says more with its next state.
    shared: `total` is the work of all ranks, and each update is what this one has done of it. leave: whether its end stays on
    the terminal. A job has a line at its start and end in a log; a part of one has lines if it takes longer than LINE_EVERY."""
    state = "{n_fmt}/{total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"
    look = {"bar_format": "{desc}: {percentage:3.0f}%|{bar}| " + state}
    if not sys.stderr.isatty():
        look = {"file": Lines(sys.stderr), "mininterval": LINE_EVERY, "maxinterval": LINE_EVERY,
                "delay": 0 if leave else LINE_EVERY, "bar_format": "{desc}: " + state}
    rank, world_size = rank_and_size()
    bar = Bar(iterable, desc, total, leave, unit=unit, initial=initial, disable=disable or rank > 0, **look)
    bar.workers = world_size if shared else 1
    return bar


# A sample's noise comes from a generator of its own, seeded by what the sample is (seed, step, position in the batch), never
# from global state. It is then the same in any batch, on any number of processes, before and after resuming.

def sample_generator(seed, *key):
    """A CPU generator that depends on nothing but (seed, *key), whole numbers and words."""
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()  # hashed: neighbouring seeds stay unrelated
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch's CPU generator uses 32 bits of a seed


def start_noise(shape, generator, parts=1):
    """What a video (C, f, h, w) starts from, drawn part after part: the first part is the same however many follow it."""
    C, f, h, w = shape
    return torch.cat([torch.randn(C, f // parts, h, w, generator=generator) for _ in range(parts)], dim=1)
