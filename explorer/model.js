"use strict";
// The trained model of this page, in plain loops over arrays of numbers. It computes what model.py and
// memory.py compute. A matrix is one long array, row after row. T is the number of tokens, C the width of the
// model.

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const floatsOf = base64 => new Float32Array(bytesOf(base64).buffer);
const intsOf = base64 => new Int32Array(bytesOf(base64).buffer);

// --- text and tokens ---------------------------------------------------------------------------------------

class Tokenizer {
  // pattern: cuts a text into pieces. tokens: the bytes of each token in base64, by its id. end: a special id
  constructor({pattern, tokens, end}) {
    // JavaScript's \s is not Unicode's white space, which the pattern means
    const unicode = pattern.replaceAll("\\s", "\\p{White_Space}").replaceAll("\\S", "\\P{White_Space}");
    this.pattern = new RegExp(unicode, "gu");
    this.end = end;
    this.bytes = tokens.map(bytesOf);
    this.ids = new Map(tokens.map((token, id) => [atob(token), id])); // one character stands for one byte
  }

  encode(text) {
    const pieces = text.match(this.pattern) ?? [];
    return pieces.flatMap(piece => this.encodePiece(new TextEncoder().encode(piece)));
  }

  // A whole piece is one token if the vocabulary has it. If not, byte pair encoding: start with single bytes,
  // and join the neighbours that form the token with the lowest id, until no two neighbours form a token.
  encodePiece(bytes) {
    const whole = this.ids.get(String.fromCharCode(...bytes));
    if (whole !== undefined) return [whole];
    const parts = [...bytes].map(byte => String.fromCharCode(byte));
    for (;;) {
      let best = -1, bestId = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const id = this.ids.get(parts[i] + parts[i + 1]) ?? Infinity;
        if (id < bestId) [best, bestId] = [i, id];
      }
      if (best < 0) return parts.map(part => this.ids.get(part));
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
  }

  // ids that the vocabulary does not use are left out, as an untrained model may produce them
  decode(ids) {
    const bytes = ids.flatMap(id => [...this.bytes[id] ?? []]);
    return new TextDecoder("utf-8", {ignoreBOM: true}).decode(new Uint8Array(bytes));
  }
}

// --- which answers are right -------------------------------------------------------------------------------

const EDGES = `,;:!?¿¡"'\`“”„‘’‚«»‹›()[\\]{}。，、；：！？「」『』（）《》【】،؛؟۔।`; // a full stop may begin a word
const AT_EDGES = new RegExp(`^[${EDGES}]+|[.${EDGES}]+$`, "gu");
const THOUSANDS = /(?<![\p{L}\p{N}_.,])\p{Nd}{1,3}(?:,\p{Nd}{3})+(?!,?\p{Nd})/gu;

// What counts when answers are compared: the same as normalize_answer in data/corpus.py
function normalizeAnswer(text) {
  text = text.normalize("NFC").toLowerCase();
  const words = text.split(/\s+/).map(word => word.replace(AT_EDGES, "")).filter(word => word);
  const kept = words.filter((word, n) => n === words.length - 1 || !["a", "an", "the"].includes(word));
  return kept.join(" ").replace(THOUSANDS, number => number.replaceAll(",", "")) || text.trim();
}

// --- the parts of a Transformer ----------------------------------------------------------------------------

function linear(x, width, {weight, bias}) { // (T, width) -> (T, outputs)
  const outputs = weight.length / width, T = x.length / width, y = new Float32Array(T * outputs);
  for (let t = 0; t < T; t++) {
    for (let o = 0; o < outputs; o++) {
      let sum = bias ? bias[o] : 0;
      for (let i = 0; i < width; i++) sum += weight[o * width + i] * x[t * width + i];
      y[t * outputs + o] = sum;
    }
  }
  return y;
}

function layerNorm(x, width, {weight, bias} = {}) {
  const y = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += width) {
    let mean = 0, variance = 0;
    for (let i = 0; i < width; i++) mean += x[start + i] / width;
    for (let i = 0; i < width; i++) variance += (x[start + i] - mean) ** 2 / width;
    const scale = 1 / Math.sqrt(variance + 1e-5);
    for (let i = 0; i < width; i++) {
      y[start + i] = (x[start + i] - mean) * scale * (weight ? weight[i] : 1) + (bias ? bias[i] : 0);
    }
  }
  return y;
}

function normalizeRows(x, width) { // each row gets length 1
  const y = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += width) {
    const length = Math.hypot(...x.subarray(start, start + width));
    for (let i = start; i < start + width; i++) y[i] = length < 1e-6 ? 0 : x[i] / length;
  }
  return y;
}

function softmax(scores) {
  const greatest = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(scores, score => Math.exp(score - greatest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map(power => power / sum);
}

function addTo(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

function gelu(x) {
  return x.map(v => 0.5 * v * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v ** 3))));
}

function shift(x, width) { // each token gets the row of the previous token, the first token gets zeros
  const y = new Float32Array(x.length);
  y.set(x.subarray(0, x.length - width), width);
  return y;
}

// Rotary positions: numbers i and i + width/2 of a vector are a point, turned by an angle that grows with the
// position t of the token. at: where the vector starts in x.
function rotate(x, at, width, t) {
  const half = width / 2;
  for (let i = 0; i < half; i++) {
    const angle = t * 10000 ** (-2 * i / width), cos = Math.cos(angle), sin = Math.sin(angle);
    const a = x[at + i], b = x[at + half + i];
    x[at + i] = a * cos - b * sin;
    x[at + half + i] = b * cos + a * sin;
  }
}

// --- product-key search ------------------------------------------------------------------------------------

const greatest = (scores, count) => // the positions of the greatest scores, best first
  Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a] || a - b).slice(0, count);

// left, right: one score per half-key. Returns the best half-keys of each side, and the `knn` best of all
// pairs (i, j), where i and j are ranks among them. With ranks from 0, a pair has (i+1)*(j+1) - 1 others that
// are at least as good. So no pair with (i+1)*(j+1) > knn is needed.
function productKeySearch(left, right, knn) {
  const bestLeft = greatest(left, knn), bestRight = greatest(right, knn), pairs = [];
  for (let i = 0; i < knn; i++) {
    for (let j = 0; (i + 1) * (j + 1) <= knn; j++) {
      const slot = bestLeft[i] * right.length + bestRight[j];
      pairs.push({i, j, slot, score: left[bestLeft[i]] + right[bestRight[j]]});
    }
  }
  const winners = pairs.sort((a, b) => b.score - a.score).slice(0, knn);
  const weights = softmax(winners.map(winner => winner.score));
  winners.forEach((winner, n) => { winner.weight = weights[n]; });
  return {left, right, bestLeft, bestRight, winners};
}

// --- the GPT -----------------------------------------------------------------------------------------------

class Model {
  constructor(data) {
    this.config = data.config;
    this.tokenizer = new Tokenizer(data.tokenizer);
    this.values = new Int8Array(bytesOf(data.pool.values).buffer); // a row is these numbers times its scale
    this.scales = floatsOf(data.pool.scales);
    this.modules = {}; // for example {"blocks.0.ln_1": {weight, bias}}
    const numbers = floatsOf(data.weights);
    for (const [name, start, end] of data.tensors) {
      const dot = name.lastIndexOf(".");
      (this.modules[name.slice(0, dot)] ??= {})[name.slice(dot + 1)] = numbers.subarray(start, end);
    }
    if (this.config.mem_qk_norm) {
      for (const layer of this.config.mem_layers) {
        const memory = this.modules[`blocks.${layer}.memory`];
        memory.half_keys = normalizeRows(memory.half_keys, this.config.mem_key_dim / 2);
      }
    }
  }

  // tokens: ids. off: the slots that are switched off. Returns the logits of the token that follows, and what
  // each token read: reads[layer][token][head], as productKeySearch returns it.
  forward(tokens, off = new Set()) {
    const {n_embd: C, n_layer, scale_embeddings, mem_query} = this.config;
    const wte = this.modules["wte"].weight, embeddings = new Float32Array(tokens.length * C);
    tokens.forEach((id, t) => embeddings.set(wte.subarray(id * C, (id + 1) * C), t * C));
    const x = embeddings.map(v => scale_embeddings ? v * Math.sqrt(C) : v);
    const source = mem_query === "tokens" ? layerNorm(embeddings, C) : null, reads = {};
    for (let layer = 0; layer < n_layer; layer++) {
      const part = name => this.modules[`blocks.${layer}.${name}`];
      addTo(x, this.attention(layerNorm(x, C, part("ln_1")), part));
      const h = layerNorm(x, C, part("ln_2"));
      if (part("mlp.c_fc")) {
        const hidden = gelu(linear(h, C, part("mlp.c_fc")));
        addTo(x, linear(hidden, hidden.length / tokens.length, part("mlp.c_proj")));
      }
      if (part("memory")) {
        const left = source ?? h, right = mem_query === "state" ? h : shift(left, C);
        reads[layer] = this.search(left, right, part);
        addTo(x, this.read(h, reads[layer], part, off));
      }
    }
    const last = layerNorm(x.subarray(x.length - C), C, this.modules["ln_f"]);
    return {logits: linear(last, C, {weight: wte}), reads};
  }

  attention(x, part) {
    const {n_embd: C, n_head} = this.config, T = x.length / C, width = C / n_head;
    const qkv = linear(x, C, part("attn.c_attn")), y = new Float32Array(x.length);
    const query = (t, head) => t * 3 * C + head * width; // where it starts. The key is C later, the value 2 C
    for (let head = 0; head < n_head; head++) {
      for (let t = 0; t < T; t++) {
        rotate(qkv, query(t, head), width, t);
        rotate(qkv, query(t, head) + C, width, t);
        const scores = [];
        for (let s = 0; s <= t; s++) { // a token sees itself and earlier ones
          let dot = 0;
          for (let i = 0; i < width; i++) dot += qkv[query(t, head) + i] * qkv[query(s, head) + C + i];
          scores.push(dot / Math.sqrt(width));
        }
        softmax(scores).forEach((weight, s) => {
          for (let i = 0; i < width; i++) {
            y[t * C + head * width + i] += weight * qkv[query(s, head) + 2 * C + i];
          }
        });
      }
    }
    return linear(y, C, part("attn.c_proj"));
  }

  // left, right (T, C): what the two halves of the queries are made from
  search(left, right, part) {
    const {n_embd: C, mem_heads: H, mem_num_keys: S, mem_knn, mem_key_dim} = this.config;
    const {half_keys, scale} = part("memory"), D = mem_key_dim / 2, T = left.length / C;
    const halves = [linear(left, C, part("memory.query_left")), linear(right, C, part("memory.query_right"))]
      .map(queries => scale ? normalizeRows(queries, D) : queries); // (T, H * D) each
    const halfScores = (t, head, side) => {
      const scores = new Float32Array(S), query = (t * H + head) * D, keys = (head * 2 + side) * S * D;
      for (let s = 0; s < S; s++) {
        let dot = 0;
        for (let i = 0; i < D; i++) dot += halves[side][query + i] * half_keys[keys + s * D + i];
        scores[s] = dot * (scale ? scale[head] : 1);
      }
      return scores;
    };
    return Array.from({length: T}, (_, t) => Array.from({length: H}, (_, head) =>
      productKeySearch(halfScores(t, head, 0), halfScores(t, head, 1), mem_knn)));
  }

  // The weighted sum of the rows that each token reads, times the gate, through the output projection
  read(h, reads, part, off) {
    const {n_embd: C} = this.config, y = new Float32Array(h.length);
    reads.forEach((heads, t) => heads.forEach(({winners}) => winners.forEach(({slot, weight}) => {
      if (off.has(slot)) return; // as if the row were zeros
      for (let i = 0; i < C; i++) y[t * C + i] += weight * this.scales[slot] * this.values[slot * C + i];
    })));
    const gate = part("memory.gate") && linear(h, C, part("memory.gate"));
    const gated = gate ? y.map((v, i) => v * gate[i] / (1 + Math.exp(-gate[i]))) : y;
    return linear(gated, C, part("memory.out"));
  }

  // The likeliest continuation of a text, up to the end of the line, as evaluate.answer gives it. If it fills
  // the context, it is cut, and ends with "…". tokens: the prompt, as ids, then the answer. probability: of
  // exactly these words. first: the likeliest first tokens, as [text, probability].
  answer(prompt, off = new Set()) {
    const {tokenizer, config} = this, tokens = tokenizer.encode(prompt), start = tokens.length;
    const longest = Math.max(start, config.block_size) + 1; // nothing reads the last token
    let probability = 1, first = null, isWhole = false;
    while (!isWhole && tokens.length < longest) {
      const probabilities = softmax(this.forward(tokens.slice(-config.block_size), off).logits);
      const order = greatest(probabilities, 4), next = order[0];
      first ??= order.map(id => [tokenizer.decode([id]), probabilities[id]]);
      probability *= probabilities[next];
      isWhole = next === tokenizer.end || /[\n\r]/.test(tokenizer.decode([next]));
      if (!isWhole) tokens.push(next);
    }
    const text = tokenizer.decode(tokens.slice(start)).trim() + (isWhole ? "" : "…");
    return {tokens, start, text, probability, first};
  }
}
