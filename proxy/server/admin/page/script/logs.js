// What engines wrote.
const LOG_CHARACTERS = 200000;
async function showLogs(key) {
  const dialog = byId("logs"), text = byId("logs-text"), leave = new AbortController(), focused = document.activeElement;
  byId("logs-title").textContent = `What the engines of ${key} wrote`;
  text.textContent = "";
  dialog.showModal();
  dialog.addEventListener("close", () => { leave.abort(); focused?.focus(); }, { once: true });
  try {
    const response = await ask(`models/${encodeURIComponent(key)}/logs?lines=300&follow=1`, { signal: leave.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
      text.append(value);
      if (text.textContent.length > LOG_CHARACTERS) text.textContent = text.textContent.slice(-LOG_CHARACTERS / 2);
      if (atEnd) text.scrollTop = text.scrollHeight;
    }
  } catch (error) {
    if (!leave.signal.aborted) text.append(`\n${error.message}`);
  }
}
