"""
Draws figures from files of results, and writes each figure next to its file.

    python -m experiments.plots experiments/results/facts.jsonl   facts.png. Also: erase, teach, layer, attach

The files come from experiments.compare, attach.jsonl from experiments.attach, and layer.jsonl from
experiments.speed layer --json=FILE. A new figure is one function and one line in FIGURES.
"""

import sys
from itertools import cycle
from pathlib import Path

from runtime.cli import command, fail

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from experiments.facts_edited import best_lr
from experiments.models import EDITED, EXPERIMENTS
from experiments.results import best_runs, erase_shares, group_by, read_edited, read_json_lines, read_rows

# the colours of Okabe and Ito, which colour-blind readers can tell apart
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LOOK = {"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3,
        "legend.frameon": False, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)}

# colour, marker and line of each model of the first figure. No two models differ by colour alone
STYLES = {"dense": ("#000000", "o", "-"), "moe": ("#CC79A7", "v", "--"), "hash": ("#56B4E9", "X", ":"),
          "memory+": ("#0072B2", "s", "-"), "tokens": ("#D55E00", "^", "-"), "shifted": ("#009E73", "D", "-")}
STYLES["state"] = STYLES["memory+"]  # its name in the experiments erase and teach


# --- a step of a layer --------------------------------------------------------------------------------------

def draw_layer(path: Path) -> Figure:
    """Time of a layer's step against the rows of its pool: the results of experiments.speed layer."""
    rows = read_json_lines(path)
    tokens = min(row["tokens"] for row in rows)
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axis = figure.subplots()
    for method, marker in zip(dict.fromkeys(row["method"] for row in rows), "osv^D", strict=False):
        line = [row for row in rows if (row["method"], row["tokens"]) == (method, tokens)]
        axis.plot([row["rows"] for row in line], [1e3 * row["seconds"] for row in line], marker=marker,
                  linestyle="-" if method == "nanoPKM" else "--", label=method)
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

def draw_facts(path: Path) -> Figure:
    """Recall against how often a fact was told: mean over the seeds, with bars from lowest to highest."""
    recalls = {model: [row["curve"][-1]["recall"] for row in rows]
               for model, rows in best_runs(read_rows(path, EXPERIMENTS["facts"])).items() if model in STYLES}
    best_first = sorted(recalls, key=lambda model: -np.mean([recall["all"] for recall in recalls[model]]))
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.subplots()
    bins = [low for low in recalls[best_first[0]][0]["by_exposure"] if int(low) < 256]
    for i, model in enumerate(best_first):  # the legend then has the order of the lines
        shares = [[recall["by_exposure"][low] for low in bins] for recall in recalls[model]]
        middle, low, high = np.mean(shares, 0), np.min(shares, 0), np.max(shares, 0)
        bars = np.maximum((middle - low, high - middle), 0)  # rounding may make a bar negative
        offset = 1.03 ** (i - len(recalls) / 2)  # bars of different models do not overlap
        colour, marker, line = STYLES[model]
        axis.errorbar([offset * int(low) for low in bins], middle, bars, color=colour, marker=marker,
                      linestyle=line, capsize=2, elinewidth=0.8, markersize=5, label=model)
    axis.set(xscale="log", xlabel="times a fact was told in the training text", ylabel="recall (exact match)",
             ylim=(-0.02, 1.02), xticks=[int(low) for low in bins],
             xticklabels=[f"{low}-{2 * int(low) - 1}" for low in bins])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --- erase and teach ----------------------------------------------------------------------------------------

def draw_erase(path: Path) -> Figure:
    """
    Recall against the number of emptied slots: a person's facts, one fact, and facts told often. A colour is
    a kind of model, a dotted line is other people, and a paler line is a fact told less often.
    """
    rows = read_edited(path)
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    sizes, bases = ("0", *map(str, rows[0]["run"]["sizes"])), group_by(rows, "model")
    first, of_first = next(iter(bases.items()))

    def line(axis, base, rows, mode, label, name, told=None, **look):
        colour, marker, _ = STYLES[base]
        axis.plot(sizes, np.mean(erase_shares(rows, mode, label, told), 0), color=colour, marker=marker,
                  label=name, **look)

    for base, of_base in bases.items():
        line(axes[0], base, of_base, "person", "these", base)
        line(axes[0], base, of_base, "person", "others", None, linestyle=":")
    axes[0].plot([], [], ":", color="gray", label="other people")
    for label, name, style in (("these", "this fact", "-"), ("other words", "... in other words", "--"),
                               ("person's others", "the person's other facts", "-."),
                               ("others", None, ":")):
        line(axes[1], first, of_first, "one fact", label, name, linestyle=style)
    times = sorted({point["told"] for row in of_first for point in row["points"]})
    for i, told in enumerate(times, 1):
        name = f"told {told} to {2 * told - 1} times" if told < 128 else "told more often"
        line(axes[2], first, of_first, "person", "these", name, told, alpha=(1 + i) / (1 + len(times)))
    for axis, title in zip(axes, ("a person is erased", f"one fact is erased ({first})",
                                  f"a person is erased ({first})"), strict=True):
        axis.set(title=title, ylim=(-0.02, 1.02))
        axis.legend(handlelength=3.5)
    axes[1].legend(handlelength=3.5, loc="upper right", bbox_to_anchor=(1, 0.95))
    axes[0].set_ylabel("recall")
    figure.supxlabel("slots emptied (at 256 some answers return: the last slots spoke for other answers)",
                     fontsize=11)
    return figure


def draw_teach(path: Path, models=tuple(EDITED)) -> Figure:
    """What is still known against what is learnt: each method at its best learning rate, as in the table."""
    bases = group_by([row for row in read_edited(path) if row["run"]["model"] in models], "model")
    figure = Figure(figsize=(3 * len(bases) + 1.5, 3.7), layout="constrained")
    axes = figure.subplots(1, len(bases), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (base, of_base) in zip(axes, bases.items(), strict=True):
        for (method, runs), marker in zip(group_by(of_base, "method").items(), "osv^Pd", strict=False):
            runs = [row for row in runs if row["run"]["lr"] == best_lr(runs)]
            new, old = (np.mean([row["after"][part] for row in runs]) for part in ("new", "old"))
            axis.plot(new, old, marker, markersize=11, label=method, clip_on=False)
        axis.set(title=base, xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal",
                 xlabel="recall of new facts")
    axes[0].set_ylabel("recall of old facts")
    axes[0].annotate("learns all,\nforgets nothing", (1, 1), (0.72, 0.62), ha="center", va="top",
                     arrowprops={"arrowstyle": "->"})
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.05, 0.5))
    return figure


def draw_attach(path: Path) -> Figure:
    """
    What a taught model knows in other words, against how much its loss on other text has risen; and what is
    left of ten groups of people after the last was taught.
    """
    rows, texts = read_json_lines(path), ("the background text", "the held-out text", "questions")
    figure = Figure(figsize=(12, 4), layout="constrained")
    *axes, last = figure.subplots(1, 3, sharey=True)
    titles = {"other words": "sentences never taught", "questions, new": "questions never asked"}
    together = group_by([row for row in rows if not row.get("course")], "method")
    in_turn = group_by([row for row in rows if row.get("course")], "method")

    def rise(row):
        return np.mean([row["after"][text] - row["before"][text] for text in texts])

    for axis, (group, title) in zip(axes, titles.items(), strict=True):
        for (method, runs), marker in zip(together.items(), cycle("os^vPDX*<>"), strict=False):
            axis.plot([rise(row) for row in runs], [row["after"][group] for row in runs], marker,
                      markersize=8, label=method)
        axis.set(title=title, ylim=(-0.03, 1.03), xlabel="rise of the loss on other text")
    for method, runs in in_turn.items():
        shares = np.mean([[group["taught"] for group in row["course"][-1]["groups"]] for row in runs], 0)
        label = f"{method} (loss {np.mean([rise(row) for row in runs]):+.2f})"
        last.plot(range(1, len(shares) + 1), shares, "o-", label=label)
    last.set(title="groups taught one after the other", xlabel="group of five people, first to last")
    axes[0].set_ylabel("share completed")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=8)
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower right", fontsize=8)
    return figure


# --- files --------------------------------------------------------------------------------------------------

FIGURES = {"facts": draw_facts, "layer": draw_layer, "erase": draw_erase, "teach": draw_teach,
           "attach": draw_attach}  # by file name


@command
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    path = Path(argv[0] if argv else "")
    if path.stem not in FIGURES or not path.exists():
        fail(f"name a file of results, such as {', '.join(f'{name}.jsonl' for name in FIGURES)}")
    with matplotlib.rc_context(LOOK):
        FIGURES[path.stem](path).savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
