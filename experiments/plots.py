"""
Draws figures from files of results, and writes each figure next to its file.

    python -m experiments.plots experiments/results/facts.jsonl   facts.png
    python -m experiments.plots experiments/results/step.jsonl    step.png
    python -m experiments.plots FOLDER/facts-large.jsonl          facts-large.png; code.jsonl: code.png
    python -m experiments.plots experiments/results/erase.jsonl   erase.png; teach.jsonl: teach.png

The files come from experiments.compare, step.jsonl from experiments.speed step --json=FILE.
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from experiments.models import EDITED, EXPERIMENTS, SUMMARY
from experiments.results import best_runs, erase_shares, read_json_lines, read_rows
from runtime.cli import command, fail

# the colours of Okabe and Ito, which colour-blind readers can tell apart
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LOOK = {"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3,
        "legend.frameon": False, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)}

# colour, marker and line of each model of experiments.compare; no two models differ by colour alone
STYLES = defaultdict(lambda: ("#777777", "h", "-"), {  # the default is for models that you add
    "dense": ("#000000", "o", "-"), "dense-2x": ("#000000", "o", ":"), "moe": ("#CC79A7", "v", "--"),
    "hash": ("#56B4E9", "X", ":"), "peer": ("#E69F00", "P", "--"), "shifted-plain": ("#882255", "<", "-."),
    "memory+": ("#0072B2", "s", "-"), "tokens": ("#D55E00", "^", "-"), "shifted": ("#009E73", "D", "-"),
    "shifted-4x": ("#009E73", ">", "--"), "shifted-16x": ("#009E73", "p", "-."),
    "shifted-short": ("#009E73", "D", ":")})


# --- a step of the memory -----------------------------------------------------------------------------------

def draw_step(rows: list[dict]) -> Figure:
    """Time of a step against the size of the pool: the rows of experiments.speed step."""
    tokens, reads = min(row["tokens"] for row in rows), rows[0]["reads"]
    rows = [row for row in rows if (row["tokens"], row["reads"]) == (tokens, reads)]
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axis = figure.subplots()
    for method, marker in zip(dict.fromkeys(row["method"] for row in rows), "osv^D", strict=False):
        line = [row for row in rows if row["method"] == method]
        is_ours = method in ("rowwise", "adam")
        axis.plot([row["rows"] for row in line], [1e3 * row["seconds"] for row in line], marker=marker,
                  linestyle="-" if is_ours else "--", label=f"nanoPKM, {method}" if is_ours else method)
    axis.set(xscale="log", yscale="log", xticks=sorted({row["rows"] for row in rows}),
             xlabel="rows of the pool", ylabel=f"ms per step of {tokens:,} tokens")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --- facts --------------------------------------------------------------------------------------------------

def draw(axis, model: str, x, ys, label: str | None = None):
    """Draws the mean of several runs (ys: one row per run), with bars from the lowest to the highest run."""
    colour, marker, line = STYLES[model]
    middle, low, high = np.mean(ys, 0), np.min(ys, 0), np.max(ys, 0)
    bars = np.maximum((middle - low, high - middle), 0)  # rounding may make a bar negative
    axis.errorbar(x, middle, bars, color=colour, marker=marker, linestyle=line,
                  capsize=2, elinewidth=0.8, markersize=5, label=label)
    return x[-1], middle[-1], model  # for label_ends


def label_ends(axis, ends: list[tuple]) -> None:
    """Writes names of lines to the right of their ends (x, y, model), and moves overlapping names apart."""
    right = max(x for x, _, _ in ends)
    low, high = axis.get_ylim()
    gap, last = 0.055 * (high - low), -np.inf
    for i, (x, y, model) in enumerate(sorted(ends, key=lambda end: end[1])):
        last = max(min(y, high - gap * (len(ends) - 1 - i)), last + gap)  # leave room for the names above
        leader = dict(arrowstyle="-", color=STYLES[model][0], linewidth=0.5)
        axis.annotate(model, (x, y), (right * 1.04, last), va="center", fontsize=9, annotation_clip=False,
                      arrowprops=leader)


def draw_facts(runs: dict) -> Figure:
    """Recall against how often a fact was told in the training text."""
    recalls = {model: [row["curve"][-1]["recall"] for row in rows] for model, rows in runs.items()}
    best_first = sorted(runs, key=lambda model: -np.mean([recall["all"] for recall in recalls[model]]))
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    bins = [low for low in recalls[best_first[0]][0]["by_exposure"] if int(low) < 256]
    for i, model in enumerate(best_first):  # the legend then has the order of the lines
        shares = [[recall["by_exposure"][low] for low in bins] for recall in recalls[model]]
        offset = 1.03 ** (i - len(runs) / 2)  # bars of different models do not overlap
        draw(axis, model, [offset * int(low) for low in bins], shares, model)
    axis.set(xscale="log", xlabel="times a fact was told in the training text", ylabel="recall (exact match)",
             ylim=(-0.02, 1.02), xticks=[int(low) for low in bins],
             xticklabels=[f"{low}-{2 * int(low) - 1}" for low in bins])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --- facts-large and code -----------------------------------------------------------------------------------

def runs_of_one_length(rows: list[dict]) -> dict[str, list[dict]]:
    """The runs of each model. Where runs have different lengths: the length that most models have."""
    models = Counter(steps for _, steps in {(row["model"], row["options"]["max_steps"]) for row in rows})
    steps = max(models, key=lambda steps: (models[steps], steps))
    runs = defaultdict(list)
    for row in rows:
        if row["options"]["max_steps"] == steps:
            runs[row["model"]].append(row)
    return runs


def draw_large(runs: dict) -> Figure:
    """
    facts-large: recall against tokens, seconds of training and the number of slots. code: validation loss
    against tokens. Runs that shared a GPU took longer than a run alone.
    """
    def value(point):
        return point["recall"]["all"] if has_recall else point["val_loss"]

    has_recall = "recall" in next(iter(runs.values()))[0]["curve"][-1]
    sizes = [model for model in runs if model.startswith("memory+")]  # memory+ and other numbers of slots
    figure = Figure(figsize=(15 if has_recall else 7, 4.2), layout="constrained")
    axes = figure.subplots(1, 3 if has_recall else 1, squeeze=False)[0]
    for axis, name in zip(axes, ("million tokens", "seconds of training"), strict=False):
        ends = []
        for model, rows in runs.items():
            if model == "memory+" or model not in sizes:
                unit = 1e6 if axis is axes[0] else rows[0]["tokens_per_second"]
                curves = [[value(point) for point in row["curve"][1:]] for row in rows]  # [1:]: not step 0
                x = [point["tokens"] / unit for point in rows[0]["curve"][1:]]
                ends.append(draw(axis, model, x, curves))
        axis.set(xlabel=name, ylabel="recall" if has_recall else "validation loss (nats per token)")
        label_ends(axis, ends)
    if has_recall:
        final = {model: np.mean([value(row["curve"][-1]) for row in rows]) for model, rows in runs.items()}
        slots = sorted((runs[model][0]["options"]["mem_num_keys"]**2, final[model]) for model in sizes)
        axes[2].plot(*zip(*slots, strict=True), "s-", color="#0072B2", label="memory+")
        for model in runs.keys() - sizes:
            axes[2].axhline(final[model], color=STYLES[model][0], linestyle=STYLES[model][2], label=model)
        axes[2].set(xscale="log", xlabel="slots", ylabel="recall", xticks=[size for size, _ in slots])
        axes[2].xaxis.set_major_formatter("{x:,.0f}")
        axes[2].xaxis.set_minor_locator(NullLocator())
        axes[2].legend()
    return figure


# --- erase and teach ----------------------------------------------------------------------------------------

def draw_erase(rows: list[dict]) -> Figure:
    """Recall against the number of emptied slots: a person's facts, one fact, and facts told often."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    sizes, bases = ("0", *map(str, rows[0]["run"]["sizes"])), by_model(rows)
    first, of_first = next(iter(bases.items()))

    def line(axis, rows, mode, label, name, told=None, **look):
        axis.plot(sizes, np.mean(erase_shares(rows, mode, label, told), 0), marker="o", label=name, **look)

    for (base, of_base), colour in zip(bases.items(), COLOURS, strict=False):
        line(axes[0], of_base, "person", "these", f"{base}: the person", color=colour)
        line(axes[0], of_base, "person", "others", f"{base}: others", color=colour, linestyle=":")
    for label, name in (("these", "this fact"), ("other words", "this fact, in other words"),
                        ("person's others", "the person's other facts"), ("others", "other people")):
        line(axes[1], of_first, "one fact", label, name)
    for told in sorted({point["told"] for row in of_first for point in row["points"]}):
        name = f"told {told} to {2 * told - 1} times" if told < 128 else "told more often"
        line(axes[2], of_first, "person", "these", name, told)
    for axis, title in zip(axes, ("erasing a person", f"erasing one fact ({first})",
                                  f"erasing a person ({first})"), strict=True):
        axis.set(title=title, xlabel="slots emptied", ylim=(-0.02, 1.02))
        axis.legend(fontsize=8)
    axes[0].set_ylabel("recall")
    return figure


def draw_teach(rows: list[dict]) -> Figure:
    """What is forgotten against what is learnt. A line joins the learning rates of one method."""
    bases = by_model(rows)
    figure = Figure(figsize=(4 * len(bases) + 1.5, 6), layout="constrained")
    axes = figure.subplots(2, len(bases), sharex=True, sharey="row", squeeze=False)
    for column, (base, of_base) in zip(axes.T, bases.items(), strict=True):
        for (method, of_method), marker in zip(group_by(of_base, "method").items(), "osv^Pd", strict=False):
            means = [np.mean([(row["after"]["new"], row["after"]["old"],
                               row["after"]["loss"] - row["before"]["loss"]) for row in group], 0)
                     for _, group in sorted(group_by(of_method, "lr").items())]
            new, old, rise = zip(*means, strict=True)
            column[0].plot(new, old, marker=marker, label=method)
            column[1].plot(new, rise, marker=marker, label=method)
        column[0].set(title=base, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        column[1].set(xlabel="recall of the new facts")
    axes[0, 0].set_ylabel("recall of old facts")
    axes[1, 0].set_ylabel("rise of the validation loss")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def by_model(rows: list[dict]) -> dict[str, list[dict]]:
    groups = group_by(rows, "model")
    return {base: groups[base] for base in EDITED if base in groups}


def group_by(rows: list[dict], name: str) -> dict[str, list[dict]]:
    """{value: the lines whose run has this value}, in the order of the lines."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["run"][name]].append(row)
    return groups


# --- files --------------------------------------------------------------------------------------------------

def draw_file(path: Path) -> Figure:
    """The figure for a file of results."""
    if path.name == "facts.jsonl":
        runs = best_runs(read_rows(path, EXPERIMENTS["facts"]))
        if not runs:
            fail(f"{path} has no finished run of experiments.compare with the present options")
        return draw_facts({model: rows for model, rows in runs.items() if model in SUMMARY} or runs)
    rows = read_json_lines(path)
    if path.name in ("facts-large.jsonl", "code.jsonl") and (rows := [row for row in rows if row["curve"]]):
        return draw_large(runs_of_one_length(rows))
    if path.name in ("erase.jsonl", "teach.jsonl") and rows:
        return (draw_erase if path.stem == "erase" else draw_teach)(rows)
    if rows := [row for row in rows if row.get("bench") == "step"]:
        return draw_step(rows)
    fail(f"{path} must be a facts.jsonl, erase.jsonl or the like of experiments.compare, or a file that "
         "python -m experiments.speed step --json=FILE wrote")


@command
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv in (["-h"], ["--help"]):
        return print(__doc__.strip())
    if len(argv) != 1:
        fail("name a file of results: python -m experiments.plots experiments/results/facts.jsonl")
    path = Path(argv[0])
    with matplotlib.rc_context(LOOK):
        draw_file(path).savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
