"""train.py: resuming, accumulation, use from Python, each mistake of a user, and that training learns."""

import dataclasses
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

from runtime.cli import parse

import numpy as np
import pytest
import torch
from conftest import SMALL, assert_fails, assert_same_checkpoint, log

import evaluate
import train
from data import corpora, corpus, prepare, tokenizer
from data.tokenizer import END, SPLIT, word_encoding
from model import GPT
from pool import PoolOptimizer
from runtime.checkpoint import checkpoints, load, step_of


@pytest.mark.parametrize("options", [
    ["--dropout=0.1"],
    ["--value_optimizer=adam", "--accum_steps=2", "--max_steps=4"],
    ["--mem_dtype=bfloat16", "--value_stochastic_rounding"],
    pytest.param(["--kernel=triton", "--device=auto", "--batch_size=1", "--block_size=16", "--max_steps=4"],
                 marks=pytest.mark.slow),
    ["--mem_layers=0,1", "--mem_mode=add", "--moe_layers=0", "--moe_experts=4"],
    ["--mem_kind=peer", "--value_optimizer=sgd", "--mem_query=state"],
    ["--mem_kind=hash"],
    ["--train_only=memory", "--positions=learned"]])
def test_resuming_equals_not_stopping_bit_for_bit(run, options):
    run(*options)
    whole, end = log(run.out), checkpoints(run.out)[-1]
    shutil.copytree(end, run.out.parent / "end")
    shutil.rmtree(end)
    (run.out / ".tmp_checkpoint").mkdir()  # what a kill in the middle of a save leaves
    (run.out / ".tmp_checkpoint" / "model.pt").write_bytes(b"half")
    with open(run.out / "log.jsonl", "a") as f:
        f.write('{"step": 3, "lo')
    train.main(["--resume", f"--out_dir={run.out}"])  # the other options come from the checkpoint
    assert_same_checkpoint(end, run.out.parent / "end")
    assert log(run.out) == whole
    assert {path.name for path in run.out.iterdir()} == {
        ".lock", "log.jsonl", "loss.png", "step_000003", end.name}


def test_resume_can_train_longer_and_starts_where_there_is_nothing(run, capsys):
    run.out.mkdir()  # as a run leaves it that was stopped early
    run("--resume", "--max_steps=2")
    assert "starts a new run, with the options given now" in capsys.readouterr().out
    run("--resume", "--max_steps=4")
    assert "resumed from" in capsys.readouterr().out
    assert [line["step"] for line in log(run.out) if "loss" in line] == [1, 2, 3, 4]
    run("--resume", "--max_steps=4")
    assert "the end of this run" in capsys.readouterr().out


def test_damaged_lines_of_a_log_are_dropped_and_counted(half, unchanged, capsys):
    with open(half.out / "log.jsonl", "ab") as f:
        f.write(b'5\n{}\n\xff\xfe\n{"step": "x"}\n["step"]\n{"step": 3, "lo')
    half("--resume")
    assert f"lines of {half.out}/log.jsonl that are damaged, and dropped: 6\n" in capsys.readouterr().out
    assert log(half.out) == log(unchanged)


class Spy:
    """Notes each call by which train.py or runtime/log.py waits for the device, or for other processes."""

    def __init__(self, patch):
        self.calls = []
        for owner, name in ((torch.Tensor, "item"), (torch.Tensor, "tolist"), (torch.Tensor, "__bool__"),
                            (torch.Tensor, "__float__"), (torch.Tensor, "__int__"), (torch.Tensor, "cpu"),
                            (torch.cuda, "synchronize"), (train, "all_reduce_sum")):
            patch.setattr(owner, name, self.spy(name, getattr(owner, name)))

    def spy(self, name, function):
        def call(*arguments, **options):
            if Path(sys._getframe(1).f_code.co_filename).name in ("train.py", "log.py"):
                self.calls.append(name)
            return function(*arguments, **options)
        return call


def test_the_loop_does_not_wait_for_the_device(run, monkeypatch):
    """Guards a GPU that stands idle: the loop waited twice in each step. Now, once per line of the log."""
    spy, draw_batch, steps = Spy(monkeypatch), train.draw_batch, []

    def draw(*arguments):
        steps.append(list(spy.calls))
        spy.calls.clear()
        return draw_batch(*arguments)

    monkeypatch.setattr(train, "draw_batch", draw)
    run("--log_interval=4", "--eval_interval=10", "--max_steps=10")
    waited = [step for step, calls in enumerate(steps) if calls and step]
    assert waited == [4, 8] and len(steps) == 10
    assert steps[4].count("all_reduce_sum") == 1 and "tolist" in steps[4], "else this test shows nothing"


@pytest.mark.parametrize("optimizer", ["rowwise", "adam"])
def test_accumulation_equals_the_big_batch(run, optimizer):
    outs = [run.out.with_name(f"parts{parts}") for parts in (1, 4)]
    for parts, out in zip((1, 4), outs, strict=True):
        run(f"--accum_steps={parts}", f"--value_optimizer={optimizer}", out=out)
    for a, b in zip(*map(log, outs), strict=True):
        for key in a.keys() & {"loss", "val_loss"}:
            assert math.isclose(a[key], b[key], rel_tol=1e-4), (key, a, b)
    values = [torch.load(out / "step_000003" / "pool_0of1.pt", weights_only=True)["values"] for out in outs]
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-3)


def test_each_optimizer_gets_its_own_learning_rate(run, monkeypatch):
    rates, step = [], PoolOptimizer.step
    monkeypatch.setattr(PoolOptimizer, "step",
                        lambda self: [rates.append(self.param_groups[0]["lr"]), step(self)])
    run("--lr=1e-3", "--value_lr=0.25", "--min_lr=0.5")
    config = train.TrainConfig(max_steps=6, warmup_steps=2, min_lr=0.5)
    assert rates == pytest.approx([0.25 * train.schedule(step, config) for step in range(6)])
    groups = torch.load(run.out / "step_000006" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-3 * train.schedule(5, config)] * 2)


@pytest.mark.parametrize("options", [[], ["--mem_kind=hash"], ["--mem_mode=add", "--positions=learned"]])
def test_with_train_only_memory_nothing_else_changes(run, options):
    """Bit for bit. Weight decay would shrink a parameter that has no gradient, but is in AdamW's list."""
    run("--train_only=memory", "--weight_decay=0.5", "--grad_clip=0.1", *options)
    early, late = (load(path)[0] for path in checkpoints(run.out))
    for (name, old), new in zip(early.named_parameters(), late.parameters(), strict=True):
        assert torch.equal(old, new) != (".memory." in name or name == "pool.values"), name
        assert new.requires_grad, "what was frozen can learn in another run"


def test_validation_has_no_dropout_and_does_not_count_as_use_of_the_pool(run):
    outs = [run.out.with_name(name) for name in ("with", "without")]
    run("--dropout=0.5", "--max_steps=1", out=outs[0])
    run("--max_steps=1", out=outs[1])
    a, b = (log(out)[0] for out in outs)
    assert a == b and a["step"] == 0 and a["slots_used"] == 0


def test_a_batch_is_a_function_of_its_key():
    tokens = np.arange(1000, dtype=np.uint16)
    x, y = corpus.draw_batch(tokens, 5, 8, 1, 0, 7)
    assert torch.equal(y, x + 1) and x.shape == (5, 8) and x.dtype == torch.int64
    assert torch.equal(x, corpus.draw_batch(tokens, 5, 8, 1, 0, 7)[0])
    for other in ((1, 0, 8), (2, 0, 7), (1, 1, 7)):
        assert not torch.equal(x, corpus.draw_batch(tokens, 5, 8, *other)[0])
    starts = torch.cat([corpus.draw_batch(tokens[:10], 50, 8, 1, 0, step)[0][:, 0] for step in range(9)])
    assert set(starts.tolist()) == {0, 1}, "the first and the last window are drawn, and none beyond"


def test_schedule():
    config = train.TrainConfig(warmup_steps=10, max_steps=110, min_lr=0.1)
    shares = [train.schedule(step, config) for step in (0, 9, 10, 60, 110)]
    assert shares == pytest.approx([0.1, 1, 1, 0.55, 0.1])
    assert train.schedule(5, train.TrainConfig(warmup_steps=0, min_lr=1.0)) == 1.0


class Parrot(torch.nn.Module):
    """Knows lines by heart: it continues the beginning of a line, and then says the token 0 for ever."""
    generate = GPT.generate

    def __init__(self, encoding, lines, block_size):
        super().__init__()
        self.wte, self.config = torch.nn.Embedding(1, 1), train.TrainConfig(block_size=block_size)
        self.lines = [encoding.encode(line, allowed_special="all") + [0] * block_size for line in lines]

    def forward(self, new, past=None):
        rows = new if past is None else torch.cat((past[0][0][:, 0], new), 1)
        following = [next(line[len(row)] for line in self.lines if line[:len(row)] == row)
                     for row in rows.tolist()]
        return torch.nn.functional.one_hot(torch.tensor(following), 300)[:, None], None, [(rows[:, None],)]


@pytest.mark.parametrize("pattern", [SPLIT, r" ?\w+|[^\s\w]+[\r\n]*|\s+"])  # this has ".\n" as one token
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", ".\n", ".\r\n", " \n", END, " .." * 16 + "\n"])
def test_what_ends_a_line_and_other_questions_do_not_change_recall(end, pattern):
    right = len(end) < 16 or end == END  # the last of these ends is cut
    questions = [dict(prompt=f"Question: Where is {name}? Answer:", answer=answer)
                 for name, answer in (("Bakemi", "Oslo"), ("Lo Mura", "Rome"), ("Tiza", "New York"))]
    longer = dict(prompt="Question: What is Bakemi? Answer:", answer="a city in the far north " * 4)
    lines = [f"{question['prompt']} {question['answer'].strip()}{end}" for question in (*questions, longer)]
    encoding = word_encoding(lines, [1] * 4, 300, pattern)
    model = Parrot(encoding, lines, block_size=99)
    assert evaluate.recall(model, encoding, questions)["all"] == right
    answers = [corpus.decode_answer(encoding, tokens)
               for tokens in evaluate.answer(model, encoding, [*questions, longer, dict(longer, answers=[])])]
    assert [corpus.is_right(*pair) for pair in zip(questions, answers, strict=False)] == [right] * 3
    assert answers[4] == lines[3].removeprefix(longer["prompt"]).removesuffix(END).strip(), "not cut"


def test_a_run_leaves_what_it_says(run, capsys):
    out = run.out.with_name("my run")
    run("--keep=1", out=out)
    assert {path.name for path in out.iterdir()} == {".lock", "log.jsonl", "loss.png", "step_000006"}
    printed = capsys.readouterr().out
    for part in ("the validation loss is above the training loss", "step 3/6  validation loss ",
                 "step 6/6  loss ", f"python sample.py --out_dir='{out}'\n"):
        assert part in printed
    lines = log(out)
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 6]
    assert {"slots_used", "kl_from_uniform", "recall"} <= lines[-1].keys()
    assert (out / "loss.png").stat().st_size > 10_000


def test_the_defaults_are_the_first_preset_and_paper_is_the_published_layer():
    """Memory+ of Berges et al. 2024: queries from one token's state, memory not in the first block."""
    configs = {name: train.TrainConfig(**preset) for name, preset in train.PRESETS.items()}
    assert next(iter(configs.values())) == train.TrainConfig()
    paper, plain = configs["paper"], train.GPTConfig(vocab_size=50)
    assert (paper.mem_query, paper.scale_embeddings, paper.mem_layers) == ("state", False, (2, 5))
    assert paper.mem_kind == "product-key" and paper.mem_swilu and paper.mem_qk_norm
    assert plain.mem_layers == () and train.GPT(plain).pool is None and plain.mem_query == "state"


def test_facts_prepare_themselves(run, monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "DATA", tmp_path / "data")
    monkeypatch.setitem(corpora.CORPORA, "facts", corpora.FactsConfig("facts", people=8, exposures=2))
    run("--max_steps=1")
    assert (tmp_path / "data" / "facts" / "qa.jsonl").exists()


@pytest.mark.parametrize("options, message", [
    (["--batch_size=0"], "--batch_size=0 must be at least 1"),
    (["--value_lr=inf"], "--value_lr=inf must be finite"),
    (["--beta2=1"], "--beta2=1.0 must be at least 0 and below 1"),
    (["--accum_steps=3"], "--batch_size=4 must be a multiple of 3: 1 processes times 3 parts"),
    (["--value_blocks=3"], "value_blocks=3 must divide"),
    (["--value_stochastic_rounding"], "--value_stochastic_rounding is for bfloat16 values"),
    (["--mem_layers=", "--train_only=memory"], "--train_only=memory needs memory layers"),
    (["--mem_layers=", "--mem_on_disk"], "--mem_on_disk needs --device=cpu and a pool"),
    (["--kernel=cuda"], "--kernel: invalid choice: 'cuda'"),
    (["--out_dir=/dev/null"], "--out_dir=/dev/null is a file: name a folder"),
    (["--out_dir=/dev/null/x"], "/dev/null/x: Not a directory"),
    (["--out_dir=out/step_5"], "--out_dir=out/step_5 has the name of a checkpoint"),
    (["--out_dir="], "--out_dir= must name a folder"),
    (["--dataset=mine"], "--name=mine --input"),
    (["--block_size=100000"], "must have more than block_size=100000. Use more text, or")])
def test_a_mistake_is_one_line_and_status_2(run, options, message, capsys):
    assert_fails(lambda: run(*options), message, capsys)


def test_sizes_are_checked_before_a_corpus_is_made(run, monkeypatch, capsys):
    """Guards minutes of work on a corpus for a model that cannot be."""
    monkeypatch.setattr(train, "load_dataset", lambda name: 1 / 0)
    assert_fails(lambda: run("--n_head=3"), "--n_embd=16 must be a multiple of", capsys)
    assert not run.out.exists(), "a mistake leaves nothing"


def test_weights_that_have_diverged_are_not_saved(run, capsys):
    """The loss of the last step was still finite. Saved, they would replace the last good checkpoint."""
    options = ["--lr=1e30", "--warmup_steps=0", "--grad_clip=0", "--eval_interval=1"]
    assert_fails(lambda: run(*options), "at step 1: training has diverged", capsys)
    assert checkpoints(run.out) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_what_needs_a_gpu_where_there_is_none(run, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert_fails(lambda: run("--kernel=triton"), "--kernel=triton needs a GPU", capsys)
    assert_fails(lambda: run("--device=cuda"), "torch finds no CUDA device", capsys)


def test_a_run_is_never_overwritten_nor_changed(ended, unchanged, capsys):
    assert_fails(ended, "continue from it with --resume, or choose another --out_dir", capsys)
    for option in ("--n_layer=3", "--value_optimizer=sgd", "--train_only=memory", "--positions=learned"):
        assert_fails(lambda option=option: ended("--resume", option), f"{option}: the model in", capsys)
    assert log(ended.out) == log(unchanged)


def test_a_vocabulary_larger_than_the_corpus_s(run, capsys):
    """Guards decoding: an untrained model produces tokens that the corpus does not have."""
    run("--vocab_size=4096", "--max_steps=1")
    model = GPT(load(run.out)[0].config)
    encoding = corpus.Dataset("facts").encoding
    answers = evaluate.answer(model, encoding, [dict(prompt=f"{i}?", answer="x" * 30) for i in range(100)])
    assert max(map(max, answers)) >= encoding.n_vocab, "otherwise this test shows nothing"
    assert all(isinstance(corpus.decode(encoding, tokens), str) for tokens in answers)


def test_what_may_change_on_resuming_does(half):
    half("--resume", "--weight_decay=0.5", "--beta1=0.7", "--dropout=0.1", "--kernel=torch", "--max_steps=4")
    groups = torch.load(half.out / "step_000004" / "optimizer.pt", weights_only=True)["param_groups"]
    assert groups[0]["weight_decay"] == 0.5 and groups[0]["betas"] == (0.7, 0.99)


def test_a_checkpoint_knows_its_text_and_its_questions(run, monkeypatch, tmp_path, capsys):
    """Guards a run that went on with another text: a downloaded tokenizer is the same for all texts."""
    monkeypatch.setattr(corpus, "DATA", tmp_path)
    letters = word_encoding(["a b"], [1], 300)
    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", lambda name: letters)
    questions = tmp_path / "text" / "qa.jsonl"

    def prepared(content):
        (tmp_path / "words").write_text(content * 200)
        prepare.main(["text", "--tokenizer=gpt2", "--overwrite", "--input", str(tmp_path / "words")])

    prepared("two words\n")
    run("--dataset=text", "--max_steps=2")
    run("--resume", "--max_steps=3")
    assert "was trained with" not in capsys.readouterr().out
    questions.write_text('{"prompt": "two", "answer": "words"}\n')
    run("--resume", "--max_steps=4")
    assert "step_000003 was trained with other questions than text has now\n" in capsys.readouterr().out
    prepared("two sword\n")  # as many tokens
    changed = "step_000004 was trained with other text than text has now"
    assert_fails(lambda: run("--resume", "--max_steps=5"), changed + ": to go on with this text", capsys)
    train.main(["--eval_only", f"--out_dir={run.out}"])
    assert changed in capsys.readouterr().out
    losses = iter([20.0, 30.0, 40.0])  # of the new text: higher than all of the old
    monkeypatch.setattr(train, "evaluate", lambda *arguments, **options: {"val_loss": next(losses)})
    run("--resume", "--dataset=text", "--max_steps=4")
    text = capsys.readouterr().out
    assert changed in text and "validation loss 20.0000" in text
    run("--resume", "--dataset=text", "--max_steps=6", "--eval_interval=1", "--keep_best", "--keep=1")
    text = capsys.readouterr().out
    assert changed in text and f"sample.py --out_dir={run.out}/step_000005" in text, "the best of this text"
    assert [step_of(path) for path in checkpoints(run.out)] == [5, 6]
    run("--resume", "--max_steps=6")
    assert "was trained with" not in capsys.readouterr().out


# --- from Python --------------------------------------------------------------------------------------------

@pytest.fixture
def small(run):
    """small(options): the TrainConfig of run(options)."""
    def small(*options, out=run.out):
        return train.TrainConfig(**parse(train.TrainConfig, [*SMALL, f"--out_dir={out}", *options])[1])

    return small


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20).view(1, 20), torch.arange(20).view(1, 20))[0]


def test_two_runs_in_one_process_are_equal_and_change_nothing_of_their_caller_s(run, small):
    """
    Guards a notebook: against state of the first run, a changed config, and other signal handlers. The second
    run is in a thread: Python takes signal handlers in its main thread only.
    """
    handlers, results = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], []
    config, other_config = small(), small(out=run.out.with_name("again"))
    results.append(train.train(config))
    assert config == small() and config.vocab_size == 0
    thread = threading.Thread(target=lambda: results.append(train.train(other_config)))
    thread.start()
    thread.join()
    (model, measured), (other, measured_again) = results
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert measured["val_loss"] == measured_again["val_loss"] and not model.training
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_mistake_from_python_is_a_value_error_and_leaves_nothing_open(run, small):
    for options, message in ((["--vocab_size=7"], "--vocab_size=7 is too small"),
                             (["--lr=1e30", "--warmup_steps=0", "--grad_clip=0"], "training has diverged")):
        with pytest.raises(ValueError, match=message):
            train.train(small(*options))
    open_files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert not [path for path in open_files if path.startswith(str(run.out))]


def test_resuming_from_python(half, unchanged, small):
    """Also once the run is at its end: what it measured is in its last checkpoint."""
    whole = load(unchanged)[0]
    for _ in range(2):
        resumed, measured = train.train(small("--resume"))
        assert measured["val_loss"] == log(unchanged)[-1]["val_loss"]
        assert torch.equal(logits(whole), logits(resumed))


def test_load_gives_the_model_that_was_trained(run, small):
    config = small("--mem_dtype=bfloat16", "--kernel=torch")
    model, measured = train.train(config)
    loaded, encoding, options = load(str(run.out))
    assert not any(module.training for module in loaded.modules())
    assert not any(x.is_meta for x in [*loaded.parameters(), *loaded.buffers()])
    assert torch.equal(logits(model), logits(loaded)) and loaded.pool.values.requires_grad
    stored = dataclasses.replace(config, vocab_size=encoding.n_vocab, kernel="auto")
    assert train.TrainConfig(**options) == stored and type(loaded.config) is train.GPTConfig
    assert evaluate.recall(loaded, encoding, corpus.Dataset("facts").questions) == measured["recall"]
    loaded.train()(*torch.arange(40).view(2, 1, 20))[1].backward()  # it can learn on
    assert loaded.pool.values.grad is not None and loaded.pool.usage.summary()[0] > 0
    with pytest.raises(ValueError, match="no checkpoint in"):
        load(run.out / "nothing")


def test_a_skipped_step_is_printed_with_the_next_log_line_and_counted_over_a_resume(run, monkeypatch, capsys):
    """Guards a gradient that is not finite, and a count "so far" that a resume lost."""
    steps, step = [], PoolOptimizer.step

    def poisoned(self):
        steps.append(self)
        if len(steps) in (2, 3, 5):
            self.param_groups[0]["params"][0].grad.reads[0][2].fill_(math.inf)
        step(self)

    monkeypatch.setattr(PoolOptimizer, "step", poisoned)
    run("--log_interval=2", "--max_steps=3", "--eval_interval=3")
    run("--log_interval=2", "--max_steps=6", "--resume")
    assert re.findall(r"skipped 1 more steps, (\d) so far", capsys.readouterr().out) == ["1", "2", "3"]
    assert [(line["step"], line.get("skipped_steps")) for line in log(run.out) if "loss" in line] == [
        (2, 1), (3, 2), (4, None), (6, 3)]


def test_recorded_reads_are_what_the_pool_was_asked(unchanged):
    model = load(unchanged)[0]
    with evaluate.record_reads(model.pool) as reads:
        logits(model)
    (indices, weights), = reads
    assert indices.shape == weights.shape == (20, 8) and not weights.requires_grad
    torch.testing.assert_close(weights.view(20, 2, 4).sum(-1), torch.ones(20, 2))  # softmax, in each head
    logits(model)
    assert len(reads) == 1, "the hook is gone"


def test_without_matplotlib_only_the_figure_is_missing(half, monkeypatch, capsys):
    (half.out / "loss.png").unlink()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        half("--resume")
    assert "loss.png was not drawn" in capsys.readouterr().out
    half("--resume")
    assert (half.out / "loss.png").exists(), "resuming a run that has ended draws its figure"


# --- a run owns its folder ----------------------------------------------------------------------------------

OTHER_RUN = """
import sys, time
from pathlib import Path
from runtime.checkpoint import own_folder
with own_folder(Path(sys.argv[1]), True):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_is_refused(half, capsys):
    """Before the first checkpoint of the other run, too. A killed run leaves nothing that is in the way."""
    other = subprocess.Popen([sys.executable, "-c", OTHER_RUN, half.out], stdout=subprocess.PIPE,
                             cwd=Path(train.__file__).parent)
    other.stdout.readline()
    assert_fails(lambda: half("--resume"), "another run is training in", capsys)
    train.main(["--eval_only", f"--out_dir={half.out}"])  # only reads
    other.kill()
    other.communicate()
    half("--resume", "--max_steps=4")
    assert log(half.out)[-1]["step"] == 4


# --- what a machine lacks -----------------------------------------------------------------------------------

@pytest.mark.parametrize("error, message", [
    (OSError("lost"), "error: lost; "), (MemoryError(), "out of memory: try --"),
    (RuntimeError("can't allocate memory: you did"), "you did: try --accum_steps")])
def test_an_error_names_the_checkpoint_to_continue_from(half, monkeypatch, capsys, error, message):
    monkeypatch.setattr(train, "draw_batch", Mock(side_effect=error))
    assert_fails(lambda: half("--resume"), message, capsys, also="continues from")


FREED = """
import resource
from runtime.log import keep_freed_memory
import torch

def pages():  # that the system clears for a tensor of 64 MB, as a share of its pages
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (2**26 / resource.getpagesize())

keep_freed_memory()
print(min(pages() for _ in range(8)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
def test_freed_memory_is_kept():
    ended = subprocess.run([sys.executable, "-c", FREED], cwd=Path(train.__file__).parent,
                           capture_output=True, text=True, check=True)
    assert float(ended.stdout) < 0.1  # without keep_freed_memory: 1.0


@pytest.mark.slow
def test_without_a_compiler_compile_is_one_line(run, tmp_path):
    """torch.compile needs a C++ compiler on the CPU."""
    ended = subprocess.run([sys.executable, "train.py", *SMALL, "--compile", f"--out_dir={run.out}"],
                           env=os.environ | {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
                           cwd=Path(train.__file__).parent, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("error: --compile does not work here") and "compiler" in ended.stderr


# --- the best checkpoint, and evaluation only ---------------------------------------------------------------

def test_the_best_checkpoint_is_kept(run, monkeypatch, capsys):
    """Over a resume, and with a checkpoint that Ctrl-C made: its own loss is not known."""
    losses = iter([0.5, 3.0, 2.0, 4.0, 2.5, 1.0, 2.0])  # nothing is saved at step 0
    monkeypatch.setattr(train, "evaluate", lambda *arguments, **options: {"val_loss": next(losses)})

    def steps():
        return [step_of(path) for path in checkpoints(run.out)]

    run("--eval_interval=1", "--keep=1", "--keep_best", "--max_steps=4")
    assert steps() == [2, 4]
    assert f"sample.py --out_dir={run.out}/step_000002" in capsys.readouterr().out
    clip = torch.nn.utils.clip_grad_norm_
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_",
                      lambda *arguments: [signal.raise_signal(signal.SIGINT), clip(*arguments)])
        run("--eval_interval=9", "--resume", "--max_steps=6")  # stops after step 5
    assert steps() == [2, 5]
    capsys.readouterr()
    losses = iter([1.5])
    run("--resume", "--max_steps=5")  # only ends, and is evaluated: the result is not that of an older step
    assert "validation loss 1.5" in capsys.readouterr().out
    losses = iter([1.0])
    run("--eval_interval=1", "--resume", "--max_steps=6")
    assert steps() == [6]


def test_eval_only_measures_what_training_did_and_writes_nothing(ended, small, capsys, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    train.main(["--eval_only", f"--out_dir={ended.out}"])
    printed, last = capsys.readouterr().out, log(ended.out)[-1]
    data = corpus.Dataset("facts")
    number_of_bytes = len(data.encoding.decode(data.val.tolist()).encode())
    bits = last["val_loss"] * len(data.val) / number_of_bytes * math.log2(math.e)
    assert (f"validation loss {last['val_loss']:.4f} nats per token, perplexity "
            f"{math.exp(last['val_loss']):.2f}, {bits:.4f} bits per byte\n") in printed
    model, measured = train.train(small("--eval_only", out=ended.out / "step_000006"))
    assert measured["val_loss"] == last["val_loss"] and measured["recall"] == last["recall"]
    assert_fails(lambda: ended("--eval_only", out=tmp_path / "none"), "no checkpoint in", capsys)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_folders_as_people_type_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell leaves the ~ in --out_dir=~/run
    assert train.TrainConfig(out_dir="~/my run").out_dir == f"{tmp_path}/my run"
    assert train.TrainConfig(out_dir=Path("out/x")).out_dir == "out/x"


@pytest.mark.slow
def test_a_short_run_on_facts_learns(run):
    """People seen most often are recalled; a model that only knows the answers' forms stays below 0.1."""
    run("--max_steps=1000", "--eval_interval=500", "--n_embd=32", "--mem_num_keys=16", "--batch_size=16",
        "--block_size=64", "--eval_questions=1000", "--lr=6e-3")
    evaluations = [line for line in log(run.out) if "val_loss" in line]
    assert evaluations[-1]["val_loss"] < 0.7 * evaluations[0]["val_loss"]
    recall = evaluations[-1]["recall"]
    assert recall["all"] > 0.3 and recall["by_exposure"][max(recall["by_exposure"], key=int)] > 0.5, recall


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_five_thousand_steps_that_were_stopped_ten_times(run, monkeypatch):
    """The numbers are those of a run that was never stopped, and memory stays flat."""
    options = "--max_steps=5000", "--eval_interval=250", "--log_interval=10", "--keep=2", "--dropout=0.1"
    resident, schedule = [], train.schedule
    stops = set(random.Random(0).sample(range(5000), 10))

    def measure(step, config):
        if step % 500 == 0 and Path("/proc/self/statm").exists():  # Linux
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        return schedule(step, config)

    def stop(step, config):
        if step in stops:
            stops.remove(step)
            raise Stopped
        return schedule(step, config)

    monkeypatch.setattr(train, "schedule", measure)
    run(*options)
    assert not resident or max(resident[2:]) <= resident[1] + 2**25, resident
    again = run.out.with_name("again")
    monkeypatch.setattr(train, "schedule", stop)
    while stops:
        with pytest.raises(Stopped):
            run(*options, "--resume", out=again)
    run(*options, "--resume", out=again)
    assert_same_checkpoint(checkpoints(run.out)[-1], checkpoints(again)[-1])
    assert log(run.out) == log(again)


@pytest.mark.slow
# with --mem_query=tokens, the first token has none before it: half of its query is 0, all keys tie, and the
# winners are arbitrary
def test_compiled_training_equals_eager(run):
    """Guards the reads, which a compiled graph could lose, and the search, which is not in the graph."""
    options = "--mem_num_keys=128", "--mem_query=state"
    run(*options)
    run(*options, "--compile", out=run.out.with_name("compiled"))
    for a, b in zip(log(run.out), log(run.out.with_name("compiled")), strict=True):
        for key in a.keys() & {"loss", "val_loss", "slots_used"}:
            assert math.isclose(a[key], b[key], rel_tol=1e-3), (key, a, b)
