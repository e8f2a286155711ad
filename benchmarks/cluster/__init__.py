"""Several hosts on one machine, joined by links that really are slow: python -m benchmarks.cluster --help."""

from benchmarks.cluster.network import ClusterError, Namespaces, Network, bits_per_second
from benchmarks.cluster.processes import Cluster

__all__ = ["Cluster", "ClusterError", "Namespaces", "Network", "bits_per_second"]
