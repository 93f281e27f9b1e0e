// Which pictures there are, and which two are looked at.

export function pictures(my) {
  const { at, state, server } = my;

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
        my.say(`Added ${file.name}`);
        added = true;
      } catch (error) {
        failed = error;
        break;
      }
    }
    if (added) await fresh();
    if (failed) my.fail(failed); // last, since looking anew takes old messages away
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
            my.attempt(async () => {
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
    my.pinned();
    await my.look();
    await my.segmented();
  }

  Object.assign(my, { url, listed, show, add, thumbs, choose, fresh });
}
