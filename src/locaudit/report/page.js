// The script of every page: sections as tabs, the theme, charts, tables that sort, search and filter, and answers.
// Texts of models and files reach the page as text nodes only, never as HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tables = data.tables || {}, charts = data.charts || {}, answers = data.answers;
  const sections = [...document.querySelectorAll("main > section")];

  const el = (tag, attributes, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  };
  const escaped = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
  const number = (x, plus) => {
    const size = Math.abs(x);
    const isFar = size >= 1000 || (size < 0.001 && size > 0);
    let text = Number.isInteger(x) ? String(x) : isFar ? String(Number(x.toPrecision(3))) : x.toFixed(size < 0.1 ? 4 : 3);
    if (plus && x > 0) text = "+" + text;
    return text.replace(/^-/, "−");
  };
  const shown = (x) => (x === null || x === undefined ? "–" : x === true ? "yes" : x === false ? "no" : typeof x === "number" ? number(x) : x);
  const select = (label, options, onchange) => {
    const box = el("select", { onchange: () => onchange(box.value) }, options.map(([value, title]) => el("option", { value }, title)));
    return [el("label", null, label, " ", box), box];
  };
  const search = (label, oninput) => {
    const box = el("input", { type: "search", placeholder: "search", "aria-label": label, oninput: () => oninput(box.value.toLowerCase()) });
    return box;
  };
  const download = (name, text, type) => {
    const link = el("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  // --- colours: those that begin with -- are the page's own

  const probe = el("span", { hidden: true });
  document.body.append(probe);
  const colour = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  const themed = (value) => {
    if (typeof value === "string") return value.startsWith("--") ? colour(value) : value;
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(themed);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, x]) => [key, themed(x)]));
    return value;
  };

  // --- charts

  const trials = tables.trials;
  const cell = (row, key) => row[trials.columns.findIndex((column) => column.key === key)];
  const describe = (row) => {
    const lines = [`<b>${escaped(cell(row, "edit"))}</b>${cell(row, "method") === "none" ? "" : ", " + escaped(cell(row, "method"))}`];
    if (cell(row, "hyperparameter") !== null) lines.push(`strength ${shown(cell(row, "hyperparameter"))}`);
    const where = String(cell(row, "location"));
    if (where) lines.push(escaped(where.length > 60 ? where.slice(0, 60) + "…" : where));
    const scores = trials.columns.map((column, i) => [column, row[i]]).filter(([column, x]) => typeof x === "number" && !column.hidden && !["hyperparameter", "control", "seconds"].includes(column.key));
    const rank = ([column]) => (trials.first.includes(column.key) ? 0 : column.key === "kl" ? 1 : 2);
    scores.sort((a, b) => rank(a) - rank(b));
    for (const [column, x] of scores.slice(0, 12)) lines.push(`${escaped(column.title)} ${number(x)}`);
    return lines.join("<br>");
  };
  const axis = () => ({ gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--faint"), automargin: true, exponentformat: "power" });
  const drawn = new Set();
  const draw = (box) => {
    const { data: traces, layout } = charts[box.dataset.chart];
    const own = themed(traces).map((trace) => {
      if (!trace.customdata || !trials || trace.type !== "scatter") return trace;
      return { ...trace, text: trace.customdata.map((i) => describe(trials.rows[i])), hovertemplate: "%{text}<extra></extra>" };
    });
    const wide = box.clientWidth > 520;
    const common = {
      font: { color: colour("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 50, r: 15, t: 10, b: 40 },
      hoverlabel: { align: "left" }, hovermode: "closest", autosize: true,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: wide ? 12 : 10 } },
    };
    const mixed = { ...common, ...themed(layout), xaxis: { ...axis(), ...layout.xaxis }, yaxis: { ...axis(), ...layout.yaxis } };
    const options = { responsive: true, displaylogo: false, displayModeBar: false };
    Plotly.react(box, own, mixed, options).then(() => {
      if (drawn.has(box)) return;
      drawn.add(box);
      box.dataset.drawn = "yes";
      box.on("plotly_click", (event) => {
        const i = event.points[0].customdata;
        if (typeof i === "number" && event.points[0].data.type === "scatter") openAnswers(i);
      });
    });
  };
  const drawIn = (section) => {
    for (const box of section.querySelectorAll(".chart")) if (charts[box.dataset.chart] && !drawn.has(box)) draw(box);
  };

  // --- tables

  const csv = (table, rows) => {
    const quoted = (x) => (x === null ? "" : /[",\n\r]/.test(x) ? `"${String(x).replaceAll('"', '""')}"` : String(x));
    return [table.columns.map((column) => column.key), ...rows].map((row) => row.map(quoted).join(",")).join("\n") + "\n";
  };
  const records = (table, rows) => rows.map((row) => Object.fromEntries(row.map((x, i) => [table.columns[i].key, x])));
  const buttons = (name, table, rows) => [
    el("button", { type: "button", onclick: () => download(`${name}.csv`, csv(table, rows()), "text/csv") }, "CSV"),
    el("button", { type: "button", onclick: () => download(`${name}.json`, JSON.stringify(records(table, rows()), null, 1), "application/json") }, "JSON"),
  ];
  const compare = (a, b) => {
    if (a === b) return 0;
    if (a === null || a === undefined) return 1; // what was not measured comes last
    if (b === null || b === undefined) return -1;
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  };
  const STEP = 200;
  const showTable = (box) => {
    const name = box.dataset.table, table = tables[name];
    if (!table || !table.rows.length) return;
    const { columns, rows, title } = table;
    const isText = columns.map((_, i) => rows.some((row) => typeof row[i] === "string" || typeof row[i] === "boolean"));
    const first = table.first.map((key) => columns.findIndex((column) => column.key === key));
    const used = [...new Set([...first, ...columns.keys()])].filter((i) => {
      const values = new Set(rows.map((row) => row[i] ?? ""));
      return !columns[i].hidden && (values.size > 1 || (!values.has("") && (!isText[i] || rows.length < 2))); // what is the same in all rows says nothing
    });
    let sorted = null, down = false, words = "", limit = STEP;
    const wanted = new Map();
    if (table.only) wanted.set(columns.findIndex((column) => column.key === table.only[0]), shown(table.only[1]));
    const found = () => {
      const kept = rows.filter((row) => [...wanted].every(([i, value]) => value === "" || shown(row[i]) === value)
        && (!words || row.some((x) => x !== null && String(x).toLowerCase().includes(words))));
      if (sorted === null) return kept;
      return [...kept].sort((a, b) => {
        const order = compare(a[sorted], b[sorted]);
        return a[sorted] === null || b[sorted] === null ? order : down ? -order : order;
      });
    };
    const count = el("span", { role: "status" });
    const body = el("tbody");
    const heads = used.map((i) => el("th", { scope: "col", class: isText[i] && "text", "aria-sort": "none" },
      el("button", { type: "button", onclick: () => { down = sorted === i && !down; sorted = i; fill(); } }, columns[i].title)));
    const fill = () => {
      const kept = found();
      heads.forEach((head, k) => head.setAttribute("aria-sort", used[k] !== sorted ? "none" : down ? "descending" : "ascending"));
      body.replaceChildren(...kept.slice(0, limit).map((row) => el("tr", null, used.map((i, k) => {
        const ends = columns[i].interval, between = ends && row[ends[0]] !== null ? el("small", null, `${number(row[ends[0]])} to ${number(row[ends[1]])}`) : null;
        return el(k ? "td" : "th", { scope: k ? null : "row", class: isText[i] && (String(row[i]).length > 32 ? "text long" : "text") }, String(shown(row[i])), between);
      }))));
      const all = table.n > rows.length ? `${table.n}; ${table.n - rows.length} are only in ${name}.csv beside this page` : table.n;
      count.textContent = `${Math.min(kept.length, limit)} of ${all}`;
      more.hidden = kept.length <= limit;
    };
    const more = el("button", { type: "button", onclick: () => { limit = Infinity; fill(); } }, "Show all");
    const filters = columns.flatMap((column, i) => {
      const values = [...new Set(rows.map((row) => shown(row[i])))];
      if (!column.filter || values.length < 2) return [];
      const [label, choice] = select(column.title, [["", "all"], ...values.map((x) => [x, x || "none"])], (value) => { wanted.set(i, value); fill(); });
      if (wanted.has(i) && !values.includes(wanted.get(i))) wanted.delete(i);
      choice.value = wanted.get(i) ?? "";
      return [label];
    });
    const isLong = rows.length > 8;
    box.append(
      el("h3", null, title),
      el("div", { class: "tools" }, isLong ? search(`Search ${title}`, (text) => { words = text; fill(); }) : null, filters, isLong ? count : null, more, buttons(name, table, found)),
      el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title }, el("table", null, el("thead", null, el("tr", null, heads)), body)),
    );
    fill();
  };

  // --- answers

  let openAnswers = () => {};
  const showAnswers = (box) => {
    const { questions, texts, speakers, aspects } = answers;
    const base = speakers[0];
    const said = (one, i) => texts[one.text[i]];
    const methods = [...new Set(speakers.slice(1).map((one) => one.method))];
    const state = { other: null, words: "", only: "all", sort: "order", limit: 20 };
    const fixed = speakers.filter((one) => one.sample === 0 && ["claim", "whole"].includes(one.arm) && !/ = /.test(one.name));
    const others = speakers.filter((one) => one !== base && !fixed.includes(one));
    state.other = others.find((one) => one.sample === 0) ?? others[0] ?? null;
    const columns = () => [base, ...fixed, ...(state.other ? [state.other] : [])];
    const judged = (one, i) => Object.entries(aspects).map(([aspect, word]) => {
      const p = one.judged[aspect]?.[i];
      if (p === null || p === undefined) return el("small", null, `${word}: not judged${one.why[aspect]?.[i] ? ` (${one.why[aspect][i]})` : ""}`);
      return el("small", null, `${p >= 0.5 ? "✓" : "✗"} ${word} ${p.toFixed(2)}`);
    });
    const marks = (one, i) => {
      if (one === base) return null;
      const change = one.change[i], of = speakers.find((x) => x.arm === "base" && x.sample === one.sample) ?? base;
      return [
        change < 0 ? el("span", { class: "mark-worse" }, `made worse ${number(change, true)}`) : null,
        change > 0 ? el("span", { class: "mark-better" }, `better ${number(change, true)}`) : null,
        one.text[i] === of.text[i] ? el("span", { class: "mark-same" }, "same") : null,
      ];
    };
    const lead = () => fixed[0] ?? state.other;
    const keys = {
      order: (i) => i,
      worst: (i) => lead()?.change[i] ?? Infinity,
      best: (i) => -(lead()?.change[i] ?? -Infinity),
    };
    for (const aspect of Object.keys(aspects)) keys[aspect] = (i) => lead()?.judged[aspect][i] ?? Infinity;
    const kinds = {
      all: () => true,
      worse: (i) => columns().some((one) => one !== base && one.change[i] < 0),
      better: (i) => columns().some((one) => one !== base && one.change[i] > 0),
      different: (i) => columns().some((one) => one !== base && one.text[i] !== base.text[i]),
    };
    const list = el("ol", { class: "answers" });
    const count = el("span", { role: "status" });
    const more = el("button", { type: "button", onclick: () => { state.limit += 100; fill(); } }, "Show more");
    const fill = () => {
      const found = questions.map((_, i) => i).filter((i) => kinds[state.only](i)
        && (!state.words || [questions[i], ...columns().map((one) => said(one, i))].some((text) => text.toLowerCase().includes(state.words))));
      found.sort((a, b) => keys[state.sort](a) - keys[state.sort](b) || a - b);
      list.replaceChildren(...found.slice(0, state.limit).map((i) => el("li", { "data-question": i },
        el("h3", null, el("bdi", null, questions[i])),
        el("dl", { class: "replies" }, columns().map((one) => el("div", null,
          el("dt", null, one.name + (one.sample ? `, sample ${one.sample}` : "")),
          el("dd", null, el("div", { class: "said" }, said(one, i) ? el("bdi", null, said(one, i)) : el("em", null, "(nothing)")), el("div", null, marks(one, i)), judged(one, i))))))));
      count.textContent = `${Math.min(found.length, state.limit)} of ${questions.length}`;
      more.hidden = found.length <= state.limit;
    };
    const [whoLabel, who] = select("beside claim and whole model", others.map((one) => [speakers.indexOf(one), one.name + (one.sample ? `, sample ${one.sample}` : "")]), (value) => { state.other = speakers[value]; fill(); });
    const [onlyLabel] = select("show", [["all", "all questions"], ["worse", "made worse"], ["better", "made better"], ["different", "answers that differ"]], (value) => { state.only = value; fill(); });
    const [sortLabel] = select("sort by", [["order", "order"], ["worst", "made worse most"], ["best", "made better most"], ...Object.entries(aspects).map(([aspect, word]) => [aspect, `least ${word}`])], (value) => { state.sort = value; fill(); });
    const rows = () => questions.flatMap((question, i) => speakers.map((one) => [question, one.name, one.method, one.sample, said(one, i), one.change[i], ...Object.keys(aspects).map((aspect) => one.judged[aspect][i])]));
    const table = { columns: ["question", "edit", "method", "sample", "answer", "change", ...Object.keys(aspects)].map((key) => ({ key })) };
    tables.answers = { ...table, title: "Answers", get rows() { return rows(); } };
    box.append(
      el("div", { class: "tools" }, search("Search questions and answers", (text) => { state.words = text; fill(); }), onlyLabel, sortLabel, others.length ? whoLabel : null, count, buttons("answers", table, rows)),
      list, more,
    );
    openAnswers = (trial) => {
      const one = speakers.find((x) => x.trial === trial && x.sample === 0);
      if (!one) return;
      if (others.includes(one)) { state.other = one; who.value = speakers.indexOf(one); }
      fill();
      location.hash = "#answers";
    };
    if (state.other) who.value = speakers.indexOf(state.other);
    fill();
  };

  // --- sections, theme, downloads

  const links = [...document.querySelectorAll(".bar nav a")];
  const open = () => {
    const target = location.hash.length > 1 ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
    const current = target?.closest("main > section") ?? sections[0];
    sections.forEach((section) => section.classList.toggle("current", section === current));
    links.forEach((link) => {
      if (link.hash === `#${current.id}`) { link.setAttribute("aria-current", "true"); link.scrollIntoView({ block: "nearest", inline: "nearest" }); } else link.removeAttribute("aria-current");
    });
    drawIn(current);
    if (target === current || !target) window.scrollTo(0, 0); else target.scrollIntoView();
  };
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.style.colorScheme || (dark.matches ? "dark" : "light")) === "dark";
  const paint = () => {
    theme.textContent = isDark() ? "Light" : "Dark";
    drawn.forEach(draw);
  };
  theme.hidden = false;
  theme.setAttribute("aria-label", "Switch between light and dark");
  theme.addEventListener("click", () => { root.style.colorScheme = isDark() ? "light" : "dark"; paint(); });
  dark.addEventListener("change", paint);
  window.addEventListener("hashchange", open);
  window.addEventListener("beforeprint", () => sections.forEach(drawIn));

  document.querySelectorAll(".data-table").forEach(showTable);
  if (answers) showAnswers(document.getElementById("answer-list"));
  const downloads = document.getElementById("downloads");
  if (downloads) {
    for (const [name, text] of Object.entries(data.files || {})) {
      downloads.append(el("div", { class: "tools" }, el("span", null, name), el("button", { type: "button", onclick: () => download(name, text, "application/json") }, "JSON")));
    }
    for (const [name, table] of Object.entries(tables)) downloads.append(el("div", { class: "tools" }, el("span", null, table.title), buttons(name, table, () => table.rows)));
  }
  document.body.classList.add("tabbed");
  paint();
  open();
})();
