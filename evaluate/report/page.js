// The report's script: tables that sort and filter, and the transcript browser.
"use strict";

// Create an element with properties or attributes (aria-..., role, scope) and children. String
// children become text nodes and are never parsed as HTML.
function make(tag, properties, children) {
  const element = document.createElement(tag);
  Object.entries(properties || {}).forEach(([name, value]) => {
    if (name in element) { element[name] = value; } else { element.setAttribute(name, value); }
  });
  element.append(...(children || []));
  return element;
}

function plural(number, noun) { return number + " " + noun + (number === 1 ? "" : "s"); }

// --- tables that sort and filter ---

function sortKey(row, column) {
  const text = row.cells[column].getAttribute("data-sort");
  return text !== null && text !== "" && isFinite(text) ? Number(text) : text;
}

function compare(a, b, up) {
  if (a === null || b === null) { return (a === null) - (b === null); }  // undefined sorts last
  const order = typeof a === "number" && typeof b === "number"
    ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  return up ? order : -order;
}

document.querySelectorAll("table.sorts").forEach((table) => {
  const body = table.tBodies[0];
  const headers = Array.from(table.tHead.rows[0].cells);
  const status = make("span", { role: "status" });
  headers.forEach((header, column) => {
    const name = header.textContent;
    const button = make("button", { type: "button" }, Array.from(header.childNodes));
    header.append(button);
    button.addEventListener("click", () => {
      const up = header.getAttribute("aria-sort") !== "ascending";
      headers.forEach((cell) => { cell.removeAttribute("aria-sort"); });
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...Array.from(body.rows)
        .sort((a, b) => compare(sortKey(a, column), sortKey(b, column), up)));
      status.textContent = "Sorted by " + name + (up ? ", ascending" : ", descending");
    });
  });
  const title = document.getElementById(table.getAttribute("aria-labelledby")).textContent;
  const input = make("input", { type: "search", "aria-label": "Filter rows of " + title });
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    let shown = 0;
    Array.from(body.rows).forEach((row) => {
      const cells = Array.from(row.cells, (cell) => cell.textContent.toLowerCase());
      row.hidden = !words.every((word) => cells.some((cell) => cell.includes(word)));
      shown += row.hidden ? 0 : 1;
    });
    status.textContent = shown + " of " + plural(body.rows.length, "row");
  });
  table.parentNode.before(
    make("div", { className: "tools" }, [make("label", {}, ["Filter rows ", input]), status]));
});

// --- the transcript browser; evaluate/report/transcripts.py makes its data ---

function browse(allRuns, browser) {
  const find = (name) => browser.querySelector("[data-part=" + name + "]");
  const [runs, experiments, models, search, items] =
    ["run", "experiment", "model", "search", "item"].map(find);
  const [conditions, status, table] = ["conditions", "status", "table"].map(find);
  const text = (index) => data.texts[index];
  const fill = (select, names) => select.replaceChildren(
    ...names.map((name, index) => make("option", { value: String(index) }, [name])));
  let data, experiment;

  function quote(string) { return make("span", { className: "quote", dir: "auto" }, [string]); }

  function remarks(notes) {
    return notes.map((note) => make("span", { className: "soft" }, [" [" + note + "]"]));
  }

  // Show a text, given as [its index, its length if it is cut], with notes after it.
  function quoted([index, length], notes) {
    const cut = length ? ["cut here; " + length.toLocaleString("en") + " characters in all"] : [];
    return [quote(text(index)), ...remarks(cut.concat(notes || []))];
  }

  function turn([role, index, length], last) {
    const string = text(index), sampled = string.endsWith(data.sample) && !length;
    const name = role.charAt(0).toUpperCase() + role.slice(1) + ": ";
    const shown = sampled ? [quote(string.slice(0, -data.sample.length))] : quoted([index, length]);
    const notes = sampled ? ["the model writes text here"] : [];
    if (last) { notes.push("the options are scored here"); }
    return make("p", {}, [make("strong", {}, [name]), ...shown, ...remarks(notes)]);
  }

  function question(item, condition) {
    const dialogues = item.asked[condition].map(([order, turns]) =>
      [order, turns.map((entry, index) => turn(entry, index === turns.length - 1))]);
    if (!dialogues.length) { return [make("span", { className: "soft" }, ["unknown"])]; }
    if (dialogues.length === 1) { return dialogues[0][1]; }
    return dialogues.map(([order, turns], index) => make("details", { open: index === 0 },
      [make("summary", {}, ["Options in the order " + order]), ...turns]));
  }

  function options(item, [order, , names, chances, chosen, mass]) {
    const file = order.includes(",") ? order.split(",") : Array.from(order);
    const rows = names.map((name, index) => {
      const tags = (item.tags[file[index]] || []).concat(index === chosen ? ["chosen"] : []);
      const chance = chances === null ? "undefined" : chances[index].toFixed(3);
      const bar = make("span", { className: "bar", "aria-hidden": "true" });
      bar.style.width = 4 * (chances === null ? 0 : chances[index]) + "rem";
      return make("li", { className: index === chosen ? "chosen" : "" }, [
        ...quoted(name), " ", chance, " ", bar, tags.length ? " " + tags.join(", ") : ""]);
    });
    const share = mass === null ? "undefined" : mass.toFixed(3);
    return [make("ul", { className: "options" }, rows),
      make("span", { className: "soft" }, ["probability on the options " + share])];
  }

  // Where a cell has several answers, name the order of the options and the draw of each.
  function answer(item, entry, all) {
    const [order, draw, , , , , samples, truncated] = entry;
    const differ = (position) => new Set(all.map((values) => values[position])).size > 1;
    const title = [differ(0) ? "options in the order " + order : "",
      differ(1) ? "draw " + (draw + 1) : ""].filter((part) => part).join(", ");
    const parts = title ? [make("p", { className: "soft" }, [title])] : [];
    (samples || []).forEach((sample, index) => {
      const stopped = truncated && index === samples.length - 1;
      const name = samples.length > 1 ? "Model's text " + (index + 1) + ": " : "Model's text: ";
      const note = samples.length > 1 ? "one of these was cut off at the token limit"
        : "cut off at the token limit";
      parts.push(make("p", {},
        [make("strong", {}, [name]), ...quoted(sample, stopped ? [note] : [])]));
    });
    return make("div", { className: "answer" }, parts.concat(options(item, entry)));
  }

  function show() {
    const item = experiment.items[items.value];
    table.replaceChildren();
    if (!item) { return; }
    const shown = Array.from(conditions.querySelectorAll("input"))
      .filter((box) => box.checked).map((box) => Number(box.value));
    const answers = item.answers.filter((entry) => entry[0] === Number(models.value));
    const steps = Array.from(new Set(answers.map((entry) => entry[1]))).sort((a, b) => a - b);
    const facts = item.facts.map(([name, value]) => text(name) + ": " + text(value));
    const head = (name, scope) => make("th", { scope: scope }, [name]);
    const row = (name, cell) => make("tr", {}, [head(name, "row"),
      ...shown.map((condition) => make("td", {}, cell(condition)))]);
    table.append(
      make("caption", { dir: "auto" }, [make("strong", {}, [text(item.id)]), " "
        + ["category: " + text(item.category)].concat(facts).join(" · ")]),
      make("thead", {}, [make("tr", {}, [head("Step", "col"), ...shown.map(
        (condition) => head(text(experiment.conditions[condition]), "col"))])]),
      make("tbody", {}, [row("Asked", (condition) => question(item, condition)),
        ...steps.map((step) => row(String(step), (condition) => {
          const cell = answers.filter((entry) => entry[1] === step && entry[2] === condition)
            .map((entry) => entry.slice(3));
          return cell.length ? cell.map((entry) => answer(item, entry, cell))
            : [make("span", { className: "soft" }, ["not measured"])];
        }))]));
  }

  function choose() {
    const words = search.value.toLowerCase().split(/\s+/);
    const kept = items.value;
    const matches = experiment.items.map((item, index) => [item, index]).filter(([item]) => {
      const asked = item.asked.flat().flatMap(([, turns]) => turns);
      const all = [item.id, item.category, ...item.facts.flat(), ...asked.map((entry) => entry[1])]
        .map(text).join("\n").toLowerCase();
      return words.every((word) => all.includes(word));
    });
    items.replaceChildren(...matches.map(([item, index]) => {
      const name = text(item.id), category = text(item.category);
      return make("option", { value: String(index) },
        [name.includes(category) ? name : category + ": " + name]);
    }));
    if (matches.some(([, index]) => String(index) === kept)) { items.value = kept; }
    status.textContent = search.value.trim()
      ? plural(matches.length, "item") + " of " + experiment.items.length + " found"
      : plural(matches.length, "item");
    show();
  }

  function enterExperiment() {
    experiment = data.experiments[experiments.value];
    conditions.replaceChildren(make("legend", {}, ["Conditions"]),
      ...experiment.conditions.map((name, index) => make("label", {}, [
        make("input", { type: "checkbox", checked: true, value: String(index) }), text(name)])));
    search.value = "";
    choose();
    items.selectedIndex = 0;
    show();
  }

  // Keep the experiment, model and item if the chosen run has them; otherwise show its first
  // experiment and item, and its largest model.
  function enterRun() {
    const selected = (list) => (list.selectedOptions[0] || {}).textContent;
    const select = (list, name, otherwise) => {
      const index = Array.from(list.options).findIndex((option) => option.textContent === name);
      list.selectedIndex = index < 0 ? otherwise : index;
    };
    const [title, model, item] = [experiments, models, items].map(selected);
    data = allRuns[runs.value].data;
    fill(experiments, data.experiments.map((entry) => text(entry.title)));
    fill(models, data.models.map(text));
    select(experiments, title, 0);
    select(models, model, data.models.length - 1);
    enterExperiment();
    select(items, item, 0);
    show();
  }

  function step(by) {
    const number = items.options.length;
    if (!number) { return; }
    items.selectedIndex = (items.selectedIndex + by + number) % number;
    status.textContent = "Item " + (items.selectedIndex + 1) + " of " + number + ": "
      + items.selectedOptions[0].textContent;
    show();
  }

  fill(runs, allRuns.map((entry) => entry.run));
  runs.parentNode.hidden = allRuns.length < 2;
  runs.addEventListener("change", enterRun);
  experiments.addEventListener("change", enterExperiment);
  search.addEventListener("input", choose);
  [models, items, conditions].forEach((input) => input.addEventListener("change", show));
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  enterRun();
  browser.hidden = false;
}

const transcripts = document.getElementById("transcripts-data");
if (transcripts) { browse(JSON.parse(transcripts.textContent), document.getElementById("browser")); }
