// The error browser. Text from the data only ever becomes text nodes and attributes, never markup.
(() => {
  const source = document.getElementById("data");
  const place = document.getElementById("browser");
  if (!source || !place) {
    document.documentElement.dataset.ready = "true";
    return;
  }
  const data = JSON.parse(source.textContent);
  source.remove();
  const runs = data.runs;
  const total = data.id.length;
  let ROW = 64; // height of a row in pixels: 4rem in the style sheet, so it follows the reader's font size
  const LONG = 6000; // a longer context is shown in part
  const AROUND = 1500; // characters of it before and after the marks

  function make(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // With several runs, names begin with a letter: "A: seed-1".
  const letter = (run) => runs[run].name.split(":")[0];
  const title = (run) => runs[run].name;
  const outcome = (run, i) => data.outcomes[runs[run].outcome[i]];
  const isRight = (run, i) => runs[run].outcome[i] === 0;
  const f1 = data.figures.indexOf("f1");

  function confidence(run, i) {
    const of = runs[run];
    if (of.p) return of.p[i] ?? 0;
    return of.odds ? Math.abs(of.odds[i] ?? 0) : 0;
  }

  // How much the runs differ on a question; a difference in being right counts most.
  function disagreement(i) {
    const right = runs.map((_, run) => (isRight(run, i) ? 1 : 0));
    const scores = runs.map((of) => of.scores[f1][i]);
    const texts = new Set(runs.map((of) => of.text[i])).size > 1 ? 1 : 0;
    const top = Math.max(...scores.map(Math.abs), 1);
    const spread = (Math.max(...scores) - Math.min(...scores)) / top;
    return 4 * (Math.max(...right) - Math.min(...right)) + 2 * spread + texts;
  }

  // Sorting: name -> the key of a question, highest first. `run` is the chosen one.
  const orders = {
    "surest mistakes first": (i, run) => (isRight(run, i) ? -1e9 - confidence(run, i) : confidence(run, i)),
    "surest first": (i, run) => confidence(run, i),
    "least sure first": (i, run) => -confidence(run, i),
    "order of the file": (i) => -i,
  };
  if (runs.length > 1) orders["disagreements first"] = (i) => disagreement(i);

  // ---- The form.
  let shown = [];
  let active = -1; // a place in `shown`
  const controls = {};
  const form = make("form", { class: "filters", "aria-label": "Filter the questions" });
  form.addEventListener("submit", (event) => event.preventDefault());

  function control(name, input) {
    controls[name] = input;
    form.append(make("label", {}, name, input));
  }

  function choice(name, options) {
    const select = make("select", {});
    for (const [value, text] of options) select.append(make("option", { value }, text));
    select.addEventListener("change", refresh);
    control(name, select);
    return select;
  }

  function counted(names, of) {
    const counts = names.map(() => 0);
    for (const value of of) counts[value] += 1;
    const used = names.map((name, value) => [String(value), `${name} (${counts[value]})`]);
    return [["", "all"], ...used.filter((_, value) => counts[value] > 0)];
  }

  const search = make("input", { type: "search", autocomplete: "off", spellcheck: "false" });
  let waiting = 0;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(refresh, 120);
  });
  control("search questions, answers, contexts, ids", search);
  if (runs.length > 1) {
    const options = runs.map((_, run) => [String(run), title(run)]);
    choice("outcome of", options).addEventListener("change", recount);
  }
  choice("outcome", counted(data.outcomes, runs[0].outcome));
  for (const [name, filter] of Object.entries(data.filters)) choice(name, counted(filter.names, filter.of));
  const names = Object.keys(orders);
  choice(
    "sort",
    names.map((name) => [name, name]),
  );
  controls.sort.value = runs.length > 1 ? "disagreements first" : "surest mistakes first";

  const chosenRun = () => Number(controls["outcome of"]?.value ?? 0);

  function recount() {
    const kept = controls.outcome.value;
    const options = counted(data.outcomes, runs[chosenRun()].outcome);
    controls.outcome.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
    controls.outcome.value = options.some(([value]) => value === kept) ? kept : "";
    refresh();
  }

  // ---- Choosing the questions.
  const lower = new Map();
  function lowered(key, texts) {
    if (!lower.has(key))
      lower.set(
        key,
        texts.map((text) => text.toLowerCase()),
      );
    return lower.get(key);
  }

  function matches(query) {
    const inContext = lowered("context", data.contexts).map((text) => text.includes(query));
    const questions = lowered("question", data.question);
    const golds = lowered(
      "gold",
      data.gold.map((of) => of.map(([text]) => text).join("\n")),
    );
    const texts = runs.map((of, run) => lowered(`run ${run}`, of.text));
    const ids = lowered("id", data.id);
    return (i) =>
      inContext[data.context[i]] ||
      questions[i].includes(query) ||
      golds[i].includes(query) ||
      ids[i].includes(query) ||
      texts.some((of) => of[i].includes(query));
  }

  function refresh() {
    const run = chosenRun();
    const current = shown[active];
    const query = search.value.trim().toLowerCase();
    const tests = [];
    if (query) tests.push(matches(query));
    const wanted = controls.outcome.value;
    if (wanted) tests.push((i) => runs[run].outcome[i] === Number(wanted));
    for (const [name, filter] of Object.entries(data.filters)) {
      const value = controls[name].value;
      if (value) tests.push((i) => filter.of[i] === Number(value));
    }
    shown = [];
    for (let i = 0; i < total; i += 1) if (tests.every((test) => test(i))) shown.push(i);
    const order = orders[controls.sort.value];
    const keys = new Map(shown.map((i) => [i, order(i, run)]));
    shown.sort((left, right) => keys.get(right) - keys.get(left) || left - right);
    const count = shown.length.toLocaleString("en");
    status.textContent = `${count} of ${total.toLocaleString("en")} questions`;
    spacer.style.height = `${shown.length * ROW}px`;
    const again = current === undefined ? -1 : shown.indexOf(current);
    select(again >= 0 ? again : shown.length ? 0 : -1, again < 0);
  }

  // ---- The list: only the rows in sight exist.
  const status = make("span", { role: "status" });
  const steps = { Previous: -1, Next: 1 };
  const buttons = Object.entries(steps).map(([name, by]) => {
    const button = make("button", { type: "button" }, name);
    button.addEventListener("click", () => move(by));
    return button;
  });
  const spacer = make("div", { role: "presentation" });
  const list = make(
    "div",
    { class: "list", role: "listbox", tabindex: "0", "aria-label": "Questions" },
    spacer,
  );
  const chosen = make("div", {});
  const bar = make("p", { class: "bar" }, ...buttons);
  const detail = make(
    "article",
    { class: "detail", tabindex: "0", "aria-label": "The chosen question" },
    bar,
    chosen,
  );
  let drawn = false;

  function draw() {
    drawn = false;
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
    const rows = [];
    for (let at = first; at < last; at += 1) rows.push(row(at));
    spacer.replaceChildren(...rows);
    if (active >= first && active < last) list.setAttribute("aria-activedescendant", `row-${active}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function drawSoon() {
    if (!drawn) requestAnimationFrame(draw);
    drawn = true;
  }

  function row(at) {
    const i = shown[at];
    const parts = runs.length > 2 ? byOutcome(i) : runs.flatMap((_, run) => summary(run, i));
    const made = make(
      "div",
      {
        class: "row",
        role: "option",
        id: `row-${at}`,
        "aria-selected": String(at === active),
        "aria-setsize": String(shown.length),
        "aria-posinset": String(at + 1),
      },
      make("div", { dir: "auto" }, start(data.question[i], 200)),
      make("div", { class: "note" }, ...parts),
    );
    made.style.top = `${at * ROW}px`;
    made.addEventListener("click", () => {
      select(at, false);
      if (narrow.matches) detail.scrollIntoView();
    });
    return made;
  }

  // Each answer in an element of its own: its direction of writing must not turn what follows.
  function summary(run, i) {
    const which = runs.length > 1 ? `${run ? " · " : ""}${letter(run)} ` : "";
    return [`${which}${outcome(run, i)}: `, make("bdi", {}, start(runs[run].text[i], 80) || "(empty)")];
  }

  function byOutcome(i) {
    const groups = new Map();
    runs.forEach((_, run) => {
      const name = outcome(run, i);
      groups.set(name, [...(groups.get(name) ?? []), letter(run)]);
    });
    return [[...groups].map(([name, letters]) => `${name}: ${letters.join(", ")}`).join(" · ")];
  }

  function select(at, scrollToTop) {
    active = at;
    if (scrollToTop) list.scrollTop = 0;
    const top = at * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
    draw();
    describe(shown[at]);
  }

  list.addEventListener("scroll", drawSoon, { passive: true });
  window.addEventListener("resize", resized);
  detail.addEventListener("keydown", (event) => {
    if (event.key === "Escape") list.focus();
  });
  list.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -total, End: total };
    if (event.key === "Enter") detail.focus();
    if (!(event.key in moves)) return;
    event.preventDefault();
    move(moves[event.key]);
  });

  function move(by) {
    if (shown.length) select(Math.min(shown.length - 1, Math.max(0, active + by)), false);
  }

  const narrow = window.matchMedia("(max-width: 48rem)"); // as in the style sheet

  function resized() {
    ROW = 4 * Number.parseFloat(getComputedStyle(document.documentElement).fontSize);
    spacer.style.height = `${shown.length * ROW}px`;
    drawSoon();
  }

  // ---- One question.
  function describe(i) {
    chosen.replaceChildren();
    detail.scrollTop = 0;
    if (i === undefined) {
      chosen.append(make("p", {}, "No question fits these filters."));
      return;
    }
    const context = data.contexts[data.context[i]];
    const golds = data.gold[i];
    const goldTexts = [...new Set(golds.map(([text]) => text))];
    chosen.append(
      make("h3", { class: "text", dir: "auto" }, data.question[i]),
      make("p", { class: "note" }, data.id[i]),
      make("h3", {}, "Gold answers"),
      make(
        "p",
        { class: "text", dir: "auto" },
        goldTexts.join(" · ") || "none: the context does not answer it",
      ),
      make("div", { class: "runs" }, ...runs.map((_, run) => answerOf(run, i))),
    );
    if (context) chosen.append(...contextOf(i, context, golds));
    const candidates = runs.flatMap((of, run) => (of.nbest?.[i].length ? [candidatesOf(run, i)] : []));
    if (candidates.length) {
      chosen.append(make("h3", {}, "Candidates"), make("div", { class: "runs" }, ...candidates));
    }
  }

  // Marks of several runs end with the letters of the runs.
  function contextOf(i, context, golds) {
    const spans = golds.filter(([, at]) => at >= 0).map(([text, at]) => [at, text.length, "gold", ""]);
    let guessed = false;
    runs.forEach((of, run) => {
      const size = of.text[i].length;
      const places = size ? [of.start[i]] : [];
      if (size && of.start[i] < 0) {
        places.splice(0, 1, ...occurrences(context, of.text[i]));
        guessed ||= places.length > 1;
      }
      for (const at of places) spans.push([at, size, "answer", runs.length > 1 ? letter(run) : ""]);
    });
    const legend = [
      make("mark", { class: "gold" }, "gold"),
      ", ",
      make("mark", { class: "answer" }, "predicted"),
    ];
    if (guessed) legend.push(" (at every place of the text: which one is not known)");
    const body = make("div", { class: "text", dir: "auto" });
    fill(body, context, spans, context.length > LONG);
    return [make("h3", {}, "Context: ", ...legend), body];
  }

  function occurrences(context, text) {
    const found = [];
    for (let at = context.indexOf(text); at >= 0 && found.length < 100; at = context.indexOf(text, at + 1)) {
      found.push(at);
    }
    return found;
  }

  const number = (value, digits) =>
    value === null || value === undefined ? "unknown" : value.toFixed(digits);

  function answerOf(run, i) {
    const of = runs[run];
    const facts = data.figures.map((name, at) => `${name} ${number(of.scores[at][i], 2)}`);
    if (of.p) facts.push(`probability ${number(of.p[i], 3)}`);
    if (of.odds) facts.push(`null odds ${number(of.odds[i], 2)}`);
    return make(
      "div",
      {},
      make("h3", {}, title(run)),
      make("p", { class: "text", dir: "auto" }, of.text[i] || "(empty: no answer)"),
      make("p", { class: "note" }, `${outcome(run, i)}; ${facts.join(", ")}`),
    );
  }

  function candidatesOf(run, i) {
    const rows = runs[run].nbest[i].map(([text, p, score]) =>
      make(
        "tr",
        {},
        make("td", { dir: "auto" }, text || "(empty)"),
        make("td", {}, number(p, 3)),
        make("td", {}, number(score, 2)),
      ),
    );
    const names = [runs.length > 1 ? `by ${letter(run)}` : "text", "probability", "score"];
    const head = make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
    return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
  }

  // The context with its marks; marks may overlap. A long context is cut around them.
  function fill(body, context, spans, cut) {
    let from = 0;
    let to = context.length;
    if (cut) {
      const starts = spans.map(([start]) => start);
      const ends = spans.map(([start, size]) => start + size);
      const first = Math.min(...starts, context.length);
      from = whole(context, Math.max(0, (spans.length ? first : 0) - AROUND));
      to = whole(context, Math.min(context.length, from + LONG, Math.max(...ends, from) + AROUND));
    }
    const edges = new Set([from, to]);
    for (const [start, size] of spans)
      for (const edge of [start, start + size]) if (edge > from && edge < to) edges.add(edge);
    const sorted = [...edges].sort((left, right) => left - right);
    const parts = [];
    for (let at = 0; at + 1 < sorted.length; at += 1) {
      const [start, end] = [sorted[at], sorted[at + 1]];
      const over = spans.filter(([s, size]) => s <= start && s + size >= end);
      const names = new Set(over.map(([, , name]) => name));
      const ending = [...new Set(over.filter(([s, size]) => s + size === end).map(([, , , by]) => by))];
      const text = context.slice(start, end);
      const mark = make("mark", { class: [...names].join(" ") }, text);
      const by = ending.filter(Boolean).join("");
      if (by) mark.append(make("sup", {}, by));
      parts.push(names.size ? mark : text);
    }
    body.replaceChildren(...parts);
    if (!cut) return;
    const size = context.length.toLocaleString("en");
    const more = make("button", { type: "button" }, `Show all ${size} characters`);
    more.addEventListener("click", () => fill(body, context, spans, false));
    body.prepend(from ? "… " : "");
    body.append(to < context.length ? " … " : "", make("p", {}, more));
  }

  // Not between the two halves of a character.
  function whole(text, at) {
    return at > 0 && /[\udc00-\udfff]/.test(text[at] ?? "") ? at - 1 : at;
  }

  function start(text, size) {
    return text.slice(0, whole(text, size));
  }

  const keys =
    "Arrow keys, Page Up and Down, Home and End move in the list. Enter goes to the question, Escape back.";
  place.replaceChildren(
    form,
    make("p", { class: "note" }, status, ". ", keys),
    make("div", { class: "panes" }, list, detail),
  );
  resized();
  refresh();
  document.documentElement.dataset.ready = "true";
})();
