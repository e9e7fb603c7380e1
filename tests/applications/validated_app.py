"""An application inside wsgiref.validate, which raises at every breach of PEP 3333 by either side.

The last thing that is noticed on the server's side is an iterator that was never closed; it is
written to standard error when the iterator is collected.
"""

import gc
from wsgiref.validate import validator

TEXT = [("Content-Type", "text/plain")]


def inner(environ, start_response):
    body, act = environ["wsgi.input"], environ["PATH_INFO"].strip("/")
    if act == "write":
        write = start_response("200 OK", TEXT)
        write(b"written, ")
        write(b"twice, ")
        return [b"returned"]
    if act == "no-content":
        start_response("204 No Content", [])
        return []
    if act == "fail":
        raise ValueError("the application's own")
    if act == "collect":
        gc.collect()
    if act == "file":
        start_response("200 OK", TEXT)
        return environ["wsgi.file_wrapper"](open(__file__, "rb"))
    if act == "errors":
        environ["wsgi.errors"].write("a line of the application\n")
        environ["wsgi.errors"].writelines(["another line\n"])
        environ["wsgi.errors"].flush()
    got = {
        "read": lambda: [body.read(4), body.read(1000000)],
        "readline": lambda: [body.readline(), body.readline(2), body.read(1000000)],
        "readlines": lambda: body.readlines(1) + body.readlines(),
        "iterate": lambda: list(body),
    }.get(act, list)()
    start_response("200 OK", TEXT + [("X-Query", environ["QUERY_STRING"])])
    return stream(got) if "stream" in environ["QUERY_STRING"] else got


def stream(pieces):
    yield from pieces
    yield b""
    yield b"end"


app = validator(inner)
