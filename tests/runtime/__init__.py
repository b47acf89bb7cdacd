"""Tests of `triptych.runtime`."""
