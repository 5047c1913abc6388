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
