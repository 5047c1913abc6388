"use strict";
// Everything that comes from the server goes into the page as text, never as markup.
const TIERS = ["ready", "sleeping", "suspended", "checkpointed", "archived", "stopped"];

/** Each shows a part of the status: `show` is called when it has changed, `lost` when the server is gone. */
const panels = [];
const byId = (id) => document.getElementById(id);

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Replace what is in an element, but only if it became different: focus and open details stay. */
function put(parent, ...children) {
  const fresh = h("div", null, ...children);
  if (fresh.innerHTML !== parent.innerHTML.replaceAll('<details open="">', "<details>")) parent.replaceChildren(...fresh.childNodes);
}

/** Keep one child for each item, in order; `make` gives an element with a method `show`. */
function keyed(parent, items, key, make) {
  const there = new Map([...parent.children].filter((c) => c.dataset.key !== undefined).map((c) => [c.dataset.key, c]));
  let before = null;
  for (const item of items) {
    const name = key(item);
    let child = there.get(name);
    there.delete(name);
    if (!child) {
      child = make(item);
      child.dataset.key = name;
    }
    const next = before ? before.nextSibling : parent.firstChild;
    if (next !== child) parent.insertBefore(child, next);
    child.show(item);
    before = child;
  }
  for (const child of there.values()) child.remove();
  for (const child of [...parent.children]) if (child.dataset.key === undefined) child.remove();
}

function bytes(count) {
  for (const [unit, size] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (count >= size) return `${(count / size).toPrecision(3).replace(/\.0+$/, "")} ${unit}`;
  }
  return `${count} B`;
}
const seconds = (s) => (s < 0.0995 ? `${(s * 1000).toPrecision(2).replace(/\.0$/, "")} ms` : s < 9.95 ? `${s.toFixed(2)} s` : `${Math.round(s)} s`);
const perSecond = (rate) => (rate < 9.95 ? rate.toFixed(1) : String(Math.round(rate)));
function span(s) {
  s = Math.max(0, Math.round(s));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d`;
}
const nowS = () => (Date.now() + clockOffsetMs) / 1000;
/** Text that says how long ago, or in how long, and goes on saying so. */
const agoText = (unixS) => span(nowS() - unixS) + " ago", untilText = (unixS) => span(unixS - nowS());
const ago = (unixS) => h("span", { "data-ago": unixS, title: new Date(unixS * 1000).toLocaleString() }, agoText(unixS));
const until = (unixS) => h("span", { "data-until": unixS }, untilText(unixS));
const write = (element, text) => { if (element.textContent !== text) element.textContent = text; };
function tellTime() {
  for (const e of document.querySelectorAll("[data-ago]")) write(e, agoText(Number(e.dataset.ago)));
  for (const e of document.querySelectorAll("[data-until]")) write(e, untilText(Number(e.dataset.until)));
}
function toast(text, bad) {
  const note = h("p", { class: bad ? "bad" : null }, text);
  byId("toasts").append(note);
  setTimeout(() => note.remove(), bad ? 12000 : 5000);
}
const words = (state) => state.replaceAll("_", " ");
const tierOf = (state) => (TIERS.includes(state) ? state : state === "broken" ? "broken" : state === "paused" ? "suspended" : "moving");
const plural = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;
