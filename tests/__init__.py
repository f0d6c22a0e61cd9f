"""Tests of fentry."""
