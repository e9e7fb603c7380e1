"""A Falcon application: media, streams of both directions, hooks, errors."""

import hashlib
import io

import falcon


class Things:
    """JSON in and out."""

    def __init__(self):
        self.things = {}

    def on_get(self, request, response, name):
        if name not in self.things:
            raise falcon.HTTPNotFound(title="No such thing", description="There is no %s." % name)
        response.media = self.things[name]
        response.etag = hashlib.sha256(repr(self.things[name]).encode()).hexdigest()[:16]

    def on_put(self, request, response, name):
        self.things[name] = request.get_media()
        response.status = falcon.HTTP_201
        response.location = request.path

    def on_delete(self, request, response, name):
        del self.things[name]
        response.status = falcon.HTTP_204


class Body:
    """A body read from bounded_stream, in pieces or through the rest of its methods."""

    def on_post(self, request, response):
        digest, length, stream = hashlib.sha256(), 0, request.bounded_stream
        while not stream.eof:
            piece = stream.read(10000)
            digest.update(piece)
            length += len(piece)
        response.media = {
            "sha256": digest.hexdigest(),
            "length": length,
            "told": request.content_length,
            "beyond": stream.read().decode() + stream.readline().decode(),
        }

    def on_put(self, request, response):
        response.media = [line.decode() for line in request.bounded_stream]


class Upload:
    """A form, part by part, none of them in memory as a whole."""

    def on_post(self, request, response):
        response.media = parts = {}
        for part in request.get_media():
            digest, length = hashlib.sha256(), 0
            while True:
                piece = part.stream.read(5000)
                if not piece:
                    break
                digest.update(piece)
                length += len(piece)
            parts[part.name] = [part.filename, part.content_type, length, digest.hexdigest()]


class Streams:
    def on_get(self, request, response, kind):
        response.content_type = falcon.MEDIA_TEXT
        if kind == "generator":
            response.stream = (b"%d\n" % number for number in range(20000))
        elif kind == "sized":
            response.set_stream(iter([b"12345", b"67890"]), 10)
        elif kind == "file":
            # Falcon hands what can be read to wsgi.file_wrapper.
            response.stream = open(__file__, "rb")
        elif kind == "memory":
            response.stream = io.BytesIO(b"from memory")


class Cookies:
    def on_get(self, request, response):
        response.media = request.cookies
        response.set_cookie("first", "1", secure=False)
        response.set_cookie("second", "a b", secure=False, max_age=60)
        response.append_header("X-Several", "one")
        response.append_header("X-Several", "two")


class Failing:
    def on_get(self, request, response, how):
        if how == "teapot":
            raise falcon.HTTPError("418 I'm a teapot", title="Short and stout")
        if how == "busy":
            raise falcon.HTTPServiceUnavailable(title="Busy", retry_after=7)
        if how == "moved":
            raise falcon.HTTPMovedPermanently("/things/there")
        if how == "own":
            raise LookupError("handled by the application")
        raise RuntimeError("this resource fails")


def handle_own(request, response, error, params):
    raise falcon.HTTPUnprocessableEntity(title="Own", description=str(error))


class Environ:
    def on_get(self, request, response, rest):
        response.media = {
            "url": request.url,
            "forwarded_uri": request.forwarded_uri,
            "host": request.host,
            "port": request.port,
            "scheme": request.scheme,
            "remote": request.remote_addr,
            "access_route": request.access_route,
            "params": request.params,
            "path": request.path,
        }


app = falcon.App()
app.add_error_handler(LookupError, handle_own)
app.add_route("/things/{name}", Things())
app.add_route("/body", Body())
app.add_route("/upload", Upload())
app.add_route("/streams/{kind}", Streams())
app.add_route("/cookies", Cookies())
app.add_route("/failing/{how}", Failing())
app.add_route("/environ/{rest:path}", Environ())
