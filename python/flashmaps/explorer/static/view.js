// The view: two pictures, and where the tokens of each look. `server` answers its questions:
//   begin() and call(name, parameters, {data, signal}), each [values, bytes].
import { collection } from "./collection.js";
import { hands } from "./hands.js";
import { looking } from "./looking.js";
import { over } from "./over.js";
import { painting } from "./painting.js";
import { pictures } from "./pictures.js";
import { pins } from "./pins.js";
import { saving } from "./saving.js";
import { telling } from "./telling.js";
import { TEMPLATE } from "./template.js";

const COMPARE = { qk: "queries on keys", kk: "keys on keys", qq: "queries on queries", features: "features" };
let instances = 0;

export function mount(root, server) {
  const prefix = instances++ ? `fm${instances}-` : "fm-";
  root.innerHTML = TEMPLATE.replace(/\b(id|href|name|aria-[a-z]+)="(#?)fm-/g, `$1="$2${prefix}`);
  const at = {};
  for (const node of root.querySelectorAll("[data-id]")) at[node.dataset.id] = node;
  const state = {
    about: null, pictures: [], urls: new Map(), look: null, point: null, row: null, pins: [],
    statistic: null, segments: null, words: null, word: null, generation: null, frame: null, others: null,
    shown: { source: null, target: null }, chosen: { source: null, target: null }, again: null,
  };
  // What the files share: each adds its functions to it, and calls those of the others through it.
  const my = { root, server, prefix, at, state };
  for (const part of [telling, pictures, looking, pins, collection, over, painting, saving, hands]) part(my);
  const watch = new ResizeObserver(my.draw);
  watch.observe(at["source-stage"]);
  watch.observe(at["target-stage"]);

  async function start() {
    try {
      const [about] = await server.begin();
      state.about = about;
      const { own } = about.model;
      at.model.textContent = about.model.name;
      const options = (id, values, none) =>
        at[id].replaceChildren(...(none === null ? [] : [new Option(none, "")]), ...values.map(([value, text]) => new Option(text, value)));
      options("compare", about.model.compare.filter((each) => each !== own.compare).map((each) => [each, COMPARE[each]]), COMPARE[own.compare]);
      options("normalize", about.model.normalize.filter((each) => each !== own.normalize).map((each) => [each, each]), own.normalize);
      options("size", about.model.sizes.filter((each) => each !== own.size).map((each) => [each, each]), `${own.size}`);
      options("statistic", Object.entries(about.statistics).map(([name, { label, side }]) => [name, `${label} (${side})`]), "none");
      at.timestep.placeholder = own.timestep.join(", ");
      if (own.temperature) at.temperature.placeholder = String(own.temperature);
      at.layers.replaceChildren(
        ...about.model.layers.map((name) => {
          const label = document.createElement("label");
          const box = document.createElement("input");
          box.type = "checkbox";
          box.value = name;
          box.checked = own.layers.includes(name);
          const text = document.createElement("span");
          text.textContent = name.replace(".transformer_blocks", "").replace(".attentions", "").replace(".attn1", "");
          label.append(box, text);
          return label;
        }),
      );
      my.listed(about.pictures);
      await my.look();
    } catch (error) {
      my.fail(error, start);
    }
  }
  start();
  return () => {
    watch.disconnect();
    for (const each of state.urls.values()) URL.revokeObjectURL(each);
  };
}
