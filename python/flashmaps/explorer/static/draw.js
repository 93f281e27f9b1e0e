// Heat maps, segments and marks on canvases.

// Dark to bright, evenly in lightness, readable without colour vision.
const STOPS = {
  ember: [[12, 8, 26], [66, 16, 92], [140, 36, 96], [205, 70, 66], [245, 140, 50], [252, 244, 190]],
  sea: [[10, 18, 44], [22, 66, 110], [20, 120, 130], [60, 172, 118], [160, 214, 96], [250, 246, 170]],
};
const TABLES = {};
export const SEGMENT_COLOURS = [
  [230, 126, 74], [72, 142, 196], [104, 176, 92], [196, 98, 158], [226, 190, 74], [96, 190, 184],
  [160, 112, 206], [214, 84, 84], [138, 150, 66], [110, 110, 214], [222, 150, 170], [120, 160, 140],
];

function table(name) {
  if (!TABLES[name]) {
    const stops = STOPS[name];
    TABLES[name] = Array.from({ length: 256 }, (_, i) => {
      const at = (i / 255) * (stops.length - 1);
      const k = Math.min(Math.floor(at), stops.length - 2);
      return stops[k].map((low, c) => low + (stops[k + 1][c] - low) * (at - k));
    });
  }
  return TABLES[name];
}

// A small canvas of one pixel a token. Fading: little probability shows the picture instead.
export function heat(bytes, [height, width], { colours = "ember", fading = true } = {}) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const lut = table(colours);
  for (let i = 0; i < width * height; i++) {
    const value = bytes[i];
    const [r, g, b] = lut[value];
    image.data.set([r, g, b, fading ? 118 + value * 0.53 : value ? 205 : 0], i * 4);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// Segments in colours; `chosen` alone, if it is given.
export function regions(bytes, [height, width], chosen = null) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const label = bytes[i];
    const [r, g, b] = SEGMENT_COLOURS[label % SEGMENT_COLOURS.length];
    const edge =
      (i % width && bytes[i - 1] !== label) || (i >= width && bytes[i - width] !== label);
    const alpha = chosen !== null && chosen !== label ? 20 : edge ? 255 : 170;
    image.data.set([r, g, b, alpha], i * 4);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

// Fits a canvas to its box at the screen's resolution.
export function fit(canvas) {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const box = canvas.getBoundingClientRect();
  const width = Math.max(1, Math.round(box.width * ratio));
  const height = Math.max(1, Math.round(box.height * ratio));
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  return canvas.getContext("2d");
}

export function centre(token, [height, width]) {
  return [((token % width) + 0.5) / width, (Math.floor(token / width) + 0.5) / height];
}

// A ring around a place of the unit square, legible on anything; with a number or a sign in it.
export function mark(context, [x, y], { label = "", radius = 7, colour = "#fff", dashed = false } = {}) {
  const { width, height } = context.canvas;
  const scale = Math.min(window.devicePixelRatio || 1, 2);
  const [px, py, r] = [x * width, y * height, radius * scale];
  context.save();
  for (const [style, thick] of [["rgba(10,8,14,.85)", 4.5], [colour, 2]]) {
    context.beginPath();
    if (dashed) context.setLineDash([3.2 * scale, 2.6 * scale]);
    context.arc(px, py, r, 0, 2 * Math.PI);
    context.lineWidth = thick * scale;
    context.strokeStyle = style;
    context.stroke();
  }
  if (label) {
    context.font = `600 ${11 * scale}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineWidth = 3.5 * scale;
    context.strokeStyle = "rgba(10,8,14,.85)";
    const [tx, ty] = [px + (x > 0.9 ? -1 : 1) * (r + 8 * scale), py + (y < 0.1 ? 1 : -1) * r];
    context.strokeText(label, tx, ty);
    context.fillStyle = colour;
    context.fillText(label, tx, ty);
  }
  context.restore();
}

export function thread(context, from, to, colour) {
  const { width, height } = context.canvas;
  const scale = Math.min(window.devicePixelRatio || 1, 2);
  context.save();
  context.setLineDash([4 * scale, 4 * scale]);
  for (const [style, thick] of [["rgba(10,8,14,.7)", 3.5], [colour, 1.5]]) {
    context.beginPath();
    context.moveTo(from[0] * width, from[1] * height);
    context.lineTo(to[0] * width, to[1] * height);
    context.lineWidth = thick * scale;
    context.strokeStyle = style;
    context.stroke();
  }
  context.restore();
}

export const PIN_COLOURS = ["#ffb454", "#7fd4ff", "#b6f08a", "#ff9ac8", "#d9c2ff", "#fff3a8", "#8ff0dc", "#ff9d87"];

// Lines of mean entropy, one a layer, over the steps, each as a share of the most there can be.
export function chart(svg, means, bounds, chosen, step) {
  const [width, height, left, foot] = [280, 96, 4, 4];
  const steps = means[0].length;
  const x = (i) => left + (steps > 1 ? (i / (steps - 1)) * (width - 2 * left) : width / 2);
  const y = (share) => height - foot - share * (height - 2 * foot);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const add = (name, values) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(values)) node.setAttribute(key, value);
    svg.append(node);
  };
  add("line", { x1: x(step), x2: x(step), y1: 0, y2: height, class: "fm-now" });
  means.forEach((line, layer) => {
    const points = line.map((mean, i) => `${x(i)},${y(mean / bounds[layer])}`).join(" ");
    add("polyline", { points, class: layer === chosen ? "fm-line fm-chosen" : "fm-line" });
  });
  add("circle", { cx: x(step), cy: y(means[chosen][step] / bounds[chosen]), r: 3.5, class: "fm-dot" });
}
