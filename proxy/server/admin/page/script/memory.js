// Memory: GPUs, host, checkpoints, archive.
function meter(title, where, total, parts, text, mayFill = false) {
  const bar = h("div", { class: "meter", role: "img", "aria-label": text });
  for (const [size, kind] of parts) {
    const part = h("i", { class: kind });
    part.style.width = `${Math.max(0, Math.min(100, (100 * size) / total))}%`;
    bar.append(part);
  }
  if (mayFill === false && parts.reduce((sum, [size]) => sum + size, 0) > 0.95 * total) bar.classList.add("full");
  return h("div", { class: "card" }, h("div", { class: "split" }, h("h3", null, title), h("span", { class: "muted" }, where)), bar, h("p", { class: "muted" }, text));
}
panels.push({ show: showMemory });
function showMemory() {
  const { host, checkpoints, archive } = status.memory, cards = [];
  for (const gpu of status.gpus || []) {
    const ours = gpu.charged_bytes || 0, foreign = gpu.foreign_bytes || 0, rest = Math.max(0, gpu.used_bytes - ours - foreign);
    cards.push(meter(`GPU ${gpu.index}`, gpu.name, gpu.total_bytes, [[ours, ""], [rest, "second"], [foreign, "third"]],
      `${bytes(gpu.used_bytes)} of ${bytes(gpu.total_bytes)} used; ${bytes(ours)} by instances, ${bytes(foreign)} by others`, true));
  }
  if (checkpoints.total_bytes) {
    const images = checkpoints.images.reduce((sum, i) => sum + i.bytes, 0), others = Math.max(0, checkpoints.used_bytes - images);
    cards.push(meter("Checkpoints", checkpoints.path, checkpoints.total_bytes, [[others, ""], [images, "second"], [checkpoints.reserve_bytes, "third"]],
      `${bytes(images)} in ${plural(checkpoints.images.length, "image")}, ${bytes(checkpoints.free_bytes)} of ${bytes(checkpoints.total_bytes)} free, ${bytes(checkpoints.reserve_bytes)} of it kept free`));
  }
  cards.push(meter("Host", "", host.total_bytes, [[host.total_bytes - host.available_bytes, ""]], `${bytes(host.available_bytes)} of ${bytes(host.total_bytes)} free`));
  if (archive && archive.total_bytes) {
    const images = archive.images.reduce((sum, i) => sum + i.bytes, 0);
    cards.push(meter("Archive", archive.path, archive.total_bytes, [[Math.max(0, archive.used_bytes - images), ""], [images, "second"]],
      `${bytes(images)} in ${plural(archive.images.length, "image")}, ${bytes(archive.free_bytes)} free`));
  }
  put(byId("memory"), ...cards);
}
