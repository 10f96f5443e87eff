"""Tests of the files that go into the base image, without Airflow: they are loaded by path, as they are no package."""
