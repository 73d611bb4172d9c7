"use strict";
// The sample browser: all samples stay compressed data in memory; the page holds the elements of one page of them.
(() => {
  const PAGE = 10;
  const LONG = 600; // characters from which a text is folded
  const CONTROL = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u;
  const byId = (id) => document.getElementById(id);
  const state = { set: 0, page: 0, found: [] };
  let data, pieces;

  function make(tag, name, text) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // Text as text: control characters written out, special tokens pale. Nothing here parses HTML.
  function show(text) {
    const place = make("div", "text");
    for (const piece of text.split(pieces)) {
      if (piece === "") continue;
      if (piece !== "\n" && piece.length <= 2 && CONTROL.test(piece)) place.append(make("span", "control", escaped(piece)));
      else if (data.special.includes(piece)) place.append(make("span", "special", piece));
      else place.append(piece);
    }
    if (!text) place.append(make("span", "special", "(nothing)"));
    return text.length > LONG || text.split("\n").length > 9 ? folded(place) : [place];
  }

  function escaped(char) {
    const named = { "\t": "\\t", "\r": "\\r", "\0": "\\0" };
    const hex = char.codePointAt(0).toString(16);
    return named[char] || (hex.length <= 2 ? `\\x${hex.padStart(2, "0")}` : hex.length <= 4 ? `\\u${hex.padStart(4, "0")}` : `\\U${hex.padStart(8, "0")}`);
  }

  function folded(place) {
    place.classList.add("long");
    const more = make("button", "more", "Show all");
    more.type = "button";
    more.setAttribute("aria-expanded", "false");
    more.addEventListener("click", () => {
      const closed = place.classList.toggle("long");
      more.textContent = closed ? "Show all" : "Show less";
      more.setAttribute("aria-expanded", String(!closed));
    });
    return [place, more];
  }

  function logps(players, values) {
    const place = make("div", "logps");
    values.forEach((value, index) => {
      if (value === null) return;
      const one = make("span");
      one.append(make("small", "", `log p ${String(players[index]).padStart(3, "0")}`), value.toFixed(2).replace("-", "−"));
      place.append(one);
    });
    return place;
  }

  function line(kind, who, note, text, players, values) {
    const row = make("div", `said ${kind}`);
    const body = make("div");
    body.append(...show(text));
    const notes = make("div", "notes");
    notes.append(...note);
    row.append(make("div", "who", who), body, notes, logps(players, values));
    return row;
  }

  function verdict(said) {
    const [, answer, correct, finish] = said;
    const notes = [];
    if (correct !== null) notes.push(make("span", `verdict ${correct ? "correct" : "incorrect"}`, correct ? "correct" : "incorrect"));
    const about = [];
    if (answer !== null && correct === false) about.push(`answer ${written(answer)}`);
    if (finish === "length") about.push("cut off");
    if (finish === "set_aside") about.push("set aside");
    if (about.length) notes.push(make("span", "", about.join(", ")));
    return notes;
  }

  const written = (text) => [...text].map((char) => (CONTROL.test(char) ? escaped(char) : char)).join("");

  function card(sample, set) {
    const [id, row, prompt, target, reference, targetLogps, said] = sample;
    const place = make("article", "sample");
    const head = make("header");
    head.append(make("span", "", `row ${row}`), make("span", "", `prompt ${written(id)}`));
    const ask = make("div", "ask");
    ask.append(...show(prompt));
    const note = reference === null ? [] : [make("span", "", `answer ${written(reference)}`)];
    place.append(head, ask, line("target", "target", note, target, set.players, targetLogps));
    set.voices.forEach((voice, index) => {
      if (!said[index]) return;
      const chosen = byId("voice").value === String(index) ? "chosen" : "";
      place.append(line(chosen, written(voice), verdict(said[index]), said[index][0], set.players, said[index][4]));
    });
    return place;
  }

  // Filters.

  function haystack(sample) {
    return (sample.hay ??= [sample[2], sample[3], ...sample[6].map((one) => (one ? one[0] : ""))].join("\n\n").toLowerCase());
  }

  function fits(sample, voice, wanted) {
    const said = sample[6];
    if (voice !== "any" && !said[voice]) return false;
    if (wanted === "all") return true;
    if (wanted === "gained" || wanted === "lost") {
      const known = said.filter((one) => one && one[2] !== null);
      const last = voice === "any" ? known[known.length - 1] : said[voice];
      return known.length > 0 && known[0][2] === (wanted === "lost") && last[2] === (wanted === "gained");
    }
    const judged = (voice === "any" ? said : [said[voice]]).filter((one) => one && one[2] !== null);
    return judged.some((one) => one[2] === (wanted === "correct"));
  }

  const lowest = (sample) => { const known = sample[5].filter((value) => value !== null); return known.length ? known[known.length - 1] : Infinity; };
  const longest = (sample) => Math.max(...sample[6].map((one) => (one ? one[0].length : 0)), 0);

  function apply() {
    const set = data.sets[state.set];
    const query = byId("query").value.toLowerCase();
    const [voice, wanted, order] = ["voice", "verdict", "order"].map((id) => byId(id).value);
    const found = set.samples.filter((sample) => fits(sample, voice, wanted) && (!query || haystack(sample).includes(query)));
    if (order === "unlikely") found.sort((a, b) => lowest(a) - lowest(b));
    if (order === "long") found.sort((a, b) => longest(b) - longest(a));
    state.found = found;
    turn(0);
  }

  function turn(page) {
    const set = data.sets[state.set];
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
    state.page = Math.min(Math.max(0, page), pages - 1);
    const first = state.page * PAGE;
    const shown = state.found.slice(first, first + PAGE);
    byId("list").replaceChildren(...shown.map((sample) => card(sample, set)));
    const all = set.samples.length.toLocaleString("en");
    const number = state.found.length.toLocaleString("en");
    byId("count").textContent = state.found.length
      ? `${(first + 1).toLocaleString("en")}–${(first + shown.length).toLocaleString("en")} of ${number}${state.found.length < set.samples.length ? ` that fit, of ${all}` : ""} samples`
      : `None of ${all} samples fits.`;
    byId("page").textContent = `page ${(state.page + 1).toLocaleString("en")} of ${pages.toLocaleString("en")}`;
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = state.page === pages - 1;
    mark(byId("query").value.toLowerCase());
  }

  // What was searched for, marked without touching the text. Browsers that cannot do this mark nothing.
  function mark(query) {
    if (!("highlights" in CSS)) return;
    CSS.highlights.delete("found");
    if (!query) return;
    const ranges = [];
    const walk = document.createTreeWalker(byId("list"), NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      const node = walk.currentNode;
      if (!node.parentElement.closest(".text")) continue;
      const lower = node.data.toLowerCase();
      if (lower.length !== node.data.length) continue; // offsets would not fit
      for (let at = lower.indexOf(query); at !== -1 && ranges.length < 2000; at = lower.indexOf(query, at + query.length)) {
        const range = new Range();
        range.setStart(node, at);
        range.setEnd(node, at + query.length);
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  function choose(set) {
    state.set = set;
    document.querySelectorAll("[data-set]").forEach((tab) => tab.setAttribute("aria-pressed", String(Number(tab.dataset.set) === set)));
    const options = [["any", "any checkpoint"], ...data.sets[set].voices.map((voice, index) => [String(index), written(voice)])];
    byId("voice").replaceChildren(...options.map(([value, label]) => Object.assign(make("option", "", label), { value })));
    const judged = data.sets[set].samples.some((sample) => sample[6].some((one) => one && one[2] !== null));
    byId("verdict").value = "all";
    byId("verdict").disabled = !judged;
    apply();
  }

  function turnAndGo(by) {
    turn(state.page + by);
    byId("count").scrollIntoView({ block: "start" });
  }

  function listen() {
    let waiting;
    byId("query").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 150); });
    byId("filters").addEventListener("submit", (event) => { event.preventDefault(); apply(); });
    for (const id of ["voice", "verdict", "order"]) byId(id).addEventListener("change", apply);
    document.querySelectorAll("[data-set]").forEach((tab) => tab.addEventListener("click", () => choose(Number(tab.dataset.set))));
    byId("previous").addEventListener("click", () => turnAndGo(-1));
    byId("next").addEventListener("click", () => turnAndGo(1));
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, .scroll, .yaml")) return;
      if (event.key === "/") { event.preventDefault(); byId("query").focus(); }
      const near = byId("samples").getBoundingClientRect();
      if (near.top > innerHeight || near.bottom < 0) return;
      if (event.key === "ArrowLeft" && !byId("previous").disabled) turnAndGo(-1);
      if (event.key === "ArrowRight" && !byId("next").disabled) turnAndGo(1);
    });
  }

  unpacked("browsed").then((source) => {
    data = JSON.parse(source);
    const tokens = data.special.map((token) => token.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    pieces = new RegExp(`(${[...tokens, "\\n", "[\\p{C}\\p{Zl}\\p{Zp}]", "(?! )\\p{Zs}"].join("|")})`, "u");
    listen();
    choose(0);
    document.documentElement.dataset.browsable = "yes";
  }).catch((error) => trouble("The samples", error));
})();
