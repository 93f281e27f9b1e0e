// The page of `flashmaps explore`: the view, asking over HTTP.
import { mount } from "./view.js";

const TYPE = "application/x-flashmaps";

// The token came behind the #, which no server gets to see, and does not stay in the address.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("flashmaps-token", given);
  history.replaceState(null, "", location.pathname);
}

function packed(parameters, data) {
  const told = new TextEncoder().encode(JSON.stringify(parameters));
  const body = new Uint8Array(4 + told.length + (data ? data.length : 0));
  new DataView(body.buffer).setUint32(0, told.length, true);
  body.set(told, 4);
  if (data) body.set(data, 4 + told.length);
  return body;
}

async function post(name, parameters, data, signal) {
  let response;
  try {
    response = await fetch(`/api/${name}`, {
      method: "POST",
      body: packed(parameters, data),
      signal,
      headers: {
        "Content-Type": TYPE,
        "X-FlashMaps-Token": sessionStorage.getItem("flashmaps-token") || "",
        "X-FlashMaps-Session": sessionStorage.getItem("flashmaps-session") || "",
      },
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Object.assign(new Error("FlashMaps does not answer; is it still running in its terminal?"), {
      kind: "away",
    });
  }
  if (response.status === 204) throw Object.assign(new Error("overtaken"), { name: "AbortError" });
  if (!response.ok) {
    const told = await response.json().catch(() => ({ error: `the answer was ${response.status}` }));
    throw Object.assign(new Error(told.error), { kind: told.kind, status: response.status });
  }
  const buffer = await response.arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const values = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  return [values, new Uint8Array(buffer, 4 + length)];
}

async function open() {
  const [values] = await post("open", {});
  sessionStorage.setItem("flashmaps-session", values.session);
}

async function call(name, parameters = {}, { data = null, signal = undefined } = {}) {
  return post(name, parameters, data, signal);
}

async function begin() {
  if (!sessionStorage.getItem("flashmaps-session")) await open();
  try {
    return await call("about");
  } catch (error) {
    if (error.kind !== "gone") throw error;
    await open(); // the server was started anew
    return call("about");
  }
}

mount(document.getElementById("explorer"), { begin, call, upload: true });
