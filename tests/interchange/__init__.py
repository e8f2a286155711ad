"""Tests of the exchange with other formats."""
