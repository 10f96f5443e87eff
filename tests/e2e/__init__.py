"""End-to-end tests on a real Docker Engine, registry and Kubernetes API."""
