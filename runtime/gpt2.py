"""
GPT-2's weights: `train.py --init_from` starts from them, and `train.py --export_hf` writes them. They can be

    gpt2, gpt2-medium, gpt2-large, gpt2-xl    downloaded by the package transformers
    a folder with config.json                 written by save_pretrained of transformers
    ckpt.pt, or the folder that has it        written by nanoGPT

    model = GPT(GPTConfig(**read_options("gpt2")))
    load_weights(model, "gpt2")

With these options, a GPT computes what GPT-2 computes. nanoGPT's GELU is exact, and GPT-2's an approximation:
it changes the loss of a model from nanoGPT by less than 0.0001.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from runtime.cli import fail

import torch

from model import GPT, GPTConfig
from runtime.checkpoint import load_tensors
from runtime.log import print_once

NAMES = "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"
SIZES = "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "mlp_width", "bias"
# what config.json must say: a GPT cannot compute anything else
GPT2 = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
            scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
            tie_word_embeddings=True)


def import_transformers(option: str):
    try:
        import transformers
    except ImportError:
        fail(f"{option} needs the package transformers: pip install transformers")
    return transformers


@contextlib.contextmanager
def one_line_if_it_fails(message: str):
    """Where a package reads or writes files, or downloads: it raises many kinds of errors."""
    try:
        yield
    except Exception as error:
        fail(f"{message}: {' '.join(str(error).split())[:300]}")


def our_name(name: str) -> str:
    """h.0.ln_1.bias, or transformer.h.0.ln_1.bias as in nanoGPT -> blocks.0.ln_1.bias"""
    return re.sub(r"^h\.", "blocks.", name.removeprefix("_orig_mod.").removeprefix("transformer."))


def parameters_of(gpt2) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of a GPT2Model of transformers, with our names. Its matrices are ours, transposed."""
    for name, p in gpt2.named_parameters():
        yield our_name(name), p.data.T if re.search(r"c_\w+\.weight$", name) else p.data


# --- reading ------------------------------------------------------------------------------------------------

def read_nanogpt(source: str) -> dict | None:
    """The contents of ckpt.pt, or None if `source` is no such file or folder."""
    path = Path(source)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        return None
    with one_line_if_it_fails(f"--init_from={source} cannot be read"):
        stored = load_tensors(path)
        return {name: stored[name] for name in ("model_args", "model")}


def read_options(source: str) -> dict:
    """The options of a GPT that fits the weights."""
    if stored := read_nanogpt(source := os.path.expanduser(source)):
        options = {"bias": True} | stored["model_args"]  # nanoGPT's names are ours
        options["mlp_width"] = 4 * options["n_embd"]
    elif source not in NAMES and not os.path.exists(f"{source}/config.json"):
        fail(f"--init_from={source} must be {', '.join(NAMES)}, a Hugging Face folder, or nanoGPT's ckpt.pt")
    else:
        transformers = import_transformers("--init_from")
        with one_line_if_it_fails(f"--init_from={source} cannot be read"):
            options = transformers.AutoConfig.from_pretrained(source).to_dict()
        for name, value in GPT2.items():
            if options.get(name) != value:
                fail(f"--init_from={source} is not a GPT-2: its {name} is {options.get(name)}, not {value}")
        options |= dict(block_size=options["n_positions"], bias=True,
                        mlp_width=options["n_inner"] or 4 * options["n_embd"])
    return {name: options[name] for name in SIZES} | dict(positions="learned", scale_embeddings=False)


def read_weights(source: str) -> dict[str, torch.Tensor]:
    """{our name: parameter}"""
    if stored := read_nanogpt(source := os.path.expanduser(source)):
        return {our_name(name): p for name, p in stored["model"].items()
                if not name.endswith(("lm_head.weight", ".attn.bias"))}  # wte again, and a mask
    transformers = import_transformers("--init_from")
    with one_line_if_it_fails(f"--init_from={source} cannot be read"):
        gpt2, info = transformers.GPT2Model.from_pretrained(source, use_safetensors=True,
                                                            output_loading_info=True)
    if info["missing_keys"]:
        fail(f"--init_from={source} cannot be read: {min(info['missing_keys'])} is missing")
    return dict(parameters_of(gpt2))


def load_weights(model: GPT, source: str) -> None:
    """
    Gives a GPT the weights. Memory layers, their pool and experts keep their own. The context may be shorter
    than that of the weights. All other sizes must be equal.
    """
    options = read_options(source)
    for name, value in options.items():
        chosen = getattr(model.config, name)
        if chosen != value and not (name == "block_size" and chosen < value):
            fail(f"--{name}={chosen}: the weights in {source} have {value}; leave this option out")
    weights = read_weights(source)
    with one_line_if_it_fails(f"--init_from={source} cannot be read"), torch.device("meta"):
        GPT(GPTConfig(**options)).load_state_dict(weights, assign=True)  # checks that nothing is missing
    weights["wpe.weight"] = weights["wpe.weight"][:model.config.block_size]
    unused = model.load_state_dict(weights, strict=False).unexpected_keys
    replaced = ", ".join(dict.fromkeys(name.split(".")[1] for name in unused))
    print_once(f"starts from the weights of {source}" + (
        f", without the MLPs of blocks {replaced}: other layers replace them" if replaced else ""))


# --- writing ------------------------------------------------------------------------------------------------

def check_export(config: GPTConfig, folder: str) -> None:
    """For the start of a run: finds mistakes before it trains."""
    if config.positions != "learned" or config.scale_embeddings or config.mem_layers or config.moe_layers:
        fail("--export_hf: only a model with --positions=learned --scale_embeddings=false --mem_layers= "
             "--moe_layers= is a GPT-2")
    if os.path.exists(os.path.expanduser(folder)):
        fail(f"--export_hf={folder} already exists: name a new folder")
    import_transformers("--export_hf")


@torch.no_grad()
def export(model: GPT, folder: str) -> None:
    """Writes a folder from which GPT2LMHeadModel.from_pretrained of transformers loads the model."""
    c, weights = model.config, model.state_dict()
    transformers = import_transformers("--export_hf")
    end = 50256 if c.vocab_size > 50256 else None  # <|endoftext|> of GPT-2
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd, n_inner=c.mlp_width or None, bos_token_id=end, eos_token_id=end))
    for name, p in parameters_of(gpt2.transformer):
        p.copy_(weights.get(name, torch.zeros(())))  # a model without biases has biases of 0
    with one_line_if_it_fails(f"--export_hf={folder} cannot be written"):
        gpt2.save_pretrained(os.path.expanduser(folder))
    print_once(f"wrote {folder}, for GPT2LMHeadModel.from_pretrained of transformers")
