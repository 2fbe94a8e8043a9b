"""sample.py: it needs nothing but a checkpoint, asks, traces, and names each mistake."""

import json
import os
import re

import pytest
import torch

import sample
import train


def printed(capsys, *options) -> str:
    capsys.readouterr()
    sample.main([*options, "--device=cpu"])
    return capsys.readouterr().out


def test_text_needs_the_checkpoint_only(run, capsys, monkeypatch, tmp_path):
    run()
    monkeypatch.setattr(sample, "DATA", tmp_path / "nothing")
    options = [f"--out_dir={run.out}", "--prompt=The job of", "--num_samples=2", "--max_new_tokens=5"]
    text = printed(capsys, *options)
    assert text.count("The job of") == 2 and "--- sample 2 of 2" in text and "slots" not in text
    assert printed(capsys, *options) == text and printed(capsys, *options, "--seed=9") != text


def test_questions_are_judged_as_training_judged_them(run, capsys, facts_folder):
    run("--max_steps=150", "--eval_interval=150", "--batch_size=16", "--n_embd=32", "--lr=6e-3")
    questions = [json.loads(line) for line in open(facts_folder / "facts" / "qa.jsonl")]
    text = printed(capsys, f"--out_dir={run.out}", f"--questions={len(questions)}")
    right = int(re.search(rf"(\d+) of {len(questions)} right", text).group(1))
    assert right == text.count("[right, told") and len(questions) - right == text.count("[wrong: ")
    shares = [json.loads(line) for line in open(run.out / "log.jsonl")][-1]["recall"]
    held_out = sum(question["held_out"] for question in questions)
    assert right == round(shares["all"] * (len(questions) - held_out) + shares["held_out"] * held_out)


@pytest.mark.parametrize("kind", ["product-key", "peer"])  # PEER has negative weights
def test_trace_shows_what_each_layer_read(run, capsys, kind):
    run("--mem_layers=1,0", f"--mem_kind={kind}")
    text = printed(capsys, f"--out_dir={run.out}", "--prompt=The job of", "--max_new_tokens=3", "--trace")
    model, encoding, _ = train.load(run.out)
    reads = []
    model.pool.register_forward_pre_hook(lambda module, read: reads.append(read))
    model(torch.tensor([encoding.encode("The job of")]))
    lines = [line for line in text.splitlines() if "slots" in line]
    prompt = len(reads[0][0])
    assert len(lines) % 2 == 0 and 2 * prompt <= len(lines) <= 2 * (prompt + 2), "the last token is not read"
    for i, line in enumerate(lines[:2 * prompt]):
        layer, row = i % 2, i // 2
        indices, weights = (part[row].detach() for part in reads[layer])
        use = torch.zeros(64).index_add_(0, indices, weights.abs()) / weights.abs().sum()
        shown = re.findall(r"(\d+) +(\d+)%", line.split("slots")[1])
        assert f"layer  {layer}" in line and len(shown) == 4
        assert [round(float(use[int(slot)]) * 100) for slot, _ in shown] == [int(part) for _, part in shown]
        assert int(shown[0][0]) == use.argmax()


def test_without_options_it_asks_the_newest_run(run, capsys):
    run(out=run.out / "old")
    run("--mem_layers=", out=run.out / "new")
    os.utime(run.out / "old" / "step_000006", (1, 1))
    text = printed(capsys, f"--out_dir={run.out}")
    assert "new/step_000006" in text and text.count("Question: ") == 5 and "slots" not in text
    os.utime(run.out / "new" / "step_000006", (0, 0))
    text = printed(capsys, f"--out_dir={run.out}")
    assert "old/step_000006" in text and text.count("Question: ") == 5


def test_mistakes_are_one_line_and_status_2(run, capsys, tmp_path, monkeypatch):
    run("--mem_layers=")
    here = f"--out_dir={run.out}"
    monkeypatch.setattr(sample, "DATA", tmp_path / "nothing")
    for options, message in [
        ([f"--out_dir={tmp_path / 'empty'}"], "no checkpoint in"),
        ([here, "--trace"], "no memory layers"),
        ([here, "--questions=3"], "facts has them"),
        ([here, "--num_samples=0"], "at least 1"),
        ([here, "--promt=x"], "did you mean --prompt?"),
        ([here, "--temperature=-1"], "must not be negative"),
        ([here, "--temperature=1e-40"], "must be 0, or at least"),
        ([here, "--questions=1", "--prompt=x"], "choose one"),
    ]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            sample.main(options)
        err = capsys.readouterr().err
        assert (
            stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
        ), err


def test_a_damaged_checkpoint_and_damaged_questions_are_named(run, capsys, tmp_path, monkeypatch):
    run("--kernel=triton", "--device=auto", "--batch_size=1", "--block_size=16", "--max_steps=1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sample, "DATA", tmp_path)
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / "qa.jsonl").write_text('{"prompt": "x"}\n')
    here = f"--out_dir={run.out}"
    assert "--- sample 1" in printed(capsys, here, "--prompt=<|fim_prefix|>", "--max_new_tokens=2"), (
        "kernel or not"
    )
    for damaged in ("qa.jsonl must be {", "are damaged"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            sample.main([here])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and damaged in err
        (run.out / "step_000001" / "meta.json").unlink(missing_ok=True)
