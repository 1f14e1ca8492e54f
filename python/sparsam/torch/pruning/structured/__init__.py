"""Structured pruning: whole neurons, channels and attention heads go, and a smaller dense model stays.

What can go together is found by running the model (`search`): attention from its calls (`attention`), neurons
and channels from Torch-Pruning's dependency graph (`dependencies`, extra `structured`). Then: choose
(`choice`), cut (`surgery`), verify and measure (`workflow`), report.
"""
