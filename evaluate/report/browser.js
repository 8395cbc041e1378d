// Part 3: the transcript browser; evaluate/report/transcripts.py makes its data.

function browse(allRuns, browser) {
  const find = parts(browser);
  const names = ["run", "experiment", "job", "condition", "category", "from", "to", "item"];
  const [runs, experiments, jobs, condition, category, from, to, items] = names.map(find);
  const [search, changed, all, columns, status, table, link] =
    ["search", "changed", "all", "columns", "status", "table", "link"].map(find);
  let entry, questions, answers, matches = [], turn = 0;

  const text = (number) => questions.texts[number];
  const said = (number) => answers.texts[number];

  function quote(string) { return make("span", { className: "quote", dir: "auto" }, [string]); }

  function remarks(notes) {
    return notes.map((note) => make("span", { className: "soft" }, [" [" + note + "]"]));
  }

  // Show a text that is followed by its length if it is cut, with notes after it.
  function quoted(string, length, notes) {
    const cut = length ? ["cut here; " + length.toLocaleString("en") + " characters in all"] : [];
    return [quote(string), ...remarks(cut.concat(notes || []))];
  }

  function turnOf([role, number, length], last) {
    const string = text(number), sampled = string.endsWith(questions.sample) && !length;
    const name = role.charAt(0).toUpperCase() + role.slice(1) + ": ";
    const shown = sampled ? [quote(string.slice(0, -questions.sample.length))] : quoted(string, length);
    const notes = sampled ? ["the model writes text here"] : [];
    if (last) { notes.push("the options are scored here"); }
    return make("p", {}, [make("strong", {}, [name]), ...shown, ...remarks(notes)]);
  }

  function question(item, column) {
    const dialogues = item.asked[column].map(([order, turns]) =>
      [order, turns.map((one, i) => turnOf(one, i === turns.length - 1))]);
    if (!dialogues.length) { return [make("span", { className: "soft" }, ["unknown"])]; }
    if (dialogues.length === 1) { return dialogues[0][1]; }
    return dialogues.map(([order, turns], i) => make("details", { open: i === 0 },
      [make("summary", {}, ["Options in the order " + order]), ...turns]));
  }

  // The option's index in the file at each position of an answer.
  const fileOrder = (order) => (order.includes(",") ? order.split(",") : Array.from(order));

  function options(item, [order, , shown, chances, chosen, mass]) {
    const file = fileOrder(order);
    const rows = shown.map(([number, length], i) => {
      const tags = (item.tags[file[i]] || []).concat(i === chosen ? ["chosen"] : []);
      const chance = chances === null ? "undefined" : chances[i].toFixed(3);
      const bar = make("span", { className: "bar", "aria-hidden": "true" });
      bar.style.width = 4 * (chances === null ? 0 : chances[i]) + "rem";
      return make("li", { className: i === chosen ? "chosen" : "" }, [
        ...quoted(said(number), length), " ", chance, " ", bar, tags.length ? " " + tags.join(", ") : ""]);
    });
    const share = mass === null ? "undefined" : mass.toFixed(3);
    return [make("ul", { className: "options" }, rows),
      make("span", { className: "soft" }, ["probability on the options " + share])];
  }

  // Where a cell has several answers, name the order of the options and the draw of each.
  function answer(item, one, cell) {
    const [order, draw, , , , , samples, truncated] = one;
    const differ = (position) => new Set(cell.map((values) => values[position])).size > 1;
    const title = [differ(0) ? "options in the order " + order : "",
      differ(1) ? "draw " + (draw + 1) : ""].filter((part) => part).join(", ");
    const shown = title ? [make("p", { className: "soft" }, [title])] : [];
    (samples || []).forEach(([number, length], i) => {
      const stopped = truncated && i === samples.length - 1;
      const name = samples.length > 1 ? "Model's text " + (i + 1) + ": " : "Model's text: ";
      const note = samples.length > 1 ? "one of these was cut off at the token limit"
        : "cut off at the token limit";
      shown.push(make("p", {},
        [make("strong", {}, [name]), ...quoted(said(number), length, stopped ? [note] : [])]));
    });
    return make("div", { className: "answer" }, shown.concat(options(item, one)));
  }

  // --- what changed between the two checkpoints ---

  // Return how an item's answers changed under the condition: null if it was not asked at both.
  function change(place, item) {
    const column = Number(condition.value);
    const at = (step) => (answers.byPlace.get(place) || [])
      .filter((one) => one[0] === Number(step) && one[1] === column).map((one) => one.slice(2));
    const [before, after] = [at(from.value), at(to.value)];
    if (!before.length || before.length !== after.length) { return null; }
    const chosen = (one) => (one[4] === null ? null : Number(fileOrder(one[0])[one[4]]));
    const raised = (list) => list.map((one) => (one[3] === null || item.raises === null ? 0
      : one[3][fileOrder(one[0]).indexOf(String(item.raises))] || 0))
      .reduce((a, b) => a + b, 0) / list.length;
    const flips = before.filter((one, i) => chosen(one) !== chosen(after[i])).length;
    return { flips: flips, rise: raised(after) - raised(before) };
  }

  // Sort the items: answers that changed against the trend, other changed answers, the rest by how
  // much the option that raises the metric gained or lost.
  function choose() {
    const words = search.value.toLowerCase().split(/\s+/);
    const kept = items.value;
    const rows = questions.items.map((item, place) => ({ item: item, place: place, change: change(place, item) }));
    const trend = rows.reduce((sum, row) => sum + (row.change ? row.change.rise : 0), 0);
    rows.forEach((row) => {
      const flips = row.change !== null && row.change.flips > 0;
      row.against = flips && row.change.rise * trend < 0;
      row.rank = row.against ? 2 : flips ? 1 : 0;
    });
    const inCategory = rows.filter((row) => category.value === "" || text(row.item.category) === category.value);
    matches = inCategory.filter((row) => {
      if (changed.checked && row.rank === 0) { return false; }
      const asked = row.item.asked.flat().flatMap(([, turns]) => turns);
      const numbers = [row.item.id, row.item.category, ...row.item.facts.flat(), ...asked.map((one) => one[1])];
      const written = (answers.byPlace.get(row.place) || []).flatMap((one) => one[8] || []).map(([number]) => said(number));
      const everything = numbers.map(text).concat(written).join("\n").toLowerCase();
      return words.every((word) => everything.includes(word));
    });
    if (from.value !== to.value) {
      const moved = (row) => (row.change ? Math.abs(row.change.rise) : 0);
      matches.sort((a, b) => b.rank - a.rank || moved(b) - moved(a) || a.place - b.place);
    }
    items.replaceChildren(...matches.map((row) => {
      const name = text(row.item.id), of = text(row.item.category);
      const mark = row.against ? "against the trend \u2013 " : row.rank ? "changed \u2013 " : "";
      return make("option", { value: String(row.place) },
        [mark + (name.includes(of) ? name : of + ": " + name)]);
    }));
    if (matches.some((row) => String(row.place) === kept)) { items.value = kept; }
    const count = (keep) => inCategory.filter(keep).length;
    status.textContent = plural(matches.length, "item") + " of " + questions.items.length + " shown. "
      + (from.value === to.value ? "" : "Between steps " + from.value + " and " + to.value + " under "
        + entry.conditions[Number(condition.value)] + ", " + plural(count((row) => row.rank > 0), "answer")
        + " changed, " + count((row) => row.against) + " against the trend.");
    show();
  }

  function show() {
    const item = questions.items[items.value];
    table.replaceChildren();
    link.hidden = !item;
    if (!item) { return; }
    link.href = "#texts?" + new URLSearchParams(state());
    const shown = Array.from(columns.querySelectorAll("input"))
      .filter((box) => box.checked).map((box) => Number(box.value));
    const given = answers.byPlace.get(Number(items.value)) || [];
    const kept = Array.from(new Set(given.map((one) => one[0]))).sort((a, b) => a - b)
      .filter((step) => all.checked || [from.value, to.value].includes(String(step)));
    const facts = item.facts.map(([name, value]) => text(name) + ": " + text(value));
    const head = (name, scope) => make("th", { scope: scope }, [name]);
    const row = (name, cell) => make("tr", {}, [head(name, "row"),
      ...shown.map((column) => make("td", {}, cell(column)))]);
    table.append(
      make("caption", { dir: "auto" }, [make("strong", {}, [text(item.id)]), " "
        + ["category: " + text(item.category)].concat(facts).join(" \u00b7 ")]),
      make("thead", {}, [make("tr", {}, [head("Step", "col"), ...shown.map(
        (column) => head(entry.conditions[column], "col"))])]),
      make("tbody", {}, [row("Asked", (column) => question(item, column)),
        ...kept.map((step) => row(to.options.length < 2 ? "Answer" : String(step), (column) => {
          const cell = given.filter((one) => one[0] === step && one[1] === column)
            .map((one) => one.slice(2));
          return cell.length ? cell.map((one) => answer(item, one, cell))
            : [make("span", { className: "soft" }, ["not measured"])];
        }))]));
  }

  // --- choosing: each level fills the selects below it and keeps what is still there ---

  async function enterJob() {
    const mine = ++turn, job = entry.jobs[Number(jobs.value)];
    const [asked, given] = await Promise.all([load(entry.questions), load(job.chunk)]);
    if (mine !== turn) { return; }
    questions = asked;
    answers = { texts: given.texts, byPlace: new Map(given.places.map((place, i) => [place, given.items[i]])) };
    const last = to.value;
    fill(from, job.steps.map((step) => [step, String(step)]));
    fill(to, job.steps.map((step) => [step, String(step)]));
    if (!job.steps.map(String).includes(last)) { to.selectedIndex = job.steps.length - 1; }
    const single = job.steps.length < 2;  // nothing can have changed
    [condition, changed, all].forEach((input) => { input.parentNode.hidden = single; });
    if (single) { changed.checked = false; }
    choose();
  }

  function enterExperiment() {
    entry = allRuns[Number(runs.value)].experiments[Number(experiments.value)];
    const seeds = new Set(entry.jobs.map((job) => job.seed)).size > 1;
    const kept = (jobs.selectedOptions[0] || {}).textContent;  // or else the largest model
    const labels = entry.jobs.map((one) => one.model + (seeds ? ", seed " + one.seed : ""));
    fill(jobs, labels.map((label, i) => [i, label]));
    jobs.selectedIndex = labels.includes(kept) ? labels.indexOf(kept) : labels.length - 1;
    const request = entry.conditions.indexOf("Q+IF");
    fill(condition, entry.conditions.map((name, i) => [i, name]));
    if (request >= 0) { condition.value = String(request); }
    fill(category, [["", "all"], ...entry.categories.map((name) => [name, name])]);
    category.parentNode.hidden = entry.categories.length < 2;
    columns.replaceChildren(make("legend", {}, ["Columns"]),
      ...entry.conditions.map((name, i) => make("label", {}, [
        make("input", { type: "checkbox", checked: true, value: String(i) }), name])));
    return enterJob();
  }

  function enterRun() {
    fill(experiments, allRuns[Number(runs.value)].experiments.map((one, i) => [i, one.title]));
    return enterExperiment();
  }

  // --- permalinks ---

  function state() {
    const job = entry.jobs[Number(jobs.value)], item = questions.items[items.value];
    return { run: allRuns[Number(runs.value)].run, experiment: entry.name, model: job.model,
      seed: job.seed, condition: entry.conditions[Number(condition.value)], category: category.value,
      from: from.value, to: to.value, changed: changed.checked ? "1" : "", search: search.value,
      item: item ? text(item.id) : "" };
  }

  // Show what `wanted` names (see `state`); what it leaves out or does not exist stays.
  async function open(wanted) {
    const pick = (select, list, test) => {
      const number = list.findIndex(test);
      if (number >= 0) { select.value = String(number); }
    };
    pick(runs, allRuns, (one) => one.run === wanted.run || one.run === wanted.model);
    fill(experiments, allRuns[Number(runs.value)].experiments.map((one, i) => [i, one.title]));
    pick(experiments, allRuns[Number(runs.value)].experiments, (one) => one.name === wanted.experiment);
    changed.checked = wanted.changed === "1";
    search.value = wanted.search || "";
    await enterExperiment();
    pick(jobs, entry.jobs, (one) => one.model === wanted.model
      && (wanted.seed === undefined || String(one.seed) === String(wanted.seed)));
    pick(condition, entry.conditions, (name) => name === wanted.condition);
    if (entry.categories.includes(wanted.category || "")) { category.value = wanted.category; }
    await enterJob();
    const known = Array.from(to.options, (option) => option.value);
    if (known.includes(String(wanted.to))) { to.value = String(wanted.to); }
    from.value = known.includes(String(wanted.from)) ? String(wanted.from)
      : to.value === known[0] ? known[known.length - 1] : known[0];
    choose();
    const place = questions.items.findIndex((item) => text(item.id) === wanted.item);
    items.selectedIndex = Math.max(0, matches.findIndex((row) => row.place === place));
    show();
    reveal(browser);
    items.focus({ preventScroll: true });
  }

  function follow() {
    if (location.hash.startsWith("#texts?")) {
      open(Object.fromEntries(new URLSearchParams(location.hash.slice("#texts?".length))));
    }
  }

  function step(by) {
    const number = items.options.length;
    if (!number) { return; }
    items.selectedIndex = (items.selectedIndex + by + number) % number;
    status.textContent = "Item " + (items.selectedIndex + 1) + " of " + number + ": "
      + items.selectedOptions[0].textContent;
    show();
  }

  fill(runs, allRuns.map((one, i) => [i, one.run]));
  runs.addEventListener("change", enterRun);
  experiments.addEventListener("change", enterExperiment);
  jobs.addEventListener("change", enterJob);
  search.addEventListener("input", choose);
  [condition, category, from, to, changed].forEach((input) => input.addEventListener("change", choose));
  [items, columns, all].forEach((input) => input.addEventListener("change", show));
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  // Unpack the first texts when their section is opened, or when a link names one of them.
  let started = false;
  const section = browser.closest("details");
  section.addEventListener("toggle", () => {
    if (section.open && !started && !entry) { started = true; enterRun(); }
  });
  browser.hidden = false;
  addEventListener("hashchange", follow);
  follow();
  return { open: (wanted) => { started = true; return open(wanted); } };
}

const noTexts = { open: () => { reveal(document.getElementById("texts")); } };
const texts = index.transcripts.length ? browse(index.transcripts, document.getElementById("browser")) : noTexts;
if (index.experiments.length) { mainFigure(document.getElementById("main-figure")); }
