"""What a worker of class gevent does with many requests at a time, asked of the real file.

python tests/python/test_gevent.py, with an interpreter that has gevent.
"""

import json
import os
import struct
import sys
import tempfile
import textwrap
import time
import unittest
from importlib.util import find_spec

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import channel  # noqa: E402
from channel import (  # noqa: E402
    BEGIN,
    END,
    EXTEND,
    FILE,
    HINTS,
    PIECE,
    READY,
    RESPONSE,
    Answer,
    Zygote,
    alive,
    eventually,
    kill,
    readable,
    request_environ,
    request_frame,
)

# To import gevent takes a second of a CPU that others may want too.
channel.WAIT_SECONDS = 60.0
CREDIT, GONE, CANCEL, PING = range(2, 6)
PONG, RETURN = 10, 11
WINDOW = 262144

APP = r"""
import json, multiprocessing, os, socket, sys, tempfile, threading, time
import gevent
from gevent.event import Event

TEXT = [("Content-Type", "text/plain")]
loaded_in = os.getpid()
patched_when_loaded = socket.socket.__module__.startswith("gevent")
routes, gates, seen = {}, {}, []

def route(function):
    routes["/" + function.__name__] = function
    return function

def app(environ, start_response):
    return routes.get(environ["PATH_INFO"], hello)(environ, start_response)

def gate(name):
    return gates.setdefault(name, Event())

@route
def hello(environ, start_response):
    start_response("200 OK", TEXT)
    return [b"hello"]

@route
def about(environ, start_response):
    start_response("200 OK", TEXT)
    return [json.dumps({
        "multithread": environ["wsgi.multithread"], "patched": patched_when_loaded,
        "greenlet": isinstance(gevent.getcurrent(), gevent.Greenlet),
        "loaded here": loaded_in == os.getpid(), "seen": seen,
        "thread": threading.current_thread() is threading.main_thread(),
    }).encode()]

@route
def wait(environ, start_response):
    gate(environ["QUERY_STRING"]).wait()
    start_response("200 OK", TEXT)
    return [environ["QUERY_STRING"].encode()]

@route
def open(environ, start_response):
    gate(environ["QUERY_STRING"]).set()
    return hello(environ, start_response)

@route
def sleep(environ, start_response):
    time.sleep(float(environ["QUERY_STRING"]))
    return hello(environ, start_response)

@route
def spin(environ, start_response):
    until = time.perf_counter() + float(environ["QUERY_STRING"])
    while time.perf_counter() < until:
        pass
    return hello(environ, start_response)

@route
def echo(environ, start_response):
    start_response("200 OK", TEXT)
    return [environ["wsgi.input"].read()]

@route
def big(environ, start_response):
    start_response("200 OK", TEXT)
    return [b"b" * int(environ["QUERY_STRING"])]

@route
def stream(environ, start_response):
    start_response("200 OK", TEXT)
    def pieces():
        try:
            for number in range(int(environ["QUERY_STRING"])):
                yield b"s" * 10000
        finally:
            seen.append("closed")
    return pieces()

@route
def forever(environ, start_response):
    start_response("200 OK", TEXT)
    def pieces():
        try:
            while True:
                yield b"tick\n"
                gevent.sleep(0.01)
        finally:
            seen.append("closed")
    return pieces()

@route
def written(environ, start_response):
    write = start_response("200 OK", TEXT)
    try:
        while True:
            write(b"w" * 1000)
            gevent.sleep(0.01)
    except OSError as error:
        seen.append("write: " + type(error).__name__)
        raise

@route
def gone(environ, start_response):
    while not environ["uringd.client_disconnected"]():
        gevent.sleep(0.01)
    seen.append("gone")
    return hello(environ, start_response)

@route
def stubborn(environ, start_response):
    for _ in range(2):
        try:
            gevent.sleep(1000)
        except BaseException as error:
            seen.append("refused: " + type(error).__name__)
    return hello(environ, start_response)

@route
def file(environ, start_response):
    start_response("200 OK", TEXT)
    file = tempfile.TemporaryFile()
    file.write(b"in a file " + environ["QUERY_STRING"].encode())
    file.seek(0)
    return environ["wsgi.file_wrapper"](file)

@route
def extend(environ, start_response):
    environ["uringd.extend_deadline"](2.5)
    gevent.sleep(0)
    gevent.get_hub().threadpool.apply(environ["uringd.extend_deadline"], (3.5,))
    return hello(environ, start_response)

@route
def fail(environ, start_response):
    gevent.sleep(0)
    raise RuntimeError("this request fails")

@route
def fail_later(environ, start_response):
    start_response("200 OK", TEXT)
    yield b"begun"
    gevent.sleep(0)
    raise RuntimeError("in the middle")

@route
def leave(environ, start_response):
    sys.exit(3)

@route
def background_leave(environ, start_response):
    gevent.spawn(sys.exit, 3)
    return hello(environ, start_response)

@route
def short_timeout(environ, start_response):
    with gevent.Timeout(0.01, False):
        gevent.sleep(1000)
    return hello(environ, start_response)

@route
def locals_(environ, start_response):
    had = getattr(local, "mark", None)
    local.mark = environ["QUERY_STRING"]
    gevent.sleep(0)
    start_response("200 OK", TEXT)
    return [json.dumps([had, local.mark]).encode()]

local = threading.local()

def work(n):
    time.sleep(0.2)
    os._exit(n)

@route
def child(environ, start_response):
    child = multiprocessing.get_context("fork").Process(target=work, args=(7,))
    child.start()
    child.join()
    start_response("200 OK", TEXT)
    return [str(child.exitcode).encode()]

@route
def once(environ, start_response):
    sys.stderr.write("once %s\n" % environ["QUERY_STRING"])
    sys.stderr.flush()
    start_response("200 OK", TEXT)
    return [environ["QUERY_STRING"].encode()]

@route
def fork_and_return(environ, start_response):
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        start_response("200 OK", TEXT)
        return [str(os.WEXITSTATUS(status)).encode()]
    return hello(environ, start_response)

gevent.spawn(lambda: seen.append("background"))
"""

directory = None


def setUpModule():
    global directory
    if find_spec("gevent") is None:
        print("SKIPPED test_gevent.py: gevent is not installed for %s" % sys.executable)
        raise unittest.SkipTest("no gevent")
    directory = tempfile.TemporaryDirectory()
    with open(os.path.join(directory.name, "green.py"), "w") as file:
        file.write(APP)


def tearDownModule():
    if directory is not None:
        directory.cleanup()


class Shared:
    """uringd's end of a channel that many requests share: answers in any order, by id."""

    def __init__(self, data):
        self.data, self.answers, self.returned, self.pongs = data, {}, [], []
        self.credit, self.buffer = {}, bytearray()
        self.send, self.close = data.send, data.close

    def word(self, kind, id, number=0):
        self.data.data.sendall(struct.pack("<IIBBHI", 4, id, kind, 0, 0, number))

    def read(self, count):
        while len(self.buffer) < count:
            part = self.data.data.recv(1 << 20)
            if not part:
                raise EOFError("the worker ended the channel")
            self.buffer += part
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        return data

    def take(self):
        """One frame, whosever it is; its kind and id."""
        length, id, kind, flags, status = struct.unpack("<IIBBH", self.read(12))
        payload = self.read(length)
        assert flags == 0 or kind == END and flags == 1, (kind, flags)
        if kind == PONG:
            self.pongs.append(struct.unpack("<I", payload)[0])
            return kind, id
        if kind == RETURN:
            assert payload == b"" and id not in self.answers
            self.returned.append(id)
            return kind, id
        answer = self.answers.setdefault(id, Answer())
        assert not answer.whole, "more of an answer that is complete"
        answer.kinds.append(kind)
        if kind in (RESPONSE, BEGIN, FILE, HINTS):
            size = struct.unpack_from("<I", payload)[0]
            assert len(payload) < WINDOW - 12
            reason, *lines = payload[4 : 4 + size].decode("latin-1")[:-2].split("\r\n")
            answer.status, answer.reason, answer.body = status, reason, bytearray()
            answer.headers, rest = [tuple(line.split(": ", 1)) for line in lines], payload[
                4 + size :
            ]
        if kind == EXTEND:
            answer.extended.append(struct.unpack("<I", payload)[0])
        elif kind == RESPONSE:
            answer.body, answer.whole = rest, True
        elif kind == FILE:
            offset, length = struct.unpack("<QQ", rest)
            fd = self.data.descriptor()
            answer.body, answer.whole = os.pread(fd, length, offset), True
            os.close(fd)
        elif kind == PIECE:
            answer.body += payload
            left = self.credit.setdefault(id, WINDOW) - len(payload)
            assert payload and left >= 0, "%d bytes without credit" % -left
            self.credit[id] = left
        elif kind == END:
            answer.failed, answer.whole = flags == 1, True
        return kind, id

    def take_until(self, condition):
        until = time.monotonic() + channel.WAIT_SECONDS
        while not condition():
            assert time.monotonic() < until
            self.take()

    def answer(self, id):
        self.take_until(lambda: id in self.answers and self.answers[id].whole)
        return self.answers[id]

    def ask(self, *args, **keywords):
        return self.answer(self.send(*args, **keywords))

    def grant(self, id, bytes):
        self.credit[id] = self.credit.setdefault(id, WINDOW) + bytes
        self.word(CREDIT, id, bytes)

    def seen(self):
        return json.loads(self.ask("/about").body)["seen"]


def zygote(**options):
    options = dict({"chdir": directory.name, "worker_class": "gevent"}, **options)
    return Zygote("green:app", **options)


class Greenlets(unittest.TestCase):
    def setUp(self):
        self.zygote = zygote()
        self.addCleanup(self.zygote.__exit__)
        self.assertIn("ready", self.zygote.first)
        self.pid, (data,) = self.zygote.worker()
        self.channel = Shared(data)

    def test_the_application_runs_in_a_patched_process_on_greenlets(self):
        about = json.loads(self.channel.ask("/about").body)
        self.assertEqual(
            (about["multithread"], about["patched"], about["greenlet"], about["loaded here"]),
            (True, True, True, True),
        )
        self.assertFalse(about["thread"])

    def test_answers_come_when_they_are_ready_and_not_in_the_order_of_the_requests(self):
        ids = {name: self.channel.send("/wait", query=name) for name in "abcde"}
        for name in "cadbe":
            self.channel.send("/open", query=name)
            answer = self.channel.answer(ids[name])
            self.assertEqual(answer.body, name.encode())

    def test_hundreds_of_requests_sleep_at_the_same_time(self):
        begun = time.monotonic()
        ids = [self.channel.send("/sleep", query="1") for _ in range(500)]
        for id in ids:
            self.assertEqual(self.channel.answer(id).body, b"hello")
        # One after the other would take 500 seconds.
        self.assertLess(time.monotonic() - begun, 15)

    def test_quick_requests_of_one_batch_are_answered_in_their_order(self):
        ids = [self.channel.send("/echo", body=b"%d" % n) for n in range(100)]
        for n, id in enumerate(ids):
            self.assertEqual(self.channel.answer(id).body, b"%d" % n)

    def test_a_ping_is_answered_while_requests_wait_and_when_there_are_none(self):
        self.channel.word(PING, 0, 11)
        waiting = self.channel.send("/wait", query="x")
        self.channel.word(PING, 0, 12)
        self.channel.take_until(lambda: self.channel.pongs == [11, 12])
        self.channel.send("/open", query="x")
        self.channel.answer(waiting)

    def test_a_ping_is_answered_when_all_requests_before_it_have_begun(self):
        ids = [self.channel.send("/spin", query="0.05") for _ in range(10)]
        self.channel.word(PING, 0, 7)
        after = self.channel.send("/spin", query="0.05")
        self.channel.take_until(lambda: self.channel.pongs)
        self.assertTrue(all(id in self.channel.answers for id in ids))
        self.assertNotIn(after, self.channel.answers)
        self.channel.answer(after)

    def test_frames_may_come_in_any_cut(self):
        frames = b"".join(
            request_frame(
                id, request_environ("/echo", "POST", CONTENT_LENGTH="300"), b"%03d" % id * 100
            )
            for id in range(1, 40)
        ) + struct.pack("<IIBBHI", 4, 0, PING, 0, 0, 5)
        at, step = 0, 1
        while at < len(frames):
            self.channel.data.data.sendall(frames[at : at + step])
            at, step = at + step, step * 2 % 1021
            if step < 64:
                time.sleep(0.001)
        for id in range(1, 40):
            self.assertEqual(self.channel.answer(id).body, b"%03d" % id * 100)
        self.channel.take_until(lambda: self.channel.pongs)

    def test_bodies_come_inline_and_as_files(self):
        for length in (1, 65536, 300000, 3000000):
            body = os.urandom(length)
            id = self.channel.send("/echo", "POST", body_file=body)
            while not (id in self.channel.answers and self.channel.answers[id].whole):
                if self.channel.credit.get(id) == 0:
                    self.channel.grant(id, WINDOW)
                self.channel.take()
            self.assertEqual(self.channel.answers[id].body, body)
        self.assertEqual(self.channel.ask("/echo", "POST", body=b"x" * 60000).body, b"x" * 60000)

    def test_a_stream_stops_at_its_credit_and_holds_nobody(self):
        stuck = self.channel.send("/stream", query="1000")
        self.channel.take_until(lambda: self.channel.credit.get(stuck) == 0)
        self.assertEqual(len(self.channel.answers[stuck].body), WINDOW)
        for _ in range(20):
            self.assertEqual(self.channel.ask("/hello").body, b"hello")
        self.assertEqual(len(self.channel.answers[stuck].body), WINDOW)
        self.channel.grant(stuck, 100)
        self.channel.take_until(lambda: self.channel.credit[stuck] == 0)
        self.channel.grant(stuck, 10000000)
        self.assertEqual(len(self.channel.answer(stuck).body), 10000000)
        self.assertEqual(self.channel.seen(), ["background", "closed"])

    def test_a_long_list_goes_in_pieces_with_its_length_told(self):
        id = self.channel.send("/big", query="1000000")
        self.channel.take_until(lambda: self.channel.credit.get(id) == 0)
        self.channel.grant(id, 1000000)
        answer = self.channel.answer(id)
        self.assertEqual((answer.kinds[0], len(answer.body)), (BEGIN, 1000000))
        self.assertEqual(answer.header("Content-Length"), ["1000000"])
        answer = self.channel.ask("/big", "HEAD", query="1000000")
        self.assertEqual(
            (answer.kinds, answer.header("Content-Length")), ([BEGIN, END], ["1000000"])
        )
        self.assertEqual(self.channel.ask("/big", query="100000").kinds, [RESPONSE])

    def test_many_streams_take_turns(self):
        ids = [self.channel.send("/forever") for _ in range(30)]
        answers = self.channel.answers
        self.channel.take_until(
            lambda: all(id in answers and len(answers[id].body) >= 50 for id in ids)
        )
        for id in ids:
            self.channel.word(GONE, id)
        for id in ids:
            self.assertTrue(self.channel.answer(id).failed)
        self.assertEqual(self.channel.seen().count("closed"), 30)

    def test_an_application_that_writes_is_told_that_its_client_is_gone(self):
        id = self.channel.send("/written")
        self.channel.take_until(
            lambda: self.channel.answers.get(id) and self.channel.answers[id].body
        )
        self.channel.word(GONE, id)
        self.assertTrue(self.channel.answer(id).failed)
        self.assertIn("write: ClientGone", self.channel.seen())
        self.assertNotIn("Traceback", self.zygote.stderr())

    def test_each_request_has_its_own_client(self):
        ids = [self.channel.send("/gone") for _ in range(3)]
        self.channel.ask("/hello")
        self.channel.word(GONE, ids[1])
        self.channel.answer(ids[1])
        self.assertEqual(self.channel.seen().count("gone"), 1)
        self.channel.word(GONE, ids[0])
        self.channel.word(GONE, ids[2])
        for id in ids:
            self.channel.answer(id)

    def test_a_cancelled_request_ends_with_its_traceback_and_the_others_live(self):
        other, overdue = self.channel.send("/wait", query="o"), self.channel.send(
            "/sleep", query="1000"
        )
        self.channel.ask("/hello")
        self.channel.word(CANCEL, overdue)
        self.assertEqual(self.channel.answer(overdue).status, 500)
        self.assertTrue(eventually(lambda: "takes longer than --timeout" in self.zygote.stderr()))
        self.assertIn("in sleep", self.zygote.stderr())
        self.channel.send("/open", query="o")
        self.assertEqual(self.channel.answer(other).body, b"o")
        # Its answer and this have crossed.
        self.channel.word(CANCEL, overdue)
        self.channel.word(GONE, other)
        self.channel.word(CREDIT, other, 7)
        self.assertEqual(self.channel.ask("/hello").status, 200)

    def test_a_request_that_will_not_be_cancelled_holds_nobody(self):
        id = self.channel.send("/stubborn")
        self.channel.ask("/hello")
        self.channel.word(CANCEL, id)
        self.assertTrue(eventually(lambda: "refused: Overdue" in self.channel.seen()))
        self.channel.word(CANCEL, id)
        self.assertEqual(self.channel.answer(id).status, 200)

    def test_a_stream_without_credit_can_be_cancelled(self):
        id = self.channel.send("/stream", query="1000")
        self.channel.take_until(lambda: self.channel.credit.get(id) == 0)
        self.channel.word(CANCEL, id)
        self.assertTrue(self.channel.answer(id).failed)
        self.assertIn("closed", self.channel.seen())

    def test_requests_that_have_not_begun_are_given_back(self):
        self.channel.send("/spin", query="0.5")
        ids = [self.channel.send("/spin", query="0.1") for _ in range(5)]
        self.channel.word(GONE, ids[3])
        self.channel.word(CANCEL, ids[4])
        # The first ones may have begun when this is read; the last ones wait behind half a second.
        self.channel.take_until(lambda: set(self.channel.returned) == {ids[3], ids[4]})
        for id in ids[:3]:
            self.channel.answer(id)

    def test_files_of_several_requests_are_not_mixed_up(self):
        ids = {n: self.channel.send("/file", query=str(n)) for n in range(50)}
        for n, id in ids.items():
            self.assertEqual(self.channel.answer(id).body, b"in a file %d" % n)

    def test_a_deadline_is_extended_from_any_thread(self):
        self.assertEqual(self.channel.ask("/extend").extended, [2500, 3500])

    def test_errors_are_500_or_the_end_of_a_stream(self):
        self.assertEqual(self.channel.ask("/fail").status, 500)
        answer = self.channel.ask("/fail_later")
        self.assertEqual((answer.status, answer.body, answer.failed), (200, b"begun", True))
        for text in ("this request fails", "in the middle"):
            self.assertTrue(eventually(lambda text=text: text in self.zygote.stderr()))

    def test_the_applications_own_timeouts_work(self):
        self.assertEqual(self.channel.ask("/short_timeout").body, b"hello")

    def test_what_a_request_that_waited_leaves_behind_reaches_no_other(self):
        for mark in "abc":
            self.assertEqual(
                json.loads(self.channel.ask("/locals_", query=mark).body), [None, mark]
            )

    def test_a_child_process_does_not_answer_for_its_parent(self):
        other = self.channel.send("/sleep", query="0.1")
        self.assertEqual(self.channel.ask("/child").body, b"7")
        self.assertEqual(self.channel.answer(other).body, b"hello")
        waiting = [self.channel.send("/child"), self.channel.send("/fork_and_return")]
        waiting += [self.channel.send("/once", query=str(n)) for n in range(20)]
        self.assertEqual(self.channel.answer(waiting[1]).body, b"70")
        for n, id in enumerate(waiting[2:]):
            self.assertEqual(self.channel.answer(id).body, b"%d" % n)
        self.assertEqual(self.zygote.stderr().count("once "), 20)
        self.assertEqual(self.channel.ask("/hello").body, b"hello")

    def take_leave(self):
        self.channel.take_until(lambda: 0 in self.channel.returned)

    def test_sigterm_finishes_what_runs_and_gives_back_what_comes(self):
        running = self.channel.send("/wait", query="t")
        stream = self.channel.send("/stream", query="50")
        self.channel.take_until(lambda: self.channel.credit.get(stream) == 0)
        kill(self.pid, 15)
        self.take_leave()
        id = self.channel.send("/hello")
        self.channel.take_until(lambda: id in self.channel.returned)
        self.channel.grant(stream, 1000000)
        self.assertEqual(len(self.channel.answer(stream).body), 500000)
        self.channel.word(CANCEL, running)
        self.assertEqual(self.channel.answer(running).status, 500)
        self.assertTrue(alive(self.pid))
        self.channel.close()
        self.assertEqual(self.zygote.exit_status(self.pid), 0)

    def test_an_idle_worker_takes_its_leave_on_sigterm_and_ends_with_its_channel(self):
        kill(self.pid, 15)
        self.take_leave()
        self.channel.close()
        self.assertEqual(self.zygote.exit_status(self.pid), 0)
        pid, (data,) = self.zygote.worker()
        data.close()
        self.assertEqual(self.zygote.exit_status(pid), 0)

    def test_the_end_of_the_channel_ends_streams_and_lets_requests_finish(self):
        self.channel.send("/forever")
        self.channel.send("/sleep", query="0.3")
        self.channel.take()
        self.channel.close()
        self.assertEqual(self.zygote.exit_status(self.pid), 0)

    def test_an_exit_in_a_request_ends_the_worker_after_the_others(self):
        other = self.channel.send("/sleep", query="0.3")
        self.assertEqual(self.channel.ask("/leave").status, 500)
        self.assertEqual(self.channel.answer(other).body, b"hello")
        self.take_leave()
        self.channel.close()
        self.assertEqual(self.zygote.exit_status(self.pid), 3)

    def test_an_exit_in_a_greenlet_of_the_application_does_too(self):
        other = self.channel.send("/sleep", query="0.3")
        self.channel.ask("/background_leave")
        self.assertEqual(self.channel.answer(other).body, b"hello")
        self.take_leave()
        self.channel.close()
        self.assertEqual(self.zygote.exit_status(self.pid), 3)

    def test_garbage_ends_the_worker(self):
        for frame in (
            struct.pack("<IIBBHI", 4, 1, 9, 0, 0, 0),
            struct.pack("<IIBBHII", 8, 1, CREDIT, 0, 0, 0, 0),
            struct.pack("<IIBBHI", 4, 1, 1, 0, 0, 0),
        ):
            pid, (data,) = self.zygote.worker()
            data.data.sendall(frame)
            self.assertEqual(self.zygote.exit_status(pid), 70)

    def test_a_reader_that_is_slow_to_take_frames_gets_all_of_them(self):
        ids = [self.channel.send("/big", query="100000") for _ in range(100)]
        time.sleep(0.2)
        for id in ids:
            self.assertEqual(len(self.channel.answer(id).body), 100000)
        self.assertFalse(readable(self.channel.data.data, 0.05))


class Loading(unittest.TestCase):
    def test_a_preloaded_application_is_patched_too_and_keeps_its_greenlets(self):
        with zygote(preload=True) as zygote_:
            self.assertNotIn("warning", zygote_.first["ready"])
            for _ in range(2):
                pid, (data,) = zygote_.worker()
                shared = Shared(data)
                about = json.loads(shared.ask("/about").body)
                self.assertEqual((about["patched"], about["loaded here"]), (True, False))
                self.assertEqual(about["seen"], ["background"])
                begun = time.monotonic()
                ids = [shared.send("/sleep", query="0.5") for _ in range(50)]
                for id in ids:
                    shared.answer(id)
                self.assertLess(time.monotonic() - begun, 15)
                self.assertEqual(shared.ask("/child").body, b"7")
                data.close()
                self.assertEqual(zygote_.exit_status(pid), 0)

    def test_a_preloaded_application_that_has_used_the_hub_is_forked_with_it(self):
        with tempfile.TemporaryDirectory() as place:
            with open(os.path.join(place, "used.py"), "w") as file:
                file.write("import time\ntime.sleep(0.01)\n" + APP)
            with Zygote("used:app", chdir=place, worker_class="gevent", preload=True) as zygote_:
                for _ in range(2):
                    pid, (data,) = zygote_.worker()
                    self.assertEqual(Shared(data).ask("/sleep", query="0.1").body, b"hello")

    def test_without_gevent_the_start_says_how_to_install_it(self):
        with tempfile.TemporaryDirectory() as place:
            with open(os.path.join(place, "sitecustomize.py"), "w") as file:
                file.write(textwrap.dedent("""
                        import importlib.util as util
                        find = util.find_spec
                        util.find_spec = lambda name: None if name == "gevent" else find(name)
                        """))
            os.environ["PYTHONPATH"] = place
            try:
                with zygote() as zygote_:
                    self.assertIn("pip install gevent", zygote_.first["failed"])
            finally:
                del os.environ["PYTHONPATH"]

    def test_an_application_that_cannot_be_loaded_is_told(self):
        with Zygote("nowhere:app", chdir=directory.name, worker_class="gevent") as zygote_:
            pid, (data,) = zygote_.fork()
            kind, _, _, _, payload = data.frame()
            self.assertNotEqual(kind, READY)
            self.assertIn("nowhere", payload.decode())
            self.assertEqual(zygote_.exit_status(pid), 4)


if __name__ == "__main__":
    unittest.main()
