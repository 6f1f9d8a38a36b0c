"""Callbacks: they observe and log, and never change a gradient."""
