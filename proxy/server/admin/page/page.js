"use strict";
// Everything that comes from the server goes into the page as text, never as markup.
const TIERS = ["ready", "sleeping", "suspended", "checkpointed", "archived", "stopped"];
const COMMANDS = {
  wake: { key: "w", label: "Wake", text: "An instance is brought to ready, as for a request. Where there is too little room, an idle instance of another model steps down." },
  pause: { key: "p", label: "Pause", text: "Running answers stand still until that is taken back; no stream breaks. The GPU's memory is free meanwhile, and new requests wait." },
  unpause: { key: "p", label: "Unpause", text: "Answers that stand still go on as soon as there is room." },
  suspend: { key: "s", label: "Suspend", text: "The GPU is freed; processes and host memory stay. The next request wakes it." },
  checkpoint: { key: "c", label: "Checkpoint", text: "An image on tmpfs takes the place of the processes. The next request restores it." },
  stop: { key: "x", label: "Stop", text: "The instances end, and so do the checkpoints that are theirs alone." },
  drain: { key: "d", label: "Drain", text: "New requests get 503 until you press Undrain; those that run or wait are finished." },
  undrain: { key: "d", label: "Undrain", text: "Requests are taken again." },
};
const byId = (id) => document.getElementById(id);
let status = null, clockOffsetMs = 0, token = sessionStorage.getItem("warmpool-token") || "";

// --- small things ---

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
function tellTime() {
  for (const e of document.querySelectorAll("[data-ago]")) e.textContent = agoText(Number(e.dataset.ago));
  for (const e of document.querySelectorAll("[data-until]")) e.textContent = untilText(Number(e.dataset.until));
}
function toast(text, bad) {
  const note = h("p", { class: bad ? "bad" : null }, text);
  byId("toasts").append(note);
  setTimeout(() => note.remove(), bad ? 12000 : 5000);
}
const words = (state) => state.replaceAll("_", " ");
const tierOf = (state) => (TIERS.includes(state) ? state : state === "broken" ? "broken" : state === "paused" ? "suspended" : "moving");
const plural = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;

// --- talking to the server ---

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.status === 401 || response.status === 403) {
    await askForToken(await reason(response));
    return ask(path, options);
  }
  if (!response.ok) throw new Error(await reason(response));
  return response;
}
async function reason(response) {
  try { return (await response.json()).error.message; } catch { return `the server answered ${response.status}`; }
}
let asking = null;
function askForToken(why) {
  asking ??= new Promise((done) => {
    const dialog = byId("token-dialog");
    byId("token-text").textContent = (token ? "That token is wrong: " : "") + why + " It is kept until this tab is closed.";
    byId("token").value = "";
    dialog.addEventListener("close", () => {
      token = byId("token").value.trim();
      sessionStorage.setItem("warmpool-token", token);
      asking = null;
      done();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

function patched(old, patch) {  // RFC 7386
  if (patch === null || typeof patch !== "object" || Array.isArray(patch)) return patch;
  const result = old !== null && typeof old === "object" && !Array.isArray(old) ? { ...old } : {};
  for (const [name, value] of Object.entries(patch)) {
    if (value === null) delete result[name];
    else result[name] = patched(result[name], value);
  }
  return result;
}

async function listen() {
  const leave = new AbortController();
  let silence;
  const heard = () => { clearTimeout(silence); silence = setTimeout(() => leave.abort(), 45000); };
  heard();
  try {
    const response = await ask("events", { signal: leave.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const fields = Object.fromEntries(event.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
        if (!fields.data) continue;
        const data = JSON.parse(fields.data);
        if (fields.event === "snapshot") clockOffsetMs = data.now_unix_s * 1000 - Date.now();
        status = fields.event === "snapshot" ? data : patched(status, data);
        show();
      }
    }
  } finally {
    clearTimeout(silence);
  }
}
async function follow() {
  for (let waitMs = 500; ; waitMs = Math.min(waitMs * 2, 8000)) {
    const began = Date.now();
    try { await listen(); } catch (error) { console.info(String(error)); }
    if (Date.now() - began > 5000) waitMs = 500;
    connection("not connected: trying again", "bad");
    document.body.classList.add("stale");
    await new Promise((done) => setTimeout(done, waitMs));
  }
}
function connection(text, kind) {
  const pill = byId("connection");
  if (pill.textContent !== text) pill.textContent = text;
  pill.className = `pill ${kind}`;
}

// --- commands ---

async function command(model, name) {
  const what = COMMANDS[name], entry = model === null ? null : status.models[model];
  const going = ["suspend", "checkpoint", "stop"].includes(name);
  const running = entry ? entry.instances.reduce((sum, i) => sum + i.leases, 0) + entry.queue : 0;
  byId("confirm-title").textContent = model === null ? `${what.label} the whole server?` : `${what.label} ${model}?`;
  byId("confirm-text").textContent = what.text;
  byId("confirm-yes").textContent = what.label;
  byId("confirm-busy").hidden = !(going && running);
  byId("confirm-busy-text").textContent = `${plural(running, "request")} about: take no new ones, and go after the last. Without this it is refused.`;
  byId("confirm-golden").hidden = !(name === "stop" && entry && entry.shares_checkpoint && entry.instances.some((i) => i.has_checkpoint));
  byId("confirm-by-force").hidden = name !== "stop";
  byId("confirm-wait").checked = byId("confirm-discard").checked = byId("confirm-force").checked = false;
  const dialog = byId("confirm"), focused = document.activeElement;
  dialog.returnValue = "no";
  dialog.showModal();
  byId(name === "stop" ? "confirm-no" : "confirm-yes").focus();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  focused?.focus();
  if (dialog.returnValue !== "yes") return;
  const body = { wait: false };
  if (going && byId("confirm-wait").checked) body.when_busy = "wait";
  if (byId("confirm-force").checked) body.force = true;
  if (byId("confirm-discard").checked) body.golden_checkpoint = "discard";
  const path = model === null ? name : `models/${encodeURIComponent(model)}/${name}`;
  try {
    await ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    toast(`${what.label} ${model ?? "the server"}: command given`);
  } catch (error) {
    toast(`${what.label} ${model ?? "the server"}: ${error.message}`, true);
  }
}

// --- showing ---

function show() {
  document.body.classList.remove("stale");
  connection(status.draining ? "draining" : status.ready ? "serving" : "not ready", status.ready ? "good" : "warn");
  byId("version").textContent = status.version;
  const models = Object.entries(status.models);
  const instances = models.flatMap(([, entry]) => entry.instances);
  const waiting = models.reduce((sum, [, entry]) => sum + entry.queue, 0);
  const totals = [[models.length, "models"], [instances.filter((i) => i.tier === "ready").length, "ready"], [status.leases, "running"], [waiting, "waiting"]];
  if (status.leaving?.length) totals.push([status.leaving.length, "leaving"]);  // of models that changed or went
  put(byId("totals"), ...totals.map(([count, name]) => h("div", null, h("dt", null, name), h("dd", null, String(count)))));
  const drain = byId("drain");
  drain.hidden = false;
  drain.textContent = status.draining ? "Undrain the server" : "Drain the server";
  document.title = `warmpool: ${instances.filter((i) => i.tier === "ready").length} ready, ${status.leases} running`;
  keyed(byId("models"), models, ([key]) => key, ([key]) => modelCard(key));
  showMemory();
  keyed(byId("wakes"), status.wakes.slice(0, 12), (w) => `${w.instance} ${w.at_unix_s}`, wakeRow);
  if (!status.wakes.length) put(byId("wakes"), h("p", { class: "muted" }, "None since the start."));
  showTtft();
  tellTime();
}

function modelCard(key) {
  const title = h("div", { class: "title" }), ladder = h("ol", { class: "ladder", "aria-label": "Tiers" }), facts = h("p", { class: "facts" });
  const list = h("ul", { class: "instances" }), drain = h("button", { type: "button", onclick: () => command(key, drain.dataset.command) });
  const pause = h("button", { type: "button", onclick: () => command(key, pause.dataset.command) });
  const buttons = ["wake", "suspend", "checkpoint", "stop"].map((name) =>
    h("button", { type: "button", "data-command": name, onclick: () => command(key, name) }, COMMANDS[name].label));
  const why = h("div", { class: "why-missing" }), failure = h("div", { class: "failure" });
  const logs = h("button", { type: "button", onclick: () => showLogs(key) }, "Logs");
  const card = h("article", { class: "card model", tabindex: "0", "aria-label": `Model ${key}` }, title, ladder, why, facts, failure, list, h("div", { class: "buttons" }, ...buttons, logs, drain));
  card.show = ([, entry]) => {
    card.dataset.tier = entry.tier;
    put(title, h("h3", null, key), entry.name === key ? null : h("span", { class: "name" }, entry.name), h("span", { class: "name" }, entry.runtime), entry.draining ? h("span", { class: "pill warn" }, "draining") : null);
    put(ladder, ...TIERS.filter((t) => t === "ready" || t === "stopped" || t === entry.tier || entry.tiers.includes(t) || entry.missing_tiers[t]).map((tier) => {
      const missing = entry.missing_tiers[tier];
      return h("li", { class: tier === entry.tier ? "here" : missing ? "missing" : null, title: missing || null, "aria-current": tier === entry.tier ? "step" : null }, h("span", null, tier));
    }));
    put(facts, entry.draining ? h("span", null, "new requests are ", h("b", null, "refused")) : entry.instances.some((i) => i.state === "ready") ? h("span", null, "a request is answered ", h("b", null, "at once")) : h("span", null, "a request waits about ", h("b", null, seconds(entry.estimate_s))), entry.queue ? h("span", null, h("b", null, String(entry.queue)), " waiting") : null);
    // A title shows on no phone, so the reasons are text too.
    const missing = Object.entries(entry.missing_tiers);
    put(why, missing.length ? h("details", null, h("summary", null, plural(missing.length, "tier"), " missing"), h("ul", { class: "reasons" }, ...missing.map(([tier, reason]) => h("li", null, h("b", null, tier), `: ${reason}`)))) : null);
    put(failure, failureOf(entry.last_failure));
    keyed(list, entry.instances, (i) => i.id, instanceRow);
    list.hidden = !entry.instances.length;
    drain.dataset.command = entry.draining ? "undrain" : "drain";
    drain.textContent = COMMANDS[drain.dataset.command].label;
    const paused = entry.instances.some((i) => i.state === "paused");
    pause.dataset.command = paused ? "unpause" : "pause";
    pause.textContent = COMMANDS[pause.dataset.command].label;
    if (!paused && !entry.instances.some((i) => i.can_pause)) pause.remove();
    else if (!pause.isConnected) drain.before(pause);
    pause.disabled = !paused && !entry.instances.some((i) => i.can_pause && i.leases && i.state === "ready");
    const any = (...tiers) => entry.instances.some((i) => tiers.includes(i.tier) || tierOf(i.state) === "moving");
    const has = (...tiers) => tiers.some((t) => entry.tiers.includes(t));
    const enabled = { wake: entry.tier !== "ready", suspend: any("ready", "sleeping") && has("suspended", "checkpointed"), checkpoint: any("ready", "sleeping", "suspended") && has("checkpointed"), stop: entry.instances.length > 0 };
    for (const button of buttons) button.disabled = !enabled[button.dataset.command];
  };
  return card;
}

/** Why the last wake gave no engine, and what the engine wrote last. */
function failureOf(failed) {
  if (!failed) return null;
  return h("details", null, h("summary", null, h("b", null, "did not start"), ": ", failed.reasons[failed.reasons.length - 1] ?? ""),
    h("ul", { class: "reasons" }, ...failed.reasons.map((text) => h("li", null, text))),
    failed.log_lines.length ? h("pre", { class: "log", tabindex: "0" }, failed.log_lines.join("\n")) : null);
}

const LOG_CHARACTERS = 200000;
async function showLogs(key) {
  const dialog = byId("logs"), text = byId("logs-text"), leave = new AbortController(), focused = document.activeElement;
  byId("logs-title").textContent = `What the engines of ${key} wrote`;
  text.textContent = "";
  dialog.showModal();
  dialog.addEventListener("close", () => { leave.abort(); focused?.focus(); }, { once: true });
  try {
    const response = await ask(`models/${encodeURIComponent(key)}/logs?lines=300&follow=1`, { signal: leave.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
      text.append(value);
      if (text.textContent.length > LOG_CHARACTERS) text.textContent = text.textContent.slice(-LOG_CHARACTERS / 2);
      if (atEnd) text.scrollTop = text.scrollHeight;
    }
  } catch (error) {
    if (!leave.signal.aborted) text.append(`\n${error.message}`);
  }
}

// --- requests ---

const REQUESTS_EVERY_MS = 2000;
async function showRequests() {
  if (!byId("requests-open").open || document.hidden || !status) return;
  const query = new URLSearchParams({ limit: "500" });
  for (const name of ["state", "model", "key"]) if (byId(`requests-${name}`).value) query.set(name, byId(`requests-${name}`).value);
  let rows;
  try { rows = (await (await ask(`requests?${query}`)).json()).requests; } catch (error) { return put(byId("requests"), h("p", { class: "muted" }, error.message)); }
  if (!rows.length) return put(byId("requests"), h("p", { class: "muted" }, "No request."));
  const table = byId("requests").querySelector("tbody") ?? (() => {
    const body = h("tbody");
    byId("requests").replaceChildren(h("div", { class: "card scroll" }, h("table", null, h("thead", null, h("tr", null,
      ...["state", "model", "key", "host", "found", "waited", "first token", "total", "tokens", "tokens/s", "came", ""].map((name) => h("th", { scope: "col" }, name)))), body)));
    return body;
  })();
  keyed(table, rows, (r) => `${r.id} ${r.at_unix_s}`, requestRow);
}
function requestRow() {
  const row = h("tr");
  row.show = (r) => {
    const tokens = r.completion_tokens === null && r.prompt_tokens === null ? "" : r.prompt_tokens === null ? String(r.completion_tokens) : `${r.prompt_tokens} + ${r.completion_tokens ?? 0}`;
    const cells = [r.state === "ended" ? String(r.status) : r.state, r.model, r.key ?? "", r.host ?? "", r.tier ?? "", seconds(r.wait_s), r.ttft_s === null ? "" : seconds(r.ttft_s), seconds(r.total_s), tokens, r.tokens_per_s === null ? "" : String(Math.round(r.tokens_per_s))];
    row.title = `${r.path} ${r.id}${r.broken ? `: ${r.broken}` : ""}`;
    put(row, ...cells.map((text) => h("td", null, text)), h("td", null, ago(r.at_unix_s)), h("td", null, r.state === "ended" ? null : h("button", { type: "button", "data-cancel": r.id }, "Cancel")));
  };
  return row;
}
byId("requests").addEventListener("click", async (event) => {
  const id = event.target.dataset?.cancel;
  if (!id) return;
  event.target.disabled = true;
  try {
    await ask(`requests/${encodeURIComponent(id)}/cancel`, { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" });
    toast(`Request ${id}: cancelled`);
  } catch (error) {
    toast(error.message, true);
  }
  showRequests();
});
for (const name of ["state", "model", "key"]) byId(`requests-${name}`).addEventListener("change", showRequests);
byId("requests-open").addEventListener("toggle", showRequests);
setInterval(showRequests, REQUESTS_EVERY_MS);

function instanceRow() {
  const row = h("li", { class: "instance" });
  row.show = (i) => {
    row.dataset.tier = tierOf(i.state);
    const number = (uuid) => (status.gpus || []).find((gpu) => gpu.uuid === uuid)?.index ?? uuid;
    const gpus = Object.entries(i.gpu_bytes || {}).filter(([, held]) => held).map(([uuid, held]) => `GPU ${number(uuid)}: ${bytes(held)}`).join(", ");
    put(row,
      h("code", null, i.id), h("span", { class: `state${row.dataset.tier === "moving" ? " moving" : ""}` }, words(i.state)),
      i.leases ? h("span", { class: "muted" }, plural(i.leases, "request")) : i.last_used_unix_s ? h("span", { class: "muted" }, "used ", ago(i.last_used_unix_s)) : null,
      i.commanded ? h("span", { class: "muted" }, `${i.commanded} as commanded`) : i.next_step ? h("span", { class: "muted" }, `${i.next_step.to} in `, until(i.next_step.at_unix_s)) : null,
      i.state === "paused" ? h("span", { class: "muted" }, i.on_hold ? "as commanded" : "for another model") : null,
      gpus ? h("span", { class: "muted" }, gpus) : null,
      i.has_checkpoint ? h("span", { class: "muted" }, "has a checkpoint") : null,
      i.last_wake ? h("span", { class: "muted" }, `woken from ${i.last_wake.from} in ${seconds(i.last_wake.seconds)}`) : null);
  };
  return row;
}

function meter(title, where, total, parts, text, mayFill = false) {
  const bar = h("div", { class: "meter", role: "img", "aria-label": text });
  for (const [size, kind] of parts) {
    const part = h("i", { class: kind });
    part.style.width = `${Math.max(0, Math.min(100, (100 * size) / total))}%`;
    bar.append(part);
  }
  if (mayFill === false && parts.reduce((sum, [size]) => sum + size, 0) > 0.95 * total) bar.classList.add("full");
  return h("div", { class: "card" }, h("div", { class: "split" }, h("h3", null, title), h("span", { class: "muted" }, where)), bar, h("p", { class: "muted" }, text));
}
function showMemory() {
  const { host, checkpoints, archive } = status.memory, cards = [];
  for (const gpu of status.gpus || []) {
    const ours = gpu.charged_bytes || 0, foreign = gpu.foreign_bytes || 0, rest = Math.max(0, gpu.used_bytes - ours - foreign);
    cards.push(meter(`GPU ${gpu.index}`, gpu.name, gpu.total_bytes, [[ours, ""], [rest, "second"], [foreign, "third"]],
      `${bytes(gpu.used_bytes)} of ${bytes(gpu.total_bytes)} used; ${bytes(ours)} by instances, ${bytes(foreign)} by others`, true));
  }
  if (checkpoints.total_bytes) {
    const images = checkpoints.images.reduce((sum, i) => sum + i.bytes, 0), others = Math.max(0, checkpoints.used_bytes - images);
    cards.push(meter("Checkpoints", checkpoints.path, checkpoints.total_bytes, [[others, ""], [images, "second"], [checkpoints.reserve_bytes, "third"]],
      `${bytes(images)} in ${plural(checkpoints.images.length, "image")}, ${bytes(checkpoints.free_bytes)} of ${bytes(checkpoints.total_bytes)} free, ${bytes(checkpoints.reserve_bytes)} of it kept free`));
  }
  cards.push(meter("Host", "", host.total_bytes, [[host.total_bytes - host.available_bytes, ""]], `${bytes(host.available_bytes)} of ${bytes(host.total_bytes)} free`));
  if (archive && archive.total_bytes) {
    const images = archive.images.reduce((sum, i) => sum + i.bytes, 0);
    cards.push(meter("Archive", archive.path, archive.total_bytes, [[Math.max(0, archive.used_bytes - images), ""], [images, "second"]],
      `${bytes(images)} in ${plural(archive.images.length, "image")}, ${bytes(archive.free_bytes)} free`));
  }
  put(byId("memory"), ...cards);
}

function wakeRow(wake) {
  const row = h("details", { open: status.wakes[0] === wake });
  row.show = () => {};
  const who = h("b", null, wake.instance), when = h("span", { class: "ago muted" }, ago(wake.at_unix_s));
  if (wake.failed) {
    row.append(h("summary", null, who, h("span", { class: "way muted" }, `from ${wake.found}`), h("span", { class: "took failed" }, "failed"), h("span", { class: "why failed" }, wake.failed[0] ?? ""), when),
      h("ul", { class: "reasons" }, ...wake.failed.map((text) => h("li", null, text))));
    return row;
  }
  const stages = Object.entries(wake.stages).map(([name, took]) => ({ name, took, start: wake.starts[name] ?? 0 }));
  const within = (s) => stages.some((o) => o !== s && o.took > s.took && o.start <= s.start + 1e-4 && o.start + o.took >= s.start + s.took - 1e-3);
  const stack = h("span", { class: "stack", "aria-hidden": "true" }), falls = h("dl", { class: "waterfall" });
  const end = Math.max(wake.seconds, ...stages.map((s) => s.start + s.took), 1e-6);
  for (const s of stages) {
    if (!within(s)) {
      const part = h("i", { "data-stage": s.name, title: `${words(s.name)}: ${seconds(s.took)}` });
      part.style.width = `${(100 * s.took) / end}%`;
      stack.append(part);
    }
    const bar = h("i", { "data-stage": s.name });
    bar.style.left = `${(100 * s.start) / end}%`;
    bar.style.width = `${(100 * s.took) / end}%`;
    falls.append(h("dt", null, (within(s) ? "  " : "") + words(s.name)), h("dd", { class: "lane" }, bar), h("dd", { class: "ms" }, seconds(s.took)));
  }
  const way = wake.from === wake.found ? `from ${wake.found}` : `from ${wake.from}, not ${wake.found}`;
  row.append(h("summary", null, who, h("span", { class: "way muted" }, way), h("span", { class: "took" }, seconds(wake.seconds)), stack, when), falls);
  return row;
}

function showTtft() {
  const rows = Object.entries(status.ttft).flatMap(([model, tiers]) => TIERS.filter((t) => tiers[t]).map((tier) => ({ model, tier, ...tiers[tier] })));
  if (!rows.length) return put(byId("ttft"), h("p", { class: "muted" }, "No stream since the start."));
  // A logarithmic scale from 1 ms to 200 s.
  const at = (s) => Math.max(0, Math.min(100, (100 * Math.log(Math.max(s, 1e-3) / 1e-3)) / Math.log(2e5)));
  const body = rows.map((r, index) => {
    const bar = h("i", { title: "p50 to p95" });
    bar.style.left = `${at(r.p50_s)}%`;
    bar.style.width = `${at(r.p95_s) - at(r.p50_s)}%`;
    return h("tr", { "data-tier": r.tier }, h("td", null, rows[index - 1]?.model === r.model ? "" : r.model), h("td", null, h("span", { class: "state" }, r.tier)),
      h("td", null, String(r.count)), h("td", null, seconds(r.p50_s)), h("td", null, seconds(r.p95_s)), h("td", { class: "graph" }, h("div", { class: "range" }, bar)));
  });
  put(byId("ttft"), h("div", { class: "card scroll" }, h("table", null, h("thead", null, h("tr", null,
    ...["model", "found", "requests", "p50", "p95"].map((name) => h("th", { scope: "col" }, name)), h("th", { scope: "col", class: "graph" }, "1 ms … 200 s"))), h("tbody", null, ...body))));
}

// --- theme and keyboard ---

const THEMES = { "": "as the system has it", light: "light", dark: "dark" };
function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  localStorage.setItem("warmpool-theme", theme);
  byId("theme").textContent = { "": "◐", light: "☀", dark: "☾" }[theme];
  byId("theme").setAttribute("aria-label", `Theme: ${THEMES[theme]}`);
}
function nextTheme() {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(localStorage.getItem("warmpool-theme") || "") + 1) % names.length]);
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]") || event.target.matches("input, select, pre, summary")) return;
  const cards = [...document.querySelectorAll(".model")], here = document.activeElement.closest?.(".model"), index = cards.indexOf(here);
  const step = { j: 1, k: -1 }[event.key];
  if (event.key === "?") byId("keys").showModal();
  else if (event.key === "t") nextTheme();
  else if (step) cards[Math.max(0, Math.min(cards.length - 1, index + step))]?.focus();
  else if (here) {
    const name = Object.keys(COMMANDS).find((n) => COMMANDS[n].key === event.key);
    const button = name === "drain" ? here.querySelector(".buttons button:last-child") : name && here.querySelector(`[data-command="${name}"]`);
    if (!button) return;
    button.click();
  } else return;
  event.preventDefault();
});
byId("help").addEventListener("click", () => byId("keys").showModal());
byId("theme").addEventListener("click", nextTheme);
byId("drain").addEventListener("click", () => command(null, status.draining ? "undrain" : "drain"));
byId("token-dialog").addEventListener("cancel", (event) => event.preventDefault());
const stored = localStorage.getItem("warmpool-theme");
setTheme(stored in THEMES ? stored : "");
setInterval(tellTime, 1000);
follow();
