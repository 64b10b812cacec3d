"use strict";
// Reads the judgments that the page carries and shows those that match. What models wrote goes into text nodes only.
(async () => {
  const PAGE_SIZE = 20;
  const DEFAULTS = { q: "", show: "all", judge: "", benchmark: "", subset: "", page: "1" };
  const [form, search, count, results] = ["filters", "q", "count", "results"].map((id) => document.getElementById(id));
  const pagers = [...document.querySelectorAll(".pager")];
  let state = { ...DEFAULTS }, matches = [], pattern = null;

  function make(tag, properties, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children); // texts become text nodes
    return element;
  }

  async function inflate(block) {
    const packed = atob(block.textContent), bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
    block.remove();
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  // What is wrong with a judge's rows of one question, in the orders it was asked. What is missing has no verdict either.
  function findFaults(rows, orders, label) {
    const faults = new Set();
    if (rows === null) return faults;
    const choices = new Map(rows.map((row) => [`${row.order}/${row.sample}`, row.choice]));
    if (orders.some((order) => !choices.has(`${order}/0`)) || rows.some((row) => row.choice === null)) faults.add("unparsed");
    for (const row of rows) {
      const other = choices.get(`${3 - row.order}/${row.sample}`) ?? null;
      if (row.choice !== null && row.choice !== label) faults.add("wrong");
      if (row.choice !== null && other !== null && row.choice !== other) faults.add("inconsistent");
    }
    return faults;
  }

  function fillSelect(name, options) {
    const select = form.elements[name];
    select.replaceChildren(select.options[0], ...options.map(([value, text]) => make("option", { value }, text)));
    select.parentElement.hidden = options.length < 2;
  }

  function fillSubsets() {
    const found = questions.filter((item) => !state.benchmark || item.benchmark === state.benchmark);
    const names = [...new Set(found.map((item) => item.subset))].filter(Boolean).sort();
    fillSelect("subset", names.map((name) => [name, name]));
  }

  const shownJudges = () => meta.judges.map((_, i) => i).filter((i) => !state.judge || meta.judges[i] === state.judge);

  function isMatch(item, judges) {
    if (state.benchmark && item.benchmark !== state.benchmark) return false;
    if (state.subset && item.subset !== state.subset) return false;
    if (state.judge && !item.judged[judges[0]]) return false;
    if (state.show !== "all" && !judges.some((judge) => item.faults[judge].has(state.show))) return false;
    if (!pattern) return true;
    const found = (text) => text.search(pattern) >= 0;
    return found(item.id) || item.turns.some(([, text]) => found(text)) || item.answers.some(found) ||
      judges.some((judge) => item.judged[judge]?.some((row) => found(row.reason)));
  }

  function markMatches(text) {
    if (!pattern) return [text];
    const pieces = [];
    let end = 0;
    for (const match of text.matchAll(pattern)) {
      pieces.push(text.slice(end, match.index), make("mark", {}, match[0]));
      end = match.index + match[0].length;
    }
    return [...pieces, text.slice(end)];
  }

  const showText = (text, name) =>
    make("div", { className: "text", tabIndex: 0, role: "group", ariaLabel: name }, ...(text ? markMatches(text) : ["(empty)"]));

  function showJudgment(row, label) {
    const outcome = row.choice === null ? "unparsed" : row.choice === label ? "right" : "wrong";
    const said = row.choice === null ? "no verdict" : `${row.choice ? `answer ${row.choice}` : "a tie"}, ${outcome}`;
    const notes = [`rung ${row.rung}`];
    if (row.order === 2 && row.verdict) notes.unshift(`wrote ${row.verdict}`);
    if (row.sample) notes.push(`sample ${row.sample + 1}`);
    if (row.finish_reason && row.finish_reason !== "stop") notes.push(`ended by ${row.finish_reason}`);
    if (row.p_first !== null) notes.push(`p(first better) ${row.p_first.toFixed(3)}`);
    return make("div", { className: "judgment" },
      make("p", { className: "verdict" }, make("b", { className: outcome }, said), " ", make("span", {}, notes.join(" · "))),
      showText(row.reason, "judgment"));
  }

  function showJudge(item, judge) {
    const columns = meta.orders[judge].map((order) => {
      const rows = item.judged[judge].filter((row) => row.order === order).map((row) => showJudgment(row, item.label));
      return make("div", {}, make("h5", {}, `Answer ${order} shown first`),
        ...(rows.length ? rows : [make("p", { className: "unparsed" }, "No judgment: the prompt did not fit the context.")]));
    });
    const faults = item.faults[judge].has("inconsistent") ? [make("span", { className: "wrong" }, "not the same in both orders")] : [];
    return make("section", { className: "judge" }, make("h4", {}, meta.judges[judge], " ", ...faults),
      make("div", { className: "two" }, ...columns));
  }

  function showQuestion(item, place) {
    const turns = item.turns.map(([role, text]) => make("div", { className: "turn" },
      ...(item.turns.length > 1 ? [make("h5", {}, role)] : []), showText(text, "question")));
    const answers = item.answers.map((text, i) => {
      const better = item.label === i + 1;
      return make("div", { className: better ? "answer better" : "answer" },
        make("h5", {}, `Answer ${i + 1} `, ...(better ? [make("b", {}, "✓ better by the label")] : [])), showText(text, `answer ${i + 1}`));
    });
    const facts = [`${place} of ${matches.length.toLocaleString("en")}`, titles.get(item.benchmark) ?? item.benchmark, item.subset];
    if (item.label === 0) facts.push("a tie by the label");
    if (item.votes) facts.push(`annotators say ${item.votes.join(", ")}`);
    return make("article", { className: "card", ariaLabel: `question ${item.id}` },
      make("p", { className: "facts" }, facts.filter(Boolean).join(" · "), " · ",
        make("a", { href: toHash({ ...DEFAULTS, q: item.id }), title: "link to this question" }, item.id)),
      make("div", { className: "question" }, ...turns), make("div", { className: "two" }, ...answers),
      ...shownJudges().filter((judge) => item.judged[judge]).map((judge) => showJudge(item, judge)));
  }

  const numPages = () => Math.max(1, Math.ceil(matches.length / PAGE_SIZE));

  function showPage() {
    const page = Math.min(Math.max(1, Math.trunc(Number(state.page)) || 1), numPages()), start = (page - 1) * PAGE_SIZE;
    state.page = String(page);
    results.replaceChildren(...matches.slice(start, start + PAGE_SIZE).map((item, i) => showQuestion(item, start + i + 1)));
    for (const mark of results.querySelectorAll("mark:first-of-type")) {
      mark.parentElement.scrollTop = mark.offsetTop - mark.parentElement.offsetTop - 40;
    }
    const total = questions.length.toLocaleString("en");
    count.textContent = matches.length ? `${matches.length.toLocaleString("en")} of ${total} questions` : `None of ${total} questions`;
    for (const pager of pagers) {
      pager.hidden = matches.length <= PAGE_SIZE;
      pager.querySelector(".place").textContent = `Page ${page} of ${numPages()}`;
      pager.querySelector(".previous").disabled = page === 1;
      pager.querySelector(".next").disabled = page === numPages();
    }
  }

  function toHash(values) {
    const changed = Object.entries(values).filter(([name, value]) => value !== DEFAULTS[name]);
    return "#judgments?" + new URLSearchParams(changed);
  }

  function fromHash() {
    const given = new URLSearchParams(location.hash.slice("#judgments?".length));
    return Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, given.get(name) ?? DEFAULTS[name]]));
  }

  function update() {
    const escaped = state.q.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
    pattern = state.q ? new RegExp(escaped, "giu") : null;
    const judges = shownJudges();
    matches = questions.filter((item) => isMatch(item, judges));
    showPage();
  }

  function changeState(changes) {
    state = { ...state, page: "1", ...changes };
    if ("benchmark" in changes) {
      state.subset = "";
      fillSubsets();
    }
    history.replaceState(null, "", toHash(state));
  }

  function turnPage(step) {
    const page = Number(state.page) + step;
    if (page < 1 || page > numPages()) return;
    changeState({ page: String(page) });
    showPage();
    results.focus({ preventScroll: true });
    form.scrollIntoView();
  }

  // Puts what a link says into the form. What it names and this page does not hold is left out.
  function readHash() {
    if (!location.hash.startsWith("#judgments?")) return;
    state = fromHash();
    if (!["all", "wrong", "inconsistent", "unparsed"].includes(state.show)) state.show = "all";
    if (!meta.judges.includes(state.judge)) state.judge = "";
    if (!questions.some((item) => item.benchmark === state.benchmark)) state.benchmark = "";
    if (!questions.some((item) => item.subset === state.subset)) state.subset = "";
    fillSubsets();
    for (const name of ["q", "show", "judge", "benchmark", "subset"]) form.elements[name].value = state[name];
    update();
    document.getElementById("judgments").scrollIntoView();
  }

  let meta, titles, questions = [], waiting;
  try {
    const [head, ...blocks] = document.querySelectorAll('script[type="application/gzip;base64"]');
    meta = await inflate(head);
    titles = new Map(meta.titles);
    for (const block of blocks) {
      questions.push(...(await inflate(block)));
      count.textContent = `Reading ${questions.length.toLocaleString("en")} of ${meta.num_questions.toLocaleString("en")} questions`;
    }
  } catch (error) {
    count.textContent = `The judgments in this page cannot be read (${error.message}); a current browser is needed.`;
    return;
  }
  for (const item of questions) item.faults = item.judged.map((rows, i) => findFaults(rows, meta.orders[i], item.label));
  fillSelect("judge", meta.judges.map((name) => [name, name]));
  fillSelect("benchmark", [...new Set(questions.map((item) => item.benchmark))].sort().map((name) => [name, titles.get(name) ?? name]));
  fillSubsets();
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    clearTimeout(waiting);
    changeState({ [event.target.name]: event.target.value });
    waiting = setTimeout(update, event.target === search ? 200 : 0);
  });
  for (const pager of pagers) {
    pager.querySelector(".previous").addEventListener("click", () => turnPage(-1));
    pager.querySelector(".next").addEventListener("click", () => turnPage(1));
  }
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, .text") || event.ctrlKey || event.metaKey || event.altKey;
    if (event.key === "Escape" && event.target === search) search.blur();
    if (typing) return;
    if (event.key === "/") {
      event.preventDefault();
      search.focus();
    } else if (event.key === "ArrowRight" || event.key === "ArrowLeft") turnPage(event.key === "ArrowRight" ? 1 : -1);
  });
  addEventListener("hashchange", readHash);
  update();
  readHash();
  results.setAttribute("aria-busy", "false");
})();
