"""
Finds, erases and teaches facts in the memory of a trained model.

    python edit.py find --question='What did Mule Tujuton study?'      which slots carry this answer
    python edit.py erase --ask='Mule Tujuton'                          empties the slots of a person
    python edit.py erase --question='What did Mule Tujuton study?'     empties the slots of one fact
    python edit.py teach --statement 'The job of Mule Zuhugom is that of a baker.' ...
    python edit.py teach --file=FILE                                   learns the sentences of a file
    python edit.py erase --help                                        the options of a command

find changes nothing. erase and teach write a checkpoint to a new folder, for sample.py and train.py. The old
checkpoint and the training text still have what was erased.
"""

import math
import os
import random
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # before the imports that take seconds
    from runtime.cli import exit_on_ctrl_c
    exit_on_ctrl_c()

from data.corpus import (
    Dataset,
    accepted_answers,
    check_length,
    decode,
    decode_answer,
    is_right,
    load_dataset,
)
from editing import (
    choose_slots,
    erase,
    find,
    inverse_document_frequency,
    is_gone,
    lines_with,
    question_batch,
    teach,
)
from evaluate import answer, validation_loss
from model import GPT
from runtime.build import find_trained
from runtime.checkpoint import is_checkpoint, read_meta, save_checkpoint, step_of
from runtime.cli import at_least, build, check_choices, command, fail, first_word, parse, python_command
from sample import find_question, name_pattern, newest_run, questions_about
from train import TrainConfig, check_data, find_device, load, make_optimizers

OTHERS = 200  # questions about others that are asked before and after
NAME = re.compile(r"(?<=[a-z,] )[A-Z]\w*(?: [A-Z]\w*)*")  # capitalised words inside a question


@dataclass
class EditConfig:
    out_dir: str = "out"  # the folder of a run, or of many runs; then the newest run is used
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one

    def __post_init__(self):
        self.out_dir = os.path.expanduser(self.out_dir)
        check_choices(self)


@dataclass
class FindConfig(EditConfig):
    question: str = ""  # the question whose answer is taken apart


@dataclass
class ChangeConfig(EditConfig):
    save_to: str = ""  # new folder for the checkpoint; none: the run's folder with -erase or -teach
    dry_run: bool = False  # only report, and write no checkpoint
    background: int = 1000  # pieces of the training text that show which slots other texts read

    def __post_init__(self):
        super().__post_init__()
        self.save_to = os.path.expanduser(self.save_to)
        at_least(1, self, "background")


@dataclass
class EraseConfig(ChangeConfig):
    ask: str = ""  # erase the answers to all questions of the corpus that contain this name
    question: str = ""  # erase only the answer to this question; --ask says whom it is about, if need be
    slots: int = 0  # slots to empty; 0: as few of 4, 8, 16 ... 256 as are enough

    def __post_init__(self):
        super().__post_init__()
        at_least(0, self, "slots")


@dataclass
class TeachConfig(ChangeConfig):
    statement: tuple[str, ...] = ()  # sentences to learn
    file: str = ""  # a file of sentences to learn, one per line
    question: tuple[str, ...] = ()  # questions to ask before and after
    slots: int = 128  # slots that may change
    steps: int = 60  # training steps, each with all sentences
    lr: float = 100.0  # learning rate; high, because each slot has a small part in what a token reads

    def __post_init__(self):
        super().__post_init__()
        self.file = os.path.expanduser(self.file)
        at_least(1, self, "slots", "steps")
        if not 0 <= self.lr <= 1e6:
            raise ValueError(f"lr={self.lr} must be between 0 and 1,000,000")


def reply(model: GPT, encoding, question: dict) -> str:
    """The model's answer, as long as the context allows."""
    room = model.config.block_size - len(encoding.encode_ordinary(question["prompt"]))
    return decode_answer(encoding, answer(model, encoding, [question], max(1, room - 1))[0])


def complete_question(model: GPT, encoding, text: str, data: Dataset) -> dict:
    """The question of the corpus, or the user's own question with the model's answer as the right one."""
    question = find_question(text, data.questions)
    check_length([question], encoding, model.config.block_size)
    if not accepted_answers(question):
        question["answers"] = [reply(model, encoding, question).removesuffix("…")]
        check_length([question], encoding, model.config.block_size)
    return question


def check_new_folder(folder: Path) -> None:
    """Fails now if no checkpoint could be saved there later."""
    if folder.exists() or folder.is_symlink():
        fail(f"{folder} already exists: choose another folder with --save_to, or delete this one")
    if is_checkpoint(folder):
        fail(f"--save_to={folder} has the name of a checkpoint: choose another")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        fail(f"--save_to={folder}: no folder can be made in {parent}")


def read_statements(config: TeachConfig, encoding, block_size: int) -> list[str]:
    try:
        lines = Path(config.file).read_text(encoding="utf-8-sig").split("\n") if config.file else []
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--file={config.file}: {getattr(error, 'strerror', 'not UTF-8; convert it first')}")
    statements = [*config.statement, *(line for line in lines if line.strip())]
    if not statements or not all(text.strip() for text in statements):
        fail("there is an empty statement: write --statement 'The job of ... is that of a ...'"
             if statements else f"--file={config.file} has no sentences to learn")
    for text in statements:
        if (length := len(encoding.encode_ordinary(text))) > block_size:
            fail(f"the statement {text[:40]!r} has {length} tokens, more than block_size={block_size}")
    return [text.strip() for text in statements]


def report(model: GPT, encoding, data: Dataset, config: TrainConfig, shown: list[dict], groups: dict,
           change) -> float:
    """
    Calls change() and prints what is different: the answers to `shown`, the number of right answers in each
    group {label: questions}, and the validation loss, which it returns.
    """
    def measure():
        texts = {label: [decode_answer(encoding, tokens) for tokens in answer(model, encoding, questions)]
                 for label, questions in groups.items()}
        loss = validation_loss(model, data.val, config, model.wte.weight.device)
        return [reply(model, encoding, question) for question in shown], texts, loss

    old_texts, old, old_loss = measure()
    slots = change()
    new_texts, new, new_loss = measure()
    print(f"changed {len(slots)} of {model.pool.num_values:,} slots: {first_few(slots)}")
    for question, before, after in zip(shown, old_texts, new_texts, strict=True):
        print(f"{question['prompt']} {before} -> {after}")
    for label, questions in groups.items():
        before, after = (sum(map(is_right, questions, texts[label])) for texts in (old, new))
        print(f"{label}: {before} of {len(questions)} right before, {after} after")
    print(f"validation loss: {old_loss:.3f} before, {new_loss:.3f} after")
    return new_loss


def first_few(slots) -> str:
    return "  ".join(f"{slot:,}" for slot in slots[:6].tolist()) + " ..." * (len(slots) > 6)


def print_found(found: dict, own: str, encoding, question: dict, layers) -> None:
    """own: what the model answers."""
    right = is_right(question, own)
    print(f"{question['prompt']} {own}" + ("" if right else f"   [wrong: {accepted_answers(question)[0]}]"))
    print(f"How much the log-probability of the {'' if right else 'right '}answer falls without")
    print("    all slots that one token reads in" + "".join(f"   layer {layer}" for layer in layers))
    for token, losses in zip(found["tokens"], found["places"].tolist(), strict=True):
        print(f"    {decode(encoding, [token])!r:33}" + "".join(f"{loss:10.2f}" for loss in losses))
    *_, whole = found["top"].values()
    print("    the slots with most effect, of all tokens and layers   share   slots")
    for n, loss in found["top"].items():
        slots, share = found["slots"], f"{loss / whole:.0%}" if whole > 0.01 else ""
        print(f"    {n:5,} of {len(slots):5,} {loss:28.2f}{share:>20}   {first_few(slots[:n])}")


def prepare_erase(config: EraseConfig, model: GPT, encoding, data: Dataset, idf):
    """shown, groups and change for `report`."""
    if config.question:
        questions = [complete_question(model, encoding, config.question, data)]
        names = [config.ask] if config.ask else NAME.findall(questions[0]["prompt"])
        if not names:
            fail(f"--question={config.question}: whom is it about? Add --ask=NAME")
        name = names[0]
    else:
        questions, name = questions_about(config.ask, data.questions), config.ask
    lines = lines_with(name, data)
    if not lines:
        fail(f"the training text does not contain the name {name}: --ask names whom the question is about")
    same = [question for question in data.questions if name_pattern(name).search(question["prompt"])]
    others = [question for question in data.questions if question not in same]
    groups = {"these answers": questions,
              "other answers with this name": [question for question in same if question not in questions],
              "answers about others": random.Random(0).sample(others, min(OTHERS, len(others)))}
    batches = [question_batch(model, encoding, question) for question in questions]

    def change():
        slots = choose_slots(model, encoding, questions, lines, idf, config.slots)
        erase(model, slots)
        if not all(is_gone(model, *batch) for batch in batches):
            print(f"{len(slots)} slots are not enough: try --slots={4 * len(slots)}. What the other "
                  "parameters know stays")
        return slots
    return questions, groups, change


def prepare_teach(config: TeachConfig, model: GPT, encoding, data: Dataset, idf):
    """shown, groups and change for `report`."""
    statements = read_statements(config, encoding, model.config.block_size)
    asked = [find_question(text, data.questions) for text in config.question]
    check_length(asked, encoding, model.config.block_size)
    ends = [text.rsplit(" ", 1) for text in statements if " " in text]
    groups = {"last words of the statements": [dict(prompt=prompt, answer=end) for prompt, end in ends],
              "old answers": random.Random(0).sample(data.questions, min(OTHERS, len(data.questions)))}
    return asked, groups, lambda: teach(model, encoding, statements, idf, config.slots, config.steps,
                                        config.lr)


@command
def main(argv: list[str] | None = None) -> None:
    kinds = {"find": (FindConfig, "question"), "erase": (EraseConfig, "ask", "question"),
             "teach": (TeachConfig, "statement", "file")}
    word, rest = first_word(argv, kinds, __doc__, "what to do")
    kind, *needed = kinds[word]
    config = build(kind, parse(kind, rest, description=__doc__)[1])
    if not any(getattr(config, name) for name in needed):
        fail(f"{word} needs " + " or ".join(f"--{name}=..." for name in needed))
    run = newest_run(Path(config.out_dir))
    if word != "find":
        folder = run.parent if is_checkpoint(run) else run
        folder = folder if folder.name.strip(".") else folder.resolve()  # such as . and ..
        save_to = Path(config.save_to or f"{folder}-{word}")
        if not config.dry_run:
            check_new_folder(save_to)
    checkpoint = find_trained(run)
    model, encoding, trained = load(checkpoint)
    if not trained.mem_layers:
        fail(f"the model in {run} has no memory layers")
    model.to(find_device(config.device))
    data = load_dataset(trained.dataset)
    check_data(data, trained, checkpoint)
    if word == "find":
        question = complete_question(model, encoding, config.question, data)
        own = reply(model, encoding, question).removesuffix("…")
        return print_found(find(model, encoding, question), own, encoding, question, trained.mem_layers)

    idf = inverse_document_frequency(model, data.train, config.background)
    prepare = prepare_erase if word == "erase" else prepare_teach
    shown, groups, change = prepare(config, model, encoding, data, idf)
    groups = {label: questions for label, questions in groups.items() if questions}
    loss = report(model, encoding, data, trained, shown, groups, change)
    if not math.isfinite(loss):
        fail("the model has broken, and is not saved: choose a lower --lr")
    if config.dry_run:
        print("nothing is saved: this was a --dry_run")
    else:
        meta = read_meta(checkpoint)
        meta = {"config": asdict(replace(trained, out_dir=str(save_to))), "encoding": meta["encoding"],
                "measured": meta["measured"], "val_loss": loss}
        optimizers = make_optimizers(trained, model, checkpoint)
        save_checkpoint(save_to, step_of(checkpoint), model, optimizers, meta, keep=1)
        print(f"saved. Ask it: {python_command()} sample.py --out_dir={save_to} --question=TEXT")


if __name__ == "__main__":
    main()
