"""
Runs the code of docs/lesson.ipynb without Jupyter, and stores what it prints and draws in the file. After you
have changed the lesson:

    python docs/make_lesson.py
"""

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files: no window opens
import matplotlib.pyplot as plt  # noqa: E402

LESSON = Path(__file__).with_name("lesson.ipynb")


def read_lesson() -> dict:
    return json.loads(LESSON.read_text(encoding="utf-8"))


def code_cells(lesson: dict) -> list[dict]:
    return [cell for cell in lesson["cells"] if cell["cell_type"] == "code"]


def run_cell(code: str, names: dict) -> list[dict]:
    """Runs the code of a cell. names: the variables of all cells. Returns outputs in a notebook's form."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "cell", "exec"), names)
    root = str(LESSON.parents[1])  # messages name files in this folder, which is elsewhere on other machines
    lines = printed.getvalue().replace(root, "nanoPKM").splitlines(keepends=True)
    outputs = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    for number in plt.get_fignums():
        png = io.BytesIO()
        plt.figure(number).savefig(png, dpi=72, bbox_inches="tight", metadata={"Software": None})
        data = {"image/png": base64.b64encode(png.getvalue()).decode() + "\n", "text/plain": ["<Figure>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return outputs


def main() -> None:
    lesson, names = read_lesson(), {"__name__": "__main__"}
    sys.path.insert(0, str(LESSON.parents[1]))
    with tempfile.TemporaryDirectory() as folder:  # trains from the start, and leaves your out/ alone
        os.chdir(folder)
        os.makedirs("docs")
        os.chdir("docs")
        for count, cell in enumerate(code_cells(lesson), 1):
            cell["outputs"], cell["execution_count"] = run_cell("".join(cell["source"]), names), count
            print(f"cell {count} done", flush=True)
        os.chdir(LESSON.parent)
    LESSON.write_text(json.dumps(lesson, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
