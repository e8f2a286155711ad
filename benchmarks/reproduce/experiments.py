"""All experiments by name: each a function of the lab and the calibrated rate → a table, its records, its bytes."""

from benchmarks.reproduce.inference import figure5, table9
from benchmarks.reproduce.perplexity import figure1
from benchmarks.reproduce.result import Experiment
from benchmarks.reproduce.training import figure3, figure4, ratios, remat, table1
from benchmarks.reproduce.two_level import figure6, figure7, strategies

# In the order in which they are measured.
EXPERIMENTS: dict[str, Experiment] = {
    "table1": table1,
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "table9": table9,
    "figure6": figure6,
    "figure7": figure7,
    "figure1": figure1,
    "ratios": ratios,
    "strategies": strategies,
    "remat": remat,
}
QUICK = ("table1", "figure3", "table9")
