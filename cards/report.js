"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const narrow = (element) => element.clientWidth < 560;
  const touch = matchMedia("(pointer: coarse)");
  root.classList.add("scripted");

  // Plotly reads some HTML in its labels, and formulas between dollar signs; a name is text.
  const inert = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\$/g, "&#36;");
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // Only what stands under a colour's key is one: a dataset may be called --ink.
  function resolved(value, key) {
    if (Array.isArray(value)) return value.map((entry) => resolved(entry, key));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, entry]) => [name, resolved(entry, name)]));
    }
    if (key === "colorscale") return [0, 1, 2, 3, 4].map((step) => [step / 4, colour(`--d${step}`)]);
    return key === "color" ? colour(value) : value;
  }

  function themed(layout, element, height) {
    const axis = {
      gridcolor: colour("--line"), zerolinecolor: colour("--muted"), linecolor: colour("--line"), fixedrange: touch.matches,
    };
    const label = { bgcolor: colour("--raised"), bordercolor: colour("--muted"), font: { color: colour("--ink") }, namelength: -1 };
    return {
      ...layout, width: element.clientWidth, height,
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hoverlabel: label, dragmode: touch.matches ? false : "zoom",
      font: { color: colour("--ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
    };
  }

  const CONFIG = { displayModeBar: false, responsive: false, showTips: false, doubleClick: "reset" };
  const draw = (element, data, layout) => Plotly.react(element, data, layout, CONFIG);

  function drawPlain(chart, element) {
    const layout = resolved(chart.layout);
    if (narrow(element) && ["comparison", "gain"].includes(chart.id)) {
      layout.yaxis.tickfont = { size: 9 };
      layout.legend.font = { size: 11 };
    }
    return draw(element, resolved(chart.data), themed(layout, element, chart.height));
  }

  // ---- the conflict matrix

  function decodeMatrix(chart) {
    const bytes = Uint8Array.from(atob(chart.matrix), (character) => character.charCodeAt(0));
    const hundredths = new Int8Array(bytes.buffer);
    const count = chart.labels.length;
    return (row, column) => hundredths[row * count + column] / 100;
  }

  function groupBoxes(chart, order) {
    const shapes = [], annotations = [];
    let start = 0;
    while (start < order.length) {
      const group = chart.groups[order[start]];
      let end = start;
      while (end < order.length && chart.groups[order[end]] === group) end += 1;
      shapes.push({
        type: "rect", x0: start - 0.5, x1: end - 0.5, y0: start - 0.5, y1: end - 0.5,
        line: { color: colour("--ink"), width: 2 },
      });
      annotations.push({
        x: (start + end - 1) / 2, y: -0.5, text: `<b>${group}</b>`, showarrow: false, yanchor: "bottom", yshift: 1,
      });
      start = end;
    }
    return { shapes, annotations };
  }

  function drawConflict(chart, element) {
    const order = chart.orders[document.getElementById("order").value];
    const cosine = decodeMatrix(chart);
    const count = order.length, small = narrow(element);
    const labels = order.map((index) => inert(chart.labels[index]));
    const [trace] = resolved(chart.data);
    const layout = resolved(chart.layout);
    Object.assign(trace, { x: labels, y: labels, z: order.map((row) => order.map((column) => cosine(row, column))) });
    if (count <= 16 && !small) trace.texttemplate = "%{z:.2f}";
    trace.colorbar.tickfont = { size: 10 };
    if (small) {
      // Names would leave no room for the cells: they are in the labels and in the line below.
      layout.xaxis.showticklabels = false;
      layout.yaxis.showticklabels = count <= 24;
      layout.yaxis.tickfont = { size: 8 };
      trace.colorbar = { ...trace.colorbar, orientation: "h", y: -0.02, yanchor: "top", title: { text: "cosine", side: "bottom" }, thickness: 9 };
    }
    if (document.getElementById("order").value === "groups") Object.assign(layout, groupBoxes(chart, order));
    layout.margin = { ...layout.margin, t: 24 };
    // Cells are squares: what the names and the scale take is added to the side, or taken from it.
    const names = layout.yaxis.showticklabels === false ? 0 : 14 + (small ? 4.6 : 5.8) * Math.max(...order.map((index) => chart.labels[index].length));
    const scale = small ? 0 : 75;
    const side = Math.min(element.clientWidth - names - scale - 16, Math.max(240, 42 * Math.min(count, 16)));
    const made = themed(layout, element, side + (small ? 90 : names + 40));
    made.width = side + names + scale + 16;
    return draw(element, [trace], made).then(() => {
      if (element.dataset.listens) return;
      element.dataset.listens = "yes";
      const readout = document.getElementById("readout");
      element.on("plotly_hover", (event) => {
        // pointNumber is [row, column] in the order of the moment.
        const now = chart.orders[document.getElementById("order").value];
        const [a, b] = event.points[0].pointNumber.map((position) => now[position]);
        const where = chart.groups[a] === chart.groups[b] ? `both in group ${chart.groups[a]}` : `groups ${chart.groups[a]} and ${chart.groups[b]}`;
        readout.textContent = `${chart.labels[a]} and ${chart.labels[b]}: ${shown(cosine(a, b))} (${where})`;
      });
    });
  }

  const shown = (value) => value.toFixed(2).replace("-", "−");

  function setUpLookup(chart) {
    const select = document.getElementById("lookup"), found = document.getElementById("found");
    const cosine = decodeMatrix(chart);
    chart.labels.forEach((label, index) => select.append(new Option(label, String(index))));
    select.addEventListener("change", () => {
      found.replaceChildren();
      if (select.value === "") return;
      const own = Number(select.value);
      const others = chart.labels.map((_, index) => index).filter((index) => index !== own);
      others.sort((a, b) => cosine(own, a) - cosine(own, b) || a - b);
      const part = Math.min(10, Math.ceil(others.length / 2));
      for (const [title, indices] of [["Conflicts most with", others.slice(0, part)], ["Agrees most with", others.slice(-part).reverse()]]) {
        const heading = document.createElement("h4"), list = document.createElement("ol");
        heading.textContent = title;
        for (const index of indices) {
          const item = document.createElement("li");
          item.textContent = `${chart.labels[index]}: ${shown(cosine(own, index))} (group ${chart.groups[index]})`;
          list.append(item);
        }
        found.append(heading, list);
      }
    });
  }

  // ---- the axes of conflict

  function drawAxes(chart, element) {
    const pair = document.getElementById("axes-pair").value || "0 1";
    const [first, second] = pair.split(" ").map(Number);
    const data = resolved(chart.data), layout = resolved(chart.layout);
    const flat = chart.titles.length === 1;
    data.forEach((trace, number) => {
      trace.x = chart.members[number].map((index) => chart.columns[first][index]);
      trace.y = chart.members[number].map((index) => (flat ? 0 : chart.columns[second][index]));
    });
    layout.xaxis.title.text = chart.titles[first];
    layout.yaxis.title.text = flat ? "" : chart.titles[second];
    if (flat) layout.yaxis.showticklabels = false;
    // Room for the names beside the outermost points.
    const room = (values, share) => {
      const low = Math.min(...values), high = Math.max(...values), pad = (high - low || 1) * share;
      return [low - pad, high + pad];
    };
    layout.xaxis.range = room(chart.columns[first], 0.14);
    if (!flat) layout.yaxis.range = room(chart.columns[second], 0.12);
    const made = themed(layout, element, flat ? 280 : chart.height);
    return draw(element, data, made).then(() => (chart.place_names ? placeNames(element, data, made) : undefined));
  }

  // A name goes to the first free place around its point, or is left to the label under the pointer.
  function placeNames(element, data, layout) {
    const { xaxis, yaxis, _size } = element._fullLayout;
    const points = data.flatMap((trace, of) => trace.x.map((x, at) => ({ of, at, x: xaxis.l2p(x), y: yaxis.l2p(trace.y[at]), text: trace.text[at] })));
    const taken = points.map((point) => [point.x - 9, point.y - 9, point.x + 9, point.y + 9]);
    const places = [["middle right", 1, 0], ["middle left", -1, 0], ["top center", 0, -1], ["bottom center", 0, 1],
      ["top right", 1, -1], ["bottom right", 1, 1], ["top left", -1, -1], ["bottom left", -1, 1]];
    const decode = document.createElement("textarea");
    data.forEach((trace) => { trace.mode = "markers+text"; trace.texttemplate = trace.text.map(() => ""); trace.textposition = trace.text.map(() => "top center"); });
    for (const point of points.sort((a, b) => a.y - b.y)) {
      decode.innerHTML = point.text;
      const width = 6.4 * decode.value.length + 4;
      for (const [place, dx, dy] of places) {
        const left = dx > 0 ? point.x + 10 : dx < 0 ? point.x - 10 - width : point.x - width / 2;
        const top = point.y - 7 + dy * 15;
        const box = [left, top, left + width, top + 14];
        const outside = box[0] < 0 || box[2] > _size.w || box[1] < 0 || box[3] > _size.h;
        if (outside || taken.some((t) => box[0] < t[2] && box[2] > t[0] && box[1] < t[3] && box[3] > t[1])) continue;
        taken.push(box);
        data[point.of].texttemplate[point.at] = "%{text}";
        data[point.of].textposition[point.at] = place;
        break;
      }
    }
    return draw(element, data, layout);
  }

  function setUpAxes(chart) {
    const select = document.getElementById("axes-pair");
    const count = chart.titles.length;
    for (let a = 0; a < count; a += 1) {
      for (let b = a + 1; b < count; b += 1) select.append(new Option(`${a + 1} and ${b + 1}`, `${a} ${b}`));
    }
    document.getElementById("axes-controls").hidden = count < 3;
  }

  // ---- tables

  function sortable(table) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "head";
      button.append(...head.firstElementChild.childNodes);
      head.replaceChildren();
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const ascending = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        const key = (row) => row.cells[column].dataset.value;
        const text = (row) => row.cells[column].textContent.trim();
        const sorted = [...body.rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          // What has no value stays at the end, whichever the direction.
          if (x === undefined && y !== undefined) return 1;
          if (y === undefined && x !== undefined) return -1;
          const order = x === undefined ? text(a).localeCompare(text(b)) : Number(x) - Number(y);
          return ascending ? order : -order;
        });
        body.append(...sorted);
      });
    });
  }

  function searchable(table) {
    const box = document.createElement("p"), label = document.createElement("label"), input = document.createElement("input");
    box.className = "search";
    input.type = "search";
    input.id = `search-${table.id}`;
    label.htmlFor = input.id;
    label.textContent = "Show rows with";
    const count = document.createElement("span");
    count.setAttribute("role", "status");
    box.append(label, input, " ", count);
    table.parentElement.before(box);
    input.addEventListener("input", () => {
      const wanted = input.value.trim().toLowerCase();
      let left = 0;
      for (const row of table.tBodies[0].rows) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        left += row.hidden ? 0 : 1;
      }
      count.textContent = wanted ? `${left} of ${table.tBodies[0].rows.length} rows` : "";
    });
  }

  // ---- start

  function drawAll() {
    return Promise.all(Object.values(charts).map((chart) => {
      const element = document.getElementById(`chart-${chart.id}`);
      if (chart.id === "conflict") return drawConflict(chart, element);
      return chart.id === "axes" ? drawAxes(chart, element) : drawPlain(chart, element);
    }));
  }

  document.querySelectorAll("table[data-sortable]").forEach(sortable);
  document.querySelectorAll("table[data-searchable]").forEach(searchable);
  if (charts.conflict) {
    setUpLookup(charts.conflict);
    document.getElementById("order").addEventListener("change", () => drawConflict(charts.conflict, document.getElementById("chart-conflict")));
  }
  if (charts.axes) {
    setUpAxes(charts.axes);
    document.getElementById("axes-pair").addEventListener("change", () => drawAxes(charts.axes, document.getElementById("chart-axes")));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let width = root.clientWidth, waiting;
  addEventListener("resize", () => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 150);
  });
  drawAll().then(() => root.classList.add("drawn"));
})();
