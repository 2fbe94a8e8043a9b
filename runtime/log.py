"""
Prints the progress of a run, and writes log.jsonl and loss.png to its folder.
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
from runtime.checkpoint import best_checkpoint, cannot_go_on, checkpoints, step_of
from runtime.cli import fail, first_part, is_out_of_memory, python_command
from runtime.distributed import RANK, WORLD_SIZE

BUSY_CHECK_SECONDS = 10
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


def cpu_wait() -> float:
    """Seconds that threads of this process wanted to run, but found no free core. Linux only: otherwise 0."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has just ended
            total += int(path.read_text().split()[1])
    return total / 1e9


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

    # torchrun sends its processes a second SIGINT after one Ctrl-C
    second_stops_at_once = "TORCHELASTIC_RUN_ID" not in os.environ

    def on_signal(number, frame):
        if second_stops_at_once and number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        if not received and RANK == 0 and sys.stdout:  # None: closed by `>&-`
            with contextlib.suppress(OSError):
                os.write(1, b"\nstopping: this step is finished and saved first"
                         + b" (Ctrl-C again: stops at once)\n" * second_stops_at_once)
        received.append(number)

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
    except OSError as error:  # such as a full disk
        where = error.filename or "cannot write"
        cannot_go_on(Path(out_dir), f"{where}: {error.strerror or error}", alone=True)
    except (MemoryError, RuntimeError) as error:
        text = first_part(error)
        # another process has ended, and prints the reason
        if WORLD_SIZE > 1 and (isinstance(error, dist.DistError) or "gloo" in text):
            print(f"process {RANK} ends because another process has ended", file=sys.stderr)
            os._exit(1)
        if is_out_of_memory(error):
            problem = f"out of memory ({text}): try --accum_steps, a smaller --batch_size, or a smaller model"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            problem = f"--compile does not work here ({text}): leave it out, or --compile=false"
        else:
            raise
        cannot_go_on(Path(out_dir), problem, alone=True)


# --- log.jsonl ----------------------------------------------------------------------------------------------

class RunLog:
    """
    Prints a line every log_interval steps, and writes out_dir/log.jsonl. Only the first process prints and
    writes, but all must call it: slot use is counted over all processes. A `with` block closes the file.

    config: train.TrainConfig. start: the step of the checkpoint that the run resumed from, or 0. note: a
    sentence about the corpus, printed at the end of the run.
    """

    def __init__(self, config, start: int, model, optimizers: list, note: str = ""):
        self.config, self.start, self.pool, self.note = config, start, model.pool, note
        self.pool_optimizers = optimizers[1:]
        self.skipped_steps = self.count_skipped_steps()
        self.began = time.perf_counter()
        self.seconds, self.steps = 0.0, 0  # since the last printed line
        # idle threads of OpenMP do not sleep, so training suffers if other programs use the CPU
        has_idle_threads = torch.get_num_threads() > 1 and os.environ.get("OMP_WAIT_POLICY", "") != "PASSIVE"
        is_on_cpu = model.wte.weight.device.type == "cpu"
        self.checked, self.waited = self.began if is_on_cpu and has_idle_threads else math.inf, cpu_wait()
        self.step_width = len(str(config.max_steps))
        path = Path(config.out_dir) / "log.jsonl"
        if start and RANK == 0:
            trim_log(path, start)
        self.path = path if RANK == 0 else Path(os.devnull)
        self.file = open(self.path, "a" if start else "w", buffering=1)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(OSError):  # `write` has raised it already
            self.file.close()

    def write(self, **line) -> None:
        try:
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:  # such as a full disk
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def count_skipped_steps(self) -> int:
        return sum(optimizer.skipped_steps for optimizer in self.pool_optimizers)

    def print_line(self, step: int, text: str) -> None:
        print_once(f"step {step:{self.step_width}}/{self.config.max_steps}  {text}")

    def check_cpu(self) -> None:
        """Prints a line, once, if other programs use the CPU."""
        now = time.perf_counter()
        if now < self.checked + BUSY_CHECK_SECONDS:
            return
        waited = cpu_wait()
        if waited - self.waited > 0.3 * (now - self.checked):
            print_once("other programs use the CPU, which may make training several times slower. Start with "
                       "OMP_WAIT_POLICY=PASSIVE python train.py ... to lose less")
            now = math.inf
        self.checked, self.waited = now, waited

    def log_evaluation(self, step: int, measured: dict) -> None:
        text = f"validation loss {measured['val_loss']:.3f}"
        if "recall" in measured:
            text += f"  recall {measured['recall'].get('all', math.nan):.3f}"
        self.print_line(step, text)
        self.write(step=step, seconds=time.perf_counter() - self.began, **measured)

    def log_step(self, done: int, loss: float, lr: float, seconds: float) -> None:
        """After each step. done: steps done so far. seconds: the time of this step."""
        config = self.config
        self.check_cpu()
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        if done % config.log_interval and done < config.max_steps:
            return
        speed = config.batch_size * config.block_size * self.steps / self.seconds
        self.seconds, self.steps = 0.0, 0
        line = {"step": done, "loss": loss, "lr": lr, "tokens_per_second": speed}
        slots = ""
        if self.pool is not None:
            # slot use since the last evaluation
            line["slots_used"], line["kl_from_uniform"] = self.pool.usage.summary()
            slots = f"  slot use {evenness(line):.2f}"
        skipped_before, self.skipped_steps = self.skipped_steps, self.count_skipped_steps()
        if self.skipped_steps > skipped_before:
            line["skipped_steps"] = self.skipped_steps
            new = self.skipped_steps - skipped_before
            print_once(f"the pool skipped {new} {'step' if new == 1 else 'steps'}: its gradient was not "
                       f"finite ({self.skipped_steps} so far); a lower --lr or --value_lr may help")
        self.write(**line)
        left = (time.perf_counter() - self.began) / (done - self.start) * (config.max_steps - done)
        self.print_line(done, f"loss {loss:.3f}{slots}  {speed / 1000:.1f}k tokens/s  {duration(left)} left")

    def draw_missing_figure(self) -> None:
        if RANK == 0 and not (Path(self.config.out_dir) / "loss.png").exists():
            draw_run(Path(self.config.out_dir), self.note)

    def print_end(self, device: str, measured: dict) -> None:
        """Prints the results, draws the figure, and prints the time and the memory that the run took."""
        if RANK > 0:
            return
        out_dir = self.config.out_dir
        if "recall" in measured:
            print_recall(measured["recall"])
        if self.note:
            print(self.note)
        draw_run(Path(out_dir), self.note)
        best = best_checkpoint(checkpoints(Path(out_dir))) if self.config.keep_best else None
        pool_bytes = 0 if self.pool is None else self.pool.values.nbytes
        elapsed = duration(time.perf_counter() - self.began)
        print(f"{elapsed} {'since the run was resumed' if self.start else 'in all'}; "
              f"peak memory {peak_memory(device) / 2**30:.3f} GiB; the pool has {pool_bytes / 2**30:.3f} GiB")
        print(f"the log, the figure loss.png and the checkpoints are in {out_dir}. Ask the model:\n"
              f"    {python_command()} sample.py --out_dir={best or out_dir}", flush=True)


def evenness(measured: dict) -> float:
    """
    How evenly slots are used: exp(-KL), with the KL divergence of slot use from uniform use. 1: all slots are
    used equally. 1/n for n slots: only one slot is used (a collapsed memory). nan: nothing was read yet.
    """
    return math.exp(-measured["kl_from_uniform"]) if measured["slots_used"] else math.nan


def trim_log(path: Path, step: int) -> None:
    """Removes lines after `step`, which the resumed run writes again, and a line that was cut short."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


# --- the first and the last lines ---------------------------------------------------------------------------

def print_start(config, device: str, data, model, checkpoint: Path | None) -> None:
    counts = model.count_parameters()
    where = f"memory layers in {','.join(map(str, config.mem_layers))}" if config.mem_layers else "no memory"
    print_once(f"{config.dataset}: {len(data.train):,} tokens to train on; {config.max_steps:,} steps with "
               f"{config.batch_size * config.block_size:,} tokens each, on {device}"
               + (f", {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""))
    print_once(f"GPT with {config.n_layer} blocks, {where}; kernel: {resolve_kernel(config.kernel, device)}")
    print_once(f"{counts['dense']:,} dense parameters, {counts['memory']:,} in the pool; a token uses "
               f"{counts['active']:,} of them, and {config.macs_per_token():,} multiply-adds")
    if checkpoint:
        print_once(f"resumed from {checkpoint}" if step_of(checkpoint) < config.max_steps else
                   f"{checkpoint} is the end of this run. To ask it: {python_command()} sample.py --out_dir="
                   f"{config.out_dir}. To train longer, choose a larger --max_steps")


def print_measured(checkpoint: Path, data, measured: dict) -> None:
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


def import_matplotlib():
    """
    Imports matplotlib, also if MPLBACKEND names a backend that is not installed: a notebook sets it for all
    programs that it starts. A figure in a file needs no backend.
    """
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # as matplotlib does itself
    return matplotlib


def plot_run(out_dir: Path, note: str = "") -> None:
    """
    Draws loss, recall and slot use over the steps of a run: out_dir/log.jsonl -> out_dir/loss.png. note: a
    sentence below the figure.
    """
    matplotlib = import_matplotlib()  # only here, because it takes time and memory
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
    with matplotlib.rc_context(style):  # leaves pyplot and the user's settings as they are
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
            for name, marker in (("all", "o-"), ("held_out", "s--")):
                if name in evaluated[-1]["recall"]:
                    shares = [line.get("recall", {}).get(name) for line in evaluated]
                    axis.plot(steps, shares, marker, label=LABELS[name])
            axis.set(xlabel="step", ylabel="recall (exact match)", ylim=(0, 1.02))
            if "held_out" in evaluated[-1]["recall"]:
                axis.legend()
        if has_memory:
            axis = next(axes)
            # [1:], because nothing was read before step 0
            axis.plot(steps[1:], [evenness(line) for line in evaluated[1:]], "o-")
            axis.set(xlabel="step", ylabel="slot use (1: all slots alike)", ylim=(0, 1.02))
        figure.supxlabel(note, fontsize="small")
        temporary = out_dir / ".loss.png"
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, out_dir / "loss.png")
