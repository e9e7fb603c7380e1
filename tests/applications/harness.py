"""What the tests of this directory share: servers of one configuration, and clients of three kinds.

A test asks `serve` for a server, which is drained at the end and must then exit with 0. `Curl` and
`Session` speak to it as people's programs do and have the same methods; `Wire` sends bytes as they
are and looks at each byte that comes back. Every wait is for a condition and has a bound.
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
# Longest wait for anything that should happen at once, and for a server's start, in seconds.
# Generous: the machine may be busy with other things.
PATIENCE, START_PATIENCE = 60.0, 240.0

URINGD = os.environ.get("APPLICATIONS_URINGD", "uringd")
# The options of this run, the backend's first. `run` goes through all of them.
OPTIONS = os.environ.get("APPLICATIONS_OPTIONS", "--backend epoll").split()

# Read by uringd from the environment; a test's server must not be changed by who runs the test.
NOT_INHERITED = ("PORT", "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "DJANGO_SETTINGS_MODULE")


class Server:
    """A running uringd, and everything that it and its workers have written."""

    running = []

    def __init__(self, target, chdir=HERE, env=None, options=()):
        environ = {
            name: value
            for name, value in os.environ.items()
            if name not in NOT_INHERITED and not name.startswith("URINGD_")
        }
        environ["PYTHONDONTWRITEBYTECODE"] = "1"
        command = [URINGD, "--bind", "127.0.0.1:0", "--cores", "1", "--workers", "1"]
        command += ["--graceful-timeout", "10", "--python", sys.executable, "--chdir", chdir]
        for name, value in (env or {}).items():
            command += ["--env", "%s=%s" % (name, value)]
        self.text, self.grown = "", threading.Condition()
        self.process = subprocess.Popen(
            command + OPTIONS + list(options) + [target],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environ,
            preexec_fn=die_with_parent,
        )
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()
        Server.running.append(self)
        try:
            line = self.wait_for_log(" ready: http://", patience=START_PATIENCE)
        except AssertionError:
            self.stop(expected=None)
            raise
        address = line.partition(" ready: http://")[2].partition(",")[0]
        self.host, port = address.rsplit(":", 1)
        self.port, self.url = int(port), "http://" + address

    def read_log(self):
        for line in self.process.stdout:
            with self.grown:
                self.text += line.decode("utf-8", "replace")
                self.grown.notify_all()
        with self.grown:
            self.grown.notify_all()

    def wait_for_log(self, what, since=0, patience=PATIENCE):
        """The first line from there on that holds `what`."""
        until = time.monotonic() + patience
        with self.grown:
            while True:
                for line in self.text[since:].splitlines():
                    if what in line:
                        return line
                ended = self.process.poll() is not None and not self.reader.is_alive()
                left = until - time.monotonic()
                if ended or left <= 0:
                    raise AssertionError("%r is not in the log:\n%s" % (what, self.text[since:]))
                self.grown.wait(min(left, 0.2))

    def processes(self):
        """uringd itself, its zygote, and the workers."""
        found = [self.process.pid]
        for pid in found:
            for task in os.listdir("/proc/%d/task" % pid):
                with open("/proc/%d/task/%s/children" % (pid, task)) as children:
                    found += map(int, children.read().split())
        return found

    def stop(self, expected=0):
        """Drains it. Whatever happened, it may not have panicked and must end as expected."""
        Server.running.remove(self)
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.reader.join(PATIENCE)
        if expected is not None:
            assert status == expected, "uringd ended with %d:\n%s" % (status, self.text)
            assert "panicked" not in self.text, self.text


libc = ctypes.CDLL(None)


def die_with_parent():
    """PR_SET_PDEATHSIG: a server must not outlive the test that started it, however that ends."""
    libc.prctl(1, signal.SIGKILL)


def serve(target, **keywords):
    """A server for the tests of the module that is being set up."""
    server = Server(target, **keywords)
    unittest.addModuleCleanup(server.stop)
    return server


class Answer:
    """A response as a client saw it. Names compare without case, as HTTP has it."""

    def __init__(self, status, reason, headers, body):
        self.status, self.reason, self.headers, self.body = status, reason, headers, body

    def values(self, name):
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name):
        return (self.values(name) or [None])[0]

    @property
    def text(self):
        return self.body.decode("utf-8")

    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return "%d %s %r %.300r" % (self.status, self.reason, self.headers, self.body)


class File:
    """One file of a form."""

    def __init__(self, field, name, data, kind="application/octet-stream"):
        self.field, self.name, self.data, self.kind = field, name, data, kind


class Curl:
    """curl, one process for each request; the cookies are kept from one to the next."""

    def __init__(self, server):
        self.server = server
        self.directory = tempfile.mkdtemp(prefix="curl-")
        self.cookies = self.path("cookies")
        self.effective_url = None

    def close(self):
        shutil.rmtree(self.directory)

    def path(self, name):
        return os.path.join(self.directory, name)

    def ask(
        self, method, path, headers=(), fields=None, files=(), data=None, chunks=None, follow=False
    ):
        """`fields` and `files` are a form's; `data` has a length, `chunks` have none."""
        head, body = self.path("head"), self.path("body")
        command = ["curl", "--silent", "--show-error", "--max-time", "%d" % PATIENCE]
        command += ["--globoff", "--path-as-is", "--cookie", self.cookies]
        command += ["--cookie-jar", self.cookies, "--dump-header", head, "--output", body]
        command += ["--write-out", "%{url_effective}"]
        for name, value in headers:
            command += ["--header", "%s: %s" % (name, value)]
        if method == "HEAD":
            command.append("--head")
        elif not follow:
            # With --location it would be said again to whom the redirection leads.
            command += ["--request", method]
        if follow:
            command.append("--location")
        typed = None
        if files:
            for number, file in enumerate(files):
                source = self.path("file%d" % number)
                with open(source, "wb") as out:
                    out.write(file.data)
                form = "%s=@%s;filename=%s;type=%s" % (file.field, source, file.name, file.kind)
                command += ["--form", form]
            for name, value in (fields or {}).items():
                command += ["--form-string", "%s=%s" % (name, value)]
        elif fields is not None:
            for name, value in fields.items():
                command += ["--data-urlencode", "%s=%s" % (name, value)]
            if not fields:
                command += ["--data", ""]
        elif data is not None:
            command += ["--data-binary", "@-"]
            typed = data
        elif chunks is not None:
            command += ["--header", "Transfer-Encoding: chunked", "--upload-file", "-"]
            typed = b"".join(chunks)
        for stale in (head, body):
            if os.path.exists(stale):
                os.unlink(stale)
        done = subprocess.run(
            command + [self.server.url + path],
            input=typed,
            stdin=None if typed is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=2 * PATIENCE,
        )
        if done.returncode:
            raise ConnectionError("curl: %s" % done.stderr.decode("utf-8", "replace").strip())
        self.effective_url = done.stdout.decode()
        with open(head, "rb") as file:
            # One block for each answer on the way: 100, redirections.
            last = file.read().decode("latin-1").rstrip("\r\n").split("\r\n\r\n")[-1]
        status_line, *lines = last.split("\r\n")
        _, status, reason = (status_line.split(" ", 2) + [""])[:3]
        found = b""
        if method != "HEAD" and os.path.exists(body):
            with open(body, "rb") as file:
                found = file.read()
        fields = [tuple(part.strip() for part in line.split(":", 1)) for line in lines]
        return Answer(int(status), reason, fields, found)

    def in_a_row(self, path, times):
        """The bodies of so many requests by one process."""
        command = ["curl", "--silent", "--show-error", "--max-time", "%d" % PATIENCE]
        command += ["--write-out", "\n"] + times * [self.server.url + path]
        return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()


class Session:
    """What a browser does, by requests: connections and cookies are kept."""

    def __init__(self, server):
        import requests

        self.server = server
        self.session = requests.Session()
        self.session.trust_env = False
        self.effective_url = None

    def close(self):
        self.session.close()

    def ask(
        self, method, path, headers=(), fields=None, files=(), data=None, chunks=None, follow=False
    ):
        if chunks is not None:
            data = iter(chunks)
        elif fields is not None:
            data = fields
        form = [(file.field, (file.name, file.data, file.kind)) for file in files]
        answer = self.session.request(
            method,
            self.server.url + path,
            headers=dict(headers),
            data=data,
            files=form or None,
            allow_redirects=follow,
            timeout=PATIENCE,
        )
        self.effective_url = answer.url
        return Answer(
            answer.status_code, answer.reason, list(answer.raw.headers.items()), answer.content
        )

    def in_a_row(self, path, times):
        return [self.ask("GET", path).body for _ in range(times)]


class Clients:
    """Tests of an application, for each kind of client: subclass it with `client` and TestCase."""

    client = None
    maxDiff = None

    @classmethod
    def server(cls):
        """The server of the test's module."""
        return sys.modules[cls.__module__].server

    def setUp(self):
        self.browser = self.new_client()
        self.log_begins = len(self.server().text)

    def tearDown(self):
        # Whatever an application does, none of these does what uringd has to correct.
        said = self.server().text[self.log_begins :]
        for complaint in ("the server's alone", "Content-Length", "answered 500", "channel"):
            self.assertNotIn(complaint, said)

    def new_client(self, server=None):
        client = self.client(server or self.server())
        self.addCleanup(client.close)
        return client

    def get(self, path, **keywords):
        return self.browser.ask("GET", path, **keywords)

    def post(self, path, **keywords):
        return self.browser.ask("POST", path, **keywords)

    def assert_logged(self, what):
        self.server().wait_for_log(what, self.log_begins)


def with_both_clients(tests):
    """Two test cases of a mixin, put into its module: `...WithCurl`, `...WithSession`."""
    for client in (Curl, Session):
        name = "%sWith%s" % (tests.__name__, client.__name__)
        case = type(name, (tests, unittest.TestCase), {"client": client})
        case.__module__ = tests.__module__
        sys.modules[tests.__module__].__dict__[name] = case
    return tests


class Wire:
    """One connection, byte by byte. `ask` takes an answer apart by the letter of RFC 9112."""

    def __init__(self, server):
        self.socket = socket.create_connection((server.host, server.port), PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pending = b""

    def close(self):
        self.socket.close()

    def reset(self):
        """Leaves with a RST, which is no half-closed connection."""
        linger = (1).to_bytes(4, sys.byteorder) + (0).to_bytes(4, sys.byteorder)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def more(self):
        """False at the end of the connection."""
        data = self.socket.recv(1 << 16)
        self.pending += data
        return bool(data)

    def read_until(self, mark):
        while mark not in self.pending:
            if not self.more():
                raise EOFError("the connection ended after %r" % self.pending[-200:])
        found, _, self.pending = self.pending.partition(mark)
        return found

    def read(self, count):
        while len(self.pending) < count:
            if not self.more():
                raise EOFError("%d bytes of %d came" % (len(self.pending), count))
        found, self.pending = self.pending[:count], self.pending[count:]
        return found

    def ended(self):
        """Whether the connection ends, with nothing more on it."""
        try:
            while self.more():
                pass
        except ConnectionResetError:
            pass
        return not self.pending

    def request(self, target, method="GET", fields=(), body=None, version="1.1", chunks=None):
        lines = ["%s %s HTTP/%s" % (method, target, version), "Host: example.com"]
        lines += ["%s: %s" % field for field in fields]
        if chunks is not None:
            lines.append("Transfer-Encoding: chunked")
            pieces = [b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks if chunk]
            body = b"".join(pieces) + b"0\r\n\r\n"
        elif body is not None:
            lines.append("Content-Length: %d" % len(body))
        self.send(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body or b""))

    def head(self):
        status_line, *lines = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        protocol, status, reason = status_line.split(" ", 2)
        assert protocol == "HTTP/1.1", status_line
        fields = [tuple(line.split(": ", 1)) for line in lines]
        return Answer(int(status), reason, fields, b"")

    def answer(self, method="GET"):
        """The next final answer, with `interim`, the heads before it; `framing`, how its end was
        told: nothing, length, chunks or the end; and `whole`, whether that end came.
        """
        interim = []
        while True:
            answer = self.head()
            if answer.status >= 200:
                break
            interim.append(answer)
        answer.interim, answer.whole = interim, True
        if method == "HEAD" or answer.status in (204, 304):
            answer.framing = "nothing"
        elif answer.header("Transfer-Encoding") is not None:
            assert answer.values("Transfer-Encoding") == ["chunked"], answer
            assert answer.header("Content-Length") is None, answer
            answer.framing = "chunks"
            try:
                while True:
                    size = int(self.read_until(b"\r\n"), 16)
                    answer.body += self.read(size)
                    assert self.read(2) == b"\r\n", answer
                    if size == 0:
                        break
            except EOFError:
                answer.whole = False
        elif answer.header("Content-Length") is not None:
            assert len(answer.values("Content-Length")) == 1, answer
            answer.framing = "length"
            try:
                answer.body = self.read(int(answer.header("Content-Length")))
            except EOFError:
                answer.body, self.pending, answer.whole = self.pending, b"", False
        else:
            answer.framing = "end"
            try:
                while self.more():
                    pass
            except ConnectionResetError:
                answer.whole = False
            answer.body, self.pending = self.pending, b""
        return answer

    def ask(self, target, method="GET", **keywords):
        self.request(target, method, **keywords)
        return self.answer(method)


def eventually(condition, what):
    """Waits until the condition holds, and returns what it returned."""
    until = time.monotonic() + PATIENCE
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until, "still not: %s" % what
        time.sleep(0.01)


def pattern(length):
    """Bytes of which no two neighbouring pages are the same."""
    words = b"".join(b"%08x" % (number * 2654435761 % 2**32) for number in range(length // 8 + 1))
    return words[:length]
