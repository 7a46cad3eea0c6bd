"""The ledger counts true bytes and survives a checkpoint."""

import json

import numpy as np
import pytest

from fed.traffic import Ledger


def filled():
    ledger = Ledger()
    ledger.record("profile", b"x" * 10, tier="edge-device", direction="up", round=0)
    for round_index in (1, 2):
        for device in range(3):
            ledger.record(
                "importance",
                np.zeros(4, np.float32).tobytes(),
                tier="edge-device",
                direction="up",
                round=round_index,
                sender=device,
                receiver="edge",
            )
        ledger.record("set", b"y" * 7, tier="edge-device", direction="down", round=round_index)
    ledger.record("backbone", b"z" * 1000, tier="cloud-edge", direction="down", round=0)
    return ledger


def test_totals():
    ledger = filled()
    assert ledger.total() == 10 + 6 * 16 + 14 + 1000
    assert ledger.total(direction="up") == 106
    assert ledger.total(tier="edge-device", direction="down") == 14
    assert ledger.total(round=1) == 48 + 7
    assert ledger.total(round=0) == 1010
    assert ledger.total(kind="nothing") == 0
    assert ledger.totals_by("tier", "direction") == {
        ("cloud-edge", "down"): 1000,
        ("edge-device", "down"): 14,
        ("edge-device", "up"): 106,
    }
    assert ledger.totals_by("round") == {(0,): 1010, (1,): 55, (2,): 55}


def test_record_returns_the_bytes_of_any_buffer():
    ledger = Ledger()
    options = {"tier": "t", "direction": "up", "round": 0}
    assert ledger.record("a", b"abc", **options) == 3
    assert ledger.record("a", bytearray(4), **options) == 4
    assert ledger.record("a", memoryview(np.zeros(3, np.float32)), **options) == 12
    assert ledger.total() == 19


def test_records_survive_json():
    ledger = filled()
    records = ledger.to_records()
    assert records[-1] == {
        "tier": "edge-device",
        "direction": "up",
        "round": 2,
        "kind": "importance",
        "messages": 3,
        "bytes": 48,
    }
    restored = Ledger.from_records(json.loads(json.dumps(records)))
    assert restored.to_records() == records
    restored.record("set", b"1", tier="edge-device", direction="down", round=2)
    assert restored.total() == ledger.total() + 1


def test_compare():
    comparison = filled().compare(centralized_up=1060, centralized_down=10140)
    assert comparison.uplink_bytes == 106 and comparison.downlink_bytes == 1014
    assert comparison.uplink_fraction == pytest.approx(0.1)
    assert comparison.downlink_fraction == pytest.approx(0.1)
    assert comparison.total_fraction == pytest.approx(0.1)


def test_errors():
    ledger = Ledger()
    with pytest.raises(TypeError, match="'m' from 3 to edge: the payload must be bytes"):
        ledger.record("m", [1, 2], tier="t", direction="up", round=0, sender=3, receiver="edge")
    with pytest.raises(ValueError, match="'up' or 'down'"):
        ledger.record("m", b"", tier="t", direction="sideways", round=0)
    with pytest.raises(ValueError, match="must not be negative"):
        ledger.record("m", b"", tier="t", direction="up", round=-1)
    with pytest.raises(ValueError, match="unknown field"):
        ledger.totals_by("size")
    with pytest.raises(ValueError, match="must be positive"):
        ledger.compare(0, 1)
