"""Unit tests of `airflow_deployer.local_cluster`."""
