"""
What a step of each method costs (benchmark.py --methods): parts are counted, so they are held here to whole runs of the method's
own loop, which sample, score and learn with numbers.
"""
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cost import FULL, small
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import benchmark_methods
import lora
import train
from benchmark_methods import METHODS, table
from methods import ddpo, dpo, draft, refl, rwr, vader
from support.memory import Peak

SIZES = dict(frames=4, size=16, num_steps=4)
SHORT = benchmark.Config(base="small", batch_size=1, tau=.5, diffusers=False, **SIZES)
FEW = {"draft": dict(), "refl": dict(), "vader": dict(eta=.5), "ddpo": dict(updates=2, timestep_fraction=.5),
       "rwr": dict(rounds=2, videos=3), "dpo": dict(rounds=2, pairs=3)}


def count(monkeypatch, name, **changes):
    """The row of one method, with other numbers in its preset."""
    presets, parts = METHODS[name]
    few = {"modelscope": replace(presets["modelscope"], **changes)}
    monkeypatch.setattr(benchmark_methods, "METHODS", {name: (few, parts)})
    return benchmark.count_methods(*small(), SHORT, torch.float32)[name]


def loop_of(module):
    return getattr(module, "learn", train.train)


# One is quick; the others, counted in the same way, are among the slow tests.
@pytest.mark.parametrize("module", [ddpo, *(pytest.param(m, marks=pytest.mark.slow) for m in (draft, refl, vader, rwr, dpo))],
                         ids=lambda module: module.__name__)
def test_the_parts_of_a_method_add_up_to_a_run_of_it(module, monkeypatch, tmp_path):
    """TFLOP and frames of every video of every step, on the CPU with numbers; DPO's steps are of pairs."""
    name = module.__name__.removeprefix("methods.")
    changes = dict(steps=2, batch_size=2, save_every=2, eval_every=0) | FEW[name]
    monkeypatch.setattr(benchmark_methods, "peak_of_part", lambda run, modules: Peak(0, 0, 0))
    row = count(monkeypatch, name, **changes)

    base, reward = small()
    (tmp_path / "prompts.txt").write_text("a bear\na cat\n")
    cfg = replace(module.PRESETS["modelscope"], prompts_train=tmp_path / "prompts.txt", **SIZES, **changes)
    parameters = lora.inject(base.unet)
    draw, score = module.method(cfg, base, reward)
    reward.text_features(["a bear", "a cat"])
    frames = []
    base.vae.post_quant_conv.register_forward_pre_hook(lambda _, x: frames.append(len(x[0])))
    run = SimpleNamespace(folder=tmp_path, writes=True, step=0, steps=lambda optimizer: range(cfg.steps), stop=lambda: False,
                          finish_step=lambda *args: True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        assert loop_of(module)(cfg, parameters, draw, score, run)
    videos = cfg.steps * cfg.batch_size * (2 if module is dpo else 1)
    assert row["tflop"] == pytest.approx(counter.get_total_flops() / 1e12 / videos, rel=.01)
    assert row["frames"] == pytest.approx(sum(frames) / videos)


def test_refl_takes_the_mean_of_all_its_steps(monkeypatch):
    seen = []
    monkeypatch.setattr(refl, "refl_rewards", lambda base, reward, uncond, batch, cfg: (seen.extend(batch[-1]), {}))
    base, reward = small()
    monkeypatch.setattr("methods.common.training_prompts", lambda *args: ["a bear"])
    times = []
    for share, run in benchmark_methods.refl_parts(base, reward, replace(refl.PRESETS["modelscope"], frames=4)):
        times.append(share)
        run()
    assert times == [.5, .5] and seen == [1, 5]  # of 1..5, the last quarter of 20


@pytest.mark.slow
def test_instruct_video_is_counted_as_the_step_of_train(monkeypatch):
    """The yardstick: the work and the memory that benchmark.py counts for ours."""
    monkeypatch.setattr(benchmark, "MEMORY_SETTINGS", {"no flag": {}})
    row = count(monkeypatch, "InstructVideo")
    (work, calls), memory = benchmark.count(*small(), SHORT)["ours"], benchmark.count_memory(*small(), SHORT, torch.float32)
    assert row["tflop"] == pytest.approx(sum(work.values()), rel=1e-6)
    assert (row["without_gradient"], row["with_gradient"], row["frames"]) == (2, 2, 4) == (calls["chain"], 2, calls["decode"])
    assert row["peak_gib"] == pytest.approx(memory["no flag"][1])


def test_methods_are_counted_on_meta_alone(tmp_path):
    with pytest.raises(ValueError, match="device 'cpu': must be meta with methods"):
        benchmark.measure(replace(SHORT, methods=True, device="cpu", out=tmp_path / "report.json"))


def test_the_table_of_the_report(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_methods, "METHODS", {"InstructVideo": METHODS["InstructVideo"]})
    monkeypatch.setattr(benchmark, "load", lambda cfg, device: small())
    report = benchmark.measure(replace(SHORT, methods=True, device="meta", out=tmp_path / "report.json"))
    shown = benchmark.table(report).splitlines()
    assert [line.split(" | ")[0] for line in shown if line.startswith("| ")][1:] == ["| InstructVideo"]
    assert report["settings"]["batch_size"] == 1 and not report["contenders"]


@pytest.mark.slow
def test_the_table_in_the_docs_is_the_count_at_full_size():
    rows = benchmark.count_methods(*benchmark.load(FULL, torch.device("meta")), FULL, torch.bfloat16)
    said = (Path(benchmark.__file__).parent / "docs" / "methods.md").read_text()
    lines = re.search(r"<!-- benchmark.py --methods -->\n(.*?)\n<!-- end -->", said, re.DOTALL)[1].splitlines()
    assert lines == table(rows)
