// The requests of clients.
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
