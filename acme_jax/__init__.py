"""The ACME system: cloud, edge and device tiers on top of `nas` and `fed`."""
