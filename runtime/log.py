"""
Prints the progress of a run, and writes log.jsonl and loss.png to its folder. Here is also what else a run
needs around its loop: signals that stop it, and errors as one line.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import shlex
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from runtime.cli import drop_output, handle_signals, one_line, print_text, read_json_lines

import torch
import torch.distributed as dist

from kernel import resolve_kernel
from runtime.checkpoint import best_checkpoint, checkpoints
from runtime.distributed import RANK, WORLD_SIZE

stop_requests: list[int] = []  # signals that asked the run to end
LABELS = {"all": "asked about in training", "held_out": "never asked about in training"}


def print_once(line: str) -> None:
    """Only the first process prints. After a signal to stop, its terminal or pipe may be gone."""
    if RANK == 0:
        try:
            print_text(line)
        except OSError:
            if not stop_requests:
                raise
            drop_output()


def peak_memory(device: str) -> int:
    """Peak memory in bytes: of torch on the GPU, or of the process if the device is a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """
    The process keeps the memory of large tensors that it frees. By default it returns this memory, and the
    system clears each page before the next step gets it. With 8,192 tokens in the vocabulary, a step on a CPU
    then takes a third longer.
    """
    with contextlib.suppress(OSError):  # another system than Linux, or another C library
        for option, size in ((-1, 2**31 - 1), (-3, 2**30)):  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(option, size)


@contextlib.contextmanager
def stop_signals():
    """Yields the list stop_requests, which is empty until Ctrl-C, SIGTERM or SIGHUP asks this run to end."""
    stop_requests.clear()

    def on_signal(number, frame):
        if not stop_requests and RANK == 0:
            with contextlib.suppress(OSError):
                os.write(1, b"\nstopping: saves a checkpoint first\n")  # print must not interrupt a print
        stop_requests.append(number)
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun sends two SIGINTs
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C again stops at once

    with handle_signals(on_signal, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield stop_requests


@contextlib.contextmanager
def one_line_errors(out_dir: Path):
    """Turns a full disk, a full memory, a lost process, or what torch.compile lacks into one line."""
    try:
        yield
    except BrokenPipeError:  # as in `python train.py | head`
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        if WORLD_SIZE > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            print(f"process {RANK} ends because another process has ended", file=sys.stderr)
            os._exit(1)  # the other process prints the reason
        problem = one_line(error)
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            text = " ".join(str(error).split("\n\n")[0].split())
            problem = f"--compile does not work here ({text}): leave it out, or --compile=false"
        elif problem and problem.startswith("out of memory"):
            problem += (": try --accum_steps, a smaller --batch_size, a smaller model, "
                        "--mem_dtype=bfloat16, or on a CPU --mem_on_disk")
        if problem is None:
            raise
        last = checkpoints(out_dir)[-1:]
        hint = f"; after you fix this, --resume continues from {last[0]}" if last else ""
        raise OSError(problem + hint) from None


# --- log.jsonl ----------------------------------------------------------------------------------------------

class RunLog:
    """
    Prints the lines of a run, and writes out_dir/log.jsonl. Only the first process prints and writes, but all
    must call it: slot use is counted over all processes. tokens_per_step: in all processes together. start:
    the step of the checkpoint that the run resumed from, or 0.
    """

    def __init__(self, out_dir: Path, max_steps: int, tokens_per_step: int, model, optimizers: list,
                 start: int = 0):
        self.path, self.max_steps, self.tokens_per_step = out_dir / "log.jsonl", max_steps, tokens_per_step
        self.start, self.pool, self.optimizers = start, model.pool, optimizers
        self.skipped = 0 if model.pool is None else optimizers[1].skipped_steps
        if RANK == 0:
            lines = []
            if start and self.path.exists():
                whole = [line for line in read_json_lines(self.path) if type(line.get("step")) is int]
                lines = [line for line in whole if line["step"] <= start]  # the later ones are written again
                if broken := len(self.path.read_bytes().splitlines()) - len(whole):
                    print_once(f"lines of {self.path} that are damaged, and dropped: {broken}")
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            os.replace(temporary, self.path)
        self.began = self.since = time.perf_counter()
        self.done = start  # when the last line was printed; self.since is its time, moved on by pauses

    def print_start(self, dataset: str, train_tokens: int, device: str, model, checkpoint) -> None:
        """checkpoint: the one that the run resumed from, or None."""
        config, counts = model.config, model.count_parameters()
        layers = ",".join(map(str, config.mem_layers)) or "none"
        print_once(f"{dataset}: {train_tokens:,} tokens to train on; {self.max_steps:,} steps with "
                   f"{self.tokens_per_step:,} tokens each; device: {device}; processes: {WORLD_SIZE}\n"
                   f"GPT with {config.n_layer} blocks; memory layers: {layers}; "
                   f"kernel: {resolve_kernel(config.kernel, device)}\n"
                   f"{counts['dense']:,} dense parameters, {counts['memory']:,} in the pool; a token uses "
                   f"{counts['active']:,} of them, and {model.macs_per_token():,} multiply-adds")
        if checkpoint:
            end = ", the end of this run: choose a larger --max_steps to train longer"
            print_once(f"resumed from {checkpoint.folder}" + end * (self.start >= self.max_steps))

    def write(self, **line) -> None:
        if RANK == 0:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def pause(self):
        """The time in this `with` block is not time of training."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def print_line(self, step: int, text: str) -> None:
        print_once(f"step {step:{len(str(self.max_steps))}}/{self.max_steps}  {text}")

    def log_evaluation(self, step: int, measured: dict) -> None:
        text = f"validation loss {measured['val_loss']:.3f}"
        if "recall" in measured:
            text += f"  recall {measured['recall'].get('all', math.nan):.3f}"
        self.print_line(step, text)
        self.write(step=step, seconds=time.perf_counter() - self.began, **measured)

    def log_step(self, done: int, loss: float, lr: float) -> None:
        """done: steps done so far. loss: of the last of them. The device must have finished them."""
        now = time.perf_counter()
        speed = self.tokens_per_step * (done - self.done) / (now - self.since)
        self.since, self.done = now, done
        line = {"step": done, "loss": loss, "lr": lr, "tokens_per_second": speed}
        slots = ""
        if self.pool is not None:
            # slot use since the last evaluation
            line["slots_used"], line["kl_from_uniform"] = self.pool.usage.summary()
            slots = f"  slot use {evenness(line):.2f}"
            if (skipped := self.optimizers[1].skipped_steps) > self.skipped:
                print_once(f"the pool skipped {skipped - self.skipped} more steps, {skipped} so far: its "
                           "gradient was not finite. A lower --lr or --value_lr may help")
                line["skipped_steps"] = self.skipped = skipped
        self.write(**line)
        left = timedelta(seconds=round((now - self.began) / (done - self.start) * (self.max_steps - done)))
        self.print_line(done, f"loss {loss:.3f}{slots}  {speed / 1000:.1f}k tokens/s  {left} left")

    def end(self, device: str, note: str, keep_best: bool) -> None:
        """Draws the figure, and prints the time and the memory that the run took."""
        if RANK > 0:
            return
        out_dir = self.path.parent
        try:
            plot_run(out_dir, note)
        except Exception as error:  # the run itself is fine
            print(f"loss.png was not drawn: {' '.join(str(error).split())}")
        best = best_checkpoint(checkpoints(out_dir)) if keep_best else None
        took = timedelta(seconds=round(time.perf_counter() - self.began))  # 0:01:30
        print(f"took {took}; peak memory {peak_memory(device) / 2**30:.3f} GiB; the log, loss.png and the "
              f"checkpoints are in {out_dir}. Ask the model:\n"
              f"    python sample.py --out_dir={shlex.quote(str(best or out_dir))}", flush=True)


def evenness(measured: dict) -> float:
    """
    How evenly slots are used: exp(-KL), with the KL divergence of slot use from uniform use. 1: all slots are
    used equally. 1/n for n slots: only one slot is used (a collapsed memory). nan: nothing was read yet.
    """
    return math.exp(-measured["kl_from_uniform"]) if measured["slots_used"] else math.nan


# --- the last lines -----------------------------------------------------------------------------------------

def print_measured(measured: dict, data) -> None:
    """Prints the results of an evaluation. data: the Dataset."""
    loss = measured["val_loss"]
    text = f"validation loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}"
    if data.val_bytes:  # an older corpus does not tell
        text += f", {loss / math.log(2) * len(data.val) / data.val_bytes:.4f} bits per byte"
    print_once(text)
    if "recall" in measured:
        print_once("recall, the share of questions answered with exactly the right words:")
        for label, share in recall_rows(measured["recall"]).items():
            print_once(f"  {label:32} {share:.3f}  {'#' * round(40 * share)}")
    if data.note:
        print_once(data.note)


def recall_rows(shares: dict) -> dict[str, float]:
    """{label: share}: what evaluate.recall returns, with labels to print."""
    rows = {LABELS["all"] if "held_out" in shares else "all questions": shares.get("all")}
    for low, share in shares["by_exposure"].items():
        few = {"0": "never told", "1": "told once"}
        rows[f"  {few.get(low, f'told {low} to {2 * int(low) - 1} times')}"] = share
    rows[LABELS["held_out"]] = shares.get("held_out")
    return {label: share for label, share in rows.items() if share is not None}


def plot_run(out_dir: Path, note: str = "") -> None:
    """Draws loss, recall and slot use over the steps: log.jsonl -> loss.png. note: a sentence below them."""
    from matplotlib.figure import Figure  # only here, because it takes time and memory

    lines = read_json_lines(out_dir / "log.jsonl")
    evaluated = [line for line in lines if "val_loss" in line]

    def recall(name):
        return [(line["step"], line["recall"][name]) for line in evaluated if name in line.get("recall", {})]

    panels = {  # {y axis: {label: (step, y) of each point}}
        "loss (nats per token)": {
            "training": [(line["step"], line["loss"]) for line in lines if "loss" in line],
            "validation": [(line["step"], line["val_loss"]) for line in evaluated]},
        "recall (exact match)": {label: recall(name) for name, label in LABELS.items()},
        "slot use (1: all slots alike)": {
            "slots": [(line["step"], evenness(line)) for line in evaluated if line.get("slots_used")]}}
    panels = {name: curves for name, curves in panels.items() if any(curves.values())}
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, curves) in zip(axes, panels.items(), strict=True):
        for label, points in curves.items():
            if points:
                axis.plot(*zip(*points, strict=True), "-" if label == "training" else "o-", label=label)
        axis.set(xlabel="step", ylabel=name)
        if not name.startswith("loss"):
            axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.supxlabel(note, fontsize="small")
    figure.savefig(out_dir / "loss.png", dpi=120)
