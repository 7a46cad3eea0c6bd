"""Architecture search on arrays: genomes, costs, importance, Pareto sets and searchers.

This package knows arrays, genomes and objectives. It never sees a dataset, a client or a
file, and nothing is imported eagerly: `from nas import arch, cost, nsga2, pareto`.
"""
