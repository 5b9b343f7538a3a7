"""Command lines: what generate.py and evaluate.py write, and that wrong values end scripts with a line, writing nothing."""
import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import tyro
from conftest import JUDGED, ROOT, listing, refused, script, write_adapter

import evaluate
import generate
import lora
import reward
import train
from data import ClipConfig
from formats import vbench
from formats.weights import TINY, preset_of
from model import load_base
from sampler import sample
from support import settings, tables, videos
from support.clips import read_list
from support.videos import read_video
from tiny import world

PROMPT = "a red circle moving left"
pytestmark = pytest.mark.usefixtures("aside")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA of the tiny base that changes what it generates."""
    return write_adapter(tmp_path_factory.mktemp("adapter") / "lora.safetensors")


# --------------------------------------------------- generate.py ---------------------------------------------------

SMALL = ["--device", "cpu", "--num-steps", "2"]


def make(out, *argv):
    """generate.py with these flags; {file name: pixels}."""
    assert script("generate.py", *SMALL, "--out", out, *argv) == 0
    return {p.name: iio.imread(p) for p in sorted(Path(out).iterdir()) if p.suffix != ".txt"}


def test_videos_as_mp4_and_gif(capfd):
    made = make("videos", "--prompt", PROMPT, "--prompt", "Blue stripes, drifting up.", "--gif", "--fps", 5, "--frames", 6,
                "--size", "32x48", "--guidance", 1.5)
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
    """Whatever the prompt, and though the folder has a colon in its name."""
    prompts = [PROMPT, "../../../escape", "猫が歩く"]
    make("lr:1e-5", "--gif", "--frames", 4, *(word for p in prompts for word in ("--prompt", p)))
    assert len(listing()) == len(listing("lr:1e-5")) == 3 * 3
    listed = read_list("lr:1e-5")
    assert [(clip.path.suffix, clip.caption) for clip in listed] == [(".mp4", prompt) for prompt in prompts]
    assert not any(problem for *_, problem in videos.read_all_windows([clip.path for clip in listed], ClipConfig(num_frames=4)))


def test_file_names_are_safe_whatever_the_prompt():
    for prompt, name in [
            ("../../etc/passwd", "0007-etc-passwd"), ("a/b\\c:*?\"<>|\n\t\0d", "0007-a-b-c-d"), (".hidden ", "0007-hidden"),
            ("猫が歩く", "0007"), ("Ünïcode é", "0007-n-code"), ("--help", "0007-help"), ("x" * 500, "0007-" + "x" * 60),
            ("a" * 59 + " b", "0007-" + "a" * 59)]:
        assert videos.video_name(7, prompt) == name


def test_generating_is_the_whole_chain_from_the_videos_own_noise_in_any_batch():
    base, prompts = load_base("tiny"), [PROMPT, "a blue ring moving up", "red stripes drifting left"]
    by_hand = []
    for prompt, seed in zip(prompts, (5, 6, 7)):
        noise = torch.randn(4, 4, 8, 8, generator=generate.ranks.sample_generator(seed, "generate"))[None]
        text, uncond = base.encode_text([prompt]), base.encode_text([""])
        by_hand.append(sample(base.predict, noise, text, uncond, base.levels(3), 2.)[0])
    for batch_size in (1, 2, 3):
        made = list(generate.generate(base, prompts, [5, 6, 7], num_steps=3, guidance=2., frames=4, batch_size=batch_size))
        assert [i for i, _ in made] == [0, 1, 2]
        torch.testing.assert_close([z_0 for _, z_0 in made], by_hand, atol=1e-5 * (batch_size > 1), rtol=0)


def test_a_lora_and_its_scale(adapter):
    def video(*argv):
        [pixels] = make(f"videos-{len(list(Path().iterdir()))}", "--prompt", PROMPT, "--frames", 2, *argv).values()
        return pixels
    base, whole, half = video(), video("--lora", adapter), video("--lora", adapter, "--lora-scale", .5)
    assert np.array_equal(base, video("--lora", adapter, "--lora-scale", 0))
    assert not np.array_equal(whole, base) and not np.array_equal(half, whole)
    # The base by its folder and parts, the adapter by its folder, with the scale that is the default.
    assert np.array_equal(whole, video("--base", TINY, "--vae", TINY / "vae", "--text-encoder", TINY / "text_encoder",
                                       "--lora", adapter.parent, "--lora-scale", 1))
    assert adapter.name == "lora.safetensors" and not np.array_equal(base, video("--dtype", "bfloat16"))


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
    frames = base.decode_frames(z_0[None])[0]
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
                  "--num-steps", 2, 3, "--guidance", 1, 3, "--sheet", 1, "--frames", 4, "--segments", 2, "--seed", 4,
                  "--batch-size", 3, "--lora-scale", .5) == 0
    said, told = capfd.readouterr()
    # Before it starts, how much there is to do; then lines that say what is counted, and how the reward stands.
    assert said.startswith("32 videos, 80 denoising steps\n")
    assert "evaluating: 0/80 steps, " in told
    assert re.search(r"evaluating: 80/80 steps, .* left, stripes 0\.\d{4}, fine-tuned", told)
    assert listing("report") == ["sheet.png", "table.json", "table.md"]
    table = Path("report/table.md").read_text()
    assert table in said and "written: report/table.md, table.json, sheet.png" in said
    report = json.loads(Path("report/table.json").read_text())
    assert report["reward"] == "HPStiny" and report["seed"] == 4 and report["versions"].keys() >= {"python", "torch", "machine"}
    assert "--lora-scale 0.5" in report["command"]
    rows = report["results"]
    assert [(r["set"], r["num_steps"], r["guidance"], r["model"]) for r in rows] == [
        (s, d, g, m) for s in ("shapes", "stripes") for d in (2, 3) for g in (1., 3.) for m in ("base", "fine-tuned")]
    _, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    assert len(lines) == 16 and len({len(line) for line in table.splitlines()}) == 1  # aligned

    # One pair of rows again.
    base, score = load_base("tiny"), reward.load_reward(base_folder=TINY)
    lora.load(base.network, adapter)
    again = []
    for row, scale in zip(rows[4:6], (0., .5)):
        lora.set_scale(base.network, scale)
        found, _ = evaluate.evaluate(base, score, [PROMPT, "a blue ring moving up"], seed=4, num_steps=3, guidance=1., segments=2,
                                     shape=(4, 32, 32))
        assert row["measures"] == pytest.approx(tables.summary(found), abs=1e-6)
        again.append(found)
    gain = rows[5]["differences"]["reward"]
    assert gain == pytest.approx(tables.paired(*again), abs=1e-6) and "differences" not in rows[4]
    mean, deviation, _ = rows[5]["measures"].values()
    assert lines[5] == ["shapes", "3", "1", "fine-tuned", "2", f"{mean:.4f} ± {deviation:.4f}", "{:+.4f} ± {:.4f}".format(*gain)]


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
    assert script("evaluate.py", *flags, "--lora-scale", .5, "--overwrite") == 0
    one = json.loads(Path("report/table.json").read_text())["results"]
    assert [r["model"] for r in one[:2]] == ["base", "fine-tuned"] and listing("report") == ["table.json", "table.md"]
    assert one[1]["measures"] == rows[2]["measures"] and one[1]["differences"] == rows[2]["differences"]
    assert one[0]["measures"].keys() == {"reward_mean", "reward_std", "n", "judge", "pixel_motion", *JUDGED}


def test_a_quick_look_on_other_noise_than_training_selects_by(monkeypatch, capfd):
    Path("p.txt").write_text(f"{PROMPT}\n")

    def generated(base, prompts, seeds, num_steps, guidance, *args):
        assert (seeds, num_steps, guidance) == ([*range(2_000_000, 2_000_008)], 20, 1.5)  # 8 videos, the first D alone
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "generate", generated)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(evaluate.Config(device="cpu", prompts=["p=p.txt"], quick=True))
    assert evaluate.Config.seed == evaluate.REPORT_SEED >= evaluate.EVAL_SEED + 10_000
    assert "8 videos, 160 denoising steps" in capfd.readouterr().out


def test_the_base_is_measured_without_adapters_and_its_parts_by_path_are_the_same(adapter):
    """Also where strength 0 is all that is asked. Other sizes than the judge's go without it."""
    Path("p.txt").write_text(f"{PROMPT}\n")
    flags = [*EVALUATE, "--prompts", "p=p.txt", "--count", 0, "--frames", 4, "--sheet", 0, "--size", "32x48"]
    assert script("evaluate.py", *flags, "--lora", adapter, "--lora-scale", 0, 0, "--official-hps") == 0
    assert script("evaluate.py", *flags, "--out", "second", "--base", TINY, "--vae", TINY / "vae", "--text-encoder",
                  TINY / "text_encoder", "--reward", "hpsv2.1", "--reward-weights", TINY / "reward", "--dtype", "float32") == 0
    one, two = (json.loads(Path(f, "table.json").read_text()) for f in ("report", "second"))
    assert one["results"] == two["results"] and one["reward"] == two["reward"] == "HPStiny"
    [row] = one["results"]
    # Of one video the deviation is not known: null in JSON, which has no NaN.
    assert row["model"] == "base" and row["measures"].keys() == {"reward_mean", "reward_std", "n"}
    assert row["measures"]["reward_std"] is None and "NaN" not in Path("report/table.json").read_text()
    assert one["official_hps_distance"] < 1e-4
    table = Path("report/table.md").read_text()
    assert "The hpsv2 package's own scores differ by at most" in table and "on 1 videos" in table


def test_prompts_of_the_tiny_world_are_drawn_once_and_for_all():
    base = load_base("tiny")
    sets = evaluate.prompt_sets(base, (), 100)
    assert list(sets) == ["in_domain", "new", "other"] and all(len(p) == 100 for p in sets.values())
    assert len(set(sets["new"])) == 24 and sets["new"][:24] == sets["new"][24:48]  # fewer captions than videos: they repeat
    assert evaluate.prompt_sets(base, (), 5) == {name: p[:5] for name, p in sets.items()}
    assert not set(sets["in_domain"]) & set(sets["new"])


# --------------------------------------------------- Wrong values ---------------------------------------------------

@pytest.fixture(scope="module", autouse=True)
def bad_files(tmp_path_factory):
    """Files that each have something wrong, but for prompts.txt."""
    folder = tmp_path_factory.mktemp("bad")
    files = {"prompts.txt": "a red circle moving left\n", "file": "x", "empty.txt": "\n\n", "hole.txt": "1.mp4||||||16\n",
             "list.txt": "no separator in this line\n", "clips.txt": "gone.mp4|||a cat\n", "run/config.json": "{}",
             "held/state.pt": "x", "report/table.json": "{}"}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    write_adapter(folder / "lora.safetensors")  # of another base than random:32
    return folder


NUMBERS = [
    (train.check, train.Config(), dict(
        tau=(0., 1.01, math.nan, .02), segments=(17, 0), grad_steps=(13, 0), rank=(0,), num_steps=(1000,), lr=(-1e-5, 0.),
        clip_grad=(0.,), offset_noise=(-.1,), max_skip=(math.nan,), lambda_tar=(-1., math.nan), guidance=(math.inf,), steps=(0,),
        batch_size=(0,), clips_at_once=(-1,), warmup=(-1,), max_bad_steps=(0,), fps=(0,), eval_every=(-1,), eval_count=(-1,),
        save_every=(0,), workers=(-1,), decode_chunk=(-1,), cache_interval=(0,), size=(0, "a", "1x2x3"), frames=(0,),
        latent_context=(0,), anchor=(-1., math.inf))),
    (generate.check, generate.Config(prompt=["red"]), dict(
        num_steps=(0, 1000), frames=(0,), fps=(0,), batch_size=(0,), guidance=(math.nan,), lora_scale=(math.inf,),
        size=("32x", "-32"), per_prompt=(0,))),
    (evaluate.check, evaluate.Config(frames=16), dict(
        num_steps=((20, 1000),), guidance=((math.nan,),), lora_scale=((1., math.inf),), count=(-1,), sheet=(-1,), frames=(0,),
        batch_size=(0,), segments=(17,), size=("4x0", 0), per_prompt=(0,), fps=(0,)))]


@pytest.mark.parametrize("check, cfg, wrong", NUMBERS, ids=["train", "generate", "evaluate"])
def test_numbers_out_of_range(check, cfg, wrong):
    check(cfg)
    for name, values in wrong.items():
        for value in values:
            refused(rf"^{name} = \S+(: must be| of num_steps = 20 rounds to no step)", check, replace(cfg, **{name: value}))


@pytest.mark.parametrize("argv, message", [
    ("train --cache-interval 2 --compile", "compile: cannot be had"), ("train --data gone.txt", "gone.txt: not a text file"),
    ("train --data list.txt", "list.txt, line 1: 1 field"),
    ("train --data clips.txt --cache-dir file", "cache_dir file: is a file, or inside one"),
    ("train modelscope --prompts a=prompts.txt", "no clips: --data LIST must name some"),
    ("train modelscope", "no prompts: --prompts NAME=FILE must name some"),
    ("train --base random:32 --prompts a=prompts.txt", "no clips: --data LIST must name some"),
    ("train --base nowhere", "base nowhere: not there, or without"),
    ("train --base some/where", "base some/where: not there, or without training settings"),
    ("train --prompts x", "prompts 'x': must be NAME=FILE"), ("train --prompts a=hole.txt", "found an empty one"),
    ("train --prompts a=gone.txt", "gone.txt: not a text file"),
    ("train --prompts a=empty.txt", "prompts empty.txt: expected one prompt a line, found none"),
    ("train --watch hps", "watch 'hps': must be one of motion"), ("train tinny", "preset 'tinny': must be one of tiny, "),
    ("train --resume run", "run/config.json: not the settings of this method or version"),
    ("generate", "no prompt given"), ("generate --prompt=", "no prompt given"), ("generate --prompt a --lora gone", "gone: no"),
    ("evaluate --num-steps", "must have at least one value"), ("evaluate --out file", "out file: is a file"),
    ("evaluate --prompts a=clips.txt --prompts a=clips.txt", "each name once"), ("evaluate --quick --count 64", "quick: takes 8"),
    ("evaluate --official-hps --watch motion --reward pickscore", "official_hps: checks hpsv2 or hpsv2.1"),
    ("evaluate --out report", "out report: holds results; choose another folder, or --overwrite")])
def test_wrong_values(argv, message, bad_files, monkeypatch):
    monkeypatch.chdir(bad_files)
    name, *argv = argv.split()
    module = {"train": train, "generate": generate, "evaluate": evaluate}[name]

    def check():
        cfg = settings.parse(argv, train.PRESETS, "", preset_of) if name == "train" else tyro.cli(module.Config, args=argv)
        module.check(cfg)
    refused(message, check)


@pytest.mark.parametrize("name, argv, message", [
    ("train.py", "--frames 8", "frames = 8, size = 32: the tiny world draws 16 or 17 frames of 32 x 32 pixels"),
    ("train.py", "--size 30 --data clips.txt", "height 30 and width 30: must be multiples of"),
    ("train.py", "--latent-context 3", "latent_context: cannot be set, as base tiny decodes frames from their own latents"),
    ("train.py", "tiny --base random-wan --frames 17 --data clips.txt --prompts a=prompts.txt",
     "preset tiny: is not for base random-wan, whose own is wan$"),
    ("train.py", "--data clips.txt", "1 of 1 clips cannot be used.*gone.mp4"), ("train.py", "--dtype int8", "dtype 'int8': must"),
    ("train.py", "tiny --base nowhere --data clips.txt --prompts a=prompts.txt", "base 'nowhere': no such file or folder"),
    ("train.py", "--out file/run", "out file/run: is a file, or inside one"), ("train.py", "--out held", "out held: holds"),
    ("train.py", "--steps many", "invalid"),
    ("generate.py", "--prompt red --base random:32 --lora lora.safetensors", "lora.safetensors: "),
    ("generate.py", "--prompt red --lora file", "file: expected"), ("evaluate.py", "--device meta", "device 'meta'"),
    ("evaluate.py", "--watch diversity --count 2", "watch diversity: needs several videos of a prompt")])
def test_a_wrong_value_ends_a_script_with_a_line_and_leaves_nothing(name, argv, message, bad_files, monkeypatch, capfd):
    """Status 2, and not a file or folder more than before."""
    monkeypatch.chdir(bad_files)
    before = sorted(Path().rglob("*"))
    assert script(name, *argv.split()) == 2
    said = capfd.readouterr().err
    assert re.search(message, said)
    if not said.startswith("╭"):  # tyro's own frame
        [line] = [text for text in said.splitlines() if not re.match(r"[\w ]+: \d+/\d+ ", text)]
        assert line.startswith(f"{name}: ")
    assert sorted(Path().rglob("*")) == before


def test_a_script_draws_and_writes_whatever_a_notebook_or_the_locale_has_set():
    code = ("from pathlib import Path; from support import files, pictures, ranks\n"
            "def main():\n"
            "    pictures.write_figure(Path('figure.png'), pictures.new_figure(1, 1, (2, 2))[0])\n"
            "    files.write_text(Path('words.txt'), chr(29483))\n"
            "    print(chr(29483))\n"
            "ranks.run_script('draw', main)")
    odd = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "LC_ALL": "C", "PYTHONUTF8": "0",
           "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | odd | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (0, b"\\u732b\n"), done.stderr
    assert listing() == ["figure.png", "words.txt"] and Path("words.txt").read_bytes() == "猫".encode()


OTHER = "a blue ring-2"  # of the second one its own number must stay


def read_as_vbench(out):
    """seeds.json. VBench takes any file's ending for that of all, and a prompt for the name before its number."""
    names = [path.name for path in (out / "videos").iterdir()]
    prompts, seeds = (json.loads((out / f"{name}.json").read_text()) for name in ("prompts", "seeds"))
    assert {Path(name).suffix for name in names} == {".mp4"} and prompts.keys() == seeds.keys() == {*names}
    assert prompts == {name: re.sub(r"-\d+$", "", Path(name).stem) for name in names}
    return seeds


def test_generated_videos_are_found_and_told_apart_by_vbenchs_own_rules(capfd):
    flags = ["generate.py", "--device", "cpu", "--num-steps", 2, "--frames", 2]
    assert script(*flags, "--seed", 7, "--vbench", "--per-prompt", 3, "--prompt", PROMPT, "--prompt", OTHER, "--out", "it's") == 0
    seeds = read_as_vbench(Path("it's"))
    assert seeds == {f"{p}-{i}.mp4": 7 + 3 * k + i for k, p in enumerate((PROMPT, OTHER)) for i in range(3)}
    folder = str(Path("it's").resolve())
    assert shlex.split(capfd.readouterr().out.strip().splitlines()[-1]) == [
        "vbench", "evaluate", "--videos_path", f"{folder}/videos", "--dimension", *vbench.DIMENSIONS, "--mode=custom_input",
        "--prompt_file", f"{folder}/prompts.json"]

    assert script(*flags, "--seed", seeds[f"{OTHER}-1.mp4"], "--prompt", OTHER, "--out", "alone") == 0  # each seed is the video's
    again, same, another = map(read_video, map(Path, ("alone/0000-a-blue-ring-2.mp4", f"it's/videos/{OTHER}-1.mp4",
                                                      f"it's/videos/{OTHER}-0.mp4")))
    assert np.array_equal(again, same) and not np.array_equal(again, another)


def test_base_and_tuned_are_a_folder_each_of_the_videos_that_were_measured(tmp_path, capfd):
    Path("a.txt").write_text(f"{PROMPT}\n{OTHER}\n")
    Path("b.txt").write_text(f"{PROMPT}\n")  # once more, in another set
    common = ["--device", "cpu", "--num-steps", 2, "--frames", 4, "--lora", write_adapter(tmp_path / "lora.safetensors")]
    assert script("evaluate.py", *common, "--vbench", "--per-prompt", 2, "--guidance", 1, 2, "--segments", 2, "--count", 0,
                  "--sheet", 1, "--prompts", "a=a.txt", "--prompts", "b=b.txt", "--seed", 5, "--out", "both") == 0
    assert capfd.readouterr().out.count("\nvbench evaluate ") == 2
    written = []
    for model, scale in (("base", 0), ("fine-tuned", 1)):
        seeds = read_as_vbench(Path("both", model))
        assert list(seeds.values()) == [*range(5, 11)] and list(seeds)[3:5] == [f"{OTHER}-1.mp4", f"{PROMPT}-2.mp4"]
        # The first guidance's, by this model and seed.
        flags = ["--guidance", 1, "--seed", 9, "--lora-scale", scale, "--prompt", PROMPT, "--out", model]
        assert script("generate.py", *common, *flags) == 0
        written.append(read_video(Path("both", model, "videos", f"{PROMPT}-2.mp4")))
        assert np.array_equal(written[-1], read_video(Path(model, "0000-a-red-circle-moving-left.mp4")))
    assert not np.array_equal(*written)


@pytest.mark.parametrize(("flags", "message"), [
    (["--prompt", "either/or"], "vbench: prompt 'either/or' has a /: VBench knows a prompt by the file's name, so it must"),
    (["--prompt", "x" * 250], "has 250 bytes: .* and at most 249 bytes"), (["--prompt", "猫" * 84], "has 252 bytes"),
    (["--prompt", PROMPT, "--gif"], "vbench: its folder has files of one kind; leave gif or vbench out"),
    (["--prompt", PROMPT, "--per-prompt", "1", "--out", "held"], r"holds 1 other files \(a red circle moving left-1.mp4\)")])
def test_what_vbench_could_not_read_is_refused_before_anything_is_loaded(flags, message, monkeypatch, capfd):
    longest = "猫" * (vbench.LONGEST // 3)
    vbench.Folder(Path("out"), vbench.plan_files([longest], 0, 2, Path("out")))(1, evaluate.torch.zeros(1, 3, 8, 8))
    for i in range(2):
        Path("held/videos").mkdir(parents=True, exist_ok=True)
        (Path("held/videos") / f"{PROMPT}-{i}.mp4").touch()
    monkeypatch.setattr("model.load_base", lambda *args, **settings: pytest.fail("was loaded"))
    assert script("generate.py", "--vbench", *flags) == 2
    assert re.search(message, capfd.readouterr().err) and len(listing()) == 3
    Path("p.txt").write_text("either/or\n")
    refused("has a /", evaluate.check, evaluate.Config(vbench=True, prompts=["p=p.txt"]))
