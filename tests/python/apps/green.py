"""An application on greenlets: tests/python_gevent.rs asks it to wait, to stream, to compute and to break."""

import ctypes
import os
import signal
import time

import gevent
from gevent.event import Event

TEXT = [("Content-Type", "text/plain")]
gates = {}
seen = []


def app(environ, start_response):
    name = environ["PATH_INFO"].strip("/") or "hello"
    return globals()["act_" + name](environ, start_response, environ["QUERY_STRING"])


def answer(start_response, text, status="200 OK"):
    start_response(status, TEXT)
    return [text.encode()]


def mark(path):
    open(path, "w").close()


def act_hello(environ, start_response, query):
    return answer(start_response, "hello\n")


def act_pid(environ, start_response, query):
    return answer(start_response, str(os.getpid()))


def act_sleep(environ, start_response, query):
    time.sleep(float(query))
    return answer(start_response, str(os.getpid()))


def act_wait(environ, start_response, query):
    """Until somebody asks for /open with the same name."""
    gates.setdefault(query, Event()).wait()
    return answer(start_response, query)


def act_open(environ, start_response, query):
    gates.setdefault(query, Event()).set()
    return answer(start_response, "open")


def act_waiting(environ, start_response, query):
    return answer(start_response, str(len(gates)))


def act_spin(environ, start_response, query):
    until = time.perf_counter() + float(query)
    while time.perf_counter() < until:
        pass
    return answer(start_response, "spun")


def act_spin_until(environ, start_response, query):
    """Lets nobody else run until the file is there; there is another one meanwhile."""
    mark(query + ".begun")
    while not os.path.exists(query):
        pass
    return answer(start_response, str(os.getpid()))


def act_echo(environ, start_response, query):
    body = environ["wsgi.input"].read()
    start_response("200 OK", TEXT + [("X-Length", str(len(body)))])
    return [body]


def act_large(environ, start_response, query):
    return answer(start_response, "l" * int(query))


def act_bulk(environ, start_response, query):
    start_response("200 OK", TEXT)
    return (b"0123456789abcdef" * 4096 for _ in range(int(query)))


def act_file(environ, start_response, query):
    start_response("200 OK", TEXT)
    return environ["wsgi.file_wrapper"](open(__file__, "rb"))


def act_ticks(environ, start_response, query):
    """Server-sent events: so many, a tenth of a second apart."""
    start_response("200 OK", [("Content-Type", "text/event-stream"), ("X-Pid", str(os.getpid()))])

    def ticks():
        for number in range(int(query)):
            yield b"data: %d\n\n" % number
            gevent.sleep(0.1)

    return ticks()


def act_endless(environ, start_response, query):
    """Until its client is gone; then there is a file at the path of the query."""
    start_response("200 OK", TEXT)

    def pieces():
        try:
            while True:
                yield b"tick\n"
                gevent.sleep(0.02)
        finally:
            mark(query)

    return pieces()


def act_stall(environ, start_response, query):
    start_response("200 OK", TEXT)
    yield b"the beginning"
    gevent.sleep(1000)


def act_gone(environ, start_response, query):
    while not environ["uringd.client_disconnected"]():
        gevent.sleep(0.02)
    mark(query)
    return answer(start_response, "for nobody")


def act_mark(environ, start_response, query):
    mark(query)
    return answer(start_response, "marked")


def act_stubborn(environ, start_response, query):
    while True:
        try:
            gevent.sleep(1000)
        except BaseException as error:
            seen.append(type(error).__name__)


def act_seen(environ, start_response, query):
    return answer(start_response, " ".join(seen))


def act_extend(environ, start_response, query):
    environ["uringd.extend_deadline"](float(query))
    time.sleep(float(query) * 0.8)
    return answer(start_response, "in time after all")


def act_late(environ, start_response, query):
    """Asks for more time once it is over."""

    def later():
        environ["uringd.extend_deadline"](9)
        seen.append("late")

    gevent.spawn_later(0.05, later)
    return answer(start_response, "soon")


def act_fail(environ, start_response, query):
    raise RuntimeError("this application fails")


def act_break(environ, start_response, query):
    start_response("200 OK", TEXT)
    yield b"the beginning"
    raise RuntimeError("this application breaks off")


def act_die(environ, start_response, query):
    """Kills its worker if the file is there, which it removes first."""
    if os.path.exists(query):
        os.unlink(query)
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(start_response, "alive")


def act_crash(environ, start_response, query):
    ctypes.string_at(1)


def act_exit(environ, start_response, query):
    raise SystemExit(3)


def make_flask():
    from flask import Flask, Response, request, stream_with_context

    flask = Flask(__name__)

    @flask.route("/hi/<name>")
    def hi(name):
        gevent.sleep(0.05)
        return "hi %s of %s" % (name, request.headers["X-From"])

    @flask.route("/upload", methods=["POST"])
    def upload():
        return str(len(request.files["file"].read()))

    @flask.route("/stream")
    def stream():
        def pieces():
            for number in range(5):
                gevent.sleep(0.01)
                yield "%d %s\n" % (number, request.args["mark"])

        return Response(stream_with_context(pieces()), mimetype="text/plain")

    return flask
