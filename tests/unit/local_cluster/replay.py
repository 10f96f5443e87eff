"""A `kind` and a `docker` that replay recorded output: both are this script, behind a line that starts it.

Python runs it as a program of its own, so it uses nothing but the standard library. The table, `table.json` beside the
two programs, maps a command line to a list of answers, used up one by one, the last one again and again. The command
line that matches is the longest one that the call begins with. An answer is `{"out": ..., "err": ..., "code": ...}`.
Every call is appended to `calls.jsonl` with what it got on standard input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    """Answer one call."""
    program, *arguments = Path(sys.argv[0]).name, *sys.argv[1:]
    directory = Path(sys.argv[0]).parent
    call = " ".join([program, *arguments])
    with (directory / "calls.jsonl").open("a") as stream:
        stream.write(json.dumps({"call": call, "stdin": sys.stdin.read()}) + "\n")
    table = json.loads((directory / "table.json").read_text())
    matching = [known for known in table if call == known or call.startswith(f"{known} ")]
    if not matching:
        sys.stderr.write(f"nothing is recorded for: {call}\n")
        return 97
    answers = table[max(matching, key=len)]
    answer = answers.pop(0) if len(answers) > 1 else answers[0]
    (directory / "table.json").write_text(json.dumps(table))
    sys.stdout.write(answer.get("out", ""))
    sys.stderr.write(answer.get("err", ""))
    return int(answer.get("code", 0))


if __name__ == "__main__":
    sys.exit(main())
