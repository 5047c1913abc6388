// Talking to the server: requests with the admin token, and the status as it changes.
let status = null, connected = false, clockOffsetMs = 0, token = sessionStorage.getItem("warmpool-token") || "";

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.status === 401 && !response.headers.has("x-warmpool-instance")) {
    await askForToken(await reason(response));
    return ask(path, options);
  }
  if (!response.ok) throw new Error(await reason(response));
  return response;
}
async function reason(response) {
  try { return (await response.json()).error.message; } catch { return `The server answered with status ${response.status}.`; }
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

/** The server-sent events of an answer, each as its fields; a comment is one without. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) yield Object.fromEntries(event.split(/\r?\n/).map((line) => /^([^:]*):? ?(.*)$/s.exec(line).slice(1)));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function listen() {
  const leave = new AbortController();
  let silence;
  const heard = () => { clearTimeout(silence); silence = setTimeout(() => leave.abort(), 45000); };
  heard();
  try {
    for await (const fields of eventsOf(await ask("events", { signal: leave.signal }))) {
      heard();
      if (!fields.data) continue;
      const data = JSON.parse(fields.data);
      if (fields.event === "snapshot") clockOffsetMs = data.now_unix_s * 1000 - Date.now();
      status = fields.event === "snapshot" ? data : patched(status, data);
      show();
    }
  } finally {
    clearTimeout(silence);
  }
}
async function follow() {
  for (let waitMs = 500; ; waitMs = Math.min(waitMs * 2, 8000)) {
    const began = Date.now();
    let why = "";
    try { await listen(); } catch (error) { why = leftAlone(error) ? "" : error.message; }
    if (Date.now() - began > 5000) waitMs = 500;
    lost(why);
    await new Promise((done) => setTimeout(done, waitMs));
  }
}
const leftAlone = (error) => error.name === "AbortError";
/** What is shown is old. */
function lost(why) {
  connection("not connected: trying again", "bad");
  document.body.classList.add("stale");
  connected = false;
  const problem = byId("problem");
  problem.hidden = !why;
  if (problem.textContent !== why) problem.textContent = why;
  for (const panel of panels) panel.lost?.();
}
function connection(text, kind) {
  const pill = byId("connection");
  if (pill.textContent !== text) pill.textContent = text;
  pill.className = `pill ${kind}`;
}
