// Pointer, keys and controls: what they do.

export function hands(my) {
  const { root, prefix, at, state, server } = my;

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
      if (!state.point || state.point.side !== side || state.point.token !== token) my.move(side, token);
    };
    stage.addEventListener("pointermove", go);
    stage.addEventListener("pointerdown", go);
    stage.addEventListener("click", (event) => { if (state.shown[side]) my.pin(side, tokenAt(side, event)); });
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
        my.move(side, y * width + x);
      } else if (event.key === "Enter" || event.key === " ") my.pin(side, token);
      else if (event.key === "Delete" || event.key === "Backspace") my.unpin(state.pins.length - 1);
      else if (event.key === "Escape") { state.point = state.row = null; my.draw(); }
      else return;
      event.preventDefault();
    });
    at[`${side}-picture`].addEventListener("change", (event) => my.choose(side, event.target.value));
  }

  for (const name of ["compare", "normalize", "size", "temperature", "timestep", "layers"]) {
    at[name].addEventListener("change", () => { at.head.value = ""; state.heads = null; state.segments = null; my.look().then(my.segmented); });
  }
  at.head.addEventListener("change", () => { state.heads ??= state.look.heads; my.look(); });
  at.statistic.addEventListener("change", () => { my.only(""); my.attempt(my.statistic); });
  at.strength.addEventListener("input", my.draw);
  for (const each of root.querySelectorAll(`input[name="${prefix}own"]`)) each.addEventListener("change", my.draw);
  for (const each of root.querySelectorAll(`input[name="${prefix}segments"]`)) each.addEventListener("change", () => { my.only(""); my.segmented(); });
  at["words-form"].addEventListener("submit", my.words);
  at["generate-form"].addEventListener("submit", my.generate);
  at["g-step"].addEventListener("input", my.frame);
  at["g-layer"].addEventListener("input", my.frame);
  at.collect.addEventListener("change", my.collect);
  at.file.addEventListener("change", () => { my.add([...at.file.files]); at.file.value = ""; });
  at.drop.hidden = !server.upload;
  root.addEventListener("dragover", (event) => { if (server.upload) event.preventDefault(); });
  root.addEventListener("drop", (event) => {
    if (!server.upload || !event.dataTransfer.files.length) return;
    event.preventDefault();
    my.add([...event.dataTransfer.files]);
  });
  at.swap.addEventListener("click", () => {
    [state.chosen.source, state.chosen.target] = [state.chosen.target, state.chosen.source];
    my.listed(state.pictures);
    my.fresh();
  });
  at.png.addEventListener("click", my.savePng);
  at.python.addEventListener("click", my.showPython);
  at.close.addEventListener("click", () => at.dialog.close());
  at.save.addEventListener("click", () => my.save(new Blob([at.code.textContent], { type: "text/x-python" }), "explore.py"));
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
}
