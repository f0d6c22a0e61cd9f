"""Tests of fentry.arch.x86_64."""
