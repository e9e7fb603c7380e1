"""CPU time per request of the worker's loop beside another loop over the same requests.

    python bench_loop.py CEILING.py [--requests N] [--batches 1,2,16]

CEILING.py is a bare loop (one recv, loads, copy, update, application, one send; nothing checked)
that reads frames of u32 length, u32 id, marshal dict on descriptor 0. Both run as processes with
the same application and the same environ, are given batches of requests over a socket pair in
turns, and are charged what the kernel says they ran.
"""

import argparse
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile

from channel import Zygote, marshal_dict, request_environ, request_frame

APP = """
BODY = b"Hello, World!"

def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "13")])
    return [BODY]
"""
HEADERS = {
    "HTTP_USER_AGENT": "wrk/4.2.0 (a load generator)",
    "HTTP_ACCEPT": "*/*",
    "HTTP_ACCEPT_ENCODING": "gzip, deflate",
    "HTTP_CONNECTION": "keep-alive",
}


def cpu_ns(pid):
    with open("/proc/%d/schedstat" % pid) as info:
        return int(info.read().split()[0])


class Ceiling:
    header_bytes, header = 8, struct.Struct("<II")

    def __init__(self, path, directory):
        self.sock, theirs = socket.socketpair()
        command = [sys.executable, path, "bench_app:app"]
        self.process = subprocess.Popen(command, stdin=theirs, cwd=directory)
        theirs.close()
        self.pid = self.process.pid

    def frame(self, id, environ):
        data = marshal_dict(environ)
        return struct.pack("<II", len(data), id) + data


class Ours:
    header_bytes, header = 12, struct.Struct("<III")

    def __init__(self, directory):
        self.zygote = Zygote("bench_app:app", chdir=directory)
        self.pid, (channel,) = self.zygote.worker()
        self.sock = channel.data

    def frame(self, id, environ):
        return request_frame(id, environ)


def run(side, frames, count, batch):
    """Nanoseconds of CPU per request. All answers are of one size: counting bytes finds the end."""
    sock, data = side.sock, frames * batch
    sock.sendall(frames)
    first = sock.recv(1 << 20)
    answer_bytes = side.header_bytes + side.header.unpack_from(first)[0]
    assert len(first) == answer_bytes
    before = cpu_ns(side.pid)
    for _ in range(count // batch):
        sock.sendall(data)
        missing = answer_bytes * batch
        while missing:
            missing -= len(sock.recv(missing))
    return (cpu_ns(side.pid) - before) / (count // batch * batch)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ceiling")
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", default="1,2,16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, "bench_app.py"), "w") as file:
            file.write(APP)
        sides = Ceiling(os.path.abspath(args.ceiling), directory), Ours(directory)
        environ = request_environ(**HEADERS)
        for batch in map(int, args.batches.split(",")):
            times = [[], []]
            for _ in range(args.rounds):
                for side, found in zip(sides, times):
                    found.append(run(side, side.frame(1, environ), args.requests, batch))
            ceiling, ours = map(statistics.median, times)
            ratios = [b / a for a, b in zip(*times)]
            print(
                "%s %s batch %3d: ceiling %6.0f ns, worker %6.0f ns, ratio %.3f (%.3f to %.3f)"
                % (
                    sys.implementation.name,
                    sys.version.split()[0],
                    batch,
                    ceiling,
                    ours,
                    statistics.median(ratios),
                    min(ratios),
                    max(ratios),
                ),
                flush=True,
            )
        sides[0].sock.close()
        sides[0].process.wait()
        with sides[1].zygote:
            pass


main()
