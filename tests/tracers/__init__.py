"""Tests of tracers."""
