"""
Asks a trained model, and shows what it read in its memory.

    python sample.py                                    the run trained last: a few questions, or some text
    python sample.py --questions=10 --trace             ten questions; for every token, the slots read
    python sample.py --out_dir=out/stdlib --prompt='def main('
"""

import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from checkpoint import checkpoints, find_checkpoint, load_model, read_meta
from config import at_least, build, fail, parse
from data.prepare import DATA, END, encoding_from_json
from evaluate import answer, decode, decode_answer, read_questions
from model import GPT
from train import find_device, stored_config

SLOTS_SHOWN = 4  # a token and memory layer, in a trace


@dataclass
class SampleConfig:
    out_dir: str = "out"  # the run, or a folder of runs, of which the one saved last is taken
    prompt: str = ""  # text to go on from; none: a new line
    num_samples: int = 1  # continuations of the prompt
    max_new_tokens: int = 200  # tokens a continuation, at most
    temperature: float = 0.8  # 0 always takes the likeliest token; 1 draws as the model believes
    top_k: int = 50  # draw from the k likeliest tokens only; 0: from all
    seed: int = 1  # of the draws
    questions: int = 0  # ask so many of the questions that the data came with, instead
    trace: bool = False  # show the slots read with most weight, for each generated token and memory layer
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one

    def __post_init__(self):
        at_least(1, self, "num_samples", "max_new_tokens")
        at_least(0, self, "temperature", "top_k", "questions", "seed")
        if 0 < self.temperature < 1e-3:
            raise ValueError(f"temperature={self.temperature} must be 0, or at least 0.001")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} must be below 2**32")
        if self.prompt and self.questions:
            raise ValueError("prompt and --questions are two ways to ask: choose one")


def newest_run(out_dir: Path) -> Path:
    runs = {path.parent for path in out_dir.glob("**/step_*")}
    newest = [checkpoints(run)[-1] for run in runs if checkpoints(run)]
    if not newest:
        fail(f"no checkpoint in {out_dir}: train one with python train.py, or name the folder with --out_dir")
    return max(newest, key=lambda folder: folder.stat().st_mtime).parent


class Trace:
    """What the last token read in each forward pass of a model: (indices, weights) for each memory layer."""

    def __init__(self, model: GPT):
        self.layers, self.passes = model.config.mem_layers, []
        model.register_forward_pre_hook(lambda module, args: self.passes.append([]))
        model.pool.register_forward_pre_hook(
            lambda module, read: self.passes[-1].append(tuple(part[-1].cpu() for part in read)))

    def print(self, tokens: list[str]) -> None:
        """For each token: the slots read with most weight by the pass that chose it, all heads together."""
        for token, layers in zip(tokens, self.passes, strict=False):
            for layer, (indices, weights) in zip(self.layers, layers, strict=True):
                slots, place = indices.unique(return_inverse=True)  # heads may meet in a slot
                weights = weights.abs()  # of PEER some are negative
                share = torch.zeros(len(slots)).index_add_(0, place, weights) / weights.sum()
                top = share.topk(min(SLOTS_SHOWN, len(slots)))
                shown = "  ".join(f"{slots[i]:>9,} {part:4.0%}" for part, i in zip(*top, strict=True))
                label = repr(token) if layer == self.layers[0] else ""
                print(f"    {label:14} layer {layer:2}, slots {shown}")
        self.passes.clear()


def main(argv: list[str] | None = None) -> None:
    _, given = parse(SampleConfig, argv, description=__doc__)
    config = build(SampleConfig, given)
    device = find_device(config.device)
    folder = find_checkpoint(newest_run(Path(config.out_dir)))
    meta = read_meta(folder)
    trained, encoding = stored_config(meta), encoding_from_json(meta["encoding"])
    trained.kernel = "auto"  # that of the training is no matter here
    model = GPT(trained, draw_pool=False)
    load_model(folder, model)
    model.to(device).eval()
    print(f"from {folder}")

    path = DATA / trained.dataset / "qa.jsonl"
    if given.keys() <= {"out_dir", "device", "seed"} and path.exists():
        config.questions, config.trace = 5, bool(trained.mem_layers)
    if config.trace and not trained.mem_layers:
        fail("--trace: this model has no memory layers")
    trace = Trace(model) if config.trace else None

    def show_trace(tokens: list[int]) -> None:
        if trace is not None:
            trace.print([decode(encoding, [token]) for token in tokens])

    if config.questions:
        questions = read_questions(path)
        if not questions:
            fail(f"--questions: there are none in {path}; facts has them: python data/prepare.py facts")
        questions = random.Random(config.seed).sample(questions, min(config.questions, len(questions)))
        right = 0
        for question in questions:
            tokens = answer(model, encoding, [question])[0]
            text = decode_answer(encoding, tokens)
            right += text == question["answer"]
            verdict = "right" if text == question["answer"] else f"wrong: {question['answer']}"
            told = f", told {question['exposures']} times" if "exposures" in question else ""
            print(f"{question['prompt']} {text}   [{verdict}{told}]")
            show_trace(tokens)
        print(f"{right} of {len(questions)} right")
    else:
        prompt = encoding.encode(config.prompt or "\n", allowed_special={END}, disallowed_special=())
        for i in range(config.num_samples):
            idx = torch.tensor([prompt], device=device)
            idx = model.generate(idx, config.max_new_tokens, config.temperature, config.top_k or None,
                                 seed=config.seed + i, stop=encoding.eot_token)
            tokens = idx[0, len(prompt):].tolist()
            print(f"--- sample {i + 1} of {config.num_samples}\n{config.prompt}{decode(encoding, tokens)}")
            show_trace(tokens)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it, and quietly
    main()
