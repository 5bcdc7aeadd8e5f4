// Search and sort of modules, and texts that can be copied.
(() => {
  for (const one of document.querySelectorAll(".script")) one.style.display = "block";
  const make = (name, parent, properties = {}) => {
    const made = Object.assign(document.createElement(name), properties);
    parent.append(made);
    return made;
  };

  for (const search of document.querySelectorAll("input[data-table]")) {
    const rows = [...document.getElementById(search.dataset.table).tBodies[0].rows];
    search.addEventListener("input", () => {
      const word = search.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(word);
    });
  }

  // What has no number comes last, whichever way.
  const value = (cell) => ("v" in cell.dataset ? (cell.dataset.v === "" ? null : Number(cell.dataset.v)) : cell.textContent);
  const order = (one, other) => (typeof one === "string" ? one.localeCompare(other) : one - other);
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const first = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.title = say("sortable");
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const numbers = head.classList.contains("n");
        const next = { null: numbers ? "descending" : "ascending", descending: numbers ? "ascending" : null, ascending: numbers ? null : "descending" }[now];
        for (const other of heads) other.removeAttribute("aria-sort");
        if (next) head.setAttribute("aria-sort", next);
        const turn = next === "descending" ? -1 : 1;
        const rows = next === null ? first : [...first].sort((one, other) => {
          const [mine, its] = [value(one.cells[column]), value(other.cells[column])];
          if (mine === null || its === null) return (mine === null) - (its === null);
          return turn * order(mine, its);
        });
        body.append(...rows);
      });
    });
  }

  // The rows of a heat map.
  for (const [name, rows] of Object.entries(report.rows)) {
    const figure = document.getElementById(name);
    const panels = report.zoom[name].panels;
    const tools = document.createElement("p");
    tools.className = "tools small quiet";
    figure.querySelector(".scroll").before(tools);
    const search = make("input", make("label", tools, { textContent: `${say("search")} ` }), { type: "search" });
    const select = make("select", make("label", tools, { textContent: `${say("order")} ` }));
    for (const key of ["execution", "norm", "growth", "bad"]) make("option", select, { value: key, textContent: say(key) });
    const apply = () => {
      const word = search.value.trim().toLowerCase();
      panels.forEach((panel, index) => {
        const own = rows.filter((row) => row.panel === index);
        const height = (panel.bottom - panel.top) / own.length;
        const fits = (row) => [row.name, ...row.members].some((one) => one.toLowerCase().includes(word));
        const shown = own.map((row, place) => ({ row, place })).filter(({ row }) => fits(row));
        const key = select.value;
        const size = ({ row }) => (row[key] === null ? -Infinity : row[key]);
        if (key !== "execution") shown.sort((one, other) => (size(other) - size(one)) || one.place - other.place);
        const goal = new Map(shown.map(({ row }, position) => [row, position]));
        own.forEach((row, place) => {
          for (const id of row.ids) {
            const part = document.getElementById(`${name}-${id}`);
            part.style.display = goal.has(row) ? "" : "none";
            if (goal.has(row)) part.setAttribute("transform", `translate(0 ${((goal.get(row) - place) * height).toFixed(2)})`);
          }
        });
        const parts = document.getElementById(`${name}-parts${index}`);
        if (parts) parts.style.display = key === "execution" && !word ? "" : "none";
      });
    };
    search.addEventListener("input", apply);
    select.addEventListener("change", apply);
  }

  for (const text of document.querySelectorAll("pre.copy")) {
    const frame = document.createElement("div");
    frame.className = "copied";
    text.before(frame);
    frame.append(text);
    const button = make("button", frame, { type: "button", textContent: say("copy") });
    button.addEventListener("click", async () => {
      const words = text.textContent.trim();
      try {
        await navigator.clipboard.writeText(words);
      } catch {
        const range = document.createRange();
        range.selectNodeContents(text);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        document.execCommand("copy");
      }
      button.textContent = say("copied");
      setTimeout(() => { button.textContent = say("copy"); }, 2000);
    });
  }

  // A link into a closed part opens it; a printed page has all parts.
  const open = () => {
    const part = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (part && part.tagName === "DETAILS") { part.open = true; part.scrollIntoView(); }
  };
  window.addEventListener("hashchange", open);
  open();
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
  });
  window.addEventListener("afterprint", () => { for (const one of closed) one.open = false; });
})();
