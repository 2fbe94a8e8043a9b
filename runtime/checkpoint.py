"""
A checkpoint is a folder OUT/step_000500 with

    model.pt          all parameters except the pool's values
    optimizer.pt      AdamW's state
    pool_0of2.pt ...  values and optimiser state of the pool; one file per block of columns
    meta.json         format, step, options, encoding, loss, and the SHA-256 of each file and of itself

A checkpoint is written under another name, and renamed once all of it is on the disk. So the last good
checkpoint survives if a process is killed or the disk is full. The SHA-256 shows whether a file is damaged.
A run may continue with another number of processes. All of them must see the same folder OUT.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import NoReturn

import torch

from model import GPT
from runtime.cli import fail
from runtime.distributed import RANK, WORLD_SIZE, Group, columns_group, gather_objects, replicas_group

FORMAT = 5  # add 1 when the files change


def checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. out_dir may also be a checkpoint: then only this one."""
    if is_checkpoint(out_dir):
        return [out_dir] if out_dir.exists() else []
    return sorted(filter(is_checkpoint, out_dir.glob("step_*")), key=step_of)


def is_checkpoint(folder: Path) -> bool:
    return re.fullmatch(r"step_\d+", folder.name) is not None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def newest_run(out_dir: Path) -> Path:
    """
    out_dir: the folder of a run, one checkpoint of a run, or a folder with many runs. Returns the folder of
    the newest run there, or the checkpoint.
    """
    if checkpoints(out_dir):
        return out_dir
    if is_checkpoint(out_dir) and (others := checkpoints(out_dir.parent)):
        fail(f"no checkpoint {out_dir}: there are {', '.join(path.name for path in others)}")
    runs = {path.parent for path in out_dir.glob("**/step_*")}
    newest = [existing[-1] for run in runs if (existing := checkpoints(run))]
    if not newest:
        fail(f"no checkpoint in {out_dir}: train a model with python train.py, or name another --out_dir")
    if len(newest) > 1:
        print(f"--out_dir chooses one of {len(newest)} runs in {out_dir}; this is the newest:")
    return max(newest, key=lambda folder: folder.stat().st_mtime).parent


# --- writing ------------------------------------------------------------------------------------------------

def save_checkpoint(out_dir: Path, step: int, parts: dict[str, dict], meta: dict, keep: int,
                    keep_best: bool = False) -> None:
    """
    Writes out_dir/step_N and keeps the newest `keep` checkpoints; with keep_best, also the best one (see
    best_checkpoint). parts: the files of this process, {name: contents}, as parts_of makes them. meta goes
    into meta.json. Called by all processes.
    """
    folder, temporary = out_dir / f"step_{step:06d}", out_dir / ".saving_checkpoint"

    def make_folder():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)

    def write_parts():
        return {name: write_part(temporary / name, part) for name, part in parts.items()}

    def finish():
        contents = {"format": FORMAT, "step": step, "files": files} | meta
        with open(temporary / "meta.json", "w", encoding="utf-8") as f:
            json.dump(contents | {"sha256": digest_of(contents)}, f)
            f.flush()
            os.fsync(f.fileno())
        sync_folder(temporary)
        if folder.exists():  # a damaged checkpoint, which find_checkpoint skipped
            remove(folder)
        os.rename(temporary, folder)
        sync_folder(out_dir)
        # checkpoints after this step are damaged and do not count
        existing = [path for path in checkpoints(out_dir) if step_of(path) <= step]
        best = best_checkpoint(existing) if keep_best else None
        for old in existing[:-keep]:
            if old != best:
                remove(old)

    try:
        together(make_folder if RANK == 0 else None)
        files = {}
        for digests in together(write_parts):
            files |= digests
        together(finish if RANK == 0 else None)
    except OSError as error:
        if RANK == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        cannot_go_on(out_dir, f"cannot write checkpoint {folder}: {error.strerror}")


def remove(folder: Path) -> None:
    """Renames the folder before it deletes files, so that no checkpoint is ever half deleted."""
    for old in folder.parent.glob(".removed_*"):  # left by a killed process, or by open files on NFS
        shutil.rmtree(old, ignore_errors=True)
    trash = folder.with_name(f".removed_{folder.name}_{os.getpid()}")
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def cannot_go_on(out_dir: Path, problem: str, alone: bool = False) -> NoReturn:
    """Raises a UserError that also names the checkpoint to continue from."""
    last = checkpoints(out_dir)[-1:]
    fail(problem + (f"; after you fix this, --resume continues from {last[0]}" if last else ""), alone)


def best_checkpoint(folders: list[Path]) -> Path | None:
    """The checkpoint with the lowest validation loss. One that was not evaluated does not count."""
    losses = {}
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged, or not evaluated: saved by Ctrl-C
            losses[folder] = read_meta(folder)["val_loss"]
    return min(losses, key=losses.get, default=None)


def together(function) -> list:
    """Calls function() and returns the results of all processes. All raise the OSError of any process."""
    result, problem = None, None
    try:
        result = function() if function else None
    except OSError as error:
        problem = error.errno, error.strerror
    outcomes = gather_objects((result, problem))
    for _, problem in outcomes:
        if problem:
            raise OSError(*problem)
    return [result for result, _ in outcomes]


def parts_of(model: GPT, optimizers: list) -> dict[str, dict]:
    """The files that this process writes: {name: contents}. optimizers: as GPT.optimizers returns them."""
    parts = {}
    if RANK == 0:
        state = {name: part for name, part in model.state_dict().items() if name != "pool.values"}
        parts = {"model.pt": state, "optimizer.pt": optimizers[0].state_dict()}
    if model.pool is not None and replicas_group(model.pool).rank == 0:
        # several processes may have the same columns: only the first of them writes
        group, values = columns_group(model.pool), model.pool.values
        state = optimizers[1].state.get(values, {})
        parts[f"pool_{group.rank}of{group.size}.pt"] = {"values": values.detach(), **state}
    return parts


def write_part(path: Path, part: dict) -> str:
    """Writes a file, waits until it is on the disk, and returns its SHA-256."""
    with open(path, "wb+") as f:
        try:
            torch.save(part, f)
            f.flush()
        except RuntimeError as error:  # torch hides the OSError behind a RuntimeError
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(0, str(error))) from None
        os.fsync(f)
        f.seek(0)
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_of(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Waits until the names of a folder's files are on the disk; fsync of a file covers only its contents."""
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


# --- reading ------------------------------------------------------------------------------------------------

def find_checkpoint(out_dir: Path) -> Path | None:
    """
    The newest undamaged checkpoint; None if there are no checkpoints; an error if all are damaged. Called by
    all processes.
    """
    folders = gather_objects(checkpoints(out_dir))[0]
    for folder in reversed(folders):
        problem = next(filter(None, gather_objects(damage(folder))), None)
        if problem is None:
            return folder
        if RANK == 0:
            print(f"checkpoint {folder} is damaged and skipped: {problem}", flush=True)
    if folders:
        fail(f"all checkpoints in {out_dir} are damaged: choose another --out_dir")
    return None


def read_meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Each process checks its share of the files."""
    try:
        meta = read_meta(folder)
        stored_format, digest = meta["format"], meta.pop("sha256", None)  # other formats may have no digest
        if digest != digest_of(meta) and (digest or stored_format == FORMAT):
            return "meta.json has changed since it was written"
        if stored_format == FORMAT:
            for name, digest in list(meta["files"].items())[RANK::WORLD_SIZE]:
                with open(folder / name, "rb") as f:
                    if hashlib.file_digest(f, "sha256").hexdigest() != digest:
                        return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"meta.json: {error}"
    if stored_format != FORMAT:  # outside the try, as fail raises a ValueError
        fail(f"{folder} has the format {stored_format}, and this version of nanoPKM reads {FORMAT}: "
             "choose another --out_dir")
    return None


def load_part(folder: Path, name: str) -> dict:
    return torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)


def load_pool(folder: Path, group: Group) -> dict[str, torch.Tensor]:
    """Loads this process's columns of the pool: values and optimiser state, {name: tensor}."""
    number = sum(name.startswith("pool_") for name in read_meta(folder)["files"])
    parts = [load_part(folder, f"pool_{i}of{number}.pt") for i in range(number)]
    return {name: take_columns([part[name] for part in parts], group) if part.dim() else part
            for name, part in parts[0].items()}  # a count has no columns: every file has the same


def take_columns(parts: list[torch.Tensor], group: Group) -> torch.Tensor:
    """
    parts: a matrix, cut into equal blocks of columns. Returns the columns of this process. If one part has
    exactly these columns, it is not copied, and stays a memory-mapped file.
    """
    width = parts[0].size(1)
    first, last = (width * len(parts) * rank // group.size for rank in (group.rank, group.rank + 1))
    pieces = [part[:, max(0, first - i * width):min(width, last - i * width)] for i, part in enumerate(parts)
              if first < (i + 1) * width and last > i * width]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=1)


def load_optimizers(folder: Path, model: GPT, optimizers: list) -> None:
    stored = [load_part(folder, "optimizer.pt")["state"]]
    if model.pool is not None:
        pool_state = load_pool(folder, columns_group(model.pool))
        del pool_state["values"]
        stored.append({0: pool_state} if pool_state else {})  # 0: the index of the only parameter
    for optimizer, state in zip(optimizers, stored, strict=True):
        # learning rate, betas, weight decay and the like come from the options, not from the checkpoint
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
