"""Real processes, two at a time over gloo, forked from this one and told what torchrun tells; their bars; how threads wait."""
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, assert_same_run

import train
from data import ClipConfig
from support import clips as clip_lists, ranks as processes, threads
from tiny import clips

PATIENCE = 120  # seconds
pytestmark = pytest.mark.usefixtures("aside")
SHORT = ["--device", "cpu", "--frames", "4", "--segments", "2", "--batch-size", "2", "--num-steps", "2", "--tau", "1",
         "--eval-every", "0", "--save-every", "1", "--out", "run"]


def be_rank(rank, function, environment):
    """A process of its own: what it says goes into a file."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    try:
        function(rank)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def two_ranks(function, **environment):
    """[(exit status, stdout, stderr)] of function(rank) in two processes, and the seconds that they took."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=PATIENCE))
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none",
                   "TORCHELASTIC_RESTART_COUNT": "0"} | environment
    began = time.monotonic()
    ranks = [multiprocessing.get_context("fork").Process(target=be_rank, args=(rank, function, environment)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    while any(p.is_alive() for p in ranks) and time.monotonic() - began < PATIENCE:
        time.sleep(.05)
        if any(p.exitcode for p in ranks):  # torchrun ends the others then, but not at once: they may have something to say
            for p in ranks:
                p.join(1)
            break
    for process in ranks:
        if process.is_alive():
            process.terminate()
        process.join(PATIENCE)
    return [(p.exitcode, Path(f"out{r}").read_text(), Path(f"err{r}").read_text()) for r, p in enumerate(ranks)], \
        time.monotonic() - began


def script(main):
    """A script whose main(rank) runs once the ranks have joined."""
    def run(rank):
        def joined():
            processes.join_ranks("cpu")
            return main(rank)
        processes.run_script("script.py", joined)
    return run


def said(ended):
    """The lines of both ranks' stderr, but for what the library says."""
    return sorted(line for _, _, err in ended for line in err.splitlines() if line.startswith(("script.py", "KeyError")))


def assert_ended_well(ended):
    assert [status for status, _, _ in ended] == [0, 0], ended


@pytest.mark.parametrize("error, status, expected", [
    (OSError("no space left"), 1, "script.py: rank 1: no space left"),
    (ValueError("no such file or folder"), 2, "script.py: rank 1: no such file or folder"),
    (KeyError("a mistake in the code"), 1, "KeyError: 'a mistake in the code'")], ids=["refused", "wrong", "unexpected"])
def test_an_error_is_printed_before_anything_that_needs_the_other_ranks(monkeypatch, error, status, expected):
    """The other rank waits in a sum that never comes to an end; to leave the group in order would wait for it, as nccl does."""
    def main(rank):
        if rank == 1:
            raise error
        dist.all_reduce(torch.zeros(1))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: time.sleep(PATIENCE))
    ended, seconds = two_ranks(script(main))
    assert expected in said(ended) and ended[1][0] == status and seconds < PATIENCE / 4


def test_what_all_ranks_find_wrong_is_printed_once():
    def both():
        raise ValueError("steps = 0: must be at least 1")
    ended, _ = two_ranks(lambda rank: processes.run_script("script.py", both))  # before they join
    assert said(ended) == ["script.py: steps = 0: must be at least 1"] and ended[0][0] == 2

    def first(rank):  # its ValueError is everybody's
        return processes.on_rank_0(lambda: int("x" * (rank + 1)))
    ended, _ = two_ranks(script(first))
    assert said(ended) == ["script.py: invalid literal for int() with base 10: 'x'"]


def test_a_hangup_that_is_ignored_stays_ignored():
    """As nohup sets it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.catch_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not processes.signalled()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_torchrun_there_is_one_rank(monkeypatch):
    """Other schedulers set WORLD_SIZE for purposes of their own."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.rank_and_size() == (0, 1)


@pytest.mark.slow
def test_a_long_wait_for_another_rank_is_no_error(monkeypatch):
    """Encoding may take longer than the half hour after which a step counts as hung; here that is a second."""
    monkeypatch.setattr(processes, "timedelta", lambda **_: timedelta(seconds=1))

    def main(rank):
        for wait in (lambda: processes.all_gather(rank), lambda: processes.on_rank_0(lambda: 1)):
            if rank == 0:
                time.sleep(1.5)
            wait()
    ended, _ = two_ranks(script(main))
    assert_ended_well(ended)


def train_in(folders, *argv, before=lambda rank: None):
    """train.py on two nodes, each with a folder of its own."""
    def run(rank):
        Path(folders[rank]).mkdir(exist_ok=True)
        os.chdir(folders[rank])
        before(rank)
        processes.run_script("script.py", lambda: train.main([*SHORT, *map(str, argv)]))
    return run


@pytest.mark.slow
def test_a_restart_on_two_nodes_whose_disks_are_their_own(short_clips):
    """Only rank 0 has the run's folder, from which both go on."""
    ended, _ = two_ranks(train_in(["node0", "node1"], "--steps", 2))
    assert_ended_well(ended)
    assert not Path("node1/run").exists()

    # Two steps of four, as if the machine had stopped there.
    config = json.loads(Path("node0/run/config.json").read_text())
    Path("node0/run/config.json").write_text(json.dumps(config | {"steps": 4}, indent=1))
    ended, _ = two_ranks(train_in(["node0", "node1"], "--steps", 4), TORCHELASTIC_RESTART_COUNT="1")
    assert_ended_well(ended)
    assert "run folder: run, from step 2" in ended[0][1]
    ended, _ = two_ranks(train_in(["whole0", "whole1"], "--steps", 4))
    assert_ended_well(ended)
    assert_same_run("node0/run", "whole0/run")


def test_nodes_that_have_other_clips_are_told(short_clips):
    def other_clips(rank):
        if rank == 1:
            real = clips.clips
            clips.clips = lambda *args, **more: real(*args, **more | {"count": 5})
    ended, _ = two_ranks(train_in(["node0", "node1"], "--steps", 1, before=other_clips))
    assert ended[0][0] == 2 and not Path("node0/run").exists()
    assert any("clips: rank 1 has {'clips': 5," in line and "the same on every node" in line for line in said(ended)), ended


# ---------------------------------------------------------- Clips ----------------------------------------------------------

def test_a_clip_that_one_rank_cannot_see_none_uses(tmp_path, monkeypatch):
    """A network disk may tell one node that a file is not there."""
    listed = [clip_lists.Clip(tmp_path / f"{i}.mp4", "a clip") for i in range(6)]
    for clip in listed:
        clip.path.touch()
    asked = Path.is_file
    monkeypatch.setattr(clip_lists, "find_cached", lambda files: dict.fromkeys(files, torch.zeros(1)))
    monkeypatch.setattr(clip_lists, "encode_captions", lambda captions, *more: captions)
    base = SimpleNamespace(fingerprints=lambda: ("vae", "text"), encode_captions=None, is_cut=lambda caption: False)

    def main(rank):
        monkeypatch.setattr(Path, "is_file", lambda path: asked(path) and (rank == 0 or path.name != "4.mp4"))
        *_, names = clip_lists.encode_clips(listed, ClipConfig(), base, None, 0, .5)
        print(names)
    ended, _ = two_ranks(script(main))
    assert_ended_well(ended)
    for rank in (0, 1):
        assert ended[rank][1].splitlines()[-1] == str([f"{i}.mp4" for i in (0, 1, 2, 3, 5)])


def test_a_log_has_a_line_now_and_then_that_says_what_how_far_the_reward_and_the_time_left(monkeypatch):
    """Of a job of 200 steps, with a part of 20 steps inside, by a clock that moves by a second a step."""
    def shown(seconds=1., leave=True):
        now, screen = [1000.], io.StringIO()
        monkeypatch.setattr("tqdm.std.time", lambda: now[0])
        monkeypatch.setattr("sys.stderr", screen)
        bar = processes.progress(range(200), "fine-tuning", 200, leave=leave)
        for step in bar:
            now[0] += seconds
            bar.set_postfix_str(f"HPS {step / 1000:.3f}", refresh=False)
            if step == 99:
                with processes.progress(None, "evaluating", 20, unit="videos", leave=False) as inner:
                    for _ in range(20):
                        now[0] += seconds
                        inner.update()
        return screen.getvalue()
    lines = shown().splitlines()
    assert not re.search(r"[\r\x1b]", "".join(lines)) and len(lines) == len(set(lines))
    # A line at the start, one for each 30 of 220 seconds, one at the end; the part of 20 seconds has none.
    assert 7 <= len(lines) <= 10 and not any("evaluating" in line for line in lines)
    assert lines[0] == "fine-tuning: 0/200 steps, 00:00 gone, ? left"
    assert lines[1] == "fine-tuning: 30/200 steps, 00:30 gone, 02:50 left, HPS 0.029"
    assert lines[-1] == "fine-tuning: 200/200 steps, 03:40 gone, 00:00 left, HPS 0.199"
    assert shown(seconds=.01).count("\n") == 2 and shown(seconds=.01, leave=False) == ""  # of a short job


def test_with_several_ranks_a_bar_shows_the_work_of_all(monkeypatch):
    """Three videos on two ranks: rank 0 makes two of them, and its second one ends the work of both."""
    monkeypatch.setattr(processes, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr("sys.stderr", screen := io.StringIO())
    with processes.progress(None, "generating", 3, unit="videos", shared=True) as bar:
        shown = []
        for _ in range(2):
            bar.update()
            shown.append(bar.n)
    assert shown == [2, 3] and screen.getvalue().splitlines()[-1].startswith("generating: 3/3 videos, ")
    assert list(processes.progress(range(3), "hidden", disable=True)) == [0, 1, 2] and "hidden" not in screen.getvalue()


def waiting(monkeypatch, share, **environment):
    """What the environment says of waiting after the choice, on a machine of which this share is idle."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads, "idle_share", lambda: share)
    threads.choose_waiting()
    return os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")


def test_threads_sleep_on_a_busy_machine_and_spin_briefly_on_an_idle_one(monkeypatch, capsys):
    assert waiting(monkeypatch, .9) == (None, "10000") and not capsys.readouterr().err
    assert waiting(monkeypatch, .4) == ("passive", None)
    assert capsys.readouterr().err.startswith("the CPUs are busy: threads sleep")
    assert waiting(monkeypatch, .4, LOCAL_RANK="1") == ("passive", None) and not capsys.readouterr().err


@pytest.mark.parametrize("environment, kept", [({"OMP_WAIT_POLICY": "active"}, ("active", None)),
                                               ({"GOMP_SPINCOUNT": "7"}, (None, "7")), ({"OMP_NUM_THREADS": "1"}, (None, None))])
def test_what_the_user_has_set_stays(monkeypatch, environment, kept):
    assert waiting(monkeypatch, .1, **environment) == kept


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")
def test_a_busy_cpu_is_not_idle():
    cpu = min(os.sched_getaffinity(0))
    pinned = f"import os, sys; os.sched_setaffinity(0, [{cpu}]); sys.path.insert(0, {str(ROOT)!r})\n"
    asked = "from support.threads import idle_share; print(idle_share(.3), 'torch' in sys.modules)"
    loop = subprocess.Popen([sys.executable, "-c", pinned + "while True: pass"])
    try:
        share = subprocess.run([sys.executable, "-c", pinned + asked], capture_output=True, text=True,
                               check=True).stdout.split()
    finally:
        loop.kill()
        loop.wait()
    assert float(share[0]) < .2 and share[1] == "False"
