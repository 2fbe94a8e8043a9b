"""
Lets a trained model answer questions or continue a text, and shows which slots of the memory it read.

    python sample.py                                    the newest run: a few questions, or some text
    python sample.py --questions=1 --trace              a question, and the slots that each token reads
    python sample.py --out_dir=out/stdlib --prompt='def main('
"""

import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # before the imports that take seconds
    from runtime.cli import exit_on_ctrl_c
    exit_on_ctrl_c()

import torch

from data.corpus import decode, decode_answer, read_questions
from data.prepare import DATA, END
from evaluate import answer
from model import GPT
from runtime.checkpoint import checkpoints
from runtime.cli import at_least, build, check_choices, command, fail, parse
from train import find_device, load

SLOTS_SHOWN = 4  # per token and memory layer, in a trace


@dataclass
class SampleConfig:
    out_dir: str = "out"  # the folder of a run, or of many runs; then the newest run is used
    prompt: str = ""  # text to continue; empty: start at a new line
    num_samples: int = 1  # how many continuations of the prompt
    max_new_tokens: int = 200  # longest continuation, in tokens
    temperature: float = 0.8  # 0 always takes the likeliest token; 1 draws with the model's probabilities
    top_k: int = 50  # draw from the k likeliest tokens only; 0: from all
    seed: int = 1  # seed of the random draws
    questions: int = 0  # ask this many questions of the corpus, instead of continuing a text
    trace: bool = False  # show the slots that each token reads with most weight, for each memory layer
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one

    def __post_init__(self):
        check_choices(self)
        at_least(1, self, "num_samples", "max_new_tokens")
        at_least(0, self, "temperature", "top_k", "questions", "seed")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature={self.temperature} must be 0, or at least 0.001")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} must be below 2**32")
        if self.prompt and self.questions:
            raise ValueError("prompt and --questions exclude each other: choose one")


def newest_run(out_dir: Path) -> Path:
    if checkpoints(out_dir):  # a run, or one checkpoint of a run
        return out_dir
    runs = {path.parent for path in out_dir.glob("**/step_*")}
    newest = [existing[-1] for run in runs if (existing := checkpoints(run))]
    if not newest:
        fail(f"no checkpoint in {out_dir}: train a model with python train.py, or name another --out_dir")
    return max(newest, key=lambda folder: folder.stat().st_mtime).parent


class Trace:
    """Records what each token reads: (indices, weights) for each memory layer, all heads together."""

    def __init__(self, model: GPT):
        self.layers, self.passes = model.config.mem_layers, []
        model.register_forward_pre_hook(lambda module, args: self.passes.append([]))
        model.pool.register_forward_pre_hook(
            lambda module, read: self.passes[-1].append(tuple(part.cpu() for part in read)))

    def print(self, tokens: list[str]) -> None:
        """tokens: the prompt, which the first pass reads, and the new tokens, one for each later pass."""
        # the last token was never read. A full context is read again, and only its last token is new
        reads = [[(indices[row], weights[row]) for indices, weights in layers]
                 for number, layers in enumerate(self.passes)
                 for row in (range(len(layers[0][0])) if number == 0 else [-1])]
        for token, layers in zip(tokens, reads, strict=False):
            for layer, (indices, weights) in zip(self.layers, layers, strict=True):
                slots, place = indices.unique(return_inverse=True)  # several heads may read the same slot
                weights = weights.abs()  # PEER also has negative weights
                shares = torch.zeros(len(slots)).index_add_(0, place, weights) / weights.sum()
                top = shares.topk(min(SLOTS_SHOWN, len(slots)))
                text = "  ".join(f"{slots[i]:>9,} {share:4.0%}" for share, i in zip(*top, strict=True))
                label = repr(token) if layer == self.layers[0] else ""
                print(f"    {label:14} layer {layer:2}, slots {text}")
        self.passes.clear()


@command
def main(argv: list[str] | None = None) -> None:
    _, options = parse(SampleConfig, argv, description=__doc__)
    config = build(SampleConfig, options)
    device = find_device(config.device)
    model, encoding, trained = load(newest_run(Path(config.out_dir)))
    model.to(device)

    path = DATA / trained.dataset / "qa.jsonl"
    # without other options, ask some questions if the corpus has any
    if options.keys() <= {"out_dir", "device", "seed"} and path.exists():
        config.questions = 5
    if config.trace and not trained.mem_layers:
        fail("--trace: this model has no memory layers")
    trace = Trace(model) if config.trace else None

    def show_trace(tokens: list[int]) -> None:
        if trace is not None:
            trace.print([decode(encoding, [token]) for token in tokens])

    if config.questions:
        questions = read_questions(path)
        if not questions:
            fail(f"--questions: {path} has no questions; facts has them: python data/prepare.py facts")
        questions = random.Random(config.seed).sample(questions, min(config.questions, len(questions)))
        right = 0
        for question in questions:
            tokens = answer(model, encoding, [question])[0]
            text = decode_answer(encoding, tokens)
            right += text == question["answer"]
            verdict = "right" if text == question["answer"] else f"wrong: {question['answer']}"
            exposures = f", told {question['exposures']} times" if "exposures" in question else ""
            print(f"{question['prompt']} {text}   [{verdict}{exposures}]")
            show_trace(encoding.encode(question["prompt"], disallowed_special=()) + tokens)
        print(f"{right} of {len(questions)} right")
    else:
        prompt = encoding.encode(config.prompt or "\n", allowed_special={END}, disallowed_special=())
        for i in range(config.num_samples):
            idx = torch.tensor([prompt], device=device)
            idx = model.generate(idx, config.max_new_tokens, config.temperature, config.top_k or None,
                                 seed=config.seed + i, stop=encoding.eot_token)
            tokens = idx[0, len(prompt):].tolist()
            print(f"--- sample {i + 1} of {config.num_samples}\n{config.prompt}{decode(encoding, tokens)}")
            show_trace(prompt + tokens)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback if `| head` stops reading
    main()
