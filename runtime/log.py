"""
What a run prints, and what it leaves in its folder beside the checkpoints: log.jsonl and loss.png.
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
from runtime.checkpoint import cannot_go_on, step_of
from runtime.cli import fail
from runtime.distributed import RANK, WORLD_SIZE


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
    """The most bytes that the process has held at once; on CUDA, that torch has held on the device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def stop_signals():
    """
    Yields a list, which is empty until Ctrl-C or SIGTERM asks the process to end. Python handles signals in
    its main thread only, so in any other thread the list stays empty.
    """
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number, frame):
        if not received and RANK == 0:
            os.write(1, b"\nasked to stop: saving after this step\n")
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that is not Python's


@contextlib.contextmanager
def one_line_errors(out_dir: str):
    """For the command line: what can end a run that is no mistake in the options and no bug."""
    try:
        yield
    except KeyboardInterrupt:  # outside of the steps, where stop_signals waits for it
        print_once("\nstopped")
        raise SystemExit(130) from None
    except OSError as error:  # such as a full disk
        where = error.filename or out_dir
        cannot_go_on(Path(out_dir), f"{where}: {error.strerror or error}", alone=True)
    except RuntimeError as error:
        # this process has lost another one, which says itself why it ended
        if WORLD_SIZE > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            print(f"process {RANK} ends, having lost another", file=sys.stderr)
            os._exit(1)
        raise


# --- log.jsonl ----------------------------------------------------------------------------------------------

class RunLog:
    """
    Prints a line every log_interval steps, and writes out_dir/log.jsonl. All processes call it, as the use of
    a pool is counted over all of them; the first one prints and writes. A `with` statement closes the file.

    config: train.TrainConfig. start: the step of the checkpoint that the run resumed from, or 0.
    """

    def __init__(self, config, start: int, model, optimizers: list):
        self.config, self.start, self.pool = config, start, model.pool
        self.pool_optimizers = optimizers[1:]
        self.skipped_steps = self.count_skipped_steps()
        self.began, self.seconds, self.steps, self.evaluation = time.perf_counter(), 0.0, 0, ""
        path = Path(config.out_dir) / "log.jsonl"
        if start and RANK == 0:
            trim_log(path, start)
        self.file = open(path if RANK == 0 else os.devnull, "a" if start else "w", buffering=1)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, **line) -> None:
        self.file.write(json.dumps(line) + "\n")

    def count_skipped_steps(self) -> int:
        return sum(optimizer.skipped_steps for optimizer in self.pool_optimizers)

    def evaluated(self, step: int, measured: dict) -> None:
        self.evaluation = f"  val {measured['val_loss']:.3f}"
        if "recall" in measured:
            self.evaluation += f"  recall {measured['recall'].get('all', math.nan):.3f}"
        self.write(step=step, seconds=time.perf_counter() - self.began, **measured)

    def trained(self, done: int, loss: float, lr: float, seconds: float) -> None:
        """After each step. done: steps done so far. seconds: the time of this step."""
        config = self.config
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        if done % config.log_interval and done < config.max_steps:
            return
        speed = config.batch_size * config.block_size * self.steps / self.seconds
        self.seconds, self.steps = 0.0, 0
        line, slots = {"step": done, "loss": loss, "lr": lr, "tokens_per_second": speed}, ""
        if self.pool is not None:
            line["slots_used"], line["kl_from_uniform"] = self.pool.usage.summary()
            slots = f"  slots {line['slots_used']:.3f}"
        skipped_before, self.skipped_steps = self.skipped_steps, self.count_skipped_steps()
        if self.skipped_steps > skipped_before:
            line["skipped_steps"] = self.skipped_steps
            new = self.skipped_steps - skipped_before
            print_once(f"the pool skipped {new} {'step' if new == 1 else 'steps'}, as its gradient was not "
                       f"finite ({self.skipped_steps} so far); a lower --lr or --value_lr may help")
        self.write(**line)
        left = (time.perf_counter() - self.began) / (done - self.start) * (config.max_steps - done)
        width = len(str(config.max_steps))
        print_once(f"step {done:{width}}/{config.max_steps}  loss {loss:.3f}{self.evaluation}{slots}  "
                   f"{speed / 1000:.1f}k tokens/s  {duration(left)} left")

    def finished(self, device: str, measured: dict) -> None:
        """Prints the results, draws the figure, and says what the run took."""
        if RANK > 0:
            return
        out_dir = self.config.out_dir
        print_result(measured)
        try:
            plot_run(Path(out_dir))
        except (ImportError, ValueError) as error:  # matplotlib does not import if MPLBACKEND is wrong
            print(f"loss.png was not drawn: {error}")
        pool = 0 if self.pool is None else self.pool.values.nbytes
        took = duration(time.perf_counter() - self.began)
        print(f"{took} {'since it resumed' if self.start else 'in all'}; "
              f"peak memory {peak_memory(device) / 2**30:.3f} GiB; the pool has {pool / 2**30:.3f} GiB")
        print(f"log, figure and checkpoints are in {out_dir}; "
              f"next: python sample.py --out_dir={out_dir}", flush=True)


def trim_log(path: Path, step: int) -> None:
    """Removes the lines after `step`, which the run will write again, and a line that was cut short."""
    kept = []
    for line in open(path, encoding="utf-8") if path.exists() else ():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


# --- the first and the last lines ---------------------------------------------------------------------------

def print_start(config, device: str, data, model, checkpoint: Path | None) -> None:
    counts = model.count_parameters()
    where = ",".join(map(str, config.mem_layers)) or "none"
    print_once(f"{config.dataset}: {len(data.train):,} tokens to train on; {config.max_steps:,} steps with "
               f"{config.batch_size * config.block_size:,} tokens each, on {device}"
               + (f", {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""))
    print_once(f"GPT with {config.n_layer} blocks, memory in {where}; parameters: {counts['dense']:,} dense, "
               f"{counts['memory']:,} memory, {counts['active']:,} active per token; "
               f"kernel: {resolve_kernel(config.kernel, device)}")
    if checkpoint:
        print_once(f"resumed from {checkpoint}" if step_of(checkpoint) < config.max_steps else
                   f"{checkpoint} is the end of this run: choose a larger --max_steps, or another --out_dir")


def print_result(measured: dict) -> None:
    print(f"validation loss {measured['val_loss']:.4f}")
    if "recall" in measured:
        print("recall, the share of questions answered with exactly the right words:")
        shares = measured["recall"]
        first = "people asked about in training" if "held_out" in shares else "all questions"
        rows = {first: shares.get("all"), "people only stated in training": shares.get("held_out")}
        for low, share in shares["by_exposure"].items():
            rows[f"  told {low} to {2 * int(low) - 1} times"] = share
        for label, share in rows.items():
            if share is not None:
                print(f"  {label:32} {share:.3f}  {'#' * round(40 * share)}")


def plot_run(out_dir: Path) -> None:
    """Loss, recall and slot use over the steps of a run: out_dir/log.jsonl -> out_dir/loss.png."""
    import matplotlib  # here, as it takes time and memory
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in open(out_dir / "log.jsonl", encoding="utf-8")]
    trained = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "val_loss" in line]
    if not evaluated:
        fail(f"{out_dir / 'log.jsonl'} has no evaluation yet")
    has_recall, has_memory = "recall" in evaluated[-1], "slots_used" in evaluated[-1]
    panels = 1 + has_recall + has_memory
    style = {"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3,
             "legend.frameon": False}
    with matplotlib.rc_context(style):  # neither pyplot nor the user's own settings are touched
        figure = Figure(figsize=(4.5 * panels, 3.5), layout="constrained")
        axes = iter(figure.subplots(1, panels, squeeze=False)[0])

        axis = next(axes)
        steps = [line["step"] for line in evaluated]
        axis.plot([line["step"] for line in trained], [line["loss"] for line in trained], label="training")
        axis.plot(steps, [line["val_loss"] for line in evaluated], "o-", label="validation")
        axis.set(xlabel="step", ylabel="loss (nats per token)")
        axis.legend()
        if has_recall:
            axis = next(axes)
            for name, label, style in (("all", "people asked about in training", "o-"),
                                       ("held_out", "people only stated in training", "s--")):
                if name in evaluated[-1]["recall"]:
                    shares = [line.get("recall", {}).get(name) for line in evaluated]
                    axis.plot(steps, shares, style, label=label)
            axis.set(xlabel="step", ylabel="recall (exact match)", ylim=(0, 1.02))
            if "held_out" in evaluated[-1]["recall"]:
                axis.legend()
        if has_memory:
            axis = next(axes)
            axis.plot(steps[1:], [line["slots_used"] for line in evaluated[1:]], "o-")
            axis.set(xlabel="step", ylabel="share of slots read since last evaluation", ylim=(0, 1.02))
        figure.savefig(out_dir / "loss.png", dpi=120)
