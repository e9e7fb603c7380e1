"""Writes down which request begins before it does anything else, and echoes it: it is killed meanwhile, again and again."""

import mmap
import os
import time

# A byte for each request. Memory, so that hardly any time passes between being called and having said so.
LEDGER = mmap.mmap(os.open(os.environ["LEDGER"], os.O_RDWR), 0)


def app(environ, start_response):
    id = int(environ["PATH_INFO"][1:])
    LEDGER[id] += 1
    if id % 10 == 0:
        # Long enough for most kills to find a request that has begun.
        until = time.monotonic() + 0.001
        while time.monotonic() < until:
            pass
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [("%s %s " % (environ["REQUEST_METHOD"], environ["PATH_INFO"])).encode() + body]
