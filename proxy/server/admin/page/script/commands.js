// Commands: what each does, and the dialog that asks first.
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

/** A button that can be pressed, or says why not: its title, and a message for those who press it all the same. */
function allow(button, reason) {
  if (reason) button.setAttribute("aria-disabled", "true");
  else button.removeAttribute("aria-disabled");
  button.title = reason ?? "";
}
const refuses = (button) => button.getAttribute("aria-disabled") === "true" && (toast(button.title, true), true);

/** What the open dialog does when the status has changed. */
let whileAsking = null;
panels.push({ show: () => whileAsking?.() });

/** How many requests of a model run or wait. */
const requestsOf = (model) => {
  const entry = status.models[model];
  return entry ? entry.instances.reduce((sum, i) => sum + i.leases, 0) + entry.queue : 0;
};

async function command(model, name) {
  const what = COMMANDS[name], entry = model === null ? null : status.models[model];
  const goesDown = ["suspend", "checkpoint", "stop"].includes(name), yes = byId("confirm-yes");
  let busy = goesDown ? requestsOf(model) : 0;
  const wait = byId("confirm-wait"), force = byId("confirm-force"), discard = byId("confirm-discard");
  byId("confirm-title").textContent = model === null ? `${what.label} the whole server?` : `${what.label} ${model}?`;
  byId("confirm-text").textContent = what.text;
  byId("confirm-busy").hidden = byId("confirm-why").hidden = !busy;
  byId("confirm-why").textContent = `${plural(busy, "request")} ${busy === 1 ? "waits or runs" : "wait or run"}: choose what becomes of ${busy === 1 ? "it" : "them"}.`;
  byId("confirm-by-force").hidden = name !== "stop";
  byId("confirm-golden").hidden = !(name === "stop" && entry && entry.shares_checkpoint && entry.instances.some((i) => i.has_checkpoint));
  wait.checked = discard.checked = force.checked = false;
  const say = () => {
    const when = force.checked ? " at once" : wait.checked ? " after the last request" : "";
    yes.textContent = `${what.label}${model === null ? " the server" : ""}${when}${discard.checked ? ", delete the checkpoint" : ""}`;
    yes.disabled = busy > 0 && !wait.checked && !force.checked;
    wait.disabled = force.checked;
  };
  say();
  whileAsking = () => {  // the last one has ended: there is nothing to choose
    if (!busy || requestsOf(model)) return;
    busy = 0;
    const chosen = document.activeElement === wait || document.activeElement === force;
    byId("confirm-busy").hidden = byId("confirm-why").hidden = true;
    wait.checked = false;
    say();
    if (chosen) (name === "stop" ? byId("confirm-no") : yes).focus();
  };
  const dialog = byId("confirm"), focused = document.activeElement;
  dialog.addEventListener("change", say);
  dialog.returnValue = "no";
  dialog.showModal();
  (yes.disabled ? wait : name === "stop" ? byId("confirm-no") : yes).focus();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  dialog.removeEventListener("change", say);
  whileAsking = null;
  focused?.focus();
  if (dialog.returnValue !== "yes") return;
  const body = { wait: false };
  if (goesDown && wait.checked) body.when_busy = "wait";
  if (force.checked) body.force = true;
  if (discard.checked) body.golden_checkpoint = "discard";
  const path = model === null ? name : `models/${encodeURIComponent(model)}/${name}`;
  try {
    await ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    toast(`${what.label} ${model ?? "the server"}: command given`);
  } catch (error) {
    toast(`${what.label} ${model ?? "the server"}: ${error.message}`, true);
  }
}
