"""
Finds, erases and teaches facts in the memory of a trained model: the method. edit.py is the command line.

find           measures which slots carry an answer, by leaving slots out
choose_slots   slots that texts about someone read often and other texts rarely, without which the answers go
erase          empties slots
teach          sparse memory finetuning (Lin et al. 2025, arXiv 2510.15103): gradient descent on the rows that
               the new sentences read often and other texts rarely

docs/editing.md explains the methods, and has an example.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from data.corpus import Dataset, accepted_answers, decode, decode_answer, draw_batch, is_right
from evaluate import answer
from model import GPT, eval_mode
from pool import PoolOptimizer
from sample import name_pattern

PIECE = 16  # tokens in a piece of the training text, about a sentence
CANDIDATES = 256  # slots among which choose_slots chooses
GONE = 0.1  # an answer is erased once one of its tokens is less than so many times as likely as another
SEARCHED = 10_000_000  # tokens of the training text in which lines_with looks for a name


# --- what is read -------------------------------------------------------------------------------------------

def make_batch(encoding, prompts: list[str], answers: list[str]):
    """x, y (B, T) for the model. y has the tokens of each answer, and -1 elsewhere."""
    x, y = [], []
    for prompt, text in zip(prompts, answers, strict=True):
        prompt, text = encoding.encode_ordinary(prompt), encoding.encode_ordinary(text)
        x.append(torch.tensor(prompt + text[:-1]))
        y.append(torch.tensor(([-1] * (len(prompt) - 1) + text)[-len(x[-1]):]))
    return pad_sequence(x, batch_first=True), pad_sequence(y, batch_first=True, padding_value=-1)


def text_batch(encoding, texts: list[str]):
    """x, y (B, T): whole texts. Each ends with a newline."""
    return make_batch(encoding, [""] * len(texts), [f"{text}\n" for text in texts])


def question_batch(model: GPT, encoding, question: dict):
    """A question with its right answer: in the model's own words if these are right."""
    if not accepted_answers(question):
        raise ValueError(f"the question {question['prompt']!r} has no answer")
    own = decode_answer(encoding, answer(model, encoding, [question])[0])
    right = own if is_right(question, own) else accepted_answers(question)[0]
    return make_batch(encoding, [question["prompt"]], [f" {right}"])


@torch.no_grad()
def read_slots(model: GPT, x):
    """x (B, T) -> (B, T, layers, bag): the slots that each token reads in each memory layer."""
    reads = []
    with eval_mode(model), model.pool.register_forward_pre_hook(lambda pool, read: reads.append(read[0])):
        model(x.to(model.wte.weight.device))
    return torch.stack([indices.view(*x.shape, -1) for indices in reads], 2).long().cpu()


def leave_out(model: GPT, slots: list):
    """with leave_out(model, slots): row b of a batch does without the slots in slots[b]."""
    def without(pool, read):
        indices, weights = read
        rows = indices.view(len(slots), -1)
        out = [torch.isin(row, part.to(row)) for row, part in zip(rows, slots, strict=True)]
        return indices, weights.masked_fill(torch.stack(out).view_as(indices), 0)
    return model.pool.register_forward_pre_hook(without)


@torch.no_grad()
def predict(model: GPT, x, y):
    """Log-probabilities (B, T) of the tokens in y, and of the likeliest tokens there. 0 where y is -1."""
    x, y = x.to(model.wte.weight.device), y.to(model.wte.weight.device)
    with eval_mode(model):
        scores = model(x, y)[0].log_softmax(-1)  # (B, T, vocab_size)
    known = scores.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (part.masked_fill(y < 0, 0).cpu() for part in (known, scores.amax(-1)))


def log_probability(model: GPT, x, y):
    """(B,): the logarithm of the probability that the model gives to the answers in y."""
    return next(predict(model, x, y)).sum(1)


def losses_without(model: GPT, x, y, parts: list):
    """For each set of slots: how much the log-probability of the answer in y (1, T) falls without them."""
    without = []
    for i in range(0, len(parts), 64):
        with leave_out(model, parts[i:i + 64]):
            rows = len(parts[i:i + 64])
            without.append(log_probability(model, x.expand(rows, -1), y.expand(rows, -1)))
    return log_probability(model, x, y) - torch.cat(without)


# --- whose slots they are -----------------------------------------------------------------------------------

def count_reads(model: GPT, encoding, texts: list[str]):
    """(num_values,): how often the tokens of these texts read each slot, in all layers and heads."""
    x, y = (z[:, :model.config.block_size] for z in text_batch(encoding, texts))
    counts = torch.zeros(model.pool.num_values, dtype=torch.int64)
    for part_x, part_y in zip(x.split(64), y.split(64), strict=True):
        slots = read_slots(model, part_x)[part_y >= 0]  # without padding
        counts += slots.flatten().bincount(minlength=len(counts))
    return counts


def inverse_document_frequency(model: GPT, tokens, count: int = 1000):
    """(num_values,): log((count + 1) / (df + 1)). df of `count` pieces of the corpus read the slot."""
    if model.pool is None:
        raise ValueError("the model has no memory layers")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    df, length = torch.zeros(model.pool.num_values, dtype=torch.int64), min(PIECE, model.config.block_size)
    for i, rows in enumerate(torch.arange(count).split(64)):
        x, _ = draw_batch(tokens, len(rows), length, 0, 2, i)  # 2: neither training (0) nor evaluation (1)
        reads = read_slots(model, x).flatten(1)
        df += torch.zeros(len(x), len(df), dtype=torch.int64).scatter_(1, reads, 1).sum(0)
    return ((count + 1) / (df + 1)).log()


def tf_idf(model: GPT, encoding, texts: list[str], idf):
    """
    (num_values,): high for slots that these texts read often, and other texts rarely (Lin et al. 2025, arXiv
    2510.15103). idf: the result of inverse_document_frequency. Raises a ValueError if there is no text.
    """
    if isinstance(texts, str) or not texts or not all(text.strip() for text in texts):
        raise ValueError("there must be a list of texts, and none of them empty")
    if model.pool is None or len(idf) != model.pool.num_values:
        raise ValueError("idf belongs to another model")
    counts = count_reads(model, encoding, texts)
    return counts / counts.sum() * idf


def top_slots(scores, count: int):
    """The slots with the highest scores, without those that the texts do not read at all."""
    return scores.topk(min(count, int((scores > 0).sum()))).indices


def lines_with(name: str, data: Dataset) -> list[str]:
    """The lines of the training text that contain the name; of long lines, what stands near it."""
    lines = decode(data.encoding, data.train[:SEARCHED].tolist()).split("\n")
    matches = map(name_pattern(name).search, lines)
    return [line[max(0, match.start() - 200):match.end() + 200]
            for line, match in zip(lines, matches, strict=True) if match]


# --- find, erase, teach -------------------------------------------------------------------------------------

def find(model: GPT, encoding, question: dict) -> dict:
    """
    Measures, by leaving slots out, which slots carry the answer to a question. The result has the slots that
    the text reads, those first whose absence costs most, and what is lost, as falls of log-probability:
    "alone" each slot alone, "top" {n: the first n slots together}, "places" (tokens, layers): all slots that
    one token reads in one layer. "tokens" are these tokens.
    """
    x, y = question_batch(model, encoding, question)
    reads = read_slots(model, x)[0]  # (T, layers, bag)
    slots = reads.unique()
    alone, order = losses_without(model, x, y, list(slots.unsqueeze(1))).sort(descending=True)
    slots = slots[order]
    sizes = [n for n in (4, 16, 64, 256) if n < len(slots)] + [len(slots)]
    top = losses_without(model, x, y, [slots[:n] for n in sizes]).tolist()
    places = losses_without(model, x, y, list(reads.flatten(0, 1))).view(reads.shape[:2])
    return {"slots": slots, "alone": alone, "top": dict(zip(sizes, top, strict=True)), "places": places,
            "tokens": x[0].tolist()}


def is_gone(model: GPT, x, y) -> bool:
    """Is a token of the answer in y (1, T) far less likely than the likeliest token?"""
    known, likeliest = predict(model, x, y)
    return (known - likeliest).exp().min().item() < GONE


def choose_slots(model: GPT, encoding, questions: list[dict], texts: list[str], idf, count: int = 0):
    """
    The slots to erase, so that the model forgets the answers to these questions.

    Candidates are the slots with the highest TF-IDF for the texts, which are about the same person or thing.
    Of these, take the 4 slots whose absence costs the answers most. Then measure again without them, and take
    4 more, 8 more, 16 more ... until all answers are gone, or until there are `count` slots if it is given.
    """
    if not questions:
        raise ValueError("there must be questions")
    if count < 0:
        raise ValueError(f"count={count} must not be negative")
    batches = [question_batch(model, encoding, question) for question in questions]
    texts = texts + [f"{question['prompt']} {accepted_answers(question)[0]}" for question in questions]
    rest = top_slots(tf_idf(model, encoding, texts, idf), max(count, CANDIDATES))
    chosen = rest[:0]
    while len(rest) and (not count or len(chosen) < count):
        parts = [torch.cat((chosen, slot)) for slot in rest.split(1)]
        losses = sum(losses_without(model, *batch, parts) for batch in batches)
        rest = rest[losses.argsort(descending=True)]
        more = min(max(4, len(chosen)), count - len(chosen) if count else len(rest))
        chosen, rest = torch.cat((chosen, rest[:more])), rest[more:]
        with leave_out(model, [chosen]):
            if not count and all(is_gone(model, *batch) for batch in batches):
                break
    return chosen


@torch.no_grad()
def erase(model: GPT, slots) -> None:
    """Empties slots: their rows become 0. slots: a tensor or a list of numbers."""
    values, slots = model.pool.values, torch.as_tensor(slots, dtype=torch.int64)
    if len(slots) and not 0 <= slots.min() <= slots.max() < len(values):
        raise ValueError(f"slots must be between 0 and {len(values) - 1}")
    values[slots.to(values.device)] = 0


def learn_only(values, slots):
    """with learn_only(values, slots): the gradient of a pool's values keeps only the reads of these slots."""
    chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    chosen[slots.to(values.device)] = True

    def keep_chosen(values):
        reads = []
        for indices, weights, dy in values.grad.reads:
            token, place = chosen[indices].nonzero(as_tuple=True)
            reads.append((indices[token, place, None], weights[token, place, None], dy[token]))
        values.grad.reads[:] = reads
    return values.register_post_accumulate_grad_hook(keep_chosen)


def teach(model: GPT, encoding, statements: list[str], idf, slots: int = 128, steps: int = 60,
          lr: float = 100.0):
    """
    Sparse memory finetuning (Lin et al. 2025): learns statements by gradient descent on the rows of the
    `slots` slots with the highest TF-IDF for them. Nothing else changes, but the pool's gradient is dropped.
    Returns these slots.
    """
    chosen = top_slots(tf_idf(model, encoding, statements, idf), slots)
    values, device = model.pool.values, model.wte.weight.device
    if min(slots, steps) < 1 or not values.requires_grad:
        raise ValueError("slots and steps must be positive, and the pool's values not frozen")
    optimizer = PoolOptimizer([values], lr, kind="sgd", stochastic_rounding=values.dtype == torch.bfloat16)
    x, y = (z.to(device) for z in text_batch(encoding, statements))
    with learn_only(values, chosen), eval_mode(model), torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            model(x, y)[1].backward(inputs=[values])
            optimizer.step()
    optimizer.zero_grad()
    return chosen
