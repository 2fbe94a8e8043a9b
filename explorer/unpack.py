"""
Makes a checkpoint again from a page of explorer.export, so that a page is also a model to send.

    python -m explorer.unpack                    docs/explorer.html becomes out/demo
    python -m explorer.unpack --page=mine.html --out_dir=out/mine
    python sample.py --out_dir=out/demo          asks the model, see edit.py for more

The pool's values are int8 in the page, so they are rounded. The state of the optimisers is not in the page:
training that is resumed starts with a fresh state.
"""

import base64
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from runtime.cli import build, command, fail, one_line, parse

import numpy as np
import torch

from data.corpora import make_missing
from data.tokenizer import END
from model import GPT, GPTConfig
from runtime.checkpoint import checkpoints, digest_of, parts_of, save_checkpoint


@dataclass
class UnpackConfig:
    page: str = "docs/explorer.html"  # a page of explorer.export
    out_dir: str = "out/demo"  # new folder for the checkpoint


def read_page(path: Path) -> dict:
    """The data in a page. Raises a ValueError if the page has none, or has changed since it was written."""
    pattern = r'<script type="application/json" id="data">(.*?)</script>'
    found = re.search(pattern, path.read_text(encoding="utf-8"), re.DOTALL)
    data = json.loads(found[1] if found else "{}")
    if "sha256" not in data or data.pop("sha256") != digest_of(data):
        raise ValueError("it is no page of explorer.export, or has changed since it was written")
    return data


def numbers(text: str, dtype) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype).copy())


def model_of_page(data: dict) -> GPT:
    model, weights = GPT(GPTConfig(**data["config"])), numbers(data["weights"], np.float32)
    parameters = dict(model.named_parameters())
    state = {name: weights[start:end].view_as(parameters[name]) for name, start, end in data["tensors"]}
    values = numbers(data["pool"]["values"], np.int8).view_as(parameters["pool.values"])
    state["pool.values"] = values * numbers(data["pool"]["scales"], np.float32).unsqueeze(1)
    model.load_state_dict(state)
    return model


def encoding_of_page(tokenizer: dict) -> dict:
    """As from encoding_to_json."""
    tokens = {token: i for i, token in enumerate(tokenizer["tokens"])}
    return {"name": tokenizer["name"], "pat_str": tokenizer["pattern"],
            "special_tokens": {END: tokenizer["end"]}, "tokens": tokens}


@command
def main(argv: list[str] | None = None) -> None:
    config = build(UnpackConfig, parse(UnpackConfig, argv, description=__doc__)[1])
    page, out_dir = Path(config.page).expanduser(), Path(config.out_dir).expanduser()
    if checkpoints(out_dir):
        fail(f"{out_dir} has a checkpoint already: choose another --out_dir")
    try:
        data = read_page(page)
    except (OSError, ValueError) as error:
        fail(f"--page={page}: {one_line(error) or error}")
    model, run = model_of_page(data), data["run"]
    fresh = model.optimizers(lr=0.0, value_lr=0.0, weight_decay=0.0, betas=(0.0, 0.0))  # train.py sets these
    run["config"]["out_dir"] = str(out_dir)
    meta = run | {"encoding": encoding_of_page(data["tokenizer"])}
    save_checkpoint(out_dir, run["step"], parts_of(model, fresh), meta, keep=1)
    make_missing(run["config"]["dataset"])
    print(f"wrote {out_dir}. Ask it: python sample.py --out_dir={shlex.quote(str(out_dir))}")


if __name__ == "__main__":
    main()
