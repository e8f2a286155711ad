"""What a configuration costs: counts (formulas), programs (what the compiler made), times (a model of the hardware)."""
