"""What runs beside Airflow in the pod: supervisor, import checks, and the DAG content on the volume."""
