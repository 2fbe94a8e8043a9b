"""runtime/gpt2.py against transformers: weights of GPT-2 in and out, and runs of train.py that use them."""

import json
import shutil
import sys

import pytest
import tiktoken
import torch
from conftest import SMALL, assert_fails, assert_same_checkpoint, log

import train
from data import corpus, prepare, tokenizer
from data.tokenizer import END, SPLIT
from model import GPT, GPTConfig
from runtime import gpt2
from runtime.checkpoint import checkpoints
from runtime.checkpoint import load as load_run

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()  # a mistake is one line

SIZES = dict(vocab_size=300, n_positions=64, n_layer=2, n_head=2, n_embd=16)
OPTIONS = [option for option in SMALL if option.split("=")[0] not in ("--n_layer", "--n_head", "--n_embd")]


def make_gpt2(**changes):
    """A GPT2LMHeadModel of transformers, far from its initialisation: every part shows in the logits."""
    torch.manual_seed(0)
    ends = dict(bos_token_id=None, eos_token_id=None)  # greedy generation never stops
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES | ends | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 / p.size(-1)**0.5 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def theirs():
    return make_gpt2()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """A Hugging Face folder with the weights of `theirs`."""
    theirs.save_pretrained(folder := tmp_path_factory.mktemp("hf"))
    return str(folder)


def save_nanogpt(path, model, padded: int = 0, bias: bool = True):
    """A checkpoint of a model of transformers, as nanoGPT's train.py writes it after torch.compile."""
    c, wte = model.config, model.transformer.wte.weight
    state = {f"transformer.{name}": p.T if ".c_" in name and name.endswith("weight") else p
             for name, p in model.transformer.state_dict().items() if bias or not name.endswith("bias")}
    state["transformer.wte.weight"] = torch.cat((wte, torch.randn(padded, c.n_embd)))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()  # the mask that an older torch needs
    args = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.n_positions, bias=bias,
                vocab_size=c.vocab_size + padded, dropout=0.0)
    state = {f"_orig_mod.{name}": p.detach() for name, p in state.items()}
    torch.save({"model": state, "optimizer": {}, "model_args": args, "iter_num": 5,
                "best_val_loss": torch.tensor(2.0), "config": {"learning_rate": 6e-4}}, path)


def load(source, **changes) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(**gpt2.read_options(str(source)) | changes)).eval()
    gpt2.load_weights(model, str(source))
    return model


def tokens(*shape):
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(ours: GPT, theirs, count: int = 300, **tolerance):
    idx = tokens(2, 32)
    torch.testing.assert_close(ours(idx, idx)[0][..., :count], theirs(idx).logits, **tolerance)


EXACT = dict(rtol=0, atol=1e-5)


# --- the function -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_layer, n_head", [(12, 12), (24, 16), (36, 20), (48, 25)])
def test_narrow_models_with_the_blocks_and_heads_of_all_four_sizes(tmp_path, n_layer, n_head):
    """gpt2, gpt2-medium, gpt2-large and gpt2-xl. Heads of width 3: no rotary position could rotate them."""
    theirs = make_gpt2(n_layer=n_layer, n_head=n_head, n_embd=3 * n_head)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(load(tmp_path), theirs, **EXACT)


def test_another_width_of_mlps_and_a_shorter_context(tmp_path):
    """From a file like that of gpt2 at Hugging Face: without the head, and with the masks of attention."""
    theirs = make_gpt2(n_inner=24).bfloat16()
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    theirs.transformer.save_pretrained(tmp_path, state_dict=theirs.transformer.state_dict() | masks)
    ours = load(tmp_path, block_size=32)
    assert ours.config.mlp_width == 24 and ours.wpe.weight.shape == (32, 16)
    assert_same_logits(ours, theirs.float(), **EXACT)


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt(tmp_path, bias):
    theirs, exact = make_gpt2(), make_gpt2(activation_function="gelu")  # nanoGPT's GELU is the exact one
    for name, p in [*theirs.named_parameters(), *exact.named_parameters()]:
        if name.endswith("bias") and not bias:
            torch.nn.init.zeros_(p)
    save_nanogpt(tmp_path / "ckpt.pt", theirs, padded=4, bias=bias)
    for ours in (load(tmp_path), load(tmp_path / "ckpt.pt")):
        assert ours.config.vocab_size == 304 and ours.config.bias == bias
        assert_same_logits(ours, theirs, **EXACT)
        assert_same_logits(ours, exact, rtol=0, atol=0.01)


def test_greedy_generation(theirs, folder):
    ours, idx = load(folder), tokens(2, 9)
    expected = theirs.generate(idx, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert expected.size(1) == 39 and torch.equal(ours.generate(idx, 30, temperature=0), expected)


@pytest.mark.parametrize("query", ["state", "shifted", "tokens"])
def test_an_added_memory_starts_as_the_model_without(folder, query):
    idx = tokens(2, 64)
    added = load(folder, mem_layers=(0, 1), mem_mode="add", mem_query=query, mem_num_keys=16)
    with torch.no_grad():
        assert torch.equal(added(idx, idx)[0], load(folder)(idx, idx)[0])
    added(idx, idx)[1].backward()
    assert all(memory.out.weight.grad.any() for memory in added.memories()), "and it learns"


def test_what_memory_layers_replace_is_left_out_and_printed(folder, capsys):
    model, whole = load(folder, mem_layers=(1,), mem_num_keys=16), load(folder)
    assert model.blocks[1].mlp is None
    assert all(torch.equal(p, model.state_dict()[name])
               for name, p in whole.named_parameters() if not name.startswith("blocks.1.mlp"))
    printed = capsys.readouterr().out.splitlines()
    line = f"starts from the weights of {folder}"
    assert printed == [f"{line}, without the MLPs of blocks 1: other layers replace them", line]


@pytest.mark.parametrize("options", [{}, dict(bias=False, mlp_width=24), dict(vocab_size=50257)])
def test_an_exported_model_is_the_same_for_transformers_and_for_us(tmp_path, options):
    torch.manual_seed(0)
    config = GPTConfig(**dict(vocab_size=300, block_size=64, n_layer=3, n_head=4, n_embd=20,
                              positions="learned") | options)
    ours, folder = GPT(config).eval(), tmp_path / "new" / "hf"
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    gpt2.check_export(config, str(folder))
    gpt2.export(ours, str(folder))
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_logits(ours, theirs, config.vocab_size, **EXACT)
    assert theirs.config.eos_token_id == (50256 if config.vocab_size == 50257 else None)
    assert_same_logits(load(folder), theirs, config.vocab_size, **EXACT)


# --- runs of train.py ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The corpus `mine`, with a tokenizer that has the name of GPT-2's, and 257 tokens."""
    folder = tmp_path_factory.mktemp("data")
    lines = [f"{i} times {j} is {i * j}.\n" for i in range(20) for j in range(20)]
    (folder / "text").write_text("".join(lines))
    letters = tiktoken.Encoding("gpt2", pat_str=SPLIT, special_tokens={END: 256},
                                mergeable_ranks={bytes([i]): i for i in range(256)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "DATA", folder)
        patch.setattr(tokenizer.tiktoken, "get_encoding", lambda name: letters)
        prepare.main(["text", "--tokenizer=gpt2", "--name=mine", "--input", str(folder / "text")])
        prepare.main(["facts", "--people=8", "--exposures=3"])
    return folder


@pytest.fixture
def start(data, folder, tmp_path, monkeypatch):
    """start(options): trains from the weights in `folder`, with the output in start.out."""
    monkeypatch.setattr(corpus, "DATA", data)

    def start(*options):
        train.main([*OPTIONS, "--dataset=mine", f"--out_dir={start.out}", f"--init_from={folder}",
                    "--mem_mode=add", "--lr=1e-3", *options])

    start.out = tmp_path / "out"
    return start


def test_a_run_starts_at_the_loss_of_the_weights_and_resumes_without_them(start, folder, monkeypatch):
    start()
    whole, end = log(start.out), checkpoints(start.out)[-1]
    options = gpt2.read_options(folder) | dict(block_size=32, batch_size=4, eval_batches=2, max_steps=1)
    train.train(train.TrainConfig(**options, init_from=folder, mem_layers=(), dataset="mine", device="cpu",
                                  out_dir=f"{start.out}-dense"))  # from Python
    first = log(start.out.with_name("out-dense"))[0]
    assert first["step"] == whole[0]["step"] == 0 and first["val_loss"] == whole[0]["val_loss"]
    assert whole[-1]["val_loss"] < whole[0]["val_loss"], "it learns"
    shutil.move(end, start.out.parent / "end")
    monkeypatch.setattr(gpt2, "load_weights", None)
    train.main(["--resume", f"--out_dir={start.out}"])
    assert_same_checkpoint(end, start.out.parent / "end")
    assert log(start.out) == whole


def test_a_run_and_a_checkpoint_are_exported(start, tmp_path, capsys):
    hf = [tmp_path / name for name in ("hf", "again")]
    start("--mem_layers=", f"--export_hf={hf[0]}")
    assert f"wrote {hf[0]}" in capsys.readouterr().out
    train.main(["--eval_only", f"--out_dir={start.out}", f"--export_hf={hf[1]}"])
    ours = load_run(start.out)[0]
    for exported in hf:
        assert_same_logits(ours, transformers.GPT2LMHeadModel.from_pretrained(exported), **EXACT)
    train.main(["--eval_only", f"--out_dir={start.out}"])  # does not export again
    assert_fails(lambda: start("--mem_layers=", f"--export_hf={hf[0]}", "--resume"), "already exists", capsys)


# --- mistakes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    (["--n_layer=3"], "--n_layer=3: the weights in {} have 2; leave this option out"),
    (["--vocab_size=257"], "--vocab_size=257: the weights in {} have 300"),
    (["--scale_embeddings"], "--scale_embeddings=True: the weights in {} have False"),
    (["--block_size=65"], "--block_size=65: the weights in {} have 64"),
    (["--dataset=facts"], "--init_from needs a corpus with GPT-2's tokens, and facts has others: python -m"),
    (["--init_from=gpt-2"], "--init_from=gpt-2 must be gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging"),
    (["--mem_layers=1", "--export_hf=x"], "--export_hf: only a model with --positions=learned"),
    (["--mem_layers=", "--export_hf={}"], "--export_hf={} already exists: name a new folder"),
])
def test_a_mistake_is_one_line_and_status_2(start, folder, options, message, capsys):
    options = [option.format(folder) for option in options]
    assert_fails(lambda: start(*options), message.format(folder), capsys)
    assert not start.out.exists(), "a mistake leaves nothing"


def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^--export_hf={tmp_path}/file/hf cannot be written: .*directory"):
        gpt2.export(load(folder), f"{tmp_path}/file/hf")


def test_a_resumed_run_does_not_start_from_other_weights(start, folder, tmp_path, capsys):
    start("--max_steps=1")
    other = shutil.copytree(folder, tmp_path / "copy")
    assert_fails(lambda: start("--resume", f"--init_from={other}"),
                 f"--init_from={other}: the model in {start.out} has --init_from={folder}", capsys)


def test_without_the_package(start, run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    needs = "needs the package transformers: pip install transformers"
    assert_fails(lambda: start("--init_from=gpt2"), f"--init_from {needs}", capsys)
    gpt = "--mem_layers=", "--positions=learned"
    assert_fails(lambda: run(*gpt, "--export_hf=x"), f"--export_hf {needs}", capsys)


def test_weights_that_cannot_be_downloaded(start, monkeypatch, capsys):
    def offline(*arguments, **options):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck your\n")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    assert_fails(lambda: start("--init_from=gpt2"), "--init_from=gpt2 cannot be read: We couldn't", capsys)


class Harm:
    def __reduce__(self):
        return print, ("harm",)


def damage(folder, kind):
    weights = folder / "model.safetensors"
    if kind == "another model":
        return (folder / "config.json").write_text('{"model_type": "opt"}')
    if kind == "another activation":
        config = json.loads((folder / "config.json").read_text())
        return (folder / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    if kind == "no weights":
        return weights.unlink()
    if kind == "cut":
        return weights.write_bytes(weights.read_bytes()[:-1000])
    if kind == "a tensor is missing":
        from safetensors.torch import load_file, save_file
        tensors = load_file(weights)
        del tensors["transformer.h.1.mlp.c_fc.weight"]
        return save_file(tensors, weights, {"format": "pt"})
    torch.save({"a command": Harm(), "no model": {}, "wrong sizes": {"model": {}, "model_args": dict(
        n_layer=2, n_head=2, n_embd=16, block_size=64, vocab_size=300)}}[kind], folder / "ckpt.pt")


@pytest.mark.parametrize("kind, message", [
    ("another model", "is not a GPT-2: its model_type is opt, not gpt2"),
    ("another activation", "its activation_function is relu, not gelu_new"),
    ("no weights", "cannot be read: Error no file named model.safetensors"),
    ("cut", "cannot be read: Error while deserializing"),
    ("a tensor is missing", "cannot be read: h.1.mlp.c_fc.weight is missing"),
    ("a command", "has more than tensors, such as a command, and nothing of it was run"),
    ("no model", "cannot be read: 'model_args'"),
    ("wrong sizes", "cannot be read: Error(s) in loading state_dict for GPT: Missing key(s)")])
def test_files_that_are_damaged_or_of_another_model(start, folder, tmp_path, kind, message, capsys):
    damage(copy := shutil.copytree(folder, tmp_path / "copy"), kind)
    assert_fails(lambda: start(f"--init_from={copy}"), message, capsys)
