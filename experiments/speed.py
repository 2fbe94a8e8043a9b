"""
How fast is nanoPKM? Each number is the median of several measurements. Functions that are compared run
alternately, so noise affects all of them.

    python -m experiments.speed step        a training step of a pool, with nanoPKM and with plain PyTorch
    python -m experiments.speed search      the search for the best slots, and its parts
    python -m experiments.speed model       a training step of the models of experiments.compare; a profile of
                                            what memory+ adds to dense. --compile: compiled steps, too
    python -m experiments.speed gpt2        a training step at the size of GPT-2 small, with memory and dense
    python -m experiments.speed operations  the operations on the pool, compared with a copy
    python -m experiments.speed kernels     registers and loads of the Triton kernels, compiled without a GPU
    python -m experiments.speed step --help     the options; --json=FILE saves the results
"""

import itertools
import json
import math
import os
import statistics
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F

import kernel
from experiments.compare import MODELS, train_options
from experiments.compile_kernels import compile_kernel, gpu_targets, kernel_sources
from memory import product_key_search, pruned_pairs
from model import GPT
from pool import PoolOptimizer, ValuePool
from runtime.cli import at_least, build, command, fail, first_word, parse
from train import TrainConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CALLS = 10 if DEVICE == "cuda" else 1  # per measurement; several, because the CPU runs ahead of a GPU
GOALS = {"gather_sum": 0.8, "gather_dot": 0.8, "rowwise update": 0.6}  # on a GPU, 1.0 is the speed of a copy


@dataclass
class SpeedConfig:
    json: str = ""  # file for the results, as JSON lines
    repeats: int = 9  # measurements of each function, after one to warm up

    def __post_init__(self):
        at_least(1, self, "repeats")


@dataclass
class StepConfig(SpeedConfig):
    rows: tuple[int, ...] = (65_536, 262_144, 1_048_576, 4_194_304)  # sizes of the pool
    tokens: tuple[int, ...] = (512, 2048)  # tokens per step
    reads: tuple[str, ...] = ("uniform", "zipf")  # the distribution of the rows that are read: uniform, zipf
    peers_up_to: int = 1_048_576  # largest pool for plain PyTorch, which needs up to 4 times its memory
    value_dim: int = 256  # columns of a row
    bag: int = 128  # rows that a token reads
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the values, weights and gradients

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "value_dim", "bag")
        if any(rows < 1 or math.isqrt(rows) ** 2 != rows for rows in self.rows):
            raise ValueError(f"rows={','.join(map(str, self.rows))} must be squares: a pool has num_keys**2 "
                             "rows")
        if any(tokens < 1 for tokens in self.tokens):
            raise ValueError(f"tokens={','.join(map(str, self.tokens))} must be at least 1")
        if self.value_dim % 8:
            raise ValueError(f"value_dim={self.value_dim} must be a multiple of 8")
        if unknown := set(self.reads) - {"uniform", "zipf"}:
            raise ValueError(f"reads={','.join(unknown)} must be uniform or zipf")


@dataclass
class ModelConfig(SpeedConfig):
    models: tuple[str, ...] = ()  # models of experiments.compare; none: all
    compile: bool = False  # measure each model a second time, with torch.compile

    def __post_init__(self):
        super().__post_init__()
        if unknown := set(self.models) - MODELS.keys():
            raise ValueError(f"models={','.join(unknown)} must be among {','.join(MODELS)}")


def measure(functions: dict, repeats: int) -> dict:
    """{name: function} -> {name: sorted seconds per call}. The functions run alternately."""
    times = {name: [] for name in functions}
    for i, (name, function) in itertools.product(range(repeats + 1), functions.items()):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        t0 = time.perf_counter()
        for _ in range(CALLS):
            function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        if i > 0:
            times[name].append((time.perf_counter() - t0) / CALLS)
    return {name: sorted(seconds) for name, seconds in times.items()}


def ratio(times: dict, a: str, b: str) -> float:
    """The median time of a, divided by that of b."""
    return statistics.median(times[a]) / statistics.median(times[b])


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def median_and_range(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):8.2f} ms ({1e3 * times[0]:.2f} to {1e3 * times[-1]:.2f})"


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second of a large copy, counting bytes read and bytes written."""
    size = 2**28 if DEVICE == "cuda" else 2**26  # much larger than a cache
    source, target = torch.ones(size, device=DEVICE), torch.empty(size, device=DEVICE)
    times = measure({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return 2 * source.nbytes / statistics.median(times)


# --- step ---------------------------------------------------------------------------------------------------

def our_step(kind: str, num_values: int, indices, weights, dy):
    pool = ValuePool(num_values, dy.size(1), dy.dtype, device=DEVICE)
    optimizer = PoolOptimizer(pool.parameters(), lr=1e-3, kind=kind,
                              stochastic_rounding=dy.dtype == torch.bfloat16)

    def step():
        pool(indices, weights.requires_grad_()).backward(dy)
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer_step(kind: str, num_values: int, indices, weights, dy):
    values = torch.empty(num_values, dy.size(1), dtype=dy.dtype, device=DEVICE).normal_()
    parameter = torch.nn.Parameter(values)
    sparse = kind == "embedding_bag, SparseAdam"
    optimizer = torch.optim.SparseAdam([parameter]) if sparse else torch.optim.AdamW([parameter], fused=True)

    def step():
        w = weights.requires_grad_()
        if kind == "indexing, AdamW":
            y = torch.einsum("nk,nkv->nv", w, parameter[indices])
        else:
            y = F.embedding_bag(indices, parameter, per_sample_weights=w, mode="sum", sparse=sparse)
        y.backward(dy)
        optimizer.step()
        optimizer.zero_grad()  # frees the memory of the gradient before another method runs

    return step


PEERS = ("embedding_bag, AdamW", "embedding_bag, SparseAdam", "indexing, AdamW")


def draw_indices(reads: str, num_values: int, N: int, bag: int) -> torch.Tensor:
    if reads == "uniform":
        return torch.randint(num_values, (N, bag), device=DEVICE)
    # zipf: rank r has a probability proportional to 1/r. The multiplication spreads the ranks over the pool
    ranks = (num_values ** torch.rand(N, bag, device=DEVICE, dtype=torch.float64)).long() - 1
    return (ranks.clamp(max=num_values - 1) * 2_654_435_761) % num_values


def measure_step(config: StepConfig) -> list[dict]:
    V, bag, dtype, table = config.value_dim, config.bag, getattr(torch, config.dtype), []
    bandwidth = copy_bandwidth(config.repeats)
    print(f"\nV={V}, bag={bag}, {config.dtype}, {device_name()}; copies run at {bandwidth / 1e9:,.1f} GB/s. "
          "A step is the forward pass, both gradients and the optimiser")
    options = dict(device=DEVICE, dtype=dtype)
    # in bfloat16 on a GPU, PyTorch cannot compute the gradient of embedding_bag's weights
    peers = PEERS if dtype == torch.float32 or DEVICE == "cpu" else ("indexing, AdamW",)
    for reads, num_values, N in itertools.product(config.reads, config.rows, config.tokens):
        indices = draw_indices(reads, num_values, N, bag)
        data = num_values, indices, torch.rand(N, bag, **options), torch.randn(N, V, **options)
        steps = {kind: our_step(kind, *data) for kind in ("rowwise", "adam")}
        if num_values <= config.peers_up_to:
            steps |= {kind: peer_step(kind, *data) for kind in peers}
        times = measure(steps, config.repeats)
        del steps  # the next pools need the memory
        touched = len(indices.unique())
        print(f"\n{num_values:,} rows, {N:,} tokens, {reads} reads: {touched:,} rows touched")
        fastest = min((times[name] for name in peers if name in times), key=statistics.median, default=None)
        for name, seconds in times.items():
            row = dict(bench="step", method=name, rows=num_values, tokens=N, reads=reads, touched=touched,
                       V=V, dtype=config.dtype, device=device_name(), times=seconds,
                       seconds=statistics.median(seconds))
            line = f"  {name:26}{median_and_range(seconds)}"
            if name in ("rowwise", "adam"):
                # a read loads a row in both passes. The update loads and stores touched rows and moments
                moved = 2 * V * dtype.itemsize * (N * bag + touched)
                moved += 4 * V * 4 * touched if name == "adam" else 0
                row |= dict(bytes=moved, seconds_at_copy_bandwidth=moved / bandwidth)
                line += f"; {moved / 1e6:,.0f} MB must move, {1e3 * moved / bandwidth:.1f} ms at copy speed"
                if fastest:
                    row["times_faster_than_peers"] = statistics.median(fastest) / row["seconds"]
                    line += f"; {row['times_faster_than_peers']:.1f} times as fast as plain PyTorch"
                    if PEERS[0] in times:
                        line += f", {ratio(times, PEERS[0], name):.1f} times as fast as {PEERS[0]}"
            print(line)
            table.append(row)
    return table


# --- search -------------------------------------------------------------------------------------------------

def measure_search(config: SpeedConfig) -> list[dict]:
    table = []
    for N, H, S, K, D in ((2048, 4, 128, 16, 32), (2048, 4, 1024, 32, 256)):
        times = measure(search_functions(N, H, S, K, D), config.repeats)
        print(f"\n{N:,} tokens, {H} heads, {S} half-keys per side, knn {K}, key_dim {D}, on {DEVICE}")
        for name, seconds in times.items():
            print(f"  {name:30}{median_and_range(seconds)}")
            table.append(dict(bench="search", method=name, num_keys=S, knn=K,
                              seconds=statistics.median(seconds)))
        for fast, slow in (("pruned grid", "full grid"), ("top_k of the halves", "torch.topk of the halves")):
            print(f"  {fast}: {ratio(times, slow, fast):.1f} times as fast as {slow}")
    return table


def search_functions(N: int, H: int, S: int, K: int, D: int) -> dict:
    queries = torch.randn(N, H, 2, D // 2, device=DEVICE)
    keys = torch.randn(H, 2, S, D // 2, device=DEVICE)
    scores = torch.einsum("nhpd,hpsd->nhps", queries, keys)
    best = scores.topk(K).values
    ranks = torch.tensor(pruned_pairs(K), device=DEVICE).expand(N, H, -1, -1)
    return {
        "full grid": lambda: kernel.top_k((best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2), K),
        "pruned grid": lambda: kernel.top_k(torch.add(*best.gather(-1, ranks).unbind(2)), K),
        "torch.topk of the halves": lambda: scores.topk(K),
        "top_k of the halves": lambda: kernel.top_k(scores, K),
        "whole search": lambda: product_key_search(queries, keys, K),
    }


# --- model --------------------------------------------------------------------------------------------------

def train_step(config: TrainConfig):
    torch.manual_seed(0)
    model = GPT(config).to(DEVICE).train()
    optimizers = model.optimizers(lr=1e-3, value_lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    x = torch.randint(config.vocab_size, (config.batch_size, config.block_size), device=DEVICE)
    model = torch.compile(model) if config.compile else model

    def step():
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = model(x, x)[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def host_waits(step) -> list[str]:
    """Runs a step -> one message for each time that the CPU waited for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]


def measure_model(config: ModelConfig) -> list[dict]:
    names = [name for name in config.models or MODELS if "max_steps" not in MODELS[name]]
    configs = {name: TrainConfig(**train_options("facts", name), vocab_size=754)  # of facts-4000
               for name in dict.fromkeys(["dense", "memory+", *names])}
    if config.compile:
        configs |= {f"{name}, compiled": replace(c, compile=True) for name, c in configs.items()}
    steps = {name: train_step(c) for name, c in configs.items()}
    times = measure(steps, 3 * config.repeats)
    print(f"a training step of the models of experiments.compare facts, on {device_name()}:")
    for name, seconds in times.items():
        print(f"  {name:20}{median_and_range(seconds)}, {ratio(times, name, 'dense'):.2f} times dense; "
              f"{configs[name].macs_per_token():,} multiply-adds per token")
    if DEVICE == "cuda":
        waits = len(host_waits(steps["memory+"]))
        print(f"\nin a step of memory+, the CPU waits for the GPU {waits} times")
    profiles = {name: profile(steps[name], config.repeats) for name in ("dense", "memory+")}
    extra = {name: ms - profiles["dense"].get(name, 0) for name, ms in profiles["memory+"].items()}
    extra |= {name: -ms for name, ms in profiles["dense"].items() if name not in extra}
    print(f"\nwhat memory+ adds to a step of dense, {sum(extra.values()):.1f} ms in this profile:")
    for name in sorted(extra, key=lambda name: -abs(extra[name]))[:20]:
        print(f"  {name[:60]:60}{extra[name]:8.2f} ms")
    return [dict(bench="model", method=name, device=device_name(), macs=configs[name].macs_per_token(),
                 seconds=statistics.median(seconds)) for name, seconds in times.items()]


def profile(step, repeats: int) -> dict[str, float]:
    """{operation: milliseconds per step}, without the operations that it calls."""
    step()  # to warm up
    with torch.profiler.profile() as profiler:
        for _ in range(repeats):
            step()
    time_of = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    return {event.key: getattr(event, time_of) / 1e3 / repeats for event in profiler.key_averages()}


def measure_gpt2(config: SpeedConfig) -> list[dict]:
    """Memory+ in 3 of 12 blocks against the dense GPT with as many multiply-adds; on a CPU, a toy size."""
    size = dict(vocab_size=50_304, block_size=1024, batch_size=16, n_layer=12, n_head=12, n_embd=768)
    memory = dict(mem_layers=(3, 6, 9), mem_num_keys=1024, mem_key_dim=256, mem_dtype="bfloat16")
    if DEVICE == "cpu":
        size |= dict(vocab_size=512, block_size=64, batch_size=2, n_head=4, n_embd=64)
        memory |= dict(mem_num_keys=32, mem_key_dim=32)
    plus = TrainConfig(**size, **memory)
    dense = TrainConfig(**size, mem_layers=(), mlp_width=4 * plus.n_embd)
    per_unit = 2 * dense.n_embd * dense.n_layer  # multiply-adds of one hidden unit in each block
    dense.mlp_width += round((plus.macs_per_token() - dense.macs_per_token()) / per_unit)
    configs = {"dense": dense, "memory+": plus}
    times = measure({name: train_step(c) for name, c in configs.items()}, config.repeats)
    print(f"a training step with {plus.batch_size * plus.block_size:,} tokens, {plus.n_layer} blocks, "
          f"{plus.n_embd} wide, {plus.mem_num_keys**2:,} slots, on {DEVICE}:")
    for name, seconds in times.items():
        print(f"  {name:10}{median_and_range(seconds)}, {ratio(times, name, 'dense'):.2f} times dense; "
              f"{configs[name].macs_per_token():,} multiply-adds per token")
    return [dict(bench="gpt2", method=name, seconds=statistics.median(seconds),
                 macs=configs[name].macs_per_token()) for name, seconds in times.items()]


# --- kernels ------------------------------------------------------------------------------------------------

H100_BANDWIDTH = 3.35e12  # bytes per second
BAG = 128  # rows that a token reads


def measure_kernels(config: SpeedConfig) -> list[dict]:
    """Compiles all kernels for all GPUs of gpu_targets, and prints what each kernel needs."""
    if kernel.triton is None or os.environ.get("TRITON_INTERPRET") == "1":
        fail("'kernels' needs the package triton, and TRITON_INTERPRET must not be set")
    table = []
    print("kernel     values    V  target  registers  spilled  shared  wide loads  warps  programs  "
          "occupancy  in flight")
    for dtype, V in (("fp32", 256), ("fp32", 1024), ("bf16", 256), ("bf16", 1024)):
        for name, function, constants in kernel_sources(V, dtype):
            for target_name, target in gpu_targets().items():
                row = dict(bench="kernels", kernel=name, dtype=dtype, V=V, target=target_name)
                row |= compile_kernel(function, dtype, constants, target)
                tile = constants.get("ROWS", 1) * V * (2 if dtype == "bf16" and "gather" in name else 4)
                # bytes that a multiprocessor loads at once: a tile for each program that fits on it
                in_flight = f"{row['programs'] * tile / 1024:.0f} KB" if "programs" in row else "-"
                occupancy = f"{row['occupancy']:.0%}" if "occupancy" in row else "-"
                print(f"{name:10} {dtype:6} {V:5}  {target_name:6} {row['registers']:10} "
                      f"{row['spilled_bytes']:8} {row['shared']:7} {row['wide_loads']:11} "
                      f"{row['num_warps']:6} {row.get('programs', '-'):>9} {occupancy:>10} {in_flight:>10}")
                table.append(row)
    V = 1024
    print(f"\nbytes that must move per token (float32, V={V}, bag={BAG}, no row read twice), and the time "
          "that an H100 needs to move them:")
    for name, rows_moved in (("gather_sum", 1), ("gather_dot", 1), ("rowwise update", 2), ("adam update", 6)):
        moved = 4 * V * BAG * rows_moved
        print(f"  {name:16} {moved / 1e6:6.2f} MB  {1e9 * moved / H100_BANDWIDTH:6.0f} ns")
    return table


# --- operations ---------------------------------------------------------------------------------------------

def measure_operations(config: SpeedConfig) -> list[dict]:
    if DEVICE == "cpu":
        return measure_three_operations(config, 65_536, 256, torch.float32, "uniform")
    return [row for V, dtype in ((256, torch.float32), (1024, torch.float32), (1024, torch.bfloat16))
            for reads in ("uniform", "zipf")
            for row in measure_three_operations(config, 1_048_576, V, dtype, reads)]


def measure_three_operations(config: SpeedConfig, num_values: int, V: int, dtype: torch.dtype,
                             reads: str) -> list[dict]:
    """Bytes per second of each operation on this device, also in percent of the speed of a copy."""
    N, table = 4096, []
    bandwidth = copy_bandwidth(config.repeats)
    values = torch.empty(num_values, V, device=DEVICE, dtype=dtype).normal_()
    indices = draw_indices(reads, num_values, N, BAG).int()
    weights, dy = torch.rand(N, BAG, device=DEVICE), torch.randn(N, V, device=DEVICE, dtype=dtype)
    state = {"v": torch.zeros(num_values, 8, device=DEVICE), "step": torch.ones((), dtype=int, device=DEVICE)}
    seed = 1 if dtype == torch.bfloat16 else None
    times = measure({
        "gather_sum": lambda: kernel.gather_sum(values, indices, weights),
        "gather_dot": lambda: kernel.gather_dot(values, indices, dy),
        "rowwise update": lambda: kernel.scatter_update(values, [(indices, weights, dy)], state, lr=1e-3,
                                                        seed=seed),
        "index_select": lambda: values.index_select(0, indices.view(-1)),
    }, config.repeats)
    touched = len(indices.unique())
    print(f"\n{reads} reads of {num_values:,} rows x {V}, {str(dtype)[6:]}, {N:,} tokens x {BAG} rows, "
          f"{touched:,} rows touched, on {device_name()}, where a copy moves {bandwidth / 1e9:,.0f} GB/s:")
    for name, seconds in times.items():
        # a touched row is loaded and stored; index_select also stores what it reads
        rows_moved = {"rowwise update": 2 * touched, "index_select": 2 * N * BAG}.get(name, N * BAG)
        speed = V * dtype.itemsize * rows_moved / statistics.median(seconds)
        goal = f" (goal: {GOALS[name]:.0%})" if name in GOALS and reads == "uniform" else ""
        print(f"  {name:16}{median_and_range(seconds)}, {speed / 1e9:,.0f} GB/s, "
              f"{speed / bandwidth:.0%} of a copy{goal}")
        table.append(dict(bench="operations", method=name, rows=num_values, V=V, dtype=str(dtype)[6:],
                          reads=reads, touched=touched, device=device_name(), bytes_per_second=speed,
                          share_of_copy=speed / bandwidth, seconds=statistics.median(seconds)))
    return table


MEASUREMENTS = {  # name: (function, its options)
    "step": (measure_step, StepConfig),
    "search": (measure_search, SpeedConfig),
    "model": (measure_model, ModelConfig),
    "gpt2": (measure_gpt2, SpeedConfig),
    "operations": (measure_operations, SpeedConfig),
    "kernels": (measure_kernels, SpeedConfig),
}


@command
def main(argv: list[str] | None = None) -> None:
    name, rest = first_word(argv, MEASUREMENTS, __doc__, "a measurement")
    measurement, config_class = MEASUREMENTS[name]
    config = build(config_class, parse(config_class, rest, description=__doc__)[1])
    if not Path(config.json).parent.is_dir():  # before measuring, which takes minutes
        fail(f"--json={config.json}: there is no folder {Path(config.json).parent}")
    table = measurement(config)
    if config.json:
        Path(config.json).write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")


if __name__ == "__main__":
    main()
