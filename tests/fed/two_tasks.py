"""Clients of two tasks: samples of the same inputs that two linear teachers label."""

import numpy as np

from fed import clients

D_IN, CLASSES = 6, 4
SIZES = (30, 18, 24, 12)


def make_data(equal=False):
    """Two clients with one labelling and two with another; or all the same samples."""
    rng = np.random.default_rng(1)
    teachers = rng.normal(size=(2, D_IN, CLASSES))
    pairs = []
    for client, size in enumerate(SIZES):
        inputs = rng.normal(size=(size, D_IN)).astype(np.float32)
        pairs.append((inputs, (inputs @ teachers[client % 2]).argmax(axis=1)))
    return clients.stack_clients([pairs[0]] * 4 if equal else pairs)
