"use strict";
// What paper cannot do: one cursor over all plots over time, with values; search among modules.
(() => {
  const plots = [...document.querySelectorAll("[data-time]")].map((figure) => {
    const svg = figure.querySelector("svg");
    const [left, right, first, last] = JSON.parse(figure.dataset.time);
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const box = svg.viewBox.baseVal;
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", 0);
    cursor.setAttribute("y2", box.height);
    cursor.style.display = "none";
    svg.append(cursor);
    return { svg, left, right, first, last, cursor, box };
  });
  const data = document.getElementById("values");
  const lines = data ? JSON.parse(data.textContent) : {};
  const readout = document.getElementById("readout");

  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    return step - steps[low] <= steps[high] - step ? low : high;
  };

  const show = (step) => {
    for (const plot of plots) {
      const inside = step !== null && step >= plot.first && step <= plot.last;
      plot.cursor.style.display = inside ? "" : "none";
      if (!inside) continue;
      const x = plot.left + (step - plot.first) / (plot.last - plot.first) * (plot.right - plot.left);
      plot.cursor.setAttribute("x1", x);
      plot.cursor.setAttribute("x2", x);
    }
    if (!readout) return;
    const parts = step === null ? [] : Object.entries(lines).filter(([, [steps]]) => steps.length).map(([name, [steps, values]]) => {
      const value = values[nearest(steps, step)];
      return `${name} ${value === null ? "non-finite" : value}`;
    });
    readout.textContent = step === null ? "" : [`step ${step}`, ...parts].join("  ·  ");
  };

  for (const plot of plots) {
    plot.svg.addEventListener("pointermove", (event) => {
      const bounds = plot.svg.getBoundingClientRect();
      const x = (event.clientX - bounds.left) / bounds.width * plot.box.width;
      const step = Math.round(plot.first + (x - plot.left) / (plot.right - plot.left) * (plot.last - plot.first));
      show(step >= plot.first && step <= plot.last ? step : null);
    });
    plot.svg.addEventListener("pointerleave", () => show(null));
  }

  for (const search of document.querySelectorAll("input[type=search]")) {
    search.closest(".script").style.display = "block";
    const rows = [...document.getElementById(search.dataset.table).tBodies[0].rows];
    search.addEventListener("input", () => {
      const word = search.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(word);
    });
  }
})();
