"use strict";
// Plain JavaScript over the same API as any client. Every text from the server goes in through textContent.
// base.js: elements and requests; curves.js: charts; job.js: one job; create.js: the form; page.js: all together.
const $ = id => document.getElementById(id);
let key = sessionStorage.getItem("zo-key") || "";

function el(tag, cls, text) {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Relative to this page: behind a proxy both may stand under a prefix.
async function call(path, options = {}) {
  const headers = { ...options.headers, ...key && { Authorization: "Bearer " + key } };
  const response = await fetch("v1" + path, { ...options, headers });
  if (response.status === 401) throw Object.assign(new Error("key"), { key: true });
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body && body.error && body.error.message || response.status + " " + response.statusText);
  }
  return response;
}
const get = async path => (await call(path)).json();
const post = async (path, body) => (await call(path,
  { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) })).json();
const of = job => "/fine_tuning/jobs/" + encodeURIComponent(job.id);

function table(columns, caption) {  // and `fill`, which replaces its rows: lists of texts and nodes
  const root = el("table"), head = el("tr"), body = el("tbody");
  root.append(Object.assign(el("caption", "soft"), { textContent: caption, hidden: true }), el("thead"), body);
  root.setAttribute("aria-label", caption);
  root.tHead.append(head);
  for (const name of columns) head.append(Object.assign(el("th", "", name), { scope: "col" }));
  root.fill = rows => body.replaceChildren(...rows.map(cells => {
    const row = el("tr");
    for (const cell of cells) { const td = el("td"); td.append(cell); row.append(td); }
    return row;
  }));
  return root;
}

const number = v => typeof v === "number" ? String(Number(v.toPrecision(4))) : "";

function duration(s) {
  s = Math.max(0, Math.round(s));
  return s < 60 ? s + " s" : s < 3600 ? Math.floor(s / 60) + " min " + s % 60 + " s" : Math.floor(s / 3600) + " h " + Math.floor(s % 3600 / 60) + " min";
}
