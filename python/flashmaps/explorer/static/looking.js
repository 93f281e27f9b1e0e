// Where a token looks: asked as the pointer moves, and told.
import { other } from "./telling.js";

export const place = (token, [height, width]) => `row ${Math.floor(token / width) + 1}, column ${(token % width) + 1}`;

export function looking(my) {
  const { root, at, state, server } = my;

  function view() {
    const several = (text) => {
      const found = text.split(/[\s,;]+/).filter(Boolean).map(Number);
      return found.length ? found : null;
    };
    const own = (id) => (at[id].value === "" ? null : at[id].value);
    const layers = [...at.layers.querySelectorAll("input")].filter((each) => each.checked).map((each) => each.value);
    return {
      layers: layers.length === state.about.model.own.layers.length && layers.every((each) => state.about.model.own.layers.includes(each)) ? null : layers,
      timestep: several(at.timestep.value),
      size: own("size") === null ? null : Number(own("size")),
      head: own("head") === null ? null : Number(own("head")),
      compare: own("compare"),
      temperature: at.temperature.value.trim() === "" ? null : Number(at.temperature.value.replace(",", ".")),
      normalize: own("normalize"),
    };
  }

  let looking = 0;
  async function look() {
    const mine = ++looking;
    my.waiting(["source", "target"], true);
    try {
      await Promise.all([my.show("source"), my.show("target")]);
      const [values] = await server.call("look", { ...state.chosen, ...view() });
      if (mine !== looking) return;
      state.look = values;
      state.shown = { source: values.source_grid, target: values.target_grid };
      at.alert.hidden = true;
      const head = at.head.value;
      at.head.replaceChildren(new Option("mean of all", ""), ...Array.from({ length: state.heads ?? values.heads }, (_, k) => new Option(`${k + 1}`, k)));
      at.head.value = head;
      state.others = null;
      state.row = null;
      await statistic();
      for (const pin of state.pins) Object.assign(pin, await my.pinOf(pin));
      my.pinned();
      if (state.point) move(state.point.side, state.point.token, true);
      if (at.collect.checked) await my.collect();
      my.draw();
      root.dataset.ready = String(mine);
    } catch (error) {
      if (mine === looking) my.fail(error, look);
    } finally {
      if (mine === looking) my.waiting(["source", "target"], false);
    }
  }

  // One question is on its way at a time: a newer place calls the older one off.
  let asked = null;
  async function move(side, token, quiet = false) {
    state.point = { side, token };
    my.draw();
    if (!state.look) return;
    if (asked) asked.abort();
    const control = new AbortController();
    asked = control;
    const began = performance.now();
    try {
      const [values, bytes] = await server.call("row", { look: state.look.look, side, token }, { signal: control.signal });
      if (control.signal.aborted) return;
      const [first, second] = values.sizes;
      state.row = { ...values, itself: bytes.subarray(0, first), there: bytes.subarray(first, first + second), back: bytes.subarray(first + second) };
      my.draw();
      told(values, quiet);
      // Drawn in the next frame, before this: from the pointer to the picture.
      requestAnimationFrame(() => { root.dataset.latency = (performance.now() - began).toFixed(1); });
      root.dataset.token = `${side}:${token}`;
      if (at.collect.checked && side === "source" && state.others) {
        const [found, data] = await server.call("others", { look: state.look.look, token }, { signal: control.signal });
        my.spread(found, data);
      }
    } catch (error) {
      if (error.kind === "gone") await look();
      else if (error.kind !== "busy") my.fail(error);
    } finally {
      if (asked === control) asked = null;
    }
  }

  function told(values, quiet) {
    const [here, there] = [state.shown[values.side], state.shown[other(values.side)]];
    const steps = Math.round(values.distance * Math.max(...here));
    const home = values.home === values.token ? "to itself" : `${steps} ${steps === 1 ? "token" : "tokens"} away`;
    at["r-token"].textContent = place(values.token, here).replace("row ", "").replace(" column ", " ");
    at["r-max"].textContent = values.max >= 0.001 ? values.max.toPrecision(2) : values.max.toExponential(1);
    at["r-entropy"].textContent = `${values.entropy.toFixed(2)} nats`;
    at["r-back"].textContent = home;
    if (quiet) return;
    my.say(`${values.side}, ${place(values.token, here)}. Looks most at ${place(values.best, there)} of the ${other(values.side)}, probability ${values.max.toPrecision(2)}. Comes back ${home}.`);
  }

  async function statistic() {
    const name = at.statistic.value;
    state.statistic = null;
    at.scale.hidden = true;
    if (name && state.look) {
      const [values, bytes] = await server.call("statistic", { look: state.look.look, name });
      state.statistic = { ...values, bytes };
      const { label, unit } = state.about.statistics[name];
      const digits = (x) => (x === null ? "none" : Math.abs(x) >= 100 ? x.toFixed(0) : x.toPrecision(3));
      at.low.textContent = digits(values.low);
      at.high.textContent = `${digits(values.high)} ${unit}`;
      at.scale.hidden = false;
      my.say(`${label} over the ${values.side}: ${digits(values.low)} to ${digits(values.high)} ${unit}`);
    }
    my.draw();
  }

  Object.assign(my, { view, look, move, told, statistic });
}
