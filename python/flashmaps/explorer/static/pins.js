// Pins: tokens whose match, confidence and way back stay drawn.
import { PIN_COLOURS } from "./draw.js";
import { place } from "./looking.js";
import { other } from "./telling.js";

export function pins(my) {
  const { at, state, server } = my;

  async function pinOf({ side, token }) {
    const [values] = await server.call("pin", { look: state.look.look, side, token });
    return values;
  }

  async function pin(side, token) {
    if (!state.look) return;
    my.waiting([other(side)], true);
    await my.attempt(async () => {
      state.pins.push(await pinOf({ side, token }));
      if (state.pins.length > PIN_COLOURS.length) state.pins.shift();
      pinned();
      my.draw();
      const last = state.pins.at(-1);
      my.say(`Pin ${state.pins.length}: ${place(token, state.shown[side])} of the ${side} matches ${place(last.best, state.shown[other(side)])}, ${last.calibrated ? "confidence" : "return probability"} ${last.confidence.toFixed(2)}.`);
    });
    my.waiting([other(side)], false);
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
    my.draw();
  }

  Object.assign(my, { pinOf, pin, pinned, unpin });
}
