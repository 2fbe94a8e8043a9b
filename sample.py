"""
Lets a trained model answer questions or continue a text, and shows which slots of the memory it read.

    python sample.py                                    the newest run: a few questions, or some text
    python sample.py --question='What did Mule Tujuton study?'
    python sample.py --ask='Mule Tujuton'               all questions of the corpus about one person
    python sample.py --qa=FILE                          all questions in a file; the share of right answers
    python sample.py --questions=1 --trace              a question, and the slots that each token reads
    python sample.py --out_dir=out/stdlib --prompt='def main('
    python sample.py --prompt_file=FILE                 continues each line of a file; -: standard input
"""

import codecs
import os
import random
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # before the imports that take seconds
    from runtime.cli import exit_on_ctrl_c
    exit_on_ctrl_c()

import torch

from data import corpus
from data.corpus import (
    accepted_answers,
    check_length,
    decode,
    decode_answer,
    find_question,
    is_right,
    load_dataset,
    name_pattern,  # noqa: F401
    questions_about,
    read_questions,
    token_bytes,
)
from data.tokenizer import END
from evaluate import answer, commonest_answers, shares
from model import GPT
from runtime.build import find_trained
from runtime.checkpoint import checkpoints, is_checkpoint
from runtime.cli import at_least, build, check_choices, command, fail, parse
from runtime.log import recall_rows
from train import check_data, find_device, load

SLOTS_SHOWN = 4  # per token and memory layer, in a trace
ROWS = 256  # questions, or lines of a file, that are answered before their results are printed
DRAWING = {"num_samples", "max_new_tokens", "temperature", "top_k", "seed"}
# what to do: the options that go with it. All go with out_dir, device and trace
MODES = {"prompt": DRAWING, "prompt_file": DRAWING, "questions": {"seed"}, "question": set(), "ask": set(),
         "qa": set()}


@dataclass
class SampleConfig:
    out_dir: str = "out"  # the folder of a run, or of many runs; then the newest run is used
    trace: bool = False  # show the slots that each token reads with most weight, for each memory layer
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one

    # --- what to do, one of these
    prompt: str = ""  # text to continue; empty: start at a new line
    prompt_file: str = ""  # a file of texts to continue, one per line; -: standard input
    questions: int = 0  # ask this many questions of the corpus, drawn at random
    question: str = ""  # ask this question
    ask: str = ""  # ask all questions of the corpus that contain this name
    qa: str = ""  # ask all questions in this file, which has the form of data/NAME/qa.jsonl

    # --- continuing a text
    num_samples: int = 1  # how many continuations of each prompt
    max_new_tokens: int = 200  # longest continuation, in tokens
    temperature: float = 0.8  # 0 always takes the likeliest token; 1 draws with the model's probabilities
    top_k: int = 50  # draw from the k likeliest tokens only; 0: from all
    seed: int = 1  # seed of the random draws, also of --questions

    def __post_init__(self):
        self.out_dir, self.prompt_file, self.qa = map(os.path.expanduser,
                                                      (self.out_dir, self.prompt_file, self.qa))
        check_choices(self)
        at_least(1, self, "num_samples", "max_new_tokens")
        at_least(0, self, "temperature", "top_k", "questions", "seed")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature={self.temperature} must be 0, or at least 0.001")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} must be below 2**32")
        modes = [mode for mode in MODES if getattr(self, mode)]
        if len(modes) > 1:
            raise ValueError(f"{modes[0]} and --{modes[1]} exclude each other: choose one")


def newest_run(out_dir: Path) -> Path:
    if checkpoints(out_dir):  # a run, or one checkpoint of a run
        return out_dir
    if is_checkpoint(out_dir) and (others := checkpoints(out_dir.parent)):
        fail(f"no checkpoint {out_dir}: there are {', '.join(path.name for path in others)}")
    runs = {path.parent for path in out_dir.glob("**/step_*")}
    newest = [existing[-1] for run in runs if (existing := checkpoints(run))]
    if not newest:
        fail(f"no checkpoint in {out_dir}: train a model with python train.py, or name another --out_dir")
    if len(newest) > 1:
        print(f"--out_dir chooses one of {len(newest)} runs in {out_dir}; this is the newest:")
    return max(newest, key=lambda folder: folder.stat().st_mtime).parent


class Trace:
    """Records what each token reads: (indices, weights) for each memory layer, all heads together."""

    def __init__(self, model: GPT, encoding):
        self.layers, self.passes, self.encoding = model.config.mem_layers, [], encoding
        model.register_forward_pre_hook(lambda module, args: self.passes.append([]))
        model.pool.register_forward_pre_hook(
            lambda module, read: self.passes[-1].append(tuple(part.cpu() for part in read)))

    def print(self, tokens: list[int]) -> None:
        """tokens: the prompt, which the first pass reads, and the new tokens, one for each later pass."""
        # the last token was never read. A full context is read again, and only its last token is new
        reads = [[(indices[row], weights[row]) for indices, weights in layers]
                 for number, layers in enumerate(self.passes)
                 for row in (range(len(layers[0][0])) if number == 0 else [-1])]
        print("    the rows that each token reads with most weight, in each memory layer:")
        for token, layers in zip(tokens[:-1][-len(reads):], reads, strict=True):
            for layer, (indices, weights) in zip(self.layers, layers, strict=True):
                slots, place = indices.unique(return_inverse=True)  # several heads may read the same slot
                weights = weights.abs()  # PEER also has negative weights
                shares = torch.zeros(len(slots)).index_add_(0, place, weights) / weights.sum()
                top = shares.topk(min(SLOTS_SHOWN, len(slots)))
                text = "  ".join(f"{slots[i]:>9,} {share:4.0%}" for share, i in zip(*top, strict=True))
                label = repr(decode(self.encoding, [token])) if layer == self.layers[0] else ""
                print(f"    {label:14} layer {layer:2}, slots {text}")
        self.passes.clear()


# --- questions ----------------------------------------------------------------------------------------------

def ask(model: GPT, encoding, questions: list[dict], trace: Trace | None) -> list[str]:
    """Prints the model's answers, right or wrong, and returns them. The user's own question has no answer."""
    check_length(questions, encoding, model.config.block_size)
    texts, max_new_tokens = [], None
    if not accepted_answers(questions[0]):  # the answer may have any length that fits into the context
        length = len(encoding.encode_ordinary(questions[0]["prompt"]))
        max_new_tokens = max(1, model.config.block_size - length)
    rows = 1 if trace else ROWS
    for part in (questions[i:i + rows] for i in range(0, len(questions), rows)):
        for question, tokens in zip(part, answer(model, encoding, part, max_new_tokens), strict=True):
            text = decode_answer(encoding, tokens)
            texts.append(text)
            answers, notes = accepted_answers(question), []
            if not answers:
                notes.append("the corpus does not have this question")
            else:
                notes.append("right" if is_right(question, text) else f"wrong: {' or '.join(answers)}")
            if "exposures" in question:
                times = question["exposures"]
                notes.append("told once" if times == 1 else f"told {times} times")
            if question.get("held_out"):
                notes.append("never asked in training")
            print(f"{question['prompt']} {text}   [{', '.join(notes)}]", flush=True)
            if trace:
                trace.print(encoding.encode_ordinary(question["prompt"]) + tokens)
    return texts


def share_rows(questions: list[dict], answers: list[str]) -> dict[str, float]:
    """{label: share of right answers}: of all questions, by exposures, of held-out questions, and by kind."""
    rows = recall_rows(shares(questions, answers))
    for kind in sorted({question["kind"] for question in questions if "kind" in question}):
        of_kind = [pair for pair in zip(questions, answers, strict=True) if pair[0].get("kind") == kind]
        rows[f"kind: {kind}"] = shares(*zip(*of_kind, strict=True)).get("all")
    return {label: share for label, share in rows.items() if share is not None}


def print_shares(questions: list[dict], answers: list[str]) -> None:
    """Prints the share of right answers, beside the share that guesses get right without knowing any fact."""
    print(f"{'share of right answers':34} model  always the commonest answer to this kind of question")
    guesses = share_rows(questions, commonest_answers(questions))
    for label, share in share_rows(questions, answers).items():
        print(f"{label:34} {share:.3f}  {guesses[label]:.3f}")


# --- text ---------------------------------------------------------------------------------------------------

def read_prompts(name: str) -> list[str]:
    try:
        text = Path("/dev/stdin" if name == "-" else name).read_text(encoding="utf-8-sig")
    except OSError as error:
        fail(f"--prompt_file={name}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"--prompt_file={name}: not UTF-8 ({error.reason} near byte {error.start}); convert it first")
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        fail(f"--prompt_file={name} has no lines to continue")
    return prompts


class TokenPrinter:
    """Prints each token as soon as it is there. A character of several tokens waits for the last of them."""

    def __init__(self, encoding):
        self.encoding, self.decoder = encoding, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def print(self, new: torch.Tensor) -> None:
        print(self.decoder.decode(token_bytes(self.encoding, new.item())), end="", flush=True)

    def end(self) -> None:
        print(self.decoder.decode(b"", final=True))


def drawing(config: SampleConfig, encoding) -> dict:
    """Options of GPT.generate."""
    return dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                top_k=config.top_k or None, stop=encoding.eot_token)


def encode_prompt(encoding, text: str) -> list[int]:
    return encoding.encode(text or "\n", allowed_special={END}, disallowed_special=())


def continue_text(model: GPT, encoding, text: str, seed: int, config: SampleConfig) -> list[int]:
    """Continues a text, and prints each new token at once. Returns the tokens of both together."""
    print(text, end="", flush=True)
    printer, idx = TokenPrinter(encoding), torch.tensor([encode_prompt(encoding, text)])
    idx = model.generate(idx.to(model.wte.weight.device), seed=seed, on_token=printer.print,
                         **drawing(config, encoding))
    printer.end()
    return idx[0].tolist()


def continue_together(model: GPT, encoding, texts: list[str], seed: int, config: SampleConfig) -> list[str]:
    """Continues many texts, in batches of prompts with the same number of tokens: these need no padding."""
    prompts = [encode_prompt(encoding, text) for text in texts]
    new = {}
    by_length = sorted(range(len(texts)), key=lambda i: len(prompts[i]))
    for length, group in groupby(by_length, key=lambda i: len(prompts[i])):
        group = list(group)
        idx = torch.tensor([prompts[i] for i in group], device=model.wte.weight.device)
        idx = model.generate(idx, seed=seed + group[0], **drawing(config, encoding))
        for i, tokens in zip(group, idx[:, length:].tolist(), strict=True):
            if encoding.eot_token in tokens:
                tokens = tokens[:tokens.index(encoding.eot_token) + 1]
            new[i] = texts[i] + decode(encoding, tokens)
    return [new[i] for i in range(len(texts))]


@command
def main(argv: list[str] | None = None) -> None:
    _, options = parse(SampleConfig, argv, description=__doc__)
    config = build(SampleConfig, options)
    device = find_device(config.device)
    checkpoint = find_trained(newest_run(Path(config.out_dir)))
    model, encoding, trained = load(checkpoint)
    model.to(device)

    path = corpus.DATA / trained.dataset / "qa.jsonl"
    mode = next((mode for mode in MODES if getattr(config, mode)), "prompt")
    # without other options, ask some questions if the corpus has any
    if options.keys() <= {"out_dir", "device", "trace", "seed"} and path.exists():
        mode, config.questions = "questions", 5
    if useless := options.keys() - {"out_dir", "device", "trace", mode} - MODES[mode]:
        fail(f"--{min(useless)} has no effect with --{mode}: leave it out")
    if config.trace and not trained.mem_layers:
        fail("--trace: this model has no memory layers")
    trace = Trace(model, encoding) if config.trace else None

    if mode in ("prompt", "prompt_file"):
        texts = read_prompts(config.prompt_file) if config.prompt_file else [config.prompt]
        texts = [text for text in texts for _ in range(config.num_samples)]
        together = config.prompt_file and not trace
        for i in range(0, len(texts), ROWS if together else 1):
            if together:
                part = continue_together(model, encoding, texts[i:i + ROWS], config.seed + i, config)
                for number, text in enumerate(part, i + 1):
                    print(f"--- sample {number} of {len(texts)}\n{text}", flush=True)
            else:
                print(f"--- sample {i + 1} of {len(texts)}")
                tokens = continue_text(model, encoding, texts[i], config.seed + i, config)
                if trace:
                    trace.print(tokens)
        return
    if mode == "qa" and not Path(config.qa).is_file():
        fail(f"--qa={config.qa}: no such file")
    questions = []
    if mode == "qa":
        questions = read_questions(Path(config.qa))
    elif path.exists():
        data = load_dataset(trained.dataset)
        check_data(data, trained, checkpoint)
        questions = data.questions
    if not questions and mode != "question":
        fail(f"--{mode}: {config.qa or path} has no questions; facts has them: python -m data.prepare facts")
    if mode == "questions":
        questions = random.Random(config.seed).sample(questions, min(config.questions, len(questions)))
    elif mode == "question":
        questions = [find_question(config.question, questions)]
    elif mode == "ask":
        questions = questions_about(config.ask, questions)
    texts = ask(model, encoding, questions, trace)
    if mode != "question":
        right = sum(map(is_right, questions, texts))
        print(f"{right} of {len(questions)} right, {right / len(questions):.1%}")
    if mode == "qa":
        print_shares(questions, texts)


if __name__ == "__main__":
    main()
