"""
Checkpoints: a folder OUT/step_000500 with

    model.pt          all parameters but the pool's
    optimizer.pt      AdamW's state
    pool_0of2.pt ...  the pool's columns, a file for each process that shares them: values, optimiser's state
    meta.json         the format, the step, the options, the encoding, the SHA-256 of each file and of itself

It is written under another name, and gets its own once all of it is on the disk. So a kill at any moment, or
a full disk, leaves the last good one; and a file that is cut short or has a flipped bit is noticed. What any
number of processes wrote, any other number can read. All must see the same OUT.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NoReturn

import torch

from config import fail
from distributed import RANK, WORLD_SIZE, Group, gather_objects
from model import GPT

FORMAT = 4


def checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((path for path in out_dir.glob("step_*") if path.name[5:].isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


# --- writing ------------------------------------------------------------------------------------------------

def save_checkpoint(out_dir: Path, step: int, model: GPT, optimizers: list, meta: dict, keep: int) -> None:
    """Writes out_dir/step_N; called by all processes. meta goes into meta.json. The newest `keep` stay."""
    folder, temporary = out_dir / f"step_{step:06d}", out_dir / ".saving_checkpoint"

    def make_folder():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)

    def write_parts():
        parts = own_parts(model, optimizers)
        return {name: write_part(temporary / name, part) for name, part in parts.items()}

    def finish():
        whole = {"format": FORMAT, "step": step, "files": files} | meta
        with open(temporary / "meta.json", "w", encoding="utf-8") as f:
            json.dump(whole | {"sha256": digest_of(whole)}, f)
            f.flush()
            os.fsync(f.fileno())
        sync_folder(temporary)
        if folder.exists():  # it was damaged, and so passed over
            remove(folder)
        os.rename(temporary, folder)
        sync_folder(out_dir)
        # newer ones are damaged, and count for nothing
        for old in [path for path in checkpoints(out_dir) if step_of(path) <= step][:-keep]:
            remove(old)

    try:
        together(make_folder if RANK == 0 else None)
        files = {}
        for written in together(write_parts):
            files |= written
        together(finish if RANK == 0 else None)
    except OSError as error:
        if RANK == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        cannot_go_on(out_dir, f"cannot write checkpoint {folder}: {error.strerror}")


def remove(folder: Path) -> None:
    """Under another name first: no folder that is half gone is ever called a checkpoint."""
    for left in folder.parent.glob(".removed_*"):  # of a process killed here, or with files open on NFS
        shutil.rmtree(left, ignore_errors=True)
    removed = folder.with_name(f".removed_{folder.name}_{os.getpid()}")
    os.rename(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)


def cannot_go_on(out_dir: Path, problem: str, alone: bool = False) -> NoReturn:
    """Ends the run, as config.fail does, and says which checkpoint is left."""
    last = checkpoints(out_dir)[-1:]
    fail(problem + (f"; once this is mended, --resume goes on from {last[0]}" if last else ""), alone)


def together(do) -> list:
    """What do() returned, for each process; an OSError in all of them if there was one in any."""
    result, problem = None, None
    try:
        result = do() if do else None
    except OSError as error:
        problem = error.errno, error.strerror
    outcomes = gather_objects((result, problem))
    for _, problem in outcomes:
        if problem:
            raise OSError(*problem)
    return [result for result, _ in outcomes]


def own_parts(model: GPT, optimizers: list) -> dict[str, dict]:
    """The files that this process writes: {name: what is in it}."""
    parts = {}
    if RANK == 0:
        state = {name: part for name, part in model.state_dict().items() if name != "pool.values"}
        parts = {"model.pt": state, "optimizer.pt": optimizers[0].state_dict()}
    if model.pool is not None and model.pool.sharding.replicas.rank == 0:
        columns = model.pool.sharding.columns
        parts[f"pool_{columns.rank}of{columns.size}.pt"] = {
            "values": model.pool.values.detach(), **optimizers[1].state[model.pool.values]}
    return parts


def write_part(path: Path, part: dict) -> str:
    """Writes it, waits until the disk has it, and returns its SHA-256."""
    with open(path, "wb+") as f:
        try:
            torch.save(part, f)
            f.flush()
        except RuntimeError as error:  # torch has its own word for what went wrong with the file
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(0, str(error))) from None
        os.fsync(f)
        f.seek(0)
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_of(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """The names in it are on the disk when this returns, as fsync sees to for what a file holds."""
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


# --- reading ------------------------------------------------------------------------------------------------

def find_checkpoint(out_dir: Path) -> Path | None:
    """
    The newest checkpoint that is whole, or None where there is none at all; called by all processes. Says
    which it had to pass over.
    """
    folders = gather_objects(checkpoints(out_dir))[0]
    for folder in reversed(folders):
        problem = next(filter(None, gather_objects(damage(folder))), None)
        if problem is None:
            return folder
        if RANK == 0:
            print(f"checkpoint {folder} is damaged and passed over: {problem}", flush=True)
    if folders:
        fail(f"no checkpoint in {out_dir} is whole: choose another --out_dir")
    return None


def read_meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything; each process looks at its share of the files."""
    try:
        meta = read_meta(folder)
        digest = meta.pop("sha256", None)  # which other formats may not have
        if digest != digest_of(meta) and (digest or meta["format"] == FORMAT):
            return "meta.json is not as it was written"
        if meta["format"] != FORMAT:
            fail(f"{folder} has the format {meta['format']}, and this version of nanoPKM reads {FORMAT}: "
                 "choose another --out_dir")
        for name, digest in list(meta["files"].items())[RANK::WORLD_SIZE]:
            with open(folder / name, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != digest:
                    return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"meta.json: {error}"
    return None


def load_part(folder: Path, name: str) -> dict:
    return torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)


def load_pool(folder: Path, columns: Group, names) -> dict:
    """{name: tensor or number} of what the pool's files hold; of a tensor, the columns of this process."""
    number = sum(name.startswith("pool_") for name in read_meta(folder)["files"])
    parts = [load_part(folder, f"pool_{i}of{number}.pt") for i in range(number)]
    return {name: take_columns([part[name] for part in parts], columns)
            if torch.is_tensor(parts[0][name]) else parts[0][name] for name in names}


def take_columns(parts: list[torch.Tensor], columns: Group) -> torch.Tensor:
    """
    Of a matrix that is there as equal blocks of columns, the block of this process. Where it is one of them,
    that itself: a mapped file stays one.
    """
    width = parts[0].size(1)
    first, last = (width * len(parts) * rank // columns.size for rank in (columns.rank, columns.rank + 1))
    pieces = [part[:, max(0, first - i * width):min(width, last - i * width)] for i, part in enumerate(parts)
              if first < (i + 1) * width and last > i * width]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=1)


def load_model(folder: Path, model: GPT) -> None:
    """Before optimizers are made: the parameters become the mapped file's, so no pool is in memory twice."""
    state = load_part(folder, "model.pt")
    if model.pool is not None:
        state["pool.values"] = load_pool(folder, model.pool.sharding.columns, ["values"])["values"]
        if model.pool.file:
            with torch.no_grad():
                state["pool.values"] = model.pool.values.copy_(state["pool.values"])
    model.load_state_dict(state, assign=True)


def load_optimizers(folder: Path, model: GPT, optimizers: list) -> None:
    stored = [load_part(folder, "optimizer.pt")["state"]]
    if model.pool is not None:
        names = optimizers[1].state[model.pool.values]
        stored.append({0: load_pool(folder, model.pool.sharding.columns, names)})
    for optimizer, state in zip(optimizers, stored, strict=True):
        # betas, weight decay and the like are as the options say now
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
