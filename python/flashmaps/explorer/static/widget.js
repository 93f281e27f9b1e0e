// The view in a notebook: asks the kernel by the widget's messages, one after the other.
import { mount } from "./view.js";

function render({ model, el }) {
  el.classList.add("fm-notebook");
  const root = document.createElement("div");
  root.className = "fm-explorer";
  el.append(root);
  const pending = new Map();
  let number = 0;
  let tail = Promise.resolve();
  const mine = Math.random().toString(36).slice(2); // a widget may be shown twice

  function heard(message, buffers) {
    const waiting = pending.get(message.id);
    if (!waiting) return;
    pending.delete(message.id);
    if (message.error) waiting.no(Object.assign(new Error(message.error), { kind: message.kind }));
    else {
      const data = buffers[0];
      const bytes = data.buffer ? new Uint8Array(data.buffer, data.byteOffset, data.byteLength) : new Uint8Array(data);
      waiting.yes([message.values, bytes]);
    }
  }
  model.on("msg:custom", heard);

  function call(name, parameters = {}, { data = null, signal = undefined } = {}) {
    const asked = tail.then(() => {
      if (signal && signal.aborted) throw Object.assign(new Error("overtaken"), { name: "AbortError" });
      return new Promise((yes, no) => {
        const id = `${mine}-${number++}`;
        pending.set(id, { yes, no });
        model.send({ id, name, parameters }, undefined, data ? [data.buffer] : []);
      });
    });
    tail = asked.catch(() => {});
    return asked;
  }
  const end = mount(root, { begin: () => call("about"), call, upload: true });
  return () => {
    model.off("msg:custom", heard);
    end();
  };
}

export default { render };
