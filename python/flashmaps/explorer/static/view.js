// The view: two pictures, and where the tokens of each look. `server` answers its questions:
//   begin() and call(name, parameters, {data, signal}), each [values, bytes].
import { PIN_COLOURS, centre, chart, fit, heat, mark, regions, thread } from "./draw.js";
import { TEMPLATE } from "./template.js";

const COMPARE = { qk: "queries on keys", kk: "keys on keys", qq: "queries on queries", features: "features" };
let instances = 0;

export function mount(root, server) {
  const prefix = instances++ ? `fm${instances}-` : "fm-";
  root.innerHTML = TEMPLATE.replace(/\b(id|href|name|aria-[a-z]+)="(#?)fm-/g, `$1="$2${prefix}`);
  const at = {};
  for (const node of root.querySelectorAll("[data-id]")) at[node.dataset.id] = node;
  const other = (side) => (side === "source" ? "target" : "source");
  const state = {
    about: null, pictures: [], urls: new Map(), look: null, point: null, row: null, pins: [],
    statistic: null, segments: null, words: null, word: null, generation: null, frame: null, others: null,
    shown: { source: null, target: null }, chosen: { source: null, target: null }, again: null,
  };

  // -- telling ---------------------------------------------------------------------------------

  let saying;
  function say(text) {
    clearTimeout(saying);
    saying = setTimeout(() => { at.live.textContent = text; }, 250);
  }

  function fail(error, again = null) {
    if (error.name === "AbortError") return;
    at["alert-text"].textContent = error.message.replace(/^./, (c) => c.toUpperCase());
    at.alert.hidden = false;
    state.again = again;
    at.again.hidden = !again;
  }

  function waiting(sides, on) {
    for (const side of sides) {
      at[`${side}-wait`].hidden = !on;
      at[`${side}-stage`].setAttribute("aria-busy", String(on));
    }
  }

  // Runs what may fail, and tells what did; a way of looking that the server forgot is made anew.
  async function attempt(work, again = null) {
    try {
      return await work();
    } catch (error) {
      if (error.kind === "gone" && state.look && again !== look) {
        state.look = null;
        await look();
        return undefined;
      }
      fail(error, again);
      return undefined;
    }
  }

  // -- pictures --------------------------------------------------------------------------------

  async function url(id) {
    if (!state.urls.has(id)) {
      const [values, bytes] = await server.call("image", { picture: id });
      state.urls.set(id, URL.createObjectURL(new Blob([bytes], { type: values.type })));
    }
    return state.urls.get(id);
  }

  function listed(pictures) {
    state.pictures = pictures;
    for (const side of ["source", "target"]) {
      const select = at[`${side}-picture`];
      select.replaceChildren(...pictures.map((each) => new Option(each.name, each.id)));
      if (!pictures.some((each) => each.id === state.chosen[side])) {
        state.chosen[side] = pictures[Math.min(side === "source" ? 0 : 1, pictures.length - 1)].id;
      }
      select.value = state.chosen[side];
    }
    thumbs();
  }

  async function show(side) {
    const id = state.chosen[side];
    const each = state.pictures.find((one) => one.id === id);
    at[`${side}-stage`].style.aspectRatio = `${each.width} / ${each.height}`;
    at[`${side}-stage`].style.setProperty("--ratio", each.width / each.height);
    at[`${side}-stage`].setAttribute("aria-label", `${side === "source" ? "Source" : "Target"}: ${each.name}`);
    at[`${side}-image`].src = await url(id);
    await at[`${side}-image`].decode().catch(() => {});
  }

  async function add(files) {
    let added = false;
    let failed = null;
    for (const file of files) {
      try {
        const data = new Uint8Array(await file.arrayBuffer());
        const [values] = await server.call("upload", { name: file.name.slice(-200) }, { data });
        state.chosen.source = values.picture;
        listed(values.pictures);
        say(`Added ${file.name}`);
        added = true;
      } catch (error) {
        failed = error;
        break;
      }
    }
    if (added) await fresh();
    if (failed) fail(failed); // last, since looking anew takes old messages away
  }

  function thumbs() {
    at.thumbs.replaceChildren(
      ...state.pictures.map((each) => {
        const item = document.createElement("li");
        const button = document.createElement("button");
        button.type = "button";
        button.dataset.picture = each.id;
        button.setAttribute("aria-pressed", String(each.id === state.chosen.target));
        button.setAttribute("aria-label", `Look in ${each.name}`);
        const image = document.createElement("img");
        image.alt = "";
        url(each.id).then((found) => { image.src = found; }, () => {});
        const canvas = document.createElement("canvas");
        const name = document.createElement("span");
        name.textContent = each.name;
        button.append(image, canvas, name);
        button.addEventListener("click", () => choose("target", each.id));
        item.append(button);
        if (each.own) {
          const remove = document.createElement("button");
          remove.type = "button";
          remove.className = "fm-remove";
          remove.textContent = "×";
          remove.setAttribute("aria-label", `Remove ${each.name}`);
          remove.addEventListener("click", () =>
            attempt(async () => {
              const [values] = await server.call("forget", { picture: each.id });
              URL.revokeObjectURL(state.urls.get(each.id));
              state.urls.delete(each.id);
              listed(values.pictures);
              await fresh();
            }));
          item.append(remove);
        }
        return item;
      }),
    );
  }

  function choose(side, id) {
    state.chosen[side] = id;
    at[`${side}-picture`].value = id;
    thumbs();
    return fresh();
  }

  // Pictures have changed: what lay over them is gone.
  async function fresh() {
    Object.assign(state, { pins: [], point: null, row: null, words: null, word: null, segments: null, frame: null });
    at.words.replaceChildren();
    pinned();
    await look();
    await segmented();
  }

  // -- looking ---------------------------------------------------------------------------------

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
    waiting(["source", "target"], true);
    try {
      await Promise.all([show("source"), show("target")]);
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
      for (const pin of state.pins) Object.assign(pin, await pinOf(pin));
      pinned();
      if (state.point) move(state.point.side, state.point.token, true);
      if (at.collect.checked) await collect();
      draw();
      root.dataset.ready = String(mine);
    } catch (error) {
      if (mine === looking) fail(error, look);
    } finally {
      if (mine === looking) waiting(["source", "target"], false);
    }
  }

  // One question is on its way at a time: a newer place calls the older one off.
  let asked = null;
  async function move(side, token, quiet = false) {
    state.point = { side, token };
    draw();
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
      draw();
      told(values, quiet);
      // Drawn in the next frame, before this: from the pointer to the picture.
      requestAnimationFrame(() => { root.dataset.latency = (performance.now() - began).toFixed(1); });
      root.dataset.token = `${side}:${token}`;
      if (at.collect.checked && side === "source" && state.others) {
        const [found, data] = await server.call("others", { look: state.look.look, token }, { signal: control.signal });
        spread(found, data);
      }
    } catch (error) {
      if (error.kind === "gone") await look();
      else if (error.kind !== "busy") fail(error);
    } finally {
      if (asked === control) asked = null;
    }
  }

  const place = (token, [height, width]) => `row ${Math.floor(token / width) + 1}, column ${(token % width) + 1}`;
  function told(values, quiet) {
    const [here, there] = [state.shown[values.side], state.shown[other(values.side)]];
    const steps = Math.round(values.distance * Math.max(...here));
    const home = values.home === values.token ? "to itself" : `${steps} ${steps === 1 ? "token" : "tokens"} away`;
    at["r-token"].textContent = place(values.token, here).replace("row ", "").replace(" column ", " ");
    at["r-max"].textContent = values.max >= 0.001 ? values.max.toPrecision(2) : values.max.toExponential(1);
    at["r-entropy"].textContent = `${values.entropy.toFixed(2)} nats`;
    at["r-back"].textContent = home;
    if (quiet) return;
    say(`${values.side}, ${place(values.token, here)}. Looks most at ${place(values.best, there)} of the ${other(values.side)}, probability ${values.max.toPrecision(2)}. Comes back ${home}.`);
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
      say(`${label} over the ${values.side}: ${digits(values.low)} to ${digits(values.high)} ${unit}`);
    }
    draw();
  }

  // -- pins ------------------------------------------------------------------------------------

  async function pinOf({ side, token }) {
    const [values] = await server.call("pin", { look: state.look.look, side, token });
    return values;
  }

  async function pin(side, token) {
    if (!state.look) return;
    waiting([other(side)], true);
    await attempt(async () => {
      state.pins.push(await pinOf({ side, token }));
      if (state.pins.length > PIN_COLOURS.length) state.pins.shift();
      pinned();
      draw();
      const last = state.pins.at(-1);
      say(`Pin ${state.pins.length}: ${place(token, state.shown[side])} of the ${side} matches ${place(last.best, state.shown[other(side)])}, ${last.calibrated ? "confidence" : "return probability"} ${last.confidence.toFixed(2)}.`);
    });
    waiting([other(side)], false);
  }

  function pinned() {
    at.pins.replaceChildren(
      ...state.pins.map((each, k) => {
        const item = document.createElement("li");
        const dot = document.createElement("b");
        dot.textContent = k + 1;
        dot.style.setProperty("--pin", PIN_COLOURS[k]);
        const text = document.createElement("span");
        const back = each.home === each.token ? "comes back to itself" : `comes back ${each.distance.toFixed(2)} away`;
        text.textContent = `${each.side} ${place(each.token, state.shown[each.side])} → ${place(each.best, state.shown[other(each.side)])} · ${each.calibrated ? "confidence" : "return probability"} ${each.confidence.toFixed(2)} · ${back}`;
        const remove = document.createElement("button");
        remove.type = "button";
        remove.textContent = "×";
        remove.setAttribute("aria-label", `Remove pin ${k + 1}`);
        remove.addEventListener("click", () => unpin(k));
        item.append(dot, text, remove);
        return item;
      }),
    );
  }

  function unpin(k) {
    state.pins.splice(k, 1);
    pinned();
    draw();
  }

  // -- a collection ----------------------------------------------------------------------------

  async function collect() {
    state.others = null;
    for (const canvas of at.thumbs.querySelectorAll("canvas")) canvas.width = canvas.width;
    if (!at.collect.checked || !state.look) return;
    await attempt(async () => {
      const [values] = await server.call("collect", { look: state.look.look });
      state.others = values;
      if (state.point && state.point.side === "source") await move("source", state.point.token, true);
      else say("Point at the source to see the same part in all pictures");
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

  // -- words, segments, generation ---------------------------------------------------------------

  function only(kind) {
    if (kind !== "word") state.word = null;
    if (kind !== "frame") state.frame = null;
    for (const each of at.words.children) each.setAttribute("aria-pressed", String(each.dataset.index === String(state.word)));
  }

  async function words(event) {
    event.preventDefault();
    waiting(["source"], true);
    await attempt(async () => {
      const prompt = at.prompt.value;
      const [values, bytes] = await server.call("words", { picture: state.chosen.source, prompt, ...view() });
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
            draw();
          });
          return button;
        }),
      );
      state.word = 0;
      only("word");
      draw();
      say(`Maps of ${values.words.length} words; the first is shown`);
    });
    waiting(["source"], false);
  }

  const segmentLevel = () => root.querySelector(`input[name="${prefix}segments"]:checked`).value;
  async function segmented() {
    if (segmentLevel() === "") { draw(); return; }
    if (!state.segments) {
      waiting(["source"], true);
      await attempt(async () => {
        const { head, compare, temperature, normalize, ...seen } = view();
        const [values, bytes] = await server.call("segments", { picture: state.chosen.source, ...seen });
        state.segments = { ...values, bytes };
        say(values.levels.map((each) => `${each.count} ${each.name}`).join(", "));
      });
      waiting(["source"], false);
    }
    draw();
  }

  async function generate(event) {
    event.preventDefault();
    waiting(["source"], true);
    const button = at["generate-form"].querySelector("button");
    button.disabled = true;
    await attempt(async () => {
      const [values] = await server.call("generate", { prompt: at["g-prompt"].value, steps: Number(at["g-steps"].value), seed: Number(at["g-seed"].value) });
      state.generation = values;
      state.chosen.source = values.picture;
      listed(values.pictures);
      at["g-step"].max = values.steps - 1;
      at["g-step"].value = values.steps - 1;
      at["g-layer"].max = values.layers.length - 1;
      at["g-layer"].value = Math.min(2, values.layers.length - 1);
      at.generation.hidden = false;
      await fresh();
      await frame();
    });
    button.disabled = false;
    waiting(["source"], false);
  }

  async function frame() {
    const [layer, step] = [Number(at["g-layer"].value), Number(at["g-step"].value)];
    const { layers, means, bounds, timesteps, picture } = state.generation;
    chart(at.chart, means, bounds, layer, step);
    at["g-told"].textContent = `${layers[layer]}, step ${step + 1} (timestep ${timesteps[step]}): ${means[layer][step].toFixed(2)} of at most ${bounds[layer].toFixed(2)} nats`;
    at["g-step"].setAttribute("aria-valuetext", `step ${step + 1} of ${means[0].length}, ${means[layer][step].toFixed(2)} nats`);
    at["g-layer"].setAttribute("aria-valuetext", layers[layer]);
    if (state.chosen.source !== picture) return;
    await attempt(async () => {
      const [values, bytes] = await server.call("frame", { layer, step });
      state.frame = { ...values, bytes };
      only("frame");
      draw();
    });
  }

  // -- drawing ---------------------------------------------------------------------------------

  function layerOf(side) {
    const own = root.querySelector(`input[name="${prefix}own"]:checked`).value;
    const { row, point } = state;
    if (side === "source" && state.frame) return heat(state.frame.bytes, state.frame.grid, { colours: "sea", fading: false });
    if (side === "source" && state.word !== null) {
      const size = state.words.grid[0] * state.words.grid[1];
      return heat(state.words.bytes.subarray(state.word * size, (state.word + 1) * size), state.words.grid);
    }
    if (state.statistic && state.statistic.side === side) return heat(state.statistic.bytes, state.statistic.grid, { colours: "sea", fading: false });
    if (side === "source" && state.segments && segmentLevel() !== "") {
      const [height, width] = state.segments.size;
      const level = Math.min(Number(segmentLevel()), state.segments.levels.length - 1);
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

  // -- saving ----------------------------------------------------------------------------------

  function save(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function savePng() {
    const height = 640;
    const sizes = ["source", "target"].map((side) => {
      const image = at[`${side}-image`];
      return Math.round((height * image.naturalWidth) / image.naturalHeight);
    });
    const canvas = document.createElement("canvas");
    canvas.width = sizes[0] + sizes[1] + 16;
    canvas.height = height;
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, height);
    ["source", "target"].forEach((side, k) => {
      const left = k * (sizes[0] + 16);
      for (const part of ["image", "heat", "marks"]) context.drawImage(at[`${side}-${part}`], left, 0, sizes[k], height);
    });
    canvas.toBlob((blob) => save(blob, "flashmaps.png"), "image/png");
  }

  function showPython() {
    return attempt(async () => {
      const parameters = { look: state.look.look };
      if (state.point) Object.assign(parameters, state.point);
      if (state.frame) Object.assign(parameters, { layer: Number(at["g-layer"].value), step: Number(at["g-step"].value) });
      else if (state.word !== null) Object.assign(parameters, { prompt: state.words.prompt, word: state.words.words[state.word] });
      else if (state.statistic) parameters.statistic = state.statistic.name;
      else if (state.segments && segmentLevel() !== "") parameters.level = Math.min(Number(segmentLevel()), state.segments.levels.length - 1);
      const [values] = await server.call("script", parameters);
      at.code.textContent = values.python;
      at.dialog.showModal();
    });
  }

  // -- hands -----------------------------------------------------------------------------------

  function tokenAt(side, event) {
    const box = at[`${side}-stage`].getBoundingClientRect();
    const [height, width] = state.shown[side];
    const x = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 0.999999);
    const y = Math.min(Math.max((event.clientY - box.top) / box.height, 0), 0.999999);
    return Math.floor(y * height) * width + Math.floor(x * width);
  }

  for (const side of ["source", "target"]) {
    const stage = at[`${side}-stage`];
    const go = (event) => {
      if (!state.shown[side]) return;
      const token = tokenAt(side, event);
      if (!state.point || state.point.side !== side || state.point.token !== token) move(side, token);
    };
    stage.addEventListener("pointermove", go);
    stage.addEventListener("pointerdown", go);
    stage.addEventListener("click", (event) => { if (state.shown[side]) pin(side, tokenAt(side, event)); });
    stage.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 4 : 1;
      const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
      if (!state.shown[side] || event.ctrlKey || event.metaKey || event.altKey) return;
      const [height, width] = state.shown[side];
      const own = state.point && state.point.side === side;
      const token = own ? state.point.token : Math.floor(height / 2) * width + Math.floor(width / 2);
      if (moves[event.key]) {
        const [dx, dy] = own ? moves[event.key] : [0, 0];
        const x = Math.min(Math.max((token % width) + dx, 0), width - 1);
        const y = Math.min(Math.max(Math.floor(token / width) + dy, 0), height - 1);
        move(side, y * width + x);
      } else if (event.key === "Enter" || event.key === " ") pin(side, token);
      else if (event.key === "Delete" || event.key === "Backspace") unpin(state.pins.length - 1);
      else if (event.key === "Escape") { state.point = state.row = null; draw(); }
      else return;
      event.preventDefault();
    });
    at[`${side}-picture`].addEventListener("change", (event) => choose(side, event.target.value));
  }

  for (const name of ["compare", "normalize", "size", "temperature", "timestep", "layers"]) {
    at[name].addEventListener("change", () => { at.head.value = ""; state.heads = null; state.segments = null; look().then(segmented); });
  }
  at.head.addEventListener("change", () => { state.heads ??= state.look.heads; look(); });
  at.statistic.addEventListener("change", () => { only(""); attempt(statistic); });
  at.strength.addEventListener("input", draw);
  for (const each of root.querySelectorAll(`input[name="${prefix}own"]`)) each.addEventListener("change", draw);
  for (const each of root.querySelectorAll(`input[name="${prefix}segments"]`)) each.addEventListener("change", () => { only(""); segmented(); });
  at["words-form"].addEventListener("submit", words);
  at["generate-form"].addEventListener("submit", generate);
  at["g-step"].addEventListener("input", frame);
  at["g-layer"].addEventListener("input", frame);
  at.collect.addEventListener("change", collect);
  at.file.addEventListener("change", () => { add([...at.file.files]); at.file.value = ""; });
  at.drop.hidden = !server.upload;
  root.addEventListener("dragover", (event) => { if (server.upload) event.preventDefault(); });
  root.addEventListener("drop", (event) => {
    if (!server.upload || !event.dataTransfer.files.length) return;
    event.preventDefault();
    add([...event.dataTransfer.files]);
  });
  at.swap.addEventListener("click", () => {
    [state.chosen.source, state.chosen.target] = [state.chosen.target, state.chosen.source];
    listed(state.pictures);
    fresh();
  });
  at.png.addEventListener("click", savePng);
  at.python.addEventListener("click", showPython);
  at.close.addEventListener("click", () => at.dialog.close());
  at.save.addEventListener("click", () => save(new Blob([at.code.textContent], { type: "text/x-python" }), "explore.py"));
  at.copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(at.code.textContent).then(() => { at.copy.textContent = "Copied"; }, () => { at.copy.textContent = "Select it above"; });
    setTimeout(() => { at.copy.textContent = "Copy"; }, 1500);
  });
  at.dismiss.addEventListener("click", () => { at.alert.hidden = true; });
  at.again.addEventListener("click", () => { at.alert.hidden = true; if (state.again) state.again(); });
  at.theme.addEventListener("click", () => {
    const dark = getComputedStyle(root).getPropertyValue("--dark").trim() === "1";
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("flashmaps-theme", root.dataset.theme); } catch { /* not kept then */ }
  });
  try {
    const kept = localStorage.getItem("flashmaps-theme");
    if (kept) root.dataset.theme = kept;
  } catch { /* no storage here */ }
  const watch = new ResizeObserver(draw);
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
      listed(about.pictures);
      await look();
    } catch (error) {
      fail(error, start);
    }
  }
  start();
  return () => {
    watch.disconnect();
    for (const each of state.urls.values()) URL.revokeObjectURL(each);
  };
}
