"""`python -IS fork_client.py SOCKET COMMAND ...` runs COMMAND in a process that the server at SOCKET forks.

The client stands for that process: the same streams and exit code; if the client is killed, so is the process.
"""

import json
import os
import signal
import socket
import sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    request = json.dumps({"command": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    answer = server.recv(64)  # empty: the server is gone
code = int(answer or 1)
if code < 0:
    if -code != signal.SIGKILL:  # which has no handler
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
