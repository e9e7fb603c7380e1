"""An application that fails in every way that there is: its path says how, tests/python_failures.rs what must come of it."""

import ctypes
import locale
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

TEXT = [("Content-Type", "text/plain")]
LOCK = threading.Lock()
LEAKED = []


def app(environ, start_response):
    if "HTTP_X_MARK" in environ:
        mark(environ["HTTP_X_MARK"])
    act = globals()["act_" + environ["PATH_INFO"].strip("/")]
    answer = act(environ, environ["QUERY_STRING"], start_response)
    if not isinstance(answer, str):
        return answer
    start_response("200 OK", TEXT)
    return [answer.encode()]


def mark(path, text="x"):
    """Leaves a trace of having run."""
    with open(path, "a") as marks:
        marks.write(text)


def act_pid(environ, query, start_response):
    return "%d" % os.getpid()


def act_echo(environ, query, start_response):
    return environ["wsgi.input"].read().decode()


def act_mark(environ, query, start_response):
    mark(query)
    return "marked"


# It dies.


def act_die_once(environ, query, start_response):
    """Dies once for each file that the query names: the second attempt finds it gone."""
    if os.path.exists(query):
        os.unlink(query)
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def act_segfault(environ, query, start_response):
    return repr(ctypes.string_at(0))


def act_exit(environ, query, start_response):
    if query == "os._exit":
        os._exit(3)
    if query == "sys.exit":
        sys.exit(5)
    raise {"SystemExit": SystemExit(0), "KeyboardInterrupt": KeyboardInterrupt()}[query]


# It hangs.


def act_sleep(environ, query, start_response):
    time.sleep(float(query))
    return "slept"


def act_spin(environ, query, start_response):
    while True:
        pass


def act_grip(environ, query, start_response):
    """In C, and never gives up the interpreter: no Python code of this process runs any more."""
    ctypes.PyDLL(None).sleep(60)


def act_deadlock(environ, query, start_response):
    LOCK.acquire()
    LOCK.acquire()


# It fails.


def act_recurse(environ, query, start_response):
    return act_recurse(environ, query, start_response)


def act_starve(environ, query, start_response):
    """Asks for more memory than it may have."""
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), limits[1]))
    try:
        return "%d" % len(b"x" * (1 << 30))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("not even that")


def act_unprintable(environ, query, start_response):
    raise Unprintable


def act_header(environ, query, start_response):
    start_response("200 OK", TEXT + [("X-Long", "x" * int(query))])
    return [b"a long head"]


# It meddles with what is around it.


def act_noise(environ, query, start_response):
    if query == "print":
        print("HTTP/1.1 200 OK\r\n\r\nnoise", flush=True)
    elif query == "write":
        os.write(1, b"\x00\x01\x02 noise")
    elif query == "sys.stdout.close":
        sys.stdout.close()
    elif query == "close":
        os.close(1)
    elif query == "closerange":
        os.closerange(3, 256)
    return "quiet again"


def act_garbage(environ, query, start_response):
    """Writes to every socket of the process what no worker writes: the one with frames is among them."""
    for fd in range(3, 64):
        try:
            sock = socket.socket(fileno=os.dup(fd))
            if sock.family == socket.AF_UNIX:
                sock.send(b"HTTP/1.1 200 OK\r\n\r\n")
        except OSError:
            pass
    time.sleep(5)
    return "nobody sees this"


def act_handlers(environ, query, start_response):
    for signum in range(1, signal.NSIG):
        try:
            signal.signal(signum, signal.SIG_IGN)
        except (OSError, ValueError):
            pass  # KILL and STOP
    return "deaf"


def act_settle(environ, query, start_response):
    """Changes what the whole process has only once."""
    with tempfile.TemporaryDirectory() as gone:
        os.chdir(gone)
    os.umask(0o777)
    locale.setlocale(locale.LC_ALL, "C")
    os.environ.clear()
    sys.path.clear()
    sys.setrecursionlimit(200)
    return "settled"


def act_grow(environ, query, start_response):
    LEAKED.append(bytearray(int(query)))
    return "%d" % os.getpid()


# It starts what stays.


def act_fork(environ, query, start_response):
    """A child that lives on, one that comes back into the worker, or one made by C code, unknown to Python."""
    if query == "linger":
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        return "%d" % pid
    if query == "return":
        pid = os.fork()
        if pid == 0:
            return "the child's answer"
        return "%d" % os.waitpid(pid, 0)[1]
    if query == "multiprocessing":
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
        child.start()
        child.join()
        return "%d" % child.exitcode
    libc = ctypes.PyDLL(None)
    pid = libc.fork()
    if pid == 0:
        libc.sleep(60)
        libc._exit(0)
    mark(query, "%d" % pid)
    os.kill(os.getpid(), signal.SIGKILL)


def act_descriptors(environ, query, start_response):
    """Which of its descriptors a program inherits that is started with all that can be inherited."""
    code = "import os\nfor fd in range(3, 256):\n    try: print(os.readlink('/proc/self/fd/%d' % fd))\n    except OSError: pass"
    return subprocess.run([sys.executable, "-c", code], close_fds=False, stdout=subprocess.PIPE).stdout.decode()


def act_thread(environ, query, start_response):
    """A thread that never ends, and that the interpreter waits for when it should."""
    threading.Thread(target=time.sleep, args=(3600,)).start()
    return "%d" % os.getpid()


def act_late(environ, query, start_response):
    """Speaks of its request when that is over."""
    extend, hint = environ["uringd.extend_deadline"], environ["wsgi.early_hints"]

    def speak():
        time.sleep(0.1)
        extend(5)
        hint([("Link", "</late>")])
        mark(query)

    threading.Thread(target=speak, daemon=True).start()
    return "over"


# It streams.


class Pieces:
    """Pieces without end; its end leaves a trace."""

    def __init__(self, path, pause):
        self.path, self.pause = path, pause

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(self.pause)
        return b"piece\n"

    def close(self):
        mark(self.path)


def act_endless(environ, query, start_response):
    pause, path = query.split(",")
    start_response("200 OK", TEXT)
    return Pieces(path, float(pause))


def act_waiting(environ, query, start_response):
    """One piece, then nothing until the client is gone."""
    start_response("200 OK", TEXT)
    yield b"piece\n"
    until = time.monotonic() + 15
    while time.monotonic() < until:
        if environ["uringd.client_disconnected"]():
            return mark(query)
        time.sleep(0.005)
