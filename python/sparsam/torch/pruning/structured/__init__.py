"""Structured pruning: removes whole neurons, channels and attention heads, and leaves a smaller dense model.

Units that can be removed are found by running the model (`search`): attention heads from its calls
(`attention`), neurons and channels from Torch-Pruning's dependency graph (`dependencies`, extra
`structured`). Then: choose (`unit_selection`), cut (`surgery`), verify and measure (`workflow`), report.
"""
