"""A Bottle application: templates, static files with ranges, uploads, signed cookies, errors."""

import hashlib
import os

import bottle

HERE = os.path.dirname(os.path.abspath(__file__))
SECRET = "no secret"

app = bottle.Bottle()
# A form may be as large as the upload beside it.
bottle.BaseRequest.MEMFILE_MAX = 100000


@app.get("/")
def page():
    source = "<title>{{title}}</title>\n% for item in items:\n<li>{{item}}</li>\n% end"
    return bottle.template(source, title="caf\u00e9", items=["<one>", "two"])


@app.get("/hello/<name>")
def hello(name):
    return "hello " + name


@app.get("/static/<path:path>")
def static(path):
    return bottle.static_file(path, root=bottle.request.environ.get("app.root", HERE))


@app.get("/download")
def download():
    return bottle.static_file("bottle_app.py", root=HERE, download="caf\u00e9.py")


@app.post("/upload")
def upload():
    told = {}
    for field, file in bottle.request.files.items():
        digest = hashlib.sha256(file.file.read()).hexdigest()
        told[field] = [file.filename, file.content_type, digest]
    return {
        "files": told,
        "form": {k: bottle.request.forms.getunicode(k) for k in bottle.request.forms},
    }


@app.post("/body")
def body():
    data = bottle.request.body.read()
    return {"sha256": hashlib.sha256(data).hexdigest(), "length": len(data)}


@app.post("/json")
def json():
    return {"got": bottle.request.json}


@app.get("/visits")
def visits():
    count = bottle.request.get_cookie("count", default=0, secret=SECRET) + 1
    bottle.response.set_cookie("count", count, secret=SECRET)
    return str(count)


@app.get("/several")
def several():
    bottle.response.add_header("Set-Cookie", "a=1")
    bottle.response.add_header("Set-Cookie", "b=2")
    bottle.response.status = "299 Several"
    return []


@app.get("/words")
def words():
    """A generator of text: Bottle encodes each piece."""
    for word in ("one ", "\u20ac ", "three"):
        yield word


@app.get("/read")
def read():
    """Something that can be read: Bottle hands it to wsgi.file_wrapper."""
    bottle.response.content_type = "text/x-python"
    return open(__file__, "rb")


@app.get("/away")
def away():
    bottle.redirect("/hello/away?a=b")


@app.get("/abort/<code:int>")
def abort(code):
    bottle.abort(code, "aborted, with a reason")


@app.get("/fail")
def fail():
    raise RuntimeError("this route fails")


@app.get("/fail-at-first")
def fail_at_first():
    raise RuntimeError("this generator fails")
    yield "never"


@app.error(404)
def not_found(error):
    return "nothing at " + bottle.request.path


@app.error(418)
def teapot(error):
    bottle.response.content_type = "text/plain"
    return "teapot: " + error.body
