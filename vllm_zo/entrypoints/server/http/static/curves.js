const POINTS = 200, SMOOTH = 20;   // points of a line; a mean goes over one SMOOTHth of all steps

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  if (text !== undefined) node.textContent = text;
  return node;
}

function thin(points) {    // means of equal stretches, so that a long run stays readable
  if (points.length <= POINTS) return points;
  const size = Math.ceil(points.length / POINTS), out = [];
  for (let i = 0; i < points.length; i += size) {
    const part = points.slice(i, i + size);
    out.push([part[part.length - 1][0], part.reduce((sum, p) => sum + p[1], 0) / part.length]);
  }
  return out;
}

function moving(points) {  // the mean of the last steps, at least 5: one step's loss is that of one small batch
  const width = Math.max(5, Math.round(points.length / SMOOTH)), out = [];
  for (let i = 0, sum = 0; i < points.length; i++) {
    sum += points[i][1] - (i >= width ? points[i - width][1] : 0);
    out.push([points[i][0], sum / Math.min(i + 1, width)]);
  }
  return out;
}

function chart(title, train, valid, total) {
  const W = 480, H = 190, L = 44, R = 8, T = 22, B = 22, raw = thin(train), mean = thin(moving(train));
  const all = [...raw, ...valid].map(p => p[1]), last = mean.length ? mean[mean.length - 1][1] : NaN;
  const label = `${title}: ${number(last)} on average now` + (valid.length ? `, ${number(valid[valid.length - 1][1])} on validation` : "");
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label });
  root.append(svg("text", { x: L, y: 13 }, title));
  let low = Math.min(...all), high = Math.max(...all);
  if (!all.length) { low = 0; high = 1; }
  if (high - low < 1e-9) { low -= .5; high += .5; }
  const x = step => L + (W - L - R) * step / Math.max(total, 1), y = v => T + (H - T - B) * (high - v) / (high - low);
  for (const v of [low, (low + high) / 2, high]) {
    root.append(svg("line", { class: "axis", x1: L, x2: W - R, y1: y(v), y2: y(v) }));
    root.append(svg("text", { x: L - 6, y: y(v) + 4, "text-anchor": "end" }, Number(v.toPrecision(3))));
  }
  root.append(svg("text", { x: L, y: H - 6 }, "0"), svg("text", { x: W - R, y: H - 6, "text-anchor": "end" }, total + " steps"));
  for (const [cls, line] of [["train raw", raw], ["train", mean], ["valid", valid]]) {
    const points = line.map(p => x(p[0]).toFixed(1) + "," + y(p[1]).toFixed(1)).join(" ");
    root.append(svg("polyline", { class: cls, points }));
  }
  for (const p of valid) root.append(svg("circle", { cx: x(p[0]), cy: y(p[1]), r: 2.5, fill: "var(--valid)" }));
  return root;
}

function legend() {
  const root = el("div", "soft key");
  for (const [cls, name] of [["train", "training, a moving mean (faint: each step)"], ["valid", "validation"]]) {
    const line = el("i");
    line.style.background = `var(--${cls})`;
    root.append(line, name);
  }
  return root;
}
