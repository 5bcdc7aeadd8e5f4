"use strict";
// What paper cannot do. Without this program everything is still on the page.
const report = JSON.parse(document.getElementById("data").textContent);
const say = (key, values = {}) => report.words[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);

// One cursor and one zoom for all plots over time.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const VERTICES = 2000; // of a line that is redrawn
  const ROOM = 0.06; // of the width, for the name of a stage
  const CLOSEST = 8; // steps that a zoomed plot shows at least
  const element = (name, parent, attributes) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent.append(made);
    return made;
  };

  // The first step, then distances -> steps.
  const steps = (distances) => {
    let at = 0;
    return distances.map((distance) => (at += distance));
  };

  const plots = [...document.querySelectorAll("[data-time]")].map((figure) => {
    const svg = figure.querySelector("svg");
    const box = svg.viewBox.baseVal;
    const [left, right, first, last] = JSON.parse(figure.dataset.time);
    const cursor = element("line", svg, { class: "cursor", y1: 0, y2: box.height });
    cursor.style.display = "none";
    const zoom = report.zoom[figure.id] || { panels: [], curves: {}, texts: {} };
    const selection = element("rect", svg, { class: "selection", y: 0, height: box.height });
    selection.style.display = "none";
    return { figure, svg, box, left, right, first, last, cursor, selection, zoom, parts: null, stale: false, seen: false };
  });
  if (!plots.length) return;
  const whole = { first: Math.min(...plots.map((p) => p.first)), last: Math.max(...plots.map((p) => p.last)) };
  let view = null; // {first, last} in steps, null: each plot as it was drawn
  let at = null; // the step under the cursor
  const range = (plot) => view || plot;
  const place = (plot, step) => {
    const { first, last } = range(plot);
    return plot.left + (step - first) / (last - first) * (plot.right - plot.left);
  };
  const stepAt = (plot, x) => {
    const { first, last } = range(plot);
    return first + (x - plot.left) / (plot.right - plot.left) * (last - first);
  };

  // What of a plot moves, found when it is first zoomed.
  const prepare = (plot) => {
    const { figure, zoom } = plot;
    const id = (name) => document.getElementById(`${figure.id}-${name}`);
    const panelOf = (group) => zoom.panels[Number(/axes_(\d+)$/.exec(group.closest("[id*='-axes_']").id)[1]) - 1];
    const clips = new Map(zoom.panels.map((panel, index) => {
      const name = `${figure.id}-zoomclip${index}`;
      const clip = element("clipPath", plot.svg, { id: name });
      element("rect", clip, { x: panel.left, y: panel.top, width: panel.right - panel.left, height: panel.bottom - panel.top });
      return [panel, `url(#${name})`];
    }));
    const moving = (group) => {
      const inside = [...group.querySelectorAll("path, image, use")].filter((one) => !one.closest("defs"));
      return {
        group,
        clip: clips.get(panelOf(group)),
        // Only what was clipped is clipped again when the whole run is shown.
        clipped: [...group.querySelectorAll("[clip-path]")].map((one) => [one, one.getAttribute("clip-path")]),
        paths: inside.filter((one) => one.tagName === "path").map((one) => [one, one.getAttribute("d")]),
        images: inside.filter((one) => one.tagName === "image").map((one) => [one, one.getAttribute("transform") || ""]),
        marks: inside.filter((one) => one.tagName === "use").map((one) => [one, Number(one.getAttribute("x"))]),
      };
    };
    const stretched = [...plot.svg.querySelectorAll(`[id^='${figure.id}-stretch']`)].map(moving);
    const curves = Object.entries(zoom.curves).map(([name, curve]) => {
      const found = moving(id(name));
      return { ...found, panel: zoom.panels[curve.panel], x: steps(curve.x), y: curve.y };
    });
    const texts = Object.entries(zoom.texts).map(([name, [from, until]]) => ({ group: id(name), from, until }));
    const axes = zoom.panels.map((panel, index) => {
      const drawn = id(`timeaxis${index}`);
      return { panel, drawn, own: element("g", drawn.parentNode, { class: "timeaxis" }) };
    });
    plot.parts = { stretched, curves, texts, axes };
  };

  // A curve between two steps: all its vertices, or of many the least and the greatest of every bin.
  const outline = ({ x, y, panel }, first, last, across) => {
    let start = 0, stop = x.length;
    while (start + 1 < x.length && x[start + 1] < first) start++;
    while (stop > 1 && x[stop - 2] > last) stop--;
    const up = (value) => {
      const height = panel.log ? Math.log10(value) : value;
      return panel.bottom - (height - panel.low) / (panel.high - panel.low) * (panel.bottom - panel.top);
    };
    const fits = (value) => value !== null && (!panel.log || value > 0);
    const kept = [];
    const width = Math.max(1, Math.ceil((stop - start) / (VERTICES / 2)));
    for (let bin = start; bin < stop; bin += width) {
      let low = -1, high = -1, gap = -1;
      for (let i = bin; i < Math.min(bin + width, stop); i++) {
        if (!fits(y[i])) { gap = i; continue; }
        if (low < 0 || y[i] < y[low]) low = i;
        if (high < 0 || y[i] > y[high]) high = i;
      }
      if (width === 1 && gap >= 0) kept.push(-1);
      else if (low >= 0) kept.push(...(low === high ? [low] : [Math.min(low, high), Math.max(low, high)]));
      else kept.push(-1);
    }
    let pen = "M";
    return kept.map((i) => {
      if (i < 0) { pen = "M"; return ""; }
      const piece = `${pen}${across(x[i]).toFixed(2)} ${up(y[i]).toFixed(2)}`;
      pen = "L";
      return piece;
    }).join("");
  };

  const ticks = (first, last) => {
    const rough = (last - first) / 8;
    const size = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
    const every = Math.max(1, [1, 2, 5, 10].map((times) => times * size).find((one) => one >= rough) || 1);
    const found = [];
    for (let step = Math.ceil(first / every) * every; step <= last; step += every) found.push(step);
    return found;
  };

  const redraw = (plot) => {
    plot.stale = false;
    if (!view && !plot.parts) return;
    if (!plot.parts) prepare(plot);
    const { first, last } = range(plot);
    const scale = (plot.last - plot.first) / (last - first);
    const shift = plot.left - (first - plot.first) / (last - first) * (plot.right - plot.left) - scale * plot.left;
    const move = (one) => {
      for (const [inner, clip] of one.clipped) view ? inner.removeAttribute("clip-path") : inner.setAttribute("clip-path", clip);
      view ? one.group.setAttribute("clip-path", one.clip) : one.group.removeAttribute("clip-path");
      for (const [path, d] of one.paths) {
        path.setAttribute("d", view ? d.replace(/(-?[\d.]+) (-?[\d.]+)/g, (_, x, y) => `${(scale * x + shift).toFixed(2)} ${y}`) : d);
      }
      for (const [image, own] of one.images) image.setAttribute("transform", view ? `matrix(${scale} 0 0 1 ${shift} 0) ${own}` : own);
      for (const [mark, x] of one.marks) mark.setAttribute("x", view ? scale * x + shift : x);
    };
    plot.parts.stretched.forEach(move);
    for (const curve of plot.parts.curves) {
      move(curve);
      if (view) curve.paths[0][0].setAttribute("d", outline(curve, first, last, (step) => place(plot, step)));
    }
    for (const { group, from, until } of plot.parts.texts) {
      // The name of a stage that began before stays at the left edge while there is room for it.
      const step = from < first && until > first + ROOM * (last - first) ? first : from;
      const inside = step >= first && step <= last;
      group.style.display = inside ? "" : "none";
      const before = plot.left + (from - plot.first) / (plot.last - plot.first) * (plot.right - plot.left);
      view ? group.setAttribute("transform", `translate(${place(plot, step) - before} 0)`) : group.removeAttribute("transform");
    }
    for (const { panel, drawn, own } of plot.parts.axes) {
      drawn.style.display = view ? "none" : "";
      own.replaceChildren();
      if (!view || !panel.labels) continue;
      for (const step of ticks(first, last)) {
        const x = place(plot, step).toFixed(2);
        element("line", own, { x1: x, x2: x, y1: panel.bottom, y2: panel.bottom + 3.5 });
        element("text", own, { x, y: panel.bottom + 13 }).textContent = step;
      }
    }
  };

  // Plots out of sight are redrawn when they come into sight.
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const plot = plots.find((one) => one.figure === target);
      plot.seen = isIntersecting;
      if (isIntersecting && plot.stale) redraw(plot);
    }
  }, { rootMargin: "200px" });
  for (const plot of plots) watcher.observe(plot.figure);

  const bar = document.getElementById("readout");
  const words = bar.querySelector("span");
  const button = bar.querySelector("button");
  button.textContent = say("reset");

  const nearest = (from, step) => {
    let low = 0, high = from.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (from[middle] <= step) low = middle; else high = middle;
    }
    return step - from[low] <= from[high] - step ? low : high;
  };

  const show = (step) => {
    at = step;
    for (const plot of plots) {
      const { first, last } = range(plot);
      const inside = step !== null && step >= Math.max(first, plot.first) && step <= Math.min(last, plot.last);
      plot.cursor.style.display = inside ? "" : "none";
      if (!inside) continue;
      const x = place(plot, step);
      plot.cursor.setAttribute("x1", x);
      plot.cursor.setAttribute("x2", x);
    }
    const parts = step === null ? [] : Object.entries(report.values).filter(([, [from]]) => from.length).map(([name, [from, values]]) => {
      const value = values[nearest(from, step)];
      return `${name} ${value === null ? say("nonfinite") : value}`;
    });
    if (step !== null) parts.unshift(say("step", { n: step }));
    else if (view) parts.push(say("zoomed", { first: Math.round(view.first), last: Math.round(view.last) }));
    words.textContent = parts.join("  ·  ");
    bar.hidden = step === null && !view;
    button.hidden = !view;
  };

  const look = (first, last) => {
    const width = Math.min(Math.max(last - first, CLOSEST), whole.last - whole.first);
    const start = Math.min(Math.max(first, whole.first), whole.last - width);
    view = width >= whole.last - whole.first ? null : { first: start, last: start + width };
    for (const plot of plots) {
      plot.stale = true;
      if (plot.seen) redraw(plot);
    }
    show(at);
  };
  const reset = () => look(whole.first, whole.last);
  const zoomBy = (factor, around) => {
    const { first, last } = view || whole;
    look(around - (around - first) * factor, around + (last - around) * factor);
  };
  button.addEventListener("click", reset);

  for (const plot of plots) {
    const { svg, figure } = plot;
    figure.classList.add("live");
    let start = null; // where a drag began
    const across = (event) => {
      const bounds = svg.getBoundingClientRect();
      return (event.clientX - bounds.left) / bounds.width * plot.box.width;
    };
    const within = (x) => Math.min(Math.max(x, plot.left), plot.right);
    svg.addEventListener("pointermove", (event) => {
      const x = across(event);
      if (start !== null) {
        const [from, to] = [start, within(x)].sort((one, other) => one - other);
        plot.selection.style.display = "";
        plot.selection.setAttribute("x", from);
        plot.selection.setAttribute("width", to - from);
      }
      const step = Math.round(stepAt(plot, x));
      show(x >= plot.left && x <= plot.right ? step : null);
    });
    svg.addEventListener("pointerleave", () => show(null));
    svg.addEventListener("pointerdown", (event) => {
      const x = across(event);
      if (event.button !== 0 || event.pointerType === "touch" || event.target.closest("a")) return;
      if (x < plot.left - 2 || x > plot.right + 2) return;
      start = within(x);
      svg.setPointerCapture(event.pointerId);
    });
    const finish = (event) => {
      if (start === null) return;
      const [from, to] = [start, within(across(event))].sort((one, other) => one - other);
      start = null;
      plot.selection.style.display = "none";
      if (event.type === "pointerup" && to - from > 5) look(stepAt(plot, from), stepAt(plot, to));
    };
    svg.addEventListener("pointerup", finish);
    svg.addEventListener("pointercancel", finish);
    svg.addEventListener("dblclick", reset);
    const frame = figure.querySelector(".scroll");
    svg.addEventListener("wheel", (event) => {
      const wanted = event.ctrlKey || event.metaKey || event.altKey || document.activeElement === frame;
      const x = across(event);
      if (!wanted || x < plot.left || x > plot.right) return;
      event.preventDefault();
      zoomBy(event.deltaY > 0 ? 1.25 : 0.8, stepAt(plot, x));
    }, { passive: false });
    frame.addEventListener("keydown", (event) => {
      const { first, last } = view || plot;
      const middle = at === null ? Math.round((first + last) / 2) : at;
      const stride = Math.max(1, Math.round((last - first) / 100));
      const turn = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const clamp = (step) => Math.min(Math.max(step, Math.ceil(first)), Math.floor(last));
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (turn && event.shiftKey) look(first + turn * (last - first) / 4, last + turn * (last - first) / 4);
      else if (turn) show(clamp(at === null ? middle : at + turn * stride));
      else if (event.key === "Home") show(clamp(first));
      else if (event.key === "End") show(clamp(last));
      else if (event.key === "+" || event.key === "=") zoomBy(0.5, middle);
      else if (event.key === "-" || event.key === "_") zoomBy(2, middle);
      else if (event.key === "Escape" || event.key === "0") { show(null); reset(); }
      else return;
      event.preventDefault();
    });
    frame.addEventListener("focus", () => bar.setAttribute("aria-live", "polite"));
    frame.addEventListener("blur", () => { bar.setAttribute("aria-live", "off"); show(null); });
  }
  window.addEventListener("beforeprint", reset);
})();
