// What happened, told: a line for screen readers, an alert, a picture that waits.

export const other = (side) => (side === "source" ? "target" : "source");

export function telling(my) {
  const { at, state } = my;

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
      if (error.kind === "gone" && state.look && again !== my.look) {
        state.look = null;
        await my.look();
        return undefined;
      }
      fail(error, again);
      return undefined;
    }
  }

  Object.assign(my, { say, fail, waiting, attempt });
}
