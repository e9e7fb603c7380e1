"""The native module beside the Python that it replaces: whatever an application does, the same
frames and the same words in the log come of it.

python tests/python/test_native.py     with any interpreter; skipped where the module cannot be had
NATIVE_SEED=7 NATIVE_REQUESTS=100000 python tests/python/test_native.py
"""

import os
import random
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from channel import Zygote, native_module, request_environ, request_frame  # noqa: E402

APP = r"""
import gc, hashlib, io, random, sys

class Text(str):
    def __add__(self, other):
        return str(self) + "!" + other

class Bytes(bytes):
    pass

class List(list):
    def __iter__(self):
        yield b"of a list"

class Tuple(tuple):
    pass

class Proxy:
    # Looks like a list to isinstance.
    __class__ = list

    def __init__(self, pieces):
        self.pieces = pieces

    def __iter__(self):
        return iter(self.pieces)

class Old:
    def __init__(self, pieces):
        self.pieces = pieces

    def __getitem__(self, index):
        return self.pieces[index]

class Again:
    # An iterator that goes on after its end.
    def __init__(self, pieces):
        self.pieces, self.asked = list(pieces), 0

    def __iter__(self):
        return self

    def __next__(self):
        self.asked += 1
        if self.asked == len(self.pieces) + 1:
            raise StopIteration
        return self.pieces[self.asked - 1] if self.asked <= len(self.pieces) else b"again"

class Closing:
    def __init__(self, pieces, close, environ):
        self.pieces, self.how, self.environ = pieces, close, environ

    def __iter__(self):
        return iter(self.pieces)

    def __getattr__(self, name):
        if name != "close" or self.how == "none":
            raise AttributeError(name)
        if self.how == "lookup":
            raise RuntimeError("close cannot be looked up")
        if self.how == "null":
            return None
        if self.how == "number":
            return 7
        return self.run

    def run(self):
        write(self.environ, "closed")
        if self.how == "raises":
            raise ValueError("close failed")
        if self.how == "partial":
            self.environ["wsgi.errors"].write("no line")
        if self.how == "hints":
            self.environ["wsgi.early_hints"]([("Link", "late")])

def write(environ, text):
    environ["wsgi.errors"].write(text + "\n")

def mostly(r, usual, *others):
    return usual if r.random() < 0.8 else r.choice(others)

def piece(r, size):
    return bytes(r.getrandbits(8) for _ in range(size))

def odd_piece(r):
    return r.choice(
        [
            b"",
            Bytes(b"subclass"),
            bytearray(b"array"),
            memoryview(b"view"),
            "text",
            None,
            7,
            b"x" * 65000,
            b"y" * 70000,
            Bytes(b""),
        ]
    )

def fields(r, pieces):
    found = [("Content-Type", "text/plain")]
    for _ in range(r.randrange(4)):
        name = mostly(
            r, "X-Some", "x", "", Text("X-Text"), "X-\u00e9", "X-\u0142", "X\nY", "X\rY", 7, b"X"
        )
        value = mostly(
            r,
            "value",
            "",
            "v" * 300,
            "v" * 3000,
            "v" * 9000,
            "v" * 66000,
            Text("value"),
            "caf\u00e9",
            "\u20ac",
            "\ud800",
            "\U0001f600",
            "a\nb",
            "a\rb",
            "\r\nSet: it",
            13,
            None,
            b"bytes",
        )
        found.append(
            mostly(
                r,
                (name, value),
                [name, value],
                (name,),
                (name, value, 1),
                Tuple((name, value)),
                "ab",
                None,
            )
        )
    if r.random() < 0.8:
        length = sum(len(p) for p in pieces if isinstance(p, bytes))
        value = mostly(
            r,
            str(length),
            str(length + 1),
            "0%d" % length,
            "+%d" % length,
            "\u00b2",
            "\u0663",
            "",
            "1e3",
            " %d" % length,
            Text(length),
            str(max(0, length - 1)),
            "9" * 30,
            "x\n",
            length,
        )
        name = mostly(
            r,
            "Content-Length",
            "content-length",
            "CONTENT-LENGTH",
            Text("Content-Length"),
            "Content-Len\u0261th",
        )
        found.insert(r.randrange(len(found) + 1), (name, value))
        if r.random() < 0.05:
            found.append(("Content-Length", "5"))
    return mostly(r, found, tuple(found), List(found), iter(found), None, dict([("a", "b")]), [])

def app(environ, start_response):
    r = random.Random(environ["QUERY_STRING"])
    # The order too.
    seen = (
        repr([(k, v) for k, v in environ.items() if "object at" not in repr(v)])
        + environ["wsgi.input"].read().hex()
    )
    if environ["PATH_INFO"] == "/counts":
        if environ["QUERY_STRING"] == "collect":
            gc.collect()
        objects = [
            None,
            True,
            False,
            b"",
            "",
            (),
            0,
            16,
            "HTTP_X_NAME",
            "REQUEST_METHOD",
            "rare",
            app,
            start_response,
            KeyError,
            ValueError,
            TypeError,
            OSError,
            LookupError,
        ]
        data = repr([sys.getrefcount(o) for o in objects]).encode()
        start_response(
            "200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(data)))]
        )
        return [data] if r.random() < 0.5 else iter([data])
    if r.random() < 0.1:
        for key in r.sample(sorted(environ), 3):
            if not key.startswith("wsgi.e"):
                del environ[key]
    pieces = [
        hashlib.sha256(seen.encode("utf-8", "surrogatepass")).hexdigest().encode()
        + piece(r, r.randrange(9))
    ]
    for _ in range(mostly(r, 0, 1, 2)):
        pieces.insert(r.randrange(2), mostly(r, piece(r, 5), odd_piece(r)))
    if r.random() < 0.1:
        pieces = [odd_piece(r) for _ in range(r.randrange(3))]
    status = mostly(
        r,
        "200 OK",
        "404 Not Found",
        "299",
        "200",
        "200 ",
        "2000 OK",
        "99 Low",
        "abc",
        "",
        "200 \u00e9",
        "200 \u0142",
        "200 a\nb",
        Text("200 OK"),
        b"200 OK",
        200,
        None,
        "204 No Content",
        "304 Not Modified",
        "200 " + "r" * 3000,
        "\u0662\u0660\u0660 OK",
    )
    headers = fields(r, pieces)

    def start():
        how = mostly(r, "plain", "three", "named", "twice", "error", "write", "exc", "many", "odd")
        if how == "plain":
            start_response(status, headers)
        elif how == "three":
            start_response(status, headers, None)
        elif how == "named":
            start_response(status=status, headers=headers)
        elif how == "twice":
            start_response(status, headers)
            start_response("200 OK", [])
        elif how == "many":
            start_response(status, headers, None, 1)
        elif how == "odd":
            start_response(status, headers, other=1)
        elif how == "error":
            start_response("200 OK", [("A", "b")])
            try:
                raise KeyError("replaced")
            except KeyError:
                start_response(status, headers, sys.exc_info())
        elif how == "write":
            start_response(status, headers)(mostly(r, b"written", b"", "text"))
        elif how == "exc":
            raise KeyError("at the start")
        if r.random() < 0.05 and type(headers) is list:
            headers.append(("Late", "field"))
        if r.random() < 0.05:
            environ["wsgi.early_hints"]([("Link", "hint")])

    late = r.random() < 0.2
    if not late and r.random() < 0.97:
        start()
    if r.random() < 0.05:
        environ["wsgi.errors"].write("part of a line")
    if r.random() < 0.03:
        raise OSError("in the application")
    kind = mostly(
        r,
        r.choice(["list", "generator", "closing"]),
        "tuple",
        "List",
        "Tuple",
        "Proxy",
        "Old",
        "Again",
        "file",
        "none",
        "number",
        "bytes",
        "self",
        "set",
    )

    def generate():
        if late:
            start()
        for number, p in enumerate(pieces):
            yield p
            if r.random() < 0.05:
                raise LookupError("in piece %d" % number)
            if r.random() < 0.05:
                environ["wsgi.errors"].write("between")
            if r.random() < 0.05:
                try:
                    raise KeyError("too late")
                except KeyError:
                    start_response("500 Oh", [], sys.exc_info())
            if r.random() < 0.03:
                start_response("500 Oh", [])(b"more")
        write(environ, "generated")

    if kind == "generator":
        return generate()
    if kind == "closing":
        how = mostly(r, "plain", "none", "lookup", "null", "number", "raises", "partial", "hints")
        return Closing(r.choice([pieces, generate()]), how, environ)
    if kind == "file":
        return environ["wsgi.file_wrapper"](
            io.BytesIO(b"".join(p for p in pieces if type(p) is bytes))
        )
    made = {
        "list": list,
        "tuple": tuple,
        "List": List,
        "Tuple": Tuple,
        "Proxy": Proxy,
        "Old": Old,
        "Again": Again,
        "none": lambda _: None,
        "number": lambda _: 7,
        "bytes": lambda _: b"ab",
        "self": lambda _: environ,
        "set": lambda _: {b"one"},
    }
    return made[kind](pieces)
"""

# Whatever follows the ASCII of most fields.
ODD = [
    "",
    "\u00e9",
    "caf\u00e9 " * 40,
    "\u20ac",
    "\ud800",
    "v" * 255,
    "v" * 256,
    "v" * 5000,
    "\x7f",
    "a" * 33,
]


def environ_of(r, number):
    """A request, usual for the most part."""
    more = {}
    for _ in range(r.randrange(8)):
        name = "".join(
            r.choice("ABCDEFGHIJ_") for _ in range(r.choice([1, 5, 12, 31, 32, 33, 60, 255]))
        )
        value = r.choice(ODD) if r.random() < 0.2 else "value %d" % r.randrange(9)
        more["HTTP_" + name if r.random() < 0.9 else name] = value
    if r.random() < 0.1:
        more["REMOTE_PORT"] = ""
    if r.random() < 0.1:
        more["wsgi.url_scheme"] = "https"
    path = "/" + (r.choice(ODD) if r.random() < 0.2 else "path")
    more.update({"uringd.deadline": float(number), "uringd.queue_seconds": r.random()})
    return request_environ(
        path, r.choice(["GET", "HEAD", "POST"]), str(number), "r-%d" % number, **more
    )


class Native(unittest.TestCase):
    def zygote(self, switch):
        environ, os.environ["URINGD_NATIVE"] = os.environ.get("URINGD_NATIVE"), switch
        try:
            zygote = Zygote("fuzz_app:app", chdir=self.directory.name)
        finally:
            del os.environ["URINGD_NATIVE"]
            if environ is not None:
                os.environ["URINGD_NATIVE"] = environ
        self.addCleanup(zygote.__exit__)
        return zygote

    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)
        with open(os.path.join(self.directory.name, "fuzz_app.py"), "w") as file:
            file.write(APP)
        self.native = self.zygote("1")
        if not self.native.first["ready"]["native"]:
            self.assertFalse(native_module() and sys.implementation.name == "cpython")
            self.skipTest("no native module for this interpreter")

    def ask(self, channel, frames, first):
        """The answers to the frames, sent together, as plain data."""
        channel.data.sendall(b"".join(frames))
        answers = []
        for id in range(first, first + len(frames)):
            answer = vars(channel.answer(id))
            del answer["times"]
            answers.append(answer)
        return answers

    def test_every_answer_and_every_line_of_the_log_is_the_same_as_without_it(self):
        seed = int(os.environ.get("NATIVE_SEED") or random.randrange(1 << 30))
        count = int(os.environ.get("NATIVE_REQUESTS") or 6000)
        print("NATIVE_SEED=%d" % seed, flush=True)
        python = self.zygote("0")
        self.assertEqual(python.first["ready"]["native"], False)
        sides = [zygote.worker()[1][0] for zygote in (self.native, python)]
        # Makes both quick, so that answers wait for each other.
        quick = [request_frame(id, request_environ("/counts")) for id in (1, 2)]
        for _ in range(300):
            for channel in sides:
                self.ask(channel, quick, 1)
        r, id = random.Random(seed), 1
        while id < count:
            frames = []
            for _ in range(r.choice([1, 1, 2, 3, 7])):
                environ = environ_of(r, seed + id + len(frames))
                body = b"body" * r.randrange(3) if environ["REQUEST_METHOD"] == "POST" else b""
                marked = r.random() < 0.1
                frames.append(request_frame(id + len(frames), environ, body, marked=marked))
            native, expected = [self.ask(channel, frames, id) for channel in sides]
            self.assertEqual(native, expected, "NATIVE_SEED=%d, request %d" % (seed, id))
            id += len(frames)
        native, expected = self.native.stderr(), python.stderr()
        self.assertEqual(native, expected, "NATIVE_SEED=%d" % seed)

    def test_it_keeps_nothing(self):
        pid, (channel,) = self.native.worker()

        def memory():
            with open("/proc/%d/statm" % pid) as info:
                return int(info.read().split()[1]) * 4096

        def counts():
            environ = request_environ("/counts", query="collect", HTTP_X_NAME="value")
            return [
                int(n)
                for n in self.ask(channel, [request_frame(9, environ)], 9)[0]["body"][1:-1].split(
                    b","
                )
            ]

        def rounds(count):
            for number in range(count):
                frames = []
                for id in range(1, 17):
                    # Of these numbers the application makes every kind of answer.
                    environ = environ_of(random.Random(number % 200), number % 200 * 16 + id)
                    frames.append(request_frame(id, environ))
                self.ask(channel, frames, 1)

        rounds(400)
        memory_before, counts_before = memory(), counts()
        rounds(400)
        for before, after in zip(counts_before, counts()):
            self.assertLess(abs(after - before), 100)
        self.assertLess(memory() - memory_before, 1 << 20)
        plain = [
            request_frame(id, request_environ("/counts", query=str(id))) for id in range(1, 17)
        ]
        for _ in range(3000):
            self.ask(channel, plain, 1)
        self.assertEqual(
            [n for n in map(abs, map(int.__sub__, counts(), counts_before)) if n > 99], []
        )
        self.assertLess(memory() - memory_before, 1 << 20)


if __name__ == "__main__":
    unittest.main()
