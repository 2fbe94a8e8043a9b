"""
How fast is nanoPKM? Each number is the median of several measurements. Functions that are compared run
alternately, so noise affects all of them.

    python -m experiments.speed step        a training step of a pool, with nanoPKM and with plain PyTorch
    python -m experiments.speed model       a training step of the models of experiments.compare; a profile of
                                            what memory+ adds to dense. --compile: compiled steps, too
    python -m experiments.speed model --models=dense --n_embd=768 ...   dense and memory+, in another size
    python -m experiments.speed operations  the operations on the pool, compared with a copy
    python -m experiments.speed step --help     the options; --json=FILE saves the results
"""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal

import torch
from torch.nn import functional as F

import kernel
from experiments.models import EXPERIMENTS, MODELS, costs
from model import GPT
from pool import PoolOptimizer, ValuePool
from runtime.cli import at_least, build, check_choices, command, fail, first_word, parse
from train import TrainConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CALLS = 10 if DEVICE == "cuda" else 1  # per measurement; several, because the CPU runs ahead of a GPU
GOALS = {"gather_sum": 0.8, "gather_dot": 0.8, "rowwise update": 0.6}  # on a GPU, 1.0 is the speed of a copy


@dataclass
class SpeedConfig:
    json: str = ""  # file for the results, as JSON lines
    repeats: int = 9  # measurements of each function, after one to warm up

    def __post_init__(self):
        check_choices(self)
        at_least(1, self, "repeats")


@dataclass
class StepConfig(SpeedConfig):
    rows: tuple[int, ...] = (65_536, 262_144, 1_048_576, 4_194_304)  # sizes of the pool
    tokens: tuple[int, ...] = (512, 2048)  # tokens per step
    reads: tuple[str, ...] = ("uniform", "zipf")  # the distribution of the rows that are read: uniform, zipf
    peers_up_to: int = 1_048_576  # largest pool for plain PyTorch, which needs up to 4 times its memory
    value_dim: int = 256  # columns of a row, a multiple of 8
    bag: int = 128  # rows that a token reads
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the values, weights and gradients

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "value_dim", "bag")
        if unknown := set(self.reads) - {"uniform", "zipf"}:
            raise ValueError(f"reads={','.join(unknown)} must be uniform or zipf")


@dataclass
class ModelConfig(SpeedConfig):
    models: tuple[str, ...] = ()  # models of experiments.compare; none: all
    compile: bool = False  # measure each model a second time, with torch.compile

    # --- size; 0: as in experiments.compare facts. With another size, all models cost as much as memory+
    vocab_size: int = 754  # tokens in the vocabulary
    block_size: int = 0  # longest context, in tokens
    batch_size: int = 0  # sequences per step
    n_layer: int = 0  # Transformer blocks
    n_head: int = 0  # attention heads
    n_embd: int = 0  # width of the model
    mem_layers: tuple[int, ...] = ()  # blocks with a memory layer, in models that have any
    mem_num_keys: int = 0  # half-keys for each half of a query
    mem_key_dim: int = 0  # width of a query, both halves together
    mem_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the pool's values

    def __post_init__(self):
        super().__post_init__()
        self.models = tuple(name for names in self.models for name in names.split(","))
        if unknown := set(self.models) - MODELS.keys():
            raise ValueError(f"models={','.join(unknown)} must be among {','.join(MODELS)}")


def measure(functions: dict, repeats: int) -> dict:
    """{name: function} -> {name: sorted seconds per call}. The functions run alternately."""
    times = {name: [] for name in functions}
    for i, (name, function) in itertools.product(range(repeats + 1), functions.items()):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        t0 = perf_counter()
        for _ in range(CALLS):
            function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        if i > 0:
            times[name].append((perf_counter() - t0) / CALLS)
    return {name: sorted(seconds) for name, seconds in times.items()}


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def median_and_range(times: list[float]) -> str:
    return f"{1e3 * median(times):8.2f} ms ({1e3 * times[0]:.2f} to {1e3 * times[-1]:.2f})"


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second of a large copy, counting bytes read and bytes written."""
    size = 2**28 if DEVICE == "cuda" else 2**26  # much larger than a cache
    source, target = torch.ones(size, device=DEVICE), torch.empty(size, device=DEVICE)
    times = measure({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return 2 * source.nbytes / median(times)


def draw_indices(reads: str, num_values: int, N: int, bag: int) -> torch.Tensor:
    if reads == "uniform":
        return torch.randint(num_values, (N, bag), device=DEVICE)
    # zipf: rank r has a probability proportional to 1/r. The multiplication spreads the ranks over the pool
    ranks = (num_values ** torch.rand(N, bag, device=DEVICE, dtype=torch.float64)).long() - 1
    return (ranks.clamp(max=num_values - 1) * 2_654_435_761) % num_values


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
        fastest = min((median(times[name]) for name in peers if name in times), default=None)
        for name, seconds in times.items():
            row = dict(bench="step", method=name, rows=num_values, tokens=N, reads=reads, touched=touched,
                       V=V, dtype=config.dtype, device=device_name(), times=seconds, seconds=median(seconds))
            line = f"  {name:26}{median_and_range(seconds)}"
            if name in ("rowwise", "adam"):
                # a read loads a row in both passes. The update loads and stores touched rows and moments
                moved = 2 * V * dtype.itemsize * (N * bag + touched)
                moved += 4 * V * 4 * touched if name == "adam" else 0
                row |= dict(bytes=moved, seconds_at_copy_bandwidth=moved / bandwidth)
                line += f"; {moved / 1e6:,.0f} MB must move, {1e3 * moved / bandwidth:.1f} ms at copy speed"
                if fastest:
                    row["times_faster_than_peers"] = fastest / row["seconds"]
                    line += f"; {row['times_faster_than_peers']:.1f} times as fast as plain PyTorch"
                if PEERS[0] in times:
                    line += f", {median(times[PEERS[0]]) / row['seconds']:.1f} times as fast as {PEERS[0]}"
            print(line)
            table.append(row)
    return table


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


def choose_configs(config: ModelConfig) -> dict[str, TrainConfig]:
    experiment, base = EXPERIMENTS["facts"], EXPERIMENTS["facts"].config("memory+")
    names = ("block_size", "batch_size", "n_layer", "n_head", "n_embd", "mem_layers", "mem_num_keys",
             "mem_key_dim")
    size = {name: getattr(config, name) for name in names if getattr(config, name)}
    configs = {}
    for model in dict.fromkeys(("dense", "memory+", *(config.models or MODELS))):
        changes = size if experiment.config(model).mem_layers else size | dict(mem_layers=())
        if "max_steps" not in MODELS[model]:  # shifted-short has the steps of shifted
            configs[model] = experiment.config(model, vocab_size=config.vocab_size,
                                               mem_dtype=config.mem_dtype, **changes)
    if size:
        width, target = 4 * (config.n_embd or base.n_embd), costs(configs["memory+"])[0]
        for model in configs.keys() - {"memory+"}:
            macs, twice = (costs(replace(configs[model], mlp_width=w))[0] for w in (width, 2 * width))
            units = (target - macs) / ((twice - macs) / width)
            configs[model].mlp_width = width + 2 * round(units / 2)  # even: moe uses two experts per token
    return configs


def measure_model(config: ModelConfig) -> list[dict]:
    configs = build(choose_configs, dict(config=config))
    macs = {name: costs(c)[0] for name, c in configs.items()}
    if config.compile:
        compiled = {f"{name}, compiled": replace(c, compile=True) for name, c in configs.items()}
        configs, macs = configs | compiled, macs | {f"{name}, compiled": macs[name] for name in macs}
    steps = {name: train_step(c) for name, c in configs.items()}
    times = measure(steps, 3 * config.repeats)
    c = configs["memory+"]
    print(f"a step of {c.batch_size * c.block_size:,} tokens, {c.n_layer} blocks, {c.n_embd} wide, "
          f"{c.mem_num_keys**2:,} slots in memory+, on {device_name()}:")
    for name, seconds in times.items():
        print(f"  {name:20}{median_and_range(seconds)}, {median(seconds) / median(times['dense']):.2f} times "
              f"dense; {macs[name]:,} multiply-adds per token")
    profiles = {name: profile(steps[name], config.repeats) for name in ("dense", "memory+")}
    extra = {name: profiles["memory+"].get(name, 0) - profiles["dense"].get(name, 0)
             for name in profiles["dense"] | profiles["memory+"]}
    print(f"\nwhat memory+ adds to a step of dense, {sum(extra.values()):.1f} ms in this profile:")
    for name in sorted(extra, key=lambda name: -abs(extra[name]))[:20]:
        print(f"  {name[:60]:60}{extra[name]:8.2f} ms")
    return [dict(bench="model", method=name, device=device_name(), macs=macs[name], seconds=median(seconds))
            for name, seconds in times.items()]


def profile(step, repeats: int) -> dict[str, float]:
    """{operation: milliseconds per step}, without the operations that it calls."""
    step()  # to warm up
    with torch.profiler.profile() as profiler:
        for _ in range(repeats):
            step()
    time_of = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    return {event.key: getattr(event, time_of) / 1e3 / repeats for event in profiler.key_averages()}


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
    N, bag, table = 4096, 128, []
    bandwidth = copy_bandwidth(config.repeats)
    values = torch.empty(num_values, V, device=DEVICE, dtype=dtype).normal_()
    indices = draw_indices(reads, num_values, N, bag).int()
    weights, dy = torch.rand(N, bag, device=DEVICE), torch.randn(N, V, device=DEVICE, dtype=dtype)
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
    print(f"\n{reads} reads of {num_values:,} rows x {V}, {str(dtype)[6:]}, {N:,} tokens x {bag} rows, "
          f"{touched:,} rows touched, on {device_name()}, where a copy moves {bandwidth / 1e9:,.0f} GB/s:")
    for name, seconds in times.items():
        # a touched row is loaded and stored; index_select also stores what it reads
        rows_moved = {"rowwise update": 2 * touched, "index_select": 2 * N * bag}.get(name, N * bag)
        speed = V * dtype.itemsize * rows_moved / median(seconds)
        goal = f" (goal: {GOALS[name]:.0%})" if name in GOALS and reads == "uniform" else ""
        print(f"  {name:16}{median_and_range(seconds)}, {speed / 1e9:,.0f} GB/s, "
              f"{speed / bandwidth:.0%} of a copy{goal}")
        table.append(dict(bench="operations", method=name, rows=num_values, V=V, dtype=str(dtype)[6:],
                          reads=reads, touched=touched, device=device_name(), bytes_per_second=speed,
                          share_of_copy=speed / bandwidth, seconds=median(seconds)))
    return table


MEASUREMENTS = {  # name: (function, its options)
    "step": (measure_step, StepConfig),
    "model": (measure_model, ModelConfig),
    "operations": (measure_operations, SpeedConfig),
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
