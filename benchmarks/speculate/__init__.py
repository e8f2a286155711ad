"""Drafts without exchange: what of them is accepted, and what they save: python -m benchmarks.speculate --help."""
