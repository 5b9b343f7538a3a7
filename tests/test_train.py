"""train.py on the shipped weights: the method as one step, what each setting changes, and what a run leaves behind."""
import contextlib
import copy
import io
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import imageio.v3 as iio
import pytest
import torch
import tyro
from conftest import JUDGED, assert_same_run, gradient, listing, metrics, refused, run, same_tensors, tuned_base, write_footage
from safetensors.torch import load_file

import lora
import sampler
import train
from data import ClipConfig, LatentDataset
from evaluate import evaluate
from formats import adapters
from formats.weights import TINY
from methods import draft
from methods.common import read_videos
from model import load_base
from reward import load_reward
from support import run as run_folder, settings, videos
from tiny import clips, world

SHORT = ["--device", "cpu", "--frames", "4", "--segments", "2", "--batch-size", "2", "--num-steps", "2", "--tau", "1",
         "--eval-count", "1"]
pytestmark = pytest.mark.usefixtures("short_clips")


@pytest.fixture(autouse=True)
def handlers_end_with_their_run(aside):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == handlers


def parse(argv):
    """The settings of a command line."""
    return settings.parse(argv, train.PRESETS, train.__doc__)


# ----------------------------------------------------- One step -----------------------------------------------------

def make_parts(dtype=torch.float32):
    """Base with adapters that do something, reward, clips of four frames."""
    base = tuned_base(.05, dtype)
    full = clips.clips(base, world.FRAMES, world.SIZE)
    dataset = LatentDataset([m[:, :, :4] for m in full.moments], full.text, full.captions)
    return base, load_reward(base_folder=base.folder, dtype=dtype), dataset


@pytest.fixture(scope="module")
def parts():
    """One setting for all tests of a single step."""
    return make_parts()


CFG = train.Config(frames=4, segments=2, batch_size=2, num_steps=4, tau=.5, guidance=3., warmup=0, steps=1, clip_grad=1e9)


def batch_of(parts, cfg, step=0):
    return train.draw_batch(parts[2], step, cfg, parts[0])


class Recorder:
    """Stands in for run_folder.Run: remembers what the loop tells it."""
    def __init__(self, parameters, number):
        self.parameters, self.number, self.lines, self.gradients, self.rates = parameters, number, [], [], []

    def steps(self, optimizer):
        self.optimizer = optimizer
        return range(self.number)

    def finish_step(self, step, numbers, finite, stopping):
        assert numbers.keys() == {"reward", "loss", "grad_norm"} and not stopping
        self.lines.append({"step": step, "finite": finite} | numbers)
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters]))
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        return True


def loop(parts, cfg):
    """train.train for cfg.steps steps; afterwards the adapters are as they were."""
    base, reward, _ = parts
    recorder, uncond = Recorder(lora.parameters(base.network), cfg.steps), base.encode_text([""])
    before = [p.detach().clone() for p in recorder.parameters]
    method = train.Method(lambda step: batch_of(parts, cfg, step),
                          lambda batch: train.edit_rewards(base, reward, uncond, batch, cfg))
    assert train.train(cfg, recorder.parameters, method, recorder)
    assert [line["step"] for line in recorder.lines] == list(range(1, cfg.steps + 1))
    recorder.change = [p.detach() - b for p, b in zip(recorder.parameters, before)]
    with torch.no_grad():
        for p, b in zip(recorder.parameters, before):
            p.copy_(b)
    return recorder


def test_the_gradient_reaches_every_adapter_and_nothing_else(parts):
    base, reward, _ = parts
    loop(parts, CFG)
    for name, p in base.network.named_parameters():
        if "lora_" in name:
            assert p.grad.abs().max() > 0, name
        else:
            assert not p.requires_grad and p.grad is None, name
    for frozen in (base.vae, base.text_encoder, reward):
        assert all(not p.requires_grad and p.grad is None for p in frozen.parameters())


def test_the_anchor_takes_off_the_distance_to_the_base(parts, monkeypatch):
    """By hand: of the one call with gradient, the mean square difference to the same call at strength 0, of both branches."""
    base, reward, _ = parts
    batch, predict, calls = batch_of(parts, CFG), base.predict, []
    monkeypatch.setattr(base, "predict", lambda *inputs: calls.append((torch.is_grad_enabled(), inputs)) or predict(*inputs))

    def score(batch):
        return train.edit_rewards(base, reward, base.encode_text([""]), batch, CFG)

    R, plain_log = score(batch)
    inputs = next(inputs for with_gradient, inputs in calls if with_gradient)
    lora.set_scale(base.network, 0.)
    with torch.no_grad():
        base_eps = predict(*inputs)[1]
    lora.set_scale(base.network, 1.)
    square = (predict(*inputs)[1] - base_eps).square()                                   # (2B, C, F, h, w)
    distance = (square[:2].mean((1, 2, 3, 4)) + square[2:].mean((1, 2, 3, 4))) / 2       # (B,)
    expected = gradient(base, R - 3. * distance)

    count = len(calls)
    anchored = lora.anchored(base, score, 3.)
    found, logged = anchored(batch)
    assert len(calls) == 2 * count + 1  # the same calls, and one more
    torch.testing.assert_close(found, R - 3. * distance)
    torch.testing.assert_close(gradient(base, found), expected, rtol=1e-4, atol=1e-9)
    assert logged.keys() == plain_log.keys() | {"distance"} and (logged["distance"] > 0).all()
    assert {layer.strength for layer in lora.layers(base.network).values()} == {1.}
    last_clip = train.split_batch(batch, 1)[1]
    torch.testing.assert_close(anchored(last_clip)[0], found[1:])  # nothing is left from the batch before


def test_an_anchored_run_stays_nearer(plain):
    flags = [*SHORT, "--batch-size", 1, "--lr", ".02", "--warmup", 0, "--eval-every", 0, "--steps", 3]
    for anchor in (1e-9, 1e3):
        assert run(*flags, "--anchor", anchor, "--out", f"run{anchor}") == 0
    loose, tight = ([line["distance"] for line in metrics(f"run{anchor}")] for anchor in (1e-9, 1e3))
    assert loose[0] == tight[0] == 0  # adapters begin as the base
    assert loose[1] == pytest.approx(tight[1], rel=.1) and tight[2] < .7 * loose[2]


def test_the_loss_is_minus_the_mean_of_equation_8(parts, monkeypatch):
    base, reward, _ = parts
    batch = batch_of(parts, CFG)
    g, captions = batch[3], batch[4]
    seen = {}
    monkeypatch.setattr(train, "edit", lambda *args: seen.setdefault("z_0", real(*args)))
    real = sys.modules["sampler"].edit
    R, logged = train.edit_rewards(base, reward, base.encode_text([""]), batch, CFG)
    # By hand: each clip's frames one by one, weighted by their distance from the middle, F/2 = 2.
    r = [[reward(base.decode_frames(seen["z_0"][b:b + 1])[:, [i]], captions[b:b + 1]).item() for i in g[b]] for b in (0, 1)]
    f = [[math.exp(-1.0 * abs(i - 2)) for i in g[b].tolist()] for b in (0, 1)]
    by_hand = [sum(x * y for x, y in zip(r[b], f[b])) / 2 for b in (0, 1)]
    assert R.tolist() == pytest.approx(by_hand, abs=1e-5)
    assert logged.keys() == {"reward"} and not logged["reward"].requires_grad
    assert logged["reward"].tolist() == pytest.approx([sum(x) / 2 for x in r], abs=1e-5)
    line = loop(parts, CFG).lines[0]
    assert line["loss"] == pytest.approx(-sum(by_hand) / 2, abs=1e-5)
    assert line["reward"] == pytest.approx(sum(map(sum, r)) / 4, abs=1e-5)


def test_settings_reach_the_method(parts, monkeypatch):
    seen, real = [], train.edit
    monkeypatch.setattr(train, "edit", lambda *args: seen.append(args[5:]) or real(*args))
    line = loop(parts, replace(CFG, tau=.75, guidance=1.5, grad_steps=2, lambda_tar=0.)).lines[0]
    (levels, *others), = seen
    assert len(levels.t) - 1 == 4 and others == [.75, 1.5, 2]  # D; tau, guidance, K
    assert line["loss"] == pytest.approx(-line["reward"])  # with lambda 0, R is the plain mean


def test_a_few_steps_on_one_batch_raise_its_reward(parts, monkeypatch):
    batch = batch_of(parts, CFG)
    monkeypatch.setattr(train, "draw_batch", lambda *args: batch)
    losses = [line["loss"] for line in loop(parts, replace(CFG, steps=6, lr=3e-3)).lines]
    assert losses[-1] < losses[0] and losses[-1] == min(losses), losses


# ------------------------------------------------- The batch of a step -------------------------------------------------

def equal(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def test_a_batch_is_the_same_on_one_rank_and_on_two(parts, monkeypatch):
    cfg = replace(CFG, batch_size=4, offset_noise=.1)
    whole = batch_of(parts, cfg, step=3)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(train.ranks, "rank_and_size", lambda rank=rank: (rank, 2))
        shares.append(batch_of(parts, cfg, step=3))
    assert all(len(share[4]) == 2 for share in shares)
    joined = [torch.cat(v) if isinstance(v[0], torch.Tensor) else sum(v, []) for v in zip(*shares)]
    assert equal(joined, whole)


def test_a_sample_does_not_depend_on_its_neighbours_but_on_seed_and_step(parts):
    two = batch_of(parts, CFG)
    assert equal([v[:2] for v in batch_of(parts, replace(CFG, batch_size=4))], two)
    assert equal(batch_of(parts, CFG), two) and not torch.equal(two[1][0], two[1][1])
    for other in (batch_of(parts, CFG, step=1), batch_of(parts, replace(CFG, seed=1))):
        assert not torch.equal(other[1], two[1])


def test_offset_noise_is_shared_by_a_frames_channel_and_leaves_the_rest(parts):
    plain, offset = batch_of(parts, CFG), batch_of(parts, replace(CFG, offset_noise=.5))
    extra = offset[1] - plain[1]                                                          # (B, C, F, h, w)
    torch.testing.assert_close(extra, extra[..., :1, :1].expand_as(extra), atol=1e-6, rtol=0)
    assert .05 < extra[..., 0, 0].std() < 2
    assert equal([*plain[:1], *plain[2:]], [*offset[:1], *offset[2:]])
    assert batch_of(parts, replace(CFG, segments=4))[3].tolist() == [[0, 1, 2, 3]] * 2  # as many as frames: dense scoring


def test_saving_memory_leaves_the_gradient(parts):
    """Bit for bit, or but for the order in which it is added up. In parts of two the last one is smaller."""
    exact = loop(parts, replace(CFG, batch_size=3))
    for setting, error in ((dict(clips_at_once=1), 5e-6), (dict(clips_at_once=2), 5e-6), (dict(clips_at_once=4), 0),
                           (dict(decode_chunk=1), 5e-6), (dict(checkpoint_activations=True), 0), (dict(low_memory=True), 5e-6)):
        cfg = replace(CFG, batch_size=3, **setting)
        parts[0].network.checkpoint_activations(cfg.checkpoint_activations or cfg.low_memory)  # as main does
        frugal = loop(parts, cfg)
        parts[0].network.checkpoint_activations(False)
        difference = (frugal.gradients[0] - exact.gradients[0]).norm() / exact.gradients[0].norm()
        assert difference <= error and frugal.lines[0] == pytest.approx(exact.lines[0], abs=1e-5), setting


def test_float16_trains_on_the_same_gradient():
    """Unscaled, half of its elements would be exactly 0: they are smaller than the least number of float16."""
    def gradient(dtype):
        return loop(make_parts(getattr(torch, dtype)), replace(CFG, batch_size=1, dtype=dtype))
    exact, half = gradient("float32"), gradient("float16")
    a, b = exact.gradients[0], half.gradients[0]
    zeros = (b[a != 0] == 0).float().mean().item()
    cosine = torch.cosine_similarity(a, b, dim=0).item()
    print(f"float16: cosine {cosine:.6f}, {zeros:.2%} zeros")  # for docs/gpu.md
    assert cosine > .999 and zeros < .01
    assert half.lines[0]["grad_norm"] == pytest.approx(exact.lines[0]["grad_norm"], rel=.02)  # unscaled before clipping


def test_warm_up_clipping_and_step_size(parts, monkeypatch):
    batch = batch_of(parts, CFG)
    monkeypatch.setattr(train, "draw_batch", lambda *args: batch)
    warm = loop(parts, replace(CFG, steps=3, warmup=2, lr=1e-5))
    assert warm.rates == pytest.approx([.5e-5, 1e-5, 1e-5])
    norm = warm.lines[0]["grad_norm"]
    assert warm.gradients[0].norm() == pytest.approx(norm, rel=1e-4)
    clipped = loop(parts, replace(CFG, clip_grad=norm / 10))
    assert clipped.gradients[0].norm() == pytest.approx(norm / 10, rel=1e-2)
    assert clipped.lines[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)  # logged as it was before clipping
    # AdamW's first step is lr for every weight, and no weight decay pulls on those without gradient.
    assert max(c.abs().max() for c in clipped.change) == pytest.approx(CFG.lr, rel=1e-2)


def test_steps_that_are_not_finite_are_skipped_and_many_in_a_row_stop_the_run(monkeypatch, capsys):
    real_rewards, real_save, calls, states = train.edit_rewards, torch.save, [], []

    def spoilt(*args):
        R, logged = real_rewards(*args)
        calls.append(R)
        spoil = math.nan if len(calls) in (2, 4, 5) else 1.
        return R * spoil, {name: values * spoil for name, values in logged.items()}
    monkeypatch.setattr(train, "edit_rewards", spoilt)
    monkeypatch.setattr(torch, "save", lambda state, path: (states.append(copy.deepcopy(state)), real_save(state, path)))
    with pytest.raises(RuntimeError, match="2 steps in a row without a finite reward"):
        run(*SHORT, "--steps", 9, "--eval-every", 0, "--save-every", 1, "--max-bad-steps", 2, "--out", "run")
    assert "step 2: reward or gradient is not finite, skipped (1 so far)" in capsys.readouterr().out
    lines = metrics("run")
    assert [line.get("skipped") for line in lines] == [None, 1, None, 2, 3]
    assert lines[1] == {"step": 2, "reward": None, "loss": None, "grad_norm": None, "skipped": 1}
    assert all(math.isfinite(line[k]) for line in (lines[0], lines[2]) for k in ("reward", "loss", "grad_norm"))
    one, two, three, four = [state["adapters"] for state in states]
    assert equal(one.values(), two.values()) and equal(three.values(), four.values()) and not equal(one.values(), three.values())
    assert [s["optimizer"]["state"][0]["step"].item() for s in states] == [1, 1, 2, 2]
    assert equal(load_file("run/lora.safetensors").values(), dict(sorted(three.items())).values())  # the last good adapters


def test_an_evaluation_that_is_not_finite_is_null_and_never_the_best(plain, monkeypatch, capsys):
    """The first one has no number for a set: JSON has no word for it, and a later evaluation is better."""
    measure = run_folder.Evaluations.measure

    def spoilt(self, step):
        tables, found = measure(self, step)
        if step == 0:
            tables["new"]["reward"][0] = math.nan
        return tables, found
    monkeypatch.setattr(run_folder.Evaluations, "measure", spoilt)
    assert run(*SHORT, "--steps", 1, "--eval-every", 1, "--out", "run") == 0
    for path in (Path("run/metrics.jsonl"), Path("run/samples/step_000000.json")):
        assert "NaN" not in path.read_text() and "null" in path.read_text()
    assert metrics("run")[0]["eval"]["new"]["reward_mean"] is None
    said = capsys.readouterr().out
    assert "new        nan" in said and "± undefined" in said and "n 1" in said  # the closing table, of one video each
    assert same_tensors("run/best.safetensors", "run/lora.safetensors")
    assert run("--resume", "run") == 0  # reads those lines
    record = Path("run/run.json").read_text()
    assert run("--resume", "run", "--steps", 2, "--eval-every", 0) == 0  # without evaluations, whose prompts a report needs
    assert Path("run/run.json").read_text() == record


# ------------------------------------------------- What a run leaves behind -------------------------------------------------

WHOLE = ["--steps", "4", "--eval-every", "2", "--save-every", "3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, short_clips):
    """A run of four steps: (folder, what it printed). In a thread, as a notebook may start it, where no signal is caught."""
    folder, said, ended = tmp_path_factory.mktemp("whole") / "run", io.StringIO(), []
    thread = threading.Thread(target=lambda: ended.append(run(*SHORT, *WHOLE, "--out", folder)))
    with contextlib.redirect_stdout(said):
        thread.start()
        thread.join()
    assert ended == [0]
    return folder, said.getvalue()


def test_the_run_folder_holds_what_the_readme_lists(whole):
    folder, said = whole
    files = listing(folder)
    assert [f for f in files if "/" not in f] == ["before_after.gif", "before_after.png", "best.safetensors", "config.json",
                                                  "curves.png", "lora.safetensors", "metrics.jsonl", "run.json", "state.pt"]
    for step in ("000000", "000002", "000004"):
        of_step = [f for f in files if f.startswith(f"samples/step_{step}")]
        assert of_step[:2] == [f"samples/step_{step}.json", f"samples/step_{step}.png"]
        clips = of_step[2:]
        assert len(clips) == 3 and all(f.endswith(".mp4") for f in clips)  # a video of each prompt set
    video, about = iio.imread(folder / clips[0]), iio.immeta(folder / clips[0], plugin="pyav")
    assert video.shape == (4, 256, 256, 3) and about["fps"] == 8 and len(files) == 9 + 3 * 5
    picture, moving = iio.imread(folder / "before_after.png"), iio.imread(folder / "before_after.gif")
    assert picture.shape[1] > 2 * 4 * 96 and moving.shape[0] == 4 and moving.shape[2] > 3 * 2 * 96  # four frames of both videos

    lines = metrics(folder)
    assert [(line["step"], "eval" in line) for line in lines] == [
        (0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
    assert list(lines[0]["eval"]) == ["in_domain", "new", "other"] and lines[0].keys() == {"step", "eval"}
    assert all(found.keys() == {"reward_mean", "reward_std", "n"} | JUDGED for found in lines[0]["eval"].values())
    assert lines[1].keys() == {"step", "reward", "loss", "grad_norm"}  # and seconds, which metrics() leaves out

    config = json.loads((folder / "config.json").read_text())
    own = load_base("tiny").guidance  # what --guidance is by default
    asked = replace(parse([*SHORT, *WHOLE, "--out", str(folder)]), guidance=own, dtype="float32")  # and the device's
    assert parse(["--resume", str(folder)]) == replace(asked, resume=folder) and config == settings.to_record(asked)
    record = json.loads((folder / "run.json").read_text())
    assert record["versions"]["torch"] == torch.__version__ and record["versions"].keys() >= {"python", "machine"}
    assert record["prompts"] == train.prompt_sets(load_base("tiny"), (), 1) and record["data"]["clips"] == 6
    assert record["reward"] == "HPStiny"
    state = torch.load(folder / "state.pt")
    assert state.keys() == {"version", "step", "config", "adapters", "optimizer"}
    assert state["step"] == 4 and state["config"] == config
    on_file = load_file(folder / "lora.safetensors")
    assert equal(dict(sorted(state["adapters"].items())).values(), on_file.values()) and any(v.any() for v in on_file.values())
    assert adapters.read_adapter(folder / "lora.safetensors").base == "tiny"


def test_it_ends_by_printing_before_and_after(whole):
    folder, said = whole
    first, last = (line["eval"]["new"]["reward_mean"] for line in (metrics(folder)[0], metrics(folder)[-1]))
    assert f"new        {first:.4f} -> {last:.4f}   {last - first:+.4f} ± undefined   n 1   watermark " in said
    prompt = train.prompt_sets(load_base("tiny"), (), 1)["in_domain"][0]
    assert said.splitlines()[-5:] == [
        f"picture: {folder}/before_after.png", f"moving picture: {folder}/before_after.gif",
        f"adapter: {folder}/lora.safetensors",
        f"next: python generate.py --frames 4 --lora {folder}/lora.safetensors --prompt '{prompt}'",
        f"      python report.py {folder}"]
    assert "HPStiny of videos from pure noise" in said


def test_evaluation_during_training_is_the_metric_of_evaluate(whole):
    """The last line of the run, computed again from its adapter: same prompts, same noise (the third video's), same numbers."""
    base = load_base("tiny")
    lora.load(base.network, whole[0] / "lora.safetensors")
    prompts = train.prompt_sets(base, (), 1)["other"]
    table, _ = evaluate(base, load_reward(base_folder=base.folder), prompts, seed=run_folder.EVAL_SEED + 2, segments=2,
                        shape=(4, 32, 32), num_steps=2)
    assert metrics(whole[0])[-1]["eval"]["other"]["reward_mean"] == pytest.approx(table["reward"].item(), abs=1e-6)


# ----------------------------------------------------- Resuming -----------------------------------------------------

def stop_in(patch, step, number):
    """Sends this process a signal while a step, counted from 1, is under way."""
    real = train.draw_batch

    def draw_batch(dataset, at, *args):
        if at + 1 == step:
            os.kill(os.getpid(), number)
        return real(dataset, at, *args)
    patch.setattr(train, "draw_batch", draw_batch)


def test_whatever_ends_a_run_it_goes_on_as_if_nothing_had_happened(whole, plain, monkeypatch, capsys):
    command = [*SHORT, *WHOLE, "--steps", 3, "--out", "run"]
    with monkeypatch.context() as patch:  # killed before the first checkpoint: it starts again from zero
        patch.setattr(run_folder.Run, "save", lambda *args: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(*command)
    assert "state.pt" not in listing("run")

    # Signals in the middle of a step: it is finished and saved, wherever --save-every stands. The same command goes on.
    for step, number, argv in ((1, signal.SIGINT, command), (2, signal.SIGTERM, ["--resume", "run"])):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            stop_in(patch, step, number)
            assert run(*argv) == 128 + number
        assert torch.load("run/state.pt")["step"] == step == metrics("run")[-1]["step"]
        said, told = capsys.readouterr()
        assert "stopped; to go on: the same command with --resume run" in said
        assert told.count("stopping: the step under way is finished and saved first") == 1
        assert f"fine-tuning: {step}/3 steps, " in told.splitlines()[-1]  # the bar says what is saved
    refused("out run: holds another run", run, *command, "--lr", "1")

    # What a killed run may leave besides: lines past its checkpoint, the last one half written, and half a file.
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 77, "reward": 0.5, "loss": -0.1, "grad_norm": 1.0, "seconds": 1.0}\n{"step": 78, "rew')
    Path("run/.0a1b2c3d.state.pt").write_bytes(b"half")

    # A signal in the evaluation after the last step.
    measure = run_folder.Evaluations.measure
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Evaluations, "measure",
                      lambda self, step: (step == 3 and os.kill(os.getpid(), signal.SIGHUP), measure(self, step))[1])
        assert run("--resume", "run") == 129
    assert torch.load("run/state.pt")["step"] == 3 and "eval" not in metrics("run")[-1]

    # It may be made longer.
    assert run("--resume", "run", "--steps", 4) == 0
    assert json.loads(Path("run/config.json").read_text())["steps"] == 4
    assert_same_run("run", whole[0])
    refused("out run: holds a finished run", run, *command, "--steps", 4)


def test_resuming_something_else_is_refused(whole, monkeypatch):
    """Before weights are loaded, which on a GPU box are downloads of gigabytes."""
    folder = whole[0]
    before = listing(folder), (folder / "config.json").read_bytes()
    assert run("tiny", f"--resume={folder}", "--tau", "1") == 0  # finished, and nothing new was asked
    monkeypatch.setattr(train, "load_base", lambda *args: pytest.fail("weights were loaded"))
    for argv, message in [
            (["--resume", folder, "--tau", "0.3", "--workers", "5"],
             "tau would make it another run; only cache, .*steps.*may change"),
            (["--resume", folder, "--lr=1", "--prompts", "a=b"], "prompts, lr would make it another run"),
            (["--resume", folder, "--steps", "3"], "steps = 3: must be at least 4, where this run stands"),
            (["modelscope", "--resume", folder], "preset would make it another run"),
            (["--resume", "nowhere"], "nowhere/config.json: expected JSON"), (["--lr", "0"], "lr = 0.0: must be")]:
        refused(message, run, *argv)
    assert (listing(folder), (folder / "config.json").read_bytes()) == before


def test_what_changes_numbers_by_rounding_at_most_may_change(whole):
    assert run(*SHORT, "--steps", 2, "--eval-every", 0, "--out", "run") == 0
    assert run("--resume", "run", "--steps", 4, "--clips-at-once", 1, "--low-memory", "--decode-chunk", 2, "--workers", 3,
               "--save-every", 1, "--device", "cpu", "--no-cache") == 0
    changed = dict(steps=4, clips_at_once=1, low_memory=True, decode_chunk=2, workers=3, save_every=1, cache=False)
    config = json.loads(Path("run/config.json").read_text())
    assert {name: config[name] for name in changed} == changed
    assert parse(["--resume", "run"]) == replace(parse(["--resume", str(whole[0])]), resume=Path("run"), out=Path("run"),
                                                 eval_every=0, **changed)
    x, y = (load_file(f"{folder}/lora.safetensors") for folder in ("run", whole[0]))
    assert all((x[k] - y[k]).abs().max() < 1e-3 for k in y)  # AdamW divides by the gradient's size, rounding too


def test_the_settings_of_an_earlier_version(whole, capsys):
    """What came later takes its default, or 0 for an anchor; what is not known any more, or of another type, is refused."""
    config = json.loads((whole[0] / "config.json").read_text())
    Path("run").mkdir()
    del config["compile"]
    Path("run/config.json").write_text(json.dumps(config))
    assert parse(["--resume", "run"]) == replace(parse(["--resume", str(whole[0])]), resume=Path("run"))
    for other, message in (({"reward": "hpsv2"}, "config.json: reward = 'hpsv2' is not of this setting's type"), (
            {"momentum": .9}, "run/config.json: not the settings of this method or version; not known or missing: momentum")):
        Path("run/config.json").write_text(json.dumps(config | other))
        refused(message, parse, ["--resume", "run"])

    record = settings.to_record(train.PRESETS["tiny-wan"])
    assert record.pop("anchor") == .02
    Path("run/config.json").write_text(json.dumps(record | {"early_stop": False, "keep": 3, "watch": ["motion"]}))
    known = settings.read_settings(Path("run"), train.PRESETS)
    assert known == record | {"anchor": 0, "watch": ["motion"]}
    assert "run/config.json: early_stop, keep: no longer settings, left out" in capsys.readouterr().out
    Path("run").rename("watch")  # a folder's name is no flag
    assert parse(["--resume", "watch"]).watch == ("motion",)


def assert_survives(flags, presets=train.PRESETS):
    """Settings are what they were when they are read back from config.json. Returns them."""
    cfg = settings.parse(flags, presets, "")
    Path("run").mkdir(exist_ok=True)
    Path("run/config.json").write_text(json.dumps(settings.to_record(cfg)))
    assert settings.parse(["--resume", "run"], presets, "") == replace(cfg, resume=Path("run"))
    return cfg


def test_settings_survive_config_json():
    assert assert_survives([]) == parse(["tiny"]) == train.Config()
    real = assert_survives(["modelscope", "--guidance", "None", "--data", "a b.txt", "--prompts", "a=b", "--prompts", "c=d e"])
    assert real.lr == train.PRESETS["modelscope"].lr and real.base != "tiny" and real.guidance is None
    assert_survives(["--reward", "hpsv2", "--reward", "vjepa=-0.5", "--reward-weights", "vjepa=x=y", "--watch", "pixels",
                     "--lr", "1e-07", "--size", "64x96", "--eval-every", "0", "--dtype", "float16", "--compile", "--no-cache"])


def test_clips_and_noise_have_the_rows_and_columns_asked_for(parts, monkeypatch):
    """And of squares the cache's keys are those of before."""
    base, configs = parts[0], []
    monkeypatch.setattr(train, "encode_clips", lambda clips, config, *more: configs.append(config))
    write_footage(1)
    cfg = replace(CFG, data=Path("clips.txt"))
    assert settings.rows_columns(None, 8) == (8, 8) and settings.rows_columns("480x832", 8) == (480, 832)
    for size in (32, "32x32", "16x48"):
        train.read_clips(replace(cfg, size=size), base)
    assert configs[0] == configs[1] == ClipConfig(4, 8, 32, 32) and (configs[2].height, configs[2].width) == (16, 48)
    noise, *_ = read_videos(draft.Config(frames=4, size="16x48"), base).batch(0)
    assert noise.shape[1:] == (4, 4, 4, 12)


def test_a_run_on_other_clips_is_not_continued():
    write_footage(3, "videos")
    assert run(*REAL, "--eval-every", 0, "--out", "run") == 0
    Path("elsewhere").mkdir()
    with contextlib.chdir("elsewhere"):  # data, its root and the prompts are known by absolute paths
        assert run("--resume", "../run", "--steps", 2, "--cache-dir", "../cache") == 0
    recorded = json.loads(Path("run/run.json").read_text())["data"]
    assert recorded["clips"] == 3 and len(recorded["fingerprint"]) == 16
    original = Path("clips.txt").read_text()
    Path("clips.txt").write_text(original.replace("up", "down"))
    refused(r"must be those that run began with, \{.clips.: 3,.*another list", run, "--resume", "run", "--steps", 3)
    Path("clips.txt").write_text(original)
    Path("run/run.json").unlink()  # a run from before there was such a file
    assert run("--resume", "run", "--steps", 3) == 0
    assert json.loads(Path("run/run.json").read_text())["data"] == recorded


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(monkeypatch):
    assert run(*SHORT, "--steps", 1, "--eval-every", 0, "--out", "run") == 0
    path = Path("run/state.pt")
    before = path.read_bytes()

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RuntimeError, match=r"run: step 2 cannot be saved \(.*No space left.*; the one before it is whole"):
            run("--resume", "run", "--steps", 2)
    assert path.read_bytes() == before
    assert listing("run") == ["config.json", "lora.safetensors", "metrics.jsonl", "run.json", "state.pt"]
    assert run("--resume", "run", "--steps", 2) == 0 and [line["step"] for line in metrics("run")] == [1, 2]


# ------------------------------------------------- Where a run may go -------------------------------------------------

def test_another_run_is_not_overwritten_unasked_and_then_only_what_is_its_own():
    Path("run/samples").mkdir(parents=True)
    for name in ("state.pt", "lora.safetensors", "best.safetensors", "metrics.jsonl",
                 "before_after.png", "before_after.gif", "curves.png", "samples/step_000000.png", "notes.txt", "mine.png"):
        Path("run", name).write_text("an earlier run's")
    command = [*SHORT, "--steps", 1, "--eval-every", 0, "--out", "run"]
    refused("out run: holds another run; choose another folder, --resume run, or --overwrite", run, *command)
    assert run(*command, "--overwrite") == 0
    assert listing("run") == ["config.json", "lora.safetensors", "metrics.jsonl", "mine.png", "notes.txt", "run.json", "state.pt"]
    assert run("--resume", "run") == 0 and metrics("run")[0]["step"] == 1  # resuming does not overwrite again


def take(*argv):
    return run_folder.take_folder(parse([*argv]))


def test_two_runs_at_once_never_have_one_folder():
    with take() as first, take() as second, take("modelscope") as other:
        assert [first, second, other] == [(Path("out/tiny"), False), (Path("out/tiny-2"), False), (Path("out/modelscope"), False)]
        Path("out/tiny/config.json").write_text(json.dumps(settings.to_record(train.Config())))
        for flag in ("--out", "--resume"):
            refused("^out/tiny: another process is at work in it; wait for its end, or choose", take(flag, "out/tiny").__enter__)
    assert listing() == ["out/tiny/config.json"] and not Path("out/tiny-2").exists()  # what holds nothing is gone
    with take("--resume", "out/tiny") as again:
        assert again == (Path("out/tiny"), True)


def test_a_run_that_is_killed_leaves_its_folder_free_though_a_worker_of_it_still_lives():
    ready, tell = os.pipe()
    run_of_another_process = os.fork()
    if not run_of_another_process:
        with take("--out", "run"):
            worker = os.fork()
            if worker:
                os.write(tell, worker.to_bytes(4, "big"))
            time.sleep(60)
            os._exit(0)
    worker = int.from_bytes(os.read(ready, 4), "big")
    try:
        refused("another process", take("--out", "run").__enter__)
        os.kill(run_of_another_process, signal.SIGKILL)
        os.waitpid(run_of_another_process, 0)
        with take("--out", "run") as taken:
            assert taken == (Path("run"), False)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_failed_first_step_leaves_no_folder_that_blocks_the_next_try(plain, monkeypatch):
    """Out of memory, as a rule; then another batch size is tried, which is another run."""
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("of somebody")
    with monkeypatch.context() as patch:
        patch.setattr(train, "edit_rewards", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        for argv in (["--out", "mine"], ["--eval-every", 0]):
            with pytest.raises(RuntimeError, match="out of memory"):
                run(*SHORT, "--steps", 1, *argv)
    assert not Path("out").exists() and "mine/notes.txt" in listing()
    assert run(*SHORT, "--steps", 1, "--eval-every", 0, "--batch-size", 1, "--out", "mine") == 0
    assert Path("mine/notes.txt").exists() and not list(Path("mine/samples").iterdir())


def test_workers_that_torchrun_started_again_continue_their_run(monkeypatch):
    monkeypatch.setattr(train.ranks, "rank_and_size", lambda: (0, 2))
    refused("out: must be given with torchrun, whose restarted workers find their run in it", train.check, train.Config())
    cfg, folder = train.Config(out=Path("run"), overwrite=True), Path("run")
    train.check(cfg)
    assert not run_folder.is_continued(folder, cfg)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings.to_record(replace(cfg, guidance=1.5))))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.0}\n')
    assert not run_folder.is_continued(folder, cfg)  # an earlier run, which it replaces
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_folder.is_continued(folder, cfg) and not run_folder.is_continued(folder, replace(cfg, tau=.5))
    torch.save({"step": 40}, folder / "state.pt")
    assert run_folder.is_continued(folder, cfg)  # it crashed after its last step


@dataclass(frozen=True)
class OwnConfig(train.Config):
    scales: tuple[float, ...] = (1.,)
    kind: Literal["a", "b"] = "a"
    share: float | None = .5
    careful: bool | None = None
    folders: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    marks: set[int] | None = None


def test_settings_of_every_kind_are_read_back_or_refused_before_anything_is_loaded():
    presets = {"tiny": OwnConfig()}
    flags = ["--scales", "-1", "2.5", "--kind", "b", "--share", "None", "--careful", "True", "--folders", "x", "--folders", "y z"]
    cfg = assert_survives(flags, presets)
    assert (cfg.scales, cfg.kind, cfg.share, cfg.careful, cfg.folders) == ((-1., 2.5), "b", None, True, (Path("x"), Path("y z")))
    refused("^config.json: marks = .* is not of this setting's type",
            settings.parse, ["--marks", "1", "--scales", "3"], presets, "")


# ------------------------------------------------- Settings of a whole run -------------------------------------------------

@pytest.mark.slow
def test_precision_compilation_and_memory_settings_together(plain, monkeypatch):
    """Training scores in bfloat16, evaluations in float32 whatever the dtype, since best.safetensors is chosen by these."""
    compiled, seen, trained = [], [], train.edit_rewards
    frames = torch.rand(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def look(base, rewards, captions, **more):
        [(_, reward)] = rewards.summed
        seen.append(reward(frames, ["a red circle"]))
        return {"reward": seen[-1].mean(1).double()}, torch.zeros(1, 4, 3, 32, 32)

    def in_training(base, rewards, *rest):
        assert {p.dtype for p in rewards.every[0].parameters()} == {torch.bfloat16}
        return trained(base, rewards, *rest)
    monkeypatch.setattr(train, "evaluate", look)
    monkeypatch.setattr(train, "edit_rewards", in_training)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    assert run(*SHORT, "--steps", 1, "--eval-every", 1, "--save-every", 5, "--dtype", "bfloat16", "--compile",
               "--low-memory", "--segments", 4, "--clips-at-once", 1, "--seed", 3, "--out", "run") == 0
    exact = load_reward(base_folder=TINY)(frames, ["a red circle"])
    assert len(seen) == 6 and all(torch.equal(scores, exact) for scores in seen)
    assert compiled == ["UNet3D"] and all(v.dtype == torch.float32 for v in load_file("run/lora.safetensors").values())
    assert metrics("run")[0]["eval"]["other"]["reward_mean"] == exact.mean().item()


REAL = [*SHORT, "--data", "clips.txt", "--data-root", "videos", "--size", "32", "--steps", "1", "--workers", "0"]


def test_real_clips_another_autoencoder_text_encoder_and_reward(plain, capsys, monkeypatch):
    monkeypatch.setattr(world, "FRAMES", 16)  # the judge's world: it has nothing to say of clips of four
    write_footage(3, "videos", 48, 64)
    with open("clips.txt", "a") as file:
        file.write("gone.mp4|||a video that is not there\n")
    Path("prompts.txt").write_text("a blue ring moving up\nx.mp4|||a green square moving left|||16\n")
    flags = [*REAL, "--max-skip", "0.25", "--cache-dir", "kept", "--fps", "4", "--offset-noise", "0.1",
             "--lambda-tar", "0", "--guidance", "1", "--rank", "2", "--decode-chunk", "2", "--checkpoint-activations",
             "--vae", TINY / "vae", "--text-encoder", TINY / "text_encoder", "--reward", "hpsv2.1",
             "--reward-weights", TINY / "reward", "--prompts", "a=prompts.txt", "--prompts", "b=prompts.txt",
             "--eval-count", "0", "--eval-every", "1"]
    assert run(*flags, "--workers", 1, "--out", "one") == 0
    said = capsys.readouterr().out
    assert "left out: videos/gone.mp4: cannot be read: no such file" in said and "3 of 4 clips can be used" in said
    assert adapters.read_adapter("one/lora.safetensors").rank == 2
    before, step, _ = metrics("one")
    assert before["eval"].keys() == {"a", "b"} and before["eval"]["b"]["n"] == 2
    assert before["eval"]["a"].keys() == {"reward_mean", "reward_std", "n"}
    assert step["loss"] == pytest.approx(-step["reward"], abs=1e-6)
    kept = listing("kept")
    assert len(kept) == 3 + 3  # moments of three clips, three captions

    # The same from the cache, where no clip is decoded, and without one.
    with monkeypatch.context() as patch:
        patch.setattr(videos, "read_windows", lambda *args: pytest.fail("a cached clip was decoded"))
        assert run(*flags, "--out", "two") == 0
    assert run(*flags, "--no-cache", "--out", "three") == 0
    assert_same_run("one", "two")
    assert_same_run("one", "three")
    assert listing("kept") == kept
    refused(r"1 of 4 clips cannot be used; at most 10% may, and not all", run, *flags, "--max-skip", 0.1, "--out", "four")
    assert not Path("four").exists()


def test_the_modelscope_preset_on_a_reduced_structure(plain, capsys):
    """The real job's path: the published structure made small, real clips in, adapters out."""
    write_footage(2, "videos", 60, 40)
    Path("animals.txt").write_text("a cat walking\n")
    assert run("modelscope", *REAL, "--base", "random:32", "--reward-weights", "random:32", "--prompts", "animals=animals.txt",
               "--out", "run") == 0
    assert "HPSrandom" in capsys.readouterr().out  # never to be taken for a score
    config = json.loads(Path("run/config.json").read_text())
    assert (config["preset"], config["lr"], config["offset_noise"], config["guidance"]) == ("modelscope", 1e-5, .1, 3.)
    adapter = adapters.read_adapter("run/lora.safetensors")
    assert len(adapter.tensors) == 2 * 264 and adapter.rank == 4 and adapter.base == "random:32"  # the paper's 264 projections
    assert all(v.any() for k, v in adapter.tensors.items() if "lora_B" in k)
    assert [("eval" in line, line["step"]) for line in metrics("run")] == [(True, 0), (False, 1), (True, 1)]


def test_guidance_belongs_to_the_base_unless_asked_for(monkeypatch, plain):
    """A base says in its UNet's config.json which guidance it was made for; training, evaluation and the record follow it."""
    shutil.copytree(TINY, "base")
    Path("base/manifest.json").unlink()
    settings_of_unet = json.loads(Path("base/unet/config.json").read_text())
    Path("base/unet/config.json").write_text(json.dumps(settings_of_unet | {"guidance": 1.25}))
    seen, guided = set(), sampler.guided
    monkeypatch.setattr(sampler, "guided", lambda *args: seen.add(args[-1]) or guided(*args))
    Path("prompts.txt").write_text("a red circle moving left\n")
    write_footage(1, "videos")
    command = ["tiny", *REAL, "--base", "base", "--prompts", "a=prompts.txt", "--batch-size", 1, "--out", "run"]
    for flags, guidance in (((), 1.25), (("--guidance", "2", "--eval-every", 0, "--overwrite"), 2.)):
        seen.clear()
        assert run(*command, *flags) == 0 and seen == {guidance}
        assert json.loads(Path("run/config.json").read_text())["guidance"] == guidance
    Path("base/unet/config.json").write_text(json.dumps(settings_of_unet | {"guidance": "strong"}))
    refused("expected a number as guidance, found 'strong'", load_base, "base")
