"""
Trains a GPT with memory layers.

    python train.py                                 generated facts, five to eight minutes on two cores
    python train.py --preset=stdlib                 source text of the Python standard library
    python train.py --mem_layers= --out_dir=out/dense   the same GPT without memory
    python train.py --resume                        goes on from the newest checkpoint of --out_dir
    torchrun --nproc_per_node=2 train.py            the same run on two processes, half of the pool in each
    python train.py --help                          every option

Ctrl-C saves a checkpoint and ends.

Leaves in --out_dir: log.jsonl (a JSON line a log step and an evaluation), loss.png, and a folder a
checkpoint.
"""

import contextlib
import json
import math
import os
import random
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import distributed
from checkpoint import (
    cannot_go_on,
    checkpoints,
    find_checkpoint,
    load_model,
    load_optimizers,
    read_meta,
    save_checkpoint,
    step_of,
)
from config import at_least, build, fail, parse
from distributed import LOCAL_RANK, RANK, WORLD_SIZE, all_reduce_sum, gather_objects
from evaluate import Dataset, draw_batch, recall, validation_loss
from kernel import resolve_kernel
from model import GPT, GPTConfig


@dataclass
class TrainConfig(GPTConfig):
    mem_layers: tuple[int, ...] = (0, 1)  # blocks with a memory layer, counted from 0; none: a dense GPT
    dataset: str = "facts"  # the folder under data/
    out_dir: str = "out/facts"  # where the log, the figure and the checkpoints go
    resume: bool = False  # go on from the newest checkpoint of out_dir, if there is one
    seed: int = 1  # of the weights, the batches and dropout
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    compile: bool = False  # torch.compile the model: a slow start, faster steps
    mem_group_size: int = 0  # processes that share the pool's columns; 0: all of them
    mem_file: str = ""  # a file for the pool's values, on the CPU, so that they may be larger than memory

    batch_size: int = 16  # sequences a step, of all processes
    accum_steps: int = 1  # parts of a batch, worked through in turn; same result, but for dropout and MoE
    max_steps: int = 3000  # steps in all
    lr: float = 3e-3  # of the dense parameters, at its highest
    value_lr: float = 6e-2  # of the pool; decisive: near lr there is little gain. Good with adam: 2e-2
    value_optimizer: Literal["rowwise", "adam"] = "rowwise"  # value_blocks of state a row, or 2 a parameter
    value_blocks: int = 8  # rowwise: second moments a row
    value_stochastic_rounding: bool = False  # of a bfloat16 pool, so that small steps are not rounded away
    warmup_steps: int = 100  # of the learning rates, linear
    min_lr: float = 0.1  # share of its highest that each learning rate ends at, by a cosine
    weight_decay: float = 0.1  # of dense matrices; the pool has none
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.99  # of AdamW
    grad_clip: float = 1.0  # highest norm of the dense gradient; 0: any

    log_interval: int = 50  # steps between log lines
    eval_interval: int = 500  # steps between evaluations, each followed by a checkpoint
    eval_batches: int = 20  # batches of val.bin an evaluation
    eval_questions: int = 1000  # questions an evaluation, if there is qa.jsonl; the last one asks all
    keep: int = 2  # checkpoints that stay

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "batch_size", "accum_steps", "max_steps", "log_interval", "eval_interval",
                 "eval_batches", "eval_questions", "keep", "value_blocks")
        at_least(0, self, "mem_group_size", "lr", "value_lr", "warmup_steps", "min_lr", "weight_decay",
                 "grad_clip", "seed")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} must be below 2**32")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.batch_size % self.accum_steps:
            raise ValueError(f"accum_steps={self.accum_steps} must divide batch_size={self.batch_size}")
        if self.mem_layers and self.value_optimizer == "rowwise" and self.n_embd % self.value_blocks:
            raise ValueError(f"value_blocks={self.value_blocks} must divide n_embd={self.n_embd}")
        if self.value_stochastic_rounding and self.mem_dtype != "bfloat16":
            raise ValueError("value_stochastic_rounding is for --mem_dtype=bfloat16")


PRESETS = {
    "facts": {},
    "stdlib": dict(dataset="stdlib", out_dir="out/stdlib", block_size=256, n_layer=4, n_embd=128,
                   mem_layers=(1, 3), mem_num_keys=256, batch_size=8, max_steps=2000, lr=2e-3),
}


def find_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        fail("--device=cuda: torch finds no CUDA device; use --device=cpu, or install a CUDA build of torch")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def say(line: str) -> None:
    if RANK == 0:
        print(line, flush=True)


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the highest learning rate: linear warm-up, then a cosine down to min_lr."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s"


def check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        fail(f"the loss is {loss} at step {step}: training has diverged; lower --lr or --value_lr")


def peak_memory(device: str) -> int:
    """Bytes: the most that the process (on CUDA: torch, on the device) has held at once."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trim_log(path: Path, step: int) -> None:
    """Leaves out what was logged after `step`, as it comes again, and a line that was cut short."""
    kept = []
    for line in open(path, encoding="utf-8") if path.exists() else ():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def stop_signals():
    """Yields a list that is no longer empty once the process was asked to end, by Ctrl-C or SIGTERM."""
    received = []

    def note(number, frame):
        if not received and RANK == 0:
            os.write(1, b"\nasked to stop: saving after this step\n")
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_model(config: TrainConfig, draw_pool: bool) -> GPT:
    """The model with its share of the pool, on the CPU; the same weights however many processes there are."""
    group_size = config.mem_group_size or WORLD_SIZE
    if WORLD_SIZE % group_size:
        fail(f"--mem_group_size={group_size} must divide the number of processes, {WORLD_SIZE}")
    if config.mem_layers and config.n_embd % group_size:
        fail(f"--n_embd={config.n_embd} must be a multiple of {group_size}, the processes that share it")
    file = None
    if config.mem_file:
        file = config.mem_file + (f".{RANK}of{WORLD_SIZE}" if WORLD_SIZE > 1 else "")
    torch.manual_seed(config.seed)
    sharding, model, problem = distributed.make_sharding(group_size), None, None
    try:
        # a file of this very run may be drawn anew; any other may be in use
        own = not draw_pool or config.resume and (Path(config.out_dir) / "log.jsonl").exists()
        if file and Path(file).exists() and not own:
            raise ValueError(f"mem_file={file} is there already: delete it, or choose another")
        model = GPT(config, sharding, file, draw_pool)
    except ValueError as error:
        problem = f"--{error}"
    except (OSError, RuntimeError) as error:
        if not file and "alloc" not in str(error):
            raise
        what = f"--mem_file={file}" if file else "too large a model; --mem_file holds the pool in a file"
        problem = f"{what}: {str(error).splitlines()[0]}"
    if said := next(filter(None, gather_objects(problem)), None):
        fail(said)
    return model


def train(config: TrainConfig, found: Path | None = None) -> None:
    """found: the checkpoint to go on from."""
    device = find_device(config.device)
    try:
        kernel = resolve_kernel(config.kernel, device)
    except ValueError as error:
        fail(f"--{error}")
    if config.mem_file and device != "cpu":
        fail("--mem_file is for --device=cpu: a GPU holds the pool in its own memory")
    if config.mem_file and not config.mem_layers:
        fail("--mem_file is for a pool, and without --mem_layers there is none")
    parts = WORLD_SIZE * config.accum_steps
    if config.batch_size % parts:
        fail(f"--batch_size={config.batch_size} must be a multiple of {parts}: {WORLD_SIZE} processes and "
             f"{config.accum_steps} parts each")
    out_dir = Path(config.out_dir)
    if found is None and checkpoints(out_dir):
        refuse(checkpoints(out_dir)[-1])
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out_dir={out_dir}: {error.strerror}")

    # data; where it has to be made, by one process of each machine, and by one of all where they share a disk
    data = None
    for has_turn in (RANK == 0, LOCAL_RANK == 0, True):
        data = data or (Dataset(config.dataset) if has_turn else None)
        gather_objects(None)
    sizes = gather_objects((data.encoding_json, len(data.train), len(data.val), len(data.questions)))
    if any(size != sizes[0] for size in sizes):
        fail(f"{config.dataset} differs between machines: copy data/{config.dataset} from one to the others")
    if found and read_meta(found)["encoding"] != data.encoding_json:
        fail(f"{config.dataset} has other tokens than {found} was trained on; choose another --out_dir")
    needed = data.encoding.n_vocab
    config.vocab_size = config.vocab_size or needed
    if config.vocab_size < needed:
        fail(f"--vocab_size={config.vocab_size} is too small: {config.dataset} has {needed} tokens")
    for split, tokens in (("train", data.train), ("val", data.val)):
        if len(tokens) <= config.block_size:
            fail(f"--block_size={config.block_size} is too large: {split}.bin has only {len(tokens)} tokens")

    # model and optimisers; the raw model stays at hand for saving, evaluating and sampling
    model = make_model(config, draw_pool=found is None)
    if found:
        load_model(found, model)
    model.to(device)
    try:
        optimizers = model.optimizers(
            lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
            value_lr=config.value_lr, kind=config.value_optimizer, value_blocks=config.value_blocks,
            stochastic_rounding=config.value_stochastic_rounding, seed=config.seed)
    except ValueError as error:
        fail(f"--{error}")
    dense = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model) if config.compile else model
    parallel = compiled
    if WORLD_SIZE > 1:  # all have built the same model: nothing to send. The pool has no gradient to reduce
        parallel = DistributedDataParallel(compiled, init_sync=False, forward_sync_buffers=False,
                                           gradient_as_bucket_view=True)
    autocast = torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()

    # where to start
    start = 0
    log_path = out_dir / "log.jsonl"
    if found:
        load_optimizers(found, model, optimizers)
        start = step_of(found)
        if RANK == 0:
            trim_log(log_path, start)
    log_file = open(log_path if RANK == 0 else os.devnull, "a" if found else "w", buffering=1)

    counts = model.count_parameters()
    tokens_per_step = config.batch_size * config.block_size
    processes = f", {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
    say(f"{config.dataset}: {len(data.train):,} tokens to train on; {config.max_steps:,} steps of "
        f"{tokens_per_step:,} tokens, on {device}{processes}")
    where = ",".join(map(str, config.mem_layers)) or "none"
    say(f"GPT of {config.n_layer} blocks, memory in {where}; parameters: {counts['dense']:,} dense, "
        f"{counts['memory']:,} memory, {counts['active']:,} active a token; kernel: {kernel}")
    if found:
        say(f"resumed from {found}" if start < config.max_steps else
            f"{found} is the end of this run: choose a larger --max_steps, or another --out_dir")

    model.train()
    some_questions = random.Random(config.seed).sample(
        data.questions, min(config.eval_questions, len(data.questions)))
    last_eval, latest = {}, ""
    began, spent, steps_spent = time.perf_counter(), 0.0, 0
    stopping = False
    with stop_signals() as received:
        for step in range(start, config.max_steps + 1):
            last_step = step == config.max_steps
            due = last_step or step % config.eval_interval == 0

            if due and (step > start or not found):
                with autocast:
                    last_eval = {"val_loss": validation_loss(compiled, data.val, config, device)}
                    latest = f"  val {last_eval['val_loss']:.3f}"
                    if data.questions:
                        questions = data.questions if last_step else some_questions
                        last_eval["recall"] = recall(model, data.encoding, questions)
                        latest += f"  recall {last_eval['recall'].get('all', math.nan):.3f}"
                if model.pool is not None:
                    last_eval["slots_used"], last_eval["kl_from_uniform"] = model.pool.usage.summary()
                    model.pool.usage.reset()
                check_finite(last_eval["val_loss"], step)  # before it is saved in the place of a good one
                line = {"step": step, "seconds": time.perf_counter() - began, **last_eval}
                log_file.write(json.dumps(line) + "\n")
            if (due or stopping) and step > start:
                meta = {"config": asdict(config), "encoding": data.encoding_json}
                save_checkpoint(out_dir, step, model, optimizers, meta, config.keep)
            if last_step or stopping:
                break

            # --- the timed part of a step
            if device == "cuda":
                torch.cuda.synchronize()
            t0 = time.perf_counter()
            torch.manual_seed(config.seed * 1_000_003 + step * WORLD_SIZE + RANK)  # of dropout
            for optimizer in optimizers:
                optimizer.zero_grad()
            x, y = (part.to(device) for part in draw_batch(data.train, config.batch_size, config.block_size,
                                                           config.seed, 0, step))
            totals = torch.zeros(2, device=device)  # of the loss, and of the signals to stop
            micro_batches = zip(x.chunk(config.accum_steps), y.chunk(config.accum_steps), strict=True)
            for i, (micro_x, micro_y) in enumerate(micro_batches):
                wait = WORLD_SIZE > 1 and i + 1 < config.accum_steps  # gradients are reduced once, at the end
                with parallel.no_sync() if wait else contextlib.nullcontext():
                    with autocast:
                        micro_loss = parallel(micro_x, micro_y)[1] / config.accum_steps
                    micro_loss.backward()
                totals[0] += micro_loss.detach()
            if config.grad_clip:
                torch.nn.utils.clip_grad_norm_(dense, config.grad_clip)
            for optimizer, lr in zip(optimizers, (config.lr, config.value_lr), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = lr * schedule(step, config)
                optimizer.step()
            totals[1] = len(received)
            loss, stopping = all_reduce_sum(totals).tolist()  # waits for the device
            loss /= WORLD_SIZE
            spent, steps_spent = spent + time.perf_counter() - t0, steps_spent + 1
            # --- end of the timed part

            done = step + 1
            check_finite(loss, step)
            if done % config.log_interval == 0 or done == config.max_steps:
                speed = tokens_per_step * steps_spent / spent
                spent, steps_spent = 0.0, 0
                line = {"step": done, "loss": loss, "lr": config.lr * schedule(step, config),
                        "tokens_per_second": speed}
                slots = ""
                if model.pool is not None:
                    line["slots_used"], line["kl_from_uniform"] = model.pool.usage.summary()
                    slots = f"  slots {line['slots_used']:.3f}"
                log_file.write(json.dumps(line) + "\n")
                left = (time.perf_counter() - began) / (done - start) * (config.max_steps - done)
                width = len(str(config.max_steps))
                say(f"step {done:{width}}/{config.max_steps}  loss {loss:.3f}{latest}{slots}  "
                    f"{speed / 1000:.1f}k tokens/s  {duration(left)} left")

    if stopping and step < config.max_steps:
        say(f"stopped after step {step}, saved in {out_dir}; --resume goes on from there")
    elif start < config.max_steps and RANK == 0:
        print_result(last_eval)
        from plot import plot_run  # here, as matplotlib takes its time and memory
        plot_run(out_dir)
        pool = 0 if model.pool is None else model.pool.values.nbytes
        took = f"{duration(time.perf_counter() - began)} {'since it resumed' if found else 'in all'}"
        say(f"{took}; peak memory {peak_memory(device) / 2**30:.3f} GiB; the pool has {pool / 2**30:.3f} GiB")
        say(f"log, figure and checkpoints are in {out_dir}; next: python sample.py --out_dir={out_dir}")


def print_result(result: dict) -> None:
    print(f"validation loss {result['val_loss']:.4f}")
    if "recall" in result:
        print("recall, the share of questions answered by exactly the right words:")
        shares = result["recall"]
        first = "people asked about in training" if "held_out" in shares else "all questions"
        rows = {first: shares.get("all"), "people only stated in training": shares.get("held_out")}
        for low, share in shares["by_exposure"].items():
            rows[f"  told {low} to {2 * int(low) - 1} times"] = share
        for label, share in rows.items():
            if share is not None:
                print(f"  {label:32} {share:.3f}  {'#' * round(40 * share)}")


def refuse(there: Path) -> None:
    fail(f"{there} is there already: go on from it with --resume, or choose another --out_dir")


def stored_config(meta: dict) -> TrainConfig:
    """Of a checkpoint."""
    try:
        return TrainConfig(**meta["config"])
    except (TypeError, ValueError) as error:
        fail(f"the checkpoint is of another version of nanoPKM: {error}")


def main(argv: list[str] | None = None) -> None:
    preset, given = parse(TrainConfig, argv, PRESETS, description=__doc__)
    config = build(TrainConfig, preset | given)
    try:
        distributed.start(find_device(config.device))
        # a process that torchrun --max-restarts started again goes on, and all others with it ...
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        resume, config.resume = config.resume, any(gather_objects(config.resume or again))
        found = find_checkpoint(Path(config.out_dir)) if config.resume else None
        if found:
            stored = stored_config(read_meta(found))
            own = asdict(stored) | {name: getattr(config, name) for name in ("resume", "vocab_size")}
            if not resume and own != asdict(config):  # ... but not with another run, which was there before
                refuse(found)
            here = {"out_dir": config.out_dir, "resume": True}
            config = build(TrainConfig, asdict(stored) | given | here)
            fixed = {field.name for field in fields(GPTConfig)} - {"dropout", "kernel"}
            for name in sorted(fixed | {"value_optimizer", "value_blocks"}):
                if getattr(config, name) != getattr(stored, name):
                    fail(f"--{name}={getattr(config, name)}: the model in {config.out_dir} has "
                         f"{getattr(stored, name)} for good; choose another --out_dir")
        train(config, found)
    except KeyboardInterrupt:
        say("\nstopped")
        raise SystemExit(130) from None
    except OSError as error:
        where = error.filename or config.out_dir
        cannot_go_on(Path(config.out_dir), f"{where}: {error.strerror or error}", alone=True)
    except RuntimeError as error:
        # what a process meets with when another, which says why, has ended
        if WORLD_SIZE > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            print(f"process {RANK} ends, having lost another", file=sys.stderr)
            os._exit(1)
        raise


if __name__ == "__main__":
    main()
