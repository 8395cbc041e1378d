// The report's script, part 1: pieces of data, elements, and tables that sort and filter.
"use strict";

const index = JSON.parse(document.getElementById("index").textContent);

// Return the JSON value of a compressed chunk of the page; each is unpacked once.
const loaded = new Map();
function load(number) {
  if (!loaded.has(number)) {
    const packed = atob(document.getElementById("chunk-" + number).textContent);
    const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    loaded.set(number, new Response(stream).json());
  }
  return loaded.get(number);
}

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

// Fill a select with [value, name] pairs, and keep its value where it is still there.
function fill(select, pairs) {
  const kept = select.value;
  select.replaceChildren(...pairs.map(([value, name]) => make("option", { value: String(value) }, [name])));
  if (pairs.some(([value]) => String(value) === kept)) { select.value = kept; }
  if (select.parentNode.tagName === "LABEL") { select.parentNode.hidden = pairs.length < 2; }
}

function plural(number, noun) { return number + " " + noun + (number === 1 ? "" : "s"); }

function parts(root) {
  return (name) => root.querySelector("[data-part=" + name + "]");
}

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

function sortable(table) {
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
}

// Tables are closed at first: give them their controls when their section is opened.
document.querySelectorAll("details").forEach((details) => {
  details.addEventListener("toggle", () => {
    details.querySelectorAll("table.sorts:not(.ready)").forEach((table) => {
      table.classList.add("ready");
      sortable(table);
    });
  });
});

// Open the folded section that a link points into.
function reveal(element) {
  for (let place = element; place; place = place.parentElement) {
    if (place.tagName === "DETAILS") { place.open = true; }
  }
  element.scrollIntoView();
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  const target = link && document.getElementById(link.getAttribute("href").slice(1));
  if (target) { reveal(target); }
});

// Printed, the page has everything that is not folded away by the reader's choice.
addEventListener("beforeprint", () => {
  document.querySelectorAll("details.prints").forEach((details) => { details.open = true; });
});
