"""
Prints the progress of a run, and writes log.jsonl and loss.png to its folder. Here is also what else a run
needs around its loop: signals that stop it, and errors as one line.
"""

import contextlib
import json
import math
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from kernel import resolve_kernel
from runtime.checkpoint import Checkpoint, best_checkpoint, cannot_go_on, checkpoints
from runtime.cli import fail, one_line, python_command, read_json_lines
from runtime.distributed import RANK, WORLD_SIZE

LABELS = {"all": "asked about in training", "held_out": "never asked about in training"}


def print_once(line: str) -> None:
    """Only the first process prints."""
    if RANK == 0:
        print(line, flush=True)


def duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s"


def peak_memory(device: str) -> int:
    """Peak memory in bytes: of torch on the GPU, or of the process if the device is a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def stop_signals():
    """
    Yields a list, which stays empty until Ctrl-C or SIGTERM asks the process to end. Python handles signals
    only in its main thread, so in other threads the list is always empty.
    """
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # it sends a second SIGINT after one Ctrl-C

    def on_signal(number, frame):
        if not received and RANK == 0 and sys.stdout:  # None: closed by `>&-`
            with contextlib.suppress(OSError):
                until = "this step" if WORLD_SIZE == 1 else "all until the next line of the log"
                again = " (Ctrl-C again: stops at once)" * (not by_torchrun)
                os.write(1, f"\nstopping: {until} is finished and saved first{again}".encode())
        received.append(number)
        if number == signal.SIGINT and not by_torchrun:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    old_handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: the old handler was not set by Python


@contextlib.contextmanager
def one_line_errors(out_dir: str):
    """Turns a full disk, a full memory, a lost process, or what torch.compile lacks into one line."""
    try:
        yield
    except BrokenPipeError:  # as in `python train.py | head`
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        # another process has ended, and prints the reason
        if WORLD_SIZE > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            print(f"process {RANK} ends because another process has ended", file=sys.stderr)
            os._exit(1)
        problem = one_line(error)
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            text = " ".join(str(error).split("\n\n")[0].split())
            problem = f"--compile does not work here ({text}): leave it out, or --compile=false"
        elif problem and not isinstance(error, OSError):
            problem += ": try --accum_steps, a smaller --batch_size, a smaller model, or --mem_on_disk"
        if problem is None:
            raise
        cannot_go_on(Path(out_dir), problem, alone=True)


# --- log.jsonl ----------------------------------------------------------------------------------------------

class RunLog:
    """
    Prints the lines of a run, and writes out_dir/log.jsonl. Only the first process prints and writes, but all
    must call it: slot use is counted over all processes.

    tokens_per_step: in all processes together. start: the step of the checkpoint that the run resumed from,
    or 0.
    """

    def __init__(self, out_dir: str, max_steps: int, tokens_per_step: int, model, optimizers: list,
                 start: int = 0):
        self.out_dir, self.max_steps, self.tokens_per_step = Path(out_dir), max_steps, tokens_per_step
        self.start, self.pool, self.pool_optimizers = start, model.pool, optimizers[1:]
        self.path = self.out_dir / "log.jsonl"
        lines = [line for line in read_json_lines(self.path) if start and line["step"] <= start]
        self.skipped_told = max((line.get("skipped_steps", 0) for line in lines), default=0)
        if RANK == 0:  # a resumed run writes the later lines again
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            os.replace(temporary, self.path)
        self.began = self.since = time.perf_counter()
        self.done = start  # when the last line was printed; self.since is its time, moved on by pauses

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
        skipped = sum(optimizer.skipped_steps for optimizer in self.pool_optimizers)
        if (new := skipped - self.skipped_told) > 0:
            line["skipped_steps"] = self.skipped_told = skipped
            print_once(f"the pool skipped {new} {'step' if new == 1 else 'steps'}: its gradient was not "
                       f"finite ({skipped} so far); a lower --lr or --value_lr may help")
        self.write(**line)
        left = (now - self.began) / (done - self.start) * (self.max_steps - done)
        self.print_line(done, f"loss {loss:.3f}{slots}  {speed / 1000:.1f}k tokens/s  {duration(left)} left")

    def end(self, device: str, note: str, measured: dict, keep_best: bool) -> None:
        """Prints the results, draws the figure, and prints the time and the memory that the run took."""
        if RANK > 0:
            return
        if self.start >= self.max_steps:  # this run had ended before: only its figure may be missing
            if not (self.out_dir / "loss.png").exists():
                draw_run(self.out_dir, note)
            return
        if "recall" in measured:
            print_recall(measured["recall"])
        if note:
            print(note)
        draw_run(self.out_dir, note)
        best = best_checkpoint(checkpoints(self.out_dir)) if keep_best else None
        pool_bytes = 0 if self.pool is None else self.pool.values.nbytes
        elapsed = duration(time.perf_counter() - self.began)
        print(f"{elapsed} {'since the run was resumed' if self.start else 'in all'}; "
              f"peak memory {peak_memory(device) / 2**30:.3f} GiB; the pool has {pool_bytes / 2**30:.3f} GiB")
        print(f"the log, the figure loss.png and the checkpoints are in {self.out_dir}. Ask the model:\n"
              f"    {python_command()} sample.py --out_dir={best or self.out_dir}", flush=True)


def evenness(measured: dict) -> float:
    """
    How evenly slots are used: exp(-KL), with the KL divergence of slot use from uniform use. 1: all slots are
    used equally. 1/n for n slots: only one slot is used (a collapsed memory). nan: nothing was read yet.
    """
    return math.exp(-measured["kl_from_uniform"]) if measured["slots_used"] else math.nan


# --- the first and the last lines ---------------------------------------------------------------------------

def print_start(dataset: str, train_tokens: int, device: str, model, log: RunLog,
                checkpoint: Checkpoint | None) -> None:
    config, counts = model.config, model.count_parameters()
    where = f"memory layers in {','.join(map(str, config.mem_layers))}" if config.mem_layers else "no memory"
    print_once(f"{dataset}: {train_tokens:,} tokens to train on; {log.max_steps:,} steps with "
               f"{log.tokens_per_step:,} tokens each, on {device}"
               + (f", {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""))
    print_once(f"GPT with {config.n_layer} blocks, {where}; kernel: {resolve_kernel(config.kernel, device)}")
    print_once(f"{counts['dense']:,} dense parameters, {counts['memory']:,} in the pool; a token uses "
               f"{counts['active']:,} of them, and {model.macs_per_token():,} multiply-adds")
    if checkpoint:
        print_once(f"resumed from {checkpoint}" if log.start < log.max_steps else
                   f"{checkpoint} is the end of this run. To ask it: {python_command()} sample.py --out_dir="
                   f"{log.out_dir}. To train longer, choose a larger --max_steps")


def print_measured(checkpoint: Checkpoint, data, measured: dict) -> None:
    """What --eval_only prints. data: the Dataset."""
    loss = measured["val_loss"]
    text = f"{checkpoint}: validation loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}"
    if data.val_bytes:  # an older corpus does not tell
        text += f", {loss / math.log(2) * len(data.val) / data.val_bytes:.4f} bits per byte"
    print_once(text)
    if "recall" in measured and RANK == 0:
        print_recall(measured["recall"])


def print_recall(shares: dict) -> None:
    """shares: what evaluate.recall returns."""
    print("recall, the share of questions answered with exactly the right words:")
    for label, share in recall_rows(shares).items():
        print(f"  {label:32} {share:.3f}  {'#' * round(40 * share)}")


def recall_rows(shares: dict) -> dict[str, float]:
    """{label: share}: what evaluate.recall returns, with labels to print."""
    rows = {LABELS["all"] if "held_out" in shares else "all questions": shares.get("all")}
    for low, share in shares["by_exposure"].items():
        rows[f"  told {low} to {2 * int(low) - 1} times" if low != "1" else "  told at most once"] = share
    rows[LABELS["held_out"]] = shares.get("held_out")
    return {label: share for label, share in rows.items() if share is not None}


def draw_run(out_dir: Path, note: str = "") -> None:
    """plot_run, but a figure that cannot be drawn is one printed line: the run itself is fine."""
    try:
        plot_run(out_dir, note)
    except Exception as error:
        print_once(f"loss.png was not drawn: {' '.join(str(error).split())}")


def plot_run(out_dir: Path, note: str = "") -> None:
    """
    Draws loss, recall and slot use over the steps of a run: out_dir/log.jsonl -> out_dir/loss.png. note: a
    sentence below the figure.
    """
    import matplotlib  # only here, because it takes time and memory
    from matplotlib.figure import Figure

    lines = read_json_lines(out_dir / "log.jsonl")
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "val_loss" in line]
    if not evaluated:
        fail(f"{out_dir / 'log.jsonl'} has no evaluation yet")
    steps, last = [line["step"] for line in evaluated], evaluated[-1]
    # panels: (y axis, curves), and each curve: (label, style, x, y)
    panels = [("loss (nats per token)", [
        ("training", "-", [line["step"] for line in trained], [line["loss"] for line in trained]),
        ("validation", "o-", steps, [line["val_loss"] for line in evaluated])])]
    if "recall" in last:
        panels.append(("recall (exact match)", [
            (LABELS[name], style, steps, [line.get("recall", {}).get(name) for line in evaluated])
            for name, style in (("all", "o-"), ("held_out", "s--")) if name in last["recall"]]))
    if "slots_used" in last:  # [1:], because nothing was read before step 0
        panels.append(("slot use (1: all slots alike)", [
            ("", "o-", steps[1:], [evenness(line) for line in evaluated[1:]])]))
    style = {"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3,
             "legend.frameon": False}
    with matplotlib.rc_context(style):  # leaves pyplot and the user's settings as they are
        figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (ylabel, curves) in zip(axes, panels, strict=True):
            for label, marker, x, y in curves:
                axis.plot(x, y, marker, label=label)
            axis.set(xlabel="step", ylabel=ylabel)
            if "loss" not in ylabel:
                axis.set_ylim(0, 1.02)
            if len(curves) > 1:
                axis.legend()
        figure.supxlabel(note, fontsize="small")
        temporary = out_dir / ".loss.png"
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, out_dir / "loss.png")
