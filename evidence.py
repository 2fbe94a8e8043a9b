"""
Does memory help, where, and at what cost? Trains models that differ in one thing, and says what came of it.

    python evidence.py facts         facts to be recalled without a text to look at: all the models of MODELS
    python evidence.py stdlib        validation loss on real text: the source of Python's standard library
    python evidence.py mqar          words to be recalled from the context, where memory should not help
    python evidence.py table         what the runs that are finished say
    python evidence.py facts --help  the options: which models, how many seeds, how many runs at a time

All models see the same tokens in the same order, and are tuned alike: a run at each of the same learning
rates with seed 1 (the pool's is VALUE_LR_RATIO times as high), of which the best is kept and repeated with
other seeds. A finished run is one line of results/evidence_NAME.jsonl, and is not run again; one that was
stopped goes on from its last checkpoint. So hours of runs add up, and figures are drawn without training.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from config import build, fail, parse
from data.prepare import ATTRIBUTES, CORPORA, DATA
from model import GPT
from train import TrainConfig, duration, read_questions

ROOT = Path(__file__).resolve().parent
VALUE_LR_RATIO = 20

# what each model is, as options of train.py. All but the last cost the same multiply-adds a token, to 5%
PLUS = dict(mem_layers=(1, 2))
MODELS = {
    "dense": dict(mem_layers=()),
    "memory+": PLUS,
    "moe": dict(mem_layers=(), moe_layers=(1, 2), moe_experts=32),  # as many parameters as memory+
    "memory+16x": PLUS | dict(mem_num_keys=512),
    "hash": PLUS | dict(mem_kind="hash"),
    "peer": PLUS | dict(mem_kind="peer"),
    "memory+4x": PLUS | dict(mem_num_keys=256),
    "memory": PLUS | dict(mem_layers=(1,), mem_swilu=False),
    "dense-2x": dict(mem_layers=(), mlp_width=816),
}
MAIN = ("dense", "memory+", "moe", "hash")
EXPERIMENTS = {
    "facts": dict(models=tuple(MODELS), options=dict(dataset="facts")),
    "stdlib": dict(models=MAIN, options=dict(dataset="stdlib")),
    "mqar": dict(models=MAIN, options=dict(dataset="mqar")),
}


@dataclass
class EvidenceConfig:
    models: tuple[str, ...] = ()  # which of MODELS, most urgent first; none: all that the experiment has
    lrs: tuple[float, ...] = (1e-3, 3e-3, 6e-3)  # learning rates that each model is tuned over
    seeds: int = 3  # runs of each model at its best learning rate
    jobs: int = 2  # runs at a time, each on its share of the cores
    results: str = "results"  # folder for the line that a finished run leaves
    out: str = "out/evidence"  # folder for runs that are going on

    def __post_init__(self):
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.lrs:
            raise ValueError("lrs needs one learning rate at least")
        if unknown := set(self.models) - MODELS.keys():
            raise ValueError(f"models={','.join(unknown)} must be of {', '.join(MODELS)}")


# --- runs ---------------------------------------------------------------------------------------------------

def train_options(experiment: str, model: str) -> dict:
    """What train.py is told, but for the learning rates, the seed and the folder."""
    return EXPERIMENTS[experiment]["options"] | MODELS[model]


def read_rows(experiment: str, results: str) -> list[dict]:
    """The lines of finished runs, of the models as they are now: a model that was changed is run again."""
    path = ROOT / results / f"evidence_{experiment}.jsonl"
    rows = [json.loads(line) for line in open(path, encoding="utf-8")] if path.exists() else []
    known = {model: json.loads(json.dumps(train_options(experiment, model))) for model in MODELS}
    return [row for row in rows if row["options"] == known.get(row["model"])]


def goodness(row: dict) -> float:
    """By which runs are compared: recall, or the validation loss where nothing is asked."""
    final = row["curve"][-1]
    return final["recall"]["all"] if "recall" in final else -final["val_loss"]


def best_lr(rows: list[dict], model: str) -> float:
    return max((row for row in rows if row["model"] == model and row["seed"] == 1), key=goodness)["lr"]


def next_runs(config: EvidenceConfig, models, rows: list[dict]) -> list[tuple]:
    """(model, lr, seed) of what is to be run: a model's seeds come once its learning rates are all done."""
    done = {(row["model"], row["lr"], row["seed"]) for row in rows}
    runs = []
    for model in models:
        wanted = [(model, lr, 1) for lr in config.lrs]
        if done.issuperset(wanted):
            wanted = [(model, best_lr(rows, model), seed) for seed in range(2, config.seeds + 1)]
        runs += [run for run in wanted if run not in done]
    return runs


def start(experiment: str, run: tuple, out_dir: Path, jobs: int) -> subprocess.Popen:
    model, lr, seed = run
    options = train_options(experiment, model) | dict(lr=lr, value_lr=VALUE_LR_RATIO * lr, seed=seed)
    options |= dict(out_dir=out_dir, resume=True, keep=1)
    words = [f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
             for name, value in options.items()]
    out_dir.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    with open(out_dir / "printed.txt", "a") as printed:
        return subprocess.Popen([sys.executable, ROOT / "train.py", *words], stdout=printed, stderr=printed,
                                env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def make_row(experiment: str, run: tuple, out_dir: Path) -> dict:
    """The line of a finished run."""
    model, lr, seed = run
    options = train_options(experiment, model)
    meta = json.loads((DATA / options["dataset"] / "meta.json").read_text())
    config = TrainConfig(**options, vocab_size=meta["vocab_size"])
    tokens_per_step = config.batch_size * config.block_size
    curve, speeds, seconds, last_step = [], [], 0.0, 0
    for line in map(json.loads, open(out_dir / "log.jsonl", encoding="utf-8")):
        if "loss" in line:  # its speed is of all steps since the last such line, and of training alone
            seconds += (line["step"] - last_step) * tokens_per_step / line["tokens_per_second"]
            last_step = line["step"]
            speeds.append(line["tokens_per_second"])
        if "val_loss" in line:
            curve.append(line | {"tokens": line["step"] * tokens_per_step, "seconds": seconds})
    asked = {}
    for question in read_questions(DATA / config.dataset / "qa.jsonl"):
        low = "held_out" if question.get("held_out") else 1 << question.get("exposures", 1).bit_length() - 1
        asked[str(low)] = asked.get(str(low), 0) + 1
    return {"model": model, "lr": lr, "value_lr": VALUE_LR_RATIO * lr, "seed": seed, "options": options,
            "macs": config.macs_per_token(), "parameters": GPT(config).count_parameters(), "asked": asked,
            "tokens_per_second": statistics.median(speeds), "curve": curve}


def run_all(experiment: str, config: EvidenceConfig) -> None:
    models = config.models or EXPERIMENTS[experiment]["models"]
    dataset = EXPERIMENTS[experiment]["options"]["dataset"]
    if not (DATA / dataset / "meta.json").exists():
        make, config_class = CORPORA[dataset]
        make(config_class())
    going = {}  # run: (process, folder, when it began)
    took = []  # seconds of each run that ended here
    try:
        while True:
            rows = read_rows(experiment, config.results)
            waiting = [run for run in next_runs(config, models, rows) if run not in going]
            for run in waiting[:config.jobs - len(going)]:
                out_dir = ROOT / config.out / experiment / "{}_{:g}_{}".format(*run)
                going[run] = start(experiment, run, out_dir, config.jobs), out_dir, time.time()
            if not going:
                return
            report(config, models, rows, going, took)
            while all(process.poll() is None for process, *_ in going.values()):
                time.sleep(0.2)
            for run, (process, out_dir, began) in list(going.items()):
                if process.poll() is not None:
                    if process.returncode:
                        fail(f"the run of {run[0]} stopped: see {out_dir / 'printed.txt'}")
                    append_row(experiment, config.results, make_row(experiment, run, out_dir))
                    shutil.rmtree(out_dir)
                    del going[run]
                    took.append(time.time() - began)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        raise SystemExit(130) from None
    finally:
        for process, *_ in going.values():
            process.terminate()


def append_row(experiment: str, results: str, row: dict) -> None:
    path = ROOT / results / f"evidence_{experiment}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def report(config: EvidenceConfig, models, rows: list[dict], going: dict, took: list[float]) -> None:
    """A line on how far the plan is: (learning rates + seeds - 1) runs for each model."""
    total = len(models) * (len(config.lrs) + config.seeds - 1)
    done = sum(row["model"] in models for row in rows)
    left = ""
    if took:
        left = f", about {duration(statistics.mean(took) * (total - done) / config.jobs)} left"
    now = ", ".join("{} at {:g} with seed {}".format(*run) for run in going)
    print(f"{time.strftime('%H:%M')}  {done} of {total} runs done{left}; going on: {now}", flush=True)


# --- what came of it ----------------------------------------------------------------------------------------

def kept(rows: list[dict]) -> dict[str, list[dict]]:
    """The runs of each model at its best learning rate, models in the order of MODELS."""
    best = {model: best_lr(rows, model) for model in MODELS if any(row["model"] == model for row in rows)}
    return {model: [row for row in rows if (row["model"], row["lr"]) == (model, lr)] for model, lr in best.items()}


def told(row: dict, low: int, high: int) -> float:
    """Recall of what was told low ... high - 1 times, both powers of two."""
    shares = row["curve"][-1]["recall"]["by_exposure"]
    bins = [key for key in shares if low <= int(key) < high]
    return sum(shares[key] * row["asked"][key] for key in bins) / sum(row["asked"][key] for key in bins)


def bits_a_parameter(row: dict) -> float:
    """
    Bits of the answers that were right, over all parameters. An answer that is one of n values holds log2(n)
    bits; attributes are taken to be recalled alike.
    """
    recall, held_out = row["curve"][-1]["recall"], row["asked"].get("held_out", 0)
    right = recall["all"] * (sum(row["asked"].values()) - held_out) + recall.get("held_out", 0) * held_out
    bits = statistics.mean(math.log2(len(values)) for values, *_ in ATTRIBUTES.values())
    return right * bits / (row["parameters"]["dense"] + row["parameters"]["memory"])


def cross(curve: list[dict], x: str, recall: float) -> float | None:
    """At how many tokens or seconds (x) the curve first has this recall, on a straight line between points."""
    points = [(point[x], point["recall"]["all"]) for point in curve]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if y1 >= recall:
            return x0 + (x1 - x0) * (recall - y0) / (y1 - y0)
    return None
