"""
Does memory help, where, and at what cost? Trains models of equal cost, and says what came of it.

    python evidence.py facts         facts to be recalled without a text to look at: all the models of MODELS
    python evidence.py ablation      memory+ with one thing changed
    python evidence.py stdlib        validation loss on real text: the source of Python's standard library
    python evidence.py mqar          words to be recalled from the context, where memory should not help
    python evidence.py table         what the runs that are finished say
    python evidence.py facts --help  the options: which models, how many seeds, how many runs at a time

With one seed all models see the same tokens in the same order. They are tuned alike: a run at each of the
same learning rates with seed 1 (the pool's stays train.py's default), and at twice the highest, or half the
lowest, for as long as that is the best one; then the best, by recall, is repeated with other seeds.

A finished run is one line of results/evidence_NAME.jsonl, and is not run again; one that was stopped goes on
from its last checkpoint. So hours of runs add up, and figures are drawn without training. Two of these at
once need different --models. A line knows its options, but not the code: with code of your own, say
--results=FOLDER.
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

from config import at_least, build, fail, first_word, parse
from data.prepare import ATTRIBUTES, DATA, Corpus, FactsConfig, MqarConfig, SplitConfig, facts, mqar, stdlib
from evaluate import exposure_bin, read_questions
from model import GPT
from train import TrainConfig, duration

ROOT = Path(__file__).resolve().parent
RUN_OPTIONS = dict(lr=0.0, seed=0, out_dir="", resume=True, keep=1)  # a run's own

UNSCALED = dict(scale_embeddings=False)  # for models without learnt keys: they recall more of facts so

# What each model is, as options of train.py, whose defaults are memory+: memory in two of three blocks. All
# but dense-2x cost as many multiply-adds a token, on facts to 1%: what a memory layer costs less than an MLP,
# the MLPs that stay get, and larger pools have narrower queries
MODELS = {
    "dense": UNSCALED | dict(mem_layers=(), mlp_width=276),
    "memory+": {},
    "memory+4x": dict(mem_num_keys=256, mem_key_dim=16, mlp_width=320),
    "moe": UNSCALED | dict(mem_layers=(), mlp_width=268, moe_layers=(1, 2)),  # as many parameters as memory+
    "dense-2x": UNSCALED | dict(mem_layers=(), mlp_width=872),
    "memory+16x": dict(mem_num_keys=512, mem_key_dim=16, mlp_width=64),
    "memory+-short": dict(max_steps=1500),  # in dense's time: a step takes less than twice as long
    "hash": UNSCALED | dict(mem_kind="hash", mlp_width=572),
    "memory": dict(mem_layers=(0,), mem_swilu=False, mlp_width=288),
    "peer": dict(mem_kind="peer", mem_num_keys=90, mlp_width=392),  # an expert is two rows
}
ABLATIONS = {
    "memory+": {},  # of which all below change one thing, and widths to cost as much
    "no token shift": dict(mem_token_shift=False),
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
FACTS = dict(corpus=(facts, FactsConfig(name="facts-4000", people=4000)),
             options=dict(dataset="facts-4000", eval_interval=250))
EXPERIMENTS = {
    "facts": FACTS | dict(models=MODELS),
    "ablation": FACTS | dict(options=FACTS["options"] | dict(max_steps=1500), models=ABLATIONS),
    "stdlib": dict(corpus=(stdlib, SplitConfig()),
                   options=dict(dataset="stdlib", max_steps=2000, eval_interval=250),
                   models={name: MODELS[name] | dict(scale_embeddings=True)  # which here is better
                           for name in ("dense", "memory+", "moe", "memory+16x", "hash")}),
    "mqar": dict(corpus=(mqar, MqarConfig()),  # for which two layers of one head do
                 options=dict(dataset="mqar", n_layer=2, n_head=1, block_size=64, batch_size=32,
                              max_steps=1000, eval_interval=100),
                 models={"dense": dict(mem_layers=()), "memory+": dict(mem_layers=(1,)),
                         "moe": dict(mem_layers=(), moe_layers=(1,), moe_experts=64)}),
}


@dataclass
class EvidenceConfig:
    models: tuple[str, ...] = ()  # most urgent first; none: all that the experiment has
    lrs: tuple[float, ...] = (4e-3, 8e-3)  # learning rates to tune each model over; one: as it is
    seeds: int = 3  # runs of each model at its best learning rate
    jobs: int = 2  # runs at a time, each on its share of the cores
    results: str = "results"  # folder, beside evidence.py, for the line that a finished run leaves
    out: str = "out/evidence"  # folder, beside evidence.py, for runs that are going on

    def __post_init__(self):
        at_least(1, self, "seeds", "jobs")
        if not self.lrs:
            raise ValueError("lrs needs one learning rate at least")
        self.lrs = tuple(dict.fromkeys(self.lrs))
        self.models = tuple(dict.fromkeys(name for names in self.models for name in names.split(",")))


# --- runs ---------------------------------------------------------------------------------------------------

def train_options(experiment: str, model: str) -> dict:
    """What train.py is told, but for RUN_OPTIONS."""
    e = EXPERIMENTS[experiment]
    return e["options"] | e["models"][model]


def all_options(experiment: str, model: str) -> dict:
    """What makes a run another one: all that it is told, but for RUN_OPTIONS, and that its corpus was."""
    return together(EXPERIMENTS[experiment]["corpus"][1],
                    TrainConfig(**train_options(experiment, model) | RUN_OPTIONS))


def together(corpus: Corpus, run: TrainConfig) -> dict:
    """The options of both, as a line has them."""
    options = asdict(run)
    of_corpus = {f"corpus_{name}" if name in options else name: value
                 for name, value in asdict(corpus).items()}
    return json.loads(json.dumps(of_corpus | options))


def prepare_corpus(experiment: str, rows: list[dict]) -> None:
    """Makes it where it is not. It has to be what the runs should see, and what those of `rows` saw."""
    make, config = EXPERIMENTS[experiment]["corpus"]
    folder = DATA / EXPERIMENTS[experiment]["options"]["dataset"]
    if not (folder / "meta.json").exists():
        make(config)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["options"] != asdict(config):
        fail(f"{folder} was made with other options: move it away, and it is made again")
    if any(row.get("train_tokens") != meta["train_tokens"] for row in rows):  # stdlib differs between Pythons
        fail(f"the runs that are there saw another corpus than {folder}: choose a folder with --results")


def rows_path(experiment: str, results: str) -> Path:
    return ROOT / results / f"evidence_{experiment}.jsonl"


def read_rows(path: Path) -> list[dict]:
    """
    The lines of finished runs of the models as they are now, in the models' order: one that was changed is
    run again.
    """
    experiment, rows = path.stem.removeprefix("evidence_"), {}
    known = {model: all_options(experiment, model) for model in EXPERIMENTS[experiment]["models"]}
    # of options newer than a line
    default = together(type(EXPERIMENTS[experiment]["corpus"][1])(), TrainConfig())
    for line in open(path, encoding="utf-8") if path.exists() else ():
        with contextlib.suppress(ValueError):  # a line that was cut short
            row = json.loads(line)
            if default | row["options"] == known.get(row["model"]):
                rows[row["model"], row["lr"], row["seed"]] = row
    order = list(known)
    return sorted(rows.values(), key=lambda row: order.index(row["model"]))


def goodness(row: dict) -> tuple:
    """By which runs are compared: recall, then the validation loss, which is all where nothing is asked."""
    if not row["curve"]:  # it diverged: a lower rate may not
        return -math.inf, -row["lr"]
    final = row["curve"][-1]
    return final.get("recall", {}).get("all", 0), -final["val_loss"]


def best_lr(rows: list[dict], model: str) -> float:
    return max((row for row in rows if (row["model"], row["seed"]) == (model, 1)), key=goodness)["lr"]


def next_runs(config: EvidenceConfig, models, rows: list[dict]) -> list[tuple]:
    """(model, lr, seed) of what is to be run: a model's seeds come once its learning rates are all done."""
    done = {(row["model"], row["lr"], row["seed"]) for row in rows}
    runs = []
    for model in models:
        wanted = [(model, lr, 1) for lr in config.lrs]
        if done.issuperset(wanted):
            tried = {lr for name, lr, _ in done if name == model}
            best = best_lr(rows, model) if len(config.lrs) > 1 else config.lrs[0]
            wanted = [(model, best, seed) for seed in range(2, config.seeds + 1)]
            if len(config.lrs) > 1 and best in (min(tried), max(tried)):  # a better one may lie beyond
                wanted = [(model, 2 * best if best == max(tried) else best / 2, 1)]
        runs += [run for run in wanted if run not in done]
    return runs


def start(experiment: str, run: tuple, out_dir: Path, jobs: int) -> subprocess.Popen:
    model, lr, seed = run
    options = train_options(experiment, model) | RUN_OPTIONS | dict(lr=lr, seed=seed, out_dir=out_dir)
    words = [f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
             for name, value in options.items()]
    out_dir.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, cores // jobs)
    with open(out_dir / "printed.txt", "a") as printed:
        return subprocess.Popen([sys.executable, ROOT / "train.py", *words], stdout=printed, stderr=printed,
                                env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def diverged(out_dir: Path) -> bool:
    return "training has diverged" in (out_dir / "printed.txt").read_text()


def make_row(experiment: str, run: tuple, out_dir: Path) -> dict:
    """The line of a finished run; of one that diverged, without a curve."""
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
    speeds = [line["tokens_per_second"] for line in log if "loss" in line]  # of training alone
    asked = Counter("held_out" if question.get("held_out") else exposure_bin(question)
                    for question in read_questions(DATA / config.dataset / "qa.jsonl"))
    return row | {"macs": config.macs_per_token(), "parameters": GPT(config).count_parameters(),
                  "asked": asked, "tokens_per_second": median(speeds), "curve": curve}


def run_all(experiment: str, config: EvidenceConfig) -> None:
    models = config.models or tuple(EXPERIMENTS[experiment]["models"])
    if unknown := set(models) - EXPERIMENTS[experiment]["models"].keys():
        fail(f"--models={','.join(unknown)} must be of {', '.join(EXPERIMENTS[experiment]['models'])}")
    path = rows_path(experiment, config.results)
    prepare_corpus(experiment, read_rows(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: no run stays behind
    going = {}  # run: (process, folder, when it began)
    took = []  # seconds of each run that ended here
    try:
        while True:
            rows = read_rows(path)
            waiting = [run for run in next_runs(config, models, rows) if run not in going]
            for run in waiting[:config.jobs - len(going)]:
                # a run of the same name with other options is another run
                which = zlib.crc32(json.dumps(all_options(experiment, run[0])).encode())
                out_dir = ROOT / config.out / experiment / "{}_{:g}_{}_{:x}".format(*run, which)
                going[run] = start(experiment, run, out_dir, config.jobs), out_dir, time.time()
            if not going:
                return
            report(config, models, rows, going, took)
            while all(process.poll() is None for process, *_ in going.values()):
                time.sleep(0.2)
            for run, (process, out_dir, began) in list(going.items()):
                if process.poll() is not None:
                    end = all_options(experiment, run[0])["max_steps"]
                    finished = process.returncode == 0 and (out_dir / f"step_{end:06d}").exists()
                    if not finished and not diverged(out_dir):
                        fail(f"the run of {run[0]} stopped: see {out_dir / 'printed.txt'}")
                    line = json.dumps(make_row(experiment, run, out_dir)) + "\n"
                    is_cut = path.exists() and not path.read_bytes().endswith(b"\n")
                    with open(path, "a", encoding="utf-8") as f:
                        f.write("\n" * is_cut + line)
                    shutil.rmtree(out_dir)
                    del going[run]
                    took.append(time.time() - began)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        raise SystemExit(130) from None
    finally:
        for process, *_ in going.values():
            process.terminate()
        for process, *_ in going.values():
            process.wait()  # it saves: what is started next may go on from there


def report(config: EvidenceConfig, models, rows: list[dict], going: dict, took: list[float]) -> None:
    """A line on how far the plan is: (learning rates + seeds - 1) runs for each model, or a few more."""
    done = sum(row["model"] in models for row in rows)
    total = max(len(models) * (len(config.lrs) + config.seeds - 1), done + len(going))
    left = ""
    if took:
        left = f", about {duration(mean(took) * (total - done) / config.jobs)} left"
    now = ", ".join("{} at {:g} with seed {}".format(*run) for run in going)
    print(f"{time.strftime('%H:%M')}  {done} of {total} runs done{left}; going on: {now}", flush=True)


# --- what came of it ----------------------------------------------------------------------------------------

def kept(rows: list[dict]) -> dict[str, list[dict]]:
    """The runs of each model at its best learning rate that did not diverge."""
    tuned = dict.fromkeys(row["model"] for row in rows if row["seed"] == 1)
    best = {model: best_lr(rows, model) for model in tuned}
    runs = {model: [row for row in rows if row["model"] == model and row["lr"] == lr and row["curve"]]
            for model, lr in best.items()}
    return {model: rows for model, rows in runs.items() if rows}


def told(row: dict, low: int, high: int, point: int = -1) -> float:
    """
    Recall of what was told low ... high - 1 times, both powers of two, at a point of the curve; all points
    but the last are of fewer questions (--eval_questions).
    """
    shares = row["curve"][point]["recall"]["by_exposure"]
    bins = [key for key in shares if low <= int(key) < high]
    if not bins:
        return math.nan
    return sum(shares[key] * row["asked"][key] for key in bins) / sum(row["asked"][key] for key in bins)


def bits_a_parameter(row: dict) -> float:
    """
    Bits of the answers that were right to the word, over all parameters. An answer that is one of n values
    holds log2(n) bits; attributes are taken to be recalled alike, and nothing is known of the others.
    """
    recall, held_out = row["curve"][-1]["recall"], row["asked"].get("held_out", 0)
    right = recall["all"] * (sum(row["asked"].values()) - held_out) + recall.get("held_out", 0) * held_out
    bits = mean(math.log2(len(values)) for values, *_ in ATTRIBUTES.values())
    return right * bits / (row["parameters"]["dense"] + row["parameters"]["memory"])


def speed(rows: list[dict]) -> float:
    """Tokens a second: a run's median over its log lines, of the run that was least disturbed."""
    return max(row["tokens_per_second"] for row in rows)


def tokens_to(recall: float, curve: list[dict]) -> float:
    """After how many tokens the curve first has this recall, or nan; between its points, straight lines."""
    points = [(point["tokens"], point["recall"]["all"]) for point in curve]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if y1 >= recall:
            return x0 + (x1 - x0) * (recall - y0) / (y1 - y0) if y1 > y0 else x0
    return math.nan


def spread(values, form: str = ".3f", scale: float = 1) -> str:
    """Mean and, of several, standard deviation; a dash where one is nan: it was never reached."""
    if any(map(math.isnan, values)):
        return "-"
    values = [value / scale for value in values]
    around = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{around}"


def table(experiment: str, config: EvidenceConfig) -> None:
    """As in the README: mean ± standard deviation over the seeds, at each model's best learning rate."""
    rows = read_rows(rows_path(experiment, config.results))
    runs, rates = kept(rows), Counter(row["model"] for row in rows if row["seed"] == 1)
    if not runs:
        return print(f"{experiment}: no run is finished; python evidence.py {experiment} makes them")
    recalls = "recall" in next(iter(runs.values()))[0]["curve"][-1]
    is_facts = experiment == "facts" and "dense" in runs
    if is_facts:
        target = mean(row["curve"][-1]["recall"]["all"] for row in runs["dense"])
    lines = []
    for model, same in runs.items():
        final, first = [row["curve"][-1] for row in same], same[0]
        diverged = sum((row["model"], row["lr"]) == (model, first["lr"]) for row in rows) - len(same)
        line = {
            "model": model,
            "MACs a token": f"{first['macs']:,}",
            "parameters": f"{first['parameters']['dense'] + first['parameters']['memory']:,}",
            "seeds": f"{len(same)}" + (f", {diverged} diverged" if diverged else ""),
            "rate (of)": f"{first['lr']:g} ({rates[model]})",
            "validation loss": spread([point["val_loss"] for point in final]),
        }
        if recalls:
            line["recall"] = spread([point["recall"]["all"] for point in final])
        if is_facts:
            tokens = [tokens_to(target, row["curve"]) for row in same]
            line |= {
                "told 8 to 31 times": spread([told(row, 8, 32) for row in same]),
                "held out": spread([point["recall"]["held_out"] for point in final]),
                "bits a parameter": spread([bits_a_parameter(row) for row in same], ".4f"),
                "M tokens to dense's recall": spread(tokens, ".2f", 1e6),
                "seconds to it": spread(tokens, ".0f", speed(same)),
            }
        line["k tokens/s"] = f"{speed(same) / 1e3:.1f}"
        line["seconds"] = f"{final[0]['tokens'] / speed(same):.0f}"
        lines.append(line)
    print(f"\n{experiment}; of the learning rates tried the best:\n")
    for cells in (lines[0], ["---"] * len(lines[0]), *(line.values() for line in lines)):
        print("| " + " | ".join(cells) + " |")
    if is_facts:
        bars(runs, target)


def bars(runs: dict[str, list[dict]], target: float) -> None:
    """What was hoped for, and whether it came: of memory+ with each of its numbers of slots."""
    recall = {model: mean(row["curve"][-1]["recall"]["all"] for row in rows) for model, rows in runs.items()}
    sizes = [model for model in ("memory+", "memory+4x", "memory+16x") if model in runs]
    tiny = 1e-9  # a division by it says enough of a dense model that recalls nothing

    def often(model: str, point: int) -> float:
        return mean(told(row, 8, 32, point) for row in runs[model])

    for plus in sizes:
        rows = runs[plus]
        tokens = [point["tokens"] for point in rows[0]["curve"]]
        to_target = mean(tokens_to(target, row["curve"]) for row in rows) / tokens[-1]
        checks = []
        # in the end dense may know more than a third, of which there is no three times: so also before it
        for point in (min(range(len(tokens)), key=lambda i: abs(tokens[i] - tokens[-1] * 2 / 3)), -1):
            ours, dense = often(plus, point), often("dense", point)
            times = ours / max(tiny, dense)
            checks.append((f"at least 3 times dense's recall of what was told 8 to 31 times, after "
                           f"{tokens[point] / 1e6:.2g} M tokens", times >= 3,
                           f"{times:.1f}, {ours:.3f} and {dense:.3f}"))
        checks += [("at least twice dense's recall, with dense between 0.2 and 0.4",
                    0.2 <= target <= 0.4 and recall[plus] >= 2 * target,
                    f"{recall[plus] / max(tiny, target):.1f} times {target:.3f}"),
                   ("at most 0.6 of the tokens to dense's recall", to_target <= 0.6, f"{to_target:.3f}")]
        if (short := f"{plus}-short") in runs:
            seconds, allowed = (runs[model][0]["curve"][-1]["tokens"] / speed(runs[model])
                                for model in (short, "dense"))
            checks.append(("at least 1.4 times dense's recall in dense's time",
                           recall[short] >= 1.4 * target and seconds <= allowed,
                           f"{recall[short] / max(tiny, target):.2f}, {seconds:.0f} and {allowed:.0f} s"))
        for other in ("moe", "dense-2x"):
            if other in runs:
                checks.append((f"above {other}", recall[plus] > recall[other],
                               f"{recall[plus]:.3f}, {recall[other]:.3f}"))
        print(f"\n{plus}, what was hoped for:")
        for what, is_met, figures in checks:
            print(f"  {'yes' if is_met else 'no ':3}  {what}: {figures}")
    if len(sizes) > 1:
        rises = [recall[model] for model in sizes]
        print(f"\nrecall rises with the number of slots: {'yes' if rises == sorted(rises) else 'no'}, "
              + ", ".join(f"{value:.3f}" for value in rises))


def main(argv: list[str] | None = None) -> None:
    word, options = first_word(argv, (*EXPERIMENTS, "table"), __doc__, "an experiment")
    _, given = parse(EvidenceConfig, options, description=__doc__)
    if word == "table" and given.keys() - {"results"}:
        fail("of the options, table has --results only")
    config = build(EvidenceConfig, given)
    for experiment in EXPERIMENTS if word == "table" else (word,):
        if word != "table":
            run_all(experiment, config)
        table(experiment, config)


if __name__ == "__main__":
    main()
