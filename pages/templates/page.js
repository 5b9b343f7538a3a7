"use strict";
// Clips play in step: one clock, and every clip on screen shows the clock's frame. A clip's picture is decoded when it comes near
// the screen and dropped when it is far away, so a page of hundreds of clips stays light.
const CLIPS = JSON.parse(document.getElementById("clips").textContent);
const FPS = Number(document.body.dataset.fps) || 8;
const near = new Set();
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches, clock = 0, last = 0, shownFrame = -1;

function draw(canvas, frame) {
  const clip = CLIPS[canvas.dataset.clip], sheet = canvas.sheet;
  if (!sheet || !sheet.naturalWidth) return;
  const index = frame % clip.frames, w = sheet.naturalWidth / clip.columns, h = w * clip.height / clip.width;
  canvas.getContext("2d").drawImage(sheet, index % clip.columns * w, Math.floor(index / clip.columns) * h, w, h,
                                    0, 0, canvas.width, canvas.height);
  canvas.dataset.shown = index;
}

function openClip(canvas) {
  const clip = CLIPS[canvas.dataset.clip];
  canvas.width = clip.width; canvas.height = clip.height;
  canvas.sheet = new Image();
  canvas.sheet.onload = () => draw(canvas, Math.floor(clock));
  canvas.sheet.src = "data:image/webp;base64," + clip.src;
  near.add(canvas);
}

function closeClip(canvas) { canvas.sheet = null; near.delete(canvas); }

const watcher = new IntersectionObserver(entries => entries.forEach(e => {
  if (e.isIntersecting && !near.has(e.target)) openClip(e.target);
  if (!e.isIntersecting && near.has(e.target)) closeClip(e.target);
}), {rootMargin: "300px"});

function watch(root) {
  root.querySelectorAll("canvas[data-clip]").forEach(canvas => {
    const clip = CLIPS[canvas.dataset.clip];
    canvas.style.setProperty("--ratio", clip.width + "/" + clip.height);  // known before it is decoded, so nothing jumps
    canvas.classList.toggle("pixels", Math.max(clip.width, clip.height) <= 64);
    watcher.observe(canvas);
  });
}

function longest() { return CLIPS.reduce((n, clip) => Math.max(n, clip.frames), 1); }

function show(frame) {
  shownFrame = frame;
  near.forEach(c => draw(c, frame));
  const slider = document.getElementById("frame"), n = longest();
  if (!slider) return;
  slider.max = n - 1;
  slider.value = frame % n;
  document.getElementById("frame-number").textContent = "frame " + (frame % n) + " of " + n;
}

function tick(now) {
  if (playing) clock += Math.min(now - last, 250) / 1000 * FPS;
  last = now;
  if (Math.floor(clock) !== shownFrame) show(Math.floor(clock));
  requestAnimationFrame(tick);
}

function setPlaying(on) {
  playing = on;
  const button = document.getElementById("play");
  if (button) { button.textContent = on ? "❚❚ pause" : "▶ play"; button.setAttribute("aria-pressed", String(on)); }
}

const slider = document.getElementById("frame");
if (slider) {
  document.getElementById("play").onclick = () => setPlaying(!playing);
  slider.oninput = () => { setPlaying(false); clock = Number(slider.value); };
}
document.addEventListener("keydown", event => {
  if (event.key === " " && !/^(INPUT|BUTTON|TEXTAREA|SUMMARY|A)$/.test(event.target.tagName)) {
    event.preventDefault(); setPlaying(!playing);
  }
});
watch(document);
setPlaying(playing);
requestAnimationFrame(tick);
