"""
A run's folder OUT, and the checkpoints in it. A checkpoint is a folder OUT/step_000500 with

    model.pt          all parameters except the pool's values
    optimizer.pt      AdamW's state
    pool_0of2.pt ...  values and optimiser state of the pool; one file per block of columns
    meta.json         format, step, options, encoding, loss, and the SHA-256 of the corpus and of each file

    checkpoint = find_trained(Path("out/facts"))      # the newest, with its files checked
    model = checkpoint.load_model()

A checkpoint is written under another name, and renamed once all of it is on the disk. So the last good
checkpoint survives a kill and a full disk. A run may continue with another number of processes. All of them
must see the same folder OUT.
"""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import re
import shutil
from dataclasses import fields
from pathlib import Path

from runtime.cli import UserError, fail, one_line

import torch
from filelock import FileLock, Timeout

from data.tokenizer import encoding_from_json
from model import GPT, GPTConfig
from pool import ValuePool
from runtime.distributed import RANK, WORLD_SIZE, Group, columns_group, find_device, gather_objects

FORMAT = 5  # add 1 when the files change
OF_THE_MACHINE = dict(kernel="auto", mem_group_size=0, mem_on_disk=False)  # any machine can load the model


def is_checkpoint(folder: Path) -> bool:
    return re.fullmatch(r"step_\d+", folder.name) is not None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. out_dir may also be a checkpoint: then only this one."""
    if is_checkpoint(out_dir):
        return [out_dir] if out_dir.exists() else []
    return sorted(filter(is_checkpoint, out_dir.glob("step_*")), key=step_of)


@contextlib.contextmanager
def own_folder(out_dir: Path, resume: bool):
    """
    Makes out_dir. In the `with` block, no other run may write there: the first process locks the file .lock.
    The lock ends with the process, even if that is killed. Yields the checkpoint to continue from; None for a
    new run, which needs a folder without checkpoints. Called by all processes.
    """
    lock, is_new = FileLock(out_dir / ".lock", timeout=0), not out_dir.exists()
    if is_checkpoint(out_dir):
        fail(f"--out_dir={out_dir} has the name of a checkpoint: name the folder of the run")
    if out_dir.exists() and not out_dir.is_dir():
        fail(f"--out_dir={out_dir} is a file: name a folder")
    if RANK == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            fail(f"another run is training in {out_dir}: choose another --out_dir, or wait. Many processes "
                 "train together if torchrun starts them")
        for left in out_dir.glob(".tmp_*"):  # by a killed process, or by open files on NFS
            shutil.rmtree(left, ignore_errors=True)
    try:
        if not resume and (existing := checkpoints(out_dir)):
            fail(f"{existing[-1]} already exists: continue from it with --resume, or choose another "
                 "--out_dir")
        checkpoint = find_checkpoint(out_dir) if resume else None
        if resume and not checkpoint and not is_new and RANK == 0:
            print(f"no checkpoint in {out_dir} yet: starts a new run, with the options given now", flush=True)
        yield checkpoint
    finally:
        if RANK == 0 and is_new and [path.name for path in out_dir.iterdir()] == [".lock"]:
            shutil.rmtree(out_dir)  # a mistake leaves nothing
        lock.release()


# --- writing ------------------------------------------------------------------------------------------------

def save_checkpoint(out_dir: Path, step: int, parts: dict[str, dict], meta: dict, keep: int,
                    keep_best: bool = False) -> None:
    """
    Writes out_dir/step_N and keeps the newest `keep` checkpoints; with keep_best, also the best one (see
    best_checkpoint). parts: the files of this process, from parts_of. Called by all processes.
    """
    folder, temporary = out_dir / f"step_{step:06d}", out_dir / ".tmp_checkpoint"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        digests = gather_objects({name: write_part(temporary / name, part) for name, part in parts.items()})
        if RANK == 0:
            files = {name: digest for of_process in digests for name, digest in of_process.items()}
            meta = meta | {"format": FORMAT, "step": step, "files": files}
            path = temporary / "meta.json"
            path.write_text(json.dumps(meta | {"sha256": digest_of(meta)}), encoding="utf-8")
            sync(path)
            sync(temporary)
            if folder.exists():  # a damaged checkpoint, which find_checkpoint skipped
                remove(folder)
            os.rename(temporary, folder)
            sync(out_dir)
            # checkpoints after this step are damaged and do not count
            existing = [path for path in checkpoints(out_dir) if step_of(path) <= step]
            best = best_checkpoint(existing) if keep_best else None
            for old in existing[:-keep]:
                if old != best:
                    remove(old)
        gather_objects(None)  # all wait until the checkpoint is whole
    except OSError as error:
        raise OSError(f"cannot write checkpoint {folder}: {error.strerror}") from None
    finally:
        if RANK == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def parts_of(model: GPT, optimizers: list) -> dict[str, dict]:
    """The files of a checkpoint that this process writes: {name: contents}."""
    parts = {}
    if RANK == 0:
        state = {name: part for name, part in model.state_dict().items() if name != "pool.values"}
        parts = {"model.pt": state, "optimizer.pt": optimizers[0].state_dict()}
    if model.pool is not None and getattr(model.pool, "replicas_group", Group()).rank == 0:
        # several processes may have the same columns: only the first of them writes
        group, values = columns_group(model.pool), model.pool.values
        state = optimizers[1].state.get(values, {})
        parts[f"pool_{group.rank}of{group.size}.pt"] = {"values": values.detach(), **state}
    return parts


def remove(folder: Path) -> None:
    """Renames the folder before it deletes files, so that no checkpoint is ever half deleted."""
    trash = folder.with_name(f".tmp_{folder.name}")
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def best_checkpoint(folders: list[Path]) -> Path | None:
    """
    The checkpoint with the lowest validation loss on the text of the newest. One that was not evaluated does
    not count. folders: oldest first.
    """
    losses: dict[Path, float] = {}
    text = None
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError):  # damaged, or saved by Ctrl-C
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            trained_on = meta.get("corpus", {}).get("text")
            if trained_on != text:  # the run went on with another text
                losses, text = {}, trained_on
            losses[folder] = meta["val_loss"]
    return min(losses, key=losses.__getitem__, default=None)


def write_part(path: Path, part: dict) -> str:
    """Writes a file, waits until it is on the disk, and returns its SHA-256."""
    with open(path, "wb+") as f:
        try:
            torch.save(part, f)
            f.flush()
        except RuntimeError as error:
            raise error.__context__ or error from None  # torch hides the OSError behind a RuntimeError
        os.fsync(f)
        f.seek(0)
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_of(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's contents, or the names of a folder's files, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# --- reading ------------------------------------------------------------------------------------------------

def load_tensors(path: Path) -> dict:
    """What torch.save wrote, as memory-mapped files. Nothing in it is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        fail(f"{path} has more than tensors, such as a command, and nothing of it was run: choose another")


class Checkpoint:
    """A checkpoint whose meta.json is undamaged. options: of the run. measured: the last evaluation."""

    def __init__(self, folder: Path):
        self.folder, self.step = folder, step_of(folder)
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if self.meta.pop("sha256", None) not in (None, digest_of(self.meta)):
            raise ValueError("it has changed since it was written")
        if self.meta["format"] != FORMAT:
            fail(f"{folder} has the format {self.meta['format']}, not {FORMAT}: choose another --out_dir")
        self.options = {name: tuple(value) if isinstance(value, list) else value
                        for name, value in self.meta["config"].items() if name != "mem_file"}  # of older runs
        self.measured, self.encoding_json = self.meta["measured"], self.meta["encoding"]

    @functools.cached_property
    def encoding(self):
        return encoding_from_json(self.encoding_json)

    def check_corpus(self, data, same_text: bool = False) -> list[str]:
        """
        data: a Dataset, which must have the tokenizer that the model was trained with; with same_text, also
        the text. Prints and returns what else differs.
        """
        if self.encoding_json != data.encoding_json:
            fail(f"{data.name} and {self.folder} have different tokenizers: choose another --out_dir")
        stored = self.meta.get("corpus", data.digests)  # an older checkpoint does not tell
        if changed := [part for part in stored if stored[part] != data.digests[part]]:
            line = f"{self.folder} was trained with other {' and '.join(changed)} than {data.name} has now"
            if same_text and "text" in changed:
                fail(f"{line}: to go on with this text, name it with --dataset={data.name}; for a new run "
                     "choose another --out_dir")
            if RANK == 0:
                print(line, flush=True)
        return changed

    def load_part(self, name: str) -> dict:
        return load_tensors(self.folder / name)

    @contextlib.contextmanager
    def one_line_if_unfit(self):
        """For files that have other tensors than the model needs."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, UserError) or one_line(error):
                raise
            text = " ".join(" ".join(str(error).splitlines()[:2]).split())
            fail(f"{self.folder} does not fit its own meta.json ({text}): choose another --out_dir")

    def pool_columns(self, group: Group) -> dict[str, torch.Tensor]:
        """This process's columns of the pool: values and optimiser state, {name: tensor}."""
        number = sum(name.startswith("pool_") for name in self.meta["files"])
        parts = [self.load_part(f"pool_{i}of{number}.pt") for i in range(number)]
        return {name: take_columns([part[name] for part in parts], group) if part.dim() else part
                for name, part in parts[0].items()}  # a count has no columns: every file has the same

    def load_model(self, pool_class=ValuePool, values_file: Path | None = None, **changes) -> GPT:
        """
        The model on the CPU, in training mode. Its parameters are memory-mapped files, so a pool is never in
        memory twice. values_file: copy the pool's values to this file (see on_disk). changes: options of the
        model that are not as in the checkpoint, such as dropout=0.1.
        """
        options = self.options | OF_THE_MACHINE | changes
        names = {field.name for field in fields(GPTConfig)} & options.keys()  # the others are training's
        with torch.device("meta"):  # tensors without memory
            model = GPT(GPTConfig(**{name: options[name] for name in names}), pool_class)
        with self.one_line_if_unfit():
            state = self.load_part("model.pt")
            if model.pool is not None:
                state["pool.values"] = stored = self.pool_columns(columns_group(model.pool))["values"]
                if values_file:
                    state["pool.values"] = on_disk(stored, values_file).copy_(stored)
            model.load_state_dict(state, assign=True)
        return model

    def load_optimizers(self, model: GPT, optimizers: list) -> None:
        with self.one_line_if_unfit():
            stored = [self.load_part("optimizer.pt")["state"]]
            parameters = [p for group in optimizers[0].param_groups for p in group["params"]]
            for number, state in stored[0].items():  # AdamW would read beyond the end of a smaller tensor
                for name, part in state.items():
                    if part.shape != (() if name == "step" else parameters[number].shape):
                        raise ValueError(f"{name} in optimizer.pt has the shape {tuple(part.shape)}")
            if model.pool is not None:
                pool_state = self.pool_columns(columns_group(model.pool))
                del pool_state["values"]
                stored.append({0: pool_state} if pool_state else {})  # 0: the index of the only parameter
            for optimizer, state in zip(optimizers, stored, strict=True):
                # learning rate, betas, weight decay and the like come from the options
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": state, "param_groups": groups})


def read_checkpoint(folder: Path) -> tuple[Checkpoint | None, str | None]:
    """A checkpoint, and None; or None, and what is damaged. Each process checks its share of the files."""
    try:
        checkpoint = Checkpoint(folder)
        for name, digest in list(checkpoint.meta["files"].items())[RANK::WORLD_SIZE]:
            with open(folder / name, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != digest:
                    return None, f"{name} has changed since it was written"
        return checkpoint, None
    except UserError:  # another format
        raise
    except OSError as error:
        return None, one_line(error)
    except (ValueError, KeyError) as error:
        return None, f"meta.json: {error}"


def find_checkpoint(out_dir: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint; None if there are no checkpoints. Called by all processes."""
    folders = gather_objects(checkpoints(out_dir))[0]
    for folder in reversed(folders):
        checkpoint, problem = read_checkpoint(folder)
        problems = [problem for problem in gather_objects(problem) if problem]
        if not problems:
            return checkpoint
        if RANK == 0:
            print(f"checkpoint {folder} is damaged and skipped: {problems[0]}", flush=True)
    if folders:
        fail(f"all checkpoints in {out_dir} are damaged: choose another --out_dir")
    return None


def find_trained(out_dir: Path) -> Checkpoint:
    """The newest checkpoint, which must exist. out_dir: the folder of a run, or one checkpoint in it."""
    return find_checkpoint(out_dir) or fail(
        f"no checkpoint in {out_dir}: train a model with python train.py, or name another --out_dir")


def newest_run(out_dir: Path) -> Path:
    """out_dir itself if it is a run or a checkpoint. Else the run in it that has the newest checkpoint."""
    if checkpoints(out_dir) or is_checkpoint(out_dir):
        return out_dir
    runs = {path.parent for path in out_dir.glob("**/step_*")}
    newest = [existing[-1] for run in runs if (existing := checkpoints(run))]
    if len(newest) > 1:
        print(f"the newest of {len(newest)} runs in {out_dir}; --out_dir={out_dir / 'NAME'} takes another:")
    return max(newest, key=lambda folder: folder.stat().st_mtime).parent if newest else out_dir


def load(out_dir: Path | str | Checkpoint, device: str = "cpu"):
    """
    Loads the newest checkpoint of a run, or the checkpoint that is given. Returns the model in evaluation
    mode, the encoding, and the options of the run as a dict. device: cpu, cuda or auto.
    """
    if WORLD_SIZE > 1:
        fail("only train.py runs on many processes: start this program without torchrun")
    checkpoint = out_dir if isinstance(out_dir, Checkpoint) else find_trained(Path(out_dir).expanduser())
    print(f"loaded {checkpoint.folder}", flush=True)
    model = checkpoint.load_model().eval().to(find_device(device))
    return model, checkpoint.encoding, checkpoint.options | OF_THE_MACHINE


def take_columns(parts: list[torch.Tensor], group: Group) -> torch.Tensor:
    """
    parts: a matrix, cut into equal blocks of columns. Returns the columns of this process. If one part has
    exactly these columns, it is not copied, and stays a memory-mapped file.
    """
    width = parts[0].size(1)
    first, last = (width * len(parts) * rank // group.size for rank in (group.rank, group.rank + 1))
    pieces = [part[:, max(0, first - i * width):max(0, last - i * width)] for i, part in enumerate(parts)]
    pieces = [piece for piece in pieces if piece.size(1)]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=1)


# --- a pool in a file ---------------------------------------------------------------------------------------

def on_disk(like: torch.Tensor, path: Path) -> torch.Tensor:
    """
    An empty tensor with the shape and dtype of `like`, stored in a file, so it may be larger than memory. The
    file loses its name at once: no other run can use it, and it goes when the process ends or is killed.
    """
    with open(path, "wb") as f:
        if hasattr(os, "posix_fallocate"):  # fails now if the disk is full; macOS has no such call
            os.posix_fallocate(f.fileno(), 0, like.nbytes)
        else:
            os.truncate(f.fileno(), like.nbytes)
    values = torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
    path.unlink()
    return values


def pool_on_disk(pool_class, path: Path, *arguments, **options) -> ValuePool:
    """pool_class(*arguments, **options), with its values in a file."""
    pool = pool_class(*arguments, **options, device="meta")
    pool.values = torch.nn.Parameter(on_disk(pool.values, path))
    pool.reset_parameters()
    return pool
