"""
Writes docs/slides.html: five slides, drawn from the files of results. No network; the arrow keys move.

    python -m experiments.slides
"""

import base64
from io import BytesIO

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from experiments import plots
from experiments.results import ROOT, erase_shares, group_by, read_edited
from memory import product_key_search

RESULTS = ROOT / "experiments" / "results"
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>nanoPKM: five slides</title>
<style>
  :root { color-scheme: light; font: max(13px, 2.9vmin)/1.35 system-ui, sans-serif; color: #24292f; }
  html { scroll-snap-type: y mandatory; } body { margin: 0; } h1, p { margin: 0 0 .2em; }
  section { height: 94vh; padding: 3vh 6vmin; scroll-snap-align: start; display: flex; flex-flow: column; }
  div { flex: 1; min-height: 0; margin: 2vh 0; display: flex; place-content: center; place-items: center; }
  img { width: 100%; height: 100%; object-fit: contain; } small { color: #57606a; font-size: .6em; }
  table { border-collapse: collapse; } th, td { padding: .4em .8em; border-bottom: 1px solid #d0d7de; }
  td { text-align: right; } td:first-child, th { text-align: left; } b { color: #00805c; }
</style>
SLIDES
<script>
  addEventListener("keydown", event => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    document.querySelectorAll("section")[Math.round(scrollY / innerHeight) + by]?.scrollIntoView();
  });
</script>
"""


def image(svg: bytes) -> str:
    return f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def drawn(figure: Figure) -> str:
    file = BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return image(file.getvalue())


def draw_square(S: int = 32, K: int = 8) -> Figure:
    """The scores of S*S slots, the best K half-scores of each side, and the best K slots."""
    half_scores = torch.randn(2, S, generator=torch.Generator().manual_seed(1))
    _, slots = product_key_search(torch.ones(1, 1, 2, 1), half_scores.view(1, 2, S, 1), K)
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    (corner, top), (side, square) = figure.subplots(2, 2, width_ratios=(1, 4), height_ratios=(1, 4),
                                                    subplot_kw=dict(xticks=[], yticks=[]))
    square.imshow(half_scores[0, :, None] + half_scores[1], cmap="Greys", vmin=-6, vmax=24, aspect="auto")
    square.plot(slots.flatten() % S, slots.flatten() // S, "s", color="#00805c", markersize=8)
    sides = (side.barh, square.axhspan, plots.COLOURS[0]), (top.bar, square.axvspan, plots.COLOURS[1])
    for scores, (bars, band, colour) in zip(half_scores, sides, strict=True):
        best = scores.topk(K).indices.tolist()
        bars(range(S), scores, color=[colour if i in best else "#d0d7de" for i in range(S)])
        for i in best:
            band(i - 0.5, i + 0.5, color=colour, alpha=0.3, linewidth=0)
    corner.axis("off")
    side.set(ylim=(S - 0.5, -0.5), ylabel=f"{S} left half-scores")
    top.set(xlim=(-0.5, S - 0.5), title=f"{S} right half-scores")
    return figure


def erase_table() -> str:
    """Recall before and after 64 and 128 slots were emptied: means over people and trained models."""
    names = {"tokens": "the embeddings of two tokens", "hash": "a hash of two tokens, no search",
             "shifted": "the states of two tokens", "state": "the state of one token (published)"}
    rows = ["<tr><th>slots chosen by<th>the person: before<th>64 emptied<th>128 emptied"
            "<th>others: before<th>128 emptied"]
    for model, lines in group_by(read_edited(RESULTS / "erase.jsonl"), "model").items():
        sizes = 0, *lines[0]["run"]["sizes"]
        these, others = (dict(zip(sizes, np.mean(erase_shares(lines, "person", label), 0), strict=True))
                         for label in ("these", "others"))
        rows.append(f"<tr><td>{names[model]}<td>{these[0]:.2f}<td>{these[64]:.2f}<td><b>{these[128]:.2f}</b>"
                    f"<td>{others[0]:.2f}<td>{others[128]:.2f}")
    return f"<table>{''.join(rows)}</table>"


def slides() -> list[tuple[str, str, str, str]]:
    """The title of each slide, its sentences, its content, and where the content comes from."""
    return [
        ("A table that is read by key", "A query has two halves. Each scores the half-keys of its side. The "
         "best pairs of half-keys name the rows to read.",
         image((ROOT / "docs" / "product_keys.svg").read_bytes()), "docs/product_keys.svg"),
        ("The square of pairs", "32 + 32 half-keys name 1,024 rows. A score is the sum of two half-scores. "
         "So the best 8 rows (green) stand where the best 8 lines cross the best 8 columns.",
         drawn(draw_square()), "random half-scores, and the search of memory.py"),
        ("Memory helps with rare facts", "Models with equal multiply-adds per token are asked about "
         "4,000 people. memory+ is the layer as published; shifted and tokens make the query from two "
         "tokens; moe is a mixture of experts. The table helps, learnt keys do not: a hash does as well.",
         drawn(plots.draw_facts(RESULTS / "facts.jsonl")), "experiments/results/facts.jsonl"),
        ("Erase a person", "Recall of facts about a person and about others, before and after slots of this "
         "person are emptied. It works best where the name alone decides which rows are read.",
         erase_table(), "experiments/results/erase.jsonl: means over 40 people in each of 3 trained models; "
         "the last two have scaled embeddings"),
        ("Teach 100 people, one by one", "Sparse finetuning changes only rows that the new facts read and "
         "other text does not; all read: all rows that the new facts read; lora: low-rank changes. Training "
         "everything (full) forgets the old facts, and most of the new ones, unless all are shuffled.",
         drawn(plots.draw_teach(RESULTS / "teach.jsonl", ["tokens"])),
         "experiments/results/teach.jsonl: means over 3 trained models"),
    ]


def main() -> None:
    with matplotlib.rc_context(plots.LOOK | {"svg.hashsalt": ""}):  # the same file each time
        sections = [f"<section><h1>{h1}</h1><p>{p}</p><div>{div}</div><small>{small}</small></section>"
                    for h1, p, div, small in slides()]
    (ROOT / "docs" / "slides.html").write_text(PAGE.replace("SLIDES", "\n".join(sections)), encoding="utf-8")


if __name__ == "__main__":
    main()
