"""How the pages of a gallery look, the one script that they run, and the policy that lets them do no more."""

import base64
import hashlib

STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --card: #fff; --ink: #1c2024; --soft: #5b646e; --line: #dfe2e6;
  --accent: #2767a8; --track: #e4e8ed; --warn: #9a5b00; }
@media (prefers-color-scheme: dark) { :root { --page: #131619; --card: #1b1f24; --ink: #e5e8eb; --soft: #9ba5b0;
  --line: #2d333a; --accent: #79b4ee; --track: #30373f; --warn: #e0a752; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1560px; margin: 0 auto; padding: 1.25rem clamp(.75rem, 2.5vw, 2rem) 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .5rem; } h3:first-of-type { margin-top: 0; }
h1, h2, h3, td, small, li { overflow-wrap: anywhere; unicode-bidi: isolate; }
p { margin: .4rem 0; max-width: 62rem; } .soft, small, caption { color: var(--soft); }
a { color: var(--accent); text-underline-offset: .15em; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
img { image-rendering: pixelated; background: var(--track); color: var(--soft); font-size: .7rem; overflow: hidden; }
ul, ol { list-style: none; margin: 0; padding: 0; }
.count { color: var(--soft); font-weight: 400; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.1rem .35rem 0; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 400; font-size: .85rem; color: var(--soft); }
th:first-child, td:first-child, .words { text-align: left; }
td small { display: block; max-width: 24rem; } td[data-is] small { display: inline; }
.value, td[data-is], .found th { white-space: nowrap; }
.found { width: 100%; max-width: 76rem; } caption { text-align: left; padding: .6rem 0 .1rem; white-space: nowrap; }
.wide { overflow-x: auto; }
.value { font-weight: 600; } .bar { display: block; width: 8rem; height: .5rem; margin-top: .5rem; }
.bar .track { fill: var(--track); } .bar .fill { fill: var(--accent); } .bar .mark { fill: var(--ink); }
details { margin: .8rem 0; } details li { margin: .25rem 0; max-width: 62rem; }
summary { cursor: pointer; color: var(--soft); }
.note { border-left: 3px solid var(--warn); padding-left: .7rem; }
.sort { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: 0 0 .8rem; color: var(--soft); }
.sort a[aria-current] { color: var(--ink); text-decoration: none; font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .9rem; }
.card { position: relative; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .8rem .9rem; }
.card:hover, .card:focus-within { border-color: var(--accent); }
.card h3 { margin: 0; display: flex; justify-content: space-between; gap: 1rem; }
.card h3 a { color: inherit; text-decoration: none; }
.card h3 a::after { content: ""; position: absolute; inset: 0; }
.card .bar { width: 100%; margin: .5rem 0 .15rem; } .card small { display: block; }
.thumbs { display: grid; grid-template-columns: 1fr 1fr; gap: 1.1rem; margin-top: .6rem; }
.thumbs small { margin-bottom: .15rem; }
.thumbs div div { display: grid; grid-template-columns: repeat(3, 1fr); gap: .25rem; }
.thumbs img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; border-radius: 2px; }
.steps { display: flex; justify-content: space-between; gap: 1rem; }
.steps span { min-width: 6rem; } .steps span:last-child { text-align: right; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem 2.4rem; margin-top: 1.2rem; }
.sides > section { min-width: 0; } .sides h2 { margin-top: 0; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-start; }
.pictures li { display: grid; grid-auto-columns: min-content; gap: .1rem .3rem; }
.pictures small { grid-row: 2; font-size: .75rem; line-height: 1.25; max-height: 3.8em; overflow: hidden; }
.picture { all: unset; cursor: zoom-in; display: block; line-height: 0; grid-row: 1; }
.picture:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.picture img { border-radius: 2px; }
.rejected .picture:not(.near) img { outline: 2px solid var(--warn); outline-offset: 1px; }
.only-accepted .made li:not(.kept) { display: none; }
dialog { border: 1px solid var(--line); border-radius: .5rem; background: var(--card); color: var(--ink);
  padding: 1rem; max-width: 98vw; max-height: 98vh; }
dialog::backdrop { background: rgb(0 0 0 / .6); }
dialog header { display: flex; justify-content: space-between; gap: 1rem; margin-bottom: .6rem; }
dialog p { margin: 0; overflow-wrap: anywhere; } dialog button { font: inherit; align-self: start; }
dialog div { display: flex; gap: 1rem; overflow: auto; } dialog img { flex: none; }
.whole .user { display: none; } .whole .user:target { display: block; }
.whole:has(.user:target) .index { display: none; }
@media (max-width: 700px) {
  .sides { gap: .8rem; }
  .picture img { max-width: calc(50vw - 1.6rem); height: auto; }
  .pictures .picture, .pictures small { grid-row: auto; }
  .found tr:first-child { display: none; }
  .found tr { display: grid; grid-template-columns: repeat(3, auto); padding: .6rem 0;
    border-bottom: 1px solid var(--line); }
  .found td { border: 0; padding: .1rem 0; text-align: left; } .found td[data-is]::before { content: attr(data-is) " ";
    color: var(--soft); }
  .found td:first-child, .found .words, .found .place { grid-column: 1 / -1; } .found .bar { width: 100%; }
}
"""
SCRIPT = """
"use strict";
(() => {
  const all = (query) => [...document.querySelectorAll(query)];
  const keep = (key, value) => { try { sessionStorage.setItem(key, value); } catch { /* not allowed here */ } };
  const kept = (key) => { try { return sessionStorage.getItem(key) || ""; } catch { return ""; } };

  const list = document.querySelector(".cards");
  function sort() {
    const by = /^#sort=(name|lowest|highest)$/.exec(location.hash)?.[1];
    if (!list || !by) return;
    const right = (card) => Number(card.dataset.right ?? NaN), place = (card) => Number(card.dataset.place);
    const rank = { name: place, lowest: right, highest: (card) => -right(card) }[by];
    const last = (card) => Number(Number.isNaN(rank(card)));
    const compare = (a, b) => last(a) - last(b) || (last(a) ? 0 : rank(a) - rank(b)) || place(a) - place(b);
    list.append(...[...list.children].sort(compare));
    all(".sort a").forEach((link) => link.toggleAttribute("aria-current", link.hash === location.hash));
    keep("sort", location.hash);
  }
  addEventListener("hashchange", sort);
  sort();
  all("a.back").forEach((link) => { link.hash = kept("sort"); });

  const boxes = all("input.only");
  function filter(on) {
    boxes.forEach((box) => { box.checked = on; });
    document.body.classList.toggle("only-accepted", on);
    all("a.carry").forEach((link) => { link.hash = on ? "accepted" : ""; });
  }
  boxes.forEach((box) => box.addEventListener("change", () => filter(box.checked)));
  if (location.hash === "#accepted") filter(true);

  const large = document.querySelector("dialog"), [first, second] = large.querySelectorAll("img");
  let current = null;
  function fit() {
    const beside = second.hidden ? 1 : 2;
    for (const image of [first, second]) {
      const { naturalWidth: width, naturalHeight: height } = image;
      if (!width) continue;
      const room = Math.min((0.9 * innerWidth) / width / beside, (0.75 * innerHeight) / height);
      const zoom = Math.max(1, Math.floor(room));
      image.width = zoom * width;
      image.height = zoom * height;
    }
  }
  function fill(image, button) {
    image.hidden = !button;
    if (!button) return;
    image.src = button.dataset.whole || button.firstElementChild.src;
    image.alt = button.firstElementChild.alt;
  }
  function show(button) {
    current = button;
    fill(first, button);
    fill(second, button.classList.contains("near") ? null : button.parentElement.querySelector(".near"));
    large.querySelector("p").textContent = button.dataset.said;
    if (!large.open) large.showModal();
    fit();
  }
  [first, second].forEach((image) => image.addEventListener("load", fit));
  addEventListener("resize", fit);
  all("button.picture").forEach((button) => button.addEventListener("click", () => show(button)));
  large.addEventListener("click", (event) => {
    if (event.target === large || event.target.matches("button")) large.close();
  });

  addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (large.open) {
      const seen = all("button.picture").filter((button) => button.offsetParent);
      const next = seen[seen.indexOf(current) + step];
      if (next) show(next);
      event.preventDefault();
    } else {
      const rel = step < 0 ? "prev" : "next";
      all(`a[rel=${rel}]`).find((link) => link.offsetParent)?.click();
    }
  });
})();
"""


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# a script or a style that is not ours, to the letter, is neither run nor applied
POLICY = (
    f"default-src 'none'; img-src 'self' data:; style-src {_digest(STYLE)}; script-src {_digest(SCRIPT)};"
    " base-uri 'none'; form-action 'none'"
)
