// Try it: a conversation with a model, kept in this page only.
const chat = { turns: [], running: null, model: null };
const chatLog = byId("chat-log"), chatInput = byId("chat-input"), chatModel = byId("chat-model");
panels.push({ show: showChat, lost: showChat });

function showChat() {
  const options = Object.entries(status?.models ?? {});
  if (document.activeElement !== chatModel || chatModel.options.length !== options.length) {  // open, it would close
    keyed(chatModel, options, ([key]) => key, ([key]) => {
      const option = h("option", { value: key });
      option.show = ([, entry]) => {
        write(option, entry.chats ? `${key} (${entry.tier})` : `${key} (does not chat)`);
        option.disabled = !entry.chats;
      };
      return option;
    });
    if (!status?.models[chat.model]?.chats) chat.model = options.find(([, entry]) => entry.chats)?.[0] ?? null;
    if (chat.model !== null) chatModel.value = chat.model;
  }
  const entry = status?.models[chat.model], tier = byId("chat-tier");
  tier.hidden = !entry;
  if (entry) {
    const moving = entry.instances.find((i) => tierOf(i.state) === "moving");
    tier.dataset.tier = moving && entry.tier !== "ready" ? "moving" : entry.tier;
    write(tier, moving && entry.tier !== "ready" ? words(moving.state) : entry.tier);
  }
  const why = whyNoChat(entry);
  byId("chat-refusal").hidden = !why;
  write(byId("chat-refusal"), why ?? "");
  byId("chat-send").disabled = Boolean(why) || chat.running !== null;
  byId("chat-stop").disabled = chat.running === null;
  byId("chat-clear").disabled = !chat.turns.length;
  chat.running?.show();
  chat.turns.filter((turn) => turn.wakeWanted).forEach((turn) => turn.takeRecord());
}
function whyNoChat(entry) {
  if (!connected) return status ? "The server cannot be reached." : "Waiting for the server.";
  if (status.chat_refusal) return status.chat_refusal;
  if (status.draining) return "The server is drained: it takes no new requests.";
  if (!entry) return Object.keys(status.models).length ? "No model here offers chat." : "There is no model.";
  return entry.draining ? "This model is drained: it takes no new requests." : null;
}

function openChat(key) {
  if (key !== undefined && status.models[key]?.chats) {
    chat.model = key;
    chatModel.value = key;
  }
  byId("chat").hidden = false;
  showChat();
  byId("chat").scrollIntoView({ block: "nearest" });
  chatInput.focus();
}
function closeChat() {
  byId("chat").hidden = true;
  byId("try").focus();
}

/** A question and its answer: what is shown of it, and what it was. */
class Turn {
  constructor(key, question) {
    this.key = key;
    this.question = question;
    this.answer = "";
    this.found = status.models[key].tier;
    this.sentAt = performance.now();
    this.sentUnixS = nowS();
    this.firstAt = this.lastAt = this.endedAt = this.id = this.instance = this.usage = this.record = this.measured = null;
    this.pieces = 0;
    this.wakeWanted = this.found !== "ready";
    this.leave = new AbortController();
    this.wake = h("div", { class: "turn-wake" });
    this.thoughts = document.createTextNode("");
    this.thinking = h("details", { class: "thinking", hidden: true }, h("summary", null, "reasoning"), h("p", { class: "said" }, this.thoughts));
    this.text = document.createTextNode("");
    this.facts = h("p", { class: "facts" });
    this.error = h("p", { class: "failed", role: "alert", hidden: true });
    this.said = h("p", { class: "said", hidden: true }, this.text);
    this.element = h("article", { class: "turn", "aria-busy": "true" },
      h("p", { class: "said question" }, question), h("p", { class: "who" }, key), this.wake, this.thinking, this.said, this.error, this.facts);
  }

  add(text, to) {
    if (!text) return;
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
    this.pieces++;
    const atEnd = chatLog.scrollHeight - chatLog.scrollTop - chatLog.clientHeight < 40;
    to.appendData(text);
    if (to === this.text) {
      this.said.hidden = false;
      this.answer += text;
    } else this.thinking.hidden = false;
    if (atEnd) chatLog.scrollTop = chatLog.scrollHeight;
  }

  /** What the answer's head says: which tier was found, and who answers. */
  begins(headers) {
    this.id = headers.get("x-request-id");
    this.found = headers.get("x-warmpool-tier") ?? this.found;
    this.instance = headers.get("x-warmpool-instance");
    this.wakeWanted = this.found !== "ready";
    const other = headers.get("x-warmpool-fallback");
    if (other) this.element.querySelector(".who").textContent = `${other}, instead of ${this.key}`;
  }

  fail(message) {
    this.error.hidden = false;
    this.error.textContent = message;
    chatLog.scrollTop = chatLog.scrollHeight;
  }

  end() {
    this.endedAt = performance.now();
    this.element.removeAttribute("aria-busy");
    this.wakeWanted &&= this.firstAt !== null;
    this.takeRecord();
    this.show();
  }

  /** What the server has measured, which knows nothing of how busy this page is. */
  async measure() {
    if (this.id === null || this.firstAt === null) return;
    const { requests } = await (await ask(`requests?${new URLSearchParams({ id: this.id, state: "ended", limit: "1" })}`)).json();
    this.measured = requests[0] ?? null;
    this.show();
  }

  /** The whole wake, once the status has it. */
  takeRecord() {
    const mine = (wake) => !wake.failed && wake.model === this.key && wake.at_unix_s >= this.sentUnixS - 1 && (this.instance === null || wake.instance === this.instance);
    this.record ??= (this.firstAt !== null && status.wakes.find(mine)) || null;
    if (this.record) this.wakeWanted = false;
    if (this.record || this.endedAt !== null) this.show();
  }

  show() {
    const now = performance.now(), since = (at) => (at - this.sentAt) / 1000;
    if (this.record) put(this.wake, waterfall(stagesOf(this.record), this.record.seconds));
    else if (this.firstAt === null && this.endedAt === null) put(this.wake, ...this.progress());
    else if (!this.wakeWanted || !this.wake.querySelector(".waterfall")) put(this.wake);
    const facts = [["found", this.found]], m = this.measured, tokens = this.usage?.completion_tokens ?? (this.pieces || null);
    const wait = m?.wait_s, first = m?.ttft_s ?? (this.firstAt === null ? null : since(this.firstAt));
    const rate = m?.tokens_per_s ?? (tokens > 1 && this.lastAt > this.firstAt ? (1000 * (tokens - 1)) / (this.lastAt - this.firstAt) : null);
    if (wait) facts.push(["waited", seconds(wait)]);
    if (first !== null) facts.push(["first token", seconds(first)]);
    else if (this.endedAt === null) facts.push(["waiting", seconds(since(now))]);
    if (tokens !== null) facts.push(["tokens", String(tokens)]);
    if (rate !== null) facts.push(["tokens/s", perSecond(rate)]);
    if (this.endedAt !== null) facts.push(["total", seconds(m?.total_s ?? since(this.endedAt))]);
    put(this.facts, ...facts.map(([name, value]) => h("span", null, `${name} `, h("b", null, value))));
  }

  /** The wake as it happens, of the instance that is nearest to being ready. */
  progress() {
    const entry = status.models[this.key], waking = entry?.instances.find((i) => i.waking)?.waking;
    if (!waking) return [h("p", { class: "muted" }, entry?.tier === "ready" ? "Waiting for the answer." : "Waiting for an instance.")];
    const whole = Math.max(nowS() - waking.began_unix_s, 1e-3);
    const stages = waking.stages.map((s) => ({ name: s.stage, start: s.start_s, took: s.seconds ?? Math.max(0, whole - s.start_s), goesOn: s.seconds === null }));
    return [...waking.failed.map((text) => h("p", { class: "failed" }, text)), waterfall(stages, whole)];
  }
}

/** Send what was typed. */
async function sendChat() {
  const question = chatInput.value.trim();
  if (!question || byId("chat-send").disabled) return;
  const key = chat.model, turn = new Turn(key, question);
  // What failed is left out: it has no answer that a model could go on from.
  const messages = chat.turns.filter((t) => t.answer).flatMap((t) => [{ role: "user", content: t.question }, { role: "assistant", content: t.answer }]);
  messages.push({ role: "user", content: question });
  chat.turns.push(turn);
  chat.running = turn;
  chatInput.value = "";
  chatLog.hidden = false;
  chatLog.append(turn.element);
  showChat();
  chatLog.scrollTop = chatLog.scrollHeight;
  try {
    await answerTo(turn, { model: status.models[key].name, messages, stream: true, stream_options: { include_usage: true } });
  } catch (error) {
    turn.fail(leftAlone(error) ? "Stopped." : error instanceof TypeError ? "The connection broke: this is not the whole answer." : error.message);
  }
  if (chat.running === turn) chat.running = null;
  turn.end();
  showChat();
  turn.measure().catch(() => {});  // what this page has measured stays
  if (!turn.answer && turn.element.isConnected && !chatInput.value) chatInput.value = question;
}

/** Show an answer as it comes. Throws what went wrong. */
async function answerTo(turn, body) {
  const response = await ask("chat/completions", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: turn.leave.signal });
  turn.begins(response.headers);
  let complete = false;
  for await (const { data } of eventsOf(response)) {
    if (!data) continue;
    if (data === "[DONE]") {
      complete = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message ?? String(chunk.error));
    const delta = chunk.choices?.[0]?.delta ?? {};
    turn.add(delta.reasoning_content ?? delta.reasoning, turn.thoughts);
    turn.add(delta.content, turn.text);
    turn.usage = chunk.usage ?? turn.usage;
    complete ||= Boolean(chunk.choices?.[0]?.finish_reason);
  }
  if (!complete) throw new Error("The answer ended early: this is not all of it.");
}

byId("try").addEventListener("click", () => (byId("chat").hidden ? openChat() : closeChat()));
byId("chat-close").addEventListener("click", closeChat);
byId("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sendChat();
});
chatInput.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    sendChat();
  } else if (event.key === "Escape" && chat.running) chat.running.leave.abort();
});
chatModel.addEventListener("change", () => {
  chat.model = chatModel.value;
  showChat();
});
byId("chat-stop").addEventListener("click", () => {
  chat.running?.leave.abort();
  chatInput.focus();
});
byId("chat-clear").addEventListener("click", () => {
  chat.running?.leave.abort();
  chat.running = null;
  chat.turns = [];
  chatLog.replaceChildren();
  chatLog.hidden = true;
  showChat();
  chatInput.focus();
});
// A clock for what goes on.
setInterval(() => chat.running?.show(), 100);
