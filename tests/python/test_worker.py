"""What a worker does for an application and for uringd, asked of the real file as a subprocess.

Runs with any interpreter that the worker supports, and tests that interpreter:
python tests/python/test_worker.py
"""

import json
import os
import signal
import socket
import struct
import sys
import tempfile
import textwrap
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from channel import (  # noqa: E402
    BEGIN,
    END,
    EXTEND,
    FAILED,
    FILE,
    HINTS,
    PIECE,
    RESPONSE,
    Zygote,
    alive,
    eventually,
    kill,
    readable,
    request_environ,
    request_frame,
)
from test_native import Native  # noqa: E402, F401

APP = r"""
import gzip, io, json, multiprocessing, os, sys, tempfile, threading, time, traceback

TEXT = [("Content-Type", "text/plain")]
loaded_in = os.getpid()
routes = {}

def route(function):
    routes["/" + function.__name__] = function
    return function

def app(environ, start_response):
    return routes.get(environ["PATH_INFO"], hello)(environ, start_response)

class nested:
    class config:
        app = staticmethod(app)

def make(name, number=1):
    def made(environ, start_response):
        start_response("200 OK", TEXT)
        return [("%s %d" % (name, number)).encode()]
    return made

@route
def hello(environ, start_response):
    start_response("200 OK", TEXT + [("Content-Length", "5")])
    return [b"hello"]

@route
def show_environ(environ, start_response):
    start_response("200 OK", TEXT)
    return [json.dumps({k: repr(v) if not isinstance(v, (str, int, float, bool)) else v
                        for k, v in environ.items()}).encode()]

@route
def keep(environ, start_response):
    environ["left.over"] = "yes"
    return hello(environ, start_response)

@route
def teapot(environ, start_response):
    fields = [("B", "1"), ("a", "2"), ("B", "3"), ("E", ""), ("L", "caf\xe9")]
    start_response("418 I'm a Teapot (really)", fields)
    return [b"a", b"", b"b"]

@route
def empty(environ, start_response):
    start_response("204 No Content", [])
    return []

@route
def no_reason(environ, start_response):
    start_response("200", TEXT)
    return [b""]

@route
def echo(environ, start_response):
    body = environ["wsgi.input"].read()
    start_response("200 OK", TEXT + [("X-Type", type(environ["wsgi.input"]).__name__)])
    return [body]

@route
def read_all_ways(environ, start_response):
    f, got = environ["wsgi.input"], []
    got.append(f.read(3).decode())
    got.append(f.readline().decode())
    got.append(f.readline(2).decode())
    got.append([line.decode() for line in f.readlines(1)])
    got.append([line.decode() for line in f])
    got.append(f.read().decode())
    got.append(f.read(10).decode())
    f.seek(1)
    got.append(f.read(2).decode())
    got.append(f.tell())
    start_response("200 OK", TEXT)
    return [json.dumps(got).encode()]

@route
def digest(environ, start_response):
    import hashlib
    sum, f = hashlib.sha256(), environ["wsgi.input"]
    while True:
        data = f.read(65536)
        if not data:
            break
        sum.update(data)
    start_response("200 OK", TEXT)
    return [sum.hexdigest().encode()]

@route
def generator(environ, start_response):
    start_response("200 OK", TEXT)
    for piece in (b"one", b"", b"two", b"three"):
        yield piece
        time.sleep(0.05)

@route
def late_start(environ, start_response):
    yield b""
    start_response("200 OK", TEXT)
    yield b"late"

closed = []

@route
def endless(environ, start_response):
    start_response("200 OK", TEXT)
    try:
        while True:
            yield b"more"
    finally:
        closed[:] = [environ["PATH_INFO"]]

@route
def endless_write(environ, start_response):
    write = start_response("200 OK", TEXT)
    try:
        while True:
            write(b"more")
    finally:
        closed[:] = [environ["PATH_INFO"]]

@route
def show_closed(environ, start_response):
    start_response("200 OK", TEXT)
    return [b"closed" + "".join(closed).encode()]

@route
def known_length(environ, start_response):
    start_response("200 OK", TEXT + [("content-length", "5")])
    return iter([b"", b"known"])

@route
def slow_after_known_length(environ, start_response):
    start_response("200 OK", TEXT + [("Content-Length", "5")])
    def pieces():
        yield b"known"
        time.sleep(0.5)
    return pieces()

@route
def too_long(environ, start_response):
    start_response("200 OK", TEXT + [("Content-Length", "5")])
    return iter([b"abc", b"defgh", b"ijk"])

@route
def too_short(environ, start_response):
    start_response("200 OK", TEXT + [("Content-Length", "5")])
    return iter([b"abc"])

@route
def nothing(environ, start_response):
    start_response("200 OK", TEXT)
    return iter([])

@route
def written(environ, start_response):
    write = start_response("200 OK", TEXT)
    write(b"written ")
    write(b"twice ")
    return [b"and returned"]

closed = []

class Closing:
    def __init__(self, pieces, fail=False):
        self.pieces, self.fail = iter(pieces), fail
    def __iter__(self):
        return self
    def __next__(self):
        piece = next(self.pieces)
        if piece is None:
            raise RuntimeError("in the middle")
        return piece
    def close(self):
        closed.append(1)
        if self.fail:
            raise RuntimeError("while closing")

@route
def closing(environ, start_response):
    start_response("200 OK", TEXT)
    return Closing([b"x"])

@route
def closing_fails(environ, start_response):
    start_response("200 OK", TEXT)
    return Closing([b"x"], fail=True)

@route
def closing_middle(environ, start_response):
    start_response("200 OK", TEXT)
    return Closing([b"x", None])

@route
def closing_first(environ, start_response):
    start_response("200 OK", TEXT)
    return Closing([None])

@route
def closing_without_start(environ, start_response):
    return Closing([b"x"])

@route
def closed_count(environ, start_response):
    start_response("200 OK", TEXT)
    return [str(len(closed)).encode()]

@route
def raises(environ, start_response):
    raise KeyError("a mistake of the application")

@route
def raises_after_start(environ, start_response):
    start_response("200 OK", TEXT + [("X-Lost", "1")])
    raise KeyError("a mistake of the application")

@route
def unprintable(environ, start_response):
    class Bad(Exception):
        def __str__(self):
            raise ValueError
    raise Bad()

@route
def generator_exit(environ, start_response):
    raise GeneratorExit

@route
def interrupt(environ, start_response):
    raise KeyboardInterrupt

@route
def never_starts(environ, start_response):
    return [b"x"]

@route
def returns_none(environ, start_response):
    start_response("200 OK", TEXT)

@route
def returns_text(environ, start_response):
    start_response("200 OK", TEXT)
    return ["text"]

@route
def yields_text(environ, start_response):
    start_response("200 OK", TEXT)
    yield "text"

@route
def number_header(environ, start_response):
    start_response("200 OK", [("X-Number", 5)])
    return [b""]

@route
def bytes_header(environ, start_response):
    start_response("200 OK", [(b"X", "5")])
    return [b""]

@route
def generator_headers(environ, start_response):
    start_response("200 OK", (h for h in TEXT))
    return [b""]

@route
def triple_header(environ, start_response):
    start_response("200 OK", [("a", "b", "c")])
    return [b""]

@route
def split_header(environ, start_response):
    start_response("200 OK", [("X", "a\r\nSet-Cookie: stolen=1")])
    return [b""]

@route
def split_header_streamed(environ, start_response):
    start_response("200 OK", [("X", "a\nSet-Cookie: stolen=1")])
    yield b"x"

@route
def huge_headers(environ, start_response):
    start_response("200 OK", [("X-%d" % i, "x" * 1000) for i in range(70)])
    return [b""]

@route
def wide_header(environ, start_response):
    start_response("200 OK", [("X", "\u20ac")])
    return [b""]

@route
def bytes_status(environ, start_response):
    start_response(b"200 OK", TEXT)
    return [b""]

@route
def bad_status(environ, start_response):
    start_response("OK", TEXT)
    return [b""]

@route
def split_status(environ, start_response):
    start_response("200 OK\r\nX: y", TEXT)
    return [b""]

@route
def started_twice(environ, start_response):
    start_response("200 OK", TEXT)
    start_response("200 OK", TEXT)
    return [b""]

@route
def replaced(environ, start_response):
    start_response("200 OK", TEXT)
    try:
        raise ValueError("before anything was sent")
    except ValueError:
        start_response("503 Sorry", TEXT, sys.exc_info())
    return [b"sorry"]

@route
def replaced_too_late(environ, start_response):
    write = start_response("200 OK", TEXT)
    write(b"part")
    try:
        raise ValueError("too late")
    except ValueError:
        start_response("503 Sorry", TEXT, sys.exc_info())
    return [b"sorry"]

@route
def log(environ, start_response):
    e = environ["wsgi.errors"]
    e.write("one line\ntwo ")
    e.write("lines\n")
    e.writelines(["three\n", "fo"])
    e.flush()
    print("by print", file=e)
    e.write("without an end")
    return hello(environ, start_response)

@route
def noise(environ, start_response):
    print("noise on standard output")
    sys.stdout.flush()
    os.write(1, b"more noise\n" * 100)
    os.system("echo noise of a shell")
    sys.stderr.write("noise on standard error\n")
    return hello(environ, start_response)

def wrapped(environ, start_response, f, more=()):
    start_response("200 OK", TEXT + list(more))
    return environ["wsgi.file_wrapper"](f, 1000)

def file_of(data):
    f = tempfile.TemporaryFile()
    f.write(data)
    f.seek(0)
    return f

DATA = b"0123456789" * 1000

@route
def file(environ, start_response):
    return wrapped(environ, start_response, file_of(DATA))

@route
def file_at(environ, start_response):
    f = file_of(DATA)
    assert f.read(15) == DATA[:15]
    return wrapped(environ, start_response, f)

@route
def file_named(environ, start_response):
    f = tempfile.NamedTemporaryFile()
    f.write(DATA)
    f.seek(5)
    return wrapped(environ, start_response, f)

@route
def file_with_length(environ, start_response):
    return wrapped(environ, start_response, file_of(DATA), [("Content-Length", "7")])

@route
def file_gzip(environ, start_response):
    f = tempfile.TemporaryFile()
    with gzip.GzipFile(fileobj=f, mode="wb") as z:
        z.write(DATA)
    f.seek(0)
    return wrapped(environ, start_response, gzip.GzipFile(fileobj=f))

@route
def file_memory(environ, start_response):
    return wrapped(environ, start_response, io.BytesIO(DATA))

@route
def file_pipe(environ, start_response):
    r, w = os.pipe()
    os.write(w, DATA)
    os.close(w)
    return wrapped(environ, start_response, os.fdopen(r, "rb"))

@route
def file_iterated(environ, start_response):
    return list(wrapped(environ, start_response, file_of(DATA)))

@route
def file_fails(environ, start_response):
    class Raw:
        def __getattr__(self, name):
            raise AttributeError(name)
        read = staticmethod(lambda n: os.read(-1, n))
    return wrapped(environ, start_response, Raw())

@route
def unreadable(environ, start_response):
    start_response("200 OK", TEXT)
    return open("/proc/self/mem", "rb")  # reading at address 0 is an OSError

@route
def file_closed(environ, start_response):
    f = file_of(DATA)
    class Raw:
        def read(self, n):
            return f.read(n)
        def close(self):
            closed.append(1)
    return wrapped(environ, start_response, Raw())

@route
def hints(environ, start_response):
    environ["wsgi.early_hints"]([("Link", "</a.css>; rel=preload")])
    return hello(environ, start_response)

@route
def extend(environ, start_response):
    environ["uringd.extend_deadline"](2.5)
    t = threading.Thread(target=environ["uringd.extend_deadline"], args=(7,))
    t.start()
    t.join()
    return hello(environ, start_response)

@route
def gone(environ, start_response):
    disconnected, until = environ["uringd.client_disconnected"], time.monotonic() + 10
    before = disconnected()
    while not disconnected() and time.monotonic() < until:
        time.sleep(0.01)
    start_response("200 OK", TEXT)
    return [json.dumps([before, disconnected()]).encode()]

@route
def gone_now(environ, start_response):
    start_response("200 OK", TEXT)
    return [json.dumps(environ["uringd.client_disconnected"]()).encode()]

@route
def sleep(environ, start_response):
    time.sleep(float(environ["QUERY_STRING"]))
    return hello(environ, start_response)

@route
def spin(environ, start_response):
    while True:
        pass

@route
def exits(environ, start_response):
    sys.exit(3)

@route
def exits_at_once(environ, start_response):
    os._exit(9)

@route
def crashes(environ, start_response):
    os.kill(os.getpid(), 11)

@route
def forks_and_returns(environ, start_response):
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    start_response("200 OK", TEXT)
    return [b"child" if pid == 0 else b"parent"]

@route
def forks_and_raises(environ, start_response):
    pid = os.fork()
    if pid == 0:
        sys.exit(7)
    status = os.waitpid(pid, 0)[1]
    start_response("200 OK", TEXT)
    return [str(os.WEXITSTATUS(status)).encode()]

@route
def forks_a_daemon(environ, start_response):
    pid = os.fork()
    if pid == 0:
        time.sleep(30)
        os._exit(0)
    start_response("200 OK", TEXT)
    return [str(pid).encode()]

@route
def multiprocesses(environ, start_response):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    p = context.Process(target=queue.put, args=("from the child",))
    p.start()
    answer = queue.get()
    p.join()
    q = context.Process(target=time.sleep, args=(60,))
    q.start()
    q.terminate()
    q.join()
    start_response("200 OK", TEXT)
    return [("%s %d" % (answer, q.exitcode)).encode()]

@route
def open_descriptors(environ, start_response):
    import gc
    gc.collect()
    start_response("200 OK", TEXT)
    return [str(len(os.listdir("/proc/self/fd"))).encode()]

@route
def where(environ, start_response):
    start_response("200 OK", TEXT)
    return [json.dumps({"pid": os.getpid(), "loaded_in": loaded_in, "cwd": os.getcwd(),
                        "env": os.environ.get("FROM_URINGD"), "argv": sys.argv, "path": sys.path,
                        "thread": threading.current_thread().name}).encode()]

@route
def big(environ, start_response):
    start_response("200 OK", TEXT)
    return [b"x" * (8 << 20)]

@route
def big_piece(environ, start_response):
    start_response("200 OK", TEXT)
    yield b"x" * (8 << 20)

barrier = threading.Barrier(4)

@route
def together(environ, start_response):
    barrier.wait(10)
    return hello(environ, start_response)

def validated(environ, start_response):
    from wsgiref.validate import validator
    def inner(environ, start_response):
        data = environ["wsgi.input"].read(100)
        environ["wsgi.errors"].write("validated\n")
        write = start_response("200 OK", [("Content-Type", "text/plain")])
        return iter([b"valid ", data])
    return validator(inner)(environ, start_response)

class Instance:
    def __call__(self, environ, start_response):
        return hello(environ, start_response)

instance = Instance()

async def asgi(scope, receive, send):
    pass
"""


class WorkerTest(unittest.TestCase):
    """An application written to a directory, and zygotes that are told to run it."""

    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.TemporaryDirectory()
        cls.write("testapp.py", APP)

    @classmethod
    def tearDownClass(cls):
        cls.directory.cleanup()

    @classmethod
    def write(cls, name, text):
        path = os.path.join(cls.directory.name, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(textwrap.dedent(text))
        return path

    def zygote(self, app="testapp:app", **options):
        options.setdefault("chdir", self.directory.name)
        zygote = Zygote(app, **options)
        self.addCleanup(zygote.__exit__)
        return zygote

    def worker(self, app="testapp:app", **options):
        """(zygote, pid, the first channel) of a new worker."""
        zygote = self.zygote(app, **options)
        pid, channels = zygote.worker()
        return zygote, pid, channels[0]


    def begin(self, channel, *args, **keywords):
        """Sends a request, and waits until it runs."""
        id = channel.send(*args, marked=True, **keywords)
        begun = lambda: struct.unpack_from("<I", channel.page, 8)[0]  # noqa: E731
        self.assertTrue(eventually(lambda: begun() == id))
        return id


class Healthy(WorkerTest):
    """What a worker answers. All tests ask the same one: each also shows that it is still well."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared = Zygote("testapp:app", chdir=cls.directory.name)
        cls.pid, (cls.channel,) = cls.shared.worker()

    @classmethod
    def tearDownClass(cls):
        cls.shared.__exit__()
        super().tearDownClass()

    def ask(self, *args, **keywords):
        return self.channel.ask(*args, **keywords)

    def stderr_of(self, path, *args, **keywords):
        """(answer, what was written to standard error because of it)"""
        before = len(self.shared.stderr())
        answer = self.ask(path, *args, **keywords)
        self.ask(
            "/hello"
        )  # what an answer's request writes after it is written before the next answer
        return answer, self.shared.stderr()[before:]

    # Answers.

    def test_a_list_of_one_is_sent_whole_with_its_status_reason_and_headers(self):
        answer = self.ask("/hello")
        self.assertEqual(answer.kinds, [RESPONSE])
        self.assertEqual((answer.status, answer.reason, answer.body), (200, "OK", b"hello"))
        self.assertEqual(answer.headers, [("Content-Type", "text/plain"), ("Content-Length", "5")])

    def test_header_order_and_duplicates_and_the_reason_are_kept(self):
        answer = self.ask("/teapot")
        self.assertEqual((answer.status, answer.reason), (418, "I'm a Teapot (really)"))
        self.assertEqual(
            answer.headers, [("B", "1"), ("a", "2"), ("B", "3"), ("E", ""), ("L", "caf\xe9")]
        )
        self.assertEqual((answer.kinds, answer.body), ([RESPONSE], b"ab"))

    def test_an_answer_may_have_no_header_and_no_body(self):
        answer = self.ask("/empty")
        self.assertEqual((answer.status, answer.headers, answer.body), (204, [], b""))
        self.assertEqual(self.ask("/nothing").kinds, [RESPONSE])
        self.assertEqual((self.ask("/no_reason").status, self.ask("/no_reason").reason), (200, ""))

    def test_each_piece_of_a_generator_is_sent_before_the_next_is_made(self):
        answer = self.ask("/generator")
        self.assertEqual(answer.kinds, [BEGIN, PIECE, PIECE, PIECE, END])
        self.assertEqual((answer.body, answer.failed), (b"onetwothree", False))
        self.assertGreater(answer.times[2] - answer.times[1], 0.04)

    def test_a_generator_may_start_its_response_with_its_first_piece(self):
        answer = self.ask("/late_start")
        self.assertEqual((answer.kinds, answer.body), ([BEGIN, PIECE, END], b"late"))

    def test_an_iterator_that_fulfils_its_content_length_at_once_is_sent_whole(self):
        answer = self.ask("/known_length")
        self.assertEqual((answer.kinds, answer.body), ([RESPONSE], b"known"))

    def test_an_answer_complete_by_its_content_length_does_not_wait_for_the_iterator(self):
        began = time.monotonic()
        self.assertEqual(self.ask("/slow_after_known_length").body, b"known")
        self.assertLess(time.monotonic() - began, 0.4)

    def test_a_body_longer_than_its_content_length_is_cut_and_logged_once(self):
        answer, log = self.stderr_of("/too_long")
        self.assertEqual((answer.body, answer.failed), (b"abcde", False))
        self.assertEqual(log.count("longer than its Content-Length"), 1)

    def test_a_body_shorter_than_its_content_length_ends_as_failed(self):
        answer, log = self.stderr_of("/too_short")
        self.assertEqual((answer.body, answer.failed), (b"abc", True))
        self.assertIn("2 bytes shorter", log)
        self.assertFalse(self.ask("/too_short", method="HEAD").failed)

    def test_write_sends_at_once_and_the_returned_pieces_follow(self):
        answer = self.ask("/written")
        self.assertEqual(answer.kinds, [BEGIN, PIECE, PIECE, PIECE, END])
        self.assertEqual(answer.body, b"written twice and returned")

    def test_large_answers_arrive_whole_as_a_list_and_as_a_piece(self):
        self.assertEqual(len(self.ask("/big").body), 8 << 20)
        self.assertEqual(len(self.ask("/big_piece").body), 8 << 20)

    def test_answers_of_a_batch_come_in_order_each_its_own(self):
        paths = ["/hello", "/teapot", "/generator", "/raises", "/file", "/big", "/hello"]
        ids = [self.channel.send(path) for path in paths]
        statuses = [self.channel.answer(id).status for id in ids]
        self.assertEqual(statuses, [200, 418, 200, 500, 200, 200, 200])

    def test_an_answer_does_not_wait_for_the_slow_request_behind_it(self):
        environs = [request_environ("/hello"), request_environ("/sleep", query="1")]
        first, self.channel.next_id = self.channel.next_id, self.channel.next_id + 2
        frames = [request_frame(first + i, environ) for i, environ in enumerate(environs)]
        began = time.monotonic()
        self.channel.data.sendall(b"".join(frames))
        self.channel.answer(first)
        self.assertLess(time.monotonic() - began, 0.9)
        self.channel.answer(first + 1)

    def test_quick_answers_of_a_batch_leave_together_once_requests_are_known_to_be_quick(self):
        for _ in range(300):
            ids = [self.channel.send("/hello") for _ in range(8)]
            for id in ids:
                self.channel.answer(id)
        self.assertEqual(self.ask("/hello").body, b"hello")

    def test_a_marked_request_is_in_the_page_once_it_has_begun(self):
        begun = lambda: struct.unpack_from("<I", self.channel.page, 8)[0]  # noqa: E731
        for keywords in ({}, {"body": b"abc"}, {"body_file": b"abc"}):
            before = begun()
            self.ask("/echo", method="POST", **keywords)
            self.assertEqual(begun(), before, keywords)
            id = self.channel.send("/echo", method="POST", marked=True, **keywords)
            self.assertEqual(self.channel.answer(id).body, b"abc" if keywords else b"")
            self.assertEqual(begun(), id, keywords)
        id = self.begin(self.channel, "/sleep", query="0.5")
        self.assertFalse(readable(self.channel.data, 0))
        self.channel.answer(id)

    def test_a_frame_may_arrive_byte_by_byte(self):
        id, self.channel.next_id = self.channel.next_id, self.channel.next_id + 1
        frame = request_frame(
            id, request_environ("/echo", method="POST", CONTENT_LENGTH="3"), b"abc"
        )
        for at in range(len(frame)):
            self.channel.data.sendall(frame[at : at + 1])
            if at % 50 == 0:
                time.sleep(0.001)
        self.assertEqual(self.channel.answer(id).body, b"abc")

    # close()

    def closed(self):
        return int(self.ask("/closed_count").body)

    def test_close_is_called_after_the_last_piece_and_after_every_kind_of_failure(self):
        for path in (
            "/closing",
            "/closing_fails",
            "/closing_middle",
            "/closing_first",
            "/closing_without_start",
            "/file_closed",
        ):
            before = self.closed()
            self.ask(path)
            self.assertEqual(self.closed(), before + 1, path)

    def test_an_error_while_closing_is_logged_and_the_answer_stands(self):
        answer, log = self.stderr_of("/closing_fails")
        self.assertEqual((answer.status, answer.body, answer.failed), (200, b"x", False))
        self.assertIn("while closing", log)

    # Errors.

    def test_an_error_before_the_headers_is_a_500_with_one_traceback_of_the_application_only(self):
        answer, log = self.stderr_of("/raises", id="r-77")
        self.assertEqual((answer.status, answer.body), (500, b"Internal Server Error\n"))
        self.assertEqual(log.count("Traceback"), 1)
        self.assertIn("[r-77] the application failed in GET /raises\n", log)
        self.assertIn("a mistake of the application", log)
        self.assertNotIn("uringd_worker", log)
        answer = self.ask("/raises_after_start")
        self.assertEqual((answer.status, answer.header("X-Lost")), (500, []))

    def test_an_error_in_the_middle_ends_the_answer_as_failed(self):
        answer, log = self.stderr_of("/closing_middle")
        self.assertEqual((answer.status, answer.body, answer.failed), (200, b"x", True))
        self.assertEqual(log.count("Traceback"), 1)

    def test_an_error_whose_text_fails_and_a_generator_exit_are_500s(self):
        self.assertEqual(self.ask("/unprintable").status, 500)
        self.assertEqual(self.ask("/generator_exit").status, 500)

    def test_each_mistake_against_the_specification_is_a_500_that_says_what_is_wrong(self):
        for path, text in {
            "/never_starts": "without having called start_response",
            "/closing_without_start": "before it called start_response",
            "/returns_none": "returned no iterable of bytes",
            "/returns_text": "the body is a list with something other than bytes in it",
            "/yields_text": "a piece of the body is str, not bytes: 'text'",
            "/number_header": "the value of header ('X-Number', 5) is int, not str",
            "/bytes_header": "the name of header (b'X', '5') is bytes, not str",
            "/generator_headers": "the headers given to start_response are generator, not a list",
            "/triple_header": "is not a tuple of name and value",
            "/split_header": "has a line break",
            "/split_header_streamed": "has a line break",
            "/wide_header": "beyond latin-1",
            "/huge_headers": "bytes long, more than 65536",
            "/bytes_status": "the status given to start_response is bytes, not str",
            "/bad_status": "'OK' is not three digits",
            "/split_status": "has a control character",
            "/started_twice": "a second time without exc_info",
        }.items():
            answer, log = self.stderr_of(path)
            self.assertEqual(answer.status, 500, path)
            self.assertIn(text, log, path)
            self.assertEqual(answer.header("Set-Cookie"), [])

    def test_exc_info_replaces_an_answer_that_has_not_begun_and_is_raised_again_after(self):
        answer = self.ask("/replaced")
        self.assertEqual((answer.status, answer.reason, answer.body), (503, "Sorry", b"sorry"))
        answer, log = self.stderr_of("/replaced_too_late")
        self.assertEqual((answer.status, answer.body, answer.failed), (200, b"part", True))
        self.assertIn("too late", log)

    # The environ.

    def test_the_environ_has_the_keys_of_pep_3333_and_of_uringd_with_their_types(self):
        environ = json.loads(
            self.ask("/show_environ", query="a=1", id="r-5", HTTP_X="caf\xc3\xa9").body
        )
        for key, value in {
            "REQUEST_METHOD": "GET",
            "SCRIPT_NAME": "",
            "PATH_INFO": "/show_environ",
            "QUERY_STRING": "a=1",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "8000",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_X": "caf\xc3\xa9",
            "wsgi.version": "(1, 0)",
            "wsgi.url_scheme": "http",
            "wsgi.multithread": False,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
            "wsgi.input_terminated": True,
            "uringd.request_id": "r-5",
            "uringd.queue_seconds": 0.25,
        }.items():
            self.assertEqual(environ[key], value, key)
        self.assertIsInstance(environ["uringd.deadline"], float)
        for key in (
            "wsgi.input",
            "wsgi.errors",
            "wsgi.file_wrapper",
            "wsgi.early_hints",
            "uringd.client_disconnected",
            "uringd.extend_deadline",
        ):
            self.assertIn(key, environ)

    def test_what_one_request_puts_into_its_environ_is_not_seen_by_the_next(self):
        self.ask("/keep")
        self.assertNotIn("left.over", json.loads(self.ask("/show_environ").body))

    def test_an_application_wrapped_in_wsgiref_validate_is_served_without_complaint(self):
        zygote, _, channel = self.worker("testapp:validated")
        for method in ("GET", "POST"):
            answer = channel.ask("/", method=method, body=b"input")
            self.assertEqual((answer.status, answer.body), (200, b"valid input"), zygote.stderr())
        self.assertIn("[r-1] validated\n", zygote.stderr())
        self.assertNotIn("Traceback", zygote.stderr())

    # Bodies.

    def test_a_body_is_read_by_every_method_inline_and_from_a_file(self):
        body = b"first line\nsecond line\nthird\nfourth\nfifth"
        expected = [
            "fir",
            "st line\n",
            "se",
            ["cond line\n"],
            ["third\n", "fourth\n", "fifth"],
            "",
            "",
            "ir",
            3,
        ]
        self.assertEqual(
            json.loads(self.ask("/read_all_ways", method="POST", body=body).body), expected
        )
        self.assertEqual(
            json.loads(self.ask("/read_all_ways", method="POST", body_file=body).body), expected
        )

    def test_an_inline_body_larger_than_one_recv_arrives_whole(self):
        body = os.urandom(1 << 20)
        self.assertEqual(self.ask("/echo", method="POST", body=body).body, body)

    def test_a_large_body_comes_by_descriptor_and_is_read_to_its_length_only(self):
        import hashlib

        body = os.urandom(1 << 20) * 40
        digest = self.ask("/digest", method="POST", body_file=body).body
        self.assertEqual(digest.decode(), hashlib.sha256(body).hexdigest())
        answer = self.ask("/echo", method="POST", body_file=b"x" * 100)
        self.assertEqual((answer.body, answer.header("X-Type")), (b"x" * 100, ["BufferedReader"]))

    def test_a_body_file_longer_than_the_body_is_read_to_the_length_uringd_gave(self):
        import array

        with tempfile.TemporaryFile() as file:
            file.write(b"0123456789")
            file.flush()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
            self.channel.fds.sendmsg([b"f"], rights)
            id, self.channel.next_id = self.channel.next_id, self.channel.next_id + 1
            self.channel.data.sendall(request_frame(id, request_environ("/echo"), file_bytes=4))
            self.assertEqual(self.channel.answer(id).body, b"0123")

    def test_a_body_that_nobody_reads_is_closed_and_forgotten(self):
        before = int(self.ask("/open_descriptors").body)
        for _ in range(20):
            self.ask("/hello", method="POST", body_file=b"unread")
            self.ask("/raises", method="POST", body_file=b"unread")
        self.assertEqual(int(self.ask("/open_descriptors").body), before)

    # Files.

    def test_a_wrapped_regular_file_is_handed_over_from_where_it_stands(self):
        data = b"0123456789" * 1000
        for path, body in {
            "/file": data,
            "/file_at": data[15:],
            "/file_named": data[5:],
            "/file_with_length": data[:7],
        }.items():
            answer = self.ask(path)
            self.assertEqual((answer.kinds, answer.body), ([FILE], body), path)

    def test_what_is_wrapped_but_not_read_from_its_descriptor_is_iterated(self):
        data = b"0123456789" * 1000
        for path in ("/file_gzip", "/file_memory", "/file_pipe"):
            answer = self.ask(path)
            self.assertEqual(
                (answer.kinds[0], answer.kinds[-1], answer.body), (BEGIN, END, data), path
            )
        self.assertEqual(self.ask("/file_iterated").body, data)

    def test_an_error_of_the_operating_system_while_iterating_is_the_application_s(self):
        self.assertEqual(self.ask("/file_fails").status, 500)
        self.assertEqual(self.ask("/unreadable").status, 500)
        self.assertEqual(self.ask("/hello").status, 200)

    # What uringd offers.

    def test_early_hints_go_before_the_response(self):
        answer = self.ask("/hints")
        self.assertEqual(answer.kinds, [HINTS, RESPONSE])
        self.assertEqual(answer.hints, [[("Link", "</a.css>; rel=preload")]])

    def test_a_deadline_is_extended_from_any_thread(self):
        answer = self.ask("/extend")
        self.assertEqual(
            (answer.kinds, answer.extended), ([EXTEND, EXTEND, RESPONSE], [2500, 7000])
        )

    def test_a_request_sees_that_its_own_client_is_gone(self):
        id = self.channel.send("/gone")
        time.sleep(0.05)
        struct.pack_into("<I", self.channel.page, 0, id)
        self.assertEqual(json.loads(self.channel.answer(id).body), [False, True])
        self.assertEqual(json.loads(self.ask("/gone_now").body), False)

    # Output.

    def test_what_streams_to_a_client_that_has_left_is_closed_and_its_answer_broken_off(self):
        for path in ("/endless", "/endless_write"):
            id = self.channel.send(path)
            kind, _, _, _, _ = self.channel.frame()
            self.assertEqual(kind, BEGIN)
            struct.pack_into("<I", self.channel.page, 0, id)
            while kind != END:
                kind, of, flags, _, _ = self.channel.frame()
                self.assertEqual(of, id)
            self.assertEqual(flags, 1)
            answer, stderr = self.stderr_of("/show_closed")
            self.assertEqual((answer.body, stderr), (b"closed" + path.encode(), ""))

    def test_wsgi_errors_writes_whole_lines_with_the_request_id(self):
        _, log = self.stderr_of("/log", id="r-9")
        lines = ["one line", "two lines", "three", "fo", "by print", "without an end"]
        self.assertEqual(log, "".join("[r-9] %s\n" % line for line in lines))

    def test_noise_on_standard_output_does_not_touch_the_channel(self):
        answer = self.ask("/noise")
        self.assertEqual((answer.kinds, answer.body), ([RESPONSE], b"hello"))
        log = self.shared.stderr()
        for text in (
            "noise on standard output",
            "more noise",
            "noise of a shell",
            "noise on standard error",
        ):
            self.assertIn(text, log)

    # Processes of the application's own.

    def test_a_forked_child_that_returns_does_not_answer(self):
        answer, log = self.stderr_of("/forks_and_returns")
        self.assertEqual((answer.status, answer.body), (200, b"parent"))
        self.assertIn("a child forked by the application returned", log)

    def test_a_forked_child_that_exits_keeps_its_status(self):
        self.assertEqual(self.ask("/forks_and_raises").body, b"7")
        self.assertEqual(self.ask("/hello").status, 200)

    def test_multiprocessing_works_and_its_children_can_be_terminated(self):
        self.assertEqual(self.ask("/multiprocesses").body, b"from the child -15")

    def test_ten_thousand_requests_leave_no_descriptor_behind(self):
        before = int(self.ask("/open_descriptors").body)
        for _ in range(1000):
            ids = [
                self.channel.send(path)
                for path in (
                    "/hello",
                    "/file",
                    "/raises",
                    "/known_length",
                    "/written",
                    "/hello",
                    "/hello",
                    "/file_memory",
                    "/hello",
                )
            ]
            ids.append(self.channel.send("/echo", body_file=b"by file"))
            for id in ids:
                self.channel.answer(id)
        self.assertEqual(int(self.ask("/open_descriptors").body), before)


class Loading(WorkerTest):
    """How the application is found, and what the operator reads when it is not."""

    def failure(self, app, preload=True, **options):
        zygote = self.zygote(app, preload=preload, **options)
        if "failed" in zygote.first:
            return zygote.first["failed"]
        pid, (channel,) = zygote.fork()
        kind, _, _, _, payload = channel.frame()
        self.assertEqual(kind, FAILED)
        self.assertEqual(zygote.exit_status(pid), 4)
        return payload.decode()

    def body(self, app, path="/", **options):
        return self.worker(app, **options)[2].ask(path).body

    def test_an_application_is_named_in_every_form(self):
        for app, body in {
            "testapp:app": b"hello",
            "testapp:nested.config.app": b"hello",
            "testapp:instance": b"hello",
            "testapp": b"hello",
            "testapp:make('a')": b"a 1",
            "testapp:make('b', number=2)": b"b 2",
        }.items():
            self.assertEqual(self.body(app), body, app)

    def test_application_is_the_first_default_name(self):
        self.write(
            "both.py", "import testapp\napplication = testapp.make('application')\napp = 5\n"
        )
        self.assertEqual(self.body("both"), b"application 1")

    def test_a_module_in_a_package_is_found(self):
        self.write("package/inner/web.py", "from testapp import app\n")
        self.assertEqual(self.body("package.inner.web:app"), b"hello")

    def test_directory_path_and_environment_are_set_before_the_import(self):
        self.write("elsewhere/aside.py", "value = 1\n")
        self.write(
            "needs.py",
            "import aside, os\nassert os.environ['FROM_URINGD'] == 'x'\nfrom testapp import app\n",
        )
        elsewhere = os.path.join(self.directory.name, "elsewhere")
        body = self.body("needs:app", "/where", pythonpath=[elsewhere], env={"FROM_URINGD": "x"})
        where = json.loads(body)
        here = os.path.realpath(self.directory.name)
        self.assertEqual((where["cwd"], where["env"], where["argv"]), (here, "x", ["uringd"]))
        self.assertEqual(where["path"][:2], [here, elsewhere])
        self.assertNotIn("", where["path"])

    def test_a_missing_module_names_the_directory_that_was_searched(self):
        text = self.failure("absent:app")
        self.assertIn("ModuleNotFoundError: No module named 'absent'\n", text)
        self.assertIn(
            "hint: there is no absent.py and no package absent in %s"
            % os.path.realpath(self.directory.name),
            text,
        )
        self.assertNotIn("importlib", text)
        self.assertNotIn("uringd_worker", text)

    def test_a_module_in_a_directory_below_is_pointed_at(self):
        self.write("project/below.py", "app = None\n")
        self.assertIn("try --chdir project", self.failure("below:app"))

    def test_a_missing_package_names_the_interpreter_and_a_virtual_environment_beside(self):
        self.write("flasky.py", "import no_such_package\n")
        text = self.failure("flasky:app", preload=False)
        self.assertIn('flasky.py", line 1, in <module>', text)
        self.assertIn("'no_such_package' is not installed for %s" % sys.executable, text)
        self.write("withvenv/flasky.py", "import no_such_package\n")
        self.write("withvenv/venv/bin/python", "")
        text = self.failure("flasky:app", chdir=os.path.join(self.directory.name, "withvenv"))
        self.assertIn("try --python venv/bin/python", text)

    def test_a_syntax_error_is_shown_with_its_line_and_the_interpreter(self):
        self.write("broken.py", "def f(:\n    pass\n")
        text = self.failure("broken:app")
        self.assertIn("def f(:", text)
        self.assertIn("SyntaxError", text)
        self.assertIn("hint: the interpreter is ", text)

    def test_an_error_while_importing_shows_the_application_frames_only(self):
        self.write("raising.py", "def f():\n    raise ValueError('no setting')\nf()\n")
        text = self.failure("raising:app", preload=False)
        self.assertEqual(text.count("  File "), 2)
        self.assertIn("ValueError: no setting\n", text)
        self.assertIn("hint: the application raised this while it was loaded", text)

    def test_an_import_error_inside_the_module_names_the_interpreter(self):
        self.write("halfway.py", "from os import no_such_name\n")
        text = self.failure("halfway:app")
        self.assertIn("ImportError: cannot import name", text)
        self.assertIn("hint: the interpreter is", text)

    def test_a_module_that_exits_is_told_apart(self):
        self.write("exiting.py", "import sys\nsys.exit(1)\n")
        self.assertIn("the module exits when it is imported", self.failure("exiting:app"))

    def test_a_missing_attribute_lists_those_that_there_are(self):
        text = self.failure("testapp:wsgi")
        self.assertIn("testapp has no attribute 'wsgi'\nhint: testapp has: app", text)
        self.assertIn("has no attribute 'nope'", self.failure("testapp:nested.nope"))

    def test_what_is_no_application_is_said_so(self):
        self.assertIn("testapp:TEXT is list, not an application", self.failure("testapp:TEXT"))
        self.assertIn("have it called: testapp:route()", self.failure("testapp:route"))
        self.assertIn("is an ASGI application", self.failure("testapp:asgi"))
        self.assertIn("leave out the parentheses", self.failure("testapp:TEXT()"))

    def test_a_target_that_is_a_file_or_an_expression_is_refused_with_an_example(self):
        self.assertIn(
            "hint: name the module, not the file: src.testapp:app",
            self.failure("src/testapp.py:app"),
        )
        self.assertIn("literal arguments", self.failure("testapp:make(open('x'))"))
        self.assertIn("neither an attribute nor a call", self.failure("testapp:1+1"))

    def test_a_very_long_traceback_still_fits_a_record(self):
        self.write("long.py", "raise ValueError('\\u20ac' * 200000)\n")
        self.assertIn("hint: ", self.failure("long:app"))
        self.assertIn("hint: ", self.failure("long:app", preload=False))

    def test_the_file_can_also_be_run_as_a_script(self):
        zygote, _, channel = self.worker(boot="file")
        self.assertEqual(channel.ask("/hello").body, b"hello")
        path = json.loads(channel.ask("/where").body)["path"]
        self.assertFalse(
            [entry for entry in path if os.path.exists(os.path.join(entry, "uringd_worker.py"))]
        )


class Processes(WorkerTest):
    """Zygote and workers: forking, threads, signals, ends."""

    def test_the_zygote_says_what_it_is(self):
        zygote = self.zygote()
        ready = zygote.first["ready"]
        self.assertEqual(ready["python"], ".".join(map(str, sys.version_info[:3])))
        self.assertEqual((ready["implementation"], ready["protocol"]), (sys.implementation.name, 1))
        self.assertIsNone(ready["interface"])
        self.assertEqual(ready["pid"], zygote.process.pid)

    def test_with_preload_the_application_is_loaded_once_and_workers_share_it(self):
        zygote = self.zygote(preload=True)
        self.assertEqual(zygote.first["ready"]["interface"], "wsgi")
        seen = [json.loads(zygote.worker()[1][0].ask("/where").body) for _ in range(3)]
        self.assertEqual({where["loaded_in"] for where in seen}, {zygote.process.pid})
        self.assertEqual(len({where["pid"] for where in seen}), 3)

    def test_without_preload_each_worker_loads_it(self):
        zygote = self.zygote()
        for _ in range(2):
            pid, (channel,) = zygote.worker()
            self.assertEqual(json.loads(channel.ask("/where").body)["loaded_in"], pid)

    def test_a_preloaded_application_may_take_signals_and_standard_output(self):
        self.write(
            "taking.py",
            """\
            import signal, sys
            for signum in range(1, signal.NSIG):
                try:
                    signal.signal(signum, signal.SIG_IGN)
                except (OSError, ValueError):
                    pass
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGTERM])
            sys.stdout.close()
            from testapp import app
        """,
        )
        zygote = self.zygote("taking:app", preload=True)
        for _ in range(2):
            pid, (channel,) = zygote.worker()
            self.assertEqual(channel.ask("/hello").body, b"hello")
            self.assertEqual(zygote.terminate(pid), 0)

    def test_an_import_that_hangs_ends_with_the_control_socket(self):
        self.write("hanging.py", "import time\ntime.sleep(60)\n")
        zygote = self.zygote("hanging:app", preload=True, start=False)
        zygote.tell({"start": zygote.options})
        # Until it imports; before that it would end anyway.
        time.sleep(0.5)
        zygote.control.close()
        zygote.process.wait(10)

    def test_preload_of_an_application_that_starts_threads_falls_back_with_a_warning(self):
        self.write(
            "threaded.py",
            """\
            import threading
            threading.Thread(target=threading.Event().wait, name="poller", daemon=True).start()
            from testapp import app
        """,
        )
        zygote = self.zygote("threaded:app", preload=True)
        self.assertIn("started 1 more thread (poller)", zygote.first["ready"]["warning"])
        pid, (channel,) = zygote.worker()
        self.assertEqual(json.loads(channel.ask("/where").body)["loaded_in"], pid)

    def test_four_threads_serve_four_channels_at_the_same_time(self):
        zygote = self.zygote(threads=4)
        _, channels = zygote.worker()
        ids = [channel.send("/together") for channel in channels]
        for channel, id in zip(channels, ids):
            self.assertEqual(channel.answer(id).body, b"hello")
        names = {json.loads(channel.ask("/where").body)["thread"] for channel in channels}
        self.assertEqual(len(names), 4)
        environ = json.loads(channels[0].ask("/show_environ").body)
        self.assertIs(environ["wsgi.multithread"], True)

    def test_a_worker_with_threads_ends_by_sigterm_after_their_present_requests(self):
        zygote = self.zygote(threads=4)
        pid, channels = zygote.worker()
        id = channels[2].send("/sleep", query="0.5")
        time.sleep(0.2)
        kill(pid, signal.SIGTERM)
        self.assertEqual(channels[2].answer(id).body, b"hello")
        self.assertEqual(zygote.exit_status(pid), 0)

    def test_sigterm_ends_an_idle_worker(self):
        zygote, pid, channel = self.worker()
        self.assertEqual(zygote.terminate(pid), 0)

    def test_sigterm_lets_the_present_request_finish_and_leaves_those_behind_it(self):
        zygote, pid, channel = self.worker()
        id = channel.send("/sleep", query="0.5")
        channel.send("/hello")
        time.sleep(0.2)
        kill(pid, signal.SIGTERM)
        self.assertEqual(channel.answer(id).body, b"hello")
        self.assertEqual(zygote.exit_status(pid), 0)
        self.assertRaises((EOFError, ConnectionResetError), channel.frame)

    def test_the_end_flag_of_the_page_ends_a_worker_after_its_present_request(self):
        zygote, pid, channel = self.worker()
        id = channel.send("/sleep", query="0.3")
        time.sleep(0.1)
        struct.pack_into("<I", channel.page, 4, 1)
        self.assertEqual(channel.answer(id).body, b"hello")
        self.assertEqual(zygote.exit_status(pid), 0)

    def test_the_end_of_the_channel_ends_the_worker_after_what_it_was_given(self):
        zygote, pid, channel = self.worker()
        ids = [channel.send("/hello") for _ in range(3)]
        channel.data.shutdown(socket.SHUT_WR)
        for id in ids:
            self.assertEqual(channel.answer(id).body, b"hello")
        self.assertEqual(zygote.exit_status(pid), 0)

    def test_ctrl_c_and_a_hang_up_do_not_end_a_worker_nor_the_zygote(self):
        zygote, pid, channel = self.worker()
        for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            kill(pid, signum)
            kill(zygote.process.pid, signum)
        kill(zygote.process.pid, signal.SIGTERM)
        time.sleep(0.1)
        self.assertEqual(channel.ask("/hello").body, b"hello")
        self.assertEqual(zygote.worker()[1][0].ask("/hello").body, b"hello")

    def test_sigusr1_writes_the_traceback_of_every_thread_while_a_request_runs(self):
        zygote, pid, channel = self.worker()
        id = channel.send("/sleep", query="0.5")
        time.sleep(0.2)
        kill(pid, signal.SIGUSR1)
        self.assertEqual(channel.answer(id).status, 200)
        self.assertIn("in sleep", zygote.stderr())

    @unittest.skipUnless(sys.implementation.name == "cpython", "ctypes of CPython holds the lock")
    def test_sigusr1_works_while_c_code_never_gives_up_the_interpreter(self):
        self.write(
            "stuck.py",
            """\
            import ctypes
            def app(environ, start_response):
                ctypes.PyDLL(None).usleep(1500000)
                start_response("200 OK", [])
                return [b""]
        """,
        )
        zygote, pid, channel = self.worker("stuck:app")
        id = channel.send("/")
        time.sleep(0.3)
        kill(pid, signal.SIGUSR1)
        self.assertTrue(eventually(lambda: "stuck.py" in zygote.stderr(), 1.0))
        channel.answer(id)

    def test_an_exit_in_a_request_is_a_500_and_then_the_end(self):
        zygote, pid, channel = self.worker()
        self.assertEqual(channel.ask("/exits").status, 500)
        self.assertEqual(zygote.exit_status(pid), 3)
        zygote, pid, channel = self.worker()
        self.assertEqual(channel.ask("/interrupt").status, 500)
        self.assertEqual(zygote.exit_status(pid), 1)

    def test_an_exit_without_ceremony_and_a_crash_are_reported_with_their_status(self):
        zygote = self.zygote()
        for path, status in (("/exits_at_once", 9), ("/crashes", -signal.SIGSEGV)):
            pid, (channel,) = zygote.worker()
            channel.send(path)
            self.assertRaises((EOFError, ConnectionResetError), channel.frame)
            self.assertEqual(zygote.exit_status(pid), status)

    def test_garbage_on_the_channel_ends_the_worker(self):
        good = request_frame(1, request_environ("/hello"))
        for garbage in (
            b"GET / HTTP/1.1\r\n\r\n" * 100,
            struct.pack("<IIII", 8, 1, 1, 4) + b"\xff" * 8,
            struct.pack("<IIII", 4, 1, 1, 400) + good,
            good[:8] + b"\x07" + good[9:],
            good[:9] + b"\x01" + good[10:],
        ):
            zygote, pid, channel = self.worker()
            channel.data.sendall(garbage)
            channel.data.shutdown(socket.SHUT_WR)
            self.assertRaises((EOFError, ConnectionResetError), channel.frame)
            self.assertIn(zygote.exit_status(pid), (0, 70), garbage[:16])

    def test_a_frame_with_a_wrong_kind_ends_the_worker_with_a_message(self):
        zygote, pid, channel = self.worker()
        good = request_frame(1, request_environ("/hello"))
        channel.data.sendall(good[:8] + b"\x07" + good[9:])
        self.assertRaises((EOFError, ConnectionResetError), channel.frame)
        self.assertEqual(zygote.exit_status(pid), 70)
        self.assertIn("the channel failed", zygote.stderr())

    def test_the_page_says_how_many_answers_of_a_batch_are_held_back(self):
        # Whether this machine is quick or not, the worker takes itself for it.
        self.write("quick.py", "import __main__\n__main__.QUICK_BATCHES = 0\nfrom testapp import app\n")
        zygote, pid, channel = self.worker("quick:app")
        environs = [request_environ("/hello"), request_environ("/hello")]
        environs.append(request_environ("/sleep", query="0.5"))
        frames = [request_frame(id, environ) for id, environ in enumerate(environs, 1)]
        channel.data.sendall(b"".join(frames))
        self.assertTrue(eventually(lambda: channel.page[12] == 2))
        self.assertFalse(readable(channel.data, 0))
        for id in (1, 2, 3):
            channel.answer(id)
        self.assertEqual(channel.page[12], 0)

    def test_a_worker_whose_descriptors_were_closed_ends(self):
        self.write(
            "closing.py",
            """\
            import os
            from testapp import app as inner
            def app(environ, start_response):
                os.closerange(3, 256)
                return inner(environ, start_response)
        """,
        )
        zygote, pid, channel = self.worker("closing:app")
        channel.send("/hello")
        self.assertRaises((EOFError, ConnectionResetError), channel.frame)
        self.assertIsNotNone(zygote.exit_status(pid))

    def test_a_daemon_forked_by_the_application_does_not_hold_the_channel_open(self):
        zygote, pid, channel = self.worker()
        child = int(channel.ask("/forks_a_daemon").body)
        self.addCleanup(lambda: alive(child) and kill(child))
        kill(pid, signal.SIGKILL)
        self.assertEqual(zygote.exit_status(pid), -signal.SIGKILL)
        self.assertTrue(readable(channel.data, 2))
        self.assertRaises((EOFError, ConnectionResetError), channel.frame)

    def test_a_fork_with_a_wrong_number_of_descriptors_is_an_answer_not_an_end(self):
        zygote = self.zygote()
        zygote.tell({"fork": 99})
        self.assertIn("0 descriptors", zygote.hear()["error"])
        self.assertEqual(zygote.worker()[1][0].ask("/hello").body, b"hello")

    def test_forking_many_workers_leaves_no_descriptor_in_the_zygote(self):
        zygote = self.zygote()

        def descriptors():
            return len(os.listdir("/proc/%d/fd" % zygote.process.pid))

        zygote.worker()
        before = descriptors()
        for _ in range(10):
            pid, _ = zygote.worker()
            zygote.terminate(pid)
        self.assertEqual(descriptors(), before)

    def test_the_end_of_the_control_socket_ends_workers_and_zygote_and_lets_requests_finish(self):
        zygote = self.zygote()
        pids = [zygote.worker()[0] for _ in range(2)]
        pid, (channel,) = zygote.worker()
        id = channel.send("/sleep", query="0.5")
        time.sleep(0.2)
        zygote.control.shutdown(socket.SHUT_WR)
        self.assertEqual(channel.answer(id).body, b"hello")
        for pid in pids + [pid]:
            self.assertEqual(zygote.exit_status(pid), 0)
        self.assertEqual(zygote.process.wait(5), 0)

    def test_a_worker_that_does_not_end_is_killed_after_the_graceful_time(self):
        zygote, pid, channel = self.worker(graceful_timeout=0.3)
        channel.send("/sleep", query="30")
        time.sleep(0.2)
        zygote.control.shutdown(socket.SHUT_WR)
        self.assertEqual(zygote.exit_status(pid), -signal.SIGKILL)
        self.assertEqual(zygote.process.wait(5), 0)

    def test_a_worker_ends_with_its_zygote(self):
        try:
            import ctypes  # noqa: F401
        except ImportError:
            self.skipTest("PR_SET_PDEATHSIG needs ctypes")
        zygote, pid, channel = self.worker()
        id = self.begin(channel, "/sleep", query="2")
        zygote.process.kill()
        self.assertEqual(channel.answer(id).body, b"hello")
        self.assertTrue(eventually(lambda: not alive(pid), 5))

    def test_a_worker_ends_with_its_zygote_and_uringd_whatever_it_is_at(self):
        try:
            import ctypes  # noqa: F401
        except ImportError:
            self.skipTest("PR_SET_PDEATHSIG needs ctypes")
        for path in ("/sleep", "/spin"):
            zygote, pid, channel = self.worker()
            self.begin(channel, path, query="60")
            zygote.process.kill()
            time.sleep(0.2)
            self.assertTrue(alive(pid))
            channel.close()
            self.assertTrue(eventually(lambda: not alive(pid), 5))

    def test_a_control_socket_that_ends_before_start_ends_the_zygote(self):
        zygote = Zygote("testapp:app", start=False)
        zygote.control.close()
        self.assertEqual(zygote.process.wait(10), 0)


class Hooks(WorkerTest):
    def test_the_hooks_of_a_gunicorn_conf_are_called_with_its_arguments_in_its_order(self):
        config = self.write(
            "gunicorn.conf.py",
            """\
            import os
            workers = 2
            def say(*what):
                os.write(2, (" ".join(map(str, what)) + "\\n").encode())
            def on_starting(server): say("on_starting", server.cfg.workers)
            def when_ready(server): say("when_ready")
            def pre_fork(server, worker): say("pre_fork", worker.age)
            def post_fork(server, worker):
                server.log.info("post_fork %s", worker.pid == os.getpid())
            def post_worker_init(worker): say("post_worker_init")
            def pre_request(worker, req): say("pre_request", req.method, req.path)
            def post_request(worker, req, environ, resp):
                say("post_request", resp.status, environ["PATH_INFO"])
            def worker_exit(server, worker): say("worker_exit")
            def child_exit(server, worker): say("child_exit", worker.pid > 0)
            def on_exit(server): say("on_exit")
        """,
        )
        zygote, pid, channel = self.worker(config=config)
        self.assertEqual(channel.ask("/hello").body, b"hello")
        self.assertEqual(channel.ask("/written").body, b"written twice and returned")
        self.assertEqual(channel.ask("/raises").status, 500)
        self.assertEqual(zygote.terminate(pid), 0)
        zygote.control.close()
        self.assertEqual(zygote.process.wait(5), 0)
        lines = [line for line in zygote.stderr().splitlines() if not line.startswith("[r-")]
        self.assertEqual(
            [line.split("[INFO] ")[-1] for line in lines],
            [
                "on_starting 2",
                "when_ready",
                "pre_fork 1",
                "post_fork True",
                "post_worker_init",
                "pre_request GET /hello",
                "post_request 200 OK /hello",
                "pre_request GET /written",
                "post_request 200 OK /written",
                "pre_request GET /raises",
                "post_request 500 Internal Server Error /raises",
                "worker_exit",
                "child_exit True",
                "on_exit",
            ],
        )

    def test_an_older_post_request_takes_two_arguments(self):
        config = self.write(
            "older.conf.py",
            """\
            def post_request(worker, req): worker.log.info("done %s", req.path)
        """,
        )
        zygote, pid, channel = self.worker(config=config)
        channel.ask("/hello")
        self.assertTrue(eventually(lambda: "done /hello" in zygote.stderr()))

    def test_worker_abort_is_called_on_sigabrt(self):
        config = self.write(
            "abort.conf.py",
            """\
            def worker_abort(worker): worker.log.info("aborted %s", worker.pid)
        """,
        )
        zygote, pid, channel = self.worker(config=config)
        channel.send("/sleep", query="30")
        time.sleep(0.2)
        kill(pid, signal.SIGABRT)
        self.assertEqual(zygote.exit_status(pid), 1)
        self.assertIn("aborted %d" % pid, zygote.stderr())

    def test_worker_abort_lets_the_other_threads_of_the_worker_finish(self):
        config = self.write(
            "abort.conf.py",
            """\
            def worker_abort(worker): worker.log.info("aborted %s", worker.aborted)
        """,
        )
        zygote = self.zygote(config=config, threads=2)
        pid, (stuck, other) = zygote.worker()
        stuck.send("/sleep", query="30")
        id = other.send("/sleep", query="1")
        time.sleep(0.2)
        kill(pid, signal.SIGABRT)
        self.assertEqual(other.answer(id).status, 200)
        self.assertTrue(eventually(lambda: "aborted True" in zygote.stderr()))
        kill(pid)

    def test_hooks_see_the_settings_that_are_effective_and_one_worker_all_along(self):
        self.write("hooks_elsewhere.py", "def on_starting(server): server.log.info('elsewhere')\n")
        config = self.write(
            "gunicorn.conf.py",
            """\
            timeout, own = 10, "mine"
            on_starting = "hooks_elsewhere.on_starting"
            def nworkers_changed(server, new, old): server.log.info("%s for %s", new, old)
            def when_ready(server):
                server.log.info("%s %s", server.pid, server.address)
                cfg = server.cfg
                server.log.info("%s %s %s %s", cfg.timeout, cfg.workers, cfg.own, cfg.proc_name)
            def pre_fork(server, worker): worker.mark = "marked in pre_fork"
            def post_worker_init(worker):
                worker.log.info("%s %s %s", worker.mark, worker.ppid, worker.app.wsgi is not None)
            def child_exit(server, worker):
                server.log.info("%s %s", worker.mark, server.WORKERS)
        """,
        )
        zygote, pid, channel = self.worker(
            config=config,
            workers=2,
            pid=os.getpid(),
            settings={"timeout": 20, "workers": 2, "proc_name": None},
        )
        zygote.tell({"workers": 3})
        channel.ask("/hello")
        kill(pid, signal.SIGTERM)
        self.assertEqual(zygote.exit_status(pid), 0)
        self.assertTrue(eventually(lambda: "marked in pre_fork {}" in zygote.stderr()))
        self.assertEqual(
            [line.split("[INFO] ")[-1] for line in zygote.stderr().splitlines()],
            [
                "2 for None",
                "elsewhere",
                "%d [('localhost', 8000)]" % os.getpid(),
                "20 2 mine None",
                "marked in pre_fork %d True" % os.getpid(),
                "3 for 2",
                "marked in pre_fork {}",
            ],
        )

    def test_a_hook_that_fails_in_the_zygote_is_logged_and_no_more(self):
        config = self.write("bad.conf.py", "def when_ready(server):\n    1 / 0\n")
        zygote, pid, channel = self.worker(config=config)
        self.assertEqual(channel.ask("/hello").body, b"hello")
        self.assertIn("the hook when_ready failed\n", zygote.stderr())
        self.assertIn("ZeroDivisionError", zygote.stderr())

    def test_a_config_is_executed_where_it_was_started_and_before_the_environment_changes(self):
        here = os.getcwd()
        config = self.write(
            "early.conf.py",
            """\
            import os
            place = os.getcwd(), os.environ.get("COLOUR")
            def on_starting(server):
                server.log.info("%s %s %s", place == ("HERE", None), __name__, __file__)
        """.replace("HERE", here),
        )
        zygote = self.zygote(config=config, env={"COLOUR": "blue"})
        self.assertIn("True __config__ %s" % config, zygote.stderr())

    def test_applications_may_borrow_the_logger_of_gunicorn(self):
        self.write(
            "borrows.py",
            """\
            import logging
            borrowed = logging.getLogger("gunicorn.error")
            log = logging.getLogger("mine")
            log.handlers, log.propagate = borrowed.handlers, False
            log.setLevel(borrowed.level)
            log.info("not this"), log.warning("but this")
            def app(environ, start_response): pass
        """,
        )
        zygote, _, _ = self.worker("borrows:app", settings={"loglevel": "warning"})
        self.assertIn("[WARNING] but this\n", zygote.stderr())
        self.assertNotIn("not this", zygote.stderr())

    def test_a_logging_configuration_is_laid_over_gunicorns_own(self):
        self.write(
            "logs.py",
            """\
            import logging
            logging.getLogger("mine").debug("of the application")
            def app(environ, start_response): pass
        """,
        )
        nested = {
            "root": {"handlers": ["own"]},
            "loggers": {"mine": {"level": "DEBUG", "handlers": ["own"], "propagate": False}},
            "handlers": {"own": {"class": "logging.StreamHandler", "formatter": "own"}},
            "formatters": {"own": {"format": "own form: %(message)s"}},
        }
        ini = self.write(
            "logging.ini",
            """\
            [loggers]
            keys=root,mine
            [handlers]
            keys=own
            [formatters]
            keys=own
            [logger_root]
            handlers=own
            [logger_mine]
            level=DEBUG
            handlers=own
            qualname=mine
            propagate=0
            [handler_own]
            class=StreamHandler
            formatter=own
            args=()
            [formatter_own]
            format=own form: %(message)s
        """,
        )
        for config, settings in [
            ("logconfig_dict = %r" % nested, {}),
            ("", {"logconfig_json": self.write("logging.json", json.dumps(nested))}),
            ("logconfig = %r" % ini, {}),
        ]:
            config = self.write("logs.conf.py", config)
            zygote, _, _ = self.worker("logs:app", config=config, settings=settings)
            self.assertIn("own form: of the application\n", zygote.stderr(), settings)
        config = self.write("logs.conf.py", "logconfig_dict = {'handlers': {'x': {'class': 'y'}}}")
        failed = self.zygote(config=config).first["failed"]
        self.assertIn("Unable to configure handler 'x'", failed)
        self.assertIn("hint: it is laid over gunicorn's own", failed)
        missing = self.zygote(settings={"logconfig": "/no/such/file"}).first["failed"]
        self.assertIn("No such file or directory: '/no/such/file'", missing)

    def test_an_interpreter_that_begins_anew_finds_the_config_and_the_directory_again(self):
        self.write(
            "below/threads.py",
            """\
            import threading, time
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            def app(environ, start_response):
                start_response("200 OK", [])
                return [environ["SCRIPT_NAME"].encode()]
        """,
        )
        self.write(
            "relative.conf.py",
            """\
            def on_starting(server): server.log.info("starting")
            def when_ready(server): server.log.info("ready")
        """,
        )
        here = os.getcwd()
        os.chdir(self.directory.name)
        self.addCleanup(os.chdir, here)
        zygote, _, channel = self.worker(
            "threads:app",
            config="relative.conf.py",
            chdir="below",
            preload=True,
            base={"SCRIPT_NAME": "/x"},
        )
        self.assertIn("1 more thread", zygote.first["ready"]["warning"])
        self.assertEqual(channel.ask("/x/y").body, b"/x")
        hooks = [line.split("[INFO] ")[-1] for line in zygote.stderr().splitlines()]
        self.assertEqual(hooks, ["starting", "ready"])

    def test_a_check_loads_the_application_and_calls_no_hook(self):
        config = self.write(
            "check.conf.py",
            """\
            import os
            os.environ["FROM_CONFIG"] = "yes"
            def on_starting(server): server.log.info("called")
            def on_exit(server): server.log.info("called")
        """,
        )
        self.write(
            "checked.py",
            """\
            import os, threading, time
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            found = os.environ["FROM_CONFIG"]
            def app(environ, start_response): pass
        """,
        )
        zygote = self.zygote("checked:app", config=config, preload=True, check=True)
        self.assertNotIn("warning", zygote.first["ready"])
        zygote.control.close()
        self.assertEqual(zygote.process.wait(10), 0)
        self.assertEqual(zygote.stderr(), "")
        zygote = self.zygote("checked:no", config=config, preload=True, check=True)
        self.assertIn("no attribute 'no'", zygote.first["failed"])

    def settings(self, text, *names):
        config = self.write("settings.conf.py", text)
        zygote = self.zygote(start=False)
        zygote.tell({"settings": {"config": config, "names": names}})
        answer = zygote.hear()
        self.assertEqual(zygote.process.wait(10), 0)
        return answer

    def test_settings_are_evaluated_and_told_as_plain_data(self):
        answer = self.settings(
            """\
            import multiprocessing, os, pathlib, logging.config
            a, b, c, d, e = 1, "text", None, True, 1.5
            f = ("x", pathlib.Path("/y"), b"z")
            g = {"K": {1}}
            def h(server): pass
            i = logging.Handler
            j = object()
            k = {"long": "x" * 5000}
            l = float("nan")
            unasked = 2
        """,
            *"abcdefghijklm"
        )
        self.assertEqual(
            answer["settings"],
            {
                "a": 1,
                "b": "text",
                "c": None,
                "d": True,
                "e": 1.5,
                "f": ["x", "/y", "z"],
                "g": {"K": [1]},
                "h": {"type": "function"},
                "i": "logging.Handler",
                "j": {"type": "object"},
                "k": {"type": "dict"},
                "l": "nan",
            },
        )

    def test_settings_of_a_module_are_found_by_its_name(self):
        zygote = self.zygote(start=False)
        zygote.tell({"settings": {"config": "python:string", "names": ["digits", "nothing"]}})
        self.assertEqual(zygote.hear(), {"settings": {"digits": "0123456789"}})

    def test_settings_that_cannot_be_evaluated_are_told_as_python_shows_it_with_a_hint(self):
        for text, error, hint in [
            ("import no_such_thing\n", "No module named 'no_such_thing'", "is not installed"),
            ("workers = \n", "SyntaxError", "the interpreter is"),
            ("workers = 1 / 0\n", "ZeroDivisionError", "mend the file"),
            ("import sys\nsys.exit(3)\n", "SystemExit", "mend the file"),
        ]:
            failed = self.settings(text, "workers")["failed"]
            self.assertIn(error, failed)
            self.assertIn("settings.conf.py", failed)
            self.assertIn(hint, failed.splitlines()[-1])
            self.assertNotIn("evaluate_config", failed)

    def test_a_config_that_fails_is_a_failure_to_start(self):
        config = self.write("bad.conf.py", "import no_such_thing\n")
        self.assertIn("No module named 'no_such_thing'", self.zygote(config=config).first["failed"])

    def test_a_hook_that_fails_in_a_worker_is_a_failure_to_load(self):
        config = self.write("badhook.conf.py", "def post_fork(server, worker):\n    1 / 0\n")
        _, (channel,) = self.zygote(config=config).fork()
        kind, _, _, _, payload = channel.frame()
        self.assertEqual(kind, FAILED)
        self.assertIn("ZeroDivisionError", payload.decode())


class Mounted(WorkerTest):
    """An application below a path."""

    def test_the_path_of_the_application_becomes_its_script_name(self):
        self.write(
            "shows.py",
            """\
            import json
            def app(environ, start_response):
                start_response("200 OK", [])
                shown = {k: environ[k] for k in ("SCRIPT_NAME", "PATH_INFO")}
                return [json.dumps(shown).encode()]
        """,
        )
        channel = self.worker("shows:app", base={"SCRIPT_NAME": "caf\u00e9/x/"})[2]
        for path, expected in [
            ("/caf\u00c3\u00a9/x/y", ["/caf\u00c3\u00a9/x", "/y"]),
            ("/caf\u00c3\u00a9/x", ["/caf\u00c3\u00a9/x", ""]),
            ("/caf\u00c3\u00a9/x/", ["/caf\u00c3\u00a9/x", "/"]),
            ("/caf\u00c3\u00a9/xy", ["", "/caf\u00c3\u00a9/xy"]),
            ("/", ["", "/"]),
        ]:
            environ = json.loads(channel.ask(path).body)
            self.assertEqual([environ["SCRIPT_NAME"], environ["PATH_INFO"]], expected)
        # gunicorn takes it from the environment, which raw_env may have set.
        for preload in (False, True):
            zygote, _, channel = self.worker(
                "shows:app", env={"SCRIPT_NAME": "/env"}, preload=preload
            )
            environ = json.loads(channel.ask("/env/y").body)
            self.assertEqual(environ, {"SCRIPT_NAME": "/env", "PATH_INFO": "/y"})


if __name__ == "__main__":
    unittest.main()
