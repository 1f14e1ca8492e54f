"""`sparsam demo`: the whole pipeline on real input, and the page that shows the results.

Needs extras; only the command line imports it. Imports the pipeline, `sparse`, `checkpoint`, `training`,
`analysis`, `plot`, `bench` and `torch`.
"""
