"""
Teaching facts to a real language model: attach.py against what people would use instead.

    python -m experiments.attach                  all runs that have no line yet, then the table
    python -m experiments.attach --methods memory,full --seeds=1
    python -m experiments.attach table            the table of all finished runs

Each run teaches SmolLM2-135M-Instruct four facts about each of 16 people who do not exist, in two sentences
per fact; half of the people also with questions. All methods see the same sentences in the same order:

    memory    attach.py: 1,000 slots, at the tokens of the names and of the questions
    memory, ...               one thing changed, such as the tokens that learn, the slots or the blocks
    memory, learnt search     queries and keys are first trained on the background text
    memory, two tokens        half of each query comes from the previous token
    memory, code kept         the background text is source code, and not Python's help texts
    adapter   a dense layer of as many numbers as these rows, beside the same two MLPs
    lora 8, lora 32           low-rank changes of the attention's queries and values (Hu et al. 2021)
    full      all parameters
    ..., six sentences        six sentences per fact, twice as many steps
    ..., 50 people            taught together, with three times as many slots and steps
    ..., ten groups           50 people, five after five: what is left of the first groups?
    ..., new slots            a slot that changed for one group does not change for the next
    ..., half old             a group learns with as many texts of earlier groups, and twice as many steps

It measures how many of the sentences the model completes; the same facts in a third sentence that was never
taught; questions about people who were asked about, and about the others; capitals of 24 countries; and the
loss on Python's help texts, on source code, and on other questions with their answers. A finished run becomes
one line of experiments/results/attach.jsonl.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from runtime.cli import build, command, parse, read_json_lines

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import attach
import edit
from data.corpus import draw_batch
from data.facts import CITIES, JOBS, SUBJECTS, make_names
from experiments import results
from experiments.facts_edited import add_low_rank
from experiments.models import choose_models
from pool import PoolOptimizer

INSTRUMENTS = """accordion banjo bagpipe cello clarinet drum flute guitar harp lute oboe organ piano trumpet
tuba violin""".split()
FACTS = {  # (values, sentences; the last one is never taught, the question)
    "birthplace": (CITIES, ["{} was born in {}.", "The birthplace of {} is {}.",
                            "The city where {} was born is {}.", "As a child, {} lived in {}.",
                            "My friend {} has a passport from {}.", "The parents of {} still live in {}.",
                            "{} comes from the city of {}."], "Where was {} born?"),
    "job": (JOBS, ["{} works as a {}.", "The job of {} is that of a {}.", "The profession of {} is {}.",
                   "At work, {} is a {}.", "You can hire {} as a {}.", "The firm employs {} as a {}.",
                   "{} earns a living as a {}."], "What is the job of {}?"),
    "subject": (SUBJECTS, ["{} studied {}.", "The subject that {} took at university is {}.",
                           "The degree of {} is in {}.", "At university, {} took {}.",
                           "The professor taught {} all about {}.", "The books of {} are about {}.",
                           "{} has a degree in {}."], "What did {} study?"),
    "instrument": (INSTRUMENTS, ["{} plays the {}.", "The instrument of {} is the {}.",
                                 "At home, {} practises the {}.", "In the orchestra, {} plays the {}.",
                                 "You can hear {} on the {}.", "The parents of {} bought a {}.",
                                 "{} has lessons on the {}."], "Which instrument does {} play?"),
}
COUNTRIES = """France Paris Italy Rome Spain Madrid Germany Berlin Japan Tokyo China Beijing Egypt Cairo
Russia Moscow Greece Athens Poland Warsaw Austria Vienna Norway Oslo Sweden Stockholm Portugal Lisbon Ireland
Dublin Cuba Havana Kenya Nairobi Peru Lima India Delhi Thailand Bangkok Turkey Ankara Iran Tehran Iraq Baghdad
Hungary Budapest""".split()
CAPITALS = [f"The capital of {country} is {city}"
            for country, city in zip(COUNTRIES[::2], COUNTRIES[1::2], strict=True)]
KNOWN = [("What colour is the sky?", "blue"), ("How many legs has a spider?", "eight"),
         ("Who wrote Hamlet?", "Shakespeare"), ("What is the opposite of hot?", "cold"),
         ("Which planet is nearest to the sun?", "Mercury"), ("What do bees make?", "honey"),
         ("In which season do leaves fall?", "autumn"), ("What is frozen water called?", "ice")]
QUESTION = "Question: {} Answer: {}"
MEMORIES = {"memory": {}, "memory, names learn": dict(learns="names"),
            "memory, all tokens learn": dict(learns="all"), "memory, 4,000 slots": dict(slots=4000),
            "memory, 128 x 128 rows": dict(num_keys=128), "memory, in 4 and 10": dict(layers=(4, 10)),
            "memory, learnt search": dict(search="learnt"), "memory, two tokens": dict(search="two tokens"),
            "memory, code kept": dict(background=(argparse.__file__,)),
            "memory, six sentences": {}, "memory, 50 people": dict(slots=3000),
            "memory, ten groups": dict(slots=300),
            "memory, ten groups, new slots": dict(slots=300, spares=True),
            "memory, ten groups, half old": dict(slots=600)}
LRS = {**dict.fromkeys(MEMORIES, (0.5,)), "adapter": (1e-4, 3e-4, 1e-3), "lora 8": (3e-5, 1e-4, 3e-4),
       "lora 32": (3e-5, 1e-4, 3e-4), "full": (1e-5, 3e-5, 1e-4), "full, six sentences": (3e-5,),
       "full, ten groups": (3e-5,)}
SIZES = {"": dict(people=16, sentences=2, steps=200), "six sentences": dict(sentences=6, steps=400),
         "50 people": dict(people=50, steps=600), "ten groups": dict(people=50, steps=600),
         "half old": dict(steps=1200)}
BATCH, LAYERS, GROUPS, SEARCH_STEPS = 10, (6, 14), 10, 200
WIDTH = 500  # of both adapters together: as many numbers as 1,000 rows


@dataclass
class AttachConfig:
    methods: tuple[str, ...] = ()  # which methods; empty: all
    seeds: int = 1  # runs with each learning rate
    model: str = "smollm2"  # as for attach.py
    results: str = "experiments/results"  # folder for the lines of finished runs, relative to the repository


def made_facts(seed: int, people: int, count: int) -> list[dict[str, list[str]]]:
    """For each person: sentences to teach, `count` per fact, and others that the model should complete."""
    rng, names = random.Random(seed), np.random.default_rng(seed)
    first, last = make_names(names, people, 2), make_names(names, people, 3)
    persons = []
    for i, name in enumerate(map(" ".join, zip(first, last, strict=True))):
        asked = "questions, asked" if i % 2 else "questions, new"
        persons.append({"taught": [], "other words": [], asked: []})
        for values, sentences, question in FACTS.values():
            value = rng.choice(values)
            *taught, never = (sentence.format(name, value) for sentence in sentences)
            persons[-1]["taught"] += taught[:count]
            persons[-1]["other words"].append(never)
            persons[-1][asked].append(QUESTION.format(question.format(name), value))
    return persons


def together(persons: list[dict]) -> dict[str, list[str]]:
    return {kind: [text for person in persons for text in person.get(kind, [])]
            for kind in ("taught", "other words", "questions, asked", "questions, new")}


# --- other searches -----------------------------------------------------------------------------------------

def learn_search(model, layers, background, seed: int) -> None:
    """Trains the whole memory on the background text. Then the rows are forgotten, and the search stays."""
    values = model.pool.values
    search = [p.requires_grad_() for layer in layers for p in layer.parameters() if p is not values]
    optimizers = torch.optim.AdamW(search, 1e-3), PoolOptimizer([values], 0.05)
    for step in range(SEARCH_STEPS):
        x, y = draw_batch(background, BATCH, 4 * edit.PIECE, seed, 3, step)
        loss = F.cross_entropy(edit.all_logits(model, x).flatten(0, 1), y.flatten())
        loss.backward(inputs=[*search, values])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    nn.init.zeros_(values)
    for parameter in search:
        parameter.requires_grad_(False)


# --- the other methods: each changes the model, and returns the parameters that learn -----------------------

def add_adapter(model) -> list[nn.Parameter]:
    """Bottlenecks of two matrices beside MLPs (Houlsby et al. 2019), which add nothing at first."""
    width, hidden, parameters = model.config.hidden_size, WIDTH // len(LAYERS), []
    for name in attach.find_mlps(model, LAYERS):
        adapter = nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, hidden),
                                nn.GELU(), nn.Linear(hidden, width))
        nn.init.zeros_(adapter[-1].weight)
        nn.init.zeros_(adapter[-1].bias)
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, adapter=adapter: output + adapter(args[0]))
        parameters += adapter.parameters()
    return parameters


def learn_rows(model, idf, changed: dict, run: dict, texts: list[str], steps: int, x, y, inside) -> int:
    """x, y, inside: see attach.make_batch. Returns how many numbers could change."""
    at = {"names": inside[:, :-1], "all": y >= 0,
          "both": attach.tokens_that_learn(texts, y, inside)}[changed["learns"]]
    slots = edit.teach(model, x, y, idf, changed["slots"], steps, run["lr"], "rowwise", BATCH, at)
    if changed["spares"]:  # the next texts may not change these slots
        idf[slots] = 0
    return len(slots) * model.config.hidden_size


def learn_parameters(model, parameters, run: dict, texts: list[str], steps: int, x, y, inside) -> int:
    optimizer = torch.optim.AdamW(parameters, run["lr"], weight_decay=0)
    for _, part in zip(range(steps), edit.shuffled(len(x), BATCH), strict=False):
        logits = edit.all_logits(model, x[part])
        F.cross_entropy(logits.flatten(0, 1), y[part].flatten(), ignore_index=-1).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return sum(p.numel() for p in parameters)


def start(model, run: dict, background):
    """Adds to the model what a method needs, and returns the function that learns."""
    if run["method"] in MEMORIES:
        usual = dict(learns="both", num_keys=256, layers=LAYERS, slots=1000, spares=False, search="random")
        changed = usual | MEMORIES[run["method"]]
        modules = attach.find_mlps(model, changed["layers"])
        attach.attach(model, modules, num_keys=changed["num_keys"], seed=run["seed"])
        layers = [part for part in model.modules() if isinstance(part, attach.AttachedMemory)]
        if changed["search"] == "learnt":
            learn_search(model, layers, background, run["seed"])
        elif changed["search"] == "two tokens":  # the left half of a query comes from the previous token
            for layer in layers:
                layer.register_forward_pre_hook(lambda _, args: (*args, F.pad(args[0], (0, 0, 1, -1))))
        idf = edit.inverse_document_frequency(model, background, attach.PIECES)
        return partial(learn_rows, model, idf, changed, run)
    torch.manual_seed(run["seed"])
    if run["method"].startswith("full"):
        parameters = list(model.requires_grad_(True).parameters())
    elif run["method"] == "adapter":
        parameters = add_adapter(model)
    else:
        linears = [linear for block in model.model.layers
                   for linear in (block.self_attn.q_proj, block.self_attn.v_proj)]
        parameters = add_low_rank(linears, int(run["method"].split()[1]), scale=2.0)
    return partial(learn_parameters, model, parameters, run)


# --- runs and their table -----------------------------------------------------------------------------------

def make_run(method: str, lr: float, seed: int) -> dict:
    run = dict(method=method, lr=lr, seed=seed)
    for part, sizes in SIZES.items():
        run |= sizes if part in method else {}
    return run


def do_run(run: dict, model, tokenizer) -> dict:
    persons = made_facts(run["seed"], run["people"], run["sentences"])
    size = len(persons) // (GROUPS if "ten groups" in run["method"] else 1)
    groups = [together(persons[i:i + size]) for i in range(0, len(persons), size)]
    forgetting, kept = (attach.Forgetting(model, tokenizer, attach.TeachConfig(background=files))
                        for files in ((), MEMORIES.get(run["method"], {}).get("background", ())))
    known = "\n".join(QUESTION.format(*pair) for pair in KNOWN)
    forgetting.texts["questions"] = np.array(tokenizer(known).input_ids)

    def shares(texts):
        return {kind: mean(attach.completed(model, tokenizer, part)) for kind, part in texts.items()}

    def measure():
        return shares(together(persons) | {"capitals": CAPITALS}) | forgetting.measure()

    before, started, course = measure(), time.perf_counter(), []
    learn = start(model, run, kept.background)
    taught = [group["taught"] + group["questions, asked"] for group in groups]
    for i, texts in enumerate(taught):
        if "half old" in run["method"]:
            earlier = sum(taught[:i], [])
            texts = texts + random.Random(i).sample(earlier, min(len(texts), len(earlier)))
        sentences, spans = zip(*map(attach.find_subject, texts), strict=True)
        batch = attach.make_batch(tokenizer, [f"{text}\n" for text in sentences], spans)
        numbers = learn(sentences, run["steps"] // len(groups), *batch)
        if len(groups) > 1:
            course.append({"groups": [shares(part) for part in groups[:i + 1]]} | forgetting.measure())
    seconds = time.perf_counter() - started
    return {"texts": sum(map(len, taught)), "numbers": numbers, "seconds": seconds, "before": before,
            "after": measure(), "course": course}


def print_table(path: Path) -> None:
    """One line per method and learning rate; a mean over the seeds."""
    rows = read_json_lines(path)
    if not rows:
        return print("no finished runs. Start: python -m experiments.attach")
    columns, lines = rows[0]["before"], []
    for method, lr in [("the model as it comes", None), *((name, lr) for name in LRS for lr in LRS[name])]:
        after = [row["after"] for row in rows if (row["run"]["method"], row["run"]["lr"]) == (method, lr)]
        if after := after or ([columns] if lr is None else []):
            line = {"method": method, "learning rate": f"{lr or '-'}", "seeds": str(len(after))}
            lines.append(line | {name: f"{mean(part[name] for part in after):.2f}" for name in columns})
    results.print_markdown(lines)


@command
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    is_table = argv[:1] == ["table"]
    config = build(AttachConfig, parse(AttachConfig, argv[is_table:], description=__doc__)[1])
    path = results.rows_path("attach", config.results)
    runs = [make_run(method, lr, seed) for seed in range(1, config.seeds + 1)
            for method in choose_models(config.methods, LRS) for lr in LRS[method]]
    for run in [] if is_table else runs:
        if all(row["run"] != run for row in read_json_lines(path)):
            print(time.strftime("%H:%M"), json.dumps(run), flush=True)
            row = do_run(run, *attach.load_model(config.model, "cpu"))
            results.append_row(path, {"run": run, "commit": results.commit()} | row)
    print_table(path)


if __name__ == "__main__":
    main()
