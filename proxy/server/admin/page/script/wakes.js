// The last wakes, stage by stage, and the time to the first token.
const stagesOf = (wake) => Object.entries(wake.stages).map(([name, took]) => ({ name, took, start: wake.starts[name] ?? 0 }));
const endOf = (stages, whole) => Math.max(whole, ...stages.map((s) => s.start + s.took), 1e-6);
const within = (s, stages) => stages.some((o) => o !== s && o.took > s.took && o.start <= s.start + 1e-4 && o.start + o.took >= s.start + s.took - 1e-3);

/** A bar for each stage: when it began, and how long it took of `whole` seconds, or has taken so far. */
function waterfall(stages, whole) {
  const falls = h("dl", { class: "waterfall" }), end = endOf(stages, whole);
  for (const s of stages) {
    const bar = h("i", { "data-stage": s.name, class: s.goesOn ? "moving" : null });
    bar.style.left = `${(100 * s.start) / end}%`;
    bar.style.width = `${(100 * s.took) / end}%`;
    falls.append(h("dt", { class: within(s, stages) ? "inner" : null }, words(s.name)), h("dd", { class: "lane" }, bar), h("dd", { class: "ms" }, seconds(s.took)));
  }
  return falls;
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
  const stages = stagesOf(wake), stack = h("span", { class: "stack", "aria-hidden": "true" }), end = endOf(stages, wake.seconds);
  for (const s of stages) {
    if (within(s, stages)) continue;
    const part = h("i", { "data-stage": s.name, title: `${words(s.name)}: ${seconds(s.took)}` });
    part.style.width = `${(100 * s.took) / end}%`;
    stack.append(part);
  }
  const way = wake.from === wake.found ? `from ${wake.found}` : `from ${wake.from}, not ${wake.found}`;
  row.append(h("summary", null, who, h("span", { class: "way muted" }, way), h("span", { class: "took" }, seconds(wake.seconds)), stack, when), waterfall(stages, wake.seconds));
  return row;
}

panels.push({ show: showWakes }, { show: showTtft });
function showWakes() {
  keyed(byId("wakes"), status.wakes.slice(0, 12), (w) => `${w.instance} ${w.at_unix_s}`, wakeRow);
  if (!status.wakes.length) put(byId("wakes"), h("p", { class: "muted" }, "None since the start."));
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
