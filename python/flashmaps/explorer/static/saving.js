// What is seen, as a PNG and as the Python that makes it.

export function saving(my) {
  const { at, state, server } = my;

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
    return my.attempt(async () => {
      const parameters = { look: state.look.look };
      if (state.point) Object.assign(parameters, state.point);
      if (state.frame) Object.assign(parameters, { layer: Number(at["g-layer"].value), step: Number(at["g-step"].value) });
      else if (state.word !== null) Object.assign(parameters, { prompt: state.words.prompt, word: state.words.words[state.word] });
      else if (state.statistic) parameters.statistic = state.statistic.name;
      else if (state.segments && my.segmentLevel() !== "") parameters.level = Math.min(Number(my.segmentLevel()), state.segments.levels.length - 1);
      const [values] = await server.call("script", parameters);
      at.code.textContent = values.python;
      at.dialog.showModal();
    });
  }

  Object.assign(my, { save, savePng, showPython });
}
