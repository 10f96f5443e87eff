"""Tests: `unit` needs nothing but Python, `e2e` a real cluster."""
