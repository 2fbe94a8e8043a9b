"""
Trains a GPT with memory layers.

    python train.py                          facts about 400 people: two minutes on two cores
    python train.py --preset=facts-2000      facts about 2,000 people: seven minutes
    python train.py --preset=airports        codes, cities and countries of real airports: five minutes
    python train.py --preset=stdlib          source text of the Python standard library: ten minutes
    python train.py --preset=paper           the 400 people, with Memory+ as published, in 2 of 6 blocks
    python train.py --mem_layers= --out_dir=out/dense   the first run without memory
    python train.py --resume                 continues from the newest checkpoint in --out_dir
    python train.py --eval_only              evaluates the newest checkpoint in --out_dir
    python train.py --init_from=gpt2         starts from GPT-2's weights: see docs/nanogpt.md
    torchrun --nproc_per_node=2 train.py     the first run on two processes, half of the pool in each
    python train.py --help                   every option

Only --preset=paper is Memory+ as published. In the others, the previous token also takes part in a query: see
--mem_query, and query_sources in model.py.

Ctrl-C saves a checkpoint and ends. A run leaves log.jsonl, loss.png and its checkpoints in --out_dir.
From Python: model, measured = train(TrainConfig(max_steps=500)). See load in runtime/checkpoint.py, too.
"""

import contextlib
import functools
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from runtime.cli import at_least, build, command, fail, parse

import torch

from data.corpora import make_missing
from data.corpus import Dataset, check_length, draw_batch, load_dataset
from evaluate import evaluate
from kernel import resolve_kernel
from model import GPT, GPTConfig
from pool import ValuePool
from runtime import distributed, gpt2
from runtime.checkpoint import Checkpoint, find_trained, own_folder, parts_of, pool_on_disk, save_checkpoint
from runtime.distributed import RANK, WORLD_SIZE, ShardedPool, all_reduce_sum, columns_group, data_parallel
from runtime.log import RunLog, keep_freed_memory, one_line_errors, print_measured, print_once, stop_signals


@dataclass
class TrainConfig(GPTConfig):
    """
    To add an option, add a field; its comment is its help. A resumed run may not change the fields of
    GPTConfig. An option that changes no number of a run goes into NOT_IN_LINES of experiments/models.py.
    """

    # --- memory
    mem_layers: tuple[int, ...] = (0, 1)  # blocks with a memory layer, counted from 0; empty: a dense GPT
    mem_query: Literal["state", "shifted", "tokens"] = "tokens"
    mem_group_size: int = 0  # processes that split the pool's columns between them; 0: all of them
    mem_on_disk: bool = False  # keep the pool's values in a file in out_dir, not in memory; CPU only

    # --- files
    dataset: str = "facts"  # corpus: the name of a folder under data/
    out_dir: str = "out/facts"  # where the log, the figure and the checkpoints go
    resume: bool = False  # continue from the newest checkpoint in out_dir, if there is one
    init_from: str = ""  # start from these weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder, ckpt.pt
    export_hf: str = ""  # at the end, write the model as a GPT-2 of Hugging Face to this new folder
    eval_only: bool = False  # only evaluate the newest checkpoint in out_dir; writes nothing there
    keep: int = 2  # newest checkpoints to keep
    keep_best: bool = False  # also keep the checkpoint with the lowest validation loss

    # --- training
    train_only: Literal["all", "memory"] = "all"  # memory: only the memory layers and the pool learn
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
    eval_batches: int = 20  # validation batches per evaluation, the same for every seed
    eval_questions: int = 1000  # questions per evaluation, if the corpus has any; the last evaluation: all

    def __post_init__(self):
        super().__post_init__()
        self.out_dir = os.path.expanduser(self.out_dir)
        if not self.out_dir:
            raise ValueError("out_dir= must name a folder")
        at_least(1, self, "batch_size", "accum_steps", "max_steps", "log_interval", "eval_interval",
                 "eval_batches", "eval_questions", "keep", "value_blocks")
        at_least(0, self, "mem_group_size", "lr", "value_lr", "warmup_steps", "min_lr", "weight_decay",
                 "grad_clip", "seed")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")


PRESETS = {
    "facts": {},  # the defaults above. Queries see the previous token: a slot can stand for a whole name
    "facts-2000": dict(dataset="facts-2000", out_dir="out/facts-2000", max_steps=3000, lr=3e-3,
                       eval_interval=500),
    "airports": dict(dataset="airports", out_dir="out/airports", max_steps=2000, lr=3e-3, eval_interval=500),
    "stdlib": dict(dataset="stdlib", out_dir="out/stdlib", block_size=256, n_layer=4, n_embd=128,
                   mem_layers=(1, 3), mem_num_keys=256, mem_query="shifted", scale_embeddings=True,
                   batch_size=8, max_steps=2000, lr=2e-3, eval_interval=500),
    "paper": dict(n_layer=6, mem_layers=(2, 5), mem_query="state", out_dir="out/paper"),
}


# --- set-up -------------------------------------------------------------------------------------------------

def check_options(config: TrainConfig, device: str) -> None:
    """What TrainConfig does not know: sizes that fit each other, the device, the number of processes."""
    build(resolve_kernel, dict(kernel=config.kernel, device=device))
    parts = WORLD_SIZE * config.accum_steps
    if config.batch_size % parts:
        fail(f"--batch_size={config.batch_size} must be a multiple of {parts}: {WORLD_SIZE} processes times "
             f"{config.accum_steps} parts (--accum_steps)")
    if config.mem_on_disk and not (device == "cpu" and config.mem_layers):
        fail("--mem_on_disk needs --device=cpu and a pool: a GPU holds the pool in its own memory")
    if config.export_hf:
        gpt2.check_export(config, config.export_hf)
    with torch.device("meta"):  # the model and its optimisers check their sizes, and take no memory here
        config = replace(config, vocab_size=config.vocab_size or 1, mem_on_disk=False, init_from="")
        make_optimizers(config, make_model(config, None), None)


def check_data(data: Dataset, config: TrainConfig) -> None:
    if config.init_from and data.encoding.name != "gpt2":
        fail(f"--init_from needs a corpus with GPT-2's tokens, and {data.name} has others: python -m "
             "data.prepare text --tokenizer=gpt2 --name=NAME --input FILE ..., then --dataset=NAME")
    if 0 < config.vocab_size < (needed := data.encoding.n_vocab):
        fail(f"--vocab_size={config.vocab_size} is too small: {config.dataset} has {needed} tokens")
    check_length(data.questions, data.encoding, config.block_size)
    for split, tokens in (("train", data.train), ("val", data.val)):
        if len(tokens) <= config.block_size:
            fail(f"{config.dataset} is too small: {split}.bin has {len(tokens)} tokens, and must have more "
                 f"than block_size={config.block_size}. Use more text, or a smaller --block_size")


def check_resumed(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Refuses options that would change the model or the state of the optimisers. All others may change."""
    stored = TrainConfig(**checkpoint.options)
    fixed = {field.name for field in fields(GPTConfig)} - {"dropout", "kernel"}
    for name in sorted(fixed | {"value_optimizer", "value_blocks", "train_only", "init_from"}):
        if getattr(config, name) != getattr(stored, name):
            fail(f"--{name}={getattr(config, name)}: the model in {config.out_dir} has "
                 f"--{name}={getattr(stored, name)}, which cannot change; choose another --out_dir")


def make_model(config: TrainConfig, checkpoint: Checkpoint | None) -> GPT:
    """
    A new model, or the model in the checkpoint. Each process has its columns of the pool. The weights are the
    same for any number of processes.
    """
    pool_class, file = ValuePool, None
    if WORLD_SIZE > 1:
        pool_class = functools.partial(ShardedPool, group_size=config.mem_group_size)
    if config.mem_on_disk and not config.eval_only:
        file = Path(config.out_dir) / f".pool_{RANK}of{WORLD_SIZE}"
    if checkpoint:
        return checkpoint.load_model(pool_class, file, dropout=config.dropout, kernel=config.kernel)
    torch.manual_seed(config.seed)
    pool_class = functools.partial(pool_on_disk, pool_class, file) if file else pool_class
    model = build(GPT, dict(config=config, pool_class=pool_class))
    if config.init_from:
        gpt2.load_weights(model, config.init_from)
    return model


def make_optimizers(config: TrainConfig, model: GPT, checkpoint: Checkpoint | None) -> list:
    if config.train_only == "memory":
        if model.pool is None:
            fail("--train_only=memory needs memory layers: name their blocks with --mem_layers")
        model.requires_grad_(False)
        for module in (model.pool, *model.memories()):
            module.requires_grad_(True)
    # for stochastic rounding: each process rounds its columns with random numbers of its own
    seed = config.seed * 1_000_003 + columns_group(model.pool).rank * 0x5BD1E995
    optimizers = build(model.optimizers, dict(
        lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay,
        value_lr=config.value_lr, kind=config.value_optimizer, value_blocks=config.value_blocks,
        stochastic_rounding=config.value_stochastic_rounding, seed=seed))
    if checkpoint:
        checkpoint.load_optimizers(model, optimizers)
    return optimizers


# --- training -----------------------------------------------------------------------------------------------

def schedule(step: int, config: TrainConfig) -> float:
    """The learning rate as a share of the highest: a linear warm-up, then a cosine down to min_lr."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        fail(f"the loss is {loss} at step {step}: training has diverged; lower --lr or --value_lr")


def train(config: TrainConfig, given: dict | None = None) -> tuple[GPT, dict]:
    """
    Trains a model. Returns the model in evaluation mode, and the last evaluation as a dict: val_loss, recall
    (if there are questions), slots_used and kl_from_uniform (with a pool). Wrong options raise a ValueError.
    given: the options on a command line. If the run is resumed, all others are then as in its checkpoint.
    """
    out_dir = Path(config.out_dir)
    distributed.start(config.device)
    with (contextlib.nullcontext(find_trained(out_dir)) if config.eval_only else
          own_folder(out_dir, config.resume)) as checkpoint:
        if checkpoint and given is not None:
            config = build(TrainConfig, checkpoint.options | given
                           | {"out_dir": config.out_dir, "export_hf": config.export_hf})
        # a text that has changed is a mistake, unless the command line names the corpus
        is_same_text = not config.eval_only and "dataset" not in (given or {})
        model, measured = run(config, checkpoint, is_same_text)
    if config.export_hf and RANK == 0:
        gpt2.export(model, config.export_hf)
    return model, measured


def run(config: TrainConfig, checkpoint: Checkpoint | None, same_text: bool) -> tuple[GPT, dict]:
    """What `train` does, in a folder that no other run uses. same_text: see Checkpoint.check_corpus."""
    device, out_dir = distributed.find_device(config.device), Path(config.out_dir)
    check_options(config, device)
    for has_turn in (RANK == 0, distributed.LOCAL_RANK == 0):  # without a shared disk, each machine makes it
        if has_turn:
            make_missing(config.dataset)
        distributed.gather_objects(None)  # waits for all processes
    data = load_dataset(config.dataset)
    changed = checkpoint.check_corpus(data, same_text) if checkpoint else []
    check_data(data, config)
    config = replace(config, vocab_size=config.vocab_size or data.encoding.n_vocab)
    start, measured = 0, {}
    if checkpoint:
        check_resumed(config, checkpoint)
        start, measured = checkpoint.step, checkpoint.measured

    # the plain model, neither compiled nor in DDP, is for saving and for questions
    model = make_model(config, checkpoint).to(device).train()
    compiled = torch.compile(model) if config.compile else model
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    evaluate_model = functools.partial(evaluate, model, compiled, data, config.eval_batches,
                                       config.batch_size, config.accum_steps)
    if config.eval_only:
        with autocast:
            measured = evaluate_model()
        print_once(f"{checkpoint.folder}:")
        print_measured(measured, data)
        return model.eval(), measured
    optimizers = make_optimizers(config, model, checkpoint)
    # init_sync=False: the weights are already equal
    parallel = data_parallel(compiled, init_sync=False, gradient_as_bucket_view=True)
    log = RunLog(out_dir, config.max_steps, config.batch_size * config.block_size, model, optimizers, start)
    log.print_start(config.dataset, len(data.train), device, model, checkpoint)

    with stop_signals() as signals:
        stopping = False
        for step in range(start, config.max_steps + 1):
            last_step = step == config.max_steps
            is_due = last_step or step % config.eval_interval == 0
            with log.pause():
                # the checkpoint's step is evaluated already, unless Ctrl-C saved it at the end
                is_new = step > start or not checkpoint or (
                    last_step and (changed or "val_loss" not in checkpoint.meta))
                if is_due and is_new:
                    with autocast:
                        measured = evaluate_model(count=None if last_step else config.eval_questions)
                    check_finite(measured["val_loss"], step)  # fails before a good checkpoint is replaced
                    log.log_evaluation(step, measured)
                if (is_due or stopping) and step > start:
                    meta = {"config": asdict(config), "encoding": data.encoding_json, "corpus": data.digests,
                            "measured": measured}
                    if is_due:
                        meta["val_loss"] = measured["val_loss"]  # of these weights; `measured` may be older
                    parts = parts_of(model, optimizers)
                    save_checkpoint(out_dir, step, parts, meta, config.keep, config.keep_best)
            if last_step or stopping:
                break

            # --- a step: a GPU gets its work here, and nothing waits until it is done
            torch.manual_seed(config.seed * 1_000_003 + step * WORLD_SIZE + RANK)  # for dropout
            key = config.seed, 0, step  # seed of the batch; 0: training, 1: evaluation
            batch = draw_batch(data.train, config.batch_size, config.block_size, *key)
            if device == "cuda":
                batch = [part.pin_memory() for part in batch]  # the copy of pinned memory needs no waiting
            x, y = (part.to(device, non_blocking=True).chunk(config.accum_steps) for part in batch)
            loss = torch.zeros((), device=device)
            for i in range(config.accum_steps):
                parallel.require_backward_grad_sync = i + 1 == config.accum_steps  # DDP: only the last part
                with autocast:
                    part_loss = parallel(x[i], y[i])[1] / config.accum_steps
                part_loss.backward()
                loss += part_loss.detach()
            if config.grad_clip:
                torch.nn.utils.clip_grad_norm_(model.dense_parameters(), config.grad_clip)
            for optimizer, lr in zip(optimizers, (config.lr, config.value_lr), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = lr * schedule(step, config)
                optimizer.step()
                optimizer.zero_grad()

            # --- only here the device is waited for, and processes hear of each other's signals to stop
            done = step + 1
            is_logged = done % config.log_interval == 0 or done == config.max_steps
            if is_logged or done % config.eval_interval == 0 or (signals and WORLD_SIZE == 1):
                totals = torch.stack((loss, loss.new_tensor(len(signals))))
                loss, stopping = all_reduce_sum(totals).tolist()
                check_finite(loss / WORLD_SIZE, step)
                if is_logged:
                    log.log_step(done, loss / WORLD_SIZE, config.lr * schedule(step, config))

    if stopping and step < config.max_steps:
        print_once(f"stopped after step {step} and saved in {out_dir}; continue with --resume")
    else:
        print_measured(measured, data)
        log.end(device, data.note, config.keep_best)
    return model.eval(), measured


@command
def main(argv: list[str] | None = None) -> None:
    preset, given = parse(TrainConfig, argv, PRESETS, __doc__)
    weights = gpt2.read_options(given["init_from"]) if given.get("init_from") else {}
    config = build(TrainConfig, preset | weights | given)
    keep_freed_memory()
    with one_line_errors(Path(config.out_dir)):
        train(config, given)


if __name__ == "__main__":
    main()
