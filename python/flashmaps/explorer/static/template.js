// What the view is made of, for a page and for a notebook.
export const TEMPLATE = `
<a class="fm-skip" href="#fm-source">Skip to the pictures</a>
<header class="fm-top">
  <p class="fm-mark"><span aria-hidden="true" class="fm-dots"></span>FlashMaps</p>
  <p class="fm-model" data-id="model"></p>
  <div class="fm-tools">
    <button type="button" data-id="swap" title="Swap the two pictures">Swap</button>
    <button type="button" data-id="png" title="Save what is seen as a picture">Save PNG</button>
    <button type="button" data-id="python" title="The Python that makes this">Python</button>
    <button type="button" data-id="theme" aria-label="Light or dark" title="Light or dark"><span aria-hidden="true">◐</span></button>
  </div>
</header>
<div class="fm-alert" data-id="alert" role="alert" hidden><p data-id="alert-text"></p><button type="button" data-id="again">Try again</button><button type="button" data-id="dismiss" aria-label="Close this message">×</button></div>
<div class="fm-body">
<main class="fm-main">
  <div class="fm-panes">
    ${["source", "target"].map((side) => `
    <figure class="fm-pane" data-side="${side}">
      <figcaption><span class="fm-side">${side === "source" ? "Source" : "Target"}</span>
        <select data-id="${side}-picture" aria-label="Picture of the ${side}"></select></figcaption>
      <div class="fm-stage" id="fm-${side}" data-id="${side}-stage" tabindex="0" role="application"
           aria-roledescription="attention map" aria-label="${side === "source" ? "Source" : "Target"} picture" aria-describedby="fm-help">
        <img data-id="${side}-image" alt="" draggable="false">
        <canvas data-id="${side}-heat" class="fm-heat" aria-hidden="true"></canvas>
        <canvas data-id="${side}-marks" class="fm-marks" aria-hidden="true"></canvas>
        <div class="fm-wait" data-id="${side}-wait" hidden></div>
      </div>
    </figure>`).join("")}
  </div>
  <dl class="fm-readout" data-id="readout" aria-hidden="true">
    <div><dt>Token</dt><dd data-id="r-token">–</dd></div>
    <div><dt>Largest</dt><dd data-id="r-max">–</dd></div>
    <div><dt>Entropy</dt><dd data-id="r-entropy">–</dd></div>
    <div><dt>Comes back</dt><dd data-id="r-back">–</dd></div>
  </dl>
  <p class="fm-live" data-id="live" role="status" aria-live="polite"></p>
  <p class="fm-help" id="fm-help">Point at a picture to see where that place looks. Click, or Enter, keeps it as a pin. Arrow keys move by one token, with Shift by four; Delete removes the last pin.</p>
  <ul class="fm-pins" data-id="pins" aria-label="Pins"></ul>
  <section class="fm-strip" aria-labelledby="fm-collection">
    <h2 id="fm-collection">Collection</h2>
    <label class="fm-switch"><input type="checkbox" data-id="collect"> show the same part in all</label>
    <ul data-id="thumbs"></ul>
    <label class="fm-drop" data-id="drop" tabindex="-1"><input type="file" data-id="file" accept="image/png,image/jpeg,image/webp" multiple> <span>Add pictures</span></label>
  </section>
</main>
<aside class="fm-side-bar" aria-label="How to look">
  <section><h2>Show</h2>
    <fieldset class="fm-choice"><legend>In the picture pointed at</legend>
      <label><input type="radio" name="fm-own" value="itself" checked><span>itself</span></label>
      <label><input type="radio" name="fm-own" value="back"><span>the way back</span></label>
      <label><input type="radio" name="fm-own" value="none"><span>nothing</span></label></fieldset>
    <label class="fm-field">Statistic<select data-id="statistic"><option value="">none</option></select></label>
    <p class="fm-scale" data-id="scale" hidden><span data-id="low"></span><i aria-hidden="true"></i><span data-id="high"></span></p>
    <label class="fm-field">Strength<input type="range" data-id="strength" min="0" max="100" value="85"></label>
    <fieldset class="fm-choice"><legend>Segments of the source</legend>
      <label><input type="radio" name="fm-segments" value="" checked><span>none</span></label>
      <label><input type="radio" name="fm-segments" value="0"><span>objects</span></label>
      <label><input type="radio" name="fm-segments" value="1"><span>parts</span></label></fieldset>
  </section>
  <section><h2>Map</h2>
    <label class="fm-field">Compare<select data-id="compare"></select></label>
    <label class="fm-field">Heads<select data-id="head"></select></label>
    <label class="fm-field">Normalise<select data-id="normalize"></select></label>
    <label class="fm-field">Pixels<select data-id="size"></select></label>
    <label class="fm-field">Temperature<input type="text" inputmode="decimal" data-id="temperature" placeholder="the model's own" autocomplete="off"></label>
    <label class="fm-field">Timesteps<input type="text" inputmode="numeric" data-id="timestep" autocomplete="off"></label>
    <details><summary>Layers</summary><div class="fm-layers" data-id="layers" role="group" aria-label="Layers, averaged"></div></details>
  </section>
  <section><h2>Words</h2>
    <form data-id="words-form" class="fm-row"><input type="text" data-id="prompt" maxlength="300" aria-label="What the picture shows" placeholder="a cat on a road" autocomplete="off"><button type="submit">Find</button></form>
    <div class="fm-words" data-id="words" role="group" aria-label="Words"></div>
  </section>
  <section><h2>Generate</h2>
    <form data-id="generate-form">
      <label class="fm-field">Prompt<input type="text" data-id="g-prompt" maxlength="300" autocomplete="off" placeholder="a red bird"></label>
      <div class="fm-row"><label class="fm-field">Steps<input type="number" data-id="g-steps" min="1" max="50" value="8"></label>
      <label class="fm-field">Seed<input type="number" data-id="g-seed" min="0" max="2147483647" value="0"></label>
      <button type="submit">Make</button></div></form>
    <div data-id="generation" hidden>
      <svg class="fm-chart" data-id="chart" role="img" aria-label="Mean entropy of each layer over the steps"></svg>
      <label class="fm-field">Step<input type="range" data-id="g-step" min="0" value="0"></label>
      <label class="fm-field">Layer<input type="range" data-id="g-layer" min="0" value="0"></label>
      <p class="fm-note" data-id="g-told"></p>
    </div>
  </section>
</aside>
</div>
<dialog class="fm-dialog" data-id="dialog" aria-labelledby="fm-dialog-title"><h2 id="fm-dialog-title">Python that makes this</h2><pre tabindex="0" role="region" aria-label="Program"><code data-id="code"></code></pre><div class="fm-row"><button type="button" data-id="copy">Copy</button><button type="button" data-id="save">Save</button><button type="button" data-id="close">Close</button></div></dialog>
`;
