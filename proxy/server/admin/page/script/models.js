// The models, each with its instances.
const MANY_MODELS = 8;
let gpuNumbers = "";
panels.push({ show: showModels });
function showModels() {
  const models = Object.entries(status.models);
  gpuNumbers = (status.gpus || []).map((gpu) => `${gpu.index}=${gpu.uuid}`).join();
  byId("find").hidden = models.length <= MANY_MODELS;
  keyed(byId("models"), models, ([key]) => key, ([key]) => modelCard(key));
  if (!models.length) put(byId("models"), h("p", { class: "muted" }, "No model is configured."));
  else filterModels();
}
/** Show those models only that were asked for. */
function filterModels() {
  const text = byId("find-name").value.trim().toLowerCase(), tier = byId("find-tier").value;
  let shown = 0;
  for (const card of byId("models").querySelectorAll(".model")) {
    const [key, entry] = card.item, names = [key, entry.name, ...entry.aliases];
    const fits = (!tier || entry.tier === tier) && (!text || names.some((name) => name.toLowerCase().includes(text)));
    if (card.hidden === fits) card.hidden = !fits;
    shown += fits;
  }
  const total = Object.keys(status.models).length;
  write(byId("find-count"), text || tier ? `${shown} of ${total}` : plural(total, "model"));
}
byId("find-name").addEventListener("input", filterModels);
byId("find-tier").addEventListener("change", filterModels);

/** Why a command would do nothing; null: it would. */
function whyNot(entry) {
  const at = (...tiers) => entry.instances.some((i) => tiers.includes(i.tier) || tierOf(i.state) === "moving");
  const has = (...tiers) => tiers.some((t) => entry.tiers.includes(t));
  const missing = (tier) => `This model has no tier ${tier}${entry.missing_tiers[tier] ? `: ${entry.missing_tiers[tier]}` : "."}`;
  const none = entry.instances.length ? null : "There is no instance.";
  return {
    wake: entry.tier === "ready" ? "An instance is ready." : null,
    suspend: !has("suspended", "checkpointed") ? missing("suspended") : none ?? (at("ready", "sleeping") ? null : "Its instances are suspended, or colder."),
    checkpoint: !has("checkpointed") ? missing("checkpointed") : none ?? (at("ready", "sleeping", "suspended") ? null : "Its instances are checkpointed, or colder."),
    stop: none,
    pause: entry.instances.some((i) => i.can_pause && i.leases && i.state === "ready") ? null : "No request runs.",
    unpause: null,
    chat: entry.chats ? null : "This model offers no chat.",
  };
}

function modelCard(key) {
  const title = h("div", { class: "title" }), ladder = h("ol", { class: "ladder", "aria-label": "Tiers" }), facts = h("p", { class: "facts" });
  const press = (button) => refuses(button) || command(key, button.dataset.command);
  const make = (name) => h("button", { type: "button", "data-command": name, onclick: (event) => press(event.currentTarget) }, COMMANDS[name].label);
  const list = h("ul", { class: "instances" }), drain = make("drain"), pause = make("pause"), buttons = ["wake", "suspend", "checkpoint", "stop"].map(make);
  const why = h("div", { class: "why-missing" }), failure = h("div", { class: "failure" });
  const logs = h("button", { type: "button", onclick: () => showLogs(key) }, "Logs");
  const talk = h("button", { type: "button", class: "talk", onclick: () => refuses(talk) || openChat(key) }, "Try it");
  const card = h("article", { class: "card model", tabindex: "0", "aria-label": `Model ${key}` }, title, ladder, why, facts, failure, list, h("div", { class: "buttons" }, ...buttons, talk, logs, drain));
  let shownGpus = null;
  card.show = (item) => {
    const [, entry] = item;
    if (card.item?.[1] === entry && shownGpus === gpuNumbers) return;  // a change copies what it changes only
    card.item = item;
    shownGpus = gpuNumbers;
    card.dataset.tier = entry.tier;
    put(title, h("h3", null, key), entry.name === key ? null : h("span", { class: "name" }, entry.name), h("span", { class: "name" }, entry.runtime), entry.draining ? h("span", { class: "pill warn" }, "draining") : null);
    put(ladder, ...TIERS.filter((t) => t === "ready" || t === "stopped" || t === entry.tier || entry.tiers.includes(t) || entry.missing_tiers[t]).map((tier) => {
      const missing = entry.missing_tiers[tier];
      return h("li", { class: tier === entry.tier ? "here" : missing ? "missing" : null, title: missing || null, "aria-current": tier === entry.tier ? "step" : null }, h("span", null, tier));
    }));
    put(facts, entry.draining ? h("span", null, "new requests are ", h("b", null, "refused")) : entry.instances.some((i) => i.state === "ready") ? h("span", null, "a request is answered ", h("b", null, "at once")) : h("span", null, "a request waits about ", h("b", null, seconds(entry.estimate_s))), entry.queue ? h("span", null, h("b", null, String(entry.queue)), " waiting") : null,
      entry.backs_off_s ? h("span", { class: "failed" }, "nothing is started for ", h("b", null, seconds(entry.backs_off_s)), " after a failed wake") : null);
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
    const reasons = whyNot(entry);
    for (const button of [...buttons, pause]) allow(button, reasons[button.dataset.command]);
    allow(talk, reasons.chat);
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
