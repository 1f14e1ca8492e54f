"""`sparsam demo`: the whole path on real input, and the page that shows it.

Needs extras; only the command line imports it. Imports the pipeline, `sparse`, `checkpoint`, `training`,
`analysis`, `plot`, `bench` and `torch`.
"""
