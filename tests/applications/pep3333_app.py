"""An application for the clauses of PEP 3333: each path keeps, bends or breaks one of them.

The first part of the path names the function that answers.

What an answer cannot show (that close() was called, what an exception was) is noted under the key
that the query string names, and asked for later by /notes?KEY.
"""

import collections
import io
import json
import os
import sys
import tempfile
import time

TEXT = [("Content-Type", "text/plain")]
notes = collections.defaultdict(list)


def app(environ, start_response):
    name = (environ["PATH_INFO"].split("/") + [""])[1]
    if environ["RAW_URI"] == "*":
        name = "environ"
    return globals().get("act_" + name.replace("-", "_"), act_hello)(environ, start_response)


def note(environ, what):
    notes[environ["QUERY_STRING"]].append(what)


def act_notes(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(notes[environ["QUERY_STRING"]]).encode()]


def act_hello(environ, start_response):
    start_response("200 OK", TEXT)
    return [b"hello"]


class Pieces:
    """An iterable that notes how it ends. An exception among the pieces is raised in its place."""

    def __init__(self, environ, pieces, closing=None):
        self.environ, self.pieces, self.closing = environ, iter(pieces), closing

    def __iter__(self):
        return self

    def __next__(self):
        piece = next(self.pieces)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self):
        note(self.environ, "closed")
        if self.closing is not None:
            raise self.closing


# The environ.


def act_environ(environ, start_response):
    shown = {}
    for key, value in environ.items():
        kept = isinstance(value, (str, int, float, bool)) or value is None
        shown[key] = [type(value).__name__, value if kept else repr(value)]
    shown["itself"] = [type(environ).__name__, type(environ) is dict]
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(shown).encode()]


def act_reuse(environ, start_response):
    """Whether the environ of this request is the last one's."""
    found = environ.get("an.addition")
    environ["an.addition"] = "of an earlier request"
    del environ["wsgi.version"]
    start_response("200 OK", TEXT)
    return [repr(found).encode()]


# wsgi.input and wsgi.errors.


def act_read(environ, start_response):
    """The body by the call that X-Call writes down, and what is left afterwards."""
    body = environ["wsgi.input"]
    got = eval(environ["HTTP_X_CALL"], {"input": body})
    rest = [body.read(), body.read(), body.read(1), body.readline(), body.readlines()]
    start_response("200 OK", TEXT)
    return [repr((got, rest)).encode()]


def act_echo(environ, start_response):
    body = environ["wsgi.input"]
    start_response("200 OK", TEXT + [("X-Length", environ.get("CONTENT_LENGTH", "none"))])
    return iter(lambda: body.read(10000), b"")


def act_errors(environ, start_response):
    errors = environ["wsgi.errors"]
    errors.write("written, ")
    errors.write("and the rest of the line\n")
    errors.writelines(["one of several\n", "two of several\n"])
    errors.write("without an end, but flushed")
    errors.flush()
    print("printed to it", file=errors)
    return act_hello(environ, start_response)


# start_response.


def act_twice(environ, start_response):
    start_response("200 OK", TEXT)
    start_response("202 Accepted", TEXT)
    return [b"never"]


def act_replaced(environ, start_response):
    start_response("200 OK", TEXT + [("X-Of", "the first")])
    try:
        raise ValueError("something went wrong before anything was sent")
    except ValueError:
        start_response("503 Replaced", TEXT + [("X-Now", "the second")], sys.exc_info())
    return [b"an error page"]


def act_too_late(environ, start_response):
    start_response("200 OK", TEXT)

    def pieces():
        yield b"sent already"
        try:
            raise ValueError("something went wrong too late")
        except ValueError:
            try:
                start_response("500 Sorry", TEXT, sys.exc_info())
            except ValueError as error:
                note(environ, str(error))
                raise

    return Pieces(environ, pieces())


def act_never(environ, start_response):
    return [b"no start_response"]


def act_never_iterated(environ, start_response):
    yield b"no start_response"


def act_lazily(environ, start_response):
    start_response("201 Lazily", TEXT)
    yield b"started when it was first iterated"


def act_last_moment(environ, start_response):
    """Empty pieces do not begin the answer, so it may be replaced after them."""
    start_response("200 OK", TEXT)
    yield b""
    try:
        raise ValueError("late, but in time")
    except ValueError:
        start_response("503 In Time", TEXT, sys.exc_info())
    yield b"replaced"


def act_status(environ, start_response):
    start_response(environ["HTTP_X_STATUS"], TEXT)
    return [b"body"]


FIELDS = {
    "several": [
        ("X-B", "1"),
        ("Set-Cookie", "a=1"),
        ("x-a", "2"),
        ("Set-Cookie", "b=2"),
        ("X-B", "3"),
    ],
    "hop": [
        ("Connection", "keep-alive"),
        ("Keep-Alive", "timeout=5"),
        ("Transfer-Encoding", "chunked"),
        ("Upgrade", "h2c"),
        ("X-Kept", "yes"),
    ],
    "wish": [("Connection", "close")],
    "latin": [("X-Word", "caf\xe9")],
    "empty": [("X-Empty", "")],
    "own": [("Server", "mine"), ("Date", "Thu, 01 Jan 1970 00:00:00 GMT")],
    "beyond": [("X-Word", "\u20ac")],
    "name": [("X-W\xf6rd", "1")],
    "name-of-bytes": [("\xc3\x28", "1")],
    "space": [("X Word", "1")],
    "colon": [("X:Word", "1")],
    "nameless": [("", "1")],
    "split": [("X-Word", "a\r\nSet-Cookie: b=1")],
    "newline": [("X-Word", "a\nb")],
    "return": [("X-Word", "a\rb")],
    "nul": [("X-Word", "a\0b")],
    "number": [("X-Word", 5)],
    "bytes": [(b"X-Word", b"5")],
    "triple": [("X-Word", "5", "6")],
}


def act_fields(environ, start_response):
    start_response("200 OK", TEXT + FIELDS[environ["QUERY_STRING"]])
    return [b"body"]


def act_no_list(environ, start_response):
    start_response("200 OK", None)
    return [b"never"]


# write().


def act_write(environ, start_response):
    write = start_response("200 OK", TEXT)
    write(b"written, ")
    write(b"")
    write(b"twice, ")
    return [b"then ", b"returned"]


def act_write_only(environ, start_response):
    start_response("200 OK", TEXT)(b"all of it")
    return []


def seen(environ):
    """Waits for a file that the client makes once it has seen what was sent before."""
    until = time.monotonic() + 25  # less than --timeout
    while not os.path.exists(environ["QUERY_STRING"]) and time.monotonic() < until:
        time.sleep(0.01)
    return b"second" if time.monotonic() < until else b"too late"


def act_write_at_once(environ, start_response):
    write = start_response("200 OK", TEXT)
    write(b"first")
    write(seen(environ))
    return []


def act_yield_at_once(environ, start_response):
    start_response("200 OK", TEXT)
    yield b"first"
    yield seen(environ)


def act_write_text(environ, start_response):
    start_response("200 OK", TEXT)("text")
    return []


# What is returned.


def act_returned(environ, start_response):
    start_response("200 OK", TEXT)
    return {
        "list": lambda: [b"one", b"", b"two"],
        "tuple": lambda: (b"one", b"two"),
        "empty-list": lambda: [],
        "list-of-nothing": lambda: [b""],
        "empty-iterator": lambda: iter(()),
        "iterator-of-nothing": lambda: iter([b"", b""]),
        "generator": lambda: (piece for piece in (b"one", b"", b"two")),
        "set-of-one": lambda: {b"one"},
        "deque-of-one": lambda: collections.deque([b"one"]),
        "dict": lambda: {b"one": 1, b"two": 2},
        "bytearray": lambda: [bytearray(b"one"), b"two"],
        "text": lambda: "text",
        "list-of-text": lambda: [b"one", "two"],
        "iterator-of-text": lambda: iter(["one"]),
        "iterator-of-text-later": lambda: iter([b"one", "two"]),
        "bytes": lambda: b"one",
        "none": lambda: None,
        "number": lambda: 5,
    }[environ["QUERY_STRING"]]()


def act_large(environ, start_response):
    start_response("200 OK", TEXT)
    return [b"x" * 3000000]


# close(), by the name of what happens before.


def act_close_normal(environ, start_response):
    start_response("200 OK", TEXT)
    return Pieces(environ, [b"one", b"two"])


def act_close_early(environ, start_response):
    start_response("200 OK", TEXT)
    return Pieces(environ, [ValueError("before the first piece")])


def act_close_middle(environ, start_response):
    start_response("200 OK", TEXT)
    return Pieces(environ, [b"one", ValueError("in the middle")])


def act_close_text(environ, start_response):
    start_response("200 OK", TEXT)
    return Pieces(environ, ["text"])


def act_close_status(environ, start_response):
    start_response("9 lives", TEXT)
    return Pieces(environ, [b"one"])


def act_close_nothing(environ, start_response):
    start_response("204 No Content", [])
    return Pieces(environ, [])


def act_close_complete(environ, start_response):
    start_response("200 OK", TEXT + [("Content-Length", "3")])
    return Pieces(environ, [b"one", b"more than there is room for"])


def act_close_fails(environ, start_response):
    start_response("200 OK", TEXT)
    return Pieces(environ, [b"one"], ValueError("in close()"))


def act_close_list(environ, start_response):
    class List(list):
        def close(self):
            note(environ, "closed")

    start_response("200 OK", TEXT)
    return List([b"one"])


def act_close_file(environ, start_response):
    class File(io.FileIO):
        def close(self):
            if not self.closed:
                note(environ, "closed")
            super().close()

    start_response("200 OK", TEXT)
    return environ["wsgi.file_wrapper"](File(__file__, "r"))


def act_close_gone(environ, start_response):
    """Never ends by itself."""

    def pieces():
        while True:
            yield b"x" * 1000
            time.sleep(0.001)

    start_response("200 OK", TEXT)
    return Pieces(environ, pieces())


def act_write_gone(environ, start_response):
    write = start_response("200 OK", TEXT)
    try:
        while True:
            write(b"x" * 1000)
            time.sleep(0.001)
    except OSError as error:
        note(environ, type(error).__name__)
        raise


# Content-Length, true and false.


def act_length(environ, start_response):
    kind, told = environ["QUERY_STRING"].split(",", 1)
    start_response("200 OK", TEXT + [("Content-Length", told)])
    return {"list": list, "iterator": iter}[kind]([b"12345", b"67890"])


def act_length_of_file(environ, start_response):
    name, offset, told = environ["QUERY_STRING"].split(",")
    file = open(name, "rb")
    file.seek(int(offset))
    start_response("200 OK", TEXT + ([("Content-Length", told)] if told else []))
    return environ["wsgi.file_wrapper"](file)


# wsgi.file_wrapper over all kinds of things.


def act_wrapped(environ, start_response):
    data = b"0123456789" * 1000
    kind = environ["QUERY_STRING"]
    wrapper = environ["wsgi.file_wrapper"]
    start_response("200 OK", TEXT)
    if kind == "memory":
        return wrapper(io.BytesIO(data))
    if kind == "small-blocks":
        return wrapper(io.BytesIO(data), 7)
    if kind == "temporary":
        file = tempfile.NamedTemporaryFile()
        file.write(data)
        file.flush()
        file.seek(5)
        return wrapper(file)
    if kind == "pipe":
        reading, writing = os.pipe()
        with open(writing, "wb") as file:
            file.write(data)
        return wrapper(os.fdopen(reading, "rb"))
    if kind == "iterated":
        # Not returned as it is, so that an application may look at the pieces.
        return (piece.replace(b"0", b"-") for piece in wrapper(io.BytesIO(data)))
    raise KeyError(kind)


# Early hints.


def act_hints(environ, start_response):
    environ["wsgi.early_hints"]([("Link", "</a.css>; rel=preload; as=style"), ("Link", "</b.js>")])
    start_response("200 OK", TEXT)
    return [b"final"]


def act_hints_twice(environ, start_response):
    environ["wsgi.early_hints"]([("Link", "</a.css>")])
    environ["wsgi.early_hints"]([("Link", "</b.css>")])
    start_response("200 OK", TEXT)
    yield b"streamed, "
    environ["wsgi.early_hints"]([("Link", "</too-late.css>")])
    yield b"final"


def act_hints_bad(environ, start_response):
    environ["wsgi.early_hints"](FIELDS[environ["QUERY_STRING"]])
    start_response("200 OK", TEXT)
    return [b"final"]
