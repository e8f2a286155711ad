"""The paper's tables and figures, measured on a network that is the bottleneck: docs/reproduction.md."""
