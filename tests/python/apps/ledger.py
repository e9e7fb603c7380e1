"""Writes down which request begins before it does anything else, and echoes it: it is killed meanwhile, again and again."""

import mmap
import os

# A byte for each request. Memory, so that hardly any time passes between being called and having said so.
LEDGER = mmap.mmap(os.open(os.environ["LEDGER"], os.O_RDWR), 0)


def app(environ, start_response):
    LEDGER[int(environ["PATH_INFO"][1:])] += 1
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [("%s %s " % (environ["REQUEST_METHOD"], environ["PATH_INFO"])).encode() + body]
