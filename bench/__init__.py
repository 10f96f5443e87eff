"""Measurements on a real cluster: this project side by side with what a user would run instead."""
