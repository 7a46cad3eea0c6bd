"""Federated methods on one footing: the same backbones, data, start, masks and byte counting.

`problem` is what every method is given, `method` what it gives back, `mlp_header` the model that
all of them train, `running` runs and evaluates, `registry` lists them. A method is one file here
and one line in the registry: docs/METHODS.md shows how.
"""
