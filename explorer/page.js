"use strict";
// The page: what it shows, and what clicks and keys do. The model is in the script above.

const data = JSON.parse(document.getElementById("data").textContent);
const model = new Model(data);
const {mem_layers: LAYERS, mem_heads: H, mem_knn: K, mem_num_keys: S} = data.config;
const {people, readers, training} = data;
for (const name of ["pairs", "readers"]) readers[name] = intsOf(readers[name]);
const LAST = Math.max(0, training.steps.length - 1); // index of the last checkpoint: the model of this page
if (LAST) Object.assign(training, {slots: intsOf(training.slots), weights: bytesOf(training.weights)});

function range(length) {
  return [...Array(length).keys()];
}

// numbers in the text of the page, by the names that page.html uses
const NUMBERS = {
  rows: S * S, keys: S, scores: 2 * S, best: K, heads: H, width: data.config.n_embd,
  sums: range(K).reduce((sum, i) => sum + Math.floor(K / (i + 1)), 0),
};
const TERMS = {
  told: "how often the training text tells each fact about this person. ● You can go back in training.",
  token: "a piece of text, mostly a word with the space before it. Unknown words are cut into letters.",
  layer: "a part of the model that reads the memory. Each has half-keys of its own. All read the same rows.",
  head: "one search. Each head has a query and half-keys of its own. All heads read the same rows.",
  query: `what a head looks for, in two halves. Matrices make both ${{
    tokens: "from the vectors of two words; in the papers, from one state.",
    shifted: "from the states of two tokens; in the papers, from one state.",
    state: "from one state, as in the papers."}[data.config.mem_query]}`,
  "half-key": "learnt numbers. Its score, a dot product, says how well it fits one half of the query.",
  row: `${NUMBERS.width} learnt numbers. Training makes them useful to the tokens that read the row.`,
  slot: `the number of a row. Left half-key i and right half-key j stand for slot i × ${S} + j.`,
  pool: "the table of all rows. A step of training changes only rows that one of its many tokens reads.",
  off: "a row that is off counts as zeros, whoever reads it. The answers are computed again without it.",
  softmax: "turns scores into weights that add up to 100%. A score greater by 1 gets 2.7 times the weight.",
  "who else reads it": "in other texts, the second of these tokens gives it most weight. ⏎ ends a line.",
  state: "numbers that stand for a token in the model. Layers add to them; later tokens can see them.",
  gate: "one factor for each number of the sum, made from the state. A matrix then gives the layer's output.",
  likeliest: "each word has a vector. Its dot product with the state of the last token scores the word.",
  checkpoint: "a copy of the model, saved during training. Half-keys learn, too, so a name changes its rows.",
  recall: "the share of right answers to the questions about all people.",
};

// --- what is chosen, and what the model computes for it ----------------------------------------------------

const state = {
  prompt: "", person: null, question: 0, other: null, // person, other: indices of people, or null
  token: null, layer: LAYERS[0], head: 0, rank: 0, // rank of the chosen row: 0 has most weight
  off: new Set(), // slots of the rows that are switched off
  step: LAST, // index of a checkpoint
};
let now, before, otherNow, otherBefore; // answers, with the switches as they are, and with all rows on
let tokens, firstShown, reads; // of the prompt and its answer. firstShown: older tokens do not fit the model

const promptOf = ({name, asked}, question) => asked[question][0] + name + asked[question][1];
const KNOWN = new Map(people.flatMap((person, p) => // by prompt: the numbers of person and question
  person.asked.map((_, q) => [promptOf(person, q), [p, q]])));
const otherQuestion = () => Math.min(state.question, people[state.other].asked.length - 1);
const search = () => reads[state.layer][state.token][state.head];
const chosenRow = () => search().winners[state.rank];

// Where the name ends: in the place of the name in a question of the corpus, or after a name that is known
function endOfName(prompt) {
  const form = people.flatMap(({asked}) => asked)
    .find(([before, after]) => prompt.startsWith(before) && prompt.endsWith(after));
  const name = people.map(({name}) => name).find(name => prompt.includes(name)) ?? prompt;
  return form ? prompt.length - form[1].length : prompt.lastIndexOf(name) + name.length;
}

function compute() {
  const prompt = state.prompt.trimEnd() || "\n"; // a new line, as in sample.py
  const bothAnswers = prompt => {
    const answer = model.answer(prompt);
    return [state.off.size ? model.answer(prompt, state.off) : answer, answer];
  };
  [now, before] = bothAnswers(prompt);
  if (state.other !== null) {
    [otherNow, otherBefore] = bothAnswers(promptOf(people[state.other], otherQuestion()));
  }
  firstShown = Math.max(0, now.tokens.length - data.config.block_size);
  tokens = now.tokens.slice(firstShown);
  reads = model.forward(tokens, state.off).reads;
  const name = model.tokenizer.encode(prompt.slice(0, endOfName(prompt))).length - 1; // its last token
  state.token = Math.max(0, Math.min(state.token ?? name - firstShown, tokens.length - 1));
}

// Who else reads a slot: the pair of tokens that gives it the greatest weight, if not the chosen pair
function otherReader(slot) {
  for (let n = slot * readers.count; n < (slot + 1) * readers.count && readers.readers[n] >= 0; n++) {
    const [first, second] = readers.pairs.subarray(2 * readers.readers[n]);
    if (first === tokens[state.token - 1] && second === tokens[state.token]) continue;
    return visible(model.tokenizer.decode([first, second]));
  }
  return "nobody";
}

// --- helpers -----------------------------------------------------------------------------------------------

const byId = id => document.getElementById(id);
const fill = (id, ...children) => byId(id).replaceChildren(...children);

// element("p", {class: "answer"}, "text", node) makes <p class="answer">text...</p>. onclick is a function
function element(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

function draw(tag, attributes, ...children) { // the same for a part of a drawing
  return build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function fillDrawing(id, {x, y, size}, label, parts) { // of a square, with bars at its left and at its top
  const [width, height] = [x + size + 4, y + size + 4];
  fill(id, draw("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label},
                ...parts));
}

function rectangle(x, y, width, height, kind, title, attributes = {}) {
  return draw("rect", {x, y, width, height, class: kind, ...attributes}, draw("title", {}, title));
}

function choiceButton(id, text, isChosen, change, kind = "") {
  return element("button", {id, class: kind, "aria-pressed": isChosen, onclick: () => choose(change)}, text);
}

const colored = (kind, text) => element("strong", {class: kind}, text);
const percent = share => share > 0 && share < 0.005 ? "<1%" : `${Math.round(100 * share)}%`;
const count = number => number.toLocaleString("en");
const fixed = number => (number + 0).toFixed(2).replace("-0.00", "0.00").replace("-", "−");
const visible = text => text.replaceAll("\n", "⏎").trim() || "␣";
const tokenText = position => visible(model.tokenizer.decode([tokens[position]]));
const withoutLabels = prompt => prompt.replace("Question: ", "").replace(" Answer:", "");

// --- step 1: question and answer ---------------------------------------------------------------------------

function showAnswer(id, answer, original, right) { // right: a list of answers, or undefined if nobody knows
  const [kind, note] = !right ? ["", "nobody checked this: a memory always returns something"]
    : right.map(normalizeAnswer).includes(normalizeAnswer(answer.text)) ? ["win", "right"]
      : ["lost", `wrong (right: ${right.join(" or ")})`];
  fill(id, element("p", {class: "answer"}, element("b", {class: kind}, answer.text || "(nothing)"),
                   ` ${percent(answer.probability)}`,
                   answer.tokens.length > answer.start + 1 ? " for all these words" : ""),
       element("p", {}, note, state.off.size
         ? `. All rows on: ${original.text} ${percent(original.probability)}` : ""));
}

function showAnswers() {
  fill("tokens", ...tokens.map((_, token) => choiceButton(
    `token-${token}`, tokenText(token), token === state.token, {token, rank: 0},
    token + firstShown < now.start ? "token" : "token new")));
  showAnswer("answer", now, before, people[state.person]?.asked[state.question][2]);
  fill("next", ...now.first.map(([text, share]) => element("div", {class: "next"}, visible(text),
    element("div", {class: "bar", style: `width: ${100 * share}%`}),
    element("span", {class: "number"}, percent(share)))));
  if (state.other === null) return;
  fill("other-question", withoutLabels(promptOf(people[state.other], otherQuestion())));
  showAnswer("other-answer", otherNow, otherBefore, people[state.other].asked[otherQuestion()][2]);
}

// --- step 2: the query, the scores and the map -------------------------------------------------------------

const MAP = {x: 76, y: 64, size: 262}; // the square of all rows. The bars of the scores stand at its edges
const UNIT = MAP.size / S;
const squareSize = weight => 4 + 8 * Math.sqrt(weight);

function showQuery() {
  fill("layers", ...LAYERS.map(layer => choiceButton(`layer-${layer}`, layer, layer === state.layer,
                                                     {layer, rank: 0})));
  fill("heads", ...range(H).map(head => choiceButton(`head-${head}`, head, head === state.head,
                                                     {head, rank: 0})));
  const token = `“${tokenText(state.token)}”`;
  const previous = state.token ? `“${tokenText(state.token - 1)}”` : "(there is none)";
  const [left, right] = {
    tokens: [`the token ${token}`, `the token before, ${previous}`],
    shifted: [`the model's state at ${token}`, `its state at the token before, ${previous}`],
    state: [`the model's state at ${token}`, "the same state"],
  }[data.config.mem_query];
  fill("query-left", left);
  fill("query-right", right);
}

// One bar per half-key, at the left edge of the map or at its top. Those of the best half-keys are colored
function scoreBars(side, scores, best) {
  const lowest = Math.min(...scores), range = Math.max(...scores) - lowest || 1, isBest = new Set(best);
  const thickness = Math.max(UNIT - 0.4, 0.5), isLeft = side === "left";
  return Array.from(scores, (score, key) => {
    const length = 1 + ((isLeft ? MAP.x : MAP.y) - 16) * (score - lowest) / range;
    const kind = isBest.has(key) ? `key-${side}` : "lost";
    const title = `${side} half-key ${key}: score ${fixed(score)}`;
    return isLeft ? rectangle(MAP.x - 2 - length, MAP.y + key * UNIT, length, thickness, kind, title)
      : rectangle(MAP.x + key * UNIT, MAP.y - 2 - length, thickness, length, kind, title);
  });
}

function keyLine(side, key) { // all rows of one half-key
  const at = (key + 0.5) * UNIT;
  return draw("line", side === "left"
    ? {x1: MAP.x, x2: MAP.x + MAP.size, y1: MAP.y + at, y2: MAP.y + at, class: "line-left"}
    : {x1: MAP.x + at, x2: MAP.x + at, y1: MAP.y, y2: MAP.y + MAP.size, class: "line-right"});
}

function mapSquare(slot, size, kind, title = "", attributes = {}) {
  const x = MAP.x + (slot % S + 0.5) * UNIT, y = MAP.y + (Math.floor(slot / S) + 0.5) * UNIT;
  return rectangle(x - size / 2, y - size / 2, size, size, kind, `slot ${count(slot)}${title}`, attributes);
}

function searchOnMap() {
  const {left, right, bestLeft, bestRight, winners} = search(), {slot, weight} = chosenRow();
  return [
    ...["scores of", "half-keys, the", "lowest at 0"].map((line, n) => draw(
      "text", {x: 0, y: 12 + 14 * n}, line)),
    ...scoreBars("left", left, bestLeft), ...scoreBars("right", right, bestRight),
    ...bestLeft.map(key => keyLine("left", key)), ...bestRight.map(key => keyLine("right", key)),
    ...Array.from(state.off, slot => mapSquare(slot, 4, "off", ", switched off")),
    ...winners.map(({slot, weight}, rank) => mapSquare(
      slot, squareSize(weight), state.off.has(slot) ? "off" : "winner", `: weight ${percent(weight)}`,
      {"data-rank": rank, onclick: () => choose({rank})})),
    mapSquare(slot, squareSize(weight) + 4, "chosen"),
  ];
}

function showMap() {
  fillDrawing("map", MAP, "the scores of all half-keys, and the map of all rows", [
    rectangle(MAP.x, MAP.y, MAP.size, MAP.size, "back", "all rows"),
    ...isPast() ? pastOnMap() : searchOnMap()]);
  for (const node of document.querySelectorAll(".today")) node.inert = isPast();
  byId("map-text").hidden = isPast();
  byId("past-text").hidden = !isPast();
}

// --- step 3: the sums of the best half-keys ----------------------------------------------------------------

const CORNER = {x: 42, y: 42, size: 160}; // the square of the sums. The best scores stand at its edges
const CELL = CORNER.size / K;

function sumCell(i, j, score, rank) {
  const {bestLeft, bestRight} = search(), isOff = state.off.has(bestLeft[i] * S + bestRight[j]);
  const isWinner = rank !== undefined, isComputed = (i + 1) * (j + 1) <= K;
  const kind = isWinner ? (isOff ? "off" : "winner") : isComputed ? "computed" : "pruned";
  return rectangle(CORNER.x + j * CELL, CORNER.y + i * CELL, CELL - 1, CELL - 1, kind,
                   `rank ${i + 1} on the left, rank ${j + 1} on the right: `
                   + (isComputed ? `sum ${fixed(score)}` : "not computed"),
                   isWinner ? {"data-rank": rank, onclick: () => choose({rank})} : {});
}

function showCorner() {
  const {left, right, bestLeft, bestRight, winners} = search(), parts = [];
  const rankOf = new Map(winners.map(({i, j}, rank) => [i * K + j, rank]));
  const scoresLeft = bestLeft.map(key => left[key]);
  const scoresRight = bestRight.map(key => right[key]);
  const barLength = (score, scores) => { // on the scale of step 2: the lowest of all scores is at 0
    const lowest = Math.min(...scores);
    return 1 + 37 * (score - lowest) / (Math.max(...scores) - lowest || 1);
  };
  for (let i = 0; i < K; i++) {
    const length = barLength(scoresLeft[i], left), height = barLength(scoresRight[i], right);
    parts.push(rectangle(CORNER.x - 2 - length, CORNER.y + i * CELL, length, CELL - 1, "key-left",
                         `left half-key ${bestLeft[i]}: score ${fixed(scoresLeft[i])}`),
               rectangle(CORNER.x + i * CELL, CORNER.y - 2 - height, CELL - 1, height, "key-right",
                         `right half-key ${bestRight[i]}: score ${fixed(scoresRight[i])}`));
    for (let j = 0; j < K; j++) {
      parts.push(sumCell(i, j, scoresLeft[i] + scoresRight[j], rankOf.get(i * K + j)));
    }
  }
  const {i, j} = chosenRow();
  parts.push(rectangle(CORNER.x + j * CELL - 1, CORNER.y + i * CELL - 1, CELL + 1, CELL + 1, "chosen",
                       "the chosen row"));
  fillDrawing("corner", CORNER, "the sums of the best half-keys", parts);
}

// --- step 4, and the switches of the rows ------------------------------------------------------------------

function rowOfTable({slot, weight}, rank) {
  const isOff = state.off.has(slot), greatest = search().winners[0].weight;
  const box = element("input", {type: "checkbox", id: `row-${rank}`, "aria-label": `row ${slot} is on`});
  box.checked = !isOff;
  box.addEventListener("click", event => {
    event.stopPropagation(); // a click on the rest of the line chooses the row
    switchRows([slot], isOff);
  });
  const kind = (rank === state.rank ? "chosen " : "") + (isOff ? "off" : "");
  return element("tr", {class: kind, "data-rank": rank, onclick: () => choose({rank})},
    element("td", {}, box), element("td", {class: "number"}, count(slot)),
    element("td", {}, element("div", {class: "bar", style: `width: ${100 * weight / greatest}%`})),
    element("td", {class: "number"}, percent(weight)),
    element("td", {}, otherReader(slot)));
}

function showRows() {
  const {winners, left, right} = search(), {slot, i, j, score, weight} = chosenRow();
  const keyLeft = Math.floor(slot / S), keyRight = slot % S;
  fill("rows", ...winners.map(rowOfTable));
  fill("example",
    colored("left", `left half-key ${keyLeft}`), ` scores ${fixed(left[keyLeft])} (rank ${i + 1}), `,
    colored("right", `right half-key ${keyRight}`), ` scores ${fixed(right[keyRight])} (rank ${j + 1}). `,
    `The sum, ${fixed(score)}, has rank ${state.rank + 1} and gets ${percent(weight)}. `,
    `Slot = ${keyLeft} × ${S} + ${keyRight} = `, colored("win", count(slot)), ".");
}

function showSwitches() {
  const winners = LAYERS.flatMap(layer => reads[layer][state.token]).flatMap(read => read.winners);
  const slots = [...new Set(winners.map(winner => winner.slot))];
  const button = (id, slots, isOn, text) => element(
    "button", {id, onclick: () => switchRows(slots, isOn)}, text);
  fill("switches", button("off-all", slots, false, `switch ${slots.length} rows off`),
       button("on-all", [...state.off], true, `on again (${state.off.size} off)`));
  byId("on-all").disabled = !state.off.size;
}

function switchRows(slots, isOn) {
  for (const slot of slots) state.off[isOn ? "delete" : "add"](slot);
  compute();
  show();
}

// --- training ----------------------------------------------------------------------------------------------

const followedPlace = () => training.people.indexOf(state.person);
const isPast = () => state.step < LAST && followedPlace() >= 0;

// What the end of the person's name read at a checkpoint, in this layer: [slot, weight] of all heads
function pastReads(step) {
  const place = step * training.people.length + followedPlace();
  const start = (place * LAYERS.length + LAYERS.indexOf(state.layer)) * H * K;
  return range(H * K).map(n => [training.slots[start + n], training.weights[start + n] / 255]);
}

function pastOnMap() {
  return [...pastReads(LAST).map(([slot]) => mapSquare(slot, 6, "other", ", read after training")),
          ...pastReads(state.step).map(([slot, weight]) => mapSquare(slot, squareSize(weight), "winner",
                                                                     `: weight ${percent(weight)}`))];
}

function showTraining() {
  const place = followedPlace(), step = place < 0 ? LAST : state.step, recall = training.recall?.[step];
  byId("step").disabled = place < 0;
  byId("step").value = step;
  byId("step-text").hidden = place < 0;
  byId("not-followed").hidden = place >= 0;
  if (place < 0 || !LAST) return;
  const last = new Set(pastReads(LAST).map(([slot]) => slot));
  const kept = pastReads(step).filter(([slot]) => last.has(slot)).length;
  for (const node of document.querySelectorAll("[data-past]")) {
    node.textContent = {
      step: training.steps[step], recall: recall === null ? "unknown" : percent(recall), kept, reads: H * K,
      name: people[state.person].name, answer: training.answers[step][place],
      question: withoutLabels(promptOf(people[state.person], 0)),
    }[node.dataset.past];
  }
}

// --- what clicks and keys do -------------------------------------------------------------------------------

function show() {
  const focused = document.activeElement.id.replace(/^token-.*/, `token-${state.token}`);
  showAnswers();
  showQuery();
  showMap();
  showCorner();
  showRows();
  showSwitches();
  showTraining();
  byId(focused)?.focus(); // the focus was lost if its element was made again
}

function choose(change) {
  Object.assign(state, change);
  show();
}

function chooseRow(rank) { // and show it, if the table is longer than its place
  choose({rank});
  byId("rows").children[rank].scrollIntoView({block: "nearest"});
}

function ask(prompt) { // token null: the last one of the name
  const [person, question] = KNOWN.get(prompt.trimEnd()) ?? [null, 0];
  if (person !== null && person === state.other) state.other = (person + 1) % people.length;
  Object.assign(state, {prompt, person, question, token: null, rank: 0});
  update();
}

function update() { // everything, also what people type and select
  compute();
  byId("prompt").value = state.prompt;
  byId("person").value = state.person ?? "";
  byId("other").value = state.other ?? "";
  byId("question").hidden = state.person === null;
  fill("question", ...(people[state.person]?.asked ?? []).map(([before, after], n) => element(
    "option", {value: n}, withoutLabels(`${before}…${after}`))));
  byId("question").value = state.question;
  show();
}

function onKey(event) {
  const isTaken = event.target.matches("select, textarea, input[type=range]"); // they use the keys themselves
  if (isTaken || event.ctrlKey || event.metaKey || event.altKey) return;
  const next = (value, length, by) => (value + by + length) % length;
  const changes = {
    arrowleft: () => choose({token: next(state.token, tokens.length, -1), rank: 0}),
    arrowright: () => choose({token: next(state.token, tokens.length, 1), rank: 0}),
    arrowup: () => chooseRow(next(state.rank, K, -1)),
    arrowdown: () => chooseRow(next(state.rank, K, 1)),
    l: () => choose({layer: LAYERS[next(LAYERS.indexOf(state.layer), LAYERS.length, 1)], rank: 0}),
    h: () => choose({head: next(state.head, H, 1), rank: 0}),
    x: () => switchRows([chosenRow().slot], state.off.has(chosenRow().slot)),
  };
  const change = changes[event.key.toLowerCase()];
  if (!change) return;
  event.preventDefault();
  change();
}

function explain(event) { // the meaning of the word under the mouse, or of the word with the focus
  const word = event.target.closest?.("[data-term]")?.dataset.term;
  byId("explanation").textContent = word ? `${word}: ${TERMS[word]}`
    : "Touch or point at a dotted word to see its meaning.";
}

function listen() {
  const onChange = (id, act) => byId(id).addEventListener("change", event => act(event.target.value));
  onChange("person", value => value && ask(promptOf(people[value], 0)));
  onChange("question", value => ask(promptOf(people[state.person], value)));
  onChange("other", value => { state.other = Number(value); update(); });
  byId("prompt").addEventListener("input", event => ask(event.target.value.replaceAll("\n", " ")));
  byId("step").addEventListener("input", event => choose({step: Number(event.target.value)}));
  for (const name of ["mouseover", "focusin"]) document.addEventListener(name, explain);
  document.addEventListener("keydown", onKey);
}

function start() {
  for (const node of document.querySelectorAll("[data-number]")) {
    node.textContent = count(NUMBERS[node.dataset.number]);
  }
  const options = () => people.map(({name, told}, n) => element(
    "option", {value: n}, name + (training.people.includes(n) ? " ●" : "") + (told ? `, facts told ${told} times` : "")));
  fill("person", element("option", {value: ""}, "Choose a person"), ...options());
  fill("other", ...options());
  for (const node of document.querySelectorAll("#person, .people")) node.hidden = !people.length;
  byId("same").hidden = !people.length || data.config.mem_query !== "tokens";
  byId("training").hidden = !LAST;
  byId("step").max = LAST;
  listen();
  explain({target: document});
  if (people.length) state.other = Math.floor(people.length / 4);
  const person = people[training.people[Math.floor(training.people.length / 2)] ?? 0];
  ask(person ? promptOf(person, 0) : data.start);
}

start();
