"use strict";
// Draws the plots of a page of reap. Text reaches the document through textContent or as plotly labels without tags.
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const LIGHT = { ink: "#1a2230", soft: "#55606f", grid: "#e2e6ec", card: "#ffffff" };
  const DARK = { ink: "#e8ecf2", soft: "#a3adbb", grid: "#2b323d", card: "#191f28" };
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = [];
  const [PRINT_WIDTH, PRINT_HEIGHT] = [680, 290];
  const CONFIG = {
    responsive: true, displaylogo: false, displayModeBar: "hover", toImageButtonOptions: { format: "svg" },
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], // none that sends the plot anywhere
    plotlyServerURL: "", showSendToCloud: false,
  };

  function template(colours) {
    const axis = {
      gridcolor: colours.grid, linecolor: colours.soft, zerolinecolor: colours.grid, tickcolor: colours.soft,
      automargin: true, title: { standoff: 8 },
    };
    return { layout: {
      font: { color: colours.ink, size: 13, family: getComputedStyle(document.body).fontFamily },
      xaxis: axis, yaxis: axis, colorway: ["#2f86c7"],
      hoverlabel: { bgcolor: colours.card, bordercolor: colours.soft, font: { color: colours.ink }, align: "left",
        namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.soft, activecolor: colours.ink },
      annotationdefaults: { font: { color: colours.soft, size: 12 } },
    } };
  }
  const theme = () => template(prefersDark.matches ? DARK : LIGHT);

  function fitted(id, layout) {
    const made = { ...layout, template: theme(), autosize: true };
    if ($(`plot-${id}`).clientWidth < 560) {
      made.legend = { ...layout.legend, y: -0.28, yanchor: "top", font: { size: 11 } };
      made.margin = { ...layout.margin, l: Math.min(layout.margin.l, 52), r: 8 };
      made.font = { size: 11 };
    }
    return made;
  }

  function draw(id, traces, layout) {
    Plotly.react($(`plot-${id}`), traces, fitted(id, layout), CONFIG);
    if (!drawn.includes(id)) drawn.push(id);
  }

  const withData = (traces) => traces.filter((trace) => trace.x.length > 0); // or the legend names what is not there

  // ---- packed arrays

  const KINDS = { f4: Float32Array, i4: Int32Array, u1: Uint8Array };
  const unpacked = new Map();
  function unpack(spec) {
    if (!unpacked.has(spec)) {
      const bytes = Uint8Array.from(atob(spec.bdata), (letter) => letter.charCodeAt(0));
      unpacked.set(spec, new KINDS[spec.dtype](bytes.buffer));
    }
    return unpacked.get(spec);
  }

  const formatter = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
  const short = (value) => (Number.isFinite(value) ? formatter.format(value) : "not defined");
  const option = (select, value, text) => select.add(new Option(text === undefined ? value : text, value));

  // ---- layer × expert

  const map = data.experts; // undefined on a page without it
  const n = map ? map.n_experts : 0;
  const kept = map && map.kept ? unpack(map.kept) : null;
  const counts = map ? unpack(map.counts) : null;
  const rankings = new Map();
  const upTo = (length) => Array.from({ length }, (_, index) => index);
  const fate = (index) => (kept ? (kept[index] ? "kept" : "removed") : "");
  const remarks = (index) => [fate(index), counts[index] === 0 ? "never routed to" : ""].filter(Boolean).join(", ");

  // as reap.scores.ranking.order_experts: an undefined score last, then the higher count, then the lower id
  function rankLayer(scores, base) {
    const value = (expert) => (Number.isNaN(scores[base + expert]) ? -Infinity : scores[base + expert]);
    return upTo(n).sort(
      (a, b) => (value(b) > value(a)) - (value(b) < value(a)) || counts[base + b] - counts[base + a] || a - b);
  }

  function ranking(metric) {
    if (!rankings.has(metric)) {
      const scores = unpack(map.metrics[metric]);
      rankings.set(metric, map.layers.map((_, row) => rankLayer(scores, row * n)));
    }
    return rankings.get(metric);
  }

  function ranksOf(order) {
    const ranks = new Array(n);
    order.forEach((expert, place) => { ranks[expert] = place + 1; });
    return ranks;
  }

  function median(values) {
    const known = Array.from(values).filter((value) => value > 0).sort((a, b) => a - b);
    const middle = known.length >> 1;
    return known.length % 2 ? known[middle] : (known[middle - 1] + known[middle]) / 2;
  }

  function cells(metric, scaling) {
    const scores = unpack(map.metrics[metric]);
    const order = ranking(metric);
    return map.layers.map((_, row) => {
      const values = scores.subarray(row * n, (row + 1) * n);
      if (scaling === "value") return Array.from(values);
      if (scaling === "rank") return ranksOf(order[row]);
      const middle = median(values);
      return Array.from(values, (value) => (value > 0 ? Math.log2(value / middle) : NaN));
    });
  }

  function range(z) {
    const known = z.flat().filter(Number.isFinite).sort((a, b) => a - b);
    if (!known.length) return [0, 1];
    const low = known[Math.floor(0.01 * (known.length - 1))];
    const high = known[Math.ceil(0.99 * (known.length - 1))];
    return high > low ? [low, high] : [known[0], known[known.length - 1] + 1e-9];
  }

  // one path through each run of removed experts
  function strikePath(ids, row) {
    let path = "";
    let start = -1;
    for (let place = 0; place <= n; place += 1) {
      const removed = place < n && !kept[row * n + ids[place]];
      if (removed && start < 0) start = place;
      if (!removed && start >= 0) {
        path += `M${(start - 0.42).toFixed(2)},${row}H${(place - 0.58).toFixed(2)}`;
        start = -1;
      }
    }
    return path;
  }

  function strikes(columns) {
    const path = kept ? columns.map(strikePath).join("") : "";
    const stroke = (color, width) => (
      { type: "path", path, xref: "x", yref: "y", layer: "above", line: { color, width } });
    return path ? [stroke("#10151c", 2.8), stroke("#ffffff", 1.3)] : [];
  }

  const TICKS = {
    relative: { title: "times the layer's median", tickvals: [-6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6],
      ticktext: ["1/64", "1/32", "1/16", "1/8", "1/4", "1/2", "1", "2", "4", "8", "16", "32", "64"] },
    value: { title: "value" },
    rank: { title: "rank in the layer" },
  };

  function colorbar(scaling) {
    const { title, ...ticks } = TICKS[scaling];
    const wide = $("plot-experts").clientWidth >= 560;
    return wide ? { title: { text: title, side: "right" }, thickness: 14, ...ticks }
      : { title: { text: title, side: "top" }, thickness: 10, orientation: "h", y: -0.2, yanchor: "top", ...ticks };
  }

  function hoverCells(metric, columns) {
    const scores = unpack(map.metrics[metric]);
    return columns.map((ids, row) => {
      const ranks = ranksOf(ranking(metric)[row]);
      return ids.map((expert) => {
        const index = row * n + expert;
        return [map.layers[row], expert, short(scores[index]), ranks[expert], remarks(index)];
      });
    });
  }

  function mapLayout(order, columns) {
    const rows = upTo(map.layers.length);
    const step = 1 + Math.floor(rows.length / 24);
    const tickvals = rows.filter((row) => row % step === 0);
    return {
      height: rows.length > 12 ? Math.max(380, Math.min(900, 110 + 13 * rows.length)) : 210 + 36 * rows.length,
      margin: { l: 56, r: 12, t: 30, b: 48 },
      shapes: strikes(columns),
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(128,136,146,0.18)",
      xaxis: { title: { text: order === "score" ? "place in the layer, best first" : "expert" }, showgrid: false,
        zeroline: false, dtick: n > 16 ? undefined : 1 },
      yaxis: { title: { text: "layer" }, autorange: "reversed", showgrid: false, zeroline: false, tickvals,
        ticktext: tickvals.map((row) => String(map.layers[row])) },
      legend: {},
    };
  }

  let columns = []; // of each layer, the experts from left to right as the map shows them
  function redrawMap() {
    const [metric, scaling, order] = [$("metric").value, $("scaling").value, $("order").value];
    columns = order === "score" ? ranking(metric) : map.layers.map(() => upTo(n));
    const z = cells(metric, scaling).map((values, row) => columns[row].map((expert) => values[expert]));
    const [zmin, zmax] = range(z);
    const trace = {
      type: "heatmap", z, customdata: hoverCells(metric, columns), zmin, zmax, colorscale: data.scale,
      reversescale: scaling === "rank", hoverongaps: true, colorbar: colorbar(scaling),
      hovertemplate: `layer %{customdata[0]}, expert %{customdata[1]}<br>${metric} %{customdata[2]}, rank %{customdata[3]} of ${n}<br>%{customdata[4]}<extra></extra>`,
    };
    draw("experts", [trace], mapLayout(order, columns));
  }

  // ---- the numbers of one expert, beside the map

  function facts(row, expert) {
    const index = row * n + expert;
    const lines = [["tokens routed to it", counts[index].toLocaleString("en")]];
    Object.entries(map.metrics).forEach(([metric, spec]) => {
      const place = ranking(metric)[row].indexOf(expert) + 1;
      lines.push([metric, `${short(unpack(spec)[index])} (${place}.)`]);
    });
    if (map.norm_max) lines.push(["norm_max", short(unpack(map.norm_max)[index])]);
    Object.entries(map.domains).forEach(([name, spec]) => {
      lines.push([`tokens of ${name}`, `${(100 * unpack(spec)[index]).toFixed(1)} %`]);
    });
    return lines;
  }

  function factBox([name, value]) {
    const cell = document.createElement("div");
    const label = document.createElement("span");
    label.textContent = name;
    cell.append(label, value);
    return cell;
  }

  function show(row, expert) {
    const head = document.createElement("strong");
    const state = remarks(row * n + expert);
    head.textContent = `Layer ${map.layers[row]}, expert ${expert}${state ? `: ${state}` : ""}`;
    $("readout").replaceChildren(head, ...facts(row, expert).map(factBox));
    $("at-layer").value = String(row);
    $("at-expert").value = String(expert);
  }

  function showTyped() {
    const expert = Math.min(n - 1, Math.max(0, Math.trunc(Number($("at-expert").value)) || 0));
    show(Number($("at-layer").value), expert);
  }

  function followPointer(plot) {
    plot.on("plotly_hover", (event) => {
      const [row, place] = event.points[0].pointIndex;
      show(row, columns[row][place]);
    });
    plot.on("plotly_click", (event) => {
      if (!$("layer-layer")) return;
      $("layer-layer").value = String(event.points[0].pointIndex[0]);
      redrawLayer();
    });
  }

  function experts() {
    Object.keys(map.metrics).forEach((metric) => option($("metric"), metric));
    $("metric").value = map.metric;
    map.layers.forEach((layer, row) => option($("at-layer"), String(row), String(layer)));
    $("at-expert").max = String(n - 1);
    $("order").value = n > 128 ? "score" : "id"; // hundreds of cells in a row are a pattern only when sorted
    const redraw = () => { redrawMap(); redrawLayer(); };
    ["metric", "scaling", "order"].forEach((id) => $(id).addEventListener("change", redraw));
    ["at-layer", "at-expert"].forEach((id) => $(id).addEventListener("change", showTyped));
    redrawMap();
    show(0, ranking(map.metric)[0][0]);
    followPointer($("plot-experts"));
  }

  // ---- the scores of one layer, best first

  const ABOVE = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" };
  const CLEAR = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
  const STYLE = { "": ["circle", "#2f86c7"], kept: ["circle", "#2f86c7"], removed: ["x-thin-open", "#cf6a1e"] };

  function layerTrace(group, metric, row) {
    const scores = unpack(map.metrics[metric]);
    const places = ranking(metric)[row].map((expert, place) => [expert, place]);
    const chosen = places.filter(([expert]) => fate(row * n + expert) === group);
    const [symbol, color] = STYLE[group];
    return {
      type: "scatter", mode: "markers", name: group || metric, x: chosen.map(([, place]) => place + 1),
      y: chosen.map(([expert]) => scores[row * n + expert]), customdata: chosen.map(([expert]) => expert),
      marker: { symbol, color, size: n > 128 ? 6 : 9, line: { width: 2, color } },
      hovertemplate: `expert %{customdata}<br>${metric} %{y:.4g}<extra>%{fullData.name}</extra>`,
    };
  }

  function layerLayout(metric, row) {
    const keep = kept ? upTo(n).filter((expert) => kept[row * n + expert]).length : n;
    const border = { type: "line", x0: keep + 0.5, x1: keep + 0.5, y0: 0, y1: 1, yref: "paper",
      line: { dash: "dot", width: 1.5, color: "#878e97" } };
    return {
      height: 340, margin: { l: 64, r: 16, t: 28, b: 48 }, showlegend: kept !== null,
      legend: ABOVE, ...CLEAR,
      xaxis: { title: { text: `place in layer ${map.layers[row]}, best first` }, dtick: n > 16 ? undefined : 1 },
      yaxis: { title: { text: metric }, rangemode: "tozero" },
      shapes: keep < n ? [border] : [],
    };
  }

  function redrawLayer() {
    if (!$("layer-layer") || !$("layer-layer").options.length) return;
    const row = Number($("layer-layer").value);
    const metric = $("metric").value;
    const groups = kept ? ["kept", "removed"] : [""];
    draw("layer", withData(groups.map((group) => layerTrace(group, metric, row))), layerLayout(metric, row));
  }

  function layer() {
    map.layers.forEach((number, row) => option($("layer-layer"), String(row), String(number)));
    $("layer-layer").addEventListener("change", redrawLayer);
    redrawLayer();
  }

  // ---- two profiles, one layer

  const FATES = [["kept by both", "circle", "#2f86c7"], ["kept by A alone", "triangle-up-open", "#cf6a1e"],
    ["kept by B alone", "square-open", "#a868b0"], ["kept by neither", "x-thin-open", "#878e97"]];

  function scatterTrace(it, row, kind) {
    const [a, b, fates] = [unpack(it.a), unpack(it.b), unpack(it.fates)];
    const [name, symbol, color] = FATES[kind];
    const base = row * it.n_experts;
    const chosen = upTo(it.n_experts).filter((expert) => fates[base + expert] === kind);
    return {
      type: "scatter", mode: "markers", name: `${name} (${chosen.length})`, customdata: chosen,
      x: chosen.map((expert) => a[base + expert]), y: chosen.map((expert) => b[base + expert]),
      marker: { symbol, color, size: it.n_experts > 128 ? 7 : 9, line: { width: 2, color } },
      hovertemplate: "expert %{customdata}<br>A %{x:.4g}, B %{y:.4g}<extra>%{fullData.name}</extra>",
    };
  }

  function redrawScatter() {
    const it = data.scatter;
    const row = Number($("scatter-layer").value);
    draw("scatter", withData(FATES.map((_, kind) => scatterTrace(it, row, kind))), {
      height: 460, margin: { l: 64, r: 16, t: 28, b: 48 }, legend: ABOVE, ...CLEAR,
      xaxis: { title: { text: `${it.metric} in A` }, rangemode: "tozero" },
      yaxis: { title: { text: `${it.metric} in B` }, rangemode: "tozero" },
    });
  }

  function scatter() {
    data.scatter.layers.forEach((number, row) => option($("scatter-layer"), String(row), String(number)));
    $("scatter-layer").addEventListener("change", redrawScatter);
    redrawScatter();
  }

  // ---- all of them, the first at once and the others as the browser gets to it

  const own = { experts, layer, scatter };
  const waiting = Object.keys(data.figures);
  const drawNext = () => {
    const id = waiting.shift();
    if (id === undefined) {
      document.documentElement.dataset.drawn = String(drawn.length);
      return;
    }
    const figure = data.figures[id];
    if (typeof figure === "string") own[figure]();
    else draw(id, figure.data, figure.layout);
    setTimeout(drawNext, 0);
  };
  drawNext();

  const heights = {};
  const restyle = (change) => drawn.forEach((id) => Plotly.relayout($(`plot-${id}`), change(id)));
  prefersDark.addEventListener("change", () => restyle(() => ({ template: theme() })));
  addEventListener("beforeprint", () => {
    while (waiting.length) drawNext();
    drawn.forEach((id) => { heights[id] = $(`plot-${id}`).layout.height; });
    const height = (id) => (id === "experts" ? heights[id] : Math.min(heights[id], PRINT_HEIGHT));
    restyle((id) => ({ template: template(LIGHT), width: PRINT_WIDTH, height: height(id), autosize: false }));
  });
  addEventListener("afterprint", () => restyle(
    (id) => ({ template: theme(), width: null, height: heights[id], autosize: true })));
}
