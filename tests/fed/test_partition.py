"""Partitions: disjoint, the right labels, deterministic, clear errors."""

import numpy as np
import pytest

from fed import partition

LABELS = np.random.default_rng(0).integers(0, 10, 997)
GROUPS = [(0, 1, 2), (2, 3), (2, 4, 5, 6), (7, 8, 9)]

METHODS = {
    "iid": lambda seed: partition.iid(LABELS, 7, seed=seed),
    "label_groups": lambda seed: partition.label_groups(LABELS, GROUPS, seed=seed),
    "dirichlet": lambda seed: partition.dirichlet(LABELS, 7, 0.3, seed=seed),
    "dirichlet_tiny_alpha": lambda seed: partition.dirichlet(
        LABELS, 30, 1e-3, min_samples=5, seed=seed
    ),
    "pathological": lambda seed: partition.pathological(LABELS, 7, 2, seed=seed),
    "shards": lambda seed: partition.shards(LABELS, 7, 3, seed=seed),
    "quantity_skew": lambda seed: partition.quantity_skew(LABELS, 7, 0.3, seed=seed),
}
COMPLETE = ["iid", "label_groups", "dirichlet", "dirichlet_tiny_alpha", "shards", "quantity_skew"]


@pytest.mark.parametrize("name", METHODS)
def test_disjoint_nonempty_and_deterministic(name):
    parts = METHODS[name]((3, 1, 4))
    joined = np.concatenate(parts)
    assert len(np.unique(joined)) == len(joined)
    assert joined.min() >= 0 and joined.max() < len(LABELS)
    assert all(len(part) > 0 for part in parts)
    for again, part in zip(METHODS[name]((3, 1, 4)), parts, strict=True):
        np.testing.assert_array_equal(again, part)
    other = METHODS[name]((3, 1, 5))
    assert any(not np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


@pytest.mark.parametrize("name", COMPLETE)
def test_nothing_is_left_over(name):
    assert sorted(np.concatenate(METHODS[name](0))) == list(range(len(LABELS)))


def test_order_inside_a_client_is_random():
    part = partition.label_groups(LABELS, GROUPS, seed=0)[2]
    first, second = np.array_split(LABELS[part], 2)
    assert set(first) == set(second) == {2, 4, 5, 6}


def test_label_groups_hold_their_labels_and_share_fairly():
    parts = partition.label_groups(LABELS, GROUPS, seed=1)
    held = [set(LABELS[part].tolist()) for part in parts]
    assert held == [set(group) for group in GROUPS]
    of_label_2 = [int((LABELS[part] == 2).sum()) for part in parts[:3]]
    assert max(of_label_2) - min(of_label_2) <= 1
    assert sum(of_label_2) == (LABELS == 2).sum()


def test_label_groups_limit_each_label():
    parts = partition.label_groups(LABELS, GROUPS, samples_per_client=30, seed=1)
    for part, group in zip(parts, GROUPS, strict=True):
        counts = np.bincount(LABELS[part], minlength=10)
        assert counts[list(group)].tolist() == [30 // len(group)] * len(group)


def test_label_groups_pass_on_what_a_limit_leaves():
    labels = np.zeros(20, int).tolist() + [1] * 20
    parts = partition.label_groups(labels, [(0,), (0, 1)], samples_per_client=16, seed=0)
    # Client 1 may take 8 of label 0, client 0 takes 12 of the 20, not only half.
    assert [len(part) for part in parts] == [12, 16]


def test_dirichlet_repairs_to_the_minimum_and_caps():
    parts = partition.dirichlet(LABELS, 40, 0.01, min_samples=10, samples_per_client=25, seed=0)
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 10 and max(sizes) <= 25


def test_dirichlet_alpha_controls_the_skew():
    def largest_share(alpha):
        parts = partition.dirichlet(LABELS, 5, alpha, seed=0)
        return np.mean([np.bincount(LABELS[p]).max() / len(p) for p in parts])

    assert largest_share(0.05) > 0.4 > 0.2 > largest_share(1000.0)


def test_pathological_labels_are_balanced():
    parts = partition.pathological(LABELS, 8, 3, seed=0)
    held = [np.unique(LABELS[part]) for part in parts]
    assert all(len(labels) == 3 for labels in held)
    holders = np.bincount(np.concatenate(held), minlength=10)
    assert holders.max() - holders.min() <= 1


def test_shards_hold_few_labels():
    labels = np.repeat(np.arange(10), 100)
    parts = partition.shards(labels, 10, 2, seed=0)
    assert all(len(part) == 100 for part in parts)
    assert all(len(np.unique(labels[part])) <= 2 for part in parts)


def test_quantity_skew_sizes():
    parts = partition.quantity_skew(LABELS, 10, 0.1, min_samples=20, seed=0)
    sizes = np.array([len(part) for part in parts])
    assert sizes.min() >= 20 and sizes.max() > 3 * sizes.min()


def test_natural_ids():
    ids = np.array(["b", "a", "b", "c", "a", "b"])
    parts = partition.natural_ids(ids, min_samples=2)
    assert [part.tolist() for part in parts] == [[1, 4], [0, 2, 5]]


class TestPaperLabelGroups:
    def test_hundred_classes(self):
        c4 = partition.paper_label_groups("c4", 5, 100)
        assert [len(group) for group in c4] == [25, 25, 24, 25, 25]
        assert all(len(set(group)) == len(group) for group in c4)
        assert c4[0] == c4[3] and len(set(c4)) == 4
        assert c4[2][:6] == (61, 34, 14, 88, 89, 48) and c4[2][-4:] == (56, 53, 17, 91)
        assert c4[4][:2] == (79, 77) and c4[4][-2:] == (62, 99)
        c3 = partition.paper_label_groups("c3", 5, 100)
        assert len(c3[2]) == 24 and c3[2][12:14] == (60, 12) and c3[2][-1] == 10
        c2 = partition.paper_label_groups("c2", 5, 100)
        assert c2[0] == c2[1] == c2[2] and c2[3] == c2[4] and not set(c2[0]) & set(c2[3])
        assert len(set(partition.paper_label_groups("iid", 5, 100))) == 1

    def test_the_four_lists_are_a_partition(self):
        from fed import paper_groups

        lists = (
            paper_groups._LIST_1,
            paper_groups._LIST_2,
            paper_groups._LIST_3,
            paper_groups._LIST_4,
        )
        assert sorted(sum(lists, ())) == list(range(100))

    def test_ten_classes(self):
        a, b, c = (0, 3, 4, 5), (1, 2, 7, 8), (0, 3, 6, 9)
        assert partition.paper_label_groups("c3", 10, 10) == [a, b, c, a, b, c, a, b, c, b]
        assert partition.paper_label_groups("c2", 10, 10) == [a, b, b, a, b, b, a, b, b, b]
        c4 = partition.paper_label_groups("c4", 10, 10)
        assert c4[2] == (0, 2, 6, 9) and c4[9] == (3, 7, 6, 9)
        assert partition.paper_label_groups("iid", 3, 10) == [a, a, a]

    def test_cycled_and_cut(self):
        whole = partition.paper_label_groups("c4", 10, 10)
        assert partition.paper_label_groups("c4", 13, 10) == whole + whole[:3]
        assert partition.paper_label_groups("c4", 4, 10) == whole[:4]

    @pytest.mark.parametrize("num_classes", [11, 26, 200])
    def test_other_class_counts_keep_proportions(self, num_classes):
        groups = partition.paper_label_groups("c4", 10, num_classes)
        ten = partition.paper_label_groups("c4", 10, 10)
        for group, digits in zip(groups, ten, strict=True):
            assert {10 * k // num_classes for k in group} == set(digits)
            assert max(group) < num_classes
            assert abs(len(group) / num_classes - 0.4) < 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.iid([0, 1], 3, seed=0), "3 clients cannot share 2 samples"),
        (lambda: partition.iid([0.5, 1.0], 1, seed=0), "integer vector"),
        (lambda: partition.iid([0, -1], 1, seed=0), "not be negative"),
        (lambda: partition.iid([0, 1], 0, seed=0), "at least 1"),
        (lambda: partition.iid([0, 1], 1, samples_per_client=0, seed=0), "samples_per_client"),
        (lambda: partition.label_groups(LABELS, [(0, 10)], seed=0), "lie in 0..9"),
        (lambda: partition.label_groups(LABELS, [()], seed=0), "at least one label"),
        (lambda: partition.label_groups(LABELS, [(1, 1)], seed=0), "none twice"),
        (
            lambda: partition.label_groups(LABELS, [(1, 2, 3)], samples_per_client=2, seed=0),
            "use at least 3",
        ),
        (
            lambda: partition.label_groups([0, 0, 2, 2], [(0,), (1,)], seed=0),
            "client 1 would get no samples",
        ),
        (
            lambda: partition.label_groups([0, 1, 1], [(0,), (0,), (1,)], seed=0),
            "would get no samples",
        ),
        (lambda: partition.dirichlet(LABELS, 5, 0.0, seed=0), "alpha must be positive"),
        (lambda: partition.dirichlet(LABELS, 5, 1.0, min_samples=200, seed=0), "do not fit"),
        (lambda: partition.pathological(LABELS, 5, 11, seed=0), "labels_per_client"),
        (lambda: partition.shards([0, 1, 2], 2, 2, seed=0), "cannot be cut"),
        (lambda: partition.natural_ids([1, 2, 3], min_samples=2), "no client has 2 samples"),
        (lambda: partition.paper_label_groups("c5", 5, 10), "unknown label distribution"),
        (lambda: partition.paper_label_groups("c2", 5, 9), "at least 10 classes"),
        (lambda: partition.paper_label_groups("c2", 0, 10), "at least 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(partition.PartitionError, match=message):
        call()
