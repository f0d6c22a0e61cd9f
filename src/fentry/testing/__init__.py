"""Conformance suites for targets, exporters and their like: shipped, so that a port can be checked anywhere."""
