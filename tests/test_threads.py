"""How torch's threads wait, chosen by what else the machine does."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from support import threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")


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
