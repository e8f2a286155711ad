"""One client beside nine that ask a server for too much: python -m benchmarks.hostile --help."""
