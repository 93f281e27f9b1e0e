// What lies over the source: maps of words, segments, a generation's steps.
import { chart } from "./draw.js";

export function over(my) {
  const { root, prefix, at, state, server } = my;

  function only(kind) {
    if (kind !== "word") state.word = null;
    if (kind !== "frame") state.frame = null;
    for (const each of at.words.children) each.setAttribute("aria-pressed", String(each.dataset.index === String(state.word)));
  }

  async function words(event) {
    event.preventDefault();
    my.waiting(["source"], true);
    await my.attempt(async () => {
      const prompt = at.prompt.value;
      const [values, bytes] = await server.call("words", { picture: state.chosen.source, prompt, ...my.view() });
      state.words = { ...values, bytes, prompt };
      at.words.replaceChildren(
        ...values.words.map((word, k) => {
          const button = document.createElement("button");
          button.type = "button";
          button.textContent = word;
          button.dataset.index = k;
          button.setAttribute("aria-pressed", "false");
          button.addEventListener("click", () => {
            state.word = state.word === k ? null : k;
            only("word");
            my.draw();
          });
          return button;
        }),
      );
      state.word = 0;
      only("word");
      my.draw();
      my.say(`Maps of ${values.words.length} words; the first is shown`);
    });
    my.waiting(["source"], false);
  }

  const segmentLevel = () => root.querySelector(`input[name="${prefix}segments"]:checked`).value;
  async function segmented() {
    if (segmentLevel() === "") { my.draw(); return; }
    if (!state.segments) {
      my.waiting(["source"], true);
      await my.attempt(async () => {
        const { head, compare, temperature, normalize, ...seen } = my.view();
        const [values, bytes] = await server.call("segments", { picture: state.chosen.source, ...seen });
        state.segments = { ...values, bytes };
        my.say(values.levels.map((each) => `${each.count} ${each.name}`).join(", "));
      });
      my.waiting(["source"], false);
    }
    my.draw();
  }

  async function generate(event) {
    event.preventDefault();
    my.waiting(["source"], true);
    const button = at["generate-form"].querySelector("button");
    button.disabled = true;
    await my.attempt(async () => {
      const [values] = await server.call("generate", { prompt: at["g-prompt"].value, steps: Number(at["g-steps"].value), seed: Number(at["g-seed"].value) });
      state.generation = values;
      state.chosen.source = values.picture;
      my.listed(values.pictures);
      at["g-step"].max = values.steps - 1;
      at["g-step"].value = values.steps - 1;
      at["g-layer"].max = values.layers.length - 1;
      at["g-layer"].value = Math.min(2, values.layers.length - 1);
      at.generation.hidden = false;
      await my.fresh();
      await frame();
    });
    button.disabled = false;
    my.waiting(["source"], false);
  }

  async function frame() {
    const [layer, step] = [Number(at["g-layer"].value), Number(at["g-step"].value)];
    const { layers, means, bounds, timesteps, picture } = state.generation;
    chart(at.chart, means, bounds, layer, step);
    at["g-told"].textContent = `${layers[layer]}, step ${step + 1} (timestep ${timesteps[step]}): ${means[layer][step].toFixed(2)} of at most ${bounds[layer].toFixed(2)} nats`;
    at["g-step"].setAttribute("aria-valuetext", `step ${step + 1} of ${means[0].length}, ${means[layer][step].toFixed(2)} nats`);
    at["g-layer"].setAttribute("aria-valuetext", layers[layer]);
    if (state.chosen.source !== picture) return;
    await my.attempt(async () => {
      const [values, bytes] = await server.call("frame", { layer, step });
      state.frame = { ...values, bytes };
      only("frame");
      my.draw();
    });
  }

  Object.assign(my, { only, words, segmented, generate, frame, segmentLevel });
}
