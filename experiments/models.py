"""
Which models are compared, and on what. `python -m experiments.compare` trains them, and says how.

A model is one line: a name and options of train.py. An experiment is one entry of EXPERIMENTS: the options
that its models share, and the models. The options here are explicit, so another default of train.py does not
change a model.
"""

import sys
from dataclasses import asdict, dataclass

from runtime.cli import fail

import torch

from data.corpora import CORPORA
from data.write import Corpus, options_of
from model import GPT
from train import TrainConfig

# Options of train.py that change no number of a run, or that a line of results has beside its options
NOT_IN_LINES = {"lr", "seed", "out_dir", "resume", "export_hf", "eval_only", "keep", "keep_best", "device",
                "kernel", "compile", "mem_group_size", "mem_on_disk"}


@dataclass
class Experiment:
    options: dict  # options of train.py that all models share
    models: dict[str, dict]  # name: the options of each model, in addition

    @property
    def corpus(self) -> Corpus:
        return CORPORA[self.options["dataset"]]

    def config(self, model: str, **changes) -> TrainConfig:
        return TrainConfig(**self.options | self.models[model] | changes)

    def identity(self, model: str) -> dict:
        """What a line of results has of a model: the options of its corpus and of train.py."""
        return {"corpus": options_of(self.corpus), "options": options_of(self.config(model), NOT_IN_LINES)}


def train_command(config: TrainConfig) -> list[str]:
    """The command that trains with these options. It names all of them, so that no preset decides."""
    words = (f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
             for name, value in asdict(config).items())
    return [sys.executable, "train.py", *words]


def choose_models(names: tuple[str, ...], models) -> list[str]:
    """("dense,moe", "hash") -> ["dense", "moe", "hash"]. Without names: all models."""
    chosen = [name for text in names for name in text.split(",")] or list(models)
    if unknown := set(chosen) - set(models):
        fail(f"--models={','.join(unknown)} must be one of {', '.join(models)}")
    return list(dict.fromkeys(chosen))


def costs(config: TrainConfig) -> tuple[int, dict[str, int]]:
    """Multiply-adds per token, and the numbers of parameters. config needs a vocab_size."""
    with torch.device("meta"):  # large models take no memory
        model = GPT(config)
    return model.macs_per_token(), model.count_parameters()


# --- facts, ablation, mqar ----------------------------------------------------------------------------------

# Memory+ as published: the query comes from the state of its token, and memory layers are spread over depth
PUBLISHED = dict(mem_query="state", scale_embeddings=False, mem_layers=(0, 2))
# Better on facts: half of the query comes from the previous token, and the first blocks have the memory
SHIFTED = dict(mem_query="shifted", scale_embeddings=True, mem_layers=(0, 1))
UNSCALED = dict(scale_embeddings=False)  # on facts, better for `tokens` and the hash
SMALL = SHIFTED | dict(n_layer=3, n_head=4, n_embd=64, block_size=128, mem_num_keys=128, mem_heads=4,
                       mem_knn=16, mem_key_dim=32, batch_size=16, value_lr=6e-2)

# All models except dense-2x and hash-narrow cost the same multiply-adds per token (on facts, within 1%). A
# memory layer costs less than an MLP, so models with memory have wider MLPs in the other blocks. Models with
# larger pools have narrower queries
MODELS = {
    "dense": UNSCALED | dict(mem_layers=(), mlp_width=276),
    "memory+": PUBLISHED,
    "shifted": {},
    "tokens": UNSCALED | dict(mem_query="tokens"),
    "tokens-scaled": dict(mem_query="tokens"),
    "shifted-4x": dict(mem_num_keys=256, mem_key_dim=16, mlp_width=320),
    "moe": UNSCALED | dict(mem_layers=(), mlp_width=268, moe_layers=(1, 2)),  # as many parameters as memory+
    "dense-2x": UNSCALED | dict(mem_layers=(), mlp_width=872),
    "shifted-16x": dict(mem_num_keys=512, mem_key_dim=16, mlp_width=64),
    "shifted-short": dict(max_steps=1500),  # half of the steps: each takes less than twice the time of dense
    "hash": UNSCALED | dict(mem_kind="hash", mlp_width=572),
    "shifted-plain": dict(mem_layers=(0,), mem_swilu=False, mlp_width=288),  # one memory layer, no gate
    "shifted-unscaled": UNSCALED,
    "memory+-scaled": PUBLISHED | dict(scale_embeddings=True),
    "dense-scaled": dict(mem_layers=(), mlp_width=276),
    "hash-scaled": dict(mem_kind="hash", mlp_width=572),
    "hash-narrow": UNSCALED | dict(mem_kind="hash"),  # the MLP of `tokens`, so fewer multiply-adds
    # an expert of PEER has two rows
    "peer": dict(mem_kind="peer", mem_query="state", mem_num_keys=90, mlp_width=392),
}
ABLATIONS = {
    "shifted": {},  # the others change one thing, and mlp_width to keep the cost equal
    "mem_query=state": dict(mem_query="state"),
    "layers 1 and 2": dict(mem_layers=(1, 2)),
    "value_lr=3e-3": dict(value_lr=3e-3),
    "embeddings not scaled": UNSCALED,
    "no qk-norm": dict(mem_qk_norm=False),
    "no gate": dict(mem_swilu=False, mlp_width=320),
    "key_dim 16": dict(mem_key_dim=16, mlp_width=448),
    "2 heads of knn 32": dict(mem_heads=2, mem_knn=32, mem_key_dim=64),
    "knn 4": dict(mem_knn=4, mlp_width=304),
    "value_lr=24e-2": dict(value_lr=24e-2),
    "layers 0 to 2": dict(mem_layers=(0, 1, 2)),
}
FACTS = SMALL | dict(dataset="facts-4000", max_steps=3000, eval_interval=250)
EXPERIMENTS = {
    "facts": Experiment(FACTS, MODELS),
    "ablation": Experiment(FACTS | dict(max_steps=1500), ABLATIONS),
    "mqar": Experiment(  # two layers with one head can learn this
        SMALL | dict(dataset="mqar", n_layer=2, n_head=1, block_size=64, batch_size=32, max_steps=1000,
                     eval_interval=100),
        {"dense": dict(mem_layers=()), "shifted": dict(mem_layers=(1,)),
         "moe": dict(mem_layers=(), moe_layers=(1,), moe_experts=64)}),
}
SUMMARY = {  # the models of the main figure and of the table in README.md: their names there
    "dense": "dense GPT",
    "moe": "mixture of 32 experts",
    "memory+": "**Memory+ as published**",
    "shifted": "... half of the query from the previous token (`shifted`)",
    "tokens": "... the query from the embeddings of two tokens (`tokens`)",
    "hash": "a table read at a hash of two tokens, no search",
}

# Longer, on real text: 30 M tokens. Memory is in a third of the blocks, not in the first. All cost the same
SIX_BLOCKS = SMALL | UNSCALED | dict(n_layer=6, mem_layers=(2, 5), mem_query="state", dataset="code",
                                     max_steps=14_650, eval_interval=1465, eval_batches=100)
SIX_BLOCK_MODELS = {
    "dense": dict(mem_layers=(), mlp_width=256),
    "memory+": dict(mlp_width=240),
    "memory+-16x": dict(mem_num_keys=512, mem_key_dim=16, mlp_width=192),
    "memory+-scaled": dict(mlp_width=240, scale_embeddings=True),
    "memory+-16x-scaled": dict(mem_num_keys=512, mem_key_dim=16, mlp_width=192, scale_embeddings=True),
    "tokens": dict(mem_query="tokens", mlp_width=240),
    "shifted": dict(mem_query="shifted", mlp_width=240),
    "hash": dict(mem_kind="hash", mlp_width=320),
    "moe": dict(mem_layers=(), mlp_width=252, moe_layers=(2, 5), moe_experts=34),
}
EXPERIMENTS["code-small"] = Experiment(SIX_BLOCKS, SIX_BLOCK_MODELS)
EXPERIMENTS["code-short"] = Experiment(  # a fifth of the tokens, and more models
    SIX_BLOCKS | dict(max_steps=2930, eval_interval=586),
    SIX_BLOCK_MODELS | {
        "memory+-4x": dict(mem_num_keys=256, mem_key_dim=16, mlp_width=256),
        "dense-scaled": dict(mem_layers=(), mlp_width=256, scale_embeddings=True),
        "moe-scaled": SIX_BLOCK_MODELS["moe"] | dict(scale_embeddings=True),
        "value_lr=15e-3": dict(mlp_width=240, value_lr=15e-3),
        "value_lr=24e-2": dict(mlp_width=240, value_lr=24e-2),
        "mem_mode=add": dict(mem_mode="add", mlp_width=160),
        "shifted-below": dict(mem_query="shifted", mem_layers=(0, 3), scale_embeddings=True, mlp_width=240),
        "knn 32": dict(mem_knn=32, mem_key_dim=16, mlp_width=272)})
# Real facts: 5 M tokens, short lines of the World Factbook and of WordNet, each read 49 times
EXPERIMENTS["reference-facts"] = Experiment(
    SIX_BLOCKS | dict(dataset="reference-facts", max_steps=2450, eval_interval=245),
    {name: SIX_BLOCK_MODELS[name] for name in ("dense", "memory+", "tokens", "hash", "moe")})

# The models of erase and teach: that of `make train`, with one option changed; the last two scale embeddings
STATES = SMALL | dict(dataset="facts", max_steps=700, eval_interval=700, keep=1, resume=True)
TWO_TOKENS = STATES | UNSCALED | dict(mem_query="tokens")
EDITED = {"tokens": TWO_TOKENS, "hash": TWO_TOKENS | dict(mem_kind="hash"),
          "shifted": STATES, "state": STATES | dict(mem_query="state")}


# --- facts-large and code, for a GPU ------------------------------------------------------------------------

# 64k tokens per step. Memory layers are spread over the depth, as in the papers. All models cost the same
LARGE = dict(n_layer=6, n_head=4, n_embd=256, scale_embeddings=True, mem_layers=(1, 3, 5), mem_query="state",
             mem_num_keys=512, mem_heads=4, mem_knn=16, mem_key_dim=64, value_lr=6e-2, accum_steps=2,
             log_interval=20, eval_batches=4)
LARGE_MODELS = {
    "dense": dict(mem_layers=(), mlp_width=1024),
    "memory+": UNSCALED | dict(mlp_width=1376),
    "tokens": dict(mem_query="tokens", mlp_width=1376),
    "hash": dict(mem_kind="hash", mlp_width=1728),
}
EXPERIMENTS |= {
    # 72 M tokens, which a full run sees four times. As many questions are about facts that the text tells
    # rarely as about facts that it tells often. So the recall "all" is not the mean over all facts
    "facts-large": Experiment(LARGE | dict(dataset="facts-large", block_size=128, batch_size=512,
                                           max_steps=4600, eval_interval=460), LARGE_MODELS),
    "code": Experiment(LARGE | dict(dataset="code", block_size=256, batch_size=256, max_steps=1600,
                                    eval_interval=100), LARGE_MODELS),
}
