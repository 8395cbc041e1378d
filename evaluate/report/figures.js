// Part 2: the figures, drawn by Vega-Lite; evaluate/report/figure_data.py makes their data.

const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A"];
const CURRENT = "currentColor";  // black on a light page, light on a dark one
const CONFIG = {
  background: null,
  view: { stroke: null },
  axis: {
    domainColor: CURRENT, tickColor: CURRENT, labelColor: CURRENT, titleColor: CURRENT,
    gridColor: CURRENT, gridOpacity: 0.12, domainOpacity: 0.5, tickOpacity: 0.5, aria: false,
    labelFontSize: 11, titleFontSize: 11, titleFontWeight: "normal", labelOverlap: true,
  },
  axisX: { grid: false },
  header: { labelColor: CURRENT, labelFontSize: 12, labelFontWeight: "bold", labelAnchor: "start" },
  title: { color: CURRENT, fontSize: 12, anchor: "start" },
};

function short(value) {
  if (value === null) { return "undefined"; }
  const digits = Math.abs(value) < 0.005 && value !== 0 ? 4 : 3;
  return value.toFixed(digits).replace(/^-/, "\u2212");
}

// The interpreter instead of generated code: the page's security policy allows no eval.
function draw(element, spec, tip) {
  return vegaEmbed(element, { ...spec, config: CONFIG }, {
    actions: false, ast: true, defaultStyle: false, mode: "vega-lite", renderer: "svg", tooltip: tip,
  });
}

// Show the lines of a point in a box beside the pointer.
const tipBox = make("div", { id: "tip", role: "tooltip", hidden: true });
document.body.append(tipBox);
function showTip(handler, event, item, value) {
  const lines = (value ?? null) !== null && item && item.datum && item.datum.tip;
  tipBox.hidden = !lines;
  if (!lines) { return; }
  tipBox.replaceChildren(...lines.map((line) => make("div", {}, [line])));
  tipBox.style.left = Math.min(event.clientX + 14, innerWidth - tipBox.offsetWidth - 8) + "px";
  tipBox.style.top = Math.min(event.clientY + 14, innerHeight - tipBox.offsetHeight - 8) + "px";
}

// A legend of checkboxes, which a keyboard reaches; returns the set of names that are switched off.
function legend(fieldset, title, names, look, changed) {
  const hidden = new Set();
  fieldset.replaceChildren(make("legend", {}, [title]), ...names.map((name) => {
    const box = make("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => {
      if (box.checked) { hidden.delete(name); } else { hidden.add(name); }
      changed();
    });
    const sign = make("span", { "aria-hidden": "true" }, ["\u2501" + look(name).sign + "\u2501"]);
    sign.style.color = look(name).color === "#000000" ? CURRENT : look(name).color;
    const meaning = look(name).meaning ? ": " + look(name).meaning : "";
    return make("label", {}, [box, sign, make("span", {}, [name, make("span", { className: "soft" }, [meaning])])]);
  }));
  return hidden;
}

function steps(values) {
  const all = Array.from(new Set(values)).sort((a, b) => a - b);
  const positive = all.filter((step) => step > 0);
  const wide = positive.length > 2 && positive[positive.length - 1] / positive[0] > 25;
  return wide ? { type: "symlog", constant: positive[0], nice: false, values: all }
    : { type: "linear", nice: false, values: all };
}

function mainFigure(box) {
  const find = parts(box);
  const [experiment, metric, category, model, seed, axis] =
    ["experiment", "metric", "category", "model", "seed", "axis"].map(find);
  const [conditions, chart, note, values, table] =
    ["conditions", "chart", "note", "values", "table"].map(find);
  let entry, hidden = new Set(), shown = [], drawn = 0;

  const severalRuns = () => new Set(entry.jobs.map((job) => job.run)).size > 1;
  const size = (job) => (severalRuns() ? job.run + ": " : "") + job.model
    + (job.size ? " (" + job.size + ")" : "");
  const look = (name) => index.looks[name];

  // The points of the choice; seeds are averaged unless one is chosen.
  function points() {
    const p = entry.points, chosen = Number(metric.value), each = category.value === "each";
    const seeds = {};
    entry.jobs.forEach((job) => { seeds[size(job)] = (seeds[size(job)] || 0) + 1; });
    const groups = new Map();
    p.job.forEach((number, i) => {
      const job = entry.jobs[number], condition = entry.conditions[p.condition[i]];
      const right = p.metric[i] === chosen && !hidden.has(condition)
        && (each ? p.category[i] > 0 : p.category[i] === Number(category.value))
        && (model.value === "" || size(job) === model.value)
        && (seed.value === "" || String(job.seed) === seed.value);
      if (!right) { return; }
      const key = [size(job), p.step[i], p.condition[i], p.category[i]].join("\u0000");
      if (!groups.has(key)) { groups.set(key, []); }
      groups.get(key).push(i);
    });
    return Array.from(groups.values(), (rows) => {
      const first = rows[0], job = entry.jobs[p.job[first]];
      const several = seed.value === "" && seeds[size(job)] > 1;
      const mean = (name, need) => {
        const known = rows.map((i) => p[name][i]).filter((value) => value !== null);
        return known.length && (!need || known.length === seeds[size(job)])
          ? known.reduce((a, b) => a + b, 0) / known.length : null;
      };
      const all = rows.map((i) => p.value[i]);
      const value = several ? mean("value", true) : p.value[first];
      const point = {
        panel: each ? entry.categories[p.category[first]] : size(job), size: size(job), job: job,
        step: p.step[first], root_kl: mean("root_kl"), reward: mean("reward"), value: value,
        low: several ? (value === null ? null : Math.min(...all)) : p.low[first],
        high: several ? (value === null ? null : Math.max(...all)) : p.high[first],
        condition: entry.conditions[p.condition[first]],
        category: entry.categories[p.category[first]],
        counts: p.num_items[first] === null ? ""
          : plural(p.num_items[first], "item") + " in " + plural(p.num_clusters[first], "cluster"),
        interval: several ? "lowest to highest of " + plural(rows.length, "seed")
          : "95 % interval over items",
      };
      const interval = point.low === null ? "(no interval)"
        : "[" + short(point.low) + ", " + short(point.high) + "]";
      point.tip = [
        point.condition + ", " + point.size
          + (point.category === "overall" ? "" : ", " + point.category),
        short(value) + " " + interval + ", " + point.interval,
        ...(point.step === null ? [] : ["step " + point.step
          + (point.root_kl === null ? "" : ", \u221aKL " + short(point.root_kl))
          + (point.reward === null ? "" : ", reward " + short(point.reward))]),
        ...(point.counts ? [point.counts] : []),
        point.step === null ? "Click: its texts" : "Click: texts that changed",
      ];
      return point;
    });
  }

  function spec(rows, metricFacts) {
    const against = axis.value, panels = Array.from(new Set(rows.map((row) => row.panel)));
    const bySize = against === "size";
    const names = bySize ? [entry.title] : panels;
    const width = Math.max(chart.clientWidth, 260);
    const columns = Math.max(1, Math.min(names.length, Math.floor(width / 205)));
    const panelWidth = Math.min(420, Math.floor((width - 62) / columns) - (columns > 1 ? 22 : 12));
    const used = Array.from(new Set(rows.map((row) => row.condition)));
    const data = rows.map((row) => ({
      ...row, x: bySize ? row.panel : row[against], panel: bySize ? entry.title : row.panel,
    })).filter((row) => row.x !== null);
    const titles = { step: index.steps, root_kl: "\u221aKL to the initial policy (\u221anats)",
      reward: "Mean reward", size: "Model" };
    const xScale = against === "step" ? steps(data.map((row) => row.x)) : { zero: false };
    const x = { field: "x", type: bySize ? "nominal" : "quantitative",
      sort: bySize ? panels : undefined,
      scale: bySize ? { padding: 0.5 } : { ...xScale, values: undefined },
      axis: { title: titles[against], values: xScale.values, tickCount: 4, labelAngle: bySize ? -20 : 0 } };
    const color = { field: "condition", type: "nominal", legend: null,
      scale: { domain: used, range: used.map((name) => look(name).color === "#000000" ? CURRENT : look(name).color) } };
    const dash = { field: "condition", type: "nominal", legend: null,
      scale: { domain: used, range: used.map((name) => look(name).dash.length ? look(name).dash : [1, 0]) } };
    const shape = { field: "condition", type: "nominal", legend: null,
      scale: { domain: used, range: used.map((name) => look(name).shape) } };
    const y = { field: "value", type: "quantitative",
      axis: { title: metricFacts.label, titleLimit: 190, tickCount: 5 } };
    const rule = (value, dashes) => ({ data: { values: [{}] },
      mark: { type: "rule", color: CURRENT, opacity: 0.7, strokeDash: dashes, aria: false },
      encoding: { y: { datum: value } } });
    const error = { type: bySize ? "rule" : "area", opacity: bySize ? 0.9 : 0.13, aria: false };
    const offset = bySize ? { xOffset: { field: "condition", sort: used } } : {};
    return {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json",
      description: words(data, metricFacts, titles[against]),
      data: { values: data },
      facet: { field: "panel", type: "nominal", sort: names, header: { title: null, labelLimit: panelWidth } },
      columns: columns, spacing: { row: 14, column: 12 },
      spec: { width: panelWidth, height: 190, layer: [
        ...(metricFacts.unbiased === null ? [] : [rule(metricFacts.unbiased, [])]),
        ...(metricFacts.chance === null ? [] : [rule(metricFacts.chance, [2, 3])]),
        { mark: error, encoding: { x: x, ...offset, y: { field: "low", type: "quantitative" }, y2: { field: "high" }, color: color } },
        ...(bySize ? [] : [{ mark: { type: "line", strokeWidth: 1.8, aria: false },
          encoding: { x: x, y: y, color: color, strokeDash: dash,
            order: { field: "step", type: "quantitative" } } }]),
        { mark: { type: "point", filled: true, size: 55, opacity: 1, tooltip: true, cursor: "pointer", aria: false },
          encoding: { x: x, ...offset, y: y, color: color, shape: shape } },
      ] },
    };
  }

  // What the figure shows, for readers who cannot see it.
  function words(data, metricFacts, against) {
    const lines = new Map();
    data.forEach((row) => {
      const key = (axis.value === "size" ? row.x : row.panel) + ", " + row.condition;
      if (!lines.has(key)) { lines.set(key, []); }
      if (row.value !== null) { lines.get(key).push(row); }
    });
    const told = Array.from(lines, ([name, rows]) => {
      const ordered = rows.sort((a, b) => a.step - b.step);
      const last = ordered[ordered.length - 1];
      if (!ordered.length) { return name + " undefined"; }
      return name + " " + (ordered.length > 1 ? short(ordered[0].value) + " to " : "") + short(last.value);
    });
    return entry.title + ", " + metricFacts.label + " against " + against + ", first to last: "
      + told.slice(0, 40).join("; ") + (told.length > 40 ? "; and more" : "") + ".";
  }

  async function show() {
    const facts = entry.metrics[Number(metric.value)], turn = ++drawn;
    shown = points();
    const without = shown.filter((row) => axis.value !== "size" && row[axis.value] === null).length;
    const undef = shown.filter((row) => row.value === null).length;
    const shaded = [...new Set(shown.filter((row) => row.low !== null).map((row) => row.interval))];
    note.textContent = [
      facts.meaning ? facts.label + ": " + facts.meaning + "." : "",
      facts.unbiased === null ? "" : "The solid line at " + facts.unbiased + " is no bias.",
      facts.chance === null ? "" : "Dotted: chance.",
      shaded.length ? "Shaded: " + shaded.join(", or ") + "." : "",
      undef ? plural(undef, "point") + " undefined." : "",
      without ? plural(without, "point") + " without a value on this x-axis." : "",
      undef < shown.length && typeof vegaEmbed !== "undefined"
        ? "Hover over a point for its numbers; click it for the texts behind it." : "",
    ].filter((part) => part).join(" ");
    chart.setAttribute("aria-label", "Main figure");
    if (!shown.some((row) => row.value !== null)) {
      chart.replaceChildren(make("p", {}, ["Nothing to draw: " + (shown.length
        ? "the metric is undefined everywhere." : "no such point was measured.")]));
    } else if (typeof vegaEmbed !== "undefined") {
      const wanted = spec(shown, facts);
      const result = await draw(chart, wanted, showTip);
      if (turn !== drawn) { return; }
      chart.setAttribute("aria-label", wanted.description);
      result.view.addEventListener("click", (event, item) => {
        if (item && item.datum && item.datum.tip) { openTexts(item.datum); }
      });
    }
    if (values.open) { tabulate(); }
  }

  function openTexts(point) {
    texts.open({ run: point.job.run, experiment: entry.name, model: point.job.model,
      seed: seed.value === "" ? undefined : seed.value, condition: point.condition,
      category: point.category === "overall" ? "" : point.category,
      to: point.step, changed: "1" });
  }

  const MOST = 400;
  function tabulate() {
    const head = ["Condition", "Size", "Category", "Step", "Value", "Interval", "Counts", "Texts"];
    table.replaceChildren(
      make("thead", {}, [make("tr", {}, head.map((name) => make("th", { scope: "col" }, [name])))]),
      make("tbody", {}, shown.slice(0, MOST).map((point) => {
        const button = make("button", { type: "button" }, ["Texts"]);
        button.setAttribute("aria-label", "Texts behind " + point.condition + ", " + point.size
          + ", " + point.category + ", step " + point.step);
        button.addEventListener("click", () => openTexts(point));
        return make("tr", {}, [point.condition, point.size, point.category, String(point.step ?? "\u2013"),
          short(point.value),
          point.low === null ? "\u2013" : short(point.low) + " to " + short(point.high),
          point.counts || "\u2013", button].map((cell) => make("td", {}, [cell])));
      })));
    find("more").textContent = shown.length > MOST
      ? "The first " + MOST + " of " + shown.length + " points." : "";
  }

  async function enter() {
    entry = await load(index.experiments[Number(experiment.value)].chunk);
    const measured = new Set(entry.points.metric);
    fill(metric, entry.metrics.map((facts, i) => [i, facts.label]).filter(([i]) => measured.has(i)));
    metric.selectedIndex = 0;
    fill(category, entry.categories.map((name, i) => [i, name]).concat(
      entry.categories.length > 2 ? [["each", "each, side by side"]] : []));
    const sizes = Array.from(new Set(entry.jobs.map(size)));
    fill(model, [["", "all"], ...sizes.map((name) => [name, name])]);
    model.parentNode.hidden = sizes.length < 2;
    const seeds = Array.from(new Set(entry.jobs.map((job) => String(job.seed))));
    fill(seed, [["", "mean of all"], ...seeds.map((name) => [name, name])]);
    seed.parentNode.hidden = seeds.length < 2;
    const several = new Set(entry.points.step).size > 1;
    fill(axis, [...(several ? [["step", "steps"], ["root_kl", "\u221aKL"], ["reward", "reward"]] : []),
      ...(several ? [] : [["size", "size"]])]);
    hidden = legend(conditions, "Conditions", entry.conditions, look, show);
    await show();
  }

  fill(experiment, index.experiments.map((one, i) => [i, one.title]));
  experiment.addEventListener("change", enter);
  [metric, seed, axis, model].forEach((select) => select.addEventListener("change", show));
  category.addEventListener("change", () => {
    metric.selectedIndex = category.value === "0" ? metric.selectedIndex : 0;  // categories have
    if (category.value === "each" && model.value === "") {  // the headline metric alone
      model.selectedIndex = model.options.length - 1;
    }
    show();
  });
  metric.addEventListener("change", () => {
    if (metric.selectedIndex > 0 && category.value !== "0") { category.value = "0"; show(); }
  });
  values.addEventListener("toggle", () => { if (values.open) { tabulate(); } });
  onResize(show);
  box.querySelector(".controls").hidden = false;
  return enter();
}

// Draw again when the width of the page has changed.
function onResize(show) {
  let width = innerWidth, waiting;
  addEventListener("resize", () => {
    if (innerWidth === width) { return; }
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(show, 150);
  });
}

async function trainingFigure(box) {
  const find = parts(box), chart = find("chart");
  const lines = await load(index.training);
  if (!lines.length || typeof vegaEmbed === "undefined") { return; }
  const several = new Set(lines.map((line) => line.run)).size > 1;
  const name = (line) => (several ? line.run + ": " : "") + line.model;
  const names = Array.from(new Set(lines.map(name)));
  const look = (one) => ({ color: COLORS[names.indexOf(one) % COLORS.length], sign: "\u2501" });
  const hidden = legend(find("conditions"), "Models", names, look, show);

  async function show() {
    const rows = lines.filter((line) => !hidden.has(name(line))).flatMap((line) =>
      line.step.map((step, i) => {
        const row = { line: name(line) + " " + line.seed, model: name(line), step: step };
        ["reward", "kl"].forEach((key) => {
          row[key] = line[key][i];
          row["smooth_" + key] = line["smooth_" + key][i];
        });
        row.root = row.kl === null || row.kl < 0 ? null : Math.sqrt(row.kl);
        row.smooth_root = row.smooth_kl === null || row.smooth_kl < 0 ? null : Math.sqrt(row.smooth_kl);
        row.tip = [name(line) + ", seed " + line.seed, "step " + step,
          "reward " + short(row.reward) + ", smoothed " + short(row.smooth_reward),
          "KL " + short(row.kl) + ", smoothed " + short(row.smooth_kl)];
        return row;
      }));
    const width = Math.max(chart.clientWidth, 260);
    const columns = width < 700 ? 1 : 3;
    const color = { field: "model", type: "nominal", legend: null,
      scale: { domain: names, range: names.map((one) => look(one).color) } };
    const panel = (title, x, xTitle, y, yTitle) => {
      const at = (smooth) => ({
        x: { field: x === "step" ? x : (smooth ? "smooth_" : "") + x, type: "quantitative",
          scale: { nice: false, zero: x === "step" }, axis: { title: xTitle, tickCount: 5 } },
        y: { field: (smooth ? "smooth_" : "") + y, type: "quantitative", scale: { zero: y === "kl" },
          axis: { title: yTitle, tickCount: 5 } },
        color: color,
      });
      return { title: title, width: Math.floor(width / columns) - 62, height: 190, layer: [
        { mark: { type: "point", filled: true, size: 14, opacity: 0.3, tooltip: true, aria: false }, encoding: at(false) },
        { mark: { type: "line", strokeWidth: 1.8, aria: false },
          encoding: { ...at(true), detail: { field: "line" }, order: { field: "step", type: "quantitative" } } },
      ] };
    };
    const ends = names.map((one) => {
      const [first, last] = [rows.find((row) => row.model === one), rows.filter((row) => row.model === one).pop()];
      return first ? one + ": reward " + short(first.smooth_reward) + " to " + short(last.smooth_reward)
        + ", KL " + short(first.smooth_kl) + " to " + short(last.smooth_kl) : "";
    });
    const description = "Smoothed reward and KL over training, first to last logged step. "
      + ends.filter((part) => part).join("; ") + ".";
    await draw(chart, {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json", description: description,
      data: { values: rows }, columns: columns,
      concat: [
        panel("Reward", "step", "RLHF steps", "reward", "Mean reward"),
        panel("KL", "step", "RLHF steps", "kl", "KL to the initial policy (nats)"),
        panel("Reward against \u221aKL", "root", "\u221aKL (\u221anats)", "reward", "Mean reward"),
      ],
    }, showTip);
    chart.setAttribute("aria-label", description);
    find("note").textContent = "Points: " + (lines[0].every > 1
      ? "every " + lines[0].every + "th logged step" : "every logged step")
      + ". Lines: centred means over 15 % of the logged steps.";
  }

  box.hidden = false;
  onResize(() => { if (box.offsetParent) { show(); } });
  await show();
}

// Draw the training curves when their section is first opened: they have thousands of points.
document.getElementById("training").addEventListener(
  "toggle", () => trainingFigure(document.getElementById("training-figure")), { once: true });
