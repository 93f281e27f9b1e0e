// Heat maps and marks over the two pictures.
import { PIN_COLOURS, centre, fit, heat, mark, regions, thread } from "./draw.js";

export function painting(my) {
  const { root, prefix, at, state } = my;

  function layerOf(side) {
    const own = root.querySelector(`input[name="${prefix}own"]:checked`).value;
    const { row, point } = state;
    if (side === "source" && state.frame) return heat(state.frame.bytes, state.frame.grid, { colours: "sea", fading: false });
    if (side === "source" && state.word !== null) {
      const size = state.words.grid[0] * state.words.grid[1];
      return heat(state.words.bytes.subarray(state.word * size, (state.word + 1) * size), state.words.grid);
    }
    if (state.statistic && state.statistic.side === side) return heat(state.statistic.bytes, state.statistic.grid, { colours: "sea", fading: false });
    if (side === "source" && state.segments && my.segmentLevel() !== "") {
      const [height, width] = state.segments.size;
      const level = Math.min(Number(my.segmentLevel()), state.segments.levels.length - 1);
      const bytes = state.segments.bytes.subarray(level * height * width, (level + 1) * height * width);
      let chosen = null;
      if (point && point.side === "source" && state.look) {
        const [x, y] = centre(point.token, state.shown.source);
        chosen = bytes[Math.floor(y * height) * width + Math.floor(x * width)];
      }
      return regions(bytes, state.segments.size, chosen);
    }
    if (!row || !point) return null;
    if (row.side !== side) return heat(row.there, state.shown[side]);
    if (own === "none") return null;
    return heat(own === "back" ? row.back : row.itself, state.shown[side]);
  }

  function paint(side) {
    const context = fit(at[`${side}-heat`]);
    const { width, height } = context.canvas;
    context.clearRect(0, 0, width, height);
    const layer = layerOf(side);
    if (layer) {
      context.globalAlpha = Number(at.strength.value) / 100;
      context.imageSmoothingQuality = "high";
      context.drawImage(layer, 0, 0, width, height);
      context.globalAlpha = 1;
    }
  }

  function marks(side) {
    const context = fit(at[`${side}-marks`]);
    context.clearRect(0, 0, context.canvas.width, context.canvas.height);
    const grid = state.shown[side];
    if (!grid) return;
    state.pins.forEach((each, k) => {
      const colour = PIN_COLOURS[k];
      if (each.side === side) {
        const [here, home] = [centre(each.token, grid), centre(each.home, grid)];
        if (each.home !== each.token) {
          thread(context, here, home, colour);
          mark(context, home, { radius: 4, colour, dashed: true });
        }
        mark(context, here, { label: `${k + 1}`, colour });
      } else mark(context, each.place, { label: `${k + 1}`, colour });
    });
    const { row, point } = state;
    if (point && point.side === side) mark(context, centre(point.token, grid), { radius: 6 });
    if (row && point && row.side !== side) mark(context, centre(row.best, grid), { radius: 6 });
    if (row && point && row.side === side && row.home !== row.token) mark(context, centre(row.home, grid), { radius: 4, dashed: true });
  }

  let drawing = 0;
  function draw() {
    if (drawing) return;
    drawing = requestAnimationFrame(() => {
      drawing = 0;
      for (const side of ["source", "target"]) { paint(side); marks(side); }
    });
  }

  Object.assign(my, { layerOf, paint, marks, draw });
}
