// The same part in all pictures.
import { centre, fit, heat, mark } from "./draw.js";

export function collection(my) {
  const { root, at, state, server } = my;

  async function collect() {
    state.others = null;
    for (const canvas of at.thumbs.querySelectorAll("canvas")) canvas.width = canvas.width;
    if (!at.collect.checked || !state.look) return;
    await my.attempt(async () => {
      const [values] = await server.call("collect", { look: state.look.look });
      state.others = values;
      if (state.point && state.point.side === "source") await my.move("source", state.point.token, true);
      else my.say("Point at the source to see the same part in all pictures");
    });
  }

  function spread(found, data) {
    let offset = 0;
    found.others.forEach((id, k) => {
      const bytes = data.subarray(offset, offset + found.sizes[k]);
      offset += found.sizes[k];
      const canvas = at.thumbs.querySelector(`[data-picture="${id}"] canvas`);
      if (!canvas) return;
      const grid = state.others.grids[state.others.others.indexOf(id)];
      const context = fit(canvas);
      context.clearRect(0, 0, canvas.width, canvas.height);
      context.globalAlpha = 0.85;
      context.drawImage(heat(bytes, grid), 0, 0, canvas.width, canvas.height);
      context.globalAlpha = 1;
      mark(context, centre(found.best[k], grid), { radius: 4 });
    });
    root.dataset.others = String(found.others.length);
  }

  Object.assign(my, { collect, spread });
}
