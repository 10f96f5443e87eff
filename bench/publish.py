"""Brings the latest figures to where they are read: the table in `bench/README.md` and the plot of the README.

python -m bench.publish
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import measure, plot

FOLDER = Path(__file__).parent
LATEST = FOLDER / "results" / "latest.json"
README = FOLDER / "README.md"
PLOT = FOLDER.parent / "docs" / "edit-to-live.svg"

BEGIN, END = "<!-- latest figures -->\n", "<!-- end of the latest figures -->\n"


def main() -> None:
    """Write both from `results/latest.json`."""
    found = json.loads(LATEST.read_text(encoding="utf-8"))
    README.write_text(with_figures(README.read_text(encoding="utf-8"), found), encoding="utf-8")
    PLOT.write_text(plot.draw(found), encoding="utf-8")


def with_figures(text: str, found: Mapping[str, Any]) -> str:
    """Replace what stands between the two marks by the machine, the table and the budgets that were missed.

    Raises:
        ValueError: a mark is missing.
    """
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    machine = "".join(f"- {name}: {value}\n" for name, value in found["machine"].items())
    missed = "".join(f"- {row['name']}: {reason}\n" for row in found["rows"] for reason in row["missed"])
    verdict = f"Missed:\n\n{missed}" if missed else "Every budget is met.\n"
    return f"{text[:start]}\n{machine}\n{measure.markdown_table(found)}\n{verdict}\n{text[end:]}"


if __name__ == "__main__":
    main()
