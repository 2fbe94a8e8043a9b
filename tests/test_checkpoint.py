"""runtime/checkpoint.py: after a kill, a full disk, damage, and for another number of processes."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_fails, assert_same_checkpoint, log
from test_distributed import WORKER

import train
from data import corpus
from runtime import checkpoint
from runtime.distributed import Group
from runtime.log import RunLog


def test_a_millionth_step_comes_after_the_one_before_it(tmp_path):
    for step in (999_999, 1_000_000, 2):
        (tmp_path / f"step_{step:06d}").mkdir()
    (tmp_path / "step_000002_kept").mkdir()  # the user's own
    steps = [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)]
    assert steps == [2, 999_999, 1_000_000]


def damage(path: Path, how: str):
    if how == "missing":
        return path.unlink()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if how == "a bit" else content[:-100])


@pytest.mark.parametrize("name, how", [
    ("model.pt", "missing"), ("pool_0of1.pt", "truncated"), ("optimizer.pt", "a bit"),
    ("meta.json", "missing"), ("meta.json", "truncated"), ("meta.json", "a bit")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(ended, name, how, capsys):
    damage(ended.out / "step_000006" / name, how)
    assert checkpoint.find_checkpoint(ended.out).step == 3
    printed = capsys.readouterr().out
    assert "step_000006 is damaged and skipped: " in printed and name in printed
    damage(ended.out / "step_000003" / name, how)
    assert_fails(lambda: ended("--resume"), "are damaged", capsys)


def test_a_damaged_checkpoint_is_written_again(ended, unchanged, monkeypatch, capsys):
    """
    And no folder is called a checkpoint while it is being removed: neither an old one, nor a damaged one. A
    kill could come in the middle.
    """
    damage(ended.out / "step_000006" / "model.pt", "a bit")
    removed, rmtree = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **kw: [removed.append(path.name), rmtree(path, **kw)])
    ended("--resume", "--keep=1")
    assert f"resumed from {ended.out / 'step_000003'}" in capsys.readouterr().out
    assert_same_checkpoint(ended.out / "step_000006", unchanged / "step_000006")
    assert [path.name for path in ended.out.glob("*step_*")] == ["step_000006"]
    assert {".tmp_step_000006", ".tmp_step_000003"} <= set(removed)
    assert not [name for name in removed if name.startswith("step_")]


def test_damaged_newer_checkpoints_do_not_push_out_the_good(ended):
    damage(ended.out / "step_000006" / "model.pt", "a bit")
    ended("--resume", "--keep=1", "--max_steps=5")
    assert checkpoint.find_checkpoint(ended.out).step == 5


def test_a_resume_reads_each_file_once(half, monkeypatch):
    """Guards against files that were hashed twice."""
    hashed, digest = [], checkpoint.hashlib.file_digest
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", lambda f, name: [
        hashed.append(Path(f.name)), digest(f, name)][1])
    half("--resume", "--max_steps=4")
    assert sorted(path.name for path in hashed if path.parent == half.out / "step_000003") == [
        "model.pt", "optimizer.pt", "pool_0of1.pt"]


def test_checkpoints_of_other_versions(half, capsys):
    """
    An option that is gone is left out, and one that came later has its default, if the format is the same.
    Another format is named.
    """
    path = half.out / "step_000003" / "meta.json"
    meta = json.loads(path.read_text())
    meta["config"]["mem_file"] = ""
    for name in ("positions", "train_only", "init_from", "export_hf"):
        del meta["config"][name]
    del meta["sha256"]
    path.write_text(json.dumps(meta | {"sha256": checkpoint.digest_of(meta)}))
    half("--resume")
    assert log(half.out)[-1]["step"] == 6
    path.write_text(json.dumps(meta | {"format": 4}))
    shutil.rmtree(half.out / "step_000006")
    assert_fails(lambda: half("--resume"), "has the format 4", capsys)
    assert path.exists()


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


@pytest.mark.parametrize("name, change, message", [
    ("model.pt", lambda part: Harm(), "model.pt has more than tensors, such as a command"),
    ("optimizer.pt", lambda part: Harm(), "optimizer.pt has more than tensors, such as a command"),
    ("model.pt", lambda part: part | {"wte.weight": part["wte.weight"][1:]}, "size mismatch for wte.weight"),
    ("model.pt", lambda part: {}, "Missing key"), ("model.pt", lambda part: [], "does not fit its own meta"),
    ("pool_0of1.pt", lambda part: part | {"values": part["values"][1:]}, "size mismatch for pool.values"),
    ("pool_0of1.pt", lambda part: part | {"v": part["v"][1:]}, "the state has the shapes"),
    ("pool_0of1.pt", lambda part: {}, "does not fit its own meta.json ('values')"),
    ("optimizer.pt", lambda part: {"state": {0: {"exp_avg": torch.zeros(2)}}}, "exp_avg in optimizer.pt has"),
    ("optimizer.pt", lambda part: {}, "does not fit its own meta.json ('state')")])
def test_files_with_other_things_than_the_model_needs(half, name, change, message, capsys, monkeypatch):
    """
    Nothing in a checkpoint is ever run. AdamW crashed on tensors of other sizes. The digests in meta.json are
    right, as somebody would make them.
    """
    monkeypatch.chdir(half.out)
    folder = half.out / "step_000003"
    digest = checkpoint.write_part(folder / name, change(torch.load(folder / name, weights_only=True)))
    meta = json.loads((folder / "meta.json").read_text())
    del meta["sha256"]
    meta["files"][name] = digest
    (folder / "meta.json").write_text(json.dumps(meta))
    assert_fails(lambda: half("--resume"), message, capsys, also=str(folder))
    assert not Path("harm").exists()


@pytest.mark.parametrize("limit", [1_000, 20_000, 60_000])
def test_a_full_disk_is_named_and_loses_nothing(half, capsys, limit):
    """A limit on the size of files acts like a full disk: larger files are not written to their end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert_fails(lambda: half("--resume"), "File too large", capsys, also="step_000003")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not (half.out / ".tmp_checkpoint").exists()
    assert [path.name for path in checkpoint.checkpoints(half.out)] == ["step_000003"]


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
    save_checkpoint(Path(sys.argv[1]), step, parts_of(model, optimizers),
                    dict(config={}, measured={}, encoding={}), keep=2)
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
        assert found.folder == checkpoint.checkpoints(tmp_path)[-1]
        for name, part in (("model.pt", "wte.weight"), ("pool_0of1.pt", "values")):
            assert (found.load_part(name)[part] == found.step).all()
        newest = max(newest, found.step)
    assert newest > 1


def test_ctrl_c_saves_once_and_ends(half, unchanged, monkeypatch, capsys):
    """In the step in which it comes, although that is no step with a line of the log."""
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    clip, clipped = torch.nn.utils.clip_grad_norm_, []

    def interrupted(*arguments):  # late in the fifth step, which is the one to save
        clipped.append(arguments)
        if len(clipped) == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # torchrun, which had the Ctrl-C too, tells its processes
        return clip(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
        half("--resume", "--log_interval=6")
    assert "stopped after step 5" in capsys.readouterr().out
    assert [path.name for path in checkpoint.checkpoints(half.out)] == ["step_000003", "step_000005"]
    half("--resume")
    assert_same_checkpoint(unchanged / "step_000006", half.out / "step_000006")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_closed_terminal_does_not_prevent_the_checkpoint(half, unchanged):
    """SIGHUP comes when ssh ends. What the run prints from then on is an error, and dropped."""
    terminal, inside = os.openpty()

    def own_terminal():  # the program becomes the one that SIGHUP goes to
        os.setsid()
        fcntl.ioctl(inside, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

    run = subprocess.Popen(
        [sys.executable, "-c", WORKER.format(patch=""), str(corpus.DATA), f"--out_dir={half.out}", "--resume",
         "--max_steps=1000000", "--eval_interval=1000000"], preexec_fn=own_terminal,
        stdin=inside, stdout=inside, stderr=inside, cwd=Path(train.__file__).parent)
    os.close(inside)
    printed = b""
    while b"step       4/1000000" not in printed:
        printed += os.read(terminal, 1000)
    os.close(terminal)
    assert run.wait(timeout=60) == 0
    assert checkpoint.find_checkpoint(half.out).step >= 4
    assert log(half.out)[:5] == log(unchanged)[:5]


@pytest.mark.parametrize("by_torchrun", [False, True])
def test_a_second_ctrl_c_stops_at_once(half, monkeypatch, capsys, by_torchrun):
    """After one Ctrl-C, torchrun sends its processes another SIGINT, which must not count as a second one."""
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments: [
        signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT), clip(*arguments)])
    if by_torchrun:
        half("--resume")
    else:
        with pytest.raises(SystemExit, match="130"):
            half("--resume")
        assert capsys.readouterr().err == "\ninterrupted\n"
    assert checkpoint.checkpoints(half.out)[-1].name == ("step_000004" if by_torchrun else "step_000003")


def test_a_pool_on_disk_equals_one_in_memory(run, unchanged, monkeypatch):
    """
    Guards the live pool of another run, whose file a resumed run overwrote: the file has no name, so nobody
    else can open it, and nothing is left of it when the process ends.
    """
    maps = []
    log_step = RunLog.log_step
    monkeypatch.setattr(RunLog, "log_step", lambda *arguments: [
        maps.append(Path("/proc/self/maps").read_text()), log_step(*arguments)])
    run("--mem_on_disk", "--max_steps=3")
    assert maps and f"{run.out}/.pool_0of1 (deleted)" in maps[-1]
    run("--resume", "--mem_on_disk", "--max_steps=6")
    assert_same_checkpoint(run.out / "step_000006", unchanged / "step_000006")
    assert {path.name for path in run.out.iterdir()} == {path.name for path in unchanged.iterdir()}
