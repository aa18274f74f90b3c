// The form in the browser: it draws what Python says of each field, sends what is typed, and shows what comes back.
// Nothing is checked or computed here, and every text goes in as text, never as HTML.

const PAUSE = 300; // milliseconds after the last key until what is typed is sent
const REST = 700; // milliseconds after that until the figures are asked for; while they are worked out, the kernel does nothing else

// Letters are commands of JupyterLab where the focus is not in a text (d d deletes the cell); it looks for the attribute on
// the element with the focus itself.
const FOCUSED = ["input", "select", "textarea", "button", "summary"];

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  if (FOCUSED.includes(tag)) element.setAttribute("data-lm-suppress-shortcuts", "true");
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

async function copy(area, said) {
  area.focus();
  area.select();
  let done = false;
  try {
    await navigator.clipboard.writeText(area.value);
    done = true;
  } catch {
    done = document.execCommand("copy"); // where the page isn't a secure one, or the browser refuses
  }
  said.textContent = done ? "copied" : "selected: copy it with Ctrl+C";
}

function fit(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 4, 220)}px`;
}

function makeInput(field, id) {
  const common = { id, "aria-describedby": `${id}-mark ${id}-help ${id}-problem` };
  if (field.kind === "flag") return make("input", { ...common, type: "checkbox" });
  if (field.kind === "choice") {
    return make("select", common, ...field.choices.map(([value, label]) => make("option", { value }, label)));
  }
  const list = field.suggestions.length ? `${id}-list` : null;
  const mode = field.kind === "number" ? "decimal" : null; // type=number would drop what it doesn't take
  return make("input", { ...common, type: "text", inputmode: mode, list, spellcheck: "false", autocomplete: "off" });
}

const read = (input) => (input.type === "checkbox" ? String(input.checked) : input.value);

function write(input, text) {
  if (input.type === "checkbox") input.checked = text === "true";
  else if (input.value !== text) input.value = text;
}

function drawField(field, prefix, sendSoon, flush) {
  const id = `${prefix}-${field.name}`;
  const input = makeInput(field, id);
  const label = make("label", { for: id }, field.name);
  const mark = make("span", { id: `${id}-mark`, class: "mark" }, "");
  const reset = make("button", { type: "button", class: "reset", "aria-label": `${field.name}: back to ${field.default}` });
  reset.textContent = `back to ${field.default}`;
  const words = [field.help, field.range, `default: ${field.default}`].filter(Boolean).join("; ");
  const help = make("p", { id: `${id}-help`, class: "help" }, words);
  const problem = make("p", { id: `${id}-problem`, class: "problem", "aria-live": "polite" });
  const list = field.suggestions.length
    ? make("datalist", { id: `${id}-list` }, ...field.suggestions.map((value) => make("option", { value })))
    : null;
  input.addEventListener("input", () => sendSoon(field.name, read(input)));
  input.addEventListener("change", flush);
  reset.addEventListener("click", () => {
    write(input, field.initial);
    sendSoon(field.name, field.initial);
    flush();
    input.focus();
  });
  const row = make("div", { class: "row" }, input, reset);
  const box = make("div", { class: `field ${field.kind}` }, make("div", { class: "head" }, label, mark), row, list, help, problem);
  return { field, input, mark, reset, problem, box };
}

function render({ model, el }) {
  const prefix = `sft-${Math.random().toString(36).slice(2)}`;
  const typed = {};
  let timer = null;
  let asking = null;
  const askSoon = () => {
    clearTimeout(asking);
    const wanted = model.get("state").ready && !model.get("figures").rows.length;
    if (wanted) asking = setTimeout(() => model.send({ estimate: true }), REST);
  };
  const flush = () => {
    clearTimeout(timer);
    if (!Object.keys(typed).length) return;
    model.send({ set: { ...typed } });
    for (const name of Object.keys(typed)) delete typed[name];
    askSoon();
  };
  const sendSoon = (name, text) => {
    typed[name] = text;
    clearTimeout(asking);
    clearTimeout(timer);
    timer = setTimeout(flush, PAUSE);
  };

  const fields = model.get("fields").map((field) => drawField(field, prefix, sendSoon, flush));
  const groups = [];
  for (const name of new Set(fields.map(({ field }) => field.group))) {
    const own = fields.filter(({ field }) => field.group === name);
    const count = make("span", { class: "count" });
    const grid = make("div", { class: "grid" }, ...own.map(({ box }) => box));
    const open = model.get("opened").includes(name);
    const details = make("details", { open }, make("summary", {}, `${name} `, count), grid);
    groups.push({ own, count, details });
  }

  const figures = make("dl", { class: "figures" });
  const busy = make("p", { class: "busy" });
  const start = make("button", { type: "button", class: "start", id: `${prefix}-start`, "aria-describedby": `${prefix}-why` }, "Start");
  const why = make("p", { id: `${prefix}-why`, class: "why", role: "status" });
  start.addEventListener("click", () => {
    flush();
    model.send({ start: true });
  });
  const forms = make("div", { class: "forms" });
  const place = make("p", { class: "help" });
  const areas = model.get("state").forms.map(({ name }, number) => {
    const area = make("textarea", { id: `${prefix}-form-${number}`, readonly: true, rows: "3", spellcheck: "false" });
    const said = make("span", { class: "said", role: "status" });
    const button = make("button", { type: "button", "aria-label": `copy: ${name}` }, "Copy");
    button.addEventListener("click", () => copy(area, said));
    forms.append(make("div", { class: "form" }, make("label", { for: area.id }, name), button, said, area));
    return area;
  });
  const side = make(
    "div", { class: "side" },
    make("p", { class: "title" }, "Total"), figures, busy, start, why,
    make("p", { class: "title" }, "The same configuration, to run elsewhere"), place, forms,
  );
  const main = make("div", { class: "main", role: "group", "aria-label": "options" }, ...groups.map(({ details }) => details));
  const root = make("div", { class: "sftlab-form" }, make("div", { class: "columns" }, main, side));

  const showState = () => {
    const state = model.get("state");
    for (const { field, input, mark, reset, problem } of fields) {
      const changed = state.changed.includes(field.name);
      mark.textContent = changed ? "changed" : "";
      reset.hidden = !changed;
      const words = state.problems[field.name] || "";
      if (problem.textContent !== words) problem.textContent = words; // the same words again would be read out again
      input.setAttribute("aria-invalid", String(Boolean(words)));
    }
    for (const { own, count, details } of groups) {
      const changed = own.filter(({ field }) => state.changed.includes(field.name)).length;
      const refused = own.filter(({ field }) => state.problems[field.name]).length;
      if (refused && !details.dataset.refused) details.open = true; // once: who closes it again means it
      details.dataset.refused = refused || "";
      const words = [changed && `${changed} changed`, refused && `${refused} to fix`].filter(Boolean);
      count.textContent = words.length ? `(${words.join(", ")})` : "";
    }
    start.setAttribute("aria-disabled", String(!state.ready));
    if (why.textContent !== state.why) why.textContent = state.why;
    place.textContent = state.place;
    state.forms.forEach(({ text }, number) => {
      areas[number].value = text;
      fit(areas[number]);
    });
    askSoon();
  };
  const showFigures = () => {
    const { rows, words } = model.get("figures");
    figures.replaceChildren(...rows.flatMap(({ name, value, note, bad }) => [
      make("dt", {}, name),
      make("dd", { class: bad ? "bad" : null }, make("b", {}, value), " ", make("span", { class: "help" }, note)),
    ]));
    busy.textContent = words;
    askSoon();
  };
  model.on("change:state", showState);
  model.on("change:figures", showFigures);
  for (const { field, input } of fields) write(input, model.get("state").texts[field.name]);
  showState();
  showFigures();
  el.append(root);
  const watcher = new ResizeObserver(() => areas.forEach(fit)); // a height is known when the form is on the page
  watcher.observe(side);
  return () => {
    watcher.disconnect();
    flush();
    clearTimeout(asking);
    model.off("change:state", showState);
    model.off("change:figures", showFigures);
  };
}

export default { render };
