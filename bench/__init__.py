"""Benchmarks: `python -m bench NAME` (or `all`) prints one table row per measurement against a named peer.

Ours and the peer run in turn in one process on the same random weights, so that the ratio holds where the times do not.
"""
