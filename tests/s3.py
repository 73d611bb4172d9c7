"""An S3 server for tests: moto's, over HTTP, behind a door that can be shut.

Shut, its port refuses connections and those that were open are cut; what the server holds is kept.
"""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

MOTO = Path(os.environ.get("MOTO_SERVER", Path(sys.prefix, "moto/bin/moto_server")))
"""It has an environment of its own (`cluster/install.sh`): its botocore cannot do with our python-dateutil."""


class S3Server:
    """A running server. `environment` is what a process needs to reach it."""

    def __init__(self, inner_port):
        self.inner_port = inner_port
        self.port = 0
        self.connections = []
        self.open_door()
        self.environment = {
            "AWS_ACCESS_KEY_ID": "AKIDTESTS",
            "AWS_SECRET_ACCESS_KEY": "a-secret-of-tests",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name):
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{self.inner_port}/{name}", method="PUT"))

    def open_door(self):
        self.listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._let_in, args=(self.listener,), daemon=True).start()

    def shut_door(self):
        for end in (self.listener, *self.connections):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.connections.clear()

    def _let_in(self, listener):
        while True:
            try:
                outer, _ = listener.accept()
            except OSError:
                return
            inner = socket.create_connection(("127.0.0.1", self.inner_port))
            self.connections += [outer, inner]
            for one, other in ((outer, inner), (inner, outer)):
                threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one, other):
        with suppress(OSError):
            while received := one.recv(1 << 16):
                self.on_traffic(len(received))
                other.sendall(received)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def on_traffic(self, size):
        """What a test may put in place of this, to act in the middle of a transfer."""


@contextmanager
def s3_server():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([MOTO, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "moto_server does not start"
                time.sleep(0.1)
        door = S3Server(port)
        yield door
        door.shut_door()
    finally:
        server.terminate()
        server.wait()
