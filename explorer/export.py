"""
Writes a trained model as one HTML page. In the page, the model runs and shows how it searches its memory.

    python -m explorer.export --out_dir=out/facts     writes out/facts/explorer.html: open it in a browser
    python -m explorer.export --help                  every option

The page needs no network and nothing else from this folder. explorer.unpack makes a checkpoint of it again.
The page also shows how the slots of some people change during training. It takes them from the checkpoints
of the run, so keep many:

    python train.py --out_dir=out/explorer --eval_interval=50 --keep=100
    python -m explorer.export --out_dir=out/explorer --page=docs/explorer.html
"""

import base64
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.cli import at_least, build, command, fail, parse

import numpy as np
import torch

from data.corpus import QUESTION, accepted_answers, decode_answer, find_name, load_dataset
from data.facts import ATTRIBUTES
from data.tokenizer import SPLIT
from evaluate import answer, recall, record_reads
from model import GPT
from runtime.checkpoint import Checkpoint, checkpoints, digest_of, find_trained, load, read_checkpoint

LARGEST = 4 * 2**20  # bytes of a page
NOT_IN_PAGES = {"format", "files", "encoding"}  # of a checkpoint's meta.json
READERS = 2  # stored per slot: the page shows the first, or the second if the first is the chosen pair


@dataclass
class ExportConfig:
    out_dir: str = "out/facts"  # the folder of a run
    page: str = ""  # the file to write; none: explorer.html in out_dir
    followed: int = 12  # people whose slots are followed over the checkpoints of the run
    sample_tokens: int = 262_144  # tokens of train.bin in which the readers of each slot are searched

    def __post_init__(self):
        at_least(0, self, "followed", "sample_tokens")


def to_base64(numbers: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(numbers).tobytes()).decode()


def check_model(model: GPT, encoding) -> None:
    """The page computes product-key memory only, and splits text as the tokenizers of data/ do."""
    config, sizes = model.config, model.count_parameters()
    if config.positions != "rotary":
        fail(f"the page computes rotary positions only: this model has positions={config.positions}")
    if not config.mem_layers or config.mem_kind != "product-key" or config.moe_layers:
        fail("the page can show product-key memory only: this model has "
             f"mem_layers={config.mem_layers}, mem_kind={config.mem_kind}, moe_layers={config.moe_layers}")
    if not encoding._pat_str.endswith(SPLIT):  # airports adds a case in front
        fail(f"the page cannot split text as the tokenizer {encoding.name} does: make the corpus without "
             "--tokenizer")
    if (sizes["memory"] + 4 * sizes["dense"]) * 4 / 3 > LARGEST:  # in base64, 3 bytes are 4 characters
        fail(f"this model is too large for a page of {LARGEST // 2**20} MB: train a smaller one, for example "
             "with --n_embd=64 --mem_num_keys=128")


# --- the model ----------------------------------------------------------------------------------------------

def round_values(model: GPT) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rounds the pool's values: a value becomes an int8 number times the scale of its row. The page stores the
    numbers and the scales, which are returned. Rounding changes a value by at most half a scale.
    """
    values = model.pool.values.detach().float()
    scales = values.abs().amax(1) / 127
    numbers = (values / scales.masked_fill(scales == 0, 1).unsqueeze(1)).round().to(torch.int8)
    model.pool.values = torch.nn.Parameter(numbers * scales.unsqueeze(1))
    return numbers, scales


def model_data(model: GPT, values: torch.Tensor, scales: torch.Tensor) -> dict:
    tensors, parts, end = [], [], 0
    for name, tensor in sorted(model.named_parameters()):
        if name != "pool.values":
            parts.append(tensor.detach().float().flatten().numpy())
            tensors.append([name, end, end := end + tensor.numel()])
    return {"config": {name: value for name, value in asdict(model.config).items() if name != "kernel"},
            "tensors": tensors, "weights": to_base64(np.concatenate(parts)),
            "pool": {"values": to_base64(values.numpy()), "scales": to_base64(scales.numpy())}}


def tokenizer_data(encoding) -> dict:
    tokens = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
    return {"name": encoding.name, "pattern": encoding._pat_str, "end": encoding.eot_token,
            "tokens": [base64.b64encode(token).decode() for token in tokens]}


# --- what each token reads ----------------------------------------------------------------------------------

@torch.no_grad()
def reads_of(model: GPT, idx: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Runs the model on idx (B, T). Returns (slots, weights) for each memory layer, each (B, T, bag)."""
    with record_reads(model.pool) as reads:
        model(idx)
    return [tuple(part.view(*idx.shape, -1) for part in read) for read in reads]


def sum_by_key(keys: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keys, place = np.unique(keys, return_inverse=True)
    return keys, np.bincount(place, numbers)


def readers_data(model: GPT, tokens: np.ndarray) -> dict:
    """
    Who reads a slot: for each slot, the pairs of tokens (the previous one, and the one that reads) that give
    it the greatest weight, on average over the corpus, in all layers and heads together.
    """
    V, T = model.config.vocab_size, model.config.block_size
    blocks = torch.from_numpy(tokens[:len(tokens) // T * T].astype(np.int64)).view(-1, T)
    known, counts = np.unique((blocks[:, :-1] * V + blocks[:, 1:]).numpy(), return_counts=True)
    sums = np.zeros(0, np.int64), np.zeros(0)  # keys: (slot * V + previous token) * V + token
    for batch in blocks.split(64):
        pairs = batch[:, :-1] * V + batch[:, 1:]
        for slots, weights in reads_of(model, batch):  # the first token of a block has no previous token
            keys = slots[:, 1:] * V**2 + pairs.unsqueeze(2)
            new = sum_by_key(keys.numpy().ravel(), weights[:, 1:].numpy().ravel())
            sums = sum_by_key(*(np.concatenate(parts) for parts in zip(sums, new, strict=True)))
    keys, weight = sums
    slot, pair = np.divmod(keys, V**2)
    number = np.searchsorted(known, pair)
    mean = weight / counts[number]
    order = np.lexsort((pair, -mean, slot))  # by slot, then the greatest weight first
    slot, number = slot[order], number[order]
    rank = np.arange(len(slot)) - np.searchsorted(slot, slot)
    slot, number, rank = (part[rank < READERS] for part in (slot, number, rank))
    used, number = np.unique(number, return_inverse=True)
    pairs = np.stack(np.divmod(known[used], V), 1)
    readers = np.full((model.pool.num_values, READERS), -1, np.int32)
    readers[slot, rank] = number
    return {"count": READERS, "pairs": to_base64(pairs.astype(np.int32)), "readers": to_base64(readers)}


# --- people, and the checkpoints of training ----------------------------------------------------------------

def people_of(questions: list[dict]) -> list[dict]:
    """
    Whom the questions are about, most told first, each with their questions: [the text before the name, the
    text after it, the right answers]. [] if the questions have no form that repeats.
    """
    forms = [re.compile(re.escape(QUESTION.format(form)).replace(r"\{\}", "(.+)"))
             for _, _, asked in ATTRIBUTES.values() for form in asked]  # of the corpora of facts
    people, unclear = {}, 0
    for question in questions:
        prompt = question["prompt"]
        match = next(filter(None, (form.fullmatch(prompt) for form in forms)), None)
        if match is None and unclear < 9:  # find_name compares all questions, so not for each of them
            if name := find_name(question, questions):
                forms.append(re.compile("(.+)".join(map(re.escape, prompt.split(name, 1)))))
                match = forms[-1].fullmatch(prompt)
            unclear += not name
        if match:
            name, (start, end) = match[1], match.span(1)
            told = question.get("exposures", 0)  # 0: unknown
            person = people.setdefault(name, {"name": name, "told": told, "asked": []})
            person["asked"].append([prompt[:start], prompt[end:], accepted_answers(question)])
    return sorted(people.values(), key=lambda person: (-person["told"], person["name"]))


def training_data(of_run: list[Checkpoint], encoding, people: list[dict], count: int) -> dict:
    """
    For `count` people, from the most to the least told, and for each checkpoint: the slots that the end of
    the name reads in the person's first question, their weights in 1/255, and the answer to this question.
    """
    places = sorted({i * (len(people) - 1) // max(1, count - 1) for i in range(count)} if people else [])
    followed = [people[place] for place in places]
    questions = [{"prompt": before + person["name"] + after, "answers": right}
                 for person in followed for before, after, right in person["asked"][:1]]
    slots, weights, answers = [], [], []
    for checkpoint in of_run if followed else []:
        model = checkpoint.load_model().eval()
        for person in followed:
            text = person["asked"][0][0] + person["name"]  # the last token is the last name
            read = reads_of(model, torch.tensor([encoding.encode_ordinary(text)]))
            slots.append(torch.cat([slots[0, -1] for slots, _ in read]))
            weights.append(torch.cat([weights[0, -1] for _, weights in read]))
        answers.append([decode_answer(encoding, tokens) for tokens in answer(model, encoding, questions)])
    if not answers:
        return {"steps": [], "people": []}
    recalls = [checkpoint.measured.get("recall", {}).get("all") for checkpoint in of_run]
    return {"steps": [checkpoint.step for checkpoint in of_run], "people": places, "recall": recalls,
            "answers": answers, "slots": to_base64(torch.stack(slots).int().numpy()),
            "weights": to_base64((torch.stack(weights) * 255).round().byte().numpy())}


# --- the page -----------------------------------------------------------------------------------------------

def fill_template(data: dict) -> str:
    """page.html with the scripts and the data in it."""
    text = json.dumps(data, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # "<!--" and then "<script" would hide the end of the script element
    parts = {"data": text} | {name: (Path(__file__).parent / name).read_text(encoding="utf-8")
                              for name in ("model.js", "page.js")}
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], template)


@command
def main(argv: list[str] | None = None) -> None:
    config = build(ExportConfig, parse(ExportConfig, argv, description=__doc__)[1])
    out_dir = Path(config.out_dir).expanduser()
    page = Path(config.page).expanduser() if config.page else out_dir / "explorer.html"
    if page.exists() and page.read_bytes()[:15].lower() != b"<!doctype html>":
        fail(f"--page={page} is not a page: choose another name, or delete this file")
    newest = find_trained(out_dir)
    model, encoding, trained = load(newest)
    check_model(model, encoding)
    corpus = load_dataset(trained["dataset"])
    newest.check_corpus(corpus)
    of_run = [checkpoint for folder in checkpoints(out_dir) if (checkpoint := read_checkpoint(folder)[0])]

    before = recall(model, encoding, corpus.questions).get("all")
    values, scales = round_values(model)
    people = people_of(corpus.questions)
    data = model_data(model, values, scales) | {
        "tokenizer": tokenizer_data(encoding), "people": people,
        "start": (corpus.questions[0]["prompt"] if corpus.questions else
                  encoding.decode(corpus.val[:16].tolist(), errors="ignore")),
        "readers": readers_data(model, corpus.train[:max(config.sample_tokens, model.config.block_size)]),
        "training": training_data(of_run, encoding, people, config.followed),
        "run": {name: part for name, part in newest.meta.items() if name not in NOT_IN_PAGES}}
    html = fill_template(data | {"sha256": digest_of(data)}).encode()
    page.write_bytes(html)
    steps = len(data["training"]["steps"])
    what = f"with {steps} checkpoints" if steps else "with nobody to follow through the training"
    print(f"wrote {page}: {len(html) / 2**20:.1f} MB, {what}. Open it in a browser")
    if before is not None:
        after = recall(model, encoding, corpus.questions)["all"]
        print(f"recall {before:.3f}; with the values of the page, which are int8, {after:.3f}")


if __name__ == "__main__":
    main()
