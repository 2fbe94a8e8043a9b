"""
Figures, from the lines that runs leave.

    python plot.py out/facts               out/facts/log.jsonl -> out/facts/loss.png
    python plot.py results/step.jsonl      the rows of bench.py step -> results/step.png
    python plot.py results/evidence_facts.jsonl   the runs of evidence.py -> evidence_facts.png, _more.png
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

from config import fail

matplotlib.use("Agg")  # files, no windows
import matplotlib.pyplot as plt  # noqa: E402

# the colours of Okabe and Ito, which the colour-blind can tell apart
CYCLE = plt.cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"])
plt.rcParams.update({"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False,
                     "grid.alpha": 0.3, "legend.frameon": False, "axes.prop_cycle": CYCLE})


def plot_run(out_dir: Path) -> None:
    """Loss, recall and slot use over the steps of one run: out_dir/log.jsonl -> out_dir/loss.png."""
    lines = [json.loads(line) for line in open(out_dir / "log.jsonl", encoding="utf-8")]
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "val_loss" in line]
    if not evaluated:
        fail(f"{out_dir / 'log.jsonl'} has no evaluation yet")
    has_recall, has_memory = "recall" in evaluated[-1], "slots_used" in evaluated[-1]
    panels = 1 + has_recall + has_memory
    figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 3.5), layout="constrained", squeeze=False)
    axes = iter(axes[0])

    axis = next(axes)
    steps = [line["step"] for line in evaluated]
    axis.plot([line["step"] for line in trained], [line["loss"] for line in trained], label="training")
    axis.plot(steps, [line["val_loss"] for line in evaluated], "o-", label="validation")
    axis.set(xlabel="step", ylabel="loss (nats a token)")
    axis.legend()
    if has_recall:
        axis = next(axes)
        for name, label, style in (("all", "people asked about in training", "o-"),
                                   ("held_out", "people only stated in training", "s--")):
            if name in evaluated[-1]["recall"]:
                axis.plot(steps, [line.get("recall", {}).get(name) for line in evaluated], style, label=label)
        axis.set(xlabel="step", ylabel="recall (exact match)", ylim=(0, 1.02))
        if "held_out" in evaluated[-1]["recall"]:
            axis.legend()
    if has_memory:
        axis = next(axes)
        axis.plot(steps[1:], [line["slots_used"] for line in evaluated[1:]], "o-")
        axis.set(xlabel="step", ylabel="share of slots read since last evaluation", ylim=(0, 1.02))
    figure.savefig(out_dir / "loss.png", dpi=120)
    plt.close(figure)


def plot_step(path: Path) -> None:
    """Time of a step over the size of the pool: the rows of `bench.py step` -> a .png beside them."""
    rows = [row for row in map(json.loads, open(path, encoding="utf-8")) if row.get("bench") == "step"]
    if not rows:
        fail(f"{path} has no rows that python bench.py step --json={path} would leave")
    tokens, reads = min(row["tokens"] for row in rows), rows[0]["reads"]
    rows = [row for row in rows if (row["tokens"], row["reads"]) == (tokens, reads)]
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for method, marker in zip(dict.fromkeys(row["method"] for row in rows), "osv^D", strict=False):
        line = [row for row in rows if row["method"] == method]
        ours = method in ("rowwise", "adam")
        axis.plot([row["rows"] for row in line], [1e3 * row["seconds"] for row in line], marker=marker,
                  linestyle="-" if ours else "--", label=f"nanoPKM, {method}" if ours else method)
    axis.set(xscale="log", yscale="log", xlabel="rows of the pool", ylabel=f"ms a step of {tokens:,} tokens",
             xticks=sorted({row["rows"] for row in rows}))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    for side in (axis.xaxis, axis.yaxis):
        side.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)


# models of evidence.py: colour, marker and line, so that no two differ by colour alone
STYLE = defaultdict(lambda: ("#777777", "h", "-"), {  # which is for a model of your own
    "dense": ("#000000", "o", "-"), "dense-2x": ("#000000", "o", ":"), "moe": ("#CC79A7", "v", "--"),
    "hash": ("#56B4E9", "X", ":"), "peer": ("#E69F00", "P", "--"), "memory": ("#882255", "<", "-."),
    "memory+": ("#0072B2", "s", "-"), "memory+4x": ("#009E73", "D", "-"),
    "memory+-short": ("#0072B2", "s", ":"), "memory+16x": ("#D55E00", "^", "-")})


def draw(axis, model: str, x, ys, label: str | None = None):
    """The mean of several runs (ys, a row each), and the least and the most of them as a bar."""
    colour, marker, line = STYLE[model]
    middle, low, high = np.mean(ys, 0), np.min(ys, 0), np.max(ys, 0)
    around = np.maximum((middle - low, high - middle), 0)  # rounding may put a mean of equals beside them
    axis.errorbar(x, middle, around, color=colour, marker=marker, linestyle=line,
                  capsize=2, elinewidth=0.8, markersize=5, label=label)
    return x[-1], middle[-1], model  # for label_ends


def label_ends(axis, ends: list[tuple]) -> None:
    """Names of lines to the right of their ends (x, y, model), moved apart where they would overlap."""
    right = max(x for x, _, _ in ends)
    low, high = axis.get_ylim()
    gap, last = 0.055 * (high - low), -np.inf
    for i, (x, y, model) in enumerate(sorted(ends, key=lambda end: end[1])):
        last = max(min(y, high - gap * (len(ends) - 1 - i)), last + gap)  # those above need room too
        leader = dict(arrowstyle="-", color=STYLE[model][0], linewidth=0.5)
        axis.annotate(model, (x, y), (right * 1.04, last), va="center", fontsize=9, annotation_clip=False,
                      arrowprops=leader)


def plot_facts(path: Path) -> None:
    """
    The runs of `evidence.py facts`, of each model those at its best learning rate. Beside their lines: .png,
    recall against how often a thing was told; _more.png, against tokens, seconds and slots, and slot use.
    """
    from evidence import kept, read_rows, speed  # here, as it loads torch
    runs = kept(read_rows(path))
    recalls = {model: [row["curve"][-1]["recall"] for row in rows] for model, rows in runs.items()}
    if not runs:
        fail(f"{path}: no line is of the models that evidence.py has now")
    best_first = sorted(runs, key=lambda model: -np.mean([recall["all"] for recall in recalls[model]]))

    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    bins = [low for low in recalls[best_first[0]][0]["by_exposure"] if int(low) < 256]
    for i, model in enumerate(best_first):  # so that the legend has the order of the lines
        shares = [[recall["by_exposure"][low] for low in bins] for recall in recalls[model]]
        aside = 1.03 ** (i - len(runs) / 2)  # so that bars of different models stand beside each other
        draw(axis, model, [aside * int(low) for low in bins], shares, model)
    axis.set(xscale="log", xlabel="times a fact was told in the training text", ylabel="recall (exact match)",
             ylim=(-0.02, 1.02), xticks=[int(low) for low in bins],
             xticklabels=[f"{low}-{2 * int(low) - 1}" for low in bins])
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, label in ((axes[0, 0], "million tokens"), (axes[0, 1], "seconds of training")):
        ends = []
        for model, rows in runs.items():
            unit = 1e6 if label == "million tokens" else speed(rows)
            points = [point["tokens"] / unit for point in rows[0]["curve"]]
            curves = [[point["recall"]["all"] for point in row["curve"]] for row in rows]
            ends.append(draw(axis, model, points, curves))
        axis.set(xlabel=label, ylabel="recall", ylim=(-0.02, 1.02))
        label_ends(axis, ends)

    axis = axes[1, 0]
    sizes = [model for model in ("memory+", "memory+4x", "memory+16x") if model in runs]
    sizes = {model: runs[model][0]["options"]["mem_num_keys"]**2 for model in sizes}
    means = {model: np.mean([recall["all"] for recall in recalls[model]]) for model in runs}
    axis.plot(list(sizes.values()), [means[model] for model in sizes], color="0.6", zorder=0)
    for model, slots in sizes.items():
        draw(axis, model, [slots], [[recall["all"]] for recall in recalls[model]])
    for model in ("dense", "dense-2x"):
        if model in runs and sizes:
            axis.axhline(means[model], color=STYLE[model][0], linestyle=STYLE[model][2], label=model)
            axis.legend()
    axis.set(xscale="log", xlabel="slots of memory+", ylabel="recall", ylim=(-0.02, 1.02),
             xticks=list(sizes.values()))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())

    axis, ends = axes[1, 1], []
    for model, rows in runs.items():
        if "kl_from_uniform" in rows[0]["curve"][-1]:
            points = [point["tokens"] / 1e6 for point in rows[0]["curve"][1:]]
            ends.append(draw(axis, model, points,
                             [[point["kl_from_uniform"] for point in row["curve"][1:]] for row in rows]))
    axis.set(xlabel="million tokens", ylabel="slot use: KL from uniform (nats)")
    axis.set_ylim(bottom=0)
    if ends:
        label_ends(axis, ends)
    figure.savefig(path.with_name(path.stem + "_more.png"), dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    given = Path(sys.argv[1] if len(sys.argv) == 2 else "")
    if (given / "log.jsonl").exists():
        plot_run(given)
    elif given.name == "evidence_facts.jsonl" and given.is_file():
        plot_facts(given)
    elif given.is_file() and not given.name.startswith("evidence"):
        plot_step(given)
    else:
        fail("name a run's folder or lines: out/facts, results/step.jsonl or results/evidence_facts.jsonl")
