"""
Does memory help, where, and at what cost? Trains models of equal cost and prints how well they do.

    python -m experiments.compare facts         questions about facts learnt in training: all models of MODELS
    python -m experiments.compare ablation      the model "shifted", with one thing changed at a time
    python -m experiments.compare stdlib        validation loss on the source of Python's standard library
    python -m experiments.compare mqar          answers that stand in the context: memory should not help here
    python -m experiments.compare facts-large   200,000 people and larger models: needs a GPU
    python -m experiments.compare code          the source of all installed Python packages: needs a GPU
    python -m experiments.compare erase         empties the slots of facts: what is lost, and what stays
    python -m experiments.compare teach         teaches new facts in several ways: what is forgotten
    python -m experiments.compare table         tables of all finished runs, without training
    python -m experiments.compare summary       the table in README.md
    python -m experiments.compare facts --help  the options: which models, how many seeds and runs at a time

With the same seed, all models see the same tokens in the same order. All models are tuned in the same way.
First, each learning rate in --lrs is tried in one run with seed 1. If the highest is the best, then twice
this learning rate is tried too. If the lowest is the best, then half of it is tried. Runs with other seeds
use the learning rate with the best recall. The pool's learning rate is not tuned: it is train.py's default.

A finished run becomes one line of experiments/results/NAME.jsonl, and is not run again. A stopped run
continues from its last checkpoint. So you can spread the runs over many days. Two of these commands may run
at the same time if their --models differ. A line records the options of its run, but not the code. If you
change the code, choose another folder: --results=FOLDER.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev

from data.corpora import CORPORA
from data.corpus import DATA, read_questions
from data.write import Corpus
from evaluate import exposure_bin
from model import GPT
from runtime.cli import at_least, build, command, fail, first_word, parse
from runtime.log import duration
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
RUN_OPTIONS = dict(lr=0.0, seed=0, out_dir="", resume=True, keep=1)  # these differ between runs of one model

# Memory+ as published: the query comes from the state of its token, and memory layers are spread over depth
PUBLISHED = dict(mem_query="state", scale_embeddings=False, mem_layers=(0, 2))
# Better on facts: half of the query comes from the previous token, and the first blocks have the memory
SHIFTED = dict(mem_query="shifted", scale_embeddings=True, mem_layers=(0, 1))
UNSCALED = dict(scale_embeddings=False)  # on facts, this is better for models without learnt keys

# The options of each model, in addition to those of the experiment. All models except dense-2x cost the same
# multiply-adds per token (on facts, within 1%). A memory layer costs less than an MLP, so models with memory
# have wider MLPs in the other blocks. Models with larger pools have narrower queries
MODELS = {
    "dense": UNSCALED | dict(mem_layers=(), mlp_width=276),
    "memory+": PUBLISHED,
    "shifted": {},
    "tokens": dict(mem_query="tokens"),
    "shifted-4x": dict(mem_num_keys=256, mem_key_dim=16, mlp_width=320),
    "moe": UNSCALED | dict(mem_layers=(), mlp_width=268, moe_layers=(1, 2)),  # as many parameters as memory+
    "dense-2x": UNSCALED | dict(mem_layers=(), mlp_width=872),
    "shifted-16x": dict(mem_num_keys=512, mem_key_dim=16, mlp_width=64),
    "shifted-short": dict(max_steps=1500),  # half of the steps: each takes less than twice the time of dense
    "hash": UNSCALED | dict(mem_kind="hash", mlp_width=572),
    "shifted-plain": dict(mem_layers=(0,), mem_swilu=False, mlp_width=288),  # one memory layer, no gate
    "peer": dict(mem_kind="peer", mem_num_keys=90, mlp_width=392),  # an expert of PEER has two rows
}
ABLATIONS = {
    "shifted": {},  # the others change one thing, and mlp_width where this keeps the cost equal
    "mem_query=state": dict(mem_query="state"),
    "mem_query=tokens": dict(mem_query="tokens"),
    "layers 1 and 2": dict(mem_layers=(1, 2)),
    "value_lr=3e-3": dict(value_lr=3e-3),
    "embeddings not scaled": UNSCALED,
    "no qk-norm": dict(mem_qk_norm=False),
    "no gate": dict(mem_swilu=False, mlp_width=320),
    "key_dim 16": dict(mem_key_dim=16, mlp_width=448),
    "2 heads of knn 32": dict(mem_heads=2, mem_knn=32, mem_key_dim=64),
    "knn 4": dict(mem_knn=4, mlp_width=304),
    "value_lr=24e-2": dict(value_lr=24e-2),
    "layers 0 to 2": dict(mem_layers=(0, 1, 2)),
}
FACTS = dict(corpus=CORPORA["facts-4000"],
             options=SHIFTED | dict(dataset="facts-4000", max_steps=3000, eval_interval=250))
EXPERIMENTS = {
    "facts": FACTS | dict(models=MODELS),
    "ablation": FACTS | dict(options=FACTS["options"] | dict(max_steps=1500), models=ABLATIONS),
    "stdlib": dict(corpus=CORPORA["stdlib"],
                   options=SHIFTED | dict(dataset="stdlib", max_steps=2000, eval_interval=250),
                   models={name: MODELS[name] | dict(scale_embeddings=name != "memory+") for name in (
                       "dense", "memory+", "shifted", "tokens", "moe", "shifted-16x", "hash")}),
    "mqar": dict(corpus=CORPORA["mqar"],  # two layers with one head can learn this
                 options=SHIFTED | dict(dataset="mqar", n_layer=2, n_head=1, block_size=64, batch_size=32,
                                        max_steps=1000, eval_interval=100),
                 models={"dense": dict(mem_layers=()), "shifted": dict(mem_layers=(1,)),
                         "moe": dict(mem_layers=(), moe_layers=(1,), moe_experts=64)}),
}

# Experiments for a GPU, with 64k tokens per step. By default each model has one run (learning rate 2e-3).
# Memory layers are spread over the depth, as in the papers. The first four models differ in how slots are
# chosen. mlp_width makes the cost of all models except dense-2x equal
LARGE = dict(n_layer=6, n_embd=256, scale_embeddings=True, mem_layers=(1, 3, 5), mem_num_keys=512,
             mem_key_dim=64, accum_steps=2, log_interval=20, eval_batches=4)
LARGE_MODELS = {
    "dense": dict(mem_layers=(), mlp_width=1024),
    "memory+": UNSCALED | dict(mlp_width=1376),  # 2^18 slots. The state chooses them, as published
    "tokens": dict(mem_query="tokens", mlp_width=1376),
    "hash": dict(mem_kind="hash", mlp_width=1728),
}
SIZES = {
    "memory+16k": UNSCALED | dict(mem_num_keys=128, mlp_width=1568),  # 16k slots
    "memory+64k": UNSCALED | dict(mem_num_keys=256, mlp_width=1504),
    "memory+1M": UNSCALED | dict(mem_num_keys=1024, mlp_width=1120),
    "memory+4M": UNSCALED | dict(mem_num_keys=2048, mlp_width=608),
    "dense-2x": dict(mem_layers=(), mlp_width=2824),
    "moe": dict(mem_layers=(), moe_layers=(1, 3, 5), moe_experts=88, mlp_width=1008),  # as large as memory+
}
ONE_RUN = dict(lrs=(2e-3,), seeds=1)  # instead of the defaults of CompareConfig
EXPERIMENTS |= {
    # 72 M tokens, which a full run sees four times. As many questions are about facts that the text tells
    # rarely as about facts that it tells often. So the recall "all" is not the mean over all facts
    "facts-large": dict(corpus=CORPORA["facts-large"],
                        options=LARGE | dict(dataset="facts-large", block_size=128, batch_size=512,
                                             max_steps=4600, eval_interval=460),
                        models=LARGE_MODELS | SIZES, defaults=ONE_RUN),
    "code": dict(corpus=CORPORA["code"],
                 options=LARGE | dict(dataset="code", block_size=256, batch_size=256, max_steps=1600,
                                      eval_interval=100),
                 models=LARGE_MODELS, defaults=ONE_RUN),
}


@dataclass
class CompareConfig:
    models: tuple[str, ...] = ()  # which models, the most urgent first; empty: all models of the experiment
    lrs: tuple[float, ...] = (4e-3, 8e-3)  # learning rates to try; with only one there is no tuning
    seeds: int = 3  # runs of each model at its best learning rate
    jobs: int = 2  # runs at the same time, which share the CPU cores
    max_steps: int = 0  # steps of each run; 0: the steps of the experiment. Lengths have separate results
    results: str = "experiments/results"  # folder for the lines of finished runs, relative to the repository
    out: str = "out/compare"  # folder for the runs in progress, relative to the repository

    def __post_init__(self):
        at_least(1, self, "seeds", "jobs")
        at_least(0, self, "max_steps")
        if not self.lrs:
            raise ValueError("lrs must have at least one learning rate")
        self.lrs = tuple(dict.fromkeys(self.lrs))
        self.models = tuple(dict.fromkeys(name for names in self.models for name in names.split(",")))


def set_max_steps(experiment: str, steps: int) -> None:
    """Changes the length of an experiment's runs. Results of another length are then ignored."""
    options = EXPERIMENTS[experiment]["options"] | dict(max_steps=steps, eval_interval=max(50, steps // 10))
    EXPERIMENTS[experiment] = EXPERIMENTS[experiment] | dict(options=options)


# --- runs ---------------------------------------------------------------------------------------------------

def train_options(experiment: str, model: str) -> dict:
    """The options of train.py that are the same in all runs of a model."""
    options = EXPERIMENTS[experiment]["options"]
    return options | EXPERIMENTS[experiment]["models"][model]


def all_options(experiment: str, model: str) -> dict:
    """
    The options of the corpus and of train.py. A run is identified by these options, its learning rate and its
    seed.
    """
    return merge_options(EXPERIMENTS[experiment]["corpus"][1],
                         TrainConfig(**train_options(experiment, model) | RUN_OPTIONS))


def merge_options(corpus: Corpus, run: TrainConfig) -> dict:
    """Both sets of options in one dict, as a line of results has them."""
    run_options = asdict(run)
    corpus_options = {f"corpus_{name}" if name in run_options else name: value
                      for name, value in asdict(corpus).items()}
    return json.loads(json.dumps(corpus_options | run_options))


def prepare_corpus(experiment: str, rows: list[dict]) -> None:
    """Makes the corpus if it does not exist. Fails if the runs in `rows` had another corpus."""
    make, config = EXPERIMENTS[experiment]["corpus"]
    folder = DATA / EXPERIMENTS[experiment]["options"]["dataset"]
    if not (folder / "meta.json").exists():
        make(config)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    made_with = asdict(type(config)()) | meta["options"]  # an older corpus lacks newer options
    if made_with != json.loads(json.dumps(asdict(config))):
        fail(f"{folder} was made with other options: move it away, then this command makes it again")
    # the same options can give another corpus: stdlib differs between versions of Python
    if any(row.get("train_tokens") != meta["train_tokens"] for row in rows):
        fail(f"the finished runs saw another corpus than {folder}: choose another folder with --results")


def rows_path(experiment: str, results: str) -> Path:
    return ROOT / results / f"{experiment}.jsonl"


def read_rows(path: Path) -> list[dict]:
    """
    The lines of finished runs, in the order of the models. If the options of a model have changed, its old
    lines are left out, so its runs are done again.
    """
    experiment, rows = path.stem, {}
    options = {model: all_options(experiment, model) for model in EXPERIMENTS[experiment]["models"]}
    # an older line lacks newer options: its run had their defaults
    default = merge_options(type(EXPERIMENTS[experiment]["corpus"][1])(), TrainConfig())
    for line in open(path, encoding="utf-8") if path.exists() else ():
        with contextlib.suppress(ValueError):  # ignores an incomplete line
            row = json.loads(line)
            if default | row["options"] == options.get(row["model"]):
                rows[row["model"], row["lr"], row["seed"]] = row
    order = list(options)
    return sorted(rows.values(), key=lambda row: order.index(row["model"]))


def score(row: dict) -> tuple:
    """Greater is better. Recall decides. If it is equal or there are no questions, the loss decides."""
    if not row["curve"]:  # diverged: worse than all others; the lower learning rate is better
        return -math.inf, -row["lr"]
    final = row["curve"][-1]
    return final.get("recall", {}).get("all", 0), -final["val_loss"]


def best_lr(rows: list[dict], model: str) -> float:
    return max((row for row in rows if (row["model"], row["seed"]) == (model, 1)), key=score)["lr"]


def next_runs(config: CompareConfig, models, rows: list[dict]) -> list[tuple]:
    """(model, lr, seed) of the next runs. First all learning rates of a model, then the other seeds."""
    done = {(row["model"], row["lr"], row["seed"]) for row in rows}
    runs = []
    for model in models:
        model_runs = [(model, lr, 1) for lr in config.lrs]
        if done.issuperset(model_runs):
            tried_lrs = {lr for name, lr, _ in done if name == model}
            best = best_lr(rows, model) if len(config.lrs) > 1 else config.lrs[0]
            model_runs = [(model, best, seed) for seed in range(2, config.seeds + 1)]
            if len(config.lrs) > 1 and best in (min(tried_lrs), max(tried_lrs)):  # is the next one better?
                model_runs = [(model, 2 * best if best == max(tried_lrs) else best / 2, 1)]
        runs += [run for run in model_runs if run not in done]
    return runs


def run_folder(experiment: str, run: tuple, config: CompareConfig) -> Path:
    """The folder of a run. Its name has a checksum of the options, so other options get another folder."""
    model, lr, seed = run
    checksum = zlib.crc32(json.dumps(all_options(experiment, model)).encode())
    return ROOT / config.out / experiment / f"{model}_{lr:g}_{seed}_{checksum:x}"


def command_line(options: dict) -> list[str]:
    """The arguments for train.py. Options that are not in `options` keep the defaults of TrainConfig."""
    words = [f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
             for name, value in options.items()]
    return ["--preset=paper", *words]  # this preset is the defaults


def start(experiment: str, run: tuple, out_dir: Path, jobs: int) -> subprocess.Popen:
    model, lr, seed = run
    options = train_options(experiment, model) | RUN_OPTIONS | dict(lr=lr, seed=seed, out_dir=out_dir)
    words = command_line(options)
    out_dir.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, cores // jobs)
    with open(out_dir / "printed.txt", "a") as printed:
        return subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=printed,
                                stderr=printed, env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def diverged(out_dir: Path) -> bool:
    return "training has diverged" in (out_dir / "printed.txt").read_text()


def make_row(experiment: str, run: tuple, out_dir: Path) -> dict:
    """The line of a finished run. If the run diverged, its curve is empty."""
    model, lr, seed = run
    options = train_options(experiment, model)
    meta = json.loads((DATA / options["dataset"] / "meta.json").read_text())
    row = {"model": model, "lr": lr, "seed": seed, "options": all_options(experiment, model),
           "train_tokens": meta["train_tokens"], "curve": []}
    if diverged(out_dir):
        return row
    config = TrainConfig(**options, vocab_size=meta["vocab_size"])
    tokens_per_step = config.batch_size * config.block_size
    log = [json.loads(line) for line in open(out_dir / "log.jsonl", encoding="utf-8")]
    curve = [line | {"tokens": line["step"] * tokens_per_step} for line in log if "val_loss" in line]
    speeds = [line["tokens_per_second"] for line in log if "loss" in line]  # without evaluation
    counts = Counter("held_out" if question.get("held_out") else exposure_bin(question)
                     for question in read_questions(DATA / config.dataset / "qa.jsonl"))
    return row | {"macs": config.macs_per_token(), "parameters": GPT(config).count_parameters(),
                  "asked": counts, "tokens_per_second": median(speeds), "curve": curve}


def append_row(path: Path, row: dict) -> None:
    is_cut = path.exists() and not path.read_bytes().endswith(b"\n")  # the last line is incomplete
    with open(path, "a", encoding="utf-8") as f:
        f.write("\n" * is_cut + json.dumps(row) + "\n")


def run_all(experiment: str, config: CompareConfig) -> None:
    models = config.models or tuple(EXPERIMENTS[experiment]["models"])
    if unknown := set(models) - EXPERIMENTS[experiment]["models"].keys():
        fail(f"--models={','.join(unknown)} must be one of {', '.join(EXPERIMENTS[experiment]['models'])}")
    path = rows_path(experiment, config.results)
    prepare_corpus(experiment, read_rows(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: stops the runs too
    running = {}  # run: (process, folder, start time)
    durations = []  # seconds of the runs that this command has finished
    try:
        while True:
            rows = read_rows(path)
            waiting = [run for run in next_runs(config, models, rows) if run not in running]
            for run in waiting[:config.jobs - len(running)]:
                out_dir = run_folder(experiment, run, config)
                running[run] = start(experiment, run, out_dir, config.jobs), out_dir, time.time()
            if not running:
                return
            print_progress(config, models, rows, running, durations)
            while all(process.poll() is None for process, *_ in running.values()):
                time.sleep(0.2)
            for run, (process, out_dir, start_time) in list(running.items()):
                if process.poll() is not None:
                    last_step = all_options(experiment, run[0])["max_steps"]
                    finished = process.returncode == 0 and (out_dir / f"step_{last_step:06d}").exists()
                    if not finished and not diverged(out_dir):
                        fail(f"the run of {run[0]} stopped: see {out_dir / 'printed.txt'}")
                    append_row(path, make_row(experiment, run, out_dir))
                    shutil.rmtree(out_dir)
                    del running[run]
                    durations.append(time.time() - start_time)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here")
        raise SystemExit(130) from None
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()  # it saves a checkpoint first


def print_progress(config: CompareConfig, models, rows: list[dict], running: dict, durations: list) -> None:
    """Estimates (learning rates + seeds - 1) runs per model. Some models then need more learning rates."""
    done = sum(row["model"] in models for row in rows)
    total = max(len(models) * (len(config.lrs) + config.seeds - 1), done + len(running))
    time_left = ""
    if durations:
        time_left = f", about {duration(mean(durations) * (total - done) / config.jobs)} left"
    names = ", ".join(f"{model} (lr {lr:g}, seed {seed})" for model, lr, seed in running)
    print(f"{time.strftime('%H:%M')}  {done} of {total} runs done{time_left}; running: {names}", flush=True)


# --- results ------------------------------------------------------------------------------------------------

def best_runs(rows: list[dict]) -> dict[str, list[dict]]:
    """For each model the runs at its best learning rate that can be compared, without those that diverged."""
    models = dict.fromkeys(row["model"] for row in rows if row["seed"] == 1)
    best = {model: best_lr(rows, model) for model in models}
    runs = {model: [row for row in rows if row["model"] == model and row["lr"] == lr and row["curve"]]
            for model, lr in best.items()}
    runs = {model: rows for model, rows in runs.items() if rows}
    if runs and not any("recall" in row["curve"][-1] for rows in runs.values() for row in rows):
        # the seed also draws the validation text, so only the seeds that all models have can be compared
        seeds = set.intersection(*({row["seed"] for row in rows} for rows in runs.values()))
        runs = {model: [row for row in rows if row["seed"] in seeds] for model, rows in runs.items()}
    return runs


def recall_between(row: dict, low: int, high: int) -> float:
    """The final recall of facts that training told low ... high - 1 times. Both must be powers of two."""
    shares = row["curve"][-1]["recall"]["by_exposure"]
    bins = [key for key in shares if low <= int(key) < high]
    if not bins:
        return math.nan
    return sum(shares[key] * row["asked"][key] for key in bins) / sum(row["asked"][key] for key in bins)


def tokens_to(recall: float, curve: list[dict]) -> float:
    """The number of tokens at which the curve (lines between its points) reaches this recall, or nan."""
    points = [(point["tokens"], point["recall"]["all"]) for point in curve]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if y1 >= recall:
            return x0 + (x1 - x0) * (recall - y0) / (y1 - y0) if y1 > y0 else x0
    return math.nan


def mean_and_deviation(values, form: str = ".3f") -> str:
    """'mean ± standard deviation', or only the value if there is one. '-' if a value is nan (not reached)."""
    if any(map(math.isnan, values)):
        return "-"
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def print_table(experiment: str, config: CompareConfig) -> None:
    """Mean ± standard deviation over the seeds, at the best learning rate of each model."""
    rows = read_rows(rows_path(experiment, config.results))
    runs, lrs_tried = best_runs(rows), Counter(row["model"] for row in rows if row["seed"] == 1)
    if not runs:
        return print(f"{experiment}: no finished runs. Start: python -m experiments.compare {experiment}")
    has_recall = "recall" in next(iter(runs.values()))[0]["curve"][-1]
    is_facts = experiment == "facts" and "dense" in runs
    if is_facts:
        dense_recall = mean(row["curve"][-1]["recall"]["all"] for row in runs["dense"])
    lines = []
    for model, model_runs in runs.items():
        final, first = [row["curve"][-1] for row in model_runs], model_runs[0]
        failed = sum((row["model"], row["lr"]) == (model, first["lr"]) for row in rows) - len(model_runs)
        line = {
            "model": model,
            "multiply-adds per token": f"{first['macs']:,}",
            "parameters": f"{first['parameters']['dense'] + first['parameters']['memory']:,}",
            "seeds": f"{len(model_runs)}" + (f", {failed} diverged" if failed else ""),
            "learning rate (tried)": f"{first['lr']:g} ({lrs_tried[model]})",
            "validation loss": mean_and_deviation([point["val_loss"] for point in final]),
        }
        if has_recall:
            line["recall"] = mean_and_deviation([point["recall"]["all"] for point in final])
        if is_facts:
            tokens = [tokens_to(dense_recall, row["curve"]) / 1e6 for row in model_runs]
            line |= {
                "recall, told 8 to 31 times": mean_and_deviation(
                    [recall_between(row, 8, 32) for row in model_runs]),
                "recall, held out": mean_and_deviation([point["recall"]["held_out"] for point in final]),
                "M tokens to dense's recall": mean_and_deviation(tokens, ".2f"),
            }
        lines.append(line)
    print(f"\n{experiment}, each model at the best learning rate of those tried:\n")
    print_markdown(lines)


SUMMARY = {  # model: its name in README.md
    "dense": "dense GPT",
    "moe": "mixture of 32 experts",
    "memory+": "**Memory+ as published**",
    "shifted": "... half of the query from the previous token (`shifted`)",
    "tokens": "... the query from the embeddings of two tokens (`tokens`)",
    "hash": "a table read at a hash of two tokens, no search",
}


def print_summary(config: CompareConfig) -> None:
    """The table in README.md: facts and stdlib, each model at its best learning rate."""
    facts, stdlib = (best_runs(read_rows(rows_path(name, config.results))) for name in ("facts", "stdlib"))
    lines = []
    for model, name in SUMMARY.items():
        recall, loss = "-", "-"
        if model in facts:
            recall = mean_and_deviation([row["curve"][-1]["recall"]["all"] for row in facts[model]], ".2f")
        if model in stdlib:
            loss = mean_and_deviation([row["curve"][-1]["val_loss"] for row in stdlib[model]], ".2f")
        counts = next((runs[model][0]["parameters"] for runs in (facts, stdlib) if model in runs), None)
        size = f"{(counts['dense'] + counts['memory']) / 1e6:.1f} M" if counts else "-"
        lines.append({"model": name, "parameters": size, "recall of facts": recall,
                      "loss on real text": loss})
    print_markdown(lines)


def print_markdown(lines: list[dict]) -> None:
    for cells in (lines[0], ["---"] * len(lines[0]), *(line.values() for line in lines)):
        print("| " + " | ".join(cells) + " |")


@command
def main(argv: list[str] | None = None) -> None:
    word, rest = first_word(argv, (*EXPERIMENTS, "erase", "teach", "table", "summary"), __doc__,
                            "an experiment")
    if word in ("erase", "teach"):
        from experiments import editing  # here, because it imports this file
        return editing.main(word, rest)
    _, options = parse(CompareConfig, rest, description=__doc__)
    if word in ("table", "summary") and options.keys() - {"results"}:
        fail(f"{word} has only the option --results")
    config = build(CompareConfig, EXPERIMENTS.get(word, {}).get("defaults", {}) | options)
    if word == "summary":
        print_summary(config)
    elif word == "table":
        for experiment in EXPERIMENTS:
            print_table(experiment, config)
    else:
        if config.max_steps:
            set_max_steps(word, config.max_steps)
        run_all(word, config)
        print_table(word, config)


if __name__ == "__main__":
    main()
