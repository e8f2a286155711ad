"""A command on several hosts of this machine: python -m benchmarks.cluster --hosts=4 --rate=100mbit -- COMMAND …

Each host is a network namespace with its own address and host name, its link shaped in both directions. The command
runs once in each and gets --coordinator, --num_processes and --process_id, as train.py and eval.py take them:

    python -m benchmarks.cluster --hosts=4 --rate=100mbit -- \\
        bigmac train --config=configs/tiny.py --workdir=runs/four --config.mesh.expert=4

--machine=2 --fast_rate=1gbit makes pairs with fast links, of which each has one link of --rate to the others. Ctrl-C
ends all with SIGTERM, so train.py saves; a second one kills. Needs root and iproute2; --unshaped does without both.
"""

import argparse
import signal
import sys

from benchmarks.cluster import Cluster, ClusterError, Network, bits_per_second


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=4, metavar="N")
    parser.add_argument("--rate", default="", help="of a host's link (a machine's, with --machine), as in 100mbit")
    parser.add_argument("--machine", type=int, default=1, metavar="N", help="hosts a machine")
    parser.add_argument("--fast_rate", default="", help="of a host's link inside its machine")
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS", help="that a link adds in each direction")
    parser.add_argument("--unshaped", action="store_true", help="over loopback, without namespaces")
    parser.add_argument("--no-pin", action="store_true", help="hosts use all cores")
    parser.add_argument("--no-join", action="store_true", help="the command gets no arguments; HOST in it is a number")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    try:
        if given.unshaped == bool(given.rate):
            raise ClusterError("give --rate, as in --rate=100mbit, or --unshaped")
        fast = bits_per_second(given.fast_rate) if given.fast_rate else 0.0
        rate = bits_per_second(given.rate) if given.rate else 0.0
        network = Network(given.hosts, rate, given.machine, fast, given.delay)
        for number in (signal.SIGTERM, signal.SIGHUP):  # while the network is set up; a job has its own handlers
            signal.signal(number, lambda got, _: sys.exit(128 + got))
        with Cluster(network, pin=not given.no_pin) as cluster:
            code = cluster.run(given.command, join=not given.no_join)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
