"""Write down which schema revisions the installed Airflow knows, so that the supervisor need not import Airflow to ask.

Run while the image is built: `python schema_revisions.py OUTPUT`. The file it writes holds
`{"airflow": "3.3.2", "heads": [...], "revisions": [...]}`: `heads` is what `alembic_version` holds once the database is
migrated, `revisions` is everything this Airflow can migrate from.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path


def main(output: str) -> None:
    """Write the revisions of the Airflow that is installed beside this interpreter to the file `output`."""
    # Finding the package runs nothing of it: importing Airflow here would write its configuration into the image.
    spec = importlib.util.find_spec("airflow")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("Airflow is not installed in this environment.")
    migrations = Path(next(iter(spec.submodule_search_locations)), "migrations")
    scripts = importlib.import_module("alembic.script").ScriptDirectory(str(migrations))
    document = {
        "airflow": importlib.metadata.version("apache-airflow"),
        "heads": sorted(scripts.get_heads()),
        "revisions": sorted(script.revision for script in scripts.walk_revisions()),
    }
    Path(output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
