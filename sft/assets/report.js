(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const specs = Object.fromEntries(charts.map((chart) => [chart.name, chart.spec]));
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // The specs name their styles; the colours come from the page's CSS so that both themes share one spec.
  function theme() {
    const line = (color, width) => ({ color: css(color), strokeWidth: width, strokeJoin: "round" });
    const dot = (color) => ({ filled: true, color: css(color), stroke: css("--card"), strokeWidth: 1.5, size: 52, opacity: 1 });
    return {
      background: "transparent", font: css("--sans"), view: { stroke: null },
      axis: { labelColor: css("--soft"), gridColor: css("--grid"), domain: false, ticks: false, labelFontSize: 11.5, labelPadding: 7 },
      axisX: { grid: false, domain: true, domainColor: css("--line"), labelFlush: true, tickCount: 7 }, axisY: { tickCount: 5, minExtent: 34 },
      style: {
        raw: line("--raw", 1), thin: line("--accent", 1.1), main: line("--accent", 2), held: line("--held", 2),
        hover: { color: css("--faint"), strokeDash: [3, 3] },
        "kept-dot": { filled: false, color: css("--held"), stroke: css("--held"), strokeWidth: 2, size: 230, opacity: 1 },
        "raw-dot": dot("--accent"), "thin-dot": dot("--accent"), "main-dot": dot("--accent"), "held-dot": dot("--held"),
      },
    };
  }

  function tooltip(row, clean) {
    const shown = Object.entries(row).filter(([, value]) => !["null", "undefined", "NaN"].includes(String(value)));
    return `<table>${shown.map(([key, value]) => `<tr><td>${clean(key)}</td><td>${clean(value)}</td></tr>`).join("")}</table>`;
  }

  // What the curves are drawn along: the reader's choice of what their points have.
  const along = document.getElementById("along");
  const values = (spec) => spec?.encoding?.x?.field === "step" ? spec.data.values : [];
  if (along) {
    for (const option of [...along.options]) {
      if (!charts.some((chart) => values(chart.spec).some((point) => point[option.value] != null))) option.remove();
    }
    along.parentElement.hidden = along.options.length < 2;
    along.addEventListener("change", () => draw());
  }
  function placed(spec) {
    const field = along?.value;
    if (!field || !values(spec).some((point) => point[field] != null)) return spec;
    const axis = { step: spec.encoding.x.axis, tokens: { format: "~s" }, epoch: { format: "~r" } }[field];
    return { ...spec, encoding: { ...spec.encoding, x: { ...spec.encoding.x, field, axis } } };
  }

  let views = [];
  async function draw() {
    views.splice(0).forEach((view) => view.finalize());
    for (const plot of document.querySelectorAll("[data-chart]")) {
      const spec = { ...placed(specs[plot.dataset.chart]), height: plot.clientHeight, autosize: { type: "fit", contains: "padding" } };
      views.push(await vegaEmbed(plot, spec, { actions: false, renderer: "canvas", config: theme(),
        tooltip: { disableDefaultStyle: true, formatTooltip: tooltip } }));
    }
  }
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  const select = document.getElementById("step");
  if (select) {
    const earlier = document.getElementById("earlier"), later = document.getElementById("later");
    const show = () => {
      document.querySelectorAll("[data-step]").forEach((item) => { item.hidden = item.dataset.step !== select.value; });
      earlier.disabled = select.selectedIndex === 0;
      later.disabled = select.selectedIndex === select.options.length - 1;
    };
    const move = (by) => { select.selectedIndex += by; show(); };
    select.addEventListener("change", show);
    earlier.addEventListener("click", () => move(-1));
    later.addEventListener("click", () => move(1));
    show();
  }

  function copyText(text) {
    const byHand = () => {
      const area = document.body.appendChild(document.createElement("textarea"));
      area.value = text;
      area.select();
      document.execCommand("copy");
      area.remove();
    };
    return navigator.clipboard ? navigator.clipboard.writeText(text).catch(byHand) : Promise.resolve(byHand());
  }
  for (const button of document.querySelectorAll("button.copy")) {
    const label = button.textContent;
    button.hidden = false;
    button.addEventListener("click", () => copyText(button.previousElementSibling.textContent.trim()).then(() => {
      button.textContent = button.dataset.done;
      setTimeout(() => { button.textContent = label; }, 1500);
    }));
  }

  // What the reader says of the samples. A browser may keep nothing for a file: then it lasts as long as the page is open.
  const tally = document.querySelector(".tally");
  if (tally) {
    const place = "sft " + tally.dataset.store;
    let said = {};
    try { said = JSON.parse(localStorage.getItem(place)) || {}; } catch { /* as above */ }
    const rows = [...document.querySelectorAll(".rate")];
    const update = () => {
      for (const row of rows) {
        for (const button of row.querySelectorAll("button")) button.setAttribute("aria-pressed", said[row.dataset.key] === button.dataset.value);
      }
      for (const count of tally.querySelectorAll("[data-count]")) {
        count.textContent = rows.filter((row) => (said[row.dataset.key] || "") === count.dataset.count).length;
      }
      const lines = rows.filter((row) => said[row.dataset.key]);
      const word = (row) => row.querySelector(`[data-value="${said[row.dataset.key]}"]`)?.textContent;
      tally.querySelector(".list").textContent = lines.map((row) => `${word(row)}\t${row.dataset.text.replace(/\s+/g, " ")}`).join("\n");
      tally.querySelector("details").hidden = !lines.length;
    };
    for (const row of rows) {
      row.hidden = false;
      row.addEventListener("click", (event) => {
        const value = event.target.dataset.value;
        if (!value) return;
        if (said[row.dataset.key] === value) delete said[row.dataset.key]; else said[row.dataset.key] = value;
        try { localStorage.setItem(place, JSON.stringify(said)); } catch { /* as above */ }
        update();
      });
    }
    tally.hidden = false;
    update();
  }
})();
