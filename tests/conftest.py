"""One thread for all tests and the processes they start: tensors here are too small to share, and waiting threads spin."""
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import support.threads  # noqa: E402, F401, I001  as in every script

import pytest  # noqa: E402
import torch  # noqa: E402

from tiny import clips, world  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported by now stays: imageio collects garbage after each file, which would look at all of it for 0.3 s."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or libraries would complain of leaks


@pytest.fixture
def aside(tmp_path, monkeypatch):
    """A folder of its own to work in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def few_clips():
    """Six clips in the tiny world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "COUNT", 6)
        yield


@pytest.fixture(scope="module")
def short_clips(few_clips):
    """Of four frames: a run of two steps, with --frames 4, takes half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "FRAMES", 4)
        yield


def contents(folder):
    """{path: bytes} of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(error):
    """The message of a pytest.raises, which must be one line."""
    assert str(error.value).isprintable()
    return str(error.value)
