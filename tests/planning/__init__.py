"""Tests of counts, times and the search."""
