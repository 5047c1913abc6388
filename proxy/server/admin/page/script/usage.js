// What keys and models have used today.
const USAGE_EVERY_MS = 10000;
const USED = [["key", "text"], ["model", "text"], ["requests", null], ["prompt", null], ["cached", null], ["answer", null], ["GPU", null], ["idle", null]];
const spent = (s) => (s < 0.05 ? "0" : s < 99.95 ? `${s.toFixed(1)} s` : s < 7200 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`);
async function showUsage() {
  if (!byId("usage-open").open || document.hidden || !status) return;
  let found;
  try { found = await (await ask("usage")).json(); } catch (error) { return put(byId("usage"), h("p", { class: "muted" }, error.message)); }
  const rows = found.rows.filter((r) => r.requests || r.gpu_seconds || r.idle_gpu_seconds).sort((a, b) => b.gpu_seconds - a.gpu_seconds || b.requests - a.requests);
  const budgets = Object.entries(found.budgets).map(([key, b]) => h("p", { class: "muted" }, h("b", null, key), ": ", [
    b.tokens_per_day === null ? null : `${b.tokens_today} of ${plural(b.tokens_per_day, "token")}`,
    b.gpu_seconds_per_day === null ? null : `${spent(b.gpu_seconds_today)} of ${spent(b.gpu_seconds_per_day)} of GPU time`].filter(Boolean).join(", "), " ",
    (b.tokens_per_day !== null && b.tokens_today >= b.tokens_per_day) || (b.gpu_seconds_per_day !== null && b.gpu_seconds_today >= b.gpu_seconds_per_day)
      ? h("span", { class: "pill warn" }, `used up, for ${span(found.next_day_in_s)}`) : null));
  put(byId("usage"),
    rows.length ? h("div", { class: "card scroll" }, h("table", { class: "rows" }, h("thead", null, h("tr", null, ...USED.map(([name, kind]) => h("th", { scope: "col", class: kind }, name)))),
      h("tbody", null, ...rows.map((r) => h("tr", null, ...[r.key ?? "(no key)", r.model, String(r.requests), String(r.prompt_tokens), String(r.cached_tokens), String(r.completion_tokens), spent(r.gpu_seconds), spent(r.idle_gpu_seconds)]
        .map((text, n) => h("td", { class: USED[n][1], "data-label": USED[n][0] }, text))))))) : h("p", { class: "muted" }, "Nothing was used today."),
    budgets.length ? h("div", { class: "budgets" }, ...budgets) : null);
}
byId("usage-open").addEventListener("toggle", showUsage);
setInterval(showUsage, USAGE_EVERY_MS);
