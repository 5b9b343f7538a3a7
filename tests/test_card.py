"""Whether a step fits into a GPU is known before anything is loaded. The GPU is a number here."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmark
import train
from formats import card

PRESET = train.PRESETS["modelscope"]
HALF = replace(PRESET, device="cpu", dtype="bfloat16")


@pytest.fixture
def gpu(monkeypatch):
    """gpu(GiB): what train.py runs on has so much memory."""
    return lambda gib: monkeypatch.setattr(card, "card_memory", lambda device: gib * 2**30)


@pytest.mark.parametrize(("gib", "settings", "message"), [
    (80, dict(clips_at_once=0), r"8 clips at once needs 138\.\d GiB before workspaces, this GPU has 80.0; these would fit: "
                                r"--clips-at-once 1 \(21.3 GiB\); --checkpoint-activations \(4\d.\d GiB\); "
                                r"--low-memory \(27.0 GiB\) \(docs/gpu.md\)$"),
    (16, {}, r"of 1 clip at once needs 21.3 .* would fit: --checkpoint-activations \(9.4 GiB\); --low-memory \(7.4 GiB\) \("),
    (6, dict(low_memory=True), "needs 7.4 GiB .* no setting of memory would fit"),
    (40, dict(dtype="float32"), r"needs 42.6 GiB .*: --checkpoint-activations \(18.7 GiB\)"),
    (24, dict(grad_steps=2), "needs 34.5 GiB"), (24, dict(frames=32), "needs 34.5 GiB"), (24, dict(size=384), "needs 41.2 GiB"),
])
def test_what_cannot_fit_is_refused_with_the_flags_that_would(gpu, gib, settings, message):
    gpu(gib)
    with pytest.raises(ValueError, match=message) as error:
        card.check_card(replace(HALF, **settings))
    assert "\n" not in str(error.value)


def test_what_just_fits_is_a_warning_and_what_fits_is_none(gpu, capsys):
    gpu(23.6)
    card.check_card(HALF)
    line = capsys.readouterr().err
    assert "needs 21.3 GiB before workspaces, this GPU has 23.6. If that fails, these would fit: --decode-chunk 1 (18.6" in line
    gpu(24)
    card.check_card(HALF)
    card.check_card(replace(HALF, batch_size=8, clips_at_once=0), world_size=8)  # a rank has one of them
    gpu(11.5)
    card.check_card(replace(HALF, low_memory=True))
    assert not capsys.readouterr().err


def test_nothing_is_said_where_it_cannot_be_known(gpu, tmp_path):
    card.check_card(replace(HALF, batch_size=1000, clips_at_once=0))  # on the CPU
    gpu(.1)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"block_out_channels": [32, 64]}))
    for settings in (dict(base="tiny"), dict(base="random:64"), dict(compile=True), dict(base=str(tmp_path))):
        card.check_card(replace(HALF, **settings))
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"block_out_channels": card.FULL_SIZE}))
    with pytest.raises(ValueError, match="no setting of memory would fit"):
        card.check_card(replace(HALF, base=str(tmp_path)))


def test_train_refuses_before_it_loads_or_writes(gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_base", lambda *args: pytest.fail("weights were loaded"))
    Path("clips.txt").write_text("a.mp4|||a clip\n")
    gpu(16)
    with pytest.raises(ValueError, match="a step of 1 clip at once needs 21.3 GiB"):
        train.main(["modelscope", "--data", "clips.txt", "--eval-every", "0", "--device", "cpu", "--dtype", "bfloat16"])
    assert [*Path().iterdir()] == [Path("clips.txt")]


@pytest.mark.slow
def test_the_numbers_are_those_of_the_count(monkeypatch):
    """At full size, each memory setting, one clip and two."""
    full = benchmark.Config(base="random", batch_size=1, device="meta", diffusers=False)
    counted = benchmark.count_memory(*benchmark.load(full, torch.device("meta")), full, torch.bfloat16, (1, 2, 8))
    for name, flags in benchmark.MEMORY_SETTINGS.items():
        for clips, peak in counted[name].items():
            assert card.expected_peak(replace(PRESET, **flags), clips) == pytest.approx(peak["total"], rel=.01), (name, clips)


@pytest.mark.parametrize(("settings", "gib"), [
    (dict(frames=8), 14.746), (dict(size=128), 9.372), (dict(grad_steps=2), 34.553), (dict(segments=8), 24.919),
    (dict(decode_chunk=2), 19.533), (dict(frames=8, checkpoint_activations=True), 8.760),
    (dict(grad_steps=2, checkpoint_activations=True), 10.629), (dict(size=384, checkpoint_activations=True), 14.352),
    (dict(frames=32, low_memory=True), 10.166), (dict(segments=16, low_memory=True), 7.365),
    (dict(grad_steps=2, low_memory=True), 8.628),
])
def test_other_lengths_sizes_and_k(settings, gib):
    """GiB of one clip as support.memory.measure_peak counted them at full size, each in some seconds."""
    assert card.expected_peak(replace(PRESET, **settings), 1) == pytest.approx(gib, rel=.02)
