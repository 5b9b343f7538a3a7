"use strict";
// Clips play in step. The browser plays and loops them; `now` is where the longest one stands, in seconds, and one that is elsewhere
// is moved there. Clips far from the screen rest, so a page of hundreds stays light.
const near = new Set();
const slider = document.getElementById("time");
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches, now = 0;

const watcher = new IntersectionObserver(entries => entries.forEach(({target, isIntersecting}) => {
  if (isIntersecting) { target.preload = "auto"; near.add(target); }
  else { target.pause(); near.delete(target); }
}), {rootMargin: "300px"});

function watch(root) { root.querySelectorAll("video").forEach(video => watcher.observe(video)); }

function follow(video) {
  const wanted = now % video.duration, away = Math.abs(video.currentTime - wanted);
  const apart = playing ? Math.min(away, video.duration - away) : away;  // while it loops, the end is beside the start
  if (!video.seeking && apart > (playing ? .08 : .001)) video.currentTime = wanted;
  if (playing && video.paused) video.play().catch(() => {});  // refused where a device saves power; the slider still works
  if (!playing && !video.paused) video.pause();
}

function tick() {
  const ready = [...near].filter(video => video.readyState > 0);
  if (ready.length) {
    const longest = ready.reduce((a, b) => b.duration > a.duration ? b : a);
    if (playing && !longest.paused) now = longest.currentTime;
    ready.forEach(follow);
    slider.max = longest.duration - .01;
    slider.value = now;
    document.getElementById("time-words").textContent = now.toFixed(1) + " of " + longest.duration.toFixed(1) + " s";
  }
  requestAnimationFrame(tick);
}

function setPlaying(on) {
  playing = on;
  document.getElementById("play").textContent = on ? "❚❚ pause" : "▶ play";
}

document.getElementById("play").onclick = () => setPlaying(!playing);
slider.oninput = () => { setPlaying(false); now = Number(slider.value); };
document.addEventListener("keydown", event => {
  if (event.key === " " && !/^(INPUT|BUTTON|TEXTAREA|SUMMARY|A)$/.test(event.target.tagName)) {
    event.preventDefault(); setPlaying(!playing);
  }
});
watch(document);
setPlaying(playing);
requestAnimationFrame(tick);
