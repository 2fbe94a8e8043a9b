"""
Figures, from the lines that runs leave.

    python plot.py out/facts               out/facts/log.jsonl -> out/facts/loss.png
    python plot.py results/step.jsonl      the rows of bench.py step -> results/step.png
"""

import json
import sys
from pathlib import Path

import matplotlib

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
                axis.plot(steps, [line["recall"].get(name) for line in evaluated], style, label=label)
        axis.set(xlabel="step", ylabel="recall (exact match)", ylim=(0, 1.02))
        axis.legend()
    if has_memory:
        axis = next(axes)
        axis.plot(steps[1:], [line["slots_used"] for line in evaluated[1:]], "o-")
        axis.set(xlabel="step", ylabel="share of slots read since last evaluation", ylim=(0, 1.02))
    figure.savefig(out_dir / "loss.png", dpi=120)
    plt.close(figure)


def plot_step(path: Path) -> None:
    """Time of a step over the size of the pool: the rows of `bench.py step` -> a .png beside them."""
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    tokens = min(row["tokens"] for row in rows)
    rows = [row for row in rows if row["tokens"] == tokens and row["reads"] == "uniform"]
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for method, marker in zip(dict.fromkeys(row["method"] for row in rows), "osv^D", strict=True):
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


if __name__ == "__main__":
    given = Path(sys.argv[1] if len(sys.argv) == 2 else "")
    if (given / "log.jsonl").exists():
        plot_run(given)
    elif given.is_file():
        plot_step(given)
    else:
        fail("name a run's folder or a benchmark's rows: python plot.py out/facts, or results/step.jsonl")
