// Small SVG charts: axes, lines, bands, dots. Colours come from the style sheet by class.

const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// about count round numbers from low to high
function ticks(low, high, count) {
  const raw = (high - low) / count, power = Math.pow(10, Math.floor(Math.log10(raw)));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high * (1 + 1e-9) + 1e-12; n++) found.push(n * step);
  return found;
}

// three significant digits, without an exponent for everyday sizes
function significant(value, digits = 3) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  if (size < -4 || size >= 7) return value.toExponential(digits - 1);
  const text = value.toFixed(Math.max(digits - 1 - size, 0));
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function duration(seconds) {
  if (seconds === null || !Number.isFinite(seconds)) return "–";
  if (Math.abs(seconds) < 1e-9) return "0 ms";
  return seconds < 1 ? `${significant(1000 * seconds)} ms` : `${significant(seconds)} s`;
}

function percent(share) {
  return share < 5e-4 ? "0 %" : `${significant(100 * share)} %`;
}

// A chart in an <svg>: x and y are {low, high, label}; what is drawn stays inside the axes. Its size is that of the page,
// so that letters are as large on a phone as on a desk.
class Chart {
  constructor(svg, x, y, ratio = 0.52) {
    this.svg = svg;
    this.x = x;
    this.y = y;
    this.width = Math.max(svg.parentElement.clientWidth, 240);
    this.height = Math.max(Math.round(this.width * ratio), 230);
    this.left = 62;
    this.bottom = this.height - 44;
    this.right = this.width - 12;
    this.top = 12;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    const id = `${svg.id}-inside`;
    const clip = make("clipPath", { id });
    clip.append(make("rect", { x: this.left, y: this.top, width: this.right - this.left, height: this.bottom - this.top }));
    this.inside = make("g", { "clip-path": `url(#${id})` });
    svg.append(clip, this.inside);
    this.axes();
  }

  px(x) {
    return this.left + ((x - this.x.low) / (this.x.high - this.x.low)) * (this.right - this.left);
  }

  py(y) {
    return this.bottom - ((y - this.y.low) / (this.y.high - this.y.low)) * (this.bottom - this.top);
  }

  axes() {
    const grid = make("g", { class: "grid" });
    for (const value of ticks(this.x.low, this.x.high, this.width < 480 ? 4 : 8)) {
      const at = this.px(value);
      grid.append(make("line", { x1: at, x2: at, y1: this.top, y2: this.bottom }));
      grid.append(make("text", { x: at, y: this.bottom + 17, "text-anchor": "middle" }, significant(value)));
    }
    for (const value of this.y.ticks || ticks(this.y.low, this.y.high, 5)) {
      const at = this.py(value);
      grid.append(make("line", { x1: this.left, x2: this.right, y1: at, y2: at }));
      const text = this.y.show ? this.y.show(value) : significant(value);
      grid.append(make("text", { x: this.left - 7, y: at + 4, "text-anchor": "end" }, text));
    }
    const middle = (this.top + this.bottom) / 2;
    grid.append(make("text", { x: (this.left + this.right) / 2, y: this.height - 7, "text-anchor": "middle" }, this.x.label));
    const turned = { x: 0, y: 0, "text-anchor": "middle", transform: `translate(13 ${middle}) rotate(-90)` };
    grid.append(make("text", turned, this.y.label));
    this.svg.insertBefore(grid, this.inside);
  }

  // "M x y L x y ..." of the points that are finite; a gap where one is not
  trace(points) {
    let text = "", pen = "M";
    for (const [x, y] of points) {
      if (!Number.isFinite(y)) pen = "M";
      else {
        text += `${pen}${this.px(x).toFixed(2)} ${this.py(y).toFixed(2)}`;
        pen = "L";
      }
    }
    return text;
  }

  // a curve keeps its points, exactly, in data-points
  line(points, kind) {
    const path = make("path", { d: this.trace(points), class: `line ${kind}`, fill: "none" });
    path.dataset.points = JSON.stringify(points);
    this.inside.append(path);
    return path;
  }

  area(lower, upper, kind) {
    const kept = upper.map((point, index) => [point, lower[index]]).filter(([up, low]) => Number.isFinite(up[1] + low[1]));
    if (!kept.length) return;
    const outline = kept.map(([up]) => up).concat(kept.map(([, low]) => low).reverse());
    this.inside.append(make("path", { d: `${this.trace(outline)}Z`, class: `area ${kind}` }));
  }

  dot(x, y, kind, title) {
    const circle = make("circle", { cx: this.px(x), cy: this.py(y), r: 4, class: `dot ${kind}` });
    circle.append(make("title", {}, title));
    this.inside.append(circle);
  }

  upright(x, kind, text) {
    const at = this.px(x);
    this.inside.append(make("line", { x1: at, x2: at, y1: this.top, y2: this.bottom, class: `mark ${kind}` }));
    if (!text) return;
    const late = at > (this.left + this.right) / 2;
    const place = { x: at + (late ? -5 : 5), y: this.top + 14, "text-anchor": late ? "end" : "start", class: "note" };
    this.inside.append(make("text", place, text));
  }

  bar(x, low, high, kind) {
    this.inside.append(make("line", { x1: this.px(x), x2: this.px(x), y1: this.py(low), y2: this.py(high), class: `bar ${kind}` }));
  }

  cell(x0, x1, y0, y1, fill, title) {
    const place = { x: this.px(x0), y: this.py(y1), width: this.px(x1) - this.px(x0) + 0.6, height: this.py(y0) - this.py(y1) + 0.6 };
    const rect = make("rect", { ...place, class: fill });
    rect.append(make("title", {}, title));
    this.inside.append(rect);
  }
}
