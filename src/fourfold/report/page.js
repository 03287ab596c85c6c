
"use strict";
// Values under the pointer, or by the arrow keys; and all tables open on paper.
const POINTS = JSON.parse(document.getElementById("points").textContent);
const NEAR = 5;  // pixels, within which a line's point belongs to the step that is pointed at
const SVG = "http://www.w3.org/2000/svg";

function shown(value) {
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e9)) return value.toExponential(2);
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

function make(parent, name, attributes) {
  const element = parent.appendChild(document.createElementNS(SVG, name));
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function follow(plot) {
  const lines = POINTS[plot.dataset.chart];
  const [x0, x1, left, right] = plot.dataset.x.split(" ").map(Number);
  const [y0, y1, bottom, top] = plot.dataset.y.split(" ").map(Number);
  const steps = [...new Set(lines.flatMap(line => line.points.map(point => point[0])))].sort((a, b) => a - b);
  const across = step => left + (step - x0) / (x1 - x0) * (right - left);
  const down = value => Math.max(bottom + (value - y0) / (y1 - y0) * (top - bottom), top);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-live", "polite");
  plot.parentElement.append(tip);
  let over = null, at = -1;

  function hide() {
    if (over) over.remove();
    over = null;
    tip.hidden = true;
  }

  function show(index) {
    hide();
    at = index;
    const step = steps[index], x = across(step);
    over = make(plot, "g", {});
    make(over, "line", {class: "cross", x1: x, x2: x, y1: top, y2: bottom});
    tip.replaceChildren();
    tip.append(document.createElement("b"));
    tip.firstChild.textContent = "step " + step.toLocaleString("en");
    for (const line of lines) {
      const away = point => Math.abs(across(point[0]) - x);
      const point = line.points.reduce((best, other) => away(other) < away(best) ? other : best);
      if (away(point) > NEAR) continue;
      make(over, "circle", {class: `dotted c${line.colour}`, cx: across(point[0]), cy: down(point[1]), r: 4});
      tip.append(document.createElement("br"), `${line.name}: ${shown(point[1])}`);
    }
    tip.hidden = false;
    const box = plot.getBoundingClientRect(), frame = plot.closest("figure").getBoundingClientRect();
    const place = box.left - frame.left + x / plot.viewBox.baseVal.width * box.width;
    const fits = place + 14 + tip.offsetWidth < frame.width;
    tip.style.left = `${Math.max(fits ? place + 14 : place - 14 - tip.offsetWidth, 0)}px`;
    tip.style.top = `${box.top - frame.top + top + 8}px`;
  }

  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * plot.viewBox.baseVal.width;
    let nearest = 0;
    steps.forEach((step, index) => {
      if (Math.abs(across(step) - x) < Math.abs(across(steps[nearest]) - x)) nearest = index;
    });
    show(nearest);
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!move) return;
    event.preventDefault();
    show(Math.min(Math.max(at + move, 0), steps.length - 1));
  });
  plot.setAttribute("tabindex", "0");
}

document.querySelectorAll(".plot").forEach(follow);
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach(details => { details.open = true; });
});
addEventListener("afterprint", () => opened.forEach(details => { details.open = false; }));
