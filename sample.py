"""
Lets a trained model answer questions or continue a text, and shows which slots of the memory it read.

    python sample.py                                    the newest run: a few questions, or some text
    python sample.py --question='What did Mule Tujuton study?'
    python sample.py --ask='Mule Tujuton'               all questions of the corpus about one person
    python sample.py --qa=FILE                          all questions in a file; the share of right answers
    python sample.py --questions=1 --trace              a question, and the slots that each token reads
    python sample.py --out_dir=out/stdlib --prompt='def main('
"""

import codecs
import contextlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.cli import at_least, build, command, fail, parse, print_text

import torch

from data import corpus
from data.corpus import QUESTION, accepted_answers, decode, decode_answer, is_right, token_bytes
from data.tokenizer import END
from evaluate import answer, commonest_answers, record_reads, shares
from model import GPT
from runtime.checkpoint import find_trained, load, newest_run
from runtime.log import recall_rows

SLOTS_SHOWN = 4  # per token and memory layer, in a trace
ROWS = 256  # questions that are answered before their results are printed
# what to do: the options that go with it. All go with out_dir, device and trace
MODES = {"prompt": {"num_samples", "max_new_tokens", "temperature", "top_k", "seed"}, "questions": {"seed"},
         "question": set(), "ask": set(), "qa": set()}


@dataclass
class SampleConfig:
    out_dir: str = "out"  # the folder of a run, or of many runs; then the newest run is used
    trace: bool = False  # show the slots that each token reads with most weight, for each memory layer
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one

    # --- what to do, one of these
    prompt: str = ""  # text to continue; empty: start at a new line
    questions: int = 5  # ask this many questions of the corpus, drawn at random
    question: str = ""  # ask this question
    ask: str = ""  # ask all questions of the corpus that contain this name
    qa: str = ""  # ask all questions in this file, which has the form of data/NAME/qa.jsonl

    # --- continuing a text
    num_samples: int = 1  # how many continuations
    max_new_tokens: int = 200  # longest continuation, in tokens
    temperature: float = 0.8  # 0 always takes the likeliest token; 1 draws with the model's probabilities
    top_k: int = 50  # draw from the k likeliest tokens only; 0: from all
    seed: int = 1  # seed of the random draws, also of --questions

    def __post_init__(self):
        at_least(1, self, "questions", "num_samples", "max_new_tokens")
        at_least(0, self, "temperature", "top_k", "seed")


def print_reads(model: GPT, encoding, tokens: list[int], reads: list) -> None:
    """tokens: the prompt, which the first pass reads, and new tokens. Each later pass reads one of them."""
    layers = model.config.mem_layers
    passes = [reads[i:i + len(layers)] for i in range(0, len(reads), len(layers))]
    # a full context is read again, and only its last token is new. The last new token was never read
    rows = [(read, row) for number, read in enumerate(passes)
            for row in (range(len(read[0][0])) if number == 0 else [-1])]
    print("    the rows that each token reads with most weight, in each memory layer:")
    for token, (read, row) in zip(tokens[:-1][-len(rows):], rows, strict=True):
        label = repr(decode(encoding, [token]))
        for layer, (indices, weights) in zip(layers, read, strict=True):
            slots, place = indices[row].cpu().unique(return_inverse=True)  # heads may read the same slot
            weights = weights[row].cpu().float().abs()  # PEER also has negative weights
            share = torch.zeros(len(slots)).index_add_(0, place, weights) / weights.sum()
            top = share.topk(min(SLOTS_SHOWN, len(slots)))
            text = "  ".join(f"{slots[i]:>9,} {part:4.0%}" for part, i in zip(*top, strict=True))
            print(f"    {label:14} layer {layer:2}, slots {text}")
            label = ""


# --- questions ----------------------------------------------------------------------------------------------

def verdict(question: dict, text: str) -> str:
    """What is known about an answer, such as "right, told 12 times"."""
    answers = accepted_answers(question)
    if not answers:  # the user's own question
        return "not in qa.jsonl, so not checked"
    notes = ["right" if is_right(question, text) else f"wrong: {' or '.join(answers)}"]
    if "exposures" in question:
        times = question["exposures"]
        notes.append("told once" if times == 1 else f"told {times} times")
    if text.startswith(end := QUESTION.split("{} ")[1]):
        notes.append(f'its prompt lacks " {end}" at the end')
    if question.get("held_out"):
        notes.append("never asked in training")
    return ", ".join(notes)


def ask(model: GPT, encoding, questions: list[dict], trace: bool) -> list[str]:
    """Prints the model's answers, right or wrong, and returns them."""
    corpus.check_length(questions, encoding, model.config.block_size)
    texts, rows = [], 1 if trace else ROWS
    for part in (questions[i:i + rows] for i in range(0, len(questions), rows)):
        with record_reads(model.pool) if trace else contextlib.nullcontext() as reads:
            answers = answer(model, encoding, part)
        for question, tokens in zip(part, answers, strict=True):
            texts.append(decode_answer(encoding, tokens))
            print_text(f"{question['prompt']} {texts[-1]}   [{verdict(question, texts[-1])}]")
            if trace:
                print_reads(model, encoding, encoding.encode_ordinary(question["prompt"]) + tokens, reads)
    return texts


def share_rows(questions: list[dict], answers: list[str]) -> dict[str, float]:
    """{label: share of right answers}: of all questions, by exposures, of held-out questions, and by kind."""
    rows = recall_rows(shares(questions, answers))
    for kind in sorted({question["kind"] for question in questions if "kind" in question}):
        of_kind = [pair for pair in zip(questions, answers, strict=True) if pair[0].get("kind") == kind]
        rows[f"kind: {kind}"] = shares(*zip(*of_kind, strict=True)).get("all")
    return {label: share for label, share in rows.items() if share is not None}


def print_shares(questions: list[dict], answers: list[str]) -> None:
    """Beside the model's share stands the share that guesses get right without knowing any fact."""
    print(f"{'share of right answers':34} model  always the commonest answer to this kind of question")
    guesses = share_rows(questions, commonest_answers(questions))
    for label, share in share_rows(questions, answers).items():
        print_text(f"{label:34} {share:.3f}  {guesses[label]:.3f}")


# --- text ---------------------------------------------------------------------------------------------------

def continue_text(model: GPT, encoding, text: str, **drawing) -> list[int]:
    """
    Continues a text, and prints each new token at once. Returns the tokens of both together. drawing: options
    of GPT.generate.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character can have several tokens

    def show(new):
        print_text(decoder.decode(token_bytes(encoding, new.item())), end="")

    print_text(text, end="")
    prompt = encoding.encode(text or "\n", allowed_special={END}, disallowed_special=())
    idx = torch.tensor([prompt], device=model.wte.weight.device)
    idx = model.generate(idx, stop=[encoding.eot_token], on_token=show, **drawing)
    print(decoder.decode(b"", final=True))
    return idx[0].tolist()


@command
def main(argv: list[str] | None = None) -> None:
    _, options = parse(SampleConfig, argv, description=__doc__)
    config = build(SampleConfig, options)
    modes = [mode for mode in MODES if mode in options]
    if len(modes) > 1:
        fail(f"--{modes[0]} and --{modes[1]} exclude each other: choose one")
    checkpoint = find_trained(newest_run(Path(config.out_dir).expanduser()))
    model, encoding, trained = load(checkpoint, config.device)
    path = corpus.DATA / trained["dataset"] / "qa.jsonl"
    # by default: questions, if the corpus has any and no option is about continuing a text
    is_text = options.keys() & MODES["prompt"] - {"seed"} or not path.exists()
    mode = modes[0] if modes else "prompt" if is_text else "questions"
    if useless := options.keys() - {"out_dir", "device", "trace", mode} - MODES[mode]:
        fail(f"--{min(useless)} has no effect with --{mode}: leave it out")
    if config.trace and model.pool is None:
        fail("--trace: this model has no memory layers")

    if mode == "prompt":
        drawing = dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                       top_k=config.top_k or None)
        for i in range(config.num_samples):
            print(f"--- sample {i + 1} of {config.num_samples}")
            with record_reads(model.pool) if config.trace else contextlib.nullcontext() as reads:
                tokens = continue_text(model, encoding, config.prompt, seed=config.seed + i, **drawing)
            if config.trace:
                print_reads(model, encoding, tokens, reads)
        return
    questions = []
    if mode == "qa":
        if not (path := Path(config.qa).expanduser()).exists():
            fail(f"--qa={config.qa}: no such file")
        questions = corpus.read_questions(path)
    elif path.exists():
        data = corpus.load_dataset(trained["dataset"])
        checkpoint.check_corpus(data)
        questions = data.questions
    if mode == "question":
        questions = [corpus.find_question(config.question, questions)]
        if path.exists() and not accepted_answers(questions[0]):
            for name in corpus.unknown_names(questions[0]["prompt"], data):
                print_text(f"the training text does not have the name {name}")
    elif not questions:
        fail(f"--{mode}: there are no questions in {path}. Use --question=TEXT, or --prompt=TEXT")
    elif mode == "questions":
        questions = random.Random(config.seed).sample(questions, min(config.questions, len(questions)))
    elif mode == "ask":
        questions = corpus.questions_about(config.ask, questions)
    texts = ask(model, encoding, questions, config.trace)
    if mode != "question":
        right = sum(map(is_right, questions, texts))
        print(f"{right} of {len(questions)} right, {right / len(questions):.1%}")
    if mode == "qa":
        print_shares(questions, texts)


if __name__ == "__main__":
    main()
