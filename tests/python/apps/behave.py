"""An application that does what its path says: tests/python_workers.rs asks it to be good, slow, and broken."""

import os
import socket
import struct
import sys
import threading
import time

STARTED = time.monotonic()
if "THREAD" in os.environ:
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()


def app(environ, start_response):
    act = globals().get("act_" + environ["PATH_INFO"].strip("/").replace("/", "_"), act_hello)
    return act(environ, start_response)


def plain(start_response, text, status="200 OK"):
    body = text if isinstance(text, bytes) else text.encode()
    start_response(status, [("Content-Type", "text/plain")])
    return [body]


def act_hello(environ, start_response):
    return plain(start_response, "hello\n")


def act_pid(environ, start_response):
    return plain(start_response, "%d" % os.getpid())


def act_native(environ, start_response):
    """Whether the native module runs this request, where there is one."""
    if sys.implementation.name != "cpython" or "t" in sys.abiflags:
        return plain(start_response, "not for this interpreter")
    return plain(start_response, str(type(start_response) is type(len)))


def act_thread(environ, start_response):
    time.sleep(0.2)
    return plain(start_response, threading.current_thread().name)


def act_echo(environ, start_response):
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "application/octet-stream"), ("X-Length", environ.get("CONTENT_LENGTH", "none"))])
    return [body]


def act_stream(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return (b"%06d\n" % number for number in range(int(environ["QUERY_STRING"] or 1000)))


RELEASED = threading.Event()


def act_hints(environ, start_response):
    environ["wsgi.early_hints"]([("Link", "</a.css>; rel=preload"), ("Connection", "close")])
    RELEASED.wait(20)
    return plain(start_response, "hinted\n")


def act_release(environ, start_response):
    RELEASED.set()
    return plain(start_response, "released\n")


LEFT = threading.Event()


def act_silent_stream(environ, start_response):
    def pieces():
        yield b"one\n"
        until = time.monotonic() + 20
        while time.monotonic() < until and not environ["uringd.client_disconnected"]():
            time.sleep(0.01)
        if environ["uringd.client_disconnected"]():
            LEFT.set()

    start_response("200 OK", [("Content-Type", "text/plain")])
    return pieces()


def act_left(environ, start_response):
    return plain(start_response, str(LEFT.wait(20)))


def act_bulk(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return (b"%06d\n" % number * 1000 for number in range(int(environ["QUERY_STRING"])))


def act_large(environ, start_response):
    return plain(start_response, b"x" * int(environ["QUERY_STRING"]))


def act_file(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/x-python")])
    return environ["wsgi.file_wrapper"](open(__file__, "rb"))


def act_fail(environ, start_response):
    raise RuntimeError("this application fails")


def act_break(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return broken()


def broken():
    yield b"the beginning"
    raise RuntimeError("this application fails in the middle")


def act_sleep(environ, start_response):
    time.sleep(float(environ["QUERY_STRING"]))
    return plain(start_response, "slept")


def act_spin(environ, start_response):
    while True:
        pass


def act_extend(environ, start_response):
    environ["uringd.extend_deadline"](20)
    time.sleep(float(environ["QUERY_STRING"]))
    return plain(start_response, "in time after all")


def act_extend_stream(environ, start_response):
    def pieces():
        yield b"in time "
        environ["uringd.extend_deadline"](20)
        time.sleep(float(environ["QUERY_STRING"]))
        yield b"after all"

    plain(start_response, "")
    return pieces()


def act_die(environ, start_response):
    """Dies once for each file that QUERY_STRING names: the second attempt finds it gone."""
    name = environ["QUERY_STRING"]
    if os.path.exists(name):
        os.unlink(name)
        os.kill(os.getpid(), 9)
    return plain(start_response, "alive")


def act_always_die(environ, start_response):
    os._exit(3)


def act_exit(environ, start_response):
    sys.exit(5)


def act_mark(environ, start_response):
    """Leaves a trace of having run."""
    with open(environ["QUERY_STRING"], "a") as marks:
        marks.write("x")
    return plain(start_response, "marked")


def act_gone(environ, start_response):
    """Waits until it is told that the client is gone, and leaves a trace of that."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if environ["uringd.client_disconnected"]():
            return act_mark(environ, start_response)
        time.sleep(0.01)
    return plain(start_response, "nobody left")


def act_environ(environ, start_response):
    return plain(start_response, "\n".join("%s=%r" % pair for pair in sorted(environ.items())))


def act_variable(environ, start_response):
    return plain(start_response, os.environ.get(environ["QUERY_STRING"], "unset"))


def factory(word="made"):
    return lambda environ, start_response: plain(start_response, word)
