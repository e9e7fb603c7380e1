"""A Flask application that uses what many of them use."""

import hashlib
import time

from flask import (
    Flask,
    Response,
    abort,
    flash,
    get_flashed_messages,
    jsonify,
    redirect,
    render_template_string,
    request,
    send_file,
    session,
    stream_with_context,
    url_for,
)
from werkzeug.middleware.proxy_fix import ProxyFix

app = Flask(__name__)
app.secret_key = "no secret"
# The form in front of the upload may be as large as the upload.
app.config["MAX_FORM_MEMORY_SIZE"] = 10_000_000

PAGE = """<!doctype html><title>{{ title }}</title>
<ul>{% for item in items %}<li>{{ item }}</li>{% endfor %}</ul>"""


@app.get("/")
def page():
    return render_template_string(PAGE, title="caf\u00e9 & more", items=["<one>", "two"])


@app.get("/hello/<name>")
def hello(name):
    return "hello %s" % name


@app.post("/upload")
def upload():
    files = {
        field: {
            "name": file.filename,
            "type": file.mimetype,
            "sha256": hashlib.sha256(file.read()).hexdigest(),
        }
        for field, file in request.files.items()
    }
    return jsonify(files=files, form=request.form.to_dict())


@app.post("/raw")
def raw():
    """The body in pieces, as it may be larger than memory."""
    digest, length = hashlib.sha256(), 0
    while True:
        piece = request.stream.read(10000)
        if not piece:
            return jsonify(sha256=digest.hexdigest(), length=length, told=request.content_length)
        digest.update(piece)
        length += len(piece)


@app.post("/json")
def echo_json():
    return jsonify(request.get_json()), 201


@app.get("/stream")
def stream():
    def lines():
        for number in range(int(request.args["lines"])):
            yield "%s %d\n" % (request.args["word"], number)

    return Response(stream_with_context(lines()), mimetype="text/plain")


@app.get("/events")
def events():
    def two():
        yield "data: first\n\n"
        time.sleep(0.05)
        yield "data: second\n\n"

    return Response(two(), mimetype="text/event-stream", headers={"X-Accel-Buffering": "no"})


@app.get("/count")
def count():
    session["count"] = session.get("count", 0) + 1
    return str(session["count"])


@app.post("/login")
def login():
    session["user"] = request.form["user"]
    flash("welcome, %s" % request.form["user"])
    response = redirect(url_for("account"))
    response.set_cookie("theme", "dark", httponly=True)
    response.set_cookie("language", "d\u00e9", max_age=60)
    return response


@app.get("/account")
def account():
    if "user" not in session:
        abort(403)
    cookies = {name: request.cookies.get(name) for name in ("theme", "language")}
    return jsonify(user=session["user"], messages=get_flashed_messages(), cookies=cookies)


@app.get("/external")
def external():
    return url_for("hello", name="x", _external=True)


@app.get("/who")
def who():
    return jsonify(remote=request.remote_addr, secure=request.is_secure)


@app.get("/port")
def port():
    return request.environ["REMOTE_PORT"]


@app.get("/old")
def old():
    return redirect(url_for("hello", name="moved"), 301)


@app.get("/file")
def file():
    return send_file(__file__, mimetype="text/x-python", conditional=True, max_age=60)


@app.get("/fail")
def fail():
    raise RuntimeError("this view fails")


@app.get("/fail-in-the-middle")
def fail_in_the_middle():
    def pieces():
        yield "the beginning"
        raise RuntimeError("this stream fails")

    return Response(pieces(), mimetype="text/plain")


@app.errorhandler(404)
def not_found(error):
    return render_template_string("<h1>nothing at {{ path }}</h1>", path=request.path), 404


@app.errorhandler(403)
def forbidden(error):
    return jsonify(error=error.description), 403


# As behind a proxy that names host and prefix; uringd itself sees to scheme and address.
behind_a_proxy = ProxyFix(app, x_for=0, x_proto=0, x_host=1, x_prefix=1)
