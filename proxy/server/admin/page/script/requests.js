// The requests of clients.
const REQUESTS_EVERY_MS = 2000, FIRST_REQUESTS = 100;
const COLUMNS = [["state", "text"], ["model", "text"], ["key", "text"], ["host", "text"], ["found", "text"], ["waited", null], ["first token", null], ["total", null], ["tokens in + out", null], ["tokens/s", null], ["came", null]];
async function showRequests() {
  if (!byId("requests-open").open || document.hidden || !status) return;
  const query = new URLSearchParams({ limit: String(byId("requests-all").checked ? 1000 : FIRST_REQUESTS) });
  for (const name of ["state", "model", "key"]) if (byId(`requests-${name}`).value) query.set(name, byId(`requests-${name}`).value);
  let rows;
  try { rows = (await (await ask(`requests?${query}`)).json()).requests; } catch (error) { return put(byId("requests"), h("p", { class: "muted" }, error.message)); }
  if (!rows.length) return put(byId("requests"), h("p", { class: "muted" }, "No request."));
  const table = byId("requests").querySelector("tbody") ?? (() => {
    const body = h("tbody");
    byId("requests").replaceChildren(h("div", { class: "card scroll" }, h("table", { class: "rows" }, h("thead", null, h("tr", null,
      ...COLUMNS.map(([name, kind]) => h("th", { scope: "col", class: kind }, name)), h("th", null, h("span", { class: "unseen" }, "what can be done")))), body)));
    return body;
  })();
  // Clients may give several requests the same id: the second of them is another row.
  const seen = new Map(), keys = new Map();
  for (const row of [...rows].reverse()) {
    seen.set(row.id, (seen.get(row.id) ?? 0) + 1);
    keys.set(row, `${row.id} ${seen.get(row.id)}`);
  }
  keyed(table, rows, (row) => keys.get(row), requestRow);
}
function requestRow() {
  const row = h("tr");
  row.show = (r) => {
    if (row.dataset.ended) return;  // nothing changes any more but how long ago it was, which tells itself
    if (r.state === "ended") row.dataset.ended = "yes";
    const tokens = r.completion_tokens === null && r.prompt_tokens === null ? "" : `${r.prompt_tokens ?? "?"} + ${r.completion_tokens ?? 0}`;
    const cells = [r.state === "ended" ? String(r.status) : r.state, r.broken ? h("span", null, r.model, h("span", { class: "failed" }, ` ${r.broken}`)) : r.model, r.key ?? "", r.host ?? "", r.tier ?? "", seconds(r.wait_s), r.ttft_s === null ? "" : seconds(r.ttft_s), seconds(r.total_s), tokens, r.tokens_per_s === null ? "" : perSecond(r.tokens_per_s)];
    row.title = `${r.path} ${r.id}${r.broken ? `: ${r.broken}` : ""}`;
    row.classList.toggle("bad", r.broken !== null || r.status >= 500);
    put(row, ...[...cells, ago(r.at_unix_s)].map((content, n) => h("td", { class: COLUMNS[n][1], "data-label": content === "" ? null : COLUMNS[n][0] }, content)),
      h("td", null, r.state === "ended" ? null : h("button", { type: "button", "data-cancel": r.id, "aria-label": `Cancel the request ${r.id}` }, "Cancel")));
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
for (const name of ["state", "model", "key", "all"]) byId(`requests-${name}`).addEventListener("change", showRequests);
byId("requests-open").addEventListener("toggle", showRequests);
setInterval(showRequests, REQUESTS_EVERY_MS);
