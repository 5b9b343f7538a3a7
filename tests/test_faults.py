"""Runs, each in a process of its own, that are interrupted, killed, starved of disk, or spread over processes. Slow."""
import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import av  # noqa: F401  this, matplotlib, open_clip and PIL: imported here, so that forked runs have them
import imageio.v3 as iio
import matplotlib.figure  # noqa: F401  as above
import numpy as np
import open_clip  # noqa: F401  as above
import PIL.ImageFont  # noqa: F401  as above
import pytest
import torch
from conftest import ROOT, assert_nearly_same_run, assert_same_run, listing, metrics, write_adapter, write_footage

import train  # noqa: F401  as above
from formats import adapters

pytestmark = pytest.mark.slow

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["test_faults"])
PATIENCE = 120  # seconds for anything to happen, on a busy machine


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """A folder with five clips of footage, whose latents every run takes from one cache; runs start in it."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("faults"))
    write_footage(5)
    for name, value in (("OMP_NUM_THREADS", "1"), ("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")):
        os.environ[name] = value  # for the process that others are forked from, and for those started from nothing
    yield
    os.chdir(before)


SMALL = ["--device", "cpu", "--data", "clips.txt", "--frames", "4", "--workers", "0", "--num-steps", "2", "--tau", "1",
         "--batch-size", "2", "--eval-count", "2"]


def be_train(argv, log):
    """Become `python train.py argv`, with all it says in a file."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, as tests may be, ignore it
    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def start(*argv, log="log.txt"):
    Path(log).unlink(missing_ok=True)
    process = START.Process(target=be_train, args=([*map(str, argv)], log))
    process.start()
    return process


def finish(*argv, log="log.txt"):
    """(exit status, the lines that it said) of a whole run."""
    process = start(*argv, log=log)
    process.join(PATIENCE)
    return process.exitcode, Path(log).read_text().splitlines()


def wait_for(happened, what, process=None):
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, f"{what} did not happen"
        assert process is None or process.is_alive(), f"the run ended before {what}"
        time.sleep(.002)


def steps_done(folder):
    return max((line["step"] for line in metrics(folder) if "eval" not in line), default=0)


def checkpoint(folder):
    return torch.load(Path(folder) / "state.pt", weights_only=True)


def test_what_cannot_be_written_is_said_before_clips_are_encoded(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for flags in (["--out", small_disk / "run"], ["--out", small_disk], ["--cache-dir", small_disk / "cache", "--out", "none"]):
        status, said = finish(*SMALL, "--steps", 1, *flags)
        assert status == 1 and len(said) == 1 and "cannot be written" in said[0], said
    assert not Path("none").exists()


def test_a_signal_before_the_first_step_leaves_nothing():
    process = start(*SMALL, "--no-cache", "--max-skip", "0", "--steps", 500, "--out", "early")  # 5 could end before the signal
    wait_for(lambda: Path("log.txt").exists() and "encoding" in Path("log.txt").read_text(), "encoding", process)
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    assert process.exitcode == 130
    said = "stopped; to go on" if Path("early").exists() else "train.py: interrupted"  # the first: it had begun, and was saved
    assert said in Path("log.txt").read_text()


def test_killed_at_twenty_moments_a_run_ends_as_if_nothing_had_happened():
    flags = [*SMALL, "--eval-every", "8", "--save-every", "1"]
    dice, run, inside, at = random.Random(0), Path("killed"), 0, 0
    for kill in range(20):
        process = start(*([*flags, "--steps", 1000, "--out", run] if kill == 0 else ["--resume", run]))
        wait_for(lambda at=at: steps_done(run) > at, "a step", process)
        if kill % 2:  # half of them at any moment, the others while a checkpoint is being written
            wait_for(lambda: any(name.startswith(".") and "state" in name for name in os.listdir(run)), "saving", process)
        else:
            time.sleep(dice.uniform(0, .3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        inside += any(name.startswith(".") and name != ".lock" for name in os.listdir(run))

        # Whatever was going on, everything in the folder is readable, and at most the step since the last save is lost.
        state = checkpoint(run)
        assert at <= state["step"] and steps_done(run) - 1 <= state["step"]
        assert adapters.read_adapter(run / "lora.safetensors").rank == 4
        assert json.loads((run / "config.json").read_text()) == state["config"]
        for file in (run / "samples").glob("step_*.json"):
            json.loads(file.read_text())
        at = state["step"]
    assert inside >= 3  # kills that left half a file behind
    assert finish("--resume", run, "--steps", at + 2)[0] == 0
    assert finish(*flags, "--steps", at + 2, "--out", "never-killed")[0] == 0
    assert_same_run(run, "never-killed")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk, leave):
    """A file that takes all the room but some."""
    with open(disk / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - leave))


@pytest.mark.parametrize("leave, message", [
    (250_000, "step 3 cannot be saved"),    # there is room for metrics, not for a checkpoint
    (60_000, "No space left on device"),    # nor for an evaluation's pictures
    (0, "No space left on device")])
def test_a_full_disk_is_a_clear_error_and_the_checkpoint_before_is_whole(small_disk, leave, message):
    run = small_disk / "run"
    assert finish(*SMALL, "--save-every", "1", "--eval-every", "2", "--steps", 2, "--out", run)[0] == 0
    if leave == 60_000:  # stopped before the evaluation of step 2
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(text[:text.rindex('{"step"')])
    before = {name: (run / name).read_bytes() for name in ("state.pt", "lora.safetensors", "best.safetensors")}
    fill(small_disk, leave)
    status, said = finish("--resume", run, "--steps", 4)
    assert status == 1, said
    [error] = [line for line in said if line.startswith("train.py: ")]
    assert message in error and not any("Traceback" in line for line in said), said
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not [name for name in listing(run) if Path(name).name.startswith(".")]

    # With room again it goes on.
    (small_disk / "ballast").unlink()
    assert finish("--resume", run, "--steps", 4)[0] == 0 and checkpoint(run)["step"] == 4


def torchrun(*argv, script="train.py", options=(), **more):
    """(exit status, stdout, stderr, seconds) of two ranks, on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options,
               ROOT / script, *map(str, argv)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE, env=os.environ | more)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def test_two_ranks_generate_and_evaluate_what_one_does():
    adapter = write_adapter(Path("some.safetensors"))
    prompts = ["a red circle moving left", "green stripes drifting up", "a blue ring moving down"]  # not a multiple of two
    asked = ["--device", "cpu", "--lora", adapter, "--num-steps", "2", "--batch-size", "2"]
    generating = [*asked, *(word for p in prompts for word in ("--prompt", p)), "--out"]
    evaluating = [*asked, "--count", "3", "--sheet", "2", "--vbench", "--per-prompt", "1", "--out"]
    status, said, errors, _ = torchrun(*generating, "made-by-two", script="generate.py")
    assert status == 0 and len(said.splitlines()) == 3 and "generating" in errors, errors
    status, said, errors, _ = torchrun(*evaluating, "judged-by-two", script="evaluate.py")
    assert status == 0 and said.count("written:") == 1, errors
    for script, argv in (("generate.py", [*generating, "made-by-one"]), ("evaluate.py", [*evaluating, "judged-by-one"])):
        subprocess.run([sys.executable, ROOT / script, *map(str, argv)], check=True, capture_output=True, timeout=PATIENCE)

    assert listing("made-by-one") == listing("made-by-two") and len(listing("made-by-one")) == 6  # three clips, three captions
    for name in listing("made-by-one"):
        one, two = Path("made-by-one", name), Path("made-by-two", name)
        if name.endswith(".txt"):
            assert one.read_text() == two.read_text()
        else:
            assert np.abs(iio.imread(one).astype(int) - iio.imread(two)).mean() < .5  # rounding, and what the codec makes of it
    one, two = (json.loads(Path(f"judged-by-{n}/table.json").read_text())["results"] for n in ("one", "two"))
    assert len(one) == 6
    for a, b in zip(one, two, strict=True):
        assert a["measures"] == pytest.approx(b["measures"], abs=1e-5)
        for gains in a.get("differences", {}).items():
            assert gains[1] == pytest.approx(b["differences"][gains[0]], abs=1e-5)
    assert listing("judged-by-one") == listing("judged-by-two") and len(listing("judged-by-one")) == 3 + 2 * (2 + 9)
    sheets = [iio.imread(f"judged-by-{n}/sheet.png").astype(int) for n in ("one", "two")]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1


DYING = '''
import os, threading, time
def die():
    """The second rank dies without a word after the first checkpoint; only the first time."""
    while not os.path.exists(os.environ["DIE_AFTER"]):
        time.sleep(.005)
    os._exit(9)
if os.environ.get("RANK") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and "DIE_AFTER" in os.environ:
    threading.Thread(target=die, daemon=True).start()
'''


def test_a_rank_that_dies_takes_the_run_down_and_a_restart_continues_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(DYING)
    path = f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"
    flags = [*SMALL, "--batch-size", "4", "--eval-every", "0", "--save-every", "2"]
    status, said, errors, seconds = torchrun(*flags, "--steps", 5000, "--out", "dead", PYTHONPATH=path, DIE_AFTER="dead/state.pt")
    assert status != 0 and seconds < 60 + 30  # a minute, and the start of three processes
    assert "exitcode" in errors and "9" in errors  # torchrun's own report: which rank, and how
    reached = steps_done("dead")
    assert reached < 5000 and checkpoint("dead")["step"] >= 2

    # Started again by torchrun, it goes on from its checkpoint and ends as one that never died.
    last = 40
    status, said, errors, _ = torchrun(*flags, "--steps", last, "--out", "reborn", options=["--max-restarts", "1"],
                                       PYTHONPATH=path, DIE_AFTER="reborn/state.pt")
    assert status == 0, errors
    assert said.count("run folder: reborn, from step ") == 1  # one of them speaks
    assert finish(*flags, "--steps", last, "--out", "alive")[0] == 0
    assert [line["step"] for line in metrics("reborn")] == list(range(1, last + 1))
    assert_nearly_same_run("reborn", "alive")
