"""Tests of rings, decoding, matching and the trace store."""
