"""
How fast is nanoPKM? Each number is the median of several measurements. Functions that are compared run
alternately, so noise affects all of them.

    python -m experiments.speed search      the search on a GPU, in Triton and in PyTorch
    python -m experiments.speed layer       a training step of a layer: nanoPKM, others, and a dense MLP
    python -m experiments.speed step        a training step of a pool alone: nanoPKM and plain PyTorch
    python -m experiments.speed model       a training step of the models of experiments.compare; profiles of
                                            dense and memory+
    python -m experiments.speed model --models=dense --n_embd=768 ...   dense and memory+, in another size:
                                            all models then cost as much as memory+
    python -m experiments.speed operations  the operations on the pool, compared with a copy
    python -m experiments.speed step --help     the options; --json=FILE saves each result at once
"""

import functools
import itertools
import json
import math
import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import Literal

from runtime.cli import build, command, fail, first_word, parse

import torch
from torch.nn import functional as F

import kernel
from experiments.models import EXPERIMENTS, MODELS, choose_models, costs
from memory import MemoryLayer, best_slots, fast_search
from model import GPT, MLP, GPTConfig
from pool import PoolOptimizer, ValuePool
from train import TrainConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE_NAME = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
CALLS = 10 if DEVICE == "cuda" else 1  # per measurement; several, because the CPU runs ahead of a GPU


@dataclass
class SpeedConfig:
    json: str = ""  # file for the results, as JSON lines
    repeats: int = 9  # measurements of each function, after one to warm up


@dataclass
class SearchConfig(SpeedConfig):  # the defaults are the sizes of a step of GPT-2
    tokens: int = 16_384  # tokens per step
    num_keys: tuple[int, ...] = (128, 512, 1024)  # half-keys per side
    knn: tuple[int, ...] = (16, 32)  # slots per head
    heads: int = 4  # searches per token
    key_dim: int = 256  # width of a query


@dataclass
class LayerConfig(SpeedConfig):
    rows: tuple[int, ...] = (16_384, 65_536, 262_144, 1_048_576, 4_194_304)  # sizes of the pool, squares
    tokens: tuple[int, ...] = (512,)  # tokens per step
    peers_up_to: int = 1_048_576  # largest pool for the other methods, which need up to 4 times its memory
    value_dim: int = 256  # columns of a row, and width of the layer; a multiple of 8
    bag: int = 128  # rows that a token reads; in a layer, with 4 heads


@dataclass
class StepConfig(LayerConfig):
    rows: tuple[int, ...] = (65_536, 262_144, 1_048_576, 4_194_304)  # sizes of the pool
    tokens: tuple[int, ...] = (512, 2048)  # tokens per step
    reads: tuple[Literal["uniform", "zipf"], ...] = ("uniform", "zipf")  # how the rows are drawn
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the values, weights and gradients


@dataclass
class ModelConfig(SpeedConfig, GPTConfig):  # the defaults of a model are those of experiments.compare facts
    models: tuple[str, ...] = ()  # models of experiments.compare, beside dense and memory+; none: all
    compile: bool = False  # compile the models with torch.compile
    batch_size: int = 16  # sequences per step


def measure(functions: dict, repeats: int) -> dict:
    """{name: function} -> {name: sorted seconds per call}. The functions run alternately."""
    times = {name: [] for name in functions}
    for i, (name, function) in itertools.product(range(repeats + 1), functions.items()):
        synchronize()
        t0 = perf_counter()
        for _ in range(CALLS):
            function()
        synchronize()
        if i > 0:
            times[name].append((perf_counter() - t0) / CALLS)
    return {name: sorted(seconds) for name, seconds in times.items()}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_and_range(times: list[float]) -> str:
    return f"{1e3 * median(times):8.2f} ms ({1e3 * times[0]:.2f} to {1e3 * times[-1]:.2f})"


def draw_indices(reads: str, num_values: int, N: int, bag: int) -> torch.Tensor:
    if reads == "uniform":
        return torch.randint(num_values, (N, bag), device=DEVICE)
    # zipf: rank r has a probability proportional to 1/r. The multiplication spreads the ranks over the pool
    ranks = (num_values ** torch.rand(N, bag, device=DEVICE, dtype=torch.float64)).long() - 1
    return (ranks.clamp(max=num_values - 1) * 2_654_435_761) % num_values


# --- search -------------------------------------------------------------------------------------------------

def search_step(queries, half_keys, d_scores, knn: int, side: str) -> None:
    scores, _ = fast_search(queries, half_keys, knn, side)
    torch.autograd.grad(scores, (queries, half_keys), d_scores)


def measure_search(config: SearchConfig, options: dict):
    """A `step` is the forward and the backward pass. `choose` is the forward pass without dot products."""
    build(kernel.resolve_kernel, dict(kernel="triton", device=DEVICE))
    N, H, D = config.tokens, config.heads, config.key_dim
    for S, K in itertools.product(config.num_keys, config.knn):
        queries = torch.randn(N, H, 2, D // 2, device=DEVICE, requires_grad=True)
        half_keys = torch.randn(H, 2, S, D // 2, device=DEVICE, requires_grad=True)
        half_scores, d_scores = torch.randn(H, 2, N, S, device=DEVICE), torch.randn(N, H, K, device=DEVICE)
        step = queries, half_keys, d_scores, K
        times = measure({
            "choose, triton": functools.partial(best_slots, half_scores, K, "triton"),
            "choose, torch": functools.partial(best_slots, half_scores, K, "torch"),
            "step, triton": functools.partial(search_step, *step, "triton"),
            "step, torch": functools.partial(search_step, *step, "torch"),
        }, config.repeats)
        print(f"\n{N:,} tokens, {H} heads, {S:,} half-keys per side, {K} slots, on {DEVICE_NAME}:")
        for name, seconds in times.items():
            faster = median(times[name.replace("triton", "torch")]) / median(seconds)
            print(f"  {name:16}{median_and_range(seconds)}, {faster:.1f} times as fast as torch", flush=True)
            yield dict(method=name, tokens=N, heads=H, num_keys=S, knn=K, key_dim=D, times=seconds)


# --- layer and step -----------------------------------------------------------------------------------------

OURS = ("rowwise", "adam")
PEERS = ("embedding_bag, AdamW", "embedding_bag, SparseAdam", "indexing, AdamW")  # in plain PyTorch
EMBEDDING_BAG = "embedding_bag, fused Adam"  # our layer, but with a pool in plain PyTorch


def make_layer_step(kind: str, num_values: int, tokens: int, config: LayerConfig):
    """A training step of a layer with 4 heads, which finds the rows itself."""
    V, num_keys, knn = config.value_dim, math.isqrt(num_values), config.bag // 4
    pools = [ValuePool(num_values, V, device=DEVICE)] if kind in ("nanoPKM", EMBEDDING_BAG) else []
    if pools:
        layer = MemoryLayer(V, num_keys, heads=4, knn=knn, key_dim=V, value_dim=V)
    elif kind == "dense MLP":
        layer = MLP(V, 4 * V)
    else:
        from product_key_memory import PKM
        layer = PKM(V, heads=4, num_keys=num_keys, topk=knn, dim_head=V // 2)
    parameters, optimizers = list(layer.to(DEVICE).parameters()), []
    if kind == "nanoPKM":
        optimizers = [PoolOptimizer(pools[0].parameters(), lr=1e-3)]
    elif kind == EMBEDDING_BAG:
        parameters += pools[0].parameters()
        pools[0].forward = functools.partial(read_with_embedding_bag, pools[0].values)
    # Adam is PyTorch's default, which is slower than fused Adam
    optimizers.append(torch.optim.Adam(parameters, fused=not kind.endswith(", Adam") or None))
    x = torch.randn(1, tokens, V, device=DEVICE, requires_grad=True)
    dy = torch.randn_like(x)

    def step():
        layer(x, *pools).backward(dy)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()  # frees the memory of the gradient before another method runs

    return step


def read_with_embedding_bag(values, indices, weights, sparse: bool = False):
    return F.embedding_bag(indices, values, per_sample_weights=weights, mode="sum", sparse=sparse)


def measure_layer(config: LayerConfig, options: dict):
    others = [EMBEDDING_BAG]
    if find_spec("product_key_memory"):
        others += ["product-key-memory, fused Adam", "product-key-memory, Adam"]
    else:
        print("left out: lucidrains' layer. pip install product-key-memory")
    print(f"layers {config.value_dim} wide, {config.bag} rows per token, on {DEVICE_NAME}")
    for rows, tokens in itertools.product(config.rows, config.tokens):
        if math.isqrt(rows) ** 2 != rows:
            fail(f"--rows={rows}: a layer needs a square number of rows, such as {math.isqrt(rows) ** 2}")
        kinds = ["nanoPKM", *(others if rows <= config.peers_up_to else []), "dense MLP"]
        times = measure({kind: make_layer_step(kind, rows, tokens, config) for kind in kinds}, config.repeats)
        print(f"\n{rows:,} rows, {tokens:,} tokens:")
        for name, seconds in times.items():
            slower = f"{median(seconds) / median(times['nanoPKM']):.2f} times as long as nanoPKM"
            print(f"  {name:32}{median_and_range(seconds)}, {slower}", flush=True)
            yield dict(method=name, rows=rows, tokens=tokens, V=config.value_dim, times=seconds)


def make_step(kind: str, num_values: int, indices, weights, dy):
    """A training step of a pool: the forward pass, both gradients and the optimiser."""
    pool = ValuePool(num_values, dy.size(1), dy.dtype, device=DEVICE)
    is_sparse = kind == "embedding_bag, SparseAdam"
    if kind in OURS:
        optimizer = PoolOptimizer(pool.parameters(), lr=1e-3, kind=kind,
                                  stochastic_rounding=dy.dtype == torch.bfloat16)
    elif is_sparse:
        optimizer = torch.optim.SparseAdam([pool.values])
    else:
        optimizer = torch.optim.AdamW([pool.values], fused=True)

    def step():
        if kind in OURS:
            y = pool(indices, weights)
        elif kind == "indexing, AdamW":
            y = torch.einsum("nk,nkv->nv", weights, pool.values[indices])
        else:
            y = read_with_embedding_bag(pool.values, indices, weights, is_sparse)
        y.backward(dy)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_step(config: StepConfig, options: dict):
    V, bag, dtype = config.value_dim, config.bag, getattr(torch, config.dtype)
    print(f"V={V}, bag={bag}, {config.dtype}, {DEVICE_NAME}")
    # in bfloat16 on a GPU, PyTorch cannot compute the gradient of embedding_bag's weights
    peers = PEERS if dtype == torch.float32 or DEVICE == "cpu" else ("indexing, AdamW",)
    for reads, num_values, N in itertools.product(config.reads, config.rows, config.tokens):
        indices = draw_indices(reads, num_values, N, bag)
        weights = torch.rand(N, bag, device=DEVICE, dtype=dtype, requires_grad=True)
        data = num_values, indices, weights, torch.randn(N, V, device=DEVICE, dtype=dtype)
        kinds = (*OURS, *peers) if num_values <= config.peers_up_to else OURS
        times = measure({kind: make_step(kind, *data) for kind in kinds}, config.repeats)
        touched = len(indices.unique())
        print(f"\n{num_values:,} rows, {N:,} tokens, {reads} reads, {touched:,} rows touched:")
        for name, seconds in times.items():
            faster = ", ".join(f"{median(times[peer]) / median(seconds):.1f} times as fast as {peer}"
                               for peer in peers if peer in times and name in OURS)
            print(f"  {name:30}{median_and_range(seconds)}  {faster}", flush=True)
            yield dict(method=name, rows=num_values, tokens=N, reads=reads, V=V, dtype=config.dtype,
                       times=seconds)


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


def choose_configs(models: list[str], size: dict) -> dict[str, TrainConfig]:
    """The models of the experiment facts. size: other options. All models then cost as much as memory+."""
    configs = {}
    for model in dict.fromkeys(("dense", "memory+", *models)):
        options = dict(vocab_size=754) | size
        if not EXPERIMENTS["facts"].config(model).mem_layers:
            options["mem_layers"] = ()
        configs[model] = EXPERIMENTS["facts"].config(model, **options)
    if size:
        target = costs(configs["memory+"])[0]
        for model in configs.keys() - {"memory+"}:
            width = 4 * configs[model].n_embd
            macs, twice = (costs(replace(configs[model], mlp_width=w))[0] for w in (width, 2 * width))
            units = (target - macs) / ((twice - macs) / width)
            width += 2 * round(units / 2)  # even: moe uses two experts per token
            if width < 1:
                raise ValueError(f"models={model} costs more than memory+, even without MLPs: choose a "
                                 "larger --n_embd")
            configs[model].mlp_width = width
    return configs


def measure_model(config: ModelConfig, options: dict) -> list[dict]:
    size = {name: options[name] for name in options.keys() - {"json", "repeats", "models", "compile"}}
    models = choose_models(config.models, [name for name in MODELS if name != "shifted-short"])
    configs = build(choose_configs, dict(models=models, size=size))
    steps = {name: train_step(replace(c, compile=config.compile)) for name, c in configs.items()}
    times, macs = measure(steps, 3 * config.repeats), {name: costs(c)[0] for name, c in configs.items()}
    c = configs["memory+"]
    print(f"a step of {c.batch_size * c.block_size:,} tokens, {c.n_layer} blocks, {c.n_embd} wide, "
          f"{c.mem_num_keys**2:,} slots in memory+, on {DEVICE_NAME}:")
    for name, seconds in times.items():
        print(f"  {name:20}{median_and_range(seconds)}, {median(seconds) / median(times['dense']):.2f} times "
              f"dense; {macs[name]:,} multiply-adds per token")
    for name in ("dense", "memory+"):
        with torch.profiler.profile() as profiler:
            steps[name]()
        print(f"\na step of {name}:\n" + profiler.key_averages().table(
            sort_by=f"self_{'device' if DEVICE == 'cuda' else 'cpu'}_time_total", row_limit=20))
    return [dict(method=name, macs=macs[name], times=seconds) for name, seconds in times.items()]


# --- operations ---------------------------------------------------------------------------------------------

def measure_operations(config: SpeedConfig, options: dict):
    if DEVICE == "cpu":
        yield from measure_one_size(config.repeats, 65_536, 256, torch.float32, "uniform")
        return
    sizes = (256, torch.float32), (1024, torch.float32), (1024, torch.bfloat16)
    for (V, dtype), reads in itertools.product(sizes, ("uniform", "zipf")):
        yield from measure_one_size(config.repeats, 1_048_576, V, dtype, reads)


def measure_one_size(repeats: int, num_values: int, V: int, dtype: torch.dtype, reads: str):
    """Bytes per second of each operation on this device, also in percent of the speed of a copy."""
    N, bag = 4096, 128
    values = torch.empty(num_values, V, device=DEVICE, dtype=dtype).normal_()
    target = torch.empty_like(values)
    indices = draw_indices(reads, num_values, N, bag).int()
    weights, dy = torch.rand(N, bag, device=DEVICE), torch.randn(N, V, device=DEVICE, dtype=dtype)
    state = {"v": torch.zeros(num_values, 8, device=DEVICE), "step": torch.ones((), dtype=int, device=DEVICE)}
    seed = 1 if dtype == torch.bfloat16 else None
    times = measure({
        "copy": lambda: target.copy_(values),
        "gather_sum": lambda: kernel.gather_sum(values, indices, weights),
        "gather_dot": lambda: kernel.gather_dot(values, indices, dy),
        "rowwise update": lambda: kernel.scatter_update(values, [(indices, weights, dy)], state, lr=1e-3,
                                                        seed=seed),
        "index_select": lambda: values.index_select(0, indices.view(-1)),
    }, repeats)
    touched = len(indices.unique())
    # rows that are loaded or stored: a copied or touched row is both, and so is a row of index_select
    moved = {"copy": 2 * num_values, "rowwise update": 2 * touched, "index_select": 2 * N * bag}
    speeds = {name: V * dtype.itemsize * moved.get(name, N * bag) / median(times[name]) for name in times}
    print(f"\n{reads} reads of {num_values:,} rows x {V}, {str(dtype)[6:]}, {N:,} tokens x {bag} rows, "
          f"{touched:,} rows touched, on {DEVICE_NAME}:")
    for name, speed in speeds.items():
        share = speed / speeds["copy"]
        print(f"  {name:16}{median_and_range(times[name])}, {speed / 1e9:,.0f} GB/s, {share:.0%} of a copy",
              flush=True)
        yield dict(method=name, rows=num_values, V=V, dtype=str(dtype)[6:], reads=reads, touched=touched,
                   bytes_per_second=speed, share_of_copy=share, times=times[name])


MEASUREMENTS = {"search": (measure_search, SearchConfig), "layer": (measure_layer, LayerConfig),
                "step": (measure_step, StepConfig), "model": (measure_model, ModelConfig),
                "operations": (measure_operations, SpeedConfig)}


@command
def main(argv: list[str] | None = None) -> None:
    name, rest = first_word(argv, MEASUREMENTS, __doc__, "a measurement")
    measurement, config_class = MEASUREMENTS[name]
    _, options = parse(config_class, rest, None, __doc__, name)
    config = build(config_class, options)
    with open(config.json or os.devnull, "a", encoding="utf-8") as file:
        for number, row in enumerate(measurement(config, options)):
            if config.json and not number:  # only now: a mistake loses no older results
                file.truncate(0)
            row |= {"bench": name, "device": DEVICE_NAME, "seconds": median(row["times"])}
            print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    main()
