"""formats/vbench.py: the folders that generate.py --vbench and evaluate.py --vbench leave, read back by VBench's own rules."""
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import listing, script, write_adapter

import evaluate
from formats import vbench
from support.videos import read_video

PROMPT, OTHER = "a red circle moving left", "a blue ring-2"  # of the second one its own number must stay
pytestmark = pytest.mark.usefixtures("aside")


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
    with pytest.raises(ValueError, match="has a /"):
        evaluate.check(evaluate.Config(vbench=True, prompts=["p=p.txt"]))
