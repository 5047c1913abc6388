// What somebody should look at; nothing is shown as long as there is nothing.
panels.push({ show: showProblems });
function showProblems() {
  const found = [
    ...(status.written_off ?? []).map((one) => [one.id, [`it could not be ended, which is tried again: ${one.reason} (`, ago(one.since_unix_s), ")"]]),
    ...(status.overdue ?? []).map((one) => [one.subject, [`${one.operation} was given up and has not ended (`, ago(one.since_unix_s), ")"]]),
    ...Object.entries(status.models).filter(([, entry]) => entry.outdated).map(([key, entry]) => [key, [`outdated: ${entry.outdated.reason}; ${entry.outdated.renewal}`]]),
    ...(status.strays ?? []).map((line) => ["left over", [line]]),
  ];
  byId("problems-section").hidden = !found.length;
  put(byId("problems"), ...found.map(([what, words]) => h("li", null, h("b", null, what), ": ", ...words)));
}
