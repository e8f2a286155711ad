"""A host that sends SIZE bytes to each other one at the same time: peer.py HOST HOSTS SIZE FOLDER.

FOLDER/HOST.json: for each sender when its first and its last byte came. Addresses come from the host names.
"""

import json
import pathlib
import socket
import sys
import threading
import time

PORT = 4321


def main(host: int, hosts: int, size: int, folder: pathlib.Path) -> None:
    assert socket.gethostname() == f"host{host}"
    times: dict[int, tuple[float, float]] = {}

    def receive(connection: socket.socket) -> None:
        source, got = connection.recv(1)[0], 0
        first = time.monotonic()
        while data := connection.recv(1 << 20):
            got += len(data)
        assert got == size
        times[source] = first, time.monotonic()

    def send(target: int) -> None:
        while True:
            try:
                connection = socket.create_connection((f"host{target}", PORT), 10)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        everyone.wait()
        connection.sendall(bytes([host]) + bytes(size))
        connection.close()

    others = [target for target in range(hosts) if target != host]
    everyone = threading.Barrier(len(others))
    with socket.create_server((socket.gethostbyname(f"host{host}"), PORT)) as server:
        threads = [threading.Thread(target=send, args=(target,)) for target in others]
        for thread in threads:
            thread.start()
        for _ in others:
            threads.append(threading.Thread(target=receive, args=(server.accept()[0],)))
            threads[-1].start()
        for thread in threads:
            thread.join(20)
    (folder / f"{host}.json").write_text(json.dumps(times))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4]))
