"""The label lists of ACME's experiments: which classes each device holds.

ACME (ICDCS 2025) calls the settings IID, C2, C3 and C4 after the number of distinct label
distributions among its devices: 5 devices for CIFAR-100, 10 devices for 10 classes.
"""

from __future__ import annotations

from fed.errors import PartitionError


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())


# Lists 1 to 4 are a partition of the 100 classes.
_LIST_1 = _numbers(
    "23 4 7 27 89 48 9 15 66 94 36 39 60 13 50 29 38 8 52 18 90 21 81 62 99",
)
_LIST_2 = _numbers(
    "61 34 14 88 76 67 78 59 20 74 65 2 70 92 97 19 28 83 11 95 32 56 53 17 91",
)
_LIST_3 = _numbers(
    "12 85 42 35 64 24 98 25 45 33 10 75 26 1 3 84 87 40 37 30 54 58 16 68 93",
)
_LIST_4 = _numbers(
    "79 77 82 72 41 47 31 73 49 55 5 69 86 80 22 57 0 46 43 6 71 51 44 63 96",
)

_CIFAR_100: dict[str, tuple[int, ...]] = {
    "1": _LIST_1,
    "2": _LIST_2,
    "1_3": _LIST_1[:13] + _LIST_3[:11],
    "1_2_3": _LIST_2[:4] + _LIST_1[4:13] + _LIST_3[:7] + _LIST_2[21:],
    "1_4": _LIST_4[:14] + _LIST_1[14:],
}
_CIFAR_100_DEVICES = {
    "iid": "1 1 1 1 1",
    "c2": "1 1 1 2 2",
    "c3": "1 2 1_3 1 2",
    "c4": "1 2 1_2_3 1 1_4",
}

_TEN: dict[str, tuple[int, ...]] = {
    "a": (0, 3, 4, 5),
    "b": (1, 2, 7, 8),
    "c": (0, 3, 6, 9),
    "c'": (0, 2, 6, 9),
    "e": (3, 7, 6, 9),
}
_TEN_DEVICES = {
    "iid": "a a a a a a a a a a",
    "c2": "a b b a b b a b b b",
    "c3": "a b c a b c a b c b",
    "c4": "a b c' a b c' a b c' e",
}


def paper_label_groups(
    distribution: str, num_clients: int, num_classes: int
) -> list[tuple[int, ...]]:
    """The labels of each client in one of ACME's settings.

    The paper lists 5 devices for 100 classes and 10 devices with 4 labels each for 10
    classes. More clients repeat the list from its start; fewer take its first entries (so
    5 clients in setting C4 with 10 classes see 3 of the 4 distributions).

    Generalisation to other class counts, which the paper does not treat: digit d of the
    10-class lists stands for the classes k with floor(10 k / num_classes) = d, so sizes and
    overlaps of the groups keep their proportions.

    Args:
      distribution: `"iid"`, `"c2"`, `"c3"` or `"c4"`. The paper's IID is "every client
        holds the same labels", not "every client holds all labels".
      num_clients: C.
      num_classes: at least 10.

    Returns:
      C tuples of labels, for `fed.partition.label_groups`.

    Raises:
      PartitionError: an unknown distribution, no clients, or fewer than 10 classes.
    """
    if distribution not in _TEN_DEVICES:
        raise PartitionError(
            f"unknown label distribution {distribution!r}; expected one of "
            f"{', '.join(_TEN_DEVICES)}"
        )
    if num_clients < 1:
        raise PartitionError(f"num_clients must be at least 1, got {num_clients}")
    if num_classes < 10:
        raise PartitionError(
            f"ACME's label lists need at least 10 classes, got {num_classes}; give your own "
            "lists to fed.partition.label_groups"
        )
    if num_classes == 100:
        groups, devices = _CIFAR_100, _CIFAR_100_DEVICES
    else:
        groups, devices = _scaled(num_classes), _TEN_DEVICES
    names = devices[distribution].split()
    return [groups[names[client % len(names)]] for client in range(num_clients)]


def _scaled(num_classes: int) -> dict[str, tuple[int, ...]]:
    digit_of = [10 * k // num_classes for k in range(num_classes)]
    return {
        name: tuple(k for digit in digits for k in range(num_classes) if digit_of[k] == digit)
        for name, digits in _TEN.items()
    }
