"""Builds each notebook's .ipynb from its py:percent source, the same bytes each time: python notebooks/build.py [--check]"""

import hashlib
import json
import sys
from pathlib import Path

import jupytext

FOLDER = Path(__file__).parent


def build(source: Path) -> str:
    """Returns the .ipynb of a source as text; a cell's id comes from its place and content."""
    notebook = jupytext.read(source)
    notebook.metadata = {
        "accelerator": "TPU",
        "colab": {"toc_visible": True},
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    for index, cell in enumerate(notebook.cells):
        cell["id"] = hashlib.sha1(f"{index}{cell.source}".encode()).hexdigest()[:12]
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    stale = []
    for source in sorted(FOLDER.glob("[0-9]*.py")):
        target, text = source.with_suffix(".ipynb"), build(source)
        if not target.exists() or target.read_text() != text:
            stale.append(target.name)
            if "--check" not in sys.argv[1:]:
                target.write_text(text)
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"not built from their sources: {', '.join(stale)}; run python notebooks/build.py")
    print(f"{len(stale)} notebooks written")


if __name__ == "__main__":
    main()
