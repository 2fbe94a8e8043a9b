"""train.py: resuming, accumulation, use from Python, each mistake of a user, and that training learns."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, assert_fails, assert_same_checkpoint, log

import evaluate
import train
from data import corpus, prepare
from data.tokenizer import END, word_encoding
from model import GPT
from pool import PoolOptimizer
from runtime import checkpoint as build
from runtime import log as runtime_log
from runtime.checkpoint import checkpoints
from runtime.cli import parse
from runtime.log import plot_run


@pytest.mark.parametrize(
    "options",
    [
        ["--dropout=0.1"],
        ["--value_optimizer=adam", "--accum_steps=2"],
        ["--mem_dtype=bfloat16", "--value_stochastic_rounding"],
        ["--kernel=triton", "--device=auto", "--batch_size=1", "--block_size=16"],
        ["--mem_layers="],
        ["--mem_layers=0,1", "--mem_mode=add"],
        ["--moe_layers=0", "--moe_experts=4"],
        ["--mem_kind=peer", "--value_optimizer=sgd"],
        ["--mem_kind=hash"],
    ],
)
def test_resuming_equals_not_stopping_bit_for_bit(run, options):
    run(*options)
    whole = log(run.out)
    shutil.copytree(run.out / "step_000006", run.out.parent / "end")
    shutil.rmtree(run.out / "step_000006")
    (run.out / ".saving_checkpoint").mkdir()  # what a kill in the middle of a save leaves
    (run.out / ".saving_checkpoint" / "model.pt").write_bytes(b"half")
    train.main(["--resume", f"--out_dir={run.out}"])  # the other options come from the checkpoint
    assert_same_checkpoint(run.out / "step_000006", run.out.parent / "end")
    assert log(run.out) == whole
    assert {path.name for path in run.out.iterdir()} == {
        "log.jsonl",
        "loss.png",
        "step_000003",
        "step_000006",
    }


def test_resume_can_train_longer_and_starts_where_there_is_nothing(run, capsys):
    run("--resume", "--max_steps=3")
    run("--resume", "--max_steps=6")
    assert "resumed from" in capsys.readouterr().out
    assert [line["step"] for line in log(run.out) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    run("--resume")
    assert "is the end of this run" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["rowwise", "adam"])
def test_accumulation_equals_the_big_batch(run, optimizer):
    outs = []
    for parts in (1, 2, 4):
        outs.append(run.out.with_name(f"parts{parts}"))
        run(f"--accum_steps={parts}", f"--value_optimizer={optimizer}", out=outs[-1])
    whole, *split = (log(out) for out in outs)
    for lines in split:
        for a, b in zip(whole, lines, strict=True):
            for key in ("loss", "val_loss"):
                assert math.isclose(a.get(key, 0), b.get(key, 0), rel_tol=1e-4), (key, a, b)
    values = [torch.load(out / "step_000003" / "pool_0of1.pt", weights_only=True)["values"] for out in outs]
    for other in values[1:]:
        torch.testing.assert_close(values[0], other, rtol=1e-3, atol=1e-3)


def test_each_optimizer_gets_its_own_learning_rate(run, monkeypatch):
    rates, step = [], PoolOptimizer.step
    monkeypatch.setattr(PoolOptimizer, "step",
                        lambda self: [rates.append(self.param_groups[0]["lr"]), step(self)])
    run("--lr=1e-3", "--value_lr=0.25", "--min_lr=0.5")
    config = train.TrainConfig(max_steps=6, warmup_steps=2, min_lr=0.5)
    assert rates == pytest.approx([0.25 * train.schedule(step, config) for step in range(6)])
    groups = torch.load(run.out / "step_000006" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-3 * train.schedule(5, config)] * 2)


def test_validation_has_no_dropout_and_does_not_count_as_use_of_the_pool(run):
    outs = [run.out.with_name(name) for name in ("with", "without")]
    run("--dropout=0.5", "--max_steps=1", out=outs[0])
    run("--max_steps=1", out=outs[1])
    a, b = (log(out)[0] for out in outs)
    assert a == b and a["step"] == 0 and a["slots_used"] == 0


def test_the_figure_of_a_run_whose_questions_came_later(tmp_path):
    lines = dict(step=0, val_loss=2), dict(step=5, loss=1), dict(step=5, val_loss=1, recall={"all": 0.5})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_run(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 10_000


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
    at = [train.schedule(step, config) for step in range(111)]
    assert (
        at[0] == 0.1 and at[9] == at[10] == 1.0 and math.isclose(at[60], 0.55) and math.isclose(at[110], 0.1)
    )
    assert all(a >= b for a, b in zip(at[10:], at[11:], strict=False))
    assert train.schedule(5, train.TrainConfig(warmup_steps=0, min_lr=1.0)) == 1.0


def test_recall_counts_exact_answers():
    """Of answers that are right, have two tokens, go on too long, or never end."""
    answers = {"a?": " x\n", "b?": " x y\n", "c? no": " x z\n", "d?": " x y x", "e? no": " y\n",
               "f?": " x\n  y", "g?": " x" + END}
    encoding = word_encoding(["".join(answers) * 9 + "".join(answers.values()) * 9, "\n  y"], [1, 1], 300)

    def generate(idx, max_new_tokens, temperature, stop):
        rows = []
        for row in idx.tolist():
            new = encoding.encode(answers[encoding.decode(row)], allowed_special="all")[:max_new_tokens]
            rows.append(row + new + [0] * (max_new_tokens - len(new)))
        return torch.tensor(rows)

    model = torch.nn.Module()
    model.wte, model.generate = torch.nn.Embedding(1, 1), generate
    questions = [
        dict(prompt="a?", answer="x", exposures=1),
        dict(prompt="b?", answer="x y", exposures=12),
        dict(prompt="c? no", answer="x", exposures=8),
        dict(prompt="d?", answer="x y", exposures=15),
        dict(prompt="f?", answer="x", exposures=0),
        dict(prompt="g?", answer="x", exposures=0),
        dict(prompt="e? no", answer="y", exposures=16, held_out=True),
    ]
    assert evaluate.recall(model, encoding, questions) == {
        "all": 4 / 6,
        "held_out": 1.0,
        "by_exposure": {"1": 1.0, "8": 1 / 3},
    }
    assert evaluate.recall(model, encoding, questions[6:]) == {"held_out": 1.0, "by_exposure": {}}


def test_a_run_leaves_what_it_says(run, capsys):
    run("--keep=1")
    assert {path.name for path in run.out.iterdir()} == {"log.jsonl", "loss.png", "step_000006"}
    printed = capsys.readouterr().out
    assert printed.count("  validation loss ") == 3, "each figure once, where it is new"
    for part in (
        "the validation loss is above the training loss",
        "multiply-adds",
        "step 3/6  validation loss ",
        "step 6/6  loss ",
        "recall",
        "slot use ",
        "tokens/s",
        " left",
        "peak memory",
        "python sample.py",
    ):
        assert part in printed
    lines = log(run.out)
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 6]
    assert {"slots_used", "kl_from_uniform", "recall"} <= lines[-1].keys()
    assert (run.out / "loss.png").stat().st_size > 10_000


def test_the_default_is_the_published_layer(capsys):
    """Memory+ of Berges et al. 2024: a query from one token's state. Presets that differ say so in --help."""
    paper = train.TrainConfig(**train.PRESETS["paper"])
    assert paper == train.TrainConfig(out_dir="out/paper")
    assert (paper.mem_query, paper.scale_embeddings, paper.mem_layers) == ("state", False, (0, 2))
    assert paper.mem_kind == "product-key" and paper.mem_swilu and paper.mem_qk_norm
    plain = train.GPTConfig(vocab_size=50)
    assert plain.mem_layers == () and train.GPT(plain).pool is None and plain.mem_query == "state"
    configs = {name: train.TrainConfig(**preset) for name, preset in train.PRESETS.items()}
    others = {name for name, config in configs.items() if config.mem_query != "state"}
    assert others == {"airports", "facts", "facts-2000", "stdlib"}
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert "The first four are not Memory+ as published." in text
    heads = re.findall(r"^([a-z]+):$", text, re.MULTILINE)
    assert heads == ["options", "model", "memory", "baselines", "files", "training", "logging"]
    assert text.index("memory:\n") < text.index("\n  --mem_layers") < text.index("baselines:\n")


def test_names_of_nanogpt_get_a_hint(capsys):
    for name, hint in [("--max_iters=3", "use --max_steps"), ("--eval_iters=9", "use --eval_batches"),
                       ("config/train_gpt2.py", "every option has the form --name=value")]:
        assert_fails(lambda name=name: train.main([name]), hint, capsys)


def test_missing_data_is_named_before_an_old_run_is(run, capsys):
    assert_fails(lambda: run("--dataset=nothing"), "no data in", capsys)
    assert not run.out.exists(), "a mistake leaves nothing"
    run()
    assert_fails(lambda: run("--dataset=nothing"), "no data in", capsys)


def test_facts_prepare_themselves(run, monkeypatch, tmp_path):
    for module in (prepare, corpus):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    few = prepare.FactsConfig(people=8, exposures=2)
    monkeypatch.setitem(prepare.READY_MADE, "facts", (prepare.facts, few))
    run("--max_steps=1")
    assert (tmp_path / "data" / "facts" / "qa.jsonl").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--n_layers=3"], "did you mean --n_layer?"),
        (["--max_steps=many"], "--max_steps: invalid int value: 'many'"),
        (["--batch_size=0"], "--batch_size=0 must be at least 1"),
        (["--seed=99999999999999"], "must be below 2**32"),
        (["--presett=stdlib"], "did you mean --preset?"),
        (["--lr=-1"], "--lr=-1.0 must not be negative"),
        (["--lr=nan"], "--lr=nan must not be negative"),
        (["--beta2=1"], "--beta2=1.0 must be at least 0 and below 1"),
        (["--accum_steps=3"], "--accum_steps=3 must divide batch_size=4"),
        (["--value_blocks=3"], "--value_blocks=3 must divide n_embd=16"),
        (["--mem_layers=2"], "there is no layer 2, only 0 to 1"),
        (["--mem_layers=none"], "none at all: --mem_layers="),
        (["--out_dir="], "--out_dir= must name a folder"),
        (["--out_dir=/dev/null/x"], "--out_dir=/dev/null/x: Not a directory"),
        (["--out_dir=out/step_5"], "--out_dir=out/step_5 has the name of a checkpoint"),
        (["--mem_layers=", "--mem_file=pool"], "--mem_file needs a pool"),
        (["--value_stochastic_rounding"], "value_stochastic_rounding needs --mem_dtype=bfloat16"),
        (["--kernel=cuda"], "--kernel: invalid choice: 'cuda'"),
        (["--dataset=mine"], "python data/prepare.py text --name=mine --input"),
        (["--block_size=100000"], "--block_size=100000 is too large"),
        (["--vocab_size=7"], "--vocab_size=7 is too small"),
        (["--lr=1e30", "--warmup_steps=0", "--grad_clip=0"], "training has diverged; lower --lr"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, options, message, capsys):
    assert_fails(lambda: run(*options), message, capsys)


def test_a_pool_in_a_file_is_for_the_cpu(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(train, "find_device", lambda name: "cuda")
    options = "--kernel=torch", f"--mem_file={tmp_path / 'pool'}"
    assert_fails(lambda: run(*options), "--mem_file needs --device=cpu", capsys)
    assert not run.out.exists() and not (tmp_path / "pool").exists()


def test_a_model_too_large_is_a_mistake_and_a_bug_is_a_bug(run, monkeypatch, capsys):
    def raising(message):
        def make(*args):
            raise RuntimeError(message)
        return make

    monkeypatch.setattr(build, "GPT", raising("DefaultCPUAllocator: can't allocate memory"))
    assert_fails(run, "the model does not fit into memory; --mem_file keeps the pool in a file: D", capsys)
    monkeypatch.setattr(build, "GPT", raising("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        run()


def test_weights_that_have_diverged_are_not_saved(run, capsys):
    """The loss of the last step was still finite. Saved, they would replace the last good checkpoint."""
    options = ["--lr=1e30", "--warmup_steps=0", "--grad_clip=0", "--eval_interval=1"]
    assert_fails(lambda: run(*options), "at step 1: training has diverged", capsys)
    assert checkpoints(run.out) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_triton_without_a_gpu(run, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert_fails(lambda: run("--kernel=triton"), "--kernel=triton needs a GPU", capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_where_there_is_none(run, capsys):
    assert_fails(lambda: run("--device=cuda"), "torch finds no CUDA device", capsys)


def test_a_run_is_never_overwritten_nor_changed(run, capsys):
    run()
    before = log(run.out)
    assert_fails(run, "continue from it with --resume, or choose another --out_dir", capsys)
    assert_fails(lambda: run("--resume", "--n_layer=3"), "--n_layer=3: the model in", capsys)
    assert_fails(
        lambda: run("--resume", "--value_optimizer=adam"), "--value_optimizer=adam: the model in", capsys
    )
    assert log(run.out) == before


def test_a_restart_by_torchrun_resumes_only_its_own_run(run, monkeypatch, capsys):
    """Guards another run in the same folder: torchrun --max-restarts also restarts what was refused."""
    run("--max_steps=3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run("--max_steps=3")
    assert "step_000003 is the end of this run" in capsys.readouterr().out
    for options in ([], ["--max_steps=3", "--lr=1e-4"]):
        assert_fails(lambda options=options: run(*options), "step_000003 already exists", capsys)
    run("--resume")
    assert log(run.out)[-1]["step"] == 6


def test_a_vocabulary_larger_than_the_corpus_s(run, capsys):
    """Guards decoding: an untrained model produces tokens that the corpus does not have."""
    run("--vocab_size=4096", "--scale_embeddings=false", "--max_steps=1")
    model = GPT(train.load(run.out)[2])
    encoding = corpus.Dataset("facts").encoding
    answers = evaluate.answer(model, encoding, [dict(prompt=f"{i}?", answer="x" * 30) for i in range(100)])
    assert max(map(max, answers)) >= encoding.n_vocab, "otherwise this test shows nothing"
    assert all(isinstance(corpus.decode(encoding, tokens), str) for tokens in answers)


def test_what_may_change_on_resuming_does(run):
    run("--max_steps=3")
    run("--resume", "--weight_decay=0.5", "--beta1=0.7", "--dropout=0.1", "--kernel=torch")
    groups = torch.load(run.out / "step_000006" / "optimizer.pt", weights_only=True)["param_groups"]
    assert groups[0]["weight_decay"] == 0.5 and groups[0]["betas"] == (0.7, 0.99)


def test_resuming_on_other_data_is_refused(run, monkeypatch, tmp_path, capsys):
    run()
    for module in (prepare, corpus):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    prepare.main(["facts", "--people=8", "--exposures=9", "--seed=5"])
    assert_fails(lambda: run("--resume"), "have different tokenizers", capsys)


def test_a_log_line_cut_short_does_not_stop_a_run(run):
    run("--max_steps=3")
    with open(run.out / "log.jsonl", "a") as f:
        f.write('{"step": 3, "lo')
    run("--resume")
    assert log(run.out)[-1]["step"] == 6


def test_an_out_dir_that_cannot_be_is_named(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert_fails(lambda: run(out=tmp_path / "file"), "file: File exists", capsys)


def test_damaged_data_is_named(run, facts_folder, monkeypatch, tmp_path, capsys):
    shutil.copytree(facts_folder / "facts", tmp_path / "data" / "facts")
    monkeypatch.setattr(corpus, "DATA", tmp_path / "data")
    path = tmp_path / "data" / "facts" / "train.bin"
    for damaged in (path.read_bytes()[:-1], path.read_bytes()[:-2]):
        path.write_bytes(damaged)
        assert_fails(run, "is damaged", capsys)
    path.unlink()
    assert_fails(run, "is damaged", capsys)


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
    """Guards a notebook: against state of the first run, a changed config, and a changed matplotlib."""
    import matplotlib

    def of_the_caller():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return handlers, matplotlib.rcParams.copy(), dict.__getitem__(matplotlib.rcParams, "backend")

    before, results = of_the_caller(), []
    for out in (run.out, run.out.with_name("again")):
        config = small(out=out)
        unchanged = dataclasses.replace(config)
        results.append(train.train(config))
        assert config == unchanged and config.vocab_size == 0
    (model, measured), (other, measured_again) = results
    assert of_the_caller() == before and not model.training
    for result in (measured, measured_again):  # as conftest.log does: a GPU adds it up in any order
        result["kl_from_uniform"] = round(result["kl_from_uniform"], 6)
    assert measured == measured_again and {"val_loss", "recall", "slots_used"} <= measured.keys()
    assert measured == {key: value for key, value in log(run.out)[-1].items() if key != "step"}
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_in_a_thread_equals_one_outside(run, small):
    """Python takes signal handlers in its main thread only."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train.train(small())))
    thread.start()
    thread.join()
    (model, measured), = results
    other, measured_again = train.train(small(out=run.out.with_name("outside")))
    assert measured == measured_again and torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("options, message", [
    (["--dataset=mine"], "prepare.py text --name=mine"),
    (["--vocab_size=7"], "--vocab_size=7 is too small"),
    (["--lr=1e30", "--warmup_steps=0", "--grad_clip=0"], "training has diverged"),
])
def test_a_mistake_from_python_is_a_value_error_and_leaves_nothing_open(run, small, options, message, capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match=message):
        train.train(small(*options))
    assert signal.getsignal(signal.SIGINT) is before and capsys.readouterr().err == ""
    open_files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert not [path for path in open_files if path.startswith(str(run.out))]


def test_resuming_from_python(run, small):
    """Also once the run is at its end: what it measured is in its last checkpoint."""
    whole, measured = train.train(small())
    shutil.rmtree(run.out / "step_000006")
    for _ in range(2):
        resumed, measured_again = train.train(small("--resume"))
        assert measured == measured_again and torch.equal(logits(whole), logits(resumed))
    with pytest.raises(ValueError, match="--n_layer=3: the model in"):
        train.train(small("--resume", "--n_layer=3"))
    with pytest.raises(ValueError, match="step_000006 already exists"):
        train.train(small())


def test_load_gives_the_model_that_was_trained(run, small):
    config = small("--mem_dtype=bfloat16", "--kernel=torch")
    model, measured = train.train(config)
    loaded, encoding, stored = train.load(str(run.out))
    assert not any(module.training for module in loaded.modules())
    assert not any(x.is_meta for x in [*loaded.parameters(), *loaded.buffers()])
    assert torch.equal(logits(model), logits(loaded)) and loaded.pool.values.requires_grad
    assert stored == dataclasses.replace(config, vocab_size=encoding.n_vocab, kernel="auto")
    assert evaluate.recall(loaded, encoding, corpus.Dataset("facts").questions) == measured["recall"]
    loaded.train()(*torch.arange(40).view(2, 1, 20))[1].backward()  # it can learn on
    assert loaded.pool.values.grad is not None and loaded.pool.usage.summary()[0] > 0
    with pytest.raises(ValueError, match="no checkpoint in"):
        train.load(run.out / "nothing")


def test_a_skipped_step_is_printed_with_the_next_log_line(run, monkeypatch, capsys):
    """A gradient that is not finite changes no value of the pool, and the user hears of it."""
    steps, step = [], PoolOptimizer.step

    def poisoned(self):
        steps.append(self)
        values = self.param_groups[0]["params"][0]
        if len(steps) in (2, 3):
            values.grad.reads[0][2].fill_(math.inf)  # dy
        before = values.detach().clone()
        step(self)
        assert torch.equal(before, values) == (len(steps) in (2, 3))

    monkeypatch.setattr(PoolOptimizer, "step", poisoned)
    run("--log_interval=2", "--max_steps=6")
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line or " loss " in line]
    lines = [line for line in lines if "validation" not in line]
    assert "the pool skipped 1 step: its gradient was not finite (1 so far)" in lines[0]
    assert "the pool skipped 1 step: its gradient was not finite (2 so far)" in lines[2]
    assert [line[:8] for line in lines[1:5:2]] == ["step 2/6", "step 4/6"] and lines[4].startswith("step 6/6")
    skipped = [line.get("skipped_steps") for line in log(run.out) if "loss" in line]
    assert skipped == [1, 2, None]


@pytest.mark.parametrize("broken", [False, True])
def test_evaluation_leaves_the_mode_of_each_module_as_it_was(run, small, monkeypatch, broken):
    model, _ = train.train(small())
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    data, config = corpus.Dataset("facts"), small()
    if broken:
        monkeypatch.setattr(GPT, "forward", lambda *arguments, **options: 1 / 0)
    for evaluation in (lambda: evaluate.validation_loss(model, data.val, config, "cpu"),
                       lambda: evaluate.recall(model, data.encoding, data.questions)):
        with pytest.raises(ZeroDivisionError) if broken else contextlib.nullcontext():
            evaluation()
        assert [module.training for module in model.modules()] == modes


def test_without_matplotlib_only_the_figure_is_missing(run, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        run("--max_steps=1")
    assert "loss.png was not drawn" in capsys.readouterr().out
    assert not (run.out / "loss.png").exists()
    run("--resume")
    assert (run.out / "loss.png").exists()


def test_a_figure_needs_no_backend(tmp_path):
    """A shell line in a notebook has the notebook's MPLBACKEND, which the shell's Python may not know."""
    (tmp_path / "log.jsonl").write_text('{"step": 0, "val_loss": 2}\n')
    code = "import os, sys; from pathlib import Path; from runtime.log import plot_run; " \
           "plot_run(Path(sys.argv[1])); print(os.environ['MPLBACKEND'])"
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], env=os.environ | {"MPLBACKEND": "module://nothing"},
                           cwd=Path(train.__file__).parent, capture_output=True, text=True)
    assert ended.stdout == "module://nothing\n" and ended.stderr == ""
    assert (tmp_path / "loss.png").stat().st_size > 5_000


# --- a run owns its folder ----------------------------------------------------------------------------------

OTHER_RUN = """
import fcntl, sys, time
lock = open(sys.argv[1], "a")
fcntl.flock(lock, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_is_refused(run, capsys):
    """Before the first checkpoint of the other run, too. A killed run leaves nothing that is in the way."""
    run("--max_steps=3")
    before = log(run.out)
    other = subprocess.Popen([sys.executable, "-c", OTHER_RUN, run.out / ".lock"], stdout=subprocess.PIPE)
    other.stdout.readline()
    for options in ([], ["--resume"], ["--resume", "--max_steps=9"]):
        assert_fails(lambda options=options: run(*options), "another run is training in", capsys)
    assert log(run.out) == before
    train.main(["--eval_only", f"--out_dir={run.out}"])  # only reads
    other.kill()
    other.communicate()
    run("--resume", "--max_steps=4")
    assert log(run.out)[-1]["step"] == 4 and not (run.out / ".lock").exists()


def test_a_run_owns_its_folder_from_the_first_second(run, monkeypatch, capsys):
    loaded, load_dataset = [], train.load_dataset

    def load_and_start_another(name):
        if not loaded:
            loaded.append(name)
            assert_fails(run, "another run is training in", capsys)
        return load_dataset(name)

    monkeypatch.setattr(train, "load_dataset", load_and_start_another)
    run()
    assert loaded and log(run.out)[-1]["step"] == 6


def test_a_disk_without_locks(run, monkeypatch, capsys):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(build.fcntl, "flock", no_locks)
    run("--max_steps=1")
    assert "cannot be locked (No locks available): start no other run there" in capsys.readouterr().out
    assert log(run.out)[-1]["step"] == 1


def test_the_lock_of_a_run_that_has_just_ended_is_not_taken(tmp_path, monkeypatch):
    """The other run removes its file between our open and our lock: our lock must be on a new file."""
    flock, path = build.fcntl.flock, tmp_path / ".lock"

    def late(*arguments):
        monkeypatch.setattr(build.fcntl, "flock", flock)
        path.unlink()
        flock(*arguments)

    monkeypatch.setattr(build.fcntl, "flock", late)
    with build.lock_folder(tmp_path) as lock:
        assert os.path.samestat(path.stat(), os.fstat(lock.fileno()))
        with pytest.raises(BlockingIOError):
            build.lock_folder(tmp_path)


# --- what a machine lacks -----------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_is_one_line(run, monkeypatch, capsys, error):
    run("--max_steps=3")

    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(train, "draw_batch", full)
    assert_fails(lambda: run("--resume"), "out of memory", capsys, also="continues from")


def test_a_full_disk_for_the_log_is_named(run, capsys):
    run.out.mkdir()
    (run.out / "log.jsonl").symlink_to("/dev/full")
    assert_fails(run, f"{run.out / 'log.jsonl'}: No space left on device", capsys)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_cpu_wait_is_the_time_in_which_a_busy_loop_did_not_run():
    cores = os.sched_getaffinity(0)
    core = {min(cores)}
    other = subprocess.Popen([sys.executable, "-c", "while 1: pass"],
                             preexec_fn=lambda: os.sched_setaffinity(0, core))
    os.sched_setaffinity(0, core)
    try:
        clocks = time.perf_counter, time.thread_time, cpu_wait
        start = [clock() for clock in clocks]
        while time.perf_counter() < start[0] + 0.5:
            pass
        wall, running, waiting = (clock() - begin for clock, begin in zip(clocks, start, strict=True))
    finally:
        os.sched_setaffinity(0, cores)
        other.kill()
        other.wait()
    assert waiting == pytest.approx(wall - running, abs=0.1) and waiting > 0.05


@pytest.mark.parametrize("share, policy, is_printed", [
    (0.5, "", True), (0.1, "", False), (0.5, "PASSIVE", False)])
def test_other_programs_on_the_cpu_are_noticed_once(run, monkeypatch, capsys, share, policy, is_printed):
    monkeypatch.setattr(runtime_log, "cpu_wait", lambda: share * time.perf_counter())
    monkeypatch.setattr(runtime_log, "BUSY_CHECK_SECONDS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    run()
    assert capsys.readouterr().out.count("other programs use the CPU") == is_printed


@pytest.mark.slow
def test_without_a_compiler_compile_is_one_line(run, tmp_path):
    """torch.compile needs a C++ compiler on the CPU."""
    ended = subprocess.run([sys.executable, "train.py", *SMALL, "--compile", f"--out_dir={run.out}"],
                           env=os.environ | {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
                           cwd=Path(train.__file__).parent, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("error: --compile does not work here") and "compiler" in ended.stderr


# --- the best checkpoint, and evaluation only ---------------------------------------------------------------

def steps(out: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoints(out)]


def test_the_best_checkpoint_is_kept(run, monkeypatch, capsys):
    """Over a resume, and with a checkpoint that Ctrl-C made: its own loss is not known."""
    losses = {0: 0.5, 1: 3.0, 2: 2.0, 3: 4.0, 4: 2.5, 5: 1.0, 6: 2.0}  # by step; nothing is saved at step 0
    seen = []

    def evaluation(model, *arguments, **options):
        seen.append(len(seen))
        return {"val_loss": losses[seen[-1]], "slots_used": 0.5, "kl_from_uniform": 1.0}

    monkeypatch.setattr(train, "evaluate", evaluation)
    options = "--eval_interval=1", "--keep=1", "--keep_best"
    run(*options, "--max_steps=2")
    assert steps(run.out) == [2]
    run(*options, "--resume", "--max_steps=4")
    assert steps(run.out) == [2, 4]
    assert f"sample.py --out_dir={run.out}/step_000002" in capsys.readouterr().out
    assert train.load(run.out)[2].max_steps == 4 and train.load(run.out / "step_000002")[2].max_steps == 2
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda *arguments: [signal.raise_signal(signal.SIGINT), clip(*arguments)])
    run("--eval_interval=9", "--resume", "--max_steps=6")  # stops after step 5
    assert steps(run.out) == [2, 5]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    run("--eval_interval=1", "--resume", "--max_steps=6")
    assert steps(run.out) == [6] and losses[seen[-1]] == 1.0
    assert_fails(lambda: run("--resume", out=run.out / "step_000006"), "has the name of a checkpoint", capsys)


def test_eval_only_measures_what_training_did_and_writes_nothing(run, monkeypatch, capsys, tmp_path):
    run(f"--mem_file={tmp_path / 'pool'}")
    (run.out / "loss.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    train.main(["--eval_only", f"--out_dir={run.out}"])
    printed, last = capsys.readouterr().out, log(run.out)[-1]
    data = corpus.Dataset("facts")
    number_of_bytes = len(data.encoding.decode(data.val.tolist()).encode())
    bits = last["val_loss"] * len(data.val) / number_of_bytes * math.log2(math.e)
    assert printed.splitlines()[0] == (
        f"{run.out / 'step_000006'}: validation loss {last['val_loss']:.4f} nats per token, "
        f"perplexity {math.exp(last['val_loss']):.2f}, {bits:.4f} bits per byte")
    assert "recall, the share of questions" in printed
    monkeypatch.setattr(corpus.Dataset, "val_bytes", property(lambda data: 0, lambda data, value: None),
                        raising=False)  # an older corpus
    config = dataclasses.replace(train.load(run.out)[2], out_dir=run.out / "step_000006", eval_only=True)
    model, measured = train.train(config)
    assert measured["val_loss"] == last["val_loss"] and measured["recall"] == last["recall"]
    assert "bits per byte" not in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert_fails(lambda: run("--eval_only", out=tmp_path / "none"), "no checkpoint in", capsys)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("options, is_printed", [
    (["--max_steps=6"], True), (["--max_steps=6", "--min_lr=1", "--warmup_steps=0", "--lr=4e-4"], False)])
def test_a_learning_rate_that_jumps_is_printed(run, capsys, options, is_printed):
    """A longer run has another schedule. nanoGPT's jumps, too."""
    run("--max_steps=3", "--lr=4e-3", "--min_lr=0.1")
    run("--resume", *options)
    assert log(run.out)[-1]["step"] == 6
    expected = "the learning rate continues at 3.5e-03 instead of 4.0e-04: it follows --max_steps"
    assert (expected in capsys.readouterr().out) == is_printed


def test_folders_as_people_type_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell leaves the ~ in --out_dir=~/run
    config = train.TrainConfig(out_dir="~/my run", mem_file="~/pool")
    assert (config.out_dir, config.mem_file) == (f"{tmp_path}/my run", f"{tmp_path}/pool")
    assert train.TrainConfig(out_dir=Path("out/x")).out_dir == "out/x"


@pytest.mark.slow
def test_a_short_run_on_facts_learns(run):
    """People seen most often are recalled; a model that only knows the answers' forms stays below 0.1."""
    run(
        "--max_steps=1000",
        "--eval_interval=500",
        "--n_embd=32",
        "--mem_num_keys=16",
        "--batch_size=16",
        "--block_size=64",
        "--eval_questions=1000",
        "--lr=6e-3",
    )
    evaluations = [line for line in log(run.out) if "val_loss" in line]
    assert evaluations[-1]["val_loss"] < 0.7 * evaluations[0]["val_loss"]
    recall = evaluations[-1]["recall"]
    assert recall["all"] > 0.3 and recall["by_exposure"][max(recall["by_exposure"], key=int)] > 0.5, recall


@pytest.mark.slow
# the first token has none before it: half of its query is 0, all keys tie, and the winners are arbitrary
@pytest.mark.parametrize("options", [[], ["--mem_num_keys=128", "--mem_query=state"]])
def test_compiled_training_equals_eager(run, options):
    """Guards the reads, which a compiled graph could lose, and the search, which eager mode does in numpy."""
    run(*options)
    run(*options, "--compile", out=run.out.with_name("compiled"))
    for a, b in zip(log(run.out), log(run.out.with_name("compiled")), strict=True):
        for key in a.keys() & {"loss", "val_loss", "slots_used"}:
            assert math.isclose(a[key], b[key], rel_tol=1e-3), (key, a, b)
