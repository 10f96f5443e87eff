"""Starts the `deployer` command; Ctrl-C counts from here on, before anything heavy is imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `deployer` and exit with its code."""
    try:
        from airflow_deployer import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)  # while importing or exiting: `cli` answers for all that is between


if __name__ == "__main__":
    main()
