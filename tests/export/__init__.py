"""Tests of exporters: exact transcripts, and readers of the formats."""
