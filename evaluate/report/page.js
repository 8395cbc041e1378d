// The report's script: tables that sort and filter, and the browser of transcripts.
"use strict";

// An element with properties, attributes (aria-..., role, scope) and children. Text stays text.
function make(tag, properties, children) {
  const made = document.createElement(tag);
  Object.entries(properties || {}).forEach(([name, value]) => {
    if (name in made) { made[name] = value; } else { made.setAttribute(name, value); }
  });
  made.append(...(children || []));
  return made;
}

function plural(number, noun) { return number + " " + noun + (number === 1 ? "" : "s"); }

// --- tables that sort and filter ---

function sortKey(row, column) {
  const text = row.cells[column].getAttribute("data-sort");
  return text !== null && text !== "" && isFinite(text) ? Number(text) : text;
}

function compare(a, b, up) {
  if (a === null || b === null) { return (a === null) - (b === null); }  // undefined comes last
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
      headers.forEach((other) => { other.removeAttribute("aria-sort"); });
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...Array.from(body.rows)
        .sort((one, other) => compare(sortKey(one, column), sortKey(other, column), up)));
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

// --- the browser of transcripts ---

function browse(all, place) {
  const find = (name) => place.querySelector("[data-part=" + name + "]");
  const [runs, experiments, models, search, items] =
    ["run", "experiment", "model", "search", "item"].map(find);
  const [conditions, status, table] = ["conditions", "status", "table"].map(find);
  const text = (index) => data.texts[index];
  const fill = (select, names) => select.replaceChildren(
    ...names.map((name, index) => make("option", { value: String(index) }, [name])));
  let data, experiment;

  // A text as [its place, its full length where it is cut].
  function said([index, length], after) {
    const shown = make("span", { className: "said", dir: "auto" }, [text(index)]);
    const notes = length ? ["cut here; " + length.toLocaleString("en") + " characters in all"] : [];
    return [shown, ...notes.concat(after || []).map(
      (note) => make("span", { className: "soft" }, [" [" + note + "]"]))];
  }

  function turn([role, index, length], last) {
    const whole = text(index), open = whole.endsWith(data.sample) && !length;
    const name = role.charAt(0).toUpperCase() + role.slice(1) + ": ";
    const shown = open ? [make("span", { className: "said", dir: "auto" },
      [whole.slice(0, -data.sample.length)])] : said([index, length]);
    const notes = open ? ["here the model writes its own text"] : [];
    if (last) { notes.push("here the options are scored"); }
    return make("p", {}, [make("strong", {}, [name]), ...shown, ...notes.map(
      (note) => make("span", { className: "soft" }, [" [" + note + "]"]))]);
  }

  function question(item, condition) {
    const dialogues = item.asked[condition].map(([order, turns]) =>
      [order, turns.map((one, index) => turn(one, index === turns.length - 1))]);
    if (!dialogues.length) { return [make("span", { className: "soft" }, ["not known"])]; }
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
        ...said(name), " ", chance, " ", bar, tags.length ? " " + tags.join(", ") : ""]);
    });
    const share = mass === null ? "undefined" : mass.toFixed(3);
    return [make("ul", { className: "options" }, rows),
      make("span", { className: "soft" }, ["mass on the options " + share])];
  }

  // Of several answers in a cell each says what sets it apart: its order, its draw.
  function answer(item, entry, all) {
    const [order, draw, , , , , samples, truncated] = entry;
    const apart = (place) => new Set(all.map((one) => one[place])).size > 1;
    const which = [apart(0) ? "options in the order " + order : "",
      apart(1) ? "draw " + (draw + 1) : ""].filter((one) => one).join(", ");
    const parts = which ? [make("p", { className: "soft" }, [which])] : [];
    (samples || []).forEach((sample, index) => {
      const stopped = truncated && index === samples.length - 1;
      const name = samples.length > 1 ? "Own text " + (index + 1) + ": " : "Own text: ";
      const note = samples.length > 1 ? "one of these was stopped at the token limit"
        : "stopped at the token limit";
      parts.push(make("p", {},
        [make("strong", {}, [name]), ...said(sample, stopped ? [note] : [])]));
    });
    return make("div", { className: "answer" }, parts.concat(options(item, entry)));
  }

  function show() {
    const item = experiment.items[items.value];
    table.replaceChildren();
    if (!item) { return; }
    const shown = Array.from(conditions.querySelectorAll("input"))
      .filter((box) => box.checked).map((box) => Number(box.value));
    const mine = item.answers.filter((one) => one[0] === Number(models.value));
    const steps = Array.from(new Set(mine.map((one) => one[1]))).sort((a, b) => a - b);
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
          const cell = mine.filter((one) => one[1] === step && one[2] === condition)
            .map((one) => one.slice(3));
          return cell.length ? cell.map((one) => answer(item, one, cell))
            : [make("span", { className: "soft" }, ["not measured"])];
        }))]));
  }

  function choose() {
    const words = search.value.toLowerCase().split(/\s+/);
    const kept = items.value;
    const found = experiment.items.map((item, index) => [item, index]).filter(([item]) => {
      const asked = item.asked.flat().flatMap(([, turns]) => turns);
      const all = [item.id, item.category, ...item.facts.flat(), ...asked.map((one) => one[1])]
        .map(text).join("\n").toLowerCase();
      return words.every((word) => all.includes(word));
    });
    items.replaceChildren(...found.map(([item, index]) => {
      const name = text(item.id), category = text(item.category);
      return make("option", { value: String(index) },
        [name.includes(category) ? name : category + ": " + name]);
    }));
    if (found.some(([, index]) => String(index) === kept)) { items.value = kept; }
    status.textContent = search.value.trim()
      ? plural(found.length, "item") + " of " + experiment.items.length + " found"
      : plural(found.length, "item");
    show();
  }

  function enter() {
    experiment = data.experiments[experiments.value];
    conditions.replaceChildren(make("legend", {}, ["Conditions"]),
      ...experiment.conditions.map((name, index) => make("label", {}, [
        make("input", { type: "checkbox", checked: true, value: String(index) }), text(name)])));
    search.value = "";
    choose();
    items.selectedIndex = 0;
    show();
  }

  // Another run: the same experiment, model and item as far as it has them, else its largest model.
  function enterRun() {
    const said = (select) => (select.selectedOptions[0] || {}).textContent;
    const again = (select, name, otherwise) => {
      const found = Array.from(select.options).findIndex((one) => one.textContent === name);
      select.selectedIndex = found < 0 ? otherwise : found;
    };
    const [title, model, item] = [experiments, models, items].map(said);
    data = all[runs.value].data;
    fill(experiments, data.experiments.map((one) => text(one.title)));
    fill(models, data.models.map(text));
    again(experiments, title, 0);
    again(models, model, data.models.length - 1);
    enter();
    again(items, item, 0);
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

  fill(runs, all.map((one) => one.run));
  runs.parentNode.hidden = all.length < 2;
  runs.addEventListener("change", enterRun);
  experiments.addEventListener("change", enter);
  search.addEventListener("input", choose);
  [models, items, conditions].forEach((one) => one.addEventListener("change", show));
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  enterRun();
  place.hidden = false;
}

const transcripts = document.getElementById("transcripts-data");
if (transcripts) { browse(JSON.parse(transcripts.textContent), document.getElementById("browser")); }
