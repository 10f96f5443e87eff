"""Unit tests: they mirror the package and need neither Docker nor a cluster."""
