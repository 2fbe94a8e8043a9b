"""
Trains a GPT with memory layers.

    python train.py                          facts about 400 people: two minutes on two cores
    python train.py --preset=facts-2000      facts about 2,000 people: seven minutes
    python train.py --preset=airports        codes, cities and countries of real airports: seven minutes
    python train.py --preset=stdlib          source text of the Python standard library: ten minutes
    python train.py --preset=paper           the 400 people, with Memory+ as published
    python train.py --mem_layers= --out_dir=out/dense   the first run without memory
    python train.py --resume                 continues from the newest checkpoint in --out_dir
    python train.py --eval_only              evaluates the newest checkpoint in --out_dir
    torchrun --nproc_per_node=2 train.py     the first run on two processes, half of the pool in each
    python train.py --help                   every option

The first four are not Memory+ as published. The previous token also takes part in their queries: see
--mem_query, and query_sources in model.py.

Ctrl-C saves a checkpoint and ends. A run leaves log.jsonl, loss.png and its checkpoints in --out_dir.
From Python: model, measured = train(TrainConfig(max_steps=500)); model, encoding, config = load("out/facts").
"""

import contextlib
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # before the imports that take seconds
    from runtime.cli import exit_on_ctrl_c
    exit_on_ctrl_c()

import torch

from data.corpus import Dataset, draw_batch, load_dataset
from data.questions import check_length
from data.tokenizer import encoding_from_json
from evaluate import evaluate
from kernel import resolve_kernel
from model import GPT, GPTConfig
from runtime import distributed
from runtime.build import check_same_model, find_start, find_trained, make_model, own_folder
from runtime.checkpoint import find_checkpoint, load_optimizers, parts_of, read_meta, save_checkpoint, step_of
from runtime.cli import at_least, build, command, fail, parse
from runtime.distributed import RANK, WORLD_SIZE, all_reduce_sum, columns_group, data_parallel, gather_objects
from runtime.log import RunLog, one_line_errors, print_measured, print_once, print_start, stop_signals


@dataclass
class TrainConfig(GPTConfig):
    # --- memory
    mem_layers: tuple[int, ...] = (0, 2)  # blocks with a memory layer, counted from 0; empty: a dense GPT
    mem_group_size: int = 0  # processes that split the pool's columns between them; 0: all of them
    mem_file: str = ""  # a file for the pool's values, if they are larger than memory; CPU only

    # --- files
    dataset: str = "facts"  # corpus: the name of a folder under data/
    out_dir: str = "out/facts"  # where the log, the figure and the checkpoints go
    resume: bool = False  # continue from the newest checkpoint in out_dir, if there is one
    eval_only: bool = False  # only evaluate the newest checkpoint in out_dir; writes nothing
    keep: int = 2  # newest checkpoints to keep
    keep_best: bool = False  # also keep the checkpoint with the lowest validation loss

    # --- training
    seed: int = 1  # seed of the weights, the batches and dropout
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    compile: bool = False  # torch.compile the model; on a CPU this gains nothing
    batch_size: int = 16  # sequences per step, in all processes together
    accum_steps: int = 1  # parts of a batch, computed one after the other to save memory
    max_steps: int = 700  # training steps
    lr: float = 4e-3  # highest learning rate of the dense parameters: all except the pool
    value_lr: float = 6e-2  # highest learning rate of the pool; tune this first. With adam, try 2e-2
    value_optimizer: Literal["rowwise", "adam", "sgd"] = "rowwise"  # the pool's optimiser; sgd to finetune
    value_blocks: int = 8  # with rowwise: second moments per row of the pool
    value_stochastic_rounding: bool = False  # round a bfloat16 pool at random, to keep small changes
    warmup_steps: int = 100  # steps over which the learning rates rise
    min_lr: float = 0.1  # final learning rate, as a share of the highest; the decay is a cosine
    weight_decay: float = 0.1  # weight decay of dense matrices; the pool has none
    beta1: float = 0.9  # beta1 of AdamW, for the dense parameters
    beta2: float = 0.99  # beta2 of AdamW, for the dense parameters
    grad_clip: float = 1.0  # clip the dense gradient to this norm; 0: do not clip

    # --- logging
    log_interval: int = 50  # steps between log lines
    eval_interval: int = 175  # steps between evaluations, each followed by a checkpoint
    eval_batches: int = 20  # validation batches per evaluation; the seed draws them
    eval_questions: int = 1000  # questions per evaluation, if the corpus has any; the last evaluation: all

    def __post_init__(self):
        super().__post_init__()
        self.out_dir, self.mem_file = map(os.path.expanduser, (self.out_dir, self.mem_file))
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
            raise ValueError("value_stochastic_rounding needs --mem_dtype=bfloat16")


# Not as published: queries see the previous token too, so a slot can stand for a first and a last name
TWO_TOKENS = dict(scale_embeddings=True, mem_layers=(0, 1), mem_query="tokens")
PRESETS = {
    "facts": TWO_TOKENS,
    "facts-2000": TWO_TOKENS | dict(dataset="facts-2000", out_dir="out/facts-2000", max_steps=3000, lr=3e-3,
                                    eval_interval=500),
    "airports": TWO_TOKENS | dict(dataset="airports", out_dir="out/airports", max_steps=2000, lr=3e-3,
                                  eval_interval=500),
    "stdlib": dict(dataset="stdlib", out_dir="out/stdlib", block_size=256, n_layer=4, n_embd=128,
                   mem_layers=(1, 3), mem_num_keys=256, mem_query="shifted", scale_embeddings=True,
                   batch_size=8, max_steps=2000, lr=2e-3, eval_interval=500),
    "paper": dict(out_dir="out/paper"),  # the defaults above: Memory+ as published
}
NANOGPT_OPTIONS = {  # what to do instead
    "learning_rate": "use --lr",
    "decay_lr": "use --min_lr=1, a share of --lr",
    "max_iters": "use --max_steps",
    "lr_decay_iters": "the learning rate falls until --max_steps",
    "warmup_iters": "use --warmup_steps",
    "gradient_accumulation_steps": "use --accum_steps, which divides --batch_size",
    "eval_iters": "use --eval_batches",
    "always_save_checkpoint": "each evaluation saves one; --keep_best also keeps the best",
    "init_from": "use --resume to continue a run; there are no pretrained weights",
    "dtype": "a GPU computes in bfloat16; --mem_dtype is the dtype of the pool",
    "wandb_log": "a run writes log.jsonl and loss.png to --out_dir",
}


# --- set-up -------------------------------------------------------------------------------------------------

def find_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        fail("--device=cuda: torch finds no CUDA device; use --device=cpu, or install a CUDA build of torch")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def check_fit(config: TrainConfig, device: str) -> None:
    """Checks the options against the device and the number of processes, which TrainConfig does not know."""
    build(resolve_kernel, dict(kernel=config.kernel, device=device))  # fails if the kernel cannot run there
    if config.mem_file and device != "cpu":
        fail("--mem_file needs --device=cpu: a GPU holds the pool in its own memory")
    if config.mem_file and not config.mem_layers:
        fail("--mem_file needs a pool: choose blocks for it with --mem_layers")
    parts = WORLD_SIZE * config.accum_steps
    if config.batch_size % parts:
        fail(f"--batch_size={config.batch_size} must be a multiple of {parts}: {WORLD_SIZE} processes times "
             f"{config.accum_steps} parts (--accum_steps)")


def check_data(data: Dataset, config: TrainConfig, checkpoint: Path | None) -> None:
    if checkpoint and read_meta(checkpoint)["encoding"] != data.encoding_json:
        fail(f"{config.dataset} and {checkpoint} have different tokenizers: choose another --out_dir")
    if 0 < config.vocab_size < (needed := data.encoding.n_vocab):
        fail(f"--vocab_size={config.vocab_size} is too small: {config.dataset} has {needed} tokens")
    check_length(data.questions, data.encoding, config.block_size)
    for split, tokens in (("train", data.train), ("val", data.val)):
        if len(tokens) <= config.block_size:
            fail(f"--block_size={config.block_size} is too large: {split}.bin has only {len(tokens)} tokens")


def make_optimizers(config: TrainConfig, model: GPT, checkpoint: Path | None) -> list[torch.optim.Optimizer]:
    # for stochastic rounding: each process rounds its columns with random numbers of its own
    seed = config.seed * 1_000_003 + columns_group(model.pool).rank * 0x5BD1E995
    optimizers = build(model.optimizers, dict(
        lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
        value_lr=config.value_lr, kind=config.value_optimizer, value_blocks=config.value_blocks,
        stochastic_rounding=config.value_stochastic_rounding, seed=seed))
    if checkpoint:
        load_optimizers(checkpoint, model, optimizers)
    return optimizers


# --- training -----------------------------------------------------------------------------------------------

def schedule(step: int, config: TrainConfig) -> float:
    """The learning rate as a share of the highest: a linear warm-up, then a cosine down to min_lr."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def check_learning_rate(config: TrainConfig, stored: TrainConfig, step: int) -> None:
    """Changed options may make the learning rate jump where the run resumes. Then this prints how far."""
    old, new = (c.lr * schedule(step, c) for c in (stored, config))
    if abs(new - old) > 0.01 * old and step < config.max_steps:
        print_once(f"the learning rate continues at {new:.1e} instead of {old:.1e}: it follows --max_steps, "
                   "--lr, --min_lr and --warmup_steps, and you have changed one of them")


def check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        fail(f"the loss is {loss} at step {step}: training has diverged; lower --lr or --value_lr")


def train(config: TrainConfig, checkpoint: Path | None = None) -> tuple[GPT, dict]:
    """
    Trains a model. Returns the model in evaluation mode, and the last evaluation as a dict: val_loss, recall
    (if there are questions), slots_used and kl_from_uniform (with a pool). Wrong options raise a ValueError.

    checkpoint: continue from this one. config.resume: continue from the newest one in config.out_dir.
    config.eval_only: evaluate the checkpoint, and do not train.
    """
    distributed.start(find_device(config.device))
    with own_folder(config):
        return run(config, checkpoint)


def run(config: TrainConfig, checkpoint: Path | None) -> tuple[GPT, dict]:
    """What `train` does, in a folder that no other run uses."""
    device = find_device(config.device)
    check_fit(config, device)
    data = load_dataset(config.dataset)
    checkpoint = find_start(config, checkpoint)
    check_data(data, config, checkpoint)
    config = replace(config, vocab_size=config.vocab_size or data.encoding.n_vocab,
                     mem_file="" if config.eval_only else config.mem_file)
    if checkpoint:
        check_same_model(config, stored_config(checkpoint))
    start, measured = (step_of(checkpoint), read_meta(checkpoint)["measured"]) if checkpoint else (0, {})

    # the plain model, neither compiled nor in DDP, is for saving and for questions
    model = make_model(config, checkpoint).to(device).train()
    compiled = torch.compile(model) if config.compile else model
    autocast = torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
    if config.eval_only:
        with autocast:
            measured = evaluate(model, compiled, data, config, all_questions=True)
        print_measured(checkpoint, data, measured)
        return model.eval(), measured
    optimizers = make_optimizers(config, model, checkpoint)
    # init_sync=False: the weights are already equal
    parallel = data_parallel(compiled, init_sync=False, gradient_as_bucket_view=True)
    print_start(config, device, data, model, checkpoint)
    if checkpoint:
        check_learning_rate(config, stored_config(checkpoint), start)

    with RunLog(config, start, model, optimizers, data.note) as log, stop_signals() as signals:
        stopping = False
        for step in range(start, config.max_steps + 1):
            last_step = step == config.max_steps
            is_due = last_step or step % config.eval_interval == 0

            if is_due and (step > start or not checkpoint):  # the checkpoint's step is evaluated already
                with autocast:
                    measured = evaluate(model, compiled, data, config, all_questions=last_step)
                check_finite(measured["val_loss"], step)  # fails before a good checkpoint is replaced
                log.log_evaluation(step, measured)
            if (is_due or stopping) and step > start:
                meta = {"config": asdict(config), "encoding": data.encoding_json, "measured": measured}
                if is_due:
                    meta["val_loss"] = measured["val_loss"]  # of these weights; `measured` may be older
                save_checkpoint(Path(config.out_dir), step, parts_of(model, optimizers), meta, config.keep,
                                config.keep_best)
            if last_step or stopping:
                break

            # --- the timed part of a step
            if device == "cuda":
                torch.cuda.synchronize()
            start_time = time.perf_counter()
            torch.manual_seed(config.seed * 1_000_003 + step * WORLD_SIZE + RANK)  # for dropout
            key = config.seed, 0, step  # seed of the batch; 0: training, 1: evaluation
            batch = draw_batch(data.train, config.batch_size, config.block_size, *key)
            x, y = (part.to(device).chunk(config.accum_steps) for part in batch)
            totals = torch.zeros(2, device=device)  # the loss, and the number of signals to stop
            for i in range(config.accum_steps):
                is_last_part = i + 1 == config.accum_steps  # then DDP averages the gradients
                with contextlib.nullcontext() if is_last_part or WORLD_SIZE == 1 else parallel.no_sync():
                    with autocast:
                        _, loss, _ = parallel(x[i], y[i])
                    (loss / config.accum_steps).backward()
                totals[0] += loss.detach() / config.accum_steps
            if config.grad_clip:
                torch.nn.utils.clip_grad_norm_(model.dense_parameters(), config.grad_clip)
            for optimizer, lr in zip(optimizers, (config.lr, config.value_lr), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = lr * schedule(step, config)
                optimizer.step()
                optimizer.zero_grad()
            totals[1] = len(signals)
            loss, stopping = all_reduce_sum(totals).tolist()  # waits for the device
            seconds = time.perf_counter() - start_time
            # --- end of the timed part

            loss /= WORLD_SIZE
            check_finite(loss, step)
            log.log_step(step + 1, loss, config.lr * schedule(step, config), seconds)

        if stopping and step < config.max_steps:
            print_once(f"stopped after step {step} and saved in {config.out_dir}; continue with --resume")
        elif start < config.max_steps:
            log.print_end(device, measured)
        else:
            log.draw_missing_figure()
    return model.eval(), measured


# --- the command line, and using a model --------------------------------------------------------------------

def stored_config(checkpoint: Path) -> TrainConfig:
    try:
        return TrainConfig(**read_meta(checkpoint)["config"])
    except (TypeError, ValueError) as error:
        fail(f"the checkpoint comes from another version of nanoPKM: {error}")


def load(out_dir: Path | str):
    """
    Loads the newest checkpoint of a run, or the checkpoint whose folder is given. Returns the model (on the
    CPU, in evaluation mode), the encoding and the config.
    """
    checkpoint = find_trained(Path(out_dir).expanduser())
    # drop the options that depend on the machine, so that any machine can load the model
    config = replace(stored_config(checkpoint), kernel="auto", mem_file="", mem_group_size=0)
    encoding = encoding_from_json(read_meta(checkpoint)["encoding"])
    print_once(f"loaded {checkpoint}")
    return make_model(config, checkpoint).eval(), encoding, config


@command
def main(argv: list[str] | None = None) -> None:
    preset, options = parse(TrainConfig, argv, PRESETS, __doc__, NANOGPT_OPTIONS)
    config = build(TrainConfig, preset | options)
    with one_line_errors(config.out_dir):
        distributed.start(find_device(config.device))
        with own_folder(config):
            # torchrun restarts processes without --resume: they continue only a run with the same options
            is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            resume = any(gather_objects(config.resume or config.eval_only or is_restart))
            checkpoint = find_checkpoint(Path(config.out_dir)) if resume else None
            if checkpoint:
                stored = stored_config(checkpoint)
                is_same_run = config == replace(stored, resume=False, vocab_size=config.vocab_size)
                if config.resume or config.eval_only or is_same_run:
                    config = build(TrainConfig, asdict(stored) | options | {"out_dir": config.out_dir})
                else:
                    checkpoint, resume = None, False  # a new run, which is refused in this folder
            run(replace(config, resume=resume), checkpoint)


if __name__ == "__main__":
    main()
