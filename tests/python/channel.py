"""uringd's end of the worker protocol, slow and obvious: the tests drive the worker file with it.

docs/worker-protocol.md says what is sent here. Every frame read is checked to the last byte.
"""

import array
import fcntl
import glob
import json
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

WORKER = os.path.join(
    os.path.dirname(os.path.abspath(__file__)), "..", "..", "python", "uringd_worker.py"
)
REQUEST = 1
RESPONSE, BEGIN, PIECE, END, FILE, READY, FAILED, HINTS, EXTEND = range(1, 10)
WAIT_SECONDS = 20.0

# How uringd starts it: a short command line, the source in a file of memory at descriptor 4.
# `types` first: PyPy 7.3.11 cannot always import it after it has compiled much ("dictionary changed
# size during iteration"; not without its JIT, nor when the collector comes at another time).
BOOT = "import types; exec(compile(open('/proc/self/fd/4').read(), 'uringd_worker.py', 'exec'))"


def marshal_string(text):
    """The codes that uringd uses, and no others: Z short interned ASCII, a ASCII, u UTF-8."""
    data = text.encode("utf-8", "surrogatepass")
    if len(data) != len(text):
        return b"u" + struct.pack("<I", len(data)) + data
    if len(data) < 256:
        return b"Z" + bytes([len(data)]) + data
    return b"a" + struct.pack("<I", len(data)) + data


def marshal_value(value):
    return b"g" + struct.pack("<d", value) if type(value) is float else marshal_string(value)


def marshal_dict(values):
    pairs = [marshal_string(key) + marshal_value(value) for key, value in values.items()]
    return b"{" + b"".join(pairs) + b"0"


PLACES = (
    "REQUEST_METHOD",
    "PATH_INFO",
    "QUERY_STRING",
    "SERVER_PROTOCOL",
    "REQUEST_URI",
    "REMOTE_ADDR",
    "REMOTE_PORT",
    "uringd.request_id",
    "uringd.queue_seconds",
    "uringd.deadline",
)


def marshal_environ(environ):
    """The tuple of docs/worker-protocol.md: values whose place says their key, then a dict."""
    fixed = b"".join(marshal_value(environ[key]) for key in PLACES)
    rest = {key: value for key, value in environ.items() if key not in PLACES}
    return b")" + bytes([len(PLACES) + 1]) + fixed + marshal_dict(rest)


def request_environ(path="/", method="GET", query="", id="r-1", **more):
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REQUEST_URI": path + ("?" + query if query else ""),
        "REMOTE_ADDR": "127.0.0.1",
        "REMOTE_PORT": "40000",
        "HTTP_HOST": "localhost:8000",
        "uringd.request_id": id,
        "uringd.queue_seconds": 0.25,
        "uringd.deadline": time.monotonic() + 30,
    }
    environ.update(more)
    return environ


def request_frame(id, environ, body=b"", file_bytes=None, marked=False):
    environ = marshal_environ(environ)
    payload = struct.pack("<I", len(environ)) + environ
    payload += body if file_bytes is None else struct.pack("<Q", file_bytes)
    flags = (file_bytes is not None) | 2 * marked
    return struct.pack("<IIBBH", len(payload), id, REQUEST, flags, 0) + payload


class Answer:
    """What the frames of one request amount to."""

    def __init__(self):
        self.kinds, self.status, self.reason, self.headers = [], None, None, []
        self.body, self.failed, self.hints, self.extended, self.times = b"", False, [], [], []
        self.whole = False

    def header(self, name):
        return [v for k, v in self.headers if k.lower() == name.lower()]


class Data:
    """uringd's ends of one channel."""

    def __init__(self):
        self.data, self.data_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.fds, self.fds_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.page_fd = memory_file(b"\0" * 4096)
        self.page = mmap.mmap(self.page_fd, 4096)
        self.data.settimeout(WAIT_SECONDS)
        self.fds.settimeout(WAIT_SECONDS)
        self.pending, self.next_id = b"", 1

    def theirs(self):
        return [self.data_theirs.fileno(), self.fds_theirs.fileno(), self.page_fd]

    def handed_over(self):
        self.data_theirs.close()
        self.fds_theirs.close()
        os.close(self.page_fd)

    def close(self):
        self.data.close()
        self.fds.close()

    def send(self, *args, **keywords):
        """Sends one request and returns its id. body_file: its bytes go through a file. marked: the
        worker has to say in the page that it begins.
        """
        marked = keywords.pop("marked", False)
        body, body_file = keywords.pop("body", b""), keywords.pop("body_file", None)
        keywords.setdefault("CONTENT_LENGTH", str(len(body if body_file is None else body_file)))
        environ = request_environ(*args, **keywords)
        id, self.next_id = self.next_id, self.next_id + 1
        if body_file is None:
            self.data.sendall(request_frame(id, environ, body, marked=marked))
        else:
            fd = memory_file(body_file)
            self.fds.sendmsg(
                [b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            )
            os.close(fd)
            frame = request_frame(id, environ, file_bytes=len(body_file), marked=marked)
            self.data.sendall(frame)
        return id

    def read(self, count):
        while len(self.pending) < count:
            part = self.data.recv(1 << 20)
            if not part:
                raise EOFError("the worker ended the channel")
            self.pending += part
        data, self.pending = self.pending[:count], self.pending[count:]
        return data

    def frame(self):
        length, id, kind, flags, status = struct.unpack("<IIBBH", self.read(12))
        payload = self.read(length)
        return kind, id, flags, status, payload

    def answer(self, id):
        """Reads frames until the answer of this id is complete."""
        answer = Answer()
        while True:
            kind, of, flags, status, payload = self.frame()
            assert of == id, "a frame of %d, not of %d" % (of, id)
            answer.kinds.append(kind)
            answer.times.append(time.monotonic())
            assert flags == 0 or kind == END and flags == 1, (kind, flags)
            if kind in (RESPONSE, BEGIN, FILE, HINTS):
                size = struct.unpack_from("<I", payload)[0]
                head, rest = payload[4 : 4 + size], payload[4 + size :]
                assert len(head) == size and head.endswith(b"\r\n"), payload
                reason, *lines = head.decode("latin-1")[:-2].split("\r\n")
                fields = [tuple(line.split(": ", 1)) for line in lines]
            if kind == HINTS:
                assert (status, rest) == (103, b"")
                answer.hints.append(fields)
                continue
            if kind == EXTEND:
                answer.extended.append(struct.unpack("<I", payload)[0])
                continue
            if kind in (RESPONSE, BEGIN, FILE):
                assert answer.status is None and 200 <= status <= 999
                answer.status, answer.reason, answer.headers = status, reason, fields
            else:
                assert status == 0
            if kind == RESPONSE:
                answer.body, answer.whole = rest, True
                return answer
            if kind == BEGIN:
                assert rest == b""
            elif kind == PIECE:
                assert answer.status is not None and payload
                answer.body += payload
            elif kind == END:
                assert payload == b"" and answer.status is not None
                answer.failed = flags == 1
                return answer
            elif kind == FILE:
                answer.offset, answer.length = struct.unpack("<QQ", rest)
                fd = self.descriptor()
                answer.body = os.pread(fd, answer.length, answer.offset)
                os.close(fd)
                return answer
            else:
                raise AssertionError("a frame of kind %d" % kind)

    def ask(self, *args, **keywords):
        return self.answer(self.send(*args, **keywords))

    def descriptor(self):
        data, control, flags, _ = self.fds.recvmsg(1, socket.CMSG_SPACE(4))
        assert data and not flags & socket.MSG_CTRUNC
        return struct.unpack("i", control[0][2])[0]


def memory_file(data):
    """A file without a name. Not a memfd: PyPy cannot make one."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return os.dup(file.fileno())


def native_module():
    """The latest that cargo has made, or None."""
    target = os.environ.get("CARGO_TARGET_DIR") or os.path.join(
        os.path.dirname(WORKER), "../target"
    )
    pattern = os.path.join(target, "*", "build", "uringd-*", "out", "uringd_native.so")
    paths = [path for path in glob.glob(pattern) if os.path.getsize(path)]
    return max(paths, key=os.path.getmtime) if paths else None


class Zygote:
    """The worker file as a subprocess. Use as a context manager; `stderr()` is what it and its
    workers wrote.
    """

    def __init__(self, app, boot="-c", start=True, **options):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(WAIT_SECONDS)
        self.log = tempfile.NamedTemporaryFile()
        self.exits, self.channels, self.next_id = {}, [], 1
        with open(WORKER, "rb") as source:
            source = memory_file(source.read())

        def move():
            # To 3 and 4, by way of numbers that nothing has: either may be the other's here.
            control = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD, 50)
            code = fcntl.fcntl(source, fcntl.F_DUPFD, 50)
            os.dup2(control, 3)
            os.dup2(code, 4)
            os.close(control)
            os.close(code)

        command = [sys.executable] + (["-c", BOOT] if boot == "-c" else [WORKER])
        environ = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            preexec_fn=move,
            close_fds=False,
            env=environ,
        )
        theirs.close()
        os.close(source)
        self.options = dict(
            {"app": app, "threads": 1, "preload": False, "base": base_environ()}, **options
        )
        if start:
            path = native_module()
            with open(path or os.devnull, "rb") as native:
                self.tell({"start": self.options}, [native.fileno()] if path else [])
            self.first = self.hear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.control.close()
        for channel in self.channels:
            channel.close()
        try:
            self.process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def tell(self, record, descriptors=()):
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            if descriptors
            else []
        )
        self.control.sendmsg([json.dumps(record).encode()], ancillary)

    def hear(self):
        record = self.control.recv(65536)
        if not record:
            raise EOFError("the zygote ended its control socket")
        return json.loads(record)

    def fork(self):
        """(pid, channels) of a new worker. Its READY or FAILED frames are still to be read."""
        channels = [Data() for _ in range(self.options["threads"])]
        self.channels.extend(channels)
        id, self.next_id = self.next_id, self.next_id + 1
        self.tell({"fork": id}, [fd for channel in channels for fd in channel.theirs()])
        for channel in channels:
            channel.handed_over()
        while True:
            record = self.hear()
            if "exited" in record:
                self.exits[record["exited"]] = record["status"]
                continue
            assert record["forked"] == id, record
            return record["pid"], channels

    def worker(self):
        """(pid, channels) of a new worker that says it is ready."""
        pid, channels = self.fork()
        for channel in channels:
            kind, id, flags, status, payload = channel.frame()
            assert (kind, id, flags, status) == (READY, 0, 0, 0), (kind, payload.decode())
            assert json.loads(payload)["pid"] == pid
        return pid, channels

    def exit_status(self, pid):
        """Waits for the worker's end: its exit status, or minus the signal that ended it."""
        while pid not in self.exits:
            record = self.hear()
            self.exits[record["exited"]] = record["status"]
        status = self.exits[pid]
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def terminate(self, pid):
        """Ends an idle worker by SIGTERM and returns its exit status. Signals again: what comes in
        the moment before a recv is noticed when that recv is over.
        """
        until = time.monotonic() + WAIT_SECONDS
        while alive(pid):
            assert time.monotonic() < until, "SIGTERM does not end the worker"
            kill(pid, signal.SIGTERM)
            eventually(lambda: not alive(pid), 0.5)
        return self.exit_status(pid)

    def stderr(self):
        with open(self.log.name, "rb") as log:
            return log.read().decode("utf-8", "replace")


def base_environ():
    return {
        "SERVER_SOFTWARE": "uringd/0.1.0",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "8000",
        "SCRIPT_NAME": "",
        "wsgi.url_scheme": "http",
        "wsgi.multiprocess": True,
    }


def eventually(condition, seconds=WAIT_SECONDS):
    """Waits until the condition holds; what it returned last."""
    until = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > until:
            return value
        time.sleep(0.01)


def readable(sock, seconds):
    return bool(select.select([sock], [], [], seconds)[0])


def alive(pid):
    """Whether the process runs; a zombie does not."""
    try:
        with open("/proc/%d/stat" % pid) as info:
            return info.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid, signum=signal.SIGKILL):
    os.kill(pid, signum)
