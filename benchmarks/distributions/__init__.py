"""What the distribution of the data does to experts: domains, and shifts between them (docs/distributions.md)."""
