"""explain.py and report.py: their numbers, and their pages in a real browser, if there is one. Runs are written by hand."""
import importlib
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, script

import explain
import sampler
import train
from pages import html as pages, run_files as run_pages, votes
from support.settings import to_record
from support.videos import video_name, write_video
from tests import browser as chromium

NASTY = 'a cat </script><script>document.title="taken"</script><b id="injected">'
PROMPTS = [NASTY, "a red circle moving left", "a dog & a \"bird\"", "a green square"]
SCROLL = "document.querySelectorAll('video')[1].scrollIntoView({behavior: 'instant'})"
SHOWN = """[...near].map(video => {
  const context = document.createElement("canvas").getContext("2d");
  context.drawImage(video, 4, 4, 1, 1, 0, 0, 1, 1);
  return context.getImageData(0, 0, 1, 1).data[0];
})"""  # the red of a pixel of what each clip shows
APART = """new Promise(done => {
  const seen = [], timer = setInterval(() => {
    const [first, ...others] = [...near], away = others.map(video => Math.abs(video.currentTime - first.currentTime));
    seen.push(Math.max(...away.map(seconds => Math.min(seconds, first.duration - seconds))));  // the end is beside the start
    if (seen.length === 25) { clearInterval(timer); done(seen.sort()[12]); }
  }, 40);
})"""  # how far clips are apart, in seconds: the median over a second
GAINS = (.1, -.2, .05, .3)  # of four prompts
pytestmark = pytest.mark.usefixtures("aside")


def in_a_browser(test):
    return pytest.mark.slow(pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium here")(test))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def write_clip(path, seed, frames=8):
    """A small clip whose red says the frame's number, 20 times that; green and blue are its own."""
    pixels = np.full((frames, 32, 32, 3), np.random.default_rng(seed).integers(0, 255, 3), np.uint8)
    pixels[..., 0] = 20 * np.arange(frames)[:, None, None]
    write_video(path, pixels, 8)


def write_run(folder, gains, reward="HPStiny", **changes):
    """A run folder with evaluations at steps 0, 10 and 20, in which prompt i gains gains[i]."""
    (folder / "samples").mkdir(parents=True)
    cfg = train.Config(prompts=("things=prompts.txt",), eval_count=4, steps=20, **changes)
    (folder / "config.json").write_text(json.dumps(to_record(cfg)))
    (folder / "run.json").write_text(json.dumps({"watched": cfg.watch, "prompts": {"things": PROMPTS}, "reward": reward}))
    lines = [{"step": s, "reward": .3 + .01 * s} for s in range(1, 21)]
    for step, judge in ((0, .9), (10, .95), (20, .8)):
        rewards = [.2 + .1 * i + gain * step / 20 for i, gain in enumerate(gains)]
        table = {"reward": rewards, "motion": [.5, .6, .7, .8 + step / 100], "static": [0.] * 4}
        if cfg.watch:
            table["judge"] = [judge, judge + .01, judge + .02, judge + .03]
        (folder / "samples" / f"step_{step:06d}.json").write_text(json.dumps({"things": table}))
        lines.append({"step": step, "eval": {"things": {"reward_mean": float(np.mean(rewards)), "n": 4}}})
        for i, prompt in enumerate(PROMPTS):
            write_clip(folder / "samples" / f"step_{step:06d}_{video_name(i, prompt)}.mp4", 100 * i + step)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_clips(folder, count, seed, frames=8):
    """A folder like generate.py's."""
    for i in range(count):
        path = folder / f"{video_name(i, PROMPTS[i % 4])}.mp4"
        write_clip(path, seed + i, frames)
        path.with_suffix(".txt").write_text(PROMPTS[i % 4] + "\n")
    return folder


def data_of(page):
    """The JSON that a page carries."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


def check_in_browser(browser, page, study=False):
    """At both widths, light and dark: no error, nothing fetched, nothing wider than the window, clips play in step."""
    for width, dark in ((1280, False), (390, True)):
        browser.open(page, width, 900, dark)
        browser.js(SCROLL)
        browser.wait_for("near.size > 1 && [...near].every(video => !video.paused && video.currentTime > .2)")
        assert browser.js("document.documentElement.scrollWidth") <= width
        wide = browser.js("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length")
        assert not wide or width == 390 and study  # its table has 15 columns
        assert browser.requests  # the page itself, or nothing was listened to
        assert [r for r in browser.requests if not r.startswith(("data:", page.resolve().as_uri()))] == []
    # A clip that falls behind is brought back. The slider stops all clips and moves them.
    browser.js("[...near][1].currentTime = ([...near][0].currentTime + .5) % [...near][0].duration")
    browser.wait_for(f"{APART}.then(apart => apart < .125)")  # a frame
    for moment in (.45, .8):
        browser.js(f"slider.value = {moment}; slider.dispatchEvent(new Event('input'))")
        browser.wait_for(f"[...near].every(v => v.paused && !v.seeking && Math.abs(v.currentTime - {moment}) < .01)")
    assert browser.problems == []


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """A page of a short chain: the setup, what the page says, the strip, and the page."""
    out = tmp_path_factory.mktemp("explain")
    cfg = explain.Config(num_steps=5, grad_steps=2, step=1, batch_size=1, segments=3, lambda_tar=.7, out=out, anchor=.1,
                         reward=("hpsv2", "removal:watermark=0.1"))
    found, explain_step = [], explain.explain

    def listen(setup):
        setup.z_0 = setup.edit(.6)[1]  # before the step is taken
        found.extend([setup, *explain_step(setup)])
        return found[1:]
    with pytest.MonkeyPatch.context() as patch:
        few = {"CLIPS": 2, "TAUS": (.2, 1.), "SEGMENTS": (1, 16), "LAMBDAS": (0., 1.), "REPEATS": 3}
        for name, value in {**few, "explain": listen}.items():
            patch.setattr(explain, name, value)
        explain.main(cfg)
    return *found, out / "explain.html"


def test_the_page_has_the_numbers_of_the_step_that_train_takes(explained):
    """The sliders' own setting, the numbers before the step, and what train.train logged are one and the same."""
    setup, page, strip, _ = explained
    mine = page["states"][3]["lambdas"]["0.7"]
    assert -page["numbers"]["loss"] == pytest.approx(mine["R"], rel=1e-4) == pytest.approx(page["here"]["R"], rel=1e-4)
    assert page["numbers"]["reward"] == pytest.approx(np.mean(page["states"][3]["r"]), rel=1e-4)
    assert page["numbers"]["grad_norm"] == pytest.approx(page["sweep"][2]["norm"], rel=1e-3)
    assert page["states"][3]["g"] == setup.g[0].tolist() == strip["g"]
    assert mine["R"] == pytest.approx(np.dot(mine["f"], page["states"][3]["r"]) / 3, rel=1e-5)
    assert page["here"]["R"] < -page["after"]["loss"] < page["last"]["R"]  # the step was taken, and again
    assert page["numbers"]["distance"] == 0 < page["after"]["distance"]  # anchored, as a run's
    assert [(g["i"], g["t"]) for g in page["guesses"]] == [(3, 401), (2, 201), (1, 1)]  # one for each step of the chain


def test_a_guess_takes_the_noise_out():
    """A network that knows the noise guesses the clip, at any noise level and whatever the guidance."""
    z, eps = torch.randn(2, 1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    cfg = explain.Config(tau=1., num_steps=5, guidance=3.)
    text = torch.zeros(1, 1, 1)
    knowing = SimpleNamespace(default_size=32, levels=lambda D, shape: sampler.ddim_levels(D, sampler.alpha_bars()),
                              predict=lambda z_t, level, text: ((z_t - level[2] * eps) / level[1], eps.expand(z_t.shape)))
    guesses = explain.guess_clips(knowing, z, eps, text, text, cfg)
    assert [t for t, _ in guesses] == [801, 601, 401, 201, 1]
    for _, guess in guesses:
        torch.testing.assert_close(guess, z, atol=1e-4, rtol=0)


def test_heat_maps_are_the_gradient_of_R_on_the_scored_frames(explained):
    setup, page, strip, _ = explained
    frames = setup.base.decode_frames(setup.z_0, setup.g).requires_grad_()
    (_, hps), (_, removal) = setup.rewards.summed
    r = hps(frames, setup.captions) + .1 * removal(frames, setup.captions)
    R = explain.aggregate(r, explain.tar_weights(setup.g, 16, .7))
    [gradient] = torch.autograd.grad(R.sum(), frames)
    norms = page["states"][3]["lambdas"]["0.7"]["norms"]
    assert norms == pytest.approx(gradient[0].flatten(1).norm(dim=1).tolist(), rel=1e-3)
    for picture, part in zip(strip["columns"][-2][2], gradient[0]):
        expected = pages.heat(part.norm(dim=0).numpy())
        assert np.abs(picture.astype(int) - expected).max() <= 3 and picture.max() > 240 > 20 > picture.min()


def test_panels_name_functions_and_equations_and_the_code_is_in_their_order(explained):
    text = explained[3].read_text()
    named = re.findall(r'data-function="(\w+)\.(\w+)"', text)
    assert len(named) > 15 and all(callable(getattr(importlib.import_module(module), name)) for module, name in named)
    tags = " ".join(re.findall(r'<span class="tag">([^<]*Eq[^<]*)</span>', text))
    assert {int(n) for n in re.findall(r"\d+", re.sub(r"Sec\. [\d.]+", "", tags))} >= {3, 4, 5, 6, 7, 8, 9}
    order = re.findall(r'<section class="card" id="(\w+)"', text)
    places = []
    for function, lines in explained[1]["source"]:
        module, name = function.split(".")
        source = inspect.getsource(getattr(importlib.import_module(module), name))
        assert all(line.strip() in source for line, _ in lines)
        places += [order.index(panel) for _, panel in lines if panel]
    assert places == sorted(places) and {order[i] for i in places} == set(explain.PANELS.values())
    assert order[-2:] == ["tau", "source"] and len(order) == len(set(places)) + 2


@in_a_browser
def test_the_explain_page_in_a_browser(explained, browser):
    page = explained[3]
    check_in_browser(browser, page)
    assert browser.js("[...document.querySelectorAll('pre a')].every(a => document.querySelector(a.getAttribute('href')))")
    states = data_of(page)["states"]
    # The sliders start at the step's own setting, and every value shows what was computed for it.
    assert browser.js("byId('R').textContent") == f"{states['3']['lambdas']['0.7']['R']:.4f}"
    for S in (1, 16):
        browser.js(f"byId('segments').value = SEGMENTS.indexOf('{S}'); byId('lambda').value = 0;"
                   "byId('segments').dispatchEvent(new Event('input'))")
        shown = "['#frames img.drawn', '#heats figure'].map(name => document.querySelectorAll(name).length)"
        assert browser.js(f"[byId('R').textContent, ...{shown}]") == [f"{states[str(S)]['lambdas']['0']['R']:.4f}", S, S]
    browser.js("byId('grad-steps').value = 0; byId('grad-steps').dispatchEvent(new Event('input'))")
    assert browser.js("byId('k-cosine').textContent") == "1.000" and browser.problems == []


def test_a_report_puts_largest_and_smallest_gains_first():
    a, b = write_run(Path("runs/a"), GAINS), write_run(Path("runs/b"), GAINS, lr=.5)
    assert script("report.py", "runs", ROOT / "tiny/studies/rank.json", "--out", "page") == 0  # all runs of the folder
    text = Path("page/report.html").read_text()
    assert text.index("a green square”") < text.index("Smallest gains") < text.index("a red circle moving left”")
    assert "+0.0625" in text and "rank 16" in text and text.count("<video") == 24
    # What differs between the runs, and nothing else.
    runs = [run_pages.read_run(folder) for folder in (a, b)]
    assert run_pages.changed_settings(runs) == [("lr", [2e-3, .5])]
    change = run_pages.gains(runs)["HPStiny"]["runs/a"]["things"]
    assert (change["gain"], change["error"]) == pytest.approx((.0625, np.std(GAINS, ddof=1) / 2))
    runs[0].record["told_by"] = {"things": ["a", "a", "b", "b"]}  # videos of one prompt are no independent evidence
    change = run_pages.gains(runs)["HPStiny"]["runs/a"]["things"]
    assert (change["gain"], change["error"]) == pytest.approx((.0625, .1125))


def test_a_report_says_which_adapter_is_the_best():
    watched = write_run(Path("watched"), (.1, .12, .11, .1), watch=("judge",))
    assert run_pages.read_run(watched).best() == "best.safetensors is step 10, the highest judge"
    assert run_pages.read_run(write_run(Path("plain"), GAINS)).best().endswith(", the highest reward")


def test_rewards_are_named_and_different_ones_never_taken_together():
    a, b = write_run(Path("a"), GAINS), write_run(Path("b"), (9., 9., 9., 9.), reward="removal:watermark")
    runs = [run_pages.read_run(folder) for folder in (a, b)]
    rows = run_pages.clip_rows(runs)
    assert [row["gain"] for part in rows.values() for row in part] == pytest.approx([.3, .1, -.2, .05])
    assert {measure: list(by_run) for measure, by_run in run_pages.gains(runs).items()} == {
        "HPStiny": ["a"], "removal:watermark": ["b"], "motion": ["a", "b"], "static": ["a", "b"]}
    for chart in run_pages.curves(runs):
        assert len(chart["legend"]) == 1 and chart["title"].startswith(("HPStiny, ", "removal:watermark, "))
    for clip in Path("a/samples").glob(f"*_{video_name(1, PROMPTS[1])}.mp4"):
        clip.unlink()
    captions = {title: [row["caption"] for row in part] for title, part in run_pages.clip_rows(runs).items()}
    assert captions == {"Largest gains": [PROMPTS[3]], "Smallest gains": [PROMPTS[2]], "The others": [NASTY, PROMPTS[1]]}
    assert len(run_pages.curves(runs[:1])) == 3  # the reward twice, and motion: what is the same all along is left out


@in_a_browser
def test_the_report_in_a_browser(browser):
    run, other = write_run(Path("run"), GAINS), write_run(Path("other"), GAINS, reward="other reward")
    assert script("report.py", run, other, ROOT / "tiny/studies/rank.json", "--out", ".") == 0
    page = Path("report.html")
    check_in_browser(browser, page, study=True)
    assert all(abs(red - 20 * 6) < 10 for red in browser.js(SHOWN))  # .8 seconds are frame 6, in all clips
    # A caption is text, whatever it says.
    assert browser.js("document.getElementById('injected')") is None and browser.js("document.title").startswith("Report")
    assert NASTY in browser.js("document.body.innerText") and "reward []" not in browser.js("document.body.innerText")
    # Clips that are far from the screen do not play.
    browser.open(page, 1280, 300)
    browser.js(SCROLL)
    browser.wait_for("near.size > 0 && [...near].every(video => !video.paused)")
    assert browser.js("near.size") < browser.js("document.querySelectorAll('video').length") == 24
    assert browser.js("[...document.querySelectorAll('video')].filter(video => !near.has(video)).every(video => video.paused)")


def test_a_blind_page_does_not_say_which_side_is_which_and_the_key_does():
    run = write_run(Path("secret-model"), GAINS)
    assert script("report.py", "--blind", f"{run}@0", run, "--out", "blind") == 0
    page, key = Path("blind/blind.html"), votes.read_key("blind/key.json")
    shown = data_of(page)["pairs"]
    assert "secret-model" not in page.read_text() and all(set(pair) == {"caption", "left", "right"} for pair in shown)
    for pair, on_page in zip(key["pairs"], shown):
        step = {"a": 0, "b": 20}[pair["left"]]
        assert on_page["left"] == pages.clip_uri(run / f"samples/step_{step:06d}_{pair['name']}.mp4")
    choices = {pair["caption"]: choice for pair, choice in zip(key["pairs"], votes.reward_choices(key))}
    assert choices == dict(zip(PROMPTS, "babb"))  # what the reward would have chosen


def test_sides_and_order_are_drawn_anew_and_evenly():
    pairs = [{"name": f"{i:04d}", "caption": "c", "set": "all", "reward": None} for i in range(100)]
    one, two = votes.draw_key("xy", pairs), votes.draw_key("xy", pairs)
    for name in ("left", "name"):
        assert [p[name] for p in one["pairs"]] != [p[name] for p in two["pairs"]]
    assert one["comparison"] != two["comparison"] and sum(p["left"] == "a" for p in one["pairs"]) == 50
    assert sorted(p["name"] for p in one["pairs"]) == [p["name"] for p in pairs]
    assert {sum(p["left"] == "a" for p in votes.draw_key("xy", pairs[:3])["pairs"]) for _ in range(50)} == {1, 2}


@in_a_browser
def test_voting_in_a_browser(browser):
    """Twenty prompts: keys vote, a reload keeps votes, and what is exported and counted is what was voted."""
    write_clips(Path("a"), 20, 0), write_clips(Path("b"), 20, 500)
    for name in ("in", "new"):
        Path(f"{name}.txt").write_text("a prompt\n" * 10)
    assert script("report.py", "--blind", "a", "b", "--prompts", "in=in.txt", "--prompts", "new=new.txt", "--out", "blind") == 0
    page, key = Path("blind/blind.html"), votes.read_key("blind/key.json")
    assert {p["set"] for p in key["pairs"]} == {"in", "new"} and {p["caption"] for p in key["pairs"]} == set(PROMPTS)
    check_in_browser(browser, page)
    assert browser.js("document.querySelectorAll('video').length") == browser.js("near.size") == 2  # of 40
    assert browser.js("[byId('caption').textContent, byId('injected')]") == [f"“{key['pairs'][0]['caption']}”", None]
    for i, press in enumerate(["ArrowLeft", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowRight"]):
        browser.press(press)
        browser.wait_for(f"state.at === {(i + 1) // 2}")
    browser.press("Backspace")
    assert browser.js("state.at") == 1
    browser.press("ArrowLeft")  # both questions were answered: a key changes nothing unasked
    browser.load("Page.reload")
    assert browser.js("[state.at, question, byId('done').textContent]") == [2, "alignment", "2 of 20 done"]
    browser.js("document.querySelector('[data-question=alignment] [data-side=left]').click()")
    browser.wait_for("state.at === 3")
    browser.js("byId('rater').value = 'Anna B'; byId('rater').dispatchEvent(new Event('input'))")
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(Path.cwd()))
    browser.js("byId('export').click()")
    exported = Path("votes-anna-b.json")
    chromium.wait_until(exported.exists)
    assert json.loads(exported.read_text()) == {"comparison": key["comparison"], "rater": "Anna B", "votes": [
        {"pair": 0, "quality": "left", "alignment": "right"}, {"pair": 1, "quality": "tie", "alignment": "tie"},
        {"pair": 2, "quality": "right", "alignment": "left"}]}
    assert browser.problems == []
    assert script("report.py", "--tally", exported, "--key", "blind/key.json", "--out", "count") == 0
    counted = json.loads(Path("count/tally.json").read_text())
    quality = next(r for r in counted["rows"] if (r["question"], r["set"]) == ("quality", "all"))
    chosen = [key["pairs"][0]["left"], "tie", {"a": "b", "b": "a"}[key["pairs"][2]["left"]]]
    assert {choice: share[0] for choice, share in quality["shares"].items()} == pytest.approx(
        {choice: chosen.count(choice) / 3 for choice in quality["shares"]})


def key_of(rewards):
    pairs = [{"name": "0000", "caption": "c", "set": "all", "left": "a", "reward": reward} for reward in rewards]
    return {"comparison": "x", "a": "A", "b": "B", "pairs": pairs}


def test_shares_intervals_and_kappas_are_the_textbooks():
    assert votes.wilson(0., 10) == pytest.approx((0, .2775), abs=1e-4)
    assert votes.wilson(.5, 100) == pytest.approx((.4038, .5962), abs=1e-4)
    # Cohen's kappa of 50 yes/no judgements, 20 and 15 of them alike: .4 (Wikipedia).
    pairs = ["yy"] * 20 + ["yn"] * 5 + ["ny"] * 10 + ["nn"] * 15
    assert votes.kappa([list(pair) for pair in pairs]) == pytest.approx(.4)
    # Fleiss' own form of example: 14 raters, 10 subjects, 5 categories: .210 (Wikipedia).
    counts = ["00 0 0 0 14", "0 2 6 4 2", "0 0 3 5 6", "0 3 9 2 0", "2 2 8 1 1", "7 7 0 0 0", "3 2 6 3 0", "2 5 3 2 2",
              "6 5 2 1 0", "0 2 2 3 7"]
    rows = [[c for c, n in enumerate(map(int, line.split())) for _ in range(n)] for line in counts]
    assert votes.kappa(rows) == pytest.approx(.210, abs=5e-4)
    assert votes.kappa([["a", "a"], ["a", "a"]]) is None and votes.kappa([]) is None


def test_a_prompt_counts_once_however_many_voted():
    key = key_of([{"a": 1., "b": 2.}, {"a": 2., "b": 1.}, {"a": 1., "b": 1.}, {"a": 3., "b": 1.}])
    one = {(i, q): c for i, c in enumerate("abaa") for q in votes.QUESTIONS}
    two = {(0, "quality"): "b", (1, "quality"): "b"} | {(0, "alignment"): "a"}
    result = votes.tally(key, {"one": one, "two": two})
    people = {row["question"]: row for row in result["rows"] if row["who"] == "people"}
    assert people["quality"]["shares"]["a"][0] == pytest.approx((.5 + 0 + 1 + 1) / 4) and people["quality"]["votes"] == 6
    reward = next(row for row in result["rows"] if row["who"] == "the reward")
    assert [reward["shares"][c][0] for c in ("a", "tie", "b")] == [.5, .25, .25]
    kappas = {(a["question"], a["between"]): a for a in result["agreement"]}
    assert kappas["quality", "2 raters"]["prompts"] == 2 and kappas["quality", "2 raters"]["measure"] == "Cohen's kappa"
    assert kappas["quality", "most raters and the reward"]["prompts"] == 4
    three = votes.tally(key, {"one": one, "two": one, "three": one})
    assert three["agreement"][0]["kappa"] == pytest.approx(1) and three["agreement"][0]["measure"] == "Fleiss' kappa"


@pytest.mark.parametrize("words, message", [
    ("report.py", "give either run folders"), ("report.py run --blind a b", "found runs and blind"),
    ("report.py clips", "clips: holds no run"), ("report.py norun", "run.json lacks prompts"),
    ("report.py --blind run@7 run", "no evaluation at that step; there are 0, 10"), ("report.py --blind run clips", "in both"),
    ("report.py --blind clips wide", "must be alike"), ("report.py --tally bad.json --key key.json", "one of left, tie, right"),
    ("report.py --tally broken.json --key broken.json", "not the key of a blind comparison"),
    ("report.py --tally broken.json --key key.json", "another comparison"), ("explain.py --step -1", "step = -1"),
    ("report.py --tally good.json good.json --key key.json", "each rater counts once"),
    ("explain.py --reward hpsv2 --reward action:left", "sees a clip as a whole")])
def test_bad_input_is_one_line_and_nothing_is_written(words, message, capfd, inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    before = sorted(inputs.rglob("*"))
    assert script(*words.split()) == 2
    error = capfd.readouterr().err.strip()
    assert message in error and "\n" not in error and error.startswith(words.split()[0])
    assert sorted(inputs.rglob("*")) == before


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files for the test above."""
    folder = tmp_path_factory.mktemp("inputs")
    write_run(folder / "run", GAINS)
    write_clips(folder / "clips", 2, 0)
    write_clips(folder / "wide", 2, 0, frames=7)
    (folder / "norun").mkdir()
    contents = {"norun/config.json": {}, "norun/run.json": {}, "broken.json": {}, "key.json": key_of([None, None])}
    for name, side in (("good.json", "left"), ("bad.json", "middle")):
        contents[name] = {"comparison": "x", "rater": "r", "votes": [{"pair": 0, "quality": side}]}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return folder
