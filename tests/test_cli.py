"""
The command lines: what generate.py and evaluate.py write, and that a wrong value ends any script with one line, writing nothing.

In-process, on the shipped weights; no test depends on what they have learned.
"""
import json
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import evaluate
import generate
import lora
import reward
import train
from data import ClipConfig
from formats.weights import TINY
from model import load_base
from sampler import sample
from support import pictures, tables, videos
from support.clips import find_problems, read_list
from tiny import world

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a red circle moving left"
pytestmark = pytest.mark.usefixtures("aside")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA of the tiny base that changes what it generates."""
    base, path = load_base("tiny"), tmp_path_factory.mktemp("adapter") / "lora.safetensors"
    g = torch.Generator().manual_seed(0)
    lora.inject(base.unet, 4, generator=g)
    with torch.no_grad():
        for layer in lora.layers(base.unet).values():
            layer.lora_B.normal_(std=.1, generator=g)
    lora.save(base.unet, path, base="tiny")
    return path


def script(name, *argv):
    """A script as it starts from a shell, but in this process; its exit status."""
    before, sys.argv = sys.argv, [name, *map(str, argv)]
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


def files(folder="."):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


# --------------------------------------------------- generate.py ---------------------------------------------------

SMALL = ["--device", "cpu", "--num-steps", "2"]


def make(out, *argv):
    """generate.py with these flags; {file name: pixels}."""
    assert script("generate.py", *SMALL, "--out", out, *argv) == 0
    return {p.name: iio.imread(p) for p in sorted(Path(out).iterdir()) if p.suffix != ".txt"}


def test_videos_as_mp4_and_gif(capfd):
    made = make("videos", "--prompt", PROMPT, "--prompt", "Blue stripes, drifting up.", "--gif", "--fps", 5, "--frames", 6,
                "--height", 32, "--width", 48, "--guidance", 1.5)
    assert list(made) == ["0000-a-red-circle-moving-left.gif", "0000-a-red-circle-moving-left.mp4",
                          "0001-blue-stripes-drifting-up.gif", "0001-blue-stripes-drifting-up.mp4"]
    gif, mp4 = made["0000-a-red-circle-moving-left.gif"], made["0000-a-red-circle-moving-left.mp4"]
    assert gif.shape == mp4.shape == (6, 160, 240, 3)  # small videos are enlarged, here five times
    assert iio.immeta("videos/0000-a-red-circle-moving-left.mp4", plugin="pyav")["fps"] == 5
    assert iio.immeta("videos/0000-a-red-circle-moving-left.gif")["duration"] == 200
    # The same video in both, but for each format's own loss.
    assert np.abs(gif[:, 2::5, 2::5].astype(float) - mp4[:, 2::5, 2::5]).mean() < 12
    assert "videos/0001-blue-stripes-drifting-up.gif" in capfd.readouterr().out


def test_a_folder_of_generated_videos_is_what_train_takes_as_data():
    prompts = [PROMPT, "Blue stripes, drifting up.", "猫が歩く"]
    make("videos", "--gif", "--frames", 4, *(word for p in prompts for word in ("--prompt", p)))
    assert len(files("videos")) == 3 * 3
    listed = read_list("videos")
    assert [(clip.path.suffix, clip.caption) for clip in listed] == [(".mp4", prompt) for prompt in prompts]
    assert not find_problems(listed, ClipConfig(num_frames=4), dict.fromkeys(clip.path for clip in listed))


def test_file_names_are_safe_whatever_the_prompt():
    for prompt, name in [
            ("../../etc/passwd", "0007-etc-passwd"), ("a/b\\c:*?\"<>|\n\t\0d", "0007-a-b-c-d"), (".hidden ", "0007-hidden"),
            ("猫が歩く", "0007"), ("Ünïcode é", "0007-n-code"), ("--help", "0007-help"), ("x" * 500, "0007-" + "x" * 60),
            ("a" * 59 + " b", "0007-" + "a" * 59)]:
        assert videos.video_name(7, prompt) == name


def test_a_nasty_prompt_stays_in_its_folder():
    assert list(make("videos", "--prompt", "../../../escape", "--frames", 1)) == ["0000-escape.mp4"]
    assert files() == ["videos/0000-escape.mp4", "videos/0000-escape.txt"]


@pytest.mark.parametrize("batch_size", [2, 3])
def test_video_i_is_the_same_in_any_batch(batch_size):
    base, prompts = load_base("tiny"), [PROMPT, "a blue ring moving up", "red stripes drifting left"]
    def latents(batch_size):
        made = generate.generate(base, prompts, [5, 6, 7], num_steps=3, frames=4, batch_size=batch_size)
        return torch.stack([z_0 for _, z_0 in made])
    torch.testing.assert_close(latents(batch_size), latents(1), atol=1e-5, rtol=0)


def test_generating_is_the_whole_chain_from_the_videos_own_noise():
    base = load_base("tiny")
    [(i, z_0)] = generate.generate(base, [PROMPT], [9], num_steps=3, guidance=2., frames=4)
    noise = torch.randn(z_0.shape, generator=generate.sample_generator(9, "generate"))[None]
    assert i == 0
    text, uncond = base.encode_text([PROMPT]), base.encode_text([""])
    assert torch.equal(z_0, sample(base.predict, noise, text, uncond, base.levels(3), 2.)[0])


def test_prompts_from_a_file_in_both_forms_and_seeds_in_order():
    text = "\ufeff# shapes\na red ring moving up\n\n  a red cross moving down \n  #a blue one\n"
    Path("plain.txt").write_text(text, encoding="utf-8")
    Path("official.txt").write_text("x/1.mp4|||a red ring moving up|||16\n2.mp4|||a red cross moving down\n")
    plain = make("plain", "--prompts", "plain.txt", "--frames", 2)
    assert list(plain) == ["0000-a-red-ring-moving-up.mp4", "0001-a-red-cross-moving-down.mp4"]
    official = make("official", "--prompts", "official.txt", "--frames", 2, "--batch-size", 1)
    assert official.keys() == plain.keys()
    # Video 1 of seed 0 has the noise of video 0 of seed 1.
    [alone] = make("alone", "--prompt", "a red cross moving down", "--seed", 1, "--frames", 2).values()
    assert np.array_equal(alone, list(plain.values())[1]) and not np.array_equal(alone, list(plain.values())[0])


def test_a_lora_and_its_scale(adapter):
    def video(*argv):
        [pixels] = make(f"videos-{len(list(Path().iterdir()))}", "--prompt", PROMPT, "--frames", 4, *argv).values()
        return pixels
    base = video()
    assert np.array_equal(base, video("--lora", adapter, "--lora-scale", 0))
    assert adapter.name == "lora.safetensors" and np.array_equal(video("--lora", adapter), video("--lora", adapter.parent))
    whole, half = video("--lora", adapter), video("--lora", adapter, "--lora-scale", .5)
    assert not np.array_equal(whole, base) and not np.array_equal(half, whole)
    # The base by its folder and parts, the adapter with the scale that is the default.
    assert np.array_equal(whole, video("--base", TINY, "--vae", TINY / "vae", "--text-encoder", TINY / "text_encoder",
                                       "--lora", adapter, "--lora-scale", 1))
    assert not np.array_equal(base, video("--dtype", "bfloat16"))


def test_what_the_text_encoder_does_not_see_is_announced_once(capfd):
    make("videos", "--prompt", "a red circle moving left and then right", "--prompt", "a red zebra", "--frames", 1)
    said, told = capfd.readouterr()
    assert "longer than the text encoder reads, its end is not seen: 'a red circle moving left and then right'" in said
    assert said.count("longer than") == 1
    unknown = [line for line in told.splitlines() if "does not know" in line]
    assert len(unknown) == 2  # one for each caption with new words, plain lines of their own
    assert unknown[0].startswith("words this model does not know: and, then; it knows: a red")
    assert unknown[1].startswith("words this model does not know: zebra;")


# --------------------------------------------------- evaluate.py ---------------------------------------------------

EVALUATE = ["--device", "cpu", "--num-steps", "2", "--count", "2", "--out", "report"]


def test_the_metric_is_the_mean_over_first_frames_without_weights(monkeypatch):
    base, seen = load_base("tiny"), []

    def score(frames, captions):  # (1, S, 3, H, W) -> (1, S)
        seen.append((frames, captions))
        return torch.tensor([[.1, .2, .3, .6]])
    table, kept = evaluate.evaluate(base, score, [PROMPT, "a blue ring moving up"], seed=3, num_steps=2, keep=1, batch_size=2)
    assert table["reward"].tolist() == pytest.approx([.3, .3]) and [c for _, c in seen] == [[PROMPT], ["a blue ring moving up"]]
    # Frames 0, 4, 8, 12 of the video that generate makes from the same prompt and seed.
    [(_, z_0)] = generate.generate(base, [PROMPT], [3], num_steps=2)
    frames = evaluate.decode_frames(base.vae, z_0[None])[0]
    torch.testing.assert_close(seen[0][0][0], frames[[0, 4, 8, 12]], atol=1e-4, rtol=0)
    torch.testing.assert_close(kept[0], frames, atol=1e-4, rtol=0)


def test_differences_are_paired():
    before, after = ({"reward": torch.tensor(v, dtype=torch.float64)} for v in ([.1, .5, .3], [.2, .4, .9]))
    # Differences .1, -.1, .6: mean .2, variance ((.1)^2 + (.3)^2 + (.4)^2) / 2 = .13, standard error sqrt(.13 / 3).
    assert tables.paired(before, after) == pytest.approx((.2, (.13 / 3) ** .5))
    # Two videos of one prompt count once: sums of deviations -.4 and .4, 2 / 1 * (.16 + .16) = .64, its root over 3.
    assert tables.paired(before, after, clusters=["a", "a", "b"]) == pytest.approx((.2, .8 / 3))
    assert tables.paired(before, after, clusters=["a"] * 3) == pytest.approx((.2, np.nan), nan_ok=True)
    one, other = ({"reward": torch.tensor([v])} for v in (1., 3.))
    assert tables.paired(one, other) == pytest.approx((2., np.nan), nan_ok=True)
    assert tables.with_error(2., np.nan, "+") == "+2.0000 ± undefined" and tables.with_error(2., .5) == "2.0000 ± 0.5000"
    assert tables.summary({**after, "noise": torch.tensor([1., 2., 3.])}) == pytest.approx(
        {"reward_mean": .5, "reward_std": .13 ** .5, "n": 3, "noise": 2.})


def test_base_and_fine_tuned_on_two_sets_at_several_d_and_guidance(adapter, capfd):
    Path("a.txt").write_text(f"{PROMPT}\na blue ring moving up\na green cross moving down\n")
    Path("b.txt").write_text("1.mp4|||red stripes drifting left|||16\n")
    assert script("evaluate.py", *EVALUATE, "--lora", adapter, "--prompts", "shapes=a.txt", "--prompts", "stripes=b.txt",
                  "--num-steps", 2, 3, "--guidance", 1, 3, "--sheet", 1, "--frames", 8, "--segments", 2, "--seed", 4,
                  "--batch-size", 3, "--lora-scale", .5) == 0
    said, told = capfd.readouterr()
    # Before it starts, how much there is to do; then lines that say what is counted, and how the reward stands.
    assert said.startswith("4 prompts in 2 sets, by base and fine-tuned, with D = 2, 3 and guidance 1, 3: "
                           "32 videos, 80 denoising steps\n")
    assert "evaluating: 0/80 step, " in told and re.search(r"evaluating: 80/80 step, .* left, stripes 0\.\d{4}, fine-tuned", told)
    assert files("report") == ["sheet.png", "table.json", "table.md"]
    table = Path("report/table.md").read_text()
    assert table in said and "written: report/table.md, table.json, sheet.png" in said
    report = json.loads(Path("report/table.json").read_text())
    assert report["reward"] == "HPStiny" and report["seed"] == 4 and report["versions"].keys() == {"python", "torch", "machine"}
    assert "--lora-scale .5" in report["command"] or "--lora-scale 0.5" in report["command"]
    rows = report["results"]
    assert [(r["set"], r["num_steps"], r["guidance"], r["model"]) for r in rows] == [
        (s, d, g, m) for s in ("shapes", "stripes") for d in (2, 3) for g in (1., 3.) for m in ("base", "fine-tuned")]
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    assert head == ["set", "D", "guidance", "model", "n", "HPStiny mean ± std over videos", "difference ± error over prompts"]
    assert len(lines) == 16
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned

    # One row again, video by video.
    base, score = load_base("tiny"), reward.load_reward(base_folder=TINY)
    lora.load(base.unet, adapter)
    each = {}
    for model, scale in (("base", 0.), ("fine-tuned", .5)):
        lora.set_scale(base.unet, scale)
        each[model] = []
        for i, prompt in enumerate((PROMPT, "a blue ring moving up")):
            alone, _ = evaluate.evaluate(base, score, [prompt], seed=4 + i, num_steps=3, guidance=1., segments=2, frames=8)
            each[model].append(alone["reward"].item())
    b, a = rows[4], rows[5]
    for row, model in ((b, "base"), (a, "fine-tuned")):
        x, y = each[model]
        by_hand = {"reward_mean": (x + y) / 2, "reward_std": abs(x - y) / 2 ** .5, "n": 2}
        assert row["measures"] == pytest.approx(by_hand, abs=1e-6)
    d = [y - x for x, y in zip(each["base"], each["fine-tuned"])]
    assert a["differences"]["reward"] == pytest.approx([sum(d) / 2, abs(d[0] - d[1]) / 2], abs=1e-6) and "differences" not in b
    assert lines[5] == ["shapes", "3", "1", "fine-tuned", "2", "{:.4f} ± {:.4f}".format(*list(a["measures"].values())[:2]),
                     "{:+.4f} ± {:.4f}".format(*a["differences"]["reward"])]

    # One strip of two frames for each set and model, so that rows are sets and columns models.
    sheet = iio.imread("report/sheet.png")
    strip = pictures.strip(torch.rand(8, 3, 32, 32))
    assert sheet.shape == (22 + 2 * (strip.shape[0] + 22), 2 * strip.shape[1], 3)


def test_several_strengths_show_what_the_reward_gains_and_what_is_lost(adapter, monkeypatch, capfd):
    monkeypatch.setattr(world, "FRAMES", 4)
    flags = [*EVALUATE, "--frames", 4, "--segments", 2, "--lora", adapter, "--count", 2, "--sheet", 0,
             "--watch", "judge", "--watch", "motion"]
    assert script("evaluate.py", *flags, "--lora-scale", 0, 1.5, .5) == 0
    assert "written: report/table.md, table.json\n" in capfd.readouterr().out
    rows = json.loads(Path("report/table.json").read_text())["results"]
    assert [(r["set"], r["model"], r["lora_scale"]) for r in rows] == [
        (s, m, v) for s in ("in_domain", "new", "other") for m, v in (("base", 0), ("scale 1.5", 1.5), ("scale 0.5", .5))]
    assert rows[1]["differences"]["judge"] and "scale 1.5" in Path("report/table.md").read_text()

    # One strength is the comparison of always, with the numbers of its row.
    assert script("evaluate.py", *flags, "--lora-scale", .5, "--out", "one") == 0
    one = json.loads(Path("one/table.json").read_text())["results"]
    assert [r["model"] for r in one[:2]] == ["base", "fine-tuned"] and files("one") == ["table.json", "table.md"]
    assert one[1]["measures"] == rows[2]["measures"] and one[1]["differences"] == rows[2]["differences"]


def test_the_judge_reports_beside_the_reward_and_the_hpsv2_package_agrees():
    assert script("evaluate.py", *EVALUATE, "--count", 1, "--official-hps", "--sheet", 0) == 0
    report = json.loads(Path("report/table.json").read_text())
    assert [r["set"] for r in report["results"]] == ["in_domain", "new", "other"]
    for row in report["results"]:
        assert row["measures"].keys() == {"reward_mean", "reward_std", "n", "watermark", "sharpness", "saturation", "noise",
                                          "colour", "shape", "direction", "static", "motion", "fidelity", "steadiness"}
    assert report["official_hps_distance"] < 1e-4
    table = Path("report/table.md").read_text()
    assert "The hpsv2 package's own scores differ by at most" in table and "on 3 videos" in table
    assert files("report") == ["table.json", "table.md"]


def test_a_quick_look_on_other_noise_than_training_selects_by(monkeypatch, capfd):
    Path("p.txt").write_text(f"{PROMPT}\n")
    seen = []
    real = evaluate.generate

    def generated(base, prompts, seeds, num_steps, *args):
        seen.append((seeds, num_steps))
        return real(base, prompts[:1], seeds[:1], 1, *args)
    monkeypatch.setattr(evaluate, "generate", generated)
    monkeypatch.setattr(evaluate, "all_gather", lambda found: [[{i: part[0] for i in range(8)} for part in found]])
    evaluate.main(evaluate.Config(device="cpu", prompts=["p=p.txt"], quick=True))
    assert seen == [([*range(2_000_000, 2_000_008)], 20)]  # 8 videos, the first D alone
    assert evaluate.Config.seed == evaluate.REPORT_SEED != evaluate.EVAL_SEED
    assert not set(range(evaluate.EVAL_SEED, evaluate.EVAL_SEED + 10_000)) & set(seen[0][0])
    assert "8 prompts in 1 sets, by base, with D = 20 and guidance 1.5: 8 videos, 160 denoising steps" in capfd.readouterr().out


def test_the_error_of_one_video_is_undefined():
    Path("p.txt").write_text(f"{PROMPT}\n")
    assert script("evaluate.py", *EVALUATE, "--prompts", "p=p.txt", "--count", 1, "--sheet", 0) == 0
    assert "± undefined" in Path("report/table.md").read_text() and "NaN" not in Path("report/table.json").read_text()
    assert json.loads(Path("report/table.json").read_text())["results"][0]["measures"]["reward_std"] is None


def test_parts_from_elsewhere_score_the_same(capfd):
    """Every part by its own path is what `tiny` finds by itself; other sizes than the judge's go without it."""
    Path("p.txt").write_text(f"{PROMPT}\n")
    flags = ["--prompts", "p=p.txt", "--count", 0, "--frames", 4, "--height", 32, "--width", 48]
    assert script("evaluate.py", *EVALUATE, *flags) == 0
    assert script("evaluate.py", *EVALUATE, *flags, "--out", "second", "--base", TINY, "--vae", TINY / "vae", "--text-encoder",
                  TINY / "text_encoder", "--reward", "hpsv2.1", "--reward-weights", TINY / "reward", "--dtype", "float32") == 0
    one, two = (json.loads(Path(f, "table.json").read_text()) for f in ("report", "second"))
    assert one["results"] == two["results"] and one["reward"] == two["reward"] == "HPStiny"
    assert script("evaluate.py", *EVALUATE, "--count", 1, "--frames", 4, "--out", "third") == 0
    assert "watermark" not in Path("third/table.md").read_text()
    capfd.readouterr()


def test_prompts_of_the_tiny_world_are_drawn_once_and_for_all():
    base = load_base("tiny")
    sets = evaluate.prompt_sets(base, (), 100)
    assert list(sets) == ["in_domain", "new", "other"] and all(len(p) == 100 for p in sets.values())
    assert len(set(sets["new"])) == 24 and sets["new"][:24] == sets["new"][24:48]  # fewer captions than videos: they repeat
    assert evaluate.prompt_sets(base, (), 5) == {name: p[:5] for name, p in sets.items()}
    assert not set(sets["in_domain"]) & set(sets["new"])


# --------------------------------------------------- Wrong values ---------------------------------------------------

def refused(name, argv, message, capfd):
    """Status 2, one line that says what is allowed, and not a file or folder more than before."""
    before = sorted(Path().rglob("*"))
    assert script(name, *argv) == 2
    said = capfd.readouterr()
    if said.err.startswith("╭"):  # tyro's own frame
        assert re.search(message, said.err)
    else:
        [line] = [text for text in said.err.splitlines() if not re.match(r"[\w ]+: \d+/\d+ ", text)]
        assert line.startswith(f"{name}: ") and re.search(message, line), line
    assert sorted(Path().rglob("*")) == before


def bad_files():
    Path("prompts.txt").write_text("a red circle moving left\n")  # a good one
    Path("file").write_text("x")
    Path("empty.txt").write_text("\n\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("hole.txt").write_text("1.mp4||||||16\n")
    Path("list.txt").write_text("no separator in this line\n")
    Path("clips.txt").write_text("gone.mp4|||a cat\n")
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    Path("held").mkdir()
    Path("held/state.pt").write_text("x")


@pytest.mark.parametrize("argv, message", [
    ("--tau 0", r"tau = 0.0: must be above 0 and at most 1"),
    ("--tau 1.01", "tau = 1.01"), ("--tau -0.5", "tau = -0.5"), ("--tau nan", "tau = nan"), ("--tau inf", "tau = inf"),
    ("--tau 0.02", r"tau = 0.02 of num_steps = 20 rounds to no step at all"),
    ("--segments 17", "segments = 17: must be from 1 to 16"), ("--segments 0", "segments = 0"),
    ("--grad-steps 13", "grad_steps = 13: must be from 1 to 12"), ("--grad-steps 0", "grad_steps = 0"),
    ("--rank 0", "rank = 0: must be at least 1"), ("--rank -4", "rank = -4"),
    ("--num-steps 1000", "num_steps = 1000: must be from 1 to 999"), ("--num-steps 0", "num_steps"),
    ("--lr -1e-5", "lr = -1e-05: must be a finite number above 0"), ("--lr 0", "lr = 0.0"), ("--lr nan", "lr = nan"),
    ("--clip-grad 0", "clip_grad"), ("--offset-noise -0.1", "offset_noise"), ("--max-skip nan", "max_skip"),
    ("--lambda-tar -1", "lambda_tar = -1"), ("--lambda-tar nan", "lambda_tar = nan"), ("--guidance inf", "guidance = inf"),
    ("--steps 0", "steps = 0: must be at least 1"), ("--batch-size 0", "batch_size = 0"),
    ("--clips-at-once -1", "clips_at_once = -1: must be at least 0"), ("--grad-accum 2", "Unrecognized options"),
    ("--warmup -1", "warmup = -1: must be at least 0"), ("--max-bad-steps 0", "max_bad_steps"), ("--fps 0", "fps = 0"),
    ("--eval-every -1", "eval_every"), ("--eval-count -1", "eval_count"), ("--save-every 0", "save_every"), ("--keep 0", "keep"),
    ("--cache-interval 0", "cache_interval = 0: must be at least 1"), ("--cache-interval 2 --compile", "compile: cannot be had"),
    ("--workers -1", "workers"), ("--decode-chunk -1", "decode_chunk"), ("--frames 0 --data clips.txt", "frames = 0"),
    ("--frames 8", "frames = 8, size = 32: the tiny world draws 16 frames of 32 x 32 pixels; --data is needed for others"),
    ("--size 64", "size = 64: the tiny world draws"),
    ("--size 30 --data clips.txt", "height 30 and width 30: must be multiples of"),
    ("--data gone.txt", "gone.txt: no such list of clips"), ("--data empty.txt", "empty.txt: an empty list"),
    ("--data list.txt", "list.txt, line 1: 1 field"), ("--data binary.txt", "binary.txt: not a text file"),
    ("--data clips.txt", "1 of 1 clips cannot be used.*gone.mp4"),
    ("modelscope --prompts a=prompts.txt", "no clips: --data LIST must name some"),
    ("modelscope", "no prompts: --prompts NAME=FILE must name some"),
    ("--prompts x", "prompts 'x': must be NAME=FILE"), ("--prompts a=gone.txt", "prompts gone.txt: cannot be read"),
    ("--prompts a=empty.txt", "prompts empty.txt: expected one prompt a line, found none"),
    ("--prompts a=hole.txt", "found an empty one"), ("--prompts a=binary.txt", "binary.txt: not a text file in UTF-8"),
    ("--reward taste", "reward 'taste': must be one of hpsv2, hpsv2.1"),
    ("--reward-weights gone.pt", "gone.pt: no such file"),
    ("--base nowhere --data clips.txt --prompts a=prompts.txt", "base 'nowhere': no such file or folder"),
    ("--size 0", "size = 0"),
    ("--base random:7 --data clips.txt --prompts a=prompts.txt", "base 'random:7'"),
    ("--vae gone", "gone: no such file"), ("--text-encoder file", "file: expected"),
    ("--device abacus", "device 'abacus': not available here"), ("--device meta", "device 'meta'"),
    ("--dtype int8", "dtype 'int8': must be one of float32, bfloat16, float16"),
    ("--out file", "out file: is a file, or inside one"), ("--out file/run", "out file/run: is a file, or inside one"),
    ("--out run", "out run: holds another run"), ("--out held", "out held: holds another run"),
    ("--resume gone", "resume gone: holds no run"), ("--resume file", "resume file: holds no run"),
    ("--resume run", "run/config.json: not the settings of this method or version"),
    ("tinny", "preset 'tinny': must be one of tiny, modelscope"), ("--preset modelscope", "Unrecognized options"),
    ("--taus 0.6", "Unrecognized options"), ("--steps many", "invalid"), ("--steps", "expected|Missing"),
])
def test_wrong_values_of_train(argv, message, capfd):
    bad_files()
    refused("train.py", argv.split(), message, capfd)


@pytest.mark.parametrize("argv, message", [
    ("", "no prompt given: --prompt TEXT or --prompts FILE must name some"), ("--prompt=", "no prompt given"),
    ("--prompts gone.txt", "prompts gone.txt: cannot be read"), ("--prompts empty.txt", "found none"),
    ("--prompt red --num-steps 0", "num_steps"), ("--prompt red --num-steps 1000", "num_steps = 1000: must be from 1 to 999"),
    ("--prompt red --frames 0", "frames = 0"), ("--prompt red --fps 0", "fps = 0"), ("--prompt red --batch-size 0", "batch_size"),
    ("--prompt red --guidance nan", "guidance = nan"), ("--prompt red --lora-scale inf", "lora_scale = inf"),
    ("--prompt red --height 30", "height 30 and width 30: must be multiples of"),
    ("--prompt red --width 0", "width = 0"),
    ("--prompt red --width -32", "width = -32"), ("--prompt red --lora gone.safetensors", "gone.safetensors: no such file"),
    ("--prompt red --lora file", "file: expected"), ("--prompt red --base file", "file: no vae found in"),
    ("--prompt red --out file", "out file: is a file"), ("--prompt red --device meta", "device 'meta'"),
    ("--prompt red --dtype double", "dtype 'double'"), ("--prompt red --steps 3", "Unrecognized options"),
])
def test_wrong_values_of_generate(argv, message, capfd):
    bad_files()
    refused("generate.py", argv.split(), message, capfd)


@pytest.mark.parametrize("argv, message", [
    ("--num-steps 0", "num_steps"), ("--num-steps 20 1000", "num_steps = 1000"),
    ("--num-steps", "must have at least one value"), ("--guidance nan", "guidance = nan: must be a finite number"),
    ("--lora-scale 1 inf", "lora_scale = inf: must be a finite number"), ("--lora-scale", "lora_scale: must have at least one"),
    ("--watch blur", "watch 'blur': must be one of motion"), ("--watch diversity --count 2", "watch diversity: needs several"),
    ("--count -1", "count = -1"), ("--sheet -1", "sheet"),
    ("--frames 0", "frames = 0"), ("--batch-size 0", "batch_size = 0"), ("--segments 17", "segments = 17"),
    ("--prompts x", "prompts 'x': must be NAME=FILE"), ("--prompts a=gone.txt", "prompts gone.txt"),
    ("--prompts a=clips.txt --prompts a=clips.txt", "each name once"), ("--height 30", "height 30"), ("--width 0", "width"),
    ("--lora gone", "gone: no such file"), ("--reward x", "reward 'x'"), ("--out file", "out file: is a file"),
    ("--base random:32", "no prompts: --prompts NAME=FILE must name some"),
])
def test_wrong_values_of_evaluate(argv, message, capfd):
    bad_files()
    refused("evaluate.py", argv.split(), message, capfd)


def test_an_adapter_of_another_base_is_refused(adapter, capfd):
    Path("p.txt").write_text("a cat\n")
    refused("generate.py", ["--prompt", "red", "--base", "random:32", "--lora", str(adapter)], "lora.safetensors: ", capfd)


def test_a_real_process_says_the_same():
    """In-process is the same thing: one line on stderr, nothing on stdout, status 2."""
    command = [sys.executable, ROOT / "generate.py", "--prompt", "x", "--frames", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "generate.py: frames = 0: must be at least 1\n")


@pytest.mark.parametrize("config", [train.Config, generate.Config, evaluate.Config], ids=lambda c: c.__module__)
def test_help_lists_every_option_with_its_meaning(config, capfd):
    assert script(f"{config.__module__}.py", "--help") == 0
    said = capfd.readouterr().out
    for field in fields(config):
        if field.name != "preset":  # a word, not a flag
            assert f"--{field.name.replace('_', '-')}" in said
