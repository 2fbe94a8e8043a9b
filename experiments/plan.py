"""
Estimates the memory and the traffic that a model needs on each of many GPUs. Nothing is measured.

    python -m experiments.plan             the largest memory of Berges et al. 2024 on 64 GPUs
    python -m experiments.plan --help      all options
"""

from dataclasses import dataclass

from runtime.cli import build, command, parse

from experiments.models import costs
from model import GPTConfig

MEMORY = 80e9  # bytes of memory of a GPU
LARGEST = dict(vocab_size=128_256, block_size=4096, n_layer=24, n_head=16, n_embd=2048, mem_num_keys=8192,
               mem_layers=(4, 12, 20), mem_knn=32, mem_key_dim=1024, mem_dtype="bfloat16")  # of Berges et al.


@dataclass
class PlanConfig(GPTConfig):
    gpus: int = 64  # number of GPUs, one process each
    mem_group_size: int = 0  # GPUs that split the pool's columns between them; 0: all of them
    tokens: int = 16_384  # tokens per step and GPU
    value_blocks: int = 64  # with rowwise: second moments per row; a multiple of mem_group_size

    def __post_init__(self):
        super().__post_init__()
        self.mem_group_size = self.mem_group_size or self.gpus
        if any(number % self.mem_group_size for number in (self.gpus, self.n_embd, self.value_blocks)):
            raise ValueError("mem_group_size must divide gpus, n_embd and value_blocks")


def bytes_sent(c: PlanConfig) -> dict[str, float]:
    """
    Bytes that a GPU sends for each of its tokens and each memory layer, if all activations are float32.

    G GPUs share a pool. Each GPU sends its bags to all others, and gets the gradients of the weights back. It
    keeps 1/G of the sums and of their gradients. GPUs with the same columns send each other their reads.
    """
    G, bag, V = c.mem_group_size, c.mem_heads * c.mem_knn, c.n_embd
    return {"bags": (G - 1) * bag * (4 + 4),
            "sums": (G - 1) / G * V * 4,
            "gradients of the sums": (G - 1) / G * V * 4,
            "gradients of the weights": (G - 1) * bag * 4,
            "reads, to replicas": (c.gpus // G - 1) * (G * bag * (4 + 4) + V * 4)}


def plan(c: PlanConfig) -> dict[str, float]:
    """Prints the plan. Returns {optimiser: bytes per GPU}."""
    _, counts = costs(c)
    G, bag, V, layers = c.mem_group_size, c.mem_heads * c.mem_knn, c.n_embd, len(c.mem_layers)
    size, slots = {"float32": 4, "bfloat16": 2}[c.mem_dtype], counts["memory"] // V
    print(f"{counts['dense'] / 1e9:.2f}B dense parameters; a pool of {slots:,} slots x {V:,} = "
          f"{counts['memory'] / 1e9:.1f}B ({c.mem_dtype}), read by {layers} layers, {bag} slots per token;\n"
          f"{c.gpus} GPUs, {G} share a pool, {c.tokens:,} tokens per GPU and step\n")

    parts = {"dense: weights, gradients, AdamW": counts["dense"] * 16,
             "values": counts["memory"] * size / G, "slot use": slots * 4}
    # instead of a dense gradient. Sorting needs, per row that is read, the index and the weight twice, the
    # token three times, and the order
    reads = {"reads of a step": layers * c.tokens * (c.gpus // G) * (G * bag * (4 + 4) + V * 4),
             "sorting them": layers * c.tokens * c.gpus * bag * (2 * (4 + 4) + 3 * 8 + 8)}
    adam = {"state": counts["memory"] * 8 / G}
    kinds = {"rowwise": {"state": slots * c.value_blocks * 4 / G} | reads, "adam": adam | reads,
             "adam and a dense gradient": adam | {"gradient": counts["memory"] * size / G}}
    totals = {}
    print("GB per GPU (a tenth of its memory is left for activations):")
    for name, part in parts.items():
        print(f"  {name:34}{part / 1e9:9.2f}")
    for name, extra in kinds.items():
        totals[name] = sum(parts.values()) + sum(extra.values())
        verdict = "fits" if totals[name] < 0.9 * MEMORY else f"does not fit {MEMORY / 1e9:.0f} GB"
        text = ", ".join(f"{part} {amount / 1e9:.2f}" for part, amount in extra.items())
        print(f"  + {name}: {text}; in all {totals[name] / 1e9:.1f}: {verdict}")

    print("\nbytes sent per token and memory layer:")
    for name, amount in bytes_sent(c).items():
        print(f"  {name:34}{amount:12,.0f}")
    return totals


@command
def main(argv: list[str] | None = None) -> None:
    options = parse(PlanConfig(**LARGEST), argv, description=__doc__)[1]
    build(plan, dict(c=build(PlanConfig, LARGEST | options)))


if __name__ == "__main__":
    main()
