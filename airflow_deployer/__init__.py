"""airflow-deployer: one command takes a folder of DAGs to a running, durable Airflow on Kubernetes."""

__version__ = "0.1.0"
