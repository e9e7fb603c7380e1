"""The Python side of uringd: a zygote that forks workers, and the workers that run an application.

uringd never runs Python itself. It starts this file once per generation, embedded in its binary and
handed to `PYTHON -c`, so it must work without a `__file__`, with nothing but the standard library,
and on CPython 3.8 to 3.15 and PyPy. docs/worker-protocol.md is the contract of every record, frame
and page below.

    zygote   one thread, never serves; reads `start`, perhaps imports the application, forks when
             told to, reaps
    worker   one thread for each channel; a channel is a socket with frames, a socket that carries
             descriptors, and a page of memory in which uringd says what changes meanwhile. Or one
             channel for many requests at a time, each on a greenlet of gevent

The file reads from the inside out: what an application touches (wsgi.input, wsgi.errors,
wsgi.file_wrapper), an exchange (one request and its answer), a channel (the hot loop), the channel
for many requests at a time, a worker, how an application is found and why it was not, a
gunicorn.conf.py, the zygote.
"""

import ast
import fcntl
import gc
import importlib
import importlib.machinery
import importlib.util
import io
import json
import mmap
import os
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
from collections import deque
from io import BytesIO
from marshal import loads

try:
    import faulthandler
except ImportError:
    faulthandler = None

PROTOCOL = 1
CONTROL_FD = 3
RECORD_BYTES_MAX = 65536

# Frames: twelve bytes of header, little-endian. In both directions the first four bytes of most
# payloads are a length too (of the environ, of the head), so that one unpack or pack does for all.
REQUEST, REQUEST_WITH_FILE = 0x0001, 0x0101  # u8 type, u8 flags, u16 zero, read as one u32
MARKED = 0x0200  # a flag of both: see Channel.body
RESPONSE, BEGIN, PIECE, END, FILE, READY, FAILED, HINTS, EXTEND = range(1, 10)
END_FAILED = 0x0100
# Only on a channel for many requests at a time: to a worker, and from it.
CREDIT, GONE, CANCEL, PING = range(2, 6)
PONG, RETURN = 10, 11
unpack_prefix = struct.Struct("<IIII").unpack_from
pack_prefix = struct.Struct("<IIII").pack
pack_header = struct.Struct("<III").pack
unpack_u32 = struct.Struct("<I").unpack_from
unpack_u64 = struct.Struct("<Q").unpack_from
pack_file = struct.Struct("<QQ").pack
pack_u32_into = struct.Struct("<I").pack_into

PAGE_BYTES = 4096
PAGE_GONE, PAGE_END, PAGE_BEGUN, PAGE_HELD = 0, 4, 8, 12

# Below malloc's mmap threshold: a larger buffer is mapped and unmapped for every recv, which costs
# more than the request.
RECEIVE_BYTES = 65536
# More is a violation to uringd, so it is an error of the application here.
HEAD_BYTES_MAX = 65536
# A larger answer is sent from where it lies instead of being joined to its head.
COPY_BYTES_MAX = 65536
# A body is cut into pieces of this size; the header could say four times as much.
PAYLOAD_BYTES_MAX = 1 << 30
# Where answers share a channel, none may hold it: a longer body goes in pieces, and so far ahead of
# what uringd has taken in.
SHARED_WHOLE_BYTES_MAX, SHARED_PIECE_BYTES_MAX, WINDOW_BYTES = 131072, 65536, 262144
# Quick requests follow each other on one greenlet for so long, then what they answered leaves; and
# after so long, other things that became ready have their turn.
SLICE_SECONDS, TURN_SECONDS = 0.001, 0.005

# The answers of one batch leave in one send if its requests are quick; else each leaves before the
# next request runs, for a finished answer must not wait for a slow one behind it. A batch of more
# than one request that takes less than QUICK_SECONDS from its first answer to its last earns one
# point, of twice QUICK_BATCHES at most; another loses SLOW_COST for each QUICK_SECONDS. A worker
# with QUICK_BATCHES points is quick. The clock is looked at twice for such a batch, and not at all
# when requests come one by one.
QUICK_BATCHES, QUICK_SECONDS, SLOW_COST, HELD_MAX = 256, 0.002, 16, 32

EXIT_GARBAGE, EXIT_LOAD = 70, 4  # sysexits' EX_SOFTWARE; gunicorn's APP_LOAD_ERROR
MSG_CMSG_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0x40000000)  # PyPy does not name it

# gevent puts its own into these modules, for the application. This file means the real ones.
real_socket, real_poll, real_fork, real_waitpid = socket.socket, select.poll, os.fork, os.waitpid
real_sleep, thread_ident = time.sleep, threading.get_ident


# What an environ's first places mean: docs/worker-protocol.md.
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


# What an application touches.


class BodyFile(io.RawIOBase):
    """A request body in a file: reads at its own position, for the offset is shared with uringd."""

    def __init__(self, fd, length):
        self.fd, self.length, self.at = fd, length, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer):
        if self.closed:
            raise ValueError("the request is over: its wsgi.input is closed")
        data = os.pread(self.fd, min(len(buffer), self.length - self.at), self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = min(self.length, max(0, offset + (0, self.at, self.length)[whence]))
        return self.at

    def close(self):
        if not self.closed:
            os.close(self.fd)
        super().close()


class Errors:
    """wsgi.errors: whole lines to standard error, each with the id of the request it belongs to."""

    encoding = "utf-8"

    def __init__(self, exchange):
        self.exchange, self.partial = exchange, ""

    def write(self, text):
        if not isinstance(text, str):
            raise TypeError("wsgi.errors.write() takes text, not %s" % type(text).__name__)
        lines = (self.partial + text).split("\n")
        self.partial = lines.pop()
        if self.partial:
            self.exchange.rare = True
        self.emit(lines)
        return len(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        if self.partial:
            lines, self.partial = [self.partial], ""
            self.emit(lines)

    def isatty(self):
        return False

    def emit(self, lines):
        id = self.exchange.environ.get("uringd.request_id")
        mark = "[%s] " % id if id else ""
        write_stderr("".join([mark + line + "\n" for line in lines]))


def write_stderr(text):
    """To descriptor 2 in one write, so that the lines of several workers do not mix; sys.stderr may
    be replaced.
    """
    data = text.encode("utf-8", "backslashreplace")
    try:
        while data:
            data = data[os.write(2, data) :]
    except OSError:
        pass  # Nobody reads the log. That is no reason to fail a request.


class FileWrapper:
    """wsgi.file_wrapper. Returned as it is over a real file, it hands uringd the file itself."""

    def __init__(self, filelike, blksize=65536):
        self.filelike, self.blksize = filelike, blksize
        if hasattr(filelike, "close"):
            self.close = filelike.close

    def __iter__(self):
        read, blksize = self.filelike.read, self.blksize
        while True:
            data = read(blksize)
            if not data:
                return
            yield data


def regular_file(filelike):
    """(descriptor, offset, bytes from there to the end) if reading `filelike` is reading a regular
    file, else None.

    Only types known to give the bytes of their descriptor: a GzipFile has a fileno() too, of the
    compressed file.
    """
    if type(filelike).__module__ == "tempfile" and hasattr(filelike, "file"):
        filelike = filelike.file  # NamedTemporaryFile's wrapper
    raw = filelike if type(filelike) is io.FileIO else getattr(filelike, "raw", None)
    if (
        type(filelike) not in (io.FileIO, io.BufferedReader, io.BufferedRandom)
        or type(raw) is not io.FileIO
    ):
        return None
    try:
        if not filelike.readable():
            return None
        if type(filelike) is io.BufferedRandom:
            filelike.flush()
        fd, offset = filelike.fileno(), filelike.tell()
        info = os.fstat(fd)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(info.st_mode):
        return None
    return fd, offset, max(0, info.st_size - offset)


# An exchange: one request and its answer.


class Statuses(dict):
    """The third word of a RESPONSE's header (kind and code) and the reason line, for each status
    that an application has used: parsed and checked once.
    """

    def __missing__(self, status):
        check_status(status)
        parsed = RESPONSE | int(status[:3]) << 16, status[4:] + "\r\n"
        if len(self) < 1000:
            self[status] = parsed
        return parsed


STATUSES = Statuses()


def check_status(status):
    if type(status) is not str:
        raise TypeError("the status given to start_response is %s, not str" % type(status).__name__)
    if (
        not (status[:3].isdigit() and status[:3].isascii() and status[3:4] in ("", " "))
        or status[0] not in "23456789"
    ):
        raise ValueError(
            "the status %r is not three digits (200 to 999), a space and a reason" % status
        )
    if any(c < " " and c != "\t" or c == "\x7f" for c in status):
        raise ValueError("the status %r has a control character" % status)


def check_headers(headers):
    """Raises what is wrong with the headers, in words. The hot loop only notices that it is."""
    if not isinstance(headers, list):
        raise TypeError(
            "the headers given to start_response are %s, not a list" % type(headers).__name__
        )
    for field in headers:
        if not isinstance(field, tuple) or len(field) != 2:
            raise TypeError("the header %r is not a tuple of name and value" % (field,))
        for what, text in zip(("name", "value"), field):
            if not isinstance(text, str):
                raise TypeError(
                    "the %s of header %r is %s, not str" % (what, field, type(text).__name__)
                )
            if "\n" in text or "\r" in text:
                raise ValueError("the %s of header %r has a line break" % (what, field))
            try:
                text.encode("latin-1")
            except UnicodeEncodeError:
                raise ValueError(
                    "the %s of header %r has characters beyond latin-1" % (what, field)
                ) from None


def encode_head(reason, headers):
    """The reason, then `name: value CRLF` of each field. A line break within one would be a field
    of its own to the reader. The hot loop has the same lines in line.
    """
    lines = "".join([name + ": " + value + "\r\n" for name, value in headers])
    if lines.count("\n") != len(headers):
        check_headers(headers)
    head = (reason + lines).encode("latin-1")
    if len(head) > HEAD_BYTES_MAX:
        raise ValueError(
            "the headers are %d bytes long, more than %d" % (len(head), HEAD_BYTES_MAX)
        )
    return head


def check_body(piece):
    """The piece as bytes, or a TypeError that says what it is instead."""
    if isinstance(piece, (bytearray, memoryview)):
        return bytes(piece)
    if not isinstance(piece, bytes):
        raise TypeError(
            "a piece of the body is %s, not bytes: %.60r" % (type(piece).__name__, piece)
        )
    return piece


class ClientGone(BrokenPipeError):
    """Ends an answer that nobody reads: what makes it is closed, and the rest is never made."""


class Exchange:
    """The state of one request and its answer, and the callables that its environ holds.

    A channel answers in order, so its hot loop uses one exchange for all its requests. `started` is
    None, then what start_response was given; `begun` says that something left for uringd; `ended`
    that the answer is complete. `rare` tells the hot loop with one look that anything at all is not
    as usual: see Channel.tidy.
    """

    __slots__ = (
        "channel",
        "id",
        "environ",
        "started",
        "begun",
        "ended",
        "remaining",
        "body_file",
        "errors",
        "write",
        "rare",
        "may_wait",
    )
    whole_bytes_max = PAYLOAD_BYTES_MAX  # of a body that is sent in one frame

    def __init__(self, channel):
        self.channel = channel
        self.id = 0
        self.environ = {}
        self.started = None
        self.begun = self.ended = False
        self.remaining = None  # of the bytes that the application's Content-Length promised
        self.body_file = None
        self.rare = False
        self.may_wait = False  # for the answers of its batch: see QUICK_BATCHES
        self.errors = Errors(self)
        self.write = self.put  # bound once: start_response returns it for every request

    def start_response(self, status, headers, exc_info=None):
        if self.started is not None:
            if exc_info is None:
                raise AssertionError("start_response was called a second time without exc_info")
            if self.begun:
                try:
                    raise exc_info[1].with_traceback(exc_info[2])
                finally:
                    exc_info = None
        self.started = status, headers
        return self.write

    # What uringd offers beyond PEP 3333, also to a thread that the application started.

    def early_hints(self, headers):
        """Sends a 103 answer with these fields, a list of (name, value), before the response."""
        head = encode_head("Early Hints\r\n", headers)
        if not self.begun:
            self.channel.send_now(
                pack_prefix(4 + len(head), self.id, HINTS | 103 << 16, len(head)) + head
            )

    def extend_deadline(self, seconds):
        """Lets this request run for so many seconds from now, within the configured maximum."""
        milliseconds = min(max(int(seconds * 1000), 0), 0xFFFFFFFF)
        self.channel.send_now(pack_prefix(4, self.id, EXTEND, milliseconds))

    def client_disconnected(self):
        """Whether the client of this request is known to be gone."""
        return unpack_u32(self.channel.page, PAGE_GONE)[0] == self.id

    # The answer, in every form but the hot loop's.

    def respond(self, result, iterator=None, first=(), error=None):
        """Sends what the application returned, and closes it whatever happens. The rest is how far
        the native module has come: `iterator` is of `result`, and has given `first`.
        """
        try:
            try:
                if error is not None:
                    raise error
                if type(result) is FileWrapper and self.send_file(result):
                    pass
                elif iterator is None and isinstance(result, (list, tuple)) and not self.begun:
                    # It is there as a whole, so it leaves as a whole, and uringd counts it.
                    self.whole(b"".join(result))
                else:
                    for piece in first:
                        self.put(piece)
                    for piece in result if iterator is None else iterator:
                        self.put(piece)
                    self.end()
            except BaseException as error:
                self.fail(error)
        finally:
            close = getattr(result, "close", None)
            if close is not None:
                try:
                    if not self.may_wait:
                        self.channel.flush()
                    close()
                except BaseException as error:
                    self.fail(error)

    def send_file(self, result):
        if self.begun or self.started is None:
            return False
        found = regular_file(result.filelike)
        if found is None:
            return False
        fd, offset, length = found
        promised = self.content_length()
        if promised is not None:
            length = min(length, promised)
        code, head = self.head()
        self.begun = self.ended = self.rare = True
        channel = self.channel
        channel.send_descriptor(fd)
        payload = head + pack_file(offset, length)
        channel.out.append(pack_prefix(4 + len(payload), self.id, FILE | code, len(head)) + payload)
        channel.flush()
        return True

    def put(self, piece):
        """One piece of the body, from an iterator or write(): PEP 3333 wants it on its way before
        this returns.
        """
        if type(piece) is not bytes:
            piece = check_body(piece)
        if not piece:
            return
        channel = self.channel
        if self.begun and self.client_disconnected():
            raise ClientGone("the client has left before the end of its answer")
        if not self.begun:
            if self.started is None:
                raise AssertionError(
                    "the application gave a piece of its body before it called start_response"
                )
            promised = self.content_length()
            if promised is not None and len(piece) == promised <= PAYLOAD_BYTES_MAX:
                # Nothing more may follow, so the answer is whole, and goes before the iterator is
                # asked again.
                self.whole(piece)
                self.remaining = 0
                if not self.may_wait:
                    channel.flush()
                return
            self.begin(promised)
        if self.remaining is not None:
            if len(piece) > self.remaining:
                piece = piece[: max(0, self.remaining)]
                if self.remaining >= 0:
                    self.errors.write(
                        "the body is longer than its Content-Length: the excess was not sent\n"
                    )
                self.remaining = -1  # said once
            else:
                self.remaining -= len(piece)
            if not piece:
                return
        self.send_piece(piece)

    def send_piece(self, piece):
        channel = self.channel
        for at in range(0, len(piece), PAYLOAD_BYTES_MAX):
            part = piece if len(piece) <= PAYLOAD_BYTES_MAX else piece[at : at + PAYLOAD_BYTES_MAX]
            channel.send_frame(pack_header(len(part), self.id, PIECE), part)
        channel.flush()

    def begin(self, promised=None):
        code, head = self.head()
        self.begun = self.rare = True
        self.remaining = promised
        prefix = pack_prefix(4 + len(head), self.id, BEGIN | code, len(head))
        self.channel.out.append(prefix + head)

    def end(self):
        """After the last piece: closes the answer that was begun, or gives one without a body."""
        if self.ended:
            return
        if not self.begun:
            self.whole(b"")
            return
        kind = END
        if (self.remaining or 0) > 0 and not self.bodiless():
            self.errors.write(
                "the body is %d bytes shorter than its Content-Length\n" % self.remaining
            )
            kind |= END_FAILED
        self.ended = True
        self.channel.out.append(pack_header(0, self.id, kind))
        self.channel.flush()

    def whole(self, body):
        if self.started is None:
            raise AssertionError("the application returned without having called start_response")
        if len(body) > self.whole_bytes_max:
            if self.content_length() is None:
                # In a list of our own: the application may give its list again.
                status, headers = self.started
                self.started = status, headers + [("Content-Length", str(len(body)))]
            self.begin()
            if not self.bodiless():
                self.send_piece(body)
            self.end()
            return
        code, head = self.head()
        self.begun = self.ended = self.rare = True
        payload_bytes = 4 + len(head) + len(body)
        prefix = pack_prefix(payload_bytes, self.id, RESPONSE | code, len(head))
        self.channel.send_frame(prefix + head, body)

    def head(self):
        status, headers = self.started
        kind, reason = STATUSES[status]
        return kind & ~0xFFFF, encode_head(reason, headers)

    def content_length(self):
        for name, value in self.started[1]:
            if len(name) == 14 and name.lower() == "content-length" and value.isdigit():
                return int(value)
        return None

    def bodiless(self):
        return self.environ.get("REQUEST_METHOD") == "HEAD" or self.started[0][:3] in ("204", "304")

    def fail(self, error):
        """The application raised: 500 if nothing was sent, a broken answer if something was; one
        traceback.
        """
        worker = self.channel.worker
        if os.getpid() != worker.pid:
            leave_forked_child(error)
        if isinstance(error, ChannelError):
            raise error
        if isinstance(error, ClientGone) and self.begun:
            self.break_off()
            return
        if app_frames(error.__traceback__) is None:
            error = self.explain(error)
        try:
            self.errors.flush()
            method, path = self.environ.get("REQUEST_METHOD"), self.environ.get("RAW_URI")
            self.errors.write(
                "the application failed in %s %s\n%s" % (method, path, format_error(error))
            )
        except Exception:
            # An exception whose text cannot be made must not take the answer with it.
            write_stderr(
                "the application failed with %s, which cannot be printed\n" % type(error).__name__
            )
        if not self.begun:
            self.started = "500 Internal Server Error", [
                ("Content-Type", "text/plain; charset=utf-8")
            ]
            self.whole(b"Internal Server Error\n")
        else:
            self.break_off()
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            worker.end(exit_status(error))

    def break_off(self):
        if not self.ended:
            self.ended = True
            self.channel.out.append(pack_header(0, self.id, END | END_FAILED))

    def explain(self, error):
        """An error that no frame of the application raised is about what it gave us: say that in
        words.
        """
        try:
            if self.started is not None and not self.begun:
                STATUSES[self.started[0]]
                check_headers(self.started[1])
        except (TypeError, ValueError) as clear:
            clear.__context__ = None  # the error that it explains
            return clear.with_traceback(None)
        if isinstance(error, TypeError) and "sequence item" in str(error):
            return TypeError("the body is a list with something other than bytes in it: %s" % error)
        if isinstance(error, TypeError) and "not iterable" in str(error):
            return TypeError("the application returned no iterable of bytes: %s" % error)
        return error


def exit_status(error):
    code = getattr(error, "code", 1)
    return 0 if code is None else code & 0xFF if isinstance(code, int) else 1


def leave_forked_child(error=None):
    """A child that the application forked came back to us. It has no channel; it ends as if it had
    exited.
    """
    status = EXIT_GARBAGE
    if isinstance(error, SystemExit):
        status = exit_status(error)
    elif error is not None and not isinstance(error, ChannelError):
        write_stderr("a child forked by the application failed\n" + format_error(error))
        status = 1
    else:
        write_stderr(
            "a child forked by the application returned into the worker; use os._exit() in it\n"
        )
    flush_standard_streams()
    os._exit(status)


def flush_standard_streams():
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            pass  # closed, or something else that the application has put there


# A channel: two sockets and a page, served by one thread.


class ChannelError(BrokenPipeError):
    """uringd has gone, or this is a child that has no channel: nothing can be answered any more."""


class Channel:
    def __init__(self, worker, data_fd, fds_fd, page_fd):
        self.worker = worker
        self.data = real_socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, data_fd)
        self.fds = real_socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fds_fd)
        self.page = mmap.mmap(page_fd, PAGE_BYTES)
        os.close(page_fd)
        # Frames that are ready and not yet sent. Only the channel's own thread touches it.
        self.out = []
        self.lock = threading.Lock()  # of the data socket's writing side: see send_now
        self.thread = None
        self.exchange = None
        for sock in (self.data, self.fds):
            sock.setblocking(True)

    def run(self, app):
        """Serves until uringd ends the channel or the worker ends; a frame that breaks a rule ends
        the worker.
        """
        self.thread = threading.get_ident()
        try:
            self.serve(app)
        except BaseException as error:
            if os.getpid() != self.worker.pid:
                leave_forked_child(None if isinstance(error, OSError) else error)
            if not isinstance(error, (BrokenPipeError, ConnectionResetError)):
                write_stderr(
                    "uringd worker %d: the channel failed\n%s"
                    % (os.getpid(), format_error(error, True))
                )
                self.worker.end(EXIT_GARBAGE)
        finally:
            self.close()
            self.worker.end()

    def serve(self, app):
        """The hot loop: one recv, one loads, one copy and update and one send; everything rare is
        elsewhere. The tuple is PLACES, and what not every request has. Where there is a native
        module (uringd_native.rs), it does the same for what is as usual.
        """
        worker, page, out, lock = self.worker, self.page, self.out, self.lock
        receive, send, clock, join = self.data.recv, self.data.sendall, time.perf_counter, b"".join
        unpack, pack, statuses, kind_of_most = unpack_prefix, pack_prefix, STATUSES, REQUEST
        copy_bytes_max = COPY_BYTES_MAX
        exchange = self.exchange = Exchange(self)
        start_response = exchange.start_response
        pre_request = worker.hooks.get("pre_request")
        post_request = worker.hooks.get("post_request")
        base_copy = worker.base_environ(exchange).copy
        native = None
        if worker.zygote.native is not None and pre_request is None:
            native, start_response = worker.zygote.native.bind(
                exchange,
                app,
                statuses,
                out,
                BytesIO,
                FileWrapper,
                self.flush,
                self.tidy,
                start_response,
                exchange.write,
                PLACES,
            )
        quick, held_from = 0, 0.0
        exchange.environ = environ = base_copy()
        while not page[PAGE_END]:
            data = receive(RECEIVE_BYTES)
            if not data:
                return
            at, size = 0, len(data)
            while True:
                if size - at < 16:
                    data = self.receive_rest(data[at:], 16)
                    at, size = 0, len(data)
                handled = None
                if native is not None:
                    handled = native(data, at, environ, start_response, quick >= QUICK_BATCHES)
                if type(handled) is int:
                    stop = handled
                elif handled is not None:
                    stop, result, iterator, first, error = handled
                    exchange.may_wait = stop < size and quick >= QUICK_BATCHES
                    self.take_over(exchange, result, iterator, first, error)
                    handled = iterator = first = error = None
                else:
                    payload_bytes, id, kind, environ_bytes = unpack(data, at)
                    stop = at + 12 + payload_bytes
                    if stop > size:
                        data = self.receive_rest(data[at:], 12 + payload_bytes)
                        at, size, stop = 0, len(data), 12 + payload_bytes
                    split = at + 16 + environ_bytes
                    (
                        environ["REQUEST_METHOD"],
                        environ["PATH_INFO"],
                        environ["QUERY_STRING"],
                        environ["SERVER_PROTOCOL"],
                        uri,
                        environ["REMOTE_ADDR"],
                        port,
                        environ["uringd.request_id"],
                        environ["uringd.queue_seconds"],
                        environ["uringd.deadline"],
                        more,
                    ) = loads(data[at + 16 : split])
                    environ["REQUEST_URI"] = environ["RAW_URI"] = uri
                    if port:
                        environ["REMOTE_PORT"] = port
                    environ.update(more)
                    if split == stop and kind == kind_of_most:
                        environ["wsgi.input"] = BytesIO()
                    else:
                        environ["wsgi.input"] = self.body(exchange, kind, id, data, split, stop)
                    exchange.id, exchange.started = id, None
                    try:
                        if pre_request is not None:
                            pre_request(exchange)
                        result = app(environ, start_response)
                        started = exchange.started
                        if type(result) is list and started is not None and not exchange.rare:
                            body = join(result)
                            status, headers = started
                            kind, reason = statuses[status]
                            lines = "".join(
                                [name + ": " + value + "\r\n" for name, value in headers]
                            )
                            if lines.count("\n") != len(headers):
                                check_headers(headers)
                            head = (reason + lines).encode("latin-1")
                            head_bytes, body_bytes = len(head), len(body)
                            if head_bytes + body_bytes > copy_bytes_max:
                                exchange.whole(body)
                                self.tidy(exchange)
                            else:
                                out.append(
                                    pack(4 + head_bytes + body_bytes, id, kind, head_bytes)
                                    + head
                                    + body
                                )
                        else:
                            exchange.may_wait = stop < size and quick >= QUICK_BATCHES
                            exchange.respond(result)
                            self.tidy(exchange)
                    except BaseException as error:
                        exchange.fail(error)
                        self.tidy(exchange)
                if post_request is not None:
                    self.flush()
                    post_request(exchange)
                # So that an idle worker does not hold what it answered last.
                result = body = None
                at = stop
                if at == size:
                    break
                if page[PAGE_END]:
                    self.flush()
                    return
                if not held_from:
                    held_from = clock()
                if quick < QUICK_BATCHES or len(out) >= HELD_MAX:
                    # What sending takes is not the application's slowness: the reader may run.
                    sent_from = clock()
                    self.flush()
                    held_from += clock() - sent_from
                else:
                    # Should the next request never end, uringd knows that it is that one.
                    page[PAGE_HELD] = len(out)
                exchange.environ = environ = base_copy()
            if held_from:
                page[PAGE_HELD] = 0
            if out:
                with lock:
                    send(out[0] if len(out) == 1 else join(out))
                out.clear()
            if held_from:
                took = clock() - held_from
                if took > QUICK_SECONDS:
                    quick = max(0, quick - int(took / QUICK_SECONDS) * SLOW_COST)
                elif quick < 2 * QUICK_BATCHES:
                    quick += 1
                held_from = 0.0
            # Prepared after the answer has left, where nobody waits for it.
            exchange.environ = environ = base_copy()

    def take_over(self, exchange, *left):
        """What the native module has left of a request that was not as usual."""
        try:
            exchange.respond(*left)
        except BaseException as error:
            exchange.fail(error)
        self.tidy(exchange)

    def body(self, exchange, kind, id, data, split, stop):
        """wsgi.input of a request that has a body, inline or in a file, or that is marked: uringd
        wants to know that it was begun, because nobody else may run it then. Raises if the frame is
        garbage.
        """
        if kind & MARKED:
            kind &= ~MARKED
            pack_u32_into(self.page, PAGE_BEGUN, id)
        if kind == REQUEST and split <= stop:
            return BytesIO(data[split:stop])
        if kind == REQUEST_WITH_FILE and split + 8 == stop:
            file = BodyFile(self.receive_descriptor(), unpack_u64(data, split)[0])
            exchange.body_file = io.BufferedReader(file, 65536)
            exchange.rare = True
            return exchange.body_file
        raise ValueError("a frame of uringd is of no known kind, or holds less than it says")

    def tidy(self, exchange):
        """After a request that was not as usual: the exchange is made ready for the next one."""
        if exchange.errors.partial:
            exchange.errors.flush()
        if exchange.body_file is not None:
            exchange.body_file.close()
            exchange.body_file = None
        exchange.begun = exchange.ended = exchange.rare = exchange.may_wait = False
        exchange.remaining = None

    def receive_rest(self, data, needed):
        """A frame arrived in part: everything until it is whole. What is ready leaves first, for
        this may wait.
        """
        self.flush()
        parts, have = [data], len(data)
        while have < needed:
            part = self.data.recv(max(RECEIVE_BYTES, min(needed - have, 1 << 20)))
            if not part:
                raise ConnectionResetError("uringd ended the channel in the middle of a frame")
            parts.append(part)
            have += len(part)
        return b"".join(parts)

    def flush(self):
        out = self.out
        if out:
            self.page[PAGE_HELD] = 0
            self.send_locked(out[0] if len(out) == 1 else b"".join(out))
            out.clear()

    def send_frame(self, start, body):
        """A frame whose body may be large: joined to what is ready if small, sent from where it
        lies if not.
        """
        if len(body) <= COPY_BYTES_MAX:
            self.out.append(start + body)
            return
        self.out.append(start)
        start = b"".join(self.out)
        self.out.clear()
        self.page[PAGE_HELD] = 0
        self.send_locked(start, body)

    def send_now(self, frame):
        """A frame beside the answer, perhaps from another thread of the application."""
        if threading.get_ident() == self.thread:
            self.flush()
        self.send_locked(frame)

    def send_locked(self, start, body=b""):
        """All of both, in one piece on the socket whichever threads send: hence the lock."""
        try:
            with self.lock:
                if not body:
                    self.data.sendall(start)
                    return
                sent = self.data.sendmsg([start, body])
                if sent < len(start):
                    self.data.sendall(start[sent:])
                    sent = len(start)
                if sent < len(start) + len(body):
                    self.data.sendall(memoryview(body)[sent - len(start) :])
        except OSError as error:
            raise ChannelError(*error.args) from None

    def send_descriptor(self, fd):
        rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd)
        try:
            self.fds.sendmsg([b"f"], [rights])
        except OSError as error:
            raise ChannelError(*error.args) from None

    def receive_descriptor(self):
        descriptors = receive_descriptors(self.fds, 1, 1)[1]
        if len(descriptors) != 1:
            raise ValueError("a frame of uringd speaks of a descriptor that did not come")
        return descriptors[0]

    def tell(self, kind, payload):
        """READY or FAILED: a frame that belongs to no request."""
        self.send_now(pack_header(len(payload), 0, kind) + payload)

    def end(self):
        """The thread ends after its present request, or at once if it waits: its recv then returns
        nothing.
        """
        try:
            self.page[PAGE_END] = 1
            self.data.shutdown(socket.SHUT_RD)
        except (OSError, ValueError):
            pass  # closed already

    def close(self):
        for sock in (self.data, self.fds):
            try:
                sock.close()
            except OSError:
                pass  # the application has closed descriptors that were not its own


def receive_descriptors(sock, size, count):
    """(data, descriptors) of one recvmsg; more descriptors than expected, or lost ones, are an
    error.
    """
    data, control, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(4 * count), MSG_CMSG_CLOEXEC)
    descriptors = []
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(payload) // 4
            descriptors.extend(struct.unpack("%di" % whole, payload[: 4 * whole]))
    for fd in descriptors:
        os.set_inheritable(fd, False)
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        for fd in descriptors:
            os.close(fd)
        raise ValueError("a record of uringd was cut off")
    return data, descriptors


# A channel for many requests at a time.


class ClientGone(BrokenPipeError):
    """Nobody reads the rest of this answer."""


class SharingExchange(Exchange):
    """One of the requests that a multiplexed channel has at a time.

    `credit` is how many bytes of its body uringd will still take in. `runner` is what runs it, None
    while it has not begun.
    """

    __slots__ = ("runner", "credit", "credited", "gone")
    whole_bytes_max = SHARED_WHOLE_BYTES_MAX

    def __init__(self, channel):
        super().__init__(channel)
        self.runner = self.credited = None
        self.credit, self.gone = WINDOW_BYTES, False

    def client_disconnected(self):
        return self.gone

    def send_piece(self, piece):
        """In parts that the credit allows; after each, everybody else has a turn. So it is on its
        way before the application is asked for more, and travels with what the others answer.
        """
        at, channel = 0, self.channel
        while at < len(piece):
            if self.gone:
                raise ClientGone("the client is gone")
            if self.credit <= 0:
                channel.wait_for_credit(self)
                continue
            part = piece[at : at + min(self.credit, SHARED_PIECE_BYTES_MAX)]
            at += len(part)
            self.credit -= len(part)
            channel.put(pack_header(len(part), self.id, PIECE) + part)
            channel.give_way()

    def fail(self, error):
        if not isinstance(error, ClientGone):
            super().fail(error)
        elif not self.ended:
            self.ended = True
            self.channel.put(pack_header(0, self.id, END | END_FAILED))


class MultiplexedChannel(Channel):
    """Many requests at a time, by something that runs many things in one thread by turns.

    Here is what is said on the channel: `read` is called when there is something to read, makes an
    exchange of each request and has them run; frames gather in `out`, and leave in one send. Who
    inherits says how things run and how they wait: call_soon, await_room, run_waiting, wake,
    cancel, wait_for_credit, give_way.
    """

    def __init__(self, worker, data_fd, fds_fd, page_fd):
        super().__init__(worker, data_fd, fds_fd, page_fd)
        self.app = self.base = None
        self.exchanges = {}  # id: what has no answer yet
        # Those that have not begun; and the numbers of pings, which stand in line with them.
        self.waiting = deque()
        self.parts, self.have, self.needed = [], 0, 16  # of a frame that has come in part
        self.unsent = b""  # what the socket had no room for
        self.send_is_due = self.run_is_due = False
        self.ending = self.closed = False

    def prepare(self, app):
        self.thread = thread_ident()
        self.app = app
        self.base = self.worker.base_environ(Exchange(self))
        for sock in (self.data, self.fds):
            sock.setblocking(False)

    # From uringd.

    def read(self):
        """Takes what one recv brings."""
        try:
            data = self.data.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.lose()
            return
        self.have += len(data)
        if self.have < self.needed:
            self.parts.append(data)
            return
        if self.parts:
            self.parts.append(data)
            data = b"".join(self.parts)
            self.parts.clear()
        at, size, self.needed = 0, len(data), 16
        while size - at >= 16:
            payload_bytes, id, kind, word = unpack_prefix(data, at)
            stop = at + 12 + payload_bytes
            if stop > size:
                self.needed = stop - at
                break
            if kind == REQUEST or kind == REQUEST_WITH_FILE:
                self.take_request(id, kind, data, at + 16, at + 16 + word, stop)
            elif payload_bytes == 4:
                self.take_word(kind, id, word)
            else:
                raise ValueError("a frame of uringd is of no known kind, or of a wrong length")
            at = stop
        self.have = size - at
        if self.have:
            self.parts.append(data[at:])
        if self.waiting and not self.run_is_due:
            self.run_waiting()

    def take_request(self, id, kind, data, start, split, stop):
        exchange = SharingExchange(self)
        exchange.id = id
        exchange.environ = environ = self.base.copy()
        fill_environ(environ, data[start:split])
        environ["wsgi.errors"] = exchange.errors
        environ["wsgi.early_hints"] = exchange.early_hints
        environ["uringd.client_disconnected"] = exchange.client_disconnected
        environ["uringd.extend_deadline"] = exchange.extend_deadline
        if split == stop and kind == REQUEST:
            environ["wsgi.input"] = BytesIO()
        else:
            environ["wsgi.input"] = self.body(exchange, kind, id, data, split, stop)
        self.exchanges[id] = exchange
        if self.ending:
            self.give_back(exchange)
        else:
            self.waiting.append(exchange)

    def take_word(self, kind, id, word):
        """The frames of one u32. An answer may have crossed what is said about its request."""
        exchange = self.exchanges.get(id)
        if kind == PING:
            self.waiting.append(word)
        elif kind not in (CREDIT, GONE, CANCEL):
            raise ValueError("a frame of uringd is of no known kind")
        elif exchange is None:
            pass
        elif kind == CREDIT:
            exchange.credit += word
            self.wake(exchange)
        else:
            exchange.gone = True
            if exchange.runner is None:
                self.waiting.remove(exchange)
                self.give_back(exchange)
            elif kind == GONE:
                self.wake(exchange)
            else:
                self.cancel(exchange)

    def give_back(self, exchange):
        """Says that the application has not seen this request and will not."""
        self.put(pack_header(0, exchange.id, RETURN))
        self.forget(exchange)

    def pong(self, number):
        """All that came before the ping has begun."""
        self.put(pack_prefix(4, 0, PONG, number))

    # To uringd.

    def put(self, frame):
        """A frame that leaves when those who run now have had their turn."""
        self.out.append(frame)
        if not self.send_is_due:
            self.send_is_due = True
            self.call_soon(self.send_ready)

    def flush(self):
        if self.out and not self.send_is_due:
            self.send_is_due = True
            self.call_soon(self.send_ready)

    def send_frame(self, start, body):
        self.put(start + body)

    def send_now(self, frame):
        if self.app is None:
            self.data.sendall(frame)  # READY and FAILED, before anything runs
        else:
            self.put(frame)

    def send_ready(self):
        """One send of all that is ready. What does not fit waits for room, and nobody with it."""
        self.send_is_due = False
        if self.closed:
            self.out.clear()
        elif self.out and not self.unsent:
            data = self.out[0] if len(self.out) == 1 else b"".join(self.out)
            self.out.clear()
            self.unsent = self.send_some(data)
        if self.unsent:
            self.await_room()

    def send_rest(self):
        """There is room again. True when nothing is left that waits for it."""
        self.unsent = self.send_some(self.unsent)
        if not self.unsent:
            self.send_ready()
        return not self.unsent

    def send_some(self, data):
        """What could not be sent of it."""
        try:
            sent = self.data.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.lose()
            return b""
        return memoryview(data)[sent:] if sent < len(data) else b""

    def send_descriptor(self, fd):
        rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd)
        while True:
            try:
                self.fds.sendmsg([b"f"], [rights])
                return
            except BlockingIOError:
                # uringd takes it when it meets the frame of an earlier one.
                self.give_way(0.001)
            except OSError as error:
                raise ChannelError(*error.args) from None

    # The life of an exchange, and of the channel.

    def serve_one(self, exchange):
        # They begin in their order, so this says of each whether it has.
        pack_u32_into(self.page, PAGE_BEGUN, exchange.id)
        hooks = self.worker.hooks
        try:
            try:
                if hooks and "pre_request" in hooks:
                    hooks["pre_request"](exchange)
                exchange.respond(self.app(exchange.environ, exchange.start_response))
            except BaseException as error:
                exchange.fail(error)
            if self.closed and os.getpid() != self.worker.pid:
                self.leave_fork(exchange)
            if exchange.errors.partial:
                exchange.errors.flush()
            if hooks and "post_request" in hooks:
                self.send_ready()
                hooks["post_request"](exchange)
        except ChannelError:
            pass  # uringd has gone
        self.forget(exchange)
        self.flush()
        if self.closed:
            self.call_soon(self.finish_if_idle)

    def forget(self, exchange):
        """It is over. What it holds and what holds it must not wait for the collector."""
        self.exchanges.pop(exchange.id, None)
        if exchange.body_file is not None:
            exchange.body_file.close()
            exchange.body_file = None
        exchange.environ = {"uringd.request_id": exchange.environ.get("uringd.request_id")}
        exchange.errors = exchange.write = exchange.runner = None

    def end(self):
        """Nothing more begins. What runs is finished, and uringd then ends the channel."""
        if not self.ending:
            self.ending = True
            if self.app is not None:
                self.call_soon(self.take_leave)

    def take_leave(self):
        self.put(pack_header(0, 0, RETURN))
        while self.waiting:
            first = self.waiting.popleft()
            if type(first) is int:
                self.pong(first)
            else:
                self.give_back(first)

    def finish_if_idle(self):
        if not self.exchanges:
            self.finish()

    def lose(self):
        """uringd has ended the channel: nobody wants an answer any more, but what runs may finish
        what it is at.
        """
        self.stop_reading()
        self.ending = self.closed = True
        self.unsent = b""
        self.out.clear()
        self.waiting.clear()
        self.call_soon(self.finish_if_idle)
        for exchange in list(self.exchanges.values()):
            exchange.gone = True
            if exchange.runner is None:
                self.forget(exchange)
            else:
                self.wake(exchange)


def fill_environ(environ, data):
    """What Channel.serve has in line."""
    *fixed, more = loads(data)
    if len(fixed) != len(PLACES):
        raise ValueError("an environ of uringd has %d places" % len(fixed))
    environ.update(zip(PLACES, fixed))
    environ["RAW_URI"] = environ["REQUEST_URI"]
    if not environ["REMOTE_PORT"]:
        del environ["REMOTE_PORT"]
    environ.update(more)


def check_gevent():
    from importlib.util import find_spec

    if find_spec("gevent") is None:
        python = sys.executable or "this interpreter"
        raise LoadError(
            "--worker-class gevent: gevent is not installed for %s (%s)\n"
            "hint: pip install gevent there, or give its interpreter with --python"
            % (python, interpreter()["python"])
        )


def patch_for_gevent():
    """Has the standard library wait with gevent, before anything of the application is imported."""
    import gevent
    from gevent import monkey

    if monkey.is_module_patched("socket"):
        gevent.reinit()  # by the zygote, for an application that it has loaded
    else:
        monkey.patch_all()


class GeventChannel(MultiplexedChannel):
    """Requests on greenlets of gevent, which take turns on the hub of the main thread.

    `read`, `send_ready` and `run_waiting` run in the hub itself, so they never wait. A greenlet
    runs requests one after the other for as long as none of them waits for anything. Once one has,
    the greenlet ends with it: so nothing that it leaves behind, a timeout or a local, reaches
    another request that is not as quick as itself. To begin a greenlet costs as much as a quick
    request.
    """

    def __init__(self, worker, data_fd, fds_fd, page_fd):
        super().__init__(worker, data_fd, fds_fd, page_fd)
        self.running = self.idle = self.forker = None
        self.getcurrent = lambda: None
        self.slice_until = 0.0
        self.readable = self.writable = None
        self.writable_watched = False

    def run(self, app):
        import gevent
        from gevent.event import Event

        self.Event, self.sleep, self.over = Event, gevent.sleep, Event()
        self.getcurrent = gevent.getcurrent
        self.hub = gevent.get_hub()
        self.loop = self.hub.loop
        self.Runner, self.Overdue = make_gevent_classes(gevent)
        self.prepare(app)
        self.readable = self.loop.io(self.data.fileno(), 1)
        self.writable = self.loop.io(self.data.fileno(), 2)
        self.readable.start(self.guard, self.read)
        self.wake_on_signals()
        if self.ending:
            self.call_soon(self.take_leave)
        while not self.over.is_set():
            try:
                self.over.wait()
            except BaseException as error:
                # gevent brings what ends a process, raised in any greenlet, here.
                if os.getpid() != self.worker.pid:
                    leave_forked_child(error)
                write_stderr("the application ends its worker\n" + format_error(error))
                self.worker.end(exit_status(error))
        self.close()
        self.worker.end()

    def wake_on_signals(self):
        """Python runs its handlers between two of its instructions, and the hub may be about to
        sleep for long after its last.
        """
        woken, wake = os.pipe()
        for fd in (woken, wake):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.signalled = self.loop.io(woken, 1)
        self.signalled.start(os.read, woken, 512)

    def guard(self, function):
        """What the hub calls: an error there is uringd's frame or a mistake of this file."""
        try:
            function()
        except BaseException as error:
            if os.getpid() != self.worker.pid:
                leave_forked_child(error)
            write_stderr(
                "uringd worker %d: the channel failed\n%s"
                % (os.getpid(), format_error(error, True))
            )
            self.worker.end(EXIT_GARBAGE)
            self.finish()

    def call_soon(self, function):
        if thread_ident() == self.thread:
            self.loop.run_callback(self.guard, function)
        else:
            self.loop.run_callback_threadsafe(self.guard, function)

    def await_room(self):
        if not self.writable_watched:
            self.writable_watched = True
            self.writable.start(self.guard, self.room_came)

    def room_came(self):
        if self.send_rest() and self.writable_watched:
            self.writable_watched = False
            self.writable.stop()

    def run_waiting(self):
        """In the hub: begins what waits, until it is time for others."""
        clock, waiting, self.run_is_due = time.perf_counter, self.waiting, False
        now = clock()
        turn_until = now + TURN_SECONDS
        while waiting and now < turn_until and not self.closed:
            # What is answered meanwhile need not ask to be sent.
            self.send_is_due = True
            self.slice_until = now + SLICE_SECONDS
            runner, self.idle = self.idle, None
            if runner is None or runner.dead:
                runner = self.Runner(self)
            self.running = runner
            runner.switch()
            self.running = None
            self.send_ready()
            now = clock()
        if waiting and not self.closed:
            self.run_is_due = True
            self.call_soon(self.run_waiting)

    def run_one_by_one(self, runner):
        """A greenlet's life."""
        waiting, clock = self.waiting, time.perf_counter
        while True:
            while waiting:
                exchange = waiting.popleft()
                if type(exchange) is int:
                    self.pong(exchange)
                    continue
                exchange.runner = runner
                self.serve_one(exchange)
                if self.running is not runner or self.closed:
                    return
                # Nothing may hold what was answered last.
                exchange = None
                if clock() > self.slice_until:
                    break
            self.idle = runner
            self.hub.switch()

    def wake(self, exchange):
        if exchange.credited is not None:
            exchange.credited.set()

    def cancel(self, exchange):
        """In the hub: the greenlet goes on here and now, with an exception."""
        exchange.runner.throw(self.Overdue("the request takes longer than --timeout"))

    def wait_for_credit(self, exchange):
        exchange.credited = self.Event()
        try:
            exchange.credited.wait()
        finally:
            exchange.credited = None

    def give_way(self, seconds=0):
        self.sleep(seconds)

    def stop_reading(self):
        if self.readable is not None:
            self.readable.stop()

    def finish(self):
        self.over.set()

    def leave_fork(self, exchange):
        """In a child that the application forked, where all greenlets go on: the one that forked it
        has come back to us, or another one has that has no business there.
        """
        if exchange.runner is self.forker:
            leave_forked_child()
        raise ChannelError

    def close(self):
        self.closed = True
        if os.getpid() != self.worker.pid:
            self.forker = self.getcurrent()
        for watcher in (self.readable, self.writable):
            if watcher is not None:
                watcher.stop()
        super().close()


def make_gevent_classes(gevent):
    """Classes of classes that are only there once gevent is imported."""

    class Runner(gevent.Greenlet):
        def __init__(self, channel):
            super().__init__()
            self.channel = channel

        def _run(self):
            self.channel.run_one_by_one(self)

    class Overdue(gevent.GreenletExit):
        pass

    return Runner, Overdue


# A worker process.


class Worker:
    def __init__(self, zygote, id, descriptors):
        self.zygote, self.start, self.id = zygote, zygote.start, id
        self.pid, self.hooks, self.status = os.getpid(), {}, 0
        self.forking = threading.local()  # the signal mask to go back to after a fork
        self.on_greenlets = self.start.get("worker_class") == "gevent"
        kind = GeventChannel if self.on_greenlets else Channel
        self.channels = [
            kind(self, *descriptors[at : at + 3]) for at in range(0, len(descriptors), 3)
        ]

    def run(self):
        """Loads the application if the zygote has not, serves it, returns the status to exit with.

        Status 0 means that every request that was begun has been answered.
        """
        die_with_parent(self.zygote.pid)
        name_process("uringd-worker")
        self.take_signals()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self.before_fork,
                after_in_parent=self.after_fork,
                after_in_child=self.leave_channels,
            )
        config = self.zygote.config
        gunicorn = config and config.booting
        try:
            if self.on_greenlets:
                patch_for_gevent()
            if config:
                gunicorn.pid = self.pid
                config.call("post_fork", config.server, gunicorn)
            app = self.zygote.load() if self.zygote.app is None else self.zygote.app
            if config:
                config.loaded(gunicorn, app)
                config.call("post_worker_init", gunicorn)
                self.hooks = config.request_hooks(gunicorn)
        except BaseException as error:
            self.tell(FAILED, load_failure(error, self.start).encode("utf-8", "backslashreplace"))
            return EXIT_LOAD
        # Again: the application may have set handlers of its own when it was imported.
        self.take_signals()
        signal.signal(signal.SIGTERM, lambda signum, frame: self.terminate())
        signal.signal(signal.SIGABRT, lambda signum, frame: self.abort(gunicorn))
        # What was loaded stays: the collector need not look at it again, and shared pages stay
        # shared.
        freeze()
        ready = dict(interpreter(), pid=self.pid, threads=len(self.channels), interface="wsgi")
        self.tell(READY, json.dumps(ready).encode())
        threads = [
            threading.Thread(
                target=channel.run, args=(app,), name="uringd-%d" % number, daemon=True
            )
            for number, channel in enumerate(self.channels)
        ]
        for thread in threads[1:]:
            thread.start()
        self.channels[0].run(app)
        for thread in threads[1:]:
            thread.join()
        if config:
            gunicorn.alive = False
            config.call_safely("worker_exit", config.server, gunicorn)
        return self.status

    def base_environ(self, exchange):
        """What every request's environ begins with: uringd's part, then what only this process can
        make.
        """
        environ = {
            "SCRIPT_NAME": "",
            "SERVER_SOFTWARE": "uringd",
            "wsgi.url_scheme": "http",
            "wsgi.multiprocess": True,
        }
        environ.update(self.start.get("base") or {})
        # The keys that every request has are there already, so that none of its copies has to grow.
        environ.update(dict.fromkeys(PLACES, ""), RAW_URI="")
        del environ["REMOTE_PORT"]  # which a client behind a unix socket has not
        environ.update(
            {
                "wsgi.version": (1, 0),
                "wsgi.multithread": len(self.channels) > 1 or self.on_greenlets,
                "wsgi.run_once": False,
                "wsgi.input": None,
                "wsgi.input_terminated": True,
                "wsgi.errors": exchange.errors,
                "wsgi.file_wrapper": FileWrapper,
                "wsgi.early_hints": exchange.early_hints,
                "uringd.client_disconnected": exchange.client_disconnected,
                "uringd.extend_deadline": exchange.extend_deadline,
            }
        )
        return environ

    def take_signals(self):
        """Ctrl-C and a hang-up go to the whole group, and are uringd's to act on.

        Handlers that do nothing, not SIG_IGN, which programs started by the application would
        inherit. SIGUSR1 prints where every thread is, from C, so also when one of them never gives
        up the interpreter.
        """
        for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(signum, do_nothing)
        for signum in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_DFL)
        dump_traceback_on_usr1()

    def abort(self, gunicorn):
        """SIGABRT: a request ran into its deadline. The hook may say so to others; those who share
        the worker with it may finish, which uringd's SIGKILL bounds.
        """
        if os.getpid() == self.pid and gunicorn is not None:
            gunicorn.alive, gunicorn.aborted = False, True
            try:
                self.zygote.config.call("worker_abort", gunicorn)
            except BaseException as error:
                write_stderr("the hook worker_abort failed\n" + format_error(error))
            if len(self.channels) > 1:
                return self.end(1)
        os._exit(1)

    def terminate(self):
        """SIGTERM: from uringd, or because the zygote is gone (PR_SET_PDEATHSIG). Then what runs
        may come to its end, while uringd is there to see to that; and that is looked at.
        """
        if os.getppid() != self.zygote.pid:
            signal.signal(signal.SIGALRM, lambda signum, frame: self.end_orphan())
            signal.setitimer(signal.ITIMER_REAL, 1, 1)
        self.end()

    def end_orphan(self):
        """Nobody is left to answer, or to end this process should it hang."""
        poll, fds = real_poll(), [channel.data.fileno() for channel in self.channels]
        fds = [fd for fd in fds if fd >= 0]
        for fd in fds:
            poll.register(fd, 0)  # an end comes unasked
        if len(poll.poll(0)) == len(fds):
            os._exit(1)

    def end(self, status=0):
        """Every thread finishes its present request; the requests behind it are uringd's to give to
        another.
        """
        if os.getpid() != self.pid:
            os._exit(status)
        self.status = self.status or status
        for channel in self.channels:
            channel.end()

    def tell(self, kind, payload):
        for channel in self.channels:
            try:
                channel.tell(kind, payload)
            except OSError:
                pass  # uringd has gone; serving will find that out

    def before_fork(self):
        """A signal that reached a child before it has its own handlers would be lost: CPython
        forgets what came until its hooks run. multiprocessing's Process.terminate() is such a
        signal.
        """
        self.forking.mask = signal.pthread_sigmask(
            signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGABRT)
        )

    def after_fork(self):
        signal.pthread_sigmask(signal.SIG_SETMASK, self.forking.mask)

    def leave_channels(self):
        """In a child that the application forked: it must not answer, nor hold the channel open for
        years.
        """
        for channel in self.channels:
            channel.lock = threading.Lock()
            channel.close()
        try:
            for signum in (signal.SIGTERM, signal.SIGABRT, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(signum, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        except ValueError:
            pass  # not the main thread: an interpreter whose fork does not make it so
        self.after_fork()


def do_nothing(signum, frame):
    pass


def dump_traceback_on_usr1():
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True, chain=False)
    else:
        signal.signal(
            signal.SIGUSR1,
            lambda signum, frame: write_stderr("".join(traceback.format_stack(frame))),
        )


def prctl(option, argument):
    """True if the kernel took it. Nothing depends on it, and ctypes may be missing from a small
    build.
    """
    try:
        import ctypes

        return ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0) == 0
    except Exception:
        return False


def die_with_parent(parent):
    """PR_SET_PDEATHSIG: SIGTERM, so that what runs is answered even when the zygote was killed."""
    prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(0)


def name_process(name):
    """PR_SET_NAME: at most 15 bytes, what top and ps -o comm show."""
    prctl(15, name.encode())


def freeze():
    gc.collect()
    if hasattr(gc, "freeze"):
        gc.freeze()


def interpreter():
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "implementation": sys.implementation.name,
        "protocol": PROTOCOL,
    }


# Finding the application, and saying why it was not found.


class LoadError(Exception):
    """The target does not name an application. Shown without a traceback; ends with what to try."""


DEFAULT_NAMES = ("application", "app")


def parse_target(target):
    """`module:a.b(1, x="y")` as (module, ["a", "b"], None or (args, kwargs)); without attribute the
    list is empty.
    """
    module, colon, expression = target.partition(":")
    if not module or not all(part.isidentifier() for part in module.split(".")):
        written = module.rstrip("/").replace("/", ".")
        written = (written[:-3] if written.endswith(".py") else written).lstrip(".")
        raise LoadError(
            "%r is not the name of a module\nhint: name the module, not the file: %s:%s"
            % (module, written or "module", expression or "app")
        )
    if not colon:
        return module, [], None
    call = None
    try:
        node = ast.parse(expression, mode="eval").body
        if isinstance(node, ast.Call):
            args = [ast.literal_eval(arg) for arg in node.args]
            call = args, {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            node = node.func
        names = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or call and None in call[1]:
            raise ValueError
    except (SyntaxError, ValueError):
        raise LoadError(
            "%r is neither an attribute nor a call of one with literal arguments\n"
            'hint: write %s:app, %s:config.app or %s:create_app("production")'
            % (expression, module, module, module)
        ) from None
    return module, [node.id] + names, call


def load_app(target, interface=None):
    """Imports the module and returns the application; raises what the import raised, or a
    LoadError.
    """
    module_name, names, call = parse_target(target)
    module = importlib.import_module(module_name)
    if not names:
        names = [name for name in DEFAULT_NAMES if hasattr(module, name)][:1] or ["application"]
    found, path = module, module_name
    for name in names:
        try:
            found = getattr(found, name)
        except AttributeError:
            raise LoadError(
                "%s has no attribute %r\nhint: %s" % (path, name, attributes_hint(found, path))
            ) from None
        path += (":" if found is not module and ":" not in path else ".") + name
    if call is not None:
        if not callable(found):
            raise LoadError(
                "%s is %s, which cannot be called\nhint: leave out the parentheses"
                % (path, type(found).__name__)
            )
        found = found(*call[0], **call[1])
        path += "()"
    if not callable(found):
        raise LoadError(
            "%s is %s, not an application: it cannot be called\nhint: %s"
            % (path, type(found).__name__, attributes_hint(module, module_name))
        )
    if interface != "wsgi":
        check_interface(found, path)
    return found


def mounted(app, prefix):
    """The application below a path, which becomes its SCRIPT_NAME. A path elsewhere is passed on as
    it is.
    """
    prefix = "/" + prefix.strip("/").encode("utf-8", "surrogateescape").decode("latin-1")
    if prefix == "/":
        return app
    below = prefix + "/"

    def mount(environ, start_response):
        path = environ["PATH_INFO"]
        if path == prefix or path.startswith(below):
            environ["SCRIPT_NAME"], environ["PATH_INFO"] = prefix, path[len(prefix) :]
        return app(environ, start_response)

    return mount


def check_interface(app, path):
    """Tells an ASGI application and a factory from a WSGI application by looking at what can be
    called.
    """
    import inspect

    call = app if inspect.isroutine(app) else getattr(type(app), "__call__", None)
    if inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(call):
        raise LoadError(
            "%s is an ASGI application\nhint: this uringd runs WSGI applications; an adapter like "
            "a2wsgi.ASGIMiddleware makes one of it, or force it with --interface wsgi" % path
        )
    if inspect.isfunction(app):
        try:
            inspect.signature(app).bind(None, None)
        except TypeError:
            raise LoadError(
                "%s does not take the two arguments of a WSGI application, environ and "
                "start_response\n"
                "hint: if it makes the application, have it called: %s()" % (path, path)
            ) from None
        except ValueError:
            pass


def attributes_hint(owner, path):
    """The attributes that could be meant, those with a likely name first."""
    likely, others = [], []
    for name, value in sorted(getattr(owner, "__dict__", {}).items()):
        if (
            name.startswith("_")
            or not callable(value)
            or isinstance(value, type)
            and value.__module__ != path
        ):
            continue
        made_here = getattr(value, "__module__", path) == path
        (likely if "app" in name.lower() else others if made_here else []).append(name)
    names = (likely + others)[:8]
    if not names:
        return "%s has nothing that can be called; is it the right module?" % path
    return "%s has: %s" % (path, ", ".join(names))


def load_failure(error, start):
    """The text for the operator: the traceback as Python shows it, without our frames, and one line
    of hint.
    """
    if isinstance(error, LoadError):
        return "%s\n" % error
    text = format_error(error) + "hint: %s\n" % load_hint(error, start)
    # A record holds 64 KiB, and JSON may make six bytes of a character. The end is what matters.
    return text if len(text) < 10000 else "...\n" + text[-10000:]


def load_hint(error, start):
    module = start.get("app", "").partition(":")[0]
    python = "%s (%s)" % (sys.executable or "this interpreter", interpreter()["python"])
    if isinstance(error, ModuleNotFoundError) and error.name:
        if error.name == module.partition(".")[0] or module.startswith(error.name + "."):
            return missing_module_hint(error.name)
        beside = virtual_environment_beside()
        if beside:
            return (
                "%r is not installed for %s; there is a virtual environment here: try --python %s"
                % (error.name, python, beside)
            )
        return (
            "%r is not installed for %s: install it there, or give its interpreter with --python"
            % (error.name, python)
        )
    if isinstance(error, SyntaxError):
        return "the interpreter is %s; --python gives another" % python
    if isinstance(error, SystemExit):
        return (
            "the module exits when it is imported: put what it runs under "
            '`if __name__ == "__main__":`'
        )
    if isinstance(error, ImportError):
        return "the interpreter is %s; `%s -c 'import %s'` shows the same error" % (
            python,
            sys.executable or "python3",
            module,
        )
    return (
        "the application raised this while it was loaded; `%s -c 'import %s'` in %s may show "
        "the same" % (sys.executable or "python3", module, os.getcwd())
    )


def missing_module_hint(name):
    here = os.getcwd()
    root, rest = name.split(".")[0], name.replace(".", os.sep)
    for entry in sorted(os.listdir(here))[:1000]:
        if os.path.isfile(os.path.join(here, entry, rest + ".py")) or os.path.isfile(
            os.path.join(here, entry, rest, "__init__.py")
        ):
            return "%s is in %s: try --chdir %s" % (name, os.path.join(here, entry), entry)
    if root != name:
        return "there is no %s in %s" % (name, os.path.join(here, root))
    return (
        "there is no %s.py and no package %s in %s: start in its directory or give it with --chdir"
        % (root, root, here)
    )


def virtual_environment_beside():
    for name in (".venv", "venv", "env"):
        path = os.path.join(name, "bin", "python")
        if os.path.exists(path) and os.path.abspath(name) != sys.prefix:
            return path
    return None


def app_frames(frames):
    """The traceback from the application's first frame on; None if the application had no part in
    it.
    """
    while frames is not None:
        code = frames.tb_frame.f_code
        ours = frames.tb_frame.f_globals is globals()
        importing = "frozen importlib" in code.co_filename or (
            code.co_filename == importlib.__file__ and code.co_name == "import_module"
        )
        if not (ours or importing):
            return frames
        frames = frames.tb_next
    return None


def format_error(error, ours=False):
    frames = error.__traceback__ if ours else app_frames(error.__traceback__)
    return "".join(traceback.format_exception(type(error), error, frames))


# A gunicorn.conf.py: its settings, its hooks, and what they log.


def read_config(location):
    """The names that the file (or python:MODULE) defines when it is executed, as gunicorn does."""
    if location.startswith("python:"):
        return vars(importlib.import_module(location[len("python:") :]))
    path = os.path.abspath(location)
    module = sys.modules["__config__"] = type(sys)("__config__")
    module.__file__ = path
    with open(path, "rb") as source:
        exec(compile(source.read(), path, "exec"), vars(module))
    return vars(module)


def evaluate_config(config, names):
    """The answer to `settings`: those of the names that the file defines, as plain data."""
    try:
        found = read_config(config)
        values = {name: plain(found[name]) for name in names if name in found}
        # What is nested is for logging, which is set up here. It may be longer than a record.
        for name, value in values.items():
            if isinstance(value, dict) and len(json.dumps(value)) > 4096:
                values[name] = {"type": "dict"}
        return {"settings": values}
    except BaseException as error:
        return {"failed": config_failure(error, {"config": config})}


def plain(value):
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if isinstance(value, (os.PathLike, bytes)):
        return os.fsdecode(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, type):
        return "%s.%s" % (value.__module__, value.__qualname__)
    return {"type": type(value).__name__}


def config_failure(error, start):
    python = "%s (%s)" % (sys.executable or "this interpreter", interpreter()["python"])
    if isinstance(error, ModuleNotFoundError):
        hint = (
            "%r is not installed for %s: install it there, give its interpreter with --python, or "
            "take the import out" % (error.name, python)
        )
    elif isinstance(error, SyntaxError):
        hint = "the interpreter is %s; --python gives another" % python
    else:
        hint = "mend the file; `%s %s` may show the same" % (
            sys.executable or "python3",
            start["config"],
        )
    return "%shint: %s\n" % (format_error(error)[-10000:], hint)


# What gunicorn has configured before a logging configuration of the user's is laid over it.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "root": {"level": "INFO", "handlers": ["console"]},
    "loggers": {
        "gunicorn.error": {"level": "INFO", "handlers": ["error_console"], "propagate": True},
        "gunicorn.access": {"level": "INFO", "handlers": ["console"], "propagate": True},
    },
    "handlers": {
        "console": {
            "class": "logging.StreamHandler",
            "formatter": "generic",
            "stream": "ext://sys.stdout",
        },
        "error_console": {
            "class": "logging.StreamHandler",
            "formatter": "generic",
            "stream": "ext://sys.stderr",
        },
    },
    "formatters": {
        "generic": {
            "format": "%(asctime)s [%(process)d] [%(levelname)s] %(message)s",
            "datefmt": "[%Y-%m-%d %H:%M:%S %z]",
            "class": "logging.Formatter",
        }
    },
}


def set_up_logging(settings):
    """The logger that hooks get, gunicorn.error: applications borrow its handlers and its level,
    whether there is a gunicorn.conf.py or not.
    """
    import logging

    level = (settings.get("loglevel") or "info").upper()
    log = logging.getLogger("gunicorn.error")
    log.propagate = False
    log.setLevel(logging.DEBUG if level == "TRACE" else getattr(logging, level, logging.INFO))
    form = LOGGING["formatters"]["generic"]
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(form["format"], form["datefmt"]))
    log.handlers = [handler]
    try:
        configure_logging(settings)
    except Exception as error:
        raise LoadError(
            "the logging configuration failed\n%shint: it is laid over gunicorn's own key by key: "
            "one with `handlers` or `formatters` wants a `root`, too" % format_error(error, True)
        ) from None
    return log


def configure_logging(settings):
    """As logconfig_dict, logconfig_json or logconfig say, the first of them that is there."""
    nested, path = settings.get("logconfig_dict"), settings.get("logconfig_json")
    if not nested and path:
        with open(path) as source:
            nested = json.load(source)
    path = settings.get("logconfig")
    if not nested and not path:
        return
    import logging.config

    if nested:
        logging.config.dictConfig(dict(LOGGING, **nested))
        return
    with open(path):
        pass  # fileConfig takes no notice of a file that is not there
    defaults = {"__file__": path, "here": os.path.dirname(path)}
    logging.config.fileConfig(path, defaults=defaults, disable_existing_loggers=False)


class Config:
    """The hooks of a gunicorn.conf.py, which is executed once in each zygote. They are called with
    gunicorn's arguments: objects that have those attributes of its own which hooks use.
    """

    def __init__(self, location, settings):
        """`settings` are gunicorn's, as uringd has read them: from here, and from everywhere else
        where they may be said.
        """
        from types import SimpleNamespace

        self.names = read_config(location)
        own = {name: value for name, value in self.names.items() if not name.startswith("_")}
        said = {name: value for name, value in settings.items() if value is not None}
        self.cfg = SimpleNamespace(**dict(settings, **dict(own, **said)))
        self.server = SimpleNamespace(cfg=self.cfg, WORKERS={}, app=None)
        self.booting = None

    def begin(self, log, start):
        base, server = start.get("base") or {}, self.server
        self.log = server.log = log
        # uringd's own, for the signals that a hook sends to the server. It need not be our parent:
        # an interpreter may be a script that starts the real one.
        server.pid = start.get("pid") or os.getppid()
        server.address = [(base.get("SERVER_NAME", ""), int(base.get("SERVER_PORT") or 0))]
        server.num_workers = None
        self.count(start.get("workers", 0))

    def count(self, workers):
        old, self.server.num_workers = self.server.num_workers, workers
        self.call_safely("nworkers_changed", self.server, workers, old)

    def boot(self, age):
        """What hooks know as `worker`, before it is forked."""
        from types import SimpleNamespace

        self.booting = SimpleNamespace(
            pid="[booting]",
            age=age,
            ppid=self.server.pid,
            log=self.log,
            cfg=self.cfg,
            timeout=getattr(self.cfg, "timeout", None),
            alive=True,
            booted=False,
            aborted=False,
            nr=0,
            notify=lambda: None,
            app=None,
            wsgi=None,
        )
        self.call_safely("pre_fork", self.server, self.booting)

    def loaded(self, worker, app):
        from types import SimpleNamespace

        worker.booted, worker.wsgi = True, app
        worker.app = SimpleNamespace(callable=app, wsgi=lambda: app)

    def hook(self, name):
        """The function of this name; a text names one of some module."""
        hook = self.names.get(name)
        if isinstance(hook, str):
            module, _, attribute = hook.rpartition(".")
            hook = getattr(importlib.import_module(module), attribute)
        return hook if callable(hook) else None

    def call(self, name, *args):
        hook = self.hook(name)
        if hook is not None:
            hook(*args)

    def call_safely(self, name, *args):
        """Where there is work to go on with, an error of a hook is only logged."""
        try:
            self.call(name, *args)
        except Exception as error:
            write_stderr("the hook %s failed\n%s" % (name, format_error(error)))

    def request_hooks(self, worker):
        """pre_request(worker, req) and post_request(worker, req, environ, resp), as functions of
        the exchange.
        """
        from types import SimpleNamespace

        def request(environ):
            headers = [
                (k[5:].replace("_", "-"), v) for k, v in environ.items() if k.startswith("HTTP_")
            ]
            for name in ("CONTENT_TYPE", "CONTENT_LENGTH"):
                if name in environ:
                    headers.append((name.replace("_", "-"), environ[name]))
            version = environ["SERVER_PROTOCOL"].rpartition("/")[2].split(".")
            return SimpleNamespace(
                method=environ.get("REQUEST_METHOD"),
                path=environ.get("PATH_INFO"),
                uri=environ.get("RAW_URI"),
                query=environ.get("QUERY_STRING"),
                version=tuple(map(int, version)),
                scheme=environ.get("wsgi.url_scheme"),
                remote_addr=(environ.get("REMOTE_ADDR"), environ.get("REMOTE_PORT")),
                headers=headers,
                body=environ.get("wsgi.input"),
            )

        def pre_request(exchange):
            pre(worker, request(exchange.environ))

        def post_request(exchange):
            status, headers = exchange.started or ("500 Internal Server Error", [])
            response = SimpleNamespace(status=status, status_code=int(status[:3]), headers=headers)
            try:
                worker.nr += 1
                args = worker, request(exchange.environ), exchange.environ, response
                post(*args[:arity])
            except Exception as error:
                exchange.errors.write("the hook post_request failed\n%s" % format_error(error))

        hooks, pre, post = {}, self.hook("pre_request"), self.hook("post_request")
        if pre is not None:
            hooks["pre_request"] = pre_request
        if post is not None:
            # gunicorn has given this hook two, three and four arguments in its time, and honours
            # all of them.
            code = getattr(post, "__code__", None)
            arity = min(4, code.co_argcount) if code and not code.co_flags & 4 else 4
            hooks["post_request"] = post_request
        return hooks


# The zygote.


class Zygote:
    """One thread that forks and reaps. It holds no channel: each worker's descriptors are closed
    here at once.
    """

    RESTART = (
        "URINGD_ZYGOTE_START"  # the start record, for an interpreter that begins anew: see restart
    )

    def __init__(self):
        self.pid = os.getpid()
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, CONTROL_FD)
        self.control.setblocking(True)
        self.control.set_inheritable(False)
        self.workers = {}  # pid: the id that uringd gave it
        self.app = self.config = None
        self.start, self.mount = {}, ""
        self.native = None

    def run(self):
        """Returns a Worker in a child that is to become one; in the zygote itself None, when all is
        over.
        """
        self.take_signals()
        name_process("uringd-zygote")
        if not self.begin():
            return None
        # Again: the application may have been preloaded, and have taken them.
        self.take_signals()
        self.wake, wake = os.pipe()
        for fd in (self.wake, wake):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        try:
            worker = self.serve()
        finally:
            signal.set_wakeup_fd(-1)
            os.close(self.wake)
            os.close(wake)
        if worker is None:
            self.end_workers()
            if self.config:
                self.config.call_safely("on_exit", self.config.server)
        return worker

    def take_signals(self):
        """The end of the control socket ends a zygote, nothing else. Whoever started us, or is
        imported, may have blocked or ignored signals for its own purposes.
        """
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(signum, do_nothing)
        signal.signal(signal.SIGCHLD, do_nothing)
        dump_traceback_on_usr1()

    def begin(self):
        """Reads `start`, makes the surroundings of the application, loads it if told to; says ready
        or failed. Or reads `settings`, and answers it.
        """
        record, descriptors = os.environ.pop(self.RESTART, None), []
        if record is None:
            record, descriptors = receive_descriptors(self.control, RECORD_BYTES_MAX, 1)
            if not record:
                return False
        record = json.loads(record)
        native_fd = descriptors[0] if descriptors else record.get("native")
        if "settings" in record or record["start"].get("check"):
            # Only for a moment, and nobody else would end it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if "settings" in record:
            self.tell(evaluate_config(**record["settings"]))
            return False
        self.start = start = record["start"]
        warning, threads, settings = record.get("warning"), 1, start.get("settings") or {}
        try:
            # After a restart, this is no longer where uringd was started.
            self.cwd = record.get("cwd") or os.getcwd()
            os.chdir(self.cwd)
            if start.get("config"):
                # First, for gunicorn executes it here, not where the application is.
                self.config = Config(start["config"], settings)
            if start.get("chdir"):
                os.chdir(start["chdir"])
            os.environ.update(start.get("env") or {})
            sys.argv = ["uringd"]
            sys.path[:] = search_path(start.get("pythonpath") or [])
            if start.get("interface") == "asgi":
                raise LoadError(
                    "this worker runs WSGI applications only\nhint: leave --interface asgi out"
                )
            if start.get("worker_class") == "gevent":
                check_gevent()
            elif start.get("worker_class") not in (None, "sync", "gthread"):
                raise LoadError(
                    "this worker has no worker class %r\n"
                    "hint: leave --worker-class out: requests run on "
                    "--threads threads of each worker" % start["worker_class"]
                )
            self.mount = (start.get("base") or {}).pop("SCRIPT_NAME", "") or os.environ.get(
                "SCRIPT_NAME", ""
            )
            log = set_up_logging(vars(self.config.cfg) if self.config else settings)
            hooks = None if start.get("check") else self.config
            if hooks:
                hooks.begin(log, start)
                if warning is None:  # else it was called before the interpreter began anew
                    hooks.call("on_starting", hooks.server)
            parse_target(start["app"])
            if start.get("preload"):
                if start.get("worker_class") == "gevent":
                    patch_for_gevent()
                self.app = self.preload()
                threads = thread_count()
        except BaseException as error:
            config_failed = start.get("config") and self.config is None
            explain = config_failure if config_failed else load_failure
            self.tell({"failed": explain(error, start)})
            return False
        if threads > 1 and not start.get("check"):
            if warning is None and self.restart(threads, native_fd):
                return False
            self.app = None
        self.native = load_native(native_fd)
        interface = None if self.app is None else "wsgi"
        ready = dict(
            interpreter(), pid=os.getpid(), interface=interface, native=self.native is not None
        )
        if warning:
            ready["warning"] = warning
        freeze()
        self.tell({"ready": ready})
        self.config = hooks
        if hooks:
            hooks.call_safely("when_ready", hooks.server)
        return True

    def load(self):
        return mounted(load_app(self.start["app"], self.start.get("interface")), self.mount)

    def preload(self):
        """An import may wait for ever, so while it runs the end of uringd is a signal, SIGIO, that
        ends this process: uringd says nothing before it hears that we are ready.
        """
        flags = fcntl.fcntl(self.control, fcntl.F_GETFL)
        fcntl.fcntl(self.control, fcntl.F_SETOWN, self.pid)
        fcntl.fcntl(self.control, fcntl.F_SETFL, flags | os.O_ASYNC)
        try:
            return self.load()
        finally:
            fcntl.fcntl(self.control, fcntl.F_SETFL, flags)

    def restart(self, threads, native_fd):
        """The application started threads when it was imported, and a fork copies only one of them,
        with the locks that the others hold. So this interpreter begins anew, and each worker loads
        the application itself.
        """
        names = ", ".join(t.name for t in threading.enumerate() if t is not threading.main_thread())
        warning = (
            "the application was not preloaded: importing it started %d more thread%s "
            "(%s), which a fork would "
            "not copy; each worker loads it by itself"
            % (threads - 1, "" if threads == 2 else "s", names or "not Python's")
        )
        with open("/proc/self/cmdline", "rb") as cmdline:
            argv = [os.fsdecode(arg) for arg in cmdline.read().split(b"\0")[1:-1]]
        if not sys.executable or not ("-c" in argv or "__file__" in globals()):
            self.tell(
                {
                    "failed": warning.replace("was not", "cannot be")
                    + "\nhint: leave --preload out\n"
                }
            )
            return True
        base = dict(self.start.get("base") or {}, SCRIPT_NAME=self.mount)
        start = dict(self.start, preload=False, base=base)
        record = {"start": start, "warning": warning, "cwd": self.cwd, "native": native_fd}
        environ = dict(os.environ, **{self.RESTART: json.dumps(record)})
        os.set_inheritable(CONTROL_FD, True)
        if native_fd is not None:
            os.set_inheritable(native_fd, True)
        try:
            os.execve(sys.executable, [sys.executable] + argv, environ)
        except OSError as error:
            self.tell(
                {
                    "failed": "%s\n%s could not be run again: %s\nhint: leave --preload out\n"
                    % (warning, sys.executable, error)
                }
            )
        return True

    def serve(self):
        """Waits for records and for children; returns a Worker in the child, None at the end of the
        control socket.
        """
        poll = real_poll()
        poll.register(self.control, select.POLLIN)
        poll.register(self.wake, select.POLLIN)
        per_worker = 3 * int(self.start.get("threads") or 1)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self.wake in ready:
                self.drain_wake()
                self.reap()
            if CONTROL_FD not in ready:
                continue
            try:
                record, descriptors = receive_descriptors(
                    self.control, RECORD_BYTES_MAX, per_worker
                )
            except ConnectionResetError:
                return None
            if not record:
                return None
            record = json.loads(record)
            if "workers" in record and self.config:
                self.config.count(record["workers"])
            id = record.get("fork")
            if id is None:
                continue
            worker = self.fork(id, descriptors, per_worker)
            if worker is not None:
                return worker

    def fork(self, id, descriptors, expected):
        if len(descriptors) != expected:
            pid, error = None, "%d descriptors came, not %d" % (len(descriptors), expected)
        else:
            if self.config:
                self.config.boot(id)
            flush_standard_streams()  # or both processes would write what is in the buffer
            try:
                pid, error = real_fork(), None
            except OSError as failure:
                pid, error = None, str(failure)
        if pid == 0:
            self.control.close()
            return Worker(self, id, descriptors)
        for fd in descriptors:
            os.close(fd)
        if error is not None:
            self.tell({"forked": id, "error": error})
        else:
            self.workers[pid] = id
            if self.config:
                self.config.booting.pid = pid
                self.config.server.WORKERS[pid] = self.config.booting
            self.tell({"forked": id, "pid": pid})
        return None

    def reap(self):
        while self.workers:
            try:
                pid, status = real_waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            id = self.workers.pop(pid, None)
            if id is not None:
                self.tell({"exited": pid, "status": status})
                if self.config:
                    server = self.config.server
                    self.config.call_safely("child_exit", server, server.WORKERS.pop(pid))

    def drain_wake(self):
        try:
            while os.read(self.wake, 512):
                pass
        except BlockingIOError:
            pass

    def end_workers(self):
        """SIGTERM to each, and SIGKILL to those that have not ended within the graceful time.

        Once a second again, for the interpreter looks at signals between two of its steps: one that
        comes in the moment before a recv is noticed when that recv is over.
        """
        now = time.monotonic()
        deadline, again = now + float(self.start.get("graceful_timeout") or 30), now
        while self.workers:
            now = time.monotonic()
            if now > deadline:
                self.signal_workers(signal.SIGKILL)
            elif now >= again:
                self.signal_workers(signal.SIGTERM)
                again = now + 1
            self.reap()
            if self.workers:
                real_sleep(0.01)

    def signal_workers(self, signum):
        for pid in self.workers:
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                pass

    def tell(self, record):
        """uringd may have shut down its half already and still read ours; or be gone, which recv
        will say.
        """
        try:
            self.control.send(json.dumps(record).encode())
        except OSError:
            pass


def load_native(fd):
    """The module in this file of memory, uringd_native.rs; None where it cannot be had. It is for
    CPython as it usually is: with a GIL, and objects that begin with their count and type.
    """
    if fd is None:
        return None
    name, path = "uringd_native", "/proc/self/fd/%d" % fd
    try:
        if (
            sys.implementation.name != "cpython"
            or "t" in sys.abiflags
            or hasattr(sys, "getobjects")
            or os.environ.get("URINGD_NATIVE") == "0"
        ):
            return None
        loader = importlib.machinery.ExtensionFileLoader(name, path)
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        return importlib.util.module_from_spec(spec)
    except Exception:
        return None  # All of it is in this file too, in Python.
    finally:
        try:
            os.close(fd)
        except OSError:
            pass  # the application has closed it


def search_path(added):
    """The directory of the application first, as `python app.py` has it; then --pythonpath; then
    Python's own.
    """
    own = [path for path in sys.path if path != ""]
    if "__file__" in globals() and own and own[0] == os.path.dirname(os.path.abspath(__file__)):
        own.pop(0)
    path = []
    for entry in [os.getcwd()] + [os.path.abspath(entry) for entry in added] + own:
        if entry not in path:
            path.append(entry)
    return path


def thread_count():
    """Threads of this process, Python's and others (a library may have begun some in C)."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


def main():
    worker = Zygote().run()
    sys.exit(worker.run() if worker is not None else 0)


if __name__ == "__main__":
    main()
