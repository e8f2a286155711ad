"""Quality per byte: which recipe makes a narrow exchange free, at which width and ratio (docs/quality.md)."""
