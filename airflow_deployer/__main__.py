"""Lets `python -m airflow_deployer` stand for the `deployer` command."""

from airflow_deployer.cli import main

if __name__ == "__main__":
    main()
