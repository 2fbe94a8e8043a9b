"""
Reads and appends the lines of finished runs, chooses those that a table or a figure shows, and prints tables.
"""

import json
import math
import subprocess
from pathlib import Path
from statistics import fmean, mean, stdev

from runtime.cli import read_json_lines

from data.write import options_of, with_defaults
from experiments.models import EDITED, NOT_IN_LINES, Experiment
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


# --- lines --------------------------------------------------------------------------------------------------

def rows_path(experiment: str, results: str) -> Path:
    return ROOT / results / f"{experiment}.jsonl"


def commit() -> str:
    """The commit of the code, with a + if a file differs from it; "" if this is not a git repository."""
    command = ["git", "describe", "--always", "--dirty=+"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def append_row(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_cut = path.exists() and not path.read_bytes().endswith(b"\n")  # the last line is incomplete
    with open(path, "a", encoding="utf-8") as f:
        f.write("\n" * is_cut + json.dumps(row) + "\n")


def read_rows(path: Path, experiment: Experiment) -> list[dict]:
    """
    The lines of finished runs, in the order of the models. If the options of a model have changed, its old
    lines are left out, so its runs are done again.
    """
    rows, order = {}, list(experiment.models)
    identities = {model: experiment.identity(model) for model in order}
    options = options_of(TrainConfig(), NOT_IN_LINES)  # a line that is older than an option lacks it
    for row in read_json_lines(path):
        identity = {"corpus": with_defaults(experiment.corpus, row["corpus"]),
                    "options": options | row["options"]}
        if identity == identities.get(row["model"]):
            rows[row["model"], row["lr"], row["seed"]] = row
    return sorted(rows.values(), key=lambda row: order.index(row["model"]))


def read_edited(path: Path) -> list[dict]:
    """The lines of erase.jsonl or teach.jsonl, in the order of the models."""
    return sorted(read_json_lines(path), key=lambda row: list(EDITED).index(row["run"]["model"]))


# --- which runs count ---------------------------------------------------------------------------------------

def score(row: dict) -> tuple:
    """Greater is better. Recall decides. If it is equal or there are no questions, the loss decides."""
    if not row["curve"]:  # diverged: worse than all others; the lower learning rate is better
        return -math.inf, -row["lr"]
    final = row["curve"][-1]
    return final.get("recall", {}).get("all", 0), -final["val_loss"]


def best_lr(rows: list[dict], model: str) -> float:
    return max((row for row in rows if (row["model"], row["seed"]) == (model, 1)), key=score)["lr"]


def best_runs(rows: list[dict]) -> dict[str, list[dict]]:
    """For each model the runs at its best learning rate, without those that diverged."""
    runs = {}
    for model in dict.fromkeys(row["model"] for row in rows if row["seed"] == 1):
        lr = best_lr(rows, model)
        if of_model := [row for row in rows if (row["model"], row["lr"]) == (model, lr) and row["curve"]]:
            runs[model] = of_model
    return runs


def group_by(rows: list[dict], name: str) -> dict[str, list[dict]]:
    """Lines of erase and teach -> {value: those whose run has this value}, in the order of the lines."""
    groups = {}
    for row in rows:
        groups.setdefault(row["run"][name], []).append(row)
    return groups


def erase_shares(rows: list[dict], mode: str, label: str, told: int | None = None) -> list[list[float]]:
    """
    Lines of erase.jsonl -> for each trained model the share of right answers without 0, 4, 16 ... slots, as a
    mean over people. told: only people who were told so often.
    """
    def share(points):
        return fmean([point[label] for point in points], [point["people"] for point in points])

    return [[share([point for point in row["points"] if (point["mode"], point["slots"]) == (mode, size)
                    and label in point and told in (None, point["told"])])
             for size in (0, *row["run"]["sizes"])] for row in rows]


# --- tables -------------------------------------------------------------------------------------------------

def mean_and_deviation(values, form: str = ".3f") -> str:
    """'mean ± standard deviation', or only the value if there is one. '-' for no value or nan."""
    if not values or any(map(math.isnan, values)):
        return "-"
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def print_markdown(lines: list[dict]) -> None:
    """lines: one {column: text} for each line of the table."""
    for cells in (lines[0], ["---"] * len(lines[0]), *(line.values() for line in lines)):
        print("| " + " | ".join(cells) + " |")
