"""formats/vbench.py: the folders that generate.py --vbench and evaluate.py --vbench leave, read back by VBench's own rules."""
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import listing, script, write_adapter

import evaluate
import generate
from formats import vbench
from support.videos import read_video

PROMPT, LONG = "a red circle moving left", "a blue ring-2"  # of the second one its own number must stay
pytestmark = pytest.mark.usefixtures("aside")


def read_as_vbench(out):
    """{file: prompt} as VBench finds them: the ending of whatever is listed first, the prompt before the last -number."""
    names = [path.name for path in (out / "videos").iterdir()]
    assert {Path(name).suffix for name in names} == {".mp4"}
    by_name = {name: re.sub(r"-\d+$", "", Path(name).stem) for name in names}
    given = json.loads((out / "prompts.json").read_text())
    assert given == by_name  # custom mode: every file and no other, relative to the folder
    return given


def test_generated_videos_are_found_and_told_apart_by_vbenchs_own_rules(capfd):
    flags = ["generate.py", "--device", "cpu", "--num-steps", 2, "--frames", 2, "--seed", 7]
    assert script(*flags, "--vbench", "--per-prompt", 3, "--prompt", PROMPT, "--prompt", LONG, "--out", "it's") == 0
    assert listing("it's") == ["prompts.json", "seeds.json", *(f"videos/{p}-{i}.mp4" for p in (LONG, PROMPT) for i in range(3))]
    assert set(read_as_vbench(Path("it's")).values()) == {PROMPT, LONG}
    seeds = json.loads(Path("it's/seeds.json").read_text())
    assert seeds == {f"{p}-{i}.mp4": 7 + 3 * k + i for k, p in enumerate((PROMPT, LONG)) for i in range(3)}

    # The command is one for a shell, its paths are whole, and each seed is the video's.
    command = shlex.split(capfd.readouterr().out.strip().splitlines()[-1])
    folder = str(Path("it's").resolve())
    assert command == ["vbench", "evaluate", "--videos_path", f"{folder}/videos", "--dimension", *vbench.DIMENSIONS,
                       "--mode=custom_input", "--prompt_file", f"{folder}/prompts.json"]
    assert script(*flags[:-1], seeds[f"{LONG}-1.mp4"], "--prompt", LONG, "--out", "alone") == 0
    again, first, second = (read_video(Path(name)) for name in ("alone/0000-a-blue-ring-2.mp4", f"it's/videos/{LONG}-1.mp4",
                                                                f"it's/videos/{LONG}-0.mp4"))
    assert np.array_equal(again, first) and not np.array_equal(first, second)


def test_base_and_tuned_are_a_folder_each_of_the_videos_that_were_measured(tmp_path, capfd):
    Path("a.txt").write_text(f"{PROMPT}\na red ring moving up\n")
    Path("b.txt").write_text(f"{PROMPT}\n")  # once more, in another set
    common = ["--device", "cpu", "--num-steps", 2, "--frames", 4, "--lora", write_adapter(tmp_path / "lora.safetensors")]
    assert script("evaluate.py", *common, "--vbench", "--per-prompt", 2, "--guidance", 1, 2, "--segments", 2, "--count", 0,
                  "--sheet", 1, "--prompts", "a=a.txt", "--prompts", "b=b.txt", "--seed", 5, "--out", "both") == 0
    files = {}
    for model in ("base", "fine-tuned"):
        assert set(read_as_vbench(Path("both", model)).values()) == {PROMPT, "a red ring moving up"}
        seeds = json.loads(Path("both", model, "seeds.json").read_text())
        assert seeds == {f"{PROMPT}-0.mp4": 5, f"{PROMPT}-1.mp4": 6, "a red ring moving up-0.mp4": 7,
                         "a red ring moving up-1.mp4": 8, f"{PROMPT}-2.mp4": 9, f"{PROMPT}-3.mp4": 10}
        files[model] = read_video(Path("both", model, "videos", f"{PROMPT}-2.mp4"))
    assert capfd.readouterr().out.count("\nvbench evaluate ") == 2
    rows = json.loads(Path("both/table.json").read_text())["results"]
    assert {row["set"]: row["measures"]["n"] for row in rows} == {"a": 4, "b": 2}

    # The first guidance's, by the same model and seed.
    for model, scale in (("base", 0), ("fine-tuned", 1)):
        assert script("generate.py", *common, "--guidance", 1, "--seed", 9, "--lora-scale", scale, "--prompt", PROMPT,
                      "--out", model) == 0
        assert np.array_equal(files[model], read_video(Path(model, "0000-a-red-circle-moving-left.mp4")))
    assert not np.array_equal(*files.values())


def test_the_longest_name_can_be_written():
    prompt = "猫" * (vbench.LONGEST // 3)
    folder = vbench.Folder(Path("out"), vbench.plan_files([prompt], 0, 2, Path("out")))
    folder(1, generate.torch.zeros(1, 3, 8, 8))
    assert listing("out") == [f"videos/{prompt}-1.mp4"]


@pytest.mark.parametrize(("flags", "message"), [
    (["--prompt", "either/or"], "vbench: prompt 'either/or' has a /: VBench knows a prompt by the file's name, so it must"),
    (["--prompt", "x" * 250], "has 250 bytes: .* and at most 249 bytes"), (["--prompt", "猫" * 84], "has 252 bytes"),
    (["--prompt", PROMPT, "--gif"], "vbench: its folder has files of one kind; leave gif or vbench out"),
    (["--prompt", PROMPT, "--per-prompt", "0"], "per_prompt = 0: must be at least 1"),
    (["--prompt", PROMPT, "--per-prompt", "1", "--out", "held"], r"holds 1 other files \(a red circle moving left-1.mp4\)")])
def test_what_vbench_could_not_read_is_refused_before_anything_is_loaded(flags, message, monkeypatch, capfd):
    held = Path("held/videos")
    held.mkdir(parents=True)
    for i in range(2):
        (held / f"{PROMPT}-{i}.mp4").touch()
    monkeypatch.setattr("model.load_base", lambda *args, **settings: pytest.fail("was loaded"))
    assert script("generate.py", "--vbench", *flags) == 2
    assert re.search(message, capfd.readouterr().err) and len(listing()) == 2
    with pytest.raises(ValueError, match="has a /"):
        Path("p.txt").write_text("either/or\n")
        evaluate.check(evaluate.Config(vbench=True, prompts=["p=p.txt"]))
