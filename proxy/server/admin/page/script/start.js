// What is shown when the status has changed; theme and keyboard; the start.
function show() {
  connected = true;
  document.body.classList.remove("stale");
  byId("problem").hidden = true;
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
  for (const panel of panels) panel.show();
  tellTime();
}

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
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]") || event.target.matches("input, select, textarea, pre, summary")) return;
  const cards = [...document.querySelectorAll(".model:not([hidden])")], here = document.activeElement.closest?.(".model"), index = cards.indexOf(here);
  const step = { j: 1, k: -1 }[event.key];
  if (event.key === "?") byId("keys").showModal();
  else if (event.key === "t") nextTheme();
  else if (event.key === "a") openChat(here?.dataset.key);
  else if (event.key === "/" && !byId("find").hidden) byId("find-name").focus();
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
