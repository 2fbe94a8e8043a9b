"""runtime/checkpoint.py: after a kill, a full disk, damage, and for another number of processes."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_fails, assert_same_checkpoint, log

import train
from runtime import checkpoint
from runtime.distributed import Group


def test_a_millionth_step_comes_after_the_one_before_it(tmp_path):
    for step in (999_999, 1_000_000, 2):
        (tmp_path / f"step_{step:06d}").mkdir()
    (tmp_path / "step_000002_kept").mkdir()  # the user's own
    steps = [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)]
    assert steps == [2, 999_999, 1_000_000]


def damage(path: Path, how: str):
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "a bit":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(
    "name, how",
    [
        ("model.pt", "missing"),
        ("pool_0of1.pt", "missing"),
        ("pool_0of1.pt", "truncated"),
        ("pool_0of1.pt", "a bit"),
        ("optimizer.pt", "a bit"),
        ("meta.json", "missing"),
        ("meta.json", "truncated"),
        ("meta.json", "a bit"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run, name, how, capsys, tmp_path):
    run()
    shutil.copytree(run.out / "step_000006", tmp_path / "end")
    damage(run.out / "step_000006" / name, how)
    capsys.readouterr()
    run("--resume")
    printed = capsys.readouterr().out
    assert f"step_000006 is damaged and skipped: {name}" in printed.splitlines()[0]
    assert f"resumed from {run.out / 'step_000003'}" in printed
    assert_same_checkpoint(run.out / "step_000006", tmp_path / "end")
    for step in (3, 6):
        damage(run.out / f"step_00000{step}" / name, how)
    assert_fails(lambda: run("--resume"), "are damaged", capsys)


def test_damaged_newer_checkpoints_do_not_push_out_the_good(run):
    run()
    damage(run.out / "step_000006" / "model.pt", "a bit")
    run("--resume", "--keep=1", "--max_steps=5")
    assert checkpoint.find_checkpoint(run.out).name == "step_000005"


def test_no_folder_is_called_a_checkpoint_while_it_is_being_removed(run, monkeypatch):
    """Neither an old one, nor a damaged one that is written again. A kill could come in the middle."""
    run()
    damage(run.out / "step_000006" / "model.pt", "a bit")
    removed, rmtree = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **kw: [removed.append(path.name), rmtree(path, **kw)])
    run("--resume", "--keep=1")
    assert [path.name for path in run.out.glob("*step_*")] == ["step_000006"]
    assert removed and not [name for name in removed if name.startswith("step_")]


def test_a_run_that_was_moved_goes_on_where_it_is(run):
    run("--max_steps=3")
    moved = run.out.with_name("moved")
    shutil.copytree(run.out, moved)
    train.main(["--resume", f"--out_dir={moved}", "--max_steps=4"])
    assert checkpoint.checkpoints(moved)[-1].name == "step_000004"
    assert [path.name for path in checkpoint.checkpoints(run.out)] == ["step_000003"]


def test_a_checkpoint_of_another_format_is_named(run, capsys):
    run("--keep=1")
    path = run.out / "step_000006" / "meta.json"
    meta = json.loads(path.read_text()) | {"format": 4}
    del meta["sha256"]
    path.write_text(json.dumps(meta))
    assert_fails(lambda: run("--resume"), "has the format 4", capsys)
    assert path.exists()


def test_nothing_in_a_checkpoint_is_ever_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"weight": Harm()}, tmp_path / "model.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        checkpoint.load_part(tmp_path, "model.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("limit", [1_000, 20_000, 60_000])
def test_a_full_disk_is_named_and_loses_nothing(run, capsys, limit):
    """A limit on the size of files acts like a full disk: larger files are not written to their end."""
    run("--max_steps=3")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert_fails(lambda: run("--resume", "--max_steps=6"), "File too large", capsys, also="step_000003")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not (run.out / ".saving_checkpoint").exists() and [
        p.name for p in checkpoint.checkpoints(run.out)
    ] == ["step_000003"]
    run("--resume", "--max_steps=6")


@pytest.mark.parametrize("parts, size", [(1, 4), (4, 1), (2, 4), (4, 2), (3, 2), (2, 3)])
def test_columns_are_taken_from_any_number_of_files(parts, size):
    whole = torch.randn(5, 12)
    files = list(whole.chunk(parts, 1))
    taken = [checkpoint.take_columns(files, Group(size, rank)) for rank in range(size)]
    assert torch.equal(torch.cat(taken, 1), whole) and {part.size(1) for part in taken} == {12 // size}


SAVER = """
import sys, torch
from pathlib import Path
from runtime.checkpoint import parts_of, save_checkpoint
from model import GPT, GPTConfig
model = GPT(GPTConfig(vocab_size=64, n_layer=1, mem_layers=(0,), mem_num_keys=16))
optimizers = model.optimizers(1e-3, 1e-2, 0.1, (0.9, 0.99))
print("ready", flush=True)
for step in range(1, 100_000):
    for p in model.parameters():
        p.data.fill_(step)
    save_checkpoint(Path(sys.argv[1]), step, parts_of(model, optimizers), {}, keep=2)
"""


@pytest.mark.slow
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    """At random moments, many times: the newest is whole, and comes from one step."""
    newest = 0
    for i in range(8):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, tmp_path], cwd=Path(train.__file__).parent, stdout=subprocess.PIPE
        )
        saver.stdout.readline()
        time.sleep(0.05 + 0.037 * i)
        saver.kill()
        saver.wait()
        found = checkpoint.find_checkpoint(tmp_path)
        assert found == checkpoint.checkpoints(tmp_path)[-1]
        step = checkpoint.step_of(found)
        for name in ("model.pt", "pool_0of1.pt"):
            part = checkpoint.load_part(found, name)
            value = part["wte.weight" if name == "model.pt" else "values"]
            assert (value == step).all()
        newest = max(newest, step)
        assert step >= 1
    assert newest > 1


def test_ctrl_c_saves_once_and_ends(run, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    clip, clipped = torch.nn.utils.clip_grad_norm_, []

    def interrupted(*arguments):  # late in the fifth step, which is the one to save
        clipped.append(arguments)
        if len(clipped) == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # torchrun, which had the Ctrl-C too, tells its processes
        return clip(*arguments)

    run()
    whole, last = log(run.out), run.out / "step_000006"
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    stopped = run.out.with_name("stopped")
    run(out=stopped)
    assert "stopped after step 5" in capsys.readouterr().out
    assert [path.name for path in checkpoint.checkpoints(stopped)] == ["step_000003", "step_000005"]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    train.main(["--resume", f"--out_dir={stopped}"])
    assert_same_checkpoint(last, stopped / "step_000006")
    assert [line.get("loss") for line in log(stopped)] == [line.get("loss") for line in whole]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_a_second_ctrl_c_stops_at_once(run, monkeypatch, capsys, by_torchrun):
    """After one Ctrl-C, torchrun sends its processes another SIGINT, which must not count as a second one."""
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    run("--max_steps=3")
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments: [
        signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT), clip(*arguments)])
    if by_torchrun:
        run("--resume", "--max_steps=6")
    else:
        with pytest.raises(SystemExit) as stop:
            run("--resume", "--max_steps=6")
        assert stop.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"
    assert checkpoint.step_of(checkpoint.checkpoints(run.out)[-1]) == (4 if by_torchrun else 3)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    run("--resume", "--max_steps=6")
    assert [line["step"] for line in log(run.out) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_pool_in_a_file_equals_one_in_memory(run, capsys, tmp_path):
    file = tmp_path / "pool"
    run()
    whole = run.out.with_name("file")
    run("--max_steps=3", f"--mem_file={file}", out=whole)
    assert file.stat().st_size == 64 * 16 * 4
    stored = checkpoint.load_part(whole / "step_000003", "pool_0of1.pt")["values"]
    assert torch.equal(torch.from_file(str(file), size=64 * 16).view(64, 16), stored)
    file.write_bytes(bytes(64 * 16 * 4))  # a file is where the values are, not where they are kept
    run("--resume", f"--mem_file={file}", out=whole)
    assert_same_checkpoint(run.out / "step_000006", whole / "step_000006")
    letter = tmp_path / "letter"
    letter.write_text("Dear pool")
    assert_fails(lambda: run("--resume", f"--mem_file={letter}", out=whole), "does not have the size", capsys)
    assert letter.read_text() == "Dear pool"
    again = run.out.with_name("again")
    assert_fails(lambda: run(f"--mem_file={file}", out=again), "already exists", capsys)
    assert_fails(lambda: run(f"--mem_file={file}", "--resume", out=again), "already exists", capsys)
    assert_fails(lambda: run(f"--mem_file={tmp_path / 'no' / 'pool'}", out=again), "--mem_file=", capsys)
