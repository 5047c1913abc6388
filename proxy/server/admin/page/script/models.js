// The models, each with its instances.
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
