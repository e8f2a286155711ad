"""The first command on new hardware: does this machine compute what it should, and how fast (docs/selfcheck.md)."""
